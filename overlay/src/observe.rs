//! The view that a build step had of the project: the facts that decide later whether its result
//! still holds.
//!
//! A fact describes the project's own layer, as far as the step saw it. An entry that a layer above
//! the project hides or replaces is in the step's key, and a name that the step itself has made,
//! changed or removed tells nothing about the project any more. A directory of the project that the
//! step moved still yields facts about its original path.
//!
//! | request | fact |
//! |---|---|
//! | lookup of a name that the project does not have | absent |
//! | lookup of a regular file | its contents |
//! | lookup of a symlink | its target |
//! | lookup of a directory or any other entry | its type |
//! | listing a directory, or removing it | its names and types |
//! | moving a directory | everything in it |
//!
//! Every other request on a file follows a lookup of its name, as the kernel knows no inode that it
//! has not looked up. So the observer ignores stat, open, link, rename, unlink and writes over a
//! file: the lookup has recorded that the step depends on the contents, and the kernel may keep
//! attributes for any time. A lookup without such a request after it (realpath, a failing `O_EXCL`)
//! counts as one with it: `access`, which programs use to ask whether a file exists, reads the
//! attributes in the kernel, and the observer cannot tell it from stat. Only directories and
//! symlinks are looked up on the way to another entry.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use iii_store::Layer;
use iii_store::facts::{self, Fact, How};
use iii_store::layer::{Kind, NodeRef};
use iii_store::tree::components;

use crate::Project;
use crate::hides::hide;
use crate::ino::Ino;
use crate::upper::record::{Body, Data};
use crate::upper::state::State;
use crate::view::Found;

/// Most facts that are kept apart. A step with more facts depends on the whole project.
pub const MAX_FACTS: usize = 200_000;
/// Most bytes of the paths of those facts; beyond it, the same holds.
pub const MAX_FACT_BYTES: usize = 64 << 20;

/// Records facts. Its lock is a leaf.
#[derive(Debug)]
pub(crate) struct Observer {
    layer: Arc<Layer>,
    /// The layers above the project's.
    above: Vec<Arc<Layer>>,
    project: Project,
    /// Directories of the project that seeds replace, as paths from the project's root.
    seeds: Vec<Vec<u8>>,
    facts: Mutex<Facts>,
}

#[derive(Debug, Default)]
struct Facts {
    all: HashSet<Fact>,
    /// Bytes of the paths.
    bytes: usize,
    overflow: bool,
}

impl Observer {
    /// The observer of the project's layer in the chain `layers`; none if the chain ends below it.
    /// `seeds` are paths from the root: an entry in one tells nothing about the project.
    pub(crate) fn new(layers: &[Arc<Layer>], project: Project, seeds: &[Vec<u8>]) -> Option<Self> {
        let (below, above) = layers.split_at_checked(project.slot + 1)?;
        let mut observer = Self {
            layer: Arc::clone(below.last()?),
            above: above.to_vec(),
            project,
            seeds: Vec::new(),
            facts: Mutex::default(),
        };
        let seeds = seeds.iter().filter_map(|path| observer.relative(path));
        observer.seeds = seeds.collect();
        Some(observer)
    }

    fn is_in_seed(&self, relative: &[u8]) -> bool {
        let inside = |seed: &Vec<u8>| {
            let rest = relative.strip_prefix(&**seed);
            rest.is_some_and(|rest| rest.first() == Some(&b'/'))
        };
        self.seeds.iter().any(inside)
    }

    fn lock(&self) -> MutexGuard<'_, Facts> {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `path` as seen from the project's root, if it is in the project.
    fn relative(&self, path: &[u8]) -> Option<Vec<u8>> {
        let mut path = components(path);
        for name in components(&self.project.path) {
            if path.next()? != name {
                return None;
            }
        }
        Some(path.collect::<Vec<_>>().join(&b'/'))
    }

    fn node(&self, relative: &[u8]) -> Option<NodeRef<'_>> {
        let root = self.layer.lookup(&self.project.path)?;
        components(relative).try_fold(root, NodeRef::child)
    }

    /// Whether a layer above the project hides the entry that the project has at `relative`, or
    /// would have.
    fn is_hidden(&self, relative: &[u8]) -> bool {
        !self.above.is_empty() && hide(&self.above, &self.in_chain(relative))
    }

    fn in_chain(&self, relative: &[u8]) -> Vec<u8> {
        let both = [&self.project.path, relative];
        both.into_iter()
            .flat_map(components)
            .collect::<Vec<_>>()
            .join(&b'/')
    }

    fn add(&self, path: Vec<u8>, how: How) {
        if self.is_in_seed(&path) {
            return;
        }
        let seen = how.at(self.node(&path));
        let mut facts = self.lock();
        if facts.overflow {
            return;
        }
        let bytes = facts.bytes + path.len();
        if facts.all.len() >= MAX_FACTS || bytes > MAX_FACT_BYTES {
            facts.all = HashSet::new();
            facts.overflow = true;
        } else if facts.all.insert(Fact { path, seen }) {
            facts.bytes = bytes;
        }
    }

    /// Adds all facts that a lookup reveals about the project's entry at a path.
    fn add_entry(&self, path: Vec<u8>) {
        let node = self.node(&path);
        let Some(node) = node.filter(|node| node.kind() == Kind::File) else {
            let how = node.map_or(How::Exists, |node| How::full(node.kind()));
            return self.add(path, how);
        };
        // All names of a hardlinked file share its contents.
        for name in node.links() {
            if let Some(path) = self.relative(&name.path()) {
                self.add(path, How::Contents);
            }
        }
        self.add(path, How::Contents);
    }

    /// The path of the lower inode of `ino`, from the project's root.
    fn origin(&self, state: &State, ino: Ino) -> Option<Vec<u8>> {
        match state.find(ino).ok()? {
            Found::Lower(lower) => self.relative(&lower.node.path()),
            Found::Upper(_, node) => self.relative(node.record.origin.as_ref()?),
        }
    }

    /// Call it when `name` is looked up in `parent`.
    pub(crate) fn lookup(&self, state: &State, parent: Ino, name: &[u8]) {
        if let Ok(Found::Upper(_, node)) = state.find(parent) {
            let own = node.dir.as_ref().is_some_and(|d| d.get(name).is_some());
            if own || node.record.nlink == 0 {
                return;
            }
        }
        if iii_store::tree::check_name(name).is_err() {
            return;
        }
        let Some(mut path) = self.origin(state, parent) else {
            return;
        };
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend(name);
        if !self.is_hidden(&path) {
            self.add_entry(path);
        }
    }

    /// Call it when `dir` is listed or removed.
    pub(crate) fn listing(&self, state: &State, dir: Ino) {
        if let Some(path) = self.origin(state, dir)
            && !self.is_hidden(&path)
        {
            self.add(path, How::Listing);
        }
    }

    /// Call it when `dir` is moved.
    pub(crate) fn moved(&self, state: &State, dir: Ino) {
        if let Some(path) = self.origin(state, dir)
            && !self.is_hidden(&path)
        {
            self.add(path, How::Tree);
        }
    }

    /// Call it when the contents of the file `ino`, or its target, become part of the result.
    pub(crate) fn contents(&self, state: &State, ino: Ino) {
        let lower = match state.find(ino) {
            Ok(Found::Lower(lower)) => Some(lower.ino),
            Ok(Found::Upper(_, node)) => match node.record.body {
                Body::File {
                    data: Data::Flat { .. } | Data::Empty,
                    ..
                } => return,
                _ => node.lower,
            },
            Err(_) => return,
        };
        let slot = lower.and_then(|ino| state.lower.place(ino));
        if slot.is_none_or(|place| usize::from(place.slot) != self.project.slot) {
            return;
        }
        if let Some(path) = self.origin(state, ino) {
            self.add_entry(path);
        }
    }

    /// Call it when everything in the directory `path` becomes part of the result.
    pub(crate) fn everything(&self, path: &[u8]) {
        if let Some(path) = self.relative(path)
            && !self.is_hidden(&path)
        {
            self.add(path, How::Tree);
        }
    }

    /// The facts so far, in the order of [`facts::sort`]; a single fact about the whole project
    /// after an overflow.
    pub(crate) fn facts(&self) -> Vec<Fact> {
        let known = self.lock();
        if known.overflow {
            drop(known);
            let seen = How::Tree.at(self.node(b""));
            let path = Vec::new();
            return vec![Fact { path, seen }];
        }
        let mut facts: Vec<Fact> = known.all.iter().cloned().collect();
        drop(known);
        facts::sort(&mut facts);
        facts
    }
}
