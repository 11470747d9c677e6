//! Which layers an edit redoes.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use crate::harness::{Home, LIMIT, Layers, Project};

/// Setup leaves a mark, install uses `deps.txt` and looks for `lock.txt` in vain, start shows the
/// files of both.
fn project() -> Project {
    let project = Project::scripts(
        "echo made >/made-by-setup",
        "cat deps.txt >installed.txt; cat lock.txt 2>/dev/null || true; echo conf/* >/dev/null",
        "cat /made-by-setup installed.txt main.txt; echo started; exec sleep 1000",
    );
    project.write("deps.txt", "dep 1\n");
    project.write("main.txt", "main 1\n");
    project.write("conf/a", "a\n");
    project
}

type Edit = fn(&Project);

/// One after another: what is edited, the edit, the layers that it redoes, and what the reason for
/// install has to name.
const EDITS: &[(&str, Edit, &str, &str)] = &[
    ("nothing", |_| {}, "", ""),
    (
        "a source file",
        |p| p.write("main.txt", "main 2\n"),
        "project",
        "",
    ),
    (
        "a new file nobody looked for",
        |p| p.write("new.txt", "new\n"),
        "project",
        "",
    ),
    (
        "a touched file",
        |p| {
            fs::File::open(p.path().join("deps.txt"))
                .unwrap()
                .set_modified(std::time::UNIX_EPOCH)
                .unwrap();
        },
        "project",
        "",
    ),
    (
        "what install read",
        |p| p.write("deps.txt", "dep 2\n"),
        "project install",
        "deps.txt",
    ),
    (
        "what install missed",
        |p| p.write("lock.txt", "lock\n"),
        "project install",
        "lock.txt",
    ),
    (
        "a directory install listed",
        |p| p.write("conf/b", "b\n"),
        "project install",
        "conf",
    ),
    (
        "a file in it that install did not read",
        |p| p.write("conf/a", "aa\n"),
        "project",
        "",
    ),
    (
        "the install script",
        |p| p.edit("iii.worker.yaml", "cat lock.txt", "cat ./lock.txt"),
        "project install",
        "",
    ),
    (
        "the setup script to the same effect",
        |p| p.edit("iii.worker.yaml", "echo made", "echo  made"),
        "project setup",
        "",
    ),
    (
        "the setup script",
        |p| p.edit("iii.worker.yaml", "echo  made", "echo remade"),
        "project setup install",
        "",
    ),
    (
        "the start script",
        |p| p.edit("iii.worker.yaml", "echo started", "echo up"),
        "project",
        "",
    ),
    (
        "a file's mode",
        |p| {
            fs::set_permissions(p.path().join("main.txt"), fs::Permissions::from_mode(0o755))
                .unwrap();
        },
        "project",
        "",
    ),
    ("a removed file", |p| p.remove("new.txt"), "project", ""),
    (
        "what install read, to the same text",
        |p| p.write("deps.txt", "dep 2\n"),
        "project",
        "",
    ),
];

#[test]
fn redoes_exactly_what_an_edit_touches() {
    let home = Home::with_busybox();
    let project = project();
    let first = home.build(&project, &[]);
    assert_eq!(first.built(), "project setup install");

    for (what, edit, built, reason) in EDITS {
        edit(&project);
        let layers = home.build(&project, &[]);
        assert_eq!(
            layers.built(),
            *built,
            "after an edit of {what}: {layers:#?}"
        );
        assert!(
            layers.reason().contains(reason),
            "after an edit of {what}: {:?}",
            layers.reason()
        );
    }
}

#[test]
fn goes_back_to_a_stored_layer() {
    let home = Home::with_busybox();
    let project = project();
    let first = home.build(&project, &[]);
    project.write("deps.txt", "dep 2\n");
    let second = home.build(&project, &[]);
    assert_ne!(first.get("install").tree_id, second.get("install").tree_id);
    project.write("deps.txt", "dep 1\n");
    let third = home.build(&project, &[]);
    assert_eq!(third.get("install").status, "hit");
    assert_eq!(third.get("install").layer_id, first.get("install").layer_id);
    assert_eq!(third.bytes(), 0);
}

#[test]
fn shares_layers_between_projects() {
    let home = Home::with_busybox();
    let first = project();
    home.build(&first, &[]);
    let second = project();
    let layers = home.build(&second, &["--name", "second"]);
    assert_eq!(
        (layers.get("install").status.as_str(), layers.bytes()),
        ("hit", 0),
        "{layers:#?}"
    );
    second.write("main.txt", "another main\n");
    let layers = home.build(&second, &["--name", "second"]);
    assert_eq!(layers.built(), "project");
    assert_eq!(layers.bytes(), "another main\n".len() as u64);
}

#[test]
fn rebuild_redoes_setup_and_install() {
    let home = Home::with_busybox();
    let project = project();
    home.build(&project, &[]);
    let layers = home.build(&project, &["--rebuild"]);
    assert_eq!(layers.get("setup").status, "built", "{layers:#?}");
    assert_eq!(layers.get("install").status, "built", "{layers:#?}");
    assert_eq!(home.build(&project, &[]).built(), "");
}

#[test]
fn a_failed_step_commits_nothing_and_can_be_mended() {
    let home = Home::with_busybox();
    let project = project();
    project.write("deps.txt", "dep 1\n");
    project.edit(
        "iii.worker.yaml",
        "echo conf",
        "echo last words >&2; test -e mended; echo conf/*",
    );
    for _ in 0..2 {
        home.run(&["worker", "build", project.arg()])
            .fails()
            .says(&["install", "1", "last words"]);
        home.run(&["worker", "dev", project.arg()])
            .fails()
            .says(&["install", "last words"]);
    }
    project.write("mended", "");
    assert_eq!(home.build(&project, &[]).built(), "project install");
    project.write("other", "more\n");
    assert_eq!(home.build(&project, &[]).built(), "project");
}

#[test]
fn two_identical_builds_build_once() {
    let home = Home::with_busybox();
    let project = project();
    project.edit("iii.worker.yaml", "echo conf", "sleep 2; echo conf");
    let args = ["worker", "build", project.arg(), "--json"];
    let running = [home.start(&args), home.start(&args)];
    let both = running.map(|running| Layers::parse(&running.finish(LIMIT).ok()));
    home.assert_nothing_left();
    for kind in ["setup", "install", "project"] {
        let built = both
            .iter()
            .filter(|layers| layers.get(kind).status == "built");
        assert_eq!(
            built.count(),
            1,
            "{kind} is built by one of the two: {both:#?}"
        );
    }
    assert_eq!(both[0].ids(), both[1].ids());
}

#[test]
fn scripts_see_the_environment_that_is_promised() {
    let home = Home::with_busybox();
    let project = Project::scripts(
        "id -u",
        "pwd >where.txt",
        "cat where.txt; echo $PATH; echo lang=$LANG url=$III_URL=$III_ENGINE_URL mine=$MINE; exec sleep 1000",
    );
    project.edit(
        "iii.worker.yaml",
        "name: box\n",
        "name: box\nenv:\n  MINE: mine\n  III_URL: ws://elsewhere\n",
    );
    let mut dev = home.start(&["worker", "dev", project.arg(), "--port", "1"]);
    dev.wait_for("/workspace");
    dev.wait_for("/usr/local/bin:/usr/bin:/bin");
    dev.wait_for("lang=C.UTF-8 url=ws://localhost:1=ws://localhost:1 mine=mine");
    dev.stop();
}
