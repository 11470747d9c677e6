//! In place of the namespace runtime, on systems that have no namespaces: there are no such
//! sandboxes.

use std::io::PipeReader;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use iii_init::message::Request;

use super::commands::Commands;
use super::{SandboxError, SandboxSpec, Warning};

enum Never {}

/// None.
pub(super) struct Namespace {
    never: Never,
    pub stdout: Option<PipeReader>,
    pub stderr: Option<PipeReader>,
}

impl Namespace {
    pub fn start(_: SandboxSpec) -> Result<Self, SandboxError> {
        Err(SandboxError::NoNamespaces)
    }

    pub fn pid(&self) -> u32 {
        match self.never {}
    }

    pub fn warnings(&self) -> &[Warning] {
        match self.never {}
    }

    pub fn commands(&self) -> Arc<Commands> {
        match self.never {}
    }

    pub fn link(&self) -> Link {
        match self.never {}
    }

    pub fn wait(&mut self) -> Result<ExitStatus, SandboxError> {
        match self.never {}
    }

    pub fn ends_within(&self, _: Duration) -> Result<bool, SandboxError> {
        match self.never {}
    }
}

/// To none.
#[derive(Clone)]
pub(super) struct Link;

impl Link {
    #[expect(clippy::unused_self, reason = "as of one that there is")]
    pub fn request(&self, _: Request, _: &[BorrowedFd<'_>]) -> Result<(), SandboxError> {
        Err(SandboxError::NoNamespaces)
    }
}

/// Abilities of the namespace runtime for this process.
#[derive(Debug)]
pub struct NamespaceSupport {
    /// Why no sandbox can start.
    pub blocker: Option<SandboxError>,
    /// Nothing.
    pub warnings: Vec<Warning>,
}

/// It can do nothing.
pub fn probe(_: &Path) -> NamespaceSupport {
    NamespaceSupport {
        blocker: Some(SandboxError::NoNamespaces),
        warnings: Vec::new(),
    }
}
