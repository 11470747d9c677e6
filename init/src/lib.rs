//! Pid 1 of a sandbox, and its protocol with the tool.
//!
//! ```text
//! machine      boot in a microVM: mounts, network, clock, then supervise    `iii-init` alone
//! supervise    commands, their streams and their ends, signals, reaping     both runtimes
//! process      user lookup, fork, becoming the command
//! mounts       the mounts of every sandbox
//! message      requests and reports      packet, frame, vm    how they travel
//! ```
//!
//! In a microVM this is a program of its own, `machine::main`, that lies in no layer. In the
//! namespace runtime the tool's own binary forks into pid 1 and uses the same modules, so that a
//! command sees the same things either way.
//!
//! # Invariants
//!
//! - Single-threaded, so that a fork may do everything that a process may.
//! - Input is bounded before it is read, and garbage ends the conversation, not the sandbox's
//!   rules: no message makes this side panic.
//! - The tool's end is the sandbox's end: when the link closes, pid 1 goes, and all with it.
//!
//! A sandbox is Linux; what it says is understood elsewhere, too.

pub mod failure;
pub mod frame;
#[cfg(target_os = "linux")]
pub mod machine;
pub mod message;
#[cfg(target_os = "linux")]
pub mod mounts;
pub mod packet;
#[cfg(target_os = "linux")]
pub mod passwd;
#[cfg(target_os = "linux")]
pub mod process;
#[cfg(target_os = "linux")]
pub mod pump;
#[cfg(target_os = "linux")]
pub mod signals;
#[cfg(target_os = "linux")]
pub mod supervise;
pub mod vm;
