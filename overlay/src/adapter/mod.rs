//! Ways to serve a [`crate::fs::Filesystem`].

pub mod fuse;
mod linux;
pub mod server;
#[cfg(target_os = "linux")]
pub mod vhost_user;
pub mod wire;
