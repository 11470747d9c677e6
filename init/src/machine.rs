//! Pid 1 of a microVM, which the kernel starts from the virtiofs root.

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

use crate::failure::{At as _, Failure, Step};
use crate::frame::{self, MAX_FRAME, Receiver};
use crate::message::{Command, CommandId, MAIN, Report};
use crate::mounts;
use crate::process::Kernel;
use crate::supervise::{Connected, Link, Received, Supervisor};
use crate::vm::{FromGuest, Hello, PORT, Start, ToGuest};

/// The host, as a guest knows it.
const HOST: libc::c_uint = 2;

/// Most bytes that a connection may hold on its way out. A kernel lets no more be on its way than
/// it would take itself, 256 KiB unless it is told, and `msb_krun` 0.1 says that it has taken
/// something only when it was 4 MiB.
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

/// The whole of the program; returns its exit code, but only where it is not pid 1: the machine
/// goes off instead.
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
    // The end of the machine for every VMM that takes a reset for one, whether or not it knows how
    // to be switched off.
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
    // SAFETY: the request is a valid one when zeroed, its name ends with a NUL, and the call reads
    // and writes no more than it.
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
    // SAFETY: the options' values and the address are vsock's, as long as the call is told, and the
    // descriptor is new and owned by no other code.
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
        // No other thread reads, and a report should wait for room: only for this read it may not
        // block.
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
