//! Keys: from the inputs of a recipe to the layers that it made, for any number of projects.
//!
//! ```text
//! keys/<key>             JSON: prefixes, and a head for each record: its name, and its layer
//! facts/<key>.<facts>    JSON: the facts of a record, unless it has none
//! ```
//!
//! # Finding a record
//!
//! A record holds for a project if the looks of its facts find the same in that project. Comparing
//! the facts of each record would read all of them, so a search has two phases, as in a compiler
//! cache:
//!
//! 1. The file of the key has a *prefix* for each record: at most [`PREFIX`] of its looks, those
//!    that tell projects apart best, and a digest of what they found. Records with equal looks
//!    share a prefix, so each prefix is looked at once, and records whose digest is another are
//!    passed over.
//! 2. Of the records that are left, those with the same looks are one group. The facts of one of
//!    them are read, its looks are done, and the digest of what they find names the record of this
//!    group that holds, if there is one.
//!
//! A search among 1,000 records thus reads the key's file and about one file of facts. The record
//! that the caller's worker used last is tried first: a hint, on which no result depends.
//!
//! # Order
//!
//! A file of facts is durable before the file of the key names it, and is removed after that file
//! no longer does. Both are written with the lock of the key's records held. A crash can leave
//! facts that no record names; a collection removes them.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::PathBuf;

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use crate::disk::names;
use crate::error::{IoContext, StoreError};
use crate::facts::{self, Answers, Fact, How, Look};
use crate::id::{FactsId, KeyId, LayerId, LooksId, TreeId};
use crate::lease::Lease;
use crate::lock::FileLock;
use crate::refs::RefKind;
pub(crate) use crate::store::{FACTS_DIR, HEADS};
use crate::store::{Store, read_json, write_json_compact};
use crate::tree::components;

/// Most looks of a prefix.
pub const PREFIX: usize = 8;
/// Most looks of a prefix at contents and targets, and most at the contents of directories; all
/// other looks come after these.
const PREFIX_OF: [usize; 2] = [5, 2];
/// Most records of one key. Beyond it, the oldest whose layers no ref keeps are evicted.
pub const MAX_RECORDS: usize = 1 << 14;
/// The field of a record's provenance that has its origin, if the record was fetched.
pub const ORIGIN: &str = "cache";
/// Longest file of one key, or of the facts of one record, in bytes.
pub(crate) const MAX_KEY_FILE: u64 = 256 << 20;

/// One result of a recipe: the facts that it read, and the layer it made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The facts that the recipe read of the project. The record holds for each project in which
    /// all of them are true.
    pub facts: Vec<Fact>,
    /// The layer.
    pub layer_id: LayerId,
    /// The layer without its mtimes.
    pub tree_id: TreeId,
    /// For display only: the kind of step, its time, its duration, the reason it ran.
    pub provenance: serde_json::Map<String, serde_json::Value>,
}

impl Record {
    /// The origin of a fetched record; nothing for one that was built here.
    pub fn origin(&self) -> Option<&str> {
        self.provenance.get(ORIGIN)?.as_str()
    }
}

/// A record without its facts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RecordHead {
    /// The id of its facts.
    pub facts: FactsId,
    /// The number of its facts.
    pub count: u64,
    /// The layer.
    pub layer_id: LayerId,
    /// The layer without its mtimes.
    pub tree_id: TreeId,
    /// See [`Record::provenance`].
    pub provenance: serde_json::Map<String, serde_json::Value>,
    /// The id of the looks of its facts.
    looks: LooksId,
    /// Index of its prefix among those of the key.
    prefix: usize,
    /// The id of the facts that the looks of the prefix found.
    found: FactsId,
}

impl RecordHead {
    /// The origin of a fetched record; nothing for one that was built here.
    pub fn origin(&self) -> Option<&str> {
        self.provenance.get(ORIGIN)?.as_str()
    }

    /// Whether this record makes `old` useless. A fetched record never replaces one that was built
    /// here.
    fn replaces(&self, old: &Self) -> bool {
        self.facts == old.facts && (self.origin().is_none() || self.origin() == old.origin())
    }

    /// The record of this head, with these facts.
    #[must_use]
    pub fn with(self, facts: Vec<Fact>) -> Record {
        Record {
            facts,
            layer_id: self.layer_id,
            tree_id: self.tree_id,
            provenance: self.provenance,
        }
    }
}

/// The file of a key.
#[derive(Debug, Default, Serialize, Deserialize)]
struct KeyFile {
    /// Looks that tell the records apart, each list once.
    #[serde(default)]
    prefixes: Vec<Vec<Look>>,
    /// First the records that were built here, then the fetched ones; each kind the newest first.
    #[serde(default)]
    heads: Vec<RecordHead>,
    /// As earlier programs wrote them, facts included.
    #[serde(default, skip_serializing)]
    records: Vec<EarlierRecord>,
}

/// A record of an earlier program. One with facts holds for no project: such facts said less than
/// today's, so no search asks for its key any more.
#[derive(Debug, Deserialize)]
struct EarlierRecord {
    facts: Vec<IgnoredAny>,
    layer_id: LayerId,
    tree_id: TreeId,
    provenance: serde_json::Map<String, serde_json::Value>,
}

/// The file of the facts of a record.
#[derive(Debug, Serialize, Deserialize)]
struct FactsFile {
    facts: Vec<Fact>,
}

impl KeyFile {
    /// Takes over the records of earlier programs that still hold, which are those without facts.
    fn take_over(&mut self) {
        for record in std::mem::take(&mut self.records) {
            if !record.facts.is_empty() {
                continue;
            }
            let head = self.head(&Record {
                facts: Vec::new(),
                layer_id: record.layer_id,
                tree_id: record.tree_id,
                provenance: record.provenance,
            });
            self.heads.push(head);
        }
    }

    /// The head of a record. Adds the record's prefix to those of the file.
    fn head(&mut self, record: &Record) -> RecordHead {
        let prefix = prefix(&record.facts);
        let looks: Vec<Look> = prefix.iter().map(|fact| fact.look()).collect();
        let known = self.prefixes.iter().position(|known| *known == looks);
        let at = known.unwrap_or_else(|| {
            self.prefixes.push(looks);
            self.prefixes.len() - 1
        });
        let prefix: Vec<Fact> = prefix.into_iter().cloned().collect();
        RecordHead {
            facts: facts::facts_id(&record.facts),
            count: record.facts.len() as u64,
            layer_id: record.layer_id,
            tree_id: record.tree_id,
            provenance: record.provenance.clone(),
            looks: facts::looks_id(&record.facts),
            prefix: at,
            found: facts::facts_id(&prefix),
        }
    }

    /// Drops prefixes that no head uses.
    fn tidy(&mut self) {
        let used: BTreeSet<usize> = self.heads.iter().map(|head| head.prefix).collect();
        let new: HashMap<usize, usize> = used
            .iter()
            .enumerate()
            .map(|(new, old)| (*old, new))
            .collect();
        let mut old = 0;
        self.prefixes.retain(|_| {
            old += 1;
            used.contains(&(old - 1))
        });
        for head in &mut self.heads {
            head.prefix = new.get(&head.prefix).copied().unwrap_or_default();
        }
    }
}

/// The facts that tell projects apart best: contents first, the shallowest first, then the contents
/// of directories, then the rest.
fn prefix(facts: &[Fact]) -> Vec<&Fact> {
    let class = |fact: &Fact| match fact.seen.how() {
        How::Contents | How::Target => 0,
        How::Listing | How::Tree => 1,
        How::Exists => 2,
    };
    let mut sorted: Vec<(usize, usize, &Fact)> = facts
        .iter()
        .map(|fact| {
            let depth = components(&fact.path).count();
            (class(fact), depth, fact)
        })
        .collect();
    sorted.sort_by(|a, b| (a.0, a.1, &a.2.path).cmp(&(b.0, b.1, &b.2.path)));
    let mut rest = Vec::new();
    let mut chosen = Vec::new();
    let mut taken = [0; 3];
    for (class, _, fact) in sorted {
        taken[class] += 1;
        if PREFIX_OF
            .get(class)
            .is_some_and(|most| taken[class] <= *most)
        {
            chosen.push(fact);
        } else {
            rest.push(fact);
        }
    }
    chosen.extend(rest);
    chosen.truncate(PREFIX);
    chosen
}

/// The cost of a search.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SearchCost {
    /// Records of the key.
    pub records: usize,
    /// Prefixes whose looks were done.
    pub prefixes: usize,
    /// Files of facts that were read.
    pub files: usize,
}

/// Called with a record and its facts; true ends the search.
pub type TakeRecord<'a> = dyn FnMut(&RecordHead, &[Fact]) -> Result<bool, StoreError> + 'a;

/// A search for a record of a key.
pub struct Search<'a> {
    /// The facts of the record that the worker used last.
    pub last: Option<FactsId>,
    /// Whether the caller accepts a record at all.
    pub trusts: &'a dyn Fn(&RecordHead) -> bool,
    /// Called with each record that holds, the best one first.
    pub take: &'a mut TakeRecord<'a>,
}

impl Store {
    pub(crate) fn key_path(&self, key: &KeyId) -> PathBuf {
        self.dir().join("keys").join(key.to_string())
    }

    pub(crate) fn facts_path(&self, key: &KeyId, facts: &FactsId) -> PathBuf {
        self.dir().join(FACTS_DIR).join(format!("{key}.{facts}"))
    }

    /// The records of a key: first those that were built here, then the fetched ones, each kind the
    /// newest first. Their layers may be gone, so callers pin a layer before they look for it. A
    /// damaged file holds no records: its layers can be built anew, and [`Store::verify`] reports
    /// it.
    pub fn records(&self, key: &KeyId) -> Result<Vec<Record>, StoreError> {
        let mut records = Vec::new();
        for head in self.heads(key)? {
            records.extend(self.record(key, head)?);
        }
        Ok(records)
    }

    /// As [`Store::records`], without the facts.
    pub fn heads(&self, key: &KeyId) -> Result<Vec<RecordHead>, StoreError> {
        Ok(self.key_file(key)?.heads)
    }

    /// The record of a head; nothing if its facts are damaged or gone.
    pub fn record(&self, key: &KeyId, head: RecordHead) -> Result<Option<Record>, StoreError> {
        match self.checked_facts(key, &head) {
            Ok(facts) => Ok(facts.map(|facts| head.with(facts))),
            Err(StoreError::Json { .. } | StoreError::Damaged { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn key_file(&self, key: &KeyId) -> Result<KeyFile, StoreError> {
        match self.checked_key_file(key) {
            Err(StoreError::Json { .. } | StoreError::Damaged { .. }) => Ok(KeyFile::default()),
            other => other,
        }
    }

    fn checked_key_file(&self, key: &KeyId) -> Result<KeyFile, StoreError> {
        let path = self.key_path(key);
        let file: Option<KeyFile> = read_json(self.disk().as_ref(), &path, MAX_KEY_FILE)?;
        let mut file = file.unwrap_or_default();
        if file
            .heads
            .iter()
            .any(|head| head.prefix >= file.prefixes.len())
        {
            let what = "a record has no prefix";
            return Err(StoreError::Damaged { path, what });
        }
        file.take_over();
        Ok(file)
    }

    /// As [`Store::heads`], but a damaged file is an error.
    pub(crate) fn checked_heads(&self, key: &KeyId) -> Result<Vec<RecordHead>, StoreError> {
        Ok(self.checked_key_file(key)?.heads)
    }

    /// The facts of a record; nothing if they are gone, in which case the record is gone by now,
    /// too.
    pub(crate) fn checked_facts(
        &self,
        key: &KeyId,
        head: &RecordHead,
    ) -> Result<Option<Vec<Fact>>, StoreError> {
        if head.count == 0 {
            return Ok(Some(Vec::new()));
        }
        let path = self.facts_path(key, &head.facts);
        let file: Option<FactsFile> = read_json(self.disk().as_ref(), &path, MAX_KEY_FILE)?;
        let Some(FactsFile { facts }) = file else {
            return Ok(None);
        };
        if facts::facts_id(&facts) != head.facts {
            let what = "its facts do not match its name";
            return Err(StoreError::Damaged { path, what });
        }
        Ok(Some(facts))
    }

    /// Finds the records of a key that hold for a project: see the module's documentation. Their
    /// layers may be gone, so callers pin a layer before they look for it.
    pub fn find_record(
        &self,
        key: &KeyId,
        answers: &mut Answers<'_>,
        search: Search<'_>,
    ) -> Result<SearchCost, StoreError> {
        let KeyFile {
            prefixes, heads, ..
        } = self.key_file(key)?;
        let mut cost = SearchCost {
            records: heads.len(),
            ..SearchCost::default()
        };
        let Search { last, trusts, take } = search;
        let mut found: Vec<Option<FactsId>> = vec![None; prefixes.len()];
        // The facts that the looks of each group find in this project.
        let mut groups: HashMap<LooksId, (FactsId, Vec<Fact>)> = HashMap::new();
        let hint = heads.iter().filter(|head| Some(head.facts) == last);
        let mut tried = HashSet::new();
        for head in hint.chain(&heads) {
            if !trusts(head) {
                continue;
            }
            let (Some(looks), Some(answer)) =
                (prefixes.get(head.prefix), found.get_mut(head.prefix))
            else {
                continue;
            };
            let answer = *answer.get_or_insert_with(|| {
                cost.prefixes += 1;
                answers.facts_id(looks)
            });
            if answer != head.found {
                continue;
            }
            if let Entry::Vacant(group) = groups.entry(head.looks) {
                cost.files += usize::from(head.count != 0);
                let facts = match self.checked_facts(key, head) {
                    Ok(Some(facts)) => facts,
                    // Another record of the group may be whole.
                    Ok(None) | Err(StoreError::Json { .. } | StoreError::Damaged { .. }) => {
                        continue;
                    }
                    Err(error) => return Err(error),
                };
                let looks: Vec<Look> = facts.iter().map(Fact::look).collect();
                let facts = answers.facts(&looks);
                group.insert((facts::facts_id(&facts), facts));
            }
            if let Some((found, facts)) = groups.get(&head.looks)
                && *found == head.facts
                && tried.insert((head.layer_id, head.facts))
                && take(head, facts)?
            {
                break;
            }
        }
        Ok(cost)
    }

    fn records_lock(&self, key: &KeyId) -> Result<FileLock, StoreError> {
        let lock = self.dir().join("locks").join(format!("{key}.key"));
        FileLock::acquire(self.disk(), &lock, &|| {})
    }

    /// Adds a record, durably: one that was built here before all others of the key, a fetched one
    /// before the other fetched ones. A record replaces one with the same facts, but a fetched
    /// record replaces only one of the same origin, and is the first to be evicted. Its layer must
    /// be in the store and pinned by the caller. Returns the id of its facts.
    pub fn put_record(&self, key: &KeyId, mut record: Record) -> Result<FactsId, StoreError> {
        let lease = self.lease("record")?;
        self.require_layer(&record.layer_id)?;
        self.require_feature(HEADS)?;
        facts::sort(&mut record.facts);
        let _lock = self.records_lock(key)?;
        let mut file = self.key_file(key)?;
        let head = file.head(&record);
        let id = head.facts;
        if head.count != 0 {
            let path = self.facts_path(key, &id);
            let facts = FactsFile {
                facts: record.facts,
            };
            write_json_compact(self, &lease, &path, &facts, MAX_KEY_FILE)?;
        }
        file.heads.retain(|old| !head.replaces(old));
        let fetched = |one: &RecordHead| one.origin().is_some();
        let at = if fetched(&head) {
            file.heads
                .iter()
                .position(fetched)
                .unwrap_or(file.heads.len())
        } else {
            0
        };
        file.heads.insert(at, head);
        let dropped = self.evict(&mut file)?;
        file.tidy();
        write_json_compact(self, &lease, &self.key_path(key), &file, MAX_KEY_FILE)?;
        self.drop_facts(key, dropped, &file.heads)?;
        Ok(id)
    }

    /// Evicts the oldest records above the limit, except those whose layers a ref keeps. Returns
    /// the ids of their facts.
    fn evict(&self, file: &mut KeyFile) -> Result<Vec<FactsId>, StoreError> {
        let mut dropped = Vec::new();
        if file.heads.len() <= MAX_RECORDS {
            return Ok(dropped);
        }
        let mut kept = HashSet::new();
        for kind in RefKind::ALL {
            let refs = self.list_refs(kind)?;
            kept.extend(refs.into_iter().flat_map(|(_, content)| content.layers));
        }
        let mut at = file.heads.len();
        while file.heads.len() > MAX_RECORDS && at > 1 {
            at -= 1;
            if !kept.contains(&file.heads[at].layer_id) {
                dropped.push(file.heads.remove(at).facts);
            }
        }
        Ok(dropped)
    }

    /// Removes those of the `dropped` files of facts that none of `heads` names. Not durable, and
    /// need not be.
    fn drop_facts(
        &self,
        key: &KeyId,
        dropped: impl IntoIterator<Item = FactsId>,
        heads: &[RecordHead],
    ) -> Result<(), StoreError> {
        let named: HashSet<FactsId> = heads.iter().map(|head| head.facts).collect();
        for facts in dropped {
            if named.contains(&facts) {
                continue;
            }
            let path = self.facts_path(key, &facts);
            match self.disk().remove(&path) {
                Err(err) if err.kind() == std::io::ErrorKind::NotFound => {}
                other => other.at("removing", &path)?,
            }
        }
        Ok(())
    }

    /// Removes the records of a key for which `go` is true, durably. Returns how many.
    pub(crate) fn drop_records(
        &self,
        lease: &Lease,
        key: &KeyId,
        go: &dyn Fn(&RecordHead) -> bool,
    ) -> Result<u64, StoreError> {
        let _lock = self.records_lock(key)?;
        let mut file = self.key_file(key)?;
        let (gone, stay): (Vec<_>, Vec<_>) =
            std::mem::take(&mut file.heads).into_iter().partition(go);
        file.heads = stay;
        if gone.is_empty() {
            return Ok(0);
        }
        self.write_key(lease, key, &mut file)?;
        let count = gone.len() as u64;
        self.drop_facts(key, gone.into_iter().map(|head| head.facts), &file.heads)?;
        Ok(count)
    }

    /// Writes the file of a key, or removes it if the key has no records.
    fn write_key(&self, lease: &Lease, key: &KeyId, file: &mut KeyFile) -> Result<(), StoreError> {
        let path = self.key_path(key);
        if file.heads.is_empty() {
            self.disk().remove(&path).at("removing", &path)?;
            let dir = self.dir().join("keys");
            return self.disk().sync_dir(&dir).at("syncing", &dir);
        }
        file.tidy();
        write_json_compact(self, lease, &path, file, MAX_KEY_FILE)
    }

    /// Removes facts that no record names, which a crash left, and files of keys of which no record
    /// holds, which earlier programs left.
    pub(crate) fn sweep_records(&self, lease: &Lease) -> Result<(), StoreError> {
        let mut by_key: HashMap<KeyId, Vec<FactsId>> = HashMap::new();
        for name in names(self.disk().as_ref(), &self.dir().join(FACTS_DIR))? {
            if let Some((key, facts)) = facts_name(&name) {
                by_key.entry(key).or_default().push(facts);
            }
        }
        for name in names(self.disk().as_ref(), &self.dir().join("keys"))? {
            if let Ok(key) = name.parse() {
                by_key.entry(key).or_default();
            }
        }
        for (key, facts) in by_key {
            let is_left = |heads: &[RecordHead]| {
                heads.is_empty()
                    || facts
                        .iter()
                        .any(|id| heads.iter().all(|head| head.facts != *id))
            };
            // Most keys have nothing to remove, and need no lock.
            match self.checked_heads(&key) {
                Ok(heads) if is_left(&heads) => {}
                Ok(_) | Err(StoreError::Json { .. } | StoreError::Damaged { .. }) => continue,
                Err(error) => return Err(error),
            }
            let _lock = self.records_lock(&key)?;
            let mut file = self.key_file(&key)?;
            if file.heads.is_empty() && self.metadata(&self.key_path(&key))?.is_some() {
                self.write_key(lease, &key, &mut file)?;
            }
            self.drop_facts(&key, facts, &file.heads)?;
        }
        Ok(())
    }
}

/// The key and the facts that the name of a file of facts stands for.
pub(crate) fn facts_name(name: &str) -> Option<(KeyId, FactsId)> {
    let (key, facts) = name.split_once('.')?;
    let parsed: (KeyId, FactsId) = (key.parse().ok()?, facts.parse().ok()?);
    (format!("{}.{}", parsed.0, parsed.1) == name).then_some(parsed)
}
