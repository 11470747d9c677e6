//! The archive of a layer as the blob that an image has: compressed, its digests computed on the
//! way.

use std::fmt;
use std::io::{self, Write};
use std::str::FromStr;

use flate2::write::GzEncoder;
use sha2::{Digest as _, Sha256};

use super::{ExportError, LayerTar, Sink, Stored};
use crate::digest::Digest;

/// Plain bytes are gathered up to here before they are compressed and hashed.
const BUFFER: usize = 256 << 10;
const GZIP_LEVEL: u32 = 6;
const ZSTD_LEVEL: i32 = 3;

/// How the layers of an image are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Compression {
    /// Which every engine takes.
    #[default]
    Gzip,
    /// Smaller and faster, for engines that know it.
    Zstd,
    /// Not at all.
    None,
}

/// A compression that images do not have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a compression: expected gzip, zstd or none")]
pub struct ParseCompressionError(String);

/// The blob of a layer in its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerBlob {
    /// Its digest and length as it is stored.
    pub stored: Stored,
    /// Digest of the plain archive.
    pub diff_id: Digest,
}

impl Compression {
    /// The word for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
            Self::None => "none",
        }
    }

    /// Media type of a layer with this compression.
    pub const fn media_type(self) -> &'static str {
        match self {
            Self::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Self::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
            Self::None => "application/vnd.oci.image.layer.v1.tar",
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Compression {
    type Err = ParseCompressionError;

    fn from_str(text: &str) -> Result<Self, ParseCompressionError> {
        let all = [Self::Gzip, Self::Zstd, Self::None];
        all.into_iter()
            .find(|one| one.as_str() == text)
            .ok_or_else(|| ParseCompressionError(text.chars().take(80).collect()))
    }
}

/// Writes a layer's blob and returns the digest of its plain archive. Memory does not depend on the
/// layer's size.
pub fn write_layer(
    tar: &LayerTar<'_>,
    compression: Compression,
    out: &mut dyn Write,
) -> Result<Digest, ExportError> {
    let finished =
        |result: io::Result<&mut dyn Write>| result.map(drop).map_err(ExportError::Write);
    match compression {
        Compression::Gzip => {
            // Its header has no name and no time.
            let level = flate2::Compression::new(GZIP_LEVEL);
            let (encoder, diff_id) = plain(tar, GzEncoder::new(out, level))?;
            finished(encoder.finish())?;
            Ok(diff_id)
        }
        Compression::Zstd => {
            let mut encoder = zstd::Encoder::new(out, ZSTD_LEVEL).map_err(ExportError::Write)?;
            encoder.include_checksum(true).map_err(ExportError::Write)?;
            let (encoder, diff_id) = plain(tar, encoder)?;
            finished(encoder.finish())?;
            Ok(diff_id)
        }
        Compression::None => Ok(plain(tar, out)?.1),
    }
}

fn plain<W: Write>(tar: &LayerTar<'_>, out: W) -> Result<(W, Digest), ExportError> {
    let mut buffered = io::BufWriter::with_capacity(BUFFER, Hashing::new(out));
    tar.write(&mut buffered)?;
    let hashing = buffered
        .into_inner()
        .map_err(|error| ExportError::Write(error.into_error()))?;
    let (out, stored) = hashing.finish();
    Ok((out, stored.digest))
}

/// Puts a layer into `sink`.
pub fn put_layer(
    tar: &LayerTar<'_>,
    compression: Compression,
    sink: &dyn Sink,
) -> Result<LayerBlob, ExportError> {
    let mut diff_id = Digest::of(b"");
    let stored = sink.put_blob(&mut |out| {
        diff_id = write_layer(tar, compression, out)?;
        Ok(())
    })?;
    Ok(LayerBlob { stored, diff_id })
}

/// Counts and hashes what is written through it.
pub struct Hashing<W> {
    inner: W,
    hash: Sha256,
    size: u64,
}

impl<W: Write> Hashing<W> {
    /// Writes through to `inner`.
    pub fn new(inner: W) -> Self {
        Self {
            inner,
            hash: Sha256::new(),
            size: 0,
        }
    }

    /// The inner writer, and the digests and lengths of its bytes.
    pub fn finish(self) -> (W, Stored) {
        let stored = Stored {
            digest: Digest::from_bytes(self.hash.finalize().into()),
            size: self.size,
        };
        (self.inner, stored)
    }
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(buf)?;
        self.hash.update(&buf[..count]);
        self.size += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
