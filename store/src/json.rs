//! Sealed JSON files, which are replaced as a whole.

use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::disk::{Disk, read_file};
use crate::error::{IoContext, StoreError};
use crate::lease::Lease;
use crate::seal;

pub(crate) fn seal_broken(path: PathBuf) -> StoreError {
    let what = "its seal does not hold";
    StoreError::Damaged { path, what }
}

/// Reads a sealed JSON file of the store, if there is one.
pub(crate) fn read_json<T: DeserializeOwned>(
    disk: &dyn Disk,
    path: &Path,
    limit: u64,
) -> Result<Option<T>, StoreError> {
    let Some(text) = read_file(disk, path, limit)? else {
        return Ok(None);
    };
    let json = seal::open(&text).ok_or_else(|| seal_broken(path.to_owned()))?;
    let value = serde_json::from_slice(json).map_err(|source| StoreError::Json {
        path: path.to_owned(),
        source,
    })?;
    Ok(Some(value))
}

/// Writes a JSON file and its seal, durably, replacing the one before.
pub(crate) fn write_json<T: Serialize>(
    lease: &Lease,
    path: &Path,
    value: &T,
    limit: u64,
) -> Result<(), StoreError> {
    let json = |source| StoreError::Json {
        path: path.to_owned(),
        source,
    };
    let text = serde_json::to_vec_pretty(value).map_err(json)?;
    write_text(lease, path, text, limit)
}

/// As [`write_json`], without white space: for files that may become long.
pub(crate) fn write_json_compact<T: Serialize>(
    lease: &Lease,
    path: &Path,
    value: &T,
    limit: u64,
) -> Result<(), StoreError> {
    let json = |source| StoreError::Json {
        path: path.to_owned(),
        source,
    };
    let text = serde_json::to_vec(value).map_err(json)?;
    write_text(lease, path, text, limit)
}

fn write_text(lease: &Lease, path: &Path, text: Vec<u8>, limit: u64) -> Result<(), StoreError> {
    let text = seal::seal(text);
    if text.len() as u64 > limit {
        let what = "the text to record";
        return Err(StoreError::TooLarge { what, limit });
    }
    let tmp = lease.tmp()?;
    tmp.write(&text, 0)?;
    tmp.sync()?;
    tmp.publish(path)?;
    let dir = path.parent().unwrap_or(path);
    lease.site().disk().sync_dir(dir).at("syncing", dir)
}
