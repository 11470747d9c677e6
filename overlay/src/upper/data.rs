//! The flat files with the data that the sandbox wrote, `data/<shard>/<number>`, and a bounded
//! cache of their descriptors.
//!
//! Numbers only increase and are never reused. The name of a flat file is durable once its shard
//! has been synced after the file was made. Before such a sync, a few more files are made, so that
//! the next files need only their bytes synced.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::disk::{Access, Disk};
use super::{UpperError, io_error};

/// Flat files in one directory. Files that are made in sequence stay together, which suits the
/// host's filesystem.
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
    /// By shard: the names of files below this number are durable.
    durable: HashMap<u64, u64>,
    /// Empty files that were made ahead.
    pool: Vec<u64>,
}

/// The flat files at the opening of the upper.
#[derive(Debug, Default)]
pub struct Found {
    /// The numbers of the flat files, in ascending order.
    numbers: Vec<u64>,
    strays: Vec<PathBuf>,
}

impl Found {
    /// Whether a flat file with this number existed.
    pub fn has(&self, number: u64) -> bool {
        self.numbers.binary_search(&number).is_ok()
    }

    /// Whether no flat file existed.
    pub fn is_empty(&self) -> bool {
        self.numbers.is_empty()
    }

    /// Number of flat files.
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
            // This scans a few hundred entries, which is cheap next to the open before it.
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
    /// The flat files below `upper`, and those that exist now.
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

    /// The flat files that exist below `upper`.
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

    /// Removes the found files that are not in `live`, which is sorted: a process that died left
    /// them.
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

    /// The number of the next flat file, unless that was made ahead. Every file that is made from
    /// now on has this number or a higher one, so no number is used twice.
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
        // The lock makes sure that all files below the next number exist whenever it is not held.
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

    /// Removes a flat file. After a failure, the next opening removes the rest.
    pub fn remove(&self, number: u64) {
        self.cache().files.remove(&number);
        let _ = self.disk.remove(&self.path(number));
    }

    /// Makes a flat file and its name durable.
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
        // On a disk without space for more, the file to be synced still exists.
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
        // This must not follow a link: unknown entries are removed.
        if !dir.symlink_metadata()?.is_dir() {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        std::fs::read_dir(dir)?
            .map(|entry| Ok(entry?.path()))
            .collect()
    };
    list().map_err(io_error("listing", dir))
}
