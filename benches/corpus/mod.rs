//! What the benches run on: made once, kept under `${XDG_CACHE_HOME:-~/.cache}/iii-tests` by what
//! it is made from.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::{Error, Result, failed};

/// Where everything that is made once is kept, and scratch directories are made.
pub fn cache() -> Result<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::home_dir().map(|home| home.join(".cache")))
        .ok_or(Error::NoHome)?
        .join("iii-tests");
    fs::create_dir_all(&cache).map_err(failed("making", &cache))?;
    Ok(cache)
}

/// A path in the repository.
pub fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}
