//! The tar stream of a layer: PAX, deterministic, nothing of this machine in it.
//!
//! Unpacked by [`unpack`](crate::unpack), it is the same layer again, times and all. Entries stand
//! in the order of their names, a directory before its entries.
//!
//! - Names and link targets are the layer's bytes, whatever their encoding, without a leading `/`
//!   or `./`.
//! - PAX records are written only for values that a ustar header cannot hold: long names, large
//!   numbers, times before 1970 or with nanoseconds, xattrs (`SCHILY.xattr.NAME`).
//! - Of a file with several names the first has the contents, and the others are hardlinks to it.
//!   They repeat its metadata, xattrs too: extractors set the owner of each name anew, and the
//!   kernel drops capabilities when they do.
//! - A whiteout of NAME is an empty file `.wh.NAME`; an opaque directory holds an empty file
//!   `.wh..wh..opq`, right behind it.
//! - A directory that is only a parent is not written: the names of its entries imply it.
//! - Sockets are left out, as every archiver does: see [`LayerTar::sockets`].

use std::borrow::Cow;
use std::collections::HashMap;
use std::io::{self, Write};

use iii_store::tree::{DirKind, Mtime, Rdev};
use iii_store::{Kind, Layer, NodeRef, Store};

use super::ExportError;
use crate::limits::MAX_EXTENSION;
use crate::tar::EntryName;

pub(super) const BLOCK: usize = 512;
/// Two empty blocks.
pub(super) const END: [u8; 2 * BLOCK] = [0; 2 * BLOCK];
/// Bytes of a file read at once.
const PIECE: usize = 1 << 20;
const WHITEOUT: &[u8] = b".wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Longest name, link target and prefix of a ustar header.
const NAME: usize = 100;
const PREFIX: usize = 155;

/// The archive of a layer. Everything in it can be written: that was checked when this was made.
#[derive(Clone, Copy)]
pub struct LayerTar<'a> {
    store: &'a Store,
    layer: &'a Layer,
    omit: &'a [&'a [u8]],
    size: u64,
    watch: Option<&'a Watch<'a>>,
}

/// Told how many bytes of an archive have been written. To stop is to fail.
pub type Watch<'a> = dyn Fn(u64) -> io::Result<()> + Sync + 'a;

impl<'a> LayerTar<'a> {
    /// The archive of `layer`, without the entries at the paths in `omit` and what is below them.
    /// Of the store only metadata is read. The layer must be pinned for as long as this lives.
    ///
    /// A name that an image would take for a whiteout, an xattr whose name has a `=`, and xattrs of
    /// more than [`MAX_EXTENSION`] bytes are refused.
    pub fn new(
        store: &'a Store,
        layer: &'a Layer,
        omit: &'a [&'a [u8]],
    ) -> Result<Self, ExportError> {
        let mut tar = Self {
            store,
            layer,
            omit,
            size: 0,
            watch: None,
        };
        let mut size = END.len() as u64;
        let mut headers = Vec::new();
        tar.walk(|member| {
            headers.clear();
            member.headers(&mut headers)?;
            size += headers.len() as u64 + member.size.next_multiple_of(BLOCK as u64);
            Ok(())
        })?;
        tar.size = size;
        Ok(tar)
    }

    /// The same, with `watch` told between pieces how far writing it is.
    #[must_use]
    pub fn watched(self, watch: &'a Watch<'a>) -> Self {
        Self {
            watch: Some(watch),
            ..self
        }
    }

    /// The layer.
    pub fn layer(&self) -> &'a Layer {
        self.layer
    }

    /// The paths that are left out.
    pub fn omitted(&self) -> &'a [&'a [u8]] {
        self.omit
    }

    /// Length of the archive, in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The sockets of the layer, which no archive can hold.
    pub fn sockets(&self) -> impl Iterator<Item = EntryName> + 'a {
        let nodes = self.layer.nodes();
        nodes
            .filter(|node| node.kind() == Kind::Socket)
            .map(|node| EntryName(node.path()))
    }

    /// The times of its entries, in whole seconds since 1970. Those of what is left out are among
    /// them.
    pub fn mtimes(&self) -> impl Iterator<Item = i64> + 'a {
        let nodes = self.layer.nodes();
        let timed = nodes
            .filter(|node| node.kind() != Kind::Whiteout && node.dir_kind() != DirKind::Implicit);
        timed.map(|node| node.mtime().sec)
    }

    /// Writes the archive. Files are read piece by piece, each checked against its hash.
    pub fn write(&self, out: &mut dyn Write) -> Result<(), ExportError> {
        let mut out = Counted {
            out,
            written: 0,
            watch: self.watch,
        };
        let mut headers = Vec::new();
        let mut piece = vec![0; PIECE];
        self.walk(|member| {
            headers.clear();
            member.headers(&mut headers)?;
            out.put(&headers)?;
            match member.contents {
                Some(node) => self.contents(node, &mut piece, &mut out),
                None => Ok(()),
            }
        })?;
        out.put(&END)
    }

    fn contents(
        &self,
        node: NodeRef<'_>,
        piece: &mut [u8],
        out: &mut Counted<'_>,
    ) -> Result<(), ExportError> {
        let failed = |source| ExportError::Contents {
            entry: EntryName(node.path()),
            source,
        };
        let blob = self.store.object(&node.object())?;
        if blob.len() != node.size() {
            let why = "the layer and the store disagree about their length";
            return Err(failed(io::Error::new(io::ErrorKind::InvalidData, why)));
        }
        let mut at = 0;
        while at < blob.len() {
            let want = piece
                .len()
                .min(usize::try_from(blob.len() - at).unwrap_or(usize::MAX));
            let got = blob.read_at(&mut piece[..want], at).map_err(failed)?;
            out.put(&piece[..got])?;
            at += got as u64;
        }
        out.put(&END[..padding(blob.len())])
    }

    /// Visits the members of the archive in their order.
    fn walk(
        &self,
        mut visit: impl FnMut(&Member<'_>) -> Result<(), ExportError>,
    ) -> Result<(), ExportError> {
        // Of each file with several names, by the first of them in the layer: the one that has the
        // contents here.
        let mut linked: HashMap<u32, NodeRef<'_>> = HashMap::new();
        let mut path = Vec::new();
        directory(self.layer.root(), &path, &mut visit)?;
        let mut dirs = vec![(self.layer.root().children(), path.len())];
        while let Some((children, parent)) = dirs.last_mut() {
            path.truncate(*parent);
            let Some(node) = children.next() else {
                dirs.pop();
                continue;
            };
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend(node.name());
            if self.omit.contains(&&*path) {
                continue;
            }
            if node.name().starts_with(WHITEOUT) {
                return Err(ExportError::Entry {
                    entry: EntryName(path),
                    what: "a name that begins with .wh. would be a whiteout there",
                });
            }
            match node.kind() {
                Kind::Dir => {
                    directory(node, &path, &mut visit)?;
                    dirs.push((node.children(), path.len()));
                }
                Kind::Socket => {}
                Kind::Whiteout => {
                    let dir = path.len() - node.name().len();
                    visit(&Member::marker(
                        [&path[..dir], WHITEOUT, node.name()].concat(),
                    ))?;
                }
                _ => {
                    let group = node.links().next().map(NodeRef::index);
                    match group.and_then(|group| linked.get(&group)) {
                        Some(first) => visit(&Member::hardlink(node, &path, first.path()))?,
                        None => visit(&Member::leaf(node, &path))?,
                    }
                    if let Some(group) = group {
                        linked.entry(group).or_insert(node);
                    }
                }
            }
        }
        Ok(())
    }
}

struct Counted<'a> {
    out: &'a mut dyn Write,
    written: u64,
    watch: Option<&'a Watch<'a>>,
}

impl Counted<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<(), ExportError> {
        self.out.write_all(bytes).map_err(ExportError::Write)?;
        self.written += bytes.len() as u64;
        match self.watch {
            Some(watch) => watch(self.written).map_err(ExportError::Write),
            None => Ok(()),
        }
    }
}

fn directory(
    node: NodeRef<'_>,
    path: &[u8],
    visit: &mut impl FnMut(&Member<'_>) -> Result<(), ExportError>,
) -> Result<(), ExportError> {
    let kind = node.dir_kind();
    if kind == DirKind::Implicit {
        return Ok(());
    }
    let name = if path.is_empty() { b"." } else { path };
    let name = [name, b"/"].concat();
    visit(&Member {
        kind: b'5',
        node: Some(node),
        ..Member::marker(name)
    })?;
    if kind == DirKind::Opaque {
        let dir = if path.is_empty() { &b""[..] } else { b"/" };
        visit(&Member::marker([path, dir, OPAQUE].concat()))?;
    }
    Ok(())
}

/// Bytes between the end of a member and the next block.
pub(super) fn padding(size: u64) -> usize {
    (size.next_multiple_of(BLOCK as u64) - size) as usize
}

/// One member of the archive.
struct Member<'a> {
    name: Cow<'a, [u8]>,
    kind: u8,
    link: Cow<'a, [u8]>,
    /// Bytes that follow, without the padding.
    size: u64,
    /// Whose contents they are.
    contents: Option<NodeRef<'a>>,
    /// Whose metadata it has; a marker has none.
    node: Option<NodeRef<'a>>,
}

impl<'a> Member<'a> {
    /// An empty file that says something by its name.
    fn marker(name: Vec<u8>) -> Self {
        Self {
            name: name.into(),
            kind: b'0',
            link: Cow::default(),
            size: 0,
            contents: None,
            node: None,
        }
    }

    fn hardlink(node: NodeRef<'a>, path: &'a [u8], first: Vec<u8>) -> Self {
        Self {
            name: path.into(),
            kind: b'1',
            link: first.into(),
            size: 0,
            contents: None,
            node: Some(node),
        }
    }

    fn leaf(node: NodeRef<'a>, path: &'a [u8]) -> Self {
        let kind = match node.kind() {
            Kind::Symlink => b'2',
            Kind::Char => b'3',
            Kind::Block => b'4',
            Kind::Fifo => b'6',
            _ => b'0',
        };
        let is_file = kind == b'0';
        Self {
            name: path.into(),
            kind,
            link: node.target().into(),
            size: if is_file { node.size() } else { 0 },
            contents: is_file.then_some(node),
            node: Some(node),
        }
    }

    /// Appends its header, behind a PAX header where it needs one.
    fn headers(&self, out: &mut Vec<u8>) -> Result<(), ExportError> {
        let mut header = Header::new(self.kind);
        let mut pax = Pax::default();
        if !header.name(&self.name) {
            pax.record(b"path", &self.name);
        }
        if !header.text(157, NAME, &self.link) {
            pax.record(b"linkpath", &self.link);
        }
        header.number(124, 12, self.size, b"size", &mut pax);
        let (mut mode, mut owner, mut mtime) = (0, (0, 0), Mtime::default());
        let mut rdev = Rdev::default();
        if let Some(node) = self.node {
            mode = node.mode();
            owner = (node.uid(), node.gid());
            mtime = node.mtime();
            rdev = node.rdev();
        }
        header.octal(100, 8, mode.into());
        header.number(108, 8, owner.0.into(), b"uid", &mut pax);
        header.number(116, 8, owner.1.into(), b"gid", &mut pax);
        let seconds = u64::try_from(mtime.sec).ok();
        let fits = header.octal(136, 12, seconds.unwrap_or(0));
        if !fits || seconds.is_none() || mtime.nsec != 0 {
            pax.record(b"mtime", pax_time(mtime).as_bytes());
        }
        // PAX has no records for these.
        if !header.octal(329, 8, rdev.major.into()) || !header.octal(337, 8, rdev.minor.into()) {
            return Err(self.refused("its device number is too large for an archive"));
        }
        for (name, value) in self.node.iter().flat_map(|node| node.xattrs()) {
            if name.contains(&b'=') {
                return Err(self.refused("an xattr of it has a = in its name"));
            }
            pax.record(&[b"SCHILY.xattr.", name].concat(), value);
        }
        if pax.0.len() as u64 > MAX_EXTENSION {
            return Err(self.refused("its xattrs are larger than readers of archives take"));
        }
        if !pax.0.is_empty() {
            let mut extension = Header::new(b'x');
            extension.name(b"././@PaxHeader");
            extension.octal(124, 12, pax.0.len() as u64);
            out.extend(extension.finish());
            out.extend(&pax.0);
            out.resize(out.len() + padding(pax.0.len() as u64), 0);
        }
        out.extend(header.finish());
        Ok(())
    }

    fn refused(&self, what: &'static str) -> ExportError {
        ExportError::Entry {
            entry: EntryName(self.name.to_vec()),
            what,
        }
    }
}

/// The header of a file in an archive of archives, whatever its size.
pub(crate) fn file_header(name: &[u8], size: u64) -> [u8; BLOCK] {
    let mut header = Header::new(b'0');
    header.name(name);
    header.octal(100, 8, 0o644);
    for (at, len) in [(108, 8), (116, 8), (136, 12), (329, 8), (337, 8)] {
        header.octal(at, len, 0);
    }
    if !header.octal(124, 12, size) {
        // In GNU's way, which every reader knows: the room for the header is given.
        header.0[124..136].fill(0);
        header.0[124] = 0x80;
        header.0[128..136].copy_from_slice(&size.to_be_bytes());
    }
    header.finish()
}

/// A ustar header block.
struct Header([u8; BLOCK]);

impl Header {
    fn new(kind: u8) -> Self {
        let mut header = Self([0; BLOCK]);
        header.0[156] = kind;
        header.0[257..265].copy_from_slice(b"ustar\x0000");
        header
    }

    /// Puts in a name, split at a slash if it is long, and says whether it has room.
    fn name(&mut self, name: &[u8]) -> bool {
        if self.text(0, NAME, name) {
            return true;
        }
        // The slash at the end of a directory is no place to split at.
        let latest = name.len().saturating_sub(1).min(PREFIX + 1);
        let earliest = name.len().saturating_sub(NAME + 1);
        let slash = (earliest..latest).find(|&at| name[at] == b'/' && at > 0);
        match slash {
            Some(at) => {
                let (prefix, rest) = name.split_at(at);
                self.0[..NAME].fill(0);
                self.text(0, NAME, &rest[1..]) && self.text(345, PREFIX, prefix)
            }
            None => false,
        }
    }

    /// Puts in a text, cut if it is too long, and says whether it has room.
    fn text(&mut self, at: usize, len: usize, text: &[u8]) -> bool {
        let count = text.len().min(len);
        self.0[at..at + count].copy_from_slice(&text[..count]);
        text.len() <= len
    }

    /// Puts in a number, or 0 if it is too large, and says whether it has room.
    fn octal(&mut self, at: usize, len: usize, number: u64) -> bool {
        let digits = len - 1;
        let fits = number >> (3 * digits) == 0;
        let text = format!("{:0digits$o}", if fits { number } else { 0 });
        self.text(at, digits, text.as_bytes());
        fits
    }

    fn number(&mut self, at: usize, len: usize, number: u64, key: &[u8], pax: &mut Pax) {
        if !self.octal(at, len, number) {
            pax.record(key, number.to_string().as_bytes());
        }
    }

    fn finish(mut self) -> [u8; BLOCK] {
        self.0[148..156].fill(b' ');
        let sum: u64 = self.0.iter().map(|&byte| u64::from(byte)).sum();
        self.octal(148, 7, sum);
        self.0[154] = 0;
        self.0
    }
}

/// The records of a PAX header.
#[derive(Default)]
struct Pax(Vec<u8>);

impl Pax {
    /// Adds `LENGTH KEY=VALUE\n`, where the length counts its own digits.
    fn record(&mut self, key: &[u8], value: &[u8]) {
        let rest = key.len() + value.len() + 3;
        let mut length = rest;
        while length != rest + length.to_string().len() {
            length = rest + length.to_string().len();
        }
        self.0.extend(length.to_string().bytes());
        for part in [b" ", key, b"=", value, b"\n"] {
            self.0.extend(part);
        }
    }
}

/// Seconds since 1970 with as many decimal places as it takes.
fn pax_time(time: Mtime) -> String {
    let nanoseconds = i128::from(time.sec) * 1_000_000_000 + i128::from(time.nsec);
    let sign = if nanoseconds < 0 { "-" } else { "" };
    let nanoseconds = nanoseconds.unsigned_abs();
    let (whole, part) = (nanoseconds / 1_000_000_000, nanoseconds % 1_000_000_000);
    let text = format!("{sign}{whole}.{part:09}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}
