//! The process that a managed worker runs under, and how it is started.
//!
//! `start` runs this program again, with [`MARKER`] for its first argument and [`Orders`] on its
//! standard input. That process has a session of its own and no terminal. It holds the worker's
//! place for as long as it lives, realises its layers, runs its start command, and ends with it.
//! Until the worker runs, it says on its standard output what happens, as lines of [`Told`].
//!
//! While the worker runs, each of its threads waits in the kernel for something to happen; nothing
//! wakes up by the clock.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use iii_sandbox::Sandbox;
use iii_sandbox::process::{Process, started, this_program};
use iii_store::Store;
use rustix::process::{Signal, getpid, kill_process};
use serde::{Deserialize, Serialize};

use super::{
    MAX_SMALL, ManagedError, PATIENCE, PID_FILE, State, at, path_of, read_small, remove_file,
    state, unknown,
};
use crate::build::Event;
use crate::build::realise::{Realiser, Wanted, With};
use crate::home::Home;
use crate::managed::logs::Log;
use crate::project::{Project, WorkerName};
use crate::worker::Ended;
use crate::worker::engine::Engine;
use crate::worker::error::RunError;
use crate::worker::isolation::SandboxOptions;
use crate::worker::place::{Place, Task};
use crate::worker::session::{RunKind, RunOptions, Session, Sieve};
use crate::worker::supervise::Signals;

/// The argument by which the program knows that it is to be a supervisor.
pub const MARKER: &str = "__supervise";

/// How the worker was last started.
const START: &str = "start.json";

/// How a worker is started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Orders {
    /// Its name.
    pub name: String,
    /// Its project; found by `start`.
    pub path: PathBuf,
    /// Where the engine listens.
    pub engine: Engine,
    /// The engine's config.yaml, an absolute path.
    pub config: PathBuf,
    /// The engine's process, which the worker ends with.
    pub engine_process: Option<EngineProcess>,
    /// Whether it follows what changes in its project.
    #[serde(default)]
    pub watch: bool,
    /// What it runs in.
    #[serde(default)]
    pub sandbox: SandboxOptions,
}

/// A process by its number and the time of its start, which together are not used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct EngineProcess {
    pid: i32,
    /// As [`started`] tells it.
    started: u64,
}

impl EngineProcess {
    /// The process that `III_ENGINE_PID` names.
    pub fn named(pid: &OsStr) -> Result<Self, ManagedError> {
        let pid = pid.to_string_lossy().trim().to_owned();
        let number: Option<i32> = pid.parse().ok().filter(|pid| *pid > 0);
        let engine = number.and_then(|pid| {
            let started = started(pid)?;
            Some(Self { pid, started })
        });
        // One that is younger than this process has not started it.
        let own = started(getpid().as_raw_pid());
        match engine {
            Some(engine) if own.is_none_or(|own| engine.started <= own) => Ok(engine),
            _ => Err(ManagedError::EngineGone { pid }),
        }
    }

    /// Whether it still runs.
    pub fn is_alive(self) -> bool {
        started(self.pid) == Some(self.started)
    }

    /// Has this process get SIGTERM when the engine ends, which may be at once.
    fn follow(self) -> io::Result<()> {
        let end = || {
            // Our own process is there.
            let _ = kill_process(getpid(), Signal::TERM);
        };
        let engine = match Process::open(self.pid) {
            Ok(engine) if self.is_alive() => engine,
            _ => {
                end();
                return Ok(());
            }
        };
        thread::Builder::new()
            .name("engine".into())
            .stack_size(64 << 10)
            .spawn(move || {
                engine.ends(None);
                end();
            })?;
        Ok(())
    }
}

/// What a supervisor says before its worker runs.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Told {
    /// A line for people.
    Line(String),
    /// The worker runs, under this pid.
    Ready(u32),
    /// It does not run. Why was told before.
    Failed,
}

/// How a start went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Started {
    /// It was running, or about to, under this supervisor.
    Already(Option<u32>),
    /// It is about to run.
    Launched,
    /// It runs, under this supervisor.
    Ready(u32),
}

/// How `name` was last started, if it ever was.
pub fn last_orders(home: &Home, name: &WorkerName) -> Option<Orders> {
    let text = read_small(&home.managed(name.as_str()).join(START))?;
    serde_json::from_str(&text).ok()
}

/// Starts a worker, unless it runs. With `show`, waits until it runs, and hands on what is told
/// meanwhile.
pub fn start(
    home: &Home,
    name: &WorkerName,
    mut orders: Orders,
    show: Option<&mut dyn FnMut(&str)>,
) -> Result<Started, ManagedError> {
    let path = path_of(home, &orders.config, name)?.ok_or_else(|| unknown(name))?;
    let (state, pid) = state(home, name)?;
    if state != State::Stopped {
        return Ok(Started::Already(pid));
    }
    if !path.is_dir() {
        let name = name.to_string();
        return Err(ManagedError::Moved { name, path });
    }
    orders.path = path;
    let program = this_program();
    let program = program.as_path();
    let orders =
        serde_json::to_vec(&orders).map_err(|error| at("describe", program)(error.into()))?;
    let mut child = Command::new(program)
        .arg0("iii-worker")
        .args([MARKER, name.as_str()])
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(if show.is_some() {
            Stdio::piped()
        } else {
            Stdio::null()
        })
        .stderr(Stdio::null())
        .spawn()
        .map_err(at("run", program))?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(&orders).map_err(at("write to", program))?;
    }
    let (Some(show), Some(stdout)) = (show, child.stdout.take()) else {
        return Ok(Started::Launched);
    };
    for line in BufReader::new(stdout).lines() {
        let line = line.map_err(at("read from", program))?;
        match serde_json::from_str(&line) {
            Ok(Told::Line(line)) => show(&line),
            Ok(Told::Ready(pid)) => return Ok(Started::Ready(pid)),
            Ok(Told::Failed) | Err(_) => break,
        }
        if line.is_empty() {
            break;
        }
    }
    let status = child.wait().map_err(at("wait for", program))?;
    let name = name.to_string();
    Err(match status.code() {
        Some(_) => ManagedError::NotStarted { name },
        None => ManagedError::Speechless { name },
    })
}

/// Where a supervisor tells what happens: to whoever started it, until the worker runs; to the log,
/// once it is open.
#[derive(Clone, Default)]
pub struct Voice(Arc<Mutex<Ears>>);

#[derive(Default)]
struct Ears {
    starter: Option<File>,
    log: Option<Log>,
}

impl Voice {
    /// Takes over this process's standard streams. Returns the orders that were on its standard
    /// input.
    pub fn take_over() -> io::Result<(Self, Orders)> {
        // It is no leader of a process group, unless it was started by hand.
        let _ = rustix::process::setsid();
        let mut text = Vec::new();
        io::stdin().lock().take(MAX_SMALL).read_to_end(&mut text)?;
        let starter = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdout(), 3)?;
        let null = File::options().read(true).write(true).open("/dev/null")?;
        rustix::stdio::dup2_stdin(&null)?;
        rustix::stdio::dup2_stdout(&null)?;
        rustix::stdio::dup2_stderr(&null)?;
        let ears = Ears {
            starter: Some(starter.into()),
            log: None,
        };
        Ok((
            Self(Arc::new(Mutex::new(ears))),
            serde_json::from_slice(&text)?,
        ))
    }

    fn with(&self, tell: impl FnOnce(&mut Ears)) {
        tell(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Says this to whoever started the supervisor, if they still listen.
    pub fn tell(&self, told: &Told) {
        self.with(|ears| ears.tell(told));
    }

    fn ready(&self, pid: u32) {
        self.with(|ears| {
            ears.tell(&Told::Ready(pid));
            ears.starter = None;
        });
    }

    /// Writes what a worker prints into the log until it ends.
    fn record(&self, mut output: impl Read) {
        let mut buffer = [0; 8192];
        // A read that fails is the end of the output, not of the worker.
        while let Ok(read @ 1..) = output.read(&mut buffer) {
            let piece = buffer.get(..read).unwrap_or_default();
            self.with(|ears| ears.write(piece));
        }
    }
}

impl Ears {
    fn tell(&mut self, told: &Told) {
        if let (Some(starter), Ok(mut line)) = (&mut self.starter, serde_json::to_vec(told)) {
            line.push(b'\n');
            // Who has gone does not want to know.
            let _ = starter.write_all(&line);
        }
    }

    fn write(&mut self, bytes: &[u8]) {
        if let Some(log) = &mut self.log {
            // On a full disk there is no log, and the worker goes on.
            let _ = log.write_all(bytes);
        }
    }
}

impl Write for Voice {
    /// Takes whole lines.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.with(|ears| {
            for line in String::from_utf8_lossy(bytes).lines() {
                ears.tell(&Told::Line(line.to_owned()));
            }
            ears.write(bytes);
        });
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Runs a worker until it ends. `prepare` is called once nobody else can run it, with its log open.
pub fn supervise(
    home: &Home,
    orders: &Orders,
    with: With<'_>,
    collect: bool,
    voice: &Voice,
    signals: &Signals,
    events: &(dyn Fn(Event<'_>) + Sync),
) -> Result<Ended, ManagedError> {
    if let Some(engine) = orders.engine_process {
        engine.follow().map_err(at("follow", Path::new("/proc")))?;
    }
    let name: WorkerName = orders.name.parse()?;
    let project = Project::open(&orders.path)?;
    let mut place = Place::hold(home.managed(name.as_str()), &name, PATIENCE, Task::Run)?;
    place.sign()?;
    place.claim_for(&name, &project.root, false)?;
    let pid_file = place.dir().join(PID_FILE);
    remove_file(&pid_file)?;
    let logs = home.logs(name.as_str());
    let log = Log::open(&logs).map_err(at("open the log in", &logs))?;
    voice.with(|ears| ears.log = Some(log));
    remember(place.dir(), orders)?;

    let store = Store::open(home.store())?;
    let sieve = Sieve::default();
    let named = sieve.filter(events);
    let realiser = Realiser::new(home, &store, with, signals, &named);
    let wanted = Wanted {
        project,
        name,
        base: None,
    };
    let (worker, lease) = realiser.one(RunKind::Managed.purpose(), wanted)?;
    let run = RunOptions {
        base: None,
        engine: &orders.engine,
        config: &orders.config,
        watch: orders.watch,
        collect,
    };
    let session = Session::new(RunKind::Managed, run, &realiser, &sieve, &place, events);
    let mut attend = |sandbox: &mut Sandbox, is_first: bool| {
        let recorder = record(voice, sandbox)?;
        write_pid(place.dir(), &pid_file)?;
        if is_first {
            voice.ready(std::process::id());
        }
        let status = sandbox.wait();
        remove_file(&pid_file)?;
        // Everything that was printed is in the log before it says that the worker has ended.
        let _ = recorder.join();
        Ok::<_, ManagedError>(status.map_err(RunError::from)?)
    };
    session.run(worker, lease, &mut attend)
}

/// Has what the worker prints written into the log, by a thread that ends with its output.
fn record(voice: &Voice, sandbox: &mut Sandbox) -> Result<JoinHandle<()>, ManagedError> {
    let (voice, output) = (voice.clone(), sandbox.stdout.take());
    thread::Builder::new()
        .name("log".into())
        .stack_size(64 << 10)
        .spawn(move || {
            if let Some(output) = output {
                voice.record(output);
            }
        })
        .map_err(at("make a thread for", Path::new("the worker's output")))
}

/// Has the next start know these orders, which are replaced at once or not at all.
pub(super) fn remember(dir: &Path, orders: &Orders) -> Result<(), ManagedError> {
    let path = dir.join(START);
    let text = serde_json::to_vec(orders).map_err(|error| at("write", &path)(error.into()))?;
    replace(dir, &path, &text)
}

/// Says who runs the worker, to the engine.
fn write_pid(dir: &Path, path: &Path) -> Result<(), ManagedError> {
    replace(dir, path, std::process::id().to_string().as_bytes())
}

/// Writes a file of `dir`, for its owner alone to read.
fn replace(dir: &Path, path: &Path, text: &[u8]) -> Result<(), ManagedError> {
    let mut file = tempfile::Builder::new()
        .prefix(".new.")
        .permissions(std::fs::Permissions::from_mode(0o600))
        .tempfile_in(dir)
        .map_err(at("write beside", path))?;
    file.write_all(text).map_err(at("write beside", path))?;
    file.persist(path)
        .map_err(|error| at("write", path)(error.error))?;
    Ok(())
}
