//! A registry as the place where an image goes.

use std::io::{self, Write};

use super::{ExportError, Sink, Stored, WriteBlob};
use crate::oci::digest::Digest;
use crate::oci::registry::{RegistryError, Repository, Upload};

impl Sink for Repository {
    fn has_blob(&self, digest: &Digest, _size: u64) -> Result<bool, ExportError> {
        Ok(Repository::has_blob(self, digest)?)
    }

    fn put_blob(&self, write: &mut WriteBlob<'_>) -> Result<Stored, ExportError> {
        let mut uploading = Uploading {
            upload: self.upload(),
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
