//! Parts shared by the benches: errors, commands, samples and their comparison, scratch
//! directories.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Why a bench could not go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither `XDG_CACHE_HOME` nor a home directory.
    #[error("no home directory to keep the corpus in")]
    NoHome,
    /// A file or directory.
    #[error("{what} {path} failed: {source}")]
    Io {
        /// The operation.
        what: &'static str,
        /// The object of the operation.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A program.
    #[error("{what}: {why}")]
    Command {
        /// The command line.
        what: String,
        /// Its message.
        why: String,
    },
    /// Ctrl-C.
    #[error("interrupted")]
    Interrupted,
}

/// The result of a step of a bench.
pub type Result<T> = std::result::Result<T, Error>;

/// Makes an [`Error::Io`].
pub fn failed<'a>(what: &'static str, path: &'a Path) -> impl Fn(std::io::Error) -> Error + 'a {
    move |source| Error::Io {
        what,
        path: path.to_owned(),
        source,
    }
}

/// Makes an [`Error::Command`].
pub fn went_wrong(command: &Command, why: &impl ToString) -> Error {
    Error::Command {
        what: format!("{command:?}"),
        why: why.to_string(),
    }
}

/// Runs a command to its end, which has to be a good one.
pub fn run(command: &mut Command) -> Result<Output> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| went_wrong(command, &error))?;
    if output.status.success() {
        return Ok(output);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let why = format!("{}: {}", output.status, said.trim());
    Err(went_wrong(command, &why))
}

/// A running command, killed and reaped when dropped.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The number of a field in a file that is made up as `/proc/PID/status` is; KiB, where that says
/// so.
pub fn field(path: &Path, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(path).ok()?;
    let mut lines = text.lines();
    let rest = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    rest.trim().trim_end_matches(" kB").parse().ok()
}

/// The same in MiB, of a field in KiB; NaN without that field.
pub fn field_mib(path: &Path, name: &str) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "nobody has 2^52 KiB")]
    field(path, name).map_or(f64::NAN, |kib| kib as f64 / 1024.0)
}

/// Says that something was not measured.
pub fn skip(what: &str, why: impl std::fmt::Display) {
    eprintln!("SKIPPED: {what}: {why}");
}

/// Set by SIGINT and SIGTERM, so that everything is put away before the end.
#[derive(Debug, Clone)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// From now on signals are noted instead of ending the process.
    pub fn catch() -> Result<Self> {
        let flag = Arc::new(AtomicBool::new(false));
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            signal_hook::flag::register(signal, flag.clone())
                .map_err(failed("catching signals of", Path::new("this process")))?;
        }
        Ok(Self(flag))
    }

    /// Fails if a signal came.
    pub fn check(&self) -> Result<()> {
        if self.0.load(Ordering::Relaxed) {
            return Err(Error::Interrupted);
        }
        Ok(())
    }
}

/// The value of the option `--NAME VALUE`, else `default`.
pub fn option(name: &str, default: usize) -> usize {
    let mut args = std::env::args().skip_while(|arg| arg != name).skip(1);
    args.next()
        .and_then(|value| value.parse().ok())
        .unwrap_or(default)
}

/// The duration of one thing in each round.
#[derive(Debug, Clone, Default)]
pub struct Samples(pub Vec<Duration>);

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        count if count % 2 == 1 => values[count / 2],
        count => f64::midpoint(values[count / 2 - 1], values[count / 2]),
    }
}

fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
        (low.min(value), high.max(value))
    })
}

impl Samples {
    fn millis(&self) -> impl Iterator<Item = f64> + '_ {
        self.0.iter().map(|time| time.as_secs_f64() * 1e3)
    }

    /// The median, in milliseconds.
    pub fn median(&self) -> f64 {
        median(self.millis())
    }

    /// `median (min–max)` in milliseconds.
    pub fn show(&self) -> String {
        let (low, high) = range(self.millis());
        let digits = usize::from(high < 100.0);
        format!(
            "{:.digits$} ({low:.digits$}–{high:.digits$})",
            self.median()
        )
    }

    /// Ratio of the medians, and the lowest and highest ratio of one round.
    pub fn ratio(&self, peer: &Samples) -> (f64, f64, f64) {
        let rounds = self
            .millis()
            .zip(peer.millis())
            .map(|(ours, theirs)| ours / theirs);
        let (low, high) = range(rounds);
        (self.median() / peer.median(), low, high)
    }

    /// The ratio to a peer, in words.
    pub fn show_ratio(&self, peer: &Samples) -> String {
        let (ratio, low, high) = self.ratio(peer);
        format!("{ratio:.2} ({low:.2}–{high:.2})")
    }
}

/// Bounds of the numbers, and whether they held.
#[derive(Debug, Default)]
pub struct Bounds {
    missed: usize,
    lines: Vec<String>,
}

impl Bounds {
    /// Notes that `value` had to be at most `bound`.
    pub fn at_most(&mut self, what: &str, value: f64, bound: f64, unit: &str) {
        let line = format!("{what}: {value:.2}{unit}, at most {bound}{unit}");
        self.note(value <= bound, &line);
    }

    /// Notes that there had to be at most `bound` of something.
    pub fn count(&mut self, what: &str, count: u64, bound: u64) {
        self.note(count <= bound, &format!("{what}: {count}, at most {bound}"));
    }

    fn note(&mut self, holds: bool, line: &str) {
        self.missed += usize::from(!holds);
        self.lines
            .push(format!("{}  {line}", if holds { "PASS" } else { "FAIL" }));
    }

    /// Prints all of them. Whether all held.
    pub fn print(&self) -> bool {
        println!();
        for line in &self.lines {
            println!("{line}");
        }
        self.missed == 0
    }
}

/// Prints a table as Markdown.
pub fn table(head: &[&str], rows: &[Vec<String>]) {
    println!("\n| {} |", head.join(" | "));
    println!("|{}", "---|".repeat(head.len()));
    for row in rows {
        println!("| {} |", row.join(" | "));
    }
}

/// Makes the result of a bench its exit code: 1 where a bound was missed, 2 where something went
/// wrong.
pub fn end(bench: &str, result: Result<bool>) -> ExitCode {
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{bench}: {error}");
            ExitCode::from(2)
        }
    }
}

/// The machine and the day's load, for the reader of the numbers.
pub fn print_machine() {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let cpu = read("/proc/cpuinfo");
    let model = cpu
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map_or("unknown", |rest| rest.trim_start_matches([':', '\t', ' ']));
    println!(
        "Linux {}, {cpus} CPUs ({model}), load {}",
        read("/proc/sys/kernel/osrelease").trim(),
        read("/proc/loadavg")
            .split(' ')
            .take(3)
            .collect::<Vec<_>>()
            .join(" "),
    );
}
