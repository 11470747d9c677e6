//! Explains the steps of a project: the record that a build would reuse, or the nearest records and
//! the facts that differ.
//!
//! The project is snapshotted as a build does it, and keys and records are found by the code of a
//! build. No step runs, no cache is asked, and no image is pulled.

use std::sync::Arc;

use iii_oci as oci;
use iii_store::facts::{Answers, path_text};
use iii_store::{Fact, FactsId, KeyId, Layer, LayerId, NodeRef, RecordHead, Seen, Store};
use serde::Serialize;

use crate::build::last::LastBuild;
use crate::build::realise::layer_caches;
use crate::build::{self, BuildError, Finder, project_id, project_root, recipe, take_snapshot};
use crate::home::Home;
use crate::plan::{Kind, RecipeParts, environment};
use crate::project::{Project, WorkerName};
use crate::shared_cache::CacheOptions;
use crate::worker::error::RunError;
use crate::worker::place::owner;

/// Most records of a key that are compared with the project, the newest first.
const MAX_COMPARED: usize = 256;
/// Most records of other projects that are named as near ones.
const MAX_NEAREST: usize = 3;
/// Most differing facts of one record that are listed; all are counted.
const MAX_LISTED: usize = 100;

/// The steps of a project and their records.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Explanation {
    /// The project's directory.
    pub project: String,
    /// The base image.
    pub base: String,
    /// Setup, then install, as far as the project has them.
    pub steps: Vec<ExplainedStep>,
}

/// A build's decision on one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// A record holds: its layer is reused.
    Hit,
    /// No record holds: the step runs, or its layer comes from a shared cache.
    Run,
    /// The key depends on a layer below that is not made yet.
    Unknown,
}

/// One step and its records.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ExplainedStep {
    /// Setup or install.
    pub kind: Kind,
    /// The decision.
    pub verdict: Verdict,
    /// The key; unknown as long as a layer below is.
    pub key: Option<KeyId>,
    /// The reason that a build would print, unless a record holds.
    pub reason: Option<String>,
    /// How many records the key has.
    pub records: usize,
    /// The record that holds.
    pub record: Option<ExplainedRecord>,
    /// Records that do not hold: this project's last one, then those with the fewest differences.
    pub nearest: Vec<ExplainedRecord>,
}

/// One record compared with the project.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ExplainedRecord {
    /// Whether this project's last build used it.
    pub is_last: bool,
    /// Its layer.
    pub layer_id: LayerId,
    /// Whether the store has the layer.
    pub is_stored: bool,
    /// When the layer was built, in seconds since 1970.
    pub created: Option<i64>,
    /// How long the step took, in seconds.
    pub seconds: Option<f64>,
    /// The reason for which the step ran.
    pub reason: Option<String>,
    /// The shared cache that it came from.
    pub cache: Option<String>,
    /// How many facts it stands on, by kind.
    pub facts: FactCounts,
    /// How many of its facts differ.
    pub differing: usize,
    /// These facts, at most 100, by path.
    pub differences: Vec<Difference>,
}

/// Numbers of facts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct FactCounts {
    /// Names that were absent.
    pub absent: usize,
    /// Types of files and directories, and whether they can be executed.
    pub types: usize,
    /// Names in directories.
    pub listings: usize,
    /// Contents of files.
    pub contents: usize,
    /// Targets of symlinks.
    pub targets: usize,
    /// Whole directories.
    pub trees: usize,
}

/// A fact that is not true of the project.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Difference {
    /// The path in the project, escaped; empty for the project's root.
    pub path: String,
    /// The step's observation, in words.
    pub seen: String,
    /// The same look at the project as it is now, in words.
    pub now: String,
}

impl FactCounts {
    fn of(facts: &[Fact]) -> Self {
        let mut counts = Self::default();
        for fact in facts {
            *match fact.seen {
                Seen::Absent => &mut counts.absent,
                Seen::Stat { .. } => &mut counts.types,
                Seen::Listing(_) => &mut counts.listings,
                Seen::Contents { .. } => &mut counts.contents,
                Seen::Target(_) => &mut counts.targets,
                Seen::Tree(_) => &mut counts.trees,
            } += 1;
        }
        counts
    }
}

/// An observation in words.
fn words(seen: &Seen) -> String {
    let executable = |exec| if exec { ", executable" } else { "" };
    match seen {
        Seen::Absent => "absent".into(),
        Seen::Stat { kind, exec } => match kind {
            iii_store::Kind::Dir => "directory".into(),
            iii_store::Kind::File => format!("file{}", executable(*exec)),
            iii_store::Kind::Symlink => "symlink".into(),
            _ => "special file".into(),
        },
        Seen::Listing(hash) => format!("entries {}", hash.short()),
        Seen::Contents { object, exec } => {
            format!("contents {}{}", object.short(), executable(*exec))
        }
        Seen::Target(hash) => format!("target {}", hash.short()),
        Seen::Tree(hash) => format!("whole directory {}", hash.short()),
    }
}

/// Compares a record with the project of `answers`.
fn compare(
    head: &RecordHead,
    facts: &[Fact],
    answers: &mut Answers<'_>,
    is_last: bool,
    is_stored: bool,
) -> ExplainedRecord {
    let mut differing = 0;
    let mut differences = Vec::new();
    for fact in facts {
        let now = answers.to(&fact.look());
        if now == fact.seen {
            continue;
        }
        differing += 1;
        if differences.len() < MAX_LISTED {
            differences.push(Difference {
                path: path_text(&fact.path),
                seen: words(&fact.seen),
                now: words(&now),
            });
        }
    }
    let said = |name: &str| head.provenance.get(name);
    ExplainedRecord {
        is_last,
        layer_id: head.layer_id,
        is_stored,
        created: said("created").and_then(serde_json::Value::as_i64),
        seconds: said("seconds").and_then(serde_json::Value::as_f64),
        reason: said("reason").and_then(|text| Some(text.as_str()?.to_owned())),
        cache: head.origin().map(str::to_owned),
        facts: FactCounts::of(facts),
        differing,
        differences,
    }
}

/// The project of the worker `name`.
pub fn project_of(home: &Home, name: &WorkerName) -> Result<Project, RunError> {
    for dir in [home.dev(name.as_str()), home.managed(name.as_str())] {
        if let Some(root) = owner(&dir)? {
            return Ok(Project::open(&root)?);
        }
    }
    Err(RunError::NeverRun {
        name: name.to_string(),
    })
}

/// Explains the steps of `project` on its base image, or on `base`. Records that came from a shared
/// cache count only if `caches` names it.
pub fn explain(
    home: &Home,
    project: &Project,
    base: Option<&str>,
    caches: &CacheOptions,
) -> Result<Explanation, RunError> {
    let store = Store::open(home.store())?;
    let name = base.unwrap_or(&project.base_image);
    let image = oci::resolve(&store, name)?.ok_or_else(|| RunError::BaseNotStored {
        name: name.to_owned(),
    })?;
    let lease = store.lease(&format!("explain {}", project.dev_name()))?;
    let mut below = build::base(&store, &image, &lease)?.layers;
    let (snapshot, _) = take_snapshot(&store, &lease, project, &|| {})?;
    let env = environment::for_steps(&image.config.env, project.tool_env());
    let caches = layer_caches(home, caches, &|_| ());
    let asked = Asked {
        finder: Finder {
            store: &store,
            lease: &lease,
            caches: &caches,
        },
        last: LastBuild::read(home, &project_id(project)),
        project: project_root(&snapshot.layer),
    };
    let mut steps: Vec<ExplainedStep> = Vec::new();
    for (kind, script) in [
        (Kind::Setup, &project.scripts.setup),
        (Kind::Install, &project.scripts.install),
    ] {
        let Some(script) = script else { continue };
        if let Some(lower) = steps.iter().find(|step| step.verdict != Verdict::Hit) {
            steps.push(ExplainedStep {
                kind,
                verdict: Verdict::Unknown,
                key: None,
                reason: Some(format!("it depends on the layer that {} makes", lower.kind)),
                records: 0,
                record: None,
                nearest: Vec::new(),
            });
            continue;
        }
        let recipe = recipe(&image, &env, kind, script, &below);
        let (step, layer) = asked.step(kind, recipe.key(), &recipe.parts())?;
        steps.push(step);
        below.extend(layer);
    }
    Ok(Explanation {
        project: project.root.display().to_string(),
        base: image.name,
        steps,
    })
}

/// All that a step is explained from.
struct Asked<'a> {
    finder: Finder<'a>,
    last: LastBuild,
    project: NodeRef<'a>,
}

impl Asked<'_> {
    /// Explains one step. Returns its layer as well, if a record holds.
    fn step(
        &self,
        kind: Kind,
        key: KeyId,
        parts: &RecipeParts,
    ) -> Result<(ExplainedStep, Option<Arc<Layer>>), BuildError> {
        let store = self.finder.store;
        let last = self.last.step(kind).filter(|last| last.key == key);
        let last = last.map(|last| last.facts);
        let heads = store.heads(&key)?;
        let mut step = ExplainedStep {
            kind,
            verdict: Verdict::Hit,
            key: Some(key),
            reason: None,
            records: heads.len(),
            record: None,
            nearest: Vec::new(),
        };
        let mut answers = Answers::new(self.project);
        if let Some((head, facts)) = self.finder.find(key, last, &mut answers)? {
            let layer = store.layer(&head.layer_id)?;
            let is_last = Some(head.facts) == last;
            step.record = Some(compare(&head, &facts, &mut answers, is_last, true));
            return Ok((step, Some(layer)));
        }
        let reason = self.last.reason(store, kind, key, parts, self.project)?;
        step.verdict = Verdict::Run;
        step.reason = Some(reason.to_string());
        step.nearest = self.nearest(&key, heads, last, &mut answers)?;
        Ok((step, None))
    }

    fn nearest(
        &self,
        key: &KeyId,
        heads: Vec<RecordHead>,
        last: Option<FactsId>,
        answers: &mut Answers<'_>,
    ) -> Result<Vec<ExplainedRecord>, BuildError> {
        let Finder { store, caches, .. } = self.finder;
        let (own, others): (Vec<_>, Vec<_>) = heads
            .into_iter()
            .filter(|head| caches.trusts(head.origin()))
            .partition(|head| Some(head.facts) == last);
        let mut compared = Vec::new();
        let candidates = own.into_iter().take(1).chain(others).take(MAX_COMPARED);
        for head in candidates {
            let Some(record) = store.record(key, head.clone())? else {
                continue;
            };
            let is_last = Some(head.facts) == last;
            let is_stored = store.has_layer(&head.layer_id);
            compared.push(compare(&head, &record.facts, answers, is_last, is_stored));
        }
        // Stable: of records with as many differences the newest stays first.
        compared.sort_by_key(|record| (!record.is_last, record.differing));
        let own = usize::from(compared.first().is_some_and(|record| record.is_last));
        compared.truncate(own + MAX_NEAREST);
        Ok(compared)
    }
}

#[cfg(test)]
mod tests {
    use iii_store::{ObjectId, SeenHash};

    use super::*;

    #[test]
    fn observations_are_told_in_words_and_counted_by_kind() {
        let object = ObjectId::of(b"x");
        let hash = SeenHash::from_bytes([7; 32]);
        let stat = |kind, exec| Seen::Stat { kind, exec };
        let contents = |exec| Seen::Contents { object, exec };
        let (short, digits) = (object.short(), hash.short());
        let seen = [
            (Seen::Absent, "absent".to_owned()),
            (stat(iii_store::Kind::Dir, true), "directory".into()),
            (stat(iii_store::Kind::File, true), "file, executable".into()),
            (stat(iii_store::Kind::Fifo, false), "special file".into()),
            (contents(false), format!("contents {short}")),
            (contents(true), format!("contents {short}, executable")),
            (Seen::Listing(hash), format!("entries {digits}")),
            (Seen::Target(hash), format!("target {digits}")),
            (Seen::Tree(hash), format!("whole directory {digits}")),
        ];
        for (seen, expected) in &seen {
            assert_eq!(words(seen), *expected);
        }
        let path = Vec::new();
        let facts = seen.map(|(seen, _)| Fact {
            path: path.clone(),
            seen,
        });
        let expected = FactCounts {
            absent: 1,
            types: 3,
            listings: 1,
            contents: 2,
            targets: 1,
            trees: 1,
        };
        assert_eq!(FactCounts::of(&facts), expected);
    }
}
