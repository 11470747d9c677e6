//! Stores, layers and whole views for tests.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, Mutex};

use iii_overlay::fs::{Attr, Caller, Filesystem, Kind};
use iii_overlay::ino::{Ino, ROOT};
use iii_overlay::upper::disk::{Disk, HostDisk};
use iii_overlay::{Objects, OpenError, Overlay, OverlayOptions};
use iii_store::layer::encode;
use iii_store::tree::{Content, Dir, DirKind, Leaf, Meta, Mtime, Node, Rdev, Tree};
use iii_store::{Layer, LayerId, Lease, ObjectId, Store};
use proptest::prelude::*;

/// A store in a directory of its own, with room for uppers.
pub struct Home {
    pub dir: tempfile::TempDir,
    pub store: Store,
    pub lease: Lease,
    held: Arc<Held>,
}

/// Layers and the objects in them.
#[derive(Default)]
struct Held(Mutex<(Layers, HashMap<ObjectId, Vec<u8>>)>);

type Layers = HashMap<LayerId, Arc<Layer>>;

impl Objects for Held {
    fn read_at(&self, object: &ObjectId, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let held = self.0.lock().unwrap();
        let bytes = held.1.get(object).ok_or(io::ErrorKind::NotFound)?;
        let rest = bytes.get(offset as usize..).unwrap_or_default();
        let count = rest.len().min(buf.len());
        buf[..count].copy_from_slice(&rest[..count]);
        Ok(count)
    }

    fn copy_to(&self, object: &ObjectId, len: u64, to: &File) -> io::Result<()> {
        let held = self.0.lock().unwrap();
        let bytes = held.1.get(object).ok_or(io::ErrorKind::NotFound)?;
        to.write_all_at(&bytes[..len as usize], 0)
    }
}

impl Home {
    pub fn new() -> Self {
        // Prefers memory: each end of an upper syncs.
        let memory = Path::new("/dev/shm");
        let dir = if memory.is_dir() {
            tempfile::tempdir_in(memory).unwrap()
        } else {
            tempfile::tempdir().unwrap()
        };
        let store = Store::open(dir.path().join("store")).unwrap();
        let lease = store.lease("test").unwrap();
        Self {
            dir,
            store,
            lease,
            held: Arc::default(),
        }
    }

    /// The tree as a layer, with files of these contents. Writes nothing to disk, which the store
    /// would do slowly.
    pub fn layer(&self, tree: &Tree, contents: &[&[u8]]) -> Arc<Layer> {
        let mut held = self.held.0.lock().unwrap();
        for bytes in contents {
            held.1.insert(ObjectId::of(bytes), bytes.to_vec());
        }
        let layer = Layer::from_bytes(encode(tree).unwrap().bytes).unwrap();
        let layer = Arc::new(layer);
        held.0.insert(layer.layer_id(), Arc::clone(&layer));
        layer
    }

    /// Removes the object of these bytes.
    pub fn lose(&self, bytes: &[u8]) {
        self.held.0.lock().unwrap().1.remove(&ObjectId::of(bytes));
    }

    pub fn upper(&self) -> std::path::PathBuf {
        self.dir.path().join("upper")
    }

    pub fn open(&self, layers: &[Arc<Layer>]) -> Overlay {
        self.open_at(layers, &self.upper(), OverlayOptions::default())
    }

    pub fn open_at(&self, layers: &[Arc<Layer>], upper: &Path, options: OverlayOptions) -> Overlay {
        self.try_open(layers, upper, options).unwrap()
    }

    pub fn try_open(
        &self,
        layers: &[Arc<Layer>],
        upper: &Path,
        options: OverlayOptions,
    ) -> Result<Overlay, OpenError> {
        self.try_open_on(Arc::new(HostDisk), layers, upper, options)
    }

    pub fn open_on(&self, disk: Arc<dyn Disk>, layers: &[Arc<Layer>], upper: &Path) -> Overlay {
        let opened = self.try_open_on(disk, layers, upper, OverlayOptions::default());
        opened.unwrap()
    }

    pub fn try_open_on(
        &self,
        disk: Arc<dyn Disk>,
        layers: &[Arc<Layer>],
        upper: &Path,
        options: OverlayOptions,
    ) -> Result<Overlay, OpenError> {
        let held = &self.held;
        let old = |id: &LayerId| {
            let held = held.0.lock().unwrap();
            held.0.get(id).cloned().ok_or_else(|| "not held".into())
        };
        Overlay::open_on(disk, held.clone(), layers.to_vec(), &old, upper, options)
    }

    /// The tree that freezing returns.
    pub fn frozen(&self, overlay: &Overlay) -> Tree {
        let ingest = self.store.ingest(&self.lease).unwrap();
        overlay.freeze(&ingest).unwrap().0
    }

    /// The tree that freezing returns, and its layer in the store.
    pub fn published(&self, overlay: &Overlay) -> (Tree, LayerId) {
        let ingest = self.store.ingest(&self.lease).unwrap();
        let (tree, _) = overlay.freeze(&ingest).unwrap();
        let layer = ingest.finish(&tree).unwrap().layer_id;
        (tree, layer)
    }

    /// Makes an upper at `to` of the frozen overlay, on the same footing; `layers` are those of the
    /// footing.
    pub fn thaw(&self, overlay: &Overlay, layers: &[Arc<Layer>], to: &Path) {
        let ingest = self.store.ingest(&self.lease).unwrap();
        let (tree, footing) = overlay.freeze(&ingest).unwrap();
        let written: Vec<_> = view(overlay).into_values().map(|seen| seen.bytes).collect();
        let written: Vec<&[u8]> = written.iter().map(Vec::as_slice).collect();
        let frozen = self.layer(&tree, &written);
        iii_overlay::thaw(to, &footing, layers.to_vec(), &frozen).unwrap();
    }
}

/// The contents of generated files.
pub const CONTENTS: [&[u8]; 4] = [
    b"",
    b"one",
    b"three",
    b"a longer text, to be cut and patched",
];

/// An entry as a program sees it. `link` is a number that all names of one file share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub kind: Kind,
    pub mode: u16,
    pub owner: (u32, u32),
    pub rdev: Rdev,
    pub bytes: Vec<u8>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub nlink: u32,
    pub link: Option<usize>,
    pub mtime: Option<i64>,
}

pub type View = BTreeMap<Vec<u8>, Seen>;

pub fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    if dir.is_empty() {
        return name.to_vec();
    }
    [dir, b"/", name].concat()
}

/// The names in a directory, listed two at a time.
pub fn names(fs: &dyn Filesystem, dir: Ino, attrs: bool) -> Vec<(Vec<u8>, Ino, Kind)> {
    let mut names = Vec::new();
    let mut cookie = 0;
    loop {
        let mut room = 2;
        let before = names.len();
        fs.readdir(dir, cookie, attrs, &mut |entry| {
            if room == 0 {
                return false;
            }
            room -= 1;
            cookie = entry.cookie;
            names.push((entry.name.to_vec(), entry.ino, entry.kind));
            if let Some(attr) = entry.attr {
                assert_eq!((attr.ino, attr.kind), (entry.ino, entry.kind));
            }
            true
        })
        .unwrap();
        if names.len() == before {
            break;
        }
    }
    if attrs {
        for (name, ino, _) in &names {
            if name != b"." && name != b".." {
                fs.forget(*ino, 1);
            }
        }
    }
    names
}

fn bytes(fs: &dyn Filesystem, attr: &Attr) -> Vec<u8> {
    match attr.kind {
        Kind::File => {
            let mut bytes = vec![0; attr.size as usize + 10];
            let count = fs.read(attr.ino, &mut bytes, 0).unwrap();
            bytes.truncate(count);
            assert_eq!(count as u64, attr.size);
            bytes
        }
        Kind::Symlink => fs.readlink(attr.ino).unwrap(),
        _ => Vec::new(),
    }
}

/// All entries of the filesystem, by path.
pub fn view(fs: &dyn Filesystem) -> View {
    let mut seen: Vec<(Vec<u8>, Ino, Seen)> = Vec::new();
    let mut pending = vec![(ROOT, Vec::new())];
    while let Some((ino, path)) = pending.pop() {
        let attr = fs.getattr(ino).unwrap();
        let list = fs.listxattr(ino, Caller::default()).unwrap();
        let xattrs = list
            .split(|&byte| byte == 0)
            .filter(|name| !name.is_empty())
            .map(|name| (name.to_vec(), fs.getxattr(ino, name).unwrap()))
            .collect();
        if attr.kind == Kind::Dir {
            let listed = names(fs, ino, path.len() % 2 == 0);
            assert_eq!((&listed[0].0[..], listed[0].1), (&b"."[..], ino));
            assert_eq!(listed[1].0, b"..");
            for (name, child, kind) in &listed[2..] {
                let found = fs.lookup(ino, name).unwrap();
                assert_eq!(
                    (found.ino, found.kind),
                    (*child, *kind),
                    "{path:?} {name:?}"
                );
                fs.forget(*child, 1);
                pending.push((*child, join(&path, name)));
            }
        }
        let one = Seen {
            kind: attr.kind,
            mode: attr.mode,
            owner: (attr.uid, attr.gid),
            rdev: attr.rdev,
            bytes: bytes(fs, &attr),
            xattrs,
            nlink: attr.nlink,
            link: None,
            mtime: Some(attr.mtime.sec),
        };
        seen.push((path, ino, one));
    }
    seen.sort_by(|a, b| a.0.cmp(&b.0));
    let mut firsts: BTreeMap<Ino, usize> = BTreeMap::new();
    let mut view = View::new();
    for (at, (path, ino, mut one)) in seen.into_iter().enumerate() {
        if one.kind != Kind::Dir && one.nlink > 1 {
            one.link = Some(*firsts.entry(ino).or_insert(at));
        }
        assert!(view.insert(path, one).is_none(), "a name was listed twice");
    }
    view
}

/// The view without the parts that may differ: times, and counts of names.
pub fn timeless(mut view: View) -> View {
    for seen in view.values_mut() {
        seen.mtime = None;
    }
    view
}

pub fn name() -> impl Strategy<Value = Box<[u8]>> {
    prop::sample::select(vec![&b"a"[..], b"b", b"c", b"\xff"]).prop_map(Into::into)
}

fn meta() -> impl Strategy<Value = Meta> {
    let mode = prop::sample::select(&[0o644_u16, 0o755, 0o2755, 0o4711][..]);
    (
        mode,
        0..3_u32,
        0..3_u32,
        0..3_i64,
        prop::bool::weighted(0.2),
    )
        .prop_map(|(mode, uid, gid, sec, xattr)| Meta {
            mode,
            uid,
            gid,
            mtime: Mtime { sec, nsec: 0 },
            xattrs: xattr
                .then(|| ((*b"user.x").into(), (*b"1").into()))
                .into_iter()
                .collect(),
        })
}

fn leaf() -> impl Strategy<Value = Node> {
    let content = prop_oneof![
        6 => prop::sample::select(&CONTENTS[..]).prop_map(|bytes| Content::File {
            object: ObjectId::of(bytes),
            size: bytes.len() as u64,
        }),
        1 => Just(Content::Symlink { target: (*b"a/b").into() }),
        1 => Just(Content::Fifo),
        1 => Just(Content::Char(Rdev { major: 0, minor: 0 })),
        2 => Just(Content::Whiteout),
    ];
    (meta(), content, prop::option::weighted(0.3, 1..3_u64)).prop_map(|(meta, content, link)| {
        Node::Leaf(Leaf {
            meta,
            content,
            link,
        })
    })
}

fn dir(entries: impl Strategy<Value = Node>) -> impl Strategy<Value = Dir> {
    let kind = prop::sample::select(
        &[
            DirKind::Merged,
            DirKind::Merged,
            DirKind::Opaque,
            DirKind::Implicit,
        ][..],
    );
    let entries = prop::collection::btree_map(name(), entries, 0..4);
    (meta(), kind, entries).prop_map(|(meta, kind, entries)| Dir {
        meta: if kind == DirKind::Implicit {
            Meta::default()
        } else {
            meta
        },
        kind,
        entries: entries.into_iter().collect(),
    })
}

/// Makes leaves with one label agree in everything, as they are one file.
fn agree(dir: &mut Dir, first: &mut BTreeMap<u64, Leaf>) {
    for node in dir.entries.values_mut() {
        match node {
            Node::Dir(dir) => agree(dir, first),
            Node::Leaf(leaf) if leaf.content == Content::Whiteout => leaf.link = None,
            Node::Leaf(leaf) => {
                if let Some(label) = leaf.link {
                    *leaf = first.entry(label).or_insert_with(|| leaf.clone()).clone();
                }
            }
        }
    }
}

/// Generates trees.
pub fn tree() -> impl Strategy<Value = Tree> {
    let node = leaf().prop_recursive(3, 24, 4, |inner| dir(inner).prop_map(Node::Dir));
    dir(node).prop_map(|mut tree| {
        tree.kind = DirKind::Merged;
        agree(&mut tree, &mut BTreeMap::new());
        tree
    })
}

/// Puts a file into a tree.
pub fn put(tree: &mut Tree, path: &[u8], bytes: &[u8]) {
    let at = path.iter().rposition(|&byte| byte == b'/');
    let (dir, name) = at.map_or((&b""[..], path), |at| (&path[..at], &path[at + 1..]));
    let leaf = Leaf {
        meta: Meta {
            mode: 0o644,
            ..Meta::default()
        },
        content: Content::File {
            object: ObjectId::of(bytes),
            size: bytes.len() as u64,
        },
        link: None,
    };
    let dir = tree.dir_at(dir).unwrap();
    dir.entries.insert(name.into(), Node::Leaf(leaf));
}
