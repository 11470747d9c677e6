//! Restart, edit and sharing with the finished program; see benches/README.md.

mod corpus;
#[allow(dead_code, reason = "each bench uses its part")]
mod support;
#[path = "support/workers.rs"]
mod workers;

use std::fs;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;
use support::{Bounds, Error, Result, Running, Samples, failed, field_mib, run, skip, went_wrong};
use workers::{Bench, Home, project, write};

/// The output of the start command once it runs. The tool never prints it: the shell computes it.
const MARK: &[u8] = b"started-42";
const START: &str = "echo started-$((6 * 7))";
/// Longest run of anything.
const LIMIT: Duration = Duration::from_secs(300);
/// Sizes of the projects, and most time that a restart of each may take beyond `unshare … chroot`.
const RESTARTS: [(usize, f64); 2] = [(1000, 50.0), (30_000, 150.0)];
/// Sizes of the projects that are edited under a worker that runs, and how long its next run may
/// take to begin.
const RELOADS: [(usize, f64); 2] = [(1000, 100.0), (30_000, 250.0)];
/// Most time from an edit of one file of the largest project until its layer is published.
const EDIT_MS: f64 = 150.0;
/// An edit of a Rust worker, until its next process runs, may take so many times the time of cargo
/// beside it.
const COMPILE_RATIO: f64 = 1.2;
/// Files that install makes in the two projects that share it.
const INSTALLED: usize = 5000;
/// Files that are added to the Debian base, so that it has 42,000 entries.
const MORE: usize = 8000;
/// Resident memory that the tool may have after a walk of the Debian base.
const MAX_RESIDENT_MIB: f64 = 64.0;
/// Descriptors that the tool may have open then: none of them an inode's.
const MAX_DESCRIPTORS: u64 = 64;

fn build(home: &Home, project: &Path) -> Result<(Duration, Vec<Layer>)> {
    let mut command = home.iii(&["worker", "build", "--json", "--runtime", "namespace"]);
    command.arg(project);
    let begin = Instant::now();
    let output = run(&mut command)?;
    let took = begin.elapsed();
    let layers: Layers =
        serde_json::from_slice(&output.stdout).map_err(|error| went_wrong(&command, &error))?;
    Ok((took, layers.layers))
}

#[derive(Deserialize)]
struct Layers {
    layers: Vec<Layer>,
}

/// A layer in the output of `worker build --json`.
#[derive(Deserialize)]
struct Layer {
    kind: String,
    status: String,
    bytes: u64,
    files: u64,
}

/// Starts `command`. Returns when each [`MARK`] that it prints comes.
fn marks(command: &mut Command) -> Result<(Running, Receiver<Instant>)> {
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| went_wrong(command, &error))?;
    let mut running = Running(child);
    let stdout = running.0.stdout.take();
    let stdout = stdout.ok_or_else(|| went_wrong(command, &"no pipe"))?;
    let (found, mark) = channel();
    thread::spawn(move || {
        for line in BufReader::new(stdout)
            .split(b'\n')
            .map_while(io::Result::ok)
        {
            if line == MARK && found.send(Instant::now()).is_err() {
                break;
            }
        }
    });
    Ok((running, mark))
}

/// Starts `command` and measures the time until [`MARK`] is on its standard output. Also returns
/// the output up to there.
fn until_mark(command: &mut Command) -> Result<(Duration, String, Running)> {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let begin = Instant::now();
    let child = command
        .spawn()
        .map_err(|error| went_wrong(command, &error))?;
    let mut running = Running(child);
    let (Some(mut stdout), Some(mut stderr)) = (running.0.stdout.take(), running.0.stderr.take())
    else {
        return Err(went_wrong(command, &"no pipes"));
    };
    let (found, mark) = channel();
    // They read to the end, so that nothing blocks on a full pipe.
    thread::spawn(move || {
        let (mut said, mut piece) = (Vec::new(), [0; 4096]);
        while let Ok(count @ 1..) = stdout.read(&mut piece) {
            said.extend(&piece[..count]);
            if said.windows(MARK.len()).any(|window: &[u8]| window == MARK) {
                let took = begin.elapsed();
                let _ = found.send((took, String::from_utf8_lossy(&said).into_owned()));
                said.clear();
            }
        }
    });
    let errors = thread::spawn(move || {
        let mut said = String::new();
        let _ = stderr.read_to_string(&mut said);
        said
    });
    if let Ok((took, said)) = mark.recv_timeout(LIMIT) {
        return Ok((took, said, running));
    }
    drop(running);
    let said = errors.join().unwrap_or_default();
    Err(went_wrong(command, &format!("never started: {said}")))
}

/// [`until_mark`], then waits for a good end.
fn start_and_end(command: &mut Command) -> Result<Duration> {
    let (took, _, mut running) = until_mark(command)?;
    let status = running
        .0
        .wait()
        .map_err(|error| went_wrong(command, &error))?;
    if status.success() {
        Ok(took)
    } else {
        Err(went_wrong(command, &status))
    }
}

/// A project of `files` files, and no install.
fn sources(bench: &Bench, name: &str, files: usize, start: &str) -> Result<PathBuf> {
    let name = format!("{name}-{files}");
    project(bench.scratch(), &name, files, "true", start)
}

fn restart(bench: &Bench, project: &Path, rounds: usize) -> Result<[Samples; 2]> {
    let home = &bench.home;
    let mut bare = bench.bare(START);
    let mut samples = [Samples::default(), Samples::default()];
    start_and_end(&mut home.dev(project))?;
    for _ in 0..rounds {
        bench.interrupt.check()?;
        samples[0].0.push(start_and_end(&mut home.dev(project))?);
        samples[1].0.push(start_and_end(&mut bare)?);
    }
    Ok(samples)
}

fn restarts(bench: &Bench, bounds: &mut Bounds) -> Result<()> {
    let rounds = support::option("--rounds", 15);
    let mut rows = Vec::new();
    for (files, bound) in RESTARTS {
        let project = sources(bench, "files", files, START)?;
        let [ours, bare] = restart(bench, &project, rounds)?;
        let over = ours.median() - bare.median();
        rows.push(vec![
            format!("{files} files"),
            ours.show(),
            bare.show(),
            format!("{over:.1}"),
            ours.show_ratio(&bare),
        ]);
        bounds.at_most(
            &format!("restart of {files} files, over unshare … chroot"),
            over,
            bound,
            " ms",
        );
    }
    let head = [
        "restart, nothing changed; ms, median (min–max)",
        "iii worker dev",
        "unshare … chroot",
        "difference",
        "ratio",
    ];
    support::table(&head, &rows);
    Ok(())
}

fn edit(bench: &Bench, bounds: &mut Bounds) -> Result<()> {
    let home = &bench.home;
    let files = RESTARTS[RESTARTS.len() - 1].0;
    let project = bench.scratch().join(format!("files-{files}"));
    let (mut edited, mut unchanged) = (Samples::default(), Samples::default());
    let mut new = 0;
    build(home, &project)?;
    for round in 0..support::option("--rounds", 15) {
        bench.interrupt.check()?;
        unchanged.0.push(build(home, &project)?.0);
        let text = format!("exports.edited = {round};\n");
        write(&project.join("src/3/70/3500.js"), &text)?;
        let (took, layers) = build(home, &project)?;
        edited.0.push(took);
        new = new.max(layers.iter().map(|layer| layer.files).sum());
    }
    let row = |what: &str, samples: &Samples| vec![what.to_owned(), samples.show()];
    let rows = [row("nothing", &unchanged), row("one file", &edited)];
    support::table(
        &[
            &format!("worker build of {files} files after an edit of"),
            "ms, median (min–max)",
        ],
        &rows,
    );
    bounds.at_most(
        &format!("one file of {files} edited"),
        edited.median(),
        EDIT_MS,
        " ms",
    );
    bounds.count("file contents that this added", new, 1);
    Ok(())
}

/// Edits a file under a worker that runs, until the next run says so; and the same without us: a
/// shell that is killed and run again.
fn reload(bench: &Bench, project: &Path, script: &str, rounds: usize) -> Result<[Samples; 2]> {
    let mut samples = [Samples::default(), Samples::default()];
    let edit = |round: usize| {
        let text = format!("exports.edited = {round};\n");
        write(&project.join("src/0/7/350.js"), &text)
    };
    let never = || Error::Command {
        what: "a reload".into(),
        why: "never came".into(),
    };
    let (mut running, marks_of) = marks(&mut bench.home.dev(project))?;
    marks_of.recv_timeout(LIMIT).map_err(|_| never())?;
    // Until its watch is set up, and has had a look.
    edit(rounds)?;
    marks_of.recv_timeout(LIMIT).map_err(|_| never())?;
    for round in 0..rounds {
        bench.interrupt.check()?;
        // Longer than editors and people take between two saves.
        thread::sleep(Duration::from_millis(300));
        let begin = Instant::now();
        edit(round)?;
        let end = marks_of.recv_timeout(LIMIT).map_err(|_| never())?;
        samples[0].0.push(end - begin);
    }
    stop(&mut running)?;
    let mut bare = Command::new("/bin/sh");
    bare.args(["-ec", script]).current_dir(project);
    let (mut running, mut marks_of) = marks(&mut bare)?;
    for round in 0..rounds {
        marks_of.recv_timeout(LIMIT).map_err(|_| never())?;
        let begin = Instant::now();
        edit(round)?;
        drop(running);
        (running, marks_of) = marks(&mut bare)?;
        let end = marks_of.recv_timeout(LIMIT).map_err(|_| never())?;
        samples[1].0.push(end - begin);
        drop(running);
        (running, marks_of) = marks(&mut bare)?;
    }
    Ok(samples)
}

fn reloads(bench: &Bench, bounds: &mut Bounds) -> Result<()> {
    let rounds = support::option("--rounds", 15);
    let script = format!("{START}; exec sleep 1000");
    let mut rows = Vec::new();
    for (files, bound) in RELOADS {
        let project = sources(bench, "edited", files, &script)?;
        let [ours, bare] = reload(bench, &project, &script, rounds)?;
        rows.push(vec![format!("{files} files"), ours.show(), bare.show()]);
        bounds.at_most(
            &format!("edit of one of {files} files to the next run"),
            ours.median(),
            bound,
            " ms",
        );
    }
    let head = [
        "a file edited under a worker, until the next run; ms, median (min–max)",
        "iii worker dev",
        "sh, killed and run again at once",
    ];
    support::table(&head, &rows);
    Ok(())
}

/// Ends the tool as Ctrl-C does.
fn stop(running: &mut Running) -> Result<()> {
    let tool = Pid::from_child(&running.0);
    kill_process(tool, Signal::INT)
        .map_err(|error| failed("stopping", Path::new("iii"))(error.into()))?;
    running
        .0
        .wait()
        .map_err(failed("waiting for", Path::new("iii")))?;
    Ok(())
}

fn share(bench: &Bench, bounds: &mut Bounds) -> Result<()> {
    let install = format!(
        "cat package.json >/dev/null; mkdir node_modules; i=0; \
         while [ $i -lt {INSTALLED} ]; do echo module $i >node_modules/$i.js; i=$((i + 1)); done"
    );
    let mut times = Vec::new();
    let mut added = [0, 0];
    for name in ["first", "second"] {
        let dir = project(bench.scratch(), name, 0, &install, START)?;
        write(
            &dir.join("package.json"),
            "{\"dependencies\": {\"five-thousand\": \"1.0.0\"}}\n",
        )?;
        write(&dir.join("main.js"), &format!("// {name}\n"))?;
        let (took, layers) = build(&bench.home, &dir)?;
        times.push(took.as_secs_f64());
        let own = |layer: &&Layer| layer.kind != "project";
        added = layers
            .iter()
            .filter(own)
            .fold([0, 0], |[bytes, files], layer| {
                [bytes + layer.bytes, files + layer.files]
            });
        if name == "second" && layers.iter().filter(own).any(|layer| layer.status != "hit") {
            return Err(Error::Command {
                what: "the second project with the same dependencies".into(),
                why: "installed again".into(),
            });
        }
    }
    println!(
        "\nSecond project with the same {INSTALLED} installed files: {:.0} ms, the first took {:.0} ms",
        times[1] * 1e3,
        times[0] * 1e3
    );
    bounds.count("bytes that the second project's install added", added[0], 0);
    bounds.count("files that the second project's install added", added[1], 0);
    Ok(())
}

/// A base made of Debian packages: its archive, and the same unpacked. Nothing, said, where it
/// cannot be made.
fn debian(bench: &Bench, kind: &str) -> Result<Option<(PathBuf, PathBuf)>> {
    let bases = corpus::cache()?.join("bases");
    let mut make = Command::new(corpus::repository("scripts/make-base"));
    if let Err(error) = run(make.arg(kind).arg(&bases)) {
        skip(&format!("package caches on a {kind} base"), error);
        return Ok(None);
    }
    let archive = bases.join(format!("{kind}.tar"));
    let root = bench.scratch().join(kind);
    fs::create_dir_all(&root).map_err(failed("making", &root))?;
    run(Command::new("tar")
        .arg("-xpf")
        .arg(&archive)
        .arg("-C")
        .arg(&root))?;
    let mut settings = Command::new("cp");
    settings.args(["/etc/resolv.conf", "/etc/ssl/certs/ca-certificates.crt"]);
    run(settings.arg(root.join("etc")))?;
    Ok(Some((archive, root)))
}

/// The script in the directory `dir` of an unpacked base, with the host's network; `cache` is
/// mounted at `at`.
fn in_root(root: &Path, dir: &str, mount: Option<(&Path, &str)>, script: &str) -> Command {
    let mut command = Command::new("unshare");
    let bind = mount.map_or_else(String::new, |(from, at)| {
        let at = root.join(at);
        format!(
            "mkdir -p {0}; mount --bind {1} {0};",
            at.display(),
            from.display()
        )
    });
    let ca = "/etc/ca-certificates.crt";
    let script = format!(
        "{bind} exec chroot {} /usr/bin/env HOME=/root NODE_EXTRA_CA_CERTS={ca} CARGO_HTTP_CAINFO={ca} \
         /bin/sh -ec 'cd {dir}; {script}'",
        root.display()
    );
    command.args(["-m", "/bin/sh", "-ec", &script]);
    command
}

/// `npm install` again after an edit of package.json, with a warm cache: ours, and on a plain
/// filesystem with a mounted cache.
fn packages(bench: &Bench) -> Result<()> {
    let Some((archive, root)) = debian(bench, "node")? else {
        return Ok(());
    };
    let home = Home::new(bench.scratch(), &archive)?;
    let install = "npm install --no-audit --no-fund --prefer-offline";
    let dir = project(bench.scratch(), "packages", 0, install, "true")?;
    let cache = bench.scratch().join("npm-cache");
    fs::create_dir_all(&cache).map_err(failed("making", &cache))?;
    let plain = format!("rm -rf node_modules package-lock.json; {install} >/dev/null");
    let mut peer = in_root(&root, "/work", Some((&cache, "root/.npm")), &plain);
    let (mut ours, mut theirs) = (Samples::default(), Samples::default());
    for round in 0..=support::option("--rounds", 5) {
        bench.interrupt.check()?;
        let manifest = format!(
            "{{\"name\": \"p\", \"version\": \"1.0.{round}\", \"dependencies\": \
             {{\"express\": \"4.21.0\", \"lodash\": \"4.17.21\", \"eslint\": \"9.11.0\"}}}}\n"
        );
        write(&dir.join("package.json"), &manifest)?;
        write(&root.join("work/package.json"), &manifest)?;
        let (took, _) = build(&home, &dir)?;
        let begin = Instant::now();
        run(&mut peer)?;
        // The first fills the caches.
        if round > 0 {
            ours.0.push(took);
            theirs.0.push(begin.elapsed());
        }
    }
    let row = vec![ours.show(), theirs.show(), ours.show_ratio(&theirs)];
    let head = [
        "npm install with a warm cache; ms: worker build, cache volume",
        "the host's filesystem, cache mounted",
        "ratio",
    ];
    support::table(&head, &[row]);
    Ok(())
}

/// An edit of a Rust worker until its next process runs, and the same by cargo on a plain
/// filesystem.
fn compile(bench: &Bench, bounds: &mut Bounds) -> Result<()> {
    let Some((archive, root)) = debian(bench, "rust")? else {
        return Ok(());
    };
    let home = Home::new(bench.scratch(), &archive)?;
    let dir = bench.scratch().join("compile");
    let peer_dir = root.join("work");
    let main = |round: usize| {
        format!(
            "fn main() {{ println!(\"started-{{}}\", {round} * 0 + 6 * 7); loop {{ std::thread::park() }} }}\n"
        )
    };
    for dir in [&dir, &peer_dir] {
        let cargo = "[package]\nname = \"bench\"\nversion = \"0.1.0\"\nedition = \"2021\"\n";
        write(&dir.join("Cargo.toml"), cargo)?;
        write(&dir.join("src/main.rs"), &main(0))?;
    }
    let manifest = format!(
        "name: compile\nruntime:\n  kind: rust\n  base_image: {}\n",
        workers::IMAGE
    );
    write(&dir.join("iii.worker.yaml"), &manifest)?;
    let never = || Error::Command {
        what: "a run of what was compiled".into(),
        why: "never came".into(),
    };
    let mut cargo = in_root(
        &root,
        "/work",
        None,
        "cargo build --release -q; exec target/release/bench",
    );
    let (mut ours, mut theirs) = (Samples::default(), Samples::default());
    let (mut running, marks_of) = marks(&mut home.dev(&dir))?;
    marks_of.recv_timeout(LIMIT).map_err(|_| never())?;
    drop(until_mark(&mut cargo)?);
    for round in 1..=support::option("--rounds", 7) {
        bench.interrupt.check()?;
        thread::sleep(Duration::from_millis(500));
        let begin = Instant::now();
        write(&dir.join("src/main.rs"), &main(round))?;
        let end = marks_of.recv_timeout(LIMIT).map_err(|_| never())?;
        ours.0.push(end - begin);
        write(&peer_dir.join("src/main.rs"), &main(round))?;
        theirs.0.push(until_mark(&mut cargo)?.0);
    }
    stop(&mut running)?;
    let row = vec![ours.show(), theirs.show(), ours.show_ratio(&theirs)];
    let head = [
        "an edit of a Rust worker to its next process; ms: worker dev",
        "cargo build on the host's filesystem",
        "ratio",
    ];
    support::table(&head, &[row]);
    bounds.at_most(
        "edit of a Rust worker, to cargo build",
        ours.median() / theirs.median(),
        COMPILE_RATIO,
        "",
    );
    Ok(())
}

/// How many descriptors a process has open.
fn descriptors(process: &Path) -> u64 {
    fs::read_dir(process.join("fd")).map_or(u64::MAX, |fds| fds.count() as u64)
}

/// The tool's memory and descriptors after everything in a Debian base was looked at.
fn memory(bench: &Bench, bounds: &mut Bounds) -> Result<()> {
    bench.interrupt.check()?;
    let bases = corpus::cache()?.join("bases");
    let mut make = Command::new(corpus::repository("scripts/make-base"));
    if let Err(error) = run(make.arg("node").arg(&bases)) {
        skip("memory with a Debian base", error);
        return Ok(());
    }
    let home = Home::new(bench.scratch(), &bases.join("node.tar"))?;
    let install =
        format!("mkdir /many; i=0; while [ $i -lt {MORE} ]; do : >/many/$i; i=$((i + 1)); done");
    let walk = format!("find / -xdev -printf '%s\\n' | wc -l; {START}; exec sleep 1000");
    let dir = project(bench.scratch(), "walk", 0, &install, &walk)?;
    let (_, said, mut running) = until_mark(&mut home.dev(&dir))?;
    let entries = said.split_whitespace().next().unwrap_or("?");
    let process = PathBuf::from(format!("/proc/{}", running.0.id()));
    let mib = |file: &str, name: &str| field_mib(&process.join(file), name);
    let resident = mib("status", "VmRSS");
    let descriptors = descriptors(&process);
    println!(
        "\niii after `find / -xdev` over {entries} entries: {resident:.1} MiB resident ({:.1} anonymous, {:.1} mapped files), \
         at its highest {:.1}, {:.1} proportional; {descriptors} descriptors",
        mib("status", "RssAnon"),
        mib("status", "RssFile"),
        mib("status", "VmHWM"),
        mib("smaps_rollup", "Pss"),
    );
    bounds.at_most("resident memory", resident, MAX_RESIDENT_MIB, " MiB");
    bounds.count("open descriptors", descriptors, MAX_DESCRIPTORS);
    stop(&mut running)
}

fn main() -> ExitCode {
    let measured = workers::bench(|bench, bounds| {
        restarts(bench, bounds)?;
        edit(bench, bounds)?;
        reloads(bench, bounds)?;
        share(bench, bounds)?;
        packages(bench)?;
        compile(bench, bounds)?;
        memory(bench, bounds)
    });
    support::end("worker", measured)
}
