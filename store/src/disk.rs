//! The seam between the store and the filesystem: every call that reads or changes the disk goes
//! through [`Disk`].
//!
//! Tests stand in for it to fail any call, or to cut the power after it. Three things do not pass
//! here: `flock` and asking an open file for its length, which touch no disk, and loads from a
//! mapping, which cannot fail as long as the file is as long as when it was mapped. The directory
//! that a snapshot takes in is not the store's.

use std::ffi::OsString;
use std::fs::{DirBuilder, File, Metadata};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{IoContext, StoreError};

/// Bytes of one block of [`MetadataExt::blocks`].
const BLOCK: u64 = 512;

/// The calls that the store makes.
///
/// Nothing is durable before [`Disk::sync`] (a file's bytes) or [`Disk::sync_dir`] (a directory's
/// names) returned.
pub trait Disk: Send + Sync + std::fmt::Debug {
    /// Makes a directory that only its owner may enter: a store holds contents that others may not
    /// read in the project. It is well if it exists already.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// Makes a new, empty file that only this handle can write.
    fn create(&self, path: &Path) -> io::Result<File>;
    /// Writes all of `bytes` at `offset`.
    fn write_at(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Makes the empty file `to` share the blocks of `from`. An error means that nothing was
    /// shared.
    fn reflink(&self, from: &File, to: &File) -> io::Result<()>;
    /// Returns when the file's bytes and length are durable.
    fn sync(&self, file: &File) -> io::Result<()>;
    /// Gives a file its name, replacing an earlier file of that name.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Returns when the names in the directory are durable.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Removes an empty directory.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;
    /// Opens a file for reading, or makes an empty one: a file for processes to lock.
    fn open_lock(&self, path: &Path) -> io::Result<File>;
    /// Sets the mtime of a file that is there to now. It need not be durable.
    fn touch(&self, path: &Path) -> io::Result<()>;
    /// Opens a file for reading.
    fn open(&self, path: &Path) -> io::Result<File>;
    /// Reads once; 0 bytes at the end.
    fn read_at(&self, file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Asked before each mapping of a file. An error stands for that of the mapping: a test has it
    /// fail.
    fn may_map(&self, file: &File) -> io::Result<()> {
        let _ = file;
        Ok(())
    }
    /// Metadata of a name, without following a symlink.
    fn metadata(&self, path: &Path) -> io::Result<Metadata>;
    /// An error if this user may not make and remove names in a directory.
    fn may_write_in(&self, dir: &Path) -> io::Result<()>;
    /// The names in a directory, in any order.
    fn list(&self, path: &Path) -> io::Result<Vec<OsString>>;
    /// How large the filesystem of `path` is.
    fn space(&self, path: &Path) -> io::Result<Space>;
}

/// How large a filesystem is, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Bytes that this user can still write.
    pub free: u64,
    /// Size in bytes.
    pub total: u64,
}

/// The filesystem itself.
#[derive(Debug, Clone, Copy)]
pub struct RealDisk;

impl Disk for RealDisk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        match DirBuilder::new().mode(0o700).create(path) {
            Err(err) if err.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other,
        }
    }

    fn create(&self, path: &Path) -> io::Result<File> {
        File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o444)
            .open(path)
    }

    fn write_at(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        file.write_all_at(bytes, offset)
    }

    fn reflink(&self, from: &File, to: &File) -> io::Result<()> {
        #[cfg(target_os = "linux")]
        return rustix::fs::ioctl_ficlone(to, from).map_err(io::Error::from);
        #[cfg(not(target_os = "linux"))]
        {
            let _ = (from, to);
            Err(io::ErrorKind::Unsupported.into())
        }
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        file.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_dir(path)
    }

    fn open_lock(&self, path: &Path) -> io::Result<File> {
        File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
    }

    fn touch(&self, path: &Path) -> io::Result<()> {
        use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};
        let time = |tv_nsec| Timespec { tv_sec: 0, tv_nsec };
        let times = Timestamps {
            last_access: time(UTIME_OMIT),
            last_modification: time(UTIME_NOW),
        };
        rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(())
    }

    fn open(&self, path: &Path) -> io::Result<File> {
        File::open(path)
    }

    fn read_at(&self, file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        file.read_at(buf, offset)
    }

    fn metadata(&self, path: &Path) -> io::Result<Metadata> {
        std::fs::symlink_metadata(path)
    }

    fn may_write_in(&self, dir: &Path) -> io::Result<()> {
        use rustix::fs::{Access, access};
        Ok(access(dir, Access::WRITE_OK | Access::EXEC_OK)?)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<OsString>> {
        path.read_dir()?
            .map(|entry| Ok(entry?.file_name()))
            .collect()
    }

    fn space(&self, path: &Path) -> io::Result<Space> {
        let fs = rustix::fs::statvfs(path)?;
        Ok(Space {
            free: fs.f_bavail.saturating_mul(fs.f_frsize),
            total: fs.f_blocks.saturating_mul(fs.f_frsize),
        })
    }
}

/// Bytes that the filesystem uses for a file.
pub(crate) fn on_disk(meta: &Metadata) -> u64 {
    meta.blocks() * BLOCK
}

/// The names in a directory of the store. Those that are not UTF-8 are not the store's.
pub(crate) fn names(disk: &dyn Disk, dir: &Path) -> Result<Vec<String>, StoreError> {
    let names = disk.list(dir).at("listing", dir)?;
    Ok(names
        .into_iter()
        .filter_map(|name| name.into_string().ok())
        .collect())
}

/// Reads a whole file that is at most `limit` bytes long, if there is one.
pub(crate) fn read_file(
    disk: &dyn Disk,
    path: &Path,
    limit: u64,
) -> Result<Option<Vec<u8>>, StoreError> {
    let file = match disk.open(path) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.at("opening", path)?,
    };
    let len = file.metadata().at("looking at", path)?.len();
    if len > limit {
        let what = "it is larger than any such file";
        return Err(StoreError::Damaged {
            path: path.to_owned(),
            what,
        });
    }
    let mut bytes = vec![0; len as usize];
    let mut filled = 0;
    while filled < bytes.len() {
        match disk.read_at(&file, &mut bytes[filled..], filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            Err(err) => return Err(err).at("reading", path),
        }
    }
    bytes.truncate(filled);
    Ok(Some(bytes))
}

/// A temporary name. Dropping it removes the file, unless it was published.
#[derive(Debug)]
pub(crate) struct TmpName {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    published: AtomicBool,
}

impl TmpName {
    /// Gives the file the name `to`. Its contents must be durable, unless it is a cache.
    pub(crate) fn publish(&self, to: &Path) -> Result<(), StoreError> {
        self.disk.rename(&self.path, to).at("renaming to", to)?;
        self.published.store(true, Ordering::Relaxed);
        Ok(())
    }
}

impl Drop for TmpName {
    fn drop(&mut self) {
        if !self.published.load(Ordering::Relaxed) {
            // A leftover is removed with the leases of the dead.
            let _ = self.disk.remove(&self.path);
        }
    }
}

/// A file under a temporary name.
#[derive(Debug)]
pub(crate) struct TmpFile {
    pub(crate) name: TmpName,
    pub(crate) file: Arc<File>,
}

impl TmpFile {
    pub(crate) fn create(disk: Arc<dyn Disk>, path: PathBuf) -> Result<Self, StoreError> {
        let file = Arc::new(disk.create(&path).at("creating", &path)?);
        let name = TmpName {
            disk,
            path,
            published: AtomicBool::new(false),
        };
        Ok(Self { name, file })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.name.path
    }

    pub(crate) fn write(&self, bytes: &[u8], offset: u64) -> Result<(), StoreError> {
        let written = self.name.disk.write_at(&self.file, bytes, offset);
        written.at("writing", self.path())
    }

    /// Reads back once.
    pub(crate) fn read(&self, buf: &mut [u8], offset: u64) -> Result<usize, StoreError> {
        let read = self.name.disk.read_at(&self.file, buf, offset);
        read.at("reading", self.path())
    }

    pub(crate) fn sync(&self) -> Result<(), StoreError> {
        self.name.disk.sync(&self.file).at("syncing", self.path())
    }

    /// See [`TmpName::publish`].
    pub(crate) fn publish(&self, to: &Path) -> Result<(), StoreError> {
        self.name.publish(to)
    }
}
