//! The flat files that hold what the sandbox wrote, `data/<shard>/<number>`, and a bounded cache of their descriptors.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::{UpperError, io_error, options};

/// Flat files in one directory. Files that are made one after the other stand together, as the host's filesystem likes it.
const SHARD: u64 = 4096;

/// Most descriptors kept open.
pub const MAX_OPEN: usize = 256;

/// The flat files of an upper.
#[derive(Debug)]
pub struct FlatFiles {
    dir: PathBuf,
    next: AtomicU64,
    open: Mutex<OpenFiles>,
}

/// What there was when the upper was opened.
#[derive(Debug, Default)]
pub struct Found {
    /// The flat files, by number.
    pub numbers: HashSet<u64>,
    strays: Vec<PathBuf>,
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
    pub fn open(upper: &Path) -> Result<(Self, Found), UpperError> {
        let dir = upper.join("data");
        std::fs::create_dir_all(&dir).map_err(io_error("creating", &dir))?;
        let mut found = Found::default();
        for shard in list(&dir)? {
            for path in list(&shard)? {
                let name = path.file_name().and_then(|name| name.to_str());
                match name.and_then(|name| name.parse().ok()) {
                    Some(number) => {
                        found.numbers.insert(number);
                    }
                    None => found.strays.push(path),
                }
            }
        }
        let next = found.numbers.iter().max();
        let files = Self {
            dir,
            next: AtomicU64::new(next.map_or(1, |max| max.saturating_add(1))),
            open: Mutex::default(),
        };
        Ok((files, found))
    }

    /// Removes what was found and is not in `live`: a process that died left it.
    pub fn sweep(&self, found: &Found, live: &HashSet<u64>) -> Result<(), UpperError> {
        let dead = found.numbers.difference(live);
        let dead = dead.map(|&number| self.path(number));
        for path in dead.chain(found.strays.iter().cloned()) {
            std::fs::remove_file(&path).map_err(io_error("removing", &path))?;
        }
        Ok(())
    }

    fn path(&self, number: u64) -> PathBuf {
        self.dir
            .join((number / SHARD).to_string())
            .join(number.to_string())
    }

    fn cache(&self) -> std::sync::MutexGuard<'_, OpenFiles> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a new, empty flat file.
    pub fn create(&self) -> io::Result<(u64, Arc<File>)> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let path = self.path(number);
        let create = || {
            options()
                .read(true)
                .write(true)
                .create_new(true)
                .open(&path)
        };
        let file = match create() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if let Some(shard) = path.parent() {
                    std::fs::create_dir_all(shard)?;
                }
                create()
            }
            made => made,
        };
        let file = Arc::new(file?);
        self.cache().insert(number, &file);
        Ok((number, file))
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
        let path = self.path(number);
        let file = Arc::new(options().read(true).write(true).open(path)?);
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
        let _ = std::fs::remove_file(self.path(number));
    }

    /// Makes a flat file durable, and with `name` also its name.
    pub fn sync(&self, number: u64, name: bool, data_only: bool) -> io::Result<()> {
        let file = self.get(number)?;
        if data_only {
            file.sync_data()?;
        } else {
            file.sync_all()?;
        }
        if name && let Some(shard) = self.path(number).parent() {
            File::open(shard)?.sync_all()?;
        }
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
