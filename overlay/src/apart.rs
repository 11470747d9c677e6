//! Freezing a build step's filesystem with the parts of [`Aside`](crate::Aside) apart from its
//! result.

use std::sync::Arc;

use iii_store::Ingest;
use iii_store::layer::Kind;
use iii_store::tree::{Content, Dir, DirKind, Meta, Mtime, Node, Tree, components};

use crate::freeze::FreezeError;
use crate::merge::Merged;
use crate::overlay::Overlay;

/// The outcome of [`Overlay::freeze_apart`].
#[derive(Debug)]
pub struct Apart {
    /// The result of the step, on the layers that are not borrowed.
    pub result: Tree,
    /// The changes in each volume, in the order of [`Aside::volumes`], as a tree from the root.
    pub volumes: Vec<Tree>,
}

impl Overlay {
    /// As [`Overlay::freeze`], with the parts of [`Aside`] told apart.
    pub fn freeze_apart(&self, ingest: &Ingest<'_>) -> std::result::Result<Apart, FreezeError> {
        let aside = &self.aside.aside;
        let (mut result, _) = self.freeze(ingest)?;
        let layers = self.lower.layers().iter().enumerate();
        let layers = layers.filter(|(slot, _)| !aside.slots.contains(slot));
        let plain = Merged::new(layers.map(|(_, layer)| Arc::clone(layer)).collect());
        let plain = plain?;
        let mut volumes = Vec::new();
        for path in &aside.volumes {
            let mut volume = Tree::implicit();
            if let Some(Node::Dir(dir)) = cut(&mut result, path, &plain) {
                *volume.dir_at(path)? = dir;
            }
            volumes.push(volume);
        }
        for path in &aside.scratch {
            cut(&mut result, path, &plain);
        }
        for path in &aside.seeds {
            settle(&mut result, path, &plain);
        }
        Ok(Apart { result, volumes })
    }
}

/// Takes the entry at `path` out of a tree, and makes the directories on the way what they are
/// without it.
fn cut(tree: &mut Tree, path: &[u8], plain: &Merged) -> Option<Node> {
    let names: Vec<&[u8]> = components(path).collect();
    cut_at(tree, &names, 0, plain)
}

fn cut_at(dir: &mut Dir, names: &[&[u8]], depth: usize, plain: &Merged) -> Option<Node> {
    let (name, here) = (*names.get(depth)?, names.get(..=depth)?);
    if depth + 1 == names.len() {
        return dir.entries.remove(name);
    }
    let taken = match dir.entries.get_mut(name)? {
        Node::Dir(next) => cut_at(next, names, depth + 1, plain),
        Node::Leaf(_) => None,
    };
    settle_entry(dir, name, &here.join(&b'/'), plain);
    taken
}

/// Makes the marks on the way to a seed, and at its root, say what they are to say of the layers
/// below the result.
fn settle(tree: &mut Tree, path: &[u8], plain: &Merged) {
    let names: Vec<&[u8]> = components(path).collect();
    let mut dir = tree;
    for (depth, name) in names.iter().enumerate() {
        let Some(here) = names.get(..=depth) else {
            return;
        };
        let path = here.join(&b'/');
        if depth + 1 == names.len()
            && let Some(Node::Dir(seed)) = dir.entries.get_mut(name)
        {
            // All of it is written out, so nothing below shows through.
            seed.kind = DirKind::Opaque;
        }
        settle_entry(dir, name, &path, plain);
        match dir.entries.get_mut(name) {
            Some(Node::Dir(next)) => dir = next,
            _ => return,
        }
    }
}

/// An entry on the way to a part was written for a chain that has the part. Without it, a mark may
/// hide nothing, and a directory may say nothing.
fn settle_entry(parent: &mut Dir, name: &[u8], path: &[u8], plain: &Merged) {
    let below = plain.lookup_path(path);
    let is_dir = below.is_some_and(|below| below.node.kind() == Kind::Dir);
    let remove = match parent.entries.get_mut(name) {
        Some(Node::Leaf(leaf)) => leaf.content == Content::Whiteout && below.is_none(),
        Some(Node::Dir(dir)) => {
            if dir.kind == DirKind::Opaque && !is_dir {
                dir.kind = DirKind::Merged;
            }
            let was = match below {
                Some(below) if is_dir => plain.meta(below).meta(),
                // The directory of a borrowed layer, of which nothing is said.
                _ => Meta {
                    mode: 0o755,
                    ..Meta::default()
                },
            };
            let same = dir.kind == DirKind::Implicit
                || (dir.kind == DirKind::Merged && without_mtime(&was) == without_mtime(&dir.meta));
            dir.entries.is_empty() && same
        }
        None => false,
    };
    if remove {
        parent.entries.remove(name);
    }
}

fn without_mtime(meta: &Meta) -> Meta {
    Meta {
        mtime: Mtime::default(),
        ..meta.clone()
    }
}
