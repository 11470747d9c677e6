//! Where a store is.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::disk::Disk;

/// The directory of a store, and the disk that it is on: all that leases, locks and the trash need
/// to know of it.
#[derive(Debug, Clone)]
pub(crate) struct Site {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
}

impl Site {
    pub(crate) fn new(disk: Arc<dyn Disk>, dir: &Path) -> Self {
        let dir = dir.to_owned();
        Self { disk, dir }
    }

    pub(crate) fn disk(&self) -> &Arc<dyn Disk> {
        &self.disk
    }

    /// The store's directory.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Under this name the format is written before it is renamed. The file belongs to the holder
    /// of [`Site::format_lock`].
    pub(crate) fn format_tmp(&self) -> PathBuf {
        self.dir.join("tmp/format")
    }

    /// The lock of the process that makes the store, or adds a feature to its format.
    pub(crate) fn format_lock(&self) -> PathBuf {
        self.dir.join("locks/format")
    }
}
