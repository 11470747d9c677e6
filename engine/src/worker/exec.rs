//! One more command in a sandbox that runs: `worker exec`.
//!
//! The process that runs the sandbox listens at `exec.sock` in the sandbox's directory (elsewhere than on Linux at a shorter name), for its
//! own user alone. Whoever connects sends a command with its streams, then signals and sizes of its terminal, and is told how it
//! ended. When it goes, the command is killed. Instead of a command, a snapshot can be asked for.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, IsTerminal as _, PipeReader, PipeWriter};
use std::net::Shutdown;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use iii_init::packet::Socket;
use iii_sandbox::{Command, CommandController, Controller, RemoteError, SandboxError, Size};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, Uid};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use serde::{Deserialize, Serialize};

use crate::worker::snapshot::{Keeper, SnapshotError, Taken, Taking};

/// The socket's name.
#[cfg(target_os = "linux")]
const SOCKET: &str = "exec.sock";
/// Time before who could not be accepted is tried again.
const PAUSE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

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
        /// What was tried.
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

/// What to run. What is not given is the worker's.
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

/// Serves a sandbox's socket until it is dropped.
pub struct Serving {
    path: PathBuf,
    /// Ends with this the thread that accepts.
    _end: PipeWriter,
    worker: Arc<Mutex<Command>>,
    snapshots: Taking,
}

/// Runs what comes to the socket in `dir` by way of `controller`, like `worker` where nothing else is asked, and takes `snapshots`.
pub fn serve(
    dir: &Path,
    controller: Controller,
    worker: Command,
    snapshots: Taking,
) -> Result<Serving, ExecError> {
    let path = socket_of(dir);
    // The lock of the sandbox is held: whoever made it is gone.
    let _ = fs::remove_file(&path);
    let listener = at_address(dir, |path| {
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    let listener = listener.map_err(at("listen for commands"))?;
    let (ended, end) = io::pipe().map_err(at("make a pipe"))?;
    let worker = Arc::new(Mutex::new(worker));
    let like = Arc::clone(&worker);
    let taking = snapshots.clone();
    let accept = move || {
        while let Some(client) = accept(&listener, &ended) {
            let worker = like.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let (controller, snapshots) = (controller.clone(), taking.clone());
            let attend = move || attend(&client, &controller, worker, &snapshots);
            let _ = thread::Builder::new().name("exec".into()).spawn(attend);
        }
    };
    let thread = thread::Builder::new().name("exec".into()).spawn(accept);
    thread.map_err(at("start a thread"))?;
    Ok(Serving {
        path,
        _end: end,
        worker,
        snapshots,
    })
}

impl Serving {
    /// What is run from now on is like `worker` where nothing else is asked.
    pub fn follow(&self, worker: Command) {
        *self.worker.lock().unwrap_or_else(PoisonError::into_inner) = worker;
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
        self.snapshots.end();
    }
}

/// The next client that may ask for anything; `None` once it is over.
fn accept(listener: &UnixListener, ended: &PipeReader) -> Option<Socket> {
    loop {
        let mut fds = [
            PollFd::new(listener, PollFlags::IN),
            PollFd::new(ended, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return None,
            Ok(_) => {}
        }
        let [_, end] = fds;
        if !end.revents().is_empty() {
            return None;
        }
        match listener.accept() {
            Ok((client, _)) if may_ask(&client) && client.set_nonblocking(false).is_ok() => {
                return Some(client.into());
            }
            Ok(_) => {}
            // It has gone again.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // No descriptor is left, say. The client waits meanwhile.
            Err(_) => {
                let _ = poll(&mut [PollFd::new(ended, PollFlags::IN)], Some(&PAUSE));
            }
        }
    }
}

/// Whether it is this user's, or root's.
fn may_ask(client: &UnixStream) -> bool {
    let me = rustix::process::geteuid();
    peer(client).is_ok_and(|user| user == me || user.is_root())
}

#[cfg(target_os = "linux")]
fn peer(client: &UnixStream) -> io::Result<Uid> {
    Ok(rustix::net::sockopt::socket_peercred(client)?.uid)
}

/// Compiled, and not run yet.
#[cfg(target_os = "macos")]
fn peer(client: &UnixStream) -> io::Result<Uid> {
    let (mut user, mut group) = (0, 0);
    // SAFETY: the descriptor is a socket for as long as the call takes, which writes to both.
    let done = unsafe { libc::getpeereid(client.as_raw_fd(), &raw mut user, &raw mut group) };
    if done == -1 {
        return Err(io::Error::last_os_error());
    }
    Ok(Uid::from_raw(user))
}

fn attend(client: &Socket, controller: &Controller, worker: Command, snapshots: &Taking) {
    let answer = match client.recv() {
        Ok(Some((FromClient::Run(asked), fds))) => {
            match run(client, controller, merged(worker, asked), fds) {
                Ok(status) => ToClient::Exited(status.into_raw()),
                Err(SandboxError::Killed) => ToClient::Ended,
                Err(error) => ToClient::Refused(RemoteError::new(&error), error.exit_code()),
            }
        }
        Ok(Some((FromClient::Snapshot(keeper), _))) => match snapshots.take(&keeper) {
            Ok(taken) => ToClient::Taken(taken),
            Err(SnapshotError::InVm { .. }) => ToClient::NotTaken(NotTaken::InVm),
            Err(SnapshotError::Exists { tag, .. }) => ToClient::NotTaken(NotTaken::Exists(tag)),
            Err(error) => ToClient::NotTaken(NotTaken::Failed(RemoteError::new(&error))),
        },
        _ => return,
    };
    // Where nobody is there any more, nobody wants to know.
    let _ = client.send(&answer, &[]);
}

/// The command that was asked for, as the worker's would be.
fn merged(mut command: Command, asked: Asked) -> Command {
    for (name, value) in asked.env {
        command.env.retain(|(known, _)| *known != name);
        command.env.push((name, value));
    }
    Command {
        argv: asked.argv,
        cwd: asked.cwd.unwrap_or(command.cwd),
        terminal: asked.terminal,
        ..command
    }
}

fn run(
    client: &Socket,
    controller: &Controller,
    command: Command,
    fds: Vec<OwnedFd>,
) -> Result<ExitStatus, SandboxError> {
    let started = controller.run(command, fds)?;
    let controller = started.controller();
    thread::scope(|scope| {
        scope.spawn(|| heed(client, &controller));
        let status = started.wait();
        // Only what is to be read: the answer is still to be written.
        let _ = client.shutdown(Shutdown::Read);
        status
    })
}

/// Does with the command what its client says, until it says no more.
fn heed(client: &Socket, command: &CommandController) {
    loop {
        let done = match client.recv() {
            Ok(Some((FromClient::Signal(signal), _))) => {
                Signal::from_named_raw(signal).map_or(Ok(()), |signal| command.signal(signal))
            }
            Ok(Some((FromClient::Resize(size), _))) => command.resize(size),
            Ok(Some((FromClient::Run(_) | FromClient::Snapshot(_), _))) => Ok(()),
            Ok(None) | Err(_) => {
                let _ = command.signal(Signal::KILL);
                return;
            }
        };
        if done.is_err() {
            return;
        }
    }
}

/// Runs a command in the sandbox `name`, whose directory is `dir`, on this process's streams.
pub fn exec(
    dir: &Path,
    name: &str,
    asked: Asked,
    timeout: Option<Duration>,
) -> Result<ExitStatus, ExecError> {
    let server = Arc::new(connected(dir, name)?);
    let answer = if asked.terminal.is_some() {
        in_terminal(&server, asked, timeout)
    } else {
        on_streams(&server, asked, timeout)
    };
    match answer? {
        ToClient::Exited(status) => Ok(ExitStatus::from_raw(status)),
        ToClient::Refused(source, code) => Err(ExecError::Refused { source, code }),
        _ => Err(ExecError::Ended),
    }
}

/// Asks whoever runs the sandbox `name`, whose directory is `dir`, to freeze what it wrote.
pub(crate) fn ask_for_snapshot(
    dir: &Path,
    name: &str,
    keeper: Keeper,
) -> Result<Result<Taken, SnapshotError>, ExecError> {
    let server = connected(dir, name)?;
    server
        .send(&FromClient::Snapshot(keeper), &[])
        .map_err(at("ask for the snapshot"))?;
    let name = name.to_owned();
    Ok(match answer(&server, None)? {
        ToClient::Taken(taken) => Ok(taken),
        ToClient::NotTaken(NotTaken::InVm) => Err(SnapshotError::InVm { name }),
        ToClient::NotTaken(NotTaken::Exists(tag)) => Err(SnapshotError::Exists { name, tag }),
        ToClient::NotTaken(NotTaken::Failed(source)) => Err(SnapshotError::Remote { name, source }),
        _ => return Err(ExecError::Ended),
    })
}

/// A connection to whoever runs the sandbox `name`, whose directory is `dir`.
fn connected(dir: &Path, name: &str) -> Result<Socket, ExecError> {
    let server = at_address(dir, |path| UnixStream::connect(path));
    server
        .map(Socket::from)
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ExecError::NotRunning {
                name: name.to_owned(),
            },
            _ => at("connect to who runs the sandbox")(error),
        })
}

/// The size of the terminal that this process runs in; `None` if its input and output are none.
pub fn terminal() -> Option<Size> {
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
    server: &Socket,
    asked: Asked,
    timeout: Option<Duration>,
) -> Result<ToClient, ExecError> {
    // Not our own: whoever reads it over there must not go on when we have ended.
    let (reader, writer) = io::pipe().map_err(at("make a pipe"))?;
    let fds = [
        reader.as_fd(),
        rustix::stdio::stdout(),
        rustix::stdio::stderr(),
    ];
    server
        .send(&FromClient::Run(asked), &fds)
        .map_err(at("ask for the command"))?;
    drop(reader);
    let stdin = rustix::stdio::stdin().try_clone_to_owned();
    copy(stdin.map_err(at("read standard input"))?, writer.into())?;
    answer(server, timeout)
}

fn in_terminal(
    server: &Arc<Socket>,
    asked: Asked,
    timeout: Option<Duration>,
) -> Result<ToClient, ExecError> {
    let (ours, theirs) = UnixStream::pair().map_err(at("make a socket"))?;
    server
        .send(&FromClient::Run(asked), &[theirs.as_fd()])
        .map_err(at("ask for the command"))?;
    drop(theirs);
    let raw = Raw::enter().map_err(at("set up the terminal"))?;
    let ours = OwnedFd::from(ours);
    let to = ours.try_clone().map_err(at("make a socket"))?;
    let stdin = rustix::stdio::stdin().try_clone_to_owned();
    copy(stdin.map_err(at("read standard input"))?, to)?;
    let stdout = rustix::stdio::stdout().try_clone_to_owned();
    let output = copy(ours, stdout.map_err(at("write to standard output"))?)?;
    let resized = Arc::clone(server);
    let mut changes = signal_hook::iterator::Signals::new([signal_hook::consts::SIGWINCH])
        .map_err(at("watch the terminal"))?;
    let follow = move || {
        for _ in changes.forever() {
            let told = terminal().map(FromClient::Resize);
            if told.is_some_and(|told| resized.send(&told, &[]).is_err()) {
                return;
            }
        }
    };
    let thread = thread::Builder::new().name("terminal".into()).spawn(follow);
    thread.map_err(at("start a thread"))?;
    let answer = answer(server, timeout);
    if answer.is_ok() {
        let _ = output.join();
    }
    drop(raw);
    answer
}

/// What becomes of the command, within `timeout`.
fn answer(server: &Socket, timeout: Option<Duration>) -> Result<ToClient, ExecError> {
    let limit = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
    loop {
        let mut fds = [PollFd::new(server, PollFlags::IN)];
        match (poll(&mut fds, limit.as_ref()), timeout) {
            (Ok(0), Some(limit)) => {
                let kill = FromClient::Signal(Signal::KILL.as_raw());
                server.send(&kill, &[]).map_err(at("end the command"))?;
                return Err(ExecError::Timeout { limit });
            }
            (Err(rustix::io::Errno::INTR), _) => {}
            (Err(error), _) => return Err(at("wait for the command")(error)),
            (Ok(_), _) => break,
        }
    }
    match server.recv().map_err(at("hear of the command"))? {
        Some((answer, _)) => Ok(answer),
        None => Err(ExecError::Ended),
    }
}

/// This process's terminal, handing on what is typed as it is typed, until it is dropped.
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

/// Where the socket of the sandbox in `dir` is.
#[cfg(target_os = "linux")]
fn socket_of(dir: &Path) -> PathBuf {
    dir.join(SOCKET)
}

/// Calls with the path of the socket of the sandbox in `dir`, by a name that is short: an address has room for 108 bytes.
#[cfg(target_os = "linux")]
fn at_address<T>(dir: &Path, call: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    use rustix::fs::{Mode, OFlags};

    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(dir, flags, Mode::empty())?;
    call(format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd()).as_ref())
}

/// Where the socket of the sandbox in `dir`, which is `~/.iii/dev/<name>` or the like, is. An address has room for 104 bytes, and a
/// directory has no other name, so it is one of a fixed length in `~/.iii`.
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
