//! How an upper grows: making very many files, opening it again, and new files that are synced,
//! beside ext4 and kernel overlayfs on the same disk; see benches/README.md.

#[allow(dead_code, reason = "each bench uses its part")]
mod support;

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use iii_overlay::fs::{Caller, Filesystem as _, Special};
use iii_overlay::ino::ROOT;
use iii_overlay::{Objects, Overlay, OverlayOptions};
use iii_store::ObjectId;
use support::{Bounds, Interrupt, Result, Running, Samples, failed, run, skip, went_wrong};
use tempfile::TempDir;

/// Files in one directory.
const SHARD: usize = 1000;
/// The fewest files of which growth is measured.
const SMALLEST: usize = 10_000;
/// New files that are synced, in each round.
const SYNCED: usize = 200;
/// Longest that opening an upper with a million files may take, in seconds.
const OPEN_LIMIT: f64 = 5.0;
/// Most memory that opening it may take, in MiB.
const MEMORY_LIMIT: f64 = 700.0;
/// Longest that an operation may take while files are made, in milliseconds.
const LONGEST: f64 = 100.0;
/// How much longer, for each file, the largest upper may take to open than the smallest.
const LINEAR: f64 = 2.0;
/// How much longer a new file that is synced may take than on kernel overlayfs.
const SYNC_LIMIT: f64 = 1.3;
/// Longest wait for a mount.
const MOUNT_LIMIT: Duration = Duration::from_secs(60);

/// No layers, so no contents.
struct Nothing;

impl Objects for Nothing {
    fn read_at(&self, _: &ObjectId, _: &mut [u8], _: u64) -> io::Result<usize> {
        Err(io::ErrorKind::NotFound.into())
    }

    fn copy_to(&self, _: &ObjectId, _: u64, _: &File) -> io::Result<()> {
        Err(io::ErrorKind::NotFound.into())
    }
}

fn overlay(upper: &Path) -> Overlay {
    let none = |_: &_| Err("no layers".into());
    let options = OverlayOptions::default();
    Overlay::open_with(Arc::new(Nothing), Vec::new(), &none, upper, options)
        .unwrap_or_else(|error| panic!("{error}"))
}

/// Makes files, each by `make`, which is given its number, and returns the longest that took.
fn make(files: usize, mut make: impl FnMut(usize)) -> Duration {
    let mut longest = Duration::ZERO;
    for file in 0..files {
        let begin = Instant::now();
        make(file);
        longest = longest.max(begin.elapsed());
    }
    longest
}

fn make_ours(upper: &Path, files: usize) -> Duration {
    let overlay = overlay(upper);
    let mut dir = ROOT;
    let who = Caller::default();
    make(files, |file| {
        if file % SHARD == 0 {
            let name = format!("dir-{}", file / SHARD);
            let made = overlay.mkdir(who, ROOT, name.as_bytes(), 0o755);
            dir = made.expect("a directory").ino;
        }
        let name = format!("file-{file:08}");
        let made = overlay.mknod(who, dir, name.as_bytes(), 0o644, Special::File);
        overlay.forget(made.expect("a file").ino, 1);
    })
}

fn make_plain(root: &Path, files: usize) -> Duration {
    let mut dir = PathBuf::new();
    make(files, |file| {
        if file % SHARD == 0 {
            dir = root.join(format!("dir-{}", file / SHARD));
            fs::create_dir(&dir).expect("a directory");
        }
        File::create(dir.join(format!("file-{file:08}"))).expect("a file");
    })
}

/// Runs in a process of its own, so that its memory is its own. It prints seconds, the longest
/// operation in seconds, and its highest resident memory in MiB.
fn child(what: &str, dir: &Path, files: usize) {
    let begin = Instant::now();
    let longest = match what {
        "make" => make_ours(dir, files),
        "plain" => make_plain(dir, files),
        _ => {
            let _overlay = overlay(dir);
            report(begin.elapsed(), Duration::ZERO);
            return;
        }
    };
    report(begin.elapsed(), longest);
}

fn report(took: Duration, longest: Duration) {
    let peak = support::field_mib(Path::new("/proc/self/status"), "VmHWM");
    println!("{} {} {peak}", took.as_secs_f64(), longest.as_secs_f64());
}

/// Measurements of a [`child`].
#[derive(Debug, Clone, Copy)]
struct Growth {
    seconds: f64,
    longest: f64,
    peak: f64,
}

fn measure(what: &str, dir: &Path, files: usize) -> Result<Growth> {
    let exe = std::env::current_exe().map_err(failed("finding", Path::new("this program")))?;
    let mut command = Command::new(exe);
    command.args(["--child", what]).arg(dir);
    let output = run(command.arg(files.to_string()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let numbers: Vec<f64> = text.split_whitespace().flat_map(str::parse).collect();
    match numbers[..] {
        [seconds, longest, peak] => Ok(Growth {
            seconds,
            longest,
            peak,
        }),
        _ => Err(went_wrong(&command, &text)),
    }
}

/// A mount, unmounted when dropped.
struct Mount {
    at: PathBuf,
    _server: Option<Running>,
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.at, rustix::mount::UnmountFlags::DETACH);
    }
}

fn dir(scratch: &Path, name: &str) -> Result<PathBuf> {
    let path = scratch.join(name);
    fs::create_dir_all(&path).map_err(failed("making", &path))?;
    Ok(path)
}

fn mount_overlayfs(scratch: &Path) -> Result<Mount> {
    let at = dir(scratch, "merged")?;
    let layers = format!(
        "lowerdir={},upperdir={},workdir={}",
        dir(scratch, "lower")?.display(),
        dir(scratch, "upper")?.display(),
        dir(scratch, "work")?.display()
    );
    let mut mount = Command::new("mount");
    run(mount
        .args(["-t", "overlay", "overlay", "-o", &layers])
        .arg(&at))?;
    Ok(Mount { at, _server: None })
}

fn mount_ours(scratch: &Path, example: &Path) -> Result<Mount> {
    let at = dir(scratch, "merged")?;
    let mut command = Command::new(example);
    command.arg("--upper").arg(dir(scratch, "upper")?).arg(&at);
    command.env("TMPDIR", scratch);
    command.stdin(Stdio::null());
    // It counts its requests at its end.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let server: std::io::Result<Child> = command.spawn();
    let server = Running(server.map_err(|error| went_wrong(&command, &error))?);
    let begin = Instant::now();
    let is_mounted = || {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let mut points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
        points.any(|point| Some(point) == at.to_str())
    };
    while !is_mounted() {
        if begin.elapsed() > MOUNT_LIMIT {
            return Err(went_wrong(&command, &"did not mount in time"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(Mount {
        at,
        _server: Some(server),
    })
}

/// New files of 1 KiB, each synced.
fn sync_files(root: &Path, round: usize) -> Result<Duration> {
    let begin = Instant::now();
    for file in 0..SYNCED {
        let path = root.join(format!("synced-{round}-{file}"));
        let synced = File::create(&path).and_then(|mut file| {
            file.write_all(&[b'x'; 1024])?;
            file.sync_all()
        });
        synced.map_err(failed("syncing", &path))?;
    }
    Ok(begin.elapsed())
}

fn compare_syncs(
    scratch: &Path,
    rounds: usize,
    interrupt: &Interrupt,
    bounds: &mut Bounds,
) -> Result<()> {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--release", "--quiet", "--example", "mount"]);
    run(cargo.args(["-p", "iii-overlay"]))?;
    let exe = std::env::current_exe().map_err(failed("finding", Path::new("this program")))?;
    let release = exe.ancestors().nth(2).unwrap_or(Path::new("."));
    let ours = mount_ours(&dir(scratch, "ours")?, &release.join("examples/mount"))?;
    let kernel = mount_overlayfs(&dir(scratch, "kernel")?)?;
    let plain = dir(scratch, "plain")?;
    let mut samples: [Samples; 3] = Default::default();
    for round in 0..rounds {
        for (root, samples) in [&ours.at, &kernel.at, &plain].into_iter().zip(&mut samples) {
            interrupt.check()?;
            samples.0.push(sync_files(root, round)?);
        }
    }
    let [ours, kernel, plain] = samples;
    let (to_ext4, ..) = ours.ratio(&plain);
    let (to_overlayfs, low, high) = ours.ratio(&kernel);
    println!(
        "\n{SYNCED} new files, each synced: {to_overlayfs:.2} ({low:.2}–{high:.2}) times \
         overlayfs, {to_ext4:.2} times ext4"
    );
    let what = "a new file with fsync, to overlayfs";
    bounds.at_most(what, to_overlayfs, SYNC_LIMIT, " times");
    Ok(())
}

fn grow(scratch: &Path, largest: usize, interrupt: &Interrupt, bounds: &mut Bounds) -> Result<()> {
    let mut rows = Vec::new();
    let mut opened: Vec<(usize, Growth)> = Vec::new();
    let mut longest: f64 = 0.0;
    let mut files = SMALLEST;
    while files <= largest {
        interrupt.check()?;
        eprintln!("{files} files");
        let upper = scratch.join(format!("upper-{files}"));
        let made = measure("make", &upper, files)?;
        let open = measure("open", &upper, files)?;
        let plain = measure("plain", &dir(scratch, &format!("plain-{files}"))?, files)?;
        let kernel = match mount_overlayfs(&dir(scratch, &format!("kernel-{files}"))?) {
            Ok(mount) => Some(measure("plain", &mount.at, files)?),
            Err(error) => {
                skip("overlayfs", error);
                None
            }
        };
        longest = longest.max(made.longest * 1000.0);
        opened.push((files, open));
        let times = |growth: Option<Growth>| {
            growth.map_or("—".into(), |growth| {
                format!("{:.2} s, {:.1} ms", growth.seconds, growth.longest * 1000.0)
            })
        };
        rows.push(vec![
            files.to_string(),
            times(Some(made)),
            times(Some(plain)),
            times(kernel),
            format!("{:.2} s", open.seconds),
            format!("{:.0} MiB", open.peak),
        ]);
        files *= 10;
    }
    let head = [
        "files",
        "making them, longest operation",
        "ext4",
        "overlayfs",
        "opening ours",
        "memory",
    ];
    support::table(&head, &rows);
    bounds.at_most("the longest operation", longest, LONGEST, " ms");
    if let (Some((few, small)), Some((many, large))) = (opened.first(), opened.last()) {
        #[expect(clippy::cast_precision_loss, reason = "few enough")]
        let (few, many) = (*few as f64, *many as f64);
        let share = many / 1e6;
        let limit = (OPEN_LIMIT * share).max(0.5);
        bounds.at_most("opening the largest", large.seconds, limit, " s");
        let limit = (MEMORY_LIMIT * share).max(50.0);
        bounds.at_most("memory of opening it", large.peak, limit, " MiB");
        let grows = (large.seconds / many) / (small.seconds / few);
        bounds.at_most(
            "time for each file, to the smallest",
            grows,
            LINEAR,
            " times",
        );
    }
    Ok(())
}

fn bench() -> Result<bool> {
    let interrupt = Interrupt::catch()?;
    let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache"));
    let cache = cache.or_else(home).ok_or(support::Error::NoHome)?;
    let cache = dir(&cache, "iii-tests")?;
    let scratch = TempDir::with_prefix_in("growth-", &cache)
        .map_err(failed("making a directory in", &cache))?;
    let mut bounds = Bounds::default();
    support::print_machine();
    let rounds = support::option("--rounds", 5);
    compare_syncs(scratch.path(), rounds, &interrupt, &mut bounds)?;
    let largest = support::option("--largest", 1_000_000);
    grow(scratch.path(), largest, &interrupt, &mut bounds)?;
    Ok(bounds.print())
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    if let [_, flag, what, dir, files] = &args[..]
        && flag == "--child"
    {
        child(what, Path::new(dir), files.parse().unwrap_or_default());
        return ExitCode::SUCCESS;
    }
    support::end("growth", bench())
}
