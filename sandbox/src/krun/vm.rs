//! The process of one microVM: opens the store and the overlay, enters the VM, and ends with it.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;

use iii_init::packet::Socket;
use iii_init::vm::{Hello, PORT};
use iii_overlay::adapter::Mode;
use iii_overlay::adapter::krun::{INIT_PATH, Krun};
use iii_overlay::{Aside, OpenError, Overlay, OverlayOptions, Project};
use iii_store::{Fact, LayerId, Store, StoreError};
use msb_krun::backends::fs::DynFileSystem;
use msb_krun::{
    VmBuilder, VsockConnectRequest, VsockNotifier, VsockPortBackend, VsockShutdown,
    VsockStreamBackend,
};
use rustix::process::setsid;
#[cfg(target_os = "linux")]
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};

use super::Machine;
#[cfg(target_os = "linux")]
use super::confine;
use crate::RemoteError;

/// The argument by which the program knows that it is to be a VM.
pub const MARKER: &str = "__sandbox-vm";

/// The guest's init, which `build.rs` has built.
static INIT: &[u8] = include_bytes!(env!("III_INIT"));

/// Where a process finds its own descriptors by name.
const DESCRIPTORS: &str = if cfg!(target_os = "linux") {
    "/proc/self/fd"
} else {
    "/dev/fd"
};

/// Bytes of console output that are kept. A guest can print without end.
const MAX_CONSOLE: u64 = 1 << 20;
/// Connections that a guest may make in its life. The tool keeps far fewer at once.
const MAX_CONNECTIONS: u32 = 1 << 20;

/// The orders of the process.
#[derive(Serialize, Deserialize)]
pub(super) struct VmPlan {
    pub store: PathBuf,
    layers: Vec<[u8; 32]>,
    pub upper: PathBuf,
    project: Option<(Vec<u8>, usize)>,
    observe: bool,
    aside: Aside,
    volatile: bool,
    quiet: bool,
    cpus: u8,
    memory_mib: u32,
    pub libkrunfw: PathBuf,
    pub console: PathBuf,
    pub volumes: Vec<VmVolume>,
}

/// A directory of the host that the guest may mount.
#[derive(Serialize, Deserialize)]
pub(super) struct VmVolume {
    pub tag: String,
    pub host: PathBuf,
}

impl VmPlan {
    pub fn new(machine: &Machine, volumes: Vec<VmVolume>) -> Self {
        let options = &machine.overlay;
        let project = options.project.as_ref();
        Self {
            store: machine.store.clone(),
            layers: machine.layers.iter().map(|id| *id.as_bytes()).collect(),
            upper: machine.upper.clone(),
            project: project.map(|project| (project.path.clone(), project.slot)),
            observe: options.observe,
            aside: options.aside.clone(),
            volatile: options.volatile,
            quiet: machine.mode == Mode::Quiet,
            cpus: machine.cpus,
            memory_mib: machine.memory_mib,
            libkrunfw: machine.libkrunfw.clone(),
            console: machine.console.clone(),
            volumes,
        }
    }
}

/// From the tool to the process.
#[derive(Serialize, Deserialize)]
pub(super) enum ToVm {
    Start(Box<VmPlan>),
}

/// From the process to the tool.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum FromVm {
    /// The guest has connected, and begun with these bytes. With the other end.
    Stream([u8; Hello::LEN]),
    /// The guest has shut down, with these observations of the overlay.
    Facts(Vec<Fact>),
    /// The process is confined, and asks for its guest's reach. With the end that is to be
    /// answered on, before anything is asked.
    Confined,
    /// There will be no VM.
    Failed(RemoteError),
}

/// Why there is no VM.
#[derive(Debug, thiserror::Error)]
enum VmError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("composing the guest's root filesystem failed")]
    Compose(#[from] OpenError),
    #[error("libkrun cannot run the microVM")]
    Krun(#[source] msb_krun::Error),
    #[cfg(target_os = "linux")]
    #[error("the microVM's process cannot be confined")]
    Confine(#[from] confine::ConfineError),
    #[error("cannot {0}")]
    Io(&'static str, #[source] io::Error),
}

fn at(operation: &'static str) -> impl FnOnce(io::Error) -> VmError {
    move |source| VmError::Io(operation, source)
}

/// Becomes the microVM that the tool asks for on standard input. To be called first in `main`.
/// Returns the exit code, or `None` where standard input is not a connection to the tool.
pub fn run() -> Option<i32> {
    // SAFETY: nothing but the standard streams is owned yet.
    unsafe { close_others() };
    let control = Socket::take_stdin().ok()?;
    let Ok(Some((ToVm::Start(plan), _))) = control.recv() else {
        return None;
    };
    let control = Arc::new(control);
    let Err(error) = enter(&control, *plan);
    let failed = FromVm::Failed(RemoteError::new(&error));
    // If the tool is gone, the failure reaches no process.
    let _ = control.send(&failed, &[]);
    Some(1)
}

fn enter(control: &Arc<Socket>, plan: VmPlan) -> Result<std::convert::Infallible, VmError> {
    // A session of its own, so that the terminal's Ctrl-C reaches the tool alone.
    setsid().map_err(|error| at("start a session")(error.into()))?;
    let log = File::create(&plan.console).map_err(at("open the console's log"))?;
    #[cfg(target_os = "linux")]
    confine(control, &plan)?;
    end_with_the_tool(Arc::clone(control))?;
    let console = console(log).map_err(at("read the console"))?;

    let store = Store::open(&plan.store)?;
    let layers = plan
        .layers
        .iter()
        .map(|id| store.layer(&LayerId::from_bytes(*id)));
    let layers = layers.collect::<Result<Vec<_>, _>>()?;
    let options = OverlayOptions {
        project: plan.project.map(|(path, slot)| Project { path, slot }),
        observe: plan.observe,
        aside: plan.aside,
        volatile: plan.volatile,
    };
    let overlay = Arc::new(Overlay::open(&store, layers, &plan.upper, options)?);
    let mode = if plan.quiet {
        Mode::Quiet
    } else {
        Mode::Observed
    };
    let root = Krun::new(Arc::clone(&overlay), mode, INIT, &plan.upper);
    let root = root.map_err(at("make a buffer"))?;

    let streams = Streams {
        control: Arc::clone(control),
        left: Mutex::new(MAX_CONNECTIONS),
    };
    let mut builder = VmBuilder::new()
        .machine(|machine| {
            machine
                .vcpus(plan.cpus)
                .memory_mib(plan.memory_mib as usize)
                .enable_inet_hijack(true)
        })
        .kernel(|kernel| kernel.krunfw_path(&plan.libkrunfw).init_path(INIT_PATH))
        .console(|out| out.output(format!("{DESCRIPTORS}/{}", console.as_raw_fd())))
        .vsock(|vsock| vsock.custom(PORT, Arc::new(streams)))
        .fs(|fs| fs.tag("/dev/root").custom(Box::new(root)))
        .fs(|fs| fs.tag("nothing").custom(Box::new(Nothing)));
    for volume in &plan.volumes {
        builder = builder.fs(|fs| fs.tag(&volume.tag).path(&volume.host));
    }
    let facts_to = Arc::clone(control);
    builder
        .on_exit(move |_| {
            let _ = facts_to.send(&FromVm::Facts(overlay.facts()), &[]);
        })
        .build()
        .and_then(msb_krun::Vm::enter)
        .map_err(VmError::Krun)
}

/// Gives up what this process and its guest do not need. Before it there may be no thread, and
/// behind it is nothing of the guest's.
#[cfg(target_os = "linux")]
fn confine(control: &Socket, plan: &VmPlan) -> Result<(), VmError> {
    // As many files as may be open: the guest's files in shared directories are some of them.
    let limit = getrlimit(Resource::Nofile);
    let most = Rlimit {
        current: limit.maximum,
        ..limit
    };
    setrlimit(Resource::Nofile, most)
        .map_err(|error| at("raise the limit of open files")(error.into()))?;
    std::fs::create_dir_all(&plan.upper).map_err(at("make the upper's directory"))?;
    let volumes = plan.volumes.iter().map(|volume| volume.host.as_path());
    let files = confine::Files {
        store: &plan.store,
        libkrunfw: &plan.libkrunfw,
        upper: &plan.upper,
        volumes: volumes.collect(),
    };
    let listener = confine::confine(&files, control.as_fd())?;
    control
        .send(&FromVm::Confined, &[listener.as_fd()])
        .map_err(at("talk to the tool"))
}

/// A second filesystem, for libkrun forwards the guest's Unix sockets to the host's where the root
/// is the only one.
struct Nothing;

impl DynFileSystem for Nothing {}

#[cfg(target_os = "linux")]
use iii_init::process::close_others;

/// Closes every descriptor but the standard streams: whatever the tool inherited and left open for
/// others. Compiled, and not run yet.
///
/// # Safety
///
/// No Rust value owns such a descriptor.
#[cfg(not(target_os = "linux"))]
unsafe fn close_others() {
    let Ok(entries) = std::fs::read_dir(DESCRIPTORS) else {
        return;
    };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let open: Vec<i32> = names.filter(|fd| *fd > 2).collect();
    for fd in open {
        // SAFETY: no code owns it; that of the directory that was read is closed already.
        unsafe { libc::close(fd) };
    }
}

/// Ends this process, and the VM in it, when the tool has gone.
fn end_with_the_tool(control: Arc<Socket>) -> Result<(), VmError> {
    let watch = move || {
        // The tool says nothing more.
        while let Ok(Some((ToVm::Start(_), _))) = control.recv() {}
        // SAFETY: nothing needs to be undone: what the guest was told to be written is written.
        unsafe { libc::_exit(0) };
    };
    let thread = thread::Builder::new().name("tool".into()).spawn(watch);
    thread.map(drop).map_err(at("start a thread"))
}

/// Copies the pipe's bytes to the log, as far as they fit.
fn console(log: File) -> io::Result<io::PipeWriter> {
    let (mut reader, writer) = io::pipe()?;
    rustix::stdio::dup2_stderr(&writer)?;
    let copy = move || {
        let _ = io::copy(&mut (&mut reader).take(MAX_CONSOLE), &mut &log);
        let _ = io::copy(&mut reader, &mut io::sink());
    };
    thread::Builder::new().name("console".into()).spawn(copy)?;
    Ok(writer)
}

/// The host's end of the guest's connections: each becomes a socket of the tool's.
struct Streams {
    control: Arc<Socket>,
    left: Mutex<u32>,
}

impl VsockPortBackend for Streams {
    fn connect(
        &self,
        _: VsockConnectRequest,
        _: VsockNotifier,
    ) -> io::Result<Box<dyn VsockStreamBackend>> {
        let mut left = super::lock(&self.left);
        *left = left.checked_sub(1).ok_or(io::ErrorKind::QuotaExceeded)?;
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        Ok(Box::new(Stream {
            ours,
            control: Arc::clone(&self.control),
            hello: Mutex::new(Some((Vec::new(), theirs))),
        }))
    }
}

/// One connection.
struct Stream {
    ours: UnixStream,
    control: Arc<Socket>,
    /// Received first bytes, and the tool's end, until the handover.
    hello: Mutex<Option<(Vec<u8>, UnixStream)>>,
}

impl VsockStreamBackend for Stream {
    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.ours).read(buffer)
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut hello = super::lock(&self.hello);
        let Some((come, theirs)) = &mut *hello else {
            return (&self.ours).write(bytes);
        };
        let taken = bytes.len().min(Hello::LEN - come.len());
        come.extend(bytes.iter().take(taken));
        if let Ok(bytes) = <[u8; Hello::LEN]>::try_from(come.as_slice()) {
            let theirs: BorrowedFd<'_> = theirs.as_fd();
            self.control.send(&FromVm::Stream(bytes), &[theirs])?;
            *hello = None;
        }
        Ok(taken)
    }

    fn shutdown(&self, how: VsockShutdown) -> io::Result<()> {
        self.ours.shutdown(match how {
            VsockShutdown::Read => std::net::Shutdown::Read,
            VsockShutdown::Write => std::net::Shutdown::Write,
            VsockShutdown::Both => std::net::Shutdown::Both,
        })
    }

    fn pollable(&self) -> Option<i32> {
        Some(self.ours.as_raw_fd())
    }
}
