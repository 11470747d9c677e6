//! The process that runs a sandbox answers to its socket.

use std::fs;
use std::io::{self, PipeReader, PipeWriter};
use std::net::Shutdown;
#[cfg(target_os = "macos")]
use std::os::fd::AsRawFd as _;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use iii_init::packet::Socket;
use iii_sandbox::{Command, CommandController, Controller, RemoteError, SandboxError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Signal, Uid};

use super::{Asked, ExecError, FromClient, NotTaken, ToClient, at, at_address, socket_of};
use crate::worker::snapshot::{SnapshotError, Taking};

/// Time before who could not be accepted is tried again.
const PAUSE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

/// Serves a sandbox's socket until it is dropped.
pub struct Serving {
    path: PathBuf,
    /// Ends with this the thread that accepts.
    _end: PipeWriter,
    worker: Arc<Mutex<Command>>,
    snapshots: Taking,
}

/// Runs commands of clients of the socket in `dir` through `controller`, by default like `worker`,
/// and takes `snapshots`.
pub fn serve(
    dir: &Path,
    controller: Controller,
    worker: Command,
    snapshots: Taking,
) -> Result<Serving, ExecError> {
    let path = socket_of(dir);
    // The lock of the sandbox is held: the socket's maker is gone.
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
    /// Runs later commands like `worker` by default.
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
    // The client may be gone.
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
