//! The layer file: a tree with its mtimes, laid out to be mapped and read in place.
//!
//! All integers are little-endian. The file is
//!
//! ```text
//! header   256 bytes
//! nodes    node_count x 96 bytes, breadth first: the children of a directory are contiguous and
//!          sorted by name
//! links    link_count x 8 bytes: (group, node), sorted; every group has at least two nodes
//! blob     blob_len bytes: names, symlink targets, xattr sets
//! ```
//!
//! ```text
//! header   magic `III-LAYR`; version, compat, ro_compat, incompat: u32;
//!          node_count, link_count: u32; blob_len: u64; logical_bytes: u64; file_count: u64;
//!          tree_id, layer_id, body: 32 bytes each; zeroes
//! node     name_off: u32, name_len: u16, kind: u8, flags: u8; mode: u16, 0: u16, uid: u32;
//!          gid: u32, parent: u32; mtime_sec: i64; mtime_nsec: u32,
//!          xattr_off: u32 (`!0`: none); size: u64; aux: u64; link: u32, 0: u32; hash: 32 bytes
//! link     group: u32, node: u32
//! xattrs   count: u16, then per xattr, sorted by name: name_len: u16, value_len: u32, name, value
//! ```
//!
//! `body` is the BLAKE3 of everything after the header. `size` is a file's length, a target's
//! length or a directory's number of children; `aux` is a target's offset, the first child's index
//! or a device's `major << 32 | minor`; `hash` is a file's object id or the [`TreeId`] of the
//! contents of a directory.
//!
//! # Hashes
//!
//! The id of a directory's contents is BLAKE3 with the `derive_key` context [`TREE_CONTEXT`] over
//! the number of entries (u32) and per entry
//!
//! ```text
//! kind: u8, flags: u8, mode: u16, uid: u32, gid: u32, size: u64 (files, else 0),
//! rdev: u64 (devices, else 0), link: u32, name_len: u16, name, target_len: u16, target,
//! hash: 32 bytes, xattrs
//! ```
//!
//! The [`TreeId`] of a layer is the same over one entry, its root, with an empty name. Equal
//! subtrees without hardlinks have equal ids wherever they stand. The [`LayerId`] is BLAKE3 with
//! [`LAYER_CONTEXT`] over the tree id and, for each node in order, its seconds (i64) and
//! nanoseconds (u32) of mtime.

mod check;

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;

use crate::disk::Disk;
use crate::id::{LayerId, ObjectId, TreeId};
use crate::map::Bytes;
use crate::pieces::{Pieces, Put, collect};
use crate::tree::{
    self, Content, Dir, DirKind, Entry, MAX_DEPTH, MAX_NODES, MAX_TARGET, MAX_TEXT, MAX_XATTR_NAME,
    MAX_XATTR_VALUE, MAX_XATTRS, Meta, Mtime, Node, Rdev, Source, Tree, TreeError, Xattrs,
};

/// Context of the tree hash.
pub const TREE_CONTEXT: &str = "iii store 2026 tree v1";
/// Context of the layer hash.
pub const LAYER_CONTEXT: &str = "iii store 2026 layer v1";
/// Version of the layout described above.
pub const VERSION: u32 = 1;

const MAGIC: &[u8; 8] = b"III-LAYR";
const HEADER: usize = 256;
const NODE: usize = 96;
const LINK: usize = 8;
const NO_XATTRS: u32 = u32::MAX;
const FLAG_OPAQUE: u8 = 1;
const FLAG_IMPLICIT: u8 = 2;
/// During the check of a large layer, its pages leave memory after this many nodes.
const RELEASE: usize = 1 << 16;
/// Bytes to be hashed are gathered up to about this many: one long update is several times faster
/// than many short ones.
const HASHED: usize = 64 << 10;

/// The reason that this program cannot read a file as a layer.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The file cannot be mapped.
    #[error("mapping the layer file failed")]
    Map(#[source] std::io::Error),
    /// Not a layer file, or truncated.
    #[error("not a layer file, or cut short")]
    NotALayer,
    /// Made by a newer version.
    #[error(
        "layer format version {version}, incompat features {incompat:#x}: a newer iii wrote it"
    )]
    Unsupported {
        /// The version found.
        version: u32,
        /// The incompat features found.
        incompat: u32,
    },
    /// The structure contradicts itself.
    #[error("the layer file is damaged: {0}")]
    Damaged(&'static str),
}

/// The type of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Kind {
    /// A directory.
    Dir = 1,
    /// A regular file.
    File = 2,
    /// A symbolic link.
    Symlink = 3,
    /// A named pipe.
    Fifo = 4,
    /// A Unix socket.
    Socket = 5,
    /// A character device.
    Char = 6,
    /// A block device.
    Block = 7,
    /// The name is absent here and below.
    Whiteout = 8,
}

impl Kind {
    fn from_u8(byte: u8) -> Option<Self> {
        Some(match byte {
            1 => Self::Dir,
            2 => Self::File,
            3 => Self::Symlink,
            4 => Self::Fifo,
            5 => Self::Socket,
            6 => Self::Char,
            7 => Self::Block,
            8 => Self::Whiteout,
            _ => return None,
        })
    }
}

/// A tree as bytes, ready to be published.
#[derive(Debug)]
pub struct EncodedLayer {
    /// The whole layer file.
    pub bytes: Vec<u8>,
    /// The id of the tree, without mtimes.
    pub tree_id: TreeId,
    /// The id of the layer.
    pub layer_id: LayerId,
    /// Entries, the root and whiteouts included.
    pub nodes: u32,
    /// Regular files.
    pub files: u32,
    /// Sum of the sizes of the regular files, each hardlinked file once.
    pub logical_bytes: u64,
}

/// An entry of the tree being encoded, with its place in the file.
struct Flat<'a> {
    name: &'a [u8],
    node: FlatNode<'a>,
    parent: u32,
    link: u32,
}

enum FlatNode<'a> {
    Dir {
        meta: Cow<'a, Meta>,
        kind: DirKind,
        place: Place,
    },
    Leaf(Cow<'a, tree::Leaf>),
}

/// The metadata of an implicit directory, and of a whiteout: owned by no user.
static IMPLICIT_META: Meta = meta_of_mode(0o755);
static WHITEOUT_META: Meta = meta_of_mode(0);

const fn meta_of_mode(mode: u16) -> Meta {
    Meta {
        mode,
        uid: 0,
        gid: 0,
        mtime: Mtime { sec: 0, nsec: 0 },
        xattrs: Xattrs::new(),
    }
}

impl Flat<'_> {
    fn kind(&self) -> Kind {
        match &self.node {
            FlatNode::Dir { .. } => Kind::Dir,
            FlatNode::Leaf(leaf) => match leaf.content {
                Content::File { .. } => Kind::File,
                Content::Symlink { .. } => Kind::Symlink,
                Content::Fifo => Kind::Fifo,
                Content::Socket => Kind::Socket,
                Content::Char(_) => Kind::Char,
                Content::Block(_) => Kind::Block,
                Content::Whiteout => Kind::Whiteout,
            },
        }
    }

    fn flags(&self) -> u8 {
        match self.node {
            FlatNode::Dir {
                kind: DirKind::Opaque,
                ..
            } => FLAG_OPAQUE,
            FlatNode::Dir {
                kind: DirKind::Implicit,
                ..
            } => FLAG_IMPLICIT,
            _ => 0,
        }
    }

    fn meta(&self) -> &Meta {
        match &self.node {
            FlatNode::Dir {
                kind: DirKind::Implicit,
                ..
            } => &IMPLICIT_META,
            FlatNode::Dir { meta, .. } => meta,
            FlatNode::Leaf(leaf) if leaf.content == Content::Whiteout => &WHITEOUT_META,
            FlatNode::Leaf(leaf) => &leaf.meta,
        }
    }

    fn target(&self) -> &[u8] {
        match &self.node {
            FlatNode::Leaf(leaf) => match &leaf.content {
                Content::Symlink { target } => target,
                _ => &[],
            },
            FlatNode::Dir { .. } => &[],
        }
    }

    fn file(&self) -> Option<(ObjectId, u64)> {
        match &self.node {
            FlatNode::Leaf(leaf) => match leaf.content {
                Content::File { object, size } => Some((object, size)),
                _ => None,
            },
            FlatNode::Dir { .. } => None,
        }
    }

    fn file_size(&self) -> u64 {
        self.file().map_or(0, |(_, size)| size)
    }

    fn rdev(&self) -> u64 {
        match &self.node {
            FlatNode::Leaf(leaf) => match leaf.content {
                Content::Char(rdev) | Content::Block(rdev) => {
                    u64::from(rdev.major) << 32 | u64::from(rdev.minor)
                }
                _ => 0,
            },
            FlatNode::Dir { .. } => 0,
        }
    }

    fn hash(&self) -> [u8; 32] {
        match &self.node {
            FlatNode::Dir { place, .. } => place.hash,
            FlatNode::Leaf(_) => self
                .file()
                .map_or([0; 32], |(object, _)| *object.as_bytes()),
        }
    }

    /// Appends the bytes of this entry that the hash of its directory covers.
    fn write_hashed(&self, out: &mut Vec<u8>) {
        let meta = self.meta();
        out.extend([self.kind() as u8, self.flags()]);
        out.extend(meta.mode.to_le_bytes());
        out.extend(meta.uid.to_le_bytes());
        out.extend(meta.gid.to_le_bytes());
        out.extend(self.file_size().to_le_bytes());
        out.extend(self.rdev().to_le_bytes());
        out.extend(self.link.to_le_bytes());
        out.extend((self.name.len() as u16).to_le_bytes());
        out.extend(self.name);
        out.extend((self.target().len() as u16).to_le_bytes());
        out.extend(self.target());
        out.extend(self.hash());
        write_xattrs(&meta.xattrs, out);
    }

    /// The lengths of its name, target and xattrs in the blob.
    fn text(&self) -> [usize; 3] {
        let xattrs = &self.meta().xattrs;
        let set: usize = xattrs
            .iter()
            .map(|(name, value)| 6 + name.len() + value.len())
            .sum();
        let set = if xattrs.is_empty() { 0 } else { 2 + set };
        [self.name.len(), self.target().len(), set]
    }

    fn write_text(&self, out: &mut Vec<u8>) {
        out.extend(self.name);
        out.extend(self.target());
        if !self.meta().xattrs.is_empty() {
            write_xattrs(&self.meta().xattrs, out);
        }
    }

    /// Appends the node of the entry, whose text begins at `blob`.
    fn write_node(&self, blob: u32, out: &mut Vec<u8>) {
        let meta = self.meta();
        let [name, target, _] = self.text();
        let (size, aux) = match &self.node {
            FlatNode::Dir { place, .. } => (place.children, place.first_child),
            FlatNode::Leaf(_) if target != 0 => (target as u64, u64::from(blob) + name as u64),
            FlatNode::Leaf(_) => (self.file_size(), self.rdev()),
        };
        let xattrs = if meta.xattrs.is_empty() {
            NO_XATTRS
        } else {
            blob + (name + target) as u32
        };
        out.extend(blob.to_le_bytes());
        out.extend((name as u16).to_le_bytes());
        out.extend([self.kind() as u8, self.flags()]);
        out.extend(meta.mode.to_le_bytes());
        out.extend([0; 2]);
        out.extend(meta.uid.to_le_bytes());
        out.extend(meta.gid.to_le_bytes());
        out.extend(self.parent.to_le_bytes());
        out.extend(meta.mtime.sec.to_le_bytes());
        out.extend(meta.mtime.nsec.to_le_bytes());
        out.extend(xattrs.to_le_bytes());
        out.extend(size.to_le_bytes());
        out.extend(aux.to_le_bytes());
        out.extend(self.link.to_le_bytes());
        out.extend([0; 4]);
        out.extend(self.hash());
    }
}

fn write_xattrs(xattrs: &Xattrs, out: &mut Vec<u8>) {
    out.extend((xattrs.len() as u16).to_le_bytes());
    for (name, value) in xattrs {
        out.extend((name.len() as u16).to_le_bytes());
        out.extend((value.len() as u32).to_le_bytes());
        out.extend(&**name);
        out.extend(&**value);
    }
}

fn check_meta(meta: &Meta) -> Result<(), TreeError> {
    if meta.xattrs.len() > MAX_XATTRS {
        return Err(TreeError::Xattr(Vec::new()));
    }
    for (name, value) in &meta.xattrs {
        let fits = !name.is_empty()
            && name.len() <= MAX_XATTR_NAME
            && !name.contains(&0)
            && value.len() <= MAX_XATTR_VALUE;
        if !fits {
            return Err(TreeError::Xattr(name.to_vec()));
        }
    }
    Ok(())
}

/// The place of a directory's children, and the hash of its contents once that is known.
#[derive(Debug, Clone, Copy)]
struct Place {
    /// The directory's own index.
    node: u32,
    first_child: u64,
    children: u64,
    hash: [u8; 32],
}

/// A directory of the tree being encoded.
#[derive(Debug)]
struct PlannedDir<D> {
    dir: D,
    place: Place,
    /// Index of its first child directory among all directories.
    first_dir: u32,
}

/// A tree laid out breadth first and hashed, ready to be written. Keeps in memory a small record of
/// each directory and of each hardlink. Everything else is read from the tree again when it is
/// needed, so that the layer is never in memory as a whole.
#[derive(Debug)]
pub(crate) struct Plan<'a, S: Source> {
    source: &'a S,
    /// Breadth first, as their entries are.
    dirs: Vec<PlannedDir<S::Dir<'a>>>,
    /// Numbers of the hardlink groups by their label.
    groups: HashMap<u64, u32>,
    /// Group and node, sorted.
    links: Vec<(u32, u32)>,
    nodes: u32,
    files: u32,
    logical_bytes: u64,
    text: usize,
    pub(crate) tree_id: TreeId,
    pub(crate) layer_id: LayerId,
}

impl<'a, S: Source> Plan<'a, S> {
    pub(crate) fn new(source: &'a S) -> Result<Self, TreeError> {
        let mut plan = Self {
            source,
            dirs: Vec::new(),
            groups: HashMap::new(),
            links: Vec::new(),
            nodes: 1,
            files: 0,
            logical_bytes: 0,
            text: 0,
            tree_id: TreeId::from_bytes([0; 32]),
            layer_id: LayerId::from_bytes([0; 32]),
        };
        plan.lay_out()?;
        plan.number_links();
        plan.hash();
        Ok(plan)
    }

    /// Gives every entry its place and checks it.
    fn lay_out(&mut self) -> Result<(), TreeError> {
        let planned = |dir, node| PlannedDir {
            dir,
            place: Place {
                node,
                first_child: 0,
                children: 0,
                hash: [0; 32],
            },
            first_dir: 0,
        };
        self.dirs.push(planned(self.source.root(), 0));
        let root = self.root();
        check_meta(root.meta())?;
        self.text = root.text().iter().sum();
        // Number of names of each label.
        let mut labels: HashMap<u64, u32> = HashMap::new();
        // Breadth first, a level ends at the last directory of the level above.
        let (mut depth, mut level_end) = (1, 1);
        let mut at = 0;
        while at < self.dirs.len() {
            if at == level_end {
                depth += 1;
                level_end = self.dirs.len();
            }
            let (dir, node) = (self.dirs[at].dir, self.dirs[at].place.node);
            let (first_child, first_dir) = (self.nodes, self.dirs.len() as u32);
            for (name, entry) in self.source.entries(dir) {
                if depth > MAX_DEPTH {
                    return Err(TreeError::Depth);
                }
                tree::check_name(name)?;
                let entry_node = match entry {
                    Entry::Dir(dir) => {
                        self.dirs.push(planned(dir, self.nodes));
                        self.dir_node(&self.dirs[self.dirs.len() - 1])
                    }
                    Entry::Leaf(leaf) => {
                        if let Content::Symlink { target } = &leaf.content
                            && (target.is_empty()
                                || target.len() > MAX_TARGET
                                || target.contains(&0))
                        {
                            return Err(TreeError::Target);
                        }
                        if let Some(label) = label(&leaf) {
                            *labels.entry(label).or_default() += 1;
                        }
                        FlatNode::Leaf(leaf)
                    }
                };
                let flat = Flat {
                    name,
                    node: entry_node,
                    parent: node,
                    link: 0,
                };
                check_meta(flat.meta())?;
                self.nodes += 1;
                self.text += flat.text().iter().sum::<usize>();
                if self.nodes as usize > MAX_NODES || self.text > MAX_TEXT {
                    return Err(TreeError::TooLarge);
                }
            }
            let dir = &mut self.dirs[at];
            dir.place.first_child = first_child.into();
            dir.place.children = u64::from(self.nodes - first_child);
            dir.first_dir = first_dir;
            at += 1;
        }
        labels.retain(|_, names| *names > 1);
        self.groups = labels;
        Ok(())
    }

    /// Numbers the hardlink groups by their first name, and counts files, each group once.
    fn number_links(&mut self) {
        let labels = std::mem::take(&mut self.groups);
        let mut groups = HashMap::with_capacity(labels.len());
        let mut links = Vec::with_capacity(labels.values().map(|names| *names as usize).sum());
        let (mut files, mut bytes) = (0, 0_u64);
        for (ix, flat) in self.flats().enumerate() {
            files += u32::from(flat.file().is_some());
            let mut size = flat.file_size();
            if let FlatNode::Leaf(leaf) = &flat.node
                && let Some(label) = label(leaf).filter(|label| labels.contains_key(label))
            {
                let number = groups.len() as u32 + 1;
                let group = *groups.entry(label).or_insert(number);
                if group != number {
                    size = 0;
                }
                links.push((group, ix as u32));
            }
            bytes = bytes.saturating_add(size);
        }
        links.sort_unstable();
        self.groups = groups;
        self.links = links;
        self.files = files;
        self.logical_bytes = bytes;
    }

    fn hash(&mut self) {
        let mut scratch = Vec::new();
        // Children stand after their parent, so going backwards hashes every child before its
        // directory.
        for ix in (0..self.dirs.len()).rev() {
            let dir = &self.dirs[ix];
            let children = self.children(dir);
            let hash = hash_entries(dir.place.children as u32, children, &mut scratch);
            self.dirs[ix].place.hash = hash;
        }
        let root = hash_entries(1, std::iter::once(self.root()), &mut scratch);
        self.tree_id = TreeId::from_bytes(root);

        let mut hasher = blake3::Hasher::new_derive_key(LAYER_CONTEXT);
        scratch.clear();
        scratch.extend(root);
        for flat in self.flats() {
            let mtime = flat.meta().mtime;
            scratch.extend(mtime.sec.to_le_bytes());
            scratch.extend(mtime.nsec.to_le_bytes());
            if scratch.len() >= HASHED {
                hasher.update(&scratch);
                scratch.clear();
            }
        }
        hasher.update(&scratch);
        self.layer_id = LayerId::from_bytes(*hasher.finalize().as_bytes());
    }

    fn dir_node(&self, planned: &PlannedDir<S::Dir<'a>>) -> FlatNode<'a> {
        let (meta, kind) = self.source.dir(planned.dir);
        FlatNode::Dir {
            meta,
            kind,
            place: planned.place,
        }
    }

    fn root(&self) -> Flat<'a> {
        Flat {
            name: &[],
            node: self.dir_node(&self.dirs[0]),
            parent: 0,
            link: 0,
        }
    }

    fn children(&self, dir: &PlannedDir<S::Dir<'a>>) -> impl Iterator<Item = Flat<'a>> {
        let mut dirs = self.dirs[dir.first_dir as usize..].iter();
        let parent = dir.place.node;
        self.source
            .entries(dir.dir)
            .filter_map(move |(name, entry)| {
                let (node, link) = match entry {
                    Entry::Dir(_) => (self.dir_node(dirs.next()?), 0),
                    Entry::Leaf(leaf) => {
                        let group = label(&leaf).and_then(|label| self.groups.get(&label));
                        let link = group.copied().unwrap_or(0);
                        (FlatNode::Leaf(leaf), link)
                    }
                };
                Some(Flat {
                    name,
                    node,
                    parent,
                    link,
                })
            })
    }

    /// All entries in the order of the file.
    fn flats(&self) -> impl Iterator<Item = Flat<'a>> {
        std::iter::once(self.root()).chain(self.dirs.iter().flat_map(|dir| self.children(dir)))
    }

    /// Passes the pieces of the layer file to the callback, the header last.
    pub(crate) fn write<'p, E>(&self, put: &'p mut Put<'p, E>) -> Result<(), E> {
        let mut pieces = Pieces::new(HEADER as u64, put);
        let mut blob = 0;
        for flat in self.flats() {
            pieces.add(|out| flat.write_node(blob, out))?;
            blob += flat.text().iter().sum::<usize>() as u32;
        }
        for (group, node) in &self.links {
            pieces.add(|out| {
                out.extend(group.to_le_bytes());
                out.extend(node.to_le_bytes());
            })?;
        }
        for flat in self.flats() {
            pieces.add(|out| flat.write_text(out))?;
        }
        let (body, put) = pieces.finish()?;

        let mut header = Vec::with_capacity(HEADER);
        header.extend(MAGIC);
        for word in [VERSION, 0, 0, 0, self.nodes, self.links.len() as u32] {
            header.extend(word.to_le_bytes());
        }
        header.extend((self.text as u64).to_le_bytes());
        header.extend(self.logical_bytes.to_le_bytes());
        header.extend(u64::from(self.files).to_le_bytes());
        header.extend(self.tree_id.as_bytes());
        header.extend(self.layer_id.as_bytes());
        header.extend(body.as_bytes());
        header.resize(HEADER, 0);
        put(&header, 0)
    }
}

/// The label of a leaf that may have other names.
fn label(leaf: &tree::Leaf) -> Option<u64> {
    leaf.link.filter(|_| leaf.content != Content::Whiteout)
}

/// Encodes `tree`. Deterministic: equal trees give equal bytes, whatever their `Source`.
pub fn encode<S: Source>(tree: &S) -> Result<EncodedLayer, TreeError> {
    let plan = Plan::new(tree)?;
    let mut bytes = Vec::new();
    plan.write::<TreeError>(&mut collect(&mut bytes))?;
    Ok(EncodedLayer {
        bytes,
        tree_id: plan.tree_id,
        layer_id: plan.layer_id,
        nodes: plan.nodes,
        files: plan.files,
        logical_bytes: plan.logical_bytes,
    })
}

/// The hash of the contents of a directory. `scratch` is a reusable buffer.
fn hash_entries<'a>(
    count: u32,
    entries: impl Iterator<Item = Flat<'a>>,
    scratch: &mut Vec<u8>,
) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key(TREE_CONTEXT);
    scratch.clear();
    scratch.extend(count.to_le_bytes());
    for entry in entries {
        entry.write_hashed(scratch);
        if scratch.len() >= HASHED {
            hasher.update(scratch);
            scratch.clear();
        }
    }
    *hasher.update(scratch).finalize().as_bytes()
}

/// A layer, read in place. Opening checks the whole structure once (not the hashes), so that later
/// reads can neither fail nor leave the file. Shared freely between threads.
#[derive(Debug)]
pub struct Layer {
    bytes: Bytes,
    nodes: usize,
    links: usize,
    blob: usize,
}

fn le_u16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn le_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn le_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from(le_u32(bytes, at)) | u64::from(le_u32(bytes, at + 4)) << 32
}

fn array(bytes: &[u8], at: usize) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(&bytes[at..at + 32]);
    out
}

impl Layer {
    /// Maps and checks a layer file.
    pub fn open(disk: &dyn Disk, file: &File) -> Result<Self, LayerError> {
        Self::check(Bytes::map(disk, file).map_err(LayerError::Map)?)
    }

    /// A layer held in memory.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, LayerError> {
        Self::check(Bytes::Owned(bytes))
    }

    fn check(bytes: Bytes) -> Result<Self, LayerError> {
        if bytes.len() < HEADER || bytes[..8] != *MAGIC {
            return Err(LayerError::NotALayer);
        }
        let (version, incompat) = (le_u32(&bytes, 8), le_u32(&bytes, 20));
        if version != VERSION || incompat != 0 {
            return Err(LayerError::Unsupported { version, incompat });
        }
        let (nodes, links) = (le_u32(&bytes, 24) as usize, le_u32(&bytes, 28) as usize);
        let end = HEADER as u128 + nodes as u128 * NODE as u128 + links as u128 * LINK as u128;
        if nodes > MAX_NODES || end + u128::from(le_u64(&bytes, 32)) != bytes.len() as u128 {
            return Err(LayerError::NotALayer);
        }
        let layer = Self {
            bytes,
            nodes,
            links,
            blob: end as usize,
        };
        let linked = layer.check_nodes()?;
        layer.check_links(linked)?;
        Ok(layer)
    }

    /// Returns how many nodes claim to be in a hardlink group.
    fn check_nodes(&self) -> Result<usize, LayerError> {
        use LayerError::Damaged;
        let root = self.node(0).ok_or(Damaged("no root"))?;
        if root.raw_kind() != Some(Kind::Dir) || root.u16(4) != 0 || root.parent_ix() != 0 {
            return Err(Damaged("root"));
        }
        let blob = self.bytes.len() - self.blob;
        let within =
            |off: u64, len: u64| off.checked_add(len).is_some_and(|end| end <= blob as u64);
        // Children stand in the order of their parents, each range beginning at the end of the one
        // before.
        let mut next_child = 1_u64;
        let mut linked = 0;
        // Breadth first, a level ends at the last child of the level above.
        let (mut depth, mut level_end) = (0, 1_u64);
        let mut steps = 0;
        let mut step = || {
            steps += 1;
            if steps % RELEASE == 0 {
                self.bytes.release();
            }
        };
        for ix in 0..self.nodes as u32 {
            if u64::from(ix) == level_end {
                depth += 1;
                level_end = next_child;
            }
            if depth > MAX_DEPTH {
                return Err(Damaged("depth"));
            }
            step();
            let node = NodeRef { layer: self, ix };
            let kind = node.raw_kind().ok_or(Damaged("kind"))?;
            linked += usize::from(node.is_hardlinked());
            if !within(u64::from(node.u32(0)), u64::from(node.u16(4))) {
                return Err(Damaged("name out of bounds"));
            }
            if ix != 0 && tree::check_name(node.name()).is_err() {
                return Err(Damaged("name"));
            }
            if node.u32(32) >= 1_000_000_000 || node.u16(8) > 0o7777 {
                return Err(Damaged("mode or mtime"));
            }
            if node.u32(36) != NO_XATTRS && !self.xattrs_hold(node.u32(36)) {
                return Err(Damaged("xattrs"));
            }
            match kind {
                Kind::Dir => {
                    let (first, count) = (node.u64(48), node.u64(40));
                    let end = first.checked_add(count).ok_or(Damaged("children"))?;
                    if first != next_child || end > self.nodes as u64 || first <= u64::from(ix) {
                        return Err(Damaged("children"));
                    }
                    next_child = end;
                    let mut last: Option<&[u8]> = None;
                    for child in node.children() {
                        step();
                        if child.parent_ix() != ix {
                            return Err(Damaged("parent"));
                        }
                        if !within(u64::from(child.u32(0)), u64::from(child.u16(4)))
                            || last.is_some_and(|last| last >= child.name())
                        {
                            return Err(Damaged("order of names"));
                        }
                        last = Some(child.name());
                    }
                }
                Kind::Symlink => {
                    let (off, len) = (node.u64(48), node.u64(40));
                    if len == 0 || len > MAX_TARGET as u64 || !within(off, len) {
                        return Err(Damaged("target"));
                    }
                }
                _ => {}
            }
        }
        if next_child != self.nodes as u64 {
            return Err(Damaged("orphans"));
        }
        Ok(linked)
    }

    fn check_links(&self, linked: usize) -> Result<(), LayerError> {
        let damaged = LayerError::Damaged("hardlinks");
        let mut last = (0, 0);
        for at in 0..self.links {
            let link = self.link(at);
            let node = self.node(link.1).filter(|node| node.u32(56) == link.0);
            let fits = node.is_some_and(|node| !matches!(node.kind(), Kind::Dir | Kind::Whiteout));
            if !fits || link <= last || link.0 - last.0 > 1 {
                return Err(damaged);
            }
            last = link;
        }
        if linked == self.links {
            Ok(())
        } else {
            Err(damaged)
        }
    }

    fn link(&self, at: usize) -> (u32, u32) {
        let at = HEADER + self.nodes * NODE + at * LINK;
        (le_u32(&self.bytes, at), le_u32(&self.bytes, at + 4))
    }

    fn blob(&self) -> &[u8] {
        &self.bytes[self.blob..]
    }

    fn xattrs_hold(&self, off: u32) -> bool {
        let Some(set) = self.blob().get(off as usize..) else {
            return false;
        };
        let mut reader = XattrIter::new(set);
        let mut last: Option<&[u8]> = None;
        for (name, _) in reader.by_ref() {
            if last.is_some_and(|last| last >= name) {
                return false;
            }
            last = Some(name);
        }
        reader.left == 0
    }

    /// Its id according to its header: see [`Layer::header_holds`].
    pub fn layer_id(&self) -> LayerId {
        LayerId::from_bytes(array(&self.bytes, 88))
    }

    /// Its id without mtimes, according to its header.
    pub fn tree_id(&self) -> TreeId {
        TreeId::from_bytes(array(&self.bytes, 56))
    }

    /// Number of entries, the root and whiteouts included.
    pub fn node_count(&self) -> u32 {
        self.nodes as u32
    }

    /// Number of regular files.
    pub fn file_count(&self) -> u32 {
        le_u32(&self.bytes, 48)
    }

    /// Sum of the sizes of its regular files, each hardlinked file once.
    pub fn logical_bytes(&self) -> u64 {
        le_u64(&self.bytes, 40)
    }

    /// The root directory.
    pub fn root(&self) -> NodeRef<'_> {
        NodeRef { layer: self, ix: 0 }
    }

    /// The entry with this index, if the layer has it.
    pub fn node(&self, ix: u32) -> Option<NodeRef<'_>> {
        ((ix as usize) < self.nodes).then_some(NodeRef { layer: self, ix })
    }

    /// All entries, parents before their children.
    pub fn nodes(&self) -> impl ExactSizeIterator<Item = NodeRef<'_>> {
        (0..self.nodes as u32).map(|ix| NodeRef { layer: self, ix })
    }

    /// The object of each regular file, once for each of its names.
    pub fn objects(&self) -> impl Iterator<Item = ObjectId> + '_ {
        self.nodes()
            .filter(|node| node.kind() == Kind::File)
            .map(NodeRef::object)
    }

    /// The entry at a relative path such as `usr/bin/node`, without following symlinks. The empty
    /// path is the root.
    pub fn lookup(&self, path: &[u8]) -> Option<NodeRef<'_>> {
        tree::components(path).try_fold(self.root(), NodeRef::child)
    }

    /// Whether the bytes after the header match its checksum.
    pub fn body_holds(&self) -> bool {
        *self.bytes.hash(HEADER).as_bytes() == array(&self.bytes, 120)
    }

    /// The tree that this layer encodes; [`encode`] makes this layer of it again.
    pub fn to_tree(&self) -> Tree {
        let mut tree = Tree::default();
        let mut entries: Vec<Vec<(Box<[u8]>, Node)>> = Vec::new();
        entries.resize_with(self.nodes, Vec::new);
        // Children stand after their parent: going backwards, a directory has all its children when
        // it is moved.
        for ix in (0..self.nodes as u32).rev() {
            let node = NodeRef { layer: self, ix };
            let own = entries.pop().unwrap_or_default();
            let made = match node.content() {
                None => Node::Dir(Dir {
                    meta: match node.dir_kind() {
                        DirKind::Implicit => Meta::default(),
                        _ => node.meta(),
                    },
                    kind: node.dir_kind(),
                    entries: own.into_iter().collect(),
                }),
                Some(content) => Node::Leaf(tree::Leaf {
                    meta: node.meta(),
                    content,
                    link: node.is_hardlinked().then(|| u64::from(node.u32(56))),
                }),
            };
            match (entries.get_mut(node.parent_ix() as usize), made) {
                (Some(siblings), made) => siblings.push((node.name().into(), made)),
                (None, Node::Dir(root)) => tree = root,
                (None, Node::Leaf(_)) => {}
            }
        }
        tree
    }
}

/// An entry of a layer.
#[derive(Debug, Clone, Copy)]
pub struct NodeRef<'a> {
    layer: &'a Layer,
    ix: u32,
}

impl<'a> NodeRef<'a> {
    fn at(self, off: usize) -> usize {
        HEADER + self.ix as usize * NODE + off
    }

    fn u16(self, off: usize) -> u16 {
        le_u16(&self.layer.bytes, self.at(off))
    }

    fn u32(self, off: usize) -> u32 {
        le_u32(&self.layer.bytes, self.at(off))
    }

    fn u64(self, off: usize) -> u64 {
        le_u64(&self.layer.bytes, self.at(off))
    }

    fn raw_kind(self) -> Option<Kind> {
        Kind::from_u8(self.layer.bytes[self.at(6)])
    }

    fn parent_ix(self) -> u32 {
        self.u32(20)
    }

    fn flags(self) -> u8 {
        self.layer.bytes[self.at(7)]
    }

    /// The layer of the entry.
    pub fn layer(self) -> &'a Layer {
        self.layer
    }

    /// Its index in the layer; the root has 0.
    pub fn index(self) -> u32 {
        self.ix
    }

    /// Its name; the root's is empty.
    pub fn name(self) -> &'a [u8] {
        let off = self.u32(0) as usize;
        &self.layer.blob()[off..off + self.u16(4) as usize]
    }

    /// Its type.
    pub fn kind(self) -> Kind {
        self.raw_kind().unwrap_or(Kind::Whiteout)
    }

    /// How this directory combines with those below; [`DirKind::Merged`] for other entries.
    pub fn dir_kind(self) -> DirKind {
        if self.flags() & FLAG_OPAQUE != 0 {
            DirKind::Opaque
        } else if self.flags() & FLAG_IMPLICIT != 0 {
            DirKind::Implicit
        } else {
            DirKind::Merged
        }
    }

    /// `mode & 07777`.
    pub fn mode(self) -> u16 {
        self.u16(8)
    }

    /// Owner.
    pub fn uid(self) -> u32 {
        self.u32(12)
    }

    /// Group.
    pub fn gid(self) -> u32 {
        self.u32(16)
    }

    /// Modification time.
    pub fn mtime(self) -> Mtime {
        Mtime {
            sec: self.u64(24) as i64,
            nsec: self.u32(32),
        }
    }

    /// A file's or a symlink's length in bytes; 0 for other entries.
    pub fn size(self) -> u64 {
        match self.kind() {
            Kind::File | Kind::Symlink => self.u64(40),
            _ => 0,
        }
    }

    /// A device's number.
    pub fn rdev(self) -> Rdev {
        match self.kind() {
            Kind::Char | Kind::Block => Rdev {
                major: (self.u64(48) >> 32) as u32,
                minor: self.u64(48) as u32,
            },
            _ => Rdev::default(),
        }
    }

    /// The object of a file. Meaningless for other entries.
    pub fn object(self) -> ObjectId {
        ObjectId::from_bytes(array(&self.layer.bytes, self.at(64)))
    }

    /// The id of the contents of a directory: equal ids mean equal subtrees, mtimes apart.
    /// Meaningless for other entries.
    pub fn subtree(self) -> TreeId {
        TreeId::from_bytes(array(&self.layer.bytes, self.at(64)))
    }

    /// A symlink's target; empty for other entries.
    pub fn target(self) -> &'a [u8] {
        if self.kind() != Kind::Symlink {
            return &[];
        }
        let off = self.u64(48) as usize;
        &self.layer.blob()[off..off + self.u64(40) as usize]
    }

    /// The directory of the entry; the root is its own parent.
    #[must_use]
    pub fn parent(self) -> NodeRef<'a> {
        NodeRef {
            ix: self.parent_ix(),
            ..self
        }
    }

    /// Its path from the root, without a leading slash.
    pub fn path(self) -> Vec<u8> {
        let mut names = Vec::new();
        let mut node = self;
        while node.ix != 0 {
            names.push(node.name());
            node = node.parent();
        }
        names.reverse();
        names.join(&b'/')
    }

    fn child_range(self) -> std::ops::Range<u32> {
        if self.kind() == Kind::Dir {
            let first = self.u64(48) as u32;
            first..first + self.u64(40) as u32
        } else {
            0..0
        }
    }

    /// A directory's entries in the order of their names; none for other entries.
    pub fn children(self) -> impl ExactSizeIterator<Item = NodeRef<'a>> + use<'a> {
        let layer = self.layer;
        self.child_range().map(move |ix| NodeRef { layer, ix })
    }

    /// A directory's number of entries.
    pub fn child_count(self) -> u32 {
        self.child_range().len() as u32
    }

    /// The entry called `name` in this directory. One binary search.
    pub fn child(self, name: &[u8]) -> Option<NodeRef<'a>> {
        let layer = self.layer;
        let std::ops::Range {
            start: mut low,
            end: mut high,
        } = self.child_range();
        while low < high {
            let ix = low + (high - low) / 2;
            let node = NodeRef { layer, ix };
            match node.name().cmp(name) {
                std::cmp::Ordering::Equal => return Some(node),
                std::cmp::Ordering::Less => low = ix + 1,
                std::cmp::Ordering::Greater => high = ix,
            }
        }
        None
    }

    /// Its xattrs, sorted by name.
    pub fn xattrs(self) -> XattrIter<'a> {
        match self.u32(36) {
            NO_XATTRS => XattrIter { set: &[], left: 0 },
            off => XattrIter::new(&self.layer.blob()[off as usize..]),
        }
    }

    /// The entries that are the same file as this one, this one included, in order; empty if the
    /// file has one name only.
    pub fn links(self) -> impl Iterator<Item = NodeRef<'a>> + use<'a> {
        let layer = self.layer;
        let group = self.u32(56);
        let (mut low, mut high) = (0, layer.links);
        while low < high {
            let at = low + (high - low) / 2;
            if layer.link(at).0 < group {
                low = at + 1;
            } else {
                high = at;
            }
        }
        (low..layer.links)
            .map(move |at| layer.link(at))
            .take_while(move |link| link.0 == group)
            .map(move |(_, ix)| NodeRef { layer, ix })
    }

    /// Whether the same file has other names in this layer.
    pub fn is_hardlinked(self) -> bool {
        self.u32(56) != 0
    }

    /// Its metadata.
    pub fn meta(self) -> Meta {
        Meta {
            mode: self.mode(),
            uid: self.uid(),
            gid: self.gid(),
            mtime: self.mtime(),
            xattrs: self.xattrs().map(|(k, v)| (k.into(), v.into())).collect(),
        }
    }

    /// The content of the entry; nothing for a directory.
    pub fn content(self) -> Option<Content> {
        Some(match self.kind() {
            Kind::Dir => return None,
            Kind::File => Content::File {
                object: self.object(),
                size: self.size(),
            },
            Kind::Symlink => Content::Symlink {
                target: self.target().into(),
            },
            Kind::Fifo => Content::Fifo,
            Kind::Socket => Content::Socket,
            Kind::Char => Content::Char(self.rdev()),
            Kind::Block => Content::Block(self.rdev()),
            Kind::Whiteout => Content::Whiteout,
        })
    }
}

/// The xattrs of an entry: (name, value), sorted by name.
#[derive(Debug, Clone)]
pub struct XattrIter<'a> {
    set: &'a [u8],
    left: u16,
}

impl<'a> XattrIter<'a> {
    fn new(set: &'a [u8]) -> Self {
        match set.split_first_chunk::<2>() {
            Some((count, set)) => Self {
                set,
                left: u16::from_le_bytes(*count),
            },
            // A damaged set: it claims one xattr but has no bytes for it, and the check at opening
            // fails.
            None => Self { set: &[], left: 1 },
        }
    }
}

impl<'a> Iterator for XattrIter<'a> {
    type Item = (&'a [u8], &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let (name_len, rest) = self.set.split_first_chunk::<2>()?;
        let (value_len, rest) = rest.split_first_chunk::<4>()?;
        let (name, rest) = rest.split_at_checked(u16::from_le_bytes(*name_len) as usize)?;
        let (value, rest) = rest.split_at_checked(u32::from_le_bytes(*value_len) as usize)?;
        self.set = rest;
        self.left -= 1;
        Some((name, value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str, link: Option<u64>) -> Node {
        Node::Leaf(tree::Leaf {
            meta: Meta {
                mode: 0o644,
                mtime: Mtime { sec: -5, nsec: 7 },
                ..Meta::default()
            },
            content: Content::File {
                object: ObjectId::of(text.as_bytes()),
                size: text.len() as u64,
            },
            link,
        })
    }

    fn leaf(content: Content) -> Node {
        Node::Leaf(tree::Leaf {
            meta: Meta::default(),
            content,
            link: None,
        })
    }

    /// One entry of each kind.
    fn sample() -> Tree {
        let mut tree = Tree::default();
        tree.meta.mode = 0o755;
        let etc = tree.dir_at(b"usr/etc").unwrap();
        etc.kind = DirKind::Opaque;
        etc.meta.mode = 0o1777;
        etc.meta.xattrs.insert((*b"user.a").into(), (*b"1").into());
        etc.meta.xattrs.insert((*b"user.b").into(), (*b"").into());
        etc.entries.insert((*b"one").into(), file("1", Some(77)));
        etc.entries.insert((*b"two").into(), file("1", Some(77)));
        etc.entries.insert((*b"alone").into(), file("22", Some(78)));
        let dev = tree.dir_at(b"dev").unwrap();
        let rdev = Rdev { major: 1, minor: 3 };
        dev.entries
            .insert((*b"null").into(), leaf(Content::Char(rdev)));
        dev.entries
            .insert((*b"disk").into(), leaf(Content::Block(rdev)));
        dev.entries.insert((*b"pipe").into(), leaf(Content::Fifo));
        dev.entries.insert((*b"sock").into(), leaf(Content::Socket));
        let target = Content::Symlink {
            target: (*b"/etc/x").into(),
        };
        tree.entries.insert((*b"ln\xff").into(), leaf(target));
        tree.entries
            .insert((*b"gone").into(), leaf(Content::Whiteout));
        tree
    }

    #[test]
    fn round_trip() {
        let encoded = encode(&sample()).unwrap();
        let layer = Layer::from_bytes(encoded.bytes.clone()).unwrap();
        assert_eq!(layer.layer_id(), encoded.layer_id);
        assert_eq!(layer.tree_id(), encoded.tree_id);
        assert!(layer.body_holds() && layer.header_holds());
        layer.check_all().unwrap();
        assert_eq!((layer.file_count(), layer.logical_bytes()), (3, 3));
        assert_eq!(encode(&layer.to_tree()).unwrap().bytes, encoded.bytes);
        let one = layer.lookup(b"usr/etc/one").unwrap();
        assert_eq!(one.path(), b"usr/etc/one");
        assert_eq!(one.mtime(), Mtime { sec: -5, nsec: 7 });
        let names: Vec<_> = one.links().map(NodeRef::name).collect();
        assert_eq!(names, [b"one", b"two"]);
        assert!(!layer.lookup(b"usr/etc/alone").unwrap().is_hardlinked());
        assert_eq!(
            layer.lookup(b"dev/null").unwrap().rdev(),
            Rdev { major: 1, minor: 3 }
        );
        assert_eq!(layer.lookup(b"ln\xff").unwrap().target(), b"/etc/x");
        assert_eq!(layer.lookup(b"gone").unwrap().kind(), Kind::Whiteout);
        assert!(layer.lookup(b"usr/nothing").is_none());
        assert!(layer.lookup(b"dev/null/x").is_none());
        assert_eq!(layer.lookup(b"usr/etc").unwrap().xattrs().count(), 2);
    }

    /// The format: these values may never change.
    #[test]
    fn golden_ids() {
        let ids = |tree: &Tree| {
            let encoded = encode(tree).unwrap();
            (encoded.tree_id.to_string(), encoded.layer_id.to_string())
        };
        let (tree, layer) = ids(&Tree::default());
        assert_eq!(
            tree,
            "e5632fcf7d83a7e54ff80b6de3502868c2c60128d5b2f41a90ccca155299fd2b"
        );
        assert_eq!(
            layer,
            "6c34f127740a3e2a35660a0e8d4d93a6b9413f4aee3867a5b8ae693cbe8945bf"
        );
        let (tree, layer) = ids(&sample());
        assert_eq!(
            tree,
            "ef410ced5f2ada0802187bc0ad3051d99acd16e2682964c3080d6a7cd801e1ca"
        );
        assert_eq!(
            layer,
            "f5724684bee1e4b0525022a68a3b4dce1c946051123f5c6c95e3988c8eef9eed"
        );
        let bytes = encode(&sample()).unwrap().bytes;
        assert_eq!(
            ObjectId::of(&bytes).to_string(),
            "6f360755ae38c34cbe4541a232e03d331459f9239c904c67b91d1afd5d5bf99f"
        );
    }

    #[test]
    fn mtimes_are_in_the_layer_id_alone() {
        let base = encode(&sample()).unwrap();
        let mut tree = sample();
        tree.dir_at(b"usr/etc").unwrap().meta.mtime.sec = 9;
        let touched = encode(&tree).unwrap();
        assert_eq!(base.tree_id, touched.tree_id);
        assert_ne!(base.layer_id, touched.layer_id);
        // The metadata of an implicit directory belongs to no user.
        let mut tree = sample();
        tree.dir_at(b"usr").unwrap().meta.mtime.sec = 9;
        assert_eq!(encode(&tree).unwrap().layer_id, base.layer_id);
    }

    #[test]
    fn equal_subtrees_have_equal_ids() {
        let mut tree = Tree::default();
        for at in [&b"a/x"[..], b"deep/er/x"] {
            tree.dir_at(at)
                .unwrap()
                .entries
                .insert((*b"f").into(), file("1", None));
        }
        let layer = Layer::from_bytes(encode(&tree).unwrap().bytes).unwrap();
        let id = |path: &[u8]| layer.lookup(path).unwrap().subtree();
        assert_eq!(id(b"a/x"), id(b"deep/er/x"));
        assert_ne!(id(b"a"), id(b"deep"));
    }

    /// The functions that walk a layer recurse; a thread's stack is enough for the deepest tree.
    #[test]
    fn the_deepest_tree() {
        let path = |depth: usize| vec![b"d".as_slice(); depth].join(&b'/');
        let mut tree = Tree::default();
        assert_eq!(tree.dir_at(&path(MAX_DEPTH + 1)), Err(TreeError::Depth));
        let mut tree = Tree::default();
        tree.dir_at(&path(MAX_DEPTH)).unwrap();
        let encoded = encode(&tree).unwrap();
        let layer = Layer::from_bytes(encoded.bytes.clone()).unwrap();
        assert_eq!(encode(&layer.to_tree()).unwrap().bytes, encoded.bytes);
        let empty = Layer::from_bytes(encode(&Tree::default()).unwrap().bytes).unwrap();
        assert_eq!(crate::diff(&empty, &layer).len(), MAX_DEPTH);
        assert_eq!(crate::diff(&layer, &empty).len(), MAX_DEPTH);
    }

    /// No byte of a layer file can change undetected, except for the compat features, whose change
    /// has no effect.
    #[test]
    fn every_flipped_byte_is_found_and_none_panics() {
        let encoded = encode(&sample()).unwrap();
        for at in 0..encoded.bytes.len() {
            let mut bytes = encoded.bytes.clone();
            bytes[at] ^= 0x41;
            let Ok(layer) = Layer::from_bytes(bytes) else {
                continue;
            };
            let told = !layer.body_holds() || !layer.header_holds();
            assert_eq!(told, !(12..20).contains(&at), "byte {at}");
            assert_eq!(layer.compat_features() == [0, 0], told, "byte {at}");
            assert_eq!(layer.check_all().is_err(), told, "byte {at}");
        }
        // With a matching checksum, the hashes and the layout reveal the change.
        for at in HEADER..encoded.bytes.len() {
            let mut bytes = encoded.bytes.clone();
            bytes[at] ^= 0x41;
            let body = blake3::hash(&bytes[HEADER..]);
            bytes[120..152].copy_from_slice(body.as_bytes());
            let holds = Layer::from_bytes(bytes).and_then(|layer| layer.check_all());
            assert!(holds.is_err(), "byte {at}");
        }
        for len in 0..encoded.bytes.len() {
            assert!(
                Layer::from_bytes(encoded.bytes[..len].to_vec()).is_err(),
                "cut to {len}"
            );
        }
    }
}
