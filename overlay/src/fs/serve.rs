//! The overlay as a [`Filesystem`]: every request is counted, then done. Those that write to files
//! wait while a snapshot needs these to keep still.

use super::{
    Allocate, Attr, Caller, DirEntry, Errno, Filesystem, Open, ReadTo, Rename, Result, Seek,
    SetAttr, SetXattr, Special, StatFs,
};
use crate::ino::Ino;
use crate::overlay::Overlay;
use crate::stats::Op;

/// Whether the operation may write to a flat file.
fn writes(op: Op) -> bool {
    matches!(
        op,
        Op::Setattr | Op::Open | Op::Write | Op::Fallocate | Op::CopyFileRange
    )
}

/// Whether the operation makes space.
fn removes(op: Op) -> bool {
    matches!(op, Op::Unlink | Op::Rmdir)
}

/// How often an operation that finds no space is done again: when what was removed is gone for
/// good, and when the log has been rewritten.
const TRIES: usize = 3;

/// The outcome of an operation, as far as it can be one of no space.
trait Outcome {
    fn is_full(&self) -> bool;
}

impl Outcome for () {
    fn is_full(&self) -> bool {
        false
    }
}

impl<T> Outcome for Result<T> {
    fn is_full(&self) -> bool {
        matches!(self, Err(Errno::NOSPC | Errno::DQUOT))
    }
}

macro_rules! serve {
    ($($op:ident: fn $name:ident => $does:ident($($arg:ident: $type:ty),*) -> $out:ty;)*) => {
        impl Filesystem for Overlay {
            $(fn $name(&self, $($arg: $type),*) -> $out {
                self.stats.count(Op::$op);
                let _writing = writes(Op::$op).then(|| self.upper.writers.enter());
                for _ in 1..TRIES {
                    let done = self.$does($($arg),*);
                    if !(done.is_full() && self.upper.relieve(removes(Op::$op))) {
                        return done;
                    }
                }
                self.$does($($arg),*)
            })*
        }
    };
}

serve! {
    Lookup: fn lookup => do_lookup(parent: Ino, name: &[u8]) -> Result<Attr>;
    Forget: fn forget => do_forget(ino: Ino, lookups: u64) -> ();
    ForgetAll: fn forget_all => do_forget_all() -> ();
    Getattr: fn getattr => do_getattr(ino: Ino) -> Result<Attr>;
    Setattr: fn setattr => do_setattr(ino: Ino, set: &SetAttr) -> Result<Attr>;
    Readlink: fn readlink => do_readlink(ino: Ino) -> Result<Vec<u8>>;
    Mknod: fn mknod => do_mknod(caller: Caller, parent: Ino, name: &[u8], mode: u16, special: Special) -> Result<Attr>;
    Mkdir: fn mkdir => do_mkdir(caller: Caller, parent: Ino, name: &[u8], mode: u16) -> Result<Attr>;
    Symlink: fn symlink => do_symlink(caller: Caller, parent: Ino, name: &[u8], target: &[u8]) -> Result<Attr>;
    Tmpfile: fn tmpfile => do_tmpfile(caller: Caller, parent: Ino, mode: u16) -> Result<Attr>;
    Unlink: fn unlink => do_unlink(parent: Ino, name: &[u8]) -> Result<()>;
    Rmdir: fn rmdir => do_rmdir(parent: Ino, name: &[u8]) -> Result<()>;
    Rename: fn rename => do_rename(parent: Ino, name: &[u8], new_parent: Ino, new_name: &[u8], how: Rename) -> Result<()>;
    Link: fn link => do_link(ino: Ino, new_parent: Ino, new_name: &[u8]) -> Result<Attr>;
    Open: fn open => do_open(ino: Ino, how: Open) -> Result<()>;
    Read: fn read => do_read(ino: Ino, buf: &mut [u8], offset: u64) -> Result<usize>;
    Read: fn read_to => do_read_to(ino: Ino, to: &mut dyn ReadTo, offset: u64, size: usize) -> Result<usize>;
    Write: fn write => do_write(ino: Ino, data: &[u8], offset: u64, kill_suid: bool) -> Result<usize>;
    Fallocate: fn fallocate => do_fallocate(ino: Ino, how: Allocate, offset: u64, len: u64, kill_suid: bool) -> Result<()>;
    Lseek: fn lseek => do_lseek(ino: Ino, offset: u64, whence: Seek) -> Result<u64>;
    CopyFileRange: fn copy_file_range => do_copy_file_range(from: Ino, from_offset: u64, to: Ino, to_offset: u64, len: u64, kill_suid: bool) -> Result<u64>;
    Fsync: fn fsync => do_fsync(ino: Ino, data_only: bool) -> Result<()>;
    Sync: fn sync => do_sync() -> Result<()>;
    Readdir: fn readdir => do_readdir(ino: Ino, cookie: u64, attrs: bool, sink: &mut dyn FnMut(DirEntry<'_>) -> bool) -> Result<()>;
    Statfs: fn statfs => do_statfs() -> Result<StatFs>;
    Setxattr: fn setxattr => do_setxattr(ino: Ino, name: &[u8], value: &[u8], how: SetXattr) -> Result<()>;
    Getxattr: fn getxattr => do_getxattr(ino: Ino, name: &[u8]) -> Result<Vec<u8>>;
    Listxattr: fn listxattr => do_listxattr(ino: Ino, caller: Caller) -> Result<Vec<u8>>;
    Removexattr: fn removexattr => do_removexattr(ino: Ino, name: &[u8]) -> Result<()>;
}
