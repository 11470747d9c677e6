//! The filesystem contract that every adapter serves.
//!
//! Synchronous, `&self`, callable from any number of threads. No file handles: an inode
//! lives as long as the kernel remembers it, which [`Filesystem::forget`] ends, so a handle would
//! say nothing that the inode does not. Names and targets are raw bytes. Permissions are the
//! kernel's to check (`default_permissions`); everything else that POSIX says about an operation is
//! done here.

mod attr;
mod dir;
mod file;
mod serve;

use std::fs::File;
use std::io;

pub use iii_store::layer::Kind;
pub use iii_store::tree::Rdev;

use crate::ino::Ino;
pub use crate::posix::{Allocate, Errno, Result, Time};

/// The result of `stat`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attr {
    /// Inode number.
    pub ino: Ino,
    /// Its type; never [`Kind::Whiteout`].
    pub kind: Kind,
    /// `mode & 07777`.
    pub mode: u16,
    /// Number of names; for a directory 2 and one for every directory in it.
    pub nlink: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number.
    pub rdev: Rdev,
    /// Length in bytes.
    pub size: u64,
    /// Blocks of 512 bytes.
    pub blocks: u64,
    /// Last access: the time of creation or one that was set; reading does not change it.
    pub atime: Time,
    /// Last change of the contents.
    pub mtime: Time,
    /// Last change of the inode.
    pub ctime: Time,
    /// Creation.
    pub btime: Time,
}

/// The process that asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Caller {
    /// Filesystem uid.
    pub uid: u32,
    /// Filesystem gid.
    pub gid: u32,
}

/// A time to set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SetTime {
    /// The time of the operation.
    Now,
    /// This time.
    At(Time),
}

/// Attributes to change; `None` stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SetAttr {
    /// `mode & 07777`.
    pub mode: Option<u16>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
    /// Length.
    pub size: Option<u64>,
    /// Last access.
    pub atime: Option<SetTime>,
    /// Last change of the contents.
    pub mtime: Option<SetTime>,
    /// Whether setuid and setgid go, as the caller is about to change the contents and lacks
    /// `CAP_FSETID`.
    pub kill_suid: bool,
}

/// A node to make that is neither a directory nor a symlink.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Special {
    /// A regular file, empty.
    File,
    /// A named pipe.
    Fifo,
    /// A Unix socket.
    Socket,
    /// A character device.
    Char(Rdev),
    /// A block device.
    Block(Rdev),
}

/// How `rename` treats an entry that is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Rename {
    /// Replaces the target.
    #[default]
    Replace,
    /// Fails if the target exists.
    NoReplace,
    /// Swaps source and target.
    Exchange,
    /// Replaces the target and leaves a whiteout, a character device 0:0, at the source.
    Whiteout,
}

/// The purpose of an `open`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Open {
    /// To read.
    pub read: bool,
    /// To write.
    pub write: bool,
    /// To empty it.
    pub truncate: bool,
}

/// Whether `setxattr` may make or replace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SetXattr {
    /// Either.
    #[default]
    Set,
    /// It must not exist.
    Create,
    /// It must exist.
    Replace,
}

/// Where `lseek` is to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seek {
    /// The next data.
    Data,
    /// The next hole.
    Hole,
}

/// An entry of a directory listing.
#[derive(Debug, Clone, Copy)]
pub struct DirEntry<'a> {
    /// Inode number.
    pub ino: Ino,
    /// Its type.
    pub kind: Kind,
    /// Its name.
    pub name: &'a [u8],
    /// Where to go on after it.
    pub cookie: u64,
    /// Its attributes, if they were asked for. Not for `.` and `..`. Taking the entry then counts
    /// as a lookup.
    pub attr: Option<Attr>,
}

/// The result of `statfs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StatFs {
    /// Size of a block.
    pub block_size: u32,
    /// Blocks in all.
    pub blocks: u64,
    /// Free blocks.
    pub free: u64,
    /// Free blocks for those without privileges.
    pub available: u64,
    /// Inodes in all.
    pub files: u64,
    /// Free inodes.
    pub files_free: u64,
    /// Longest name.
    pub name_max: u32,
}

/// Where a read goes. It comes by one of these, called once at most.
pub trait ReadTo {
    /// Memory for `size` bytes. The bytes that were read begin there.
    fn memory(&mut self, size: usize) -> &mut [u8];
    /// Reads up to `size` bytes at `offset` of a file of the host; less only at its end.
    fn file(&mut self, file: &File, offset: u64, size: usize) -> io::Result<usize>;
}

/// A filesystem.
///
/// `lookup`, everything that makes a node, `link`, and entries with attributes that a `readdir`
/// sink took each count as one lookup of that inode; the inode stays valid until `forget` has taken
/// all of them back, whatever becomes of its names. Operations on an inode that is not known fail
/// with `ESTALE`.
pub trait Filesystem: Send + Sync {
    /// The entry called `name`.
    fn lookup(&self, parent: Ino, name: &[u8]) -> Result<Attr>;
    /// Takes back `lookups` lookups.
    fn forget(&self, ino: Ino, lookups: u64);
    /// Takes back all lookups: the kernel that made them has gone.
    fn forget_all(&self);
    /// The attributes.
    fn getattr(&self, ino: Ino) -> Result<Attr>;
    /// Changes attributes, all or none of them.
    fn setattr(&self, ino: Ino, set: &SetAttr) -> Result<Attr>;
    /// A symlink's target.
    fn readlink(&self, ino: Ino) -> Result<Vec<u8>>;
    /// Makes a file, pipe, socket or device.
    fn mknod(
        &self,
        caller: Caller,
        parent: Ino,
        name: &[u8],
        mode: u16,
        special: Special,
    ) -> Result<Attr>;
    /// Makes a directory.
    fn mkdir(&self, caller: Caller, parent: Ino, name: &[u8], mode: u16) -> Result<Attr>;
    /// Makes a symlink.
    fn symlink(&self, caller: Caller, parent: Ino, name: &[u8], target: &[u8]) -> Result<Attr>;
    /// Makes a file without a name, which `link` may give it.
    fn tmpfile(&self, caller: Caller, parent: Ino, mode: u16) -> Result<Attr>;
    /// Removes a name of an inode that is not a directory.
    fn unlink(&self, parent: Ino, name: &[u8]) -> Result<()>;
    /// Removes an empty directory.
    fn rmdir(&self, parent: Ino, name: &[u8]) -> Result<()>;
    /// Moves an entry.
    fn rename(
        &self,
        parent: Ino,
        name: &[u8],
        new_parent: Ino,
        new_name: &[u8],
        how: Rename,
    ) -> Result<()>;
    /// Gives `ino` another name.
    fn link(&self, ino: Ino, new_parent: Ino, new_name: &[u8]) -> Result<Attr>;
    /// Tells that a file is being opened, which `read` and `write` do not depend on.
    fn open(&self, ino: Ino, how: Open) -> Result<()>;
    /// Reads at `offset`; less than `buf` holds only at the end of the file.
    fn read(&self, ino: Ino, buf: &mut [u8], offset: u64) -> Result<usize>;
    /// Reads up to `size` bytes as [`Self::read`] does, to where the caller wants them.
    fn read_to(&self, ino: Ino, to: &mut dyn ReadTo, offset: u64, size: usize) -> Result<usize>;
    /// Writes at `offset`. `kill_suid` here and below: setuid and setgid go, as the caller lacks
    /// `CAP_FSETID`. `security.capability` goes in any case.
    fn write(&self, ino: Ino, data: &[u8], offset: u64, kill_suid: bool) -> Result<usize>;
    /// Allocates or frees a range.
    fn fallocate(
        &self,
        ino: Ino,
        how: Allocate,
        offset: u64,
        len: u64,
        kill_suid: bool,
    ) -> Result<()>;
    /// The next data or hole at or after `offset`.
    fn lseek(&self, ino: Ino, offset: u64, whence: Seek) -> Result<u64>;
    /// Copies a range between files; may copy less than asked.
    fn copy_file_range(
        &self,
        from: Ino,
        from_offset: u64,
        to: Ino,
        to_offset: u64,
        len: u64,
        kill_suid: bool,
    ) -> Result<u64>;
    /// Makes the contents of the file, and every change of metadata so far, durable.
    fn fsync(&self, ino: Ino, data_only: bool) -> Result<()>;
    /// Makes everything so far durable.
    fn sync(&self) -> Result<()>;
    /// Lists a directory from `cookie` on (0: the start), until `sink` declines an entry by
    /// returning false. Entries that stay are listed once; entries made or removed while listing
    /// may be or not.
    fn readdir(
        &self,
        ino: Ino,
        cookie: u64,
        attrs: bool,
        sink: &mut dyn FnMut(DirEntry<'_>) -> bool,
    ) -> Result<()>;
    /// Space and limits.
    fn statfs(&self) -> Result<StatFs>;
    /// Sets an xattr.
    fn setxattr(&self, ino: Ino, name: &[u8], value: &[u8], how: SetXattr) -> Result<()>;
    /// The value of an xattr.
    fn getxattr(&self, ino: Ino, name: &[u8]) -> Result<Vec<u8>>;
    /// The names of all xattrs that the caller may know of, each followed by a NUL: `trusted.*`
    /// only for root.
    fn listxattr(&self, ino: Ino, caller: Caller) -> Result<Vec<u8>>;
    /// Removes an xattr.
    fn removexattr(&self, ino: Ino, name: &[u8]) -> Result<()>;
}
