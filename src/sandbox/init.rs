//! The inside: what runs between the tool and the command. Single-threaded throughout.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Gid, Mode, OFlags, Uid};
use rustix::process::{
    DumpableBehavior, Pid, Signal, WaitOptions, kill_process_group, set_dumpable_behavior,
    set_parent_process_death_signal, setsid, wait, waitpid,
};
use rustix::thread::{
    CapabilitySet, UnshareFlags, remove_capability_from_bounding_set, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid, unshare_unsafe,
};

use super::error::Step;
use super::passwd::{self, Identity};
use super::root::{self, Sources};
use super::wire::{self, Failure, Plan, Report, Request, Root};

/// The argument by which the program knows that it is to be the init.
pub(super) const MARKER: &str = "__sandbox-init";

/// To be called first in `main`, before there are threads. Returns unless this process was started
/// to be a sandbox's init; then it never does.
pub fn maybe_run_init() {
    if std::env::args_os()
        .nth(1)
        .is_some_and(|argument| argument == MARKER)
    {
        std::process::exit(stage_1());
    }
}

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

/// Attaches step and object to an error.
pub(super) trait At<T> {
    fn at(self, step: Step, what: &str) -> Result<T, Failure>;
}

impl<T, E: Into<io::Error>> At<T> for Result<T, E> {
    fn at(self, step: Step, what: &str) -> Result<T, Failure> {
        self.map_err(|error| Failure::new(step, what, &error.into()))
    }
}

/// The standard streams that the command will have.
type Streams = [OwnedFd; 3];

/// The process that the tool spawned. Makes the namespaces, then outlives pid 1 to be waited for.
fn stage_1() -> i32 {
    close_others();
    let Ok(control) = take_control_socket() else {
        return 1;
    };
    let start = match wire::recv(&control) {
        Ok(Some((Request::Start, fds))) => <[OwnedFd; 4]>::try_from(fds).ok(),
        _ => None,
    };
    let Some([plan, streams @ ..]) = start else {
        eprintln!("{MARKER} is how this program starts its own sandboxes; it is not for people");
        return 2;
    };
    match read_plan(plan)
        .and_then(|plan| enter_namespaces(&control, &plan).map(|parts| (plan, parts)))
    {
        Ok((plan, Some((sources, fuse)))) => fork_pid_1(control, &plan, streams, sources, fuse),
        Ok((_, None)) => 1,
        Err(failure) => report_failure(&control, failure),
    }
}

/// Moves the socket away from standard input, which becomes empty.
fn take_control_socket() -> io::Result<OwnedFd> {
    let control = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?;
    rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
    Ok(control)
}

fn report_failure(control: &OwnedFd, failure: Failure) -> i32 {
    // Where the tool is gone there is nobody to tell.
    let _ = wire::send(control, &Report::Failed(failure), &[]);
    1
}

fn read_plan(file: OwnedFd) -> Result<Plan, Failure> {
    let mut bytes = Vec::new();
    File::from(file)
        .read_to_end(&mut bytes)
        .and_then(|_| wire::decode(&bytes))
        .at(Step::Talk, "")
}

/// Ends as root of a new user namespace, with pid 1 to be forked. `None` if the tool is gone.
fn enter_namespaces(
    control: &OwnedFd,
    plan: &Plan,
) -> Result<Option<(Sources, Option<OwnedFd>)>, Failure> {
    // A session of its own, so that the terminal's Ctrl-C reaches the tool alone.
    setsid().at(Step::Unshare, "")?;
    // The host's root may open everything now, and afterwards perhaps not: a directory below
    // somebody else's private home is closed to the ids of the sandbox. Anybody else may clone
    // mounts only once the namespace is theirs.
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

    wire::send(control, &Report::Unshared, &[]).at(Step::Talk, "")?;
    match wire::recv(control).at(Step::Talk, "")? {
        Some((Request::MapsWritten, _)) => {}
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

/// Where one id alone is mapped, groups cannot be set; they are the tool's then.
fn set_groups(groups: &[Gid]) -> rustix::io::Result<()> {
    match set_thread_groups(groups) {
        Err(rustix::io::Errno::PERM) => Ok(()),
        result => result,
    }
}

fn fork() -> rustix::io::Result<Option<Pid>> {
    // SAFETY: the init has one thread, so the child may do everything that the parent may.
    match unsafe { libc::fork() } {
        -1 => Err(
            rustix::io::Errno::from_io_error(&io::Error::last_os_error())
                .unwrap_or(rustix::io::Errno::AGAIN),
        ),
        child => Ok(Pid::from_raw(child)),
    }
}

fn fork_pid_1(
    control: OwnedFd,
    plan: &Plan,
    streams: Streams,
    sources: Sources,
    fuse: Option<OwnedFd>,
) -> i32 {
    match fork().at(Step::Fork, "") {
        Err(failure) => report_failure(&control, failure),
        Ok(None) => match pid_1(&control, plan, streams, sources, fuse) {
            Ok(()) => 0,
            Err(failure) => report_failure(&control, failure),
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
    control: &OwnedFd,
    plan: &Plan,
    streams: Streams,
    sources: Sources,
    fuse: Option<OwnedFd>,
) -> Result<(), Failure> {
    set_parent_process_death_signal(Some(Signal::KILL)).at(Step::Fork, "")?;
    rustix::process::umask(Mode::empty());
    let old_root = root::mount(control, &plan.root, &sources, fuse)?;
    if matches!(plan.root, Root::Probe) {
        return wire::send(control, &Report::Running, &[]).at(Step::Talk, "");
    }
    root::enter(plan, &sources, old_root)?;
    drop(sources);
    rustix::system::sethostname(plan.hostname.as_bytes()).at(Step::Hostname, &plan.hostname)?;
    let identity = find_user(&plan.user)?;
    std::fs::create_dir_all(&plan.cwd).at(Step::Chdir, &plan.cwd)?;

    let signals = Signals::block().at(Step::Fork, "")?;
    let (ours, theirs) = wire::pair().at(Step::Fork, "")?;
    let Some(command) = fork().at(Step::Fork, "")? else {
        let failure = become_command(plan, &identity, &streams);
        let _ = wire::send(&theirs, &failure, &[]);
        std::process::exit(127);
    };
    drop((streams, theirs));
    // Closed by the exec, unless it fails.
    if let Some((failure, _)) = wire::recv(&ours).at(Step::Talk, "")? {
        return Err(failure);
    }
    wire::send(control, &Report::Running, &[]).at(Step::Talk, "")?;
    if let Some(status) = supervise(control, &signals, command) {
        wire::send(control, &Report::Exited(status), &[]).at(Step::Talk, "")?;
    }
    Ok(())
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
fn become_command(plan: &Plan, identity: &Identity, streams: &Streams) -> Failure {
    let ready = prepare_command(plan, identity, streams);
    if let Err(failure) = ready {
        return failure;
    }
    let Some((program, arguments)) = plan.argv.split_first() else {
        return Failure::new(Step::Exec, "", &io::ErrorKind::InvalidInput.into());
    };
    let mut command = Command::new(program);
    command.args(arguments).env_clear();
    if let Some(home) = &identity.home {
        command.env("HOME", home);
    }
    command.envs(plan.env.iter().map(|(name, value)| (name, value)));
    let error = command.exec();
    Failure::new(Step::Exec, program.to_string_lossy(), &error)
}

fn prepare_command(plan: &Plan, identity: &Identity, streams: &Streams) -> Result<(), Failure> {
    setsid().at(Step::Streams, "")?;
    let [stdin, stdout, stderr] = streams;
    rustix::stdio::dup2_stdin(stdin).at(Step::Streams, "")?;
    rustix::stdio::dup2_stdout(stdout).at(Step::Streams, "")?;
    rustix::stdio::dup2_stderr(stderr).at(Step::Streams, "")?;
    if plan.owns_output {
        // So that the user may open /dev/stdout, too; one who does not exist is found out below.
        for stream in [stdout, stderr] {
            let _ = std::os::unix::fs::fchown(stream, Some(identity.uid), Some(identity.gid));
        }
    }
    rustix::process::chdir(plan.cwd.as_str()).at(Step::Chdir, &plan.cwd)?;
    rustix::process::umask(Mode::WGRP | Mode::WOTH);

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
    let user = if plan.user.is_empty() {
        "root"
    } else {
        &plan.user
    };
    let groups: Vec<Gid> = identity
        .groups
        .iter()
        .map(|gid| Gid::from_raw(*gid))
        .collect();
    let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
    set_groups(&groups).at(Step::BecomeUser, user)?;
    set_thread_res_gid(gid, gid, gid).at(Step::BecomeUser, user)?;
    set_thread_res_uid(uid, uid, uid).at(Step::BecomeUser, user)?;
    new_session_keyring();
    Signals::reset();
    close_others_on_exec();
    Ok(())
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

/// Closes whatever the tool inherited from its own parent and left open for others.
fn close_others() {
    close_range(0);
}

fn close_others_on_exec() {
    close_range(libc::CLOSE_RANGE_CLOEXEC);
}

fn close_range(flags: libc::c_uint) {
    // SAFETY: called where no descriptor above the standard ones is owned by a Rust value, or to
    // set close-on-exec, which leaves values intact.
    unsafe {
        libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, flags);
    }
}

/// All signals, blocked; the end of a child is read from a descriptor.
struct Signals(OwnedFd);

impl Signals {
    fn block() -> io::Result<Self> {
        // SAFETY: the sets are initialised before they are read, and the descriptor is new and
        // nobody else's.
        unsafe {
            let mut all = std::mem::zeroed();
            libc::sigfillset(&raw mut all);
            libc::sigprocmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut());
            let mut child = std::mem::zeroed();
            libc::sigemptyset(&raw mut child);
            libc::sigaddset(&raw mut child, libc::SIGCHLD);
            match libc::signalfd(-1, &raw const child, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) {
                -1 => Err(io::Error::last_os_error()),
                fd => Ok(Self(OwnedFd::from_raw_fd(fd))),
            }
        }
    }

    /// Forgets the signals that have come.
    fn drain(&self) {
        let mut buffer = [0; 16 * size_of::<libc::signalfd_siginfo>()];
        while rustix::io::read(&self.0, &mut buffer).is_ok_and(|length| length > 0) {}
    }

    /// Every signal as a program expects it: deliverable, and with its default effect. What the
    /// tool or its parents ignore (SIGPIPE, SIGHUP under nohup) would otherwise be inherited.
    fn reset() {
        // SAFETY: no handlers are installed, and the set is initialised before it is read.
        unsafe {
            for signal in 1..=libc::SIGRTMAX() {
                libc::signal(signal, libc::SIG_DFL);
            }
            let mut none = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
        }
    }
}

/// A stop that was asked for.
struct Stop {
    signal: i32,
    /// `None` for a grace beyond what the clock can tell.
    deadline: Option<Instant>,
}

/// Reaps, and forwards what the tool asks for, until the command has ended and what it left behind
/// has had its chance. Returns the command's wait status; whatever still runs dies with pid 1.
/// `None` once the tool is gone.
fn supervise(control: &OwnedFd, signals: &Signals, command: Pid) -> Option<i32> {
    let mut status = None;
    let mut stop: Option<Stop> = None;
    loop {
        let all_gone = reap(command, &mut status, stop.as_ref());
        let deadline = stop.as_ref().and_then(|stop| stop.deadline);
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        match status {
            Some(status) if stop.is_none() || all_gone => return Some(status),
            _ if left == Some(Duration::ZERO) => return Some(status.unwrap_or(libc::SIGKILL)),
            _ => {}
        }

        let left = left.and_then(|left| Timespec::try_from(left).ok());
        let mut fds = [
            PollFd::new(control, PollFlags::IN),
            PollFd::new(&signals.0, PollFlags::IN),
        ];
        if poll(&mut fds, left.as_ref()).is_err() {
            continue;
        }
        signals.drain();
        if fds[0].revents().is_empty() {
            continue;
        }
        let signal = match wire::recv(control) {
            Ok(Some((Request::Signal(signal), _))) => signal,
            Ok(Some((Request::Stop { signal, grace }, _))) => {
                let new = Instant::now().checked_add(grace);
                let deadline = deadline.into_iter().chain(new).min();
                stop = Some(Stop { signal, deadline });
                signal
            }
            Ok(Some((Request::Start | Request::MapsWritten, _))) => continue,
            Ok(None) | Err(_) => return None,
        };
        // The command leads its group, which outlives it while members are left.
        if let Some(signal) = Signal::from_named_raw(signal) {
            let _ = kill_process_group(command, signal);
        }
    }
}

/// Collects whoever has ended; whether nobody is left. When the command ends during a stop, the
/// others hear of the stop.
fn reap(command: Pid, status: &mut Option<i32>, stop: Option<&Stop>) -> bool {
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(Some((pid, ended))) if pid == command => {
                *status = Some(ended.as_raw());
                if let Some(stop) = stop {
                    // SAFETY: -1 means everybody in this pid namespace but us.
                    unsafe { libc::kill(-1, stop.signal) };
                }
            }
            Ok(Some(_)) => {}
            Ok(None) => return false,
            Err(_) => return true,
        }
    }
}
