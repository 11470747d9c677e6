//! The layers of an image become layers of the store, each unpacked once.
//!
//! A layer is known by its diff id, so whatever image brings it, in whatever compression, it is unpacked only if the
//! store does not have it. The few that depend on what is below them (a hardlink into a lower layer) are known by the diff
//! ids of the whole chain.

use std::cell::Cell;
use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use iii_store::{KeyId, Layer, LayerId, Lease, Record, Store, StoreError};

use super::digest::Digest;
use super::stream::{self, Promise, StreamError};
use super::unpack::{self, Dialect, UnpackError, Unpacked};
use super::{Event, ImageError, Limits};

const KEY_CONTEXT: &str = "iii 2026 base layer by diff_id v1";
/// Bytes of a blob between two reports of progress.
const REPORT: u64 = 1 << 20;

/// Why a layer's blob does not become a layer.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// Not the bytes that were promised, or not readable.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// Not an archive that can be unpacked.
    #[error(transparent)]
    Unpack(#[from] UnpackError),
}

/// The blob of one layer, to be read only if it is needed.
pub struct Blob<'a> {
    /// What it is called in messages: its digest, or its name in an archive.
    pub name: String,
    /// Digest of its plain bytes.
    pub diff_id: Digest,
    /// Its digest as it is stored, where one is promised.
    pub digest: Option<Digest>,
    /// Its length as it is stored.
    pub size: u64,
    /// Opens it.
    pub open: Box<dyn Fn() -> Result<Box<dyn Read + Send>, ImageError> + 'a>,
}

/// Layers in the store.
#[derive(Debug, Default)]
pub struct Realised {
    /// Bottom first.
    pub layers: Vec<LayerId>,
    /// Objects new to the store.
    pub new_files: u64,
    /// Their bytes.
    pub new_bytes: u64,
}

/// Brings the layers of an image, bottom first, into the store, pinned by `lease`.
pub fn realise(
    store: &Store,
    lease: &Lease,
    blobs: &[Blob<'_>],
    limits: &Limits,
    progress: &dyn Fn(Event<'_>),
) -> Result<Realised, ImageError> {
    let mut realised = Realised::default();
    let mut below: Vec<Arc<Layer>> = Vec::new();
    let mut chain = Vec::new();
    for (index, blob) in blobs.iter().enumerate() {
        progress(Event::Layer {
            index,
            count: blobs.len(),
            bytes: blob.size,
        });
        let alone = key(&[blob.diff_id]);
        chain.push(blob.diff_id);
        let chained = key(&chain);
        let find = || match known(store, lease, &alone)? {
            Some(layer) => Ok::<_, ImageError>(Some(layer)),
            None => known(store, lease, &chained),
        };
        let mut layer = find()?;
        if layer.is_none() {
            let _flight = store.flight(&alone, &|| progress(Event::Waiting))?;
            layer = find()?;
            if layer.is_none() {
                let ingest = store.ingest(lease)?;
                let Unpacked {
                    tree,
                    took_from_below,
                } = read(blob, &ingest, &below, limits, progress)?;
                let published = ingest.finish(&tree)?;
                realised.new_files += published.new_files;
                realised.new_bytes += published.new_bytes;
                let record = Record {
                    facts: Vec::new(),
                    layer_id: published.layer_id,
                    tree_id: published.tree_id,
                    provenance: serde_json::Map::from_iter([
                        ("kind".to_owned(), "base".into()),
                        ("diff_id".to_owned(), blob.diff_id.to_string().into()),
                    ]),
                };
                store.put_record(if took_from_below { &chained } else { &alone }, record)?;
                layer = Some(store.layer(&published.layer_id)?);
            }
        }
        if let Some(layer) = layer {
            realised.layers.push(layer.layer_id());
            below.push(layer);
        }
    }
    Ok(realised)
}

fn read(
    blob: &Blob<'_>,
    ingest: &iii_store::Ingest<'_>,
    below: &[Arc<Layer>],
    limits: &Limits,
    progress: &dyn Fn(Event<'_>),
) -> Result<Unpacked, ImageError> {
    let promise = Promise {
        digest: blob.digest,
        size: Some(blob.size),
        diff_id: Some(blob.diff_id),
    };
    unpack_blob(
        (blob.open)()?,
        promise,
        ingest,
        Dialect::Layer(below),
        limits,
        progress,
    )
    .map(|(unpacked, _)| unpacked)
    .map_err(|source| ImageError::Layer {
        blob: blob.name.clone(),
        source,
    })
}

/// Reads and unpacks a blob, reporting how far it has come.
pub fn unpack_blob(
    blob: impl Read + Send,
    promise: Promise,
    ingest: &iii_store::Ingest<'_>,
    dialect: Dialect<'_>,
    limits: &Limits,
    progress: &dyn Fn(Event<'_>),
) -> Result<(Unpacked, stream::Seen), LayerError> {
    let read = AtomicU64::new(0);
    let reported = Cell::new(0);
    let report = |_| {
        let bytes = read.load(Ordering::Relaxed);
        if bytes >= reported.get() + REPORT {
            reported.set(bytes);
            progress(Event::Read { bytes });
        }
    };
    stream::read_blob(blob, promise, limits, &read, |plain| {
        Ok(unpack::unpack(plain, ingest, dialect, limits, &report)?)
    })
}

fn key(diff_ids: &[Digest]) -> KeyId {
    let mut hasher = blake3::Hasher::new_derive_key(KEY_CONTEXT);
    for diff_id in diff_ids {
        hasher.update(diff_id.as_bytes());
    }
    hasher.finalize().into()
}

/// The layer recorded under `key`, if it is there: pinned first, then looked for.
fn known(store: &Store, lease: &Lease, key: &KeyId) -> Result<Option<Arc<Layer>>, ImageError> {
    for record in store.records(key)? {
        lease.pin(&[record.layer_id])?;
        match store.layer(&record.layer_id) {
            Ok(layer) => return Ok(Some(layer)),
            Err(
                StoreError::MissingLayer(_) | StoreError::Layer { .. } | StoreError::Damaged { .. },
            ) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}
