//! Realises the layers of any number of workers at once: what [`graph`](crate::plan::graph) says next, by as many threads as there
//! are cores, each step by [`build`](crate::build).

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use iii_oci::{self as oci, Image, ImageError, Limits, Origin, Platform, Settings};
use iii_store::{GcReport, Layer, Lease, Store, StoreError};
use rustix::process::Signal;

use crate::build::collect;
use crate::build::{self, BuildError, Builder, Event, Outcome, Report, Stack, Status};
use crate::compose::Isolation;
use crate::home::Home;
use crate::plan::Kind;
use crate::plan::environment::{self, Env};
use crate::plan::graph::{Graph, Task};
use crate::project::{Project, WorkerName};
use crate::shared_cache::{self, CacheOptions, Caches as LayerCaches, Recorded};
use crate::worker::run::{RunError, Runtime, SandboxOptions, Target, distrust_kvm, isolation};
use crate::worker::supervise::Signals;

/// A collection after an edit that freed no more than this many bytes is not worth a word.
const LITTLE: u64 = 64 << 20;
/// How long layers may go to a cache when the worker has ended.
const SHARE_TIME: Duration = Duration::from_secs(60);

/// How long that may take without a word.
const SHARE_PAUSE: Duration = Duration::from_millis(50);

/// Fewest and most threads: one of them often waits for the network or a script, and a disk serves but so many.
const THREADS: (usize, usize) = (2, 4);

/// A worker whose layers are wanted.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Its project.
    pub project: Project,
    /// Its name.
    pub name: WorkerName,
    /// The base image, unless it follows from the project.
    pub base: Option<String>,
}

/// A worker whose layers are there.
pub struct Worker {
    /// Its project.
    pub project: Project,
    /// Its name.
    pub name: WorkerName,
    /// Its base.
    pub image: Image,
    /// The environment of its steps.
    pub env: Env,
    /// What it runs in.
    pub isolation: Isolation,
    /// Its layers.
    pub stack: Stack,
}

impl Worker {
    /// Whether the store has grown.
    pub fn has_grown(&self) -> bool {
        let mut reports = self.stack.reports.iter();
        reports.any(|report| report.status != Status::Hit)
    }
}

/// How layers are realised.
#[derive(Debug, Clone, Copy)]
pub struct With<'a> {
    /// Runs setup and install whatever is stored.
    pub rebuild: bool,
    /// How much of anything what is pulled or fetched may bring.
    pub limits: &'a Limits,
    /// Where layers are fetched from, and where they are put for others.
    pub caches: &'a CacheOptions,
    /// What steps run in.
    pub sandbox: &'a SandboxOptions,
}

impl<'a> From<&'a Target> for With<'a> {
    fn from(target: &'a Target) -> Self {
        Self {
            rebuild: target.rebuild,
            limits: &target.limits,
            caches: &target.caches,
            sandbox: &target.sandbox,
        }
    }
}

/// What layers are realised from and with.
pub struct Realiser<'a> {
    home: &'a Home,
    store: &'a Store,
    with: With<'a>,
    caches: LayerCaches,
    signals: &'a Signals,
    events: Events<'a>,
}

/// Takes the layers of a worker, to be given to the cache that takes some.
pub type Share<'a> = dyn Fn(&Worker) + 'a;

/// Told what happens to which worker, from several threads.
pub type Events<'a> = &'a (dyn Fn(Option<&WorkerName>, Event<'_>) + Sync);

/// A worker on the way to its layers.
struct Job {
    wanted: Wanted,
    /// Known once the base is there.
    base: Option<(Image, Env, Isolation)>,
    stack: Stack,
    project: Option<(Report, Arc<Layer>)>,
    result: Option<Result<(), RunError>>,
}

/// Workers by name, whatever became of each, and what pins their layers.
pub type Realised = (Vec<(WorkerName, Result<Worker, RunError>)>, Lease);

/// What a task has made.
#[derive(Clone)]
enum Made {
    Base(Image),
    Project(Report, Arc<Layer>),
    Step(Outcome),
}

#[derive(Default)]
struct State {
    graph: Graph,
    made: BTreeMap<Task, Made>,
    /// Whose tasks failed.
    failed: BTreeMap<Task, WorkerName>,
    jobs: Vec<Job>,
    /// What ended it all early.
    interrupted: Option<Signal>,
}

impl<'a> Realiser<'a> {
    /// With the caches that are asked for. Where not even a request can be made, there are none.
    pub fn new(
        home: &'a Home,
        store: &'a Store,
        with: With<'a>,
        signals: &'a Signals,
        events: Events<'a>,
    ) -> Self {
        Self {
            home,
            store,
            with,
            caches: layer_caches(with.caches, &|event| events(None, event)),
            signals,
            events,
        }
    }

    /// Realises the layers of all `wanted`, equal ones once; one that fails fails only those that need it. The lease pins the layers,
    /// and nothing else.
    /// Where microVMs were to be tried and one says nothing, all of it is done in namespaces.
    pub fn all(&self, purpose: &str, wanted: Vec<Wanted>) -> Result<Realised, RunError> {
        let (done, lease) = self.all_once(purpose, wanted.clone())?;
        let mut failures = done.iter().filter_map(|(_, result)| result.as_ref().err());
        let silent = failures.find(|error| error.is_silent_guest());
        match silent.filter(|_| self.with.sandbox.runtime == Runtime::Auto) {
            Some(error) => {
                distrust_kvm(self.home, error, &|event| (self.events)(None, event));
                self.all_once(purpose, wanted)
            }
            None => Ok((done, lease)),
        }
    }

    fn all_once(&self, purpose: &str, wanted: Vec<Wanted>) -> Result<Realised, RunError> {
        // What runs that were killed have left.
        build::sweep(self.home);
        self.store.sweep_dead_leases()?;
        // This one pins whatever is looked at on the way, too: more than is needed from then on.
        let looking = self.store.lease(purpose)?;
        let mut state = State::default();
        for (number, wanted) in wanted.into_iter().enumerate() {
            for warning in &wanted.project.warnings {
                self.tell(&wanted.name, Event::Note(warning.clone()));
            }
            state.jobs.push(Job {
                wanted,
                base: None,
                stack: Stack::default(),
                project: None,
                result: None,
            });
            self.advance(&mut state, number, &looking);
        }
        let threads = thread::available_parallelism().map_or(THREADS.0, usize::from);
        let threads = threads.clamp(THREADS.0, THREADS.1).min(state.jobs.len());
        let (state, changed) = (Mutex::new(state), Condvar::new());
        thread::scope(|scope| {
            for _ in 1..threads {
                scope.spawn(|| self.work(&state, &changed, &looking));
            }
            self.work(&state, &changed, &looking);
        });
        let state = state.into_inner().unwrap_or_else(PoisonError::into_inner);
        let done: Vec<_> = state.jobs.into_iter().map(finished).collect();
        let lease = self.store.lease(purpose)?;
        for (_, result) in &done {
            if let Ok(worker) = result {
                lease.pin(&worker.stack.ids())?;
            }
        }
        Ok((done, lease))
    }

    /// Realises the layers of one worker.
    pub fn one(&self, purpose: &str, wanted: Wanted) -> Result<(Worker, Lease), RunError> {
        let purpose = format!("{purpose} {}", wanted.name);
        let (mut done, lease) = self.all(&purpose, vec![wanted])?;
        let (_, result) = done.pop().ok_or(RunError::OutOfTurn)?;
        Ok((result?, lease))
    }

    fn tell(&self, worker: &WorkerName, event: Event<'_>) {
        (self.events)(Some(worker), event);
    }

    /// Does what there is to do until nobody waits for anything.
    fn work(&self, state: &Mutex<State>, changed: &Condvar, lease: &Lease) {
        let mut locked = lock(state);
        loop {
            if locked.interrupted.is_some() || locked.graph.is_over() {
                changed.notify_all();
                return;
            }
            let Some((task, worker)) = locked.graph.take() else {
                locked = changed.wait(locked).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let order = Order::of(&locked, worker);
            drop(locked);
            let made = match order {
                Some(order) => self.run(&task, &order, lease),
                None => Err(RunError::OutOfTurn),
            };
            locked = lock(state);
            self.finish(&mut locked, &task, made, lease);
            changed.notify_all();
        }
    }

    /// Does one task, for one of those who wait for it.
    fn run(&self, task: &Task, order: &Order, lease: &Lease) -> Result<Made, RunError> {
        let name = &order.wanted.name;
        let events = |event: Event<'_>| self.tell(name, event);
        if let Task::Base(image) = task {
            return base(
                self.store,
                image,
                self.with.rebuild,
                self.with.limits,
                &events,
            )
            .map(Made::Base);
        }
        let builder = self
            .builder(order, lease, &events)
            .ok_or(RunError::OutOfTurn)?;
        Ok(match task {
            Task::Base(_) => return Err(RunError::OutOfTurn),
            Task::Project(_) => {
                let (report, layer) = builder.snapshot()?;
                Made::Project(report, layer)
            }
            Task::Step { kind, key, .. } => {
                let script = script(&order.wanted.project, *kind).ok_or(RunError::OutOfTurn)?;
                let project = order.project.as_ref().ok_or(RunError::OutOfTurn)?;
                Made::Step(builder.step(*kind, script, *key, &order.below, project)?)
            }
        })
    }

    fn builder<'b>(
        &'b self,
        order: &'b Order,
        lease: &'b Lease,
        events: &'b (dyn Fn(Event<'_>) + Sync),
    ) -> Option<Builder<'b>> {
        let (image, env, isolation) = order.base.as_ref()?;
        Some(Builder {
            home: self.home,
            store: self.store,
            lease,
            project: &order.wanted.project,
            name: order.wanted.name.as_str(),
            image,
            env,
            isolation,
            rebuild: self.with.rebuild,
            caches: &self.caches,
            limits: self.with.limits,
            signals: self.signals,
            events,
        })
    }

    /// Hands on what a task has made to those who waited for it.
    fn finish(&self, state: &mut State, task: &Task, made: Result<Made, RunError>, lease: &Lease) {
        let waited = state.graph.finish(task);
        match made {
            Ok(made) => {
                state.made.insert(task.clone(), made);
                for worker in waited {
                    self.advance(state, worker, lease);
                }
            }
            Err(error) => {
                if let RunError::Build(BuildError::Interrupted { signal, .. }) = &error {
                    state.interrupted = Some(*signal);
                }
                let mut error = Some(error);
                for worker in waited {
                    let Some(job) = state.jobs.get_mut(worker) else {
                        continue;
                    };
                    let name = &job.wanted.name;
                    let first = state
                        .failed
                        .entry(task.clone())
                        .or_insert_with(|| name.clone());
                    let also = || also_failed(name, first, task);
                    job.result = Some(Err(error.take().unwrap_or_else(also)));
                }
            }
        }
        if let Some(signal) = state.interrupted {
            for job in state.jobs.iter_mut().filter(|job| job.result.is_none()) {
                let kind = Kind::Project;
                job.result = Some(Err(BuildError::Interrupted { kind, signal }.into()));
            }
        }
    }

    /// Takes a worker as far as it comes with what there is, and has it wait for what it needs next.
    fn advance(&self, state: &mut State, worker: usize, lease: &Lease) {
        while let Some(job) = state.jobs.get_mut(worker) {
            if job.result.is_some() {
                return;
            }
            let task = match self.next(job, lease) {
                Ok(Some(task)) => task,
                Ok(None) => {
                    job.result = Some(Ok(()));
                    return;
                }
                Err(error) => {
                    job.result = Some(Err(error));
                    return;
                }
            };
            if state.graph.want(worker, &task) {
                return;
            }
            let given = match (state.made.get(&task), state.failed.get(&task)) {
                (Some(made), _) => self.give(job, made.clone(), lease),
                (None, Some(first)) => Err(also_failed(&job.wanted.name, first, &task)),
                (None, None) => Err(RunError::OutOfTurn),
            };
            if let Err(error) = given {
                job.result = Some(Err(error));
                return;
            }
        }
    }

    /// What a worker needs next; nothing if it has everything.
    fn next(&self, job: &mut Job, lease: &Lease) -> Result<Option<Task>, RunError> {
        let wanted = &job.wanted;
        if job.base.is_none() {
            let name = wanted.base.as_ref().unwrap_or(&wanted.project.base_image);
            return Ok(Some(Task::Base(name.clone())));
        }
        let Some((report, layer)) = &job.project else {
            return Ok(Some(Task::Project(wanted.project.root.clone())));
        };
        let last = job.stack.reports.last().map(|report| report.kind);
        let kinds = [Kind::Setup, Kind::Install];
        let missing = kinds.into_iter().find(|kind| {
            last.is_none_or(|last| last < *kind) && script(&wanted.project, *kind).is_some()
        });
        if let Some(kind) = missing {
            let order = Order::from(&*job);
            let events = |_: Event<'_>| {};
            let builder = self.builder(&order, lease, &events);
            let text = script(&wanted.project, kind).unwrap_or_default();
            let key = builder.map(|builder| builder.key(kind, text, &job.stack.layers));
            return Ok(Some(Task::Step {
                kind,
                key: key.ok_or(RunError::OutOfTurn)?,
                project: layer.tree_id(),
            }));
        }
        self.tell(&wanted.name, Event::Ready(report));
        job.stack.push(report.clone(), Arc::clone(layer));
        Ok(None)
    }

    /// Gives a worker what it waited for.
    fn give(&self, job: &mut Job, made: Made, lease: &Lease) -> Result<(), RunError> {
        match made {
            Made::Base(image) => {
                let env = environment::for_steps(&image.config.env, job.wanted.project.tool_env());
                let events = |event: Event<'_>| self.tell(&job.wanted.name, event);
                let project = &job.wanted.project;
                let isolation = isolation(self.home, self.with.sandbox, project, &events)?;
                job.base = Some((image, env, isolation));
                let order = Order::from(&*job);
                let events = |_: Event<'_>| {};
                let builder = self
                    .builder(&order, lease, &events)
                    .ok_or(RunError::OutOfTurn)?;
                job.stack = builder.base()?;
                self.tell(&job.wanted.name, Event::Base(builder.image));
            }
            Made::Project(report, layer) => job.project = Some((report, layer)),
            Made::Step(outcome) => {
                self.tell(&job.wanted.name, Event::Ready(&outcome.report));
                job.stack.put(outcome);
            }
        }
        Ok(())
    }
}

impl Realiser<'_> {
    /// Gives the layers of setup and install to the cache that takes some. To fail is worth a line, and no more.
    pub fn share(&self, worker: &Worker, stop: &AtomicBool) {
        let events = |event: shared_cache::Event<'_>| self.tell(&worker.name, Event::Cache(event));
        self.caches
            .push(self.store, &worker.stack.recorded, stop, &events);
    }

    /// Does so while `run` runs, for what it hands over, and at most [`SHARE_TIME`] longer. Who has had enough presses Ctrl-C.
    pub fn share_during<R>(&self, name: &WorkerName, run: impl FnOnce(&Share<'_>) -> R) -> R {
        if !self.caches.takes() {
            return run(&|_| ());
        }
        let stop = AtomicBool::new(false);
        let (sender, done) = mpsc::channel::<()>();
        let (give, given) = mpsc::channel::<Vec<Recorded>>();
        thread::scope(|scope| {
            let stop_sharing = &stop;
            scope.spawn(move || {
                let events = |event: shared_cache::Event<'_>| self.tell(name, Event::Cache(event));
                for recorded in given {
                    self.caches
                        .push(self.store, &recorded, stop_sharing, &events);
                }
                drop(sender);
            });
            let result = run(&|worker| {
                // It takes them as long as this is here.
                let _ = give.send(worker.stack.recorded.clone());
            });
            drop(give);
            if done.recv_timeout(SHARE_PAUSE) == Err(RecvTimeoutError::Timeout) {
                let note = "layers still go to the cache; Ctrl-C ends that".to_owned();
                self.tell(name, Event::Note(note));
                // It hangs up when it has ended.
                let _ = done.recv_timeout(SHARE_TIME);
                stop.store(true, Ordering::Relaxed);
            }
            result
        })
    }

    /// From now on runs a step only where that is needed.
    #[must_use]
    pub fn without_rebuild(mut self) -> Self {
        self.with.rebuild = false;
        self
    }

    /// Clears the store if it or the disk is too full after something was built. To fail is worth a line, and no more.
    pub fn collect(&self) {
        self.collected(collect::if_full(self.store), 0);
    }

    /// Clears the store if it has too many files after a project was edited.
    pub fn collect_edits(&self) {
        self.collected(collect::if_many(self.store), LITTLE);
    }

    /// Tells of what was freed, unless it is little.
    fn collected(&self, result: Result<Option<GcReport>, StoreError>, little: u64) {
        let events = |event: Event<'_>| (self.events)(None, event);
        match result {
            Ok(Some(report)) if report.freed > little => events(Event::Collected(&report)),
            Ok(_) => {}
            Err(error) => events(Event::Note(format!("clearing the store failed: {error}"))),
        }
    }
}

/// What a task needs to know of the worker that it is done for.
struct Order {
    wanted: Wanted,
    base: Option<(Image, Env, Isolation)>,
    below: Vec<Arc<Layer>>,
    project: Option<Arc<Layer>>,
}

impl Order {
    fn of(state: &State, worker: usize) -> Option<Self> {
        state.jobs.get(worker).map(Self::from)
    }
}

impl From<&Job> for Order {
    fn from(job: &Job) -> Self {
        Self {
            wanted: job.wanted.clone(),
            base: job.base.clone(),
            below: job.stack.layers.clone(),
            project: job.project.as_ref().map(|(_, layer)| Arc::clone(layer)),
        }
    }
}

fn finished(job: Job) -> (WorkerName, Result<Worker, RunError>) {
    let name = job.wanted.name.clone();
    let result = match (job.result, job.base) {
        (Some(Ok(())), Some((image, env, isolation))) => Ok(Worker {
            project: job.wanted.project,
            name: job.wanted.name,
            image,
            env,
            isolation,
            stack: job.stack,
        }),
        (Some(Err(error)), _) => Err(error),
        _ => Err(RunError::OutOfTurn),
    };
    (name, result)
}

fn script(project: &Project, kind: Kind) -> Option<&str> {
    match kind {
        Kind::Setup => project.scripts.setup.as_deref(),
        Kind::Install => project.scripts.install.as_deref(),
        Kind::Base | Kind::Project => None,
    }
}

fn also_failed(name: &WorkerName, first: &WorkerName, task: &Task) -> RunError {
    RunError::AlsoFailed {
        name: name.to_string(),
        with: first.to_string(),
        kind: match task {
            Task::Base(_) => Kind::Base,
            Task::Project(_) => Kind::Project,
            Task::Step { kind, .. } => *kind,
        },
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The caches that are asked for. Where not even a request can be made, there are none.
fn layer_caches(options: &CacheOptions, events: &dyn Fn(Event<'_>)) -> LayerCaches {
    if options.from.is_empty() && options.to.is_none() {
        return LayerCaches::default();
    }
    let caches =
        Settings::from_environment().and_then(|settings| LayerCaches::new(options, &settings));
    caches.unwrap_or_else(|error| {
        events(Event::Note(format!("no cache is used: {error}")));
        LayerCaches::default()
    })
}

/// The base image `name`: the one in the store, without asking anybody, or else the registry's. With `resolve`, the tag of one
/// that came from a registry is resolved again; where that fails, the one in the store serves.
fn base(
    store: &Store,
    name: &str,
    resolve: bool,
    limits: &Limits,
    events: &(dyn Fn(Event<'_>) + Sync),
) -> Result<Image, RunError> {
    let fits = |image: &Image| image.platform.is_none_or(|built| built == Platform::host());
    let stored = oci::resolve(store, name)?.filter(fits);
    let stored = match stored {
        Some(image) if !(resolve && image.origin == Origin::Registry) => return Ok(image),
        stored => stored,
    };
    // What a pull that was killed has left.
    store.sweep_dead_leases()?;
    let pulled = Settings::from_environment()
        .map_err(ImageError::from)
        .and_then(|settings| {
            oci::pull(store, name, Platform::host(), &settings, limits, &|event| {
                events(Event::Pulling(event));
            })
        });
    match (pulled, stored) {
        (Ok(pulled), _) => {
            events(Event::Pulled(&pulled));
            Ok(pulled.image)
        }
        (Err(error), Some(stored)) => {
            events(Event::Unresolved(&stored, &error));
            Ok(stored)
        }
        (Err(source), None) => Err(RunError::NoBase {
            name: name.to_owned(),
            source: Box::new(source),
        }),
    }
}
