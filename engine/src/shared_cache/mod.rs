//! The shared layer cache: setup and install layers in a repository of any OCI registry, with the
//! facts that they hold for, so that what one machine has built others fetch. What lies there is
//! described in [`document`].
//!
//! Who may write to a cache decides what runs in the sandboxes of those who name it. So a cache is
//! named by whoever runs a build and by nobody else, a record that was fetched remembers its cache,
//! and without naming that cache again it is as if it were not there: [`Caches::trusts`].
//!
//! What is fetched is checked as in a pull, and has to be the tree that its record says. A cache
//! that fails costs a line and is not asked again in the same run; it never fails a build.

pub mod document;

use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use iii_oci::export::{
    Compression, ExportError, LayerBlob, LayerTar, known_blob, put_layer, remember_blob,
};
use iii_oci::layers::{LayerError, unpack_blob};
use iii_oci::registry::Repository;
use iii_oci::stream::{Promise, StreamError, read_document};
use iii_oci::unpack::Dialect;
use iii_oci::{self as oci, Digest, Limits, Reference, ReferenceError, RegistryError, Settings};
use iii_store::{KeyId, Layer, LayerId, Lease, NodeRef, Published, Record, Store, StoreError};

use crate::plan::{self, Decision, Kind};

use document::{
    Descriptor, Document, DocumentError, FACTS, Index, LAYER, MANIFEST, Manifest, RECORD,
};

const SCHEME: &str = "docker://";
/// How long a cache may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// How long one that is asked may take to send the next bytes, and how often it is asked: it is
/// there to save time.
const IDLE: Duration = Duration::from_secs(10);
const TRIES: u32 = 2;
/// Most caches that are asked.
pub const MAX_CACHES: usize = 8;

/// The name of a cache: a repository, written `docker://HOST/REPO`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheName(Reference);

/// A text that names no cache.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CacheNameError {
    /// Not of that kind.
    #[error("{0:?} is not a cache: expected docker://HOST/REPOSITORY, without a tag")]
    Form(String),
    /// Not a repository.
    #[error("{text:?} is not a cache")]
    Reference {
        /// What was given.
        text: String,
        /// What is wrong with it.
        source: ReferenceError,
    },
}

impl FromStr for CacheName {
    type Err = CacheNameError;

    fn from_str(text: &str) -> Result<Self, CacheNameError> {
        let shown = || text.chars().take(200).collect();
        let name = text.strip_prefix(SCHEME);
        let last = name.and_then(|name| name.rsplit_once('/'));
        // Without a slash there is no telling a repository from a host.
        let Some(name) = name.filter(|_| last.is_some_and(|(_, last)| !last.contains([':', '@'])))
        else {
            return Err(CacheNameError::Form(shown()));
        };
        let reference = name.parse().map_err(|source| CacheNameError::Reference {
            text: shown(),
            source,
        })?;
        Ok(Self(reference))
    }
}

impl fmt::Display for CacheName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{SCHEME}{}/{}", self.0.registry(), self.0.repository())
    }
}

/// Which caches a run uses.
#[derive(Debug, Clone, Default)]
pub struct CacheOptions {
    /// Asked for what is not in the store, in this order.
    pub from: Vec<CacheName>,
    /// Given what this run used.
    pub to: Option<CacheName>,
}

/// Why a cache did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The registry failed.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// A document that could not be read.
    #[error("reading {what} failed")]
    Read {
        /// The document.
        what: String,
        /// The cause.
        source: StreamError,
    },
    /// A document that is of no use.
    #[error("{what} is of no use")]
    Document {
        /// The document.
        what: String,
        /// Why.
        source: DocumentError,
    },
    /// A layer that cannot be unpacked, or is not the blob that was promised.
    #[error("layer {digest} cannot be used")]
    Layer {
        /// The digest of its blob.
        digest: Digest,
        /// Why.
        source: LayerError,
    },
    /// A layer that is not the one of its record.
    #[error(
        "blob {digest} is the layer {actual}, but its record promises {expected}: it was refused"
    )]
    OtherLayer {
        /// The digest of the blob.
        digest: Digest,
        /// What it holds.
        actual: LayerId,
        /// What it should hold.
        expected: LayerId,
    },
    /// The layer of a record is not of the tree that it says.
    #[error("the record of layer {0} promises another tree: it was refused")]
    OtherTree(LayerId),
    /// A layer that does not fit into an archive.
    #[error("{kind} is not cached: {why}")]
    Unfit {
        /// The step.
        kind: Kind,
        /// Why.
        why: &'static str,
    },
    /// The layer could not be sent.
    #[error(transparent)]
    Export(#[from] ExportError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl CacheError {
    /// What the registry said, where that is what is wrong.
    pub fn registry(&self) -> Option<&RegistryError> {
        match self {
            Self::Registry(error) | Self::Export(ExportError::Registry(error)) => Some(error),
            _ => None,
        }
    }
}

/// What happens with caches.
#[derive(Debug)]
pub enum Event<'a> {
    /// A layer is being fetched.
    Fetching(oci::Event<'a>),
    /// Something of a cache is of no use, or a cache does not do what it should; the work goes on
    /// without.
    Failed(&'a CacheName, &'a CacheError),
}

/// Told what happens, from any thread.
pub type Progress<'a> = dyn Fn(Event<'_>) + Sync + 'a;

/// The caches of one run.
#[derive(Debug, Default)]
pub struct Caches {
    from: Vec<Cache>,
    to: Option<Cache>,
}

#[derive(Debug)]
struct Cache {
    name: CacheName,
    repository: Arc<Repository>,
    /// It failed: it is not asked again.
    failed: Arc<AtomicBool>,
}

impl Cache {
    fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }
}

/// A layer that a step needs.
#[derive(Clone, Copy)]
pub struct Wanted<'a> {
    /// Where it goes.
    pub store: &'a Store,
    /// Pins it.
    pub lease: &'a Lease,
    /// The step's key.
    pub key: &'a KeyId,
    /// Setup or install.
    pub kind: Kind,
    /// The project that its facts have to hold for.
    pub project: NodeRef<'a>,
    /// How much of anything it may bring.
    pub limits: &'a Limits,
}

/// A layer that was fetched, or whose record was, and is in the store.
pub struct Fetched {
    /// For the store.
    pub record: Record,
    /// What was new of it; nothing if the store had the layer.
    pub published: Option<Published>,
    /// The layer.
    pub layer: Arc<Layer>,
    /// The cache, as a record names it.
    pub origin: String,
}

/// What a step's layer is recorded as.
#[derive(Debug, Clone)]
pub struct Recorded {
    /// Setup or install.
    pub kind: Kind,
    /// The step's key.
    pub key: KeyId,
    /// The record.
    pub record: Record,
    /// Whether this run made it.
    pub is_new: bool,
}

impl Caches {
    /// The caches that `options` name. Nothing is asked yet.
    pub fn new(options: &CacheOptions, settings: &Settings) -> Result<Self, RegistryError> {
        let mut settings = settings.clone();
        settings.patience.connect = CONNECT;
        let mut asking = settings.clone();
        asking.patience.idle = IDLE;
        asking.patience.tries = TRIES;
        let from = options.from.iter().take(MAX_CACHES).map(|name| {
            Ok(Cache {
                name: name.clone(),
                repository: Repository::new(&name.0, &asking)?,
                failed: Arc::default(),
            })
        });
        let from = from.collect::<Result<Vec<_>, RegistryError>>()?;
        let to = options.to.as_ref().map(|name| {
            let same = from.iter().find(|cache| cache.name == *name);
            Ok(Cache {
                name: name.clone(),
                repository: Repository::for_push(&name.0, &settings)?,
                failed: same.map_or_else(Arc::default, |same| Arc::clone(&same.failed)),
            })
        });
        let to = to.transpose()?;
        Ok(Self { from, to })
    }

    /// Whether a record of this origin may be used: one that was built here, or that came from a
    /// cache that this run names, too.
    pub fn trusts(&self, origin: Option<&str>) -> bool {
        origin.is_none_or(|origin| {
            let mut names = self.from.iter().map(|cache| cache.name.to_string());
            names.any(|name| name == origin)
        })
    }

    /// Asks one cache after the other for a layer. The caller keeps others from building it
    /// meanwhile, and records it.
    pub fn fetch(&self, wanted: Wanted<'_>, progress: &Progress<'_>) -> Option<Fetched> {
        self.from
            .iter()
            .filter(|cache| !cache.has_failed())
            .find_map(|cache| match cache.fetch(wanted, progress) {
                Ok(found) => found,
                Err(error) => {
                    cache.failed.store(true, Ordering::Relaxed);
                    progress(Event::Failed(&cache.name, &error));
                    None
                }
            })
    }

    /// Whether there is one to be given layers.
    pub fn takes(&self) -> bool {
        self.to.as_ref().is_some_and(|cache| !cache.has_failed())
    }

    /// Gives the cache that takes layers those of these that it lacks, until `stop`. They must be
    /// pinned.
    pub fn push(
        &self,
        store: &Store,
        layers: &[Recorded],
        stop: &AtomicBool,
        progress: &Progress<'_>,
    ) {
        let Some(cache) = &self.to else {
            return;
        };
        for layer in layers {
            if cache.has_failed() || stop.load(Ordering::Relaxed) {
                return;
            }
            if let Err(error) = cache.push(store, layer, stop) {
                // What one layer is like says nothing of the others.
                if !matches!(error, CacheError::Unfit { .. }) {
                    cache.failed.store(true, Ordering::Relaxed);
                }
                progress(Event::Failed(&cache.name, &error));
            }
        }
    }
}

impl Cache {
    fn fetch(
        &self,
        wanted: Wanted<'_>,
        progress: &Progress<'_>,
    ) -> Result<Option<Fetched>, CacheError> {
        let Some(index) = self.index(wanted.key)? else {
            return Ok(None);
        };
        for entry in &index.manifests {
            let (document, blob) = match self.record(entry, wanted) {
                Ok(found) => found,
                Err(error @ CacheError::Document { .. }) => {
                    // Others may be right.
                    progress(Event::Failed(&self.name, &error));
                    continue;
                }
                Err(error) => return Err(error),
            };
            let diff_id = document.diff_id;
            let origin = self.name.to_string();
            let record = document.into_record(&origin);
            let records = std::slice::from_ref(&record);
            if let Decision::Run(_) = plan::decide(records, wanted.project) {
                continue;
            }
            let (layer, published) =
                layer(&self.repository, &record, &blob, diff_id, wanted, progress)?;
            return Ok(Some(Fetched {
                record,
                published,
                layer,
                origin,
            }));
        }
        Ok(None)
    }

    /// The records of a key, if there are any.
    fn index(&self, key: &KeyId) -> Result<Option<Index>, CacheError> {
        let what = || format!("the index of {key}");
        let opened = match self.repository.manifest(&key.to_string()) {
            Err(RegistryError::NotFound { .. }) => return Ok(None),
            opened => opened?.0,
        };
        let bytes = read(opened, Promise::default(), &Limits::default(), what)?;
        let index = Index::parse(&bytes).map_err(not_of_use(what))?;
        Ok(Some(index))
    }

    fn manifest(&self, entry: &Descriptor) -> Result<Manifest, CacheError> {
        let what = || format!("the manifest {}", entry.digest);
        let (reader, _) = self.repository.manifest(&entry.digest.to_string())?;
        let bytes = read(reader, promise(entry), &Limits::default(), what)?;
        Manifest::parse(&bytes).map_err(not_of_use(what))
    }

    /// The record that an entry of the index leads to, and the blob of its layer.
    fn record(
        &self,
        entry: &Descriptor,
        wanted: Wanted<'_>,
    ) -> Result<(Document, Descriptor), CacheError> {
        let manifest = self.manifest(entry)?;
        let config = &manifest.config;
        let what = || format!("the record {}", config.digest);
        let limits = Limits {
            document: document::MAX_STORED,
            ..Limits::default()
        };
        if config.size > limits.document {
            let limit = DocumentError::Limit {
                what: "its length",
                limit: limits.document,
            };
            return Err(not_of_use(what)(limit));
        }
        let reader = self.repository.blob(config.digest, config.size)?;
        let bytes = read(reader, promise(config), &limits, what)?;
        let document =
            Document::parse(&bytes, wanted.key, wanted.kind).map_err(not_of_use(what))?;
        Ok((document, manifest.layer().clone()))
    }

    /// Adds a layer to the cache, unless it has one for the same facts that is as good. What others
    /// add to the same key at the same moment may be lost: the last one to write the index wins.
    fn push(&self, store: &Store, layer: &Recorded, stop: &AtomicBool) -> Result<(), CacheError> {
        let Recorded {
            key, kind, record, ..
        } = layer;
        let of = |what| move || format!("{what} of {key}");
        let facts = document::facts_hash(&record.facts).map_err(not_of_use(of("the record")))?;
        let layer_id = record.layer_id.to_string();
        let mut index = match self.index(key) {
            Ok(found) => found.unwrap_or_else(|| Index::new(Vec::new())),
            // Whatever stands there is no use to anybody.
            Err(CacheError::Document { .. }) => Index::new(Vec::new()),
            Err(error) => return Err(error),
        };
        let with_facts = |one: &&Descriptor| one.annotations.get(FACTS) == Some(&facts);
        if let Some(there) = index.manifests.iter().find(with_facts)
            && (!layer.is_new || there.annotations.get(LAYER) == Some(&layer_id))
        {
            return Ok(());
        }
        let blob = send_layer(store, record, *kind, &self.repository, stop)?;
        let document = Document::new(*key, *kind, record, blob.diff_id);
        let document = document.to_bytes().map_err(not_of_use(of("the record")))?;
        self.repository.put_blob(&document)?;
        let media_type = Compression::Zstd.media_type().to_owned();
        let manifest = Manifest::new(
            Descriptor::of(RECORD, &document),
            Descriptor {
                digest: blob.stored.digest,
                size: blob.stored.size,
                ..Descriptor::of(&media_type, b"")
            },
        );
        let manifest = document::to_json(&manifest).map_err(not_of_use(of("the manifest")))?;
        let digest = Digest::of(&manifest).to_string();
        self.repository.put_manifest(&digest, MANIFEST, &manifest)?;
        index.merge(Descriptor {
            artifact_type: Some(document::ARTIFACT.to_owned()),
            annotations: [(FACTS, facts), (LAYER, layer_id)]
                .map(|(name, value)| (name.to_owned(), value))
                .into(),
            ..Descriptor::of(MANIFEST, &manifest)
        });
        let index = document::to_json(&index).map_err(not_of_use(of("the index")))?;
        self.repository
            .put_manifest(&key.to_string(), document::INDEX, &index)?;
        Ok(())
    }
}

/// Sends the layer of a record, unless the registry has it.
fn send_layer(
    store: &Store,
    record: &Record,
    kind: Kind,
    repository: &Repository,
    stop: &AtomicBool,
) -> Result<LayerBlob, CacheError> {
    let layer = store.layer(&record.layer_id)?;
    let tar = LayerTar::new(store, &layer, &[])?;
    if tar.sockets().next().is_some() {
        let why = "it has a socket, which no archive can hold";
        return Err(CacheError::Unfit { kind, why });
    }
    let compression = Compression::Zstd;
    let known = known_blob(store, &tar, compression)?;
    if let Some(blob) = known
        && repository.has_blob(&blob.stored.digest)?
    {
        return Ok(blob);
    }
    let watch = |_| {
        if stop.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        Ok(())
    };
    let blob = put_layer(&tar.watched(&watch), compression, repository)?;
    if known != Some(blob) {
        remember_blob(store, &tar, compression, &blob)?;
    }
    Ok(blob)
}

fn promise(of: &Descriptor) -> Promise {
    Promise {
        digest: Some(of.digest),
        size: Some(of.size),
        diff_id: None,
    }
}

fn not_of_use(what: impl Fn() -> String) -> impl FnOnce(DocumentError) -> CacheError {
    move |source| CacheError::Document {
        what: what(),
        source,
    }
}

fn read(
    reader: impl io::Read,
    promise: Promise,
    limits: &Limits,
    what: impl Fn() -> String,
) -> Result<Vec<u8>, CacheError> {
    read_document(reader, promise, limits).map_err(|source| CacheError::Read {
        what: what(),
        source,
    })
}

/// The layer of a record: the store's, or the one that `blob` has to be.
fn layer(
    repository: &Arc<Repository>,
    record: &Record,
    blob: &Descriptor,
    diff_id: Digest,
    wanted: Wanted<'_>,
    progress: &Progress<'_>,
) -> Result<(Arc<Layer>, Option<Published>), CacheError> {
    let Wanted { store, lease, .. } = wanted;
    let expected = record.layer_id;
    lease.pin(&[expected])?;
    let (layer, published) = if store.has_layer(&expected) {
        (store.layer(&expected)?, None)
    } else {
        let show = |event| progress(Event::Fetching(event));
        show(oci::Event::Layer {
            index: 0,
            count: 1,
            bytes: blob.size,
        });
        let reader = repository.blob(blob.digest, blob.size)?;
        let promise = Promise {
            diff_id: Some(diff_id),
            ..promise(blob)
        };
        let ingest = store.ingest(lease)?;
        let read = |bytes| show(oci::Event::Read { index: 0, bytes });
        let unpacked = unpack_blob(
            reader,
            promise,
            &ingest,
            Dialect::LayerAlone,
            wanted.limits,
            &read,
        );
        // Its bar goes, whatever has become of it.
        show(oci::Event::Stored { index: 0 });
        let (unpacked, _) = unpacked.map_err(|source| CacheError::Layer {
            digest: blob.digest,
            source,
        })?;
        let published = ingest.finish(&unpacked.tree)?;
        if published.layer_id != expected {
            return Err(CacheError::OtherLayer {
                digest: blob.digest,
                actual: published.layer_id,
                expected,
            });
        }
        (store.layer(&expected)?, Some(published))
    };
    if layer.tree_id() != record.tree_id {
        return Err(CacheError::OtherTree(expected));
    }
    Ok((layer, published))
}
