//! A real Linux kernel on a root that we serve: in QEMU without KVM, or as an ordinary process.
//! Part of the tests and of a bench.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// How long a machine may take from its start to its end.
const LIMIT: Duration = Duration::from_secs(120);

/// The way to run a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// Debian's kernel in QEMU, which emulates the processor.
    Emulated,
    /// User-Mode Linux: a process of this machine's, and far quicker.
    UserMode,
}

impl Kernel {
    pub const ALL: [Self; 2] = [Self::UserMode, Self::Emulated];

    pub fn name(self) -> &'static str {
        match self {
            Self::Emulated => "QEMU without KVM",
            Self::UserMode => "User-Mode Linux",
        }
    }

    /// The directory with the kernel and its initrd, below `cache`, or the reason for its absence.
    pub fn made(self, cache: &Path) -> Result<&'static Path, &'static str> {
        static MADE: [OnceLock<Result<PathBuf, String>>; 2] = [OnceLock::new(), OnceLock::new()];
        let made = MADE[self as usize].get_or_init(|| {
            let scripts = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts");
            match self {
                Self::Emulated => make(&format!("{scripts}/make-guest"), cache),
                Self::UserMode => run(&format!("{scripts}/make-uml"), cache),
            }
        });
        made.as_deref().map_err(String::as_str)
    }
}

/// Makes a directory with vmlinuz and initrd below `cache` with `script`, or returns the reason why
/// not.
pub fn make(script: &str, cache: &Path) -> Result<PathBuf, String> {
    if !cfg!(target_arch = "x86_64") {
        return Err("only for x86_64".into());
    }
    let version = Command::new("qemu-system-x86_64").arg("--version").output();
    version.map_err(|error| format!("qemu-system-x86_64: {error}"))?;
    run(script, cache)
}

fn run(script: &str, cache: &Path) -> Result<PathBuf, String> {
    let run = Command::new(script)
        .arg(cache)
        .output()
        .map_err(|error| error.to_string())?;
    if run.status.success() {
        return Ok(String::from_utf8_lossy(&run.stdout).trim().into());
    }
    let stderr = String::from_utf8_lossy(&run.stderr);
    Err(stderr.lines().last().unwrap_or("failed").to_owned())
}

/// An archive with one file, as the kernel takes it behind another.
fn cpio(name: &str, contents: &[u8]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (name, mode, contents) in [(name, 0o100_755, contents), ("TRAILER!!!", 0, &[][..])] {
        archive.extend(b"070701");
        let (len, name_len) = (contents.len(), name.len() + 1);
        for field in [0, mode, 0, 0, 1, 0, len, 0, 0, 0, 0, name_len, 0] {
            write!(archive, "{field:08x}").unwrap();
        }
        for bytes in [name.as_bytes(), contents] {
            archive.extend(bytes);
            if bytes.as_ptr() == name.as_ptr() {
                archive.push(0);
            }
            archive.resize(archive.len().next_multiple_of(4), 0);
        }
    }
    archive
}

/// The initrd of `made` with `job` in it, in a directory of its own.
fn with_job(made: &Path, job: &str) -> (TempDir, PathBuf) {
    let dir = TempDir::with_prefix("vm-").unwrap();
    let initrd = dir.path().join("initrd");
    let mut archives = fs::read(made.join("initrd")).unwrap();
    archives.extend(cpio("job", format!("set -eu\n{job}\n").as_bytes()));
    fs::write(&initrd, archives).unwrap();
    (dir, initrd)
}

/// A running machine. Dropped, it is killed.
pub struct Vm {
    process: Child,
    console: Receiver<String>,
    seen: Vec<String>,
    keyboard: ChildStdin,
    until: Instant,
    _dir: TempDir,
    /// Emulated, they are slow enough one by one.
    _alone: Option<MutexGuard<'static, ()>>,
}

impl Vm {
    /// Boots the kernel in `made` with a root that is served at `socket`, and has it run the shell
    /// script `job` there.
    pub fn boot(kernel: Kernel, made: &Path, socket: &Path, job: &str) -> Self {
        if kernel == Kernel::Emulated {
            let mut qemu = Command::new("qemu-system-x86_64");
            qemu.args("-accel tcg -cpu qemu64 -m 384".split(' '))
                .args("-M q35,memory-backend=mem,smbus=off,sata=off,hpet=off".split(' '))
                .arg("-object")
                .arg("memory-backend-memfd,id=mem,size=384M,share=on")
                .arg("-append")
                .arg("console=ttyS0 quiet panic=-1 mitigations=off nokaslr")
                .arg("-chardev")
                .arg(format!("socket,id=fs,path={}", socket.display()))
                .arg("-device")
                .arg("vhost-user-fs-pci,queue-size=1024,chardev=fs,tag=root");
            return Self::emulate(qemu, made, job, LIMIT);
        }
        let (dir, initrd) = with_job(made, job);
        let mut linux = Command::new(made.join("linux"));
        linux
            // It puts files under its home directory even where told to put them elsewhere.
            .env("HOME", dir.path())
            .args("mem=384M con=null con0=fd:0,fd:1 quiet panic=-1".split(' '))
            // The number of the device, of a file system.
            .arg(format!("virtio_uml.device={}:26", socket.display()))
            .arg(format!("initrd={}", initrd.display()))
            .arg(format!("uml_dir={}/", dir.path().display()));
        Self::start(linux, dir, LIMIT, None)
    }

    /// Boots what is in `made` on the machine `qemu`, which runs the shell script `job` and may
    /// take as long as `limit`.
    pub fn emulate(mut qemu: Command, made: &Path, job: &str, limit: Duration) -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let (dir, initrd) = with_job(made, job);
        qemu.args("-nodefaults -no-reboot -display none -serial stdio".split(' '))
            .arg("-kernel")
            .arg(made.join("vmlinuz"))
            .arg("-initrd")
            .arg(&initrd);
        Self::start(qemu, dir, limit, Some(alone))
    }

    fn start(
        mut command: Command,
        dir: TempDir,
        limit: Duration,
        alone: Option<MutexGuard<'static, ()>>,
    ) -> Self {
        let mut process = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (sender, console) = channel();
        let stdout = process.stdout.take().unwrap();
        thread::spawn(move || {
            for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Self {
            keyboard: process.stdin.take().unwrap(),
            process,
            console,
            seen: Vec::new(),
            until: Instant::now() + limit,
            _dir: dir,
            _alone: alone,
        }
    }

    /// Blocks until the console shows a line that begins with `beginning`, and returns the rest of
    /// it.
    pub fn wait_for(&mut self, beginning: &str) -> String {
        loop {
            let left = self.until.saturating_duration_since(Instant::now());
            let Ok(line) = self.console.recv_timeout(left) else {
                let _ = self.process.kill();
                panic!("no {beginning:?} on the console:\n{}", self.seen.join("\n"));
            };
            self.seen.push(line.clone());
            if let Some(rest) = line.strip_prefix(beginning) {
                return rest.trim().to_owned();
            }
        }
    }

    /// Types a line.
    pub fn type_line(&mut self, line: &str) {
        self.keyboard
            .write_all(format!("{line}\n").as_bytes())
            .unwrap();
    }

    /// Blocks until the job has ended, which has to be with 0, and the machine with it. Returns
    /// what was on the console.
    pub fn finish(mut self) -> Vec<String> {
        let status = self.wait_for("EXIT ");
        assert_eq!(status, "0", "{}", self.seen.join("\n"));
        // The console closes when the machine goes.
        loop {
            let left = self.until.saturating_duration_since(Instant::now());
            match self.console.recv_timeout(left) {
                Ok(line) => self.seen.push(line),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => panic!("the machine did not power off"),
            }
        }
        assert!(self.process.wait().unwrap().success());
        std::mem::take(&mut self.seen)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
