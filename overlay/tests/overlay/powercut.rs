//! Cuts the power after every call that an upper makes to the host's filesystem. Data that was not
//! synced is lost, kept, or anything between; the promises of ext4's default options hold.
//!
//! A run records every change of the host's files, every sync, and the contents of a model of the
//! filesystem after each operation. For every prefix of the run, the test makes directories as a
//! disk may show them after the cut. The bytes of a file are sure once it was synced; before, any
//! of the writes may be missing. A change of names is sure once its directory was synced; before,
//! any change may be missing, independent of the changes around it, but a rename is never half
//! done.
//!
//! The host then has another boot id. The promises:
//!
//! - The names are those of one moment, not before the last `fsync` or `sync` that returned.
//! - A file that was synced has at least the contents of that moment.
//! - A file that replaced another, by a rename, or because it was emptied and written again, or
//!   copied from a lower layer, has the contents of that moment or later ones.
//! - Any other new file has a part of the data that was written to it.
//! - `stat` and `read` agree: [`view`] checks it.
//!
//! With the same boot id, only the process has died, and nothing is lost.
//!
//! `III_LONG=1 cargo test -p iii-overlay powercut` does so a hundred times, in minutes.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use iii_overlay::fs::{Caller, Filesystem as _, Kind, Rename, SetAttr, Special};
use iii_overlay::ino::ROOT;
use iii_overlay::upper::disk::{Access, Boot, Disk, HostDisk};
use iii_overlay::{Overlay, OverlayOptions};
use iii_store::Layer;

use crate::support::{Home, put, view};

/// A file of the host, independent of its names.
type Node = usize;

#[derive(Debug, Clone)]
enum Event {
    CreateDir(PathBuf),
    Create(PathBuf, Node),
    /// The file has these bytes from this offset on.
    Write(Node, u64, Arc<[u8]>),
    SetLen(Node, u64),
    Sync(Node),
    SyncDir(PathBuf),
    SyncAll,
    Rename(PathBuf, PathBuf),
    Remove(PathBuf),
    /// The previous operation has returned, and the model has this many moments.
    Returned(usize),
    /// A syncing operation has returned: everything up to that moment is durable, and so are these
    /// files.
    Promised(usize, Vec<usize>),
}

#[derive(Debug, Default)]
struct Trace {
    events: Vec<Event>,
    /// The youngest file of each inode number.
    nodes: HashMap<u64, Node>,
    count: usize,
    /// The known contents of flat files, by path.
    flats: BTreeMap<PathBuf, (Node, Vec<u8>)>,
}

/// Records calls, one at a time, and syncs nothing.
#[derive(Debug)]
struct Recorder {
    root: PathBuf,
    trace: Mutex<Trace>,
}

impl Trace {
    fn node(&self, file: &File) -> Node {
        self.nodes[&file.metadata().unwrap().ino()]
    }

    /// Records the data that programs wrote to flat files since the last call.
    fn look(&mut self, root: &Path) {
        for (path, (node, held)) in &mut self.flats {
            let Ok(bytes) = fs::read(root.join(path)) else {
                continue;
            };
            if bytes == *held {
                continue;
            }
            if bytes.len() < held.len() {
                self.events.push(Event::SetLen(*node, bytes.len() as u64));
            }
            let same = bytes.iter().zip(&*held).take_while(|(a, b)| a == b).count();
            let rest = bytes[same..].into();
            self.events.push(Event::Write(*node, same as u64, rest));
            *held = bytes;
        }
    }
}

impl Recorder {
    fn record(&self, event: impl FnOnce(&mut Trace) -> Option<Event>) {
        let mut trace = self.trace.lock().unwrap();
        trace.look(&self.root);
        let event = event(&mut trace);
        trace.events.extend(event);
    }

    fn relative(&self, path: &Path) -> PathBuf {
        path.strip_prefix(&self.root)
            .unwrap_or(Path::new(""))
            .into()
    }
}

impl Disk for Recorder {
    fn create_dirs(&self, path: &Path) -> io::Result<()> {
        if !path.is_dir() {
            self.record(|_| Some(Event::CreateDir(self.relative(path))));
        }
        HostDisk.create_dirs(path)
    }

    fn open(&self, path: &Path, access: Access) -> io::Result<File> {
        let is_new = !path.exists();
        let file = HostDisk.open(path, access)?;
        let ino = file.metadata()?.ino();
        self.record(|trace| {
            if !is_new {
                let len = Event::SetLen(trace.node(&file), 0);
                return (access == Access::Empty).then_some(len);
            }
            trace.count += 1;
            let node = trace.count;
            trace.nodes.insert(ino, node);
            let path = self.relative(path);
            if path.components().count() == 3 {
                trace.flats.insert(path.clone(), (node, Vec::new()));
            }
            Some(Event::Create(path, node))
        });
        Ok(file)
    }

    fn write_at(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.record(|trace| Some(Event::Write(trace.node(file), offset, bytes.into())));
        HostDisk.write_at(file, bytes, offset)
    }

    fn set_len(&self, file: &File, len: u64) -> io::Result<()> {
        self.record(|trace| Some(Event::SetLen(trace.node(file), len)));
        HostDisk.set_len(file, len)
    }

    fn allocate(&self, _: &File, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self, file: &File, _: bool) -> io::Result<()> {
        self.record(|trace| Some(Event::Sync(trace.node(file))));
        Ok(())
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.record(|_| Some(Event::SyncDir(self.relative(path))));
        Ok(())
    }

    fn sync_filesystem(&self, _: &Path) -> io::Result<()> {
        self.record(|_| Some(Event::SyncAll));
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.record(|_| Some(Event::Rename(self.relative(from), self.relative(to))));
        HostDisk.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        HostDisk.remove(path)?;
        self.record(|trace| {
            let path = self.relative(path);
            trace.flats.remove(&path);
            Some(Event::Remove(path))
        });
        Ok(())
    }

    fn boot(&self) -> Option<Boot> {
        Some(BOOT)
    }
}

/// The boot id of the host while a run is recorded.
const BOOT: Boot = [1; 16];

/// A host that syncs nothing, with the same boot id or another.
#[derive(Debug)]
pub struct Again(pub Boot);

impl Disk for Again {
    fn create_dirs(&self, path: &Path) -> io::Result<()> {
        HostDisk.create_dirs(path)
    }
    fn open(&self, path: &Path, access: Access) -> io::Result<File> {
        HostDisk.open(path, access)
    }
    fn write_at(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        HostDisk.write_at(file, bytes, offset)
    }
    fn set_len(&self, file: &File, len: u64) -> io::Result<()> {
        HostDisk.set_len(file, len)
    }
    fn allocate(&self, _: &File, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn sync(&self, _: &File, _: bool) -> io::Result<()> {
        Ok(())
    }
    fn sync_dir(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }
    fn sync_filesystem(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        HostDisk.rename(from, to)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        HostDisk.remove(path)
    }
    fn boot(&self) -> Option<Boot> {
        Some(self.0)
    }
}

/// Small pseudo-random numbers.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) as usize % sides
    }
}

/// The contents of a disk, and the part of them that is sure.
#[derive(Default)]
struct Media {
    files: BTreeMap<Node, (Vec<u8>, Vec<Event>)>,
    names: BTreeMap<PathBuf, Option<Node>>,
    unsure: Vec<Event>,
}

fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new(""))
}

fn change(bytes: &mut Vec<u8>, event: &Event) {
    match event {
        Event::Write(_, offset, new) => {
            let end = *offset as usize + new.len();
            bytes.resize(bytes.len().max(end), 0);
            bytes[*offset as usize..end].copy_from_slice(new);
        }
        Event::SetLen(_, len) => bytes.resize(*len as usize, 0),
        _ => {}
    }
}

fn rename(names: &mut BTreeMap<PathBuf, Option<Node>>, event: &Event) {
    match event {
        Event::CreateDir(path) => {
            names.insert(path.clone(), None);
        }
        Event::Create(path, node) => {
            names.insert(path.clone(), Some(*node));
        }
        Event::Rename(from, to) => {
            if let Some(node) = names.remove(from) {
                names.insert(to.clone(), node);
            }
        }
        Event::Remove(path) => {
            names.remove(path);
        }
        _ => {}
    }
}

impl Media {
    fn take(&mut self, event: &Event) {
        match event {
            Event::Write(node, ..) | Event::SetLen(node, _) => {
                self.files.entry(*node).or_default().1.push(event.clone());
            }
            Event::Sync(node) => self.sure(*node),
            Event::SyncAll => {
                for node in self.files.keys().copied().collect::<Vec<_>>() {
                    self.sure(node);
                }
                for event in std::mem::take(&mut self.unsure) {
                    rename(&mut self.names, &event);
                }
            }
            Event::SyncDir(dir) => {
                let (sure, unsure) =
                    std::mem::take(&mut self.unsure)
                        .into_iter()
                        .partition(|event| match event {
                            Event::CreateDir(path)
                            | Event::Create(path, _)
                            | Event::Remove(path) => parent(path) == dir,
                            Event::Rename(from, to) => parent(from) == dir || parent(to) == dir,
                            _ => false,
                        });
                self.unsure = unsure;
                let sure: Vec<Event> = sure;
                for event in sure {
                    rename(&mut self.names, &event);
                }
            }
            Event::CreateDir(_) | Event::Create(..) | Event::Rename(..) | Event::Remove(_) => {
                if let Event::Create(_, node) = event {
                    self.files.entry(*node).or_default();
                }
                self.unsure.push(event.clone());
            }
            Event::Returned(_) | Event::Promised(..) => {}
        }
    }

    fn sure(&mut self, node: Node) {
        let (bytes, writes) = self.files.entry(node).or_default();
        for event in std::mem::take(writes) {
            change(bytes, &event);
        }
    }

    /// Makes a directory as the disk may show it; `keep` decides about each change that is not
    /// sure.
    fn make(&self, at: &Path, keep: &mut dyn FnMut() -> bool) {
        let mut names = self.names.clone();
        for event in self.unsure.iter().filter(|_| keep()) {
            rename(&mut names, event);
        }
        for (path, node) in names {
            let path = at.join(path);
            let Some(node) = node else {
                // Without its parent, the directory cannot be reached.
                let _ = fs::create_dir(path);
                continue;
            };
            let (bytes, writes) = &self.files[&node];
            let mut bytes = bytes.clone();
            for event in writes.iter().filter(|_| keep()) {
                change(&mut bytes, event);
            }
            let end = bytes
                .iter()
                .rposition(|&byte| byte != 0)
                .map_or(0, |at| at + 1);
            if let Ok(file) = File::create(&path) {
                io::Write::write_all(&mut &file, &bytes[..end]).unwrap();
                file.set_len(bytes.len() as u64).unwrap();
            }
        }
    }
}

/// The contents of the filesystem at a moment: files by name, and their contents by id.
#[derive(Debug, Clone, Default)]
struct Moment {
    names: BTreeMap<Vec<u8>, usize>,
    files: BTreeMap<usize, Held>,
}

impl Moment {
    fn contents(&self) -> BTreeMap<Vec<u8>, Vec<u8>> {
        let held = |id| self.files[id].bytes.clone();
        let names = self.names.iter();
        names.map(|(name, id)| (name.clone(), held(id))).collect()
    }
}

#[derive(Debug, Clone)]
struct Held {
    bytes: Vec<u8>,
    /// The moment at which the file, or its contents then, replaced others.
    replaced: Option<usize>,
    /// Whether the file was emptied, so that the next write to it replaces contents.
    replaces: bool,
}

struct Run {
    overlay: Option<Overlay>,
    recorder: Arc<Recorder>,
    moments: Vec<Moment>,
    now: Moment,
    next: usize,
}

const NAMES: [&[u8]; 4] = [b"a", b"b", b"c", b"low"];

impl Run {
    fn fs(&self) -> &Overlay {
        self.overlay.as_ref().unwrap()
    }

    fn ino(&self, name: &[u8]) -> u64 {
        let ino = self.fs().lookup(ROOT, name).unwrap().ino;
        self.fs().forget(ino, 1);
        ino
    }

    fn make(&mut self, name: &[u8]) {
        let caller = Caller::default();
        let made = self.fs().mknod(caller, ROOT, name, 0o644, Special::File);
        let ino = made.unwrap().ino;
        self.fs().forget(ino, 1);
        self.next += 1;
        self.now.names.insert(name.to_vec(), self.next);
        let held = Held {
            bytes: Vec::new(),
            replaced: None,
            replaces: false,
        };
        self.now.files.insert(self.next, held);
    }

    /// Records the moment after an operation. `synced` are the files that the operation syncs.
    fn done(&mut self, synced: Option<Vec<usize>>) {
        self.moments.push(self.now.clone());
        let at = self.moments.len() - 1;
        self.recorder.record(|_| Some(Event::Returned(at)));
        if let Some(files) = synced {
            self.recorder.record(|_| Some(Event::Promised(at, files)));
        }
    }

    fn write(&mut self, name: &[u8], offset: usize, bytes: &[u8]) {
        let ino = self.ino(name);
        self.fs().write(ino, bytes, offset as u64, false).unwrap();
        let id = self.now.names[name];
        let held = self.now.files.get_mut(&id).unwrap();
        let end = offset + bytes.len();
        held.bytes.resize(held.bytes.len().max(end), 0);
        held.bytes[offset..end].copy_from_slice(bytes);
        // The first write copies the file of the layer.
        if std::mem::take(&mut held.replaces) || (id == 0 && held.replaced == Some(0)) {
            held.replaced = Some(self.moments.len());
        }
    }

    fn step(&mut self, dice: &mut Dice, open: &dyn Fn() -> Overlay) {
        let name = NAMES[dice.roll(NAMES.len())];
        let bytes: Vec<u8> = (0..=dice.roll(30))
            .map(|_| 1 + dice.roll(250) as u8)
            .collect();
        let has = self.now.names.contains_key(name);
        let mut synced = None;
        match dice.roll(12) {
            _ if !has => {
                self.make(name);
                self.done(None);
                self.write(name, 0, &bytes);
            }
            0 | 1 => {
                let end = self.now.files[&self.now.names[name]].bytes.len();
                self.write(name, end, &bytes);
            }
            2 => self.write(name, 0, &bytes),
            3 => {
                let ino = self.ino(name);
                let empty = SetAttr {
                    size: Some(0),
                    ..SetAttr::default()
                };
                self.fs().setattr(ino, &empty).unwrap();
                let id = self.now.names[name];
                let held = self.now.files.get_mut(&id).unwrap();
                held.replaces |= !held.bytes.is_empty();
                held.bytes.clear();
                self.done(None);
                self.write(name, 0, &bytes);
            }
            4..=6 => {
                // Editors and package managers replace a file like this.
                let tmp = b"tmp";
                if !self.now.names.contains_key(&tmp[..]) {
                    self.make(tmp);
                    self.done(None);
                }
                self.write(tmp, 0, &bytes);
                self.done(None);
                let moved = self.fs().rename(ROOT, tmp, ROOT, name, Rename::Replace);
                moved.unwrap();
                let id = self.now.names.remove(&tmp[..]).unwrap();
                self.now.names.insert(name.to_vec(), id);
                self.now.files.get_mut(&id).unwrap().replaced = Some(self.moments.len());
            }
            7 => {
                self.fs().unlink(ROOT, name).unwrap();
                self.now.names.remove(name);
            }
            8 | 9 => {
                self.fs().fsync(self.ino(name), dice.roll(2) == 0).unwrap();
                synced = Some(vec![self.now.names[name]]);
            }
            10 => {
                self.fs().sync().unwrap();
                synced = Some(self.now.names.values().copied().collect());
            }
            _ => {
                // A clean end of a worker promises names, but no contents.
                self.overlay = None;
                self.overlay = Some(open());
                synced = Some(Vec::new());
            }
        }
        self.done(synced);
    }
}

/// Whether `found` is at least as long as `base`, if there is one, and has only bytes of the
/// others.
fn is_part(found: &[u8], base: Option<&[u8]>, others: &[&[u8]]) -> bool {
    let all = || base.iter().copied().chain(others.iter().copied());
    let least = all().map(<[u8]>::len).min().unwrap_or_default();
    let most = all().map(<[u8]>::len).max().unwrap_or_default();
    (base.is_none() || found.len() >= least)
        && found.len() <= most
        && found
            .iter()
            .enumerate()
            .all(|(at, byte)| all().any(|bytes| bytes.get(at) == Some(byte) || *byte == 0))
}

/// Whether a disk may show `found` after a power cut: the names of a moment from `promised` on.
fn may_be(
    found: &BTreeMap<Vec<u8>, Vec<u8>>,
    moments: &[Moment],
    promised: usize,
    now: usize,
    synced: &HashMap<usize, usize>,
) -> bool {
    (promised..=now).any(|at| {
        let moment = &moments[at];
        let same_names = found.keys().eq(moment.names.keys());
        same_names
            && found.iter().all(|(name, bytes)| {
                let id = moment.names[name];
                let held = &moment.files[&id];
                // The moment since which contents are sure.
                let sure = held.replaced.max(synced.get(&id).copied());
                let since = sure.unwrap_or(0);
                let states = moments[since..=now].iter();
                let states = states.filter_map(|moment| moment.files.get(&id));
                let states: Vec<&[u8]> = states.map(|held| &held.bytes[..]).collect();
                let base = sure.and_then(|at| moments[at].files.get(&id));
                is_part(bytes, base.map(|held| &held.bytes[..]), &states)
            })
    })
}

fn contents(overlay: &Overlay) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let view = view(overlay).into_iter();
    view.filter(|(_, seen)| seen.kind == Kind::File)
        .map(|(path, seen)| (path, seen.bytes))
        .collect()
}

/// Runs random operations on an upper in `root`. Returns their calls, and the model after each.
fn record(
    home: &Home,
    layers: &[Arc<Layer>],
    dice: &mut Dice,
    steps: usize,
) -> (Vec<Event>, Vec<Moment>) {
    let root = home.dir.path().join("run");
    fs::create_dir(&root).unwrap();
    let recorder = Arc::new(Recorder {
        root: root.clone(),
        trace: Mutex::default(),
    });
    let open = || home.open_on(recorder.clone(), layers, &root);
    let mut first = Moment::default();
    first.names.insert(b"low".to_vec(), 0);
    let held = Held {
        bytes: b"of a layer".to_vec(),
        replaced: Some(0),
        replaces: false,
    };
    first.files.insert(0, held);
    let mut run = Run {
        overlay: Some(open()),
        recorder: recorder.clone(),
        moments: vec![first.clone()],
        now: first,
        next: 0,
    };
    for _ in 0..steps {
        run.step(dice, &open);
    }
    run.overlay = None;
    let events = recorder.trace.lock().unwrap().events.clone();
    (events, run.moments)
}

fn cut_everywhere(seed: u64, steps: usize, random: usize) -> usize {
    let home = Home::new();
    let mut tree = iii_store::tree::Tree::implicit();
    put(&mut tree, b"low", b"of a layer");
    let layers: [Arc<Layer>; 1] = [home.layer(&tree, &[b"of a layer"])];
    let mut dice = Dice(seed);
    let (events, moments) = record(&home, &layers, &mut dice, steps);
    let mut media = Media::default();
    let mut seen = HashSet::new();
    let (mut promised, mut returned, mut images) = (0, 0, 0);
    let mut synced = HashMap::new();
    let last = moments.len() - 1;
    for (number, event) in events.iter().enumerate() {
        media.take(event);
        let looks = random > 2 || number % 4 == seed as usize % 4;
        match event {
            Event::Returned(at) => returned = *at,
            Event::Promised(at, files) => {
                promised = *at;
                synced.extend(files.iter().map(|&file| (file, *at)));
            }
            _ => {}
        }
        for variant in (0..2 + random).filter(|_| looks) {
            let share = dice.roll(100);
            let mut keep = || match variant {
                0 => true,
                1 => false,
                _ => dice.roll(100) < share,
            };
            let dir = home.dir.path().join("cut");
            fs::create_dir(&dir).unwrap();
            media.make(&dir, &mut keep);
            for boot in [BOOT, [2; 16]] {
                if boot == BOOT && variant != 0 {
                    continue;
                }
                let at = if boot == BOOT {
                    let copy = home.dir.path().join("killed");
                    let _ = fs::remove_dir_all(&copy);
                    copy_dir(&dir, &copy);
                    copy
                } else {
                    dir.clone()
                };
                let what = || {
                    let from = number.saturating_sub(12);
                    let last: Vec<String> = events[from..=number]
                        .iter()
                        .map(|event| format!("{event:?}").chars().take(100).collect())
                        .collect();
                    format!(
                        "seed {seed}, cut after call {number}, variant {variant}, boot {}:\n{}",
                        boot[0],
                        last.join("\n")
                    )
                };
                let disk = Arc::new(Again(boot));
                let opened = home.try_open_on(disk, &layers, &at, OverlayOptions::default());
                let overlay = opened.unwrap_or_else(|error| panic!("{error:?}\n{}", what()));
                let found = contents(&overlay);
                drop(overlay);
                let now = (returned + 1).min(last);
                if boot == BOOT {
                    let held = |at: usize| moments[at].contents();
                    let is = found == held(returned) || found == held(now);
                    assert!(is, "{found:?} after {:?}\n{}", held(returned), what());
                } else {
                    let ok = may_be(&found, &moments, promised, now, &synced);
                    assert!(
                        ok,
                        "{found:?} of {:?}\n{}",
                        moments[promised..=now]
                            .iter()
                            .map(Moment::contents)
                            .collect::<Vec<_>>(),
                        what()
                    );
                }
                seen.insert(found);
                images += 1;
            }
            fs::remove_dir_all(&dir).unwrap();
        }
    }
    assert!(seen.len() > steps / 8, "{} states", seen.len());
    images
}

pub fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[test]
fn the_power_is_cut_anywhere() {
    let long = std::env::var_os("III_LONG").is_some();
    let (seeds, random) = if long { (100, 20) } else { (4, 1) };
    let images: usize = (0..seeds)
        .map(|seed| cut_everywhere(seed, 24, random))
        .sum();
    eprintln!("{images} images");
    assert!(images > 200, "{images}");
}

/// Fails one call to the host's filesystem, or all from one on.
#[derive(Debug)]
pub struct Failing {
    /// Calls that still succeed.
    left: AtomicU64,
    /// The calls that are counted, and that fail.
    counts: fn(Call) -> bool,
    error: i32,
    once: bool,
    fired: AtomicBool,
}

/// A call to the host's filesystem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    Open,
    Write,
    SetLen,
    Allocate,
    Sync,
    SyncDir,
    Rename,
    Remove,
}

impl Failing {
    fn new(left: u64, once: bool, error: i32, counts: fn(Call) -> bool) -> Arc<Self> {
        Arc::new(Self {
            left: left.into(),
            counts,
            error,
            once,
            fired: AtomicBool::new(false),
        })
    }

    fn call(&self, call: Call) -> io::Result<()> {
        if !(self.counts)(call) {
            return Ok(());
        }
        let left = self.left.load(Ordering::SeqCst);
        if left == 0 {
            self.fired.store(true, Ordering::SeqCst);
            if self.once {
                self.left.store(u64::MAX, Ordering::SeqCst);
            }
            return Err(io::Error::from_raw_os_error(self.error));
        }
        self.left.store(left - 1, Ordering::SeqCst);
        Ok(())
    }
}

impl Disk for Failing {
    fn create_dirs(&self, path: &Path) -> io::Result<()> {
        HostDisk.create_dirs(path)
    }
    fn open(&self, path: &Path, access: Access) -> io::Result<File> {
        self.call(Call::Open)?;
        HostDisk.open(path, access)
    }
    fn write_at(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.call(Call::Write)?;
        HostDisk.write_at(file, bytes, offset)
    }
    fn set_len(&self, file: &File, len: u64) -> io::Result<()> {
        self.call(Call::SetLen)?;
        HostDisk.set_len(file, len)
    }
    fn allocate(&self, file: &File, offset: u64, len: u64) -> io::Result<()> {
        self.call(Call::Allocate)?;
        HostDisk.allocate(file, offset, len)
    }
    fn sync(&self, _: &File, _: bool) -> io::Result<()> {
        self.call(Call::Sync)
    }
    fn sync_dir(&self, _: &Path) -> io::Result<()> {
        self.call(Call::SyncDir)
    }
    fn sync_filesystem(&self, _: &Path) -> io::Result<()> {
        self.call(Call::Sync)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.call(Call::Rename)?;
        HostDisk.rename(from, to)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        self.call(Call::Remove)?;
        HostDisk.remove(path)
    }
    fn boot(&self) -> Option<Boot> {
        Some(BOOT)
    }
}

/// After a failure of any call while an upper is used, rewritten and opened, the next opening shows
/// all answered changes, and the directory has only files of an upper.
#[test]
fn any_call_may_fail_and_what_was_answered_is_there() {
    let home = Home::new();
    let layers: [Arc<Layer>; 0] = [];
    let name = |n: usize| format!("f{n}").into_bytes();
    for error in [libc::EIO, libc::EMFILE, libc::ENOSPC] {
        for at in 0.. {
            let upper = home.dir.path().join("failing");
            let _ = fs::remove_dir_all(&upper);
            let disk = Failing::new(at, true, error, |_| true);
            let mut made: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
            for round in 0..2 {
                let opened =
                    home.try_open_on(disk.clone(), &layers, &upper, OverlayOptions::default());
                let Ok(overlay) = opened else {
                    continue;
                };
                for n in 2 * round..2 * round + 2 {
                    let caller = Caller::default();
                    let Ok(attr) = overlay.mknod(caller, ROOT, &name(n), 0o644, Special::File)
                    else {
                        continue;
                    };
                    let bytes = if overlay.write(attr.ino, b"text", 0, false).is_ok() {
                        b"text".to_vec()
                    } else {
                        Vec::new()
                    };
                    let _ = overlay.fsync(attr.ino, false);
                    made.push((name(n), bytes));
                }
                drop(overlay);
            }
            let overlay = home.open_at(&layers, &upper, OverlayOptions::default());
            let found = contents(&overlay);
            let made = made.into_iter().collect();
            assert_eq!(found, made, "call {at}, error {error}");
            drop(overlay);
            assert!(!upper.join("log.new").exists());
            if !disk.fired.load(Ordering::SeqCst) {
                assert!(at > 20, "{at} calls are fewer than there are");
                break;
            }
        }
    }
}
