//! A worker from its start to its end, and what it makes of changes of its project meanwhile: live
//! reload.
//!
//! ```text
//! the watch            the project has changed                ->
//! whoever waits        the sandbox has ended                  ->   one thread that does one thing after the other
//! signals              somebody wants the worker to end       ->
//! ```
//!
//! The layers of a project that changed are realised as at a start, beside the worker that runs.
//! Where only the project's own is another, the running filesystem takes the changes, and the start
//! command is run again in the same sandbox: nothing is mounted, nothing booted. Where the layers
//! below are others, or where a filesystem cannot be changed under its kernel (a microVM's), the
//! sandbox is ended and another one started in its place. What cannot be realised changes nothing,
//! and the next change tries again.
//!
//! What the project looks like decides, not what happened to it: a change that comes to the same
//! tree and the same command is none.

use std::collections::{HashSet, VecDeque};
use std::error::Error;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use iii_sandbox::{Sandbox, SandboxError, Stdio};
use iii_store::layer::Kind as NodeKind;
use iii_store::{Layer, Lease, RefKind, TreeId, diff, with_causes};
use rustix::process::Signal;

use crate::build::realise::{Realiser, Share, Wanted, Worker};
use crate::build::{self, Event, RunningSteps, Status};
use crate::compose::Isolation;
use crate::plan::{EXCLUDED, Kind};
use crate::project::{Project, WorkerName};
use crate::worker::engine::Engine;
use crate::worker::error::RunError;
use crate::worker::isolation::distrust_kvm;
use crate::worker::keep::keep_layers;
use crate::worker::place::Place;
use crate::worker::program::{Program, worker_config};
use crate::worker::start::{Live, Start};
use crate::worker::supervise::GRACE;
use crate::worker::watch::{Stopper, Watch, WatchError};

/// Former layers of the project that stay pinned for programs that have a file of one open, and
/// outlive a restart of the worker.
const FORMER: usize = 16;
/// Notes that are remembered so that they are told once.
const MAX_TOLD: usize = 1 << 10;

/// How a worker ended.
#[derive(Debug, Clone, Copy)]
pub struct Ended {
    /// How its start command ended.
    pub status: ExitStatus,
    /// The signal that asked it to end, if one did.
    pub signal: Option<Signal>,
}

enum Message {
    /// The watch is set up.
    Watching(Stopper),
    Unwatched(WatchError),
    Changed,
    /// Somebody wants the worker to end. Its sandbox is told, too.
    Signal,
    /// The sandbox has ended.
    Ended,
}

/// What happens to a worker.
struct Inbox {
    sender: Sender<Message>,
    messages: Receiver<Message>,
    /// The project whose changes are to be told, and are not yet.
    root: Option<PathBuf>,
    /// Something has changed, and that was not told yet.
    changed: bool,
    /// How often a change has begun or come to rest: while it is odd, one is under way that is not
    /// told yet.
    stirs: Arc<AtomicU64>,
    /// What was last seen was not used, since it may have been half of a change.
    again: bool,
    stopper: Option<Stopper>,
}

impl Inbox {
    /// With the changes of the project in `root`, if there is one to follow, once it is
    /// [watched](Self::watch).
    fn new(root: Option<&PathBuf>) -> Self {
        let (sender, messages) = channel();
        Self {
            sender,
            messages,
            root: root.cloned(),
            changed: false,
            stirs: Arc::default(),
            again: false,
            stopper: None,
        }
    }

    /// Has the changes of the project told from now on, until this is dropped. That whoever starts
    /// a worker does not wait for it is why it comes after the start: what has changed before is
    /// found by looking once more.
    fn watch(&mut self, running: &Arc<RunningSteps>) {
        let Some(root) = self.root.take() else {
            return;
        };
        let (sender, stirs) = (self.sender.clone(), Arc::clone(&self.stirs));
        let running = Arc::clone(running);
        let failed = sender.clone();
        let watch = move || {
            if let Err(error) = watch(&root, &stirs, &sender, &running) {
                let _ = sender.send(Message::Unwatched(error));
            }
        };
        if let Err(source) = thread::Builder::new().name("watch".into()).spawn(watch) {
            let _ = failed.send(Message::Unwatched(WatchError::Thread(source)));
        }
    }

    /// What happens next. All that changed until now is one change, and comes last.
    fn next(&mut self) -> Message {
        loop {
            let message = if self.changed {
                self.messages.try_recv().ok()
            } else {
                // It cannot fail: one sender is here.
                self.messages.recv().ok()
            };
            let Some(message) = message else {
                self.changed = false;
                return Message::Changed;
            };
            if let Some(message) = self.sort(message) {
                return message;
            }
        }
    }

    /// Looks, and tells what is seen, unless that may be half of a change, which is told when it
    /// has come to rest. Not twice in a row: a project that never rests is followed as well.
    fn look<T>(&mut self, look: impl FnOnce() -> T) -> Result<T, Unsure<T>> {
        let before = self.stirs.load(Ordering::Acquire);
        let seen = look();
        let after = self.stirs.load(Ordering::Acquire);
        self.again = !self.again && (before != after || after % 2 == 1);
        if self.again {
            Err(Unsure(seen))
        } else {
            Ok(seen)
        }
    }

    /// Waits for the end of the sandbox.
    fn end(&mut self) {
        while let Ok(message) = self.messages.recv() {
            if let Some(Message::Ended) = self.sort(message) {
                return;
            }
        }
    }

    fn sort(&mut self, message: Message) -> Option<Message> {
        match message {
            Message::Changed => self.changed = true,
            Message::Watching(stopper) => self.stopper = Some(stopper),
            // The end of the change that was under way will not be told.
            Message::Unwatched(error) => {
                self.changed |= self.again;
                return Some(Message::Unwatched(error));
            }
            message => return Some(message),
        }
        None
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        if let Some(stopper) = &self.stopper {
            stopper.stop();
        }
    }
}

/// What was seen, and is not to be used.
struct Unsure<T>(T);

/// Tells `sender` of changes for as long as anybody listens, and counts their beginnings and ends.
/// Steps that run look again at each.
fn watch(
    root: &Path,
    stirs: &AtomicU64,
    sender: &Sender<Message>,
    running: &RunningSteps,
) -> Result<(), WatchError> {
    let mut watch = Watch::new(root, &EXCLUDED)?;
    if sender.send(Message::Watching(watch.stopper())).is_err() {
        return Ok(());
    }
    // What changed before is not known: it is one change, which may be none.
    stirs.fetch_add(1, Ordering::Release);
    while watch.settled()? {
        stirs.fetch_add(1, Ordering::Release);
        if sender.send(Message::Changed).is_err() {
            break;
        }
        running.look_again();
        if !watch.stirred()? {
            break;
        }
        stirs.fetch_add(1, Ordering::Release);
    }
    Ok(())
}

/// Lets through what people want to know: of a worker that follows its project, only what had to be
/// done, and no note twice.
#[derive(Default)]
pub(crate) struct Sieve {
    following: AtomicBool,
    told: Mutex<HashSet<String>>,
}

impl Sieve {
    /// The events of a [`Realiser`] that pass, without the name of the worker.
    pub fn filter<'a>(
        &'a self,
        events: &'a (dyn Fn(Event<'_>) + Sync),
    ) -> impl Fn(Option<&WorkerName>, Event<'_>) + Sync + 'a {
        move |_, event| {
            if self.passes(&event) {
                events(event);
            }
        }
    }

    /// Whether to tell this.
    fn passes(&self, event: &Event<'_>) -> bool {
        match event {
            Event::Note(note) => {
                let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
                told.len() < MAX_TOLD && told.insert(note.clone())
            }
            _ if !self.following.load(Ordering::Relaxed) => true,
            Event::Ready(report) => report.status != Status::Hit && report.kind != Kind::Project,
            Event::Base(_) | Event::Waiting(Kind::Project) => false,
            _ => true,
        }
    }
}

/// Waits for the end of a sandbox, and is told whether it is the worker's first.
pub(crate) type Attend<'a, E> = dyn FnMut(&mut Sandbox, bool) -> Result<ExitStatus, E> + Send + 'a;

/// How the runs of one command differ from those of others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RunKind {
    /// `worker dev`: on the terminal of its user.
    Dev,
    /// A managed worker, under a supervisor that reads its output.
    Managed,
}

impl RunKind {
    /// The purpose in the names of its leases.
    pub fn purpose(self) -> &'static str {
        match self {
            Self::Dev => "dev",
            Self::Managed => "managed",
        }
    }

    /// The kind of the ref that keeps its layers.
    fn keeper(self) -> RefKind {
        match self {
            Self::Dev => RefKind::Worker,
            Self::Managed => RefKind::Managed,
        }
    }

    fn stdio(self) -> Stdio {
        match self {
            Self::Dev => Stdio::Inherit,
            Self::Managed => Stdio::Joined,
        }
    }

    /// Whether a worker that ends by itself after a reload is started again at the next change.
    fn is_patient(self) -> bool {
        self == Self::Dev
    }
}

/// The options of a run.
pub(crate) struct RunOptions<'a> {
    /// The base image, unless it follows from the project.
    pub base: Option<&'a str>,
    pub engine: &'a Engine,
    /// The engine's config.yaml.
    pub config: &'a Path,
    /// Whether the worker follows its project.
    pub watch: bool,
    /// Whether the store may be cleared after a build.
    pub collect: bool,
}

/// A worker that is run.
pub(crate) struct Session<'a> {
    kind: RunKind,
    options: RunOptions<'a>,
    /// Reports its events through `sieve`.
    realiser: &'a Realiser<'a>,
    sieve: &'a Sieve,
    /// The directory of the worker's state.
    place: &'a Place,
    events: &'a (dyn Fn(Event<'_>) + Sync),
}

/// A worker whose layers are there and pinned, and what it runs.
struct Ready {
    worker: Worker,
    program: Program,
    lease: Lease,
}

impl Ready {
    /// Whether it looks the same from inside.
    fn is_like(&self, other: &Self) -> bool {
        self.stands_like(other)
            && self.program == other.program
            && tree(self.worker.stack.project()) == tree(other.worker.stack.project())
    }

    /// Whether a sandbox of the one is one for the other, but for the project and the command.
    fn stands_like(&self, other: &Self) -> bool {
        let others = |ready: &Self| -> Vec<(Kind, TreeId)> {
            let reports = ready.worker.stack.reports.iter();
            let others = reports.filter(|report| report.kind != Kind::Project);
            others.map(|report| (report.kind, report.tree_id)).collect()
        };
        self.worker.isolation == other.worker.isolation && others(self) == others(other)
    }
}

fn tree(layer: Option<&Arc<Layer>>) -> Option<TreeId> {
    layer.map(|layer| layer.tree_id())
}

/// A change that was realised.
struct Change {
    ready: Ready,
    begun: Instant,
    /// How many files of the project it is.
    files: u64,
}

impl Change {
    fn new(ready: Ready, begun: Instant, last: &Ready) -> Self {
        let layers = last.worker.stack.project();
        let layers = layers.zip(ready.worker.stack.project());
        let files = layers.map_or(0, |(old, new)| changed_files(old, new));
        Self {
            ready,
            begun,
            files,
        }
    }
}

fn changed_files(old: &Layer, new: &Layer) -> u64 {
    let is_dir = |path: &[u8]| {
        let node = new.lookup(path).or_else(|| old.lookup(path));
        node.is_some_and(|node| node.kind() == NodeKind::Dir)
    };
    let changes = diff(old, new);
    changes
        .iter()
        .filter(|change| !is_dir(&change.path))
        .count() as u64
}

/// What became of one sandbox.
struct Round<E> {
    /// The last change that it has taken.
    shown: Option<Ready>,
    /// How it ended.
    status: Result<ExitStatus, E>,
    /// What is to be started in its place.
    next: Option<Change>,
}

/// Tells that a sandbox has ended, however the thread that waited for it did.
struct Ending(Sender<Message>);

impl Drop for Ending {
    fn drop(&mut self) {
        let _ = self.0.send(Message::Ended);
    }
}

impl<'a> Session<'a> {
    /// A run of the worker in `place`. `realiser` must report its events through `sieve`.
    pub fn new(
        kind: RunKind,
        options: RunOptions<'a>,
        realiser: &'a Realiser<'a>,
        sieve: &'a Sieve,
        place: &'a Place,
        events: &'a (dyn Fn(Event<'_>) + Sync),
    ) -> Self {
        Self {
            kind,
            options,
            realiser,
            sieve,
            place,
            events,
        }
    }

    /// Runs `worker`, whose layers `lease` pins, until it ends for good. `attend` is called for
    /// each sandbox that it runs in, and told whether it is the first; it waits for its end.
    pub fn run<E: Error + From<RunError> + Send>(
        &self,
        worker: Worker,
        lease: Lease,
        attend: &mut Attend<'_, E>,
    ) -> Result<Ended, E> {
        self.sieve.following.store(true, Ordering::Relaxed);
        let ready = self.ready(worker, lease)?;
        let mut inbox = Inbox::new(self.options.watch.then_some(&ready.worker.project.root));
        let name = ready.worker.name.clone();
        let caller = inbox.sender.clone();
        let told = move || {
            let _ = caller.send(Message::Signal);
        };
        let grown = ready.worker.has_grown();
        let rounds = |share: &Share<'_>| self.rounds(&mut inbox, ready, share, attend);
        let ended = self
            .realiser
            .signals
            .heed(told, || self.realiser.share_during(&name, rounds));
        if grown {
            self.clear();
        }
        ended
    }

    /// Starts one sandbox after the other.
    fn rounds<E: Error + From<RunError> + Send>(
        &self,
        inbox: &mut Inbox,
        mut ready: Ready,
        share: &Share<'_>,
        attend: &mut Attend<'_, E>,
    ) -> Result<Ended, E> {
        let mut change = None;
        let mut reloaded = false;
        loop {
            share(&ready.worker);
            let Round {
                shown,
                status,
                next,
            } = self.round(inbox, &mut ready, change, attend);
            if let Some(shown) = shown {
                ready = shown;
                reloaded = true;
            }
            let next = if self.realiser.signals.received().is_some() {
                None
            } else if next.is_none() && reloaded && self.kind.is_patient() {
                let why = match &status {
                    Ok(status) => format!("the start command ended: {}", build::describe(*status)),
                    Err(error) => format!("the worker does not run: {}", with_causes(error)),
                };
                self.note(format!(
                    "{why}; it is started again when its project changes"
                ));
                self.wait(inbox, &ready)
            } else {
                next
            };
            let Some(next) = next else {
                let signal = self.realiser.signals.received();
                return status.map(|status| Ended { status, signal });
            };
            change = Some((next.begun, next.files));
            ready = next.ready;
            reloaded = true;
        }
    }

    /// Runs one sandbox to its end; another where nobody asked for a microVM, and none speaks.
    fn round<E: From<RunError> + Send>(
        &self,
        inbox: &mut Inbox,
        ready: &mut Ready,
        change: Option<(Instant, u64)>,
        attend: &mut Attend<'_, E>,
    ) -> Round<E> {
        let mut shown = None;
        let mut round = self.start(inbox, ready, change, attend, &mut shown);
        if let Err(error) = &round
            && error.is_silent_guest()
            && ready.worker.isolation.may_fall_back()
        {
            distrust_kvm(self.realiser.home, error, &|event| self.tell(event));
            round = self
                .leave_machine(ready)
                .and_then(|()| self.start(inbox, ready, change, attend, &mut shown));
        }
        let (status, next) = match round {
            Ok(ended) => ended,
            Err(error) => (Err(error.into()), None),
        };
        Round {
            shown,
            status,
            next,
        }
    }

    /// Has a worker that was to run in a microVM run in namespaces.
    fn leave_machine(&self, ready: &mut Ready) -> Result<(), RunError> {
        ready.worker.isolation = Isolation::Namespace;
        let (home, path) = (self.realiser.home, self.options.config);
        let config = worker_config(home, path, &ready.worker.name, &|event| self.tell(event))?;
        ready.program = Program::new(&ready.worker, self.options.engine, &config);
        Ok(())
    }

    /// Starts a sandbox, and attends to it until its end. How it ended, and what is to be started
    /// in its place.
    fn start<E: From<RunError> + Send>(
        &self,
        inbox: &mut Inbox,
        ready: &Ready,
        change: Option<(Instant, u64)>,
        attend: &mut Attend<'_, E>,
        shown: &mut Option<Ready>,
    ) -> Result<(Result<ExitStatus, E>, Option<Change>), RunError> {
        let start = Start {
            home: self.realiser.home,
            store: self.realiser.store,
            worker: &ready.worker,
            place: self.place,
            keeper: self.kind.keeper(),
            program: &ready.program,
            stdio: self.kind.stdio(),
        };
        let signals = self.realiser.signals;
        start.run(signals, &|event| self.tell(event), |sandbox, live| {
            inbox.watch(self.realiser.running());
            if let Some((begun, files)) = change {
                self.reloaded(begun, files, &ready.worker);
            }
            let ending = Ending(inbox.sender.clone());
            thread::scope(|scope| {
                let waiting = scope.spawn(move || {
                    let _ending = ending;
                    attend(sandbox, change.is_none())
                });
                let next = self.follow(inbox, live, ready, shown);
                let status = waiting.join();
                (status.unwrap_or_else(|panic| resume_unwind(panic)), next)
            })
        })
    }

    /// Has the worker that runs take what changes, until it ends or another sandbox has to take its
    /// place.
    fn follow(
        &self,
        inbox: &mut Inbox,
        live: &Live<'_>,
        ready: &Ready,
        shown: &mut Option<Ready>,
    ) -> Option<Change> {
        let mut former = VecDeque::new();
        loop {
            match inbox.next() {
                Message::Ended => return None,
                Message::Changed => {}
                message => {
                    self.hear(message);
                    continue;
                }
            }
            let last = shown.as_ref().unwrap_or(ready);
            let Some(change) = self.change(inbox, last) else {
                continue;
            };
            if self.show(live, ready, last, &change) {
                match live.restart(&change.ready.program) {
                    Ok(()) => self.reloaded(change.begun, change.files, &change.ready.worker),
                    Err(SandboxError::Killed) => return Some(Self::end(inbox, live, change)),
                    // The end of the sandbox follows.
                    Err(error) => {
                        self.note(format!("the start command: {}", with_causes(&error)));
                    }
                }
                if let Some(last) = shown.replace(change.ready) {
                    former.push_back(last.lease);
                }
                if former.len() > FORMER {
                    former.pop_front();
                }
            } else {
                return Some(Self::end(inbox, live, change));
            }
        }
    }

    /// Ends the sandbox, if it has not ended, for what is to be started in its place.
    fn end(inbox: &mut Inbox, live: &Live<'_>, change: Change) -> Change {
        // It can only fail when the sandbox is gone, which is what is wanted.
        let _ = live.controller.stop(Signal::TERM, GRACE);
        inbox.end();
        change
    }

    /// Has the running filesystem take a change. False if another sandbox has to.
    fn show(&self, live: &Live<'_>, ready: &Ready, last: &Ready, change: &Change) -> bool {
        let layers = |ready: &Ready| ready.worker.stack.ids();
        let (Some(served), Some(project)) = (live.served, change.ready.worker.stack.project())
        else {
            return false;
        };
        if !ready.stands_like(&change.ready) {
            return false;
        }
        let name = ready.worker.name.as_str();
        // Before the upper has anything of the new layer, and as long as it has anything of the one
        // before.
        let mut besides = [&layers(ready)[..], &layers(last), live.thawed].concat();
        // One with the same tree as the last may have taken its name, and not its place.
        besides.extend(served.project_layer());
        let kept = keep_layers(
            self.realiser.store,
            self.kind.keeper(),
            name,
            &change.ready.worker.stack.runs_on(),
            &besides,
        );
        kept.is_ok() && served.show(project).is_ok()
    }

    /// Waits for a change that can be started.
    fn wait(&self, inbox: &mut Inbox, last: &Ready) -> Option<Change> {
        loop {
            match inbox.next() {
                Message::Signal => return None,
                Message::Changed => {
                    if let Some(change) = self.change(inbox, last) {
                        return Some(change);
                    }
                }
                message => self.hear(message),
            }
        }
    }

    /// The project as it is now, if that is not as it was and can be realised.
    fn change(&self, inbox: &mut Inbox, last: &Ready) -> Option<Change> {
        let begun = Instant::now();
        let now = match inbox.look(|| self.realise(&last.worker)) {
            Ok(now) => now,
            Err(Unsure(unused)) => {
                if unused.is_ok_and(|ready| ready.worker.has_grown()) {
                    self.clear();
                }
                return None;
            }
        };
        match now {
            Ok(ready) if ready.is_like(last) => None,
            Ok(ready) => Some(Change::new(ready, begun, last)),
            Err(error) => {
                // The change that superseded a step is the next. Who wants the worker to end wants
                // what is built for it to end, too.
                if !error.is_superseded() && self.realiser.signals.received().is_none() {
                    self.note(format!("not reloaded: {}", with_causes(&error)));
                }
                None
            }
        }
    }

    fn realise(&self, last: &Worker) -> Result<Ready, RunError> {
        let wanted = Wanted {
            project: Project::open(&last.project.root)?,
            name: last.name.clone(),
            base: self.options.base.map(str::to_owned),
        };
        let (worker, lease) = self.realiser.one(self.kind.purpose(), wanted)?;
        self.ready(worker, lease)
    }

    fn ready(&self, worker: Worker, lease: Lease) -> Result<Ready, RunError> {
        let (home, path) = (self.realiser.home, self.options.config);
        let config = worker_config(home, path, &worker.name, &|event| self.tell(event))?;
        let program = Program::new(&worker, self.options.engine, &config);
        Ok(Ready {
            worker,
            program,
            lease,
        })
    }

    fn reloaded(&self, begun: Instant, files: u64, worker: &Worker) {
        let seconds = begun.elapsed().as_secs_f64();
        self.tell(Event::Reloaded { files, seconds });
        if worker.has_grown() {
            self.clear();
        } else if self.options.collect {
            self.realiser.collect_edits();
        }
    }

    fn clear(&self) {
        if self.options.collect {
            self.realiser.collect();
        }
    }

    fn hear(&self, message: Message) {
        if let Message::Unwatched(error) = message {
            let hint = error
                .hint()
                .map_or_else(String::new, |hint| format!("; {hint}"));
            let why = with_causes(&error);
            self.note(format!(
                "changes of the project do not reload the worker: {why}{hint}"
            ));
        }
    }

    fn note(&self, text: String) {
        (self.events)(Event::Note(text));
    }

    fn tell(&self, event: Event<'_>) {
        if self.sieve.passes(&event) {
            (self.events)(event);
        }
    }
}
