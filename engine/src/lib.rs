//! Projects, plans, builds, workers and managed workers.
//!
//! Nothing here knows a terminal: progress is an event handed to the caller.

#![warn(clippy::print_stdout, clippy::print_stderr)]
#![cfg_attr(test, allow(clippy::disallowed_methods))]
#![allow(
    clippy::disallowed_types,
    reason = "they are for `plan` alone, which is pure"
)]

pub mod build;
pub mod compose;
pub mod export;
pub mod firmware;
pub mod home;
pub mod managed;
pub mod plan;
pub mod project;
#[cfg(target_os = "linux")]
pub mod serve;
pub mod shared_cache;
pub mod threads;
pub mod uppers;
pub mod worker;
