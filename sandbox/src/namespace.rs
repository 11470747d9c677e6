//! The namespace runtime, as the tool sees it.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, PipeReader};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::sync::Arc;
use std::time::{Duration, Instant};

use iii_init::message::{Command as SandboxCommand, MAIN, Report, Request};
use iii_init::packet::Socket;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;

use super::commands::Commands;
use super::ids::IdMaps;
use super::init::MARKER;
use super::wire::{FromInit, Mount, Plan, Root, ToInit};
use super::{FuseServer, RootSource, SandboxError, SandboxSpec, ServeFuse, Stdio, Warning};

/// A running sandbox of namespaces.
pub(super) struct Namespace {
    child: Child,
    control: Arc<Socket>,
    server: Option<Box<dyn FuseServer>>,
    status: Option<ExitStatus>,
    commands: Arc<Commands>,
    warnings: Vec<Warning>,
    /// The command's output, with [`Stdio::Piped`] or [`Stdio::Joined`]. To be read, lest the
    /// command block.
    pub stdout: Option<PipeReader>,
    /// The command's error output, with [`Stdio::Piped`]. To be read, lest the command block.
    pub stderr: Option<PipeReader>,
}

impl Namespace {
    /// Starts the command and returns once it has been executed.
    pub fn start(spec: SandboxSpec) -> Result<Self, SandboxError> {
        spec.check()?;
        let (ids, warning) = IdMaps::for_this_process();
        if let Some((uid, gid)) = ids.foreign_root() {
            give_mounts_to(uid, gid, &spec)?;
        }
        let plan = plan(&spec)?;
        let mut sandbox = match spec.stdio {
            Stdio::Inherit => {
                let streams = [
                    rustix::stdio::stdin(),
                    rustix::stdio::stdout(),
                    rustix::stdio::stderr(),
                ];
                Self::spawn(&spec.init, plan, streams)?
            }
            Stdio::Joined => {
                let null = File::open("/dev/null").map_err(host("open", "/dev/null"))?;
                let (output, end) = pipe(&ids)?;
                let streams = [null.as_fd(), end.as_fd(), end.as_fd()];
                let mut sandbox = Self::spawn(&spec.init, plan, streams)?;
                sandbox.stdout = Some(output);
                sandbox
            }
            Stdio::Piped => {
                let null = File::open("/dev/null").map_err(host("open", "/dev/null"))?;
                let (stdout, stdout_end) = pipe(&ids)?;
                let (stderr, stderr_end) = pipe(&ids)?;
                let streams = [null.as_fd(), stdout_end.as_fd(), stderr_end.as_fd()];
                let mut sandbox = Self::spawn(&spec.init, plan, streams)?;
                (sandbox.stdout, sandbox.stderr) = (Some(stdout), Some(stderr));
                sandbox
            }
        };
        sandbox.warnings.extend(warning);
        let serve = match spec.root {
            RootSource::Fuse(serve) => Some(serve),
            _ => None,
        };
        sandbox.set_up(&ids, serve)?;
        Ok(sandbox)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn warnings(&self) -> &[Warning] {
        &self.warnings
    }

    pub fn commands(&self) -> Arc<Commands> {
        Arc::clone(&self.commands)
    }

    pub fn link(&self) -> Link {
        Link(Arc::clone(&self.control))
    }

    /// Waits until the sandbox is gone: every process reaped, everything written handed to the
    /// server of its root. The command's status; SIGKILL's where the sandbox was killed as a whole.
    pub fn wait(&mut self) -> Result<ExitStatus, SandboxError> {
        if let Some(status) = self.status {
            return Ok(status);
        }
        let status = loop {
            match self.control.recv().map_err(SandboxError::Talk)? {
                Some((FromInit::Report(Report::Exited(MAIN, status)), _)) => break status,
                Some((FromInit::Report(report), _)) => self.commands.report(report),
                Some((report, _)) => return Err(unexpected(&report)),
                None => break Signal::KILL.as_raw(),
            }
        };
        self.commands.close();
        let status = ExitStatus::from_raw(status);
        self.status = Some(status);
        self.end()?;
        Ok(status)
    }

    /// Whether [`wait`](Self::wait) would not block on the command, asked for at most `timeout`.
    pub fn ends_within(&self, timeout: Duration) -> Result<bool, SandboxError> {
        let deadline = Instant::now().checked_add(timeout);
        while self.status.is_none() {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            let mut fds = [PollFd::new(&self.control, PollFlags::IN)];
            match poll(&mut fds, left.as_ref()) {
                Ok(0) => return Ok(false),
                Ok(_) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(SandboxError::Talk(error.into())),
            }
        }
        Ok(true)
    }

    fn spawn(
        program: &Path,
        plan: Plan,
        streams: [BorrowedFd<'_>; 3],
    ) -> Result<Self, SandboxError> {
        let (ours, theirs) = Socket::pair().map_err(SandboxError::Talk)?;
        // The socket rides as standard input and the streams over it, so that nothing has to lose
        // its close-on-exec flag while other threads may be spawning, too. The environment stays
        // behind: pid 1's could be read from inside.
        let child = Command::new(program)
            .arg(MARKER)
            .env_clear()
            .stdin(OwnedFd::from(theirs))
            .stdout(std::process::Stdio::null())
            .spawn()
            .map_err(|source| SandboxError::Spawn {
                program: program.to_owned(),
                source,
            })?;
        let sandbox = Self {
            child,
            control: Arc::new(ours),
            server: None,
            status: None,
            commands: Arc::default(),
            warnings: Vec::new(),
            stdout: None,
            stderr: None,
        };
        let [stdin, stdout, stderr] = streams;
        request(
            &sandbox.control,
            &ToInit::Start(Box::new(plan)),
            &[stdin, stdout, stderr],
        )?;
        Ok(sandbox)
    }

    /// Answers the init until it reports that the command runs.
    fn set_up(&mut self, ids: &IdMaps, serve: Option<Box<ServeFuse>>) -> Result<(), SandboxError> {
        let mut serve = serve;
        loop {
            let message = self.control.recv().map_err(SandboxError::Talk)?;
            let (report, mut fds) = message.ok_or(SandboxError::Killed)?;
            match report {
                FromInit::Unshared => {
                    self.warnings.extend(ids.write(self.child.id())?);
                    request(&self.control, &ToInit::MapsWritten, &[])?;
                }
                FromInit::FuseMounted => {
                    // A probe has no server and drops the descriptor.
                    if let (Some(serve), Some(fd)) = (serve.take(), fds.pop()) {
                        self.server = Some(serve(fd).map_err(SandboxError::Server)?);
                    }
                }
                FromInit::Probed | FromInit::Report(Report::Running(MAIN)) => return Ok(()),
                FromInit::Failed(failure) => return Err(failure.into()),
                FromInit::Report(_) => return Err(unexpected(&report)),
            }
        }
    }

    /// Reaps the init and lets the server come to its end, which follows from it.
    fn end(&mut self) -> Result<(), SandboxError> {
        self.child.wait().map_err(SandboxError::Talk)?;
        match self.server.take() {
            Some(server) => server.join().map_err(SandboxError::Server),
            None => Ok(()),
        }
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        self.commands.close();
        // The init takes the end of the socket for the end of the tool. Killed instead, stage 1
        // would be gone before those that it waits for. A failure would reach no process.
        let _ = self.control.shutdown(Shutdown::Both);
        let _ = self.end();
    }
}

/// Reaches the init from other threads.
#[derive(Clone)]
pub(super) struct Link(Arc<Socket>);

impl Link {
    pub fn request(&self, message: Request, fds: &[BorrowedFd<'_>]) -> Result<(), SandboxError> {
        request(&self.0, &ToInit::Request(message), fds)
    }
}

fn request(control: &Socket, request: &ToInit, fds: &[BorrowedFd<'_>]) -> Result<(), SandboxError> {
    match control.send(request, fds) {
        // The other side has ended, which the next `recv` tells.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result.map_err(SandboxError::Talk),
    }
}

/// Abilities of the namespace runtime for this process.
#[derive(Debug)]
pub struct NamespaceSupport {
    /// Why no sandbox can start; `None` if one can.
    pub blocker: Option<SandboxError>,
    /// Restrictions of the sandbox.
    pub warnings: Vec<Warning>,
    /// The host's uid and gid behind the sandbox's root; files in a [`RootSource::Dir`] that are
    /// to be root's inside belong to them.
    pub root_ids: (u32, u32),
}

/// Finds out by trying: makes the namespaces, maps the ids and mounts FUSE, as a sandbox would.
/// Takes milliseconds. `init` is as in [`SandboxSpec::init`].
pub fn probe(init: &Path) -> NamespaceSupport {
    let (ids, warning) = IdMaps::for_this_process();
    let plan = Plan {
        root: Root::Probe,
        hostname: String::new(),
        mounts: Vec::new(),
        files: Vec::new(),
        command: SandboxCommand {
            argv: Vec::new(),
            env: Vec::new(),
            cwd: String::new(),
            user: String::new(),
            terminal: None,
        },
        owns_output: false,
    };
    let mut warnings = Vec::from_iter(warning);
    let streams = [
        rustix::stdio::stdin(),
        rustix::stdio::stdout(),
        rustix::stdio::stderr(),
    ];
    let tried = Namespace::spawn(init, plan, streams).and_then(|mut sandbox| {
        sandbox.set_up(&ids, None)?;
        warnings.append(&mut sandbox.warnings);
        Ok(())
    });
    NamespaceSupport {
        blocker: tried.err(),
        warnings,
        root_ids: ids.root(),
    }
}

fn plan(spec: &SandboxSpec) -> Result<Plan, SandboxError> {
    let hostname = spec.hostname();
    Ok(Plan {
        root: match &spec.root {
            RootSource::Fuse(_) => Root::Fuse,
            RootSource::Dir(path) => Root::Dir(path.into()),
            #[cfg(feature = "libkrun")]
            RootSource::Machine(_) => {
                return Err(SandboxError::Spec("namespaces are no machine".into()));
            }
        },
        files: spec.host.files(&hostname),
        hostname,
        command: spec.command(),
        mounts: spec
            .mounts
            .iter()
            .map(|mount| Mount {
                host: OsString::from(&mount.host),
                target: mount.target.clone(),
                read_only: mount.read_only,
            })
            .collect(),
        owns_output: spec.stdio != Stdio::Inherit,
    })
}

/// A pipe whose writing end the sandbox's root may reopen by name, as `/dev/stdout`.
fn pipe(ids: &IdMaps) -> Result<(PipeReader, OwnedFd), SandboxError> {
    let (reader, writer) = io::pipe().map_err(host("make", "a pipe"))?;
    if let Some((uid, gid)) = ids.foreign_root() {
        std::os::unix::fs::fchown(&writer, Some(uid), Some(gid))
            .map_err(host("chown", "a pipe"))?;
    }
    Ok((reader, writer.into()))
}

fn give_mounts_to(uid: u32, gid: u32, spec: &SandboxSpec) -> Result<(), SandboxError> {
    for mount in spec.mounts.iter().filter(|mount| !mount.read_only) {
        let owner = fs::metadata(&mount.host).map_err(host("stat", &mount.host))?;
        if (owner.uid(), owner.gid()) != (uid, gid) {
            std::os::unix::fs::chown(&mount.host, Some(uid), Some(gid))
                .map_err(host("chown", &mount.host))?;
        }
    }
    Ok(())
}

fn host(operation: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> SandboxError {
    let path = path.as_ref().to_owned();
    move |source| SandboxError::Host {
        operation,
        path,
        source,
    }
}

fn unexpected(report: &FromInit) -> SandboxError {
    let message = format!("{report:?} out of turn");
    SandboxError::Talk(io::Error::new(io::ErrorKind::InvalidData, message))
}
