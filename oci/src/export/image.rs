//! An image: its layers, put in parallel, then its configuration, then its manifest.
//!
//! The digest of a layer's blob is recorded in the store once the blob exists, so that a
//! destination that has it is asked before anything is read or compressed. Everything is a function
//! of the layers and of their configuration, including the time of creation: the same image
//! has the same digest each time.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use iii_store::{KeyId, Layer, LayerId, Lease, Record, Store, StoreError};
use oci_spec::image::{
    Config, Descriptor, History, ImageConfiguration, ImageManifestBuilder, MediaType, Os, RootFs,
};

use super::{Compression, ExportError, LayerBlob, LayerTar, Sink, Stored};
use crate::digest::Digest;
use crate::tar::EntryName;
use crate::utc;
use crate::{ImageConfig, Platform};

/// Most layers that are compressed at once.
pub const MAX_PARALLEL: usize = 2;

const KEY_CONTEXT: &str = "iii 2026 exported layer v1";
/// The kind in the provenance of a record of a layer's blob.
pub const EXPORTED: &str = "exported";
/// The last second that RFC 3339 has a form for.
const LAST_SECOND: i64 = 253_402_300_799;
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// A layer of an image to be.
#[derive(Clone, Copy)]
pub struct Part<'a> {
    /// The layer.
    pub layer: &'a Layer,
    /// Description for the image's history.
    pub what: &'a str,
    /// Paths that are left out, with what is below them.
    pub omit: &'a [&'a [u8]],
    /// Whether to record its blob. The record keeps the layer as a recipe's does, for as
    /// long as the limits of the store allow: nothing for layers that the next build replaces.
    pub remember: bool,
}

/// An image that can be put anywhere.
pub struct Export<'a> {
    /// The store that has the layers.
    pub store: &'a Store,
    /// Pins the layers.
    pub lease: &'a Lease,
    /// Bottom first.
    pub parts: Vec<Part<'a>>,
    /// How it is run.
    pub config: ImageConfig,
    /// Labels by name.
    pub labels: HashMap<String, String>,
    /// Its platform.
    pub platform: Platform,
    /// When it was created, in seconds since 1970; without it, the newest time of an entry in its
    /// layers.
    pub created: Option<i64>,
    /// How its layers are compressed.
    pub compression: Compression,
}

/// A layer that is where it was to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct ExportedLayer {
    /// The layer in the store.
    pub layer_id: LayerId,
    /// Digest of its blob.
    pub digest: Digest,
    /// Digest of its plain archive.
    pub diff_id: Digest,
    /// Length of its blob, in bytes.
    pub size: u64,
    /// Whether it was known to be there, so that it was not even read.
    pub existed: bool,
}

/// An image that is where it was to go.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Exported {
    /// Digest of its manifest; in an archive, which has none, of its configuration.
    pub digest: Digest,
    /// Bottom first.
    pub layers: Vec<ExportedLayer>,
}

/// Events of an export, in any order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The destination has a layer.
    Found {
        /// From 0.
        index: usize,
    },
    /// A layer is being written.
    Layer {
        /// From 0.
        index: usize,
        /// How many there are.
        count: usize,
        /// Length of its plain archive.
        bytes: u64,
    },
    /// How much of its plain archive has been written.
    Written {
        /// Which layer.
        index: usize,
        /// Since its beginning.
        bytes: u64,
    },
    /// A layer is where it was to go.
    Stored {
        /// Which layer.
        index: usize,
    },
    /// A socket, which no image can hold.
    LeftOut {
        /// Where it is.
        entry: EntryName,
    },
}

/// Callback for events, from any thread.
pub type Progress<'a> = dyn Fn(&Event) + Sync + 'a;

/// An image whose layers can all be written: see [`Export::check`].
pub struct Checked<'a> {
    export: Export<'a>,
    tars: Vec<LayerTar<'a>>,
}

impl<'a> Export<'a> {
    /// Makes sure that its layers can be written, before anything is touched at the destination.
    pub fn check(self) -> Result<Checked<'a>, ExportError> {
        let tars = self
            .parts
            .iter()
            .map(|part| LayerTar::new(self.store, part.layer, part.omit));
        let tars = tars.collect::<Result<_, _>>()?;
        Ok(Checked { export: self, tars })
    }
}

impl Checked<'_> {
    /// Puts the image into `sink`, under `tag` if there is one. When this returns, it is durable
    /// there; when it fails, no image of the destination has changed.
    pub fn put(
        &self,
        sink: &dyn Sink,
        tag: Option<&str>,
        progress: &Progress<'_>,
    ) -> Result<Exported, ExportError> {
        for entry in self.tars.iter().flat_map(LayerTar::sockets) {
            progress(&Event::LeftOut { entry });
        }
        let run = Run {
            image: self,
            sink,
            progress,
            next: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            results: Mutex::default(),
        };
        thread::scope(|scope| {
            // The first thread is this one.
            for _ in 1..MAX_PARALLEL.min(self.tars.len()) {
                scope.spawn(|| run.work());
            }
            run.work();
        });
        let results = run
            .results
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = results.failed {
            return Err(error);
        }
        let mut layers = results.done;
        layers.sort_by_key(|(index, _)| *index);
        let layers: Vec<ExportedLayer> = layers.into_iter().map(|(_, layer)| layer).collect();
        let config = put_bytes(sink, &json(&self.configuration(&layers))?)?;
        let manifest = self.manifest(config, &layers)?;
        Ok(Exported {
            digest: sink.put_manifest(MANIFEST, &manifest, tag)?,
            layers,
        })
    }

    fn created(&self) -> String {
        let newest = || {
            let times = self.tars.iter().flat_map(LayerTar::mtimes);
            times.max().unwrap_or_default()
        };
        let seconds = self.export.created.unwrap_or_else(newest);
        utc::rfc3339(seconds.clamp(0, LAST_SECOND))
    }

    fn configuration(&self, layers: &[ExportedLayer]) -> ImageConfiguration {
        let created = self.created();
        let said = |words: &[String]| (!words.is_empty()).then(|| words.to_vec());
        let from = &self.export.config;
        let mut config = Config::default();
        config
            .set_env(said(&from.env))
            .set_user((!from.user.is_empty()).then(|| from.user.clone()))
            .set_working_dir((!from.working_dir.is_empty()).then(|| from.working_dir.clone()))
            .set_entrypoint(said(&from.entrypoint))
            .set_cmd(said(&from.cmd));
        if !self.export.labels.is_empty() {
            config.set_labels(Some(self.export.labels.clone()));
        }
        let history = self.export.parts.iter().map(|part| {
            let mut line = History::default();
            line.set_created(Some(created.clone()))
                .set_created_by(Some(format!("iii: {}", part.what)));
            line
        });
        let mut rootfs = RootFs::default();
        rootfs.set_diff_ids(
            layers
                .iter()
                .map(|layer| layer.diff_id.to_string())
                .collect(),
        );
        let mut configuration = ImageConfiguration::default();
        configuration
            .set_architecture(self.export.platform.arch())
            .set_os(Os::Linux)
            .set_created(Some(created.clone()))
            .set_config(Some(config))
            .set_rootfs(rootfs)
            .set_history(Some(history.collect()));
        configuration
    }

    fn manifest(&self, config: Stored, layers: &[ExportedLayer]) -> Result<Vec<u8>, ExportError> {
        let descriptor = |media_type: MediaType, digest: &Digest, size| {
            let digest: oci_spec::image::Digest =
                digest.to_string().parse().map_err(ExportError::Document)?;
            Ok::<_, ExportError>(Descriptor::new(media_type, size, digest))
        };
        let layers = layers.iter().map(|layer| {
            let media_type = self.export.compression.media_type().into();
            descriptor(media_type, &layer.digest, layer.size)
        });
        let manifest = ImageManifestBuilder::default()
            .schema_version(2_u32)
            .media_type(MediaType::ImageManifest)
            .config(descriptor(
                MediaType::ImageConfig,
                &config.digest,
                config.size,
            )?)
            .layers(layers.collect::<Result<Vec<_>, _>>()?)
            .build()
            .map_err(ExportError::Document)?;
        json(&manifest)
    }
}

/// A document as bytes that are the same each time: maps are sorted.
fn json(document: &impl serde::Serialize) -> Result<Vec<u8>, ExportError> {
    let value = serde_json::to_value(document).map_err(ExportError::Json)?;
    serde_json::to_vec(&value).map_err(ExportError::Json)
}

fn put_bytes(sink: &dyn Sink, bytes: &[u8]) -> Result<Stored, ExportError> {
    let stored = Stored {
        digest: Digest::of(bytes),
        size: bytes.len() as u64,
    };
    if sink.has_blob(&stored.digest, stored.size)? {
        return Ok(stored);
    }
    sink.put_blob(&mut |out| out.write_all(bytes).map_err(ExportError::Write))
}

/// State shared by the threads of one call.
struct Run<'a> {
    image: &'a Checked<'a>,
    sink: &'a dyn Sink,
    progress: &'a Progress<'a>,
    next: AtomicUsize,
    /// One has failed: the others need not go on.
    stop: AtomicBool,
    results: Mutex<Results>,
}

#[derive(Default)]
struct Results {
    done: Vec<(usize, ExportedLayer)>,
    /// The first error.
    failed: Option<ExportError>,
}

impl Run<'_> {
    fn work(&self) {
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(tar) = self.image.tars.get(index) else {
                return;
            };
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            let result = self.layer(index, tar);
            let mut results = self.results.lock().unwrap_or_else(PoisonError::into_inner);
            match result {
                Ok(layer) => results.done.push((index, layer)),
                Err(error) => {
                    self.stop.store(true, Ordering::Relaxed);
                    results.failed.get_or_insert(error);
                    return;
                }
            }
        }
    }

    fn layer(&self, index: usize, tar: &LayerTar<'_>) -> Result<ExportedLayer, ExportError> {
        let export = &self.image.export;
        let layer_id = tar.layer().layer_id();
        let exported = |blob: LayerBlob, existed| ExportedLayer {
            layer_id,
            digest: blob.stored.digest,
            diff_id: blob.diff_id,
            size: blob.stored.size,
            existed,
        };
        let known = known_blob(export.store, tar, export.compression)?;
        if let Some(blob) = known
            && self.sink.has_blob(&blob.stored.digest, blob.stored.size)?
        {
            (self.progress)(&Event::Found { index });
            return Ok(exported(blob, true));
        }
        (self.progress)(&Event::Layer {
            index,
            count: self.image.tars.len(),
            bytes: tar.size(),
        });
        let watch = |bytes| {
            if self.stop.load(Ordering::Relaxed) {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            (self.progress)(&Event::Written { index, bytes });
            Ok(())
        };
        let blob = super::blob::put_layer(&tar.watched(&watch), export.compression, self.sink)?;
        if export.parts.get(index).is_some_and(|part| part.remember) && known != Some(blob) {
            remember_blob(export.store, tar, export.compression, &blob)?;
        }
        (self.progress)(&Event::Stored { index });
        Ok(exported(blob, false))
    }
}

/// Key of the record of a layer's blob.
fn key(tar: &LayerTar<'_>, compression: Compression) -> KeyId {
    let mut hasher = blake3::Hasher::new_derive_key(KEY_CONTEXT);
    hasher.update(tar.layer().layer_id().as_bytes());
    let mut put = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    put(compression.as_str().as_bytes());
    tar.omitted().iter().for_each(|path| put(path));
    hasher.finalize().into()
}

/// Records the blob of a layer.
pub fn remember_blob(
    store: &Store,
    tar: &LayerTar<'_>,
    compression: Compression,
    blob: &LayerBlob,
) -> Result<(), StoreError> {
    let layer = tar.layer();
    let provenance = [
        ("kind", EXPORTED.into()),
        ("compression", compression.as_str().into()),
        ("digest", blob.stored.digest.to_string().into()),
        ("size", blob.stored.size.into()),
        ("diff_id", blob.diff_id.to_string().into()),
    ];
    let record = Record {
        facts: Vec::new(),
        layer_id: layer.layer_id(),
        tree_id: layer.tree_id(),
        provenance: provenance
            .map(|(name, value): (_, serde_json::Value)| (name.to_owned(), value))
            .into_iter()
            .collect(),
    };
    store.put_record(&key(tar, compression), record).map(drop)
}

/// The blob of the last export, if recorded. It is only compared with the blobs of a destination.
pub fn known_blob(
    store: &Store,
    tar: &LayerTar<'_>,
    compression: Compression,
) -> Result<Option<LayerBlob>, StoreError> {
    let records = store.records(&key(tar, compression))?;
    let blob = |record: &Record| {
        let text = |name: &str| record.provenance.get(name)?.as_str();
        Some(LayerBlob {
            stored: Stored {
                digest: text("digest")?.parse().ok()?,
                size: record.provenance.get("size")?.as_u64()?,
            },
            diff_id: text("diff_id")?.parse().ok()?,
        })
    };
    Ok(records.first().and_then(blob))
}
