//! Garbage collection: a plan that can be printed, and carrying it out.
//!
//! # What is kept
//!
//! Layers are kept by roots ([`crate::Roots`]). Refs and leases always count; a record of a key counts until the policy drops
//! it, because its layer was not used for long or because the store is too large. Objects are kept by layers: by every
//! layer file that is there, the ones in the trash included. Policy never looks at objects.
//!
//! # Beside writers and readers
//!
//! Nobody waits for a collection, and it waits for nobody; two collections never run at once. It deletes in the
//! order opposite to publishing, each step durable before the next begins:
//!
//! 1. Records are dropped.
//! 2. Layers without a root are moved into the trash. *Then* the roots are read again, and what got one meanwhile is moved
//!    back: who pins a layer writes the pin before looking for the layer, so either the pin is seen here, or the layer is
//!    not found there, and taken back from the trash or built anew.
//! 3. Layers that have been in the trash for the grace period are removed.
//! 4. Objects that no layer file names are moved into the trash, whole packs and loose files; packs that are mostly dead, and small
//!    packs when there are many, are rewritten first. *Then* the leases are read: an ingest that is open may have found one
//!    of these objects before they were moved, and may yet publish a layer that names it. The generation waits for it. One that
//!    begins later does not find them.
//! 5. The layers that have appeared since step 4 began are looked through, and what they name is moved back.
//! 6. What waits for nobody is removed.
//!
//! An ingest does its part: it says in its lease that it has begun before it looks at the indexes, and that it is done after its
//! layer has its name and everything that it reuses is in its place, if need be out of the trash. Readers, too, take back what
//! they miss. So a layer that is there never names an object that is not.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::census::{Census, Named};
use crate::disk::names;
use crate::error::{IoContext, StoreError};
use crate::id::{KeyId, LayerId, ObjectId, PackId};
use crate::layer::Layer;
use crate::lease::{self, Lease, LiveLease};
use crate::lock::FileLock;
use crate::objects::lock;
use crate::pack_writer::PackWriter;
use crate::roots::{Root, Roots};
use crate::stat_cache::StatCache;
use crate::store::{Store, read_json, write_json};
use crate::trash::{self, LAYER, LOOSE, Places};

/// A pack shorter than this is small.
const SMALL_PACK: u64 = 4 << 20;
/// Most small packs that are left alone. Each costs the mapping of an index when a store is opened.
const MAX_SMALL_PACKS: usize = 24;
/// Longest `born` or `waits` file, in bytes.
const MAX_TRASH_FILE: u64 = 16 << 20;
/// The time in which a layer that is not used loses half of what it is worth keeping.
const HALF_LIFE: Duration = Duration::from_secs(7 * 86_400);

/// What is kept, and for how long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Layers of records are kept that were used within this time.
    pub keep: Duration,
    /// While the store is larger than this many bytes on disk, layers of records are dropped.
    pub max_bytes: Option<u64>,
    /// While the filesystem has fewer free bytes than this, layers of records are dropped, and the trash is not kept.
    pub min_free: Option<u64>,
    /// How long a layer stays in the trash.
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
    /// What keeps it; never empty.
    pub roots: Vec<Root>,
}

/// A record that goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DroppedRecord {
    /// The recipe.
    pub key: KeyId,
    /// What it made.
    pub layer: LayerId,
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

/// What a collection will do. Carrying it out looks at everything again: nothing that is in use by then goes.
#[derive(Debug, Clone, Default, Serialize)]
pub struct GcPlan {
    /// What the store takes on disk now.
    pub store_bytes: u64,
    /// Layers that stay, the most recently used first.
    pub kept: Vec<Kept>,
    /// Records that go.
    pub records: Vec<DroppedRecord>,
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
    /// About how much is free after it.
    pub frees: u64,
    /// About how much more a later collection frees, when the grace period is over.
    pub frees_later: u64,
    /// By how much the store is still larger, or the filesystem still fuller, than the policy says: all that is left is kept
    /// by refs and leases.
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

/// What a collection did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct GcReport {
    /// Bytes on disk that it freed, less what it wrote.
    pub freed: u64,
    /// Records dropped.
    pub records: u64,
    /// Layers moved into the trash, without those that were taken back.
    pub layers_trashed: u64,
    /// Layers removed.
    pub layers_removed: u64,
    /// Packs and loose objects removed.
    pub files_removed: u64,
    /// Packs whose living objects were written to a new one.
    pub packs_rewritten: u64,
    /// Bytes that wait in the trash, for the grace period or for an ingest to end.
    pub waiting: u64,
}

/// What a collection says while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GcEvent<'a> {
    /// Another collection runs; this one waits for it.
    Waiting,
    /// No object was removed: something of the store cannot be read.
    Blocked(&'a str),
    /// A pack is left as it is: one of its objects cannot be read.
    Unreadable(&'a PackId),
}

/// When a generation of the trash was made.
#[derive(Debug, Serialize, Deserialize)]
struct Born {
    unix_seconds: u64,
}

/// The ingests for which the objects of a generation wait, by lease.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Waits {
    ingests: BTreeMap<String, BTreeSet<u64>>,
}

impl Waits {
    fn of(leases: &[LiveLease]) -> Self {
        let open = leases.iter().filter(|lease| !lease.ingests.is_empty());
        Self {
            ingests: open
                .map(|lease| (lease.name.clone(), lease.ingests.clone()))
                .collect(),
        }
    }

    fn are_over(&self, leases: &[LiveLease]) -> bool {
        leases.iter().all(|lease| {
            let waited = self.ingests.get(&lease.name);
            waited.is_none_or(|waited| waited.is_disjoint(&lease.ingests))
        })
    }
}

/// A layer file that is there.
struct Present {
    id: LayerId,
    path: PathBuf,
    bytes: u64,
    used: SystemTime,
}

fn on_disk(meta: &std::fs::Metadata) -> u64 {
    meta.blocks() * 512
}

impl Store {
    /// What a collection by this policy will do.
    pub fn plan_gc(&self, policy: &Policy) -> Result<GcPlan, StoreError> {
        Planner::read(self)?.plan(policy)
    }

    /// Carries out a plan. Waits if another collection runs.
    pub fn gc(&self, plan: &GcPlan, events: &dyn Fn(GcEvent<'_>)) -> Result<GcReport, StoreError> {
        // Says at once whether the store may be written.
        let lease = self.lease("gc")?;
        let on_wait = || events(GcEvent::Waiting);
        let _lock = FileLock::acquire(self.disk(), &self.gc_lock(), &on_wait)?;
        Collection::new(self, &lease, events).run(plan)
    }

    /// Carries out a plan, unless another collection runs.
    pub fn try_gc(
        &self,
        plan: &GcPlan,
        events: &dyn Fn(GcEvent<'_>),
    ) -> Result<Option<GcReport>, StoreError> {
        let lease = self.lease("gc")?;
        let Some(_lock) = FileLock::try_acquire(self.disk(), &self.gc_lock())? else {
            return Ok(None);
        };
        Collection::new(self, &lease, events).run(plan).map(Some)
    }

    /// Held by who takes things out of the store: one at a time.
    pub(crate) fn gc_lock(&self) -> PathBuf {
        self.dir().join("locks/gc")
    }

    /// What the store takes on disk, in bytes.
    pub fn bytes_on_disk(&self) -> Result<u64, StoreError> {
        let mut total = 0;
        let mut dirs = vec![self.dir().to_owned()];
        while let Some(dir) = dirs.pop() {
            for name in names(self.disk().as_ref(), &dir)? {
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

    fn metadata(&self, path: &Path) -> Result<Option<std::fs::Metadata>, StoreError> {
        match self.disk().metadata(path) {
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => Ok(None),
            other => other.at("looking at", path).map(Some),
        }
    }

    fn census(&self) -> Result<Census, StoreError> {
        let (packs, loose) = (self.dir().join("packs"), self.dir().join("loose"));
        Census::take(self.disk().as_ref(), &packs, &loose)
    }

    /// Opens a layer file wherever it is; nothing if it went.
    fn open_layer_file(&self, id: &LayerId, path: &Path) -> Result<Option<Layer>, StoreError> {
        let file = match self.disk().open(path) {
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            other => other.at("opening", path)?,
        };
        Self::check_layer(id, path, &file).map(Some)
    }
}

/// A layer in the trash, and when its generation was made.
struct Trashed {
    id: LayerId,
    path: PathBuf,
    born: SystemTime,
}

fn born(store: &Store, generation: &Path) -> Result<SystemTime, StoreError> {
    let path = generation.join("born");
    match read_json::<Born>(store.disk().as_ref(), &path, MAX_TRASH_FILE) {
        Ok(Some(born)) => Ok(UNIX_EPOCH + Duration::from_secs(born.unix_seconds)),
        // Cut short by a crash: it counts from now on, which is as long as anybody was promised.
        Ok(None) | Err(StoreError::Json { .. } | StoreError::Damaged { .. }) => {
            Ok(SystemTime::now())
        }
        Err(err) => Err(err),
    }
}

fn trashed_layers(store: &Store) -> Result<Vec<Trashed>, StoreError> {
    let disk = store.disk().as_ref();
    let mut layers = Vec::new();
    for (_, generation) in trash::generations(disk, store.dir())? {
        let born = born(store, &generation)?;
        for name in trash::list(disk, &generation)? {
            let id = name.strip_suffix(LAYER).and_then(|id| id.strip_suffix('.'));
            if let Some(id) = id.and_then(|id| id.parse().ok()) {
                let path = generation.join(name);
                layers.push(Trashed { id, path, born });
            }
        }
    }
    Ok(layers)
}

fn suffix(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or_default()
}

fn is_over(born: SystemTime, grace: Duration) -> bool {
    // A clock that was set back makes nothing younger than new.
    let age = SystemTime::now().duration_since(born).unwrap_or_default();
    age >= grace
}

/// What becomes of the packs, given which objects live.
#[derive(Debug, Default)]
struct Packs {
    dead: Vec<PackId>,
    /// Whose living objects are to be written to a new pack.
    rewrite: Vec<PackId>,
    dead_objects: u64,
    dead_bytes: u64,
    /// Bytes of the packs' files that go, less what is written anew.
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
        } else if len < SMALL_PACK {
            small.push(pack.id);
        }
    }
    if small.len() > MAX_SMALL_PACKS {
        packs.rewrite.extend(small);
    }
    packs
}

/// Everything that a plan is made from.
struct Planner<'a> {
    store: &'a Store,
    roots: Roots,
    layers: Vec<Present>,
    trashed: Vec<Trashed>,
    census: Option<Census>,
    blocked: Option<String>,
    /// What each layer says; only of those that can be read.
    opened: HashMap<LayerId, Layer>,
}

fn reason(err: &StoreError) -> String {
    let mut text = err.to_string();
    let mut cause = std::error::Error::source(err);
    while let Some(err) = cause {
        text.push_str(": ");
        text.push_str(&err.to_string());
        cause = err.source();
    }
    text
}

impl<'a> Planner<'a> {
    fn read(store: &'a Store) -> Result<Self, StoreError> {
        let roots = Roots::read(store)?;
        let layers = store.present_layers()?;
        let trashed = trashed_layers(store)?;
        let mut blocked = None;
        let census = match store.census() {
            Ok(census) => Some(census),
            Err(err @ (StoreError::Index { .. } | StoreError::Damaged { .. })) => {
                blocked = Some(reason(&err));
                None
            }
            Err(err) => return Err(err),
        };
        let mut opened = HashMap::new();
        for (id, path) in layers.iter().map(|layer| (layer.id, &layer.path)) {
            match store.open_layer_file(&id, path) {
                Ok(layer) => opened.extend(layer.map(|layer| (id, layer))),
                Err(err @ (StoreError::Layer { .. } | StoreError::Damaged { .. })) => {
                    blocked = Some(reason(&err));
                }
                Err(err) => return Err(err),
            }
        }
        Ok(Self {
            store,
            roots,
            layers,
            trashed,
            census,
            blocked,
            opened,
        })
    }

    /// The records whose layers only records keep: those that a policy may drop.
    fn may_go(&self, id: &LayerId) -> bool {
        let roots = self.roots.of(id);
        !roots.is_empty() && roots.iter().all(|root| matches!(root, Root::Record { .. }))
    }

    fn plan(self, policy: &Policy) -> Result<GcPlan, StoreError> {
        let now = SystemTime::now();
        let store_bytes = self.store.bytes_on_disk()?;
        let free = self.store.disk().free(self.store.dir());
        let free = free.at("asking for free space at", self.store.dir())?;
        let short = policy.min_free.is_some_and(|min| free < min);
        let grace = if short { Duration::ZERO } else { policy.grace };

        let mut why: HashMap<LayerId, Why> = HashMap::new();
        for layer in &self.layers {
            let age = now.duration_since(layer.used).unwrap_or_default();
            if self.may_go(&layer.id) && age >= policy.keep {
                why.insert(layer.id, Why::Unused);
            }
        }
        let mut plan = GcPlan {
            store_bytes,
            grace,
            ..GcPlan::default()
        };
        if let Some(census) = self.census.as_ref().filter(|_| self.blocked.is_none()) {
            let mut size = Size::new(&self, census, &why);
            plan.still_over = self.fit(policy, (store_bytes, free), &mut size, &mut why);
            self.count_objects(&mut plan, census, &size, &why, grace);
        }
        self.list_layers(&mut plan, &why);
        let expired = self
            .trashed
            .iter()
            .filter(|layer| is_over(layer.born, grace) && self.roots.of(&layer.id).is_empty());
        for layer in expired {
            plan.expired.push(layer.id);
            let meta = self.store.metadata(&layer.path)?;
            plan.frees += meta.map_or(0, |meta| on_disk(&meta));
        }
        plan.stat_caches = self.stat_caches(policy, now)?;
        plan.blocked = self.blocked;
        if plan.kept.is_empty() && !plan.layers.is_empty() {
            return Err(StoreError::NothingKept {
                path: self.store.dir().to_owned(),
                layers: plan.layers.len() as u64,
            });
        }
        Ok(plan)
    }

    /// Drops layers that may go until the store is as small as the policy says. `space` is what it takes now, and what is free
    /// beside it. Returns what is still too much.
    fn fit(
        &self,
        policy: &Policy,
        space: (u64, u64),
        size: &mut Size<'_>,
        why: &mut HashMap<LayerId, Why>,
    ) -> u64 {
        let mut candidates = self.by_worth(size, why);
        loop {
            let (taken, free) = (space.0.saturating_sub(size.freed), space.1 + size.freed);
            let large = policy.max_bytes.map_or(0, |max| taken.saturating_sub(max));
            let full = policy.min_free.map_or(0, |min| min.saturating_sub(free));
            if large == 0 && full == 0 {
                return 0;
            }
            let Some(id) = candidates.pop() else {
                return large.max(full);
            };
            why.insert(
                id,
                if large > 0 {
                    Why::MaxSize
                } else {
                    Why::MinFree
                },
            );
            size.drop_layer(&id);
        }
    }

    fn list_layers(&self, plan: &mut GcPlan, why: &HashMap<LayerId, Why>) {
        for (key, records) in &self.roots.records {
            for record in records {
                let layer = record.layer_id;
                let there = self.layers.binary_search_by_key(&layer, |layer| layer.id);
                let trashed = || self.trashed.iter().any(|trashed| trashed.id == layer);
                let why = match why.get(&layer) {
                    Some(why) => *why,
                    None if there.is_err() && !trashed() => Why::Missing,
                    None => continue,
                };
                let key = *key;
                plan.records.push(DroppedRecord { key, layer, why });
            }
        }
        for layer in &self.layers {
            let opened = self.opened.get(&layer.id);
            let logical_bytes = opened.map_or(0, Layer::logical_bytes);
            let roots = self.roots.of(&layer.id);
            if roots.is_empty() || why.contains_key(&layer.id) {
                plan.layers.push(Garbage {
                    layer: layer.id,
                    logical_bytes,
                    last_used: layer.used,
                });
                if plan.grace.is_zero() {
                    plan.frees += layer.bytes;
                } else {
                    plan.frees_later += layer.bytes;
                }
            } else {
                plan.kept.push(Kept {
                    layer: layer.id,
                    logical_bytes,
                    last_used: layer.used,
                    roots: roots.to_vec(),
                });
            }
        }
        plan.kept
            .sort_by_key(|kept| std::cmp::Reverse((kept.last_used, kept.layer)));
    }

    /// The layers that may go for space, the one that is worth most first: what it would take to build it again, for each byte
    /// that it frees, halved for each week in which it was not used.
    fn by_worth(&self, size: &Size<'_>, why: &HashMap<LayerId, Why>) -> Vec<LayerId> {
        let now = SystemTime::now();
        let mut seconds: HashMap<LayerId, f64> = HashMap::new();
        for record in self.roots.records.values().flatten() {
            let took = record.provenance.get("seconds");
            let took = took.and_then(serde_json::Value::as_f64).unwrap_or_default();
            let most = seconds.entry(record.layer_id).or_default();
            *most = most.max(took);
        }
        let candidates = self
            .layers
            .iter()
            .filter(|layer| self.may_go(&layer.id) && !why.contains_key(&layer.id));
        let mut worth: Vec<(f64, LayerId)> = candidates
            .map(|layer| {
                let age = now.duration_since(layer.used).unwrap_or_default();
                let took = 1.0 + seconds.get(&layer.id).copied().unwrap_or_default();
                // In KiB, which fit into 32 bits up to 4 TiB.
                let kib = (layer.bytes + size.unique(&layer.id)) >> 10;
                let kib = f64::from(u32::try_from(kib).unwrap_or(u32::MAX));
                let decay = (-age.as_secs_f64() / HALF_LIFE.as_secs_f64()).exp2();
                (took / (kib + 1.0) * decay, layer.id)
            })
            .collect();
        worth.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        worth.into_iter().map(|(_, id)| id).collect()
    }

    fn count_objects(
        &self,
        plan: &mut GcPlan,
        census: &Census,
        size: &Size<'_>,
        why: &HashMap<LayerId, Why>,
        grace: Duration,
    ) {
        let eventually = decide(census, &|slot| size.named(slot));
        let loose = |lives: &dyn Fn(usize) -> bool| -> (u64, u64) {
            let dead = census.loose().filter(|(_, _, slot)| !lives(*slot));
            dead.fold((0, 0), |(count, bytes), (_, len, _)| {
                (count + 1, bytes + len)
            })
        };
        let (_, loose_eventually) = loose(&|slot| size.named(slot));
        // Until the grace period is over, layers in the trash keep their objects.
        let held: HashSet<usize> = if grace.is_zero() {
            HashSet::new()
        } else {
            let garbage = self
                .layers
                .iter()
                .filter(|layer| self.roots.of(&layer.id).is_empty() || why.contains_key(&layer.id));
            let garbage = garbage.filter_map(|layer| self.opened.get(&layer.id));
            garbage
                .flat_map(|layer| census.named_by(layer).slots)
                .chain(self.trashed.iter().flat_map(|trashed| {
                    if is_over(trashed.born, grace) {
                        return Vec::new();
                    }
                    let layer = self.store.open_layer_file(&trashed.id, &trashed.path);
                    let layer = layer.ok().flatten();
                    layer.map_or_else(Vec::new, |layer| census.named_by(&layer).slots)
                }))
                .collect()
        };
        let lives = |slot: usize| size.named(slot) || held.contains(&slot);
        let packs = decide(census, &lives);
        let (loose_count, loose_bytes) = loose(&lives);
        plan.objects = packs.dead_objects + loose_count;
        plan.object_bytes = packs.dead_bytes + loose_bytes;
        plan.dead_packs = packs.dead.len() as u64;
        plan.rewritten_packs = packs.rewrite.len() as u64;
        let now = packs.frees + loose_bytes;
        plan.frees += now;
        plan.frees_later += (eventually.frees + loose_eventually).saturating_sub(now);
    }

    /// The stat caches that say nothing of use: they do not hold, or their layer is gone and they are old.
    fn stat_caches(&self, policy: &Policy, now: SystemTime) -> Result<Vec<String>, StoreError> {
        let (disk, dir) = (self.store.disk(), self.store.dir().join("stat"));
        let mut useless = Vec::new();
        for name in names(disk.as_ref(), &dir)? {
            let path = dir.join(&name);
            let Some(meta) = self.store.metadata(&path)? else {
                continue;
            };
            let written = meta.modified().at("looking at", &path)?;
            if now.duration_since(written).unwrap_or_default() < policy.keep {
                continue;
            }
            let cache = disk.open(&path).map(|file| StatCache::open(&file));
            let layer = cache
                .unwrap_or_default()
                .outcome()
                .map(|last| last.layer_id);
            let there = |id| {
                self.layers
                    .binary_search_by_key(&id, |layer| layer.id)
                    .is_ok()
            };
            if !layer.is_some_and(there) {
                useless.push(name);
            }
        }
        useless.sort_unstable();
        Ok(useless)
    }
}

/// How many of the layers that stay name each object.
struct Size<'a> {
    census: &'a Census,
    counts: Vec<AtomicU32>,
    /// What the layers name that may still go.
    named: HashMap<LayerId, Vec<usize>>,
    /// Bytes of objects that nobody names.
    freed: u64,
}

impl<'a> Size<'a> {
    fn new(planner: &Planner<'_>, census: &'a Census, why: &HashMap<LayerId, Why>) -> Self {
        let mut counts = Vec::new();
        counts.resize_with(census.len(), AtomicU32::default);
        let stays: Vec<&Present> = planner
            .layers
            .iter()
            .filter(|layer| !planner.roots.of(&layer.id).is_empty() && !why.contains_key(&layer.id))
            .collect();
        let named = stays.par_iter().filter_map(|present| {
            let layer = planner.opened.get(&present.id)?;
            let Named { slots, .. } = census.named_by(layer);
            for slot in &slots {
                counts[*slot].fetch_add(1, Ordering::Relaxed);
            }
            planner.may_go(&present.id).then_some((present.id, slots))
        });
        let named = named.collect();
        let freed = (0..counts.len())
            .filter(|slot| counts[*slot].load(Ordering::Relaxed) == 0)
            .map(|slot| census.len_of(slot))
            .sum();
        Self {
            census,
            counts,
            named,
            freed,
        }
    }

    fn named(&self, slot: usize) -> bool {
        let count = self.counts.get(slot);
        count.is_some_and(|count| count.load(Ordering::Relaxed) > 0)
    }

    /// Bytes of the objects that only this layer names.
    fn unique(&self, id: &LayerId) -> u64 {
        let slots = self.named.get(id).into_iter().flatten();
        slots
            .filter(|slot| self.counts[**slot].load(Ordering::Relaxed) == 1)
            .map(|slot| self.census.len_of(*slot))
            .sum()
    }

    fn drop_layer(&mut self, id: &LayerId) {
        for slot in self.named.remove(id).unwrap_or_default() {
            if self.counts[slot].fetch_sub(1, Ordering::Relaxed) == 1 {
                self.freed += self.census.len_of(slot);
            }
        }
    }
}

/// Carries out one plan. Holds the lock of collections.
struct Collection<'a> {
    store: &'a Store,
    lease: &'a Lease,
    events: &'a dyn Fn(GcEvent<'_>),
    /// What this collection takes out; made when it is first needed.
    generation: Option<PathBuf>,
    report: GcReport,
    written: u64,
}

impl<'a> Collection<'a> {
    fn new(store: &'a Store, lease: &'a Lease, events: &'a dyn Fn(GcEvent<'_>)) -> Self {
        Self {
            store,
            lease,
            events,
            generation: None,
            report: GcReport::default(),
            written: 0,
        }
    }

    fn places(&self) -> Places<'a> {
        self.store.places()
    }

    fn sync(&self, dir: &Path) -> Result<(), StoreError> {
        self.store.disk().sync_dir(dir).at("syncing", dir)
    }

    fn sync_kind(&self, kind: &str) -> Result<(), StoreError> {
        self.sync(&self.store.dir().join(kind))
    }

    fn run(mut self, plan: &GcPlan) -> Result<GcReport, StoreError> {
        lease::sweep(self.store)?;
        self.drop_records(plan)?;
        self.trash_layers(plan)?;
        self.remove_expired(plan.grace)?;
        match self.collect_objects() {
            Ok(()) => {}
            Err(
                err @ (StoreError::Index { .. }
                | StoreError::Layer { .. }
                | StoreError::Damaged { .. }),
            ) => (self.events)(GcEvent::Blocked(&reason(&err))),
            Err(err) => return Err(err),
        }
        for name in &plan.stat_caches {
            self.remove(&self.store.dir().join("stat").join(name))?;
        }
        self.tidy()?;
        self.report.freed = self.report.freed.saturating_sub(self.written);
        Ok(self.report)
    }

    /// Removes a file. Says whether it was there.
    fn remove(&mut self, path: &Path) -> Result<bool, StoreError> {
        let bytes = self.store.metadata(path)?.map_or(0, |meta| on_disk(&meta));
        match self.store.disk().remove(path) {
            Ok(()) => {
                self.report.freed += bytes;
                Ok(true)
            }
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(err) => Err(err).at("removing", path),
        }
    }

    fn drop_records(&mut self, plan: &GcPlan) -> Result<(), StoreError> {
        let mut by_key: BTreeMap<KeyId, BTreeSet<LayerId>> = BTreeMap::new();
        for record in &plan.records {
            by_key.entry(record.key).or_default().insert(record.layer);
        }
        if by_key.is_empty() {
            return Ok(());
        }
        // Who has begun to use a layer since the plan was made keeps its record.
        let leases = lease::live(self.store)?;
        let pinned: HashSet<LayerId> = leases.into_iter().flat_map(|lease| lease.layers).collect();
        for (key, layers) in &by_key {
            let goes = |layer: &LayerId| layers.contains(layer) && !pinned.contains(layer);
            self.report.records += self.store.drop_records(self.lease, key, &goes)?;
        }
        Ok(())
    }

    /// The generation of this collection.
    fn generation(&mut self) -> Result<PathBuf, StoreError> {
        if let Some(generation) = &self.generation {
            return Ok(generation.clone());
        }
        let disk = self.store.disk();
        let trash = self.store.dir().join("trash");
        // Stores of earlier versions have none.
        disk.create_dir(&trash).at("making", &trash)?;
        let last = trash::generations(disk.as_ref(), self.store.dir())?;
        let number = last
            .last()
            .map_or(1, |(number, _)| number.saturating_add(1));
        let generation = trash.join(number.to_string());
        disk.create_dir(&generation).at("making", &generation)?;
        self.sync(&trash)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let born = Born {
            unix_seconds: now.unwrap_or_default().as_secs(),
        };
        let path = generation.join("born");
        write_json(self.store, self.lease, &path, &born, MAX_TRASH_FILE)?;
        self.generation = Some(generation.clone());
        Ok(generation)
    }

    fn trash_layers(&mut self, plan: &GcPlan) -> Result<(), StoreError> {
        if !plan.layers.is_empty() {
            let generation = self.generation()?;
            for garbage in &plan.layers {
                let to = generation.join(format!("{}.{LAYER}", garbage.layer));
                let from = self.places().layer(&garbage.layer);
                if trash::move_name(self.store.disk().as_ref(), &from, &to)? {
                    self.report.layers_trashed += 1;
                }
            }
            self.sync(&generation)?;
            self.sync_kind("layers")?;
        }
        // Now that they cannot be found any more: does anybody need them?
        let trashed = trashed_layers(self.store)?;
        if trashed.is_empty() {
            return Ok(());
        }
        let roots = Roots::read(self.store)?;
        for layer in trashed {
            if !roots.of(&layer.id).is_empty() && self.places().take_back_layer(&layer.id)? {
                self.report.layers_trashed = self.report.layers_trashed.saturating_sub(1);
            }
        }
        Ok(())
    }

    fn remove_expired(&mut self, grace: Duration) -> Result<(), StoreError> {
        let mut dirs = BTreeSet::new();
        for layer in trashed_layers(self.store)? {
            if is_over(layer.born, grace) && self.remove(&layer.path)? {
                self.report.layers_removed += 1;
                dirs.extend(layer.path.parent().map(Path::to_owned));
            }
        }
        // Durable before any object of theirs goes.
        for dir in dirs {
            self.sync(&dir)?;
        }
        Ok(())
    }

    /// The layer files that are there, in the trash, too.
    fn layer_files(&self) -> Result<Vec<(LayerId, PathBuf)>, StoreError> {
        // Trash first: one that is taken back meanwhile is then seen in its place.
        let trashed = trashed_layers(self.store)?.into_iter();
        let mut files: Vec<_> = trashed.map(|layer| (layer.id, layer.path)).collect();
        let present = self.store.present_layers()?.into_iter();
        files.extend(present.map(|layer| (layer.id, layer.path)));
        Ok(files)
    }

    fn collect_objects(&mut self) -> Result<(), StoreError> {
        let disk = Arc::clone(self.store.disk());
        // Before the layers are listed: an object that comes later is in no pack that this looks at.
        let census = self.store.census()?;
        let orphans = self.orphans(&census)?;
        let files = self.layer_files()?;
        let seen: HashSet<LayerId> = files.iter().map(|(id, _)| *id).collect();
        let (live, missing) = self.mark(&census, &files)?;
        // What an earlier collection took out too much of.
        for object in missing {
            self.places().take_back_object(&object)?;
        }
        let lives = |slot: usize| {
            live.get(slot)
                .is_some_and(|n| n.load(Ordering::Relaxed) > 0)
        };
        let mut packs = decide(&census, &lives);
        let rewritten = self.rewrite(&census, &packs.rewrite, &lives)?;
        packs.dead.extend(rewritten);
        let loose: Vec<ObjectId> = census
            .loose()
            .filter(|(_, _, slot)| !lives(*slot))
            .map(|(id, ..)| id)
            .collect();
        let leftovers = orphans.len() + census.strays.len();
        if packs.dead.len() + loose.len() + leftovers > 0 {
            let generation = self.generation()?;
            let disk = disk.as_ref();
            for id in &packs.dead {
                let [_, index] = self.places().pack(id);
                trash::move_name(disk, &index, &generation.join(format!("{id}.idx")))?;
                self.trash_pack_file(&generation, id)?;
            }
            for id in &orphans {
                self.trash_pack_file(&generation, id)?;
            }
            for id in &census.strays {
                let [pack, index] = self.places().pack(id);
                let trashed = generation.join(format!("{id}.idx"));
                trash::move_name(disk, &index, &trashed)?;
                // Somebody was just taking the pack back, or publishing it.
                if self.store.metadata(&pack)?.is_some() {
                    trash::move_name(disk, &trashed, &index)?;
                }
            }
            for id in &loose {
                let to = generation.join(format!("{id}.{LOOSE}"));
                trash::move_name(disk, &self.places().loose(id), &to)?;
            }
            self.sync(&generation)?;
            self.sync_kind("packs")?;
            self.sync_kind("loose")?;
        }
        self.empty_trash(&seen)
    }

    /// Counts how many layers name each object. Also the objects that are not there.
    fn mark(
        &self,
        census: &Census,
        files: &[(LayerId, PathBuf)],
    ) -> Result<(Vec<AtomicU32>, Vec<ObjectId>), StoreError> {
        let mut live = Vec::new();
        live.resize_with(census.len(), AtomicU32::default);
        let (store, places) = (self.store, self.places());
        let missing: Mutex<Vec<ObjectId>> = Mutex::default();
        files.par_iter().try_for_each(|(id, path)| {
            let layer = match store.open_layer_file(id, path)? {
                Some(layer) => layer,
                // Moved meanwhile: taken back, or away by nobody but this.
                None => match store.open_layer_file(id, &places.layer(id))? {
                    Some(layer) => layer,
                    None => return Ok(()),
                },
            };
            let named = census.named_by(&layer);
            for slot in named.slots {
                live[slot].fetch_add(1, Ordering::Relaxed);
            }
            lock(&missing).extend(named.missing);
            Ok::<_, StoreError>(())
        })?;
        let missing = std::mem::take(&mut *lock(&missing));
        Ok((live, missing))
    }

    /// Packs without an index: a crash, or something taken back halfway.
    fn orphans(&self, census: &Census) -> Result<Vec<PackId>, StoreError> {
        let known: HashSet<PackId> = census.packs().map(|(pack, _)| pack.id).collect();
        let dir = self.store.dir().join("packs");
        let mut orphans = Vec::new();
        for name in names(self.store.disk().as_ref(), &dir)? {
            let id = name.strip_suffix(".pack").and_then(|id| id.parse().ok());
            if let Some(id) = id.filter(|id| !known.contains(id))
                && self.store.metadata(&self.places().pack(&id)[1])?.is_none()
            {
                orphans.push(id);
            }
        }
        Ok(orphans)
    }

    /// Takes out the data of a pack whose index is not in its place.
    fn trash_pack_file(&self, generation: &Path, id: &PackId) -> Result<(), StoreError> {
        let disk = self.store.disk().as_ref();
        let [pack, index] = self.places().pack(id);
        let trashed = generation.join(format!("{id}.pack"));
        trash::move_name(disk, &pack, &trashed)?;
        // Somebody has taken the index back, or published this very pack.
        if self.store.metadata(&index)?.is_some() {
            trash::move_name(disk, &trashed, &pack)?;
        }
        Ok(())
    }

    /// Writes the living objects of these packs to a new one. Returns the packs that are not needed any more.
    fn rewrite(
        &mut self,
        census: &Census,
        packs: &[PackId],
        lives: &dyn Fn(usize) -> bool,
    ) -> Result<Vec<PackId>, StoreError> {
        let writer = PackWriter::default();
        let mut done = Vec::new();
        let wanted: HashSet<&PackId> = packs.iter().collect();
        'packs: for (pack, first) in census.packs().filter(|(pack, _)| wanted.contains(&pack.id)) {
            let mut living: Vec<_> = pack
                .index
                .objects()
                .enumerate()
                .filter(|(ix, _)| lives(first + ix))
                .map(|(_, object)| object)
                .collect();
            living.sort_unstable_by_key(|(_, place)| place.offset);
            for (id, place) in living {
                let bytes = self.store.objects().read_packed(&pack.id, place);
                // What does not hold is not spread; `verify` finds it where it is.
                let Some(bytes) = bytes.ok().filter(|bytes| ObjectId::of(bytes) == id) else {
                    (self.events)(GcEvent::Unreadable(&pack.id));
                    continue 'packs;
                };
                writer.add(|| self.lease.tmp(), id, &bytes)?;
            }
            done.push(pack.id);
        }
        if let Some(finished) = writer.finish()? {
            let id = finished.publish(self.store, self.lease)?;
            for path in self.places().pack(&id) {
                let meta = self.store.metadata(&path)?;
                self.written += meta.map_or(0, |meta| on_disk(&meta));
            }
            // Rewriting one pack whole gives the same one again.
            done.retain(|pack| *pack != id);
        }
        self.report.packs_rewritten += done.len() as u64;
        Ok(done)
    }

    /// Removes the objects in the trash that nobody can come to need. `seen` are the layers that did not need them when they
    /// were taken out.
    fn empty_trash(&mut self, seen: &HashSet<LayerId>) -> Result<(), StoreError> {
        let disk = Arc::clone(self.store.disk());
        let is_object = |name: &str| ["pack", "idx", LOOSE].contains(&suffix(name));
        let mut holding = Vec::new();
        for (_, generation) in trash::generations(disk.as_ref(), self.store.dir())? {
            let names = trash::list(disk.as_ref(), &generation)?;
            if names.iter().any(|name| is_object(name)) {
                holding.push(generation);
            }
        }
        if holding.is_empty() {
            return Ok(());
        }
        // After everything was taken out, and before the layers are listed: an ingest that has ended by now has published its
        // layer, and one that begins from now on does not find what is in here.
        let leases = lease::live(self.store)?;
        for (id, path) in self.layer_files()? {
            if seen.contains(&id) {
                continue;
            }
            let Some(layer) = self.store.open_layer_file(&id, &path)? else {
                continue;
            };
            for object in layer.objects() {
                // Looks in the trash, too, and takes it back. What is nowhere was lost before.
                match self.store.objects().require(&object) {
                    Err(StoreError::MissingObject(_)) => {}
                    other => other?,
                }
            }
        }
        for generation in holding {
            let path = generation.join("waits");
            let waits = match read_json::<Waits>(disk.as_ref(), &path, MAX_TRASH_FILE) {
                Ok(Some(waits)) => waits,
                // Not written yet, or cut short: everybody who is at it now is waited for.
                Ok(None) | Err(StoreError::Json { .. } | StoreError::Damaged { .. }) => {
                    let waits = Waits::of(&leases);
                    if !waits.ingests.is_empty() {
                        write_json(self.store, self.lease, &path, &waits, MAX_TRASH_FILE)?;
                    }
                    waits
                }
                Err(err) => return Err(err),
            };
            if !waits.are_over(&leases) {
                continue;
            }
            let mut names = trash::list(disk.as_ref(), &generation)?;
            names.retain(|name| is_object(name));
            // The index goes before its pack.
            names.sort_by_key(|name| suffix(name) != "idx");
            for name in names {
                if self.remove(&generation.join(&name))? && suffix(&name) != "idx" {
                    self.report.files_removed += 1;
                }
            }
        }
        Ok(())
    }

    /// Removes generations in which nothing is left, and counts what is.
    fn tidy(&mut self) -> Result<(), StoreError> {
        let disk = Arc::clone(self.store.disk());
        for (_, generation) in trash::generations(disk.as_ref(), self.store.dir())? {
            let names = trash::list(disk.as_ref(), &generation)?;
            let own = |name: &String| name == "born" || name == "waits";
            if names.iter().all(own) {
                for name in names {
                    self.remove(&generation.join(name))?;
                }
                disk.remove_dir(&generation).at("removing", &generation)?;
                continue;
            }
            for name in names {
                let meta = self.store.metadata(&generation.join(name))?;
                self.report.waiting += meta.map_or(0, |meta| on_disk(&meta));
            }
        }
        Ok(())
    }
}
