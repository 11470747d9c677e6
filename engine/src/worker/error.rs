//! Why a worker does not run.

use std::io;
use std::path::{Path, PathBuf};

use iii_oci::ImageError;
use iii_overlay::OpenError;
use iii_sandbox::SandboxError;
use iii_sandbox::kvm::Unusable;
use iii_store::StoreError;

use crate::build::BuildError;
use crate::firmware::FirmwareError;
use crate::plan::Kind;
use crate::project::{DocumentError, NameError, ProjectError};
use crate::worker::control::ExecError;

/// Why a worker did not run.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "their messages say it")]
pub enum RunError {
    #[error(transparent)]
    Project(#[from] ProjectError),
    #[error(transparent)]
    Name(#[from] NameError),
    #[error(transparent)]
    Config(#[from] DocumentError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("the base image {name} is not in the store, and it cannot be had")]
    NoBase {
        name: String,
        source: Box<ImageError>,
    },
    #[error("the base image {name} is not in the store")]
    BaseNotStored { name: String },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error("the sandbox {name} is in use by process {holder}")]
    Busy { name: String, holder: String },
    #[error("the sandbox {name} belongs to the project at {}", owner.display())]
    Taken { name: String, owner: PathBuf },
    #[error("composing the root filesystem of {name} failed")]
    Compose { name: String, source: OpenError },
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    #[error("cannot {operation} {}", path.display())]
    Io {
        operation: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{kind} of {name} is the same as that of {with}, which failed")]
    AlsoFailed {
        name: String,
        with: String,
        kind: Kind,
    },
    #[error("this build of iii has no libkrun runtime")]
    NoLibkrun,
    #[error("there is no worker called {name}")]
    NeverRun { name: String },
    #[error("the project at {} is not what the worker {name} last ran from", project.display())]
    Outdated { name: String, project: PathBuf },
    #[error("libkrun cannot run a microVM here: {why}")]
    NoKvm { why: Unusable },
    #[error("{}: resources.memory: {asked} MiB are more than the {there} MiB that this machine has", manifest.display())]
    Memory {
        manifest: PathBuf,
        asked: u32,
        there: u32,
    },
    #[error(transparent)]
    Firmware(#[from] FirmwareError),
    #[error(transparent)]
    Exec(#[from] ExecError),
}

pub(crate) fn at(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RunError {
    let path = path.to_owned();
    move |source| RunError::Io {
        operation,
        path,
        source,
    }
}

impl RunError {
    /// Whether a microVM was started and its guest said nothing, so that there is no telling
    /// whether any guest runs here.
    pub(crate) fn is_silent_guest(&self) -> bool {
        match self {
            Self::Sandbox(source) | Self::Build(BuildError::Sandbox { source, .. }) => {
                matches!(source, SandboxError::Boot { .. })
            }
            _ => false,
        }
    }

    /// Whether a step was cancelled because its inputs changed.
    pub(crate) fn is_superseded(&self) -> bool {
        matches!(self, Self::Build(BuildError::Superseded { .. }))
    }
}
