//! A running sandbox, whatever it runs in.

use std::io::PipeReader;
use std::process::ExitStatus;
use std::time::Duration;

use iii_init::message::{MAIN, Request};
use rustix::process::Signal;

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
    /// The command's output, with [`Stdio::Piped`](super::Stdio::Piped). To be read, lest the command block.
    pub stdout: Option<PipeReader>,
    /// The command's error output, with [`Stdio::Piped`](super::Stdio::Piped). To be read, lest the command block.
    pub stderr: Option<PipeReader>,
}

enum Kind {
    Namespace(Namespace),
    #[cfg(feature = "libkrun")]
    Machine(Box<Vm>),
}

impl Sandbox {
    /// Starts the command and returns once it has been executed. It runs in a microVM where the root is a
    /// [`RootSource::Machine`](super::RootSource), else in namespaces.
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

    /// What works worse than it could.
    pub fn warnings(&self) -> &[Warning] {
        match &self.kind {
            Kind::Namespace(namespace) => namespace.warnings(),
            #[cfg(feature = "libkrun")]
            Kind::Machine(_) => &[],
        }
    }

    /// A handle for other threads.
    pub fn controller(&self) -> Controller {
        Controller(match &self.kind {
            Kind::Namespace(namespace) => Link::Namespace(namespace.link()),
            #[cfg(feature = "libkrun")]
            Kind::Machine(vm) => Link::Machine(vm.link()),
        })
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

    /// What the overlay of a microVM has observed, after [`wait`](Self::wait). `None` where that is not known: the machine was
    /// killed, or it is none.
    #[cfg(feature = "libkrun")]
    pub fn facts(&mut self) -> Option<Vec<iii_store::Fact>> {
        match &mut self.kind {
            Kind::Namespace(_) => None,
            Kind::Machine(vm) => vm.facts(),
        }
    }
}

/// Reaches a sandbox while another thread waits for it. Once the sandbox has ended, nothing happens.
#[derive(Clone)]
pub struct Controller(Link);

#[derive(Clone)]
enum Link {
    Namespace(namespace::Link),
    #[cfg(feature = "libkrun")]
    Machine(krun::Link),
}

impl Controller {
    /// Sends `signal` to the command's process group, as a terminal would.
    pub fn signal(&self, signal: Signal) -> Result<(), SandboxError> {
        self.request(Request::Signal(MAIN, signal.as_raw()))
    }

    /// Ends the sandbox: `signal` to the command's process group; once the command has ended, to
    /// whatever it left running; after `grace`, SIGKILL to all. Returns at once. Called again, it
    /// can only shorten the grace.
    pub fn stop(&self, signal: Signal, grace: Duration) -> Result<(), SandboxError> {
        let signal = signal.as_raw();
        self.request(Request::Stop { signal, grace })
    }

    fn request(&self, request: Request) -> Result<(), SandboxError> {
        match &self.0 {
            Link::Namespace(link) => link.request(request),
            #[cfg(feature = "libkrun")]
            Link::Machine(link) => {
                link.request(request);
                Ok(())
            }
        }
    }
}
