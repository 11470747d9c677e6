//! `iii worker`.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use clap::ValueEnum as _;
use iii_engine::build::{Event, Report, Status, Stream};
use iii_engine::compose::Isolation;
use iii_engine::home::Home;
use iii_engine::plan::Kind;
use iii_engine::project::{HostLoopback, WorkerName};
use iii_engine::shared_cache::{self, CacheError, CacheName, CacheOptions};
use iii_engine::worker::control::Asked;
use iii_engine::worker::dev::{self, Options};
use iii_engine::worker::engine::Engine;
use iii_engine::worker::error::RunError;
use iii_engine::worker::isolation::{self, SandboxOptions};
use iii_engine::worker::supervise::Signals;
use iii_engine::worker::target::Target;
use iii_sandbox::tail::inert;
use iii_store::with_causes;

use super::args::{self, Runtime, Worker};
use super::error::registry_hint;
use super::image::{self, Bars};
use super::{CliError, explain, export, limits, managed, print, print_json, settings, snapshot};
use crate::doctor::{self, Diagnosis, State};
use crate::output::{
    ProgressHandle, StepOutput, Ui, Unit, human_bytes, human_counted, human_duration,
};
use crate::terminal;

pub fn run(command: Worker, ui: &Ui) -> Result<ExitCode, CliError> {
    let home = settings::home()?;
    let signals = Signals::install().map_err(CliError::Signals)?;
    let works_on_layers = matches!(
        command,
        Worker::Dev(_)
            | Worker::Build(_)
            | Worker::Add(_)
            | Worker::Snapshot(_)
            | Worker::Rollback(_)
            | Worker::Fork(_)
            | Worker::Export(_)
    );
    if works_on_layers {
        crate::start_threads()?;
    }
    match command {
        Worker::Dev(args) => dev(&home, &signals, args, ui),
        Worker::Build(args) => build(&home, &signals, args, ui),
        Worker::Explain(args) => explain::explain(&home, &args),
        Worker::Add(args) => managed::add(&home, &signals, &args, ui),
        Worker::Start(args) => managed::start(&home, &args, ui),
        Worker::Stop(args) => managed::stop(&home, &args, ui),
        Worker::Restart(args) => managed::restart(&home, &args, ui),
        Worker::Remove(args) => managed::remove(&home, &args, ui),
        Worker::List(args) => managed::list(&home, &args),
        Worker::Status(args) => managed::status(&home, &args),
        Worker::Logs(args) => managed::logs(&home, &args),
        Worker::Clear(args) => managed::clear(&home, &args, ui),
        Worker::Snapshot(args) => snapshot::take(&home, &args, ui),
        Worker::Snapshots(args) => snapshot::list(&home, &args, ui),
        Worker::Rollback(args) => snapshot::roll_back(&home, &args, ui),
        Worker::Fork(args) => snapshot::fork(&home, &args, ui),
        Worker::Init(args) => managed::init(&args, ui),
        Worker::ManagerDaemon => managed::daemon(),
        Worker::Export(args) => export::worker(&home, &signals, &args, ui),
        Worker::Exec(args) => exec(&home, args),
        Worker::Doctor(args) => doctor(&home, args),
    }
}

fn exec(home: &Home, args: args::Exec) -> Result<ExitCode, CliError> {
    let name: WorkerName = args.name.parse().map_err(RunError::from)?;
    let asked = Asked {
        argv: args.command,
        env: args.env,
        cwd: args.workdir,
        terminal: args.tty.then(terminal::size).flatten(),
    };
    let timeout = args.timeout.map(Duration::from_secs);
    let dir = match iii_engine::managed::state(home, &name)?.0 {
        iii_engine::managed::State::Running => home.managed(name.as_str()),
        _ => home.dev(name.as_str()),
    };
    let status = terminal::exec(&dir, name.as_str(), asked, timeout).map_err(RunError::from)?;
    let code = status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
    Ok(ExitCode::from(code as u8))
}

fn engine(args: args::Engine) -> Engine {
    Engine {
        host: args.address,
        port: args.port,
    }
}

fn doctor(home: &Home, args: args::Doctor) -> Result<ExitCode, CliError> {
    let diagnosis = doctor::examine(home, &engine(args.engine));
    if args.json {
        print_json(&diagnosis)?;
    } else {
        print(&prescription(&diagnosis))?;
    }
    Ok(match diagnosis.runtime {
        Some(_) => ExitCode::SUCCESS,
        None => ExitCode::FAILURE,
    })
}

/// A diagnosis for people.
fn prescription(diagnosis: &Diagnosis) -> String {
    let mut text = String::new();
    for finding in &diagnosis.findings {
        let mark = match finding.state {
            State::Good => '✓',
            State::Fair => '⚠',
            State::Bad => '✗',
        };
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "  {mark} {:<11} {}",
            finding.what,
            inert(&finding.found)
        );
        for line in [&finding.means, &finding.advice].into_iter().flatten() {
            let _ = writeln!(text, "    {:<11} {}", "", inert(line));
        }
    }
    let _ = match diagnosis.runtime {
        Some(runtime) => writeln!(text, "\n  workers run with --runtime {runtime}"),
        None => writeln!(text, "\n  no worker can run here"),
    };
    text
}

fn dev(home: &Home, signals: &Signals, args: args::Dev, ui: &Ui) -> Result<ExitCode, CliError> {
    let start = Instant::now();
    let options = Options {
        target: target(args.target)?,
        engine: engine(args.engine),
        fresh: args.fresh,
        config: settings::config_path().unwrap_or_else(|| settings::CONFIG.into()),
        watch: !args.no_watch,
    };
    let started = || ui.ok(format_args!("ready in {}", human_duration(start.elapsed())));
    let printer = Printer::new(ui);
    let ended = dev::dev(
        home,
        &options,
        signals,
        &|event| printer.show(&event),
        &started,
    )?;
    let code = match (ended.signal, ended.status.code(), ended.status.signal()) {
        (Some(_), ..) => {
            ui.ok("stopped");
            return Ok(ExitCode::SUCCESS);
        }
        (None, Some(code), _) => code,
        (None, None, signal) => 128 + signal.unwrap_or_default(),
    };
    if code == 0 {
        ui.ok("the start command ended");
    } else {
        ui.warn(format_args!(
            "the start command ended: {}",
            iii_engine::build::describe(ended.status)
        ));
    }
    Ok(ExitCode::from(code as u8))
}

fn build(home: &Home, signals: &Signals, args: args::Build, ui: &Ui) -> Result<ExitCode, CliError> {
    let target = target(args.target)?;
    let printer = Printer::new(ui);
    let layers = dev::build(home, &target, signals, &|event| printer.show(&event))?;
    if args.json {
        print_json(&Layers { layers })?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The output of `worker build --json`.
#[derive(serde::Serialize)]
struct Layers {
    layers: Vec<Report>,
}

/// Sandbox options of the command line; none without any.
pub fn sandbox_options(args: &args::Sandbox) -> Result<Option<SandboxOptions>, CliError> {
    if args.runtime.is_none() && args.allow_host_loopback.is_empty() {
        return Ok(None);
    }
    let allowed = args.allow_host_loopback.iter();
    Ok(Some(SandboxOptions {
        runtime: match args.runtime {
            Some(runtime) => runtime.into(),
            None => usual_sandbox()?.runtime,
        },
        host_loopback: allowed.fold(HostLoopback::default(), HostLoopback::and),
    }))
}

/// The default sandbox options, from the environment.
pub fn usual_sandbox() -> Result<SandboxOptions, CliError> {
    let text = settings::runtime();
    let runtime = match text.as_str() {
        "" => Ok(Runtime::Auto),
        text => Runtime::from_str(text, false),
    };
    let runtime = runtime.map_err(|_| CliError::RuntimeVariable { text })?;
    Ok(SandboxOptions {
        runtime: runtime.into(),
        ..SandboxOptions::default()
    })
}

impl From<Runtime> for isolation::Runtime {
    fn from(runtime: Runtime) -> Self {
        match runtime {
            Runtime::Auto => Self::Auto,
            Runtime::Libkrun => Self::Libkrun,
            Runtime::Namespace => Self::Namespace,
        }
    }
}

fn target(args: args::Target) -> Result<Target, CliError> {
    Ok(Target {
        caches: caches(args.cache_from, args.cache_to)?,
        path: args.path,
        rebuild: args.rebuild,
        name: args.name,
        base: args.base,
        collect: settings::may_collect(),
        limits: limits::with(&[])?,
        sandbox: match sandbox_options(&args.sandbox)? {
            Some(said) => said,
            None => usual_sandbox()?,
        },
    })
}

/// The caches that options name, or else the environment.
pub fn caches(from: Vec<CacheName>, to: Option<CacheName>) -> Result<CacheOptions, CliError> {
    Ok(CacheOptions {
        from: if from.is_empty() {
            caches_of(settings::CACHES[0])?
        } else {
            from
        },
        to: match to {
            Some(cache) => Some(cache),
            None => caches_of(settings::CACHES[1])?.pop(),
        },
    })
}

/// The caches that a variable of the environment lists.
fn caches_of(variable: &'static str) -> Result<Vec<CacheName>, CliError> {
    let text = settings::list(variable);
    let names = text
        .split(',')
        .map(str::trim)
        .filter(|name| !name.is_empty());
    names
        .map(|name| {
            name.parse()
                .map_err(|source| CliError::CacheVariable { variable, source })
        })
        .collect()
}

/// Draws the events of a build.
pub struct Printer<'a> {
    ui: &'a Ui,
    /// Layers of the base that are being pulled.
    bars: Bars<'a>,
    /// The layer that is being fetched.
    fetching: Bars<'a>,
    /// The kernel of microVMs that is being fetched.
    kernel: Mutex<Option<ProgressHandle>>,
    /// The runtime that was printed.
    runtime: Mutex<Option<&'static str>>,
    /// Output of steps, a splitter of lines for each stream.
    output: Mutex<BTreeMap<(Kind, Stream), StepOutput>>,
}

impl<'a> Printer<'a> {
    pub fn new(ui: &'a Ui) -> Self {
        Self {
            ui,
            bars: Bars::new(ui, "pulling"),
            fetching: Bars::new(ui, "fetching"),
            kernel: Mutex::default(),
            runtime: Mutex::default(),
            output: Mutex::default(),
        }
    }

    pub fn show(&self, event: &Event<'_>) {
        let ui = self.ui;
        let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Pulling(event) => self.bars.show(event),
            Event::Pulled(pulled) => image::done(pulled, "pulled", ui),
            Event::Unresolved(image, error) => ui.warn(format_args!(
                "{} stays at its stored version: {}",
                image.name,
                with_causes(error)
            )),
            Event::Base(image) => ui.step_line(Kind::Base, format_args!("cached: {}", image.name)),
            Event::Waiting(kind) => ui.note(format_args!(
                "{kind}: another process is building it; waiting"
            )),
            Event::Running(kind, reason) => ui.note(format_args!("{kind}: running ({reason})")),
            Event::Output(kind, stream, bytes) => output
                .entry((*kind, *stream))
                .or_insert_with(|| ui.output(kind.to_string()))
                .push(bytes),
            Event::Cache(shared_cache::Event::Fetching(event)) => self.fetching.show(event),
            Event::Cache(shared_cache::Event::Failed(name, error)) => {
                ui.warn(cache_failure(name, error));
            }
            Event::Ready(report) => {
                // Shows a last line without a newline.
                output.retain(|(kind, _), _| *kind != report.kind);
                ui.step_line(report.kind, outcome(report));
            }
            Event::OwnFiles(kind, files) => ui.note(format_args!("{kind} {files}")),
            Event::GaveWay(files) => ui.note(format_args!(
                "{} that the worker had changed gave way to newer ones of its layers; \
                 `iii worker dev --fresh` forgets the rest",
                human_counted(*files, "file"),
            )),
            Event::Reloaded { files, seconds } => ui.ok(format_args!(
                "reloaded: {} changed, {}",
                human_counted(*files, "file"),
                human_duration(Duration::from_secs_f64(*seconds))
            )),
            Event::Kernel(come, size) => self.kernel(*come, *size),
            Event::Chosen(isolation, why) => self.chosen(isolation, *why),
            Event::Collected(report) => image::cleared(report, ui),
            Event::Note(text) => ui.warn(text),
        }
    }

    fn kernel(&self, come: u64, size: u64) {
        let mut kernel = self.kernel.lock().unwrap_or_else(PoisonError::into_inner);
        if come == size {
            *kernel = None;
            return;
        }
        let bar = kernel.get_or_insert_with(|| {
            let size_text = human_bytes(size);
            self.ui.note(format_args!(
                "fetching the kernel of microVMs ({size_text}), only this time"
            ));
            let bar = self.ui.progress("fetching the kernel", Unit::Bytes);
            bar.set_length(size);
            bar
        });
        bar.set(come);
    }

    /// Prints the runtime of sandboxes, once for all workers.
    fn chosen(&self, isolation: &Isolation, why: Option<&(dyn Error + 'static)>) {
        *self.kernel.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let mut said = self.runtime.lock().unwrap_or_else(PoisonError::into_inner);
        if said.replace(isolation.name()) == Some(isolation.name()) {
            return;
        }
        if let Some(why) = why {
            self.ui
                .warn(format_args!("no microVM: {}", with_causes(why)));
        }
        self.ui.note(match isolation {
            Isolation::Namespace => "runtime namespace: own files, processes and users; the host's kernel and network",
            #[cfg(feature = "libkrun")]
            Isolation::Machine(_) => "runtime libkrun: a microVM with its own kernel; of the host's localhost only the engine",
        });
    }
}

/// The failure of a cache and its remedy, in one line.
fn cache_failure(name: &CacheName, error: &CacheError) -> String {
    let hint = error.registry().and_then(registry_hint);
    let hint = hint.map_or_else(String::new, |hint| format!("; {hint}"));
    format!("the cache {name}: {}{hint}", with_causes(error))
}

pub fn outcome(report: &Report) -> String {
    let size = || {
        let took = human_duration(Duration::from_secs_f64(report.seconds));
        format!("{took}, {} new", human_bytes(report.bytes))
    };
    match (report.status, report.kind) {
        (Status::Hit, _) => "cached".into(),
        (Status::Built, Kind::Project) => {
            format!(
                "changed: {} ({})",
                human_counted(report.changed.unwrap_or_default(), "file"),
                size()
            )
        }
        (Status::Built, _) => format!("built ({})", size()),
        (Status::Fetched, _) => format!(
            "fetched ({}) from {}",
            size(),
            report.cache.as_deref().unwrap_or_default()
        ),
    }
}
