//! A changed project under a running sandbox: changes on the host show inside, and nothing is
//! mounted anew.
//!
//! Afterwards, the sandbox sees the same as if it were started again on the new layer (see
//! [`crate::rebase`]): the paths that changed win over the sandbox's own writes there, everything
//! else that it wrote stays. But the lower stays the one that was composed at the start,
//! so that every inode number that the kernel knows keeps its meaning; the changes are made in the
//! upper, as if the sandbox had made them, with contents that stay in the store. The log says which
//! layer they came from, and the next start on a newer one carries the upper over as if it had
//! stood on that layer. A file that the sandbox has given another name, and whose contents the
//! project has no more, gets them for its own, so that only processes that have a file of a
//! former layer open need that layer.
//!
//! The kernel is not told: [`Overlay::update`] returns the entries that it has to forget.

use std::collections::HashSet;
use std::sync::Arc;

use iii_store::layer::{Kind, Layer};
use iii_store::tree::components;
use iii_store::{LayerId, NodeRef, ObjectId};

use crate::differ::differ;
use crate::fs::{Errno, Result};
use crate::ino::{Ino, ROOT};
use crate::merge::{Lower, MergeError, Merged};
use crate::overlay::Overlay;
use crate::posix::errno;
use crate::upper::Inner;
use crate::upper::batch::{Batch, lower_record};
use crate::upper::record::{Body, Data, Op, Record};
use crate::upper::state::Node;

/// Why a running filesystem cannot take a new project layer.
#[derive(Debug, thiserror::Error)]
pub enum UpdateError {
    /// It was opened without a project.
    #[error("the filesystem has no project")]
    NoProject,
    /// The layers cannot be merged.
    #[error("the layers cannot be composed")]
    Merge(#[from] MergeError),
    /// The changes cannot be written down. Those before it were made.
    #[error("changing the upper failed")]
    Upper(#[source] Errno),
}

impl From<Errno> for UpdateError {
    fn from(error: Errno) -> Self {
        Self::Upper(error)
    }
}

/// Entries that a kernel has to forget after an update.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Stale {
    /// Entries that lead elsewhere, by directory and name, in the order of their changes.
    pub entries: Vec<(Ino, Vec<u8>)>,
    /// Directories whose listing or attributes are others.
    pub dirs: HashSet<Ino>,
}

impl Overlay {
    /// Shows the sandbox `project` in place of the project's layer that it saw last. Requests
    /// wait meanwhile. The caller has pinned the layer, for as long as the upper stands on it: see
    /// [`crate::footing_of`].
    ///
    /// A process that dies on the way has made some of the changes; the next opening makes the
    /// others.
    pub fn update(&self, project: &Arc<Layer>) -> std::result::Result<Stale, UpdateError> {
        let mut seen = self
            .project
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        let (slot, last) = seen.as_ref().ok_or(UpdateError::NoProject)?;
        let slot = *slot;
        let with = |project: &Arc<Layer>| {
            let mut layers = self.lower.layers().to_vec();
            if let Some(place) = layers.get_mut(slot) {
                *place = Arc::clone(project);
            }
            layers
        };
        let (old, new) = (with(last), with(project));
        // A change below a layer that hides it changes nothing.
        let mut changes = differ(&old, &new);
        if changes.is_empty() {
            return Ok(Stale::default());
        }
        let (old, new) = (Merged::new(old)?, Merged::new(new)?);
        let changed: HashSet<Vec<u8>> = changes.iter().map(|change| change.path.clone()).collect();
        let mut inner = self.upper.write();
        // From here on the upper has something of both.
        let applied = |layers: &[&Arc<Layer>]| {
            let ids = layers.iter().map(|layer| *layer.layer_id().as_bytes());
            vec![Op::Applied(ids.collect())]
        };
        inner.commit(applied(&[last, project]), Vec::new())?;
        let mut update = Update {
            overlay: self,
            inner: &mut inner,
            old: &old,
            new: &new,
            changed: &changed,
            stale: Stale::default(),
        };
        // A directory comes before its entries, and goes after them.
        for change in &changes {
            update.show(&change.path)?;
        }
        changes.reverse();
        for change in &changes {
            update.clear(&change.path)?;
        }
        let stale = update.stale;
        inner.commit(applied(&[project]), Vec::new())?;
        self.upper.compact(&mut inner);
        let moved = self.moved(&inner, last, project, &changed);
        drop(inner);
        for file in moved {
            self.adopt(&file)?;
        }
        *seen = Some((slot, Arc::clone(project)));
        Ok(stale)
    }

    /// Files that the sandbox has given other names, whose contents neither the layers that were
    /// composed nor `new` have: only `last`, which stays pinned only for a while.
    fn moved(
        &self,
        inner: &Inner,
        last: &Layer,
        new: &Layer,
        changed: &HashSet<Vec<u8>>,
    ) -> Vec<Moved> {
        let gone: HashSet<ObjectId> = changed
            .iter()
            .filter_map(|path| last.lookup(path))
            .filter(|node| node.kind() == Kind::File)
            .map(NodeRef::object)
            .collect();
        let of_last = |(number, node): (u64, &Node)| match node.record.body {
            Body::File {
                data: Data::Lower(object),
                size,
            } if node.record.nlink != 0 && gone.contains(&ObjectId::from_bytes(object)) => {
                let ino = inner.state.ino(number);
                Some(Moved { ino, object, size })
            }
            _ => None,
        };
        let mut moved: Vec<Moved> = inner.state.nodes().filter_map(of_last).collect();
        if !moved.is_empty() {
            let layers = self.lower.layers().iter().map(|layer| &**layer);
            let kept: HashSet<ObjectId> = layers
                .chain([new])
                .flat_map(Layer::nodes)
                .filter(|node| node.kind() == Kind::File)
                .map(NodeRef::object)
                .collect();
            moved.retain(|file| !kept.contains(&ObjectId::from_bytes(file.object)));
        }
        moved
    }

    /// Gives a file contents of its own, unless it has them by now.
    fn adopt(&self, file: &Moved) -> Result<()> {
        let copied = self.copy_up(&file.object, file.size);
        let (flat, _) = copied.map_err(|error| errno(&error))?;
        let mut inner = self.upper.write();
        let is = inner.state.bytes(file.ino).map(|bytes| bytes.data);
        if is != Ok(Data::Lower(file.object)) {
            self.upper.data.remove(flat);
            return Ok(());
        }
        let mut batch = Batch::new(&mut inner);
        let (number, record) = batch.inode(file.ino)?;
        let data = Data::Flat {
            number: flat,
            dirty: false,
        };
        let size = file.size;
        record.body = Body::File { data, size };
        batch.commit()?;
        inner.order(number);
        Ok(())
    }

    /// The project's layer that the sandbox sees.
    pub fn project_layer(&self) -> Option<LayerId> {
        let seen = self
            .project
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        seen.as_ref().map(|(_, layer)| layer.layer_id())
    }
}

/// A file whose contents are those of a former layer.
struct Moved {
    ino: Ino,
    object: [u8; 32],
    size: u64,
}

struct Update<'a> {
    overlay: &'a Overlay,
    inner: &'a mut Inner,
    /// The lower with the project as the sandbox saw it.
    old: &'a Merged,
    /// The lower with the project as it is.
    new: &'a Merged,
    changed: &'a HashSet<Vec<u8>>,
    stale: Stale,
}

fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&byte| byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (b"", path),
    }
}

/// The record of an inode of the upper's own that is like a lower one.
fn own(lower: &Merged, entry: Lower<'_>) -> Record {
    Record {
        origin: None,
        nlink: 1,
        ..lower_record(lower, entry)
    }
}

fn is_dir(entry: Option<Lower<'_>>) -> bool {
    entry.is_some_and(|entry| entry.node.kind() == Kind::Dir)
}

impl Update<'_> {
    /// Shows the entry of the new lower at a path that changed, if it has one.
    fn show(&mut self, path: &[u8]) -> Result<()> {
        let Some(there) = self.new.lookup_path(path) else {
            return Ok(());
        };
        if path.is_empty() {
            return self.describe(ROOT, there);
        }
        let (parent, name) = split(path);
        let parent = self.directory(parent)?;
        let shown = self.inner.state.child(parent, name)?;
        let shown_is_dir = match shown {
            Some(shown) => self.inner.state.find(shown)?.kind() == Kind::Dir,
            None => false,
        };
        let dir = if there.node.kind() != Kind::Dir {
            self.put(parent, name, own(self.new, there))?;
            return Ok(());
        } else if let (Some(shown), true) = (shown, shown_is_dir) {
            self.describe(shown, there)?;
            shown
        } else {
            self.put(parent, name, own(self.new, there))?
        };
        // Entries of the layers below that something of the project had hidden.
        if !is_dir(self.old.lookup_path(path)) {
            self.reveal(dir, path, there)?;
        }
        Ok(())
    }

    /// Takes away the entry at a path that changed, if the new lower has nothing there and nothing
    /// is left in it.
    fn clear(&mut self, path: &[u8]) -> Result<()> {
        let (parent, name) = split(path);
        let Some(parent) = self.inner.state.at_path(parent) else {
            return Ok(());
        };
        if self.new.lookup_path(path).is_some()
            || self.inner.state.find(parent)?.kind() != Kind::Dir
        {
            return Ok(());
        }
        let Some(shown) = self.inner.state.child(parent, name)? else {
            return Ok(());
        };
        let is_dir = self.inner.state.find(shown)?.kind() == Kind::Dir;
        if is_dir && !self.inner.state.is_empty(shown)? {
            return Ok(());
        }
        self.remove(parent, name, shown)
    }

    /// The directory at `path`, which is made, and those on the way, where they are missing.
    fn directory(&mut self, path: &[u8]) -> Result<Ino> {
        let mut dir = ROOT;
        let mut end = 0;
        for name in components(path) {
            end += name.len() + usize::from(end > 0);
            let shown = self.inner.state.child(dir, name)?;
            if let Some(shown) = shown
                && self.inner.state.find(shown)?.kind() == Kind::Dir
            {
                dir = shown;
                continue;
            }
            let at = path.get(..end).unwrap_or(path);
            let there = self.new.lookup_path(at).ok_or(Errno::NOENT)?;
            dir = self.put(dir, name, own(self.new, there))?;
        }
        Ok(dir)
    }

    /// Makes the new lower's entries in the directory at `path`, but for those that the sandbox or
    /// another change has a say over.
    fn reveal(&mut self, dir: Ino, path: &[u8], there: Lower<'_>) -> Result<()> {
        let mut pending = vec![(dir, path.to_vec(), there)];
        while let Some((dir, path, there)) = pending.pop() {
            for (_, name, child) in self.new.children(there.ino, 0) {
                let at = [&path, &b"/"[..], name].concat();
                if self.changed.contains(&at)
                    || self.old.lookup_path(&at).is_some()
                    || self.inner.state.child(dir, name)?.is_some()
                {
                    continue;
                }
                let made = self.put(dir, name, own(self.new, child))?;
                if child.node.kind() == Kind::Dir {
                    pending.push((made, at, child));
                }
            }
        }
        Ok(())
    }

    /// Gives a directory the metadata of `there`.
    fn describe(&mut self, dir: Ino, there: Lower<'_>) -> Result<()> {
        let wanted = lower_record(self.new, there);
        let mut batch = Batch::new(self.inner);
        let now = batch.now;
        let (_, record) = batch.inode(dir)?;
        (record.mode, record.uid, record.gid) = (wanted.mode, wanted.uid, wanted.gid);
        record.xattrs = wanted.xattrs;
        record.ctime = now;
        batch.commit()?;
        self.stale.dirs.insert(dir);
        Ok(())
    }

    /// Makes `name` in `parent` lead to a new inode, and removes the entry that it led to before.
    fn put(&mut self, parent: Ino, name: &[u8], record: Record) -> Result<Ino> {
        if let Some(shown) = self.inner.state.child(parent, name)? {
            self.remove(parent, name, shown)?;
        }
        let mut batch = Batch::new(self.inner);
        let dir = batch.parent(parent)?;
        let number = batch.add(record)?;
        batch.set(dir, name, number);
        batch.commit()?;
        self.note(parent, name);
        Ok(self.inner.state.ino(number))
    }

    /// Removes an entry, with all that is in it.
    fn remove(&mut self, parent: Ino, name: &[u8], ino: Ino) -> Result<()> {
        // A directory is taken out before its entries: no process can get so far down any more.
        let mut pending = vec![(parent, name.to_vec(), ino)];
        let mut doomed = Vec::new();
        while let Some(entry) = pending.pop() {
            if self.inner.state.find(entry.2)?.kind() == Kind::Dir {
                let dir = entry.2;
                self.inner.state.for_each(dir, 0, &mut |_, name, child| {
                    pending.push((dir, name.to_vec(), child));
                    true
                })?;
            }
            doomed.push(entry);
        }
        for (parent, name, ino) in doomed.into_iter().rev() {
            let mut batch = Batch::new(self.inner);
            let dir = batch.parent(parent)?;
            batch.unlink(ino)?;
            batch.unset(dir, &name);
            batch.commit()?;
            self.overlay.reap(self.inner, ino);
            self.note(parent, &name);
        }
        Ok(())
    }

    fn note(&mut self, parent: Ino, name: &[u8]) {
        self.stale.entries.push((parent, name.to_vec()));
        self.stale.dirs.insert(parent);
    }
}
