//! Carries an upper over to another chain, when the sandbox starts again on changed layers.
//!
//! For some paths, the upper differs from its old lower. Its entries stay, except where any of the
//! layers themselves changed the path since: there the layers win. Otherwise a file of an older
//! install that the sandbox has touched would stand among the files of a newer one. So
//!
//! - a file or whiteout of the upper at a changed path is dropped;
//! - a directory of the upper at a changed path keeps its other entries, and takes the lower's
//!   metadata; if the lower has no directory there any more, it stays as long as the upper has an
//!   entry in it;
//! - where the sandbox had removed or replaced a directory with changes in it, only the changed
//!   paths show again;
//! - the upper's entries at all other paths stay, independent of the new lower there.
//!
//! A path changed if the merged views of both chains differ there: see [`crate::differ`]. So a
//! change that a layer above hides does not count, and layers that only changed their order change
//! only the paths that they share.
//!
//! Afterwards only records of directories have an origin. Every file whose data is an object names
//! an object that the new chain or the layer that the upper was made from contains, and thereby
//! pins; the data of the others is copied out of the store first.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use iii_store::layer::Kind;
use iii_store::tree::components;
use iii_store::{Change, ChangeKind, Layer, LayerId, NodeRef, ObjectId};

use crate::OpenError;
use crate::differ::differ;
use crate::fs::Errno;
use crate::ino::{Ino, ROOT};
use crate::merge::{Lower, Merged};
use crate::objects::Objects;
use crate::upper::batch::lower_record;
use crate::upper::record::{Body, Chain, Data, Op, Record};
use crate::upper::state::{Dir, State};
use crate::upper::{Opened, UpperError, io_error};
use crate::view::Found;

/// The layers of a former chain, by id.
pub type OldLayer<'a> =
    dyn Fn(&LayerId) -> Result<Arc<Layer>, Box<dyn std::error::Error + Send + Sync>> + 'a;

/// The state of the upper over `lower`, the merged `chain`, and the number of files of the upper
/// that gave way to changed ones. Until the state is written down, the log has the old one.
pub(crate) fn rebase(
    opened: &mut Opened,
    known: &Chain,
    old_layer: &OldLayer<'_>,
    lower: &Arc<Merged>,
    chain: Chain,
    objects: &dyn Objects,
) -> Result<(State, u64), OpenError> {
    let fail = |source| UpperError::Chain {
        path: opened.dir().to_path_buf(),
        source,
    };
    let old_layers = known
        .layers
        .iter()
        .map(|id| old_layer(&LayerId::from_bytes(*id)))
        .collect::<Result<Vec<_>, _>>()
        .map_err(fail)?;
    // The chain as the sandbox saw it last: entries that an update added are the project's.
    let mut seen: Vec<Vec<Arc<Layer>>> = Vec::new();
    for id in opened.applied() {
        let project = old_layer(&LayerId::from_bytes(*id)).map_err(fail)?;
        let mut layers = old_layers.clone();
        let slot = known.project.map(|slot| slot as usize);
        if let Some(place) = slot.and_then(|slot| layers.get_mut(slot)) {
            *place = project;
        }
        seen.push(layers);
    }
    if seen.is_empty() {
        seen.push(old_layers.clone());
    }
    let mut changed: Vec<Change> = Vec::new();
    for old in &seen {
        changed.extend(differ(old, lower.layers()));
    }
    changed.sort_unstable();
    changed.dedup_by(|one, other| one.path == other.path);
    let seen = Merged::new(seen.pop().unwrap_or_default())?;
    let thawed = opened.thawed().map(LayerId::from_bytes);
    let thawed = thawed.map(|id| old_layer(&id)).transpose().map_err(fail)?;
    let old = opened.replay(Arc::new(Merged::new(old_layers)?))?;
    let mut new = State::new(lower.clone());
    new.chain = chain;
    new.thawed = old.thawed;
    let mut carry = Carry {
        paths: changed.iter().map(|change| &*change.path).collect(),
        old: &old,
        new,
        seen: &seen,
        leaves: HashMap::new(),
        gave_way: 0,
    };
    let damaged = |error: Errno| io_error("reading", opened.dir())(error.into());
    carry.walk().map_err(damaged)?;
    for change in changed.iter().filter(|c| c.kind != ChangeKind::Removed) {
        carry.expose(&change.path).map_err(damaged)?;
    }
    let Carry {
        mut new, gave_way, ..
    } = carry;
    materialise(&mut new, thawed.as_deref(), opened, objects)?;
    Ok((new, gave_way))
}

/// Copies the objects out of the store that neither the new chain nor the layer that the upper was
/// made from pins.
fn materialise(
    new: &mut State,
    thawed: Option<&Layer>,
    opened: &mut Opened,
    objects: &dyn Objects,
) -> Result<(), UpperError> {
    let of_store = |record: &Record| match record.body {
        Body::File {
            data: Data::Lower(object),
            size,
        } => Some((ObjectId::from_bytes(object), size)),
        _ => None,
    };
    let wanted: Vec<(u64, ObjectId, u64)> = new
        .nodes()
        .filter_map(|(number, node)| {
            let (object, size) = of_store(&node.record)?;
            Some((number, object, size))
        })
        .collect();
    if wanted.is_empty() {
        return Ok(());
    }
    let pinned: HashSet<ObjectId> = new
        .lower
        .layers()
        .iter()
        .map(|layer| &**layer)
        .chain(thawed)
        .flat_map(Layer::nodes)
        .filter(|node| node.kind() == Kind::File)
        .map(NodeRef::object)
        .collect();
    let dir = opened.dir().to_path_buf();
    let fail = io_error("copying a file of a former layer to", &dir);
    for (number, object, size) in wanted {
        if pinned.contains(&object) {
            continue;
        }
        let (flat, file) = opened.data().create().map_err(&fail)?;
        objects.copy_to(&object, size, &file).map_err(&fail)?;
        opened.order(flat);
        if let Some(node) = new.node_mut(number) {
            node.record.body = Body::File {
                data: Data::Flat {
                    number: flat,
                    dirty: false,
                },
                size,
            };
        }
    }
    Ok(())
}

struct Carry<'a> {
    /// The paths that changed in the layers.
    paths: HashSet<&'a [u8]>,
    old: &'a State,
    new: State,
    /// The layers as the sandbox saw them last.
    seen: &'a Merged,
    /// The new numbers of leaves, by their old inode.
    leaves: HashMap<Ino, u64>,
    /// Number of files of the upper that gave way, those that it had removed included.
    gave_way: u64,
}

fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    if dir.is_empty() {
        return name.to_vec();
    }
    [dir, b"/", name].concat()
}

fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&byte| byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (b"", path),
    }
}

fn is_dir(lower: Option<Lower<'_>>) -> bool {
    lower.is_some_and(|lower| lower.node.kind() == Kind::Dir)
}

impl Carry<'_> {
    /// The record of an inode in the old view.
    fn old_record(&self, ino: Ino) -> Result<Record, Errno> {
        Ok(match self.old.find(ino)? {
            Found::Upper(_, node) => node.record.clone(),
            Found::Lower(lower) => lower_record(&self.old.lower, lower),
        })
    }

    /// Adds a new inode as `name` to the directory `dir`.
    fn put(&mut self, dir: u64, name: &[u8], mut record: Record, nlink: u32) -> u64 {
        record.origin = None;
        record.nlink = nlink;
        let number = self.new.next_number();
        self.new.apply(Op::Inode(number, Box::new(record)));
        self.new.apply(Op::Entry(dir, name.into(), Some(number)));
        number
    }

    /// The number of the directory at `path`, which is made, with its missing parents, if it is
    /// missing.
    fn dir(&mut self, path: &[u8]) -> Result<u64, Errno> {
        if let Some(ino) = self.new.at_path(path)
            && self.new.find(ino)?.kind() == Kind::Dir
        {
            return self.known(ino);
        }
        let (parent, name) = split(path);
        let parent = self.dir(parent)?;
        // Every caller has the directory from the old view or from the new lower.
        let from_old = self.old.at_path(path).map(|ino| self.old_record(ino));
        let from_new = || {
            let lower = self.new.lower.lookup_path(path)?;
            Some(lower_record(&self.new.lower, lower))
        };
        let record = from_old
            .transpose()?
            .filter(Record::is_dir)
            .or_else(|| from_new().filter(Record::is_dir))
            .ok_or(Errno::NOTDIR)?;
        Ok(self.put(parent, name, record, 1))
    }

    /// The number of a directory of the new view, which gets a record if it has none.
    fn known(&mut self, ino: Ino) -> Result<u64, Errno> {
        if let Some(number) = self.new.number(ino) {
            return Ok(number);
        }
        let lower = self.new.lower.get(ino).ok_or(Errno::STALE)?;
        let record = lower_record(&self.new.lower, lower);
        let number = self.new.next_number();
        self.new.apply(Op::Inode(number, Box::new(record)));
        Ok(number)
    }

    fn walk(&mut self) -> Result<(), Errno> {
        // A directory comes before its entries, either as a lower one with changes or in full.
        let mut pending = vec![(ROOT, Vec::new())];
        let touched = touched(self.old);
        while let Some((ino, path)) = pending.pop() {
            let same = self.old.lower.lookup_path(&path).map(|lower| lower.ino) == Some(ino);
            if same {
                self.changed_dir(ino, &path, &touched, &mut pending)?;
            } else {
                self.whole_dir(ino, &path, &mut pending)?;
            }
        }
        Ok(())
    }

    /// Carries over the upper's changes in a lower directory that is at its own place.
    fn changed_dir(
        &mut self,
        ino: Ino,
        path: &[u8],
        touched: &HashSet<Ino>,
        pending: &mut Vec<(Ino, Vec<u8>)>,
    ) -> Result<(), Errno> {
        let old = self.old;
        let node = old.number(ino).and_then(|number| old.node(number));
        if let Some(node) = node
            && !self.paths.contains(path)
            && let Some(lower) = old.lower.get(ino)
        {
            let was = old.lower.meta(lower);
            let record = &node.record;
            let same = (was.mode(), was.uid(), was.gid()) == (record.mode, record.uid, record.gid)
                && was.xattrs().eq(record.xattrs.iter());
            if !same {
                let number = self.dir(path)?;
                if let Some(new) = self.new.node(number) {
                    let record = Record {
                        origin: new.record.origin.clone(),
                        ..record.clone()
                    };
                    self.new.apply(Op::Inode(number, Box::new(record)));
                }
            }
        }
        let upper = node.and_then(|node| node.dir.as_deref());
        for (name, to) in upper.into_iter().flat_map(Dir::entries) {
            let at = join(path, name);
            match to {
                Some(to) => self.entry(old.ino(to), at, pending)?,
                None if self.paths.contains(&*at) => {
                    let hid = self.seen.lookup_path(&at).is_some();
                    let shows = self.new.lower.lookup_path(&at).is_some();
                    self.gave_way += u64::from(hid && shows);
                    self.empty_dir(&at)?;
                }
                None => {
                    if self.new.lower.lookup_path(&at).is_some() {
                        let dir = self.dir(path)?;
                        self.new.apply(Op::Entry(dir, name.into(), None));
                    }
                }
            }
        }
        for (_, name, child) in old.lower.children(ino, 0) {
            let told = upper.is_some_and(|dir| dir.get(name).is_some());
            if told || !touched.contains(&child.ino) {
                continue;
            }
            self.entry(child.ino, join(path, name), pending)?;
        }
        Ok(())
    }

    /// Carries over everything in a directory that is the upper's own, or was moved.
    fn whole_dir(
        &mut self,
        ino: Ino,
        path: &[u8],
        pending: &mut Vec<(Ino, Vec<u8>)>,
    ) -> Result<(), Errno> {
        let old = self.old;
        let mut children = Vec::new();
        old.for_each(ino, 0, &mut |_, name, child| {
            children.push((child, join(path, name)));
            true
        })?;
        for (child, at) in children {
            self.entry(child, at, pending)?;
        }
        Ok(())
    }

    /// Carries over the inode `ino`, which the upper has at `path`.
    fn entry(
        &mut self,
        ino: Ino,
        path: Vec<u8>,
        pending: &mut Vec<(Ino, Vec<u8>)>,
    ) -> Result<(), Errno> {
        let changed = self.paths.contains(&*path);
        let record = self.old_record(ino)?;
        let (parent, name) = split(&path);
        let here = self.new.lower.lookup_path(&path);
        if !record.is_dir() {
            if here.is_some_and(|here| self.is_shown(&path, &record, here)) {
                return Ok(());
            }
            if changed {
                self.gave_way += u64::from(!self.was_shown(&path, &record));
                return self.empty_dir(&path);
            }
            let dir = self.dir(parent)?;
            if let Some(&number) = self.leaves.get(&ino) {
                if let Some(node) = self.new.node_mut(number) {
                    node.record.nlink += 1;
                }
                self.new.apply(Op::Entry(dir, name.into(), Some(number)));
            } else {
                let number = self.put(dir, name, record, 1);
                self.leaves.insert(ino, number);
            }
            return Ok(());
        }
        if changed && here.is_some() && !is_dir(here) {
            self.gave_way += self.files_in(ino)?;
            return Ok(());
        }
        let own = self.old.lower.lookup_path(&path).map(|lower| lower.ino) != Some(ino);
        // A directory that the project removed returns with its first entry, if it has one.
        if own && !(changed && here.is_none()) {
            let mut record = record;
            if changed && let Some(here) = here {
                let theirs = lower_record(&self.new.lower, here);
                record = Record {
                    btime: record.btime,
                    ..theirs
                };
            }
            let dir = self.dir(parent)?;
            self.put(dir, name, record, 1);
        }
        pending.push((ino, path));
        Ok(())
    }

    /// Whether the new lower already shows an equal file: an update of the project may have added
    /// it.
    fn is_shown(&self, path: &[u8], record: &Record, here: Lower<'_>) -> bool {
        let lower = lower_record(&self.new.lower, here);
        let kept = |r: &Record| (r.mode, r.uid, r.gid, r.nlink, r.mtime);
        record.nlink == 1
            && kept(record) == kept(&lower)
            && record.xattrs == lower.xattrs
            && record.body == lower.body
            && self.new.at_path(path) == Some(here.ino)
    }

    /// Shows a directory of the new lower that the sandbox had removed or replaced, without its
    /// entries: [`Carry::expose`] then shows the changed ones.
    fn empty_dir(&mut self, path: &[u8]) -> Result<(), Errno> {
        let Some(here) = self.new.lower.lookup_path(path) else {
            return Ok(());
        };
        if here.node.kind() == Kind::Dir && is_dir(self.seen.lookup_path(path)) {
            let record = lower_record(&self.new.lower, here);
            let (parent, name) = split(path);
            let parent = self.dir(parent)?;
            self.put(parent, name, record, 1);
        }
        Ok(())
    }

    /// Whether the layers that the sandbox saw last had an equal file there: an update added it,
    /// and the sandbox did not change it.
    fn was_shown(&self, path: &[u8], record: &Record) -> bool {
        let Some(there) = self.seen.lookup_path(path) else {
            return false;
        };
        let was = lower_record(self.seen, there);
        let kept = |r: &Record| (r.mode, r.uid, r.gid);
        kept(record) == kept(&was) && record.xattrs == was.xattrs && record.body == was.body
    }

    /// The number of the upper's own files in a directory of the upper.
    fn files_in(&self, dir: Ino) -> Result<u64, Errno> {
        let mut files = 0;
        let mut pending = vec![dir];
        while let Some(dir) = pending.pop() {
            let mut children = Vec::new();
            self.old.for_each(dir, 0, &mut |_, _, child| {
                children.push(child);
                true
            })?;
            for child in children {
                match self.old.find(child)? {
                    found if found.kind() == Kind::Dir => pending.push(child),
                    Found::Upper(_, node) if node.lower.is_none() => files += 1,
                    _ => {}
                }
            }
        }
        Ok(files)
    }

    /// Shows the new lower's entry at `path` again.
    fn expose(&mut self, path: &[u8]) -> Result<(), Errno> {
        let lower = self.new.lower.clone();
        let Some(there) = lower.lookup_path(path) else {
            return Ok(());
        };
        let shown = self.new.at_path(path);
        if shown == Some(there.ino) {
            return Ok(());
        }
        if there.node.kind() == Kind::Dir
            && let Some(shown) = shown
            && self.new.find(shown)?.kind() == Kind::Dir
        {
            return Ok(());
        }
        let mut dir = self.known(ROOT)?;
        let mut at = Vec::new();
        let mut names = components(path).peekable();
        while let Some(name) = names.next() {
            at = join(&at, name);
            let below = self.new.child(self.new.ino(dir), name)?;
            let below_is_dir = match below {
                Some(ino) => self.new.find(ino)?.kind() == Kind::Dir,
                None => false,
            };
            if let Some(ino) = below
                && below_is_dir
                && names.peek().is_some()
            {
                dir = self.known(ino)?;
                continue;
            }
            let entry = lower.lookup_path(&at).ok_or(Errno::NOENT)?;
            let record = lower_record(&lower, entry);
            dir = self.put(dir, name, record, 1);
        }
        Ok(())
    }
}

/// The lower inodes that have a record, and the directories on their paths.
fn touched(state: &State) -> HashSet<Ino> {
    let mut touched = HashSet::new();
    for (_, node) in state.nodes() {
        let Some(lower) = node.lower.and_then(|ino| state.lower.get(ino)) else {
            continue;
        };
        touched.insert(lower.ino);
        for path in state.lower.visible_paths(lower) {
            let mut dir = ROOT;
            for name in components(&path) {
                match state.lower.lookup(dir, name) {
                    Some(next) => {
                        dir = next.ino;
                        touched.insert(dir);
                    }
                    None => break,
                }
            }
        }
    }
    touched
}
