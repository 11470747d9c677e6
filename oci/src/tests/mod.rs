//! Trees as text.

mod archives;
pub mod corpus;
mod export;
mod gnu_tar;
mod hostile;
mod images;

use std::fmt::Write as _;
use std::sync::Arc;

use iii_store::tree::{Content, Dir, DirKind, Meta, Mtime, Node};
use iii_store::{Layer, Store, with_causes};
pub use iii_test_support::{Head, Tar};

use super::Limits;
use super::unpack::{self, Dialect, Unpacked};

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
            .map_err(|error| with_causes(&error))?;
        let published = ingest.finish(&tree).map_err(|error| with_causes(&error))?;
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
