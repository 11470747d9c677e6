//! `store serve`: layers and an upper over vhost-user-fs, to a virtual machine of the user.

use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::Arc;

use iii_overlay::adapter::vhost_user::{self, End, Socket, Tag, VhostUserError};
use iii_overlay::upper::UpperError;
use iii_overlay::{OpenError, Overlay, OverlayOptions, footing_of};
use iii_store::{Layer, LayerId, Store, StoreError};

use crate::build::{BuildError, ScratchDir};
use crate::home::Home;

/// Why nothing was served, or no longer.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "their messages say it")]
pub enum ServeError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the upper {} cannot be used", path.display())]
    Upper { path: PathBuf, source: UpperError },
    #[error(transparent)]
    Scratch(#[from] BuildError),
    #[error("composing the filesystem failed")]
    Compose(#[source] OpenError),
    #[error(transparent)]
    VhostUser(#[from] VhostUserError),
}

/// Layers to serve, and the socket.
#[derive(Debug, Clone)]
pub struct Options {
    /// The layers, bottom first.
    pub layers: Vec<LayerId>,
    /// Directory for the guest's files; without one they are dropped at the end.
    pub upper: Option<PathBuf>,
    /// Where the VMM connects.
    pub socket: PathBuf,
    /// How the guest calls it.
    pub tag: Tag,
    /// About how many threads answer.
    pub threads: usize,
}

/// How serving ended, and what was asked meanwhile.
#[derive(Debug)]
pub struct Served {
    /// Why it ended.
    pub end: End,
    /// Requests by operation.
    pub requests: Vec<(&'static str, u64)>,
}

/// Serves until the VMM goes or `stop` can be read from. The layers are pinned meanwhile.
/// `listening` is called once a VMM can connect.
pub fn serve(
    home: &Home,
    store: &Store,
    options: &Options,
    stop: BorrowedFd<'_>,
    listening: &dyn Fn(),
) -> Result<Served, ServeError> {
    // Remains of killed runs.
    crate::build::sweep(home);
    store.sweep_dead_leases()?;
    let lease = store.lease(&format!("serve {}", options.socket.display()))?;
    lease.pin(&options.layers)?;
    let (scratch, upper) = if let Some(upper) = &options.upper {
        (None, upper.clone())
    } else {
        let scratch = ScratchDir::new(home, "serve-")?;
        let upper = scratch.upper();
        (Some(scratch), upper)
    };
    // An upper that stood on other layers needs those once more.
    let last = footing_of(&upper).map_err(|source| ServeError::Upper {
        path: upper.clone(),
        source,
    })?;
    lease.pin(&last.unwrap_or_default().all().collect::<Vec<_>>())?;
    let layers = options.layers.iter().map(|id| store.layer(id));
    let layers = layers.collect::<Result<Vec<Arc<Layer>>, _>>()?;
    let overlay_options = OverlayOptions {
        volatile: scratch.is_some(),
        ..OverlayOptions::default()
    };
    let overlay = Overlay::open(store, layers, &upper, overlay_options);
    let overlay = Arc::new(overlay.map_err(ServeError::Compose)?);
    let socket = Socket::bind(&options.socket)?;
    listening();
    let end = vhost_user::serve(
        Arc::clone(&overlay),
        &socket,
        &options.tag,
        options.threads,
        stop,
    )?;
    let requests = overlay.stats();
    Ok(Served { end, requests })
}
