//! Inode numbers.
//!
//! They are as low as possible: a 32-bit program without large-file support gets `EOVERFLOW` for an
//! inode number of 2^32 or more. The lower takes one number for each node of its layers, at most
//! 2^30; the upper counts on from there, so only 3,000,000,000 new inodes in one upper exceed 2^32.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// An inode number as the sandbox sees it.
pub type Ino = u64;

/// The root directory.
pub const ROOT: Ino = 1;

/// The lower's inode numbers, except [`ROOT`], start here. An adapter may use those between for
/// inodes of its own.
pub const FIRST_LOWER: Ino = 16;

/// A map by inode number.
pub type InoMap<T> = HashMap<Ino, T, BuildHasherDefault<InoHasher>>;

/// Hashes inode numbers. No guest can choose them, so no keys are needed.
#[derive(Debug, Default, Clone, Copy)]
pub struct InoHasher(u64);

impl Hasher for InoHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u64(&mut self, value: u64) {
        let mixed = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ mixed >> 32;
    }
}
