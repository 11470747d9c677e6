//! What people are told when something fails, and the exit code that scripts get.
//!
//! | code | meaning |
//! |---|---|
//! | 0 | done; or a worker ended because it was asked to |
//! | 1 | failed; of `store verify`: something is damaged |
//! | 2 | the command line makes no sense |
//! | 125, 126, 127 | the start command could not be run: the sandbox failed, not executable, not found |
//! | 128 + n | interrupted by signal n before the worker ran |
//! | any other | what the worker exited with (128 + n where a signal n killed it) |

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use crate::output::Ui;
use iii_engine::build::BuildError;
pub use iii_engine::build::with_causes;
use iii_engine::home::HomeError;
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
use iii_store::{LayerId, StoreError};

use super::limits::{self, LimitError};
use super::store::MIN_PREFIX;

/// Anything that ends a command.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    #[error(transparent)]
    Run(#[from] RunError),
    #[error(transparent)]
    Home(#[from] HomeError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[cfg(target_os = "linux")]
    #[error(transparent)]
    Serve(#[from] ServeError),
    #[error(
        "{text:?} names no layer: that takes the first hex digits of its id, at least {MIN_PREFIX}"
    )]
    NotALayer { text: String },
    #[error("there is no layer, worker or image called {text:?}")]
    NothingCalled { text: String },
    #[error("there is no layer whose id begins with {text}")]
    NoLayer { text: String },
    #[error("the ids of {} layers begin with {text}: {}", found.len(), listed(text, found))]
    Ambiguous { text: String, found: Vec<LayerId> },
    #[error("there is no image called {name} in the store")]
    NoImage { name: String },
    #[error("the variable {} makes no sense", limits::VARIABLE)]
    Limits(#[source] LimitError),
    #[error("exporting to {to} failed")]
    Export { to: String, source: ExportError },
    #[error("the variable SOURCE_DATE_EPOCH has {text:?}, which is not a number of seconds")]
    SourceDateEpoch { text: String },
    #[error(transparent)]
    Managed(ManagedError),
    #[error(transparent)]
    Snapshot(SnapshotError),
    #[error(transparent)]
    Scaffold(#[from] ScaffoldError),
    #[error("{what}; nothing was done")]
    NeedsYes { what: String },
    #[error("III_LIFELINE_FD has {text:?}, which is no open file descriptor")]
    Lifeline { text: String },
    #[error("cannot read the log of {name}")]
    Log { name: String, source: io::Error },
    #[error("there is no command {name}")]
    NoCommand { name: String },
    #[error("cannot write manual pages into {}", dir.display())]
    Pages { dir: PathBuf, source: io::Error },
    #[error("the working directory is gone")]
    Here(#[source] io::Error),
    #[error("cannot write to standard output")]
    Output(#[source] io::Error),
    #[error("cannot take over signals")]
    Signals(#[source] io::Error),
    #[error("III_RUNTIME is {text:?}, which is none of auto, namespace and libkrun")]
    RuntimeVariable { text: String },
    #[error("the variable {variable} is of no use")]
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

/// Ids cut to where they differ, as a rule.
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

/// How to have more of something, where that is what is wrong with an image.
fn limit_hint(error: &ImageError, has_flag: bool) -> Option<String> {
    if is_beyond_the_store(error) {
        return Some("this limit is the store's own and cannot be raised".into());
    }
    let passed = error.passed()?;
    let limit = passed.limit?;
    if passed.value >= limit.most() {
        return Some(format!("{limit} cannot be raised any further"));
    }
    let raised = limits::raised(limit, passed.value);
    let variable = limits::VARIABLE;
    Some(if has_flag {
        format!("if it is to be trusted with more, raise the limit: --limit {raised}")
    } else {
        format!("if it is to be trusted with more, raise the limit: {variable}={raised}")
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

/// What may help where a registry does not do what it was asked for.
pub fn registry_hint(error: &RegistryError) -> Option<String> {
    let login = |host: &str| format!("`docker login {host}` or `podman login {host}`");
    Some(match error {
        RegistryError::Unauthorized { host, .. } => format!(
            "log in with {}, and see whether the name is right: many registries refuse what they do not have",
            login(host)
        ),
        RegistryError::NotAllowed { host, .. } => format!(
            "log in with {} as somebody who may push there, and see whether the name is right: many registries take only names that begin with the user's",
            login(host)
        ),
        RegistryError::NotFound { .. } => "see whether the name and the tag are right".into(),
        RegistryError::Http { .. } => {
            "see whether the registry can be reached from here; a proxy: HTTPS_PROXY; a private CA: SSL_CERT_FILE; a registry without TLS: III_INSECURE_REGISTRIES".into()
        }
        _ => return None,
    })
}

/// What may help where an image cannot be pulled.
fn pull_hint(error: &ImageError) -> Option<String> {
    let ImageError::Pull { source, .. } = error else {
        return None;
    };
    Some(match &**source {
        ImageError::Registry(error) | ImageError::Layout(LayoutError::Registry(error)) => {
            registry_hint(error)?
        }
        ImageError::Layout(LayoutError::Platform { .. }) => {
            "another platform: --platform, of `iii image pull`".into()
        }
        ImageError::Layer { source, .. } if source.passed().is_none() => {
            "layers that were whole are kept; run it again to go on".into()
        }
        _ => return None,
    })
}

fn managed_hint(error: &ManagedError) -> Option<String> {
    Some(match error {
        ManagedError::Unknown { .. } => {
            "`iii worker list` shows the workers; a project is added by its path, as in: iii worker add ./my-project".into()
        }
        ManagedError::Moved { name, .. } => format!(
            "add it from where it is now: iii worker add PATH; or forget it: iii worker remove {name}"
        ),
        ManagedError::Twice { .. } => "give one of them another `name` in its iii.worker.yaml".into(),
        ManagedError::NotLocal { .. } | ManagedError::Elsewhere { .. } => {
            "give this one another `name` in its iii.worker.yaml, or remove that one first".into()
        }
        ManagedError::NotStarted { name } | ManagedError::Speechless { name } => {
            format!("`iii worker logs {name}` shows what was said")
        }
        ManagedError::EngineGone { .. } => "unset it to run the worker without the engine".into(),
        _ => return None,
    })
}

fn snapshot_hint(error: &SnapshotError) -> Option<String> {
    Some(match error {
        SnapshotError::Exists { .. } => {
            "give it another tag; --force takes it in place of that one".into()
        }
        SnapshotError::Unknown { name, have, .. } if have.is_empty() => {
            format!("it has none; to take one: iii worker snapshot {name}")
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
        SnapshotError::Taken { .. } => {
            "give the new one another name, or remove that one first".into()
        }
        SnapshotError::InVm { name } => {
            format!("stop it first; a managed worker with: iii worker stop {name}")
        }
        SnapshotError::Freeze {
            source: FreezeError::Restless,
            ..
        } => "take it when the worker writes less, or stop it first".into(),
        SnapshotError::Open {
            source: OpenError::Upper(UpperError::Chain { .. } | UpperError::Thawed { .. }),
            name,
        } => drop_hint(name),
        _ => return None,
    })
}

fn drop_hint(name: &str) -> String {
    format!(
        "to drop what it wrote, and keep its layers: iii worker dev --fresh, or, of a managed worker: iii worker clear {name}"
    )
}

#[cfg(target_os = "linux")]
fn serve_hint(error: &ServeError) -> Option<String> {
    Some(match error {
        ServeError::VhostUser(VhostUserError::InUse(_)) => {
            "stop that process, or give this one another --socket".into()
        }
        ServeError::VhostUser(VhostUserError::NotASocket(_)) => "give another --socket".into(),
        ServeError::Upper { .. } | ServeError::Compose(OpenError::Upper(_)) => {
            "give another --upper, or none for a fresh one".into()
        }
        _ => return None,
    })
}

impl CliError {
    /// Says what failed, why, and what to do.
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
            Self::NoImage { name } => format!("`iii image list` shows what is there; to bring it in: iii image pull {name}"),
            Self::Run(RunError::Build(BuildError::Step { .. })) => {
                "nothing of this step was kept; mend the script or the project and run again".into()
            }
            Self::Run(RunError::Busy { .. }) => "stop that process, or give this one another --name".into(),
            Self::Run(RunError::Taken { .. }) => {
                "give this one another --name, or take the sandbox over with --fresh, which drops what it wrote".into()
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
                "only what `iii worker dev` has run has a name; export its project by its path, as in: iii worker export ./my-project".into()
            }
            Self::Run(RunError::Outdated { project, .. }) => format!(
                "to build and export what it is now: iii worker export {}",
                project.display()
            ),
            Self::Export { source: ExportError::Registry(error), .. } => registry_hint(error)?,
            Self::Export { source: ExportError::NotALayout { .. }, .. } => {
                "name a directory that does not exist, and it is made".into()
            }
            Self::Run(RunError::NoLibkrun) => "use --runtime namespace, or auto".into(),
            Self::Run(RunError::Exec(ExecError::NotRunning { .. })) => {
                "the name is that of a worker that runs: a managed one, or of `worker dev`, which is iii-dev-<directory> unless it was given another".into()
            }
            Self::Run(RunError::NoKvm { why }) if HAS_NAMESPACES => {
                format!("{}; or use --runtime namespace", why.advice())
            }
            Self::Run(RunError::NoKvm { why }) => why.advice().into(),
            Self::Run(RunError::Memory { .. }) if HAS_NAMESPACES => {
                "ask for less; or use --runtime namespace, which does not limit memory".into()
            }
            Self::Run(RunError::Memory { .. }) => "ask for less".into(),
            Self::NeedsYes { .. } => "-y says yes".into(),
            Self::Managed(error) => managed_hint(error)?,
            Self::Snapshot(error) => snapshot_hint(error)?,
            Self::NotALayer { .. } | Self::NoLayer { .. } | Self::NothingCalled { .. } => "`iii store list` shows the layers, `iii store df` the workers and images".into(),
            Self::Ambiguous { .. } => "give more of the id".into(),
            _ if self.store().is_some_and(is_damage) => {
                "`iii store verify` says what is damaged; with --repair it is set aside and built again".into()
            }
            #[cfg(target_os = "linux")]
            Self::Serve(error) => serve_hint(error)?,
            Self::Run(RunError::Sandbox(error) | RunError::Build(BuildError::Sandbox { source: error, .. })) => error.hint()?,
            _ => return None,
        })
    }

    /// The failure of the store behind this one, if there is one.
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

    /// What the shell gets.
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
