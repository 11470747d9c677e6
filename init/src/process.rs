//! From a [`Command`] to a process that runs it.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;

use rustix::fs::{Gid, Mode, OFlags, Uid};
use rustix::process::{Pid, setsid};
use rustix::thread::{
    CapabilitySet, remove_capability_from_bounding_set, set_thread_groups, set_thread_res_gid,
    set_thread_res_uid,
};

use crate::failure::{At as _, Failure, Step};
use crate::message::Command;
use crate::packet::Socket;
use crate::passwd::{self, Identity};
use crate::signals::Signals;

/// Capabilities that a container engine leaves to root; what the others allow concerns the machine
/// as a whole. The namespaces bound these, too.
const KEPT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::NET_RAW)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::SETPCAP)
    .union(CapabilitySet::NET_BIND_SERVICE)
    .union(CapabilitySet::SYS_CHROOT)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::AUDIT_WRITE);

/// Largest `/etc/passwd` or `/etc/group` of an image that is looked into.
const MAX_ACCOUNTS: u64 = 1 << 20;

/// The filter between a command and the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// It is shared with others: capabilities that concern the machine are dropped.
    Shared,
    /// It is the sandbox's own.
    Own,
}

/// The descriptors that a command gets as its standard streams.
#[derive(Debug)]
pub enum Streams {
    /// Input, output and errors.
    Three {
        /// They, in this order.
        fds: [OwnedFd; 3],
        /// The outputs are pipes made for the command, so they may be given to its user.
        owned: bool,
    },
    /// The slave of a terminal, for all three; the command's controlling terminal.
    Terminal(OwnedFd),
}

impl Streams {
    /// The same streams for another command.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Three { fds, owned } => {
                let [input, output, errors] = fds;
                let fds = [input.try_clone()?, output.try_clone()?, errors.try_clone()?];
                Self::Three { fds, owned: *owned }
            }
            Self::Terminal(slave) => Self::Terminal(slave.try_clone()?),
        })
    }
}

/// Forks, in a process with one thread. `None` in the child.
pub fn fork() -> rustix::io::Result<Option<Pid>> {
    // SAFETY: there is one thread, so the child may do everything that the parent may.
    match unsafe { libc::fork() } {
        -1 => Err(
            rustix::io::Errno::from_io_error(&io::Error::last_os_error())
                .unwrap_or(rustix::io::Errno::AGAIN),
        ),
        child => Ok(Pid::from_raw(child)),
    }
}

/// Runs `command`; returns once it has been executed. The process leads a session and a group of
/// its own.
pub fn spawn(command: &Command, kernel: Kernel, streams: Streams) -> Result<Pid, Failure> {
    let identity = find_user(&command.user)?;
    std::fs::create_dir_all(&command.cwd).at(Step::Chdir, &command.cwd)?;
    let (ours, theirs) = Socket::pair().at(Step::Fork, "")?;
    let Some(pid) = fork().at(Step::Fork, "")? else {
        let failure = become_command(command, kernel, &identity, &streams);
        let _ = theirs.send(&failure, &[]);
        std::process::exit(127);
    };
    drop((streams, theirs));
    // Closed by the exec, unless it fails.
    match ours.recv().at(Step::Talk, "")? {
        Some((failure, _)) => Err(failure),
        None => Ok(pid),
    }
}

fn find_user(user: &str) -> Result<Identity, Failure> {
    let read = |path: &str| {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = File::from(rustix::fs::open(path, flags, Mode::empty()).ok()?);
        let mut text = Vec::new();
        file.metadata().ok().filter(std::fs::Metadata::is_file)?;
        file.take(MAX_ACCOUNTS).read_to_end(&mut text).ok()?;
        Some(String::from_utf8_lossy(&text).into_owned())
    };
    let passwd = read("/etc/passwd").unwrap_or_default();
    let group = read("/etc/group").unwrap_or_default();
    passwd::resolve(user, &passwd, &group)
        .ok_or(rustix::io::Errno::NOENT)
        .at(Step::FindUser, user)
}

/// Turns this process into the command; comes back only with the reason why not.
fn become_command(
    command: &Command,
    kernel: Kernel,
    identity: &Identity,
    streams: &Streams,
) -> Failure {
    let ready = prepare(command, kernel, identity, streams);
    if let Err(failure) = ready {
        return failure;
    }
    let Some((program, arguments)) = command.argv.split_first() else {
        return Failure::new(Step::Exec, "", &io::ErrorKind::InvalidInput.into());
    };
    let mut process = std::process::Command::new(program);
    process.args(arguments).env_clear();
    if let Some(home) = &identity.home {
        process.env("HOME", home);
    }
    process.envs(command.env.iter().map(|(name, value)| (name, value)));
    let error = process.exec();
    Failure::new(Step::Exec, program.to_string_lossy(), &error)
}

fn prepare(
    command: &Command,
    kernel: Kernel,
    identity: &Identity,
    streams: &Streams,
) -> Result<(), Failure> {
    setsid().at(Step::Streams, "")?;
    let ([stdin, stdout, stderr], owned) = match streams {
        Streams::Three { fds, owned } => (fds.each_ref(), *owned),
        Streams::Terminal(slave) => {
            rustix::process::ioctl_tiocsctty(slave).at(Step::Streams, "")?;
            ([slave; 3], true)
        }
    };
    rustix::stdio::dup2_stdin(stdin).at(Step::Streams, "")?;
    rustix::stdio::dup2_stdout(stdout).at(Step::Streams, "")?;
    rustix::stdio::dup2_stderr(stderr).at(Step::Streams, "")?;
    if owned {
        // So that the user may open /dev/stdout, too; one who does not exist is found out below.
        for stream in [stdout, stderr] {
            let stream = stream.as_fd();
            let _ = std::os::unix::fs::fchown(stream, Some(identity.uid), Some(identity.gid));
        }
    }
    rustix::process::chdir(command.cwd.as_str()).at(Step::Chdir, &command.cwd)?;
    rustix::process::umask(Mode::WGRP | Mode::WOTH);

    if kernel == Kernel::Shared {
        drop_capabilities()?;
    }
    become_user(&command.user, identity)?;
    new_session_keyring();
    Signals::reset();
    close_range(libc::CLOSE_RANGE_CLOEXEC);
    Ok(())
}

fn drop_capabilities() -> Result<(), Failure> {
    for bit in 0..u64::BITS {
        let capability = CapabilitySet::from_bits_retain(1 << bit);
        if KEPT.contains(capability) {
            continue;
        }
        match remove_capability_from_bounding_set(capability) {
            // Past the last that this kernel knows.
            Err(rustix::io::Errno::INVAL) => break,
            result => result.at(Step::DropCapabilities, "")?,
        }
    }
    Ok(())
}

fn become_user(name: &str, identity: &Identity) -> Result<(), Failure> {
    let name = if name.is_empty() { "root" } else { name };
    let groups: Vec<Gid> = identity
        .groups
        .iter()
        .map(|gid| Gid::from_raw(*gid))
        .collect();
    let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
    set_groups(&groups).at(Step::BecomeUser, name)?;
    set_thread_res_gid(gid, gid, gid).at(Step::BecomeUser, name)?;
    set_thread_res_uid(uid, uid, uid).at(Step::BecomeUser, name)
}

/// Sets the supplementary groups. Where one id alone is mapped that cannot be done; they are the
/// tool's then.
pub fn set_groups(groups: &[Gid]) -> rustix::io::Result<()> {
    match set_thread_groups(groups) {
        Err(rustix::io::Errno::PERM) => Ok(()),
        result => result,
    }
}

/// Leaves the tool's keyring behind. A kernel without keyrings has none to leave.
fn new_session_keyring() {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_int = 1;
    // SAFETY: a null name asks for a new anonymous keyring; nothing is read or written.
    unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            KEYCTL_JOIN_SESSION_KEYRING,
            std::ptr::null::<libc::c_char>(),
        );
    }
}

/// Closes every descriptor but the standard streams: whatever the tool inherited from its own
/// parent and left open for others.
///
/// # Safety
///
/// No Rust value owns such a descriptor.
pub unsafe fn close_others() {
    close_range(0);
}

fn close_range(flags: libc::c_uint) {
    // SAFETY: see `close_others`; with the other flag, to set close-on-exec leaves values intact.
    unsafe {
        libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, flags);
    }
}
