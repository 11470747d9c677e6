//! Live reload: a worker follows its project while it runs.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::Command;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::engine::holds_within;
use crate::harness::{Home, LIMIT, Project, Running, files, gcc, is_root, skip};

/// Prints its input, the number of its starts, and its mount.
const LOOK: &str = "echo x >>/runs; echo run $(wc -l </runs): $(cat main.txt); exec sleep 1000";

/// Says so again and again.
const TICK: &str =
    "echo run $(cat main.txt) on $(cat /installed); while :; do echo tick; sleep 0.05; done";

/// Takes what `deps.txt` says, which may be an exit code.
const INSTALL: &str = ". ./deps.txt; echo $DEPS >/installed";

/// The same, but slowly from the second time on.
const SLOW: &str = ". ./deps.txt; [ $DEPS = 1 ] || sleep 2; echo $DEPS >/installed";

fn project(install: &str, start: &str) -> Project {
    let project = Project::scripts("true", install, start);
    project.write("main.txt", "main 1\n");
    project.write("deps.txt", "DEPS=1\n");
    project
}

/// The inotify instances of a process.
fn watches(dev: &Running<'_>) -> usize {
    let fds = fs::read_dir(format!("/proc/{}/fd", dev.pid())).unwrap();
    let links = fds.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok());
    links
        .filter(|link| link.to_string_lossy().contains("inotify"))
        .count()
}

fn count(dev: &Running<'_>, needle: &str) -> usize {
    dev.says_so_far()
        .filter(|line| line.contains(needle))
        .count()
}

#[test]
fn an_edit_shows_where_the_worker_runs() {
    let home = Home::with_busybox();
    let script = "echo own >>own.txt; echo mount $(grep ' / / ' /proc/self/mountinfo | cut -d' ' -f1,3) $(cut -d' ' -f22 /proc/1/stat); \
                  ls; wc -l own.txt; cat /root/kept || true; echo kept >/root/kept; echo env=$COLOUR; echo sees $(cat main.txt); exec sleep 1000";
    let project = project("true", script);
    project.write("doomed/file.txt", "");
    let mut dev = home.dev(&project, &["--name", "box"]);
    let sandbox = dev.wait_for("mount ");
    dev.wait_for("doomed");
    dev.wait_for("1 own.txt");
    dev.wait_for("sees main 1");

    fs::remove_dir_all(project.path().join("doomed")).unwrap();
    project.write("new/file.txt", "");
    project.write("main.txt", "main 2\n");
    // The first edit may be taken before the rest.
    while dev.wait_for("sees main") != "sees main 2" {}
    let seen: Vec<_> = dev.says_so_far().map(str::to_owned).collect();
    let last = seen
        .iter()
        .rposition(|line| line.starts_with("mount "))
        .unwrap();
    assert_eq!(seen[last], sandbox, "another sandbox");
    let seen = &seen[last..];
    assert!(!seen.contains(&"doomed".into()), "{seen:#?}");
    for line in ["new", "kept", "env="] {
        assert!(seen.contains(&line.to_owned()), "{line}: {seen:#?}");
    }

    // The manifest is the project's, too.
    project.edit(
        "iii.worker.yaml",
        "scripts:",
        "env:\n  COLOUR: red\nscripts:",
    );
    assert_eq!(dev.wait_for("mount "), sandbox);
    dev.wait_for("env=red");
    let ended = home
        .start(&["worker", "exec", "box", "--", "env"])
        .finish(LIMIT);
    ended.ok().says(&["COLOUR=red"]);
    dev.stop();

    // An image is made of the layers that it ran on last, and the next start has them all.
    let to = home.path().join("image");
    let oci = format!("oci:{}", to.display());
    home.run(&[
        "worker",
        "export",
        "box",
        "--to",
        &oci,
        "--compression",
        "none",
    ])
    .ok();
    let blobs = files(&to).into_iter().map(|blob| fs::read(blob).unwrap());
    assert!(
        blobs
            .into_iter()
            .any(|blob| blob.windows(7).any(|text| text == b"main 2\n"))
    );
    let mut dev = home.dev(&project, &["--name", "box", "--no-watch"]);
    dev.wait_for("kept");
    dev.wait_for("sees main 2");
    dev.stop();
}

/// A layer of the project that differs from the last in its times alone changes nothing that the
/// upper has of that.
#[test]
fn what_the_upper_stands_on_is_kept() {
    let home = Home::with_busybox();
    let look = "echo x >>/runs; echo run $(wc -l </runs): $(cat main.txt) $LEVEL; exec sleep 1000";
    let project = project("true", look);
    let config = home.path().join("config.yaml");
    let mut dev = home.dev(&project, &["--name", "box"]);
    dev.wait_for("run 1: main 1");
    project.write("main.txt", "main 2\n");
    dev.wait_for("run 2: main 2");
    for level in 1..=3 {
        let path = project.arg();
        let entry =
            format!("  - name: box\n    worker_path: {path}\n    config:\n      level: {level}\n");
        fs::write(&config, format!("workers:\n{entry}")).unwrap();
        project.write("main.txt", "main 2\n");
        dev.wait_for(&format!("run {}: main 2 {level}", 2 + level));
    }
    dev.stop();
    home.run(&["store", "gc", "--keep", "0s", "--grace", "0s"])
        .ok();
    let mut dev = home.dev(&project, &["--name", "box"]);
    dev.wait_for("run 6: main 2 3");
    dev.stop();
}

#[test]
fn a_burst_is_one_restart_and_nothing_is_none() {
    let home = Home::with_busybox();
    let project = project("true", LOOK);
    project.write("src/same.txt", "same\n");
    fs::create_dir(project.path().join(".git")).unwrap();
    let mut dev = home.dev(&project, &[]);
    dev.wait_for("run 1: main 1");

    // No change in the end. The lock holds off a look in the middle, which would find one.
    let main = project.path().join("main.txt");
    let lock = project.path().join(".git/index.lock");
    fs::write(&lock, "").unwrap();
    project.write("main.txt", "main 1\n");
    fs::File::open(&main)
        .unwrap()
        .set_modified(std::time::SystemTime::UNIX_EPOCH)
        .unwrap();
    project.write(".main.txt.swp", "main 1\n");
    fs::rename(project.path().join(".main.txt.swp"), &main).unwrap();
    project.write("node_modules/left-out.txt", "");
    fs::remove_file(&lock).unwrap();

    // A checkout of another branch, with what editors do besides.
    fs::write(&lock, "").unwrap();
    for n in 0..2000 {
        project.write(&format!("src/{}/{n}.txt", n / 100), "new\n");
    }
    fs::remove_file(project.path().join("src/same.txt")).unwrap();
    symlink("0/1.txt", project.path().join("src/same.txt")).unwrap();
    project.write("main.txt~", "main 1\n");
    project.write(".main.txt.swp", "main 2\n");
    fs::rename(project.path().join(".main.txt.swp"), &main).unwrap();
    fs::remove_file(project.path().join("main.txt~")).unwrap();
    fs::remove_file(&lock).unwrap();
    dev.wait_for_each(&["run 2: main 2", "reloaded: 2,002 files changed, "]);

    // A restart too many would be counted.
    project.write("main.txt", "main 3\n");
    dev.wait_for("run 3: main 3");
    dev.stop();
}

#[test]
fn who_has_a_file_open_goes_on_with_what_it_has() {
    let home = Home::with_busybox();
    let script = "exec 3<main.txt; head -c 4 <&3; trap 'echo; echo had $(cat <&3); exit' TERM; echo; echo sees $(cat main.txt); \
                  while :; do sleep 0.05; done";
    let project = project("true", script);
    let mut dev = home.dev(&project, &[]);
    for turn in 2..5 {
        dev.wait_for(&format!("sees main {}", turn - 1));
        project.write("main.txt", &format!("main {turn}\n"));
        dev.wait_for(&format!("had {}", turn - 1));
    }
    dev.wait_for("sees main 4");
    dev.stop();
}

/// Maps a file, looks at its first page, and at its first and last when it is to end: the one is in
/// memory, the other is not.
const MAPPER: &str = r#"
        #include <fcntl.h>
        #include <signal.h>
        #include <stdio.h>
        #include <sys/mman.h>
        #include <sys/stat.h>
        #include <unistd.h>
        static volatile sig_atomic_t over;
        static void end(int signal) { over = signal; }
        int main(void) {
            struct stat is;
            int file = open("data", O_RDONLY);
            if (file < 0 || fstat(file, &is)) return 1;
            const volatile char *data = mmap(0, is.st_size, PROT_READ, MAP_SHARED, file, 0);
            if (data == MAP_FAILED) return 2;
            close(file);
            madvise((void *)data, is.st_size, MADV_RANDOM);
            sigset_t term, none;
            sigemptyset(&none);
            sigemptyset(&term);
            sigaddset(&term, SIGTERM);
            sigprocmask(SIG_BLOCK, &term, 0);
            signal(SIGTERM, end);
            printf("sees %c\n", data[0]);
            fflush(stdout);
            while (!over) sigsuspend(&none);
            printf("had %c and %c\n", data[0], data[is.st_size - 1]);
        }
"#;

#[test]
fn who_has_a_file_mapped_goes_on_with_its_pages() {
    let home = Home::with_busybox();
    let project = project("true", "exec ./mapper");
    gcc("-static", MAPPER, &project.path().join("mapper"));
    // The next one is shorter, or has no page where the last had its last.
    let data = |turn: u8| char::from(b'0' + turn).to_string();
    let sizes = [4 << 20, 5000, 0, 9 << 20].map(|size| size + 1);
    project.write("data", &data(0).repeat(sizes[0]));
    let mut dev = home.dev(&project, &[]);
    for (turn, size) in (1..).zip(&sizes[1..]) {
        let last = data(turn - 1);
        dev.wait_for(&format!("sees {last}"));
        project.write("data", &data(turn).repeat(*size));
        dev.wait_for(&format!("had {last} and {last}"));
    }
    dev.wait_for("sees 3");
    dev.stop();
}

#[test]
fn install_runs_beside_the_worker_and_takes_its_place() {
    let home = Home::with_busybox();
    let project = project(SLOW, TICK);
    let mut dev = home.dev(&project, &[]);
    dev.wait_for("run main 1 on 1");
    project.write("deps.txt", "DEPS=2\n");
    dev.wait_for("install: running");
    for _ in 0..3 {
        dev.wait_for("tick");
    }
    // However much changes meanwhile, it is taken in by one more.
    for n in 0..3 {
        project.write("main.txt", &format!("meanwhile {n}\n"));
    }
    // The first run may be ended before it prints anything.
    loop {
        let line = dev.wait_for("run ");
        assert!(line.ends_with(" on 2"), "{line}");
        if line == "run meanwhile 2 on 2" {
            break;
        }
    }
    project.write("main.txt", "main 3\n");
    dev.wait_for("run main 3 on 2");
    assert!(count(&dev, " on 2") <= 3, "too many restarts");
    let ended = dev.stop();
    assert_eq!(
        ended.stderr.matches("install: running").count(),
        2,
        "{}",
        ended.stderr
    );
}

#[test]
fn what_fails_leaves_the_worker_as_it_is() {
    let home = Home::with_busybox();
    let project = project(INSTALL, TICK);
    let mut dev = home.dev(&project, &[]);
    dev.wait_for("run main 1 on 1");

    project.write("deps.txt", "echo no such package; exit 3\n");
    dev.wait_for("no such package");
    let line = dev.wait_for("not reloaded: ");
    assert!(line.contains("install failed: exit code 3"), "{line}");
    dev.wait_for("tick");
    // The next change tries again.
    project.write("main.txt", "main 2\n");
    dev.wait_for("not reloaded: ");
    dev.wait_for("tick");
    project.write("deps.txt", "DEPS=2\n");
    dev.wait_for("run main 2 on 2");

    let manifest = project.path().join("iii.worker.yaml");
    let text = fs::read_to_string(&manifest).unwrap();
    project.write("iii.worker.yaml", "name: [\n");
    let line = dev.wait_for("not reloaded: ");
    assert!(line.contains("iii.worker.yaml"), "{line}");
    dev.wait_for("tick");
    project.write("iii.worker.yaml", &text);
    project.write("main.txt", "main 3\n");
    dev.wait_for("run main 3 on 2");
    dev.stop();
}

#[test]
fn a_worker_that_crashes_after_a_reload_waits_for_the_next() {
    let home = Home::with_busybox();
    let project = project("true", "cat main.txt; . ./deps.txt; exec sleep 1000");
    let mut dev = home.dev(&project, &[]);
    dev.wait_for("main 1");
    project.write("deps.txt", "echo bug; exit 7\n");
    let ended = "the start command ended: exit code 7";
    dev.wait_for_each(&["bug", ended]);
    for turn in 2..4 {
        project.write("main.txt", &format!("main {turn}\n"));
        dev.wait_for_each(&[&format!("main {turn}"), "bug", ended]);
    }
    project.write("deps.txt", "echo fixed\n");
    dev.wait_for("fixed");
    project.write("deps.txt", "exit 8\n");
    dev.wait_for("the start command ended: exit code 8");
    // Nothing runs, and Ctrl-C ends it all the same.
    dev.stop();
}

#[test]
fn a_worker_that_ends_before_any_reload_ends_the_run() {
    let home = Home::with_busybox();
    let project = project("true", "echo once; exit 7");
    home.run(&["worker", "dev", project.arg()]).exits(7);
}

#[test]
fn ctrl_c_ends_a_reload() {
    let home = Home::with_busybox();
    let project = project(SLOW, TICK);
    let mut dev = home.dev(&project, &[]);
    dev.wait_for("run main 1 on 1");
    project.write("deps.txt", "DEPS=2\n");
    dev.wait_for("install: running");
    dev.stop();
    let layers = home.build(&project, &[]);
    assert!(layers.built().starts_with("install"), "{layers:#?}");
}

#[test]
fn nothing_is_followed_that_is_not_to_be() {
    let home = Home::with_busybox();
    let project = project("true", LOOK);
    let mut dev = home.dev(&project, &["--no-watch"]);
    dev.wait_for("run 1: main 1");
    assert_eq!(watches(&dev), 0);
    dev.stop();
    let mut dev = home.dev(&project, &[]);
    dev.wait_for("run 2: main 1");
    assert!(holds_within(LIMIT, || watches(&dev) == 1));
    // No signal is needed for the end; the same happens if the tool is killed.
    dev.signal(Signal::KILL);
    dev.finish(LIMIT);
    home.assert_nothing_left();
}

#[test]
fn what_cannot_be_watched_is_said() {
    let few = "echo 1 >/proc/sys/user/max_inotify_watches && exec \"$@\"";
    let program = [
        "unshare",
        "-U",
        "--map-root-user",
        "sh",
        "-c",
        few,
        "sh",
        env!("CARGO_BIN_EXE_iii"),
    ];
    let tried = Command::new(program[0])
        .args(&program[1..])
        .arg("--version")
        .output();
    if !is_root() || !tried.is_ok_and(|tried| tried.status.success()) {
        skip("few watches", "there is no user namespace to have few in");
        return;
    }
    let home = Home::through(
        TempDir::with_prefix("home-").unwrap(),
        program.map(PathBuf::from).to_vec(),
    );
    home.import_busybox();
    let project = project("true", LOOK);
    project.write("src/file.txt", "");
    let mut dev = home.dev(&project, &[]);
    dev.wait_for_each(&[
        "run 1: main 1",
        "changes of the project do not reload the worker: watching",
    ]);
    let ended = dev.stop();
    assert!(
        ended.stderr.contains("sysctl fs.inotify.max_user_watches"),
        "{}",
        ended.stderr
    );
}
