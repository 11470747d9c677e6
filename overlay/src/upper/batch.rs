//! The changes of one operation, collected and then committed as one batch.

use std::collections::BTreeMap;

use iii_store::Kind;

use super::commit::Inner;
use super::record::{Op, Record};
use super::state::State;
use crate::ino::Ino;
use crate::merge::{Lower, Merged};
use crate::posix::{Errno, Result, Time};

/// The changes of one operation. Nothing changes before [`Batch::commit`].
#[derive(Debug)]
pub struct Batch<'a> {
    inner: &'a mut Inner,
    inodes: BTreeMap<u64, Change>,
    entries: Vec<Op>,
    /// The time of the operation.
    pub now: Time,
}

#[derive(Debug)]
struct Change {
    record: Record,
    lower: Option<Ino>,
    /// Whether the log has a record of the inode.
    logged: bool,
}

/// The record of a lower inode that the upper has no record of yet.
pub fn lower_record(lower: &Merged, entry: Lower<'_>) -> Record {
    let meta = lower.meta(entry);
    if entry.node.kind() == Kind::Dir {
        return Record::of_lower(entry.node, meta, 1, &entry.node.path());
    }
    let paths = lower.visible_paths(entry);
    let origin = paths.first().cloned().unwrap_or_default();
    Record::of_lower(entry.node, meta, paths.len().max(1) as u32, &origin)
}

impl<'a> Batch<'a> {
    /// An empty batch.
    pub fn new(inner: &'a mut Inner) -> Self {
        Self {
            inner,
            inodes: BTreeMap::new(),
            entries: Vec::new(),
            now: Time::now(),
        }
    }

    /// The state before the batch.
    pub fn state(&self) -> &State {
        &self.inner.state
    }

    /// The inode's number and record, to be changed.
    pub fn inode(&mut self, ino: Ino) -> Result<(u64, &mut Record)> {
        let known = self.inner.state.number(ino);
        let fresh = || {
            self.inodes
                .iter()
                .find(|(_, change)| change.lower == Some(ino))
                .map(|(&number, _)| number)
        };
        let number = match known.or_else(fresh) {
            Some(number) => number,
            None => self.add_lower(ino)?,
        };
        let state = &self.inner.state;
        let change = match self.inodes.entry(number) {
            std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::btree_map::Entry::Vacant(entry) => {
                let node = state.node(number).ok_or(Errno::STALE)?;
                entry.insert(Change {
                    record: node.record.clone(),
                    lower: node.lower,
                    logged: node.record.nlink != 0,
                })
            }
        };
        Ok((number, &mut change.record))
    }

    /// The directory's number and record, with its times touched. It must have a name.
    pub fn parent(&mut self, dir: Ino) -> Result<u64> {
        let now = self.now;
        let (number, record) = self.inode(dir)?;
        if !record.is_dir() {
            return Err(Errno::NOTDIR);
        }
        if record.nlink == 0 {
            return Err(Errno::NOENT);
        }
        record.mtime = now;
        record.ctime = now;
        Ok(number)
    }

    fn add_lower(&mut self, ino: Ino) -> Result<u64> {
        let state = &mut self.inner.state;
        let entry = state.lower.get(ino).ok_or(Errno::STALE)?;
        let record = lower_record(&state.lower, entry);
        let number = state.next_number();
        let change = Change {
            record,
            lower: Some(ino),
            logged: false,
        };
        self.inodes.insert(number, change);
        Ok(number)
    }

    /// Adds a new inode and returns its number.
    pub fn add(&mut self, record: Record) -> Result<u64> {
        let number = self.inner.state.next_number();
        let change = Change {
            record,
            lower: None,
            logged: false,
        };
        self.inodes.insert(number, change);
        Ok(number)
    }

    /// Makes `name` in `dir` lead to `to`.
    pub fn set(&mut self, dir: u64, name: &[u8], to: u64) {
        self.entries.push(Op::Entry(dir, name.into(), Some(to)));
    }

    /// Makes `name` in `dir` absent.
    pub fn unset(&mut self, dir: u64, name: &[u8]) {
        let lower = match self.inodes.get(&dir) {
            Some(change) => change.lower,
            None => self.inner.state.node(dir).and_then(|node| node.lower),
        };
        let hidden = lower.is_some_and(|ino| self.inner.state.lower.lookup(ino, name).is_some());
        self.entries.push(if hidden {
            Op::Entry(dir, name.into(), None)
        } else {
            Op::Clear(dir, name.into())
        });
    }

    /// Removes one name of `ino`; a directory has only one.
    pub fn unlink(&mut self, ino: Ino) -> Result<()> {
        let now = self.now;
        let (_, record) = self.inode(ino)?;
        record.nlink = record.nlink.saturating_sub(1);
        record.ctime = now;
        Ok(())
    }

    /// Logs and applies all changes. On an error nothing has changed. An inode without names is not
    /// logged and stays in memory only, until the kernel forgets it.
    pub fn commit(self) -> Result<()> {
        let mut ops = Vec::with_capacity(self.inodes.len() + self.entries.len());
        let mut orphans = Vec::new();
        let mut gone = Vec::new();
        for (number, change) in self.inodes {
            if change.record.nlink != 0 {
                let known = self.inner.state.node(number).filter(|_| change.logged);
                let update = known.and_then(|node| change.record.update_of(&node.record));
                ops.push(match update {
                    Some(update) => Op::Update(number, Box::new(update)),
                    None => Op::Inode(number, Box::new(change.record)),
                });
            } else {
                if change.logged {
                    gone.push(Op::Forget(number));
                }
                orphans.push((number, change.record));
            }
        }
        ops.extend(self.entries);
        ops.extend(gone);
        self.inner.commit(ops, orphans)
    }
}
