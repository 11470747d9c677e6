//! The program of a worker: command, environment and user.

use std::path::Path;

use iii_oci::Image;

use crate::build::realise::Worker;
use crate::build::{self, Event};
use crate::home::Home;
use crate::plan::environment;
use crate::project::{Project, WorkerConfig, WorkerName};
use crate::worker::engine::Engine;
use crate::worker::error::RunError;

/// What a worker runs, but for the host's part in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Program {
    pub(super) argv: Vec<String>,
    pub(super) env: Vec<(String, String)>,
    pub(super) user: String,
    /// Whom it is to reach.
    pub(super) engine: Engine,
}

impl Program {
    /// What `worker` runs, with an engine there and what config.yaml says.
    pub fn new(worker: &Worker, engine: &Engine, config: &WorkerConfig) -> Self {
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
        Self {
            argv: entrypoint.into_iter().chain(command).collect(),
            env: env.into_iter().collect(),
            user: worker.image.config.user.clone(),
            engine: engine.clone(),
        }
    }
}

/// What starts a worker: the image's entrypoint, and the command that goes by way of it, as a
/// container engine runs them. The steps do without an entrypoint, as those of a Dockerfile.
pub fn start_command(image: &Image, project: &Project) -> [Vec<String>; 2] {
    let mut command = build::SHELL.map(str::to_owned).to_vec();
    command.push(project.scripts.start.clone());
    [image.config.entrypoint.clone(), command]
}

/// What config.yaml says of the worker, with what is odd about it told.
pub(crate) fn worker_config(
    home: &Home,
    path: &Path,
    name: &WorkerName,
    events: &dyn Fn(Event<'_>),
) -> Result<WorkerConfig, RunError> {
    let variable = |name: &str| home.variable(name)?.to_str().map(str::to_owned);
    let config = crate::project::config::read(path, name.as_str(), &variable)?.unwrap_or_default();
    for warning in &config.warnings {
        events(Event::Note(warning.clone()));
    }
    Ok(config)
}
