//! The `iii` tool: commands, planning, building, images and sandboxes.
//!
//! The only crate that knows a terminal, the environment, the home directory or the network.

// The checks of the fuzz targets are part of the tests, and call this crate by its name.
#[cfg(test)]
extern crate self as iii;

pub mod build;
pub mod cache;
pub mod cli;
pub mod collect;
pub mod compose;
pub mod dev;
pub mod doctor;
pub mod environment;
pub mod exec;
pub mod export;
pub mod firmware;
pub mod graph;
pub mod home;
pub mod kvm;
pub mod logs;
pub mod managed;
pub mod oci;
pub mod plan;
pub mod process;
pub mod project;
pub mod realise;
mod reload;
pub mod run;
pub mod sandbox;
pub mod scaffold;
#[cfg(target_os = "linux")]
pub mod serve;
pub mod snapshot;
pub mod supervise;
pub mod tail;
pub mod ui;
pub mod utc;
pub mod watch;
