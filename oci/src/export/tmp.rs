//! Files and directories on their way to their name, beside where they will be. Each is locked by
//! who makes it, so that remains of a killed process differ from files in the making.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use tempfile::{Builder, NamedTempFile, TempDir};

use super::{ExportError, io_error};

/// Mode of new files, less the umask.
const FILE_MODE: u32 = 0o644;
const DIR_MODE: u32 = 0o755;

/// A temporary directory, removed when it is dropped.
pub struct LockedDir {
    pub dir: TempDir,
    _lock: File,
}

/// Makes a temporary directory in `parent`. The caller keeps [`sweep`] away meanwhile.
pub fn directory(parent: &Path, prefix: &str) -> Result<LockedDir, ExportError> {
    let dir = Builder::new()
        .prefix(prefix)
        .permissions(Permissions::from_mode(DIR_MODE))
        .tempdir_in(parent)
        .map_err(io_error("writing to", parent))?;
    let lock = File::open(dir.path()).and_then(|file| {
        file.lock()?;
        Ok(file)
    });
    let lock = lock.map_err(io_error("locking", dir.path()))?;
    Ok(LockedDir { dir, _lock: lock })
}

/// Makes a temporary file in `parent`.
pub fn file(parent: &Path, prefix: &str) -> Result<NamedTempFile, ExportError> {
    let file = Builder::new()
        .prefix(prefix)
        .permissions(Permissions::from_mode(FILE_MODE))
        .tempfile_in(parent)
        .map_err(io_error("writing to", parent))?;
    file.as_file()
        .lock()
        .map_err(io_error("locking", file.path()))?;
    Ok(file)
}

/// Removes what dead processes have left in `parent` under names that begin with `prefix`. Failing
/// to is no harm.
pub fn sweep(parent: &Path, prefix: &str) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let path = entry.path();
        let named = entry
            .file_name()
            .as_encoded_bytes()
            .starts_with(prefix.as_bytes());
        let ours = entry
            .file_type()
            .is_ok_and(|kind| kind.is_dir() || kind.is_file());
        if !named || !ours {
            continue;
        }
        let Ok(file) = File::open(&path) else {
            continue;
        };
        if file.try_lock().is_ok() {
            let _ = if path.is_dir() {
                fs::remove_dir_all(&path)
            } else {
                fs::remove_file(&path)
            };
        }
    }
}

/// Gives a finished file its name, durably once the directory is synced.
pub fn rename(file: NamedTempFile, to: &Path) -> Result<(), ExportError> {
    file.as_file()
        .sync_all()
        .map_err(io_error("syncing", file.path()))?;
    match file.persist(to) {
        Ok(_) => Ok(()),
        Err(error) => Err(io_error("writing", to)(error.error)),
    }
}

pub fn sync_dir(dir: &Path) -> Result<(), ExportError> {
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(io_error("syncing", dir))
}

/// Locks a directory against other processes until the file is dropped.
pub fn lock_dir(dir: &Path) -> Result<File, ExportError> {
    let file = File::open(dir).map_err(io_error("opening", dir))?;
    file.lock().map_err(io_error("locking", dir))?;
    Ok(file)
}

/// The directory that a path stands in.
pub fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}
