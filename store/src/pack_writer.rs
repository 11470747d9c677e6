//! Writing a pack, from any number of threads.

use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use crate::disk::TmpFile;
use crate::error::{IoContext, StoreError};
use crate::id::{ObjectId, PackId};
use crate::lease::Lease;
use crate::mutex::lock;
use crate::pack::{self, Place};
use crate::trash::Places;

/// Objects are gathered into writes of this many bytes.
const CHUNK: usize = 1 << 20;
/// Objects of at least this many bytes are written by themselves.
const DIRECT: usize = 128 << 10;
/// Gaps of fewer bytes are not remembered: hardly any file fits.
const MIN_GAP: usize = 32;
/// The pack is synced whenever this many bytes were written.
const SYNC_EVERY: u64 = 32 << 20;

/// The pack of one ingest; its file is made for the first object. Places are given out under a
/// lock, the writing itself happens outside.
#[derive(Debug, Default)]
pub(crate) struct PackWriter(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    tmp: Option<Arc<TmpFile>>,
    objects: Table,
    /// Bytes that are placed but not yet written, and where they belong.
    chunk: Vec<u8>,
    chunk_at: u64,
    /// Where the chunk has room between its objects: offsets in it, and lengths. Each is within one
    /// block.
    gaps: Vec<(usize, usize)>,
    /// Buffers to be used again.
    spare: Vec<Vec<u8>>,
    /// Bytes that are placed up to here are being synced.
    synced: u64,
}

/// Objects and a table of their numbers plus 1 by their ids: a million of them take 56 MB, and
/// twice that in a `HashMap`.
#[derive(Debug, Default)]
struct Table {
    list: Vec<(ObjectId, Place)>,
    /// A power of two of them or none, at most three quarters full; 0 is an empty one.
    slots: Vec<u32>,
}

impl Table {
    /// The slots in which `id` may stand, in this order.
    fn probe(&self, id: &ObjectId) -> impl Iterator<Item = usize> + use<> {
        let mut start = [0; 8];
        start.copy_from_slice(&id.as_bytes()[..8]);
        let (start, count) = (u64::from_le_bytes(start) as usize, self.slots.len());
        (0..count).map(move |step| start.wrapping_add(step) & (count - 1))
    }

    fn contains(&self, id: &ObjectId) -> bool {
        self.probe(id)
            .map(|slot| self.slots[slot])
            .take_while(|number| *number != 0)
            .any(|number| self.list[number as usize - 1].0 == *id)
    }

    /// Adds an object that is not in there.
    fn push(&mut self, id: ObjectId, place: Place) {
        self.list.push((id, place));
        let number = self.list.len();
        if number * 4 > self.slots.len() * 3 {
            self.slots = vec![0; (number * 2).next_power_of_two()];
            for number in 1..=number {
                self.fill(number);
            }
        } else {
            self.fill(number);
        }
    }

    fn fill(&mut self, number: usize) {
        let empty = self
            .probe(&self.list[number - 1].0)
            .find(|slot| self.slots[*slot] == 0);
        if let Some(slot) = empty {
            self.slots[slot] = number as u32;
        }
    }
}

impl State {
    /// Puts a small object into the smallest gap of the chunk that holds it.
    fn fill_gap(&mut self, id: ObjectId, bytes: &[u8]) -> bool {
        let fitting = self.gaps.iter().enumerate();
        let fitting = fitting.filter(|(_, (_, room))| *room >= bytes.len());
        let Some((ix, &(at, room))) = fitting.min_by_key(|(_, (_, room))| *room) else {
            return false;
        };
        let Some(place) = self.chunk.get_mut(at..at + bytes.len()) else {
            return false;
        };
        place.copy_from_slice(bytes);
        let offset = self.chunk_at + at as u64;
        let len = bytes.len() as u64;
        self.objects.push(id, Place { offset, len });
        let next = (offset + len).next_multiple_of(pack::SMALL_ALIGN) - self.chunk_at;
        let left = (at + room).saturating_sub(next as usize);
        if left < MIN_GAP {
            self.gaps.swap_remove(ix);
        } else {
            self.gaps[ix] = (next as usize, left);
        }
        true
    }

    fn take_chunk(&mut self) -> (Vec<u8>, u64) {
        self.gaps.clear();
        let next = self.spare.pop().unwrap_or_default();
        let at = self.chunk_at;
        self.chunk_at += self.chunk.len() as u64;
        (std::mem::replace(&mut self.chunk, next), at)
    }
}

/// A pack that is written but not yet durable.
#[derive(Debug)]
pub(crate) struct FinishedPack {
    pub(crate) tmp: Arc<TmpFile>,
    /// Sorted by id.
    pub(crate) objects: Vec<(ObjectId, Place)>,
    len: u64,
}

impl FinishedPack {
    /// Writes the index and returns the name of the pack.
    pub(crate) fn write_index(&self, tmp: &TmpFile) -> Result<PackId, StoreError> {
        pack::write_index(&self.objects, self.len, &mut |piece, at| {
            tmp.write(piece, at)
        })
    }

    /// Makes the pack durable and gives it its name.
    pub(crate) fn publish(&self, lease: &Lease) -> Result<PackId, StoreError> {
        let index = lease.tmp()?;
        let id = self.write_index(&index)?;
        self.tmp.sync()?;
        index.sync()?;
        // A pack is there when its index is.
        let places = Places::of(lease.site());
        self.tmp.publish(&places.pack(&id))?;
        index.publish(&places.index(&id))?;
        let dir = lease.site().dir().join("packs");
        lease.site().disk().sync_dir(&dir).at("syncing", &dir)?;
        Ok(id)
    }

    pub(crate) fn contains(&self, id: &ObjectId) -> bool {
        self.objects.binary_search_by_key(id, |(id, _)| *id).is_ok()
    }
}

impl PackWriter {
    /// Adds an object unless it is in there. Says whether it was added; its bytes are written by
    /// the time that all calls have returned and [`PackWriter::finish`] was called.
    pub(crate) fn add(
        &self,
        create: impl FnOnce() -> Result<TmpFile, StoreError>,
        id: ObjectId,
        bytes: &[u8],
    ) -> Result<bool, StoreError> {
        let mut state = lock(&self.0);
        let tmp = if let Some(tmp) = &state.tmp {
            Arc::clone(tmp)
        } else {
            let tmp = Arc::new(create()?);
            tmp.write(&pack::pack_header(), 0)?;
            state.chunk_at = pack::HEADER as u64;
            Arc::clone(state.tmp.insert(tmp))
        };
        if state.objects.contains(&id) {
            return Ok(false);
        }
        if state.objects.list.len() >= pack::MAX_OBJECTS as usize {
            return Err(StoreError::TooLarge {
                what: "the number of files in one layer",
                limit: pack::MAX_OBJECTS.into(),
            });
        }
        let len = bytes.len() as u64;
        if len < pack::BLOCK && state.fill_gap(id, bytes) {
            return Ok(true);
        }
        let end = state.chunk_at + state.chunk.len() as u64;
        let offset = pack::place(end, len);
        state.objects.push(id, Place { offset, len });
        if bytes.len() >= DIRECT {
            let (chunk, at) = state.take_chunk();
            state.chunk_at = offset + len;
            drop(state);
            tmp.write(bytes, offset)?;
            self.write_chunk(&tmp, chunk, at)?;
        } else {
            let padded = (offset - state.chunk_at) as usize;
            let aligned = end.next_multiple_of(pack::SMALL_ALIGN) - state.chunk_at;
            let room = padded.saturating_sub(aligned as usize);
            if room >= MIN_GAP {
                state.gaps.push((aligned as usize, room));
            }
            state.chunk.resize(padded, 0);
            state.chunk.extend_from_slice(bytes);
            if state.chunk.len() >= CHUNK {
                let (chunk, at) = state.take_chunk();
                drop(state);
                self.write_chunk(&tmp, chunk, at)?;
            }
        }
        Ok(true)
    }

    fn write_chunk(&self, tmp: &TmpFile, mut chunk: Vec<u8>, at: u64) -> Result<(), StoreError> {
        if !chunk.is_empty() {
            tmp.write(&chunk, at)?;
        }
        chunk.clear();
        lock(&self.0).spare.push(chunk);
        Ok(())
    }

    /// The pack's file, whenever so much was added that it is worth syncing.
    pub(crate) fn to_sync(&self) -> Option<(Arc<File>, PathBuf)> {
        let mut state = lock(&self.0);
        if state.chunk_at < state.synced + SYNC_EVERY {
            return None;
        }
        state.synced = state.chunk_at;
        let tmp = state.tmp.as_ref()?;
        Some((Arc::clone(&tmp.file), tmp.path().to_owned()))
    }

    /// Writes the rest. Nothing if no object was added.
    pub(crate) fn finish(self) -> Result<Option<FinishedPack>, StoreError> {
        let state = self.0.into_inner().unwrap_or_else(PoisonError::into_inner);
        let Some(tmp) = state.tmp else {
            return Ok(None);
        };
        tmp.write(&state.chunk, state.chunk_at)?;
        let len = state.chunk_at + state.chunk.len() as u64;
        let mut objects = state.objects.list;
        objects.sort_unstable_by_key(|(id, _)| *id);
        Ok(Some(FinishedPack { tmp, objects, len }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Store;

    #[test]
    fn small_objects_fill_what_larger_ones_leave() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let lease = store.lease("test").unwrap();
        let writer = PackWriter::default();
        let mut all = Vec::new();
        // Of five, one is larger than a block, as in a node_modules.
        for n in 0..2000_usize {
            let len = if n % 5 == 0 {
                5000 + n * 7
            } else {
                n * 3 % 1500
            };
            let bytes: Vec<u8> = (0..len).map(|at| (at * 31 + n * 7) as u8).collect();
            let id = ObjectId::of(&bytes);
            if writer.add(|| lease.tmp(), id, &bytes).unwrap() {
                all.push((id, bytes));
            }
        }
        let pack = writer.finish().unwrap().unwrap();
        let sum: usize = all.iter().map(|(_, bytes)| bytes.len()).sum();
        assert!(pack.len < sum as u64 * 108 / 100, "{} for {sum}", pack.len);
        let mut places: Vec<Place> = pack.objects.iter().map(|(_, place)| *place).collect();
        places.sort_by_key(|place| (place.offset, place.len));
        for pair in places.windows(2) {
            assert!(pair[0].offset + pair[0].len <= pair[1].offset);
        }
        for place in places {
            if place.len < pack::BLOCK {
                assert_eq!(place.offset % pack::SMALL_ALIGN, 0);
                assert!(place.offset % pack::BLOCK + place.len <= pack::BLOCK);
            } else {
                assert_eq!(place.offset % pack::BLOCK, 0);
            }
        }
        let id = pack.publish(&lease).unwrap();
        store.objects().refresh().unwrap();
        assert!(store.objects().has_pack(&id));
        for (id, bytes) in all {
            let blob = store.object(&id).unwrap();
            assert_eq!(blob.read_all(1 << 20).unwrap(), bytes);
        }
    }
}
