//! Finding objects: the indexes of all packs, one table over them, and the files behind them.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::hash::Hash;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

pub use crate::blob::LOOSE_MIN;
pub(crate) use crate::blob::Pack;
use crate::blob::{Blob, LooseFile};
use crate::disk::{Disk, names};
use crate::error::{IoContext, StoreError};
use crate::id::{ObjectId, PackId};
use crate::mutex::lock;
use crate::pack::{Index, PackError};
use crate::trash::{self, Places};

/// Files of the store that are held open for reading, of packs and of loose objects each.
const MAX_OPEN_FILES: usize = 64;
/// How often a layer or an object is looked for in its place and then in the trash. While another
/// process looks, a collection may have it in the one, then in the other, then in another pack.
pub(crate) const LOOKS: u32 = 3;
/// A directory whose mtime is younger than this may change again without its mtime telling.
const MTIME_GRANULARITY: Duration = Duration::from_millis(50);

/// The most recently used files, open.
#[derive(Debug)]
struct OpenFiles<K, F> {
    files: HashMap<K, (Arc<F>, u64)>,
    clock: u64,
}

impl<K, F> Default for OpenFiles<K, F> {
    fn default() -> Self {
        Self {
            files: HashMap::new(),
            clock: 0,
        }
    }
}

impl<K: Copy + Eq + Hash, F> OpenFiles<K, F> {
    fn get(&mut self, key: &K) -> Option<Arc<F>> {
        self.clock += 1;
        let (file, used) = self.files.get_mut(key)?;
        *used = self.clock;
        Some(Arc::clone(file))
    }

    fn insert(&mut self, key: K, file: Arc<F>) {
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

#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    /// Number of the pack + 1; 0 for an empty slot.
    pack: u32,
    /// Bits of the id that the slot's position does not tell.
    tag: u32,
}

/// All indexes of a moment, and an open-addressing table from ids to packs, so that a lookup,
/// negative ones included, costs one probe however many packs there are.
#[derive(Debug, Default)]
pub(crate) struct PackSet {
    packs: Vec<Arc<Pack>>,
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
    pub(crate) fn packs(&self) -> &[Arc<Pack>] {
        &self.packs
    }

    /// The pack that holds an object, and the object's position in its index.
    pub(crate) fn find(&self, id: &ObjectId) -> Option<(&Arc<Pack>, u32)> {
        let (number, ix) = self.position(id)?;
        Some((self.packs.get(number)?, ix))
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

    pub(crate) fn add(&mut self, packs: Vec<Arc<Pack>>) {
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
    packs: RwLock<PackSet>,
    pack_files: Mutex<OpenFiles<PackId, File>>,
    loose_files: Mutex<OpenFiles<ObjectId, LooseFile>>,
    /// Whether what lies in the trash can be taken back.
    writable: bool,
}

impl Objects {
    /// Nothing is read before the first question.
    pub(crate) fn new(disk: Arc<dyn Disk>, dir: &Path, writable: bool) -> Self {
        Self {
            writable,
            disk,
            dir: dir.to_owned(),
            packs_dir: dir.join("packs"),
            packs: RwLock::default(),
            pack_files: Mutex::default(),
            loose_files: Mutex::default(),
        }
    }

    pub(crate) fn places(&self) -> Places<'_> {
        Places {
            disk: self.disk.as_ref(),
            dir: &self.dir,
        }
    }

    /// Looks at the packs that appeared or went since the last time. Cheap when none did. Returns
    /// how often any has gone.
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
        let mut new = Vec::new();
        if set.known.iter().any(|id| !found.contains(id)) {
            let losses = set.losses + 1;
            let PackSet { packs, .. } = std::mem::take(&mut *set);
            set.losses = losses;
            new.extend(packs.into_iter().filter(|pack| found.contains(&pack.id)));
        }
        let open: HashSet<PackId> = new.iter().map(|pack| pack.id).collect();
        for id in found.difference(&set.known) {
            if !open.contains(id)
                && let Some(index) = self.open_index(id)?
            {
                new.push(Arc::new(Pack::new(*id, index, self.places().pack(id))));
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

    /// Opens an index. One that does not hold is passed over, what it named is missing, and
    /// `verify` says why; so is one whose pack is not there, of which a power cut left only the
    /// index.
    fn open_index(&self, id: &PackId) -> Result<Option<Index>, StoreError> {
        let (pack, path) = (self.places().pack(id), self.places().index(id));
        let len = match self.disk.metadata(&pack) {
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.at("looking at", &pack)?.len(),
        };
        let file = match self.disk.open(&path) {
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.at("opening", &path)?,
        };
        match Index::open(self.disk.as_ref(), &file, id) {
            Err(PackError::Map(err)) => Err(err).at("mapping", &path),
            index => Ok(index.ok().filter(|index| index.pack_len() == len)),
        }
    }

    /// The pack that holds an object, and the object's position in its index, as of the last
    /// [`Objects::refresh`].
    pub(crate) fn find_packed(&self, id: &ObjectId) -> Option<(Arc<Pack>, u32)> {
        let set = self.packs.read().unwrap_or_else(PoisonError::into_inner);
        set.find(id).map(|(pack, ix)| (Arc::clone(pack), ix))
    }

    /// How many packs are of a length that `counts`, as of the last [`Objects::refresh`].
    pub(crate) fn count_packs(&self, counts: impl Fn(u64) -> bool) -> usize {
        let set = self.packs.read().unwrap_or_else(PoisonError::into_inner);
        let packs = set.packs.iter();
        packs.filter(|pack| counts(pack.index.pack_len())).count()
    }

    /// Whether a pack and its index have their names.
    pub(crate) fn has_pack(&self, id: &PackId) -> bool {
        [self.places().pack(id), self.places().index(id)]
            .iter()
            .all(|path| self.disk.metadata(path).is_ok())
    }

    /// Releases the pages of indexes that are in memory.
    pub(crate) fn release(&self) {
        let set = self.packs.read().unwrap_or_else(PoisonError::into_inner);
        for pack in &set.packs {
            pack.index.release();
        }
    }

    /// Whether there is a file of this object of `len` bytes.
    pub(crate) fn has_loose(&self, id: &ObjectId, len: Option<u64>) -> bool {
        self.disk
            .metadata(&self.places().loose(id))
            .is_ok_and(|meta| meta.is_file() && len.is_none_or(|len| meta.size() == len))
    }

    pub(crate) fn has_outboard(&self, id: &ObjectId) -> bool {
        self.disk.metadata(&self.places().outboard(id)).is_ok()
    }

    /// Whether the object is there, without looking for packs that other processes added since the
    /// last refresh.
    pub(crate) fn contains_known(&self, id: &ObjectId, size: Option<u64>) -> bool {
        self.find_packed(id).is_some()
            || (size.is_none_or(|size| size >= LOOSE_MIN) && self.has_loose(id, size))
    }

    fn pack_file(&self, pack: &Pack) -> io::Result<Arc<File>> {
        if let Some(file) = lock(&self.pack_files).get(&pack.id) {
            return Ok(file);
        }
        let file = Arc::new(self.disk.open(&pack.path)?);
        lock(&self.pack_files).insert(pack.id, Arc::clone(&file));
        Ok(file)
    }

    fn loose_file(&self, id: &ObjectId) -> Result<Option<Arc<LooseFile>>, StoreError> {
        if let Some(file) = lock(&self.loose_files).get(id) {
            return Ok(Some(file));
        }
        let (path, outboard) = (self.places().loose(id), self.places().outboard(id));
        let Some(file) = LooseFile::open(&self.disk, path, &outboard, id)? else {
            return Ok(None);
        };
        let file = Arc::new(file);
        lock(&self.loose_files).insert(*id, Arc::clone(&file));
        Ok(Some(file))
    }

    /// The object's bytes, as of the last refresh.
    fn open_known(&self, id: &ObjectId) -> Result<Option<Blob>, StoreError> {
        if let Some((pack, ix)) = self.find_packed(id) {
            match self.pack_file(&pack) {
                Ok(file) => return Ok(Some(Blob::packed(&self.disk, file, pack, ix, *id))),
                Err(err) if err.kind() == io::ErrorKind::NotFound => {}
                err => {
                    err.at("opening", &pack.path)?;
                }
            }
        }
        let file = self.loose_file(id)?;
        Ok(file.map(|file| Blob::loose(&self.disk, file)))
    }

    /// The object's bytes, wherever they are.
    pub(crate) fn open(&self, id: &ObjectId) -> Result<Blob, StoreError> {
        match self.open_known(id)? {
            Some(blob) => Ok(blob),
            None => self.look(id, || self.open_known(id)),
        }
    }

    /// An error unless the object is in its place, if need be because it was taken back from the
    /// trash. Packs are those of the last [`Objects::refresh`], if they hold it.
    pub(crate) fn require(&self, id: &ObjectId) -> Result<(), StoreError> {
        if self.contains_known(id, None) {
            return Ok(());
        }
        let path = self.places().loose(id);
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
        if !self.writable {
            return Ok(());
        }
        trash::patiently(|| self.places().take_back_object(id)).map(drop)
    }

    /// All bytes of an object of a pack, which are what its id says.
    pub(crate) fn read_packed(&self, pack: &Arc<Pack>, ix: u32) -> Result<Vec<u8>, StoreError> {
        let file = self.pack_file(pack).at("opening", &pack.path)?;
        let blob = Blob::packed(&self.disk, file, Arc::clone(pack), ix, pack.index.id(ix));
        blob.read_all(LOOSE_MIN).at("reading", &pack.path)
    }
}
