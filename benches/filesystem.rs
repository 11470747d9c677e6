//! The overlay over FUSE beside kernel overlayfs and fuse-overlayfs, on one `node_modules`; see
//! benches/README.md.

mod corpus;
#[path = "corpus/packages.rs"]
mod packages;
#[allow(dead_code, reason = "each bench uses its part")]
mod support;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use support::{Bounds, Error, Interrupt, Result, Samples, failed, run, skip, went_wrong};
use tempfile::TempDir;

/// Set in the process that has mounts and processes of its own, which end with it.
const INSIDE: &str = "III_BENCH_INSIDE";
/// Files that are made, and files that are deleted.
const CHURN: usize = 2000;
/// Directories, already there, in which files are made.
const CHURN_DIRS: usize = 200;
/// Files that are appended to.
const COPY_UPS: usize = 500;
/// Longest wait for a filesystem to be mounted, which for ours includes taking in the lower
/// directory.
const MOUNT_LIMIT: Duration = Duration::from_secs(120);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Ours,
    Overlayfs,
    FuseOverlayfs,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Ours => "ours",
            Kind::Overlayfs => "overlayfs",
            Kind::FuseOverlayfs => "fuse-overlayfs",
        }
    }
}

/// A mounted filesystem with its upper. Dropped, it is unmounted. Its files stay till the
/// end: ext4 takes long to make files shortly after it has removed many.
struct Mount {
    point: PathBuf,
    server: Option<Child>,
}

impl Mount {
    fn new(kind: Kind, lower: &Path, scratch: &Path) -> Result<Self> {
        let scratch = TempDir::with_prefix_in("mount-", scratch)
            .map_err(failed("making a directory in", scratch))?
            .keep();
        let dir = |name: &str| {
            let path = scratch.join(name);
            fs::create_dir(&path).map_err(failed("making", &path))?;
            Ok(path)
        };
        let (point, upper) = (dir("merged")?, dir("upper")?);
        let layers = |work: &Path| {
            format!(
                "lowerdir={},upperdir={},workdir={}",
                lower.display(),
                upper.display(),
                work.display()
            )
        };
        let mut command;
        let mut mount = Mount {
            point: point.clone(),
            server: None,
        };
        match kind {
            Kind::Overlayfs => {
                let work = mount.point.with_file_name("work");
                fs::create_dir(&work).map_err(failed("making", &work))?;
                command = Command::new("mount");
                command
                    .args(["-t", "overlay", "overlay", "-o", &layers(&work)])
                    .arg(&point);
                run(&mut command)?;
                return Ok(mount);
            }
            Kind::FuseOverlayfs => {
                let work = mount.point.with_file_name("work");
                fs::create_dir(&work).map_err(failed("making", &work))?;
                command = Command::new("fuse-overlayfs");
                command.args(["-f", "-o", &layers(&work)]).arg(&point);
            }
            Kind::Ours => {
                command = Command::new(example());
                command.arg("--upper").arg(&upper).arg(&point).arg(lower);
                command.env("TMPDIR", &scratch);
            }
        }
        let log = scratch.join("log");
        let stderr = fs::File::create(&log).map_err(failed("making", &log))?;
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr);
        let server = command
            .spawn()
            .map_err(|error| went_wrong(&command, &error))?;
        let server = mount.server.insert(server);
        let begin = Instant::now();
        while !is_mounted(&point) {
            if let Ok(Some(status)) = server.try_wait() {
                let said = fs::read_to_string(&log).unwrap_or_default();
                return Err(went_wrong(&command, &format!("{status}: {}", said.trim())));
            }
            if begin.elapsed() > MOUNT_LIMIT {
                return Err(went_wrong(&command, &"did not mount in time"));
            }
            thread::sleep(Duration::from_millis(5));
        }
        // Dirty pages of the preparation must not be written back during a measurement.
        rustix::fs::sync();
        Ok(mount)
    }

    /// How many reads the server has done, of requests or of data.
    fn reads(&self) -> Option<u64> {
        let io = fs::read_to_string(format!("/proc/{}/io", self.server.as_ref()?.id())).ok()?;
        io.lines()
            .find_map(|line| line.strip_prefix("syscr: "))?
            .parse()
            .ok()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if is_mounted(&self.point) {
            let _ = rustix::mount::unmount(&self.point, rustix::mount::UnmountFlags::DETACH);
        }
        if let Some(server) = &mut self.server {
            let begin = Instant::now();
            while matches!(server.try_wait(), Ok(None)) {
                if begin.elapsed() > Duration::from_secs(10) {
                    let _ = server.kill();
                }
                thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

/// Whether a program can be found.
fn installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

fn is_mounted(point: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mounts
        .lines()
        .any(|line| line.split(' ').nth(4) == point.to_str())
}

/// The overlay's server, which stands beside the binary that this bench was built with.
fn example() -> PathBuf {
    Path::new(env!("CARGO_BIN_EXE_iii"))
        .with_file_name("examples")
        .join("mount")
}

/// Lists every directory and stats every entry. Returns the number of entries.
fn walk(root: &Path) -> Result<usize> {
    let mut entries = 0;
    let mut pending = vec![root.to_owned()];
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(&dir).map_err(failed("listing", &dir))? {
            let entry = entry.map_err(failed("listing", &dir))?;
            let meta = entry.metadata().map_err(failed("looking into", &dir))?;
            entries += 1;
            if meta.is_dir() {
                pending.push(entry.path());
            }
        }
    }
    Ok(entries)
}

/// The regular files and the directories below `root`, relative to it and sorted, so that all are
/// asked the same.
fn list(root: &Path) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    let (mut files, mut dirs) = (Vec::new(), vec![PathBuf::new()]);
    let mut next = 0;
    while let Some(dir) = dirs.get(next).cloned() {
        let path = root.join(&dir);
        for entry in fs::read_dir(&path).map_err(failed("listing", &path))? {
            let entry = entry.map_err(failed("listing", &path))?;
            let kind = entry.file_type().map_err(failed("looking into", &path))?;
            if kind.is_dir() {
                dirs.push(dir.join(entry.file_name()));
            } else if kind.is_file() {
                files.push(dir.join(entry.file_name()));
            }
        }
        next += 1;
    }
    files.sort();
    dirs.sort();
    Ok((files, dirs))
}

/// `count` of `paths`, evenly spread.
fn spread(paths: &[PathBuf], count: usize) -> impl Iterator<Item = &PathBuf> {
    paths
        .iter()
        .step_by((paths.len() / count).max(1))
        .take(count)
}

fn read_all(root: &Path, files: &[PathBuf]) -> Result<u64> {
    let mut buf = vec![0; 1 << 17];
    let mut bytes = 0;
    for file in files {
        let path = root.join(file);
        let mut file = fs::File::open(&path).map_err(failed("opening", &path))?;
        loop {
            match file.read(&mut buf).map_err(failed("reading", &path))? {
                0 => break,
                count => bytes += count as u64,
            }
        }
    }
    Ok(bytes)
}

fn create(root: &Path, dirs: &[PathBuf]) -> Result<()> {
    let contents = [b'x'; 1024];
    for dir in spread(dirs, CHURN_DIRS) {
        for number in 0..CHURN / CHURN_DIRS {
            let path = root.join(dir).join(format!("made-{number}.js"));
            fs::write(&path, contents).map_err(failed("writing", &path))?;
        }
    }
    Ok(())
}

fn delete(root: &Path, files: &[PathBuf]) -> Result<()> {
    for file in spread(files, CHURN) {
        let path = root.join(file);
        fs::remove_file(&path).map_err(failed("deleting", &path))?;
    }
    Ok(())
}

fn append(root: &Path, files: &[PathBuf]) -> Result<()> {
    for file in spread(&files[1..], COPY_UPS) {
        let path = root.join(file);
        let open = fs::OpenOptions::new().append(true).open(&path);
        open.and_then(|mut file| file.write_all(b"\n"))
            .map_err(failed("appending to", &path))?;
    }
    Ok(())
}

/// The measurements of each filesystem, in their order on a fresh mount.
#[derive(Debug, Clone, Copy)]
enum Phase {
    Walk1,
    Walk2,
    Walk3,
    Read1,
    Read2,
    Append,
    Create,
    Delete,
    Require1,
    Require2,
    Require3,
}

/// The phases' names, by phase.
const PHASES: [&str; 11] = [
    "stat walk, 1st",
    "stat walk, 2nd",
    "stat walk, 3rd",
    "read all, 1st",
    "read all, 2nd",
    "append to 500",
    "create 2,000",
    "delete 2,000",
    "require, 1st",
    "require, 2nd",
    "require, 3rd",
];

/// A filesystem's samples by phase, and for ours the server's reads.
struct Measured {
    kind: Kind,
    samples: [Samples; PHASES.len()],
    reads: [Vec<u64>; PHASES.len()],
}

impl Measured {
    fn note(
        &mut self,
        phase: Phase,
        mount: &Mount,
        what: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let before = mount.reads();
        let begin = Instant::now();
        what()?;
        self.samples[phase as usize].0.push(begin.elapsed());
        if let (Some(before), Some(after)) = (before, mount.reads()) {
            self.reads[phase as usize].push(after - before);
        }
        Ok(())
    }

    fn files(&mut self, mount: &Mount, files: &[PathBuf], dirs: &[PathBuf]) -> Result<()> {
        let root = &mount.point;
        for phase in [Phase::Walk1, Phase::Walk2, Phase::Walk3] {
            self.note(phase, mount, || walk(root).map(drop))?;
        }
        for phase in [Phase::Read1, Phase::Read2] {
            self.note(phase, mount, || read_all(root, files).map(drop))?;
        }
        self.note(Phase::Append, mount, || append(root, files))?;
        self.note(Phase::Create, mount, || create(root, dirs))?;
        self.note(Phase::Delete, mount, || delete(root, files))
    }

    fn require(&mut self, mount: &Mount) -> Result<()> {
        for phase in [Phase::Require1, Phase::Require2, Phase::Require3] {
            self.note(phase, mount, || {
                let mut node = Command::new("node");
                run(node.arg(mount.point.join("require.js")).arg(&mount.point)).map(drop)
            })?;
        }
        Ok(())
    }
}

fn compare(
    rounds: usize,
    requires: usize,
    scratch: &Path,
    interrupt: &Interrupt,
    bounds: &mut Bounds,
) -> Result<()> {
    let lower = packages::node_modules()?;
    let (files, dirs) = list(&lower)?;
    let bytes = read_all(&lower, &files)?;
    println!(
        "node_modules: {} files, {} directories, {} MB",
        files.len(),
        dirs.len(),
        bytes / 1_000_000
    );

    let mut kinds = vec![Kind::Ours, Kind::Overlayfs];
    if installed("fuse-overlayfs") {
        kinds.push(Kind::FuseOverlayfs);
    } else {
        skip(
            "fuse-overlayfs",
            "not installed (apt-get install fuse-overlayfs)",
        );
    }
    let mut all: Vec<_> = kinds
        .iter()
        .map(|&kind| Measured {
            kind,
            samples: Default::default(),
            reads: Default::default(),
        })
        .collect();
    for round in 0..rounds {
        for measured in &mut all {
            interrupt.check()?;
            eprintln!("round {} of {rounds}: {}", round + 1, measured.kind.name());
            let mount = Mount::new(measured.kind, &lower, scratch)?;
            measured.files(&mount, &files, &dirs)?;
        }
    }
    if installed("node") {
        for round in 0..requires {
            for measured in &mut all {
                interrupt.check()?;
                eprintln!(
                    "require, round {} of {requires}: {}",
                    round + 1,
                    measured.kind.name()
                );
                let mount = Mount::new(measured.kind, &lower, scratch)?;
                measured.require(&mount)?;
            }
        }
    } else {
        skip("require of everything", "node is not installed");
    }
    print_comparison(&all);
    judge(&all, dirs.len(), bounds);
    Ok(())
}

fn print_comparison(all: &[Measured]) {
    let mut head = vec![String::from("ms, median (min–max)")];
    head.extend(all.iter().map(|measured| measured.kind.name().to_owned()));
    head.extend(
        all[1..]
            .iter()
            .map(|peer| format!("ours / {}", peer.kind.name())),
    );
    head.push("reads by our server".into());
    let head: Vec<_> = head.iter().map(String::as_str).collect();
    let mut rows = Vec::new();
    for (phase, what) in PHASES.iter().enumerate() {
        let ours = &all[0].samples[phase];
        if ours.0.is_empty() {
            continue;
        }
        let mut row = vec![(*what).to_owned()];
        row.extend(all.iter().map(|measured| measured.samples[phase].show()));
        row.extend(
            all[1..]
                .iter()
                .map(|peer| ours.show_ratio(&peer.samples[phase])),
        );
        row.push(
            all[0].reads[phase]
                .iter()
                .max()
                .map_or(String::new(), u64::to_string),
        );
        rows.push(row);
    }
    support::table(&head, &rows);
}

fn judge(all: &[Measured], dirs: usize, bounds: &mut Bounds) {
    const RATIOS: [(Phase, Kind, f64); 7] = [
        (Phase::Walk1, Kind::Overlayfs, 1.5),
        (Phase::Walk2, Kind::Overlayfs, 1.5),
        (Phase::Walk3, Kind::Overlayfs, 1.5),
        (Phase::Read1, Kind::Overlayfs, 1.3),
        (Phase::Read2, Kind::Overlayfs, 1.3),
        (Phase::Create, Kind::FuseOverlayfs, 1.0),
        (Phase::Delete, Kind::FuseOverlayfs, 1.0),
    ];
    let ours = &all[0];
    for (phase, kind, bound) in RATIOS {
        if let Some(peer) = all.iter().find(|measured| measured.kind == kind) {
            let phase = phase as usize;
            let (ratio, ..) = ours.samples[phase].ratio(&peer.samples[phase]);
            bounds.at_most(
                &format!("{}, to {}", PHASES[phase], kind.name()),
                ratio,
                bound,
                " times",
            );
        }
    }
    // The kernel drops the atime of what it has listed or read, and asks for it once more when it
    // is next looked at.
    let reads = [
        (Phase::Walk2, dirs as u64),
        (Phase::Walk3, 0),
        (Phase::Read2, 0),
        (Phase::Require3, 0),
    ];
    for (phase, bound) in reads {
        if let Some(&reads) = ours.reads[phase as usize].iter().max() {
            let what = format!("{}, requests", PHASES[phase as usize]);
            bounds.count(&what, reads, bound);
        }
    }
}

/// Builds and makes what is needed, then runs this program again with mounts and processes of its
/// own.
fn prepare() -> Result<std::convert::Infallible> {
    if !rustix::process::geteuid().is_root() {
        return Err(Error::Command {
            what: "filesystem".into(),
            why: "mounting overlayfs needs root".into(),
        });
    }
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args([
        "build",
        "--release",
        "--quiet",
        "-p",
        "iii-overlay",
        "--example",
        "mount",
    ]);
    run(cargo.current_dir(corpus::repository("")))?;
    packages::node_modules()?;
    let exe = std::env::current_exe().map_err(failed("finding", Path::new("this program")))?;
    let mut inside = Command::new("unshare");
    inside.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]);
    inside
        .arg(exe)
        .args(std::env::args().skip(1))
        .env(INSIDE, "1");
    let error = inside.exec();
    Err(went_wrong(&inside, &error))
}

fn bench() -> Result<bool> {
    let interrupt = Interrupt::catch()?;
    let cache = corpus::cache()?;
    let scratch = TempDir::with_prefix_in("scratch-", &cache)
        .map_err(failed("making a directory in", &cache))?;
    let mut bounds = Bounds::default();
    support::print_machine();
    let rounds = support::option("--rounds", 5);
    compare(
        rounds,
        support::option("--requires", 3),
        scratch.path(),
        &interrupt,
        &mut bounds,
    )?;
    Ok(bounds.print())
}

fn main() -> ExitCode {
    let result = if std::env::var_os(INSIDE).is_some() {
        bench()
    } else {
        prepare().map(|never| match never {})
    };
    support::end("filesystem", result)
}
