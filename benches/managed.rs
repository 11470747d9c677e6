//! Managed workers with the finished program: adding many, starting one, and the cost of an
//! idle one; see benches/README.md.

#[allow(dead_code, reason = "each bench uses its part")]
mod corpus;
#[allow(dead_code, reason = "each bench uses its part")]
mod support;
#[path = "support/workers.rs"]
mod workers;

use std::fs;
use std::io::ErrorKind;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use support::{Bounds, Result, Samples, failed, field, field_mib, run, skip, went_wrong};
use tempfile::TempDir;
use workers::{Bench, Home, PORT, project};

/// How many workers are added, and of how many kinds.
const WORKERS: usize = 20;
const KINDS: usize = 5;
/// Files that install makes in each kind, and those of each project.
const INSTALLED: usize = 500;
const FILES: usize = 100;
/// Most time and disk space that adding all may take when everything is in the store.
const ADD_MS: f64 = 1000.0;
const ADD_MIB: f64 = 10.0;
/// Files of the project that is started, and what its start may take longer than
/// `unshare … chroot`.
const STARTED_FILES: usize = 1000;
const START_MS: f64 = 50.0;
/// Most memory of a supervisor while its worker sleeps.
const IDLE_MIB: f64 = 16.0;
/// How long it is looked at.
const IDLE: Duration = Duration::from_secs(10);
/// Longest wait for anything.
const LIMIT: Duration = Duration::from_secs(60);

fn add(home: &Home, projects: &[PathBuf]) -> Command {
    let mut add = home.iii(&["worker", "add", "--no-wait"]);
    add.args(projects);
    add
}

fn remove_all(home: &Home, projects: &[PathBuf]) -> Command {
    let mut remove = home.iii(&["worker", "remove", "-y"]);
    remove.args(projects.iter().filter_map(|path| path.file_name()));
    remove
}

/// Bytes that a directory takes on disk.
fn on_disk(dir: &Path) -> Result<u64> {
    let mut du = Command::new("du");
    du.args(["-s", "--block-size=1"]).arg(dir);
    let output = run(&mut du)?;
    let text = String::from_utf8_lossy(&output.stdout);
    let bytes = text.split_whitespace().next().and_then(|n| n.parse().ok());
    bytes.ok_or_else(|| went_wrong(&du, &text))
}

/// The base once more, as an image of podman's for each kind. Dropped, everything of it goes.
struct Podman {
    dir: TempDir,
    /// Podman takes no path of more than 50 bytes for it.
    run: TempDir,
}

impl Podman {
    fn new(scratch: &Path, base: &Path) -> Result<Self> {
        let dir = TempDir::with_prefix_in("podman-", scratch);
        let podman = Podman {
            dir: dir.map_err(failed("making a directory in", scratch))?,
            run: TempDir::with_prefix("pm-")
                .map_err(failed("making a directory in", &std::env::temp_dir()))?,
        };
        let archive = scratch.join("base.tar");
        run(Command::new("tar")
            .arg("-cf")
            .arg(&archive)
            .arg("-C")
            .arg(base)
            .arg("."))?;
        for kind in 0..KINDS {
            let name = format!("kind{kind}");
            run(podman
                .command(&["import", "--quiet", "--change"])
                .arg(format!("ENV KIND={kind}"))
                .arg(&archive)
                .arg(&name))?;
        }
        Ok(podman)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("podman");
        command.arg("--root").arg(self.dir.path());
        command.arg("--runroot").arg(self.run.path());
        command.args(args);
        command
    }

    /// Creates containers with mounted projects, the nearest equivalent of added workers.
    fn create_all(&self, projects: &[PathBuf]) -> Result<Duration> {
        let begin = Instant::now();
        for (number, project) in projects.iter().enumerate() {
            let mut create = self.command(&["create", "--quiet", "--network", "host", "--volume"]);
            create.arg(format!("{}:/workspace", project.display()));
            create.arg(format!("kind{}", number % KINDS));
            run(create.args(["/bin/sleep", "1000"]))?;
        }
        Ok(begin.elapsed())
    }

    fn remove_all(&self) -> Result<()> {
        run(&mut self.command(&["rm", "--all", "--force"])).map(drop)
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        let _ = run(&mut self.command(&["rmi", "--all", "--force"]));
        // It keeps a bind mount of its directory on itself.
        let overlay = self.dir.path().join("overlay");
        let _ = Command::new("umount").arg(overlay).output();
    }
}

fn adds(bench: &Bench, bounds: &mut Bounds) -> Result<()> {
    let (home, scratch) = (&bench.home, bench.scratch());
    let mut projects = Vec::new();
    for number in 0..WORKERS {
        let kind = number % KINDS;
        let install = format!(
            "mkdir node_modules; i=0; while [ $i -lt {INSTALLED} ]; do \
             echo module $i of {kind} >node_modules/$i.js; i=$((i + 1)); done"
        );
        let name = format!("worker{number:02}");
        projects.push(project(scratch, &name, FILES, &install, "exec sleep 1000")?);
    }
    let podman = match Podman::new(scratch, &bench.base) {
        Ok(podman) => Some(podman),
        Err(error) => {
            skip("adding beside podman", error);
            None
        }
    };
    run(&mut add(home, &projects))?;
    let (mut ours, mut theirs) = (Samples::default(), Samples::default());
    let (mut added, mut created) = (0, 0);
    for _ in 0..support::option("--rounds", 10) {
        bench.interrupt.check()?;
        run(&mut remove_all(home, &projects))?;
        let before = on_disk(home.dir.path())?;
        let begin = Instant::now();
        run(&mut add(home, &projects))?;
        ours.0.push(begin.elapsed());
        added = added.max(on_disk(home.dir.path())?.saturating_sub(before));
        if let Some(podman) = &podman {
            let before = on_disk(podman.dir.path())?;
            theirs.0.push(podman.create_all(&projects)?);
            created = created.max(on_disk(podman.dir.path())?.saturating_sub(before));
            podman.remove_all()?;
        }
    }
    #[expect(clippy::cast_precision_loss, reason = "nobody has 2^52 bytes")]
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let mut rows = vec![vec![
        "iii worker add".to_owned(),
        ours.show(),
        String::new(),
        format!("{:.2}", mib(added)),
    ]];
    if podman.is_some() {
        rows.push(vec![
            "podman create, once each".to_owned(),
            theirs.show(),
            ours.show_ratio(&theirs),
            format!("{:.2}", mib(created)),
        ]);
    }
    let head = format!("{WORKERS} workers of {KINDS} kinds, everything there");
    support::table(&[&head, "ms", "ours / this", "more on disk, MiB"], &rows);
    bounds.at_most("adding all", ours.median(), ADD_MS, " ms");
    bounds.at_most("on disk", mib(added), ADD_MIB, " MiB");
    run(&mut remove_all(home, &projects)).map(drop)
}

/// Where a start command says that it runs: it connects.
struct Bell {
    listener: TcpListener,
    start: String,
}

impl Bell {
    fn new() -> Result<Self> {
        let here = Path::new("127.0.0.1");
        let listener = TcpListener::bind("127.0.0.1:0").map_err(failed("binding", here))?;
        let address = listener.local_addr().map_err(failed("binding", here))?;
        listener
            .set_nonblocking(true)
            .map_err(failed("binding", here))?;
        Ok(Self {
            listener,
            start: format!("nc 127.0.0.1 {}", address.port()),
        })
    }

    /// Waits until a worker rings.
    fn rung(&self) -> Result<()> {
        let begin = Instant::now();
        loop {
            match self.listener.accept() {
                Ok(_) => return Ok(()),
                Err(error) if error.kind() != ErrorKind::WouldBlock || begin.elapsed() > LIMIT => {
                    return Err(failed("waiting at", Path::new("127.0.0.1"))(error));
                }
                Err(_) => thread::sleep(Duration::from_micros(200)),
            }
        }
    }

    /// From the start of `command` until it rings. Waits for its end, too.
    fn time(&self, command: &mut Command) -> Result<Duration> {
        let begin = Instant::now();
        let child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let mut child = child.map_err(|error| went_wrong(command, &error))?;
        let rung = self.rung();
        let took = begin.elapsed();
        if rung.is_err() {
            let _ = child.kill();
        }
        let status = child.wait().map_err(|error| went_wrong(command, &error))?;
        rung?;
        if status.success() {
            Ok(took)
        } else {
            Err(went_wrong(command, &status))
        }
    }
}

fn starts(bench: &Bench, bounds: &mut Bounds) -> Result<()> {
    let (home, scratch) = (&bench.home, bench.scratch());
    let bell = Bell::new()?;
    let stays = format!("{}; exec sleep 1000", bell.start);
    let managed = project(scratch, "managed", STARTED_FILES, "true", &stays)?;
    let fore = project(scratch, "foreground", STARTED_FILES, "true", &bell.start)?;
    run(&mut add(home, std::slice::from_ref(&managed)))?;
    // No process listens at the engine's address: the bell is the worker's alone.
    let start = || home.iii(&["worker", "start", "managed", "--port", PORT]);
    let dev = || home.dev(&fore);
    let bare = || bench.bare(&bell.start);
    let stop = || run(&mut home.iii(&["worker", "stop", "-y", "managed"]));
    bell.time(&mut dev())?;
    bell.time(&mut start())?;
    idle(home, bounds)?;
    stop()?;
    let mut samples = [(); 3].map(|()| Samples::default());
    for _ in 0..support::option("--rounds", 10) {
        bench.interrupt.check()?;
        samples[0].0.push(bell.time(&mut start())?);
        stop()?;
        samples[1].0.push(bell.time(&mut dev())?);
        samples[2].0.push(bell.time(&mut bare())?);
    }
    let [start, dev, bare] = samples;
    let row = |what: &str, samples: &Samples| {
        let over = samples.median() - bare.median();
        vec![what.to_owned(), samples.show(), format!("{over:.1}")]
    };
    let rows = [
        row("iii worker start", &start),
        row("iii worker dev", &dev),
        row("unshare … chroot", &bare),
    ];
    let head = format!("until the command of {STARTED_FILES} files runs");
    support::table(&[&head, "ms", "longer by, ms"], &rows);
    let over = start.median() - bare.median();
    bounds.at_most("start, over unshare … chroot", over, START_MS, " ms");
    Ok(())
}

/// How often the threads of a process were scheduled.
fn woken(process: &Path) -> u64 {
    let tasks = fs::read_dir(process.join("task")).into_iter().flatten();
    let switches = tasks.flatten().flat_map(|task| {
        let status = task.path().join("status");
        ["voluntary_ctxt_switches", "nonvoluntary_ctxt_switches"]
            .map(|name| field(&status, name).unwrap_or_default())
    });
    switches.sum()
}

/// The cost of the running worker's supervisor while nothing happens.
fn idle(home: &Home, bounds: &mut Bounds) -> Result<()> {
    let path = home.dir.path().join(".iii/managed/managed/vm.pid");
    let pid = fs::read_to_string(&path).map_err(failed("reading", &path))?;
    let process = Path::new("/proc").join(pid.trim());
    thread::sleep(Duration::from_secs(1));
    let before = woken(&process);
    thread::sleep(IDLE);
    let woken = woken(&process) - before;
    let mib = |name: &str| field_mib(&process.join("status"), name);
    println!(
        "\nThe supervisor of a sleeping worker: {:.1} MiB resident ({:.1} anonymous, {:.1} mapped files), woken {woken} times in {} s",
        mib("VmRSS"),
        mib("RssAnon"),
        mib("RssFile"),
        IDLE.as_secs(),
    );
    bounds.at_most("resident while idle", mib("VmRSS"), IDLE_MIB, " MiB");
    bounds.count("wake-ups while idle", woken, 0);
    Ok(())
}

fn main() -> ExitCode {
    let measured = workers::bench(|bench, bounds| {
        let measured = adds(bench, bounds).and_then(|()| starts(bench, bounds));
        let _ = run(&mut bench.home.iii(&["worker", "stop", "-y", "managed"]));
        measured
    });
    support::end("managed", measured)
}
