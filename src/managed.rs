//! The commands about managed workers.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, IsTerminal as _, Write as _};
use std::os::fd::{BorrowedFd, RawFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use iii_engine::build::realise::With;
use iii_engine::build::{Event, Status, Stream};
use iii_engine::home::Home;
use iii_engine::managed::logs::Reader;
use iii_engine::managed::supervisor::{self, Orders, Started, Told, Voice};
use iii_engine::managed::{self, State, add as adding};
use iii_engine::plan::Kind;
use iii_engine::project::scaffold;
use iii_engine::project::{Language, WorkerName};
use iii_engine::worker::Ended;
use iii_engine::worker::dev;
use iii_engine::worker::engine::Engine;
use iii_engine::worker::isolation::SandboxOptions;
use iii_engine::worker::supervise::Signals;
use iii_sandbox::tail::inert;
use rustix::event::{PollFd, PollFlags, poll};

use super::args::{
    Add, Clear, Init, ItsConfig, ItsEngine, ListWorkers, Logs, ProjectLanguage, RemoveWorkers,
    Sandbox, StartWorker, StatusOfWorker, StopWorkers,
};
use super::table::{Align, Table};
use super::worker::{Printer, caches, outcome, sandbox_options, usual_sandbox};
use super::{CliError, limits, print, print_json, settings};
use crate::output::{ProgressHandle, StepOutput, Ui, Unit};

/// How long an engine may take to start a worker that was added; it looks at its file every few
/// seconds.
const ALIVE: Duration = Duration::from_secs(30);

/// Time between two looks at a worker that is about to start.
const PAUSE: Duration = Duration::from_millis(50);

/// Time between two looks at whether a worker whose log is followed still runs.
const FOLLOW_PAUSE: Duration = Duration::from_secs(1);

/// The engine's config.yaml, as an absolute path: the supervisor stands elsewhere.
pub fn config_path(args: &ItsConfig) -> Result<PathBuf, CliError> {
    let named = args.config.clone();
    let path = named
        .or_else(settings::config_path)
        .unwrap_or_else(|| settings::CONFIG.into());
    std::path::absolute(path).map_err(CliError::Here)
}

/// The engine's address: from the options, else from the engine's variables, else the default.
fn engine(args: &ItsEngine) -> Engine {
    let url = settings::engine();
    Engine {
        host: args.address.clone().unwrap_or(url.host),
        port: args.port.unwrap_or(url.port),
    }
}

/// How a worker is to be started. Where nothing is said, it is as it was said last, or as usual.
fn orders(
    home: &Home,
    name: &WorkerName,
    args: &ItsEngine,
    watch: Option<bool>,
    sandbox: &Sandbox,
) -> Result<Orders, CliError> {
    let last = supervisor::last_orders(home, name);
    let was_watched = last.as_ref().is_some_and(|last| last.watch);
    let last = last.map(|last| last.sandbox);
    let last = last.filter(|last| *last != SandboxOptions::default());
    let sandbox = match sandbox_options(sandbox)?.or(last) {
        Some(said) => said,
        None => usual_sandbox()?,
    };
    Ok(Orders {
        name: name.to_string(),
        path: PathBuf::new(),
        engine: engine(args),
        config: config_path(&args.config)?,
        engine_process: settings::engine_process()?,
        watch: watch.unwrap_or(was_watched),
        sandbox,
    })
}

pub fn start(home: &Home, args: &StartWorker, ui: &Ui) -> Result<ExitCode, CliError> {
    let name = args.name.parse()?;
    let orders = orders(
        home,
        &name,
        &args.engine,
        args.follow.asked(),
        &args.sandbox,
    )?;
    run(home, &name, orders, args.no_wait, ui)
}

/// Starts a worker, and says so.
pub fn run(
    home: &Home,
    name: &WorkerName,
    orders: Orders,
    no_wait: bool,
    ui: &Ui,
) -> Result<ExitCode, CliError> {
    let mut show = |line: &str| ui.line(line);
    let show: Option<&mut dyn FnMut(&str)> = if no_wait { None } else { Some(&mut show) };
    match supervisor::start(home, name, orders, show)? {
        Started::Already(Some(pid)) => {
            ui.ok(format_args!("{name} is already running (pid: {pid})"));
        }
        Started::Already(None) => ui.ok(format_args!("{name} is already running")),
        Started::Launched => ui.ok(format_args!("{name} is starting")),
        Started::Ready(pid) => ui.ok(format_args!("{name} started (pid: {pid})")),
    }
    Ok(ExitCode::SUCCESS)
}

pub fn stop(home: &Home, args: &StopWorkers, ui: &Ui) -> Result<ExitCode, CliError> {
    let config = config_path(&args.config)?;
    let names = known(home, &config, &args.names)?;
    // All are asked before any is waited for.
    let stopping: Vec<_> = names
        .iter()
        .map(|name| managed::begin_stop(home, name))
        .collect();
    let mut code = ExitCode::SUCCESS;
    for (name, stopping) in names.iter().zip(stopping) {
        let stopped = stopping.and_then(|stopping| match stopping {
            Some(stopping) => stopping.finish(home).map(Some),
            None => Ok(None),
        });
        match stopped {
            Ok(Some(_)) => ui.ok(format_args!("{name} stopped")),
            Ok(None) => ui.ok(format_args!("{name} is already stopped")),
            Err(error) => code = fail(&error.into(), ui),
        }
    }
    Ok(code)
}

/// Reports an error that does not end the command.
fn fail(error: &CliError, ui: &Ui) -> ExitCode {
    error.report(ui);
    error.exit_code()
}

/// The names of workers, all of which are there.
fn known(
    home: &Home,
    config: &std::path::Path,
    names: &[String],
) -> Result<Vec<WorkerName>, CliError> {
    let mut known = Vec::new();
    for name in names {
        let name: WorkerName = name.parse()?;
        if managed::path_of(home, config, &name)?.is_none() {
            let name = name.to_string();
            return Err(managed::ManagedError::Unknown { name }.into());
        }
        if !known.contains(&name) {
            known.push(name);
        }
    }
    Ok(known)
}

/// How a worker is to be started that was started before, where nothing else is asked.
pub fn orders_again(
    home: &Home,
    name: &WorkerName,
    args: &StartWorker,
) -> Result<Orders, CliError> {
    let last = supervisor::last_orders(home, name);
    let mut now = orders(home, name, &args.engine, args.follow.asked(), &args.sandbox)?;
    if let Some(last) = last {
        if args.engine.config.config.is_none() && settings::config_path().is_none() {
            now.config = last.config;
        }
        if !settings::names_engine() {
            let (host, port) = (args.engine.address.clone(), args.engine.port);
            now.engine = Engine {
                host: host.unwrap_or(last.engine.host),
                port: port.unwrap_or(last.engine.port),
            };
        }
        // An engine that has ended meanwhile would end the worker at once.
        let engine = last.engine_process.filter(|engine| engine.is_alive());
        now.engine_process = now.engine_process.or(engine);
    }
    Ok(now)
}

pub fn restart(home: &Home, args: &StartWorker, ui: &Ui) -> Result<ExitCode, CliError> {
    let name: WorkerName = args.name.parse()?;
    let now = orders_again(home, &name, args)?;
    known(home, &now.config, std::slice::from_ref(&args.name))?;
    if managed::stop(home, &name)?.is_some() {
        ui.ok(format_args!("{name} stopped"));
    }
    run(home, &name, now, args.no_wait, ui)
}

pub fn remove(home: &Home, args: &RemoveWorkers, ui: &Ui) -> Result<ExitCode, CliError> {
    let config = config_path(&args.config)?;
    let (mut names, mut sandboxes) = (Vec::new(), Vec::new());
    for text in &args.names {
        let name = text.parse()?;
        if managed::path_of(home, &config, &name)?.is_some() || !dev::is_there(home, &name)? {
            names.push(text.clone());
        } else if !sandboxes.contains(&name) {
            sandboxes.push(name);
        }
    }
    let names = known(home, &config, &names)?;
    if !args.yes {
        for name in &names {
            if managed::state(home, name)?.0 != State::Stopped {
                confirm(&format!("{name} runs"), "stop and remove it", ui)?;
            }
        }
    }
    let mut code = ExitCode::SUCCESS;
    for name in &names {
        match managed::remove(home, &config, name) {
            Ok(true) => ui.ok(format_args!("{name} removed from config.yaml")),
            Ok(false) => ui.ok(format_args!("{name} removed; it was not in config.yaml")),
            Err(error) => code = fail(&error.into(), ui),
        }
    }
    for name in &sandboxes {
        match dev::remove(home, name) {
            Ok(()) => ui.ok(format_args!("sandbox {name} of `worker dev` removed")),
            Err(error) => code = fail(&error.into(), ui),
        }
    }
    Ok(code)
}

/// Asks for a yes on a terminal; fails elsewhere.
fn confirm(what: &str, to_do: &str, ui: &Ui) -> Result<(), CliError> {
    let needed = || CliError::NeedsYes {
        what: what.to_owned(),
    };
    if !(io::stdin().is_terminal() && io::stderr().is_terminal()) {
        return Err(needed());
    }
    ui.warn(format_args!("{what}; {to_do}? [y/N]"));
    let mut answer = String::new();
    io::stdin().read_line(&mut answer).map_err(|_| needed())?;
    if matches!(answer.trim(), "y" | "Y" | "yes") {
        return Ok(());
    }
    Err(needed())
}

pub fn clear(home: &Home, args: &Clear, ui: &Ui) -> Result<ExitCode, CliError> {
    let config = config_path(&args.config)?;
    let names = if let Some(name) = &args.name {
        known(home, &config, std::slice::from_ref(name))?
    } else {
        let all = managed::list(home, &config)?;
        let names = all.into_iter().map(|worker| worker.name.parse());
        names.collect::<Result<Vec<WorkerName>, _>>()?
    };
    if names.is_empty() {
        ui.ok("no workers");
        return Ok(ExitCode::SUCCESS);
    }
    if !args.yes {
        let listed: Vec<&str> = names.iter().map(WorkerName::as_str).collect();
        let what = format!("the files of {} would be dropped", listed.join(", "));
        confirm(&what, "go on", ui)?;
    }
    let mut code = ExitCode::SUCCESS;
    for name in &names {
        match managed::clear(home, name) {
            Ok(()) => ui.ok(format_args!("{name} cleared")),
            Err(error) => code = fail(&error.into(), ui),
        }
    }
    Ok(code)
}

/// The output of `worker list --json`.
#[derive(serde::Serialize)]
struct Workers {
    workers: Vec<managed::Status>,
}

pub fn list(home: &Home, args: &ListWorkers) -> Result<ExitCode, CliError> {
    let workers = managed::list(home, &config_path(&args.config)?)?;
    if args.json {
        print_json(&Workers { workers })?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new([
        ("NAME", Align::Left),
        ("TYPE", Align::Left),
        ("STATUS", Align::Left),
    ]);
    for worker in workers {
        table.row([
            worker.name,
            worker.kind.to_owned(),
            worker.status.text().to_owned(),
        ]);
    }
    print(&table.text())?;
    Ok(ExitCode::SUCCESS)
}

pub fn status(home: &Home, args: &StatusOfWorker) -> Result<ExitCode, CliError> {
    let name: WorkerName = args.name.parse()?;
    let status = managed::status(home, &config_path(&args.config)?, &name)?;
    if args.json {
        print_json(&status)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut text = String::new();
    let mut row = |what: &str, value: &str| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{what:<8}{}", inert(value));
    };
    row("name", &status.name);
    row("status", status.status.text());
    if let Some(pid) = status.pid {
        row("pid", &pid.to_string());
    }
    if let Some(since) = &status.since {
        row("since", since);
    }
    if let Some(path) = &status.path {
        row("path", &path.display().to_string());
    }
    row("layers", &status.layers.len().to_string());
    row("log", &home.logs(name.as_str()).display().to_string());
    if !status.configured {
        row("note", "not in config.yaml");
    }
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

pub fn logs(home: &Home, args: &Logs) -> Result<ExitCode, CliError> {
    let config = config_path(&args.config)?;
    let names = known(home, &config, std::slice::from_ref(&args.name))?;
    let dir = home.logs(&args.name);
    let cannot = |source| CliError::Log {
        name: args.name.clone(),
        source,
    };
    let mut out = io::stdout().lock();
    let mut show = |piece: &[u8]| out.write_all(piece).and_then(|()| out.flush());
    let mut read = || -> io::Result<()> {
        if args.follow {
            std::fs::create_dir_all(&dir)?;
        }
        let reader = Reader::last(&dir, args.lines, &mut show)?;
        if !args.follow {
            return Ok(());
        }
        let mut is_over = || {
            let mut states = names.iter().map(|name| managed::state(home, name));
            !states.any(|state| matches!(state, Ok((State::Starting | State::Running, _))))
        };
        reader.follow(FOLLOW_PAUSE, &mut is_over, &mut show)
    };
    match read() {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(cannot(error)),
        _ => Ok(ExitCode::SUCCESS),
    }
}

pub fn init(args: &Init, ui: &Ui) -> Result<ExitCode, CliError> {
    let language = match args.language {
        ProjectLanguage::Typescript => Language::TypeScript,
        ProjectLanguage::Javascript => Language::JavaScript,
        ProjectLanguage::Python => Language::Python,
        ProjectLanguage::Rust => Language::Rust,
    };
    let dir = std::path::absolute(&args.dir).map_err(CliError::Here)?;
    let own = dir.file_name().unwrap_or(std::ffi::OsStr::new("worker"));
    let name = WorkerName::of_directory(own).unwrap_or_else(|| WorkerName::for_directory(own));
    let files = scaffold::init(&dir, language, &name)?;
    ui.ok(format_args!(
        "{name} is in {}: {}",
        args.dir.display(),
        files.join(", ")
    ));
    ui.note(format_args!(
        "run it: iii worker dev {}",
        args.dir.display()
    ));
    Ok(ExitCode::SUCCESS)
}

/// Stays until the other end of the lifeline is closed; without one, until a signal ends it.
pub fn daemon() -> Result<ExitCode, CliError> {
    let Some(text) = settings::lifeline() else {
        loop {
            thread::park();
        }
    };
    let text = text.to_string_lossy().into_owned();
    let number: Option<RawFd> = text.parse().ok().filter(|number| *number >= 0);
    let number = number.ok_or_else(|| CliError::Lifeline { text: text.clone() })?;
    // SAFETY: nothing in this process closes it: it came from outside, and no other code knows it.
    // Each call fails if it is not an open descriptor.
    let lifeline = unsafe { BorrowedFd::borrow_raw(number) };
    let mut buffer = [0; 256];
    loop {
        let mut fds = [PollFd::new(&lifeline, PollFlags::IN)];
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return Err(CliError::Lifeline { text }),
            Ok(_) => {}
        }
        let events = fds.first().map_or(PollFlags::NVAL, PollFd::revents);
        if events.contains(PollFlags::NVAL) {
            return Err(CliError::Lifeline { text });
        }
        if !events.contains(PollFlags::IN) {
            return Ok(ExitCode::SUCCESS);
        }
        // Its bytes do not matter.
        match rustix::io::read(lifeline, &mut buffer) {
            Ok(1..) | Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            _ => return Ok(ExitCode::SUCCESS),
        }
    }
}

pub fn add(home: &Home, signals: &Signals, args: &Add, ui: &Ui) -> Result<ExitCode, CliError> {
    let engine = engine(&args.engine);
    let config = config_path(&args.engine.config)?;
    let said = sandbox_options(&args.sandbox)?;
    let options = adding::Options {
        workers: args.workers.clone(),
        force: args.force,
        reset_config: args.reset_config,
        config: config.clone(),
        limits: limits::with(&[])?,
        caches: caches(Vec::new(), None)?,
        sandbox: match &said {
            Some(said) => said.clone(),
            None => usual_sandbox()?,
        },
        said,
        collect: settings::may_collect(),
        watch: args.follow.asked(),
        engine: engine.clone(),
    };
    let show = Many::new(ui, options.workers.len());
    let events = |name: Option<&WorkerName>, event: Event<'_>| show.show(name, &event);
    let mut told = |added: &adding::Added| match &added.result {
        Ok(true) => ui.ok(format_args!("Worker {} added to config.yaml", added.name)),
        Ok(false) => ui.ok(format_args!(
            "Worker {} is already in config.yaml",
            added.name
        )),
        Err(_) => ui.warn(format_args!("Worker {} was not added", added.name)),
    };
    let added = adding::add(home, &options, signals, &events, &mut told)?;
    drop(show);
    let mut code = ExitCode::SUCCESS;
    let mut there = Vec::new();
    for worker in added {
        match worker.result {
            Ok(changed) => there.push((worker.name, changed)),
            Err(error) => code = fail(&error.into(), ui),
        }
    }
    if there.is_empty() {
        return Ok(code);
    }
    if !engine.listens() {
        ui.note(format_args!(
            "no engine listens at {}; an engine starts the workers when it starts; by hand: iii worker start {}",
            engine.url(),
            there.first().map_or("NAME", |(name, _)| name.as_str())
        ));
    } else if !args.no_wait {
        wait_until_alive(home, &there, args, ui)?;
    }
    Ok(code)
}

/// Waits until the engine has started the added workers. A worker whose entry is as it was gives
/// the engine nothing to do, so it is started here.
fn wait_until_alive(
    home: &Home,
    added: &[(WorkerName, bool)],
    args: &Add,
    ui: &Ui,
) -> Result<(), CliError> {
    let deadline = Instant::now() + ALIVE;
    for (name, changed) in added {
        if !changed && managed::state(home, name)?.0 == State::Stopped {
            let orders = orders(home, name, &args.engine, None, &args.sandbox)?;
            run(home, name, orders, false, ui)?;
            continue;
        }
        loop {
            if let (State::Running, Some(pid)) = managed::state(home, name)? {
                ui.ok(format_args!("{name} started (pid: {pid})"));
                break;
            }
            if Instant::now() > deadline {
                ui.warn(format_args!(
                    "the engine has not started {name}; see `iii worker logs {name}`, or start it: iii worker start {name}"
                ));
                break;
            }
            thread::sleep(PAUSE);
        }
    }
    Ok(())
}

/// Draws what happens to several workers at once.
struct Many<'a> {
    ui: &'a Ui,
    one: Printer<'a>,
    count: usize,
    /// Workers whose layers are all there.
    whole: ProgressHandle,
    output: Mutex<BTreeMap<(String, Kind, Stream), StepOutput>>,
}

impl<'a> Many<'a> {
    fn new(ui: &'a Ui, count: usize) -> Self {
        let whole = ui.progress("building workers", Unit::Count);
        whole.set_length(count as u64);
        Self {
            ui,
            one: Printer::new(ui),
            count,
            whole,
            output: Mutex::default(),
        }
    }

    fn show(&self, name: Option<&WorkerName>, event: &Event<'_>) {
        if let Event::Ready(report) = event
            && report.kind == Kind::Project
        {
            self.whole.inc(1);
        }
        let name = match name {
            Some(name) if self.count > 1 => name,
            _ => return self.one.show(event),
        };
        let ui = self.ui;
        match event {
            // Of many workers, only the work is reported.
            Event::Base(_) => {}
            Event::Ready(report) => {
                let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
                // Shows a last line without a newline.
                output.retain(|(own, kind, _), _| {
                    (own.as_str(), *kind) != (name.as_str(), report.kind)
                });
                if report.status != Status::Hit && report.kind != Kind::Project {
                    ui.step_line(report.kind, format_args!("{name}: {}", outcome(report)));
                }
            }
            Event::Waiting(kind) => ui.note(format_args!(
                "{kind} of {name}: another process is building it; waiting"
            )),
            Event::Running(kind, reason) => {
                ui.note(format_args!("{kind} of {name}: running ({reason})"));
            }
            Event::Output(kind, stream, bytes) => {
                let mut output = self.output.lock().unwrap_or_else(PoisonError::into_inner);
                output
                    .entry((name.to_string(), *kind, *stream))
                    .or_insert_with(|| ui.output(format!("{name} {kind}")))
                    .push(bytes);
            }
            Event::Note(text) => ui.warn(format_args!("{name}: {text}")),
            other => self.one.show(other),
        }
    }
}

/// Runs a managed worker in this process, which was started for that. Returns its exit code.
pub fn supervise() -> i32 {
    let Ok((voice, orders)) = Voice::take_over() else {
        return 2;
    };
    let ui = Ui::to(voice.clone());
    let run = || -> Result<Ended, CliError> {
        let home = settings::home()?;
        let signals = Signals::install().map_err(CliError::Signals)?;
        let (limits, caches) = (limits::with(&[])?, caches(Vec::new(), None)?);
        let with = With {
            rebuild: false,
            limits: &limits,
            caches: &caches,
            sandbox: &orders.sandbox,
        };
        let collect = settings::may_collect();
        let printer = Printer::new(&ui);
        let events = |event: Event<'_>| printer.show(&event);
        Ok(supervisor::supervise(
            &home, &orders, with, collect, &voice, &signals, &events,
        )?)
    };
    match run() {
        Ok(ended) if ended.signal.is_some() => ui.ok("stopped"),
        Ok(ended) if ended.status.success() => ui.ok("the start command ended"),
        Ok(ended) => ui.warn(format_args!(
            "the start command ended: {}",
            iii_engine::build::describe(ended.status)
        )),
        Err(error) => {
            error.report(&ui);
            voice.tell(&Told::Failed);
            return 1;
        }
    }
    0
}
