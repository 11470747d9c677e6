//! The decoders of the store: for all bytes, they never panic, and accepted values can be encoded
//! again.
//!
//! Part of two crates: the fuzz targets, and the store's own tests, which run it over the corpus.

use iii_store::outboard::Outboard;
use iii_store::pack::{Index, encode_index};
use iii_store::stat_cache::{self, FileStat, StatCache};
use iii_store::{Fact, Layer, LiveLease, NodeRef, Record, Ref, diff, facts, layer, seal};

/// A layer file.
pub fn check_layer(bytes: &[u8]) {
    let Ok(found) = Layer::from_bytes(bytes.to_vec()) else {
        return;
    };
    found.body_holds();
    let mut nodes = vec![found.root()];
    while let Some(node) = nodes.pop() {
        nodes.extend(node.children());
        let at = found.lookup(&node.path()).map(NodeRef::index);
        assert_eq!(at, Some(node.index()));
        assert_eq!(node.xattrs().count(), node.meta().xattrs.len());
        assert_eq!(node.is_hardlinked(), node.links().count() > 0);
    }
    // Decoded values can be encoded, and then say the same. (Decoded values may be larger than
    // those that may be encoded.)
    if let Ok(again) = layer::encode(&found.to_tree()) {
        let again = Layer::from_bytes(again.bytes).expect("an encoded layer can be decoded");
        assert!(diff(&found, &again).len() <= found.node_count() as usize);
        let bytes = layer::encode(&again.to_tree()).map(|encoded| encoded.layer_id);
        assert_eq!(bytes, Ok(again.layer_id()));
    }
}

/// The index of a pack.
pub fn check_index(bytes: &[u8]) {
    let Ok(index) = Index::from_bytes(bytes.to_vec()) else {
        return;
    };
    let objects: Vec<_> = index.objects().collect();
    for (id, place) in &objects {
        assert_eq!(index.find(id), Some(*place));
    }
    let again = Index::from_bytes(encode_index(&objects, index.pack_len()));
    let again = again.expect("an encoded index can be decoded");
    assert!(again.objects().eq(objects));
}

/// A stat cache.
pub fn check_stat_cache(bytes: &[u8]) {
    // The checksum is what keeps damage out; behind it, nothing may be trusted either.
    let mut sealed = bytes.to_vec();
    stat_cache::seal(&mut sealed);
    for bytes in [bytes.to_vec(), sealed] {
        let Some(cache) = StatCache::from_bytes(bytes) else {
            continue;
        };
        for path in [&b""[..], b"src", b"\xff"] {
            let dir = cache.dir(path);
            for name in [&b""[..], b"a", b"main.ts"] {
                dir.get(name, &FileStat::default());
            }
        }
        assert!(cache.is_empty() || cache.outcome().is_some());
    }
}

/// The contents of a key's or a ref's file.
pub fn check_record(bytes: &[u8]) {
    if let Ok(record) = serde_json::from_slice::<Record>(bytes) {
        let text = serde_json::to_vec(&record).expect("a record can be written");
        let again = serde_json::from_slice::<Record>(&text).expect("a written record can be read");
        assert_eq!(record, again);
        let empty = layer::encode(&iii_store::tree::Tree::default()).expect("an empty tree");
        let empty = Layer::from_bytes(empty.bytes).expect("an empty layer");
        let mismatch: Option<&Fact> = facts::first_mismatch(&record.facts, empty.root());
        assert!(mismatch.is_none_or(|fact| record.facts.contains(fact)));
    }
    if let Ok(content) = serde_json::from_slice::<Ref>(bytes) {
        let text = serde_json::to_vec(&content).expect("a ref can be written");
        serde_json::from_slice::<Ref>(&text).expect("a written ref can be read");
    }
}

/// A sealed JSON file: a key, a ref, the format, what a generation of the trash says of itself.
pub fn check_seal(bytes: &[u8]) {
    if let Some(json) = seal::open(bytes) {
        assert_eq!(seal::seal(json.to_vec()), bytes);
    }
    let sealed = seal::seal(bytes.to_vec());
    assert_eq!(seal::open(&sealed), Some(bytes));
}

/// The file of a lease, which another process is writing.
pub fn check_lease(bytes: &[u8]) {
    let lease = LiveLease::parse("name".to_owned(), bytes);
    assert!(lease.layers.len() <= bytes.len() / 71);
    assert!(!lease.purpose.contains('\n'));
    // An unfinished line changes nothing.
    let unfinished = [bytes, b"\nlayer 12"].concat();
    let whole = [bytes, b"\n"].concat();
    let parse = |bytes: &[u8]| LiveLease::parse("name".to_owned(), bytes);
    assert_eq!(parse(&unfinished), parse(&whole));
}

/// The outboard of a large object.
pub fn check_outboard(bytes: &[u8]) {
    let len = bytes.get(16..).and_then(|bytes| bytes.first_chunk());
    let len = u64::from_le_bytes(len.copied().unwrap_or_default());
    let Some(outboard) = Outboard::parse(bytes, len) else {
        return;
    };
    assert_eq!(outboard.encode(), bytes);
    outboard.root();
    let mut end = 0;
    for group in 0..outboard.groups() {
        let (start, len) = outboard.range(group);
        assert_eq!(start, end);
        end = start + len as u64;
        outboard.group_holds(group, b"");
    }
    assert_eq!(end, len);
    assert!(!outboard.group_holds(outboard.groups(), b""));
}
