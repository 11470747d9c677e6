//! Checks an upper without changing it.

use std::path::Path;
use std::sync::Arc;

use super::data::FlatFiles;
use super::disk::{Disk, HostDisk};
use super::state::{MAX_REPLAY_MEMORY, State};
use super::{UpperError, log, read_log};
use crate::merge::Merged;

/// The contents of an upper, in numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct UpperReport {
    /// Inodes that the log has records of.
    pub inodes: u64,
    /// Files with contents of their own, missing ones included.
    pub files: u64,
    /// Those files whose contents are missing. After a power cut, no program had made them durable.
    pub missing: u64,
    /// Bytes at the end of the log that do not hold: the process died, or the power was cut, before
    /// they were durable.
    pub torn: u64,
}

/// Reads the whole log of the upper in `dir` and looks for the files that it names. Changes nothing
/// and takes no lock: another process may have the upper open. Fails with [`UpperError::Damaged`]
/// where opening the upper does.
pub fn check(dir: &Path) -> Result<UpperReport, UpperError> {
    let disk: Arc<dyn Disk> = Arc::new(HostDisk);
    let lower = Merged::new(Vec::new()).map_err(|_| UpperError::NotAnUpper(dir.into()))?;
    let mut state = State::new(Arc::new(lower));
    let facts = read_log(&*disk, dir, &mut |_, _, op| {
        state.replay(op);
        if state.memory() > MAX_REPLAY_MEMORY {
            let path = dir.join(log::NAME);
            return Err(UpperError::TooLarge { path });
        }
        Ok(())
    })?;
    let Some(facts) = facts else {
        return Ok(UpperReport::default());
    };
    let found = FlatFiles::find(dir)?;
    let flats = || state.nodes().filter_map(|(_, node)| node.record.flat());
    Ok(UpperReport {
        inodes: state.inodes(),
        files: flats().count() as u64,
        missing: flats().filter(|&flat| !found.has(flat)).count() as u64,
        torn: if facts.torn {
            facts.len - facts.holds
        } else {
            facts.end - facts.holds
        },
    })
}
