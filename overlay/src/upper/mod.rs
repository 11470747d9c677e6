//! The writable upper: what the sandbox changed, keyed by inode number, never by path.
//!
//! ```text
//! lock        held (flock) by the process that has the upper open
//! log         every change of metadata: see [`log`]
//! data/s/n    what was written into files: see [`data`]
//! ```
//!
//! # Model
//!
//! An inode of the upper is a [`Record`]; a directory's record comes with entries that say of a name which inode it
//! leads to, or that it is absent (a whiteout). A record with an `origin` *is* the lower inode at that path: every name that
//! the lower has for that inode leads to the record, so the first change of a lower inode makes a record and touches
//! nothing else, neither its parents nor its other names. Entries of a lower directory show through its record wherever that
//! record is; renaming one is an entry at the new place and a whiteout at the old.
//!
//! Only the sandbox's changes are in memory, and all of them: about 300 bytes per inode.
//!
//! # Durability
//!
//! Every operation appends one batch to the log before memory changes, so memory is never ahead of the log, and a process
//! that dies loses nothing that it had answered. A file's data is complete before the batch that names it. Writing to a
//! file marks its record `dirty` once; from then on the flat file's own length and mtime are the truth, until the record is
//! written again. `fsync` makes the flat file, then the log durable; a volatile upper, which is thrown away if its process
//! dies, never syncs. Flat files that no record names are removed at opening.

pub mod batch;
pub mod data;
pub mod log;
pub mod record;
pub mod state;
pub mod writers;

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use iii_store::id::ID_LEN;
use rustix::fs::FlockOperation;

use crate::fs::Errno;
use crate::merge::Merged;
use data::{FlatFiles, Found};
use log::Log;
use record::{Body, Chain, Data, Op, Record};
use state::State;
use writers::Writers;

/// A log below this size is never compacted.
const COMPACT_MIN: u64 = 2 << 20;
/// A log is compacted while it is in use when it is this many times the size of what it says.
const COMPACT_FACTOR: u64 = 4;
/// A log that is closed, with time to spare, or opened is brought down to less than this many times that, so that
/// opening it is quick.
const CLOSED_FACTOR: u64 = 2;

/// Why an upper cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum UpperError {
    /// Another process has it open.
    #[error("{} is in use by another process", .0.display())]
    Busy(PathBuf),
    /// Its log is not one.
    #[error("{} is not the log of an upper", .0.display())]
    NotAnUpper(PathBuf),
    /// A newer version wrote it.
    #[error("{} has format version {version}: a newer iii wrote it", path.display())]
    Version {
        /// The log.
        path: PathBuf,
        /// The version found.
        version: u32,
    },
    /// It stands on other layers, and those are not at hand to carry its changes over.
    #[error("the layers that {} stands on cannot be read, so its changes cannot be carried over", path.display())]
    Chain {
        /// The upper.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It was made from a layer that cannot be read, and holds contents of it.
    #[error("the snapshot that {} was made from cannot be read", path.display())]
    Thawed {
        /// The upper.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The operating system refused.
    #[error("{what} {} failed", path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
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

/// How files of an upper are opened. What wrote it before may have been a guest that had taken over its server, so that no name
/// leads elsewhere, and nothing is waited for.
fn options() -> OpenOptions {
    let mut options = File::options();
    options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    options
}

/// The errno of an I/O error, for the sandbox to see.
pub(crate) fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(match error.kind() {
        io::ErrorKind::FileTooLarge => Errno::FBIG,
        _ => Errno::IO,
    })
}

/// What opening found, before it is known whether the chain is the same.
#[derive(Debug)]
pub struct Opened {
    dir: PathBuf,
    lock: File,
    log: Log,
    batches: Vec<Vec<Op>>,
    data: FlatFiles,
    found: Found,
}

impl Opened {
    /// Opens and locks the upper in `dir`, made when missing.
    pub fn new(dir: &Path) -> Result<Self, UpperError> {
        std::fs::create_dir_all(dir).map_err(io_error("creating", dir))?;
        let path = dir.join("lock");
        let lock = options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(io_error("opening", &path))?;
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(UpperError::Busy(dir.to_path_buf())),
            Err(error) => return Err(io_error("locking", &path)(error.into())),
        }
        let (log, batches) = Log::open(dir)?;
        let (data, found) = FlatFiles::open(dir)?;
        Ok(Self {
            dir: dir.to_path_buf(),
            lock,
            log,
            batches,
            data,
            found,
        })
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Its flat files.
    pub fn data(&self) -> &FlatFiles {
        &self.data
    }

    /// The chain that it stood on last; none if it is new.
    pub fn chain(&self) -> Option<&Chain> {
        self.batches
            .iter()
            .rev()
            .flat_map(|batch| batch.iter().rev())
            .find_map(|op| match op {
                Op::Chain(chain) => Some(chain),
                _ => None,
            })
    }

    /// The layers of the project whose changes it has taken over since.
    pub fn applied(&self) -> &[[u8; ID_LEN]] {
        let batches = self.batches.iter().rev();
        let last = batches
            .flat_map(|batch| batch.iter().rev())
            .find_map(|op| match op {
                Op::Applied(layers) => Some(layers.as_slice()),
                _ => None,
            });
        last.unwrap_or_default()
    }

    /// The layer that it was made from.
    pub fn thawed(&self) -> Option<[u8; ID_LEN]> {
        self.batches.first().and_then(|batch| thawed(batch))
    }

    /// What the log says, over the chain that it stood on; with the true length and mtime of what was written to last.
    pub fn replay(&mut self, lower: Arc<Merged>) -> Result<State, UpperError> {
        let mut state = State::new(lower);
        for op in std::mem::take(&mut self.batches).into_iter().flatten() {
            state.apply(op);
        }
        for node in state.nodes_mut() {
            let Some(flat) = node.record.flat() else {
                continue;
            };
            if !self.found.numbers.contains(&flat) {
                // The machine went down before the file, of which nobody had asked that it be durable, was.
                node.record.body = Body::File {
                    data: Data::Empty,
                    size: 0,
                };
            } else if is_dirty(&node.record) {
                let stat = self.data.stat(flat);
                let stat = stat.map_err(io_error("looking at a file of", &self.dir))?;
                settle(&mut node.record, &stat);
            }
        }
        Ok(state)
    }

    /// The upper with this state, which is written down unless the log says it already.
    pub fn start(
        mut self,
        state: State,
        written: bool,
        volatile: bool,
    ) -> Result<Upper, UpperError> {
        let bulky = is_bulky(&self.log, &state, CLOSED_FACTOR);
        if !written || bulky {
            let batches = state.snapshot();
            // An upper that says nothing has nothing to lose.
            let durable = !volatile && !state.says_nothing();
            self.log
                .rewrite(batches.iter().map(Vec::as_slice), durable)
                .map_err(io_error("rewriting the log in", &self.dir))?;
        }
        // Only now does nothing name the others any more.
        let live: HashSet<u64> = state.nodes().filter_map(|(_, n)| n.record.flat()).collect();
        self.data.sweep(&self.found, &live)?;
        Ok(Upper {
            dir: self.dir,
            data: self.data,
            writers: Writers::default(),
            volatile,
            inner: RwLock::new(Inner {
                state,
                compact_at: COMPACT_MIN.max(self.log.size()),
                log: self.log,
            }),
            _lock: self.lock,
        })
    }
}

/// What the first batch of a log says of the layer that the upper was made from.
pub(crate) fn thawed(first: &[Op]) -> Option<[u8; ID_LEN]> {
    first.iter().find_map(|op| match op {
        Op::Thawed(layer) => Some(*layer),
        _ => None,
    })
}

fn is_bulky(log: &Log, state: &State, factor: u64) -> bool {
    log.size() > COMPACT_MIN && log.size() > factor * state.weight()
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

/// Takes length and mtime of a dirty file from its flat file, which stays the truth.
fn settle(record: &mut Record, stat: &rustix::fs::Stat) {
    if let Body::File { size, .. } = &mut record.body {
        *size = stat.st_size as u64;
        record.mtime.sec = stat.st_mtime;
        record.mtime.nsec = stat.st_mtime_nsec as u32;
        record.ctime = record.ctime.max(record.mtime);
    }
}

/// State and log, changed together.
#[derive(Debug)]
pub struct Inner {
    /// What the log says.
    pub state: State,
    log: Log,
    /// The length of the log at which to ask again whether it is worth compacting.
    compact_at: u64,
}

impl Inner {
    /// Logs a batch, then applies it. On an error nothing has changed. The `orphans`, inodes without a name, are in
    /// memory from then on, whatever the batch says of them.
    pub fn commit(&mut self, ops: Vec<Op>, orphans: Vec<(u64, Record)>) -> Result<(), Errno> {
        if !ops.is_empty() {
            self.log.append(&ops).map_err(|error| errno(&error))?;
        }
        for op in ops {
            match op {
                Op::Forget(_) => {}
                op => self.state.apply(op),
            }
        }
        for (number, record) in orphans {
            self.state.apply(Op::Inode(number, Box::new(record)));
        }
        Ok(())
    }
}

/// An open upper. Dropping it writes down what was left to be told by flat files, and lets go of the lock.
#[derive(Debug)]
pub struct Upper {
    dir: PathBuf,
    /// The flat files.
    pub data: FlatFiles,
    /// Who writes to them.
    pub writers: Writers,
    /// Whether nothing is ever synced.
    pub volatile: bool,
    inner: RwLock<Inner>,
    _lock: File,
}

impl Upper {
    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// To look.
    pub fn read(&self) -> RwLockReadGuard<'_, Inner> {
        // A panic under the lock leaves the log ahead of memory at worst, as a kill does; going on is no worse.
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// To change.
    pub fn write(&self) -> RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the log a fresh snapshot, if most of it is garbage.
    pub fn compact(&self, inner: &mut Inner) {
        if inner.log.size() < inner.compact_at {
            return;
        }
        if is_bulky(&inner.log, &inner.state, COMPACT_FACTOR) {
            self.rewrite(inner);
        }
        inner.compact_at = inner.log.size() + COMPACT_MIN;
    }

    fn rewrite(&self, inner: &mut Inner) {
        let batches = inner.state.snapshot();
        // A failure leaves the old log, which says the same.
        let _ = inner
            .log
            .rewrite(batches.iter().map(Vec::as_slice), !self.volatile);
    }

    /// Makes every change so far durable.
    pub fn sync(&self) -> Result<(), Errno> {
        if self.volatile {
            return Ok(());
        }
        let handle = self.read().log.handle();
        let synced = handle.and_then(|log| log.sync_data());
        synced.map_err(|error| {
            self.write().log.break_off();
            errno(&error)
        })
    }

    /// Makes every change so far durable, and what was written to any flat file: by syncing the whole filesystem of the host
    /// below, since there may be very many.
    pub fn sync_all(&self) -> Result<(), Errno> {
        if self.volatile {
            return Ok(());
        }
        crate::host::syncfs(&File::open(&self.dir).map_err(|error| errno(&error))?)?;
        self.sync()
    }

    /// Makes what was written to the flat file of the inode durable, and its name.
    pub fn sync_flat(&self, number: u64, flat: u64, data_only: bool) -> Result<(), Errno> {
        if self.volatile {
            return Ok(());
        }
        let named = self.read().state.node(number).is_none_or(|n| n.flat_named);
        self.data
            .sync(flat, !named, data_only)
            .map_err(|error| errno(&error))?;
        if let Some(node) = self.write().state.node_mut(number).filter(|_| !named) {
            node.flat_named = true;
        }
        Ok(())
    }

    /// Writes down length and mtime of the files that were written to, so that the next opening need not look.
    fn settle(&self) -> Result<(), Errno> {
        let mut inner = self.write();
        let mut ops = Vec::new();
        for (number, node) in inner.state.nodes() {
            if is_dirty(&node.record) && node.record.nlink != 0 {
                let mut record = node.record.clone();
                if let Body::File {
                    data: Data::Flat { dirty, .. },
                    ..
                } = &mut record.body
                {
                    *dirty = false;
                }
                ops.push(Op::Inode(number, Box::new(record)));
            }
        }
        for ops in ops.chunks(state::BATCH) {
            inner.commit(ops.to_vec(), Vec::new())?;
        }
        if is_bulky(&inner.log, &inner.state, CLOSED_FACTOR) {
            self.rewrite(&mut inner);
        }
        Ok(())
    }
}

impl Drop for Upper {
    fn drop(&mut self) {
        if !self.volatile {
            // What is not written down here is read from the flat files at the next opening.
            let _ = self.settle();
        }
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
