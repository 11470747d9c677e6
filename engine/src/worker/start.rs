//! How the sandbox of a worker comes to run.

use std::ffi::OsString;

use iii_overlay::OverlayOptions;
use iii_overlay::adapter::Mode;
use iii_sandbox::{
    Command as SandboxCommand, Controller, HostSettings, Sandbox, SandboxError, SandboxSpec, Stdio,
};
use iii_store::{LayerId, RefKind, Store};
use rustix::process::Signal;

use crate::build::realise::Worker;
use crate::build::{self, Event};
use crate::compose::{Composition, Served};
use crate::home::Home;
use crate::worker::control::{self, Serving};
use crate::worker::engine::Engine;
use crate::worker::error::RunError;
use crate::worker::keep::{keep_also, keep_layers};
use crate::worker::place::Place;
use crate::worker::program::Program;
use crate::worker::snapshot::Taking;
use crate::worker::supervise::{GRACE, Signals};

/// A worker's sandbox as it is to be started.
pub(crate) struct Start<'a> {
    pub home: &'a Home,
    /// The store.
    pub store: &'a Store,
    /// The worker; its layers are pinned.
    pub worker: &'a Worker,
    /// Where its upper is.
    pub place: &'a Place,
    /// Whose name keeps its layers.
    pub keeper: RefKind,
    /// Its program.
    pub program: &'a Program,
    /// Where its output goes.
    pub stdio: Stdio,
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
    /// Runs `program` in place of the one that runs: SIGTERM, and SIGKILL after the usual grace.
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
    /// Composes the root filesystem, starts the command on it, and calls `attend`, which waits for
    /// its end. From the start on, signals are for the command. Returns what `attend` did.
    pub fn run<R>(
        self,
        signals: &Signals,
        events: &dyn Fn(Event<'_>),
        attend: impl FnOnce(&mut Sandbox, &Live<'_>) -> R,
    ) -> Result<R, RunError> {
        let (worker, program) = (self.worker, self.program);
        let name = worker.name.as_str();
        // The upper stands on the layers of the last start until it is opened, and on these
        // afterwards. A kill in between loses neither.
        let compose = |source| RunError::Compose {
            name: name.to_owned(),
            source,
        };
        let thawed = iii_overlay::thawed_of(&self.place.upper());
        let thawed = Vec::from_iter(thawed.map_err(|error| compose(error.into()))?);
        let layers = worker.stack.runs_on();
        let others = keep_also(self.store, self.keeper, name, &layers, &thawed)?;
        let composition = Composition {
            store: self.store,
            layers: worker.stack.layers.clone(),
            upper: self.place.upper(),
            options: OverlayOptions {
                project: worker.stack.project_slot().map(build::project_at),
                ..OverlayOptions::default()
            },
            mode: Mode::Quiet,
            console: self.place.console(),
        };
        let composed = composition.compose(&worker.isolation);
        let composed = composed.map_err(compose)?;
        let served = composed.served().map(Served::overlay);
        let gave_way = served.map_or(0, |overlay| overlay.gave_way());
        if gave_way > 0 {
            events(Event::GaveWay(gave_way));
        }
        let snapshots = Taking::new(self.store, self.keeper, &worker.name, served);
        let mut spec = SandboxSpec::new(composed.root(), &program.argv, self.home.host_settings());
        spec.env.clone_from(&program.env);
        spec.user.clone_from(&program.user);
        name.clone_into(&mut spec.hostname);
        spec.stdio = self.stdio;
        let Engine { host, port } = &program.engine;
        spec.reach = worker
            .isolation
            .reach()
            .with_server(host, *port, &spec.host);
        let (command, host) = (spec.command(), spec.host.clone());
        let mut sandbox = Sandbox::start(spec)?;
        let (result, _) = signals.attend(sandbox.controller(), || {
            let controller = sandbox.controller();
            let commands = control::serve(
                self.place.dir(),
                controller.clone(),
                command.clone(),
                snapshots,
            )?;
            // The overlay is open by now, wherever it is served.
            if others {
                keep_layers(self.store, self.keeper, name, &layers, &thawed)?;
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
