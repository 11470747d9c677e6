//! Leases: the needs of living processes.
//!
//! A lease is a file in `leases/` that its holder keeps flocked, so that it ends with the holder,
//! however that ends; a lease that can be locked is dead, whichever pid wrote it. Its first line
//! states its purpose. After that,
//!
//! ```text
//! layer <id>    pins a layer: written *before* the holder asks whether the layer exists
//! ingest <n>    an ingest of the holder begins: written *before* it asks which objects exist
//! done <n>      that ingest has ended, and its layer, if any, has its name
//! ```
//!
//! A line counts once its newline is there. Files in `tmp/` begin with the name of the lease that
//! they belong to.

use std::collections::{BTreeSet, HashSet};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::disk::{Disk, TmpFile, names, on_disk, read_file};
use crate::error::{IoContext, StoreError};
use crate::id::LayerId;
use crate::lock::{self, FileLock, try_lock};
use crate::mutex::lock;
use crate::site::Site;

/// Longest purpose, in bytes.
const MAX_PURPOSE: usize = 200;
/// Longest file of one lease, in bytes: nearly a million pins.
const MAX_LEASE_FILE: u64 = 64 << 20;
/// The first words of the file.
const MAGIC: &str = "iii-lease 1 ";

/// Contents of a lease's file.
#[derive(Debug, Default)]
struct Written {
    /// Its length in bytes.
    len: u64,
    pinned: HashSet<LayerId>,
    /// Ingests that have begun.
    ingests: u64,
}

/// A held lease, as others see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveLease {
    /// The name of its file.
    pub(crate) name: String,
    /// Its purpose, in the holder's words.
    pub purpose: String,
    /// The layers that it pins, which need not exist.
    pub layers: Vec<LayerId>,
    /// The ingests that have begun and not ended.
    pub(crate) ingests: BTreeSet<u64>,
}

impl LiveLease {
    /// Reads the file of the lease called `name`. Any contents are a lease.
    pub fn parse(name: String, bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(bytes);
        // The text after the last newline is still being written.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let mut lines = whole.lines();
        let purpose = lines.next().unwrap_or_default();
        let mut state = Self {
            name,
            purpose: purpose.strip_prefix(MAGIC).unwrap_or(purpose).to_owned(),
            layers: Vec::new(),
            ingests: BTreeSet::new(),
        };
        for line in lines {
            match line.split_once(' ') {
                Some(("layer", id)) => state.layers.extend(id.parse::<LayerId>()),
                Some(("ingest", number)) => state.ingests.extend(number.parse::<u64>()),
                Some(("done", number)) => {
                    if let Ok(number) = number.parse() {
                        state.ingests.remove(&number);
                    }
                }
                _ => {}
            }
        }
        state
    }
}

/// Protects its pins, and its holder's writes, from garbage collection. Ends when
/// dropped or when the process ends. It is inherited by a fork, not by an exec.
#[derive(Debug)]
pub struct Lease {
    site: Site,
    name: String,
    path: PathBuf,
    file: File,
    written: Mutex<Written>,
    next_tmp: AtomicU64,
}

fn random_name() -> io::Result<String> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)?;
    Ok(blake3::Hash::from_bytes({
        let mut wide = [0; 32];
        wide[..16].copy_from_slice(&bytes);
        wide
    })
    .to_hex()[..32]
        .to_owned())
}

impl Lease {
    pub(crate) fn take(site: &Site, purpose: &str) -> Result<Self, StoreError> {
        let (disk, dir) = (site.disk(), site.dir());
        loop {
            let name = random_name().at("naming a lease in", dir)?;
            let tmp = dir.join("tmp").join(format!("{name}.lease"));
            let path = dir.join("leases").join(&name);
            // Locked under a temporary name first: in `leases/`, an unlocked file is a dead one.
            let file = disk.create(&tmp).at("creating", &tmp)?;
            if !try_lock(&file).at("locking", &tmp)? {
                continue;
            }
            // A failure from here on leaves nothing.
            let mut lease = Self {
                site: site.clone(),
                name,
                path: tmp,
                file,
                written: Mutex::default(),
                next_tmp: AtomicU64::new(0),
            };
            let purpose: String = purpose
                .chars()
                .map(|c| if c.is_control() { ' ' } else { c })
                .take(MAX_PURPOSE)
                .collect();
            lease.append(&mut lock(&lease.written), &format!("{MAGIC}{purpose}\n"))?;
            match disk.rename(&lease.path, &path) {
                // Swept between create and lock.
                Err(err) if err.kind() == io::ErrorKind::NotFound => continue,
                other => other.at("renaming", &lease.path)?,
            }
            lease.path = path;
            return Ok(lease);
        }
    }

    /// Keeps these layers, and all objects in them, as long as the lease lives. They need not exist
    /// (yet): pin first, then look.
    pub fn pin(&self, layers: &[LayerId]) -> Result<(), StoreError> {
        let mut written = lock(&self.written);
        let mut lines = String::new();
        for id in layers {
            if !written.pinned.contains(id) {
                lines.push_str("layer ");
                lines.push_str(&id.to_string());
                lines.push('\n');
            }
        }
        if !lines.is_empty() {
            self.append(&mut written, &lines)?;
            written.pinned.extend(layers);
        }
        drop(written);
        for id in layers {
            // When it was last used decides how long it is kept; a missing one is in no
            // use.
            let path = self.site.dir().join("layers").join(id.to_string());
            let _ = self.site.disk().touch(&path);
        }
        Ok(())
    }

    /// Says that an ingest begins. Returns its number.
    pub(crate) fn begin_ingest(&self) -> Result<u64, StoreError> {
        let mut written = lock(&self.written);
        let number = written.ingests + 1;
        self.append(&mut written, &format!("ingest {number}\n"))?;
        written.ingests = number;
        Ok(number)
    }

    /// Says that an ingest has ended.
    pub(crate) fn end_ingest(&self, number: u64) -> Result<(), StoreError> {
        self.append(&mut lock(&self.written), &format!("done {number}\n"))
    }

    fn append(&self, written: &mut Written, lines: &str) -> Result<(), StoreError> {
        let disk = self.site.disk();
        disk.write_at(&self.file, lines.as_bytes(), written.len)
            .at("writing", &self.path)?;
        written.len += lines.len() as u64;
        Ok(())
    }

    /// The name of its file.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The store that it belongs to.
    pub(crate) fn site(&self) -> &Site {
        &self.site
    }

    /// A new temporary file.
    pub(crate) fn tmp(&self) -> Result<TmpFile, StoreError> {
        let number = self.next_tmp.fetch_add(1, Ordering::Relaxed);
        let path = self
            .site
            .dir()
            .join("tmp")
            .join(format!("{}.{number}", self.name));
        TmpFile::create(Arc::clone(self.site.disk()), path)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // Still locked: a sweeper either sees it alive or not at all.
        let _ = self.site.disk().remove(&self.path);
    }
}

/// A file that a process which died has left in `tmp` or `leases`.
#[derive(Debug)]
pub(crate) struct Leftover {
    path: PathBuf,
    /// Bytes that the filesystem uses for it.
    pub(crate) on_disk: u64,
    /// Its length in bytes.
    pub(crate) len: u64,
}

/// Remains of dead processes.
#[derive(Debug, Default)]
pub(crate) struct Leftovers {
    /// Temporary files without a living lease.
    pub(crate) tmp: Vec<Leftover>,
    /// Leases without a holder.
    pub(crate) leases: Vec<Leftover>,
}

impl Leftovers {
    /// Looks for them. Holds one file open at a time, however many there are.
    pub(crate) fn find(site: &Site) -> Result<Self, StoreError> {
        let (leases, tmp) = (site.dir().join("leases"), site.dir().join("tmp"));
        let disk = site.disk().as_ref();
        let mut found = Self::default();
        let mut alive = HashSet::new();
        // Listed before the leases: the owner of a file that is here has a lease there by then, or
        // is dead.
        let files = names(disk, &tmp)?;
        for name in names(disk, &leases)? {
            let path = leases.join(&name);
            if dead_lease(disk, &path).at("locking", &path)?.is_some() {
                found.leases.extend(leftover(disk, path)?);
            } else {
                alive.insert(name);
            }
        }
        for name in files {
            let (owner, rest) = name.split_once('.').unwrap_or((&name, ""));
            let path = tmp.join(&name);
            // A lease that is being taken is a temporary file itself, and locked but for a moment;
            // its taker tries again.
            let taking = rest == "lease" && !matches!(dead_lease(disk, &path), Ok(Some(_)));
            if !alive.contains(owner) && !taking && path != site.format_tmp() {
                found.tmp.extend(leftover(disk, path)?);
            }
        }
        Ok(found)
    }

    /// All of them.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Leftover> {
        self.tmp.iter().chain(&self.leases)
    }
}

fn leftover(disk: &dyn Disk, path: PathBuf) -> Result<Option<Leftover>, StoreError> {
    match disk.metadata(&path) {
        // Its process ended in good order meanwhile, or another sweep removed it.
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(None),
        other => {
            let meta = other.at("looking at", &path)?;
            let (on_disk, len) = (on_disk(&meta), meta.len());
            Ok(Some(Leftover { path, on_disk, len }))
        }
    }
}

/// Result of a sweep.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Swept {
    /// Leases.
    pub(crate) leases: u64,
    /// Temporary files.
    pub(crate) files: u64,
    /// Bytes that the filesystem used for both.
    pub(crate) on_disk: u64,
}

/// Removes the leases of the dead, the temporary files that belonged to them, and the locks that
/// they held.
pub(crate) fn sweep(site: &Site) -> Result<Swept, StoreError> {
    let found = Leftovers::find(site)?;
    for file in found.iter() {
        remove(site, &file.path)?;
    }
    sweep_format(site)?;
    lock::sweep(site.disk(), &site.dir().join("locks"))?;
    Ok(Swept {
        leases: found.leases.len() as u64,
        files: found.tmp.len() as u64,
        on_disk: found.iter().map(|file| file.on_disk).sum(),
    })
}

/// Removes a half-written format. It belongs to no lease, but to the holder of its lock.
fn sweep_format(site: &Site) -> Result<(), StoreError> {
    let path = site.format_tmp();
    match site.disk().metadata(&path) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.at("looking at", &path)?,
    };
    match FileLock::try_acquire(site.disk(), &site.format_lock())? {
        Some(_lock) => remove(site, &path),
        None => Ok(()),
    }
}

/// The held leases, sorted by name.
pub(crate) fn live(site: &Site) -> Result<Vec<LiveLease>, StoreError> {
    let (disk, dir) = (site.disk().as_ref(), site.dir().join("leases"));
    let mut live = Vec::new();
    for name in names(disk, &dir)? {
        let path = dir.join(&name);
        if dead_lease(disk, &path).at("locking", &path)?.is_some() {
            continue;
        }
        // One that went meanwhile has ended.
        if let Some(bytes) = read_file(disk, &path, MAX_LEASE_FILE)? {
            live.push(LiveLease::parse(name, &bytes));
        }
    }
    live.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(live)
}

/// The lease's file, locked, if no process holds it.
fn dead_lease(disk: &dyn Disk, path: &Path) -> io::Result<Option<File>> {
    match disk.open(path) {
        Ok(file) => Ok(try_lock(&file)?.then_some(file)),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(err) => Err(err),
    }
}

fn remove(site: &Site, path: &Path) -> Result<(), StoreError> {
    match site.disk().remove(path) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.at("removing", path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_what_is_whole_and_nothing_else() {
        let (a, b) = ("11".repeat(32), "22".repeat(32));
        let cases: [(&str, &str, usize, &[u64]); 8] = [
            ("", "", 0, &[]),
            ("iii-lease 1 dev x", "", 0, &[]),
            ("iii-lease 1 dev x\n", "dev x", 0, &[]),
            (&format!("iii-lease 1 x\nlayer {a}\nlayer {b}"), "x", 1, &[]),
            (
                &format!("iii-lease 1 x\nlayer {a}\nlayer {b}\n"),
                "x",
                2,
                &[],
            ),
            ("iii-lease 1 x\ningest 1\ningest 2\ndone 1\n", "x", 0, &[2]),
            ("iii-lease 1 x\ningest 1\ndone 1\ningest 2", "x", 0, &[]),
            (
                "other\nlayer\nlayer zz\ningest -1\ndone 7\n\u{fffd}\n",
                "other",
                0,
                &[],
            ),
        ];
        for (text, purpose, pins, ingests) in cases {
            let state = LiveLease::parse("name".into(), text.as_bytes());
            assert_eq!(state.purpose, purpose, "{text:?}");
            assert_eq!(state.layers.len(), pins, "{text:?}");
            assert!(state.ingests.iter().eq(ingests), "{text:?}");
        }
        LiveLease::parse("name".into(), b"\xff\xfe\nlayer \xff\n");
    }
}
