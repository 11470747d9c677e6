//! Where the bytes of a store are.
//!
//! Three views of one moment, each of which adds up:
//!
//! - [`Account::areas`]: the filesystem's blocks of each directory, the directories
//!   themselves included. Their sum is what `du` says.
//! - [`Account::named`], [`in_trash`](Account::in_trash), [`unnamed`](Account::unnamed),
//!   [`layer_files`](Account::layer_files), [`indexes`](Account::indexes),
//!   [`unfinished`](Account::unfinished), [`abandoned`](Account::abandoned),
//!   [`other`](Account::other) by their lengths, and [`padding`](Account::padding), which
//!   is everything that the filesystem uses beyond them.
//! - Bytes of only one [layer](LayerUse) or one [ref](RefUse), and shared bytes: together
//!   they are everything that layers name, and the layers' own files.
//!
//! Objects are counted in place: every object of every index has a number, and its owner is one
//! word in an array. No map of ids is made, so a store of 20 workers with 30,000 files each takes a
//! fraction of a second and a few MiB.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::ffi::OsStr;
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rayon::prelude::*;

use crate::census::Census;
use crate::disk::{Disk, names};
use crate::error::{IoContext, StoreError};
use crate::id::{LayerId, TreeId};
use crate::layer::Layer;
use crate::lease::Leftovers;
use crate::refs::RefKind;
use crate::reserve::RESERVE;
use crate::stat_cache::StatCache;
use crate::store::Store;
use crate::trash;

/// The directories that are told apart, as [`Area::name`] says them. Other files are
/// [`OTHER`].
pub const AREAS: [&str; 13] = [
    "packs", "loose", "layers", "keys", "facts", "refs", "stat", "trash", "damaged", "tmp",
    "leases", "locks", RESERVE,
];
/// The [`Area::name`] of files beside [`AREAS`], the store's directory itself included.
pub const OTHER: &str = "other";
/// Bytes of one block of [`MetadataExt::blocks`].
const BLOCK: u64 = 512;

/// The files of one directory of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Area {
    /// The directory's name.
    pub name: &'static str,
    /// Files in it.
    pub files: u64,
    /// Their lengths.
    pub bytes: u64,
    /// The blocks of the files and of the directories, in bytes.
    pub on_disk: u64,
}

/// Bytes of one layer. [`unique`](Self::unique) and [`shared`](Self::shared) count each object
/// once, and the layer's own file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerUse {
    /// The layer.
    pub id: LayerId,
    /// The layer without its mtimes.
    pub tree_id: TreeId,
    /// The sizes of its files, as if it were unpacked somewhere.
    pub logical: u64,
    /// Stored bytes that no other layer names, which its eviction alone would free.
    pub unique: u64,
    /// Stored bytes that other layers name too.
    pub shared: u64,
    /// Its files whose contents are not in the store. More than none means damage.
    pub missing: u64,
    /// When it was last used.
    pub used: SystemTime,
}

/// Bytes of the layers of one ref together, as [`LayerUse`] says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefUse {
    /// Kind of the name.
    pub kind: RefKind,
    /// The name.
    pub name: String,
    /// Bottom first.
    pub layers: Vec<LayerId>,
    /// The sizes of the files in all of them.
    pub logical: u64,
    /// Stored bytes that no other ref names.
    pub unique: u64,
    /// Stored bytes that other refs name too.
    pub shared: u64,
}

/// Where the bytes of a store are.
#[derive(Debug, Default)]
pub struct Account {
    /// By directory, in the order of [`AREAS`], then [`OTHER`].
    pub areas: Vec<Area>,
    /// Objects that layers name.
    pub named: u64,
    /// Bytes that gc has taken out and not removed yet: the files in the trash, and objects that
    /// only layers in the trash name.
    pub in_trash: u64,
    /// Objects that no layer names, and second copies of those that one does.
    pub unnamed: u64,
    /// The files of the layers: names, modes, owners, times.
    pub layer_files: u64,
    /// The indexes of the packs, and the outboards of loose objects.
    pub indexes: u64,
    /// Temporary files of living processes.
    pub unfinished: u64,
    /// Temporary files that interrupted processes left: the next gc, build or import removes them.
    pub abandoned: u64,
    /// All other files.
    pub other: u64,
    /// Stored bytes that several layers name.
    pub shared_by_layers: u64,
    /// Stored bytes that several refs name.
    pub shared_by_refs: u64,
    /// Stored bytes that layers name and no ref does.
    pub in_no_ref: u64,
    /// Every layer, sorted by id.
    pub layers: Vec<LayerUse>,
    /// Every ref, sorted by kind and name.
    pub refs: Vec<RefUse>,
    /// Why layers, indexes or refs cannot be read. Objects of only such layers count as
    /// [`Account::unnamed`], entries of only such an index as [`Account::padding`], and layers
    /// that only such refs name as [`Account::in_no_ref`].
    pub unreadable: Vec<StoreError>,
}

impl Account {
    /// Bytes that the filesystem uses for the store: the sum of the areas.
    pub fn on_disk(&self) -> u64 {
        self.areas.iter().map(|area| area.on_disk).sum()
    }

    /// Bytes that the filesystem uses beyond the lengths: alignment in packs, the rest of last
    /// blocks, directories. Negative where it compresses.
    pub fn padding(&self) -> i64 {
        let objects = self.named + self.in_trash + self.unnamed;
        let tmp = self.unfinished + self.abandoned;
        let lengths = objects + self.layer_files + self.indexes + tmp + self.other;
        self.on_disk() as i64 - lengths as i64
    }
}

impl Store {
    /// The layers of the store, sorted.
    pub fn layer_ids(&self) -> Result<Vec<LayerId>, StoreError> {
        let mut ids = Vec::new();
        let dir = self.dir().join("layers");
        for name in names(self.disk().as_ref(), &dir)? {
            ids.extend(name.parse::<LayerId>());
        }
        ids.sort_unstable();
        Ok(ids)
    }

    /// The layers that the last snapshots made of their projects, in any order, as far as the stat
    /// caches know. They need not be there any more.
    pub fn snapshot_layers(&self) -> Result<Vec<LayerId>, StoreError> {
        let dir = self.dir().join("stat");
        let mut layers = Vec::new();
        for name in names(self.disk().as_ref(), &dir)? {
            // A cache that cannot be read or does not hold counts as absent.
            if let Ok(file) = self.disk().open(&dir.join(name)) {
                let outcome = StatCache::open(self.disk().as_ref(), &file).outcome();
                layers.extend(outcome.map(|outcome| outcome.layer_id));
            }
        }
        Ok(layers)
    }

    /// Counts everything. Safe beside everything else, and takes no lease: files that come or go
    /// meanwhile is counted or not.
    pub fn account(&self) -> Result<Account, StoreError> {
        let files = Files::walk(self.disk().as_ref(), self.dir())?;
        let leftovers = Leftovers::find(self.site())?;
        let abandoned = leftovers.tmp.iter().map(|file| file.len).sum();
        let abandoned = files.tmp.min(abandoned);
        let (mut refs, mut unreadable) = self.all_refs()?;
        let mut census = self.census()?;
        unreadable.append(&mut census.damaged);
        let slots = Slots::new(&census, &files.layers);
        let read: Vec<_> = files
            .layers
            .par_iter()
            .enumerate()
            .map(|(number, file)| {
                // Not through `layer`, which would take back layers that gc moves away meanwhile.
                let path = self.places().layer(&file.id);
                let layer = self.open_layer_file(&file.id, &path)?;
                Ok(layer.map(|layer| KnownLayer::new(&slots, file, number, &layer)))
            })
            .collect();
        let mut known = Vec::new();
        for read in read {
            match read {
                Ok(layer) => known.extend(layer),
                Err(error) => unreadable.push(error),
            }
        }
        let trashed: Vec<Vec<usize>> = files
            .trashed
            .par_iter()
            .map(|(id, path)| {
                // One that cannot be read keeps nothing of value.
                let layer = self.open_layer_file(id, path).ok().flatten();
                layer.map_or_else(Vec::new, |layer| census.named_by(&layer).slots)
            })
            .collect();

        let mut by_layer = Owners::none(&slots);
        for (number, layer) in known.iter().enumerate() {
            by_layer.add(number, &layer.slots);
        }
        let mut by_trash = Owners::none(&slots);
        for list in &trashed {
            by_trash.add(0, list);
        }
        let by_ref = count_refs(&slots, &known, &mut refs);
        let mut account = Account {
            layer_files: files.layers.iter().map(|file| file.len).sum(),
            layers: count_layers(&slots, &known, &by_layer),
            refs,
            unreadable,
            in_trash: files.in_trash,
            areas: files.areas,
            indexes: files.indexes,
            unfinished: files.tmp - abandoned,
            abandoned,
            other: files.other,
            ..Account::default()
        };
        for (slot, &len) in slots.lengths.iter().enumerate() {
            let is_object = slot < census.len();
            if by_layer.of(slot) == Owners::NONE {
                // Else it is the file of a damaged layer.
                if is_object && by_trash.of(slot) != Owners::NONE {
                    account.in_trash += len;
                } else if is_object {
                    account.unnamed += len;
                }
                continue;
            }
            if is_object {
                account.named += len;
            }
            if by_layer.of(slot) == Owners::SEVERAL {
                account.shared_by_layers += len;
            }
            match by_ref.of(slot) {
                Owners::NONE => account.in_no_ref += len,
                Owners::SEVERAL => account.shared_by_refs += len,
                _ => {}
            }
        }
        Ok(account)
    }

    fn all_refs(&self) -> Result<(Vec<RefUse>, Vec<StoreError>), StoreError> {
        let (mut refs, mut unreadable) = (Vec::new(), Vec::new());
        for kind in RefKind::ALL {
            let (readable, mut others) = self.readable_refs(kind)?;
            unreadable.append(&mut others);
            for (name, content) in readable {
                refs.push(RefUse {
                    kind,
                    name,
                    layers: content.layers,
                    logical: 0,
                    unique: 0,
                    shared: 0,
                });
            }
        }
        Ok((refs, unreadable))
    }
}

/// A layer's file.
#[derive(Debug, Clone, Copy)]
struct LayerFile {
    id: LayerId,
    len: u64,
    used: SystemTime,
}

/// The files of a store.
#[derive(Debug, Default)]
struct Files {
    areas: Vec<Area>,
    layers: Vec<LayerFile>,
    trashed: Vec<(LayerId, PathBuf)>,
    in_trash: u64,
    indexes: u64,
    tmp: u64,
    other: u64,
}

impl Files {
    fn walk(disk: &dyn Disk, dir: &Path) -> Result<Self, StoreError> {
        let mut files = Self::default();
        let mut areas = BTreeMap::new();
        // A file with several names takes its blocks once.
        let mut linked = HashSet::new();
        let mut todo: Vec<(PathBuf, &'static str)> = vec![(dir.to_owned(), OTHER)];
        while let Some((path, name)) = todo.pop() {
            let Some(meta) = stat(disk, &path)? else {
                continue;
            };
            let area: &mut Area = areas.entry(name).or_default();
            if meta.nlink() < 2 || meta.is_dir() || linked.insert((meta.dev(), meta.ino())) {
                area.on_disk += meta.blocks() * BLOCK;
            }
            if meta.is_dir() {
                let is_root = path == dir;
                for child in names_now(disk, &path)? {
                    let known = AREAS.into_iter().find(|area| is_root && *area == child);
                    todo.push((path.join(child), known.unwrap_or(name)));
                }
            } else {
                area.files += 1;
                area.bytes += meta.len();
                files.add(&path, name, &meta);
            }
        }
        files.layers.sort_unstable_by_key(|file| file.id);
        files.areas = AREAS
            .into_iter()
            .chain([OTHER])
            .map(|name| Area {
                name,
                ..areas.get(name).copied().unwrap_or_default()
            })
            .collect();
        Ok(files)
    }

    fn add(&mut self, path: &Path, area: &str, meta: &Metadata) {
        let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
        let (stem, extension) = name.rsplit_once('.').unwrap_or((name, ""));
        let len = meta.len();
        match (area, extension) {
            // Counted object by object; the rest is padding.
            ("packs", "pack") | ("loose", "") => {}
            ("packs", "idx") | ("loose", "cv") => self.indexes += len,
            ("tmp", _) => self.tmp += len,
            ("trash", extension) => {
                self.in_trash += len;
                if extension == trash::LAYER
                    && let Ok(id) = stem.parse()
                {
                    self.trashed.push((id, path.to_owned()));
                }
            }
            ("layers", _) if name.parse::<LayerId>().is_ok() => {
                let used = meta.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                let id = name.parse().ok();
                self.layers.extend(id.map(|id| LayerFile { id, len, used }));
            }
            _ => self.other += len,
        }
    }
}

/// The names in a directory; none if it went meanwhile.
fn names_now(disk: &dyn Disk, dir: &Path) -> Result<Vec<String>, StoreError> {
    match names(disk, dir) {
        Err(error) if error.io_kind() == Some(io::ErrorKind::NotFound) => Ok(Vec::new()),
        other => other,
    }
}

/// Metadata of a file, if it still exists.
fn stat(disk: &dyn Disk, path: &Path) -> Result<Option<Metadata>, StoreError> {
    match disk.metadata(path) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.at("looking at", path).map(Some),
    }
}

/// A number for everything that is counted: the slots of the objects, then the files of the layers.
struct Slots<'a> {
    census: &'a Census,
    /// How long each is.
    lengths: Vec<u64>,
}

impl<'a> Slots<'a> {
    fn new(census: &'a Census, layers: &[LayerFile]) -> Self {
        let mut lengths = census.lengths();
        lengths.extend(layers.iter().map(|file| file.len));
        Self { census, lengths }
    }

    fn len(&self, slot: usize) -> u64 {
        self.lengths.get(slot).copied().unwrap_or_default()
    }
}

/// The owners of each numbered thing: none, one, or several.
struct Owners(Vec<u32>);

impl Owners {
    const NONE: u32 = 0;
    const SEVERAL: u32 = u32::MAX;

    fn none(slots: &Slots<'_>) -> Self {
        Self(vec![Self::NONE; slots.lengths.len()])
    }

    fn add(&mut self, owner: usize, slots: &[usize]) {
        let owner = owner as u32 + 1;
        for &slot in slots {
            if let Some(now) = self.0.get_mut(slot) {
                *now = match *now {
                    Self::NONE => owner,
                    now if now == owner => owner,
                    _ => Self::SEVERAL,
                };
            }
        }
    }

    fn of(&self, slot: usize) -> u32 {
        self.0.get(slot).copied().unwrap_or(Self::NONE)
    }

    /// The bytes that have one owner, and those that have several.
    fn split(&self, slots: &Slots<'_>, list: impl Iterator<Item = usize>) -> (u64, u64) {
        list.fold((0, 0), |(unique, shared), slot| {
            let len = slots.len(slot);
            match self.of(slot) {
                Self::NONE => (unique, shared),
                Self::SEVERAL => (unique, shared + len),
                _ => (unique + len, shared),
            }
        })
    }
}

/// A layer that could be read.
struct KnownLayer {
    used: SystemTime,
    id: LayerId,
    tree_id: TreeId,
    logical: u64,
    /// Its objects and its own file.
    slots: Vec<usize>,
    missing: u64,
}

impl KnownLayer {
    fn new(slots: &Slots<'_>, file: &LayerFile, number: usize, layer: &Layer) -> Self {
        let mut named = slots.census.named_by(layer);
        named.slots.push(slots.census.len() + number);
        Self {
            used: file.used,
            id: file.id,
            tree_id: layer.tree_id(),
            logical: layer.logical_bytes(),
            slots: named.slots,
            missing: named.missing.len() as u64,
        }
    }
}

fn count_layers(slots: &Slots<'_>, known: &[KnownLayer], owners: &Owners) -> Vec<LayerUse> {
    let layer_use = |layer: &KnownLayer| {
        let (unique, shared) = owners.split(slots, layer.slots.iter().copied());
        LayerUse {
            id: layer.id,
            tree_id: layer.tree_id,
            logical: layer.logical,
            unique,
            shared,
            missing: layer.missing,
            used: layer.used,
        }
    };
    known.iter().map(layer_use).collect()
}

/// Fills in the bytes of the refs, and returns the owners.
fn count_refs(slots: &Slots<'_>, known: &[KnownLayer], refs: &mut [RefUse]) -> Owners {
    // Several layers of one ref may name the same object, and one ref may name a layer twice.
    let layers_of = |layers: &[LayerId]| -> BTreeSet<usize> {
        let found = layers
            .iter()
            .map(|id| known.binary_search_by_key(id, |layer| layer.id));
        found.filter_map(Result::ok).collect()
    };
    let slots_of = |layers: &BTreeSet<usize>| -> Vec<&[usize]> {
        let found = layers.iter().filter_map(|&number| known.get(number));
        found.map(|layer| &layer.slots[..]).collect()
    };
    let mut owners = Owners::none(slots);
    for (number, name) in refs.iter().enumerate() {
        for list in slots_of(&layers_of(&name.layers)) {
            owners.add(number, list);
        }
    }
    let mut counted_for = vec![0; slots.lengths.len()];
    for (number, name) in refs.iter_mut().enumerate() {
        let layers = layers_of(&name.layers);
        let number = number as u32 + 1;
        let own = slots_of(&layers).into_iter().flatten().copied();
        let once = own.filter(|&slot| {
            let last = counted_for.get_mut(slot);
            last.is_some_and(|last| std::mem::replace(last, number) != number)
        });
        (name.unique, name.shared) = owners.split(slots, once);
        let known = layers.iter().filter_map(|&number| known.get(number));
        name.logical = known.map(|layer| layer.logical).sum();
    }
    owners
}
