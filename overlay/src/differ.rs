//! Differences between two chains of layers, as a sandbox on them sees them.
//!
//! The walk visits both chains at once, a directory at a time, and enters a directory only where
//! the layers that contribute to it differ: a directory that equal trees make up in the same order
//! is equal. The cost is that of the layers that differ, and of the directories that they share
//! with the others.

use std::sync::Arc;

use iii_store::layer::{Kind, Layer, NodeRef};
use iii_store::tree::DirKind;
use iii_store::{Change, ChangeKind};

/// An entry of a merged view.
enum Entry<'a> {
    /// Any entry but a directory.
    Leaf(NodeRef<'a>),
    /// The directories that merge into one, the topmost first.
    Dir(Vec<NodeRef<'a>>),
}

/// The paths that differ from `old` to `new`, both chains with the bottom layer first; each
/// directory comes before its entries. An added or removed directory is listed with everything in
/// it. A different mtime is no change, nor is a different set of names that are hardlinks of one
/// file.
pub(crate) fn differ(old: &[Arc<Layer>], new: &[Arc<Layer>]) -> Vec<Change> {
    let mut changes = Vec::new();
    let mut pending = vec![(Vec::new(), Some(root(old)), Some(root(new)))];
    while let Some((path, old, new)) = pending.pop() {
        let kind = match (&old, &new) {
            (None, None) => continue,
            (Some(_), None) => Some(ChangeKind::Removed),
            (None, Some(_)) => Some(ChangeKind::Added),
            (Some(old), Some(new)) => (!same(old, new)).then_some(ChangeKind::Modified),
        };
        let equal = match (&old, &new) {
            (Some(Entry::Dir(old)), Some(Entry::Dir(new))) => {
                let ids = |dirs: &[NodeRef<'_>]| -> Vec<_> {
                    dirs.iter()
                        .map(|dir| (dir.subtree(), dir.dir_kind()))
                        .collect()
                };
                ids(old) == ids(new)
            }
            _ => false,
        };
        if !equal {
            // The walk takes the last pending path next.
            let first = pending.len();
            for (name, old, new) in pairs(old, new) {
                let path = if path.is_empty() {
                    name.to_vec()
                } else {
                    [&path, &b"/"[..], name].concat()
                };
                pending.push((path, old, new));
            }
            pending[first..].reverse();
        }
        changes.extend(kind.map(|kind| Change { path, kind }));
    }
    changes
}

fn root(layers: &[Arc<Layer>]) -> Entry<'_> {
    let mut dirs = Vec::new();
    for layer in layers.iter().rev() {
        dirs.push(layer.root());
        if layer.root().dir_kind() == DirKind::Opaque {
            break;
        }
    }
    Entry::Dir(dirs)
}

/// The entries of the directories that merge into one, sorted by name.
fn children(entry: Option<Entry<'_>>) -> Vec<(&[u8], Entry<'_>)> {
    let Some(Entry::Dir(dirs)) = entry else {
        return Vec::new();
    };
    let mut nodes: Vec<(&[u8], usize, NodeRef<'_>)> = Vec::new();
    for (rank, dir) in dirs.into_iter().enumerate() {
        nodes.extend(dir.children().map(|child| (child.name(), rank, child)));
    }
    nodes.sort_unstable_by(|a, b| (a.0, a.1).cmp(&(b.0, b.1)));
    let mut entries = Vec::new();
    for group in nodes.chunk_by(|a, b| a.0 == b.0) {
        let mut dirs = Vec::new();
        let mut leaf = None;
        for &(_, _, node) in group {
            match node.kind() {
                Kind::Whiteout => break,
                Kind::Dir => {
                    dirs.push(node);
                    if node.dir_kind() == DirKind::Opaque {
                        break;
                    }
                }
                _ => {
                    leaf = dirs.is_empty().then_some(node);
                    break;
                }
            }
        }
        let entry = match leaf {
            Some(leaf) => Entry::Leaf(leaf),
            None if dirs.is_empty() => continue,
            None => Entry::Dir(dirs),
        };
        if let Some(&(name, ..)) = group.first() {
            entries.push((name, entry));
        }
    }
    entries
}

type Pair<'a> = (&'a [u8], Option<Entry<'a>>, Option<Entry<'a>>);

/// The entries of two directories, paired by name. An entry that is no directory has none.
fn pairs<'a>(old: Option<Entry<'a>>, new: Option<Entry<'a>>) -> Vec<Pair<'a>> {
    let mut olds = children(old).into_iter().peekable();
    let mut news = children(new).into_iter().peekable();
    let mut pairs = Vec::new();
    loop {
        let order = match (olds.peek(), news.peek()) {
            (None, None) => return pairs,
            (Some(_), None) => std::cmp::Ordering::Less,
            (None, Some(_)) => std::cmp::Ordering::Greater,
            (Some((old, _)), Some((new, _))) => old.cmp(new),
        };
        let old = order.is_le().then(|| olds.next()).flatten();
        let new = order.is_ge().then(|| news.next()).flatten();
        let name = old.as_ref().or(new.as_ref()).map(|(name, _)| *name);
        if let Some(name) = name {
            pairs.push((
                name,
                old.map(|(_, entry)| entry),
                new.map(|(_, entry)| entry),
            ));
        }
    }
}

/// The node that provides the metadata of the entry.
fn meta<'a>(entry: &Entry<'a>) -> Option<NodeRef<'a>> {
    match entry {
        Entry::Leaf(node) => Some(*node),
        Entry::Dir(dirs) => {
            let explicit = |dir: &&NodeRef<'_>| dir.dir_kind() != DirKind::Implicit;
            dirs.iter().find(explicit).or(dirs.first()).copied()
        }
    }
}

/// Whether two entries are equal, apart from the entries of a directory.
fn same(old: &Entry<'_>, new: &Entry<'_>) -> bool {
    let (Some(old), Some(new)) = (meta(old), meta(new)) else {
        return false;
    };
    let known = |node: NodeRef<'_>| (node.mode(), node.uid(), node.gid());
    old.kind() == new.kind()
        && known(old) == known(new)
        && old.rdev() == new.rdev()
        && old.target() == new.target()
        && (old.kind() != Kind::File || (old.object(), old.size()) == (new.object(), new.size()))
        && old.xattrs().eq(new.xattrs())
}

#[cfg(test)]
mod tests {
    use iii_store::ObjectId;
    use iii_store::layer::encode;
    use iii_store::tree::{Content, Leaf, Meta, Node, Tree};

    use super::*;

    /// A layer of files with these contents; an empty text is a whiteout.
    fn layer(files: &[(&str, &str)]) -> Arc<Layer> {
        let mut tree = Tree::implicit();
        for (path, text) in files {
            let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
            let content = if text.is_empty() {
                Content::Whiteout
            } else {
                Content::File {
                    object: ObjectId::of(text.as_bytes()),
                    size: text.len() as u64,
                }
            };
            let leaf = Leaf {
                meta: Meta::default(),
                content,
                link: None,
            };
            let dir = tree.dir_at(dir.as_bytes()).unwrap();
            dir.entries.insert(name.as_bytes().into(), Node::Leaf(leaf));
        }
        Arc::new(Layer::from_bytes(encode(&tree).unwrap().bytes).unwrap())
    }

    fn changes(old: &[&Arc<Layer>], new: &[&Arc<Layer>]) -> String {
        let chain = |layers: &[&Arc<Layer>]| -> Vec<_> {
            layers.iter().map(|layer| Arc::clone(layer)).collect()
        };
        let changes = differ(&chain(old), &chain(new));
        let shown = changes.iter().map(|change| {
            let sign = match change.kind {
                ChangeKind::Added => '+',
                ChangeKind::Removed => '-',
                ChangeKind::Modified => '~',
            };
            format!("{sign}{}", String::from_utf8_lossy(&change.path))
        });
        shown.collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn chains_differ_where_the_merged_views_do() {
        let base = layer(&[("etc/a", "1"), ("etc/b", "1"), ("bin/sh", "1")]);
        let next = layer(&[
            ("etc/a", "1"),
            ("etc/b", "2"),
            ("bin/sh", "1"),
            ("lib/c", "1"),
        ]);
        let top = layer(&[("etc/a", "top"), ("etc/b", ""), ("w/x", "1")]);
        let other = layer(&[("etc/a", "top"), ("w/x", "2"), ("w/y/z", "1")]);
        for (old, new, want) in [
            (&[&base][..], &[&base][..], ""),
            (&[&base], &[&next], "~etc/b +lib +lib/c"),
            (&[&next], &[&base], "~etc/b -lib -lib/c"),
            // An entry that a layer above hides or replaces in both makes no difference.
            (&[&base, &top], &[&next, &top], "+lib +lib/c"),
            (&[&base, &top], &[&base, &other], "+etc/b ~w/x +w/y +w/y/z"),
            // The same layers in another order.
            (&[&base, &top], &[&top, &base], "~etc/a +etc/b"),
            (&[], &[&top], "~ +etc +etc/a +w +w/x"),
        ] {
            assert_eq!(changes(old, new), want);
        }
    }

    #[test]
    fn a_file_in_the_place_of_a_directory() {
        let dir = layer(&[("a/b/c", "1")]);
        let file = layer(&[("a/b", "1")]);
        assert_eq!(changes(&[&dir], &[&file]), "~a/b -a/b/c");
        assert_eq!(changes(&[&file], &[&dir]), "~a/b +a/b/c");
        // The directories above a file merge without it.
        assert_eq!(changes(&[&dir], &[&file, &dir]), "");
    }
}
