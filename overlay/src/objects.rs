//! Access to the contents of the layers' files.

use std::io;

use iii_store::{ObjectId, Store};

/// Where the bytes of the layers' files come from.
pub trait Objects: Send + Sync {
    /// Reads from `offset` of the object into `buf`, as much as one call gives; 0 at or after its
    /// end.
    fn read_at(&self, object: &ObjectId, buf: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Copies the first `len` bytes of the object to `to`, which is empty.
    fn copy_to(&self, object: &ObjectId, len: u64, to: &std::fs::File) -> io::Result<()>;
}

impl Objects for Store {
    fn read_at(&self, object: &ObjectId, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.object(object)
            .map_err(io::Error::other)?
            .read_at(buf, offset)
    }

    fn copy_to(&self, object: &ObjectId, len: u64, to: &std::fs::File) -> io::Result<()> {
        let blob = self.object(object).map_err(io::Error::other)?;
        blob.copy_to(len, to)
    }
}
