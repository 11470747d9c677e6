//! Opening, keys, refs, leases.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use iii_store::{
    Answers, Fact, FactsId, Finding, KeyId, LayerId, ORIGIN, ObjectId, Record, Ref, RefKind,
    Search, SearchCost, Seen, Store, StoreError, VerifyOptions,
};

use crate::helpers::{files, names, publish, put};
use iii_store::tree::Tree;

fn sealed(json: &str) -> Vec<u8> {
    iii_store::seal::seal(json.as_bytes().to_vec())
}

fn record(layer: &iii_store::Published, fact: &str) -> Record {
    Record {
        facts: vec![Fact {
            path: fact.as_bytes().to_vec(),
            seen: Seen::Absent,
        }],
        layer_id: layer.layer_id,
        tree_id: layer.tree_id,
        provenance: serde_json::Map::from_iter([("kind".to_owned(), "install".into())]),
    }
}

#[test]
fn opening() {
    let dir = tempfile::tempdir().unwrap();
    // Missing parents are made.
    let path = dir.path().join("a/b/store");
    let store = Store::open(&path).unwrap();
    let format = r#"{"version":1,"compat":[],"ro_compat":[],"incompat":["sealed"]}"#;
    assert_eq!(fs::read(path.join("format")).unwrap(), sealed(format));
    for name in ["", "packs", "loose", "layers", "refs/image"] {
        let mode = fs::metadata(path.join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700, "others may not look into {name:?}");
    }
    drop(store);
    Store::open(&path).unwrap();
    // A store whose making was cut short is made whole.
    fs::remove_file(path.join("format")).unwrap();
    Store::open(&path).unwrap();

    let other = dir.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::write(other.join("thesis.tex"), "").unwrap();
    let err = Store::open(&other).unwrap_err();
    assert!(matches!(&err, StoreError::NotAStore { found, .. } if found == "thesis.tex"));
    assert_eq!(names(&other), ["thesis.tex"]);
}

#[test]
fn formats_of_others() {
    let dir = tempfile::tempdir().unwrap();
    let format = dir.path().join("format");
    Store::open(dir.path()).unwrap();
    let current = r#"{"version":1,"incompat":["sealed"]}"#;
    for (text, outcome) in [
        (sealed(current), "writes"),
        (
            sealed(r#"{"version":1,"compat":["x"],"later":1,"incompat":["sealed"]}"#),
            "writes",
        ),
        (
            sealed(r#"{"version":1,"ro_compat":["x"],"incompat":["sealed"]}"#),
            "reads",
        ),
        (
            sealed(r#"{"version":1,"incompat":["sealed","x"]}"#),
            "unsupported",
        ),
        (
            sealed(r#"{"version":2,"incompat":["sealed"]}"#),
            "unsupported",
        ),
        (
            sealed(
                r#"{"version":1,"ro_compat":["snapshot_refs","managed_refs"],"incompat":["sealed"]}"#,
            ),
            "writes",
        ),
        (
            sealed(r#"{"version":1,"ro_compat":["managed_refs","x"],"incompat":["sealed"]}"#),
            "reads",
        ),
        // Before seals, and after them.
        (br#"{"version":1}"#.to_vec(), "outdated"),
        (br#"{"version":1,"ro_compat":["x"]}"#.to_vec(), "outdated"),
        (br#"{"version":1,"incompat":["x"]}"#.to_vec(), "unsupported"),
        (br#"{"version":2}"#.to_vec(), "unsupported"),
        // A seal without the feature, and the feature without a seal.
        (sealed(r#"{"version":1}"#), "damaged"),
        (current.into(), "damaged"),
        (sealed(&current.replace('1', "-1")), "damaged"),
        (sealed(current)[1..].to_vec(), "damaged"),
        (Vec::new(), "damaged"),
        (b"{".to_vec(), "damaged"),
        (br#"{"version":-1}"#.to_vec(), "damaged"),
    ] {
        fs::remove_file(&format).unwrap();
        fs::write(&format, &text).unwrap();
        let text = String::from_utf8_lossy(&text);
        let got = match Store::open(dir.path()) {
            Ok(store) => match store.lease("test") {
                Ok(_) => "writes",
                Err(StoreError::ReadOnly { .. }) => "reads",
                Err(err) => panic!("{text}: {err}"),
            },
            Err(StoreError::Unsupported { incompat, .. }) => {
                assert!(!incompat.contains(&"sealed".to_owned()), "{text}");
                "unsupported"
            }
            Err(StoreError::Outdated(_)) => "outdated",
            Err(StoreError::Json { .. } | StoreError::Damaged { .. }) => "damaged",
            Err(err) => panic!("{text}: {err}"),
        };
        assert_eq!(got, outcome, "{text}");
    }
    // A store without its format is unknown, so it is refused.
    fs::remove_file(&format).unwrap();
    fs::write(dir.path().join("keys/x"), "").unwrap();
    let err = Store::open(dir.path()).unwrap_err();
    assert!(matches!(err, StoreError::Damaged { .. }), "{err}");
}

#[test]
fn without_permission() {
    let dir = tempfile::tempdir().unwrap();
    Store::open(dir.path()).unwrap();
    if rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: a store without write permission: root may write everywhere");
        return;
    }
    fs::set_permissions(dir.path().join("tmp"), fs::Permissions::from_mode(0o500)).unwrap();
    let store = Store::open(dir.path()).unwrap();
    assert!(matches!(
        store.lease("test"),
        Err(StoreError::ReadOnly { .. })
    ));
}

#[test]
fn what_was_fetched_comes_behind_what_was_built_here() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let key = KeyId::from_bytes([7; 32]);
    let layer = publish(&store, &files(&[("a", "1")])).unwrap();
    let put = |fact: &str, origin: &str| {
        let mut record = record(&layer, fact);
        if !origin.is_empty() {
            let origin = (ORIGIN.to_owned(), origin.into());
            record.provenance.extend([origin]);
        }
        store.put_record(&key, record).unwrap();
        let records = store.records(&key).unwrap();
        let shown = records.iter().map(|record| {
            let fact = String::from_utf8_lossy(&record.facts[0].path).into_owned();
            fact + record.origin().unwrap_or_default()
        });
        shown.collect::<Vec<_>>().join(" ")
    };
    assert_eq!(put("a", "@x"), "a@x");
    assert_eq!(put("b", ""), "b a@x");
    assert_eq!(put("c", "@y"), "b c@y a@x");
    // The same from the same place, the same from elsewhere, and the same from here.
    assert_eq!(put("a", "@x"), "b a@x c@y");
    assert_eq!(put("a", "@y"), "b a@y a@x c@y");
    assert_eq!(put("b", "@y"), "b b@y a@y a@x c@y");
    assert_eq!(put("a", ""), "a b b@y c@y");
    assert_eq!(put("d", "@x"), "a b d@x b@y c@y");
}

#[test]
fn keys() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let key = KeyId::from_bytes([7; 32]);
    assert_eq!(store.records(&key).unwrap(), []);
    let layer = publish(&store, &files(&[("a", "1")])).unwrap();
    for n in 0..20 {
        store
            .put_record(&key, record(&layer, &n.to_string()))
            .unwrap();
    }
    let records = store.records(&key).unwrap();
    assert_eq!(records.len(), 20);
    assert_eq!(records[0], record(&layer, "19"));
    // The same facts again: the newest result counts.
    store.put_record(&key, record(&layer, "8")).unwrap();
    let records = store.records(&key).unwrap();
    assert_eq!(records.len(), 20);
    assert_eq!(records[0], record(&layer, "8"));
    assert_eq!(records.iter().filter(|r| **r == records[0]).count(), 1);

    let mut absent = record(&layer, "x");
    absent.layer_id = LayerId::from_bytes([1; 32]);
    assert!(matches!(
        store.put_record(&key, absent),
        Err(StoreError::MissingLayer(_))
    ));
    for name in ["locks", "leases", "tmp"] {
        assert!(names(&dir.path().join(name)).is_empty(), "{name}");
    }
    let format = fs::read_to_string(dir.path().join("format")).unwrap();
    assert!(format.contains("record_heads"), "{format}");
}

/// A record of every kind of fact.
fn every_kind(layer: &iii_store::Published) -> Record {
    let hash = iii_store::SeenHash::from_bytes([0; 32]);
    let facts = [
        (&b""[..], Seen::Listing(hash)),
        (
            b"a/b",
            Seen::Stat {
                kind: iii_store::Kind::Symlink,
                exec: true,
            },
        ),
        (
            b"c",
            Seen::Contents {
                object: ObjectId::of(b""),
                exec: false,
            },
        ),
        (b"caf\xc3\xa9\xff%\n", Seen::Absent),
        (b"d", Seen::Target(hash)),
        (b"e", Seen::Tree(hash)),
    ];
    let facts = facts.map(|(path, seen)| Fact {
        path: path.to_vec(),
        seen,
    });
    Record {
        facts: facts.into(),
        layer_id: layer.layer_id,
        tree_id: layer.tree_id,
        provenance: serde_json::Map::from_iter([("kind".to_owned(), "install".into())]),
    }
}

/// The format: stores that exist have these.
#[test]
fn golden_record() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let key = KeyId::from_bytes([7; 32]);
    let layer = publish(&store, &files(&[("a", "1")])).unwrap();
    let record = every_kind(&layer);
    let facts = store.put_record(&key, record.clone()).unwrap();
    assert_eq!(
        facts.to_string(),
        "f21627cc461624d9e2950746dcd0368b0ac146c6dc03d58d2be6357e596c24d1"
    );
    let zeros = "0".repeat(64);
    let text = [
        r#"{"facts":[{"path":"","seen":{"listing":"Z"}},"#,
        r#"{"path":"a/b","seen":{"stat":{"kind":"symlink","exec":true}}},"#,
        r#"{"path":"c","seen":{"contents":{"object":"#,
        r#""af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262","exec":false}}},"#,
        r#"{"path":"café%ff%25%0a","seen":"absent"},{"path":"d","seen":{"target":"Z"}},"#,
        r#"{"path":"e","seen":{"tree":"Z"}}]}"#,
    ];
    let text = text.concat().replace('Z', &zeros);
    let path = dir.path().join("facts").join(format!("{key}.{facts}"));
    assert_eq!(
        String::from_utf8(fs::read(path).unwrap()),
        String::from_utf8(sealed(&text))
    );
    let text = [
        r#"{"prefixes":[["cc","td","l","ae","ecafé%ff%25%0a","ea/b"]],"heads":[{"facts":"#,
        &format!(r#""{facts}","count":6,"layer_id":"{}","#, layer.layer_id),
        &format!(
            r#""tree_id":"{}","provenance":{{"kind":"install"}},"#,
            layer.tree_id
        ),
        r#""looks":"97038ef6542e82d56218ffe1c5e0e0abee5a65774705a9cd4541658a390fd39d","#,
        r#""prefix":0,"found":"cc72195764d613e78b8928a15a8425c15048f0dc13ded6acc7428afe7cae423b"}]}"#,
    ]
    .concat();
    let path = dir.path().join("keys").join(key.to_string());
    assert_eq!(
        String::from_utf8(fs::read(path).unwrap()),
        String::from_utf8(sealed(&text))
    );
    assert_eq!(store.records(&key).unwrap(), [record]);
    let seen = Seen::listing([
        (&b"b"[..], iii_store::Kind::Dir),
        (b"a", iii_store::Kind::File),
    ]);
    let Seen::Listing(hash) = seen else { panic!() };
    assert_eq!(
        hash.to_string(),
        "3830fccb4c32646a7be6842b5fa76a5d1c79b1e272b77e5144909bceda44aec4"
    );
    let Seen::Target(hash) = Seen::target(b"../x") else {
        panic!()
    };
    assert_eq!(
        hash.to_string(),
        "2e135f440e5cb6496f46d4331a05e4c768bc364126ff47ce3640dc501d869c4d"
    );
}

/// Records of earlier programs without facts still hold; the others said too little, and the next
/// collection removes them.
#[test]
fn records_of_earlier_programs() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let (key, other) = (KeyId::from_bytes([7; 32]), KeyId::from_bytes([8; 32]));
    let kept = publish(&store, &files(&[("a", "1")])).unwrap();
    let gone = publish(&store, &files(&[("a", "2")])).unwrap();
    let earlier = |layer: &iii_store::Published, facts: &str| {
        let (layer_id, tree_id) = (layer.layer_id, layer.tree_id);
        format!(
            r#"{{"facts":[{facts}],"layer_id":"{layer_id}","tree_id":"{tree_id}","provenance":{{}}}}"#
        )
    };
    let stat = r#"{"path":"a/b","seen":{"stat":{"kind":"symlink","mode":511}}}"#;
    let files = [
        (key, [earlier(&gone, stat), earlier(&kept, "")].join(",")),
        (other, earlier(&gone, stat)),
    ];
    for (key, records) in files {
        let path = dir.path().join("keys").join(key.to_string());
        fs::write(path, sealed(&format!(r#"{{"records":[{records}]}}"#))).unwrap();
    }
    let ids = |key| {
        store
            .records(key)
            .unwrap()
            .into_iter()
            .map(|record| record.layer_id)
    };
    assert_eq!(ids(&key).collect::<Vec<_>>(), [kept.layer_id]);
    assert_eq!(ids(&other).count(), 0);
    let policy = iii_store::Policy {
        grace: std::time::Duration::ZERO,
        ..iii_store::Policy::default()
    };
    store.gc(&store.plan_gc(&policy).unwrap(), &|_| ()).unwrap();
    assert!(store.has_layer(&kept.layer_id) && !store.has_layer(&gone.layer_id));
    assert_eq!(names(&dir.path().join("keys")), [key.to_string()]);
    // The addition keeps the old one.
    store.put_record(&key, record(&kept, "x")).unwrap();
    assert_eq!(ids(&key).count(), 2);
}

/// Searches for the record of a project with these files, each of which holds its text.
fn find(
    store: &Store,
    key: &KeyId,
    project: &[(&str, &str)],
    last: Option<FactsId>,
) -> (Vec<LayerId>, SearchCost) {
    let mut tree = Tree::default();
    for (path, text) in project {
        let object = ObjectId::of(text.as_bytes());
        put(&mut tree, path.as_bytes(), object, text.len() as u64);
    }
    let layer = crate::diffs::layer_of(&tree);
    let mut found = Vec::new();
    let cost = store.find_record(
        key,
        &mut Answers::new(layer.root()),
        Search {
            last,
            trusts: &|_| true,
            take: &mut |head, _| {
                found.push(head.layer_id);
                Ok(false)
            },
        },
    );
    (found, cost.unwrap())
}

fn saw(layer: &iii_store::Published, files: &[(&str, &str)]) -> Record {
    let mut record = record(layer, "yarn.lock");
    record.facts.extend(files.iter().map(|(path, text)| Fact {
        path: path.as_bytes().to_vec(),
        seen: Seen::Contents {
            object: ObjectId::of(text.as_bytes()),
            exec: false,
        },
    }));
    record
}

/// However many projects share a step, a search finds a record with the file of its key and one
/// file of facts, whether they read the same paths or different ones.
#[test]
fn one_of_a_thousand_records_is_found_with_few_looks() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let (same, other) = (KeyId::from_bytes([7; 32]), KeyId::from_bytes([8; 32]));
    let first = publish(&store, &files(&[("a", "1")])).unwrap();
    let layer = publish(&store, &files(&[("a", "2")])).unwrap();
    let many: usize = if cfg!(debug_assertions) { 200 } else { 1000 };
    let of = |n: usize| {
        [
            ("package.json", format!("{n}")),
            ("lock", "same".to_owned()),
        ]
    };
    for n in 0..many {
        let layer = if n == 0 { &first } else { &layer };
        let [(manifest, text), (lock, locked)] = of(n);
        let own = format!("src/own-{n}.js");
        let looked = [(manifest, &*text), (lock, &*locked)];
        store.put_record(&same, saw(layer, &looked)).unwrap();
        let looked = [looked[0], looked[1], (&*own, "x")];
        store.put_record(&other, saw(layer, &looked)).unwrap();
    }
    let [(manifest, text), (lock, locked)] = of(0);
    let project = [(manifest, &*text), (lock, &*locked), ("src/own-0.js", "x")];
    let (found, cost) = find(&store, &same, &project, None);
    assert_eq!(found, [first.layer_id]);
    assert_eq!((cost.records, cost.prefixes, cost.files), (many, 1, 1));
    let (found, cost) = find(&store, &other, &project, None);
    assert_eq!(found, [first.layer_id]);
    assert_eq!((cost.records, cost.prefixes, cost.files), (many, many, 1));
    let (found, cost) = find(
        &store,
        &same,
        &[("package.json", "new"), ("lock", "same")],
        None,
    );
    assert_eq!((found, cost.files), (Vec::new(), 0));
    for key in [same, other] {
        let len = fs::metadata(dir.path().join("keys").join(key.to_string()))
            .unwrap()
            .len();
        assert!(len < 800 * many as u64, "{len} bytes");
    }
}

#[test]
fn the_record_of_the_last_time_is_tried_first_and_is_only_a_hint() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let key = KeyId::from_bytes([7; 32]);
    let [old, new, none] =
        ["1", "2", "3"].map(|text| publish(&store, &files(&[("a", text)])).unwrap());
    let last = store.put_record(&key, saw(&old, &[("a", "x")])).unwrap();
    store.put_record(&key, saw(&new, &[("b", "y")])).unwrap();
    let gone = store.put_record(&key, saw(&none, &[("b", "z")])).unwrap();
    let project = [("a", "x"), ("b", "y")];
    let (old, new) = (old.layer_id, new.layer_id);
    assert_eq!(find(&store, &key, &project, None).0, [new, old]);
    assert_eq!(find(&store, &key, &project, Some(last)).0, [old, new]);
    for hint in [gone, FactsId::from_bytes([1; 32])] {
        assert_eq!(find(&store, &key, &project, Some(hint)).0, [new, old]);
    }
}

/// Processes that add at the same time lose no record.
#[test]
fn records_that_are_added_at_once_are_all_there() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let key = KeyId::from_bytes([7; 32]);
    let layer = publish(&store, &files(&[("a", "1")])).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (store, layer) = (Store::open(dir.path()).unwrap(), &layer);
            scope.spawn(move || {
                for n in 0..10 {
                    store
                        .put_record(&key, record(layer, &format!("{thread}-{n}")))
                        .unwrap();
                }
            });
        }
    });
    assert_eq!(store.records(&key).unwrap().len(), 40);
}

/// Facts that a crash left are no record, and are removed; a record whose facts are damaged or gone
/// is skipped, reported, and dropped.
#[test]
fn facts_without_a_record_and_records_without_facts() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let key = KeyId::from_bytes([7; 32]);
    let layer = publish(&store, &files(&[("a", "1")])).unwrap();
    let content = Ref {
        layers: vec![layer.layer_id],
        info: serde_json::Value::Null,
    };
    store.set_ref(RefKind::Worker, "w", &content).unwrap();
    let ids = ["x", "y", "z"].map(|fact| store.put_record(&key, record(&layer, fact)).unwrap());
    let path = |id| dir.path().join("facts").join(format!("{key}.{id}"));
    let left = KeyId::from_bytes([9; 32]);
    let left = dir.path().join("facts").join(format!("{left}.{}", ids[0]));
    fs::copy(path(ids[0]), &left).unwrap();
    fs::remove_file(path(ids[0])).unwrap();
    fs::remove_file(path(ids[1])).unwrap();
    fs::copy(path(ids[2]), path(ids[1])).unwrap();
    assert_eq!(store.records(&key).unwrap(), [record(&layer, "z")]);
    let options = VerifyOptions { data: false };
    let report = store.verify(options, &|_| ()).unwrap();
    let found: Vec<_> = report
        .problems
        .iter()
        .map(|problem| problem.finding.clone())
        .collect();
    assert_eq!(found, [Finding::Key { key }, Finding::Key { key }]);
    store.repair(&report, &|_| ()).unwrap();
    assert!(store.verify(options, &|_| ()).unwrap().is_clean());
    assert_eq!(store.heads(&key).unwrap().len(), 1);
    let plan = store.plan_gc(&iii_store::Policy::default()).unwrap();
    store.gc(&plan, &|_| ()).unwrap();
    assert!(!left.exists() && path(ids[2]).exists());
}

#[test]
fn a_damaged_key_holds_nothing_and_can_be_built_anew() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let key = KeyId::from_bytes([7; 32]);
    let layer = publish(&store, &files(&[("a", "1")])).unwrap();
    let path = dir.path().join("keys").join(key.to_string());
    for text in [b"{\"rec".to_vec(), sealed("{\"records\":7}")] {
        let _ = fs::remove_file(&path);
        fs::write(&path, text).unwrap();
        assert_eq!(store.records(&key).unwrap(), []);
        store.put_record(&key, record(&layer, "x")).unwrap();
        assert_eq!(store.records(&key).unwrap().len(), 1);
    }
}

#[test]
fn refs() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let one = publish(&store, &files(&[("a", "1")])).unwrap().layer_id;
    let two = publish(&store, &files(&[("a", "2")])).unwrap().layer_id;
    let long = "x/".repeat(2000);
    let mut expected = Vec::new();
    for (n, name) in [
        "docker.io/library/node:latest",
        "docker.io/library/Node:latest",
        "..",
        ".",
        "a b\nc",
        "é%2f",
        "%",
        long.as_str(),
        &long[..3998],
    ]
    .into_iter()
    .enumerate()
    {
        assert_eq!(store.get_ref(RefKind::Image, name).unwrap(), None);
        let content = Ref {
            layers: vec![one, two],
            info: serde_json::json!({ "n": n }),
        };
        store.set_ref(RefKind::Image, name, &content).unwrap();
        assert_eq!(
            store.get_ref(RefKind::Image, name).unwrap().as_ref(),
            Some(&content)
        );
        expected.push((name.to_owned(), content));
    }
    expected.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(store.list_refs(RefKind::Image).unwrap(), expected);
    assert_eq!(store.list_refs(RefKind::Worker).unwrap(), []);
    assert_eq!(
        names(&dir.path().join("refs")),
        ["image", "managed", "snapshot", "volume", "worker"]
    );
    assert!(store.remove_ref(RefKind::Image, "..").unwrap());
    assert!(!store.remove_ref(RefKind::Image, "..").unwrap());
    assert_eq!(
        store.list_refs(RefKind::Image).unwrap().len(),
        expected.len() - 1
    );

    let absent = Ref {
        layers: vec![LayerId::from_bytes([1; 32])],
        info: serde_json::Value::Null,
    };
    assert!(matches!(
        store.set_ref(RefKind::Worker, "w", &absent),
        Err(StoreError::MissingLayer(_))
    ));
    let empty = Ref {
        layers: Vec::new(),
        info: serde_json::Value::Null,
    };
    for name in ["", "x".repeat(5000).as_str()] {
        assert!(store.set_ref(RefKind::Worker, name, &empty).is_err());
    }
}

/// A program that does not know such refs would collect the layers that they keep: it must not
/// write.
#[test]
fn the_format_says_which_newer_kinds_of_refs_there_are() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let layer = publish(&store, &files(&[("a", "1")])).unwrap().layer_id;
    let content = Ref {
        layers: vec![layer],
        info: serde_json::Value::Null,
    };
    for (kind, features) in [
        (RefKind::Worker, ""),
        (RefKind::Snapshot, r#""snapshot_refs""#),
        (RefKind::Managed, r#""snapshot_refs","managed_refs""#),
        (RefKind::Snapshot, r#""snapshot_refs","managed_refs""#),
        (
            RefKind::Volume,
            r#""snapshot_refs","managed_refs","volume_refs""#,
        ),
    ] {
        store.set_ref(kind, "w", &content).unwrap();
        let format = format!(
            r#"{{"version":1,"compat":[],"ro_compat":[{features}],"incompat":["sealed"]}}"#
        );
        assert_eq!(
            fs::read(dir.path().join("format")).unwrap(),
            sealed(&format)
        );
        assert_eq!(names(&dir.path().join("locks")), <[&str; 0]>::default());
        assert_eq!(names(&dir.path().join("tmp")), <[&str; 0]>::default());
    }
    drop(store);
    let store = Store::open(dir.path()).unwrap();
    store.lease("test").unwrap();
}

#[test]
fn leases_pin_and_end() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let lease = store.lease("build of\nx").unwrap();
    let (one, two) = (LayerId::from_bytes([1; 32]), LayerId::from_bytes([2; 32]));
    lease.pin(&[one]).unwrap();
    lease.pin(&[one, two]).unwrap();
    let leases = dir.path().join("leases");
    let [name] = &names(&leases)[..] else {
        panic!()
    };
    let text = fs::read_to_string(leases.join(name)).unwrap();
    assert_eq!(
        text,
        format!("iii-lease 1 build of x\nlayer {one}\nlayer {two}\n")
    );
    // It is held, so the sweep leaves it alone.
    assert_eq!(store.sweep_dead_leases().unwrap(), 0);
    assert_eq!(names(&leases).len(), 1);
    drop(lease);
    assert!(names(&leases).is_empty());
    // No process holds this one.
    fs::write(leases.join("dead"), "iii-lease 1 x\n").unwrap();
    fs::write(dir.path().join("tmp/dead.3"), "half").unwrap();
    fs::write(dir.path().join("tmp/deader.lease"), "").unwrap();
    assert_eq!(store.sweep_dead_leases().unwrap(), 1);
    for name in ["leases", "tmp"] {
        assert!(names(&dir.path().join(name)).is_empty(), "{name}");
    }
}

#[test]
fn damaged_layers_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    let all = files(&[("a", "1")]);
    let id = publish(&store, &all).unwrap().layer_id;
    let absent = LayerId::from_bytes([1; 32]);
    assert!(matches!(
        store.layer(&absent),
        Err(StoreError::MissingLayer(_))
    ));
    let path = dir.path().join("layers").join(id.to_string());
    let good = fs::read(&path).unwrap();
    let replace = |path: &std::path::Path, bytes: &[u8]| {
        let _ = fs::remove_file(path);
        fs::write(path, bytes).unwrap();
    };
    for bytes in [
        &good[..good.len() - 1],
        b"",
        &[good.as_slice(), b"x"].concat(),
    ] {
        replace(&path, bytes);
        assert!(matches!(store.layer(&id), Err(StoreError::Layer { .. })));
    }
    let mut flipped = good.clone();
    *flipped.last_mut().unwrap() ^= 1;
    replace(&path, &flipped);
    assert!(store.layer(&id).is_err());
    // Under another's name.
    replace(&dir.path().join("layers").join(absent.to_string()), &good);
    assert!(matches!(
        store.layer(&absent),
        Err(StoreError::Damaged { .. })
    ));
    // Stored again, it is mended.
    assert!(!publish(&store, &all).unwrap().existed);
    assert_eq!(store.layer(&id).unwrap().file_count(), 1);
}

#[test]
fn a_damaged_index_hides_its_objects_and_breaks_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(dir.path()).unwrap();
    publish(&store, &files(&[("a", "1")])).unwrap();
    let packs = dir.path().join("packs");
    let idx = names(&packs)
        .into_iter()
        .find(|name| name.strip_suffix(".idx").is_some())
        .unwrap();
    let mut bytes = fs::read(packs.join(&idx)).unwrap();
    bytes[70] ^= 1;
    fs::remove_file(packs.join(&idx)).unwrap();
    fs::write(packs.join(&idx), bytes).unwrap();
    fs::write(packs.join("notes.txt"), "").unwrap();
    let store = Store::open(dir.path()).unwrap();
    let id = ObjectId::of(b"1");
    assert!(!store.contains(&id));
    assert!(matches!(
        store.object(&id),
        Err(StoreError::MissingObject(_))
    ));
    publish(&store, &files(&[("b", "2"), ("a", "1")])).unwrap();
    assert!(store.contains(&id));
}
