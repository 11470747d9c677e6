//! Tracks writes to flat files, so that a reader can read all of them as they are at one moment.

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// The writers to an upper's flat files.
#[derive(Debug, Default)]
pub struct Writers {
    /// Held shared while a request writes, exclusively by a reader that needs all files to stay the
    /// same.
    gate: RwLock<()>,
    /// The flat files that were written to since the watch began.
    written: Mutex<Option<HashSet<u64>>>,
    /// Held by the watch.
    watcher: Mutex<()>,
}

impl Writers {
    /// Take it before a request that may write to flat files, and hold it until the request has
    /// noted its writes.
    pub fn enter(&self) -> RwLockReadGuard<'_, ()> {
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn written(&self) -> MutexGuard<'_, Option<HashSet<u64>>> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a flat file was written to.
    pub fn wrote(&self, flat: u64) {
        if let Some(written) = self.written().as_mut() {
            written.insert(flat);
        }
    }

    /// Begins to collect the flat files that are written to. Waits for the end of another watch.
    pub fn watch(&self) -> Watch<'_> {
        let alone = self.watcher.lock().unwrap_or_else(PoisonError::into_inner);
        *self.written() = Some(HashSet::new());
        Watch {
            writers: self,
            _alone: alone,
        }
    }
}

/// A watch of the writers; it ends when this is dropped.
#[derive(Debug)]
pub struct Watch<'a> {
    writers: &'a Writers,
    _alone: MutexGuard<'a, ()>,
}

impl Watch<'_> {
    /// Waits until no request writes, and holds up writes until the guard is dropped.
    pub fn still(&self) -> RwLockWriteGuard<'_, ()> {
        let gate = self.writers.gate.write();
        gate.unwrap_or_else(PoisonError::into_inner)
    }

    /// The flat files that were written to since the last call. A flat file that was read before a
    /// write to it is in the result of this call or of the next.
    pub fn take(&self) -> HashSet<u64> {
        let mut written = self.writers.written();
        written.as_mut().map(std::mem::take).unwrap_or_default()
    }
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        *self.writers.written() = None;
    }
}
