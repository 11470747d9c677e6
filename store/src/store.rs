//! Opening a store, and reading from it.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};

use serde::{Deserialize, Serialize};

use crate::disk::{Disk, RealDisk, read_file};
use crate::error::{IoContext, StoreError};
use crate::id::{KeyId, LayerId, ObjectId};
use crate::ingest::Ingest;
use crate::layer::Layer;
use crate::lease::{self, Lease};
use crate::lock::FileLock;
use crate::objects::{Blob, LOOKS, Objects, lock};
use crate::trash::Places;

/// Version of the layout described in the crate's documentation.
pub const FORMAT_VERSION: u32 = 1;
/// Longest `format` file, in bytes.
const MAX_FORMAT: u64 = 64 << 10;
/// The directories of a store.
const DIRS: [&str; 12] = [
    "packs",
    "loose",
    "layers",
    "keys",
    "refs",
    "refs/image",
    "refs/worker",
    "leases",
    "locks",
    "tmp",
    "stat",
    "trash",
];

/// The `format` file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Format {
    version: u32,
    /// Features that whoever does not know them may ignore.
    #[serde(default)]
    compat: Vec<String>,
    /// Features that whoever does not know them may read past but not write beside.
    #[serde(default)]
    ro_compat: Vec<String>,
    /// Features without which nothing may be read.
    #[serde(default)]
    incompat: Vec<String>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    disk: Arc<dyn Disk>,
    read_only: Option<String>,
    objects: Objects,
    layers: Mutex<HashMap<LayerId, Weak<Layer>>>,
}

/// A store of layers and their objects: see the crate's documentation. Cheap to clone; shared freely between threads and,
/// through its directory, between processes.
#[derive(Debug, Clone)]
pub struct Store(Arc<Inner>);

impl Store {
    /// Opens the store in `dir`, or makes one if there is nothing.
    ///
    /// A directory that cannot be written, or that has ro-compat features unknown here, is opened for reading: whatever
    /// would write says so with [`StoreError::ReadOnly`].
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, StoreError> {
        Self::open_on(dir.as_ref(), Arc::new(RealDisk))
    }

    /// Opens the store on a disk of the caller's, for tests that make it fail.
    pub fn open_on(dir: &Path, disk: Arc<dyn Disk>) -> Result<Self, StoreError> {
        let path = dir.join("format");
        let format = match read_json::<Format>(disk.as_ref(), &path, MAX_FORMAT)? {
            Some(format) => format,
            None => create(dir, &disk)?,
        };
        if format.version != FORMAT_VERSION || !format.incompat.is_empty() {
            return Err(StoreError::Unsupported {
                path: dir.to_owned(),
                version: format.version,
                incompat: format.incompat,
            });
        }
        let tmp = dir.join("tmp");
        let access = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
        let read_only = if format.ro_compat.is_empty() {
            rustix::fs::access(&tmp, access)
                .err()
                .map(|err| format!("{}: {}", tmp.display(), io::Error::from(err)))
        } else {
            Some(format!("unknown ro-compat features {:?}", format.ro_compat))
        };
        Ok(Self(Arc::new(Inner {
            objects: Objects::new(Arc::clone(&disk), dir),
            dir: dir.to_owned(),
            disk,
            read_only,
            layers: Mutex::default(),
        })))
    }

    /// The store's directory.
    pub fn dir(&self) -> &Path {
        &self.0.dir
    }

    pub(crate) fn disk(&self) -> &Arc<dyn Disk> {
        &self.0.disk
    }

    pub(crate) fn objects(&self) -> &Objects {
        &self.0.objects
    }

    /// Takes a lease; `purpose` is for people who ask what keeps something alive. Everything that writes needs one.
    pub fn lease(&self, purpose: &str) -> Result<Lease, StoreError> {
        if let Some(why) = &self.0.read_only {
            return Err(StoreError::ReadOnly {
                path: self.0.dir.clone(),
                why: why.clone(),
            });
        }
        Lease::take(self, purpose)
    }

    /// Removes what processes that died left behind: their leases and temporary files. Returns the number of leases.
    /// Safe beside everything else.
    pub fn sweep_dead_leases(&self) -> Result<usize, StoreError> {
        lease::sweep(self)
    }

    /// Begins to write a layer's objects. Nothing is visible before [`Ingest::finish`].
    pub fn ingest<'a>(&self, lease: &'a Lease) -> Result<Ingest<'a>, StoreError> {
        Ingest::begin(self, lease)
    }

    pub(crate) fn layer_path(&self, id: &LayerId) -> PathBuf {
        self.0.dir.join("layers").join(id.to_string())
    }

    /// Whether the layer is there. Only of use to who has pinned it.
    pub fn has_layer(&self, id: &LayerId) -> bool {
        self.require_layer(id).is_ok()
    }

    /// An error unless the layer is there.
    pub(crate) fn require_layer(&self, id: &LayerId) -> Result<(), StoreError> {
        let path = self.layer_path(id);
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

    /// Returns when the names of all layers that are there are durable. A layer that is found may be of somebody who has named
    /// it but not synced that yet.
    pub(crate) fn sync_layers(&self) -> Result<(), StoreError> {
        let dir = self.0.dir.join("layers");
        self.disk().sync_dir(&dir).at("syncing", &dir)
    }

    /// Opens a layer. Two callers share one mapping.
    pub fn layer(&self, id: &LayerId) -> Result<Arc<Layer>, StoreError> {
        if let Some(layer) = lock(&self.0.layers).get(id).and_then(Weak::upgrade) {
            return Ok(layer);
        }
        let path = self.layer_path(id);
        let file = self.look(id, || self.disk().open(&path))?;
        let file = file.at("opening", &path)?;
        let layer = Self::check_layer(id, &path, &file)?;
        let layer = Arc::new(layer);
        let mut layers = lock(&self.0.layers);
        layers.retain(|_, layer| layer.strong_count() > 0);
        layers.insert(*id, Arc::downgrade(&layer));
        Ok(layer)
    }

    /// Maps a layer file and checks that it is the layer that its name says.
    pub(crate) fn check_layer(id: &LayerId, path: &Path, file: &File) -> Result<Layer, StoreError> {
        let layer = Layer::open(file).map_err(|source| StoreError::Layer {
            id: *id,
            path: path.to_owned(),
            source,
        })?;
        if layer.layer_id() != *id || !layer.body_holds() {
            let what = "it is not the layer that its name says";
            return Err(StoreError::Damaged {
                path: path.to_owned(),
                what,
            });
        }
        Ok(layer)
    }

    pub(crate) fn places(&self) -> Places<'_> {
        Places {
            disk: self.disk().as_ref(),
            dir: self.dir(),
        }
    }

    /// Looks for a layer in the trash and takes it back from there.
    fn take_back_layer(&self, id: &LayerId) -> Result<bool, StoreError> {
        if self.0.read_only.is_some() {
            return Ok(false);
        }
        self.places().take_back_layer(id)
    }

    /// Whether the object is there, and so durable and whole.
    pub fn contains(&self, id: &ObjectId) -> bool {
        self.0.objects.require(id).is_ok()
    }

    /// The object's bytes. Costs no system call when its file is open already.
    pub fn object(&self, id: &ObjectId) -> Result<Blob, StoreError> {
        self.0.objects.open(id)
    }

    /// Waits until no other process builds `key`, and keeps others from it until the guard is dropped. `on_wait` is called
    /// once if somebody else is at it; who waited looks for the record again before building.
    pub fn flight(&self, key: &KeyId, on_wait: &dyn Fn()) -> Result<Flight, StoreError> {
        let path = self.0.dir.join("locks").join(format!("{key}.flight"));
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

fn create(dir: &Path, disk: &Arc<dyn Disk>) -> Result<Format, StoreError> {
    let known = |name: &str| name == "format" || DIRS.contains(&name);
    // What must be synced for the store's own name to be durable; somebody else may have made it a moment ago.
    let mut above = Vec::from_iter(dir.parent());
    match disk.list(dir) {
        Ok(names) => {
            for name in names {
                if !name.to_str().is_some_and(known) {
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
    let format = Format {
        version: FORMAT_VERSION,
        compat: Vec::new(),
        ro_compat: Vec::new(),
        incompat: Vec::new(),
    };
    let path = dir.join("format");
    // Two processes may make the store at once.
    let _lock = FileLock::acquire(disk, &dir.join("locks/format"), &|| {})?;
    if let Some(format) = read_json(disk.as_ref(), &path, MAX_FORMAT)? {
        return Ok(format);
    }
    let tmp = dir.join("tmp/format");
    match disk.remove(&tmp) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => Err(err).at("removing", &tmp)?,
        _ => {}
    }
    let file = disk.create(&tmp).at("creating", &tmp)?;
    let text = serde_json::to_vec(&format).map_err(|source| StoreError::Json {
        path: path.clone(),
        source,
    })?;
    disk.write_at(&file, &text, 0).at("writing", &tmp)?;
    disk.sync(&file).at("syncing", &tmp)?;
    // Where the format is, all directories are.
    let sync = |dir: &Path| disk.sync_dir(dir).at("syncing", dir);
    sync(&dir.join("refs"))?;
    sync(dir)?;
    disk.rename(&tmp, &path).at("renaming", &tmp)?;
    sync(dir)?;
    for dir in above {
        let here = dir.as_os_str().is_empty();
        match sync(if here { Path::new(".") } else { dir }) {
            // Whoever may not list a directory cannot sync it.
            Err(err) if err.io_kind() == Some(io::ErrorKind::PermissionDenied) => {}
            other => other?,
        }
    }
    Ok(format)
}

/// Reads a small JSON file of the store, if there is one.
pub(crate) fn read_json<T: serde::de::DeserializeOwned>(
    disk: &dyn Disk,
    path: &Path,
    limit: u64,
) -> Result<Option<T>, StoreError> {
    let Some(text) = read_file(disk, path, limit)? else {
        return Ok(None);
    };
    let value = serde_json::from_slice(&text).map_err(|source| StoreError::Json {
        path: path.to_owned(),
        source,
    })?;
    Ok(Some(value))
}

/// Writes a JSON file, durably, replacing the one before.
pub(crate) fn write_json<T: Serialize>(
    store: &Store,
    lease: &Lease,
    path: &Path,
    value: &T,
    limit: u64,
) -> Result<(), StoreError> {
    let json = |source| StoreError::Json {
        path: path.to_owned(),
        source,
    };
    let mut text = serde_json::to_vec_pretty(value).map_err(json)?;
    text.push(b'\n');
    if text.len() as u64 > limit {
        let what = "what is to be recorded";
        return Err(StoreError::TooLarge { what, limit });
    }
    let tmp = lease.tmp()?;
    tmp.write(&text, 0)?;
    tmp.sync()?;
    tmp.publish(path)?;
    let dir = path.parent().unwrap_or(path);
    store.disk().sync_dir(dir).at("syncing", dir)
}
