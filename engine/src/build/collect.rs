//! Keeping the store from filling up the disk: the limits that hold without a word, and the
//! collection after a build or an image.

use iii_store::{GcReport, Policy, Space, Store, StoreError};

/// The part of the disk that is to stay free: one in so many bytes.
pub const MIN_FREE_PART: u64 = 10;
/// Most bytes that are to stay free without a word. A tenth of a large disk is more than a user
/// misses, and would drop, on one that is well filled with other things, every layer that no worker
/// is using at the moment.
pub const MAX_MIN_FREE: u64 = 5_000_000_000;

/// The limits that hold without a word.
pub fn policy(disk: Space) -> Policy {
    Policy {
        min_free: Some((disk.total / MIN_FREE_PART).min(MAX_MIN_FREE)),
        ..Policy::default()
    }
}

/// Collects if the store or the disk is fuller than it should be, or if the store has many files.
/// Waits for nobody: a collection that runs already does as well. Nothing where there was nothing
/// to do.
pub fn if_full(store: &Store) -> Result<Option<GcReport>, StoreError> {
    let disk = store.space()?;
    let policy = policy(disk);
    let is_large = || -> Result<bool, StoreError> {
        match policy.max_bytes {
            Some(max) => Ok(store.bytes_on_disk()? > max),
            None => Ok(false),
        }
    };
    let is_full =
        || Ok::<_, StoreError>(policy.min_free.is_some_and(|min| disk.free < min) || is_large()?);
    if !store.has_many_files()? && !is_full()? {
        return Ok(None);
    }
    let plan = store.plan_gc(&policy)?;
    store.try_gc(&plan, &|_| {})
}

/// Collects if the store has many files, however small they are. An edit of a project adds two.
pub fn if_many(store: &Store) -> Result<Option<GcReport>, StoreError> {
    if !store.has_many_files()? {
        return Ok(None);
    }
    let plan = store.plan_gc(&policy(store.space()?))?;
    store.try_gc(&plan, &|_| {})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenth_stays_free_and_not_more_than_is_of_use() {
        for (total, expected) in [
            (0, 0),
            (20_000_000_000, 2_000_000_000),
            (50_000_000_000, 5_000_000_000),
            (2_000_000_000_000, 5_000_000_000),
        ] {
            let disk = Space { free: 0, total };
            assert_eq!(policy(disk).min_free, Some(expected));
        }
    }

    #[test]
    fn the_disk_of_a_store_has_room() {
        let Ok(dir) = tempfile::tempdir() else {
            panic!("a temporary directory");
        };
        let store = Store::open(dir.path()).unwrap_or_else(|error| panic!("{error}"));
        let disk = store.space().unwrap_or_else(|error| panic!("{error}"));
        assert!(disk.free <= disk.total && disk.total > 0);
    }
}
