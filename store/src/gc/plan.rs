//! Which layers go and which stay.

use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use rayon::prelude::*;

use super::{DroppedRecord, DroppedVolume, Garbage, GcPlan, Kept, Policy, Present, Why, decide};
use crate::aside::AsideLayer;
use crate::blob::Bits;
use crate::census::{Census, Named};
use crate::disk::{names, on_disk};
use crate::error::{IoContext, StoreError};
use crate::id::LayerId;
use crate::lease::Leftovers;
use crate::roots::{Root, Roots};
use crate::stat_cache::StatCache;
use crate::store::Store;
use crate::trash::{self, TrashedLayer};

/// The time in which a layer that is not used loses half of its worth.
const HALF_LIFE: Duration = Duration::from_secs(7 * 86_400);

/// Everything that a plan is made from.
pub(super) struct Planner<'a> {
    store: &'a Store,
    roots: Roots,
    layers: Vec<Present>,
    trashed: Vec<TrashedLayer>,
    census: Census,
    leftovers: Leftovers,
    blocked: Option<String>,
    /// Those that repair set aside.
    aside: Vec<AsideLayer>,
}

impl<'a> Planner<'a> {
    pub(super) fn read(store: &'a Store) -> Result<Self, StoreError> {
        let roots = Roots::read_all(store)?;
        let layers = store.present_layers()?;
        let trashed = trash::layers(store.site())?;
        let census = store.census()?;
        Ok(Self {
            store,
            roots,
            layers,
            trashed,
            leftovers: Leftovers::find(store.site())?,
            blocked: census.damaged.first().map(StoreError::in_one_line),
            census,
            aside: store.aside_layers()?,
        })
    }

    fn is_garbage(&self, id: &LayerId, why: &HashMap<LayerId, Why>) -> bool {
        self.roots.of(id).is_empty() || why.contains_key(id)
    }

    /// Whether only records and cache volumes keep a layer, which a policy may drop.
    fn may_go(&self, id: &LayerId) -> bool {
        let roots = self.roots.of(id);
        !roots.is_empty() && roots.iter().all(Root::may_go)
    }

    pub(super) fn plan(self, policy: &Policy) -> Result<GcPlan, StoreError> {
        let now = SystemTime::now();
        let store_bytes = self.store.bytes_on_disk()?;
        let free = self.store.space()?.free;
        let short = policy.min_free.is_some_and(|min| free < min);
        let grace = if short { Duration::ZERO } else { policy.grace };

        let mut why: HashMap<LayerId, Why> = HashMap::new();
        for layer in &self.layers {
            let age = now.duration_since(layer.used).unwrap_or_default();
            if self.may_go(&layer.id) && age >= policy.keep {
                why.insert(layer.id, Why::Unused);
            }
        }
        let leftover_bytes = self.leftovers.iter().map(|file| file.on_disk).sum();
        let mut plan = GcPlan {
            store_bytes,
            grace,
            leftovers: self.leftovers.iter().count() as u64,
            leftover_bytes,
            frees: leftover_bytes,
            ..GcPlan::default()
        };
        self.drop_rest_of_volumes(&mut why);
        let garbage = self.layers.iter();
        let garbage = garbage.filter(|layer| self.is_garbage(&layer.id, &why));
        let garbage: Vec<&Present> = garbage.collect();
        let over = trash::over(&self.trashed, garbage.len(), grace);
        let held = self
            .trashed
            .iter()
            .filter(|layer| !over.contains(&layer.id));
        let held = held.map(|layer| (layer.id, layer.path.as_path()));
        let stays = &garbage[trash::at_once(garbage.len(), grace)..];
        let stays = stays.iter().map(|layer| (layer.id, layer.path.as_path()));
        let held: HashMap<LayerId, &Path> = held.chain(stays).collect();
        let (mut size, logical, unreadable) = Size::count(&self, &why, &held, grace)?;
        plan.blocked = self.blocked.clone().or(unreadable);
        if plan.blocked.is_none() {
            plan.still_over = self.fit(policy, (store_bytes, free), &mut size, &mut why);
            self.count_objects(&mut plan, &size);
        }
        self.list_volumes(&mut plan, &why);
        self.list_layers(&mut plan, &why, &logical);
        let expired = self.trashed.iter().filter(|layer| over.contains(&layer.id));
        for layer in expired.filter(|layer| self.roots.of(&layer.id).is_empty()) {
            plan.expired.push(layer.id);
            let meta = self.store.metadata(&layer.path)?;
            plan.frees += meta.map_or(0, |meta| on_disk(&meta));
        }
        plan.stat_caches = self.stat_caches(policy, now)?;
        if plan.kept.is_empty() && !plan.layers.is_empty() {
            return Err(StoreError::NothingKept {
                path: self.store.dir().to_owned(),
                layers: plan.layers.len() as u64,
            });
        }
        Ok(plan)
    }

    /// Drops layers that may go until the store is as small as the policy says. `space` is its
    /// present size, and the free space beside it. Returns the remaining excess.
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
            if why.contains_key(&id) {
                continue;
            }
            let reason = if large > 0 {
                Why::MaxSize
            } else {
                Why::MinFree
            };
            why.insert(id, reason);
            size.drop_layer(&id);
            for id in self.drop_rest_of_volumes(why) {
                size.drop_layer(&id);
            }
        }
    }

    /// A cache volume that loses one layer loses all: adds the others that may go, and returns
    /// them.
    fn drop_rest_of_volumes(&self, why: &mut HashMap<LayerId, Why>) -> Vec<LayerId> {
        let mut dropped = Vec::new();
        loop {
            let before = dropped.len();
            for layers in self.roots.volumes.values() {
                let Some(reason) = layers.iter().find_map(|id| why.get(id).copied()) else {
                    continue;
                };
                for id in layers {
                    if self.may_go(id) && !why.contains_key(id) {
                        why.insert(*id, reason);
                        dropped.push(*id);
                    }
                }
            }
            // A layer may be of several volumes.
            if dropped.len() == before {
                return dropped;
            }
        }
    }

    /// Lists the cache volumes that lose a layer, or have lost one.
    fn list_volumes(&self, plan: &mut GcPlan, why: &HashMap<LayerId, Why>) {
        for (name, layers) in &self.roots.volumes {
            let there = |id: &LayerId| {
                let present = self.layers.binary_search_by_key(id, |layer| layer.id);
                present.is_ok() || self.trashed.iter().any(|trashed| trashed.id == *id)
            };
            let goes = layers.iter().find_map(|id| why.get(id).copied());
            let goes = goes.or_else(|| (!layers.iter().all(there)).then_some(Why::Missing));
            if let Some(why) = goes {
                plan.volumes.push(DroppedVolume {
                    name: name.clone(),
                    layers: layers.clone(),
                    why,
                });
            }
        }
    }

    /// `logical` has the sums of the sizes of the files of layers that can be read.
    fn list_layers(
        &self,
        plan: &mut GcPlan,
        why: &HashMap<LayerId, Why>,
        logical: &HashMap<LayerId, u64>,
    ) {
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
        let garbage = self.layers.iter();
        let garbage = garbage.filter(|layer| self.is_garbage(&layer.id, why));
        let at_once = trash::at_once(garbage.count(), plan.grace);
        for layer in &self.layers {
            let logical_bytes = logical.get(&layer.id).copied().unwrap_or_default();
            if self.is_garbage(&layer.id, why) {
                if plan.layers.len() < at_once {
                    plan.frees += layer.bytes;
                } else {
                    plan.frees_later += layer.bytes;
                }
                plan.layers.push(Garbage {
                    layer: layer.id,
                    logical_bytes,
                    last_used: layer.used,
                });
            } else {
                plan.kept.push(Kept {
                    layer: layer.id,
                    logical_bytes,
                    last_used: layer.used,
                    roots: self.roots.of(&layer.id).to_vec(),
                });
            }
        }
        plan.kept
            .sort_by_key(|kept| std::cmp::Reverse((kept.last_used, kept.layer)));
    }

    /// The layers that may go for space, the one that is worth most first: the time to
    /// build it again, for each byte that it frees, halved for each week in which it was not used.
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

    fn count_objects(&self, plan: &mut GcPlan, size: &Size<'_>) {
        let census = &self.census;
        let eventually = decide(census, &|slot| size.named(slot));
        let loose = |lives: &dyn Fn(usize) -> bool| -> (u64, u64) {
            let dead = census.loose().filter(|(_, _, slot)| !lives(*slot));
            dead.fold((0, 0), |(count, bytes), (_, len, _)| {
                (count + 1, bytes + len)
            })
        };
        let (_, loose_eventually) = loose(&|slot| size.named(slot));
        // Until the grace period is over, layers in the trash keep their objects.
        let lives = |slot: usize| size.named(slot) || size.held.get(slot);
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

    /// The stat caches that say nothing of use: they do not hold, or their layer is gone and they
    /// are old.
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
            let cache = disk
                .open(&path)
                .map(|file| StatCache::open(disk.as_ref(), &file));
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
    /// Objects of layers that wait in the trash, or will.
    held: Bits,
    /// Whether layers wait in the trash at all.
    keeps_garbage: bool,
    /// Objects of the layers that may still go.
    named: HashMap<LayerId, Vec<usize>>,
    /// Bytes of unnamed objects.
    freed: u64,
}

/// Result of [`Size::count`] for one layer.
#[derive(Default)]
struct Look {
    logical: Option<(LayerId, u64)>,
    /// Of a layer that may go.
    named: Option<(LayerId, Vec<usize>)>,
    unreadable: Option<String>,
}

type Counted<'a> = (Size<'a>, HashMap<LayerId, u64>, Option<String>);

impl<'a> Size<'a> {
    /// Looks through every layer once, each open only while it is looked through. `held` are
    /// garbage that the trash keeps for now. Returns the sizes of the layers' files, too, and why a
    /// layer could not be read.
    fn count(
        planner: &'a Planner<'_>,
        why: &HashMap<LayerId, Why>,
        held: &HashMap<LayerId, &Path>,
        grace: Duration,
    ) -> Result<Counted<'a>, StoreError> {
        let census = &planner.census;
        let mut counts = Vec::new();
        counts.resize_with(census.len(), AtomicU32::default);
        let held_objects = Bits::new(census.len());
        let look = |id: LayerId, path: &Path| -> Result<Look, StoreError> {
            let layer = match planner.store.open_layer_file(&id, path) {
                Ok(Some(layer)) => layer,
                Ok(None) => return Ok(Look::default()),
                Err(err @ (StoreError::Layer { .. } | StoreError::Damaged { .. })) => {
                    let unreadable = Some(err.in_one_line());
                    return Ok(Look {
                        unreadable,
                        ..Look::default()
                    });
                }
                Err(err) => return Err(err),
            };
            let mut look = Look {
                logical: Some((id, layer.logical_bytes())),
                ..Look::default()
            };
            if held.contains_key(&id) {
                let slots = census.named_by(&layer).slots;
                for slot in slots {
                    held_objects.set(slot);
                }
            } else if !planner.is_garbage(&id, why) {
                let Named { slots, .. } = census.named_by(&layer);
                for slot in &slots {
                    counts[*slot].fetch_add(1, Ordering::Relaxed);
                }
                look.named = planner.may_go(&id).then_some((id, slots));
            }
            Ok(look)
        };
        let present = planner.layers.par_iter();
        let present = present.map(|layer| look(layer.id, &layer.path));
        let (mut logical, mut named, mut unreadable) = (HashMap::new(), HashMap::new(), None);
        for look in present.collect::<Result<Vec<Look>, _>>()? {
            logical.extend(look.logical);
            named.extend(look.named);
            unreadable = unreadable.or(look.unreadable);
        }
        let trashed = planner.trashed.par_iter();
        let trashed = trashed.filter(|layer| held.get(&layer.id) == Some(&layer.path.as_path()));
        // One that cannot be read keeps nothing.
        trashed.for_each(|layer| drop(look(layer.id, &layer.path)));
        for layer in &planner.aside {
            if let Ok(Some(layer)) = planner.store.open_layer_file(&layer.id, &layer.path) {
                for slot in census.named_by(&layer).slots {
                    counts[slot].fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        let freed = (0..counts.len())
            .filter(|slot| counts[*slot].load(Ordering::Relaxed) == 0)
            .map(|slot| census.len_of(slot))
            .sum();
        let size = Self {
            census,
            counts,
            held: held_objects,
            keeps_garbage: !grace.is_zero(),
            named,
            freed,
        };
        Ok((size, logical, unreadable))
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
            if self.keeps_garbage {
                self.held.set(slot);
            }
            if self.counts[slot].fetch_sub(1, Ordering::Relaxed) == 1 {
                self.freed += self.census.len_of(slot);
            }
        }
    }
}
