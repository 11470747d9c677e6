//! The stat cache of a project: which contents a file had when it last looked like this, as in
//! git's index.
//!
//! A cache that is damaged, foreign or of another version is ignored: the files are read again. All
//! integers are little-endian. The file is
//!
//! ```text
//! header   192 bytes: magic `III-STAT`; version, compat, ro_compat, incompat: u32;
//!          dir_count, entry_count: u32; blob_len: u64; stamp_sec: i64; stamp_nsec: u32; 0: u32;
//!          checksum, fingerprint, layer_id, tree_id: 32 bytes each; 0: u64
//! dirs     dir_count x (path_off, path_len, first, count: u32), sorted by path;
//!          first, count: its range of entries
//! entries  entry_count x 96 bytes, those of one directory sorted by name:
//!          name_off, name_len: u32; mtime_sec, ctime_sec: i64; mtime_nsec, ctime_nsec: u32;
//!          ino, dev, size: u64; mode: u32; 0: u32; object: 32 bytes
//! blob     paths and names
//! ```
//!
//! The checksum is the BLAKE3 of the file with zeroes in place of the checksum.
//!
//! # The racy rule
//!
//! A file that is written twice within one tick of the clock can keep its times and its size while
//! its bytes change. The stamp is the time at which the walk began. A file whose mtime or ctime is
//! not older than that, less the clock's granularity, may have changed after it was read without a
//! trace: its entry holds no longer than this run.
//!
//! # Writes through a shared mapping
//!
//! The kernel sets a file's times at the first write to a clean page of a mapping, and not again
//! before the page was written back, which may take half a minute. A file that is read between two
//! writes to one page keeps its times while its bytes change: the second write is missed until the
//! times change again. Nothing that is cheap tells of it, since such a write raises no event
//! either. Programs that unmap what they wrote, such as linkers, are followed; a database that is
//! open is not.

use std::convert::Infallible;
use std::fs::File;
use std::io;

use crate::disk::Disk;
use crate::id::{LayerId, ObjectId, TreeId};
use crate::map::Bytes;
use crate::pieces::{Pieces, Put, collect};

const MAGIC: &[u8; 8] = b"III-STAT";
const VERSION: u32 = 1;
const HEADER: usize = 192;
const CHECKSUM: std::ops::Range<usize> = 56..88;
const DIR: usize = 16;
const ENTRY: usize = 96;
/// Times of files advance in ticks of the kernel's clock, which are at most 10 ms. The rest is for
/// a write under way: it sets the times when it begins, and may still change bytes when it was
/// read.
const GRANULARITY_NS: i128 = 100_000_000;
/// A time without nanoseconds is taken for one of a filesystem that has none; FAT counts in steps
/// of 2 s.
const COARSE_GRANULARITY_NS: i128 = 2_000_000_000;

/// A point in time: seconds since 1970 and nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Time {
    /// Seconds since 1970, negative before.
    pub sec: i64,
    /// Nanoseconds after `sec`.
    pub nsec: u32,
}

impl Time {
    fn ns(self) -> i128 {
        i128::from(self.sec) * 1_000_000_000 + i128::from(self.nsec)
    }
}

/// Outcome of the project's snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// Of everything that went into the layer.
    pub fingerprint: [u8; 32],
    /// The layer.
    pub layer_id: LayerId,
    /// The layer without its mtimes.
    pub tree_id: TreeId,
}

/// Signs that a file was not touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FileStat {
    /// Last modification.
    pub mtime: Time,
    /// Last change of the inode.
    pub ctime: Time,
    /// Inode number.
    pub ino: u64,
    /// Device.
    pub dev: u64,
    /// Length in bytes.
    pub size: u64,
    /// Type and permissions.
    pub mode: u32,
}

impl FileStat {
    /// Whether the file may have changed after `stamp` without looking different.
    fn is_racy(&self, stamp: Time) -> bool {
        let granularity = if self.mtime.nsec == 0 && self.ctime.nsec == 0 {
            COARSE_GRANULARITY_NS
        } else {
            GRANULARITY_NS
        };
        self.mtime.ns().max(self.ctime.ns()) >= stamp.ns() - granularity
    }
}

/// A regular file: name, how it looked when its contents were known, contents.
pub type FileEntry = (Box<[u8]>, FileStat, ObjectId);

/// A directory of the cache to be written.
#[derive(Debug, Clone, Copy)]
pub struct DirEntries<'a> {
    /// Relative to the project.
    pub path: &'a [u8],
    /// Its regular files, sorted by name.
    pub files: &'a [FileEntry],
}

/// Encodes a cache. `dirs` must be sorted by path. Nothing if it would not fit the format.
pub fn encode(stamp: Time, outcome: &Outcome, dirs: &[DirEntries<'_>]) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let Ok(fits) = write::<Infallible>(stamp, outcome, dirs, &mut collect(&mut bytes));
    fits.then_some(bytes)
}

/// As [`encode`], handed out in pieces, the header once more at the end. False if it would not fit
/// the format.
pub(crate) fn write<'p, E>(
    stamp: Time,
    outcome: &Outcome,
    dirs: &[DirEntries<'_>],
    put: &'p mut Put<'p, E>,
) -> Result<bool, E> {
    let files = || dirs.iter().flat_map(|dir| dir.files);
    let entries = files().count();
    let paths: usize = dirs.iter().map(|dir| dir.path.len()).sum();
    let blob = paths + files().map(|(name, ..)| name.len()).sum::<usize>();
    if [dirs.len(), entries, blob]
        .iter()
        .any(|len| u32::try_from(*len).is_err())
    {
        return Ok(false);
    }
    let mut header = Vec::with_capacity(HEADER);
    header.extend(MAGIC);
    for word in [VERSION, 0, 0, 0, dirs.len() as u32, entries as u32] {
        header.extend(word.to_le_bytes());
    }
    header.extend((blob as u64).to_le_bytes());
    header.extend(stamp.sec.to_le_bytes());
    header.extend(stamp.nsec.to_le_bytes());
    header.resize(CHECKSUM.end, 0);
    header.extend(outcome.fingerprint);
    header.extend(outcome.layer_id.as_bytes());
    header.extend(outcome.tree_id.as_bytes());
    header.resize(HEADER, 0);

    let mut pieces = Pieces::new(0, put);
    pieces.add(|out| out.extend(&header))?;
    let (mut at, mut first) = (0_u32, 0_u32);
    for dir in dirs {
        let (len, count) = (dir.path.len() as u32, dir.files.len() as u32);
        pieces.add(|out| {
            for word in [at, len, first, count] {
                out.extend(word.to_le_bytes());
            }
        })?;
        at += len;
        first += count;
    }
    for (name, stat, object) in files() {
        pieces.add(|out| {
            out.extend(at.to_le_bytes());
            out.extend((name.len() as u32).to_le_bytes());
            out.extend(stat.mtime.sec.to_le_bytes());
            out.extend(stat.ctime.sec.to_le_bytes());
            out.extend(stat.mtime.nsec.to_le_bytes());
            out.extend(stat.ctime.nsec.to_le_bytes());
            for word in [stat.ino, stat.dev, stat.size] {
                out.extend(word.to_le_bytes());
            }
            out.extend(stat.mode.to_le_bytes());
            out.extend([0; 4]);
            out.extend(object.as_bytes());
        })?;
        at += name.len() as u32;
    }
    for dir in dirs {
        pieces.add(|out| out.extend(dir.path))?;
    }
    for (name, ..) in files() {
        pieces.add(|out| out.extend(&**name))?;
    }
    let (checksum, put) = pieces.finish()?;
    header[CHECKSUM].copy_from_slice(checksum.as_bytes());
    put(&header, 0)?;
    Ok(true)
}

/// Puts the checksum of a cache into its place; too short a one has none.
pub fn seal(bytes: &mut [u8]) {
    if let Some(place) = bytes.get_mut(CHECKSUM) {
        place.fill(0);
        let checksum = blake3::hash(bytes);
        bytes[CHECKSUM].copy_from_slice(checksum.as_bytes());
    }
}

/// A cache, read in place. The default is empty.
#[derive(Debug)]
pub struct StatCache {
    bytes: Bytes,
    dirs: usize,
    entries: usize,
    stamp: Time,
}

impl Default for StatCache {
    fn default() -> Self {
        Self {
            bytes: Bytes::Owned(Vec::new()),
            dirs: 0,
            entries: 0,
            stamp: Time::default(),
        }
    }
}

/// The files of one directory.
#[derive(Debug, Clone, Copy)]
pub struct CachedDir<'a> {
    cache: &'a StatCache,
    first: usize,
    count: usize,
}

fn le<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes
        .get(at..)
        .and_then(|bytes| bytes.first_chunk())
        .copied()
        .unwrap_or([0; N])
}

fn le_u32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(le(bytes, at))
}

fn le_u64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(le(bytes, at))
}

impl StatCache {
    /// The cache in a file; empty if it does not hold.
    pub fn open(disk: &dyn Disk, file: &File) -> Self {
        Self::checked(disk, file).ok().flatten().unwrap_or_default()
    }

    /// The cache in a file, if it holds. An error says nothing of that.
    pub(crate) fn checked(disk: &dyn Disk, file: &File) -> io::Result<Option<Self>> {
        Bytes::map(disk, file).map(Self::check)
    }

    /// A cache held in memory.
    pub fn from_bytes(bytes: Vec<u8>) -> Option<Self> {
        Self::check(Bytes::Owned(bytes))
    }

    fn check(bytes: Bytes) -> Option<Self> {
        if bytes.len() < HEADER || !bytes.starts_with(MAGIC) {
            return None;
        }
        if le_u32(&bytes, 8) != VERSION || le_u32(&bytes, 20) != 0 {
            return None;
        }
        let (dirs, entries) = (le_u32(&bytes, 24) as usize, le_u32(&bytes, 28) as usize);
        let len = HEADER as u128
            + dirs as u128 * DIR as u128
            + entries as u128 * ENTRY as u128
            + u128::from(le_u64(&bytes, 32));
        if len != bytes.len() as u128 {
            return None;
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(&bytes[..CHECKSUM.start]);
        hasher.update(&[0; CHECKSUM.end - CHECKSUM.start]);
        bytes.hash_into(&mut hasher, CHECKSUM.end);
        if hasher.finalize().as_bytes() != &bytes[CHECKSUM] {
            return None;
        }
        let stamp = Time {
            sec: le_u64(&bytes, 40) as i64,
            nsec: le_u32(&bytes, 48),
        };
        Some(Self {
            bytes,
            dirs,
            entries,
            stamp,
        })
    }

    /// See [`Bytes::release`].
    pub(crate) fn release(&self) {
        self.bytes.release();
    }

    /// Number of files in it.
    pub fn len(&self) -> usize {
        self.entries
    }

    /// Whether it knows no file.
    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// Outcome of the walk that made it.
    pub fn outcome(&self) -> Option<Outcome> {
        (!self.bytes.is_empty()).then(|| Outcome {
            fingerprint: le(&self.bytes, CHECKSUM.end),
            layer_id: LayerId::from_bytes(le(&self.bytes, CHECKSUM.end + 32)),
            tree_id: TreeId::from_bytes(le(&self.bytes, CHECKSUM.end + 64)),
        })
    }

    /// When the walk that made it began.
    pub fn stamp(&self) -> Time {
        self.stamp
    }

    /// A string of the blob; empty if its place is not in there.
    fn text(&self, at: usize) -> &[u8] {
        let blob = HEADER + self.dirs * DIR + self.entries * ENTRY;
        let (off, len) = (le_u32(&self.bytes, at), le_u32(&self.bytes, at + 4));
        self.bytes
            .get(blob..)
            .and_then(|blob| blob.get(off as usize..)?.get(..len as usize))
            .unwrap_or_default()
    }

    /// Entries of the directory at `path`.
    pub fn dir(&self, path: &[u8]) -> CachedDir<'_> {
        let ix = search(self.dirs, |ix| self.text(HEADER + ix * DIR).cmp(path));
        let (first, count) = ix.map_or((0, 0), |ix| {
            let at = HEADER + ix * DIR + 8;
            let first = (le_u32(&self.bytes, at) as usize).min(self.entries);
            let count = le_u32(&self.bytes, at + 4) as usize;
            (first, count.min(self.entries - first))
        });
        CachedDir {
            cache: self,
            first,
            count,
        }
    }
}

impl CachedDir<'_> {
    /// Contents of the file called `name` when the cache was made, and whether they still hold:
    /// they do if it looks the same now and is not racy.
    pub fn get(&self, name: &[u8], now: &FileStat) -> Option<(ObjectId, bool)> {
        let entry = |ix: usize| HEADER + self.cache.dirs * DIR + (self.first + ix) * ENTRY;
        let ix = search(self.count, |ix| self.cache.text(entry(ix)).cmp(name))?;
        let at = entry(ix);
        let bytes = &self.cache.bytes;
        let then = FileStat {
            mtime: Time {
                sec: le_u64(bytes, at + 8) as i64,
                nsec: le_u32(bytes, at + 24),
            },
            ctime: Time {
                sec: le_u64(bytes, at + 16) as i64,
                nsec: le_u32(bytes, at + 28),
            },
            ino: le_u64(bytes, at + 32),
            dev: le_u64(bytes, at + 40),
            size: le_u64(bytes, at + 48),
            mode: le_u32(bytes, at + 56),
        };
        let holds = then == *now && !then.is_racy(self.cache.stamp);
        Some((ObjectId::from_bytes(le(bytes, at + 64)), holds))
    }
}

/// Binary search by index.
fn search(len: usize, order: impl Fn(usize) -> std::cmp::Ordering) -> Option<usize> {
    let (mut low, mut high) = (0, len);
    while low < high {
        let mid = low + (high - low) / 2;
        match order(mid) {
            std::cmp::Ordering::Equal => return Some(mid),
            std::cmp::Ordering::Less => low = mid + 1,
            std::cmp::Ordering::Greater => high = mid,
        }
    }
    None
}
