//! What people are told when something fails, and the exit code that scripts get.
//!
//! | code | meaning |
//! |---|---|
//! | 0 | done; or a worker ended because it was asked to |
//! | 1 | failed |
//! | 2 | the command line makes no sense |
//! | 125, 126, 127 | the start command could not be run: the sandbox failed, not executable, not found |
//! | 128 + n | interrupted by signal n before the worker ran |
//! | any other | what the worker exited with (128 + n where a signal n killed it) |

use std::error::Error;
use std::io;
use std::process::ExitCode;

use crate::build::BuildError;
use crate::dev::DevError;
use crate::home::HomeError;
use crate::oci::ImageError;
use crate::sandbox::SandboxError;
use crate::ui::Ui;
use iii_store::StoreError;

/// Anything that ends a command.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    #[error(transparent)]
    Dev(#[from] DevError),
    #[error(transparent)]
    Home(#[from] HomeError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("cannot write to standard output")]
    Output(#[source] io::Error),
    #[error("cannot take over signals")]
    Signals(#[source] io::Error),
}

impl CliError {
    /// Says what failed, why, and what to do.
    pub fn report(&self, ui: &Ui) {
        let mut text = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        ui.error(&text);
        if let Self::Dev(DevError::Build(BuildError::Step { kind, tail, .. })) = self {
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
            Self::Dev(DevError::NoBase { name }) => format!(
                "make one with `scripts/make-base`, or export it from a container engine, then: iii image import PATH --as {name}"
            ),
            Self::Dev(DevError::Build(BuildError::Step { .. })) => {
                "nothing of this step was kept; mend the script or the project and run again".into()
            }
            Self::Dev(DevError::Busy { .. }) => "stop that process, or give this one another --name".into(),
            Self::Dev(DevError::Taken { .. }) => {
                "give this one another --name, or take the sandbox over with --fresh, which drops what it wrote".into()
            }
            Self::Dev(DevError::NoLibkrun) => "use --runtime namespace, or auto".into(),
            Self::Dev(DevError::Sandbox(error) | DevError::Build(BuildError::Sandbox { source: error, .. })) => error.hint()?,
            _ => return None,
        })
    }

    /// What the shell gets.
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::Dev(DevError::Build(BuildError::Interrupted { signal, .. })) => {
                128 + signal.as_raw() as u8
            }
            Self::Dev(DevError::Sandbox(error)) => SandboxError::exit_code(error),
            _ => 1,
        })
    }
}
