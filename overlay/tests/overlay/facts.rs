//! Facts: the view that a step had of its project.

use std::sync::Arc;

use iii_overlay::fs::{Caller, Errno, Filesystem, Kind, Open, Rename, SetAttr};
use iii_overlay::ino::Ino;
use iii_overlay::{Overlay, OverlayOptions, Project};
use iii_store::facts::{Fact, Seen};
use iii_store::tree::{Content, DirKind, Leaf, Meta, Node, Tree};
use iii_store::{Layer, ObjectId};

use crate::cases::{create, files, ino, read};
use crate::support::{Home, put};

fn tree_of(files: &[(&[u8], &[u8])]) -> Tree {
    let mut tree = Tree::implicit();
    for (path, bytes) in files {
        put(&mut tree, path, bytes);
    }
    tree
}

/// An overlay on `layers`; the layer at `slot` is the project's.
fn observed(home: &Home, layers: &[Arc<Layer>], slot: usize) -> Overlay {
    let options = OverlayOptions {
        project: Some(Project {
            path: b"w".to_vec(),
            slot,
        }),
        observe: true,
        volatile: true,
        ..OverlayOptions::default()
    };
    home.open_at(layers, &home.upper(), options)
}

fn contents(text: &str) -> Seen {
    Seen::Contents {
        object: ObjectId::of(text.as_bytes()),
        exec: false,
    }
}

fn stat(kind: Kind) -> Seen {
    let exec = kind == Kind::Dir;
    Seen::Stat { kind, exec }
}

fn facts_of(facts: &[(&str, Seen)]) -> Vec<Fact> {
    let fact = |(path, seen): &(&str, Seen)| Fact {
        path: path.as_bytes().to_vec(),
        seen: *seen,
    };
    facts.iter().map(fact).collect()
}

#[test]
fn facts_are_what_was_seen_of_the_project() {
    let home = Home::new();
    let base = files(&home, &[(b"w/base", b"base"), (b"etc/x", b"x")]);
    let project = files(
        &home,
        &[
            (b"w/package.json", b"{}"),
            (b"w/src/a", b"a"),
            (b"w/moved/b", b"b"),
        ],
    );
    let overlay = observed(&home, &[base, project.clone()], 1);
    let w = ino(&overlay, b"w");
    read(&overlay, ino(&overlay, b"w/package.json"));
    read(&overlay, ino(&overlay, b"w/base"));
    read(&overlay, ino(&overlay, b"etc/x"));
    assert_eq!(overlay.lookup(w, b"yarn.lock").unwrap_err(), Errno::NOENT);
    overlay
        .readdir(ino(&overlay, b"w/src"), 0, false, &mut |_| true)
        .unwrap();
    let made = overlay
        .mkdir(Caller::default(), w, b"node_modules", 0o755)
        .unwrap()
        .ino;
    let own = create(&overlay, made, b"own");
    overlay.write(own, b"x", 0, true).unwrap();
    read(&overlay, ino(&overlay, b"w/node_modules/own"));
    overlay
        .rename(w, b"moved", made, b"moved", Rename::Replace)
        .unwrap();
    home.frozen(&overlay);
    let facts = overlay.facts();
    let node = |path: &[u8]| project.lookup(path).unwrap();
    let want = facts_of(&[
        ("base", Seen::Absent),
        ("moved", Seen::tree(node(b"w/moved"))),
        ("moved/b", contents("b")),
        ("package.json", contents("{}")),
        ("src", stat(Kind::Dir)),
        ("src", Seen::listing([(&b"a"[..], Kind::File)])),
        ("yarn.lock", Seen::Absent),
    ]);
    assert_eq!(facts, want);
    let root = project.lookup(b"w").unwrap();
    assert_eq!(iii_store::facts::first_mismatch(&facts, root), None);
}

/// The actions of a program at `w`, as the kernel's requests: it looks a name up before it uses it.
type Doing = fn(&Overlay, Ino);

type Case<'a> = (&'a str, Doing, Vec<(&'a str, Seen)>);

/// Each class of system calls leaves the facts that its result depends on, and no others.
#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn facts_of_each_system_call() {
    let home = Home::new();
    let base = files(&home, &[(b"w/base", b"base")]);
    let mut tree = tree_of(&[(b"w/f", b"f"), (b"w/d/g", b"g"), (b"w/e", b"")]);
    let link = Node::Leaf(Leaf {
        meta: Meta::default(),
        content: Content::Symlink {
            target: (*b"f").into(),
        },
        link: None,
    });
    let w = tree.dir_at(b"w").unwrap();
    w.entries.insert((*b"l").into(), link);
    let mut other = w.entries.get(&b"f"[..]).unwrap().clone();
    if let Node::Leaf(leaf) = &mut other {
        leaf.link = Some(1);
        leaf.content = Content::File {
            object: ObjectId::of(b""),
            size: 0,
        };
    }
    w.entries.insert((*b"h1").into(), other.clone());
    w.entries.insert((*b"h2").into(), other);
    let project = home.layer(&tree, &[b"f", b"g", b""]);
    let d = || Seen::listing([(&b"g"[..], Kind::File)]);
    let tree = Seen::tree(project.lookup(b"w/d").unwrap());
    let target = Seen::target(b"f");
    let root = Seen::listing(
        project
            .lookup(b"w")
            .unwrap()
            .children()
            .map(|child| (child.name(), child.kind())),
    );
    let cases: Vec<Case<'_>> = vec![
        (
            "stat of nothing",
            |o, w| assert!(o.lookup(w, b"x").is_err()),
            vec![("x", Seen::Absent)],
        ),
        (
            "stat beside the project",
            |o, w| assert!(o.lookup(w, b"base").is_ok()),
            vec![("base", Seen::Absent)],
        ),
        (
            "stat",
            |o, w| assert!(o.getattr(look(o, w, b"f")).is_ok()),
            vec![("f", contents("f"))],
        ),
        (
            "stat of an empty file",
            |o, w| assert!(look(o, w, b"e") > 0),
            vec![("e", contents(""))],
        ),
        (
            "stat of a directory",
            |o, w| assert!(look(o, w, b"d") > 0),
            vec![("d", stat(Kind::Dir))],
        ),
        (
            "lstat, readlink",
            |o, w| drop(o.readlink(look(o, w, b"l"))),
            vec![("l", target)],
        ),
        (
            "stat of a hardlink",
            |o, w| assert!(look(o, w, b"h2") > 0),
            vec![("h1", contents("")), ("h2", contents(""))],
        ),
        (
            "list",
            |o, w| o.readdir(w, 0, false, &mut |_| true).unwrap(),
            vec![("", root)],
        ),
        (
            "list with attributes",
            |o, w| {
                let d = look(o, w, b"d");
                o.readdir(d, 0, true, &mut |_| true).unwrap();
            },
            vec![("d", stat(Kind::Dir)), ("d", d()), ("d/g", contents("g"))],
        ),
        (
            "read",
            |o, w| drop(read(o, look(o, w, b"f"))),
            vec![("f", contents("f"))],
        ),
        (
            "link",
            |o, w| {
                let f = look(o, w, b"f");
                let _ = o.lookup(w, b"new");
                o.link(f, w, b"new").unwrap();
                // Entries that the step made tell nothing about the project.
                look(o, w, b"new");
            },
            vec![("f", contents("f")), ("new", Seen::Absent)],
        ),
        (
            "rename",
            |o, w| {
                look(o, w, b"f");
                let _ = o.lookup(w, b"new");
                o.rename(w, b"f", w, b"new", Rename::Replace).unwrap();
                look(o, w, b"new");
                let _ = o.lookup(w, b"f");
            },
            vec![("f", contents("f")), ("new", Seen::Absent)],
        ),
        (
            "rename over",
            |o, w| {
                look(o, w, b"f");
                look(o, w, b"e");
                o.rename(w, b"f", w, b"e", Rename::Replace).unwrap();
            },
            vec![("e", contents("")), ("f", contents("f"))],
        ),
        (
            "unlink",
            |o, w| {
                look(o, w, b"f");
                o.unlink(w, b"f").unwrap();
            },
            vec![("f", contents("f"))],
        ),
        (
            "write over",
            |o, w| {
                let f = look(o, w, b"f");
                let open = Open {
                    write: true,
                    truncate: true,
                    ..Open::default()
                };
                o.open(f, open).unwrap();
                o.write(f, b"new", 0, false).unwrap();
                read(o, look(o, w, b"f"));
            },
            vec![("f", contents("f"))],
        ),
        (
            "chmod",
            |o, w| {
                let f = look(o, w, b"f");
                o.setattr(
                    f,
                    &SetAttr {
                        mode: Some(0o755),
                        ..SetAttr::default()
                    },
                )
                .unwrap();
            },
            vec![("f", contents("f"))],
        ),
        (
            "make",
            |o, w| {
                let _ = o.lookup(w, b"new");
                let new = create(o, w, b"new");
                o.write(new, b"x", 0, false).unwrap();
                read(o, look(o, w, b"new"));
            },
            vec![("new", Seen::Absent)],
        ),
        (
            "rename of a directory",
            |o, w| {
                look(o, w, b"d");
                let _ = o.lookup(w, b"new");
                o.rename(w, b"d", w, b"new", Rename::Replace).unwrap();
                let new = look(o, w, b"new");
                look(o, new, b"g");
                let _ = o.lookup(new, b"x");
            },
            vec![
                ("d", stat(Kind::Dir)),
                ("d", tree),
                ("d/g", contents("g")),
                ("d/x", Seen::Absent),
                ("new", Seen::Absent),
            ],
        ),
        (
            "remove a directory",
            |o, w| {
                let d = look(o, w, b"d");
                o.readdir(d, 0, false, &mut |_| true).unwrap();
                look(o, d, b"g");
                o.unlink(d, b"g").unwrap();
                o.rmdir(w, b"d").unwrap();
                let _ = o.lookup(w, b"d");
            },
            vec![("d", stat(Kind::Dir)), ("d", d()), ("d/g", contents("g"))],
        ),
        (
            "rmdir of a full directory",
            |o, w| {
                look(o, w, b"d");
                assert_eq!(o.rmdir(w, b"d"), Err(Errno::NOTEMPTY));
            },
            vec![("d", stat(Kind::Dir)), ("d", d())],
        ),
    ];
    for (what, doing, want) in cases {
        let _ = std::fs::remove_dir_all(home.upper());
        let overlay = observed(&home, &[base.clone(), project.clone()], 1);
        let w = ino(&overlay, b"w");
        // The kernel looked the project's own directory up on the way.
        doing(&overlay, w);
        home.frozen(&overlay);
        assert_eq!(overlay.facts(), facts_of(&want), "{what}");
    }
}

fn look(overlay: &Overlay, dir: Ino, name: &[u8]) -> Ino {
    overlay.lookup(dir, name).unwrap().ino
}

/// Entries that a layer above the project hides or replaces yield no fact: they are in the step's
/// key.
#[test]
fn facts_speak_of_what_no_layer_above_hides() {
    let home = Home::new();
    let project = files(
        &home,
        &[
            (b"w/lock", b"of the project"),
            (b"w/gone", b"x"),
            (b"w/seen", b"seen"),
            (b"w/opaque/a", b"a"),
            (b"w/both/a", b"a"),
        ],
    );
    let mut setup = tree_of(&[
        (b"w/lock", b"of setup"),
        (b"w/own", b"own"),
        (b"w/opaque/b", b"b"),
        (b"w/both/b", b"b"),
    ]);
    let w = setup.dir_at(b"w").unwrap();
    let whiteout = Node::Leaf(Leaf {
        meta: Meta::default(),
        content: Content::Whiteout,
        link: None,
    });
    w.entries.insert((*b"gone").into(), whiteout);
    if let Some(Node::Dir(dir)) = w.entries.get_mut(&b"opaque"[..]) {
        dir.kind = DirKind::Opaque;
    }
    let setup = home.layer(&setup, &[b"of setup", b"own", b"b"]);
    let overlay = observed(&home, &[project, setup], 0);
    let w = ino(&overlay, b"w");
    assert_eq!(read(&overlay, ino(&overlay, b"w/lock")), b"of setup");
    for name in [&b"gone"[..], b"none"] {
        assert_eq!(overlay.lookup(w, name).unwrap_err(), Errno::NOENT);
    }
    for path in [
        &b"w/own"[..],
        b"w/seen",
        b"w/both/a",
        b"w/both/b",
        b"w/opaque/b",
    ] {
        read(&overlay, ino(&overlay, path));
    }
    for dir in [&b"w/both"[..], b"w/opaque"] {
        let dir = ino(&overlay, dir);
        overlay.readdir(dir, 0, false, &mut |_| true).unwrap();
    }
    assert!(overlay.lookup(ino(&overlay, b"w/opaque"), b"a").is_err());
    home.frozen(&overlay);
    let want = facts_of(&[
        ("both", stat(Kind::Dir)),
        ("both", Seen::listing([(&b"a"[..], Kind::File)])),
        ("both/a", contents("a")),
        ("none", Seen::Absent),
        ("seen", contents("seen")),
    ]);
    assert_eq!(overlay.facts(), want);
}
