//! The directory of a sandbox: its lock, its owner and its upper.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use crate::project::WorkerName;
use crate::worker::error::{RunError, at};

/// Time between two tries to take a lock that somebody may only be looking at.
const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// Where a sandbox's directory says which project it belongs to.
const OWNER: &str = "project";

/// The project that the sandbox in `dir` belongs to, if there is one.
pub(crate) fn owner(dir: &Path) -> Result<Option<PathBuf>, RunError> {
    use std::os::unix::ffi::OsStringExt as _;
    let path = dir.join(OWNER);
    match fs::read(&path) {
        Ok(bytes) => Ok(Some(std::ffi::OsString::from_vec(bytes).into())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(at("read", &path)(source)),
    }
}

/// The new upper, until it has taken the place of the old one, and then that one, until it is
/// removed.
const NEW_UPPER: &str = "upper.new";

/// A sandbox's directory, held by one process at a time.
pub(crate) struct Place {
    dir: PathBuf,
    lock: File,
}

/// The file that the process which holds a sandbox has locked. It names the process: by its pid
/// alone if it runs the worker, by pid and [task](Task) if it does something else.
pub(crate) const LOCK: &str = "lock";

/// Longest text of the lock's file that is read.
const MAX_HOLDER: u64 = 64;

/// What a process that does not run a worker holds its sandbox for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Task {
    Add,
    Clear,
    Fork,
    Remove,
    Rollback,
    Snapshot,
    /// To run it, as the caller [says](Place::sign) once it is sure.
    Run,
}

impl Task {
    fn text(self) -> &'static str {
        match self {
            Self::Add => "add",
            Self::Clear => "clear",
            Self::Fork => "fork",
            Self::Remove => "remove",
            Self::Rollback => "rollback",
            Self::Snapshot => "snapshot",
            Self::Run => "start",
        }
    }
}

/// The process that holds the sandbox in `dir`, for people: `1234`, or `1234 (snapshot)`.
pub(crate) fn holder(dir: &Path) -> String {
    let mut text = String::new();
    // A holder that is about to write its name has none yet.
    let read =
        File::open(dir.join(LOCK)).and_then(|file| file.take(MAX_HOLDER).read_to_string(&mut text));
    let mut words = text.split_whitespace();
    match (read.is_ok(), words.next(), words.next()) {
        (true, Some(pid), Some(task)) => format!("{pid} ({task})"),
        (true, Some(pid), None) => pid.to_owned(),
        _ => "(unknown)".to_owned(),
    }
}

impl Place {
    /// Takes the sandbox `name` for the project at `root`. It belongs to the project that it was
    /// first used for, for as long as that exists or until `take_over`.
    pub fn claim(
        dir: PathBuf,
        name: &WorkerName,
        root: &Path,
        take_over: bool,
    ) -> Result<Self, RunError> {
        let mut place = Self::hold(dir, name, Duration::ZERO, Task::Run)?;
        place.sign()?;
        place.claim_for(name, root, take_over)?;
        Ok(place)
    }

    /// Takes the sandbox `name`, whichever project it belongs to, and makes its directory. Waits
    /// at most `patience` for another process that holds it.
    pub fn hold(
        dir: PathBuf,
        name: &WorkerName,
        patience: Duration,
        task: Task,
    ) -> Result<Self, RunError> {
        let deadline = Instant::now() + patience;
        let path = dir.join(LOCK);
        loop {
            fs::create_dir_all(&dir).map_err(at("create", &dir))?;
            let mut options = File::options();
            let options = options.read(true).write(true).create(true).truncate(false);
            let lock = match options.open(&path) {
                // Its directory was removed just now.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                lock => lock.map_err(at("open", &path))?,
            };
            match lock.try_lock() {
                Ok(()) if is_at(&lock, &path) => {
                    let mut place = Self { dir, lock };
                    place.write_holder(&format!("{} {}\n", std::process::id(), task.text()))?;
                    place.drop_new_upper()?;
                    return Ok(place);
                }
                // Whoever had it has removed it.
                Ok(()) => {}
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    thread::sleep(LOCK_PAUSE);
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(RunError::Busy {
                        name: name.to_string(),
                        holder: holder(&dir),
                    });
                }
                Err(TryLockError::Error(source)) => return Err(at("lock", &path)(source)),
            }
        }
    }

    /// Says that this process runs it.
    pub fn sign(&mut self) -> Result<(), RunError> {
        self.write_holder(&format!("{}\n", std::process::id()))
    }

    fn write_holder(&mut self, text: &str) -> Result<(), RunError> {
        let path = self.dir.join(LOCK);
        self.lock
            .set_len(0)
            .and_then(|()| self.lock.rewind())
            .and_then(|()| self.lock.write_all(text.as_bytes()))
            .map_err(at("write", &path))
    }

    /// Has it belong to the project at `root`, as in [`claim`](Self::claim).
    pub fn claim_for(
        &self,
        name: &WorkerName,
        root: &Path,
        take_over: bool,
    ) -> Result<(), RunError> {
        use std::os::unix::ffi::OsStrExt as _;
        let owner = owner(&self.dir)?.unwrap_or_default();
        if owner == root {
            return Ok(());
        }
        if owner.is_dir() && !take_over {
            return Err(RunError::Taken {
                name: name.to_string(),
                owner,
            });
        }
        if take_over {
            // First: what somebody else's project wrote is nothing for this one.
            self.drop_upper()?;
        }
        let path = self.dir.join(OWNER);
        fs::write(&path, root.as_os_str().as_bytes()).map_err(at("write", &path))
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where what the worker writes is.
    pub fn upper(&self) -> PathBuf {
        self.dir.join("upper")
    }

    /// Where the console of a microVM is written to.
    pub fn console(&self) -> PathBuf {
        self.dir.join("console.log")
    }

    /// Forgets what the worker wrote: all of it or nothing, however this ends. Half an upper would
    /// be one whose files are empty.
    pub fn drop_upper(&self) -> Result<(), RunError> {
        self.drop_new_upper()?;
        let (upper, away) = (self.upper(), self.dir.join(NEW_UPPER));
        match fs::rename(&upper, &away) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            renamed => renamed.map_err(at("put away", &upper))?,
        }
        self.sync()?;
        self.drop_new_upper()
    }

    /// Where an upper is made that is to take the place of that one. There is nothing yet.
    pub fn new_upper(&self) -> Result<PathBuf, RunError> {
        self.drop_new_upper()?;
        Ok(self.dir.join(NEW_UPPER))
    }

    /// Forgets what is there.
    pub fn drop_new_upper(&self) -> Result<(), RunError> {
        remove_all(&self.dir.join(NEW_UPPER))
    }

    /// Makes its names durable.
    fn sync(&self) -> Result<(), RunError> {
        File::open(&self.dir)
            .and_then(|dir| dir.sync_all())
            .map_err(at("sync", &self.dir))
    }

    /// Has the new upper and the upper take each other's place, in one step, which is durable when
    /// this returns.
    pub fn exchange_upper(&self) -> Result<(), RunError> {
        let (new, upper) = (self.dir.join(NEW_UPPER), self.upper());
        let flags = if upper.exists() {
            RenameFlags::EXCHANGE
        } else {
            RenameFlags::NOREPLACE
        };
        renameat_with(CWD, &new, CWD, &upper, flags)
            .map_err(|error| at("put a new upper in the place of", &upper)(error.into()))?;
        self.sync()
    }

    /// Removes it. Somebody who waits for it makes it anew.
    pub fn remove(self) -> Result<(), RunError> {
        self.drop_upper()?;
        remove_all(&self.dir)
    }
}

fn remove_all(path: &Path) -> Result<(), RunError> {
    match fs::remove_dir_all(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(at("remove", path)(source)),
        _ => Ok(()),
    }
}

fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(held), Ok(named)) => (held.dev(), held.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_sandbox_names_the_process_that_holds_it() {
        let home = tempfile::tempdir().unwrap();
        let name: WorkerName = "box".parse().unwrap();
        let dir = home.path().join("box");
        let pid = std::process::id();
        let busy = || {
            let second = Place::hold(dir.clone(), &name, Duration::ZERO, Task::Remove);
            second.err().map(|error| error.to_string())
        };
        let mut place = Place::hold(dir.clone(), &name, Duration::ZERO, Task::Snapshot).unwrap();
        let in_use = format!("the sandbox box is in use by process {pid}");
        assert_eq!(busy(), Some(format!("{in_use} (snapshot)")));
        place.sign().unwrap();
        assert_eq!(busy(), Some(in_use));
        drop(place);
        assert_eq!(busy(), None);
    }
}
