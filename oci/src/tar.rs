//! Reading tar streams: V7, ustar, star, GNU and PAX, with every kind of sparse file.
//!
//! The `tar` crate is not used for reading. Its PAX parser cuts records at newlines, so an xattr
//! with a newline in it hides the `size` that follows and the reader loses its place in the
//! archive; it reads extension headers of any length into memory; and it knows no PAX sparse files
//! and no times before 1970.
//!
//! Where readers of tar disagree about an archive, Go's `archive/tar`
//! (docker, containerd, podman, umoci) is followed; where a disagreement can only be meant to
//! deceive, the member is refused:
//!
//! - Links, directories, devices and FIFOs have no data, whatever their size field says.
//! - A `size` of a PAX header overrides the member's own; it never applies to another extension
//!   header in between.
//! - Global PAX headers are skipped, as docker does. One that would change names, sizes or
//!   sparseness is refused.
//! - A stream may end at the end of a member, and in the padding after one: `umoci insert` writes
//!   such archives.
//! - Two extension headers of one kind for one member, or a GNU and a PAX name that differ, are
//!   refused.

use std::fmt;
use std::io::{self, Read, Seek, SeekFrom};

use iii_store::tree::{MAX_XATTR_NAME, MAX_XATTR_VALUE, MAX_XATTRS, Mtime, Rdev, Xattrs};

use super::{Limit, Limits, Passed};

const BLOCK: usize = 512;
const SKIP_CHUNK: usize = 64 << 10;
/// How many bytes of an entry's name an error shows.
const SHOWN_NAME: usize = 160;

/// The name of a member as people are shown it: quoted, control and non-UTF-8 bytes escaped, cut
/// when long.
#[derive(Clone, PartialEq, Eq)]
pub struct EntryName(pub Vec<u8>);

impl fmt::Display for EntryName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = self.0.get(..SHOWN_NAME).unwrap_or(&self.0);
        let dots = if shown.len() < self.0.len() {
            "…"
        } else {
            ""
        };
        match std::str::from_utf8(shown) {
            Ok(text) => write!(f, "{text:?}{dots}"),
            Err(_) => write!(f, "\"{}\"{dots}", shown.escape_ascii()),
        }
    }
}

impl fmt::Debug for EntryName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why a stream is not a tar archive that can be read.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    /// The stream could not be read.
    #[error("reading the archive failed at byte {offset}")]
    Read {
        /// Bytes read so far.
        offset: u64,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The stream ends inside a header or a member.
    #[error("the archive is cut short at byte {offset}, in {entry}")]
    Truncated {
        /// Where it ends.
        offset: u64,
        /// The member being read, or a word for the header.
        entry: EntryName,
    },
    /// A header block whose checksum does not fit: not a tar archive, damaged, or a member with a
    /// false size before it.
    #[error("no valid tar header at byte {offset} (after {after})")]
    Header {
        /// Where it stands.
        offset: u64,
        /// The member before it.
        after: EntryName,
    },
    /// A field that cannot be read or is out of its range.
    #[error("{entry}: the {field} in its header is not valid")]
    Field {
        /// The member.
        entry: EntryName,
        /// The field.
        field: &'static str,
    },
    /// A PAX header that does not follow its own syntax.
    #[error("the PAX header at byte {offset} is malformed")]
    Pax {
        /// Where its contents stand.
        offset: u64,
    },
    /// Something that different readers understand differently.
    #[error("{entry}: {what}, which readers of tar understand differently")]
    Ambiguous {
        /// The member.
        entry: EntryName,
        /// The ambiguity.
        what: &'static str,
    },
    /// A type of member that a root filesystem does not have.
    #[error("{entry}: members of type '{}' are not supported", .kind.escape_ascii())]
    Type {
        /// The member.
        entry: EntryName,
        /// The type byte.
        kind: u8,
    },
    /// A sparse map that contradicts itself or the member.
    #[error("{entry}: its map of holes is not valid")]
    Sparse {
        /// The member.
        entry: EntryName,
    },
    /// Something larger than this program accepts.
    #[error("{entry}: {passed}")]
    Limit {
        /// The member.
        entry: EntryName,
        /// The exceeded limit.
        passed: Passed,
    },
}

/// A stream of archive bytes.
pub trait Input: Read {
    /// Passes over `count` bytes. A file may do so without looking whether they exist.
    fn skip(&mut self, count: u64) -> io::Result<()>;
}

/// A file that is skipped in by seeking.
pub struct Seekable<'a>(pub io::BufReader<&'a std::fs::File>);

impl Read for Seekable<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl Input for Seekable<'_> {
    fn skip(&mut self, count: u64) -> io::Result<()> {
        let step = i64::try_from(count).map_err(|_| io::ErrorKind::UnexpectedEof)?;
        if self.0.buffer().len() as u64 >= count {
            self.0.seek_relative(step)
        } else {
            self.0.seek(SeekFrom::Current(step)).map(drop)
        }
    }
}

impl Input for &mut dyn Read {
    fn skip(&mut self, count: u64) -> io::Result<()> {
        let mut left = count;
        let mut sink = vec![0; SKIP_CHUNK.min(usize::try_from(count).unwrap_or(SKIP_CHUNK))];
        while left > 0 {
            let part = sink.len().min(usize::try_from(left).unwrap_or(sink.len()));
            match self.read(&mut sink[..part]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => left -= n as u64,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Type of a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemberKind {
    /// A regular file, sparse or not.
    File,
    /// One more name of an earlier member.
    Hardlink,
    /// A symbolic link.
    Symlink,
    /// A directory.
    Dir,
    /// A named pipe.
    Fifo,
    /// A character device.
    Char(Rdev),
    /// A block device.
    Block(Rdev),
}

/// One member of an archive, its extension headers applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its name as the archive has it.
    pub path: Vec<u8>,
    /// Its type.
    pub kind: MemberKind,
    /// The target of a link, empty for anything else.
    pub link: Vec<u8>,
    /// Length of its contents, holes included; 0 for anything but a file.
    pub size: u64,
    /// Permission bits, `mode & 07777`.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time.
    pub mtime: Mtime,
    /// Extended attributes.
    pub xattrs: Xattrs,
}

impl Member {
    /// Its name for messages.
    pub fn name(&self) -> EntryName {
        EntryName(self.path.clone())
    }
}

/// A stretch of a file that the archive has bytes for; what lies between is zeros.
#[derive(Debug, Clone, Copy)]
struct Segment {
    offset: u64,
    len: u64,
}

/// The contents of the current member.
#[derive(Debug, Default)]
struct Contents {
    path: Vec<u8>,
    size: u64,
    position: u64,
    /// Sorted, without overlaps, within `size`.
    segments: Vec<Segment>,
    current: usize,
    /// Archive bytes of it not read yet, and the padding after them.
    stored: u64,
    padding: u64,
}

/// A tar archive being read from front to back, in memory that does not depend on its size.
pub struct Archive<'l, R> {
    input: R,
    limits: &'l Limits,
    offset: u64,
    contents: Contents,
    /// Bytes that the members so far claim to hold, and the holes among them.
    claimed: u64,
    holes: u64,
    ended: bool,
}

#[derive(Default)]
struct Extensions {
    gnu_name: Option<Vec<u8>>,
    gnu_link: Option<Vec<u8>>,
    pax: Option<Pax>,
}

/// The records of a PAX header that matter here.
#[derive(Default)]
struct Pax {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<Vec<u8>>,
    uid: Option<Vec<u8>>,
    gid: Option<Vec<u8>>,
    mtime: Option<Vec<u8>>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    sparse: PaxSparse,
}

#[derive(Default)]
struct PaxSparse {
    any: bool,
    major: Option<Vec<u8>>,
    minor: Option<Vec<u8>>,
    name: Option<Vec<u8>>,
    size: Option<Vec<u8>>,
    map: Option<Vec<u8>>,
    /// Format 0.0: offsets and lengths in the order they came.
    pairs: Vec<Vec<u8>>,
}

impl<'l, R: Input> Archive<'l, R> {
    /// An archive that starts at the input's first byte.
    pub fn new(input: R, limits: &'l Limits) -> Self {
        Self {
            input,
            limits,
            offset: 0,
            contents: Contents::default(),
            claimed: 0,
            holes: 0,
            ended: false,
        }
    }

    /// Bytes of the archive read or passed over so far. Before the contents of a member without
    /// holes are read: where they begin.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The next member; what is left of the one before is passed over. `None` at the archive's end
    /// mark or when the stream ends where a header would begin.
    pub fn next_member(&mut self) -> Result<Option<Member>, TarError> {
        let stored = std::mem::take(&mut self.contents.stored);
        let padding = std::mem::take(&mut self.contents.padding);
        self.skip(stored)?;
        match self.skip(padding) {
            // The important part of the last member is there.
            Err(TarError::Truncated { .. }) => {
                self.ended = true;
                return Ok(None);
            }
            other => other?,
        }
        let mut extensions = Extensions::default();
        let mut extended = false;
        loop {
            let at = self.offset;
            let Some(block) = self.header()? else {
                if extended {
                    return Err(self.truncated(b"an extension header"));
                }
                return Ok(None);
            };
            let header = Header(&block);
            match header.kind() {
                b'L' => {
                    let text = self.extension(&header)?;
                    put_once(&mut extensions.gnu_name, until_nul(&text).to_vec())
                        .map_err(|what| ambiguous(&text, what))?;
                }
                b'K' => {
                    let text = self.extension(&header)?;
                    put_once(&mut extensions.gnu_link, until_nul(&text).to_vec())
                        .map_err(|what| ambiguous(&text, what))?;
                }
                b'x' => {
                    let text = self.extension(&header)?;
                    let pax = Pax::parse(&text).ok_or(TarError::Pax { offset: at })?;
                    put_once(&mut extensions.pax, pax)
                        .map_err(|what| ambiguous(&header.path(), what))?;
                }
                b'g' => {
                    let text = self.extension(&header)?;
                    let pax = Pax::parse(&text).ok_or(TarError::Pax { offset: at })?;
                    if pax.path.is_some()
                        || pax.link.is_some()
                        || pax.size.is_some()
                        || pax.sparse.any
                    {
                        let what = "a global PAX header sets names, sizes or holes";
                        return Err(ambiguous(&header.path(), what));
                    }
                    continue;
                }
                _ => return self.member(&header, extensions).map(Some),
            }
            extended = true;
        }
    }

    /// Reads the contents of the current member, holes as zeros. `Ok(0)` at their end, unless `buf`
    /// is empty.
    pub fn read_contents(&mut self, buf: &mut [u8]) -> Result<usize, TarError> {
        let contents = &mut self.contents;
        let left = contents.size - contents.position;
        let want = buf.len().min(usize::try_from(left).unwrap_or(buf.len()));
        if want == 0 {
            return Ok(0);
        }
        while let Some(segment) = contents.segments.get(contents.current)
            && segment.offset + segment.len <= contents.position
        {
            contents.current += 1;
        }
        let (is_data, end) = match contents.segments.get(contents.current) {
            Some(segment) if segment.offset <= contents.position => {
                (true, segment.offset + segment.len)
            }
            Some(segment) => (false, segment.offset),
            None => (false, contents.size),
        };
        let span = end - contents.position;
        let want = want.min(usize::try_from(span).unwrap_or(want));
        let part = &mut buf[..want];
        let got = if is_data {
            let got = read_some(&mut self.input, part).map_err(|source| TarError::Read {
                offset: self.offset,
                source,
            })?;
            if got == 0 {
                let path = std::mem::take(&mut self.contents.path);
                return Err(self.truncated(&path));
            }
            self.offset += got as u64;
            self.contents.stored -= got as u64;
            got
        } else {
            part.fill(0);
            want
        };
        self.contents.position += got as u64;
        Ok(got)
    }

    /// The contents of the current member as a reader.
    pub fn contents(&mut self) -> impl Read + '_ {
        struct Reader<'r, 'l, R>(&'r mut Archive<'l, R>);
        impl<R: Input> Read for Reader<'_, '_, R> {
            fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
                self.0.read_contents(buf).map_err(io::Error::other)
            }
        }
        Reader(self)
    }

    fn truncated(&self, path: &[u8]) -> TarError {
        TarError::Truncated {
            offset: self.offset,
            entry: EntryName(path.to_vec()),
        }
    }

    fn skip(&mut self, count: u64) -> Result<(), TarError> {
        self.input.skip(count).map_err(|source| {
            if source.kind() == io::ErrorKind::UnexpectedEof {
                self.truncated(&self.contents.path)
            } else {
                TarError::Read {
                    offset: self.offset,
                    source,
                }
            }
        })?;
        self.offset = self.offset.saturating_add(count);
        Ok(())
    }

    /// Reads one block; `false` where the stream ends before its first byte.
    fn block(&mut self, block: &mut [u8; BLOCK]) -> Result<bool, TarError> {
        let mut filled = 0;
        while filled < BLOCK {
            let got = read_some(&mut self.input, &mut block[filled..]).map_err(|source| {
                TarError::Read {
                    offset: self.offset,
                    source,
                }
            })?;
            if got == 0 {
                if filled == 0 {
                    return Ok(false);
                }
                return Err(self.truncated(b"a header"));
            }
            self.offset += got as u64;
            filled += got;
        }
        Ok(true)
    }

    fn header(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let mut block = [0; BLOCK];
        if self.ended || !self.block(&mut block)? {
            self.ended = true;
            return Ok(None);
        }
        if block.iter().all(|&byte| byte == 0) {
            self.ended = true;
            return Ok(None);
        }
        if !Header(&block).checksum_holds() {
            return Err(TarError::Header {
                offset: self.offset - BLOCK as u64,
                after: EntryName(self.contents.path.clone()),
            });
        }
        Ok(Some(block))
    }

    /// The contents of an extension header, whose size is its own header's.
    fn extension(&mut self, header: &Header<'_>) -> Result<Vec<u8>, TarError> {
        let entry = || EntryName(header.path());
        let size = header.size().ok_or_else(|| TarError::Field {
            entry: entry(),
            field: "size",
        })?;
        if size > self.limits.extension {
            return Err(TarError::Limit {
                entry: entry(),
                passed: self.limits.passed(
                    Limit::Extension,
                    "the size of a PAX or GNU extension header",
                ),
            });
        }
        let mut text = vec![0; size as usize];
        self.fill(&mut text)?;
        self.skip(padding(size))?;
        Ok(text)
    }

    fn fill(&mut self, buf: &mut [u8]) -> Result<(), TarError> {
        let mut filled = 0;
        while filled < buf.len() {
            let got = read_some(&mut self.input, &mut buf[filled..]).map_err(|source| {
                TarError::Read {
                    offset: self.offset,
                    source,
                }
            })?;
            if got == 0 {
                return Err(self.truncated(b"an extension header"));
            }
            self.offset += got as u64;
            filled += got;
        }
        Ok(())
    }

    fn member(&mut self, header: &Header<'_>, extensions: Extensions) -> Result<Member, TarError> {
        let pax = extensions.pax.unwrap_or_default();
        let path = agree(extensions.gnu_name, pax.path)
            .map_err(|path| ambiguous(&path, "its GNU and PAX names differ"))?
            .unwrap_or_else(|| header.path());
        let link = agree(extensions.gnu_link, pax.link)
            .map_err(|_| ambiguous(&path, "its GNU and PAX link targets differ"))?
            .unwrap_or_else(|| until_nul(header.bytes(157, 100)).to_vec());
        let path = pax.sparse.name.clone().unwrap_or(path);
        let entry = || EntryName(path.clone());
        let field = |field| TarError::Field {
            entry: entry(),
            field,
        };
        for (bytes, what) in [
            (&path, "the length of its name"),
            (&link, "the length of its link target"),
        ] {
            if bytes.len() > self.limits.path {
                return Err(TarError::Limit {
                    entry: entry(),
                    passed: self.limits.passed(Limit::Path, what),
                });
            }
        }
        if path.contains(&0) {
            return Err(field("name"));
        }
        if link.contains(&0) {
            return Err(field("link target"));
        }

        let kind = header.member_kind(&path)?;
        let stored = match (&kind, &pax.size) {
            (MemberKind::File, Some(text)) => decimal(text).ok_or_else(|| field("size"))?,
            (MemberKind::File, None) => header.size().ok_or_else(|| field("size"))?,
            _ => 0,
        };
        let owner = |record: &Option<Vec<u8>>, at, name| {
            match record {
                Some(text) => decimal(text),
                None => header.number(at, 8).and_then(|n| u64::try_from(n).ok()),
            }
            .and_then(|id| u32::try_from(id).ok())
            // All ones is no owner: chown(2) takes it for "leave as it is".
            .filter(|&id| id != u32::MAX)
            .ok_or_else(|| field(name))
        };
        let mode = header.number(100, 8).ok_or_else(|| field("mode"))?;
        let uid = owner(&pax.uid, 108, "uid")?;
        let gid = owner(&pax.gid, 116, "gid")?;
        let mtime = match &pax.mtime {
            Some(text) => pax_time(text),
            None => header.number(136, 12).map(|sec| Mtime { sec, nsec: 0 }),
        }
        .ok_or_else(|| field("mtime"))?;
        let xattrs = xattrs(&path, pax.xattrs)?;

        self.claim(&path, stored)?;

        self.contents = Contents {
            path: path.clone(),
            stored,
            padding: padding(stored),
            ..Contents::default()
        };
        match (header.kind(), pax.sparse.any) {
            (b'S', true) => {
                return Err(ambiguous(&path, "it has a GNU and a PAX map of holes"));
            }
            (b'S', false) => self.gnu_sparse(header)?,
            (_, true) if kind == MemberKind::File => self.pax_sparse(&pax.sparse)?,
            (_, true) => return Err(self.sparse_error()),
            (_, false) => {
                let whole = Segment {
                    offset: 0,
                    len: stored,
                };
                self.contents.segments = vec![whole];
                self.contents.size = stored;
            }
        }
        Ok(Member {
            path,
            kind,
            link,
            size: self.contents.size,
            mode: (mode & 0o7777) as u16,
            uid,
            gid,
            mtime,
            xattrs,
        })
    }

    fn claim(&mut self, path: &[u8], bytes: u64) -> Result<(), TarError> {
        self.claimed = self.claimed.saturating_add(bytes);
        if self.claimed > self.limits.bytes {
            return Err(TarError::Limit {
                entry: EntryName(path.to_vec()),
                passed: self
                    .limits
                    .passed(Limit::Bytes, "the sum of the sizes of files, in bytes,"),
            });
        }
        Ok(())
    }

    fn sparse_error(&self) -> TarError {
        TarError::Sparse {
            entry: EntryName(self.contents.path.clone()),
        }
    }

    /// The old GNU format: four segments in the header, 21 in each block that follows.
    fn gnu_sparse(&mut self, header: &Header<'_>) -> Result<(), TarError> {
        let size = header
            .number(483, 12)
            .and_then(|size| u64::try_from(size).ok())
            .ok_or_else(|| self.sparse_error())?;
        let mut segments = Vec::new();
        let mut block = *header.0;
        let (mut at, mut slots, mut more) = (386, 4, block[482]);
        loop {
            for slot in 0..slots {
                let field = Header(&block);
                let pair = at + slot * 24;
                // An empty slot ends the list; GNU tar ends a file that ends in a hole with an
                // empty segment.
                if field.bytes(pair, 24).iter().all(|&byte| byte == 0) {
                    break;
                }
                let number = |at| {
                    let number = field.number(at, 12)?;
                    u64::try_from(number).ok()
                };
                let (Some(offset), Some(len)) = (number(pair), number(pair + 12)) else {
                    return Err(self.sparse_error());
                };
                self.push_segment(&mut segments, offset, len)?;
            }
            if more == 0 {
                break;
            }
            if !self.block(&mut block)? {
                return Err(self.truncated(&self.contents.path));
            }
            (at, slots, more) = (0, 21, block[504]);
        }
        self.set_sparse(size, segments)
    }

    /// The PAX formats 0.0, 0.1 and 1.0.
    fn pax_sparse(&mut self, sparse: &PaxSparse) -> Result<(), TarError> {
        let size = sparse.size.as_deref().and_then(decimal);
        let size = size.ok_or_else(|| self.sparse_error())?;
        let version = (sparse.major.as_deref(), sparse.minor.as_deref());
        let mut numbers = Vec::new();
        match version {
            (Some(b"1"), Some(b"0")) => numbers = self.map_in_contents()?,
            (None, None) | (Some(b"0"), Some(b"0" | b"1")) => {
                let texts = match &sparse.map {
                    Some(map) => map.split(|&byte| byte == b',').collect::<Vec<_>>(),
                    None => sparse.pairs.iter().map(Vec::as_slice).collect(),
                };
                for text in texts {
                    numbers.push(decimal(text).ok_or_else(|| self.sparse_error())?);
                }
            }
            _ => return Err(self.sparse_error()),
        }
        if !numbers.len().is_multiple_of(2) {
            return Err(self.sparse_error());
        }
        let mut segments = Vec::new();
        for pair in numbers.chunks_exact(2) {
            self.push_segment(&mut segments, pair[0], pair[1])?;
        }
        self.set_sparse(size, segments)
    }

    /// Format 1.0 keeps its map before the data: decimal numbers, a line each, padded to whole
    /// blocks.
    fn map_in_contents(&mut self) -> Result<Vec<u64>, TarError> {
        let mut numbers = Vec::new();
        let mut expected = None;
        let mut line = Vec::new();
        let mut block = [0; BLOCK];
        while expected.is_none_or(|count| numbers.len() < count) {
            let fits = self.contents.stored >= BLOCK as u64;
            if !fits || !self.block(&mut block)? {
                return Err(self.sparse_error());
            }
            self.contents.stored -= BLOCK as u64;
            for &byte in &block {
                if byte != b'\n' {
                    line.push(byte);
                    if line.len() > 20 {
                        return Err(self.sparse_error());
                    }
                    continue;
                }
                let number = decimal(&line).ok_or_else(|| self.sparse_error())?;
                line.clear();
                match expected {
                    None => {
                        let count = usize::try_from(number).unwrap_or(usize::MAX);
                        if count > self.limits.segments {
                            return Err(self.too_many_segments());
                        }
                        expected = Some(count * 2);
                    }
                    Some(_) => numbers.push(number),
                }
                if expected == Some(numbers.len()) {
                    break;
                }
            }
        }
        Ok(numbers)
    }

    fn too_many_segments(&self) -> TarError {
        TarError::Limit {
            entry: EntryName(self.contents.path.clone()),
            passed: self
                .limits
                .passed(Limit::Segments, "the number of its segments between holes"),
        }
    }

    fn push_segment(
        &self,
        segments: &mut Vec<Segment>,
        offset: u64,
        len: u64,
    ) -> Result<(), TarError> {
        if segments.len() >= self.limits.segments {
            return Err(self.too_many_segments());
        }
        let begins_after = segments.last().map_or(0, |last| last.offset + last.len);
        if offset < begins_after || offset.checked_add(len).is_none() {
            return Err(self.sparse_error());
        }
        segments.push(Segment { offset, len });
        Ok(())
    }

    fn set_sparse(&mut self, size: u64, segments: Vec<Segment>) -> Result<(), TarError> {
        let data: u64 = segments.iter().map(|segment| segment.len).sum();
        let end = segments.last().map_or(0, |last| last.offset + last.len);
        if end > size || data != self.contents.stored {
            return Err(self.sparse_error());
        }
        self.holes = self.holes.saturating_add(size - data);
        if self.holes > self.limits.holes {
            return Err(TarError::Limit {
                entry: EntryName(self.contents.path.clone()),
                passed: self.limits.passed(
                    Limit::Holes,
                    "the sum of the holes in sparse files, in bytes,",
                ),
            });
        }
        self.contents.size = size;
        self.contents.segments = segments;
        Ok(())
    }
}

fn xattrs(path: &[u8], records: Vec<(Vec<u8>, Vec<u8>)>) -> Result<Xattrs, TarError> {
    let limit = |what, limit| TarError::Limit {
        entry: EntryName(path.to_vec()),
        passed: Passed::fixed(what, limit),
    };
    let mut xattrs = Xattrs::new();
    for (name, value) in records {
        if name.len() > MAX_XATTR_NAME {
            return Err(limit("the name of an xattr", MAX_XATTR_NAME as u64));
        }
        if value.len() > MAX_XATTR_VALUE {
            return Err(limit("the value of an xattr", MAX_XATTR_VALUE as u64));
        }
        if name.contains(&0) {
            return Err(TarError::Field {
                entry: EntryName(path.to_vec()),
                field: "name of an xattr",
            });
        }
        // No kernel takes a name outside of these namespaces, so no extractor could have set it.
        let settable = [&b"user."[..], b"security.", b"trusted.", b"system."]
            .iter()
            .any(|space| name.starts_with(space) && name.len() > space.len());
        if settable {
            xattrs.insert(name.into(), value.into());
        }
    }
    if xattrs.len() > MAX_XATTRS {
        return Err(limit("the number of its xattrs", MAX_XATTRS as u64));
    }
    Ok(xattrs)
}

fn read_some(input: &mut impl Read, buf: &mut [u8]) -> io::Result<usize> {
    loop {
        match input.read(buf) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

fn padding(size: u64) -> u64 {
    size.wrapping_neg() % BLOCK as u64
}

fn ambiguous(entry: &[u8], what: &'static str) -> TarError {
    TarError::Ambiguous {
        entry: EntryName(entry.to_vec()),
        what,
    }
}

fn put_once<T>(slot: &mut Option<T>, value: T) -> Result<(), &'static str> {
    if slot.replace(value).is_some() {
        return Err("two extension headers of one kind describe one member");
    }
    Ok(())
}

/// The common value of two extensions, unless they contradict each other.
fn agree(gnu: Option<Vec<u8>>, pax: Option<Vec<u8>>) -> Result<Option<Vec<u8>>, Vec<u8>> {
    match (gnu, pax) {
        (Some(gnu), Some(pax)) if gnu != pax => Err(gnu),
        (gnu, pax) => Ok(gnu.or(pax)),
    }
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|&byte| byte == 0).next().unwrap_or_default()
}

/// An unsigned decimal number, digits only.
fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Seconds with an optional sign and fraction; digits after the ninth are dropped.
fn pax_time(text: &[u8]) -> Option<Mtime> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let mut parts = text.splitn(2, |&byte| byte == b'.');
    let sec = i64::try_from(decimal(parts.next()?)?).ok()?;
    let mut nsec = 0;
    if let Some(fraction) = parts.next() {
        if !fraction.iter().all(u8::is_ascii_digit) {
            return None;
        }
        for place in 0..9 {
            let digit = fraction.get(place).map_or(0, |digit| digit - b'0');
            nsec = nsec * 10 + u32::from(digit);
        }
    }
    Some(match (negative, nsec) {
        (false, nsec) => Mtime { sec, nsec },
        (true, 0) => Mtime { sec: -sec, nsec },
        (true, nsec) => Mtime {
            sec: -sec - 1,
            nsec: 1_000_000_000 - nsec,
        },
    })
}

impl Pax {
    /// Parses `LENGTH KEY=VALUE\n` records. As POSIX says, a later record for a key wins, and an
    /// empty value leaves what the member's own header says.
    fn parse(mut text: &[u8]) -> Option<Self> {
        let mut pax = Self::default();
        while !text.is_empty() {
            let space = text.iter().take(12).position(|&byte| byte == b' ')?;
            let length = usize::try_from(decimal(&text[..space])?).ok()?;
            let record = text.get(space + 1..length)?.strip_suffix(b"\n")?;
            text = text.get(length..)?;
            let equals = record.iter().position(|&byte| byte == b'=')?;
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            pax.set(key, value)?;
        }
        Some(pax)
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            self.xattrs.push((name.to_vec(), value.to_vec()));
            return Some(());
        }
        let sparse = key.strip_prefix(b"GNU.sparse.");
        self.sparse.any |= sparse.is_some();
        let slot = match (key, sparse) {
            (_, Some(b"major")) => &mut self.sparse.major,
            (_, Some(b"minor")) => &mut self.sparse.minor,
            (_, Some(b"name")) => &mut self.sparse.name,
            (_, Some(b"size" | b"realsize")) => &mut self.sparse.size,
            (_, Some(b"map")) => &mut self.sparse.map,
            (_, Some(b"offset" | b"numbytes")) => {
                let offset_next = self.sparse.pairs.len().is_multiple_of(2);
                if offset_next != (sparse == Some(b"offset")) {
                    return None;
                }
                self.sparse.pairs.push(value.to_vec());
                return Some(());
            }
            (b"path", _) => &mut self.path,
            (b"linkpath", _) => &mut self.link,
            (b"size", _) => &mut self.size,
            (b"uid", _) => &mut self.uid,
            (b"gid", _) => &mut self.gid,
            (b"mtime", _) => &mut self.mtime,
            _ => return Some(()),
        };
        *slot = (!value.is_empty()).then(|| value.to_vec());
        Some(())
    }
}

/// A header block.
struct Header<'b>(&'b [u8; BLOCK]);

impl Header<'_> {
    fn bytes(&self, at: usize, len: usize) -> &[u8] {
        self.0.get(at..at + len).unwrap_or_default()
    }

    fn kind(&self) -> u8 {
        self.0[156]
    }

    fn member_kind(&self, path: &[u8]) -> Result<MemberKind, TarError> {
        let rdev = || {
            let number = |at| {
                self.number(at, 8)
                    .and_then(|number| u32::try_from(number).ok())
                    .ok_or_else(|| TarError::Field {
                        entry: EntryName(path.to_vec()),
                        field: "device number",
                    })
            };
            Ok(Rdev {
                major: number(329)?,
                minor: number(337)?,
            })
        };
        Ok(match self.kind() {
            // V7 had no type for directories.
            0 if path.ends_with(b"/") => MemberKind::Dir,
            0 | b'0' | b'7' | b'S' => MemberKind::File,
            b'1' => MemberKind::Hardlink,
            b'2' => MemberKind::Symlink,
            b'3' => MemberKind::Char(rdev()?),
            b'4' => MemberKind::Block(rdev()?),
            b'5' => MemberKind::Dir,
            b'6' => MemberKind::Fifo,
            kind => {
                return Err(TarError::Type {
                    entry: EntryName(path.to_vec()),
                    kind,
                });
            }
        })
    }

    /// Some old writers summed signed bytes.
    fn checksum_holds(&self) -> bool {
        let Some(stored) = self.number(148, 8) else {
            return false;
        };
        let (mut unsigned, mut signed) = (0_i64, 0_i64);
        for (at, &byte) in self.0.iter().enumerate() {
            let byte = if (148..156).contains(&at) { b' ' } else { byte };
            unsigned += i64::from(byte);
            signed += i64::from(byte as i8);
        }
        stored == unsigned || stored == signed
    }

    fn path(&self) -> Vec<u8> {
        let name = until_nul(self.bytes(0, 100));
        let prefix = match (self.bytes(257, 6), self.bytes(508, 4)) {
            (b"ustar\0", b"tar\0") => until_nul(self.bytes(345, 131)),
            (b"ustar\0", _) => until_nul(self.bytes(345, 155)),
            _ => b"",
        };
        if prefix.is_empty() {
            return name.to_vec();
        }
        [prefix, b"/", name].concat()
    }

    fn size(&self) -> Option<u64> {
        u64::try_from(self.number(124, 12)?).ok()
    }

    /// A number as octal text, or as big-endian two's complement where the first bit is set.
    fn number(&self, at: usize, len: usize) -> Option<i64> {
        let field = self.bytes(at, len);
        let first = *field.first()?;
        if first & 0x80 != 0 {
            let negative = first & 0x40 != 0;
            let mut value = if negative { -1_i128 } else { 0 };
            for (ix, &byte) in field.iter().enumerate() {
                let byte = match (ix, negative) {
                    (0, false) => byte & 0x7f,
                    _ => byte,
                };
                value = (value << 8) | i128::from(byte);
            }
            return i64::try_from(value).ok();
        }
        let blank = |byte: &u8| *byte == b' ' || *byte == 0;
        let start = field.iter().position(|byte| !blank(byte));
        let digits = until_nul(&field[start.unwrap_or(len)..]).trim_ascii_end();
        if digits.iter().any(|digit| !(b'0'..=b'7').contains(digit)) {
            return None;
        }
        digits.iter().try_fold(0_i64, |value, digit| {
            value.checked_mul(8)?.checked_add(i64::from(digit - b'0'))
        })
    }
}
