//! The kinds of refs.

use serde::{Deserialize, Serialize};

/// Kind of a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RefKind {
    /// An image, by its reference.
    Image,
    /// A worker's sandbox, by the worker's name.
    Worker,
    /// A managed worker, by its name.
    Managed,
    /// A snapshot of a worker's files, by the worker's name and a tag.
    Snapshot,
    /// A cache volume, by its id. It keeps its layers only as long as garbage collection has no
    /// reason to drop it: see [`crate::volume`].
    Volume,
}

impl RefKind {
    /// All kinds.
    pub const ALL: [Self; 5] = [
        Self::Image,
        Self::Worker,
        Self::Managed,
        Self::Snapshot,
        Self::Volume,
    ];

    /// Where its refs are, relative to the store.
    pub(crate) fn path(self) -> &'static str {
        match self {
            Self::Image => "refs/image",
            Self::Worker => "refs/worker",
            Self::Managed => "refs/managed",
            Self::Snapshot => "refs/snapshot",
            Self::Volume => "refs/volume",
        }
    }

    /// The ro-compat feature of a store that has such refs, if they are newer than the first
    /// stores: a program that does not know them would collect their layers.
    pub(crate) fn feature(self) -> Option<&'static str> {
        match self {
            Self::Image | Self::Worker => None,
            Self::Managed => Some("managed_refs"),
            Self::Snapshot => Some("snapshot_refs"),
            Self::Volume => Some("volume_refs"),
        }
    }
}
