//! An overlay as the root of a sandbox.

use std::io;
use std::sync::Arc;

use iii_overlay::Overlay;
use iii_overlay::adapter::fuse::{self, FuseSession, Mode};

use crate::sandbox::{FuseServer, RootSource};

/// Threads that serve one sandbox.
const THREADS: usize = 4;

struct Server(FuseSession);

impl FuseServer for Server {
    fn join(self: Box<Self>) -> io::Result<()> {
        self.0.join()
    }
}

/// `overlay`, served over FUSE by this process, as a root filesystem.
pub fn root(overlay: &Arc<Overlay>, mode: Mode) -> RootSource {
    let overlay = Arc::clone(overlay);
    RootSource::Fuse(Box::new(move |device| {
        let session = fuse::serve(overlay, device, THREADS, mode)?;
        Ok(Box::new(Server(session)))
    }))
}
