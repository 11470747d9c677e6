//! Pid 1 of a microVM.
//!
//! The kernel starts it from the virtiofs root. It reaches the tool over vsock: one connection to [`PORT`] for messages, framed,
//! and one for each stream of a command. Every connection begins with a [`Hello`] that says what it is.
//!
//! ```text
//! pid 1                          tool
//!  Hello(control), Ready      ->
//!                             <- Start
//!  Hello(stream) ...          ->
//!  Report::Running(MAIN)      ->
//!                             <- Request ...
//!  Report::Exited(MAIN)       ->
//!                             <- closes, having read all streams to their ends
//!  sync, power off
//! ```

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::mount::MountFlags;
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::time::{ClockId, clock_settime};
use serde::{Deserialize, Serialize};

use crate::failure::{At as _, Failure, Step};
use crate::frame::{self, MAX_FRAME, Receiver};
use crate::message::{Command, CommandId, HostFile, MAIN, Report, Request};
use crate::mounts;
use crate::process::Kernel;
use crate::supervise::{Connected, Link, Received, Supervisor};

/// The port of the host that pid 1 connects to.
pub const PORT: u32 = 49_134;

/// The host, as a guest knows it.
const HOST: libc::c_uint = 2;

/// What a connection may hold on its way out. A kernel lets no more be on its way than it would take itself, 256 KiB unless it is
/// told, and `msb_krun` 0.1 says that it has taken something only when it was 4 MiB.
const ON_THE_WAY: u64 = 8 << 20;
/// `SO_VM_SOCKETS_BUFFER_SIZE` of `linux/vm_sockets.h`.
const BUFFER_SIZE: libc::c_int = 0;
/// `SO_VM_SOCKETS_BUFFER_MAX_SIZE` of `linux/vm_sockets.h`.
const BUFFER_MAX_SIZE: libc::c_int = 2;

/// How long the tool has to take what is left before the machine goes off without it.
const LAST_WORDS: Duration = Duration::from_secs(30);

/// Files that a process may have open, as container engines set it.
const OPEN_FILES: Rlimit = Rlimit {
    current: Some(1 << 20),
    maximum: Some(1 << 20),
};

/// What a connection is for. The first [`Hello::LEN`] bytes on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Hello {
    /// Messages.
    Control,
    /// The command's standard input, or both ways of its terminal.
    Input(CommandId),
    /// Its standard output.
    Output(CommandId),
    /// Its standard error.
    Errors(CommandId),
}

impl Hello {
    /// Length in bytes.
    pub const LEN: usize = 5;

    /// What is sent.
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let (kind, id) = match self {
            Self::Control => (0, 0),
            Self::Input(id) => (1, id),
            Self::Output(id) => (2, id),
            Self::Errors(id) => (3, id),
        };
        let [a, b, c, d] = id.to_le_bytes();
        [kind, a, b, c, d]
    }

    /// What was sent, if it means anything.
    pub fn from_bytes([kind, id @ ..]: [u8; Self::LEN]) -> Option<Self> {
        let id = u32::from_le_bytes(id);
        match kind {
            0 if id == 0 => Some(Self::Control),
            1 => Some(Self::Input(id)),
            2 => Some(Self::Output(id)),
            3 => Some(Self::Errors(id)),
            _ => None,
        }
    }
}

/// What the tool says first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// Host name.
    pub hostname: String,
    /// The host's clock, since 1970.
    pub now: Duration,
    /// The host's settings.
    pub files: Vec<HostFile>,
    /// Directories of the host, each a virtiofs of its own.
    pub volumes: Vec<Volume>,
    /// The main command.
    pub command: Command,
}

/// A directory of the host that is visible inside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// The tag of its virtiofs.
    pub tag: String,
    /// Absolute path inside; created when missing.
    pub target: String,
}

/// From the tool to pid 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToGuest {
    /// First, and once.
    Start(Box<Start>),
    /// Afterwards.
    Request(Request),
}

/// From pid 1 to the tool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromGuest {
    /// First: the kernel is up.
    Ready,
    /// Afterwards.
    Report(Report),
}

/// The whole of the program; returns its exit code, but only where it is not pid 1: the machine goes off instead.
pub fn main() -> i32 {
    if std::process::id() != 1 {
        eprintln!("iii-init is pid 1 of a microVM; it is not for people");
        return 2;
    }
    rustix::process::umask(Mode::empty());
    if let Err(failure) = console().and_then(|()| boot()) {
        // To the console, which the tool shows when nothing else has told it what is wrong.
        let error = io::Error::from_raw_os_error(failure.errno);
        eprintln!(
            "iii-init: cannot {} {}: {error}",
            failure.step, failure.what
        );
    }
    rustix::fs::sync();
    // The end of the machine for every VMM that takes a reset for one, whether or not it knows how to be switched off.
    let _ = rustix::system::reboot(rustix::system::RebootCommand::Restart);
    1
}

/// Leads the standard streams to the console. The kernel does so only where the root has a `/dev`.
fn console() -> Result<(), Failure> {
    // The kernel may have mounted it.
    let mounted = mounts::filesystem(
        "devtmpfs",
        "devtmpfs",
        "/dev",
        MountFlags::NOSUID,
        "mode=755",
    );
    mounted.or_else(|failure| match failure.errno {
        libc::EBUSY => Ok(()),
        _ => Err(failure),
    })?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let console = rustix::fs::open("/dev/console", flags, Mode::empty());
    let console = console.at(Step::Streams, "/dev/console")?;
    rustix::stdio::dup2_stdin(&console).at(Step::Streams, "")?;
    rustix::stdio::dup2_stdout(&console).at(Step::Streams, "")?;
    rustix::stdio::dup2_stderr(&console).at(Step::Streams, "")
}

fn boot() -> Result<(), Failure> {
    let mut link = Vsock {
        control: connect(Hello::Control).at(Step::Talk, "")?,
        receiver: Receiver::new(MAX_FRAME),
    };
    link.send(&FromGuest::Ready).at(Step::Talk, "")?;
    let start = loop {
        match link.receiver.read(&mut link.control).at(Step::Talk, "")? {
            frame::Received::Message(ToGuest::Start(start)) => break start,
            frame::Received::Message(ToGuest::Request(_)) | frame::Received::Nothing => {}
            frame::Received::Closed => return Ok(()),
        }
    };
    match set_up(&start) {
        Ok(()) => supervise(link, &start.command),
        Err(failure) => link.fail(failure),
    }
}

/// Runs the command to its end, then waits for the tool to close the link.
fn supervise(link: Vsock, command: &Command) -> Result<(), Failure> {
    let reporter = link.control.try_clone().at(Step::Talk, "")?;
    let mut supervisor = match Supervisor::start(link, Kernel::Own, command, Vec::new()) {
        Ok(supervisor) => supervisor,
        Err(failure) => {
            let mut link = Vsock {
                control: reporter,
                receiver: Receiver::new(MAX_FRAME),
            };
            return link.fail(failure);
        }
    };
    if supervisor.supervise() {
        rustix::fs::sync();
        supervisor.into_link().wait_for_end();
    }
    Ok(())
}

fn set_up(start: &Start) -> Result<(), Failure> {
    let now = Timespec::try_from(start.now);
    now.map_err(|_| rustix::io::Errno::INVAL)
        .and_then(|now| clock_settime(ClockId::Realtime, now))
        .at(Step::Clock, "")?;
    mounts::proc()?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mounts::filesystem("sysfs", "sysfs", "/sys", flags, "")?;
    mounts::devices()?;
    mounts::scratch()?;
    mounts::host_files(&start.files)?;
    for volume in &start.volumes {
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        mounts::filesystem("virtiofs", &volume.tag, &volume.target, flags, "")?;
    }
    rustix::system::sethostname(start.hostname.as_bytes()).at(Step::Hostname, &start.hostname)?;
    setrlimit(Resource::Nofile, OPEN_FILES).at(Step::Streams, "")?;
    loopback_up().at(Step::Network, "lo")
}

fn loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        None,
    )?;
    // SAFETY: the request is a valid one when zeroed, its name ends with a NUL, and the call reads and writes no more than it.
    unsafe {
        let mut request: libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
            *to = *from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        if libc::ioctl(
            socket.as_raw_fd(),
            libc::SIOCSIFFLAGS as _,
            &raw mut request,
        ) == -1
        {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// A connection to the tool. A stream socket is one, whatever its family.
fn connect(hello: Hello) -> io::Result<UnixStream> {
    // SAFETY: the options' values and the address are vsock's, as long as the call is told, and the descriptor is new and nobody else's.
    let socket = unsafe {
        let fd = libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
        if fd == -1 {
            return Err(io::Error::last_os_error());
        }
        let socket = OwnedFd::from_raw_fd(fd);
        let size = ON_THE_WAY;
        for option in [BUFFER_MAX_SIZE, BUFFER_SIZE] {
            let length = size_of_val(&size) as libc::socklen_t;
            let size = (&raw const size).cast();
            if libc::setsockopt(fd, libc::AF_VSOCK, option, size, length) == -1 {
                return Err(io::Error::last_os_error());
            }
        }
        let mut address: libc::sockaddr_vm = std::mem::zeroed();
        address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
        address.svm_cid = HOST;
        address.svm_port = PORT;
        let length = size_of_val(&address) as libc::socklen_t;
        if libc::connect(fd, (&raw const address).cast(), length) == -1 {
            return Err(io::Error::last_os_error());
        }
        socket
    };
    let mut file = File::from(socket);
    io::Write::write_all(&mut file, &hello.to_bytes())?;
    Ok(OwnedFd::from(file).into())
}

/// The tool, over vsock.
struct Vsock {
    control: UnixStream,
    receiver: Receiver,
}

impl Vsock {
    fn send(&mut self, message: &FromGuest) -> io::Result<()> {
        frame::send(&mut self.control, message)
    }

    /// Tells why there is no main command, and waits for that to have been heard.
    fn fail(&mut self, failure: Failure) -> Result<(), Failure> {
        let report = Report::Failed(MAIN, failure);
        self.send(&FromGuest::Report(report)).at(Step::Talk, "")?;
        self.wait_for_end();
        Ok(())
    }

    fn wait_for_end(&mut self) {
        let Ok(timeout) = Timespec::try_from(LAST_WORDS) else {
            return;
        };
        loop {
            let mut fds = [PollFd::new(&self.control, PollFlags::IN)];
            match poll(&mut fds, Some(&timeout)) {
                Err(rustix::io::Errno::INTR) => {}
                Ok(0) | Err(_) => return,
                Ok(_) => match self.receive() {
                    Ok(Received::Closed) | Err(_) => return,
                    // Too late for whatever it is.
                    Ok(_) => {}
                },
            }
        }
    }
}

impl Link for Vsock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.control.as_fd()
    }

    fn receive(&mut self) -> io::Result<Received> {
        // Nobody else reads, and a report should wait for room: only for this read it may not block.
        self.control.set_nonblocking(true)?;
        let received = self.receiver.read(&mut self.control);
        self.control.set_nonblocking(false)?;
        Ok(match received? {
            frame::Received::Message(ToGuest::Request(request)) => {
                Received::Request(request, Vec::new())
            }
            frame::Received::Message(ToGuest::Start(_)) | frame::Received::Nothing => {
                Received::Nothing
            }
            frame::Received::Closed => Received::Closed,
        })
    }

    fn report(&mut self, report: &Report) -> io::Result<()> {
        self.send(&FromGuest::Report(report.clone()))
    }

    fn connect(
        &mut self,
        id: CommandId,
        command: &Command,
        _: Vec<OwnedFd>,
    ) -> io::Result<Connected> {
        if command.terminal.is_some() {
            return Ok(Connected::Terminal(connect(Hello::Input(id))?.into()));
        }
        Ok(Connected::Pipes([
            connect(Hello::Input(id))?.into(),
            connect(Hello::Output(id))?.into(),
            connect(Hello::Errors(id))?.into(),
        ]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hellos_are_what_they_were() {
        for hello in [
            Hello::Control,
            Hello::Input(0),
            Hello::Output(1),
            Hello::Errors(u32::MAX),
        ] {
            assert_eq!(Hello::from_bytes(hello.to_bytes()), Some(hello));
        }
        assert_eq!(Hello::from_bytes([4, 0, 0, 0, 0]), None);
        assert_eq!(Hello::from_bytes([0, 1, 0, 0, 0]), None);
    }
}
