//! Mutexes that a panic elsewhere does not take down.

use std::sync::{Mutex, MutexGuard, PoisonError};

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The data under each mutex of this crate is consistent between any two statements that can
    // panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
