//! Ingest, lookup, dedup.

use std::io::{self, Read};
use std::sync::Barrier;

use iii_store::tree::Tree;
use iii_store::{LOOSE_MIN, ObjectId, Store, StoreError};

use crate::helpers::{Files, add_files, check_whole, files, names, noise, publish, put, read_back};

/// Sizes around every boundary of the formats.
fn sizes() -> Files {
    let large = LOOSE_MIN as usize;
    [
        0,
        1,
        7,
        8,
        4095,
        4096,
        4097,
        100_000,
        (128 << 10) - 1,
        128 << 10,
        large - 1,
        large,
        large + 1,
        3 * large + 5,
    ]
    .into_iter()
    .map(|len| (format!("d/{len}").into_bytes(), noise(len, len as u64)))
    .collect()
}

#[test]
fn what_goes_in_comes_out() {
    let dir = tempfile::tempdir().unwrap();
    let files = sizes();
    let published = publish(&Store::open(dir.path()).unwrap(), &files).unwrap();
    assert_eq!(published.new_files, files.len() as u64);
    assert_eq!(
        published.new_bytes,
        files.values().map(|f| f.len() as u64).sum::<u64>()
    );
    assert!(!published.existed);
    assert_eq!(names(&dir.path().join("loose")).len(), 2 * 3);
    assert_eq!(names(&dir.path().join("packs")).len(), 2);
    // Another process sees the same.
    let store = Store::open(dir.path()).unwrap();
    let layer = store.layer(&published.layer_id).unwrap();
    assert_eq!(read_back(&store, &layer), files);
    assert_eq!(layer.tree_id(), published.tree_id);
    assert!(names(&dir.path().join("tmp")).is_empty());
    assert!(names(&dir.path().join("leases")).is_empty());
}

#[test]
fn every_way_in_gives_the_same_object() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path().join("store")).unwrap();
    let lease = store.lease("test").unwrap();
    for (path, bytes) in sizes() {
        let source = dir.path().join("source");
        std::fs::write(&source, &bytes).unwrap();
        let file = std::fs::File::open(&source).unwrap();
        let ingest = store.ingest(&lease).unwrap();
        let id = ObjectId::of(&bytes);
        let mut read = [false; 3];
        for (way, new) in read.iter_mut().enumerate() {
            let added = match way {
                0 => ingest.add_file(&file),
                1 => ingest.add_bytes(&bytes),
                // Gives a byte at a time at first.
                _ => ingest.add_reader(
                    &mut bytes[..bytes.len().min(3)].chain(&bytes[bytes.len().min(3)..]),
                ),
            }
            .unwrap();
            assert_eq!((added.object, added.size), (id, bytes.len() as u64));
            *new = added.new;
        }
        assert_eq!(
            read,
            [true, false, false],
            "{}",
            String::from_utf8_lossy(&path)
        );
        let mut tree = Tree::default();
        put(&mut tree, &path, id, bytes.len() as u64);
        assert_eq!(ingest.finish(&tree).unwrap().new_files, 1);
    }
    check_whole(store.dir());
}

#[test]
fn blobs_read_at_offsets() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    for len in [5000, LOOSE_MIN as usize + 10] {
        let bytes = noise(len, 1);
        publish(&store, &Files::from([(b"f".to_vec(), bytes.clone())])).unwrap();
        let blob = store.object(&ObjectId::of(&bytes)).unwrap();
        assert_eq!((blob.len(), blob.is_empty()), (len as u64, false));
        let mut buf = [0; 100];
        for (offset, count) in [
            (0, 100),
            (len - 100, 100),
            (len - 1, 1),
            (len, 0),
            (len + 5, 0),
        ] {
            assert_eq!(blob.read_at(&mut buf, offset as u64).unwrap(), count);
            assert_eq!(buf[..count], bytes[offset.min(len)..][..count]);
        }
        assert_eq!(blob.read_at(&mut buf, u64::MAX).unwrap(), 0);
        assert!(blob.read_all(len as u64 - 1).is_err());
    }
}

#[test]
fn contents_are_stored_once() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let mut all = sizes();
    publish(&store, &all).unwrap();
    let again = publish(&store, &all).unwrap();
    assert_eq!(
        (again.new_files, again.new_bytes, again.existed),
        (0, 0, true)
    );
    // Other names and one more file: one more object.
    all.insert(b"more".to_vec(), b"more".to_vec());
    all.insert(b"copy".to_vec(), noise(4096, 4096));
    let more = publish(&store, &all).unwrap();
    assert_eq!(
        (more.new_files, more.new_bytes, more.existed),
        (1, 4, false)
    );
    assert_eq!(check_whole(dir.path()), 2);
}

#[test]
fn an_ingest_that_is_dropped_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let lease = store.lease("test").unwrap();
    let ingest = store.ingest(&lease).unwrap();
    add_files(&ingest, &sizes()).unwrap();
    assert!(!names(&dir.path().join("tmp")).is_empty());
    drop(ingest);
    for name in ["tmp", "packs", "loose", "layers"] {
        assert!(names(&dir.path().join(name)).is_empty(), "{name}");
    }
}

#[test]
fn a_layer_never_names_what_is_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let lease = store.lease("test").unwrap();
    for size in [3, 3 << 20] {
        let mut tree = Tree::default();
        let absent = ObjectId::of(&noise(size, 9));
        put(&mut tree, b"f", absent, size as u64);
        let err = store.ingest(&lease).unwrap().finish(&tree).unwrap_err();
        assert!(matches!(err, StoreError::MissingObject(id) if id == absent));
    }
    assert_eq!(check_whole(dir.path()), 0);
}

#[test]
fn input_that_cannot_be_read_is_not_a_fault_of_the_store() {
    struct Broken(u64);
    impl Read for Broken {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            let count = self.0.min(buf.len() as u64);
            self.0 -= count;
            if count == 0 {
                return Err(io::ErrorKind::ConnectionReset.into());
            }
            Ok(count as usize)
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let lease = store.lease("test").unwrap();
    let ingest = store.ingest(&lease).unwrap();
    for before in [0, 10, 3 << 20] {
        let err = ingest.add_reader(&mut Broken(before)).unwrap_err();
        assert_eq!(err.io_kind(), Some(io::ErrorKind::ConnectionReset));
    }
    let tree = add_files(&ingest, &files(&[("a", "1")])).unwrap();
    assert_eq!(ingest.finish(&tree).unwrap().new_files, 1);
    assert!(names(&dir.path().join("loose")).is_empty());
}

/// Packs that another handle added are found, and hundreds of them cost a lookup no more than one.
#[test]
fn finds_objects_among_many_packs() {
    let dir = tempfile::tempdir().unwrap();
    let reader = Store::open(dir.path()).unwrap();
    let writer = Store::open(dir.path()).unwrap();
    let text = |n: u32| format!("file {n}").into_bytes();
    for n in 0..40 {
        assert!(!reader.contains(&ObjectId::of(&text(n))));
        publish(&writer, &Files::from([(b"f".to_vec(), text(n))])).unwrap();
        for seen in 0..=n {
            let id = ObjectId::of(&text(seen));
            assert!(reader.contains(&id), "{seen} after {n}");
            assert_eq!(
                reader.object(&id).unwrap().read_all(100).unwrap(),
                text(seen)
            );
        }
    }
    assert_eq!(names(&dir.path().join("packs")).len(), 80);
}

#[test]
fn threads_that_store_the_same_at_once_agree() {
    let dir = tempfile::tempdir().unwrap();
    let all: Files = (0..200)
        .map(|n| (format!("{n}").into_bytes(), noise(n * 50, n as u64)))
        .chain([(b"large".to_vec(), noise(2 << 20, 0))])
        .collect();
    let barrier = Barrier::new(4);
    let run = || {
        let store = Store::open(dir.path()).unwrap();
        barrier.wait();
        publish(&store, &all).unwrap()
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(run)).collect();
        let ids: Vec<_> = threads
            .into_iter()
            .map(|t| t.join().unwrap().layer_id)
            .collect();
        assert!(ids.windows(2).all(|pair| pair[0] == pair[1]));
    });
    assert_eq!(check_whole(dir.path()), 1);
    assert!(names(&dir.path().join("tmp")).is_empty());
}

#[test]
fn threads_of_one_ingest_share_one_pack() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let lease = store.lease("test").unwrap();
    let ingest = store.ingest(&lease).unwrap();
    let all: Files = (0..400)
        .map(|n| {
            (
                format!("{n}").into_bytes(),
                noise((n * 997) % 300_000, n as u64 / 2),
            )
        })
        .collect();
    let new: usize = std::thread::scope(|scope| {
        let part = |skip| {
            let (all, ingest) = (&all, &ingest);
            move || {
                let own = all.values().cycle().skip(skip).take(all.len());
                own.filter(|bytes| ingest.add_bytes(bytes).unwrap().new)
                    .count()
            }
        };
        let threads: Vec<_> = (0..4).map(|n| scope.spawn(part(n * 100))).collect();
        threads.into_iter().map(|t| t.join().unwrap()).sum()
    });
    let tree = add_files(&ingest, &all).unwrap();
    let published = ingest.finish(&tree).unwrap();
    assert_eq!(published.new_files, new as u64);
    assert_eq!(names(&dir.path().join("packs")).len(), 2);
    let layer = store.layer(&published.layer_id).unwrap();
    assert_eq!(read_back(&store, &layer), all);
}

/// More loose files than are held open for syncing, and more than are held open for reading.
#[test]
fn many_large_files() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let all: Files = (0..140)
        .map(|n| (format!("{n}").into_bytes(), noise(LOOSE_MIN as usize, n)))
        .collect();
    let published = publish(&store, &all).unwrap();
    assert_eq!(published.new_files, 140);
    let layer = store.layer(&published.layer_id).unwrap();
    assert_eq!(read_back(&store, &layer), all);
}
