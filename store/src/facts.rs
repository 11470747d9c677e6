//! Facts: a build step's observations of the project.
//!
//! The overlay records facts and the plan checks them with the functions here, so that equal means
//! equal. A fact speaks of the project's own files: names that other layers put beside them are not
//! in it.
//!
//! A fact is a [`Look`] (a path, and how it was looked at) and its answer. The same looks at two
//! projects with the same answers make the same [`FactsId`], so a record is found by a digest: see
//! [`crate::Store::find_record`].
//!
//! mtimes are never facts: they differ between checkouts of one commit. Nor are modes, but for the
//! owner's execute bit: git keeps no more, and the rest follows the umask of the checkout.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::id::{FactsId, LooksId, ObjectId, SeenHash};
use crate::layer::{Kind, NodeRef};
use crate::tree::components;

/// Context of the hash of a listing.
const LISTING_CONTEXT: &str = "iii store 2026 listing v1";
/// Context of the hash of a symlink's target.
const TARGET_CONTEXT: &str = "iii store 2026 target v1";
/// Context of the hash of everything in a directory.
const TREE_CONTEXT: &str = "iii store 2026 seen tree v1";
/// Context of [`FactsId`].
const FACTS_CONTEXT: &str = "iii store 2026 facts v1";
/// Context of [`LooksId`].
const LOOKS_CONTEXT: &str = "iii store 2026 looks v1";

/// The permission to execute that a file's owner has.
const OWNER_EXECUTES: u16 = 0o100;

/// Something that was observed at a path of the project.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Fact {
    /// Relative to the project's root; empty for the root itself.
    #[serde(with = "path_text")]
    pub path: Vec<u8>,
    /// The observation.
    pub seen: Seen,
}

impl Fact {
    /// The look that found this.
    pub fn look(&self) -> Look {
        Look {
            path: self.path.clone(),
            how: self.seen.how(),
        }
    }
}

/// An observation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Seen {
    /// Nothing has this name, be it that a parent is missing or not a directory.
    Absent,
    /// Its type, and whether its owner may execute it.
    Stat {
        /// Its type.
        kind: Kind,
        /// Whether its owner may execute it.
        exec: bool,
    },
    /// The names and types in a directory: [`Seen::listing`].
    Listing(SeenHash),
    /// A regular file.
    Contents {
        /// Its contents.
        object: ObjectId,
        /// Whether its owner may execute it.
        exec: bool,
    },
    /// Where a symlink points: [`Seen::target`].
    Target(SeenHash),
    /// Everything in a directory: [`Seen::tree`].
    Tree(SeenHash),
}

/// How a path is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum How {
    /// Whether something is there, and its type.
    Exists,
    /// The names in a directory.
    Listing,
    /// A file's contents.
    Contents,
    /// A symlink's target.
    Target,
    /// Everything in a directory.
    Tree,
}

impl How {
    /// The look that takes the place of all others at a path of this type, as far as it knows it.
    pub fn full(kind: Kind) -> Self {
        match kind {
            Kind::File => Self::Contents,
            Kind::Symlink => Self::Target,
            _ => Self::Exists,
        }
    }

    /// Looks at `node`. Something that cannot be looked at that way (the contents of a directory)
    /// is seen by its type.
    pub fn at(self, node: Option<NodeRef<'_>>) -> Seen {
        let Some(node) = node.filter(|node| node.kind() != Kind::Whiteout) else {
            return Seen::Absent;
        };
        match (self, node.kind()) {
            (Self::Listing, Kind::Dir) => {
                Seen::listing(node.children().map(|child| (child.name(), child.kind())))
            }
            (Self::Contents, Kind::File) => Seen::Contents {
                object: node.object(),
                exec: executes(node),
            },
            (Self::Target, Kind::Symlink) => Seen::target(node.target()),
            (Self::Tree, Kind::Dir) => Seen::tree(node),
            (_, kind) => Seen::Stat {
                kind,
                exec: executes(node),
            },
        }
    }
}

fn executes(node: NodeRef<'_>) -> bool {
    node.kind() != Kind::Symlink && node.mode() & OWNER_EXECUTES != 0
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

    /// Everything in the directory `dir`: names, types, who may execute, contents and targets. As
    /// everywhere in facts, owners, other permissions and mtimes are not in it, nor is which names
    /// are hardlinks of one file.
    #[must_use]
    pub fn tree(dir: NodeRef<'_>) -> Self {
        /// In the place of a type: the directory that was begun last is over.
        const END: u8 = 0xff;
        let mut hasher = blake3::Hasher::new_derive_key(TREE_CONTEXT);
        let mut open = vec![dir.children()];
        while let Some(children) = open.last_mut() {
            let Some(node) = children.next() else {
                hasher.update(&[END]);
                open.pop();
                continue;
            };
            hasher.update(&[node.kind() as u8, u8::from(executes(node))]);
            hasher.update(&(node.name().len() as u16).to_le_bytes());
            hasher.update(node.name());
            match node.kind() {
                Kind::File => {
                    hasher.update(node.object().as_bytes());
                }
                Kind::Symlink => {
                    hasher.update(&(node.target().len() as u32).to_le_bytes());
                    hasher.update(node.target());
                }
                Kind::Dir => open.push(node.children()),
                _ => {}
            }
        }
        Self::Tree(hasher.finalize().into())
    }

    /// The look that finds this.
    pub fn how(&self) -> How {
        match self {
            Self::Absent | Self::Stat { .. } => How::Exists,
            Self::Listing(_) => How::Listing,
            Self::Contents { .. } => How::Contents,
            Self::Target(_) => How::Target,
            Self::Tree(_) => How::Tree,
        }
    }

    fn hash_into(&self, hasher: &mut blake3::Hasher) {
        match self {
            Self::Absent => hasher.update(&[0]),
            Self::Stat { kind, exec } => hasher.update(&[1, *kind as u8, u8::from(*exec)]),
            Self::Listing(hash) => hasher.update(&[2]).update(hash.as_bytes()),
            Self::Contents { object, exec } => hasher
                .update(&[3, u8::from(*exec)])
                .update(object.as_bytes()),
            Self::Target(hash) => hasher.update(&[4]).update(hash.as_bytes()),
            Self::Tree(hash) => hasher.update(&[5]).update(hash.as_bytes()),
        };
    }
}

/// A path of the project, and how it is looked at. As text, a letter for how and the path.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Look {
    /// Relative to the project's root; empty for the root itself.
    pub path: Vec<u8>,
    /// How it is looked at.
    pub how: How,
}

/// The letters of [`How`] in the text of a [`Look`].
const LETTERS: [(char, How); 5] = [
    ('e', How::Exists),
    ('l', How::Listing),
    ('c', How::Contents),
    ('t', How::Target),
    ('a', How::Tree),
];

impl Serialize for Look {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let letter = LETTERS.iter().find(|(_, how)| *how == self.how);
        let mut text = String::from(letter.map_or('e', |(letter, _)| *letter));
        text.push_str(&path_text::escape(&self.path));
        serializer.serialize_str(&text)
    }
}

impl<'de> Deserialize<'de> for Look {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let look = || {
            let first = text.chars().next()?;
            let (_, how) = LETTERS.iter().find(|(letter, _)| *letter == first)?;
            let path = path_text::unescape(text.get(1..)?)?;
            Some(Self { path, how: *how })
        };
        look().ok_or_else(|| serde::de::Error::custom("not a look at a path"))
    }
}

/// A project's answers to looks. Each look is done once.
#[derive(Debug)]
pub struct Answers<'a> {
    project: NodeRef<'a>,
    known: HashMap<Look, Seen>,
}

impl<'a> Answers<'a> {
    /// Of the project whose directory in its layer is `project`.
    pub fn new(project: NodeRef<'a>) -> Self {
        Self {
            project,
            known: HashMap::new(),
        }
    }

    /// The answer to a look.
    pub fn to(&mut self, look: &Look) -> Seen {
        if let Some(seen) = self.known.get(look) {
            return *seen;
        }
        let seen = look.how.at(node_at(self.project, &look.path));
        self.known.insert(look.clone(), seen);
        seen
    }

    /// The facts that these looks find in this project.
    pub fn facts(&mut self, looks: &[Look]) -> Vec<Fact> {
        let fact = |look: &Look| Fact {
            path: look.path.clone(),
            seen: self.to(look),
        };
        looks.iter().map(fact).collect()
    }

    /// How many looks were done.
    pub fn looks(&self) -> usize {
        self.known.len()
    }

    /// The id of the facts that these looks find in this project.
    pub fn facts_id<'l>(&mut self, looks: impl IntoIterator<Item = &'l Look>) -> FactsId {
        let mut hasher = blake3::Hasher::new_derive_key(FACTS_CONTEXT);
        for look in looks {
            hash_fact(&mut hasher, look, &self.to(look));
        }
        hasher.finalize().into()
    }

    /// The first of `facts` that is not true of this project.
    pub fn first_mismatch<'f>(&mut self, facts: &'f [Fact]) -> Option<&'f Fact> {
        facts.iter().find(|fact| self.to(&fact.look()) != fact.seen)
    }
}

fn hash_look(hasher: &mut blake3::Hasher, look: &Look) {
    hasher.update(&[look.how as u8]);
    hasher.update(&(look.path.len() as u32).to_le_bytes());
    hasher.update(&look.path);
}

fn hash_fact(hasher: &mut blake3::Hasher, look: &Look, seen: &Seen) {
    hash_look(hasher, look);
    seen.hash_into(hasher);
}

/// The id of these facts, which depends on their order: see [`sort`].
pub fn facts_id(facts: &[Fact]) -> FactsId {
    let mut hasher = blake3::Hasher::new_derive_key(FACTS_CONTEXT);
    for fact in facts {
        hash_fact(&mut hasher, &fact.look(), &fact.seen);
    }
    hasher.finalize().into()
}

/// The id of the looks that found these facts.
pub fn looks_id(facts: &[Fact]) -> LooksId {
    let mut hasher = blake3::Hasher::new_derive_key(LOOKS_CONTEXT);
    for fact in facts {
        hash_look(&mut hasher, &fact.look());
    }
    hasher.finalize().into()
}

/// Puts facts in their order, by path and then by look, and drops those that others imply: of a
/// path whose contents or target are known, its type.
pub fn sort(facts: &mut Vec<Fact>) {
    facts.sort_by(|a, b| a.path.cmp(&b.path).then(b.seen.how().cmp(&a.seen.how())));
    facts.dedup_by(|next, one| {
        next.path == one.path
            && (next.seen == one.seen
                || next.seen.how() == How::Exists
                    && matches!(one.seen.how(), How::Contents | How::Target))
    });
    facts.sort_by(|a, b| a.path.cmp(&b.path).then(a.seen.how().cmp(&b.seen.how())));
}

/// The node at `path` under the directory `project`.
fn node_at<'a>(project: NodeRef<'a>, path: &[u8]) -> Option<NodeRef<'a>> {
    components(path).try_fold(project, NodeRef::child)
}

/// The first fact that is not true of `project`, the project's directory in its layer.
pub fn first_mismatch<'a>(facts: &'a [Fact], project: NodeRef<'_>) -> Option<&'a Fact> {
    facts
        .iter()
        .find(|fact| fact.seen.how().at(node_at(project, &fact.path)) != fact.seen)
}

/// A path as text, as it stands in the JSON of a fact: `%` and bytes that are not printable UTF-8
/// are written as `%` and two hex digits.
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
