//! The FUSE wire format as Linux speaks it: `include/uapi/linux/fuse.h`, little-endian, version
//! 7.31 and later.
//!
//! A message comes from a guest and may be any bytes. It becomes a [`Request`], in which every
//! length, name and number was checked, before anything is done about it; only the
//! filesystem refuses it after that.

use iii_store::tree::{MAX_NAME, MAX_TARGET, MAX_XATTR_NAME, MAX_XATTR_VALUE};

use super::linux;
use crate::fs::{
    Allocate, Attr, Caller, Errno, Open, Rename, Result, Seek, SetAttr, SetTime, SetXattr, Special,
    StatFs, Time,
};
use crate::ino::Ino;

/// Bytes of the header before every request.
const IN_HEADER: usize = 40;
/// Bytes of the header before every reply.
pub const OUT_HEADER: usize = 16;
/// Bytes of an entry in a reply.
pub const ENTRY: usize = 128;
/// Bytes of attributes in a reply.
pub const ATTR_OUT: usize = 104;
/// Bytes of the reply to an open.
pub const OPEN_OUT: usize = 16;
/// Bytes of the reply to INIT.
pub const INIT_OUT: usize = 64;
/// Bytes of the reply to STATFS.
pub const STATFS_OUT: usize = 80;
/// Bytes of a reply that is one number, such as a count.
pub const NUMBER_OUT: usize = 8;
/// Bytes before the name in a listing.
const DIRENT: usize = 24;

/// Longest message that is looked at: a write with its headers, or an xattr with its name,
/// whichever is more.
pub const MAX_MESSAGE: usize = linux::MAX_IO as usize + IN_HEADER + 40;

const _: () = assert!(MAX_MESSAGE > IN_HEADER + 8 + MAX_XATTR_NAME + 1 + MAX_XATTR_VALUE);
const _: () = assert!(MAX_MESSAGE > IN_HEADER + MAX_NAME + 1 + MAX_TARGET + 1);

/// The version that is spoken.
pub const MAJOR: u32 = 7;
/// Everything that is used of later ones is negotiated by flags.
pub const MINOR: u32 = 38;
/// The first version with virtiofs.
pub const MIN_MINOR: u32 = 31;

/// Flags that INIT negotiates.
#[allow(missing_docs, reason = "they are the kernel's names")]
pub mod flags {
    pub const ASYNC_READ: u64 = 1 << 0;
    pub const EXPORT_SUPPORT: u64 = 1 << 4;
    pub const BIG_WRITES: u64 = 1 << 5;
    pub const DO_READDIRPLUS: u64 = 1 << 13;
    pub const NO_OPEN_SUPPORT: u64 = 1 << 17;
    pub const PARALLEL_DIROPS: u64 = 1 << 18;
    pub const MAX_PAGES: u64 = 1 << 22;
    pub const CACHE_SYMLINKS: u64 = 1 << 23;
    pub const NO_OPENDIR_SUPPORT: u64 = 1 << 24;
    pub const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub const INIT_EXT: u64 = 1 << 30;
}

const FOPEN_KEEP_CACHE: u32 = 1 << 1;
const FOPEN_CACHE_DIR: u32 = 1 << 3;
const WRITE_KILL_SUIDGID: u32 = 1 << 2;
const FSYNC_FDATASYNC: u32 = 1;

const FATTR_MODE: u32 = 1 << 0;
const FATTR_UID: u32 = 1 << 1;
const FATTR_GID: u32 = 1 << 2;
const FATTR_SIZE: u32 = 1 << 3;
const FATTR_ATIME: u32 = 1 << 4;
const FATTR_MTIME: u32 = 1 << 5;
const FATTR_ATIME_NOW: u32 = 1 << 7;
const FATTR_MTIME_NOW: u32 = 1 << 8;
const FATTR_KILL_SUIDGID: u32 = 1 << 11;

/// The header of every request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Length of the whole message.
    len: u32,
    opcode: u32,
    /// The number by which the reply is known.
    pub unique: u64,
    /// The inode that it is about.
    pub node: Ino,
    /// The process that asks.
    pub caller: Caller,
}

impl Header {
    /// The header of `message`, unless it is too short for one.
    pub fn parse(message: &[u8]) -> Option<Self> {
        let mut fields = Fields(message);
        let header = Self {
            len: fields.u32().ok()?,
            opcode: fields.u32().ok()?,
            unique: fields.u64().ok()?,
            node: fields.u64().ok()?,
            caller: Caller {
                uid: fields.u32().ok()?,
                gid: fields.u32().ok()?,
            },
        };
        // The process, and the length of extensions, which none were agreed on.
        fields.u64().ok()?;
        Some(header)
    }

    /// Whether the client waits for a reply.
    pub fn wants_reply(&self) -> bool {
        !matches!(
            self.opcode,
            op::FORGET | op::BATCH_FORGET | op::INTERRUPT | op::NOTIFY_REPLY
        )
    }
}

#[rustfmt::skip]
mod op {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const IOCTL: u32 = 39;
    pub const NOTIFY_REPLY: u32 = 41;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const SYNCFS: u32 = 50;
    pub const TMPFILE: u32 = 51;
}

/// Whether a message that begins with these bytes is of a kind that can take long, because it waits
/// for the disk.
pub fn waits_for_disk(beginning: &[u8; 8]) -> bool {
    let mut fields = Fields(beginning);
    let opcode = fields.u32().and_then(|_| fields.u32());
    matches!(
        opcode,
        Ok(op::FSYNC | op::FSYNCDIR | op::SYNCFS | op::COPY_FILE_RANGE | op::FALLOCATE)
    )
}

/// A request about the header's node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the trait's operations, in its words")]
pub enum Request<'a> {
    Init {
        max_readahead: u32,
        flags: u64,
    },
    Destroy,
    Lookup {
        name: &'a [u8],
    },
    Forget {
        lookups: u64,
    },
    BatchForget(Forgets<'a>),
    Getattr,
    Setattr(SetAttr),
    Readlink,
    Mknod {
        name: &'a [u8],
        mode: u16,
        special: Special,
    },
    Mkdir {
        name: &'a [u8],
        mode: u16,
    },
    Symlink {
        name: &'a [u8],
        target: &'a [u8],
    },
    Create {
        name: &'a [u8],
        mode: u16,
        flags: i32,
    },
    Tmpfile {
        mode: u16,
    },
    Unlink {
        name: &'a [u8],
    },
    Rmdir {
        name: &'a [u8],
    },
    Rename {
        name: &'a [u8],
        new_parent: Ino,
        new_name: &'a [u8],
        how: Rename,
    },
    Link {
        ino: Ino,
        new_name: &'a [u8],
    },
    Open(Open),
    Opendir,
    /// Closing, which needs nothing.
    Release,
    Read {
        offset: u64,
        size: u32,
    },
    Write {
        offset: u64,
        data: &'a [u8],
        kill_suid: bool,
    },
    Fsync {
        data_only: bool,
    },
    Syncfs,
    Readdir {
        cookie: u64,
        size: u32,
        attrs: bool,
    },
    Statfs,
    Setxattr {
        name: &'a [u8],
        value: &'a [u8],
        how: SetXattr,
    },
    /// `size` 0 asks for the length.
    Getxattr {
        name: &'a [u8],
        size: u32,
    },
    Listxattr {
        size: u32,
    },
    Removexattr {
        name: &'a [u8],
    },
    Fallocate {
        how: Allocate,
        offset: u64,
        len: u64,
    },
    Lseek {
        offset: u64,
        whence: Seek,
    },
    CopyFileRange {
        from_offset: u64,
        to: Ino,
        to_offset: u64,
        len: u64,
    },
    /// Nothing that is served waits for anything that an interrupt could end.
    Interrupt,
}

impl<'a> Request<'a> {
    /// The request in `message`, which `header` was parsed from. `ENOSYS` where it is nothing that
    /// is offered, `EINVAL` where it makes no sense.
    #[allow(clippy::too_many_lines, reason = "one arm for every request")]
    pub fn parse(header: &Header, message: &'a [u8]) -> Result<Self> {
        let body = message.get(IN_HEADER..header.len as usize);
        let mut f = Fields(body.ok_or(Errno::INVAL)?);
        let request = match header.opcode {
            op::INIT => return parse_init(f),
            op::DESTROY => Self::Destroy,
            op::LOOKUP => Self::Lookup {
                name: f.lookup_name()?,
            },
            op::FORGET => Self::Forget { lookups: f.u64()? },
            op::BATCH_FORGET => {
                let count = f.u32()?;
                f.u32()?;
                let len = (count as usize).checked_mul(Forgets::ONE);
                Self::BatchForget(Forgets(f.take(len.ok_or(Errno::INVAL)?)?))
            }
            op::GETATTR => {
                f.take(16)?;
                Self::Getattr
            }
            op::SETATTR => Self::Setattr(f.set_attr()?),
            op::READLINK => Self::Readlink,
            op::MKNOD => {
                let (mode, rdev) = (f.u32()?, f.u32()?);
                f.u64()?;
                Self::Mknod {
                    name: f.name()?,
                    mode: linux::permissions(mode),
                    special: linux::special(mode, rdev)?,
                }
            }
            op::MKDIR => {
                let mode = linux::permissions(f.u32()?);
                f.u32()?;
                let name = f.name()?;
                Self::Mkdir { name, mode }
            }
            op::SYMLINK => Self::Symlink {
                name: f.name()?,
                target: f.text(MAX_TARGET)?,
            },
            op::CREATE | op::TMPFILE => {
                let flags = f.u32()? as i32;
                let mode = linux::permissions(f.u32()?);
                f.u64()?;
                if header.opcode == op::TMPFILE {
                    // The name is the kernel's own for a nameless file.
                    f.text(MAX_NAME)?;
                    Self::Tmpfile { mode }
                } else {
                    let name = f.name()?;
                    Self::Create { name, mode, flags }
                }
            }
            op::UNLINK => Self::Unlink { name: f.name()? },
            op::RMDIR => Self::Rmdir { name: f.name()? },
            op::RENAME | op::RENAME2 => {
                let new_parent = f.u64()?;
                let mut how = Rename::Replace;
                if header.opcode == op::RENAME2 {
                    how = linux::rename(f.u32()?)?;
                    f.u32()?;
                }
                Self::Rename {
                    name: f.name()?,
                    new_parent,
                    new_name: f.name()?,
                    how,
                }
            }
            op::LINK => Self::Link {
                ino: f.u64()?,
                new_name: f.name()?,
            },
            op::OPEN => {
                let how = linux::open(f.u32()? as i32);
                f.u32()?;
                Self::Open(how)
            }
            op::OPENDIR => {
                f.u64()?;
                Self::Opendir
            }
            op::RELEASE | op::RELEASEDIR => {
                f.take(24)?;
                Self::Release
            }
            op::READ | op::READDIR | op::READDIRPLUS => {
                f.u64()?;
                let (offset, size) = (f.u64()?, f.u32()?.min(linux::MAX_IO));
                f.take(20)?;
                match header.opcode {
                    op::READ => Self::Read { offset, size },
                    opcode => Self::Readdir {
                        cookie: offset,
                        size,
                        attrs: opcode == op::READDIRPLUS,
                    },
                }
            }
            op::WRITE => {
                f.u64()?;
                let (offset, size, flags) = (f.u64()?, f.u32()?, f.u32()?);
                f.u64()?;
                f.u64()?;
                if size > linux::MAX_IO {
                    return Err(Errno::INVAL);
                }
                Self::Write {
                    offset,
                    data: f.take(size as usize)?,
                    kill_suid: flags & WRITE_KILL_SUIDGID != 0,
                }
            }
            op::FSYNC | op::FSYNCDIR => {
                f.u64()?;
                let data_only = f.u32()? & FSYNC_FDATASYNC != 0;
                f.u32()?;
                Self::Fsync { data_only }
            }
            op::SYNCFS => {
                f.u64()?;
                Self::Syncfs
            }
            op::STATFS => Self::Statfs,
            op::SETXATTR => {
                let (size, flags) = (f.u32()? as usize, f.u32()? as i32);
                let name = f.text(MAX_XATTR_NAME)?;
                if size > MAX_XATTR_VALUE {
                    return Err(Errno::TOOBIG);
                }
                Self::Setxattr {
                    name,
                    value: f.take(size)?,
                    how: linux::set_xattr(flags)?,
                }
            }
            op::GETXATTR | op::LISTXATTR => {
                let size = f.u32()?;
                f.u32()?;
                if header.opcode == op::GETXATTR {
                    let name = f.text(MAX_XATTR_NAME)?;
                    Self::Getxattr { name, size }
                } else {
                    Self::Listxattr { size }
                }
            }
            op::REMOVEXATTR => Self::Removexattr {
                name: f.text(MAX_XATTR_NAME)?,
            },
            op::FALLOCATE => {
                f.u64()?;
                let (offset, len) = (f.u64()?, f.u64()?);
                let how = linux::allocate(f.u32()? as i32)?;
                f.u32()?;
                Self::Fallocate { how, offset, len }
            }
            op::LSEEK => {
                f.u64()?;
                let (offset, whence) = linux::seek(f.u64()? as i64, f.u32()? as i32)?;
                f.u32()?;
                Self::Lseek { offset, whence }
            }
            op::COPY_FILE_RANGE => {
                f.u64()?;
                let (from_offset, to) = (f.u64()?, f.u64()?);
                f.u64()?;
                let (to_offset, len) = (f.u64()?, f.u64()?);
                if f.u64()? != 0 {
                    return Err(Errno::INVAL);
                }
                Self::CopyFileRange {
                    from_offset,
                    to,
                    to_offset,
                    len: len.min(linux::MAX_COPY),
                }
            }
            op::INTERRUPT => {
                f.u64()?;
                Self::Interrupt
            }
            op::IOCTL => return Err(Errno::NOTTY),
            _ => return Err(Errno::NOSYS),
        };
        if f.0.is_empty() {
            Ok(request)
        } else {
            Err(Errno::INVAL)
        }
    }
}

/// Later versions append to it, so the rest is not looked at.
fn parse_init(mut f: Fields<'_>) -> Result<Request<'_>> {
    let (major, minor, max_readahead) = (f.u32()?, f.u32()?, f.u32()?);
    let mut flags = u64::from(f.u32()?);
    if flags & flags::INIT_EXT != 0 {
        flags |= u64::from(f.u32()?) << 32;
    }
    if major != MAJOR || minor < MIN_MINOR {
        return Err(Errno::PROTO);
    }
    Ok(Request::Init {
        max_readahead,
        flags,
    })
}

/// The rest of a message, behind the fields that were read.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(taken)
    }

    fn u32(&mut self) -> Result<u32> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(u32::from_le_bytes(*taken))
    }

    fn u64(&mut self) -> Result<u64> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(u64::from_le_bytes(*taken))
    }

    /// Bytes up to a NUL, 1 to `max` of them.
    fn text(&mut self, max: usize) -> Result<&'a [u8]> {
        let nul = self.0.iter().position(|&byte| byte == 0);
        let text = self.take(nul.ok_or(Errno::INVAL)?)?;
        self.take(1)?;
        match text.len() {
            0 => Err(Errno::INVAL),
            len if len > max => Err(Errno::NAMETOOLONG),
            _ => Ok(text),
        }
    }

    /// The name of an entry.
    fn name(&mut self) -> Result<&'a [u8]> {
        let name = self.lookup_name()?;
        if name == b"." || name == b".." {
            return Err(Errno::INVAL);
        }
        Ok(name)
    }

    /// The name of an entry, or one of the dots, by which a kernel finds the inode of a file handle
    /// that it has forgotten.
    fn lookup_name(&mut self) -> Result<&'a [u8]> {
        let name = self.text(MAX_NAME)?;
        if name.contains(&b'/') {
            return Err(Errno::INVAL);
        }
        Ok(name)
    }

    fn set_attr(&mut self) -> Result<SetAttr> {
        let valid = self.u32()?;
        self.take(12)?;
        let size = self.u64()?;
        self.u64()?;
        let (atime, mtime) = (self.u64()?, self.u64()?);
        self.u64()?;
        let (atime_nsec, mtime_nsec) = (self.u32()?, self.u32()?);
        self.u32()?;
        let mode = self.u32()?;
        self.u32()?;
        let (uid, gid) = (self.u32()?, self.u32()?);
        self.u32()?;
        let has = |flag: u32| valid & flag != 0;
        let time = |set, now, sec: u64, nsec| match (has(set), has(now)) {
            (false, _) => Ok(None),
            (true, true) => Ok(Some(SetTime::Now)),
            (true, false) if nsec < 1_000_000_000 => {
                let sec = sec as i64;
                Ok(Some(SetTime::At(Time { sec, nsec })))
            }
            (true, false) => Err(Errno::INVAL),
        };
        Ok(SetAttr {
            mode: has(FATTR_MODE).then(|| linux::permissions(mode)),
            uid: has(FATTR_UID).then_some(uid),
            gid: has(FATTR_GID).then_some(gid),
            size: has(FATTR_SIZE).then_some(size),
            atime: time(FATTR_ATIME, FATTR_ATIME_NOW, atime, atime_nsec)?,
            mtime: time(FATTR_MTIME, FATTR_MTIME_NOW, mtime, mtime_nsec)?,
            kill_suid: has(FATTR_KILL_SUIDGID),
        })
    }
}

/// Inodes and how many lookups of each are taken back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forgets<'a>(&'a [u8]);

impl Forgets<'_> {
    const ONE: usize = 16;

    /// Each of them.
    pub fn iter(&self) -> impl Iterator<Item = (Ino, u64)> {
        self.0.chunks_exact(Self::ONE).filter_map(|one| {
            let mut fields = Fields(one);
            Some((fields.u64().ok()?, fields.u64().ok()?))
        })
    }
}

/// A reply being written. Its memory is used again for the next.
#[derive(Debug, Default)]
pub struct Reply {
    bytes: Vec<u8>,
    /// How much of `bytes` is the reply.
    len: usize,
    /// How much of it follows elsewhere.
    elsewhere: usize,
}

impl Reply {
    /// Begins a reply.
    pub fn begin(&mut self) {
        self.len = 0;
        self.elsewhere = 0;
        self.space(OUT_HEADER);
    }

    /// Ends it: with the bytes that were put in, or with an error and nothing else.
    pub fn end(&mut self, unique: u64, result: Result<()>) -> &[u8] {
        let error = match result {
            Ok(()) => 0,
            Err(error) => {
                self.len = OUT_HEADER;
                self.elsewhere = 0;
                -error.raw_os_error()
            }
        };
        let len = self.len;
        self.len = 0;
        self.u32((len + self.elsewhere) as u32);
        self.u32(error as u32);
        self.u64(unique);
        self.len = len;
        self.bytes.get(..len).unwrap_or_default()
    }

    /// Bytes put in so far, without the header.
    pub fn body(&self) -> usize {
        self.len.saturating_sub(OUT_HEADER)
    }

    /// Room for `len` more bytes, to be filled in; it holds bytes of earlier replies.
    pub fn space(&mut self, len: usize) -> &mut [u8] {
        let start = self.len;
        self.len += len;
        if self.bytes.len() < self.len {
            self.bytes.resize(self.len, 0);
        }
        &mut self.bytes[start..self.len]
    }

    /// Counts `len` bytes as part of it, which are where it goes already.
    pub fn elsewhere(&mut self, len: usize) {
        self.elsewhere = len;
    }

    /// Cuts the reply to the first `len` bytes that were put in.
    pub fn cut(&mut self, len: usize) {
        self.len = self.len.min(OUT_HEADER + len);
    }

    /// Puts in bytes as they are.
    pub fn put(&mut self, bytes: &[u8]) {
        self.space(bytes.len()).copy_from_slice(bytes);
    }

    fn u32(&mut self, value: u32) {
        self.put(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.put(&value.to_le_bytes());
    }

    /// A number, [`NUMBER_OUT`] bytes.
    pub fn number(&mut self, number: u64) {
        self.u64(number);
    }

    /// The reply to INIT.
    pub fn init(&mut self, max_readahead: u32, flags: u64) {
        self.u32(MAJOR);
        self.u32(MINOR);
        self.u32(max_readahead);
        self.u32(flags as u32);
        let congested = linux::MAX_BACKGROUND / 4 * 3;
        self.u32(u32::from(linux::MAX_BACKGROUND) | u32::from(congested) << 16);
        self.u32(linux::MAX_IO);
        // Times are kept to the nanosecond.
        self.u32(1);
        self.u32(linux::MAX_IO / 4096);
        self.u32((flags >> 32) as u32);
        self.put(&[0; INIT_OUT - 36]);
    }

    fn bare_attr(&mut self, attr: &Attr) {
        for value in [
            attr.ino,
            attr.size,
            attr.blocks,
            attr.atime.sec as u64,
            attr.mtime.sec as u64,
            attr.ctime.sec as u64,
        ] {
            self.u64(value);
        }
        for value in [
            attr.atime.nsec,
            attr.mtime.nsec,
            attr.ctime.nsec,
            linux::type_bits(attr.kind) | u32::from(attr.mode),
            attr.nlink,
            attr.uid,
            attr.gid,
            linux::encode_rdev(attr.rdev),
            linux::BLOCK,
            0,
        ] {
            self.u32(value);
        }
    }

    /// Attributes, to be kept for ever.
    pub fn attr(&mut self, attr: &Attr) {
        self.u64(linux::FOREVER.as_secs());
        self.u64(0);
        self.bare_attr(attr);
    }

    /// An entry, to be kept for ever.
    pub fn entry(&mut self, attr: &Attr) {
        // No inode number is used again while the kernel may remember it, so the generation is
        // always 0.
        for value in [
            attr.ino,
            0,
            linux::FOREVER.as_secs(),
            linux::FOREVER.as_secs(),
            0,
        ] {
            self.u64(value);
        }
        self.bare_attr(attr);
    }

    /// That there is no such entry, to be kept for ever.
    pub fn absent(&mut self) {
        for value in [0, 0, linux::FOREVER.as_secs(), 0, 0] {
            self.u64(value);
        }
        self.put(&[0; ENTRY - 40]);
    }

    /// The reply to opening a file.
    pub fn opened(&mut self) {
        self.u64(0);
        self.u64(u64::from(FOPEN_KEEP_CACHE));
    }

    /// The reply to opening a directory.
    pub fn opened_dir(&mut self) {
        self.u64(0);
        self.u64(u64::from(FOPEN_KEEP_CACHE | FOPEN_CACHE_DIR));
    }

    /// Bytes that [`Reply::dirent`] takes.
    pub fn dirent_len(name: &[u8], attrs: bool) -> usize {
        let entry = if attrs { ENTRY } else { 0 };
        entry + (DIRENT + name.len()).next_multiple_of(8)
    }

    /// One entry of a listing; in one with attributes, the entry itself comes before, and nothing
    /// but a zero for those that have none.
    pub fn dirent(&mut self, entry: &crate::fs::DirEntry<'_>, attrs: bool) {
        let end = self.len + Self::dirent_len(entry.name, attrs);
        match &entry.attr {
            Some(attr) if attrs => self.entry(attr),
            _ if attrs => self.put(&[0; ENTRY]),
            _ => {}
        }
        self.u64(entry.ino);
        self.u64(entry.cookie);
        self.u32(entry.name.len() as u32);
        self.u32(linux::type_bits(entry.kind) >> 12);
        self.put(entry.name);
        let padding = end - self.len;
        self.space(padding).fill(0);
    }

    /// The reply to STATFS.
    pub fn statfs(&mut self, stat: &StatFs) {
        for value in [
            stat.blocks,
            stat.free,
            stat.available,
            stat.files,
            stat.files_free,
        ] {
            self.u64(value);
        }
        for value in [stat.block_size, stat.name_max, stat.block_size] {
            self.u32(value);
        }
        self.put(&[0; STATFS_OUT - 52]);
    }
}
