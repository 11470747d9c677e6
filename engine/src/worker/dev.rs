//! `worker dev` and `worker build`, from top to bottom, and the layers of a worker for whoever has
//! another use for them.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use iii_oci::{self as oci, Image};
use iii_sandbox::Sandbox;
use iii_store::{Layer, Lease, RefKind, Store};

use crate::build::realise::{Realiser, Wanted, Worker};
use crate::build::{Event, Report};
use crate::home::Home;
use crate::managed::PATIENCE;
use crate::plan::Kind;
use crate::plan::environment::{self, Env};
use crate::project::{Project, WorkerName};
use crate::worker::Ended;
use crate::worker::engine::Engine;
use crate::worker::error::RunError;
use crate::worker::keep::RunsOn;
use crate::worker::place::{Place, Task, owner};
use crate::worker::session::{RunKind, RunOptions, Session, Sieve};
use crate::worker::snapshot;
use crate::worker::supervise::Signals;
use crate::worker::target::Target;

/// What to run.
#[derive(Debug, Clone)]
pub struct Options {
    /// The project and its layers.
    pub target: Target,
    /// Where the engine listens, as `ws://localhost:49134`.
    pub engine: Engine,
    /// Forgets what the sandbox wrote, keeps the layers.
    pub fresh: bool,
    /// The engine's config.yaml; it need not exist.
    pub config: PathBuf,
    /// Has the worker follow what changes in its project.
    pub watch: bool,
}

/// What every command about a project begins with.
fn open(target: &Target) -> Result<Wanted, RunError> {
    let project = Project::open(&target.path)?;
    let name = match &target.name {
        Some(name) => name.parse()?,
        None => project.dev_name(),
    };
    Ok(Wanted {
        project,
        name,
        base: target.base.clone(),
    })
}

/// Realises the layers of a project for `purpose`, shares them and starts nothing.
fn realise(
    home: &Home,
    store: &Store,
    target: &Target,
    purpose: &str,
    signals: &Signals,
    events: &(dyn Fn(Event<'_>) + Sync),
) -> Result<(Worker, Lease), RunError> {
    let events = |_: Option<&WorkerName>, event: Event<'_>| events(event);
    let realiser = Realiser::new(home, store, target.into(), signals, &events);
    let realised = realiser.one(purpose, open(target)?);
    if let Ok((worker, _)) = &realised {
        realiser.share(worker, &AtomicBool::new(false));
    }
    // One that failed may have done so for want of space.
    let has_grown = realised
        .as_ref()
        .map_or(true, |(worker, _)| worker.has_grown());
    if target.collect && has_grown {
        realiser.collect();
    }
    realised
}

/// Realises the layers of a project and starts nothing. Returns what became of each, bottom first.
pub fn build(
    home: &Home,
    target: &Target,
    signals: &Signals,
    events: &(dyn Fn(Event<'_>) + Sync),
) -> Result<Vec<Report>, RunError> {
    let store = Store::open(home.store())?;
    let (worker, _lease) = realise(home, &store, target, "build", signals, events)?;
    Ok(worker.stack.reports)
}

/// Realises the layers of a project and runs its start command on them until it ends. `started` is
/// called once the command runs.
pub fn dev(
    home: &Home,
    options: &Options,
    signals: &Signals,
    events: &(dyn Fn(Event<'_>) + Sync),
    started: &(dyn Fn() + Sync),
) -> Result<Ended, RunError> {
    let target = &options.target;
    let wanted = open(target)?;
    let drop_upper = options.fresh || target.rebuild;
    let place = Place::claim(
        home.dev(wanted.name.as_str()),
        &wanted.name,
        &wanted.project.root,
        drop_upper,
    )?;
    let store = Store::open(home.store())?;
    let sieve = Sieve::default();
    let named = sieve.filter(events);
    let realiser = Realiser::new(home, &store, target.into(), signals, &named);
    let realised = realiser.one(RunKind::Dev.purpose(), wanted);
    if realised.is_err() && target.collect {
        // It may have failed for want of space.
        realiser.collect();
    }
    let (worker, lease) = realised?;
    if drop_upper {
        place.drop_upper()?;
    }
    let realiser = realiser.without_rebuild();
    let run = RunOptions {
        base: target.base.as_deref(),
        engine: &options.engine,
        config: &options.config,
        watch: options.watch,
        collect: target.collect,
    };
    let session = Session::new(RunKind::Dev, run, &realiser, &sieve, &place, events);
    let mut attend = |sandbox: &mut Sandbox, is_first: bool| {
        if is_first {
            started();
            // Asked while signals are attended to: a name may take long to resolve.
            if !options.engine.listens() {
                let engine = options.engine.url();
                events(Event::Note(format!(
                    "no engine listens at {engine}; start it with `iii`, the worker connects when it is there"
                )));
            }
        }
        Ok::<_, RunError>(sandbox.wait()?)
    };
    session.run(worker, lease, &mut attend)
}

/// Whether there is a sandbox called `name`, or anything that the store keeps for one.
pub fn is_there(home: &Home, name: &WorkerName) -> Result<bool, RunError> {
    if owner(&home.dev(name.as_str()))?.is_some() {
        return Ok(true);
    }
    let dir = home.store();
    if !dir.exists() {
        return Ok(false);
    }
    let kept = Store::open(dir)?.get_ref(RefKind::Worker, name.as_str())?;
    Ok(kept.is_some())
}

/// Removes the sandbox `name`, which does not run, and all that is kept for it: what it wrote, its
/// snapshots, and its hold on its layers.
pub fn remove(home: &Home, name: &WorkerName) -> Result<(), RunError> {
    let place = Place::hold(home.dev(name.as_str()), name, PATIENCE, Task::Remove)?;
    // What the refs keep is what the upper needs. The worker's goes last, as it is what says that
    // there is one.
    place.drop_upper()?;
    let store = Store::open(home.store())?;
    snapshot::remove_all(&store, RefKind::Worker, name)?;
    store.remove_ref(RefKind::Worker, name.as_str())?;
    place.remove()
}

/// A worker whose layers are all there, and pinned for as long as this lives.
pub struct Built {
    /// Its project.
    pub project: Project,
    /// Its name.
    pub name: WorkerName,
    /// The store.
    pub store: Store,
    /// Its base.
    pub image: Image,
    /// The environment of its steps.
    pub env: Env,
    /// The layers that it runs on, bottom first.
    pub layers: Vec<(Kind, Arc<Layer>)>,
    /// Pins them.
    pub lease: Lease,
}

/// Realises the layers of a project, as [`build`] does.
pub fn built(
    home: &Home,
    target: &Target,
    signals: &Signals,
    events: &(dyn Fn(Event<'_>) + Sync),
) -> Result<Built, RunError> {
    let store = Store::open(home.store())?;
    let (worker, lease) = realise(home, &store, target, "export", signals, events)?;
    let kinds = worker.stack.reports.iter().map(|report| report.kind);
    Ok(Built {
        layers: kinds.zip(worker.stack.layers).collect(),
        project: worker.project,
        name: worker.name,
        store,
        image: worker.image,
        env: worker.env,
        lease,
    })
}

/// The worker `name` with the layers that it last ran on. How it is run is what its project says
/// now, which must have the same steps, and the same base if that is not `base`. Nothing is built.
pub fn last_run(home: &Home, name: WorkerName, base: Option<&str>) -> Result<Built, RunError> {
    let store = Store::open(home.store())?;
    let never = || RunError::NeverRun {
        name: name.to_string(),
    };
    let root = owner(&home.dev(name.as_str()))?.ok_or_else(never)?;
    let kept = store.get_ref(RefKind::Worker, name.as_str())?;
    let kept = kept.ok_or_else(never)?;
    let lease = store.lease(&format!("export {name}"))?;
    let RunsOn {
        layers: kept,
        project: slot,
    } = RunsOn::of(&kept);
    lease.pin(&kept)?;
    let project = Project::open(&root)?;
    let outdated = || RunError::Outdated {
        name: name.to_string(),
        project: root.clone(),
    };
    let base = base.unwrap_or(&project.base_image);
    let image = oci::resolve(&store, base)?.ok_or_else(outdated)?;
    let scripts = &project.scripts;
    let steps = [
        (Kind::Setup, scripts.setup.is_some()),
        (Kind::Install, scripts.install.is_some()),
    ];
    let mut kinds = vec![Kind::Base; image.layers.len()];
    kinds.extend(
        steps
            .into_iter()
            .filter_map(|(kind, is)| is.then_some(kind)),
    );
    // An earlier program had the project on top.
    let slot = slot.filter(|slot| (image.layers.len()..=kinds.len()).contains(slot));
    kinds.insert(slot.ok_or_else(outdated)?, Kind::Project);
    if !kept.starts_with(&image.layers) || kept.len() != kinds.len() {
        return Err(outdated());
    }
    let layers = kept.iter().map(|id| store.layer(id));
    let layers = layers.collect::<Result<Vec<_>, _>>()?;
    Ok(Built {
        layers: kinds.into_iter().zip(layers).collect(),
        env: environment::for_steps(&image.config.env, project.tool_env()),
        project,
        name,
        store,
        image,
        lease,
    })
}
