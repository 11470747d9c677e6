//! The work of the tests of faults and power cuts, the promises of the store at each moment of it,
//! and the check that a store holds them.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use iii_store::disk::Disk;
use iii_store::snapshot::{Options, snapshot};
use iii_store::{
    Fact, KeyId, LOOSE_MIN, LayerId, ObjectId, Policy, Published, Record, Ref, RefKind, Seen,
    Store, VerifyOptions,
};
use tempfile::TempDir;

use crate::helpers::{Files, NoSync, add_files, check_whole, names, noise};
use crate::kills::{assert_nothing_leaked, greedy};
use crate::repairs::unseal;

/// The state that a store must keep, whatever happens from now on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Promised {
    layers: BTreeSet<LayerId>,
    /// The layers of a name, or nothing. While the name changes, either.
    refs: BTreeMap<(RefKind, &'static str), Vec<Option<LayerId>>>,
    /// The layers of the records of a key. While they change, either.
    records: BTreeMap<KeyId, Vec<Vec<LayerId>>>,
}

const KEY: KeyId = KeyId::from_bytes([1; 32]);

/// The files of a layer: small, middle, large.
fn contents() -> &'static Files {
    static FILES: OnceLock<Files> = OnceLock::new();
    FILES.get_or_init(|| {
        [
            (b"small".to_vec(), noise(10, 0)),
            (b"middle".to_vec(), noise(200_000, 1)),
            (b"large".to_vec(), noise(LOOSE_MIN as usize + 1, 2)),
        ]
        .into()
    })
}

/// A directory in memory, if the system has one.
pub fn scratch() -> TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap())
}

/// A project for a snapshot: one small file, one large one, a link, a directory.
pub fn project() -> TempDir {
    let project = scratch();
    let path = |name: &str| project.path().join(name);
    std::fs::write(path("a"), "a").unwrap();
    std::fs::create_dir(path("dir")).unwrap();
    std::fs::write(path("dir/b"), noise(LOOSE_MIN as usize, 3)).unwrap();
    std::os::unix::fs::symlink("a", path("link")).unwrap();
    project
}

/// A process at work on a store, which announces each promise as soon as it is made.
pub struct Worker<'a> {
    pub store: Store,
    disk: Arc<dyn Disk>,
    promised: Promised,
    tell: &'a dyn Fn(&Promised),
}

type Outcome<T> = Result<T, Box<dyn Error>>;

impl<'a> Worker<'a> {
    pub fn open(dir: &Path, disk: Arc<dyn Disk>, tell: &'a dyn Fn(&Promised)) -> Outcome<Self> {
        Ok(Self {
            store: Store::open_on(dir, Arc::clone(&disk))?,
            disk,
            promised: Promised::default(),
            tell,
        })
    }

    /// Collects. First withdraws the promises of layers that no ref and no record keeps; if the
    /// policy may drop recorded layers, of all that no ref keeps.
    fn collect(&mut self, policy: &Policy) -> Outcome<()> {
        let kept = |records: bool| -> BTreeSet<LayerId> {
            let refs = self.promised.refs.values().flatten().flatten().copied();
            let of_records = self.promised.records.values().flatten().flatten().copied();
            refs.chain(of_records.filter(|_| records)).collect()
        };
        let drops = policy.max_bytes.is_some();
        let kept = kept(!drops);
        self.promised.layers.retain(|layer| kept.contains(layer));
        let records = self.promised.records.clone();
        if drops {
            for either in self.promised.records.values_mut() {
                let rooted = |list: &Vec<LayerId>| {
                    let rooted = list.iter().filter(|layer| kept.contains(layer));
                    rooted.copied().collect()
                };
                let left: Vec<Vec<LayerId>> = either.iter().map(rooted).collect();
                either.extend(left);
            }
        }
        self.tell();
        let plan = self.store.plan_gc(policy)?;
        self.store.gc(&plan, &|_| ())?;
        if drops {
            for (key, either) in records {
                let left = self.promised.records.entry(key).or_default();
                left.drain(..either.len());
            }
        }
        self.tell();
        Ok(())
    }

    fn tell(&self) {
        (self.tell)(&self.promised);
    }

    fn publish(&mut self, files: &Files) -> Outcome<Published> {
        let lease = self.store.lease("test")?;
        let ingest = self.store.ingest(&lease)?;
        let tree = add_files(&ingest, files)?;
        let published = ingest.finish(&tree)?;
        self.promised.layers.insert(published.layer_id);
        self.tell();
        Ok(published)
    }

    fn set_ref(&mut self, kind: RefKind, name: &'static str, layer: LayerId) -> Outcome<()> {
        let slot = self.promised.refs.entry((kind, name)).or_insert(vec![None]);
        slot.push(Some(layer));
        self.tell();
        let content = Ref {
            layers: vec![layer],
            info: serde_json::Value::Null,
        };
        self.store.set_ref(kind, name, &content)?;
        self.promised.refs.insert((kind, name), vec![Some(layer)]);
        self.tell();
        Ok(())
    }

    fn remove_ref(&mut self, kind: RefKind, name: &'static str) -> Outcome<()> {
        let slot = self.promised.refs.entry((kind, name)).or_insert(vec![None]);
        slot.push(None);
        self.tell();
        self.store.remove_ref(kind, name)?;
        self.promised.refs.insert((kind, name), vec![None]);
        self.tell();
        Ok(())
    }

    /// Puts a record in front of the others, with which it shares no fact.
    fn put_record(&mut self, of: &Published) -> Outcome<()> {
        let fact = Fact {
            path: of.layer_id.to_string().into_bytes(),
            seen: Seen::Absent,
        };
        let record = Record {
            facts: vec![fact],
            layer_id: of.layer_id,
            tree_id: of.tree_id,
            provenance: serde_json::Map::new(),
        };
        let slot = self.promised.records.entry(KEY);
        let slot = slot.or_insert_with(|| vec![Vec::new()]);
        let mut records = vec![of.layer_id];
        records.extend(slot.first().unwrap());
        slot.push(records.clone());
        self.tell();
        self.store.put_record(&KEY, record)?;
        self.promised.records.insert(KEY, vec![records]);
        self.tell();
        Ok(())
    }

    fn snapshot(&mut self, project: &Path) -> Outcome<Published> {
        let options = Options {
            name: "project",
            at: b"workspace",
            excludes: &[],
            uid: 0,
            gid: 0,
        };
        let lease = self.store.lease("test")?;
        let published = snapshot(&self.store, &lease, project, &options)?.published;
        self.promised.layers.insert(published.layer_id);
        self.tell();
        Ok(published)
    }

    /// Stores a layer, or finds it there, and names it.
    pub fn store_all(&mut self) -> Outcome<()> {
        self.store_all_as("image")
    }

    /// The same, under another name.
    pub fn store_all_as(&mut self, name: &'static str) -> Outcome<()> {
        let published = self.publish(contents())?;
        self.set_ref(RefKind::Image, name, published.layer_id)
    }

    /// Leaves the files of a process that died.
    fn die(&self) -> Outcome<()> {
        for name in ["tmp/dead.0", "leases/dead", "locks/dead.flight"] {
            let path: PathBuf = self.store.dir().join(name);
            let _ = std::fs::remove_file(&path);
            let file = self.disk.create(&path)?;
            self.disk.write_at(&file, b"half", 0)?;
        }
        Ok(())
    }
}

/// An operation on a store.
#[derive(Debug, Clone, Copy)]
pub enum Work {
    /// Makes a store, with layers, refs, records and snapshots.
    Store,
    /// Collects a store that has garbage.
    Collect,
    /// Repairs a damaged store.
    Repair,
    /// Migrates a store of an earlier layout.
    Migrate,
}

/// Removes only layers without a name, and only into the trash.
const GENTLE: Policy = Policy {
    keep: Duration::from_secs(86_400),
    max_bytes: None,
    min_free: None,
    grace: Duration::from_secs(3600),
};

impl Work {
    pub const ALL: [Self; 4] = [Self::Store, Self::Collect, Self::Repair, Self::Migrate];

    /// Prepares the store for the work. Returns the promises at that point.
    pub fn prepare(self, dir: &Path) -> Outcome<Promised> {
        if let Self::Store = self {
            return Ok(Promised::default());
        }
        let mut worker = Worker::open(dir, Arc::new(NoSync), &|_| ())?;
        let kept = Files::from([
            (b"kept".to_vec(), noise(2000, 10)),
            (b"large".to_vec(), noise(LOOSE_MIN as usize, 11)),
        ]);
        let kept = worker.publish(&kept)?;
        worker.set_ref(RefKind::Worker, "kept", kept.layer_id)?;
        worker.put_record(&kept)?;
        // A pack of which little is needed, and an object that is a file of its own.
        let mut mostly = contents().clone();
        for number in 10..20 {
            mostly.insert(vec![b'a' + number], noise(2000, number.into()));
        }
        worker.publish(&mostly)?;
        let recorded = Files::from([
            (b"recorded".to_vec(), noise(500, 30)),
            (b"mostly".to_vec(), noise(2000, 11)),
        ]);
        let recorded = worker.publish(&recorded)?;
        worker.put_record(&recorded)?;
        let (layers, records) = (&mut worker.promised.layers, &mut worker.promised.records);
        match self {
            Self::Repair => {
                // The damaged parts have no promise.
                *layers = [kept.layer_id].into();
                let all = records.get(&KEY).unwrap().first().unwrap().clone();
                records.insert(KEY, vec![all, vec![kept.layer_id]]);
                harm(dir, &mostly)?;
            }
            Self::Migrate => unseal(dir),
            Self::Store | Self::Collect => {}
        }
        Ok(worker.promised)
    }

    /// Makes the store usable, as a later process would.
    fn make_usable(self, dir: &Path, disk: &Arc<dyn Disk>) -> Outcome<()> {
        match self {
            Self::Store | Self::Collect => {}
            Self::Repair => {
                let store = Store::open_on(dir, Arc::clone(disk))?;
                // The second repair mends the damage that the first one uncovers.
                for _ in 0..2 {
                    let report = store.verify(VerifyOptions { data: true }, &|_| ())?;
                    store.repair(&report, &|_| ())?;
                }
            }
            Self::Migrate => drop(Store::migrate(dir, Arc::clone(disk), &|_| ())?),
        }
        Ok(())
    }

    /// Does every kind of work.
    pub fn run(
        self,
        dir: &Path,
        project: &Path,
        disk: &Arc<dyn Disk>,
        promised: &Promised,
        tell: &dyn Fn(&Promised),
    ) -> Outcome<()> {
        self.make_usable(dir, disk)?;
        let mut worker = Worker::open(dir, Arc::clone(disk), tell)?;
        worker.promised = promised.clone();
        worker.tell();
        match self {
            Self::Store => worker.store(project),
            Self::Collect => worker.collect_all(),
            Self::Repair | Self::Migrate => worker.store_all(),
        }
    }
}

/// Damages an object of a pack, an object that is a file of its own, and the layer of these files.
fn harm(dir: &Path, files: &Files) -> Outcome<()> {
    let flip = |path: &Path, at: usize| -> std::io::Result<()> {
        let mut bytes = std::fs::read(path)?;
        bytes[at] ^= 1;
        std::fs::remove_file(path)?;
        std::fs::write(path, bytes)
    };
    let large = ObjectId::of(&files[&b"large"[..]]);
    flip(&dir.join("loose").join(large.to_string()), 5)?;
    let part = &files[&b"middle"[..]][..100];
    for name in names(&dir.join("packs")) {
        let path = dir.join("packs").join(name);
        let bytes = std::fs::read(&path)?;
        let found = bytes.windows(part.len()).position(|bytes| bytes == part);
        if let Some(at) = found {
            flip(&path, at)?;
        }
    }
    Ok(())
}

impl Worker<'_> {
    fn store(&mut self, project: &Path) -> Outcome<()> {
        let first = self.publish(contents())?;
        self.set_ref(RefKind::Image, "image", first.layer_id)?;
        self.put_record(&first)?;
        // Most of it is there already.
        let mut files = contents().clone();
        files.insert(b"new".to_vec(), b"new".to_vec());
        let second = self.publish(&files)?;
        self.set_ref(RefKind::Worker, "worker", first.layer_id)?;
        self.set_ref(RefKind::Worker, "worker", second.layer_id)?;
        self.put_record(&second)?;
        let taken = self.snapshot(project)?;
        self.set_ref(RefKind::Worker, "gone", taken.layer_id)?;
        self.snapshot(project)?;
        self.remove_ref(RefKind::Worker, "gone")?;
        self.die()?;
        self.store.sweep_dead_leases()?;
        Ok(())
    }

    fn collect_all(&mut self) -> Outcome<()> {
        // Into the trash, and back out of it.
        self.collect(&GENTLE)?;
        let again = self.publish(contents())?;
        self.set_ref(RefKind::Worker, "again", again.layer_id)?;
        self.collect(&GENTLE)?;
        self.remove_ref(RefKind::Worker, "again")?;
        self.collect(&GENTLE)?;
        // Records, packs and all.
        self.collect(&greedy())?;
        let again = self.publish(contents())?;
        self.set_ref(RefKind::Worker, "again", again.layer_id)?;
        self.collect(&greedy())
    }
}

/// Asserts that the store in `dir` opens, keeps the promises and is whole, that unneeded layers can
/// be freed, and that the same work succeeds then.
pub fn check(work: Work, dir: &Path, project: &Path, promised: &Promised) {
    let disk: Arc<dyn Disk> = Arc::new(NoSync);
    if let Err(err) = work.make_usable(dir, &disk) {
        panic!("{}", causes(&*err));
    }
    check_promised(dir, promised);
    let store = Store::open_on(dir, Arc::clone(&disk)).unwrap();
    store.sweep_dead_leases().unwrap();
    for name in ["tmp", "leases", "locks"] {
        let left = names(&dir.join(name));
        assert!(left.is_empty(), "{name} holds {left:?}");
    }
    assert_nothing_leaked(&store);
    for either in promised.refs.values() {
        assert!(
            either
                .iter()
                .any(|layer| layer.is_none_or(|layer| store.layer(&layer).is_ok()))
        );
    }
    let before = Promised::default();
    if let Err(err) = work.run(dir, project, &disk, &before, &|_| ()) {
        panic!("the same work fails then: {}", causes(&*err));
    }
    check_whole(dir);
}

fn check_promised(dir: &Path, promised: &Promised) {
    let store = match Store::open_on(dir, Arc::new(NoSync)) {
        Ok(store) => store,
        Err(err) => panic!("{}", causes(&err)),
    };
    for layer in &promised.layers {
        if let Err(err) = store.layer(layer) {
            panic!("{}", causes(&err));
        }
    }
    let there = |layer: &Option<LayerId>| layer.is_none_or(|layer| store.layer(&layer).is_ok());
    for ((kind, name), either) in &promised.refs {
        let found = store.get_ref(*kind, name).unwrap();
        let found = found.map(|content| content.layers[0]);
        assert!(either.contains(&found), "{name} is {found:?}");
        assert!(there(&found), "{name} has no layer");
    }
    for (key, either) in &promised.records {
        let found = store.records(key).unwrap();
        let found: Vec<_> = found.iter().map(|record| record.layer_id).collect();
        assert!(either.contains(&found), "the records are {found:?}");
        let whole = found.iter().all(|layer| there(&Some(*layer)));
        assert!(whole, "a record has no layer");
    }
    check_whole(dir);
    let report = store.verify(VerifyOptions { data: true }, &|_| ()).unwrap();
    assert!(report.is_clean(), "{:?}", report.problems);
}

/// An error and its causes.
pub fn causes(err: &(dyn Error + 'static)) -> String {
    let mut text = err.to_string();
    let mut cause = err.source();
    while let Some(next) = cause {
        text.push_str(": ");
        text.push_str(&next.to_string());
        cause = next.source();
    }
    text
}

/// Numbers by a seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed << 20)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(1);
        u64::from_le_bytes(noise(8, self.0).try_into().unwrap())
    }

    /// A number less than `count`.
    pub fn below(&mut self, count: u64) -> u64 {
        self.next() % count
    }
}
