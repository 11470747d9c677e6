//! `worker add`: projects become workers of the engine's config.yaml, with all their layers there.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use iii_oci::Limits;
use iii_store::{RefKind, Store};

use super::supervisor::{Orders, last_orders, remember};
use super::{ManagedError, PATIENCE, State, beside, forget, path_of, state, unknown};
use crate::build::realise::{Events, Realiser, Wanted, With, Worker};
use crate::home::Home;
use crate::project::config;
use crate::project::edit::{self, Change};
use crate::project::{Project, WorkerName};
use crate::shared_cache::CacheOptions;
use crate::worker::engine::Engine;
use crate::worker::error::RunError;
use crate::worker::isolation::SandboxOptions;
use crate::worker::keep::keep_also;
use crate::worker::place::{Place, Task, owner};
use crate::worker::supervise::Signals;

/// What is to be added, and how.
#[derive(Debug, Clone)]
pub struct Options {
    /// Paths of projects, or names of workers that were added before.
    pub workers: Vec<String>,
    /// Stops them and deletes all that is kept for them first, and runs setup and install again.
    pub force: bool,
    /// Drops `config:` of their entries.
    pub reset_config: bool,
    /// The engine's config.yaml, an absolute path.
    pub config: PathBuf,
    /// How much of anything what is pulled or fetched may bring.
    pub limits: Limits,
    /// Where layers are fetched from, and where they are put for others.
    pub caches: CacheOptions,
    /// What steps run in.
    pub sandbox: SandboxOptions,
    /// What was said of sandboxes, which holds when they are started, too; nothing leaves that as
    /// it is.
    pub said: Option<SandboxOptions>,
    /// Lets the store be cleared after a build that leaves it or the disk too full.
    pub collect: bool,
    /// Whether they follow their projects when they are started; nothing leaves that as it is.
    pub watch: Option<bool>,
    /// Where the engine of those listens of whom nobody knows.
    pub engine: Engine,
}

/// What became of one worker.
pub struct Added {
    /// Its name.
    pub name: WorkerName,
    /// Whether config.yaml is different now, or why it was not added.
    pub result: Result<bool, ManagedError>,
}

/// Whether an argument is a path, and not a name.
pub fn is_path(argument: &str) -> bool {
    argument.starts_with(['.', '/', '~'])
}

/// A path as a shell would have it.
fn expanded(home: &Home, argument: &str) -> PathBuf {
    let home = || home.variable("HOME").map(PathBuf::from);
    match argument.strip_prefix('~') {
        Some(rest) if rest.is_empty() || rest.starts_with('/') => home().map_or_else(
            || PathBuf::from(argument),
            |home| home.join(rest.trim_start_matches('/')),
        ),
        _ => argument.into(),
    }
}

/// Opens the projects and sees whether all of them can be added; changes nothing.
fn open(home: &Home, options: &Options) -> Result<Vec<Wanted>, ManagedError> {
    let listed = config::list(&options.config)?;
    let mut seen: BTreeMap<WorkerName, PathBuf> = BTreeMap::new();
    let mut all = Vec::new();
    for argument in &options.workers {
        let (project, name) = if is_path(argument) {
            let project = Project::open(&expanded(home, argument))?;
            let name = project.managed_name();
            (project, name)
        } else {
            let name: WorkerName = argument.parse()?;
            let path = path_of(home, &options.config, &name)?.ok_or_else(|| unknown(&name))?;
            if !path.is_dir() {
                let name = name.to_string();
                return Err(ManagedError::Moved { name, path });
            }
            (Project::open(&path)?, name)
        };
        match seen.insert(name.clone(), project.root.clone()) {
            Some(first) if first == project.root => continue,
            Some(first) => {
                return Err(ManagedError::Twice {
                    name: name.to_string(),
                    first,
                    second: project.root,
                });
            }
            None => {}
        }
        check_entry(&listed, &options.config, &name, &project.root)?;
        // A directory that is no more gives way.
        if let Some(owner) = owner(&home.managed(name.as_str()))?
            && owner != project.root
            && owner.is_dir()
            && !options.force
        {
            let name = name.to_string();
            return Err(RunError::Taken { name, owner }.into());
        }
        let path = text(&project.root);
        let name_text = name.as_str();
        edit::check_file(&options.config, &add_change(name_text, &path))?;
        all.push(Wanted {
            project,
            name,
            base: None,
        });
    }
    Ok(all)
}

/// Refuses a name that config.yaml has for something else.
fn check_entry(
    listed: &[config::Listed],
    config: &Path,
    name: &WorkerName,
    root: &Path,
) -> Result<(), ManagedError> {
    let Some(entry) = listed.iter().find(|entry| entry.name == name.as_str()) else {
        return Ok(());
    };
    let (name, config_path) = (name.to_string(), config.to_owned());
    let Some(path) = &entry.worker_path else {
        return Err(ManagedError::NotLocal {
            name,
            config: config_path,
        });
    };
    let path = beside(config, path);
    match std::fs::canonicalize(&path) {
        Ok(other) if other != root => Err(ManagedError::Elsewhere {
            name,
            config: config_path,
            path,
        }),
        // The same, or not there any more.
        _ => Ok(()),
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn add_change<'a>(name: &'a str, worker_path: &'a str) -> Change<'a> {
    Change::Add { name, worker_path }
}

/// Adds workers: checks all of them, builds their layers at once, and then writes the entry of each
/// that was built. The result says what became of each; an error is about all of them, and then
/// nothing was changed.
pub fn add(
    home: &Home,
    options: &Options,
    signals: &Signals,
    events: Events<'_>,
    done: &mut dyn FnMut(&Added),
) -> Result<Vec<Added>, ManagedError> {
    let wanted = open(home, options)?;
    let store = Store::open(home.store())?;
    let with = With {
        rebuild: options.force,
        limits: &options.limits,
        caches: &options.caches,
        sandbox: &options.sandbox,
    };
    let realiser = Realiser::new(home, &store, with, signals, events);
    let (workers, _lease) = realiser.all("add", wanted)?;
    let mut has_grown = false;
    let mut all = Vec::new();
    for (name, result) in workers {
        let result = match result {
            Ok(worker) => {
                has_grown |= worker.has_grown();
                realiser.share(&worker, &AtomicBool::new(false));
                enter(home, &store, options, &worker)
            }
            Err(error) => {
                has_grown = true;
                Err(error.into())
            }
        };
        let added = Added { name, result };
        done(&added);
        all.push(added);
    }
    if options.collect && has_grown {
        realiser.collect();
    }
    Ok(all)
}

/// Makes a worker whose layers are there one of config.yaml. Returns whether that is different now.
fn enter(
    home: &Home,
    store: &Store,
    options: &Options,
    worker: &Worker,
) -> Result<bool, ManagedError> {
    let (name, root) = (&worker.name, &worker.project.root);
    if options.force {
        forget(home, name)?;
    }
    let layers = worker.stack.runs_on();
    keep_also(store, RefKind::Managed, name.as_str(), &layers, &[])?;
    if state(home, name)?.0 == State::Stopped {
        let place = Place::hold(home.managed(name.as_str()), name, PATIENCE, Task::Add)?;
        place.claim_for(name, root, false)?;
    }
    // Before an engine sees the entry.
    if options.watch.is_some() || options.said.is_some() {
        let orders = last_orders(home, name).unwrap_or_else(|| Orders {
            name: name.to_string(),
            path: root.clone(),
            engine: options.engine.clone(),
            config: options.config.clone(),
            engine_process: None,
            watch: false,
            sandbox: SandboxOptions::default(),
        });
        let orders = Orders {
            watch: options.watch.unwrap_or(orders.watch),
            sandbox: options.said.clone().unwrap_or(orders.sandbox),
            ..orders
        };
        remember(&home.managed(name.as_str()), &orders)?;
    }
    let path = text(root);
    let mut changed = false;
    if options.reset_config {
        let name = name.as_str();
        changed |= edit::edit_file(&options.config, &Change::DropConfig { name })?;
    }
    changed |= edit::edit_file(&options.config, &add_change(name.as_str(), &path))?;
    Ok(changed)
}
