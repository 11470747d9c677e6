//! Layers and a writable upper, merged into one filesystem, and the adapters that serve it.

pub mod adapter;
mod freeze;
pub mod fs;
pub mod ino;
mod lookups;
pub mod merge;
mod observe;
mod overlay;
pub mod rebase;
mod stats;
pub mod upper;
mod view;

use std::path::Path;

use iii_store::LayerId;
use iii_store::facts::Fact;

pub use freeze::FreezeError;
pub use observe::MAX_FACTS;
pub use overlay::{Objects, Overlay};

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
    /// The project's layer, whose changes win when the chain changes and of which facts are recorded.
    pub project: Option<Project>,
    /// Whether to record facts about the project.
    pub observe: bool,
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

/// The chain that the upper in `dir` stood on last, to be pinned before it is opened; none if there is no such upper.
pub fn chain_of(dir: &Path) -> Result<Option<Vec<LayerId>>, upper::UpperError> {
    if !dir.exists() {
        return Ok(None);
    }
    let opened = upper::Opened::new(dir)?;
    Ok(opened.chain().map(|chain| {
        chain
            .layers
            .iter()
            .copied()
            .map(LayerId::from_bytes)
            .collect()
    }))
}

impl Overlay {
    /// The facts about the project so far, sorted by path; none unless they are recorded.
    pub fn facts(&self) -> Vec<Fact> {
        self.observer.as_ref().map_or(Vec::new(), |o| o.facts())
    }

    /// How many requests of each kind were served.
    pub fn stats(&self) -> Vec<(&'static str, u64)> {
        self.stats.all()
    }
}
