//! Parts of a worker that go into an image, and parts that stay here.
//!
//! Its layers are the image's layers. Its start command is that of `worker dev`; the user of the
//! image sets the engine's address. Values that look like secrets stay here, and so do the
//! files of the project that would tell them.

use std::collections::HashMap;

use iii_oci::ImageConfig;

use crate::plan::WORKSPACE;
use crate::plan::environment::{anywhere, looks_secret};
use crate::project::{MANIFEST_NAME, Project, WorkerName, config};
use crate::worker::dev::Built;
use crate::worker::program::start_command;

/// Longest text of a label.
const MAX_LABEL: usize = 1024;
/// The file that an engine reads, where it lies in a project.
const ENGINE_CONFIG: &str = "config.yaml";

/// How the image of a worker is run, and what is not in it.
#[derive(Debug, Clone)]
pub struct WorkerImage {
    /// How it is run.
    pub config: ImageConfig,
    /// Labels for users.
    pub labels: HashMap<String, String>,
    /// Parts that are not in it.
    pub left_out: Vec<LeftOut>,
}

/// Something that a worker has here and not in an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LeftOut {
    /// A variable of the manifest that looks like a secret.
    Variable(String),
    /// A file of the project, by its name, that has the value of a secret in it.
    File(&'static str),
}

impl WorkerImage {
    /// The image of a worker. Variables named in `wanted` are in it, whatever they look like.
    pub fn of(worker: &Built, wanted: &[String]) -> Self {
        let (project, name) = (&worker.project, worker.name.as_str());
        let secret = |name: &str, value: &str| {
            looks_secret(name, value) && !wanted.iter().any(|wanted| wanted == name)
        };
        let (secrets, own): (Vec<_>, Vec<_>) = project
            .env
            .iter()
            .partition(|(name, value)| secret(name, value));
        let mut env = anywhere(&worker.env, own.into_iter());
        env.insert("III_WORKER_NAME".into(), name.to_owned());
        let tells = !secrets.is_empty() || project.config.as_ref().is_some_and(has_secret);
        let secrets = secrets.into_iter().map(|(name, _)| name.clone());
        let mut left_out: Vec<LeftOut> = secrets.map(LeftOut::Variable).collect();
        if tells {
            left_out.push(LeftOut::File(MANIFEST_NAME));
        }
        if has_engine_config(project, name) {
            left_out.push(LeftOut::File(ENGINE_CONFIG));
        }
        let [entrypoint, cmd] = start_command(&worker.image, project);
        Self {
            config: ImageConfig {
                env: env
                    .iter()
                    .map(|(name, value)| format!("{name}={value}"))
                    .collect(),
                user: worker.image.config.user.clone(),
                working_dir: format!("/{WORKSPACE}"),
                entrypoint,
                cmd,
            },
            labels: labels(worker),
            left_out,
        }
    }

    /// The paths in the project's layer that are left out.
    pub fn omitted(&self) -> Vec<Vec<u8>> {
        let files = self.left_out.iter().filter_map(|one| match one {
            LeftOut::File(name) => Some(format!("{WORKSPACE}/{name}").into_bytes()),
            LeftOut::Variable(_) => None,
        });
        files.collect()
    }
}

fn labels(worker: &Built) -> HashMap<String, String> {
    let mut labels = HashMap::new();
    let mut put = |name: &str, value: String| {
        labels.insert(format!("org.opencontainers.image.{name}"), value);
    };
    put("title", worker.name.to_string());
    if let Some(text) = &worker.project.description {
        put("description", text.chars().take(MAX_LABEL).collect());
    }
    put("base.name", worker.image.name.clone());
    if let Some(digest) = &worker.image.digest {
        put("base.digest", digest.to_string());
    }
    labels
}

/// Whether any value in the manifest's `config` looks like a secret.
fn has_secret(config: &serde_json::Value) -> bool {
    use serde_json::Value;
    match config {
        Value::Object(fields) => fields.iter().any(|(name, value)| match value {
            Value::String(text) => !text.is_empty() && looks_secret(name, text),
            other => has_secret(other),
        }),
        Value::Array(values) => values.iter().any(|value| match value {
            Value::String(text) => looks_secret("", text),
            other => has_secret(other),
        }),
        _ => false,
    }
}

/// Whether an engine's file lies in the project and says something about this worker: that is for
/// this machine.
fn has_engine_config(project: &Project, name: &str) -> bool {
    let path = project.root.join(ENGINE_CONFIG);
    let own = project.name.as_ref().map(WorkerName::as_str);
    [Some(name), own].into_iter().flatten().any(|name| {
        // Values do not matter here, only whether there are any.
        let read = config::read(&path, name, &|_| Some(String::new()));
        matches!(read, Ok(Some(config)) if !config.env.is_empty())
    })
}
