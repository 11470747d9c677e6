//! Every call that changes the disk is made to fail in turn. Whatever fails: what has a name is whole, and the same work
//! done again succeeds.

use std::ffi::OsString;
use std::fs::{File, Metadata};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use iii_store::disk::Disk;
use iii_store::snapshot::{Options, snapshot};
use iii_store::{KeyId, LOOSE_MIN, Record, Ref, RefKind, Store, StoreError};

use crate::helpers::{Files, NoSync, add_files, check_whole, names, noise, publish};

#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    /// One call fails, the others work.
    Once(i32),
    /// One write stores half of its bytes and fails.
    Short,
    /// This call and all that follow fail: the process might as well be dead.
    Death,
}

/// A disk on which the call number `at` fails.
#[derive(Debug)]
struct FaultDisk {
    at: AtomicI64,
    calls: AtomicI64,
    fault: Fault,
}

impl FaultDisk {
    fn call(&self) -> io::Result<()> {
        let number = self.calls.fetch_add(1, Ordering::Relaxed);
        let at = self.at.load(Ordering::Relaxed);
        let fails = match self.fault {
            Fault::Death => number >= at,
            _ => number == at,
        };
        if !fails {
            return Ok(());
        }
        let errno = match self.fault {
            Fault::Once(errno) => errno,
            Fault::Short => rustix::io::Errno::NOSPC.raw_os_error(),
            Fault::Death => rustix::io::Errno::IO.raw_os_error(),
        };
        Err(io::Error::from_raw_os_error(errno))
    }
}

impl Disk for FaultDisk {
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.call()?;
        NoSync.create_dir(path)
    }

    fn create(&self, path: &Path) -> io::Result<File> {
        self.call()?;
        NoSync.create(path)
    }

    fn write_at(&self, file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
        let result = self.call();
        if result.is_err() && self.fault == Fault::Short {
            NoSync.write_at(file, &bytes[..bytes.len() / 2], offset)?;
        }
        result?;
        NoSync.write_at(file, bytes, offset)
    }

    fn reflink(&self, from: &File, to: &File) -> io::Result<()> {
        self.call()?;
        NoSync.reflink(from, to)
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        self.call()?;
        NoSync.sync(file)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.call()?;
        NoSync.rename(from, to)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.call()?;
        NoSync.sync_dir(path)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.call()?;
        NoSync.remove(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.call()?;
        NoSync.remove_dir(path)
    }

    fn open_lock(&self, path: &Path) -> io::Result<File> {
        self.call()?;
        NoSync.open_lock(path)
    }

    fn touch(&self, path: &Path) -> io::Result<()> {
        self.call()?;
        NoSync.touch(path)
    }

    fn open(&self, path: &Path) -> io::Result<File> {
        self.call()?;
        NoSync.open(path)
    }

    fn read_at(&self, file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.call()?;
        NoSync.read_at(file, buf, offset)
    }

    fn metadata(&self, path: &Path) -> io::Result<Metadata> {
        self.call()?;
        NoSync.metadata(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<OsString>> {
        self.call()?;
        NoSync.list(path)
    }
}

/// Something of everything that writes.
fn work(dir: &Path, project: &Path, disk: Arc<dyn Disk>) -> Result<(), Box<dyn std::error::Error>> {
    let store = Store::open_on(dir, disk)?;
    let lease = store.lease("test")?;
    let ingest = store.ingest(&lease)?;
    let files: Files = [
        (b"small".to_vec(), noise(10, 0)),
        (b"middle".to_vec(), noise(200_000, 1)),
        (b"large".to_vec(), noise(LOOSE_MIN as usize + 1, 2)),
    ]
    .into();
    let tree = add_files(&ingest, &files)?;
    let published = ingest.finish(&tree)?;
    let content = Ref {
        layers: vec![published.layer_id],
        info: serde_json::Value::Null,
    };
    store.set_ref(RefKind::Image, "image", &content)?;
    let record = Record {
        facts: Vec::new(),
        layer_id: published.layer_id,
        tree_id: published.tree_id,
        provenance: serde_json::Map::new(),
    };
    store.put_record(&KeyId::from_bytes([1; 32]), record)?;
    let options = Options {
        name: "project",
        at: b"workspace",
        excludes: &[],
        uid: 0,
        gid: 0,
    };
    snapshot(&store, &lease, project, &options)?;
    store.remove_ref(RefKind::Image, "gone")?;
    Ok(())
}

#[test]
fn every_call_fails_once() {
    let project = tempfile::tempdir().unwrap();
    std::fs::write(project.path().join("a"), "a").unwrap();
    std::fs::write(project.path().join("b"), noise(LOOSE_MIN as usize, 3)).unwrap();
    let faults = [
        Fault::Once(rustix::io::Errno::IO.raw_os_error()),
        Fault::Once(rustix::io::Errno::NOSPC.raw_os_error()),
        Fault::Short,
        Fault::Death,
    ];
    for fault in faults {
        for at in 0.. {
            let dir = tempfile::tempdir().unwrap();
            let dir = dir.path().join("store");
            let disk = Arc::new(FaultDisk {
                at: AtomicI64::new(at),
                calls: AtomicI64::new(0),
                fault,
            });
            let result = work(&dir, project.path(), disk.clone());
            let calls = disk.calls.load(Ordering::Relaxed);
            if calls <= at {
                result.unwrap();
                assert!(at > 40, "{at} calls are fewer than there must be");
                break;
            }
            if let Err(err) = &result {
                let mut cause: &dyn std::error::Error = err.as_ref();
                while let Some(next) = cause.source() {
                    cause = next;
                }
                let known = cause.is::<io::Error>() || cause.to_string().contains("void");
                assert!(known, "{fault:?} at {at}: {err}: {cause}");
            }
            // Whoever comes next finds a store that is whole, cleans up, and does the work.
            let layers = check_whole(&dir);
            assert!(result.is_err() || layers == 2, "{fault:?} at {at}");
            let store = Store::open(&dir).unwrap();
            for (_, content) in store.list_refs(RefKind::Image).unwrap() {
                assert!(store.layer(&content.layers[0]).is_ok());
            }
            for record in store.records(&KeyId::from_bytes([1; 32])).unwrap() {
                assert!(store.layer(&record.layer_id).is_ok());
            }
            store.sweep_dead_leases().unwrap();
            for name in ["tmp", "leases", "locks"] {
                let left = names(&dir.join(name));
                assert!(left.is_empty(), "{fault:?} at {at}: {name} holds {left:?}");
            }
            work(&dir, project.path(), Arc::new(NoSync)).unwrap();
            assert_eq!(check_whole(&dir), 2);
        }
    }
}

/// Of these calls, one fails in the middle: everything after it is refused.
#[test]
fn a_failed_ingest_is_void() {
    let dir = tempfile::tempdir().unwrap();
    publish(&Store::open(dir.path()).unwrap(), &Files::new()).unwrap();
    let disk = Arc::new(FaultDisk {
        at: AtomicI64::new(i64::MAX),
        calls: AtomicI64::new(0),
        fault: Fault::Once(5),
    });
    let store = Store::open_on(dir.path(), disk.clone()).unwrap();
    let lease = store.lease("test").unwrap();
    let ingest = store.ingest(&lease).unwrap();
    // The next call makes the pack.
    let calls = disk.calls.load(Ordering::Relaxed);
    disk.at.store(calls, Ordering::Relaxed);
    assert!(matches!(ingest.add_bytes(b"x"), Err(StoreError::Io { .. })));
    assert!(matches!(ingest.add_bytes(b"x"), Err(StoreError::Poisoned)));
    assert!(matches!(
        ingest.finish(&iii_store::tree::Tree::default()),
        Err(StoreError::Poisoned)
    ));
}
