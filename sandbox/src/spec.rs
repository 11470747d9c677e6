//! The command of a sandbox, its root, and its surroundings.

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use iii_init::message::Command;

use super::reach::Reach;
use super::{HostSettings, SandboxError};
use crate::process;

/// Linux's bound on a host name.
const MAX_HOSTNAME: usize = 64;

/// Everything that a sandbox is made from.
pub struct SandboxSpec {
    /// The root filesystem.
    pub root: RootSource,
    /// The command and its arguments. A name without `/` is looked up in the `PATH` of
    /// [`env`](Self::env).
    pub argv: Vec<OsString>,
    /// The command's whole environment. Added where absent: `HOME` of the user, and the variables
    /// that point at [`CA_BUNDLE`](super::CA_BUNDLE) when the host has one to hand on.
    pub env: Vec<(String, String)>,
    /// Working directory, absolute. Created when missing.
    pub cwd: String,
    /// As `User` in an OCI image's config: empty for root, `name`, `uid`, `name:group`, `uid:gid`.
    /// Names are looked up inside the root.
    pub user: String,
    /// Host name; cut to the 64 bytes that Linux allows.
    pub hostname: String,
    /// Host directories or files that are visible inside, in mount order.
    pub mounts: Vec<BindMount>,
    /// Where the command's standard streams lead.
    pub stdio: Stdio,
    /// The host's network settings that are visible inside.
    pub host: HostSettings,
    /// Ports of the host's loopback that a microVM may reach, besides name servers and proxies.
    /// Namespaces share the host's network and reach everything.
    pub reach: Reach,
    /// The program whose `main` calls [`run_init`](super::run_init).
    pub init: PathBuf,
}

impl SandboxSpec {
    /// A spec that runs `argv` as root in `/workspace`, with an empty environment, inherited
    /// streams, and this very program as the init.
    pub fn new(
        root: RootSource,
        argv: impl IntoIterator<Item = impl Into<OsString>>,
        host: HostSettings,
    ) -> Self {
        Self {
            root,
            argv: argv.into_iter().map(Into::into).collect(),
            env: Vec::new(),
            cwd: "/workspace".into(),
            user: String::new(),
            hostname: "iii".into(),
            mounts: Vec::new(),
            stdio: Stdio::Inherit,
            host,
            reach: Reach::default(),
            init: process::this_program(),
        }
    }

    /// The command, with the host's part of its environment.
    pub fn command(&self) -> Command {
        let mut env = self.env.clone();
        self.host.extend_env(&mut env);
        Command {
            argv: self.argv.clone(),
            env,
            cwd: self.cwd.clone(),
            user: self.user.clone(),
            terminal: None,
        }
    }

    /// The host name, no longer than it may be.
    pub(super) fn hostname(&self) -> String {
        let mut hostname = self.hostname.clone();
        while hostname.len() > MAX_HOSTNAME {
            hostname.pop();
        }
        hostname
    }

    pub(super) fn check(&self) -> Result<(), SandboxError> {
        if self.argv.is_empty() {
            return Err(SandboxError::Spec("the command is empty".into()));
        }
        if !self.cwd.starts_with('/') {
            let cwd = &self.cwd;
            return Err(SandboxError::Spec(format!(
                "the working directory {cwd:?} is not absolute"
            )));
        }
        for BindMount { target, .. } in &self.mounts {
            if !target.starts_with('/') || target.split('/').any(|part| part == "..") {
                return Err(SandboxError::Spec(format!(
                    "the mount target {target:?} is not an absolute path without `..`"
                )));
            }
        }
        for (name, _) in &self.env {
            if name.is_empty() || name.contains('=') {
                return Err(SandboxError::Spec(format!(
                    "{name:?} cannot be the name of an environment variable"
                )));
            }
        }
        Ok(())
    }
}

/// Where the root filesystem comes from.
pub enum RootSource {
    /// A filesystem that this process serves over FUSE.
    Fuse(Box<ServeFuse>),
    /// A directory of the host, bind-mounted writable. Its files keep their owners, so those that
    /// the sandbox's ids do not cover belong to `nobody` inside.
    Dir(PathBuf),
    /// An overlay, served by the process of the microVM that the command runs in.
    #[cfg(feature = "libkrun")]
    Machine(Box<super::Machine>),
}

/// Starts serving on a `/dev/fuse` descriptor that is mounted already; answers `INIT` before or
/// after it returns.
pub type ServeFuse = dyn FnOnce(OwnedFd) -> io::Result<Box<dyn FuseServer>> + Send;

/// A running FUSE server.
pub trait FuseServer: Send {
    /// Waits until the kernel has closed the connection, which it does once the sandbox's last
    /// process is gone and everything written has reached the server.
    fn join(self: Box<Self>) -> io::Result<()>;
}

/// A host path that is visible inside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BindMount {
    /// A directory or file that exists. Where it is writable and the tool runs as the host's root,
    /// it is given to the sandbox's root (the top only): meant for package caches, not for
    /// directories that belong to a user.
    pub host: PathBuf,
    /// Absolute path inside; created when missing.
    pub target: String,
    /// Whether the sandbox may only read it.
    pub read_only: bool,
}

/// Where the command's standard streams lead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stdio {
    /// To this process's own. The files behind them keep their owner, so a command that opens
    /// `/dev/stdout` or `/dev/stderr` by name, rather than using the stream, needs to be allowed
    /// to.
    Inherit,
    /// Standard input is empty; output and error are pipes of [`Sandbox`](super::Sandbox), which
    /// the command's user may open by name as well.
    Piped,
    /// As [`Piped`](Self::Piped), but output and error are one pipe,
    /// [`Sandbox::stdout`](super::Sandbox), so that their order is kept; in a microVM, whose
    /// streams come apart, only roughly.
    Joined,
}
