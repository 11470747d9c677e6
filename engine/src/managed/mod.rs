//! Managed workers: added to the engine's config.yaml, run in the background, one supervisor each.
//!
//! ```text
//! add           projects -> layers, entries in config.yaml
//! supervisor    the process that a worker runs under
//! ```
//!
//! `~/.iii/managed/<name>` is a worker's:
//!
//! ```text
//! lock          flocked by the supervisor for as long as it lives, with its pid in it; flocked by a
//!               command that removes the worker, say, with that command's pid and task in it
//! project       the path of its project
//! start.json    how it was last started, or is to be
//! upper/        what it wrote
//! upper.new/    an upper that is to take the place of that, or did: see `snapshot`
//! vm.pid        the supervisor's pid, while the worker runs
//! ```
//!
//! **Invariant:** whether a worker runs is told by the lock, never by a pid alone: a pid may be
//! somebody else's by now. Whoever finds a `vm.pid` without a holder of the lock removes it.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use iii_oci::utc;
use iii_sandbox::process::Process;
use iii_store::{LayerId, RefKind, Store, StoreError};
use rustix::process::Signal;

use crate::home::Home;
use crate::project::config::{self, Listed};
use crate::project::edit::{self, Change, EditError};
use crate::project::{DocumentError, NameError, ProjectError, WorkerName};
use crate::worker::error::RunError;
use crate::worker::keep::{RunsOn, keep_layers};
use crate::worker::place::{LOCK, Place, Task, holder, owner};
use crate::worker::snapshot;
use crate::worker::supervise::GRACE;

pub mod add;
pub mod logs;
pub mod supervisor;

/// The file with the pid that counts as the worker's.
pub(crate) const PID_FILE: &str = "vm.pid";

/// How long somebody may hold a worker who only looks at it, or ends just now.
pub(crate) const PATIENCE: Duration = Duration::from_secs(2);

/// How much longer than its worker's grace a supervisor may take to end.
const MARGIN: Duration = Duration::from_secs(5);

/// Time between two looks at something that cannot be waited for.
const PAUSE: Duration = Duration::from_millis(10);

/// Longest file of ours that is read here.
const MAX_SMALL: u64 = 64 << 10;

/// Why something could not be done with a managed worker.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "their messages say it")]
pub enum ManagedError {
    #[error(transparent)]
    Run(#[from] RunError),
    #[error(transparent)]
    Name(#[from] NameError),
    #[error(transparent)]
    Project(#[from] ProjectError),
    #[error(transparent)]
    Config(#[from] DocumentError),
    #[error(transparent)]
    Edit(#[from] EditError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("there is no worker called {name}")]
    Unknown { name: String },
    #[error("the project of {name} is not at {} any more", path.display())]
    Moved { name: String, path: PathBuf },
    #[error("{} and {} would both be called {name}", first.display(), second.display())]
    Twice {
        name: String,
        first: PathBuf,
        second: PathBuf,
    },
    #[error("{} has another worker called {name}, which is not a local one", config.display())]
    NotLocal { name: String, config: PathBuf },
    #[error("{} has a worker called {name} whose project is {}", config.display(), path.display())]
    Elsewhere {
        name: String,
        config: PathBuf,
        path: PathBuf,
    },
    #[error("{name} runs")]
    Runs { name: String },
    #[error("{name} does not end; its supervisor is process {pid}")]
    Lives { name: String, pid: u32 },
    #[error("{name} did not start")]
    NotStarted { name: String },
    #[error("{name} could not be started: its supervisor ended without a word")]
    Speechless { name: String },
    #[error("III_ENGINE_PID names process {pid}, and there is none")]
    EngineGone { pid: String },
    #[error("cannot {operation} {}", path.display())]
    Io {
        operation: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

fn at(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ManagedError {
    let path = path.to_owned();
    move |source| ManagedError::Io {
        operation,
        path,
        source,
    }
}

/// What a worker is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Nothing.
    Stopped,
    /// Its supervisor is at work, or somebody removes it.
    Starting,
    /// Its start command runs.
    Running,
}

impl State {
    /// In a word.
    pub fn text(self) -> &'static str {
        match self {
            Self::Stopped => "stopped",
            Self::Starting => "starting",
            Self::Running => "running",
        }
    }
}

/// A worker as it is now.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Status {
    /// Its name.
    pub name: String,
    /// What kind of worker it is: `local`, made of a project of this machine.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// What it is doing.
    pub status: State,
    /// Its supervisor.
    pub pid: Option<u32>,
    /// Its project.
    #[serde(serialize_with = "iii_store::path_json::maybe")]
    pub path: Option<PathBuf>,
    /// When its start command began to run.
    pub since: Option<String>,
    /// The layers that it runs on or ran on last, bottom first.
    pub layers: Vec<LayerId>,
    /// Whether config.yaml has it.
    pub configured: bool,
}

/// What `worker` is doing, and under which supervisor. What a supervisor that was killed has left
/// is removed.
pub fn state(home: &Home, name: &WorkerName) -> Result<(State, Option<u32>), ManagedError> {
    let dir = home.managed(name.as_str());
    let (path, pid_file) = (dir.join(LOCK), dir.join(PID_FILE));
    let lock = match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            remove_file(&pid_file)?;
            return Ok((State::Stopped, None));
        }
        lock => lock.map_err(at("open", &path))?,
    };
    match lock.try_lock_shared() {
        Ok(()) => {
            remove_file(&pid_file)?;
            Ok((State::Stopped, None))
        }
        Err(TryLockError::WouldBlock) => {
            let number = |path: &Path| read_small(path)?.trim().parse::<u32>().ok();
            let holder = number(&path);
            let runs = holder.is_some() && number(&pid_file) == holder;
            let state = if runs {
                State::Running
            } else {
                State::Starting
            };
            Ok((state, holder))
        }
        Err(TryLockError::Error(source)) => Err(at("lock", &path)(source)),
    }
}

/// A short text of ours; `None` where it cannot be read.
fn read_small(path: &Path) -> Option<String> {
    let mut text = String::new();
    let file = File::open(path).ok()?;
    file.take(MAX_SMALL).read_to_string(&mut text).ok()?;
    Some(text)
}

fn remove_file(path: &Path) -> Result<(), ManagedError> {
    match fs::remove_file(path) {
        Err(source)
            if !matches!(
                source.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            Err(at("remove", path)(source))
        }
        _ => Ok(()),
    }
}

/// Where the project of a worker is: as config.yaml says, or else as when it last was added or
/// started. `None` if nobody knows the name. A config.yaml that makes no sense does not hide a
/// worker that was known before: it can still be stopped.
pub fn path_of(
    home: &Home,
    config: &Path,
    name: &WorkerName,
) -> Result<Option<PathBuf>, ManagedError> {
    let last = owner(&home.managed(name.as_str()))?;
    let listed = match config::list(config) {
        Err(_) if last.is_some() => return Ok(last),
        listed => listed?,
    };
    let entry = listed.into_iter().find(|one| one.name == name.as_str());
    let path = entry.and_then(|entry| entry.worker_path);
    Ok(path.map(|path| beside(config, &path)).or(last))
}

/// A path in config.yaml: relative to the directory of that.
fn beside(config: &Path, path: &Path) -> PathBuf {
    config.parent().unwrap_or(Path::new(".")).join(path)
}

/// All workers, by name: those in config.yaml, and those that have anything here.
pub fn list(home: &Home, config: &Path) -> Result<Vec<Status>, ManagedError> {
    let mut names: BTreeMap<String, Option<PathBuf>> = BTreeMap::new();
    for Listed { name, worker_path } in config::list(config)? {
        if let Some(path) = worker_path {
            names.insert(name, Some(beside(config, &path)));
        }
    }
    let dir = home.all_managed();
    let entries = match fs::read_dir(&dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        entries => Some(entries.map_err(at("list", &dir))?),
    };
    for entry in entries.into_iter().flatten().flatten() {
        if let Ok(name) = entry.file_name().into_string()
            && owner(&entry.path())?.is_some()
        {
            names.entry(name).or_default();
        }
    }
    let store = open_store(home)?;
    let mut all = Vec::new();
    for (name, path) in names {
        if let Ok(name) = name.parse() {
            all.push(status_of(home, store.as_ref(), &name, path)?);
        }
    }
    Ok(all)
}

/// One worker.
pub fn status(home: &Home, config: &Path, name: &WorkerName) -> Result<Status, ManagedError> {
    let listed = config::list(config)?;
    let entry = listed.into_iter().find(|one| one.name == name.as_str());
    let path = entry.and_then(|entry| entry.worker_path);
    if path.is_none() && owner(&home.managed(name.as_str()))?.is_none() {
        return Err(unknown(name));
    }
    let path = path.map(|path| beside(config, &path));
    status_of(home, open_store(home)?.as_ref(), name, path)
}

pub(crate) fn unknown(name: &WorkerName) -> ManagedError {
    ManagedError::Unknown {
        name: name.to_string(),
    }
}

/// The store, if there is one already.
fn open_store(home: &Home) -> Result<Option<Store>, StoreError> {
    let dir = home.store();
    dir.exists().then(|| Store::open(dir)).transpose()
}

fn status_of(
    home: &Home,
    store: Option<&Store>,
    name: &WorkerName,
    configured: Option<PathBuf>,
) -> Result<Status, ManagedError> {
    let (status, pid) = state(home, name)?;
    let dir = home.managed(name.as_str());
    let kept = match store {
        Some(store) => store.get_ref(RefKind::Managed, name.as_str())?,
        None => None,
    };
    let since = fs::metadata(dir.join(PID_FILE)).and_then(|meta| meta.modified());
    Ok(Status {
        name: name.to_string(),
        kind: "local",
        status,
        pid,
        since: since.ok().map(|time| utc::rfc3339(unix_seconds(time))),
        layers: kept
            .map(|kept| RunsOn::of(&kept).layers)
            .unwrap_or_default(),
        configured: configured.is_some(),
        path: match configured {
            Some(path) => Some(path),
            None => owner(&dir)?,
        },
    })
}

fn unix_seconds(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_secs() as i64
}

/// A supervisor that was asked to end.
pub struct Stopping {
    name: WorkerName,
    pid: u32,
    process: Process,
    deadline: Instant,
}

/// Asks the supervisor of `name` to end; nothing if it has none.
pub fn begin_stop(home: &Home, name: &WorkerName) -> Result<Option<Stopping>, ManagedError> {
    let patience = Instant::now() + PATIENCE;
    loop {
        let (state, pid) = state(home, name)?;
        if state == State::Stopped {
            return Ok(None);
        }
        let handle = pid.and_then(|pid| {
            let process = Process::open(pid as i32).ok()?;
            Some((pid, process))
        });
        if let Some((pid, process)) = handle {
            // What holds the lock now under that pid held it when the handle was made, so the
            // handle is for it.
            if self::state(home, name)?.1 == Some(pid) {
                process.signal(Signal::TERM);
                return Ok(Some(Stopping {
                    name: name.clone(),
                    pid,
                    process,
                    deadline: Instant::now() + GRACE + MARGIN,
                }));
            }
        }
        if Instant::now() > patience {
            return Err(RunError::Busy {
                name: name.to_string(),
                holder: holder(&home.managed(name.as_str())),
            }
            .into());
        }
        thread::sleep(PAUSE);
    }
}

impl Stopping {
    /// Waits for the end of the supervisor, which is that of its worker, and kills it if it does
    /// not come. Returns its pid.
    pub fn finish(self, home: &Home) -> Result<u32, ManagedError> {
        if !self.process.ends(Some(self.deadline)) {
            self.process.signal(Signal::KILL);
            if !self.process.ends(Some(Instant::now() + MARGIN)) {
                return Err(ManagedError::Lives {
                    name: self.name.to_string(),
                    pid: self.pid,
                });
            }
        }
        state(home, &self.name)?;
        Ok(self.pid)
    }
}

/// Stops `name` if it runs. Returns its supervisor's pid if it did.
pub fn stop(home: &Home, name: &WorkerName) -> Result<Option<u32>, ManagedError> {
    let stopping = begin_stop(home, name)?;
    stopping.map(|stopping| stopping.finish(home)).transpose()
}

/// Removes `name` from config.yaml, stops it, and removes all that is kept for it, its snapshots
/// included. Returns whether config.yaml had it.
pub fn remove(home: &Home, config: &Path, name: &WorkerName) -> Result<bool, ManagedError> {
    let change = Change::Remove {
        name: name.as_str(),
    };
    // First, so that no engine starts it again.
    let had = edit::edit_file(config, &change)?;
    stop(home, name)?;
    // While there is still a worker whose they are.
    if let Some(store) = open_store(home)? {
        snapshot::remove_all(&store, RefKind::Managed, name)?;
    }
    forget(home, name)?;
    Ok(had)
}

/// Stops `name` and removes what it wrote and printed, and its hold on its layers.
pub fn forget(home: &Home, name: &WorkerName) -> Result<(), ManagedError> {
    stop(home, name)?;
    let place = Place::hold(home.managed(name.as_str()), name, PATIENCE, Task::Remove)?;
    // What the ref keeps is what the upper needs.
    place.drop_upper()?;
    if let Some(store) = open_store(home)? {
        store.remove_ref(RefKind::Managed, name.as_str())?;
    }
    place.remove()?;
    let logs = home.logs(name.as_str());
    crate::managed::logs::remove(&logs).map_err(at("remove", &logs))
}

/// Stops `name` and removes what it wrote and printed. It stays a worker, with its snapshots, and
/// begins anew the next time.
pub fn clear(home: &Home, name: &WorkerName) -> Result<(), ManagedError> {
    stop(home, name)?;
    let place = Place::hold(home.managed(name.as_str()), name, PATIENCE, Task::Clear)?;
    place.drop_upper()?;
    if let Some(store) = open_store(home)? {
        // What it keeps besides is for what it wrote.
        if let Some(kept) = store.get_ref(RefKind::Managed, name.as_str())? {
            let layers = RunsOn::of(&kept);
            keep_layers(&store, RefKind::Managed, name.as_str(), &layers, &[])?;
        }
    }
    let logs = home.logs(name.as_str());
    crate::managed::logs::remove(&logs).map_err(at("remove", &logs))
}
