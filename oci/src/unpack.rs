//! A tar stream becomes a tree, its files become objects.
//!
//! No name of the archive is ever used as a name on this machine: the tree is built in memory,
//! contents go to the store under their hash. The meaning of the archive is
//! that of docker's extraction:
//!
//! - A leading `/` and `.` components are dropped; a name with `..` in it is refused.
//! - A missing parent becomes an [implicit](DirKind::Implicit) directory.
//! - A later entry replaces an earlier one of the same name, a directory with all that is in it; a
//!   directory over a directory keeps what is in it and takes the new metadata.
//! - A symlink of this archive on the way to an entry is followed within the root of the image, as
//!   in a chroot, making missing directories; the last component never is. A file on the way is an
//!   error.
//! - A hardlink's own metadata is ignored: it has its target's. A target that only layers below
//!   have is taken into this layer, as copying up would. So is the metadata of an opaque directory
//!   that has no entry of its own.
//! - Owners, modes with setuid, devices and xattrs, `security.*` and `trusted.*` among them, are
//!   kept as they are: they hold inside a sandbox only.
//!
//! In a [layer](Dialect::Layer) `.wh.NAME` hides NAME of the layers below and `.wh..wh..opq` all of
//! a directory's, wherever among the entries they stand; they never touch entries of their own
//! layer. Other names of the form `.wh..wh.*` at the root are AUFS's bookkeeping and skipped. In a
//! [root filesystem](Dialect::Rootfs), which is not a difference to anything, such names are names
//! like any other.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::num::NonZero;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ScopedJoinHandle};

use iii_store::tree::{
    self, Content, DirKind, Leaf, MAX_DEPTH, MAX_NAME, MAX_TARGET, Meta, Mtime, Rdev, Source,
    Xattrs,
};
use iii_store::{Ingest, Kind, Layer, NodeRef, ObjectId, StoreError};

use super::tar::{Archive, EntryName, Input, Member, MemberKind, TarError};
use super::{Limit, Limits, Passed};

/// Files above this are hashed and stored as they are read, smaller ones in batches by threads of
/// their own.
const BATCHED_FILE: u64 = 2 << 20;
/// Bytes and files of a batch after which it is handed over.
const BATCH_BYTES: usize = 1 << 20;
const BATCH_FILES: usize = 1024;
/// Most symlinks followed on the way to one entry (Linux's `MAXSYMLINKS`).
const MAX_SYMLINKS: usize = 40;

const WHITEOUT: &[u8] = b".wh.";
const AUFS: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// Why an archive cannot be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// Not a tar archive that can be read.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// A name with `..` in it, which would lead out of where it stands.
    #[error("{0}: a name in an archive must not contain \"..\"")]
    Escapes(EntryName),
    /// A component of the name is too long.
    #[error("{0}: a component of its name is longer than {MAX_NAME} bytes")]
    NameTooLong(EntryName),
    /// Too many symlinks, most likely in a circle.
    #[error("{0}: its name leads through more than {MAX_SYMLINKS} symlinks")]
    SymlinkLoop(EntryName),
    /// The name leads through something that is not a directory.
    #[error("{0}: its name leads through an entry that is not a directory")]
    NotADirectory(EntryName),
    /// The root is not a directory.
    #[error("{0}: the root of an archive must be a directory")]
    Root(EntryName),
    /// A symlink without a target, or with too long a one.
    #[error("{0}: a symlink's target must have 1 to {MAX_TARGET} bytes")]
    Target(EntryName),
    /// A hardlink to nothing.
    #[error(
        "{entry}: is a hardlink to {target}, which is neither in the archive before it nor below"
    )]
    LinkTarget {
        /// The hardlink.
        entry: EntryName,
        /// Its target.
        target: EntryName,
    },
    /// A hardlink to a directory.
    #[error("{entry}: is a hardlink to the directory {target}")]
    LinkToDirectory {
        /// The hardlink.
        entry: EntryName,
        /// Its target.
        target: EntryName,
    },
    /// A whiteout of nothing, of `.` or of `..`, or an entry below a whiteout.
    #[error("{0}: is not a valid whiteout")]
    Whiteout(EntryName),
    /// It depends on layers that are not known.
    #[error("it depends on the layers below it")]
    NeedsBelow,
    /// Larger than this program accepts.
    #[error("{entry}: {passed}")]
    Limit {
        /// The entry at which the limit was passed.
        entry: EntryName,
        /// The exceeded limit.
        passed: Passed,
    },
    /// The store did not take the contents of a file.
    #[error("storing the contents of an archive failed")]
    Store(#[from] StoreError),
}

/// Kind of the archive.
#[derive(Debug, Clone, Copy)]
pub enum Dialect<'a> {
    /// A whole root filesystem: names that look like whiteouts are just names.
    Rootfs,
    /// A layer of an image on these layers, bottom first, which may be none: whiteouts are
    /// whiteouts.
    Layer(&'a [Arc<Layer>]),
    /// A layer of an image on layers that are not known yet. One that depends on them is
    /// [`UnpackError::NeedsBelow`].
    LayerAlone,
}

/// An archive as a tree.
#[derive(Debug)]
pub struct Unpacked {
    /// The tree. Every object it names is in the ingest.
    pub tree: ArchiveTree,
    /// Whether it depends on the layers below, so that it stands for this archive on these layers
    /// only.
    pub took_from_below: bool,
}

/// Unpacks the tar stream `input` into a tree, its files into `ingest`. `on_entry` is called after
/// every entry with the offset in the stream. The stream is read up to the archive's end mark; what
/// follows it is left.
///
/// Memory grows with the number of entries and the length of their names and xattrs, within
/// `limits`, and not with the contents. Nothing is published: on an error, dropping `ingest` leaves
/// no trace.
pub fn unpack(
    input: &mut dyn Read,
    ingest: &Ingest<'_>,
    dialect: Dialect<'_>,
    limits: &Limits,
    on_entry: &dyn Fn(u64),
) -> Result<Unpacked, UnpackError> {
    thread::scope(|scope| {
        let objects = Objects::start(scope, ingest);
        let mut builder = Builder::new(dialect, limits, objects);
        let mut archive = Archive::new(input, limits);
        while let Some(member) = archive.next_member()? {
            builder.entry(member, &mut archive)?;
            on_entry(archive.offset());
        }
        builder.finish()
    })
}

/// Files on their way into the store, in the order of their slots.
struct Objects<'scope, 'i> {
    ingest: &'i Ingest<'i>,
    ids: Arc<Mutex<Vec<ObjectId>>>,
    batch: Batch,
    queue: SyncSender<Batch>,
    workers: Vec<ScopedJoinHandle<'scope, Result<(), StoreError>>>,
}

/// The number of a file whose object is, or will be, known.
type Slot = u32;

/// In a slot whose object is not known yet. No contents have this id.
const PENDING: ObjectId = ObjectId::from_bytes([0; 32]);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Default)]
struct Batch {
    bytes: Vec<u8>,
    /// Slot and length of each file, in the order of their bytes.
    files: Vec<(Slot, usize)>,
}

impl<'scope, 'i: 'scope> Objects<'scope, 'i> {
    fn start<'env>(scope: &'scope thread::Scope<'scope, 'env>, ingest: &'i Ingest<'i>) -> Self {
        let threads = thread::available_parallelism()
            .map_or(1, NonZero::get)
            .min(8);
        let (queue, batches) = sync_channel::<Batch>(threads);
        let batches = Arc::new(Mutex::new(batches));
        let ids = Arc::default();
        let workers = (0..threads)
            .map(|_| {
                let (batches, ids) = (Arc::clone(&batches), Arc::clone(&ids));
                scope.spawn(move || store_batches(ingest, &batches, &ids))
            })
            .collect();
        Self {
            ingest,
            ids,
            batch: Batch::default(),
            queue,
            workers,
        }
    }

    /// A slot for an object, [`PENDING`] or known.
    fn slot(&self, object: ObjectId) -> Slot {
        let mut ids = lock(&self.ids);
        ids.push(object);
        // They are no more than the entries.
        ids.len() as Slot - 1
    }

    fn add<R: Input>(
        &mut self,
        size: u64,
        archive: &mut Archive<'_, R>,
    ) -> Result<Slot, UnpackError> {
        if size > BATCHED_FILE {
            let added = self.ingest.add_reader(&mut archive.contents());
            return Ok(self.slot(added.map_err(unwrap_input)?.object));
        }
        let slot = self.slot(PENDING);
        let start = self.batch.bytes.len();
        let mut filled = start;
        self.batch.bytes.resize(start + size as usize, 0);
        while filled < self.batch.bytes.len() {
            let got = archive.read_contents(&mut self.batch.bytes[filled..])?;
            filled += got;
        }
        self.batch.files.push((slot, size as usize));
        if filled >= BATCH_BYTES || self.batch.files.len() >= BATCH_FILES {
            self.hand_over();
        }
        Ok(slot)
    }

    /// A queue without workers means that one has failed; `finish` says how.
    fn hand_over(&mut self) {
        let _ = self.queue.send(std::mem::take(&mut self.batch));
    }

    fn finish(mut self) -> Result<Vec<ObjectId>, StoreError> {
        self.hand_over();
        drop(self.queue);
        for worker in self.workers {
            worker
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        Ok(std::mem::take(&mut *lock(&self.ids)))
    }
}

fn store_batches(
    ingest: &Ingest<'_>,
    batches: &Mutex<Receiver<Batch>>,
    ids: &Mutex<Vec<ObjectId>>,
) -> Result<(), StoreError> {
    loop {
        let next = lock(batches).recv();
        let Ok(batch) = next else {
            return Ok(());
        };
        let mut rest = batch.bytes.as_slice();
        let mut stored = Vec::with_capacity(batch.files.len());
        for (slot, len) in batch.files {
            let (bytes, after) = rest.split_at(len);
            rest = after;
            stored.push((slot, ingest.add_bytes(bytes)?.object));
        }
        let mut ids = lock(ids);
        for (slot, object) in stored {
            ids[slot as usize] = object;
        }
    }
}

/// A fault of the archive that came to light while the store was reading from it is the archive's.
fn unwrap_input(error: StoreError) -> UnpackError {
    match error {
        StoreError::Input(error) => match error.downcast::<TarError>() {
            Ok(error) => UnpackError::Tar(error),
            Err(error) => UnpackError::Store(StoreError::Input(error)),
        },
        error => UnpackError::Store(error),
    }
}

type DirIx = usize;
type InodeIx = usize;

/// Made small: a tree can have a million of them. Their number is bounded by the entries and the
/// components of their names.
#[derive(Debug, Clone, Copy)]
enum Entry {
    Dir(u32),
    Inode(u32),
    /// Only once all entries are there.
    Whiteout,
}

#[derive(Debug)]
struct DirNode {
    /// The root is its own parent.
    parent: DirIx,
    name: Box<[u8]>,
    depth: usize,
    /// None for a directory that is only on the way to something.
    meta: Option<Meta>,
    opaque: bool,
    entries: BTreeMap<Box<[u8]>, Entry>,
    whiteouts: BTreeSet<Box<[u8]>>,
}

/// [`Meta`] with few bytes for no xattrs, and what it is.
#[derive(Debug)]
struct Inode {
    mode: u16,
    uid: u32,
    gid: u32,
    mtime: Mtime,
    xattrs: Option<Box<Xattrs>>,
    body: Body,
}

impl Inode {
    fn new(meta: Meta, body: Body) -> Self {
        Self {
            mode: meta.mode,
            uid: meta.uid,
            gid: meta.gid,
            mtime: meta.mtime,
            xattrs: (!meta.xattrs.is_empty()).then(|| Box::new(meta.xattrs)),
            body,
        }
    }

    fn meta(&self) -> Meta {
        Meta {
            mode: self.mode,
            uid: self.uid,
            gid: self.gid,
            mtime: self.mtime,
            xattrs: self.xattrs.as_deref().cloned().unwrap_or_default(),
        }
    }
}

#[derive(Debug)]
enum Body {
    File { slot: Slot, size: u64 },
    Symlink(Box<[u8]>),
    Fifo,
    Socket,
    Char(Rdev),
    Block(Rdev),
}

const ROOT: DirIx = 0;

/// The tree as it grows. Directories and inodes stand in tables, so that depth costs no stack and
/// hardlinks are numbers. A directory stands after its parent.
struct Builder<'scope, 'i, 'd> {
    dialect: Dialect<'d>,
    limits: &'d Limits,
    objects: Objects<'scope, 'i>,
    dirs: Vec<DirNode>,
    inodes: Vec<Inode>,
    entries: u64,
    /// Bytes of names, targets and xattrs, and of the targets of symlinks each time that one is
    /// followed: a bound on both memory and time.
    metadata: u64,
    took_from_below: bool,
}

/// Where a name leads.
struct Place {
    dir: DirIx,
    name: Box<[u8]>,
}

impl<'scope, 'i: 'scope, 'd> Builder<'scope, 'i, 'd> {
    fn new(dialect: Dialect<'d>, limits: &'d Limits, objects: Objects<'scope, 'i>) -> Self {
        let root = DirNode {
            parent: ROOT,
            name: Box::default(),
            depth: 0,
            meta: match dialect {
                Dialect::Rootfs => Some(implicit_meta()),
                Dialect::Layer(_) | Dialect::LayerAlone => None,
            },
            opaque: false,
            entries: BTreeMap::new(),
            whiteouts: BTreeSet::new(),
        };
        Self {
            dialect,
            limits,
            objects,
            dirs: vec![root],
            inodes: Vec::new(),
            entries: 0,
            metadata: 0,
            took_from_below: false,
        }
    }

    fn entry<R: Input>(
        &mut self,
        member: Member,
        archive: &mut Archive<'_, R>,
    ) -> Result<(), UnpackError> {
        self.account(&member)?;
        let names = components(&member.path, &member.path)?;
        let Some((&last, parents)) = names.split_last() else {
            return self.root(member);
        };
        if let Dialect::Layer(_) | Dialect::LayerAlone = self.dialect {
            let aufs = names[0].starts_with(AUFS) && names[0] != OPAQUE;
            if aufs {
                return Ok(());
            }
            if parents.iter().any(|name| name.starts_with(WHITEOUT)) {
                return Err(UnpackError::Whiteout(member.name()));
            }
            if let Some(hidden) = last.strip_prefix(WHITEOUT) {
                let dir = self.make_dir(parents, &member)?;
                return self.whiteout(dir, last, hidden, &member);
            }
        }
        if last.len() > MAX_NAME {
            return Err(UnpackError::NameTooLong(member.name()));
        }
        let dir = self.make_dir(parents, &member)?;
        let place = Place {
            dir,
            name: last.into(),
        };
        match member.kind {
            MemberKind::Dir => self.directory(place, member),
            MemberKind::Hardlink => self.hardlink(place, &member),
            _ => {
                let body = self.body(&member, archive)?;
                self.replace(place, body, member);
                Ok(())
            }
        }
    }

    fn account(&mut self, member: &Member) -> Result<(), UnpackError> {
        self.entries += 1;
        let xattrs = member
            .xattrs
            .iter()
            .map(|(name, value)| name.len() + value.len());
        let metadata = member.path.len() + member.link.len() + xattrs.sum::<usize>();
        self.metadata = self.metadata.saturating_add(metadata as u64);
        self.check_limits(member)
    }

    fn check_limits(&self, member: &Member) -> Result<(), UnpackError> {
        for (have, limit, what) in [
            (self.entries, Limit::Entries, "the number of entries"),
            (
                self.metadata,
                Limit::Metadata,
                "the size of all names and xattrs together, in bytes,",
            ),
        ] {
            if have > self.limits.get(limit) {
                return Err(UnpackError::Limit {
                    entry: member.name(),
                    passed: self.limits.passed(limit, what),
                });
            }
        }
        Ok(())
    }

    fn root(&mut self, member: Member) -> Result<(), UnpackError> {
        if member.kind != MemberKind::Dir {
            return Err(UnpackError::Root(member.name()));
        }
        self.dirs[ROOT].meta = Some(meta(member));
        Ok(())
    }

    fn body<R: Input>(
        &mut self,
        member: &Member,
        archive: &mut Archive<'_, R>,
    ) -> Result<Body, UnpackError> {
        Ok(match member.kind {
            MemberKind::Symlink if member.link.is_empty() || member.link.len() > MAX_TARGET => {
                return Err(UnpackError::Target(member.name()));
            }
            MemberKind::Symlink => Body::Symlink(member.link.as_slice().into()),
            MemberKind::Fifo => Body::Fifo,
            MemberKind::Char(rdev) => Body::Char(rdev),
            MemberKind::Block(rdev) => Body::Block(rdev),
            MemberKind::File | MemberKind::Dir | MemberKind::Hardlink => Body::File {
                slot: self.objects.add(member.size, archive)?,
                size: member.size,
            },
        })
    }

    /// Follows `names` from the root, making directories where there are none.
    fn make_dir(&mut self, names: &[&[u8]], member: &Member) -> Result<DirIx, UnpackError> {
        let mut walk = Walk::new(names);
        while let Some(name) = walk.step(self, member)? {
            walk.dir = self.new_dir(walk.dir, name, None, member)?;
            // A name can have very many components.
            self.entries += 1;
        }
        self.metadata = self.metadata.saturating_add(walk.followed);
        self.check_limits(member)?;
        Ok(walk.dir)
    }

    fn new_dir(
        &mut self,
        parent: DirIx,
        name: Box<[u8]>,
        meta: Option<Meta>,
        member: &Member,
    ) -> Result<DirIx, UnpackError> {
        let depth = self.dirs[parent].depth + 1;
        if depth > MAX_DEPTH {
            // Be it through symlinks.
            return Err(UnpackError::Limit {
                entry: member.name(),
                passed: Passed::fixed("the depth of its directories", MAX_DEPTH as u64),
            });
        }
        let ix = self.dirs.len();
        self.dirs[parent]
            .entries
            .insert(name.clone(), Entry::Dir(ix as u32));
        self.dirs.push(DirNode {
            parent,
            name,
            depth,
            meta,
            opaque: false,
            entries: BTreeMap::new(),
            whiteouts: BTreeSet::new(),
        });
        Ok(ix)
    }

    /// The names that lead from the root to `dir`.
    fn path_of(&self, dir: DirIx) -> Vec<&[u8]> {
        let mut names = Vec::with_capacity(self.dirs[dir].depth);
        let mut ix = dir;
        while ix != ROOT {
            names.push(&*self.dirs[ix].name);
            ix = self.dirs[ix].parent;
        }
        names.reverse();
        names
    }

    fn directory(&mut self, place: Place, member: Member) -> Result<(), UnpackError> {
        let there = self.dirs[place.dir].entries.get(&place.name).copied();
        let ix = match there {
            Some(Entry::Dir(ix)) => ix as DirIx,
            _ => self.new_dir(place.dir, place.name, None, &member)?,
        };
        self.dirs[ix].meta = Some(meta(member));
        Ok(())
    }

    fn replace(&mut self, place: Place, body: Body, member: Member) {
        let mut meta = meta(member);
        if matches!(body, Body::Symlink(_)) {
            // Linux knows no other mode for symlinks, whatever the archive says.
            meta.mode = 0o777;
        }
        let entry = self.new_inode(Inode::new(meta, body));
        self.dirs[place.dir].entries.insert(place.name, entry);
    }

    fn new_inode(&mut self, inode: Inode) -> Entry {
        self.inodes.push(inode);
        Entry::Inode(self.inodes.len() as u32 - 1)
    }

    fn whiteout(
        &mut self,
        dir: DirIx,
        name: &[u8],
        hidden: &[u8],
        member: &Member,
    ) -> Result<(), UnpackError> {
        if name == OPAQUE {
            self.dirs[dir].opaque = true;
            return Ok(());
        }
        if tree::check_name(hidden).is_err() {
            return Err(UnpackError::Whiteout(member.name()));
        }
        self.dirs[dir].whiteouts.insert(hidden.into());
        Ok(())
    }

    fn hardlink(&mut self, place: Place, member: &Member) -> Result<(), UnpackError> {
        let missing = || UnpackError::LinkTarget {
            entry: member.name(),
            target: EntryName(member.link.clone()),
        };
        let names = components(&member.link, &member.path)?;
        let (&last, parents) = names.split_last().ok_or_else(missing)?;
        let mut walk = Walk::new(parents);
        let absent = walk.step(self, member)?;
        self.metadata = self.metadata.saturating_add(walk.followed);
        let target = match &absent {
            None => self.dirs[walk.dir].entries.get(last).copied(),
            Some(_) => None,
        };
        let entry = match target {
            Some(entry @ Entry::Inode(_)) => entry,
            Some(Entry::Dir(_)) => {
                return Err(UnpackError::LinkToDirectory {
                    entry: member.name(),
                    target: EntryName(member.link.clone()),
                });
            }
            Some(Entry::Whiteout) | None => {
                let mut path = self.path_of(walk.dir);
                path.extend(absent.as_deref());
                path.extend(walk.todo.iter().rev().map(|name| &**name));
                path.push(last);
                let inode = self.find_below(&path)?.ok_or_else(missing)?;
                let dir = self.make_dir(parents, member)?;
                let entry = self.new_inode(inode);
                self.dirs[dir].entries.insert(last.into(), entry);
                self.took_from_below = true;
                entry
            }
        };
        self.dirs[place.dir].entries.insert(place.name, entry);
        Ok(())
    }

    /// The entry at `path` in the layers below, if this layer lets it show through so far.
    fn find_below(&self, path: &[&[u8]]) -> Result<Option<Inode>, UnpackError> {
        let below = match self.dialect {
            Dialect::Rootfs => return Ok(None),
            Dialect::Layer(below) => below,
            Dialect::LayerAlone => return Err(UnpackError::NeedsBelow),
        };
        let mut dir = Some(ROOT);
        for &name in path {
            let Some(here) = dir.map(|ix| &self.dirs[ix]) else {
                break;
            };
            if here.opaque || here.whiteouts.contains(name) {
                return Ok(None);
            }
            dir = match here.entries.get(name) {
                Some(Entry::Dir(ix)) => Some(*ix as DirIx),
                _ => None,
            };
        }
        Ok(find(below, path).and_then(|found| lower_inode(found, &self.objects)))
    }

    fn finish(mut self) -> Result<Unpacked, UnpackError> {
        self.apply_whiteouts();
        self.fill_opaque_metadata()?;
        let mut names = vec![0_u32; self.inodes.len()];
        for dir in &mut self.dirs {
            for entry in dir.entries.values() {
                if let Entry::Inode(ix) = entry {
                    names[*ix as usize] += 1;
                }
            }
            for name in std::mem::take(&mut dir.whiteouts) {
                dir.entries.entry(name).or_insert(Entry::Whiteout);
            }
        }
        Ok(Unpacked {
            tree: ArchiveTree {
                ids: self.objects.finish()?,
                dirs: self.dirs,
                inodes: self.inodes,
                names,
            },
            took_from_below: self.took_from_below,
        })
    }

    /// A whiteout beside a directory of the same name hides what the directory would otherwise be
    /// merged with. Beside anything else it says nothing new.
    fn apply_whiteouts(&mut self) {
        for ix in 0..self.dirs.len() {
            for name in std::mem::take(&mut self.dirs[ix].whiteouts) {
                match self.dirs[ix].entries.get(&name).copied() {
                    Some(Entry::Dir(child)) => self.dirs[child as DirIx].opaque = true,
                    Some(Entry::Inode(_)) => {}
                    Some(Entry::Whiteout) | None => {
                        self.dirs[ix].whiteouts.insert(name);
                    }
                }
            }
        }
    }

    /// An opaque directory hides the one below and needs metadata of its own; without an entry it
    /// keeps the other's. That there is no other depends on the layers below as much.
    fn fill_opaque_metadata(&mut self) -> Result<(), UnpackError> {
        for ix in 0..self.dirs.len() {
            if !self.dirs[ix].opaque || self.dirs[ix].meta.is_some() {
                continue;
            }
            let below = match self.dialect {
                Dialect::Rootfs => return Ok(()),
                Dialect::Layer(below) => below,
                Dialect::LayerAlone => return Err(UnpackError::NeedsBelow),
            };
            let lower = find(below, &self.path_of(ix)).filter(|node| node.kind() == Kind::Dir);
            self.took_from_below = true;
            self.dirs[ix].meta = Some(lower.map_or_else(implicit_meta, NodeRef::meta));
        }
        Ok(())
    }
}

/// The inode of an entry of a layer below; none for a directory.
fn lower_inode(found: NodeRef<'_>, objects: &Objects<'_, '_>) -> Option<Inode> {
    let body = match found.content()? {
        Content::File { object, size } => Body::File {
            slot: objects.slot(object),
            size,
        },
        Content::Symlink { target } => Body::Symlink(target),
        Content::Fifo => Body::Fifo,
        Content::Socket => Body::Socket,
        Content::Char(rdev) => Body::Char(rdev),
        Content::Block(rdev) => Body::Block(rdev),
        Content::Whiteout => return None,
    };
    Some(Inode::new(found.meta(), body))
}

/// The tree of an archive, in the tables in which it grew: a million entries take 180 MB, and as
/// much again as a [`tree::Tree`].
#[derive(Debug)]
pub struct ArchiveTree {
    /// By slot.
    ids: Vec<ObjectId>,
    dirs: Vec<DirNode>,
    inodes: Vec<Inode>,
    /// How many names each inode has.
    names: Vec<u32>,
}

impl ArchiveTree {
    /// Whether there is an entry of this name in the root.
    pub fn has(&self, name: &[u8]) -> bool {
        self.dirs[ROOT].entries.contains_key(name)
    }

    fn leaf(&self, ix: u32) -> Leaf {
        let inode = &self.inodes[ix as InodeIx];
        let content = match &inode.body {
            Body::File { slot, size } => Content::File {
                object: self.ids[*slot as usize],
                size: *size,
            },
            Body::Symlink(target) => Content::Symlink {
                target: target.clone(),
            },
            Body::Fifo => Content::Fifo,
            Body::Socket => Content::Socket,
            Body::Char(rdev) => Content::Char(*rdev),
            Body::Block(rdev) => Content::Block(*rdev),
        };
        Leaf {
            meta: inode.meta(),
            content,
            link: (self.names[ix as InodeIx] > 1).then_some(ix.into()),
        }
    }
}

impl Source for ArchiveTree {
    type Dir<'a> = DirIx;

    fn root(&self) -> DirIx {
        ROOT
    }

    fn dir(&self, dir: DirIx) -> (Cow<'_, Meta>, DirKind) {
        let dir = &self.dirs[dir];
        match (dir.opaque, &dir.meta) {
            (true, Some(meta)) => (Cow::Borrowed(meta), DirKind::Opaque),
            (true, None) => (Cow::Owned(Meta::default()), DirKind::Opaque),
            (false, Some(meta)) => (Cow::Borrowed(meta), DirKind::Merged),
            (false, None) => (Cow::Owned(Meta::default()), DirKind::Implicit),
        }
    }

    fn entries(&self, dir: DirIx) -> impl Iterator<Item = (&[u8], tree::Entry<'_, DirIx>)> {
        self.dirs[dir].entries.iter().map(|(name, entry)| {
            let entry = match *entry {
                Entry::Dir(ix) => tree::Entry::Dir(ix as DirIx),
                Entry::Inode(ix) => tree::Entry::Leaf(Cow::Owned(self.leaf(ix))),
                Entry::Whiteout => tree::Entry::Leaf(Cow::Owned(Leaf {
                    meta: Meta::default(),
                    content: Content::Whiteout,
                    link: None,
                })),
            };
            (&**name, entry)
        })
    }
}

/// A walk from the root along a name, following symlinks within the root.
struct Walk {
    dir: DirIx,
    /// Paths still to walk, last first.
    todo: Vec<Box<[u8]>>,
    symlinks: usize,
    /// Bytes of the targets of the symlinks followed.
    followed: u64,
}

impl Walk {
    fn new(names: &[&[u8]]) -> Self {
        Self {
            dir: ROOT,
            todo: names.iter().rev().map(|&name| name.into()).collect(),
            symlinks: 0,
            followed: 0,
        }
    }

    /// Walks on until a component is missing, which it returns, or the end is reached.
    fn step(
        &mut self,
        builder: &Builder<'_, '_, '_>,
        member: &Member,
    ) -> Result<Option<Box<[u8]>>, UnpackError> {
        while let Some(name) = self.todo.pop() {
            // Only a symlink's target can have these.
            if name.is_empty() || &*name == b"." {
                continue;
            }
            if &*name == b".." {
                self.dir = builder.dirs[self.dir].parent;
                continue;
            }
            if name.len() > MAX_NAME {
                return Err(UnpackError::NameTooLong(member.name()));
            }
            match builder.dirs[self.dir].entries.get(&name) {
                None | Some(Entry::Whiteout) => return Ok(Some(name)),
                Some(Entry::Dir(ix)) => self.dir = *ix as DirIx,
                Some(Entry::Inode(ix)) => {
                    let Body::Symlink(target) = &builder.inodes[*ix as InodeIx].body else {
                        return Err(UnpackError::NotADirectory(member.name()));
                    };
                    self.symlinks += 1;
                    if self.symlinks > MAX_SYMLINKS {
                        return Err(UnpackError::SymlinkLoop(member.name()));
                    }
                    self.followed += target.len() as u64;
                    if target.starts_with(b"/") {
                        self.dir = ROOT;
                    }
                    let parts = target.rsplit(|&byte| byte == b'/');
                    self.todo.extend(parts.map(Box::<[u8]>::from));
                }
            }
        }
        Ok(None)
    }
}

/// The entry at `path` of a chain of layers, bottom first; `None` where it is missing or hidden.
/// Symlinks on the way are not followed.
fn find<'l>(layers: &'l [Arc<Layer>], path: &[&[u8]]) -> Option<NodeRef<'l>> {
    'layers: for layer in layers.iter().rev() {
        let mut node = layer.root();
        let mut opaque = false;
        for &name in path {
            if node.kind() != Kind::Dir {
                return None;
            }
            opaque |= node.dir_kind() == DirKind::Opaque;
            match node.child(name) {
                Some(child) => node = child,
                None if opaque => return None,
                None => continue 'layers,
            }
        }
        match node.kind() {
            Kind::Whiteout => return None,
            // Its metadata is that of the directory below.
            Kind::Dir if node.dir_kind() == DirKind::Implicit && !opaque => {}
            _ => return Some(node),
        }
    }
    None
}

/// The components of a name, without empty ones and `.`. A mark of a whiteout does not count
/// towards its length: the longest name can be hidden, too.
fn components<'p>(path: &'p [u8], entry: &[u8]) -> Result<Vec<&'p [u8]>, UnpackError> {
    let mut names = Vec::new();
    for name in tree::components(path) {
        match name {
            b"." => {}
            b".." => return Err(UnpackError::Escapes(EntryName(entry.to_vec()))),
            _ if name.strip_prefix(WHITEOUT).unwrap_or(name).len() > MAX_NAME => {
                return Err(UnpackError::NameTooLong(EntryName(entry.to_vec())));
            }
            _ => names.push(name),
        }
    }
    Ok(names)
}

fn meta(member: Member) -> Meta {
    Meta {
        mode: member.mode,
        uid: member.uid,
        gid: member.gid,
        mtime: member.mtime,
        xattrs: member.xattrs,
    }
}

fn implicit_meta() -> Meta {
    Meta {
        mode: 0o755,
        uid: 0,
        gid: 0,
        mtime: Mtime::default(),
        xattrs: BTreeMap::new(),
    }
}
