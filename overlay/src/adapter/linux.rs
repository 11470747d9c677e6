//! Linux's numbers in the trait's words, for every adapter of the FUSE protocol.

use std::time::Duration;

use iii_store::layer::Kind;
use iii_store::tree::Rdev;

use crate::fs::{
    Allocate, Attr, Caller, Errno, Filesystem, Open, Rename, Result, Seek, SetAttr, SetXattr,
    Special,
};
use crate::ino::Ino;

/// How long the kernel may keep an answer: as long as it likes.
pub const FOREVER: Duration = Duration::from_secs(1 << 30);
/// Longest read, write or listing in one request.
pub const MAX_IO: u32 = 1 << 20;
/// Requests that the kernel sends ahead without a process waiting for them, such as readahead.
pub const MAX_BACKGROUND: u16 = 64;
/// Most bytes that one copy between files may be asked for: as many as a 32-bit answer can tell.
pub const MAX_COPY: u64 = (u32::MAX >> 1) as u64;
/// `st_blksize` of every inode, in bytes.
pub const BLOCK: u32 = 4096;

/// The kernel's 32-bit encoding of device numbers: 12 bits of major, 20 of minor.
pub fn encode_rdev(rdev: Rdev) -> u32 {
    (rdev.minor & 0xff) | (rdev.major & 0xfff) << 8 | (rdev.minor & 0xf_ff00) << 12
}

/// The inverse of [`encode_rdev`].
pub fn decode_rdev(rdev: u32) -> Rdev {
    Rdev {
        major: rdev >> 8 & 0xfff,
        minor: (rdev & 0xff) | (rdev >> 12 & 0xf_ff00),
    }
}

// From `include/uapi/linux/{stat,fs,falloc}.h`: the guest's numbers, also where the host is no
// Linux.
const S_IFMT: u32 = 0o170_000;
const S_IFSOCK: u32 = 0o140_000;
const S_IFLNK: u32 = 0o120_000;
const S_IFREG: u32 = 0o100_000;
const S_IFBLK: u32 = 0o060_000;
const S_IFDIR: u32 = 0o040_000;
const S_IFCHR: u32 = 0o020_000;
const S_IFIFO: u32 = 0o010_000;
const RENAME_NOREPLACE: u32 = 1;
const RENAME_EXCHANGE: u32 = 2;
const RENAME_WHITEOUT: u32 = 4;
const XATTR_CREATE: i32 = 1;
const XATTR_REPLACE: i32 = 2;
const FALLOC_FL_KEEP_SIZE: i32 = 1;
const FALLOC_FL_PUNCH_HOLE: i32 = 2;
const FALLOC_FL_ZERO_RANGE: i32 = 0x10;
const SEEK_DATA: i32 = 3;
const SEEK_HOLE: i32 = 4;
const O_ACCMODE: i32 = 3;
const O_RDONLY: i32 = 0;
const O_WRONLY: i32 = 1;
const O_EXCL: i32 = 0o200;
const O_TRUNC: i32 = 0o1000;

/// The bits of `S_IFMT`.
pub fn type_bits(kind: Kind) -> u32 {
    match kind {
        Kind::Dir => S_IFDIR,
        Kind::File | Kind::Whiteout => S_IFREG,
        Kind::Symlink => S_IFLNK,
        Kind::Fifo => S_IFIFO,
        Kind::Socket => S_IFSOCK,
        Kind::Char => S_IFCHR,
        Kind::Block => S_IFBLK,
    }
}

/// `mode & 07777`.
pub fn permissions(mode: u32) -> u16 {
    (mode & 0o7777) as u16
}

/// The node that `mknod` is to make.
pub fn special(mode: u32, rdev: u32) -> Result<Special> {
    Ok(match mode & S_IFMT {
        0 | S_IFREG => Special::File,
        S_IFIFO => Special::Fifo,
        S_IFSOCK => Special::Socket,
        S_IFCHR => Special::Char(decode_rdev(rdev)),
        S_IFBLK => Special::Block(decode_rdev(rdev)),
        _ => return Err(Errno::INVAL),
    })
}

/// The flags of `renameat2`.
pub fn rename(flags: u32) -> Result<Rename> {
    Ok(match flags {
        0 => Rename::Replace,
        RENAME_NOREPLACE => Rename::NoReplace,
        RENAME_EXCHANGE => Rename::Exchange,
        RENAME_WHITEOUT => Rename::Whiteout,
        _ => return Err(Errno::INVAL),
    })
}

/// The flags of `setxattr`.
pub fn set_xattr(flags: i32) -> Result<SetXattr> {
    Ok(match flags {
        0 => SetXattr::Set,
        XATTR_CREATE => SetXattr::Create,
        XATTR_REPLACE => SetXattr::Replace,
        _ => return Err(Errno::INVAL),
    })
}

/// The mode of `fallocate`.
pub fn allocate(mode: i32) -> Result<Allocate> {
    const KEEP: i32 = FALLOC_FL_KEEP_SIZE;
    const PUNCH_KEEP: i32 = FALLOC_FL_PUNCH_HOLE | KEEP;
    const ZERO: i32 = FALLOC_FL_ZERO_RANGE;
    const ZERO_KEEP: i32 = ZERO | KEEP;
    Ok(match mode {
        0 => Allocate::Grow,
        KEEP => Allocate::KeepSize,
        PUNCH_KEEP => Allocate::PunchHole,
        ZERO => Allocate::ZeroGrow,
        ZERO_KEEP => Allocate::ZeroKeepSize,
        _ => return Err(Errno::OPNOTSUPP),
    })
}

/// Offset and whence of an `lseek` that the kernel cannot answer itself.
pub fn seek(offset: i64, whence: i32) -> Result<(u64, Seek)> {
    let whence = match whence {
        SEEK_DATA => Seek::Data,
        SEEK_HOLE => Seek::Hole,
        _ => return Err(Errno::INVAL),
    };
    let offset = u64::try_from(offset).map_err(|_| Errno::NXIO)?;
    Ok((offset, whence))
}

/// The meaning of a SETATTR from a kernel that leaves setuid and setgid to the filesystem. One that
/// changes nothing it sends before a write, `fallocate` or `copy_file_range`, and for a `chown`
/// that names no owner, when setuid, setgid or capabilities have to go. The attributes of the
/// answer take the place of those that it keeps, so nothing stale is left of the mode.
pub fn set_attr(set: SetAttr) -> SetAttr {
    SetAttr {
        kill_suid: set.kill_suid || set == SetAttr::default(),
        ..set
    }
}

/// Whether a write by this caller takes setuid and setgid away, where the kernel does not say.
pub fn kills_suid(uid: u32) -> bool {
    uid != 0
}

/// The flags of `open`.
pub fn open(flags: i32) -> Open {
    let access = flags & O_ACCMODE;
    Open {
        read: access != O_WRONLY,
        write: access != O_RDONLY,
        truncate: flags & O_TRUNC != 0,
    }
}

/// `open` with `O_CREAT`: makes the file, or opens the one that is there unless `O_EXCL` forbids
/// it. Counts as one lookup.
pub fn create<F: Filesystem + ?Sized>(
    fs: &F,
    caller: Caller,
    parent: Ino,
    name: &[u8],
    mode: u16,
    flags: i32,
) -> Result<Attr> {
    match fs.mknod(caller, parent, name, mode, Special::File) {
        Err(Errno::EXIST) if flags & O_EXCL == 0 => {
            let attr = fs.lookup(parent, name)?;
            fs.open(attr.ino, open(flags))
                .inspect_err(|_| fs.forget(attr.ino, 1))?;
            Ok(attr)
        }
        made => made,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers() {
        for (major, minor, encoded) in [
            (0, 0, 0),
            (1, 3, 0x103),
            (0xfff, 0xf_ffff, 0xffff_ffff),
            (8, 256, 0x10_0800),
        ] {
            let rdev = Rdev { major, minor };
            assert_eq!(encode_rdev(rdev), encoded);
            assert_eq!(decode_rdev(encoded), rdev);
        }
    }
}
