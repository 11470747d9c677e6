//! Ways to serve a [`crate::fs::Filesystem`].

#[cfg(target_os = "linux")]
pub mod fuse;
#[cfg(feature = "krun")]
pub mod krun;
mod linux;
pub mod server;
#[cfg(target_os = "linux")]
pub mod vhost_user;
pub mod wire;

/// How much the kernel may do without asking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Everything that it knows already.
    Quiet,
    /// It asks for whatever a program looks at, at least the first time.
    Observed,
}
