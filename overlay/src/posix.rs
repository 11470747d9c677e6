//! Errors, times and ways to allocate, as POSIX and Linux have them, for every module.

use std::io;

use rustix::time::ClockId;
use serde::{Deserialize, Serialize};

pub use rustix::io::Errno;

/// The clock that the kernel takes the times of files from.
#[cfg(target_os = "linux")]
const FILE_CLOCK: ClockId = ClockId::RealtimeCoarse;
#[cfg(not(target_os = "linux"))]
const FILE_CLOCK: ClockId = ClockId::Realtime;

/// The result of an operation.
pub type Result<T> = std::result::Result<T, Errno>;

/// A point in time: seconds since 1970, negative before, and nanoseconds below 1,000,000,000.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct Time {
    /// Seconds, rounded towards minus infinity.
    pub sec: i64,
    /// Nanoseconds after `sec`.
    pub nsec: u32,
}

impl Time {
    /// The time now, by the clock that the kernel stamps files with: a file of this filesystem and
    /// one of another compare as they were changed.
    pub fn now() -> Self {
        let now = rustix::time::clock_gettime(FILE_CLOCK);
        Self {
            sec: now.tv_sec,
            nsec: now.tv_nsec as u32,
        }
    }
}

impl From<iii_store::tree::Mtime> for Time {
    fn from(mtime: iii_store::tree::Mtime) -> Self {
        Self {
            sec: mtime.sec,
            nsec: mtime.nsec,
        }
    }
}

impl From<Time> for iii_store::tree::Mtime {
    fn from(time: Time) -> Self {
        Self {
            sec: time.sec,
            nsec: time.nsec,
        }
    }
}

/// The mode of a `fallocate`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allocate {
    /// Allocates, growing the file.
    Grow,
    /// Allocates, keeping the length.
    KeepSize,
    /// Makes a hole.
    PunchHole,
    /// Zeroes, growing the file.
    ZeroGrow,
    /// Zeroes, keeping the length.
    ZeroKeepSize,
}

/// The errno by which the sandbox learns of an I/O error of the host.
pub(crate) fn errno(error: &io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(match error.kind() {
        io::ErrorKind::FileTooLarge => Errno::FBIG,
        _ => Errno::IO,
    })
}
