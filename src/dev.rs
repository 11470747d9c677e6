//! `worker dev` and `worker build`, from top to bottom, and the layers of a worker for whoever has another use for them.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::net::{TcpStream, ToSocketAddrs as _};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, TryRecvError};
use std::thread;
use std::time::Duration;

use iii_overlay::adapter::fuse::Mode;
use iii_overlay::{OpenError, OverlayOptions};
use iii_store::{Layer, LayerId, Lease, Ref, RefKind, Store, StoreError};
use rustix::process::Signal;

use crate::build::{self, BuildError, Builder, Caches, Event, Report, Stack, Status};
use crate::cache::{self, CacheOptions, Caches as LayerCaches};
use crate::collect;
#[cfg(feature = "libkrun")]
use crate::compose::Hardware;
use crate::compose::{Composition, Isolation};
use crate::environment;
use crate::exec::{self, ExecError};
use crate::firmware::FirmwareError;
#[cfg(feature = "libkrun")]
use crate::firmware::{Package, Places};
use crate::home::{Home, HomeError};
#[cfg(feature = "libkrun")]
use crate::kvm;
use crate::kvm::Unusable;
use crate::oci::{self, Image, ImageError, Limits, Origin, Platform, Settings};
use crate::plan::Kind;
use crate::project::{
    DocumentError, NameError, Project, ProjectError, Resources, WorkerConfig, WorkerName,
};
use crate::sandbox::{Sandbox, SandboxError, SandboxSpec};
use crate::supervise::Signals;

/// How long the engine has to accept a connection before it counts as not listening.
const ENGINE_TIMEOUT: Duration = Duration::from_millis(250);

/// How long layers may go to a cache when the worker has ended.
const SHARE_TIME: Duration = Duration::from_secs(60);

/// Why a worker did not run.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "their messages say it")]
pub enum DevError {
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
    #[error("this build of iii has no libkrun runtime")]
    NoLibkrun,
    #[error("there is no worker called {name}")]
    NeverRun { name: String },
    #[error("the project at {} is not what the worker {name} last ran from", project.display())]
    Outdated { name: String, project: PathBuf },
    #[error("libkrun cannot run a microVM here: {why}")]
    NoKvm { why: Unusable },
    #[error(transparent)]
    Firmware(#[from] FirmwareError),
    #[error(transparent)]
    Exec(#[from] ExecError),
}

fn at(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DevError {
    let path = path.to_owned();
    move |source| DevError::Io {
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
    pub runtime: Runtime,
}

/// What a worker and its steps run in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runtime {
    /// Linux namespaces.
    Namespace,
    /// A libkrun microVM.
    Libkrun,
}

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
}

/// Where the engine listens.
#[derive(Debug, Clone)]
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

/// What every command about a project begins with.
struct Opened {
    project: Project,
    name: WorkerName,
    store: Store,
    image: Image,
    env: environment::Env,
    caches: LayerCaches,
    isolation: Isolation,
}

impl Opened {
    fn new(
        home: &Home,
        target: &Target,
        events: &(dyn Fn(Event<'_>) + Sync),
    ) -> Result<Self, DevError> {
        let project = Project::open(&target.path)?;
        let name = match &target.name {
            Some(name) => name.parse()?,
            None => project.dev_name(),
        };
        let store = Store::open(home.store())?;
        let wanted = target.base.as_deref().unwrap_or(&project.base_image);
        let image = base(&store, wanted, target.rebuild, &target.limits, events)?;
        let env = environment::for_steps(&image.config.env, project.tool_env());
        let isolation = isolation(home, target.runtime, project.resources, events)?;
        Ok(Self {
            isolation,
            project,
            name,
            store,
            image,
            env,
            caches: caches(&target.caches, events),
        })
    }

    /// Realises the layers. The lease pins them, and nothing else.
    fn realise(
        &self,
        home: &Home,
        purpose: &str,
        target: &Target,
        signals: &Signals,
        events: &(dyn Fn(Event<'_>) + Sync),
    ) -> Result<(Stack, Lease), DevError> {
        for warning in &self.project.warnings {
            events(Event::Note(warning.clone()));
        }
        // What runs that were killed have left.
        build::sweep(home);
        self.store.sweep_dead_leases()?;
        let purpose = format!("{purpose} {}", self.name);
        // This one pins whatever is looked at on the way, too: more than is needed from then on.
        let looking = self.store.lease(&purpose)?;
        let builder = Builder {
            home,
            store: &self.store,
            lease: &looking,
            project: &self.project,
            name: self.name.as_str(),
            image: &self.image,
            env: &self.env,
            isolation: &self.isolation,
            rebuild: target.rebuild,
            caches: &self.caches,
            limits: &target.limits,
            signals,
            events,
        };
        let realised = builder.realise().map_err(DevError::from).and_then(|stack| {
            let lease = self.store.lease(&purpose)?;
            lease.pin(&stack.ids())?;
            Ok((stack, lease))
        });
        drop(looking);
        if realised.is_err() && target.collect {
            // It may have failed for want of space.
            self.collect(events);
        }
        realised
    }

    /// The layers that the worker's name keeps.
    fn kept_layers(&self) -> Result<Vec<LayerId>, StoreError> {
        let kept = match self.store.get_ref(RefKind::Worker, self.name.as_str()) {
            // It is about to be written anew.
            Err(StoreError::Damaged { .. } | StoreError::Json { .. }) => None,
            other => other?,
        };
        Ok(kept.map(|kept| kept.layers).unwrap_or_default())
    }

    /// Has the worker's name keep these layers, bottom first, and no others.
    fn keep_layers(&self, layers: Vec<LayerId>) -> Result<(), StoreError> {
        let info = serde_json::Value::Null;
        let content = Ref { layers, info };
        self.store
            .set_ref(RefKind::Worker, self.name.as_str(), &content)
    }

    /// Gives the layers of setup and install to the cache that takes some. To fail is worth a line, and no more.
    fn share(&self, stack: &Stack, stop: &AtomicBool, events: &(dyn Fn(Event<'_>) + Sync)) {
        let events = |event: cache::Event<'_>| events(Event::Cache(event));
        self.caches
            .push(&self.store, &stack.recorded, stop, &events);
    }

    /// Does so while `run` runs, and at most [`SHARE_TIME`] longer. Who has had enough presses Ctrl-C.
    fn share_during<R>(
        &self,
        stack: &Stack,
        events: &(dyn Fn(Event<'_>) + Sync),
        run: impl FnOnce() -> R,
    ) -> R {
        if !self.caches.takes() {
            return run();
        }
        let stop = AtomicBool::new(false);
        let (sender, done) = mpsc::channel::<()>();
        thread::scope(|scope| {
            let stop_sharing = &stop;
            scope.spawn(move || {
                self.share(stack, stop_sharing, events);
                drop(sender);
            });
            let result = run();
            if done.try_recv() == Err(TryRecvError::Empty) {
                events(Event::Note(
                    "layers still go to the cache; Ctrl-C ends that".to_owned(),
                ));
                // It hangs up when it has ended.
                let _ = done.recv_timeout(SHARE_TIME);
                stop.store(true, Ordering::Relaxed);
            }
            result
        })
    }

    /// Clears the store if it or the disk is too full after something was built. To fail is worth a line, and no more.
    fn collect(&self, events: &dyn Fn(Event<'_>)) {
        match collect::if_full(&self.store) {
            Ok(Some(report)) if report.freed > 0 => events(Event::Collected(&report)),
            Ok(_) => {}
            Err(error) => events(Event::Note(format!("clearing the store failed: {error}"))),
        }
    }
}

#[cfg(feature = "libkrun")]
fn isolation(
    home: &Home,
    runtime: Runtime,
    resources: Resources,
    events: &dyn Fn(Event<'_>),
) -> Result<Isolation, DevError> {
    if runtime == Runtime::Namespace {
        return Ok(Isolation::Namespace);
    }
    kvm::usable(&home.kvm()).map_err(|why| DevError::NoKvm { why })?;
    let places = Places::from_environment(home.lib(), None);
    let libkrunfw = if let Some((path, _)) = places.find()? {
        path
    } else {
        events(Event::Note("fetching the guest's kernel, once".into()));
        let settings = Settings::from_environment().map_err(ImageError::from)?;
        places.find_or_fetch(Package::of_this_machine().as_ref(), &settings, &|_| ())?
    };
    Ok(Isolation::Machine(Hardware {
        libkrunfw,
        // The manifest allows what fits.
        cpus: u8::try_from(resources.cpus).unwrap_or(u8::MAX),
        memory_mib: resources.memory_mib,
    }))
}

#[cfg(not(feature = "libkrun"))]
fn isolation(
    _: &Home,
    runtime: Runtime,
    _: Resources,
    _: &dyn Fn(Event<'_>),
) -> Result<Isolation, DevError> {
    match runtime {
        Runtime::Namespace => Ok(Isolation::Namespace),
        Runtime::Libkrun => Err(DevError::NoLibkrun),
    }
}

/// Whether the store has grown.
fn has_grown(stack: &Stack) -> bool {
    let mut reports = stack.reports.iter();
    reports.any(|report| report.status != Status::Hit)
}

/// The caches that are asked for. Where not even a request can be made, there are none.
fn caches(options: &CacheOptions, events: &dyn Fn(Event<'_>)) -> LayerCaches {
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
) -> Result<Image, DevError> {
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
        (Err(source), None) => Err(DevError::NoBase {
            name: name.to_owned(),
            source: Box::new(source),
        }),
    }
}

/// Realises the layers of a project and starts nothing. Returns what became of each, bottom first.
pub fn build(
    home: &Home,
    target: &Target,
    signals: &Signals,
    events: &(dyn Fn(Event<'_>) + Sync),
) -> Result<Vec<Report>, DevError> {
    let opened = Opened::new(home, target, events)?;
    let (stack, _lease) = opened.realise(home, "build", target, signals, events)?;
    opened.share(&stack, &AtomicBool::new(false), events);
    if target.collect && has_grown(&stack) {
        opened.collect(events);
    }
    Ok(stack.reports)
}

/// Realises the layers of a project and runs its start command on them until it ends. `started` is called once
/// the command runs.
pub fn dev(
    home: &Home,
    options: &Options,
    signals: &Signals,
    events: &(dyn Fn(Event<'_>) + Sync),
    started: &dyn Fn(),
) -> Result<Ended, DevError> {
    let opened = Opened::new(home, &options.target, events)?;
    let project = &opened.project;
    let drop_upper = options.fresh || options.target.rebuild;
    let place = Place::claim(
        home.dev(opened.name.as_str()),
        &opened.name,
        &project.root,
        drop_upper,
    )?;
    let (stack, _lease) = opened.realise(home, "dev", &options.target, signals, events)?;
    let config = worker_config(&options.config, &opened.name, events)?;

    if drop_upper {
        place.drop_upper()?;
    }
    // The upper stands on the layers of the last start until it is opened, and on these afterwards. Whoever kills this process
    // in between loses neither.
    let layers = stack.ids();
    let mut last = opened.kept_layers()?;
    let others = last != layers;
    if others {
        last.retain(|id| opened.store.has_layer(id));
        opened.keep_layers([&last[..], &layers].concat())?;
    }
    let composition = Composition {
        store: &opened.store,
        layers: stack.layers.clone(),
        upper: place.upper(),
        options: OverlayOptions {
            project: Some(build::project_at(&stack.layers)),
            ..OverlayOptions::default()
        },
        mode: Mode::Quiet,
        console: place.console(),
    };
    let composed = composition.compose(&opened.isolation);
    let composed = composed.map_err(|source| DevError::Compose {
        name: opened.name.to_string(),
        source,
    })?;

    let engine = options.engine.url();
    let env = environment::for_worker(
        &opened.env,
        &project.env,
        &config.env,
        opened.name.as_str(),
        &engine,
        opened.isolation.name(),
    );
    let [entrypoint, command] = start_command(&opened.image, project);
    let mut spec = SandboxSpec::new(composed.root(), entrypoint.into_iter().chain(command));
    spec.env = env.into_iter().collect();
    spec.user.clone_from(&opened.image.config.user);
    spec.hostname = opened.name.to_string();
    spec.mounts = Caches::open(
        &home.cache(opened.isolation.name()),
        project,
        &opened.env,
        |cache| !cache.id.starts_with("apt-"),
        false,
    )?
    .mounts;
    let command = spec.command();
    let mut sandbox = Sandbox::start(spec)?;
    let _commands = exec::serve(&place.dir, sandbox.controller(), command)?;
    // The overlay is open by now, wherever it is served.
    if others {
        opened.keep_layers(layers)?;
    }
    for warning in sandbox.warnings() {
        events(Event::Note(warning.to_string()));
    }
    started();
    let wait = || {
        signals.attend(sandbox.controller(), || {
            // Asked while signals are attended to: a name may take long to resolve.
            if !options.engine.listens() {
                events(Event::Note(format!(
                    "no engine listens at {engine}; start it with `iii`, the worker connects when it is there"
                )));
            }
            sandbox.wait()
        })
    };
    let (status, signal) = opened.share_during(&stack, events, wait);
    let status = status?;
    if options.target.collect && has_grown(&stack) {
        opened.collect(events);
    }
    Ok(Ended { status, signal })
}

/// What starts a worker: the image's entrypoint, and the command that goes by way of it, as a container engine runs them. The
/// steps do without an entrypoint, as those of a Dockerfile.
pub fn start_command(image: &Image, project: &Project) -> [Vec<String>; 2] {
    let mut command = build::SHELL.map(str::to_owned).to_vec();
    command.push(project.scripts.start.clone());
    [image.config.entrypoint.clone(), command]
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
    pub env: environment::Env,
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
) -> Result<Built, DevError> {
    let opened = Opened::new(home, target, events)?;
    let (stack, lease) = opened.realise(home, "export", target, signals, events)?;
    opened.share(&stack, &AtomicBool::new(false), events);
    if target.collect && has_grown(&stack) {
        opened.collect(events);
    }
    let kinds = stack.reports.iter().map(|report| report.kind);
    Ok(Built {
        layers: kinds.zip(stack.layers).collect(),
        project: opened.project,
        name: opened.name,
        store: opened.store,
        image: opened.image,
        env: opened.env,
        lease,
    })
}

/// The worker `name` with the layers that it last ran on. How it is run is what its project says now, which must have the same
/// steps, and the same base if that is not `base`. Nothing is built.
pub fn last_run(home: &Home, name: WorkerName, base: Option<&str>) -> Result<Built, DevError> {
    let store = Store::open(home.store())?;
    let never = || DevError::NeverRun {
        name: name.to_string(),
    };
    let root = owner(&home.dev(name.as_str()))?.ok_or_else(never)?;
    let kept = store.get_ref(RefKind::Worker, name.as_str())?;
    let kept = kept.ok_or_else(never)?;
    let lease = store.lease(&format!("export {name}"))?;
    lease.pin(&kept.layers)?;
    let project = Project::open(&root)?;
    let outdated = || DevError::Outdated {
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
    kinds.push(Kind::Project);
    if !kept.layers.starts_with(&image.layers) || kept.layers.len() != kinds.len() {
        return Err(outdated());
    }
    let layers = kept.layers.iter().map(|id| store.layer(id));
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

fn worker_config(
    path: &Path,
    name: &WorkerName,
    events: &dyn Fn(Event<'_>),
) -> Result<WorkerConfig, DevError> {
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
fn owner(dir: &Path) -> Result<Option<PathBuf>, DevError> {
    use std::os::unix::ffi::OsStringExt as _;
    let path = dir.join(OWNER);
    match fs::read(&path) {
        Ok(bytes) => Ok(Some(std::ffi::OsString::from_vec(bytes).into())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(at("read", &path)(source)),
    }
}

/// A sandbox's directory, held by one process at a time.
struct Place {
    dir: PathBuf,
    _lock: File,
}

impl Place {
    /// Takes the sandbox `name` for the project at `root`. It belongs to the project that it was first used for, for as long
    /// as that exists or until `take_over`.
    fn claim(
        dir: PathBuf,
        name: &WorkerName,
        root: &Path,
        take_over: bool,
    ) -> Result<Self, DevError> {
        fs::create_dir_all(&dir).map_err(at("create", &dir))?;
        let path = dir.join("lock");
        let mut lock = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(at("open", &path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                let _ = lock.take(20).read_to_string(&mut holder);
                return Err(DevError::Busy {
                    name: name.to_string(),
                    holder: holder.trim().to_owned(),
                });
            }
            Err(TryLockError::Error(source)) => return Err(at("lock", &path)(source)),
        }
        lock.set_len(0)
            .and_then(|()| lock.rewind())
            .and_then(|()| writeln!(lock, "{}", std::process::id()))
            .map_err(at("write", &path))?;
        let place = Self { dir, _lock: lock };
        place.claim_for(name, root, take_over)?;
        Ok(place)
    }

    fn claim_for(&self, name: &WorkerName, root: &Path, take_over: bool) -> Result<(), DevError> {
        use std::os::unix::ffi::OsStrExt as _;
        let owner = owner(&self.dir)?.unwrap_or_default();
        if owner == root {
            return Ok(());
        }
        if owner.is_dir() && !take_over {
            return Err(DevError::Taken {
                name: name.to_string(),
                owner,
            });
        }
        let path = self.dir.join(OWNER);
        fs::write(&path, root.as_os_str().as_bytes()).map_err(at("write", &path))
    }

    fn upper(&self) -> PathBuf {
        self.dir.join("upper")
    }

    fn console(&self) -> PathBuf {
        self.dir.join("console.log")
    }

    fn drop_upper(&self) -> Result<(), DevError> {
        let upper = self.upper();
        match fs::remove_dir_all(&upper) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(at("remove", &upper)(source))
            }
            _ => Ok(()),
        }
    }
}
