//! A layer as an archive is the layer again, for us and for others.

use std::path::Path;
use std::process::Command;

use iii_store::tree::{Leaf, Rdev};
use iii_store::{Ingest, LayerId, with_causes};
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;

use super::super::export::archive::file_header;
use super::super::export::blob::write_layer;
use super::super::export::{
    Compression, DockerArchiveSink, Event, Export, ExportError, Exported, ExportedLayer, LayerTar,
    LayoutSink, Part, Sink, Stored, WriteBlob,
};
use super::super::stream;
use super::super::{Image, ImageConfig, Platform};
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

/// Around the size of a header: 100 bytes, or 155 and 100 with a slash between.
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
        // An excluded path need not fit.
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

/// Their contents need not be there for what stands before them to be written.
#[test]
fn sizes_beyond_a_header() {
    let test = TestStore::new();
    let limits = Limits::default();
    let first = |bytes: &[u8]| {
        let mut input = bytes;
        let mut archive = crate::tar::Archive::new(&mut input as &mut dyn std::io::Read, &limits);
        archive.next_member().unwrap().unwrap()
    };
    for size in [(8 << 30) - 1, 8 << 30, (60 << 30) + 5] {
        let mut tree = Dir::implicit();
        let object = iii_store::ObjectId::of(b"nowhere");
        put(
            &mut tree,
            "f",
            leaf(meta(0o644), Content::File { object, size }),
        );
        let layer = Layer::from_bytes(iii_store::layer::encode(&tree).unwrap().bytes).unwrap();
        let tar = LayerTar::new(&test.store, &layer, &[]).unwrap();
        let mut bytes = Vec::new();
        assert!(tar.write(&mut bytes).is_err());
        assert_eq!(first(&bytes).size, size);
        assert_eq!(
            tar.size(),
            bytes.len() as u64 + size.next_multiple_of(512) + 1024
        );
        let header = file_header(b"blobs/sha256/x", size);
        let member = first(&header);
        assert_eq!((&*member.path, member.size), (&b"blobs/sha256/x"[..], size));
    }
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
        with_causes(&error)
    );
    assert!(
        with_causes(&error).starts_with("\"f\": its contents cannot be read"),
        "{}",
        with_causes(&error)
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
            assert_eq!(diff_id, crate::Digest::of(&plain));
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
    let mut archive = crate::tar::Archive::new(&mut input as &mut dyn std::io::Read, &limits);
    let mut lines = theirs.lines();
    while let Some(member) = archive.next_member().unwrap() {
        use crate::tar::MemberKind;
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

/// Puts an image of these layers into `sink`. Progress is told to `told`.
fn export(
    test: &TestStore,
    layers: &[Arc<Layer>],
    sink: &dyn Sink,
    tag: Option<&str>,
    told: &(dyn Fn(&Event) + Sync),
) -> Result<Exported, ExportError> {
    let lease = test.store.lease("test").unwrap();
    let parts = layers.iter().map(|layer| Part {
        layer,
        what: "base",
        omit: &[],
        remember: true,
    });
    let export = Export {
        store: &test.store,
        lease: &lease,
        parts: parts.collect(),
        config: config(),
        labels: [
            ("a".to_owned(), "1".to_owned()),
            ("b".to_owned(), "2".to_owned()),
        ]
        .into(),
        platform: Platform::host(),
        created: None,
        compression: Compression::Zstd,
    };
    export.check()?.put(sink, tag, told)
}

fn config() -> ImageConfig {
    ImageConfig {
        env: vec!["A=1".into(), "PATH=/bin".into()],
        user: "7:8".into(),
        working_dir: "/w".into(),
        entrypoint: vec!["/bin/sh".into(), "-ec".into()],
        cmd: vec!["true".into()],
    }
}

fn import(test: &TestStore, path: &Path, name: &str) -> Result<Image, String> {
    let limits = Limits::default();
    crate::import(&test.store, path, name, &limits, &|_| {})
        .map(|imported| imported.image)
        .map_err(|error| with_causes(&error))
}

fn two_layers(test: &TestStore) -> Vec<Arc<Layer>> {
    let small = |ingest: &Ingest<'_>| {
        let mut tree = Dir::default();
        put(&mut tree, "etc/x", leaf(meta(0o644), file(ingest, b"x")));
        tree
    };
    vec![publish(test, everything), publish(test, small)]
}

#[test]
fn an_export_is_imported_as_it_was() {
    let test = TestStore::new();
    let layers = two_layers(&test);
    let ids: Vec<_> = layers.iter().map(|layer| layer.layer_id()).collect();
    let dir = test.dir.path().join("new/layout");
    let path = test.dir.path().join("archive.tar");
    let layout = LayoutSink::open(&dir).unwrap();
    let put = export(&test, &layers, &layout, Some("v1"), &|_| {}).unwrap();
    drop(layout);
    let archive = DockerArchiveSink::create(&path, "me:1".to_owned()).unwrap();
    export(&test, &layers, &archive, None, &|_| {}).unwrap();
    drop(archive);
    // The import did not know these archives before.
    let other = TestStore::new();
    for (path, name, digest) in [(&dir, "a:v1", Some(put.digest)), (&path, "me:1", None)] {
        let image = import(&other, path, name).unwrap();
        assert_eq!(image.layers, ids);
        assert_eq!(image.config, config());
        assert_eq!(image.platform, Some(Platform::host()));
        assert!(digest.is_none() || image.digest == digest);
    }
    let left: Vec<_> = std::fs::read_dir(test.dir.path())
        .unwrap()
        .chain(std::fs::read_dir(&dir).unwrap())
        .map(|entry| entry.unwrap().file_name())
        .filter(|name| name.as_encoded_bytes().starts_with(b"."))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

/// A sink that keeps its blobs in memory, and its manifest among them.
#[derive(Default)]
struct Memory(std::sync::Mutex<std::collections::HashMap<crate::Digest, Vec<u8>>>);

impl Memory {
    fn json(&self, digest: &str) -> serde_json::Value {
        let digest = digest.parse().unwrap();
        serde_json::from_slice(&self.0.lock().unwrap()[&digest]).unwrap()
    }
}

impl Sink for Memory {
    fn has_blob(&self, digest: &crate::Digest, _: u64) -> Result<bool, ExportError> {
        Ok(self.0.lock().unwrap().contains_key(digest))
    }

    fn put_blob(&self, write: &mut WriteBlob<'_>) -> Result<Stored, ExportError> {
        let mut bytes = Vec::new();
        write(&mut bytes)?;
        let (digest, size) = (crate::Digest::of(&bytes), bytes.len() as u64);
        self.0.lock().unwrap().insert(digest, bytes);
        Ok(Stored { digest, size })
    }

    fn put_manifest(
        &self,
        _: &str,
        bytes: &[u8],
        _: Option<&str>,
    ) -> Result<crate::Digest, ExportError> {
        let put = self.put_blob(&mut |out| out.write_all(bytes).map_err(ExportError::Write))?;
        Ok(put.digest)
    }
}

#[test]
fn what_the_documents_say() {
    let test = TestStore::new();
    let at = |sec: i64| {
        publish(&test, |ingest| {
            let mut tree = Dir::default();
            let mut meta = meta(0o644);
            meta.mtime = Mtime { sec, nsec: 7 };
            put(&mut tree, "etc/x", leaf(meta, file(ingest, b"x")));
            tree
        })
    };
    let lease = test.store.lease("test").unwrap();
    for (created, times, expected) in [
        (None, [1_000_000_000, 5], "2001-09-09T01:46:40Z"),
        (None, [-7, -8], "1970-01-01T00:00:00Z"),
        (None, [1 << 60, 0], "9999-12-31T23:59:59Z"),
        (Some(1_700_000_000), [1, 2], "2023-11-14T22:13:20Z"),
    ] {
        let layers = times.map(at);
        let sink = Memory::default();
        let export = Export {
            store: &test.store,
            lease: &lease,
            parts: layers
                .iter()
                .zip(["base x", "install"])
                .map(|(layer, what)| Part {
                    layer,
                    what,
                    omit: &[],
                    remember: false,
                })
                .collect(),
            config: config(),
            labels: [("a".to_owned(), "1".to_owned())].into(),
            platform: Platform::Arm64,
            created,
            compression: Compression::Gzip,
        };
        let put = export.check().unwrap().put(&sink, None, &|_| {}).unwrap();
        let manifest = sink.json(&put.digest.to_string());
        let part = |layer: &ExportedLayer| {
            serde_json::json!({
                "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                "digest": layer.digest, "size": layer.size,
            })
        };
        let parts: serde_json::Value = put.layers.iter().map(part).collect();
        assert_eq!(manifest["layers"], parts);
        assert_eq!(
            manifest["mediaType"],
            "application/vnd.oci.image.manifest.v1+json"
        );
        let config = sink.json(manifest["config"]["digest"].as_str().unwrap());
        let diff_ids = [put.layers[0].diff_id, put.layers[1].diff_id];
        let expected = serde_json::json!({
            "created": expected,
            "architecture": "arm64",
            "os": "linux",
            "config": {
                "User": "7:8",
                "Env": ["A=1", "PATH=/bin"],
                "Entrypoint": ["/bin/sh", "-ec"],
                "Cmd": ["true"],
                "WorkingDir": "/w",
                "Labels": { "a": "1" },
            },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
            "history": [
                { "created": expected, "created_by": "iii: base x" },
                { "created": expected, "created_by": "iii: install" },
            ],
        });
        assert_eq!(config, expected);
        // No record is kept against the caller's wish.
        let keys = std::fs::read_dir(test.store.dir().join("keys")).unwrap();
        assert_eq!(keys.count(), 0);
    }
}

#[test]
fn what_a_layout_has_is_not_written_again() {
    let test = TestStore::new();
    let layers = two_layers(&test);
    let dir = test.dir.path().join("layout");
    let put = || {
        let written = std::sync::atomic::AtomicUsize::new(0);
        let sink = LayoutSink::open(&dir).unwrap();
        let exported = export(&test, &layers, &sink, Some("v1"), &|event| {
            if let Event::Layer { .. } = event {
                written.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            }
        });
        (exported.unwrap(), written.into_inner())
    };
    let index = || std::fs::read(dir.join("index.json")).unwrap();
    let (first, written) = put();
    assert_eq!(written, 2);
    let before = index();
    let (second, written) = put();
    assert_eq!((second.digest, written), (first.digest, 0));
    assert!(second.layers.iter().all(|layer| layer.existed));
    assert_eq!(index(), before);
    // One that is missing or cut short is.
    let blob = dir.join("blobs/sha256").join(first.layers[0].digest.hex());
    std::fs::write(&blob, b"cut").unwrap();
    assert_eq!(put().1, 1);
    assert_eq!(
        std::fs::metadata(&blob).unwrap().len(),
        first.layers[0].size
    );
    std::fs::remove_file(&blob).unwrap();
    assert_eq!(put().1, 1);
    assert_eq!(
        import(&TestStore::new(), &dir, "x").unwrap().digest,
        Some(first.digest)
    );
}

#[test]
fn a_layout_keeps_its_other_images() {
    let test = TestStore::new();
    let layers = two_layers(&test);
    let dir = test.dir.path().join("layout");
    let sink = LayoutSink::open(&dir).unwrap();
    let index = || -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(dir.join("index.json")).unwrap()).unwrap()
    };
    assert_eq!(index()["manifests"], serde_json::json!([]));
    // Of a tool with a later version of indexes.
    let foreign = serde_json::json!({
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": format!("sha256:{}", "0".repeat(64)),
        "size": 7,
        "data": "Zm9v",
        "annotations": { "org.opencontainers.image.ref.name": "theirs", "own": "x" },
    });
    let theirs = serde_json::json!({ "schemaVersion": 2, "annotations": { "k": "v" }, "manifests": [foreign] });
    std::fs::write(dir.join("index.json"), theirs.to_string()).unwrap();
    let first = export(&test, &layers, &sink, Some("v1"), &|_| {}).unwrap();
    let second = export(&test, &layers[..1], &sink, Some("v1"), &|_| {}).unwrap();
    let third = export(&test, &layers[1..], &sink, None, &|_| {}).unwrap();
    assert_ne!(first.digest, second.digest);
    let index = index();
    assert_eq!(index["annotations"]["k"], "v");
    let manifests = index["manifests"].as_array().unwrap();
    assert_eq!(manifests[0], foreign);
    let digests: Vec<_> = manifests[1..]
        .iter()
        .map(|one| one["digest"].as_str().unwrap())
        .collect();
    assert_eq!(
        digests,
        [second.digest.to_string(), third.digest.to_string()]
    );
    assert_eq!(
        manifests[1]["annotations"]["org.opencontainers.image.ref.name"],
        "v1"
    );
    assert!(manifests[2]["annotations"].is_null());
}

#[test]
fn what_cannot_be_a_destination() {
    let test = TestStore::new();
    let dir = |name: &str, files: &[(&str, &str)]| {
        let dir = test.dir.path().join(name);
        std::fs::create_dir(&dir).unwrap();
        for (name, text) in files {
            std::fs::write(dir.join(name), text).unwrap();
        }
        dir
    };
    let layout = r#"{"imageLayoutVersion":"1.0.0"}"#;
    for (dir, expected) in [
        (
            dir("project", &[("package.json", "{}")]),
            "it holds other files",
        ),
        (
            dir(
                "later",
                &[("oci-layout", r#"{"imageLayoutVersion":"2.0"}"#)],
            ),
            "a version that is not known",
        ),
        (
            dir("odd", &[("oci-layout", "?")]),
            "a version that is not known",
        ),
        (
            dir("cut", &[("oci-layout", layout), ("index.json", "{")]),
            "does not parse",
        ),
        (
            dir("none", &[("oci-layout", layout), ("index.json", "{}")]),
            "no list of manifests",
        ),
    ] {
        let before = std::fs::read_dir(&dir).unwrap().count();
        let put = LayoutSink::open(&dir).and_then(|sink| sink.put_manifest("x", b"{}", None));
        let error = with_causes(&put.expect_err(expected));
        assert!(error.contains(expected), "{error}");
        assert!(error.contains(dir.to_str().unwrap()), "{error}");
        // A refused directory is left alone, except for room for blobs in a layout.
        let after = std::fs::read_dir(&dir).unwrap().count();
        assert!(after == before || dir.join("blobs").is_dir(), "{dir:?}");
    }
    let path = test.dir.path().join("file");
    std::fs::write(&path, "").unwrap();
    for path in [path.clone(), path.join("below")] {
        let error = LayoutSink::open(&path)
            .err()
            .map(|error| with_causes(&error));
        assert!(
            error
                .as_deref()
                .is_some_and(|error| error.contains("making")),
            "{error:?}"
        );
    }
    let missing = test.dir.path().join("missing/x.tar");
    for path in [test.dir.path().to_owned(), missing] {
        let error = DockerArchiveSink::create(&path, String::new()).err();
        assert!(
            error.is_some_and(|error| with_causes(&error).contains("writing")),
            "{path:?}"
        );
    }
}

/// Remains of a killed process go, and files in the making stay.
#[test]
fn leftovers_of_the_killed_are_removed() {
    let test = TestStore::new();
    let dir = test.dir.path().join("layout");
    let sink = LayoutSink::open(&dir).unwrap();
    let hidden = |dir: &Path| {
        let entries = std::fs::read_dir(dir).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.filter(|name| name.starts_with('.')).collect();
        names.sort_unstable();
        names
    };
    let live = hidden(&dir);
    assert_eq!(live.len(), 1);
    std::fs::create_dir(dir.join(".iii-dead")).unwrap();
    std::fs::write(dir.join(".iii-dead/blob"), "half").unwrap();
    std::fs::create_dir(dir.join(".other")).unwrap();
    let second = LayoutSink::open(&dir).unwrap();
    let seen = hidden(&dir);
    assert!(
        seen.contains(&live[0]) && seen.contains(&".other".to_owned()),
        "{seen:?}"
    );
    assert!(!seen.contains(&".iii-dead".to_owned()), "{seen:?}");
    drop((sink, second));
    assert_eq!(hidden(&dir), [".other"]);
    std::fs::write(test.dir.path().join(".x.tar.iii-dead"), "half").unwrap();
    let path = test.dir.path().join("x.tar");
    drop(DockerArchiveSink::create(&path, String::new()).unwrap());
    assert!(hidden(test.dir.path()).is_empty() && !path.exists());
}

/// The error that came first is told, and what others were writing meanwhile is no image.
#[test]
fn a_sink_that_fails_changes_nothing() {
    struct Full(LayoutSink);
    impl Sink for Full {
        fn has_blob(&self, digest: &crate::Digest, size: u64) -> Result<bool, ExportError> {
            self.0.has_blob(digest, size)
        }
        fn put_blob(&self, write: &mut WriteBlob<'_>) -> Result<Stored, ExportError> {
            struct Short(usize);
            impl std::io::Write for Short {
                fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
                    self.0 = self
                        .0
                        .checked_sub(buf.len())
                        .ok_or(std::io::ErrorKind::StorageFull)?;
                    Ok(buf.len())
                }
                fn flush(&mut self) -> std::io::Result<()> {
                    Ok(())
                }
            }
            write(&mut Short(1000))?;
            self.0.put_blob(write)
        }
        fn put_manifest(
            &self,
            _: &str,
            _: &[u8],
            _: Option<&str>,
        ) -> Result<crate::Digest, ExportError> {
            panic!("a layer is missing")
        }
    }
    let test = TestStore::new();
    let sink = Full(LayoutSink::open(&test.dir.path().join("layout")).unwrap());
    let error = export(&test, &two_layers(&test), &sink, None, &|_| {}).unwrap_err();
    assert!(
        matches!(error, ExportError::Write(ref error) if error.kind() == std::io::ErrorKind::StorageFull)
    );
}
