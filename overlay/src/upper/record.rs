//! What the upper knows of an inode, and the changes that its log is made of.

use std::collections::BTreeMap;

use iii_store::ObjectId;
use iii_store::id::ID_LEN;
use iii_store::layer::{Kind, NodeRef};
use iii_store::tree::Rdev;
use serde::{Deserialize, Serialize};

use crate::fs::Time;

/// A device number as the log writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

impl From<Rdev> for Device {
    fn from(rdev: Rdev) -> Self {
        Self {
            major: rdev.major,
            minor: rdev.minor,
        }
    }
}

impl From<Device> for Rdev {
    fn from(device: Device) -> Self {
        Self {
            major: device.major,
            minor: device.minor,
        }
    }
}

/// Where a file's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Data {
    /// Nowhere: it is empty.
    Empty,
    /// In the store, unchanged.
    Lower([u8; ID_LEN]),
    /// In the flat file with this number. When `dirty`, it has been written to since this record was, and its own length
    /// and mtime are the true ones.
    Flat {
        /// The flat file's number.
        number: u64,
        /// See above.
        dirty: bool,
    },
}

impl Data {
    /// The data of the object.
    pub fn object(object: ObjectId) -> Self {
        Self::Lower(*object.as_bytes())
    }
}

/// What an inode is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Body {
    /// A directory. If it has an origin, the entries of the merged lower directory there show through.
    Dir,
    /// A regular file.
    File {
        /// Where its bytes are.
        data: Data,
        /// Its length.
        size: u64,
    },
    /// A symlink and its target.
    Symlink(Box<[u8]>),
    /// A named pipe.
    Fifo,
    /// A Unix socket.
    Socket,
    /// A character device.
    Char(Device),
    /// A block device.
    Block(Device),
}

/// An inode of the upper.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// `mode & 07777`.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Number of names. A directory has one; what it reports is counted from its entries.
    pub nlink: u32,
    /// Last access.
    pub atime: Time,
    /// Last change of the contents.
    pub mtime: Time,
    /// Last change of the inode.
    pub ctime: Time,
    /// Creation.
    pub btime: Time,
    /// Extended attributes.
    pub xattrs: BTreeMap<Box<[u8]>, Box<[u8]>>,
    /// The path of the lower inode that this one is, and that every lower name of it leads to; none for an inode of the
    /// upper's own.
    pub origin: Option<Box<[u8]>>,
    /// What it is.
    pub body: Body,
}

impl Record {
    /// A record of the lower entry `node` with the metadata of `meta` and `nlink` names, of which `origin` is one.
    pub fn of_lower(node: NodeRef<'_>, meta: NodeRef<'_>, nlink: u32, origin: &[u8]) -> Self {
        let mtime = meta.mtime().into();
        let body = match node.kind() {
            Kind::File if node.size() == 0 => Body::File {
                data: Data::Empty,
                size: 0,
            },
            Kind::File => Body::File {
                data: Data::object(node.object()),
                size: node.size(),
            },
            Kind::Symlink => Body::Symlink(node.target().into()),
            Kind::Fifo => Body::Fifo,
            Kind::Socket => Body::Socket,
            Kind::Char => Body::Char(node.rdev().into()),
            Kind::Block => Body::Block(node.rdev().into()),
            Kind::Dir | Kind::Whiteout => Body::Dir,
        };
        Self {
            mode: meta.mode(),
            uid: meta.uid(),
            gid: meta.gid(),
            nlink,
            atime: mtime,
            mtime,
            ctime: mtime,
            btime: mtime,
            xattrs: meta
                .xattrs()
                .map(|(name, value)| (name.into(), value.into()))
                .collect(),
            origin: Some(origin.into()),
            body,
        }
    }

    /// What it is.
    pub fn kind(&self) -> Kind {
        match self.body {
            Body::Dir => Kind::Dir,
            Body::File { .. } => Kind::File,
            Body::Symlink(_) => Kind::Symlink,
            Body::Fifo => Kind::Fifo,
            Body::Socket => Kind::Socket,
            Body::Char(_) => Kind::Char,
            Body::Block(_) => Kind::Block,
        }
    }

    /// Whether it is a directory.
    pub fn is_dir(&self) -> bool {
        matches!(self.body, Body::Dir)
    }

    /// Length in bytes, as `stat` tells it.
    pub fn size(&self) -> u64 {
        match &self.body {
            Body::File { size, .. } => *size,
            Body::Symlink(target) => target.len() as u64,
            _ => 0,
        }
    }

    /// The number of its flat file.
    pub fn flat(&self) -> Option<u64> {
        match self.body {
            Body::File {
                data: Data::Flat { number, .. },
                ..
            } => Some(number),
            _ => None,
        }
    }
}

/// Which layers an upper stands on.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Chain {
    /// Their ids, bottom first.
    pub layers: Vec<[u8; ID_LEN]>,
    /// Which of them is the project's.
    pub project: Option<u32>,
}

/// One change. A batch of them is what the log appends at once, whole or not at all.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Op {
    /// The upper stands on this chain from now on.
    Chain(Chain),
    /// The inode with this number is now this. Comes before the entries that name it.
    Inode(u64, Box<Record>),
    /// The inode with this number is gone, and all entries in it.
    Forget(u64),
    /// In the directory with this number, the name leads to the inode with that one; or, with none, to nothing.
    Entry(u64, Box<[u8]>, Option<u64>),
    /// In the directory with this number, the name is as the lower has it.
    Clear(u64, Box<[u8]>),
    /// What changed in the project since the chain's layer of it was taken over from these, of which the last is the newest. Since
    /// version 2 of the log.
    Applied(Vec<[u8; ID_LEN]>),
    /// The upper was made from this layer (see [`crate::thaw`]), which holds contents that its files still refer to. Since version 3
    /// of the log; the first batch of a log tells, or none does.
    Thawed([u8; ID_LEN]),
}
