//! Cache volumes: unions of the additions of steps, in any order and despite failures.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant, SystemTime};

use iii_store::disk::Disk;
use iii_store::tree::{Content, DirKind, Leaf, Meta, Mtime, Node, Tree};
use iii_store::{
    Kind, Layer, MAX_VOLUME_LAYERS, Merge, NodeRef, ObjectId, Policy, RefKind, Store, StoreError,
    VerifyOptions, Why,
};
use rustix::io::Errno;

use crate::helpers::{NoSync, add_files, check_whole, copy, files, names};
use crate::seam::{Call, Hook, Hooked};
use crate::workload::{Random, scratch};

/// Merges these files into the volume `v`.
fn merge(store: &Store, list: &[(&str, &str)]) -> Result<Merge, StoreError> {
    let lease = store.lease("test")?;
    let merging = store.ingest(&lease)?;
    let step = store.ingest(&lease)?;
    let tree = add_files(&step, &files(list))?;
    // As in a step: its layer names none of these objects.
    step.finish(&Tree::implicit())?;
    let merge = store.merge_volume(&lease, "v", &tree);
    drop(merging);
    merge
}

/// The files of a directory of several layers, topmost first, as an overlay would show it.
fn walk(top_first: &[NodeRef<'_>], path: &str, seen: &mut BTreeMap<String, ObjectId>) {
    let mut done: Vec<Vec<u8>> = Vec::new();
    for dir in top_first {
        for child in dir.children() {
            if done.iter().any(|name| name == child.name()) {
                continue;
            }
            done.push(child.name().to_vec());
            let name = String::from_utf8(child.name().to_vec()).unwrap();
            let path = if path.is_empty() {
                name
            } else {
                format!("{path}/{name}")
            };
            let all = top_first.iter().filter_map(|dir| dir.child(child.name()));
            let dirs: Vec<_> = all.take_while(|node| node.kind() == Kind::Dir).collect();
            if dirs.is_empty() {
                seen.insert(path, child.object());
            } else {
                walk(&dirs, &path, seen);
            }
        }
    }
}

fn layers(store: &Store) -> Vec<Arc<Layer>> {
    let lease = store.lease("test").unwrap();
    store.volume(&lease, "v").unwrap()
}

fn contents(store: &Store) -> BTreeMap<String, ObjectId> {
    let layers = layers(store);
    let roots: Vec<_> = layers.iter().rev().map(|layer| layer.root()).collect();
    let mut seen = BTreeMap::new();
    walk(&roots, "", &mut seen);
    seen
}

fn objects(list: &[(&str, &str)]) -> BTreeMap<String, ObjectId> {
    let pair = |(path, text): &(&str, &str)| (path.to_string(), ObjectId::of(text.as_bytes()));
    list.iter().map(pair).collect()
}

#[test]
fn a_volume_is_the_union_of_what_was_added() {
    type Files<'a> = &'a [(&'a str, &'a str)];
    let rows: [(&[Files<'_>], Files<'_>); 5] = [
        (&[], &[]),
        (&[&[("c/a", "1")]], &[("c/a", "1")]),
        (
            &[&[("c/a", "1")], &[("c/b", "2")]],
            &[("c/a", "1"), ("c/b", "2")],
        ),
        (&[&[("c/a", "1")], &[("c/a", "2")]], &[("c/a", "2")]),
        // A file where there was a directory, and the other way round.
        (
            &[
                &[("c/a/x", "1"), ("c/b", "1")],
                &[("c/a", "2"), ("c/b/x", "2")],
            ],
            &[("c/a", "2"), ("c/b/x", "2")],
        ),
    ];
    for (steps, expected) in rows {
        let dir = scratch();
        let store = Store::open_on(dir.path(), Arc::new(NoSync)).unwrap();
        for step in steps {
            assert!(matches!(merge(&store, step).unwrap(), Merge::Grown { .. }));
        }
        assert_eq!(contents(&store), objects(expected), "{steps:?}");
        if let Some(step) = steps.last() {
            assert_eq!(merge(&store, step).unwrap(), Merge::Unchanged);
        }
        check_whole(dir.path());
    }
}

/// Many random merges against a map, with few layers at all times.
#[test]
fn many_merges_are_one_union_in_few_layers() {
    let dir = scratch();
    let store = Store::open_on(dir.path(), Arc::new(NoSync)).unwrap();
    let mut random = Random::new(7);
    let mut model: BTreeMap<String, ObjectId> = BTreeMap::new();
    let mut most = 0;
    for round in 0..120_u64 {
        let list: Vec<(String, String)> = (0..=random.below(20))
            .map(|_| {
                let (dir, name) = (random.below(12), random.below(40));
                (format!("c/{dir}/{name}"), format!("{}", random.below(3)))
            })
            .collect();
        let list: Vec<(&str, &str)> = list.iter().map(|(a, b)| (&**a, &**b)).collect();
        merge(&store, &list).unwrap();
        model.extend(objects(&list));
        let sizes: Vec<u32> = layers(&store).iter().map(|one| one.node_count()).collect();
        assert!(sizes.len() <= MAX_VOLUME_LAYERS);
        for (at, size) in sizes.iter().enumerate() {
            let above: u32 = sizes[at + 1..].iter().sum();
            assert!(*size > above, "round {round}: {sizes:?}");
        }
        most = most.max(sizes.len());
        if round % 20 == 19 {
            assert_eq!(contents(&store), model, "round {round}");
        }
    }
    assert!(
        most > 2,
        "at most {most} layers: folding everything is slow"
    );
}

/// Entries that layers of steps have and volumes must not: marks, links, devices, too much depth.
#[test]
fn only_files_directories_and_symlinks_come_in() {
    let dir = scratch();
    let store = Store::open_on(dir.path(), Arc::new(NoSync)).unwrap();
    merge(&store, &[("c/old", "1"), ("c/opaque/kept", "1")]).unwrap();
    let lease = store.lease("test").unwrap();
    let step = store.ingest(&lease).unwrap();
    let mut tree = add_files(&step, &files(&[("c/new", "2"), ("c/opaque/new", "2")])).unwrap();
    let deep = format!("{}deep", "d/".repeat(100));
    let deep = add_files(&step, &files(&[(&deep, "3")])).unwrap();
    let leaf = |content, link| {
        Node::Leaf(Leaf {
            meta: Meta::default(),
            content,
            link,
        })
    };
    let c = tree.dir_at(b"c").unwrap();
    c.entries
        .insert(b"old"[..].into(), leaf(Content::Whiteout, None));
    c.entries
        .insert(b"fifo"[..].into(), leaf(Content::Fifo, None));
    let (object, size) = (ObjectId::of(b"2"), 1);
    for name in [&b"l1"[..], b"l2"] {
        let file = Content::File { object, size };
        c.entries.insert(name.into(), leaf(file, Some(9)));
    }
    let target = b"new"[..].into();
    c.entries
        .insert(b"sym"[..].into(), leaf(Content::Symlink { target }, None));
    c.dir_at(b"opaque").unwrap().kind = DirKind::Opaque;
    c.entries.insert(b"deep"[..].into(), Node::Dir(deep));
    step.finish(&Tree::implicit()).unwrap();
    store.merge_volume(&lease, "v", &tree).unwrap();
    let layers = store.volume(&lease, "v").unwrap();
    for node in layers.iter().flat_map(|layer| layer.nodes()) {
        let kind = node.kind();
        assert!(
            matches!(kind, Kind::Dir | Kind::File | Kind::Symlink),
            "{kind:?}"
        );
        assert!(!node.is_hardlinked() && node.dir_kind() != DirKind::Opaque);
    }
    let seen = contents(&store);
    let seen: Vec<&str> = seen.keys().map(String::as_str).collect();
    assert_eq!(
        seen,
        [
            "c/l1",
            "c/l2",
            "c/new",
            "c/old",
            "c/opaque/kept",
            "c/opaque/new",
            "c/sym"
        ]
    );
}

/// The owner of a directory is part of it; an mtime is nothing new.
#[test]
fn metadata_counts_and_times_do_not() {
    let dir = scratch();
    let store = Store::open_on(dir.path(), Arc::new(NoSync)).unwrap();
    let lease = store.lease("test").unwrap();
    let tree = |uid, sec, mode| {
        let step = store.ingest(&lease).unwrap();
        let mut tree = add_files(&step, &files(&[("c/a", "1")])).unwrap();
        let c = tree.dir_at(b"c").unwrap();
        let mtime = Mtime { sec, nsec: 0 };
        (c.kind, c.meta.uid, c.meta.mtime, c.meta.mode) = (DirKind::Merged, uid, mtime, 0o700);
        if let Some(Node::Leaf(leaf)) = c.entries.get_mut(b"a") {
            (leaf.meta.mtime, leaf.meta.mode) = (mtime, mode);
        }
        step.finish(&Tree::implicit()).unwrap();
        tree
    };
    for (uid, sec, mode, new) in [
        (42, 1, 0o644, true),
        (42, 2, 0o644, false),
        (43, 2, 0o644, true),
        (43, 2, 0o755, true),
    ] {
        let tree = tree(uid, sec, mode);
        let merge = store.merge_volume(&lease, "v", &tree).unwrap();
        assert_eq!(merge != Merge::Unchanged, new, "{uid} {sec} {mode:o}");
        let layers = store.volume(&lease, "v").unwrap();
        let mut top = layers.iter().rev().filter_map(|layer| layer.lookup(b"c"));
        let own = top.find(|dir| dir.dir_kind() != DirKind::Implicit).unwrap();
        assert_eq!((own.uid(), own.mode()), (uid, 0o700));
    }
}

#[test]
fn steps_that_end_at_once_all_add_what_they_have() {
    const STEPS: usize = 8;
    let dir = scratch();
    let store = Store::open_on(dir.path(), Arc::new(NoSync)).unwrap();
    let start = Barrier::new(STEPS);
    std::thread::scope(|scope| {
        for step in 0..STEPS {
            let (start, dir) = (&start, dir.path());
            scope.spawn(move || {
                // A process of its own would have a store of its own.
                let store = Store::open_on(dir, Arc::new(NoSync)).unwrap();
                start.wait();
                for round in 0..4 {
                    let own = format!("c/{step}-{round}");
                    let all = format!("c/all-{round}");
                    merge(&store, &[(&own, "own"), (&all, "same"), ("c/last", &own)]).unwrap();
                }
            });
        }
    });
    let seen = contents(&store);
    assert_eq!(seen.len(), STEPS * 4 + 4 + 1);
    check_whole(dir.path());
}

/// All calls from the one with this number on fail: the process might as well be dead.
#[derive(Debug)]
struct Dying(AtomicI64);

impl Hook for Dying {
    fn around<T>(&self, _: Call<'_>, run: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        if self.0.fetch_sub(1, Ordering::Relaxed) <= 0 {
            return Err(Errno::IO.into());
        }
        run()
    }
}

#[test]
fn a_merge_that_dies_at_any_call_has_changed_nothing_or_everything() {
    let template = scratch();
    let before = Store::open_on(template.path(), Arc::new(NoSync)).unwrap();
    merge(&before, &[("c/a", "old"), ("c/kept", "1")]).unwrap();
    let old = contents(&before);
    let new = objects(&[("c/a", "new"), ("c/b", "2"), ("c/kept", "1")]);
    drop(before);
    let mut whole = 0;
    for calls in 0.. {
        let dir = scratch();
        let at = dir.path().join("store");
        copy(template.path(), &at);
        let disk: Arc<dyn Disk> = Arc::new(Hooked(Dying(AtomicI64::new(calls))));
        let result = Store::open_on(&at, disk)
            .and_then(|store| merge(&store, &[("c/a", "new"), ("c/b", "2")]));
        let store = Store::open_on(&at, Arc::new(NoSync)).unwrap();
        let now = contents(&store);
        assert!(now == old || now == new, "{calls}: {now:?}");
        assert!(result.is_err() || now == new, "{calls}");
        whole += i32::from(now == new);
        check_whole(&at);
        let report = store.verify(VerifyOptions::default(), &|_| ()).unwrap();
        assert!(report.is_clean(), "{calls}: {report:?}");
        if result.is_ok() {
            assert!(calls > 40, "{calls} calls are fewer than there must be");
            break;
        }
        // The leftovers of dead processes block no other process.
        merge(&store, &[("c/a", "new"), ("c/b", "2")]).unwrap();
        assert_eq!(contents(&store), new, "{calls}");
    }
    assert!(whole > 1, "the last calls come after the swap");
}

fn policy(keep: Duration, max_bytes: u64) -> Policy {
    Policy {
        keep,
        max_bytes: Some(max_bytes),
        min_free: None,
        grace: Duration::ZERO,
    }
}

fn set_used(store: &Store, volume: &str, ago: Duration) {
    for id in &store.volumes().unwrap()[volume] {
        let path = store.dir().join("layers").join(id.to_string());
        let file = std::fs::File::open(path).unwrap();
        file.set_modified(SystemTime::now() - ago).unwrap();
    }
}

fn fill(store: &Store, volume: &str, noise: u64) {
    let lease = store.lease("test").unwrap();
    let step = store.ingest(&lease).unwrap();
    let bytes = crate::helpers::noise(300_000, noise);
    let list = [(format!("{volume}/a").into_bytes(), bytes)].into();
    let tree = add_files(&step, &list).unwrap();
    step.finish(&tree).unwrap();
    store.merge_volume(&lease, volume, &tree).unwrap();
}

#[test]
fn the_volume_that_was_not_used_for_longest_goes_first() {
    let dir = scratch();
    let store = Store::open_on(dir.path(), Arc::new(NoSync)).unwrap();
    for (number, name) in ["old", "new", "used"].into_iter().enumerate() {
        fill(&store, name, number as u64);
        set_used(&store, name, Duration::from_hours(100 - 10 * number as u64));
    }
    // Reading a volume counts as a use of it.
    let reader = store.lease("reader").unwrap();
    store.volume(&reader, "old").unwrap();
    drop(reader);
    let week = Duration::from_hours(200);
    let over = store.bytes_on_disk().unwrap() - 100_000;
    let plan = store.plan_gc(&policy(week, over)).unwrap();
    let dropped: Vec<(&str, Why)> = plan.volumes.iter().map(|v| (&*v.name, v.why)).collect();
    assert_eq!(dropped, [("new", Why::MaxSize)]);
    assert_eq!(plan.still_over, 0);
    let report = store.gc(&plan, &|_| ()).unwrap();
    assert_eq!(report.volumes, 1);
    assert!(report.freed > 200_000, "{report:?}");
    let left: Vec<String> = store.volumes().unwrap().into_keys().collect();
    assert_eq!(left, ["old", "used"]);
    check_whole(dir.path());
    // By age, too.
    set_used(&store, "used", Duration::from_hours(300));
    let plan = store.plan_gc(&policy(week, u64::MAX)).unwrap();
    let dropped: Vec<(&str, Why)> = plan.volumes.iter().map(|v| (&*v.name, v.why)).collect();
    assert_eq!(dropped, [("used", Why::Unused)]);
}

#[test]
fn a_volume_in_use_stays_and_one_that_was_collected_is_empty() {
    let dir = scratch();
    let store = Store::open_on(dir.path(), Arc::new(NoSync)).unwrap();
    fill(&store, "v", 1);
    fill(&store, "w", 2);
    let step = store.lease("step").unwrap();
    let seen = store.volume(&step, "v").unwrap();
    assert_eq!(seen.len(), 1);
    let greedy = policy(Duration::ZERO, 0);
    store.gc(&store.plan_gc(&greedy).unwrap(), &|_| ()).unwrap();
    let left: Vec<String> = store.volumes().unwrap().into_keys().collect();
    assert_eq!(left, ["v"]);
    check_whole(dir.path());
    drop(step);
    let keeper = store.lease("keeper").unwrap();
    fill(&store, "other", 3);
    keeper.pin(&store.volumes().unwrap()["other"]).unwrap();
    store.gc(&store.plan_gc(&greedy).unwrap(), &|_| ()).unwrap();
    assert!(layers(&store).is_empty());
    merge(&store, &[("c/a", "1")]).unwrap();
    assert_eq!(contents(&store), objects(&[("c/a", "1")]));
}

/// A volume whose layer is gone without its ref, or whose ref cannot be read, is empty, and blocks
/// no operation.
#[test]
fn a_damaged_volume_is_empty_and_can_be_filled_again() {
    for damage in ["layer", "ref"] {
        let dir = scratch();
        let store = Store::open_on(dir.path(), Arc::new(NoSync)).unwrap();
        merge(&store, &[("c/a", "1")]).unwrap();
        let id = store.volumes().unwrap()["v"][0];
        let path = match damage {
            "layer" => dir.path().join("layers").join(id.to_string()),
            _ => dir.path().join("refs/volume/v"),
        };
        std::fs::write(&path, "no").unwrap();
        let store = Store::open_on(dir.path(), Arc::new(NoSync)).unwrap();
        assert!(layers(&store).is_empty(), "{damage}");
        merge(&store, &[("c/b", "2")]).unwrap();
        assert_eq!(contents(&store), objects(&[("c/b", "2")]), "{damage}");
        assert_eq!(names(&dir.path().join("refs/volume")), ["v"]);
    }
}

/// Counts of names and bytes treat a volume as any other name.
#[test]
fn a_volume_is_accounted_for() {
    let dir = scratch();
    let store = Store::open_on(dir.path(), Arc::new(NoSync)).unwrap();
    fill(&store, "v", 1);
    let account = store.account().unwrap();
    assert_eq!(account.refs.len(), 1);
    assert_eq!(account.refs[0].kind, RefKind::Volume);
    assert!(account.refs[0].unique > 300_000);
    assert_eq!(account.in_no_ref, 0);
}

/// The promise of the merge's cost, with a bound that a slow machine keeps.
#[test]
fn adding_to_a_large_volume_costs_what_is_added() {
    let dir = scratch();
    let store = Store::open_on(dir.path(), Arc::new(NoSync)).unwrap();
    let lease = store.lease("test").unwrap();
    let tree = |from: u32, count: u32| {
        let step = store.ingest(&lease).unwrap();
        let list = (from..from + count).map(|n| {
            let hash = blake3::hash(&n.to_le_bytes()).to_hex();
            let path = format!("c/{}/{}/{}", &hash[..2], &hash[2..4], &hash[4..]);
            (path.into_bytes(), n.to_le_bytes().to_vec())
        });
        let tree = add_files(&step, &list.collect()).unwrap();
        step.finish(&tree).unwrap();
        tree
    };
    store.merge_volume(&lease, "v", &tree(0, 30_000)).unwrap();
    let large = layers(&store)[0].layer_id();
    for round in 0..4 {
        let added = tree(30_000 + 500 * round, 500);
        let start = Instant::now();
        let merge = store.merge_volume(&lease, "v", &added).unwrap();
        println!("500 files in {:?}: {merge:?}", start.elapsed());
        assert_eq!(layers(&store)[0].layer_id(), large);
    }
}
