//! The `iii` tool: commands, planning, building, images and sandboxes.
//!
//! The only crate that knows a terminal, the environment, the home directory or the network.

pub mod project;
