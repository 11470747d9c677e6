//! The upper's log: an append-only file of batches, each applied whole or not at all.
//!
//! ```text
//! header   magic `III-UPPR`, version: u32, 0: u32
//! frame    length: u32, checksum: 8 bytes, payload
//! ```
//!
//! The payload is a postcard-encoded list of [`Op`]s; the checksum is the first 8 bytes of its BLAKE3. A batch is one
//! `write`, so it is in the page cache when the operation returns and survives the death of the process; syncing
//! the file makes it survive that of the machine. Reading ends at the first frame that is cut short or does not match its checksum,
//! and what follows is cut off: it was never acknowledged as durable. A write that fails is undone by cutting the file
//! back; if even that fails, the log takes no more.
//!
//! Space is allocated ahead of the end, and the last of it is kept for batches that remove something: otherwise a full disk
//! could not be emptied from inside the sandbox.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::record::Op;
use super::{UpperError, io_error, options};
use crate::fs::{Allocate, Errno};

/// Version of the format described above and of the records in it. Version 2 knew no [`Op::Thawed`], version 1 no
/// [`Op::Applied`] either; their logs are read, and become logs of this version.
pub const VERSION: u32 = 3;
/// Longest payload. Three inodes with all the xattrs they may have fit many times over.
pub const MAX_PAYLOAD: usize = 64 << 20;

/// How far ahead space is allocated.
const AHEAD: u64 = 1 << 20;
/// How much of it only batches that remove something may use.
const SPARE: u64 = 256 << 10;

const MAGIC: &[u8; 8] = b"III-UPPR";
const HEADER: u64 = 16;
const FRAME: usize = 12;
/// Name of the log in the upper's directory.
const NAME: &str = "log";
/// Name of the log that compaction writes.
const NEW_NAME: &str = "log.new";

/// The first batch of the log in `dir`, whoever has that open; none if there is no log, or none that is whole.
pub fn first(dir: &Path) -> Result<Option<Vec<Op>>, UpperError> {
    let path = dir.join(NAME);
    let fail = |what| io_error(what, &path);
    let file = match options().read(true).open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file.map_err(fail("opening"))?,
    };
    let read = |limit: u64| {
        let mut bytes = Vec::new();
        let read = (&file).take(limit).read_to_end(&mut bytes);
        read.map(|_| bytes)
    };
    let head = read(HEADER + FRAME as u64).map_err(fail("reading"))?;
    let Some(len) = head.get(HEADER as usize..).and_then(<[u8]>::first_chunk) else {
        return Ok(None);
    };
    let len = (u32::from_le_bytes(*len) as usize).min(MAX_PAYLOAD);
    let rewound = (&file).seek(SeekFrom::Start(HEADER));
    rewound.map_err(fail("seeking in"))?;
    let bytes = read((FRAME + len) as u64).map_err(fail("reading"))?;
    Ok(parse(&bytes).0.into_iter().next())
}

/// The open log.
#[derive(Debug)]
pub struct Log {
    file: File,
    path: PathBuf,
    len: u64,
    /// Space is allocated up to here.
    allocated: u64,
    broken: bool,
}

fn header() -> [u8; HEADER as usize] {
    let mut header = [0; HEADER as usize];
    header[..8].copy_from_slice(MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header
}

fn frame(ops: &[Op]) -> io::Result<Vec<u8>> {
    let mut frame = postcard::to_extend(ops, vec![0; FRAME]).map_err(io::Error::other)?;
    let payload = &frame[FRAME..];
    if payload.len() > MAX_PAYLOAD {
        return Err(io::Error::from(io::ErrorKind::FileTooLarge));
    }
    let len = payload.len() as u32;
    let sum = blake3::hash(payload);
    frame[..4].copy_from_slice(&len.to_le_bytes());
    frame[4..FRAME].copy_from_slice(&sum.as_bytes()[..8]);
    Ok(frame)
}

/// The batches in `bytes`, which follow the header, and how many bytes of it they take.
pub fn parse(bytes: &[u8]) -> (Vec<Vec<Op>>, usize) {
    let mut batches = Vec::new();
    let mut at = 0;
    while let Some((head, rest)) = bytes[at..].split_first_chunk::<FRAME>() {
        let len = u32::from_le_bytes([head[0], head[1], head[2], head[3]]) as usize;
        let Some(payload) = rest.get(..len).filter(|_| len <= MAX_PAYLOAD) else {
            break;
        };
        if blake3::hash(payload).as_bytes()[..8] != head[4..] {
            break;
        }
        let Ok(ops) = postcard::from_bytes(payload) else {
            break;
        };
        batches.push(ops);
        at += FRAME + len;
    }
    (batches, at)
}

impl Log {
    /// Opens the log in `dir`, made when missing, and returns it with the batches that it holds.
    pub fn open(dir: &Path) -> Result<(Self, Vec<Vec<Op>>), UpperError> {
        let path = dir.join(NAME);
        let fail = |what| io_error(what, &path);
        let mut file = options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(fail("opening"))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(fail("reading"))?;
        let torn_header = bytes.len() < HEADER as usize && header().starts_with(&bytes);
        if torn_header {
            file.set_len(0).map_err(fail("resetting"))?;
            file.write_all_at(&header(), 0).map_err(fail("writing"))?;
            bytes = header().to_vec();
        }
        if bytes.len() < HEADER as usize || bytes[..8] != *MAGIC {
            return Err(UpperError::NotAnUpper(path));
        }
        let version = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
        match version {
            VERSION => {}
            1 | 2 => file.write_all_at(&header(), 0).map_err(fail("writing"))?,
            version => return Err(UpperError::Version { path, version }),
        }
        let (batches, used) = parse(&bytes[HEADER as usize..]);
        let len = HEADER + used as u64;
        if len != bytes.len() as u64 {
            file.set_len(len)
                .map_err(fail("cutting the torn end off"))?;
        }
        file.seek(SeekFrom::Start(len))
            .map_err(fail("seeking in"))?;
        let log = Self {
            file,
            path,
            len,
            allocated: len,
            broken: false,
        };
        Ok((log, batches))
    }

    /// Appends a batch: all of it or, on an error, nothing.
    pub fn append(&mut self, ops: &[Op]) -> io::Result<()> {
        if self.broken {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        let frame = frame(ops)?;
        let removes = |op: &Op| matches!(op, Op::Forget(_) | Op::Entry(_, _, None) | Op::Clear(..));
        self.allocate(frame.len() as u64, ops.iter().any(removes))?;
        if let Err(error) = self.file.write_all(&frame) {
            let undone = self
                .file
                .set_len(self.len)
                .and_then(|()| self.file.seek(SeekFrom::Start(self.len)));
            self.broken = undone.is_err();
            return Err(error);
        }
        self.len += frame.len() as u64;
        Ok(())
    }

    /// Makes sure that there is room for `len` more bytes, and for what removes something after them.
    fn allocate(&mut self, len: u64, removes: bool) -> io::Result<()> {
        let end = self.len + len;
        if end + SPARE <= self.allocated {
            return Ok(());
        }
        let ahead = crate::host::allocate(&self.file, Allocate::KeepSize, self.len, len + AHEAD);
        match ahead {
            Ok(()) => self.allocated = end + AHEAD,
            Err(error) if error != Errno::NOSPC && error != Errno::DQUOT => {
                // A filesystem that cannot promise space.
                self.allocated = u64::MAX;
            }
            Err(_) if removes => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }

    /// Takes nothing more: syncing failed, so what is on disk is unknown.
    pub fn break_off(&mut self) {
        self.broken = true;
    }

    /// A second handle on the file, to sync it without holding up appends.
    pub fn handle(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// Its length in bytes.
    pub fn size(&self) -> u64 {
        self.len
    }

    /// Replaces the log by one that holds just these batches. The old one stays until the new one is whole and, if
    /// `durable`, on disk.
    pub fn rewrite<'a>(
        &mut self,
        batches: impl Iterator<Item = &'a [Op]>,
        durable: bool,
    ) -> io::Result<()> {
        let new = self.path.with_file_name(NEW_NAME);
        let mut file = options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&new)?;
        let mut out = io::BufWriter::with_capacity(1 << 20, &file);
        out.write_all(&header())?;
        let mut len = HEADER;
        for ops in batches {
            let frame = frame(ops)?;
            out.write_all(&frame)?;
            len += frame.len() as u64;
        }
        out.flush()?;
        drop(out);
        if durable {
            file.sync_all()?;
        }
        std::fs::rename(&new, &self.path)?;
        if durable && let Some(dir) = self.path.parent() {
            File::open(dir)?.sync_all()?;
        }
        file.seek(SeekFrom::Start(len))?;
        self.file = file;
        self.len = len;
        self.allocated = len;
        self.broken = false;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::{Body, Chain, Data, Device, Record};
    use super::*;
    use crate::fs::Time;

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
            xattrs: [((*b"user.a").into(), (*b"1").into())].into(),
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

    #[test]
    fn what_is_no_log_is_refused_whatever_its_length() {
        for foreign in [
            &b"x"[..],
            b"III-UPPS",
            b"III-UPPR\x01\x00\x00\x00x",
            b"0123456789abcdef",
        ] {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join(NAME), foreign).unwrap();
            let opened = Log::open(dir.path());
            assert!(
                matches!(opened, Err(UpperError::NotAnUpper(_))),
                "{foreign:?}"
            );
        }
    }

    /// The format: these values may never change.
    #[test]
    fn golden() {
        let frames: Vec<u8> = sample()
            .iter()
            .flat_map(|ops| frame(ops).unwrap())
            .collect();
        assert_eq!(parse(&frames), (sample(), frames.len()));
        assert_eq!(header(), *b"III-UPPR\x03\0\0\0\0\0\0\0");
        let applied = frame(&[Op::Applied(vec![[7; 32], [8; 32]])]).unwrap();
        let payload = [&b"\x01\x05\x02"[..], &[7; 32], &[8; 32]].concat();
        assert_eq!(applied[FRAME..], payload);
        let thawed = frame(&[Op::Thawed([9; 32])]).unwrap();
        assert_eq!(thawed[FRAME..], [&b"\x01\x06"[..], &[9; 32]].concat());
        assert_eq!(frames.len(), 404);
        assert_eq!(
            blake3::hash(&frames).to_hex().as_str(),
            "2bec4f3ce36f0a4aff22c88cc5152bd0bde958b7eef8b78ff8d4853d424bcccc"
        );
    }

    #[test]
    fn logs_of_earlier_versions_are_read_and_become_logs_of_this() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(NAME);
        let batch = frame(&sample()[2]).unwrap();
        for version in 1..VERSION {
            let head = [&b"III-UPPR"[..], &version.to_le_bytes(), &[0; 4]].concat();
            let bytes = [&head[..], &batch].concat();
            std::fs::write(&path, &bytes).unwrap();
            let (log, batches) = Log::open(dir.path()).unwrap();
            assert_eq!(
                (log.size(), batches),
                (bytes.len() as u64, vec![sample()[2].clone()])
            );
            drop(log);
            assert_eq!(
                std::fs::read(&path).unwrap(),
                [&header()[..], &batch].concat()
            );
        }
    }

    #[test]
    fn the_first_batch_is_read_alone() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(first(dir.path()).unwrap(), None);
        let path = dir.path().join(NAME);
        let [one, two] = [0, 1].map(|at| frame(&sample()[at]).unwrap());
        let mut bytes = [&header()[..], &one, &two].concat();
        std::fs::write(&path, &bytes).unwrap();
        assert_eq!(first(dir.path()).unwrap(), Some(sample()[0].clone()));
        for cut in [HEADER as usize + one.len() - 1, HEADER as usize, 3, 0] {
            bytes.truncate(cut);
            std::fs::write(&path, &bytes).unwrap();
            assert_eq!(first(dir.path()).unwrap(), None, "{cut}");
        }
    }

    /// Whatever stands in a log, reading it ends.
    #[test]
    fn lies_are_where_reading_ends() {
        let good = frame(&sample()[2]).unwrap();
        let mut long = good.clone();
        long[..4].copy_from_slice(&u32::MAX.to_le_bytes());
        let nonsense = {
            let payload = [0xff; 40];
            let mut frame = 40_u32.to_le_bytes().to_vec();
            frame.extend(&blake3::hash(&payload).as_bytes()[..8]);
            frame.extend(payload);
            frame
        };
        for end in [&long[..], &nonsense, b"", b"\0", &good[..good.len() - 1]] {
            let bytes = [&good[..], end].concat();
            assert_eq!(parse(&bytes), (vec![sample()[2].clone()], good.len()));
        }
    }
}
