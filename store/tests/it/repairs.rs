//! Repair and migration: every damaged part is named, set aside, and made again by the same work.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use iii_store::verify::Severity;
use iii_store::{Finding, Mended, Policy, RefKind, Store, StoreError, seal};
use tempfile::TempDir;

use crate::flips::{copy, fill, open, read_all, stored_files, verify};
use crate::helpers::NoSync;
use crate::seam::{Call, Hook, Hooked};

/// The damage of a file.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Harm {
    Flip,
    Cut,
    Empty,
    Grow,
    Replace,
    Remove,
}

const HARMS: [Harm; 6] = [
    Harm::Flip,
    Harm::Cut,
    Harm::Empty,
    Harm::Grow,
    Harm::Replace,
    Harm::Remove,
];

fn harm(path: &Path, how: Harm) {
    let mut bytes = fs::read(path).unwrap();
    fs::remove_file(path).unwrap();
    match how {
        Harm::Flip => {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
        }
        Harm::Cut => bytes.truncate(bytes.len() / 2),
        Harm::Empty => bytes.clear(),
        Harm::Grow => bytes.extend([0; 100]),
        Harm::Replace => bytes = b"#!/bin/sh\necho hello\n".to_vec(),
        Harm::Remove => return,
    }
    fs::write(path, bytes).unwrap();
}

fn repair(dir: &Path) -> Vec<Mended> {
    let store = Store::open_to_repair(dir, Arc::new(NoSync)).unwrap();
    let report = verify(&store, true);
    store.repair(&report, &|_| ()).unwrap()
}

#[test]
fn whatever_is_harmed_is_named_set_aside_and_made_again() {
    let template = tempfile::tempdir().unwrap();
    fill(template.path()).unwrap();
    for file in stored_files(template.path()) {
        for how in HARMS {
            let at = format!("{how:?} {}", file.display());
            let dir = tempfile::tempdir().unwrap();
            let dir = dir.path();
            copy(template.path(), dir);
            harm(&dir.join(&file), how);

            let store = Store::open_to_repair(dir, Arc::new(NoSync)).unwrap();
            let report = verify(&store, true);
            // No check can notice that a key, a ref, a cache or a layer without a name is gone.
            let unknown = ["keys", "refs", "stat", "layers"];
            let unknown = how == Harm::Remove && unknown.iter().any(|dir| file.starts_with(dir));
            let stem = file.with_extension("");
            let named = report.problems.iter().any(|problem| {
                problem.path.with_extension("") == stem
                    || (how == Harm::Remove && problem.severity == Severity::Damage)
            });
            assert!(named || unknown, "{at}: {report:?}");
            // Checks of the structure find all damage but that of the bytes of objects.
            let bytes = file.starts_with("packs") || file.starts_with("loose");
            let quick = verify(&store, false).problems.is_empty();
            assert!(!quick || bytes || unknown, "{at}");
            drop(store);

            let done = repair(dir);
            let store = open(dir).unwrap();
            let report = verify(&store, true);
            assert!(report.is_mended(), "{at}: {done:?}: {report:?}");
            drop(store);
            let sample = fill(dir).unwrap();
            let store = open(dir).unwrap();
            assert_eq!(read_all(&store, &sample), 0, "{at}: {done:?}");
            let report = verify(&store, true);
            assert!(report.is_clean(), "{at}: {report:?}");
            assert_eq!(store.repair(&report, &|_| ()).unwrap(), [], "{at}");
            // The damaged files are kept for inspection.
            if how != Harm::Remove {
                let aside = dir.join("damaged/1").join(&file);
                assert!(aside.exists(), "{at}: {done:?}");
            }
        }
    }
}

#[test]
fn a_damaged_object_takes_only_what_needs_it() {
    let dir = tempfile::tempdir().unwrap();
    let sample = fill(dir.path()).unwrap();
    // The one object of the second ingest's image that is in no other layer.
    let packs = stored_files(&dir.path().join("packs"));
    let pack = packs.iter().find(|pack| {
        let bytes = fs::read(dir.path().join("packs").join(pack)).unwrap();
        bytes.len() > 8000 && pack.extension().is_some_and(|it| it == "pack")
    });
    let pack = dir.path().join("packs").join(pack.unwrap());
    let mut bytes = fs::read(&pack).unwrap();
    bytes[5000] ^= 1;
    fs::remove_file(&pack).unwrap();
    fs::write(&pack, bytes).unwrap();
    let done = repair(dir.path());
    let salvaged = |done: &Mended| {
        matches!(
            done,
            Mended::Salvaged {
                objects: 1,
                lost: 1,
                ..
            }
        )
    };
    assert!(done.iter().any(salvaged), "{done:?}");
    let not_whole = |kind| {
        let is = |done: &&Mended| matches!(done, Mended::RefNotWhole { ref_kind, layers: 1, .. } if *ref_kind == kind);
        done.iter().filter(is).count()
    };
    assert_eq!(
        (not_whole(RefKind::Image), not_whole(RefKind::Worker)),
        (0, 1)
    );
    // An object, a layer and its records are gone; its ref stays.
    assert_eq!(read_all(&open(dir.path()).unwrap(), &sample), 3);
}

#[test]
fn what_a_collection_took_out_is_looked_at_too() {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path()).unwrap();
    let store = open(dir.path()).unwrap();
    store.remove_ref(RefKind::Image, "Name").unwrap();
    let policy = Policy {
        keep: Duration::ZERO,
        grace: Duration::from_secs(1000),
        ..Policy::default()
    };
    let plan = store.plan_gc(&policy).unwrap();
    store.gc(&plan, &|_| ()).unwrap();
    assert!(verify(&store, true).is_clean());
    let trash = dir.path().join("trash");
    let layer = stored_files(&trash);
    let layer = layer
        .iter()
        .find(|path| path.extension().is_some_and(|it| it == "layer"));
    harm(&trash.join(layer.unwrap()), Harm::Flip);
    let report = verify(&store, false);
    assert!(matches!(report.problems[0].finding, Finding::Layer { .. }));
    store.repair(&report, &|_| ()).unwrap();
    assert!(verify(&store, true).is_clean());
    let plan = store.plan_gc(&policy).unwrap();
    store.gc(&plan, &|event| panic!("{event:?}")).unwrap();
}

#[test]
fn a_store_without_a_format_can_be_repaired_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path()).unwrap();
    let store = open(dir.path()).unwrap();
    let content = store.list_refs(RefKind::Image).unwrap().remove(0).1;
    store.set_ref(RefKind::Snapshot, "Name", &content).unwrap();
    drop(store);
    let format = fs::read(dir.path().join("format")).unwrap();
    fs::remove_file(dir.path().join("format")).unwrap();
    assert!(matches!(open(dir.path()), Err(StoreError::Damaged { .. })));
    let store = Store::open_to_repair(dir.path(), Arc::new(NoSync)).unwrap();
    assert!(matches!(
        store.lease("test"),
        Err(StoreError::ReadOnly { .. })
    ));
    let report = verify(&store, false);
    assert_eq!(report.problems[0].finding, Finding::Format);
    store.repair(&report, &|_| ()).unwrap();
    assert_eq!(fs::read(dir.path().join("format")).unwrap(), format);
    open(dir.path()).unwrap().lease("test").unwrap();
    // A directory that is not a store does not become one.
    let other = tempfile::tempdir().unwrap();
    fs::write(other.path().join("format"), "x").unwrap();
    assert!(Store::open_to_repair(other.path(), Arc::new(NoSync)).is_err());
}

/// Exits at a call that writes.
#[derive(Debug)]
struct Death {
    at: usize,
    calls: AtomicUsize,
}

impl Hook for Death {
    fn around<T>(&self, call: Call<'_>, run: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        if call.writes() && self.calls.fetch_add(1, Ordering::Relaxed) >= self.at {
            return Err(io::ErrorKind::Other.into());
        }
        run()
    }
}

/// Runs work that exits at each of its calls in turn, until it completes.
fn die_everywhere(template: &Path, run: &dyn Fn(&Path, Arc<Hooked<Death>>), check: &dyn Fn(&Path)) {
    for at in 0.. {
        let dir = tempfile::tempdir().unwrap();
        copy(template, dir.path());
        let disk = Arc::new(Hooked(Death {
            at,
            calls: AtomicUsize::new(0),
        }));
        run(dir.path(), disk.clone());
        check(dir.path());
        if disk.0.calls.load(Ordering::Relaxed) <= at {
            assert!(at > 20, "{at} calls are fewer than there must be");
            return;
        }
    }
}

#[test]
fn a_repair_may_be_cut_short_anywhere() {
    let template = tempfile::tempdir().unwrap();
    fill(template.path()).unwrap();
    for (number, file) in stored_files(template.path()).into_iter().enumerate() {
        // One of every kind is enough.
        if number % 3 == 0 && !file.ends_with("format") {
            harm(&template.path().join(file), Harm::Flip);
        }
    }
    die_everywhere(
        template.path(),
        &|dir, disk| {
            if let Ok(store) = Store::open_to_repair(dir, disk)
                && let Ok(report) = store.verify(iii_store::VerifyOptions { data: true }, &|_| ())
            {
                let _ = store.repair(&report, &|_| ());
            }
        },
        &|dir| {
            repair(dir);
            let store = open(dir).unwrap();
            store.sweep_dead_leases().unwrap();
            let report = verify(&store, true);
            assert!(report.is_mended(), "{report:?}");
            let sample = fill(dir).unwrap();
            assert_eq!(read_all(&store, &sample), 0);
        },
    );
}

/// The store as it was before seals.
pub fn unseal(dir: &Path) {
    for file in stored_files(dir) {
        let path = dir.join(&file);
        let text = fs::read(&path).unwrap();
        if file.extension().is_some_and(|it| it == "cv") {
            fs::remove_file(path).unwrap();
        } else if let Some(json) = seal::open(&text) {
            let json = String::from_utf8(json.to_vec()).unwrap();
            fs::remove_file(&path).unwrap();
            fs::write(&path, json.replace("\"sealed\"", "") + "\n").unwrap();
        }
    }
    let _ = fs::remove_dir_all(dir.join("trash"));
}

fn old_store() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fill(dir.path()).unwrap();
    unseal(dir.path());
    dir
}

#[test]
fn a_store_without_seals_is_refused_and_migrated() {
    let dir = tempfile::tempdir().unwrap();
    let sample = fill(dir.path()).unwrap();
    let lease = open(dir.path()).unwrap().lease("dev x").unwrap();
    unseal(dir.path());
    let err = open(dir.path()).unwrap_err();
    assert!(matches!(err, StoreError::Outdated(_)));
    assert!(err.to_string().contains("iii store migrate"), "{err}");
    let migrate = || Store::migrate(dir.path(), Arc::new(NoSync), &|_| ());
    let err = migrate().unwrap_err();
    assert!(matches!(&err, StoreError::InUse { purpose, .. } if purpose == "dev x"));
    drop(lease);
    fs::write(dir.path().join("refs/image/broken"), "{").unwrap();
    let done = migrate().unwrap();
    assert_eq!((done.sealed, done.outboards), (6, 1));
    assert_eq!(done.damaged, [Path::new("refs/image/broken")]);
    let store = open(dir.path()).unwrap();
    fs::remove_file(dir.path().join("refs/image/broken")).unwrap();
    assert_eq!(read_all(&store, &sample), 0);
    assert_eq!(verify(&store, true).problems, []);
    assert_eq!(migrate().unwrap(), iii_store::Migration::default());
    let nothing = dir.path().join("nothing");
    assert!(Store::migrate(&nothing, Arc::new(NoSync), &|_| ()).is_err());
}

#[test]
fn a_migration_may_be_cut_short_anywhere() {
    let template = old_store();
    die_everywhere(
        template.path(),
        &|dir, disk| {
            let _ = Store::migrate(dir, disk, &|_| ());
        },
        &|dir| {
            Store::migrate(dir, Arc::new(NoSync), &|_| ()).unwrap();
            let sample = fill(dir).unwrap();
            let store = open(dir).unwrap();
            store.sweep_dead_leases().unwrap();
            assert_eq!(read_all(&store, &sample), 0);
            assert_eq!(verify(&store, true).problems, []);
        },
    );
}

/// Asserts that every operation that writes is refused, and every other one works.
fn check_read_only(store: &Store) {
    let refused = |result: Result<(), StoreError>| {
        assert!(matches!(result, Err(StoreError::ReadOnly { .. })));
    };
    refused(store.lease("test").map(drop));
    let report = verify(store, true);
    assert!(report.is_clean(), "{report:?}");
    refused(store.repair(&report, &|_| ()).map(drop));
    let content = store.list_refs(RefKind::Image).unwrap().remove(0).1;
    refused(store.set_ref(RefKind::Image, "other", &content));
    let key = iii_store::KeyId::from_bytes([0; 32]);
    let record = store.records(&key).unwrap().remove(0);
    refused(store.put_record(&key, record).map(drop));
    refused(store.remove_ref(RefKind::Image, "Name").map(drop));
    refused(store.sweep_dead_leases().map(drop));
    store.layer(&content.layers[0]).unwrap();
    store.account().unwrap();
}

#[test]
fn unknown_ro_compat_features_leave_a_store_to_be_read() {
    let dir = tempfile::tempdir().unwrap();
    let sample = fill(dir.path()).unwrap();
    let format = dir.path().join("format");
    fs::remove_file(&format).unwrap();
    let text = br#"{"version":1,"ro_compat":["x"],"incompat":["sealed"]}"#;
    fs::write(&format, seal::seal(text.to_vec())).unwrap();
    let before = stored_files(dir.path());
    let store = open(dir.path()).unwrap();
    assert_eq!(read_all(&store, &sample), 0);
    check_read_only(&store);
    let report = verify(&store, true);
    assert_eq!(report.problems[0].finding, Finding::UnknownFeatures);
    assert_eq!(stored_files(dir.path()), before);
}

#[test]
fn a_store_on_tmpfs() {
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else {
        eprintln!("SKIPPED: a store on tmpfs: there is no /dev/shm that can be written");
        return;
    };
    let sample = fill(dir.path()).unwrap();
    let store = Store::open(dir.path()).unwrap();
    assert_eq!(read_all(&store, &sample), 0);
    assert_eq!(verify(&store, true).problems, []);
}

const DIR: &str = "III_STORE_TEST_READ_ONLY";

#[test]
fn a_store_of_somebody_else() {
    use std::os::unix::process::CommandExt;
    if let Some(dir) = std::env::var_os(DIR) {
        let dir = Path::new(&dir);
        check_read_only(&Store::open(dir).unwrap());
        let err = Store::open(dir.with_file_name("secret")).unwrap_err();
        assert_eq!(err.io_kind(), Some(io::ErrorKind::PermissionDenied));
        return;
    }
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: a store of somebody else: that takes root, to be somebody else");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    fill(&store).unwrap();
    let secret = dir.path().join("secret");
    fill(&secret).unwrap();
    let allow =
        |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    for file in stored_files(&store) {
        let path = store.join(file);
        allow(&path, 0o644);
        allow(path.parent().unwrap(), 0o755);
    }
    // The kinds without files.
    for name in [
        "leases",
        "locks",
        "tmp",
        "trash",
        "reserve",
        "refs",
        "refs/managed",
        "refs/snapshot",
        "refs/volume",
        "",
    ] {
        allow(&store.join(name), 0o755);
    }
    allow(dir.path(), 0o755);
    // Other users may have no access to the directory of the test binary.
    let other = dir.path().join("test");
    fs::copy(std::env::current_exe().unwrap(), &other).unwrap();
    allow(&other, 0o755);
    let child = std::process::Command::new(&other)
        .args([
            "--exact",
            "repairs::a_store_of_somebody_else",
            "--nocapture",
        ])
        .env(DIR, &store)
        .uid(65534)
        .gid(65534)
        .output();
    match child {
        Ok(output) => assert!(output.status.success(), "{output:?}"),
        Err(err) => eprintln!("SKIPPED: a store of somebody else: cannot be somebody else: {err}"),
    }
}
