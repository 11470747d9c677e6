//! Facts: what a build step saw of the project.
//!
//! Whoever records them (the overlay) and whoever checks them (the plan) use the same functions here, so that equal
//! means equal. A fact speaks of the project's own files: names that earlier steps put beside them are not in it.

use serde::{Deserialize, Serialize};

use crate::id::{ObjectId, SeenHash, TreeId};
use crate::layer::{Kind, NodeRef};
use crate::tree::components;

/// Context of the hash of a listing.
const LISTING_CONTEXT: &str = "iii store 2026 listing v1";
/// Context of the hash of a symlink's target.
const TARGET_CONTEXT: &str = "iii store 2026 target v1";

/// Something that was observed at a path of the project.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Fact {
    /// Relative to the project's root; empty for the root itself.
    #[serde(with = "path_text")]
    pub path: Vec<u8>,
    /// What was seen there.
    pub seen: Seen,
}

/// What was seen. mtimes never are: they differ between checkouts of the same project.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Seen {
    /// Nothing has this name, be it that a parent is missing or not a directory.
    Absent,
    /// Its type and permissions.
    Stat {
        /// Its type.
        kind: Kind,
        /// `mode & 07777`.
        mode: u16,
    },
    /// The names and types in a directory: [`Seen::listing`].
    Listing(SeenHash),
    /// A file's contents.
    Contents(ObjectId),
    /// Where a symlink points: [`Seen::target`].
    Target(SeenHash),
    /// Everything in a directory.
    Tree(TreeId),
}

impl Seen {
    /// A directory with these entries, in any order.
    pub fn listing<'a>(entries: impl IntoIterator<Item = (&'a [u8], Kind)>) -> Self {
        let mut entries: Vec<_> = entries.into_iter().collect();
        entries.sort_unstable_by_key(|(name, _)| *name);
        let mut hasher = blake3::Hasher::new_derive_key(LISTING_CONTEXT);
        for (name, kind) in entries {
            hasher.update(&[kind as u8]);
            hasher.update(&(name.len() as u16).to_le_bytes());
            hasher.update(name);
        }
        Self::Listing(hasher.finalize().into())
    }

    /// A symlink to `target`.
    pub fn target(target: &[u8]) -> Self {
        let hash = blake3::Hasher::new_derive_key(TARGET_CONTEXT)
            .update(target)
            .finalize();
        Self::Target(hash.into())
    }

    /// Looks at `node` the way that `self` was seen: what is there, seen as a stat, a listing, contents or a target.
    /// Something that cannot be seen that way (the contents of a directory) is seen by its type and permissions.
    #[must_use]
    pub fn again(&self, node: Option<NodeRef<'_>>) -> Self {
        let Some(node) = node.filter(|node| node.kind() != Kind::Whiteout) else {
            return Self::Absent;
        };
        match (self, node.kind()) {
            (Self::Listing(_), Kind::Dir) => {
                Self::listing(node.children().map(|child| (child.name(), child.kind())))
            }
            (Self::Contents(_), Kind::File) => Self::Contents(node.object()),
            (Self::Target(_), Kind::Symlink) => Self::target(node.target()),
            (Self::Tree(_), Kind::Dir) => Self::Tree(node.subtree()),
            (_, kind) => Self::Stat {
                kind,
                mode: node.mode(),
            },
        }
    }
}

/// The node at `path` under the directory `project`.
fn node_at<'a>(project: NodeRef<'a>, path: &[u8]) -> Option<NodeRef<'a>> {
    components(path).try_fold(project, NodeRef::child)
}

/// The first fact that is not true of `project`, the project's directory in its layer.
pub fn first_mismatch<'a>(facts: &'a [Fact], project: NodeRef<'_>) -> Option<&'a Fact> {
    facts
        .iter()
        .find(|fact| fact.seen.again(node_at(project, &fact.path)) != fact.seen)
}

/// A path as text, as it stands in the JSON of a fact: `%` and what is not printable UTF-8 are written as `%` and two hex digits.
pub fn path_text(path: &[u8]) -> String {
    path_text::escape(path)
}

/// Paths as text: `%` and what is not printable UTF-8 are written as `%` and two hex digits.
mod path_text {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(path: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&escape(path))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(from)?;
        unescape(&text).ok_or_else(|| serde::de::Error::custom("a `%` without two hex digits"))
    }

    pub(super) fn escape(path: &[u8]) -> String {
        use std::fmt::Write;
        let mut text = String::with_capacity(path.len());
        let hex = |text: &mut String, bytes: &[u8]| {
            for byte in bytes {
                // Writing to a string cannot fail.
                let _ = write!(text, "%{byte:02x}");
            }
        };
        for chunk in path.utf8_chunks() {
            for c in chunk.valid().chars() {
                if c == '%' || c.is_control() {
                    hex(&mut text, c.encode_utf8(&mut [0; 4]).as_bytes());
                } else {
                    text.push(c);
                }
            }
            hex(&mut text, chunk.invalid());
        }
        text
    }

    pub(super) fn unescape(text: &str) -> Option<Vec<u8>> {
        let mut path = Vec::with_capacity(text.len());
        let mut bytes = text.bytes();
        while let Some(byte) = bytes.next() {
            if byte == b'%' {
                let digits = [bytes.next()?, bytes.next()?];
                let value = |digit: u8| char::from(digit).to_digit(16);
                path.push((value(digits[0])? * 16 + value(digits[1])?) as u8);
            } else {
                path.push(byte);
            }
        }
        Some(path)
    }
}
