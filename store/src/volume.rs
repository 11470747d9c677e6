//! Cache volumes: downloads of package managers, as layers that any number of steps share.
//!
//! A volume is a ref of the kind [`RefKind::Volume`], with a stack of layers, bottom first. A step
//! sees the stack that the volume has when the step begins; the step's additions become one more
//! layer when it has succeeded. Nothing is changed in place, so steps run beside each other, none
//! waits for another, and none sees half of another's files.
//!
//! # Merging
//!
//! The result of [`Store::merge_volume`] is the union: of two files of one name, the one that was
//! merged last stays, and deletions are ignored. Entries that the volume has already, mtimes apart,
//! are left out. The ref is compared and swapped; when another process was faster, the union is
//! made again on its result. A process that dies on the way leaves the ref as it was.
//!
//! The layers of a volume hold files, directories and symlinks; no whiteouts, no opaque
//! directories, no hardlinks. Each layer has more entries than all above it together: a merge folds
//! the topmost layers into the new one until that holds, so that a volume of n entries has at most
//! about log2(n) layers, and an entry is written again about as often.
//!
//! # Limits
//!
//! A volume that would exceed [`MAX_VOLUME_BYTES`] or [`MAX_VOLUME_ENTRIES`] starts anew, empty:
//! package managers cope with an empty cache, not all of them with half of one. Garbage collection
//! drops volumes as it drops records: the layers of a volume are kept by age and size only. A
//! volume that has lost a layer is empty.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::error::StoreError;
use crate::id::LayerId;
use crate::layer::{Kind, Layer, NodeRef};
use crate::lease::Lease;
use crate::refs::{Ref, RefKind};
use crate::store::Store;
use crate::tree::{Content, Dir, DirKind, Leaf, Meta, Mtime, Node, Tree};

/// Most layers of one volume.
pub const MAX_VOLUME_LAYERS: usize = 16;
/// Most bytes of files in one volume, by their sizes.
pub const MAX_VOLUME_BYTES: u64 = 8 << 30;
/// Most entries of all layers of one volume.
pub const MAX_VOLUME_ENTRIES: u64 = 1 << 19;
/// Deepest nesting in a volume. Deeper entries are left out.
pub const MAX_VOLUME_DEPTH: usize = 64;
/// How often a merge begins again because another process was faster.
const MAX_RACES: usize = 64;

/// How large a volume may become.
#[derive(Debug, Clone, Copy)]
struct Limits {
    entries: u64,
    bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            entries: MAX_VOLUME_ENTRIES,
            bytes: MAX_VOLUME_BYTES,
        }
    }
}

/// The outcome of a merge.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Merge {
    /// The volume had everything already.
    Unchanged,
    /// The volume has grown.
    Grown {
        /// Files and symlinks that are new or have other contents.
        entries: u64,
        /// Layers that the volume has now.
        layers: usize,
    },
    /// The volume would have exceeded its limits, and is empty now.
    StartedAnew,
}

impl Store {
    /// The layers of a volume, bottom first, pinned. A volume that does not exist, or that has lost
    /// a layer, has none.
    pub fn volume(&self, lease: &Lease, name: &str) -> Result<Vec<Arc<Layer>>, StoreError> {
        let content = self.get_ref(RefKind::Volume, name);
        self.open_volume(lease, known(content)?.as_ref())
    }

    /// The layers of every volume, bottom first, whether they are there or not. A volume whose ref
    /// is damaged is left out.
    pub fn volumes(&self) -> Result<BTreeMap<String, Vec<LayerId>>, StoreError> {
        let refs = self.list_refs(RefKind::Volume)?;
        let layers = refs
            .into_iter()
            .map(|(name, content)| (name, content.layers));
        Ok(layers.collect())
    }

    fn open_volume(
        &self,
        lease: &Lease,
        content: Option<&Ref>,
    ) -> Result<Vec<Arc<Layer>>, StoreError> {
        let ids = content.map_or(&[][..], |content| &content.layers);
        // Pinned before it is looked for.
        lease.pin(ids)?;
        let mut layers = Vec::with_capacity(ids.len());
        for id in ids {
            match self.layer(id) {
                Ok(layer) => layers.push(layer),
                // Collected or damaged: nothing that cannot be downloaded again.
                Err(
                    StoreError::MissingLayer(_)
                    | StoreError::Layer { .. }
                    | StoreError::Damaged { .. },
                ) => return Ok(Vec::new()),
                Err(error) => return Err(error),
            }
        }
        Ok(layers)
    }

    /// Adds the entries of `added` that a volume lacks. The objects of `added` must be in
    /// the store.
    pub fn merge_volume(
        &self,
        lease: &Lease,
        name: &str,
        added: &Tree,
    ) -> Result<Merge, StoreError> {
        self.merge_volume_with(lease, name, added, Limits::default(), &|_| ())
    }

    /// As [`Store::merge_volume`]. `before_swap` is called with the number of each attempt, between
    /// the making of the layer and the swap of the ref.
    fn merge_volume_with(
        &self,
        lease: &Lease,
        name: &str,
        added: &Tree,
        limits: Limits,
        before_swap: &dyn Fn(usize),
    ) -> Result<Merge, StoreError> {
        for attempt in 0..MAX_RACES {
            let before = known(self.get_ref(RefKind::Volume, name))?;
            let layers = self.open_volume(lease, before.as_ref())?;
            let top_first: Vec<NodeRef<'_>> = layers.iter().rev().map(|one| one.root()).collect();
            let Some(new) = new_of(added, &top_first, 0) else {
                return Ok(Merge::Unchanged);
            };
            let entries = count_leaves(&new);
            let after = self.stack(lease, &layers, &new, limits)?;
            before_swap(attempt);
            let edit = self.edit_ref(RefKind::Volume, name)?;
            if known(edit.get())? != before {
                continue;
            }
            let Some(ids) = after else {
                edit.remove()?;
                return Ok(Merge::StartedAnew);
            };
            let layers = ids.len();
            edit.set(&Ref {
                layers: ids,
                info: serde_json::Value::Null,
            })?;
            return Ok(Merge::Grown { entries, layers });
        }
        Err(StoreError::VolumeContended {
            name: name.to_owned(),
        })
    }

    /// Publishes `new` on `layers`, folded together with those that it outgrows. Nothing if that is
    /// too much for one volume.
    fn stack(
        &self,
        lease: &Lease,
        layers: &[Arc<Layer>],
        new: &Tree,
        limits: Limits,
    ) -> Result<Option<Vec<LayerId>>, StoreError> {
        let (new_entries, new_bytes) = weigh(new);
        let nodes = |layer: &Arc<Layer>| u64::from(layer.node_count());
        let entries = new_entries + layers.iter().map(nodes).sum::<u64>();
        let bytes = layers.iter().map(|layer| layer.logical_bytes());
        let bytes = bytes.fold(new_bytes, u64::saturating_add);
        if entries > limits.entries || bytes > limits.bytes {
            return Ok(None);
        }
        let (mut keep, mut above) = (layers.len().min(MAX_VOLUME_LAYERS - 1), new_entries);
        for (at, layer) in layers.iter().enumerate().rev() {
            if nodes(layer) <= above {
                keep = keep.min(at);
            }
            above += nodes(layer);
        }
        let (below, folded) = layers.split_at(keep);
        let ingest = self.ingest(lease)?;
        let published = if folded.is_empty() {
            ingest.finish(new)?
        } else {
            let mut top_first: Vec<Side<'_>> = vec![Side::Tree(new)];
            top_first.extend(folded.iter().rev().map(|layer| Side::Layer(layer.root())));
            ingest.finish(&union(&top_first, 0))?
        };
        let mut ids: Vec<LayerId> = below.iter().map(|layer| layer.layer_id()).collect();
        ids.push(published.layer_id);
        Ok(Some(ids))
    }
}

/// The ref of a volume; none if its file is damaged, since a volume can always be filled again.
fn known(content: Result<Option<Ref>, StoreError>) -> Result<Option<Ref>, StoreError> {
    match content {
        Err(StoreError::Json { .. } | StoreError::Damaged { .. }) => Ok(None),
        other => other,
    }
}

fn without_mtime(meta: &Meta) -> Meta {
    Meta {
        mtime: Mtime::default(),
        ..meta.clone()
    }
}

/// Entries of a volume's layers under one name.
enum There<'a> {
    Nothing,
    Leaf(NodeRef<'a>),
    /// The directories that are merged, topmost first.
    Dirs(Vec<NodeRef<'a>>),
}

fn look<'a>(top_first: &[NodeRef<'a>], name: &[u8]) -> There<'a> {
    let mut dirs = Vec::new();
    for child in top_first.iter().filter_map(|dir| dir.child(name)) {
        if child.kind() == Kind::Dir {
            dirs.push(child);
        } else if dirs.is_empty() {
            return There::Leaf(child);
        } else {
            break;
        }
    }
    if dirs.is_empty() {
        There::Nothing
    } else {
        There::Dirs(dirs)
    }
}

/// The metadata of a directory that the layers have, unless all of them have it only on the way to
/// something.
fn meta_of(top_first: &[NodeRef<'_>]) -> Option<Meta> {
    let own = top_first
        .iter()
        .find(|dir| dir.dir_kind() != DirKind::Implicit);
    own.map(|dir| dir.meta())
}

/// Entries of `added` that the layers lack, if any.
fn new_of(added: &Dir, top_first: &[NodeRef<'_>], depth: usize) -> Option<Dir> {
    let mut entries: Vec<(Box<[u8]>, Node)> = Vec::new();
    for (name, node) in added.entries.iter() {
        let there = look(top_first, name);
        let new = match node {
            Node::Leaf(leaf) => new_leaf(leaf, &there).map(Node::Leaf),
            Node::Dir(_) if depth >= MAX_VOLUME_DEPTH => None,
            Node::Dir(dir) => {
                let below = match there {
                    There::Dirs(dirs) => dirs,
                    There::Nothing | There::Leaf(_) => Vec::new(),
                };
                new_of(dir, &below, depth + 1).map(Node::Dir)
            }
        };
        entries.extend(new.map(|node| (name.into(), node)));
    }
    let mut dir = Dir {
        meta: added.meta.clone(),
        kind: match added.kind {
            DirKind::Implicit => DirKind::Implicit,
            DirKind::Merged | DirKind::Opaque => DirKind::Merged,
        },
        entries: entries.into_iter().collect(),
    };
    let known = dir.kind == DirKind::Implicit
        || meta_of(top_first).is_some_and(|meta| without_mtime(&meta) == without_mtime(&dir.meta));
    if known {
        if dir.entries.is_empty() {
            return None;
        }
        (dir.kind, dir.meta) = (DirKind::Implicit, Meta::default());
    }
    Some(dir)
}

fn new_leaf(leaf: &Leaf, there: &There<'_>) -> Option<Leaf> {
    if !matches!(leaf.content, Content::File { .. } | Content::Symlink { .. }) {
        return None;
    }
    if let There::Leaf(known) = there
        && known.content().as_ref() == Some(&leaf.content)
        && without_mtime(&known.meta()) == without_mtime(&leaf.meta)
    {
        return None;
    }
    Some(Leaf {
        link: None,
        ..leaf.clone()
    })
}

/// A directory to be united with others, wherever it is held.
#[derive(Clone, Copy)]
enum Side<'a> {
    Tree(&'a Dir),
    Layer(NodeRef<'a>),
}

/// An entry of such a directory.
enum Piece<'a> {
    Dir(Side<'a>),
    Leaf(Leaf),
}

impl<'a> Side<'a> {
    fn own_meta(self) -> Option<Meta> {
        match self {
            Self::Tree(dir) => (dir.kind != DirKind::Implicit).then(|| dir.meta.clone()),
            Self::Layer(dir) => meta_of(&[dir]),
        }
    }

    fn pieces(self) -> Vec<(&'a [u8], Piece<'a>)> {
        match self {
            Self::Tree(dir) => {
                let piece = |(name, node): (&'a [u8], &'a Node)| match node {
                    Node::Dir(dir) => (name, Piece::Dir(Self::Tree(dir))),
                    Node::Leaf(leaf) => (name, Piece::Leaf(leaf.clone())),
                };
                dir.entries.iter().map(piece).collect()
            }
            Self::Layer(dir) => {
                let piece = |node: NodeRef<'a>| {
                    if node.kind() == Kind::Dir {
                        return Some((node.name(), Piece::Dir(Self::Layer(node))));
                    }
                    let leaf = Leaf {
                        meta: node.meta(),
                        content: node.content()?,
                        link: None,
                    };
                    Some((node.name(), Piece::Leaf(leaf)))
                };
                dir.children().filter_map(piece).collect()
            }
        }
    }
}

/// All entries of these directories, topmost first.
fn union(top_first: &[Side<'_>], depth: usize) -> Dir {
    /// Entries of one name: a leaf, or directories that may hide one.
    enum Slot<'a> {
        Leaf(Leaf),
        Dirs(Vec<Side<'a>>, bool),
    }
    let mut names: BTreeMap<&[u8], Slot<'_>> = BTreeMap::new();
    for side in top_first {
        for (name, piece) in side.pieces() {
            match (names.get_mut(name), piece) {
                (None, Piece::Leaf(leaf)) => {
                    names.insert(name, Slot::Leaf(leaf));
                }
                (None, Piece::Dir(dir)) => {
                    names.insert(name, Slot::Dirs(vec![dir], false));
                }
                (Some(Slot::Dirs(dirs, false)), Piece::Dir(dir)) => dirs.push(dir),
                // A leaf between directories ends the merge.
                (Some(Slot::Dirs(_, ended)), _) => *ended = true,
                (Some(Slot::Leaf(_)), _) => {}
            }
        }
    }
    let entries = names.into_iter().filter_map(|(name, slot)| {
        let node = match slot {
            Slot::Leaf(leaf) => Node::Leaf(leaf),
            Slot::Dirs(..) if depth >= MAX_VOLUME_DEPTH => return None,
            Slot::Dirs(dirs, _) => Node::Dir(union(&dirs, depth + 1)),
        };
        Some((name.into(), node))
    });
    let meta = top_first.iter().find_map(|side| side.own_meta());
    Dir {
        entries: entries.collect(),
        kind: meta.as_ref().map_or(DirKind::Implicit, |_| DirKind::Merged),
        meta: meta.unwrap_or_default(),
    }
}

fn count_leaves(dir: &Dir) -> u64 {
    let count = |(_, node): (&[u8], &Node)| match node {
        Node::Dir(dir) => count_leaves(dir),
        Node::Leaf(_) => 1,
    };
    dir.entries.iter().map(count).sum()
}

/// The entries of a tree, itself included, and the bytes of its files.
fn weigh(dir: &Dir) -> (u64, u64) {
    dir.entries
        .iter()
        .map(|(_, node)| match node {
            Node::Dir(dir) => weigh(dir),
            Node::Leaf(leaf) => match leaf.content {
                Content::File { size, .. } => (1, size),
                _ => (1, 0),
            },
        })
        .fold((1, 0), |sum, one| {
            (sum.0 + one.0, sum.1.saturating_add(one.1))
        })
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn added(store: &Store, lease: &Lease, files: &[(&str, &str)]) -> Tree {
        let ingest = store.ingest(lease).unwrap();
        let mut tree = Tree::implicit();
        for (path, text) in files {
            let object = ingest.add_bytes(text.as_bytes()).unwrap();
            let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
            let leaf = Leaf {
                meta: Meta::default(),
                content: Content::File {
                    object: object.object,
                    size: object.size,
                },
                link: None,
            };
            let dir = tree.dir_at(dir.as_bytes()).unwrap();
            dir.entries.insert(name.as_bytes().into(), Node::Leaf(leaf));
        }
        // Something names the objects.
        ingest.finish(&tree).unwrap();
        tree
    }

    fn names(store: &Store, lease: &Lease) -> Vec<String> {
        let mut names: Vec<String> = store
            .volume(lease, "v")
            .unwrap()
            .iter()
            .flat_map(|layer| layer.nodes())
            .filter(|node| node.kind() == Kind::File)
            .map(|node| String::from_utf8(node.path()).unwrap())
            .collect();
        names.sort_unstable();
        names
    }

    /// Between the layer of one merge and its swap, another merge is done.
    #[test]
    fn a_merge_that_was_overtaken_is_made_again_on_the_result() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let lease = store.lease("test").unwrap();
        let first = added(&store, &lease, &[("c/a", "1"), ("c/both", "first")]);
        let second = added(&store, &lease, &[("c/b", "2"), ("c/both", "second")]);
        let attempts = Cell::new(0);
        let overtake = |attempt| {
            attempts.set(attempts.get() + 1);
            if attempt == 0 {
                store.merge_volume(&lease, "v", &second).unwrap();
            }
        };
        let merge = store
            .merge_volume_with(&lease, "v", &first, Limits::default(), &overtake)
            .unwrap();
        assert_eq!(attempts.get(), 2);
        assert!(
            matches!(merge, Merge::Grown { entries: 2, .. }),
            "{merge:?}"
        );
        let mut seen = names(&store, &lease);
        seen.dedup();
        assert_eq!(seen, ["c/a", "c/b", "c/both"]);
        let top = store.volume(&lease, "v").unwrap().pop().unwrap();
        let both = top.lookup(b"c/both").unwrap();
        assert_eq!(both.object(), crate::ObjectId::of(b"first"));
    }

    #[test]
    fn a_merge_that_is_always_overtaken_ends() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let lease = store.lease("test").unwrap();
        let own = added(&store, &lease, &[("own", "1")]);
        let overtake = |attempt: usize| {
            let other = added(&store, &lease, &[(&format!("{attempt}"), "x")]);
            store.merge_volume(&lease, "v", &other).unwrap();
        };
        let merge = store.merge_volume_with(&lease, "v", &own, Limits::default(), &overtake);
        assert!(matches!(merge, Err(StoreError::VolumeContended { .. })));
    }

    #[test]
    fn a_volume_that_outgrows_its_limits_starts_anew() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let lease = store.lease("test").unwrap();
        for limits in [
            Limits {
                entries: 5,
                bytes: 1000,
            },
            Limits {
                entries: 1000,
                bytes: 5,
            },
        ] {
            let merge = |files: &[(&str, &str)]| {
                let tree = added(&store, &lease, files);
                store
                    .merge_volume_with(&lease, "v", &tree, limits, &|_| ())
                    .unwrap()
            };
            assert!(matches!(
                merge(&[("a", "12"), ("b", "34")]),
                Merge::Grown { .. }
            ));
            assert_eq!(merge(&[("c", "56"), ("d", "78")]), Merge::StartedAnew);
            assert_eq!(store.get_ref(RefKind::Volume, "v").unwrap(), None);
            assert_eq!(names(&store, &lease), <[&str; 0]>::default());
        }
    }
}
