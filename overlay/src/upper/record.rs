//! What the upper knows of an inode, and the changes that its log is made of.

use std::collections::BTreeMap;
use std::sync::Arc;

use iii_store::ObjectId;
use iii_store::id::ID_LEN;
use iii_store::layer::{Kind, NodeRef};
use iii_store::tree::Rdev;
use serde::ser::SerializeMap as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::posix::Time;

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
    /// In the flat file with this number. When `dirty`, it has been written to since this record
    /// was, and its own length and mtime are the true ones.
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

/// Where a file's bytes are, and how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bytes {
    pub(crate) data: Data,
    pub(crate) size: u64,
}

/// What an inode is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Body {
    /// A directory. If it has an origin, the entries of the merged lower directory there show
    /// through.
    Dir,
    /// A regular file.
    File {
        /// Where its bytes are.
        data: Data,
        /// Its length.
        size: u64,
    },
    /// A symlink and its target.
    Symlink(#[serde(with = "shared")] Arc<[u8]>),
    /// A named pipe.
    Fifo,
    /// A Unix socket.
    Socket,
    /// A character device.
    Char(Device),
    /// A block device.
    Block(Device),
}

/// Bytes that several records share, written as a list of bytes.
mod shared {
    use super::{Arc, Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(bytes: &Arc<[u8]>, to: S) -> Result<S::Ok, S::Error> {
        (**bytes).serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Arc<[u8]>, D::Error> {
        Box::<[u8]>::deserialize(from).map(Arc::from)
    }
}

/// [`shared`], or nothing.
mod shared_option {
    use super::{Arc, Deserialize, Deserializer, Serialize, Serializer};

    #[allow(clippy::ref_option)] // serde's signature
    pub(super) fn serialize<S: Serializer>(
        bytes: &Option<Arc<[u8]>>,
        to: S,
    ) -> Result<S::Ok, S::Error> {
        bytes.as_deref().serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        from: D,
    ) -> Result<Option<Arc<[u8]>>, D::Error> {
        Ok(Option::<Box<[u8]>>::deserialize(from)?.map(Arc::from))
    }
}

/// Extended attributes, by name. Clones share one map until one of them changes: most operations
/// copy a record and leave these as they are.
#[derive(Debug, Clone, Default)]
pub struct RecordXattrs(Option<Arc<XattrMap>>);

type XattrMap = BTreeMap<Box<[u8]>, Box<[u8]>>;

impl RecordXattrs {
    /// The value of `name`.
    pub fn get(&self, name: &[u8]) -> Option<&[u8]> {
        self.0.as_ref()?.get(name).map(|value| &**value)
    }

    /// Whether there is one called `name`.
    pub fn contains_key(&self, name: &[u8]) -> bool {
        self.get(name).is_some()
    }

    /// Sets one.
    pub fn insert(&mut self, name: Box<[u8]>, value: Box<[u8]>) {
        Arc::make_mut(self.0.get_or_insert_default()).insert(name, value);
    }

    /// Removes one, and returns its value.
    pub fn remove(&mut self, name: &[u8]) -> Option<Box<[u8]>> {
        // Without the question, a map that is shared would be copied for nothing.
        self.get(name)?;
        let map = Arc::make_mut(self.0.as_mut()?);
        let value = map.remove(name);
        if map.is_empty() {
            self.0 = None;
        }
        value
    }

    /// All of them, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let map = self.0.iter().flat_map(|map| map.iter());
        map.map(|(name, value)| (&**name, &**value))
    }

    /// Their names, in order.
    pub fn keys(&self) -> impl Iterator<Item = &[u8]> {
        self.iter().map(|(name, _)| name)
    }

    /// Their number.
    pub fn len(&self) -> usize {
        self.0.as_ref().map_or(0, |map| map.len())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of their names and values.
    pub fn bytes(&self) -> usize {
        self.iter().map(|(n, v)| n.len() + v.len()).sum()
    }

    /// As a map of their own.
    pub fn to_map(&self) -> iii_store::tree::Xattrs {
        self.0.as_deref().cloned().unwrap_or_default()
    }

    fn is_shared_with(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (None, None) => true,
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            _ => false,
        }
    }
}

impl PartialEq for RecordXattrs {
    fn eq(&self, other: &Self) -> bool {
        self.is_shared_with(other) || self.iter().eq(other.iter())
    }
}

impl Eq for RecordXattrs {}

impl FromIterator<(Box<[u8]>, Box<[u8]>)> for RecordXattrs {
    fn from_iter<I: IntoIterator<Item = (Box<[u8]>, Box<[u8]>)>>(pairs: I) -> Self {
        let map = XattrMap::from_iter(pairs);
        Self((!map.is_empty()).then(|| Arc::new(map)))
    }
}

impl Serialize for RecordXattrs {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        // The format wants their number first.
        let mut map = to.serialize_map(Some(self.len()))?;
        for (name, value) in self.iter() {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for RecordXattrs {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Ok(XattrMap::deserialize(from)?.into_iter().collect())
    }
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
    pub xattrs: RecordXattrs,
    /// The path of the lower inode that this one is, and that every lower name of it leads to; none
    /// for an inode of the upper's own.
    #[serde(with = "shared_option")]
    pub origin: Option<Arc<[u8]>>,
    /// What it is.
    pub body: Body,
}

impl Record {
    /// A record of the lower entry `node` with the metadata of `meta` and `nlink` names, of which
    /// `origin` is one.
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

    /// Bytes of what has no fixed length: xattrs, the target and the path of the origin.
    pub fn bytes(&self) -> u64 {
        let target = match &self.body {
            Body::Symlink(target) => target.len(),
            _ => 0,
        };
        let origin = self.origin.as_ref().map_or(0, |origin| origin.len());
        (self.xattrs.bytes() + target + origin) as u64
    }

    /// What differs from `was`, if that is all within an [`Update`]. It looks at no bytes of xattrs
    /// or paths: a record that was changed shares those that it kept.
    pub fn update_of(&self, was: &Self) -> Option<Update> {
        let shared = |one: &Option<Arc<[u8]>>, other: &Option<Arc<[u8]>>| match (one, other) {
            (None, None) => true,
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            _ => false,
        };
        let file = match (&self.body, &was.body) {
            (one, other) if one == other && !matches!(one, Body::Symlink(_)) => None,
            (Body::File { data, size }, Body::File { .. }) => Some((*data, *size)),
            (Body::Symlink(one), Body::Symlink(other)) if Arc::ptr_eq(one, other) => None,
            _ => return None,
        };
        let rest = self.btime == was.btime
            && self.xattrs.is_shared_with(&was.xattrs)
            && shared(&self.origin, &was.origin);
        rest.then_some(Update {
            mode: self.mode,
            uid: self.uid,
            gid: self.gid,
            nlink: self.nlink,
            atime: self.atime,
            mtime: self.mtime,
            ctime: self.ctime,
            file,
        })
    }

    /// Takes an update over.
    pub fn update(&mut self, update: &Update) {
        self.mode = update.mode;
        self.uid = update.uid;
        self.gid = update.gid;
        self.nlink = update.nlink;
        self.atime = update.atime;
        self.mtime = update.mtime;
        self.ctime = update.ctime;
        if let (Body::File { data, size }, Some(file)) = (&mut self.body, update.file) {
            (*data, *size) = file;
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

/// What operations change of an inode time and again, without what can be long.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Update {
    /// See [`Record::mode`].
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// See [`Record::nlink`].
    pub nlink: u32,
    /// Last access.
    pub atime: Time,
    /// Last change of the contents.
    pub mtime: Time,
    /// Last change of the inode.
    pub ctime: Time,
    /// Of a regular file, where its bytes are, and their number.
    pub file: Option<(Data, u64)>,
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
    /// In the directory with this number, the name leads to the inode with that one; or, with none,
    /// to nothing.
    Entry(u64, Box<[u8]>, Option<u64>),
    /// In the directory with this number, the name is as the lower has it.
    Clear(u64, Box<[u8]>),
    /// What changed in the project since the chain's layer of it was taken over from these, of
    /// which the last is the newest. Since version 2 of the log.
    Applied(Vec<[u8; ID_LEN]>),
    /// The upper was made from this layer (see [`crate::thaw`]), which holds contents that its
    /// files still refer to. Since version 3 of the log; the first batch of a log tells, or none
    /// does.
    Thawed([u8; ID_LEN]),
    /// Of the inode with this number, these things are now so. Since version 4 of the log.
    Update(u64, Box<Update>),
    /// Everything in the log before this offset is whole on disk, file data included. Since version
    /// 4 of the log: see [`super::log`].
    Commit(u64),
}

impl Op {
    /// Whether it belongs to what removes something.
    pub fn removes(&self) -> bool {
        matches!(
            self,
            Self::Forget(_) | Self::Entry(_, _, None) | Self::Clear(..)
        )
    }

    /// The inode that it tells of or leads to.
    pub fn inode(&self) -> Option<u64> {
        match *self {
            Self::Inode(number, _) | Self::Update(number, _) => Some(number),
            Self::Entry(_, _, to) => to,
            _ => None,
        }
    }
}
