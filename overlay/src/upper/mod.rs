//! The writable upper: the changes of the sandbox, keyed by inode number, never by path.
//!
//! ```text
//! lock          held (flock) by the process that has the upper open
//! log           every change of metadata: see [`log`]
//! log.reserve   space for a log that is rewritten on a full disk
//! data/s/n      the data written into files: see [`data`]
//! ```
//!
//! # Model
//!
//! An inode of the upper is a [`Record`]. The record of a directory comes with entries: each maps a
//! name to an inode, or marks it as absent (a whiteout). A record with an `origin` *is* the lower
//! inode at that path: every name that the lower has for that inode leads to the record, so the
//! first change of a lower inode makes a record and touches nothing else, neither its parents nor
//! its other names. Entries of a lower directory show through its record at any place of that
//! record; a rename of such a directory is an entry at the new place and a whiteout at the old.
//!
//! The upper keeps in memory only the sandbox's changes, and all of them: about 400 bytes for a
//! file and its name, plus its xattrs and target ([`state::MAX_MEMORY`]).
//!
//! # Durability
//!
//! Every operation appends one batch to the log before memory changes, so memory is never ahead of
//! the log, and a process that dies loses no change that it had answered. A write to a file marks
//! its record `dirty` once; from then on the flat file's own length and mtime are true, until the
//! record is written again. `fsync` makes the flat file and the log durable; a volatile upper,
//! which is discarded if its process dies, never syncs. After a power cut, the promises of ext4's
//! default options hold: [`commit`].

pub mod batch;
mod check;
pub mod commit;
mod compact;
pub mod data;
pub mod disk;
pub mod log;
pub mod record;
pub mod state;
pub mod writers;

use std::collections::{BTreeSet, VecDeque};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use iii_store::id::ID_LEN;
use rustix::fs::FlockOperation;

use crate::merge::Merged;
use crate::posix::Errno;
pub use check::{UpperReport, check};
pub use commit::{Inner, Upper};
use data::{FlatFiles, Found};
use disk::{Access, Disk, HostDisk};
use log::{Log, LogFacts, Reserve};
use record::{Body, Chain, Data, Op, Record};
use state::State;

/// When a log is opened, or closed with time to spare, it is compacted to less than this many times
/// the size of its state, so that opening it is quick.
const CLOSED_FACTOR: u64 = 2;
/// Most flat files that are synced one by one; for more, the whole filesystem of the host is
/// synced.
const SYNC_EACH: usize = 64;

/// The reasons that an upper cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum UpperError {
    /// Another process has the upper open.
    #[error("{} is in use by another process", .0.display())]
    Busy(PathBuf),
    /// The log has another format.
    #[error("{} is not the log of an upper", .0.display())]
    NotAnUpper(PathBuf),
    /// The log is damaged before the end of the part that is known to be durable.
    #[error(
        "{} is damaged at byte {offset}, so the changes stored after it are unknown", path.display()
    )]
    Damaged {
        /// The log.
        path: PathBuf,
        /// The offset in bytes where the damage begins.
        offset: u64,
    },
    /// The log exceeds the memory limit of an upper.
    #[error("the changes in {} need more than {} MiB of memory", path.display(), state::MAX_REPLAY_MEMORY >> 20)]
    TooLarge {
        /// The log.
        path: PathBuf,
    },
    /// A newer version wrote the log.
    #[error("{} has format version {version}: a newer iii wrote it", path.display())]
    Version {
        /// The log.
        path: PathBuf,
        /// The version found.
        version: u32,
    },
    /// The upper stands on other layers, and those cannot be read to carry its changes over.
    #[error("cannot read the layers that {} stands on, so its changes cannot be carried over", path.display())]
    Chain {
        /// The upper.
        path: PathBuf,
        /// The error of reading them.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The upper was made from a layer that cannot be read, and holds contents of it.
    #[error("cannot read the snapshot that {} was made from", path.display())]
    Thawed {
        /// The upper.
        path: PathBuf,
        /// The error of reading it.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// An operation of the operating system failed.
    #[error("{what} {} failed", path.display())]
    Io {
        /// The operation, as a participle.
        what: &'static str,
        /// The path that it was done to.
        path: PathBuf,
        /// The error of the operation.
        #[source]
        source: io::Error,
    },
}

pub(crate) fn io_error(what: &'static str, path: &Path) -> impl Fn(io::Error) -> UpperError {
    let path = path.to_path_buf();
    move |source| UpperError::Io {
        what,
        path: path.clone(),
        source,
    }
}

impl UpperError {
    fn damaged(path: &Path, offset: u64) -> Self {
        Self::Damaged {
            path: path.to_path_buf(),
            offset,
        }
    }
}

/// The lock of an upper, held until this is dropped.
#[derive(Debug)]
struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        // A process that another thread is starting also has the file open, until it executes its
        // program.
        let _ = rustix::fs::flock(&self.0, FlockOperation::Unlock);
    }
}

/// An upper that was read, before its chain was compared. Nothing has been changed.
#[derive(Debug)]
pub struct Opened {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    lock: Lock,
    log: Option<LogFacts>,
    /// The state of the log, not bound to any lower.
    state: State,
    known: bool,
    data: FlatFiles,
    found: Found,
    /// Inodes that the log describes after the part that is known to be durable.
    tail: BTreeSet<u64>,
    has_tail: bool,
    /// Flat files that have to be durable before the log is.
    ordered: BTreeSet<u64>,
    /// Changes of the state that the log does not have yet.
    corrections: Vec<Op>,
}

impl Opened {
    /// Opens and locks the upper in `dir`, made when missing.
    pub fn new(dir: &Path) -> Result<Self, UpperError> {
        Self::new_on(Arc::new(HostDisk), dir)
    }

    /// [`Opened::new`], which makes and syncs files through `disk`.
    pub fn new_on(disk: Arc<dyn Disk>, dir: &Path) -> Result<Self, UpperError> {
        disk.create_dirs(dir).map_err(io_error("creating", dir))?;
        let path = dir.join("lock");
        let lock = disk.open(&path, Access::Make);
        let lock = lock.map_err(io_error("opening", &path))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(UpperError::Busy(dir.to_path_buf())),
            Err(error) => return Err(io_error("locking", &path)(error.into())),
        }
        let lock = Lock(lock);
        let (data, found) = FlatFiles::open(Arc::clone(&disk), dir)?;
        let lower = Merged::new(Vec::new()).map_err(|_| UpperError::NotAnUpper(dir.into()))?;
        let mut state = State::new(Arc::new(lower));
        let mut known = false;
        // The changes that are not known to be durable: few, as a log in use is committed often.
        let mut changes: VecDeque<(u64, u64)> = VecDeque::new();
        let mut last = 0;
        let log = read_log(&*disk, dir, &mut |facts, at, op| {
            while changes.front().is_some_and(|(at, _)| *at < facts.durable) {
                changes.pop_front();
            }
            if let Some(number) = op.inode().filter(|_| at >= facts.durable) {
                changes.push_back((at, number));
            }
            known |= matches!(op, Op::Chain(_));
            last = at;
            state.replay(op);
            if state.memory() > state::MAX_REPLAY_MEMORY {
                let path = dir.join(log::NAME);
                return Err(UpperError::TooLarge { path });
            }
            Ok(())
        })?;
        let mut tail = BTreeSet::new();
        let mut has_tail = false;
        match &log {
            Some(log) => {
                has_tail = last >= log.durable;
                let late = changes.iter().filter(|(at, _)| *at >= log.durable);
                tail.extend(late.map(|(_, number)| number));
            }
            // A log gets its name only once it is durable, and the name is durable before the log
            // names a flat file.
            None if !found.is_empty() && dir.join(log::NAME).exists() => {
                return Err(UpperError::damaged(&dir.join(log::NAME), 0));
            }
            None => {}
        }
        Ok(Self {
            disk,
            dir: dir.to_path_buf(),
            lock,
            log,
            state,
            known,
            data,
            found,
            tail,
            has_tail,
            ordered: BTreeSet::new(),
            corrections: Vec::new(),
        })
    }

    /// The directory of the upper.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The flat files of the upper.
    pub fn data(&self) -> &FlatFiles {
        &self.data
    }

    /// The chain that the upper stood on last; none if it is new.
    pub fn chain(&self) -> Option<&Chain> {
        self.known.then_some(&self.state.chain)
    }

    /// The layers of the project whose changes the upper has taken over since.
    pub fn applied(&self) -> &[[u8; ID_LEN]] {
        &self.state.applied
    }

    /// The layer that the upper was made from.
    pub fn thawed(&self) -> Option<[u8; ID_LEN]> {
        self.state.thawed
    }

    /// Makes sure that a flat file becomes durable before the log names it.
    pub fn order(&mut self, flat: u64) {
        self.ordered.insert(flat);
    }

    /// The state of the log, over the chain that it stood on, with the true length and mtime of the
    /// files that were written to last.
    pub fn replay(&mut self, lower: Arc<Merged>) -> Result<State, UpperError> {
        let empty = State::new(Arc::clone(&lower));
        let mut state = std::mem::replace(&mut self.state, empty);
        state.bind(lower);
        // After a power cut, a record may have a length whose bytes did not survive.
        let doubted = self.log.is_some_and(|log| log.rebooted);
        let mut corrected = Vec::new();
        for (number, node) in state.nodes() {
            let Some(flat) = node.record.flat() else {
                continue;
            };
            if self.tail.contains(&number) {
                self.ordered.insert(flat);
            }
            if !self.found.has(flat) {
                // The machine went down before the file was durable, and no program had synced
                // it.
                corrected.push((number, None));
            } else if doubted || is_dirty(&node.record) {
                let stat = self.data.stat(flat);
                let stat = stat.map_err(io_error("reading metadata of a file in", &self.dir))?;
                if is_dirty(&node.record) || stat.st_size as u64 != node.record.size() {
                    corrected.push((number, Some(stat)));
                }
            }
        }
        for (number, stat) in corrected {
            let Some(node) = state.node_mut(number) else {
                continue;
            };
            let was = node.record.clone();
            match stat {
                Some(stat) => settle(&mut node.record, &stat),
                None => {
                    node.record.body = Body::File {
                        data: Data::Empty,
                        size: 0,
                    };
                }
            }
            if !is_dirty(&was)
                && let Some(update) = node.record.update_of(&was)
            {
                let op = Op::Update(number, Box::new(update));
                self.corrections.push(op);
            }
        }
        Ok(state)
    }

    /// The upper with this state. Writes the state down unless it is `written`: the log has it
    /// already.
    pub fn start(self, state: State, written: bool, volatile: bool) -> Result<Upper, UpperError> {
        let dir = self.dir.clone();
        let fail = io_error("writing the log in", &dir);
        let goes_on = self.log.filter(|log| {
            written && log.version == log::VERSION && !is_bulky(log.holds, &state, CLOSED_FACTOR)
        });
        let old = self.log.is_some_and(|log| log.version < log::VERSION);
        if old && !volatile {
            self.data.sync_all().map_err(&fail)?;
        } else {
            commit::sync_flats(&self.data, &self.ordered, volatile).map_err(&fail)?;
        }
        let mut reserve = Reserve::new(Arc::clone(&self.disk), &self.dir);
        let log = if let Some(facts) = goes_on {
            self.go_on(&facts, volatile).map_err(&fail)?
        } else {
            let mut log = self.rewrite(&state, volatile);
            if log.as_ref().is_err_and(log::is_full) {
                reserve.release();
                log = self.rewrite(&state, volatile);
            }
            log.map_err(&fail)?
        };
        // From here on, no log names the other flat files.
        let mut live: Vec<u64> = state.nodes().filter_map(|(_, n)| n.record.flat()).collect();
        live.sort_unstable();
        self.data.sweep(&self.found, &live)?;
        Ok(Upper::new(
            self.disk, self.dir, self.data, volatile, state, log, reserve, self.lock,
        ))
    }

    /// Continues the log: cuts off the part that does not hold, and appends the corrections.
    fn go_on(&self, facts: &LogFacts, volatile: bool) -> io::Result<Log> {
        let mut log = Log::go_on(Arc::clone(&self.disk), &self.dir, facts, volatile)?;
        for ops in self.corrections.chunks(state::BATCH) {
            log.append(ops)?;
        }
        if !volatile && (self.has_tail || !self.corrections.is_empty()) {
            // The flat files that the tail no longer names are removed next, so the tail has to be
            // durable.
            let to = log.size();
            log.commit(to)?;
            self.disk.sync(&log.file(), true)?;
            self.disk.sync_dir(&self.dir)?;
            log.acknowledge(to);
        }
        log.settle()?;
        Ok(log)
    }

    /// Replaces the log by one of exactly this state.
    fn rewrite(&self, state: &State, volatile: bool) -> io::Result<Log> {
        let log = log::write_whole(&self.disk, &self.dir, state, volatile)?;
        log.publish().inspect_err(|_| log.discard())?;
        if !volatile && !state.says_nothing() {
            self.disk.sync_dir(&self.dir)?;
            // Makes the name of a new upper durable, if this process may open the parent.
            let _ = self.dir.parent().map(|parent| self.disk.sync_dir(parent));
        }
        Ok(log)
    }
}

/// Reads the log in `dir`; none if it is missing.
fn read_log(
    disk: &dyn Disk,
    dir: &Path,
    each: &mut dyn FnMut(&LogFacts, u64, Op) -> Result<(), UpperError>,
) -> Result<Option<LogFacts>, UpperError> {
    let path = dir.join(log::NAME);
    let file = match disk.open(&path, Access::Read) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(io_error("opening", &path))?,
    };
    log::read(&file, &path, disk.boot(), each)
}

/// The layer that the upper was made from, by the first batch of its log.
pub(crate) fn thawed(first: &[Op]) -> Option<[u8; ID_LEN]> {
    first.iter().find_map(|op| match op {
        Op::Thawed(layer) => Some(*layer),
        _ => None,
    })
}

fn is_bulky(size: u64, state: &State, factor: u64) -> bool {
    size > compact::COMPACT_MIN && size > factor * state.weight()
}

fn is_dirty(record: &Record) -> bool {
    matches!(
        record.body,
        Body::File {
            data: Data::Flat { dirty: true, .. },
            ..
        }
    )
}

/// Copies length and mtime of a file from its flat file.
fn settle(record: &mut Record, stat: &rustix::fs::Stat) {
    if let Body::File { size, .. } = &mut record.body {
        *size = stat.st_size as u64;
        record.mtime.sec = stat.st_mtime;
        record.mtime.nsec = stat.st_mtime_nsec as u32;
        record.ctime = record.ctime.max(record.mtime);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_leads_out_of_an_upper() {
        let outside = tempfile::tempdir().unwrap();
        std::fs::create_dir(outside.path().join("dir")).unwrap();
        std::fs::write(outside.path().join("file"), "").unwrap();
        for (name, target) in [
            ("data", "dir"),
            ("data/0", "dir"),
            ("log", "file"),
            ("lock", "file"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            if name == "data/0" {
                std::fs::create_dir(dir.path().join("data")).unwrap();
            }
            let link = dir.path().join(name);
            std::os::unix::fs::symlink(outside.path().join(target), link).unwrap();
            assert!(Opened::new(dir.path()).is_err(), "{name}");
        }
    }
}
