//! The layers of an image become layers of the store, each unpacked once.
//!
//! A layer is known by its diff id, so whatever image brings it, in whatever compression, it is
//! unpacked only if the store does not have it. The few that depend on layers below them (a
//! hardlink into a lower layer, an opaque directory that has no entry) are known by the diff ids of
//! the whole chain.

use std::cell::Cell;
use std::collections::HashMap;
use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use iii_store::{KeyId, Layer, LayerId, Lease, Published, Record, Store, StoreError};

use super::digest::Digest;
use super::stream::{self, Promise, StreamError};
use super::tar::TarError;
use super::unpack::{self, Dialect, UnpackError, Unpacked};
use super::{Event, ImageError, Limits, Passed, Progress};

const KEY_CONTEXT: &str = "iii 2026 base layer by diff_id v1";
/// Apart from the other, so that a layer that must be the lowest is not taken for one that depends
/// on nothing.
const CHAIN_CONTEXT: &str = "iii 2026 base layer by chain of diff_ids v1";
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

impl LayerError {
    /// The exceeded limit, if that is the fault.
    pub fn passed(&self) -> Option<Passed> {
        match self {
            Self::Stream(StreamError::Limit(passed))
            | Self::Unpack(
                UnpackError::Limit { passed, .. }
                | UnpackError::Tar(TarError::Limit { passed, .. }),
            ) => Some(*passed),
            _ => None,
        }
    }
}

/// The blob of one layer, to be read only if it is needed.
pub struct Blob<'a> {
    /// Its name in messages: its digest, or its name in an archive.
    pub name: String,
    /// Digest of its plain bytes.
    pub diff_id: Digest,
    /// Its digest as it is stored, where one is promised.
    pub digest: Option<Digest>,
    /// Its length as it is stored.
    pub size: u64,
    /// Opens it.
    pub open: Open<'a>,
}

/// Opens a blob.
pub type Open<'a> = Box<dyn Fn() -> Result<Box<dyn Read + Send>, ImageError> + Send + Sync + 'a>;

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

/// Most layers of one image that are read at once.
pub const MAX_PARALLEL: usize = 3;

/// Brings the layers of an image, bottom first, into the store, pinned by `lease`. Up to
/// [`MAX_PARALLEL`] of them are read at once, on threads that end before this returns. Each is
/// durable, and known to the next try, as soon as it is whole.
pub fn realise(
    store: &Store,
    lease: &Lease,
    blobs: &[Blob<'_>],
    limits: &Limits,
    progress: &Progress<'_>,
) -> Result<Realised, ImageError> {
    let run = Run {
        store,
        lease,
        blobs,
        limits,
        progress,
        next: AtomicUsize::new(0),
        stop: AtomicBool::new(false),
        results: Mutex::default(),
    };
    thread::scope(|scope| {
        // The first thread is this one.
        for _ in 1..MAX_PARALLEL.min(blobs.len()) {
            let thread = thread::Builder::new().spawn_scoped(scope, || run.work());
            if thread.is_err() {
                // Fewer do it as well.
                break;
            }
        }
        run.work();
    });
    let mut results = run
        .results
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    if let Some(error) = results.failed {
        return Err(error);
    }
    let mut realised = Realised::default();
    let mut below: Vec<Arc<Layer>> = Vec::new();
    let never = AtomicBool::new(false);
    for (index, blob) in blobs.iter().enumerate() {
        let one = match results.done.remove(&index) {
            Some(one) => one,
            // It depends on what is below, or is the same as another one.
            None => One {
                store,
                lease,
                blob,
                limits,
                progress,
                index,
                count: blobs.len(),
                chain: chain(blobs, index),
                stop: &never,
            }
            .realise(Dialect::Layer(&below))?,
        };
        if let Some(published) = &one.published {
            realised.new_files += published.new_files;
            realised.new_bytes += published.new_bytes;
        }
        realised.layers.push(one.layer.layer_id());
        below.push(one.layer);
    }
    Ok(realised)
}

/// The diff ids of a layer and all below it.
fn chain(blobs: &[Blob<'_>], index: usize) -> Vec<Digest> {
    blobs.iter().take(index + 1).map(|b| b.diff_id).collect()
}

/// State shared by the threads of one call.
struct Run<'a, 'b> {
    store: &'a Store,
    lease: &'a Lease,
    blobs: &'a [Blob<'b>],
    limits: &'a Limits,
    progress: &'a Progress<'a>,
    next: AtomicUsize,
    /// One has failed: the others need not go on.
    stop: AtomicBool,
    results: Mutex<Results>,
}

#[derive(Default)]
struct Results {
    done: HashMap<usize, Done>,
    /// The first error.
    failed: Option<ImageError>,
}

/// A layer in the store.
struct Done {
    layer: Arc<Layer>,
    /// Nothing if it was there.
    published: Option<Published>,
}

impl Run<'_, '_> {
    /// Takes one layer after the other. Those that depend on others are left.
    ///
    /// A layer that waited for those below it would hold its flight meanwhile, and two processes
    /// with two images could wait for each other forever. So it gives up, and is read again when
    /// they are there; few layers are like that.
    fn work(&self) {
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(blob) = self.blobs.get(index) else {
                return;
            };
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            let before = self.blobs.iter().take(index);
            if before
                .into_iter()
                .any(|other| other.diff_id == blob.diff_id)
            {
                continue;
            }
            let one = One {
                store: self.store,
                lease: self.lease,
                blob,
                limits: self.limits,
                progress: self.progress,
                index,
                count: self.blobs.len(),
                chain: chain(self.blobs, index),
                stop: &self.stop,
            };
            let dialect = if index == 0 {
                Dialect::Layer(&[])
            } else {
                Dialect::LayerAlone
            };
            let result = one.realise(dialect);
            let mut results = self.results.lock().unwrap_or_else(PoisonError::into_inner);
            match result {
                Ok(done) => drop(results.done.insert(index, done)),
                Err(ImageError::Layer {
                    source: LayerError::Unpack(UnpackError::NeedsBelow),
                    ..
                }) => {}
                Err(error) => {
                    self.stop.store(true, Ordering::Relaxed);
                    results.failed.get_or_insert(error);
                    return;
                }
            }
        }
    }
}

/// One layer on its way into the store.
struct One<'a, 'b> {
    store: &'a Store,
    lease: &'a Lease,
    blob: &'a Blob<'b>,
    limits: &'a Limits,
    progress: &'a Progress<'a>,
    index: usize,
    count: usize,
    /// Its diff id and those of all below it.
    chain: Vec<Digest>,
    stop: &'a AtomicBool,
}

impl One<'_, '_> {
    fn realise(&self, dialect: Dialect<'_>) -> Result<Done, ImageError> {
        let alone = key(KEY_CONTEXT, &[self.blob.diff_id]);
        let chained = key(CHAIN_CONTEXT, &self.chain);
        let find = || match known(self.store, self.lease, &alone)? {
            Some(layer) => Ok::<_, ImageError>(Some(layer)),
            None => known(self.store, self.lease, &chained),
        };
        let (index, count) = (self.index, self.count);
        let found = |layer| {
            (self.progress)(Event::Found { index, count });
            let published = None;
            Ok(Done { layer, published })
        };
        if let Some(layer) = find()? {
            return found(layer);
        }
        let _flight = self
            .store
            .flight(&alone, &|| (self.progress)(Event::Waiting))?;
        if let Some(layer) = find()? {
            return found(layer);
        }
        (self.progress)(Event::Layer {
            index,
            count,
            bytes: self.blob.size,
        });
        let ingest = self.store.ingest(self.lease)?;
        let Unpacked {
            tree,
            took_from_below,
        } = self.read(&ingest, dialect)?;
        let published = ingest.finish(&tree)?;
        let record = Record {
            facts: Vec::new(),
            layer_id: published.layer_id,
            tree_id: published.tree_id,
            provenance: serde_json::Map::from_iter([
                ("kind".to_owned(), "base".into()),
                ("diff_id".to_owned(), self.blob.diff_id.to_string().into()),
            ]),
        };
        let key = if took_from_below { &chained } else { &alone };
        self.store.put_record(key, record)?;
        (self.progress)(Event::Stored { index });
        Ok(Done {
            layer: self.store.layer(&published.layer_id)?,
            published: Some(published),
        })
    }

    fn read(
        &self,
        ingest: &iii_store::Ingest<'_>,
        dialect: Dialect<'_>,
    ) -> Result<Unpacked, ImageError> {
        let promise = Promise {
            digest: self.blob.digest,
            size: Some(self.blob.size),
            diff_id: Some(self.blob.diff_id),
        };
        let blob = Stoppable {
            blob: (self.blob.open)()?,
            stop: self.stop,
        };
        let report = |bytes| {
            (self.progress)(Event::Read {
                index: self.index,
                bytes,
            });
        };
        unpack_blob(blob, promise, ingest, dialect, self.limits, &report)
            .map(|(unpacked, _)| unpacked)
            .map_err(|source| ImageError::Layer {
                blob: self.blob.name.clone(),
                source,
            })
    }
}

/// A blob that ends when its reader has failed.
struct Stoppable<'a> {
    blob: Box<dyn Read + Send>,
    stop: &'a AtomicBool,
}

impl Read for Stoppable<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        self.blob.read(buf)
    }
}

/// Reads and unpacks a blob, reporting how many bytes of it have been read.
pub fn unpack_blob(
    blob: impl Read + Send,
    promise: Promise,
    ingest: &iii_store::Ingest<'_>,
    dialect: Dialect<'_>,
    limits: &Limits,
    progress: &dyn Fn(u64),
) -> Result<(Unpacked, stream::Seen), LayerError> {
    let read = AtomicU64::new(0);
    let reported = Cell::new(0);
    let report = |_| {
        let bytes = read.load(Ordering::Relaxed);
        if bytes >= reported.get() + REPORT {
            reported.set(bytes);
            progress(bytes);
        }
    };
    stream::read_blob(blob, promise, limits, &read, |plain| {
        Ok(unpack::unpack(plain, ingest, dialect, limits, &report)?)
    })
}

fn key(context: &str, diff_ids: &[Digest]) -> KeyId {
    let mut hasher = blake3::Hasher::new_derive_key(context);
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
