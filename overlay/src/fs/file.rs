//! Operations on a file's bytes. The first write to a lower file copies it up; see [`crate::upper`]
//! for the order.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use iii_store::{Kind, ObjectId};
use rustix::fs::SeekFrom;

use super::dir::{SET_ID, strip_privileges};
use super::{Allocate, Errno, Open, ReadTo, Result, Seek, Time};
use crate::host;
use crate::ino::Ino;
use crate::overlay::Overlay;
use crate::posix::errno;
use crate::upper::batch::Batch;
use crate::upper::record::{Body, Bytes, Data};
use crate::view::Found;

impl Overlay {
    pub(super) fn do_open(&self, ino: Ino, how: Open) -> Result<()> {
        {
            let inner = self.upper.read();
            let found = inner.state.find(ino)?;
            if found.kind() == Kind::Dir && (how.write || how.truncate) {
                return Err(Errno::ISDIR);
            }
        }
        if how.truncate {
            self.truncate(ino, 0)?;
        }
        Ok(())
    }

    /// Where the bytes of `ino` are, for a caller that reads them.
    fn readable(&self, ino: Ino) -> Result<Bytes> {
        let inner = self.upper.read();
        inner.state.bytes(ino)
    }

    pub(super) fn do_read(&self, ino: Ino, buf: &mut [u8], offset: u64) -> Result<usize> {
        self.read_bytes(self.readable(ino)?, buf, offset)
    }

    pub(super) fn do_read_to(
        &self,
        ino: Ino,
        to: &mut dyn ReadTo,
        offset: u64,
        size: usize,
    ) -> Result<usize> {
        let bytes = self.readable(ino)?;
        let left = bytes.size.saturating_sub(offset);
        let size = size.min(usize::try_from(left).unwrap_or(usize::MAX));
        let Data::Flat { number, .. } = bytes.data else {
            return self.read_bytes(bytes, to.memory(size), offset);
        };
        let file = self.upper.data.get(number).map_err(|error| errno(&error))?;
        to.file(&file, offset, size).map_err(|error| errno(&error))
    }

    /// The flat file of `ino`, ready to be written to: its record is dirty. Copies up the first
    /// `keep` bytes of a file whose data is in the store. `kill_suid` as for a write.
    fn writable(&self, ino: Ino, keep: u64, kill_suid: bool) -> Result<Arc<File>> {
        loop {
            let bytes = {
                let inner = self.upper.read();
                let bytes = inner.state.bytes(ino)?;
                if let Data::Flat {
                    number,
                    dirty: true,
                } = bytes.data
                    && let Found::Upper(_, node) = inner.state.find(ino)?
                    && node.record.xattrs.is_empty()
                    && node.record.mode & SET_ID == 0
                {
                    return self.upper.data.get(number).map_err(|error| errno(&error));
                }
                bytes
            };
            let (flat, file) = match bytes.data {
                Data::Flat { number, .. } => (number, self.upper.data.get(number)),
                Data::Empty => split(self.upper.data.create()),
                Data::Lower(object) => split(self.copy_up(&object, bytes.size.min(keep))),
            };
            let file = file.map_err(|error| errno(&error))?;
            let switched = self.switch(ino, bytes, flat, keep, kill_suid);
            if switched != Ok(true) && !matches!(bytes.data, Data::Flat { .. }) {
                self.upper.data.remove(flat);
            }
            if switched? {
                return Ok(file);
            }
        }
    }

    /// A new flat file that holds the first `len` bytes of the object. It has to be durable before
    /// the log says so: see [`crate::upper::commit::Inner::order`].
    pub(crate) fn copy_up(&self, object: &[u8; 32], len: u64) -> io::Result<(u64, Arc<File>)> {
        let (flat, file) = self.upper.data.create()?;
        let object = ObjectId::from_bytes(*object);
        let copied = self.objects.copy_to(&object, len, &file);
        if let Err(error) = copied {
            self.upper.data.remove(flat);
            return Err(error);
        }
        Ok((flat, file))
    }

    /// Points the record of `ino` to the flat file, unless its data is no longer what it was when
    /// that was made.
    fn switch(&self, ino: Ino, was: Bytes, flat: u64, keep: u64, kill_suid: bool) -> Result<bool> {
        let mut inner = self.upper.write();
        let is = inner.state.bytes(ino)?;
        if is.data != was.data {
            return Ok(false);
        }
        let mut batch = Batch::new(&mut inner);
        let (number, record) = batch.inode(ino)?;
        let cleaned = strip_privileges(record, kill_suid);
        if cleaned || !matches!(was.data, Data::Flat { dirty: true, .. }) {
            let size = match was.data {
                Data::Flat { .. } => is.size,
                _ => is.size.min(keep),
            };
            record.body = Body::File {
                data: Data::Flat {
                    number: flat,
                    dirty: true,
                },
                size,
            };
            batch.commit()?;
            inner.switched(number, !matches!(was.data, Data::Flat { .. }));
        }
        self.upper.compact(&mut inner);
        Ok(true)
    }

    /// Notes in memory that the file, which is dirty, was written to. `begun` is from before that:
    /// the host stamps the flat file later, and its time, which holds after a kill, is not an
    /// earlier one.
    fn written(&self, ino: Ino, begun: Time, size: impl FnOnce(u64) -> u64) {
        let mut inner = self.upper.write();
        let number = inner.state.number(ino);
        if let Some(node) = number.and_then(|number| inner.state.node_mut(number)) {
            node.synced = false;
            node.record.mtime = begun;
            node.record.ctime = begun;
            if let Body::File { size: known, .. } = &mut node.record.body {
                *known = size(*known);
            }
            if let Some(flat) = node.record.flat() {
                self.upper.writers.wrote(flat);
            }
        }
    }

    pub(super) fn do_write(
        &self,
        ino: Ino,
        data: &[u8],
        offset: u64,
        kill_suid: bool,
    ) -> Result<usize> {
        let end = offset
            .checked_add(data.len() as u64)
            .filter(|&end| i64::try_from(end).is_ok())
            .ok_or(Errno::FBIG)?;
        let file = self.writable(ino, u64::MAX, kill_suid)?;
        if data.is_empty() {
            return Ok(0);
        }
        let begun = Time::now();
        let mut done = 0;
        while done < data.len() {
            match file.write_at(&data[done..], offset + done as u64) {
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if done == 0 => return Err(errno(&error)),
                Err(_) => break,
            }
        }
        let end = end - (data.len() - done) as u64;
        self.written(ino, begun, |size| size.max(end));
        Ok(done)
    }

    /// Sets the length.
    pub(super) fn truncate(&self, ino: Ino, size: u64) -> Result<()> {
        // A file that is emptied to be written again gets another flat file: the old contents stay
        // until the new ones are durable.
        let drops = |bytes: &Bytes| match bytes.data {
            Data::Flat { .. } => bytes.size != 0 && !self.upper.volatile,
            _ => true,
        };
        let was = self.upper.read().state.bytes(ino)?;
        if size == 0 && drops(&was) {
            let mut inner = self.upper.write();
            let is = inner.state.bytes(ino)?;
            if drops(&is) {
                let mut batch = Batch::new(&mut inner);
                let now = batch.now;
                let (number, record) = batch.inode(ino)?;
                record.body = Body::File {
                    data: Data::Empty,
                    size: 0,
                };
                record.mtime = now;
                record.ctime = now;
                batch.commit()?;
                inner.emptied(number, &is);
                self.upper.compact(&mut inner);
                return Ok(());
            }
        }
        let file = self.writable(ino, size, false)?;
        let begun = Time::now();
        rustix::fs::ftruncate(&file, size)?;
        self.written(ino, begun, |_| size);
        Ok(())
    }

    pub(super) fn do_fallocate(
        &self,
        ino: Ino,
        how: Allocate,
        offset: u64,
        len: u64,
        kill_suid: bool,
    ) -> Result<()> {
        let end = offset
            .checked_add(len)
            .filter(|&end| i64::try_from(end).is_ok())
            .ok_or(Errno::FBIG)?;
        if len == 0 {
            return Err(Errno::INVAL);
        }
        let file = self.writable(ino, u64::MAX, kill_suid)?;
        let grows = matches!(how, Allocate::Grow | Allocate::ZeroGrow);
        let begun = Time::now();
        host::allocate(&file, how, offset, len)?;
        self.written(ino, begun, |size| if grows { size.max(end) } else { size });
        Ok(())
    }

    pub(super) fn do_lseek(&self, ino: Ino, offset: u64, whence: Seek) -> Result<u64> {
        let bytes = self.upper.read().state.bytes(ino)?;
        if offset >= bytes.size {
            return Err(Errno::NXIO);
        }
        let Data::Flat { number, .. } = bytes.data else {
            // All data, and the hole that every file has at its end.
            return Ok(match whence {
                Seek::Data => offset,
                Seek::Hole => bytes.size,
            });
        };
        // A descriptor of its own: seeking moves the position, which no other user of it minds, but
        // which is one.
        let file = self.upper.data.get(number).map_err(|error| errno(&error))?;
        let from = match whence {
            Seek::Data => SeekFrom::Data(offset),
            Seek::Hole => SeekFrom::Hole(offset),
        };
        rustix::fs::seek(&*file, from)
    }

    pub(super) fn do_copy_file_range(
        &self,
        from: Ino,
        from_offset: u64,
        to: Ino,
        to_offset: u64,
        len: u64,
        kill_suid: bool,
    ) -> Result<u64> {
        let source = self.readable(from)?;
        let len = len.min(source.size.saturating_sub(from_offset));
        if len == 0 {
            return Ok(0);
        }
        if let Data::Flat { number, .. } = source.data {
            let source = self.upper.data.get(number).map_err(|error| errno(&error))?;
            let target = self.writable(to, u64::MAX, kill_suid)?;
            let (mut from_at, mut to_at) = (from_offset, to_offset);
            let len = usize::try_from(len).unwrap_or(usize::MAX);
            let begun = Time::now();
            let done =
                host::copy_file_range(&source, Some(&mut from_at), &target, Some(&mut to_at), len)?;
            self.written(to, begun, |size| size.max(to_offset + done as u64));
            return Ok(done as u64);
        }
        let mut buf = vec![0; COPY_CHUNK.min(len) as usize];
        let mut done = 0;
        while done < len {
            let want = buf.len().min((len - done) as usize);
            let got = self.read_bytes(source, &mut buf[..want], from_offset + done)?;
            if got == 0 {
                break;
            }
            done += self.do_write(to, &buf[..got], to_offset + done, kill_suid)? as u64;
            if done >= COPY_MOST {
                break;
            }
        }
        Ok(done)
    }

    pub(super) fn do_fsync(&self, ino: Ino, data_only: bool) -> Result<()> {
        let found = match self.upper.read().state.find(ino)? {
            Found::Upper(number, _) => Some(number),
            Found::Lower(_) => None,
        };
        match found {
            Some(number) => self.upper.fsync(number, data_only),
            None => self.upper.sync(),
        }
    }

    pub(super) fn do_sync(&self) -> Result<()> {
        self.upper.sync_all()
    }
}

/// Bytes of a copy between files that are read at once.
const COPY_CHUNK: u64 = 1 << 18;
/// Bytes that one copy between files moves, so that the request does not take forever.
const COPY_MOST: u64 = 64 << 20;

fn split(made: io::Result<(u64, Arc<File>)>) -> (u64, io::Result<Arc<File>>) {
    match made {
        Ok((number, file)) => (number, Ok(file)),
        Err(error) => (0, Err(error)),
    }
}
