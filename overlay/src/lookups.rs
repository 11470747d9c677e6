//! How often the kernel was told of an inode: while it remembers one, it may come back to it.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::ino::{Ino, InoMap};

const SHARDS: usize = 64;

/// Counts of lookups by inode. Its locks are leaves: nothing else is locked while one is held.
#[derive(Debug)]
pub struct Lookups([Mutex<InoMap<u64>>; SHARDS]);

impl Default for Lookups {
    fn default() -> Self {
        Self(std::array::from_fn(|_| Mutex::default()))
    }
}

impl Lookups {
    fn shard(&self, ino: Ino) -> MutexGuard<'_, InoMap<u64>> {
        let shard = &self.0[ino as usize % SHARDS];
        shard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts one more.
    pub fn add(&self, ino: Ino) {
        *self.shard(ino).entry(ino).or_default() += 1;
    }

    /// Counts `count` less. Whether the kernel has forgotten the inode.
    pub fn sub(&self, ino: Ino, count: u64) -> bool {
        let mut shard = self.shard(ino);
        let Some(left) = shard.get_mut(&ino) else {
            return true;
        };
        *left = left.saturating_sub(count);
        let forgotten = *left == 0;
        if forgotten {
            shard.remove(&ino);
        }
        forgotten
    }

    /// Counts nothing any more.
    pub fn clear(&self) {
        for shard in &self.0 {
            let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            *shard = InoMap::default();
        }
    }

    /// Whether the kernel remembers the inode.
    pub fn has(&self, ino: Ino) -> bool {
        self.shard(ino).contains_key(&ino)
    }
}
