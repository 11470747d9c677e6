//! Workers: what runs one, watches it, and takes snapshots of it.

pub mod dev;
pub mod exec;
pub mod reload;
pub mod run;
pub mod snapshot;
pub mod supervise;
pub mod watch;
