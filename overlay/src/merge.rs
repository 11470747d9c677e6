//! Layers merged into one read-only view: the lower. Pure, built once, immutable afterwards.
//!
//! A directory to which two or more layers contribute gets a table of its merged entries, sorted by
//! name. All others stand in one layer alone, whose own node table is already such a table, and are
//! shared as they are. So building costs what the layers have in common, and a lookup is one binary
//! search in one table, however many layers there are and whether or not it finds anything.
//!
//! Rules, from the top layer down, for one name: a whiteout ends the search; a file, symlink or
//! other leaf is the answer if nothing was found above it and ends the search; directories add up
//! until an opaque one has been added. A merged directory has the metadata of the topmost
//! contributor that is not implicit.
//!
//! # Inode numbers
//!
//! They are computed, not stored: each layer has a range as long as its table of nodes, bottom
//! first from [`FIRST_LOWER`]; an entry has the number of the topmost contributor's node, with the
//! first of its names in the layer standing for a hardlinked file; the root is [`ROOT`]. All are
//! below [`Merged::end`].

use std::sync::Arc;

use iii_store::layer::{Kind, Layer, NodeRef};
use iii_store::tree::{self, DirKind, Tree, TreeError};

use crate::ino::{FIRST_LOWER, Ino, InoMap, ROOT};

/// Most layers of one chain.
pub const MAX_LAYERS: usize = 1024;

/// Why layers cannot be merged.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// More than [`MAX_LAYERS`].
    #[error("{0} layers in one chain: at most {MAX_LAYERS} can be composed")]
    TooMany(usize),
    /// The empty layer that stands for an empty chain cannot be made.
    #[error("encoding an empty layer failed")]
    Empty(#[from] TreeError),
    /// The empty layer that stands for an empty chain cannot be read.
    #[error("reading an empty layer failed")]
    EmptyLayer(#[from] iii_store::layer::LayerError),
}

/// Where an entry stands: its layer's index in the chain, and its index in the layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Place {
    /// Index of the layer, bottom first.
    pub slot: u16,
    /// Index of the node in the layer.
    pub node: u32,
}

#[derive(Debug)]
struct MergedDir {
    /// The topmost contributor of every name, sorted by name.
    children: Box<[Place]>,
    /// Whose metadata holds.
    meta: Place,
    subdirs: u32,
}

/// The merged view of a chain of layers.
#[derive(Debug)]
pub struct Merged {
    layers: Vec<Arc<Layer>>,
    numbers: Numbers,
    dirs: InoMap<MergedDir>,
}

/// Which inode numbers stand for which layer's nodes.
#[derive(Debug)]
struct Numbers {
    /// The number of each layer's node 0, bottom first.
    starts: Box<[Ino]>,
    end: Ino,
}

impl Numbers {
    fn new(layers: &[Arc<Layer>]) -> Self {
        let mut end = FIRST_LOWER;
        let starts = layers
            .iter()
            .map(|layer| {
                let start = end;
                end += Ino::from(layer.node_count());
                start
            })
            .collect();
        Self { starts, end }
    }

    fn of(&self, slot: u16, node: u32) -> Ino {
        let start = self.starts.get(usize::from(slot));
        start.map_or(ROOT, |start| start + Ino::from(node))
    }

    fn of_dir(&self, place: Place) -> Ino {
        if place.node == 0 {
            ROOT
        } else {
            self.of(place.slot, place.node)
        }
    }

    fn place(&self, ino: Ino) -> Option<Place> {
        if ino == ROOT {
            return Some(Place {
                slot: self.starts.len() as u16 - 1,
                node: 0,
            });
        }
        if ino >= self.end {
            return None;
        }
        let slot = self.starts.partition_point(|&start| start <= ino);
        let slot = slot.checked_sub(1)?;
        Some(Place {
            slot: slot as u16,
            node: (ino - self.starts.get(slot)?) as u32,
        })
    }
}

/// An entry of the merged view.
#[derive(Debug, Clone, Copy)]
pub struct Lower<'a> {
    /// Its inode number.
    pub ino: Ino,
    /// Its node in the topmost layer that contributes to it.
    pub node: NodeRef<'a>,
}

impl Merged {
    /// Merges `layers`, bottom first.
    pub fn new(mut layers: Vec<Arc<Layer>>) -> Result<Self, MergeError> {
        if layers.len() > MAX_LAYERS {
            return Err(MergeError::TooMany(layers.len()));
        }
        if layers.is_empty() {
            let empty = iii_store::layer::encode(&Tree::implicit())?;
            layers.push(Arc::new(Layer::from_bytes(empty.bytes)?));
        }
        let mut merged = Self {
            numbers: Numbers::new(&layers),
            layers,
            dirs: InoMap::default(),
        };
        let mut roots = Vec::new();
        for slot in (0..merged.layers.len() as u16).rev() {
            roots.push(Place { slot, node: 0 });
            if merged.layers[slot as usize].root().dir_kind() == DirKind::Opaque {
                break;
            }
        }
        let mut pending = vec![roots];
        while let Some(contributors) = pending.pop() {
            if contributors.len() > 1 {
                merged.merge_dir(&contributors, &mut pending);
            }
        }
        Ok(merged)
    }

    /// Merges one directory from its contributors, topmost first; what of its children needs
    /// merging goes to `pending`.
    fn merge_dir(&mut self, contributors: &[Place], pending: &mut Vec<Vec<Place>>) {
        let layers = std::mem::take(&mut self.layers);
        let node = |place: Place| at(&layers, place);
        let mut names: Vec<(NodeRef<'_>, usize, Place)> = Vec::new();
        for (rank, &dir) in contributors.iter().enumerate() {
            names.extend(node(dir).into_iter().flat_map(NodeRef::children).map(|n| {
                let place = Place {
                    slot: dir.slot,
                    node: n.index(),
                };
                (n, rank, place)
            }));
        }
        names.sort_unstable_by(|a, b| a.0.name().cmp(b.0.name()).then(a.1.cmp(&b.1)));
        let mut children = Vec::new();
        let mut subdirs = 0;
        for group in names.chunk_by(|a, b| a.0.name() == b.0.name()) {
            let mut dirs = Vec::new();
            for &(child, _, place) in group {
                match child.kind() {
                    Kind::Whiteout => break,
                    Kind::Dir => {
                        dirs.push(place);
                        if child.dir_kind() == DirKind::Opaque {
                            break;
                        }
                    }
                    _ => {
                        if dirs.is_empty() {
                            children.push(place);
                        }
                        break;
                    }
                }
            }
            if let Some(&top) = dirs.first() {
                children.push(top);
                subdirs += 1;
                pending.push(dirs);
            }
        }
        let meta = contributors
            .iter()
            .copied()
            .find(|&place| node(place).is_some_and(|n| n.dir_kind() != DirKind::Implicit));
        if let Some(&top) = contributors.first() {
            let dir = MergedDir {
                children: children.into(),
                meta: meta.unwrap_or(top),
                subdirs,
            };
            self.dirs.insert(self.numbers.of_dir(top), dir);
        }
        self.layers = layers;
    }

    /// The layers, bottom first.
    pub fn layers(&self) -> &[Arc<Layer>] {
        &self.layers
    }

    fn node_at(&self, place: Place) -> Option<NodeRef<'_>> {
        at(&self.layers, place)
    }

    /// All inode numbers of the lower are below.
    pub fn end(&self) -> Ino {
        self.numbers.end
    }

    /// Where the entry with this number stands.
    pub fn place(&self, ino: Ino) -> Option<Place> {
        self.numbers.place(ino)
    }

    /// The entry with this number, if there can be one.
    pub fn get(&self, ino: Ino) -> Option<Lower<'_>> {
        let node = self.node_at(self.place(ino)?)?;
        Some(Lower { ino, node })
    }

    fn lower(&self, place: Place) -> Option<Lower<'_>> {
        let node = self.node_at(place)?;
        let ino = if node.kind() == Kind::Dir {
            self.numbers.of_dir(place)
        } else {
            let first = node.links().next().map_or(place.node, NodeRef::index);
            self.numbers.of(place.slot, first)
        };
        Some(Lower { ino, node })
    }

    fn child_place(&self, dir: Ino, name: &[u8]) -> Option<Place> {
        if let Some(merged) = self.dirs.get(&dir) {
            let at = merged.children.binary_search_by(|&place| {
                self.node_at(place).map_or(&[][..], NodeRef::name).cmp(name)
            });
            return merged.children.get(at.ok()?).copied();
        }
        let place = self.place(dir)?;
        let child = self.node_at(place)?.child(name)?;
        (child.kind() != Kind::Whiteout).then_some(Place {
            slot: place.slot,
            node: child.index(),
        })
    }

    /// The entry called `name` in the directory `dir`.
    pub fn lookup(&self, dir: Ino, name: &[u8]) -> Option<Lower<'_>> {
        self.lower(self.child_place(dir, name)?)
    }

    fn place_of_path(&self, path: &[u8]) -> Option<Place> {
        let mut place = self.place(ROOT)?;
        for name in tree::components(path) {
            let dir = self.numbers.of_dir(place);
            place = self.child_place(dir, name)?;
        }
        Some(place)
    }

    /// The entry at a path from the root, without following symlinks.
    pub fn lookup_path(&self, path: &[u8]) -> Option<Lower<'_>> {
        self.lower(self.place_of_path(path)?)
    }

    /// The entries of `dir` from position `from` on: each with its position, its name and itself,
    /// in the order of names. Positions never change.
    pub fn children(
        &self,
        dir: Ino,
        from: usize,
    ) -> impl Iterator<Item = (usize, &[u8], Lower<'_>)> + use<'_> {
        let merged = self.dirs.get(&dir).map(|merged| &*merged.children);
        let alone = self.place(dir).filter(|_| merged.is_none());
        let merged = merged.into_iter().flatten().skip(from).copied();
        let alone = alone.into_iter().flat_map(move |place| {
            let children = self.node_at(place).into_iter().flat_map(NodeRef::children);
            children.skip(from).map(move |child| Place {
                slot: place.slot,
                node: child.index(),
            })
        });
        merged
            .chain(alone)
            .enumerate()
            .filter_map(move |(at, place)| {
                let name = self.node_at(place)?;
                let lower = self.lower(place)?;
                (name.kind() != Kind::Whiteout).then(|| (from + at, name.name(), lower))
            })
    }

    /// Number of directories in the directory `dir`.
    pub fn subdirs(&self, dir: Ino) -> u32 {
        if let Some(merged) = self.dirs.get(&dir) {
            return merged.subdirs;
        }
        let children = self.get(dir).into_iter().flat_map(|l| l.node.children());
        children.filter(|c| c.kind() == Kind::Dir).count() as u32
    }

    /// The node whose metadata holds for this entry.
    pub fn meta(&self, lower: Lower<'_>) -> NodeRef<'_> {
        self.dirs
            .get(&lower.ino)
            .and_then(|merged| self.node_at(merged.meta))
            .or_else(|| self.get(lower.ino).map(|own| own.node))
            .unwrap_or_else(|| self.layers[0].root())
    }

    /// The paths at which a leaf is visible: one, or those of its hardlinks that no layer above
    /// hides.
    pub fn visible_paths(&self, leaf: Lower<'_>) -> Vec<Vec<u8>> {
        let Some(Place { slot, .. }) = self.place(leaf.ino) else {
            return Vec::new();
        };
        if !leaf.node.is_hardlinked() {
            return vec![leaf.node.path()];
        }
        leaf.node
            .links()
            .filter_map(|name| {
                let path = name.path();
                let node = name.index();
                (self.place_of_path(&path) == Some(Place { slot, node })).then_some(path)
            })
            .collect()
    }

    /// The directory in which a directory stands; the root's is the root.
    pub fn parent(&self, dir: Lower<'_>) -> Ino {
        let path = dir.node.parent().path();
        self.lookup_path(&path).map_or(ROOT, |parent| parent.ino)
    }
}

fn at(layers: &[Arc<Layer>], place: Place) -> Option<NodeRef<'_>> {
    layers.get(place.slot as usize)?.node(place.node)
}
