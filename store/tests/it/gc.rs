//! The choices of a collection: which layers it keeps, which it frees, and when.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use iii_store::{
    GcEvent, GcPlan, GcReport, KeyId, LOOSE_MIN, LayerId, ObjectId, Policy, Published, Record, Ref,
    RefKind, Root, Store, StoreError, Why,
};

use crate::helpers::{
    Files, NoSync, add_files, check_whole, files, names, noise, publish, read_back,
};

const DAY: Duration = Duration::from_secs(86_400);

/// No grace period and no limits.
fn at_once() -> Policy {
    Policy {
        keep: 14 * DAY,
        max_bytes: None,
        min_free: None,
        grace: Duration::ZERO,
    }
}

fn collect(store: &Store, policy: &Policy) -> (GcPlan, GcReport) {
    let plan = store.plan_gc(policy).unwrap();
    let report = store
        .gc(&plan, &|event| assert_eq!(event, GcEvent::Waiting))
        .unwrap();
    (plan, report)
}

fn set_ref(store: &Store, name: &str, layers: &[&Published]) {
    let content = Ref {
        layers: layers.iter().map(|layer| layer.layer_id).collect(),
        info: serde_json::Value::Null,
    };
    store.set_ref(RefKind::Worker, name, &content).unwrap();
}

#[test]
fn refs_of_every_kind_keep_their_layers() {
    for kind in RefKind::ALL {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let kept = publish(&store, &files(&[("kept", "kept")])).unwrap();
        let garbage = publish(&store, &files(&[("garbage", "garbage")])).unwrap();
        let content = Ref {
            layers: vec![kept.layer_id],
            info: serde_json::Value::Null,
        };
        store.set_ref(kind, "name", &content).unwrap();
        let (plan, _) = collect(&store, &at_once());
        assert_eq!(plan.layers.len(), 1, "{kind:?}");
        assert_eq!(plan.layers[0].layer, garbage.layer_id, "{kind:?}");
        assert_eq!(layers(&store), [kept.layer_id.to_string()], "{kind:?}");
    }
}

fn put_record(store: &Store, key: u8, layer: &Published, seconds: u64) {
    let record = Record {
        facts: Vec::new(),
        layer_id: layer.layer_id,
        tree_id: layer.tree_id,
        provenance: serde_json::Map::from_iter([("seconds".to_owned(), seconds.into())]),
    };
    let key = KeyId::from_bytes([key; 32]);
    store.put_record(&key, record).unwrap();
}

fn age(store: &Store, layer: &LayerId, age: Duration) {
    let path = store.dir().join("layers").join(layer.to_string());
    let file = std::fs::File::open(path).unwrap();
    file.set_modified(SystemTime::now() - age).unwrap();
}

fn layers(store: &Store) -> Vec<String> {
    names(&store.dir().join("layers"))
}

/// Asserts that these directories are empty.
fn assert_empty(dir: &Path, kinds: &[&str]) {
    for kind in kinds {
        let left = names(&dir.join(kind));
        assert!(left.is_empty(), "{kind} holds {left:?}");
    }
}

#[test]
fn what_nobody_names_goes_and_the_rest_stays() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let large: Files = [
        (b"large".to_vec(), noise(LOOSE_MIN as usize, 1)),
        (b"shared".to_vec(), noise(5000, 2)),
    ]
    .into();
    let garbage = publish(&store, &large).unwrap();
    let kept = publish(
        &store,
        &[
            (b"shared".to_vec(), noise(5000, 2)),
            (b"own".to_vec(), noise(100, 3)),
        ]
        .into(),
    )
    .unwrap();
    set_ref(&store, "kept", &[&kept]);
    let before = store.bytes_on_disk().unwrap();
    let (plan, report) = collect(&store, &at_once());
    assert_eq!(plan.layers.len(), 1);
    assert_eq!(plan.layers[0].layer, garbage.layer_id);
    assert_eq!(plan.kept.len(), 1);
    let worker = Root::Ref {
        kind: RefKind::Worker,
        name: "kept".into(),
    };
    assert_eq!(plan.kept[0].roots, [worker]);
    assert_eq!((plan.objects, plan.object_bytes), (1, LOOSE_MIN));
    assert_eq!(report.layers_removed, 1);
    assert_eq!(report.files_removed, 1);
    assert!(report.freed >= LOOSE_MIN, "{report:?}");
    assert!(store.bytes_on_disk().unwrap() <= before - LOOSE_MIN);
    assert_eq!(layers(&store), [kept.layer_id.to_string()]);
    assert_empty(dir.path(), &["loose", "trash", "tmp", "leases", "locks"]);
    assert_eq!(check_whole(dir.path()), 1);
    // The next collection has nothing to do.
    let (plan, report) = collect(&store, &at_once());
    assert!(plan.layers.is_empty() && plan.objects == 0);
    assert_eq!(report, GcReport::default());
    // The collected layer can be built again.
    assert_eq!(publish(&store, &large).unwrap().layer_id, garbage.layer_id);
    assert_eq!(check_whole(dir.path()), 2);
}

#[test]
fn a_store_that_nobody_uses_is_not_emptied() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    // An empty store is fine.
    collect(&store, &at_once());
    publish(&store, &files(&[("a", "a")])).unwrap();
    let refused = store.plan_gc(&at_once());
    assert!(matches!(
        refused,
        Err(StoreError::NothingKept { layers: 1, .. })
    ));
    assert_eq!(check_whole(dir.path()), 1);
}

#[test]
fn a_lease_keeps_what_it_pins_until_it_ends() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let root = publish(&store, &files(&[("root", "root")])).unwrap();
    set_ref(&store, "root", &[&root]);
    let layer = publish(&store, &files(&[("a", "a")])).unwrap();
    let lease = store.lease("a sandbox").unwrap();
    lease.pin(&[layer.layer_id]).unwrap();
    let (plan, _) = collect(&store, &at_once());
    let sandbox = Root::Lease {
        purpose: "a sandbox".into(),
    };
    let kept = plan.kept.iter().find(|kept| kept.layer == layer.layer_id);
    assert_eq!(kept.unwrap().roots, [sandbox]);
    assert_eq!(check_whole(dir.path()), 2);
    drop(lease);
    collect(&store, &at_once());
    assert_eq!(layers(&store), [root.layer_id.to_string()]);
}

type Made = (Duration, u64, usize);

#[test]
#[expect(clippy::type_complexity, reason = "a table")]
fn records_go_when_they_are_old_or_the_store_is_large() {
    let unused = Duration::from_secs(20 * 86_400);
    // Age, seconds to build and bytes of two layers; the limits; why each goes, if it does.
    let cases: [(&str, [Made; 2], Policy, [Option<Why>; 2]); 5] = [
        (
            "young",
            [(DAY, 1, 10), (DAY, 1, 10)],
            at_once(),
            [None, None],
        ),
        (
            "one is old",
            [(unused, 1000, 10), (DAY, 1, 10)],
            at_once(),
            [Some(Why::Unused), None],
        ),
        (
            "the cheap one goes first",
            [(DAY, 1, 500_000), (DAY, 60, 500_000)],
            Policy {
                max_bytes: Some(800_000),
                ..at_once()
            },
            [Some(Why::MaxSize), None],
        ),
        (
            "the older one goes first",
            [(DAY, 60, 500_000), (8 * DAY, 60, 500_000)],
            Policy {
                max_bytes: Some(800_000),
                ..at_once()
            },
            [None, Some(Why::MaxSize)],
        ),
        (
            "the disk is full",
            [(DAY, 60, 500_000), (DAY, 60, 500_000)],
            Policy {
                min_free: Some(u64::MAX),
                ..at_once()
            },
            [Some(Why::MinFree), Some(Why::MinFree)],
        ),
    ];
    for (name, made, policy, expected) in cases {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let root = publish(&store, &files(&[("root", "root")])).unwrap();
        set_ref(&store, "root", &[&root]);
        let published: Vec<Published> = made
            .iter()
            .enumerate()
            .map(|(n, (_, seconds, bytes))| {
                let files: Files = [(b"f".to_vec(), noise(*bytes, n as u64))].into();
                let layer = publish(&store, &files).unwrap();
                put_record(&store, n as u8, &layer, *seconds);
                layer
            })
            .collect();
        for (layer, (old, ..)) in published.iter().zip(&made) {
            age(&store, &layer.layer_id, *old);
        }
        let (plan, report) = collect(&store, &policy);
        for (n, (layer, expected)) in published.iter().zip(expected).enumerate() {
            let key = KeyId::from_bytes([n as u8; 32]);
            let dropped = plan.records.iter().find(|record| record.key == key);
            assert_eq!(dropped.map(|record| record.why), expected, "{name}: {n}");
            let left = store.records(&key).unwrap().len();
            assert_eq!(left, usize::from(expected.is_none()), "{name}: {n}");
            assert_eq!(store.has_layer(&layer.layer_id), expected.is_none());
        }
        let gone = expected.iter().flatten().count() as u64;
        assert_eq!(
            (report.records, report.layers_removed),
            (gone, gone),
            "{name}"
        );
        assert_eq!(plan.still_over > 0, policy.min_free.is_some(), "{name}");
        assert_eq!(names(&dir.path().join("keys")).len(), 2 - gone as usize);
        check_whole(dir.path());
    }
}

#[test]
fn a_layer_in_the_trash_is_taken_back_by_who_asks_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let root = publish(&store, &files(&[("root", "root")])).unwrap();
    set_ref(&store, "root", &[&root]);
    let files: Files = [(b"f".to_vec(), noise(300_000, 9))].into();
    let layer = publish(&store, &files).unwrap();
    let policy = Policy {
        grace: DAY,
        ..at_once()
    };
    let (plan, report) = collect(&store, &policy);
    assert!(
        plan.frees_later >= 300_000 && plan.frees < 300_000,
        "{plan:?}"
    );
    assert_eq!((report.layers_trashed, report.layers_removed), (1, 0));
    assert!(report.waiting > 0);
    assert_eq!(layers(&store), [root.layer_id.to_string()]);
    // The objects are where they were, as long as the layer is in the trash.
    let (_, report) = collect(&store, &policy);
    assert_eq!(report.files_removed, 0);

    let lease = store.lease("again").unwrap();
    lease.pin(&[layer.layer_id]).unwrap();
    assert!(store.has_layer(&layer.layer_id));
    let opened = store.layer(&layer.layer_id).unwrap();
    assert_eq!(read_back(&store, &opened), files);
    collect(&store, &at_once());
    assert_empty(dir.path(), &["trash"]);
    assert_eq!(check_whole(dir.path()), 2);
    drop(lease);
    let (_, report) = collect(&store, &at_once());
    assert_eq!(report.layers_removed, 1);
    assert!(report.freed >= 300_000);
    assert_eq!(check_whole(dir.path()), 1);
}

#[test]
fn objects_wait_for_an_ingest_that_may_have_found_them() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let root = publish(&store, &files(&[("root", "root")])).unwrap();
    set_ref(&store, "root", &[&root]);
    let files: Files = [
        (b"small".to_vec(), noise(300_000, 9)),
        (b"large".to_vec(), noise(LOOSE_MIN as usize + 5, 10)),
    ]
    .into();
    publish(&store, &files).unwrap();
    // As in another process: this store has its own view of the existing objects.
    let other = Store::open(dir.path()).unwrap();
    let lease = other.lease("writer").unwrap();
    let ingest = other.ingest(&lease).unwrap();
    let tree = add_files(&ingest, &files).unwrap();
    let (_, report) = collect(&store, &at_once());
    assert_eq!((report.layers_removed, report.files_removed), (1, 0));
    assert_empty(dir.path(), &["loose"]);
    // A second collection waits, too.
    let (_, report) = collect(&store, &at_once());
    assert_eq!(report.files_removed, 0);
    assert!(report.waiting > LOOSE_MIN);
    let again = ingest.finish(&tree).unwrap();
    assert_eq!((again.new_files, again.existed), (0, false));
    let opened = other.layer(&again.layer_id).unwrap();
    assert_eq!(read_back(&other, &opened), files);
    drop(opened);
    set_ref(&other, "again", &[&again]);
    drop(lease);
    collect(&store, &at_once());
    assert_empty(dir.path(), &["trash", "leases", "tmp"]);
    assert_eq!(check_whole(dir.path()), 2);
}

#[test]
fn objects_of_an_ingest_that_failed_go_when_it_has_ended() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let root = publish(&store, &files(&[("root", "root")])).unwrap();
    set_ref(&store, "root", &[&root]);
    let garbage = publish(&store, &files(&[("a", "a")])).unwrap();
    let lease = store.lease("writer").unwrap();
    let ingest = store.ingest(&lease).unwrap();
    collect(&store, &at_once());
    assert!(!names(&dir.path().join("trash")).is_empty());
    drop(ingest);
    let (_, report) = collect(&store, &at_once());
    assert_eq!(report.files_removed, 1);
    assert_empty(dir.path(), &["trash"]);
    assert!(!store.has_layer(&garbage.layer_id));
}

#[test]
fn packs_that_are_mostly_dead_are_rewritten() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let mut all: Files = (0..100_u64)
        .map(|n| (format!("f{n:03}").into_bytes(), noise(5000, n)))
        .collect();
    publish(&store, &all).unwrap();
    all.retain(|name, _| name.ends_with(b"7"));
    let few = publish(&store, &all).unwrap();
    set_ref(&store, "few", &[&few]);
    // A reader that has the old pack open reads on.
    let reader = Store::open(dir.path()).unwrap();
    let opened = reader.layer(&few.layer_id).unwrap();
    let object = ObjectId::of(&noise(5000, 7));
    let blob = reader.object(&object).unwrap();
    let (plan, report) = collect(&store, &at_once());
    assert_eq!((plan.rewritten_packs, report.packs_rewritten), (1, 1));
    assert_eq!(plan.objects, 90);
    assert!(report.freed >= 90 * 5000, "{report:?}");
    assert_eq!(names(&dir.path().join("packs")).len(), 2);
    assert_eq!(blob.read_all(5000).unwrap(), noise(5000, 7));
    assert_eq!(read_back(&reader, &opened), all);
    assert_eq!(check_whole(dir.path()), 1);
    assert_empty(dir.path(), &["trash", "tmp"]);
}

#[test]
fn many_small_packs_become_one() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let layers: Vec<Published> = (0..40)
        .map(|n| publish(&store, &files(&[("f", &n.to_string())])).unwrap())
        .collect();
    set_ref(&store, "all", &layers.iter().collect::<Vec<_>>());
    let (_, report) = collect(&store, &at_once());
    assert_eq!(report.packs_rewritten, 40);
    assert_eq!(names(&dir.path().join("packs")).len(), 2);
    assert_eq!(check_whole(dir.path()), 40);
    let (_, report) = collect(&store, &at_once());
    assert_eq!(report.packs_rewritten, 0);
}

/// A crash leaves each of these.
#[test]
fn leftovers_go() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let root = publish(&store, &files(&[("root", "root")])).unwrap();
    set_ref(&store, "root", &[&root]);
    publish(&store, &files(&[("a", "a")])).unwrap();
    let packs = dir.path().join("packs");
    // A pack that has lost its index.
    let index = names(&packs)
        .into_iter()
        .find(|name| {
            name.strip_suffix(".idx").is_some() && {
                let store = Store::open(dir.path()).unwrap();
                std::fs::rename(packs.join(name), dir.path().join("aside")).unwrap();
                let root_is_there = store.contains(&ObjectId::of(b"root"));
                std::fs::rename(dir.path().join("aside"), packs.join(name)).unwrap();
                root_is_there
            }
        })
        .unwrap();
    std::fs::remove_file(packs.join(index)).unwrap();
    // An index that has lost its pack.
    publish(&store, &files(&[("b", "b")])).unwrap();
    let store = Store::open(dir.path()).unwrap();
    let all = names(&packs);
    let stray = all.iter().find(|name| {
        name.strip_suffix(".pack").is_some() && {
            let lost = std::fs::read(packs.join(name)).unwrap();
            lost.ends_with(b"b") && !lost.ends_with(b"ab")
        }
    });
    std::fs::remove_file(packs.join(stray.unwrap())).unwrap();
    // A generation without its time, one that is empty, and a trashed object that is needed.
    let trash = dir.path().join("trash");
    for generation in ["3", "7", "9"] {
        std::fs::create_dir(trash.join(generation)).unwrap();
    }
    for name in names(&packs) {
        let id = name.split('.').next().unwrap();
        if packs.join(format!("{id}.idx")).exists() {
            std::fs::rename(packs.join(&name), trash.join("7").join(&name)).unwrap();
        }
    }
    std::fs::write(trash.join("9/waits"), b"{").unwrap();
    let (_, report) = collect(&store, &at_once());
    assert_eq!(report.layers_removed, 2);
    assert_empty(dir.path(), &["trash"]);
    assert_eq!(names(&packs).len(), 2);
    assert_eq!(check_whole(dir.path()), 1);
}

/// The pack would stay for good if its age began anew with every collection.
#[test]
fn a_generation_of_unknown_age_goes() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let root = publish(&store, &files(&[("root", "root")])).unwrap();
    set_ref(&store, "root", &[&root]);
    publish(&store, &files(&[("a", "a")])).unwrap();
    let policy = Policy {
        grace: DAY,
        ..at_once()
    };
    let (_, report) = collect(&store, &policy);
    assert_eq!((report.layers_trashed, report.layers_removed), (1, 0));
    let born = dir.path().join("trash/1/born");
    std::fs::remove_file(&born).unwrap();
    std::fs::write(&born, b"{").unwrap();
    let (_, report) = collect(&store, &policy);
    assert_eq!(report.layers_removed, 1);
    assert_empty(dir.path(), &["trash"]);
}

#[test]
fn what_cannot_be_read_keeps_all_objects() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let root = publish(&store, &files(&[("root", "root")])).unwrap();
    set_ref(&store, "root", &[&root]);
    publish(&store, &files(&[("a", "a")])).unwrap();
    let path = dir.path().join("layers").join(root.layer_id.to_string());
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, bytes).unwrap();
    let store = Store::open(dir.path()).unwrap();
    let plan = store.plan_gc(&at_once()).unwrap();
    assert!(plan.blocked.unwrap().contains("layer"));
    let plan = store.plan_gc(&at_once()).unwrap();
    let blocked = std::cell::Cell::new(false);
    let report = store
        .gc(&plan, &|event| {
            blocked.set(matches!(event, GcEvent::Blocked(_)));
        })
        .unwrap();
    assert!(blocked.get());
    assert_eq!((report.layers_removed, report.files_removed), (1, 0));
    assert_eq!(names(&dir.path().join("packs")).len(), 4);
}

#[test]
fn one_collection_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let plan = store.plan_gc(&at_once()).unwrap();
    let lock = std::fs::File::create(dir.path().join("locks/gc")).unwrap();
    lock.lock().unwrap();
    assert_eq!(store.try_gc(&plan, &|_| {}).unwrap(), None);
    std::thread::scope(|scope| {
        let (say, heard) = std::sync::mpsc::channel();
        let waiting = scope.spawn(move || {
            let say = std::sync::Mutex::new(say);
            let on = |event: GcEvent<'_>| {
                if event == GcEvent::Waiting {
                    say.lock().unwrap().send(()).unwrap();
                }
            };
            Store::open(dir.path()).unwrap().gc(&plan, &on).unwrap();
        });
        heard.recv().unwrap();
        drop(lock);
        waiting.join().unwrap();
    });
}

/// A collection that brings an object back may leave it in two packs; the next one rewrites one of
/// them, which frees the other.
#[test]
fn objects_that_are_there_twice_survive() {
    // Which of the packs counts depends on their ids.
    for salt in 0..6 {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open_on(dir.path(), Arc::new(NoSync)).unwrap();
        let mut all = Files::new();
        for number in 0..10 {
            all.insert(
                vec![b'a' + number],
                noise(3000, salt * 10 + u64::from(number)),
            );
        }
        publish(&store, &all).unwrap();
        let kept = Files::from([(b"kept".to_vec(), noise(3000, salt * 10))]);
        let kept = publish(&store, &kept).unwrap();
        set_ref(&store, "kept", &[&kept]);
        let packs = dir.path().join("packs");
        let paths = names(&packs).into_iter().map(|name| packs.join(name));
        let before: Vec<_> = paths
            .map(|path| (path.clone(), std::fs::read(path).unwrap()))
            .collect();
        let (_, report) = collect(&store, &at_once());
        assert_eq!(report.packs_rewritten, 1);
        for (path, bytes) in before {
            std::fs::write(path, bytes).unwrap();
        }
        for _ in 0..2 {
            collect(&store, &at_once());
            assert_eq!(check_whole(dir.path()), 1);
        }
        assert_eq!(names(&packs).len(), 2);
    }
}
