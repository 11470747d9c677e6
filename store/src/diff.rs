//! Differences between two layers.

use std::cmp::Ordering;

use crate::layer::{Kind, Layer, NodeRef};
use crate::tree::DirKind;

/// How a path differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ChangeKind {
    /// Only the new layer has it.
    Added,
    /// Only the old layer has it.
    Removed,
    /// Both have it, with another type, mode, owner, contents, target, device number or xattrs.
    Modified,
}

/// One path that differs.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Change {
    /// Relative; empty for the root.
    pub path: Vec<u8>,
    /// How.
    pub kind: ChangeKind,
}

/// The paths that differ from `old` to `new`, each directory before its entries. A directory that
/// came or went is listed with everything in it; one whose entries changed but not itself is not.
/// Equal subtrees are recognised without a walk. mtimes are no difference, nor is which names are
/// hardlinks of one file.
pub fn diff(old: &Layer, new: &Layer) -> Vec<Change> {
    let mut changes = Vec::new();
    if old.tree_id() == new.tree_id() {
        return changes;
    }
    // Entries still to be compared, the next one last. A name that only one layer has stands for
    // all that is in it.
    let mut pairs = vec![(Some(old.root()), Some(new.root()))];
    while let Some((old, new)) = pairs.pop() {
        let kind = match (old, new) {
            (Some(old), Some(new)) if same(old, new) => None,
            (Some(_), Some(_)) => Some(ChangeKind::Modified),
            (Some(_), None) => Some(ChangeKind::Removed),
            (None, _) => Some(ChangeKind::Added),
        };
        if let Some(kind) = kind
            && let Some(node) = new.or(old)
        {
            let path = node.path();
            changes.push(Change { path, kind });
        }
        if let (Some(old), Some(new)) = (old, new)
            && (old.kind(), new.kind()) == (Kind::Dir, Kind::Dir)
            && old.subtree() == new.subtree()
        {
            continue;
        }
        let first = pairs.len();
        let mut olds = old.into_iter().flat_map(NodeRef::children).peekable();
        let mut news = new.into_iter().flat_map(NodeRef::children).peekable();
        loop {
            let order = match (olds.peek(), news.peek()) {
                (None, None) => break,
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (Some(old), Some(new)) => old.name().cmp(new.name()),
            };
            pairs.push(match order {
                Ordering::Less => (olds.next(), None),
                Ordering::Greater => (None, news.next()),
                Ordering::Equal => (olds.next(), news.next()),
            });
        }
        pairs[first..].reverse();
    }
    changes
}

/// Whether two nodes are equal, apart from a directory's entries.
fn same(old: NodeRef<'_>, new: NodeRef<'_>) -> bool {
    if old.kind() != new.kind() || old.kind() == Kind::Whiteout {
        return old.kind() == new.kind();
    }
    let implicit = |node: NodeRef<'_>| node.dir_kind() == DirKind::Implicit;
    old.dir_kind() == new.dir_kind()
        && (implicit(old)
            || (old.mode(), old.uid(), old.gid()) == (new.mode(), new.uid(), new.gid()))
        && old.rdev() == new.rdev()
        && old.target() == new.target()
        && (old.kind() != Kind::File || (old.object(), old.size()) == (new.object(), new.size()))
        && old.xattrs().eq(new.xattrs())
}
