//! Bytes of a published file: mapped, or held in memory by tests and fuzzers.

use std::fs::File;
use std::io;
use std::ops::Deref;

use memmap2::Mmap;

#[derive(Debug)]
pub(crate) enum Bytes {
    Mapped(Mmap),
    Owned(Vec<u8>),
}

impl Bytes {
    /// Maps a file of the store: a layer, a pack's index, a stat cache.
    pub(crate) fn map(file: &File) -> io::Result<Self> {
        if file.metadata()?.len() == 0 {
            return Ok(Self::Owned(Vec::new()));
        }
        // SAFETY: the files of a store are written once under a temporary name, renamed into place and from then on
        // only ever unlinked or replaced by a rename, never written or truncated, so the mapping does not change and
        // stays backed.
        let map = unsafe { Mmap::map(file) }?;
        Ok(Self::Mapped(map))
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Owned(bytes) => bytes,
        }
    }
}
