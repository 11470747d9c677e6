//! Pushing: a blob in pieces, each of which can be sent again, and manifests at once.
//!
//! A blob's length and digest need not be known before its last byte. One of at most [`CHUNK`]
//! bytes goes in one request; a longer one in pieces of that size, of which one is in memory. (A
//! registry that takes no pieces gets a file in one request.) When a connection breaks, the
//! registry is asked how much it has, and gets the rest: only the rest of one piece is lost.
//! Mirrors are not pushed to.

use std::fs::File;
use std::sync::Arc;

use sha2::{Digest as _, Sha256};
use ureq::Body;
use ureq::http::{HeaderName, Method, Response, StatusCode, Uri, header};

use super::blob::MAX_RESUMES;
use super::http::{self, Payload, Request};
use super::{Reference, RegistryError, Repository, Settings, header_text};
use crate::digest::Digest;
use crate::text::shown;

/// Bytes of a piece, held in memory while it is sent.
pub const CHUNK: usize = 8 << 20;
/// Largest piece that a registry may insist on.
const MAX_CHUNK: usize = 64 << 20;
/// Header with a registry's least size of a piece (OCI distribution 1.1).
const MIN_LENGTH: HeaderName = HeaderName::from_static("oci-chunk-min-length");
const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");
/// Characters shown of a digest that is not the one asked for.
const MAX_DIGEST_SHOWN: usize = 80;
const OCTETS: &str = "application/octet-stream";

impl Repository {
    /// The repository that `name` is in, to be read and written. Nothing is asked yet.
    pub fn for_push(name: &Reference, settings: &Settings) -> Result<Arc<Self>, RegistryError> {
        let without_mirrors = Settings {
            mirrors: Vec::new(),
            ..settings.clone()
        };
        Self::with_actions(name, &without_mirrors, "pull,push")
    }

    /// Whether the repository has a blob.
    pub fn has_blob(&self, digest: &Digest) -> Result<bool, RegistryError> {
        let url = format!("{}/blobs/{digest}", self.itself.base);
        let request = Request::new(Method::HEAD, url);
        match self.ask(&self.itself, &request, &[StatusCode::OK]) {
            Ok(_) => Ok(true),
            Err(RegistryError::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Begins to send a blob. Nothing is asked yet.
    pub fn upload(&self) -> Upload<'_> {
        Upload {
            repository: self,
            location: None,
            piece: Vec::new(),
            chunk: CHUNK,
            at: 0,
            size: 0,
            hash: Sha256::new(),
            resumes: 0,
        }
    }

    /// Sends a blob that is in memory, unless it is there.
    pub fn put_blob(&self, bytes: &[u8]) -> Result<Digest, RegistryError> {
        let digest = Digest::of(bytes);
        if !self.has_blob(&digest)? {
            let mut upload = self.upload();
            upload.write(bytes)?;
            upload.finish()?;
        }
        Ok(digest)
    }

    /// Sends a file as one blob in one request, for registries that take no pieces. A broken
    /// request begins again.
    pub fn put_file(&self, file: &File, digest: &Digest) -> Result<(), RegistryError> {
        self.upload().complete(digest, Payload::File(file))
    }

    /// Gives a manifest or an index the name `name`, a tag or its digest. Its blobs have to be
    /// there already.
    pub fn put_manifest(
        &self,
        name: &str,
        media_type: &str,
        bytes: &[u8],
    ) -> Result<Digest, RegistryError> {
        let url = format!("{}/manifests/{name}", self.itself.base);
        let mut request = Request::new(Method::PUT, &*url);
        let content_type = (header::CONTENT_TYPE, media_type.to_owned());
        request.headers.push(content_type);
        request.body = Payload::Bytes(bytes);
        let wanted = [StatusCode::CREATED, StatusCode::OK];
        let response = self.ask(&self.itself, &request, &wanted)?;
        let digest = Digest::of(bytes);
        check_digest(&url, &response, &digest)?;
        Ok(digest)
    }
}

/// A blob on its way. Dropped before it is finished, the registry forgets it.
pub struct Upload<'a> {
    repository: &'a Repository,
    /// Where the next piece goes, once there was one.
    location: Option<Uri>,
    /// Bytes from `at` on.
    piece: Vec<u8>,
    /// Bytes of a full piece.
    chunk: usize,
    /// Bytes that the registry has.
    at: u64,
    /// Bytes written.
    size: u64,
    hash: Sha256,
    resumes: u32,
}

impl Upload<'_> {
    /// Takes the next bytes, and sends a piece when there is more than one.
    pub fn write(&mut self, mut bytes: &[u8]) -> Result<(), RegistryError> {
        self.hash.update(bytes);
        self.size += bytes.len() as u64;
        while !bytes.is_empty() {
            if self.piece.len() >= self.chunk && self.location.is_none() {
                self.location = Some(self.begin()?);
                if self.chunk > MAX_CHUNK {
                    return Err(RegistryError::Pieces {
                        host: self.repository.itself.host.clone(),
                        detail: format!(" of less than {} bytes", self.chunk),
                    });
                }
            }
            // Now that the registry was asked, pieces may have to be larger.
            if self.piece.len() >= self.chunk {
                self.send_piece()?;
            }
            let room = self.chunk.saturating_sub(self.piece.len());
            let (now, rest) = bytes.split_at(room.min(bytes.len()));
            self.piece.extend_from_slice(now);
            bytes = rest;
        }
        Ok(())
    }

    /// Sends what is left. When this returns, the registry has the blob, of this digest and length.
    pub fn finish(mut self) -> Result<(Digest, u64), RegistryError> {
        let digest = Digest::from_bytes(self.hash.clone().finalize().into());
        if self.location.is_some() && !self.piece.is_empty() {
            self.send_piece()?;
        }
        let piece = std::mem::take(&mut self.piece);
        self.complete(&digest, Payload::Bytes(&piece))?;
        Ok((digest, self.size))
    }

    /// Completes the blob `digest` from the sent pieces and `rest`.
    fn complete(&mut self, digest: &Digest, rest: Payload<'_>) -> Result<(), RegistryError> {
        let patience = &self.repository.patience;
        let mut tried = 1;
        loop {
            let Err((error, wait)) = self.try_complete(digest, rest) else {
                return Ok(());
            };
            if !error.is_passing() || tried >= patience.tries {
                return Err(error);
            }
            patience.wait(tried, wait);
            // The answer may be all that was lost.
            if self.repository.has_blob(digest)? {
                return Ok(());
            }
            tried += 1;
        }
    }

    fn try_complete(&mut self, digest: &Digest, rest: Payload<'_>) -> Result<(), super::Refusal> {
        let to = match &self.location {
            Some(location) => location.clone(),
            None => self.begin().map_err(|error| (error, None))?,
        };
        let mark = if to.query().is_some() { '&' } else { '?' };
        let query = http::form(&[("digest", &digest.to_string())]);
        let mut request = Request::new(Method::PUT, format!("{to}{mark}{query}"));
        let content_type = (header::CONTENT_TYPE, OCTETS.to_owned());
        request.headers.push(content_type);
        request.body = rest;
        let wanted = [StatusCode::CREATED, StatusCode::NO_CONTENT];
        let place = &self.repository.itself;
        let response = self.repository.ask_once(place, &request, &wanted)?;
        check_digest(&request.url, &response, digest).map_err(|error| (error, None))
    }

    /// Asks where to send a blob.
    fn begin(&mut self) -> Result<Uri, RegistryError> {
        let place = &self.repository.itself;
        let url = format!("{}/blobs/uploads/", place.base);
        let request = Request::new(Method::POST, &*url);
        let response = self
            .repository
            .ask(place, &request, &[StatusCode::ACCEPTED])?;
        let min = header_text(&response, &MIN_LENGTH)
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(0);
        self.chunk = self.chunk.max(min);
        let location = header_text(&response, &header::LOCATION).unwrap_or_default();
        http::next(&http::checked(&url, &url)?, &location)
    }

    /// Sends a piece, however many requests it takes.
    fn send_piece(&mut self) -> Result<(), RegistryError> {
        let repository = self.repository;
        let patience = &repository.patience;
        let piece = std::mem::take(&mut self.piece);
        let mut rest = &piece[..];
        let mut fruitless = 0;
        while !rest.is_empty() {
            let has = match self.patch(rest) {
                Ok(has) => has,
                Err((error, wait)) => {
                    let is_range = matches!(error, RegistryError::Status { status: 416, .. });
                    fruitless += 1;
                    self.resumes += 1;
                    let tries_left = fruitless < patience.tries && self.resumes <= MAX_RESUMES;
                    if !(error.is_passing() || is_range) || !tries_left {
                        return Err(self.in_pieces(error));
                    }
                    patience.wait(fruitless, wait);
                    self.progress()?
                }
            };
            let came = has
                .checked_sub(self.at)
                .and_then(|came| rest.split_at_checked(usize::try_from(came).ok()?));
            let Some((came, left)) = came else {
                return Err(RegistryError::Offset {
                    url: self.shown(),
                    sent: self.at + rest.len() as u64,
                    has,
                });
            };
            if !came.is_empty() {
                fruitless = 0;
            }
            if !left.is_empty() {
                self.resumes += 1;
                fruitless += u32::from(came.is_empty());
                if fruitless >= patience.tries || self.resumes > MAX_RESUMES {
                    return Err(RegistryError::Offset {
                        url: self.shown(),
                        sent: self.at + rest.len() as u64,
                        has,
                    });
                }
            }
            self.at = has;
            rest = left;
        }
        // Its memory serves the next one.
        self.piece = piece;
        self.piece.clear();
        Ok(())
    }

    /// Sends bytes from `at` on, once. Returns how many bytes of the blob the registry then has.
    fn patch(&mut self, bytes: &[u8]) -> Result<u64, super::Refusal> {
        let url = self.location.as_ref().map(Uri::to_string);
        let mut request = Request::new(Method::PATCH, url.unwrap_or_default());
        let all = self.at + bytes.len() as u64;
        let range = format!("{}-{}", self.at, all.saturating_sub(1));
        request.headers = vec![
            (header::CONTENT_TYPE, OCTETS.to_owned()),
            (header::CONTENT_RANGE, range),
        ];
        request.body = Payload::Bytes(bytes);
        let wanted = [StatusCode::ACCEPTED, StatusCode::NO_CONTENT];
        let place = &self.repository.itself;
        let response = self.repository.ask_once(place, &request, &wanted)?;
        self.go_on(&response).map_err(|error| (error, None))?;
        Ok(received(&response, self.at).unwrap_or(all))
    }

    /// Asks how many bytes of the blob the registry has.
    fn progress(&mut self) -> Result<u64, RegistryError> {
        let url = self.location.as_ref().map(Uri::to_string);
        let request = Request::new(Method::GET, url.unwrap_or_default());
        let wanted = [StatusCode::NO_CONTENT, StatusCode::OK, StatusCode::ACCEPTED];
        let place = &self.repository.itself;
        let response = self.repository.ask(place, &request, &wanted)?;
        self.go_on(&response)?;
        Ok(received(&response, self.at).unwrap_or(0))
    }

    /// Remembers where to go on.
    fn go_on(&mut self, response: &Response<Body>) -> Result<(), RegistryError> {
        if let Some(location) = header_text(response, &header::LOCATION)
            && let Some(at) = &self.location
        {
            self.location = Some(http::next(at, &location)?);
        }
        Ok(())
    }

    /// The meaning of a refused first piece.
    fn in_pieces(&self, error: RegistryError) -> RegistryError {
        let host = || self.repository.itself.host.clone();
        match error {
            RegistryError::NotFound { detail, .. } if self.at == 0 => RegistryError::Pieces {
                host: host(),
                detail,
            },
            RegistryError::Status {
                status: 405 | 411 | 416 | 501,
                detail,
                ..
            } if self.at == 0 => RegistryError::Pieces {
                host: host(),
                detail,
            },
            error => error,
        }
    }

    fn shown(&self) -> String {
        let url = self.location.as_ref().map(Uri::to_string);
        http::without_query(&url.unwrap_or_default())
    }
}

/// Of `Range: 0-N`, the number of bytes: N + 1. That of none is written `0-0`; where `at` bytes
/// were there before, it means one.
fn received(response: &Response<Body>, at: u64) -> Option<u64> {
    let range = header_text(response, &header::RANGE)?;
    let range = range.trim();
    let range = range.strip_prefix("bytes=").unwrap_or(range);
    match range.strip_prefix("0-")?.parse::<u64>().ok()? {
        0 if at == 0 => Some(0),
        last => Some(last.saturating_add(1)),
    }
}

/// Refuses what the registry says it stored if that is something else. It need not say.
fn check_digest(
    url: &str,
    response: &Response<Body>,
    expected: &Digest,
) -> Result<(), RegistryError> {
    let Some(actual) = header_text(response, &CONTENT_DIGEST) else {
        return Ok(());
    };
    // Another algorithm says nothing.
    if actual == expected.to_string() || !actual.starts_with("sha256:") {
        return Ok(());
    }
    Err(RegistryError::Stored {
        url: http::without_query(url),
        expected: *expected,
        actual: shown(&actual, MAX_DIGEST_SHOWN),
    })
}

#[cfg(test)]
mod tests;
