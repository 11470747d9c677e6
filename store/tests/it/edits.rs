//! Thousands of edits of one project: neither the cost of an operation nor its success depends on
//! the number of files.
//!
//! `III_STORE_EDITS` is the number of edits: `III_STORE_EDITS=100000 cargo test --release -p
//! iii-store --test it edits:: -- --nocapture` also prints the cost of each operation.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use iii_store::snapshot::{Options, Snapshot, snapshot};
use iii_store::{MAX_TRASHED_LAYERS, Policy, Published, Ref, RefKind, Store};
use rustix::process::{Resource, Rlimit, setrlimit};

use crate::helpers::{Files, NoSync, check_whole, names, noise, publish, read_back};
use crate::seam::{Call, Hook, Hooked};
use crate::workload::scratch;

/// Edits in the ordinary tests.
const EDITS: usize = 600;
const EDITS_VARIABLE: &str = "III_STORE_EDITS";
const DIR_VARIABLE: &str = "III_STORE_EDITS_DIR";
/// Descriptors of the process that works on a store that was never collected.
const DESCRIPTORS: u64 = 200;
/// Most small packs of a store: each refresh of the indexes opens all of them.
const MAX_SMALL_PACKS: usize = 48;
/// Most layers of a store that no name keeps.
const MAX_DEAD_LAYERS: usize = 32;
/// Calls for one pack in a refresh of the indexes.
const CALLS_FOR_A_PACK: usize = 4;
/// Most calls to count, or to collect, one file.
const CALLS_TO_COUNT: usize = 16;
const CALLS_TO_COLLECT: usize = 32;
/// Files of the project: in the ordinary tests, and with `III_STORE_EDITS`.
const FILES: usize = 50;
const MANY_FILES: usize = 1000;

fn edits() -> usize {
    let edits = std::env::var(EDITS_VARIABLE).ok();
    edits.map_or(EDITS, |edits| edits.parse().unwrap())
}

/// Counts calls, and the mappings of files of one directory.
#[derive(Debug)]
struct Counter {
    dir: PathBuf,
    calls: AtomicUsize,
    mapped: AtomicUsize,
}

/// Mappings are counted once in this many calls.
const STRIDE: usize = 97;

impl Hook for Counter {
    fn around<T>(&self, _: Call<'_>, run: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        if self
            .calls
            .fetch_add(1, Ordering::Relaxed)
            .is_multiple_of(STRIDE)
        {
            self.count_mapped();
        }
        run()
    }
}

impl Counter {
    fn open(dir: &Path) -> (Store, Arc<Hooked<Self>>) {
        let counter = Arc::new(Hooked(Self {
            dir: dir.to_owned(),
            calls: AtomicUsize::new(0),
            mapped: AtomicUsize::new(0),
        }));
        let store = Store::open_on(dir, counter.clone()).unwrap();
        (store, counter)
    }

    fn count_mapped(&self) {
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let dir = self.dir.to_str().unwrap();
        let mapped = maps.lines().filter(|line| line.contains(dir)).count();
        self.mapped.fetch_max(mapped, Ordering::Relaxed);
    }
}

fn take(store: &Store, project: &Path) -> Snapshot {
    let lease = store.lease("dev").unwrap();
    let options = Options {
        name: "project",
        at: b"workspace",
        excludes: &[],
        uid: 0,
        gid: 0,
    };
    let taken = snapshot(store, &lease, project, &options).unwrap();
    set_ref(store, "dev", &[&taken.published]);
    taken
}

fn set_ref(store: &Store, name: &str, layers: &[&Published]) {
    let content = Ref {
        layers: layers.iter().map(|layer| layer.layer_id).collect(),
        info: serde_json::Value::Null,
    };
    store.set_ref(RefKind::Worker, name, &content).unwrap();
}

fn project(files: u64) -> tempfile::TempDir {
    let project = scratch();
    for number in 0..files {
        let path = project.path().join(format!("file{number}"));
        fs::write(path, noise(1000, number)).unwrap();
    }
    project
}

/// The program's work after each edit.
fn collect_if_many(store: &Store) -> bool {
    let many = store.has_many_files().unwrap();
    if many {
        let plan = store.plan_gc(&policy()).unwrap();
        store.try_gc(&plan, &|_| ()).unwrap().unwrap();
    }
    many
}

fn policy() -> Policy {
    Policy {
        max_bytes: None,
        ..Policy::default()
    }
}

/// The costs that must not depend on the number of edits.
#[derive(Debug, Clone, Copy)]
struct Costs {
    /// Calls, and time.
    open: (usize, Duration),
    unchanged: (usize, Duration),
    df: (usize, Duration),
    gc: (usize, Duration),
}

fn costs(dir: &Path, project: &Path) -> Costs {
    let measure = |work: &dyn Fn(&Store)| {
        let begun = Instant::now();
        let (store, counter) = Counter::open(dir);
        work(&store);
        (counter.0.calls.load(Ordering::Relaxed), begun.elapsed())
    };
    // Young files are read once more.
    let store = Store::open_on(dir, Arc::new(NoSync)).unwrap();
    while take(&store, project).read > 0 {}
    Costs {
        open: measure(&|store| {
            let dev = store.get_ref(RefKind::Worker, "dev").unwrap().unwrap();
            let layer = store.layer(&dev.layers[0]).unwrap();
            assert!(!read_back(store, &layer).is_empty());
        }),
        unchanged: measure(&|store| assert!(take(store, project).published.existed)),
        df: measure(&|store| {
            store.account().unwrap();
            store.plan_gc(&policy()).unwrap();
        }),
        gc: measure(&|store| {
            let plan = store.plan_gc(&policy()).unwrap();
            store.gc(&plan, &|_| ()).unwrap();
        }),
    }
}

#[test]
fn what_an_operation_costs_does_not_depend_on_the_number_of_edits() {
    let count = if edits() > EDITS { MANY_FILES } else { FILES };
    let (dir, project) = (scratch(), project(count as u64));
    let store = Store::open_on(dir.path(), Arc::new(NoSync)).unwrap();
    let (edits, mut collections) = (edits(), 0);
    for number in 0..edits {
        let path = project.path().join(format!("file{}", number % count));
        fs::write(path, noise(900 + number % 100, 1000 + number as u64)).unwrap();
        let taken = take(&store, project.path());
        assert!(!taken.published.existed, "edit {number}");
        collections += usize::from(collect_if_many(&store));
        let packs = names(&dir.path().join("packs")).len() / 2;
        assert!(
            packs <= MAX_SMALL_PACKS + 1,
            "{packs} packs at edit {number}"
        );
    }
    assert!(
        (edits / MAX_SMALL_PACKS..=edits / 8).contains(&collections),
        "{collections} collections"
    );
    let layers = names(&dir.path().join("layers")).len();
    assert!(layers <= MAX_DEAD_LAYERS + 2, "{layers} layers");

    let fresh = scratch();
    drop(Store::open_on(fresh.path(), Arc::new(NoSync)).unwrap());
    let before = costs(fresh.path(), project.path());
    let after = costs(dir.path(), project.path());
    eprintln!("fresh: {before:#?}\nafter {edits} edits: {after:#?}");
    // No lookup reaches the packs.
    assert_eq!(after.unchanged.0, before.unchanged.0);
    // The packs that collections leave alone, and the layers that wait in the trash; both are
    // bounded.
    let files = MAX_SMALL_PACKS + MAX_DEAD_LAYERS + MAX_TRASHED_LAYERS;
    let open = MAX_SMALL_PACKS * CALLS_FOR_A_PACK;
    assert!(after.open.0 <= before.open.0 + open);
    assert!(after.df.0 <= before.df.0 + CALLS_TO_COUNT * files);
    assert!(after.gc.0 <= before.gc.0 + CALLS_TO_COLLECT * files);
    check_whole(dir.path());
}

/// Edits that each get a store of their own, before their files move: a publication lists the
/// existing packs, so its cost grows with their number.
const BATCH: usize = 200;

/// A store of earlier programs, which never collected it.
fn neglected(dir: &Path, edits: usize) {
    drop(Store::open_on(dir, Arc::new(NoSync)).unwrap());
    let mut last = None;
    for start in (0..edits).step_by(BATCH) {
        let batch = scratch();
        let store = Store::open_on(batch.path(), Arc::new(NoSync)).unwrap();
        for number in start..edits.min(start + BATCH) {
            let files = Files::from([(b"edited".to_vec(), noise(100, number as u64))]);
            last = Some(publish(&store, &files).unwrap());
        }
        for kind in ["packs", "layers"] {
            for name in names(&batch.path().join(kind)) {
                let (from, to) = (batch.path().join(kind), dir.join(kind));
                fs::rename(from.join(&name), to.join(&name)).unwrap();
            }
        }
    }
    let store = Store::open_on(dir, Arc::new(NoSync)).unwrap();
    set_ref(&store, "dev", &[&last.unwrap()]);
}

#[test]
fn no_limit_of_the_kernel_is_reached() {
    let dir = scratch();
    neglected(dir.path(), edits());
    let output = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "edits::within_limits",
            "--ignored",
            "--nocapture",
        ])
        .env(DIR_VARIABLE, dir.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(said.contains("worked within the limits"), "{said}");
}

/// Not a test: the work of the process with few descriptors.
#[test]
#[ignore = "run by the test beside it"]
fn within_limits() {
    let Some(dir) = std::env::var_os(DIR_VARIABLE) else {
        return;
    };
    let dir = PathBuf::from(dir);
    let few = Rlimit {
        current: Some(DESCRIPTORS),
        maximum: Some(DESCRIPTORS),
    };
    setrlimit(Resource::Nofile, few).unwrap();
    let (store, counter) = Counter::open(&dir);
    store.account().unwrap();
    assert!(store.has_many_files().unwrap());
    let plan = store.plan_gc(&policy()).unwrap();
    assert_eq!(plan.kept.len(), 1);
    counter.0.count_mapped();
    let report = store.gc(&plan, &|_| ()).unwrap();
    assert!(report.layers_removed as usize + MAX_TRASHED_LAYERS >= plan.layers.len());
    assert!(plan.frees <= report.freed * 2, "{plan:?} {report:?}");
    counter.0.count_mapped();
    let mapped = counter.0.mapped.load(Ordering::Relaxed);
    assert!(mapped <= 8, "{mapped} files were mapped at once");
    assert!(!store.has_many_files().unwrap());
    publish(&store, &Files::from([(b"new".to_vec(), b"new".to_vec())])).unwrap();
    for (kind, most) in [("layers", 2), ("packs", 2 * MAX_SMALL_PACKS)] {
        let left = names(&dir.join(kind)).len();
        assert!(left <= most, "{left} {kind}");
    }
    check_whole(&dir);
    eprintln!("worked within the limits");
}
