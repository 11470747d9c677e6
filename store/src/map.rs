//! Bytes of a published file: mapped, or held in memory by tests and fuzzers.

use std::fs::File;
use std::io;
use std::ops::Deref;

use memmap2::{Mmap, UncheckedAdvice};

/// What is read through once is read in pieces of so many bytes, each of which leaves memory before the next.
const PIECE: usize = 16 << 20;

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

    /// Lets go of the pages that are in memory; they come back when they are read again. For who looks at much of a mapping
    /// once.
    pub(crate) fn release(&self) {
        if let Self::Mapped(map) = self {
            // SAFETY: the mapping is shared with its file and never written: nothing is lost with its pages, and reading
            // it again gives the same bytes.
            let advised = unsafe { map.unchecked_advise(UncheckedAdvice::DontNeed) };
            // It is advice.
            drop(advised);
        }
    }

    /// The BLAKE3 of everything from `start` on.
    pub(crate) fn hash(&self, start: usize) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        self.hash_into(&mut hasher, start);
        hasher.finalize()
    }

    /// Hashes everything from `start` on.
    pub(crate) fn hash_into(&self, hasher: &mut blake3::Hasher, start: usize) {
        for piece in self.get(start..).unwrap_or_default().chunks(PIECE) {
            hasher.update(piece);
            if piece.len() == PIECE {
                self.release();
            }
        }
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
