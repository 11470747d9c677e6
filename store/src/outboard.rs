//! Outboards, which allow checking a part of a large object without reading the rest.
//!
//! BLAKE3 is a tree: the hash of an object follows from the chaining values of its groups of 64
//! KiB. The file `loose/<object>.cv` beside each loose object holds them:
//! loose object, in `loose/<object>.cv`:
//!
//! ```text
//! header   32 bytes: magic `III-OUTB`; version, length of a group: u32;
//!          length of the object: u64; zeroes
//! groups   one chaining value of 32 bytes for each group, the last of which may be short
//! ```
//!
//! An outboard proves itself: the root of its values is the object's id. A missing or damaged
//! outboard can be made again from the object.

use blake3::hazmat::{
    ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root,
};

use crate::id::ObjectId;

/// Bytes in a group: a power of two of BLAKE3's chunks, so that every group is a subtree.
pub(crate) const GROUP: usize = 64 << 10;

const MAGIC: &[u8; 8] = b"III-OUTB";
const VERSION: u32 = 1;
const HEADER: usize = 32;

/// The chaining values of an object's groups.
#[derive(Debug, PartialEq, Eq)]
pub struct Outboard {
    len: u64,
    groups: Vec<ChainingValue>,
}

fn header(len: u64) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[12..16].copy_from_slice(&(GROUP as u32).to_le_bytes());
    header[16..24].copy_from_slice(&len.to_le_bytes());
    header
}

/// The largest power of two below `count`, which is at least 2: the number of groups of the left
/// subtree.
fn split(count: usize) -> usize {
    count.div_ceil(2).next_power_of_two()
}

fn merge(groups: &[ChainingValue]) -> ChainingValue {
    if let [group] = groups {
        return *group;
    }
    let (left, right) = groups.split_at(split(groups.len()));
    merge_subtrees_non_root(&merge(left), &merge(right), Mode::Hash)
}

impl Outboard {
    /// The length of the file for an object of `len` bytes.
    pub(crate) fn file_len(len: u64) -> u64 {
        // No file is that long, so a length that overflows matches none.
        (len.div_ceil(GROUP as u64))
            .saturating_mul(32)
            .saturating_add(HEADER as u64)
    }

    /// The id of the object, from its groups. Nothing for an object of one group, which has no tree
    /// above it.
    pub fn root(&self) -> Option<ObjectId> {
        if self.groups.len() < 2 {
            return None;
        }
        let (left, right) = self.groups.split_at(split(self.groups.len()));
        Some(merge_subtrees_root(&merge(left), &merge(right), Mode::Hash).into())
    }

    /// The bytes of the file.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER + self.groups.len() * 32);
        out.extend(header(self.len));
        out.extend(self.groups.as_flattened());
        out
    }

    /// Decodes the outboard of the object `id`, which is `len` bytes long. Nothing unless every
    /// byte is right.
    pub(crate) fn decode(bytes: &[u8], id: &ObjectId, len: u64) -> Option<Self> {
        Self::parse(bytes, len).filter(|outboard| outboard.root() == Some(*id))
    }

    /// Decodes the outboard of an object of `len` bytes, whatever its id.
    pub fn parse(bytes: &[u8], len: u64) -> Option<Self> {
        let groups = bytes.strip_prefix(&header(len))?;
        if bytes.len() as u64 != Self::file_len(len) {
            return None;
        }
        let (groups, _) = groups.as_chunks();
        Some(Self {
            len,
            groups: groups.to_vec(),
        })
    }

    /// Number of groups.
    pub fn groups(&self) -> usize {
        self.groups.len()
    }

    /// The start of the group, and its length.
    pub fn range(&self, group: usize) -> (u64, usize) {
        let start = group as u64 * GROUP as u64;
        let len = self.len.saturating_sub(start).min(GROUP as u64);
        (start, len as usize)
    }

    /// Whether `bytes` are the bytes of the group.
    pub fn group_holds(&self, group: usize, bytes: &[u8]) -> bool {
        let (start, len) = self.range(group);
        len != 0
            && bytes.len() == len
            && self.groups.get(group) == Some(&chaining_value(start, bytes))
    }
}

fn chaining_value(start: u64, bytes: &[u8]) -> ChainingValue {
    let mut hasher = blake3::Hasher::new();
    hasher.set_input_offset(start);
    hasher.update(bytes).finalize_non_root()
}

/// Makes an object's id and its outboard in one pass over its bytes.
#[derive(Debug, Default)]
pub struct OutboardHasher {
    groups: Vec<ChainingValue>,
    /// The current group, which is never full, and empty only at the start.
    group: blake3::Hasher,
    len: u64,
}

impl OutboardHasher {
    /// Adds the next bytes.
    pub fn update(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let filled = self.group.count() as usize;
            if filled == GROUP {
                self.groups.push(self.group.finalize_non_root());
                self.group = blake3::Hasher::new();
                self.group.set_input_offset(self.len);
                continue;
            }
            let (now, rest) = bytes.split_at(bytes.len().min(GROUP - filled));
            self.group.update(now);
            self.len += now.len() as u64;
            bytes = rest;
        }
    }

    /// The id of all bytes, and their outboard.
    pub fn finish(mut self) -> (ObjectId, Outboard) {
        let alone = self.groups.is_empty().then(|| self.group.finalize().into());
        if self.len > 0 {
            self.groups.push(self.group.finalize_non_root());
        }
        let outboard = Outboard {
            len: self.len,
            groups: self.groups,
        };
        let id = alone.or_else(|| outboard.root());
        (id.unwrap_or_else(|| ObjectId::of(b"")), outboard)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        blake3::Hasher::new().finalize_xof().fill(&mut bytes);
        bytes
    }

    #[test]
    fn ids_are_those_of_the_whole_at_every_kind_of_length() {
        let mut lengths = vec![0, 1, 1023, 1024, 1025, GROUP - 1, GROUP, GROUP + 1];
        for groups in [2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33] {
            let len = groups * GROUP;
            lengths.extend([len - 1025, len - 1024, len - 1, len, len + 1, len + 1024]);
        }
        let all = noise(34 * GROUP);
        for len in lengths {
            let bytes = &all[..len];
            for piece in [1 << 20, GROUP, 100_000, 4097] {
                let mut hasher = OutboardHasher::default();
                bytes.chunks(piece).for_each(|piece| hasher.update(piece));
                let (id, outboard) = hasher.finish();
                assert_eq!(id, ObjectId::of(bytes), "{len} bytes in pieces of {piece}");
                let encoded = outboard.encode();
                assert_eq!(encoded.len() as u64, Outboard::file_len(len as u64));
                let again = Outboard::decode(&encoded, &id, len as u64);
                assert_eq!(again.is_some(), len > GROUP, "{len}");
                for (number, group) in bytes.chunks(GROUP).enumerate() {
                    assert!(outboard.group_holds(number, group), "{len}: {number}");
                    assert!(!outboard.group_holds(number + 1, group));
                    assert!(!outboard.group_holds(number, &group[1..]));
                }
            }
        }
    }

    #[test]
    fn every_flipped_byte_and_every_cut_is_found() {
        let bytes = noise(5 * GROUP + 7);
        let mut hasher = OutboardHasher::default();
        hasher.update(&bytes);
        let (id, outboard) = hasher.finish();
        let (encoded, len) = (outboard.encode(), bytes.len() as u64);
        for at in 0..encoded.len() {
            let mut flipped = encoded.clone();
            flipped[at] ^= 1;
            assert_eq!(Outboard::decode(&flipped, &id, len), None, "byte {at}");
            assert_eq!(Outboard::decode(&encoded[..at], &id, len), None);
        }
        assert_eq!(Outboard::decode(&encoded, &id, len + 1), None);
        assert_eq!(Outboard::decode(&encoded, &ObjectId::of(b""), len), None);
        for at in (0..bytes.len()).step_by(997) {
            let mut group = bytes[at / GROUP * GROUP..].to_vec();
            group.truncate(GROUP);
            group[at % GROUP] ^= 1;
            assert!(!outboard.group_holds(at / GROUP, &group), "byte {at}");
        }
    }

    /// The format: these values may never change.
    #[test]
    fn golden() {
        let mut hasher = OutboardHasher::default();
        hasher.update(&noise(5 * GROUP + 7));
        let encoded = hasher.finish().1.encode();
        assert_eq!(
            encoded[..HEADER],
            *b"III-OUTB\x01\0\0\0\0\0\x01\0\x07\0\x05\0\0\0\0\0\0\0\0\0\0\0\0\0"
        );
        assert_eq!(ObjectId::of(&encoded).short(), "bb29d13688");
    }
}
