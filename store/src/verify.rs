//! Verification: whether every file of the store matches its name.
//!
//! Every verification checks the structure: the format, every index and the pack beside it, the
//! outboards, every layer file byte by byte, every object that a layer names, keys, refs and stat
//! caches. With [`VerifyOptions::data`], it hashes every byte of every object, too.
//!
//! A failed system call is no damage: the state of a file is unknown if the file cannot be opened,
//! mapped or read, because the process has too many files open, too little memory or no permission,
//! or because its disk fails. Such a file is [`Finding::Unchecked`], and so is a layer that names
//! objects which may be in it. [`crate::repair`] leaves both as they are.
//!
//! Verification runs beside builds and gc. It may skip files that appear meanwhile; a file that
//! vanishes is no problem, since every file that names it is removed first. Problems are checked
//! again while gc is kept from running, and only those that remain are reported.

mod data;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use rayon::prelude::*;
use serde::Serialize;

use crate::blob::{hash_file, read_exact};
use crate::disk::{Disk, read_file};
use crate::error::StoreError;
use crate::id::{KeyId, LayerId, ObjectId, PackId, TreeId};
use crate::keys::{FACTS_DIR, facts_name};
use crate::layer::{Kind, Layer, LayerError};
use crate::lock::FileLock;
use crate::mutex::lock;
use crate::objects::{LOOSE_MIN, Pack, PackSet};
use crate::outboard::Outboard;
use crate::pack::{self, Index, PackError};
use crate::refs::RefKind;
use crate::stat_cache::StatCache;
use crate::store::{Format, Found, Store, is_known_name};
use crate::trash::{self, TrashedLayer};

/// Bytes of one read of a file that is to be mapped.
const PIECE: usize = 1 << 20;
/// Most problems of one report.
const MAX_PROBLEMS: usize = 10_000;

/// The extent of a verification.
#[derive(Debug, Clone, Copy, Default)]
pub struct VerifyOptions {
    /// Whether to hash every object.
    pub data: bool,
}

/// Progress of a verification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VerifyEvent {
    /// Objects are being hashed.
    Data {
        /// Bytes hashed so far.
        done: u64,
        /// Bytes to hash.
        total: u64,
    },
}

/// How bad a problem is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Nothing is wrong; the fact is reported for information.
    Note,
    /// Nothing is lost: the file is made again, or does not belong to the store.
    Warning,
    /// A failed system call prevented the check: the file may be whole or damaged.
    Unchecked,
    /// Stored data is lost.
    Damage,
}

/// A kind of problem, and the part of the store that has it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Finding {
    /// The `format` file is damaged or missing.
    Format,
    /// A directory of the store is missing.
    Directory,
    /// A file has compat features that this program does not know.
    UnknownFeatures,
    /// The index of a pack is damaged: no lookup finds the objects in the pack.
    Index {
        /// The pack.
        pack: PackId,
    },
    /// A pack is damaged outside its objects: its length, its header, the zeroes between objects.
    Pack {
        /// The pack.
        pack: PackId,
    },
    /// A pack has no index: an ingest is giving both their names, or was interrupted. Gc removes
    /// it.
    PackWithoutIndex,
    /// An index has no pack; a power cut may leave only the index. If a layer needs the pack, that
    /// is [`Finding::Incomplete`].
    IndexWithoutPack {
        /// The pack.
        pack: PackId,
    },
    /// The bytes of an object are not those that were stored.
    Object {
        /// The object.
        object: ObjectId,
        /// The pack of the object; none for a loose one.
        pack: Option<PackId>,
    },
    /// The outboard of a loose object is damaged: the first read of the object reads all of it.
    Outboard {
        /// The object.
        object: ObjectId,
    },
    /// A loose object has no outboard, which a power cut may leave: the first read of the object
    /// reads all of it.
    NoOutboard {
        /// The object.
        object: ObjectId,
    },
    /// An outboard without its object. Gc removes it.
    OutboardAlone {
        /// The object.
        object: ObjectId,
    },
    /// A layer file is damaged.
    Layer {
        /// The layer.
        layer: LayerId,
    },
    /// A layer names objects that are missing, are damaged, or have other lengths.
    Incomplete {
        /// The layer.
        layer: LayerId,
        /// The first of the objects.
        object: ObjectId,
        /// Number of files of the layer whose objects these are.
        files: u64,
    },
    /// The file of a key is damaged: the key is built again.
    Key {
        /// The key.
        key: KeyId,
    },
    /// A key has a record of a layer that is missing: the key is built again.
    KeyLayer {
        /// The key.
        key: KeyId,
        /// The layer.
        layer: LayerId,
    },
    /// The file of a ref is damaged.
    Ref {
        /// The kind of the ref.
        ref_kind: RefKind,
    },
    /// A ref names a layer that is missing. The ref keeps its other layers, and is whole again once
    /// this one is stored again.
    RefLayer {
        /// The kind of the ref.
        ref_kind: RefKind,
        /// The name of the ref.
        name: String,
        /// The layer.
        layer: LayerId,
    },
    /// A stat cache is damaged, which a power cut may leave: the project's files are read again.
    StatCache,
    /// A file that does not belong to the store.
    Foreign,
    /// A system call on the file failed, so its state is unknown.
    Unchecked,
}

impl Finding {
    /// How bad it is.
    pub fn severity(&self) -> Severity {
        match self {
            Self::UnknownFeatures
            | Self::PackWithoutIndex
            | Self::IndexWithoutPack { .. }
            | Self::NoOutboard { .. }
            | Self::OutboardAlone { .. }
            | Self::StatCache => Severity::Note,
            Self::Directory
            | Self::Outboard { .. }
            | Self::Key { .. }
            | Self::KeyLayer { .. }
            | Self::RefLayer { .. }
            | Self::Foreign => Severity::Warning,
            Self::Unchecked => Severity::Unchecked,
            Self::Format
            | Self::Index { .. }
            | Self::Pack { .. }
            | Self::Object { .. }
            | Self::Layer { .. }
            | Self::Incomplete { .. }
            | Self::Ref { .. } => Severity::Damage,
        }
    }

    /// The consequence, as a short sentence for the user.
    pub fn meaning(&self) -> &'static str {
        match self {
            Self::Format => "the store cannot be opened",
            Self::Directory => "the files that it held are gone",
            Self::UnknownFeatures => "a newer iii wrote it; it can be read all the same",
            Self::Index { .. } => "the objects in its pack cannot be found",
            Self::Pack { .. } => "objects in it may be lost",
            Self::PackWithoutIndex | Self::IndexWithoutPack { .. } | Self::OutboardAlone { .. } => {
                "nothing uses it; gc removes it"
            }
            Self::Object { .. } => "files with these contents cannot be read",
            Self::Outboard { .. } | Self::NoOutboard { .. } => {
                "the first read of the object takes longer"
            }
            Self::Layer { .. } => "the layer cannot be used",
            Self::Incomplete { .. } => "some files of the layer cannot be read",
            Self::Key { .. } | Self::KeyLayer { .. } => "the step is run again when it is needed",
            Self::Ref { .. } => "the layers that it kept are unknown; gc does not run",
            Self::RefLayer {
                ref_kind: RefKind::Image,
                ..
            } => "the image must be imported again",
            Self::RefLayer {
                ref_kind: RefKind::Volume,
                ..
            } => "the cache is filled again",
            Self::RefLayer { .. } => "the worker's layers are built again when it is started",
            Self::StatCache => "the project's files are read again",
            Self::Foreign => "it is left alone, and takes room",
            Self::Unchecked => "it may be whole or damaged; it is left as it is",
        }
    }
}

/// One problem of a store.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Problem {
    /// How bad it is.
    pub severity: Severity,
    /// The kind of problem.
    #[serde(flatten)]
    pub finding: Finding,
    /// The file or directory, relative to the store.
    #[serde(serialize_with = "crate::path_json::one")]
    pub path: PathBuf,
    /// For display: the contradiction that was found.
    pub what: String,
}

/// The result of a verification.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// Worst first.
    pub problems: Vec<Problem>,
    /// Number of further problems, which do not fit.
    pub omitted: u64,
    /// Packs.
    pub packs: u64,
    /// Objects in packs.
    pub packed_objects: u64,
    /// Loose objects.
    pub loose_objects: u64,
    /// Layers.
    pub layers: u64,
    /// Keys.
    pub keys: u64,
    /// Refs.
    pub refs: u64,
    /// Bytes of objects that were hashed.
    pub hashed: u64,
}

impl Report {
    /// Whether the report has only notes.
    pub fn is_clean(&self) -> bool {
        self.worst() <= Some(Severity::Note) && self.omitted == 0
    }

    /// Whether a repair has nothing to do: apart from notes, the report has only refs whose layers
    /// must be stored again.
    pub fn is_mended(&self) -> bool {
        let is_left = |problem: &Problem| {
            problem.severity == Severity::Note
                || matches!(problem.finding, Finding::RefLayer { .. })
        };
        self.problems.iter().all(is_left) && self.omitted == 0
    }

    /// The severity of the worst problem.
    pub fn worst(&self) -> Option<Severity> {
        self.problems.iter().map(|problem| problem.severity).max()
    }
}

/// One thing to check.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Item {
    Format,
    /// The names in a directory.
    Names(&'static str),
    Pack(PackId),
    Loose(ObjectId),
    Layer(LayerId),
    /// A layer in the trash, which may be brought back, by its file.
    Trashed(LayerId, PathBuf),
    Key(KeyId),
    Ref(RefKind, String),
    Stat(String),
}

/// The events of a verification.
pub type OnVerify<'a> = &'a (dyn Fn(VerifyEvent) + Sync);

impl Store {
    /// Checks everything in the store: see [`crate::verify`]. Changes nothing. An error means that
    /// the store could not be checked; every problem of a part that was checked is in the report.
    /// Holds in memory some MiB for each thread, the indexes, and a bounded number of problems.
    pub fn verify(
        &self,
        options: VerifyOptions,
        on_event: OnVerify<'_>,
    ) -> Result<Report, StoreError> {
        let mut first = Pass::new(self, options, on_event);
        first.run();
        let (report, found) = first.into_report();
        let doubtful: BTreeSet<Item> = found
            .iter()
            .filter(|(_, problem)| problem.severity > Severity::Note)
            .map(|(item, _)| item.clone())
            .collect();
        let mut problems: Vec<Problem> = found
            .into_iter()
            .filter(|(item, _)| !doubtful.contains(item))
            .map(|(_, problem)| problem)
            .collect();
        let mut omitted = 0;
        if !doubtful.is_empty() {
            // No collection can run in a read-only store either, so no lock is needed.
            let gc = (!self.is_read_only())
                .then(|| FileLock::acquire(self.disk(), &self.gc_lock(), &|| {}))
                .transpose()?;
            let again = Pass::new(self, options, &|_| {});
            again.run_on(&doubtful);
            drop(gc);
            let (checked, found) = again.into_report();
            omitted = checked.omitted;
            // Loading reads every index, so it may report items that are not in doubt.
            let found = found
                .into_iter()
                .filter(|(item, _)| doubtful.contains(item));
            problems.extend(found.map(|(_, problem)| problem));
        }
        problems.sort_by(|a, b| b.severity.cmp(&a.severity).then_with(|| a.cmp(b)));
        Ok(Report {
            problems,
            omitted,
            ..report
        })
    }
}

/// One pass over the store, or over some items of it.
pub(crate) struct Pass<'a> {
    store: &'a Store,
    disk: &'a dyn Disk,
    dir: &'a Path,
    options: VerifyOptions,
    on_event: OnVerify<'a>,
    found: Mutex<Vec<(Item, Problem)>>,
    omitted: AtomicU64,
    /// The packs whose index is whole.
    packs: HashMap<PackId, Arc<Pack>>,
    /// The packs that exist.
    set: PackSet,
    /// The lengths of the loose objects.
    loose: HashMap<ObjectId, u64>,
    /// Whether all indexes were read, and the names of all loose objects.
    loaded: bool,
    /// Whether objects may be in an index or a directory that could not be read.
    blind: AtomicBool,
    /// Objects that were read and do not match their ids.
    lost: RwLock<HashSet<ObjectId>>,
    /// The objects in the trash, as of the first lookup there.
    trash: OnceLock<(PackSet, HashMap<ObjectId, u64>)>,
    /// The trees of the layers that are whole, as of the first lookup.
    trees: OnceLock<HashSet<TreeId>>,
    hashed: AtomicU64,
    total: u64,
    counts: Report,
}

impl<'a> Pass<'a> {
    fn new(store: &'a Store, options: VerifyOptions, on_event: OnVerify<'a>) -> Self {
        let mut pass = Self {
            store,
            disk: store.disk().as_ref(),
            dir: store.dir(),
            options,
            on_event,
            found: Mutex::default(),
            omitted: AtomicU64::new(0),
            packs: HashMap::new(),
            set: PackSet::default(),
            loose: HashMap::new(),
            loaded: false,
            blind: AtomicBool::new(false),
            lost: RwLock::default(),
            trash: OnceLock::new(),
            trees: OnceLock::new(),
            hashed: AtomicU64::new(0),
            total: 0,
            counts: Report::default(),
        };
        pass.load();
        pass.loaded = true;
        pass
    }

    /// A pass that treats these packs and loose objects as missing.
    pub(crate) fn without(
        store: &'a Store,
        packs: &BTreeSet<PackId>,
        loose: &BTreeSet<ObjectId>,
    ) -> Self {
        let mut pass = Self::new(store, VerifyOptions::default(), &|_| {});
        let there = pass.set.packs().iter();
        let there = there.filter(|pack| !packs.contains(&pack.id)).cloned();
        let there = there.collect();
        pass.set = PackSet::default();
        pass.set.add(there);
        pass.loose
            .retain(|id, len| *len >= LOOSE_MIN && !loose.contains(id));
        pass
    }

    /// The files of layers, in the trash, too, that are damaged or name missing objects. A layer
    /// whose state is unknown is not among them.
    pub(crate) fn broken_layers(&self) -> Vec<(LayerId, PathBuf)> {
        lock(&self.found).clear();
        let layers = self.list("layers", is_id::<LayerId>);
        let ids = layers.iter().filter_map(|name| name.parse().ok());
        let mut items: Vec<Item> = ids.map(Item::Layer).collect();
        items.extend(self.trashed_layers());
        items.par_iter().for_each(|item| self.check_item(item));
        let found = lock(&self.found);
        let broken = found
            .iter()
            .filter_map(|(_, problem)| match problem.finding {
                Finding::Layer { layer } | Finding::Incomplete { layer, .. } => {
                    Some((layer, problem.path.clone()))
                }
                _ => None,
            });
        broken.collect()
    }

    fn into_report(self) -> (Report, Vec<(Item, Problem)>) {
        let report = Report {
            omitted: self.omitted.into_inner(),
            hashed: self.hashed.into_inner(),
            ..self.counts
        };
        let found = self.found.into_inner();
        (report, found.unwrap_or_else(PoisonError::into_inner))
    }

    fn report(&self, item: &Item, finding: Finding, path: &Path, what: impl Into<String>) {
        let mut found = lock(&self.found);
        if found.len() >= MAX_PROBLEMS {
            self.omitted.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let path = path.strip_prefix(self.dir).unwrap_or(path);
        let problem = Problem {
            severity: finding.severity(),
            finding,
            path: path.to_owned(),
            what: what.into(),
        };
        found.push((item.clone(), problem));
    }

    /// Reports that a failed system call leaves the content of a file unknown.
    fn unchecked(&self, item: &Item, path: &Path, err: &io::Error) {
        let holds_objects = match item {
            Item::Names(name) => ["packs", "loose", "trash"].contains(name),
            // Once loading is done, a file that cannot be read is known to exist.
            Item::Pack(_) | Item::Loose(_) => !self.loaded,
            _ => false,
        };
        if holds_objects {
            self.blind.store(true, Ordering::Relaxed);
        }
        let mut what = format!("it cannot be read: {err}");
        let own = rustix::process::geteuid().as_raw();
        if err.kind() == io::ErrorKind::PermissionDenied
            && let Ok(meta) = self.disk.metadata(path)
            && meta.uid() != own
        {
            what = format!(
                "it belongs to user {}, and user {own} may not read it: change its owner, or verify as \
                 its owner",
                meta.uid()
            );
        }
        self.report(item, Finding::Unchecked, path, what);
    }

    /// Reports an error: as damage, or as a failed system call that leaves the state unknown.
    fn failed(&self, item: &Item, finding: Finding, path: &Path, err: &StoreError) {
        match err {
            StoreError::Io { source, .. } => self.unchecked(item, path, source),
            err => self.report(item, finding, path, err.in_one_line()),
        }
    }

    /// Reports the error of a read, unless the file is gone.
    fn read<T>(&self, item: &Item, path: &Path, read: io::Result<T>) -> Option<T> {
        match read {
            Ok(value) => Some(value),
            Err(err) if err.kind() == io::ErrorKind::NotFound => None,
            Err(err) => {
                self.unchecked(item, path, &err);
                None
            }
        }
    }

    /// Opens a file that is to be mapped, and reads it once: a failing disk is an error here, but
    /// would end the process in a read through the mapping.
    fn open(&self, item: &Item, path: &Path) -> Option<File> {
        let file = self.read(item, path, self.disk.open(path))?;
        self.read(item, path, read_through(self.disk, &file))?;
        Some(file)
    }

    /// Returns the names in a directory that `known` accepts, and reports the others.
    fn list(&self, name: &'static str, known: impl Fn(&str) -> bool) -> Vec<String> {
        let (item, dir) = (Item::Names(name), self.dir.join(name));
        let mut ours = Vec::new();
        match self.disk.list(&dir) {
            Ok(names) => {
                for name in names {
                    if let Some(name) = name.to_str().filter(|name| known(name)) {
                        ours.push(name.to_owned());
                    } else {
                        let path = dir.join(&name);
                        let what = "nothing of this name belongs here";
                        self.report(&item, Finding::Foreign, &path, what);
                    }
                }
            }
            Err(err) if err.kind() == io::ErrorKind::NotFound => {
                self.report(&item, Finding::Directory, &dir, "the directory is missing");
            }
            Err(err) => self.unchecked(&item, &dir, &err),
        }
        ours
    }

    /// Loads everything that later lookups need: indexes, and the names of loose objects.
    fn load(&mut self) {
        let pack_file = |name: &str| {
            let id = name.strip_suffix(".idx").or(name.strip_suffix(".pack"));
            id.is_some_and(is_id::<PackId>)
        };
        let names = self.list("packs", pack_file);
        let mut indexed = HashSet::new();
        for name in &names {
            indexed.extend(name.strip_suffix(".idx"));
        }
        for name in &names {
            if name
                .strip_suffix(".pack")
                .is_some_and(|id| !indexed.contains(id))
            {
                let path = self.dir.join("packs").join(name);
                let item = Item::Names("packs");
                self.report(&item, Finding::PackWithoutIndex, &path, "it has no index");
            }
        }
        let ids: Vec<PackId> = indexed.iter().filter_map(|id| id.parse().ok()).collect();
        let packs: Vec<Arc<Pack>> = ids
            .par_iter()
            .filter_map(|id| self.load_index(id))
            .collect();
        self.counts.packs = packs.len() as u64;
        let mut there = Vec::new();
        for pack in packs {
            self.counts.packed_objects += u64::from(pack.index.count());
            self.total += pack
                .index
                .objects()
                .map(|(_, place)| place.len)
                .sum::<u64>();
            let meta = self.disk.metadata(&pack.path);
            if self.read(&Item::Pack(pack.id), &pack.path, meta).is_some() {
                there.push(Arc::clone(&pack));
            }
            self.packs.insert(pack.id, pack);
        }
        there.sort_by_key(|pack| pack.id);
        self.set.add(there);

        let loose_file = |name: &str| is_id::<ObjectId>(name.strip_suffix(".cv").unwrap_or(name));
        let dir = self.dir.join("loose");
        let mut outboards = Vec::new();
        for name in self.list("loose", loose_file) {
            if let Some(id) = name.strip_suffix(".cv") {
                outboards.extend(id.parse::<ObjectId>());
            } else if let Ok(id) = name.parse::<ObjectId>() {
                let path = dir.join(&name);
                let meta = self.read(&Item::Loose(id), &path, self.disk.metadata(&path));
                let len = meta.map(|meta| if meta.is_file() { meta.size() } else { 0 });
                self.loose.extend(len.map(|len| (id, len)));
            }
        }
        for object in outboards {
            if !self.loose.contains_key(&object) {
                let path = self.store.places().outboard(&object);
                let finding = Finding::OutboardAlone { object };
                self.report(
                    &Item::Names("loose"),
                    finding,
                    &path,
                    "its object is not there",
                );
            }
        }
        self.counts.loose_objects = self.loose.len() as u64;
        self.total += self.loose.values().sum::<u64>();
    }

    fn load_index(&self, id: &PackId) -> Option<Arc<Pack>> {
        let (item, path) = (Item::Pack(*id), self.store.places().index(id));
        let file = self.open(&item, &path)?;
        match Index::open(self.disk, &file, id) {
            Ok(index) => {
                if index.compat_features() != [0; 2] {
                    self.features(&item, &path, &index.compat_features());
                }
                let pack = self.store.places().pack(id);
                Some(Arc::new(Pack::new(*id, index, pack)))
            }
            Err(PackError::Map(err)) => {
                self.unchecked(&item, &path, &err);
                None
            }
            Err(err) => {
                self.report(&item, Finding::Index { pack: *id }, &path, err.to_string());
                None
            }
        }
    }

    fn features(&self, item: &Item, path: &Path, features: &dyn std::fmt::Debug) {
        let what = format!("unknown compat features {features:x?}");
        self.report(item, Finding::UnknownFeatures, path, what);
    }

    /// Checks everything.
    fn run(&mut self) {
        let mut items = vec![Item::Format, Item::Names("")];
        let loaded = self.packs.keys().map(|id| Item::Pack(*id));
        items.extend(loaded.chain(self.loose.keys().map(|id| Item::Loose(*id))));
        // Records and refs before layers: the layers that they name exist as long as they do.
        let keys = self.list("keys", is_id::<KeyId>);
        items.extend(
            keys.iter()
                .filter_map(|name| name.parse().ok())
                .map(Item::Key),
        );
        self.counts.keys = keys.len() as u64;
        self.list(FACTS_DIR, |name| facts_name(name).is_some());
        items.push(Item::Names("refs"));
        for kind in RefKind::ALL {
            let refs = self.list(kind.path(), |_| true);
            self.counts.refs += refs.len() as u64;
            items.extend(refs.into_iter().map(|name| Item::Ref(kind, name)));
        }
        let stat = self.list("stat", |_| true);
        items.extend(stat.into_iter().map(Item::Stat));
        let layers = self.list("layers", is_id::<LayerId>);
        items.extend(
            layers
                .iter()
                .filter_map(|name| name.parse().ok())
                .map(Item::Layer),
        );
        self.counts.layers = layers.len() as u64;
        items.extend(self.trashed_layers());
        for dir in ["leases", "locks", "tmp"] {
            self.list(dir, |_| true);
        }
        self.check(&items);
    }

    /// Checks these items again.
    fn run_on(&self, items: &BTreeSet<Item>) {
        for item in items {
            match item {
                Item::Names("keys") => drop(self.list("keys", is_id::<KeyId>)),
                Item::Names(FACTS_DIR) => {
                    drop(self.list(FACTS_DIR, |name| facts_name(name).is_some()));
                }
                Item::Names("layers") => drop(self.list("layers", is_id::<LayerId>)),
                // Checked by loading, or as an item.
                Item::Names("packs" | "loose" | "" | "refs") => {}
                Item::Names(name) => drop(self.list(name, |_| true)),
                _ => {}
            }
        }
        self.check(&items.iter().cloned().collect::<Vec<_>>());
    }

    fn check(&self, items: &[Item]) {
        // Objects first: the check of layers needs to know which objects are lost.
        let (objects, rest): (Vec<_>, Vec<_>) = items
            .iter()
            .partition(|item| matches!(item, Item::Pack(_) | Item::Loose(_)));
        objects.par_iter().for_each(|item| self.check_item(item));
        rest.par_iter().for_each(|item| self.check_item(item));
    }

    fn check_item(&self, item: &Item) {
        match item {
            Item::Format => self.check_format(item),
            Item::Names("") => drop(self.list("", is_known_name)),
            Item::Names("refs") => drop(self.list("refs", |name| {
                RefKind::ALL
                    .iter()
                    .any(|kind| kind.path() == format!("refs/{name}"))
            })),
            Item::Names(_) => {}
            Item::Pack(id) => {
                if let Some(pack) = self.packs.get(id) {
                    self.check_pack(item, pack);
                }
            }
            Item::Loose(id) => {
                if let Some(len) = self.loose.get(id) {
                    self.check_loose(item, id, *len);
                }
            }
            Item::Layer(id) => self.check_layer(item, id, &self.store.places().layer(id)),
            Item::Trashed(id, path) => self.check_layer(item, id, path),
            Item::Key(id) => self.check_key(item, id),
            Item::Ref(kind, file) => self.check_ref(item, *kind, file),
            Item::Stat(name) => {
                let path = self.dir.join("stat").join(name);
                let Some(file) = self.open(item, &path) else {
                    return;
                };
                match StatCache::checked(self.disk, &file) {
                    Ok(Some(_)) => {}
                    Ok(None) => {
                        let what = "its checksum does not hold";
                        self.report(item, Finding::StatCache, &path, what);
                    }
                    Err(err) => self.unchecked(item, &path, &err),
                }
            }
        }
    }

    fn check_format(&self, item: &Item) {
        let path = self.dir.join("format");
        match Format::read(self.disk, self.dir) {
            Ok(Found::Current(format)) => {
                let compat = format.compat.iter().map(String::as_str);
                let unknown: Vec<&str> = compat.chain(format.unknown_ro_compat()).collect();
                if !unknown.is_empty() {
                    self.features(item, &path, &unknown);
                }
            }
            Ok(Found::Nothing) => self.report(item, Finding::Format, &path, "it is missing"),
            Ok(Found::Outdated(_)) => {
                self.report(item, Finding::Format, &path, "it is of an earlier layout");
            }
            Err(err) => self.failed(item, Finding::Format, &path, &err),
        }
    }

    fn check_pack(&self, item: &Item, pack: &Pack) {
        let finding = || Finding::Pack { pack: pack.id };
        let path = &pack.path;
        let file = match self.disk.open(path) {
            Ok(file) => file,
            Err(err) if err.kind() == io::ErrorKind::NotFound => {
                // A pack is removed after its index, unless the index still exists.
                let index = self.store.places().index(&pack.id);
                if self.disk.metadata(&index).is_ok() {
                    let finding = Finding::IndexWithoutPack { pack: pack.id };
                    self.report(item, finding, &index, "its pack is missing");
                }
                return;
            }
            Err(err) => return self.unchecked(item, path, &err),
        };
        let mut header = [0; pack::HEADER];
        match file.metadata() {
            Ok(meta) if meta.len() != pack.index.pack_len() => {
                let (is, was) = (meta.len(), pack.index.pack_len());
                self.report(item, finding(), path, format!("it has {is} bytes of {was}"));
            }
            Ok(_) => {}
            Err(err) => return self.unchecked(item, path, &err),
        }
        match read_exact(self.disk, &file, &mut header, 0) {
            Ok(()) if !pack::is_header(&header) => {
                self.report(item, finding(), path, "its header is damaged");
            }
            Ok(()) => {
                let features = pack::compat_features(&header);
                if features != [0; 2] {
                    self.features(item, path, &features);
                }
            }
            // The length was reported already.
            Err(err) if err.kind() == io::ErrorKind::UnexpectedEof => {}
            Err(err) => self.unchecked(item, path, &err),
        }
        if self.options.data {
            self.check_pack_data(item, pack, &file);
        }
    }

    fn lose(&self, object: ObjectId) {
        let mut lost = self.lost.write().unwrap_or_else(PoisonError::into_inner);
        lost.insert(object);
    }

    fn progress(&self, bytes: u64) {
        let done = self.hashed.fetch_add(bytes, Ordering::Relaxed) + bytes;
        let total = self.total.max(done);
        (self.on_event)(VerifyEvent::Data { done, total });
    }

    fn check_loose(&self, item: &Item, id: &ObjectId, len: u64) {
        let path = self.store.places().loose(id);
        let finding = || Finding::Object {
            object: *id,
            pack: None,
        };
        if len < LOOSE_MIN {
            self.lose(*id);
            return self.report(item, finding(), &path, "it was cut short, or is no file");
        }
        self.check_outboard(item, id, len);
        if !self.options.data {
            return;
        }
        let Some(file) = self.read(item, &path, self.disk.open(&path)) else {
            return;
        };
        match hash_file(self.disk, &file) {
            Ok((object, _)) if object == *id => {}
            Ok(_) => {
                self.lose(*id);
                self.report(
                    item,
                    finding(),
                    &path,
                    "its bytes are not those that were stored",
                );
            }
            Err(err) => self.unchecked(item, &path, &err),
        }
        self.progress(len);
    }

    fn check_outboard(&self, item: &Item, id: &ObjectId, len: u64) {
        let path = self.store.places().outboard(id);
        let (finding, what) = match read_file(self.disk, &path, Outboard::file_len(len)) {
            Ok(Some(bytes)) if Outboard::decode(&bytes, id, len).is_some() => return,
            Ok(None) => (Finding::NoOutboard { object: *id }, "it is missing"),
            Err(StoreError::Io { source, .. }) => return self.unchecked(item, &path, &source),
            Ok(Some(_)) | Err(_) => (Finding::Outboard { object: *id }, "it is damaged"),
        };
        // Without the object, a missing outboard is no problem.
        if self.disk.metadata(&self.store.places().loose(id)).is_ok() {
            self.report(item, finding, &path, what);
        }
    }

    /// The layers in the trash.
    fn trashed_layers(&self) -> Vec<Item> {
        match trash::layers(self.store.site()) {
            Ok(layers) => {
                let item = |layer: TrashedLayer| Item::Trashed(layer.id, layer.path);
                layers.into_iter().map(item).collect()
            }
            Err(err) => {
                let (item, path) = (Item::Names("trash"), self.dir.join("trash"));
                self.failed(&item, Finding::Unchecked, &path, &err);
                Vec::new()
            }
        }
    }

    /// The length of an object, if it exists.
    fn len_of(&self, object: &ObjectId) -> Option<u64> {
        let packed = self
            .set
            .find(object)
            .map(|(pack, ix)| pack.index.place(ix).len);
        let len = packed.or_else(|| self.loose.get(object).copied());
        len.or_else(|| self.in_trash(object))
    }

    /// The length of an object in the trash, from which a lookup of the store would bring it back.
    fn in_trash(&self, object: &ObjectId) -> Option<u64> {
        let (set, loose) = self.trash.get_or_init(|| self.load_trash());
        let packed = set.find(object).map(|(pack, ix)| pack.index.place(ix).len);
        packed.or_else(|| loose.get(object).copied())
    }

    fn load_trash(&self) -> (PackSet, HashMap<ObjectId, u64>) {
        let (mut packs, mut loose) = (Vec::new(), HashMap::new());
        let mut load = || -> Result<(), StoreError> {
            for (_, dir) in trash::generations(self.disk, self.dir)? {
                for name in trash::list(self.disk, &dir)? {
                    let path = dir.join(&name);
                    match name.split_once('.') {
                        Some((id, "idx")) => {
                            let id = id.parse::<PackId>().ok();
                            let pack = id.and_then(|id| self.load_trashed_index(&id, &path));
                            packs.extend(pack);
                        }
                        Some((id, trash::LOOSE)) => {
                            if let Ok(id) = id.parse::<ObjectId>() {
                                let meta = self.disk.metadata(&path);
                                let meta = self.read(&Item::Names("trash"), &path, meta);
                                loose.extend(meta.map(|meta| (id, meta.size())));
                            }
                        }
                        _ => {}
                    }
                }
            }
            Ok(())
        };
        if let Err(err) = load() {
            let (item, path) = (Item::Names("trash"), self.dir.join("trash"));
            self.failed(&item, Finding::Unchecked, &path, &err);
        }
        let mut set = PackSet::default();
        set.add(packs);
        (set, loose)
    }

    fn load_trashed_index(&self, id: &PackId, path: &Path) -> Option<Arc<Pack>> {
        let item = Item::Names("trash");
        let file = self.open(&item, path)?;
        match Index::open(self.disk, &file, id) {
            Ok(index) => Some(Arc::new(Pack::new(*id, index, path.with_extension("pack")))),
            Err(PackError::Map(err)) => {
                self.unchecked(&item, path, &err);
                None
            }
            // The objects that it named are gone.
            Err(_) => None,
        }
    }

    fn check_layer(&self, item: &Item, id: &LayerId, path: &Path) {
        let finding = || Finding::Layer { layer: *id };
        let Some(file) = self.open(item, path) else {
            return;
        };
        let layer = match Layer::open(self.disk, &file)
            .and_then(|layer| layer.check_all().map(|()| layer))
        {
            Ok(layer) if layer.layer_id() == *id => layer,
            Ok(_) => {
                return self.report(item, finding(), path, "its contents do not match its name");
            }
            Err(LayerError::Map(err)) => return self.unchecked(item, path, &err),
            Err(err) => return self.report(item, finding(), path, err.to_string()),
        };
        if layer.compat_features() != [0; 2] {
            self.features(item, path, &layer.compat_features());
        }
        let lost = self.lost.read().unwrap_or_else(PoisonError::into_inner);
        let mut files = 0;
        let mut first = None;
        for node in layer.nodes().filter(|node| node.kind() == Kind::File) {
            let object = node.object();
            let len = self.len_of(&object);
            if len != Some(node.size()) || lost.contains(&object) {
                files += 1;
                let damaged = lost.contains(&object);
                first.get_or_insert((object, len, damaged, node));
            }
        }
        let Some((object, len, damaged, node)) = first else {
            return;
        };
        // The layer was removed with its objects.
        if self.disk.metadata(path).is_err() {
            return;
        }
        let why = match len {
            _ if damaged => "is damaged".to_owned(),
            None => "is not there".to_owned(),
            Some(len) => format!("is {len} bytes long, not {}", node.size()),
        };
        let name = String::from_utf8_lossy(&node.path()).into_owned();
        if len.is_none() && !damaged && self.blind.load(Ordering::Relaxed) {
            let what =
                format!("object {object} of {name:?} may be in something that cannot be read");
            return self.report(item, Finding::Unchecked, path, what);
        }
        let what = format!("object {object} of {name:?} {why}; files concerned: {files}");
        let finding = Finding::Incomplete {
            layer: *id,
            object,
            files,
        };
        self.report(item, finding, path, what);
    }

    /// Whether a layer is missing. An I/O error is reported, and then the result is false.
    fn lacks_layer(&self, item: &Item, id: &LayerId) -> bool {
        let path = self.store.places().layer(id);
        match self.disk.metadata(&path) {
            Ok(meta) => !meta.is_file(),
            Err(err) if err.kind() == io::ErrorKind::NotFound => true,
            Err(err) => {
                self.unchecked(item, &path, &err);
                false
            }
        }
    }

    /// Whether a layer of the same tree serves in place of a missing one, as for the upper of a
    /// worker.
    fn is_served(&self, kind: RefKind, id: &LayerId) -> bool {
        if matches!(kind, RefKind::Image | RefKind::Volume) {
            return false;
        }
        let tree = self.store.tree_of(id).ok().flatten();
        let trees = self.trees.get_or_init(|| {
            let ids = self.store.layer_ids().unwrap_or_default().into_iter();
            let layers = ids.filter_map(|id| {
                let path = self.store.places().layer(&id);
                self.store.open_layer_file(&id, &path).ok().flatten()
            });
            layers.map(|layer| layer.tree_id()).collect()
        });
        tree.is_some_and(|tree| trees.contains(&tree))
    }

    /// Whether a layer was set aside and is whole again, so that the next lookup brings it back.
    fn is_restorable(&self, id: &LayerId) -> bool {
        let Ok(Some((_, layer))) = self.store.aside_layer(id) else {
            return false;
        };
        let mut files = layer.nodes().filter(|node| node.kind() == Kind::File);
        files.all(|node| self.len_of(&node.object()) == Some(node.size()))
    }

    fn check_key(&self, item: &Item, key: &KeyId) {
        let path = self.store.key_path(key);
        match self.store.checked_heads(key) {
            Ok(records) => {
                for record in records {
                    let path_of_facts = self.store.facts_path(key, &record.facts);
                    let facts = match self.store.checked_facts(key, &record) {
                        Ok(Some(_)) => None,
                        Ok(None) => Some("they are not there".to_owned()),
                        Err(StoreError::Io { source, .. }) => {
                            self.unchecked(item, &path_of_facts, &source);
                            None
                        }
                        Err(err) => Some(err.in_one_line()),
                    };
                    if let Some(why) = facts {
                        let what = format!("the facts of a record cannot be used: {why}");
                        self.report(item, Finding::Key { key: *key }, &path_of_facts, what);
                    }
                    let layer = record.layer_id;
                    if self.lacks_layer(item, &layer) {
                        let finding = Finding::KeyLayer { key: *key, layer };
                        self.report(item, finding, &path, format!("layer {layer} is not there"));
                    }
                }
            }
            Err(err) => self.failed(item, Finding::Key { key: *key }, &path, &err),
        }
    }

    fn check_ref(&self, item: &Item, kind: RefKind, file: &str) {
        let path = self.dir.join(kind.path()).join(file);
        match self.store.read_ref(kind, file) {
            Ok(Some((name, content))) => {
                for layer in content.layers {
                    if self.lacks_layer(item, &layer)
                        && !self.is_restorable(&layer)
                        && !self.is_served(kind, &layer)
                    {
                        let what = format!("layer {layer} of {name:?} is not there");
                        let name = name.clone();
                        let finding = Finding::RefLayer {
                            ref_kind: kind,
                            name,
                            layer,
                        };
                        self.report(item, finding, &path, what);
                    }
                }
            }
            Ok(None) => {}
            Err(err) => self.failed(item, Finding::Ref { ref_kind: kind }, &path, &err),
        }
    }
}

/// Reads a file from its beginning to its end.
fn read_through(disk: &dyn Disk, file: &File) -> io::Result<()> {
    let mut piece = vec![0; PIECE];
    let mut at = 0;
    loop {
        match disk.read_at(file, &mut piece, at) {
            Ok(0) => return Ok(()),
            Ok(count) => at += count as u64,
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            Err(err) => return Err(err),
        }
    }
}

/// Whether a file's name is an id in its canonical form.
fn is_id<T: std::str::FromStr + ToString>(name: &str) -> bool {
    name.parse::<T>().is_ok_and(|id| id.to_string() == name)
}
