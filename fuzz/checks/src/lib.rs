//! The checks of the fuzz targets.

pub mod fuse;
pub mod init;
pub mod oci;
pub mod store;
