//! One more command in a sandbox that runs: `worker exec`.
//!
//! The process that runs the sandbox listens at `exec.sock` in the sandbox's directory (elsewhere
//! than on Linux at a shorter name), for its own user alone. A client sends a command with
//! its streams, then signals and sizes of its terminal, and is told how it ended. When it goes, the
//! command is killed. Instead of a command, a snapshot can be asked for.

mod client;
mod server;

use std::ffi::OsString;
use std::io;
#[cfg(target_os = "linux")]
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use iii_sandbox::{RemoteError, Size};
use serde::{Deserialize, Serialize};

use crate::worker::snapshot::{Keeper, Taken};

pub(crate) use client::ask_for_snapshot;
pub use client::{Client, RemoteCommand};
pub use server::{Serving, serve};

/// The socket's name.
#[cfg(target_os = "linux")]
const SOCKET: &str = "exec.sock";
/// Why a command did not run in a sandbox.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// No process listens for it.
    #[error("the sandbox {name} does not run")]
    NotRunning {
        /// The sandbox.
        name: String,
    },
    /// The sandbox could not run it.
    #[error("the sandbox did not run the command")]
    Refused {
        /// Why.
        source: RemoteError,
        /// The exit code that shells and container engines give to that.
        code: u8,
    },
    /// The sandbox ended before the command did.
    #[error("the sandbox ended before the command did")]
    Ended,
    /// The command had no more time.
    #[error("the command did not end within {} s, and was killed", limit.as_secs())]
    Timeout {
        /// How long it had.
        limit: Duration,
    },
    /// A socket, a stream or a terminal of the tool's own.
    #[error("cannot {operation}")]
    Io {
        /// The operation.
        operation: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

fn at<E: Into<io::Error>>(operation: &'static str) -> impl FnOnce(E) -> ExecError {
    move |error| ExecError::Io {
        operation,
        source: error.into(),
    }
}

/// Command to run. Missing parts are the worker's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked {
    /// The program and its arguments.
    pub argv: Vec<OsString>,
    /// Variables beside the worker's, or in their place.
    pub env: Vec<(String, String)>,
    /// Working directory, absolute.
    pub cwd: Option<String>,
    /// The size of its terminal, if it is to have one.
    pub terminal: Option<Size>,
}

#[derive(Serialize, Deserialize)]
enum FromClient {
    /// With three streams, or a socket in the place of a terminal.
    Run(Asked),
    Signal(i32),
    Resize(Size),
    /// Nothing else comes with it.
    Snapshot(Keeper),
}

#[derive(Serialize, Deserialize)]
enum ToClient {
    Taken(Taken),
    NotTaken(NotTaken),
    Exited(i32),
    Refused(RemoteError, u8),
    Ended,
}

/// Why no snapshot was taken, as far as the client is to tell it apart.
#[derive(Serialize, Deserialize)]
enum NotTaken {
    InVm,
    Exists(String),
    Failed(RemoteError),
}

/// Where the socket of the sandbox in `dir` is.
#[cfg(target_os = "linux")]
fn socket_of(dir: &Path) -> PathBuf {
    dir.join(SOCKET)
}

/// Calls with the path of the socket of the sandbox in `dir`, by a name that is short: an address
/// has room for 108 bytes.
#[cfg(target_os = "linux")]
fn at_address<T>(dir: &Path, call: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    use rustix::fs::{Mode, OFlags};

    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(dir, flags, Mode::empty())?;
    call(format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd()).as_ref())
}

/// Where the socket of the sandbox in `dir`, which is `~/.iii/dev/<name>` or the like, is. An
/// address has room for 104 bytes, and a directory has no other name, so it is one of a fixed
/// length in `~/.iii`.
#[cfg(not(target_os = "linux"))]
fn socket_of(dir: &Path) -> PathBuf {
    let name = blake3::hash(dir.as_os_str().as_encoded_bytes()).to_hex();
    let home = dir.ancestors().nth(2).unwrap_or(dir);
    home.join(format!("{:.16}.sock", name.as_str()))
}

/// Calls with the path of the socket of the sandbox in `dir`.
#[cfg(not(target_os = "linux"))]
fn at_address<T>(dir: &Path, call: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    call(&socket_of(dir))
}
