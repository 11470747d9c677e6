//! Blobs as they are read: decompressed on a thread of their own, with every digest computed on the
//! way.

use std::io::{self, BufReader, Cursor, Read};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use sha2::{Digest as _, Sha256};

use super::digest::Digest;
use super::{Limit, Limits, Passed};

/// Plain bytes handed over at once, and how many such pieces may wait.
const CHUNK: usize = 256 << 10;
const CHUNKS: usize = 8;
const GZIP: &str = "gzip";
const READ_BUFFER: usize = 128 << 10;

/// Why a blob cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The blob could not be read.
    #[error("reading failed")]
    Read(#[source] io::Error),
    /// The blob's compression is broken.
    #[error("decompressing ({compression}) failed")]
    Decompress {
        /// `gzip` or `zstd`.
        compression: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// A compression that images do not have.
    #[error("{0} compression is not supported: recompress it with gzip or zstd")]
    Compression(&'static str),
    /// Not the bytes that were asked for.
    #[error("its digest is {actual}, but {expected} was promised")]
    Digest {
        /// The digest that it is named by.
        expected: Digest,
        /// The digest that it has.
        actual: Digest,
    },
    /// Not the length that was promised.
    #[error("its size is not the {expected} bytes that were promised")]
    Size {
        /// The size that its descriptor gives.
        expected: u64,
    },
    /// Decompressed, not the bytes that were promised.
    #[error(
        "decompressed, its digest is {actual}, but the image's configuration promises {expected}"
    )]
    DiffId {
        /// The diff id in the image's configuration.
        expected: Digest,
        /// The digest that it has.
        actual: Digest,
    },
    /// Larger than this program accepts.
    #[error("{0}")]
    Limit(Passed),
}

/// Promises about a blob.
#[derive(Debug, Clone, Copy, Default)]
pub struct Promise {
    /// Digest of the blob as it is stored.
    pub digest: Option<Digest>,
    /// Its length as it is stored.
    pub size: Option<u64>,
    /// Digest of its plain bytes.
    pub diff_id: Option<Digest>,
}

/// Measured properties of a blob.
#[derive(Debug, Clone, Copy)]
pub struct Seen {
    /// Digest of the blob as it is stored.
    pub digest: Digest,
    /// Digest of its plain bytes.
    pub diff_id: Digest,
    /// Its length as it is stored.
    pub size: u64,
}

/// Reads `blob` to its end, plain, gzip or zstd as its first bytes say, and hands `consume` the
/// plain bytes. The rest behind `consume` is read and hashed as well. `read` counts the bytes of
/// the blob as they go by.
///
/// Only when this returns `Ok` are the bytes what `promise` says: `consume` must do nothing that
/// counts. Where the blob is not what was promised, that is the error, rather than what `consume`
/// made of it.
pub fn read_blob<T, E: From<StreamError>>(
    blob: impl Read + Send,
    promise: Promise,
    limits: &Limits,
    read: &AtomicU64,
    consume: impl FnOnce(&mut dyn Read) -> Result<T, E>,
) -> Result<(T, Seen), E> {
    let (sender, receiver) = sync_channel(CHUNKS);
    let source = Source {
        blob,
        hash: Sha256::new(),
        count: 0,
        promised: promise.size,
        read,
    };
    thread::scope(|scope| {
        let producer = scope.spawn(move || produce(source, promise, limits, &sender));
        let mut plain = Plain {
            receiver,
            chunk: Chunk::default(),
            at: 0,
            hash: None,
        };
        let consumed = consume(&mut plain);
        let diff_id = if consumed.is_ok() {
            plain.finish()
        } else {
            // A producer without a consumer stops.
            drop(plain);
            None
        };
        let (digest, size) = producer
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        let consumed = consumed?;
        let diff_id = diff_id.unwrap_or(digest);
        if let Some(expected) = promise.diff_id
            && expected != diff_id
        {
            let actual = diff_id;
            return Err(StreamError::DiffId { expected, actual }.into());
        }
        Ok((
            consumed,
            Seen {
                digest,
                diff_id,
                size,
            },
        ))
    })
}

/// Reads a document, which is needed in memory as it is stored.
pub fn read_document(
    blob: impl Read,
    promise: Promise,
    limits: &Limits,
) -> Result<Vec<u8>, StreamError> {
    let limit = limits.document;
    let passed = || {
        let passed = limits.passed(Limit::Document, "the size of a JSON document, in bytes,");
        StreamError::Limit(passed)
    };
    if promise.size.is_some_and(|size| size > limit) {
        return Err(passed());
    }
    let mut bytes = Vec::new();
    blob.take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(StreamError::Read)?;
    if bytes.len() as u64 > limit {
        return Err(passed());
    }
    if let Some(expected) = promise.size
        && expected != bytes.len() as u64
    {
        return Err(StreamError::Size { expected });
    }
    let actual = Digest::of(&bytes);
    match promise.digest {
        Some(expected) if expected != actual => Err(StreamError::Digest { expected, actual }),
        _ => Ok(bytes),
    }
}

#[derive(Default)]
struct Chunk {
    bytes: Vec<u8>,
    /// Whether its digest is still to be computed: plain blobs are hashed as they are read.
    decompressed: bool,
}

/// The bytes of the blob as stored, counted and hashed.
struct Source<'r, B> {
    blob: B,
    hash: Sha256,
    count: u64,
    promised: Option<u64>,
    read: &'r AtomicU64,
}

impl<B: Read> Read for Source<'_, B> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let got = self.blob.read(buf)?;
        self.hash.update(buf.get(..got).unwrap_or_default());
        self.count += got as u64;
        self.read.store(self.count, Ordering::Relaxed);
        if self.promised.is_some_and(|promised| self.count > promised) {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        Ok(got)
    }
}

/// The consumer's end.
struct Plain {
    receiver: Receiver<Chunk>,
    chunk: Chunk,
    at: usize,
    hash: Option<Sha256>,
}

impl Plain {
    fn next_chunk(&mut self) -> bool {
        // A producer that fails hangs up; its error is taken when it is joined.
        let Ok(chunk) = self.receiver.recv() else {
            return false;
        };
        if chunk.decompressed {
            self.hash
                .get_or_insert_with(Sha256::new)
                .update(&chunk.bytes);
        }
        self.chunk = chunk;
        self.at = 0;
        true
    }

    /// The digest of all the plain bytes, where it is not that of the blob itself.
    fn finish(mut self) -> Option<Digest> {
        while self.next_chunk() {}
        self.hash
            .map(|hash| Digest::from_bytes(hash.finalize().into()))
    }
}

impl Read for Plain {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.at >= self.chunk.bytes.len() {
            if !self.next_chunk() {
                return Ok(0);
            }
        }
        let rest = self.chunk.bytes.get(self.at..).unwrap_or_default();
        let got = rest.len().min(buf.len());
        buf[..got].copy_from_slice(&rest[..got]);
        self.at += got;
        Ok(got)
    }
}

fn produce<B: Read>(
    mut source: Source<'_, B>,
    promise: Promise,
    limits: &Limits,
    chunks: &SyncSender<Chunk>,
) -> Result<(Digest, u64), StreamError> {
    let decoded = decode(&mut source, limits, chunks);
    // Whether the blob is the one asked for decides which error to report, so it is read to its end
    // after an error too.
    let promised = promise.digest.is_some() || promise.size.is_some();
    let drained = if promised {
        io::copy(&mut source, &mut io::sink()).map(drop)
    } else {
        Ok(())
    };
    if let Some(expected) = promise.size
        && (source.count > expected || (source.count < expected && drained.is_ok()))
    {
        return Err(StreamError::Size { expected });
    }
    drained.map_err(StreamError::Read)?;
    let actual = Digest::from_bytes(source.hash.finalize().into());
    match promise.digest {
        Some(expected) if expected != actual => Err(StreamError::Digest { expected, actual }),
        _ => decoded.map(|()| (actual, source.count)),
    }
}

fn decode<B: Read>(
    source: &mut Source<'_, B>,
    limits: &Limits,
    chunks: &SyncSender<Chunk>,
) -> Result<(), StreamError> {
    let read = source.read;
    let (compression, plain) = plain(source)?;
    send_all(plain, read, limits, chunks, compression)
}

/// The plain bytes of a blob, and how it is compressed: its first bytes say so.
pub fn plain<'s>(
    mut source: impl Read + 's,
) -> Result<(Option<&'static str>, Box<dyn Read + 's>), StreamError> {
    let mut head = Vec::new();
    source
        .by_ref()
        .take(6)
        .read_to_end(&mut head)
        .map_err(StreamError::Read)?;
    let compression = sniff(&head)?;
    let whole = BufReader::with_capacity(READ_BUFFER, Cursor::new(head).chain(source));
    let plain: Box<dyn Read + 's> = match compression {
        None => Box::new(whole),
        Some(GZIP) => Box::new(flate2::bufread::MultiGzDecoder::new(whole)),
        Some(compression) => {
            let decoder =
                zstd::Decoder::with_buffer(whole).map_err(|source| StreamError::Decompress {
                    compression,
                    source,
                })?;
            Box::new(decoder)
        }
    };
    Ok((compression, plain))
}

/// The compression that a blob's first bytes show; its media type says nothing that can be relied
/// on.
fn sniff(head: &[u8]) -> Result<Option<&'static str>, StreamError> {
    Ok(match head {
        [0x1f, 0x8b, ..] => Some(GZIP),
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Some("zstd"),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => return Err(StreamError::Compression("xz")),
        [b'B', b'Z', b'h', b'1'..=b'9', ..] => return Err(StreamError::Compression("bzip2")),
        [0x04, 0x22, 0x4d, 0x18, ..] => return Err(StreamError::Compression("lz4")),
        _ => None,
    })
}

/// Sends the plain bytes, until their end or until the consumer is gone.
fn send_all(
    mut plain: impl Read,
    read: &AtomicU64,
    limits: &Limits,
    chunks: &SyncSender<Chunk>,
    compression: Option<&'static str>,
) -> Result<(), StreamError> {
    let wrap = |source| match compression {
        None => StreamError::Read(source),
        Some(compression) => StreamError::Decompress {
            compression,
            source,
        },
    };
    let mut total = 0_u64;
    loop {
        let mut bytes = Vec::with_capacity(CHUNK);
        plain
            .by_ref()
            .take(CHUNK as u64)
            .read_to_end(&mut bytes)
            .map_err(wrap)?;
        if bytes.is_empty() {
            return Ok(());
        }
        total += bytes.len() as u64;
        let stored = read.load(Ordering::Relaxed).max(1);
        if total > limits.bytes {
            let what = "the size of the archive, in bytes,";
            return Err(StreamError::Limit(limits.passed(Limit::Bytes, what)));
        }
        if total > limits.ratio_from && total / stored > limits.ratio {
            let what = "the ratio at which it is compressed";
            return Err(StreamError::Limit(limits.passed(Limit::Ratio, what)));
        }
        let chunk = Chunk {
            bytes,
            decompressed: compression.is_some(),
        };
        if chunks.send(chunk).is_err() {
            return Ok(());
        }
    }
}
