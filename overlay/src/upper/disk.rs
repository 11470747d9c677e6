//! The seam between an upper and the host's filesystem: the calls that make, name, sync and remove
//! its files go through [`Disk`].
//!
//! Tests replace it to make any call fail, or to cut the power after it. Reads bypass it, and so do
//! writes to flat files, whose bytes a test can read itself.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::Path;

use crate::posix::Allocate;

/// An id that is the same from one start of the host to the next.
pub type Boot = [u8; 16];

/// How a file of an upper is opened; the open never follows a symlink and never waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Read an existing file.
    Read,
    /// Read and write an existing file.
    Write,
    /// Read and write a file, made when missing.
    Make,
    /// Read and write a new file.
    New,
    /// Read and write a file that is emptied, or made when missing.
    Empty,
}

/// The calls that an upper makes. Nothing is durable before a sync call has returned: a file's
/// bytes by [`Disk::sync_data`], a name by [`Disk::sync_dir`].
pub trait Disk: Send + Sync + std::fmt::Debug {
    /// Makes a directory and its missing parents, unless they exist.
    fn create_dirs(&self, path: &Path) -> io::Result<()>;
    /// Opens a file.
    fn open(&self, path: &Path, access: Access) -> io::Result<File>;
    /// Writes all of `bytes` at `offset`.
    fn write_at(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Sets the length in bytes.
    fn set_len(&self, file: &File, len: u64) -> io::Result<()>;
    /// Allocates space for `len` bytes from `offset`, without changing the length.
    fn allocate(&self, file: &File, offset: u64, len: u64) -> io::Result<()>;
    /// Returns when the file's bytes and length are durable; unless `data_only`, its times too.
    fn sync(&self, file: &File, data_only: bool) -> io::Result<()>;
    /// Returns when the names in the directory are durable.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Returns when everything on the filesystem of the directory is durable.
    fn sync_filesystem(&self, path: &Path) -> io::Result<()>;
    /// Renames a file, replacing the file that had the new name.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// The id of the host's running kernel, if it has one: as long as the id is the same, data that
    /// was written but not synced is still there.
    fn boot(&self) -> Option<Boot>;
}

/// The host's filesystem itself.
#[derive(Debug, Clone, Copy)]
pub struct HostDisk;

impl Disk for HostDisk {
    fn create_dirs(&self, path: &Path) -> io::Result<()> {
        std::fs::create_dir_all(path)
    }

    fn open(&self, path: &Path, access: Access) -> io::Result<File> {
        let mut options = OpenOptions::new();
        // A guest that had taken over its server may have written the upper before.
        options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
        options.read(true).write(access != Access::Read);
        match access {
            Access::Read | Access::Write => {}
            Access::Make => {
                options.create(true).truncate(false);
            }
            Access::New => {
                options.create_new(true);
            }
            Access::Empty => {
                options.create(true).truncate(true);
            }
        }
        options.open(path)
    }

    fn write_at(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        file.write_all_at(bytes, offset)
    }

    fn set_len(&self, file: &File, len: u64) -> io::Result<()> {
        file.set_len(len)
    }

    fn allocate(&self, file: &File, offset: u64, len: u64) -> io::Result<()> {
        crate::host::allocate(file, Allocate::KeepSize, offset, len)?;
        Ok(())
    }

    fn sync(&self, file: &File, data_only: bool) -> io::Result<()> {
        if data_only {
            file.sync_data()
        } else {
            file.sync_all()
        }
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn sync_filesystem(&self, path: &Path) -> io::Result<()> {
        crate::host::syncfs(&File::open(path)?)?;
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_file(path)
    }

    fn boot(&self) -> Option<Boot> {
        crate::host::boot()
    }
}
