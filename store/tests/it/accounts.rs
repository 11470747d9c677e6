//! Accounts of bytes, compared with the filesystem and with a slow count.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use iii_store::tree::{Content, Leaf, Meta, Node};
use iii_store::{
    Account, Kind, LOOSE_MIN, LayerId, ObjectId, Policy, Ref, RefKind, Root, Roots, Store,
    StoreError,
};

use crate::helpers::{add_files, files, noise, publish};

/// Blocks of everything below and including `path`, in bytes.
fn blocks(path: &Path) -> u64 {
    let meta = path.symlink_metadata().unwrap();
    let own = meta.blocks() * 512;
    if !meta.is_dir() {
        return own;
    }
    let entries = path.read_dir().unwrap();
    own + entries
        .map(|entry| blocks(&entry.unwrap().path()))
        .sum::<u64>()
}

/// The count of `du`, where one that counts in bytes is installed.
fn du(path: &Path) -> Option<u64> {
    let run = Command::new("du")
        .args(["-s", "--block-size=1"])
        .arg(path)
        .output()
        .ok()?;
    let text = String::from_utf8(run.stdout).ok()?;
    text.split_whitespace().next()?.parse().ok()
}

fn set_ref(store: &Store, kind: RefKind, name: &str, layers: &[LayerId]) {
    let content = Ref {
        layers: layers.to_vec(),
        info: serde_json::Value::Null,
    };
    store.set_ref(kind, name, &content).unwrap();
}

/// The objects of a layer with their lengths, and its file under an id that no object has.
fn parts(store: &Store, id: &LayerId) -> BTreeMap<ObjectId, u64> {
    let layer = store.layer(id).unwrap();
    let objects = layer.nodes().filter(|node| node.kind() == Kind::File);
    let mut parts: BTreeMap<_, _> = objects.map(|node| (node.object(), node.size())).collect();
    let file = store.dir().join("layers").join(id.to_string());
    parts.insert(
        ObjectId::from_bytes(*id.as_bytes()),
        file.metadata().unwrap().len(),
    );
    parts
}

/// Bytes of only the layers of `own`, and bytes that the layers of `others` share.
fn split(store: &Store, own: &[LayerId], others: &[LayerId]) -> (u64, u64) {
    let union = |ids: &[LayerId]| -> BTreeMap<ObjectId, u64> {
        ids.iter().flat_map(|id| parts(store, id)).collect()
    };
    let others = union(others);
    let own = union(own);
    let sum = |wanted: bool| -> u64 {
        let parts = own
            .iter()
            .filter(|(id, _)| others.contains_key(*id) == wanted);
        parts.map(|(_, len)| len).sum()
    };
    (sum(false), sum(true))
}

fn check_sums(store: &Store, account: &Account) {
    assert_eq!(account.on_disk(), blocks(store.dir()));
    if let Some(du) = du(store.dir()) {
        assert_eq!(account.on_disk(), du);
    }
    let lengths = account.named
        + account.in_trash
        + account.unnamed
        + account.layer_files
        + account.indexes
        + account.other;
    assert_eq!(lengths as i64 + account.padding(), account.on_disk() as i64);
    let named = account.named + account.layer_files;
    let unique: u64 = account.layers.iter().map(|layer| layer.unique).sum();
    assert_eq!(unique + account.shared_by_layers, named);
    let unique: u64 = account.refs.iter().map(|name| name.unique).sum();
    assert_eq!(unique + account.shared_by_refs + account.in_no_ref, named);
}

#[test]
fn everything_adds_up() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    check_sums(&store, &store.account().unwrap());

    let large = String::from_utf8(vec![b'x'; LOOSE_MIN as usize + 5]).unwrap();
    let sets = [
        files(&[
            ("a", "one"),
            ("b", "two"),
            ("again", "one"),
            ("large", &large),
        ]),
        files(&[("a", "one"), ("c", "three"), ("empty", "")]),
        files(&[("d", "four"), ("large", &large), ("e", "two")]),
        files(&[("only", "here, and in no ref")]),
        files(&[]),
    ];
    let ids = sets
        .each_ref()
        .map(|set| publish(&store, set).unwrap().layer_id);
    set_ref(&store, RefKind::Image, "base", &ids[..1]);
    set_ref(&store, RefKind::Worker, "one", &[ids[0], ids[1], ids[4]]);
    set_ref(&store, RefKind::Worker, "two", &[ids[0], ids[2], ids[0]]);

    let account = store.account().unwrap();
    check_sums(&store, &account);
    assert_eq!(account.unnamed, 0);
    assert!(account.unreadable.is_empty());
    let listed: Vec<_> = account.layers.iter().map(|layer| layer.id).collect();
    assert_eq!(listed, store.layer_ids().unwrap());
    assert_eq!(listed.len(), ids.len());
    for layer in &account.layers {
        let others: Vec<_> = ids.into_iter().filter(|id| *id != layer.id).collect();
        let expected = split(&store, &[layer.id], &others);
        assert_eq!((layer.unique, layer.shared), expected, "{layer:?}");
        assert_eq!(layer.missing, 0);
        let opened = store.layer(&layer.id).unwrap();
        assert_eq!(layer.logical, opened.logical_bytes());
        assert_eq!(layer.tree_id, opened.tree_id());
    }
    for name in &account.refs {
        let others = account.refs.iter().filter(|other| other.name != name.name);
        let others: Vec<_> = others.flat_map(|other| other.layers.clone()).collect();
        let expected = split(&store, &name.layers, &others);
        assert_eq!((name.unique, name.shared), expected, "{name:?}");
        let layers: BTreeSet<_> = name.layers.iter().collect();
        let logical = layers
            .iter()
            .map(|id| store.layer(id).unwrap().logical_bytes());
        assert_eq!(name.logical, logical.sum::<u64>());
    }
    let names: Vec<_> = account.refs.iter().map(|name| &*name.name).collect();
    assert_eq!(names, ["base", "one", "two"]);
}

#[test]
fn tells_what_no_layer_names() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let kept = publish(&store, &files(&[("a", "kept")])).unwrap().layer_id;
    let small = noise(5000, 1);
    let large = noise(LOOSE_MIN as usize, 2);
    let set = BTreeMap::from([
        (b"s".to_vec(), small),
        (b"l".to_vec(), large),
        (b"k".to_vec(), b"kept".to_vec()),
    ]);
    let gone = publish(&store, &set).unwrap().layer_id;
    let file = dir.path().join("layers").join(gone.to_string());
    std::fs::remove_file(file).unwrap();

    let store = Store::open(dir.path()).unwrap();
    let account = store.account().unwrap();
    check_sums(&store, &account);
    assert_eq!(account.unnamed, 5000 + LOOSE_MIN);
    assert_eq!(
        (account.named, account.in_no_ref),
        (4, 4 + account.layer_files)
    );
    assert_eq!(account.layers.len(), 1);
    assert_eq!(account.layers[0].id, kept);
}

#[test]
fn a_damaged_store_is_counted_too() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let whole = publish(&store, &files(&[("a", "a"), ("b", "b")]))
        .unwrap()
        .layer_id;
    let cut = publish(&store, &files(&[("c", "cc")])).unwrap().layer_id;
    let lost = {
        let lease = store.lease("test").unwrap();
        let ingest = store.ingest(&lease).unwrap();
        let set = BTreeMap::from([(b"l".to_vec(), noise(LOOSE_MIN as usize, 3))]);
        let mut tree = add_files(&ingest, &set).unwrap();
        let fifo = Leaf {
            meta: Meta::default(),
            content: Content::Fifo,
            link: None,
        };
        tree.entries.insert((*b"fifo").into(), Node::Leaf(fifo));
        ingest.finish(&tree).unwrap().layer_id
    };
    drop(store);
    let path = dir.path().join("layers").join(cut.to_string());
    let bytes = std::fs::read(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    std::fs::remove_dir_all(dir.path().join("loose")).unwrap();
    std::fs::create_dir(dir.path().join("loose")).unwrap();
    std::fs::write(dir.path().join("packs/foreign"), "?").unwrap();

    let store = Store::open(dir.path()).unwrap();
    let account = store.account().unwrap();
    assert_eq!(account.on_disk(), blocks(dir.path()));
    let [StoreError::Layer { id, .. }] = &account.unreadable[..] else {
        panic!("one layer is damaged: {:?}", account.unreadable);
    };
    assert_eq!(*id, cut);
    assert_eq!(account.unnamed, 2);
    let missing: BTreeMap<_, _> = account.layers.iter().map(|l| (l.id, l.missing)).collect();
    assert_eq!(missing, BTreeMap::from([(whole, 0), (lost, 1)]));
}

#[test]
fn leases_of_the_living_are_roots() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let layer = publish(&store, &files(&[("a", "a")])).unwrap().layer_id;
    let roots = || Roots::read(&store).unwrap().of(&layer).to_vec();
    assert_eq!(roots(), []);
    let lease = store.lease("dev my-worker").unwrap();
    lease.pin(&[layer]).unwrap();
    // A process that was killed leaves these files.
    let dead = format!("iii-lease 1 x\nlayer {layer}\n");
    std::fs::write(dir.path().join("leases/dead"), dead).unwrap();
    let purpose = "dev my-worker".to_owned();
    assert_eq!(roots(), [Root::Lease { purpose }]);
    drop(lease);
    assert_eq!(roots(), []);
}

#[test]
fn trash_is_counted_as_such() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let kept = publish(&store, &files(&[("a", "kept"), ("b", "both")])).unwrap();
    set_ref(&store, RefKind::Worker, "one", &[kept.layer_id]);
    publish(&store, &files(&[("c", "only in trash"), ("b", "both")])).unwrap();
    let policy = |grace| Policy {
        min_free: None,
        max_bytes: None,
        grace,
        ..Policy::default()
    };
    let gc = |grace| {
        let plan = store.plan_gc(&policy(grace)).unwrap();
        store.gc(&plan, &|_| {}).unwrap()
    };
    gc(Duration::from_secs(600));
    let account = store.account().unwrap();
    check_sums(&store, &account);
    assert_eq!(account.layers.len(), 1);
    assert_eq!(account.unnamed, 0);
    let trash = account
        .areas
        .iter()
        .find(|area| area.name == "trash")
        .unwrap();
    assert_eq!(account.in_trash, trash.bytes + "only in trash".len() as u64);
    // Counting brings nothing back: an object in the trash stays there.
    assert_eq!(store.layer_ids().unwrap(), [kept.layer_id]);

    gc(Duration::ZERO);
    let account = store.account().unwrap();
    check_sums(&store, &account);
    assert_eq!((account.in_trash, account.unnamed), (0, 0));
    assert_eq!(account.named, 8);
}
