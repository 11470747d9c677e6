//! Keys: from the inputs of a recipe to the layers that it made.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::{IoContext, StoreError};
use crate::facts::Fact;
use crate::id::{KeyId, LayerId, TreeId};
use crate::lease::Lease;
use crate::lock::FileLock;
use crate::store::{Store, read_json, write_json};

/// Most records of one key; the oldest go first.
pub const MAX_RECORDS: usize = 8;
/// Of a record's provenance: where it was fetched from, if it was not built here.
pub const ORIGIN: &str = "cache";
/// Longest file of one key, in bytes.
pub(crate) const MAX_KEY_FILE: u64 = 256 << 20;

/// One result of a recipe: what it looked at, and the layer it made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// What it saw of the project. The record holds for a project of which all of this is true.
    pub facts: Vec<Fact>,
    /// The layer.
    pub layer_id: LayerId,
    /// The layer without its mtimes.
    pub tree_id: TreeId,
    /// For people: what kind of step, when, how long it took, why it ran.
    pub provenance: serde_json::Map<String, serde_json::Value>,
}

impl Record {
    /// Where it was fetched from; nothing for what was built here.
    pub fn origin(&self) -> Option<&str> {
        self.provenance.get(ORIGIN)?.as_str()
    }

    /// Whether this one makes `old` useless. What was fetched never makes what was built here so.
    fn replaces(&self, old: &Self) -> bool {
        self.facts == old.facts && (self.origin().is_none() || self.origin() == old.origin())
    }
}

/// The file of a key.
#[derive(Debug, Default, Serialize, Deserialize)]
struct KeyFile {
    /// What was built here, the newest first, and then what was fetched, the newest first.
    records: Vec<Record>,
}

impl Store {
    pub(crate) fn key_path(&self, key: &KeyId) -> PathBuf {
        self.dir().join("keys").join(key.to_string())
    }

    /// The records of a key, those that were built here first, and each kind the newest first. Their layers may be gone: pin, then look. A file that is damaged holds none:
    /// what it said can be built anew, and [`Store::verify`] tells of it.
    pub fn records(&self, key: &KeyId) -> Result<Vec<Record>, StoreError> {
        match self.checked_records(key) {
            Err(StoreError::Json { .. } | StoreError::Damaged { .. }) => Ok(Vec::new()),
            other => other,
        }
    }

    /// As [`Store::records`], but a damaged file is an error.
    pub(crate) fn checked_records(&self, key: &KeyId) -> Result<Vec<Record>, StoreError> {
        let file: Option<KeyFile> =
            read_json(self.disk().as_ref(), &self.key_path(key), MAX_KEY_FILE)?;
        Ok(file.unwrap_or_default().records)
    }

    /// Adds a record in front of the key's others, durably; one that was fetched, in front of the others that were. It replaces
    /// one with the same facts, but what was fetched replaces only what came from there, and is the first to go. Its layer must
    /// be in the store and pinned by the caller.
    pub fn put_record(&self, key: &KeyId, record: Record) -> Result<(), StoreError> {
        let lease = self.lease("record")?;
        self.require_layer(&record.layer_id)?;
        let lock = self.dir().join("locks").join(format!("{key}.key"));
        let _lock = FileLock::acquire(self.disk(), &lock, &|| {})?;
        let mut records = self.records(key)?;
        records.retain(|old| !record.replaces(old));
        let fetched = |one: &Record| one.origin().is_some();
        let at = if fetched(&record) {
            records.iter().position(fetched).unwrap_or(records.len())
        } else {
            0
        };
        records.insert(at, record);
        records.truncate(MAX_RECORDS);
        let path = self.key_path(key);
        write_json(self, &lease, &path, &KeyFile { records }, MAX_KEY_FILE)
    }

    /// Removes the records of a key whose layers `go`, durably. Returns how many they were.
    pub(crate) fn drop_records(
        &self,
        lease: &Lease,
        key: &KeyId,
        go: &dyn Fn(&LayerId) -> bool,
    ) -> Result<u64, StoreError> {
        let lock = self.dir().join("locks").join(format!("{key}.key"));
        let _lock = FileLock::acquire(self.disk(), &lock, &|| {})?;
        let mut records = self.records(key)?;
        let before = records.len();
        records.retain(|record| !go(&record.layer_id));
        let dropped = before - records.len();
        if dropped == 0 {
            return Ok(0);
        }
        let path = self.key_path(key);
        if records.is_empty() {
            self.disk().remove(&path).at("removing", &path)?;
            let dir = self.dir().join("keys");
            self.disk().sync_dir(&dir).at("syncing", &dir)?;
        } else {
            write_json(self, lease, &path, &KeyFile { records }, MAX_KEY_FILE)?;
        }
        Ok(dropped as u64)
    }
}
