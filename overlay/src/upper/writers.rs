//! Who writes to flat files, for whoever wants to read all of them as they are at one moment.

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// The writers to an upper's flat files.
#[derive(Debug, Default)]
pub struct Writers {
    /// Held shared while a request writes, exclusively by who wants the files to keep still.
    gate: RwLock<()>,
    /// The flat files that were written to since somebody watches.
    written: Mutex<Option<HashSet<u64>>>,
    /// Held by who watches.
    watcher: Mutex<()>,
}

impl Writers {
    /// Before a request that may write to flat files, until it has noted that it did.
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

    /// Watches what is written to from now on, alone.
    pub fn watch(&self) -> Watch<'_> {
        let alone = self.watcher.lock().unwrap_or_else(PoisonError::into_inner);
        *self.written() = Some(HashSet::new());
        Watch {
            writers: self,
            _alone: alone,
        }
    }
}

/// Somebody who watches the writers; no more when dropped.
#[derive(Debug)]
pub struct Watch<'a> {
    writers: &'a Writers,
    _alone: MutexGuard<'a, ()>,
}

impl Watch<'_> {
    /// Waits until nobody writes, and keeps everybody from it.
    pub fn still(&self) -> RwLockWriteGuard<'_, ()> {
        let gate = self.writers.gate.write();
        gate.unwrap_or_else(PoisonError::into_inner)
    }

    /// What was written to since the last time. Whatever was read before it was written to is in
    /// it, now or the next time.
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
