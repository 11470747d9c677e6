//! Ways to serve a [`crate::fs::Filesystem`].

pub mod fuse;
