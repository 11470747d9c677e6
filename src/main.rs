//! The `iii` program, also as `iii-worker`: arguments in, lines and exit codes out.
//!
//! The only crate that knows clap and a terminal.

mod args;
mod doctor;
mod error;
mod explain;
mod export;
mod image;
mod limits;
mod managed;
mod manual;
mod output;
mod quantity;
mod roles;
mod settings;
mod snapshot;
mod store;
mod table;
mod terminal;
mod worker;

use std::env;
use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory, Parser as _};

use crate::output::Ui;

use args::{About, Command, Iii, IiiWorker, WorkerCommand};
use error::CliError;
use roles::Role;

/// The name under which this program is `iii worker`: the engine calls it so.
const WORKER_NAME: &str = "iii-worker";

fn main() -> ExitCode {
    if let Some(role) = Role::of_this_process() {
        if role == Role::Supervisor {
            keep_large_buffers_mapped();
        }
        role.play(managed::supervise);
    }
    keep_large_buffers_mapped();
    if is_worker(env::args_os().next()) {
        iii_worker()
    } else {
        iii()
    }
}

/// Whether a program called by this name is `iii-worker`: a link or a copy in any directory.
fn is_worker(called: Option<OsString>) -> bool {
    called.is_some_and(|called| Path::new(&called).file_name() == Some(WORKER_NAME.as_ref()))
}

fn iii() -> ExitCode {
    let command = Iii::parse().command;
    finish(|ui| match command {
        Command::Worker(command) => worker::run(command, ui),
        Command::Image(command) => image::run(command, ui),
        Command::Store(command) => store::run(command, ui),
        Command::About(command) => about::<Iii>(&command, ui),
    })
}

fn iii_worker() -> ExitCode {
    let command = IiiWorker::parse().command;
    finish(|ui| match command {
        WorkerCommand::Worker(command) => worker::run(command, ui),
        WorkerCommand::About(command) => about::<IiiWorker>(&command, ui),
    })
}

fn about<P: CommandFactory>(command: &About, ui: &Ui) -> Result<ExitCode, CliError> {
    match command {
        About::Completions(args) => manual::completions::<P>(args),
        About::Man(args) => manual::manual::<P>(args, ui),
    }
}

/// Gives every buffer of 1 MiB or more a mapping of its own. glibc would raise that threshold when
/// the first one is freed, serve the next from its heap, and zero it: the 16 MiB request buffer of
/// each thread that serves a filesystem, of which a page or two are ever used, would then be
/// resident whole.
fn keep_large_buffers_mapped() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: it sets a tunable of malloc and touches no memory of ours; there is one thread yet.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 20);
    }
}

/// Starts the threads of a command that needs some besides its own.
fn start_threads() -> Result<(), CliError> {
    match iii_engine::threads::start().map_err(CliError::Threads)? {
        0 => Err(CliError::NoThread),
        _ => Ok(()),
    }
}

fn finish(run: impl FnOnce(&Ui) -> Result<ExitCode, CliError>) -> ExitCode {
    let ui = Ui::stderr();
    run(&ui).unwrap_or_else(|error| {
        error.report(&ui);
        error.exit_code()
    })
}

/// Prints one JSON object on standard output.
fn print_json(value: &impl serde::Serialize) -> Result<(), CliError> {
    let mut text =
        serde_json::to_string_pretty(value).map_err(|error| CliError::Output(error.into()))?;
    text.push('\n');
    print(&text)
}

/// Prints data on standard output. The reader may close the pipe early.
fn print(text: &str) -> Result<(), CliError> {
    use std::io::Write as _;
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(CliError::Output(error))
        }
        _ => Ok(()),
    }
}
