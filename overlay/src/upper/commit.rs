//! Makes changes durable, with the promises of ext4's default options.
//!
//! The log and the flat files are files of the host, and the host writes them to disk at any time
//! and in any order. A *commit* imposes an order:
//!
//! 1. The flat files whose contents *replace* others, and that a batch before this moment names,
//!    are synced.
//! 2. [`Op::Commit`] is appended: everything before that moment is as durable as it has to be.
//! 3. The log is synced.
//! 4. Flat files that were dropped, because the log named them before and no longer does, are
//!    removed.
//!
//! Contents replace others where a file is renamed over another, where a file with contents was
//! emptied and is written again, and where the first write to a lower file copied it. So after a
//! power cut the file has the old or the new contents. A new file that replaces nothing, and that
//! no program synced, may be empty or missing, as on ext4. When an upper is opened after a start of
//! the host, the length of each record is checked against the flat file, so that `stat` and `read`
//! agree.
//!
//! A commit happens when a program asks for it (`fsync`, `sync`), at the end, and [`INTERVAL`]
//! after the first uncommitted change, which is ext4's default too. All callers that wait for a
//! commit share one. `fsync` of a file syncs its flat file and commits at the same time, so that
//! the host can put both into one transaction of its own.
//!
//! # Invariants
//!
//! - The log that holds after a power cut ends at a commit, and names no flat file that has been
//!   removed.
//! - A flat file that a committed log may name is removed only after a later commit that no longer
//!   names it.
//! - Commits, and every change of the log's name to another log, take turns (`turn`). The turn is
//!   taken before the lock of the state.
//! - No step that can fail stands between giving a new log its name and appending to it.

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{
    Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::compact::{COMPACT_MIN, Compaction};
use super::data::FlatFiles;
use super::disk::Disk;
use super::log::{self, Log, Reserve};
use super::record::{Body, Bytes, Data, Op, Record, Update};
use super::state::{self, MAX_MEMORY, Node, REMOVAL_MEMORY, State};
use super::writers::Writers;
use super::{CLOSED_FACTOR, Lock, SYNC_EACH, is_bulky, is_dirty};
use crate::posix::{Errno, errno};

/// Longest time that a change stays uncommitted if no program asks for a commit: that of ext4's
/// `commit` option.
const INTERVAL: Duration = Duration::from_secs(5);
/// Most flat files that wait for a commit before they are removed; with more, the commit comes at
/// once.
const MAX_DOOMED: usize = 4096;
/// Waits for the kernel to forget removed files, before an operation finds no space.
const FORGET_WAITS: u32 = 10;
/// The length of such a wait.
const FORGET_WAIT: Duration = Duration::from_millis(1);

/// State and log, which change together.
#[derive(Debug)]
pub struct Inner {
    /// The state that the log describes.
    pub state: State,
    pub(super) log: Log,
    /// The log that will replace the current one.
    pub(super) compaction: Option<Compaction>,
    /// The length of the log at which to check again whether it is worth compacting.
    pub(super) compact_at: u64,
    reserve: Reserve,
    /// Number of batches so far, and of those that are committed.
    batches: u64,
    committed: u64,
    /// Flat files that have to be durable before the log is.
    ordered: BTreeSet<u64>,
    /// Dropped flat files, each after the number of batches at which the log stopped naming it.
    doomed: VecDeque<(u64, u64)>,
    /// No commit names a flat file from this number on.
    unnamed: u64,
    /// Whether the log's name is durable.
    is_named: bool,
    /// Most memory that the state may take: [`MAX_MEMORY`].
    most_memory: u64,
    core: Arc<Shared>,
}

/// The parts that the lock of an upper does not guard.
#[derive(Debug)]
struct Shared {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    data: Arc<FlatFiles>,
    volatile: bool,
    alarm: Alarm,
}

impl Inner {
    /// Logs a batch, then applies it. On an error nothing has changed. The `orphans`, inodes
    /// without a name, stay in memory from then on, even if the batch forgets them.
    pub fn commit(&mut self, ops: Vec<Op>, orphans: Vec<(u64, Record)>) -> Result<(), Errno> {
        if !ops.is_empty() {
            self.log(&ops).map_err(|error| errno(&error))?;
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

    fn log(&mut self, ops: &[Op]) -> io::Result<()> {
        let growth = self.state.growth(ops);
        let removes = ops.iter().any(Op::removes);
        let most = self.most_memory + if removes { REMOVAL_MEMORY } else { 0 };
        if growth > 0 && self.state.memory() + growth > most {
            return Err(Errno::NOSPC.into());
        }
        if !removes {
            self.reserve.hold(self.state.weight() + growth)?;
        }
        self.log.append(ops)?;
        if self.compaction.as_mut().is_some_and(|new| !new.add(ops)) {
            self.abandon();
        }
        self.batches += 1;
        if !self.core.volatile {
            self.core.alarm.raise(false);
        }
        Ok(())
    }

    /// Makes sure that the data of the inode's flat file becomes durable before any batch that was
    /// logged so far.
    pub fn order(&mut self, number: u64) {
        let Some(node) = self.state.node_mut(number).filter(|node| !node.synced) else {
            return;
        };
        match (node.record.flat(), &node.record.body) {
            (Some(flat), _) if !self.core.volatile => {
                self.ordered.insert(flat);
            }
            // The next write makes the flat file.
            (None, Body::File { size: 0, .. }) => node.replaces = true,
            _ => {}
        }
    }

    /// Notes that the inode has another flat file, which is complete. If `is_new`, the inode had no
    /// contents of its own before: it was empty or had those of the lower.
    pub fn switched(&mut self, number: u64, is_new: bool) {
        let Some(node) = self.state.node_mut(number).filter(|_| is_new) else {
            return;
        };
        node.synced = false;
        // A lower file has contents that may be replaced; only a new file has none.
        if node.replaces || node.record.size() != 0 {
            node.replaces = false;
            self.order(number);
        }
    }

    /// Notes that the inode is empty now, and had the contents `was` before.
    pub(crate) fn emptied(&mut self, number: u64, was: &Bytes) {
        if let Some(node) = self.state.node_mut(number) {
            node.replaces |= was.size != 0;
        }
        if let Data::Flat { number, .. } = was.data {
            self.doom(number);
        }
    }

    /// Removes a flat file that the log no longer names, once that change is as durable as it has
    /// to be.
    pub fn doom(&mut self, flat: u64) {
        self.ordered.remove(&flat);
        let is_durable = self.committed >= self.batches;
        if self.core.volatile || flat >= self.unnamed || is_durable {
            self.core.data.remove(flat);
            return;
        }
        self.doomed.push_back((self.batches, flat));
        if self.doomed.len() >= MAX_DOOMED {
            self.core.alarm.raise(true);
        }
    }

    pub(super) fn begin_log(&self) -> io::Result<Log> {
        let core = &self.core;
        Log::begin(Arc::clone(&core.disk), &core.dir, core.volatile)
    }

    /// Discards the log that is being written.
    pub(super) fn abandon(&mut self) {
        if let Some(compaction) = self.compaction.take() {
            compaction.log.discard();
        }
    }

    /// Gives the compacted log the name of the old one; later batches are appended to the compacted
    /// log.
    fn replace_log(&mut self) -> bool {
        let Some(compaction) = self.compaction.take() else {
            return false;
        };
        if compaction.log.publish().is_err() {
            compaction.log.discard();
            return false;
        }
        self.log = compaction.log;
        self.is_named = false;
        self.compact_at = self.log.size() + COMPACT_MIN;
        true
    }

    /// All changes so far, as a commit has to make them durable.
    fn begin_commit(&mut self, to: u64) -> Commit {
        // Only a later commit names the files that are made from here on.
        self.unnamed = self.core.data.next();
        Commit {
            to,
            batches: self.batches,
            ordered: std::mem::take(&mut self.ordered),
        }
    }

    /// Notes that the commit is durable, and returns the flat files that can be removed.
    fn end_commit(&mut self, commit: &Commit) -> Vec<u64> {
        self.committed = self.committed.max(commit.batches);
        let gone = self.doomed.iter();
        let gone = gone.take_while(|(batches, _)| *batches <= commit.batches);
        let gone = gone.count();
        self.doomed.drain(..gone).map(|(_, flat)| flat).collect()
    }
}

/// A commit in progress.
#[derive(Debug)]
struct Commit {
    /// The offset in the log before which everything becomes durable.
    to: u64,
    batches: u64,
    ordered: BTreeSet<u64>,
}

/// Makes the flat files and their names durable.
pub(super) fn sync_flats(
    data: &FlatFiles,
    flats: &BTreeSet<u64>,
    volatile: bool,
) -> io::Result<()> {
    if volatile || flats.is_empty() {
        return Ok(());
    }
    if flats.len() > SYNC_EACH {
        return data.sync_all();
    }
    for &flat in flats {
        match data.sync(flat, true) {
            // The file was removed meanwhile, so the log records that.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            synced => synced?,
        }
    }
    Ok(())
}

/// An open upper. Dropping it logs the length and mtime that only the flat files have, commits, and
/// releases the lock.
#[derive(Debug)]
pub struct Upper {
    core: Arc<Core>,
    committer: Mutex<Option<JoinHandle<()>>>,
    _lock: Lock,
}

/// The part of an upper that the commit thread shares.
#[derive(Debug)]
pub struct Core {
    /// The flat files.
    pub data: Arc<FlatFiles>,
    /// The writers to the flat files.
    pub writers: Writers,
    /// Whether nothing is ever synced.
    pub volatile: bool,
    shared: Arc<Shared>,
    /// Held during a commit or a replacement of the log; taken before `inner`.
    turn: Mutex<()>,
    inner: RwLock<Inner>,
}

impl Deref for Upper {
    type Target = Core;

    fn deref(&self) -> &Core {
        &self.core
    }
}

impl Upper {
    #[allow(clippy::too_many_arguments)]
    pub(super) fn new(
        disk: Arc<dyn Disk>,
        dir: PathBuf,
        data: FlatFiles,
        volatile: bool,
        state: State,
        log: Log,
        reserve: Reserve,
        lock: Lock,
    ) -> Self {
        let data = Arc::new(data);
        let shared = Arc::new(Shared {
            disk,
            dir,
            data: Arc::clone(&data),
            volatile,
            alarm: Alarm::default(),
        });
        let inner = Inner {
            state,
            compaction: None,
            compact_at: COMPACT_MIN.max(log.size()),
            log,
            reserve,
            batches: 0,
            committed: 0,
            ordered: BTreeSet::new(),
            doomed: VecDeque::new(),
            unnamed: data.next(),
            is_named: false,
            most_memory: MAX_MEMORY,
            core: Arc::clone(&shared),
        };
        Self {
            core: Arc::new(Core {
                data,
                writers: Writers::default(),
                volatile,
                shared,
                turn: Mutex::default(),
                inner: RwLock::new(inner),
            }),
            committer: Mutex::default(),
            _lock: lock,
        }
    }

    /// Locks the state to change it.
    pub fn write(&self) -> RwLockWriteGuard<'_, Inner> {
        self.watch();
        self.core.lock()
    }

    /// Starts the commit thread, unless it runs or the upper is volatile.
    fn watch(&self) {
        if self.volatile || self.shared.alarm.is_heard.load(Ordering::Relaxed) {
            return;
        }
        let mut committer = self
            .committer
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if committer.is_some() {
            return;
        }
        let core = Arc::clone(&self.core);
        let thread = std::thread::Builder::new().name("iii-commit".into());
        // Without a thread, commits happen only on request.
        *committer = thread.spawn(move || core.commit_in_time()).ok();
        self.shared.alarm.is_heard.store(true, Ordering::Relaxed);
    }

    /// Call it when the snapshot of a compaction is complete.
    pub(super) fn compacted(&self, inner: &mut Inner) {
        if self.volatile {
            inner.replace_log();
        } else {
            self.shared.alarm.raise(true);
        }
    }
}

impl Core {
    /// The directory of the upper.
    pub fn dir(&self) -> &Path {
        &self.shared.dir
    }

    /// Locks the state to read it.
    pub fn read(&self) -> RwLockReadGuard<'_, Inner> {
        // A panic under the lock leaves the log at worst ahead of memory, as a kill does, so it is
        // safe to continue.
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes every change so far durable.
    pub fn sync(&self) -> Result<(), Errno> {
        self.commit(false)
    }

    /// Makes every change so far durable, and the data of all flat files: it syncs the whole
    /// filesystem of the host, since the flat files may be very many.
    pub fn sync_all(&self) -> Result<(), Errno> {
        self.commit(true)
    }

    /// Makes every change so far durable, and the data of the flat file of the inode with this
    /// number.
    pub fn fsync(&self, number: u64, data_only: bool) -> Result<(), Errno> {
        if self.volatile {
            return Ok(());
        }
        let (flat, has_changes) = {
            let mut inner = self.lock();
            let has_changes = inner.batches > inner.committed;
            let ordered = &inner.ordered;
            let node = inner.state.node(number);
            let flat = node
                .filter(|node| !node.synced)
                .and_then(|node| node.record.flat())
                // The commit syncs this flat file.
                .filter(|flat| !ordered.contains(flat));
            // A write after this moment clears the mark again.
            if flat.is_some()
                && let Some(node) = inner.state.node_mut(number)
            {
                node.synced = true;
            }
            (flat, has_changes)
        };
        let Some(flat) = flat else {
            return self.commit(false);
        };
        let sync = || {
            self.data
                .sync(flat, data_only)
                .map_err(|error| errno(&error))
        };
        let synced = if has_changes {
            std::thread::scope(|scope| {
                let syncing = std::thread::Builder::new().spawn_scoped(scope, sync);
                let committed = self.commit(false);
                let synced = match syncing {
                    Ok(syncing) => syncing.join().unwrap_or(Err(Errno::IO)),
                    Err(_) => sync(),
                };
                synced.and(committed)
            })
        } else {
            sync()
        };
        if synced.is_err()
            && let Some(node) = self.lock().state.node_mut(number)
        {
            node.synced = false;
        }
        synced
    }

    /// Commits all changes so far; with `all`, syncs everything on the host's filesystem first.
    fn commit(&self, all: bool) -> Result<(), Errno> {
        if self.volatile {
            return Ok(());
        }
        let batches = self.read().batches;
        let _turn = self.take_turn();
        if !all && self.read().committed >= batches {
            return Ok(());
        }
        let mut commit = {
            let mut inner = self.lock();
            let to = inner.log.size();
            inner.begin_commit(to)
        };
        let synced = if all {
            self.data.sync_all()
        } else {
            sync_flats(&self.data, &commit.ordered, false)
        };
        let mut broken = false;
        let done = synced.and_then(|()| {
            let (file, is_named) = {
                let mut inner = self.lock();
                inner.log.commit(commit.to)?;
                (inner.log.file(), inner.is_named)
            };
            broken = true;
            self.shared.disk.sync(&file, true)?;
            if !is_named {
                self.shared.disk.sync_dir(&self.shared.dir)?;
            }
            Ok(())
        });
        let gone = {
            let mut inner = self.lock();
            if let Err(error) = done {
                inner.ordered.append(&mut commit.ordered);
                if broken {
                    inner.log.break_off();
                }
                return Err(errno(&error));
            }
            inner.is_named = true;
            inner.log.acknowledge(commit.to);
            inner.end_commit(&commit)
        };
        for flat in gone {
            self.data.remove(flat);
        }
        Ok(())
    }

    /// Commits [`INTERVAL`] after a change, and finishes compactions, until the alarm stops.
    fn commit_in_time(&self) {
        while self.shared.alarm.wait() {
            self.finish_compaction();
            // Programs that ask for a commit get the error; the others get none, as on any
            // filesystem.
            let _ = self.commit(false);
        }
    }

    /// Gives a complete log the name of the old one.
    fn finish_compaction(&self) {
        let whole = |inner: &Inner| {
            let compaction = inner.compaction.as_ref().filter(|c| c.is_whole);
            compaction.map(|compaction| compaction.log.file())
        };
        let Some(file) = whole(&self.read()) else {
            return;
        };
        // Most of the bytes become durable here, while no operation waits.
        let early = self.shared.disk.sync(&file, true);
        let _turn = self.take_turn();
        let mut commit = {
            let mut inner = self.lock();
            // Another compaction may have begun since.
            let same = |is: &Arc<_>| Arc::ptr_eq(is, &file);
            if !whole(&inner).as_ref().is_some_and(same) {
                return;
            }
            let to = inner.compaction.as_ref().map_or(0, |new| new.log.size());
            inner.begin_commit(to)
        };
        let done = early
            .and_then(|()| sync_flats(&self.data, &commit.ordered, false))
            .and_then(|()| {
                let mut inner = self.lock();
                let new = inner.compaction.as_mut().ok_or(io::ErrorKind::NotFound)?;
                new.add(&[Op::Commit(commit.to)])
                    .then_some(())
                    .ok_or(io::ErrorKind::WriteZero)?;
                new.log.acknowledge(commit.to);
                Ok(())
            })
            .and_then(|()| self.shared.disk.sync(&file, true));
        let mut inner = self.lock();
        if done.is_err() || !inner.replace_log() {
            inner.ordered.append(&mut commit.ordered);
            inner.abandon();
            return;
        }
        drop(inner);
        if self.shared.disk.sync_dir(&self.shared.dir).is_err() {
            // The next commit syncs the directory again.
            return;
        }
        let gone = {
            let mut inner = self.lock();
            inner.is_named = true;
            inner.end_commit(&commit)
        };
        for flat in gone {
            self.data.remove(flat);
        }
    }

    /// Makes space after an operation found none. True if there may be some now.
    pub fn relieve(&self, removes: bool) -> bool {
        let waits = |inner: &Inner| !inner.doomed.is_empty();
        if waits(&self.read()) && self.commit(false).is_ok() {
            return true;
        }
        // A commit in progress may have begun to remove flat files.
        if self.turn.try_lock().is_err() {
            drop(self.take_turn());
            return true;
        }
        // The kernel tells later, and on any thread, that it forgets a removed file.
        let is_removed = |(_, node): (u64, &Node)| node.record.nlink == 0;
        if !removes && self.read().state.nodes().any(is_removed) {
            for _ in 0..FORGET_WAITS {
                std::thread::sleep(FORGET_WAIT);
                if waits(&self.read()) {
                    return self.commit(false).is_ok();
                }
            }
            return true;
        }
        removes && self.rewrite(true).is_ok()
    }

    /// Rewrites the log at once; with `reserve`, into the reserved space.
    fn rewrite(&self, reserve: bool) -> io::Result<()> {
        let _turn = self.take_turn();
        let mut inner = self.lock();
        let inner = &mut *inner;
        inner.abandon();
        if reserve {
            inner.reserve.release();
        }
        let to = inner.log.size();
        let mut commit = inner.begin_commit(to);
        let shared = &self.shared;
        let new = sync_flats(&self.data, &commit.ordered, self.volatile)
            .and_then(|()| log::write_whole(&shared.disk, &shared.dir, &inner.state, self.volatile))
            .and_then(|log| {
                log.publish().inspect_err(|_| log.discard())?;
                Ok(log)
            });
        inner.log = new.inspect_err(|_| inner.ordered.append(&mut commit.ordered))?;
        inner.is_named = false;
        inner.compact_at = inner.log.size() + COMPACT_MIN;
        if !self.volatile {
            shared.disk.sync_dir(&shared.dir)?;
            inner.is_named = true;
        }
        for flat in inner.end_commit(&commit) {
            self.data.remove(flat);
        }
        if reserve {
            // Removals get the space first. If another process took the rest, the next addition
            // fails.
            inner.log.make_room()?;
            let _ = inner.reserve.hold(inner.state.weight());
        }
        Ok(())
    }

    /// Logs the length and mtime of the files that were written to, so that the next opening need
    /// not read them from the flat files.
    fn settle(&self) -> Result<(), Errno> {
        let mut inner = self.lock();
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
                let update: Option<Update> = record.update_of(&node.record);
                ops.extend(update.map(|update| Op::Update(number, Box::new(update))));
            }
        }
        for ops in ops.chunks(state::BATCH) {
            inner.commit(ops.to_vec(), Vec::new())?;
        }
        Ok(())
    }

    fn close(&self) {
        // The next opening reads from the flat files whatever is not logged here.
        let _ = self.settle();
        let bulky = {
            let mut inner = self.lock();
            inner.abandon();
            is_bulky(inner.log.size(), &inner.state, CLOSED_FACTOR)
        };
        if !bulky || self.rewrite(false).is_err() {
            let _ = self.commit(false);
        }
        self.lock().log.trim();
    }
}

impl Drop for Upper {
    fn drop(&mut self) {
        self.shared.alarm.stop();
        let committer = self.committer.get_mut();
        if let Some(thread) = committer.unwrap_or_else(PoisonError::into_inner).take() {
            let _ = thread.join();
        }
        if !self.volatile {
            self.close();
        }
    }
}

/// Wakes the commit thread.
#[derive(Debug, Default)]
struct Alarm {
    /// Whether the commit thread was started.
    is_heard: AtomicBool,
    /// Whether the thread already knows of a change, so that most changes skip the lock.
    is_raised: AtomicBool,
    state: Mutex<AlarmState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct AlarmState {
    /// The time of the first uncommitted change.
    since: Option<Instant>,
    urgent: bool,
    stop: bool,
}

impl Alarm {
    fn state(&self) -> MutexGuard<'_, AlarmState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reports a change: the thread commits it after the interval or, if it is urgent, at once.
    fn raise(&self, urgent: bool) {
        if !urgent && self.is_raised.load(Ordering::Acquire) {
            return;
        }
        let mut state = self.state();
        state.since.get_or_insert_with(Instant::now);
        state.urgent |= urgent;
        self.is_raised.store(true, Ordering::Release);
        self.changed.notify_one();
    }

    fn stop(&self) {
        self.state().stop = true;
        self.changed.notify_one();
    }

    /// Waits until a commit is due. False if the thread should exit.
    fn wait(&self) -> bool {
        let mut state = self.state();
        loop {
            if state.stop {
                return false;
            }
            let left = match state.since {
                None => None,
                Some(_) if state.urgent => Some(Duration::ZERO),
                Some(since) => Some(INTERVAL.saturating_sub(since.elapsed())),
            };
            if left == Some(Duration::ZERO) {
                state.since = None;
                state.urgent = false;
                // Cleared before the commit looks: a change that the commit misses raises the alarm
                // again.
                self.is_raised.store(false, Ordering::Release);
                return true;
            }
            state = match left {
                None => self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(left) => {
                    let waited = self.changed.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::Opened;
    use super::super::batch::Batch;
    use super::*;
    use crate::fs::Time;
    use crate::merge::Merged;

    fn record(body: Body) -> Record {
        Record {
            mode: 0o644,
            uid: 0,
            gid: 0,
            nlink: 1,
            atime: Time::default(),
            mtime: Time::default(),
            ctime: Time::default(),
            btime: Time::default(),
            xattrs: std::iter::empty().collect(),
            origin: None,
            body,
        }
    }

    /// The limit counts bytes of targets, names and xattrs; an upper within it can be opened again,
    /// and its files can be removed.
    #[test]
    fn what_is_accepted_is_bounded_in_bytes_and_opens_again() {
        const MOST: u64 = 1 << 20;
        let dir = tempfile::tempdir().unwrap();
        let lower = Arc::new(Merged::new(Vec::new()).unwrap());
        let open = |state, written| {
            let opened = Opened::new(dir.path()).unwrap();
            opened.start(state, written, false).unwrap()
        };
        let upper = open(State::new(Arc::clone(&lower)), false);
        let mut inner = upper.write();
        inner.most_memory = MOST;
        let mut batch = Batch::new(&mut inner);
        let root = batch.add(record(Body::Dir)).unwrap();
        batch.commit().unwrap();
        let mut made = 0_u64;
        let full = loop {
            let target = vec![b't'; 4000];
            let mut link = record(Body::Symlink(target[..].into()));
            link.xattrs
                .insert((*b"user.x").into(), vec![0; 1000].into());
            let mut batch = Batch::new(&mut inner);
            let number = batch.add(link).unwrap();
            batch.set(root, format!("link{made}").as_bytes(), number);
            match batch.commit() {
                Ok(()) => made += 1,
                Err(error) => break error,
            }
        };
        assert_eq!(full, Errno::NOSPC);
        assert!(made > MOST / 6000 && made < MOST / 5000, "{made}");
        assert!(inner.state.memory() <= MOST);
        let held = (
            inner.state.inodes(),
            inner.state.memory(),
            inner.state.weight(),
        );
        drop(inner);
        drop(upper);
        let size = dir.path().join("log").metadata().unwrap().len();
        assert!(size <= held.2 + 4096, "{size} of {}", held.2);
        let state = Opened::new(dir.path()).unwrap().replay(lower).unwrap();
        let again = (state.inodes(), state.memory(), state.weight());
        assert_eq!(again, held);
    }
}
