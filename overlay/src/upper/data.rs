//! The flat files that hold what the sandbox wrote, `data/<shard>/<number>`, and a bounded cache of
//! their descriptors.
//!
//! Numbers go up and are never used again. The name of a flat file is durable when its shard has
//! been synced since it was made. Where one is to be, a few more are made first, so that of the
//! next files only the bytes have to be synced.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::disk::{Access, Disk};
use super::{UpperError, io_error};

/// Flat files in one directory. Files that are made one after the other stand together, as the
/// host's filesystem likes it.
const SHARD: u64 = 4096;

/// Most descriptors kept open.
pub const MAX_OPEN: usize = 256;

/// Flat files that are made ahead when the name of one is synced.
const POOL: usize = 32;

/// The flat files of an upper.
#[derive(Debug)]
pub struct FlatFiles {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    next: AtomicU64,
    open: Mutex<OpenFiles>,
    names: Mutex<Names>,
}

/// Which flat files have durable names.
#[derive(Debug, Default)]
struct Names {
    /// By shard: those below this number.
    durable: HashMap<u64, u64>,
    /// Files that were made ahead, and are empty.
    pool: Vec<u64>,
}

/// What there was when the upper was opened.
#[derive(Debug, Default)]
pub struct Found {
    /// The numbers of the flat files, in order.
    numbers: Vec<u64>,
    strays: Vec<PathBuf>,
}

impl Found {
    /// Whether there was one with this number.
    pub fn has(&self, number: u64) -> bool {
        self.numbers.binary_search(&number).is_ok()
    }

    /// Whether there was nothing.
    pub fn is_empty(&self) -> bool {
        self.numbers.is_empty()
    }

    /// Their number.
    pub fn len(&self) -> usize {
        self.numbers.len()
    }
}

#[derive(Debug, Default)]
struct OpenFiles {
    files: HashMap<u64, (Arc<File>, u64)>,
    clock: u64,
}

impl OpenFiles {
    fn insert(&mut self, number: u64, file: &Arc<File>) {
        if self.files.len() >= MAX_OPEN {
            // A scan of a few hundred, beside the open that made it necessary.
            let oldest = self.files.iter().min_by_key(|(_, (_, used))| *used);
            if let Some(oldest) = oldest.map(|(&number, _)| number) {
                self.files.remove(&oldest);
            }
        }
        self.clock += 1;
        self.files.insert(number, (file.clone(), self.clock));
    }
}

impl FlatFiles {
    /// The flat files below `upper`, and what was found there.
    pub fn open(disk: Arc<dyn Disk>, upper: &Path) -> Result<(Self, Found), UpperError> {
        let dir = upper.join("data");
        disk.create_dirs(&dir).map_err(io_error("creating", &dir))?;
        let found = Self::find(upper)?;
        let next = found.numbers.last();
        let files = Self {
            disk,
            dir,
            next: AtomicU64::new(next.map_or(1, |max| max.saturating_add(1))),
            open: Mutex::default(),
            names: Mutex::default(),
        };
        Ok((files, found))
    }

    /// What there is below `upper`.
    pub fn find(upper: &Path) -> Result<Found, UpperError> {
        let dir = upper.join("data");
        let mut found = Found::default();
        for shard in list(&dir)? {
            for path in list(&shard)? {
                let name = path.file_name().and_then(|name| name.to_str());
                match name.and_then(|name| name.parse().ok()) {
                    Some(number) => found.numbers.push(number),
                    None => found.strays.push(path),
                }
            }
        }
        found.numbers.sort_unstable();
        Ok(found)
    }

    /// Removes what was found and is not in `live`, which is in order: a process that died left it.
    pub fn sweep(&self, found: &Found, live: &[u64]) -> Result<(), UpperError> {
        let dead = found.numbers.iter();
        let dead = dead.filter(|number| live.binary_search(number).is_err());
        let dead = dead.map(|&number| self.path(number));
        for path in dead.chain(found.strays.iter().cloned()) {
            self.disk
                .remove(&path)
                .map_err(io_error("removing", &path))?;
        }
        Ok(())
    }

    /// The number that the next flat file has, unless one was made ahead: none that is made from
    /// now on has one that was given away before.
    pub fn next(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }

    fn path(&self, number: u64) -> PathBuf {
        self.dir
            .join((number / SHARD).to_string())
            .join(number.to_string())
    }

    fn cache(&self) -> MutexGuard<'_, OpenFiles> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn names(&self) -> MutexGuard<'_, Names> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a new, empty flat file.
    pub fn create(&self) -> io::Result<(u64, Arc<File>)> {
        let ahead = self.names().pool.pop();
        let (number, file) = match ahead {
            Some(number) => (number, self.disk.open(&self.path(number), Access::Write)?),
            None => self.create_next()?,
        };
        let file = Arc::new(file);
        self.cache().insert(number, &file);
        Ok((number, file))
    }

    fn create_next(&self) -> io::Result<(u64, File)> {
        // Under the lock, so that all files below the next number are there when it is not held.
        let _names = self.names();
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let path = self.path(number);
        let create = || self.disk.open(&path, Access::New);
        let file = match create() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if let Some(shard) = path.parent() {
                    self.disk.create_dirs(shard)?;
                }
                create()
            }
            made => made,
        };
        Ok((number, file?))
    }

    /// The flat file with this number.
    pub fn get(&self, number: u64) -> io::Result<Arc<File>> {
        {
            let mut cache = self.cache();
            cache.clock += 1;
            let clock = cache.clock;
            if let Some((file, used)) = cache.files.get_mut(&number) {
                *used = clock;
                return Ok(file.clone());
            }
        }
        let file = Arc::new(self.disk.open(&self.path(number), Access::Write)?);
        self.cache().insert(number, &file);
        Ok(file)
    }

    /// Length, mtime and blocks of a flat file.
    pub fn stat(&self, number: u64) -> io::Result<rustix::fs::Stat> {
        Ok(rustix::fs::lstat(self.path(number))?)
    }

    /// Removes a flat file. What is left behind where that fails goes at the next opening.
    pub fn remove(&self, number: u64) {
        self.cache().files.remove(&number);
        let _ = self.disk.remove(&self.path(number));
    }

    /// Makes a flat file durable, and its name.
    pub fn sync(&self, number: u64, data_only: bool) -> io::Result<()> {
        let file = self.get(number)?;
        self.disk.sync(&file, data_only)?;
        self.sync_name(number)
    }

    fn sync_name(&self, number: u64) -> io::Result<()> {
        let shard = number / SHARD;
        let durable = self.names().durable.get(&shard).copied();
        if durable.is_some_and(|to| number < to) {
            return Ok(());
        }
        let mut made = Vec::new();
        // Where there is no space for more, the one that is needed is there.
        while made.len() < POOL
            && let Ok((number, _)) = self.create_next()
        {
            made.push(number);
        }
        let to = {
            let mut names = self.names();
            names.pool.splice(0..0, made.into_iter().rev());
            self.next()
        };
        self.disk.sync_dir(&self.dir.join(shard.to_string()))?;
        if durable.is_none() {
            self.disk.sync_dir(&self.dir)?;
        }
        self.names().durable.insert(shard, to);
        Ok(())
    }

    /// Makes all flat files durable, by syncing the whole filesystem of the host.
    pub fn sync_all(&self) -> io::Result<()> {
        let next = {
            let _names = self.names();
            self.next()
        };
        self.disk.sync_filesystem(&self.dir)?;
        let mut names = self.names();
        let shards = (0..=next / SHARD).map(|shard| (shard, next));
        names.durable.extend(shards);
        Ok(())
    }
}

fn list(dir: &Path) -> Result<Vec<PathBuf>, UpperError> {
    let list = || {
        // Not where a link leads: what is found and not known is removed.
        if !dir.symlink_metadata()?.is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        std::fs::read_dir(dir)?
            .map(|entry| Ok(entry?.path()))
            .collect()
    };
    list().map_err(io_error("listing", dir))
}
