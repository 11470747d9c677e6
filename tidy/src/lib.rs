//! Checks of the sources as text: the words of documents and comments, the width of lines, and the
//! links between documents.
//!
//! The checks are tests of this crate, which has no dependencies: `cargo test -p iii-tidy` takes
//! seconds. The end-to-end tests use [`markdown`] to run the commands that documents quote.

#![forbid(unsafe_code)]

pub mod markdown;

#[cfg(test)]
mod links;
#[cfg(test)]
mod prose;
#[cfg(test)]
mod sources;
#[cfg(test)]
mod words;
