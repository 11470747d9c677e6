//! Archives made by hand, and trees as text.

mod archives;
pub mod corpus;
mod export;
mod gnu_tar;
mod hostile;
mod images;

use std::error::Error;
use std::fmt::Write as _;
use std::sync::Arc;

use iii_store::tree::{Content, Dir, DirKind, Meta, Mtime, Node};
use iii_store::{Layer, Store};

use super::Limits;
use super::unpack::{self, Dialect, Unpacked};

/// Writes archives, sensible ones and others. Every member is owned by 0:0, of mode 0644 or 0755 and of time 0 unless
/// it is told otherwise.
#[derive(Clone, Default)]
pub struct Tar(pub Vec<u8>);

/// A header of its own making.
#[derive(Clone)]
pub struct Head(pub [u8; 512]);

impl Head {
    pub fn new(kind: u8, name: impl AsRef<[u8]>, size: u64) -> Self {
        let mut head = Self([0; 512]);
        let mode = if kind == b'5' { "0000755" } else { "0000644" };
        head.put(0, name.as_ref())
            .put(100, mode)
            .put(108, "0000000")
            .put(116, "0000000")
            .put(124, format!("{size:011o}"))
            .put(136, "00000000000")
            .put(156, [kind])
            .put(257, b"ustar\x0000")
            .put(329, "0000000")
            .put(337, "0000000");
        head
    }

    pub fn put(&mut self, at: usize, bytes: impl AsRef<[u8]>) -> &mut Self {
        let bytes = bytes.as_ref();
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    pub fn gnu(&mut self) -> &mut Self {
        self.put(257, b"ustar  \0")
    }
}

impl Tar {
    pub fn head(mut self, head: &Head) -> Self {
        let mut block = head.0;
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.0.extend(block);
        self
    }

    pub fn data(mut self, bytes: impl AsRef<[u8]>) -> Self {
        self.0.extend(bytes.as_ref());
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub fn member(self, kind: u8, name: impl AsRef<[u8]>, data: impl AsRef<[u8]>) -> Self {
        let head = Head::new(kind, name, data.as_ref().len() as u64);
        self.head(&head).data(data)
    }

    pub fn file(self, name: impl AsRef<[u8]>, data: impl AsRef<[u8]>) -> Self {
        self.member(b'0', name, data)
    }

    pub fn dir(self, name: impl AsRef<[u8]>) -> Self {
        self.member(b'5', name, "")
    }

    pub fn link(self, kind: u8, name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        self.head(Head::new(kind, name, 0).put(157, target))
    }

    pub fn symlink(self, name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        self.link(b'2', name, target)
    }

    pub fn hardlink(self, name: impl AsRef<[u8]>, target: impl AsRef<[u8]>) -> Self {
        self.link(b'1', name, target)
    }

    pub fn pax(self, records: &[(&str, &[u8])]) -> Self {
        self.member(b'x', "PaxHeaders/x", pax_text(records))
    }

    pub fn global(self, records: &[(&str, &[u8])]) -> Self {
        self.member(b'g', "PaxHeaders/g", pax_text(records))
    }

    pub fn gnu_long(self, kind: u8, name: impl AsRef<[u8]>) -> Self {
        self.member(kind, "././@LongLink", [name.as_ref(), b"\0"].concat())
    }

    pub fn end(self) -> Vec<u8> {
        self.data([0; 1024]).0
    }
}

pub fn pax_text(records: &[(&str, &[u8])]) -> Vec<u8> {
    let mut text = Vec::new();
    for (key, value) in records {
        let rest = key.len() + value.len() + 3;
        let mut length = rest + 1;
        while length != rest + length.to_string().len() {
            length = rest + length.to_string().len();
        }
        text.extend(format!("{length} {key}=").bytes());
        text.extend(*value);
        text.push(b'\n');
    }
    text
}

/// A store in a directory of its own.
pub struct TestStore {
    pub store: Store,
    pub dir: tempfile::TempDir,
}

impl TestStore {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path().join("store")).unwrap();
        Self { store, dir }
    }

    pub fn unpack(
        &self,
        archive: &[u8],
        dialect: Dialect<'_>,
        limits: &Limits,
    ) -> Result<(Arc<Layer>, bool), String> {
        let lease = self.store.lease("test").unwrap();
        let ingest = self.store.ingest(&lease).unwrap();
        let mut input = archive;
        let Unpacked {
            tree,
            took_from_below,
        } = unpack::unpack(&mut input, &ingest, dialect, limits, &|_| {})
            .map_err(|error| chain(&error))?;
        let published = ingest.finish(&tree).map_err(|error| chain(&error))?;
        let layer = self.store.layer(&published.layer_id).unwrap();
        Ok((layer, took_from_below))
    }

    /// The tree as text: a line for each entry, with what is not usual about it.
    pub fn show(&self, layer: &Layer) -> Vec<String> {
        let mut lines = Vec::new();
        let root = layer.to_tree();
        let note = attributes(&root.meta, 0o755, root.kind);
        if !note.is_empty() {
            lines.push(format!("/{note}"));
        }
        let mut links = Vec::new();
        self.show_dir(&root, "", &mut links, &mut lines);
        lines
    }

    fn show_dir(&self, dir: &Dir, path: &str, links: &mut Vec<u64>, lines: &mut Vec<String>) {
        for (name, node) in dir.entries.iter() {
            let path = format!("{path}{}", name.escape_ascii());
            match node {
                Node::Dir(dir) => {
                    let note = attributes(&dir.meta, 0o755, dir.kind);
                    lines.push(format!("{path}/{note}"));
                    self.show_dir(dir, &format!("{path}/"), links, lines);
                }
                Node::Leaf(leaf) => {
                    let (what, mode) = match &leaf.content {
                        Content::File { object, size } => {
                            let blob = self.store.object(object).unwrap();
                            assert_eq!(blob.len(), *size);
                            let mut bytes = vec![0; *size as usize];
                            let mut at = 0;
                            while at < bytes.len() {
                                at += blob.read_at(&mut bytes[at..], at as u64).unwrap();
                            }
                            (format!(" = {}", contents(&bytes)), 0o644)
                        }
                        Content::Symlink { target } => {
                            (format!(" -> {}", target.escape_ascii()), 0o777)
                        }
                        Content::Fifo => (" fifo".to_owned(), 0o644),
                        Content::Socket => (" socket".to_owned(), 0o644),
                        Content::Char(rdev) => {
                            (format!(" char {}:{}", rdev.major, rdev.minor), 0o644)
                        }
                        Content::Block(rdev) => {
                            (format!(" block {}:{}", rdev.major, rdev.minor), 0o644)
                        }
                        Content::Whiteout => (" gone".to_owned(), leaf.meta.mode),
                    };
                    let note = attributes(&leaf.meta, mode, DirKind::Merged);
                    let link = leaf.link.map_or_else(String::new, |link| {
                        let known = links.iter().position(|&other| other == link);
                        let number = known.unwrap_or_else(|| {
                            links.push(link);
                            links.len() - 1
                        });
                        format!(" link#{number}")
                    });
                    lines.push(format!("{path}{what}{note}{link}"));
                }
            }
        }
    }
}

/// Bytes, with runs of zeros counted.
fn contents(bytes: &[u8]) -> String {
    let mut text = String::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let zeros = rest.iter().take_while(|&&byte| byte == 0).count();
        if zeros > 8 {
            let _ = write!(text, "[{zeros}]");
            rest = &rest[zeros..];
        } else {
            let _ = write!(text, "{}", rest[..1].escape_ascii());
            rest = &rest[1..];
        }
    }
    text
}

fn attributes(meta: &Meta, usual: u16, kind: DirKind) -> String {
    let mut text = String::new();
    match kind {
        DirKind::Implicit => return " implicit".to_owned(),
        DirKind::Opaque => text.push_str(" opaque"),
        DirKind::Merged => {}
    }
    if meta.mode != usual {
        let _ = write!(text, " {:o}", meta.mode);
    }
    if (meta.uid, meta.gid) != (0, 0) {
        let _ = write!(text, " {}:{}", meta.uid, meta.gid);
    }
    if meta.mtime != Mtime::default() {
        let _ = write!(text, " @{}.{:09}", meta.mtime.sec, meta.mtime.nsec);
    }
    for (name, value) in &meta.xattrs {
        let _ = write!(text, " {}={}", name.escape_ascii(), value.escape_ascii());
    }
    text
}

/// An error with its causes, as people see it.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let _ = write!(text, ": {error}");
        cause = error.source();
    }
    text
}
