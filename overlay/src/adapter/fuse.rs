//! Serving over `/dev/fuse`, by `fuser`, which parses the wire format.
//!
//! The kernel is the only client and no other process changes the filesystem, so all that the
//! kernel learns stays true until it changes it itself. It may keep all of that without limit:
//! entries, absent entries, attributes, listings, targets and pages. Opening and closing need no
//! request ([`Mode::Quiet`]): data is addressed by inode.
//!
//! While a build step runs, its looks are recorded ([`Mode::Observed`]): opens are real requests,
//! and listings bring no attributes, so that the kernel asks for each entry that is looked at. A
//! repeated look is recorded once.
//!
//! Not offered: locks (the kernel's own are right, for it is one kernel), POSIX ACLs, writeback
//! (the kernel would make up times and lengths of its own), and `O_TMPFILE`, which `fuser` has no
//! request for: programs are told that it is not supported, and fall back to a named file.
//!
//! Nor passthrough: it needs privileges in the host's user namespace, and a file of its own for
//! every object, which small ones do not have. So the first read of a small file is one request,
//! and all that follow are none.
//!
//! setuid and setgid go with a write, a truncation or a change of the owner (`HANDLE_KILLPRIV_V2`).
//! `fuser` hides whether the kernel asked for that in a truncation, so every truncation does it. In
//! a user namespace, where sandboxes are, the kernel asks for it even when root truncates.
//!
//! `ASYNC_DIO` is not agreed to: with it, the kernel leaves pages that a buffered read cached
//! before an asynchronous direct write, and later reads return them.

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    CopyFileRangeFlags, FileAttr, FileHandle, FileType, FopenFlags, Generation, INodeNo, InitFlags,
    IoctlFlags, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen,
    ReplyStatfs, ReplyWrite, ReplyXattr, Request, SessionACL, TimeOrNow, WriteFlags,
};
use iii_store::layer::Kind;

use super::{Mode, linux};
use crate::Stale;
use crate::fs::{Attr, Caller, Errno, Filesystem, SetAttr, SetTime, Time};

/// No inode number is used again while the kernel may remember it.
const GENERATION: Generation = Generation(0);

/// A filesystem being served, until it is unmounted.
#[derive(Debug)]
pub struct FuseSession(fuser::BackgroundSession);

impl FuseSession {
    /// Waits until the filesystem is unmounted everywhere.
    pub fn join(self) -> io::Result<()> {
        self.0.join()
    }

    /// A handle that tells the kernel to forget what an update changed.
    pub fn forgetter(&self) -> Forgetter {
        Forgetter(self.0.notifier())
    }
}

/// Tells the kernel that something changed behind its back.
#[derive(Debug, Clone)]
pub struct Forgetter(fuser::Notifier);

impl Forgetter {
    /// Makes the kernel ask again for all that an update changed. From when this returns, programs
    /// see it; those that have a file open that was replaced go on with what they have. Must not be
    /// called by a thread that serves requests.
    pub fn forget(&self, stale: &Stale) -> io::Result<()> {
        for (dir, name) in &stale.entries {
            self.0.inval_entry(INodeNo(*dir), OsStr::from_bytes(name))?;
        }
        // Attributes, and the listing, which is kept like a file's pages.
        for dir in &stale.dirs {
            self.0.inval_inode(INodeNo(*dir), 0, 0)?;
        }
        Ok(())
    }
}

/// Serves `fs` on `fuse`, a `/dev/fuse` descriptor that is mounted already, on `threads` threads.
/// The mount needs the options `default_permissions` and, for more than one user, `allow_other`.
/// Returns once the kernel has been answered for the first time; the mount ends the session.
pub fn serve<F: Filesystem + 'static>(
    fs: Arc<F>,
    fuse: OwnedFd,
    threads: usize,
    mode: Mode,
) -> io::Result<FuseSession> {
    let mut config = fuser::Config::default();
    config.acl = SessionACL::All;
    config.n_threads = Some(threads.max(1));
    let adapter = Adapter { fs, mode };
    let session = fuser::Session::from_fd(adapter, fuse, SessionACL::All, config)?;
    Ok(FuseSession(session.spawn()?))
}

struct Adapter<F> {
    fs: Arc<F>,
    mode: Mode,
}

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

fn errno(error: Errno) -> fuser::Errno {
    fuser::Errno::from_i32(error.raw_os_error())
}

fn caller(req: &Request) -> Caller {
    Caller {
        uid: req.uid(),
        gid: req.gid(),
    }
}

fn to_system_time(time: Time) -> SystemTime {
    let nsec = Duration::from_nanos(u64::from(time.nsec));
    let whole = Duration::from_secs(time.sec.unsigned_abs());
    let base = if time.sec >= 0 {
        UNIX_EPOCH.checked_add(whole)
    } else {
        UNIX_EPOCH.checked_sub(whole)
    };
    base.and_then(|base| base.checked_add(nsec))
        .unwrap_or(UNIX_EPOCH)
}

/// Undoes the change that `fuser` 0.18 makes of the request's seconds and nanoseconds, which for
/// times before 1970 is `1970 - (-seconds + nanoseconds)`.
fn from_fuser_time(time: SystemTime) -> Time {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => Time {
            sec: i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
            nsec: after.subsec_nanos(),
        },
        Err(before) => Time {
            sec: 0_i64.saturating_sub_unsigned(before.duration().as_secs()),
            nsec: before.duration().subsec_nanos(),
        },
    }
}

fn set_time(time: TimeOrNow) -> SetTime {
    match time {
        TimeOrNow::Now => SetTime::Now,
        TimeOrNow::SpecificTime(time) => SetTime::At(from_fuser_time(time)),
    }
}

fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::Dir => FileType::Directory,
        Kind::File | Kind::Whiteout => FileType::RegularFile,
        Kind::Symlink => FileType::Symlink,
        Kind::Fifo => FileType::NamedPipe,
        Kind::Socket => FileType::Socket,
        Kind::Char => FileType::CharDevice,
        Kind::Block => FileType::BlockDevice,
    }
}

fn file_attr(attr: &Attr) -> FileAttr {
    FileAttr {
        ino: INodeNo(attr.ino),
        size: attr.size,
        blocks: attr.blocks,
        atime: to_system_time(attr.atime),
        mtime: to_system_time(attr.mtime),
        ctime: to_system_time(attr.ctime),
        crtime: to_system_time(attr.btime),
        kind: file_type(attr.kind),
        perm: attr.mode,
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: linux::encode_rdev(attr.rdev),
        blksize: linux::BLOCK,
        flags: 0,
    }
}

/// The attributes of an absent name; the kernel remembers that it is absent.
fn absent() -> FileAttr {
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 0,
        flags: 0,
    }
}

fn reply_entry(result: Result<Attr, Errno>, reply: ReplyEntry) {
    match result {
        Ok(attr) => reply.entry(&linux::FOREVER, &file_attr(&attr), GENERATION),
        Err(error) => reply.error(errno(error)),
    }
}

fn reply_attr(result: Result<Attr, Errno>, reply: ReplyAttr) {
    match result {
        Ok(attr) => reply.attr(&linux::FOREVER, &file_attr(&attr)),
        Err(error) => reply.error(errno(error)),
    }
}

fn reply_empty(result: Result<(), Errno>, reply: ReplyEmpty) {
    match result {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(error)),
    }
}

fn reply_xattr(result: Result<Vec<u8>, Errno>, size: u32, reply: ReplyXattr) {
    match result {
        Ok(value) if size == 0 => reply.size(value.len() as u32),
        Ok(value) if value.len() > size as usize => reply.error(errno(Errno::RANGE)),
        Ok(value) => reply.data(&value),
        Err(error) => reply.error(errno(error)),
    }
}

impl<F: Filesystem + 'static> fuser::Filesystem for Adapter<F> {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let mut wanted = vec![
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_HANDLE_KILLPRIV_V2,
            InitFlags::FUSE_CACHE_SYMLINKS,
            InitFlags::FUSE_EXPORT_SUPPORT,
        ];
        if self.mode == Mode::Quiet {
            wanted.extend([
                InitFlags::FUSE_DO_READDIRPLUS,
                InitFlags::FUSE_READDIRPLUS_AUTO,
                InitFlags::FUSE_NO_OPEN_SUPPORT,
                InitFlags::FUSE_NO_OPENDIR_SUPPORT,
            ]);
        }
        for flag in wanted {
            // An older kernel without it asks more often.
            let _ = config.add_capabilities(flag);
        }
        // The nearest value that is taken will do.
        let _ = config.set_max_write(linux::MAX_IO);
        let _ = config.set_max_background(linux::MAX_BACKGROUND);
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.fs.lookup(parent.0, name.as_bytes()) {
            Err(Errno::NOENT) => reply.entry(&linux::FOREVER, &absent(), GENERATION),
            result => reply_entry(result, reply),
        }
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        self.fs.forget(ino.0, nlookup);
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        reply_attr(self.fs.getattr(ino.0), reply);
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let set = SetAttr {
            mode: mode.map(linux::permissions),
            uid,
            gid,
            size,
            atime: atime.map(set_time),
            mtime: mtime.map(set_time),
            kill_suid: size.is_some(),
        };
        reply_attr(self.fs.setattr(ino.0, &linux::set_attr(set)), reply);
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        match self.fs.readlink(ino.0) {
            Ok(target) => reply.data(&target),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn mknod(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let made = linux::special(mode, rdev).and_then(|special| {
            let (caller, mode) = (caller(req), linux::permissions(mode));
            self.fs
                .mknod(caller, parent.0, name.as_bytes(), mode, special)
        });
        reply_entry(made, reply);
    }

    fn mkdir(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let mode = linux::permissions(mode);
        let made = self.fs.mkdir(caller(req), parent.0, name.as_bytes(), mode);
        reply_entry(made, reply);
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        reply_empty(self.fs.unlink(parent.0, name.as_bytes()), reply);
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        reply_empty(self.fs.rmdir(parent.0, name.as_bytes()), reply);
    }

    fn symlink(
        &self,
        req: &Request,
        parent: INodeNo,
        link_name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let target = target.as_os_str().as_bytes();
        let name = link_name.as_bytes();
        let made = self.fs.symlink(caller(req), parent.0, name, target);
        reply_entry(made, reply);
    }

    fn rename(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (name, new_name) = (name.as_bytes(), newname.as_bytes());
        let renamed = linux::rename(flags.bits())
            .and_then(|how| self.fs.rename(parent.0, name, newparent.0, new_name, how));
        reply_empty(renamed, reply);
    }

    fn link(
        &self,
        _req: &Request,
        ino: INodeNo,
        newparent: INodeNo,
        newname: &OsStr,
        reply: ReplyEntry,
    ) {
        let made = self.fs.link(ino.0, newparent.0, newname.as_bytes());
        reply_entry(made, reply);
    }

    fn open(&self, _req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if self.mode == Mode::Quiet {
            return reply.error(errno(Errno::NOSYS));
        }
        match self.fs.open(ino.0, linux::open(flags.0)) {
            Ok(()) => reply.opened(FileHandle(0), FopenFlags::FOPEN_KEEP_CACHE),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let size = size.min(linux::MAX_IO) as usize;
        BUFFER.with_borrow_mut(|buffer| {
            if buffer.len() < size {
                buffer.resize(size, 0);
            }
            match self.fs.read(ino.0, &mut buffer[..size], offset) {
                Ok(count) => reply.data(&buffer[..count]),
                Err(error) => reply.error(errno(error)),
            }
        });
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let kill = write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID);
        match self.fs.write(ino.0, data, offset, kill) {
            Ok(count) => reply.written(count as u32),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn flush(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        // Writes are through when they are answered. The kernel does not ask again.
        reply.error(errno(Errno::NOSYS));
    }

    fn fsync(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply_empty(self.fs.fsync(ino.0, datasync), reply);
    }

    fn opendir(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        if self.mode == Mode::Quiet {
            return reply.error(errno(Errno::NOSYS));
        }
        let flags = FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_CACHE_DIR;
        reply.opened(FileHandle(0), flags);
    }

    fn readdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let listed = self.fs.readdir(ino.0, offset, false, &mut |entry| {
            let name = OsStr::from_bytes(entry.name);
            !reply.add(
                INodeNo(entry.ino),
                entry.cookie,
                file_type(entry.kind),
                name,
            )
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn readdirplus(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let listed = self.fs.readdir(ino.0, offset, true, &mut |entry| {
            let name = OsStr::from_bytes(entry.name);
            // The kernel takes number and type of `.` and `..`, and nothing else.
            let attr = entry.attr.as_ref().map_or_else(
                || FileAttr {
                    ino: INodeNo(entry.ino),
                    kind: file_type(entry.kind),
                    ..absent()
                },
                file_attr,
            );
            let ino = INodeNo(entry.ino);
            !reply.add(ino, entry.cookie, name, &linux::FOREVER, &attr, GENERATION)
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn fsyncdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        datasync: bool,
        reply: ReplyEmpty,
    ) {
        reply_empty(self.fs.fsync(ino.0, datasync), reply);
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        match self.fs.statfs() {
            Ok(stat) => reply.statfs(
                stat.blocks,
                stat.free,
                stat.available,
                stat.files,
                stat.files_free,
                stat.block_size,
                stat.name_max,
                stat.block_size,
            ),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn setxattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let set = linux::set_xattr(flags)
            .and_then(|how| self.fs.setxattr(ino.0, name.as_bytes(), value, how));
        reply_empty(set, reply);
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        reply_xattr(self.fs.getxattr(ino.0, name.as_bytes()), size, reply);
    }

    fn listxattr(&self, req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        reply_xattr(self.fs.listxattr(ino.0, caller(req)), size, reply);
    }

    fn removexattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        reply_empty(self.fs.removexattr(ino.0, name.as_bytes()), reply);
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        if self.mode == Mode::Quiet {
            // It makes the node, and then opens it without asking.
            return reply.error(errno(Errno::NOSYS));
        }
        let mode = linux::permissions(mode);
        let made = linux::create(
            &*self.fs,
            caller(req),
            parent.0,
            name.as_bytes(),
            mode,
            flags,
        );
        match made {
            Ok(attr) => reply.created(
                &linux::FOREVER,
                &file_attr(&attr),
                GENERATION,
                FileHandle(0),
                FopenFlags::FOPEN_KEEP_CACHE,
            ),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn ioctl(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        _cmd: u32,
        _in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(errno(Errno::NOTTY));
    }

    fn fallocate(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let kill_suid = linux::kills_suid(req.uid());
        let done = linux::allocate(mode)
            .and_then(|how| self.fs.fallocate(ino.0, how, offset, length, kill_suid));
        reply_empty(done, reply);
    }

    fn lseek(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let found = linux::seek(offset, whence)
            .and_then(|(offset, whence)| self.fs.lseek(ino.0, offset, whence));
        match found {
            Ok(found) => reply.offset(found as i64),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn copy_file_range(
        &self,
        req: &Request,
        ino_in: INodeNo,
        _fh_in: FileHandle,
        offset_in: u64,
        ino_out: INodeNo,
        _fh_out: FileHandle,
        offset_out: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let len = len.min(linux::MAX_COPY);
        let kill_suid = linux::kills_suid(req.uid());
        match self
            .fs
            .copy_file_range(ino_in.0, offset_in, ino_out.0, offset_out, len, kill_suid)
        {
            Ok(count) => reply.written(count as u32),
            Err(error) => reply.error(errno(error)),
        }
    }
}
