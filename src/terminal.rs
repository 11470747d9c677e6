//! Commands in the sandbox of a worker, on the streams or the terminal of this process.

use std::fs::File;
use std::io::{self, IsTerminal as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitStatus;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use iii_engine::worker::control::{Asked, Client, ExecError};
use iii_sandbox::Size;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

fn at<E: Into<io::Error>>(operation: &'static str) -> impl FnOnce(E) -> ExecError {
    move |error| ExecError::Io {
        operation,
        source: error.into(),
    }
}

/// Runs a command in the sandbox `name`, whose directory is `dir`, on this process's streams.
pub fn exec(
    dir: &Path,
    name: &str,
    asked: Asked,
    timeout: Option<Duration>,
) -> Result<ExitStatus, ExecError> {
    let client = Client::connect(dir, name)?;
    if asked.terminal.is_some() {
        in_terminal(client, asked, timeout)
    } else {
        on_streams(client, asked, timeout)
    }
}

/// The size of the terminal that this process runs in; `None` if its input and output are none.
pub fn size() -> Option<Size> {
    if !(io::stdin().is_terminal() && io::stdout().is_terminal()) {
        return None;
    }
    let size = tcgetwinsize(rustix::stdio::stdout()).ok()?;
    Some(Size {
        rows: size.ws_row,
        columns: size.ws_col,
    })
}

fn on_streams(
    client: Client,
    asked: Asked,
    timeout: Option<Duration>,
) -> Result<ExitStatus, ExecError> {
    // Not our own: the command must not go on reading it when this process has ended.
    let (reader, writer) = io::pipe().map_err(at("make a pipe"))?;
    let fds = [
        reader.as_fd(),
        rustix::stdio::stdout(),
        rustix::stdio::stderr(),
    ];
    let command = client.run(asked, &fds)?;
    drop(reader);
    let stdin = rustix::stdio::stdin().try_clone_to_owned();
    copy(stdin.map_err(at("read standard input"))?, writer.into())?;
    command.wait(timeout)
}

fn in_terminal(
    client: Client,
    asked: Asked,
    timeout: Option<Duration>,
) -> Result<ExitStatus, ExecError> {
    let (ours, theirs) = UnixStream::pair().map_err(at("make a socket"))?;
    let command = Arc::new(client.run(asked, &[theirs.as_fd()])?);
    drop(theirs);
    let raw = Raw::enter().map_err(at("set up the terminal"))?;
    let ours = OwnedFd::from(ours);
    let to = ours.try_clone().map_err(at("make a socket"))?;
    let stdin = rustix::stdio::stdin().try_clone_to_owned();
    copy(stdin.map_err(at("read standard input"))?, to)?;
    let stdout = rustix::stdio::stdout().try_clone_to_owned();
    let output = copy(ours, stdout.map_err(at("write to standard output"))?)?;
    let resized = Arc::clone(&command);
    let mut changes = signal_hook::iterator::Signals::new([signal_hook::consts::SIGWINCH])
        .map_err(at("watch the terminal"))?;
    let follow = move || {
        for _ in changes.forever() {
            if size().is_some_and(|size| resized.resize(size).is_err()) {
                return;
            }
        }
    };
    let thread = thread::Builder::new().name("terminal".into()).spawn(follow);
    thread.map_err(at("start a thread"))?;
    let ended = command.wait(timeout);
    if ended.is_ok() || matches!(ended, Err(ExecError::Refused { .. } | ExecError::Ended)) {
        let _ = output.join();
    }
    drop(raw);
    ended
}

/// The terminal of this process, which hands on each key as it is pressed, until this is dropped.
struct Raw(Termios);

impl Raw {
    fn enter() -> rustix::io::Result<Self> {
        let before = tcgetattr(rustix::stdio::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Drain, &self.0);
    }
}

fn copy(from: OwnedFd, to: OwnedFd) -> Result<JoinHandle<()>, ExecError> {
    let copy = move || {
        let _ = io::copy(&mut File::from(from), &mut File::from(to));
    };
    let thread = thread::Builder::new().name("stream".into()).spawn(copy);
    thread.map_err(at("start a thread"))
}
