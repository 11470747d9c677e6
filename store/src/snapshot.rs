//! Snapshots: a project directory as a layer.
//!
//! A snapshot keeps the modes and mtimes of the project. The caller sets the owners. Xattrs are
//! left out (they are the host's: labels, quarantine marks), and names that are hardlinks of one
//! file become files of their own. Symlinks are kept and never followed. Sockets, fifos and devices
//! are left out and reported. Mount points are crossed as they are.
//! out and reported. Mount points are crossed as they are.

use std::borrow::Cow;
use std::ffi::{CStr, OsStr};
use std::fs::File;
use std::io;
use std::iter;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rayon::Scope;
use rayon::prelude::*;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawMode, Stat};
use rustix::io::Errno;

use crate::error::StoreError;
use crate::id::ObjectId;
use crate::ingest::{Ingest, Published};
use crate::layer::Layer;
use crate::lease::Lease;
use crate::mutex::lock;
use crate::refs::escape;
use crate::stat_cache::{
    self, CachedDir, DirEntries, FileEntry, FileStat, Outcome, StatCache, Time,
};
use crate::store::Store;
use crate::tree::{
    self, Content, DirKind, Entry, Leaf, MAX_DEPTH, MAX_NODES, MAX_TEXT, Meta, Mtime, Source,
    TreeError, Xattrs,
};

/// How often a file that changes during the read is read again.
const MAX_ATTEMPTS: u32 = 8;
/// Most files, and most bytes, that one task reads.
const BATCH_FILES: usize = 64;
const BATCH_BYTES: u64 = 1 << 20;
/// Directories that one task enters, one after the other.
const BATCH_DIRS: usize = 8;
/// The pages of the stat cache leave memory after this many entries.
const RELEASE: usize = 1 << 14;
/// Bytes to be hashed are gathered up to about this many.
const HASHED: usize = 64 << 10;
/// The object of a file that the stat cache does not know: no contents have this id.
const UNKNOWN: ObjectId = ObjectId::from_bytes([0; 32]);
/// Bytes of the buffer for the entries of a directory.
#[cfg(target_os = "linux")]
const LISTING: usize = 32 << 10;

/// Why a directory could not become a layer.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// A file or directory of the project cannot be read.
    #[error("{op} {} failed", path.display())]
    Read {
        /// The operation: a verb such as "reading".
        op: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file or directory changed during each attempt to read it.
    #[error("{} changed during each attempt to read it; stop the process that writes to it, or try again", .0.display())]
    Changing(PathBuf),
    /// The project is too deep or too large.
    #[error("{} cannot be stored in a layer", path.display())]
    Tree {
        /// The directory or file beyond the limit.
        path: PathBuf,
        /// The cause.
        source: TreeError,
    },
    /// The store failed.
    #[error("storing {} failed", path.display())]
    Store {
        /// The file or directory that was being stored.
        path: PathBuf,
        /// The cause.
        source: StoreError,
    },
}

/// How a directory becomes a layer.
#[derive(Debug, Clone, Copy)]
pub struct Options<'a> {
    /// Name of the stat cache: one per project directory.
    pub name: &'a str,
    /// The place of the directory in the layer, `workspace` for example. The directories on the way
    /// to it are implicit.
    pub at: &'a [u8],
    /// Names that are left out at any depth, whatever their type.
    pub excludes: &'a [&'a [u8]],
    /// Owner of everything.
    pub uid: u32,
    /// Group of everything.
    pub gid: u32,
}

/// A file of a type that is left out of layers.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Skipped {
    /// Relative to the project.
    pub path: Vec<u8>,
    /// The type of the file.
    pub what: &'static str,
}

/// The result of a snapshot.
#[derive(Debug)]
pub struct Snapshot {
    /// The layer as it was stored.
    pub published: Published,
    /// The layer.
    pub layer: Arc<Layer>,
    /// Regular files in it.
    pub files: u64,
    /// Files whose contents were read.
    pub read: u64,
    /// Files that are new or have other contents than at the last snapshot.
    pub changed: u64,
    /// Files of the last snapshot that no longer exist.
    pub removed: u64,
    /// Files that were left out because of their type, sorted.
    pub skipped: Vec<Skipped>,
}

/// Stores `dir` as a layer, reading only files that changed since the last snapshot of this name.
/// The layer is in the store, and pinned in `lease`, on return. A file that cannot be read is an
/// error that names it.
pub fn snapshot(
    store: &Store,
    lease: &Lease,
    dir: &Path,
    options: &Options<'_>,
) -> Result<Snapshot, SnapshotError> {
    let disk = store.disk().as_ref();
    let cache = disk.open(&cache_path(store, options));
    let cache = cache.map_or_else(
        |_| StatCache::default(),
        |file| StatCache::open(disk, &file),
    );
    match attempt(store, lease, dir, options, &cache) {
        // The cache names contents that the store no longer has: read everything.
        Err(SnapshotError::Store {
            source: StoreError::MissingObject(_),
            ..
        }) => attempt(store, lease, dir, options, &StatCache::default()),
        other => other,
    }
}

fn cache_path(store: &Store, options: &Options<'_>) -> PathBuf {
    store.dir().join("stat").join(escape(options.name))
}

fn attempt(
    store: &Store,
    lease: &Lease,
    dir: &Path,
    options: &Options<'_>,
    cache: &StatCache,
) -> Result<Snapshot, SnapshotError> {
    let stored = |source| SnapshotError::Store {
        path: dir.to_owned(),
        source,
    };
    let ingest = store.ingest(lease).map_err(stored)?;
    // Before the first stat of a file: the racy rule counts from here.
    let stamp = now();
    let walk = Walk {
        root: dir,
        options,
        ingest: &ingest,
        cache,
        dirs: Mutex::new(vec![Found::default()]),
        nodes: AtomicUsize::new(1),
        text: AtomicUsize::new(0),
        read: AtomicU64::new(0),
        fresh: AtomicBool::new(false),
        known: AtomicU64::new(0),
        changed: AtomicU64::new(0),
        skipped: Mutex::default(),
        failed: AtomicBool::new(false),
        error: Mutex::default(),
    };
    let root = walk.open_root()?;
    rayon::in_place_scope(|scope| walk.run(|| walk.visit(scope, 0, root, &[], 0)));
    let taken = walk.finish()?;

    let fingerprint = fingerprint(&taken.dirs, options);
    // A layer of the store cannot contain an object that the store lacked, whatever the cache says.
    let same = cache
        .outcome()
        .filter(|last| last.fingerprint == fingerprint && !taken.fresh);
    if let Some(last) = same {
        // Pins the layer before looking for it. A damaged layer is made anew.
        lease.pin(&[last.layer_id]).map_err(stored)?;
        if let Ok(layer) = store.layer(&last.layer_id) {
            store.sync_layers().map_err(stored)?;
            // The files that were read because they were young need not be read again.
            if taken.read > 0 {
                remember(store, lease, options, stamp, &last, &taken).map_err(stored)?;
            }
            let published = Published {
                layer_id: last.layer_id,
                tree_id: last.tree_id,
                new_files: 0,
                new_bytes: 0,
                existed: true,
            };
            return Ok(taken.result(published, layer));
        }
    }

    let tree = Layout {
        above: tree::components(options.at).collect(),
        dirs: &taken.dirs,
        options,
    };
    let published = ingest.finish(&tree).map_err(|err| match err {
        StoreError::Tree(source) => SnapshotError::Tree {
            path: dir.to_owned(),
            source,
        },
        source => stored(source),
    })?;
    let outcome = Outcome {
        fingerprint,
        layer_id: published.layer_id,
        tree_id: published.tree_id,
    };
    let (layer, cached) = rayon::join(
        || store.layer(&published.layer_id),
        || remember(store, lease, options, stamp, &outcome, &taken),
    );
    cached.map_err(stored)?;
    let layer = layer.map_err(stored)?;
    Ok(taken.result(published, layer))
}

/// Writes the stat cache.
fn remember(
    store: &Store,
    lease: &Lease,
    options: &Options<'_>,
    stamp: Time,
    outcome: &Outcome,
    taken: &Taken,
) -> Result<(), StoreError> {
    let tmp = lease.tmp()?;
    let fits = stat_cache::write(stamp, outcome, &entries(&taken.dirs), &mut |piece, at| {
        tmp.write(piece, at)
    })?;
    if fits {
        // Not synced: a crash may lose or truncate the cache, and its reader checks it.
        tmp.publish(&cache_path(store, options))?;
    }
    Ok(())
}

/// A hash of everything that goes into the layer.
fn fingerprint(dirs: &[Found], options: &Options<'_>) -> [u8; 32] {
    let parts: Vec<[u8; 32]> = dirs.par_iter().map(Found::fingerprint).collect();
    let mut order: Vec<usize> = (0..dirs.len()).collect();
    order.sort_unstable_by(|a, b| dirs[*a].path.cmp(&dirs[*b].path));
    let mut hasher = blake3::Hasher::new();
    hasher.update(&options.uid.to_le_bytes());
    hasher.update(&options.gid.to_le_bytes());
    hasher.update(&(options.at.len() as u64).to_le_bytes());
    hasher.update(options.at);
    for ix in order {
        hasher.update(&parts[ix]);
    }
    *hasher.finalize().as_bytes()
}

/// The directories of the walk, as a tree below their place in the layer.
struct Layout<'a> {
    /// The directories on the way to that place, outermost first.
    above: Vec<&'a [u8]>,
    dirs: &'a [Found],
    options: &'a Options<'a>,
}

impl Layout<'_> {
    fn meta(&self, mode: u32, mtime: Time) -> Meta {
        Meta {
            mode: (mode & 0o7777) as u16,
            uid: self.options.uid,
            gid: self.options.gid,
            mtime: Mtime {
                sec: mtime.sec,
                nsec: mtime.nsec,
            },
            xattrs: Xattrs::new(),
        }
    }

    fn leaf(&self, stat: &FileStat, content: Content) -> Entry<'_, usize> {
        Entry::Leaf(Cow::Owned(Leaf {
            meta: self.meta(stat.mode, stat.mtime),
            content,
            link: None,
        }))
    }

    fn found(&self, dir: usize) -> Option<&Found> {
        self.dirs.get(dir.checked_sub(self.above.len())?)
    }

    fn entries_of<'b>(
        &'b self,
        found: &'b Found,
    ) -> impl Iterator<Item = (&'b [u8], Entry<'b, usize>)> {
        let dirs = found.dirs.clone().filter_map(|ix| {
            let dir = self.dirs.get(ix)?;
            dir.stat?;
            Some((dir.name(), Entry::Dir(self.above.len() + ix)))
        });
        let links = found.links.iter().map(|(name, stat, target)| {
            let target = target.clone();
            (&**name, self.leaf(stat, Content::Symlink { target }))
        });
        let files = found.files.iter().map(|(name, stat, object)| {
            let (object, size) = (*object, stat.size);
            (&**name, self.leaf(stat, Content::File { object, size }))
        });
        merge(merge(dirs, links), files)
    }
}

/// Merges two sequences that are sorted by name.
fn merge<'a, T>(
    a: impl Iterator<Item = (&'a [u8], T)>,
    b: impl Iterator<Item = (&'a [u8], T)>,
) -> impl Iterator<Item = (&'a [u8], T)> {
    let (mut a, mut b) = (a.peekable(), b.peekable());
    iter::from_fn(move || match (a.peek(), b.peek()) {
        (Some((first, _)), Some((second, _))) if second < first => b.next(),
        (Some(_), _) => a.next(),
        (None, _) => b.next(),
    })
}

impl Source for Layout<'_> {
    type Dir<'b>
        = usize
    where
        Self: 'b;

    fn root(&self) -> usize {
        0
    }

    fn dir(&self, dir: usize) -> (Cow<'_, Meta>, DirKind) {
        match self.found(dir).and_then(|found| found.stat) {
            Some((mode, mtime)) => (Cow::Owned(self.meta(mode, mtime)), DirKind::Merged),
            None => (Cow::Owned(Meta::default()), DirKind::Implicit),
        }
    }

    fn entries(&self, dir: usize) -> impl Iterator<Item = (&[u8], Entry<'_, usize>)> {
        let above = self.above.get(dir);
        let above = above.map(|name| (*name, Entry::Dir(dir + 1)));
        let found = self.found(dir).into_iter();
        above
            .into_iter()
            .chain(found.flat_map(|found| self.entries_of(found)))
    }
}

/// The entries of the next stat cache.
fn entries(dirs: &[Found]) -> Vec<DirEntries<'_>> {
    let mut entries: Vec<_> = dirs
        .iter()
        .filter(|dir| !dir.files.is_empty())
        .map(|dir| DirEntries {
            path: &dir.path,
            files: &dir.files,
        })
        .collect();
    entries.sort_unstable_by_key(|dir| dir.path);
    entries
}

/// The clock by which the kernel stamps files.
fn now() -> Time {
    #[cfg(target_os = "linux")]
    let clock = rustix::time::ClockId::RealtimeCoarse;
    #[cfg(not(target_os = "linux"))]
    let clock = rustix::time::ClockId::Realtime;
    let now = rustix::time::clock_gettime(clock);
    Time {
        sec: now.tv_sec,
        nsec: now.tv_nsec as u32,
    }
}

#[allow(
    clippy::cast_lossless,
    clippy::unnecessary_cast,
    reason = "some systems have narrower numbers"
)]
fn file_stat(stat: &Stat) -> FileStat {
    FileStat {
        mtime: Time {
            sec: stat.st_mtime,
            nsec: stat.st_mtime_nsec as u32,
        },
        ctime: Time {
            sec: stat.st_ctime,
            nsec: stat.st_ctime_nsec as u32,
        },
        ino: stat.st_ino,
        dev: stat.st_dev as u64,
        size: stat.st_size as u64,
        mode: stat.st_mode as u32,
    }
}

fn file_type(mode: u32) -> FileType {
    FileType::from_raw_mode(mode as RawMode)
}

/// Calls `see` with each entry of a directory, in no order, with its type where the directory has
/// it. Stops at the first error of `see`.
#[cfg(target_os = "linux")]
fn each_entry<E>(
    dir: &OwnedFd,
    mut see: impl FnMut(Result<(&CStr, FileType), Errno>) -> Result<(), E>,
) -> Result<(), E> {
    let mut buffer = Vec::with_capacity(LISTING);
    let mut entries = rustix::fs::RawDir::new(dir, buffer.spare_capacity_mut());
    while let Some(entry) = entries.next() {
        let entry = entry.as_ref().map_err(|err| *err);
        see(entry.map(|entry| (entry.file_name(), entry.file_type())))?;
    }
    Ok(())
}

/// Calls `see` with each entry of a directory, in no order, with its type where the directory has
/// it. Stops at the first error of `see`.
#[cfg(not(target_os = "linux"))]
fn each_entry<E>(
    dir: &OwnedFd,
    mut see: impl FnMut(Result<(&CStr, FileType), Errno>) -> Result<(), E>,
) -> Result<(), E> {
    match rustix::fs::Dir::read_from(dir) {
        Ok(mut entries) => entries.try_for_each(|entry| {
            let entry = entry.as_ref().map_err(|err| *err);
            see(entry.map(|entry| (entry.file_name(), entry.file_type())))
        }),
        Err(err) => see(Err(err)),
    }
}

/// A directory of the project.
#[derive(Debug, Default)]
struct Found {
    path: Arc<[u8]>,
    /// Mode and mtime. Nothing if the directory was removed before it could be opened.
    stat: Option<(u32, Time)>,
    /// Names of its directories, sorted.
    dirs: Range<usize>,
    /// Sorted by name.
    links: Vec<LinkEntry>,
    /// Sorted by name once all of them were read. A file that was removed meanwhile has an empty
    /// name.
    files: Vec<FileEntry>,
}

/// A symlink: name, stat, target.
type LinkEntry = (Box<[u8]>, FileStat, Box<[u8]>);

impl Found {
    fn name(&self) -> &[u8] {
        let slash = self.path.iter().rposition(|&byte| byte == b'/');
        &self.path[slash.map_or(0, |slash| slash + 1)..]
    }

    /// A hash of every part of it that goes into the layer.
    fn fingerprint(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        let mut bytes = Vec::new();
        let mut put = |name: &[u8], mode: u32, mtime: Time, size: u64, content: &[u8]| {
            bytes.extend((name.len() as u32).to_le_bytes());
            bytes.extend(name);
            bytes.extend(mode.to_le_bytes());
            bytes.extend(mtime.sec.to_le_bytes());
            bytes.extend(mtime.nsec.to_le_bytes());
            bytes.extend(size.to_le_bytes());
            bytes.extend((content.len() as u32).to_le_bytes());
            bytes.extend(content);
            if bytes.len() >= HASHED {
                hasher.update(&bytes);
                bytes.clear();
            }
        };
        if let Some((mode, mtime)) = self.stat {
            // The length of a directory depends on the filesystem.
            put(&self.path, mode, mtime, 0, b"");
        }
        for (name, stat, target) in &self.links {
            put(name, stat.mode, stat.mtime, stat.size, target);
        }
        for (name, stat, object) in &self.files {
            put(name, stat.mode, stat.mtime, stat.size, object.as_bytes());
        }
        *hasher.update(&bytes).finalize().as_bytes()
    }
}

/// The entries of one directory.
struct Listing<'a> {
    path: &'a [u8],
    cached: CachedDir<'a>,
    links: Vec<LinkEntry>,
    /// Files that the cache proves unchanged.
    files: Vec<FileEntry>,
    dirs: Vec<Box<[u8]>>,
    /// Files to be read, each with its object of the last snapshot.
    stale: Vec<FileEntry>,
}

struct Walk<'a> {
    root: &'a Path,
    options: &'a Options<'a>,
    ingest: &'a Ingest<'a>,
    cache: &'a StatCache,
    /// A directory always stands after its parent.
    dirs: Mutex<Vec<Found>>,
    nodes: AtomicUsize,
    /// Bytes of the paths of all directories.
    text: AtomicUsize,
    read: AtomicU64,
    /// Whether an object was read that the store lacked.
    fresh: AtomicBool,
    /// Files of the cache, whether or not they changed.
    known: AtomicU64,
    changed: AtomicU64,
    skipped: Mutex<Vec<Skipped>>,
    failed: AtomicBool,
    error: Mutex<Option<SnapshotError>>,
}

/// The result of the walk.
struct Taken {
    /// A directory always stands after its parent.
    dirs: Vec<Found>,
    read: u64,
    fresh: bool,
    changed: u64,
    removed: u64,
    skipped: Vec<Skipped>,
}

impl Taken {
    fn result(self, published: Published, layer: Arc<Layer>) -> Snapshot {
        let files = self.dirs.iter().map(|dir| dir.files.len() as u64).sum();
        rayon::spawn(move || drop(self.dirs));
        Snapshot {
            published,
            layer,
            files,
            read: self.read,
            changed: self.changed,
            removed: self.removed,
            skipped: self.skipped,
        }
    }
}

const OPEN_DIR: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::CLOEXEC);
/// Opening a fifo that replaced a file must not block.
const OPEN_FILE: OFlags = OFlags::RDONLY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::NONBLOCK)
    .union(OFlags::NOCTTY)
    .union(OFlags::CLOEXEC);

fn join(path: &[u8], name: &[u8]) -> Vec<u8> {
    let mut joined = Vec::with_capacity(path.len() + 1 + name.len());
    joined.extend(path);
    if !path.is_empty() {
        joined.push(b'/');
    }
    joined.extend(name);
    joined
}

/// Splits the files to be read, those from `first` on, into one batch for each task.
fn batches(files: &[FileEntry], first: usize) -> Vec<Range<usize>> {
    let mut batches: Vec<Range<usize>> = Vec::new();
    let mut bytes = 0_u64;
    for (ix, (_, stat, _)) in files.iter().enumerate().skip(first) {
        bytes = bytes.saturating_add(stat.size);
        match batches.last_mut() {
            Some(batch) if batch.len() < BATCH_FILES && bytes <= BATCH_BYTES => batch.end = ix + 1,
            _ => {
                bytes = stat.size;
                batches.push(ix..ix + 1);
            }
        }
    }
    batches
}

impl Walk<'_> {
    fn path(&self, path: &[u8]) -> PathBuf {
        if path.is_empty() {
            return self.root.to_owned();
        }
        self.root.join(OsStr::from_bytes(path))
    }

    fn error(&self, op: &'static str, path: &[u8], source: impl Into<io::Error>) -> SnapshotError {
        SnapshotError::Read {
            op,
            path: self.path(path),
            source: source.into(),
        }
    }

    fn changing(&self, dir: &[u8], name: &[u8]) -> SnapshotError {
        SnapshotError::Changing(self.path(&join(dir, name)))
    }

    fn open_root(&self) -> Result<OwnedFd, SnapshotError> {
        rustix::fs::open(self.root, OPEN_DIR, Mode::empty())
            .map_err(|err| self.error("opening the directory", b"", err))
    }

    /// Runs a task, unless one failed before. Keeps the first error, which the snapshot returns.
    fn run(&self, task: impl FnOnce() -> Result<(), SnapshotError>) {
        if self.failed.load(Ordering::Relaxed) {
            return;
        }
        if let Err(err) = task() {
            self.failed.store(true, Ordering::Relaxed);
            lock(&self.error).get_or_insert(err);
        }
    }

    /// Reads an open directory and spawns tasks for its entries.
    fn visit<'s>(
        &'s self,
        scope: &Scope<'s>,
        ix: usize,
        fd: OwnedFd,
        path: &[u8],
        depth: usize,
    ) -> Result<(), SnapshotError> {
        let stat = rustix::fs::fstat(&fd).map_err(|err| self.error("looking at", path, err))?;
        let stat = file_stat(&stat);
        let mut listing = Listing {
            path,
            cached: self.cache.dir(path),
            links: Vec::new(),
            files: Vec::new(),
            dirs: Vec::new(),
            stale: Vec::new(),
        };
        self.list(&fd, &mut listing)?;
        let Listing {
            mut links,
            mut files,
            mut dirs,
            mut stale,
            ..
        } = listing;
        links.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        dirs.sort_unstable();
        let first_stale = files.len();
        if files.is_empty() {
            files = stale;
        } else {
            files.append(&mut stale);
        }
        files.shrink_to_fit();
        let nodes = links.len() + files.len() + dirs.len();
        if depth >= MAX_DEPTH && nodes != 0 {
            let (path, source) = (self.path(path), TreeError::Depth);
            return Err(SnapshotError::Tree { path, source });
        }
        let text = dirs.iter().map(|name| path.len() + 1 + name.len()).sum();
        let text = self.text.fetch_add(text, Ordering::Relaxed) + text;
        let before = self.nodes.fetch_add(nodes, Ordering::Relaxed);
        if before + nodes > MAX_NODES || text > MAX_TEXT {
            let (path, source) = (self.root.to_owned(), TreeError::TooLarge);
            return Err(SnapshotError::Tree { path, source });
        }
        if before / RELEASE != (before + nodes) / RELEASE {
            self.cache.release();
        }

        let batches = batches(&files, first_stale);
        let subdirs = {
            let mut all = lock(&self.dirs);
            let first = all.len();
            all.extend(dirs.iter().map(|name| Found {
                path: join(path, name).into(),
                ..Found::default()
            }));
            let subdirs = first..all.len();
            if let Some(found) = all.get_mut(ix) {
                found.stat = Some((stat.mode, stat.mtime));
                found.dirs = subdirs.clone();
                found.links = links;
                found.files = files;
            }
            subdirs
        };
        // Shared by the tasks that open its entries.
        let fd = Arc::new(fd);
        for first in subdirs.clone().step_by(BATCH_DIRS) {
            let fd = Arc::clone(&fd);
            let batch = first..subdirs.end.min(first + BATCH_DIRS);
            scope.spawn(move |scope| {
                for ix in batch {
                    self.run(|| self.descend(scope, ix, &fd, depth + 1));
                }
            });
        }
        // After the directories: a thread runs the last task first, so few directories stay open.
        for batch in batches {
            let fd = Arc::clone(&fd);
            scope.spawn(move |_| self.run(|| self.read_batch(ix, &fd, batch)));
        }
        Ok(())
    }

    fn descend<'s>(
        &'s self,
        scope: &Scope<'s>,
        ix: usize,
        parent: &OwnedFd,
        depth: usize,
    ) -> Result<(), SnapshotError> {
        let path = lock(&self.dirs)
            .get(ix)
            .map(|found| Arc::clone(&found.path));
        let path = path.unwrap_or_default();
        let name = path.rsplit(|&byte| byte == b'/').next().unwrap_or_default();
        let flags = OPEN_DIR | OFlags::NOFOLLOW;
        match rustix::fs::openat(parent, name, flags, Mode::empty()) {
            Ok(fd) => self.visit(scope, ix, fd, &path, depth),
            // The directory was removed, so it is not in the layer.
            Err(Errno::NOENT) => Ok(()),
            Err(Errno::NOTDIR | Errno::LOOP) => Err(SnapshotError::Changing(self.path(&path))),
            Err(err) => Err(self.error("opening the directory", &path, err)),
        }
    }

    fn list(&self, dir: &OwnedFd, listing: &mut Listing<'_>) -> Result<(), SnapshotError> {
        let path = listing.path;
        each_entry(dir, |entry| {
            let (name, kind) = entry.map_err(|err| self.error("listing", path, err))?;
            let bytes = name.to_bytes();
            if bytes == b"." || bytes == b".." || self.options.excludes.contains(&bytes) {
                return Ok(());
            }
            if kind == FileType::Directory {
                listing.dirs.push(bytes.into());
                return Ok(());
            }
            match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => self.entry(dir, listing, name, file_stat(&stat)),
                // Removed since the listing.
                Err(Errno::NOENT) => Ok(()),
                Err(err) => Err(self.error("looking at", &join(path, bytes), err)),
            }
        })
    }

    fn entry(
        &self,
        dir: &OwnedFd,
        listing: &mut Listing<'_>,
        name: &CStr,
        stat: FileStat,
    ) -> Result<(), SnapshotError> {
        let bytes = name.to_bytes();
        let what = match file_type(stat.mode) {
            FileType::Directory => {
                listing.dirs.push(bytes.into());
                return Ok(());
            }
            FileType::RegularFile => {
                let known = listing.cached.get(bytes, &stat);
                if known.is_some() {
                    self.known.fetch_add(1, Ordering::Relaxed);
                }
                let (object, holds) = known.unwrap_or((UNKNOWN, false));
                let list = if holds {
                    &mut listing.files
                } else {
                    &mut listing.stale
                };
                list.push((bytes.into(), stat, object));
                return Ok(());
            }
            FileType::Symlink => return self.link(dir, listing, name, stat),
            FileType::Socket => "socket",
            FileType::Fifo => "fifo",
            FileType::CharacterDevice | FileType::BlockDevice => "device",
            FileType::Unknown => "file of an unknown type",
        };
        let path = join(listing.path, bytes);
        lock(&self.skipped).push(Skipped { path, what });
        Ok(())
    }

    fn link(
        &self,
        dir: &OwnedFd,
        listing: &mut Listing<'_>,
        name: &CStr,
        stat: FileStat,
    ) -> Result<(), SnapshotError> {
        let bytes = name.to_bytes();
        match rustix::fs::readlinkat(dir, name, Vec::new()) {
            Ok(target) => {
                let target = target.into_bytes().into();
                listing.links.push((bytes.into(), stat, target));
                Ok(())
            }
            Err(Errno::NOENT) => Ok(()),
            Err(Errno::INVAL) => Err(self.changing(listing.path, bytes)),
            Err(err) => Err(self.error("reading the link", &join(listing.path, bytes), err)),
        }
    }

    /// Reads a batch of the files of a directory.
    fn read_batch(
        &self,
        ix: usize,
        dir: &OwnedFd,
        range: Range<usize>,
    ) -> Result<(), SnapshotError> {
        let found = lock(&self.dirs).get(ix).and_then(|found| {
            let batch = found.files.get(range.clone())?;
            Some((Arc::clone(&found.path), batch.to_vec()))
        });
        let Some((path, batch)) = found else {
            return Ok(());
        };
        let mut taken = Vec::with_capacity(batch.len());
        for (name, stat, _) in &batch {
            taken.push(self.read_file(dir, &path, name, *stat)?);
        }
        let (mut read, mut changed) = (0, 0);
        let mut dirs = lock(&self.dirs);
        let files = dirs
            .get_mut(ix)
            .and_then(|found| found.files.get_mut(range));
        for (file, taken) in files.into_iter().flatten().zip(taken) {
            match taken {
                Some((stat, object)) => {
                    read += 1;
                    changed += u64::from(file.2 != object);
                    (file.1, file.2) = (stat, object);
                }
                None => file.0 = Box::default(),
            }
        }
        self.read.fetch_add(read, Ordering::Relaxed);
        self.changed.fetch_add(changed, Ordering::Relaxed);
        Ok(())
    }

    /// Reads a file until its stat is the same before and after. Nothing if the file was removed.
    fn read_file(
        &self,
        dir: &OwnedFd,
        path: &[u8],
        name: &[u8],
        mut before: FileStat,
    ) -> Result<Option<(FileStat, ObjectId)>, SnapshotError> {
        let full = || join(path, name);
        for _ in 0..MAX_ATTEMPTS {
            let open = match rustix::fs::openat(dir, name, OPEN_FILE, Mode::empty()) {
                Ok(fd) => File::from(fd),
                Err(Errno::NOENT) => return Ok(None),
                Err(Errno::LOOP) => return Err(self.changing(path, name)),
                Err(err) => return Err(self.error("opening", &full(), err)),
            };
            let added = self.ingest.add_file_of(&open, before.size);
            let added = added.map_err(|err| match err {
                StoreError::Input(source) => self.error("reading", &full(), source),
                source => SnapshotError::Store {
                    path: self.path(&full()),
                    source,
                },
            })?;
            self.fresh.fetch_or(added.new, Ordering::Relaxed);
            let after = rustix::fs::fstat(&open);
            let after = after.map_err(|err| self.error("looking at", &full(), err))?;
            let after = file_stat(&after);
            if after == before && added.size == before.size {
                return Ok(Some((after, added.object)));
            }
            if !file_type(after.mode).is_file() {
                return Err(self.changing(path, name));
            }
            before = after;
        }
        Err(self.changing(path, name))
    }

    /// Gathers the results of the tasks, or their first error.
    fn finish(self) -> Result<Taken, SnapshotError> {
        fn inner<T>(mutex: Mutex<T>) -> T {
            mutex.into_inner().unwrap_or_else(PoisonError::into_inner)
        }
        if let Some(err) = inner(self.error) {
            return Err(err);
        }
        let mut dirs = inner(self.dirs);
        dirs.par_iter_mut().for_each(|dir| {
            dir.files.retain(|(name, ..)| !name.is_empty());
            dir.files.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        });
        let mut skipped = inner(self.skipped);
        skipped.sort_unstable();
        Ok(Taken {
            dirs,
            read: self.read.into_inner(),
            fresh: self.fresh.into_inner(),
            changed: self.changed.into_inner(),
            removed: (self.cache.len() as u64).saturating_sub(self.known.into_inner()),
            skipped,
        })
    }
}
