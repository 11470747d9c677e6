//! A registry as the place where an image goes.

use std::io::{self, Write};

use super::{ExportError, Hashing, Sink, Stored, WriteBlob, io_error};
use crate::digest::Digest;
use crate::registry::{RegistryError, Repository, Upload};

impl Sink for Repository {
    fn has_blob(&self, digest: &Digest, _size: u64) -> Result<bool, ExportError> {
        Ok(Repository::has_blob(self, digest)?)
    }

    fn put_blob(&self, write: &mut WriteBlob<'_>) -> Result<Stored, ExportError> {
        match in_pieces(self, write) {
            Err(ExportError::Registry(RegistryError::Pieces { .. })) => whole(self, write),
            other => other,
        }
    }

    fn put_manifest(
        &self,
        media_type: &str,
        bytes: &[u8],
        tag: Option<&str>,
    ) -> Result<Digest, ExportError> {
        let digest = Digest::of(bytes).to_string();
        Ok(Repository::put_manifest(
            self,
            tag.unwrap_or(&digest),
            media_type,
            bytes,
        )?)
    }
}

fn in_pieces(to: &Repository, write: &mut WriteBlob<'_>) -> Result<Stored, ExportError> {
    let mut uploading = Uploading {
        upload: to.upload(),
        failed: None,
    };
    let written = write(&mut uploading);
    if let Some(error) = uploading.failed {
        return Err(error.into());
    }
    written?;
    let (digest, size) = uploading.upload.finish()?;
    Ok(Stored { digest, size })
}

/// Sends a blob by way of a temporary file: its length and digest have to be known before its first
/// byte.
fn whole(to: &Repository, write: &mut WriteBlob<'_>) -> Result<Stored, ExportError> {
    let file = tempfile::tempfile().map_err(io_error(
        "making a temporary file in",
        &std::env::temp_dir(),
    ))?;
    let mut hashing = Hashing::new(file);
    write(&mut hashing)?;
    let (file, stored) = hashing.finish();
    to.put_file(&file, &stored.digest)?;
    Ok(stored)
}

/// Writes into an upload, and remembers what ended it.
struct Uploading<'a> {
    upload: Upload<'a>,
    failed: Option<RegistryError>,
}

impl Write for Uploading<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if self.failed.is_none() {
            match self.upload.write(buf) {
                Ok(()) => return Ok(buf.len()),
                Err(error) => self.failed = Some(error),
            }
        }
        Err(io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
