//! Layers and a writable upper, merged into one filesystem, and the adapters that serve it.
//!
//! ```text
//! adapter    /dev/fuse, vhost-user-fs                requests become calls of fs::Filesystem
//! fs         the trait, and what POSIX says          on Overlay, which counts and serves them
//! view       upper over lower                        names, entries, listings
//! upper      records by inode, log, flat files       what the sandbox changed
//! merge      layers to one index                     the lower, immutable
//! freeze     upper -> tree                           thaw    layer -> upper
//! rebase     upper -> upper over another chain
//! observe    what was looked at
//! aside      parts of a step's filesystem            apart   freezing without them
//! posix      errors, times                           objects contents of the layers' files
//! ```
//!
//! Nothing here knows images, projects' contents, a terminal or a network.
//!
//! # Invariants
//!
//! - A name from inside the sandbox is never a name on the host: data is stored by number or by
//!   hash, everything else in records. So no privileges are needed, and whatever uid, mode, device
//!   or xattr the sandbox sets is just kept.
//! - The lower is never written to, and nothing that was read from it is kept in memory but the
//!   tables of directories that several layers share, and the pages of the layer files.
//! - Memory is never ahead of the log: an operation that failed has changed nothing, one that was
//!   answered survives the death of this process, and one followed by `fsync` that of the machine
//!   (unless the upper is volatile).
//! - The first change of a lower file copies its data once, and only if its data changes; the copy
//!   is complete, and durable unless the upper is volatile, before anything names it.
//! - An inode keeps its number for the life of the mount, whatever is done to it. Numbers are not
//!   kept across mounts.
//! - A file or directory without a name lives until the kernel forgets it, in memory and in its
//!   flat file; not longer.
//! - No descriptor is held per inode: flat files and the store's files are opened through bounded
//!   caches.
//! - This server is the only one who changes anything, and the kernel the only client: see
//!   [`adapter::fuse`].
//!
//! # Locks
//!
//! One `RwLock` holds the upper's state and log: shared to look, exclusive to change, and never
//! held while file data is read, written, copied or synced, but by [`freeze`], for a bounded number
//! of bytes. Before it, requests that write to files take another, shared, and freezing takes that
//! exclusively: [`upper::writers`]. Taken under them, or alone, and never with one another: a shard
//! of the lookup counts, the cache of descriptors, the facts, the counts of hardlinks. Writes to
//! one file from several threads are kept apart by the client, as the Linux kernel does with its
//! inode lock; if it does not, the bytes of both arrive in some order.

pub mod adapter;
mod apart;
mod aside;
mod differ;
mod freeze;
pub mod fs;
mod hides;
mod host;
pub mod ino;
mod lookups;
pub mod merge;
mod objects;
mod observe;
mod overlay;
mod posix;
pub mod rebase;
mod stats;
mod thaw;
mod update;
pub mod upper;
mod view;

use std::path::Path;

use iii_store::LayerId;
use iii_store::facts::Fact;
use iii_store::id::ID_LEN;

pub use apart::Apart;
pub use aside::Aside;
pub use freeze::{FreezeError, HELD_BYTES};
pub use objects::Objects;
pub use observe::{MAX_FACT_BYTES, MAX_FACTS};
pub use overlay::Overlay;
pub use thaw::thaw;
pub use update::{Stale, UpdateError};

/// Where the project is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Project {
    /// The path of its root directory in the filesystem, such as `workspace`.
    pub path: Vec<u8>,
    /// The index of its layer in the chain, bottom first.
    pub slot: usize,
}

/// How to open an overlay.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct OverlayOptions {
    /// The project's layer, which [`Overlay::update`] replaces and of which facts are recorded.
    pub project: Option<Project>,
    /// Whether to record facts about the project.
    pub observe: bool,
    /// Parts that are not, or not only, the result when a step is frozen.
    pub aside: Aside,
    /// Whether the upper is thrown away if this process dies, so that nothing needs to be synced.
    pub volatile: bool,
}

/// Why an overlay cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The layers cannot be merged.
    #[error("the layers cannot be composed")]
    Merge(#[from] merge::MergeError),
    /// The upper cannot be used.
    #[error("the upper cannot be used")]
    Upper(#[from] upper::UpperError),
    /// [`Project::slot`] names no layer.
    #[error("the project's layer is not in the chain")]
    NoProject,
}

/// The layers that an upper stands on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Footing {
    /// The chain that it stood on last, bottom first.
    pub layers: Vec<LayerId>,
    /// Which of these is the project's.
    pub project: Option<usize>,
    /// The layers of the project whose changes it has taken over since, of which the last is the
    /// newest: see [`Overlay::update`].
    pub applied: Vec<LayerId>,
    /// The layer that it was made from, if it was: see [`thaw`].
    pub thawed: Option<LayerId>,
}

impl Footing {
    /// All layers that have to be there for the upper to be opened.
    pub fn all(&self) -> impl Iterator<Item = LayerId> {
        let layers = self.layers.iter().chain(&self.applied);
        layers.chain(&self.thawed).copied()
    }

    fn new(
        chain: &upper::record::Chain,
        applied: &[[u8; ID_LEN]],
        thawed: Option<[u8; ID_LEN]>,
    ) -> Self {
        let ids = |ids: &[[u8; ID_LEN]]| ids.iter().copied().map(LayerId::from_bytes).collect();
        Self {
            layers: ids(&chain.layers),
            project: chain.project.map(|slot| slot as usize),
            applied: ids(applied),
            thawed: thawed.map(LayerId::from_bytes),
        }
    }
}

/// The layers that the upper in `dir` stands on, to be pinned before it is opened; none if there is
/// no such upper.
pub fn footing_of(dir: &Path) -> Result<Option<Footing>, upper::UpperError> {
    if !dir.exists() {
        return Ok(None);
    }
    let opened = upper::Opened::new(dir)?;
    let footing = |chain| Footing::new(chain, opened.applied(), opened.thawed());
    Ok(opened.chain().map(footing))
}

/// The layer that the upper in `dir` was made from, if it was; another process may have it open. It
/// stays the same for as long as the upper is there.
pub fn thawed_of(dir: &Path) -> Result<Option<LayerId>, upper::UpperError> {
    let first = upper::log::first(dir, &upper::disk::HostDisk)?.unwrap_or_default();
    Ok(upper::thawed(&first).map(LayerId::from_bytes))
}

impl Overlay {
    /// The facts about the project so far, sorted by path; none unless they are recorded.
    pub fn facts(&self) -> Vec<Fact> {
        self.observer
            .as_ref()
            .map_or(Vec::new(), observe::Observer::facts)
    }

    /// How many requests of each kind were served.
    pub fn stats(&self) -> Vec<(&'static str, u64)> {
        self.stats.all()
    }

    /// Whether the kernel was told of the inode and has not forgotten it.
    pub fn remembers(&self, ino: ino::Ino) -> bool {
        self.lookups.has(ino)
    }
}
