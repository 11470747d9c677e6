//! The inside: what runs between the tool and the command. Single-threaded throughout.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use iii_init::failure::{At as _, Failure, Step};
use iii_init::message::{Command, CommandId, MAIN, Report};
use iii_init::packet::Socket;
use iii_init::process::{self, Kernel, fork, set_groups};
use iii_init::supervise::{Connected, Link, Received, Supervisor};
use rustix::fs::{Gid, Mode, OFlags, Uid};
use rustix::process::{
    DumpableBehavior, Signal, WaitOptions, set_dumpable_behavior, set_parent_process_death_signal,
    setsid, waitpid,
};
use rustix::thread::{UnshareFlags, set_thread_res_gid, set_thread_res_uid, unshare_unsafe};

use super::root::{self, Sources};
use super::wire::{FromInit, Plan, Root, ToInit};

/// The argument by which the program knows that it is to be the init.
pub const MARKER: &str = "__sandbox-init";

/// The standard streams that the command will have.
type Streams = [OwnedFd; 3];

/// The process that the tool spawned. Makes the namespaces, then outlives pid 1 to be waited for.
/// To be called first in `main`, before there are threads. Returns the exit code, or `None` where
/// standard input is not a connection to the tool.
pub fn run_init() -> Option<i32> {
    // SAFETY: nothing but the standard streams is owned yet.
    unsafe { process::close_others() };
    let control = Socket::take_stdin().ok()?;
    let start = match control.recv() {
        Ok(Some((ToInit::Start(plan), fds))) => Streams::try_from(fds).ok().zip(Some(plan)),
        _ => None,
    };
    let (streams, plan) = start?;
    Some(match enter_namespaces(&control, &plan) {
        Ok(Some((sources, fuse))) => fork_pid_1(control, &plan, streams, sources, fuse),
        Ok(None) => 1,
        Err(failure) => report_failure(&control, failure),
    })
}

fn report_failure(control: &Socket, failure: Failure) -> i32 {
    // If the tool is gone, the failure reaches no process.
    let _ = control.send(&FromInit::Failed(failure), &[]);
    1
}

/// Ends as root of a new user namespace, with pid 1 to be forked. `None` if the tool is gone.
fn enter_namespaces(
    control: &Socket,
    plan: &Plan,
) -> Result<Option<(Sources, Option<OwnedFd>)>, Failure> {
    // A session of its own, so that the terminal's Ctrl-C reaches the tool alone.
    setsid().at(Step::Unshare, "")?;
    // The host's root may open everything now, and afterwards perhaps not: a directory below
    // another user's private home is closed to the ids of the sandbox. Other users may clone mounts
    // only once the namespace is theirs.
    let early = Sources::open(plan).ok();
    unshare()?;
    let sources = match early {
        Some(sources) => sources,
        None => Sources::open(plan)?,
    };
    // To be mounted there, the device has to be opened inside the user namespace; and while we
    // still are who we were outside, since it may be closed to others.
    let fuse = match plan.root {
        Root::Dir(_) => None,
        Root::Fuse | Root::Probe => {
            let flags = OFlags::RDWR | OFlags::CLOEXEC;
            let device = rustix::fs::open(root::FUSE_DEVICE, flags, Mode::empty());
            Some(device.at(Step::OpenFuse, root::FUSE_DEVICE)?)
        }
    };

    control.send(&FromInit::Unshared, &[]).at(Step::Talk, "")?;
    match control.recv().at(Step::Talk, "")? {
        Some((ToInit::MapsWritten, _)) => {}
        _ => return Ok(None),
    }
    set_groups(&[]).at(Step::BecomeRoot, "")?;
    set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT).at(Step::BecomeRoot, "")?;
    set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT).at(Step::BecomeRoot, "")?;
    // Closes /proc/1 to the sandbox, /proc/1/exe above all: it is the tool's own file.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).at(Step::BecomeRoot, "")?;
    Ok(Some((sources, fuse)))
}

fn unshare() -> Result<(), Failure> {
    let flags = UnshareFlags::NEWUSER
        | UnshareFlags::NEWNS
        | UnshareFlags::NEWPID
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS;
    // SAFETY: the flags do not include `FILES`.
    let unshared = unsafe { unshare_unsafe(flags | UnshareFlags::NEWCGROUP) };
    let unshared = match unshared {
        // A kernel without cgroups.
        // SAFETY: as above.
        Err(rustix::io::Errno::INVAL) => unsafe { unshare_unsafe(flags) },
        result => result,
    };
    unshared.at(Step::Unshare, "")
}

fn fork_pid_1(
    control: Socket,
    plan: &Plan,
    streams: Streams,
    sources: Sources,
    fuse: Option<OwnedFd>,
) -> i32 {
    match fork().at(Step::Fork, "") {
        Err(failure) => report_failure(&control, failure),
        Ok(None) => match pid_1(control, plan, streams, sources, fuse) {
            Ok(()) => 0,
            Err((control, failure)) => report_failure(&control, failure),
        },
        Ok(Some(pid)) => {
            // Held here, they would keep the other sides waiting.
            drop((control, streams, sources, fuse));
            let _ = rustix::io::retry_on_intr(|| waitpid(Some(pid), WaitOptions::empty()));
            0
        }
    }
}

fn pid_1(
    control: Socket,
    plan: &Plan,
    streams: Streams,
    sources: Sources,
    fuse: Option<OwnedFd>,
) -> Result<(), (Socket, Failure)> {
    if let Err(failure) = furnish(&control, plan, sources, fuse) {
        return Err((control, failure));
    }
    if matches!(plan.root, Root::Probe) {
        let _ = control.send(&FromInit::Probed, &[]);
        return Ok(());
    }
    let reporter = control.try_clone();
    let link = Control {
        socket: control,
        owns_output: plan.owns_output,
    };
    let started = Supervisor::start(link, Kernel::Shared, &plan.command, streams.into());
    match (started, reporter) {
        (Ok(mut supervisor), _) => {
            supervisor.supervise();
            Ok(())
        }
        (Err(failure), Ok(control)) => Err((control, failure)),
        (Err(_), Err(_)) => Ok(()),
    }
}

/// Mounts what the sandbox sees.
fn furnish(
    control: &Socket,
    plan: &Plan,
    sources: Sources,
    fuse: Option<OwnedFd>,
) -> Result<(), Failure> {
    set_parent_process_death_signal(Some(Signal::KILL)).at(Step::Fork, "")?;
    rustix::process::umask(Mode::empty());
    let old_root = root::mount(control, &plan.root, &sources, fuse)?;
    if matches!(plan.root, Root::Probe) {
        return Ok(());
    }
    root::enter(plan, &sources, old_root)?;
    drop(sources);
    rustix::system::sethostname(plan.hostname.as_bytes()).at(Step::Hostname, &plan.hostname)
}

/// The socket to the tool.
struct Control {
    socket: Socket,
    owns_output: bool,
}

impl Link for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn receive(&mut self) -> io::Result<Received> {
        Ok(match self.socket.recv()? {
            Some((ToInit::Request(request), fds)) => Received::Request(request, fds),
            Some((ToInit::Start(_) | ToInit::MapsWritten, _)) => Received::Nothing,
            None => Received::Closed,
        })
    }

    fn report(&mut self, report: &Report) -> io::Result<()> {
        self.socket.send(&FromInit::Report(report.clone()), &[])
    }

    fn connect(
        &mut self,
        id: CommandId,
        command: &Command,
        mut fds: Vec<OwnedFd>,
    ) -> io::Result<Connected> {
        if command.terminal.is_some() {
            let end = fds.pop().ok_or(io::ErrorKind::InvalidInput)?;
            return Ok(Connected::Terminal(end));
        }
        let fds = fds.try_into().map_err(|_| io::ErrorKind::InvalidInput)?;
        // Those of other commands have other owners.
        let owned = self.owns_output && id == MAIN;
        Ok(Connected::Direct(process::Streams::Three { fds, owned }))
    }
}
