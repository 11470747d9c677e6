//! Writing: one transaction that stores the objects of a tree and then the layer that names them.
//!
//! The crate's documentation has the order in which things become durable.

use std::cell::Cell;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rayon::prelude::*;

use crate::blob::{hole_at, runs};
use crate::disk::{TmpFile, TmpName};
use crate::error::{IoContext, Latch, StoreError};
use crate::id::{LayerId, ObjectId, PackId, TreeId};
use crate::layer;
use crate::lease::Lease;
use crate::mutex::lock;
use crate::objects::LOOSE_MIN;
use crate::outboard::OutboardHasher;
use crate::pack_writer::{FinishedPack, PackWriter};
use crate::store::Store;
use crate::syncer::Syncer;
use crate::tree::{self, Source};

/// Bytes that one step of reading and writing a large file takes.
const PIECE: usize = 1 << 20;
/// The pages of the indexes leave memory after this many lookups.
const RELEASE: usize = 1 << 16;

/// An object that was added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Added {
    /// The id of the contents.
    pub object: ObjectId,
    /// Their length in bytes.
    pub size: u64,
    /// Whether the store lacked the contents before.
    pub new: bool,
}

/// A layer that is in the store, durable and whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Published {
    /// The layer.
    pub layer_id: LayerId,
    /// The layer without its mtimes.
    pub tree_id: TreeId,
    /// Objects that the store lacked before.
    pub new_files: u64,
    /// Bytes of the new objects.
    pub new_bytes: u64,
    /// Whether the store had the layer already.
    pub existed: bool,
}

/// A large object and its outboard under their temporary names. Their files are queued in the
/// syncer.
#[derive(Debug)]
struct Large {
    size: u64,
    object: TmpName,
    outboard: TmpName,
}

type Loose = HashMap<ObjectId, Large>;

/// Takes the objects of one layer, from any number of threads, and then the layer. Dropping it
/// without [`Ingest::finish`] leaves nothing. After a failure to write, every further call returns
/// that same failure, as [`StoreError::Void`]; a failure to read the caller's input does not have
/// this effect.
#[derive(Debug)]
pub struct Ingest<'a> {
    store: Store,
    lease: &'a Lease,
    pack: PackWriter,
    loose: Mutex<Loose>,
    syncer: Mutex<Option<Syncer>>,
    no_reflink: AtomicBool,
    /// The first failure to write.
    failed: Latch,
    /// Number of lookups in the indexes.
    looked: AtomicUsize,
    /// How often packs had vanished at the first refresh of the indexes.
    losses: OnceLock<u64>,
    /// Last, so that it is dropped last.
    _open: OpenIngest<'a>,
}

/// An ingest whose lease says that it is open. Dropping it ends that.
#[derive(Debug)]
struct OpenIngest<'a> {
    lease: &'a Lease,
    number: u64,
}

impl Drop for OpenIngest<'_> {
    fn drop(&mut self) {
        // At worst, gc waits until the lease ends.
        let _ = self.lease.end_ingest(self.number);
    }
}

thread_local! {
    static BUFFER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Lends the thread's buffer of [`LOOSE_MIN`] bytes. A nested call gets one of its own.
fn with_buffer<T>(f: impl FnOnce(&mut [u8]) -> T) -> T {
    let mut buffer = BUFFER.take();
    buffer.resize(LOOSE_MIN as usize, 0);
    let result = f(&mut buffer);
    BUFFER.set(buffer);
    result
}

/// Reads until the buffer is full or the input ends.
fn read_full(reader: &mut dyn Read, buf: &mut [u8]) -> Result<usize, StoreError> {
    let mut filled = 0;
    while filled < buf.len() {
        match reader.read(&mut buf[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            Err(err) => return Err(StoreError::Input(err)),
        }
    }
    Ok(filled)
}

/// A file read from its beginning, whatever its position. Holes are not read.
struct FromStart<'a> {
    file: &'a File,
    at: u64,
}

/// Shortest buffer for which the question whether a hole lies ahead costs little.
const ASK: usize = 64 << 10;

impl Read for FromStart<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.len() >= ASK
            && let Some(hole) = hole_at(self.file, self.at)
        {
            let end = hole.min(self.file.metadata()?.len());
            let count = buf.len().min(end.saturating_sub(self.at) as usize);
            if let Some(zeros) = buf.get_mut(..count).filter(|zeros| !zeros.is_empty()) {
                zeros.fill(0);
                self.at += count as u64;
                return Ok(count);
            }
        }
        let count = self.file.read_at(buf, self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

impl Store {
    /// Begins to write a layer's objects. Nothing is visible before [`Ingest::finish`].
    pub fn ingest<'a>(&self, lease: &'a Lease) -> Result<Ingest<'a>, StoreError> {
        Ingest::begin(self, lease)
    }
}

/// Writes `bytes` to `at` of the file, except for blocks of zeros. Returns the end of the last run,
/// 0 if `bytes` has none.
fn write_runs(tmp: &TmpFile, bytes: &[u8], at: u64) -> Result<u64, StoreError> {
    let mut end = 0;
    for (start, run) in runs(bytes) {
        let start = at + start as u64;
        tmp.write(run, start)?;
        end = start + run.len() as u64;
    }
    Ok(end)
}

impl<'a> Ingest<'a> {
    pub(crate) fn begin(store: &Store, lease: &'a Lease) -> Result<Self, StoreError> {
        // The lease says that the ingest is open before the indexes are refreshed, which waits
        // until the first lookup: see `gc`.
        let number = lease.begin_ingest()?;
        let open = OpenIngest { lease, number };
        Ok(Self {
            store: store.clone(),
            lease,
            pack: PackWriter::default(),
            loose: Mutex::default(),
            syncer: Mutex::default(),
            no_reflink: AtomicBool::new(false),
            failed: Latch::default(),
            looked: AtomicUsize::new(0),
            losses: OnceLock::new(),
            _open: open,
        })
    }

    /// The store it writes to.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Adds the whole contents of a file, whatever its position. Stores exactly the bytes that it
    /// hashes, even if another process writes to the file meanwhile.
    pub fn add_file(&self, file: &File) -> Result<Added, StoreError> {
        let size = file.metadata().map_err(StoreError::Input)?.len();
        if size >= LOOSE_MIN
            && !self.no_reflink.load(Ordering::Relaxed)
            && let Some(added) = self.add_clone(file)?
        {
            return Ok(added);
        }
        self.add_reader(&mut FromStart { file, at: 0 })
    }

    /// As [`Ingest::add_file`], for a file that was `size` bytes long a moment ago. Adds at most
    /// that many bytes of a small file: the caller detects by its times whether the file changed.
    pub(crate) fn add_file_of(&self, file: &File, size: u64) -> Result<Added, StoreError> {
        if size >= LOOSE_MIN {
            return self.add_file(file);
        }
        with_buffer(|buffer| {
            let buffer = &mut buffer[..size as usize];
            let len = read_full(&mut FromStart { file, at: 0 }, buffer)?;
            self.guard(|| self.add_small(&buffer[..len]))
        })
    }

    /// As [`Ingest::add_file`], for bytes in memory.
    pub fn add_bytes(&self, bytes: &[u8]) -> Result<Added, StoreError> {
        if bytes.len() as u64 >= LOOSE_MIN {
            let (head, mut rest) = bytes.split_at(LOOSE_MIN as usize);
            return self.add_large(head, &mut rest);
        }
        self.guard(|| self.add_small(bytes))
    }

    /// Adds all bytes of `reader`. Holds at most one piece of them in memory.
    pub fn add_reader(&self, reader: &mut dyn Read) -> Result<Added, StoreError> {
        with_buffer(|buffer| {
            let len = read_full(reader, buffer)?;
            if len < buffer.len() {
                self.guard(|| self.add_small(&buffer[..len]))
            } else {
                self.add_large(buffer, reader)
            }
        })
    }

    /// Runs `f`, which writes. If `f` fails to write, every later call of the ingest fails, too.
    fn guard<T>(&self, f: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
        self.failed.check()?;
        f().map_err(|err| match err {
            StoreError::Input(_) => err,
            err => self.failed.set(err),
        })
    }

    /// Refreshes the indexes, once in an ingest. Unchanged files need no refresh: they name no
    /// object. Returns how often packs had vanished at that refresh.
    fn look(&self) -> Result<u64, StoreError> {
        if let Some(losses) = self.losses.get() {
            return Ok(*losses);
        }
        let losses = self.store.objects().refresh()?;
        // Of two threads, the first to set its count refreshed first, or both found the same packs.
        Ok(*self.losses.get_or_init(|| losses))
    }

    /// Whether a pack of the store has the object. Every [`RELEASE`] calls, the pages that these
    /// lookups brought into memory leave it.
    fn is_packed(&self, object: &ObjectId) -> Result<bool, StoreError> {
        self.look()?;
        let objects = self.store.objects();
        if self.looked.fetch_add(1, Ordering::Relaxed) % RELEASE == RELEASE - 1 {
            objects.release();
        }
        Ok(objects.find_packed(object).is_some())
    }

    fn add_small(&self, bytes: &[u8]) -> Result<Added, StoreError> {
        let object = ObjectId::of(bytes);
        let size = bytes.len() as u64;
        let new = !self.is_packed(&object)? && self.pack.add(|| self.lease.tmp(), object, bytes)?;
        if new && let Some((file, path)) = self.pack.to_sync() {
            self.sync_soon(file, path)?;
        }
        Ok(Added { object, size, new })
    }

    /// Shares the file's blocks and hashes the shared copy. `None` where the filesystem cannot
    /// share.
    fn add_clone(&self, file: &File) -> Result<Option<Added>, StoreError> {
        self.guard(|| {
            let tmp = self.lease.tmp()?;
            if self.store.disk().reflink(file, &tmp.file).is_err() {
                self.no_reflink.store(true, Ordering::Relaxed);
                return Ok(None);
            }
            let mut hasher = OutboardHasher::default();
            let mut size = 0;
            with_buffer(|buffer| -> Result<(), StoreError> {
                loop {
                    let count = tmp.read(buffer, size)?;
                    if count == 0 {
                        return Ok(());
                    }
                    hasher.update(&buffer[..count]);
                    size += count as u64;
                }
            })?;
            // The file may have been truncated meanwhile; small objects live in packs.
            if size < LOOSE_MIN {
                return Ok(None);
            }
            self.keep_loose(hasher, size, tmp).map(Some)
        })
    }

    /// Adds `head` and the rest of `reader` as a file of its own, writing and hashing each piece
    /// once. Blocks of zeros become holes.
    fn add_large(&self, head: &[u8], reader: &mut dyn Read) -> Result<Added, StoreError> {
        self.guard(|| {
            let tmp = self.lease.tmp()?;
            let mut hasher = OutboardHasher::default();
            hasher.update(head);
            let mut written = write_runs(&tmp, head, 0)?;
            let mut size = head.len() as u64;
            let mut piece = vec![0; PIECE];
            loop {
                let count = read_full(reader, &mut piece)?;
                if count == 0 {
                    break;
                }
                hasher.update(&piece[..count]);
                written = written.max(write_runs(&tmp, &piece[..count], size)?);
                size += count as u64;
            }
            if written < size {
                // A file that ends with a hole has its full length all the same.
                tmp.write(&[0], size - 1)?;
            }
            self.keep_loose(hasher, size, tmp)
        })
    }

    fn keep_loose(
        &self,
        hasher: OutboardHasher,
        size: u64,
        tmp: TmpFile,
    ) -> Result<Added, StoreError> {
        let (object, outboard) = hasher.finish();
        let known = Added {
            object,
            size,
            new: false,
        };
        self.look()?;
        let objects = self.store.objects();
        // A power cut may have left only one of the two files; then both get their names again.
        if objects.has_loose(&object, Some(size)) && objects.has_outboard(&object) {
            return Ok(known);
        }
        let beside = self.lease.tmp()?;
        beside.write(&outboard.encode(), 0)?;
        let files = [&tmp, &beside].map(|tmp| (Arc::clone(&tmp.file), tmp.path().to_owned()));
        let large = Large {
            size,
            object: tmp.name,
            outboard: beside.name,
        };
        match lock(&self.loose).entry(object) {
            Entry::Occupied(_) => return Ok(known),
            Entry::Vacant(slot) => slot.insert(large),
        };
        for (file, path) in files {
            self.sync_soon(file, path)?;
        }
        Ok(Added { new: true, ..known })
    }

    /// Queues a file to be synced while the next ones are read. [`Ingest::finish`] waits for the
    /// sync.
    fn sync_soon(&self, file: Arc<File>, path: PathBuf) -> Result<(), StoreError> {
        let queue = {
            let mut syncer = lock(&self.syncer);
            let start = || Syncer::start(Arc::clone(self.store.disk()), self.failed.clone());
            syncer.get_or_insert_with(start).queue()
        };
        if queue.push(file, path)? {
            return Ok(());
        }
        self.failed.check()?;
        // The syncer's thread panicked.
        let ended = lock(&self.syncer).take();
        ended.map_or(Ok(()), Syncer::finish)
    }

    /// Makes the layer of `tree` and everything in it durable, then visible. The object of every
    /// file must be in the store or have been added.
    pub fn finish<S: Source>(mut self, tree: &S) -> Result<Published, StoreError> {
        self.failed.check()?;
        let syncer = self
            .syncer
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        let syncer = syncer.take();
        let loose = self.loose.get_mut().unwrap_or_else(PoisonError::into_inner);
        let loose = std::mem::take(loose);
        let pack = std::mem::take(&mut self.pack).finish()?;
        let (plan, complete) = rayon::join(
            || layer::Plan::new(tree),
            || self.check_objects(tree, pack.as_ref(), &loose),
        );
        let plan = plan?;
        let in_files = complete?;
        let id = plan.layer_id;
        // Pins the layer before looking for it.
        self.lease.pin(&[id])?;
        let existed = self.store.has_layer(&id) && self.store.layer(&id).is_ok();
        let packed = pack.iter().flat_map(|pack| &pack.objects);
        let sizes = packed.map(|(_, place)| place.len);
        let sizes = sizes.chain(loose.values().map(|large| large.size));
        let published = Published {
            layer_id: id,
            tree_id: plan.tree_id,
            new_files: sizes.clone().count() as u64,
            new_bytes: sizes.sum(),
            existed,
        };
        let layer = if existed {
            None
        } else {
            let tmp = self.lease.tmp()?;
            plan.write(&mut |piece, at| tmp.write(piece, at))?;
            Some((id, tmp))
        };
        let pack_id = self.publish(syncer, pack, &loose, layer)?;
        self.keep_objects(tree, pack_id, &in_files)?;
        Ok(published)
    }

    /// Checks, after the layer has its name, that all objects it needs are still in place. A
    /// collection that listed the layers before may have removed some; one that removes some from
    /// now on brings them back itself.
    fn keep_objects<S: Source>(
        &self,
        tree: &S,
        pack: Option<PackId>,
        in_files: &[ObjectId],
    ) -> Result<(), StoreError> {
        let objects = self.store.objects();
        let unmoved = objects.refresh()? == self.look()?
            && pack.is_none_or(|pack| objects.has_pack(&pack))
            && in_files.iter().all(|id| objects.has_loose(id, None));
        if unmoved {
            return Ok(());
        }
        tree::files(tree).try_for_each(|(id, _)| objects.require(&id))
    }

    /// The order of publication: bytes durable under temporary names, names of objects, durable
    /// names of objects, name of the layer, durable name of the layer.
    fn publish(
        &self,
        syncer: Option<Syncer>,
        pack: Option<FinishedPack>,
        loose: &Loose,
        layer: Option<(LayerId, TmpFile)>,
    ) -> Result<Option<PackId>, StoreError> {
        let (disk, dir) = (self.store.disk(), self.store.dir());
        let index = pack.as_ref().map(|pack| -> Result<_, StoreError> {
            let tmp = self.lease.tmp()?;
            Ok((pack.write_index(&tmp)?, tmp))
        });
        let index = index.transpose()?;
        let unsynced = pack.iter().map(|pack| &*pack.tmp);
        let unsynced = unsynced.chain(index.iter().map(|(_, tmp)| tmp));
        let unsynced: Vec<&TmpFile> = unsynced.chain(layer.iter().map(|(_, tmp)| tmp)).collect();
        let (waited, synced) = rayon::join(
            || syncer.map_or(Ok(()), Syncer::finish),
            || unsynced.par_iter().try_for_each(|tmp| tmp.sync()),
        );
        waited.and(synced)?;

        let places = self.store.places();
        for (id, large) in loose {
            large.outboard.publish(&places.outboard(id))?;
            large.object.publish(&places.loose(id))?;
        }
        if let (Some(pack), Some((id, index))) = (pack, &index) {
            // A pack exists once its index does.
            pack.tmp.publish(&places.pack(id))?;
            index.publish(&places.index(id))?;
        }
        // Even if nothing was added: another process may have named, but not yet synced, an object
        // that this layer reuses. Syncing names that are durable costs next to nothing.
        for name in ["loose", "packs"] {
            let dir = dir.join(name);
            disk.sync_dir(&dir).at("syncing", &dir)?;
        }
        self.store.objects().refresh()?;
        if let Some((id, tmp)) = layer {
            tmp.publish(&places.layer(&id))?;
        }
        self.store.sync_layers()?;
        Ok(index.map(|(id, _)| id))
    }

    /// Fails unless every object of `tree` is there: a layer must never name a missing object.
    /// Returns the objects that are files of their own.
    fn check_objects<S: Source>(
        &self,
        tree: &S,
        pack: Option<&FinishedPack>,
        loose: &Loose,
    ) -> Result<Vec<ObjectId>, StoreError> {
        self.look()?;
        let objects = self.store.objects();
        objects.refresh()?;
        let mut in_files = Vec::new();
        for (object, size) in tree::files(tree) {
            if pack.is_some_and(|pack| pack.contains(&object)) || self.is_packed(&object)? {
                continue;
            }
            if !loose.contains_key(&object) && !objects.contains_known(&object, Some(size)) {
                objects.require(&object)?;
            }
            if objects.find_packed(&object).is_none() {
                in_files.push(object);
            }
        }
        Ok(in_files)
    }
}
