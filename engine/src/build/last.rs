//! The last build of each project: which record each of its steps used.
//!
//! It tells why a step runs, and lets the search for a record begin with the right one. It is a
//! hint: no layer depends on it, and a file that is missing or damaged says nothing.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::path::PathBuf;

use iii_store::facts::Answers;
use iii_store::{FactsId, KeyId, NodeRef, Record, Store, StoreError};
use serde::{Deserialize, Serialize};

use crate::home::Home;
use crate::plan::{self, Kind, Reason, RecipeParts};

/// Longest file of a project's last build, in bytes.
const MAX_FILE: u64 = 64 << 10;

/// The record that one step used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LastStep {
    /// The step's key.
    pub key: KeyId,
    /// The facts of the record.
    pub facts: FactsId,
    /// Parts of the key.
    pub parts: RecipeParts,
}

/// Records that the steps of a project used last.
pub(crate) struct LastBuild {
    path: PathBuf,
    steps: BTreeMap<String, LastStep>,
}

impl LastBuild {
    /// Of the project with this id.
    pub fn read(home: &Home, project_id: &str) -> Self {
        let path = home.last_build(project_id);
        let is_short = fs::metadata(&path).is_ok_and(|meta| meta.len() <= MAX_FILE);
        let text = is_short.then(|| fs::read(&path).ok()).flatten();
        let steps = text.and_then(|text| serde_json::from_slice(&text).ok());
        Self {
            path,
            steps: steps.unwrap_or_default(),
        }
    }

    /// The record that a step used.
    pub fn step(&self, kind: Kind) -> Option<&LastStep> {
        self.steps.get(&kind.to_string())
    }

    /// Notes the record of a step. A failed write is only missing the next time.
    pub fn note(&mut self, kind: Kind, step: LastStep) {
        if self.step(kind) == Some(&step) {
            return;
        }
        self.steps.insert(kind.to_string(), step);
        let write = || -> Option<()> {
            let dir = self.path.parent()?;
            fs::create_dir_all(dir).ok()?;
            let mut file = tempfile::NamedTempFile::new_in(dir).ok()?;
            file.write_all(&serde_json::to_vec(&self.steps).ok()?)
                .ok()?;
            file.persist(&self.path).ok()?;
            Some(())
        };
        let _ = write();
    }

    /// Why a step has to run, of which no record holds for `project`: compared with what this
    /// project's own last build used.
    pub fn reason(
        &self,
        store: &Store,
        kind: Kind,
        key: KeyId,
        parts: &RecipeParts,
        project: NodeRef<'_>,
    ) -> Result<Reason, StoreError> {
        let Some(last) = self.step(kind) else {
            return Ok(Reason::New);
        };
        if last.key != key {
            return Ok(Reason::Recipe(parts.first_difference(&last.parts)));
        }
        let Some(record) = record_of(store, &key, &last.facts)? else {
            return Ok(Reason::Lost);
        };
        let mismatch = Answers::new(project).first_mismatch(&record.facts).cloned();
        Ok(mismatch.map_or(Reason::Lost, |fact| {
            Reason::Changed(plan::change(&fact, project))
        }))
    }
}

/// The record with these facts, if it is there.
fn record_of(store: &Store, key: &KeyId, facts: &FactsId) -> Result<Option<Record>, StoreError> {
    let mut heads = store.heads(key)?.into_iter();
    match heads.find(|head| head.facts == *facts) {
        Some(head) => store.record(key, head),
        None => Ok(None),
    }
}
