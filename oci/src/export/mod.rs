//! Images out of the store: layers as archives, and the places that take them.
//!
//! A layer is the same archive each time, on any machine, so a place that has it is sent nothing.
//! [`archive`] writes the tar stream of a layer, [`blob`] compresses it, [`Export`] puts the layers
//! of an image and its documents into one.
//!
//! Every destination is a [`Sink`]: it takes blobs in any order and from several threads, and then
//! the manifest that names them. A blob that no manifest names has no
//! account, so an export that is cut short has changed nothing.

pub mod archive;
pub mod blob;
mod destination;
mod docker_archive;
mod image;
mod layout;
mod remote;
mod tmp;

use std::io;
use std::path::{Path, PathBuf};

use iii_store::StoreError;

use super::digest::Digest;
use super::registry::RegistryError;
use super::tar::EntryName;

pub use archive::LayerTar;
pub use blob::{Compression, Hashing, LayerBlob, ParseCompressionError, put_layer};
pub use destination::{Destination, ParseDestinationError};
pub use docker_archive::DockerArchiveSink;
pub use image::{
    Checked, EXPORTED, Event, Export, Exported, ExportedLayer, Part, Progress, known_blob,
    remember_blob,
};
pub use layout::LayoutSink;

/// Where the blobs and the manifest of an image go: a layout, an archive, a registry.
pub trait Sink: Sync {
    /// Whether the blob is there already, whole, so that a manifest may name it.
    fn has_blob(&self, digest: &Digest, size: u64) -> Result<bool, ExportError>;

    /// Takes the output of `write` as one blob, whose digest and size are known afterwards. `write`
    /// may be called again from the beginning, and writes the same bytes each time. Blobs may be
    /// put from several threads at once; one that is there already is no error. It need not be
    /// durable when this returns.
    fn put_blob(&self, write: &mut WriteBlob<'_>) -> Result<Stored, ExportError>;

    /// Puts a manifest or an index under `tag`, or under its digest alone. Everything that it names
    /// has been put before. When this returns, it and what it names are durable.
    fn put_manifest(
        &self,
        media_type: &str,
        bytes: &[u8],
        tag: Option<&str>,
    ) -> Result<Digest, ExportError>;
}

/// Writes the bytes of a blob. A refusal of the writer is an [`ExportError::Write`].
pub type WriteBlob<'a> = dyn FnMut(&mut dyn io::Write) -> Result<(), ExportError> + 'a;

/// A blob in its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// Its digest.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
}

/// Why an image does not come to where it is to go.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// An entry that no archive of an image can hold.
    #[error("{entry}: {what}, so it cannot be in an image")]
    Entry {
        /// The entry.
        entry: EntryName,
        /// The fault.
        what: &'static str,
    },
    /// The contents of a file could not be read.
    #[error("{entry}: its contents cannot be read from the store")]
    Contents {
        /// The file.
        entry: EntryName,
        /// The cause.
        source: io::Error,
    },
    /// The destination did not take the bytes.
    #[error("writing to the destination failed")]
    Write(#[source] io::Error),
    /// A file or directory of the destination.
    #[error("{op} {} failed", path.display())]
    Io {
        /// The operation.
        op: &'static str,
        /// Path of the object.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A directory that cannot be taken for an OCI layout.
    #[error("{} is not an OCI layout: {why}", path.display())]
    NotALayout {
        /// The directory.
        path: PathBuf,
        /// The fault.
        why: &'static str,
    },
    /// A document of the image cannot be put together.
    #[error("putting the documents of the image together failed")]
    Document(#[source] oci_spec::OciSpecError),
    /// A document of the image cannot be written, or read again.
    #[error("writing the documents of the image failed")]
    Json(#[source] serde_json::Error),
    /// The registry did not take it.
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

fn io_error(op: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ExportError {
    move |source| ExportError::Io {
        op,
        path: path.to_owned(),
        source,
    }
}
