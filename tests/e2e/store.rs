//! `iii store`: what it says of a store that real builds have filled.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde_json::Value;

use crate::harness::{Home, Layers, NODE_IMAGE, Project};

/// What install makes of `deps.txt` is the same as `deps.txt`; `main.txt` is the project's own.
fn project(deps: &str, main: &str) -> Project {
    let project = Project::scripts(
        "echo made >/made-by-setup",
        "cat deps.txt >installed.txt; cat lock.txt 2>/dev/null || true; ls conf >/dev/null",
        "echo started; exec sleep 1000",
    );
    project.write("deps.txt", deps);
    project.write("main.txt", main);
    project.write("conf/a", "a\n");
    project
}

fn json(home: &Home, args: &[&str]) -> Value {
    let mut all = vec!["store"];
    all.extend(args);
    all.push("--json");
    let ended = home.run(&all).ok();
    serde_json::from_str(&ended.stdout)
        .unwrap_or_else(|error| panic!("{args:?} printed no JSON: {error}\n{}", ended.stdout))
}

fn text(home: &Home, args: &[&str]) -> String {
    let mut all = vec!["store"];
    all.extend(args);
    home.run(&all).ok().stdout
}

fn array<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    value[name]
        .as_array()
        .unwrap_or_else(|| panic!("no {name} in {value:#}"))
}

fn number(value: &Value, name: &str) -> i64 {
    value[name]
        .as_i64()
        .unwrap_or_else(|| panic!("no {name} in {value:#}"))
}

fn sum(values: &[Value], name: &str) -> i64 {
    values.iter().map(|value| number(value, name)).sum()
}

/// Blocks of everything below and including `path`, in bytes: `du -s --block-size=1`.
fn du(path: &Path) -> i64 {
    let meta = path.symlink_metadata().unwrap();
    let own = meta.blocks() as i64 * 512;
    if !meta.is_dir() {
        return own;
    }
    let entries = path.read_dir().unwrap();
    own + entries.map(|entry| du(&entry.unwrap().path())).sum::<i64>()
}

/// Runs the worker once, so that it has a name in the store.
fn run_once(home: &Home, project: &Project, name: &str) {
    let mut dev = home.dev(project, &["--name", name]);
    dev.wait_for("started");
    dev.stop();
}

/// A home with two workers that share setup and install, and a build that no worker has.
fn filled() -> (Home, Layers) {
    let home = Home::with_busybox();
    run_once(&home, &project("dep\n", "one\n"), "one");
    run_once(&home, &project("dep\n", "two\n"), "two");
    let third = project("other dep\n", "three\n");
    let built = home.build(&third, &["--name", "three"]);
    (home, built)
}

#[test]
fn df_adds_up() {
    let (home, built) = filled();
    let df = json(&home, &["df"]);
    assert_eq!(number(&df, "on_disk"), du(&home.state().join("store/v1")));
    assert_eq!(sum(array(&df, "areas"), "on_disk"), number(&df, "on_disk"));
    let parts = [
        "named",
        "unnamed",
        "layer_files",
        "indexes",
        "other",
        "padding",
    ];
    let parts: i64 = parts.iter().map(|part| number(&df, part)).sum();
    assert_eq!(parts, number(&df, "on_disk"));

    let stored = number(&df, "named") + number(&df, "layer_files");
    let layers = array(&df, "layers");
    assert_eq!(
        sum(layers, "unique") + number(&df, "shared_by_layers"),
        stored
    );
    let refs = array(&df, "refs");
    let of_refs = sum(refs, "unique") + number(&df, "shared_by_refs");
    assert_eq!(of_refs + number(&df, "in_no_ref"), stored);
    let names: Vec<_> = refs
        .iter()
        .map(|name| name["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, [NODE_IMAGE, "one", "two"]);
    // The base is nearly all there is, and everyone has it.
    assert!(number(&df, "shared_by_refs") > stored * 9 / 10, "{df:#}");
    assert!(number(&df, "as_copies") > stored * 2, "{df:#}");
    for name in &refs[1..] {
        assert_eq!(array(name, "layers").len(), 4, "{name:#}");
        assert!(number(name, "unique") < 4096, "{name:#}");
    }
    let third = built.get("project");
    let third = layers
        .iter()
        .find(|layer| layer["id"] == third.layer_id.as_str())
        .unwrap();
    assert_eq!(array(third, "kept_by"), [] as [Value; 0]);

    let table = text(&home, &["df"]);
    for part in [
        "in all, in ",
        "worker one",
        "(several of them)",
        "LAYER ",
        "install",
    ] {
        assert!(table.contains(part), "no {part:?} in\n{table}");
    }
    assert!(!table.contains('\x1b'));
}

#[test]
fn df_counts_what_nobody_needs_and_what_is_damaged() {
    let (home, built) = filled();
    let layers = home.state().join("store/v1/layers");
    let gone = layers.join(&built.get("project").layer_id);
    let size = "three\n".len() + "other dep\n".len();
    std::fs::remove_file(gone).unwrap();
    let df = json(&home, &["df"]);
    // Install copied the dependency, so only its layer keeps it.
    assert!((6..size as i64).contains(&number(&df, "unnamed")), "{df:#}");

    let install = layers.join(&built.get("install").layer_id);
    let bytes = std::fs::read(&install).unwrap();
    std::fs::remove_file(&install).unwrap();
    std::fs::write(&install, &bytes[..bytes.len() - 1]).unwrap();
    home.run(&["store", "df"]).ok().says(&[
        &built.get("install").layer_id,
        "left out",
        "iii store verify",
    ]);
    let df = json(&home, &["df"]);
    assert_eq!(
        array(&df, "damaged"),
        [built.get("install").layer_id.as_str()]
    );
    assert_eq!(number(&df, "on_disk"), du(&home.state().join("store/v1")));
}

#[test]
fn list_and_why_say_what_keeps_a_layer() {
    let (home, built) = filled();
    let list = json(&home, &["list"]);
    let layers = array(&list, "layers");
    assert_eq!(
        layers.len(),
        7,
        "base, setup, 2 installs, 3 projects: {list:#}"
    );
    let roots = |id: &str| -> Vec<String> {
        let layer = layers.iter().find(|layer| layer["id"] == id).unwrap();
        let why = json(&home, &["why", &id[..12]]);
        assert_eq!(why["kept_by"], layer["kept_by"]);
        assert_eq!(why["kind"], layer["kind"]);
        let roots = array(layer, "kept_by").iter();
        roots
            .map(|root| root["root"].as_str().unwrap().to_owned())
            .collect()
    };
    for (kind, expected) in [
        ("base", &["image", "worker", "worker"][..]),
        ("setup", &["worker", "worker", "record"]),
        ("install", &["record"]),
        ("project", &[]),
    ] {
        let realised = built.get(kind);
        assert_eq!(roots(&realised.layer_id), expected, "{kind}");
        let layer = layers
            .iter()
            .find(|layer| layer["id"] == realised.layer_id.as_str());
        assert_eq!(layer.unwrap()["kind"], kind);
    }
    home.run(&["store", "why", &built.get("project").layer_id])
        .ok()
        .says(&["nothing keeps"]);
    let base = text(&home, &["why", &built.get("base").layer_id]);
    for part in [NODE_IMAGE, "worker  one", "worker  two"] {
        assert!(base.contains(part), "no {part:?} in\n{base}");
    }

    // While it runs, its lease keeps its layers, too.
    let third = project("other dep\n", "three\n");
    let mut dev = home.dev(&third, &["--name", "three"]);
    dev.wait_for("started");
    let why = home.start(&["store", "why", &built.get("install").layer_id]);
    let why = why.finish(crate::harness::LIMIT).ok().stdout;
    assert!(why.contains("lease   dev three"), "{why}");
    dev.stop();
}

#[test]
fn inspect_shows_entries_recipe_and_facts() {
    let (home, built) = filled();
    let install = &built.get("install").layer_id;
    let value = json(&home, &["inspect", install, "--entries"]);
    assert_eq!(value["id"], install.as_str());
    assert_eq!(value["tree_id"], built.get("install").tree_id.as_str());
    assert_eq!(value["kind"], "install");
    assert_eq!(number(&value, "logical"), "other dep\n".len() as i64);
    let paths: Vec<_> = array(&value, "entries")
        .iter()
        .map(|entry| entry["path"].as_str().unwrap())
        .collect();
    assert_eq!(paths, ["", "workspace", "workspace/installed.txt"]);
    let [recipe] = array(&value, "recipes") else {
        panic!("one recipe: {value:#}");
    };
    assert_eq!(recipe["reason"], "deps.txt changed");
    let facts = array(recipe, "facts").iter();
    let facts: Vec<_> = facts.map(|fact| fact["path"].as_str().unwrap()).collect();
    assert!(
        facts.contains(&"deps.txt") && facts.contains(&"lock.txt"),
        "{facts:?}"
    );
    assert!(!facts.contains(&"main.txt"), "{facts:?}");

    let shown = text(&home, &["inspect", &install[..10], "--entries"]);
    for part in [
        install,
        "1 file (10 B), 1 directory",
        "kept by   recipe",
        "because deps.txt changed",
        "contents  deps.txt",
        "absent    lock.txt",
        "listing   conf",
        "-rw-r--r-- 0:0 10 ",
        "Z workspace/installed.txt\n",
    ] {
        assert!(shown.contains(part), "no {part:?} in\n{shown}");
    }
    for name in ["one", "two", NODE_IMAGE, "iiidev/node"] {
        let refs = json(&home, &["inspect", name]);
        let [found] = array(&refs, "refs") else {
            panic!("one ref: {refs:#}");
        };
        let base = &array(found, "layers")[0];
        assert_eq!(base["id"], built.get("base").layer_id.as_str());
        assert_eq!(base["kind"], "base");
    }
}

#[test]
fn diff_says_what_differs() {
    let home = Home::with_busybox();
    let project = project("dep\n", "one\n");
    let old = home.build(&project, &[]).get("project").layer_id.clone();
    project.write("main.txt", "much longer\n");
    project.write("new\n100%", "new\n");
    project.remove("conf/a");
    let new = home.build(&project, &[]).get("project").layer_id.clone();
    let expected = "D workspace/conf/a\nM workspace/main.txt\nA workspace/new%0a100%25\n";
    assert_eq!(text(&home, &["diff", &old[..8], &new[..8]]), expected);
    assert_eq!(text(&home, &["diff", &old, &old]), "");
    let value = json(&home, &["diff", &old, &new]);
    let changes = array(&value, "changes").iter();
    let changes: Vec<_> = changes
        .map(|change| {
            (
                change["change"].as_str(),
                change["old_size"].as_i64(),
                change["new_size"].as_i64(),
            )
        })
        .collect();
    assert_eq!(
        changes,
        [
            (Some("D"), Some(2), None),
            (Some("M"), Some(4), Some(12)),
            (Some("A"), None, Some(4)),
        ]
    );
}

#[test]
fn what_names_no_layer_is_refused() {
    let home = Home::with_busybox();
    let layers = home.state().join("store/v1/layers");
    let name = layers
        .read_dir()
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .file_name();
    let base = name.into_string().unwrap();
    // Another layer whose id begins in the same way.
    let twin = format!("{}{}", &base[..20], "0".repeat(44));
    std::fs::copy(layers.join(&base), layers.join(&twin)).unwrap();
    let other = if base.starts_with('0') {
        "1111"
    } else {
        "0000"
    };
    for (args, says) in [
        (
            &["why", &base[..8]][..],
            &["2 layers", &base[..14], &twin[..14], "more of the id"][..],
        ),
        (
            &["diff", &base, other],
            &["no layer whose id begins with", other, "iii store list"],
        ),
        (&["why", "abc"], &["abc", "at least 4"]),
        (&["why", "one"], &["one", "names no layer"]),
        (
            &["inspect", "no-such-worker"],
            &["no-such-worker", "no layer, worker or image"],
        ),
        (&["inspect", &base[..5]], &["2 layers"]),
        (&["inspect", &twin], &[&twin, "damaged"]),
    ] {
        let mut all = vec!["store"];
        all.extend(args);
        let ended = home.run(&all).fails().says(says);
        assert_eq!(
            (ended.status.code(), &*ended.stdout),
            (Some(1), ""),
            "{args:?}"
        );
    }
    home.run(&["store", "why", &base]).ok();
    home.run(&["store", "diff", &base]).exits(2);
}

#[test]
fn an_empty_store_is_no_error() {
    let home = Home::new();
    let df = json(&home, &["df"]);
    assert_eq!(number(&df, "on_disk"), du(&home.state().join("store/v1")));
    assert_eq!(array(&json(&home, &["list"]), "layers"), [] as [Value; 0]);
    text(&home, &["df"]);
}
