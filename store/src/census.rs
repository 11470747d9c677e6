//! The objects of the store and their owners, for gc, accounting and verification.
//!
//! Every object has a number, its slot, so that a count or a mark is an element of an array. An
//! object that stands in two packs is counted in one of them; the other copy counts as unnamed.

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use crate::disk::{Disk, names};
use crate::error::{IoContext, StoreError};
use crate::id::{ObjectId, PackId};
use crate::layer::{Kind, Layer};
use crate::objects::{Pack, PackSet};
use crate::pack::{Index, PackError, Place};
use crate::store::Store;

/// All objects of the packs and loose files in two directories, as of when it was taken.
#[derive(Debug)]
pub(crate) struct Census {
    set: PackSet,
    /// The slot of the first object of each pack.
    first: Vec<usize>,
    loose: HashMap<ObjectId, usize>,
    /// In the order of their slots.
    loose_files: Vec<(ObjectId, u64)>,
    /// Outboards whose object is not there.
    pub(crate) lone_outboards: Vec<ObjectId>,
    /// Indexes whose pack is not there, of which a power cut left no more: they name nothing.
    pub(crate) strays: Vec<PackId>,
    /// Indexes that do not hold, or not for their pack: their objects are not counted.
    pub(crate) damaged: Vec<StoreError>,
}

/// The objects that a layer names.
#[derive(Debug, Default)]
pub(crate) struct Named {
    /// Ascending, each once.
    pub(crate) slots: Vec<usize>,
    /// Those that are in no pack and in no file.
    pub(crate) missing: Vec<ObjectId>,
}

impl Census {
    /// Reads the indexes in `packs` and the names in `loose`.
    fn take(disk: &dyn Disk, packs: &Path, loose: &Path) -> Result<Self, StoreError> {
        let mut found = Vec::new();
        let (mut strays, mut damaged) = (Vec::new(), Vec::new());
        for name in names(disk, packs)? {
            let Some(id) = name.strip_suffix(".idx").and_then(|id| id.parse().ok()) else {
                continue;
            };
            let path = packs.join(&name);
            let pack = packs.join(format!("{id}.pack"));
            let len = match disk.metadata(&pack) {
                Err(err) if err.kind() == io::ErrorKind::NotFound => {
                    strays.push(id);
                    continue;
                }
                other => other.at("looking at", &pack)?.len(),
            };
            let file = match disk.open(&path) {
                Err(err) if err.kind() == io::ErrorKind::NotFound => continue,
                other => other.at("opening", &path)?,
            };
            match Index::open(disk, &file, &id) {
                Err(PackError::Map(err)) => Err(err).at("mapping", &path)?,
                Err(source) => damaged.push(StoreError::Index { path, source }),
                Ok(index) if index.pack_len() != len => damaged.push(StoreError::Damaged {
                    path: pack,
                    what: "it is not as long as its index says",
                }),
                Ok(index) => found.push(Arc::new(Pack::new(id, index, pack))),
            }
        }
        found.sort_by_key(|pack| pack.id);
        let mut files = Vec::new();
        let mut outboards = Vec::new();
        for name in names(disk, loose)? {
            if let Some(id) = name.strip_suffix(".cv") {
                outboards.extend(id.parse::<ObjectId>());
            }
            let Ok(id) = name.parse::<ObjectId>() else {
                continue;
            };
            let path = loose.join(&name);
            match disk.metadata(&path) {
                Err(err) if err.kind() == io::ErrorKind::NotFound => {}
                other => files.push((id, other.at("looking at", &path)?.size())),
            }
        }
        files.sort_unstable();
        outboards.retain(|id| files.binary_search_by_key(id, |(id, _)| *id).is_err());
        Ok(Self {
            strays,
            damaged,
            lone_outboards: outboards,
            ..Self::of(found, files)
        })
    }

    /// The census of these packs and loose objects.
    fn of(packs: Vec<Arc<Pack>>, loose_files: Vec<(ObjectId, u64)>) -> Self {
        let mut set = PackSet::default();
        set.add(packs);
        let mut total = 0;
        let mut first = Vec::with_capacity(set.packs().len());
        for pack in set.packs() {
            first.push(total);
            total += pack.index.count() as usize;
        }
        let numbered = loose_files.iter().enumerate();
        let loose = numbered.map(|(ix, (id, _))| (*id, total + ix)).collect();
        Self {
            set,
            first,
            loose,
            loose_files,
            strays: Vec::new(),
            damaged: Vec::new(),
            lone_outboards: Vec::new(),
        }
    }

    /// Number of slots.
    pub(crate) fn len(&self) -> usize {
        self.packed() + self.loose_files.len()
    }

    fn packed(&self) -> usize {
        let last = self.set.packs().last();
        self.first.last().copied().unwrap_or_default()
            + last.map_or(0, |pack| pack.index.count() as usize)
    }

    /// The packs, each with the slot of its first object.
    pub(crate) fn packs(&self) -> impl Iterator<Item = (&Arc<Pack>, usize)> {
        self.set.packs().iter().zip(self.first.iter().copied())
    }

    /// The loose objects and their lengths, each with its slot.
    pub(crate) fn loose(&self) -> impl Iterator<Item = (ObjectId, u64, usize)> + '_ {
        let first = self.packed();
        let numbered = self.loose_files.iter().enumerate();
        numbered.map(move |(ix, (id, len))| (*id, *len, first + ix))
    }

    /// The object's slot.
    pub(crate) fn slot(&self, id: &ObjectId) -> Option<usize> {
        match self.set.position(id) {
            Some((pack, ix)) => Some(self.first.get(pack)? + ix as usize),
            None => self.loose.get(id).copied(),
        }
    }

    /// The pack and the place of a packed object.
    pub(crate) fn place(&self, slot: usize) -> Option<(PackId, Place)> {
        let number = self
            .first
            .partition_point(|first| *first <= slot)
            .checked_sub(1)?;
        let pack = self.set.packs().get(number)?;
        let ix = slot - self.first.get(number)?;
        (ix < pack.index.count() as usize).then(|| (pack.id, pack.index.place(ix as u32)))
    }

    /// The lengths of all objects, in the order of their slots.
    pub(crate) fn lengths(&self) -> Vec<u64> {
        let packed = self
            .set
            .packs()
            .iter()
            .flat_map(|pack| pack.index.objects());
        let packed = packed.map(|(_, place)| place.len);
        packed
            .chain(self.loose_files.iter().map(|(_, len)| *len))
            .collect()
    }

    /// Length of the object in bytes.
    pub(crate) fn len_of(&self, slot: usize) -> u64 {
        match self.place(slot) {
            Some((_, place)) => place.len,
            None => slot
                .checked_sub(self.packed())
                .and_then(|ix| self.loose_files.get(ix))
                .map_or(0, |(_, len)| *len),
        }
    }

    /// The objects that a layer names.
    pub(crate) fn named_by(&self, layer: &Layer) -> Named {
        let mut named = Named::default();
        for node in layer.nodes() {
            if node.kind() == Kind::File {
                let object = node.object();
                match self.slot(&object) {
                    Some(slot) => named.slots.push(slot),
                    None => named.missing.push(object),
                }
            }
        }
        named.slots.sort_unstable();
        named.slots.dedup();
        named
    }
}

impl Store {
    /// A census of this moment.
    pub(crate) fn census(&self) -> Result<Census, StoreError> {
        let (packs, loose) = (self.dir().join("packs"), self.dir().join("loose"));
        Census::take(self.disk().as_ref(), &packs, &loose)
    }
}
