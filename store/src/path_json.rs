//! Paths in JSON, which holds UTF-8 alone: escaped as in the JSON of a fact.

use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use serde::{Serialize as _, Serializer};

use crate::facts::path_text;

/// The text of a path: `%` and bytes that are not printable UTF-8 are written as `%` and two hex
/// digits.
pub fn text(path: &Path) -> String {
    path_text(path.as_os_str().as_bytes())
}

/// Serializes a path.
pub fn one<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&text(path))
}

/// Serializes a path that may be absent.
// The signature is serde's.
#[allow(clippy::ref_option)]
pub fn maybe<S: Serializer>(path: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
    path.as_deref().map(text).serialize(serializer)
}

/// Serializes paths.
pub fn all<S: Serializer>(paths: &[PathBuf], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(paths.iter().map(|path| text(path)))
}
