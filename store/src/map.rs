//! Bytes of a published file: mapped, or held in memory.
//!
//! A kernel gives a process a limited number of mappings, 65,530 by default on Linux, and a store
//! may have more files. So small files, the majority, are read, and at most [`MAX_MAPPED`] files
//! are mapped at once.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::sync::atomic::{AtomicUsize, Ordering};

use memmap2::{Mmap, UncheckedAdvice};

use crate::blob::read_exact;
use crate::disk::Disk;

/// A file of at most this many bytes is read and not mapped, which takes fewer system calls and no
/// address space.
const MAX_READ: u64 = 64 << 10;
/// Most files that this process has mapped at once, except for those longer than
/// [`MAX_READ_INSTEAD`].
pub(crate) const MAX_MAPPED: usize = 4096;
/// Once [`MAX_MAPPED`] files are mapped, a file of at most this many bytes is read.
const MAX_READ_INSTEAD: u64 = 16 << 20;

/// Number of files that are mapped now.
static MAPPED: AtomicUsize = AtomicUsize::new(0);

/// A pass over a whole mapping reads it in pieces of this many bytes, each of which leaves memory
/// before the next.
const PIECE: usize = 16 << 20;

/// A mapping that [`MAPPED`] counts.
#[derive(Debug)]
pub(crate) struct Mapping(Mmap);

impl Mapping {
    /// Maps a file, unless too many are mapped.
    fn new(file: &File, len: u64) -> io::Result<Option<Self>> {
        if MAPPED.fetch_add(1, Ordering::Relaxed) >= MAX_MAPPED && len <= MAX_READ_INSTEAD {
            MAPPED.fetch_sub(1, Ordering::Relaxed);
            return Ok(None);
        }
        // SAFETY: the files of a store are written once under a temporary name, renamed into place
        // and from then on only ever unlinked or replaced by a rename, never written or truncated,
        // so the mapping does not change and stays backed.
        let map = unsafe { Mmap::map(file) }.inspect_err(|_| {
            MAPPED.fetch_sub(1, Ordering::Relaxed);
        })?;
        Ok(Some(Self(map)))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        MAPPED.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Debug)]
pub(crate) enum Bytes {
    Mapped(Mapping),
    Owned(Vec<u8>),
}

impl Bytes {
    /// Maps or reads a file of the store: a layer, a pack's index, a stat cache.
    pub(crate) fn map(disk: &dyn Disk, file: &File) -> io::Result<Self> {
        disk.may_map(file)?;
        let len = file.metadata()?.len();
        if len > MAX_READ
            && let Some(mapping) = Mapping::new(file, len)?
        {
            return Ok(Self::Mapped(mapping));
        }
        let mut bytes = vec![0; len as usize];
        read_exact(disk, file, &mut bytes, 0)?;
        Ok(Self::Owned(bytes))
    }

    /// Drops the pages that are in memory; the next read loads them again. For callers that read a
    /// large part of a mapping once.
    pub(crate) fn release(&self) {
        if let Self::Mapped(map) = self {
            // SAFETY: the mapping is shared with its file and never written: nothing is lost with
            // its pages, and reading it again gives the same bytes.
            let advised = unsafe { map.0.unchecked_advise(UncheckedAdvice::DontNeed) };
            // The call is advice: its failure changes nothing.
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
            Self::Mapped(map) => &map.0,
            Self::Owned(bytes) => bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::RealDisk;

    #[test]
    fn small_files_are_read_and_no_more_than_so_many_mapped() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(MAX_READ).unwrap();
        assert!(matches!(
            Bytes::map(&RealDisk, &file).unwrap(),
            Bytes::Owned(_)
        ));
        file.set_len(MAX_READ + 1).unwrap();
        // Other tests of this process may have files mapped, too.
        let all: Vec<Bytes> = (0..=MAX_MAPPED)
            .map(|_| Bytes::map(&RealDisk, &file).unwrap())
            .collect();
        let mapped = |all: &[Bytes]| {
            let mapped = all.iter().filter(|bytes| matches!(bytes, Bytes::Mapped(_)));
            mapped.count()
        };
        assert!((1..=MAX_MAPPED).contains(&mapped(&all)));
        for bytes in &all {
            assert_eq!(bytes.len() as u64, MAX_READ + 1);
        }
        drop(all);
        assert_eq!(mapped(&[Bytes::map(&RealDisk, &file).unwrap()]), 1);
    }
}
