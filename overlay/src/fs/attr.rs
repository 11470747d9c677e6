//! Operations on an inode's attributes, xattrs and target, and on the filesystem as a whole.

use super::dir::{SET_ID, strip_privileges};
use super::{Attr, Caller, Errno, Result, SetAttr, SetTime, SetXattr, StatFs};
use crate::ino::Ino;
use crate::overlay::Overlay;
use crate::upper::batch::Batch;
use crate::upper::record::{Body, Data};
use crate::view::Found;
use iii_store::Kind;
use iii_store::tree::{MAX_NAME, MAX_XATTR_NAME, MAX_XATTR_VALUE, MAX_XATTRS};

/// Most bytes of names and values of one inode's xattrs.
pub const MAX_XATTR_BYTES: usize = 1 << 20;

/// The namespaces of xattrs that are kept. POSIX ACLs are not offered.
const NAMESPACES: [&[u8]; 3] = [b"user.", TRUSTED, b"security."];
/// The namespace that only root sees.
const TRUSTED: &[u8] = b"trusted.";

impl Overlay {
    pub(super) fn do_getattr(&self, ino: Ino) -> Result<Attr> {
        self.attr(&self.upper.read().state, ino)
    }

    pub(super) fn do_setattr(&self, ino: Ino, set: &SetAttr) -> Result<Attr> {
        if let Some(size) = set.size {
            self.truncate(ino, size)?;
        }
        let mut inner = self.upper.write();
        let rest = SetAttr {
            size: None,
            kill_suid: false,
            ..*set
        };
        if set.size.is_some() && rest == SetAttr::default() {
            let clean = match inner.state.find(ino)? {
                Found::Upper(_, node) => {
                    node.record.xattrs.is_empty()
                        && !(set.kill_suid && node.record.mode & SET_ID != 0)
                }
                Found::Lower(_) => false,
            };
            if clean {
                return self.attr(&inner.state, ino);
            }
        }
        let mut batch = Batch::new(&mut inner);
        let now = batch.now;
        let (_, record) = batch.inode(ino)?;
        let is_dir = record.is_dir();
        if let Some(mode) = set.mode {
            record.mode = mode & 0o7777;
        }
        if set.uid.is_some() || set.gid.is_some() {
            record.uid = set.uid.unwrap_or(record.uid);
            record.gid = set.gid.unwrap_or(record.gid);
            if !is_dir {
                strip_privileges(record, set.mode.is_none());
            }
        }
        if set.size.is_some() || set.kill_suid {
            strip_privileges(record, set.kill_suid && set.mode.is_none());
        }
        let time = |time| match time {
            SetTime::Now => now,
            SetTime::At(time) => time,
        };
        if let Some(atime) = set.atime {
            record.atime = time(atime);
        }
        if let Some(mtime) = set.mtime {
            record.mtime = time(mtime);
            // From now on the record's mtime is the truth, so its length has to be, too.
            if let Body::File {
                data: Data::Flat { dirty, .. },
                ..
            } = &mut record.body
            {
                *dirty = false;
            }
        }
        record.ctime = now;
        batch.commit()?;
        let attr = self.attr(&inner.state, ino);
        self.upper.compact(&mut inner);
        attr
    }

    pub(super) fn do_readlink(&self, ino: Ino) -> Result<Vec<u8>> {
        let inner = self.upper.read();
        let target = match inner.state.find(ino)? {
            Found::Upper(_, node) => match &node.record.body {
                Body::Symlink(target) => target.to_vec(),
                _ => return Err(Errno::INVAL),
            },
            Found::Lower(lower) if lower.node.kind() == Kind::Symlink => {
                lower.node.target().to_vec()
            }
            Found::Lower(_) => return Err(Errno::INVAL),
        };
        Ok(target)
    }

    pub(super) fn do_statfs(&self) -> Result<StatFs> {
        let host = rustix::fs::statfs(self.upper.dir())?;
        let (inodes, room) = {
            let inner = self.upper.read();
            (inner.state.inodes(), inner.state.free_inodes())
        };
        // A new inode takes memory, and of the host at most one file.
        let has_inodes = host.f_files != 0;
        let files_free = if has_inodes {
            room.min(host.f_ffree)
        } else {
            room
        };
        Ok(StatFs {
            block_size: u32::try_from(host.f_bsize as u64).unwrap_or(4096),
            blocks: host.f_blocks,
            free: host.f_bfree,
            available: host.f_bavail,
            files: inodes + files_free,
            files_free,
            name_max: MAX_NAME as u32,
        })
    }

    pub(super) fn do_setxattr(
        &self,
        ino: Ino,
        name: &[u8],
        value: &[u8],
        how: SetXattr,
    ) -> Result<()> {
        check_xattr_name(name)?;
        if value.len() > MAX_XATTR_VALUE {
            return Err(Errno::TOOBIG);
        }
        let mut inner = self.upper.write();
        let mut batch = Batch::new(&mut inner);
        let now = batch.now;
        let (_, record) = batch.inode(ino)?;
        match (how, record.xattrs.contains_key(name)) {
            (SetXattr::Create, true) => return Err(Errno::EXIST),
            (SetXattr::Replace, false) => return Err(Errno::NODATA),
            _ => {}
        }
        record.xattrs.insert(name.into(), value.into());
        if record.xattrs.len() > MAX_XATTRS || record.xattrs.bytes() > MAX_XATTR_BYTES {
            return Err(Errno::NOSPC);
        }
        record.ctime = now;
        batch.commit()?;
        self.upper.compact(&mut inner);
        Ok(())
    }

    pub(super) fn do_getxattr(&self, ino: Ino, name: &[u8]) -> Result<Vec<u8>> {
        check_xattr_name(name)?;
        let inner = self.upper.read();
        match inner.state.find(ino)? {
            Found::Upper(_, node) => node.record.xattrs.get(name).map(<[u8]>::to_vec),
            Found::Lower(lower) => self
                .lower
                .meta(lower)
                .xattrs()
                .find(|(have, _)| *have == name)
                .map(|(_, value)| value.to_vec()),
        }
        .ok_or(Errno::NODATA)
    }

    pub(super) fn do_listxattr(&self, ino: Ino, caller: Caller) -> Result<Vec<u8>> {
        let inner = self.upper.read();
        let mut list = Vec::new();
        let mut add = |name: &[u8]| {
            // The kernel keeps others from reading these, and leaves the list to the filesystem.
            if caller.uid == 0 || !name.starts_with(TRUSTED) {
                list.extend(name);
                list.push(0);
            }
        };
        match inner.state.find(ino)? {
            Found::Upper(_, node) => node.record.xattrs.keys().for_each(&mut add),
            Found::Lower(lower) => {
                let meta = self.lower.meta(lower);
                meta.xattrs().for_each(|(name, _)| add(name));
            }
        }
        Ok(list)
    }

    pub(super) fn do_removexattr(&self, ino: Ino, name: &[u8]) -> Result<()> {
        check_xattr_name(name)?;
        let mut inner = self.upper.write();
        let mut batch = Batch::new(&mut inner);
        let now = batch.now;
        let (_, record) = batch.inode(ino)?;
        record.xattrs.remove(name).ok_or(Errno::NODATA)?;
        record.ctime = now;
        batch.commit()?;
        self.upper.compact(&mut inner);
        Ok(())
    }
}

fn check_xattr_name(name: &[u8]) -> Result<()> {
    if name.len() > MAX_XATTR_NAME {
        return Err(Errno::RANGE);
    }
    let kept = |space: &[u8]| name.len() > space.len() && name.starts_with(space);
    if NAMESPACES.into_iter().any(kept) {
        Ok(())
    } else {
        Err(Errno::OPNOTSUPP)
    }
}
