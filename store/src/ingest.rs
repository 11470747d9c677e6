//! Writing: one transaction that stores the objects of a tree and then the layer that names them.
//!
//! See the crate's documentation for the order in which things become durable.

use std::cell::Cell;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rayon::prelude::*;

use crate::disk::TmpFile;
use crate::error::{IoContext, StoreError};
use crate::id::{LayerId, ObjectId, PackId, TreeId};
use crate::layer;
use crate::lease::Lease;
use crate::objects::{LOOSE_MIN, lock};
use crate::pack::{self, Place};
use crate::store::Store;
use crate::tree::{Content, Dir, Node, Tree};

/// Objects are gathered into writes of this many bytes.
const CHUNK: usize = 1 << 20;
/// Objects of at least this many bytes are written by themselves.
const DIRECT: usize = 128 << 10;
/// Piece in which large files are read and written.
const PIECE: usize = 1 << 20;
/// Loose files that are held open until they are durable.
const MAX_UNSYNCED: usize = 64;

/// An object that was added.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Added {
    /// The contents.
    pub object: ObjectId,
    /// Their length in bytes.
    pub size: u64,
    /// Whether the store did not have them before.
    pub new: bool,
}

/// A layer that is in the store, durable and whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Published {
    /// The layer.
    pub layer_id: LayerId,
    /// The layer without its mtimes.
    pub tree_id: TreeId,
    /// Objects that the store did not have before.
    pub new_files: u64,
    /// Their bytes.
    pub new_bytes: u64,
    /// Whether the store had the layer already.
    pub existed: bool,
}

/// The pack being written. Places are given out under the lock, the writing itself happens outside.
#[derive(Debug, Default)]
struct PackState {
    tmp: Option<TmpFile>,
    objects: HashMap<ObjectId, Place>,
    /// Bytes that are placed but not yet written.
    chunk: Vec<u8>,
    chunk_at: u64,
    /// Buffers to be used again.
    spare: Vec<Vec<u8>>,
}

#[derive(Debug, Default)]
struct LooseState {
    /// Durable, under their temporary names.
    synced: Vec<(ObjectId, TmpFile)>,
    unsynced: Vec<(ObjectId, TmpFile)>,
    sizes: HashMap<ObjectId, u64>,
}

/// Takes in the objects of one layer, from any number of threads, and then the layer. Dropping it without
/// [`Ingest::finish`] leaves nothing. After a failure to write, every further call is [`StoreError::Poisoned`]; a failure
/// to read what was handed in is not such a failure.
#[derive(Debug)]
pub struct Ingest<'a> {
    store: Store,
    lease: &'a Lease,
    pack: Mutex<PackState>,
    loose: Mutex<LooseState>,
    poisoned: AtomicBool,
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

/// A file read from its beginning, whatever its position.
struct FromStart<'a> {
    file: &'a File,
    at: u64,
}

impl Read for FromStart<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(buf, self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}

impl<'a> Ingest<'a> {
    pub(crate) fn begin(store: &Store, lease: &'a Lease) -> Result<Self, StoreError> {
        store.objects().refresh()?;
        Ok(Self {
            store: store.clone(),
            lease,
            pack: Mutex::default(),
            loose: Mutex::default(),
            poisoned: AtomicBool::new(false),
        })
    }

    /// The store it writes to.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Adds the whole contents of a file, whatever its position. What is stored is what was hashed, even if somebody
    /// writes to the file meanwhile.
    pub fn add_file(&self, file: &File) -> Result<Added, StoreError> {
        let size = file.metadata().map_err(StoreError::Input)?.len();
        if size >= LOOSE_MIN
            && let Some(added) = self.add_clone(file)?
        {
            return Ok(added);
        }
        self.add_reader(&mut FromStart { file, at: 0 })
    }

    /// As [`Ingest::add_file`], of a file that was `size` bytes long a moment ago. Of a small one it adds at most those:
    /// the caller sees by its times whether it changed.
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

    /// Adds these bytes.
    pub fn add_bytes(&self, bytes: &[u8]) -> Result<Added, StoreError> {
        if bytes.len() as u64 >= LOOSE_MIN {
            let (head, mut rest) = bytes.split_at(LOOSE_MIN as usize);
            return self.add_large(head, &mut rest);
        }
        self.guard(|| self.add_small(bytes))
    }

    /// Adds all bytes that `reader` gives. Holds at most one piece of them in memory.
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

    /// Runs something that writes; an error poisons the ingest.
    fn guard<T>(&self, f: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
        if self.poisoned.load(Ordering::Relaxed) {
            return Err(StoreError::Poisoned);
        }
        f().inspect_err(|err| {
            if !matches!(err, StoreError::Input(_)) {
                self.poisoned.store(true, Ordering::Relaxed);
            }
        })
    }

    fn add_small(&self, bytes: &[u8]) -> Result<Added, StoreError> {
        let object = ObjectId::of(bytes);
        let size = bytes.len() as u64;
        let known = Added {
            object,
            size,
            new: false,
        };
        if self.store.objects().find_packed(&object).is_some() {
            return Ok(known);
        }
        let mut pack = lock(&self.pack);
        if pack.objects.contains_key(&object) {
            return Ok(known);
        }
        if pack.tmp.is_none() {
            let tmp = self.lease.tmp()?;
            self.write(&tmp, &pack::pack_header(), 0)?;
            pack.tmp = Some(tmp);
            pack.chunk_at = pack::HEADER as u64;
        }
        if pack.objects.len() >= pack::MAX_OBJECTS as usize {
            return Err(StoreError::TooLarge {
                what: "the number of files in one layer",
                limit: pack::MAX_OBJECTS.into(),
            });
        }
        let end = pack.chunk_at + pack.chunk.len() as u64;
        let offset = pack::place(end, size);
        pack.objects.insert(object, Place { offset, len: size });
        let direct = bytes.len() >= DIRECT;
        let mut full = None;
        if direct {
            let next = pack.spare.pop().unwrap_or_default();
            full = Some((std::mem::replace(&mut pack.chunk, next), pack.chunk_at));
            pack.chunk_at = offset + size;
        } else {
            let padded = (offset - pack.chunk_at) as usize;
            pack.chunk.resize(padded, 0);
            pack.chunk.extend_from_slice(bytes);
            if pack.chunk.len() >= CHUNK {
                let next = pack.spare.pop().unwrap_or_default();
                let at = pack.chunk_at;
                pack.chunk_at += pack.chunk.len() as u64;
                full = Some((std::mem::replace(&mut pack.chunk, next), at));
            }
        }
        if full.is_some() || direct {
            let file = match &pack.tmp {
                Some(tmp) => Arc::clone(&tmp.file),
                None => return Err(StoreError::Poisoned),
            };
            drop(pack);
            let path = self.store.dir().join("tmp");
            if direct {
                self.store
                    .disk()
                    .write_at(&file, bytes, offset)
                    .at("writing", &path)?;
            }
            if let Some((mut chunk, at)) = full {
                self.store
                    .disk()
                    .write_at(&file, &chunk, at)
                    .at("writing", &path)?;
                chunk.clear();
                lock(&self.pack).spare.push(chunk);
            }
        }
        Ok(Added { new: true, ..known })
    }

    fn write(&self, tmp: &TmpFile, bytes: &[u8], offset: u64) -> Result<(), StoreError> {
        self.store
            .disk()
            .write_at(&tmp.file, bytes, offset)
            .at("writing", &tmp.path)
    }

    /// Shares the file's blocks and hashes what was shared. Nothing where the filesystem cannot.
    fn add_clone(&self, file: &File) -> Result<Option<Added>, StoreError> {
        self.guard(|| {
            let tmp = self.lease.tmp()?;
            if self.store.disk().reflink(file, &tmp.file).is_err() {
                return Ok(None);
            }
            let mut hasher = blake3::Hasher::new();
            let mut size = 0;
            with_buffer(|buffer| -> Result<(), StoreError> {
                loop {
                    let count = tmp.file.read_at(buffer, size).at("reading", &tmp.path)?;
                    if count == 0 {
                        return Ok(());
                    }
                    hasher.update(&buffer[..count]);
                    size += count as u64;
                }
            })?;
            // It may have been cut meanwhile; small objects live in packs.
            if size < LOOSE_MIN {
                return Ok(None);
            }
            self.keep_loose(hasher.finalize().into(), size, tmp)
                .map(Some)
        })
    }

    /// Adds `head` and the rest of `reader` as a file of its own, writing and hashing each piece once.
    fn add_large(&self, head: &[u8], reader: &mut dyn Read) -> Result<Added, StoreError> {
        self.guard(|| {
            let tmp = self.lease.tmp()?;
            let mut hasher = blake3::Hasher::new();
            hasher.update(head);
            self.write(&tmp, head, 0)?;
            let mut size = head.len() as u64;
            let mut piece = vec![0; PIECE];
            loop {
                let count = read_full(reader, &mut piece)?;
                if count == 0 {
                    break;
                }
                hasher.update(&piece[..count]);
                self.write(&tmp, &piece[..count], size)?;
                size += count as u64;
            }
            self.keep_loose(hasher.finalize().into(), size, tmp)
        })
    }

    fn keep_loose(&self, object: ObjectId, size: u64, tmp: TmpFile) -> Result<Added, StoreError> {
        let known = Added {
            object,
            size,
            new: false,
        };
        if self.store.objects().has_loose(&object, Some(size)) {
            return Ok(known);
        }
        let batch = {
            let mut loose = lock(&self.loose);
            if loose.sizes.insert(object, size).is_some() {
                return Ok(known);
            }
            loose.unsynced.push((object, tmp));
            if loose.unsynced.len() < MAX_UNSYNCED {
                Vec::new()
            } else {
                std::mem::take(&mut loose.unsynced)
            }
        };
        for (_, tmp) in &batch {
            self.store.disk().sync(&tmp.file).at("syncing", &tmp.path)?;
        }
        lock(&self.loose).synced.extend(batch);
        Ok(Added { new: true, ..known })
    }

    /// Makes the layer of `tree` and everything in it durable, then visible. Every file's object must be in the store or
    /// have been added.
    pub fn finish(mut self, tree: &Tree) -> Result<Published, StoreError> {
        if *self.poisoned.get_mut() {
            return Err(StoreError::Poisoned);
        }
        let encoded = layer::encode(tree)?;
        let id = encoded.layer_id;
        // First the pin, then the question.
        self.lease.pin(&[id])?;
        let pack = std::mem::take(self.pack.get_mut().unwrap_or_else(PoisonError::into_inner));
        let loose = std::mem::take(self.loose.get_mut().unwrap_or_else(PoisonError::into_inner));
        self.check_objects(tree, &pack, &loose)?;
        let existed = self.store.has_layer(&id) && self.store.layer(&id).is_ok();
        let published = Published {
            layer_id: id,
            tree_id: encoded.tree_id,
            new_files: (pack.objects.len() + loose.sizes.len()) as u64,
            new_bytes: pack.objects.values().map(|place| place.len).sum::<u64>()
                + loose.sizes.values().sum::<u64>(),
            existed,
        };
        self.publish(pack, loose, (!existed).then_some((id, &encoded.bytes[..])))?;
        Ok(published)
    }

    /// The publish order: bytes durable under temporary names, names of objects, durable names of objects, name of the
    /// layer, durable name of the layer.
    fn publish(
        &self,
        mut pack: PackState,
        loose: LooseState,
        layer: Option<(LayerId, &[u8])>,
    ) -> Result<(), StoreError> {
        let disk = self.store.disk();
        let dir = self.store.dir();
        let mut index = None;
        if let Some(tmp) = &pack.tmp {
            self.write(tmp, &pack.chunk, pack.chunk_at)?;
            let mut objects: Vec<_> = pack.objects.drain().collect();
            objects.sort_unstable_by_key(|(id, _)| *id);
            let bytes = pack::encode_index(&objects, pack.chunk_at + pack.chunk.len() as u64);
            let id = PackId::from(blake3::hash(&bytes));
            let tmp = self.lease.tmp()?;
            self.write(&tmp, &bytes, 0)?;
            index = Some((id, tmp));
        }
        let mut layer_tmp = None;
        if let Some((id, bytes)) = layer {
            let tmp = self.lease.tmp()?;
            self.write(&tmp, bytes, 0)?;
            layer_tmp = Some((id, tmp));
        }
        let unsynced: Vec<&TmpFile> = pack
            .tmp
            .iter()
            .chain(index.iter().map(|(_, tmp)| tmp))
            .chain(layer_tmp.iter().map(|(_, tmp)| tmp))
            .chain(loose.unsynced.iter().map(|(_, tmp)| tmp))
            .collect();
        unsynced
            .par_iter()
            .try_for_each(|tmp| disk.sync(&tmp.file).at("syncing", &tmp.path))?;

        let mut dirs = Vec::new();
        for (id, mut tmp) in loose.synced.into_iter().chain(loose.unsynced) {
            let path = self.store.objects().loose_path(&id);
            tmp.publish(&path).at("renaming to", &path)?;
            dirs = vec!["loose"];
        }
        if let (Some(mut tmp), Some((id, mut index))) = (pack.tmp, index) {
            // A pack is there when its index is.
            let path = self.store.objects().pack_path(&id);
            tmp.publish(&path).at("renaming to", &path)?;
            let path = self.store.objects().index_path(&id);
            index.publish(&path).at("renaming to", &path)?;
            dirs.push("packs");
        }
        for name in dirs {
            let path = dir.join(name);
            disk.sync_dir(&path).at("syncing", &path)?;
        }
        self.store.objects().refresh()?;
        if let Some((id, mut tmp)) = layer_tmp {
            let path = self.store.layer_path(&id);
            tmp.publish(&path).at("renaming to", &path)?;
            let layers = dir.join("layers");
            disk.sync_dir(&layers).at("syncing", &layers)?;
        }
        Ok(())
    }

    /// A layer must never name an object that is not there.
    fn check_objects(
        &self,
        tree: &Dir,
        pack: &PackState,
        loose: &LooseState,
    ) -> Result<(), StoreError> {
        let mut dirs = vec![tree];
        while let Some(dir) = dirs.pop() {
            for node in dir.entries.values() {
                match node {
                    Node::Dir(dir) => dirs.push(dir),
                    Node::Leaf(leaf) => {
                        if let Content::File { object, size } = leaf.content
                            && !pack.objects.contains_key(&object)
                            && !loose.sizes.contains_key(&object)
                            && !self.store.objects().contains_known(&object, Some(size))
                            && !self.store.contains(&object)
                        {
                            return Err(StoreError::MissingObject(object));
                        }
                    }
                }
            }
        }
        Ok(())
    }
}
