//! Reading objects. Every byte that a read returns was checked against the id of its object.
//!
//! The first read of a packed object by a process reads and hashes the whole object; the first read
//! of a group of a loose object reads and hashes the group, see [`crate::outboard`]. The result is
//! remembered as long as the process has the pack's index or the loose file open, so that later
//! reads go straight to the file.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::disk::{Disk, read_file};
use crate::error::{IoContext, StoreError};
use crate::id::{ObjectId, PackId};
use crate::outboard::{GROUP, Outboard, OutboardHasher};
use crate::pack::Index;

/// Objects of at least this many bytes are files of their own; smaller ones go into packs.
pub const LOOSE_MIN: u64 = 1 << 20;

/// Bytes that one step of copying or hashing an object reads.
const PIECE: usize = 1 << 20;

/// A fixed number of bits, each of which any thread may set, once and for all.
#[derive(Debug)]
pub(crate) struct Bits(Box<[AtomicU64]>);

impl Bits {
    pub(crate) fn new(count: usize) -> Self {
        Self((0..count.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    pub(crate) fn get(&self, ix: usize) -> bool {
        let word = self.0.get(ix / 64);
        word.is_some_and(|word| word.load(Ordering::Relaxed) >> (ix % 64) & 1 == 1)
    }

    pub(crate) fn set(&self, ix: usize) {
        if let Some(word) = self.0.get(ix / 64) {
            word.fetch_or(1 << (ix % 64), Ordering::Relaxed);
        }
    }
}

/// A pack that is in the store, by its index.
#[derive(Debug)]
pub(crate) struct Pack {
    pub(crate) id: PackId,
    pub(crate) index: Index,
    /// The pack's file.
    pub(crate) path: PathBuf,
    /// By position in the index: the objects that were read and match their ids.
    pub(crate) checked: Bits,
}

impl Pack {
    pub(crate) fn new(id: PackId, index: Index, path: PathBuf) -> Self {
        Self {
            checked: Bits::new(index.count() as usize),
            id,
            index,
            path,
        }
    }
}

fn damaged(path: &Path, what: &'static str) -> StoreError {
    let path = path.to_owned();
    StoreError::Damaged { path, what }
}

/// The error of a read that found other bytes than were stored. Its source is a
/// [`StoreError::Damaged`].
fn invalid(path: &Path) -> io::Error {
    let what = "the bytes of an object in it are not those that were stored";
    io::Error::new(io::ErrorKind::InvalidData, damaged(path, what))
}

/// Reads until `buf` is full; a file that ends before is an error.
pub(crate) fn read_exact(
    disk: &dyn Disk,
    file: &File,
    mut buf: &mut [u8],
    mut offset: u64,
) -> io::Result<()> {
    while !buf.is_empty() {
        match disk.read_at(file, buf, offset) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                buf = &mut buf[count..];
                offset += count as u64;
            }
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            Err(err) => return Err(err),
        }
    }
    Ok(())
}

/// Copies leave a hole in place of each block of this many zeros that begins at a multiple of it.
const HOLE: usize = 4096;

/// The end of the hole in which `at` lies, if a hole is there and the filesystem reports it.
pub(crate) fn hole_at(file: &File, at: u64) -> Option<u64> {
    #[cfg(target_os = "linux")]
    match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
        Ok(data) => (data > at).then_some(data),
        // The file has no data from `at` to its end.
        Err(rustix::io::Errno::NXIO) => Some(u64::MAX),
        Err(_) => None,
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (file, at);
        None
    }
}

/// The parts of `bytes` that are not blocks of zeros, each with its start.
pub(crate) fn runs(bytes: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    let zeros = |block: &[u8]| block.iter().all(|&byte| byte == 0);
    let blocks = move |at: usize, zero: bool| {
        let rest = bytes.get(at..).unwrap_or_default();
        let alike = rest.chunks(HOLE).take_while(|block| zeros(block) == zero);
        at + alike.map(<[u8]>::len).sum::<usize>()
    };
    let mut at = 0;
    std::iter::from_fn(move || {
        let start = blocks(at, true);
        at = blocks(start, false);
        (start < at).then(|| (start, &bytes[start..at]))
    })
}

/// Hashes a whole file, from its beginning and whatever its position.
pub(crate) fn hash_file(disk: &dyn Disk, file: &File) -> io::Result<(ObjectId, Outboard)> {
    let mut hasher = OutboardHasher::default();
    let mut piece = vec![0; PIECE];
    let mut at = 0;
    loop {
        match disk.read_at(file, &mut piece, at) {
            Ok(0) => return Ok(hasher.finish()),
            Ok(count) => {
                hasher.update(&piece[..count]);
                at += count as u64;
            }
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            Err(err) => return Err(err),
        }
    }
}

/// The file of a loose object, open.
#[derive(Debug)]
pub(crate) struct LooseFile {
    path: PathBuf,
    file: Arc<File>,
    len: u64,
    outboard: Outboard,
    /// The groups that were read and match the outboard.
    checked: Bits,
}

impl LooseFile {
    /// Opens the object, if it exists. If its outboard is missing or damaged, reads the whole
    /// object once.
    pub(crate) fn open(
        disk: &Arc<dyn Disk>,
        path: PathBuf,
        outboard: &Path,
        id: &ObjectId,
    ) -> Result<Option<Self>, StoreError> {
        let file = match disk.open(&path) {
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.at("opening", &path)?,
        };
        let len = file.metadata().at("looking at", &path)?.len();
        let stored = read_file(disk.as_ref(), outboard, Outboard::file_len(len));
        let stored = stored.ok().flatten();
        let stored = stored.and_then(|bytes| Outboard::decode(&bytes, id, len));
        let outboard = if let Some(outboard) = stored {
            outboard
        } else {
            let (found, outboard) = hash_file(disk.as_ref(), &file).at("reading", &path)?;
            if found != *id {
                return Err(damaged(&path, "its bytes do not match its name"));
            }
            outboard
        };
        Ok(Some(Self {
            checked: Bits::new(outboard.groups()),
            file: Arc::new(file),
            path,
            len,
            outboard,
        }))
    }

    /// Reads a part of a group. The first read of a group reads and hashes the whole group.
    fn read_in_group(
        &self,
        disk: &dyn Disk,
        group: usize,
        buf: &mut [u8],
        skip: usize,
    ) -> io::Result<()> {
        let (start, len) = self.outboard.range(group);
        let file = &*self.file;
        if self.checked.get(group) {
            return read_exact(disk, file, buf, start + skip as u64);
        }
        let check = |bytes: &[u8]| {
            if !self.outboard.group_holds(group, bytes) {
                return Err(invalid(&self.path));
            }
            self.checked.set(group);
            Ok(())
        };
        if buf.len() == len {
            read_exact(disk, file, buf, start)?;
            return check(buf).inspect_err(|_| buf.fill(0));
        }
        let mut all = vec![0; len];
        read_exact(disk, file, &mut all, start)?;
        check(&all)?;
        buf.copy_from_slice(&all[skip..skip + buf.len()]);
        Ok(())
    }

    fn read_at(&self, disk: &dyn Disk, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let group_len = GROUP as u64;
        let end = offset + buf.len() as u64;
        let mut groups = offset / group_len..end.div_ceil(group_len);
        if groups.all(|group| self.checked.get(group as usize)) {
            return disk.read_at(&self.file, buf, offset);
        }
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let skip = (at % group_len) as usize;
            let want = (buf.len() - done).min(GROUP - skip);
            let part = &mut buf[done..done + want];
            match self.read_in_group(disk, (at / group_len) as usize, part, skip) {
                Ok(()) => done += want,
                // The bytes so far are right; the next read returns the error.
                Err(_) if done > 0 => break,
                Err(err) => return Err(err),
            }
        }
        Ok(done)
    }

    /// Checks the groups that hold the first `len` bytes.
    fn check(&self, disk: &dyn Disk, len: u64) -> io::Result<()> {
        let mut buf = vec![0; GROUP];
        for group in 0..len.div_ceil(GROUP as u64) as usize {
            if !self.checked.get(group) {
                let (_, len) = self.outboard.range(group);
                self.read_in_group(disk, group, &mut buf[..len], 0)?;
            }
        }
        Ok(())
    }
}

#[derive(Debug, Clone)]
enum Source {
    Packed {
        pack: Arc<Pack>,
        file: Arc<File>,
        ix: u32,
        id: ObjectId,
    },
    Loose(Arc<LooseFile>),
}

/// An object's bytes, which stay readable as long as this lives. A read returns no byte that was
/// not checked against the object's id since the process opened the pack or the file; bytes that do
/// not match are [`io::ErrorKind::InvalidData`] with a [`StoreError::Damaged`] as its source.
#[derive(Debug, Clone)]
pub struct Blob {
    disk: Arc<dyn Disk>,
    source: Source,
    len: u64,
}

impl Blob {
    pub(crate) fn packed(
        disk: &Arc<dyn Disk>,
        file: Arc<File>,
        pack: Arc<Pack>,
        ix: u32,
        id: ObjectId,
    ) -> Self {
        Self {
            disk: Arc::clone(disk),
            len: pack.index.place(ix).len,
            source: Source::Packed { pack, file, ix, id },
        }
    }

    pub(crate) fn loose(disk: &Arc<dyn Disk>, file: Arc<LooseFile>) -> Self {
        Self {
            disk: Arc::clone(disk),
            len: file.len,
            source: Source::Loose(file),
        }
    }

    /// Reads from `offset` of the object into `buf`, as much as one call returns; 0 at or after the
    /// end of the object. A truncated pack or object is an error, never a shorter object.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let left = self.len.saturating_sub(offset);
        let want = buf.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        if want == 0 {
            return Ok(0);
        }
        let buf = &mut buf[..want];
        let count = match &self.source {
            Source::Packed { pack, file, ix, id } => {
                let place = pack.index.place(*ix);
                if pack.checked.get(*ix as usize) {
                    self.disk.read_at(file, buf, place.offset + offset)?
                } else {
                    self.read_first(pack, file, (*ix, id), buf, offset)?
                }
            }
            Source::Loose(file) => file.read_at(self.disk.as_ref(), buf, offset)?,
        };
        match count {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            count => Ok(count),
        }
    }

    /// The first read of a packed object: reads and hashes the whole object.
    fn read_first(
        &self,
        pack: &Pack,
        file: &File,
        (ix, id): (u32, &ObjectId),
        buf: &mut [u8],
        offset: u64,
    ) -> io::Result<usize> {
        if self.len >= LOOSE_MIN {
            return Err(invalid(&pack.path));
        }
        let check = |bytes: &[u8]| {
            if ObjectId::of(bytes) != *id {
                return Err(invalid(&pack.path));
            }
            pack.checked.set(ix as usize);
            Ok(())
        };
        let (disk, from) = (self.disk.as_ref(), pack.index.place(ix).offset);
        if buf.len() as u64 == self.len {
            read_exact(disk, file, buf, from)?;
            check(buf).inspect_err(|_| buf.fill(0))?;
        } else {
            let mut all = vec![0; self.len as usize];
            read_exact(disk, file, &mut all, from)?;
            check(&all)?;
            let start = offset as usize;
            buf.copy_from_slice(&all[start..start + buf.len()]);
        }
        Ok(buf.len())
    }

    /// The whole object; one of more than `limit` bytes is [`io::ErrorKind::FileTooLarge`].
    pub fn read_all(&self, limit: u64) -> io::Result<Vec<u8>> {
        if self.len > limit {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        let mut bytes = vec![0; self.len as usize];
        let mut done = 0;
        while done < bytes.len() {
            done += self.read_at(&mut bytes[done..], done as u64)?;
        }
        Ok(bytes)
    }

    /// Copies the first `len` bytes to `to`, which is empty. Shares the blocks of a loose object
    /// where the filesystem can, after checking their bytes; otherwise blocks of zeros become
    /// holes.
    pub fn copy_to(&self, len: u64, to: &File) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        if len > self.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let Source::Loose(loose) = &self.source {
            loose.check(self.disk.as_ref(), len)?;
            if len > 0 && self.disk.reflink(&loose.file, to).is_ok() {
                return to.set_len(len);
            }
        }
        let mut piece = vec![0; PIECE.min(len as usize)];
        let mut at = 0;
        while at < len {
            if let Source::Loose(loose) = &self.source
                && let Some(hole) = hole_at(&loose.file, at)
            {
                at = hole.min(len);
                continue;
            }
            let want = piece.len().min((len - at) as usize);
            let mut got = 0;
            while got < want {
                match self.read_at(&mut piece[got..want], at + got as u64)? {
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    count => got += count,
                }
            }
            for (start, run) in runs(&piece[..want]) {
                to.write_all_at(run, at + start as u64)?;
            }
            at += want as u64;
        }
        to.set_len(len)
    }

    /// The length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_what_is_left_without_blocks_of_zeros() {
        /// Blocks, each a letter, `0` for one of zeros; how many bytes the last one lacks; the
        /// runs.
        type Case = (&'static str, usize, &'static [(usize, usize)]);
        let cases: [Case; 7] = [
            ("", 0, &[]),
            ("000", 0, &[]),
            ("x", 0, &[(0, 1)]),
            ("x00yz0", 0, &[(0, 1), (3, 2)]),
            ("00x", 1, &[(2, 1)]),
            ("x00", 1, &[(0, 1)]),
            ("0", 4095, &[]),
        ];
        for (blocks, short, expected) in cases {
            let mut bytes: Vec<u8> = blocks
                .bytes()
                .flat_map(|letter| {
                    let mut block = vec![0; HOLE];
                    block[HOLE - 1] = letter - b'0';
                    block[0] = letter - b'0';
                    block
                })
                .collect();
            bytes.truncate(bytes.len() - short);
            let found: Vec<_> = runs(&bytes)
                .map(|(start, run)| (start / HOLE, run.len().div_ceil(HOLE)))
                .collect();
            assert_eq!(found, expected, "{blocks} without {short}");
        }
    }
}
