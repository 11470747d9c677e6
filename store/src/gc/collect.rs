//! Carrying out a plan.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{GcEvent, GcPlan, GcReport, MAX_MERGED_PACK, Packs, decide};
use crate::census::Census;
use crate::disk::{names, on_disk};
use crate::error::{IoContext, StoreError};
use crate::id::{KeyId, LayerId, ObjectId, PackId};
use crate::keys::RecordHead;
use crate::lease::{self, Lease, LiveLease};
use crate::mutex::lock;
use crate::objects::Pack;
use crate::pack_writer::PackWriter;
use crate::refs::{Ref, RefKind};
use crate::reserve;
use crate::roots::Roots;
use crate::store::{Store, read_json, write_json};
use crate::trash::{self, LAYER, LOOSE, MAX_TRASH_FILE, OUTBOARD, Places};

/// How often a collection begins again on a full disk, after a step that freed something.
const MAX_ROUNDS: u32 = 64;

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

fn suffix(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or_default()
}

/// Carries out one plan. Holds the lock of collections.
pub(super) struct Collection<'a> {
    store: &'a Store,
    lease: &'a Lease,
    events: &'a dyn Fn(GcEvent<'_>),
    /// Directory of this collection in the trash; made when first needed.
    generation: Option<PathBuf>,
    report: GcReport,
    written: u64,
    /// Why a step was left out, if the disk had no room for it.
    full: Option<StoreError>,
}

impl<'a> Collection<'a> {
    pub(super) fn new(store: &'a Store, lease: &'a Lease, events: &'a dyn Fn(GcEvent<'_>)) -> Self {
        Self {
            store,
            lease,
            events,
            generation: None,
            report: GcReport::default(),
            written: 0,
            full: None,
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

    pub(super) fn run(mut self, plan: &GcPlan) -> Result<GcReport, StoreError> {
        let swept = lease::sweep(self.store.site())?;
        self.report.leftovers_removed = swept.leases + swept.files;
        self.report.freed += swept.on_disk;
        for _ in 0..MAX_ROUNDS {
            let before = self.report.freed;
            self.round(plan)?;
            let Some(full) = self.full.take() else {
                break;
            };
            // Later steps may have made room for earlier ones.
            if self.report.freed == before && !reserve::make_room(self.store.site())? {
                if self.report.freed == 0 {
                    return Err(full);
                }
                break;
            }
        }
        for name in &plan.stat_caches {
            self.remove(&self.store.dir().join("stat").join(name))?;
        }
        self.tidy()?;
        reserve::fill(self.store.site());
        self.report.freed = self.report.freed.saturating_sub(self.written);
        Ok(self.report)
    }

    /// Everything that frees space, once.
    fn round(&mut self, plan: &GcPlan) -> Result<(), StoreError> {
        self.drop_records(plan)?;
        self.drop_volumes(plan)?;
        let swept = self.store.sweep_records(self.lease);
        self.if_room(swept)?;
        self.trash_layers(plan)?;
        self.remove_expired(plan.grace)?;
        match self.collect_objects() {
            Err(
                err @ (StoreError::Index { .. }
                | StoreError::Layer { .. }
                | StoreError::Damaged { .. }),
            ) => {
                (self.events)(GcEvent::Blocked(&err.in_one_line()));
                Ok(())
            }
            other => other,
        }
    }

    /// Result of a step; `None` if the disk has no room for it.
    fn if_room<T>(&mut self, result: Result<T, StoreError>) -> Result<Option<T>, StoreError> {
        match result {
            Err(err) if err.is_full() => {
                self.full = Some(err);
                Ok(None)
            }
            other => other.map(Some),
        }
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
        // A process that has begun to use a layer since the plan keeps its record.
        let leases = lease::live(self.store.site())?;
        let pinned: HashSet<LayerId> = leases.into_iter().flat_map(|lease| lease.layers).collect();
        for (key, layers) in &by_key {
            let goes = |head: &RecordHead| {
                layers.contains(&head.layer_id) && !pinned.contains(&head.layer_id)
            };
            let dropped = self.store.drop_records(self.lease, key, &goes);
            self.report.records += self.if_room(dropped)?.unwrap_or_default();
        }
        Ok(())
    }

    fn drop_volumes(&mut self, plan: &GcPlan) -> Result<(), StoreError> {
        if plan.volumes.is_empty() {
            return Ok(());
        }
        // A step that uses a volume by now has pinned its layers before it looked for them, and
        // keeps it.
        let leases = lease::live(self.store.site())?;
        let pinned: HashSet<LayerId> = leases.into_iter().flat_map(|lease| lease.layers).collect();
        for volume in &plan.volumes {
            if volume.layers.iter().any(|layer| pinned.contains(layer)) {
                continue;
            }
            let edit = self.store.edit_ref(RefKind::Volume, &volume.name);
            let Some(edit) = self.if_room(edit)? else {
                continue;
            };
            let same = |now: Ref| now.layers == volume.layers;
            // One that has grown meanwhile is in use, and one that is damaged is for a repair.
            if let Ok(Some(true)) = edit.get().map(|now| now.map(same)) {
                self.report.volumes += u64::from(edit.remove()?);
            }
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
        let last = trash::generations(disk.as_ref(), self.store.dir())?;
        let number = last
            .last()
            .map_or(1, |(number, _)| number.saturating_add(1));
        let generation = trash.join(number.to_string());
        disk.create_dir(&generation).at("making", &generation)?;
        self.sync(&trash)?;
        trash::note_birth(self.lease, &generation).inspect_err(|_| {
            // At worst, an empty one stays until it is tidied up.
            let _ = disk.remove_dir(&generation);
        })?;
        self.generation = Some(generation.clone());
        Ok(generation)
    }

    fn trash_layers(&mut self, plan: &GcPlan) -> Result<(), StoreError> {
        if !plan.layers.is_empty() {
            let moved = self.move_layers(plan);
            self.if_room(moved)?;
            if let Some(generation) = &self.generation {
                self.sync(generation)?;
                self.sync_kind("layers")?;
            }
        }
        // Now that they cannot be found any more: does a process need them?
        let trashed = trash::layers(self.store.site())?;
        if trashed.is_empty() {
            return Ok(());
        }
        let roots = Roots::read_all(self.store)?;
        for layer in trashed {
            if !roots.of(&layer.id).is_empty() && self.places().take_back_layer(&layer.id)? {
                self.report.layers_trashed = self.report.layers_trashed.saturating_sub(1);
            }
        }
        Ok(())
    }

    fn move_layers(&mut self, plan: &GcPlan) -> Result<(), StoreError> {
        let generation = self.generation()?;
        for garbage in &plan.layers {
            let to = generation.join(format!("{}.{LAYER}", garbage.layer));
            let from = self.places().layer(&garbage.layer);
            if trash::move_name(self.store.disk().as_ref(), &from, &to)? {
                self.report.layers_trashed += 1;
            }
        }
        Ok(())
    }

    fn remove_expired(&mut self, grace: Duration) -> Result<(), StoreError> {
        let mut dirs = BTreeSet::new();
        let trashed = trash::layers(self.store.site())?;
        let over = trash::over(&trashed, 0, grace);
        for layer in trashed {
            if over.contains(&layer.id) && self.remove(&layer.path)? {
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

    /// The layer files that are there, those in the trash and those that repair set aside included.
    fn layer_files(&self) -> Result<Vec<(LayerId, PathBuf)>, StoreError> {
        // These first: one that is taken back meanwhile is then seen in its place.
        let trashed = trash::layers(self.store.site())?.into_iter();
        let mut files: Vec<_> = trashed.map(|layer| (layer.id, layer.path)).collect();
        let aside = self.store.aside_layers()?.into_iter();
        files.extend(aside.map(|layer| (layer.id, layer.path)));
        let present = self.store.present_layers()?.into_iter();
        files.extend(present.map(|layer| (layer.id, layer.path)));
        Ok(files)
    }

    fn collect_objects(&mut self) -> Result<(), StoreError> {
        // Before the layers are listed: an object that comes later is in no pack that this looks
        // at.
        let mut census = self.store.census()?;
        if let Some(err) = census.damaged.pop() {
            return Err(err);
        }
        let orphans = self.orphans(&census)?;
        let files = self.layer_files()?;
        let seen: HashSet<LayerId> = files.iter().map(|(id, _)| *id).collect();
        let (live, missing) = self.mark(&census, &files)?;
        // Objects that an earlier collection wrongly took out.
        for object in missing {
            self.places().take_back_object(&object)?;
        }
        let lives = |slot: usize| {
            live.get(slot)
                .is_some_and(|n| n.load(Ordering::Relaxed) > 0)
        };
        let mut packs = decide(&census, &lives);
        let rewritten = self.rewrite(&census, &mut packs, &lives);
        self.if_room(rewritten)?;
        let loose: Vec<ObjectId> = census
            .loose()
            .filter(|(_, _, slot)| !lives(*slot))
            .map(|(id, ..)| id)
            .collect();
        let moved = self.move_objects(&census, &packs.dead, &orphans, &loose);
        self.if_room(moved)?;
        if let Some(generation) = &self.generation {
            self.sync(generation)?;
            self.sync_kind("packs")?;
            self.sync_kind("loose")?;
        }
        self.empty_trash(&seen)
    }

    /// Moves packs, loose objects and remains of crashes into the trash.
    fn move_objects(
        &mut self,
        census: &Census,
        packs: &[PackId],
        orphans: &[PackId],
        loose: &[ObjectId],
    ) -> Result<(), StoreError> {
        let leftovers = orphans.len() + census.strays.len() + census.lone_outboards.len();
        if packs.len() + loose.len() + leftovers == 0 {
            return Ok(());
        }
        let generation = self.generation()?;
        let disk = self.store.disk().as_ref();
        for id in packs {
            let to = generation.join(format!("{id}.idx"));
            trash::move_name(disk, &self.places().index(id), &to)?;
            self.trash_pack_file(&generation, id)?;
        }
        for id in orphans {
            self.trash_pack_file(&generation, id)?;
        }
        for id in &census.strays {
            let (pack, index) = (self.places().pack(id), self.places().index(id));
            let trashed = generation.join(format!("{id}.idx"));
            trash::move_name(disk, &index, &trashed)?;
            // Another process was just taking the pack back, or publishing it.
            if self.store.metadata(&pack)?.is_some() {
                trash::move_name(disk, &trashed, &index)?;
            }
        }
        for id in loose {
            let to = generation.join(format!("{id}.{LOOSE}"));
            trash::move_name(disk, &self.places().loose(id), &to)?;
        }
        // An ingest that is just naming one of these makes do without it.
        for id in loose.iter().chain(&census.lone_outboards) {
            let to = generation.join(format!("{id}.{OUTBOARD}"));
            trash::move_name(disk, &self.places().outboard(id), &to)?;
        }
        Ok(())
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
                // Moved meanwhile: taken back, or moved away by this collection.
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
                && self.store.metadata(&self.places().index(&id))?.is_none()
            {
                orphans.push(id);
            }
        }
        Ok(orphans)
    }

    /// Takes out the data of a pack whose index is not in its place.
    fn trash_pack_file(&self, generation: &Path, id: &PackId) -> Result<(), StoreError> {
        let disk = self.store.disk().as_ref();
        let (pack, index) = (self.places().pack(id), self.places().index(id));
        let trashed = generation.join(format!("{id}.pack"));
        trash::move_name(disk, &pack, &trashed)?;
        // Another process has taken the index back, or published this very pack.
        if self.store.metadata(&index)?.is_some() {
            trash::move_name(disk, &trashed, &pack)?;
        }
        Ok(())
    }

    /// Writes the living objects of the packs that are to be rewritten to new ones, after which
    /// they are dead.
    fn rewrite(
        &mut self,
        census: &Census,
        packs: &mut Packs,
        lives: &dyn Fn(usize) -> bool,
    ) -> Result<(), StoreError> {
        let wanted: HashSet<&PackId> = packs.rewrite.iter().collect();
        let mut wanted = census.packs().filter(|(pack, _)| wanted.contains(&pack.id));
        let mut dead = Vec::new();
        loop {
            let writer = PackWriter::default();
            let (mut read, mut len) = (Vec::new(), 0);
            for (pack, first) in wanted.by_ref() {
                match self.copy_living(pack, &|ix| lives(first + ix), &writer)? {
                    Some(copied) => {
                        read.push(pack.id);
                        len += copied;
                    }
                    None => (self.events)(GcEvent::Unreadable(&pack.id)),
                }
                if len >= MAX_MERGED_PACK {
                    break;
                }
            }
            let Some(finished) = writer.finish()? else {
                break;
            };
            let id = finished.publish(self.lease)?;
            for path in [self.places().pack(&id), self.places().index(&id)] {
                let meta = self.store.metadata(&path)?;
                self.written += meta.map_or(0, |meta| on_disk(&meta));
            }
            // Rewriting one pack whole gives the same one again; and when objects are there twice,
            // the pack may have been there all along, with nothing in it that was counted.
            read.retain(|pack| *pack != id);
            packs.dead.retain(|pack| *pack != id);
            dead.retain(|pack| *pack != id);
            dead.extend(read);
        }
        self.report.packs_rewritten += dead.len() as u64;
        packs.dead.extend(dead);
        Ok(())
    }

    /// Adds the objects of a pack that live to another. Returns how many bytes they were; nothing
    /// if one cannot be read.
    fn copy_living(
        &self,
        pack: &Arc<Pack>,
        lives: &dyn Fn(usize) -> bool,
        writer: &PackWriter,
    ) -> Result<Option<u64>, StoreError> {
        let objects = pack.index.objects().enumerate();
        let mut living: Vec<_> = objects.filter(|(ix, _)| lives(*ix)).collect();
        living.sort_unstable_by_key(|(_, (_, place))| place.offset);
        let mut len = 0;
        for (ix, (id, place)) in living {
            // Damage is not spread; `verify` finds it in its place.
            let Ok(bytes) = self.store.objects().read_packed(pack, ix as u32) else {
                return Ok(None);
            };
            writer.add(|| self.lease.tmp(), id, &bytes)?;
            len += place.len;
        }
        Ok(Some(len))
    }

    /// Removes the objects in the trash that no process can come to need. `seen` are the layers
    /// that did not need them when they were taken out.
    fn empty_trash(&mut self, seen: &HashSet<LayerId>) -> Result<(), StoreError> {
        let disk = Arc::clone(self.store.disk());
        let is_object = |name: &str| ["pack", "idx", LOOSE, OUTBOARD].contains(&suffix(name));
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
        // After everything was taken out, and before the layers are listed: an ingest that has
        // ended by now has published its layer, and one that begins from now on does not find the
        // objects that is in here.
        let leases = lease::live(self.store.site())?;
        // This process's view of packs is outdated.
        self.store.objects().refresh()?;
        for (id, path) in self.layer_files()? {
            if seen.contains(&id) {
                continue;
            }
            let Some(layer) = self.store.open_layer_file(&id, &path)? else {
                continue;
            };
            for object in layer.objects() {
                // Looks in the trash, too, and takes it back. A missing object was lost before.
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
                // Not written yet, or cut short: its present writers are awaited.
                Ok(None) | Err(StoreError::Json { .. } | StoreError::Damaged { .. }) => {
                    let waits = Waits::of(&leases);
                    if !waits.ingests.is_empty() {
                        let (store, lease) = (self.store, self.lease);
                        let written = write_json(store, lease, &path, &waits, MAX_TRASH_FILE);
                        self.if_room(written)?;
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
                let counts = !["idx", OUTBOARD].contains(&suffix(&name));
                if self.remove(&generation.join(&name))? && counts {
                    self.report.files_removed += 1;
                }
            }
        }
        Ok(())
    }

    /// Removes empty generations, and counts the contents of the others.
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
