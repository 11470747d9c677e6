//! Garbage collection: a plan that can be printed, and carrying it out.
//!
//! # Roots and limits
//!
//! Layers are kept by roots ([`crate::Roots`]). Refs and leases always count; a record of a key and
//! a cache volume count until the policy drops them, because a layer of theirs was not used for
//! long or because the store is too large. Objects are kept by layers: by every layer file that is
//! there, the ones in the trash and the rooted ones that repair set aside included. Policy never
//! looks at objects.
//!
//! # The number of files
//!
//! Each edit of a project adds a layer and a small pack. Both are bounded by count, not only by
//! bytes: a collection merges small packs by classes of size, and [`Store::has_many_files`] tells
//! the program when a collection is due for the sake of the number alone. So an operation costs the
//! same after any number of edits, and no limit of the kernel is reached; a store with more files
//! than that, which was never collected, works too, since each file is open only while it is read.
//!
//! # On a full disk
//!
//! A collection writes little, and on a disk without a free block or inode it removes the reserve
//! first: see `reserve`. A step that finds no room even so is left out, and done again when a later
//! step has freed something.
//!
//! # Beside writers and readers
//!
//! No process waits for a collection, nor the reverse; two collections never run at once. It
//! deletes in the order opposite to publishing, each step durable before the next begins:
//!
//! 1. Records and cache volumes are dropped.
//! 2. Layers without a root are moved into the trash. *Then* the roots are read again, and layers
//!    that got one meanwhile are moved back: a process writes its pin before looking for the layer,
//!    so either the pin is seen here, or the layer is not found there, and taken back from the
//!    trash or built anew.
//! 3. Layers that have been in the trash for the grace period are removed, and the oldest of too
//!    many.
//! 4. Objects that no layer file names are moved into the trash, whole packs and loose files; packs
//!    that are mostly dead, and small packs when there are many, are rewritten first. *Then* the
//!    leases are read: an ingest that is open may have found one of these objects before they were
//!    moved, and may yet publish a layer that names it. The generation waits for it. One that
//!    begins later does not find them.
//! 5. The layers that have appeared since step 4 began are looked through, and their objects are
//!    moved back.
//! 6. Generations that wait for no ingest are removed.
//!
//! An ingest does its part: it says in its lease that it has begun before it looks at the indexes,
//! and that it is done after its layer has its name and everything that it reuses is in its place,
//! if need be out of the trash. Readers, too, take back missing files. So a layer that is there
//! never names an object that is not.

mod collect;
mod plan;

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde::Serialize;

use crate::census::Census;
use crate::disk::{Space, names, on_disk};
use crate::error::{IoContext, StoreError};
use crate::id::{KeyId, LayerId, PackId};
use crate::layer::Layer;
use crate::lock::FileLock;
use crate::reserve;
use crate::roots::{Root, Roots};
use crate::store::Store;
use crate::trash;

use collect::Collection;
use plan::Planner;

/// A pack shorter than this is small.
const SMALL_PACK: u64 = 4 << 20;
/// Small packs are merged by classes of size, each so many times the one below, so that each byte
/// is written a few times at most.
const CLASS_FACTOR: u64 = 4;
/// The packs of the least class are at most this long.
const LEAST_CLASS: u64 = 16 << 10;
/// Most packs of one class that a collection leaves alone.
const MAX_IN_CLASS: usize = 6;
/// Most small packs before [`Store::has_many_files`]. More than collections leave alone: see
/// [`MAX_IN_CLASS`].
const MAX_SMALL_PACKS: usize = 48;
/// Most layers without a root before [`Store::has_many_files`].
const MAX_DEAD_LAYERS: usize = 32;
/// Packs that are written anew make packs of about this length at most.
const MAX_MERGED_PACK: u64 = 512 << 20;
/// Limits of the layers that are kept for reuse.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Layers of records are kept that were used within this time.
    pub keep: Duration,
    /// While the store is larger than this many bytes on disk, layers of records are dropped.
    pub max_bytes: Option<u64>,
    /// While the filesystem has fewer free bytes than this, layers of records are dropped, and the
    /// trash is not kept.
    pub min_free: Option<u64>,
    /// How long a layer stays in the trash, if it is among the last [`crate::MAX_TRASHED_LAYERS`]
    /// there.
    pub grace: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            keep: Duration::from_secs(14 * 86_400),
            max_bytes: Some(20 << 30),
            min_free: None,
            grace: Duration::from_secs(600),
        }
    }
}

/// Why a record is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// Its layer was not used for longer than [`Policy::keep`].
    Unused,
    /// The store is larger than [`Policy::max_bytes`].
    MaxSize,
    /// The filesystem has less free than [`Policy::min_free`].
    MinFree,
    /// Its layer is not there.
    Missing,
}

/// A layer that stays.
#[derive(Debug, Clone, Serialize)]
pub struct Kept {
    /// The layer.
    pub layer: LayerId,
    /// Sum of the sizes of its files.
    pub logical_bytes: u64,
    /// When it was last used.
    pub last_used: SystemTime,
    /// Its roots; never empty.
    pub roots: Vec<Root>,
}

/// A record that goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DroppedRecord {
    /// The recipe.
    pub key: KeyId,
    /// The layer that it made.
    pub layer: LayerId,
    /// Why.
    pub why: Why,
}

/// A cache volume that goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DroppedVolume {
    /// Its id.
    pub name: String,
    /// Its layers, bottom first.
    pub layers: Vec<LayerId>,
    /// Why.
    pub why: Why,
}

/// A layer that goes.
#[derive(Debug, Clone, Serialize)]
pub struct Garbage {
    /// The layer.
    pub layer: LayerId,
    /// Sum of the sizes of its files.
    pub logical_bytes: u64,
    /// When it was last used.
    pub last_used: SystemTime,
}

/// Plan of a collection. Carrying it out looks at everything again: nothing that is in use by
/// then goes.
#[derive(Debug, Clone, Default, Serialize)]
pub struct GcPlan {
    /// Present size of the store on disk, in bytes.
    pub store_bytes: u64,
    /// Layers that stay, the most recently used first.
    pub kept: Vec<Kept>,
    /// Records that go.
    pub records: Vec<DroppedRecord>,
    /// Cache volumes that go.
    pub volumes: Vec<DroppedVolume>,
    /// Layers that go into the trash.
    pub layers: Vec<Garbage>,
    /// Layers in the trash whose time is over.
    pub expired: Vec<LayerId>,
    /// Objects that go, and the sum of their lengths.
    pub objects: u64,
    /// See [`GcPlan::objects`].
    pub object_bytes: u64,
    /// Packs that go.
    pub dead_packs: u64,
    /// Packs whose living objects are written to a new one.
    pub rewritten_packs: u64,
    /// Stat caches of projects whose layer is gone.
    pub stat_caches: Vec<String>,
    /// Temporary files and leases that interrupted processes left.
    pub leftovers: u64,
    /// Bytes that the filesystem uses for them; part of [`GcPlan::frees`].
    pub leftover_bytes: u64,
    /// About how much is free after it.
    pub frees: u64,
    /// About how much more a later collection frees, when the grace period is over.
    pub frees_later: u64,
    /// By how much the store is still larger, or the filesystem still fuller, than the policy says:
    /// all that is left is kept by refs and leases.
    pub still_over: u64,
    /// Why no object can go: something of the store cannot be read.
    pub blocked: Option<String>,
    /// How long layers stay in the trash.
    #[serde(rename = "grace_seconds", serialize_with = "as_seconds")]
    pub grace: Duration,
}

fn as_seconds<S: serde::Serializer>(time: &Duration, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_u64(time.as_secs())
}

/// Result of a collection.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct GcReport {
    /// Bytes on disk that it freed, less the written ones.
    pub freed: u64,
    /// Records dropped.
    pub records: u64,
    /// Cache volumes dropped.
    pub volumes: u64,
    /// Layers moved into the trash, without those that were taken back.
    pub layers_trashed: u64,
    /// Layers removed.
    pub layers_removed: u64,
    /// Packs and loose objects removed.
    pub files_removed: u64,
    /// Packs whose living objects were written to a new one.
    pub packs_rewritten: u64,
    /// Temporary files and leases of interrupted processes that were removed.
    pub leftovers_removed: u64,
    /// Bytes that wait in the trash, for the grace period or for an ingest to end.
    pub waiting: u64,
}

/// Event of a running collection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GcEvent<'a> {
    /// Another collection runs; this one waits for it.
    Waiting,
    /// No object was removed: something of the store cannot be read.
    Blocked(&'a str),
    /// A pack is left as it is: one of its objects cannot be read.
    Unreadable(&'a PackId),
}

/// A layer file that is there.
struct Present {
    id: LayerId,
    path: PathBuf,
    bytes: u64,
    used: SystemTime,
}

impl Store {
    /// Plan of a collection by this policy.
    pub fn plan_gc(&self, policy: &Policy) -> Result<GcPlan, StoreError> {
        Planner::read(self)?.plan(policy)
    }

    /// Carries out a plan. Waits if another collection runs.
    pub fn gc(&self, plan: &GcPlan, events: &dyn Fn(GcEvent<'_>)) -> Result<GcReport, StoreError> {
        reserve::with_room(self.site(), || {
            // Says at once whether the store may be written.
            let lease = self.lease("gc")?;
            let on_wait = || events(GcEvent::Waiting);
            let _lock = FileLock::acquire(self.disk(), &self.gc_lock(), &on_wait)?;
            Collection::new(self, &lease, events).run(plan)
        })
    }

    /// Carries out a plan, unless another collection runs.
    pub fn try_gc(
        &self,
        plan: &GcPlan,
        events: &dyn Fn(GcEvent<'_>),
    ) -> Result<Option<GcReport>, StoreError> {
        reserve::with_room(self.site(), || {
            let lease = self.lease("gc")?;
            let Some(_lock) = FileLock::try_acquire(self.disk(), &self.gc_lock())? else {
                return Ok(None);
            };
            Collection::new(self, &lease, events).run(plan).map(Some)
        })
    }

    /// Whether the store has so many small packs, or layers that nothing keeps, that a collection
    /// is worth its time, however few bytes they have. Costs little where it has not. Once this
    /// process was told so, it takes a while until it is told again: a collection may have to leave
    /// them.
    pub fn has_many_files(&self) -> Result<bool, StoreError> {
        self.objects().refresh()?;
        let small = self.objects().count_packs(|len| len < SMALL_PACK);
        let layers = self.layer_ids()?;
        let dead = || -> Result<usize, StoreError> {
            if layers.len() <= MAX_DEAD_LAYERS {
                return Ok(0);
            }
            let roots = Roots::read(self)?;
            Ok(layers.iter().filter(|id| roots.of(id).is_empty()).count())
        };
        let is_many = small > MAX_SMALL_PACKS || dead()? > MAX_DEAD_LAYERS;
        let files = is_many.then_some(small + layers.len());
        Ok(self.is_time_to_collect(files, MAX_SMALL_PACKS))
    }

    /// Lock of processes that take files out of the store: one at a time.
    pub(crate) fn gc_lock(&self) -> PathBuf {
        self.dir().join("locks/gc")
    }

    /// How large the filesystem of the store is.
    pub fn space(&self) -> Result<Space, StoreError> {
        let space = self.disk().space(self.dir());
        space.at("asking for free space at", self.dir())
    }

    /// Size of the store on disk, in bytes.
    pub fn bytes_on_disk(&self) -> Result<u64, StoreError> {
        let mut total = 0;
        let mut dirs = vec![self.dir().to_owned()];
        while let Some(dir) = dirs.pop() {
            // A generation of the trash may go meanwhile.
            for name in trash::list(self.disk().as_ref(), &dir)? {
                let path = dir.join(name);
                match self.disk().metadata(&path) {
                    Ok(meta) if meta.is_dir() => dirs.push(path),
                    Ok(meta) => total += on_disk(&meta),
                    // It went meanwhile.
                    Err(err) if err.kind() == std::io::ErrorKind::NotFound => {}
                    Err(err) => return Err(err).at("looking at", &path),
                }
            }
        }
        Ok(total)
    }

    fn present_layers(&self) -> Result<Vec<Present>, StoreError> {
        let dir = self.dir().join("layers");
        let mut present = Vec::new();
        for name in names(self.disk().as_ref(), &dir)? {
            let Ok(id) = name.parse() else { continue };
            let path = dir.join(name);
            let Some(meta) = self.metadata(&path)? else {
                continue;
            };
            let used = meta.modified().at("looking at", &path)?;
            present.push(Present {
                id,
                bytes: on_disk(&meta),
                used,
                path,
            });
        }
        present.sort_by_key(|layer| layer.id);
        Ok(present)
    }

    pub(crate) fn metadata(&self, path: &Path) -> Result<Option<std::fs::Metadata>, StoreError> {
        match self.disk().metadata(path) {
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => Ok(None),
            other => other.at("looking at", path).map(Some),
        }
    }

    /// Opens a layer file wherever it is; nothing if it went.
    pub(crate) fn open_layer_file(
        &self,
        id: &LayerId,
        path: &Path,
    ) -> Result<Option<Layer>, StoreError> {
        let file = match self.disk().open(path) {
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            other => other.at("opening", path)?,
        };
        self.check_layer(id, path, &file).map(Some)
    }
}

/// The fate of packs, given the live objects.
#[derive(Debug, Default)]
struct Packs {
    dead: Vec<PackId>,
    /// Whose living objects are to be written to a new pack.
    rewrite: Vec<PackId>,
    dead_objects: u64,
    dead_bytes: u64,
    /// Bytes of the packs' files that go, less the rewritten ones.
    frees: u64,
}

fn decide(census: &Census, lives: &(dyn Fn(usize) -> bool + Sync)) -> Packs {
    let mut packs = Packs::default();
    let mut small = Vec::new();
    for (pack, first) in census.packs() {
        let (mut live, mut live_bytes) = (0_u64, 0);
        for (ix, (_, place)) in pack.index.objects().enumerate() {
            if lives(first + ix) {
                live += 1;
                live_bytes += place.len;
            } else {
                packs.dead_objects += 1;
                packs.dead_bytes += place.len;
            }
        }
        let len = pack.index.pack_len();
        if live == 0 {
            packs.dead.push(pack.id);
            packs.frees += len;
        } else if live_bytes * 2 < len && live < u64::from(pack.index.count()) {
            packs.rewrite.push(pack.id);
            packs.frees += len - live_bytes;
        } else if let Some(class) = class(len) {
            small.push((class, pack.id));
        }
    }
    // The highest class of which there are too many takes those below along, and becomes one of the
    // next.
    let count = |class| small.iter().filter(|(one, _)| *one == class).count();
    let highest = small.iter().map(|(class, _)| *class);
    let highest = highest.filter(|class| count(*class) > MAX_IN_CLASS).max();
    let merged = small.iter().filter(|(class, _)| Some(*class) <= highest);
    packs.rewrite.extend(merged.map(|(_, id)| *id));
    packs
}

/// The class of a small pack of this length.
fn class(len: u64) -> Option<u32> {
    if len >= SMALL_PACK {
        return None;
    }
    Some(len.div_ceil(LEAST_CLASS).max(1).ilog(CLASS_FACTOR))
}
