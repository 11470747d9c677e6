//! Realises the layers of a project: looks up what the plan names, and runs what is missing.
//!
//! A step runs in a sandbox on `base, layers so far, project`, the layers that it is lent
//! ([`lent`]: caches of package managers, a build directory to begin with) and an empty upper of
//! its own. What it wrote is frozen, published, and stored under the step's key with the facts that
//! it observed about the project. Nothing is stored of a step that fails or is interrupted. Of two
//! processes that need the same step at once, one runs it and the other waits.

pub mod collect;
pub mod explain;
mod jobs;
mod last;
mod lent;
pub mod own_files;
mod pool;
pub mod realise;
mod running;

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Instant, SystemTime};

use iii_oci::{self as oci, Image, ImageError, Limits};
use iii_overlay::adapter::Mode;
use iii_overlay::{Aside, FreezeError, OpenError, OverlayOptions, Project as ProjectAt};
use iii_sandbox::tail::Tail;
use iii_sandbox::{Sandbox, SandboxError, SandboxSpec, Stdio};
use iii_store::snapshot::{self, Snapshot, SnapshotError};
use iii_store::{
    Answers, Fact, FactsId, Flight, GcReport, KeyId, Layer, LayerId, Lease, Look, NodeRef,
    Published, Record, RecordHead, Search, Seen, Store, StoreError, TreeId,
};
use rustix::process::Signal;

use crate::compose::{Composed, Composition, Isolation, Left};
use crate::home::Home;
use crate::plan::environment::Env;
use crate::plan::{EXCLUDED, Kind, Reason, Recipe, WORKSPACE};
use crate::project::Project;
use crate::shared_cache::{self, Caches as LayerCaches, Recorded, Wanted};
use crate::worker::keep::RunsOn;
use crate::worker::supervise::Signals;
use last::{LastBuild, LastStep};

use lent::Lent;
use own_files::OwnFiles;
use running::RunningStep;
pub use running::RunningSteps;

/// Context of the key that guards the snapshot of one project.
const SNAPSHOT_CONTEXT: &str = "iii 2026 snapshot v1";

/// Context of the names of flights.
const FLIGHT_CONTEXT: &str = "iii 2026 flight v1";

/// The command that runs a script, up to the script: it ends at the first command that fails.
pub const SHELL: [&str; 2] = ["/bin/sh", "-ec"];

/// Why the layers could not be realised.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The project could not be taken in.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The overlay of a step could not be put together.
    #[error("composing the layers for {kind} failed")]
    Compose {
        /// The step.
        kind: Kind,
        /// Why.
        source: OpenError,
    },
    /// The sandbox of a step failed.
    #[error("running {kind} failed")]
    Sandbox {
        /// The step.
        kind: Kind,
        /// Why.
        source: SandboxError,
    },
    /// A step's script failed.
    #[error("{kind} failed: {}", describe(*.status))]
    Step {
        /// The step.
        kind: Kind,
        /// How it ended.
        status: ExitStatus,
        /// The last lines that it printed.
        tail: Vec<String>,
    },
    /// A signal ended a step.
    #[error("{kind} was interrupted; nothing of it was kept")]
    Interrupted {
        /// The step.
        kind: Kind,
        /// The signal.
        signal: Signal,
    },
    /// An input of a step changed while it ran, so its layer would have been of no use.
    #[error("{kind} was cancelled: {} changed while it ran", name_of(.path))]
    Superseded {
        /// The step.
        kind: Kind,
        /// The path in the project; empty for the project itself.
        path: Vec<u8>,
    },
    /// A step's microVM had to be killed, so that it is not known what the step looked at.
    #[error("the microVM of {kind} did not go off, and took what {kind} looked at along")]
    Unobserved {
        /// The step.
        kind: Kind,
    },
    /// What a step wrote could not be made a layer.
    #[error("storing what {kind} wrote failed")]
    Freeze {
        /// The step.
        kind: Kind,
        /// Why.
        source: FreezeError,
    },
    /// A directory or lock of the tool's own.
    #[error("cannot {operation} {}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

/// Seconds since 1970.
fn unix_time() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.unwrap_or_default().as_secs()
}

/// How a process ended, in words.
pub fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt as _;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit code {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => "ended".into(),
    }
}

/// A path in a project, for people.
fn name_of(path: &[u8]) -> String {
    match path {
        b"" => "the project".to_owned(),
        path => String::from_utf8_lossy(path).into_owned(),
    }
}

/// Whether a layer was there, or what had to be done to have it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It was there.
    Hit,
    /// It was made.
    Built,
    /// It came from a shared cache.
    Fetched,
}

/// What became of one layer.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Report {
    /// Which layer.
    pub kind: Kind,
    /// Whether it was there.
    pub status: Status,
    /// Its recipe's key; base and project have none, they are what they hold.
    pub key: Option<KeyId>,
    /// The layer.
    pub layer_id: LayerId,
    /// What it holds, mtimes apart.
    pub tree_id: TreeId,
    /// Bytes of file data that were new to the store.
    pub bytes: u64,
    /// File contents that were new to the store.
    pub files: u64,
    /// How long it took.
    pub seconds: f64,
    /// Why it had to be made, for setup and install.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The cache that it came from, for a layer that was fetched.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<String>,
    /// How many paths of the project changed since the last snapshot, for the project.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub changed: Option<u64>,
}

/// What happens while layers are realised.
#[derive(Debug)]
pub enum Event<'a> {
    /// The base image is being pulled.
    Pulling(oci::Event<'a>),
    /// The base image was pulled.
    Pulled(&'a oci::Imported),
    /// The base image's tag could not be resolved again; the image in the store serves.
    Unresolved(&'a Image, &'a ImageError),
    /// The base image is there, with all its layers.
    Base(&'a Image),
    /// Another process builds the same thing.
    Waiting(Kind),
    /// A step begins.
    Running(Kind, &'a Reason),
    /// A piece of what a step prints, beginning and ending anywhere in a line.
    Output(Kind, Stream, &'a [u8]),
    /// A shared cache is asked or given something.
    Cache(shared_cache::Event<'a>),
    /// The kernel of microVMs is being fetched: so many bytes of so many, at last all of them.
    Kernel(u64, u64),
    /// What sandboxes run in, where nobody said; and why in no microVM, where one could run.
    Chosen(&'a Isolation, Option<&'a (dyn std::error::Error + 'static)>),
    /// A step that ran made or changed files among the project's own.
    OwnFiles(Kind, &'a OwnFiles),
    /// A layer above the base is ready.
    Ready(&'a Report),
    /// The worker has taken a change of its project.
    Reloaded {
        /// Files of the project that are others.
        files: u64,
        /// How long it took until the new command ran.
        seconds: f64,
    },
    /// So many files that the worker had written or removed gave way to newer ones of its layers.
    GaveWay(u64),
    /// The store was cleared of what nobody needs.
    Collected(&'a GcReport),
    /// Something works worse than it could, or was left out.
    Note(String),
}

/// One of the two streams that a step prints to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stream {
    /// Standard output.
    Out,
    /// Standard error.
    Err,
}

/// The realised layers, bottom first.
#[derive(Clone, Default)]
pub struct Stack {
    /// What became of each.
    pub reports: Vec<Report>,
    /// The layers themselves.
    pub layers: Vec<Arc<Layer>>,
    /// What those of setup and install are recorded as.
    pub recorded: Vec<Recorded>,
}

/// What a step came to.
#[derive(Clone)]
pub struct Outcome {
    /// What became of its layer.
    pub report: Report,
    /// The layer.
    pub layer: Arc<Layer>,
    record: Record,
}

impl Stack {
    /// The index of the project's layer, once it is there.
    pub fn project_slot(&self) -> Option<usize> {
        let mut kinds = self.reports.iter().map(|report| report.kind);
        kinds.position(|kind| kind == Kind::Project)
    }

    /// The project's layer, once it is there.
    pub fn project(&self) -> Option<&Arc<Layer>> {
        self.layers.get(self.project_slot()?)
    }

    /// What a worker on these layers runs on.
    pub fn runs_on(&self) -> RunsOn {
        RunsOn {
            layers: self.ids(),
            project: self.project_slot(),
        }
    }

    /// Puts the project's layer over the `base` layers at the bottom.
    pub fn put_project(&mut self, base: usize, report: Report, layer: Arc<Layer>) {
        self.reports.insert(base, report);
        self.layers.insert(base, layer);
    }

    /// The ids of the layers, bottom first.
    pub fn ids(&self) -> Vec<LayerId> {
        self.reports.iter().map(|report| report.layer_id).collect()
    }

    /// Puts what a step came to on top.
    pub fn put(&mut self, outcome: Outcome) {
        if let Some(key) = outcome.report.key {
            self.recorded.push(Recorded {
                kind: outcome.report.kind,
                key,
                record: outcome.record,
                is_new: outcome.report.status == Status::Built,
            });
        }
        self.push(outcome.report, outcome.layer);
    }

    /// Puts a layer on top.
    pub fn push(&mut self, report: Report, layer: Arc<Layer>) {
        self.reports.push(report);
        self.layers.push(layer);
    }
}

/// What layers are realised from and with.
pub struct Builder<'a> {
    /// Where build uppers are.
    pub home: &'a Home,
    /// The store.
    pub store: &'a Store,
    /// Pins every layer that is used or made.
    pub lease: &'a Lease,
    /// The project.
    pub project: &'a Project,
    /// The sandbox's name, which owns the project's stat cache.
    pub name: &'a str,
    /// The base image.
    pub image: &'a Image,
    /// The environment of the steps.
    pub env: &'a Env,
    /// What steps run in.
    pub isolation: &'a Isolation,
    /// Runs setup and install whatever is stored, here or in a cache.
    pub rebuild: bool,
    /// Asked for what is not in the store.
    pub caches: &'a LayerCaches,
    /// How much of anything what they give may bring.
    pub limits: &'a Limits,
    /// What ends a step.
    pub signals: &'a Signals,
    /// The steps that run, for those who watch the project.
    pub running: &'a RunningSteps,
    /// Told what happens, from several threads.
    pub events: &'a (dyn Fn(Event<'_>) + Sync),
}

/// The layers of a base image, bottom first, pinned.
pub fn base(store: &Store, image: &Image, lease: &Lease) -> Result<Stack, BuildError> {
    let mut stack = Stack::default();
    lease.pin(&image.layers)?;
    for id in &image.layers {
        let layer = store.layer(id)?;
        let report = Report::hit(Kind::Base, None, &layer);
        stack.push(report, layer);
    }
    Ok(stack)
}

impl Builder<'_> {
    /// The project's layer as it is now.
    pub fn snapshot(&self) -> Result<(Report, Arc<Layer>), BuildError> {
        let start = Instant::now();
        let waiting = || (self.events)(Event::Waiting(Kind::Project));
        let (snapshot, _) = take_snapshot(self.store, self.lease, self.project, &waiting)?;
        for skipped in &snapshot.skipped {
            let path = String::from_utf8_lossy(&skipped.path);
            (self.events)(Event::Note(format!(
                "{path} is left out ({})",
                skipped.what
            )));
        }
        let layer = snapshot.layer;
        let report = Report {
            status: if snapshot.published.existed {
                Status::Hit
            } else {
                Status::Built
            },
            bytes: snapshot.published.new_bytes,
            files: snapshot.published.new_files,
            seconds: start.elapsed().as_secs_f64(),
            changed: Some(snapshot.changed + snapshot.removed),
            ..Report::hit(Kind::Project, None, &layer)
        };
        Ok((report, layer))
    }

    /// What a step is stored under.
    pub fn key(&self, kind: Kind, script: &str, below: &[Arc<Layer>]) -> KeyId {
        self.recipe(kind, script, below).key()
    }

    fn recipe(&self, kind: Kind, script: &str, below: &[Arc<Layer>]) -> Recipe {
        recipe(self.image, self.env, kind, script, below)
    }

    /// The layer that still holds for this project, and the id of the facts that it stands on.
    fn find(
        &self,
        kind: Kind,
        key: KeyId,
        project: &Layer,
        last: &LastBuild,
        start: Instant,
    ) -> Result<Option<(Outcome, FactsId)>, BuildError> {
        let last = last.step(kind).filter(|last| last.key == key);
        let finder = Finder {
            store: self.store,
            lease: self.lease,
            caches: self.caches,
        };
        let mut answers = Answers::new(project_root(project));
        let found = finder.find(key, last.map(|last| last.facts), &mut answers)?;
        let Some((head, facts)) = found else {
            return Ok(None);
        };
        let (facts, record) = (head.facts, head.with(facts));
        let layer = self.store.layer(&record.layer_id)?;
        let report = Report {
            seconds: start.elapsed().as_secs_f64(),
            ..Report::hit(kind, Some(key), &layer)
        };
        let outcome = Outcome {
            report,
            layer,
            record,
        };
        Ok(Some((outcome, facts)))
    }

    /// The name of the flight of a step: processes wait for each other only if they would make the
    /// same layer, as far as is known. That is the key, and what this project answers to the looks
    /// of the record that was made last; without one, the whole project.
    fn flight(&self, key: KeyId, project: &Layer) -> Result<KeyId, BuildError> {
        let mut heads = self.store.heads(&key)?.into_iter();
        let newest = match heads.find(|head| self.caches.trusts(head.origin())) {
            Some(head) => self.store.record(&key, head)?,
            None => None,
        };
        let mut hasher = blake3::Hasher::new_derive_key(FLIGHT_CONTEXT);
        hasher.update(key.as_bytes());
        match newest {
            Some(record) => {
                let looks: Vec<Look> = record.facts.iter().map(Fact::look).collect();
                let found = Answers::new(project_root(project)).facts_id(&looks);
                hasher.update(found.as_bytes());
            }
            None => {
                hasher.update(project.tree_id().as_bytes());
            }
        }
        Ok(hasher.finalize().into())
    }

    /// The layer from a shared cache, if one of them has it. The caller holds the key's flight.
    fn fetch(
        &self,
        kind: Kind,
        key: KeyId,
        project: &Layer,
        start: Instant,
    ) -> Result<Option<(Outcome, FactsId)>, BuildError> {
        let wanted = Wanted {
            store: self.store,
            lease: self.lease,
            key: &key,
            kind,
            project: project_root(project),
            limits: self.limits,
        };
        let events = |event: shared_cache::Event<'_>| (self.events)(Event::Cache(event));
        let Some(fetched) = self.caches.fetch(wanted, &events) else {
            return Ok(None);
        };
        let facts = self.store.put_record(&key, fetched.record.clone())?;
        let published = fetched.published;
        let report = Report {
            status: Status::Fetched,
            bytes: published
                .as_ref()
                .map_or(0, |published| published.new_bytes),
            files: published
                .as_ref()
                .map_or(0, |published| published.new_files),
            seconds: start.elapsed().as_secs_f64(),
            cache: Some(fetched.origin),
            ..Report::hit(kind, Some(key), &fetched.layer)
        };
        let outcome = Outcome {
            report,
            layer: fetched.layer,
            record: fetched.record,
        };
        Ok(Some((outcome, facts)))
    }

    /// The layer of a step: the one that still holds, or a new one.
    pub fn step(
        &self,
        kind: Kind,
        script: &str,
        key: KeyId,
        below: &[Arc<Layer>],
        project: &Arc<Layer>,
    ) -> Result<Outcome, BuildError> {
        let start = Instant::now();
        let recipe = self.recipe(kind, script, below);
        let mut last = LastBuild::read(self.home, &project_id(self.project));
        let used = |facts| LastStep {
            key,
            facts,
            parts: recipe.parts(),
        };
        if !self.rebuild
            && let Some((hit, facts)) = self.find(kind, key, project, &last, start)?
        {
            last.note(kind, used(facts));
            return Ok(hit);
        }
        let _flight = self.store.flight(&self.flight(key, project)?, &|| {
            (self.events)(Event::Waiting(kind));
        })?;
        let reason = if self.rebuild {
            Reason::Asked
        } else {
            // Whoever held the flight may have built it.
            if let Some((hit, facts)) = self.find(kind, key, project, &last, start)? {
                last.note(kind, used(facts));
                return Ok(hit);
            }
            if let Some((fetched, facts)) = self.fetch(kind, key, project, start)? {
                last.note(kind, used(facts));
                return Ok(fetched);
            }
            last.reason(
                self.store,
                kind,
                key,
                &recipe.parts(),
                project_root(project),
            )?
        };
        (self.events)(Event::Running(kind, &reason));
        let step = Step {
            builder: self,
            kind,
            script,
        };
        let (facts, published) = step.run(below, project)?;
        if let [
            Fact {
                path,
                seen: Seen::Tree(_),
            },
        ] = &*facts
            && path.is_empty()
        {
            let text = format!(
                "{kind} looked at so much of the project that any change of it runs {kind} again"
            );
            (self.events)(Event::Note(text));
        }
        let layer = self.store.layer(&published.layer_id)?;
        if kind == Kind::Install {
            let own = OwnFiles::of(&layer, project);
            if !own.is_empty() {
                (self.events)(Event::OwnFiles(kind, &own));
            }
        }
        let seconds = start.elapsed().as_secs_f64();
        let provenance = [
            ("kind", kind.to_string().into()),
            ("reason", reason.to_string().into()),
            ("seconds", seconds.into()),
            ("created", unix_time().into()),
            ("version", env!("CARGO_PKG_VERSION").into()),
        ];
        let record = Record {
            facts,
            layer_id: published.layer_id,
            tree_id: published.tree_id,
            provenance: provenance
                .map(|(name, value)| (name.to_owned(), value))
                .into_iter()
                .collect(),
        };
        last.note(kind, used(self.store.put_record(&key, record.clone())?));
        let report = Report {
            status: Status::Built,
            bytes: published.new_bytes,
            files: published.new_files,
            seconds,
            reason: Some(reason.to_string()),
            ..Report::hit(kind, Some(key), &layer)
        };
        Ok(Outcome {
            report,
            layer,
            record,
        })
    }
}

/// The recipe of a step on the layers `below`.
fn recipe(image: &Image, env: &Env, kind: Kind, script: &str, below: &[Arc<Layer>]) -> Recipe {
    Recipe {
        kind,
        below: below.iter().map(|layer| layer.tree_id()).collect(),
        script: script.to_owned(),
        shell: SHELL.iter().map(|&word| word.to_owned()).collect(),
        arch: std::env::consts::ARCH.to_owned(),
        user: image.config.user.clone(),
        env: env.clone(),
    }
}

/// Finds records that still hold.
#[derive(Clone, Copy)]
struct Finder<'a> {
    store: &'a Store,
    /// Pins the layers of the records that are found.
    lease: &'a Lease,
    /// A record that came from another cache is not used.
    caches: &'a LayerCaches,
}

impl Finder<'_> {
    /// A record of `key` that holds for the project of `answers`, and its facts. Its layer is in
    /// the store, and pinned. `last` is the record that the project used last.
    fn find(
        &self,
        key: KeyId,
        last: Option<FactsId>,
        answers: &mut Answers<'_>,
    ) -> Result<Option<(RecordHead, Vec<Fact>)>, BuildError> {
        let mut found = None;
        let mut take = |head: &RecordHead, facts: &[Fact]| {
            // Pinned before it is looked for: what gc has taken by now is built again.
            self.lease.pin(&[head.layer_id])?;
            let there = self.store.has_layer(&head.layer_id);
            if there {
                found = Some((head.clone(), facts.to_vec()));
            }
            Ok(there)
        };
        let search = Search {
            last,
            trusts: &|head| self.caches.trusts(head.origin()),
            take: &mut take,
        };
        self.store.find_record(&key, answers, search)?;
        Ok(found)
    }
}

/// A snapshot of a project as it is now, and the right to take the next one.
fn take_snapshot(
    store: &Store,
    lease: &Lease,
    project: &Project,
    waiting: &dyn Fn(),
) -> Result<(Snapshot, Flight), BuildError> {
    let name = project_id(project);
    // Two at once would each store what is new of the project.
    let key = KeyId::from_bytes(blake3::derive_key(SNAPSHOT_CONTEXT, name.as_bytes()));
    let flight = store.flight(&key, waiting)?;
    let options = snapshot::Options {
        name: &name,
        at: WORKSPACE.as_bytes(),
        excludes: &EXCLUDED.map(str::as_bytes),
        uid: 0,
        gid: 0,
    };
    let snapshot = snapshot::snapshot(store, lease, &project.root, &options)?;
    Ok((snapshot, flight))
}

/// The project's directory in its layer.
fn project_root(project: &Layer) -> NodeRef<'_> {
    project
        .lookup(WORKSPACE.as_bytes())
        .unwrap_or(project.root())
}

impl Report {
    fn hit(kind: Kind, key: Option<KeyId>, layer: &Layer) -> Self {
        Self {
            kind,
            status: Status::Hit,
            key,
            layer_id: layer.layer_id(),
            tree_id: layer.tree_id(),
            bytes: 0,
            files: 0,
            seconds: 0.0,
            reason: None,
            cache: None,
            changed: None,
        }
    }
}

/// One step on its way from script to layer.
struct Step<'a> {
    builder: &'a Builder<'a>,
    kind: Kind,
    script: &'a str,
}

impl Step<'_> {
    fn run(
        &self,
        below: &[Arc<Layer>],
        project: &Arc<Layer>,
    ) -> Result<(Vec<Fact>, Published), BuildError> {
        let kind = self.kind;
        let dir = ScratchDir::new(self.builder.home, "step-")?;
        let lent = Lent::new(self.builder, kind, below, project)?;
        // As in `FROM base`, `COPY project`, `RUN setup`, `RUN install`.
        let slot = self.builder.image.layers.len().min(below.len());
        let mut layers = below.to_vec();
        layers.insert(slot, Arc::clone(project));
        let first_lent = layers.len();
        layers.extend(lent.layers.iter().cloned());
        let options = OverlayOptions {
            project: Some(project_at(slot)),
            observe: true,
            aside: Aside {
                slots: (first_lent..layers.len()).collect(),
                ..lent.aside.clone()
            },
            volatile: true,
        };
        let composition = Composition {
            store: self.builder.store,
            layers,
            upper: dir.upper(),
            options,
            mode: Mode::Observed,
            console: dir.console(),
        };
        let broken = |source| BuildError::Compose { kind, source };
        let composed = composition
            .compose(self.builder.isolation)
            .map_err(broken)?;
        let mut sandbox = self.execute(&composed, project)?;
        let ended = SystemTime::now();
        let Left { overlay, facts } = composition
            .take_back(composed, &mut sandbox)
            .map_err(broken)?
            .ok_or(BuildError::Unobserved { kind })?;
        let freeze = |source| BuildError::Freeze { kind, source };
        let (store, lease) = (self.builder.store, self.builder.lease);
        // As long as this one is open, nothing takes the files of the volumes away, which no layer
        // names yet.
        let merging = store.ingest(lease)?;
        let ingest = store.ingest(lease)?;
        let apart = overlay.freeze_apart(&ingest).map_err(freeze)?;
        let published = ingest.finish(&apart.result)?;
        lent.give_back(self.builder, &apart.volumes);
        drop(merging);
        lent.keep_seed(self.builder, published.layer_id, project, ended);
        Ok((facts, published))
    }

    /// Runs the script to its end, and its sandbox's.
    fn execute(&self, composed: &Composed, project: &Arc<Layer>) -> Result<Sandbox, BuildError> {
        let kind = self.kind;
        let broken = |source| BuildError::Sandbox { kind, source };
        let argv = SHELL.into_iter().chain([self.script]).map(OsString::from);
        let mut spec = SandboxSpec::new(composed.root(), argv, self.builder.home.host_settings());
        spec.env = self.builder.env.clone().into_iter().collect();
        spec.user.clone_from(&self.builder.image.config.user);
        self.builder.name.clone_into(&mut spec.hostname);
        spec.reach = self.builder.isolation.reach();
        spec.stdio = Stdio::Piped;
        let mut sandbox = Sandbox::start(spec).map_err(broken)?;
        for warning in sandbox.warnings() {
            (self.builder.events)(Event::Note(warning.to_string()));
        }
        let tail = Mutex::new(Tail::default());
        let streams = [
            (Stream::Out, sandbox.stdout.take()),
            (Stream::Err, sandbox.stderr.take()),
        ];
        let controller = sandbox.controller();
        let running = RunningStep {
            store: self.builder.store.clone(),
            project: self.builder.project.clone(),
            seen: Arc::clone(project),
            overlay: composed.served().map(|served| Arc::clone(served.overlay())),
            controller: controller.clone(),
            cancelled: OnceLock::new(),
        };
        let ((status, cancelled), signal) = std::thread::scope(|scope| {
            for (which, pipe) in streams {
                let tail = &tail;
                scope.spawn(move || pipe.map(|pipe| self.stream(which, pipe, tail)));
            }
            let wait = || self.builder.running.attend(running, || sandbox.wait());
            self.builder.signals.attend(controller, wait)
        });
        if let Some(signal) = signal {
            return Err(BuildError::Interrupted { kind, signal });
        }
        let succeeded = status.as_ref().is_ok_and(ExitStatus::success);
        if let Some(path) = cancelled.filter(|_| !succeeded) {
            return Err(BuildError::Superseded { kind, path });
        }
        let status = status.map_err(broken)?;
        if succeeded {
            return Ok(sandbox);
        }
        let tail = tail.into_inner().unwrap_or_else(PoisonError::into_inner);
        Err(BuildError::Step {
            kind,
            status,
            tail: tail.into_lines(),
        })
    }
}

impl Step<'_> {
    /// Hands on what a step prints until the stream ends.
    fn stream(&self, which: Stream, mut pipe: impl io::Read, tail: &Mutex<Tail>) {
        let mut buffer = [0; 8192];
        // A read that fails is the end of the output, not of the step.
        while let Ok(read @ 1..) = pipe.read(&mut buffer) {
            let piece = &buffer[..read];
            tail.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(piece);
            (self.builder.events)(Event::Output(self.kind, which, piece));
        }
    }
}

/// The project in a chain whose layer at `slot` is its.
pub fn project_at(slot: usize) -> ProjectAt {
    ProjectAt {
        slot,
        path: WORKSPACE.into(),
    }
}

/// A file name for what belongs to one project: its directory's name for people, its path's hash
/// for us.
pub fn project_id(project: &Project) -> String {
    use std::os::unix::ffi::OsStrExt as _;
    let hash = blake3::hash(project.root.as_os_str().as_bytes()).to_hex();
    format!("{}-{}", project.dev_name(), &hash[..16])
}

fn at(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BuildError {
    let path = path.to_owned();
    move |source| BuildError::Io {
        operation,
        path,
        source,
    }
}

/// A directory for an upper that nobody needs after this process, such as that of a step; removed
/// when dropped.
pub(crate) struct ScratchDir {
    dir: PathBuf,
    /// Tells a later run that somebody is at it.
    _lock: File,
}

impl ScratchDir {
    /// Makes one below [`Home::build`], whose name begins with `prefix`.
    pub(crate) fn new(home: &Home, prefix: &str) -> Result<Self, BuildError> {
        let parent = home.build();
        fs::create_dir_all(&parent).map_err(at("create", &parent))?;
        // While it has no lock yet, a sweep could take it for abandoned.
        let guard = File::open(&parent).map_err(at("open", &parent))?;
        guard.lock_shared().map_err(at("lock", &parent))?;
        let dir = tempfile::Builder::new().prefix(prefix).tempdir_in(&parent);
        let dir = dir.map_err(at("create a directory in", &parent))?.keep();
        let path = dir.join(STEP_LOCK);
        let lock = File::create(&path).map_err(at("create", &path))?;
        lock.lock().map_err(at("lock", &path))?;
        Ok(Self { dir, _lock: lock })
    }

    /// Where the upper is to be.
    pub(crate) fn upper(&self) -> PathBuf {
        self.dir.join("upper")
    }

    fn console(&self) -> PathBuf {
        self.dir.join("console.log")
    }
}

impl Drop for ScratchDir {
    fn drop(&mut self) {
        // What cannot be removed now is swept by a later run.
        let _ = fs::remove_dir_all(&self.dir);
    }
}

const STEP_LOCK: &str = "lock";

/// Removes what steps left behind whose process was killed.
pub fn sweep(home: &Home) {
    let Ok(parent) = File::open(home.build()) else {
        return;
    };
    let (Ok(()), Ok(steps)) = (parent.try_lock(), fs::read_dir(home.build())) else {
        return;
    };
    for step in steps.flatten() {
        let dir = step.path();
        let abandoned =
            File::open(dir.join(STEP_LOCK)).map_or(true, |lock| lock.try_lock().is_ok());
        if abandoned {
            let _ = fs::remove_dir_all(dir);
        }
    }
}
