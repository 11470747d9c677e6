//! A blob as one stream, however many connections it takes.

use std::io::{self, Read};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ureq::BodyReader;
use ureq::http::{StatusCode, header};

use super::{Answer, Item, RegistryError, Repository, header_text};
use crate::digest::Digest;

/// Most times that one blob is resumed.
pub const MAX_RESUMES: u32 = 64;
/// Time spent waiting for bytes after which at least [`MIN_WINDOW`] of them must have come.
const WINDOW: Duration = Duration::from_secs(60);
/// See [`WINDOW`].
pub const MIN_WINDOW: u64 = 64 << 10;

/// Reads a blob. A broken transfer resumes at the byte where it broke. It ends where the
/// registry ends it, one byte after the promised size at the latest: the reader compares.
pub struct Resumed {
    repository: Arc<Repository>,
    digest: Digest,
    size: u64,
    at: u64,
    /// Bytes still to come that were read before.
    behind: u64,
    body: BodyReader<'static>,
    url: String,
    resumes: u32,
    /// Tries since the last byte came.
    fruitless: u32,
    waited: Duration,
    came: u64,
    /// The final error.
    failed: Option<Arc<RegistryError>>,
}

impl Resumed {
    pub fn open(
        repository: Arc<Repository>,
        digest: Digest,
        size: u64,
    ) -> Result<Self, RegistryError> {
        let answer = repository.get(Item::Blob(&digest), 0)?;
        let url = answer.url.clone();
        let (body, behind) = body_from(answer, 0, size)?;
        Ok(Self {
            repository,
            digest,
            size,
            at: 0,
            behind,
            body,
            url,
            resumes: 0,
            fruitless: 0,
            waited: Duration::ZERO,
            came: 0,
            failed: None,
        })
    }

    /// Opens the rest of the blob, after `cause` ended it.
    fn resume(&mut self, cause: io::Error) -> Result<(), RegistryError> {
        let patience = &self.repository.patience;
        self.resumes += 1;
        self.fruitless += 1;
        if self.resumes > MAX_RESUMES || self.fruitless >= patience.tries {
            return Err(RegistryError::Broken {
                url: self.url.clone(),
                at: self.at,
                size: self.size,
                source: cause,
            });
        }
        patience.pause(self.fruitless);
        let answer = self.repository.get(Item::Blob(&self.digest), self.at)?;
        self.url.clone_from(&answer.url);
        (self.body, self.behind) = body_from(answer, self.at, self.size)?;
        Ok(())
    }

    /// Refuses a blob that only trickles. Only time spent waiting for the registry counts.
    fn watch(&mut self, waited: Duration, came: u64) -> Result<(), RegistryError> {
        self.waited += waited;
        self.came += came;
        if self.waited < WINDOW {
            return Ok(());
        }
        if self.came < MIN_WINDOW && self.at < self.size {
            return Err(RegistryError::Slow {
                url: self.url.clone(),
                seconds: self.waited.as_secs(),
            });
        }
        (self.waited, self.came) = (Duration::ZERO, 0);
        Ok(())
    }
}

impl Read for Resumed {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.failed.is_none() {
            match self.read_on(buf) {
                Ok(count) => return Ok(count),
                Err(error) => self.failed = Some(Arc::new(error)),
            }
        }
        Err(self
            .failed
            .clone()
            .map_or_else(|| io::ErrorKind::BrokenPipe.into(), io::Error::other))
    }
}

impl Resumed {
    fn read_on(&mut self, buf: &mut [u8]) -> Result<usize, RegistryError> {
        loop {
            let start = Instant::now();
            let want = match self.behind {
                0 => buf.len(),
                behind => buf.len().min(usize::try_from(behind).unwrap_or(buf.len())),
            };
            let got = self.body.read(&mut buf[..want]);
            let count = *got.as_ref().unwrap_or(&0) as u64;
            let is_behind = self.behind > 0;
            if is_behind {
                self.behind -= count;
            } else {
                self.at += count;
            }
            self.watch(start.elapsed(), count)?;
            let cause = match got {
                Ok(0) if self.at >= self.size || buf.is_empty() => return Ok(0),
                // All is here; how the connection ended does not matter.
                Err(_) if self.at >= self.size => return Ok(0),
                Ok(0) => io::ErrorKind::UnexpectedEof.into(),
                Ok(1..) if is_behind => continue,
                Ok(count) => {
                    self.fruitless = 0;
                    return Ok(count);
                }
                Err(error) => error,
            };
            self.resume(cause)?;
        }
    }
}

/// The body of `answer`, and how many of its bytes come before byte `at` of the blob.
fn body_from(
    answer: Answer,
    at: u64,
    size: u64,
) -> Result<(BodyReader<'static>, u64), RegistryError> {
    let Answer { url, response } = answer;
    let length = header_text(&response, &header::CONTENT_LENGTH)
        .and_then(|text| text.trim().parse::<u64>().ok());
    let is_part = response.status() == StatusCode::PARTIAL_CONTENT;
    let starts_at = if is_part {
        let range = header_text(&response, &header::CONTENT_RANGE).unwrap_or_default();
        let start = range
            .strip_prefix("bytes ")
            .and_then(|range| range.split('-').next()?.trim().parse().ok());
        // A part that does not say which one it is is the one that was asked for, or its digest
        // will be wrong.
        start.unwrap_or(at)
    } else {
        0
    };
    if is_part && starts_at != at {
        return Err(RegistryError::Range { url });
    }
    if let Some(length) = length
        && starts_at.saturating_add(length) != size
    {
        return Err(RegistryError::Length {
            url,
            expected: size,
            actual: starts_at.saturating_add(length),
        });
    }
    // A server that cannot resume sends all of it again.
    Ok((response.into_body().into_reader(), at - starts_at))
}
