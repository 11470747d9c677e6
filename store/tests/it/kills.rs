//! Processes that store, name, pin, read and collect at once, and are killed at random.
//!
//! Each process is this test binary, with its task in its environment. A layer that one of them has
//! pinned and found must be whole as long as the process holds it; in the end, nothing in use is
//! lost and no garbage remains.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{fs, process};

use iii_store::snapshot::{Options, snapshot};
use iii_store::{
    Fact, KeyId, LOOSE_MIN, Layer, LayerId, Lease, ObjectId, Policy, Published, Record, Ref,
    RefKind, Seen, Store, StoreError, VerifyOptions,
};

use crate::helpers::{Files, NoSync, add_files, check_whole, names, noise, read_back};
use crate::workload::{Random, causes, scratch};

const DIR: &str = "III_STORE_KILLS_DIR";
const SEED: &str = "III_STORE_KILLS_SEED";
const PROCESSES: u64 = 8;

/// All contents of the test: few, so that much of the stored data exists already.
fn content(number: u64) -> Vec<u8> {
    let len = match number {
        0..24 => number * 10,
        24..30 => 5000 + number,
        30..34 => 200_000 + number,
        _ => LOOSE_MIN + number,
    };
    noise(len as usize, number)
}

const CONTENTS: u64 = 36;

/// The holdings of this process: a lease, the layers that it found whole, and the store as of then.
struct Held {
    store: Store,
    _lease: Lease,
    layers: Vec<Arc<Layer>>,
}

struct Busy {
    dir: PathBuf,
    store: Store,
    random: Random,
    held: Vec<Held>,
    number: u64,
}

const NAMES: [&str; 6] = ["a", "b", "c", "d", "e", "f"];

fn open(dir: &Path) -> Store {
    // A killed process loses nothing that it passed to the kernel.
    Store::open_on(&dir.join("store"), Arc::new(NoSync)).unwrap()
}

/// A policy that keeps as little as possible.
pub fn greedy() -> Policy {
    Policy {
        keep: Duration::ZERO,
        max_bytes: Some(0),
        min_free: None,
        grace: Duration::ZERO,
    }
}

impl Busy {
    fn pick(&mut self, count: u64) -> u64 {
        self.random.below(count)
    }

    fn name(&mut self) -> &'static str {
        NAMES[self.pick(NAMES.len() as u64) as usize]
    }

    fn key(&mut self) -> KeyId {
        KeyId::from_bytes([self.pick(4) as u8; 32])
    }

    /// Keeps existing, pinned layers, and checks them now and then.
    fn hold(&mut self, lease: Lease, layers: &[LayerId]) {
        let opened = layers.iter().map(|layer| self.store.layer(layer).unwrap());
        self.held.push(Held {
            layers: opened.collect(),
            store: self.store.clone(),
            _lease: lease,
        });
        self.look();
        if self.held.len() > 3 {
            self.held.remove(0);
        }
    }

    /// The held layers are whole, both in the old view of the store and in a new one.
    fn look(&mut self) {
        let now = open(&self.dir);
        for held in &self.held {
            for layer in &held.layers {
                read_back(&held.store, layer);
                read_back(&now, &now.layer(&layer.layer_id()).unwrap());
            }
        }
    }

    fn store_files(&mut self, lease: &Lease) -> Published {
        let mut files = Files::new();
        for _ in 0..=self.pick(8) {
            let number = self.pick(CONTENTS);
            files.insert(format!("f{number}").into_bytes(), content(number));
        }
        let ingest = self.store.ingest(lease).unwrap();
        let tree = add_files(&ingest, &files).unwrap();
        ingest.finish(&tree).unwrap()
    }

    fn store_project(&mut self, lease: &Lease) -> Published {
        let project = self.dir.join(format!("project{}", self.number));
        fs::create_dir_all(&project).unwrap();
        let number = self.pick(CONTENTS);
        fs::write(project.join(format!("f{}", number % 8)), content(number)).unwrap();
        let name = format!("project{}", self.number);
        let options = Options {
            name: &name,
            at: b"workspace",
            excludes: &[],
            uid: 0,
            gid: 0,
        };
        let taken = snapshot(&self.store, lease, &project, &options).unwrap();
        taken.published
    }

    fn publish(&mut self) {
        let lease = self.store.lease("publish").unwrap();
        let published = match self.pick(3) {
            0 => self.store_project(&lease),
            _ => self.store_files(&lease),
        };
        match self.pick(4) {
            0 => {
                let fact = Fact {
                    path: published.layer_id.to_string().into_bytes(),
                    seen: Seen::Absent,
                };
                let record = Record {
                    facts: vec![fact],
                    layer_id: published.layer_id,
                    tree_id: published.tree_id,
                    provenance: serde_json::Map::new(),
                };
                let key = self.key();
                self.store.put_record(&key, record).unwrap();
            }
            1 => {}
            _ => {
                let content = Ref {
                    layers: vec![published.layer_id],
                    info: serde_json::Value::Null,
                };
                let name = self.name();
                self.store.set_ref(RefKind::Worker, name, &content).unwrap();
            }
        }
        self.hold(lease, &[published.layer_id]);
    }

    /// Uses the layers of a name.
    fn use_ref(&mut self) {
        let name = self.name();
        let lease = self.store.lease("use").unwrap();
        let Some(content) = self.store.get_ref(RefKind::Worker, name).unwrap() else {
            return;
        };
        lease.pin(&content.layers).unwrap();
        // If the name still has these layers after the pin, it kept them until the pin did.
        if self.store.get_ref(RefKind::Worker, name).unwrap() == Some(content.clone()) {
            self.hold(lease, &content.layers);
        }
    }

    /// Uses the result of a recipe, if it still exists.
    fn use_record(&mut self) {
        let key = self.key();
        let lease = self.store.lease("use").unwrap();
        for record in self.store.records(&key).unwrap() {
            lease.pin(&[record.layer_id]).unwrap();
            match self.store.layer(&record.layer_id) {
                Ok(_) => return self.hold(lease, &[record.layer_id]),
                Err(StoreError::MissingLayer(_)) => {}
                Err(err) => panic!("{}", causes(&err)),
            }
        }
    }

    fn collect(&mut self) {
        match self.store.plan_gc(&greedy()) {
            Ok(plan) => {
                self.store.gc(&plan, &|_| ()).unwrap();
            }
            Err(StoreError::NothingKept { .. }) => {}
            Err(err) => panic!("{}", causes(&err)),
        }
    }

    /// The program's work after each edit: layers wait in the trash then.
    fn collect_if_many(&mut self) {
        if !self.store.has_many_files().unwrap() {
            return;
        }
        match self.store.plan_gc(&Policy::default()) {
            Ok(plan) => drop(self.store.try_gc(&plan, &|_| ()).unwrap()),
            Err(StoreError::NothingKept { .. }) => {}
            Err(err) => panic!("{}", causes(&err)),
        }
    }

    fn step(&mut self) {
        match self.pick(16) {
            0..6 => {
                self.publish();
                self.collect_if_many();
            }
            6..9 => self.use_ref(),
            9..11 => self.use_record(),
            11 => {
                let name = self.name();
                self.store.remove_ref(RefKind::Worker, name).unwrap();
            }
            12 => {
                self.store.sweep_dead_leases().unwrap();
            }
            13 => self.store = open(&self.dir),
            14 => self.look(),
            _ => self.collect(),
        }
    }
}

/// Not a test: the work of each process until it is killed.
#[test]
#[ignore = "run by the test beside it"]
fn one_of_them() {
    let Some(dir) = std::env::var_os(DIR) else {
        return;
    };
    // It ends with the test, however that ends.
    std::thread::spawn(|| {
        let _ = io::copy(&mut io::stdin(), &mut io::sink());
        process::exit(0);
    });
    let dir = PathBuf::from(dir);
    let seed = std::env::var(SEED).unwrap().parse().unwrap();
    let mut busy = Busy {
        store: open(&dir),
        dir,
        random: Random::new(seed),
        held: Vec::new(),
        number: seed % PROCESSES,
    };
    loop {
        busy.step();
    }
}

struct Process {
    child: Child,
    log: PathBuf,
}

fn start(dir: &Path, seed: u64) -> Process {
    let log = dir.join(format!("log{seed}"));
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "kills::one_of_them", "--ignored", "--nocapture"])
        .env(DIR, dir)
        .env(SEED, seed.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    Process { child, log }
}

impl Process {
    /// Kills the process, which must not have ended by itself.
    fn kill(mut self) {
        let ended = self.child.try_wait().unwrap();
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        let log = fs::read_to_string(&self.log).unwrap();
        assert!(ended.is_none(), "ended with {ended:?}:\n{log}");
        fs::remove_file(&self.log).unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn kill_for(time: Duration) {
    let dir = scratch();
    drop(open(dir.path()));
    let mut random = Random::new(process::id().into());
    let mut started = 0;
    let mut next = || {
        started += 1;
        // The project of a process is its own.
        start(
            dir.path(),
            (started / PROCESSES) * PROCESSES + started % PROCESSES,
        )
    };
    let mut running: Vec<_> = (0..PROCESSES).map(|_| next()).collect();
    let begin = Instant::now();
    let mut kills = 0;
    while begin.elapsed() < time {
        std::thread::sleep(Duration::from_millis(random.below(40)));
        let at = random.below(PROCESSES) as usize;
        running.remove(at).kill();
        kills += 1;
        running.push(next());
    }
    for process in running {
        process.kill();
    }
    let store = open(dir.path());
    let refs = store.list_refs(RefKind::Worker).unwrap();
    let keys = names(&store.dir().join("keys"));
    eprintln!(
        "{kills} kills; {} layers, {} refs, {} keys",
        names(&store.dir().join("layers")).len(),
        refs.len(),
        keys.len()
    );
    check_whole(store.dir());
    let report = store.verify(VerifyOptions { data: true }, &|_| ()).unwrap();
    assert!(report.is_clean(), "{:?}", report.problems);
    for (name, content) in &refs {
        for layer in &content.layers {
            assert!(store.layer(layer).is_ok(), "{name} has lost its layer");
        }
    }
    assert_nothing_leaked(&store);
}

/// After a collection, only the layers that refs need remain.
pub fn assert_nothing_leaked(store: &Store) {
    // A collection refuses to empty a store.
    let lease = store.lease("test").unwrap();
    let ingest = store.ingest(&lease).unwrap();
    let tree = add_files(&ingest, &Files::new()).unwrap();
    let root = ingest.finish(&tree).unwrap().layer_id;
    let content = Ref {
        layers: vec![root],
        info: serde_json::Value::Null,
    };
    store.set_ref(RefKind::Image, "root", &content).unwrap();
    drop(lease);
    // The garbage of the first collection may wait for the second.
    for _ in 0..2 {
        let plan = store.plan_gc(&greedy()).unwrap();
        store
            .gc(&plan, &|event| panic!("{event:?}"))
            .unwrap_or_else(|err| panic!("{}", causes(&err)));
    }
    let dir = store.dir();
    for name in ["tmp", "trash", "leases", "locks"] {
        let left = names(&dir.join(name));
        assert!(left.is_empty(), "{name} holds {left:?}");
    }
    let mut kept = BTreeSet::new();
    for kind in RefKind::ALL {
        for (_, content) in store.list_refs(kind).unwrap() {
            kept.extend(content.layers.iter().map(LayerId::to_string));
        }
    }
    let layers = names(&dir.join("layers"));
    assert!(layers.iter().eq(&kept), "{layers:?} instead of {kept:?}");
    check_whole(dir);
    let mut objects = BTreeSet::new();
    for layer in &layers {
        let layer = store.layer(&layer.parse().unwrap()).unwrap();
        objects.extend(read_back(store, &layer).values().map(|bytes| {
            let id = ObjectId::of(bytes);
            (id, bytes.len() as u64)
        }));
    }
    let (large, small): (Vec<_>, Vec<_>) = objects.iter().partition(|(_, len)| *len >= LOOSE_MIN);
    let large: Vec<_> = large.iter().map(|(id, _)| id.to_string()).collect();
    let loose = names(&dir.join("loose"));
    let stem = |name: &String| name.split('.').next().map(str::to_owned);
    let mut stored: Vec<_> = loose.iter().filter_map(stem).collect();
    stored.dedup();
    assert_eq!(stored, large, "{loose:?}");
    let packs = names(&dir.join("packs"));
    let stems: Vec<_> = packs.iter().map(|name| name.split('.').next()).collect();
    assert!(
        stems
            .chunks(2)
            .all(|pair| pair.len() == 2 && pair[0] == pair[1]),
        "{packs:?}"
    );
    // A pack is rewritten when less than half of it lives; small objects are padded.
    let size = |name: &String| fs::metadata(dir.join("packs").join(name)).unwrap().len();
    let report = store.verify(VerifyOptions::default(), &|_| ()).unwrap();
    assert!(report.is_clean(), "{:?}", report.problems);
    let packed: u64 = packs
        .iter()
        .filter(|name| name.rsplit('.').next() == Some("pack"))
        .map(size)
        .sum();
    let live: u64 = small.iter().map(|(_, len)| len).sum();
    let most = live * 2 + packs.len() as u64 * 8192;
    assert!(packed <= most, "packs of {packed} bytes for {live}");
}

#[test]
fn eight_processes_are_killed_at_random() {
    kill_for(Duration::from_secs(15));
}

#[test]
#[ignore = "takes minutes"]
fn eight_processes_are_killed_at_random_for_long() {
    kill_for(Duration::from_secs(180));
}
