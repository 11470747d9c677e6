//! Leases: what a living process still needs.
//!
//! A lease is a file in `leases/` that its holder keeps flocked, so that it ends with the holder, however that ends; a
//! lease that can be locked is dead, whatever pid wrote it. Its first line says what it is for; every other line pins
//! a layer: `layer <id>`. A pin is written *before* the holder asks whether the layer exists. Files in `tmp/` begin
//! with the name of the lease that they belong to.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::disk::{Disk, TmpFile, names, read_file};
use crate::error::{IoContext, StoreError};
use crate::id::LayerId;
use crate::lock::{self, try_lock};
use crate::objects::lock;
use crate::store::Store;

/// Longest purpose, in bytes.
const MAX_PURPOSE: usize = 200;
/// Longest file of a lease that is read, in bytes: room for more layers than any process pins.
const MAX_LEASE_FILE: u64 = 16 << 20;

/// What the file of a lease says.
#[derive(Debug, Default)]
struct Written {
    /// Its length in bytes.
    len: u64,
    pinned: HashSet<LayerId>,
}

/// Protects what it pins, and what its holder is writing, from garbage collection. Ends when dropped or when the
/// process ends. It is inherited by a fork, not by an exec.
#[derive(Debug)]
pub struct Lease {
    store: Store,
    name: String,
    path: PathBuf,
    file: File,
    written: Mutex<Written>,
    next_tmp: AtomicU64,
}

fn random_name() -> io::Result<String> {
    let mut bytes = [0; 16];
    let mut filled = 0;
    while filled < bytes.len() {
        filled +=
            rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(blake3::Hash::from_bytes({
        let mut wide = [0; 32];
        wide[..16].copy_from_slice(&bytes);
        wide
    })
    .to_hex()[..32]
        .to_owned())
}

impl Lease {
    pub(crate) fn take(store: &Store, purpose: &str) -> Result<Self, StoreError> {
        let dir = store.dir();
        loop {
            let name = random_name().at("naming a lease in", dir)?;
            let tmp = dir.join("tmp").join(format!("{name}.lease"));
            let path = dir.join("leases").join(&name);
            // Locked under a temporary name first: in `leases/`, an unlocked file is a dead one.
            let file = store.disk().create(&tmp).at("creating", &tmp)?;
            if !try_lock(&file).at("locking", &tmp)? {
                continue;
            }
            let purpose: String = purpose
                .chars()
                .map(|c| if c.is_control() { ' ' } else { c })
                .take(MAX_PURPOSE)
                .collect();
            let line = format!("iii-lease 1 {purpose}\n");
            let disk = store.disk();
            disk.write_at(&file, line.as_bytes(), 0)
                .at("writing", &tmp)?;
            match store.disk().rename(&tmp, &path) {
                // Swept between create and lock.
                Err(err) if err.kind() == io::ErrorKind::NotFound => continue,
                other => other.at("renaming", &tmp)?,
            }
            return Ok(Self {
                store: store.clone(),
                name,
                path,
                file,
                written: Mutex::new(Written {
                    len: line.len() as u64,
                    pinned: HashSet::new(),
                }),
                next_tmp: AtomicU64::new(0),
            });
        }
    }

    /// Keeps these layers, and all objects in them, as long as the lease lives. They need not exist (yet): pin first,
    /// then look.
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
        Ok(())
    }

    fn append(&self, written: &mut Written, lines: &str) -> Result<(), StoreError> {
        let disk = self.store.disk();
        disk.write_at(&self.file, lines.as_bytes(), written.len)
            .at("writing", &self.path)?;
        written.len += lines.len() as u64;
        Ok(())
    }

    /// The store it belongs to.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// A new temporary file.
    pub(crate) fn tmp(&self) -> Result<TmpFile, StoreError> {
        let number = self.next_tmp.fetch_add(1, Ordering::Relaxed);
        let path = self
            .store
            .dir()
            .join("tmp")
            .join(format!("{}.{number}", self.name));
        TmpFile::create(Arc::clone(self.store.disk()), path)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // Still locked: a sweeper either sees it alive or not at all.
        let _ = self.store.disk().remove(&self.path);
    }
}

/// A lease that somebody holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LiveLease {
    /// What it is for, in the holder's words.
    pub purpose: String,
    /// The layers that it pins, which need not exist.
    pub layers: Vec<LayerId>,
}

/// The leases that somebody holds, in any order.
pub(crate) fn live(store: &Store) -> Result<Vec<LiveLease>, StoreError> {
    let disk = store.disk().as_ref();
    let leases = store.dir().join("leases");
    let mut live = Vec::new();
    for name in names(disk, &leases)? {
        let path = leases.join(&name);
        // Read before it is asked whether it lives: one that is dead by then counts no more.
        let Some(text) = read_file(disk, &path, MAX_LEASE_FILE)? else {
            continue;
        };
        let dead = dead_lease(disk, &path).at("locking", &path)?.is_some();
        if dead || disk.metadata(&path).is_err() {
            continue;
        }
        let text = String::from_utf8_lossy(&text);
        let mut lines = text.lines();
        let purpose = lines
            .next()
            .and_then(|line| line.strip_prefix("iii-lease 1 "));
        let pins = lines.filter_map(|line| line.strip_prefix("layer ")?.parse().ok());
        live.push(LiveLease {
            purpose: purpose.unwrap_or_default().to_owned(),
            layers: pins.collect(),
        });
    }
    Ok(live)
}

/// Removes the leases of the dead, the temporary files that belonged to them, and the locks that they held. Returns how many leases there were.
pub(crate) fn sweep(store: &Store) -> Result<usize, StoreError> {
    let (leases, tmp) = (store.dir().join("leases"), store.dir().join("tmp"));
    let mut alive = HashSet::new();
    // Listed before the leases: a file that is here belongs to a lease that is there by then, or is dead.
    let disk = store.disk().as_ref();
    let leftovers = names(disk, &tmp)?;
    let mut dead = Vec::new();
    for name in names(disk, &leases)? {
        match dead_lease(disk, &leases.join(&name)).at("locking", &leases.join(&name))? {
            Some(file) => dead.push((name, file)),
            None => {
                alive.insert(name);
            }
        }
    }
    for name in leftovers {
        let (owner, rest) = name.split_once('.').unwrap_or((&name, ""));
        let path = tmp.join(&name);
        // A lease that is being taken is a temporary file itself, and locked but for a moment; its taker tries again.
        let taking = rest == "lease" && !matches!(dead_lease(disk, &path), Ok(Some(_)));
        if !alive.contains(owner) && !taking {
            remove(store, &path)?;
        }
    }
    let count = dead.len();
    for (name, file) in dead {
        remove(store, &leases.join(name))?;
        drop(file);
    }
    lock::sweep(store.disk(), &store.dir().join("locks"))?;
    Ok(count)
}

/// The lease's file, locked, if nobody holds it.
fn dead_lease(disk: &dyn Disk, path: &Path) -> io::Result<Option<File>> {
    match disk.open(path) {
        Ok(file) => Ok(try_lock(&file)?.then_some(file)),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(err) => Err(err),
    }
}

fn remove(store: &Store, path: &Path) -> Result<(), StoreError> {
    match store.disk().remove(path) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.at("removing", path),
    }
}
