//! Layers served to a virtual machine, beside virtiofsd and a directory; see benches/README.md.

#[allow(dead_code, reason = "each bench uses its part")]
mod corpus;
#[allow(dead_code, reason = "the tests use more of it")]
#[path = "../tests/e2e/machine.rs"]
mod machine;
#[allow(dead_code, reason = "each bench uses its part")]
mod support;
#[allow(dead_code, reason = "each bench uses its part")]
#[path = "support/workers.rs"]
mod workers;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use machine::{Kernel, Vm};
use support::{Bounds, Error, Interrupt, Result, Running, Samples, failed, run, skip, went_wrong};
use tempfile::TempDir;
use workers::{Home, PORT, write};

/// The root of the guests, an image of ours.
const IMAGE: &str = "bench:latest";
const PACKAGES: usize = 150;
const FILES: usize = 18;
const MADE: usize = 1000;
/// MiB of the file that is read and written at once.
const LARGE: usize = 64;
/// Most time from our start of a microVM until its machine is entered.
const ENTER_MS: f64 = 30.0;
/// Name of the process from then on; `msb_krun` sets it.
const ENTERED: &str = "libkrun VM";
/// Longest wait for a server to listen, and for a machine to be entered.
const START_LIMIT: Duration = Duration::from_secs(30);

/// A directory in memory: to make a file on a disk takes 16 µs in one directory and 500 in another
/// of the same ext4, by how full the part is that it put the directory in.
fn scratch() -> Result<TempDir> {
    let memory = Path::new("/dev/shm");
    TempDir::with_prefix_in("vm-", memory).map_err(failed("making", memory))
}

/// The guest's work, and whether metadata bounds it. The guest knows how many files to make.
const PHASES: [(&str, &str, bool); 8] = [
    ("stat walk, 1st", "find /node_modules -size +100000", true),
    ("stat walk, 2nd", "find /node_modules -size +100000", true),
    (
        "read everything, 1st",
        "find /node_modules -type f -exec cat {} +",
        false,
    ),
    (
        "read everything, 2nd",
        "find /node_modules -type f -exec cat {} +",
        false,
    ),
    (
        "create files",
        "for i in $(seq $made); do echo $i >/made/$i; done",
        true,
    ),
    ("delete them", "rm -r /made", true),
    ("write a large file", "dd if=/large of=/copy bs=1M", false),
    (
        "read it",
        "echo 3 >/proc/sys/vm/drop_caches; dd if=/copy of=/dev/null bs=1M",
        false,
    ),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Server {
    Ours,
    Virtiofsd,
}

fn virtiofsd(cache: &Path) -> Option<PathBuf> {
    let installed = cache.join("virtiofsd-1.14.0/bin/virtiofsd");
    let packaged = PathBuf::from("/usr/libexec/virtiofsd");
    [installed, packaged].into_iter().find(|path| path.exists())
}

/// How many times as much work a kernel is given: its clock has hundredths of a second.
fn scale(kernel: Kernel) -> usize {
    match kernel {
        Kernel::Emulated => 1,
        Kernel::UserMode => 4,
    }
}

/// A root filesystem of busybox and a tree as npm leaves one.
fn make_root(root: &Path, scale: usize) -> Result<()> {
    run(Command::new(corpus::repository("scripts/make-busybox-base")).arg(root))?;
    for package in 0..PACKAGES * scale {
        let dir = root.join(format!("node_modules/package-{package}/lib"));
        fs::create_dir_all(&dir).map_err(failed("making", &dir))?;
        for file in 0..FILES {
            let path = dir.join(format!("{file}.js"));
            let text = format!("exports.{package} = {file};\n").repeat(1 + file * file * 4);
            fs::write(&path, text).map_err(failed("writing", &path))?;
        }
    }
    let made = root.join("made");
    fs::create_dir(&made).map_err(failed("making", &made))?;
    let large: Vec<u8> = (0..(LARGE * scale) << 20)
        .map(|at| ((at * at) >> 7) as u8)
        .collect();
    let path = root.join("large");
    fs::write(&path, large).map_err(failed("writing", &path))
}

fn tool(home: &Path) -> Command {
    let mut tool = Command::new(env!("CARGO_BIN_EXE_iii"));
    tool.env("HOME", home).env("III_GC", "off");
    tool
}

/// Boots one machine on `server` and returns what each phase took there, by the guest's clock.
fn measure(
    server: Server,
    kernel: Kernel,
    guest: &Path,
    home: &Path,
    root: &Path,
    virtiofsd: Option<&Path>,
) -> Result<Vec<Duration>> {
    let scratch = scratch()?;
    let socket = scratch.path().join("fs.sock");
    let mut command = if let (Server::Virtiofsd, Some(virtiofsd)) = (server, virtiofsd) {
        let copy = scratch.path().join("root");
        run(Command::new("cp").arg("-a").args([root, &copy]))?;
        let mut command = Command::new(virtiofsd);
        command.arg("--socket-path").arg(&socket);
        command.arg("--shared-dir").arg(&copy);
        command.args(["--cache", "always", "--sandbox", "none", "--tag", "root"]);
        command
    } else {
        let mut command = tool(home);
        command.args(["store", "serve", "--image", IMAGE, "--socket"]);
        command.arg(&socket);
        command
    };
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let child = command
        .spawn()
        .map_err(|error| went_wrong(&command, &error))?;
    let _running = Running(child);
    let begin = Instant::now();
    while !socket.exists() {
        if begin.elapsed() > START_LIMIT {
            return Err(went_wrong(&command, &"it does not listen"));
        }
        thread::sleep(Duration::from_millis(10));
    }
    let made = MADE * scale(kernel);
    let mut job = format!("made={made}; now() {{ read -r now _ </proc/uptime; }}\n");
    for (_, command, _) in PHASES {
        job.push_str("sync; now; begin=$now\n{ ");
        job.push_str(command);
        job.push_str("; } >/dev/null 2>&1\nnow; echo \"TOOK $begin $now\"\n");
    }
    let mut vm = Vm::boot(kernel, guest, &socket, &job);
    let mut taken = Vec::new();
    for _ in PHASES {
        let line = vm.wait_for("TOOK ");
        let seconds: Vec<f64> = line
            .split(' ')
            .filter_map(|text| text.parse().ok())
            .collect();
        let [begin, end] = seconds[..] else {
            return Err(went_wrong(&command, &format!("the guest says {line:?}")));
        };
        // The guest's clock has hundredths.
        taken.push(Duration::from_secs_f64((end - begin).max(0.005)));
    }
    vm.finish();
    Ok(taken)
}

/// The processes that `pid` has started, and those that they have.
fn descendants(pid: u32) -> Vec<String> {
    let mut found = vec![pid.to_string()];
    let mut next = 0;
    while let Some(pid) = found.get(next) {
        let tasks = fs::read_dir(format!("/proc/{pid}/task"))
            .into_iter()
            .flatten();
        let children = tasks
            .flatten()
            .filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
        let children: Vec<String> = children
            .flat_map(|text| {
                text.split_whitespace()
                    .map(str::to_owned)
                    .collect::<Vec<_>>()
            })
            .collect();
        found.extend(children);
        next += 1;
    }
    found
}

/// From the start of `worker dev --runtime libkrun` until the process of its machine enters that.
/// The guest's later work, and whether `/dev/kvm` can run it, make no difference.
fn enters(
    scratch: &Path,
    base: &Path,
    libkrunfw: &Path,
    rounds: usize,
    interrupt: &Interrupt,
) -> Result<Samples> {
    let home = Home::new(scratch, base)?;
    let project = scratch.join("project");
    let manifest = "name: box\nruntime: {kind: javascript}\nresources: {memory: 256, cpus: 1}\nscripts:\n  start: echo started\n";
    write(&project.join("iii.worker.yaml"), manifest)?;
    let boot = Path::new("/proc/sys/kernel/random/boot_id");
    let boot = fs::read_to_string(boot).map_err(failed("reading", boot))?;
    let mut samples = Samples::default();
    let mut missed = 0;
    while samples.0.len() < rounds {
        interrupt.check()?;
        // As if the probe had found that guests run here.
        let path = home.dir.path().join(".iii/kvm.json");
        let answer = format!(
            "{{\"version\":1,\"boot\":\"{}\",\"unusable\":null}}",
            boot.trim()
        );
        fs::write(&path, answer).map_err(failed("writing", &path))?;
        let mut command = home.iii(&["worker", "dev", "--runtime", "libkrun", "--no-watch"]);
        command.env("III_LIBKRUNFW", libkrunfw).env("III_GC", "off");
        command.args(["--port", PORT]);
        command
            .arg(&project)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let begin = Instant::now();
        let child = command
            .spawn()
            .map_err(|error| went_wrong(&command, &error))?;
        let mut running = Running(child);
        let entered = |pid: &String| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm"));
            name.is_ok_and(|name| name.trim() == ENTERED)
        };
        loop {
            if descendants(running.0.id()).iter().any(entered) {
                samples.0.push(begin.elapsed());
                break;
            }
            // Where guests do not run, one may have come and gone between two looks.
            let ended = running.0.try_wait();
            if ended
                .map_err(|error| went_wrong(&command, &error))?
                .is_some()
            {
                missed += 1;
                break;
            }
            if begin.elapsed() > START_LIMIT {
                return Err(went_wrong(&command, &"it enters no machine"));
            }
        }
        if missed > rounds {
            return Err(went_wrong(&command, &"it ends before it enters a machine"));
        }
    }
    Ok(samples)
}

fn bench(rounds: usize) -> Result<bool> {
    let interrupt = Interrupt::catch()?;
    let cache = corpus::cache()?;
    // The first available one, unless one is asked for.
    let asked = std::env::args().any(|arg| arg == "--emulated");
    let kernels = Kernel::ALL.into_iter();
    let made = kernels
        .filter(|kernel| !asked || *kernel == Kernel::Emulated)
        .find_map(|kernel| match kernel.made(&cache) {
            Ok(made) => Some((kernel, made)),
            Err(why) => {
                skip(kernel.name(), why);
                None
            }
        });
    let Some((kernel, guest)) = made else {
        return Ok(true);
    };
    println!("In {}.", kernel.name());
    let scratch = scratch()?;
    let (home, root) = (scratch.path().join("home"), scratch.path().join("root"));
    fs::create_dir(&home).map_err(failed("making", &home))?;
    make_root(&root, scale(kernel))?;
    run(tool(&home)
        .args(["image", "import"])
        .arg(&root)
        .args(["--as", IMAGE]))?;
    let virtiofsd = virtiofsd(&cache);
    if virtiofsd.is_none() {
        skip("virtiofsd", "it is not installed");
    }
    let servers = [Server::Ours, Server::Virtiofsd];
    let servers = &servers[..if virtiofsd.is_some() { 2 } else { 1 }];
    let mut samples = vec![[Samples::default(), Samples::default()]; PHASES.len()];
    for round in 0..rounds {
        for turn in 0..servers.len() {
            interrupt.check()?;
            let server = servers[(turn + round) % servers.len()];
            let taken = measure(server, kernel, guest, &home, &root, virtiofsd.as_deref())?;
            for (samples, time) in samples.iter_mut().zip(taken) {
                samples[server as usize].0.push(time);
            }
        }
    }
    let rows: Vec<Vec<String>> = PHASES
        .iter()
        .zip(&samples)
        .map(|((what, ..), [ours, theirs])| {
            vec![
                (*what).to_owned(),
                ours.show(),
                theirs.show(),
                ours.show_ratio(theirs),
            ]
        })
        .collect();
    support::table(
        &["ms of the guest's clock", "ours", "virtiofsd", "ratio"],
        &rows,
    );
    let mut bounds = Bounds::default();
    let libkrunfw = std::env::var_os("III_LIBKRUNFW")
        .map_or_else(|| cache.join("lib/libkrunfw.so.5"), PathBuf::from);
    let kvm = fs::File::options().read(true).write(true).open("/dev/kvm");
    if let Err(why) = kvm.and(fs::metadata(&libkrunfw)) {
        skip("the start of a microVM", why);
    } else {
        let starts = scratch.path().join("starts");
        fs::create_dir(&starts).map_err(failed("making", &starts))?;
        let base = scratch.path().join("base");
        run(Command::new(corpus::repository("scripts/make-busybox-base")).arg(&base))?;
        let taken = enters(&starts, &base, &libkrunfw, 4 * rounds, &interrupt)?;
        println!(
            "\nUntil `worker dev` enters its microVM: {} ms",
            taken.show()
        );
        bounds.at_most(
            "until a microVM is entered",
            taken.median(),
            ENTER_MS,
            " ms",
        );
    }
    if virtiofsd.is_some() {
        for ((what, _, metadata), [ours, theirs]) in PHASES.iter().zip(&samples) {
            // A tenth is what the emulation leaves in doubt.
            let most = if *metadata { 1.0 } else { 1.1 };
            bounds.at_most(what, ours.ratio(theirs).0, most, " times virtiofsd");
        }
    }
    Ok(bounds.print())
}

fn main() -> ExitCode {
    support::print_machine();
    let result: std::result::Result<bool, Error> = bench(support::option("--rounds", 3));
    support::end("vm", result)
}
