//! Every byte of a store is flipped in turn: verification finds it, and every read is an error or
//! returns the stored bytes.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use iii_store::snapshot::{Options, snapshot};
use iii_store::tree::Tree;
use iii_store::verify::{Report, VerifyOptions};
use iii_store::{
    Fact, KeyId, LOOSE_MIN, LayerId, ObjectId, Record, Ref, RefKind, Seen, Store, StoreError,
};

use crate::helpers::{NoSync, add_files, noise};

/// The contents of the store.
pub struct Sample {
    layers: BTreeMap<LayerId, Tree>,
    objects: BTreeMap<ObjectId, Vec<u8>>,
    refs: Vec<(RefKind, String, Ref)>,
    records: BTreeMap<KeyId, Vec<Record>>,
}

pub fn open(dir: &Path) -> Result<Store, StoreError> {
    Store::open_on(dir, Arc::new(NoSync))
}

pub fn verify(store: &Store, data: bool) -> Report {
    store.verify(VerifyOptions { data }, &|_| {}).unwrap()
}

/// Stores something of every kind in the store in `dir`. Repeating it changes nothing.
pub fn fill(dir: &Path) -> Result<Sample, Box<dyn std::error::Error>> {
    let store = open(dir)?;
    let lease = store.lease("test")?;
    let mut sample = Sample {
        layers: BTreeMap::new(),
        objects: BTreeMap::new(),
        refs: Vec::new(),
        records: BTreeMap::new(),
    };
    let ingests = [
        vec![
            ("d/small", 10),
            ("d/large", LOOSE_MIN as usize + 100),
            ("empty", 0),
        ],
        vec![("block", 4100), ("d/small", 10), ("other", 333)],
    ];
    for (number, list) in ingests.iter().enumerate() {
        let files = list
            .iter()
            .map(|(path, len)| (path.as_bytes().to_vec(), noise(*len, *len as u64)))
            .collect();
        let ingest = store.ingest(&lease)?;
        let tree = add_files(&ingest, &files)?;
        let published = ingest.finish(&tree)?;
        sample.layers.insert(published.layer_id, tree);
        for bytes in files.into_values() {
            sample.objects.insert(ObjectId::of(&bytes), bytes);
        }
        let content = Ref {
            layers: vec![published.layer_id],
            info: serde_json::json!({ "number": number }),
        };
        let kind = RefKind::ALL[number];
        store.set_ref(kind, "Name", &content)?;
        sample.refs.push((kind, "Name".to_owned(), content));
        let key = KeyId::from_bytes([number as u8; 32]);
        let record = Record {
            facts: vec![Fact {
                path: b"a".to_vec(),
                seen: Seen::Absent,
            }],
            layer_id: published.layer_id,
            tree_id: published.tree_id,
            provenance: serde_json::Map::new(),
        };
        store.put_record(&key, record.clone())?;
        sample.records.insert(key, vec![record]);
    }
    let project = tempfile::tempdir()?;
    fs::write(project.path().join("a"), "project")?;
    let options = Options {
        name: "project",
        at: b"",
        excludes: &[],
        uid: 0,
        gid: 0,
    };
    snapshot(&store, &lease, project.path(), &options)?;
    sample
        .objects
        .insert(ObjectId::of(b"project"), b"project".to_vec());
    Ok(sample)
}

/// Reads everything that was stored. Every successful read returns the stored bytes. Returns the
/// number of failed reads.
pub fn read_all(store: &Store, sample: &Sample) -> usize {
    let mut failed = 0;
    for (id, tree) in &sample.layers {
        match store.layer(id) {
            // The encoding numbers the links anew, and the tree has none.
            Ok(layer) => assert!(layer.to_tree() == *tree, "layer {id}"),
            Err(_) => failed += 1,
        }
    }
    for (id, bytes) in &sample.objects {
        // In one piece, and in several.
        match store.object(id).map(|blob| (blob.read_all(1 << 30), blob)) {
            Ok((Ok(read), blob)) => {
                assert!(read == *bytes, "object {id}");
                let mut part = vec![0; 50];
                let at = bytes.len() as u64 / 2;
                let count = blob.read_at(&mut part, at).unwrap();
                assert_eq!(part[..count], bytes[at as usize..][..count]);
            }
            _ => failed += 1,
        }
        let Ok(blob) = open(store.dir()).and_then(|store| store.object(id)) else {
            continue;
        };
        let mut at = 0;
        let mut part = vec![0; 30_001];
        while at < bytes.len() {
            match blob.read_at(&mut part, at as u64) {
                Ok(count) => {
                    assert!(count > 0 && part[..count] == bytes[at..at + count]);
                    at += count;
                }
                Err(_) => at += part.len(),
            }
        }
    }
    for (kind, name, content) in &sample.refs {
        match store.get_ref(*kind, name) {
            Ok(Some(found)) => assert_eq!(found, *content),
            _ => failed += 1,
        }
    }
    for (key, records) in &sample.records {
        match store.records(key) {
            Ok(found) if found.is_empty() => failed += 1,
            Ok(found) => assert_eq!(found, *records),
            Err(_) => failed += 1,
        }
    }
    failed
}

/// The files of the store that hold data, relative to it. No operation reads the reserve.
pub fn stored_files(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut dirs = vec![PathBuf::new()];
    while let Some(at) = dirs.pop() {
        for entry in fs::read_dir(dir.join(&at)).unwrap() {
            let entry = entry.unwrap();
            let path = at.join(entry.file_name());
            if entry.file_type().unwrap().is_dir() {
                dirs.push(path);
            } else {
                files.push(path);
            }
        }
    }
    // A lock whose file cannot be removed is free all the same, and taken again under that name.
    files.retain(|file| !file.starts_with("reserve") && !file.starts_with("locks"));
    files.sort();
    files
}

pub fn copy(from: &Path, to: &Path) {
    for name in stored_files(from) {
        fs::create_dir_all(to.join(&name).parent().unwrap()).unwrap();
        fs::write(to.join(&name), fs::read(from.join(&name)).unwrap()).unwrap();
    }
    for dir in ["leases", "locks", "tmp"] {
        fs::create_dir_all(to.join(dir)).unwrap();
    }
}

/// Flips bytes, a `stride` apart, with each of the masks.
fn flip_all(stride: usize, masks: &[u8]) {
    let dir = tempfile::tempdir().unwrap();
    let sample = fill(dir.path()).unwrap();
    let store = open(dir.path()).unwrap();
    assert_eq!(read_all(&store, &sample), 0);
    let report = verify(&store, true);
    assert_eq!(report.problems, []);
    assert_eq!(
        (report.layers, report.packs, report.loose_objects),
        (3, 3, 1)
    );
    drop(store);

    let mut flips = Vec::new();
    for file in stored_files(dir.path()) {
        let len = fs::metadata(dir.path().join(&file)).unwrap().len() as usize;
        // Of a large file, its ends and some bytes between are enough.
        let step = if len as u64 > LOOSE_MIN {
            40_009
        } else {
            stride
        };
        let ends = [0, len - 1].into_iter();
        for at in (0..len).step_by(step).chain(ends) {
            flips.extend(masks.iter().map(|mask| (file.clone(), at as u64, *mask)));
        }
    }
    assert!(flips.len() > 1000);
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        for flips in flips.chunks(flips.len().div_ceil(threads)) {
            let (dir, sample) = (dir.path(), &sample);
            scope.spawn(move || {
                let own = tempfile::tempdir().unwrap();
                copy(dir, own.path());
                for (file, at, mask) in flips {
                    let path = own.path().join(file);
                    let file = fs::File::options()
                        .read(true)
                        .write(true)
                        .open(&path)
                        .unwrap();
                    let mut byte = [0];
                    file.read_exact_at(&mut byte, *at).unwrap();
                    file.write_all_at(&[byte[0] ^ mask], *at).unwrap();
                    if let Ok(store) = open(own.path()) {
                        let report = verify(&store, true);
                        let name = path.strip_prefix(own.path()).unwrap();
                        let at = format!("byte {at} of {} ^ {mask:#x}", name.display());
                        let found = report.problems.iter().any(|problem| {
                            problem.path.with_extension("") == name.with_extension("")
                        });
                        assert!(found, "{at}: {report:?}");
                        let failed = read_all(&store, sample);
                        let told = failed == 0 || !report.is_clean();
                        assert!(told, "{at}: {report:?}");
                    } else {
                        assert!(path.ends_with("format"), "{}", path.display());
                    }
                    file.write_all_at(&byte, *at).unwrap();
                }
                assert_eq!(verify(&open(own.path()).unwrap(), true).problems, []);
            });
        }
    });
}

#[test]
fn flipped_bytes_are_found_and_never_read() {
    flip_all(11, &[0x20]);
}

/// Every byte: minutes.
/// `cargo test -p iii-store --release --test it -- --ignored every_flipped_byte_of_a_store`
#[test]
#[ignore = "takes minutes"]
fn every_flipped_byte_of_a_store() {
    flip_all(1, &[0x01, 0x20, 0x80]);
}
