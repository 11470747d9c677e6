//! Errors of commands: messages, hints and exit codes.
//!
//! | code | meaning |
//! |---|---|
//! | 0 | done; or a worker ended on request |
//! | 1 | failed; of `store verify`: something is damaged |
//! | 2 | the command line is wrong |
//! | 125, 126, 127 | the start command did not run: sandbox failed, not executable, not found |
//! | 128 + n | interrupted by signal n before the worker ran |
//! | any other | exit code of the worker (128 + n where a signal n killed it) |

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use crate::output::Ui;
use crate::settings::{self, NoHome};
use iii_engine::build::BuildError;
use iii_engine::managed::ManagedError;
use iii_engine::project::NameError;
use iii_engine::project::scaffold::ScaffoldError;
#[cfg(target_os = "linux")]
use iii_engine::serve::ServeError;
use iii_engine::shared_cache::CacheNameError;
use iii_engine::worker::control::ExecError;
use iii_engine::worker::error::RunError;
use iii_engine::worker::snapshot::SnapshotError;
use iii_oci::export::ExportError;
use iii_oci::{ImageError, LayoutError, RegistryError};
#[cfg(target_os = "linux")]
use iii_overlay::adapter::vhost_user::VhostUserError;
use iii_overlay::upper::UpperError;
use iii_overlay::{FreezeError, OpenError};
use iii_sandbox::{HAS_NAMESPACES, SandboxError};
use iii_store::tree::TreeError;
use iii_store::{LayerId, StoreError, with_causes};

use super::limits::{self, LimitError};
use super::store::MIN_PREFIX;

/// Anything that ends a command.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    #[error(transparent)]
    Run(#[from] RunError),
    #[error(transparent)]
    Home(#[from] NoHome),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[cfg(target_os = "linux")]
    #[error(transparent)]
    Serve(#[from] ServeError),
    #[error(
        "{text:?} names no layer: expected the first {MIN_PREFIX} or more hex digits of its id"
    )]
    NotALayer { text: String },
    #[error("no layer, worker or image is called {text:?}")]
    NothingCalled { text: String },
    #[error("no layer has an id that begins with {text}")]
    NoLayer { text: String },
    #[error("the ids of {} layers begin with {text}: {}", found.len(), listed(text, found))]
    Ambiguous { text: String, found: Vec<LayerId> },
    #[error("no image is called {name} in the store")]
    NoImage { name: String },
    #[error("the variable {} is not valid", settings::LIMITS)]
    Limits(#[source] LimitError),
    #[error("exporting to {to} failed")]
    Export { to: String, source: ExportError },
    #[error("SOURCE_DATE_EPOCH is {text:?}, which is not a number of seconds")]
    SourceDateEpoch { text: String },
    #[error(transparent)]
    Managed(ManagedError),
    #[error(transparent)]
    Snapshot(SnapshotError),
    #[error(transparent)]
    Scaffold(#[from] ScaffoldError),
    #[error("{what}; nothing was done")]
    NeedsYes { what: String },
    #[error("III_LIFELINE_FD is {text:?}, which is not an open file descriptor")]
    Lifeline { text: String },
    #[error("cannot read the log of {name}")]
    Log { name: String, source: io::Error },
    #[error("no command is called {name}")]
    NoCommand { name: String },
    #[error("cannot write manual pages into {}", dir.display())]
    Pages { dir: PathBuf, source: io::Error },
    #[error("the working directory does not exist any more")]
    Here(#[source] io::Error),
    #[error("cannot write to standard output")]
    Output(#[source] io::Error),
    #[error("cannot start threads")]
    Threads(#[source] io::Error),
    #[error(
        "the system allows no further thread: see `ulimit -u` and the pids limit of the cgroup"
    )]
    NoThread,
    #[error("cannot take over signals")]
    Signals(#[source] io::Error),
    #[error("III_RUNTIME is {text:?}; expected auto, namespace or libkrun")]
    RuntimeVariable { text: String },
    #[error("the variable {variable} is not valid")]
    CacheVariable {
        variable: &'static str,
        source: CacheNameError,
    },
}

impl From<ManagedError> for CliError {
    fn from(error: ManagedError) -> Self {
        match error {
            ManagedError::Run(error) => Self::Run(error),
            ManagedError::Store(error) => Self::Store(error),
            error => Self::Managed(error),
        }
    }
}

impl From<SnapshotError> for CliError {
    fn from(error: SnapshotError) -> Self {
        match error {
            SnapshotError::Run(error) => Self::Run(*error),
            SnapshotError::Managed(error) => (*error).into(),
            SnapshotError::Store(error) => Self::Store(error),
            error => Self::Snapshot(error),
        }
    }
}

impl From<NameError> for CliError {
    fn from(error: NameError) -> Self {
        Self::Run(error.into())
    }
}

/// Most candidates that a message names.
const MAX_LISTED: usize = 8;

/// Ids cut to a length at which they usually differ.
fn listed(prefix: &str, ids: &[LayerId]) -> String {
    let cut = |id: &LayerId| id.to_string().chars().take(prefix.len() + 6).collect();
    let mut listed: Vec<String> = ids.iter().take(MAX_LISTED).map(cut).collect();
    if ids.len() > MAX_LISTED {
        listed.push("…".into());
    }
    listed.join(", ")
}

fn is_damage(error: &StoreError) -> bool {
    matches!(
        error,
        StoreError::Damaged { .. }
            | StoreError::Json { .. }
            | StoreError::Layer { .. }
            | StoreError::Index { .. }
            | StoreError::MissingObject(_)
    )
}

/// How to raise the limit that an image exceeds.
fn limit_hint(error: &ImageError, has_flag: bool) -> Option<String> {
    if is_beyond_the_store(error) {
        return Some("this is a limit of the store and cannot be raised".into());
    }
    let passed = error.passed()?;
    let limit = passed.limit?;
    if passed.value >= limit.most() {
        return Some(format!("{limit} cannot be raised further"));
    }
    let raised = limits::raised(limit, passed.value);
    let variable = settings::LIMITS;
    Some(if has_flag {
        format!("if you trust the image, raise the limit: --limit {raised}")
    } else {
        format!("if you trust the image, raise the limit: {variable}={raised}")
    })
}

fn is_beyond_the_store(error: &ImageError) -> bool {
    match error {
        ImageError::Pull { source, .. } | ImageError::Import { source, .. } => {
            is_beyond_the_store(source)
        }
        ImageError::Store(StoreError::Tree(error)) => {
            matches!(error, TreeError::TooLarge | TreeError::Depth)
        }
        _ => false,
    }
}

/// The remedy for a failed request to a registry.
pub fn registry_hint(error: &RegistryError) -> Option<String> {
    let login = |host: &str| format!("`docker login {host}` or `podman login {host}`");
    Some(match error {
        RegistryError::Unauthorized { host, .. } => format!(
            "log in with {}, and check the name: many registries refuse names that they do not have",
            login(host)
        ),
        RegistryError::NotAllowed { host, .. } => format!(
            "log in with {} as a user who may push there, and check the name: many registries accept only names that begin with the user's",
            login(host)
        ),
        RegistryError::NotFound { .. } => "check the name and the tag".into(),
        RegistryError::Http { .. } => {
            "check the network; set HTTPS_PROXY for a proxy, SSL_CERT_FILE for a private CA, III_INSECURE_REGISTRIES for a registry without TLS".into()
        }
        _ => return None,
    })
}

/// The remedy for a failed pull.
fn pull_hint(error: &ImageError) -> Option<String> {
    let ImageError::Pull { source, .. } = error else {
        return None;
    };
    Some(match &**source {
        ImageError::Registry(error) | ImageError::Layout(LayoutError::Registry(error)) => {
            registry_hint(error)?
        }
        ImageError::Layout(LayoutError::Platform { .. }) => {
            "choose another platform with --platform of `iii image pull`".into()
        }
        ImageError::Layer { source, .. } if source.passed().is_none() => {
            "complete layers are kept; run the command again to continue".into()
        }
        _ => return None,
    })
}

fn managed_hint(error: &ManagedError) -> Option<String> {
    Some(match error {
        ManagedError::Unknown { .. } => {
            "`iii worker list` prints the workers; add a project by its path, as in: iii worker add ./my-project".into()
        }
        ManagedError::Moved { name, .. } => format!(
            "add it from its new path: iii worker add PATH; or remove it: iii worker remove {name}"
        ),
        ManagedError::Twice { .. } => "set a different `name` in one iii.worker.yaml".into(),
        ManagedError::NotLocal { .. } | ManagedError::Elsewhere { .. } => {
            "set a different `name` in its iii.worker.yaml, or remove the other worker first".into()
        }
        ManagedError::NotStarted { name } | ManagedError::Speechless { name } => {
            format!("`iii worker logs {name}` prints its output")
        }
        ManagedError::EngineGone { .. } => "unset it to run the worker without the engine".into(),
        _ => return None,
    })
}

fn snapshot_hint(error: &SnapshotError) -> Option<String> {
    Some(match error {
        SnapshotError::Exists { .. } => {
            "choose another tag, or replace the snapshot with --force".into()
        }
        SnapshotError::Unknown { name, have, .. } if have.is_empty() => {
            format!("it has no snapshot; to take one: iii worker snapshot {name}")
        }
        SnapshotError::Unknown { have, .. } => {
            let mut listed = have
                .iter()
                .take(MAX_LISTED)
                .map(String::as_str)
                .collect::<Vec<_>>()
                .join(", ");
            if have.len() > MAX_LISTED {
                listed.push_str(", …");
            }
            format!("it has {listed}")
        }
        SnapshotError::NeverRun { name } => format!("start it once: iii worker start {name}"),
        SnapshotError::Taken { .. } => "choose another name, or remove that worker first".into(),
        SnapshotError::InVm { name } => {
            format!("stop it first; a managed worker with: iii worker stop {name}")
        }
        SnapshotError::Freeze {
            source: FreezeError::Restless,
            ..
        } => "take it when the worker writes less, or stop the worker first".into(),
        SnapshotError::Open {
            source: OpenError::Upper(UpperError::Chain { .. } | UpperError::Thawed { .. }),
            name,
        } => drop_hint(name),
        _ => return None,
    })
}

fn drop_hint(name: &str) -> String {
    format!(
        "to drop its files and keep its layers: iii worker dev --fresh, or for a managed worker: iii worker clear {name}"
    )
}

#[cfg(target_os = "linux")]
fn serve_hint(error: &ServeError) -> Option<String> {
    Some(match error {
        ServeError::VhostUser(VhostUserError::InUse(_)) => {
            "stop that process, or choose another --socket".into()
        }
        ServeError::VhostUser(VhostUserError::NotASocket(_)) => "choose another --socket".into(),
        ServeError::Upper { .. } | ServeError::Compose(OpenError::Upper(_)) => {
            "choose another --upper, or leave it out for a fresh one".into()
        }
        _ => return None,
    })
}

impl CliError {
    /// Prints the error, its causes and the hint.
    pub fn report(&self, ui: &Ui) {
        ui.error(with_causes(self));
        if let Self::Run(RunError::Build(BuildError::Step { kind, tail, .. })) = self {
            ui.note(format_args!("the last lines of {kind}:"));
            for line in tail {
                ui.output_line(&kind.to_string(), line.as_bytes());
            }
        }
        if let Some(hint) = self.hint() {
            ui.note(&hint);
        }
    }

    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Run(RunError::NoBase { name, source }) => {
                let import = format!(
                    "without a registry: export the image from a container engine, or make one with `scripts/make-base`, then: iii image import PATH --as {name}"
                );
                match limit_hint(source, false).or_else(|| pull_hint(source)) {
                    Some(hint) => format!("{hint}\n{import}"),
                    None => import,
                }
            }
            Self::Image(error @ (ImageError::Pull { .. } | ImageError::Import { .. })) => {
                limit_hint(error, true).or_else(|| pull_hint(error))?
            }
            Self::NoImage { name } | Self::Run(RunError::BaseNotStored { name }) => format!("`iii image list` prints the images; to pull it: iii image pull {name}"),
            Self::Run(RunError::Build(BuildError::Step { .. })) => {
                "nothing of this step was kept; correct the script or the project and run again".into()
            }
            Self::Run(RunError::Busy { .. }) => "stop that process, or choose another --name".into(),
            Self::Run(RunError::Taken { .. }) => {
                "choose another --name, or take the sandbox over with --fresh, which drops its files".into()
            }
            Self::Run(RunError::Compose {
                source:
                    OpenError::Upper(
                        UpperError::Chain { .. }
                        | UpperError::Thawed { .. }
                        | UpperError::NotAnUpper(_)
                        | UpperError::Damaged { .. }
                        | UpperError::TooLarge { .. },
                    ),
                name,
            }) => drop_hint(name),
            Self::Run(RunError::NeverRun { .. }) => {
                "only a project that `iii worker dev` has run has a name; give the project's path instead, as in: iii worker export ./my-project".into()
            }
            Self::Run(RunError::Outdated { project, .. }) => format!(
                "to build and export the present project: iii worker export {}",
                project.display()
            ),
            Self::Export { source: ExportError::Registry(error), .. } => registry_hint(error)?,
            Self::Export { source: ExportError::NotALayout { .. }, .. } => {
                "name a directory that does not exist; it will be created".into()
            }
            Self::Run(RunError::NoLibkrun) => "use --runtime namespace, or auto".into(),
            Self::Run(RunError::Exec(ExecError::NotRunning { .. })) => {
                "name a running worker: a managed one, or one of `worker dev`, which is called iii-dev-<directory> by default".into()
            }
            Self::Run(RunError::NoKvm { why }) if HAS_NAMESPACES => {
                format!("{}; or use --runtime namespace", why.advice())
            }
            Self::Run(RunError::NoKvm { why }) => why.advice().into(),
            Self::Run(RunError::Memory { .. }) if HAS_NAMESPACES => {
                "lower resources.memory, or use --runtime namespace, which does not limit memory".into()
            }
            Self::Run(RunError::Memory { .. }) => "lower resources.memory".into(),
            Self::NeedsYes { .. } => "confirm with -y".into(),
            Self::Managed(error) => managed_hint(error)?,
            Self::Snapshot(error) => snapshot_hint(error)?,
            Self::NotALayer { .. } | Self::NoLayer { .. } | Self::NothingCalled { .. } => "`iii store list` prints the layers, `iii store df` the workers and images".into(),
            Self::Ambiguous { .. } => "give more digits of the id".into(),
            _ if self.store().is_some_and(is_damage) => {
                "`iii store verify` lists the damage; --repair moves it aside, so that it is built again".into()
            }
            #[cfg(target_os = "linux")]
            Self::Serve(error) => serve_hint(error)?,
            Self::Run(RunError::Sandbox(error) | RunError::Build(BuildError::Sandbox { source: error, .. })) => error.hint()?,
            _ => return None,
        })
    }

    /// The failure of the store behind this error, if any.
    fn store(&self) -> Option<&StoreError> {
        match self {
            Self::Store(error)
            | Self::Export {
                source: ExportError::Store(error),
                ..
            }
            | Self::Image(ImageError::Store(error))
            | Self::Run(
                RunError::Store(error)
                | RunError::Image(ImageError::Store(error))
                | RunError::Build(BuildError::Store(error)),
            ) => Some(error),
            #[cfg(target_os = "linux")]
            Self::Serve(ServeError::Store(error)) => Some(error),
            _ => None,
        }
    }

    /// The exit code for the shell.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Run(RunError::Build(BuildError::Interrupted { signal, .. })) => {
                128 + signal.as_raw() as u8
            }
            Self::Run(RunError::Sandbox(error)) => SandboxError::exit_code(error),
            Self::Run(RunError::Exec(ExecError::Refused { code, .. })) => *code,
            // As timeout(1) has it.
            Self::Run(RunError::Exec(ExecError::Timeout { .. })) => 124,
            _ => 1,
        })
    }
}
