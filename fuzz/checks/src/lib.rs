//! The checks of the fuzz targets, which tests run over the corpus as well.

#[cfg(feature = "fuse")]
pub mod fuse;
#[cfg(feature = "init")]
pub mod init;
#[cfg(feature = "oci")]
pub mod oci;
#[cfg(feature = "store")]
pub mod store;
