//! Finding objects: the indexes of all packs, one table over them, and the files behind them.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use crate::disk::{Disk, names};
use crate::error::{IoContext, StoreError};
use crate::id::{ObjectId, PackId};
use crate::pack::{Index, PackError, Place};
use crate::trash::Places;

/// Files of the store that are held open for reading.
const MAX_OPEN_FILES: usize = 128;
/// How often a layer or an object is looked for in its place and then in the trash. While somebody looks, a collection may have
/// it in the one, then in the other, then in another pack.
pub(crate) const LOOKS: u32 = 3;
/// A directory whose mtime is younger than this may change again without its mtime telling.
const MTIME_GRANULARITY: Duration = Duration::from_millis(50);

/// Objects of at least this many bytes are files of their own, smaller ones go into packs.
pub const LOOSE_MIN: u64 = 1 << 20;

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What the mutexes here guard is whole between any two statements that can panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An object's bytes: a range of a file that stays readable as long as this lives.
#[derive(Debug, Clone)]
pub struct Blob {
    file: Arc<File>,
    offset: u64,
    len: u64,
}

impl Blob {
    /// Reads from `offset` of the object into `buf`, as much as one call gives; 0 at or after its end. A pack or an
    /// object that was cut short is an error, never a shorter object.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let left = self.len.saturating_sub(offset);
        let want = buf.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        if want == 0 {
            return Ok(0);
        }
        match self.file.read_at(&mut buf[..want], self.offset + offset)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            count => Ok(count),
        }
    }

    /// All of it, if it is at most `limit` bytes long.
    pub fn read_all(&self, limit: u64) -> io::Result<Vec<u8>> {
        if self.len > limit {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let mut bytes = vec![0; self.len as usize];
        self.file.read_exact_at(&mut bytes, self.offset)?;
        Ok(bytes)
    }

    /// Its length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The file it stands in: a pack or its own. Opened for reading.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where it begins in [`Blob::file`].
    pub fn offset(&self) -> u64 {
        self.offset
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum FileKey {
    Pack(PackId),
    Loose(ObjectId),
}

/// The most recently used files, open.
#[derive(Debug, Default)]
struct OpenFiles {
    files: HashMap<FileKey, (Arc<File>, u64)>,
    clock: u64,
}

impl OpenFiles {
    fn get(&mut self, key: FileKey) -> Option<Arc<File>> {
        self.clock += 1;
        let (file, used) = self.files.get_mut(&key)?;
        *used = self.clock;
        Some(Arc::clone(file))
    }

    fn insert(&mut self, key: FileKey, file: Arc<File>) {
        if self.files.len() >= MAX_OPEN_FILES {
            let oldest = self.files.iter().min_by_key(|(_, (_, used))| *used);
            if let Some(oldest) = oldest.map(|(key, _)| *key) {
                self.files.remove(&oldest);
            }
        }
        self.clock += 1;
        self.files.insert(key, (file, self.clock));
    }
}

/// A pack that is there, by its index.
#[derive(Debug)]
pub(crate) struct Pack {
    pub(crate) id: PackId,
    pub(crate) index: Index,
}

#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    /// Number of the pack + 1; 0 for an empty slot.
    pack: u32,
    /// Bits of the id that the slot's position does not tell.
    tag: u32,
}

/// All indexes of a moment, and an open-addressing table from ids to packs, so that a lookup, negative ones included,
/// costs one probe however many packs there are.
#[derive(Debug, Default)]
pub(crate) struct PackSet {
    packs: Vec<Pack>,
    slots: Vec<Slot>,
    objects: usize,
    /// The packs whose indexes are open.
    known: HashSet<PackId>,
    /// The packs directory's mtime before it was listed, unless it may change unseen.
    listed: Option<SystemTime>,
    /// How often a pack has gone.
    losses: u64,
}

fn position(id: &ObjectId) -> (u64, u32) {
    let bytes = id.as_bytes();
    let mut position = [0; 8];
    position.copy_from_slice(&bytes[..8]);
    let mut tag = [0; 4];
    tag.copy_from_slice(&bytes[8..12]);
    (u64::from_le_bytes(position), u32::from_le_bytes(tag))
}

impl PackSet {
    /// The packs of this index: see [`PackSet::position`].
    pub(crate) fn packs(&self) -> &[Pack] {
        &self.packs
    }

    fn find(&self, id: &ObjectId) -> Option<(PackId, Place)> {
        let (number, ix) = self.position(id)?;
        let pack = self.packs.get(number)?;
        Some((pack.id, pack.index.place(ix)))
    }

    /// The number of the pack that the object is read from, and the object's in it.
    pub(crate) fn position(&self, id: &ObjectId) -> Option<(usize, u32)> {
        let mask = self.slots.len().checked_sub(1)? as u64;
        let (start, tag) = position(id);
        for step in 0..=mask {
            let slot = self.slots[(start.wrapping_add(step) & mask) as usize];
            let number = slot.pack.checked_sub(1)?;
            if slot.tag == tag
                && let Some(pack) = self.packs.get(number as usize)
                && let Some(ix) = pack.index.position(id)
            {
                return Some((number as usize, ix));
            }
        }
        None
    }

    pub(crate) fn add(&mut self, packs: Vec<Pack>) {
        let before = self.packs.len();
        self.objects += packs
            .iter()
            .map(|pack| pack.index.count() as usize)
            .sum::<usize>();
        self.packs.extend(packs);
        // At most half full, so that probes are short and always end at an empty slot.
        let wanted = (self.objects * 2).next_power_of_two().max(64);
        let fresh = if wanted > self.slots.len() {
            self.slots = vec![Slot::default(); wanted];
            0
        } else {
            before
        };
        let mask = self.slots.len() as u64 - 1;
        for (number, pack) in self.packs.iter().enumerate().skip(fresh) {
            for (id, _) in pack.index.objects() {
                let (start, tag) = position(&id);
                let mut at = start & mask;
                while self.slots[at as usize].pack != 0 {
                    at = (at + 1) & mask;
                }
                self.slots[at as usize] = Slot {
                    pack: number as u32 + 1,
                    tag,
                };
            }
            pack.index.release();
        }
    }
}

/// Where the objects of a store are found.
#[derive(Debug)]
pub(crate) struct Objects {
    disk: Arc<dyn Disk>,
    /// The store.
    dir: PathBuf,
    packs_dir: PathBuf,
    loose_dir: PathBuf,
    packs: RwLock<PackSet>,
    files: Mutex<OpenFiles>,
}

impl Objects {
    /// Nothing is read before the first question.
    pub(crate) fn new(disk: Arc<dyn Disk>, dir: &Path) -> Self {
        Self {
            disk,
            dir: dir.to_owned(),
            packs_dir: dir.join("packs"),
            loose_dir: dir.join("loose"),
            packs: RwLock::default(),
            files: Mutex::default(),
        }
    }

    pub(crate) fn pack_path(&self, id: &PackId) -> PathBuf {
        self.packs_dir.join(format!("{id}.pack"))
    }

    pub(crate) fn index_path(&self, id: &PackId) -> PathBuf {
        self.packs_dir.join(format!("{id}.idx"))
    }

    pub(crate) fn loose_path(&self, id: &ObjectId) -> PathBuf {
        self.loose_dir.join(id.to_string())
    }

    /// Looks at the packs that appeared or went since the last time. Cheap when none did. Returns how often any has gone.
    pub(crate) fn refresh(&self) -> Result<u64, StoreError> {
        let mtime =
            || -> io::Result<SystemTime> { self.disk.metadata(&self.packs_dir)?.modified() };
        let now = mtime().at("looking at", &self.packs_dir)?;
        {
            let set = self.packs.read().unwrap_or_else(PoisonError::into_inner);
            if set.listed == Some(now) {
                return Ok(set.losses);
            }
        }
        let mut set = self.packs.write().unwrap_or_else(PoisonError::into_inner);
        let settled = SystemTime::now()
            .duration_since(now)
            .is_ok_and(|age| age > MTIME_GRANULARITY);
        let mut found = HashSet::new();
        for name in names(self.disk.as_ref(), &self.packs_dir)? {
            if let Some(id) = name.strip_suffix(".idx")
                && let Ok(id) = id.parse::<PackId>()
            {
                found.insert(id);
            }
        }
        if set.known.iter().any(|id| !found.contains(id)) {
            *set = PackSet {
                losses: set.losses + 1,
                ..PackSet::default()
            };
        }
        let mut new = Vec::new();
        for id in found.difference(&set.known) {
            if let Some(index) = self.open_index(id)? {
                new.push(Pack { id: *id, index });
            }
        }
        if !new.is_empty() {
            new.sort_by_key(|pack| pack.id);
            set.known.extend(new.iter().map(|pack| pack.id));
            set.add(new);
        }
        set.listed = settled.then_some(now);
        Ok(set.losses)
    }

    /// Opens an index. One that does not hold is passed over, what it named is missing, and `verify` says why; so is one
    /// whose pack is not there, of which a power cut left only the index.
    fn open_index(&self, id: &PackId) -> Result<Option<Index>, StoreError> {
        let (pack, path) = (self.pack_path(id), self.index_path(id));
        let len = match self.disk.metadata(&pack) {
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.at("looking at", &pack)?.len(),
        };
        let file = match self.disk.open(&path) {
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.at("opening", &path)?,
        };
        match Index::open(&file, id) {
            Err(PackError::Map(err)) => Err(err).at("mapping", &path),
            index => Ok(index.ok().filter(|index| index.pack_len() == len)),
        }
    }

    /// The object's place in a pack, as of the last [`Objects::refresh`].
    pub(crate) fn find_packed(&self, id: &ObjectId) -> Option<(PackId, Place)> {
        let set = self.packs.read().unwrap_or_else(PoisonError::into_inner);
        set.find(id)
    }

    /// Whether a pack and its index have their names.
    pub(crate) fn has_pack(&self, id: &PackId) -> bool {
        [self.pack_path(id), self.index_path(id)]
            .iter()
            .all(|path| self.disk.metadata(path).is_ok())
    }

    /// Lets go of the indexes' pages that are in memory.
    pub(crate) fn release(&self) {
        let set = self.packs.read().unwrap_or_else(PoisonError::into_inner);
        for pack in &set.packs {
            pack.index.release();
        }
    }

    /// Whether there is a file of this object of `len` bytes.
    pub(crate) fn has_loose(&self, id: &ObjectId, len: Option<u64>) -> bool {
        self.disk
            .metadata(&self.loose_path(id))
            .is_ok_and(|meta| meta.is_file() && len.is_none_or(|len| meta.size() == len))
    }

    /// Whether the object is there, without looking for packs that other processes added since the last refresh.
    pub(crate) fn contains_known(&self, id: &ObjectId, size: Option<u64>) -> bool {
        self.find_packed(id).is_some()
            || (size.is_none_or(|size| size >= LOOSE_MIN) && self.has_loose(id, size))
    }

    fn open_file(&self, key: FileKey, path: &Path) -> io::Result<Arc<File>> {
        if let Some(file) = lock(&self.files).get(key) {
            return Ok(file);
        }
        let file = Arc::new(self.disk.open(path)?);
        lock(&self.files).insert(key, Arc::clone(&file));
        Ok(file)
    }

    /// The object's bytes, as of the last refresh.
    fn open_known(&self, id: &ObjectId) -> Result<Option<Blob>, StoreError> {
        if let Some((pack, place)) = self.find_packed(id) {
            let path = self.pack_path(&pack);
            match self.open_file(FileKey::Pack(pack), &path) {
                Ok(file) => {
                    return Ok(Some(Blob {
                        file,
                        offset: place.offset,
                        len: place.len,
                    }));
                }
                Err(err) if err.kind() == io::ErrorKind::NotFound => {}
                err => {
                    err.at("opening", &path)?;
                }
            }
        }
        let path = self.loose_path(id);
        match self.open_file(FileKey::Loose(*id), &path) {
            Ok(file) => {
                let len = file.metadata().at("looking at", &path)?.len();
                Ok(Some(Blob {
                    file,
                    offset: 0,
                    len,
                }))
            }
            Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(err) => Err(err).at("opening", &path),
        }
    }

    /// The object's bytes, wherever they are.
    pub(crate) fn open(&self, id: &ObjectId) -> Result<Blob, StoreError> {
        match self.open_known(id)? {
            Some(blob) => Ok(blob),
            None => self.look(id, || self.open_known(id)),
        }
    }

    /// An error unless the object is in its place, if need be because it was taken back from the trash. Packs are those of
    /// the last [`Objects::refresh`], if they hold it.
    pub(crate) fn require(&self, id: &ObjectId) -> Result<(), StoreError> {
        if self.contains_known(id, None) {
            return Ok(());
        }
        let path = self.loose_path(id);
        self.look(id, || {
            if self.find_packed(id).is_some() {
                return Ok(Some(()));
            }
            match self.disk.metadata(&path) {
                Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(None),
                other => other.at("looking at", &path).map(|_| Some(())),
            }
        })
    }

    /// Looks for an object in its place, and takes it back from the trash if it is not there.
    fn look<T>(
        &self,
        id: &ObjectId,
        find: impl Fn() -> Result<Option<T>, StoreError>,
    ) -> Result<T, StoreError> {
        for _ in 0..LOOKS {
            self.refresh()?;
            if let Some(found) = find()? {
                return Ok(found);
            }
            self.take_back(id)?;
        }
        self.refresh()?;
        find()?.ok_or(StoreError::MissingObject(*id))
    }

    /// Looks for an object in the trash, and takes it back from there.
    fn take_back(&self, id: &ObjectId) -> Result<(), StoreError> {
        let places = Places {
            disk: self.disk.as_ref(),
            dir: &self.dir,
        };
        places.take_back_object(id).map(drop)
    }

    /// All bytes of an object of a pack, unchecked.
    pub(crate) fn read_packed(&self, pack: &PackId, place: Place) -> Result<Vec<u8>, StoreError> {
        let path = self.pack_path(pack);
        let file = self.open_file(FileKey::Pack(*pack), &path);
        let blob = Blob {
            file: file.at("opening", &path)?,
            offset: place.offset,
            len: place.len,
        };
        blob.read_all(LOOSE_MIN).at("reading", &path)
    }
}
