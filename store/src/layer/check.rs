//! The checks that opening a layer leaves out: that the ids of its header are those of its nodes,
//! and that every byte of the file is the one that [`encode`](super::encode) writes.

use rayon::prelude::*;

use super::{
    FLAG_IMPLICIT, FLAG_OPAQUE, HEADER, Kind, LAYER_CONTEXT, Layer, LayerError, NO_XATTRS, NODE,
    NodeRef, TREE_CONTEXT, le_u32, le_u64,
};
use crate::id::{LayerId, TreeId};
use crate::tree::{MAX_XATTR_NAME, MAX_XATTR_VALUE, MAX_XATTRS};

/// Bytes that are hashed at once.
const PIECE: usize = 64 << 10;
/// Start of the zeroes at the end of the header.
const HEADER_END: usize = 152;

impl Layer {
    /// The compat and ro-compat features of the file. A program that does not know them may read
    /// it.
    pub(crate) fn compat_features(&self) -> [u32; 2] {
        [le_u32(&self.bytes, 12), le_u32(&self.bytes, 16)]
    }

    /// Whether the header matches the nodes and the tree id. Together with the checksum of the
    /// body, this covers every byte of the file but the compat features. Visits each node about
    /// once.
    pub fn header_holds(&self) -> bool {
        let mut hasher = blake3::Hasher::new_derive_key(LAYER_CONTEXT);
        let mut bytes = Vec::with_capacity(PIECE + 12);
        bytes.extend(self.tree_id().as_bytes());
        let (mut files, mut logical) = (0_u64, 0_u64);
        for node in self.nodes() {
            let mtime = node.mtime();
            bytes.extend(mtime.sec.to_le_bytes());
            bytes.extend(mtime.nsec.to_le_bytes());
            if bytes.len() >= PIECE {
                hasher.update(&bytes);
                bytes.clear();
            }
            if node.kind() == Kind::File {
                files += 1;
                logical = logical.saturating_add(node.size());
            }
        }
        hasher.update(&bytes);
        // Each hardlinked file counts once.
        let mut group = 0;
        for at in 0..self.links {
            let (this, ix) = self.link(at);
            let again = NodeRef { layer: self, ix };
            if this == group && again.kind() == Kind::File {
                logical = logical.saturating_sub(again.size());
            }
            group = this;
        }
        self.layer_id() == LayerId::from(hasher.finalize())
            && le_u64(&self.bytes, 48) == files
            && self.logical_bytes() == logical
            && self.bytes[HEADER_END..HEADER].iter().all(|&byte| byte == 0)
    }

    /// Checks that the file is the encoding of its tree by [`encode`](super::encode), byte by byte,
    /// hashes included, except for the compat features.
    pub fn check_all(&self) -> Result<(), LayerError> {
        use LayerError::Damaged;
        if !self.body_holds() {
            return Err(Damaged("its checksum"));
        }
        if !self.header_holds() {
            return Err(Damaged("its header"));
        }
        self.check_layout()?;
        let holds = self.nodes().all(|node| {
            let zero = !matches!(node.kind(), Kind::Dir | Kind::File);
            !zero || node.hash() == [0; 32]
        });
        if !holds {
            return Err(Damaged("a hash where none belongs"));
        }
        let dirs_hold = (0..self.nodes as u32)
            .into_par_iter()
            .with_min_len(1024)
            .map_init(Vec::new, |scratch, ix| {
                let node = NodeRef { layer: self, ix };
                node.kind() != Kind::Dir || hash_entries(node.children(), scratch) == node.hash()
            })
            .all(|holds| holds);
        let root = hash_entries([self.root()].into_iter(), &mut Vec::new());
        if dirs_hold && self.tree_id() == TreeId::from_bytes(root) {
            Ok(())
        } else {
            Err(Damaged("a tree hash"))
        }
    }

    /// Checks that everything stands where `encode` writes it, and that the blob holds nothing
    /// else.
    fn check_layout(&self) -> Result<(), LayerError> {
        use LayerError::Damaged;
        let mut blob = 0_u64;
        let mut groups = 0;
        for node in self.nodes() {
            if u64::from(node.u32(0)) != blob {
                return Err(Damaged("the place of a name"));
            }
            blob += u64::from(node.u16(4));
            if node.kind() == Kind::Symlink {
                if node.u64(48) != blob {
                    return Err(Damaged("the place of a target"));
                }
                blob += node.u64(40);
                if node.target().contains(&0) {
                    return Err(Damaged("target"));
                }
            }
            if node.u32(36) != NO_XATTRS {
                if u64::from(node.u32(36)) != blob {
                    return Err(Damaged("the place of xattrs"));
                }
                blob += node.xattrs_len().ok_or(Damaged("xattrs"))?;
            }
            if !node.is_canonical() {
                return Err(Damaged("an entry"));
            }
            // Groups are numbered by their first name.
            let group = node.u32(56);
            if group > groups + 1 {
                return Err(Damaged("the order of hardlinks"));
            }
            groups = groups.max(group);
        }
        let alone = |at: usize| {
            let group = self.link(at).0;
            let is = |at: Option<usize>| {
                at.filter(|at| *at < self.links)
                    .is_some_and(|at| self.link(at).0 == group)
            };
            !is(at.checked_sub(1)) && !is(at.checked_add(1))
        };
        if (0..self.links).any(alone) {
            return Err(Damaged("a hardlink with one name"));
        }
        if blob != self.blob().len() as u64 {
            return Err(Damaged("bytes that belong to nothing"));
        }
        Ok(())
    }
}

impl NodeRef<'_> {
    fn hash(self) -> [u8; 32] {
        super::array(&self.layer.bytes, self.at(64))
    }

    /// Whether the fields without a meaning for its kind are as `encode` writes them.
    fn is_canonical(self) -> bool {
        let bytes = &self.layer.bytes[self.at(0)..self.at(NODE)];
        let zero = |from: usize, to: usize| bytes[from..to].iter().all(|&byte| byte == 0);
        let no_meta = zero(12, 20) && zero(24, 36) && self.u32(36) == NO_XATTRS;
        let flags = self.flags();
        let by_kind = match self.kind() {
            Kind::Dir => {
                let implicit = self.u16(8) == 0o755 && no_meta;
                let known = [0, FLAG_OPAQUE, FLAG_IMPLICIT].contains(&flags);
                known && zero(56, 60) && (flags != FLAG_IMPLICIT || implicit)
            }
            Kind::File => zero(48, 56),
            Kind::Symlink => true,
            Kind::Fifo | Kind::Socket => zero(40, 56),
            Kind::Char | Kind::Block => zero(40, 48),
            Kind::Whiteout => zero(8, 10) && no_meta && zero(40, 60),
        };
        by_kind && zero(10, 12) && zero(60, 64) && (flags == 0 || self.kind() == Kind::Dir)
    }

    /// The length of its set of xattrs; nothing if the set is empty or beyond the limits.
    fn xattrs_len(self) -> Option<u64> {
        let (mut len, mut count) = (2, 0);
        for (name, value) in self.xattrs() {
            let fits = !name.is_empty()
                && name.len() <= MAX_XATTR_NAME
                && !name.contains(&0)
                && value.len() <= MAX_XATTR_VALUE;
            if !fits {
                return None;
            }
            count += 1;
            len += 6 + (name.len() + value.len()) as u64;
        }
        (1..=MAX_XATTRS).contains(&count).then_some(len)
    }

    /// Appends the bytes of this entry that the hash of its directory covers.
    fn write_hashed(self, out: &mut Vec<u8>) {
        let file_size = match self.kind() {
            Kind::File => self.size(),
            _ => 0,
        };
        let rdev = self.rdev();
        out.extend([self.kind() as u8, self.flags()]);
        out.extend(self.mode().to_le_bytes());
        out.extend(self.uid().to_le_bytes());
        out.extend(self.gid().to_le_bytes());
        out.extend(file_size.to_le_bytes());
        out.extend((u64::from(rdev.major) << 32 | u64::from(rdev.minor)).to_le_bytes());
        out.extend(self.u32(56).to_le_bytes());
        out.extend((self.name().len() as u16).to_le_bytes());
        out.extend(self.name());
        out.extend((self.target().len() as u16).to_le_bytes());
        out.extend(self.target());
        out.extend(self.hash());
        out.extend((self.xattrs().count() as u16).to_le_bytes());
        for (name, value) in self.xattrs() {
            out.extend((name.len() as u16).to_le_bytes());
            out.extend((value.len() as u32).to_le_bytes());
            out.extend(name);
            out.extend(value);
        }
    }
}

fn hash_entries<'a>(
    entries: impl ExactSizeIterator<Item = NodeRef<'a>>,
    scratch: &mut Vec<u8>,
) -> [u8; 32] {
    scratch.clear();
    scratch.extend((entries.len() as u32).to_le_bytes());
    let mut hasher = blake3::Hasher::new_derive_key(TREE_CONTEXT);
    for entry in entries {
        if scratch.len() >= PIECE {
            hasher.update(scratch);
            scratch.clear();
        }
        entry.write_hashed(scratch);
    }
    *hasher.update(scratch).finalize().as_bytes()
}
