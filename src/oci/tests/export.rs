//! A layer as an archive is the layer again, for us and for others.

use std::path::Path;
use std::process::Command;

use iii_store::tree::{Leaf, Rdev};
use iii_store::{Ingest, LayerId};
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;

use super::super::export::blob::write_layer;
use super::super::export::{Compression, ExportError, LayerTar};
use super::super::stream;
use super::*;

fn publish(test: &TestStore, make: impl FnOnce(&Ingest<'_>) -> Dir) -> Arc<Layer> {
    let lease = test.store.lease("test").unwrap();
    let ingest = test.store.ingest(&lease).unwrap();
    let tree = make(&ingest);
    let published = ingest.finish(&tree).unwrap();
    test.store.layer(&published.layer_id).unwrap()
}

fn tar_of(test: &TestStore, layer: &Layer, omit: &[&[u8]]) -> Result<Vec<u8>, ExportError> {
    let tar = LayerTar::new(&test.store, layer, omit)?;
    let mut bytes = Vec::new();
    tar.write(&mut bytes)?;
    assert_eq!(bytes.len() as u64, tar.size());
    Ok(bytes)
}

fn again(test: &TestStore, archive: &[u8]) -> (LayerId, Vec<String>) {
    let (layer, _) = test
        .unpack(archive, Dialect::Layer(&[]), &Limits::default())
        .unwrap();
    (layer.layer_id(), test.show(&layer))
}

#[track_caller]
fn comes_back(test: &TestStore, layer: &Layer) {
    let archive = tar_of(test, layer, &[]).unwrap();
    let (id, shown) = again(test, &archive);
    assert_eq!(shown, test.show(layer));
    assert_eq!(id, layer.layer_id());
}

fn meta(mode: u16) -> Meta {
    Meta {
        mode,
        ..Meta::default()
    }
}

fn leaf(meta: Meta, content: Content) -> Leaf {
    Leaf {
        meta,
        content,
        link: None,
    }
}

fn file(ingest: &Ingest<'_>, text: &[u8]) -> Content {
    let added = ingest.add_bytes(text).unwrap();
    Content::File {
        object: added.object,
        size: text.len() as u64,
    }
}

fn put(tree: &mut Dir, path: &str, leaf: Leaf) {
    put_bytes(tree, path.as_bytes(), leaf);
}

fn put_bytes(tree: &mut Dir, path: &[u8], leaf: Leaf) {
    let slash = path.iter().rposition(|&byte| byte == b'/');
    let (dir, name) = match slash {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (&b""[..], path),
    };
    let dir = tree.dir_at(dir).unwrap();
    dir.entries.insert(name.into(), Node::Leaf(leaf));
}

/// One of everything that an archive says in a way of its own.
fn everything(ingest: &Ingest<'_>) -> Dir {
    let mut tree = Dir {
        meta: meta(0o755),
        ..Dir::default()
    };
    let text = |text: &str| file(ingest, text.as_bytes());
    put(&mut tree, "bin/su", leaf(meta(0o4755), text("elf")));
    let mut capable = meta(0o755);
    let capability = b"\x01\0\0\x02\0\x04\0\0\n\0\0=\0\0";
    capable.xattrs.insert(
        (*b"security.capability").into(),
        capability.as_slice().into(),
    );
    capable
        .xattrs
        .insert((*b"user.none").into(), Box::default());
    for (path, link) in [("bin/z", 1), ("a/first", 1), ("bin/ping", 1), ("lone", 2)] {
        let same = Leaf {
            link: Some(link),
            ..leaf(capable.clone(), text("ping"))
        };
        put(&mut tree, path, same);
    }
    let target = |bytes: &[u8]| Content::Symlink {
        target: bytes.into(),
    };
    for (path, bytes) in [
        ("bin/sh", &b"dash"[..]),
        ("ln\u{fc}", b"\xff \n"),
        ("far", &[b't'; 4095]),
    ] {
        put(&mut tree, path, leaf(meta(0o777), target(bytes)));
    }
    for path in ["links/one", "links/two"] {
        let link = Leaf {
            link: Some(3),
            ..leaf(meta(0o777), target(b"one"))
        };
        put(&mut tree, path, link);
    }
    let rdev = |major, minor| Rdev { major, minor };
    put(
        &mut tree,
        "dev/null",
        leaf(meta(0o666), Content::Char(rdev(1, 3))),
    );
    put(
        &mut tree,
        "dev/zero",
        leaf(meta(0o666), Content::Char(rdev(0, 0))),
    );
    put(
        &mut tree,
        "dev/big",
        leaf(meta(0o600), Content::Block(rdev(4095, 0x1f_ffff))),
    );
    put(&mut tree, "dev/pipe", leaf(meta(0o1600), Content::Fifo));
    let Some(Node::Dir(dev)) = tree.entries.get_mut(b"dev") else {
        panic!("it was just made")
    };
    dev.kind = DirKind::Opaque;
    dev.meta = meta(0o2775);
    put(
        &mut tree,
        "etc/.gone",
        leaf(Meta::default(), Content::Whiteout),
    );
    put(&mut tree, "gone", leaf(Meta::default(), Content::Whiteout));
    times_and_owners(&mut tree, &text);
    long_names(&mut tree, &text);
    for name in [
        &b"\xff\xfe"[..],
        b"new\nline",
        b"back\\slash",
        "\u{fc}".as_bytes(),
        b"...",
    ] {
        put_bytes(&mut tree, name, leaf(meta(0o644), text("odd")));
    }
    put(
        &mut tree,
        "large",
        leaf(
            meta(0o644),
            file(ingest, &b"0123456789abcdef".repeat(200_000)),
        ),
    );
    put(
        &mut tree,
        "full",
        leaf(meta(0o644), file(ingest, &[7; 1024])),
    );
    tree
}

fn times_and_owners(tree: &mut Dir, text: &dyn Fn(&str) -> Content) {
    for (name, sec, nsec) in [
        ("before", -5, 0),
        ("just before", -1, 500_000_000),
        ("long before", -62_135_596_801, 1),
        ("exact", 1_700_000_000, 0),
        ("fine", 1_700_000_000, 123_456_789),
        ("tenth", 1, 100_000_000),
        ("last of ustar", 0o77_777_777_777, 0),
        ("after ustar", 0o100_000_000_000, 0),
    ] {
        let mut meta = meta(0o644);
        meta.mtime = Mtime { sec, nsec };
        put(tree, &format!("times/{name}"), leaf(meta, text(name)));
    }
    for id in [0o7_777_777, 0o10_000_000, u32::MAX - 1] {
        let mut meta = meta(0o644);
        (meta.uid, meta.gid) = (id, id);
        put(tree, &format!("owners/{id}"), leaf(meta, text("")));
    }
}

/// Around what fits into a header: 100 bytes, or 155 and 100 with a slash between.
fn long_names(tree: &mut Dir, text: &dyn Fn(&str) -> Content) {
    for dir in [0_usize, 1, 98, 99, 100, 154, 155, 156, 255] {
        for name in [1_usize, 99, 100, 101, 255] {
            let path = [vec![b'd'; dir], b"/".to_vec(), vec![b'n'; name]].concat();
            put_bytes(tree, &path, leaf(meta(0o644), text("x")));
        }
        for name in [98, 99, 100, 155, 156] {
            let path = [vec![b'e'; dir], b"/".to_vec(), vec![b'm'; name]].concat();
            let dir = tree.dir_at(&path).unwrap();
            dir.kind = DirKind::Merged;
            dir.meta = meta(0o700);
        }
    }
}

#[test]
fn a_layer_comes_back_as_it_was() {
    let test = TestStore::new();
    for kind in [DirKind::Merged, DirKind::Opaque, DirKind::Implicit] {
        let layer = publish(&test, |ingest| Dir {
            kind,
            ..everything(ingest)
        });
        comes_back(&test, &layer);
        comes_back(
            &test,
            &publish(&test, |_| Dir {
                kind,
                ..Dir::default()
            }),
        );
    }
}

const NAMES: [&[u8]; 8] = [
    b"a",
    b"b",
    b".h",
    b"A",
    b"\xff",
    b"with space",
    &[b'l'; 120],
    &[b'm'; 250],
];

fn any_meta() -> impl Strategy<Value = Meta> {
    let xattrs = prop::collection::btree_map(
        "(user|trusted|security)\\.[a-z]{1,4}".prop_map(|name| name.into_bytes().into()),
        prop::collection::vec(any::<u8>(), 0..20).prop_map(Box::from),
        0..3,
    );
    let sec = prop_oneof![Just(0), -3_i64..3, -(1_i64 << 40)..1 << 40];
    let nsec = prop_oneof![Just(0), 0_u32..1_000_000_000];
    (0_u16..=0o7777, any::<(u32, u32)>(), sec, nsec, xattrs).prop_map(
        |(mode, (uid, gid), sec, nsec, xattrs)| Meta {
            mode,
            uid,
            gid,
            mtime: Mtime { sec, nsec },
            xattrs,
        },
    )
}

/// Files are numbers here; [`build`] puts them into the store.
#[derive(Debug, Clone)]
enum Made {
    File(Vec<u8>),
    Link(usize),
    Other(Content),
    Dir(DirKind, Vec<(usize, Meta, Made)>),
}

fn any_made() -> impl Strategy<Value = Made> {
    let rdev = (0_u32..1 << 12, 0_u32..1 << 20).prop_map(|(major, minor)| Rdev { major, minor });
    let file = prop::collection::vec(any::<u8>(), 0..1100).prop_map(Made::File);
    let symlink = prop::collection::vec(1_u8..=255, 1..300).prop_map(|target| Content::Symlink {
        target: target.into(),
    });
    let other = prop_oneof![
        symlink,
        Just(Content::Fifo),
        Just(Content::Whiteout),
        rdev.clone().prop_map(Content::Char),
        rdev.prop_map(Content::Block),
    ];
    let leaf = prop_oneof![
        2 => file,
        2 => (0_usize..3).prop_map(Made::Link),
        3 => other.prop_map(Made::Other)
    ];
    let kind = prop_oneof![
        Just(DirKind::Merged),
        Just(DirKind::Opaque),
        Just(DirKind::Implicit)
    ];
    leaf.prop_recursive(4, 40, 6, move |inner| {
        let entries = prop::collection::vec((0..NAMES.len(), any_meta(), inner), 0..6);
        (kind.clone(), entries).prop_map(|(kind, entries)| Made::Dir(kind, entries))
    })
}

fn build(ingest: &Ingest<'_>, kind: DirKind, own: Meta, entries: Vec<(usize, Meta, Made)>) -> Dir {
    // A directory on the way to nothing is nothing: no archive can name it.
    let kind = match kind {
        DirKind::Implicit if entries.is_empty() => DirKind::Merged,
        kind => kind,
    };
    let mut dir = Dir {
        meta: own,
        kind,
        ..Dir::default()
    };
    for (name, mut own, made) in entries {
        let node = match made {
            Made::File(bytes) => Node::Leaf(leaf(own, file(ingest, &bytes))),
            Made::Link(link) => Node::Leaf(Leaf {
                link: Some(link as u64),
                ..leaf(meta(0o751), file(ingest, link.to_string().as_bytes()))
            }),
            Made::Other(content) => {
                if let Content::Symlink { .. } = content {
                    own.mode = 0o777;
                }
                Node::Leaf(leaf(own, content))
            }
            Made::Dir(kind, entries) => Node::Dir(build(ingest, kind, own, entries)),
        };
        dir.entries.insert(NAMES[name].into(), node);
    }
    dir
}

#[test]
fn any_layer_comes_back_as_it_was() {
    let test = TestStore::new();
    let strategy = (
        any_meta(),
        prop::collection::vec((0..NAMES.len(), any_meta(), any_made()), 0..8),
    );
    // In one store, whose making costs more than a case.
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    for _ in 0..60 {
        let (own, entries) = strategy.new_tree(&mut runner).unwrap().current();
        let layer = publish(&test, |ingest| build(ingest, DirKind::Merged, own, entries));
        comes_back(&test, &layer);
    }
}

#[test]
fn what_no_archive_can_hold() {
    let test = TestStore::new();
    let mut equals = meta(0o644);
    equals.xattrs.insert((*b"user.a=b").into(), (*b"1").into());
    let mut many = meta(0o644);
    for ix in 0..20 {
        let name = format!("user.{ix}").into_bytes();
        many.xattrs.insert(name.into(), vec![0; 60_000].into());
    }
    let far = Content::Char(Rdev {
        major: 1 << 21,
        minor: 0,
    });
    for (path, leaf, expected) in [
        (
            "etc/.wh.x",
            leaf(meta(0o644), Content::Fifo),
            "\"etc/.wh.x\": a name that begins with .wh.",
        ),
        (
            ".wh.y",
            leaf(Meta::default(), Content::Whiteout),
            "\".wh.y\": a name that begins with .wh.",
        ),
        (
            "x",
            leaf(equals, Content::Fifo),
            "\"x\": an xattr of it has a = in its name",
        ),
        (
            "x",
            leaf(many, Content::Fifo),
            "\"x\": its xattrs are larger than readers of archives take",
        ),
        (
            "dev",
            leaf(meta(0o644), far),
            "\"dev\": its device number is too large",
        ),
    ] {
        let layer = publish(&test, |_| {
            let mut tree = Dir::default();
            put(&mut tree, path, leaf);
            tree
        });
        let error = tar_of(&test, &layer, &[]).expect_err(path).to_string();
        assert!(error.contains(expected), "{error}");
        // What is left out need not fit.
        tar_of(&test, &layer, &[path.as_bytes()]).unwrap();
    }
    let layer = publish(&test, |_| {
        let mut tree = Dir::default();
        put(&mut tree, "run/socket", leaf(meta(0o644), Content::Socket));
        put(&mut tree, "run/pipe", leaf(meta(0o644), Content::Fifo));
        tree
    });
    let tar = LayerTar::new(&test.store, &layer, &[]).unwrap();
    let sockets: Vec<_> = tar.sockets().map(|name| name.to_string()).collect();
    assert_eq!(sockets, ["\"run/socket\""]);
    let (_, shown) = again(&test, &tar_of(&test, &layer, &[]).unwrap());
    assert_eq!(shown, ["/ 0", "run/ implicit", "run/pipe fifo"]);
}

#[test]
fn what_is_left_out_takes_no_contents_along() {
    let test = TestStore::new();
    let layer = publish(&test, |ingest| {
        let mut tree = Dir::implicit();
        for path in ["w/a", "w/b", "w/d/c"] {
            let same = Leaf {
                link: Some(1),
                ..leaf(meta(0o644), file(ingest, b"same"))
            };
            put(&mut tree, path, same);
        }
        tree
    });
    for (omit, expected) in [
        (
            &[][..],
            &[
                "w/a = same link#0",
                "w/b = same link#0",
                "w/d/ implicit",
                "w/d/c = same link#0",
            ][..],
        ),
        (
            &[&b"w/a"[..]],
            &["w/b = same link#0", "w/d/ implicit", "w/d/c = same link#0"],
        ),
        (&[b"w/a", b"w/d"], &["w/b = same"]),
        // A path is not a prefix of a name.
        (
            &[b"w/a", b"w/d/", b"b"],
            &["w/b = same link#0", "w/d/ implicit", "w/d/c = same link#0"],
        ),
    ] {
        let (_, shown) = again(&test, &tar_of(&test, &layer, omit).unwrap());
        assert_eq!(shown[..2], ["/ implicit", "w/ implicit"]);
        assert_eq!(shown[2..], *expected);
    }
}

#[test]
fn damaged_contents_are_not_handed_on() {
    let test = TestStore::new();
    let layer = publish(&test, |ingest| {
        let mut tree = Dir::default();
        put(&mut tree, "f", leaf(meta(0o644), file(ingest, &[1; 5000])));
        tree
    });
    let store = iii_store::Store::open(test.store.dir()).unwrap();
    for pack in std::fs::read_dir(store.dir().join("packs")).unwrap() {
        let path = pack.unwrap().path();
        if path.extension().is_some_and(|end| end == "pack") {
            let mut bytes = std::fs::read(&path).unwrap();
            for byte in &mut bytes {
                *byte ^= 1;
            }
            std::fs::write(&path, bytes).unwrap();
        }
    }
    let tar = LayerTar::new(&store, &layer, &[]).unwrap();
    let error = tar.write(&mut std::io::sink()).unwrap_err();
    assert!(
        matches!(error, ExportError::Contents { .. }),
        "{}",
        chain(&error)
    );
    assert!(
        chain(&error).starts_with("\"f\": its contents cannot be read"),
        "{}",
        chain(&error)
    );
}

#[test]
fn compressed_it_is_the_same_archive() {
    let test = TestStore::new();
    let layer = publish(&test, everything);
    let plain = tar_of(&test, &layer, &[]).unwrap();
    let tar = LayerTar::new(&test.store, &layer, &[]).unwrap();
    for compression in [Compression::Gzip, Compression::Zstd, Compression::None] {
        let blob = || {
            let mut blob = Vec::new();
            let diff_id = write_layer(&tar, compression, &mut blob).unwrap();
            assert_eq!(diff_id, crate::oci::Digest::of(&plain));
            blob
        };
        let first = blob();
        assert_eq!(first, blob(), "{compression}");
        let promise = stream::Promise::default();
        let read = std::sync::atomic::AtomicU64::new(0);
        let (out, _) = stream::read_blob(&*first, promise, &Limits::default(), &read, |plain| {
            let mut out = Vec::new();
            plain
                .read_to_end(&mut out)
                .map_err(stream::StreamError::Read)?;
            Ok::<_, stream::StreamError>(out)
        })
        .unwrap();
        assert!(out == plain, "{compression}");
        assert_eq!(compression.to_string().parse(), Ok(compression));
    }
    assert!("lzma".parse::<Compression>().is_err());
}

/// Other readers of tar find the same in it.
#[test]
fn python_reads_the_same() {
    const SCRIPT: &str = r#"
import sys, tarfile
raw = lambda text: text.encode("utf-8", "surrogateescape")
for m in tarfile.open(sys.argv[1], encoding="utf-8", errors="surrogateescape"):
    print(raw(m.name), m.type.decode(), oct(m.mode), m.uid, m.gid, m.size, raw(m.linkname),
          m.devmajor if m.ischr() or m.isblk() else 0, m.devminor if m.ischr() or m.isblk() else 0,
          int(m.mtime // 1), len([k for k in m.pax_headers if k.startswith("SCHILY.xattr.")]))
"#;
    let test = TestStore::new();
    let layer = publish(&test, everything);
    let path = test.dir.path().join("layer.tar");
    std::fs::write(&path, tar_of(&test, &layer, &[]).unwrap()).unwrap();
    let output = match Command::new("python3")
        .args(["-c", SCRIPT])
        .arg(&path)
        .output()
    {
        Ok(output) => output,
        Err(error) => {
            eprintln!("SKIPPED: reading our archives with Python: python3: {error}");
            return;
        }
    };
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{complaint}");
    let theirs = String::from_utf8(output.stdout).unwrap();
    let mut input = &*std::fs::read(&path).unwrap();
    let limits = Limits::default();
    let mut archive = crate::oci::tar::Archive::new(&mut input as &mut dyn std::io::Read, &limits);
    let mut lines = theirs.lines();
    while let Some(member) = archive.next_member().unwrap() {
        use crate::oci::tar::MemberKind;
        let (kind, rdev) = match member.kind {
            MemberKind::File => (0, Rdev::default()),
            MemberKind::Hardlink => (1, Rdev::default()),
            MemberKind::Symlink => (2, Rdev::default()),
            MemberKind::Char(rdev) => (3, rdev),
            MemberKind::Block(rdev) => (4, rdev),
            MemberKind::Dir => (5, Rdev::default()),
            MemberKind::Fifo => (6, Rdev::default()),
        };
        let name = member.path.strip_suffix(b"/").unwrap_or(&member.path);
        let ours = format!(
            "{} {kind} 0o{:o} {} {} {} {} {} {} {} {}",
            python(name),
            member.mode,
            member.uid,
            member.gid,
            member.size,
            python(&member.link),
            rdev.major,
            rdev.minor,
            member.mtime.sec,
            member.xattrs.len(),
        );
        assert_eq!(lines.next(), Some(&*ours));
    }
    assert_eq!(lines.next(), None);
}

/// Bytes as Python writes them.
fn python(bytes: &[u8]) -> String {
    format!("b'{}'", bytes.escape_ascii())
}

#[test]
fn gnu_tar_extracts_the_same() {
    let test = TestStore::new();
    let root = test.dir.path().join("root");
    std::fs::create_dir(&root).unwrap();
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        eprintln!("SKIPPED: owners, devices, trusted and security xattrs: needs root");
    }
    gnu_tar::fill(&root, is_root);
    let taken = gnu_tar::take(&test, &root);
    let archive = test.dir.path().join("layer.tar");
    std::fs::write(&archive, tar_of(&test, &taken, &[]).unwrap()).unwrap();
    let out = test.dir.path().join("out");
    std::fs::create_dir(&out).unwrap();
    gnu_tar::run(&mut extract(&archive, &out));
    gnu_tar::compare(&test, &taken, &gnu_tar::take(&test, &out), "GNU tar");
}

fn extract(archive: &Path, out: &Path) -> Command {
    let mut tar = Command::new("tar");
    tar.args(["--xattrs", "--xattrs-include=*", "-C"]).arg(out);
    tar.arg("-xpf").arg(archive);
    tar
}
