//! Files that interrupted processes left: which of them a sweep removes, which it leaves alone, and
//! how they are counted.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use iii_store::{Policy, Ref, RefKind, Store};

use crate::helpers::{NoSync, files, names, publish};
use crate::seam::{Call, Hook, Hooked};

/// Sweeps the store before the call that is the `at`th.
#[derive(Debug)]
struct SweepBefore {
    at: usize,
    calls: AtomicUsize,
    other: Store,
}

impl Hook for SweepBefore {
    fn around<T>(&self, _: Call<'_>, run: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        if self.calls.fetch_add(1, Ordering::Relaxed) == self.at {
            self.other.sweep_dead_leases().unwrap();
        }
        run()
    }
}

/// The first ref of a kind that early stores did not have writes the store's format.
#[test]
fn a_sweep_beside_the_first_ref_of_a_kind() {
    for at in 0.. {
        let dir = tempfile::tempdir().unwrap();
        let other = Store::open_on(dir.path(), Arc::new(NoSync)).unwrap();
        let layer = publish(&other, &files(&[("a", "a")])).unwrap().layer_id;
        let hook = SweepBefore {
            at,
            calls: AtomicUsize::new(0),
            other,
        };
        let disk = Arc::new(Hooked(hook));
        let store = Store::open_on(dir.path(), disk.clone()).unwrap();
        let content = Ref {
            layers: vec![layer],
            info: serde_json::Value::Null,
        };
        let set = store.set_ref(RefKind::Managed, "worker", &content);
        set.unwrap_or_else(|err| panic!("swept before call {at}: {err}"));
        assert!(names(&dir.path().join("tmp")).is_empty(), "{at}");
        if disk.0.calls.load(Ordering::Relaxed) <= at {
            assert!(at > 20, "{at} calls are fewer than there are");
            break;
        }
    }
}

/// A program from before sweeps spared the format may sweep beside this one.
#[test]
fn the_format_is_written_again_if_it_was_swept() {
    #[derive(Debug)]
    struct OldSweep(AtomicUsize);
    impl Hook for OldSweep {
        fn around<T>(&self, call: Call<'_>, run: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
            if let Call::Rename(from, _) = call
                && from.ends_with("tmp/format")
                && self.0.fetch_add(1, Ordering::Relaxed) < 2
            {
                fs::remove_file(from)?;
            }
            run()
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = Arc::new(Hooked(OldSweep(AtomicUsize::new(0))));
    Store::open_on(&dir.path().join("store"), disk.clone()).unwrap();
    assert_eq!(disk.0.0.load(Ordering::Relaxed), 3);
}

#[test]
fn a_half_written_format_is_swept() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    fs::write(dir.path().join("tmp/format"), "half").unwrap();
    store.sweep_dead_leases().unwrap();
    assert!(names(&dir.path().join("tmp")).is_empty());
    assert!(names(&dir.path().join("locks")).is_empty());
}

/// Leaves the files of an import that was killed.
fn interrupt(dir: &Path, bytes: usize) {
    fs::write(dir.join("leases/dead"), "iii-lease 1 import of an image\n").unwrap();
    fs::write(dir.join("tmp/dead.0"), vec![1; bytes]).unwrap();
    fs::write(dir.join("tmp/dead.1"), vec![1; bytes]).unwrap();
}

#[test]
fn what_was_interrupted_is_counted_and_freed_by_a_collection() {
    const LEN: usize = 1 << 20;
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let lease = store.lease("import").unwrap();
    let kept = publish(&store, &files(&[("a", "a")])).unwrap();
    lease.pin(&[kept.layer_id]).unwrap();
    interrupt(dir.path(), LEN);
    // A file that is being written is no leftover.
    let ingest = store.ingest(&lease).unwrap();
    ingest.add_bytes(&vec![2; LEN]).unwrap();

    let account = store.account().unwrap();
    assert_eq!(account.abandoned, 2 * LEN as u64);
    assert!(account.unfinished >= LEN as u64, "{account:?}");
    assert!(account.other < LEN as u64, "{account:?}");
    let areas: u64 = account.areas.iter().map(|area| area.bytes).sum();
    let objects = account.named + account.in_trash + account.unnamed;
    assert!(account.unfinished + account.abandoned + objects <= areas);

    let plan = store.plan_gc(&Policy::default()).unwrap();
    assert_eq!(plan.leftovers, 3);
    assert!(plan.leftover_bytes >= 2 * LEN as u64);
    assert!(plan.frees >= plan.leftover_bytes);
    let report = store.gc(&plan, &|_| ()).unwrap();
    assert_eq!(report.leftovers_removed, 3);
    assert!(report.freed >= 2 * LEN as u64);
    assert!(!dir.path().join("tmp/dead.0").exists());
    assert_eq!(store.account().unwrap().abandoned, 0);
    // It can still be finished.
    let empty = iii_store::tree::Tree::default();
    ingest.finish(&empty).unwrap();
}

/// A build that was killed often may have left any number of leases.
#[test]
fn many_dead_leases_take_no_more_descriptors_than_one() {
    let (few, many) = (most_open(1), most_open(300));
    assert_eq!(few, many);
}

/// Most files that are open at once while so many dead leases are swept.
fn most_open(leases: usize) -> usize {
    #[derive(Debug)]
    struct Count(AtomicUsize);
    impl Hook for Count {
        fn around<T>(&self, _: Call<'_>, run: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
            let result = run();
            let open = fs::read_dir("/proc/self/fd")?.filter(|entry| {
                let path = entry.as_ref().map(|entry| fs::read_link(entry.path()));
                let path = path.ok().and_then(Result::ok);
                path.is_some_and(|path| path.components().any(|part| part.as_os_str() == "counted"))
            });
            self.0.fetch_max(open.count(), Ordering::Relaxed);
            result
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("counted");
    let disk = Arc::new(Hooked(Count(AtomicUsize::new(0))));
    let store = Store::open_on(&dir, disk.clone()).unwrap();
    for number in 0..leases {
        fs::write(dir.join(format!("leases/dead{number}")), "iii-lease 1 x\n").unwrap();
    }
    assert_eq!(store.sweep_dead_leases().unwrap(), leases);
    disk.0.0.load(Ordering::Relaxed)
}
