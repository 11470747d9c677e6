//! Packs: the small new objects of one ingest in one file, and the index that finds them.
//!
//! All integers are little-endian. The pack is
//!
//! ```text
//! header   64 bytes: magic `III-PACK`; version, compat, ro_compat, incompat: u32; zeroes
//! objects  their bytes, at the places that the index names; zeroes between them
//! ```
//!
//! An object of 4 KiB or more begins at a multiple of 4 KiB. A smaller one begins at a multiple of
//! 8 and does not cross a 4 KiB boundary: reading it touches one page, and it fills a tail that a
//! larger one left. The index is
//!
//! ```text
//! header   64 bytes: magic `III-PIDX`; version, compat, ro_compat, incompat, count, 0: u32;
//!          pack_len: u64; zeroes
//! fanout   256 x u32: the number of objects whose first byte is at most i
//! ids      count x 32 bytes, ascending
//! places   count x (offset: u64, len: u64), in the order of the ids
//! ```
//!
//! The name of both files is the BLAKE3 of the index: a reader of an index knows whether it is
//! whole.

use std::convert::Infallible;
use std::fs::File;

use crate::disk::Disk;
use crate::id::{ObjectId, PackId};
use crate::map::Bytes;
use crate::pieces::{Pieces, Put, collect};

/// Version of both layouts.
pub const VERSION: u32 = 1;
/// Alignment of objects of at least this size; smaller ones stay within one such block.
pub const BLOCK: u64 = 4096;
/// Most objects in one pack.
pub const MAX_OBJECTS: u32 = 1 << 28;

const PACK_MAGIC: &[u8; 8] = b"III-PACK";
const INDEX_MAGIC: &[u8; 8] = b"III-PIDX";
/// Length of either header.
pub(crate) const HEADER: usize = 64;
/// Where a header names its compat and ro-compat features.
const COMPAT: std::ops::Range<usize> = 12..20;
pub(crate) const SMALL_ALIGN: u64 = 8;
const FANOUT: usize = 256 * 4;
const ID: usize = 32;
const PLACE: usize = 16;

/// Why a file is not a pack's index that this program can read.
#[derive(Debug, thiserror::Error)]
pub enum PackError {
    /// The file cannot be mapped.
    #[error("mapping the index failed")]
    Map(#[source] std::io::Error),
    /// Not an index at all, or cut short.
    #[error("not a pack's index, or cut short")]
    NotAnIndex,
    /// Made by a newer version.
    #[error(
        "index format version {version}, incompat features {incompat:#x}: a newer iii wrote it"
    )]
    Unsupported {
        /// The version found.
        version: u32,
        /// The incompat features found.
        incompat: u32,
    },
    /// It contradicts itself or its name.
    #[error("the index is damaged: {0}")]
    Damaged(&'static str),
}

/// Where an object is in its pack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Offset of its first byte.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u64,
}

/// The offset of an object of `len` bytes in a pack that ends at `end`.
pub(crate) fn place(end: u64, len: u64) -> u64 {
    if len >= BLOCK {
        return end.next_multiple_of(BLOCK);
    }
    let at = end.next_multiple_of(SMALL_ALIGN);
    if at % BLOCK + len > BLOCK {
        at.next_multiple_of(BLOCK)
    } else {
        at
    }
}

fn header(magic: [u8; 8]) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(&magic);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header
}

/// The first bytes of a pack.
pub(crate) fn pack_header() -> [u8; HEADER] {
    header(*PACK_MAGIC)
}

/// Whether a pack begins with these bytes, whatever compat features they name.
pub(crate) fn is_header(header: &[u8; HEADER]) -> bool {
    let ours = pack_header();
    header[..COMPAT.start] == ours[..COMPAT.start] && header[COMPAT.end..] == ours[COMPAT.end..]
}

/// The compat and ro-compat features that a header names.
pub(crate) fn compat_features(header: &[u8]) -> [u32; 2] {
    [
        le_u32(header, COMPAT.start),
        le_u32(header, COMPAT.start + 4),
    ]
}

/// Encodes the index of a pack that is `pack_len` bytes long. `objects` must be sorted by id,
/// without duplicates.
pub fn encode_index(objects: &[(ObjectId, Place)], pack_len: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER + FANOUT + objects.len() * (ID + PLACE));
    let Ok(_) = write_index::<Infallible>(objects, pack_len, &mut collect(&mut bytes));
    bytes
}

/// As [`encode_index`], handed out in pieces. Returns the name.
pub(crate) fn write_index<'p, E>(
    objects: &[(ObjectId, Place)],
    pack_len: u64,
    put: &'p mut Put<'p, E>,
) -> Result<PackId, E> {
    let mut pieces = Pieces::new(0, put);
    let mut header = header(*INDEX_MAGIC);
    header[24..28].copy_from_slice(&(objects.len() as u32).to_le_bytes());
    header[32..40].copy_from_slice(&pack_len.to_le_bytes());
    let mut counts = [0_u32; 256];
    for (id, _) in objects {
        counts[usize::from(id.as_bytes()[0])] += 1;
    }
    pieces.add(|out| {
        out.extend(header);
        let mut total = 0;
        for count in counts {
            total += count;
            out.extend(total.to_le_bytes());
        }
    })?;
    for (id, _) in objects {
        pieces.add(|out| out.extend(id.as_bytes()))?;
    }
    for (_, place) in objects {
        pieces.add(|out| {
            out.extend(place.offset.to_le_bytes());
            out.extend(place.len.to_le_bytes());
        })?;
    }
    let (name, _) = pieces.finish()?;
    Ok(name.into())
}

/// The objects that a damaged index may still name. None of it can be believed: a reader of one
/// hashes it.
pub(crate) fn salvage_index(bytes: &[u8]) -> Vec<(ObjectId, Place)> {
    let table = bytes.get(HEADER + FANOUT..).unwrap_or_default();
    let (ids, places) = table.split_at(table.len() / (ID + PLACE) * ID);
    let (ids, places) = (ids.as_chunks::<ID>().0, places.as_chunks::<PLACE>().0);
    ids.iter()
        .zip(places)
        .map(|(id, place)| {
            let (offset, len) = (le_u64(place, 0), le_u64(place, 8));
            (ObjectId::from_bytes(*id), Place { offset, len })
        })
        .collect()
}

/// The index of a pack, read in place. Opening checks all of it once, so that reading afterwards
/// cannot fail.
#[derive(Debug)]
pub struct Index {
    bytes: Bytes,
    count: u32,
}

fn le_u32(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(0, u32::from_le_bytes)
}

fn le_u64(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..at + 8)
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(0, u64::from_le_bytes)
}

impl Index {
    /// Maps and checks an index whose name says that it is `id`.
    pub fn open(disk: &dyn Disk, file: &File, id: &PackId) -> Result<Self, PackError> {
        let bytes = Bytes::map(disk, file).map_err(PackError::Map)?;
        let holds = PackId::from(bytes.hash(0)) == *id;
        let index = Self::check(bytes)?;
        if holds {
            Ok(index)
        } else {
            Err(PackError::Damaged("it is not what its name says"))
        }
    }

    /// An index held in memory.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, PackError> {
        Self::check(Bytes::Owned(bytes))
    }

    fn check(bytes: Bytes) -> Result<Self, PackError> {
        use PackError::Damaged;
        if bytes.len() < HEADER + FANOUT || !bytes.starts_with(INDEX_MAGIC) {
            return Err(PackError::NotAnIndex);
        }
        let (version, incompat) = (le_u32(&bytes, 8), le_u32(&bytes, 20));
        if version != VERSION || incompat != 0 {
            return Err(PackError::Unsupported { version, incompat });
        }
        let count = le_u32(&bytes, 24);
        let len = (HEADER + FANOUT) as u64 + u64::from(count) * (ID + PLACE) as u64;
        if count > MAX_OBJECTS || len != bytes.len() as u64 {
            return Err(PackError::NotAnIndex);
        }
        let index = Self { bytes, count };
        let mut from = 0;
        for byte in 0..=255 {
            let to = index.fanout(byte);
            if to < from || to > count {
                return Err(Damaged("fanout"));
            }
            if (from..to).any(|ix| index.id_bytes(ix).first() != Some(&byte)) {
                return Err(Damaged("fanout"));
            }
            from = to;
        }
        if from != count {
            return Err(Damaged("fanout"));
        }
        if (1..count).any(|ix| index.id_bytes(ix - 1) >= index.id_bytes(ix)) {
            return Err(Damaged("order of ids"));
        }
        let pack_len = index.pack_len();
        for ix in 0..count {
            let Place { offset, len } = index.place(ix);
            if offset < HEADER as u64 || offset.checked_add(len).is_none_or(|end| end > pack_len) {
                return Err(Damaged("place"));
            }
        }
        Ok(index)
    }

    /// See [`Bytes::release`].
    pub(crate) fn release(&self) {
        self.bytes.release();
    }

    /// The compat and ro-compat features that it names; a program that does not know them may read
    /// it.
    pub(crate) fn compat_features(&self) -> [u32; 2] {
        compat_features(&self.bytes)
    }

    /// Number of objects.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Length of the pack in bytes.
    pub fn pack_len(&self) -> u64 {
        le_u64(&self.bytes, 32)
    }

    fn fanout(&self, byte: u8) -> u32 {
        le_u32(&self.bytes, HEADER + usize::from(byte) * 4)
    }

    fn id_bytes(&self, ix: u32) -> &[u8] {
        let at = HEADER + FANOUT + ix as usize * ID;
        self.bytes.get(at..at + ID).unwrap_or_default()
    }

    /// The place of the object that is the `ix`th by id.
    pub(crate) fn place(&self, ix: u32) -> Place {
        let at = HEADER + FANOUT + self.count as usize * ID + ix as usize * PLACE;
        Place {
            offset: le_u64(&self.bytes, at),
            len: le_u64(&self.bytes, at + 8),
        }
    }

    /// The object's place, if it is in this pack.
    pub fn find(&self, id: &ObjectId) -> Option<Place> {
        self.position(id).map(|ix| self.place(ix))
    }

    /// How many objects of this pack have a lesser id, if the object is in it.
    pub(crate) fn position(&self, id: &ObjectId) -> Option<u32> {
        let first = id.as_bytes()[0];
        let mut low = first.checked_sub(1).map_or(0, |byte| self.fanout(byte));
        let mut high = self.fanout(first);
        while low < high {
            let ix = low + (high - low) / 2;
            match self.id_bytes(ix).cmp(&id.as_bytes()[..]) {
                std::cmp::Ordering::Equal => return Some(ix),
                std::cmp::Ordering::Less => low = ix + 1,
                std::cmp::Ordering::Greater => high = ix,
            }
        }
        None
    }

    /// Every object, by ascending id.
    pub fn objects(&self) -> impl ExactSizeIterator<Item = (ObjectId, Place)> + '_ {
        (0..self.count).map(|ix| (self.id(ix), self.place(ix)))
    }

    /// The object that is the `ix`th by id.
    pub(crate) fn id(&self, ix: u32) -> ObjectId {
        let mut id = [0; ID];
        id.copy_from_slice(self.id_bytes(ix));
        ObjectId::from_bytes(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::RealDisk;

    fn sample() -> Vec<u8> {
        let mut end = HEADER as u64;
        let mut objects: Vec<_> = [5_u64, 4096, 0, 10_000, 4095, 1]
            .into_iter()
            .map(|len| {
                let offset = place(end, len);
                end = offset + len;
                (ObjectId::of(&len.to_le_bytes()), Place { offset, len })
            })
            .collect();
        objects.sort_by_key(|(id, _)| *id);
        encode_index(&objects, end)
    }

    #[test]
    fn places() {
        for (end, len, at) in [
            (64, 10, 64),
            (65, 10, 72),
            (64, 4095, 4096),
            (4090, 2, 4096),
            (4088, 8, 4088),
            (4088, 9, 4096),
            (64, 4096, 4096),
            (4096, 4096, 4096),
            (4097, 1 << 20, 8192),
            (8192, 0, 8192),
        ] {
            assert_eq!(place(end, len), at, "{len} bytes after {end}");
        }
    }

    #[test]
    fn finds_what_it_holds_and_nothing_else() {
        let index = Index::from_bytes(sample()).unwrap();
        assert_eq!(index.objects().len(), 6);
        for (id, place) in index.objects() {
            assert_eq!(index.find(&id), Some(place));
        }
        for other in 0_u32..100 {
            assert_eq!(index.find(&ObjectId::of(&other.to_be_bytes())), None);
        }
        assert_eq!(Index::from_bytes(encode_index(&[], 64)).unwrap().count(), 0);
    }

    /// The format: these values may never change.
    #[test]
    fn golden() {
        assert_eq!(
            ObjectId::of(&sample()).to_string(),
            "2ff88c643e43473812956eddc78509a31fcf7e33116c64e7fcea6068defd8e83"
        );
        assert_eq!(pack_header()[..12], *b"III-PACK\x01\0\0\0");
    }

    #[test]
    fn every_flipped_byte_is_found_and_none_panics() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("idx");
        let good = sample();
        let id = PackId::from(blake3::hash(&good));
        std::fs::write(&path, &good).unwrap();
        Index::open(&RealDisk, &File::open(&path).unwrap(), &id).unwrap();
        for at in 0..good.len() {
            let mut bytes = good.clone();
            bytes[at] ^= 0x41;
            if let Ok(index) = Index::from_bytes(bytes.clone()) {
                for (id, _) in index.objects() {
                    index.find(&id);
                }
            }
            std::fs::write(&path, &bytes).unwrap();
            assert!(
                Index::open(&RealDisk, &File::open(&path).unwrap(), &id).is_err(),
                "byte {at}"
            );
        }
        for len in 0..good.len() {
            assert!(
                Index::from_bytes(good[..len].to_vec()).is_err(),
                "cut to {len}"
            );
        }
    }
}
