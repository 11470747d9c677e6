//! The seam between the store and the filesystem: every call that changes the disk goes through [`Disk`].
//!
//! Tests stand in for it to fail any call, or to cut the power after it. Reading what was published does not pass
//! here: files are immutable once they have a name, and readers check what they read.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{IoContext, StoreError};

/// The calls that change the disk.
///
/// Nothing is durable before [`Disk::sync`] (a file's bytes) or [`Disk::sync_dir`] (a directory's names) returned.
pub trait Disk: Send + Sync + std::fmt::Debug {
    /// Makes a directory that only its owner may enter: a store holds what others may not read in the project. It is well
    /// if it exists already.
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

/// A temporary name. Dropping it removes the file, unless it was published.
#[derive(Debug)]
pub(crate) struct TmpName {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    published: AtomicBool,
}

impl TmpName {
    /// Gives the file the name `to`. What it holds must be durable, unless it is a cache.
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

    pub(crate) fn sync(&self) -> Result<(), StoreError> {
        self.name.disk.sync(&self.file).at("syncing", self.path())
    }

    /// See [`TmpName::publish`].
    pub(crate) fn publish(&self, to: &Path) -> Result<(), StoreError> {
        self.name.publish(to)
    }
}
