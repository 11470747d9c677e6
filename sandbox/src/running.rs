//! A running sandbox of either runtime.

use std::fs::File;
use std::io::{self, PipeReader};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use iii_init::message::{Command, CommandId, MAIN, Report, Request, Size};
use iii_init::vm::Hello;
use rustix::net::{Shutdown, shutdown};
use rustix::process::Signal;

use super::commands::{Commands, News};

#[cfg(feature = "libkrun")]
use super::RootSource;
#[cfg(feature = "libkrun")]
use super::krun::{self, Vm};
use super::namespace::{self, Namespace};
use super::{SandboxError, SandboxSpec, Warning};

/// A running sandbox. Dropped, it is killed and everything in it is gone, as it is when this
/// process dies.
pub struct Sandbox {
    kind: Kind,
    /// The command's output, with [`Stdio::Piped`](super::Stdio::Piped) or
    /// [`Joined`](super::Stdio::Joined). To be read, lest the command block.
    pub stdout: Option<PipeReader>,
    /// The command's error output, with [`Stdio::Piped`](super::Stdio::Piped). To be read, lest the
    /// command block.
    pub stderr: Option<PipeReader>,
}

enum Kind {
    Namespace(Namespace),
    #[cfg(feature = "libkrun")]
    Machine(Box<Vm>),
}

impl Sandbox {
    /// Starts the command and returns once it has been executed. It runs in a microVM where the
    /// root is a [`RootSource::Machine`](super::RootSource), else in namespaces.
    pub fn start(spec: SandboxSpec) -> Result<Self, SandboxError> {
        spec.check()?;
        #[cfg(feature = "libkrun")]
        if let RootSource::Machine(machine) = &spec.root {
            let mut vm = Vm::start(&spec, machine)?;
            return Ok(Self {
                stdout: vm.stdout.take(),
                stderr: vm.stderr.take(),
                kind: Kind::Machine(Box::new(vm)),
            });
        }
        let mut namespace = Namespace::start(spec)?;
        Ok(Self {
            stdout: namespace.stdout.take(),
            stderr: namespace.stderr.take(),
            kind: Kind::Namespace(namespace),
        })
    }

    /// The process, as the host sees it, whose end is the sandbox's end. Not the command.
    pub fn pid(&self) -> u32 {
        match &self.kind {
            Kind::Namespace(namespace) => namespace.pid(),
            #[cfg(feature = "libkrun")]
            Kind::Machine(vm) => vm.pid(),
        }
    }

    /// Restrictions of the sandbox.
    pub fn warnings(&self) -> &[Warning] {
        match &self.kind {
            Kind::Namespace(namespace) => namespace.warnings(),
            #[cfg(feature = "libkrun")]
            Kind::Machine(_) => &[],
        }
    }

    /// A handle for other threads.
    pub fn controller(&self) -> Controller {
        let (link, commands) = match &self.kind {
            Kind::Namespace(namespace) => (Link::Namespace(namespace.link()), namespace.commands()),
            #[cfg(feature = "libkrun")]
            Kind::Machine(vm) => (Link::Machine(vm.link()), vm.commands()),
        };
        Controller { link, commands }
    }

    /// Waits until the sandbox is gone: every process reaped, everything written handed to the
    /// server of its root. The command's status; SIGKILL's where the sandbox was killed as a whole.
    pub fn wait(&mut self) -> Result<ExitStatus, SandboxError> {
        match &mut self.kind {
            Kind::Namespace(namespace) => namespace.wait(),
            #[cfg(feature = "libkrun")]
            Kind::Machine(vm) => vm.wait(),
        }
    }

    /// As [`wait`](Self::wait), for at most `timeout`. `None` if the sandbox still runs then.
    pub fn wait_timeout(&mut self, timeout: Duration) -> Result<Option<ExitStatus>, SandboxError> {
        let ends = match &mut self.kind {
            Kind::Namespace(namespace) => namespace.ends_within(timeout)?,
            #[cfg(feature = "libkrun")]
            Kind::Machine(vm) => vm.ends_within(timeout),
        };
        if ends {
            self.wait().map(Some)
        } else {
            Ok(None)
        }
    }

    /// [`Controller::stop`], then [`wait`](Self::wait).
    pub fn stop(&mut self, signal: Signal, grace: Duration) -> Result<ExitStatus, SandboxError> {
        self.controller().stop(signal, grace)?;
        self.wait()
    }

    /// The observations of a microVM's overlay, after [`wait`](Self::wait). `None` if they are
    /// lost, because the machine was killed, or if the sandbox is not a microVM.
    #[cfg(feature = "libkrun")]
    pub fn facts(&mut self) -> Option<Vec<iii_store::Fact>> {
        match &mut self.kind {
            Kind::Namespace(_) => None,
            Kind::Machine(vm) => vm.facts(),
        }
    }
}

/// Reaches a sandbox while another thread waits for it. Once the sandbox has ended, nothing
/// happens.
#[derive(Clone)]
pub struct Controller {
    link: Link,
    commands: Arc<Commands>,
}

#[derive(Clone)]
enum Link {
    Namespace(namespace::Link),
    #[cfg(feature = "libkrun")]
    Machine(krun::Link),
}

impl Controller {
    /// Sends `signal` to the command's process group, as a terminal would.
    pub fn signal(&self, signal: Signal) -> Result<(), SandboxError> {
        self.request(Request::Signal(MAIN, signal.as_raw()), &[])
    }

    /// Ends the sandbox: `signal` to the command's process group; once the command has ended, to
    /// whatever it left running; after `grace`, SIGKILL to all. Returns at once. Called again, it
    /// can only shorten the grace.
    pub fn stop(&self, signal: Signal, grace: Duration) -> Result<(), SandboxError> {
        let signal = signal.as_raw();
        self.request(Request::Stop { signal, grace }, &[])
    }

    /// Runs one more command, on three streams, or on one socket where it is to have a terminal. It
    /// ends with the sandbox at the latest. News of it come while another thread waits for the
    /// sandbox.
    pub fn run(&self, command: Command, fds: Vec<OwnedFd>) -> Result<Started, SandboxError> {
        if fds.len() != if command.terminal.is_some() { 1 } else { 3 } {
            return Err(SandboxError::Spec(
                "a command has three streams, or a terminal".into(),
            ));
        }
        let (id, news) = self.commands.add();
        let mut started = Started {
            controller: self.clone(),
            id,
            news,
            fds: Vec::new(),
        };
        let request = Request::Run(id, Box::new(command));
        match self.link {
            Link::Namespace(_) => {
                let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
                self.request(request, &fds)?;
                Ok(started)
            }
            #[cfg(feature = "libkrun")]
            Link::Machine(_) => {
                self.request(request, &[])?;
                started.fds = fds;
                Ok(started)
            }
        }
    }

    /// Runs `command` in place of the sandbox's, on the same streams: `signal` to the old one's
    /// process group and, once that has ended and if no command runs beside it, to all processes it
    /// left running; after `grace`, SIGKILL. Returns once the new one has been executed. While
    /// another thread waits for the sandbox; not in a microVM.
    ///
    /// The error is [`SandboxError::Killed`] where the sandbox ended, or is asked to, before that.
    pub fn restart(
        &self,
        command: Command,
        signal: Signal,
        grace: Duration,
    ) -> Result<(), SandboxError> {
        let news = self.commands.main();
        let request = Request::Restart {
            command: Box::new(command),
            signal: signal.as_raw(),
            grace,
        };
        self.request(request, &[])?;
        let told = news.recv();
        self.commands.remove(MAIN);
        match told {
            Ok(News::Report(Report::Running(_))) => Ok(()),
            Ok(News::Report(Report::Failed(_, failure))) => Err(failure.into()),
            _ => Err(SandboxError::Killed),
        }
    }

    fn request(&self, request: Request, fds: &[BorrowedFd<'_>]) -> Result<(), SandboxError> {
        match &self.link {
            Link::Namespace(link) => link.request(request, fds),
            #[cfg(feature = "libkrun")]
            Link::Machine(link) => {
                link.request(request);
                Ok(())
            }
        }
    }
}

/// A command beside the main one.
pub struct Started {
    controller: Controller,
    id: CommandId,
    news: Receiver<News>,
    /// Where its streams lead, where the sandbox has not got them itself.
    fds: Vec<OwnedFd>,
}

/// Reaches a command while another thread waits for it.
#[derive(Clone)]
pub struct CommandController {
    controller: Controller,
    id: CommandId,
}

impl CommandController {
    /// Sends `signal` to the command's process group.
    pub fn signal(&self, signal: Signal) -> Result<(), SandboxError> {
        let request = Request::Signal(self.id, signal.as_raw());
        self.controller.request(request, &[])
    }

    /// Changes the size of its terminal.
    pub fn resize(&self, size: Size) -> Result<(), SandboxError> {
        self.controller.request(Request::Resize(self.id, size), &[])
    }
}

impl Started {
    /// A handle for other threads.
    pub fn controller(&self) -> CommandController {
        CommandController {
            controller: self.controller.clone(),
            id: self.id,
        }
    }

    /// Waits until the command has ended, and all that it printed is where its streams lead. The
    /// error is [`SandboxError::Killed`] where the sandbox ended before it.
    pub fn wait(self) -> Result<ExitStatus, SandboxError> {
        let (mut outputs, mut ended) = (Vec::new(), None);
        let mut awaited = vec![true; self.fds.len()];
        loop {
            // The streams come another way than the reports, and may be late.
            if let Some(status) = ended.filter(|_| !awaited.contains(&true)) {
                for output in outputs {
                    // It ended, if only for want of a reader.
                    let _ = JoinHandle::join(output);
                }
                return Ok(ExitStatus::from_raw(status));
            }
            match self.news.recv() {
                Err(_) => return Err(SandboxError::Killed),
                Ok(News::Report(Report::Running(_))) => {}
                Ok(News::Report(Report::Failed(_, failure))) => return Err(failure.into()),
                Ok(News::Report(Report::Exited(_, status))) => ended = Some(status),
                Ok(News::Stream(hello, stream)) => {
                    if let Some(index) = take_awaited(&mut awaited, hello) {
                        self.connect(index, stream, &mut outputs)?;
                    }
                }
            }
        }
    }

    /// Connects a stream of the command to its destination, by its index.
    fn connect(
        &self,
        index: usize,
        stream: OwnedFd,
        outputs: &mut Vec<JoinHandle<()>>,
    ) -> Result<(), SandboxError> {
        let broken = |source| SandboxError::Host {
            operation: "connect",
            path: "the streams of a command".into(),
            source,
        };
        let is_terminal = self.fds.len() == 1;
        let Some(fd) = self.fds.get(index) else {
            return Ok(());
        };
        let ours = fd.try_clone().map_err(broken)?;
        if index == 0 {
            let (from, to) = (ours.try_clone(), stream.try_clone());
            copy(from.map_err(broken)?, to.map_err(broken)?).map_err(broken)?;
        }
        if index > 0 || is_terminal {
            outputs.push(copy(stream, ours).map_err(broken)?);
        }
        Ok(())
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        self.controller.commands.remove(self.id);
    }
}

/// Which of a command's streams has come, if it is one that has not come before: a guest may say so
/// of as many as it likes.
fn take_awaited(awaited: &mut [bool], hello: Hello) -> Option<usize> {
    let index = match hello {
        Hello::Input(_) => 0,
        Hello::Output(_) => 1,
        Hello::Errors(_) => 2,
        Hello::Control => return None,
    };
    std::mem::take(awaited.get_mut(index)?).then_some(index)
}

/// Moves bytes until none come, and says so.
fn copy(from: OwnedFd, to: OwnedFd) -> io::Result<JoinHandle<()>> {
    let copy = move || {
        let to = File::from(to);
        let _ = io::copy(&mut File::from(from), &mut &to);
        // Other files signal the end when they close.
        let _ = shutdown(&to, Shutdown::Write);
    };
    thread::Builder::new().name("stream".into()).spawn(copy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_of_a_command_comes_once() {
        let [input, output, errors] = [Hello::Input(7), Hello::Output(7), Hello::Errors(7)];
        for (streams, hellos, taken) in [
            (3, [output, output, input], [Some(1), None, Some(0)]),
            (3, [Hello::Control, errors, errors], [None, Some(2), None]),
            // A terminal, and what runs in namespaces.
            (1, [output, errors, input], [None, None, Some(0)]),
            (0, [input, output, errors], [None; 3]),
        ] {
            let mut awaited = vec![true; streams];
            let came = hellos.map(|hello| take_awaited(&mut awaited, hello));
            assert_eq!(came, taken, "{hellos:?}");
        }
    }
}
