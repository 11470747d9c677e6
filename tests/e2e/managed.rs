//! Managed workers, and a stand-in for the engine that drives `iii-worker` as the real one was seen
//! to.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, mount};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::engine::{Engine as Socket, free_port, holds_within};
use crate::harness::{
    Home, LIMIT, NODE_IMAGE, Project, debian_base, files, iii_worker, is_root, repository, skip,
};

/// How long the real engine may take to see that its file has changed.
const NOTICE: Duration = Duration::from_secs(4);

const STAY: &str = "echo started; exec sleep 1000";

/// A project of one of several kinds: those of one kind have the same steps and differ in their
/// files.
fn project(name: &str, kind: usize) -> Project {
    let project = Project::scripts(
        &format!("echo setup {kind} >/set-up"),
        &format!("cat deps.txt >/installed; echo {kind} >>/installed"),
        "cat /set-up /installed main.txt; echo x >>/runs; echo runs=$(wc -l </runs); env | grep III_; exec sleep 1000",
    );
    project.edit("iii.worker.yaml", "name: box", &format!("name: {name}"));
    project.write("deps.txt", &format!("deps {kind}\n"));
    project.write("main.txt", &format!("main of {name}\n"));
    project
}

/// A home with managed workers, and questions about them. Dropped, it stops them.
pub struct Managed<'a>(pub &'a Home);

impl Managed<'_> {
    pub fn run(&self, args: &[&str]) -> crate::harness::Ended {
        let args = [&["worker"][..], args].concat();
        self.0.start(&args).finish(LIMIT)
    }

    pub fn list(&self) -> BTreeMap<String, Value> {
        let ended = self.run(&["list", "--json"]).ok();
        let listed: Value = serde_json::from_str(&ended.stdout).unwrap();
        let workers = listed["workers"].as_array().unwrap().clone();
        let named = |worker: Value| (worker["name"].as_str().unwrap().to_owned(), worker);
        workers.into_iter().map(named).collect()
    }

    pub fn status(&self, name: &str) -> String {
        let all = self.list();
        let worker = all.get(name).map(|worker| worker["status"].clone());
        worker.map_or_else(
            || "unknown".to_owned(),
            |status| status.as_str().unwrap().to_owned(),
        )
    }

    fn pid_file(&self, name: &str) -> PathBuf {
        self.0.state().join("managed").join(name).join("vm.pid")
    }

    /// The pid of the worker, as the engine reads it.
    pub fn pid(&self, name: &str) -> Option<i32> {
        let text = fs::read_to_string(self.pid_file(name)).ok()?;
        Some(text.parse().unwrap())
    }

    /// Nothing is there but the workers that run, which are `count`.
    fn only(&self, count: usize) {
        let names = self.list().into_keys();
        let running: Vec<i32> = names.filter_map(|name| self.pid(&name)).collect();
        assert_eq!(running.len(), count);
        self.0.assert_only(&running);
        let tmp = self.0.state().join("store/v1/tmp");
        assert_eq!(files(&tmp), Vec::<PathBuf>::new());
    }

    pub fn log(&self, name: &str) -> String {
        let path = self.0.state().join("logs").join(name).join("worker.log");
        fs::read_to_string(path).unwrap_or_default()
    }

    pub fn says(&self, name: &str, needle: &str) {
        let said = holds_within(LIMIT, || self.log(name).contains(needle));
        assert!(said, "{name} never said {needle:?}\n{}", self.log(name));
    }

    pub fn config(&self) -> String {
        fs::read_to_string(self.0.path().join("config.yaml")).unwrap_or_default()
    }
}

impl Drop for Managed<'_> {
    fn drop(&mut self) {
        for entry in fs::read_dir(self.0.state().join("managed"))
            .into_iter()
            .flatten()
        {
            let name = entry.unwrap().file_name();
            if let Some(pid) = self.pid(name.to_str().unwrap()).and_then(Pid::from_raw) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
    }
}

/// Whether a process runs; a zombie does not.
fn alive(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.is_ok_and(|stat| !stat.contains(") Z "))
}

fn arg(project: &Project) -> &str {
    project.arg()
}

#[test]
fn what_is_said_of_its_sandbox_stays() {
    let home = Home::with_busybox();
    let managed = Managed(&home);
    let project = Project::scripts("true", "true", STAY);
    project.edit("iii.worker.yaml", "name: box", "name: api");
    let port = free_port().to_string();
    let sandbox = || -> Value {
        let orders = fs::read(home.state().join("managed/api/start.json")).unwrap();
        serde_json::from_slice::<Value>(&orders).unwrap()["sandbox"].clone()
    };
    let said = ["--allow-host-loopback", "5432", "--runtime", "namespace"];
    let add = ["add", arg(&project), "--port", &port];
    managed.run(&[&add[..], &said].concat()).ok();
    let wanted = json!({
        "runtime": "namespace",
        "host_loopback": {"all": false, "ports": [5432]},
    });
    assert_eq!(sandbox(), wanted);
    managed.run(&["start", "api", "--port", &port]).ok();
    assert_eq!(sandbox(), wanted);
    let all = ["restart", "api", "--allow-host-loopback", "all"];
    managed.run(&all).ok();
    assert_eq!(sandbox()["host_loopback"]["all"], true);
    managed.run(&["stop", "api"]).ok();
    managed
        .run(&["start", "api", "--allow-host-loopback", "0"])
        .exits(2);
}

#[test]
fn a_worker_from_add_to_remove() {
    let home = Home::with_busybox();
    let managed = Managed(&home);
    let project = project("api", 0);
    let port = free_port().to_string();
    managed
        .run(&["add", arg(&project), "--port", &port])
        .ok()
        .says(&["Worker api added to config.yaml", "no engine listens"]);
    assert_eq!(managed.status("api"), "stopped");
    managed
        .run(&["start", "api", "--port", &port])
        .ok()
        .says(&["✓ api started (pid: "]);
    let pid = managed.pid("api").unwrap();
    let mode = fs::metadata(managed.pid_file("api")).unwrap().permissions();
    assert_eq!(mode.mode() & 0o777, 0o600);
    let worker = managed.list().remove("api").unwrap();
    assert_eq!(worker["pid"], json!(pid));
    assert_eq!(worker["status"], "running");
    assert_eq!(
        worker["path"],
        json!(project.path().canonicalize().unwrap())
    );
    assert!(worker["since"].is_string());
    assert_eq!(worker["layers"].as_array().unwrap().len(), 4);
    managed.says("api", "runs=1");
    managed.says("api", &format!("III_URL=ws://localhost:{port}"));
    managed.says("api", "III_WORKER_NAME=api");
    managed.says("api", "III_ISOLATION=namespace");
    managed
        .run(&["start", "api"])
        .ok()
        .says(&["already running", &pid.to_string()]);
    managed
        .run(&["logs", "api"])
        .ok()
        .says(&["runs=1", "main of api"]);
    managed
        .run(&["restart", "api"])
        .ok()
        .says(&["api stopped", "api started"]);
    managed.says("api", "runs=2");
    // Where the engine is was not said again. Each run has it in two variables.
    let url = format!("ws://localhost:{port}\n");
    let four = || managed.log("api").matches(&url).count() == 4;
    assert!(holds_within(LIMIT, four), "{}", managed.log("api"));
    managed.run(&["stop", "api"]).ok().says(&["✓ api stopped"]);
    home.assert_nothing_left();
    assert!(!alive(pid));
    assert!(managed.pid("api").is_none());
    home.run(&["store", "df"])
        .ok()
        .says(&["managed worker api"]);
    managed
        .run(&["stop", "-y", "api"])
        .ok()
        .says(&["already stopped"]);

    // Its files are dropped, and its layers are not.
    managed.run(&["clear", "api"]).fails().says(&["-y"]);
    managed.run(&["clear", "-y", "api"]).ok();
    managed
        .run(&["start", "api"])
        .ok()
        .says(&["install  cached"]);
    managed.says("api", "runs=1");
    managed
        .run(&["remove", "api"])
        .fails()
        .says(&["api runs", "-y"]);
    assert_eq!(managed.status("api"), "running");
    managed
        .run(&["remove", "-y", "api"])
        .ok()
        .says(&["api removed from config.yaml"]);
    home.assert_nothing_left();
    assert!(!managed.config().contains("api"));
    for dir in ["managed", "logs"] {
        let dir = home.state().join(dir);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0, "{}", dir.display());
    }
    for args in [
        &["start", "api"][..],
        &["stop", "api"],
        &["status", "api"],
        &["remove", "api"],
        &["logs", "api"],
    ] {
        managed
            .run(args)
            .fails()
            .exits(1)
            .says(&["no worker called api"]);
    }
}

#[test]
fn streams_keep_their_order_in_the_log() {
    let home = Home::with_busybox();
    let managed = Managed(&home);
    let lines = "for i in 1 2 3 4 5 6 7 8; do echo out $i; echo err $i >&2; done; echo done";
    let project = Project::scripts("true", "true", lines);
    managed.run(&["add", arg(&project), "--port", "1"]).ok();
    managed.run(&["start", "box"]).ok();
    managed.says("box", "the start command ended");
    let expected: Vec<_> = (1..=8).map(|i| format!("out {i}\nerr {i}\n")).collect();
    assert!(
        managed.log("box").contains(&expected.concat()),
        "{}",
        managed.log("box")
    );
    assert_eq!(managed.status("box"), "stopped");
    let ended = managed.run(&["logs", "box", "-f", "-n", "2"]).ok();
    assert_eq!(ended.stdout.lines().count(), 2, "{}", ended.stdout);
}

#[test]
fn config_becomes_the_workers_environment() {
    let home = Home::with_busybox();
    let managed = Managed(&home);
    let project = project("api", 0);
    managed.run(&["add", arg(&project), "--port", "1"]).ok();
    let config = home.path().join("config.yaml");
    let text = format!(
        "# mine\n{}    config: {{iii_level: {{of: debug}}}} # kept\n",
        managed.config()
    );
    fs::write(&config, &text).unwrap();
    managed
        .run(&["add", arg(&project), "--port", "1"])
        .ok()
        .says(&["already in config.yaml"]);
    assert_eq!(managed.config(), text);
    managed.run(&["start", "api"]).ok();
    managed.says("api", "III_LEVEL_OF=debug");
    managed.run(&["add", "api", "--reset-config"]).exits(2);
    managed
        .run(&["add", "api", "--force", "--port", "1"])
        .ok()
        .says(&["--rebuild"]);
    assert_eq!(managed.config(), text);
    assert_eq!(managed.status("api"), "stopped");
    managed
        .run(&["add", "api", "--force", "--reset-config", "--port", "1"])
        .ok();
    assert!(!managed.config().contains("debug"), "{}", managed.config());
    assert!(managed.config().starts_with("# mine\n"));
}

#[test]
fn a_killed_supervisor_leaves_nothing_that_the_next_command_does_not_clean() {
    let home = Home::with_busybox();
    let managed = Managed(&home);
    let project = project("api", 0);
    managed.run(&["add", arg(&project), "--port", "1"]).ok();
    for runs in 1..=3 {
        managed.run(&["start", "api"]).ok();
        managed.says("api", &format!("runs={runs}"));
        let pid = managed.pid("api").unwrap();
        kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
        assert!(holds_within(LIMIT, || !alive(pid)));
        home.assert_nothing_left();
        assert!(managed.pid("api").is_some());
        match runs {
            // The next start, or the next query.
            1 => {}
            2 => assert_eq!(managed.status("api"), "stopped"),
            _ => drop(
                managed
                    .run(&["stop", "api"])
                    .ok()
                    .says(&["already stopped"]),
            ),
        }
        assert!(runs == 1 || managed.pid("api").is_none());
    }
    // A pid that is somebody's, but not a worker's.
    fs::write(managed.pid_file("api"), std::process::id().to_string()).unwrap();
    managed
        .run(&["stop", "api"])
        .ok()
        .says(&["already stopped"]);
    assert!(managed.pid("api").is_none());
    managed.run(&["remove", "api"]).ok();
    let store = home.state().join("store/v1");
    home.run(&["store", "gc", "--keep", "0s", "--grace", "0s"])
        .ok();
    assert_eq!(files(&store.join("leases")), Vec::<PathBuf>::new());
}

#[test]
fn a_killed_add_is_done_again() {
    let home = Home::with_busybox();
    let managed = Managed(&home);
    let project = Project::scripts("true", "echo installing; sleep 3", STAY);
    let mut add = home.start(&["worker", "add", project.arg(), "--port", "1"]);
    add.wait_for("installing");
    add.signal(Signal::KILL);
    add.finish(LIMIT);
    home.assert_nothing_left();
    assert_eq!(managed.config(), "");
    project.edit("iii.worker.yaml", "sleep 3", "sleep 0");
    managed.run(&["add", arg(&project), "--port", "1"]).ok();
    assert_eq!(managed.status("box"), "stopped");
}

#[test]
fn two_adds_at_once_lose_nothing() {
    let home = Home::with_busybox();
    let managed = Managed(&home);
    let projects: Vec<_> = (0..4).map(|n| project(&format!("box{n}"), n % 2)).collect();
    let adds: Vec<_> = projects
        .iter()
        .map(|project| home.start(&["worker", "add", project.arg(), "--port", "1"]))
        .collect();
    for add in adds {
        add.finish(LIMIT).ok();
    }
    let names: Vec<String> = managed.list().into_keys().collect();
    assert_eq!(names, ["box0", "box1", "box2", "box3"]);
    // The same worker, twice.
    let adds =
        [0, 1].map(|_| home.start(&["worker", "add", projects[0].arg(), "--force", "--port", "1"]));
    for add in adds {
        add.finish(LIMIT).ok();
    }
    assert_eq!(managed.list().len(), 4);
}

#[test]
fn one_that_fails_does_not_keep_the_others() {
    let home = Home::with_busybox();
    let managed = Managed(&home);
    let good = project("good", 0);
    let bad = [1, 2].map(|n| {
        let bad = Project::scripts("true", "echo no such thing; exit 7", STAY);
        bad.edit("iii.worker.yaml", "name: box", &format!("name: bad{n}"));
        bad
    });
    managed
        .run(&["add", bad[0].arg(), arg(&good), bad[1].arg(), "--port", "1"])
        .fails()
        .exits(1)
        .says(&[
            "Worker good added",
            "Worker bad1 was not added",
            "Worker bad2 was not added",
            "install failed: exit code 7",
            "no such thing",
        ]);
    let names: Vec<String> = managed.list().into_keys().collect();
    assert_eq!(names, ["good"]);
}

#[test]
fn bad_input_is_refused_with_nothing_changed() {
    let home = Home::with_busybox();
    let managed = Managed(&home);
    let (api, other) = (project("api", 0), project("api", 1));
    let (long, slash) = (project("api", 0), project("api", 0));
    long.edit("iii.worker.yaml", "api", &"x".repeat(300));
    slash.edit("iii.worker.yaml", "api", "a/b");
    let config = home.path().join("config.yaml");
    let entry = |name: &str, path: &str| format!("  - name: {name}\n    worker_path: {path}\n");
    let elsewhere = format!("workers:\n{}", entry("api", other.arg()));
    let twice = format!(
        "workers:\n{}{}",
        entry("api", api.arg()),
        entry("api", api.arg())
    );
    for (text, args, code, says) in [
        ("a: [", &[api.arg()][..], 1, "config.yaml:"),
        ("workers:\n\t- name: x", &[api.arg()], 1, "config.yaml:"),
        ("workers: 7", &[api.arg()], 1, "expected a list"),
        (&twice, &[api.arg()], 1, "two workers are called api"),
        (
            &elsewhere,
            &[api.arg()],
            1,
            "has a worker called api whose project is",
        ),
        (
            "workers:\n  - name: api\n",
            &[api.arg()],
            1,
            "not a local one",
        ),
        ("", &[api.arg(), other.arg()], 1, "would both be called api"),
        ("", &[long.arg()], 1, "longer than"),
        ("", &[slash.arg()], 1, "letters, digits"),
        ("", &["a/b"], 1, "letters, digits"),
        ("", &["nobody"], 1, "no worker called nobody"),
        ("", &["./nowhere"], 1, "no such directory"),
        ("", &[], 2, "required"),
        ("", &[api.arg(), "--reset-config"], 2, "--force"),
    ] {
        fs::write(&config, text).unwrap();
        let args = [&["add", "--port", "1"][..], args].concat();
        managed.run(&args).fails().exits(code).says(&[says]);
        assert_eq!(managed.config(), text, "{args:?}");
    }
    for name in ["a/b", "..", &"x".repeat(300)] {
        managed
            .run(&["start", name])
            .fails()
            .exits(1)
            .says(&["worker name"]);
    }
    assert!(!home.state().join("managed/api").exists());

    // A symlink is written through; a file that is read-only is not.
    let real = home.path().join("real.yaml");
    fs::remove_file(&config).unwrap();
    fs::write(&real, "").unwrap();
    symlink("real.yaml", &config).unwrap();
    managed.run(&["add", arg(&api), "--port", "1"]).ok();
    assert!(config.is_symlink() && fs::read_to_string(&real).unwrap().contains("api"));
    fs::set_permissions(&real, PermissionsExt::from_mode(0o444)).unwrap();
    let second = project("second", 0);
    managed
        .run(&["add", arg(&second), "--port", "1"])
        .fails()
        .says(&["config.yaml"]);
    managed
        .run(&["remove", "api"])
        .fails()
        .says(&["config.yaml"]);
    assert_eq!(managed.status("api"), "stopped");
}

#[test]
fn a_project_that_has_moved() {
    let home = Home::with_busybox();
    let managed = Managed(&home);
    let old = project("api", 0);
    managed.run(&["add", old.arg(), "--port", "1"]).ok();
    let new = Project::copy(old.path());
    drop(old);
    managed
        .run(&["start", "api"])
        .fails()
        .exits(1)
        .says(&["not at", "add it from its new path"]);
    managed.run(&["add", new.arg(), "--port", "1"]).ok();
    managed.run(&["start", "api"]).ok();
    managed.says("api", "main of api");
    assert!(managed.config().contains(new.arg()));
}

#[test]
fn a_start_that_fails_says_why() {
    let home = Home::with_busybox();
    let managed = Managed(&home);
    let project = project("api", 0);
    managed.run(&["add", project.arg(), "--port", "1"]).ok();
    project.edit("iii.worker.yaml", "cat deps.txt", "cat missing.txt");
    managed.run(&["start", "api"]).fails().exits(1).says(&[
        "install failed",
        "missing.txt",
        "api did not start",
    ]);
    assert_eq!(managed.status("api"), "stopped");
    managed.run(&["start", "api", "--no-wait"]).ok();
    managed.says("api", "error: install failed");
    assert!(holds_within(LIMIT, || managed.status("api") == "stopped"));
    home.assert_nothing_left();
}

#[test]
fn a_broken_config_does_not_keep_a_worker_from_being_stopped() {
    let home = Home::with_busybox();
    let managed = Managed(&home);
    let project = project("api", 0);
    managed.run(&["add", project.arg(), "--port", "1"]).ok();
    managed.run(&["start", "api"]).ok();
    fs::write(home.path().join("config.yaml"), "a: [").unwrap();
    managed
        .run(&["list"])
        .fails()
        .exits(1)
        .says(&["config.yaml:"]);
    managed
        .run(&["stop", "-y", "api"])
        .ok()
        .says(&["api stopped"]);
    managed
        .run(&["start", "api"])
        .fails()
        .exits(1)
        .says(&["config.yaml:"]);
    home.assert_nothing_left();
}

#[test]
fn a_full_disk() {
    if !is_root() {
        return skip(
            "workers on a full disk",
            "needs root to mount a small tmpfs",
        );
    }
    let home = Home::new();
    fs::create_dir(home.state()).unwrap();
    let size = Some(c"size=24m");
    mount("tmpfs", home.state(), "tmpfs", MountFlags::empty(), size).unwrap();
    home.import_busybox();
    let managed = Managed(&home);
    let (first, second) = (project("first", 0), project("second", 1));
    managed.run(&["add", first.arg(), "--port", "1"]).ok();
    let config = managed.config();
    let filler = home.state().join("filler");
    let fill = || {
        let mut file = File::create(&filler).unwrap();
        for size in [1 << 20, 1 << 10] {
            while file.write_all(&vec![0; size]).is_ok() {}
        }
    };
    fill();
    managed
        .run(&["add", second.arg(), "--port", "1"])
        .fails()
        .says(&["No space left on device"]);
    managed
        .run(&["start", "first"])
        .fails()
        .says(&["No space left on device"]);
    assert_eq!(managed.config(), config);
    home.assert_nothing_left();
    // One that runs goes on when its log has no room.
    fs::remove_file(&filler).unwrap();
    managed.run(&["start", "first"]).ok();
    fill();
    let pid = managed.pid("first").unwrap();
    managed.run(&["stop", "first"]).ok();
    assert!(!alive(pid));
    fs::remove_file(&filler).unwrap();
    managed.run(&["add", second.arg(), "--port", "1"]).ok();
    managed.run(&["start", "second"]).ok();
    managed.run(&["remove", "-y", "first", "second"]).ok();
    home.assert_nothing_left();
}

#[test]
fn init_makes_projects() {
    let home = Home::new();
    let managed = Managed(&home);
    for language in ["typescript", "javascript", "python", "rust"] {
        managed
            .run(&["init", language, "--language", language])
            .ok();
        let manifest = home.path().join(language).join("iii.worker.yaml");
        assert!(fs::read_to_string(manifest).unwrap().contains(language));
    }
    managed
        .run(&["init", "rust"])
        .fails()
        .exits(1)
        .says(&["already"]);
}

/// Time for downloads.
const INSTALL: Duration = Duration::from_secs(900);

/// Drives `iii-worker` as the real engine was seen to: starts the workers of its file, watches the
/// file, stops everything on SIGTERM. Its process is one that sleeps, so that it can be killed.
struct Engine<'a> {
    managed: &'a Managed<'a>,
    process: Child,
    port: u16,
    known: Vec<String>,
    started: Vec<Child>,
}

impl<'a> Engine<'a> {
    fn new(managed: &'a Managed<'a>, port: u16) -> Self {
        let process = Command::new("sleep").arg("1000").spawn().unwrap();
        let mut engine = Engine {
            managed,
            process,
            port,
            known: Vec::new(),
            started: Vec::new(),
        };
        engine.look();
        engine
    }

    fn command(&self, args: &[&str]) -> Command {
        let home = self.managed.0;
        let mut command = Command::new(iii_worker());
        let url = format!("ws://127.0.0.1:{}", self.port);
        command
            .args(args)
            .env("HOME", home.path())
            .env("III_GC", "off")
            .env("III_CONFIG_PATH", home.path().join("config.yaml"))
            .env("III_ENGINE_PID", self.process.id().to_string())
            .env("III_URL", &url)
            .env("III_ENGINE_URL", &url)
            .current_dir("/")
            .stdin(Stdio::null());
        command
    }

    /// Looks at the file once.
    fn look(&mut self) {
        let config = self.managed.config();
        let names: Vec<String> = config
            .lines()
            .filter_map(|line| line.trim().strip_prefix("- name: "))
            .map(str::to_owned)
            .collect();
        for name in names.iter().filter(|name| !self.known.contains(name)) {
            let logs = self.managed.0.state().join("logs").join(name);
            fs::create_dir_all(&logs).unwrap();
            let port = self.port.to_string();
            let child = self
                .command(&["start", name, "--port", &port, "--no-wait"])
                .stdout(File::create(logs.join("stdout.log")).unwrap())
                .stderr(File::create(logs.join("stderr.log")).unwrap())
                .spawn()
                .unwrap();
            self.started.push(child);
        }
        for name in self.known.iter().filter(|name| !names.contains(name)) {
            self.stop(name);
        }
        self.known = names;
        for mut child in std::mem::take(&mut self.started) {
            assert!(child.wait().unwrap().success());
        }
    }

    fn stop(&self, name: &str) {
        let status = self
            .command(&["stop", "-y", name])
            .stderr(Stdio::null())
            .status();
        // It is unknown where it was removed.
        assert!(matches!(status.unwrap().code(), Some(0 | 1)));
    }

    /// Ends the engine as SIGTERM does.
    fn end(mut self) {
        for name in &self.known {
            self.stop(name);
        }
        self.kill();
    }

    fn kill(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Drop for Engine<'_> {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Rolls ten workers back, forks each, and removes the forks. With the forks, twenty workers
/// run.
fn roll_back_and_fork(
    managed: &Managed<'_>,
    engine: &mut Engine<'_>,
    all_are: &dyn Fn(&str, usize),
) {
    for n in 10..20 {
        let (name, fork) = (format!("box{n}"), format!("fork{n}"));
        managed.says(&name, "runs=1");
        managed.run(&["snapshot", &name, "first"]).ok();
        managed.run(&["restart", &name]).ok();
        managed.says(&name, "runs=2");
        managed.run(&["fork", &name, &fork]).ok();
        managed.run(&["rollback", &name, "first"]).ok();
        let ran_twice = || managed.log(&name).matches("runs=2").count() == 2;
        assert!(holds_within(LIMIT, ran_twice), "{}", managed.log(&name));
    }
    engine.look();
    all_are("running", 30);
    for n in 10..20 {
        managed.says(&format!("fork{n}"), "runs=3");
    }
    managed.only(30);
    let forks: Vec<String> = (10..20).map(|n| format!("fork{n}")).collect();
    let mut args = vec!["remove", "-y"];
    args.extend(forks.iter().map(String::as_str));
    managed.run(&args).ok();
    engine.look();
    all_are("running", 20);
    managed.only(20);
}

#[test]
fn the_engine_drives_twenty_workers_of_five_kinds() {
    let home = Home::with_busybox();
    let managed = Managed(&home);
    let socket = Socket::start();
    let mut projects: Vec<_> = (0..20)
        .map(|n| project(&format!("box{n:02}"), n % 5))
        .collect();
    let mut engine = Engine::new(&managed, socket.port);
    let port = socket.port.to_string();
    let mut args = vec!["add", "--no-wait", "--port", &port];
    args.extend(projects.iter().map(Project::arg));
    let added = managed.run(&args).ok();
    // Of each kind one has built, and the others have found it.
    assert_eq!(
        added.stderr.matches("✓ install").count(),
        5,
        "{}",
        added.stderr
    );
    assert_eq!(
        added.stderr.matches("✓ setup").count(),
        5,
        "{}",
        added.stderr
    );
    home.assert_nothing_left();
    let all_are = |status: &str, count: usize| {
        let all_are = holds_within(LIMIT, || {
            let all = managed.list();
            all.len() == count && all.values().all(|worker| worker["status"] == status)
        });
        assert!(all_are, "{:#?}", managed.list());
    };
    all_are("stopped", 20);

    let begin = Instant::now();
    engine.look();
    all_are("running", 20);
    assert!(begin.elapsed() < Duration::from_secs(30) + NOTICE);
    for n in 0..20 {
        let name = format!("box{n:02}");
        managed.says(&name, &format!("main of {name}"));
        managed.says(&name, &format!("III_ENGINE_URL=ws://127.0.0.1:{port}"));
        assert!(alive(managed.pid(&name).unwrap()));
    }

    managed.only(20);

    // An edit of the source, and one of a file that install looked at.
    projects[0].write("main.txt", "main of box00, edited\n");
    projects[1].write("deps.txt", "deps, edited\n");
    managed
        .run(&["restart", "box00"])
        .ok()
        .says(&["install  cached"]);
    managed.says("box00", "edited");
    managed
        .run(&["restart", "box01"])
        .ok()
        .says(&["deps.txt changed"]);
    managed.says("box01", "deps, edited");
    managed.only(20);

    roll_back_and_fork(&managed, &mut engine, &all_are);

    // Removed by hand, and by us.
    let config = home.path().join("config.yaml");
    let text = managed.config();
    let at = text.find("  - name: box02\n").unwrap();
    let end = text.find("  - name: box03\n").unwrap();
    fs::write(&config, [&text[..at], &text[end..]].concat()).unwrap();
    engine.look();
    assert_eq!(managed.status("box02"), "stopped");
    managed.run(&["remove", "-y", "box02", "box03"]).ok();
    engine.look();
    assert_eq!(managed.list().len(), 18);
    all_are("running", 18);
    managed.only(18);

    engine.end();
    all_are("stopped", 18);
    home.assert_nothing_left();
    projects.truncate(0);
    let names: Vec<String> = managed.list().into_keys().collect();
    let mut args = vec!["remove"];
    args.extend(names.iter().map(String::as_str));
    managed.run(&args).ok();
    home.assert_nothing_left();
    assert_eq!(files(&home.state().join("managed")), Vec::<PathBuf>::new());
    // Nothing of any worker keeps anything.
    home.run(&["store", "gc", "--keep", "0s", "--grace", "0s"])
        .ok();
    for dir in [
        "leases",
        "tmp",
        "refs/managed",
        "refs/snapshot",
        "refs/volume",
        "locks",
    ] {
        let left = files(&home.state().join("store/v1").join(dir));
        assert!(left.is_empty(), "{left:?}");
    }
}

#[test]
fn workers_end_with_their_engine() {
    let home = Home::with_busybox();
    let managed = Managed(&home);
    let running = project("running", 0);
    let starting = Project::scripts("true", "echo installing; sleep 1000", STAY);
    managed.run(&["add", running.arg(), "--port", "1"]).ok();
    let mut engine = Engine::new(&managed, 1);
    managed.says("running", "runs=1");
    // One that is about to start, whose install has not been run.
    fs::write(
        home.path().join("config.yaml"),
        format!(
            "{}  - name: starting\n    worker_path: {}\n",
            managed.config(),
            starting.arg()
        ),
    )
    .unwrap();
    engine.look();
    managed.says("starting", "installing");
    assert_eq!(managed.status("starting"), "starting");
    engine.kill();
    assert!(holds_within(LIMIT, || {
        ["running", "starting"]
            .iter()
            .all(|name| managed.status(name) == "stopped")
    }));
    home.assert_nothing_left();
    // Its pid is nobody's now, or somebody's who did not start this.
    let mut start = engine.command(&["start", "running"]);
    let ended = start.stderr(Stdio::piped()).output().unwrap();
    assert_eq!(ended.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&ended.stderr).contains("III_ENGINE_PID"));
    home.assert_nothing_left();
}

#[test]
fn the_manager_daemon_lives_as_long_as_its_lifeline() {
    use std::os::fd::AsRawFd as _;
    let (reader, writer) = std::io::pipe().unwrap();
    let inherited = rustix::io::dup(&reader).unwrap();
    let mut daemon = Command::new(iii_worker())
        .arg("worker-manager-daemon")
        .env("III_LIFELINE_FD", inherited.as_raw_fd().to_string())
        .spawn()
        .unwrap();
    drop((inherited, reader));
    assert!(!holds_within(Duration::from_millis(300), || daemon
        .try_wait()
        .unwrap()
        .is_some()));
    drop(writer);
    assert!(holds_within(LIMIT, || daemon.try_wait().unwrap().is_some()));
    assert!(daemon.wait().unwrap().success());
    let status = Command::new(iii_worker())
        .arg("worker-manager-daemon")
        .env("III_LIFELINE_FD", "77")
        .stderr(Stdio::null())
        .status();
    assert_eq!(status.unwrap().code(), Some(1));
}

/// The example with the real SDK, added, started by the engine, called, edited and removed.
#[test]
fn a_real_worker_answers_the_engine() {
    let base = match debian_base("node") {
        Ok(base) => base,
        Err(why) => return skip("a managed TypeScript worker", &why),
    };
    let home = Home::new();
    let import = [
        "image",
        "import",
        base.to_str().unwrap(),
        "--as",
        NODE_IMAGE,
    ];
    home.run_within(&import, Duration::from_secs(300)).ok();
    let managed = Managed(&home);
    let socket = Socket::start();
    let project = Project::copy(&repository("examples/typescript"));
    let port = socket.port.to_string();
    let add = ["worker", "add", "--no-wait", project.arg(), "--port", &port];
    home.start(&add).finish(INSTALL).ok();
    let mut engine = Engine::new(&managed, socket.port);
    let greeting = || {
        socket.wait_for("hello::typescript", LIMIT);
        let reply = socket.invoke("hello::typescript", &json!({ "name": "test" }));
        reply["result"]["message"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    };
    assert!(greeting().starts_with("Hello, test"));
    project.edit("src/index.ts", "Hello", "Howdy");
    managed
        .run(&["restart", "hello-typescript"])
        .ok()
        .says(&["install  cached"]);
    assert!(holds_within(LIMIT, || greeting().starts_with("Howdy")));
    managed.run(&["remove", "-y", "hello-typescript"]).ok();
    engine.look();
    socket.wait_gone("hello::typescript", LIMIT);
    home.assert_nothing_left();

    // A project of `init` is a worker without any edit.
    managed
        .run(&["init", "fresh", "--language", "javascript"])
        .ok();
    let add = ["worker", "add", "--no-wait", "./fresh", "--port", &port];
    home.start(&add)
        .finish(INSTALL)
        .ok()
        .says(&["Worker fresh added"]);
    engine.look();
    socket.wait_for("hello::javascript", LIMIT);
    let reply = socket.invoke("hello::javascript", &json!({ "name": "test" }));
    assert_eq!(reply["result"]["message"], "Hello, test, from JavaScript!");
    engine.end();
    home.assert_nothing_left();
}

#[test]
fn one_that_is_watched_follows_its_project() {
    let home = Home::with_busybox();
    let managed = Managed(&home);
    let project = project("api", 0);
    let is_watched = || {
        let text = fs::read_to_string(home.state().join("managed/api/start.json")).unwrap();
        serde_json::from_str::<Value>(&text).unwrap()["watch"] == json!(true)
    };
    let run = |args: &[&str]| managed.run(args).ok();
    run(&["add", arg(&project), "--watch", "--port", "1"]);
    run(&["start", "api"]);
    managed.says("api", "runs=1");
    let pid = managed.pid("api").unwrap();
    project.write("main.txt", "edited once\n");
    managed.says("api", "edited once");
    managed.says("api", "reloaded: 1 file changed");
    // Its layers are others, and it is not.
    project.write("deps.txt", "more deps\n");
    managed.says("api", "more deps");
    managed.says("api", "runs=3");
    assert_eq!(managed.pid("api"), Some(pid));
    let worker = managed.list().remove("api").unwrap();
    assert_eq!(worker["status"], "running");
    assert_eq!(worker["layers"].as_array().unwrap().len(), 4);

    // It is remembered until it is taken back.
    run(&["restart", "api"]);
    managed.says("api", "runs=4");
    project.write("main.txt", "edited twice\n");
    managed.says("api", "edited twice");
    // A worker that ends after a reload has ended.
    project.edit("iii.worker.yaml", "exec sleep 1000", "exit 7");
    managed.says("api", "the start command ended: exit code 7");
    assert!(holds_within(LIMIT, || managed.status("api") == "stopped"));
    assert!(is_watched());
    project.edit("iii.worker.yaml", "exit 7", "exec sleep 1000");
    run(&["start", "api", "--no-watch"]);
    assert!(!is_watched());
    run(&["restart", "api"]);
    assert!(!is_watched());
    run(&["remove", "-y", "api"]);
    home.assert_nothing_left();
}

/// A link, a link to that, and a copy in a directory of its own are all `iii worker`.
#[test]
fn the_name_makes_the_program_iii_worker() {
    let dir = tempfile::tempdir().unwrap();
    let program = Path::new(env!("CARGO_BIN_EXE_iii"));
    let links = ["linked", "again", "copied"].map(|name| {
        fs::create_dir(dir.path().join(name)).unwrap();
        dir.path().join(name).join("iii-worker")
    });
    symlink(program, &links[0]).unwrap();
    symlink(&links[0], &links[1]).unwrap();
    fs::copy(program, &links[2]).unwrap();
    for (program, usage) in links
        .iter()
        .map(|link| (link.as_path(), "Usage: iii-worker <COMMAND>"))
        .chain([(program, "Usage: iii <COMMAND>")])
    {
        let help = Command::new(program).arg("--help").output().unwrap();
        let help = String::from_utf8(help.stdout).unwrap();
        assert!(help.contains(usage), "{}: {help}", program.display());
    }
}
