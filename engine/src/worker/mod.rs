//! Workers: what runs one, watches it, and takes snapshots of it.

pub mod control;
pub mod dev;
pub mod engine;
pub mod error;

pub mod isolation;
pub mod keep;
pub(crate) mod place;
pub mod program;
pub(crate) mod session;
pub mod snapshot;
pub(crate) mod start;
pub mod supervise;
pub mod target;
pub mod watch;

pub use session::Ended;
