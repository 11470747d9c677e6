//! Snapshots: a project directory as a layer.
//!
//! Modes and mtimes of the project are kept; owners are what the caller says; xattrs are not taken (they are the
//! host's: labels, quarantine marks), and names that are hardlinks of one file become files of their own. Symlinks are
//! kept and never followed. Sockets, fifos and devices are left out and reported. Mount points are crossed as they are.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rayon::Scope;
use rayon::prelude::*;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, Stat};
use rustix::io::Errno;

use crate::error::StoreError;
use crate::id::ObjectId;
use crate::ingest::{Ingest, Published};
use crate::layer::Layer;
use crate::lease::Lease;
use crate::objects::lock;
use crate::refs::escape;
use crate::stat_cache::{
    self, CachedDir, DirEntries, FileEntry, FileStat, Outcome, StatCache, Time,
};
use crate::store::{Store, write_cache};
use crate::tree::{
    Content, Dir, DirKind, Leaf, MAX_DEPTH, MAX_NODES, Meta, Mtime, Node, Tree, TreeError,
};

/// How often a file that changes while it is read is read again.
const MAX_ATTEMPTS: u32 = 8;
/// Most files, and most bytes, that one task reads.
const BATCH_FILES: usize = 64;
const BATCH_BYTES: u64 = 1 << 20;
/// Buffer for the entries of a directory.
const LISTING: usize = 32 << 10;

/// Why a directory could not become a layer.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// A file or directory of the project cannot be read.
    #[error("{op} {} failed", path.display())]
    Read {
        /// What was being done: a verb such as "reading".
        op: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file or directory that never stood still.
    #[error("{} changes all the time while it is read; stop what writes to it, or try again", .0.display())]
    Changing(PathBuf),
    /// The project is too deep or too large.
    #[error("{} cannot be taken in", path.display())]
    Tree {
        /// Where.
        path: PathBuf,
        /// The cause.
        source: TreeError,
    },
    /// The store failed.
    #[error("storing {} failed", path.display())]
    Store {
        /// What was being stored.
        path: PathBuf,
        /// The cause.
        source: StoreError,
    },
}

/// How a directory becomes a layer.
#[derive(Debug, Clone, Copy)]
pub struct Options<'a> {
    /// Names the stat cache: one name per project directory.
    pub name: &'a str,
    /// Where the directory stands in the layer, `workspace` say. The directories on the way to it are implicit.
    pub at: &'a [u8],
    /// Names that are left out at any depth, whatever their type.
    pub excludes: &'a [&'a [u8]],
    /// Owner of everything.
    pub uid: u32,
    /// Group of everything.
    pub gid: u32,
}

/// Something that has no place in a layer.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Skipped {
    /// Relative to the project.
    pub path: Vec<u8>,
    /// What it is.
    pub what: &'static str,
}

/// A directory that became a layer.
#[derive(Debug)]
pub struct Snapshot {
    /// What was stored.
    pub published: Published,
    /// The layer.
    pub layer: Arc<Layer>,
    /// Regular files in it.
    pub files: u64,
    /// Files whose contents were read.
    pub read: u64,
    /// Files that are new or have other contents than at the last snapshot.
    pub changed: u64,
    /// Files that were there at the last snapshot and are not any more.
    pub removed: u64,
    /// What was left out because of its type, sorted.
    pub skipped: Vec<Skipped>,
}

/// Takes in `dir`, reading only what changed since the last snapshot of this name. The layer is in the store, and pinned
/// in `lease`, when this returns. A file that cannot be read is an error that names it.
pub fn snapshot(
    store: &Store,
    lease: &Lease,
    dir: &Path,
    options: &Options<'_>,
) -> Result<Snapshot, SnapshotError> {
    let cache = store.disk().open(&cache_path(store, options));
    let cache = cache.map_or_else(|_| StatCache::default(), |file| StatCache::open(&file));
    match attempt(store, lease, dir, options, &cache) {
        // The cache names contents that the store has not any more: everything is read.
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
    // Before anything is looked at: the racy rule counts from here.
    let stamp = now();
    let walk = Walk {
        root: dir,
        options,
        ingest: &ingest,
        cache,
        dirs: Mutex::new(vec![Found::default()]),
        files: Mutex::default(),
        nodes: AtomicUsize::new(1),
        read: AtomicU64::new(0),
        fresh: AtomicBool::new(false),
        known: AtomicU64::new(0),
        changed: AtomicU64::new(0),
        skipped: Mutex::default(),
        failed: AtomicBool::new(false),
        error: Mutex::default(),
    };
    let root = walk.open_root()?;
    rayon::in_place_scope(|scope| walk.run(|| walk.visit(scope, 0, root, Vec::new(), 0)));
    let taken = walk.finish()?;

    let fingerprint = fingerprint(&taken.dirs, options);
    // Something that the store lacked is not in a layer that it has, whatever the cache says.
    let same = cache
        .outcome()
        .filter(|last| last.fingerprint == fingerprint && !taken.fresh);
    if let Some(last) = same {
        // First the pin, then the question. A layer that does not hold is made anew.
        lease.pin(&[last.layer_id]).map_err(stored)?;
        if let Ok(layer) = store.layer(&last.layer_id) {
            store.sync_layers().map_err(stored)?;
            // What was read because it was young need not be read again.
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

    let tree = tree(&taken.dirs, dir, options)?;
    let published = ingest.finish(&tree).map_err(stored)?;
    let outcome = Outcome {
        fingerprint,
        layer_id: published.layer_id,
        tree_id: published.tree_id,
    };
    // Freeing tens of thousands of nodes is not what anybody waits for.
    rayon::spawn(move || drop(tree));
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
    match stat_cache::encode(stamp, outcome, &entries(&taken.dirs)) {
        Some(bytes) => write_cache(lease, &cache_path(store, options), &bytes),
        None => Ok(()),
    }
}

/// A hash of all that goes into the layer.
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

/// Puts the directories together.
fn tree(dirs: &[Found], root: &Path, options: &Options<'_>) -> Result<Tree, SnapshotError> {
    let meta = |stat: &FileStat| Meta {
        mode: (stat.mode & 0o7777) as u16,
        uid: options.uid,
        gid: options.gid,
        mtime: Mtime {
            sec: stat.mtime.sec,
            nsec: stat.mtime.nsec,
        },
        xattrs: BTreeMap::new(),
    };
    let mut children: Vec<Vec<(Box<[u8]>, Node)>> = Vec::new();
    children.resize_with(dirs.len(), Vec::new);
    let mut project = Dir::default();
    // Children stand after their parents: going backwards, every directory is whole when it is moved.
    for found in dirs.iter().rev() {
        let mut nodes = children.pop().unwrap_or_default();
        let Some(stat) = &found.stat else { continue };
        nodes.extend(found.links.iter().map(|(name, stat, target)| {
            let leaf = Leaf {
                meta: meta(stat),
                content: Content::Symlink {
                    target: target.clone(),
                },
                link: None,
            };
            (name.clone(), Node::Leaf(leaf))
        }));
        nodes.extend(found.files.iter().map(|(name, stat, object)| {
            let leaf = Leaf {
                meta: meta(stat),
                content: Content::File {
                    object: *object,
                    size: stat.size,
                },
                link: None,
            };
            (name.clone(), Node::Leaf(leaf))
        }));
        let dir = Dir {
            meta: meta(stat),
            kind: DirKind::Merged,
            entries: nodes.into_iter().collect(),
        };
        match children.get_mut(found.parent) {
            Some(siblings) => siblings.push((found.name.clone(), Node::Dir(dir))),
            None => project = dir,
        }
    }
    let mut tree = Tree::implicit();
    let at = tree
        .dir_at(options.at)
        .map_err(|source| SnapshotError::Tree {
            path: root.to_owned(),
            source,
        })?;
    *at = project;
    Ok(tree)
}

/// What the next stat cache says.
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

/// The clock that the kernel stamps files with.
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
        dev: stat.st_dev,
        size: stat.st_size as u64,
        mode: stat.st_mode,
    }
}

/// A directory that was found.
#[derive(Debug, Default)]
struct Found {
    parent: usize,
    name: Box<[u8]>,
    path: Vec<u8>,
    /// Nothing if it went before it could be opened.
    stat: Option<FileStat>,
    /// Sorted by name.
    links: Vec<LinkEntry>,
    /// Sorted by name once all of them were read.
    files: Vec<FileEntry>,
}

/// A symlink: name, stat, target.
type LinkEntry = (Box<[u8]>, FileStat, Box<[u8]>);

impl Found {
    /// A hash of all of it that goes into the layer.
    fn fingerprint(&self) -> [u8; 32] {
        let mut bytes = Vec::new();
        let mut put = |name: &[u8], stat: &FileStat, content: &[u8]| {
            bytes.extend((name.len() as u32).to_le_bytes());
            bytes.extend(name);
            bytes.extend(stat.mode.to_le_bytes());
            bytes.extend(stat.mtime.sec.to_le_bytes());
            bytes.extend(stat.mtime.nsec.to_le_bytes());
            bytes.extend(stat.size.to_le_bytes());
            bytes.extend((content.len() as u32).to_le_bytes());
            bytes.extend(content);
        };
        if let Some(stat) = &self.stat {
            // The length of a directory is the filesystem's own affair.
            put(&self.path, &FileStat { size: 0, ..*stat }, b"");
        }
        for (name, stat, target) in &self.links {
            put(name, stat, target);
        }
        for (name, stat, object) in &self.files {
            put(name, stat, object.as_bytes());
        }
        *blake3::hash(&bytes).as_bytes()
    }
}

/// A file that has to be read.
struct Stale {
    name: CString,
    stat: FileStat,
    /// What it held at the last snapshot.
    held: Option<ObjectId>,
}

/// What is in one directory.
struct Listing<'a> {
    path: &'a [u8],
    cached: CachedDir<'a>,
    links: Vec<LinkEntry>,
    files: Vec<FileEntry>,
    dirs: Vec<CString>,
    stale: Vec<Stale>,
}

struct Walk<'a> {
    root: &'a Path,
    options: &'a Options<'a>,
    ingest: &'a Ingest<'a>,
    cache: &'a StatCache,
    /// A directory always stands after the one it is in.
    dirs: Mutex<Vec<Found>>,
    /// Files that were read, each with the index of its directory.
    files: Mutex<Vec<(usize, FileEntry)>>,
    nodes: AtomicUsize,
    read: AtomicU64,
    /// Whether anything was read that the store did not have.
    fresh: AtomicBool,
    /// Files that the cache knows, whether or not they changed.
    known: AtomicU64,
    changed: AtomicU64,
    skipped: Mutex<Vec<Skipped>>,
    failed: AtomicBool,
    error: Mutex<Option<SnapshotError>>,
}

/// What the walk found.
struct Taken {
    /// A directory always stands after the one it is in.
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
/// Opening a fifo that took a file's place must not block.
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

/// Splits what has to be read into what one task reads.
fn batches(stale: Vec<Stale>) -> Vec<Vec<Stale>> {
    let mut batches: Vec<Vec<Stale>> = Vec::new();
    let mut bytes = 0_u64;
    for file in stale {
        bytes = bytes.saturating_add(file.stat.size);
        match batches.last_mut() {
            Some(batch) if batch.len() < BATCH_FILES && bytes <= BATCH_BYTES => batch.push(file),
            _ => {
                bytes = file.stat.size;
                batches.push(vec![file]);
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

    /// Runs a task, unless one failed. The first error is the one that is reported.
    fn run(&self, task: impl FnOnce() -> Result<(), SnapshotError>) {
        if self.failed.load(Ordering::Relaxed) {
            return;
        }
        if let Err(err) = task() {
            self.failed.store(true, Ordering::Relaxed);
            lock(&self.error).get_or_insert(err);
        }
    }

    /// Takes in an open directory and spawns a task for each in it.
    fn visit<'s>(
        &'s self,
        scope: &Scope<'s>,
        ix: usize,
        fd: OwnedFd,
        path: Vec<u8>,
        depth: usize,
    ) -> Result<(), SnapshotError> {
        let stat = rustix::fs::fstat(&fd).map_err(|err| self.error("looking at", &path, err))?;
        let stat = file_stat(&stat);
        let mut listing = Listing {
            path: &path,
            cached: self.cache.dir(&path),
            links: Vec::new(),
            files: Vec::new(),
            dirs: Vec::new(),
            stale: Vec::new(),
        };
        self.list(&fd, &mut listing)?;
        let Listing {
            mut links,
            files,
            dirs,
            stale,
            ..
        } = listing;
        links.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        let nodes = links.len() + files.len() + dirs.len() + stale.len();
        if depth >= MAX_DEPTH && nodes != 0 {
            let (path, source) = (self.path(&path), TreeError::Depth);
            return Err(SnapshotError::Tree { path, source });
        }
        if self.nodes.fetch_add(nodes, Ordering::Relaxed) + nodes > MAX_NODES {
            let (path, source) = (self.root.to_owned(), TreeError::TooLarge);
            return Err(SnapshotError::Tree { path, source });
        }

        let first = {
            let mut all = lock(&self.dirs);
            let first = all.len();
            all.extend(dirs.iter().map(|name| Found {
                parent: ix,
                name: name.to_bytes().into(),
                ..Found::default()
            }));
            if let Some(found) = all.get_mut(ix) {
                found.stat = Some(stat);
                found.links = links;
                found.files = files;
                found.path.clone_from(&path);
            }
            first
        };
        // Shared by the tasks that open what is in it.
        let fd = Arc::new(fd);
        let path = Arc::new(path);
        for (number, name) in dirs.into_iter().enumerate() {
            let (fd, path) = (Arc::clone(&fd), Arc::clone(&path));
            scope.spawn(move |scope| {
                self.run(|| self.descend(scope, first + number, fd, &path, &name, depth + 1));
            });
        }
        // After the directories: a thread takes what was spawned last first, so few directories stay open.
        for batch in batches(stale) {
            let (fd, path) = (Arc::clone(&fd), Arc::clone(&path));
            scope.spawn(move |_| self.run(|| self.read_batch(ix, &fd, &path, batch)));
        }
        Ok(())
    }

    fn descend<'s>(
        &'s self,
        scope: &Scope<'s>,
        ix: usize,
        parent: Arc<OwnedFd>,
        path: &[u8],
        name: &CStr,
        depth: usize,
    ) -> Result<(), SnapshotError> {
        let flags = OPEN_DIR | OFlags::NOFOLLOW;
        let fd = match rustix::fs::openat(&parent, name, flags, Mode::empty()) {
            Ok(fd) => fd,
            // It is gone: then it is not in the layer.
            Err(Errno::NOENT) => return Ok(()),
            Err(Errno::NOTDIR | Errno::LOOP) => {
                return Err(self.changing(path, name.to_bytes()));
            }
            Err(err) => {
                let path = join(path, name.to_bytes());
                return Err(self.error("opening the directory", &path, err));
            }
        };
        // Not held open while its children are visited.
        drop(parent);
        self.visit(scope, ix, fd, join(path, name.to_bytes()), depth)
    }

    fn list(&self, dir: &OwnedFd, listing: &mut Listing<'_>) -> Result<(), SnapshotError> {
        let path = listing.path;
        let mut buffer = Vec::with_capacity(LISTING);
        let mut entries = RawDir::new(dir, buffer.spare_capacity_mut());
        while let Some(entry) = entries.next() {
            let entry = entry.map_err(|err| self.error("listing", path, err))?;
            let name = entry.file_name();
            let bytes = name.to_bytes();
            if bytes == b"." || bytes == b".." || self.options.excludes.contains(&bytes) {
                continue;
            }
            if entry.file_type() == FileType::Directory {
                listing.dirs.push(name.to_owned());
                continue;
            }
            match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => self.entry(dir, listing, name, file_stat(&stat))?,
                // Deleted since.
                Err(Errno::NOENT) => {}
                Err(err) => return Err(self.error("looking at", &join(path, bytes), err)),
            }
        }
        Ok(())
    }

    fn entry(
        &self,
        dir: &OwnedFd,
        listing: &mut Listing<'_>,
        name: &CStr,
        stat: FileStat,
    ) -> Result<(), SnapshotError> {
        let bytes = name.to_bytes();
        let what = match FileType::from_raw_mode(stat.mode) {
            FileType::Directory => {
                listing.dirs.push(name.to_owned());
                return Ok(());
            }
            FileType::RegularFile => {
                let known = listing.cached.get(bytes, &stat);
                if known.is_some() {
                    self.known.fetch_add(1, Ordering::Relaxed);
                }
                match known {
                    Some((object, true)) => listing.files.push((bytes.into(), stat, object)),
                    _ => listing.stale.push(Stale {
                        name: name.to_owned(),
                        stat,
                        held: known.map(|(object, _)| object),
                    }),
                }
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

    fn read_batch(
        &self,
        ix: usize,
        dir: &OwnedFd,
        path: &[u8],
        batch: Vec<Stale>,
    ) -> Result<(), SnapshotError> {
        let mut read = Vec::with_capacity(batch.len());
        let mut changed = 0;
        for file in batch {
            if let Some((stat, object)) = self.read_file(dir, path, &file)? {
                changed += u64::from(file.held != Some(object));
                read.push((ix, (file.name.to_bytes().into(), stat, object)));
            }
        }
        self.read.fetch_add(read.len() as u64, Ordering::Relaxed);
        self.changed.fetch_add(changed, Ordering::Relaxed);
        lock(&self.files).extend(read);
        Ok(())
    }

    /// Reads a file until it looks the same after as before. Nothing if it is gone.
    fn read_file(
        &self,
        dir: &OwnedFd,
        path: &[u8],
        file: &Stale,
    ) -> Result<Option<(FileStat, ObjectId)>, SnapshotError> {
        let name = file.name.to_bytes();
        let full = || join(path, name);
        let mut before = file.stat;
        for _ in 0..MAX_ATTEMPTS {
            let open = match rustix::fs::openat(dir, &file.name, OPEN_FILE, Mode::empty()) {
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
            if !FileType::from_raw_mode(after.mode).is_file() {
                return Err(self.changing(path, name));
            }
            before = after;
        }
        Err(self.changing(path, name))
    }

    /// Gathers what the tasks found.
    fn finish(self) -> Result<Taken, SnapshotError> {
        fn inner<T>(mutex: Mutex<T>) -> T {
            mutex.into_inner().unwrap_or_else(PoisonError::into_inner)
        }
        if let Some(err) = inner(self.error) {
            return Err(err);
        }
        let mut dirs = inner(self.dirs);
        for (ix, file) in inner(self.files) {
            if let Some(dir) = dirs.get_mut(ix) {
                dir.files.push(file);
            }
        }
        dirs.par_iter_mut()
            .for_each(|dir| dir.files.sort_unstable_by(|a, b| a.0.cmp(&b.0)));
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
