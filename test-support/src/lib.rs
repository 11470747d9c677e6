//! Helpers for the tests of several crates. It knows none of them, so that any may use it.

#![forbid(unsafe_code)]

mod tar;
mod variants;

use std::error::Error;
use std::fmt::Write as _;

pub use tar::{Head, Tar, pax_text};
pub use variants::{check_seeds, mutate};

/// An error with its causes, as people see it.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    text
}
