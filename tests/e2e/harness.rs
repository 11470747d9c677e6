//! Runs the `iii` binary in a home of its own and checks for remains.

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use serde::Deserialize;
use tempfile::TempDir;

use crate::engine::holds_within;

/// The image name under which the busybox base is imported: the default of a Node
/// project.
pub const NODE_IMAGE: &str = "docker.io/iiidev/node:latest";

/// Long enough for anything that a busybox project does, even where other tests share two cores.
pub const LIMIT: Duration = Duration::from_secs(60);

/// How long remains of an ended run may still be seen.
const SETTLE: Duration = Duration::from_secs(5);

/// Says on stderr, past the capture of the test harness, that something was not tested.
pub fn skip(what: &str, why: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED: {what}: {why}");
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Where bases are kept between runs.
pub fn cache() -> PathBuf {
    let dir = std::env::var_os("III_TEST_CACHE")
        .map_or_else(|| PathBuf::from(env!("CARGO_TARGET_TMPDIR")), PathBuf::from);
    fs::create_dir_all(&dir).unwrap();
    dir
}

pub fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The program under the name that the engine calls: a link, put in place whole for the tests that
/// run at once.
pub fn iii_worker() -> &'static Path {
    static LINK: OnceLock<PathBuf> = OnceLock::new();
    LINK.get_or_init(|| {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let own = TempDir::new_in(dir).unwrap();
        let new = own.path().join("new");
        symlink(env!("CARGO_BIN_EXE_iii"), &new).unwrap();
        let link = dir.join("iii-worker");
        fs::rename(new, &link).unwrap();
        link
    })
}

/// The tar of a real base image, made from Debian packages; says why where that cannot be done.
pub fn debian_base(kind: &str) -> Result<PathBuf, String> {
    let out = cache().join("bases");
    let run = Command::new(repository("scripts/make-base"))
        .arg(kind)
        .arg(&out)
        .output()
        .map_err(|error| error.to_string())?;
    if run.status.success() {
        return Ok(out.join(format!("{kind}.tar")));
    }
    let stderr = String::from_utf8_lossy(&run.stderr);
    Err(stderr.lines().last().unwrap_or("failed").to_owned())
}

/// A root filesystem with busybox in it.
pub fn busybox_base() -> &'static Path {
    static DIR: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let (_, root) = DIR.get_or_init(|| {
        let dir = TempDir::new().unwrap();
        let root = dir.path().join("busybox");
        let status = Command::new(repository("scripts/make-busybox-base"))
            .arg(&root)
            .status()
            .unwrap();
        assert!(status.success(), "scripts/make-busybox-base failed");
        (dir, root)
    });
    root
}

/// Makes a program (`-static`) or a library (`-shared`) of C.
pub fn gcc(kind: &str, source: &str, to: &Path) {
    let mut gcc = Command::new("gcc");
    gcc.args([kind, "-fPIC", "-x", "c", "-o"]).arg(to).arg("-");
    let mut gcc = gcc.stdin(Stdio::piped()).spawn().expect("gcc is installed");
    let mut stdin = gcc.stdin.take().unwrap();
    stdin.write_all(source.as_bytes()).unwrap();
    drop(stdin);
    assert!(gcc.wait().unwrap().success());
}

/// A project directory under test.
pub struct Project {
    dir: TempDir,
}

impl Project {
    /// A project for the busybox base with a manifest of these scripts.
    pub fn scripts(setup: &str, install: &str, start: &str) -> Self {
        let project = Project {
            dir: TempDir::with_prefix("project-").unwrap(),
        };
        project.write(
            "iii.worker.yaml",
            &format!(
                "name: box\nruntime:\n  kind: javascript\nscripts:\n  setup: {}\n  install: {}\n  start: {}\n",
                yaml(setup),
                yaml(install),
                yaml(start)
            ),
        );
        project
    }

    pub fn empty() -> Self {
        Project {
            dir: TempDir::with_prefix("project-").unwrap(),
        }
    }

    /// A copy of the files of `from`, which has no symlinks.
    pub fn copy(from: &Path) -> Self {
        let project = Project::empty();
        copy_files(from, project.path());
        project
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    pub fn arg(&self) -> &str {
        self.path().to_str().unwrap()
    }

    /// Writes a file, in one step: on a busy machine, who follows the project would see one that is
    /// empty yet.
    pub fn write(&self, name: &str, text: &str) {
        let path = self.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let mode = fs::metadata(&path).map_or(0o644, |file| file.permissions().mode() & 0o7777);
        let file = tempfile::Builder::new()
            .permissions(Permissions::from_mode(mode))
            .tempfile()
            .unwrap();
        fs::write(file.path(), text).unwrap();
        file.persist(path).unwrap();
    }

    /// Replaces `old`, which must be there, in the file `name`.
    pub fn edit(&self, name: &str, old: &str, new: &str) {
        let path = self.path().join(name);
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(old), "{name} has no {old:?}");
        self.write(name, &text.replace(old, new));
    }

    pub fn remove(&self, name: &str) {
        fs::remove_file(self.path().join(name)).unwrap();
    }
}

fn yaml(text: &str) -> String {
    // JSON's strings are YAML's.
    serde_json::to_string(text).unwrap()
}

fn copy_files(from: &Path, to: &Path) {
    const BUILT: [&str; 4] = ["node_modules", "target", ".venv", "__pycache__"];
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name();
        if entry.file_type().unwrap().is_file() {
            fs::copy(entry.path(), to.join(name)).unwrap();
        } else if !BUILT.iter().any(|built| name == OsStr::new(built)) {
            copy_files(&entry.path(), &to.join(name));
        }
    }
}

/// A home directory, and with it a store, sandboxes and caches, that one test has for itself.
pub struct Home {
    dir: TempDir,
    /// The command that runs the binary: the program itself, or a wrapper with arguments before it.
    program: Vec<PathBuf>,
    /// Whether a build may clear the store, which depends on how full the disk is.
    clears: bool,
}

impl Home {
    pub fn new() -> Self {
        Home {
            dir: TempDir::with_prefix("home-").unwrap(),
            program: vec![PathBuf::from(env!("CARGO_BIN_EXE_iii"))],
            clears: false,
        }
    }

    /// A home whose runs go through `program`, which ends with the binary itself.
    pub fn through(dir: TempDir, program: Vec<PathBuf>) -> Self {
        Home {
            dir,
            program,
            clears: false,
        }
    }

    /// A home whose builds clear the store when the disk is too full.
    pub fn that_clears() -> Self {
        let mut home = Home::new();
        home.clears = true;
        home
    }

    /// A home whose Node base is busybox.
    pub fn with_busybox() -> Self {
        let home = Home::new();
        home.import(busybox_base(), NODE_IMAGE);
        home
    }

    pub fn import_busybox(&self) {
        self.import(busybox_base(), NODE_IMAGE);
    }

    pub fn import(&self, from: &Path, image: &str) {
        self.run(&["image", "import", from.to_str().unwrap(), "--as", image])
            .ok();
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The tool's state.
    pub fn state(&self) -> PathBuf {
        self.path().join(".iii")
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.program[0]);
        command.args(&self.program[1..]).args(args);
        for (name, _) in std::env::vars_os() {
            let text = name.to_string_lossy();
            if text.starts_with("III_") || text.starts_with("XDG_") {
                command.env_remove(&name);
            }
        }
        if !self.clears {
            command.env("III_GC", "off");
        }
        command
            // Where microVMs run, too; the tests of those say so.
            .env("III_RUNTIME", "namespace")
            .env("HOME", self.path())
            .env("NO_COLOR", "1")
            .current_dir(self.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        command
    }

    /// Starts `iii` with `args` and lets it run.
    pub fn start(&self, args: &[&str]) -> Running<'_> {
        let mut child = self.command(args).spawn().unwrap();
        let (sender, lines) = channel();
        let stdout = child.stdout.take().unwrap();
        let stderr = child.stderr.take().unwrap();
        let errors = sender.clone();
        let forward = |stream: Stream, line: Vec<u8>| {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            (stream, text)
        };
        thread::spawn(move || {
            for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
                if sender.send(forward(Stream::Out, line)).is_err() {
                    break;
                }
            }
        });
        thread::spawn(move || {
            for line in BufReader::new(stderr).split(b'\n').map_while(Result::ok) {
                if errors.send(forward(Stream::Err, line)).is_err() {
                    break;
                }
            }
        });
        Running {
            home: self,
            what: args.join(" "),
            child,
            lines,
            seen: Vec::new(),
            family: Vec::new(),
        }
    }

    /// Runs `iii` with `args` to its end, which has to come within [`LIMIT`], and checks that
    /// nothing is left of it.
    pub fn run(&self, args: &[&str]) -> Ended {
        self.run_within(args, LIMIT)
    }

    pub fn run_within(&self, args: &[&str], limit: Duration) -> Ended {
        let ended = self.start(args).finish(limit);
        self.assert_nothing_left();
        ended
    }

    /// `iii worker dev` of `project` with no engine behind it.
    pub fn dev(&self, project: &Project, options: &[&str]) -> Running<'_> {
        let port = crate::engine::free_port().to_string();
        let mut args = vec!["worker", "dev", project.arg(), "--port", &port];
        args.extend(options);
        self.start(&args)
    }

    /// `iii worker build --json` of `project`, which has to succeed.
    pub fn build(&self, project: &Project, options: &[&str]) -> Layers {
        self.build_within(project, options, LIMIT)
    }

    pub fn build_within(&self, project: &Project, options: &[&str], limit: Duration) -> Layers {
        let mut args = vec!["worker", "build", project.arg(), "--json"];
        args.extend(options);
        let ended = self.run_within(&args, limit).ok();
        Layers::parse(&ended)
    }

    /// Processes, mounts and held leases that name this home, each in words; but for the families
    /// of `workers`, and a lease of each.
    fn remains(&self, workers: &[i32]) -> Vec<String> {
        let home = self.path().to_string_lossy();
        let mut remains = Vec::new();
        let families: Vec<Process> = workers.iter().flat_map(|pid| family(*pid)).collect();
        let strays = processes().into_iter();
        for process in strays.filter(|process| !families.contains(process)) {
            let read = |file| fs::read(format!("/proc/{}/{file}", process.pid)).unwrap_or_default();
            let names_home = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).contains(&*home);
            if names_home(read("cmdline")) || names_home(read("environ")) {
                let command = String::from_utf8_lossy(&read("cmdline")).replace('\0', " ");
                remains.push(format!("process {}: {command}", process.pid));
            }
        }
        remains.extend(self.mounts().iter().map(|path| format!("mount {path}")));
        let mut leases = files(&self.state().join("store"));
        leases.retain(|lease| {
            let is_lease = lease.parent().is_some_and(|dir| dir.ends_with("leases"));
            let is_held =
                |file: File| flock(&file, FlockOperation::NonBlockingLockExclusive).is_err();
            is_lease && File::open(lease).is_ok_and(is_held)
        });
        if leases.len() != workers.len() {
            remains.extend(
                leases
                    .iter()
                    .map(|lease| format!("lease {}", lease.display())),
            );
        }
        remains
    }

    /// Mount points below this home.
    pub fn mounts(&self) -> Vec<String> {
        let home = self.path().to_string_lossy();
        let mounts = fs::read("/proc/self/mountinfo").unwrap();
        let mounts = String::from_utf8_lossy(&mounts);
        let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
        points
            .filter(|point| point.starts_with(&*home) && !point.ends_with("/.iii"))
            .map(str::to_owned)
            .collect()
    }

    pub fn assert_nothing_left(&self) {
        self.assert_only(&[]);
    }

    /// Nothing is left but the needs of the supervisors `workers`.
    pub fn assert_only(&self, workers: &[i32]) {
        let mut remains = Vec::new();
        let clean = holds_within(SETTLE, || {
            remains = self.remains(workers);
            remains.is_empty()
        });
        assert!(clean, "left behind: {remains:#?}");
    }
}

impl Drop for Home {
    /// So that a failed test does not remove the home through a mount.
    fn drop(&mut self) {
        let home = self.path().to_string_lossy();
        let mounts = fs::read("/proc/self/mountinfo").unwrap_or_default();
        let mounts = String::from_utf8_lossy(&mounts);
        let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
        for point in points.filter(|point| point.starts_with(&*home)) {
            let _ = unmount(point, UnmountFlags::DETACH);
        }
    }
}

/// All regular files below `dir`.
pub fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut todo = vec![dir.to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => todo.push(entry.path()),
                Ok(kind) if kind.is_file() => found.push(entry.path()),
                _ => {}
            }
        }
    }
    found
}

/// A process by its number and the time of its start, which together are never used again.
#[derive(Clone, PartialEq, Eq)]
struct Process {
    pid: i32,
    started: String,
    parent: i32,
}

/// Every process but zombies.
fn processes() -> Vec<Process> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter_map(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name before the last parenthesis may hold anything.
        let mut fields = stat.rsplit_once(") ")?.1.split(' ');
        if fields.next()? == "Z" {
            return None;
        }
        let parent = fields.next()?.parse().ok()?;
        let started = fields.nth(17)?.to_owned();
        Some(Process {
            pid,
            started,
            parent,
        })
    })
    .collect()
}

/// `pid` and its descendants.
fn family(pid: i32) -> Vec<Process> {
    let all = processes();
    let mut family: Vec<Process> = all.iter().filter(|p| p.pid == pid).cloned().collect();
    let mut next = 0;
    while let Some(parent) = family.get(next).map(|process| process.pid) {
        family.extend(all.iter().filter(|p| p.parent == parent).cloned());
        next += 1;
    }
    family
}

/// Where a line came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    Out,
    Err,
}

/// A run that has not ended. Dropped, it is killed.
pub struct Running<'a> {
    home: &'a Home,
    what: String,
    child: Child,
    lines: Receiver<(Stream, String)>,
    seen: Vec<(Stream, String)>,
    /// Processes of the run seen so far; none may outlive it.
    family: Vec<Process>,
}

impl Running<'_> {
    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// Blocks until a line with `needle` in it comes, and returns that line.
    pub fn wait_for(&mut self, needle: &str) -> String {
        self.wait_within(needle, LIMIT)
    }

    pub fn wait_within(&mut self, needle: &str, limit: Duration) -> String {
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok((stream, line)) => {
                    self.seen.push((stream, line.clone()));
                    if line.contains(needle) {
                        self.remember_family();
                        return line;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {
                    panic!(
                        "`{}` never said {needle:?}\n{}",
                        self.what,
                        self.transcript()
                    )
                }
                Err(RecvTimeoutError::Disconnected) => panic!(
                    "`{}` ended without saying {needle:?}\n{}",
                    self.what,
                    self.transcript()
                ),
            }
        }
    }

    /// Blocks until lines with each of `needles` in them have come, in whatever order: the two
    /// streams have none.
    pub fn wait_for_each(&mut self, needles: &[&str]) {
        let mut missing = needles.to_vec();
        while let Some(first) = missing.first().copied() {
            let line = if missing.len() == 1 {
                self.wait_for(first)
            } else {
                self.wait_for("")
            };
            missing.retain(|needle| !line.contains(needle));
        }
    }

    pub fn says_so_far(&self) -> impl Iterator<Item = &str> {
        self.seen.iter().map(|(_, line)| line.as_str())
    }

    fn remember_family(&mut self) {
        for process in family(self.pid()) {
            if !self.family.contains(&process) {
                self.family.push(process);
            }
        }
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Sends `signal` to the tool alone.
    pub fn signal(&mut self, signal: Signal) {
        self.remember_family();
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Sends SIGINT to the tool's whole process group, as a terminal does on Ctrl-C.
    pub fn ctrl_c(&mut self) {
        self.remember_family();
        kill_process_group(Pid::from_child(&self.child), Signal::INT).unwrap();
    }

    /// Ctrl-C, then a clean end: exit code 0 and nothing left.
    pub fn stop(mut self) -> Ended {
        let home = self.home;
        self.ctrl_c();
        let ended = self.finish(LIMIT).ok();
        home.assert_nothing_left();
        ended
    }

    /// Blocks until the tool has ended and every process of its run with it.
    pub fn finish(mut self, limit: Duration) -> Ended {
        let deadline = Instant::now() + limit;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > deadline {
                let transcript = self.drain();
                panic!("`{}` did not end within {limit:?}\n{transcript}", self.what);
            }
            // Reading on keeps the pipes from filling up.
            if let Ok(line) = self.lines.recv_timeout(Duration::from_millis(10)) {
                self.seen.push(line);
            }
        };
        let mut outliving = Vec::new();
        let gone = holds_within(SETTLE, || {
            let alive = processes();
            outliving = self
                .family
                .iter()
                .filter(|process| {
                    alive
                        .iter()
                        .any(|p| p.pid == process.pid && p.started == process.started)
                })
                .map(|process| process.pid)
                .collect();
            outliving.is_empty()
        });
        let transcript = self.drain();
        assert!(
            gone,
            "`{}` left processes {outliving:?}\n{transcript}",
            self.what
        );
        let text = |wanted| {
            let lines = self.seen.iter().filter(|(stream, _)| *stream == wanted);
            lines.fold(String::new(), |text, (_, line)| text + line + "\n")
        };
        Ended {
            what: self.what.clone(),
            status,
            stdout: text(Stream::Out),
            stderr: text(Stream::Err),
            transcript,
        }
    }

    /// Everything said until the pipes closed, or until now where something still holds them open.
    fn drain(&mut self) -> String {
        while let Ok(line) = self.lines.recv_timeout(SETTLE) {
            self.seen.push(line);
        }
        self.transcript()
    }

    fn transcript(&self) -> String {
        let mark = |stream| if stream == Stream::Out { "1" } else { "2" };
        self.seen
            .iter()
            .fold(String::new(), |text, (stream, line)| {
                format!("{text}{}| {line}\n", mark(*stream))
            })
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// A run that has ended.
pub struct Ended {
    what: String,
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
    transcript: String,
}

impl Ended {
    /// It has to have succeeded.
    #[track_caller]
    pub fn ok(self) -> Self {
        self.exits(0)
    }

    #[track_caller]
    pub fn exits(self, code: i32) -> Self {
        assert_eq!(
            self.status.code(),
            Some(code),
            "`{}` ended with {:?}, signal {:?}\n{}",
            self.what,
            self.status.code(),
            self.status.signal(),
            self.transcript
        );
        self
    }

    /// It has to have failed in an orderly way: a code of its own choosing, an `error:`, no panic.
    #[track_caller]
    pub fn fails(self) -> Self {
        let code = self.status.code();
        let orderly = code.is_some_and(|code| code != 0 && code != 101);
        assert!(
            orderly && self.stderr.contains("error:") && !self.stderr.contains("panicked"),
            "`{}` did not fail in an orderly way: {code:?}\n{}",
            self.what,
            self.transcript
        );
        self
    }

    /// All of `needles` have to be in what it said, whatever their case.
    #[track_caller]
    pub fn says(self, needles: &[&str]) -> Self {
        let said = self.transcript.to_lowercase();
        for needle in needles {
            assert!(
                said.contains(&needle.to_lowercase()),
                "`{}` did not say {needle:?}\n{}",
                self.what,
                self.transcript
            );
        }
        self
    }
}

/// One layer of `iii worker build --json`.
#[derive(Clone, Debug, Deserialize)]
pub struct Realised {
    pub kind: String,
    pub status: String,
    pub layer_id: String,
    pub tree_id: String,
    pub bytes: u64,
    pub files: u64,
    #[serde(default)]
    pub reason: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Layers {
    pub layers: Vec<Realised>,
}

impl Layers {
    pub fn parse(ended: &Ended) -> Self {
        let layers: Layers = serde_json::from_str(&ended.stdout).unwrap_or_else(|error| {
            panic!("stdout is not the JSON: {error}\n{}", ended.transcript)
        });
        for layer in layers.layers.iter().filter(|layer| layer.status == "hit") {
            assert_eq!(
                (layer.bytes, layer.files),
                (0, 0),
                "a hit adds nothing: {layer:#?}"
            );
        }
        layers
    }

    /// The kinds of the built layers, bottom first: `"project install"`, or `""` if all were
    /// cached.
    pub fn built(&self) -> String {
        let built = self.layers.iter().filter(|layer| layer.status != "hit");
        let kinds: Vec<_> = built.map(|layer| layer.kind.as_str()).collect();
        kinds.join(" ")
    }

    /// Which layers they are, bottom first.
    pub fn ids(&self) -> Vec<&str> {
        self.layers
            .iter()
            .map(|layer| layer.layer_id.as_str())
            .collect()
    }

    /// The outcomes of the layers above the base, bottom first: `"hit fetched built"`.
    pub fn statuses(&self) -> String {
        let layers = self.layers.iter().filter(|layer| layer.kind != "base");
        let statuses: Vec<_> = layers.map(|layer| layer.status.as_str()).collect();
        statuses.join(" ")
    }

    /// Bytes of file data that the build added to the store.
    pub fn bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.bytes).sum()
    }

    pub fn get(&self, kind: &str) -> &Realised {
        let found = self.layers.iter().find(|layer| layer.kind == kind);
        found.unwrap_or_else(|| panic!("no {kind} layer in {self:#?}"))
    }

    /// Why install ran.
    pub fn reason(&self) -> &str {
        self.get("install").reason.as_deref().unwrap_or_default()
    }
}
