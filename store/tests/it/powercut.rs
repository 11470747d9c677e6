//! The power is cut after every call. Bytes and names that were not synced are lost, kept, or
//! anything between; every promise that was made holds.
//!
//! A run is recorded: every change, every sync, and every promise. For every prefix of the record,
//! directories are made as a disk may show them after the cut. A file's bytes are certain once it
//! was synced; before, the file may be empty, truncated, or hold zeroes. A change of names is
//! certain once one of its directories was synced; before, any of them may be missing, whatever
//! came before or after it, but a rename is never half done.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::{self, Display};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

use blake3::Hash;
use iii_store::disk::Disk;

use crate::helpers::{LINKED, names, noise};
use crate::seam::{Call, Hook, Hooked, all_of};
use crate::workload::{Promised, Random, Work, Worker, check, project, scratch};

/// A file or a directory, whatever its names.
type Node = usize;

/// The recorded calls, by paths relative to the recorded directory.
#[derive(Debug, Clone)]
enum Op {
    Promise(Arc<Promised>),
    CreateDir(PathBuf),
    Create(PathBuf, Node),
    /// The file holds this now.
    Write(Node, Arc<[u8]>),
    Sync(Node),
    SyncDir(PathBuf),
    Rename(PathBuf, PathBuf),
    Remove(PathBuf),
    RemoveDir(PathBuf),
}

#[derive(Debug, Default)]
struct Trace {
    ops: Vec<Op>,
    /// By inode number: the youngest file that had it.
    files: HashMap<u64, Node>,
    nodes: usize,
    bytes: HashMap<Node, Vec<u8>>,
}

impl Trace {
    fn created(&mut self, path: PathBuf, ino: u64) {
        self.nodes += 1;
        self.files.insert(ino, self.nodes);
        self.bytes.insert(self.nodes, Vec::new());
        self.ops.push(Op::Create(path, self.nodes));
    }

    fn node(&self, file: &fs::File) -> Node {
        self.files[&file.metadata().unwrap().ino()]
    }

    fn wrote(&mut self, file: &fs::File, bytes: &[u8], offset: usize) {
        let node = self.node(file);
        let held = self.bytes.get_mut(&node).unwrap();
        held.resize(held.len().max(offset + bytes.len()), 0);
        held[offset..offset + bytes.len()].copy_from_slice(bytes);
        self.ops.push(Op::Write(node, held.as_slice().into()));
    }
}

/// Records the changes, one call at a time.
#[derive(Debug, Clone)]
struct Recorder {
    root: PathBuf,
    trace: Arc<Mutex<Trace>>,
    meanwhile: Arc<Mutex<Option<Meanwhile>>>,
}

/// Work of another process before the call that is the `at`th from now.
struct Meanwhile {
    at: usize,
    work: Box<dyn FnOnce() + Send>,
}

impl fmt::Debug for Meanwhile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at {}", self.at)
    }
}

impl Recorder {
    fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            trace: Arc::default(),
            meanwhile: Arc::default(),
        }
    }

    /// Records the existing files as synced.
    fn take_in(&self) {
        let mut trace = self.trace.lock().unwrap();
        let mut dirs = vec![self.root.clone()];
        while let Some(dir) = dirs.pop() {
            for name in names(&dir) {
                let path = dir.join(name);
                let meta = fs::symlink_metadata(&path).unwrap();
                let relative = self.relative(&path);
                if meta.is_dir() {
                    trace.ops.push(Op::CreateDir(relative));
                    dirs.push(path);
                } else {
                    trace.created(relative, meta.ino());
                    let file = fs::File::open(&path).unwrap();
                    trace.wrote(&file, &fs::read(&path).unwrap(), 0);
                    let node = trace.node(&file);
                    trace.ops.push(Op::Sync(node));
                }
            }
            trace.ops.push(Op::SyncDir(self.relative(&dir)));
        }
    }

    /// The work of the other process, if it is due.
    fn meanwhile(&self) -> Option<Meanwhile> {
        let mut meanwhile = self.meanwhile.lock().unwrap();
        let waiting = meanwhile.as_mut()?;
        if waiting.at > 0 {
            waiting.at -= 1;
            return None;
        }
        meanwhile.take()
    }

    fn relative(&self, path: &Path) -> PathBuf {
        path.strip_prefix(&self.root).unwrap().to_owned()
    }

    fn promise(&self, promised: &Promised) {
        let mut trace = self.trace.lock().unwrap();
        trace.ops.push(Op::Promise(Arc::new(promised.clone())));
    }

    fn ops(&self) -> Vec<Op> {
        self.trace.lock().unwrap().ops.clone()
    }
}

impl Hook for Recorder {
    fn around<T>(&self, call: Call<'_>, run: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        if !call.writes() {
            return run();
        }
        if let Some(meanwhile) = self.meanwhile() {
            (meanwhile.work)();
        }
        let mut trace = self.trace.lock().unwrap();
        let existed = match call {
            Call::OpenLock(path) | Call::CreateDir(path) => fs::symlink_metadata(path).is_ok(),
            _ => false,
        };
        let result = run()?;
        let op = match call {
            Call::CreateDir(path) if !existed => Op::CreateDir(self.relative(path)),
            Call::Create(path) | Call::OpenLock(path) if !existed => {
                trace.created(self.relative(path), fs::symlink_metadata(path)?.ino());
                return Ok(result);
            }
            Call::Write(file, bytes, offset) => {
                trace.wrote(file, bytes, offset as usize);
                return Ok(result);
            }
            Call::Reflink(from, to) => {
                trace.wrote(to, &all_of(from)?, 0);
                return Ok(result);
            }
            Call::Sync(file) => Op::Sync(trace.node(file)),
            Call::Rename(from, to) => Op::Rename(self.relative(from), self.relative(to)),
            // Directories above the recorded one exist.
            Call::SyncDir(path) if !path.starts_with(&self.root) => return Ok(result),
            Call::SyncDir(path) => Op::SyncDir(self.relative(path)),
            Call::Remove(path) => Op::Remove(self.relative(path)),
            Call::RemoveDir(path) => Op::RemoveDir(self.relative(path)),
            _ => return Ok(result),
        };
        trace.ops.push(op);
        Ok(result)
    }
}

/// The change of names by one call: all of it or nothing.
#[derive(Debug)]
struct Change {
    /// The name of this directory that no longer is that of this node.
    gone: Option<(Node, PathBuf, Node)>,
    /// The name that is from now on.
    new: Option<(Node, PathBuf, Node)>,
    sure: bool,
}

#[derive(Debug, Clone, Default)]
struct Bytes {
    synced: Arc<[u8]>,
    now: Arc<[u8]>,
}

/// The root directory.
const ROOT: Node = 0;
/// Directories are numbered from here.
const DIRS: Node = 1 << 32;

/// A disk that remembers which bytes and names were synced.
#[derive(Debug, Default)]
struct Media {
    changes: Vec<Change>,
    /// The names as running programs see them.
    names: HashMap<(Node, PathBuf), Node>,
    files: HashMap<Node, Bytes>,
    dirs: usize,
}

/// The fate of the bytes that were not synced.
#[derive(Debug, Clone, Copy)]
enum Fate {
    Lost,
    Kept,
    Zeroes,
    Noise,
    Cut,
}

const FATES: [Fate; 5] = [Fate::Lost, Fate::Kept, Fate::Zeroes, Fate::Noise, Fate::Cut];

impl Media {
    fn dir(&self, path: &Path) -> Node {
        let mut at = ROOT;
        for name in path {
            at = self.names[&(at, name.into())];
        }
        at
    }

    fn place(&self, path: &Path) -> (Node, PathBuf) {
        let dir = self.dir(path.parent().unwrap());
        (dir, path.file_name().unwrap().into())
    }

    fn change(&mut self, gone: Option<&Path>, new: Option<(&Path, Node)>) {
        let gone = gone.map(|path| {
            let place = self.place(path);
            let node = self.names.remove(&place).unwrap();
            (place.0, place.1, node)
        });
        let new = new.map(|(path, node)| {
            let place = self.place(path);
            self.names.insert(place.clone(), node);
            (place.0, place.1, node)
        });
        let sure = false;
        self.changes.push(Change { gone, new, sure });
    }

    fn apply(&mut self, op: &Op) {
        match op {
            Op::Promise(_) => {}
            Op::CreateDir(path) => {
                self.dirs += 1;
                self.change(None, Some((path, DIRS + self.dirs)));
            }
            Op::Create(path, node) => {
                self.files.insert(*node, Bytes::default());
                self.change(None, Some((path, *node)));
            }
            Op::Write(node, bytes) => self.files.get_mut(node).unwrap().now = Arc::clone(bytes),
            Op::Sync(node) => {
                let bytes = self.files.get_mut(node).unwrap();
                bytes.synced = Arc::clone(&bytes.now);
            }
            Op::SyncDir(path) => {
                let dir = self.dir(path);
                for change in &mut self.changes {
                    let places = change.gone.iter().chain(&change.new);
                    change.sure |= places.clone().any(|(at, _, _)| *at == dir);
                }
            }
            Op::Rename(from, to) => {
                let node = self.names[&self.place(from)];
                self.change(Some(from), Some((to, node)));
            }
            Op::Remove(path) | Op::RemoveDir(path) => self.change(Some(path), None),
        }
    }

    /// A possible state after a cut now: `keeps` decides on each name, `fate` on the bytes.
    fn image(
        &self,
        mut keeps: impl FnMut() -> bool,
        mut fate: impl FnMut() -> (Fate, u64),
    ) -> Image {
        let mut names: BTreeMap<(Node, &Path), Node> = BTreeMap::new();
        for change in &self.changes {
            if !change.sure && !keeps() {
                continue;
            }
            if let Some((dir, name, node)) = &change.gone
                && names.get(&(*dir, name)) == Some(node)
            {
                names.remove(&(*dir, name.as_path()));
            }
            if let Some((dir, name, node)) = &change.new {
                names.insert((*dir, name), *node);
            }
        }
        let mut image = Image::default();
        let mut dirs = vec![(ROOT, PathBuf::new())];
        while let Some((dir, path)) = dirs.pop() {
            for ((_, name), node) in names.range((dir, Path::new(""))..(dir + 1, Path::new(""))) {
                let path = path.join(name);
                if *node >= DIRS {
                    image.dirs.push(path.clone());
                    dirs.push((*node, path));
                } else {
                    let bytes = &self.files[node];
                    let bytes = if bytes.synced == bytes.now {
                        Arc::clone(&bytes.now)
                    } else {
                        let (fate, random) = fate();
                        spoil(bytes, fate, random)
                    };
                    image.files.push((path, bytes));
                }
            }
        }
        image
    }
}

fn spoil(bytes: &Bytes, fate: Fate, random: u64) -> Arc<[u8]> {
    let (synced, now) = (&bytes.synced, &bytes.now);
    let kept = synced.len().min(now.len());
    let filled = |rest: Vec<u8>| [&synced[..kept], &rest].concat().into();
    match fate {
        Fate::Lost => Arc::clone(synced),
        Fate::Kept => Arc::clone(now),
        Fate::Zeroes => filled(vec![0; now.len() - kept]),
        Fate::Noise => filled(noise(now.len() - kept, random)),
        Fate::Cut => now[..kept + random as usize % (now.len() - kept + 1)].into(),
    }
}

/// A directory after the cut. A directory stands before its entries.
#[derive(Debug, Default)]
struct Image {
    dirs: Vec<PathBuf>,
    files: Vec<(PathBuf, Arc<[u8]>)>,
}

/// Makes images.
struct Maker {
    dir: tempfile::TempDir,
    made: HashMap<Hash, PathBuf>,
    hashes: HashMap<*const u8, (Arc<[u8]>, Hash)>,
    seen: HashSet<Hash>,
}

impl Maker {
    fn new() -> Self {
        Self {
            dir: scratch(),
            made: HashMap::new(),
            hashes: HashMap::new(),
            seen: HashSet::new(),
        }
    }

    fn hash(&mut self, bytes: &Arc<[u8]>) -> Hash {
        let entry = self.hashes.entry(bytes.as_ptr());
        let (_, hash) = entry.or_insert_with(|| (Arc::clone(bytes), blake3::hash(bytes)));
        *hash
    }

    /// Makes the image, unless it was made before for the same promises.
    fn make(&mut self, image: &Image, promised: &Promised) -> Option<tempfile::TempDir> {
        let hashes: Vec<Hash> = image
            .files
            .iter()
            .map(|(_, bytes)| self.hash(bytes))
            .collect();
        let paths: Vec<_> = image.files.iter().map(|(path, _)| path).collect();
        let all = format!("{promised:?} {:?} {paths:?} {hashes:?}", image.dirs);
        if !self.seen.insert(blake3::hash(all.as_bytes())) {
            return None;
        }
        let made = tempfile::tempdir_in(self.dir.path()).unwrap();
        for path in &image.dirs {
            fs::create_dir(made.path().join(path)).unwrap();
        }
        for ((path, bytes), hash) in image.files.iter().zip(hashes) {
            let to = made.path().join(path);
            if bytes.len() as u64 <= LINKED {
                fs::write(&to, bytes).unwrap();
                continue;
            }
            let from = self.made.entry(hash).or_insert_with(|| {
                let path = self.dir.path().join(hash.to_string());
                fs::write(&path, bytes).unwrap();
                path
            });
            fs::hard_link(from, to).unwrap();
        }
        Some(made)
    }
}

/// Describes where the power was cut.
struct Cut<'a> {
    ops: &'a [Op],
    variant: &'a dyn Display,
}

impl Display for Cut<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (at, variant) = (self.ops.len(), self.variant);
        write!(f, "cut after call {at}, {variant}. The last calls:")?;
        for op in &self.ops[at.saturating_sub(12)..] {
            match op {
                Op::Promise(_) => write!(f, "\n  (promise)")?,
                Op::Write(node, bytes) => write!(f, "\n  Write({node}, {} bytes)", bytes.len())?,
                op => write!(f, "\n  {op:?}")?,
            }
        }
        Ok(())
    }
}

/// Cuts the power after the call number `from` of a recorded run, and after every one that follows,
/// and runs `check` on the states that may result: the extremes and `random` others. Returns the
/// number of images.
fn cut(ops: &[Op], from: usize, random: u64, seed: u64, check: &dyn Fn(&Path, &Promised)) -> usize {
    let mut media = Media::default();
    let mut maker = Maker::new();
    let mut promised = Arc::new(Promised::default());
    let mut images = 0;
    let mut dice = Random::new(seed);
    for (number, op) in ops.iter().enumerate() {
        media.apply(op);
        if let Op::Promise(now) = op {
            promised = Arc::clone(now);
        }
        if number < from {
            continue;
        }
        let mut look = |image: Image, variant: &dyn Display| {
            if let Some(dir) = maker.make(&image, &promised) {
                images += 1;
                let looked = AssertUnwindSafe(|| check(dir.path(), &promised));
                if let Err(panic) = catch_unwind(looked) {
                    let ops = &ops[..=number];
                    eprintln!("{}", Cut { ops, variant });
                    resume_unwind(panic);
                }
            }
        };
        for (names, fate) in [
            (true, Fate::Kept),
            (false, Fate::Lost),
            (true, Fate::Lost),
            (true, Fate::Zeroes),
            (false, Fate::Kept),
        ] {
            let image = media.image(|| names, || (fate, 0));
            look(image, &format!("names kept: {names}, bytes: {fate:?}"));
        }
        for _ in 0..random {
            let start = dice.next();
            let (mut names, mut fates) = (Random::new(start), Random::new(!start));
            // From nearly none to nearly all.
            let share = names.next() % 256;
            let image = media.image(
                || names.next() % 256 <= share,
                || {
                    let random = fates.next();
                    (FATES[random as usize % FATES.len()], random >> 8)
                },
            );
            look(image, &format!("seed {seed}, {start}"));
        }
    }
    images
}

fn cut_all_of(work: Work, random: u64, seed: u64) {
    let (root, project) = (scratch(), project());
    let dir = root.path().join("home/store");
    let before = work.prepare(&dir).unwrap();
    let recorder = Recorder::new(root.path());
    recorder.take_in();
    let disk: Arc<dyn Disk> = Arc::new(Hooked(recorder.clone()));
    let from = recorder.ops().len();
    let tell = |promised: &Promised| recorder.promise(promised);
    work.run(&dir, project.path(), &disk, &before, &tell)
        .unwrap();
    let ops = recorder.ops();
    let calls = ops.len() - from;
    assert!(calls > 40, "{calls} calls are fewer than there are");
    let images = cut(&ops, from, random, seed, &|dir, promised| {
        check(work, &dir.join("home/store"), project.path(), promised);
    });
    eprintln!("{calls} calls, {images} images");
}

#[test]
fn the_power_is_cut_while_a_store_is_filled() {
    cut_all_of(Work::Store, 1, 1);
}

#[test]
fn the_power_is_cut_while_garbage_is_collected() {
    cut_all_of(Work::Collect, 1, 1);
}

#[test]
fn the_power_is_cut_while_a_store_is_repaired() {
    cut_all_of(Work::Repair, 1, 1);
}

#[test]
fn the_power_is_cut_while_a_store_is_migrated() {
    cut_all_of(Work::Migrate, 1, 1);
}

/// With a new seed each time; a failure prints it.
#[test]
#[ignore = "takes minutes"]
fn the_power_is_cut_in_many_ways() {
    let now = std::time::SystemTime::now();
    let seed = now.duration_since(std::time::UNIX_EPOCH).unwrap();
    for work in Work::ALL {
        cut_all_of(work, 100, seed.as_millis() as u64);
    }
}

/// Another process stores the same layer, and names it, while the first one is at any point of its
/// work. The power is cut when the second is done: the first one must not be the only one to sync
/// the shared objects.
#[test]
fn the_power_is_cut_while_another_has_not_synced_what_was_reused() {
    let project = project();
    for at in 0.. {
        let root = scratch();
        let recorder = Recorder::new(root.path());
        let disk = Arc::new(Hooked(recorder.clone()));
        let mut first = Worker::open(root.path(), disk.clone(), &|_| ()).unwrap();
        let (other, dir) = (recorder.clone(), root.path().to_owned());
        let cut_at = Arc::new(OnceLock::new());
        let done = Arc::clone(&cut_at);
        let work = Box::new(move || {
            let tell = |promised: &Promised| other.promise(promised);
            let mut worker = Worker::open(&dir, disk, &tell).unwrap();
            // Under the same name, both would wait for each other.
            worker.store_all_as("other").unwrap();
            done.set(other.ops()).unwrap();
        });
        *recorder.meanwhile.lock().unwrap() = Some(Meanwhile { at, work });
        first.store_all().unwrap();
        let Some(ops) = cut_at.get() else {
            assert!(at > 20, "{at} calls are fewer than there are");
            break;
        };
        cut(ops, ops.len() - 1, 2, at as u64, &|dir, promised| {
            check(Work::Store, dir, project.path(), promised);
        });
    }
}
