//! `oci:DIR:TAG` and its like, as skopeo and podman write them.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use super::{Compression, DockerArchiveSink, ExportError, LayoutSink, Sink};
use crate::reference::{DEFAULT_TAG, Reference, ReferenceError, is_tag};
use crate::registry::{RegistryError, Repository, Settings};

/// Where an image goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Destination {
    /// Under a tag into the OCI layout in a directory.
    Layout {
        /// The directory; it need not exist.
        dir: PathBuf,
        /// The tag.
        tag: String,
    },
    /// Into an archive for `docker load`.
    DockerArchive {
        /// The file; one that is there is replaced.
        file: PathBuf,
        /// The name that the image has in it, if not its own.
        name: Option<Reference>,
    },
    /// Under its tag into a registry.
    Registry(Reference),
}

/// A text that names no place for an image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseDestinationError {
    /// No transport, or one that is not known.
    #[error("expected oci:DIR[:TAG], docker-archive:FILE[:NAME] or docker://HOST/REPO[:TAG]")]
    Transport,
    /// Nothing behind the transport.
    #[error("no path behind {0}:")]
    NoPath(&'static str),
    /// Not a tag.
    #[error("{0:?} is not a tag: letters, digits, and . _ - after the first")]
    Tag(String),
    /// A digest, which follows from what is put there.
    #[error(
        "an image cannot be pushed under a chosen digest: leave out the @ and the text behind it"
    )]
    Digest,
    /// Not the name of an image.
    #[error(transparent)]
    Name(#[from] ReferenceError),
}

impl FromStr for Destination {
    type Err = ParseDestinationError;

    fn from_str(text: &str) -> Result<Self, ParseDestinationError> {
        if let Some(rest) = text.strip_prefix("oci:") {
            // The part behind the last slash cannot have a tag of its own.
            let (dir, tag) = match rest.rsplit_once(':') {
                Some((dir, tag)) if !tag.contains('/') => (dir, tag),
                _ => (rest, DEFAULT_TAG),
            };
            if dir.is_empty() {
                return Err(ParseDestinationError::NoPath("oci"));
            }
            if !is_tag(tag) {
                return Err(ParseDestinationError::Tag(tag.chars().take(80).collect()));
            }
            return Ok(Self::Layout {
                dir: dir.into(),
                tag: tag.to_owned(),
            });
        }
        let named = |name: &str| {
            let name: Reference = name.parse()?;
            match name.digest() {
                Some(_) => Err(ParseDestinationError::Digest),
                None => Ok(name),
            }
        };
        if let Some(name) = text.strip_prefix("docker://") {
            return Ok(Self::Registry(named(name)?));
        }
        let rest = text
            .strip_prefix("docker-archive:")
            .ok_or(ParseDestinationError::Transport)?;
        let (file, name) = match rest.split_once(':') {
            Some((file, name)) => (file, Some(named(name)?)),
            None => (rest, None),
        };
        if file.is_empty() {
            return Err(ParseDestinationError::NoPath("docker-archive"));
        }
        Ok(Self::DockerArchive {
            file: file.into(),
            name,
        })
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Layout { dir, tag } => write!(f, "oci:{}:{tag}", dir.display()),
            Self::DockerArchive { file, name } => {
                write!(f, "docker-archive:{}", file.display())?;
                name.iter().try_for_each(|name| write!(f, ":{name}"))
            }
            Self::Registry(name) => write!(f, "docker://{name}"),
        }
    }
}

impl Destination {
    /// Opens it. `own_name` is what the image is called in an archive that is given no name for it;
    /// `settings` are asked for where it is a registry.
    pub fn open(
        &self,
        own_name: &str,
        settings: impl FnOnce() -> Result<Settings, RegistryError>,
    ) -> Result<Arc<dyn Sink>, ExportError> {
        Ok(match self {
            Self::Layout { dir, .. } => Arc::new(LayoutSink::open(dir)?),
            Self::DockerArchive { file, name } => {
                let name = name.as_ref().map(ToString::to_string);
                let name = name.unwrap_or_else(|| own_name.to_owned());
                Arc::new(DockerArchiveSink::create(file, name)?)
            }
            Self::Registry(name) => Repository::for_push(name, &settings()?)?,
        })
    }

    /// The tag that the manifest gets there.
    pub fn tag(&self) -> Option<&str> {
        match self {
            Self::Layout { tag, .. } => Some(tag),
            Self::DockerArchive { .. } => None,
            Self::Registry(name) => name.tag(),
        }
    }

    /// How layers have to be compressed there, where there is no choice.
    pub fn compression(&self) -> Option<Compression> {
        matches!(self, Self::DockerArchive { .. }).then_some(Compression::None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations() {
        for (text, full) in [
            ("oci:dir", "oci:dir:latest"),
            ("oci:/a/b:v1", "oci:/a/b:v1"),
            ("oci:a:b/c", "oci:a:b/c:latest"),
            ("docker-archive:x.tar", "docker-archive:x.tar"),
            (
                "docker-archive:/x.tar:me",
                "docker-archive:/x.tar:docker.io/library/me:latest",
            ),
            (
                "docker-archive:x:localhost/me:1",
                "docker-archive:x:localhost/me:1",
            ),
            (
                "docker://localhost:5000/me",
                "docker://localhost:5000/me:latest",
            ),
            ("docker://me:1", "docker://docker.io/library/me:1"),
        ] {
            let parsed: Destination = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(parsed.to_string(), full);
        }
        let pinned = format!("docker://me@sha256:{}", "0".repeat(64));
        for (text, message) in [
            ("", "expected oci:DIR"),
            ("dir", "expected oci:DIR"),
            ("./dir", "expected oci:DIR"),
            ("docker:me", "expected oci:DIR"),
            ("oci:", "no path behind oci:"),
            ("oci::tag", "no path behind oci:"),
            ("oci:dir:", "is not a tag"),
            ("oci:dir:a b", "is not a tag"),
            ("docker-archive:", "no path behind docker-archive:"),
            ("docker-archive:x:Y", "must be in lower case"),
            ("docker://", "must not be empty"),
            (&pinned, "under a chosen digest"),
        ] {
            let error = text.parse::<Destination>().expect_err(text).to_string();
            assert!(error.contains(message), "{text}: {error}");
        }
    }
}
