//! A disk with a hook before each call, for the tests that fail, record, cut or schedule calls.

use std::ffi::OsString;
use std::fmt::{self, Debug};
use std::fs::{File, Metadata};
use std::io;
use std::path::Path;

use iii_store::disk::{Disk, RealDisk, Space};

use crate::helpers::NoSync;

/// A call of [`Disk`].
#[derive(Clone, Copy)]
pub enum Call<'a> {
    CreateDir(&'a Path),
    Create(&'a Path),
    Write(&'a File, &'a [u8], u64),
    Reflink(&'a File, &'a File),
    Sync(&'a File),
    Rename(&'a Path, &'a Path),
    SyncDir(&'a Path),
    Remove(&'a Path),
    RemoveDir(&'a Path),
    OpenLock(&'a Path),
    Touch(&'a Path),
    Open(&'a Path),
    Read,
    Map,
    Metadata(&'a Path),
    List(&'a Path),
    Space(&'a Path),
}

impl Call<'_> {
    /// Whether the call changes the disk, or asks that a change be kept.
    pub fn writes(&self) -> bool {
        !matches!(
            self,
            Self::Open(_)
                | Self::Read
                | Self::Map
                | Self::Metadata(_)
                | Self::List(_)
                | Self::Space(_)
        )
    }
}

impl Debug for Call<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CreateDir(path) => write!(f, "create_dir {}", path.display()),
            Self::Create(path) => write!(f, "create {}", path.display()),
            Self::Write(_, bytes, at) => write!(f, "write_at {at}, {} bytes", bytes.len()),
            Self::Reflink(..) => f.write_str("reflink"),
            Self::Sync(_) => f.write_str("sync"),
            Self::Rename(from, to) => write!(f, "rename {} {}", from.display(), to.display()),
            Self::SyncDir(path) => write!(f, "sync_dir {}", path.display()),
            Self::Remove(path) => write!(f, "remove {}", path.display()),
            Self::RemoveDir(path) => write!(f, "remove_dir {}", path.display()),
            Self::OpenLock(path) => write!(f, "open_lock {}", path.display()),
            Self::Touch(path) => write!(f, "touch {}", path.display()),
            Self::Open(path) => write!(f, "open {}", path.display()),
            Self::Read => f.write_str("read_at"),
            Self::Map => f.write_str("map"),
            Self::Metadata(path) => write!(f, "metadata {}", path.display()),
            Self::List(path) => write!(f, "list {}", path.display()),
            Self::Space(path) => write!(f, "space {}", path.display()),
        }
    }
}

/// Behaviour around each call.
pub trait Hook: Send + Sync + Debug {
    /// Makes the call with `run`, or does not.
    fn around<T>(&self, call: Call<'_>, run: impl FnOnce() -> io::Result<T>) -> io::Result<T>;

    /// How many of these bytes a read may give.
    fn at_most(&self, len: usize) -> usize {
        len
    }
}

/// The filesystem behind a hook, without waiting for the disk. Where it cannot share blocks, it
/// copies them and reports success.
#[derive(Debug)]
pub struct Hooked<H>(pub H);

impl<H: Hook> Disk for Hooked<H> {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.0
            .around(Call::CreateDir(path), || NoSync.create_dir(path))
    }

    fn create(&self, path: &Path) -> io::Result<File> {
        self.0.around(Call::Create(path), || NoSync.create(path))
    }

    fn write_at(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.around(Call::Write(file, bytes, offset), || {
            NoSync.write_at(file, bytes, offset)
        })
    }

    fn reflink(&self, from: &File, to: &File) -> io::Result<()> {
        self.0.around(Call::Reflink(from, to), || {
            let bytes = all_of(from)?;
            RealDisk.write_at(to, &bytes, 0)
        })
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        self.0.around(Call::Sync(file), || NoSync.sync(file))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.0
            .around(Call::Rename(from, to), || NoSync.rename(from, to))
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        // It must be there.
        self.0
            .around(Call::SyncDir(path), || NoSync.list(path).map(drop))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.0.around(Call::Remove(path), || NoSync.remove(path))
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.0
            .around(Call::RemoveDir(path), || NoSync.remove_dir(path))
    }

    fn open_lock(&self, path: &Path) -> io::Result<File> {
        self.0
            .around(Call::OpenLock(path), || NoSync.open_lock(path))
    }

    fn touch(&self, path: &Path) -> io::Result<()> {
        self.0.around(Call::Touch(path), || NoSync.touch(path))
    }

    fn open(&self, path: &Path) -> io::Result<File> {
        self.0.around(Call::Open(path), || NoSync.open(path))
    }

    fn read_at(&self, file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.around(Call::Read, || {
            let len = self.0.at_most(buf.len());
            NoSync.read_at(file, &mut buf[..len], offset)
        })
    }

    fn may_map(&self, file: &File) -> io::Result<()> {
        self.0.around(Call::Map, || NoSync.may_map(file))
    }

    fn metadata(&self, path: &Path) -> io::Result<Metadata> {
        self.0
            .around(Call::Metadata(path), || NoSync.metadata(path))
    }

    fn may_write_in(&self, dir: &Path) -> io::Result<()> {
        NoSync.may_write_in(dir)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<OsString>> {
        self.0.around(Call::List(path), || NoSync.list(path))
    }

    fn space(&self, path: &Path) -> io::Result<Space> {
        self.0.around(Call::Space(path), || NoSync.space(path))
    }
}

/// All bytes of a file, whatever its position.
pub fn all_of(file: &File) -> io::Result<Vec<u8>> {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0; file.metadata()?.len() as usize];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}
