//! A filesystem in memory with the rules of POSIX, and the merging of layers by the specification:
//! one whole layer after the other.

use std::collections::BTreeMap;

use iii_overlay::fs::{Errno, Kind, Rename};
use iii_store::Layer;
use iii_store::layer::NodeRef;
use iii_store::tree::{DirKind, Rdev};

use crate::support::{Seen, View, join};

#[derive(Debug, Clone)]
pub struct Inode {
    pub kind: Kind,
    pub mode: u16,
    pub owner: (u32, u32),
    pub rdev: Rdev,
    pub bytes: Vec<u8>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub mtime: i64,
    pub entries: BTreeMap<Vec<u8>, usize>,
}

#[derive(Debug, Clone)]
pub struct Model {
    pub inodes: Vec<Inode>,
}

fn dir_inode() -> Inode {
    Inode {
        kind: Kind::Dir,
        mode: 0o755,
        owner: (0, 0),
        rdev: Rdev::default(),
        bytes: Vec::new(),
        xattrs: BTreeMap::new(),
        mtime: 0,
        entries: BTreeMap::new(),
    }
}

impl Model {
    /// The merged view of the layers.
    pub fn of_layers<'a>(layers: impl IntoIterator<Item = &'a Layer>, contents: &[&[u8]]) -> Self {
        let mut model = Self {
            inodes: vec![dir_inode()],
        };
        for layer in layers {
            let mut links = BTreeMap::new();
            model.lay(0, layer.root(), contents, &mut links);
        }
        model
    }

    fn lay(
        &mut self,
        dir: usize,
        node: NodeRef<'_>,
        contents: &[&[u8]],
        links: &mut BTreeMap<u32, usize>,
    ) {
        if node.dir_kind() != DirKind::Implicit {
            let meta = node.meta();
            let inode = &mut self.inodes[dir];
            inode.mode = meta.mode;
            inode.owner = (meta.uid, meta.gid);
            inode.mtime = meta.mtime.sec;
            inode.xattrs = xattrs(node);
        }
        if node.dir_kind() == DirKind::Opaque {
            self.inodes[dir].entries.clear();
        }
        for child in node.children() {
            let name = child.name().to_vec();
            match child.kind() {
                Kind::Whiteout => {
                    self.inodes[dir].entries.remove(&name);
                }
                Kind::Dir => {
                    let there = self.inodes[dir].entries.get(&name).copied();
                    let there = there.filter(|&ix| self.inodes[ix].kind == Kind::Dir);
                    let ix = there.unwrap_or_else(|| self.add(dir_inode()));
                    self.inodes[dir].entries.insert(name, ix);
                    self.lay(ix, child, contents, links);
                }
                kind => {
                    let first = child.links().next().map_or(child.index(), NodeRef::index);
                    let ix = links.get(&first).copied().unwrap_or_else(|| {
                        let bytes = match kind {
                            Kind::File => contents
                                .iter()
                                .find(|bytes| iii_store::ObjectId::of(bytes) == child.object())
                                .expect("a known content")
                                .to_vec(),
                            _ => child.target().to_vec(),
                        };
                        self.add(Inode {
                            kind,
                            mode: child.mode(),
                            owner: (child.uid(), child.gid()),
                            rdev: child.rdev(),
                            bytes,
                            xattrs: xattrs(child),
                            mtime: child.mtime().sec,
                            entries: BTreeMap::new(),
                        })
                    });
                    links.insert(first, ix);
                    self.inodes[dir].entries.insert(name, ix);
                }
            }
        }
    }

    fn add(&mut self, inode: Inode) -> usize {
        self.inodes.push(inode);
        self.inodes.len() - 1
    }

    /// All directories, by path.
    pub fn dirs(&self) -> Vec<(Vec<u8>, usize)> {
        let mut dirs = vec![(Vec::new(), 0)];
        let mut next = 0;
        while next < dirs.len() {
            let (path, ix) = dirs[next].clone();
            for (name, &child) in &self.inodes[ix].entries {
                if self.inodes[child].kind == Kind::Dir {
                    dirs.push((join(&path, name), child));
                }
            }
            next += 1;
        }
        dirs
    }

    pub fn view(&self) -> View {
        let mut nlinks: BTreeMap<usize, u32> = BTreeMap::new();
        let mut found = BTreeMap::new();
        for (path, dir) in self.dirs() {
            for (name, &child) in &self.inodes[dir].entries {
                *nlinks.entry(child).or_default() += 1;
                found.insert(join(&path, name), child);
            }
        }
        found.insert(Vec::new(), 0);
        let mut firsts = BTreeMap::new();
        found
            .into_iter()
            .enumerate()
            .map(|(at, (path, ix))| {
                let inode = &self.inodes[ix];
                let subdirs = inode
                    .entries
                    .values()
                    .filter(|&&child| self.inodes[child].kind == Kind::Dir);
                let nlink = if inode.kind == Kind::Dir {
                    2 + subdirs.count() as u32
                } else {
                    nlinks[&ix]
                };
                let link =
                    (inode.kind != Kind::Dir && nlink > 1).then(|| *firsts.entry(ix).or_insert(at));
                let seen = Seen {
                    kind: inode.kind,
                    mode: inode.mode,
                    owner: inode.owner,
                    rdev: inode.rdev,
                    bytes: inode.bytes.clone(),
                    xattrs: inode.xattrs.clone(),
                    nlink,
                    link,
                    mtime: Some(inode.mtime),
                };
                (path, seen)
            })
            .collect()
    }

    pub fn child(&self, dir: usize, name: &[u8]) -> Option<usize> {
        self.inodes[dir].entries.get(name).copied()
    }

    pub fn make(&mut self, dir: usize, name: &[u8], mut inode: Inode) -> Result<(), Errno> {
        if self.child(dir, name).is_some() {
            return Err(Errno::EXIST);
        }
        if self.inodes[dir].mode & 0o2000 != 0 {
            inode.owner.1 = self.inodes[dir].owner.1;
            if inode.kind == Kind::Dir {
                inode.mode |= 0o2000;
            }
        }
        let ix = self.add(inode);
        self.inodes[dir].entries.insert(name.to_vec(), ix);
        Ok(())
    }

    pub fn unlink(&mut self, dir: usize, name: &[u8]) -> Result<(), Errno> {
        let ix = self.child(dir, name).ok_or(Errno::NOENT)?;
        if self.inodes[ix].kind == Kind::Dir {
            return Err(Errno::ISDIR);
        }
        self.inodes[dir].entries.remove(name);
        Ok(())
    }

    pub fn rmdir(&mut self, dir: usize, name: &[u8]) -> Result<(), Errno> {
        let ix = self.child(dir, name).ok_or(Errno::NOENT)?;
        if self.inodes[ix].kind != Kind::Dir {
            return Err(Errno::NOTDIR);
        }
        if !self.inodes[ix].entries.is_empty() {
            return Err(Errno::NOTEMPTY);
        }
        self.inodes[dir].entries.remove(name);
        Ok(())
    }

    pub fn link(&mut self, ix: usize, dir: usize, name: &[u8]) -> Result<(), Errno> {
        if self.inodes[ix].kind == Kind::Dir {
            return Err(Errno::PERM);
        }
        if self.child(dir, name).is_some() {
            return Err(Errno::EXIST);
        }
        self.inodes[dir].entries.insert(name.to_vec(), ix);
        Ok(())
    }

    fn holds(&self, ancestor: usize, dir: usize) -> bool {
        ancestor == dir
            || self.inodes[ancestor]
                .entries
                .values()
                .any(|&child| self.inodes[child].kind == Kind::Dir && self.holds(child, dir))
    }

    pub fn rename(
        &mut self,
        dir: usize,
        name: &[u8],
        to_dir: usize,
        to_name: &[u8],
        how: Rename,
    ) -> Result<(), Errno> {
        let ix = self.child(dir, name).ok_or(Errno::NOENT)?;
        let target = self.child(to_dir, to_name);
        let is_dir = |ix: usize| self.inodes[ix].kind == Kind::Dir;
        match (how, target) {
            (Rename::NoReplace, Some(_)) => return Err(Errno::EXIST),
            (Rename::Exchange, None) => return Err(Errno::NOENT),
            (_, Some(target)) if target == ix => return Ok(()),
            (Rename::Replace | Rename::Whiteout, Some(target)) => {
                match (is_dir(ix), is_dir(target)) {
                    (true, false) => return Err(Errno::NOTDIR),
                    (false, true) => return Err(Errno::ISDIR),
                    (true, true) if !self.inodes[target].entries.is_empty() => {
                        return Err(Errno::NOTEMPTY);
                    }
                    _ => {}
                }
            }
            _ => {}
        }
        if is_dir(ix) && self.holds(ix, to_dir) {
            return Err(Errno::INVAL);
        }
        if let Some(target) = target
            && how == Rename::Exchange
            && is_dir(target)
            && self.holds(target, dir)
        {
            return Err(Errno::INVAL);
        }
        self.inodes[dir].entries.remove(name);
        self.inodes[to_dir].entries.insert(to_name.to_vec(), ix);
        match how {
            Rename::Exchange => {
                let target = target.expect("checked above");
                self.inodes[dir].entries.insert(name.to_vec(), target);
            }
            Rename::Whiteout => {
                let whiteout = Inode {
                    kind: Kind::Char,
                    mode: 0,
                    ..dir_inode()
                };
                let ix = self.add(whiteout);
                self.inodes[dir].entries.insert(name.to_vec(), ix);
            }
            _ => {}
        }
        Ok(())
    }
}

fn xattrs(node: NodeRef<'_>) -> BTreeMap<Vec<u8>, Vec<u8>> {
    node.xattrs()
        .map(|(name, value)| (name.to_vec(), value.to_vec()))
        .collect()
}

/// A new inode of this kind.
pub fn new_inode(kind: Kind, mode: u16, owner: (u32, u32), bytes: &[u8]) -> Inode {
    Inode {
        kind,
        mode,
        owner,
        bytes: bytes.to_vec(),
        ..dir_inode()
    }
}
