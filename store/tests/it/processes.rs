//! Several processes on one store. The other process is this test binary, with its task in its
//! environment.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use iii_store::{KeyId, LayerId, Store};

use crate::helpers::{check_whole, files, names, publish};

const ROLE: &str = "III_STORE_TEST_ROLE";
const DIR: &str = "III_STORE_TEST_DIR";
const KEY: KeyId = KeyId::from_bytes([5; 32]);

struct Other {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Other {
    fn start(role: &str, dir: &Path) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "processes::other_process",
                "--ignored",
                "--nocapture",
            ])
            .env(ROLE, role)
            .env(DIR, dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Self {
            stdin: child.stdin.take(),
            stdout: BufReader::new(child.stdout.take().unwrap()),
            child,
        }
    }

    /// Waits until the process prints `word`.
    fn wait_for(&mut self, word: &str) {
        let mut line = String::new();
        while self.stdout.read_line(&mut line).unwrap() > 0 {
            if line.trim_end().ends_with(word) {
                return;
            }
            line.clear();
        }
        panic!("the other process ended without saying {word:?}");
    }

    fn go_on(&mut self) {
        self.stdin.as_mut().unwrap().write_all(b"\n").unwrap();
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        drop(self.stdin.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn say(word: &str) {
    println!("\n{word}");
}

fn wait() {
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
}

/// Not a test: the work of the other process.
#[test]
#[ignore = "run by the tests beside it"]
fn other_process() {
    let Ok(role) = std::env::var(ROLE) else {
        return;
    };
    let store = Store::open(std::env::var_os(DIR).unwrap()).unwrap();
    match role.as_str() {
        "lease" => {
            let lease = store.lease("other").unwrap();
            lease.pin(&[LayerId::from_bytes([9; 32])]).unwrap();
            let ingest = store.ingest(&lease).unwrap();
            ingest.add_bytes(b"half done").unwrap();
            say("leased");
            wait();
        }
        "flight" => {
            let _flight = store.flight(&KEY, &|| say("waiting")).unwrap();
            say("flying");
            wait();
        }
        "publish" => {
            say("ready");
            wait();
            for n in 0..20 {
                publish(&store, &files(&[("same", "same"), ("n", &n.to_string())])).unwrap();
                store.sweep_dead_leases().unwrap();
            }
            say("published");
        }
        role => panic!("{role}"),
    }
}

#[test]
fn a_lease_dies_with_its_holder() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let mut other = Other::start("lease", dir.path());
    other.wait_for("leased");
    assert_eq!(store.sweep_dead_leases().unwrap(), 0);
    assert_eq!(names(&dir.path().join("leases")).len(), 1);
    assert_eq!(names(&dir.path().join("tmp")).len(), 1);
    other.child.kill().unwrap();
    other.child.wait().unwrap();
    assert_eq!(store.sweep_dead_leases().unwrap(), 1);
    assert!(names(&dir.path().join("leases")).is_empty());
    assert!(names(&dir.path().join("tmp")).is_empty());
}

#[test]
fn one_builds_the_others_wait() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let mut first = Other::start("flight", dir.path());
    first.wait_for("flying");
    let mut second = Other::start("flight", dir.path());
    second.wait_for("waiting");
    // A different key is independent.
    drop(
        store
            .flight(&KeyId::from_bytes([6; 32]), &|| panic!("nobody has it"))
            .unwrap(),
    );
    first.go_on();
    second.wait_for("flying");
    // The lock of a killed process is free as well.
    let waits = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let third = scope.spawn(|| {
            let on_wait = || {
                waits.fetch_add(1, Ordering::SeqCst);
            };
            drop(store.flight(&KEY, &on_wait).unwrap());
        });
        while waits.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        second.child.kill().unwrap();
        third.join().unwrap();
    });
    assert_eq!(waits.load(Ordering::SeqCst), 1);
    assert!(names(&dir.path().join("locks")).is_empty());
}

#[test]
fn a_flight_is_held_by_one_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let inside = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let store = Store::open(dir.path()).unwrap();
                for _ in 0..200 {
                    let flight = store.flight(&KEY, &|| {}).unwrap();
                    assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                    std::thread::yield_now();
                    assert_eq!(inside.fetch_sub(1, Ordering::SeqCst), 1);
                    drop(flight);
                }
            });
        }
    });
}

#[test]
fn processes_that_publish_the_same_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut others: Vec<_> = (0..3)
        .map(|_| Other::start("publish", dir.path()))
        .collect();
    for other in &mut others {
        other.wait_for("ready");
    }
    for other in &mut others {
        other.go_on();
    }
    for other in &mut others {
        other.wait_for("published");
    }
    drop(others);
    assert_eq!(check_whole(dir.path()), 20);
    assert!(names(&dir.path().join("tmp")).is_empty());
}
