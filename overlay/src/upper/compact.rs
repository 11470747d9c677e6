//! Rewriting a log that is mostly what has been overwritten since, beside the operations.
//!
//! The new log begins as a snapshot, which each operation that changes something takes a bounded
//! step further; and each batch that the old log gets goes to the new one as well. The order in
//! which the new log has them makes the same state ([`State::snapshot_from`]). When the snapshot is
//! complete, the thread that commits makes the new log durable and gives it the name of the old
//! one.

use super::Upper;
use super::commit::Inner;
use super::log::Log;
use super::record::Op;
use super::state::SnapshotCursor;

/// A log below this size is never compacted.
pub(super) const COMPACT_MIN: u64 = 2 << 20;
/// A log is compacted while it is in use when it is this many times the size of what it says.
const COMPACT_FACTOR: u64 = 4;
/// Changes that an operation adds to the new log: well under a millisecond.
const STEP: usize = 512;

/// A log that is being written in the place of another.
#[derive(Debug)]
pub(super) struct Compaction {
    pub(super) log: Log,
    cursor: SnapshotCursor,
    /// Whether the snapshot is complete.
    pub(super) is_whole: bool,
}

impl Compaction {
    /// Adds a batch that the old log got. False if that failed, and the new log is of no use.
    pub(super) fn add(&mut self, ops: &[Op]) -> bool {
        self.log.fill(ops).is_ok()
    }
}

impl Upper {
    /// Takes the making of a smaller log further, or begins it, if most of the log is garbage.
    pub fn compact(&self, inner: &mut Inner) {
        if inner.compaction.is_none() {
            if inner.log.size() < inner.compact_at {
                return;
            }
            inner.compact_at = inner.log.size() + COMPACT_MIN;
            if !super::is_bulky(inner.log.size(), &inner.state, COMPACT_FACTOR) {
                return;
            }
            // A failure leaves the old log, which says the same.
            let Ok(log) = inner.begin_log() else {
                return;
            };
            inner.compaction = Some(Compaction {
                log,
                cursor: SnapshotCursor::default(),
                is_whole: false,
            });
        }
        let Inner {
            state,
            compaction: Some(compaction),
            ..
        } = inner
        else {
            return;
        };
        if compaction.is_whole {
            return;
        }
        match state.snapshot_from(&mut compaction.cursor, STEP) {
            Some(ops) if ops.is_empty() => {}
            Some(ops) => {
                if !compaction.add(&ops) {
                    inner.abandon();
                }
            }
            None => {
                compaction.is_whole = true;
                self.compacted(inner);
            }
        }
    }
}
