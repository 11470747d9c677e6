//! Serving a microVM from the process that runs it, by `msb_krun`, which parses the wire format.
//!
//! The guest's kernel is the only client, and is told to keep all that it learns, as in
//! [`fuse`](super::fuse). Two things differ:
//!
//! - Opening a file is a request in every [`Mode`]. `msb_krun` 0.1 always tells the kernel that an
//!   open also truncates, and a kernel that need not open files then never says that one was
//!   truncated. Opening a directory needs no request.
//! - `msb_krun` moves file data between the guest and a file of the host's, so bytes pass through
//!   one in memory.
//!
//! # `/.iii`
//!
//! The root has a directory [`RESERVED`] that is in no layer, in no listing and in no fact: it
//! holds the guest's init, which the kernel executes before anything can be mounted. Its inodes are
//! the adapter's, read-only, and unknown to the filesystem. A file of that name in a layer cannot
//! be seen.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::AtomicI32;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use iii_store::layer::Kind;
use memmap2::MmapMut;
use msb_krun_devices::virtio::bindings::{stat64, statvfs64};
use msb_krun_devices::virtio::fs::dyn_filesystem::{AddDirEntry, AddDirEntryPlus, DynFileSystem};
use msb_krun_devices::virtio::fs::filesystem::{
    Context, DirEntry, Entry, Extensions, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SetattrValid, ZeroCopyReader, ZeroCopyWriter,
};
use msb_krun_devices::virtio::linux_errno::linux_error;

use super::Mode;
use super::linux::{self, FOREVER, MAX_COPY, MAX_IO};
use crate::fs::{Attr, Caller, Errno, Filesystem, ReadTo, SetAttr, SetTime, Time};
use crate::ino::{FIRST_LOWER, Ino, ROOT};

/// The name, in the root, of the directory that the adapter adds.
pub const RESERVED: &str = ".iii";
/// Where the guest's kernel finds its init.
pub const INIT_PATH: &str = "/.iii/init";

const INIT: &[u8] = b"init";
/// Numbers that the overlay leaves to adapters.
const RESERVED_INO: Ino = FIRST_LOWER - 1;
const INIT_INO: Ino = FIRST_LOWER - 2;

/// A filesystem as `msb_krun` serves it, with `init` as the guest's init.
pub struct Krun<F> {
    fs: Arc<F>,
    mode: Mode,
    init: &'static [u8],
    scratch: Mutex<Scratch>,
}

impl<F: Filesystem> Krun<F> {
    /// Serves `fs`. A request's data passes through memory, or where the host has no files in
    /// memory through one without a name in the directory `scratch`. Fails where the
    /// host has neither.
    pub fn new(fs: Arc<F>, mode: Mode, init: &'static [u8], scratch: &Path) -> io::Result<Self> {
        Ok(Self {
            fs,
            mode,
            init,
            scratch: Mutex::new(Scratch::new(scratch)?),
        })
    }

    fn reserved(&self, ino: Ino) -> Option<Attr> {
        let (kind, mode, size) = match ino {
            RESERVED_INO => (Kind::Dir, 0o555, 0),
            INIT_INO => (Kind::File, 0o555, self.init.len() as u64),
            _ => return None,
        };
        Some(Attr {
            ino,
            kind,
            mode,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: iii_store::tree::Rdev::default(),
            size,
            blocks: size.div_ceil(512),
            atime: Time::default(),
            mtime: Time::default(),
            ctime: Time::default(),
            btime: Time::default(),
        })
    }

    /// The reserved inode that `name` leads to, if it leads to one or is looked for where only
    /// those are.
    fn reserved_entry(&self, parent: Ino, name: &[u8]) -> Option<Result<Attr, Errno>> {
        let ino = match (parent, name) {
            (ROOT, name) if name == RESERVED.as_bytes() => RESERVED_INO,
            (RESERVED_INO, INIT) => INIT_INO,
            (RESERVED_INO | INIT_INO, b".") => parent,
            (RESERVED_INO, _) => return Some(Err(Errno::NOENT)),
            (INIT_INO, _) => return Some(Err(Errno::NOTDIR)),
            _ => return None,
        };
        self.reserved(ino).map(Ok)
    }

    /// Refuses to change a reserved inode.
    fn writable(&self, ino: Ino) -> io::Result<Ino> {
        match self.reserved(ino) {
            Some(_) => Err(error(Errno::ROFS)),
            None => Ok(ino),
        }
    }

    /// Refuses to make, remove or replace a reserved entry.
    fn changeable<'a>(&self, parent: Ino, name: &'a CStr) -> io::Result<(Ino, &'a [u8])> {
        let name = checked(name)?;
        match self.reserved_entry(parent, name) {
            Some(_) => Err(error(Errno::ROFS)),
            None => Ok((parent, name)),
        }
    }
}

/// An error as the guest understands it.
fn error(errno: Errno) -> io::Error {
    guest_error(io::Error::from_raw_os_error(errno.raw_os_error()))
}

/// An error with Linux's number, which the host's may not be.
fn guest_error(error: io::Error) -> io::Error {
    if cfg!(target_os = "linux") && error.raw_os_error().is_some() {
        return error;
    }
    linux_error(error)
}

/// A name as the guest's kernel would send it, if it is its own master.
fn checked(name: &CStr) -> io::Result<&[u8]> {
    let name = name.to_bytes();
    if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') {
        return Err(error(Errno::INVAL));
    }
    Ok(name)
}

fn caller(context: Context) -> Caller {
    Caller {
        uid: context.uid,
        gid: context.gid,
    }
}

// The struct's fields are of other types on other hosts.
#[allow(clippy::unnecessary_cast)]
fn stat(attr: &Attr) -> stat64 {
    // SAFETY: the struct is made of integers alone.
    let mut stat: stat64 = unsafe { std::mem::zeroed() };
    stat.st_ino = attr.ino;
    stat.st_mode = (linux::type_bits(attr.kind) | u32::from(attr.mode)) as _;
    stat.st_nlink = attr.nlink as _;
    stat.st_uid = attr.uid;
    stat.st_gid = attr.gid;
    stat.st_rdev = linux::encode_rdev(attr.rdev) as _;
    stat.st_size = attr.size as _;
    stat.st_blocks = attr.blocks as _;
    stat.st_blksize = linux::BLOCK as _;
    stat.st_atime = attr.atime.sec;
    stat.st_atime_nsec = i64::from(attr.atime.nsec);
    stat.st_mtime = attr.mtime.sec;
    stat.st_mtime_nsec = i64::from(attr.mtime.nsec);
    stat.st_ctime = attr.ctime.sec;
    stat.st_ctime_nsec = i64::from(attr.ctime.nsec);
    stat
}

fn entry(attr: &Attr) -> Entry {
    Entry {
        inode: attr.ino,
        generation: 0,
        attr: stat(attr),
        attr_flags: 0,
        attr_timeout: FOREVER,
        entry_timeout: FOREVER,
    }
}

/// The entry of an absent name, for the kernel to remember; in a listing, a mark that it is to
/// keep the name alone.
fn no_entry() -> Entry {
    Entry {
        inode: 0,
        generation: 0,
        // SAFETY: the struct is made of integers alone.
        attr: unsafe { std::mem::zeroed() },
        attr_flags: 0,
        attr_timeout: FOREVER,
        entry_timeout: FOREVER,
    }
}

fn made(attr: Result<Attr, Errno>) -> io::Result<Entry> {
    attr.map(|attr| entry(&attr)).map_err(error)
}

fn set_time(
    valid: SetattrValid,
    set: SetattrValid,
    now: SetattrValid,
    time: Time,
) -> Option<SetTime> {
    if valid.contains(now) {
        Some(SetTime::Now)
    } else {
        valid.contains(set).then_some(SetTime::At(time))
    }
}

fn xattr(value: Vec<u8>, size: u32) -> io::Result<Option<Vec<u8>>> {
    match size {
        0 => Ok(None),
        size if value.len() > size as usize => Err(error(Errno::RANGE)),
        _ => Ok(Some(value)),
    }
}

impl<F: Filesystem> DynFileSystem for Krun<F> {
    fn init(&self, _capable: FsOptions) -> io::Result<FsOptions> {
        let mut wanted = FsOptions::HANDLE_KILLPRIV_V2
            | FsOptions::CACHE_SYMLINKS
            | FsOptions::PARALLEL_DIROPS
            | FsOptions::EXPORT_SUPPORT;
        if self.mode == Mode::Quiet {
            wanted |= FsOptions::DO_READDIRPLUS
                | FsOptions::READDIRPLUS_AUTO
                | FsOptions::ZERO_MESSAGE_OPENDIR;
        }
        Ok(wanted)
    }

    fn lookup(&self, _: Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        let name = match name.to_bytes() {
            // How a kernel finds the inode of a file handle that it has forgotten.
            dots @ (b"." | b"..") => dots,
            _ => checked(name)?,
        };
        let found = match self.reserved_entry(parent, name) {
            Some(reserved) => reserved,
            None => self.fs.lookup(parent, name),
        };
        match found {
            Err(Errno::NOENT) => Ok(no_entry()),
            found => made(found),
        }
    }

    fn forget(&self, _: Context, inode: u64, count: u64) {
        if self.reserved(inode).is_none() {
            self.fs.forget(inode, count);
        }
    }

    fn getattr(&self, _: Context, inode: u64, _: Option<u64>) -> io::Result<(stat64, Duration)> {
        let attr = match self.reserved(inode) {
            Some(attr) => attr,
            None => self.fs.getattr(inode).map_err(error)?,
        };
        Ok((stat(&attr), FOREVER))
    }

    fn setattr(
        &self,
        _: Context,
        inode: u64,
        attr: stat64,
        _: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        let has = |flag| valid.contains(flag);
        let time = |sec, nsec| Time {
            sec,
            nsec: nsec as u32,
        };
        // The guest may send any number as nanoseconds.
        let times = [
            (attr.st_atime_nsec, SetattrValid::ATIME),
            (attr.st_mtime_nsec, SetattrValid::MTIME),
        ];
        if times
            .into_iter()
            .any(|(nsec, flag)| has(flag) && !(0..1_000_000_000).contains(&nsec))
        {
            return Err(error(Errno::INVAL));
        }
        let set = SetAttr {
            // It has 16 bits on some hosts.
            #[allow(clippy::unnecessary_cast)]
            mode: has(SetattrValid::MODE).then(|| linux::permissions(attr.st_mode as u32)),
            uid: has(SetattrValid::UID).then_some(attr.st_uid),
            gid: has(SetattrValid::GID).then_some(attr.st_gid),
            size: has(SetattrValid::SIZE).then_some(attr.st_size as u64),
            atime: set_time(
                valid,
                SetattrValid::ATIME,
                SetattrValid::ATIME_NOW,
                time(attr.st_atime, attr.st_atime_nsec),
            ),
            mtime: set_time(
                valid,
                SetattrValid::MTIME,
                SetattrValid::MTIME_NOW,
                time(attr.st_mtime, attr.st_mtime_nsec),
            ),
            kill_suid: has(SetattrValid::KILL_SUIDGID),
        };
        let inode = self.writable(inode)?;
        let set = linux::set_attr(set);
        let attr = self.fs.setattr(inode, &set).map_err(error)?;
        Ok((stat(&attr), FOREVER))
    }

    fn readlink(&self, _: Context, inode: u64) -> io::Result<Vec<u8>> {
        self.fs.readlink(inode).map_err(error)
    }

    fn symlink(
        &self,
        context: Context,
        target: &CStr,
        parent: u64,
        name: &CStr,
        _: Extensions,
    ) -> io::Result<Entry> {
        let (parent, name) = self.changeable(parent, name)?;
        let target = target.to_bytes();
        made(self.fs.symlink(caller(context), parent, name, target))
    }

    fn mknod(
        &self,
        context: Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
        _: u32,
        _: Extensions,
    ) -> io::Result<Entry> {
        let (parent, name) = self.changeable(parent, name)?;
        let special = linux::special(mode, rdev).map_err(error)?;
        let mode = linux::permissions(mode);
        made(self.fs.mknod(caller(context), parent, name, mode, special))
    }

    fn mkdir(
        &self,
        context: Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        _: u32,
        _: Extensions,
    ) -> io::Result<Entry> {
        let (parent, name) = self.changeable(parent, name)?;
        let mode = linux::permissions(mode);
        made(self.fs.mkdir(caller(context), parent, name, mode))
    }

    fn unlink(&self, _: Context, parent: u64, name: &CStr) -> io::Result<()> {
        let (parent, name) = self.changeable(parent, name)?;
        self.fs.unlink(parent, name).map_err(error)
    }

    fn rmdir(&self, _: Context, parent: u64, name: &CStr) -> io::Result<()> {
        let (parent, name) = self.changeable(parent, name)?;
        self.fs.rmdir(parent, name).map_err(error)
    }

    fn rename(
        &self,
        _: Context,
        parent: u64,
        name: &CStr,
        new_parent: u64,
        new_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        let (parent, name) = self.changeable(parent, name)?;
        let (new_parent, new_name) = self.changeable(new_parent, new_name)?;
        let how = linux::rename(flags).map_err(error)?;
        let renamed = self.fs.rename(parent, name, new_parent, new_name, how);
        renamed.map_err(error)
    }

    fn link(&self, _: Context, inode: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        let inode = self.writable(inode)?;
        let (parent, name) = self.changeable(parent, name)?;
        made(self.fs.link(inode, parent, name))
    }

    fn open(
        &self,
        _: Context,
        inode: u64,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        let how = linux::open(flags as i32);
        if self.reserved(inode).is_some() {
            if how.write || how.truncate {
                return Err(error(Errno::ROFS));
            }
        } else {
            self.fs.open(inode, how).map_err(error)?;
            if how.truncate && kill_priv {
                // The open has emptied the file already; this takes its privileges.
                let set = SetAttr {
                    size: Some(0),
                    kill_suid: true,
                    ..SetAttr::default()
                };
                self.fs.setattr(inode, &set).map_err(error)?;
            }
        }
        Ok((None, OpenOptions::KEEP_CACHE))
    }

    fn create(
        &self,
        context: Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        _: bool,
        flags: u32,
        _: u32,
        _: Extensions,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions)> {
        let (parent, name) = self.changeable(parent, name)?;
        let mode = linux::permissions(mode);
        let flags = flags as i32;
        let attr = linux::create(&*self.fs, caller(context), parent, name, mode, flags);
        Ok((made(attr)?, None, OpenOptions::KEEP_CACHE))
    }

    fn read(
        &self,
        _: Context,
        inode: u64,
        _: u64,
        to: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _: Option<u64>,
        _: u32,
    ) -> io::Result<usize> {
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let size = scratch.bytes(size).len();
        let count = match self.reserved(inode) {
            Some(attr) if attr.kind == Kind::Dir => return Err(error(Errno::ISDIR)),
            Some(_) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX);
                let rest = self.init.get(start..).unwrap_or_default();
                let count = rest.len().min(size);
                scratch.bytes(count as u32).copy_from_slice(&rest[..count]);
                count
            }
            None => {
                let mut body = Body {
                    scratch: &mut scratch,
                    to: &mut *to,
                    sent: None,
                };
                let read = self.fs.read_to(inode, &mut body, offset, size);
                match body.sent {
                    Some(sent) => return sent.map_err(guest_error),
                    None => read.map_err(error)?,
                }
            }
        };
        send(to, &scratch.file, count, 0).map_err(guest_error)
    }

    fn write(
        &self,
        _: Context,
        inode: u64,
        _: u64,
        from: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        _: Option<u64>,
        _: bool,
        kill_priv: bool,
        _: u32,
    ) -> io::Result<usize> {
        let inode = self.writable(inode)?;
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let size = scratch.bytes(size).len();
        let mut come = 0;
        while come < size {
            match from.read_to(&scratch.file, size - come, come as u64) {
                // The guest sent less than it said.
                Ok(0) => break,
                Ok(moved) => come += moved,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(guest_error(error)),
            }
        }
        let data = &scratch.bytes(size as u32)[..come];
        self.fs.write(inode, data, offset, kill_priv).map_err(error)
    }

    fn fsync(&self, _: Context, inode: u64, datasync: bool, _: u64) -> io::Result<()> {
        match self.reserved(inode) {
            Some(_) => Ok(()),
            None => self.fs.fsync(inode, datasync).map_err(error),
        }
    }

    fn fallocate(
        &self,
        context: Context,
        inode: u64,
        _: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        let inode = self.writable(inode)?;
        let how = linux::allocate(mode as i32).map_err(error)?;
        let kill_suid = linux::kills_suid(context.uid);
        self.fs
            .fallocate(inode, how, offset, length, kill_suid)
            .map_err(error)
    }

    fn release(
        &self,
        _: Context,
        _: u64,
        _: u32,
        _: u64,
        _: bool,
        _: bool,
        _: Option<u64>,
    ) -> io::Result<()> {
        Ok(())
    }

    fn statfs(&self, _: Context, _: u64) -> io::Result<statvfs64> {
        let stat = self.fs.statfs().map_err(error)?;
        // SAFETY: the struct is made of integers alone.
        let mut out: statvfs64 = unsafe { std::mem::zeroed() };
        out.f_bsize = stat.block_size.into();
        out.f_frsize = stat.block_size.into();
        out.f_blocks = stat.blocks as _;
        out.f_bfree = stat.free as _;
        out.f_bavail = stat.available as _;
        out.f_files = stat.files as _;
        out.f_ffree = stat.files_free as _;
        out.f_namemax = stat.name_max.into();
        Ok(out)
    }

    fn setxattr(
        &self,
        _: Context,
        inode: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        let inode = self.writable(inode)?;
        let how = linux::set_xattr(flags as i32).map_err(error)?;
        let set = self.fs.setxattr(inode, name.to_bytes(), value, how);
        set.map_err(error)
    }

    fn getxattr(
        &self,
        _: Context,
        inode: u64,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        let value = match self.reserved(inode) {
            Some(_) => return Err(error(Errno::NODATA)),
            None => self.fs.getxattr(inode, name.to_bytes()).map_err(error)?,
        };
        let length = value.len() as u32;
        let value = xattr(value, size)?;
        Ok(value.map_or(GetxattrReply::Count(length), GetxattrReply::Value))
    }

    fn listxattr(&self, context: Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        let names = match self.reserved(inode) {
            Some(_) => Vec::new(),
            None => self.fs.listxattr(inode, caller(context)).map_err(error)?,
        };
        let length = names.len() as u32;
        let names = xattr(names, size)?;
        Ok(names.map_or(ListxattrReply::Count(length), ListxattrReply::Names))
    }

    fn removexattr(&self, _: Context, inode: u64, name: &CStr) -> io::Result<()> {
        let inode = self.writable(inode)?;
        self.fs.removexattr(inode, name.to_bytes()).map_err(error)
    }

    fn opendir(&self, _: Context, _: u64, _: u32) -> io::Result<(Option<u64>, OpenOptions)> {
        match self.mode {
            Mode::Quiet => Err(error(Errno::NOSYS)),
            Mode::Observed => Ok((None, OpenOptions::KEEP_CACHE | OpenOptions::CACHE_DIR)),
        }
    }

    fn readdir_for_each(
        &self,
        _: Context,
        inode: u64,
        _: u64,
        _: u32,
        offset: u64,
        add: &mut AddDirEntry<'_>,
    ) -> io::Result<()> {
        self.list(inode, offset, false, &mut |entry, _| add(entry))
    }

    fn readdirplus_for_each(
        &self,
        _: Context,
        inode: u64,
        _: u64,
        _: u32,
        offset: u64,
        add: &mut AddDirEntryPlus<'_>,
    ) -> io::Result<()> {
        self.list(inode, offset, true, &mut |listed, attr| {
            // The kernel takes number and type of `.` and `..`, and nothing else.
            add(listed, attr.map_or_else(no_entry, entry))
        })
    }

    fn fsyncdir(
        &self,
        context: Context,
        inode: u64,
        datasync: bool,
        handle: u64,
    ) -> io::Result<()> {
        self.fsync(context, inode, datasync, handle)
    }

    fn releasedir(&self, _: Context, _: u64, _: u32, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn lseek(&self, _: Context, inode: u64, _: u64, offset: u64, whence: u32) -> io::Result<u64> {
        let (offset, whence) = linux::seek(offset as i64, whence as i32).map_err(error)?;
        self.fs.lseek(inode, offset, whence).map_err(error)
    }

    fn copyfilerange(
        &self,
        context: Context,
        inode_in: u64,
        _: u64,
        offset_in: u64,
        inode_out: u64,
        _: u64,
        offset_out: u64,
        len: u64,
        _: u64,
    ) -> io::Result<usize> {
        let inode_out = self.writable(inode_out)?;
        let len = len.min(MAX_COPY);
        let kill_suid = linux::kills_suid(context.uid);
        let copied = self
            .fs
            .copy_file_range(inode_in, offset_in, inode_out, offset_out, len, kill_suid);
        copied.map(|count| count as usize).map_err(error)
    }

    fn ioctl(
        &self,
        _: Context,
        _: u64,
        _: u64,
        _: u32,
        _: u32,
        _: u64,
        _: u32,
        _: u32,
        _: &Arc<AtomicI32>,
    ) -> io::Result<Vec<u8>> {
        Err(error(Errno::NOTTY))
    }
}

impl<F: Filesystem> Krun<F> {
    /// Hands the entries of a directory to `add` until it takes no more.
    fn list(
        &self,
        inode: Ino,
        offset: u64,
        attrs: bool,
        add: &mut dyn FnMut(DirEntry<'_>, Option<&Attr>) -> io::Result<usize>,
    ) -> io::Result<()> {
        if self.reserved(inode).is_some() {
            return Ok(());
        }
        let mut failed = None;
        let listed = self.fs.readdir(inode, offset, attrs, &mut |entry| {
            let listed = DirEntry {
                ino: entry.ino,
                offset: entry.cookie,
                type_: linux::type_bits(entry.kind) >> 12,
                name: entry.name,
            };
            match add(listed, entry.attr.as_ref()) {
                Ok(taken) => taken > 0,
                Err(error) => {
                    failed = Some(error);
                    false
                }
            }
        });
        match failed {
            Some(error) => Err(guest_error(error)),
            None => listed.map_err(error),
        }
    }
}

/// Where a read goes: from a file of the host's to the guest without a look, or through memory.
struct Body<'a> {
    scratch: &'a mut Scratch,
    to: &'a mut dyn ZeroCopyWriter,
    /// The result of a transfer from a file.
    sent: Option<io::Result<usize>>,
}

impl ReadTo for Body<'_> {
    fn memory(&mut self, size: usize) -> &mut [u8] {
        self.scratch.bytes(size as u32)
    }

    fn file(&mut self, file: &File, offset: u64, size: usize) -> io::Result<usize> {
        let sent = send(self.to, file, size, offset);
        let count = sent.as_ref().map_or(0, |count| *count);
        self.sent = Some(sent);
        Ok(count)
    }
}

/// Sends `size` bytes at `offset` of a file; less where it ends, or where the guest has no room for
/// what it asked for.
fn send(to: &mut dyn ZeroCopyWriter, file: &File, size: usize, offset: u64) -> io::Result<usize> {
    let mut sent = 0;
    while sent < size {
        match to.write_from(file, size - sent, offset.saturating_add(sent as u64)) {
            Ok(0) => break,
            Ok(moved) => sent += moved,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
            Err(error) => return Err(error),
        }
    }
    Ok(sent)
}

/// A file in memory that a request's data passes through, and its bytes.
struct Scratch {
    file: File,
    map: MmapMut,
}

impl Scratch {
    fn new(dir: &Path) -> io::Result<Self> {
        let file = memory(dir)?;
        file.set_len(u64::from(MAX_IO))?;
        // SAFETY: the file has no name, so no other process can shorten or change it; its contents
        // are bytes.
        let map = unsafe { MmapMut::map_mut(&file)? };
        Ok(Self { file, map })
    }

    /// The first `size` bytes, or as many as one request may have.
    fn bytes(&mut self, size: u32) -> &mut [u8] {
        &mut self.map[..size.min(MAX_IO) as usize]
    }
}

#[cfg(target_os = "linux")]
fn memory(_: &Path) -> io::Result<File> {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    Ok(rustix::fs::memfd_create("iii-krun", flags)?.into())
}

/// One without a name is as good as cached.
#[cfg(not(target_os = "linux"))]
fn memory(dir: &Path) -> io::Result<File> {
    tempfile::tempfile_in(dir)
}
