//! The overlay through its [`Filesystem`] trait, against models that know nothing of layers.
//!
//! [`Filesystem`]: iii_overlay::fs::Filesystem

mod aside;
mod cases;
mod corpus;
mod durability;
mod facts;
mod kernel;
#[cfg(feature = "krun")]
mod krun;
mod model;
mod mounted;
mod posix;
mod powercut;
mod rebase;
mod state_machine;
mod support;
mod thaw;
mod vmm;
