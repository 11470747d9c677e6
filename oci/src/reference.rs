//! Names of images, as docker reads and completes them: `node` is `docker.io/library/node:latest`.

use std::fmt;
use std::str::FromStr;

use super::digest::{Digest, ParseDigestError};

/// The registry of names that have none.
pub const DEFAULT_REGISTRY: &str = "docker.io";
/// The tag of names that have neither tag nor digest.
pub const DEFAULT_TAG: &str = "latest";
/// Longest registry and repository together, in bytes, as the distribution specification has it.
pub const MAX_NAME: usize = 255;
/// Longest tag, in bytes.
pub const MAX_TAG: usize = 128;

/// A complete name of an image: registry, repository, and a tag or a digest or both.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// Why a text is not the name of an image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceError {
    /// No text at all.
    #[error("an image name must not be empty")]
    Empty,
    /// Too long.
    #[error("the image name is longer than {MAX_NAME} bytes")]
    TooLong,
    /// The part before the first `/` looks like a registry and is not valid.
    #[error("{0:?} is not a registry: expected HOST or HOST:PORT")]
    Registry(String),
    /// The repository has capital letters, which docker refuses.
    #[error("the image name {0:?} must be in lower case")]
    UpperCase(String),
    /// Anything else wrong with the repository.
    #[error(
        "{0:?} is not an image name: expected [REGISTRY/]NAME[:TAG], letters, digits and . _ - in between"
    )]
    Repository(String),
    /// 64 hex digits are an image id, not a name.
    #[error("{0:?} is an image id; an image needs a name")]
    Id(String),
    /// Not a tag.
    #[error("{0:?} is not a tag: at most {MAX_TAG} letters, digits, and . _ - after the first")]
    Tag(String),
    /// Not a digest.
    #[error("the image name ends in what is not a digest")]
    Digest(#[from] ParseDigestError),
}

impl Reference {
    /// The host, with its port if it has one: `docker.io`, `localhost:5000`.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The name within the registry: `library/node`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag, if the image is named by one.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, if the image is pinned by one.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let (name, digest) = match text.split_once('@') {
            Some((name, digest)) => (name, Some(digest.parse()?)),
            None => (text, None),
        };
        // A colon after the last slash begins a tag; before it, a port.
        let path_at = name.rfind('/').map_or(0, |slash| slash + 1);
        let (name, tag) = match name[path_at..].split_once(':') {
            Some((last, tag)) => (&name[..path_at + last.len()], Some(tag)),
            None => (name, None),
        };
        if name.is_empty() {
            return Err(ReferenceError::Empty);
        }
        if let Some(tag) = tag
            && !is_tag(tag)
        {
            return Err(ReferenceError::Tag(shown(tag)));
        }
        let (registry, repository) = match name.split_once('/') {
            Some((first, rest)) if looks_like_registry(first) => (first, rest),
            _ => (DEFAULT_REGISTRY, name),
        };
        if !is_registry(registry) {
            return Err(ReferenceError::Registry(shown(registry)));
        }
        let registry = match registry {
            "index.docker.io" => DEFAULT_REGISTRY,
            other => other,
        };
        check_repository(repository)?;
        let repository = if registry == DEFAULT_REGISTRY && !repository.contains('/') {
            format!("library/{repository}")
        } else {
            repository.to_owned()
        };
        if registry.len() + 1 + repository.len() > MAX_NAME {
            return Err(ReferenceError::TooLong);
        }
        let tag = match (tag, digest) {
            (None, None) => Some(DEFAULT_TAG),
            (tag, _) => tag,
        };
        Ok(Self {
            registry: registry.to_owned(),
            repository,
            tag: tag.map(str::to_owned),
            digest,
        })
    }
}

fn shown(text: &str) -> String {
    text.chars().take(80).collect()
}

/// Docker's rule for whether the part before the first slash is a host or the first part of a name.
fn looks_like_registry(first: &str) -> bool {
    first == "localhost"
        || first.contains(['.', ':'])
        || first.bytes().any(|byte| byte.is_ascii_uppercase())
}

fn is_registry(text: &str) -> bool {
    let (host, port) = match text.rsplit_once(':') {
        // The colons of an IPv6 address stand in brackets.
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (text, None),
    };
    let port_fits = port.is_none_or(|port| {
        port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok()
    });
    let host_fits = match host.strip_prefix('[').map(|rest| rest.strip_suffix(']')) {
        Some(Some(address)) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        Some(None) => false,
        None => host.split('.').all(|label| {
            !label.is_empty()
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        }),
    };
    port_fits && host_fits
}

fn check_repository(text: &str) -> Result<(), ReferenceError> {
    if text.bytes().any(|byte| byte.is_ascii_uppercase()) {
        return Err(ReferenceError::UpperCase(shown(text)));
    }
    if text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(ReferenceError::Id(shown(text)));
    }
    if text.split('/').all(is_path_component) {
        Ok(())
    } else {
        Err(ReferenceError::Repository(shown(text)))
    }
}

/// Runs of `a-z0-9`, joined by one `.`, one or two `_`, or any number of `-`.
fn is_path_component(text: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = text.as_bytes();
    let ends_fit =
        bytes.first().is_some_and(|&b| word(b)) && bytes.last().is_some_and(|&b| word(b));
    ends_fit
        && bytes.split(|&byte| word(byte)).all(|joint| {
            matches!(joint, b"" | b"." | b"_" | b"__") || joint.iter().all(|&b| b == b'-')
        })
}

/// Whether a text can be a tag.
pub fn is_tag(text: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    text.len() <= MAX_TAG
        && text.bytes().next().is_some_and(word)
        && text
            .bytes()
            .all(|byte| word(byte) || byte == b'.' || byte == b'-')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use iii_fuzz_checks::oci::check_reference;

    const HEX: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn completes_names_as_docker_does() {
        let pinned = format!("@sha256:{HEX}");
        for (text, full) in [
            ("node", "docker.io/library/node:latest"),
            ("node:24-slim", "docker.io/library/node:24-slim"),
            ("iiidev/node", "docker.io/iiidev/node:latest"),
            ("docker.io/node", "docker.io/library/node:latest"),
            ("index.docker.io/node:1", "docker.io/library/node:1"),
            (
                "docker.io/iiidev/node:latest",
                "docker.io/iiidev/node:latest",
            ),
            ("localhost/x", "localhost/x:latest"),
            ("localhost:5000/x:y", "localhost:5000/x:y"),
            ("[::1]:5000/x", "[::1]:5000/x:latest"),
            (
                "ghcr.io/a/b/c_d__e--f.g:V1.0_x",
                "ghcr.io/a/b/c_d__e--f.g:V1.0_x",
            ),
            ("HOST/x", "HOST/x:latest"),
            (
                &format!("node{pinned}"),
                &format!("docker.io/library/node{pinned}"),
            ),
            (
                &format!("a/b:c{pinned}"),
                &format!("docker.io/a/b:c{pinned}"),
            ),
        ] {
            let reference: Reference = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(reference.to_string(), full);
        }
    }

    #[test]
    fn refuses_what_docker_refuses() {
        let long = format!("a/{}", "b".repeat(260));
        for (text, message) in [
            ("", "must not be empty"),
            (":tag", "must not be empty"),
            ("Node", "must be in lower case"),
            ("node:", "is not a tag"),
            ("node:-x", "is not a tag"),
            ("node:a b", "is not a tag"),
            (&format!("node:{}", "t".repeat(129)), "is not a tag"),
            ("a..b", "is not an image name"),
            ("a___b", "is not an image name"),
            ("-a", "is not an image name"),
            ("a/", "is not an image name"),
            ("/a", "is not an image name"),
            ("a//b", "is not an image name"),
            ("a/../b", "is not an image name"),
            ("../b", "is not a registry"),
            ("nöde", "is not an image name"),
            ("host.com:99999/x", "is not a registry"),
            ("host..com/x", "is not a registry"),
            ("https://host.com/x", "is not a registry"),
            ("[::zz]/x", "is not a registry"),
            ("[::1/x", "is not a registry"),
            (HEX, "is an image id"),
            ("node@sha256:12", "not a digest"),
            ("node@", "not a digest"),
            (&long, "longer than 255"),
        ] {
            let error = text.parse::<Reference>().expect_err(text).to_string();
            assert!(error.contains(message), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn a_complete_name_is_its_own_completion(
            text in "((localhost|[a-z]{1,5}\\.[a-z]{2,3})(:[1-9][0-9]{0,3})?/)?[a-z0-9]{1,6}(/[a-z0-9]{1,6}([._-][a-z0-9]{1,3})?){0,2}(:[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,8})?"
        ) {
            let once: Reference = text.parse().unwrap();
            let twice: Reference = once.to_string().parse().unwrap();
            prop_assert_eq!(&once, &twice);
            prop_assert!(once.to_string().ends_with(text.split_once('/').map_or(text.as_str(), |(_, rest)| rest))
                || once.tag() == Some(DEFAULT_TAG));
        }

        #[test]
        fn what_parses_has_no_way_out(text in "[a-z0-9./:@_\\[\\]-]{1,60}") {
            check_reference(text.as_bytes());
        }
    }
}
