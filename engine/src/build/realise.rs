//! Realises the layers of any number of workers at once: the next tasks of
//! [`jobs`](crate::build::jobs), on as many threads as there are cores, each step by
//! [`build`](crate::build).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use iii_oci::{self as oci, Image, ImageError, Limits, Origin, Platform};
use iii_store::{GcReport, Lease, Store, StoreError};

use crate::build::collect;
use crate::build::jobs::{Base, Footing, Jobs, Product, Step, Work};
use crate::build::{self, Builder, Event, RunningSteps, Stack, Status, pool};
use crate::compose::Isolation;
use crate::home::Home;
use crate::plan::environment::Env;
use crate::project::{Project, WorkerName};
use crate::shared_cache::{self, CacheOptions, Caches as LayerCaches, Recorded};
use crate::worker::error::RunError;
use crate::worker::isolation::{Runtime, SandboxOptions, distrust_kvm};
use crate::worker::supervise::Signals;
use crate::worker::target::Target;

/// A collection after an edit that freed no more than this many bytes is not worth a word.
const LITTLE: u64 = 64 << 20;
/// How long layers may go to a cache when the worker has ended.
const SHARE_TIME: Duration = Duration::from_secs(60);

/// How long that may take without a word.
const SHARE_PAUSE: Duration = Duration::from_millis(50);

/// Fewest and most threads: one of them often waits for the network or a script, and a disk serves
/// but so many.
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
    pub(crate) home: &'a Home,
    pub(crate) store: &'a Store,
    pub(super) with: With<'a>,
    caches: LayerCaches,
    pub(crate) signals: &'a Signals,
    running: Arc<RunningSteps>,
    events: Events<'a>,
}

/// Takes the layers of a worker, to be given to the cache that takes some.
pub type Share<'a> = dyn Fn(&Worker) + 'a;

/// Told what happens to which worker, from several threads.
pub type Events<'a> = &'a (dyn Fn(Option<&WorkerName>, Event<'_>) + Sync);

/// Workers by name, whatever became of each, and what pins their layers.
pub type Realised = (Vec<(WorkerName, Result<Worker, RunError>)>, Lease);

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
            caches: layer_caches(home, with.caches, &|event| events(None, event)),
            signals,
            running: Arc::default(),
            events,
        }
    }

    /// The steps that it runs.
    pub fn running(&self) -> &Arc<RunningSteps> {
        &self.running
    }

    /// Realises the layers of all `wanted`, equal ones once; one that fails fails only those that
    /// need it. The lease pins the layers, and nothing else. Where microVMs were to be tried and
    /// one says nothing, all of it is done in namespaces.
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
        let mut jobs = Jobs::new(self, &looking);
        for wanted in wanted {
            for warning in &wanted.project.warnings {
                self.tell(&wanted.name, Event::Note(warning.clone()));
            }
            jobs.add(wanted);
        }
        let threads = thread::available_parallelism().map_or(THREADS.0, usize::from);
        let threads = threads.clamp(THREADS.0, THREADS.1).min(jobs.len());
        let jobs = pool::work_off(jobs, threads, |(task, work)| {
            let product = self.run(work, &looking);
            (task, product)
        });
        let done = jobs.finished();
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
        let name = wanted.name.clone();
        let (mut done, lease) = self.all(&purpose, vec![wanted])?;
        let (_, result) = done.pop().ok_or(RunError::NeverRun {
            name: name.to_string(),
        })?;
        Ok((result?, lease))
    }

    pub(super) fn tell(&self, worker: &WorkerName, event: Event<'_>) {
        (self.events)(Some(worker), event);
    }

    /// Does one task, for one of the workers that wait for it.
    fn run(&self, work: Work, lease: &Lease) -> Result<Product, RunError> {
        match work {
            Work::Base { image, worker } => {
                let events = |event: Event<'_>| self.tell(&worker, event);
                let resolve = self.with.rebuild;
                let found = base(
                    self.home,
                    self.store,
                    &image,
                    resolve,
                    self.with.limits,
                    &events,
                )?;
                let layers = build::base(self.store, &found, lease)?;
                let base = Base {
                    image: found,
                    layers,
                };
                Ok(Product::Base(image, base))
            }
            Work::Project(footing) => {
                let events = |event: Event<'_>| self.tell(&footing.wanted.name, event);
                let (report, layer) = self.builder(&footing, lease, &events).snapshot()?;
                Ok(Product::Project(footing.wanted.project.root, report, layer))
            }
            Work::Step(step) => {
                let Step {
                    id,
                    footing,
                    script,
                    below,
                    project,
                } = *step;
                let events = |event: Event<'_>| self.tell(&footing.wanted.name, event);
                let builder = self.builder(&footing, lease, &events);
                let outcome = builder.step(id.kind, &script, id.key, &below, &project)?;
                Ok(Product::Step(id, outcome))
            }
        }
    }

    pub(super) fn builder<'b>(
        &'b self,
        footing: &'b Footing,
        lease: &'b Lease,
        events: &'b (dyn Fn(Event<'_>) + Sync),
    ) -> Builder<'b> {
        Builder {
            home: self.home,
            store: self.store,
            lease,
            project: &footing.wanted.project,
            name: footing.wanted.name.as_str(),
            image: &footing.image,
            env: &footing.env,
            isolation: &footing.isolation,
            rebuild: self.with.rebuild,
            caches: &self.caches,
            limits: self.with.limits,
            signals: self.signals,
            running: &self.running,
            events,
        }
    }
}

impl Realiser<'_> {
    /// Gives the layers of setup and install to the cache that takes some. To fail is worth a line,
    /// and no more.
    pub fn share(&self, worker: &Worker, stop: &AtomicBool) {
        let events = |event: shared_cache::Event<'_>| self.tell(&worker.name, Event::Cache(event));
        self.caches
            .push(self.store, &worker.stack.recorded, stop, &events);
    }

    /// Does so while `run` runs, for what it hands over, and at most [`SHARE_TIME`] longer. Who has
    /// had enough presses Ctrl-C.
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

    /// Clears the store if it or the disk is too full after something was built. To fail is worth a
    /// line, and no more.
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

/// The caches that are asked for. Where not even a request can be made, there are none.
pub(super) fn layer_caches(
    home: &Home,
    options: &CacheOptions,
    events: &dyn Fn(Event<'_>),
) -> LayerCaches {
    if options.from.is_empty() && options.to.is_none() {
        return LayerCaches::default();
    }
    let caches = home
        .registries()
        .and_then(|settings| LayerCaches::new(options, &settings));
    caches.unwrap_or_else(|error| {
        events(Event::Note(format!("no cache is used: {error}")));
        LayerCaches::default()
    })
}

/// The base image `name`: the one in the store, without asking anybody, or else the registry's.
/// With `resolve`, the tag of one that came from a registry is resolved again; where that fails,
/// the one in the store serves.
fn base(
    home: &Home,
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
    let pulled = home
        .registries()
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
