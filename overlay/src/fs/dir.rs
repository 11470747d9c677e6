//! Operations on directories: lookup, listing, making, removing and moving entries.

use iii_store::Kind;
use iii_store::tree::{self, MAX_NAME, MAX_TARGET};

use super::{Attr, Caller, DirEntry, Errno, Rename, Result, Special, Time};
use crate::ino::Ino;
use crate::overlay::Overlay;
use crate::upper::Inner;
use crate::upper::batch::Batch;
use crate::upper::record::{Body, Data, Device, Record, RecordXattrs};
use crate::view::Found;

/// Most names of one file.
pub const MAX_LINKS: u32 = 65_000;

const SETUID: u16 = 0o4000;
const SETGID: u16 = 0o2000;
/// The bits of both.
pub(super) const SET_ID: u16 = SETUID | SETGID;

fn new_record(caller: Caller, mode: u16, body: Body, now: Time) -> Record {
    Record {
        mode: mode & 0o7777,
        uid: caller.uid,
        gid: caller.gid,
        nlink: 1,
        atime: now,
        mtime: now,
        ctime: now,
        btime: now,
        xattrs: RecordXattrs::default(),
        origin: None,
        body,
    }
}

fn check_name(name: &[u8]) -> Result<()> {
    if name.len() > MAX_NAME {
        return Err(Errno::NAMETOOLONG);
    }
    tree::check_name(name).map_err(|_| Errno::INVAL)
}

impl Overlay {
    pub(super) fn do_lookup(&self, parent: Ino, name: &[u8]) -> Result<Attr> {
        let inner = self.upper.read();
        if let Some(observer) = &self.observer {
            observer.lookup(&inner.state, parent, name);
        }
        let ino = match name {
            b"." => parent,
            b".." => inner.state.parent(parent),
            _ => inner.state.child(parent, name)?.ok_or(Errno::NOENT)?,
        };
        let attr = self.attr(&inner.state, ino)?;
        self.lookups.add(ino);
        Ok(attr)
    }

    pub(super) fn do_forget(&self, ino: Ino, lookups: u64) {
        if !self.lookups.sub(ino, lookups) {
            return;
        }
        let orphan = {
            let inner = self.upper.read();
            let number = inner.state.number(ino);
            number
                .and_then(|number| inner.state.node(number))
                .is_some_and(|node| node.record.nlink == 0)
        };
        if orphan {
            self.reap(&mut self.upper.write(), ino);
        }
    }

    pub(super) fn do_forget_all(&self) {
        self.lookups.clear();
        let mut inner = self.upper.write();
        let nodes = inner.state.nodes();
        let orphans = nodes.filter(|(_, node)| node.record.nlink == 0);
        let orphans: Vec<Ino> = orphans.map(|(number, _)| inner.state.ino(number)).collect();
        for ino in orphans {
            self.reap(&mut inner, ino);
        }
    }

    /// Adds `record` as `name` in `parent`.
    fn make(&self, parent: Ino, name: &[u8], mut record: Record) -> Result<Attr> {
        check_name(name)?;
        let mut inner = self.upper.write();
        if inner.state.child(parent, name)?.is_some() {
            return Err(Errno::EXIST);
        }
        let mut batch = Batch::new(&mut inner);
        let dir = batch.parent(parent)?;
        let (_, parent_record) = batch.inode(parent)?;
        if parent_record.mode & SETGID != 0 {
            record.gid = parent_record.gid;
            if record.is_dir() {
                record.mode |= SETGID;
            }
        }
        let number = batch.add(record)?;
        batch.set(dir, name, number);
        batch.commit()?;
        let ino = inner.state.ino(number);
        self.aside.note(&inner.state, parent, ino);
        self.lookups.add(ino);
        let attr = self.attr(&inner.state, ino);
        self.upper.compact(&mut inner);
        attr
    }

    pub(super) fn do_mknod(
        &self,
        caller: Caller,
        parent: Ino,
        name: &[u8],
        mode: u16,
        special: Special,
    ) -> Result<Attr> {
        let body = match special {
            Special::File => Body::File {
                data: Data::Empty,
                size: 0,
            },
            Special::Fifo => Body::Fifo,
            Special::Socket => Body::Socket,
            Special::Char(rdev) => Body::Char(rdev.into()),
            Special::Block(rdev) => Body::Block(rdev.into()),
        };
        self.make(parent, name, new_record(caller, mode, body, Time::now()))
    }

    pub(super) fn do_mkdir(
        &self,
        caller: Caller,
        parent: Ino,
        name: &[u8],
        mode: u16,
    ) -> Result<Attr> {
        let record = new_record(caller, mode, Body::Dir, Time::now());
        self.make(parent, name, record)
    }

    pub(super) fn do_symlink(
        &self,
        caller: Caller,
        parent: Ino,
        name: &[u8],
        target: &[u8],
    ) -> Result<Attr> {
        if target.is_empty() || target.contains(&0) {
            return Err(Errno::INVAL);
        }
        if target.len() > MAX_TARGET {
            return Err(Errno::NAMETOOLONG);
        }
        let body = Body::Symlink(target.into());
        self.make(parent, name, new_record(caller, 0o777, body, Time::now()))
    }

    pub(super) fn do_tmpfile(&self, caller: Caller, parent: Ino, mode: u16) -> Result<Attr> {
        let mut inner = self.upper.write();
        let (dir_gid, dir_mode) = match inner.state.find(parent)? {
            Found::Upper(_, node) if node.record.is_dir() => (node.record.gid, node.record.mode),
            Found::Lower(lower) if lower.node.kind() == Kind::Dir => {
                let meta = self.lower.meta(lower);
                (meta.gid(), meta.mode())
            }
            _ => return Err(Errno::NOTDIR),
        };
        let body = Body::File {
            data: Data::Empty,
            size: 0,
        };
        let mut record = new_record(caller, mode, body, Time::now());
        record.nlink = 0;
        if dir_mode & SETGID != 0 {
            record.gid = dir_gid;
        }
        let mut batch = Batch::new(&mut inner);
        let number = batch.add(record)?;
        batch.commit()?;
        let ino = inner.state.ino(number);
        self.lookups.add(ino);
        self.attr(&inner.state, ino)
    }

    pub(super) fn do_unlink(&self, parent: Ino, name: &[u8]) -> Result<()> {
        let mut inner = self.upper.write();
        let ino = inner.state.child(parent, name)?.ok_or(Errno::NOENT)?;
        if inner.state.find(ino)?.kind() == Kind::Dir {
            return Err(Errno::ISDIR);
        }
        self.remove(&mut inner, parent, name, ino)
    }

    pub(super) fn do_rmdir(&self, parent: Ino, name: &[u8]) -> Result<()> {
        let mut inner = self.upper.write();
        let ino = inner.state.child(parent, name)?.ok_or(Errno::NOENT)?;
        if inner.state.find(ino)?.kind() != Kind::Dir {
            return Err(Errno::NOTDIR);
        }
        if let Some(observer) = &self.observer {
            observer.listing(&inner.state, ino);
        }
        if !inner.state.is_empty(ino)? {
            return Err(Errno::NOTEMPTY);
        }
        self.remove(&mut inner, parent, name, ino)
    }

    /// Takes the name `name` of `ino` out of `parent`.
    fn remove(&self, inner: &mut Inner, parent: Ino, name: &[u8], ino: Ino) -> Result<()> {
        let mut batch = Batch::new(inner);
        let dir = batch.parent(parent)?;
        batch.unlink(ino)?;
        batch.unset(dir, name);
        batch.commit()?;
        self.reap(inner, ino);
        self.upper.compact(inner);
        Ok(())
    }

    pub(super) fn do_link(&self, ino: Ino, new_parent: Ino, new_name: &[u8]) -> Result<Attr> {
        check_name(new_name)?;
        let mut inner = self.upper.write();
        if inner.state.find(ino)?.kind() == Kind::Dir {
            return Err(Errno::PERM);
        }
        if inner.state.child(new_parent, new_name)?.is_some() {
            return Err(Errno::EXIST);
        }
        self.aside.check_link(&inner.state, ino, new_parent)?;
        let mut batch = Batch::new(&mut inner);
        let now = batch.now;
        let dir = batch.parent(new_parent)?;
        let (number, record) = batch.inode(ino)?;
        if record.nlink >= MAX_LINKS {
            return Err(Errno::MLINK);
        }
        record.nlink += 1;
        record.ctime = now;
        batch.set(dir, new_name, number);
        batch.commit()?;
        self.lookups.add(ino);
        let attr = self.attr(&inner.state, ino);
        self.upper.compact(&mut inner);
        attr
    }

    pub(super) fn do_rename(
        &self,
        parent: Ino,
        name: &[u8],
        new_parent: Ino,
        new_name: &[u8],
        how: Rename,
    ) -> Result<()> {
        check_name(name)?;
        check_name(new_name)?;
        let mut inner = self.upper.write();
        let state = &inner.state;
        let ino = state.child(parent, name)?.ok_or(Errno::NOENT)?;
        let target = state.child(new_parent, new_name)?;
        let is_dir = state.find(ino)?.kind() == Kind::Dir;
        let target_is_dir = match target {
            Some(target) => state.find(target)?.kind() == Kind::Dir,
            None => false,
        };
        match (how, target) {
            (Rename::NoReplace, Some(_)) => return Err(Errno::EXIST),
            (Rename::Exchange, None) => return Err(Errno::NOENT),
            // Two names of one file, or one name.
            (_, Some(target)) if target == ino => return Ok(()),
            (Rename::Replace | Rename::Whiteout, Some(target)) => {
                if is_dir && !target_is_dir {
                    return Err(Errno::NOTDIR);
                }
                if !is_dir && target_is_dir {
                    return Err(Errno::ISDIR);
                }
                if target_is_dir && !state.is_empty(target)? {
                    return Err(Errno::NOTEMPTY);
                }
            }
            _ => {}
        }
        if is_dir && state.is_within(new_parent, ino) {
            return Err(Errno::INVAL);
        }
        self.aside.check_same_volume(state, parent, new_parent)?;
        if is_dir {
            self.aside.check_no_root(state, ino)?;
        }
        if let (Rename::Exchange, Some(target)) = (how, target)
            && target_is_dir
            && state.is_within(parent, target)
        {
            return Err(Errno::INVAL);
        }
        if let Some(observer) = &self.observer {
            if is_dir {
                observer.moved(state, ino);
            }
            match target.filter(|_| target_is_dir) {
                Some(target) if how == Rename::Exchange => observer.moved(state, target),
                Some(target) => observer.listing(state, target),
                None => {}
            }
        }
        let mut batch = Batch::new(&mut inner);
        let now = batch.now;
        let dir = batch.parent(parent)?;
        let new_dir = batch.parent(new_parent)?;
        let (number, record) = batch.inode(ino)?;
        record.ctime = now;
        match (how, target) {
            (Rename::Exchange, Some(target)) => {
                let (target_number, record) = batch.inode(target)?;
                record.ctime = now;
                batch.set(dir, name, target_number);
            }
            (_, target) => {
                if let Some(target) = target {
                    batch.unlink(target)?;
                }
                if how == Rename::Whiteout {
                    let body = Body::Char(Device { major: 0, minor: 0 });
                    let whiteout = batch.add(new_record(Caller::default(), 0, body, now))?;
                    batch.set(dir, name, whiteout);
                } else {
                    batch.unset(dir, name);
                }
            }
        }
        batch.set(new_dir, new_name, number);
        batch.commit()?;
        if let Some(target) = target {
            inner.order(number);
            self.reap(&mut inner, target);
        }
        self.upper.compact(&mut inner);
        Ok(())
    }

    pub(super) fn do_readdir(
        &self,
        ino: Ino,
        cookie: u64,
        attrs: bool,
        sink: &mut dyn FnMut(DirEntry<'_>) -> bool,
    ) -> Result<()> {
        let inner = self.upper.read();
        let state = &inner.state;
        if state.find(ino)?.kind() != Kind::Dir {
            return Err(Errno::NOTDIR);
        }
        if let Some(observer) = &self.observer {
            observer.listing(state, ino);
        }
        let dots = [(&b"."[..], ino), (b"..", state.parent(ino))];
        for (at, (name, dot)) in dots.into_iter().enumerate().skip(cookie as usize) {
            let entry = DirEntry {
                ino: dot,
                kind: Kind::Dir,
                name,
                cookie: at as u64 + 1,
                attr: None,
            };
            if !sink(entry) {
                return Ok(());
            }
        }
        let listed = ino;
        let mut failed = None;
        state.for_each(ino, cookie, &mut |cookie, name, ino| {
            let (kind, attr) = if attrs {
                if let Some(observer) = &self.observer {
                    observer.lookup(state, listed, name);
                }
                match self.attr(state, ino) {
                    Ok(attr) => (attr.kind, Some(attr)),
                    Err(error) => {
                        failed = Some(error);
                        return false;
                    }
                }
            } else {
                let found = state.find(ino);
                (found.map_or(Kind::File, Found::kind), None)
            };
            let taken = sink(DirEntry {
                ino,
                kind,
                name,
                cookie,
                attr,
            });
            if taken && attrs {
                self.lookups.add(ino);
            }
            taken
        })?;
        failed.map_or(Ok(()), Err)
    }
}

/// Takes away the capabilities that end with a write, a truncation or a change of the owner. With
/// `suid` also setuid, and setgid where it is not a mark for mandatory locking. Whether there was
/// anything to take.
pub(super) fn strip_privileges(record: &mut Record, suid: bool) -> bool {
    const CAPABILITY: &[u8] = b"security.capability";
    let capability = record.xattrs.remove(CAPABILITY).is_some();
    let mode = record.mode;
    if suid && !record.is_dir() {
        record.mode &= !SETUID;
        if record.mode & 0o010 != 0 {
            record.mode &= !SETGID;
        }
    }
    capability || record.mode != mode
}
