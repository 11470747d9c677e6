//! A disk without a free block or inode: the operations that free space work there.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use iii_store::snapshot::{Options, snapshot};
use iii_store::{LayerId, Policy, Record, Ref, RefKind, Store, StoreError};
use rustix::io::Errno;

use crate::helpers::{Files, NoSync, check_whole, names, noise, publish, read_back};
use crate::kills::greedy;
use crate::seam::{Call, Hook, Hooked};
use crate::workload::{causes, project, scratch};

const BLOCK: u64 = 4096;
const DIR: &str = "III_STORE_TEST_FULL";

/// A disk with this many free inodes and blocks.
#[derive(Debug)]
struct Small(Mutex<Free>);

#[derive(Debug, Clone, Copy)]
struct Free {
    inodes: u64,
    blocks: u64,
}

impl Free {
    fn take(&mut self, inodes: u64, blocks: u64) -> io::Result<()> {
        match (
            self.inodes.checked_sub(inodes),
            self.blocks.checked_sub(blocks),
        ) {
            (Some(inodes), Some(blocks)) => {
                *self = Self { inodes, blocks };
                Ok(())
            }
            _ => Err(Errno::NOSPC.into()),
        }
    }
}

impl Hook for Small {
    fn around<T>(&self, call: Call<'_>, run: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let mut free = self.0.lock().unwrap();
        match call {
            Call::Create(_) => free.take(1, 0)?,
            Call::OpenLock(path) if !path.exists() => free.take(1, 0)?,
            Call::CreateDir(path) if !path.exists() => free.take(1, 1)?,
            Call::Write(file, bytes, offset) => {
                let (before, end) = (file.metadata()?.len(), offset + bytes.len() as u64);
                let grown = end.div_ceil(BLOCK).saturating_sub(before.div_ceil(BLOCK));
                free.take(0, grown)?;
            }
            Call::Remove(path) => {
                let freed = fs::symlink_metadata(path).map(|meta| (meta.nlink(), meta.len()));
                let result = run()?;
                if let Ok((1, len)) = freed {
                    free.inodes += 1;
                    free.blocks += len.div_ceil(BLOCK);
                }
                return Ok(result);
            }
            Call::RemoveDir(_) => {
                let result = run()?;
                free.inodes += 1;
                free.blocks += 1;
                return Ok(result);
            }
            _ => {}
        }
        drop(free);
        run()
    }
}

/// A store with garbage of every kind, and a layer that a ref keeps.
fn fill(dir: &Path) -> LayerId {
    let store = Store::open_on(dir, Arc::new(NoSync)).unwrap();
    let kept = publish(&store, &Files::from([(b"kept".to_vec(), noise(2000, 1))])).unwrap();
    name(&store, RefKind::Image, "kept", &[kept.layer_id]);
    for number in 0..40 {
        let mut files = Files::from([(b"a".to_vec(), noise(5000, 10 + number))]);
        if number % 10 == 0 {
            files.insert(b"large".to_vec(), noise(1 << 20, 100 + number));
        }
        publish(&store, &files).unwrap();
    }
    let recorded = publish(&store, &Files::from([(b"r".to_vec(), noise(2000, 2))])).unwrap();
    let record = Record {
        facts: Vec::new(),
        layer_id: recorded.layer_id,
        tree_id: recorded.tree_id,
        provenance: serde_json::Map::new(),
    };
    let key = iii_store::KeyId::from_bytes([1; 32]);
    store.put_record(&key, record).unwrap();
    kept.layer_id
}

fn name(store: &Store, kind: RefKind, name: &str, layers: &[LayerId]) {
    let layers = layers.to_vec();
    let info = serde_json::Value::Null;
    store.set_ref(kind, name, &Ref { layers, info }).unwrap();
}

fn open_full(dir: &Path, free: Free) -> (Store, Arc<Hooked<Small>>) {
    let disk = Arc::new(Hooked(Small(Mutex::new(free))));
    (Store::open_on(dir, disk.clone()).unwrap(), disk)
}

fn collect(store: &Store, policy: &Policy) -> Result<(), StoreError> {
    let plan = store.plan_gc(policy)?;
    store.gc(&plan, &|_| ()).map(drop)
}

/// Asserts that all garbage is gone, and that the kept layer is whole.
fn assert_collected(dir: &Path, kept: LayerId, case: &str) {
    assert_eq!(names(&dir.join("layers")), [kept.to_string()], "{case}");
    for empty in ["trash", "tmp", "leases", "locks", "loose", "keys"] {
        let left = names(&dir.join(empty));
        assert!(left.is_empty(), "{case}: {empty} holds {left:?}");
    }
    assert_eq!(names(&dir.join("packs")).len(), 2, "{case}");
    check_whole(dir);
}

#[test]
fn a_collection_needs_no_free_block_and_no_free_inode() {
    for inodes in 0..4 {
        for blocks in 0..4 {
            let dir = scratch();
            let kept = fill(dir.path());
            let (store, _) = open_full(dir.path(), Free { inodes, blocks });
            let case = format!("{inodes} inodes, {blocks} blocks");
            if let Err(err) = collect(&store, &greedy()) {
                panic!("{case}: {}", causes(&err));
            }
            assert_collected(dir.path(), kept, &case);
            // For the next time.
            assert!(names(&dir.path().join("reserve")).len() > 8, "{case}");
        }
    }
}

const NONE: Free = Free {
    inodes: 0,
    blocks: 0,
};

/// A store of an earlier program has no reserve; the stat caches of its projects serve.
#[test]
fn without_a_reserve_stat_caches_go() {
    let (dir, project) = (scratch(), project());
    let kept = fill(dir.path());
    let store = Store::open_on(dir.path(), Arc::new(NoSync)).unwrap();
    for number in 0..12 {
        let options = Options {
            name: &format!("project{number}"),
            at: b"workspace",
            excludes: &[],
            uid: 0,
            gid: 0,
        };
        let lease = store.lease("test").unwrap();
        snapshot(&store, &lease, project.path(), &options).unwrap();
    }
    fs::remove_dir_all(dir.path().join("reserve")).unwrap();
    let (store, _) = open_full(dir.path(), NONE);
    collect(&store, &greedy()).unwrap();
    assert_collected(dir.path(), kept, "stat caches");
}

#[test]
fn without_a_reserve_what_was_interrupted_goes() {
    let dir = scratch();
    let kept = fill(dir.path());
    for number in 0..12 {
        let path = dir.path().join(format!("tmp/dead.{number}"));
        fs::write(path, noise(5000, number)).unwrap();
    }
    fs::remove_dir_all(dir.path().join("reserve")).unwrap();
    let (store, _) = open_full(dir.path(), NONE);
    collect(&store, &greedy()).unwrap();
    assert_collected(dir.path(), kept, "leftovers");
}

/// No operation can succeed, each reports that, and nothing is lost.
#[test]
fn without_anything_to_give_up_the_error_is_that_of_the_disk() {
    let dir = scratch();
    let kept = fill(dir.path());
    fs::remove_dir_all(dir.path().join("reserve")).unwrap();
    let (store, _) = open_full(dir.path(), NONE);
    let err = collect(&store, &greedy()).unwrap_err();
    assert_eq!(err.io_kind(), Some(io::ErrorKind::StorageFull));
    let layer = store.layer(&kept).unwrap();
    assert_eq!(read_back(&store, &layer).len(), 1);
    check_whole(dir.path());
}

#[test]
fn a_ref_of_any_kind_can_be_removed() {
    for kind in RefKind::ALL {
        let dir = scratch();
        let layer = fill(dir.path());
        let store = Store::open_on(dir.path(), Arc::new(NoSync)).unwrap();
        name(&store, kind, "gone", &[layer]);
        let (store, disk) = open_full(dir.path(), NONE);
        assert!(store.remove_ref(kind, "gone").unwrap(), "{kind:?}");
        assert_eq!(store.get_ref(kind, "gone").unwrap(), None);
        // While the disk is full, the reserve stays smaller.
        *disk.0.0.lock().unwrap() = NONE;
        assert!(store.remove_ref(RefKind::Image, "kept").unwrap());
    }
}

/// The filesystems on which this binary runs itself again, and the command that mounts each at
/// `$1`.
const FILESYSTEMS: [(&str, &str); 3] = [
    (
        "blocks",
        "mount -t tmpfs -o size=12m,nr_inodes=100000 none \"$1\"",
    ),
    (
        "inodes",
        "mount -t tmpfs -o size=200m,nr_inodes=800 none \"$1\"",
    ),
    (
        "ext4",
        "truncate -s 16M \"$1.img\" && mkfs.ext4 -q -N 2048 -m 0 \"$1.img\" && \
         mount -o loop \"$1.img\" \"$1\"",
    ),
];

#[test]
fn a_real_filesystem_that_is_full_can_be_cleared() {
    if !rustix::process::getuid().is_root() {
        eprintln!("SKIPPED: full filesystems: mounting one needs root");
        return;
    }
    for (name, mount) in FILESYSTEMS {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("mount");
        fs::create_dir(&at).unwrap();
        // The mount ends with the namespace, and that with its only process.
        let script = format!("{{ {mount}; }} || exit 77; shift; exec \"$@\"");
        let output = Command::new("unshare")
            .args(["-m", "sh", "-c", &script, "sh"])
            .arg(&at)
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "full::inside", "--ignored", "--nocapture"])
            .env(DIR, &at)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        if output.status.code() == Some(77) {
            eprintln!("SKIPPED: full filesystems: {name} cannot be mounted here: {said}");
            continue;
        }
        assert!(output.status.success(), "{name}: {said}");
        assert!(said.contains("cleared"), "{name}: {said}");
    }
}

/// Not a test: the work on the small filesystem.
#[test]
#[ignore = "run by the test beside it"]
fn inside() {
    let Some(mount) = std::env::var_os(DIR) else {
        return;
    };
    let mount = PathBuf::from(mount);
    let dir = mount.join("store");
    let kept = fill(&dir);
    let store = Store::open(&dir).unwrap();
    name(&store, RefKind::Snapshot, "gone", &[kept]);
    exhaust(&mount);
    if let Ok(mut file) = File::create(mount.join("one more")) {
        let written = file.write_all(&noise(1 << 16, 8));
        assert!(written.is_err(), "the disk is not full");
    }
    let publish = publish(&store, &Files::from([(b"new".to_vec(), noise(1 << 19, 9))]));
    let err = publish.unwrap_err();
    assert_eq!(err.io_kind(), Some(io::ErrorKind::StorageFull), "{err}");

    assert!(store.remove_ref(RefKind::Snapshot, "gone").unwrap());
    exhaust(&mount);
    if let Err(err) = collect(&store, &greedy()) {
        panic!("{}", causes(&err));
    }
    assert_collected(&dir, kept, "a real filesystem");
    eprintln!("cleared");
}

/// Takes every free inode and every free block.
fn exhaust(mount: &Path) {
    let mut number = 0;
    let dir = loop {
        let dir = mount.join(format!("filler{number}"));
        match fs::create_dir(&dir) {
            Ok(()) => break Some(dir),
            Err(err) if err.kind() == io::ErrorKind::AlreadyExists => number += 1,
            Err(_) => break None,
        }
    };
    let Some(dir) = dir else { return };
    // Large files first, then one byte each.
    for len in [1 << 20, 1 << 12, 1, 0] {
        for number in 0.. {
            let made = File::create_new(dir.join(format!("{len}.{number}")));
            let written = made.and_then(|mut file| file.write_all(&vec![7; len]));
            if written.is_err() {
                break;
            }
        }
    }
}
