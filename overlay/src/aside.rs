//! Parts of a build step's filesystem that are not the step's result, or not only.
//!
//! - A *volume* is a directory of a cache. Its layers lie below the upper; what the step changed in
//!   it is frozen apart from the result, and the result says nothing of it. Like a mount, it ends
//!   at its root: nothing is renamed or linked into it or out of it (`EXDEV`), and its root is not
//!   moved (`EBUSY`). So a program copies out of a cache, and what it does to the copy does nothing
//!   to the cache.
//! - *Scratch* is a path that tools make for themselves and can make again. It is dropped.
//! - A *seed* is a directory that a step begins with and whose result it is as a whole, changed or
//!   not.
//!
//! The layers of volumes and seeds are [borrowed](Aside::slots): the result stands on the other
//! layers of the chain.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::ino::{Ino, ROOT};
use crate::merge::Merged;
use crate::posix::{Errno, Result};
use crate::upper::state::State;
use crate::view::Found;

/// See the module. Paths are relative to the root, as in `root/.npm/_cacache`; none lies in
/// another.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct Aside {
    /// Indexes in the chain of the layers that the result does not stand on.
    pub slots: Vec<usize>,
    /// The roots of volumes. The borrowed layers have a directory at each.
    pub volumes: Vec<Vec<u8>>,
    /// Files and directories that are dropped.
    pub scratch: Vec<Vec<u8>>,
    /// The roots of seeds.
    pub seeds: Vec<Vec<u8>>,
}

/// [`Aside`] as an overlay keeps it.
#[derive(Debug, Default)]
pub(crate) struct Kept {
    pub(crate) aside: Aside,
    /// The roots of the volumes, and their paths.
    roots: Vec<(Ino, Vec<u8>)>,
    /// The volume of each file that was made in one. A leaf.
    made: Mutex<HashMap<Ino, Ino>>,
}

impl Kept {
    pub(crate) fn new(aside: Aside, lower: &Merged) -> Self {
        let root = |path: &Vec<u8>| Some((lower.lookup_path(path)?.ino, path.clone()));
        Self {
            roots: aside.volumes.iter().filter_map(root).collect(),
            made: Mutex::default(),
            aside,
        }
    }

    /// The volume in which the directory `dir` lies.
    fn volume_of(&self, state: &State, mut dir: Ino) -> Option<Ino> {
        loop {
            if self.roots.iter().any(|(root, _)| *root == dir) {
                return Some(dir);
            }
            if dir == ROOT {
                return None;
            }
            dir = state.parent(dir);
        }
    }

    /// An error if one of two directories lies in a volume, and the other does not lie in the same.
    pub(crate) fn check_same_volume(&self, state: &State, one: Ino, other: Ino) -> Result<()> {
        if self.roots.is_empty()
            || one == other
            || self.volume_of(state, one) == self.volume_of(state, other)
        {
            return Ok(());
        }
        Err(Errno::XDEV)
    }

    /// `ino` was made in the directory `dir`.
    pub(crate) fn note(&self, state: &State, dir: Ino, ino: Ino) {
        if !self.roots.is_empty()
            && let Some(volume) = self.volume_of(state, dir)
        {
            self.lock().insert(ino, volume);
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Ino, Ino>> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The volume in which the file `ino` has its names.
    fn volume_of_file(&self, state: &State, ino: Ino) -> Option<Ino> {
        let lower = match state.find(ino).ok()? {
            Found::Lower(lower) => Some(lower.ino),
            Found::Upper(_, node) => node.lower,
        };
        let Some(lower) = lower.and_then(|ino| state.lower.get(ino)) else {
            return self.lock().get(&ino).copied();
        };
        let slot = state.lower.place(lower.ino)?.slot;
        if !self.aside.slots.contains(&slot.into()) {
            return None;
        }
        let path = lower.node.path();
        let inside = |root: &&(Ino, Vec<u8>)| {
            let rest = path.strip_prefix(&*root.1);
            rest.is_some_and(|rest| rest.first() == Some(&b'/'))
        };
        self.roots.iter().find(inside).map(|(root, _)| *root)
    }

    /// An error if a link in `dir` would give a file a name beyond its volume. A file without a
    /// name may have its first one anywhere.
    pub(crate) fn check_link(&self, state: &State, ino: Ino, dir: Ino) -> Result<()> {
        if self.roots.is_empty() {
            return Ok(());
        }
        let nameless = match state.find(ino)? {
            Found::Upper(_, node) => node.record.nlink == 0,
            Found::Lower(_) => false,
        };
        if nameless {
            self.note(state, dir, ino);
            return Ok(());
        }
        if self.volume_of_file(state, ino) == self.volume_of(state, dir) {
            return Ok(());
        }
        Err(Errno::XDEV)
    }

    /// An error if the root of a volume is `dir`, or lies in it.
    pub(crate) fn check_no_root(&self, state: &State, dir: Ino) -> Result<()> {
        let within = |root: &&(Ino, Vec<u8>)| state.is_within(root.0, dir);
        self.roots
            .iter()
            .find(within)
            .map_or(Ok(()), |_| Err(Errno::BUSY))
    }
}

/// Flat files that have a name in scratch and no other.
pub(crate) fn scratch_flats(state: &State, aside: &Aside) -> HashSet<u64> {
    let mut flats = HashSet::new();
    let mut pending: Vec<Ino> = aside
        .scratch
        .iter()
        .filter_map(|path| state.at_path(path))
        .collect();
    while let Some(ino) = pending.pop() {
        match state.find(ino) {
            Ok(Found::Upper(_, node)) if node.record.is_dir() => {}
            Ok(Found::Upper(_, node)) => {
                flats.extend(node.record.flat().filter(|_| node.record.nlink == 1));
                continue;
            }
            _ => continue,
        }
        let listed = state.for_each(ino, 0, &mut |_, _, child| {
            pending.push(child);
            true
        });
        // The walk of the tree tells of it.
        if listed.is_err() {
            break;
        }
    }
    flats
}
