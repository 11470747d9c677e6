//! The upper in memory: what the log says, applied.

use std::collections::BTreeMap;
use std::sync::Arc;

use iii_store::id::ID_LEN;

use super::record::{Chain, Op, Record};
use crate::ino::{Ino, InoMap};
use crate::merge::Merged;

/// Positions of the upper's own names in a listing end here, and those of the lower's begin. A name
/// that comes gets the position before those of all that are there: a listing that has begun is past
/// it, so each listing ends, whatever is renamed or made meanwhile. The last position is below
/// 2^31, as a 32-bit program without large-file support needs it.
pub const OWN_END: u64 = (1 << 30) - (1 << 20);

/// Most changes that are written as one batch where there are many.
pub const BATCH: usize = 4096;

/// Most inodes of one upper. They are held in memory, about 300 bytes each.
pub const MAX_INODES: usize = 4 << 20;

/// An inode of the upper.
#[derive(Debug)]
pub struct Node {
    /// What is known of it.
    pub record: Record,
    /// The lower inode that it is, by its origin in the lower of this mount.
    pub lower: Option<Ino>,
    /// Its entries, if it is a directory.
    pub dir: Option<Box<Dir>>,
    /// Whether its flat file has a durable name.
    pub flat_named: bool,
}

/// The upper's say over a directory.
#[derive(Debug, Default)]
pub struct Dir {
    names: BTreeMap<Arc<[u8]>, Slot>,
    /// The names that the lower does not have, by position; the last that came is the first.
    own: BTreeMap<u64, Arc<[u8]>>,
    /// The position of the last name that came.
    last: u64,
    /// Directories in it, the lower's included.
    pub subdirs: u32,
    /// The directory it stands in, by number, once that is not the lower's.
    pub parent: Option<u64>,
}

#[derive(Debug, Clone, Copy)]
struct Slot {
    to: Option<u64>,
    position: Option<u64>,
}

impl Dir {
    /// What the upper says of `name`: nothing, that it is absent, or which inode it leads to.
    pub fn get(&self, name: &[u8]) -> Option<Option<u64>> {
        self.names.get(name).map(|slot| slot.to)
    }

    /// All names that the upper has a say over.
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

    fn set(&mut self, name: &[u8], to: Option<u64>, in_lower: bool) {
        if let Some(slot) = self.names.get_mut(name) {
            slot.to = to;
            return;
        }
        let name: Arc<[u8]> = name.into();
        let position = (!in_lower).then(|| self.position());
        if let Some(position) = position {
            self.own.insert(position, name.clone());
        }
        self.names.insert(name, Slot { to, position });
    }

    /// The position for a name that comes.
    fn position(&mut self) -> u64 {
        if self.last == 0 {
            self.renumber();
        }
        self.last = self.last.saturating_sub(1);
        self.last
    }

    /// Moves the names to the last positions, in their order. A listing that goes on meanwhile may
    /// miss names: a directory comes to this once in 2^30 names.
    fn renumber(&mut self) {
        self.last = OWN_END.saturating_sub(self.own.len() as u64);
        for (position, (_, name)) in (self.last..).zip(std::mem::take(&mut self.own)) {
            if let Some(slot) = self.names.get_mut(&name) {
                slot.position = Some(position);
            }
            self.own.insert(position, name);
        }
    }

    fn clear(&mut self, name: &[u8]) {
        if let Some(slot) = self.names.remove(name)
            && let Some(position) = slot.position
        {
            self.own.remove(&position);
        }
    }
}

/// The upper in memory.
#[derive(Debug)]
pub struct State {
    /// The layers that it stands on.
    pub lower: Arc<Merged>,
    /// What the log says of them.
    pub chain: Chain,
    /// The layers of the project whose changes it has taken over: see [`Op::Applied`].
    pub applied: Vec<[u8; ID_LEN]>,
    /// The layer that it was made from: see [`Op::Thawed`].
    pub thawed: Option<[u8; ID_LEN]>,
    nodes: InoMap<Node>,
    by_lower: InoMap<u64>,
    next: u64,
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
        }
    }

    /// The number that the next new inode gets.
    pub fn next_number(&mut self) -> u64 {
        let number = self.next;
        self.next += 1;
        number
    }

    /// The upper's number for an inode that it knows.
    pub fn number(&self, ino: Ino) -> Option<u64> {
        if ino < self.lower.end() {
            return self.by_lower.get(&ino).copied();
        }
        let number = ino - self.lower.end();
        self.nodes.contains_key(&number).then_some(number)
    }

    /// The inode with this number.
    pub fn node(&self, number: u64) -> Option<&Node> {
        self.nodes.get(&number)
    }

    /// The inode with this number.
    pub fn node_mut(&mut self, number: u64) -> Option<&mut Node> {
        self.nodes.get_mut(&number)
    }

    /// All inodes.
    pub fn nodes_mut(&mut self) -> impl Iterator<Item = &mut Node> {
        self.nodes.values_mut()
    }

    /// Whether it says nothing.
    pub fn says_nothing(&self) -> bool {
        self.nodes.is_empty() && self.applied.is_empty() && self.thawed.is_none()
    }

    /// Whether there is no room for more inodes.
    pub fn is_full(&self) -> bool {
        self.nodes.len() >= MAX_INODES
    }

    /// All inodes with their numbers.
    pub fn nodes(&self) -> impl Iterator<Item = (u64, &Node)> {
        self.nodes.iter().map(|(&number, node)| (number, node))
    }

    /// The number by which the sandbox knows the inode.
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
            Op::Forget(number) => self.remove(number),
            Op::Entry(dir, name, to) => {
                self.change(dir, &name, |entries, in_lower| {
                    entries.set(&name, to, in_lower);
                });
                if let Some(entries) = to.and_then(|to| self.dir_mut(to)) {
                    entries.parent = Some(dir);
                }
            }
            Op::Clear(dir, name) => self.change(dir, &name, |entries, _| entries.clear(&name)),
        }
    }

    /// Changes what the upper says of `name` in `dir`, and counts directories anew.
    fn change(&mut self, dir: u64, name: &[u8], change: impl FnOnce(&mut Dir, bool)) {
        let (was_dir, in_lower) = self.look(dir, name);
        if let Some(entries) = self.dir_mut(dir) {
            change(entries, in_lower);
        }
        let (is_dir, _) = self.look(dir, name);
        if let Some(entries) = self.dir_mut(dir) {
            let subdirs = entries.subdirs + u32::from(is_dir);
            entries.subdirs = subdirs.saturating_sub(u32::from(was_dir));
        }
    }

    fn dir_mut(&mut self, number: u64) -> Option<&mut Dir> {
        self.nodes.get_mut(&number)?.dir.as_deref_mut()
    }

    fn set_record(&mut self, number: u64, record: Record) {
        self.next = self.next.max(number + 1);
        if let Some(node) = self.nodes.get_mut(&number) {
            node.record = record;
            return;
        }
        let lower = record
            .origin
            .as_ref()
            .and_then(|path| self.lower.lookup_path(path))
            .filter(|lower| lower.node.kind() == record.kind())
            .map(|lower| lower.ino);
        if let Some(lower) = lower {
            self.by_lower.insert(lower, number);
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
        };
        self.nodes.insert(number, node);
    }

    /// Forgets an inode.
    pub fn remove(&mut self, number: u64) {
        self.next = self.next.max(number + 1);
        if let Some(node) = self.nodes.remove(&number)
            && let Some(lower) = node.lower
        {
            self.by_lower.remove(&lower);
        }
    }

    /// The changes that make this state out of nothing, in batches.
    pub fn snapshot(&self) -> Vec<Vec<Op>> {
        let mut ops = vec![Op::Chain(self.chain.clone())];
        if !self.applied.is_empty() {
            ops.push(Op::Applied(self.applied.clone()));
        }
        ops.extend(self.thawed.map(Op::Thawed));
        let kept = || self.nodes.iter().filter(|(_, node)| node.record.nlink != 0);
        for (&number, node) in kept() {
            ops.push(Op::Inode(number, Box::new(node.record.clone())));
        }
        for (&number, node) in kept() {
            for (name, to) in node.dir.iter().flat_map(|dir| dir.entries()) {
                ops.push(Op::Entry(number, name.into(), to));
            }
        }
        let mut batches = Vec::new();
        while ops.len() > BATCH {
            let rest = ops.split_off(BATCH);
            batches.push(std::mem::replace(&mut ops, rest));
        }
        batches.push(ops);
        batches
    }

    /// Roughly what [`State::snapshot`] takes as bytes.
    pub fn weight(&self) -> u64 {
        const INODE: u64 = 100;
        const ENTRY: u64 = 40;
        let entries = |node: &Node| node.dir.as_ref().map_or(0, |dir| dir.names.len() as u64);
        self.nodes
            .values()
            .map(|node| INODE + ENTRY * entries(node))
            .sum()
    }
}
