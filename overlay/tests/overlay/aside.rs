//! Volumes, scratch and seeds: the parts that are cut off a step's result, and the edges of a
//! volume.

use std::sync::Arc;

use iii_overlay::fs::{Caller, Errno, Filesystem, Rename, SetAttr, Special};
use iii_overlay::ino::{Ino, ROOT};
use iii_overlay::{Aside, Overlay, OverlayOptions, Project};
use iii_store::layer::encode;
use iii_store::tree::{Content, Dir, DirKind, Node, Tree, components};
use iii_store::{Layer, ObjectId};

use crate::support::{Home, put};

const CACHE: &str = "root/.npm/_cacache";
const SEED: &str = "w/target";

/// Runs the operations of a step, one a word: `mkdir:PATH`, `write:PATH=TEXT`, `rm:PATH`,
/// `chmod:PATH`.
fn run(fs: &Overlay, script: &str) {
    for word in script.split_whitespace() {
        let (what, path) = word.split_once(':').unwrap();
        let (path, text) = path.split_once('=').unwrap_or((path, ""));
        let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
        let dir = ino(fs, dir);
        let name = name.as_bytes();
        match what {
            "mkdir" => drop(fs.mkdir(Caller::default(), dir, name, 0o755).unwrap()),
            "write" => {
                let file = fs.lookup(dir, name).map(|attr| attr.ino);
                let file = file.unwrap_or_else(|_| create(fs, dir, name));
                fs.setattr(
                    file,
                    &SetAttr {
                        size: Some(0),
                        ..SetAttr::default()
                    },
                )
                .unwrap();
                fs.write(file, text.as_bytes(), 0, false).unwrap();
            }
            "rm" => remove(fs, dir, name),
            "chmod" => {
                let mode = SetAttr {
                    mode: Some(0o700),
                    ..SetAttr::default()
                };
                fs.setattr(fs.lookup(dir, name).unwrap().ino, &mode)
                    .unwrap();
            }
            _ => panic!("{word}"),
        }
    }
}

fn remove(fs: &Overlay, dir: Ino, name: &[u8]) {
    if fs.unlink(dir, name) != Err(Errno::ISDIR) {
        return;
    }
    let own = fs.lookup(dir, name).unwrap().ino;
    let mut names = Vec::new();
    fs.readdir(own, 0, false, &mut |entry| {
        if entry.name != b"." && entry.name != b".." {
            names.push(entry.name.to_vec());
        }
        true
    })
    .unwrap();
    for child in names {
        remove(fs, own, &child);
    }
    fs.rmdir(dir, name).unwrap();
}

fn ino(fs: &Overlay, path: &str) -> Ino {
    components(path.as_bytes())
        .try_fold(ROOT, |dir, name| fs.lookup(dir, name).map(|attr| attr.ino))
        .unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn create(fs: &Overlay, dir: Ino, name: &[u8]) -> Ino {
    fs.mknod(Caller::default(), dir, name, 0o644, Special::File)
        .unwrap()
        .ino
}

/// Shows a tree: `d` for a directory, `i` for an implicit one, `o` for an opaque one, `w` for a
/// whiteout, or else the start of a file's id.
fn text(tree: &Dir) -> String {
    fn add(dir: &Dir, path: &str, lines: &mut Vec<String>) {
        for (name, node) in dir.entries.iter() {
            let path = format!("{path}/{}", String::from_utf8_lossy(name));
            match node {
                Node::Dir(dir) => {
                    let mark = match dir.kind {
                        DirKind::Merged => "d",
                        DirKind::Opaque => "o",
                        DirKind::Implicit => "i",
                    };
                    lines.push(format!("{mark}{path}"));
                    add(dir, &path, lines);
                }
                Node::Leaf(leaf) => lines.push(match leaf.content {
                    Content::Whiteout => format!("w{path}"),
                    Content::File { object, .. } => {
                        let known = ["old", "new", "kept", "x", ""];
                        let text = known.iter().find(|t| ObjectId::of(t.as_bytes()) == object);
                        format!("{path}={}", text.unwrap())
                    }
                    _ => format!("?{path}"),
                }),
            }
        }
    }
    let mut lines = Vec::new();
    add(tree, "", &mut lines);
    lines.join(" ")
}

fn files(home: &Home, list: &[&str]) -> Arc<Layer> {
    let mut tree = Tree::implicit();
    let mut contents = Vec::new();
    for path in list {
        if let Some(dir) = path.strip_suffix('/') {
            tree.dir_at(dir.as_bytes()).unwrap();
            continue;
        }
        let (path, text) = path.split_once('=').unwrap();
        put(&mut tree, path.as_bytes(), text.as_bytes());
        contents.push(text.as_bytes());
    }
    home.layer(&tree, &contents)
}

struct Step {
    home: Home,
    overlay: Overlay,
}

impl Step {
    /// A step on `base` that sees `cache` in its volume and `seed` in its seed.
    fn new(base: &[&str], cache: &[&str], seed: &[&str]) -> Self {
        let home = Home::new();
        let skeleton = format!("{CACHE}/");
        let layers = [
            files(&home, base),
            files(&home, &[&skeleton]),
            files(&home, cache),
            files(&home, seed),
        ];
        let seeds = if seed.is_empty() {
            vec![]
        } else {
            vec![SEED.into()]
        };
        let options = OverlayOptions {
            project: Some(Project {
                path: b"w".to_vec(),
                slot: 0,
            }),
            observe: true,
            aside: Aside {
                slots: vec![1, 2, 3],
                volumes: vec![CACHE.into()],
                scratch: vec![b"var/scratch".to_vec(), b"var/scratch.bin".to_vec()],
                seeds,
            },
            volatile: true,
        };
        let overlay = home.open_at(&layers, &home.upper(), options);
        Self { home, overlay }
    }

    fn frozen(&self) -> (Tree, Tree) {
        let ingest = self.home.store.ingest(&self.home.lease).unwrap();
        let mut apart = self.overlay.freeze_apart(&ingest).unwrap();
        ingest.finish(&Tree::implicit()).unwrap();
        assert_eq!(apart.volumes.len(), 1);
        (apart.result, apart.volumes.remove(0))
    }
}

#[test]
fn the_result_says_nothing_of_a_volume() {
    let volume = "i/root i/root/.npm i/root/.npm/_cacache";
    for (base, cache, script, result, added) in [
        (&["etc/a=x"][..], &[][..], "", "", ""),
        (
            &["etc/a=x"],
            &[],
            "write:root/.npm/_cacache/n=new write:etc/b=new",
            "d/etc /etc/b=new",
            "d/root/.npm/_cacache /root/.npm/_cacache/n=new",
        ),
        // A deletion in the volume is one in the step's view only.
        (
            &[],
            &["root/.npm/_cacache/o=old"],
            "rm:root/.npm/_cacache/o",
            "",
            "d/root/.npm/_cacache w/root/.npm/_cacache/o",
        ),
        // The cache is removed with its parent, which has no other entry.
        (&[], &["root/.npm/_cacache/o=old"], "rm:root/.npm", "", ""),
        (
            &["root/.npm/rc=kept"],
            &["root/.npm/_cacache/o=old"],
            "rm:root/.npm",
            "d/root w/root/.npm",
            "",
        ),
        // A new directory hides the entries of the base, and is no change where the base has none.
        (
            &[],
            &["root/.npm/_cacache/o=old"],
            "rm:root/.npm mkdir:root/.npm mkdir:root/.npm/_cacache write:root/.npm/_cacache/n=new write:root/.npm/l=new",
            "d/root d/root/.npm /root/.npm/l=new",
            "d/root/.npm/_cacache /root/.npm/_cacache/n=new",
        ),
        (
            &["root/.npm/rc=kept"],
            &[],
            "rm:root/.npm mkdir:root/.npm mkdir:root/.npm/_cacache write:root/.npm/_cacache/n=new",
            "d/root o/root/.npm",
            "d/root/.npm/_cacache /root/.npm/_cacache/n=new",
        ),
        // The step adds and removes an entry beside the volume.
        (
            &[],
            &[],
            "write:root/.npm/log=x rm:root/.npm/log write:root/.npm/_cacache/n=new",
            "",
            "d/root/.npm/_cacache /root/.npm/_cacache/n=new",
        ),
        (&[], &[], "chmod:root/.npm", "i/root d/root/.npm", ""),
        (
            &["var/kept=kept"],
            &[],
            "mkdir:var/scratch write:var/scratch/n=new write:var/scratch.bin=new",
            "",
            "",
        ),
    ] {
        let step = Step::new(base, cache, &[]);
        run(&step.overlay, script);
        let (tree, changes) = step.frozen();
        assert_eq!(text(&tree), result, "{script}");
        let seen = text(&changes);
        let seen = seen.strip_prefix(volume).unwrap_or(&seen).trim();
        let seen = seen.strip_prefix("i/root i/root/.npm ").unwrap_or(seen);
        assert_eq!(seen, added, "{script}");
    }
}

/// A cache may disappear at any time without a change of any result.
#[test]
fn the_result_is_the_same_with_a_cold_and_a_warm_cache() {
    let scripts = [
        "write:root/.npm/_cacache/n=new write:w/out=new",
        "mkdir:root/.npm/_cacache/d write:root/.npm/_cacache/d/n=new chmod:root/.npm",
        "write:root/.npm/log=x rm:root/.npm/log rm:root/.npm/_cacache",
        "rm:root/.npm",
        "rm:root/.npm mkdir:root/.npm write:root/.npm/x=x",
    ];
    for script in scripts {
        let id = |cache: &[&str]| {
            let step = Step::new(&["w/a=x", "root/rc=x"], cache, &[]);
            run(&step.overlay, script);
            encode(&step.frozen().0).unwrap().tree_id
        };
        let warm = ["root/.npm/_cacache/o=old", "root/.npm/_cacache/e/f=old"];
        assert_eq!(id(&[]), id(&warm), "{script}");
    }
}

#[test]
fn scratch_is_not_even_stored() {
    let step = Step::new(&["var/kept=kept"], &[], &[]);
    run(
        &step.overlay,
        "write:var/scratch.bin=dropped-bytes write:var/other=stored-bytes",
    );
    step.frozen();
    let has = |text: &str| step.home.store.contains(&ObjectId::of(text.as_bytes()));
    assert!(has("stored-bytes"));
    assert!(!has("dropped-bytes"));
}

#[test]
fn a_seed_is_in_the_result_as_a_whole() {
    let seed = ["w/target/a=old", "w/target/d/b=old"];
    for (base, script, result) in [
        (
            &["w/main=x"][..],
            "",
            "i/w d/w/target /w/target/a=old d/w/target/d /w/target/d/b=old",
        ),
        (
            &["w/main=x"],
            "write:w/target/a=new rm:w/target/d/b write:w/target/d/c=new",
            "i/w d/w/target /w/target/a=new d/w/target/d /w/target/d/c=new",
        ),
        (&["w/main=x"], "rm:w/target", "d/w"),
        (
            &["w/main=x"],
            "rm:w/target mkdir:w/target write:w/target/n=new",
            "d/w d/w/target /w/target/n=new",
        ),
        (
            &["w/main=x", "w/target/below=kept"],
            "rm:w/target/below",
            "i/w o/w/target /w/target/a=old d/w/target/d /w/target/d/b=old",
        ),
        (&["w/target/below=kept"], "rm:w/target", "d/w w/w/target"),
    ] {
        let step = Step::new(base, &[], &seed);
        run(&step.overlay, script);
        assert_eq!(text(&step.frozen().0), result, "{script}");
        // It replaces anything that the project might have there.
        let facts = step.overlay.facts();
        let inside = |path: &[u8]| path.starts_with(b"target/") && path != b"target/below";
        assert!(!facts.iter().any(|fact| inside(&fact.path)), "{facts:?}");
    }
}

#[test]
fn a_volume_ends_at_its_root() {
    let step = Step::new(
        &["w/mine=x"],
        &["root/.npm/_cacache/o=old", "root/.npm/_cacache/d/p=old"],
        &[],
    );
    let fs = &step.overlay;
    let (cache, below) = (ino(fs, CACHE), ino(fs, "root/.npm/_cacache/d"));
    let (w, npm) = (ino(fs, "w"), ino(fs, "root/.npm"));
    run(fs, "write:root/.npm/_cacache/n=new");
    let rename =
        |from, name: &[u8], to, new: &[u8]| fs.rename(from, name, to, new, Rename::Replace);
    for (from, name) in [
        (cache, &b"o"[..]),
        (cache, b"n"),
        (below, b"p"),
        (cache, b"d"),
    ] {
        assert_eq!(rename(from, name, w, b"out"), Err(Errno::XDEV));
        assert_eq!(rename(from, name, npm, b"out"), Err(Errno::XDEV));
    }
    assert_eq!(rename(w, b"mine", cache, b"in"), Err(Errno::XDEV));
    assert_eq!(
        fs.rename(w, b"mine", cache, b"o", Rename::Exchange),
        Err(Errno::XDEV)
    );
    for (file, dir) in [
        ("root/.npm/_cacache/o", w),
        ("root/.npm/_cacache/n", w),
        ("root/.npm/_cacache/d/p", npm),
        ("w/mine", cache),
    ] {
        let linked = fs.link(ino(fs, file), dir, b"link").map(|attr| attr.nlink);
        assert_eq!(linked, Err(Errno::XDEV), "{file}");
    }
    let (root, home) = (ino(fs, ""), ino(fs, "root"));
    assert_eq!(rename(npm, b"_cacache", npm, b"other"), Err(Errno::BUSY));
    assert_eq!(rename(home, b".npm", home, b"other"), Err(Errno::BUSY));
    assert_eq!(rename(root, b"root", root, b"other"), Err(Errno::BUSY));
    // Inside the volume, the rules of any directory hold.
    rename(cache, b"n", below, b"n").unwrap();
    rename(cache, b"o", below, b"q").unwrap();
    rename(cache, b"d", cache, b"e").unwrap();
    for file in ["root/.npm/_cacache/e/n", "root/.npm/_cacache/e/q"] {
        fs.link(
            ino(fs, file),
            cache,
            file.rsplit('/').next().unwrap().as_bytes(),
        )
        .unwrap();
    }
    // A file without a name may get its first name on either side, and stays on that side.
    for (dir, other) in [(cache, w), (w, cache)] {
        let file = fs.tmpfile(Caller::default(), w, 0o644).unwrap().ino;
        fs.link(file, dir, b"first").unwrap();
        assert_eq!(
            fs.link(file, other, b"second").map(|_| ()),
            Err(Errno::XDEV)
        );
    }
    let (_, changes) = step.frozen();
    assert!(matches!(
        changes.get(b"root/.npm/_cacache/e/q"),
        Some(Node::Leaf(_))
    ));
}
