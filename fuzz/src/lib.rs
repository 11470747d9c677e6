//! What the fuzz targets do with their input.

pub mod fuse;
pub mod init;
pub mod oci;
pub mod store;
