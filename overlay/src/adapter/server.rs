//! Answers FUSE messages: bytes in, bytes out. The transport is the caller's.
//!
//! The same contract as that of [`super::fuse`] while a worker runs: the client is the only one who
//! changes anything, and is told to keep all that it learns without limit; opening, closing and
//! flushing are no requests after the first. Besides, there is `O_TMPFILE`, `syncfs`, and setuid
//! goes exactly when the kernel says so. Not offered: birth times, since to ask for them takes a
//! request for every inode (`FUSE_STATX`), locks, POSIX ACLs, writeback, and DAX.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::linux;
use super::wire::{
    ATTR_OUT, ENTRY, Header, INIT_OUT, MAX_MESSAGE, NUMBER_OUT, OPEN_OUT, OUT_HEADER, Reply,
    Request, STATFS_OUT, flags,
};
use crate::fs::{Attr, Errno, Filesystem, ReadTo, Result};

/// The flags that are agreed to if the client offers them. Not `ASYNC_DIO`: see [`super::fuse`].
/// Not `READDIRPLUS_AUTO`, by which a kernel lists all but the first page of a directory without
/// attributes, and then has to look up every entry that is looked at.
const WANTED: u64 = flags::ASYNC_READ
    | flags::BIG_WRITES
    | flags::DO_READDIRPLUS
    | flags::NO_OPEN_SUPPORT
    | flags::PARALLEL_DIROPS
    | flags::MAX_PAGES
    | flags::CACHE_SYMLINKS
    | flags::EXPORT_SUPPORT
    | flags::NO_OPENDIR_SUPPORT
    | flags::HANDLE_KILLPRIV_V2;

/// Where a reply goes.
pub trait Room {
    /// How many bytes it may have.
    fn size(&self) -> usize;
    /// Reads up to `size` bytes at `offset` of `file` to `skip` bytes behind the beginning; less
    /// only at the end of the file.
    fn fill(&mut self, skip: usize, file: &File, offset: u64, size: usize) -> io::Result<usize>;
}

/// The body of the reply to a read.
struct Body<'a> {
    reply: &'a mut Reply,
    room: &'a mut dyn Room,
}

impl ReadTo for Body<'_> {
    fn memory(&mut self, size: usize) -> &mut [u8] {
        self.reply.space(size)
    }

    fn file(&mut self, file: &File, offset: u64, size: usize) -> io::Result<usize> {
        let filled = self.room.fill(OUT_HEADER, file, offset, size)?;
        self.reply.elsewhere(filled);
        Ok(filled)
    }
}

/// Serves one filesystem to one client. Any number of threads may hand in messages.
#[derive(Debug)]
pub struct Server<F: ?Sized> {
    /// Whether the client takes `ENOSYS` for: open without asking.
    no_open: AtomicBool,
    no_opendir: AtomicBool,
    fs: Arc<F>,
}

impl<F: Filesystem + ?Sized> Server<F> {
    /// Longest message that needs to be handed in; a longer one is malformed.
    pub const MAX_MESSAGE: usize = MAX_MESSAGE;
    /// Longest reply.
    pub const MAX_REPLY: usize = OUT_HEADER + linux::MAX_IO as usize;

    /// Serves `fs`.
    pub fn new(fs: Arc<F>) -> Self {
        Self {
            no_open: AtomicBool::new(false),
            no_opendir: AtomicBool::new(false),
            fs,
        }
    }

    /// Serves `message` and returns the reply, for which there has to be `room`; nothing where the
    /// client waits for none, or has no room for even an error. The bytes that the room was filled
    /// with belongs behind it. `buffer` is memory to be used again.
    pub fn handle<'r>(
        &self,
        message: &[u8],
        room: &mut dyn Room,
        buffer: &'r mut Reply,
    ) -> &'r [u8] {
        let Some(header) = Header::parse(message) else {
            return &[];
        };
        let size = match room.size().checked_sub(OUT_HEADER) {
            Some(size) => size,
            None if header.wants_reply() => return &[],
            None => 0,
        };
        buffer.begin();
        let done = Request::parse(&header, message).and_then(|request| {
            // Before anything is done: a request that was served without an answer would count as
            // a lookup that the client never takes back.
            if needs(&request) > size {
                return Err(Errno::INVAL);
            }
            self.serve(&header, request, size, room, buffer)
        });
        if header.wants_reply() {
            buffer.end(header.unique, done)
        } else {
            &[]
        }
    }

    /// As if the client had gone: nothing that it knew is remembered.
    pub fn reset(&self) {
        self.no_open.store(false, Ordering::Relaxed);
        self.no_opendir.store(false, Ordering::Relaxed);
        self.fs.forget_all();
    }

    #[allow(clippy::too_many_lines, reason = "one arm for every request")]
    fn serve(
        &self,
        header: &Header,
        request: Request<'_>,
        size: usize,
        room: &mut dyn Room,
        reply: &mut Reply,
    ) -> Result<()> {
        let fs = &*self.fs;
        let Header { node, caller, .. } = *header;
        let kills_suid = linux::kills_suid(caller.uid);
        match request {
            Request::Init {
                max_readahead,
                flags,
            } => {
                self.reset();
                let agreed = flags & WANTED;
                let has = |flag| agreed & flag != 0;
                self.no_open
                    .store(has(flags::NO_OPEN_SUPPORT), Ordering::Relaxed);
                self.no_opendir
                    .store(has(flags::NO_OPENDIR_SUPPORT), Ordering::Relaxed);
                reply.init(max_readahead, agreed);
            }
            Request::Destroy => self.reset(),
            Request::Lookup { name } => match fs.lookup(node, name) {
                Err(Errno::NOENT) => reply.absent(),
                found => reply.entry(&found?),
            },
            Request::Forget { lookups } => fs.forget(node, lookups),
            Request::BatchForget(forgets) => {
                for (ino, lookups) in forgets.iter() {
                    fs.forget(ino, lookups);
                }
            }
            Request::Getattr => reply.attr(&fs.getattr(node)?),
            Request::Setattr(set) => reply.attr(&fs.setattr(node, &linux::set_attr(set))?),
            Request::Readlink => {
                let target = fs.readlink(node)?;
                if target.len() > size {
                    return Err(Errno::INVAL);
                }
                reply.put(&target);
            }
            Request::Mknod {
                name,
                mode,
                special,
            } => reply.entry(&fs.mknod(caller, node, name, mode, special)?),
            Request::Mkdir { name, mode } => reply.entry(&fs.mkdir(caller, node, name, mode)?),
            Request::Symlink { name, target } => {
                reply.entry(&fs.symlink(caller, node, name, target)?);
            }
            Request::Create { .. } if self.no_open.load(Ordering::Relaxed) => {
                // It makes the node, and then opens it without asking.
                return Err(Errno::NOSYS);
            }
            Request::Create { name, mode, flags } => {
                created(reply, &linux::create(fs, caller, node, name, mode, flags)?);
            }
            Request::Tmpfile { mode } => created(reply, &fs.tmpfile(caller, node, mode)?),
            Request::Unlink { name } => fs.unlink(node, name)?,
            Request::Rmdir { name } => fs.rmdir(node, name)?,
            Request::Rename {
                name,
                new_parent,
                new_name,
                how,
            } => fs.rename(node, name, new_parent, new_name, how)?,
            Request::Link { ino, new_name } => reply.entry(&fs.link(ino, node, new_name)?),
            Request::Open(_) if self.no_open.load(Ordering::Relaxed) => return Err(Errno::NOSYS),
            Request::Open(how) => {
                fs.open(node, how)?;
                reply.opened();
            }
            Request::Opendir if self.no_opendir.load(Ordering::Relaxed) => {
                return Err(Errno::NOSYS);
            }
            Request::Opendir => reply.opened_dir(),
            Request::Release | Request::Interrupt => {}
            Request::Read {
                offset,
                size: asked,
            } => {
                let size = size.min(asked as usize);
                let read = fs.read_to(node, &mut Body { reply, room }, offset, size)?;
                reply.cut(read);
            }
            Request::Write {
                offset,
                data,
                kill_suid,
            } => reply.number(fs.write(node, data, offset, kill_suid)? as u64),
            Request::Fsync { data_only } => fs.fsync(node, data_only)?,
            Request::Syncfs => fs.sync()?,
            Request::Readdir {
                cookie,
                size: asked,
                attrs,
            } => self.readdir(header, cookie, size.min(asked as usize), attrs, reply)?,
            Request::Statfs => reply.statfs(&fs.statfs()?),
            Request::Setxattr { name, value, how } => fs.setxattr(node, name, value, how)?,
            Request::Getxattr { name, size: asked } => {
                xattr(reply, &fs.getxattr(node, name)?, asked, size)?;
            }
            Request::Listxattr { size: asked } => {
                xattr(reply, &fs.listxattr(node, caller)?, asked, size)?;
            }
            Request::Removexattr { name } => fs.removexattr(node, name)?,
            Request::Fallocate { how, offset, len } => {
                fs.fallocate(node, how, offset, len, kills_suid)?;
            }
            Request::Lseek { offset, whence } => reply.number(fs.lseek(node, offset, whence)?),
            Request::CopyFileRange {
                from_offset,
                to,
                to_offset,
                len,
            } => {
                let copied =
                    fs.copy_file_range(node, from_offset, to, to_offset, len, kills_suid)?;
                reply.number(copied);
            }
        }
        Ok(())
    }

    fn readdir(
        &self,
        header: &Header,
        cookie: u64,
        room: usize,
        attrs: bool,
        reply: &mut Reply,
    ) -> Result<()> {
        let mut declined = false;
        self.fs.readdir(header.node, cookie, attrs, &mut |entry| {
            declined = reply.body() + Reply::dirent_len(entry.name, attrs) > room;
            if !declined {
                reply.dirent(&entry, attrs);
            }
            !declined
        })?;
        if declined && reply.body() == 0 {
            // Nothing at all would be the end of the directory.
            return Err(Errno::INVAL);
        }
        Ok(())
    }
}

fn created(reply: &mut Reply, attr: &Attr) {
    reply.entry(attr);
    reply.opened();
}

/// `size` 0 asks for the length alone.
fn xattr(reply: &mut Reply, value: &[u8], size: u32, room: usize) -> Result<()> {
    if size == 0 {
        reply.number(value.len() as u64);
    } else if value.len() > room.min(size as usize) {
        return Err(Errno::RANGE);
    } else {
        reply.put(value);
    }
    Ok(())
}

/// Bytes that the reply has besides its header, where the request does not say how many it takes.
fn needs(request: &Request<'_>) -> usize {
    match request {
        Request::Init { .. } => INIT_OUT,
        Request::Lookup { .. }
        | Request::Mknod { .. }
        | Request::Mkdir { .. }
        | Request::Symlink { .. }
        | Request::Link { .. } => ENTRY,
        Request::Create { .. } | Request::Tmpfile { .. } => ENTRY + OPEN_OUT,
        Request::Getattr | Request::Setattr(_) => ATTR_OUT,
        Request::Open(_) | Request::Opendir => OPEN_OUT,
        Request::Statfs => STATFS_OUT,
        Request::Write { .. }
        | Request::Lseek { .. }
        | Request::CopyFileRange { .. }
        | Request::Getxattr { size: 0, .. }
        | Request::Listxattr { size: 0 } => NUMBER_OUT,
        _ => 0,
    }
}
