//! Inode numbers.
//!
//! All are below 2^53, so that programs that keep numbers as doubles can tell them apart.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// An inode number as the sandbox sees it.
pub type Ino = u64;

/// The root directory.
pub const ROOT: Ino = 1;

/// Lower inode numbers are below; the upper's own start here.
pub const LOWER_END: Ino = 1 << 48;

/// A map by inode number.
pub type InoMap<T> = HashMap<Ino, T, BuildHasherDefault<InoHasher>>;

/// Hashes inode numbers, which nobody outside can choose.
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
