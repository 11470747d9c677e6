//! Every call fails in turn. After each failure, every promise holds, every file with a name is
//! whole, and the same work succeeds when it is repeated.

use std::error::Error;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};

use iii_store::disk::Disk;
use iii_store::{Store, StoreError};
use rustix::io::Errno;

use crate::helpers::{Files, NoSync, copy, names, publish};
use crate::seam::{Call, Hook, Hooked};
use crate::workload::{Promised, Work, causes, check, project, scratch};

#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    /// One call fails, the others work.
    Io,
    /// One call that writes finds no room.
    NoSpace,
    /// One write stores half of its bytes and fails.
    ShortWrite,
    /// One read returns half of the bytes it could. That is no failure.
    ShortRead,
    /// This call and all that follow fail: the process might as well be dead.
    Death,
}

impl Fault {
    /// Whether this fault can happen to a call.
    fn befalls(self, call: &Call<'_>) -> bool {
        match self {
            Self::Io | Self::Death => true,
            Self::NoSpace => call.writes(),
            Self::ShortWrite => matches!(call, Call::Write(..)),
            Self::ShortRead => matches!(call, Call::Read),
        }
    }
}

/// Fails call number `at` of the calls to which the fault can happen.
#[derive(Debug)]
struct Failing {
    fault: Fault,
    at: AtomicI64,
    calls: AtomicI64,
    /// The call that failed.
    failed: Mutex<Option<String>>,
    short: AtomicI64,
}

impl Failing {
    fn new(fault: Fault, at: i64) -> Self {
        Self {
            fault,
            at: AtomicI64::new(at),
            calls: AtomicI64::new(0),
            failed: Mutex::default(),
            short: AtomicI64::new(0),
        }
    }

    fn fails(&self, call: &Call<'_>) -> bool {
        if !self.fault.befalls(call) {
            return false;
        }
        let number = self.calls.fetch_add(1, Ordering::Relaxed);
        let at = self.at.load(Ordering::Relaxed);
        if number == at {
            *self.failed.lock().unwrap() = Some(format!("{call:?}"));
        }
        number == at || (self.fault == Fault::Death && number > at)
    }
}

impl Hook for Failing {
    fn around<T>(&self, call: Call<'_>, run: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        if !self.fails(&call) {
            return run();
        }
        let errno = match self.fault {
            Fault::Io | Fault::Death => Errno::IO,
            Fault::NoSpace => Errno::NOSPC,
            Fault::ShortWrite => {
                if let Call::Write(file, bytes, offset) = call {
                    NoSync.write_at(file, &bytes[..bytes.len() / 2], offset)?;
                }
                Errno::NOSPC
            }
            Fault::ShortRead => {
                self.short.store(1, Ordering::Relaxed);
                return run();
            }
        };
        Err(errno.into())
    }

    fn at_most(&self, len: usize) -> usize {
        if self.short.swap(0, Ordering::Relaxed) == 1 {
            return len.div_ceil(2);
        }
        len
    }
}

/// Whether the error is an expected result of a failed call.
fn is_known(err: &(dyn Error + 'static)) -> bool {
    let mut cause = err;
    while let Some(next) = cause.source() {
        cause = next;
    }
    let text = cause.to_string();
    cause.is::<io::Error>() || text.contains("cannot be read")
}

/// The fault happens to every call of the work, one after the other.
fn befall(fault: Fault, work: Work) {
    let project = project();
    let template = scratch();
    let before = work.prepare(&template.path().join("store")).unwrap();
    for at in 0.. {
        let dir = scratch();
        let dir = dir.path().join("home/store");
        if template.path().join("store").exists() {
            copy(&template.path().join("store"), &dir);
        }
        let failing = Arc::new(Hooked(Failing::new(fault, at)));
        let disk: Arc<dyn Disk> = failing.clone();
        let promised = Mutex::new(before.clone());
        let tell = |now: &Promised| *promised.lock().unwrap() = now.clone();
        let result = work.run(&dir, project.path(), &disk, &before, &tell);
        let promised = promised.into_inner().unwrap();
        let failed = failing.0.failed.lock().unwrap().take();
        let Some(failed) = failed else {
            result.unwrap();
            let least = match fault {
                Fault::ShortRead | Fault::ShortWrite => 2,
                _ => 40,
            };
            assert!(at > least, "{at} calls are fewer than there must be");
            return;
        };
        let looked = catch_unwind(AssertUnwindSafe(|| {
            if let Err(err) = &result {
                let text = causes(err.as_ref());
                assert!(
                    fault != Fault::ShortRead && is_known(err.as_ref()),
                    "{text}"
                );
            }
            // The next process finds a store that is whole, cleans up, and does the work.
            check(work, &dir, project.path(), &promised);
        }));
        if let Err(panic) = looked {
            let result = result.map_err(|err| causes(err.as_ref()));
            eprintln!("{fault:?} at {at}, {failed}, which gave {result:?}");
            resume_unwind(panic);
        }
    }
}

#[test]
fn every_call_fails_once() {
    befall(Fault::Io, Work::Store);
}

#[test]
fn every_call_fails_once_of_a_collection() {
    befall(Fault::Io, Work::Collect);
}

#[test]
fn every_call_that_writes_finds_no_room() {
    befall(Fault::NoSpace, Work::Store);
}

#[test]
#[ignore = "takes a minute, and finds what the others do"]
fn every_call_that_writes_finds_no_room_of_a_collection() {
    befall(Fault::NoSpace, Work::Collect);
}

#[test]
fn every_write_is_cut_short() {
    befall(Fault::ShortWrite, Work::Store);
}

#[test]
#[ignore = "takes a minute, and finds what the others do"]
fn every_write_is_cut_short_of_a_collection() {
    befall(Fault::ShortWrite, Work::Collect);
}

#[test]
fn every_read_gives_less_than_was_asked_for() {
    befall(Fault::ShortRead, Work::Store);
}

#[test]
fn every_read_gives_less_than_was_asked_for_of_a_collection() {
    befall(Fault::ShortRead, Work::Collect);
}

#[test]
fn every_call_is_the_last() {
    befall(Fault::Death, Work::Store);
}

#[test]
fn every_call_is_the_last_of_a_collection() {
    befall(Fault::Death, Work::Collect);
}

#[test]
fn every_call_fails_once_of_a_repair() {
    befall(Fault::Io, Work::Repair);
}

#[test]
fn every_read_gives_less_than_was_asked_for_of_a_repair() {
    befall(Fault::ShortRead, Work::Repair);
}

#[test]
fn every_call_fails_once_of_a_migration() {
    befall(Fault::Io, Work::Migrate);
}

/// Adds one more large object, of other bytes each time.
fn add_large(ingest: &iii_store::Ingest<'_>, number: u8) -> Result<(), StoreError> {
    let bytes = vec![number + 1; iii_store::LOOSE_MIN as usize];
    ingest.add_bytes(&bytes).map(drop)
}

/// Whichever call fails first, in the background or not: every later call, and the end, report that
/// failure, with its path and its cause.
#[test]
fn the_first_failure_of_an_ingest_is_the_one_that_is_told() {
    for fails in ["create", "write_at", "sync"] {
        let dir = tempfile::tempdir().unwrap();
        publish(&Store::open(dir.path()).unwrap(), &Files::new()).unwrap();
        let disk = Arc::new(Hooked(FailingOnce::of(fails)));
        let store = Store::open_on(dir.path(), disk.clone()).unwrap();
        let lease = store.lease("test").unwrap();
        let ingest = store.ingest(&lease).unwrap();
        disk.0.armed.store(true, Ordering::Relaxed);
        let mut told = Vec::new();
        for number in 0..100 {
            told.extend(add_large(&ingest, number).map_err(|err| causes(&err)).err());
        }
        let tree = iii_store::tree::Tree::default();
        told.push(causes(&ingest.finish(&tree).unwrap_err()));
        assert!(!disk.0.armed.load(Ordering::Relaxed), "{fails}");
        let first = &told[0];
        assert!(
            first.contains("/tmp/") && first.contains("os error 5"),
            "{first}"
        );
        assert!(told.iter().all(|text| text == first), "{fails}: {told:#?}");
    }
}

/// Once armed, fails one call of a kind, with an error that differs from those of the calls that
/// follow.
#[derive(Debug)]
struct FailingOnce {
    kind: &'static str,
    armed: AtomicBool,
}

impl FailingOnce {
    fn of(kind: &'static str) -> Self {
        let armed = AtomicBool::new(false);
        Self { kind, armed }
    }
}

impl Hook for FailingOnce {
    fn around<T>(&self, call: Call<'_>, run: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        if format!("{call:?}").starts_with(self.kind) && self.armed.swap(false, Ordering::Relaxed) {
            return Err(Errno::IO.into());
        }
        run()
    }
}

/// On a full disk, for example: the file would take the remaining room there, and stay until leases
/// are swept.
#[test]
fn a_lease_that_cannot_be_taken_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    Store::open(dir.path()).unwrap();
    for at in 0.. {
        let disk = Arc::new(Hooked(Failing::new(Fault::NoSpace, i64::MAX)));
        let store = Store::open_on(dir.path(), disk.clone()).unwrap();
        let calls = disk.0.calls.load(Ordering::Relaxed);
        disk.0.at.store(calls + at, Ordering::Relaxed);
        let taken = store.lease("test");
        if taken.is_ok() {
            assert!(at > 2, "it is made, written and renamed");
            break;
        }
        for name in ["tmp", "leases"] {
            assert!(names(&dir.path().join(name)).is_empty(), "{name} at {at}");
        }
    }
}
