//! Writers, readers and collections, interleaved call by call.
//!
//! The code is the real one. Each actor runs in a thread of its own, on a disk that stops before
//! every call that other actors could notice until the scheduler resumes the actor. So one actor
//! runs at a time, and a schedule is a list of numbers. The tests explore all schedules with few
//! preemptions, and random ones. No actor waits for a lock in the kernel: the scheduler resumes it
//! only once the lock is free, and reports the case that no actor can continue.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

use iii_store::disk::Disk;
use iii_store::{GcPlan, KeyId, LOOSE_MIN, LayerId, Record, Ref, RefKind, Store, StoreError};
use rayon::{ThreadPool, ThreadPoolBuilder};
use rustix::fs::{FlockOperation, flock};

use crate::helpers::{Files, NoSync, add_files, check_whole, copy, noise, publish, read_back};
use crate::kills::{assert_nothing_leaked, greedy};
use crate::seam::{Call, Hook, Hooked};
use crate::workload::{Random, causes, scratch};

#[derive(Debug)]
enum Status {
    /// Before its first call.
    Starting,
    /// Stopped before a call, which takes this lock.
    Waiting(Option<PathBuf>),
    Running,
    Done,
}

/// How the scheduler chooses the actor to resume.
#[derive(Debug, Clone)]
enum Choice {
    /// The actor that was running; at the choices with these numbers, these other actors instead.
    Preempt(Vec<(usize, usize)>),
    /// The actor with the highest priority; at the choices with these numbers, the running one
    /// comes last from then on.
    Priorities(Vec<usize>, Vec<usize>),
}

/// A choice that was made.
#[derive(Debug)]
struct Made {
    /// The actors that could have continued.
    enabled: Vec<usize>,
    chosen: usize,
}

#[derive(Debug)]
struct State {
    actors: Vec<Status>,
    current: usize,
    turn: Option<usize>,
    choice: Choice,
    made: Vec<Made>,
    /// No actor can continue.
    stuck: bool,
    log: Vec<(usize, String)>,
}

#[derive(Debug)]
struct Scheduler {
    state: Mutex<State>,
    changed: Condvar,
}

fn is_free(path: &Path) -> bool {
    let Ok(file) = fs::File::open(path) else {
        return true;
    };
    flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok()
}

impl State {
    /// Resumes one actor, if all are stopped.
    fn choose(&mut self) {
        let busy = |actor: &Status| matches!(actor, Status::Starting | Status::Running);
        if self.turn.is_some() || self.actors.iter().any(busy) {
            return;
        }
        let enabled = |actor: &Status| match actor {
            Status::Waiting(lock) => lock.as_deref().is_none_or(is_free),
            _ => false,
        };
        let enabled: Vec<usize> = (0..self.actors.len())
            .filter(|actor| enabled(&self.actors[*actor]))
            .collect();
        if enabled.is_empty() {
            self.stuck = self
                .actors
                .iter()
                .any(|actor| !matches!(actor, Status::Done));
            return;
        }
        let number = self.made.len();
        let stays = if enabled.contains(&self.current) {
            self.current
        } else {
            enabled[0]
        };
        let chosen = match &mut self.choice {
            Choice::Preempt(at) => {
                // A run may depend on timing, so it need not fit its schedule.
                let other = at.iter().find(|(at, _)| *at == number);
                let other = other.map(|(_, actor)| *actor);
                other
                    .filter(|actor| enabled.contains(actor))
                    .unwrap_or(stays)
            }
            Choice::Priorities(order, changes) => {
                if changes.contains(&number) {
                    order.retain(|actor| *actor != self.current);
                    order.push(self.current);
                }
                *order.iter().find(|actor| enabled.contains(actor)).unwrap()
            }
        };
        self.made.push(Made { enabled, chosen });
        self.current = chosen;
        self.turn = Some(chosen);
    }
}

impl Scheduler {
    fn new(actors: usize, choice: Choice) -> Self {
        Self {
            state: Mutex::new(State {
                actors: (0..actors).map(|_| Status::Starting).collect(),
                current: 0,
                turn: None,
                choice,
                made: Vec::new(),
                stuck: false,
                log: Vec::new(),
            }),
            changed: Condvar::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Waits until the scheduler resumes the actor.
    fn pass(&self, actor: usize, call: &Call<'_>) -> io::Result<()> {
        let mut state = self.state();
        let lock = match call {
            Call::OpenLock(path) => Some(path.to_path_buf()),
            _ => None,
        };
        state.actors[actor] = Status::Waiting(lock);
        state.choose();
        self.changed.notify_all();
        while state.turn != Some(actor) && !state.stuck {
            state = self.changed.wait(state).unwrap();
        }
        state.turn = None;
        state.actors[actor] = Status::Running;
        state.log.push((actor, format!("{call:?}")));
        if state.stuck {
            return Err(io::ErrorKind::Deadlock.into());
        }
        Ok(())
    }

    fn done(&self, actor: usize) {
        let mut state = self.state();
        state.actors[actor] = Status::Done;
        state.choose();
        self.changed.notify_all();
    }
}

/// The disk of one actor.
#[derive(Debug, Clone)]
struct Turnstile {
    scheduler: Arc<Scheduler>,
    actor: usize,
}

/// Whether other actors can notice the call, or it can notice their calls.
fn is_seen(call: &Call<'_>) -> bool {
    match call {
        // A file that is being written has a name of its writer alone. Other actors read leases,
        // though.
        Call::Write(file, ..) => {
            let path = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
            path.is_ok_and(|path| path.parent().is_some_and(|dir| dir.ends_with("leases")))
        }
        Call::Create(_)
        | Call::Reflink(..)
        | Call::Sync(_)
        | Call::SyncDir(_)
        | Call::Read
        | Call::Map
        | Call::Touch(_) => false,
        _ => true,
    }
}

impl Hook for Turnstile {
    fn around<T>(&self, call: Call<'_>, run: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        if is_seen(&call) {
            self.scheduler.pass(self.actor, &call)?;
        }
        run()
    }
}

/// The store at the start of a scenario, as all actors know it.
#[derive(Debug)]
struct Known {
    /// A layer that no name needs, of small files and a large one.
    garbage: LayerId,
    /// A layer that a record keeps until a collection needs space.
    recorded: LayerId,
    plan: GcPlan,
}

const KEY: KeyId = KeyId::from_bytes([3; 32]);

fn garbage() -> Files {
    [
        (b"old".to_vec(), noise(100, 1)),
        (b"both".to_vec(), noise(3000, 2)),
        (b"large".to_vec(), noise(LOOSE_MIN as usize, 3)),
    ]
    .into()
}

/// Names some contents of [`garbage`] and one of its own.
fn reusing() -> Files {
    let mut files = garbage();
    files.insert(b"new".to_vec(), b"new".to_vec());
    files.remove(&b"old"[..]);
    files
}

fn set_ref(store: &Store, name: &str, layer: LayerId) -> Result<(), StoreError> {
    let content = Ref {
        layers: vec![layer],
        info: serde_json::Value::Null,
    };
    store.set_ref(RefKind::Worker, name, &content)
}

/// Packs that a collection leaves alone, and one more.
const MANY: u64 = 7;

/// With `many`, the store has as many small packs as a collection merges, all of whose objects are
/// needed.
fn prepare(dir: &Path, many: bool) -> Known {
    let store = Store::open_on(dir, Arc::new(NoSync)).unwrap();
    if many {
        let layer = |number: u64| {
            let files = Files::from([(b"many".to_vec(), noise(50, 100 + number))]);
            publish(&store, &files).unwrap().layer_id
        };
        let layers: Vec<LayerId> = (0..MANY).map(layer).collect();
        let info = serde_json::Value::Null;
        let content = Ref { layers, info };
        store.set_ref(RefKind::Worker, "many", &content).unwrap();
    }
    let garbage = publish(&store, &garbage()).unwrap().layer_id;
    // A pack of which little is needed.
    let mut mostly = Files::new();
    for number in 10..20 {
        mostly.insert(vec![number as u8], noise(2000, number));
    }
    publish(&store, &mostly).unwrap();
    let kept = Files::from([(b"kept".to_vec(), noise(2000, 10))]);
    let kept = publish(&store, &kept).unwrap();
    set_ref(&store, "kept", kept.layer_id).unwrap();
    let recorded = Files::from([(b"recorded".to_vec(), noise(500, 30))]);
    let recorded = publish(&store, &recorded).unwrap();
    let record = Record {
        facts: Vec::new(),
        layer_id: recorded.layer_id,
        tree_id: recorded.tree_id,
        provenance: serde_json::Map::new(),
    };
    store.put_record(&KEY, record).unwrap();
    let plan = store.plan_gc(&greedy()).unwrap();
    let recorded = recorded.layer_id;
    Known {
        garbage,
        recorded,
        plan,
    }
}

/// The work of an actor. An error is one that the store must not return.
type Act = fn(&Path, &Arc<dyn Disk>, &Known) -> Result<(), StoreError>;

/// Reads a pinned layer, as a process that has just opened the store.
fn look(dir: &Path, disk: &Arc<dyn Disk>, layer: &LayerId) -> Result<(), StoreError> {
    let store = Store::open_on(dir, Arc::clone(disk))?;
    let layer = store.layer(layer)?;
    read_back(&store, &layer);
    Ok(())
}

fn write(dir: &Path, disk: &Arc<dyn Disk>, files: &Files, name: &str) -> Result<(), StoreError> {
    let store = Store::open_on(dir, Arc::clone(disk))?;
    let lease = store.lease("write")?;
    let ingest = store.ingest(&lease)?;
    let tree = add_files(&ingest, files)?;
    let layer = ingest.finish(&tree)?.layer_id;
    look(dir, disk, &layer)?;
    set_ref(&store, name, layer)?;
    drop(lease);
    look(dir, disk, &layer)
}

/// Stores contents that were there until a moment ago, together with new ones.
fn reuse(dir: &Path, disk: &Arc<dyn Disk>, _: &Known) -> Result<(), StoreError> {
    write(dir, disk, &reusing(), "reused")
}

/// Stores the very layer that no name needed.
fn repeat(dir: &Path, disk: &Arc<dyn Disk>, _: &Known) -> Result<(), StoreError> {
    write(dir, disk, &garbage(), "repeated")
}

/// Uses a layer if it exists.
fn read(dir: &Path, disk: &Arc<dyn Disk>, known: &Known) -> Result<(), StoreError> {
    let store = Store::open_on(dir, Arc::clone(disk))?;
    let lease = store.lease("read")?;
    lease.pin(&[known.garbage])?;
    match store.layer(&known.garbage) {
        Err(StoreError::MissingLayer(_)) => return Ok(()),
        other => drop(read_back(&store, &*other?)),
    }
    look(dir, disk, &known.garbage)
}

/// Uses the layer of a record if it exists, and else builds it anew.
fn use_record(dir: &Path, disk: &Arc<dyn Disk>, known: &Known) -> Result<(), StoreError> {
    let store = Store::open_on(dir, Arc::clone(disk))?;
    let lease = store.lease("use")?;
    for record in store.records(&KEY)? {
        lease.pin(&[record.layer_id])?;
        match store.layer(&record.layer_id) {
            Err(StoreError::MissingLayer(_)) => {}
            other => {
                other?;
                set_ref(&store, "recorded", known.recorded)?;
                drop(lease);
                return look(dir, disk, &known.recorded);
            }
        }
    }
    Ok(())
}

/// Reads a layer of a ref, whose pack may be rewritten meanwhile.
fn read_kept(dir: &Path, disk: &Arc<dyn Disk>, _: &Known) -> Result<(), StoreError> {
    let store = Store::open_on(dir, Arc::clone(disk))?;
    let kept = store.get_ref(RefKind::Worker, "kept")?.unwrap();
    let layer = store.layer(&kept.layers[0])?;
    drop(read_back(&store, &layer));
    Ok(())
}

/// Reads objects of packs that are merged meanwhile, with indexes that were read before.
fn read_many(dir: &Path, disk: &Arc<dyn Disk>, _: &Known) -> Result<(), StoreError> {
    let store = Store::open_on(dir, Arc::clone(disk))?;
    let many = store.get_ref(RefKind::Worker, "many")?.unwrap();
    for layer in [many.layers.first(), many.layers.last()] {
        let layer = store.layer(layer.unwrap())?;
        drop(read_back(&store, &layer));
    }
    Ok(())
}

/// Collects the layer that was garbage at the start.
fn collect(dir: &Path, disk: &Arc<dyn Disk>, known: &Known) -> Result<(), StoreError> {
    let store = Store::open_on(dir, Arc::clone(disk))?;
    store.gc(&known.plan, &|_| ())?;
    Ok(())
}

/// Collects after storing something, as a build does: the indexes were read before.
fn store_and_collect(dir: &Path, disk: &Arc<dyn Disk>, known: &Known) -> Result<(), StoreError> {
    let store = Store::open_on(dir, Arc::clone(disk))?;
    let own = Files::from([(b"own".to_vec(), b"own".to_vec())]);
    let lease = store.lease("build")?;
    let ingest = store.ingest(&lease)?;
    let tree = add_files(&ingest, &own)?;
    let layer = ingest.finish(&tree)?.layer_id;
    set_ref(&store, "own", layer)?;
    store.gc(&known.plan, &|_| ())?;
    Ok(())
}

/// Collects the layers that are garbage now.
fn plan_and_collect(dir: &Path, disk: &Arc<dyn Disk>, _: &Known) -> Result<(), StoreError> {
    let store = Store::open_on(dir, Arc::clone(disk))?;
    let plan = store.plan_gc(&greedy())?;
    store.gc(&plan, &|_| ())?;
    Ok(())
}

fn sweep(dir: &Path, disk: &Arc<dyn Disk>, _: &Known) -> Result<(), StoreError> {
    let store = Store::open_on(dir, Arc::clone(disk))?;
    store.sweep_dead_leases().map(drop)
}

/// Names a layer by a kind of ref that the format does not have yet.
fn manage(dir: &Path, disk: &Arc<dyn Disk>, known: &Known) -> Result<(), StoreError> {
    let store = Store::open_on(dir, Arc::clone(disk))?;
    let lease = store.lease("manage")?;
    lease.pin(&[known.recorded])?;
    let content = Ref {
        layers: vec![known.recorded],
        info: serde_json::Value::Null,
    };
    store.set_ref(RefKind::Managed, "managed", &content)
}

/// Actors on one store.
struct Scenario {
    acts: Vec<Act>,
    template: tempfile::TempDir,
    known: Known,
    /// One thread for each actor, so that it does one thing after the other.
    pools: Vec<ThreadPool>,
    runs: usize,
}

impl Scenario {
    fn new(name: &str, acts: &[Act]) -> Self {
        let template = scratch();
        let known = prepare(&template.path().join("store"), name == "merge");
        let pool = |_| ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        Self {
            acts: acts.to_vec(),
            pools: (0..acts.len()).map(pool).collect(),
            template,
            known,
            runs: 0,
        }
    }

    /// Runs one schedule, and returns its choices.
    fn run(&mut self, choice: &Choice) -> Vec<Made> {
        self.runs += 1;
        let dir = scratch();
        let dir = dir.path().join("store");
        copy(&self.template.path().join("store"), &dir);
        let scheduler = Arc::new(Scheduler::new(self.acts.len(), choice.clone()));
        let results: Vec<Result<(), String>> = std::thread::scope(|scope| {
            let actors: Vec<_> = (self.acts.iter().zip(&self.pools).enumerate())
                .map(|(actor, (act, pool))| {
                    let disk: Arc<dyn Disk> = Arc::new(Hooked(Turnstile {
                        scheduler: Arc::clone(&scheduler),
                        actor,
                    }));
                    let (dir, known, scheduler) = (&dir, &self.known, &scheduler);
                    scope.spawn(move || {
                        let act = std::panic::AssertUnwindSafe(|| act(dir, &disk, known));
                        let result = pool.install(|| std::panic::catch_unwind(act));
                        scheduler.done(actor);
                        match result {
                            Ok(result) => result.map_err(|err| causes(&err)),
                            Err(_) => Err("it panicked".into()),
                        }
                    })
                })
                .collect();
            actors
                .into_iter()
                .map(|actor| actor.join().unwrap())
                .collect()
        });
        let failed = results.iter().any(Result::is_err);
        let whole = std::panic::catch_unwind(|| {
            check_whole(&dir);
            let store = Store::open_on(&dir, Arc::new(NoSync)).unwrap();
            for (name, content) in store.list_refs(RefKind::Worker).unwrap() {
                for layer in &content.layers {
                    let layer = store.layer(layer);
                    let layer = layer.unwrap_or_else(|err| panic!("{name}: {err}"));
                    read_back(&store, &layer);
                }
            }
            assert_nothing_leaked(&store);
        });
        let state = scheduler.state();
        if failed || whole.is_err() {
            eprintln!("schedule {choice:?} gave {results:?}");
            for (actor, call) in &state.log {
                eprintln!("  {actor}: {}", call.replace(dir.to_str().unwrap(), "…"));
            }
            panic!("this schedule breaks the store");
        }
        drop(state);
        let mut state = scheduler.state();
        std::mem::take(&mut state.made)
    }

    /// Runs every schedule with at most `preemptions`, or of those with most of them every
    /// `stride`th.
    fn explore(&mut self, preemptions: usize, stride: usize) {
        let mut stack = vec![Vec::new()];
        let mut last = 0;
        while let Some(schedule) = stack.pop() {
            let made = self.run(&Choice::Preempt(schedule.clone()));
            if schedule.len() == preemptions {
                continue;
            }
            let from = schedule.last().map_or(0, |(at, _)| at + 1);
            for (at, made) in made.iter().enumerate().skip(from) {
                for other in &made.enabled {
                    if *other == made.chosen {
                        continue;
                    }
                    let mut next: Vec<(usize, usize)> = schedule.clone();
                    next.push((at, *other));
                    if next.len() == preemptions {
                        last += 1;
                        if last % stride != 0 {
                            continue;
                        }
                    }
                    stack.push(next);
                }
            }
        }
    }

    /// Runs schedules in which the actors have random priorities, which change a few times.
    fn wander(&mut self, count: usize, seed: u64) {
        let mut random = Random::new(seed);
        let length = self.run(&Choice::Preempt(Vec::new())).len() as u64;
        for _ in 0..count {
            let mut order: Vec<usize> = (0..self.acts.len()).collect();
            order.sort_by_cached_key(|_| random.next());
            let changes = (0..4).map(|_| random.below(length) as usize);
            let changes = changes.collect();
            self.run(&Choice::Priorities(order, changes));
        }
    }
}

/// The part of a scenario that the ordinary tests explore.
fn explore(name: &str) {
    let (_, acts) = SCENARIOS.iter().find(|(known, _)| *known == name).unwrap();
    let mut scenario = Scenario::new(name, acts);
    scenario.explore(1, 1);
    let one = scenario.runs;
    scenario.explore(2, 131);
    scenario.wander(40, 1);
    eprintln!(
        "{one} schedules with one preemption, {} in all",
        scenario.runs
    );
}

const SCENARIOS: [(&str, &[Act]); 12] = [
    ("build", &[reuse, store_and_collect]),
    ("reuse", &[reuse, collect]),
    ("repeat", &[repeat, collect]),
    ("read", &[read, collect]),
    ("record", &[use_record, collect]),
    ("rewrite", &[read_kept, collect]),
    ("merge", &[read_many, store_and_collect]),
    ("collections", &[collect, plan_and_collect, read]),
    ("writers", &[reuse, repeat, collect]),
    ("plan", &[reuse, plan_and_collect]),
    ("sweep", &[reuse, sweep, sweep]),
    ("format", &[manage, manage, sweep]),
];

#[test]
fn a_writer_reuses_what_is_collected() {
    explore("reuse");
}

#[test]
fn a_writer_reuses_what_another_collects() {
    explore("build");
}

#[test]
fn a_writer_stores_the_layer_that_is_collected() {
    explore("repeat");
}

#[test]
fn a_reader_pins_what_is_collected() {
    explore("read");
}

#[test]
fn a_record_is_used_and_dropped() {
    explore("record");
}

#[test]
fn a_pack_is_read_and_rewritten() {
    explore("rewrite");
}

#[test]
fn small_packs_are_read_and_merged() {
    explore("merge");
}

#[test]
fn two_collections_and_a_reader() {
    explore("collections");
}

#[test]
fn two_writers_and_a_collection() {
    explore("writers");
}

#[test]
fn a_collection_is_planned_beside_a_writer() {
    explore("plan");
}

#[test]
fn two_sweeps_and_a_writer() {
    explore("sweep");
}

#[test]
fn a_sweep_beside_the_first_refs_of_a_kind() {
    explore("format");
}

#[test]
#[ignore = "takes an hour"]
fn all_schedules_with_two_preemptions() {
    for (name, acts) in SCENARIOS {
        let mut scenario = Scenario::new(name, acts);
        scenario.explore(2, 1);
        scenario.wander(2000, 2);
        eprintln!("{name}: {} schedules", scenario.runs);
    }
}
