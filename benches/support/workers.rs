//! Parts shared by the benches of workers: the finished program in a home of its own, and projects
//! for it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::corpus;
use crate::support::{Bounds, Interrupt, Result, failed, print_machine, run};

/// The base that a JavaScript project gets without a word.
pub const IMAGE: &str = "docker.io/iiidev/node:latest";
/// The engine's port, on which no process listens.
pub const PORT: &str = "1";

/// A home directory, and with it a store, of its own.
pub struct Home {
    pub dir: TempDir,
}

impl Home {
    /// One in `scratch`, which has `base` as [`IMAGE`].
    pub fn new(scratch: &Path, base: &Path) -> Result<Self> {
        let dir = TempDir::with_prefix_in("home-", scratch);
        let home = Home {
            dir: dir.map_err(failed("making a directory in", scratch))?,
        };
        run(home
            .iii(&["image", "import"])
            .arg(base)
            .args(["--as", IMAGE]))?;
        Ok(home)
    }

    /// The program, with nothing of the caller's settings.
    pub fn iii(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_iii"));
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("III_") {
                command.env_remove(&name);
            }
        }
        command
            .args(args)
            .env("HOME", self.dir.path())
            .env("III_CONFIG_PATH", self.dir.path().join("config.yaml"))
            .current_dir(self.dir.path());
        command
    }

    /// `worker dev` in namespaces.
    pub fn dev(&self, project: &Path) -> Command {
        let mut command = self.iii(&["worker", "dev", "--runtime", "namespace", "--port", PORT]);
        command.arg(project);
        command
    }
}

/// The surroundings of a bench of workers.
pub struct Bench {
    pub interrupt: Interrupt,
    scratch: TempDir,
    /// A busybox base.
    pub base: PathBuf,
    /// A home with that.
    pub home: Home,
}

impl Bench {
    /// For projects, and whatever else goes in the end.
    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// The script under the least that is a sandbox of the same kind as ours.
    pub fn bare(&self, script: &str) -> Command {
        let mut bare = Command::new("unshare");
        bare.args(["-Urmpf", "--mount-proc", "chroot"])
            .arg(&self.base)
            .args(["/bin/sh", "-ec", script]);
        bare
    }
}

/// Runs `measure` and prints the bounds that it notes. Whether all held.
pub fn bench(measure: impl FnOnce(&Bench, &mut Bounds) -> Result<()>) -> Result<bool> {
    let interrupt = Interrupt::catch()?;
    let cache = corpus::cache()?;
    let scratch = TempDir::with_prefix_in("scratch-", &cache)
        .map_err(failed("making a directory in", &cache))?;
    let base = scratch.path().join("busybox");
    run(Command::new(corpus::repository("scripts/make-busybox-base")).arg(&base))?;
    let home = Home::new(scratch.path(), &base)?;
    let bench = Bench {
        interrupt,
        scratch,
        base,
        home,
    };
    let mut bounds = Bounds::default();
    print_machine();
    measure(&bench, &mut bounds)?;
    Ok(bounds.print())
}

/// Writes a file, and makes its directory if it is missing.
pub fn write(path: &Path, text: &str) -> Result<()> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).map_err(failed("making", dir))?;
    }
    fs::write(path, text).map_err(failed("writing", path))
}

/// A project directory called `name` with a manifest of these scripts, and `files` small source
/// files, no two the same and none as in another project.
pub fn project(
    scratch: &Path,
    name: &str,
    files: usize,
    install: &str,
    start: &str,
) -> Result<PathBuf> {
    let dir = scratch.join(name);
    let manifest = format!(
        "name: {name}\nruntime:\n  kind: javascript\nscripts:\n  setup: \"true\"\n  install: {}\n  start: {}\n",
        serde_json::json!(install),
        serde_json::json!(start),
    );
    write(&dir.join("iii.worker.yaml"), &manifest)?;
    for number in 0..files {
        let path = dir.join(format!("src/{}/{}/{number}.js", number / 1000, number / 50));
        let line = format!("exports.value{number} = '{name}';\n");
        write(&path, &line.repeat(1 + number % 100))?;
    }
    Ok(dir)
}
