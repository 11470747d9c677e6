//! Pulling an image from a registry on loopback, beside podman and skopeo with umoci; see
//! benches/README.md.

#[allow(dead_code, reason = "each bench uses its part")]
mod corpus;
#[allow(dead_code, reason = "each bench uses its part")]
mod support;

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use support::{
    Bounds, Error, Interrupt, Result, Samples, failed, field_mib, run, skip, went_wrong,
};
use tempfile::TempDir;

/// Most time of a pull, as a part of the fastest peer's.
const OF_BEST: f64 = 0.5;
/// Resident memory that a pull may have at its highest.
const MAX_RESIDENT_MIB: f64 = 256.0;
/// The base that is the image's layer.
const BASE: &str = "node";
/// How often a running pull is looked at, for its memory.
const GLANCE: Duration = Duration::from_millis(5);
/// How long the registry has to listen.
const START: Duration = Duration::from_secs(30);

/// The program that pulls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Peer {
    Ours,
    Podman,
    SkopeoUmoci,
}

impl Peer {
    const ALL: [Peer; 3] = [Peer::Ours, Peer::Podman, Peer::SkopeoUmoci];

    fn name(self) -> &'static str {
        match self {
            Peer::Ours => "iii image pull",
            Peer::Podman => "podman pull",
            Peer::SkopeoUmoci => "skopeo copy + umoci unpack",
        }
    }

    /// The commands that bring `image` into `dir`, where nothing is yet.
    fn commands(self, dir: &Path, image: &str) -> Vec<Command> {
        let path = |name: &str| dir.join(name);
        match self {
            Peer::Ours => {
                let mut pull = Command::new(env!("CARGO_BIN_EXE_iii"));
                pull.args(["image", "pull", image]).env("HOME", dir);
                vec![pull]
            }
            Peer::Podman => {
                let mut pull = Command::new("podman");
                pull.arg("--root").arg(path("root"));
                pull.arg("--runroot").arg(runroot());
                pull.args(["pull", "--quiet", "--tls-verify=false", image]);
                vec![pull]
            }
            Peer::SkopeoUmoci => {
                let mut copy = Command::new("skopeo");
                copy.args([
                    "--insecure-policy",
                    "copy",
                    "--quiet",
                    "--src-tls-verify=false",
                ]);
                copy.arg(format!("docker://{image}"));
                copy.arg(format!("oci:{}:one", path("layout").display()));
                let mut unpack = Command::new("umoci");
                unpack.args(["unpack", "--image"]);
                unpack.arg(format!("{}:one", path("layout").display()));
                unpack.arg(path("bundle"));
                vec![copy, unpack]
            }
        }
    }

    /// Why it takes no part, if it does not.
    fn missing(self) -> Option<String> {
        let programs: &[&str] = match self {
            Peer::Ours => &[],
            Peer::Podman => &["podman"],
            Peer::SkopeoUmoci => &["skopeo", "umoci"],
        };
        programs.iter().find_map(|program| {
            let mut command = Command::new(program);
            let error = command.arg("--version").output().err()?;
            Some(format!("{program}: {error}"))
        })
    }
}

/// Where podman keeps what is not kept; it takes no path of more than 50 bytes.
fn runroot() -> PathBuf {
    std::env::temp_dir().join(format!("podman-{}", std::process::id()))
}

/// A registry with the image in it. Dropped, it is killed.
struct Registry {
    child: Child,
    image: String,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Registry {
    fn start(dir: &Path) -> Result<Self> {
        let here = Path::new("127.0.0.1");
        let listener = TcpListener::bind("127.0.0.1:0").map_err(failed("binding", here))?;
        let address = listener.local_addr().map_err(failed("binding", here))?;
        drop(listener);
        let config = dir.join("config.yml");
        // JSON is YAML.
        let text = serde_json::json!({
            "version": 0.1,
            "log": { "level": "error" },
            "storage": { "filesystem": { "rootdirectory": dir.join("registry") } },
            "http": { "addr": address.to_string() },
        });
        fs::write(&config, text.to_string()).map_err(failed("writing", &config))?;
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&config);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let child = command
            .spawn()
            .map_err(|error| went_wrong(&command, &error))?;
        let registry = Self {
            child,
            image: format!("{address}/base:1"),
        };
        let begin = Instant::now();
        while TcpStream::connect(address).is_err() {
            if begin.elapsed() > START {
                return Err(went_wrong(&command, &"it does not listen"));
            }
            std::thread::sleep(GLANCE);
        }
        Ok(registry)
    }

    /// Makes the image of the base's archive, compressed with gzip. Returns the bytes of the
    /// archive.
    fn fill(&self, dir: &Path) -> Result<u64> {
        let layout = dir.join("layout");
        let image = format!("{}:one", layout.display());
        run(Command::new("umoci")
            .args(["init", "--layout"])
            .arg(&layout))?;
        run(Command::new("umoci").args(["new", "--image", &image]))?;
        let archive = base()?;
        let metadata = fs::metadata(&archive).map_err(failed("reading", &archive))?;
        let mut add = Command::new("umoci");
        run(add
            .args(["raw", "add-layer", "--image", &image])
            .arg(&archive))?;
        let mut push = Command::new("skopeo");
        push.args([
            "--insecure-policy",
            "copy",
            "--quiet",
            "--dest-tls-verify=false",
        ]);
        push.arg(format!("oci:{image}"))
            .arg(format!("docker://{}", self.image));
        run(&mut push)?;
        fs::remove_dir_all(&layout).map_err(failed("removing", &layout))?;
        Ok(metadata.len())
    }
}

/// The archive of a base made from Debian packages.
fn base() -> Result<PathBuf> {
    let bases = corpus::cache()?.join("bases");
    let mut command = Command::new(corpus::repository("scripts/make-base"));
    run(command.arg(BASE).arg(&bases))?;
    Ok(bases.join(format!("{BASE}.tar")))
}

/// Runs the commands one after the other. Returns how long they took, and the highest resident
/// memory of one in MiB.
fn measure(commands: Vec<Command>) -> Result<(Duration, f64)> {
    let begin = Instant::now();
    let mut highest: f64 = 0.0;
    for mut command in commands {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut child = command
            .spawn()
            .map_err(|error| went_wrong(&command, &error))?;
        let status = loop {
            let ended = child.try_wait();
            if let Some(status) = ended.map_err(|error| went_wrong(&command, &error))? {
                break status;
            }
            let status = PathBuf::from(format!("/proc/{}/status", child.id()));
            highest = highest.max(field_mib(&status, "VmHWM"));
            std::thread::sleep(GLANCE);
        };
        if !status.success() {
            return Err(went_wrong(&command, &status));
        }
    }
    Ok((begin.elapsed(), highest))
}

/// Takes away what a peer wrote; podman's overlay may be mounted.
fn clear(peer: Peer, dir: &Path) -> Result<()> {
    if peer == Peer::Podman {
        let mut reset = Command::new("podman");
        reset.arg("--root").arg(dir.join("root"));
        reset.arg("--runroot").arg(runroot());
        run(reset.args(["rmi", "--all", "--force"]))?;
        // It keeps a bind mount of its directory on itself.
        let _ = Command::new("umount")
            .arg(dir.join("root/overlay"))
            .output();
        fs::remove_dir_all(runroot()).map_err(failed("removing", &runroot()))?;
    }
    fs::remove_dir_all(dir).map_err(failed("removing", dir))
}

fn bench(rounds: usize) -> Result<bool> {
    let interrupt = Interrupt::catch()?;
    let cache = corpus::cache()?;
    let scratch = TempDir::with_prefix_in("pull-", &cache).map_err(failed("making", &cache))?;
    let registry = Registry::start(scratch.path())?;
    let bytes = registry.fill(scratch.path())?;
    let peers: Vec<Peer> = Peer::ALL
        .into_iter()
        .filter(|peer| match peer.missing() {
            Some(why) => {
                skip(peer.name(), why);
                false
            }
            None => true,
        })
        .collect();
    let mut taken = vec![(Samples::default(), 0.0_f64); peers.len()];
    for round in 0..rounds {
        for (peer, (samples, memory)) in peers.iter().zip(&mut taken) {
            interrupt.check()?;
            let dir = scratch.path().join(format!("{peer:?}-{round}"));
            fs::create_dir(&dir).map_err(failed("making", &dir))?;
            let (time, mib) = measure(peer.commands(&dir, &registry.image))?;
            samples.0.push(time);
            *memory = memory.max(mib);
            clear(*peer, &dir)?;
        }
    }
    let rows: Vec<Vec<String>> = peers
        .iter()
        .zip(&taken)
        .map(|(peer, (samples, memory))| {
            vec![
                peer.name().to_owned(),
                samples.show(),
                taken[0].0.show_ratio(samples),
                format!("{memory:.0}"),
            ]
        })
        .collect();
    println!(
        "\nAn image of one gzip layer, {} MiB unpacked, from docker-registry on loopback",
        bytes >> 20
    );
    support::table(&["", "ms", "ours / this", "highest memory, MiB"], &rows);
    let mut bounds = Bounds::default();
    let best = taken.iter().skip(1).map(|(samples, _)| samples);
    if let Some(best) = best.min_by(|a, b| a.median().total_cmp(&b.median())) {
        let (ratio, ..) = taken[0].0.ratio(best);
        bounds.at_most("pull, of the best peer's time", ratio, OF_BEST, "");
    }
    bounds.at_most("resident memory", taken[0].1, MAX_RESIDENT_MIB, " MiB");
    Ok(bounds.print())
}

fn main() -> ExitCode {
    support::print_machine();
    let result: std::result::Result<bool, Error> = bench(support::option("--rounds", 3));
    support::end("pull", result)
}
