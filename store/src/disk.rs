//! The seam between the store and the filesystem: every call that changes the disk goes through [`Disk`].
//!
//! Tests stand in for it to fail any call, or to cut the power after it. Reading what was published does not pass
//! here: files are immutable once they have a name, and readers check what they read.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The calls that change the disk.
///
/// Nothing is durable before [`Disk::sync`] (a file's bytes) or [`Disk::sync_dir`] (a directory's names) returned.
pub trait Disk: Send + Sync + std::fmt::Debug {
    /// Makes a directory. It is well if it exists already.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// Makes a new, empty file that only this handle can write.
    fn create(&self, path: &Path) -> io::Result<File>;
    /// Writes all of `bytes` at `offset`.
    fn write_at(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Makes the empty file `to` share the blocks of `from`. An error means that nothing was shared.
    fn reflink(&self, from: &File, to: &File) -> io::Result<()>;
    /// Returns when the file's bytes and length are durable.
    fn sync(&self, file: &File) -> io::Result<()>;
    /// Gives a file its name, replacing what had it.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Returns when the names in the directory are durable.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, path: &Path) -> io::Result<()>;
}

/// The filesystem itself.
#[derive(Debug, Clone, Copy)]
pub struct RealDisk;

impl Disk for RealDisk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        match std::fs::create_dir(path) {
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
        Err(io::ErrorKind::Unsupported.into())
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
}

/// A file under a temporary name. Dropping it removes it, unless it was published.
#[derive(Debug)]
pub(crate) struct TmpFile {
    disk: Arc<dyn Disk>,
    pub(crate) path: PathBuf,
    pub(crate) file: Arc<File>,
    published: bool,
}

impl TmpFile {
    pub(crate) fn create(disk: Arc<dyn Disk>, path: PathBuf) -> io::Result<Self> {
        let file = Arc::new(disk.create(&path)?);
        Ok(Self {
            disk,
            path,
            file,
            published: false,
        })
    }

    /// Renames it to `to`. What it holds must be durable, unless it is a cache.
    pub(crate) fn publish(&mut self, to: &Path) -> io::Result<()> {
        self.disk.rename(&self.path, to)?;
        self.published = true;
        Ok(())
    }
}

impl Drop for TmpFile {
    fn drop(&mut self) {
        if !self.published {
            // A leftover is removed with the leases of the dead.
            let _ = self.disk.remove(&self.path);
        }
    }
}
