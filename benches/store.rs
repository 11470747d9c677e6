//! The store beside archivers and other content-addressed stores, on one `node_modules`; see
//! benches/README.md.

#[allow(dead_code, reason = "each bench uses its part")]
mod corpus;
#[path = "corpus/packages.rs"]
mod packages;
#[allow(dead_code, reason = "each bench uses its part")]
mod support;

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use iii_store::snapshot::{Options, SnapshotError, snapshot};
use iii_store::tree::{Content, Leaf, Meta, Node, Tree};
use iii_store::{LayerId, ObjectId, Policy, Ref, RefKind, Store, StoreError, VerifyOptions};
use support::{Bounds, Error, Interrupt, Result, Samples, failed, run, skip, went_wrong};
use tempfile::TempDir;

/// The first argument of this program when it does nothing but one piece of work, so that its
/// cost, including the start of a process, is measured like that of the peers.
const ALONE: &str = "--alone";
/// Where `cargo install composefs-ctl` put its program, in the benches' cache.
const COMPOSEFS: &str = "composefs-ctl-0.9.4";
/// Most time of a first ingest, as a part of the time of `mkfs.erofs`, and of others that name
/// contents by their hash.
const FIRST_OF_EROFS: f64 = 0.85;
const FIRST_OF_OTHERS: f64 = 0.2;
/// Most time of an ingest of an unchanged tree, as a multiple of `git status`.
const UNCHANGED_OF_GIT: f64 = 1.5;
/// Most time of an ingest after one edit.
const EDIT_MS: f64 = 150.0;
/// Resident memory that an ingest may have at its highest, whatever the tree.
const MAX_RESIDENT_MIB: f64 = 256.0;
/// Most disk space of a store, as a multiple of that of one copy of each file that differs among
/// the workers.
const MAX_ON_DISK: f64 = 1.05;
/// Most time of hashing everything, as a part of the others' time, and of checking the structure.
const DATA_OF_OTHERS: f64 = 0.25;
const STRUCTURE_MS: f64 = 100.0;
/// Most time of a collection.
const GC_MS: f64 = 500.0;
/// How much longer a reader's or a writer's work may take beside collections than beside a process
/// that is as busy: of a hundred times, the longest but one.
const HELD_UP_MS: f64 = 10.0;
/// How long they work beside each; and how long they rest between two times.
const BESIDE: Duration = Duration::from_secs(3);
const REST: Duration = Duration::from_millis(5);
/// How long a process is busy.
const BUSY: Duration = Duration::from_millis(40);
/// Objects that a reader reads each time.
const READS: usize = 50;
/// Workers that share a store, and how many kinds of them there are.
const WORKERS: usize = 20;
const KINDS: usize = 5;
/// Source files of a worker. Each has one that no other has.
const SOURCES: usize = 100;

/// The program that stores the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Peer {
    Ours,
    Erofs,
    Composefs,
    Ostree,
    Restic,
    Borg,
    Git,
}

impl Peer {
    const ALL: [Peer; 7] = [
        Peer::Ours,
        Peer::Erofs,
        Peer::Composefs,
        Peer::Ostree,
        Peer::Restic,
        Peer::Borg,
        Peer::Git,
    ];

    fn name(self) -> &'static str {
        match self {
            Peer::Ours => "ours",
            Peer::Erofs => "mkfs.erofs",
            Peer::Composefs => "composefs-rs",
            Peer::Ostree => "ostree",
            Peer::Restic => "restic",
            Peer::Borg => "borg",
            Peer::Git => "git status",
        }
    }

    fn program(self) -> PathBuf {
        match self {
            Peer::Ours => PathBuf::new(),
            Peer::Erofs => "mkfs.erofs".into(),
            Peer::Composefs => corpus::cache()
                .map(|cache| cache.join(COMPOSEFS).join("bin/cfsctl"))
                .unwrap_or_default(),
            Peer::Ostree => "ostree".into(),
            Peer::Restic => "restic".into(),
            Peer::Borg => "borg".into(),
            Peer::Git => "git".into(),
        }
    }

    /// Why it takes no part, if it does not.
    fn missing(self) -> Option<String> {
        if self == Peer::Ours {
            return None;
        }
        let mut command = Command::new(self.program());
        command.arg(if self == Peer::Restic {
            "version"
        } else {
            "--help"
        });
        command.output().err().map(|error| error.to_string())
    }

    /// A command in `dir`, where it keeps all of its own.
    fn command<S: AsRef<OsStr>>(self, dir: &Path, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(self.program());
        command
            .args(args)
            .env("HOME", dir)
            .env("XDG_CACHE_HOME", dir.join("cache"))
            .env("RESTIC_PASSWORD", "bench")
            .env("BORG_BASE_DIR", dir)
            .env("BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK", "yes");
        command
    }

    /// git over `tree`, with its repository in `dir`.
    fn git(self, dir: &Path, tree: &Path) -> Command {
        let mut command = self.command(dir, ["-c", "core.compression=0"]);
        command
            .env("GIT_DIR", dir.join("store"))
            .env("GIT_WORK_TREE", tree)
            .current_dir(tree);
        command
    }

    /// Makes an empty store in `dir`, but for git, which has `tree` in it already.
    fn init(self, dir: &Path, tree: &Path) -> Result<()> {
        let repository = dir.join("store");
        let repository = repository.as_os_str();
        let mut command = match self {
            Peer::Ours => {
                let opened = Store::open(repository).map(drop);
                return opened.map_err(|error| said("opening a store", &error));
            }
            Peer::Erofs => return Ok(()),
            Peer::Git => {
                run(self.git(dir, tree).args(["init", "--quiet"]))?;
                run(self.git(dir, tree).args(["add", "--all", "--force"]))?;
                let mut command = self.git(dir, tree);
                command.args(["-c", "user.name=bench", "-c", "user.email=bench@localhost"]);
                command.args(["commit", "--quiet", "--message=all"]);
                command
            }
            Peer::Composefs => {
                let mut command = self.command(dir, ["init", "--insecure"]);
                command.arg(repository);
                command
            }
            Peer::Ostree => {
                let mut command = self.command(dir, ["init", "--mode=bare-user", "--repo"]);
                command.arg(repository);
                command
            }
            Peer::Restic => {
                let mut command = self.command(dir, ["--quiet", "init", "--repo"]);
                command.arg(repository);
                command
            }
            Peer::Borg => {
                let mut command = self.command(dir, ["init", "--encryption", "none"]);
                command.arg(repository);
                command
            }
        };
        run(&mut command).map(drop)
    }

    /// Reads and checks all contents in the store in `dir`. Nothing for who has no such check.
    fn verify(self, dir: &Path) -> Result<Option<Command>> {
        let repository = dir.join("store");
        let args: &[&str] = match self {
            Peer::Ours => {
                let command = alone("verify --data", [&repository, Path::new("")])?;
                return Ok(Some(command));
            }
            Peer::Erofs | Peer::Git => return Ok(None),
            Peer::Composefs => {
                let mut command = self.command(dir, ["--repo"]);
                command.arg(&repository).arg("fsck");
                return Ok(Some(command));
            }
            Peer::Ostree => &["fsck", "--quiet", "--repo"],
            Peer::Restic => &["check", "--quiet", "--read-data", "--repo"],
            Peer::Borg => &["check", "--verify-data"],
        };
        let mut command = self.command(dir, args);
        command.arg(&repository);
        Ok(Some(command))
    }

    /// Takes `tree` into the store in `dir`; `name` differs each time.
    fn store(self, dir: &Path, tree: &Path, name: &str) -> Result<Command> {
        let repository = dir.join("store");
        Ok(match self {
            Peer::Ours => alone(
                "ingest",
                [repository.as_os_str(), OsStr::new("tree"), tree.as_os_str()],
            )?,
            Peer::Erofs => {
                let mut command = self.command(dir, ["--quiet"]);
                command.arg(dir.join(name)).arg(tree);
                command
            }
            Peer::Composefs => {
                let mut command = self.command(dir, ["--repo"]);
                command.arg(&repository).arg("create-image");
                command.arg("--no-propagate-usr-to-root").arg(tree);
                command
            }
            Peer::Ostree => {
                let mut command = self.command(dir, ["commit", "--branch=tree", "--repo"]);
                command.arg(&repository);
                command.arg(["--tree=dir=", &tree.to_string_lossy()].concat());
                command
            }
            Peer::Restic => {
                let mut command =
                    self.command(dir, ["backup", "--quiet", "--compression=off", "--repo"]);
                command.arg(&repository).arg(tree);
                command
            }
            Peer::Borg => {
                let mut command = self.command(dir, ["create", "--compression", "none"]);
                command.arg(format!("{}::{name}", repository.display()));
                command.arg(tree);
                command
            }
            Peer::Git => {
                let mut command = self.git(dir, tree);
                command.args(["status", "--porcelain"]);
                command
            }
        })
    }
}

fn said(what: &str, error: &dyn std::error::Error) -> Error {
    let mut why = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        why = format!("{why}: {error}");
        cause = error.source();
    }
    Error::Command {
        what: what.to_owned(),
        why,
    }
}

/// This program, to do one piece of work.
fn alone<S: AsRef<OsStr>>(work: &str, args: impl IntoIterator<Item = S>) -> Result<Command> {
    let this = std::env::current_exe().map_err(failed("finding", Path::new("this program")))?;
    let mut command = Command::new(this);
    command.args([ALONE, work]).args(args);
    Ok(command)
}

/// Takes a directory into a store.
fn take(store: &Store, name: &str, tree: &Path) -> std::result::Result<LayerId, SnapshotError> {
    let stored = |source| SnapshotError::Store {
        path: tree.to_owned(),
        source,
    };
    let lease = store.lease("bench").map_err(stored)?;
    let options = Options {
        name,
        at: b"",
        excludes: &[],
        uid: 0,
        gid: 0,
    };
    let taken = snapshot(store, &lease, tree, &options)?;
    Ok(taken.published.layer_id)
}

/// Does one piece of work, if the arguments say so. Prints the highest resident memory of the
/// process that did it, in KiB.
fn work(mut args: std::env::ArgsOs) -> Result<bool> {
    let mut next = || args.next().unwrap_or_default();
    let (work, dir, name) = (next(), PathBuf::from(next()), next());
    let what = format!("{} into {}", work.display(), dir.display());
    if work == "iii" {
        return import(&dir, Path::new(&name));
    }
    let store = Store::open(&dir).map_err(|error| said(&what, &error))?;
    let failed = |error: &dyn std::error::Error| said(&what, error);
    match work.to_str() {
        Some("ingest") => {
            let tree = PathBuf::from(next());
            take(&store, &name.to_string_lossy(), &tree).map_err(|error| failed(&error))?;
        }
        Some(check @ ("verify" | "verify --data")) => {
            let options = VerifyOptions {
                data: check != "verify",
            };
            let report = store
                .verify(options, &|_| {})
                .map_err(|error| failed(&error))?;
            if !report.is_clean() {
                let why = format!("{:?}", report.problems);
                return Err(Error::Command { what, why });
            }
        }
        Some("busy") => {
            let cpus = std::thread::available_parallelism().map_or(1, usize::from);
            std::thread::scope(|scope| {
                for _ in 0..cpus {
                    scope.spawn(|| {
                        let (start, bytes) = (Instant::now(), [0; 8 << 10]);
                        while start.elapsed() < BUSY {
                            std::hint::black_box(ObjectId::of(&bytes));
                        }
                    });
                }
            });
        }
        Some("gc") => {
            let policy = Policy {
                keep: Duration::ZERO,
                grace: Duration::ZERO,
                ..Policy::default()
            };
            let plan = store.plan_gc(&policy).map_err(|error| failed(&error))?;
            store.gc(&plan, &|_| {}).map_err(|error| failed(&error))?;
        }
        _ => {
            return Err(Error::Command {
                what,
                why: "no such work".into(),
            });
        }
    }
    println!("{}", rusage(libc::RUSAGE_SELF).ru_maxrss);
    Ok(true)
}

fn rusage(who: libc::c_int) -> libc::rusage {
    // SAFETY: it is plain integers, for which zeroes are well.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to memory of ours that is as large as the call expects.
    unsafe { libc::getrusage(who, &raw mut usage) };
    usage
}

/// Imports a root filesystem with the finished program, which goes through its tables of entries,
/// into the home directory `home`.
fn import(home: &Path, from: &Path) -> Result<bool> {
    let mut iii = Command::new(env!("CARGO_BIN_EXE_iii"));
    iii.args(["image", "import"]).arg(from);
    iii.args(["--as", "docker.io/iiidev/large:latest"])
        .env("HOME", home);
    run(&mut iii)?;
    println!("{}", rusage(libc::RUSAGE_CHILDREN).ru_maxrss);
    Ok(true)
}

/// Runs a command and returns how long it took.
fn timed(command: &mut Command) -> Result<Duration> {
    let begin = Instant::now();
    run(command)?;
    Ok(begin.elapsed())
}

/// Runs this program for one piece of work and returns its highest resident memory in MiB.
fn resident(command: &mut Command) -> Result<f64> {
    let output = run(command)?;
    let kib: f64 = String::from_utf8_lossy(&output.stdout)
        .trim()
        .parse()
        .map_err(|error| went_wrong(command, &error))?;
    Ok(kib / 1024.0)
}

/// Waits until the disk has nothing to write, so that no peer pays for the one before it.
fn settle(dir: &Path) -> Result<Duration> {
    let begin = Instant::now();
    let opened = File::open(dir).map_err(failed("opening", dir))?;
    rustix::fs::syncfs(&opened).map_err(|error| failed("syncing", dir)(error.into()))?;
    Ok(begin.elapsed())
}

/// The samples of one row of a table, by who made them.
#[derive(Default)]
struct Row(HashMap<&'static str, Samples>);

impl Row {
    fn push(&mut self, peer: Peer, took: Duration) {
        self.0.entry(peer.name()).or_default().0.push(took);
    }

    fn get(&self, peer: Peer) -> Option<&Samples> {
        self.0.get(peer.name())
    }

    fn show(&self, what: &str) -> Vec<String> {
        let cell = |peer: Peer| self.get(peer).map_or("–".into(), Samples::show);
        let mut cells = vec![what.to_owned()];
        cells.extend(Peer::ALL.map(cell));
        cells
    }

    /// Asks for at most `bound` times the time of `peer`.
    fn bound(&self, what: &str, peer: Peer, bound: f64, bounds: &mut Bounds) {
        if let (Some(ours), Some(theirs)) = (self.get(Peer::Ours), self.get(peer)) {
            let (ratio, ..) = ours.ratio(theirs);
            println!("{what} / {}: {}", peer.name(), ours.show_ratio(theirs));
            bounds.at_most(&format!("{what}, of {}", peer.name()), ratio, bound, "");
        }
    }
}

/// First ingest, ingest again, ingest after an edit: every peer in every round, each with a store
/// of its own. Files stay till the end: ext4 takes long to make files shortly after it has
/// removed many.
fn ingests(tree: &Path, scratch: &Path, interrupt: &Interrupt, bounds: &mut Bounds) -> Result<()> {
    let mut peers = Peer::ALL.to_vec();
    peers.retain(|peer| {
        let missing = peer.missing();
        if let Some(why) = &missing {
            skip(peer.name(), why);
        }
        missing.is_none()
    });
    let (mut first, mut again, mut edited) = <(Row, Row, Row)>::default();
    let (mut data, mut structure) = <(Row, Samples)>::default();
    let mut synced = Samples::default();
    for round in 0..support::option("--rounds", 5) {
        for &peer in &peers {
            interrupt.check()?;
            let dir = scratch.join(format!("{}-{round}", peer.name()));
            fs::create_dir(&dir).map_err(failed("making", &dir))?;
            peer.init(&dir, tree)?;
            settle(scratch)?;
            if peer != Peer::Git {
                first.push(peer, timed(&mut peer.store(&dir, tree, "first")?)?);
                let took = settle(scratch)?;
                if peer == Peer::Erofs {
                    synced.0.push(took);
                }
            }
            if peer != Peer::Erofs {
                again.push(peer, timed(&mut peer.store(&dir, tree, "again")?)?);
                settle(scratch)?;
            }
            if matches!(peer, Peer::Ours | Peer::Git) {
                let path = tree.join("package.json");
                let text = fs::read(&path).map_err(failed("reading", &path))?;
                fs::write(&path, [&text[..], b"\n"].concat()).map_err(failed("writing", &path))?;
                settle(scratch)?;
                edited.push(peer, timed(&mut peer.store(&dir, tree, "edited")?)?);
            }
            if let Some(mut command) = peer.verify(&dir)? {
                data.push(peer, timed(&mut command)?);
            }
            if peer == Peer::Ours {
                let verify = [dir.join("store"), PathBuf::new()];
                structure.0.push(timed(&mut alone("verify", verify)?)?);
            }
        }
    }
    let mut head = vec!["ms, median (min–max)"];
    head.extend(Peer::ALL.map(Peer::name));
    let rows = [
        first.show("first"),
        again.show("again, unchanged"),
        edited.show("after one edit"),
        data.show("all contents verified"),
    ];
    support::table(&head, &rows);
    println!(
        "\nA sync after mkfs.erofs, which does none: {} ms",
        synced.show()
    );
    for peer in [
        Peer::Erofs,
        Peer::Composefs,
        Peer::Ostree,
        Peer::Restic,
        Peer::Borg,
    ] {
        let bound = if peer == Peer::Erofs {
            FIRST_OF_EROFS
        } else {
            FIRST_OF_OTHERS
        };
        first.bound("first ingest", peer, bound, bounds);
    }
    for peer in [Peer::Composefs, Peer::Ostree, Peer::Restic, Peer::Borg] {
        data.bound("verify --data", peer, DATA_OF_OTHERS, bounds);
    }
    println!("verify of the structure: {} ms", structure.show());
    bounds.at_most("verify", structure.median(), STRUCTURE_MS, " ms");
    again.bound(
        "ingest again, unchanged",
        Peer::Git,
        UNCHANGED_OF_GIT,
        bounds,
    );
    if let Some(ours) = edited.get(Peer::Ours) {
        bounds.at_most("ingest after one edit", ours.median(), EDIT_MS, " ms");
    }
    Ok(())
}

/// Makes a tree of `entries` entries: small files, no two the same, 100 to a directory.
fn many(dir: &Path, entries: usize) -> Result<()> {
    let mut made = 0;
    for number in 0.. {
        let sub = dir.join(format!("{}/package-{number}", number / 100));
        fs::create_dir_all(&sub).map_err(failed("making", &sub))?;
        for file in 0..100 {
            if made >= entries {
                return Ok(());
            }
            let path = sub.join(format!("some-module-{file}.js"));
            fs::write(&path, format!("{number} {file}\n")).map_err(failed("writing", &path))?;
            made += 1;
        }
        made += 1;
    }
    Ok(())
}

/// The highest resident memory of an ingest: of `node_modules` and of a tree with very many
/// entries, the first time, again and after an edit; and of the import of the latter as an image,
/// from a directory and from an archive.
fn memory(
    node_modules: &Path,
    scratch: &Path,
    interrupt: &Interrupt,
    bounds: &mut Bounds,
) -> Result<()> {
    let entries = support::option("--entries", 100_000);
    let large = scratch.join("large");
    // The import has to look like a root filesystem.
    many(&large.join("usr"), entries)?;
    let mut rows = Vec::new();
    let mut measure = |what: String, mut command: Command| -> Result<()> {
        interrupt.check()?;
        let begin = Instant::now();
        let mib = resident(&mut command)?;
        let took = begin.elapsed().as_secs_f64();
        bounds.at_most(
            &format!("resident memory, {what}"),
            mib,
            MAX_RESIDENT_MIB,
            " MiB",
        );
        rows.push(vec![what, format!("{mib:.0}"), format!("{took:.1}")]);
        Ok(())
    };
    let edit = "usr/0/package-0/some-module-0.js";
    for (what, tree, edit) in [
        ("node_modules".to_owned(), node_modules, "package.json"),
        (format!("{entries} entries"), &large, edit),
    ] {
        let store = scratch.join(format!("memory of {what}"));
        for turn in ["first", "again, unchanged", "after one edit"] {
            if turn == "after one edit" {
                let path = tree.join(edit);
                fs::write(&path, turn).map_err(failed("writing", &path))?;
            }
            let args = [store.as_os_str(), OsStr::new("tree"), tree.as_os_str()];
            measure(format!("{what}, {turn}"), alone("ingest", args)?)?;
        }
    }
    let archive = scratch.join("large.tar");
    run(Command::new("tar")
        .arg("-cf")
        .arg(&archive)
        .arg("-C")
        .arg(&large)
        .arg("usr"))?;
    for (from, home) in [(&large, "home-1"), (&archive, "home-2")] {
        let home = scratch.join(home);
        fs::create_dir(&home).map_err(failed("making", &home))?;
        let kind = if from.is_dir() {
            "a directory"
        } else {
            "an archive"
        };
        let what = format!("{entries} entries as an image from {kind}");
        measure(what, alone("iii", [&home, from])?)?;
    }
    support::table(&["highest resident memory of an ingest", "MiB", "s"], &rows);
    Ok(())
}

/// How long some contents are, and the disk space of a file of them.
type Sizes = (u64, u64);

/// Every regular file below `dir`, by its contents.
fn unique(dir: &Path, seen: &mut HashMap<ObjectId, Sizes>) -> Result<()> {
    let entries = fs::read_dir(dir).map_err(failed("listing", dir))?;
    for entry in entries {
        let path = entry.map_err(failed("listing", dir))?.path();
        let meta = fs::symlink_metadata(&path).map_err(failed("looking at", &path))?;
        if meta.is_dir() {
            unique(&path, seen)?;
        } else if meta.is_file() {
            let bytes = fs::read(&path).map_err(failed("reading", &path))?;
            seen.insert(ObjectId::of(&bytes), (meta.len(), meta.blocks() * 512));
        }
    }
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "far fewer than 2^52 bytes")]
fn part(of: u64, whole: u64) -> f64 {
    of as f64 / whole as f64
}

/// Disk space of everything below `dir`, in bytes.
fn on_disk(dir: &Path) -> Result<u64> {
    let meta = fs::symlink_metadata(dir).map_err(failed("looking at", dir))?;
    let mut bytes = meta.blocks() * 512;
    if meta.is_dir() {
        for entry in fs::read_dir(dir).map_err(failed("listing", dir))? {
            bytes += on_disk(&entry.map_err(failed("listing", dir))?.path())?;
        }
    }
    Ok(bytes)
}

/// Links the entries of `from` into `to`, where the two have the same name for a directory as well.
fn link_tree(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).map_err(failed("making", to))?;
    for entry in fs::read_dir(from).map_err(failed("listing", from))? {
        let entry = entry.map_err(failed("listing", from))?;
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            link_tree(&path, &target)?;
        } else {
            fs::hard_link(&path, &target).map_err(failed("linking", &target))?;
        }
    }
    Ok(())
}

/// Twenty workers of five kinds: the installed files of a kind and each worker's own sources, every
/// one a layer of its own.
struct Workers {
    dir: PathBuf,
    store: Store,
    seen: HashMap<ObjectId, Sizes>,
}

impl Workers {
    fn make(node_modules: &Path, scratch: &Path, interrupt: &Interrupt) -> Result<Self> {
        let dir = scratch.join("workers-store");
        let trees = scratch.join("workers");
        let packages = node_modules.join("node_modules");
        let mut names: Vec<_> = fs::read_dir(&packages)
            .and_then(Iterator::collect::<std::io::Result<Vec<_>>>)
            .map_err(failed("listing", &packages))?
            .into_iter()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map(|entry| entry.file_name())
            .collect();
        names.sort();
        let mut seen = HashMap::new();
        let store = Store::open(&dir).map_err(|error| said("opening a store", &error))?;
        let mut take = |name: &str, tree: &Path| -> Result<LayerId> {
            interrupt.check()?;
            let layer = take(&store, name, tree).map_err(|error| said(name, &error))?;
            unique(tree, &mut seen)?;
            Ok(layer)
        };
        let mut installs = Vec::new();
        for kind in 0..KINDS {
            // Half of the packages are of all kinds, the others of one.
            let installed = trees.join(format!("kind-{kind}"));
            for (number, name) in names.iter().enumerate() {
                if number % 2 == 0 || number / 2 % KINDS == kind {
                    link_tree(&packages.join(name), &installed.join(name))?;
                }
            }
            installs.push(take(&format!("kind-{kind}"), &installed)?);
        }
        let mut refs = Vec::new();
        for worker in 0..WORKERS {
            let name = format!("worker-{worker}");
            let sources = trees.join(&name);
            fs::create_dir_all(&sources).map_err(failed("making", &sources))?;
            for number in 0..SOURCES {
                let path = sources.join(format!("{number}.js"));
                let whose = if number == 0 { worker } else { worker % KINDS };
                let text = format!("exports.of{whose} = {number};\n").repeat(1 + number);
                fs::write(&path, text).map_err(failed("writing", &path))?;
            }
            let layers = vec![installs[worker % KINDS], take(&name, &sources)?];
            refs.push((name, layers));
        }
        for (name, layers) in refs {
            let content = Ref {
                layers,
                info: serde_json::Value::Null,
            };
            store
                .set_ref(RefKind::Worker, &name, &content)
                .map_err(|error| said(&name, &error))?;
        }
        settle(scratch)?;
        Ok(Self { dir, store, seen })
    }

    fn disk(&self, bounds: &mut Bounds) -> Result<()> {
        let (len, blocks) = self
            .seen
            .values()
            .fold((0, 0), |sum, sizes| (sum.0 + sizes.0, sum.1 + sizes.1));
        let rows = ["packs", "loose", "layers", "stat", ""].map(|name| -> Result<Vec<String>> {
            let bytes = on_disk(&self.dir.join(name))?;
            let what = if name.is_empty() { "all" } else { name };
            Ok(vec![
                what.to_owned(),
                bytes.to_string(),
                format!("{:.3}", part(bytes, blocks)),
                format!("{:.3}", part(bytes, len)),
            ])
        });
        println!(
            "\n{WORKERS} workers of {KINDS} kinds: {} files differ; one of each takes {blocks} bytes on disk, and is {len} bytes long",
            self.seen.len()
        );
        let rows = rows.into_iter().collect::<Result<Vec<_>>>()?;
        let head = [
            "the store's",
            "bytes on disk",
            "of what differs on disk",
            "of its length",
        ];
        support::table(&head, &rows);
        let ratio = part(on_disk(&self.dir)?, blocks);
        bounds.at_most("bytes on disk, of what differs", ratio, MAX_ON_DISK, "");
        Ok(())
    }

    /// How long a reader and a writer take beside collections, which take the writer's layers;
    /// and, since every process on the same processors delays others, beside a process that does
    /// nothing but use them. On a tmpfs, where no sync waits for a disk.
    fn held_up(&self, interrupt: &Interrupt, bounds: &mut Bounds) -> Result<()> {
        interrupt.check()?;
        let dir = TempDir::with_prefix_in("iii-store-", "/dev/shm")
            .map_err(failed("making a directory in", Path::new("/dev/shm")))?;
        run(Command::new("cp")
            .arg("-a")
            .arg(self.dir.join("."))
            .arg(dir.path()))?;
        let open = || Store::open(dir.path()).map_err(|error| said("opening a store", &error));
        let refs = self.store.list_refs(RefKind::Worker);
        let refs = refs.map_err(|error| said("listing refs", &error))?;
        let layer = refs.first().and_then(|(_, content)| content.layers.first());
        let layer = *layer.ok_or_else(|| said("listing refs", &Error::Interrupted))?;
        let mut measured = Vec::new();
        for beside in ["nothing", "busy", "gc"] {
            let (reader, writer) = (open()?, open()?);
            let stop = AtomicBool::new(false);
            let number = AtomicUsize::new(0);
            let next = || number.fetch_add(1, Ordering::Relaxed);
            let repeat = |what: &dyn Fn() -> std::result::Result<(), StoreError>| {
                let mut times = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let start = Instant::now();
                    what().map_err(|error| said("working beside a collection", &error))?;
                    times.push(start.elapsed());
                    std::thread::sleep(REST);
                }
                times.sort_unstable();
                Ok::<_, Error>(times)
            };
            let (read, written) = std::thread::scope(|scope| -> Result<_> {
                let read = scope.spawn(|| repeat(&|| read_some(&reader, &layer, next())));
                let written = scope.spawn(|| repeat(&|| write_one(&writer, beside, next())));
                let start = Instant::now();
                let mut result = Ok(());
                while start.elapsed() < BESIDE && result.is_ok() {
                    if beside == "nothing" {
                        std::thread::sleep(REST);
                    } else {
                        let other = alone(beside, [dir.path(), Path::new("")]);
                        result = other.and_then(|mut other| timed(&mut other)).map(drop);
                    }
                }
                stop.store(true, Ordering::Relaxed);
                let panicked = |_| said("working beside a collection", &Error::Interrupted);
                let (read, written) = (read.join(), written.join());
                result?;
                Ok((read.map_err(panicked)??, written.map_err(panicked)??))
            })?;
            measured.push([read, written]);
        }
        let at = |times: &[Duration], percent: usize| {
            let time = times.get(times.len().saturating_sub(1) * percent / 100);
            time.copied().unwrap_or_default().as_secs_f64() * 1e3
        };
        let rows = ["read", "write"]
            .iter()
            .enumerate()
            .flat_map(|(who, name)| {
                ["nothing", "a busy process", "gc"]
                    .iter()
                    .zip(&measured)
                    .map(move |(beside, measured)| {
                        let times = &measured[who];
                        let mut row =
                            vec![format!("{name}, beside {beside}"), times.len().to_string()];
                        row.extend(
                            [50, 99, 100].map(|percent| format!("{:.2}", at(times, percent))),
                        );
                        row
                    })
            });
        let head = ["ms", "times", "median", "99 of 100", "longest"];
        support::table(&head, &rows.collect::<Vec<_>>());
        if let [_, busy, gc] = &measured[..] {
            for (who, name) in ["reader", "writer"].iter().enumerate() {
                let more = at(&gc[who], 99) - at(&busy[who], 99);
                let what = format!("a {name} held up by collections");
                bounds.at_most(&what, more, HELD_UP_MS, " ms");
            }
        }
        Ok(())
    }

    /// Collections with nothing to take, and after all workers of a kind were removed.
    fn collect(&self, interrupt: &Interrupt, bounds: &mut Bounds) -> Result<()> {
        let gc = || timed(&mut alone("gc", [&self.dir, Path::new("")])?);
        let (mut nothing, mut kind, mut trash) = <(Samples, Samples, Samples)>::default();
        for removed in 1..KINDS {
            interrupt.check()?;
            nothing.0.push(gc()?);
            for worker in (0..WORKERS).filter(|worker| worker % KINDS == removed) {
                let name = format!("worker-{worker}");
                self.store
                    .remove_ref(RefKind::Worker, &name)
                    .map_err(|error| said(&name, &error))?;
            }
            kind.0.push(gc()?);
            trash.0.push(gc()?);
        }
        let row = |what: &str, samples: &Samples| vec![what.to_owned(), samples.show()];
        let rows = [
            row("nothing to take", &nothing),
            row("a kind and its four workers", &kind),
            row("what that left in the trash", &trash),
        ];
        let head = [
            &format!("gc of {WORKERS} workers' layers"),
            "ms, median (min–max)",
        ];
        support::table(&head, &rows);
        for (what, samples) in [
            ("nothing", &nothing),
            ("a kind", &kind),
            ("the trash", &trash),
        ] {
            bounds.at_most(&format!("gc of {what}"), samples.median(), GC_MS, " ms");
        }
        Ok(())
    }
}

/// Pins a layer, opens it and reads some of its files.
fn read_some(store: &Store, layer: &LayerId, number: usize) -> std::result::Result<(), StoreError> {
    let lease = store.lease("reader")?;
    lease.pin(&[*layer])?;
    let layer = store.layer(layer)?;
    let objects: Vec<ObjectId> = layer
        .objects()
        .skip(number * READS % 5000)
        .take(READS)
        .collect();
    for object in objects {
        let blob = store.object(&object)?;
        blob.read_all(u64::MAX).map_err(StoreError::Input)?;
    }
    Ok(())
}

/// Stores a layer of one new file, that nothing needs.
fn write_one(store: &Store, beside: &str, number: usize) -> std::result::Result<(), StoreError> {
    let lease = store.lease("writer")?;
    let ingest = store.ingest(&lease)?;
    let added = ingest.add_bytes(format!("{beside} {number}").as_bytes())?;
    let mut tree = Tree::default();
    let file = Leaf {
        meta: Meta::default(),
        content: Content::File {
            object: added.object,
            size: added.size,
        },
        link: None,
    };
    tree.entries.insert((*b"file").into(), Node::Leaf(file));
    ingest.finish(&tree)?;
    Ok(())
}

/// Whether a part was asked for with `--only`, or all were.
fn wanted(part: &str) -> bool {
    let mut args = std::env::args().skip_while(|arg| arg != "--only").skip(1);
    args.next().is_none_or(|only| only == part)
}

fn bench() -> Result<bool> {
    let interrupt = Interrupt::catch()?;
    let cache = corpus::cache()?;
    let corpus = packages::node_modules()?;
    let scratch = TempDir::with_prefix_in("scratch-", &cache)
        .map_err(failed("making a directory in", &cache))?;
    // A copy that can be edited.
    let tree = scratch.path().join("tree");
    run(Command::new("cp").arg("-a").arg(&corpus).arg(&tree))?;
    let mut bounds = Bounds::default();
    support::print_machine();
    if wanted("ingests") {
        ingests(&tree, scratch.path(), &interrupt, &mut bounds)?;
    }
    if wanted("workers") {
        let workers = Workers::make(&tree, scratch.path(), &interrupt)?;
        workers.disk(&mut bounds)?;
        workers.held_up(&interrupt, &mut bounds)?;
        workers.collect(&interrupt, &mut bounds)?;
    }
    if wanted("memory") {
        memory(&tree, scratch.path(), &interrupt, &mut bounds)?;
    }
    Ok(bounds.print())
}

fn main() -> ExitCode {
    let mut args = std::env::args_os();
    if args.nth(1).is_some_and(|arg| arg == ALONE) {
        return support::end("store", work(args));
    }
    support::end("store", bench())
}
