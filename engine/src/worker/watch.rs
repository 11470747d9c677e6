//! Waits for changes of a project that have come to rest.
//!
//! Every directory is watched but those that a snapshot leaves out, so that an install on the host
//! wakes no waiter. One save in an editor is several events (a temporary file, a rename, a
//! truncation), a checkout is thousands: they are one change, which ends when nothing has happened
//! for [`QUIET`] and git holds no lock on its index, or after [`PATIENCE`].

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use notify::event::{EventKind, ModifyKind};
use notify::{RecommendedWatcher, RecursiveMode, Watcher as _};

/// How long nothing has to happen for a change to have come to rest.
pub const QUIET: Duration = Duration::from_millis(25);
/// The longest that a change may take to come to rest.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// Most directories of one project that are watched.
pub const MAX_DIRS: usize = 1 << 16;

/// Why a project cannot be watched.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// The operating system refused.
    #[error("watching {} failed", path.display())]
    Watch {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: notify::Error,
    },
    /// No thread can be started.
    #[error("a thread cannot be started")]
    Thread(#[source] io::Error),
    /// More than [`MAX_DIRS`].
    #[error("{} has more than {MAX_DIRS} directories", .0.display())]
    TooMany(PathBuf),
    /// The project is gone.
    #[error("{} is gone", .0.display())]
    Gone(PathBuf),
}

impl WatchError {
    /// The remedy, where one is known.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Watch { source, .. }
                if matches!(source.kind, notify::ErrorKind::MaxFilesWatch) =>
            {
                Some("as root: sysctl fs.inotify.max_user_watches=524288")
            }
            _ => None,
        }
    }
}

enum Message {
    Event(notify::Result<notify::Event>),
    Stop,
}

/// Identity of a directory, beyond its name.
fn identity(dir: &Path) -> Option<(u64, u64)> {
    let metadata = fs::metadata(dir).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// Watches a project until it is dropped.
pub struct Watch {
    root: PathBuf,
    excluded: &'static [&'static str],
    watcher: RecommendedWatcher,
    messages: Receiver<Message>,
    sender: Sender<Message>,
    /// Those that were watched, and may be gone.
    dirs: HashSet<PathBuf>,
    /// Of the project's directory.
    identity: (u64, u64),
}

/// Ends waiting, from any thread.
#[derive(Clone)]
pub struct Stopper(Sender<Message>);

impl Stopper {
    /// Waiting returns false from now on.
    pub fn stop(&self) {
        // Without a waiter, nothing is to be stopped.
        let _ = self.0.send(Message::Stop);
    }
}

impl Watch {
    /// Watches `root` and all that is in it, but for names in `excluded`. Changes from now on are
    /// told.
    pub fn new(root: &Path, excluded: &'static [&'static str]) -> Result<Self, WatchError> {
        let (sender, messages) = mpsc::channel();
        let events = sender.clone();
        let watcher = notify::recommended_watcher(move |event| {
            let _ = events.send(Message::Event(event));
        });
        let watcher = watcher.map_err(|source| WatchError::Watch {
            path: root.to_owned(),
            source,
        })?;
        let mut watch = Self {
            root: root.to_owned(),
            excluded,
            watcher,
            messages,
            sender,
            dirs: HashSet::new(),
            identity: identity(root).ok_or_else(|| WatchError::Gone(root.to_owned()))?,
        };
        watch.add(root.to_owned())?;
        Ok(watch)
    }

    /// Ends the waiting.
    pub fn stopper(&self) -> Stopper {
        Stopper(self.sender.clone())
    }

    /// Waits until something changes. False once it was stopped.
    pub fn stirred(&mut self) -> Result<bool, WatchError> {
        loop {
            match self.messages.recv() {
                Ok(Message::Event(event)) => {
                    if self.matters(event)? {
                        return Ok(true);
                    }
                }
                Ok(Message::Stop) | Err(_) => return Ok(false),
            }
        }
    }

    /// Waits until what has changed, if anything, has come to rest. False once it was stopped.
    pub fn settled(&mut self) -> Result<bool, WatchError> {
        let begun = Instant::now();
        let mut rest = begun + QUIET;
        while begun.elapsed() < PATIENCE {
            let left = rest.saturating_duration_since(Instant::now());
            match self.messages.recv_timeout(left) {
                // Reading is no change.
                Ok(Message::Event(event)) => {
                    if self.matters(event)? {
                        rest = Instant::now() + QUIET;
                    }
                }
                Ok(Message::Stop) | Err(RecvTimeoutError::Disconnected) => return Ok(false),
                Err(RecvTimeoutError::Timeout) if self.git_is_busy() => {
                    rest = Instant::now() + QUIET;
                }
                Err(RecvTimeoutError::Timeout) => break,
            }
        }
        self.find_again()?;
        Ok(true)
    }

    /// Watches the project once more if another directory has taken its place: a watch stays with
    /// what it was put on.
    fn find_again(&mut self) -> Result<(), WatchError> {
        let now = identity(&self.root).ok_or_else(|| WatchError::Gone(self.root.clone()))?;
        if now != self.identity {
            self.identity = now;
            self.dirs.clear();
            self.add(self.root.clone())?;
        }
        Ok(())
    }

    /// Whether a checkout, a merge or the like is under way.
    fn git_is_busy(&self) -> bool {
        self.root.join(".git/index.lock").exists()
    }

    /// Whether an event is of something that a snapshot takes in. New directories are watched.
    fn matters(&mut self, event: notify::Result<notify::Event>) -> Result<bool, WatchError> {
        // An error is of a directory that is gone, say: something changed.
        let Ok(event) = event else {
            return Ok(true);
        };
        // Events were lost: whatever is there has to be looked at.
        if event.need_rescan() {
            self.add(self.root.clone())?;
            return Ok(true);
        }
        let comes = match event.kind {
            EventKind::Access(_) => return Ok(false),
            EventKind::Create(_) | EventKind::Modify(ModifyKind::Name(_)) => true,
            _ => false,
        };
        let mut matters = false;
        for path in event.paths {
            if self.is_excluded(&path) {
                continue;
            }
            matters = true;
            if comes && fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_dir()) {
                self.add(path)?;
            }
        }
        Ok(matters)
    }

    fn is_excluded(&self, path: &Path) -> bool {
        let inside = path.strip_prefix(&self.root).unwrap_or(path);
        inside.iter().any(|name| self.excludes(name))
    }

    fn excludes(&self, name: &OsStr) -> bool {
        self.excluded.iter().any(|excluded| name == *excluded)
    }

    /// Watches a directory and those in it. Directories that vanish meanwhile are left out.
    fn add(&mut self, dir: PathBuf) -> Result<(), WatchError> {
        // One watch is of all that is below, and each more would begin it anew.
        if cfg!(target_os = "macos") {
            if self.dirs.insert(self.root.clone()) {
                let watched = self.watcher.watch(&self.root, RecursiveMode::Recursive);
                watched.map_err(|source| WatchError::Watch { path: dir, source })?;
            }
            return Ok(());
        }
        let mut pending = vec![dir];
        while let Some(dir) = pending.pop() {
            if self.dirs.len() == MAX_DIRS && !self.dirs.contains(&dir) {
                self.dirs.retain(|dir| dir.is_dir());
                if self.dirs.len() == MAX_DIRS {
                    return Err(WatchError::TooMany(self.root.clone()));
                }
            }
            // Watched before it is read: what comes in between is seen twice rather than not at
            // all.
            match self.watcher.watch(&dir, RecursiveMode::NonRecursive) {
                Ok(()) => drop(self.dirs.insert(dir.clone())),
                Err(_) if dir != self.root && !dir.is_dir() => continue,
                Err(source) => return Err(WatchError::Watch { path: dir, source }),
            }
            let Ok(entries) = fs::read_dir(&dir) else {
                continue;
            };
            for entry in entries.flatten() {
                let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
                if is_dir && !self.excludes(&entry.file_name()) {
                    pending.push(entry.path());
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use tempfile::TempDir;

    use super::*;

    const EXCLUDED: &[&str] = &["node_modules", ".git"];

    impl Watch {
        /// Waits until something has changed and come to rest. False once it was stopped.
        fn changed(&mut self) -> Result<bool, WatchError> {
            Ok(self.stirred()? && self.settled()?)
        }
    }

    fn project() -> TempDir {
        let dir = TempDir::new().unwrap();
        for path in ["src/deep", "node_modules/a", ".git"] {
            fs::create_dir_all(dir.path().join(path)).unwrap();
        }
        fs::write(dir.path().join("src/index.js"), "1").unwrap();
        dir
    }

    /// How many changes `act` is, a stop included that comes after it.
    fn changes(dir: &TempDir, act: impl FnOnce(&Path)) -> usize {
        let mut watch = Watch::new(dir.path(), EXCLUDED).unwrap();
        act(dir.path());
        // The last event comes behind all others.
        fs::write(dir.path().join("last"), "").unwrap();
        let mut count = 0;
        while watch.changed().unwrap() {
            count += 1;
            if dir.path().join("last").exists() {
                watch.stopper().stop();
            }
        }
        count
    }

    #[test]
    fn what_editors_do_is_one_change() {
        let dir = project();
        let changed = changes(&dir, |dir| {
            let file = dir.join("src/index.js");
            // A truncation, a backup and a rename over it, and a new directory with something in
            // it.
            fs::write(&file, "2").unwrap();
            fs::rename(&file, dir.join("src/index.js~")).unwrap();
            fs::write(dir.join("src/.index.swp"), "3").unwrap();
            fs::rename(dir.join("src/.index.swp"), &file).unwrap();
            fs::remove_file(dir.join("src/index.js~")).unwrap();
            fs::create_dir_all(dir.join("new/deeper")).unwrap();
            for n in 0..500 {
                fs::write(dir.join(format!("new/deeper/{n}")), "").unwrap();
            }
        });
        assert_eq!(changed, 1);
    }

    #[test]
    fn what_no_snapshot_takes_in_wakes_nobody() {
        let dir = project();
        let mut watch = Watch::new(dir.path(), EXCLUDED).unwrap();
        fs::write(dir.path().join("node_modules/a/x"), "").unwrap();
        fs::write(dir.path().join(".git/HEAD"), "").unwrap();
        fs::create_dir(dir.path().join("src/node_modules")).unwrap();
        fs::write(dir.path().join("src/node_modules/y"), "").unwrap();
        fs::read(dir.path().join("src/index.js")).unwrap();
        watch.stopper().stop();
        // The stop may come before the events, which are then never looked at; so they are.
        while let Ok(message) = watch.messages.recv_timeout(QUIET * 4) {
            if let Message::Event(event) = message {
                assert!(!watch.matters(event).unwrap());
            }
        }
    }

    #[test]
    fn directories_that_come_are_watched() {
        let dir = project();
        let outside = TempDir::new().unwrap();
        fs::create_dir_all(outside.path().join("moved/in")).unwrap();
        let mut watch = Watch::new(dir.path(), EXCLUDED).unwrap();
        fs::create_dir_all(dir.path().join("a/b/c")).unwrap();
        fs::rename(outside.path().join("moved"), dir.path().join("moved")).unwrap();
        assert!(watch.changed().unwrap());
        for path in ["a/b/c/file", "moved/in/file"] {
            fs::write(dir.path().join(path), "").unwrap();
            assert!(watch.changed().unwrap(), "{path}");
        }
        fs::remove_dir_all(dir.path().join("a")).unwrap();
        assert!(watch.changed().unwrap());
        fs::create_dir(dir.path().join("a")).unwrap();
        assert!(watch.changed().unwrap());
        fs::write(dir.path().join("a/again"), "").unwrap();
        assert!(watch.changed().unwrap());
    }

    #[test]
    fn a_directory_that_takes_the_place_of_the_project_is_watched() {
        let parent = TempDir::new().unwrap();
        let root = parent.path().join("project");
        fs::create_dir_all(root.join("src")).unwrap();
        let mut watch = Watch::new(&root, EXCLUDED).unwrap();
        let other = parent.path().join("other");
        fs::create_dir_all(other.join("src")).unwrap();
        fs::rename(&root, parent.path().join("old")).unwrap();
        fs::rename(&other, &root).unwrap();
        assert!(watch.changed().unwrap());
        fs::write(root.join("src/file"), "").unwrap();
        assert!(watch.changed().unwrap());

        fs::remove_dir_all(&root).unwrap();
        assert!(matches!(watch.changed(), Err(WatchError::Gone(_))));
    }

    #[test]
    fn who_only_reads_disturbs_no_rest() {
        let dir = project();
        let mut watch = Watch::new(dir.path(), EXCLUDED).unwrap();
        let file = dir.path().join("src/index.js");
        fs::write(&file, "2").unwrap();
        let (stop, stopped) = mpsc::channel::<()>();
        let reader = thread::spawn(move || {
            while stopped.try_recv() == Err(mpsc::TryRecvError::Empty) {
                fs::read(&file).unwrap();
                thread::sleep(QUIET / 5);
            }
        });
        let begun = Instant::now();
        assert!(watch.changed().unwrap());
        assert!(begun.elapsed() < PATIENCE);
        stop.send(()).unwrap();
        reader.join().unwrap();
    }

    #[test]
    fn a_checkout_is_over_when_git_says_so() {
        let dir = project();
        let lock = dir.path().join(".git/index.lock");
        fs::write(&lock, "").unwrap();
        let mut watch = Watch::new(dir.path(), EXCLUDED).unwrap();
        let index = dir.path().join("src/index.js");
        fs::write(&index, "2").unwrap();
        let freed = lock.clone();
        let git = thread::spawn(move || {
            // However long that takes: nothing is told before.
            for n in 0..20 {
                fs::write(&index, n.to_string()).unwrap();
                thread::sleep(QUIET);
            }
            fs::remove_file(freed).unwrap();
        });
        assert!(watch.changed().unwrap());
        assert!(!lock.exists());
        git.join().unwrap();
    }

    #[test]
    fn waiting_can_be_stopped() {
        let dir = project();
        let mut watch = Watch::new(dir.path(), EXCLUDED).unwrap();
        let stopper = watch.stopper();
        let waiting = thread::spawn(move || watch.changed().unwrap());
        stopper.stop();
        assert!(!waiting.join().unwrap());
    }
}
