//! What a worker in the foreground and a managed one have in common: where its state is, and how its sandbox comes to run.

use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::net::{TcpStream, ToSocketAddrs as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::thread;
use std::time::{Duration, Instant};

use iii_oci::{Image, ImageError, Limits, Settings};
use iii_overlay::adapter::Mode;
use iii_overlay::{OpenError, OverlayOptions};
use iii_sandbox::kvm::{self, Unusable};
#[cfg(feature = "libkrun")]
use iii_sandbox::reach::Reach;
use iii_sandbox::{
    BindMount, Command as SandboxCommand, Controller, HAS_NAMESPACES, HostSettings, Sandbox,
    SandboxError, SandboxSpec, Stdio,
};
use iii_store::{LayerId, Ref, RefKind, Store, StoreError};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::process::Signal;
use serde::Deserialize as _;

use crate::build::realise::Worker;
use crate::build::{self, BuildError, Caches, Event};
#[cfg(feature = "libkrun")]
use crate::compose::Hardware;
use crate::compose::{Composition, Isolation, Served};
use crate::firmware::FirmwareError;
#[cfg(feature = "libkrun")]
use crate::firmware::{Package, Places};
use crate::home::{Home, HomeError};
use crate::plan::Kind;
use crate::plan::environment;
#[cfg(feature = "libkrun")]
use crate::project::MANIFEST_NAME;
use crate::project::{
    DocumentError, HostLoopback, NameError, Project, ProjectError, WorkerConfig, WorkerName,
};
use crate::shared_cache::CacheOptions;
use crate::worker::exec::{self, ExecError, Serving};
use crate::worker::snapshot::Taking;
use crate::worker::supervise::{GRACE, Signals};

/// How long the engine has to accept a connection before it counts as not listening.
const ENGINE_TIMEOUT: Duration = Duration::from_millis(250);

/// Time between two tries to take a lock that somebody may only be looking at.
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// Why a worker did not run.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "their messages say it")]
pub enum RunError {
    #[error(transparent)]
    Home(#[from] HomeError),
    #[error(transparent)]
    Project(#[from] ProjectError),
    #[error(transparent)]
    Name(#[from] NameError),
    #[error(transparent)]
    Config(#[from] DocumentError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("the base image {name} is not in the store, and it cannot be had")]
    NoBase {
        name: String,
        source: Box<ImageError>,
    },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error("the sandbox {name} is in use by process {holder}")]
    Busy { name: String, holder: String },
    #[error("the sandbox {name} belongs to the project at {}", owner.display())]
    Taken { name: String, owner: PathBuf },
    #[error("composing the root filesystem of {name} failed")]
    Compose { name: String, source: OpenError },
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    #[error("cannot {operation} {}", path.display())]
    Io {
        operation: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{kind} of {name} is the same as that of {with}, which failed")]
    AlsoFailed {
        name: String,
        with: String,
        kind: Kind,
    },
    #[error("this build of iii has no libkrun runtime")]
    NoLibkrun,
    #[error("there is no worker called {name}")]
    NeverRun { name: String },
    #[error("the project at {} is not what the worker {name} last ran from", project.display())]
    Outdated { name: String, project: PathBuf },
    #[error("libkrun cannot run a microVM here: {why}")]
    NoKvm { why: Unusable },
    #[error("{}: resources.memory: {asked} MiB are more than the {there} MiB that this machine has", manifest.display())]
    Memory {
        manifest: PathBuf,
        asked: u32,
        there: u32,
    },
    #[error(transparent)]
    Firmware(#[from] FirmwareError),
    #[error(transparent)]
    Exec(#[from] ExecError),
}

pub(crate) fn at(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RunError {
    let path = path.to_owned();
    move |source| RunError::Io {
        operation,
        path,
        source,
    }
}

/// What to realise.
#[derive(Debug, Clone)]
pub struct Target {
    /// The project's directory.
    pub path: PathBuf,
    /// Runs setup and install again and forgets what the sandbox wrote.
    pub rebuild: bool,
    /// The sandbox's name, unless it follows from the directory.
    pub name: Option<String>,
    /// The base image, unless it follows from the project.
    pub base: Option<String>,
    /// Lets the store be cleared after a build that leaves it or the disk too full.
    pub collect: bool,
    /// How much of anything what is pulled or fetched may bring.
    pub limits: Limits,
    /// Where layers are fetched from, and where they are put for others.
    pub caches: CacheOptions,
    /// What it runs in.
    pub sandbox: SandboxOptions,
}

/// What somebody said of sandboxes.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SandboxOptions {
    /// What they are.
    pub runtime: Runtime,
    /// What of the host's loopback a microVM may reach, besides what the manifest says and the engine.
    pub host_loopback: HostLoopback,
}

/// What a worker and its steps run in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Runtime {
    /// A microVM where one can run, else namespaces.
    #[default]
    Auto,
    /// Linux namespaces.
    Namespace,
    /// A libkrun microVM.
    Libkrun,
}

/// Where the engine listens.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Engine {
    /// Host name or address.
    pub host: String,
    /// Port.
    pub port: u16,
}

impl Engine {
    /// Its URL.
    pub fn url(&self) -> String {
        if self.host.contains(':') {
            format!("ws://[{}]:{}", self.host, self.port)
        } else {
            format!("ws://{}:{}", self.host, self.port)
        }
    }

    /// The engine at `url`, as in `ws://127.0.0.1:49134`; `None` where that is nothing of the kind.
    pub fn of_url(url: &str) -> Option<Self> {
        let authority = url.trim().strip_prefix("ws://")?;
        let authority = authority.split(['/', '?', '#']).next()?;
        let (host, port) = authority.rsplit_once(':')?;
        let host = host
            .strip_prefix('[')
            .map_or(Some(host), |v6| v6.strip_suffix(']'))?;
        (!host.is_empty())
            .then(|| port.parse().ok())?
            .map(|port| Self {
                host: host.to_owned(),
                port,
            })
    }

    /// Whether anybody accepts connections there within a quarter of a second.
    pub fn listens(&self) -> bool {
        let Ok(addresses) = (self.host.as_str(), self.port).to_socket_addrs() else {
            return false;
        };
        addresses
            .into_iter()
            .any(|address| TcpStream::connect_timeout(&address, ENGINE_TIMEOUT).is_ok())
    }
}

/// How a worker ended.
#[derive(Debug, Clone, Copy)]
pub struct Ended {
    /// How its start command ended.
    pub status: ExitStatus,
    /// The signal that asked it to end, if one did.
    pub signal: Option<Signal>,
}

impl RunError {
    /// Whether a microVM was started and its guest said nothing, so that there is no telling whether any guest runs here.
    pub(crate) fn is_silent_guest(&self) -> bool {
        match self {
            Self::Sandbox(source) | Self::Build(BuildError::Sandbox { source, .. }) => {
                matches!(source, SandboxError::Boot { .. })
            }
            _ => false,
        }
    }
}

/// Has nobody try a microVM again until the machine is started anew, but who asks for one.
pub(crate) fn distrust_kvm(home: &Home, error: &RunError, events: &dyn Fn(Event<'_>)) {
    kvm::distrust(&home.kvm(), "a microVM was started and said nothing".into());
    events(Event::Chosen(&Isolation::Namespace, Some(error)));
}

/// How the sandboxes of `project` are to be kept apart from the host.
pub(crate) fn isolation(
    home: &Home,
    options: &SandboxOptions,
    project: &Project,
    events: &dyn Fn(Event<'_>),
) -> Result<Isolation, RunError> {
    let machine = || machine(home, options, project, events);
    match options.runtime {
        Runtime::Namespace => Ok(Isolation::Namespace),
        Runtime::Libkrun => machine(),
        Runtime::Auto if !HAS_NAMESPACES => {
            let machine = machine()?;
            events(Event::Chosen(&machine, None));
            Ok(machine)
        }
        Runtime::Auto => {
            let (chosen, why) = match machine() {
                Ok(machine) => (machine, None),
                // Namespaces would run it, and what it was to have would not be missed before it is needed.
                Err(error @ RunError::Memory { .. }) => return Err(error),
                Err(error) => (Isolation::Namespace, Some(error)),
            };
            // That a machine has no KVM is how most of them are; `worker doctor` says so.
            let why = why
                .as_ref()
                .filter(|why| !matches!(why, RunError::NoKvm { .. } | RunError::NoLibkrun));
            events(Event::Chosen(&chosen, why.map(|why| why as _)));
            Ok(chosen)
        }
    }
}

/// A microVM for the project. The guest's kernel is fetched if it is missing.
#[cfg(feature = "libkrun")]
fn machine(
    home: &Home,
    options: &SandboxOptions,
    project: &Project,
    events: &dyn Fn(Event<'_>),
) -> Result<Isolation, RunError> {
    kvm::usable(&home.kvm()).map_err(|why| RunError::NoKvm { why })?;
    let (memory, cpus) = (memory_mib(), thread::available_parallelism());
    let cpus = cpus.map_or(u32::MAX, |cpus| cpus.get() as u32);
    let asked = project.resources;
    let resources = asked.within(memory, cpus).ok_or_else(|| RunError::Memory {
        manifest: project.root.join(MANIFEST_NAME),
        asked: asked.memory_mib,
        there: memory,
    })?;
    let places = Places::from_environment(home.lib(), None);
    let libkrunfw = if let Some((path, _)) = places.find()? {
        path
    } else {
        let package = Package::of_this_machine();
        let size = package.as_ref().map_or(0, |package| package.size);
        let settings = Settings::from_environment().map_err(ImageError::from)?;
        let progress = |come| events(Event::Kernel(come, size));
        progress(0);
        let path = places.find_or_fetch(package.as_ref(), &settings, &progress)?;
        progress(size);
        path
    };
    let loopback = &project.host_loopback;
    if !loopback.is_none() {
        // The manifest is not this user's, perhaps.
        let what = if loopback.all {
            "all of this machine's localhost".to_owned()
        } else {
            let ports: Vec<_> = loopback.ports.iter().map(u16::to_string).collect();
            format!("localhost:{} of this machine", ports.join(", "))
        };
        events(Event::Note(format!(
            "the manifest lets the worker reach {what}"
        )));
    }
    let loopback = options.host_loopback.clone().and(loopback);
    Ok(Isolation::Machine(Hardware {
        libkrunfw,
        // The manifest allows what fits.
        cpus: u8::try_from(resources.cpus).unwrap_or(u8::MAX),
        memory_mib: resources.memory_mib,
        reach: Reach::of_loopback(loopback.ports, loopback.all),
        may_fall_back: options.runtime == Runtime::Auto && HAS_NAMESPACES,
    }))
}

/// What this machine has of memory, swap space included.
#[cfg(all(feature = "libkrun", target_os = "linux"))]
fn memory_mib() -> u32 {
    let info = rustix::system::sysinfo();
    let units = info.totalram.saturating_add(info.totalswap);
    let bytes = units.saturating_mul(info.mem_unit.into());
    u32::try_from(bytes >> 20).unwrap_or(u32::MAX)
}

/// Where it is not asked, all that a manifest may ask for.
#[cfg(all(feature = "libkrun", not(target_os = "linux")))]
fn memory_mib() -> u32 {
    u32::MAX
}

#[cfg(not(feature = "libkrun"))]
fn machine(
    _: &Home,
    _: &SandboxOptions,
    _: &Project,
    _: &dyn Fn(Event<'_>),
) -> Result<Isolation, RunError> {
    Err(RunError::NoLibkrun)
}

/// How many of the layers of a worker's ref it runs on, or ran on last; they come first.
#[derive(serde::Serialize, serde::Deserialize)]
struct RefInfo {
    runs_on: usize,
}

/// The layers that the worker of this ref runs on, or ran on last, bottom first. Those that are kept besides are for its upper.
pub fn run_on(kept: &Ref) -> &[LayerId] {
    let info = RefInfo::deserialize(&kept.info);
    let count = info.map_or(kept.layers.len(), |info| info.runs_on);
    kept.layers.get(..count).unwrap_or(&kept.layers)
}

/// The ref of a worker that runs on some layers, bottom first, and whose upper needs others besides.
fn worker_ref(mut layers: Vec<LayerId>, besides: &[LayerId]) -> Ref {
    let runs_on = layers.len();
    for id in besides {
        if !layers.contains(id) {
            layers.push(*id);
        }
    }
    let info = if layers.len() == runs_on {
        serde_json::Value::Null
    } else {
        serde_json::json!(RefInfo { runs_on })
    };
    Ref { layers, info }
}

/// Has a worker's name keep the layers that it runs on, bottom first, those that its upper needs besides, and no others. They are
/// pinned. Only who holds the worker knows what those are.
pub(crate) fn keep_layers(
    store: &Store,
    kind: RefKind,
    name: &str,
    layers: Vec<LayerId>,
    besides: &[LayerId],
) -> Result<(), StoreError> {
    store.set_ref(kind, name, &worker_ref(layers, besides))
}

/// Has a worker's name keep these layers, those that it needs besides, which are all pinned, and what it keeps already, whoever
/// changes that meanwhile. Returns whether it did not keep just these before.
pub(crate) fn keep_also(
    store: &Store,
    kind: RefKind,
    name: &str,
    layers: &[LayerId],
    besides: &[LayerId],
) -> Result<bool, StoreError> {
    let edit = store.edit_ref(kind, name)?;
    let last = match edit.get() {
        // It is about to be written anew.
        Err(StoreError::Damaged { .. } | StoreError::Json { .. }) => None,
        other => other?,
    };
    let wanted = worker_ref(layers.to_vec(), besides);
    if last.as_ref() == Some(&wanted) {
        return Ok(false);
    }
    let there = |ids: &[LayerId]| -> Vec<LayerId> {
        let there = ids.iter().filter(|id| store.has_layer(id));
        there.copied().collect()
    };
    let (runs_on, all) = match &last {
        Some(last) => (there(run_on(last)), there(&last.layers)),
        None => Default::default(),
    };
    if all.is_empty() {
        edit.set(&wanted)?;
    } else if !wanted.layers.iter().all(|id| all.contains(id)) {
        edit.set(&worker_ref(runs_on, &[all, wanted.layers].concat()))?;
    }
    Ok(true)
}

/// A worker's sandbox as it is to be started.
pub(crate) struct Start<'a> {
    /// The store.
    pub store: &'a Store,
    /// The worker; its layers are pinned.
    pub worker: &'a Worker,
    /// Where its upper is.
    pub place: &'a Place,
    /// Whose name keeps its layers.
    pub keeper: RefKind,
    /// What it runs.
    pub program: &'a Program,
    /// Where its output goes.
    pub stdio: Stdio,
}

/// What a worker runs, but for the host's part in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Program {
    argv: Vec<String>,
    env: Vec<(String, String)>,
    user: String,
    /// Package managers' caches.
    mounts: Vec<BindMount>,
    /// Whom it is to reach.
    engine: Engine,
}

impl Program {
    /// What `worker` runs, with an engine there and what config.yaml says. Makes the directories of its caches.
    pub fn new(
        home: &Home,
        worker: &Worker,
        engine: &Engine,
        config: &WorkerConfig,
    ) -> Result<Self, RunError> {
        let project = &worker.project;
        let env = environment::for_worker(
            &worker.env,
            &project.env,
            &config.env,
            worker.name.as_str(),
            &engine.url(),
            worker.isolation.name(),
        );
        let [entrypoint, command] = start_command(&worker.image, project);
        Ok(Self {
            argv: entrypoint.into_iter().chain(command).collect(),
            env: env.into_iter().collect(),
            user: worker.image.config.user.clone(),
            mounts: Caches::open(
                &home.cache(worker.isolation.name()),
                project,
                &worker.env,
                |cache| !cache.id.starts_with("apt-"),
                false,
            )?
            .mounts,
            engine: engine.clone(),
        })
    }

    /// Whether a sandbox that was made for `other` has what this one needs.
    pub fn fits(&self, other: &Self) -> bool {
        self.mounts == other.mounts
    }
}

/// A worker that runs.
pub(crate) struct Live<'a> {
    /// Its sandbox.
    pub controller: Controller,
    /// Its root filesystem, if that can be changed meanwhile.
    pub served: Option<&'a Served>,
    /// The layer that its upper was made of, if it was.
    pub thawed: &'a [LayerId],
    commands: &'a Serving,
    host: HostSettings,
    command: SandboxCommand,
}

impl Live<'_> {
    /// Runs `program` in place of the one that runs: SIGTERM, and SIGKILL after the usual grace. It [fits](Program::fits).
    pub fn restart(&self, program: &Program) -> Result<(), SandboxError> {
        let mut env = program.env.clone();
        self.host.extend_env(&mut env);
        let command = SandboxCommand {
            argv: program.argv.iter().map(OsString::from).collect(),
            env,
            user: program.user.clone(),
            ..self.command.clone()
        };
        self.commands.follow(command.clone());
        self.controller.restart(command, Signal::TERM, GRACE)
    }
}

impl Start<'_> {
    /// Composes the root filesystem, starts the command on it, and calls `attend`, which waits for its end. From the start on, signals
    /// are for the command. Returns what `attend` did.
    pub fn run<R>(
        self,
        signals: &Signals,
        events: &dyn Fn(Event<'_>),
        attend: impl FnOnce(&mut Sandbox, &Live<'_>) -> R,
    ) -> Result<R, RunError> {
        let (worker, program) = (self.worker, self.program);
        let name = worker.name.as_str();
        // The upper stands on the layers of the last start until it is opened, and on these afterwards. Whoever kills this process
        // in between loses neither.
        let compose = |source| RunError::Compose {
            name: name.to_owned(),
            source,
        };
        let thawed = iii_overlay::thawed_of(&self.place.upper());
        let thawed = Vec::from_iter(thawed.map_err(|error| compose(error.into()))?);
        let layers = worker.stack.ids();
        let others = keep_also(self.store, self.keeper, name, &layers, &thawed)?;
        let composition = Composition {
            store: self.store,
            layers: worker.stack.layers.clone(),
            upper: self.place.upper(),
            options: OverlayOptions {
                project: Some(build::project_at(&worker.stack.layers)),
                ..OverlayOptions::default()
            },
            mode: Mode::Quiet,
            console: self.place.console(),
        };
        let composed = composition.compose(&worker.isolation);
        let composed = composed.map_err(compose)?;
        let served = composed.served().map(Served::overlay);
        let snapshots = Taking::new(self.store, self.keeper, &worker.name, served);
        let mut spec = SandboxSpec::new(composed.root(), &program.argv);
        spec.env.clone_from(&program.env);
        spec.user.clone_from(&program.user);
        name.clone_into(&mut spec.hostname);
        spec.stdio = self.stdio;
        spec.mounts.clone_from(&program.mounts);
        let Engine { host, port } = &program.engine;
        spec.reach = worker
            .isolation
            .reach()
            .with_server(host, *port, &spec.host);
        let (command, host) = (spec.command(), spec.host.clone());
        let mut sandbox = Sandbox::start(spec)?;
        let (result, _) = signals.attend(sandbox.controller(), || {
            let controller = sandbox.controller();
            let commands = exec::serve(
                self.place.dir(),
                controller.clone(),
                command.clone(),
                snapshots,
            )?;
            // The overlay is open by now, wherever it is served.
            if others {
                keep_layers(self.store, self.keeper, name, layers, &thawed)?;
            }
            for warning in sandbox.warnings() {
                events(Event::Note(warning.to_string()));
            }
            let live = Live {
                controller,
                served: composed.served(),
                thawed: &thawed,
                commands: &commands,
                host,
                command,
            };
            Ok::<_, RunError>(attend(&mut sandbox, &live))
        });
        result
    }
}

/// What starts a worker: the image's entrypoint, and the command that goes by way of it, as a container engine runs them. The
/// steps do without an entrypoint, as those of a Dockerfile.
pub fn start_command(image: &Image, project: &Project) -> [Vec<String>; 2] {
    let mut command = build::SHELL.map(str::to_owned).to_vec();
    command.push(project.scripts.start.clone());
    [image.config.entrypoint.clone(), command]
}

/// What config.yaml says of the worker, with what is odd about it told.
pub(crate) fn worker_config(
    path: &Path,
    name: &WorkerName,
    events: &dyn Fn(Event<'_>),
) -> Result<WorkerConfig, RunError> {
    let variable = |name: &str| std::env::var(name).ok();
    let config = crate::project::config::read(path, name.as_str(), &variable)?.unwrap_or_default();
    for warning in &config.warnings {
        events(Event::Note(warning.clone()));
    }
    Ok(config)
}

/// Where a sandbox's directory says which project it belongs to.
const OWNER: &str = "project";

/// The project that the sandbox in `dir` belongs to, if there is one.
pub(crate) fn owner(dir: &Path) -> Result<Option<PathBuf>, RunError> {
    use std::os::unix::ffi::OsStringExt as _;
    let path = dir.join(OWNER);
    match fs::read(&path) {
        Ok(bytes) => Ok(Some(std::ffi::OsString::from_vec(bytes).into())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(at("read", &path)(source)),
    }
}

/// The new upper, until it has taken the place of the old one, and then that one, until it is removed.
const NEW_UPPER: &str = "upper.new";

/// A sandbox's directory, held by one process at a time.
pub(crate) struct Place {
    dir: PathBuf,
    lock: File,
}

/// The file that whoever holds a sandbox has locked. It says who that is, if that is somebody who runs it.
pub(crate) const LOCK: &str = "lock";

impl Place {
    /// Takes the sandbox `name` for the project at `root`. It belongs to the project that it was first used for, for as long
    /// as that exists or until `take_over`.
    pub fn claim(
        dir: PathBuf,
        name: &WorkerName,
        root: &Path,
        take_over: bool,
    ) -> Result<Self, RunError> {
        let mut place = Self::hold(dir, name, Duration::ZERO)?;
        place.sign()?;
        place.claim_for(name, root, take_over)?;
        Ok(place)
    }

    /// Takes the sandbox `name`, whoever it belongs to, and makes its directory. Somebody who has it may let go for as long as
    /// `patience`.
    pub fn hold(dir: PathBuf, name: &WorkerName, patience: Duration) -> Result<Self, RunError> {
        let deadline = Instant::now() + patience;
        let path = dir.join(LOCK);
        loop {
            fs::create_dir_all(&dir).map_err(at("create", &dir))?;
            let mut options = File::options();
            let options = options.read(true).write(true).create(true).truncate(false);
            let lock = match options.open(&path) {
                // Its directory was removed just now.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                lock => lock.map_err(at("open", &path))?,
            };
            match lock.try_lock() {
                Ok(()) if is_at(&lock, &path) => {
                    lock.set_len(0).map_err(at("write", &path))?;
                    let place = Self { dir, lock };
                    place.drop_new_upper()?;
                    return Ok(place);
                }
                // Whoever had it has removed it.
                Ok(()) => {}
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    thread::sleep(LOCK_PAUSE);
                }
                Err(TryLockError::WouldBlock) => {
                    let mut holder = String::new();
                    let _ = lock.take(20).read_to_string(&mut holder);
                    return Err(RunError::Busy {
                        name: name.to_string(),
                        holder: holder.trim().to_owned(),
                    });
                }
                Err(TryLockError::Error(source)) => return Err(at("lock", &path)(source)),
            }
        }
    }

    /// Says that this process runs it.
    pub fn sign(&mut self) -> Result<(), RunError> {
        let path = self.dir.join(LOCK);
        let text = format!("{}\n", std::process::id());
        self.lock
            .rewind()
            .and_then(|()| self.lock.write_all(text.as_bytes()))
            .map_err(at("write", &path))
    }

    /// Has it belong to the project at `root`, as in [`claim`](Self::claim).
    pub fn claim_for(
        &self,
        name: &WorkerName,
        root: &Path,
        take_over: bool,
    ) -> Result<(), RunError> {
        use std::os::unix::ffi::OsStrExt as _;
        let owner = owner(&self.dir)?.unwrap_or_default();
        if owner == root {
            return Ok(());
        }
        if owner.is_dir() && !take_over {
            return Err(RunError::Taken {
                name: name.to_string(),
                owner,
            });
        }
        if take_over {
            // First: what somebody else's project wrote is nothing for this one.
            self.drop_upper()?;
        }
        let path = self.dir.join(OWNER);
        fs::write(&path, root.as_os_str().as_bytes()).map_err(at("write", &path))
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where what the worker writes is.
    pub fn upper(&self) -> PathBuf {
        self.dir.join("upper")
    }

    fn console(&self) -> PathBuf {
        self.dir.join("console.log")
    }

    /// Forgets what the worker wrote: all of it or nothing, however this ends. Half an upper would be one whose files are empty.
    pub fn drop_upper(&self) -> Result<(), RunError> {
        self.drop_new_upper()?;
        let (upper, away) = (self.upper(), self.dir.join(NEW_UPPER));
        match fs::rename(&upper, &away) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            renamed => renamed.map_err(at("put away", &upper))?,
        }
        self.sync()?;
        self.drop_new_upper()
    }

    /// Where an upper is made that is to take the place of that one. There is nothing yet.
    pub fn new_upper(&self) -> Result<PathBuf, RunError> {
        self.drop_new_upper()?;
        Ok(self.dir.join(NEW_UPPER))
    }

    /// Forgets what is there.
    pub fn drop_new_upper(&self) -> Result<(), RunError> {
        remove_all(&self.dir.join(NEW_UPPER))
    }

    /// Makes its names durable.
    fn sync(&self) -> Result<(), RunError> {
        File::open(&self.dir)
            .and_then(|dir| dir.sync_all())
            .map_err(at("sync", &self.dir))
    }

    /// Has the new upper and the upper take each other's place, in one step, which is durable when this returns.
    pub fn exchange_upper(&self) -> Result<(), RunError> {
        let (new, upper) = (self.dir.join(NEW_UPPER), self.upper());
        let flags = if upper.exists() {
            RenameFlags::EXCHANGE
        } else {
            RenameFlags::NOREPLACE
        };
        renameat_with(CWD, &new, CWD, &upper, flags)
            .map_err(|error| at("put a new upper in the place of", &upper)(error.into()))?;
        self.sync()
    }

    /// Removes it. Somebody who waits for it makes it anew.
    pub fn remove(self) -> Result<(), RunError> {
        self.drop_upper()?;
        remove_all(&self.dir)
    }
}

fn remove_all(path: &Path) -> Result<(), RunError> {
    match fs::remove_dir_all(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(at("remove", path)(source)),
        _ => Ok(()),
    }
}

fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(held), Ok(named)) => (held.dev(), held.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use iii_store::tree::Tree;

    use super::*;

    /// As when a worker is added anew that runs and takes a change of its project.
    #[test]
    fn who_keeps_layers_at_once_loses_none() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let lease = store.lease("test").unwrap();
        let layers: Vec<_> = (b'a'..=b'p')
            .map(|name| {
                let mut tree = Tree::implicit();
                tree.dir_at(&[name]).unwrap();
                let ingest = store.ingest(&lease).unwrap();
                ingest.finish(&tree).unwrap().layer_id
            })
            .collect();
        thread::scope(|scope| {
            for id in &layers {
                let store = &store;
                scope.spawn(move || {
                    keep_also(store, RefKind::Managed, "box", &[*id], &[]).unwrap();
                });
            }
        });
        let mut kept = store.get_ref(RefKind::Managed, "box").unwrap().unwrap();
        assert_eq!(run_on(&kept).len(), 1);
        let mut layers = layers;
        kept.layers.sort();
        layers.sort();
        assert_eq!(kept.layers, layers);
    }

    #[test]
    fn engines_are_named_by_urls() {
        for (url, same) in [
            ("ws://127.0.0.1:49134", Some("ws://127.0.0.1:49134")),
            ("ws://localhost:1/", Some("ws://localhost:1")),
            ("ws://[::1]:2/x?y", Some("ws://[::1]:2")),
            ("ws://:2", None),
            ("ws://[::1:2", None),
            ("ws://host", None),
            ("ws://host:port", None),
            ("http://host:1", None),
            ("", None),
        ] {
            let engine = Engine::of_url(url).map(|engine| engine.url());
            assert_eq!(engine.as_deref(), same, "{url}");
        }
    }
}
