//! How often the kernel was told of an inode: while it remembers one, it may come back to it.

use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::ino::{Ino, InoMap};

const SHARDS: usize = 64;
/// Entries for which a shard always keeps room.
const SPARE: usize = 64;

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
            // A table that once was large gives its memory back, at a small cost for each removal.
            if shard.capacity() > SPARE && shard.len() < shard.capacity() / 8 {
                let room = shard.len() * 2;
                shard.shrink_to(room);
            }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_goes_with_what_is_forgotten() {
        const INODES: u64 = 100_000;
        let lookups = Lookups::default();
        let room = || {
            let shards = lookups.0.iter();
            shards
                .map(|shard| shard.lock().unwrap().capacity())
                .sum::<usize>()
        };
        for ino in 0..INODES {
            lookups.add(ino);
            lookups.add(ino);
        }
        assert!(room() >= INODES as usize);
        for ino in 0..INODES {
            assert!(!lookups.sub(ino, 1));
            assert!(lookups.sub(ino, 1));
        }
        assert!(room() <= SHARDS * 2 * SPARE, "{}", room());
        assert!(!lookups.has(1));
    }
}
