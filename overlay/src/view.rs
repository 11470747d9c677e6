//! Lower and upper as one: names, entries and where directories stand.

use iii_store::layer::Kind;
use iii_store::tree::{MAX_NAME, components};

use crate::ino::{Ino, ROOT};
use crate::merge::Lower;
use crate::posix::{Errno, Result};
use crate::upper::record::{Body, Bytes, Data, Record};
use crate::upper::state::{Node, OWN_END, State};

/// `.` and `..` come first, so position `p` is cookie `p + 2`, and its successor's is `p + 3`.
const FIRST_NAME: u64 = 2;

/// Deepest directory that can be told from a circle.
const MAX_WALK: usize = 1 << 20;

/// An inode: known to the upper, or as the lower has it.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Found<'a> {
    Upper(u64, &'a Node),
    Lower(Lower<'a>),
}

impl Found<'_> {
    pub(crate) fn kind(self) -> Kind {
        match self {
            Self::Upper(_, node) => node.record.kind(),
            Self::Lower(lower) => lower.node.kind(),
        }
    }
}

impl State {
    /// The inode with this number.
    pub(crate) fn find(&self, ino: Ino) -> Result<Found<'_>> {
        if let Some(number) = self.number(ino) {
            let node = self.node(number).ok_or(Errno::STALE)?;
            return Ok(Found::Upper(number, node));
        }
        let lower = self.lower.get(ino).ok_or(Errno::STALE)?;
        if lower.node.kind() == Kind::Whiteout {
            return Err(Errno::STALE);
        }
        Ok(Found::Lower(lower))
    }

    /// The entry `name` of `parent`, if there is one.
    pub(crate) fn child(&self, parent: Ino, name: &[u8]) -> Result<Option<Ino>> {
        let found = self.find(parent)?;
        if found.kind() != Kind::Dir {
            return Err(Errno::NOTDIR);
        }
        if name.len() > MAX_NAME {
            return Err(Errno::NAMETOOLONG);
        }
        let below = |dir: Ino| self.lower.lookup(dir, name).map(|lower| lower.ino);
        Ok(match found {
            Found::Lower(lower) => below(lower.ino),
            Found::Upper(_, node) if node.record.nlink == 0 => None,
            Found::Upper(_, node) => match node.dir.as_ref().and_then(|dir| dir.get(name)) {
                Some(to) => to.map(|to| self.ino(to)),
                None => node.lower.and_then(below),
            },
        })
    }

    /// The directory in which a directory stands.
    pub(crate) fn parent(&self, dir: Ino) -> Ino {
        let lower = |ino| {
            self.lower
                .get(ino)
                .map_or(ROOT, |lower| self.lower.parent(lower))
        };
        match self.number(dir).and_then(|number| self.node(number)) {
            Some(node) => match node.dir.as_ref().and_then(|dir| dir.parent) {
                Some(parent) => self.ino(parent),
                None => node.lower.map_or(ROOT, lower),
            },
            None => lower(dir),
        }
    }

    /// Whether `dir` is `ancestor` or in it.
    pub(crate) fn is_within(&self, mut dir: Ino, ancestor: Ino) -> bool {
        for _ in 0..MAX_WALK {
            if dir == ancestor {
                return true;
            }
            if dir == ROOT {
                return false;
            }
            dir = self.parent(dir);
        }
        // No path is that deep: the log lies.
        true
    }

    /// Calls `each` with the cookie, the name and the inode of every entry from `cookie` on, as
    /// long as it returns true.
    pub(crate) fn for_each<'a>(
        &'a self,
        dir: Ino,
        cookie: u64,
        each: &mut dyn FnMut(u64, &'a [u8], Ino) -> bool,
    ) -> Result<()> {
        let (lower, upper) = match self.find(dir)? {
            found if found.kind() != Kind::Dir => return Err(Errno::NOTDIR),
            Found::Lower(lower) => (Some(lower.ino), None),
            Found::Upper(_, node) if node.record.nlink == 0 => return Ok(()),
            Found::Upper(_, node) => (node.lower, node.dir.as_deref()),
        };
        let from = cookie.saturating_sub(FIRST_NAME);
        if let Some(upper) = upper.filter(|_| from < OWN_END) {
            for (position, name, number) in upper.own_from(from) {
                if !each(position + FIRST_NAME + 1, name, self.ino(number)) {
                    return Ok(());
                }
            }
        }
        if let Some(lower) = lower {
            let from = from.saturating_sub(OWN_END) as usize;
            for (position, name, child) in self.lower.children(lower, from) {
                let ino = match upper.and_then(|upper| upper.get(name)) {
                    None => child.ino,
                    Some(Some(number)) => self.ino(number),
                    Some(None) => continue,
                };
                if !each(OWN_END + position as u64 + FIRST_NAME + 1, name, ino) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// The entry at a path from the root, without following symlinks.
    pub(crate) fn at_path(&self, path: &[u8]) -> Option<Ino> {
        components(path).try_fold(ROOT, |dir, name| self.child(dir, name).ok()?)
    }

    /// Whether a directory has no entries.
    pub(crate) fn is_empty(&self, dir: Ino) -> Result<bool> {
        let mut empty = true;
        self.for_each(dir, 0, &mut |_, _, _| {
            empty = false;
            false
        })?;
        Ok(empty)
    }

    /// Where a regular file's bytes are.
    pub(crate) fn bytes(&self, ino: Ino) -> Result<Bytes> {
        match self.find(ino)? {
            Found::Upper(_, node) => bytes_of(&node.record),
            Found::Lower(lower) if lower.node.kind() == Kind::File => Ok(Bytes {
                data: if lower.node.size() == 0 {
                    Data::Empty
                } else {
                    Data::object(lower.node.object())
                },
                size: lower.node.size(),
            }),
            Found::Lower(lower) => Err(not_a_file(lower.node.kind())),
        }
    }
}

fn bytes_of(record: &Record) -> Result<Bytes> {
    match record.body {
        Body::File { data, size } => Ok(Bytes { data, size }),
        _ => Err(not_a_file(record.kind())),
    }
}

fn not_a_file(kind: Kind) -> Errno {
    if kind == Kind::Dir {
        Errno::ISDIR
    } else {
        Errno::INVAL
    }
}
