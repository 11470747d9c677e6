//! A virtual machine with a real Linux kernel, in QEMU without KVM. Part of the tests and of a bench.

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

/// The directory with vmlinuz and initrd, below `cache`; says why where there is none.
pub fn guest(cache: &Path) -> Result<&'static Path, &'static str> {
    static GUEST: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let made = GUEST.get_or_init(|| {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/make-guest");
        make(script, cache)
    });
    made.as_deref().map_err(String::as_str)
}

/// Has `script` make a directory with vmlinuz and initrd below `cache`; says why where that cannot be.
pub fn make(script: &str, cache: &Path) -> Result<PathBuf, String> {
    if !cfg!(target_arch = "x86_64") {
        return Err("only for x86_64".into());
    }
    let version = Command::new("qemu-system-x86_64").arg("--version").output();
    version.map_err(|error| format!("qemu-system-x86_64: {error}"))?;
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

/// A running machine. Dropped, it is killed.
pub struct Vm {
    qemu: Child,
    console: Receiver<String>,
    seen: Vec<String>,
    keyboard: ChildStdin,
    until: Instant,
    _dir: TempDir,
    /// They are slow enough one by one.
    _alone: MutexGuard<'static, ()>,
}

impl Vm {
    /// Boots a machine whose root is served at `socket`, and which runs the shell script `job` there.
    pub fn boot(guest: &Path, socket: &Path, job: &str) -> Self {
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
        Self::start(qemu, guest, job, LIMIT)
    }

    /// Boots what is in `made` on the machine `qemu`, which runs the shell script `job` and may take as long as `limit`.
    pub fn start(mut qemu: Command, made: &Path, job: &str, limit: Duration) -> Self {
        static ALONE: Mutex<()> = Mutex::new(());
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let dir = tempfile::tempdir().unwrap();
        let initrd = dir.path().join("initrd");
        let mut archives = fs::read(made.join("initrd")).unwrap();
        archives.extend(cpio("job", format!("set -eu\n{job}\n").as_bytes()));
        fs::write(&initrd, archives).unwrap();
        let mut qemu = qemu
            .args("-nodefaults -no-reboot -display none -serial stdio".split(' '))
            .arg("-kernel")
            .arg(made.join("vmlinuz"))
            .arg("-initrd")
            .arg(&initrd)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let (sender, console) = channel();
        let stdout = qemu.stdout.take().unwrap();
        thread::spawn(move || {
            for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Self {
            keyboard: qemu.stdin.take().unwrap(),
            qemu,
            console,
            seen: Vec::new(),
            until: Instant::now() + limit,
            _dir: dir,
            _alone: alone,
        }
    }

    /// Blocks until the console shows a line that begins with `beginning`, and returns the rest of it.
    pub fn wait_for(&mut self, beginning: &str) -> String {
        loop {
            let left = self.until.saturating_duration_since(Instant::now());
            let Ok(line) = self.console.recv_timeout(left) else {
                let _ = self.qemu.kill();
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

    /// Blocks until the job has ended, which has to be with 0, and the machine with it. Returns what was on the console.
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
        assert!(self.qemu.wait().unwrap().success());
        std::mem::take(&mut self.seen)
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}
