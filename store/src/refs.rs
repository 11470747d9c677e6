//! Refs: names that keep layers. The file of a ref is replaced at once, by the holder of its lock.

use std::fmt::Write;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::disk::names;
use crate::error::{IoContext, StoreError};
use crate::id::{LayerId, TreeId};
use crate::lock::FileLock;
pub use crate::ref_kind::RefKind;
use crate::reserve;
use crate::store::{Store, read_json, write_json};

/// Longest name, in bytes.
pub const MAX_REF_NAME: usize = 4096;
/// Most layers of one ref.
pub const MAX_REF_LAYERS: usize = 1024;
/// Longest file of one ref, in bytes.
const MAX_REF_FILE: u64 = 16 << 20;
/// Longest escaped name that is a file name as it is.
const MAX_PLAIN: usize = 180;

impl RefKind {
    /// Whether a ref of this kind that cannot be read may keep a layer. A damaged cache
    /// volume keeps nothing: it is filled again.
    pub(crate) fn may_keep(self, err: &StoreError) -> bool {
        self != Self::Volume || !err.is_damage()
    }
}

/// The layers under a name, and data of its owner.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ref {
    /// Bottom first.
    pub layers: Vec<LayerId>,
    /// The owner's own; the store does not look into it.
    #[serde(default)]
    pub info: serde_json::Value,
}

/// The file of a ref.
#[derive(Debug, Serialize, Deserialize)]
struct RefFile {
    name: String,
    #[serde(flatten)]
    content: Ref,
    /// The tree of each layer, in their order, as far as they are known: by it another layer is
    /// found that serves in place of one that was lost. Files of earlier programs have none.
    #[serde(default)]
    trees: Vec<Option<TreeId>>,
}

impl RefFile {
    /// The tree of a layer that it names.
    fn tree_of(&self, id: &LayerId) -> Option<TreeId> {
        let at = self.content.layers.iter().position(|layer| layer == id)?;
        *self.trees.get(at)?
    }
}

/// The file name of a ref. Names that differ differ here, on filesystems that fold case, too.
pub(crate) fn escape(name: &str) -> String {
    let mut escaped = String::new();
    for &byte in name.as_bytes() {
        match byte {
            b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-' => escaped.push(byte.into()),
            b'.' if !escaped.is_empty() => escaped.push('.'),
            _ => {
                // Writing to a string cannot fail.
                let _ = write!(escaped, "%{byte:02x}");
            }
        }
    }
    if escaped.len() > MAX_PLAIN {
        escaped.truncate(MAX_PLAIN - 80);
        escaped.push_str("%-");
        escaped.push_str(&blake3::hash(name.as_bytes()).to_hex());
    }
    escaped
}

impl Store {
    fn ref_path(&self, kind: RefKind, name: &str) -> Result<PathBuf, StoreError> {
        if name.is_empty() || name.len() > MAX_REF_NAME {
            return Err(StoreError::TooLarge {
                what: "the name of a ref (or it is empty)",
                limit: MAX_REF_NAME as u64,
            });
        }
        Ok(self.dir().join(kind.path()).join(escape(name)))
    }

    /// Keeps others from a name until the guard is dropped, so that what it has may depend on what
    /// it had.
    pub fn edit_ref(&self, kind: RefKind, name: &str) -> Result<RefEdit<'_>, StoreError> {
        self.require_writable()?;
        let path = self.ref_path(kind, name)?;
        let lock = format!("{}.{}", escape(name), kind.path().replace('/', "."));
        let lock = self.dir().join("locks").join(lock);
        Ok(RefEdit {
            _lock: FileLock::acquire(self.disk(), &lock, &|| {})?,
            store: self,
            kind,
            name: name.to_owned(),
            path,
        })
    }

    /// Gives layers a name, durably, in place of earlier ones. They must be in the store and pinned
    /// by the caller.
    pub fn set_ref(&self, kind: RefKind, name: &str, content: &Ref) -> Result<(), StoreError> {
        self.edit_ref(kind, name)?.set(content)
    }

    /// The ref of this name.
    pub fn get_ref(&self, kind: RefKind, name: &str) -> Result<Option<Ref>, StoreError> {
        let file: Option<RefFile> = read_json(
            self.disk().as_ref(),
            &self.ref_path(kind, name)?,
            MAX_REF_FILE,
        )?;
        Ok(file
            .filter(|file| file.name == name)
            .map(|file| file.content))
    }

    /// The ref in a file of the directory of its kind. One that does not match its file name is
    /// damaged.
    pub(crate) fn read_ref(
        &self,
        kind: RefKind,
        file_name: &str,
    ) -> Result<Option<(String, Ref)>, StoreError> {
        let path = self.dir().join(kind.path()).join(file_name);
        let file: Option<RefFile> = read_json(self.disk().as_ref(), &path, MAX_REF_FILE)?;
        let Some(RefFile { name, content, .. }) = file else {
            return Ok(None);
        };
        if escape(&name) != file_name || content.layers.len() > MAX_REF_LAYERS {
            let what = "it is not the ref that its name says";
            return Err(StoreError::Damaged { path, what });
        }
        Ok(Some((name, content)))
    }

    /// The files of the refs of a kind. A store that an older program made, and that can but be
    /// read, has no directory of kinds that are newer.
    pub(crate) fn ref_files(&self, kind: RefKind) -> Result<Vec<String>, StoreError> {
        match names(self.disk().as_ref(), &self.dir().join(kind.path())) {
            Err(error)
                if error.io_kind() == Some(std::io::ErrorKind::NotFound)
                    && self.is_read_only()
                    && kind.feature().is_some() =>
            {
                Ok(Vec::new())
            }
            other => other,
        }
    }

    /// All names of a kind, sorted, with their refs. One that cannot be read is an error: it may
    /// keep a layer. A damaged cache volume is left out.
    pub fn list_refs(&self, kind: RefKind) -> Result<Vec<(String, Ref)>, StoreError> {
        let (refs, mut unreadable) = self.readable_refs(kind)?;
        unreadable.retain(|err| kind.may_keep(err));
        unreadable.pop().map_or(Ok(refs), Err)
    }

    /// As [`Store::list_refs`], of those that can be read, and why the others cannot.
    #[expect(clippy::type_complexity, reason = "two lists")]
    pub fn readable_refs(
        &self,
        kind: RefKind,
    ) -> Result<(Vec<(String, Ref)>, Vec<StoreError>), StoreError> {
        let (mut refs, mut unreadable) = (Vec::new(), Vec::new());
        for name in self.ref_files(kind)? {
            match self.read_ref(kind, &name) {
                // One that went meanwhile is not there.
                Ok(found) => refs.extend(found),
                Err(err) => unreadable.push(err),
            }
        }
        refs.sort_by(|a, b| a.0.cmp(&b.0));
        Ok((refs, unreadable))
    }

    /// The tree of a layer, as far as a ref names the layer and knows it.
    pub(crate) fn tree_of(&self, id: &LayerId) -> Result<Option<TreeId>, StoreError> {
        let disk = self.disk().as_ref();
        for kind in RefKind::ALL {
            let dir = self.dir().join(kind.path());
            for name in self.ref_files(kind)? {
                let file = read_json::<RefFile>(disk, &dir.join(name), MAX_REF_FILE);
                let tree = file.ok().flatten().and_then(|file| file.tree_of(id));
                if tree.is_some() {
                    return Ok(tree);
                }
            }
        }
        Ok(None)
    }

    /// Removes a name, durably. Says whether there was one.
    pub fn remove_ref(&self, kind: RefKind, name: &str) -> Result<bool, StoreError> {
        reserve::with_room(self.site(), || self.edit_ref(kind, name)?.remove())
    }
}

/// The right to change one ref, see [`Store::edit_ref`].
#[derive(Debug)]
pub struct RefEdit<'a> {
    _lock: FileLock,
    store: &'a Store,
    kind: RefKind,
    name: String,
    path: PathBuf,
}

impl RefEdit<'_> {
    /// The ref of the name.
    pub fn get(&self) -> Result<Option<Ref>, StoreError> {
        self.store.get_ref(self.kind, &self.name)
    }

    /// As [`Store::remove_ref`].
    pub fn remove(self) -> Result<bool, StoreError> {
        let (disk, path) = (self.store.disk(), &self.path);
        match disk.remove(path) {
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            other => other.at("removing", path)?,
        }
        let dir = path.parent().unwrap_or(path);
        disk.sync_dir(dir).at("syncing", dir)?;
        Ok(true)
    }

    /// As [`Store::set_ref`]. A layer that is not in the store is refused, unless the ref names it
    /// already: a ref that is not whole may be changed without a loss of layers.
    pub fn set(&self, content: &Ref) -> Result<(), StoreError> {
        if content.layers.len() > MAX_REF_LAYERS {
            return Err(StoreError::TooLarge {
                what: "the number of layers of a ref",
                limit: MAX_REF_LAYERS as u64,
            });
        }
        let lease = self.store.lease("ref")?;
        if let Some(feature) = self.kind.feature() {
            self.store.require_feature(feature)?;
        }
        let (disk, path) = (self.store.disk().as_ref(), &self.path);
        let before = match read_json::<RefFile>(disk, path, MAX_REF_FILE) {
            // It is replaced.
            Err(err) if err.is_damage() => None,
            other => other?,
        };
        let before = before.filter(|file| file.name == self.name);
        let mut trees = Vec::new();
        for id in &content.layers {
            let named = before
                .as_ref()
                .filter(|file| file.content.layers.contains(id));
            match self.store.require_layer(id) {
                Err(StoreError::MissingLayer(_)) if named.is_some() => {}
                other => other?,
            }
            let tree = named.and_then(|file| file.tree_of(id));
            trees.push(tree.or_else(|| Some(self.store.layer(id).ok()?.tree_id())));
        }
        let file = RefFile {
            name: self.name.clone(),
            content: content.clone(),
            trees,
        };
        write_json(self.store, &lease, &self.path, &file, MAX_REF_FILE)
    }
}
