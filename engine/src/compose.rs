//! An overlay as the root of a sandbox.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use iii_overlay::adapter::Mode;
#[cfg(target_os = "linux")]
use iii_overlay::adapter::fuse::{self, Forgetter, FuseSession};
use iii_overlay::{OpenError, Overlay, OverlayOptions, UpdateError};
#[cfg(feature = "libkrun")]
use iii_sandbox::Machine;
use iii_sandbox::reach::Reach;
use iii_sandbox::{FuseServer, RootSource, Sandbox};
use iii_store::{Fact, Layer, LayerId, Store};

#[cfg(not(target_os = "linux"))]
use fuse::{Forgetter, FuseSession};

/// Threads that serve one sandbox.
const THREADS: usize = 4;

/// How sandboxes are kept apart from the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Isolation {
    /// Linux namespaces.
    Namespace,
    /// A microVM of its own.
    #[cfg(feature = "libkrun")]
    Machine(Hardware),
}

/// Parts of a microVM.
#[cfg(feature = "libkrun")]
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hardware {
    /// The library with the guest's kernel.
    pub libkrunfw: PathBuf,
    /// Virtual cpus.
    pub cpus: u8,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Reachable ports of the host's loopback, besides the engine.
    pub reach: Reach,
    /// The user asked for no microVM, so namespaces do if it does not boot.
    pub may_fall_back: bool,
}

impl Isolation {
    /// As the worker is told, and as `--runtime` calls it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Namespace => "namespace",
            #[cfg(feature = "libkrun")]
            Self::Machine(_) => "libkrun",
        }
    }

    /// Reachable ports of the host's loopback.
    pub fn reach(&self) -> Reach {
        match self {
            Self::Namespace => Reach::default(),
            #[cfg(feature = "libkrun")]
            Self::Machine(hardware) => hardware.reach.clone(),
        }
    }

    /// Whether namespaces do as well.
    pub fn may_fall_back(&self) -> bool {
        match self {
            Self::Namespace => false,
            #[cfg(feature = "libkrun")]
            Self::Machine(hardware) => hardware.may_fall_back,
        }
    }
}

/// Layers and an upper.
pub struct Composition<'a> {
    /// Where the layers are.
    pub store: &'a Store,
    /// The layers, bottom first. They and those that the upper stood on last are pinned.
    pub layers: Vec<Arc<Layer>>,
    /// The upper's directory.
    pub upper: PathBuf,
    /// How to open the overlay.
    pub options: OverlayOptions,
    /// How much a kernel may do without asking.
    pub mode: Mode,
    /// Where the console of a microVM is written to.
    pub console: PathBuf,
}

/// Results of an ended sandbox.
pub struct Left {
    /// The overlay.
    pub overlay: Arc<Overlay>,
    /// Its observations.
    pub facts: Vec<Fact>,
}

/// An overlay that this process serves.
pub struct Served {
    overlay: Arc<Overlay>,
    mode: Mode,
    /// Reaches its kernel, once it is mounted.
    forgetter: Arc<OnceLock<Forgetter>>,
}

/// Why a sandbox does not see a new project layer, or not all of it.
#[derive(Debug, thiserror::Error)]
pub enum ShowError {
    /// The overlay cannot take it.
    #[error("the running filesystem cannot take the changes")]
    Update(#[from] UpdateError),
    /// The kernel cannot be told: it is not mounted any more, say.
    #[error("the kernel cannot be told of the changes")]
    Forget(#[source] io::Error),
}

/// An overlay, and who serves it.
pub enum Composed {
    /// This process.
    Here(Served),
    /// The process of a microVM.
    #[cfg(feature = "libkrun")]
    There(Box<Machine>),
}

impl Composition<'_> {
    /// Opens the overlay, or has that done by the process that is to serve it.
    pub fn compose(&self, isolation: &Isolation) -> Result<Composed, OpenError> {
        match isolation {
            Isolation::Namespace => {
                let overlay = self.open(self.options.clone())?;
                Ok(Composed::Here(Served {
                    overlay: Arc::new(overlay),
                    mode: self.mode,
                    forgetter: Arc::default(),
                }))
            }
            #[cfg(feature = "libkrun")]
            Isolation::Machine(hardware) => Ok(Composed::There(Box::new(Machine {
                store: self.store.dir().to_owned(),
                layers: self.layers.iter().map(|layer| layer.layer_id()).collect(),
                upper: self.upper.clone(),
                overlay: self.options.clone(),
                mode: self.mode,
                cpus: hardware.cpus,
                memory_mib: hardware.memory_mib,
                libkrunfw: hardware.libkrunfw.clone(),
                console: self.console.clone(),
            }))),
        }
    }

    /// The results of the ended sandbox that ran on `composed`. `None` if its observations are
    /// lost, because its microVM did not shut down by itself.
    pub fn take_back(
        &self,
        composed: Composed,
        sandbox: &mut Sandbox,
    ) -> Result<Option<Left>, OpenError> {
        match composed {
            Composed::Here(Served { overlay, .. }) => {
                let facts = overlay.facts();
                Ok(Some(Left { overlay, facts }))
            }
            #[cfg(feature = "libkrun")]
            Composed::There(_) => {
                let Some(facts) = sandbox.facts() else {
                    return Ok(None);
                };
                let options = OverlayOptions {
                    observe: false,
                    ..self.options.clone()
                };
                let overlay = Arc::new(self.open(options)?);
                Ok(Some(Left { overlay, facts }))
            }
        }
    }

    fn open(&self, options: OverlayOptions) -> Result<Overlay, OpenError> {
        Overlay::open(self.store, self.layers.clone(), &self.upper, options)
    }
}

impl Composed {
    /// It as a root filesystem.
    pub fn root(&self) -> RootSource {
        match self {
            Self::Here(served) => served.root(),
            #[cfg(feature = "libkrun")]
            Self::There(machine) => RootSource::Machine(machine.clone()),
        }
    }

    /// It, if a new project layer can be shown in it while it runs.
    pub fn served(&self) -> Option<&Served> {
        match self {
            Self::Here(served) => Some(served),
            // Virtiofs has no way to tell the guest's kernel what it has to forget.
            #[cfg(feature = "libkrun")]
            Self::There(_) => None,
        }
    }
}

/// In place of the adapter to Linux's FUSE, on systems that have none: nothing is served.
#[cfg(not(target_os = "linux"))]
mod fuse {
    use std::io;
    use std::os::fd::OwnedFd;
    use std::sync::Arc;

    use iii_overlay::adapter::Mode;
    use iii_overlay::{Overlay, Stale};

    pub enum FuseSession {}

    pub enum Forgetter {}

    impl FuseSession {
        pub fn forgetter(&self) -> Forgetter {
            match *self {}
        }

        pub fn join(self) -> io::Result<()> {
            match self {}
        }
    }

    impl Forgetter {
        pub fn forget(&self, _: &Stale) -> io::Result<()> {
            match *self {}
        }
    }

    pub fn serve(_: Arc<Overlay>, _: OwnedFd, _: usize, _: Mode) -> io::Result<FuseSession> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

struct Server(FuseSession);

impl FuseServer for Server {
    fn join(self: Box<Self>) -> io::Result<()> {
        self.0.join()
    }
}

impl Served {
    /// The overlay.
    pub fn overlay(&self) -> &Arc<Overlay> {
        &self.overlay
    }

    /// Shows the sandbox `project` in place of the project's layer that it saw last. The layer is
    /// pinned, for as long as the upper stands on it.
    pub fn show(&self, project: &Arc<Layer>) -> Result<(), ShowError> {
        let stale = self.overlay.update(project)?;
        match self.forgetter.get() {
            Some(forgetter) => forgetter.forget(&stale).map_err(ShowError::Forget),
            None => Ok(()),
        }
    }

    /// The project's layer that the upper stands on. Another one with the same tree may have been
    /// shown since.
    pub fn project_layer(&self) -> Option<LayerId> {
        self.overlay.project_layer()
    }

    fn root(&self) -> RootSource {
        let (overlay, mode) = (Arc::clone(&self.overlay), self.mode);
        let slot = Arc::clone(&self.forgetter);
        RootSource::Fuse(Box::new(move |device| {
            let session = fuse::serve(overlay, device, THREADS, mode)?;
            let _ = slot.set(session.forgetter());
            Ok(Box::new(Server(session)))
        }))
    }
}
