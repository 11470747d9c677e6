//! Diff and facts.

use iii_store::facts::{facts_id, first_mismatch, sort};
use iii_store::tree::{Content, Dir, DirKind, Leaf, Meta, Mtime, Node, Tree};
use iii_store::{Answers, Change, ChangeKind, Fact, How, Kind, Layer, ObjectId, Seen, diff, layer};
use proptest::prelude::*;

pub fn layer_of(tree: &Tree) -> Layer {
    Layer::from_bytes(layer::encode(tree).unwrap().bytes).unwrap()
}

fn name() -> impl Strategy<Value = Box<[u8]>> {
    prop_oneof![
        prop::sample::select(vec![&b"a"[..], b"b", b"c", b"\xff"]).prop_map(<[u8]>::to_vec),
        prop::collection::vec(1_u8..47, 1..4),
    ]
    .prop_filter("a name", |name| iii_store::tree::check_name(name).is_ok())
    .prop_map(Into::into)
}

fn meta() -> impl Strategy<Value = Meta> {
    let xattrs = prop::collection::btree_map(
        prop::collection::vec(1_u8..255, 1..3).prop_map(Into::into),
        prop::collection::vec(any::<u8>(), 0..3).prop_map(Into::into),
        0..2,
    );
    (0_u16..0o10000, 0_u32..2, 0_i64..2, xattrs).prop_map(|(mode, uid, sec, xattrs)| Meta {
        mode,
        uid,
        gid: uid,
        mtime: Mtime { sec, nsec: 5 },
        xattrs,
    })
}

fn leaf() -> impl Strategy<Value = Node> {
    let content = prop_oneof![
        4 => (0_u8..3).prop_map(|n| Content::File { object: ObjectId::of(&[n]), size: 1 }),
        1 => (0_u8..3).prop_map(|n| Content::Symlink { target: [b'x', n + 1].into() }),
        1 => Just(Content::Fifo),
        1 => Just(Content::Whiteout),
    ];
    (meta(), content).prop_map(|(meta, content)| {
        Node::Leaf(Leaf {
            meta,
            content,
            link: None,
        })
    })
}

fn node() -> impl Strategy<Value = Node> {
    leaf().prop_recursive(4, 40, 6, |inner| {
        let kind = prop::sample::select(vec![DirKind::Merged, DirKind::Opaque, DirKind::Implicit]);
        let entries = prop::collection::btree_map(name(), inner, 0..6);
        (meta(), kind, entries).prop_map(|(meta, kind, entries)| {
            Node::Dir(Dir {
                meta,
                kind,
                entries: entries.into_iter().collect(),
            })
        })
    })
}

pub fn tree() -> impl Strategy<Value = Tree> {
    (meta(), prop::collection::btree_map(name(), node(), 0..6)).prop_map(|(meta, entries)| Dir {
        meta,
        kind: DirKind::Merged,
        entries: entries.into_iter().collect(),
    })
}

/// Applies `change` to `tree`, with `new` as the source of new nodes.
fn apply(tree: &mut Tree, change: &Change, new: &Tree) {
    let Some(cut) = change
        .path
        .iter()
        .rposition(|&byte| byte == b'/')
        .map(|cut| cut + 1)
        .or(Some(0))
    else {
        return;
    };
    if change.path.is_empty() {
        tree.meta = new.meta.clone();
        tree.kind = new.kind;
        return;
    }
    let (dir, name) = change.path.split_at(cut);
    let Ok(dir) = tree.dir_at(dir) else {
        panic!("{change:?} in something that is not a directory");
    };
    if change.kind == ChangeKind::Removed {
        // The entries of a directory are removed with it, and are listed after it.
        dir.entries.remove(name);
        return;
    }
    match (new.get(&change.path).unwrap(), dir.entries.get_mut(name)) {
        (Node::Dir(new), Some(Node::Dir(old))) => {
            old.meta = new.meta.clone();
            old.kind = new.kind;
        }
        (Node::Dir(new), _) => {
            let bare = Dir {
                entries: iii_store::tree::Entries::default(),
                ..new.clone()
            };
            dir.entries.insert(name.into(), Node::Dir(bare));
        }
        (new, _) => {
            dir.entries.insert(name.into(), new.clone());
        }
    }
}

/// The removed paths first, the deepest first, so that no step makes a directory on its way.
fn in_order(mut changes: Vec<Change>) -> Vec<Change> {
    let (mut removed, others): (Vec<_>, Vec<_>) = changes
        .drain(..)
        .partition(|change| change.kind == ChangeKind::Removed);
    removed.reverse();
    removed.extend(others);
    removed
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn decoding_undoes_encoding(tree in tree()) {
        let encoded = layer::encode(&tree).unwrap();
        let layer = Layer::from_bytes(encoded.bytes.clone()).unwrap();
        prop_assert_eq!(layer::encode(&layer.to_tree()).unwrap().bytes, encoded.bytes);
    }

    #[test]
    fn a_diff_applied_to_the_old_gives_the_new(old in tree(), new in tree()) {
        let (old_layer, new_layer) = (layer_of(&old), layer_of(&new));
        let changes = diff(&old_layer, &new_layer);
        let mut paths: Vec<_> = changes.iter().map(|change| &change.path).collect();
        paths.sort();
        paths.dedup();
        prop_assert_eq!(paths.len(), changes.len());
        let mut patched = old.clone();
        for change in in_order(changes) {
            apply(&mut patched, &change, &new);
        }
        let patched = layer_of(&patched);
        prop_assert_eq!(patched.tree_id(), new_layer.tree_id());
        prop_assert_eq!(diff(&patched, &new_layer), vec![]);
        prop_assert_eq!(diff(&new_layer, &new_layer), vec![]);
    }

    /// A fact recorded of a tree is true of it; of another tree exactly if the same would be
    /// recorded there.
    #[test]
    fn facts_are_true_of_what_they_were_seen_in(old in tree(), new in tree()) {
        let (old, new) = (layer_of(&old), layer_of(&new));
        let ways = [How::Exists, How::Listing, How::Contents, How::Target, How::Tree];
        let mut facts: Vec<Fact> = Vec::new();
        let mut nodes = vec![old.root()];
        while let Some(node) = nodes.pop() {
            nodes.extend(node.children());
            facts.extend(ways.iter().map(|way| Fact { path: node.path(), seen: way.at(Some(node)) }));
        }
        facts.push(Fact { path: b"a/none/here".to_vec(), seen: Seen::Absent });
        prop_assert_eq!(first_mismatch(&facts, old.root()), None);
        let mismatch = facts.iter().find(|fact| fact.seen.how().at(new.lookup(&fact.path)) != fact.seen);
        prop_assert_eq!(first_mismatch(&facts, new.root()), mismatch);
        let same = mismatch.is_none();
        // The digest of the answers agrees.
        sort(&mut facts);
        let looks: Vec<_> = facts.iter().map(Fact::look).collect();
        for (layer, holds) in [(&old, true), (&new, same)] {
            let found = Answers::new(layer.root()).facts_id(&looks);
            prop_assert_eq!(found == facts_id(&facts), holds);
        }
    }
}

fn file(text: &str, mode: u16) -> Node {
    Node::Leaf(Leaf {
        meta: Meta {
            mode,
            ..Meta::default()
        },
        content: Content::File {
            object: ObjectId::of(text.as_bytes()),
            size: text.len() as u64,
        },
        link: None,
    })
}

#[test]
fn what_a_diff_lists() {
    let mut old = Tree::default();
    let mut new = Tree::default();
    for tree in [&mut old, &mut new] {
        tree.dir_at(b"same/deep")
            .unwrap()
            .entries
            .insert((*b"f").into(), file("f", 0o644));
    }
    old.dir_at(b"gone/deep").unwrap();
    old.entries.insert((*b"mode").into(), file("x", 0o644));
    new.entries.insert((*b"mode").into(), file("x", 0o755));
    old.dir_at(b"turned")
        .unwrap()
        .entries
        .insert((*b"in").into(), file("x", 0o644));
    new.entries.insert((*b"turned").into(), file("x", 0o644));
    new.dir_at(b"same/new").unwrap();
    let list: Vec<_> = diff(&layer_of(&old), &layer_of(&new))
        .into_iter()
        .map(|change| {
            format!(
                "{:?} {}",
                change.kind,
                String::from_utf8(change.path).unwrap()
            )
        })
        .collect();
    assert_eq!(
        list,
        [
            "Removed gone",
            "Removed gone/deep",
            "Modified mode",
            "Added same/new",
            "Modified turned",
            "Removed turned/in",
        ]
    );
}

#[test]
fn what_makes_a_fact_untrue() {
    let mut tree = Tree::default();
    let at = tree.dir_at(b"workspace").unwrap();
    at.entries
        .insert((*b"package.json").into(), file("{}", 0o644));
    at.dir_at(b"src")
        .unwrap()
        .entries
        .insert((*b"main.ts").into(), file("x", 0o644));
    let link = Node::Leaf(Leaf {
        meta: Meta::default(),
        content: Content::Symlink {
            target: (*b"src").into(),
        },
        link: None,
    });
    at.entries.insert((*b"link").into(), link);
    let layer = layer_of(&tree);
    let project = layer.lookup(b"workspace").unwrap();
    let contents = |text: &[u8]| Seen::Contents {
        object: ObjectId::of(text),
        exec: false,
    };
    for (path, seen, holds) in [
        ("package.json", contents(b"{}"), true),
        ("package.json", contents(b"{ }"), false),
        (
            "package.json",
            Seen::Stat {
                kind: Kind::File,
                exec: false,
            },
            true,
        ),
        (
            "package.json",
            Seen::Stat {
                kind: Kind::File,
                exec: true,
            },
            false,
        ),
        ("package.json", Seen::Absent, false),
        ("package.json/x", Seen::Absent, true),
        ("yarn.lock", Seen::Absent, true),
        ("yarn.lock", contents(b""), false),
        ("src", Seen::listing([(&b"main.ts"[..], Kind::File)]), true),
        (
            "src",
            Seen::listing([(&b"main.ts"[..], Kind::Symlink)]),
            false,
        ),
        ("src", Seen::listing([]), false),
        ("src", contents(b""), false),
        ("link", Seen::target(b"src"), true),
        ("link", Seen::target(b"lib"), false),
        ("link/main.ts", Seen::Absent, true),
        (
            "",
            Seen::Stat {
                kind: Kind::Dir,
                exec: true,
            },
            true,
        ),
    ] {
        let facts = [Fact {
            path: path.into(),
            seen,
        }];
        assert_eq!(
            first_mismatch(&facts, project).is_none(),
            holds,
            "{path} {seen:?}"
        );
    }
}
