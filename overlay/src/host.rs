//! Calls that not every host has. Where one is missing, what a guest is told is what a filesystem
//! without it would say.

#[cfg(target_os = "linux")]
pub use linux::*;
#[cfg(not(target_os = "linux"))]
pub use other::*;

#[cfg(target_os = "linux")]
mod linux {
    use std::fs::File;

    use rustix::fs::FallocateFlags;

    use crate::posix::{Allocate, Result};

    pub use rustix::fs::{copy_file_range, syncfs};

    /// The id of the running kernel: it has the same from its start to its end.
    pub fn boot() -> Option<[u8; 16]> {
        let text = std::fs::read("/proc/sys/kernel/random/boot_id").ok()?;
        let id = blake3::hash(text.trim_ascii());
        id.as_bytes().first_chunk().copied()
    }

    /// `fallocate`.
    pub fn allocate(file: &File, how: Allocate, offset: u64, len: u64) -> Result<()> {
        let flags = match how {
            Allocate::Grow => FallocateFlags::empty(),
            Allocate::KeepSize => FallocateFlags::KEEP_SIZE,
            Allocate::PunchHole => FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            Allocate::ZeroGrow => FallocateFlags::ZERO_RANGE,
            Allocate::ZeroKeepSize => FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
        };
        rustix::fs::fallocate(file, flags, offset, len)
    }
}

#[cfg(not(target_os = "linux"))]
mod other {
    use std::fs::File;

    use crate::posix::{Allocate, Errno, Result};

    /// The id of the running kernel, where none is asked for: everything that a log holds then
    /// holds.
    pub fn boot() -> Option<[u8; 16]> {
        None
    }

    /// `fallocate`, where there is none: a program falls back to writing.
    pub fn allocate(_: &File, _: Allocate, _: u64, _: u64) -> Result<()> {
        Err(Errno::OPNOTSUPP)
    }

    /// `copy_file_range`, where there is none: the guest's kernel reads and writes.
    pub fn copy_file_range(
        _: &File,
        _: Option<&mut u64>,
        _: &File,
        _: Option<&mut u64>,
        _: usize,
    ) -> Result<usize> {
        Err(Errno::NOSYS)
    }

    /// `syncfs`, where there is none: everything is on its way to the disk, and the disk has it
    /// when the directory is synced.
    pub fn syncfs(dir: &File) -> Result<()> {
        rustix::fs::sync();
        dir.sync_all().map_err(|error| crate::posix::errno(&error))
    }
}
