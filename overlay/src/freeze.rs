//! An upper as a layer: the tree that, laid on the lower, shows the overlay as it is now.
//!
//! The result depends on the contents of the overlay, not on their history. The result omits an
//! entry that equals the lower's, mtime included. It has a whiteout only where the lower has the
//! name, and an opaque mark only on a directory where the lower has one. A directory that is only
//! on the way to a change is implicit, and a directory is omitted if nothing but its mtime changed.
//! A lower directory that was moved is written out in full at its new place, by object ids: no data
//! is copied. If one name of a hardlinked file is written out, all its names are. Sockets are
//! omitted: no process listens on them any more.
//!
//! # While the sandbox runs
//!
//! The result is the state of the filesystem at one moment: it has every request that was answered
//! before that moment, and none that was answered after. Data that the guest's kernel or a program
//! has not sent yet is missing, as after a power loss. Most of the data is read while the sandbox
//! runs. Writers then wait until the files that were written to meanwhile have been read once more
//! and the tree has been walked. They wait for at most [`HELD_BYTES`] of data; if the sandbox
//! always writes to more than that, freezing fails.

use std::collections::{HashMap, HashSet};
use std::io;

use iii_store::Ingest;
use iii_store::ObjectId;
use iii_store::StoreError;
use iii_store::layer::Kind;
use iii_store::tree::{
    Content, Dir, DirKind, Leaf, MAX_DEPTH, Meta, Node, Tree, TreeError, components,
};
use rayon::prelude::*;

use crate::Footing;
use crate::aside::scratch_flats;
use crate::fs::Errno;
use crate::ino::{Ino, ROOT};
use crate::merge::Lower;
use crate::overlay::Overlay;
use crate::upper::batch::lower_record;
use crate::upper::record::{Body, Data, Record};
use crate::upper::state::{self, State};
use crate::view::Found;

/// Bytes of the stack of the thread that walks the tree, for [`MAX_DEPTH`] directories.
const STACK: usize = 64 << 20;

/// Most bytes of files that are read while the sandbox waits.
pub const HELD_BYTES: u64 = 64 << 20;
/// Most rounds of reading the files that were written to since the last round, before freezing
/// fails.
const ROUNDS: usize = 8;

/// The reasons that an upper cannot be frozen.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    /// The changes are too deep for a layer.
    #[error("a layer cannot hold the changes")]
    Tree(#[from] TreeError),
    /// The layers below the result cannot be merged.
    #[error("the layers below cannot be composed")]
    Below(#[from] crate::merge::MergeError),
    /// The data of a file cannot be read.
    #[error("opening the data of a changed file failed")]
    Data(#[source] io::Error),
    /// The data of a file cannot be stored.
    #[error("storing the changed files failed")]
    Store(#[from] Box<StoreError>),
    /// The upper contradicts itself.
    #[error("the upper is damaged")]
    Upper(#[source] Errno),
    /// In no round were the new bytes few enough.
    #[error("the sandbox never stops writing to more than {} MiB of files", HELD_BYTES >> 20)]
    Restless,
    /// The thread that walks the tree did not start.
    #[error("starting a thread failed")]
    Thread(#[source] io::Error),
}

/// The contents of flat files, object and length in bytes, by their numbers.
type Stored = HashMap<u64, (ObjectId, u64)>;

struct Walk<'a> {
    overlay: &'a Overlay,
    state: &'a State,
    objects: Stored,
    /// Lower directories with a change anywhere in them.
    touched: HashSet<Ino>,
    /// Unchanged hardlinked lower files, of which a name is written out.
    linked: HashSet<Ino>,
    /// Directories that are written out in full.
    seeds: HashSet<Ino>,
}

impl Overlay {
    /// The changes of the upper as a tree, with the data of its files stored through `ingest`, and
    /// the footing of the upper. The sandbox may run meanwhile: see [`crate::freeze`]. This records
    /// facts about the parts of the project that became part of the result, so call
    /// [`Overlay::facts`] afterwards.
    pub fn freeze(&self, ingest: &Ingest<'_>) -> Result<(Tree, Footing), FreezeError> {
        // A file without any write has no flat file, but the layer names its contents all the same.
        ingest.add_bytes(&[]).map_err(Box::new)?;
        let mut objects = Stored::new();
        let watch = self.upper.writers.watch();
        let scratch = scratch_flats(&self.upper.read().state, &self.aside.aside);
        let mut pending = flats(&self.upper.read().state, |flat| !scratch.contains(&flat));
        for _ in 0..ROUNDS {
            self.store_flats(&pending, ingest, &mut objects)?;
            let still = watch.still();
            let inner = self.upper.read();
            let written = watch.take();
            pending = flats(&inner.state, |flat| {
                !scratch.contains(&flat)
                    && (written.contains(&flat) || !objects.contains_key(&flat))
            });
            if pending.iter().map(|(_, size)| size).sum::<u64>() > HELD_BYTES {
                continue;
            }
            self.store_flats(&pending, ingest, &mut objects)?;
            drop(still);
            if !pending.iter().all(|(flat, _)| objects.contains_key(flat)) {
                return Err(FreezeError::Data(io::ErrorKind::NotFound.into()));
            }
            return self.walk(&inner.state, objects);
        }
        Err(FreezeError::Restless)
    }

    /// Stores these flat files as they are. A flat file that is gone by now belongs to nothing any
    /// more.
    fn store_flats(
        &self,
        flats: &[(u64, u64)],
        ingest: &Ingest<'_>,
        objects: &mut Stored,
    ) -> Result<(), FreezeError> {
        let store = |&(flat, _): &(u64, u64)| {
            let file = match self.upper.data.get(flat) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                file => file.map_err(FreezeError::Data)?,
            };
            let added = ingest.add_file(&file).map_err(Box::new)?;
            Ok(Some((flat, (added.object, added.size))))
        };
        let stored = flats.par_iter().map(store);
        let stored: Vec<_> = stored.collect::<Result<_, FreezeError>>()?;
        objects.extend(stored.into_iter().flatten());
        Ok(())
    }

    fn walk(&self, state: &State, objects: Stored) -> Result<(Tree, Footing), FreezeError> {
        let mut walk = Walk {
            overlay: self,
            state,
            objects,
            touched: HashSet::new(),
            linked: HashSet::new(),
            seeds: HashSet::new(),
        };
        for path in &self.aside.aside.seeds {
            walk.touch_path(path);
            walk.seeds.extend(state.at_path(path));
        }
        walk.find_touched();
        let tree: Result<Tree, FreezeError> = std::thread::scope(|scope| {
            let walking = std::thread::Builder::new()
                .stack_size(STACK)
                .spawn_scoped(scope, || walk.dir(ROOT, Some(ROOT), 0));
            match walking.map_err(FreezeError::Thread)?.join() {
                Ok(tree) => Ok(tree?.unwrap_or_else(Tree::implicit)),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        });
        let footing = Footing::new(&state.chain, &state.applied, state.thawed);
        Ok((tree?, footing))
    }
}

/// The flat files that have a name and are wanted, with their sizes in bytes.
fn flats(state: &State, wanted: impl Fn(u64) -> bool) -> Vec<(u64, u64)> {
    let named = state.nodes().filter(|(_, node)| node.record.nlink != 0);
    named
        .filter_map(|(_, node)| {
            let flat = node.record.flat().filter(|&flat| wanted(flat))?;
            Some((flat, node.record.size()))
        })
        .collect()
}

impl Walk<'_> {
    fn touch_path(&mut self, path: &[u8]) {
        let lower = &self.overlay.lower;
        let mut dir = ROOT;
        self.touched.insert(dir);
        for name in components(path) {
            match lower.lookup(dir, name) {
                Some(next) if next.node.kind() == Kind::Dir => {
                    dir = next.ino;
                    self.touched.insert(dir);
                }
                _ => return,
            }
        }
    }

    fn find_touched(&mut self) {
        let mut pending = Vec::new();
        for (_, node) in self.state.nodes() {
            let Some(lower) = node.lower.and_then(|ino| self.overlay.lower.get(ino)) else {
                continue;
            };
            for path in self.overlay.lower.visible_paths(lower) {
                self.touch_path(&path);
            }
            if node.dir.as_ref().is_some_and(|dir| dir.parent.is_some()) {
                pending.push(lower.ino);
            }
        }
        // A moved directory may contain names of hardlinked files: their other names are written
        // out too.
        while let Some(dir) = pending.pop() {
            for (_, _, child) in self.overlay.lower.children(dir, 0) {
                if child.node.kind() == Kind::Dir {
                    pending.push(child.ino);
                } else if child.node.is_hardlinked() && self.linked.insert(child.ino) {
                    for path in self.overlay.lower.visible_paths(child) {
                        self.touch_path(&path);
                    }
                }
            }
        }
    }

    fn record(&self, ino: Ino) -> Result<Record, FreezeError> {
        Ok(match self.state.find(ino).map_err(FreezeError::Upper)? {
            Found::Upper(_, node) => node.record.clone(),
            Found::Lower(lower) => lower_record(&self.overlay.lower, lower),
        })
    }

    /// The directory `ino`, where the lower has `base` at the same path. None if it has no change.
    fn dir(&self, ino: Ino, base: Option<Ino>, depth: usize) -> Result<Option<Dir>, FreezeError> {
        if depth > MAX_DEPTH {
            return Err(TreeError::Depth.into());
        }
        let record = self.record(ino)?;
        let mut dir = Dir {
            meta: meta(&record),
            ..Dir::default()
        };
        if base != Some(ino) {
            if let (Some(observer), Some(origin)) = (&self.overlay.observer, &record.origin) {
                observer.everything(origin);
            }
            if base.is_some() {
                dir.kind = DirKind::Opaque;
            }
            self.all_children(ino, &mut dir, depth)?;
            return Ok(Some(dir));
        }
        self.changed_children(ino, &mut dir, depth)?;
        let lower = self.overlay.lower.get(ino);
        let was = lower.map(|lower| self.overlay.lower.meta(lower).meta());
        let but_mtime = |meta: &Meta| Meta {
            mtime: iii_store::tree::Mtime::default(),
            ..meta.clone()
        };
        if was.as_ref() == Some(&dir.meta) {
            dir.kind = DirKind::Implicit;
            dir.meta = Meta::default();
        }
        let same = was.is_some_and(|was| but_mtime(&was) == but_mtime(&dir.meta));
        let nothing = dir.entries.is_empty() && (same || dir.kind == DirKind::Implicit);
        Ok((!nothing).then_some(dir))
    }

    fn all_children(&self, ino: Ino, dir: &mut Dir, depth: usize) -> Result<(), FreezeError> {
        let mut children = Vec::new();
        self.state
            .for_each(ino, 0, &mut |_, name, child| {
                children.push((name, child));
                true
            })
            .map_err(FreezeError::Upper)?;
        let mut entries: Vec<(Box<[u8]>, Node)> = Vec::new();
        for (name, child) in children {
            if let Some(node) = self.entry(child, None, depth)? {
                entries.push((name.into(), node));
            }
        }
        dir.entries = entries.into_iter().collect();
        Ok(())
    }

    fn changed_children(&self, ino: Ino, dir: &mut Dir, depth: usize) -> Result<(), FreezeError> {
        let lower = &self.overlay.lower;
        let upper = match self.state.find(ino).map_err(FreezeError::Upper)? {
            Found::Upper(_, node) => node.dir.as_deref(),
            Found::Lower(_) => None,
        };
        let mut entries: Vec<(Box<[u8]>, Node)> = Vec::new();
        for (name, to) in upper.into_iter().flat_map(state::Dir::entries) {
            let below = lower.lookup(ino, name);
            let node = match to {
                Some(to) => self.entry(self.state.ino(to), below, depth)?,
                None => None,
            };
            match node {
                Some(node) => entries.push((name.into(), node)),
                None if to.is_none() && below.is_some() => {
                    entries.push((name.into(), whiteout()));
                }
                None => {}
            }
        }
        let touched = self.touched.contains(&ino);
        let lower_children = touched.then(|| lower.children(ino, 0));
        for (_, name, child) in lower_children.into_iter().flatten() {
            let told = upper.is_some_and(|upper| upper.get(name).is_some());
            let changed = self.touched.contains(&child.ino)
                || self.linked.contains(&child.ino)
                || self.state.number(child.ino).is_some();
            if !told
                && changed
                && let Some(node) = self.entry(child.ino, Some(child), depth)?
            {
                entries.push((name.into(), node));
            }
        }
        dir.entries = entries.into_iter().collect();
        Ok(())
    }

    /// The entry that leads to `ino`, where the lower has `below` at the same path. None if it has
    /// no change.
    fn entry(
        &self,
        ino: Ino,
        below: Option<Lower<'_>>,
        depth: usize,
    ) -> Result<Option<Node>, FreezeError> {
        let record = self.record(ino)?;
        if record.is_dir() {
            let base = below
                .filter(|below| below.node.kind() == Kind::Dir && !self.seeds.contains(&ino))
                .map(|below| below.ino);
            return Ok(self.dir(ino, base, depth + 1)?.map(Node::Dir));
        }
        if record.kind() == Kind::Socket {
            return Ok(below.map(|_| whiteout()));
        }
        let content = self.content(&record);
        let meta = meta(&record);
        let alone = record.nlink <= 1 && !self.linked.contains(&ino);
        if let Some(below) = below
            && self.overlay.lower.meta(below).meta() == meta
            && below.node.content().as_ref() == Some(&content)
        {
            // Either all names of a file are written out, or no name.
            let names = self.overlay.lower.visible_paths(below);
            let all_there = || {
                below.ino == ino
                    && names.len() as u32 == record.nlink
                    && names
                        .iter()
                        .all(|path| self.state.at_path(path) == Some(ino))
            };
            if (alone && names.len() <= 1) || (!self.linked.contains(&ino) && all_there()) {
                return Ok(None);
            }
        }
        if let Some(observer) = &self.overlay.observer {
            observer.contents(self.state, ino);
        }
        Ok(Some(Node::Leaf(Leaf {
            meta,
            content,
            link: (!alone).then_some(ino),
        })))
    }

    fn content(&self, record: &Record) -> Content {
        match &record.body {
            Body::File { data, size } => {
                let (object, size) = match data {
                    Data::Lower(object) => (ObjectId::from_bytes(*object), *size),
                    Data::Flat { number, .. } => self
                        .objects
                        .get(number)
                        .copied()
                        .unwrap_or((ObjectId::of(b""), 0)),
                    Data::Empty => (ObjectId::of(b""), 0),
                };
                Content::File { object, size }
            }
            Body::Symlink(target) => Content::Symlink {
                target: target[..].into(),
            },
            Body::Fifo => Content::Fifo,
            Body::Socket => Content::Socket,
            Body::Char(rdev) => Content::Char((*rdev).into()),
            Body::Block(rdev) => Content::Block((*rdev).into()),
            // The caller has handled directories.
            Body::Dir => Content::Whiteout,
        }
    }
}

fn meta(record: &Record) -> Meta {
    Meta {
        mode: record.mode,
        uid: record.uid,
        gid: record.gid,
        mtime: record.mtime.into(),
        xattrs: record.xattrs.to_map(),
    }
}

fn whiteout() -> Node {
    Node::Leaf(Leaf {
        meta: Meta::default(),
        content: Content::Whiteout,
        link: None,
    })
}
