//! What each worker has by now, and what it needs next. Nothing here does a task.
//!
//! A worker looks at what is made, from its base up, and asks for the first thing that is missing.
//! Once that is there, it looks again from the start. So there is no state between, which could be
//! out of step with what was made.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use iii_oci::Image;
use iii_store::{Layer, Lease};
use rustix::process::Signal;

use crate::build::pool::Queue;
use crate::build::realise::{Realiser, Wanted, Worker};
use crate::build::{BuildError, Event, Outcome, Report, Stack};
use crate::compose::Isolation;
use crate::plan::Kind;
use crate::plan::environment::{self, Env};
use crate::plan::graph::{Graph, StepId, Task};
use crate::project::{Project, WorkerName};
use crate::worker::error::RunError;
use crate::worker::isolation::isolation;

/// A base image and its layers, pinned.
#[derive(Clone)]
pub struct Base {
    pub image: Image,
    pub layers: Stack,
}

/// What the layers of a worker above its base are made from.
#[derive(Clone)]
pub struct Footing {
    pub wanted: Wanted,
    pub image: Image,
    /// The environment of its steps.
    pub env: Env,
    pub isolation: Isolation,
}

/// A step that is to run, unless its layer is stored.
pub struct Step {
    pub id: StepId,
    pub footing: Footing,
    pub script: String,
    /// The layers below, bottom first.
    pub below: Vec<Arc<Layer>>,
    pub project: Arc<Layer>,
}

/// A task, with all that it takes to do it.
pub enum Work {
    Base {
        /// The image's name.
        image: String,
        /// The worker that is told of it.
        worker: WorkerName,
    },
    Project(Box<Footing>),
    Step(Box<Step>),
}

/// What a task has made, by what it is wanted for.
pub enum Product {
    Base(String, Base),
    Project(PathBuf, Report, Arc<Layer>),
    Step(StepId, Outcome),
}

/// Everything that is made by now.
#[derive(Default)]
struct Products {
    bases: BTreeMap<String, Base>,
    projects: BTreeMap<PathBuf, (Report, Arc<Layer>)>,
    steps: BTreeMap<StepId, Outcome>,
}

impl Products {
    fn put(&mut self, product: Product) {
        match product {
            Product::Base(name, base) => {
                self.bases.insert(name, base);
            }
            Product::Project(root, report, layer) => {
                self.projects.insert(root, (report, layer));
            }
            Product::Step(id, outcome) => {
                self.steps.insert(id, outcome);
            }
        }
    }
}

/// A worker on the way to its layers.
struct Job {
    wanted: Wanted,
    isolation: Isolation,
    /// How many of its products it was told of.
    told: usize,
}

/// A worker that needs nothing more, or the first thing that it lacks.
enum Next {
    Whole(Box<Worker>),
    Lacks(Task, Work),
}

enum JobState {
    Open(Box<Job>),
    Done(WorkerName, Result<Box<Worker>, RunError>),
}

/// All workers, and the tasks that they wait for.
pub struct Jobs<'a> {
    realiser: &'a Realiser<'a>,
    lease: &'a Lease,
    graph: Graph<Work>,
    made: Products,
    /// Tasks that failed, each with the worker that was told why.
    failed: BTreeMap<Task, WorkerName>,
    all: Vec<JobState>,
    /// What ended it all early.
    interrupted: Option<Signal>,
}

impl<'a> Jobs<'a> {
    pub fn new(realiser: &'a Realiser<'a>, lease: &'a Lease) -> Self {
        Self {
            realiser,
            lease,
            graph: Graph::default(),
            made: Products::default(),
            failed: BTreeMap::new(),
            all: Vec::new(),
            interrupted: None,
        }
    }

    pub fn len(&self) -> usize {
        self.all.len()
    }

    /// Adds a worker. What its sandboxes are is decided here, before anything is built, which may
    /// take a probe and a download.
    pub fn add(&mut self, wanted: Wanted) {
        let realiser = self.realiser;
        let events = |event: Event<'_>| realiser.tell(&wanted.name, event);
        let (home, options) = (realiser.home, realiser.with.sandbox);
        let isolation = isolation(home, options, &wanted.project, &events);
        self.all.push(match isolation {
            Ok(isolation) => JobState::Open(Box::new(Job {
                wanted,
                isolation,
                told: 0,
            })),
            Err(error) => JobState::Done(wanted.name, Err(error)),
        });
        self.advance(self.all.len() - 1);
    }

    /// What became of each worker, once the queue is over.
    pub fn finished(self) -> Vec<(WorkerName, Result<Worker, RunError>)> {
        let end = |state| match state {
            JobState::Done(name, result) => (name, result.map(|worker| *worker)),
            // Only an interrupted queue leaves workers open.
            JobState::Open(job) => {
                let error = BuildError::Interrupted {
                    kind: Kind::Project,
                    signal: self.interrupted.unwrap_or(Signal::TERM),
                };
                (job.wanted.name, Err(error.into()))
            }
        };
        self.all.into_iter().map(end).collect()
    }

    /// Takes a worker as far as it comes with what is made, and makes it wait for what it lacks.
    fn advance(&mut self, number: usize) {
        let Some(JobState::Open(job)) = self.all.get_mut(number) else {
            return;
        };
        let result = match next(self.realiser, job, &self.made, self.lease) {
            Next::Lacks(task, work) => match self.failed.get(&task) {
                Some(first) => Err(also_failed(&job.wanted.name, first, &task)),
                None => return self.graph.want(number, task, work),
            },
            Next::Whole(worker) => Ok(worker),
        };
        self.end(number, result);
    }

    fn end(&mut self, number: usize, result: Result<Box<Worker>, RunError>) {
        if let Some(state) = self.all.get_mut(number)
            && let JobState::Open(job) = state
        {
            *state = JobState::Done(job.wanted.name.clone(), result);
        }
    }

    /// Fails the workers that waited for a task: the first with the reason.
    fn fail(&mut self, task: &Task, error: RunError, waited: Vec<usize>) {
        if let RunError::Build(BuildError::Interrupted { signal, .. }) = &error {
            self.interrupted = Some(*signal);
        }
        let mut error = Some(error);
        for number in waited {
            let Some(JobState::Open(job)) = self.all.get(number) else {
                continue;
            };
            let name = &job.wanted.name;
            let first = self.failed.entry(task.clone());
            let first = first.or_insert_with(|| name.clone());
            let error = error
                .take()
                .unwrap_or_else(|| also_failed(name, first, task));
            self.end(number, Err(error));
        }
    }
}

impl Queue for Jobs<'_> {
    type Work = (Task, Work);
    type Done = (Task, Result<Product, RunError>);

    fn is_over(&self) -> bool {
        self.interrupted.is_some() || self.graph.is_over()
    }

    fn take(&mut self) -> Option<Self::Work> {
        self.graph.take()
    }

    fn finish(&mut self, (task, result): Self::Done) {
        let waited = self.graph.finish(&task);
        match result {
            Ok(product) => {
                self.made.put(product);
                for number in waited {
                    self.advance(number);
                }
            }
            Err(error) => self.fail(&task, error, waited),
        }
    }
}

/// Looks from the base up at what is made for a worker, and tells it of what it sees first.
fn next(realiser: &Realiser<'_>, job: &mut Job, made: &Products, lease: &Lease) -> Next {
    let Job {
        wanted,
        isolation,
        told,
    } = job;
    let mut seen = 0;
    let mut tell = |event: Event<'_>| {
        seen += 1;
        if seen > *told {
            *told = seen;
            realiser.tell(&wanted.name, event);
        }
    };
    let name = wanted.base.as_ref().unwrap_or(&wanted.project.base_image);
    let Some(base) = made.bases.get(name) else {
        let work = Work::Base {
            image: name.clone(),
            worker: wanted.name.clone(),
        };
        return Next::Lacks(Task::Base(name.clone()), work);
    };
    tell(Event::Base(&base.image));
    let env = environment::for_steps(&base.image.config.env, wanted.project.tool_env());
    let footing = Footing {
        wanted: wanted.clone(),
        image: base.image.clone(),
        env,
        isolation: isolation.clone(),
    };
    let root = &wanted.project.root;
    let Some((report, project)) = made.projects.get(root) else {
        let task = Task::Project(root.clone());
        return Next::Lacks(task, Work::Project(Box::new(footing)));
    };
    let mut stack = base.layers.clone();
    for kind in [Kind::Setup, Kind::Install] {
        let Some(script) = script(&wanted.project, kind) else {
            continue;
        };
        let key = realiser
            .builder(&footing, lease, &|_| {})
            .key(kind, script, &stack.layers);
        let id = StepId {
            kind,
            key,
            project: project.tree_id(),
        };
        let Some(outcome) = made.steps.get(&id) else {
            let step = Step {
                id,
                script: script.to_owned(),
                below: stack.layers,
                project: Arc::clone(project),
                footing,
            };
            return Next::Lacks(Task::Step(id), Work::Step(Box::new(step)));
        };
        tell(Event::Ready(&outcome.report));
        stack.put(outcome.clone());
    }
    tell(Event::Ready(report));
    stack.put_project(
        base.layers.layers.len(),
        report.clone(),
        Arc::clone(project),
    );
    Next::Whole(Box::new(footing.with(stack)))
}

impl Footing {
    fn with(self, stack: Stack) -> Worker {
        Worker {
            project: self.wanted.project,
            name: self.wanted.name,
            image: self.image,
            env: self.env,
            isolation: self.isolation,
            stack,
        }
    }
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
        kind: task.kind(),
    }
}
