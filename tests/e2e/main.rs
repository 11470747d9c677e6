//! The `iii` binary from the outside: real processes, mounts and layers, in homes of their own.
//!
//! `workers` runs the three examples with their real package managers on base images made from
//! Debian packages; the rest uses a busybox base that is made in a second.

mod bad_input;
mod cache;
mod doctor;
mod documents;
mod engine;
mod exec;
mod export;
mod facts;
mod fidelity;
mod harness;
mod kills;
#[cfg(feature = "libkrun")]
mod krun;
mod layers;
mod lifecycle;
mod machine;
mod managed;
mod network;
mod ordinary_user;
mod package_caches;
mod posix;
mod push;
mod registry;
mod reload;
mod snapshots;
mod store;
mod vm;
mod workers;
