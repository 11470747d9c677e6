//! `iii store` on a store that real builds have filled.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use rustix::mount::{MountFlags, mount};
use serde_json::Value;
use tempfile::TempDir;

use crate::harness::{
    Home, LIMIT, Layers, NODE_IMAGE, Project, busybox_base, files, is_root, skip,
};

/// Install copies `deps.txt`; `main.txt` is the project's own.
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
    let (home, built, _) = filled_from();
    (home, built)
}

/// The same, with the projects.
fn filled_from() -> (Home, Layers, [Project; 3]) {
    let home = Home::with_busybox();
    let projects = [
        project("dep\n", "one\n"),
        project("dep\n", "two\n"),
        project("other dep\n", "three\n"),
    ];
    run_once(&home, &projects[0], "one");
    run_once(&home, &projects[1], "two");
    let built = home.build(&projects[2], &["--name", "three"]);
    (home, built, projects)
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
    assert_eq!(third["reclaimable"], third["unique"]);
    assert_eq!(sum(layers, "reclaimable"), number(third, "unique"));
    assert!(number(&df, "reclaimable_later") > 0, "{df:#}");

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
    let [unreadable] = array(&df, "unreadable") else {
        panic!("one layer is damaged: {df:#}");
    };
    let unreadable = unreadable.as_str().unwrap();
    assert!(
        unreadable.contains(&built.get("install").layer_id),
        "{unreadable}"
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
        // The kind of the ref, or of the other root.
        let kind = |root: &Value| root.get("kind").unwrap_or(&root["root"]).clone();
        roots
            .map(|root| kind(root).as_str().unwrap().to_owned())
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
    let why = why.finish(LIMIT).ok().stdout;
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
    assert_eq!(
        recipe["reason"],
        "first build of this project with this script"
    );
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
        "because first build of this project with this script",
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
            &[
                "2 layers",
                &base[..14],
                &twin[..14],
                "more digits of the id",
            ][..],
        ),
        (
            &["diff", &base, other],
            &[
                "no layer has an id that begins with",
                other,
                "iii store list",
            ],
        ),
        (&["why", "abc"], &["abc", "4 or more"]),
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

/// The ids under `name` in a plan.
fn ids(plan: &Value, name: &str) -> Vec<String> {
    let layers = array(plan, name).iter();
    let mut ids: Vec<_> = layers
        .map(|layer| layer["id"].as_str().unwrap().to_owned())
        .collect();
    ids.sort_unstable();
    ids
}

#[test]
fn gc_does_what_its_dry_run_says() {
    let (home, built, projects) = filled_from();
    let store = home.state().join("store/v1");
    let all = ids(&json(&home, &["list"]), "layers");
    let before = files(&store);
    let args = ["gc", "--grace", "0s", "--min-free", "none"];
    let dry = json(&home, &[&args[..], &["--dry-run"]].concat());
    let mut after = files(&store);
    after.sort_unstable();
    let mut unchanged = before;
    unchanged.sort_unstable();
    assert_eq!(after, unchanged);
    assert_eq!(dry["report"], Value::Null);

    let plan = &dry["plan"];
    assert_eq!(ids(plan, "goes"), [built.get("project").layer_id.clone()]);
    assert_eq!(ids(plan, "stays").len(), all.len() - 1);
    assert!(
        array(plan, "stays")
            .iter()
            .all(|layer| !array(layer, "kept_by").is_empty())
    );
    assert!(number(plan, "frees") > 0, "{plan:#}");
    let shown = text(&home, &[&args[..], &["--dry-run"]].concat());
    for part in [
        "GOES ",
        "nothing keeps it",
        "STAYS ",
        "2 workers",
        "recipe",
        "frees about ",
    ] {
        assert!(shown.contains(part), "no {part:?} in\n{shown}");
    }

    let done = json(&home, &args);
    assert_eq!(done["plan"], *plan);
    assert_eq!(number(&done["report"], "layers_removed"), 1, "{done:#}");
    assert_eq!(ids(&json(&home, &["list"]), "layers"), ids(plan, "stays"));
    home.run(&["store", "why", &built.get("project").layer_id])
        .fails()
        .says(&["no layer"]);
    let df = json(&home, &["df"]);
    assert_eq!(number(&df, "unnamed"), 0, "{df:#}");
    assert_eq!(number(&df, "on_disk"), du(&store));

    // Layers that stayed are whole, and the others are built again.
    assert_eq!(home.build(&projects[0], &["--name", "one"]).built(), "");
    assert_eq!(
        home.build(&projects[2], &["--name", "three"]).built(),
        "project"
    );

    // Of what only a recipe keeps, the limits decide.
    let limits = [
        "gc",
        "--grace",
        "0s",
        "--min-free",
        "none",
        "--max-size",
        "none",
        "--keep",
        "0s",
    ];
    let done = json(&home, &limits);
    assert!(ids(&done["plan"], "goes").contains(&built.get("install").layer_id));
    assert_eq!(
        home.build(&projects[2], &["--name", "three"]).built(),
        "project install"
    );
    home.run(&[
        "store",
        "gc",
        "--grace",
        "0s",
        "--min-free",
        "none",
        "--max-size",
        "0",
    ])
    .ok()
    .says(&["the store is too large", "over the limits"]);
    run_once(&home, &projects[1], "two");
}

#[test]
fn gc_leaves_what_runs_and_gives_back_what_is_wanted_after_all() {
    let (home, built, projects) = filled_from();
    let layers = |home: &Home| ids(&json(home, &["list"]), "layers");
    // Into the trash, and back out of it.
    let all = layers(&home);
    let done = json(&home, &["gc", "--min-free", "none"]);
    assert_eq!(number(&done["report"], "layers_removed"), 0, "{done:#}");
    assert_eq!(layers(&home).len(), all.len() - 1);
    let df = json(&home, &["df"]);
    assert_eq!(number(&df, "on_disk"), du(&home.state().join("store/v1")));
    assert!(number(&df, "in_trash") > 0, "{df:#}");
    assert_eq!(number(&df, "unnamed"), 0, "{df:#}");
    let again = home.build(&projects[2], &["--name", "three"]);
    assert_eq!(again.ids(), built.ids());
    assert_eq!(layers(&home), all);

    let mut dev = home.dev(&projects[2], &["--name", "three"]);
    dev.wait_for("started");
    let args = [
        "store",
        "gc",
        "--keep",
        "0s",
        "--grace",
        "0s",
        "--max-size",
        "0",
        "--min-free",
        "none",
    ];
    let gc = home.start(&args).finish(LIMIT).ok();
    assert!(gc.stdout.contains("dev three"), "{}", gc.stdout);
    dev.stop();
    assert_eq!(home.build(&projects[2], &["--name", "three"]).built(), "");

    // Its name keeps what it was started with last, and no more.
    projects[2].write("main.txt", "edited\n");
    run_once(&home, &projects[2], "three");
    let refs = json(&home, &["inspect", "three"]);
    let kept = ids(&array(&refs, "refs")[0], "layers");
    let mut built = home
        .build(&projects[2], &["--name", "three"])
        .ids()
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>();
    built.sort_unstable();
    assert_eq!(kept, built);
}

#[test]
fn gc_refuses_limits_that_make_no_sense() {
    let home = Home::new();
    for (args, says) in [
        (["--max-size", "20G"], "GiB"),
        (["--max-size", "much"], "20GB"),
        (["--min-free", "110%"], "100%"),
        (["--min-free", "some"], "10%"),
        (["--keep", "14"], "14d"),
        (["--grace", "soon"], "14d"),
    ] {
        let ended = home.run(&["store", "gc", args[0], args[1]]).exits(2);
        assert!(ended.stderr.contains(says), "{args:?}: {}", ended.stderr);
    }
    home.run(&["store", "gc"]).ok();
}

#[test]
fn a_build_clears_a_store_that_fills_the_disk() {
    if !is_root() {
        skip("clearing a full disk", "needs root to mount a small tmpfs");
        return;
    }
    let home = Home::that_clears();
    std::fs::create_dir(home.state()).unwrap();
    let options = Some(c"size=40m");
    mount("tmpfs", home.state(), "tmpfs", MountFlags::empty(), options).unwrap();
    home.import_busybox();
    std::fs::write(home.state().join("ballast"), vec![1; 27 << 20]).unwrap();
    // Nothing has a name here, so each build leaves 1.5 MB that only its recipe keeps.
    let project = Project::scripts(
        "true",
        "cat deps.txt >installed.txt; dd if=/dev/urandom of=big bs=1500k count=1 2>/dev/null",
        "true",
    );
    let mut cleared = 0;
    for round in 0..10 {
        project.write("deps.txt", &format!("dep {round}\n"));
        let ended = home.run(&["worker", "build", project.arg()]).ok();
        cleared += usize::from(ended.stderr.contains("of unneeded layers"));
    }
    assert!((1..10).contains(&cleared), "cleared {cleared} times");
    // The last one is still there.
    assert_eq!(home.build(&project, &[]).built(), "");
}

#[test]
fn an_image_clears_a_store_that_fills_the_disk() {
    if !is_root() {
        skip("clearing a full disk", "needs root to mount a small tmpfs");
        return;
    }
    let project = Project::empty();
    let archive = project.path().join("root.tar");
    for (home, clears) in [(Home::that_clears(), true), (Home::new(), false)] {
        std::fs::create_dir(home.state()).unwrap();
        let options = Some(c"size=20m");
        mount("tmpfs", home.state(), "tmpfs", MountFlags::empty(), options).unwrap();
        std::fs::write(home.state().join("ballast"), vec![1; 10 << 20]).unwrap();
        let mut cleared = 0;
        // Each takes the name of the one before, which nothing keeps then but that it was unpacked
        // once.
        for _ in 0..12 {
            let made = Command::new("sh")
                .args([
                    "-ec",
                    "mkdir -p usr && head -c 1500000 /dev/urandom >usr/x && tar cf root.tar usr",
                ])
                .current_dir(project.path())
                .status();
            assert!(made.unwrap().success());
            let import = ["image", "import", archive.to_str().unwrap(), "--as", "x"];
            let ended = home.run(&import);
            if clears {
                let ended = ended.ok();
                cleared += usize::from(ended.stderr.contains("of unneeded layers"));
            } else if ended.status.success() {
                assert!(!ended.stderr.contains("unneeded"), "{}", ended.stderr);
            } else {
                ended.says(&["No space left on device"]);
                // It does not fit, and never will.
                cleared = 1;
                break;
            }
        }
        assert!(cleared > 0);
    }
}

/// The pack that holds `bytes`, with one of them flipped.
fn flip_in_pack(store: &Path, bytes: &[u8]) {
    for path in files(&store.join("packs")) {
        let mut pack = std::fs::read(&path).unwrap();
        let found = pack.windows(bytes.len()).position(|window| window == bytes);
        if let Some(at) = found.filter(|_| path.extension() == Some("pack".as_ref())) {
            pack[at] ^= 1;
            rewrite(&path, &pack);
            return;
        }
    }
    panic!("no pack has {bytes:?}");
}

/// The store's files are immutable, so the new file replaces the old one.
fn rewrite(path: &Path, bytes: &[u8]) {
    std::fs::remove_file(path).unwrap();
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn verify_finds_damage_and_repair_has_it_built_again() {
    let (home, built, projects) = filled_from();
    let store = home.state().join("store/v1");
    for args in [
        &["verify"][..],
        &["verify", "--data"],
        &["verify", "--repair"],
    ] {
        let report = json(&home, args);
        assert_eq!(array(&report, "mended"), [] as [Value; 0]);
        assert_eq!(number(&report["report"], "layers"), 7, "{report:#}");
    }
    home.run(&["store", "verify"])
        .ok()
        .says(&["verified: 7 layers", "structure only"]);

    // Damaged contents show when everything is hashed.
    flip_in_pack(&store, b"other dep\n");
    let ended = home.run(&["store", "verify", "--data"]).exits(1);
    assert!(
        ended.stdout.contains("damage") && ended.stdout.contains(".pack"),
        "{}",
        ended.stdout
    );
    ended.says(&["error: the store has", "--repair"]);
    let ended = home.run(&["store", "verify", "--data", "--json"]).exits(1);
    let report: Value = serde_json::from_str(&ended.stdout).unwrap();
    let kinds = array(&report["report"], "problems").iter();
    let kinds: Vec<_> = kinds
        .map(|problem| problem["kind"].as_str().unwrap())
        .collect();
    assert!(kinds.contains(&"object"), "{kinds:?}");
    home.run(&["store", "verify", "--data", "--repair"])
        .ok()
        .says(&["moved aside", "saved", "verified: "]);
    home.run(&["store", "verify", "--data"]).ok();
    let again = home.build(&projects[2], &["--name", "three"]);
    assert_eq!(again.built(), "project install");
    assert_eq!(again.get("project").layer_id, built.get("project").layer_id);
    run_once(&home, &projects[2], "three");

    // A layer that is cut short shows at once.
    let layer = store.join("layers").join(&built.get("setup").layer_id);
    let bytes = std::fs::read(&layer).unwrap();
    rewrite(&layer, &bytes[..bytes.len() - 1]);
    home.run(&["worker", "build", projects[0].arg(), "--name", "one"])
        .fails()
        .says(&["iii store verify", "--repair"]);
    home.run(&["store", "verify"])
        .exits(1)
        .says(&[&built.get("setup").layer_id]);
    home.run(&["store", "verify", "--repair"])
        .ok()
        .says(&["worker one keeps its other layers", "built again"]);
    home.run(&["store", "verify"])
        .exits(1)
        .says(&["refs/worker"]);
    // Its upper stood on the lost layer, and stands on the one of the same tree that is built now.
    let mut dev = home.dev(&projects[0], &["--name", "one"]);
    dev.wait_for("started");
    dev.stop();
    home.run(&["store", "verify", "--data"]).ok();
}

#[test]
fn verify_looks_at_uppers_and_repair_leaves_them() {
    let home = Home::with_busybox();
    let project = Project::scripts(
        "true",
        "true",
        "echo 1 >/of-worker; echo started; sleep 1000",
    );
    let mut dev = home.dev(&project, &["--name", "one"]);
    dev.wait_for("started");
    // Nothing is wrong while it runs.
    let verify = ["store", "verify"];
    let running = home.start(&verify).finish(LIMIT).exits(0);
    running.says(&["dev/one/upper: healthy"]);
    dev.stop();
    let upper = home.state().join("dev/one/upper");
    home.run(&verify).ok().says(&["dev/one/upper: healthy"]);
    let report = json(&home, &["verify"]);
    let [row] = array(&report, "uppers") else {
        panic!("there is one upper: {report:#}");
    };
    assert_eq!(row["path"], upper.to_str().unwrap());
    assert!(number(row, "files") > 0, "{row:#}");

    let log = upper.join("log");
    let mut bytes = std::fs::read(&log).unwrap();
    let name = b"of-worker";
    let at = bytes.windows(name.len()).position(|part| part == name);
    bytes[at.unwrap()] ^= 1;
    std::fs::write(&log, &bytes).unwrap();
    for args in [&["verify"][..], &["verify", "--repair"]] {
        let all = [&["store"], args].concat();
        home.run(&all).exits(1).says(&[
            "verified: ",
            "dev/one/upper: damaged",
            "damaged at byte",
            "--fresh",
        ]);
        let ended = home.run(&[&all[..], &["--json"]].concat()).exits(1);
        let report: Value = serde_json::from_str(&ended.stdout).unwrap();
        let row = &array(&report, "uppers")[0];
        assert_eq!(row["state"], "damaged");
        let offset = number(row, "offset");
        assert!((1..=at.unwrap() as i64).contains(&offset), "{row:#}");
        assert_eq!(std::fs::read(&log).unwrap(), bytes);
    }

    // A log that cannot be read tells nothing of the upper.
    std::fs::remove_file(&log).unwrap();
    std::fs::create_dir(&log).unwrap();
    home.run(&verify)
        .exits(3)
        .says(&["dev/one/upper: not checked"]);
}

#[test]
fn one_damaged_name_hides_no_other() {
    let home = Home::with_busybox();
    let project = project("dep\n", "one\n");
    run_once(&home, &project, "one");
    run_once(&home, &project, "two");
    let refs = home.state().join("store/v1/refs/worker");
    rewrite(&refs.join("two"), b"no seal");
    for command in ["list", "df"] {
        home.run(&["store", command])
            .ok()
            .says(&["refs/worker/two", "worker one"]);
    }
    let df = json(&home, &["df"]);
    let names = array(&df, "refs").iter().map(|name| &name["name"]);
    assert!(names.eq([NODE_IMAGE, "one"]), "{df:#}");
    assert_eq!(number(&df, "on_disk"), du(&home.state().join("store/v1")));
}

#[test]
fn a_home_need_not_be_utf_8() {
    let dir = TempDir::with_prefix(OsStr::from_bytes(b"home-\xff")).unwrap();
    let home = Home::through(dir, vec![env!("CARGO_BIN_EXE_iii").into()]);
    home.import_busybox();
    home.run(&["store", "df"]).ok();
    let df = json(&home, &["df"]);
    let store = df["store"].as_str().unwrap();
    assert!(store.contains("home-%ff"), "{store}");

    let project = project("dep\n", "one\n");
    run_once(&home, &project, "one");
    let strange = home
        .state()
        .join("store/v1/layers")
        .join(OsStr::from_bytes(b"\xfe"));
    std::fs::write(strange, "").unwrap();
    let ended = home.run(&["store", "verify", "--json"]).exits(1);
    let report: Value = serde_json::from_str(&ended.stdout).unwrap();
    let path = array(&report, "uppers")[0]["path"].as_str().unwrap();
    assert!(path.contains("home-%ff"), "{path}");
    let problems = array(&report["report"], "problems").iter();
    let paths: Vec<_> = problems.map(|one| &one["path"]).collect();
    assert_eq!(paths, ["layers/%fe"]);
}

/// A user who may have one thread looks after the store all the same, and nothing panics.
#[test]
fn one_thread_looks_after_a_store() {
    let dir = TempDir::with_prefix("home-").unwrap();
    let binary = dir.path().join("iii");
    std::fs::copy(env!("CARGO_BIN_EXE_iii"), &binary).unwrap();
    let mut program = vec!["prlimit", "--nproc=1"];
    if is_root() {
        // Root has no such limit.
        program.extend([
            "setpriv",
            "--reuid=54322",
            "--regid=54322",
            "--clear-groups",
        ]);
    }
    let mut program: Vec<_> = program.into_iter().map(Into::into).collect();
    program.push(binary.clone());
    let base = busybox_base();
    let import = [
        "image",
        "import",
        base.to_str().unwrap(),
        "--as",
        NODE_IMAGE,
    ];
    let imported = Command::new(&binary)
        .args(import)
        .env("HOME", dir.path())
        .output();
    assert!(imported.unwrap().status.success());
    if is_root() {
        let mut chown = Command::new("chown");
        let chown = chown.args(["-R", "54322:54322"]).arg(dir.path());
        assert!(chown.status().unwrap().success());
    }
    let home = Home::through(dir, program);
    for command in [
        &["df"][..],
        &["list"],
        &["verify", "--data"],
        &["gc", "--dry-run"],
        &["gc"],
    ] {
        home.run(&[&["store"], command].concat()).ok();
    }
    home.run(&["image", "import", "/", "--as", "x"])
        .fails()
        .says(&["no further thread", "ulimit -u"]);
}

#[test]
fn a_damaged_format_is_mended() {
    let (home, _) = filled();
    let format = home.state().join("store/v1/format");
    let whole = std::fs::read(&format).unwrap();
    rewrite(&format, &whole[1..]);
    home.run(&["store", "list"])
        .fails()
        .says(&["format", "iii store verify", "--repair"]);
    home.run(&["store", "verify"]).exits(1).says(&["format"]);
    home.run(&["store", "verify", "--repair"])
        .ok()
        .says(&["format written again"]);
    assert_eq!(std::fs::read(&format).unwrap(), whole);
    assert_eq!(array(&json(&home, &["list"]), "layers").len(), 7);
}

#[test]
fn migrate_brings_an_earlier_store_up_to_date() {
    let (home, built, projects) = filled_from();
    let store = home.state().join("store/v1");
    home.run(&["store", "migrate"]).ok().says(&["up to date"]);
    // Earlier stores had no seals, and no outboards beside large files.
    for path in files(&store.join("loose")) {
        if path.extension().is_some() {
            std::fs::remove_file(path).unwrap();
        }
    }
    let sealed = [files(&store.join("keys")), files(&store.join("refs"))].concat();
    for path in sealed {
        let bytes = std::fs::read(&path).unwrap();
        rewrite(&path, iii_store::seal::open(&bytes).unwrap());
    }
    rewrite(
        &store.join("format"),
        br#"{"version":1,"compat":[],"ro_compat":[],"incompat":[]}"#,
    );

    home.run(&["store", "list"])
        .fails()
        .says(&["earlier", "iii store migrate"]);
    home.run(&["worker", "build", projects[2].arg()])
        .fails()
        .says(&["iii store migrate"]);
    let migrated = json(&home, &["migrate"]);
    assert!(number(&migrated["migrated"], "sealed") > 4, "{migrated:#}");
    assert_eq!(array(&migrated["migrated"], "damaged"), [] as [Value; 0]);
    home.run(&["store", "migrate"]).ok().says(&["up to date"]);
    home.run(&["store", "verify", "--data"]).ok();
    let again = home.build(&projects[2], &["--name", "three"]);
    assert_eq!((again.built().as_str(), again.ids()), ("", built.ids()));

    // One that a later program made is refused, and says so.
    rewrite(
        &store.join("format"),
        &iii_store::seal::seal(
            br#"{"version":9,"compat":[],"ro_compat":[],"incompat":[]}"#.to_vec(),
        ),
    );
    for args in [
        &["store", "list"][..],
        &["store", "verify"],
        &["store", "migrate"],
    ] {
        home.run(args).fails().says(&["format version 9"]);
    }
}
