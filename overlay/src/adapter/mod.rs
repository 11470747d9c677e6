//! Ways to serve a [`crate::fs::Filesystem`].

pub mod fuse;
#[cfg(feature = "krun")]
pub mod krun;
mod linux;
pub mod server;
#[cfg(target_os = "linux")]
pub mod vhost_user;
pub mod wire;
