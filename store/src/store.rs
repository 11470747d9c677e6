//! Opening a store, and reading from it.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};

use serde::{Deserialize, Serialize};

use crate::blob::Blob;
use crate::disk::{Disk, RealDisk, names, read_file};
use crate::error::{IoContext, StoreError};
use crate::id::{KeyId, LayerId, ObjectId};
pub(crate) use crate::json::read_json;
use crate::json::{self, seal_broken};
use crate::layer::Layer;
use crate::lease::{self, Lease};
use crate::lock::FileLock;
use crate::mutex::lock;
use crate::objects::{LOOKS, Objects};
use crate::ref_kind::RefKind;
use crate::reserve::{self, RESERVE};
use crate::seal;
use crate::site::Site;
use crate::trash::{self, Places};

/// Version of the layout described in the crate's documentation.
pub const FORMAT_VERSION: u32 = 1;
/// Longest `format` file, in bytes.
const MAX_FORMAT: u64 = 64 << 10;
/// The directories of a store.
pub(crate) const DIRS: [&str; 17] = [
    "packs",
    "loose",
    "layers",
    "keys",
    "facts",
    "refs",
    "refs/image",
    "refs/worker",
    "refs/managed",
    "refs/snapshot",
    "refs/volume",
    "leases",
    "locks",
    "tmp",
    "stat",
    "trash",
    RESERVE,
];
/// Directories of repairs and of later versions, which appear later.
const OTHER_DIRS: [&str; 1] = ["damaged"];
/// How often the format is written anew because a sweep removed it: programs from before sweeps
/// took [`Site::format_lock`] may run beside this one.
const MAX_FORMAT_TRIES: u32 = 8;
/// The ro-compat feature of a store whose keys have heads: a program that does not know them would
/// drop them.
pub(crate) const HEADS: &str = "record_heads";
/// Where the facts of records are.
pub(crate) const FACTS_DIR: &str = "facts";
/// The incompat feature of a store whose JSON files are sealed and whose loose objects have
/// outboards.
pub(crate) const SEALED: &str = "sealed";

/// The `format` file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Format {
    version: u32,
    /// Features that older programs may ignore.
    #[serde(default)]
    pub(crate) compat: Vec<String>,
    /// Features that older programs may read past but not write beside.
    #[serde(default)]
    pub(crate) ro_compat: Vec<String>,
    /// Features without which nothing may be read.
    #[serde(default)]
    incompat: Vec<String>,
}

impl Default for Format {
    /// Of a new store.
    fn default() -> Self {
        Self {
            version: FORMAT_VERSION,
            compat: Vec::new(),
            ro_compat: Vec::new(),
            incompat: vec![SEALED.to_owned()],
        }
    }
}

/// Contents of the `format` file of a directory.
#[derive(Debug)]
pub(crate) enum Found {
    /// The file is missing.
    Nothing,
    /// A store that this program reads.
    Current(Format),
    /// A store of the layout before seals.
    Outdated(Format),
}

impl Format {
    /// Reads the format of the store in `dir`. One that this program does not know is an error.
    pub(crate) fn read(disk: &dyn Disk, dir: &Path) -> Result<Found, StoreError> {
        let path = dir.join("format");
        let Some(text) = read_file(disk, &path, MAX_FORMAT)? else {
            return Ok(Found::Nothing);
        };
        let sealed = seal::open(&text);
        // A file without a seal may be older than seals, or newer than this program. It is told
        // from a damaged one by being one whole JSON text, which a sealed file never is, for any
        // change of a byte.
        let parsed = serde_json::from_slice::<Self>(sealed.unwrap_or(&text));
        let mut format = match parsed {
            Ok(format) => format,
            Err(source) if sealed.is_some() => return Err(StoreError::Json { path, source }),
            Err(_) => return Err(seal_broken(path)),
        };
        let has_seals = format.incompat.iter().any(|name| name == SEALED);
        format.incompat.retain(|name| name != SEALED);
        if format.version != FORMAT_VERSION || !format.incompat.is_empty() {
            return Err(StoreError::Unsupported {
                path: dir.to_owned(),
                version: format.version,
                incompat: format.incompat,
            });
        }
        match (has_seals, sealed.is_some()) {
            (true, true) => Ok(Found::Current(format)),
            (false, false) => Ok(Found::Outdated(format)),
            _ => Err(seal_broken(path)),
        }
    }
}

impl Format {
    /// Its ro-compat features that this program does not know.
    pub(crate) fn unknown_ro_compat(&self) -> Vec<&str> {
        let is_known = |name: &str| {
            let refs = RefKind::ALL.into_iter().filter_map(RefKind::feature);
            let mut known = refs.chain([HEADS]);
            known.any(|feature| feature == name)
        };
        let names = self.ro_compat.iter().map(String::as_str);
        names.filter(|name| !is_known(name)).collect()
    }

    /// Why a store of this format can but be read, if so.
    pub(crate) fn read_only(&self) -> Option<String> {
        let unknown = self.unknown_ro_compat();
        (!unknown.is_empty()).then(|| format!("unknown ro-compat features {unknown:?}"))
    }

    /// This format, with seals.
    pub(crate) fn sealed(mut self) -> Self {
        self.incompat.push(SEALED.to_owned());
        self
    }
}

#[derive(Debug)]
struct Inner {
    site: Site,
    read_only: Option<String>,
    /// Whether its format is damaged, so that it can but be verified and repaired.
    broken: bool,
    objects: Objects,
    layers: Mutex<HashMap<LayerId, Weak<Layer>>>,
    /// With fewer files than this, no collection is due because of their number.
    collect_from: AtomicUsize,
}

/// A store of layers and their objects: see the crate's documentation. Cheap to clone; shared
/// freely between threads and, through its directory, between processes.
#[derive(Debug, Clone)]
pub struct Store(Arc<Inner>);

impl Store {
    /// Opens the store in `dir`, or makes one if there is nothing.
    ///
    /// A directory that cannot be written, or that has ro-compat features unknown here, is opened
    /// for reading: writes fail with [`StoreError::ReadOnly`].
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, StoreError> {
        Self::open_on(dir.as_ref(), Arc::new(RealDisk))
    }

    /// Opens the store on a disk of the caller's, for tests that make it fail.
    pub fn open_on(dir: &Path, disk: Arc<dyn Disk>) -> Result<Self, StoreError> {
        let mut found = Format::read(disk.as_ref(), dir)?;
        let made = matches!(found, Found::Nothing);
        if made {
            create(dir, &disk)?;
            found = Format::read(disk.as_ref(), dir)?;
        }
        let format = match found {
            Found::Current(format) => format,
            Found::Outdated(_) => return Err(StoreError::Outdated(dir.to_owned())),
            Found::Nothing => return Err(no_format(dir)),
        };
        let tmp = dir.join("tmp");
        let refused = || {
            let err = disk.may_write_in(&tmp).err()?;
            Some(format!("{}: {err}", tmp.display()))
        };
        let read_only = format.read_only().or_else(refused);
        if read_only.is_none() {
            // Stores of earlier programs do not have all of them.
            let refs = RefKind::ALL.map(RefKind::path);
            for path in refs
                .into_iter()
                .chain([FACTS_DIR])
                .map(|path| dir.join(path))
            {
                if disk.metadata(&path).is_err() {
                    disk.create_dir(&path).at("making", &path)?;
                }
            }
        }
        let writable = read_only.is_none();
        let store = Self::assemble(dir, disk, read_only);
        let (disk, reserve) = (store.disk(), dir.join(RESERVE));
        let is_missing = || disk.metadata(&reserve).is_err() && disk.create_dir(&reserve).is_ok();
        if writable && (made || is_missing()) {
            reserve::fill(store.site());
        }
        Ok(store)
    }

    /// Opens the store in `dir` even if its `format` file is damaged or missing, to verify and to
    /// repair it. Nothing else can write to it then: a repair that has written the format again is
    /// followed by another [`Store::open`].
    pub fn open_to_repair(dir: &Path, disk: Arc<dyn Disk>) -> Result<Self, StoreError> {
        let looks_like_one = || {
            DIRS[..4]
                .iter()
                .all(|name| disk.metadata(&dir.join(name)).is_ok())
        };
        match Self::open_on(dir, Arc::clone(&disk)) {
            Err(StoreError::Damaged { .. } | StoreError::Json { .. }) if looks_like_one() => {
                let why = "its format is damaged; `iii store verify --repair` mends it";
                Ok(Self::new(dir, disk, Some(why.to_owned()), true))
            }
            other => other,
        }
    }

    /// The store in `dir`, of any format.
    pub(crate) fn assemble(dir: &Path, disk: Arc<dyn Disk>, read_only: Option<String>) -> Self {
        Self::new(dir, disk, read_only, false)
    }

    fn new(dir: &Path, disk: Arc<dyn Disk>, read_only: Option<String>, broken: bool) -> Self {
        Self(Arc::new(Inner {
            objects: Objects::new(Arc::clone(&disk), dir, read_only.is_none()),
            site: Site::new(disk, dir),
            read_only,
            broken,
            layers: Mutex::default(),
            collect_from: AtomicUsize::new(0),
        }))
    }

    /// The store's directory.
    pub fn dir(&self) -> &Path {
        self.0.site.dir()
    }

    pub(crate) fn site(&self) -> &Site {
        &self.0.site
    }

    pub(crate) fn disk(&self) -> &Arc<dyn Disk> {
        self.0.site.disk()
    }

    /// Whether `files` are so many more than the last time that this process tried to have fewer
    /// that it tries again; nothing stands for few.
    pub(crate) fn is_time_to_collect(&self, files: Option<usize>, more: usize) -> bool {
        let from = &self.0.collect_from;
        let is_time = files.is_some_and(|files| files >= from.load(Ordering::Relaxed));
        if is_time || files.is_none() {
            from.store(files.map_or(0, |files| files + more), Ordering::Relaxed);
        }
        is_time
    }

    pub(crate) fn is_read_only(&self) -> bool {
        self.0.read_only.is_some()
    }

    pub(crate) fn objects(&self) -> &Objects {
        &self.0.objects
    }

    /// An error if the store can but be read.
    pub(crate) fn require_writable(&self) -> Result<(), StoreError> {
        self.0.read_only.as_ref().map_or(Ok(()), |why| {
            Err(StoreError::ReadOnly {
                path: self.dir().to_owned(),
                why: why.clone(),
            })
        })
    }

    /// Adds this ro-compat feature to the format, durably.
    pub(crate) fn require_feature(&self, feature: &str) -> Result<(), StoreError> {
        let format = || match Format::read(self.disk().as_ref(), self.dir())? {
            Found::Current(format) => Ok(format),
            Found::Outdated(_) => Err(StoreError::Outdated(self.dir().to_owned())),
            Found::Nothing => Err(no_format(self.dir())),
        };
        let has = |format: &Format| format.ro_compat.iter().any(|name| name == feature);
        if has(&format()?) {
            return Ok(());
        }
        let _lock = FileLock::acquire(self.disk(), &self.site().format_lock(), &|| {})?;
        let mut format = format()?;
        if !has(&format) {
            format.ro_compat.push(feature.to_owned());
            format.sealed().write(self.site())?;
        }
        Ok(())
    }

    /// Takes a lease; `purpose` is for users who ask why a layer stays. Everything that
    /// writes needs one.
    pub fn lease(&self, purpose: &str) -> Result<Lease, StoreError> {
        self.require_writable()?;
        Lease::take(self.site(), purpose)
    }

    /// A lease for a repair, of a store that may be closed to all other writers.
    pub(crate) fn lease_to_repair(&self) -> Result<Lease, StoreError> {
        if self.0.broken {
            return Lease::take(self.site(), "repair");
        }
        self.lease("repair")
    }

    /// Forgets these layers, so that they are opened again the next time.
    pub(crate) fn forget_layers(&self, ids: &BTreeSet<LayerId>) {
        lock(&self.0.layers).retain(|id, _| !ids.contains(id));
    }

    /// Removes remains of dead processes: their leases and temporary files. Returns the
    /// number of leases. Safe beside everything else.
    pub fn sweep_dead_leases(&self) -> Result<usize, StoreError> {
        self.require_writable()?;
        let swept = lease::sweep(self.site())?;
        Ok(usize::try_from(swept.leases).unwrap_or(usize::MAX))
    }

    /// Whether the layer is there. Means something only to a process that has pinned it.
    pub fn has_layer(&self, id: &LayerId) -> bool {
        self.require_layer(id).is_ok()
    }

    /// An error unless the layer is there.
    pub(crate) fn require_layer(&self, id: &LayerId) -> Result<(), StoreError> {
        let path = self.places().layer(id);
        let meta = self.look(id, || self.disk().metadata(&path))?;
        if meta.at("looking at", &path)?.is_file() {
            return Ok(());
        }
        Err(StoreError::MissingLayer(*id))
    }

    /// Looks for a layer file in its place, and takes it back from the trash if it is not there.
    fn look<T>(
        &self,
        id: &LayerId,
        find: impl Fn() -> io::Result<T>,
    ) -> Result<io::Result<T>, StoreError> {
        for _ in 0..LOOKS {
            match find() {
                Err(err) if err.kind() == io::ErrorKind::NotFound => self.take_back_layer(id)?,
                found => return Ok(found),
            };
        }
        match find() {
            Err(err) if err.kind() == io::ErrorKind::NotFound => Err(StoreError::MissingLayer(*id)),
            found => Ok(found),
        }
    }

    /// Returns when the names of all layers that are there are durable. A layer that is found may
    /// be of a process that has named it but not synced that yet.
    pub(crate) fn sync_layers(&self) -> Result<(), StoreError> {
        let dir = self.dir().join("layers");
        self.disk().sync_dir(&dir).at("syncing", &dir)
    }

    /// Opens a layer. Two callers share one mapping.
    pub fn layer(&self, id: &LayerId) -> Result<Arc<Layer>, StoreError> {
        if let Some(layer) = lock(&self.0.layers).get(id).and_then(Weak::upgrade) {
            return Ok(layer);
        }
        let path = self.places().layer(id);
        let file = self.look(id, || self.disk().open(&path))?;
        let file = file.at("opening", &path)?;
        let layer = self.check_layer(id, &path, &file)?;
        let layer = Arc::new(layer);
        let mut layers = lock(&self.0.layers);
        layers.retain(|_, layer| layer.strong_count() > 0);
        layers.insert(*id, Arc::downgrade(&layer));
        Ok(layer)
    }

    /// Maps a layer file and checks that it is the layer that its name says.
    pub(crate) fn check_layer(
        &self,
        id: &LayerId,
        path: &Path,
        file: &File,
    ) -> Result<Layer, StoreError> {
        let layer =
            Layer::open(self.disk().as_ref(), file).map_err(|source| StoreError::Layer {
                id: *id,
                path: path.to_owned(),
                source,
            })?;
        if layer.layer_id() != *id || !layer.body_holds() || !layer.header_holds() {
            let what = "it is not the layer that its name says";
            return Err(StoreError::Damaged {
                path: path.to_owned(),
                what,
            });
        }
        Ok(layer)
    }

    /// Opens a layer or, where it is not in the store, one with the same tree, which differs from
    /// it in mtimes alone: a step that is run again makes such a one. The tree of a missing
    /// layer is known only if a ref names it.
    pub fn layer_or_same_tree(&self, id: &LayerId) -> Result<Arc<Layer>, StoreError> {
        match self.layer(id) {
            Err(StoreError::MissingLayer(_)) => {}
            other => return other,
        }
        if let Some(tree) = self.tree_of(id)? {
            for other in self.layer_ids()? {
                match self.layer(&other) {
                    Ok(layer) if layer.tree_id() == tree => return Ok(layer),
                    // This is a search: a damaged or missing layer is not a match.
                    _ => {}
                }
            }
        }
        Err(StoreError::MissingLayer(*id))
    }

    pub(crate) fn places(&self) -> Places<'_> {
        self.0.objects.places()
    }

    /// Looks for a layer in the trash, and among those that were set aside and are whole again, and
    /// takes it back from there.
    fn take_back_layer(&self, id: &LayerId) -> Result<bool, StoreError> {
        if self.0.read_only.is_some() {
            return Ok(false);
        }
        Ok(trash::patiently(|| self.places().take_back_layer(id))? || self.restore_layer(id)?)
    }

    /// Whether the object is there, and so durable and whole.
    pub fn contains(&self, id: &ObjectId) -> bool {
        self.0.objects.require(id).is_ok()
    }

    /// The object's bytes. Costs no system call when its file is open already.
    pub fn object(&self, id: &ObjectId) -> Result<Blob, StoreError> {
        self.0.objects.open(id)
    }

    /// Waits until no other process builds `key`, and keeps others from it until the guard is
    /// dropped. `on_wait` is called once if another process builds it; a waiter looks for the
    /// record again before building.
    pub fn flight(&self, key: &KeyId, on_wait: &dyn Fn()) -> Result<Flight, StoreError> {
        self.require_writable()?;
        let path = self.dir().join("locks").join(format!("{key}.flight"));
        Ok(Flight {
            _lock: FileLock::acquire(self.disk(), &path, on_wait)?,
        })
    }
}

/// The right to build one key, see [`Store::flight`].
#[derive(Debug)]
pub struct Flight {
    _lock: FileLock,
}

fn no_format(dir: &Path) -> StoreError {
    StoreError::Damaged {
        path: dir.join("format"),
        what: "it is missing, though the store holds something",
    }
}

/// Whether a store has something of this name at its top.
pub(crate) fn is_known_name(name: &str) -> bool {
    name == "format" || DIRS.contains(&name) || OTHER_DIRS.contains(&name)
}

fn create(dir: &Path, disk: &Arc<dyn Disk>) -> Result<(), StoreError> {
    // Directories to sync for the store's own name to be durable; another process may have made it
    // a moment ago.
    let mut above = Vec::from_iter(dir.parent());
    match disk.list(dir) {
        Ok(names) => {
            for name in names {
                if !name.to_str().is_some_and(is_known_name) {
                    return Err(StoreError::NotAStore {
                        path: dir.to_owned(),
                        found: name.to_string_lossy().into_owned(),
                    });
                }
            }
        }
        Err(err) if err.kind() == io::ErrorKind::NotFound => {
            let mut missing: Vec<&Path> = dir
                .ancestors()
                .take_while(|dir| disk.metadata(dir).is_err())
                .collect();
            missing.retain(|dir| !dir.as_os_str().is_empty());
            for dir in missing.into_iter().rev() {
                disk.create_dir(dir).at("making", dir)?;
                above.extend(dir.parent());
            }
        }
        Err(err) => return Err(err).at("listing", dir),
    }
    for name in DIRS {
        let path = dir.join(name);
        disk.create_dir(&path).at("making", &path)?;
    }
    let site = Site::new(Arc::clone(disk), dir);
    // Two processes may make the store at once.
    let _lock = FileLock::acquire(disk, &site.format_lock(), &|| {})?;
    if !matches!(Format::read(disk.as_ref(), dir)?, Found::Nothing) {
        return Ok(());
    }
    // A store that was cut short while it was made is empty. Another directory may be of any
    // format.
    for name in ["packs", "loose", "layers", "keys"] {
        if !names(disk.as_ref(), &dir.join(name))?.is_empty() {
            return Err(no_format(dir));
        }
    }
    Format::default().write(&site)?;
    for dir in above {
        let here = dir.as_os_str().is_empty();
        let dir = if here { Path::new(".") } else { dir };
        match disk.sync_dir(dir) {
            // A user who may not list a directory cannot sync it.
            Err(err) if err.kind() == io::ErrorKind::PermissionDenied => {}
            other => other.at("syncing", dir)?,
        }
    }
    Ok(())
}

impl Format {
    /// Makes it the format of the store in `dir`, durably. The caller holds [`Site::format_lock`].
    pub(crate) fn write(&self, site: &Site) -> Result<(), StoreError> {
        let (disk, dir) = (site.disk().as_ref(), site.dir());
        let path = dir.join("format");
        let text = serde_json::to_vec(self).map_err(|source| StoreError::Json {
            path: path.clone(),
            source,
        })?;
        let text = seal::seal(text);
        let tmp = site.format_tmp();
        for attempt in 1.. {
            write_format(disk, &tmp, &text)?;
            // Where the format is, all directories are.
            disk.sync_dir(&dir.join("refs")).at("syncing", dir)?;
            disk.sync_dir(dir).at("syncing", dir)?;
            match disk.rename(&tmp, &path) {
                Err(err) if err.kind() == io::ErrorKind::NotFound && attempt < MAX_FORMAT_TRIES => {
                }
                other => {
                    other.at("renaming", &tmp)?;
                    break;
                }
            }
        }
        disk.sync_dir(dir).at("syncing", dir)
    }
}

fn write_format(disk: &dyn Disk, tmp: &Path, text: &[u8]) -> Result<(), StoreError> {
    match disk.remove(tmp) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => Err(err).at("removing", tmp)?,
        _ => {}
    }
    let file = disk.create(tmp).at("creating", tmp)?;
    disk.write_at(&file, text, 0).at("writing", tmp)?;
    disk.sync(&file).at("syncing", tmp)
}

/// As [`json::write_json`].
pub(crate) fn write_json<T: Serialize>(
    _: &Store,
    lease: &Lease,
    path: &Path,
    value: &T,
    limit: u64,
) -> Result<(), StoreError> {
    json::write_json(lease, path, value, limit)
}

/// As [`json::write_json_compact`].
pub(crate) fn write_json_compact<T: Serialize>(
    _: &Store,
    lease: &Lease,
    path: &Path,
    value: &T,
    limit: u64,
) -> Result<(), StoreError> {
    json::write_json_compact(lease, path, value, limit)
}
