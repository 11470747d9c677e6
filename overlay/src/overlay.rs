//! The overlay: a lower and an upper, seen as one filesystem.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use iii_store::layer::{Kind, Layer};
use iii_store::{ObjectId, Store};

use crate::aside::Kept;
use crate::fs::{Attr, Result, Time};
use crate::ino::Ino;
use crate::lookups::Lookups;
use crate::merge::{Lower, Merged};
use crate::objects::Objects;
use crate::observe::Observer;
use crate::posix::errno;
use crate::stats::Stats;
use crate::upper::disk::Disk;
use crate::upper::record::{Body, Bytes, Data};
use crate::upper::state::{Node, State};
use crate::upper::{Inner, Opened, Upper};
use crate::view::Found;
use crate::{OpenError, OverlayOptions};

/// Layers and an upper as one filesystem. See the crate's documentation for what holds.
pub struct Overlay {
    pub(crate) lower: Arc<Merged>,
    pub(crate) upper: Upper,
    pub(crate) objects: Arc<dyn Objects>,
    pub(crate) lookups: Lookups,
    pub(crate) observer: Option<Observer>,
    pub(crate) stats: Stats,
    pub(crate) aside: Kept,
    /// The project's layer that is seen, and which of the chain it stands for.
    pub(crate) project: Mutex<Option<(usize, Arc<Layer>)>>,
    /// See [`Overlay::gave_way`].
    gave_way: u64,
    /// Number of visible names of hardlinked lower files.
    links: Mutex<HashMap<Ino, u32>>,
}

impl std::fmt::Debug for Overlay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Overlay")
            .field("upper", &self.upper.dir())
            .finish_non_exhaustive()
    }
}

impl Overlay {
    /// Composes `layers`, bottom first, and the upper in the directory `upper`, which is made when
    /// missing and locked as long as the overlay lives. If the upper stood on another chain, its
    /// changes are carried over first: see [`crate::rebase`]. A layer of that chain that was lost
    /// is replaced by one of the same tree. The caller has pinned the layers, and those of
    /// [`crate::footing_of`].
    pub fn open(
        store: &Store,
        layers: Vec<Arc<Layer>>,
        upper: &Path,
        options: OverlayOptions,
    ) -> std::result::Result<Self, OpenError> {
        let old = |id: &iii_store::LayerId| {
            store
                .layer_or_same_tree(id)
                .map_err(|error| Box::new(error) as Box<dyn std::error::Error + Send + Sync>)
        };
        Self::open_with(Arc::new(store.clone()), layers, &old, upper, options)
    }

    /// [`Overlay::open`] with the bytes and the layers of the former chain from anywhere.
    pub fn open_with(
        objects: Arc<dyn Objects>,
        layers: Vec<Arc<Layer>>,
        old_layer: &crate::rebase::OldLayer<'_>,
        upper: &Path,
        options: OverlayOptions,
    ) -> std::result::Result<Self, OpenError> {
        let disk = Arc::new(crate::upper::disk::HostDisk);
        Self::open_on(disk, objects, layers, old_layer, upper, options)
    }

    /// [`Overlay::open_with`] with an upper whose files are made and synced by `disk`.
    pub fn open_on(
        disk: Arc<dyn Disk>,
        objects: Arc<dyn Objects>,
        layers: Vec<Arc<Layer>>,
        old_layer: &crate::rebase::OldLayer<'_>,
        upper: &Path,
        options: OverlayOptions,
    ) -> std::result::Result<Self, OpenError> {
        let chain = crate::upper::record::Chain {
            layers: layers.iter().map(|l| *l.layer_id().as_bytes()).collect(),
            project: options.project.as_ref().map(|project| project.slot as u32),
        };
        let mut seen = None;
        let observer = match options.project {
            Some(project) => {
                let layer = layers.get(project.slot).ok_or(OpenError::NoProject)?;
                seen = Some((project.slot, Arc::clone(layer)));
                let seeds = &options.aside.seeds;
                let observe = options
                    .observe
                    .then(|| Observer::new(&layers, project, seeds));
                observe.flatten()
            }
            None => None,
        };
        let lower = Arc::new(Merged::new(layers)?);
        let aside = Kept::new(options.aside, &lower);
        let mut opened = Opened::new_on(disk, upper)?;
        if let Some(thawed) = opened.thawed() {
            // Its contents are read when they are needed: it is too late then to say that they are
            // gone.
            let layer = old_layer(&iii_store::LayerId::from_bytes(thawed));
            layer.map_err(|source| crate::upper::UpperError::Thawed {
                path: upper.to_owned(),
                source,
            })?;
        }
        let known = opened.chain().cloned();
        let mut gave_way = 0;
        let (state, written) = match known {
            Some(known) if known.layers != chain.layers || !opened.applied().is_empty() => {
                let (state, files) = crate::rebase::rebase(
                    &mut opened,
                    &known,
                    old_layer,
                    &lower,
                    chain,
                    &*objects,
                )?;
                gave_way = files;
                (state, false)
            }
            Some(known) => {
                let mut state = opened.replay(lower.clone())?;
                let written = known == chain;
                state.chain = chain;
                (state, written)
            }
            None => {
                let mut state = State::new(lower.clone());
                state.chain = chain;
                (state, false)
            }
        };
        let upper = opened.start(state, written, options.volatile)?;
        Ok(Self {
            lower,
            upper,
            objects,
            lookups: Lookups::default(),
            observer,
            stats: Stats::default(),
            aside,
            project: Mutex::new(seen),
            gave_way,
            links: Mutex::default(),
        })
    }

    /// How many files that the sandbox had written or removed gave way to newer ones of its layers
    /// when this was opened: see [`crate::rebase`].
    pub fn gave_way(&self) -> u64 {
        self.gave_way
    }

    fn lower_nlink(&self, lower: Lower<'_>) -> u32 {
        if lower.node.kind() == Kind::Dir {
            return 2 + self.lower.subdirs(lower.ino);
        }
        if !lower.node.is_hardlinked() {
            return 1;
        }
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        *links
            .entry(lower.ino)
            .or_insert_with(|| self.lower.visible_paths(lower).len().max(1) as u32)
    }

    pub(crate) fn attr(&self, state: &State, ino: Ino) -> Result<Attr> {
        match state.find(ino)? {
            Found::Upper(_, node) => Ok(self.upper_attr(ino, node)),
            Found::Lower(lower) => {
                let meta = self.lower.meta(lower);
                let mtime: Time = meta.mtime().into();
                let size = lower.node.size();
                Ok(Attr {
                    ino,
                    kind: lower.node.kind(),
                    mode: meta.mode(),
                    nlink: self.lower_nlink(lower),
                    uid: meta.uid(),
                    gid: meta.gid(),
                    rdev: lower.node.rdev(),
                    size: dir_size(lower.node.kind(), size),
                    blocks: size.div_ceil(512),
                    atime: mtime,
                    mtime,
                    ctime: mtime,
                    btime: mtime,
                })
            }
        }
    }

    fn upper_attr(&self, ino: Ino, node: &Node) -> Attr {
        let record = &node.record;
        let nlink = match &node.dir {
            Some(dir) if record.nlink != 0 => 2 + dir.subdirs,
            _ => record.nlink,
        };
        let size = record.size();
        let blocks = match record.flat() {
            Some(flat) => self
                .upper
                .data
                .stat(flat)
                .map_or(size.div_ceil(512), |stat| stat.st_blocks as u64),
            None => size.div_ceil(512),
        };
        Attr {
            ino,
            kind: record.kind(),
            mode: record.mode,
            nlink,
            uid: record.uid,
            gid: record.gid,
            rdev: match record.body {
                Body::Char(rdev) | Body::Block(rdev) => rdev.into(),
                _ => iii_store::tree::Rdev::default(),
            },
            size: dir_size(record.kind(), size),
            blocks,
            atime: record.atime,
            mtime: record.mtime,
            ctime: record.ctime,
            btime: record.btime,
        }
    }

    /// Drops an inode that has no name and that the kernel has forgotten.
    pub(crate) fn reap(&self, inner: &mut Inner, ino: Ino) {
        let Some(number) = inner.state.number(ino) else {
            return;
        };
        let Some(node) = inner.state.node(number) else {
            return;
        };
        if node.record.nlink != 0 || self.lookups.has(ino) {
            return;
        }
        let flat = node.record.flat();
        inner.state.remove(number);
        if let Some(flat) = flat {
            inner.doom(flat);
        }
    }

    /// Reads from wherever the bytes are until `buf` is full or the file ends.
    pub(crate) fn read_bytes(&self, bytes: Bytes, buf: &mut [u8], offset: u64) -> Result<usize> {
        use std::os::unix::fs::FileExt;
        let left = bytes.size.saturating_sub(offset);
        let want = buf.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        let buf = &mut buf[..want];
        if want == 0 {
            return Ok(0);
        }
        let flat = match bytes.data {
            Data::Flat { number, .. } => {
                Some(self.upper.data.get(number).map_err(|error| errno(&error))?)
            }
            _ => None,
        };
        let mut done = 0;
        while done < want {
            let at = offset + done as u64;
            let got = match (&bytes.data, &flat) {
                (Data::Lower(object), _) => {
                    let object = ObjectId::from_bytes(*object);
                    self.objects.read_at(&object, &mut buf[done..], at)
                }
                (_, Some(flat)) => flat.read_at(&mut buf[done..], at),
                _ => Ok(0),
            };
            match got {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(errno(&error)),
            }
        }
        Ok(done)
    }
}

/// Directories say one block, as most filesystems do; some programs take 0 for a broken one.
fn dir_size(kind: Kind, size: u64) -> u64 {
    if kind == Kind::Dir { 4096 } else { size }
}
