//! Rules of POSIX and of Linux that models do not reach.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use iii_overlay::fs::{
    Allocate, Caller, Errno, Filesystem, Rename, SetAttr, SetXattr, Special, Time,
};
use iii_overlay::ino::{Ino, ROOT};
use iii_overlay::{Overlay, OverlayOptions};
use iii_store::Layer;
use iii_store::tree::{Content, Leaf, Meta, Node, Tree};
use rustix::time::{ClockId, clock_gettime};

use crate::support::{Home, names, put};

const CAPABILITY: &[u8] = b"security.capability";

fn create(fs: &Overlay, name: &[u8]) -> Ino {
    let made = fs.mknod(Caller::default(), ROOT, name, 0o644, Special::File);
    made.unwrap().ino
}

fn layer(home: &Home, files: &[(&[u8], &[u8])]) -> Arc<Layer> {
    let mut tree = Tree::implicit();
    for (path, bytes) in files {
        put(&mut tree, path, bytes);
    }
    let contents: Vec<&[u8]> = files.iter().map(|(_, bytes)| *bytes).collect();
    home.layer(&tree, &contents)
}

/// A change of a file's contents; `kill` is true if its caller may not keep setuid and setgid.
type Change = fn(&Overlay, file: Ino, kill: bool);

const CHANGES: [(&str, Change); 6] = [
    ("write", |fs, file, kill| {
        fs.write(file, b"new", 1, kill).unwrap();
    }),
    ("truncate", |fs, file, kill_suid| {
        let set = SetAttr {
            size: Some(2),
            kill_suid,
            ..SetAttr::default()
        };
        fs.setattr(file, &set).unwrap();
    }),
    ("fallocate", |fs, file, kill| {
        fs.fallocate(file, Allocate::Grow, 0, 100, kill).unwrap();
    }),
    ("punch", |fs, file, kill| {
        fs.fallocate(file, Allocate::PunchHole, 0, 2, kill).unwrap();
    }),
    ("copy", |fs, file, kill| {
        let other = fs.lookup(ROOT, b"other").unwrap().ino;
        assert_eq!(fs.copy_file_range(other, 0, file, 0, 5, kill), Ok(5));
    }),
    // The kernel announces each other change with this request.
    ("announcement", |fs, file, kill_suid| {
        let set = SetAttr {
            kill_suid,
            ..SetAttr::default()
        };
        fs.setattr(file, &set).unwrap();
    }),
];

#[test]
fn privileges_go_when_contents_change() {
    // The mode before and after a change by a caller that may not keep these bits.
    let modes = [
        (0o4755, 0o755),
        (0o2755, 0o755),
        (0o6711, 0o711),
        // This bit marks a file with mandatory locks, so it stays.
        (0o2644, 0o2644),
        (0o644, 0o644),
    ];
    let home = Home::new();
    let layers = [layer(&home, &[(b"lower", b"01234"), (b"other", b"other")])];
    let overlay = home.open(&layers);
    let own = create(&overlay, b"own");
    let lower = overlay.lookup(ROOT, b"lower").unwrap().ino;
    for file in [own, lower] {
        for (what, change) in CHANGES {
            for (mode, stripped) in modes {
                for kill in [false, true] {
                    let set = SetAttr {
                        mode: Some(mode),
                        ..SetAttr::default()
                    };
                    overlay.setattr(file, &set).unwrap();
                    change(&overlay, file, kill);
                    let now = overlay.getattr(file).unwrap().mode;
                    let want = if kill { stripped } else { mode };
                    assert_eq!(now, want, "{what} of {mode:o}, kill {kill}");
                }
            }
        }
    }
}

#[test]
fn capabilities_go_when_contents_or_the_owner_change() {
    let home = Home::new();
    let layers = [layer(&home, &[(b"other", b"other")])];
    let overlay = home.open(&layers);
    let file = create(&overlay, b"f");
    overlay.write(file, b"01234", 0, false).unwrap();
    let owner: Change = |fs, file, _| {
        let set = SetAttr {
            uid: Some(7),
            ..SetAttr::default()
        };
        fs.setattr(file, &set).unwrap();
    };
    for (what, change) in CHANGES.into_iter().take(5).chain([("owner", owner)]) {
        overlay
            .setxattr(file, CAPABILITY, b"c", SetXattr::Set)
            .unwrap();
        change(&overlay, file, false);
        let left = overlay.getxattr(file, CAPABILITY);
        assert_eq!(left, Err(Errno::NODATA), "{what}");
    }
}

#[test]
fn trusted_names_are_for_root() {
    let home = Home::new();
    let overlay = home.open(&[]);
    let file = create(&overlay, b"f");
    for name in [&b"trusted.a"[..], b"user.b"] {
        overlay.setxattr(file, name, b"", SetXattr::Set).unwrap();
    }
    let list = |uid| {
        let caller = Caller { uid, gid: 0 };
        overlay.listxattr(file, caller).unwrap()
    };
    assert_eq!(list(0), b"trusted.a\0user.b\0");
    assert_eq!(list(1), b"user.b\0");
}

/// Lists the root one entry at a time, with `between` after each, and returns the number of times
/// that each name came. Panics if it goes on for more than `most` entries.
fn list(fs: &Overlay, most: usize, mut between: impl FnMut(&[u8])) -> BTreeMap<Vec<u8>, usize> {
    let mut seen = BTreeMap::new();
    let mut cookie = 0;
    for _ in 0..=most {
        let mut found = None;
        fs.readdir(ROOT, cookie, false, &mut |entry| {
            if found.is_some() {
                return false;
            }
            cookie = entry.cookie;
            found = Some(entry.name.to_vec());
            true
        })
        .unwrap();
        let Some(name) = found else {
            return seen;
        };
        if name != b"." && name != b".." {
            between(&name);
            *seen.entry(name).or_default() += 1;
        }
    }
    panic!("the listing goes on after {most} entries");
}

#[test]
fn a_listing_ends_whatever_is_renamed_or_made_meanwhile() {
    const FILES: usize = 50;
    type Meanwhile = fn(&Overlay, name: &[u8], count: usize);
    let meanwhile: [(&str, Meanwhile); 4] = [
        ("renamed away and back", |fs, name, _| {
            fs.rename(ROOT, name, ROOT, b"tmp", Rename::Replace)
                .unwrap();
            fs.rename(ROOT, b"tmp", ROOT, name, Rename::Replace)
                .unwrap();
        }),
        ("made again", |fs, name, _| {
            fs.unlink(ROOT, name).unwrap();
            create(fs, name);
        }),
        ("renamed", |fs, name, count| {
            let new = format!("new{count}");
            fs.rename(ROOT, name, ROOT, new.as_bytes(), Rename::Replace)
                .unwrap();
        }),
        ("made", |fs, _, count| {
            create(fs, format!("new{count}").as_bytes());
        }),
    ];
    for (what, meanwhile) in meanwhile {
        let home = Home::new();
        let lower: Vec<String> = (0..FILES).map(|n| format!("lower{n}")).collect();
        let lower: Vec<(&[u8], &[u8])> = lower
            .iter()
            .map(|name| (name.as_bytes(), &b""[..]))
            .collect();
        let overlay = home.open(&[layer(&home, &lower)]);
        for number in 0..FILES {
            create(&overlay, format!("own{number}").as_bytes());
        }
        let mut count = 0;
        let seen = list(&overlay, 2 * FILES + 4, |name| {
            meanwhile(&overlay, name, count);
            count += 1;
        });
        assert_eq!(seen.len(), 2 * FILES, "{what}");
        assert!(seen.values().all(|&times| times == 1), "{what}");
    }
}

/// A name that stays is listed once, while others come and go, and every listing begun afterwards
/// has all names.
#[test]
fn names_that_stay_are_listed_once() {
    let home = Home::new();
    let overlay = home.open(&[]);
    for number in 0..40 {
        create(&overlay, format!("stay{number}").as_bytes());
        create(&overlay, format!("go{number}").as_bytes());
    }
    let mut count = 0;
    let seen = list(&overlay, 200, |_| {
        let _ = overlay.unlink(ROOT, format!("go{count}").as_bytes());
        create(&overlay, format!("come{count}").as_bytes());
        count += 1;
    });
    let stay = |(name, _): &(&Vec<u8>, &usize)| name.starts_with(b"stay");
    let stayed: Vec<_> = seen.iter().filter(stay).collect();
    assert_eq!(stayed.len(), 40);
    assert!(stayed.iter().all(|(_, times)| **times == 1));
    assert_eq!(names(&overlay, ROOT, false).len(), 2 + 40 + count);
}

/// A 32-bit program without large-file support gets `EOVERFLOW` for larger positions.
#[test]
fn numbers_fit_32_bits() {
    let home = Home::new();
    let layers: Vec<_> = (0..20)
        .map(|n| layer(&home, &[(format!("d/l{n}").as_bytes(), b"x")]))
        .collect();
    let overlay = home.open(&layers);
    let dir = overlay.lookup(ROOT, b"d").unwrap().ino;
    for number in 0..20 {
        let name = format!("own{number}");
        overlay
            .mkdir(Caller::default(), dir, name.as_bytes(), 0o755)
            .unwrap();
    }
    overlay.unlink(dir, b"l3").unwrap();
    let mut count = 0;
    overlay
        .readdir(dir, 0, true, &mut |entry| {
            count += 1;
            assert!(u32::try_from(entry.ino).is_ok(), "{}", entry.ino);
            // `off_t` is signed.
            assert!(i32::try_from(entry.cookie).is_ok(), "{}", entry.cookie);
            true
        })
        .unwrap();
    assert_eq!(count, 2 + 20 + 19);
}

/// The time by the clock from which the kernel takes the times of files.
fn clock() -> Time {
    let now = clock_gettime(ClockId::RealtimeCoarse);
    Time {
        sec: now.tv_sec,
        nsec: now.tv_nsec as u32,
    }
}

/// With this clock, a file that is newer than one on another filesystem does not look older.
#[test]
fn times_come_from_the_clock_of_the_kernels_files() {
    let home = Home::new();
    let overlay = home.open(&[]);
    let file = create(&overlay, b"f");
    for _ in 0..100 {
        let before = clock();
        overlay.write(file, b"x", 0, false).unwrap();
        let after = clock();
        let mtime = overlay.getattr(file).unwrap().mtime;
        assert!(
            before <= mtime && mtime <= after,
            "{before:?} {mtime:?} {after:?}"
        );
    }
}

#[test]
fn no_time_goes_back_by_a_kill() {
    let home = Home::new();
    let overlay = home.open(&[]);
    let files: Vec<Ino> = (0..200)
        .map(|n| create(&overlay, format!("f{n}").as_bytes()))
        .collect();
    for round in 0..5 {
        for &file in &files {
            overlay.write(file, b"x", round, false).unwrap();
        }
    }
    let copy = home.dir.path().join("copy");
    let status = std::process::Command::new("cp")
        .args(["-a".as_ref(), home.upper().as_os_str(), copy.as_os_str()])
        .status()
        .unwrap();
    assert!(status.success());
    let again = home.open_at(&[], &copy, OverlayOptions::default());
    for (number, file) in files.into_iter().enumerate() {
        let was = overlay.getattr(file).unwrap().mtime;
        let name = format!("f{number}");
        let is = again.lookup(ROOT, name.as_bytes()).unwrap().mtime;
        assert!(was <= is, "{name}: {was:?} became {is:?}");
    }
}

/// Bytes of the host's disk that the files below a directory take.
fn blocks(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).unwrap().map(Result::unwrap);
    entries
        .map(|entry| match entry.metadata().unwrap() {
            meta if meta.is_dir() => blocks(&entry.path()),
            meta => meta.blocks() * 512,
        })
        .sum()
}

/// Bytes of the host's disk that the flat files of the upper take.
fn used(home: &Home) -> u64 {
    blocks(&home.upper().join("data"))
}

/// Copies a small file from a pack, and a large file that is a file of the store.
#[test]
fn holes_stay_holes_when_a_file_is_copied_up() {
    const MOST: u64 = 64 << 10;
    /// The store also has hashes of the pieces.
    const MOST_STORED: u64 = 1 << 20;
    for size in [400_000_u64, 64 << 20] {
        let home = Home::new();
        let sparse = tempfile::tempfile().unwrap();
        sparse.set_len(size).unwrap();
        sparse.write_all_at(b"head", 0).unwrap();
        sparse.write_all_at(b"middle", size / 2 - 3).unwrap();
        let ingest = home.store.ingest(&home.lease).unwrap();
        let added = ingest.add_file(&sparse).unwrap();
        let stored = blocks(&home.dir.path().join("store"));
        assert!(
            stored <= MOST_STORED,
            "{stored} bytes in the store of {size}"
        );
        let mut tree = Tree::default();
        let leaf = Leaf {
            meta: Meta::default(),
            content: Content::File {
                object: added.object,
                size,
            },
            link: None,
        };
        tree.entries.insert((*b"f").into(), Node::Leaf(leaf));
        let id = ingest.finish(&tree).unwrap().layer_id;
        let layers = vec![home.store.layer(&id).unwrap()];
        let options = OverlayOptions::default();
        let overlay = Overlay::open(&home.store, layers, &home.upper(), options).unwrap();
        let file = overlay.lookup(ROOT, b"f").unwrap().ino;
        overlay.write(file, b"!", size, false).unwrap();
        assert!(used(&home) <= MOST, "{} bytes of {size}", used(&home));
        let is = contents(&overlay, file);
        sparse.write_all_at(b"!", size).unwrap();
        assert!(is == all(&sparse), "the contents of {size} bytes changed");
        assert!(overlay.getattr(file).unwrap().blocks * 512 <= MOST);
        // Freezing takes no more space, and the contents are the same.
        let before = blocks(&home.dir.path().join("store"));
        let ingest = home.store.ingest(&home.lease).unwrap();
        let (tree, _) = overlay.freeze(&ingest).unwrap();
        let id = ingest.finish(&tree).unwrap().layer_id;
        let stored = blocks(&home.dir.path().join("store")) - before;
        assert!(stored <= MOST_STORED, "{stored} bytes frozen of {size}");
        let layers = vec![home.store.layer(&id).unwrap()];
        let (upper, options) = (home.dir.path().join("other"), OverlayOptions::default());
        let overlay = Overlay::open(&home.store, layers, &upper, options).unwrap();
        let file = overlay.lookup(ROOT, b"f").unwrap().ino;
        assert!(contents(&overlay, file) == is);
    }
}

fn contents(fs: &Overlay, file: Ino) -> Vec<u8> {
    let mut bytes = vec![0; fs.getattr(file).unwrap().size as usize];
    let count = fs.read(file, &mut bytes, 0).unwrap();
    assert_eq!(count, bytes.len());
    bytes
}

fn all(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}
