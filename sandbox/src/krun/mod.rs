//! The libkrun runtime: a microVM, as the tool sees it.
//!
//! ```text
//! tool                        vm process (tool's own binary)         guest
//!  spawn self, socket = fd 0 ->
//!  VmPlan                    ->
//!                              confine itself
//!                             <- Confined + fd
//!                              open the store and the overlay
//!                              enter the VM                       ->  kernel, init
//!                             <- Stream(Control) + fd             <-  Hello(Control)
//!  Start, over that          ------------------------------------->   mounts
//!                             <- Stream(Input, ...) + fds         <-  Hello(...)
//!  Request                   ------------------------------------->
//!                            <------------------------------------    Report
//!  closes the control stream ------------------------------------->   sync, power off
//!                             <- Facts
//!                              exit
//! ```
//!
//! The process of the VM serves the guest's filesystem and holds its memory; the tool supervises
//! and never touches either. The guest sends framed messages and the output of its commands to the
//! tool. When the tool goes, the socket closes, and the process goes with the VM
//! in it.
//!
//! On Linux, that process gives up all that it does not need before it opens a layer (`confine`,
//! `filter`), and its connections are made by the tool (`watch`), where [`Reach`] allows them. On
//! macOS it is started in a sandbox of the system's (`seatbelt`).

#[cfg(target_os = "linux")]
mod confine;
#[cfg(target_os = "linux")]
mod filter;
#[cfg(any(target_os = "macos", test))]
mod seatbelt;
mod vm;
#[cfg(target_os = "linux")]
mod watch;

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, PipeReader, Read as _, Seek as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
#[cfg(not(target_os = "macos"))]
use std::process::Command;
use std::process::{Child, ExitStatus};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};

use iii_init::frame::{self, MAX_REPORT};
use iii_init::message::{MAIN, Report, Request};
use iii_init::packet::Socket;
use iii_init::vm::{FromGuest, Hello, Start, ToGuest, Volume};
use iii_overlay::adapter::Mode;
use iii_overlay::{MAX_FACTS, OverlayOptions};
use iii_store::{Fact, LayerId};
#[cfg(target_os = "linux")]
use rustix::process::Pid;
use rustix::process::Signal;

use super::commands::{Commands, News};
use super::reach::Reach;
use super::{SandboxError, SandboxSpec, Stdio};
use crate::tail::Tail;

#[cfg(target_os = "linux")]
pub use confine::has_landlock;
use vm::{FromVm, ToVm, VmPlan, VmVolume};
pub use vm::{MARKER, run};
#[cfg(target_os = "linux")]
use watch::Watch;

/// How long a guest has from the start of its process until its init speaks. With hardware that is
/// a fraction of a second; this is for machines that emulate it.
pub const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// Time of a guest beyond the grace of a stop, to carry out its init's orders and to shut down once
/// its command has ended.
const GOING_LIMIT: Duration = Duration::from_secs(30);
/// Time of a VM's process to end once its socket is closed.
const END_LIMIT: Duration = Duration::from_secs(1);
/// How often it is looked whether it has.
const END_POLL: Duration = Duration::from_millis(5);
/// Bytes at the end of a console log that are shown.
const CONSOLE_TAIL: u64 = 16 << 10;
/// Messages that wait for the guest to read them. More are not sent.
const MAX_UNREAD: usize = 256;
/// Streams of commands that are kept until they are asked for.
const MAX_STREAMS: usize = 16;

/// The machine that a command runs in, and the overlay that is its root. The layers, and those that
/// the upper stood on last, have to be pinned until the sandbox has ended.
#[derive(Clone, Debug)]
pub struct Machine {
    /// The store's directory.
    pub store: PathBuf,
    /// The layers, bottom first.
    pub layers: Vec<LayerId>,
    /// The upper's directory.
    pub upper: PathBuf,
    /// How to open the overlay.
    pub overlay: OverlayOptions,
    /// Whether the guest's kernel may cache.
    pub mode: Mode,
    /// Virtual cpus, at least 1.
    pub cpus: u8,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// The library with the guest's kernel.
    pub libkrunfw: PathBuf,
    /// File for the console's output; old contents go.
    pub console: PathBuf,
}

/// An event of a VM.
enum Event {
    Vm(FromVm, Vec<OwnedFd>),
    /// The VM's process is gone, or talks nonsense.
    VmGone,
    Guest(FromGuest),
    /// The guest's init is gone, or talks nonsense.
    GuestGone,
    /// All that one of the main command's output streams brought is where it belongs.
    Drained,
    /// Nothing of it is to be left after that.
    EndBy(Instant),
}

/// The way to the guest's init.
struct Guest {
    stream: UnixStream,
    /// To a thread that writes, since a guest that does not read may not delay others.
    frames: SyncSender<Vec<u8>>,
}

impl Guest {
    /// Where it cannot be told, it has ended, or will be ended. The error is that of a message that
    /// is too long.
    fn send(&self, message: &ToGuest) -> io::Result<()> {
        let _ = self.frames.try_send(frame::bytes_of(message)?);
        Ok(())
    }
}

/// A running microVM. Dropped, it is killed.
pub(super) struct Vm {
    child: Child,
    /// Closed by the tool's end, with which the VM's process ends.
    control: Arc<Socket>,
    console: PathBuf,
    /// The guest's reach, until its process has asked for it.
    #[cfg(target_os = "linux")]
    reach: Option<Reach>,
    events: Receiver<Event>,
    sender: Sender<Event>,
    guest: Arc<Mutex<Option<Guest>>>,
    commands: Arc<Commands>,
    /// Connected by the guest, and not asked for yet.
    streams: HashMap<Hello, OwnedFd>,
    /// Output streams that are not drained.
    draining: usize,
    /// The main command's wait status, once it has ended.
    exited: Option<i32>,
    /// Whether the guest's init has spoken.
    is_ready: bool,
    facts: Option<Vec<Fact>>,
    end_by: Option<Instant>,
    gone: bool,
    pub stdout: Option<PipeReader>,
    pub stderr: Option<PipeReader>,
}

impl Vm {
    /// Boots the machine and returns once the command has been executed in it.
    pub fn start(spec: &SandboxSpec, machine: &Machine) -> Result<Self, SandboxError> {
        if let Some(mount) = spec.mounts.iter().find(|m| m.read_only || !m.host.is_dir()) {
            let target = &mount.target;
            return Err(SandboxError::Spec(format!(
                "a microVM shares whole directories, to read and write; the mount at {target} is not of that kind"
            )));
        }
        let volumes = spec.mounts.iter().enumerate();
        let volumes = volumes.map(|(index, mount)| VmVolume {
            tag: format!("volume{index}"),
            host: mount.host.clone(),
        });
        let plan = VmPlan::new(machine, volumes.collect());
        let reach = spec.reach.clone().with_settings_of(&spec.host);
        let mut start = start(spec, &plan, &reach);
        let mut vm = Self::spawn(&spec.init, plan, &machine.console, &reach)?;
        let deadline = Instant::now() + BOOT_LIMIT;
        while !vm.is_ready {
            let event = vm.next_of_start(deadline)?;
            vm.is_ready = matches!(event, Some(Event::Guest(FromGuest::Ready)));
        }
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        start.now = now.unwrap_or_default();
        vm.send(&ToGuest::Start(Box::new(start)))?;
        vm.connect(spec.stdio, deadline)?;
        Ok(vm)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn commands(&self) -> Arc<Commands> {
        Arc::clone(&self.commands)
    }

    pub fn link(&self) -> Link {
        Link {
            guest: Arc::clone(&self.guest),
            events: self.sender.clone(),
        }
    }

    /// Waits until the machine is off. The command's status; SIGKILL's where a stop took too long.
    pub fn wait(&mut self) -> Result<ExitStatus, SandboxError> {
        // All output has to leave the guest before it shuts down.
        while self.exited.is_none() || self.draining > 0 {
            if self.gone && self.exited.is_none() {
                return Err(self.ended());
            }
            if self.gone {
                // Its streams end with it.
                let _ = self.reap();
            }
            match self.next(None) {
                Ok(Some(Event::Vm(FromVm::Failed(cause), _))) => return Err(cause.into()),
                Ok(_) => {}
                Err(_) => {
                    self.kill();
                    return Ok(ExitStatus::from_raw(Signal::KILL.as_raw()));
                }
            }
        }
        self.commands.close();
        if let Some(guest) = lock(&self.guest).take() {
            // The other threads that have it only see the end.
            let _ = guest.stream.shutdown(std::net::Shutdown::Both);
        }
        self.end_within(GOING_LIMIT);
        while !self.gone {
            match self.next(None) {
                // Its process is as trusted as its guest could not subvert it.
                Ok(Some(Event::Vm(FromVm::Facts(facts), _))) if facts.len() <= MAX_FACTS => {
                    self.facts = Some(facts);
                }
                Ok(_) => {}
                Err(_) => break,
            }
        }
        self.kill();
        Ok(ExitStatus::from_raw(self.exited.unwrap_or_default()))
    }

    /// Whether [`wait`](Self::wait) would not block on the command, asked for at most `timeout`.
    pub fn ends_within(&mut self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        while self.exited.is_none() && !self.gone {
            if self.next(Some(deadline)).is_err() {
                return false;
            }
        }
        true
    }

    /// The overlay's observations after the machine's end; `None` if it did not shut down by
    /// itself.
    pub fn facts(&mut self) -> Option<Vec<Fact>> {
        self.facts.take()
    }

    fn spawn(
        program: &Path,
        plan: VmPlan,
        console: &Path,
        reach: &Reach,
    ) -> Result<Self, SandboxError> {
        let (ours, theirs) = Socket::pair().map_err(SandboxError::Talk)?;
        #[cfg(target_os = "macos")]
        let mut command = seatbelt::confined(program, &plan, reach);
        #[cfg(not(target_os = "macos"))]
        let mut command = Command::new(program);
        let child = command
            .arg(vm::MARKER)
            .env_clear()
            .stdin(OwnedFd::from(theirs))
            .stdout(std::process::Stdio::null())
            .spawn()
            .map_err(|source| SandboxError::Spawn {
                program: program.to_owned(),
                source,
            })?;
        let (sender, events) = channel();
        let vm = Self {
            child,
            control: Arc::new(ours),
            console: console.to_owned(),
            #[cfg(target_os = "linux")]
            reach: Some(reach.clone()),
            events,
            sender,
            guest: Arc::default(),
            commands: Arc::default(),
            streams: HashMap::new(),
            draining: 0,
            exited: None,
            is_ready: false,
            facts: None,
            end_by: None,
            gone: false,
            stdout: None,
            stderr: None,
        };
        let start = ToVm::Start(Box::new(plan));
        vm.control.send(&start, &[]).map_err(SandboxError::Talk)?;
        let (control, sender) = (Arc::clone(&vm.control), vm.sender.clone());
        spawn_thread("vm", move || {
            while let Ok(Some((message, fds))) = control.recv() {
                if sender.send(Event::Vm(message, fds)).is_err() {
                    return;
                }
            }
            let _ = sender.send(Event::VmGone);
        })?;
        Ok(vm)
    }

    /// The next event of the machine's start; an event that prevents its start is an error.
    fn next_of_start(&mut self, deadline: Instant) -> Result<Option<Event>, SandboxError> {
        match self.next(Some(deadline)) {
            Ok(Some(Event::Vm(FromVm::Failed(cause), _))) => Err(cause.into()),
            Ok(Some(Event::Guest(FromGuest::Report(Report::Failed(MAIN, failure))))) => {
                Err(failure.into())
            }
            Ok(Some(Event::VmGone)) => Err(self.ended()),
            #[cfg(target_os = "linux")]
            Ok(Some(Event::Vm(FromVm::Confined, fds))) => {
                self.watch(fds)?;
                Ok(None)
            }
            Ok(event) => Ok(event),
            Err(RecvTimeoutError::Timeout) => {
                self.kill();
                // Of one that has spoken, it is known that guests run here.
                if self.is_ready {
                    return Err(self.ended());
                }
                Err(SandboxError::Boot {
                    limit: BOOT_LIMIT,
                    status: None,
                    console: self.console_tail(),
                })
            }
            Err(RecvTimeoutError::Disconnected) => Err(SandboxError::Killed),
        }
    }

    /// Starts a thread that makes the guest's connections and ends with its process.
    #[cfg(target_os = "linux")]
    fn watch(&mut self, mut fds: Vec<OwnedFd>) -> Result<(), SandboxError> {
        let (Some(listener), Some(reach)) = (fds.pop(), self.reach.take()) else {
            return Ok(());
        };
        let pid = Pid::from_child(&self.child);
        let watch = Watch::new(listener, pid).map_err(SandboxError::Watch)?;
        spawn_thread("network", move || {
            // Where it fails, the guest has no network any more.
            let _ = watch.answer(&reach);
        })
        .map(drop)
    }

    /// The next event, within what is left until `deadline` and the end that was set. `None` for
    /// an event that is dealt with.
    fn next(&mut self, deadline: Option<Instant>) -> Result<Option<Event>, RecvTimeoutError> {
        let event = if let Some(at) = deadline.into_iter().chain(self.end_by).min() {
            let left = at.saturating_duration_since(Instant::now());
            self.events.recv_timeout(left)?
        } else {
            let event = self.events.recv();
            event.map_err(|_| RecvTimeoutError::Disconnected)?
        };
        match event {
            Event::Vm(FromVm::Stream(hello), fds) => self.keep(hello, fds),
            Event::EndBy(at) => self.end_at(at),
            Event::Drained => self.draining = self.draining.saturating_sub(1),
            // A guest that only lost its init goes off by itself.
            Event::GuestGone => self.end_within(GOING_LIMIT),
            Event::Guest(FromGuest::Report(Report::Exited(MAIN, status))) => {
                self.exited.get_or_insert(status);
            }
            Event::Guest(FromGuest::Report(report)) if !is_main(&report) => {
                self.commands.report(report);
            }
            Event::VmGone => {
                self.gone = true;
                return Ok(Some(Event::VmGone));
            }
            event => return Ok(Some(event)),
        }
        Ok(None)
    }

    fn end_within(&mut self, limit: Duration) {
        self.end_at(Instant::now() + limit);
    }

    fn end_at(&mut self, at: Instant) {
        self.end_by = Some(self.end_by.map_or(at, |earlier| earlier.min(at)));
    }

    /// Keeps a stream that the guest has connected; the first control stream is read from now on.
    fn keep(&mut self, hello: [u8; Hello::LEN], mut fds: Vec<OwnedFd>) {
        let (Some(hello), Some(fd)) = (Hello::from_bytes(hello), fds.pop()) else {
            return;
        };
        if let Hello::Input(id) | Hello::Output(id) | Hello::Errors(id) = hello {
            if id != MAIN {
                self.commands.tell(id, News::Stream(hello, fd));
            } else if self.streams.len() < MAX_STREAMS {
                self.streams.entry(hello).or_insert(fd);
            }
            return;
        }
        let stream = UnixStream::from(fd);
        let mut guest = lock(&self.guest);
        if guest.is_some() {
            return;
        }
        let (Ok(mut reading), Ok(mut writing)) = (stream.try_clone(), stream.try_clone()) else {
            return;
        };
        let sender = self.sender.clone();
        let (frames, unwritten) = sync_channel::<Vec<u8>>(MAX_UNREAD);
        let telling = spawn_thread("to guest", move || {
            for frame in unwritten {
                if writing.write_all(&frame).is_err() {
                    return;
                }
            }
        });
        let listening = spawn_thread("guest", move || {
            let mut receiver = frame::Receiver::new(MAX_REPORT);
            while let Ok(frame::Received::Message(message)) = receiver.read(&mut reading) {
                if sender.send(Event::Guest(message)).is_err() {
                    return;
                }
            }
            let _ = sender.send(Event::GuestGone);
        });
        if listening.is_ok() && telling.is_ok() {
            *guest = Some(Guest { stream, frames });
        }
    }

    /// Waits for the main command to run, and connects its streams.
    fn connect(&mut self, stdio: Stdio, deadline: Instant) -> Result<(), SandboxError> {
        let wanted = [Hello::Input(MAIN), Hello::Output(MAIN), Hello::Errors(MAIN)];
        let mut running = false;
        // The guest connects them before it says that it runs, but they come another way.
        let [input, output, errors] = loop {
            if running && wanted.iter().all(|hello| self.streams.contains_key(hello)) {
                let streams = wanted.map(|hello| self.streams.remove(&hello));
                if let [Some(input), Some(output), Some(errors)] = streams {
                    break [input, output, errors];
                }
            }
            let event = self.next_of_start(deadline)?;
            running |= matches!(
                event,
                Some(Event::Guest(FromGuest::Report(Report::Running(MAIN))))
            );
        };
        let host = |source| SandboxError::Host {
            operation: "connect",
            path: "the standard streams".into(),
            source,
        };
        let (to_output, to_errors) = match stdio {
            Stdio::Inherit => {
                let stdin = rustix::stdio::stdin().try_clone_to_owned().map_err(host)?;
                let to = UnixStream::from(input);
                spawn_thread("stdin", move || {
                    let (mut from, mut to) = (File::from(stdin), to);
                    let _ = io::copy(&mut from, &mut to);
                    let _ = to.shutdown(std::net::Shutdown::Write);
                })?;
                (
                    rustix::stdio::stdout().try_clone_to_owned().map_err(host)?,
                    rustix::stdio::stderr().try_clone_to_owned().map_err(host)?,
                )
            }
            Stdio::Joined => {
                drop(input);
                let (stdout, output) = io::pipe().map_err(host)?;
                let errors = output.try_clone().map_err(host)?;
                self.stdout = Some(stdout);
                (output.into(), errors.into())
            }
            Stdio::Piped => {
                drop(input);
                let (stdout, to_output) = io::pipe().map_err(host)?;
                let (stderr, to_errors) = io::pipe().map_err(host)?;
                (self.stdout, self.stderr) = (Some(stdout), Some(stderr));
                (to_output.into(), to_errors.into())
            }
        };
        for (name, from, to) in [("stdout", output, to_output), ("stderr", errors, to_errors)] {
            let sender = self.sender.clone();
            spawn_thread(name, move || {
                // When the reader is gone, the guest's command sees it on its pipe.
                let _ = io::copy(&mut File::from(from), &mut File::from(to));
                let _ = sender.send(Event::Drained);
            })?;
            self.draining += 1;
        }
        Ok(())
    }

    fn send(&self, message: &ToGuest) -> Result<(), SandboxError> {
        match &*lock(&self.guest) {
            Some(guest) => guest.send(message).map_err(SandboxError::Talk),
            None => Ok(()),
        }
    }

    fn kill(&mut self) {
        self.commands.close();
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.gone = true;
    }

    /// Ends the VM's process, or lets it end by itself if it soon does: that its socket is closed
    /// can be its own doing.
    fn reap(&mut self) -> io::Result<ExitStatus> {
        let deadline = Instant::now() + END_LIMIT;
        while self.child.try_wait()?.is_none() && Instant::now() < deadline {
            thread::sleep(END_POLL);
        }
        self.kill();
        self.child.wait()
    }

    /// Why the VM's process is gone while something was expected of it.
    fn ended(&mut self) -> SandboxError {
        match self.reap() {
            Ok(status) if !self.is_ready => SandboxError::Boot {
                limit: BOOT_LIMIT,
                status: Some(status),
                console: self.console_tail(),
            },
            Ok(status) => SandboxError::MachineEnded {
                status,
                console: self.console_tail(),
            },
            Err(error) => SandboxError::Talk(error),
        }
    }

    /// The last lines of the console; it is the guest's, so they are made safe to show.
    fn console_tail(&self) -> Vec<String> {
        let mut bytes = Vec::new();
        let read = File::open(&self.console).and_then(|mut file| {
            let length = file.metadata()?.len();
            file.seek(io::SeekFrom::Start(length.saturating_sub(CONSOLE_TAIL)))?;
            file.take(CONSOLE_TAIL).read_to_end(&mut bytes)
        });
        if read.is_err() {
            bytes.clear();
        }
        let mut tail = Tail::default();
        tail.push(&bytes);
        tail.into_lines()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if !self.gone {
            self.kill();
        }
    }
}

/// Reaches the guest from other threads.
#[derive(Clone)]
pub(super) struct Link {
    guest: Arc<Mutex<Option<Guest>>>,
    events: Sender<Event>,
}

impl Link {
    pub fn request(&self, request: Request) {
        if let Request::Stop { grace, .. } = request
            && let Some(end) = Instant::now().checked_add(grace.saturating_add(GOING_LIMIT))
        {
            // Whether or not the guest does as it is told.
            let _ = self.events.send(Event::EndBy(end));
        }
        if let Some(guest) = &*lock(&self.guest) {
            let _ = guest.send(&ToGuest::Request(request));
        }
    }
}

fn is_main(report: &Report) -> bool {
    matches!(
        report,
        Report::Running(MAIN) | Report::Exited(MAIN, _) | Report::Failed(MAIN, _)
    )
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn spawn_thread(
    name: &str,
    run: impl FnOnce() + Send + 'static,
) -> Result<JoinHandle<()>, SandboxError> {
    let thread = thread::Builder::new().name(name.into()).spawn(run);
    thread.map_err(|source| SandboxError::Host {
        operation: "start",
        path: "a thread".into(),
        source,
    })
}

/// The first message to the guest, without the time.
fn start(spec: &SandboxSpec, plan: &VmPlan, reach: &Reach) -> Start {
    let hostname = spec.hostname();
    let mut host = spec.host.clone();
    // Elsewhere the connections are not made by this process, which knows where such a name server
    // is.
    if cfg!(target_os = "linux") {
        host.resolv_conf = host.resolv_conf.map(|text| reach.resolv_conf(&text));
    }
    let volumes = spec.mounts.iter().zip(&plan.volumes);
    Start {
        now: Duration::ZERO,
        files: host.files(&hostname),
        hostname,
        volumes: volumes
            .map(|(mount, volume)| Volume {
                tag: volume.tag.clone(),
                target: mount.target.clone(),
            })
            .collect(),
        command: spec.command(),
    }
}
