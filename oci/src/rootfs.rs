//! A directory of this machine that holds a root filesystem, as a tree.
//!
//! Taken as it is: owners, modes, times, xattrs, hardlinks, devices. Symlinks are never followed.
//! Mounts in it, sockets and files that the user may not read are left out; each is reported. Files
//! of the importing user belong to root in the image: only root can unpack a tree with its owners,
//! so owners mean nothing otherwise.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use iii_store::tree::{
    Content, Dir, DirKind, Leaf, MAX_DEPTH, MAX_XATTR_VALUE, MAX_XATTRS, Meta, Mtime, Node, Rdev,
    Tree, Xattrs,
};
use iii_store::{Ingest, StoreError};
use rayon::prelude::*;
use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use super::{Limit, Limits, Passed};

/// Xattrs that belong to the directory's host and not to its contents.
const HOST_XATTRS: [&[u8]; 2] = [b"security.selinux", b"trusted.overlay."];
/// Longest list of the names of a file's xattrs (Linux's `XATTR_LIST_MAX`).
const MAX_XATTR_LIST: usize = 64 << 10;

/// Why a directory cannot be taken as a root filesystem.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// A system call failed.
    #[error("{op} {} failed", path.display())]
    Io {
        /// The operation.
        op: &'static str,
        /// Path of the object.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// More than this program accepts.
    #[error("{}: {passed}", path.display())]
    Limit {
        /// Where the limit was passed.
        path: PathBuf,
        /// The exceeded limit.
        passed: Passed,
    },
    /// The store did not take the contents of a file.
    #[error("storing {} failed", path.display())]
    Store {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: StoreError,
    },
}

/// Something that was left out, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeftOut {
    /// What.
    pub path: PathBuf,
    /// Why.
    pub why: &'static str,
}

/// A directory as a tree.
#[derive(Debug)]
pub struct Taken {
    /// The tree. Every object it names is in the ingest.
    pub tree: Tree,
    /// Paths of the directory that are not in it.
    pub left_out: Vec<LeftOut>,
}

/// Takes the directory at `root` into a tree, its files into `ingest`. `on_level` is called between
/// levels with the number of entries so far.
pub fn take(
    root: &Path,
    ingest: &Ingest<'_>,
    limits: &Limits,
    on_level: &dyn Fn(u64),
) -> Result<Taken, RootfsError> {
    let walk = Walk::open(root, ingest)?;
    // A directory stands after its parent.
    let mut dirs = vec![Found {
        parent: 0,
        name: Box::default(),
        path: PathBuf::new(),
        dir: Dir::default(),
        entries: Vec::new(),
    }];
    let mut left_out = Vec::new();
    let mut level = 0..1;
    let mut entries = 1;
    let mut depth = 0;
    while !level.is_empty() {
        let read: Vec<Listing> = dirs[level.clone()]
            .par_iter()
            .map(|found| walk.directory(&found.path))
            .collect::<Result<_, _>>()?;
        let next = dirs.len();
        for (ix, listing) in level.clone().zip(read) {
            entries += listing.entries.len() as u64;
            left_out.extend(listing.left_out);
            let path = dirs[ix].path.clone();
            dirs[ix].dir = listing.dir;
            dirs[ix].entries = listing.entries;
            for name in listing.subdirs {
                let path = path.join(os_str(&name));
                dirs.push(Found {
                    parent: ix,
                    name,
                    path,
                    dir: Dir::default(),
                    entries: Vec::new(),
                });
            }
        }
        depth += 1;
        let limit = |passed| RootfsError::Limit {
            path: root.to_owned(),
            passed,
        };
        if entries + (dirs.len() - next) as u64 > limits.entries {
            return Err(limit(
                limits.passed(Limit::Entries, "the number of entries"),
            ));
        }
        if depth > MAX_DEPTH {
            return Err(limit(Passed::fixed(
                "the depth of its directories",
                MAX_DEPTH as u64,
            )));
        }
        level = next..dirs.len();
        on_level(entries);
    }
    while let Some(mut last) = dirs.pop() {
        last.dir.entries = last.entries.into_iter().collect();
        match dirs.get_mut(last.parent) {
            Some(parent) => {
                let opened = !last.dir.entries.is_empty() || last.dir.kind == DirKind::Merged;
                if opened {
                    parent.entries.push((last.name, Node::Dir(last.dir)));
                }
            }
            None => {
                return Ok(Taken {
                    tree: last.dir,
                    left_out,
                });
            }
        }
    }
    Ok(Taken {
        tree: Tree::default(),
        left_out,
    })
}

struct Found {
    parent: usize,
    name: Box<[u8]>,
    path: PathBuf,
    dir: Dir,
    /// In any order.
    entries: Vec<(Box<[u8]>, Node)>,
}

#[derive(Default)]
struct Listing {
    dir: Dir,
    entries: Vec<(Box<[u8]>, Node)>,
    subdirs: Vec<Box<[u8]>>,
    left_out: Vec<LeftOut>,
}

struct Walk<'a> {
    root: &'a Path,
    fd: OwnedFd,
    device: u64,
    ingest: &'a Ingest<'a>,
    /// Device and inode numbers of the files with several names, and the number they are known by
    /// in the tree.
    links: Mutex<HashMap<(u64, u64), u64>>,
}

impl<'a> Walk<'a> {
    fn open(root: &'a Path, ingest: &'a Ingest<'a>) -> Result<Self, RootfsError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = rustix::fs::open(root, flags, Mode::empty())
            .and_then(|fd| rustix::fs::fstat(&fd).map(|stat| (fd, stat)));
        let (fd, stat) = opened.map_err(|errno| RootfsError::Io {
            op: "opening",
            path: root.to_owned(),
            source: errno.into(),
        })?;
        Ok(Self {
            root,
            fd,
            device: device(&stat),
            ingest,
            links: Mutex::default(),
        })
    }

    fn io(&self, op: &'static str, path: &Path) -> impl FnOnce(Errno) -> RootfsError + use<> {
        let path = self.root.join(path);
        move |errno| RootfsError::Io {
            op,
            path,
            source: errno.into(),
        }
    }

    /// Opens a directory below the root, whatever may have become a symlink meanwhile.
    fn open_dir(&self, path: &Path) -> rustix::io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut fd = rustix::fs::openat(&self.fd, c".", flags, Mode::empty())?;
        for name in path.components() {
            fd = rustix::fs::openat(&fd, name.as_os_str(), flags, Mode::empty())?;
        }
        Ok(fd)
    }

    fn directory(&self, path: &Path) -> Result<Listing, RootfsError> {
        let mut listing = Listing::default();
        let fd = match self.open_dir(path) {
            Ok(fd) => fd,
            Err(Errno::ACCESS | Errno::PERM) if !path.as_os_str().is_empty() => {
                listing.left_out.push(self.left_out(path, NOT_READABLE));
                // Only its parent knows that it is there.
                listing.dir.kind = DirKind::Implicit;
                return Ok(listing);
            }
            Err(errno) => return Err(self.io("opening", path)(errno)),
        };
        let stat = rustix::fs::fstat(&fd).map_err(self.io("reading", path))?;
        let xattrs = fd_xattrs(&fd).map_err(self.io("reading the xattrs of", path))?;
        listing.dir.meta = meta(&stat, xattrs);
        if device(&stat) != self.device {
            listing.left_out.push(self.left_out(path, MOUNTED));
            return Ok(listing);
        }
        let names = rustix::fs::Dir::read_from(&fd).map_err(self.io("listing", path))?;
        for entry in names {
            let entry = entry.map_err(self.io("listing", path))?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            self.entry(fd.as_fd(), name, path, &mut listing)?;
        }
        listing.entries.shrink_to_fit();
        Ok(listing)
    }

    fn entry(
        &self,
        dir: BorrowedFd<'_>,
        name: &CStr,
        parent: &Path,
        listing: &mut Listing,
    ) -> Result<(), RootfsError> {
        let path = parent.join(os_str(name.to_bytes()));
        let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(self.io("reading", &path))?;
        let rdev = || Rdev {
            major: rustix::fs::major(stat.st_rdev),
            minor: rustix::fs::minor(stat.st_rdev),
        };
        let content = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                listing.subdirs.push(name.to_bytes().into());
                return Ok(());
            }
            FileType::RegularFile => return self.file(dir, name, &path, listing),
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(dir, name, Vec::new())
                    .map_err(self.io("reading the symlink", &path))?;
                Content::Symlink {
                    target: target.into_bytes().into(),
                }
            }
            FileType::Fifo => Content::Fifo,
            FileType::CharacterDevice => Content::Char(rdev()),
            FileType::BlockDevice => Content::Block(rdev()),
            // A socket means nothing without its listening process.
            FileType::Socket => {
                listing
                    .left_out
                    .push(self.left_out(&path, "it is a socket"));
                return Ok(());
            }
            FileType::Unknown => {
                listing
                    .left_out
                    .push(self.left_out(&path, "it is of an unknown type"));
                return Ok(());
            }
        };
        let xattrs = name_xattrs(dir, name).map_err(self.io("reading the xattrs of", &path))?;
        let leaf = Leaf {
            meta: meta(&stat, xattrs),
            content,
            link: self.link(&stat),
        };
        let entry = (name.to_bytes().into(), Node::Leaf(leaf));
        listing.entries.push(entry);
        Ok(())
    }

    fn file(
        &self,
        dir: BorrowedFd<'_>,
        name: &CStr,
        path: &Path,
        listing: &mut Listing,
    ) -> Result<(), RootfsError> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match rustix::fs::openat(dir, name, flags, Mode::empty()) {
            Ok(fd) => File::from(fd),
            Err(Errno::ACCESS | Errno::PERM) => {
                listing.left_out.push(self.left_out(path, NOT_READABLE));
                return Ok(());
            }
            Err(errno) => return Err(self.io("opening", path)(errno)),
        };
        let stat = rustix::fs::fstat(&file).map_err(self.io("reading", path))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(self.io("reading", path)(Errno::STALE));
        }
        let added = self
            .ingest
            .add_file(&file)
            .map_err(|source| RootfsError::Store {
                path: self.root.join(path),
                source,
            })?;
        let xattrs = fd_xattrs(&file).map_err(self.io("reading the xattrs of", path))?;
        let leaf = Leaf {
            meta: meta(&stat, xattrs),
            content: Content::File {
                object: added.object,
                size: added.size,
            },
            link: self.link(&stat),
        };
        let entry = (name.to_bytes().into(), Node::Leaf(leaf));
        listing.entries.push(entry);
        Ok(())
    }

    fn link(&self, stat: &Stat) -> Option<u64> {
        if stat.st_nlink < 2 {
            return None;
        }
        let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        let next = links.len() as u64;
        Some(*links.entry((device(stat), stat.st_ino)).or_insert(next))
    }

    fn left_out(&self, path: &Path, why: &'static str) -> LeftOut {
        LeftOut {
            path: self.root.join(path),
            why,
        }
    }
}

const NOT_READABLE: &str = "it may not be read by this user";
const MOUNTED: &str = "another filesystem is mounted there";

fn os_str(name: &[u8]) -> &std::ffi::OsStr {
    std::os::unix::ffi::OsStrExt::from_bytes(name)
}

#[allow(
    clippy::unnecessary_cast,
    reason = "operating systems have numbers of different widths for it"
)]
fn meta(stat: &Stat, xattrs: Xattrs) -> Meta {
    Meta {
        mode: (stat.st_mode & 0o7777) as u16,
        uid: if stat.st_uid == rustix::process::geteuid().as_raw() {
            0
        } else {
            stat.st_uid
        },
        gid: if stat.st_gid == rustix::process::getegid().as_raw() {
            0
        } else {
            stat.st_gid
        },
        mtime: Mtime {
            sec: stat.st_mtime,
            nsec: stat.st_mtime_nsec as u32,
        },
        xattrs,
    }
}

/// Which filesystem it is on.
#[allow(
    clippy::unnecessary_cast,
    reason = "operating systems have numbers of different widths for it"
)]
fn device(stat: &Stat) -> u64 {
    stat.st_dev as u64
}

fn fd_xattrs(fd: impl AsFd) -> rustix::io::Result<Xattrs> {
    let fd = fd.as_fd();
    collect_xattrs(
        |list| rustix::fs::flistxattr(fd, list),
        |name, value| rustix::fs::fgetxattr(fd, name, value),
    )
}

/// The xattrs of a file that cannot be opened, through a path that no symlink in the directory can
/// divert.
fn name_xattrs(dir: BorrowedFd<'_>, name: &CStr) -> rustix::io::Result<Xattrs> {
    let mut path = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
    path.extend(name.to_bytes());
    let path = CString::new(path).map_err(|_| Errno::INVAL)?;
    collect_xattrs(
        |list| rustix::fs::llistxattr(&path, list),
        |name, value| rustix::fs::lgetxattr(&path, name, value),
    )
}

fn collect_xattrs(
    list: impl Fn(&mut [u8]) -> rustix::io::Result<usize>,
    get: impl Fn(&CStr, &mut [u8]) -> rustix::io::Result<usize>,
) -> rustix::io::Result<Xattrs> {
    let mut xattrs = Xattrs::new();
    let mut small = [0; 256];
    let mut large = Vec::new();
    let names = match list(&mut small) {
        Ok(len) => small.get(..len),
        Err(Errno::RANGE) => {
            large.resize(MAX_XATTR_LIST, 0);
            let len = list(&mut large)?;
            large.get(..len)
        }
        Err(Errno::NOTSUP | Errno::ACCESS | Errno::PERM | Errno::NOENT) => None,
        Err(errno) => return Err(errno),
    };
    let names = names.unwrap_or_default().split_inclusive(|&byte| byte == 0);
    for name in names.filter_map(|name| CStr::from_bytes_with_nul(name).ok()) {
        let of_host = HOST_XATTRS
            .iter()
            .any(|host| name.to_bytes().starts_with(host));
        if of_host || xattrs.len() >= MAX_XATTRS {
            continue;
        }
        let mut value = vec![0; MAX_XATTR_VALUE];
        match get(name, &mut value) {
            Ok(len) => {
                value.truncate(len);
                xattrs.insert(name.to_bytes().into(), value.into());
            }
            // Gone meanwhile, or not for this user.
            Err(Errno::NODATA | Errno::ACCESS | Errno::PERM | Errno::NOTSUP) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(xattrs)
}
