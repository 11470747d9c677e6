//! Snapshots: what a worker had written at some time, by a tag, to go back to or to begin another
//! worker with.
//!
//! Taking one freezes the worker's upper into a layer; a ref keeps that and the layers below it.
//! Going back makes a new upper of the layer (`iii_overlay::thaw`) and puts it in the place of the
//! worker's; a fork puts it into a new worker. So neither copies any contents, and the next start
//! carries such an upper over to the project of then as it does with any other.
//!
//! While a worker runs in namespaces, the process that serves its filesystem takes the snapshot,
//! and is asked for it through the socket of `worker exec`. That of a microVM cannot be asked: it
//! never leaves the VM.
//!
//! **Invariant:** a worker's upper is the old or the new one, whenever this ends: a new one is made
//! beside it, durable, and takes its place in one step, after the worker's ref names what it needs.
//! What is left beside it goes when the worker is next held.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{SystemTime, UNIX_EPOCH};

use iii_oci::utc;
use iii_overlay::upper::UpperError;
use iii_overlay::{Footing, FreezeError, OpenError, Overlay, OverlayOptions, Project};
use iii_sandbox::RemoteError;
use iii_store::tree::Tree;
use iii_store::{LayerId, Lease, Ref, RefKind, Store, StoreError};
use serde::{Deserialize, Serialize};

use crate::home::Home;
use crate::managed::{self, ManagedError, PATIENCE};
use crate::project::edit::{self, Change};
use crate::project::{NameProblem, WorkerName, config};
use crate::worker::control::{self, ExecError};
use crate::worker::error::RunError;
use crate::worker::keep::{RunsOn, keep_also, keep_layers};
use crate::worker::place::{Place, Task, owner};

/// Why something could not be done with snapshots.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "their messages say it")]
pub enum SnapshotError {
    #[error(transparent)]
    Run(Box<RunError>),
    #[error(transparent)]
    Managed(Box<ManagedError>),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("tag {tag:?}: {problem}")]
    Tag { tag: String, problem: NameProblem },
    #[error("{name} has a snapshot {tag} already")]
    Exists { name: String, tag: String },
    #[error("{name} has no snapshot {tag}")]
    Unknown {
        name: String,
        tag: String,
        have: Vec<String>,
    },
    #[error("the snapshot {tag} of {name} is not what it should be")]
    Damaged { name: String, tag: String },
    #[error("{name} has never run: there is nothing to take")]
    NeverRun { name: String },
    #[error("there is a worker called {name} already")]
    Taken { name: String },
    #[error(
        "the filesystem of {name} is in a microVM, where no snapshot can be taken while it runs"
    )]
    InVm { name: String },
    #[error("freezing what {name} wrote failed")]
    Freeze { name: String, source: FreezeError },
    #[error("the upper of {name} cannot be used")]
    Upper { name: String, source: UpperError },
    #[error("making the upper of {name} failed")]
    Open { name: String, source: OpenError },
    #[error("the process that runs {name} could not take the snapshot")]
    Remote { name: String, source: RemoteError },
    #[error("cannot {operation} {}", path.display())]
    Io {
        operation: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

impl From<RunError> for SnapshotError {
    fn from(error: RunError) -> Self {
        Self::Run(error.into())
    }
}

impl From<ManagedError> for SnapshotError {
    fn from(error: ManagedError) -> Self {
        Self::Managed(error.into())
    }
}

fn at(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SnapshotError {
    let path = path.to_owned();
    move |source| SnapshotError::Io {
        operation,
        path,
        source,
    }
}

/// What a snapshot is called, beside its worker's name: what a worker may be called.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Tag(WorkerName);

impl FromStr for Tag {
    type Err = SnapshotError;

    fn from_str(text: &str) -> Result<Self, SnapshotError> {
        text.parse().map(Self).map_err(|source| SnapshotError::Tag {
            problem: source.problem,
            tag: source.name,
        })
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A sandbox with an upper: a managed worker, or one of `worker dev`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// Its name.
    pub name: WorkerName,
    /// Whose ref keeps its layers.
    pub keeper: RefKind,
    /// Its project.
    pub project: PathBuf,
    dir: PathBuf,
}

impl Subject {
    /// The worker called `name`: a managed one, if there is one, or else a sandbox of `worker dev`.
    pub fn find(home: &Home, config: &Path, name: &WorkerName) -> Result<Self, SnapshotError> {
        let dir = home.managed(name.as_str());
        if let Some(project) = managed::path_of(home, config, name)? {
            return Ok(Self {
                name: name.clone(),
                keeper: RefKind::Managed,
                project,
                dir,
            });
        }
        let dir = home.dev(name.as_str());
        let project = owner(&dir)?.ok_or_else(|| managed::unknown(name))?;
        Ok(Self {
            name: name.clone(),
            keeper: RefKind::Worker,
            project,
            dir,
        })
    }

    /// What the refs of its snapshots begin with.
    fn prefix(&self) -> String {
        prefix(self.keeper, &self.name)
    }

    fn reference(&self, tag: &Tag) -> String {
        format!("{}{tag}", self.prefix())
    }
}

fn prefix(keeper: RefKind, name: &WorkerName) -> String {
    let place = if keeper == RefKind::Managed {
        "managed"
    } else {
        "dev"
    };
    format!("{place}/{name}@")
}

/// A frozen upper, and what it stood on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Frozen {
    layer: LayerId,
    layers: Vec<LayerId>,
    applied: Vec<LayerId>,
    project: Option<usize>,
}

impl Frozen {
    /// What an upper that is made of it needs besides the chain.
    fn besides(&self) -> Vec<LayerId> {
        [&self.applied[..], &[self.layer]].concat()
    }

    /// Has the name of a worker whose upper is made of it keep what that needs, and nothing else.
    fn keep(&self, store: &Store, kind: RefKind, name: &WorkerName) -> Result<(), StoreError> {
        keep_layers(store, kind, name.as_str(), &self.runs_on(), &self.besides())
    }

    fn runs_on(&self) -> RunsOn {
        RunsOn {
            layers: self.layers.clone(),
            project: self.project,
        }
    }

    fn footing(&self) -> Footing {
        Footing {
            layers: self.layers.clone(),
            project: self.project,
            applied: self.applied.clone(),
            thawed: None,
        }
    }
}

/// What the ref of a snapshot says besides its layers, of which the frozen one comes first, then
/// those that were applied.
#[derive(Debug, Serialize, Deserialize)]
struct Info {
    taken: i64,
    applied: usize,
    project: Option<usize>,
}

/// The project's layer among those that the ref of a snapshot keeps.
pub fn project_of(content: &Ref) -> Option<LayerId> {
    let info: Info = serde_json::from_value(content.info.clone()).ok()?;
    content
        .layers
        .get(1 + info.applied + info.project?)
        .copied()
}

/// A snapshot of a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Snapshot {
    /// What it is called.
    pub tag: Tag,
    /// When it was taken.
    pub taken: String,
    /// What the worker had written, as a layer.
    pub layer: LayerId,
    #[serde(skip)]
    frozen: Frozen,
}

impl Snapshot {
    fn of(subject: &Subject, tag: Tag, content: Ref) -> Result<Self, SnapshotError> {
        let damaged = || SnapshotError::Damaged {
            name: subject.name.to_string(),
            tag: tag.to_string(),
        };
        let info: Info = serde_json::from_value(content.info).map_err(|_| damaged())?;
        let (layer, rest) = content.layers.split_first().ok_or_else(damaged)?;
        let (applied, layers) = rest.split_at_checked(info.applied).ok_or_else(damaged)?;
        let frozen = Frozen {
            layer: *layer,
            layers: layers.to_vec(),
            applied: applied.to_vec(),
            project: info.project,
        };
        Ok(Self {
            tag,
            taken: utc::rfc3339(info.taken),
            layer: *layer,
            frozen,
        })
    }
}

/// The snapshots of a worker, by their tags, and why snapshots of any worker cannot be read.
pub fn list(
    store: &Store,
    subject: &Subject,
) -> Result<(Vec<Snapshot>, Vec<StoreError>), SnapshotError> {
    let prefix = subject.prefix();
    let mut snapshots = Vec::new();
    let (refs, unreadable) = store.readable_refs(RefKind::Snapshot)?;
    for (name, content) in refs {
        if let Some(tag) = name.strip_prefix(&prefix) {
            snapshots.push(Snapshot::of(subject, tag.parse()?, content)?);
        }
    }
    Ok((snapshots, unreadable))
}

/// The snapshot `tag` of a worker.
pub fn find(store: &Store, subject: &Subject, tag: &Tag) -> Result<Snapshot, SnapshotError> {
    match store.get_ref(RefKind::Snapshot, &subject.reference(tag))? {
        Some(content) => Snapshot::of(subject, tag.clone(), content),
        None => Err(SnapshotError::Unknown {
            name: subject.name.to_string(),
            tag: tag.to_string(),
            have: list(store, subject)?
                .0
                .into_iter()
                .map(|snapshot| snapshot.tag.to_string())
                .collect(),
        }),
    }
}

/// Removes the snapshot `tag`. What is in no other and in no worker goes with the next collection
/// of garbage.
pub fn remove(store: &Store, subject: &Subject, tag: &Tag) -> Result<(), SnapshotError> {
    find(store, subject, tag)?;
    store.remove_ref(RefKind::Snapshot, &subject.reference(tag))?;
    Ok(())
}

/// Removes all snapshots of the worker `name` whose layers `keeper` keeps. Returns how many there
/// were.
pub(crate) fn remove_all(
    store: &Store,
    keeper: RefKind,
    name: &WorkerName,
) -> Result<usize, StoreError> {
    let prefix = prefix(keeper, name);
    let mut removed = 0;
    for (name, _) in store.readable_refs(RefKind::Snapshot)?.0 {
        if name.starts_with(&prefix) && store.remove_ref(RefKind::Snapshot, &name)? {
            removed += 1;
        }
    }
    Ok(removed)
}

/// What is to keep what is frozen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Keeper {
    /// A snapshot, of this tag or one that says when it is taken. One that has the tag already
    /// gives way only if it is forced to.
    Snapshot {
        /// The tag.
        tag: Option<Tag>,
        /// Whether it takes the place of another.
        force: bool,
    },
    /// A managed worker that is about to come into being.
    Worker(WorkerName),
}

/// What was frozen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Taken {
    /// The snapshot's tag, if it is one.
    pub tag: Option<Tag>,
    /// What was written, as a layer.
    pub layer: LayerId,
    frozen: Frozen,
}

/// Freezes uppers of one worker, and has them kept.
struct Taker<'a> {
    store: &'a Store,
    name: &'a WorkerName,
    prefix: String,
}

impl Taker<'_> {
    fn name(&self) -> String {
        self.name.to_string()
    }

    fn has(&self, tag: &Tag) -> Result<bool, SnapshotError> {
        let name = format!("{}{tag}", self.prefix);
        Ok(self.store.get_ref(RefKind::Snapshot, &name)?.is_some())
    }

    /// The tag of a snapshot that is taken now.
    fn tag(&self, keeper: &Keeper, taken: i64) -> Result<Option<Tag>, SnapshotError> {
        let (wanted, force) = match keeper {
            Keeper::Worker(_) => return Ok(None),
            Keeper::Snapshot { tag, force } => (tag, *force),
        };
        if let Some(tag) = wanted {
            if !force && self.has(tag)? {
                let (name, tag) = (self.name(), tag.to_string());
                return Err(SnapshotError::Exists { name, tag });
            }
            return Ok(Some(tag.clone()));
        }
        let time = utc::rfc3339(taken).replace(['-', ':'], "");
        let mut tag: Tag = time.parse()?;
        let mut number = 1;
        while self.has(&tag)? {
            number += 1;
            tag = format!("{time}-{number}").parse()?;
        }
        Ok(Some(tag))
    }

    /// Has what `frozen` gives kept. Two of one worker are never at it at once.
    fn take(
        &self,
        keeper: &Keeper,
        frozen: impl FnOnce(&Lease) -> Result<Frozen, SnapshotError>,
    ) -> Result<Taken, SnapshotError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let taken = now.unwrap_or_default().as_secs() as i64;
        let tag = self.tag(keeper, taken)?;
        // Those of snapshots that were interrupted.
        self.store.sweep_dead_leases()?;
        let lease = self.store.lease(&format!("snapshot of {}", self.name))?;
        let frozen = frozen(&lease)?;
        if let Keeper::Worker(name) = keeper {
            frozen.keep(self.store, RefKind::Managed, name)?;
        }
        if let Some(tag) = &tag {
            let info = Info {
                taken,
                applied: frozen.applied.len(),
                project: frozen.project,
            };
            let content = Ref {
                layers: [&[frozen.layer], &frozen.applied[..], &frozen.layers].concat(),
                // It is plain data.
                info: serde_json::to_value(info).unwrap_or_default(),
            };
            let name = format!("{}{tag}", self.prefix);
            self.store.set_ref(RefKind::Snapshot, &name, &content)?;
        }
        Ok(Taken {
            tag,
            layer: frozen.layer,
            frozen,
        })
    }

    fn freeze(&self, overlay: &Overlay, lease: &Lease) -> Result<Frozen, SnapshotError> {
        let ingest = self.store.ingest(lease)?;
        let (tree, footing) = overlay
            .freeze(&ingest)
            .map_err(|source| SnapshotError::Freeze {
                name: self.name(),
                source,
            })?;
        // A worker that ends meanwhile holds them no more.
        lease.pin(&footing.all().collect::<Vec<_>>())?;
        let layer = ingest.finish(&tree)?.layer_id;
        Ok(Frozen {
            layer,
            layers: footing.layers,
            applied: footing.applied,
            project: footing.project,
        })
    }

    /// What the worker had written when it last ran. Its place is held.
    fn freeze_stopped(
        &self,
        place: &Place,
        keeper: RefKind,
        lease: &Lease,
    ) -> Result<Frozen, SnapshotError> {
        let footing = iii_overlay::footing_of(&place.upper());
        let footing = footing.map_err(|source| SnapshotError::Upper {
            name: self.name(),
            source,
        })?;
        let Some(mut footing) = footing else {
            // It was added, or cleared, and has not run since.
            let kept = self.store.get_ref(keeper, self.name.as_str())?;
            let kept = kept.as_ref().map(RunsOn::of).unwrap_or_default();
            if kept.project.is_none() {
                return Err(SnapshotError::NeverRun { name: self.name() });
            }
            let ingest = self.store.ingest(lease)?;
            ingest.add_bytes(&[])?;
            let layer = ingest.finish(&Tree::implicit())?.layer_id;
            return Ok(Frozen {
                layer,
                layers: kept.layers,
                applied: Vec::new(),
                project: kept.project,
            });
        };
        lease.pin(&footing.all().collect::<Vec<_>>())?;
        // As at a start on the project that it has seen last.
        let slot = footing.project;
        if let (Some(slot), Some(seen)) = (slot, footing.applied.last())
            && let Some(project) = footing.layers.get_mut(slot)
        {
            *project = *seen;
        }
        let layers = footing.layers.iter();
        let layers = layers.map(|id| self.store.layer_or_same_tree(id));
        let layers = layers.collect::<Result<Vec<_>, _>>()?;
        let options = OverlayOptions {
            // Nothing is observed, so nobody asks where it is.
            project: slot.map(|slot| Project {
                path: Vec::new(),
                slot,
            }),
            ..OverlayOptions::default()
        };
        let overlay = Overlay::open(self.store, layers, &place.upper(), options);
        let overlay = overlay.map_err(|source| SnapshotError::Open {
            name: self.name(),
            source,
        })?;
        self.freeze(&overlay, lease)
    }
}

/// Takes snapshots of a worker that runs in this process, for those who ask.
#[derive(Clone)]
pub struct Taking {
    store: Store,
    name: WorkerName,
    prefix: String,
    /// None where the filesystem is served by another process.
    overlay: Option<Weak<Overlay>>,
    /// Whether no more are taken. Held by who takes one.
    is_over: Arc<Mutex<bool>>,
}

impl Taking {
    /// Of the worker whose layers `keeper` keeps by its name, for as long as `overlay` is there.
    pub(crate) fn new(
        store: &Store,
        keeper: RefKind,
        name: &WorkerName,
        overlay: Option<&Arc<Overlay>>,
    ) -> Self {
        Self {
            store: store.clone(),
            name: name.clone(),
            prefix: prefix(keeper, name),
            overlay: overlay.map(Arc::downgrade),
            is_over: Arc::default(),
        }
    }

    /// Takes no more. The one that is being taken is done when this returns, and nobody has the
    /// overlay for it any more.
    pub(crate) fn end(&self) {
        *self.is_over.lock().unwrap_or_else(PoisonError::into_inner) = true;
    }

    /// Takes one.
    pub(crate) fn take(&self, keeper: &Keeper) -> Result<Taken, SnapshotError> {
        let name = || self.name.to_string();
        let overlay = self.overlay.as_ref();
        let overlay = overlay.ok_or_else(|| SnapshotError::InVm { name: name() })?;
        let ended = || RunError::Exec(ExecError::NotRunning { name: name() });
        let is_over = self.is_over.lock().unwrap_or_else(PoisonError::into_inner);
        let overlay = overlay.upgrade().filter(|_| !*is_over);
        let overlay = overlay.ok_or_else(ended)?;
        let taker = Taker {
            store: &self.store,
            name: &self.name,
            prefix: self.prefix.clone(),
        };
        taker.take(keeper, |lease| taker.freeze(&overlay, lease))
    }
}

/// Freezes what a worker wrote, and has it kept. One that runs goes on.
pub fn take(store: &Store, subject: &Subject, keeper: &Keeper) -> Result<Taken, SnapshotError> {
    let name = subject.name.as_str();
    match control::ask_for_snapshot(&subject.dir, name, keeper.clone()) {
        Err(ExecError::NotRunning { .. }) => {}
        Err(error) => return Err(RunError::from(error).into()),
        Ok(answer) => return answer,
    }
    let place = Place::hold(subject.dir.clone(), &subject.name, PATIENCE, Task::Snapshot)?;
    let taker = Taker {
        store,
        name: &subject.name,
        prefix: subject.prefix(),
    };
    taker.take(keeper, |lease| {
        taker.freeze_stopped(&place, subject.keeper, lease)
    })
}

/// Makes an upper of `frozen` and puts it in the place of the one in `place`, if there is one,
/// which is gone then. The name's ref keeps what it needs.
fn put(
    store: &Store,
    place: &Place,
    keeper: RefKind,
    name: &WorkerName,
    frozen: &Frozen,
) -> Result<(), SnapshotError> {
    let lease = store.lease(&format!("upper of {name}"))?;
    let footing = frozen.footing();
    lease.pin(&footing.all().chain([frozen.layer]).collect::<Vec<_>>())?;
    let layers = footing.layers.iter();
    let layers = layers.map(|id| store.layer_or_same_tree(id));
    let layers = layers.collect::<Result<Vec<_>, _>>()?;
    let layer = store.layer(&frozen.layer)?;
    let new = place.new_upper()?;
    iii_overlay::thaw(&new, &footing, layers, &layer).map_err(|source| SnapshotError::Open {
        name: name.to_string(),
        source,
    })?;
    let (own, besides) = (name.as_str(), frozen.besides());
    keep_also(store, keeper, own, &frozen.runs_on(), &besides)?;
    place.exchange_upper()?;
    frozen.keep(store, keeper, name)?;
    Ok(place.drop_new_upper()?)
}

/// Has a worker's upper be again what it was when the snapshot `tag` was taken; what it wrote since
/// is gone. It does not run.
pub fn roll_back(store: &Store, subject: &Subject, tag: &Tag) -> Result<(), SnapshotError> {
    let place = Place::hold(subject.dir.clone(), &subject.name, PATIENCE, Task::Rollback)?;
    let snapshot = find(store, subject, tag)?;
    put(
        store,
        &place,
        subject.keeper,
        &subject.name,
        &snapshot.frozen,
    )
}

/// Makes a managed worker `new` of the same project as `subject`, which begins with what that has
/// written, or had when the snapshot `tag` was taken.
pub fn fork(
    home: &Home,
    config: &Path,
    store: &Store,
    subject: &Subject,
    tag: Option<&Tag>,
    new: &WorkerName,
) -> Result<(), SnapshotError> {
    let path = &subject.project;
    if !path.is_dir() {
        let (name, path) = (subject.name.to_string(), path.clone());
        return Err(ManagedError::Moved { name, path }.into());
    }
    let taken = || SnapshotError::Taken {
        name: new.to_string(),
    };
    let listed = config::list(config).map_err(ManagedError::from)?;
    if listed.iter().any(|entry| entry.name == new.as_str()) {
        return Err(taken());
    }
    let worker_path = path.to_string_lossy();
    let change = Change::Copy {
        name: new.as_str(),
        from: subject.name.as_str(),
        worker_path: &worker_path,
    };
    edit::check_file(config, &change).map_err(ManagedError::from)?;
    let snapshot = tag.map(|tag| find(store, subject, tag)).transpose()?;
    let place = Place::hold(home.managed(new.as_str()), new, PATIENCE, Task::Fork)?;
    if owner(place.dir())?.is_some() {
        return Err(taken());
    }
    let root = std::fs::canonicalize(path).map_err(at("find", path))?;
    place.claim_for(new, &root, false)?;
    let made = || -> Result<(), SnapshotError> {
        let frozen = match snapshot {
            Some(snapshot) => snapshot.frozen,
            None => take(store, subject, &Keeper::Worker(new.clone()))?.frozen,
        };
        put(store, &place, RefKind::Managed, new, &frozen)?;
        edit::edit_file(config, &change).map_err(ManagedError::from)?;
        Ok(())
    }();
    if made.is_err() {
        // Where that fails, too, `remove` does it.
        let _ = store.remove_ref(RefKind::Managed, new.as_str());
        let _ = place.remove();
    }
    made
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_like_names_of_workers() {
        for (text, is_one) in [
            ("before", true),
            ("20261122T080149Z", true),
            ("v1.2_3-4", true),
            ("", false),
            (".hidden", false),
            ("a/b", false),
            ("a@b", false),
            ("a..b", false),
            (&"x".repeat(65), false),
        ] {
            assert_eq!(text.parse::<Tag>().is_ok(), is_one, "{text}");
        }
    }
}
