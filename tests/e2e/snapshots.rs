//! Snapshots of workers: taken, gone back to, forked from.

use std::fs::{self, File};
use std::io::Write as _;
use std::time::Duration;

use rustix::mount::{MountFlags, mount};
use rustix::process::Signal;
use serde_json::Value;

use crate::harness::{Ended, Home, LIMIT, Project, files, is_root, skip};
use crate::managed::Managed;

/// The most that a fork of a worker may take on disk: metadata.
const FORK: u64 = 300 << 10;

fn project() -> Project {
    let project = Project::scripts("true", "true", "exec sleep 1000");
    project.edit("iii.worker.yaml", "name: box", "name: api");
    project.write("main.txt", "main\n");
    project
}

/// The output of a shell in the worker.
fn shell(managed: &Managed<'_>, name: &str, script: &str) -> String {
    let ended = managed.run(&["exec", name, "--", "sh", "-c", script]);
    ended.ok().stdout
}

fn snapshots(managed: &Managed<'_>, name: &str) -> Vec<(String, String)> {
    let listed = managed.run(&["snapshots", name, "--json"]).ok();
    let listed: Value = serde_json::from_str(&listed.stdout).unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let all = listed["snapshots"].as_array().unwrap().iter();
    all.map(|one| (text(&one["tag"]), text(&one["layer"])))
        .collect()
}

fn tags(managed: &Managed<'_>, name: &str) -> Vec<String> {
    let all = snapshots(managed, name).into_iter();
    all.map(|(tag, _)| tag).collect()
}

/// Runs a command while workers may run.
fn run(home: &Home, args: &[&str]) -> Ended {
    home.start(args).finish(LIMIT).ok()
}

/// Removes everything unneeded from the store.
fn collect(home: &Home) -> Ended {
    run(home, &["store", "gc", "--keep", "0s", "--grace", "0s"])
}

fn on_disk(home: &Home) -> u64 {
    let ended = run(home, &["store", "df", "--json"]);
    let df: Value = serde_json::from_str(&ended.stdout).unwrap();
    df["on_disk"].as_u64().unwrap()
}

#[test]
fn what_a_worker_wrote_comes_back() {
    let home = Home::with_busybox();
    let managed = Managed(&home);
    let project = project();
    managed.run(&["add", project.arg(), "--port", "1"]).ok();
    // One that never ran has written nothing, which is a state, too.
    managed.run(&["snapshot", "api", "empty"]).ok();
    managed.run(&["start", "api", "--port", "1"]).ok();
    let pid = managed.pid("api").unwrap();
    shell(
        &managed,
        "api",
        "mkdir /data && echo one >/data/state && rm /bin/vi",
    );
    managed
        .run(&["snapshot", "api", "before"])
        .ok()
        .says(&["✓ snapshot before of api taken"]);
    assert_eq!(managed.pid("api"), Some(pid), "it went on");
    shell(
        &managed,
        "api",
        "echo two >/data/state && echo mine >main.txt && echo new >/new",
    );
    managed
        .run(&["snapshot", "api", "before"])
        .fails()
        .says(&["api has a snapshot before already", "--force"]);
    managed
        .run(&["rollback", "api", "after"])
        .fails()
        .says(&["api has no snapshot after", "it has before, empty"]);
    managed
        .run(&["snapshot", "api", "../x"])
        .fails()
        .says(&["tag \"../x\": "]);
    managed
        .run(&["snapshot", "nobody"])
        .fails()
        .says(&["no worker called nobody"]);
    assert_eq!(managed.pid("api"), Some(pid), "nothing was stopped");
    collect(&home);

    project.write("main.txt", "edited\n");
    managed
        .run(&["rollback", "api", "before"])
        .ok()
        .says(&["its later files are dropped", "api started"]);
    let state = "cat /data/state main.txt; ls /bin/vi /new 2>/dev/null; true";
    assert_eq!(shell(&managed, "api", state), "one\nedited\n");
    shell(&managed, "api", "echo three >>/data/state");
    managed.run(&["stop", "api"]).ok();

    // Its own ref keeps what it was made of, for as long as it needs that.
    managed.run(&["snapshot", "api", "before", "--force"]).ok();
    managed.run(&["snapshot", "--remove", "api", "before"]).ok();
    collect(&home);
    run(&home, &["store", "verify", "--data"]);
    managed.run(&["start", "api", "--port", "1"]).ok();
    assert_eq!(shell(&managed, "api", "cat /data/state"), "one\nthree\n");
    managed.run(&["rollback", "api", "empty"]).ok();
    assert_eq!(
        shell(&managed, "api", "ls /data /bin/vi 2>/dev/null; true"),
        "/bin/vi\n"
    );

    // Two at once, each called by the time.
    let take = || home.start(&["worker", "snapshot", "api"]);
    let (one, two) = (take(), take());
    one.finish(LIMIT).ok();
    two.finish(LIMIT).ok();
    assert_eq!(tags(&managed, "api").len(), 3);
    managed.run(&["clear", "-y", "api"]).ok();
    assert_eq!(tags(&managed, "api").len(), 3, "clearing leaves them");
    collect(&home);
    managed.run(&["rollback", "api", "empty"]).ok();
    run(&home, &["store", "list"]).says(&["snapshot"]);
    managed.run(&["remove", "-y", "api"]).ok();
    home.assert_nothing_left();
    let refs = home.state().join("store/v1/refs/snapshot");
    assert_eq!(fs::read_dir(refs).unwrap().count(), 0, "removing does not");
    run(&home, &["store", "verify", "--data"]);
}

#[test]
fn a_fork_shares_everything_and_goes_its_own_way() {
    let home = Home::with_busybox();
    let managed = Managed(&home);
    let project = project();
    let config = home.path().join("config.yaml");
    managed.run(&["add", project.arg(), "--port", "1"]).ok();
    let entry = fs::read_to_string(&config).unwrap();
    fs::write(
        &config,
        format!("{entry}    config:\n      depth: 3 # kept\n"),
    )
    .unwrap();
    managed.run(&["start", "api", "--port", "1"]).ok();
    shell(
        &managed,
        "api",
        "head -c 3000000 /dev/urandom >/blob; echo one >/state",
    );
    managed.run(&["snapshot", "api", "first"]).ok();
    shell(&managed, "api", "echo two >/state");
    let before = on_disk(&home);
    managed
        .run(&["fork", "api@first", "old"])
        .ok()
        .says(&["old forked from api@first"]);
    managed.run(&["fork", "api", "new"]).ok();
    let grown = on_disk(&home).saturating_sub(before);
    assert!(grown < FORK, "two forks took {grown} bytes");
    for (from, to) in [
        ("api", "new"),
        ("api", "api"),
        ("nobody", "x"),
        ("api@none", "x"),
    ] {
        managed.run(&["fork", from, to]).fails();
    }
    let text = fs::read_to_string(&config).unwrap();
    assert_eq!(text.matches("depth: 3 # kept").count(), 3, "{text}");
    for name in ["old", "new"] {
        let ended = managed.run(&["start", name, "--port", "1"]).ok();
        let built = ended.stderr.lines().filter(|line| line.contains("running"));
        assert_eq!(built.count(), 0, "{}", ended.stderr);
    }
    let sum = "sha256sum </blob; cat /state";
    let of = |name| shell(&managed, name, sum);
    let (api, old, new) = (of("api"), of("old"), of("new"));
    assert_eq!(new, api);
    assert_eq!(old, api.replace("two", "one"));
    shell(&managed, "new", "echo x >>/blob; echo three >/state");
    assert_eq!(of("api"), api);

    // Files that one needs stay when another goes.
    managed.run(&["remove", "-y", "api"]).ok();
    collect(&home);
    managed.run(&["restart", "old"]).ok();
    assert_eq!(of("old"), old);
    managed.run(&["remove", "-y", "old", "new"]).ok();
    home.assert_nothing_left();
    run(&home, &["store", "verify", "--data"]);
}

#[test]
fn a_rollback_that_is_killed_leaves_the_old_or_the_new() {
    let home = Home::with_busybox();
    let managed = Managed(&home);
    let project = project();
    managed.run(&["add", project.arg(), "--port", "1"]).ok();
    managed.run(&["start", "api", "--port", "1"]).ok();
    let mut known = Vec::new();
    for tag in ["one", "two"] {
        shell(
            &managed,
            "api",
            &format!("echo {tag} >/state; mkdir /{tag}"),
        );
        managed.run(&["snapshot", "api", tag]).ok();
    }
    managed.run(&["stop", "api"]).ok();
    for (_, layer) in snapshots(&managed, "api") {
        known.push(layer);
    }
    for step in 0..24_u64 {
        let tag = if step % 2 == 0 { "one" } else { "two" };
        let mut rollback = home.start(&["worker", "rollback", "api", tag]);
        std::thread::sleep(Duration::from_millis(step * 3));
        rollback.signal(Signal::KILL);
        let _ = rollback.finish(LIMIT);
        managed.run(&["snapshot", "api", "now", "--force"]).ok();
        let now = snapshots(&managed, "api").into_iter();
        let now = now.filter(|(tag, _)| tag == "now").map(|(_, layer)| layer);
        assert!(now.clone().all(|layer| known.contains(&layer)), "{now:?}");
        let left = home.state().join("managed/api/upper.new");
        assert!(!left.exists(), "what it left is gone with the next look");
    }
    collect(&home);
    run(&home, &["store", "verify", "--data"]);
    managed.run(&["rollback", "api", "one"]).ok();
    managed.run(&["start", "api", "--port", "1"]).ok();
    assert_eq!(
        shell(&managed, "api", "cat /state; ls -d /two || true"),
        "one\n"
    );
}

#[test]
fn sandboxes_of_worker_dev_have_snapshots_too() {
    let home = Home::with_busybox();
    let managed = Managed(&home);
    let project = project();
    let dev = |options: &[&str]| {
        let mut run = home.dev(&project, &[&["--name", "it"], options].concat());
        run.wait_for("ready");
        run
    };
    let read = "cat /state 2>/dev/null || echo none";
    let sandbox = dev(&[]);
    shell(&managed, "it", "echo one >/state");
    managed
        .run(&["snapshot", "it", "one"])
        .ok()
        .says(&["snapshot one of it"]);
    shell(&managed, "it", "echo two >/state");
    managed
        .run(&["rollback", "it", "one"])
        .fails()
        .says(&["it is in use by process"]);
    sandbox.stop();
    managed.run(&["snapshot", "it", "two"]).ok();
    managed.run(&["rollback", "it", "one"]).ok();
    let sandbox = dev(&[]);
    assert_eq!(shell(&managed, "it", read), "one\n");
    sandbox.stop();
    let sandbox = dev(&["--fresh"]);
    assert_eq!(shell(&managed, "it", read), "none\n");
    sandbox.stop();
    collect(&home);
    managed.run(&["rollback", "it", "two"]).ok();
    managed.run(&["fork", "it", "fork"]).ok();
    managed.run(&["start", "fork", "--port", "1"]).ok();
    assert_eq!(shell(&managed, "fork", read), "two\n");
    run(&home, &["worker", "export", "it"]);

    // All of it goes together, whatever became of the project; what was forked stays.
    managed.run(&["stop", "fork"]).ok();
    let sandbox = dev(&[]);
    managed
        .run(&["remove", "it"])
        .fails()
        .says(&["it is in use by process"]);
    sandbox.stop();
    let away = project.path().with_extension("away");
    fs::rename(project.path(), &away).unwrap();
    managed.run(&["remove", "nobody", "it"]).fails();
    assert_eq!(tags(&managed, "it"), ["one", "two"]);
    managed
        .run(&["remove", "it"])
        .ok()
        .says(&["sandbox it of `worker dev` removed"]);
    managed
        .run(&["remove", "it"])
        .fails()
        .says(&["no worker called it"]);
    let names = |dir: &str| {
        let dir = fs::read_dir(home.state().join(dir)).unwrap();
        dir.map(|entry| entry.unwrap().file_name())
            .collect::<Vec<_>>()
    };
    for dir in ["dev", "store/v1/refs/worker", "store/v1/refs/snapshot"] {
        assert!(names(dir).is_empty(), "{dir}: {:?}", names(dir));
    }
    collect(&home);
    fs::rename(&away, project.path()).unwrap();
    managed.run(&["start", "fork", "--port", "1"]).ok();
    assert_eq!(shell(&managed, "fork", read), "two\n");
    managed.run(&["remove", "-y", "fork"]).ok();
    run(&home, &["store", "verify", "--data"]);
}

#[test]
fn a_snapshot_on_a_full_disk() {
    if !is_root() {
        return skip(
            "snapshots on a full disk",
            "needs root to mount a small tmpfs",
        );
    }
    let home = Home::new();
    fs::create_dir(home.state()).unwrap();
    let size = Some(c"size=40m");
    mount("tmpfs", home.state(), "tmpfs", MountFlags::empty(), size).unwrap();
    home.import_busybox();
    let managed = Managed(&home);
    let project = project();
    managed.run(&["add", project.arg(), "--port", "1"]).ok();
    managed.run(&["start", "api", "--port", "1"]).ok();
    let pid = managed.pid("api");
    // More than there will be room for, in small files and in a large one.
    let much = "mkdir /many && for n in 1 2 3 4 5 6 7 8 9; do head -c 300000 /dev/urandom >/many/$n; done; \
                head -c 4000000 /dev/urandom >/large; cat /many/* /large | md5sum >/sum";
    shell(&managed, "api", much);
    managed.run(&["snapshot", "api", "before"]).ok();
    let more = "head -c 300000 /dev/urandom >>/many/1; head -c 4000000 /dev/urandom >>/large; cat /many/* /large | md5sum >/sum";
    shell(&managed, "api", more);

    let kept = || {
        let store = home.state().join("store/v1");
        let mut kept = files(&store);
        kept.retain(|path| !path.strip_prefix(&store).unwrap().starts_with("leases"));
        kept.sort();
        kept
    };
    let before = kept();
    let filler = home.state().join("filler");
    for room in [0, 1 << 16, 1 << 20, 3 << 20] {
        let mut file = File::create(&filler).unwrap();
        for size in [1 << 20, 1 << 12] {
            while file.write_all(&vec![0; size]).is_ok() {}
        }
        let length = file.metadata().unwrap().len();
        file.set_len(length - room).unwrap();
        for tag in [&["after"][..], &["before", "--force"]] {
            managed
                .run(&[&["snapshot", "api"], tag].concat())
                .fails()
                .says(&["No space left on device"]);
        }
        assert_eq!(kept(), before, "with room for {room} bytes");
        assert_eq!(tags(&managed, "api"), ["before"]);
        assert_eq!(managed.pid("api"), pid, "it went on");
        assert_eq!(shell(&managed, "api", "echo here"), "here\n");
    }
    fs::remove_file(&filler).unwrap();

    let is_whole = "cat /many/* /large | md5sum | cmp - /sum && wc -c </large";
    assert_eq!(shell(&managed, "api", is_whole), "8000000\n");
    managed.run(&["snapshot", "api", "after"]).ok();
    managed.run(&["rollback", "api", "before"]).ok();
    assert_eq!(shell(&managed, "api", is_whole), "4000000\n");
    managed.run(&["rollback", "api", "after"]).ok();
    assert_eq!(shell(&managed, "api", is_whole), "8000000\n");
    run(&home, &["store", "verify", "--data"]);
    managed.run(&["remove", "-y", "api"]).ok();
    home.assert_nothing_left();
}
