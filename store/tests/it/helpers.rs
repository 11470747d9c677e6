//! Helpers that the tests share.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{File, Metadata};
use std::io;
use std::path::Path;

use iii_store::disk::{Disk, RealDisk, Space};
use iii_store::tree::{Content, Leaf, Meta, Mtime, Node, Tree};
use iii_store::{Ingest, Kind, Layer, ObjectId, Published, Store, StoreError, VerifyOptions};

/// The filesystem without waiting for the disk: for tests in which the machine stays up.
#[derive(Debug)]
pub struct NoSync;

impl Disk for NoSync {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        RealDisk.create_dir(path)
    }

    fn create(&self, path: &Path) -> io::Result<File> {
        RealDisk.create(path)
    }

    fn write_at(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        RealDisk.write_at(file, bytes, offset)
    }

    fn reflink(&self, from: &File, to: &File) -> io::Result<()> {
        RealDisk.reflink(from, to)
    }

    fn sync(&self, _: &File) -> io::Result<()> {
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        RealDisk.rename(from, to)
    }

    fn sync_dir(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        RealDisk.remove(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        RealDisk.remove_dir(path)
    }

    fn open_lock(&self, path: &Path) -> io::Result<File> {
        RealDisk.open_lock(path)
    }

    fn touch(&self, path: &Path) -> io::Result<()> {
        RealDisk.touch(path)
    }

    fn open(&self, path: &Path) -> io::Result<File> {
        RealDisk.open(path)
    }

    fn read_at(&self, file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        RealDisk.read_at(file, buf, offset)
    }

    fn metadata(&self, path: &Path) -> io::Result<Metadata> {
        RealDisk.metadata(path)
    }

    fn may_write_in(&self, dir: &Path) -> io::Result<()> {
        RealDisk.may_write_in(dir)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<OsString>> {
        RealDisk.list(path)
    }

    fn space(&self, path: &Path) -> io::Result<Space> {
        RealDisk.space(path)
    }
}

/// Files by path.
pub type Files = BTreeMap<Vec<u8>, Vec<u8>>;

pub fn files(list: &[(&str, &str)]) -> Files {
    let pair = |(path, text): &(&str, &str)| (path.as_bytes().to_vec(), text.as_bytes().to_vec());
    list.iter().map(pair).collect()
}

/// A tree of these files, their objects added to `ingest`.
pub fn add_files(ingest: &Ingest<'_>, files: &Files) -> Result<Tree, StoreError> {
    let mut tree = Tree::default();
    for (path, bytes) in files {
        let added = ingest.add_bytes(bytes)?;
        assert_eq!(added.object, ObjectId::of(bytes));
        put(&mut tree, path, added.object, added.size);
    }
    Ok(tree)
}

/// Puts a file into a tree.
pub fn put(tree: &mut Tree, path: &[u8], object: ObjectId, size: u64) {
    let cut = path.iter().rposition(|&byte| byte == b'/');
    let (dir, name) = cut.map_or((&b""[..], path), |cut| (&path[..cut], &path[cut + 1..]));
    let leaf = Node::Leaf(Leaf {
        meta: Meta {
            mode: 0o644,
            mtime: Mtime { sec: 7, nsec: 0 },
            ..Meta::default()
        },
        content: Content::File { object, size },
        link: None,
    });
    tree.dir_at(dir).unwrap().entries.insert(name.into(), leaf);
}

/// Stores a layer of these files.
pub fn publish(store: &Store, files: &Files) -> Result<Published, StoreError> {
    let lease = store.lease("test")?;
    let ingest = store.ingest(&lease)?;
    let tree = add_files(&ingest, files)?;
    ingest.finish(&tree)
}

/// The files of a layer, read back and checked against their ids.
pub fn read_back(store: &Store, layer: &Layer) -> Files {
    let mut files = Files::new();
    let mut nodes = vec![layer.root()];
    while let Some(node) = nodes.pop() {
        nodes.extend(node.children());
        if node.kind() == Kind::File {
            let blob = store.object(&node.object()).unwrap();
            let bytes = blob.read_all(u64::MAX).unwrap();
            assert_eq!(ObjectId::of(&bytes), node.object());
            assert_eq!(bytes.len() as u64, node.size());
            files.insert(node.path(), bytes);
        }
    }
    files
}

/// Asserts that every layer opens and that every object it names exists: a name means durable and
/// whole. Returns the number of layers.
pub fn check_whole(dir: &Path) -> usize {
    let store = Store::open(dir).unwrap();
    let layers: Vec<_> = names(&dir.join("layers"));
    for name in &layers {
        let layer = store.layer(&name.parse().unwrap()).unwrap();
        read_back(&store, &layer);
    }
    let loose = names(&dir.join("loose"));
    for name in loose
        .iter()
        .filter(|name| name.strip_suffix(".cv").is_none())
    {
        let id: ObjectId = name.parse().unwrap();
        let bytes = std::fs::read(dir.join("loose").join(name)).unwrap();
        assert_eq!(ObjectId::of(&bytes), id);
    }
    let report = store.verify(VerifyOptions { data: true }, &|_| ()).unwrap();
    assert!(report.is_clean(), "{report:?}");
    layers.len()
}

/// The names in a directory, sorted.
pub fn names(dir: &Path) -> Vec<String> {
    let name = |entry: std::io::Result<std::fs::DirEntry>| entry.unwrap().file_name();
    let entries = std::fs::read_dir(dir).unwrap().map(name);
    let mut names: Vec<_> = entries.map(|name| name.into_string().unwrap()).collect();
    names.sort();
    names
}

/// Bytes that do not repeat.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

/// Longer files are linked instead of copied: no store writes to an existing file. Shorter ones may
/// be locked.
pub const LINKED: u64 = 4096;

/// Copies a store.
pub fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for name in names(from) {
        let (from, to) = (from.join(&name), to.join(&name));
        let meta = std::fs::metadata(&from).unwrap();
        if meta.is_dir() {
            copy(&from, &to);
        } else if meta.len() > LINKED {
            std::fs::hard_link(&from, &to).unwrap();
        } else {
            std::fs::copy(&from, &to).unwrap();
        }
    }
}
