//! What a build step saw of the project: the facts that decide later whether its result still holds.
//!
//! A fact speaks of the project's own layer alone. Looking a name up is a fact about what the project has there, if
//! anything; listing is one about the names, opening or reading a file, also by changing part of it, one about its contents.
//! A name that the step itself has made, changed or removed says nothing of the project any more, and neither does anything
//! in a directory that the step made. A directory of the project that the step moved keeps speaking of where it was.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use iii_store::Layer;
use iii_store::facts::{Fact, Seen};
use iii_store::layer::{Kind, NodeRef};
use iii_store::tree::components;

use crate::Project;
use crate::ino::Ino;
use crate::upper::record::{Body, Data};
use crate::upper::state::State;
use crate::view::Found;

/// Most facts that are kept apart. A step that sees more depends on the whole project.
pub const MAX_FACTS: usize = 200_000;

/// Records facts. Its lock is a leaf.
#[derive(Debug)]
pub(crate) struct Observer {
    layer: Arc<Layer>,
    project: Project,
    /// Directories of the project that seeds take the place of, from the project's root.
    seeds: Vec<Vec<u8>>,
    facts: Mutex<Facts>,
}

#[derive(Debug, Default)]
struct Facts {
    all: HashSet<Fact>,
    /// Files that were read already, so that reading on costs nothing.
    read: HashSet<Ino>,
    overflow: bool,
}

impl Observer {
    /// `seeds` are paths from the root: what lies in one says nothing of the project.
    pub(crate) fn new(layer: Arc<Layer>, project: Project, seeds: &[Vec<u8>]) -> Self {
        let mut observer = Self {
            layer,
            project,
            seeds: Vec::new(),
            facts: Mutex::default(),
        };
        let seeds = seeds.iter().filter_map(|path| observer.relative(path));
        observer.seeds = seeds.collect();
        observer
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

    /// `path` from the project's root, if it is in the project.
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

    fn add(&self, path: Vec<u8>, how: Seen) {
        if self.is_in_seed(&path) {
            return;
        }
        let seen = how.again(self.node(&path));
        let mut facts = self.lock();
        if facts.all.len() >= MAX_FACTS {
            facts.overflow = true;
        } else {
            facts.all.insert(Fact { path, seen });
        }
    }

    /// Where the lower has what `ino` is, from the project's root.
    fn origin(&self, state: &State, ino: Ino) -> Option<Vec<u8>> {
        match state.find(ino).ok()? {
            Found::Lower(lower) => self.relative(&lower.node.path()),
            Found::Upper(_, node) => self.relative(node.record.origin.as_ref()?),
        }
    }

    /// `name` is looked up in `parent`.
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
        if let Some(mut path) = self.origin(state, parent) {
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend(name);
            self.add(path, Seen::Absent);
        }
    }

    /// `dir` is listed.
    pub(crate) fn listing(&self, state: &State, dir: Ino) {
        if !self.lock().read.insert(dir) {
            return;
        }
        if let Some(path) = self.origin(state, dir) {
            self.add(path, Seen::listing([]));
        }
    }

    /// The contents of the file `ino`, or its target, become known.
    pub(crate) fn contents(&self, state: &State, ino: Ino) {
        if !self.lock().read.insert(ino) {
            return;
        }
        let (from_lower, lower) = match state.find(ino) {
            Ok(Found::Lower(lower)) => (true, Some(lower.ino)),
            Ok(Found::Upper(_, node)) => {
                let own = matches!(
                    node.record.body,
                    Body::File {
                        data: Data::Flat { .. } | Data::Empty,
                        ..
                    }
                );
                (!own, node.lower)
            }
            Err(_) => return,
        };
        let slot = lower.and_then(|ino| state.lower.place(ino));
        if !from_lower || slot.is_none_or(|place| usize::from(place.slot) != self.project.slot) {
            return;
        }
        if let Some(path) = self.origin(state, ino) {
            let how = match self.node(&path).map(NodeRef::kind) {
                Some(Kind::File) => Seen::Contents(iii_store::ObjectId::of(b"")),
                Some(Kind::Symlink) => Seen::target(b""),
                _ => return,
            };
            self.add(path, how);
        }
    }

    /// Everything in the project's directory `path` becomes known.
    pub(crate) fn everything(&self, path: &[u8]) {
        if let Some(path) = self.relative(path) {
            self.add_everything(path);
        }
    }

    fn add_everything(&self, path: Vec<u8>) {
        let Some(node) = self.node(&path) else {
            return;
        };
        self.add(path, Seen::Tree(node.subtree()));
    }

    /// The facts so far, sorted by path.
    pub(crate) fn facts(&self) -> Vec<Fact> {
        if self.lock().overflow {
            let whole = self.node(b"").map(NodeRef::subtree);
            return whole
                .map(|tree| Fact {
                    path: Vec::new(),
                    seen: Seen::Tree(tree),
                })
                .into_iter()
                .collect();
        }
        let mut facts: Vec<Fact> = self.lock().all.iter().cloned().collect();
        facts.sort_by(|a, b| {
            let rank = |fact: &Fact| format!("{:?}", fact.seen);
            a.path.cmp(&b.path).then_with(|| rank(a).cmp(&rank(b)))
        });
        facts
    }
}
