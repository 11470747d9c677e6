//! The upper in memory: the log, applied.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use iii_store::id::ID_LEN;

use super::record::{Chain, Op, Record};
use crate::ino::{Ino, InoMap};
use crate::merge::Merged;

/// In a listing, positions of the upper's own names are below this; those of the lower's names
/// begin here. A new name gets the position before all existing ones: a listing in progress is past
/// it, so each listing ends, even while names are made and renamed. The last position is below
/// 2^31, as a 32-bit program without large-file support needs it.
pub const OWN_END: u64 = (1 << 30) - (1 << 20);

/// Most changes that are written as one batch.
pub const BATCH: usize = 4096;
/// A step of a snapshot looks at no more than this many inodes for each change that it may return.
const STEPS: usize = 8;
/// A batch of a snapshot ends when names, xattrs and targets in it come to this many bytes.
const BATCH_BYTES: u64 = 4 << 20;

/// Most bytes of memory that the inodes, names, xattrs and targets of one upper may take, as
/// [`State::memory`] counts them: about ten million files. An operation that would exceed it fails
/// with ENOSPC, so that an upper that was written can be opened again.
pub const MAX_MEMORY: u64 = 4 << 30;
/// More bytes that only operations that remove something may take: they need records of their own
/// to hide names of the lower.
pub const REMOVAL_MEMORY: u64 = MAX_MEMORY / 16;
/// Most bytes of memory of a log that is read. An upper that was carried over to other layers may
/// exceed [`MAX_MEMORY`], since a directory that was renamed is one record and becomes many; a log
/// that exceeds this limit is invalid.
pub const MAX_REPLAY_MEMORY: u64 = 2 * MAX_MEMORY;

/// Bytes of memory of an inode without its parts of variable length. A test measures it.
pub const INODE_MEMORY: u64 = 256;
/// Bytes of memory of a name in a directory, without the bytes of the name.
pub const ENTRY_MEMORY: u64 = 160;
/// Most bytes of an inode in the log, without its parts of variable length.
const INODE_LOGGED: u64 = 100;
/// Most bytes of a name in the log, without the bytes of the name.
const ENTRY_LOGGED: u64 = 24;

/// An inode of the upper.
#[derive(Debug)]
pub struct Node {
    /// The metadata and the location of the contents.
    pub record: Record,
    /// The lower inode that this one stands for, by its origin in the lower of this mount.
    pub lower: Option<Ino>,
    /// The entries of a directory; none for other inodes.
    pub dir: Option<Box<Dir>>,
    /// Whether its flat file has a durable name.
    pub flat_named: bool,
    /// Whether the flat file has had no write since it was synced.
    pub synced: bool,
    /// Whether the contents replace others that may be durable, so that the contents have to be
    /// durable before the log names them.
    pub replaces: bool,
}

/// The entries that the upper sets in a directory.
#[derive(Debug, Default)]
pub struct Dir {
    names: BTreeMap<Arc<[u8]>, Slot>,
    /// The names that the lower does not have, by position; the newest comes first.
    own: BTreeMap<u64, Arc<[u8]>>,
    /// The position of the newest name.
    last: u64,
    /// Number of subdirectories, the lower's included.
    pub subdirs: u32,
    /// The directory that contains this one, by number; none while it is the lower's.
    pub parent: Option<u64>,
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    to: Option<u64>,
    position: Option<u64>,
}

impl Dir {
    /// The entry of the upper for `name`: none, absent, or the number of an inode.
    pub fn get(&self, name: &[u8]) -> Option<Option<u64>> {
        self.names.get(name).map(|slot| slot.to)
    }

    /// All entries of the upper, absent names included.
    pub fn entries(&self) -> impl Iterator<Item = (&[u8], Option<u64>)> {
        self.names.iter().map(|(name, slot)| (&**name, slot.to))
    }

    /// The names that the lower does not have, from a position on.
    pub fn own_from(&self, position: u64) -> impl Iterator<Item = (u64, &[u8], u64)> {
        self.own.range(position..).filter_map(|(&position, name)| {
            let to = self.names.get(name)?.to?;
            Some((position, &**name, to))
        })
    }

    /// Sets an entry. True if the upper had no entry of that name.
    fn set(&mut self, name: &[u8], to: Option<u64>, in_lower: bool) -> bool {
        if let Some(slot) = self.names.get_mut(name) {
            slot.to = to;
            return false;
        }
        let name: Arc<[u8]> = name.into();
        let position = (!in_lower).then(|| self.position());
        if let Some(position) = position {
            self.own.insert(position, name.clone());
        }
        self.names.insert(name, Slot { to, position });
        true
    }

    /// The position for a new name.
    fn position(&mut self) -> u64 {
        if self.last == 0 {
            self.renumber();
        }
        self.last = self.last.saturating_sub(1);
        self.last
    }

    /// Moves the names to the last positions, in their order. A listing in progress may miss names:
    /// a directory needs this once in 2^30 names.
    fn renumber(&mut self) {
        self.last = OWN_END.saturating_sub(self.own.len() as u64);
        for (position, (_, name)) in (self.last..).zip(std::mem::take(&mut self.own)) {
            if let Some(slot) = self.names.get_mut(&name) {
                slot.position = Some(position);
            }
            self.own.insert(position, name);
        }
    }

    /// Removes an entry. True if the upper had one of that name.
    fn clear(&mut self, name: &[u8]) -> bool {
        let Some(slot) = self.names.remove(name) else {
            return false;
        };
        if let Some(position) = slot.position {
            self.own.remove(&position);
        }
        true
    }

    /// Bytes of all names.
    fn name_bytes(&self) -> u64 {
        self.names.keys().map(|name| name.len() as u64).sum()
    }

    /// Gives positions to names that were set before the lower was known.
    fn place(&mut self, in_lower: impl Fn(&[u8]) -> bool) {
        for (name, to) in std::mem::take(&mut self.names) {
            self.set(&name, to.to, in_lower(&name));
        }
    }
}

/// The state of an upper in memory.
#[derive(Debug)]
pub struct State {
    /// The merged layers that the upper stands on.
    pub lower: Arc<Merged>,
    /// The layers of `lower`, as the log names them.
    pub chain: Chain,
    /// The layers of the project whose changes the upper has taken over: see [`Op::Applied`].
    pub applied: Vec<[u8; ID_LEN]>,
    /// The layer that the upper was made from: see [`Op::Thawed`].
    pub thawed: Option<[u8; ID_LEN]>,
    /// Boxed, so that growing the table moves pointers.
    nodes: InoMap<Box<Node>>,
    by_lower: InoMap<u64>,
    next: u64,
    /// Number of names in all directories.
    entries: u64,
    /// Bytes of names, xattrs, targets and origins.
    bytes: u64,
}

/// The new entry for a name.
#[derive(Debug, Clone, Copy)]
enum Say {
    /// The name leads to this inode or, with none, is absent.
    Leads(Option<u64>),
    /// The upper has no entry, so the name is as the lower has it.
    Nothing,
}

/// The progress of [`State::snapshot_from`].
#[derive(Debug, Default)]
pub struct SnapshotCursor {
    /// The inodes to visit, and the index of the next.
    numbers: Vec<u64>,
    at: usize,
    phase: Phase,
}

#[derive(Debug, Default)]
enum Phase {
    #[default]
    Head,
    Inodes,
    /// The names of the current directory, after this one.
    Entries(Option<Arc<[u8]>>),
    Done,
}

impl State {
    /// An empty upper over `lower`.
    pub fn new(lower: Arc<Merged>) -> Self {
        Self {
            lower,
            chain: Chain::default(),
            applied: Vec::new(),
            thawed: None,
            nodes: InoMap::default(),
            by_lower: InoMap::default(),
            next: 1,
            entries: 0,
            bytes: 0,
        }
    }

    /// The number that the next new inode gets.
    pub fn next_number(&mut self) -> u64 {
        let number = self.next;
        self.next += 1;
        number
    }

    /// The upper's number of an inode; none if the upper has no record of it.
    pub fn number(&self, ino: Ino) -> Option<u64> {
        if ino < self.lower.end() {
            return self.by_lower.get(&ino).copied();
        }
        let number = ino - self.lower.end();
        self.nodes.contains_key(&number).then_some(number)
    }

    /// The inode with this number.
    pub fn node(&self, number: u64) -> Option<&Node> {
        self.nodes.get(&number).map(|node| &**node)
    }

    /// The inode with this number. The caller must not change parts of the record that have no
    /// fixed length.
    pub fn node_mut(&mut self, number: u64) -> Option<&mut Node> {
        self.nodes.get_mut(&number).map(|node| &mut **node)
    }

    /// All inodes; the rule of [`State::node_mut`] holds.
    pub fn nodes_mut(&mut self) -> impl Iterator<Item = &mut Node> {
        self.nodes.values_mut().map(|node| &mut **node)
    }

    /// Whether the upper has no content at all.
    pub fn says_nothing(&self) -> bool {
        self.nodes.is_empty() && self.applied.is_empty() && self.thawed.is_none()
    }

    /// Bytes of memory that the inodes and names take, as the limits count them.
    pub fn memory(&self) -> u64 {
        INODE_MEMORY * self.nodes.len() as u64 + ENTRY_MEMORY * self.entries + self.bytes
    }

    /// Number of inodes.
    pub fn inodes(&self) -> u64 {
        self.nodes.len() as u64
    }

    /// Number of inodes, each with a name of ordinary length, that the memory limit still allows.
    pub fn free_inodes(&self) -> u64 {
        const NAME: u64 = 32;
        MAX_MEMORY.saturating_sub(self.memory()) / (INODE_MEMORY + ENTRY_MEMORY + NAME)
    }

    /// All inodes with their numbers.
    pub fn nodes(&self) -> impl Iterator<Item = (u64, &Node)> {
        self.nodes.iter().map(|(&number, node)| (number, &**node))
    }

    /// Most bytes of memory by which the changes make the state grow.
    pub fn growth(&self, ops: &[Op]) -> u64 {
        let of = |op: &Op| match op {
            Op::Inode(number, record) => match self.nodes.get(number) {
                Some(node) => record.bytes().saturating_sub(node.record.bytes()),
                None => INODE_MEMORY + record.bytes(),
            },
            Op::Entry(_, name, _) => ENTRY_MEMORY + name.len() as u64,
            _ => 0,
        };
        ops.iter().map(of).sum()
    }

    /// The inode number that the sandbox sees.
    pub fn ino(&self, number: u64) -> Ino {
        self.nodes
            .get(&number)
            .and_then(|node| node.lower)
            .unwrap_or(self.lower.end() + number)
    }

    fn is_dir(&self, number: u64) -> bool {
        self.nodes
            .get(&number)
            .is_some_and(|node| node.record.is_dir())
    }

    /// Whether `name` in the directory `dir` is a directory, and whether the lower has the name.
    fn look(&self, dir: u64, name: &[u8]) -> (bool, bool) {
        let Some(node) = self.nodes.get(&dir) else {
            return (false, false);
        };
        let lower = node.lower.and_then(|ino| self.lower.lookup(ino, name));
        let is_dir = match node.dir.as_ref().and_then(|dir| dir.get(name)) {
            Some(to) => to.is_some_and(|to| self.is_dir(to)),
            None => lower.is_some_and(|l| l.node.kind() == iii_store::Kind::Dir),
        };
        (is_dir, lower.is_some())
    }

    /// Applies one change.
    pub fn apply(&mut self, op: Op) {
        match op {
            Op::Chain(chain) => self.chain = chain,
            Op::Applied(layers) => self.applied = layers,
            Op::Thawed(layer) => self.thawed = Some(layer),
            Op::Inode(number, record) => self.set_record(number, *record),
            Op::Update(number, update) => {
                if let Some(node) = self.node_mut(number) {
                    node.record.update(&update);
                }
            }
            Op::Forget(number) => self.remove(number),
            Op::Entry(dir, name, to) => {
                self.change(dir, &name, Say::Leads(to));
                if let Some(entries) = to.and_then(|to| self.dir_mut(to)) {
                    entries.parent = Some(dir);
                }
            }
            Op::Clear(dir, name) => self.change(dir, &name, Say::Nothing),
            Op::Commit(_) => {}
        }
    }

    /// Changes the upper's entry for `name` in `dir`, and updates the count of subdirectories.
    fn change(&mut self, dir: u64, name: &[u8], say: Say) {
        let (was_dir, in_lower) = self.look(dir, name);
        self.put(dir, name, say, in_lower);
        let (is_dir, _) = self.look(dir, name);
        if let Some(entries) = self.dir_mut(dir) {
            let subdirs = entries.subdirs + u32::from(is_dir);
            entries.subdirs = subdirs.saturating_sub(u32::from(was_dir));
        }
    }

    /// Sets or clears a name, and updates the counts of names and bytes.
    fn put(&mut self, dir: u64, name: &[u8], say: Say, in_lower: bool) {
        let Some(entries) = self.dir_mut(dir) else {
            return;
        };
        let bytes = name.len() as u64;
        match say {
            Say::Leads(to) if entries.set(name, to, in_lower) => {
                self.entries += 1;
                self.bytes += bytes;
            }
            Say::Nothing if entries.clear(name) => {
                self.entries -= 1;
                self.bytes -= bytes;
            }
            _ => {}
        }
    }

    /// Applies one change of a log that is being read. The parts that depend on the lower or on
    /// other inodes follow in [`State::bind`], since a log may have a name before it has the inode
    /// or the directory.
    pub fn replay(&mut self, op: Op) {
        match op {
            Op::Inode(number, record) => self.insert(number, *record, None),
            Op::Entry(dir, name, to) => self.put(dir, &name, Say::Leads(to), true),
            Op::Clear(dir, name) => self.put(dir, &name, Say::Nothing, true),
            op => self.apply(op),
        }
    }

    /// Binds the replayed state to `lower`.
    pub fn bind(&mut self, lower: Arc<Merged>) {
        self.lower = lower;
        let mut dirs = Vec::new();
        for (&number, node) in &mut self.nodes {
            node.lower = of_origin(&self.lower, &node.record);
            if let Some(ino) = node.lower {
                self.by_lower.insert(ino, number);
            }
            if node.dir.is_some() {
                dirs.push(number);
            }
        }
        for number in dirs {
            let Some(mut entries) = self.nodes.get_mut(&number).and_then(|n| n.dir.take()) else {
                continue;
            };
            let lower = self.nodes.get(&number).and_then(|node| node.lower);
            let below = |name: &[u8]| self.lower.lookup(lower?, name);
            let mut subdirs = lower.map_or(0, |ino| self.lower.subdirs(ino));
            let mut children = Vec::new();
            for (name, to) in entries.entries() {
                let was = below(name).is_some_and(|l| l.node.kind() == iii_store::Kind::Dir);
                let is = to.is_some_and(|to| self.is_dir(to));
                subdirs = (subdirs + u32::from(is)).saturating_sub(u32::from(was));
                if is {
                    children.extend(to);
                }
            }
            entries.subdirs = subdirs;
            entries.place(|name| below(name).is_some());
            if let Some(node) = self.nodes.get_mut(&number) {
                node.dir = Some(entries);
            }
            for child in children {
                // The parent stays set when the turn of the child comes later.
                if let Some(entries) = self.dir_mut(child) {
                    entries.parent = Some(number);
                }
            }
        }
    }

    fn dir_mut(&mut self, number: u64) -> Option<&mut Dir> {
        self.nodes.get_mut(&number)?.dir.as_deref_mut()
    }

    fn set_record(&mut self, number: u64, record: Record) {
        let lower = match self.nodes.get(&number) {
            Some(node) => node.lower,
            None => of_origin(&self.lower, &record),
        };
        if let Some(lower) = lower {
            self.by_lower.insert(lower, number);
        }
        self.insert(number, record, lower);
    }

    fn insert(&mut self, number: u64, record: Record, lower: Option<Ino>) {
        self.next = self.next.max(number.saturating_add(1));
        self.bytes += record.bytes();
        if let Some(node) = self.nodes.get_mut(&number) {
            self.bytes -= node.record.bytes();
            let is_dir = record.is_dir();
            node.record = record;
            if is_dir == node.dir.is_some() {
                return;
            }
            // No operation turns a directory into a file or a file into a directory: the log is
            // wrong.
            let dir = node.dir.take();
            self.entries -= dir.as_ref().map_or(0, |dir| dir.names.len() as u64);
            self.bytes -= dir.as_ref().map_or(0, |dir| dir.name_bytes());
            return;
        }
        let dir = record.is_dir().then(|| {
            Box::new(Dir {
                last: OWN_END,
                subdirs: lower.map_or(0, |ino| self.lower.subdirs(ino)),
                ..Dir::default()
            })
        });
        let node = Node {
            record,
            lower,
            dir,
            flat_named: false,
            synced: false,
            replaces: false,
        };
        self.nodes.insert(number, Box::new(node));
    }

    /// Removes an inode and its entries.
    pub fn remove(&mut self, number: u64) {
        self.next = self.next.max(number.saturating_add(1));
        if let Some(node) = self.nodes.remove(&number) {
            let dir = node.dir.as_deref();
            self.entries -= dir.map_or(0, |dir| dir.names.len() as u64);
            self.bytes -= node.record.bytes() + dir.map_or(0, Dir::name_bytes);
            if let Some(lower) = node.lower {
                self.by_lower.remove(&lower);
            }
        }
    }

    /// The changes that make this state from an empty one, in batches of bounded size.
    pub fn snapshot(&self) -> impl Iterator<Item = Vec<Op>> {
        let mut cursor = SnapshotCursor::default();
        std::iter::from_fn(move || self.snapshot_from(&mut cursor, BATCH)).filter(|b| !b.is_empty())
    }

    /// The next changes that make this state from an empty one: about `most`, or an empty list;
    /// none at the end. The state may change between two calls, if the caller records these changes
    /// too: both, in the order in which they came, make the state as it is at the end.
    pub fn snapshot_from(&self, cursor: &mut SnapshotCursor, most: usize) -> Option<Vec<Op>> {
        let mut ops = Vec::new();
        let mut bytes = 0;
        let mut steps = 0;
        let mut full = |ops: &Vec<Op>, more: u64| {
            bytes += more;
            steps += 1;
            ops.len() >= most || bytes >= BATCH_BYTES || steps >= most * STEPS
        };
        loop {
            match &mut cursor.phase {
                Phase::Head => {
                    ops.push(Op::Chain(self.chain.clone()));
                    if !self.applied.is_empty() {
                        ops.push(Op::Applied(self.applied.clone()));
                    }
                    ops.extend(self.thawed.map(Op::Thawed));
                    cursor.numbers = self.nodes.keys().copied().collect();
                    cursor.phase = Phase::Inodes;
                }
                Phase::Inodes => {
                    let Some(number) = cursor.numbers.get(cursor.at) else {
                        cursor.at = 0;
                        cursor.phase = Phase::Entries(None);
                        continue;
                    };
                    cursor.at += 1;
                    let mut more = 0;
                    if let Some(node) = self.nodes.get(number).filter(|n| n.record.nlink != 0) {
                        more = node.record.bytes();
                        ops.push(Op::Inode(*number, Box::new(node.record.clone())));
                    }
                    if full(&ops, more) {
                        return Some(ops);
                    }
                }
                Phase::Entries(last) => {
                    let Some(&number) = cursor.numbers.get(cursor.at) else {
                        cursor.phase = Phase::Done;
                        continue;
                    };
                    let named = self.nodes.get(&number).filter(|n| n.record.nlink != 0);
                    if let Some(dir) = named.and_then(|node| node.dir.as_deref()) {
                        let from = last.take().map_or(Bound::Unbounded, Bound::Excluded);
                        for (name, slot) in dir.names.range((from, Bound::Unbounded)) {
                            ops.push(Op::Entry(number, (&**name).into(), slot.to));
                            if full(&ops, name.len() as u64) {
                                *last = Some(Arc::clone(name));
                                return Some(ops);
                            }
                        }
                    }
                    cursor.at += 1;
                    if full(&ops, 0) {
                        return Some(ops);
                    }
                }
                Phase::Done => return (!ops.is_empty()).then_some(ops),
            }
        }
    }

    /// Approximate bytes of a log that holds [`State::snapshot`].
    pub fn weight(&self) -> u64 {
        INODE_LOGGED * self.nodes.len() as u64 + ENTRY_LOGGED * self.entries + self.bytes
    }
}

/// The lower inode that the record stands for.
fn of_origin(lower: &Merged, record: &Record) -> Option<Ino> {
    let found = lower.lookup_path(record.origin.as_ref()?)?;
    (found.node.kind() == record.kind()).then_some(found.ino)
}

#[cfg(test)]
mod tests {
    use super::super::record::{Body, Data, Update};
    use super::*;
    use crate::fs::Time;

    fn state() -> State {
        State::new(Arc::new(Merged::new(Vec::new()).unwrap()))
    }

    fn record(is_dir: bool, nlink: u32) -> Record {
        let file = Body::File {
            data: Data::Empty,
            size: 0,
        };
        Record {
            mode: 0o644,
            uid: 0,
            gid: 0,
            nlink,
            atime: Time::default(),
            mtime: Time::default(),
            ctime: Time::default(),
            btime: Time::default(),
            xattrs: std::iter::empty().collect(),
            origin: None,
            body: if is_dir { Body::Dir } else { file },
        }
    }

    /// The whole content of a state, in order.
    fn says(state: &State) -> Vec<String> {
        let mut all: Vec<String> = Vec::new();
        for (number, node) in state.nodes().filter(|(_, node)| node.record.nlink != 0) {
            let dir = node.dir.as_deref();
            let subdirs = dir.map(|dir| (dir.subdirs, dir.parent));
            all.push(format!("{number} {:?} {subdirs:?}", node.record));
            for (name, to) in dir.iter().flat_map(|dir| dir.entries()) {
                all.push(format!("{number} {name:?} {to:?}"));
            }
        }
        all.sort();
        all
    }

    /// A snapshot that is taken in steps, with the concurrent changes recorded too, makes the state
    /// that exists at its end.
    #[test]
    fn a_snapshot_taken_beside_changes_is_the_state_at_its_end() {
        for seed in 0..200_u64 {
            let mut random = seed;
            let mut roll = |sides: u64| {
                random = random
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                (random >> 33) % sides
            };
            let mut live = state();
            live.apply(Op::Inode(1, Box::new(record(true, 1))));
            let mut told: Vec<Op> = Vec::new();
            let mut cursor = SnapshotCursor::default();
            let mut begun = false;
            for step in 0.. {
                // As operations do: directories, files and names are made, moved, changed and
                // removed.
                let dirs: Vec<u64> = live
                    .nodes()
                    .filter(|(_, n)| n.dir.is_some())
                    .map(|(n, _)| n)
                    .collect();
                let dir = dirs[roll(dirs.len() as u64) as usize];
                let name: Box<[u8]> = format!("n{}", roll(6)).into_bytes().into();
                let there = live
                    .node(dir)
                    .and_then(|n| n.dir.as_ref()?.get(&name))
                    .flatten();
                let ops = match (roll(4), there) {
                    (0 | 1, None) => {
                        let number = live.next_number();
                        let made = record(roll(3) == 0, 1);
                        vec![
                            Op::Inode(number, Box::new(made)),
                            Op::Entry(dir, name, Some(number)),
                        ]
                    }
                    (2, Some(to)) => {
                        let mut changed = live.node(to).unwrap().record.clone();
                        changed.uid += 1;
                        let update = changed.update_of(&live.node(to).unwrap().record);
                        let update: Update = update.unwrap();
                        vec![Op::Update(to, Box::new(update))]
                    }
                    (3, Some(to)) if live.node(to).unwrap().dir.is_none() => {
                        vec![Op::Clear(dir, name), Op::Forget(to)]
                    }
                    (_, Some(to)) if to != 1 && to != dir => {
                        let new_dir = dirs[roll(dirs.len() as u64) as usize];
                        let new: Box<[u8]> = format!("moved{step}").into_bytes().into();
                        let moved = Box::new(live.node(to).unwrap().record.clone());
                        vec![
                            Op::Inode(to, moved),
                            Op::Clear(dir, name),
                            Op::Entry(new_dir, new, Some(to)),
                        ]
                    }
                    _ => Vec::new(),
                };
                for op in ops {
                    live.apply(op.clone());
                    if begun {
                        told.push(op);
                    }
                }
                if step < 30 || roll(2) == 0 {
                    continue;
                }
                begun = true;
                match live.snapshot_from(&mut cursor, 1 + roll(3) as usize) {
                    Some(ops) => told.extend(ops),
                    None => break,
                }
            }
            let mut again = state();
            for op in told {
                again.replay(op);
            }
            again.bind(Arc::clone(&live.lower));
            assert_eq!(says(&again), says(&live), "seed {seed}");
            assert_eq!(again.memory(), live.memory(), "seed {seed}");
        }
    }
}
