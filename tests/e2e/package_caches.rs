//! Caches of package managers and build directories: shared by steps, seen by no running worker,
//! and never of influence on a result. The package managers are scripts, which do with their
//! directories as npm, pip and cargo do.

use std::fs::{self, File};
use std::time::{Duration, SystemTime};

use tempfile::TempDir;

use crate::harness::{Home, NODE_IMAGE, Project, busybox_base, files};

/// Downloads a package, unless the cache has it, and installs it.
const NPM: &str = "c=/root/.npm/_cacache; mkdir -p $c /root/.npm/_logs; echo $$ >/root/.npm/_logs/$$.log; \
                   if [ -e $c/ms ]; then echo from cache; else echo downloaded; echo ms >$c/ms; fi; \
                   mkdir -p node_modules; cp $c/ms node_modules/ms";

/// Builds `target/app` from `main.rs`, by mtimes, as cargo does. Each build adds a line to what it
/// has built.
const CARGO: &str = "mkdir -p target; echo seeds: $(cat target/built 2>/dev/null | tr '\\n' ' '); \
                     if [ -e target/app ] && [ ! main.rs -nt target/app ]; then echo fresh; else \
                     echo compiled; v=$(cat main.rs); [ \"$v\" != error ]; echo $v >>target/built; \
                     printf '#!/bin/sh\\necho app %s' $v >target/app; chmod +x target/app; fi";

fn rust(main: &str) -> Project {
    let start = "target/app; echo built $(cat target/built | tr '\\n' ' '); exec sleep 1000";
    let project = Project::scripts("true", CARGO, start);
    let runtime = format!("kind: rust\n  base_image: {NODE_IMAGE}");
    project.edit("iii.worker.yaml", "kind: javascript", &runtime);
    project.write("main.rs", main);
    project
}

/// Edits the program, so many seconds from now: the shell of busybox compares whole seconds.
fn later(project: &Project, main: &str, seconds: u64) {
    project.write("main.rs", main);
    let file = File::open(project.path().join("main.rs")).unwrap();
    file.set_modified(SystemTime::now() + Duration::from_secs(seconds))
        .unwrap();
}

fn build(home: &Home, project: &Project) -> String {
    let ended = home.run(&["worker", "build", project.arg()]).ok();
    ended.stdout + &ended.stderr
}

/// Output of the worker until it runs.
fn runs(home: &Home, project: &Project, needle: &str) {
    let mut dev = home.dev(project, &["--no-watch"]);
    dev.wait_for(needle);
    dev.stop();
}

#[test]
fn steps_share_downloads_and_nothing_of_them_is_in_a_layer() {
    let home = Home::with_busybox();
    let look = "ls -A /root/.npm /root/.npm/_cacache 2>&1 | tr '\\n' ' '; echo; cat node_modules/ms; exec sleep 1000";
    let first = Project::scripts("true", NPM, look);
    assert!(build(&home, &first).contains("downloaded"));
    let cold = home.build(&first, &[]).get("install").tree_id.clone();

    let second = Project::scripts("true", &format!("{NPM}; true"), look);
    assert!(build(&home, &second).contains("from cache"));
    let warm = home.build(&second, &[]).get("install").tree_id.clone();
    assert_eq!(cold, warm, "the cache shows in the result");

    // The running worker has the installed files, and no cache.
    let mut dev = home.dev(&second, &["--no-watch"]);
    let line = dev.wait_for("/root/.npm");
    assert!(line.contains("No such file"), "{line}");
    dev.wait_for("ms");
    dev.stop();

    // Collected, it is filled again, and nothing else changes.
    home.run(&["store", "df"]).ok().says(&["cache npm"]);
    home.run(&["store", "gc", "--keep", "0s", "--grace", "0s"])
        .ok();
    let left = files(&home.state().join("store/v1/refs/volume"));
    assert!(left.is_empty(), "{left:?}");
    let ended = home
        .run(&["worker", "build", "--rebuild", second.arg()])
        .ok();
    assert!((ended.stdout + &ended.stderr).contains("downloaded"));
    assert_eq!(home.build(&second, &[]).get("install").tree_id, warm);
    assert!(!home.state().join("cache").exists());
}

#[test]
fn a_worker_changes_no_cache_and_a_step_that_fails_adds_nothing() {
    let home = Home::with_busybox();
    let poison = "mkdir -p /root/.npm/_cacache; echo bad >/root/.npm/_cacache/ms; echo poisoned; exec sleep 1000";
    let worker = Project::scripts("true", "true", poison);
    runs(&home, &worker, "poisoned");
    let failing = Project::scripts("true", &format!("{NPM}; exit 3"), "true");
    home.run(&["worker", "build", failing.arg()])
        .fails()
        .says(&["downloaded"]);
    let project = Project::scripts("true", NPM, "true");
    assert!(build(&home, &project).contains("downloaded"));
    // Nor does one that is killed, here with the tool.
    let slow = Project::scripts(
        "true",
        "mkdir -p /root/.npm/_cacache; echo bad >/root/.npm/_cacache/ms; echo half; sleep 1000",
        "true",
    );
    let mut running = home.start(&["worker", "build", slow.arg()]);
    running.wait_for("half");
    running.signal(rustix::process::Signal::KILL);
    running.finish(Duration::from_secs(20));
    let other = Project::scripts("true", &format!("{NPM}; cat node_modules/ms"), "true");
    let said = build(&home, &other);
    assert!(
        said.contains("from cache") && !said.contains("bad"),
        "{said}"
    );
}

/// Wheels that pip builds are good for the base that they were built on; downloads are for all.
#[test]
fn builds_are_shared_on_equal_layers_only() {
    let home = Home::with_busybox();
    let other_base = TempDir::new().unwrap();
    let root = other_base.path().join("root");
    assert!(
        std::process::Command::new("cp")
            .args([
                "-a",
                busybox_base().to_str().unwrap(),
                root.to_str().unwrap()
            ])
            .status()
            .unwrap()
            .success()
    );
    fs::create_dir_all(root.join("etc")).unwrap();
    fs::write(root.join("etc/flavour"), "other\n").unwrap();
    home.import(&root, "docker.io/library/other:latest");
    let pip = "w=/root/.cache/pip/wheels; h=/root/.cache/pip/http-v2; mkdir -p $w $h; \
               [ -e $h/sdist ] && echo had sdist; echo x >$h/sdist; \
               [ -e $w/wheel ] && echo had wheel; cat /etc/flavour 2>/dev/null >$w/wheel || true; cp $w/wheel /wheel";
    let project = |script: &str, base: &str| {
        let project = Project::scripts("true", script, "true");
        let runtime = format!("kind: python\n  base_image: {base}");
        project.edit("iii.worker.yaml", "kind: javascript", &runtime);
        project
    };
    let had = |said: &str| (said.contains("had sdist"), said.contains("had wheel"));
    assert_eq!(
        had(&build(&home, &project(pip, NODE_IMAGE))),
        (false, false)
    );
    let again = format!("{pip}; true");
    assert_eq!(
        had(&build(&home, &project(&again, NODE_IMAGE))),
        (true, true)
    );
    let other = "docker.io/library/other:latest";
    assert_eq!(had(&build(&home, &project(pip, other))), (true, false));
    assert_eq!(had(&build(&home, &project(&again, other))), (true, true));
}

#[test]
fn an_install_begins_with_what_the_last_one_built() {
    let home = Home::with_busybox();
    let project = rust("1");
    let said = build(&home, &project);
    assert!(
        said.contains("seeds: \n") || said.contains("seeds:"),
        "{said}"
    );
    assert!(said.contains("compiled"), "{said}");
    runs(&home, &project, "app 1");

    // An edit compiles on top of it.
    later(&project, "2", 2);
    let said = build(&home, &project);
    assert!(
        said.contains("seeds: 1") && said.contains("compiled"),
        "{said}"
    );
    runs(&home, &project, "app 2");

    // Taken back, it is the build of then, with the program of then; nothing runs.
    project.write("main.rs", "1");
    let layers = home.build(&project, &[]);
    assert_eq!(layers.get("install").status, "hit", "{layers:#?}");
    runs(&home, &project, "app 1");

    // A copy of the project starts at once, too.
    let copy = Project::copy(project.path());
    assert_eq!(home.build(&copy, &[]).get("install").status, "hit");
    runs(&home, &copy, "app 1");

    // An error leaves the seed as it was.
    later(&project, "error", 4);
    home.run(&["worker", "build", project.arg()]).fails();
    later(&project, "3", 6);
    let said = build(&home, &project);
    assert!(said.contains("seeds: 1 2"), "{said}");
    runs(&home, &project, "app 3");

    // A file that is older than the last build would pass for built: so that builds from nothing.
    project.write("main.rs", "4");
    let file = File::open(project.path().join("main.rs")).unwrap();
    file.set_modified(SystemTime::now() - Duration::from_hours(1))
        .unwrap();
    let said = build(&home, &project);
    assert!(said.contains("builds from nothing: "), "{said}");
    assert!(
        said.contains("compiled") && !said.contains("seeds: 1"),
        "{said}"
    );
    runs(&home, &project, "app 4");

    // As does one that is asked for, and one on another base.
    let ended = home
        .run(&["worker", "build", "--rebuild", project.arg()])
        .ok();
    let said = ended.stdout + &ended.stderr;
    assert!(
        said.contains("compiled") && !said.contains("seeds: 4"),
        "{said}"
    );
    home.import(busybox_base(), "docker.io/library/same:latest");
    project.edit(
        "iii.worker.yaml",
        "setup: \"true\"",
        "setup: \"echo x >/flavour\"",
    );
    project.write("main.rs", "5");
    let said = build(&home, &project);
    assert!(
        said.contains("compiled") && !said.contains("seeds: 4"),
        "{said}"
    );
}

#[test]
fn an_export_of_a_rust_worker_holds_the_program() {
    let home = Home::with_busybox();
    let project = rust("exported");
    build(&home, &project);
    let to = home.path().join("image");
    let oci = format!("oci:{}", to.display());
    let args = [
        "worker",
        "export",
        project.arg(),
        "--to",
        &oci,
        "--compression",
        "none",
    ];
    let ended = home.run(&args).ok();
    assert!(!ended.stderr.contains("left out"), "{}", ended.stderr);
    let holds = |text: &str| {
        files(&to).into_iter().any(|blob| {
            let bytes = fs::read(blob).unwrap();
            bytes
                .windows(text.len())
                .any(|part| part == text.as_bytes())
        })
    };
    assert!(holds("workspace/target/app") && holds("echo app exported"));
}

/// An edit of an input of the install that runs ends that install, and the worker runs on.
#[test]
fn an_install_whose_inputs_change_begins_anew() {
    let home = Home::with_busybox();
    let install = ". ./deps.txt; echo installing $DEPS; [ $DEPS != slow ] || sleep 1000; echo $DEPS >/installed";
    let start = "echo run on $(cat /installed); while :; do echo tick; sleep 0.05; done";
    let project = Project::scripts("true", install, start);
    project.write("deps.txt", "DEPS=1\n");
    project.write("notes.txt", "1\n");
    let mut dev = home.dev(&project, &[]);
    dev.wait_for("run on 1");
    project.write("deps.txt", "DEPS=slow\n");
    dev.wait_for("installing slow");
    // Something that it has not looked at does not disturb it, nor does it disturb the worker.
    project.write("notes.txt", "2\n");
    for _ in 0..5 {
        dev.wait_for("tick");
    }
    project.write("deps.txt", "DEPS=2\n");
    dev.wait_for("installing 2");
    dev.wait_for("run on 2");
    let ended = dev.stop();
    assert_eq!(
        ended.stderr.matches("installing slow").count()
            + ended.stdout.matches("installing slow").count(),
        1
    );
    assert!(!ended.stderr.contains("not reloaded"), "{}", ended.stderr);
}

#[test]
fn caches_of_older_versions_are_named() {
    let home = Home::with_busybox();
    fs::create_dir_all(home.state().join("cache/npm")).unwrap();
    home.run(&["store", "df"])
        .ok()
        .says(&["older version", "rm -rf"]);
}
