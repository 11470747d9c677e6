//! Errors of the store.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use crate::id::{LayerId, ObjectId};
use crate::layer::LayerError;
use crate::pack::PackError;
use crate::tree::TreeError;

/// `error` and its chain of causes, on one line. The messages of all crates leave their cause to
/// `source`, so that each cause is printed once.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// An operation on the store that failed. The message names the operation and the path; the cause
/// is the `source`.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A system call on a file of the store failed.
    #[error("{op} {} failed", path.display())]
    Io {
        /// The operation, a verb such as "reading".
        op: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The data to store could not be read. The store itself is whole.
    #[error("reading the data to store failed")]
    Input(#[source] io::Error),
    /// The directory is in use for something else.
    #[error(
        "{} is not a store: it holds {found:?} and no `format` file; name an empty or a new directory",
        path.display()
    )]
    NotAStore {
        /// The directory.
        path: PathBuf,
        /// Something in it that no store has.
        found: String,
    },
    /// The store's format is one that this program does not know.
    #[error(
        "the store at {} has format version {version}, incompat features {incompat:?}: this program reads version {}; \
         use the program that made it, or another store directory",
        path.display(),
        crate::store::FORMAT_VERSION
    )]
    Unsupported {
        /// The store.
        path: PathBuf,
        /// Its version.
        version: u32,
        /// Its incompat features that are unknown here.
        incompat: Vec<String>,
    },
    /// The store is of an earlier layout.
    #[error(
        "the store at {} was made by an earlier iii; bring it up to date with `iii store migrate`, which keeps all of it",
        .0.display()
    )]
    Outdated(PathBuf),
    /// The store cannot be changed as a whole while another process uses it.
    #[error("the store at {} is in use ({purpose}); wait until it is not, or stop it", path.display())]
    InUse {
        /// The store.
        path: PathBuf,
        /// The purpose of that process.
        purpose: String,
    },
    /// The store can be read but not written.
    #[error("the store at {} is read-only here: {why}", path.display())]
    ReadOnly {
        /// The store.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// A layer file that cannot be read as one.
    #[error("layer {id} cannot be read ({})", path.display())]
    Layer {
        /// The layer.
        id: LayerId,
        /// Its file.
        path: PathBuf,
        /// The cause.
        source: LayerError,
    },
    /// The index of a pack that cannot be read as one.
    #[error("{} cannot be read", path.display())]
    Index {
        /// Its file.
        path: PathBuf,
        /// The cause.
        source: PackError,
    },
    /// A file of the store does not match its name.
    #[error("{} is damaged: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The contradiction.
        what: &'static str,
    },
    /// A JSON file of the store that does not parse.
    #[error("{} is damaged: it does not parse", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: serde_json::Error,
    },
    /// No such layer.
    #[error("layer {0} is not in the store")]
    MissingLayer(LayerId),
    /// No such object.
    #[error("object {0} is not in the store")]
    MissingObject(ObjectId),
    /// Other processes were always faster.
    #[error("other processes kept changing the cache volume {name}")]
    VolumeContended {
        /// The volume.
        name: String,
    },
    /// The tree cannot be encoded.
    #[error("the tree cannot be stored")]
    Tree(#[from] TreeError),
    /// A call of an ingest failed to write. Every later call of that ingest is refused with this
    /// same error, so that the first failure is the one that is reported.
    #[error(transparent)]
    Void(Arc<StoreError>),
    /// Nothing keeps any layer.
    #[error(
        "nothing keeps any of the {layers} layers in {}: no image, no worker and no running process names one, and no \
         record is to be kept; if all of it is to go, remove the directory",
        path.display()
    )]
    NothingKept {
        /// The store.
        path: PathBuf,
        /// How many there are.
        layers: u64,
    },
    /// More than a named bound.
    #[error("{what} is larger than the limit of {limit}")]
    TooLarge {
        /// The part that is too large.
        what: &'static str,
        /// The bound.
        limit: u64,
    },
}

impl StoreError {
    /// The kind of the input/output error behind this one, if there is one: tells a full disk from
    /// the rest.
    pub fn io_kind(&self) -> Option<io::ErrorKind> {
        match self {
            Self::Io { source, .. }
            | Self::Input(source)
            | Self::Layer {
                source: LayerError::Map(source),
                ..
            }
            | Self::Index {
                source: PackError::Map(source),
                ..
            } => Some(source.kind()),
            Self::Void(first) => first.io_kind(),
            _ => None,
        }
    }

    /// Whether the disk, or the user's quota, is full.
    pub(crate) fn is_full(&self) -> bool {
        let full = [io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded];
        self.io_kind().is_some_and(|kind| full.contains(&kind))
    }

    /// Whether the bytes of a file are not those that were stored. An I/O error is not damage: it
    /// says nothing about the file's contents.
    pub(crate) fn is_damage(&self) -> bool {
        match self {
            Self::Damaged { .. } | Self::Json { .. } => true,
            Self::Layer { .. } | Self::Index { .. } => self.io_kind().is_none(),
            _ => false,
        }
    }

    /// It and its causes.
    pub(crate) fn in_one_line(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(err) = cause {
            text.push_str(": ");
            text.push_str(&err.to_string());
            cause = err.source();
        }
        text
    }
}

/// Keeps the first error of work on several threads. Later work is refused with
/// it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Latch(Arc<OnceLock<Arc<StoreError>>>);

impl Latch {
    /// The first error, if there was one.
    pub(crate) fn check(&self) -> Result<(), StoreError> {
        self.0
            .get()
            .map_or(Ok(()), |first| Err(StoreError::Void(Arc::clone(first))))
    }

    /// Keeps an error, unless there was one before. Returns the one that is kept.
    pub(crate) fn set(&self, err: StoreError) -> StoreError {
        match err {
            StoreError::Void(_) => err,
            err => StoreError::Void(Arc::clone(self.0.get_or_init(|| Arc::new(err)))),
        }
    }
}

/// Adds operation and path to an [`io::Error`].
pub(crate) trait IoContext<T> {
    fn at(self, op: &'static str, path: &Path) -> Result<T, StoreError>;
}

impl<T, E: Into<io::Error>> IoContext<T> for Result<T, E> {
    fn at(self, op: &'static str, path: &Path) -> Result<T, StoreError> {
        self.map_err(|source| StoreError::Io {
            op,
            path: path.to_owned(),
            source: source.into(),
        })
    }
}
