//! Starting, stopping and being killed.

use std::fs;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::engine::{free_port, holds_within};
use crate::harness::{Home, LIMIT, Project};

const STAY: &str = "echo started; exec sleep 1000";

fn counting() -> Project {
    let project = Project::scripts(
        "true",
        "true",
        "echo x >>/count; echo x >>count; echo runs=$(wc -l </count) $(wc -l <count); cat main.txt; exec sleep 1000",
    );
    project.write("main.txt", "main 1\n");
    project
}

#[test]
fn ctrl_c_ends_cleanly() {
    let home = Home::with_busybox();
    let project = Project::scripts("true", "true", STAY);
    let mut dev = home.dev(&project, &[]);
    dev.wait_for("started");
    dev.stop();
}

#[test]
fn sigterm_reaches_the_worker() {
    let home = Home::with_busybox();
    let project = Project::scripts(
        "true",
        "true",
        "trap 'echo got TERM; exit 0' TERM; echo started; while :; do sleep 0.1; done",
    );
    let mut dev = home.dev(&project, &[]);
    dev.wait_for("started");
    dev.signal(Signal::TERM);
    dev.wait_for("got TERM");
    dev.finish(LIMIT);
    home.assert_nothing_left();
}

#[test]
fn a_stubborn_worker_is_killed_after_ten_seconds() {
    let home = Home::with_busybox();
    let project = Project::scripts(
        "true",
        "true",
        "trap '' INT TERM; echo started; while :; do sleep 1; done",
    );
    let mut dev = home.dev(&project, &[]);
    dev.wait_for("started");
    let begin = Instant::now();
    dev.stop();
    let took = begin.elapsed();
    assert!((9..20).contains(&took.as_secs()), "{took:?}");
}

#[test]
fn the_exit_code_is_passed_on() {
    let home = Home::with_busybox();
    let project = Project::scripts("true", "true", "echo once; exit 7");
    home.run(&["worker", "dev", project.arg()])
        .exits(7)
        .says(&["once", "7"]);
    project.edit("iii.worker.yaml", "exit 7", "exit 0");
    home.run(&["worker", "dev", project.arg()]).exits(0);
}

#[test]
fn orphans_in_the_sandbox_do_not_outlive_it() {
    let home = Home::with_busybox();
    let project = Project::scripts(
        "true",
        "true",
        "(setsid sleep 1000 &) ; (trap '' INT TERM HUP; sleep 1000) & echo started; exec sleep 1000",
    );
    let mut dev = home.dev(&project, &[]);
    dev.wait_for("started");
    dev.stop();
}

#[test]
fn what_the_sandbox_wrote_stays_until_fresh() {
    let home = Home::with_busybox();
    let project = counting();
    for expected in ["runs=1 1", "runs=2 2"] {
        let mut dev = home.dev(&project, &[]);
        dev.wait_for(expected);
        dev.stop();
    }
    // A new project layer leaves other files alone.
    project.write("main.txt", "main 2\n");
    let mut dev = home.dev(&project, &[]);
    dev.wait_for("runs=3 3");
    dev.wait_for("main 2");
    dev.stop();
    // A file that the project changed wins over the sandbox's version.
    project.write("count", "from the project\n");
    let mut dev = home.dev(&project, &[]);
    dev.wait_for("runs=4 2");
    dev.stop();
    project.remove("count");
    let mut dev = home.dev(&project, &["--fresh"]);
    dev.wait_for("runs=1 1");
    dev.stop();
    let layers = home.build(&project, &[]);
    assert_eq!(layers.built(), "", "--fresh keeps the layers: {layers:#?}");
    let mut dev = home.dev(&project, &["--rebuild"]);
    dev.wait_for("runs=1 1");
    dev.stop();
}

#[test]
fn a_deleted_project_file_disappears() {
    let home = Home::with_busybox();
    let project = Project::scripts("true", "true", "ls; echo started; exec sleep 1000");
    project.write("doomed.txt", "");
    let mut dev = home.dev(&project, &[]);
    dev.wait_for("doomed.txt");
    dev.stop();
    project.remove("doomed.txt");
    let mut dev = home.dev(&project, &[]);
    dev.wait_for("started");
    assert!(!dev.says_so_far().any(|line| line == "doomed.txt"));
    dev.stop();
}

#[test]
fn the_host_project_is_never_written() {
    let home = Home::with_busybox();
    let project = Project::scripts(
        "true",
        "rm main.txt; echo new >created.txt",
        "echo more >>iii.worker.yaml; ls; echo started; exec sleep 1000",
    );
    project.write("main.txt", "main\n");
    let before = fs::read(project.path().join("iii.worker.yaml")).unwrap();
    let mut dev = home.dev(&project, &[]);
    dev.wait_for("started");
    dev.stop();
    assert_eq!(
        fs::read(project.path().join("iii.worker.yaml")).unwrap(),
        before
    );
    assert!(project.path().join("main.txt").exists());
    assert!(!project.path().join("created.txt").exists());
}

#[test]
fn sigkill_leaves_nothing_that_the_next_run_does_not_clean() {
    let home = Home::with_busybox();
    let project = counting();
    let mut dev = home.dev(&project, &[]);
    dev.wait_for("main 1");
    dev.signal(Signal::KILL);
    dev.finish(LIMIT);
    let mut dev = home.dev(&project, &[]);
    dev.wait_for("runs=2 2");
    dev.stop();

    // The same in the middle of install.
    project.edit(
        "iii.worker.yaml",
        "install: \"true\"",
        "install: \"echo installing; sleep 5\"",
    );
    let mut build = home.start(&["worker", "build", project.arg()]);
    build.wait_for("installing");
    build.signal(Signal::KILL);
    build.finish(LIMIT);
    let layers = home.build(&project, &[]);
    assert!(layers.built().starts_with("install"), "{layers:#?}");
    assert_eq!(home.mounts(), Vec::<String>::new());
}

#[test]
fn ctrl_c_in_install_commits_nothing() {
    let home = Home::with_busybox();
    let project = Project::scripts("true", "echo installing; sleep 1000", STAY);
    let mut build = home.start(&["worker", "build", project.arg()]);
    build.wait_for("installing");
    build.ctrl_c();
    let ended = build.finish(Duration::from_secs(20));
    assert_ne!(ended.status.code(), Some(0));
    home.assert_nothing_left();
    project.edit(
        "iii.worker.yaml",
        "sleep 1000\"\n  start",
        "sleep 0\"\n  start",
    );
    assert_eq!(home.build(&project, &[]).built(), "project install");
}

#[test]
fn the_second_run_of_one_sandbox_is_refused() {
    let home = Home::with_busybox();
    let project = Project::scripts("true", "true", STAY);
    let mut first = home.dev(&project, &[]);
    first.wait_for("started");
    let second = home.start(&["worker", "dev", project.arg()]);
    second.finish(LIMIT).fails().says(&["in use"]);
    assert!(first.is_running());
    // A second name means a second sandbox.
    let mut other = home.dev(&project, &["--name", "other"]);
    other.wait_for("started");
    other.ctrl_c();
    other.finish(LIMIT).ok();
    assert!(first.is_running());
    first.stop();
}

#[test]
fn without_an_engine_the_worker_starts_all_the_same() {
    let home = Home::with_busybox();
    let project = Project::scripts("true", "true", STAY);
    let port = free_port().to_string();
    let mut dev = home.start(&["worker", "dev", project.arg(), "--port", &port]);
    dev.wait_for("started");
    let ended = dev.stop();
    let mentions = ended
        .stderr
        .lines()
        .filter(|line| line.contains(&port))
        .count();
    assert_eq!(mentions, 1, "{}", ended.stderr);
}

#[test]
fn libkrun_never_falls_back() {
    let home = Home::with_busybox();
    let project = Project::scripts("true", "true", STAY);
    let mut run = home.dev(&project, &["--runtime", "libkrun"]);
    // Either it really runs a VM, or it says why not.
    if holds_within(LIMIT, || !run.is_running()) {
        run.finish(LIMIT).fails().says(&["libkrun"]);
    } else {
        run.stop();
    }
    home.assert_nothing_left();
}
