//! What differs between two layers.

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

/// The paths that differ from `old` to `new`, each directory before what is in it. A directory that came or went is listed
/// with everything in it; one whose entries changed but not itself is not. Equal subtrees are recognised without a walk.
/// mtimes are no difference, nor is which names are hardlinks of one file.
pub fn diff(old: &Layer, new: &Layer) -> Vec<Change> {
    let mut changes = Vec::new();
    if old.tree_id() != new.tree_id() {
        pair(old.root(), new.root(), &mut changes);
    }
    changes
}

fn pair(old: NodeRef<'_>, new: NodeRef<'_>, changes: &mut Vec<Change>) {
    if !same(old, new) {
        push(new, ChangeKind::Modified, changes);
    }
    let dirs = (old.kind() == Kind::Dir, new.kind() == Kind::Dir);
    if dirs == (true, true) && old.subtree() == new.subtree() {
        return;
    }
    let (mut olds, mut news) = (old.children().peekable(), new.children().peekable());
    loop {
        let order = match (olds.peek(), news.peek()) {
            (None, None) => return,
            (Some(_), None) => std::cmp::Ordering::Less,
            (None, Some(_)) => std::cmp::Ordering::Greater,
            (Some(old), Some(new)) => old.name().cmp(new.name()),
        };
        if order.is_lt() {
            olds.next()
                .into_iter()
                .for_each(|node| all(node, ChangeKind::Removed, changes));
        } else if order.is_gt() {
            news.next()
                .into_iter()
                .for_each(|node| all(node, ChangeKind::Added, changes));
        } else if let (Some(old), Some(new)) = (olds.next(), news.next()) {
            pair(old, new, changes);
        }
    }
}

fn push(node: NodeRef<'_>, kind: ChangeKind, changes: &mut Vec<Change>) {
    let path = node.path();
    changes.push(Change { path, kind });
}

/// The node and everything in it.
fn all(node: NodeRef<'_>, kind: ChangeKind, changes: &mut Vec<Change>) {
    push(node, kind, changes);
    for child in node.children() {
        all(child, kind, changes);
    }
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
