//! Trees in memory: the contents of a layer before its encoding.
//!
//! A [`Source`] can list its directories: a [`Tree`], a directory that
//! was walked, an archive that was unpacked. It becomes bytes, a [`TreeId`] and a [`LayerId`] in
//! [`crate::layer`]. Names are raw bytes and are compared as such: no Unicode normalisation, no
//! case folding. Trees have no atime, no ctime and no inode number.
//!
//! [`TreeId`]: crate::TreeId
//! [`LayerId`]: crate::LayerId

use std::borrow::Cow;
use std::collections::BTreeMap;

use crate::id::ObjectId;

/// Longest name of one entry, in bytes (Linux's `NAME_MAX`).
pub const MAX_NAME: usize = 255;
/// Longest symlink target, in bytes (Linux's `PATH_MAX` less the NUL).
pub const MAX_TARGET: usize = 4095;
/// Deepest nesting of directories. A path of `PATH_MAX` bytes has at most 2,048 components.
pub const MAX_DEPTH: usize = 2048;
/// Most entries in one tree. While a layer is made, each of its entries is held in memory, in about
/// 200 bytes: this bound keeps an ingest below 256 MiB.
pub const MAX_NODES: usize = 1 << 20;
/// Most bytes of names, symlink targets and xattrs in one tree, for the same reason.
pub const MAX_TEXT: usize = 64 << 20;
/// Longest xattr name, in bytes (Linux's `XATTR_NAME_MAX`).
pub const MAX_XATTR_NAME: usize = 255;
/// Longest xattr value, in bytes (Linux's `XATTR_SIZE_MAX`).
pub const MAX_XATTR_VALUE: usize = 64 << 10;
/// Most xattrs of one entry.
pub const MAX_XATTRS: usize = 1024;

/// Why an entry cannot be part of a tree.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    /// Empty, `.`, `..`, too long, or with a `/` or NUL in it.
    #[error("{:?} cannot be a name in a tree", String::from_utf8_lossy(.0))]
    Name(Vec<u8>),
    /// More than [`MAX_DEPTH`] directories deep.
    #[error("a path is more than {MAX_DEPTH} directories deep")]
    Depth,
    /// A component on the way is not a directory.
    #[error("{:?} is not a directory", String::from_utf8_lossy(.0))]
    NotADirectory(Vec<u8>),
    /// A symlink target that is empty, too long, or has a NUL in it.
    #[error("a symlink's target must be 1 to {MAX_TARGET} bytes without NUL")]
    Target,
    /// An xattr beyond the limits.
    #[error("xattr {:?} is beyond the limits ({MAX_XATTRS} of {MAX_XATTR_NAME} + {MAX_XATTR_VALUE} bytes)", String::from_utf8_lossy(.0))]
    Xattr(Vec<u8>),
    /// More than [`MAX_NODES`] entries, or more than [`MAX_TEXT`] bytes of names.
    #[error(
        "the tree is too large: at most {MAX_NODES} entries and {} MiB of names, symlink targets and xattrs", MAX_TEXT >> 20
    )]
    TooLarge,
}

/// A modification time: seconds since 1970, negative before, and nanoseconds below 1,000,000,000.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Mtime {
    /// Seconds since 1970-01-01T00:00:00Z, rounded towards minus infinity.
    pub sec: i64,
    /// Nanoseconds after `sec`.
    pub nsec: u32,
}

/// A device number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Rdev {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

/// Extended attributes, sorted by name by the map itself.
pub type Xattrs = BTreeMap<Box<[u8]>, Box<[u8]>>;

/// Metadata of every entry.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Meta {
    /// Permission bits, setuid, setgid and sticky: `mode & 07777`.
    pub mode: u16,
    /// Owner as the sandbox sees it.
    pub uid: u32,
    /// Group as the sandbox sees it.
    pub gid: u32,
    /// Modification time.
    pub mtime: Mtime,
    /// Extended attributes.
    pub xattrs: Xattrs,
}

/// Contents of an entry that is not a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// A regular file.
    File {
        /// Its contents.
        object: ObjectId,
        /// Their length in bytes.
        size: u64,
    },
    /// A symbolic link.
    Symlink {
        /// Its target, 1 to [`MAX_TARGET`] bytes.
        target: Box<[u8]>,
    },
    /// A named pipe.
    Fifo,
    /// A Unix socket.
    Socket,
    /// A character device.
    Char(Rdev),
    /// A block device.
    Block(Rdev),
    /// The name is absent here and below. Its [`Meta`] is ignored.
    Whiteout,
}

/// An entry that is not a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leaf {
    /// Mode, owner, times, xattrs.
    pub meta: Meta,
    /// Its contents.
    pub content: Content,
    /// Leaves of one tree with the same label are one file with several names. Labels are the
    /// builder's own; encoding renumbers them. A label that stands once means nothing.
    pub link: Option<u64>,
}

/// How a directory combines with those of the same name below it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DirKind {
    /// Its own metadata, and the entries below show through.
    #[default]
    Merged,
    /// Its own metadata, and nothing below shows through.
    Opaque,
    /// Only on the way to something: the metadata of the directory below holds, if there is one.
    /// Its own [`Meta`] is encoded as mode 0755, owner 0:0, mtime 0, without xattrs.
    Implicit,
}

/// A directory.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Dir {
    /// Mode, owner, times, xattrs.
    pub meta: Meta,
    /// How it combines with the layers below.
    pub kind: DirKind,
    /// Its entries by name.
    pub entries: Entries,
}

/// Entries of a directory, sorted by name: an array, which takes half the memory of a `BTreeMap`,
/// and less for the many directories with few entries. Inserting moves the later entries: callers
/// with many entries collect them first.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Entries(Vec<(Box<[u8]>, Node)>);

impl Entries {
    fn position(&self, name: &[u8]) -> Result<usize, usize> {
        // Most come in order.
        match self.0.last() {
            Some((last, _)) if **last < *name => Err(self.0.len()),
            _ => self.0.binary_search_by(|(there, _)| (**there).cmp(name)),
        }
    }

    /// Puts an entry in. Returns the one that had the name.
    pub fn insert(&mut self, name: Box<[u8]>, node: Node) -> Option<Node> {
        match self.position(&name) {
            Ok(ix) => Some(std::mem::replace(&mut self.0[ix].1, node)),
            Err(ix) => {
                self.0.insert(ix, (name, node));
                None
            }
        }
    }

    /// Takes an entry out.
    pub fn remove(&mut self, name: &[u8]) -> Option<Node> {
        self.position(name).ok().map(|ix| self.0.remove(ix).1)
    }

    /// The entry of this name.
    pub fn get(&self, name: &[u8]) -> Option<&Node> {
        self.position(name).ok().map(|ix| &self.0[ix].1)
    }

    /// The entry of this name.
    pub fn get_mut(&mut self, name: &[u8]) -> Option<&mut Node> {
        self.position(name).ok().map(|ix| &mut self.0[ix].1)
    }

    /// All entries by ascending name.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&[u8], &Node)> {
        self.0.iter().map(|(name, node)| (&**name, node))
    }

    /// All entries by ascending name.
    pub fn values_mut(&mut self) -> impl ExactSizeIterator<Item = &mut Node> {
        self.0.iter_mut().map(|(_, node)| node)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether it has no entry.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Of several entries of one name any stays.
impl FromIterator<(Box<[u8]>, Node)> for Entries {
    fn from_iter<I: IntoIterator<Item = (Box<[u8]>, Node)>>(entries: I) -> Self {
        let mut entries: Vec<_> = entries.into_iter().collect();
        entries.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        entries.dedup_by(|a, b| a.0 == b.0);
        entries.shrink_to_fit();
        Self(entries)
    }
}

/// An entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    /// A directory.
    Dir(Dir),
    /// Anything else.
    Leaf(Leaf),
}

/// A whole tree: its root directory.
pub type Tree = Dir;

/// An entry of a [`Source`].
#[derive(Debug, Clone)]
pub enum Entry<'a, D> {
    /// A directory.
    Dir(D),
    /// Anything else.
    Leaf(Cow<'a, Leaf>),
}

/// A tree, however it is held. It is read several times and says the same each time.
pub trait Source: Sync {
    /// Handle of a directory of it.
    type Dir<'a>: Copy + Send + Sync
    where
        Self: 'a;

    /// The root.
    fn root(&self) -> Self::Dir<'_>;

    /// A directory's metadata, and how it combines with the layers below.
    fn dir<'a>(&'a self, dir: Self::Dir<'a>) -> (Cow<'a, Meta>, DirKind);

    /// A directory's entries, by ascending name.
    fn entries<'a>(
        &'a self,
        dir: Self::Dir<'a>,
    ) -> impl Iterator<Item = (&'a [u8], Entry<'a, Self::Dir<'a>>)>;
}

impl Source for Tree {
    type Dir<'a> = &'a Dir;

    fn root(&self) -> &Dir {
        self
    }

    fn dir<'a>(&'a self, dir: &'a Dir) -> (Cow<'a, Meta>, DirKind) {
        (Cow::Borrowed(&dir.meta), dir.kind)
    }

    fn entries<'a>(&'a self, dir: &'a Dir) -> impl Iterator<Item = (&'a [u8], Entry<'a, &'a Dir>)> {
        dir.entries.iter().map(|(name, node)| {
            let entry = match node {
                Node::Dir(dir) => Entry::Dir(dir),
                Node::Leaf(leaf) => Entry::Leaf(Cow::Borrowed(leaf)),
            };
            (name, entry)
        })
    }
}

/// The contents and the size of every file of a tree.
pub(crate) fn files<S: Source>(tree: &S) -> impl Iterator<Item = (ObjectId, u64)> {
    let mut dirs = vec![tree.root()];
    let mut entries = None;
    std::iter::from_fn(move || {
        loop {
            let Some(in_dir) = &mut entries else {
                entries = Some(tree.entries(dirs.pop()?));
                continue;
            };
            match in_dir.next() {
                Some((_, Entry::Dir(dir))) => dirs.push(dir),
                Some((_, Entry::Leaf(leaf))) => {
                    if let Content::File { object, size } = leaf.content {
                        return Some((object, size));
                    }
                }
                None => entries = None,
            }
        }
    })
}

/// Checks that `name` can stand in a tree.
pub fn check_name(name: &[u8]) -> Result<(), TreeError> {
    let fits = !name.is_empty()
        && name.len() <= MAX_NAME
        && name != b"."
        && name != b".."
        && !name.iter().any(|&byte| byte == b'/' || byte == 0);
    if fits {
        Ok(())
    } else {
        Err(TreeError::Name(
            name.iter().copied().take(MAX_NAME + 1).collect(),
        ))
    }
}

/// The components of a relative path such as `usr/bin/node`; empty ones are dropped.
pub fn components(path: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    path.split(|&byte| byte == b'/')
        .filter(|name| !name.is_empty())
}

impl Dir {
    /// A directory that is only on the way to something.
    pub fn implicit() -> Self {
        Self {
            meta: Meta::default(),
            kind: DirKind::Implicit,
            entries: Entries::default(),
        }
    }

    /// The directory at `path`, made of implicit ones where it is missing.
    pub fn dir_at(&mut self, path: &[u8]) -> Result<&mut Dir, TreeError> {
        let mut dir = self;
        for (depth, name) in components(path).enumerate() {
            if depth >= MAX_DEPTH {
                return Err(TreeError::Depth);
            }
            check_name(name)?;
            let entries = &mut dir.entries;
            let ix = entries.position(name).unwrap_or_else(|ix| {
                let made = (name.into(), Node::Dir(Dir::implicit()));
                entries.0.insert(ix, made);
                ix
            });
            match &mut entries.0[ix].1 {
                Node::Dir(next) => dir = next,
                Node::Leaf(_) => return Err(TreeError::NotADirectory(name.into())),
            }
        }
        Ok(dir)
    }

    /// The entry at `path`, if there is one.
    pub fn get(&self, path: &[u8]) -> Option<&Node> {
        let mut names = components(path);
        let mut node = self.entries.get(names.next()?)?;
        for name in names {
            match node {
                Node::Dir(dir) => node = dir.entries.get(name)?,
                Node::Leaf(_) => return None,
            }
        }
        Some(node)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let long = [b'a'; 256];
        for (name, fits) in [
            (&b"a"[..], true),
            (b"...", true),
            (b"\xff\xfe", true),
            (&long[..255], true),
            (&long[..], false),
            (b"", false),
            (b".", false),
            (b"..", false),
            (b"a/b", false),
            (b"a\0b", false),
        ] {
            assert_eq!(check_name(name).is_ok(), fits, "{name:?}");
        }
    }

    #[test]
    fn missing_parents_are_implicit() {
        let mut tree = Tree::default();
        tree.dir_at(b"usr/local").unwrap();
        let Some(Node::Dir(usr)) = tree.get(b"usr") else {
            panic!("no usr")
        };
        assert_eq!(usr.kind, DirKind::Implicit);
        let leaf = Node::Leaf(Leaf {
            meta: Meta::default(),
            content: Content::Fifo,
            link: None,
        });
        tree.entries.insert((*b"p").into(), leaf);
        assert_eq!(
            tree.dir_at(b"p/q").unwrap_err(),
            TreeError::NotADirectory(b"p".to_vec())
        );
    }
}
