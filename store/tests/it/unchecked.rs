//! An error of the machine is never damage: whichever call fails during verification and repair, no
//! whole file is called damaged, or moved.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use iii_store::verify::{Finding, Severity};
use iii_store::{Mended, Store, VerifyOptions};
use rustix::io::Errno;

use crate::flips::{copy, fill, open, read_all, stored_files, verify};
use crate::seam::{Call, Hook, Hooked};

/// The calls that fail, and their error.
#[derive(Debug, Clone, Copy)]
struct Failure {
    name: &'static str,
    of: fn(&Call<'_>) -> bool,
    errno: Errno,
}

const FAILURES: [Failure; 6] = [
    Failure {
        name: "no memory for a mapping",
        of: |call| matches!(call, Call::Map),
        errno: Errno::NOMEM,
    },
    Failure {
        name: "too many files open",
        of: |call| matches!(call, Call::Open(_)),
        errno: Errno::MFILE,
    },
    Failure {
        name: "no permission",
        of: |call| matches!(call, Call::Open(_)),
        errno: Errno::ACCESS,
    },
    Failure {
        name: "the disk fails",
        of: |call| matches!(call, Call::Read),
        errno: Errno::IO,
    },
    Failure {
        name: "the disk fails for a name",
        of: |call| matches!(call, Call::Metadata(_)),
        errno: Errno::IO,
    },
    Failure {
        name: "the disk fails for a directory",
        of: |call| matches!(call, Call::List(_)),
        errno: Errno::IO,
    },
];

/// Fails the calls of a kind, from one on.
#[derive(Debug)]
struct Failing {
    failure: Failure,
    from: usize,
    count: usize,
    calls: AtomicUsize,
}

impl Hook for Failing {
    fn around<T>(&self, call: Call<'_>, run: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        if (self.failure.of)(&call) {
            let number = self.calls.fetch_add(1, Ordering::Relaxed);
            if number
                .checked_sub(self.from)
                .is_some_and(|past| past < self.count)
            {
                return Err(self.failure.errno.into());
            }
        }
        run()
    }
}

/// The files that a repair sets aside when calls fail: `count` of them, from each call on in turn.
fn set_aside(template: &Path, failure: Failure, count: usize, check: &dyn Fn(&Path, &[PathBuf])) {
    // Where several calls fail at once, a sample of the calls is enough.
    let step = if count == 1 { 1 } else { 7 };
    for from in (0..).step_by(step) {
        let dir = tempfile::tempdir().unwrap();
        copy(template, dir.path());
        let disk = Arc::new(Hooked(Failing {
            failure,
            from,
            count,
            calls: AtomicUsize::new(0),
        }));
        let mut aside = Vec::new();
        if let Ok(store) = Store::open_to_repair(dir.path(), disk.clone())
            && let Ok(report) = store.verify(VerifyOptions { data: true }, &|_| ())
        {
            let at = format!("{}, {count} from {from}", failure.name);
            let done = std::sync::Mutex::new(Vec::new());
            let told = store.repair(&report, &|mended| done.lock().unwrap().push(mended.clone()));
            for mended in done.into_inner().unwrap() {
                match mended {
                    Mended::SetAside { path, .. } => aside.push(path),
                    Mended::Salvaged { .. }
                    | Mended::RecordsDropped { .. }
                    | Mended::RefNotWhole { .. } => {}
                    other => panic!("{at}: {other:?}: {told:?}: {report:?}"),
                }
            }
        }
        check(dir.path(), &aside);
        if disk.0.calls.load(Ordering::Relaxed) <= from {
            assert!(from > 3, "{}: {from} calls are too few", failure.name);
            return;
        }
    }
}

#[test]
fn a_healthy_store_is_left_as_it_is() {
    let template = tempfile::tempdir().unwrap();
    let sample = fill(template.path()).unwrap();
    let before = stored_files(template.path());
    for failure in FAILURES {
        for count in [1, usize::MAX] {
            set_aside(template.path(), failure, count, &|dir, aside| {
                let name = failure.name;
                assert!(aside.is_empty(), "{name}: {aside:?}");
                assert_eq!(stored_files(dir), before, "{name}");
                let store = open(dir).unwrap();
                assert_eq!(read_all(&store, &sample), 0, "{name}");
                assert!(verify(&store, true).is_clean(), "{name}");
            });
        }
    }
}

#[test]
fn beside_damage_nothing_else_is_set_aside() {
    let template = tempfile::tempdir().unwrap();
    fill(template.path()).unwrap();
    // An object in a pack, and the large one.
    let harmed = |file: &Path| {
        let len = fs::metadata(template.path().join(file)).unwrap().len();
        let is = |ext: &str| file.extension().is_some_and(|it| it == ext);
        (is("pack") && len > 8000) || (file.starts_with("loose") && !is("cv"))
    };
    for file in stored_files(template.path())
        .iter()
        .filter(|file| harmed(file))
    {
        let path = template.path().join(file);
        let mut bytes = fs::read(&path).unwrap();
        bytes[5000] ^= 1;
        fs::remove_file(&path).unwrap();
        fs::write(&path, bytes).unwrap();
    }
    let aside_of = |dir: &Path| {
        let aside = dir.join("damaged/1");
        let files = if aside.exists() {
            stored_files(&aside)
        } else {
            Vec::new()
        };
        files.into_iter().collect::<std::collections::BTreeSet<_>>()
    };
    let clean = tempfile::tempdir().unwrap();
    copy(template.path(), clean.path());
    let store = open(clean.path()).unwrap();
    store.repair(&verify(&store, true), &|_| ()).unwrap();
    let expected = aside_of(clean.path());
    assert!(expected.len() >= 6, "{expected:?}");
    for failure in FAILURES {
        for count in [1, usize::MAX] {
            set_aside(template.path(), failure, count, &|dir, _| {
                let aside = aside_of(dir);
                let extra: Vec<_> = aside.difference(&expected).collect();
                assert!(extra.is_empty(), "{}: {extra:?}", failure.name);
            });
        }
    }
}

/// Refuses every open of one file.
#[derive(Debug)]
struct Refused(PathBuf);

impl Hook for Refused {
    fn around<T>(&self, call: Call<'_>, run: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        match call {
            Call::Open(path) if path == self.0 => Err(Errno::ACCESS.into()),
            _ => run(),
        }
    }
}

#[test]
fn a_file_of_another_user_is_said_to_be_one() {
    let template = tempfile::tempdir().unwrap();
    fill(template.path()).unwrap();
    for file in stored_files(template.path()) {
        if file.ends_with("format") {
            continue;
        }
        let dir = tempfile::tempdir().unwrap();
        copy(template.path(), dir.path());
        let path = dir.path().join(&file);
        let is_ours = std::os::unix::fs::chown(&path, Some(12345), None).is_err();
        let disk = Arc::new(Hooked(Refused(path)));
        let store = Store::open_on(dir.path(), disk).unwrap();
        let report = store.verify(VerifyOptions { data: true }, &|_| ()).unwrap();
        let told = report.problems.iter().find(|problem| problem.path == file);
        let told = told.unwrap_or_else(|| panic!("{}: {report:?}", file.display()));
        assert_eq!(told.finding, Finding::Unchecked, "{told:?}");
        assert!(
            is_ours || told.what.contains("belongs to user 12345"),
            "{told:?}"
        );
        assert_eq!(report.worst(), Some(Severity::Unchecked), "{report:?}");
        assert!(!report.is_clean());
        let before = stored_files(dir.path());
        assert_eq!(store.repair(&report, &|_| ()).unwrap(), []);
        assert_eq!(stored_files(dir.path()), before);
    }
}
