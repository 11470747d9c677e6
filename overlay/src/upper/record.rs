//! The record of an inode in the upper, and the changes that make up its log.

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

/// The location of a file's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Data {
    /// Nowhere: the file is empty.
    Empty,
    /// In the store, unchanged, as the object with this id.
    Lower([u8; ID_LEN]),
    /// In the flat file with this number. When `dirty`, the flat file was written to after this
    /// record, and its own length and mtime are the true ones.
    Flat {
        /// The flat file's number.
        number: u64,
        /// See [`Data::Flat`].
        dirty: bool,
    },
}

impl Data {
    /// The data of the object.
    pub fn object(object: ObjectId) -> Self {
        Self::Lower(*object.as_bytes())
    }
}

/// The location of a file's bytes, and their number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bytes {
    pub(crate) data: Data,
    pub(crate) size: u64,
}

/// The type of an inode, with the parts that depend on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Body {
    /// A directory. If it has an origin, the entries of the merged lower directory there show
    /// through.
    Dir,
    /// A regular file.
    File {
        /// The location of the bytes.
        data: Data,
        /// Length in bytes.
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

/// Bytes that several records share, serialized as a list of bytes.
mod shared {
    use super::{Arc, Deserialize, Deserializer, Serialize, Serializer};

    pub(super) fn serialize<S: Serializer>(bytes: &Arc<[u8]>, to: S) -> Result<S::Ok, S::Error> {
        (**bytes).serialize(to)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Arc<[u8]>, D::Error> {
        Box::<[u8]>::deserialize(from).map(Arc::from)
    }
}

/// [`shared`], or none.
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
/// copy a record and leave its attributes unchanged.
#[derive(Debug, Clone, Default)]
pub struct RecordXattrs(Option<Arc<XattrMap>>);

type XattrMap = BTreeMap<Box<[u8]>, Box<[u8]>>;

impl RecordXattrs {
    /// The value of `name`.
    pub fn get(&self, name: &[u8]) -> Option<&[u8]> {
        self.0.as_ref()?.get(name).map(|value| &**value)
    }

    /// Whether an attribute is called `name`.
    pub fn contains_key(&self, name: &[u8]) -> bool {
        self.get(name).is_some()
    }

    /// Sets an attribute.
    pub fn insert(&mut self, name: Box<[u8]>, value: Box<[u8]>) {
        Arc::make_mut(self.0.get_or_insert_default()).insert(name, value);
    }

    /// Removes an attribute, and returns its value.
    pub fn remove(&mut self, name: &[u8]) -> Option<Box<[u8]>> {
        // Without this check, a shared map would be copied for nothing.
        self.get(name)?;
        let map = Arc::make_mut(self.0.as_mut()?);
        let value = map.remove(name);
        if map.is_empty() {
            self.0 = None;
        }
        value
    }

    /// All attributes, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        let map = self.0.iter().flat_map(|map| map.iter());
        map.map(|(name, value)| (&**name, &**value))
    }

    /// The names, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &[u8]> {
        self.iter().map(|(name, _)| name)
    }

    /// Number of attributes.
    pub fn len(&self) -> usize {
        self.0.as_ref().map_or(0, |map| map.len())
    }

    /// Whether the inode has no attributes.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of all names and values.
    pub fn bytes(&self) -> usize {
        self.iter().map(|(n, v)| n.len() + v.len()).sum()
    }

    /// A copy as a map of its own.
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
        // The format needs the number of entries first.
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
    /// Number of names. A directory has one; the count that it reports comes from its entries.
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
    /// The path of the lower inode that this record stands for: every lower name of that inode
    /// leads to this record. None for an inode of the upper's own.
    #[serde(with = "shared_option")]
    pub origin: Option<Arc<[u8]>>,
    /// The type of the inode.
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

    /// The type of the inode, as layers have it.
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

    /// Whether the inode is a directory.
    pub fn is_dir(&self) -> bool {
        matches!(self.body, Body::Dir)
    }

    /// Length in bytes, as `stat` reports it.
    pub fn size(&self) -> u64 {
        match &self.body {
            Body::File { size, .. } => *size,
            Body::Symlink(target) => target.len() as u64,
            _ => 0,
        }
    }

    /// Bytes of the parts of variable length: xattrs, the target and the path of the origin.
    pub fn bytes(&self) -> u64 {
        let target = match &self.body {
            Body::Symlink(target) => target.len(),
            _ => 0,
        };
        let origin = self.origin.as_ref().map_or(0, |origin| origin.len());
        (self.xattrs.bytes() + target + origin) as u64
    }

    /// The differences from `was`, if an [`Update`] can hold them all. This compares no bytes of
    /// xattrs or paths: a changed record shares the unchanged ones with `was`.
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

    /// Applies an update.
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

    /// The number of the flat file with the contents; none if the upper has none for this inode.
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

/// The parts of an inode that operations change often, without the parts that can be long.
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
    /// Of a regular file, the location of its bytes, and their number.
    pub file: Option<(Data, u64)>,
}

/// The layers that an upper stands on.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Chain {
    /// The ids of the layers, bottom first.
    pub layers: Vec<[u8; ID_LEN]>,
    /// The index of the project's layer.
    pub project: Option<u32>,
}

/// One change. The log appends the changes of a batch at once: all of them or none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Op {
    /// The upper stands on this chain from now on.
    Chain(Chain),
    /// The inode with this number has this record now. It comes before the entries that name the
    /// inode.
    Inode(u64, Box<Record>),
    /// The inode with this number is gone, with all its entries.
    Forget(u64),
    /// In the directory with the first number, the name leads to the inode with the second number;
    /// with none, the name is absent.
    Entry(u64, Box<[u8]>, Option<u64>),
    /// In the directory with this number, the upper has no entry of this name any more: the name is
    /// as the lower has it.
    Clear(u64, Box<[u8]>),
    /// The upper has taken over the changes of the project from the chain's project layer to these
    /// layers, of which the last is the newest. Since version 2 of the log.
    Applied(Vec<[u8; ID_LEN]>),
    /// The upper was made from this layer (see [`crate::thaw`]), and its files still refer to
    /// contents of the layer. Since version 3 of the log; only the first batch of a log may have
    /// it.
    Thawed([u8; ID_LEN]),
    /// The inode with this number has these values now. Since version 4 of the log.
    Update(u64, Box<Update>),
    /// Everything in the log before this offset is whole on disk, file data included. Since version
    /// 4 of the log: see [`super::log`].
    Commit(u64),
}

impl Op {
    /// Whether the change belongs to the removal of an entry.
    pub fn removes(&self) -> bool {
        matches!(
            self,
            Self::Forget(_) | Self::Entry(_, _, None) | Self::Clear(..)
        )
    }

    /// The inode that the change describes or leads to.
    pub fn inode(&self) -> Option<u64> {
        match *self {
            Self::Inode(number, _) | Self::Update(number, _) => Some(number),
            Self::Entry(_, _, to) => to,
            _ => None,
        }
    }
}
