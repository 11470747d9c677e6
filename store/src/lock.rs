//! Locks among processes: files under `locks/` that are flocked while held and gone when free.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FlockOperation, flock};

use crate::disk::{Disk, names};
use crate::error::{IoContext, StoreError};

/// A lock that one process at a time holds. Dropping it, or the death of the process, releases it.
#[derive(Debug)]
pub(crate) struct FileLock {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    /// Closing it releases the lock.
    _file: File,
}

impl FileLock {
    /// Waits for the lock. Calls `on_wait` once if another process has it.
    pub(crate) fn acquire(
        disk: &Arc<dyn Disk>,
        path: &Path,
        on_wait: &dyn Fn(),
    ) -> Result<Self, StoreError> {
        let mut waited = false;
        loop {
            let file = disk.open_lock(path).at("opening the lock", path)?;
            if !try_lock(&file).at("locking", path)? {
                if !waited {
                    on_wait();
                    waited = true;
                }
                wait_lock(&file).at("locking", path)?;
            }
            if let Some(lock) = Self::hold(disk, path, file)? {
                return Ok(lock);
            }
        }
    }

    /// Takes the lock, unless another process has it.
    pub(crate) fn try_acquire(
        disk: &Arc<dyn Disk>,
        path: &Path,
    ) -> Result<Option<Self>, StoreError> {
        loop {
            let file = disk.open_lock(path).at("opening the lock", path)?;
            if !try_lock(&file).at("locking", path)? {
                return Ok(None);
            }
            if let Some(lock) = Self::hold(disk, path, file)? {
                return Ok(Some(lock));
            }
        }
    }

    /// A lock of a locked file, unless its former holder removed the file meanwhile, and
    /// another process made the next one.
    fn hold(disk: &Arc<dyn Disk>, path: &Path, file: File) -> Result<Option<Self>, StoreError> {
        let is_at = is_at(disk.as_ref(), &file, path).at("looking at", path)?;
        Ok(is_at.then(|| Self {
            disk: Arc::clone(disk),
            path: path.to_owned(),
            _file: file,
        }))
    }
}

impl Drop for FileLock {
    fn drop(&mut self) {
        // While it is still locked, so that no other process can hold the removed file.
        let _ = self.disk.remove(&self.path);
    }
}

/// Removes the lock files that processes which died, or failed to remove them, have left in `dir`.
pub(crate) fn sweep(disk: &Arc<dyn Disk>, dir: &Path) -> Result<(), StoreError> {
    for name in names(disk.as_ref(), dir)? {
        let path = dir.join(name);
        let file = match disk.open(&path) {
            Err(err) if err.kind() == io::ErrorKind::NotFound => continue,
            other => other.at("opening the lock", &path)?,
        };
        if try_lock(&file).at("locking", &path)? {
            drop(FileLock::hold(disk, &path, file)?);
        }
    }
    Ok(())
}

/// Locks `file` if no other process has it.
pub(crate) fn try_lock(file: &File) -> io::Result<bool> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
        Err(err) => Err(err.into()),
    }
}

fn wait_lock(file: &File) -> io::Result<()> {
    loop {
        match flock(file, FlockOperation::LockExclusive) {
            Err(rustix::io::Errno::INTR) => {}
            other => return other.map_err(io::Error::from),
        }
    }
}

/// Whether `path` names this very file.
fn is_at(disk: &dyn Disk, file: &File, path: &Path) -> io::Result<bool> {
    let held = file.metadata()?;
    match disk.metadata(path) {
        Ok(named) => Ok(held.dev() == named.dev() && held.ino() == named.ino()),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(err) => Err(err),
    }
}
