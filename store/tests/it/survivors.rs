//! One damaged byte costs no more than the file that has it: refs stay, with the whole layers that
//! they name, and the lost data may come back.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use iii_store::tree::{Mtime, Node, Tree};
use iii_store::{Finding, LayerId, ObjectId, Policy, Ref, RefKind, Store, StoreError};

use crate::flips::{open, stored_files, verify};
use crate::helpers::{Files, add_files, files, publish, read_back};

/// A base image, and the layers that were built and written on it.
struct Sample {
    base: LayerId,
    project: LayerId,
    frozen: LayerId,
}

/// The base. A frozen upper names one of its objects, too: the worker changed the mode of that
/// file.
fn base() -> Files {
    files(&[("bin/sh", "a shell"), ("etc/shared", "of base and upper")])
}

fn frozen() -> Files {
    files(&[
        ("etc/shared", "of base and upper"),
        ("home/own", "a letter"),
    ])
}

fn layers(layers: &[LayerId]) -> Ref {
    Ref {
        layers: layers.to_vec(),
        info: serde_json::Value::Null,
    }
}

fn fill(dir: &Path) -> Sample {
    let store = open(dir).unwrap();
    let base = publish(&store, &base()).unwrap().layer_id;
    let project = files(&[("workspace/main.py", "print()")]);
    let project = publish(&store, &project).unwrap().layer_id;
    let frozen = publish(&store, &frozen()).unwrap().layer_id;
    let refs = [
        (RefKind::Image, "debian", vec![base]),
        (RefKind::Worker, "box", vec![base, project]),
        (RefKind::Snapshot, "box@one", vec![base, project, frozen]),
    ];
    for (kind, name, named) in refs {
        store.set_ref(kind, name, &layers(&named)).unwrap();
    }
    Sample {
        base,
        project,
        frozen,
    }
}

/// The place of the bytes, in one file of a directory of the store.
fn find(dir: &Path, bytes: &[u8]) -> (PathBuf, usize) {
    let files = stored_files(dir).into_iter();
    let found = files.filter_map(|file| {
        let path = dir.join(file);
        let all = fs::read(&path).unwrap();
        let at = all.windows(bytes.len()).position(|part| part == bytes)?;
        Some((path, at))
    });
    found.into_iter().next().unwrap()
}

/// The damage of a sample: a file and an offset.
type Harm = fn(&Path, &Sample) -> (PathBuf, usize);

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 1;
    fs::remove_file(path).unwrap();
    fs::write(path, bytes).unwrap();
}

fn repair_and_collect(dir: &Path) {
    let store = open(dir).unwrap();
    let report = verify(&store, true);
    store.repair(&report, &|_| ()).unwrap();
    let policy = Policy {
        keep: Duration::ZERO,
        grace: Duration::ZERO,
        ..Policy::default()
    };
    for _ in 0..2 {
        let plan = store.plan_gc(&policy).unwrap();
        store.gc(&plan, &|event| panic!("{event:?}")).unwrap();
    }
}

#[test]
fn what_was_whole_survives_a_flipped_bit_and_the_rest_comes_back() {
    let harms: [(&str, Harm); 4] = [
        ("the base's layer", |dir, sample| {
            (dir.join("layers").join(sample.base.to_string()), 300)
        }),
        ("an object of the base alone", |dir, _| {
            find(&dir.join("packs"), b"a shell")
        }),
        ("an object of the base and the upper", |dir, _| {
            find(&dir.join("packs"), b"of base and upper")
        }),
        ("the base's index", |dir, _| {
            let (pack, _) = find(&dir.join("packs"), b"a shell");
            (pack.with_extension("idx"), 1100)
        }),
    ];
    for (what, harm) in harms {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let sample = fill(dir);
        let (path, at) = harm(dir, &sample);
        flip(&path, at);
        repair_and_collect(dir);

        let store = open(dir).unwrap();
        for (kind, name, count) in [
            (RefKind::Image, "debian", 1),
            (RefKind::Worker, "box", 2),
            (RefKind::Snapshot, "box@one", 3),
        ] {
            let kept = store.get_ref(kind, name).unwrap().unwrap();
            assert_eq!(kept.layers.len(), count, "{what}: {name}");
        }
        let lost = store.layer(&sample.base);
        assert!(matches!(lost, Err(StoreError::MissingLayer(_))), "{what}");
        let told = verify(&store, true);
        let told = told.problems.iter();
        let told = told.filter(|problem| matches!(problem.finding, Finding::RefLayer { .. }));
        assert!(told.count() >= 3, "{what}");
        read_back(&store, &store.layer(&sample.project).unwrap());
        assert!(store.contains(&ObjectId::of(b"a letter")), "{what}");
        drop(store);

        // The base is imported again, by a process that knows nothing of this.
        let store = open(dir).unwrap();
        let again = publish(&store, &base()).unwrap();
        assert_eq!(again.layer_id, sample.base, "{what}");
        assert!(verify(&store, true).is_clean(), "{what}");
        let kept = store.get_ref(RefKind::Snapshot, "box@one").unwrap();
        let read = kept.unwrap().layers.into_iter().map(|id| {
            let layer = store
                .layer(&id)
                .unwrap_or_else(|err| panic!("{what}: {err}"));
            read_back(&store, &layer)
        });
        let read: Vec<Files> = read.collect();
        assert_eq!(read[2], frozen(), "{what}");
        assert!(store.has_layer(&sample.frozen), "{what}");
        repair_and_collect(dir);
        assert!(verify(&open(dir).unwrap(), true).is_clean(), "{what}");
    }
}

/// The same tree with other mtimes, as a step makes it that is run again.
fn publish_later(store: &Store, of: &Files) -> LayerId {
    let lease = store.lease("test").unwrap();
    let ingest = store.ingest(&lease).unwrap();
    let mut tree: Tree = add_files(&ingest, of).unwrap();
    for node in tree.entries.values_mut() {
        if let Node::Leaf(leaf) = node {
            leaf.meta.mtime = Mtime { sec: 8, nsec: 0 };
        }
    }
    ingest.finish(&tree).unwrap().layer_id
}

#[test]
fn a_layer_of_the_same_tree_serves_in_place_of_one_that_is_lost() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let store = open(dir).unwrap();
    let install = files(&[("lib", "installed")]);
    let first = publish(&store, &install).unwrap().layer_id;
    let other = publish(&store, &files(&[("lib", "other")])).unwrap();
    let content = layers(&[first, other.layer_id]);
    store.set_ref(RefKind::Worker, "box", &content).unwrap();
    let refused = store.set_ref(
        RefKind::Worker,
        "new",
        &layers(&[LayerId::from_bytes([1; 32])]),
    );
    assert!(matches!(refused, Err(StoreError::MissingLayer(_))));
    drop(store);
    flip(&dir.join("layers").join(first.to_string()), 300);
    repair_and_collect(dir);

    let store = open(dir).unwrap();
    let lost = store.layer_or_same_tree(&first);
    assert!(matches!(lost, Err(StoreError::MissingLayer(_))));
    let second = publish_later(&store, &install);
    assert_ne!(second, first);
    // The ref may be changed and keeps what it knows of the lost layer.
    let content = layers(&[second, first, other.layer_id]);
    store.set_ref(RefKind::Worker, "box", &content).unwrap();
    let store = open(dir).unwrap();
    let serves = store.layer_or_same_tree(&first).unwrap();
    assert_eq!(serves.layer_id(), second);
    assert!(verify(&store, true).is_clean());
}
