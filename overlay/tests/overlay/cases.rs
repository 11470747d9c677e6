//! Single cases.

use std::collections::BTreeSet;
use std::sync::Arc;

use iii_overlay::fs::{
    Allocate, Caller, Errno, Filesystem, Open, Rename, Seek, SetAttr, SetXattr, Special,
};
use iii_overlay::ino::{Ino, ROOT};
use iii_overlay::upper::UpperError;
use iii_overlay::{Footing, OpenError, Overlay, OverlayOptions, footing_of, thawed_of};
use iii_store::Layer;
use iii_store::tree::{DirKind, Node, Tree};

use crate::support::{Home, put, view};

pub fn files(home: &Home, files: &[(&[u8], &[u8])]) -> Arc<Layer> {
    let mut tree = Tree::implicit();
    for (path, bytes) in files {
        put(&mut tree, path, bytes);
    }
    let contents: Vec<&[u8]> = files.iter().map(|(_, bytes)| *bytes).collect();
    home.layer(&tree, &contents)
}

pub fn ino(fs: &Overlay, path: &[u8]) -> Ino {
    iii_store::tree::components(path)
        .try_fold(ROOT, |dir, name| fs.lookup(dir, name).map(|attr| attr.ino))
        .unwrap()
}

pub fn read(fs: &Overlay, ino: Ino) -> Vec<u8> {
    let mut bytes = vec![0; 1 << 16];
    let count = fs.read(ino, &mut bytes, 0).unwrap();
    bytes.truncate(count);
    bytes
}

pub fn create(fs: &Overlay, dir: Ino, name: &[u8]) -> Ino {
    fs.mknod(Caller::default(), dir, name, 0o644, Special::File)
        .unwrap()
        .ino
}

#[test]
fn a_second_opener_is_told_that_the_upper_is_busy() {
    let home = Home::new();
    let open = || {
        Overlay::open(
            &home.store,
            Vec::new(),
            &home.upper(),
            OverlayOptions::default(),
        )
    };
    let first = open().unwrap();
    assert!(matches!(
        open().unwrap_err(),
        OpenError::Upper(UpperError::Busy(dir)) if dir == home.upper()
    ));
    assert!(matches!(
        footing_of(&home.upper()),
        Err(UpperError::Busy(_))
    ));
    assert_eq!(thawed_of(&home.upper()).unwrap(), None);
    drop(first);
    assert_eq!(footing_of(&home.upper()).unwrap(), Some(Footing::default()));
    assert_eq!(footing_of(&home.dir.path().join("none")).unwrap(), None);
    open().unwrap();
}

/// After any cut at the end of the log of a killed process, the rest opens, and shows a state that
/// once existed.
#[test]
fn a_log_torn_anywhere_opens_at_an_earlier_state() {
    let home = Home::new();
    let layers = [files(&home, &[(b"d/lower", b"one")])];
    let overlay = home.open(&layers);
    let mut states = vec![view(&overlay)];
    let mut done = |fs: &Overlay| states.push(view(fs));
    let dir = ino(&overlay, b"d");
    create(&overlay, ROOT, b"a");
    done(&overlay);
    overlay
        .rename(dir, b"lower", ROOT, b"b", Rename::Replace)
        .unwrap();
    done(&overlay);
    overlay.unlink(ROOT, b"a").unwrap();
    done(&overlay);
    overlay
        .mkdir(Caller::default(), dir, b"sub", 0o755)
        .unwrap();
    done(&overlay);
    let log = home.upper().join("log");
    let mut bytes = std::fs::read(&log).unwrap();
    let end = bytes.iter().rposition(|&byte| byte != 0).unwrap() + 1;
    // This cut keeps a part of the space that is written ahead.
    bytes.truncate(end + 20);
    let killed = home.dir.path().join("killed");
    std::fs::create_dir(&killed).unwrap();
    let open = |bytes: &[u8]| {
        std::fs::write(killed.join("log"), bytes).unwrap();
        home.try_open(&layers, &killed, OverlayOptions::default())
    };
    let mut seen = BTreeSet::new();
    // The header and the first batches were synced before the log had its name.
    let durable = 48 + 12 + 100;
    for len in 0..=bytes.len() {
        let Ok(opened) = open(&bytes[..len]) else {
            assert!((1..durable).contains(&len), "{len}");
            continue;
        };
        let found = view(&opened);
        let state = states.iter().position(|state| *state == found);
        seen.insert(state.unwrap_or_else(|| panic!("{len} bytes open as no state that there was")));
    }
    assert_eq!(seen.len(), states.len());
    for at in 0..end {
        let mut bytes = bytes.clone();
        bytes[at] ^= 0x10;
        match open(&bytes) {
            Ok(opened) => assert!(states.contains(&view(&opened)), "byte {at}"),
            Err(_) => assert!(at < durable, "byte {at}"),
        }
    }
}

/// A killed process leaves no clean end, and data that no record names.
#[test]
fn a_kill_loses_nothing_that_was_answered() {
    let home = Home::new();
    let overlay = home.open(&[]);
    let file = create(&overlay, ROOT, b"f");
    overlay.write(file, b"hello", 3, true).unwrap();
    let before = view(&overlay);
    let copy = home.dir.path().join("copy");
    let status = std::process::Command::new("cp")
        .args(["-a".as_ref(), home.upper().as_os_str(), copy.as_os_str()])
        .status()
        .unwrap();
    assert!(status.success());
    std::fs::write(copy.join("data/0/257"), b"nobody's").unwrap();
    std::fs::write(copy.join("log.new"), b"half").unwrap();
    let again = home.open_at(&[], &copy, OverlayOptions::default());
    assert_eq!(view(&again), before);
    assert!(!copy.join("data/0/257").exists());
}

#[test]
fn copying_up_keeps_number_and_hardlinks() {
    let home = Home::new();
    let mut tree = Tree::implicit();
    for path in [&b"a/x"[..], b"b/y", b"hidden"] {
        put(&mut tree, path, b"shared");
    }
    let label = |tree: &mut Tree, dir: &[u8], name: &[u8]| {
        let dir = tree.dir_at(dir).unwrap();
        if let Some(Node::Leaf(leaf)) = dir.entries.get_mut(name) {
            leaf.link = Some(1);
        }
    };
    label(&mut tree, b"a", b"x");
    label(&mut tree, b"b", b"y");
    label(&mut tree, b"", b"hidden");
    let lower = home.layer(&tree, &[b"shared"]);
    let above = files(&home, &[(b"hidden", b"other")]);
    let overlay = home.open(&[lower, above]);
    let x = ino(&overlay, b"a/x");
    assert_eq!(overlay.getattr(x).unwrap().nlink, 2);
    assert_eq!(ino(&overlay, b"b/y"), x);
    overlay.write(x, b"S", 0, true).unwrap();
    assert_eq!(ino(&overlay, b"b/y"), x);
    assert_eq!(read(&overlay, x), b"Shared");
    assert_eq!(read(&overlay, ino(&overlay, b"hidden")), b"other");
    let a = ino(&overlay, b"a");
    overlay
        .rename(ROOT, b"a", ROOT, b"moved", Rename::Replace)
        .unwrap();
    assert_eq!(ino(&overlay, b"moved"), a);
    assert_eq!(ino(&overlay, b"moved/x"), x);
    overlay.unlink(a, b"x").unwrap();
    assert_eq!(overlay.getattr(x).unwrap().nlink, 1);
    let tree = home.frozen(&overlay);
    assert!(tree.get(b"b/y").is_some());
    assert!(matches!(tree.get(b"moved"), Some(Node::Dir(dir)) if dir.kind == DirKind::Merged));
}

#[test]
fn a_file_without_a_name_lives_until_it_is_forgotten() {
    let home = Home::new();
    let layers = [files(&home, &[(b"lower", b"lower"), (b"d/x", b"")])];
    let overlay = home.open(&layers);
    let own = create(&overlay, ROOT, b"own");
    overlay.write(own, b"own", 0, true).unwrap();
    let lower = ino(&overlay, b"lower");
    overlay.unlink(ROOT, b"own").unwrap();
    overlay.unlink(ROOT, b"lower").unwrap();
    for (file, bytes) in [(own, b"own".to_vec()), (lower, b"lower".to_vec())] {
        assert_eq!(overlay.getattr(file).unwrap().nlink, 0);
        assert_eq!(read(&overlay, file), bytes);
        overlay.write(file, b"!", bytes.len() as u64, true).unwrap();
        assert_eq!(read(&overlay, file).len(), bytes.len() + 1);
    }
    let dir = ino(&overlay, b"d");
    overlay.unlink(dir, b"x").unwrap();
    overlay.rmdir(ROOT, b"d").unwrap();
    let made = overlay.mknod(Caller::default(), dir, b"y", 0o644, Special::File);
    assert_eq!(made.unwrap_err(), Errno::NOENT);
    let flat = || std::fs::read_dir(home.upper().join("data")).unwrap();
    let files = || {
        flat()
            .flat_map(|dir| dir.unwrap().path().read_dir().unwrap())
            .count()
    };
    assert_eq!(files(), 2);
    overlay.forget(own, 1);
    overlay.forget(lower, 1);
    assert_eq!(files(), 0);
    assert_eq!(overlay.getattr(own).unwrap_err(), Errno::STALE);
    let unnamed = overlay.tmpfile(Caller::default(), ROOT, 0o600).unwrap();
    assert_eq!(unnamed.nlink, 0);
    assert_eq!(overlay.link(unnamed.ino, ROOT, b"named").unwrap().nlink, 1);
    drop(overlay);
    let overlay = home.open(&layers);
    assert_eq!(view(&overlay).len(), 2, "the root and what was named");
}

#[test]
fn refusals() {
    let home = Home::new();
    let overlay = home.open(&[files(&home, &[(b"d/f", b"1")])]);
    let (d, f) = (ino(&overlay, b"d"), ino(&overlay, b"d/f"));
    let long = [b'x'; 256];
    let me = Caller::default();
    let errors = [
        (overlay.lookup(ROOT, &long).map(drop), Errno::NAMETOOLONG),
        (overlay.lookup(f, b"x").map(drop), Errno::NOTDIR),
        (overlay.lookup(999, b"x").map(drop), Errno::STALE),
        (overlay.mkdir(me, ROOT, b"..", 0).map(drop), Errno::INVAL),
        (overlay.mkdir(me, ROOT, b"d", 0).map(drop), Errno::EXIST),
        (
            overlay.symlink(me, ROOT, b"s", &[b'x'; 4096]).map(drop),
            Errno::NAMETOOLONG,
        ),
        (overlay.unlink(ROOT, b"d"), Errno::ISDIR),
        (overlay.rmdir(ROOT, b"d"), Errno::NOTEMPTY),
        (overlay.rmdir(d, b"f"), Errno::NOTDIR),
        (overlay.link(d, ROOT, b"l").map(drop), Errno::PERM),
        (
            overlay.rename(ROOT, b"d", d, b"in", Rename::Replace),
            Errno::INVAL,
        ),
        (overlay.readlink(f).map(drop), Errno::INVAL),
        (overlay.read(d, &mut [0], 0).map(drop), Errno::ISDIR),
        (overlay.write(d, b"x", 0, true).map(drop), Errno::ISDIR),
        (
            overlay.write(f, b"x", u64::MAX, true).map(drop),
            Errno::FBIG,
        ),
        (overlay.lseek(f, 1, Seek::Data).map(drop), Errno::NXIO),
        (overlay.getxattr(f, b"user.no").map(drop), Errno::NODATA),
        (overlay.removexattr(f, b"user.no"), Errno::NODATA),
        (
            overlay.setxattr(f, b"user.a", b"", SetXattr::Replace),
            Errno::NODATA,
        ),
        (
            overlay.setxattr(f, b"system.posix_acl_access", b"", SetXattr::Set),
            Errno::OPNOTSUPP,
        ),
        (
            overlay.setxattr(f, b"user.a", &vec![0; 65_537], SetXattr::Set),
            Errno::TOOBIG,
        ),
        (overlay.readdir(f, 0, false, &mut |_| true), Errno::NOTDIR),
        (
            overlay.open(
                d,
                Open {
                    write: true,
                    ..Open::default()
                },
            ),
            Errno::ISDIR,
        ),
        (
            overlay
                .setattr(
                    d,
                    &SetAttr {
                        size: Some(0),
                        ..SetAttr::default()
                    },
                )
                .map(drop),
            Errno::ISDIR,
        ),
        (
            overlay.fallocate(f, Allocate::Grow, 0, 0, true),
            Errno::INVAL,
        ),
    ];
    for (at, (result, error)) in errors.into_iter().enumerate() {
        assert_eq!(result, Err(error), "case {at}");
    }
    let tree = home.frozen(&overlay);
    assert!(tree.entries.is_empty(), "{tree:?}");
}

#[test]
fn ranges() {
    let home = Home::new();
    let overlay = home.open(&[files(&home, &[(b"f", b"0123456789")])]);
    let f = ino(&overlay, b"f");
    let g = create(&overlay, ROOT, b"g");
    assert_eq!(overlay.copy_file_range(f, 2, g, 1, 100, true), Ok(8));
    assert_eq!(read(&overlay, g), b"\x0023456789");
    assert_eq!(overlay.copy_file_range(g, 1, f, 0, 2, true), Ok(2));
    assert_eq!(read(&overlay, f), b"2323456789");
    overlay
        .fallocate(f, Allocate::KeepSize, 0, 100, true)
        .unwrap();
    assert_eq!(overlay.getattr(f).unwrap().size, 10);
    overlay.fallocate(f, Allocate::Grow, 0, 12, true).unwrap();
    assert_eq!(overlay.getattr(f).unwrap().size, 12);
    overlay
        .fallocate(f, Allocate::PunchHole, 0, 2, true)
        .unwrap();
    assert_eq!(read(&overlay, f), b"\0\x0023456789\0\0");
    assert_eq!(overlay.lseek(f, 3, Seek::Data), Ok(3));
    assert_eq!(overlay.lseek(f, 0, Seek::Hole), Ok(12));
    let cut = SetAttr {
        size: Some(3),
        ..SetAttr::default()
    };
    assert_eq!(overlay.setattr(f, &cut).unwrap().size, 3);
    assert_eq!(read(&overlay, f), b"\0\x002");
    overlay.fsync(f, true).unwrap();
    overlay.fsync(ROOT, false).unwrap();
    assert_eq!(overlay.statfs().unwrap().name_max, 255);
}

/// Changes of metadata alone leave the data in its place.
#[test]
fn metadata_is_changed_without_copying_data() {
    let home = Home::new();
    let overlay = home.open(&[files(&home, &[(b"f", b"data"), (b"d/g", b"more")])]);
    let f = ino(&overlay, b"f");
    let mode = SetAttr {
        mode: Some(0o600),
        uid: Some(9),
        ..SetAttr::default()
    };
    overlay.setattr(f, &mode).unwrap();
    overlay
        .setxattr(f, b"trusted.t", b"v", SetXattr::Create)
        .unwrap();
    overlay.link(f, ROOT, b"l").unwrap();
    overlay
        .rename(ROOT, b"f", ROOT, b"h", Rename::Replace)
        .unwrap();
    overlay
        .rename(ROOT, b"d", ROOT, b"e", Rename::Replace)
        .unwrap();
    assert_eq!(read(&overlay, f), b"data");
    assert_eq!(read(&overlay, ino(&overlay, b"e/g")), b"more");
    let cut = SetAttr {
        size: Some(0),
        ..SetAttr::default()
    };
    overlay.setattr(ino(&overlay, b"e/g"), &cut).unwrap();
    assert_eq!(home.upper().join("data").read_dir().unwrap().count(), 0);
}

#[test]
fn requests_are_counted() {
    let home = Home::new();
    let overlay = home.open(&[]);
    create(&overlay, ROOT, b"a");
    let _ = overlay.lookup(ROOT, b"b");
    let counts: Vec<_> = overlay
        .stats()
        .into_iter()
        .filter(|(_, n)| *n > 0)
        .collect();
    assert_eq!(counts, [("lookup", 1), ("mknod", 1)]);
}

/// With a real store, the changes of a build step become a layer that shows the same.
#[test]
fn a_frozen_upper_is_a_layer_of_the_store() {
    let home = Home::new();
    let ingest = home.store.ingest(&home.lease).unwrap();
    let mut tree = Tree::implicit();
    put(&mut tree, b"lib/large", &vec![7; 1 << 21]);
    put(&mut tree, b"lib/small", b"small");
    ingest.add_bytes(&vec![7; 1 << 21]).unwrap();
    ingest.add_bytes(b"small").unwrap();
    let base = ingest.finish(&tree).unwrap();
    let base = home.store.layer(&base.layer_id).unwrap();
    let open = |layers: &[Arc<Layer>], upper: &str| {
        let upper = home.dir.path().join(upper);
        let options = OverlayOptions {
            volatile: true,
            ..OverlayOptions::default()
        };
        Overlay::open(&home.store, layers.to_vec(), &upper, options).unwrap()
    };
    let overlay = open(std::slice::from_ref(&base), "one");
    for (path, at) in [(&b"lib/large"[..], 1 << 20), (b"lib/small", 2)] {
        let file = ino(&overlay, path);
        overlay.write(file, b"new", at, true).unwrap();
    }
    let own = create(&overlay, ROOT, b"own");
    overlay.write(own, &vec![1; 100_000], 5, true).unwrap();
    let ingest = home.store.ingest(&home.lease).unwrap();
    let (tree, _) = overlay.freeze(&ingest).unwrap();
    let frozen = ingest.finish(&tree).unwrap();
    let frozen = home.store.layer(&frozen.layer_id).unwrap();
    let composed = open(&[base, frozen], "two");
    assert_eq!(view(&composed), view(&overlay));
}

/// A log of mostly overwritten changes is compacted to those that still hold.
#[test]
fn a_log_does_not_grow_without_end() {
    let home = Home::new();
    let overlay = home.open(&[]);
    let file = create(&overlay, ROOT, b"f");
    overlay.write(file, b"kept", 0, true).unwrap();
    let size = || home.upper().join("log").metadata().unwrap().len();
    let mut largest = 0;
    for uid in 0..100_000 {
        let set = SetAttr {
            uid: Some(uid),
            ..SetAttr::default()
        };
        overlay.setattr(file, &set).unwrap();
        if uid % 1000 == 0 {
            largest = largest.max(size());
        }
    }
    assert!((1 << 20..8 << 20).contains(&largest), "{largest}");
    let before = view(&overlay);
    drop(overlay);
    let overlay = home.open(&[]);
    assert_eq!(view(&overlay), before);
    assert_eq!(read(&overlay, ino(&overlay, b"f")), b"kept");
}
