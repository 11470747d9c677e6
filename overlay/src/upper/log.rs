//! The upper's log: an append-only file of batches, each applied whole or not at all.
//!
//! ```text
//! header   magic `III-UPPR`, version: u32, 0: u32, boot: 16 bytes, acknowledged: u64,
//!          checksum: 8 bytes
//! frame    length: u32, checksum: 8 bytes, payload
//! ```
//!
//! Numbers are little-endian. The payload is a postcard-encoded list of [`Op`]s. A frame's checksum
//! is the first 8 bytes of the BLAKE3 of the previous frame's checksum (zeroes, for the first
//! frame) and the payload. The header's checksum is that of the header before the checksum. Zeroes
//! may follow the last frame: space that is written ahead, so that a sync of the log need not sync
//! the location of its blocks.
//!
//! # Invariants
//!
//! - A batch is one `write`, so it is in the page cache when the operation returns and survives the
//!   death of the process.
//! - [`Op::Commit`] has an offset: everything before it is durable, and so are the contents that
//!   must not be missing where the log names them (see [`super::commit`]). The commit is appended
//!   once they are durable, and synced with the log before any reply that depends on it.
//! - `acknowledged` is written after that sync, and not synced itself: everything before it has
//!   been durable at some time, and a program may have been told so.
//! - `boot` is the host's boot id ([`super::disk::Disk::boot`]) of the process that has the log
//!   open.
//! - The name of the log leads to a whole log: a new log is written under another name, synced, and
//!   renamed.
//!
//! # Reading
//!
//! Frames are read up to the end of the file, zeroes, or a frame that is cut short or does not
//! match its checksum.
//!
//! - If reading ends before `acknowledged`, or a frame with the right checksum cannot be decoded,
//!   or the header does not match its checksum, the log is *damaged*. It is not opened, and nothing
//!   is removed or changed.
//! - If the host has been running since the log was last opened, all frames hold. The rest is cut
//!   off: it is half of a batch that a dying process was writing.
//! - If the host was started since, everything before the last commit, or before `acknowledged`,
//!   holds. The rest is cut off: the power may have been cut, and then frames may have survived
//!   without the contents that they name.
//!
//! The assumption about media: after a power cut, synced bytes are there, and so is a prefix or any
//! other part of the bytes written since, but no other bytes than these and zeroes; 48 bytes at the
//! start of a file change at once. A header that rots together with a power cut cannot be told from
//! other damage.
//!
//! # Space
//!
//! Space is allocated ahead of the end, and the last part of it is kept for batches that remove
//! something. In addition to the log, [`Reserve`] holds as much space as a rewritten log would
//! take. So on a full disk the log can always be rewritten, and removals keep working.
//!
//! # Versions
//!
//! Versions 1 to 3 had a header of 16 bytes, frames whose checksum was the payload's alone, and
//! neither [`Op::Update`] nor [`Op::Commit`]; version 2 had no [`Op::Thawed`], version 1 no
//! [`Op::Applied`] either. They are read up to the first frame that does not match, and become logs
//! of this version.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::disk::{Access, Boot, Disk};
use super::record::Op;
use super::state::State;
use super::{UpperError, io_error};
use crate::posix::{Errno, errno};

/// Version of the format described above and of its records.
pub const VERSION: u32 = 4;
/// Most bytes of a payload. Three inodes with all their possible xattrs fit many times over.
pub const MAX_PAYLOAD: usize = 64 << 20;

/// Bytes of space that are allocated ahead.
const AHEAD: u64 = 1 << 20;
/// Bytes of that space that only batches that remove something may use.
const SPARE: u64 = 256 << 10;
/// Bytes of that space that only commits may use.
const COMMITS: u64 = 4 << 10;
/// Bytes that are allocated ahead for batches that remove something, on a disk with no more space.
const NEARLY_FULL: u64 = 16 << 10;
/// Bytes by which a reserve grows.
const RESERVE_STEP: u64 = 256 << 10;

const MAGIC: &[u8; 8] = b"III-UPPR";
/// Bytes of the header.
pub const HEADER: u64 = 48;
/// Bytes of the headers of versions 1 to 3.
const OLD_HEADER: u64 = 16;
const FRAME: usize = 12;
/// Bytes of the log that are read at once.
const READ: usize = 1 << 20;
/// Name of the log in the upper's directory.
pub const NAME: &str = "log";
/// Name of the log that will replace it.
pub const NEW_NAME: &str = "log.new";
/// Name of the [`Reserve`].
pub const RESERVE_NAME: &str = "log.reserve";

type Checksum = [u8; 8];

fn checksum(before: &[u8], bytes: &[u8]) -> Checksum {
    let mut hasher = blake3::Hasher::new();
    hasher.update(before);
    hasher.update(bytes);
    let mut sum = Checksum::default();
    hasher.finalize_xof().fill(&mut sum);
    sum
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Header {
    version: u32,
    boot: Boot,
    acknowledged: u64,
}

impl Header {
    fn len(&self) -> u64 {
        if self.version < VERSION {
            OLD_HEADER
        } else {
            HEADER
        }
    }

    fn encode(&self) -> [u8; HEADER as usize] {
        let mut bytes = [0; HEADER as usize];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&self.version.to_le_bytes());
        bytes[16..32].copy_from_slice(&self.boot);
        bytes[32..40].copy_from_slice(&self.acknowledged.to_le_bytes());
        let sum = checksum(&[], &bytes[..40]);
        bytes[40..].copy_from_slice(&sum);
        bytes
    }

    /// The header at the start of a log; none if the log is empty or has only zeroes.
    fn read(file: &mut impl Read, path: &Path) -> Result<Option<Self>, UpperError> {
        let fail = io_error("reading", path);
        let mut bytes = Vec::new();
        let read = file.take(HEADER).read_to_end(&mut bytes);
        read.map_err(fail)?;
        if bytes.iter().all(|&byte| byte == 0) {
            return Ok(None);
        }
        let old = |version| Self {
            version,
            boot: Boot::default(),
            acknowledged: 0,
        };
        let not_one = || UpperError::NotAnUpper(path.to_path_buf());
        let (Some(MAGIC), Some(version)) = (bytes.first_chunk(), bytes.get(8..12)) else {
            // Before version 4, a power cut could leave a part of the header.
            return if MAGIC.starts_with(&bytes) {
                Ok(None)
            } else {
                Err(not_one())
            };
        };
        let version = version.first_chunk().map_or(0, |v| u32::from_le_bytes(*v));
        if (1..VERSION).contains(&version) {
            let whole = bytes.len() >= OLD_HEADER as usize;
            return whole.then(|| Some(old(version))).ok_or_else(not_one);
        }
        let whole = || {
            let (head, sum) = bytes.split_at_checked(40)?;
            (checksum(&[], head) == *sum).then_some(())?;
            let acknowledged = u64::from_le_bytes(*head.last_chunk()?);
            let boot = *head.get(16..)?.first_chunk()?;
            Some((boot, acknowledged))
        };
        match (version, whole()) {
            (VERSION, Some((boot, acknowledged))) => Ok(Some(Self {
                version,
                boot,
                acknowledged,
            })),
            (VERSION, None) => Err(UpperError::damaged(path, 0)),
            (version, _) => Err(UpperError::Version {
                path: path.to_path_buf(),
                version,
            }),
        }
    }
}

/// The changes in a payload.
struct Ops<'a> {
    left: u64,
    bytes: &'a [u8],
}

impl<'a> Ops<'a> {
    fn new(payload: &'a [u8]) -> Result<Self, postcard::Error> {
        let (left, bytes) = postcard::take_from_bytes(payload)?;
        Ok(Self { left, bytes })
    }
}

impl Iterator for Ops<'_> {
    type Item = Result<Op, postcard::Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            let all = self.bytes.is_empty();
            return (!all).then_some(Err(postcard::Error::DeserializeBadEncoding));
        }
        self.left -= 1;
        Some(match postcard::take_from_bytes(self.bytes) {
            Ok((op, rest)) => {
                self.bytes = rest;
                Ok(op)
            }
            Err(error) => Err(error),
        })
    }
}

/// The outcome of reading a frame.
enum Next {
    /// The payload is in the buffer.
    Frame,
    /// Only zeroes follow.
    End,
    /// Other bytes follow.
    Torn,
}

/// Reads the frames of a log, one in memory at a time.
struct Frames<R> {
    from: BufReader<R>,
    /// The offset of the next frame.
    at: u64,
    /// The checksum of the last frame; none in versions whose frames are not chained.
    chain: Option<Checksum>,
    payload: Vec<u8>,
}

impl<R: Read> Frames<R> {
    fn next(&mut self) -> io::Result<Next> {
        let mut head = Vec::with_capacity(FRAME);
        (&mut self.from).take(FRAME as u64).read_to_end(&mut head)?;
        if head.iter().all(|&byte| byte == 0) {
            return self.zeroes();
        }
        let Some((len, sum)) = head
            .split_first_chunk::<4>()
            .filter(|_| head.len() == FRAME)
        else {
            return Ok(Next::Torn);
        };
        let len = u32::from_le_bytes(*len) as usize;
        if len > MAX_PAYLOAD {
            return Ok(Next::Torn);
        }
        self.payload.clear();
        let read = (&mut self.from)
            .take(len as u64)
            .read_to_end(&mut self.payload)?;
        let is = match &self.chain {
            Some(before) => checksum(before, &self.payload),
            None => checksum(&[], &self.payload),
        };
        if read != len || is != *sum {
            return Ok(Next::Torn);
        }
        if self.chain.is_some() {
            self.chain = Some(is);
        }
        self.at += (FRAME + len) as u64;
        Ok(Next::Frame)
    }

    fn zeroes(&mut self) -> io::Result<Next> {
        let mut buf = vec![0; FRAME.max(64 << 10)];
        loop {
            match self.from.read(&mut buf)? {
                0 => return Ok(Next::End),
                count if buf[..count].iter().any(|&byte| byte != 0) => return Ok(Next::Torn),
                _ => {}
            }
        }
    }
}

/// The facts about a log that was read. Positions are offsets in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogFacts {
    /// Version of the format.
    pub version: u32,
    /// The end of the whole frames.
    pub end: u64,
    /// Whether bytes other than zeroes follow the whole frames.
    pub torn: bool,
    /// The end of the part that holds; opening the upper cuts off the rest.
    pub holds: u64,
    /// The end of the part that is known to be durable.
    pub durable: u64,
    /// The length of the file.
    pub len: u64,
    /// Whether the host was started since the log was last opened, or may have been.
    pub rebooted: bool,
    /// Number of batches that hold.
    pub batches: u64,
    chain: Checksum,
}

/// Reads a log and passes each change that holds to `each`, with the facts so far and the offset of
/// the batch. Changes nothing. None if the log is empty or has only zeroes.
pub fn read(
    file: &File,
    path: &Path,
    boot: Option<Boot>,
    each: &mut dyn FnMut(&LogFacts, u64, Op) -> Result<(), UpperError>,
) -> Result<Option<LogFacts>, UpperError> {
    let fail = |source| io_error("reading", path)(source);
    let len = file.metadata().map_err(fail)?.len();
    let mut from = file;
    from.rewind().map_err(fail)?;
    let Some(header) = Header::read(&mut from, path)? else {
        let mut rest = BufReader::new(from).bytes();
        if rest.any(|byte| byte.is_ok_and(|byte| byte != 0)) {
            return Err(UpperError::damaged(path, 0));
        }
        return Ok(None);
    };
    let old = header.version < VERSION;
    let known = boot.filter(|_| header.boot != Boot::default());
    let rebooted = old || known.is_some_and(|boot| boot != header.boot);
    let mut facts = LogFacts {
        version: header.version,
        end: 0,
        torn: false,
        holds: 0,
        durable: header.acknowledged.max(header.len()),
        len,
        rebooted,
        batches: 0,
        chain: Checksum::default(),
    };
    // After a start of the host, a first pass finds how far the log can be trusted.
    let twice = rebooted && !old;
    let scan = pass(&mut facts, file, path, header, &mut |facts, payload, at| {
        // A commit is the only change of its batch, which is a few bytes long.
        const COMMIT: usize = 16;
        if payload.len() <= COMMIT || !twice {
            for op in Ops::new(payload).map_err(|_| UpperError::damaged(path, at))? {
                match op.map_err(|_| UpperError::damaged(path, at))? {
                    Op::Commit(to) if to <= at => facts.durable = facts.durable.max(to),
                    _ if twice => {}
                    op => each(facts, at, op)?,
                }
            }
        }
        Ok(true)
    });
    scan?;
    if facts.end < header.acknowledged {
        return Err(UpperError::damaged(path, facts.end));
    }
    if old {
        facts.durable = facts.end;
    }
    facts.holds = facts.end;
    if twice {
        facts.holds = facts.durable;
        let holds = facts.holds;
        facts.batches = 0;
        let torn = facts.torn;
        pass(&mut facts, file, path, header, &mut |facts, payload, at| {
            if at >= holds {
                return Ok(false);
            }
            for op in Ops::new(payload).map_err(|_| UpperError::damaged(path, at))? {
                each(facts, at, op.map_err(|_| UpperError::damaged(path, at))?)?;
            }
            Ok(true)
        })?;
        facts.torn = torn;
    }
    Ok(Some(facts))
}

/// Handles a payload at its offset; returns whether to go on.
type EachFrame<'a> = dyn FnMut(&mut LogFacts, &[u8], u64) -> Result<bool, UpperError> + 'a;

/// Visits the frames of a log until `each` returns false, and records in the facts where the visit
/// ended.
fn pass(
    facts: &mut LogFacts,
    file: &File,
    path: &Path,
    header: Header,
    each: &mut EachFrame<'_>,
) -> Result<(), UpperError> {
    let fail = |source| io_error("reading", path)(source);
    let mut from = file;
    from.seek(SeekFrom::Start(header.len())).map_err(fail)?;
    let mut frames = Frames {
        from: BufReader::with_capacity(READ, from),
        at: header.len(),
        chain: (header.version >= VERSION).then(Checksum::default),
        payload: Vec::new(),
    };
    loop {
        facts.end = frames.at;
        facts.chain = frames.chain.unwrap_or_default();
        match frames.next().map_err(fail)? {
            Next::Frame => {}
            Next::End => return Ok(()),
            Next::Torn => {
                facts.torn = true;
                return Ok(());
            }
        }
        let payload = std::mem::take(&mut frames.payload);
        if !each(facts, &payload, facts.end)? {
            return Ok(());
        }
        facts.batches += 1;
        frames.payload = payload;
    }
}

/// The first batch of the log in `dir`, which another process may have open; none if the log or its
/// first whole batch is missing.
pub fn first(dir: &Path, disk: &dyn Disk) -> Result<Option<Vec<Op>>, UpperError> {
    let path = dir.join(NAME);
    let file = match disk.open(&path, Access::Read) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(io_error("opening", &path))?,
    };
    let Some(header) = Header::read(&mut &file, &path)? else {
        return Ok(None);
    };
    let mut facts = None;
    let mut start = LogFacts {
        version: header.version,
        end: 0,
        torn: false,
        holds: 0,
        durable: 0,
        len: 0,
        rebooted: false,
        batches: 0,
        chain: Checksum::default(),
    };
    pass(&mut start, &file, &path, header, &mut |_, payload, at| {
        let ops = Ops::new(payload).and_then(Iterator::collect);
        facts = Some(ops.map_err(|_: postcard::Error| UpperError::damaged(&path, at))?);
        Ok(false)
    })?;
    Ok(facts)
}

fn frame(before: Checksum, ops: &[Op]) -> io::Result<(Vec<u8>, Checksum)> {
    let mut frame = postcard::to_extend(ops, vec![0; FRAME]).map_err(io::Error::other)?;
    let payload = &frame[FRAME..];
    if payload.len() > MAX_PAYLOAD {
        return Err(io::Error::from(io::ErrorKind::FileTooLarge));
    }
    let len = payload.len() as u32;
    let sum = checksum(&before, payload);
    frame[..4].copy_from_slice(&len.to_le_bytes());
    frame[4..FRAME].copy_from_slice(&sum);
    Ok((frame, sum))
}

/// A log that is open for appending.
#[derive(Debug)]
pub struct Log {
    disk: Arc<dyn Disk>,
    file: Arc<File>,
    /// The directory of the log.
    dir: PathBuf,
    boot: Boot,
    len: u64,
    /// The end of the allocated space.
    allocated: u64,
    chain: Checksum,
    acknowledged: u64,
    /// Whether space is written ahead: false if nothing is ever synced.
    ahead: bool,
    broken: bool,
}

impl Log {
    /// The log of `dir` that was read, to be continued where the part that holds ends. Cuts off the
    /// rest.
    pub fn go_on(
        disk: Arc<dyn Disk>,
        dir: &Path,
        facts: &LogFacts,
        volatile: bool,
    ) -> io::Result<Self> {
        let file = disk.open(&dir.join(NAME), Access::Write)?;
        if facts.len != facts.holds {
            disk.set_len(&file, facts.holds)?;
        }
        Ok(Self {
            boot: disk.boot().unwrap_or_default(),
            disk,
            file: Arc::new(file),
            dir: dir.to_path_buf(),
            len: facts.holds,
            allocated: facts.holds,
            chain: facts.chain,
            acknowledged: facts.durable,
            ahead: !volatile,
            broken: false,
        })
    }

    /// Marks the log as one of this start of the host. Call it once everything that another start
    /// made doubtful has been checked, and the corrections are logged.
    pub fn settle(&mut self) -> io::Result<()> {
        self.write_header()
    }

    /// A new log in `dir`, under the name that [`Log::publish`] changes.
    pub fn begin(disk: Arc<dyn Disk>, dir: &Path, volatile: bool) -> io::Result<Self> {
        let file = disk.open(&dir.join(NEW_NAME), Access::Empty)?;
        let mut log = Self {
            boot: disk.boot().unwrap_or_default(),
            disk,
            file: Arc::new(file),
            dir: dir.to_path_buf(),
            len: HEADER,
            allocated: HEADER,
            chain: Checksum::default(),
            acknowledged: 0,
            ahead: !volatile,
            broken: false,
        };
        let written = log.write_header();
        written.inspect_err(|_| log.discard())?;
        Ok(log)
    }

    fn write_header(&mut self) -> io::Result<()> {
        let header = Header {
            version: VERSION,
            boot: self.boot,
            acknowledged: self.acknowledged,
        };
        self.disk.write_at(&self.file, &header.encode(), 0)
    }

    /// Appends a batch: all of it or, on an error, nothing.
    pub fn append(&mut self, ops: &[Op]) -> io::Result<()> {
        if self.broken {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let (frame, sum) = frame(self.chain, ops)?;
        match ops {
            // A commit may use the last of the space.
            [Op::Commit(_)] if self.len + frame.len() as u64 <= self.allocated => {}
            ops => self.allocate(frame.len() as u64, !ops.iter().any(Op::removes))?,
        }
        if let Err(error) = self.disk.write_at(&self.file, &frame, self.len) {
            self.broken = self.disk.set_len(&self.file, self.len).is_err();
            self.allocated = self.len;
            return Err(error);
        }
        self.len += frame.len() as u64;
        self.chain = sum;
        Ok(())
    }

    /// Appends a batch to a log that has no name yet: allocates nothing ahead.
    pub fn fill(&mut self, ops: &[Op]) -> io::Result<()> {
        let (frame, sum) = frame(self.chain, ops)?;
        self.disk.write_at(&self.file, &frame, self.len)?;
        self.len += frame.len() as u64;
        self.allocated = self.len;
        self.chain = sum;
        Ok(())
    }

    /// Appends the record that everything before the offset `to` is durable. That becomes true with
    /// the next sync of the log.
    pub fn commit(&mut self, to: u64) -> io::Result<()> {
        self.append(&[Op::Commit(to)])
    }

    /// Notes in the header that everything before `to` is durable.
    pub fn acknowledge(&mut self, to: u64) {
        if to > self.acknowledged {
            self.acknowledged = to;
            // A failure is harmless: the commit in the log says the same, unless it rots.
            let _ = self.write_header();
        }
    }

    /// Allocates room for `len` more bytes and, with `spare`, for later batches that remove
    /// something.
    fn allocate(&mut self, len: u64, spare: bool) -> io::Result<()> {
        let end = self.len + len;
        let keep = if spare { SPARE } else { COMMITS };
        if end + keep <= self.allocated {
            return Ok(());
        }
        let from = self.allocated.max(self.len);
        let mut full = None;
        for ahead in [AHEAD, SPARE, NEARLY_FULL] {
            let to = end.max(from) + ahead.max(keep);
            match self.disk.allocate(&self.file, from, to - from) {
                Ok(()) => {
                    self.allocated = to;
                    if self.ahead {
                        // A sync then has no new blocks to record, which halves its cost. A failure
                        // is harmless.
                        let zeroes = vec![0; (to - from) as usize];
                        let _ = self.disk.write_at(&self.file, &zeroes, from);
                    }
                    return Ok(());
                }
                Err(error) if is_full(&error) => full = Some(error),
                // This filesystem cannot promise space.
                Err(_) => {
                    self.allocated = u64::MAX;
                    return Ok(());
                }
            }
        }
        full.map_or(Ok(()), Err)
    }

    /// Allocates room for batches that remove something.
    pub fn make_room(&mut self) -> io::Result<()> {
        self.allocate(0, true)
    }

    /// Refuses all further appends: a sync failed, so the bytes on disk are unknown.
    pub fn break_off(&mut self) {
        self.broken = true;
    }

    /// The file, for a sync that does not hold up appends.
    pub fn file(&self) -> Arc<File> {
        Arc::clone(&self.file)
    }

    /// Length in bytes.
    pub fn size(&self) -> u64 {
        self.len
    }

    /// Whether the whole log is known to be durable.
    pub fn is_durable(&self) -> bool {
        self.acknowledged >= self.len
    }

    /// Frees the space that was allocated ahead.
    pub fn trim(&mut self) {
        if self.allocated != self.len && !self.broken {
            let _ = self.disk.set_len(&self.file, self.len);
            self.allocated = self.len;
        }
    }

    /// Gives a new log its name. To survive a power cut, the log has to be synced before, and its
    /// directory after. On an error the name is unchanged.
    pub fn publish(&self) -> io::Result<()> {
        let (from, to) = (self.dir.join(NEW_NAME), self.dir.join(NAME));
        self.disk.rename(&from, &to)
    }

    /// Removes a new log that has no name yet.
    pub fn discard(&self) {
        let _ = self.disk.remove(&self.dir.join(NEW_NAME));
    }
}

/// Whether a write failed for lack of space.
pub fn is_full(error: &io::Error) -> bool {
    matches!(errno(error), Errno::NOSPC | Errno::DQUOT)
}

/// Space that is kept for rewriting the log on a full disk.
#[derive(Debug)]
pub struct Reserve {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    file: Option<File>,
    size: u64,
}

impl Reserve {
    /// The reserve of the upper in `dir`; it holds nothing yet.
    pub fn new(disk: Arc<dyn Disk>, dir: &Path) -> Self {
        Self {
            disk,
            path: dir.join(RESERVE_NAME),
            file: None,
            size: 0,
        }
    }

    /// Makes the reserve hold space for a log of `len` bytes and for later batches that remove
    /// something.
    pub fn hold(&mut self, len: u64) -> io::Result<()> {
        let wanted = len + HEADER + 2 * SPARE;
        if wanted <= self.size {
            return Ok(());
        }
        let file = match self.file.take() {
            Some(file) => file,
            None => self.disk.open(&self.path, Access::Make)?,
        };
        let file = self.file.insert(file);
        let size = wanted.next_multiple_of(RESERVE_STEP);
        match self.disk.allocate(file, 0, size) {
            Ok(()) => self.size = size,
            Err(error) if is_full(&error) => return Err(error),
            // This filesystem cannot promise space: hold nothing, and do not ask again.
            Err(_) => self.size = u64::MAX,
        }
        Ok(())
    }

    /// Frees the space for the next write.
    pub fn release(&mut self) {
        self.file = None;
        self.size = 0;
        let _ = self.disk.remove(&self.path);
    }
}

/// A log of exactly this state, under the name that [`Log::publish`] changes; durable, unless
/// `volatile`. After an error no file is left.
pub fn write_whole(
    disk: &Arc<dyn Disk>,
    dir: &Path,
    state: &State,
    volatile: bool,
) -> io::Result<Log> {
    let mut log = Log::begin(Arc::clone(disk), dir, volatile)?;
    let mut write = || {
        for batch in state.snapshot() {
            log.fill(&batch)?;
        }
        let to = log.size();
        log.fill(&[Op::Commit(to)])?;
        if volatile {
            return Ok(());
        }
        log.acknowledge(to);
        disk.sync(&log.file, true)
    };
    write().inspect_err(|_| log.discard())?;
    Ok(log)
}

#[cfg(test)]
mod tests {
    use super::super::disk::HostDisk;
    use super::super::record::{Body, Chain, Data, Device, Record, Update};
    use super::*;
    use crate::posix::Time;

    fn sample() -> Vec<Vec<Op>> {
        let time = |sec| Time { sec, nsec: 5 };
        let record = |body, origin: Option<&[u8]>| Record {
            mode: 0o644,
            uid: 1000,
            gid: 100,
            nlink: 1,
            atime: time(-1),
            mtime: time(1),
            ctime: time(2),
            btime: time(3),
            xattrs: [((*b"user.a").into(), (*b"1").into())]
                .into_iter()
                .collect(),
            origin: origin.map(Into::into),
            body,
        };
        let inode = |number, body, origin| Op::Inode(number, Box::new(record(body, origin)));
        let file = |data| Body::File { data, size: 7 };
        let device = Device { major: 1, minor: 3 };
        vec![
            vec![Op::Chain(Chain {
                layers: vec![[0xab; 32]],
                project: Some(0),
            })],
            vec![
                inode(1, Body::Dir, Some(b"")),
                inode(2, file(Data::Empty), None),
                inode(3, file(Data::Lower([0xcd; 32])), Some(b"etc/x")),
                inode(
                    4,
                    file(Data::Flat {
                        number: 300,
                        dirty: true,
                    }),
                    None,
                ),
                inode(5, Body::Symlink((*b"to").into()), None),
                inode(6, Body::Fifo, None),
                inode(7, Body::Socket, None),
                inode(8, Body::Char(device), None),
                inode(9, Body::Block(device), None),
                Op::Entry(1, (*b"f\xff").into(), Some(2)),
                Op::Entry(1, (*b"gone").into(), None),
            ],
            vec![Op::Forget(2), Op::Clear(1, (*b"f\xff").into())],
        ]
    }

    fn update(file: Option<(Data, u64)>) -> Op {
        let time = |sec| Time { sec, nsec: 5 };
        let update = Update {
            mode: 0o644,
            uid: 1000,
            gid: 100,
            nlink: 1,
            atime: time(-1),
            mtime: time(1),
            ctime: time(2),
            file,
        };
        Op::Update(4, Box::new(update))
    }

    const BOOT: Boot = [1; 16];

    fn header(acknowledged: u64) -> Vec<u8> {
        let header = Header {
            version: VERSION,
            boot: BOOT,
            acknowledged,
        };
        header.encode().to_vec()
    }

    fn frames(batches: &[Vec<Op>]) -> Vec<u8> {
        let mut chain = Checksum::default();
        let mut bytes = Vec::new();
        for ops in batches {
            let (frame, sum) = frame(chain, ops).unwrap();
            bytes.extend(frame);
            chain = sum;
        }
        bytes
    }

    /// The changes and facts of a log of these bytes.
    fn read_back(
        bytes: &[u8],
        boot: Option<Boot>,
    ) -> Result<Option<(LogFacts, Vec<Op>)>, UpperError> {
        let path = Path::new(NAME);
        let mut file = tempfile::tempfile().unwrap();
        io::Write::write_all(&mut file, bytes).unwrap();
        let mut ops = Vec::new();
        let facts = read(&file, path, boot, &mut |_, _, op| {
            ops.push(op);
            Ok(())
        })?;
        Ok(facts.map(|facts| (facts, ops)))
    }

    fn holds(bytes: &[u8], boot: Option<Boot>) -> (u64, Vec<Op>) {
        let (facts, ops) = read_back(bytes, boot).unwrap().unwrap();
        (facts.holds, ops)
    }

    /// The offset of the reported damage.
    fn damage(bytes: &[u8]) -> u64 {
        match read_back(bytes, Some(BOOT)) {
            Err(UpperError::Damaged { offset, .. }) => offset,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_no_log_is_refused_whatever_its_length() {
        for foreign in [
            &b"x"[..],
            b"III-UPPS",
            b"III-UPPR\x01\x00\x00\x00x",
            b"0123456789abcdef",
        ] {
            let read = read_back(foreign, None);
            assert!(
                matches!(read, Err(UpperError::NotAnUpper(_))),
                "{foreign:?}"
            );
        }
        let newer = [&b"III-UPPR\x05\0\0\0"[..], &[0; 36]].concat();
        assert!(matches!(
            read_back(&newer, None),
            Err(UpperError::Version { version: 5, .. })
        ));
    }

    /// Pins the format: these values must never change.
    #[test]
    fn golden() {
        let bytes = frames(&sample());
        assert_eq!(bytes.len(), 404);
        assert_eq!(
            blake3::hash(&bytes).to_hex().as_str(),
            "6b6b16d6937b1381db3d7d41929692bded2b5b494c828ce437fba0f5e18e087a"
        );
        let payload = |ops: &[Op]| frame(Checksum::default(), ops).unwrap().0[FRAME..].to_vec();
        let applied = payload(&[Op::Applied(vec![[7; 32], [8; 32]])]);
        assert_eq!(applied, [&b"\x01\x05\x02"[..], &[7; 32], &[8; 32]].concat());
        let thawed = payload(&[Op::Thawed([9; 32])]);
        assert_eq!(thawed, [&b"\x01\x06"[..], &[9; 32]].concat());
        let times = b"\x01\x05\x02\x05\x04\x05";
        let owner = b"\xa4\x03\xe8\x07\x64\x01";
        let plain = [&b"\x01\x07\x04"[..], owner, times, b"\0"].concat();
        assert_eq!(payload(&[update(None)]), plain);
        let flat = Data::Flat {
            number: 300,
            dirty: true,
        };
        let file = [
            &b"\x01\x07\x04"[..],
            owner,
            times,
            b"\x01\x02\xac\x02\x01\x07",
        ]
        .concat();
        assert_eq!(payload(&[update(Some((flat, 7)))]), file);
        assert_eq!(payload(&[Op::Commit(300)]), b"\x01\x08\xac\x02");
        let header = [
            &b"III-UPPR\x04\0\0\0\0\0\0\0"[..],
            &BOOT,
            &300_u64.to_le_bytes(),
        ]
        .concat();
        let sum = blake3::hash(&header);
        assert_eq!(self::header(300), [&header, &sum.as_bytes()[..8]].concat());
    }

    #[test]
    fn logs_of_earlier_versions_are_read() {
        let payload = postcard::to_allocvec(&sample()[2]).unwrap();
        let sum = blake3::hash(&payload);
        let len = (payload.len() as u32).to_le_bytes();
        let frame = [&len[..], &sum.as_bytes()[..8], &payload].concat();
        for version in 1..VERSION {
            let head = [&b"III-UPPR"[..], &version.to_le_bytes(), &[0; 4]].concat();
            let bytes = [&head[..], &frame, &frame[..frame.len() - 1]].concat();
            let (facts, ops) = read_back(&bytes, Some(BOOT)).unwrap().unwrap();
            assert_eq!((facts.version, ops), (version, sample()[2].clone()));
            let end = OLD_HEADER + frame.len() as u64;
            assert_eq!((facts.holds, facts.torn, facts.rebooted), (end, true, true));
        }
        // A power cut could leave less than the header of those versions.
        assert_eq!(read_back(b"III-UP", None).unwrap(), None);
        assert_eq!(read_back(b"", None).unwrap(), None);
    }

    #[test]
    fn the_first_batch_is_read_alone() {
        let dir = tempfile::tempdir().unwrap();
        let first = || first(dir.path(), &HostDisk).unwrap();
        assert_eq!(first(), None);
        let path = dir.path().join(NAME);
        let mut bytes = [header(HEADER), frames(&sample())].concat();
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(first(), Some(sample()[0].clone()));
        let one = frames(&sample()[..1]).len();
        for cut in [HEADER as usize + one - 1, HEADER as usize, 3, 0] {
            bytes.truncate(cut);
            std::fs::write(&path, &bytes).unwrap();
            assert_eq!(first(), None, "{cut}");
        }
    }

    #[test]
    fn a_torn_end_is_where_reading_ends() {
        let one = &sample()[2..];
        let good = [header(HEADER), frames(one)].concat();
        let mut long = frames(one);
        long[..4].copy_from_slice(&u32::MAX.to_le_bytes());
        let zeroes = [0; 4096];
        let late = [&zeroes[..], b"x"].concat();
        // A frame does not hold at another place: its checksum depends on that of the previous
        // frame.
        let moved = &frames(one)[..];
        for end in [&long[..], moved, b"", b"\0", &zeroes, &late, &long[..20]] {
            let bytes = [&good, end].concat();
            let held = (good.len() as u64, one[0].clone());
            assert_eq!(holds(&bytes, Some(BOOT)), held, "{end:?}");
        }
    }

    #[test]
    fn what_is_damaged_before_the_acknowledged_is_refused_at_any_bit() {
        let batches = sample();
        let ends = [1, 2, 3].map(|count| HEADER + frames(&batches[..count]).len() as u64);
        let good = [header(ends[1]), frames(&batches)].concat();
        let all = batches.concat();
        for bit in 0..8 * good.len() {
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let at = bit as u64 / 8;
            match read_back(&bytes, Some(BOOT)) {
                // The last batch was never acknowledged.
                Ok(read) if at >= ends[1] => {
                    let (facts, ops) = read.unwrap();
                    assert_eq!((facts.holds, facts.torn), (ends[1], true));
                    assert_eq!(ops, all[..all.len() - batches[2].len()]);
                }
                Err(UpperError::Damaged { offset, .. }) => {
                    let frame = if at < HEADER {
                        0
                    } else if at < ends[0] {
                        HEADER
                    } else {
                        ends[0]
                    };
                    assert_eq!(offset, frame, "bit {bit}");
                }
                Err(UpperError::NotAnUpper(_)) => assert!(at < 8),
                Err(UpperError::Version { .. }) => assert!((8..12).contains(&at)),
                other => panic!("bit {bit}: {other:?}"),
            }
        }
        // A log that is cut short is damaged, too.
        assert_eq!(damage(&good[..ends[1] as usize - 1]), ends[0]);
        assert_eq!(damage(&good[..20]), 0);
    }

    #[test]
    fn what_makes_no_sense_under_a_checksum_that_matches_is_damage() {
        let payload = [0xff; 40];
        let mut bytes = header(HEADER);
        bytes.extend(40_u32.to_le_bytes());
        bytes.extend(checksum(&[0; 8], &payload));
        bytes.extend(payload);
        assert_eq!(damage(&bytes), HEADER);
    }

    #[test]
    fn after_a_start_of_the_host_commits_alone_hold() {
        let mut batches = sample();
        let committed = HEADER + frames(&batches[..2]).len() as u64;
        batches.insert(2, vec![Op::Commit(committed)]);
        let bytes = [header(HEADER), frames(&batches)].concat();
        let early: Vec<Op> = batches[..2].concat();
        let all: Vec<Op> = early.iter().chain(&batches[3]).cloned().collect();
        let end = bytes.len() as u64;
        for same in [Some(BOOT), None] {
            assert_eq!(holds(&bytes, same), (end, all.clone()));
        }
        let other = Some([2; 16]);
        assert_eq!(holds(&bytes, other), (committed, early.clone()));
        // The acknowledgement counts like a commit, and the commit may be the damaged part.
        let mut bytes = [header(committed), frames(&batches)].concat();
        bytes[committed as usize] ^= 1;
        assert_eq!(holds(&bytes, other), (committed, early));
    }
}
