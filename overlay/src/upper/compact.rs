//! Rewrites a log of mostly overwritten changes, beside the operations.
//!
//! The new log begins as a snapshot. Each operation that changes something extends the snapshot by
//! a bounded step, and each batch that is appended to the old log is appended to the new one as
//! well. In the order of the new log, both make the same state ([`State::snapshot_from`]). When the
//! snapshot is complete, the commit thread makes the new log durable and gives it the name of the
//! old one.

use super::Upper;
use super::commit::Inner;
use super::log::Log;
use super::record::Op;
use super::state::SnapshotCursor;

/// Bytes of a log that is never compacted below this size.
pub(super) const COMPACT_MIN: u64 = 2 << 20;
/// A log in use is compacted when it is this many times as large as a snapshot of its state.
const COMPACT_FACTOR: u64 = 4;
/// Changes that one operation adds to the new log: well under a millisecond.
const STEP: usize = 512;

/// The log that will replace the current one.
#[derive(Debug)]
pub(super) struct Compaction {
    pub(super) log: Log,
    cursor: SnapshotCursor,
    /// Whether the snapshot is complete.
    pub(super) is_whole: bool,
}

impl Compaction {
    /// Appends a batch that was appended to the old log. False if that failed: discard the new log
    /// then.
    pub(super) fn add(&mut self, ops: &[Op]) -> bool {
        self.log.fill(ops).is_ok()
    }
}

impl Upper {
    /// Extends the smaller log by one step, or begins one, if most of the log is garbage.
    pub fn compact(&self, inner: &mut Inner) {
        if inner.compaction.is_none() {
            if inner.log.size() < inner.compact_at {
                return;
            }
            inner.compact_at = inner.log.size() + COMPACT_MIN;
            if !super::is_bulky(inner.log.size(), &inner.state, COMPACT_FACTOR) {
                return;
            }
            // A failure leaves the old log, which has the same state.
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
