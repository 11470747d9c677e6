//! Helpers for the tests of several crates. It knows none of them, so that any may use it.

#![forbid(unsafe_code)]

mod tar;
mod variants;

pub use tar::{Head, Tar, pax_text};
pub use variants::{check_seeds, mutate};
