//! The fuzz targets' checks over their committed corpus, and over bytes near it: as much as a
//! toolchain without a fuzzer can run.

use std::fs;
use std::path::PathBuf;

use iii_store::outboard::OutboardHasher;
use iii_store::pack::{Place, encode_index};
use iii_store::stat_cache::{self, DirEntries, FileStat, Outcome, Time};
use iii_store::tree::{Content, Dir, DirKind, Leaf, Meta, Mtime, Node, Rdev, Tree};
use iii_store::{Fact, LayerId, ObjectId, Record, Ref, Seen, SeenHash, TreeId, layer, seal};

use crate::helpers::{names, noise, put};
use iii_fuzz_checks::store::{
    check_index, check_layer, check_lease, check_outboard, check_record, check_seal,
    check_stat_cache,
};
use iii_test_support::{check_seeds, mutate};

type Check = fn(&[u8]);
const TARGETS: [(&str, Check); 7] = [
    ("store_layer", check_layer),
    ("store_index", check_index),
    ("store_stat_cache", check_stat_cache),
    ("store_record", check_record),
    ("store_seal", check_seal),
    ("store_lease", check_lease),
    ("store_outboard", check_outboard),
];
/// Variants of each seed.
const VARIANTS: u64 = 3000;

fn corpus(target: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus")).join(target)
}

#[test]
fn no_decoder_stumbles() {
    for (target, check) in TARGETS {
        let dir = corpus(target);
        let seeds = names(&dir);
        assert!(!seeds.is_empty(), "{target} has no seeds");
        for name in seeds {
            let seed = fs::read(dir.join(&name)).unwrap();
            check(&seed);
            for number in 0..VARIANTS {
                let bytes = mutate(&seed, &noise(64, number));
                let outcome = std::panic::catch_unwind(|| check(&bytes));
                assert!(outcome.is_ok(), "{target}: variant {number} of {name}");
            }
        }
    }
}

fn layers() -> Vec<Vec<u8>> {
    let leaf = |content, link| {
        Node::Leaf(Leaf {
            meta: Meta::default(),
            content,
            link,
        })
    };
    let file = Content::File {
        object: ObjectId::of(b"x"),
        size: 1,
    };
    let mut small = Tree::implicit();
    put(
        &mut small,
        b"workspace/package.json",
        ObjectId::of(b"{}"),
        2,
    );
    let mut large = Tree::default();
    let dir = large.dir_at(b"usr/lib").unwrap();
    dir.kind = DirKind::Opaque;
    dir.meta = Meta {
        mode: 0o1777,
        uid: 1000,
        gid: 1000,
        mtime: Mtime { sec: -1, nsec: 5 },
        xattrs: [(*b"user.a", b"1".to_vec()), (*b"user.b", Vec::new())]
            .into_iter()
            .map(|(name, value)| (name.into(), value.into()))
            .collect(),
    };
    let rdev = Rdev { major: 1, minor: 3 };
    let target = (*b"../x").into();
    for (name, content, link) in [
        ("a", file.clone(), Some(1)),
        ("b", file.clone(), Some(1)),
        ("c", Content::Symlink { target }, None),
        ("d", Content::Char(rdev), Some(2)),
        ("e", Content::Whiteout, None),
        ("f", Content::Fifo, Some(2)),
    ] {
        dir.entries
            .insert(name.as_bytes().into(), leaf(content, link));
    }
    large
        .entries
        .insert((*b"\xff").into(), leaf(Content::Socket, None));
    large.entries.insert((*b"top").into(), leaf(file, Some(1)));
    [Dir::default(), small, large]
        .iter()
        .map(|tree| layer::encode(tree).unwrap().bytes)
        .collect()
}

fn indexes() -> Vec<Vec<u8>> {
    let objects = |count: u64| -> Vec<(ObjectId, Place)> {
        let place = |n: u64| Place {
            offset: 64 + n * 8,
            len: n % 8,
        };
        let object = |n: u64| (ObjectId::of(&n.to_le_bytes()), place(n));
        let mut objects: Vec<_> = (0..count).map(object).collect();
        objects.sort_by_key(|(id, _)| *id);
        objects
    };
    [0, 1, 20]
        .map(|count| encode_index(&objects(count), 4096))
        .into()
}

fn stat_caches() -> Vec<Vec<u8>> {
    let stat = FileStat {
        mtime: Time { sec: 5, nsec: 6 },
        ctime: Time { sec: 7, nsec: 8 },
        ino: 9,
        dev: 10,
        size: 11,
        mode: 0o100_644,
    };
    let outcome = Outcome {
        fingerprint: [1; 32],
        layer_id: LayerId::from_bytes([2; 32]),
        tree_id: TreeId::from_bytes([3; 32]),
    };
    let files = ["a", "main.ts"].map(|name| (name.as_bytes().into(), stat, ObjectId::of(b"x")));
    let dirs = [&b""[..], b"src", b"src/deep"].map(|path| DirEntries {
        path,
        files: &files,
    });
    let encode =
        |dirs: &[DirEntries<'_>]| stat_cache::encode(Time { sec: 9, nsec: 0 }, &outcome, dirs);
    [&dirs[..0], &dirs[..]]
        .map(|dirs| encode(dirs).unwrap())
        .into()
}

fn records() -> Vec<Vec<u8>> {
    let hash = SeenHash::from_bytes([4; 32]);
    let seen = [
        Seen::Absent,
        Seen::Stat {
            kind: iii_store::Kind::Dir,
            exec: true,
        },
        Seen::Listing(hash),
        Seen::Contents {
            object: ObjectId::of(b"x"),
            exec: false,
        },
        Seen::Target(hash),
        Seen::Tree(SeenHash::from_bytes([5; 32])),
    ];
    let fact = |seen| Fact {
        path: b"caf\xc3\xa9/%\xff\n".to_vec(),
        seen,
    };
    let record = Record {
        facts: seen.into_iter().map(fact).collect(),
        layer_id: LayerId::from_bytes([2; 32]),
        tree_id: TreeId::from_bytes([3; 32]),
        provenance: serde_json::Map::from_iter([("seconds".to_owned(), 1.5.into())]),
    };
    let content = Ref {
        layers: vec![record.layer_id],
        info: serde_json::json!({ "digest": null }),
    };
    vec![
        serde_json::to_vec(&record).unwrap(),
        serde_json::to_vec(&content).unwrap(),
    ]
}

fn seals() -> Vec<Vec<u8>> {
    let sealed = |json: &[u8]| seal::seal(json.to_vec());
    vec![
        sealed(b"{}"),
        sealed(br#"{"unix_seconds": 7}"#),
        b"{}\n".to_vec(),
    ]
}

fn leases() -> Vec<Vec<u8>> {
    let layer = LayerId::from_bytes([2; 32]);
    let whole = format!("iii-lease 1 dev x\ningest 1\nlayer {layer}\ndone 1\ningest 2\n");
    let unfinished = &whole[..whole.len() - 3];
    vec![whole.clone().into(), unfinished.into()]
}

fn outboards() -> Vec<Vec<u8>> {
    let outboard = |len| {
        let mut hasher = OutboardHasher::default();
        hasher.update(&noise(len, 1));
        hasher.finish().1.encode()
    };
    [1 << 20, (1 << 20) + 1, (1 << 21) - 1].map(outboard).into()
}

/// The seeds are the encoders' output of today: a change of a format shows here, too.
#[test]
fn seeds_are_current() {
    for (target, seeds) in [
        ("store_layer", layers()),
        ("store_index", indexes()),
        ("store_stat_cache", stat_caches()),
        ("store_record", records()),
        ("store_seal", seals()),
        ("store_lease", leases()),
        ("store_outboard", outboards()),
    ] {
        check_seeds(&corpus(target), &seeds);
    }
}
