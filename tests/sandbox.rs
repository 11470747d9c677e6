//! The namespace runtime, run for real. Needs user namespaces and Debian's `busybox-static`.
//!
//! As root, the tests of ordinary users open `/dev/fuse` to all (as distributions other than the
//! barest do) and add an account for their duration; as another user, they are skipped.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Permissions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, lchown, symlink};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio as Streams};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, UNIX_EPOCH};

use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo, LockOwner, OpenFlags,
    ReplyAttr, ReplyData, ReplyDirectory, ReplyEntry, Request, Session, SessionACL,
};
use iii_sandbox::{
    BindMount, CA_BUNDLE, Command as SandboxCommand, Controller, FuseServer, HostSettings,
    RootSource, Sandbox, SandboxError, SandboxSpec, Stdio, Step, Warning, probe,
};
use rustix::process::Signal;
use tempfile::TempDir;

const BUSYBOX: &str = "/bin/busybox";
const APPLETS: [&str; 21] = [
    "cat", "chown", "env", "grep", "hostname", "id", "kill", "ls", "mkdir", "mount", "mv", "ps",
    "pwd", "readlink", "setsid", "sh", "sleep", "stat", "touch", "tr", "true",
];
const FUSE_DEVICE: &str = "/dev/fuse";

const GRACE: Duration = Duration::from_secs(10);
/// For what is bound to happen; a machine that needs longer has stopped.
const PATIENCE: Duration = Duration::from_secs(60);

/// Set for a process that is to play a part in another's test.
const PART: &str = "III_SANDBOX_TEST_PART";
/// The init, for a process that cannot reach the build directory.
const INIT: &str = "III_SANDBOX_TEST_INIT";

fn init() -> PathBuf {
    let default = || env!("CARGO_BIN_EXE_iii").into();
    std::env::var_os(INIT).map_or_else(default, PathBuf::from)
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn skipped(what: &str, why: &str) {
    eprintln!("SKIPPED: {what}: {why}");
}

/// Whether ids other than root's exist inside.
fn many_ids(what: &str) -> bool {
    let warnings = probe(&init()).warnings;
    let Some(warning) = warnings.first() else {
        return true;
    };
    skipped(what, &warning.to_string());
    false
}

/// The host's ids of the sandbox's root.
fn root_ids() -> (u32, u32) {
    static IDS: OnceLock<(u32, u32)> = OnceLock::new();
    *IDS.get_or_init(|| probe(&init()).root_ids)
}

fn own(path: &Path) {
    if is_root() {
        let (uid, gid) = root_ids();
        lchown(path, Some(uid), Some(gid)).expect("chown");
    }
}

/// A root filesystem with busybox in it, owned by the sandbox's root.
struct Root(TempDir);

impl Root {
    fn new() -> Self {
        let root = Self(TempDir::with_prefix("iii-sandbox-").expect("tempdir"));
        own(root.0.path());
        for name in [
            "bin",
            "dev",
            "etc",
            "proc",
            "run",
            "sys",
            "tmp",
            "workspace",
        ] {
            root.directory(name);
        }
        fs::copy(BUSYBOX, root.path("bin/busybox")).expect("busybox-static is installed");
        for applet in APPLETS {
            symlink("busybox", root.path("bin").join(applet)).expect("symlink");
        }
        root.write(
            "etc/passwd",
            "root:x:0:0::/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\n",
        );
        root.write("etc/group", "root:x:0:\napp:x:1001:\naudio:x:29:app\n");
        root
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn directory(&self, name: &str) {
        fs::create_dir(self.path(name)).expect("mkdir");
        own(&self.path(name));
    }

    fn write(&self, name: &str, contents: &str) {
        fs::write(self.path(name), contents).expect("write");
        own(&self.path(name));
    }

    fn symlink(&self, target: impl AsRef<Path>, name: &str) {
        symlink(target, self.path(name)).expect("symlink");
    }

    fn spec<S: AsRef<OsStr>>(&self, argv: impl IntoIterator<Item = S>) -> SandboxSpec {
        spec_on(RootSource::Dir(self.0.path().to_owned()), argv)
    }

    fn shell(&self, script: &str) -> SandboxSpec {
        self.spec(["sh", "-c", script])
    }

    /// The output of a script that has to succeed.
    fn output(&self, script: &str) -> String {
        let outcome = run(self.shell(script));
        assert!(outcome.status.success(), "{script}: {outcome:?}");
        outcome.stdout
    }
}

fn spec_on<S: AsRef<OsStr>>(root: RootSource, argv: impl IntoIterator<Item = S>) -> SandboxSpec {
    let argv = argv
        .into_iter()
        .map(|argument| argument.as_ref().to_owned());
    let mut spec = SandboxSpec::new(
        root,
        argv,
        HostSettings::detect(|name| std::env::var_os(name)),
    );
    spec.init = init();
    spec.env = vec![("PATH".into(), "/bin".into())];
    spec.stdio = Stdio::Piped;
    spec.host = HostSettings::default();
    spec
}

/// The result of a sandbox.
#[derive(Debug)]
struct Outcome {
    status: ExitStatus,
    stdout: String,
    stderr: String,
}

fn read_all(mut pipe: impl io::Read) -> String {
    let mut bytes = Vec::new();
    pipe.read_to_end(&mut bytes).expect("read");
    String::from_utf8_lossy(&bytes).into_owned()
}

fn start(spec: SandboxSpec) -> Sandbox {
    Sandbox::start(spec).unwrap_or_else(|error| {
        let source = std::error::Error::source(&error);
        panic!("{error}: {source:?}; {:?}", error.hint())
    })
}

fn refused(spec: SandboxSpec) -> SandboxError {
    match Sandbox::start(spec) {
        Ok(_) => panic!("it started"),
        Err(error) => error,
    }
}

fn finish(mut sandbox: Sandbox) -> Outcome {
    let stdout = sandbox.stdout.take().expect("piped");
    let stderr = sandbox.stderr.take().expect("piped");
    let stderr = std::thread::spawn(|| read_all(stderr));
    let stdout = read_all(stdout);
    let stderr = stderr.join().expect("thread");
    let status = sandbox.wait().expect("wait");
    Outcome {
        status,
        stdout,
        stderr,
    }
}

fn run(spec: SandboxSpec) -> Outcome {
    finish(start(spec))
}

/// The next line that the command writes, byte by byte so that the rest stays in the pipe.
fn next_line(sandbox: &mut Sandbox) -> String {
    let stdout = sandbox.stdout.as_mut().expect("piped");
    let mut line = Vec::new();
    let mut byte = [0];
    while stdout.read(&mut byte).expect("read") == 1 && byte != *b"\n" {
        line.push(byte[0]);
    }
    String::from_utf8(line).expect("utf-8")
}

fn eventually(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "still not so: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Something to tell one test's processes by.
fn mark() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let next = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("mark-{}-{next}-", std::process::id())
}

/// Host pids of the processes whose command line contains `mark`, zombies left out.
fn processes(mark: &str) -> Vec<u32> {
    let entries = fs::read_dir("/proc")
        .expect("readdir")
        .filter_map(Result::ok);
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.windows(mark.len())
                .any(|window| window == mark.as_bytes())
        })
        .collect()
}

#[test]
fn the_commands_end_is_passed_on() {
    let root = Root::new();
    for (script, code, signal) in [
        ("exit 0", Some(0), None),
        ("exit 3", Some(3), None),
        ("exit 255", Some(255), None),
        ("kill -TERM $$", None, Some(libc::SIGTERM)),
        ("kill -KILL $$", None, Some(libc::SIGKILL)),
        ("kill -SEGV $$", None, Some(libc::SIGSEGV)),
    ] {
        let status = run(root.shell(script)).status;
        assert_eq!((status.code(), status.signal()), (code, signal), "{script}");
    }
}

#[test]
fn streams_are_the_commands() {
    let root = Root::new();
    for user in ["", "app"] {
        if user == "app" && !many_ids("streams of another user") {
            continue;
        }
        let mut spec = root.shell("cat; echo out; echo err >&2; echo again > /dev/stdout");
        spec.user = user.into();
        let outcome = run(spec);
        assert_eq!(outcome.stdout, "out\nagain\n", "{outcome:?}");
        assert_eq!(outcome.stderr, "err\n");
    }
}

#[test]
fn the_environment_is_exact() {
    let root = Root::new();
    for (extra, expected) in [
        (
            ("III_URL", "ws://localhost:1"),
            "HOME=/root\nIII_URL=ws://localhost:1\nPATH=/bin\n",
        ),
        (("HOME", "/elsewhere"), "HOME=/elsewhere\nPATH=/bin\n"),
    ] {
        let mut spec = root.spec(["env"]);
        spec.env.push((extra.0.into(), extra.1.into()));
        assert_eq!(run(spec).stdout, expected);
    }
}

#[test]
fn the_surroundings_are_the_sandboxs_own() {
    let root = Root::new();
    // One that the command must not inherit.
    let leak = rustix::io::dup(File::open("/dev/null").expect("open")).expect("dup");
    let script = "hostname; pwd; echo $$; echo /proc/[0-9]*; umask; ls /proc/self/fd";
    let mut spec = root.shell(script);
    spec.hostname = "iii-dev-thing".into();
    spec.cwd = "/made/on/demand".into();
    let outcome = run(spec);
    drop(leak);
    // The last descriptor is the one that ls reads the directory through.
    let expected = "iii-dev-thing\n/made/on/demand\n2\n/proc/1 /proc/2\n0022\n0\n1\n2\n3\n";
    assert_eq!(outcome.stdout, expected, "{outcome:?}");
}

#[test]
fn devices_and_scratch_directories_work() {
    let root = Root::new();
    let script = "set -e
        for device in null zero full random urandom tty; do test -c /dev/$device; done
        echo x > /dev/null
        ! (echo x > /dev/full) 2>/dev/null
        ls /dev/pts/ptmx > /dev/null
        echo x > /tmp/x; echo x > /dev/shm/x; echo x > /run/x; echo x > /run/lock/x
        test -d /sys/kernel
        ! touch /sys/x 2>/dev/null
        stat -c %a /tmp /run /dev/shm /dev | tr '\\n' ' '";
    assert_eq!(root.output(script), "1777 755 1777 755 ");
    assert!(
        fs::read_dir(root.path("tmp"))
            .expect("readdir")
            .next()
            .is_none()
    );
}

#[test]
fn the_init_is_closed_to_the_command() {
    let root = Root::new();
    let script = "cat /proc/1/environ /proc/1/exe; readlink /proc/1/root; ls /proc/1/fd; kill -KILL 1; echo alive";
    assert_eq!(run(root.shell(script)).stdout, "alive\n");
}

#[test]
fn root_inside_is_not_root_outside() {
    let root = Root::new();
    // The capabilities of a container engine's root, bounding set and all.
    let capabilities = root.output("grep -E 'Cap(Prm|Eff|Bnd)' /proc/self/status");
    assert_eq!(
        capabilities.matches("00000000a80425fb").count(),
        3,
        "{capabilities}"
    );
    let script = "mount -t tmpfs none /tmp; echo 1 > /proc/sys/vm/drop_caches; echo still";
    let outcome = run(root.shell(script));
    assert_eq!(outcome.stdout, "still\n");
    assert_eq!(outcome.stderr.lines().count(), 2, "{outcome:?}");
}

#[test]
fn ids_are_mapped() {
    if !many_ids("mapped ids") {
        return;
    }
    let root = Root::new();
    let script = "touch f; chown 1000:1001 f; stat -c %u:%g f; echo mine > g; stat -c %u:%g g";
    assert_eq!(root.output(script), "1000:1001\n0:0\n");
    let (uid, gid) = root_ids();
    let metadata = fs::metadata(root.path("workspace/g")).expect("stat");
    assert_eq!((metadata.uid(), metadata.gid()), (uid, gid));
    assert!(!is_root() || uid != 0, "a sandbox of root's is not root's");
}

#[test]
fn the_command_runs_as_the_images_user() {
    if !many_ids("users") {
        return;
    }
    let root = Root::new();
    for (user, expected) in [
        ("", "0 0 0 /root"),
        ("app", "1000 1001 1001 29 /home/app"),
        ("1000", "1000 1001 1001 29 /home/app"),
        ("app:audio", "1000 29 29 /home/app"),
        ("4242:4243", "4242 4243 4243"),
    ] {
        let mut spec =
            root.shell("echo $(id -u) $(id -g) $(id -G) $HOME; grep CapEff /proc/self/status");
        spec.user = user.into();
        let outcome = run(spec);
        let mut lines = outcome.stdout.lines();
        assert_eq!(lines.next(), Some(expected), "{user:?}: {outcome:?}");
        let powerless = lines
            .next()
            .is_some_and(|line| line.ends_with("\t0000000000000000"));
        assert_eq!(powerless, !user.is_empty(), "{user:?}: {outcome:?}");
    }
    let mut spec = root.spec(["true"]);
    spec.user = "nobody-here".into();
    let error = refused(spec);
    assert!(
        matches!(&error, SandboxError::SetUp { step: Step::FindUser, what, .. } if what == "nobody-here"),
        "{error}"
    );
}

#[test]
fn what_cannot_run_is_said() {
    let root = Root::new();
    root.write("workspace/script", "#!/missing/interpreter\n");
    fs::set_permissions(root.path("workspace/script"), Permissions::from_mode(0o755))
        .expect("chmod");
    for (command, code, text) in [
        (
            "no-such-command",
            127,
            "no-such-command: command not found in the sandbox",
        ),
        (
            "/bin/missing",
            127,
            "/bin/missing: command not found in the sandbox",
        ),
        (
            "./script",
            127,
            "./script: command not found in the sandbox",
        ),
        (
            "/etc/passwd",
            126,
            "/etc/passwd: cannot be executed in the sandbox",
        ),
        ("/etc", 126, "/etc: cannot be executed in the sandbox"),
    ] {
        let error = refused(root.spec([command]));
        assert_eq!(
            (error.exit_code(), error.to_string().as_str()),
            (code, text)
        );
    }

    let mut spec = root.spec(["true"]);
    let missing = root.path("missing");
    spec.mounts = vec![BindMount {
        host: missing.clone(),
        target: "/cache".into(),
        read_only: true,
    }];
    let error = refused(spec);
    assert_eq!(
        error.to_string(),
        format!(
            "sandbox: cannot open the mounted directory {}",
            missing.display()
        )
    );

    let error = refused(spec_on(RootSource::Dir(missing.clone()), ["true"]));
    assert_eq!(
        error.to_string(),
        format!(
            "sandbox: cannot open the root directory {}",
            missing.display()
        )
    );

    let mut spec = root.spec(["true"]);
    spec.init = missing.clone();
    assert_eq!(
        refused(spec).to_string(),
        format!("sandbox: cannot start {}", missing.display())
    );

    let mut spec = root.spec(["true"]);
    spec.init = "/bin/true".into();
    assert!(matches!(refused(spec), SandboxError::Killed));

    for break_it in [
        (|spec| spec.argv.clear()) as fn(&mut SandboxSpec),
        |spec| spec.cwd = "workspace".into(),
        |spec| spec.env.push(("A=B".into(), "C".into())),
        |spec| {
            let (host, target) = ("/".into(), "/a/../b".into());
            spec.mounts.push(BindMount {
                host,
                target,
                read_only: true,
            });
        },
    ] {
        let mut spec = root.spec(["true"]);
        break_it(&mut spec);
        assert!(matches!(refused(spec), SandboxError::Spec(_)));
    }
}

#[test]
fn orphans_are_reaped() {
    let root = Root::new();
    let script = "orphan=$(sh -c 'true > /dev/null & echo $!')
        while test -e /proc/$orphan; do sleep 0.01; done
        echo gone";
    assert_eq!(root.output(script), "gone\n");
}

#[test]
fn nothing_outlives_the_command() {
    let root = Root::new();
    let mark = mark();
    let script =
        format!("sh -c 'sleep 1000; :' {mark} & setsid sh -c 'sleep 1000; :' {mark} & echo $!");
    let outcome = run(root.shell(&script));
    assert!(outcome.status.success(), "{outcome:?}");
    assert!(processes(&mark).is_empty());
}

#[test]
fn signals_reach_the_command() {
    let root = Root::new();
    let script = "trap 'echo usr1' USR1; trap 'exit 7' TERM; echo ready; while :; do sleep 1; done";
    let mut sandbox = start(root.shell(script));
    assert_eq!(next_line(&mut sandbox), "ready");
    let controller = sandbox.controller();
    controller.signal(Signal::USR1).expect("signal");
    assert_eq!(next_line(&mut sandbox), "usr1");
    assert_eq!(sandbox.wait_timeout(Duration::ZERO).expect("wait"), None);
    let status = sandbox.stop(Signal::TERM, GRACE).expect("stop");
    assert_eq!(status.code(), Some(7));
    assert_eq!(
        sandbox.wait_timeout(Duration::ZERO).expect("wait"),
        Some(status)
    );
    controller.signal(Signal::USR1).expect("nothing happens");
}

#[test]
fn a_stop_reaches_what_the_command_leaves_behind() {
    let root = Root::new();
    // The first shell dies of the signal at once; the others hear of it and are waited for.
    let script = "
        (trap 'echo one; exit' TERM; echo ready; while :; do sleep 1; done) &
        setsid sh -c \"trap 'echo two; exit' TERM; echo ready; while :; do sleep 1; done\" &
        wait";
    let mut sandbox = start(root.shell(script));
    assert_eq!(
        [next_line(&mut sandbox), next_line(&mut sandbox)],
        ["ready", "ready"]
    );
    sandbox
        .controller()
        .stop(Signal::TERM, GRACE)
        .expect("stop");
    let outcome = finish(sandbox);
    assert_eq!(outcome.status.signal(), Some(libc::SIGTERM));
    let mut heard: Vec<_> = outcome.stdout.lines().collect();
    heard.sort_unstable();
    assert_eq!(heard, ["one", "two"]);
}

#[test]
fn the_grace_ends_in_sigkill() {
    let root = Root::new();
    let deaf = "trap '' TERM; echo ready; while :; do sleep 1; done";
    let mut sandbox = start(root.shell(deaf));
    assert_eq!(next_line(&mut sandbox), "ready");
    let status = sandbox
        .stop(Signal::TERM, Duration::from_millis(50))
        .expect("stop");
    assert_eq!(status.signal(), Some(libc::SIGKILL));

    // Asked twice, as by a second Ctrl-C.
    let mut sandbox = start(root.shell(deaf));
    assert_eq!(next_line(&mut sandbox), "ready");
    let controller = sandbox.controller();
    controller.stop(Signal::TERM, Duration::MAX).expect("stop");
    assert_eq!(
        sandbox
            .wait_timeout(Duration::from_millis(20))
            .expect("wait"),
        None
    );
    controller.stop(Signal::TERM, Duration::ZERO).expect("stop");
    let status = sandbox.wait().expect("wait");
    assert_eq!(status.signal(), Some(libc::SIGKILL));
}

/// Lets `act` restart the sandbox of `script`, whose lines it gets, and ends the sandbox.
fn restarted(
    script: &str,
    act: impl FnOnce(&Controller, &dyn Fn(&str) -> SandboxCommand, &mut dyn FnMut() -> String),
) -> ExitStatus {
    let root = Root::new();
    let mut sandbox = start(root.shell(script));
    let (controller, command) = (sandbox.controller(), root.shell("").command());
    let mut lines = io::BufRead::lines(io::BufReader::new(sandbox.stdout.take().expect("piped")));
    let shell = |script: &str| {
        let argv = ["sh", "-c", script].map(OsString::from).to_vec();
        SandboxCommand {
            argv,
            ..command.clone()
        }
    };
    std::thread::scope(|scope| {
        let waiting = scope.spawn(move || sandbox.wait().expect("wait"));
        let mut next = || lines.next().expect("a line").expect("read");
        act(&controller, &shell, &mut next);
        controller.stop(Signal::TERM, GRACE).expect("stop");
        waiting.join().expect("thread")
    })
}

#[test]
fn a_restarted_command_has_the_old_ones_place() {
    let mark = mark();
    // The first has a member of its group, and a former member.
    let old = format!(
        "sh -c 'sleep 1000; :' {mark} & setsid sh -c 'sleep 1000; :' {mark} & \
         trap 'echo bye; exit' TERM; echo ready; while :; do sleep 0.01; done"
    );
    let status = restarted(&old, |controller, shell, next| {
        assert_eq!(next(), "ready");
        let restart = |command| controller.restart(command, Signal::TERM, GRACE);
        let mut new = shell("echo $NEW $PPID; trap 'exit 3' TERM; while :; do sleep 0.01; done");
        new.env.push(("NEW".into(), "yes".into()));
        restart(new).expect("restart");
        assert_eq!(next(), "bye");
        assert!(processes(&mark).is_empty());
        assert_eq!(next(), "yes 1");
        for round in 0..5 {
            restart(shell(&format!(
                "echo {round}; trap 'exit 3' TERM; while :; do sleep 0.01; done"
            )))
            .expect("restart");
            assert_eq!(next(), round.to_string());
        }
    });
    assert_eq!(status.code(), Some(3));
}

#[test]
fn a_restart_leaves_other_commands_alone() {
    let (mark, theirs) = (mark(), mark());
    let old = format!("sh -c 'trap \"\" TERM; sleep 1000; :' {mark} & echo ready; wait");
    restarted(&old, |controller, shell, next| {
        assert_eq!(next(), "ready");
        let (reader, writer) = io::pipe().expect("pipe");
        let null = || File::open("/dev/null").expect("open").into();
        let fds = vec![null(), writer.into(), null()];
        let beside = shell(&format!("echo $$; sh -c 'sleep 1000; :' {theirs}"));
        let beside = controller.run(beside, fds).expect("run");
        let mut lines = io::BufRead::lines(io::BufReader::new(reader));
        lines.next().expect("a line").expect("read");
        eventually("it runs", || !processes(&theirs).is_empty());
        controller
            .restart(
                shell("echo again; exec sleep 1000"),
                Signal::TERM,
                Duration::from_millis(50),
            )
            .expect("restart");
        assert_eq!(next(), "again");
        assert!(processes(&mark).is_empty());
        assert!(!processes(&theirs).is_empty());
        drop(beside);
    });
}

#[test]
fn a_deaf_command_is_killed_for_the_next() {
    let mark = mark();
    let deaf = format!(
        "trap '' TERM; setsid sh -c 'sleep 1000; :' {mark} & echo ready; while :; do sleep 1; done"
    );
    restarted(&deaf, |controller, shell, next| {
        assert_eq!(next(), "ready");
        controller
            .restart(
                shell("echo again; exec sleep 1000"),
                Signal::TERM,
                Duration::from_millis(50),
            )
            .expect("restart");
        assert!(processes(&mark).is_empty());
        assert_eq!(next(), "again");
    });
}

#[test]
fn a_command_that_cannot_take_the_place_ends_the_sandbox() {
    let status = restarted("echo ready; exec sleep 1000", |controller, shell, next| {
        assert_eq!(next(), "ready");
        let mut missing = shell("");
        missing.argv = vec!["no-such-command".into()];
        let error = controller.restart(missing, Signal::TERM, GRACE);
        assert_eq!(error.expect_err("it runs").exit_code(), 127);
        let error = controller.restart(shell("echo late"), Signal::TERM, GRACE);
        assert!(matches!(error, Err(SandboxError::Killed)), "{error:?}");
    });
    assert_eq!(status.signal(), Some(libc::SIGTERM));
}

#[test]
fn a_stop_ends_a_restart() {
    let script = "trap '' TERM; echo ready; while :; do sleep 1; done";
    let status = restarted(script, |controller, shell, next| {
        assert_eq!(next(), "ready");
        std::thread::scope(|scope| {
            let new = shell("echo new");
            let restart = scope.spawn(move || controller.restart(new, Signal::TERM, GRACE));
            // It may come first, too: then nothing is restarted any more.
            controller
                .stop(Signal::TERM, Duration::from_millis(50))
                .expect("stop");
            let error = restart.join().expect("thread");
            assert!(matches!(error, Err(SandboxError::Killed)), "{error:?}");
        });
    });
    assert_eq!(status.signal(), Some(libc::SIGKILL));
}

#[test]
fn a_dropped_sandbox_is_gone() {
    let root = Root::new();
    let mark = mark();
    let script =
        format!("setsid sh -c 'trap \"\" TERM; sleep 1000; :' {mark} & echo ready; sleep 1000");
    let mut sandbox = start(root.shell(&script));
    assert_eq!(next_line(&mut sandbox), "ready");
    drop(sandbox);
    assert!(processes(&mark).is_empty());
}

#[test]
fn a_killed_init_is_a_killed_sandbox() {
    let root = Root::new();
    let mut sandbox = start(root.shell("echo ready; sleep 1000"));
    assert_eq!(next_line(&mut sandbox), "ready");
    let pid = rustix::process::Pid::from_raw(sandbox.pid() as i32).expect("a pid");
    rustix::process::kill_process(pid, Signal::KILL).expect("kill");
    assert_eq!(sandbox.wait().expect("wait").signal(), Some(libc::SIGKILL));
}

#[test]
fn mounts_are_writable_unless_read_only() {
    let root = Root::new();
    let caches = TempDir::new().expect("tempdir");
    // Closed to the sandbox's ids, as a home directory would be.
    fs::set_permissions(caches.path(), Permissions::from_mode(0o700)).expect("chmod");
    let mount = |name: &str, target: &str, read_only| {
        let host = caches.path().join(name);
        BindMount {
            host,
            target: target.into(),
            read_only,
        }
    };
    for name in ["writable", "fixed"] {
        fs::create_dir(caches.path().join(name)).expect("mkdir");
    }
    fs::write(caches.path().join("fixed/file"), "old\n").expect("write");
    fs::write(caches.path().join("single"), "single\n").expect("write");
    let script = "set -e
        echo new > /root/.cache/pip/file
        cat /opt/fixed/file /opt/single
        ! (echo x > /opt/fixed/file) 2>/dev/null
        ! touch /opt/fixed/other 2>/dev/null";
    let mut spec = root.shell(script);
    spec.mounts = vec![
        mount("writable", "/root/.cache/pip", false),
        mount("fixed", "/opt/fixed", true),
        mount("single", "/opt/single", true),
    ];
    let outcome = run(spec);
    assert!(outcome.status.success(), "{outcome:?}");
    assert_eq!(outcome.stdout, "old\nsingle\n");
    let written = fs::read_to_string(caches.path().join("writable/file"));
    assert_eq!(written.expect("read"), "new\n");
}

#[test]
fn the_images_symlinks_resolve_inside() {
    let root = Root::new();
    let victim = TempDir::new().expect("tempdir");
    own(victim.path());
    fs::remove_dir(root.path("run")).expect("rmdir");
    for name in ["run", "linked", "cache"] {
        root.symlink(victim.path(), name);
    }
    let mut targets = vec!["/cache/inner".to_owned()];
    // Where the init's descriptors are found, lest one of them be the host's root.
    for descriptor in 3..16 {
        let name = format!("descriptor-{descriptor}");
        root.symlink(
            format!("/proc/self/fd/{descriptor}{}", victim.path().display()),
            &name,
        );
        targets.push(format!("/{name}/inner"));
    }
    let cache = TempDir::new().expect("tempdir");
    for target in targets {
        let mut spec = root.spec(["true"]);
        spec.cwd = "/linked/deep".into();
        let host = cache.path().to_owned();
        let message = target.clone();
        spec.mounts = vec![BindMount {
            host,
            target,
            read_only: false,
        }];
        // Refused or not, nothing happens outside.
        let _ = Sandbox::start(spec).map(|mut sandbox| sandbox.wait());
        let touched = fs::read_dir(victim.path()).expect("readdir").next();
        assert!(touched.is_none(), "{message}: {touched:?}");
    }
}

#[test]
fn the_hosts_settings_lie_above_the_layers() {
    let settings = || HostSettings {
        resolv_conf: Some("nameserver 192.0.2.1\n".into()),
        hosts: Some("192.0.2.2 corp\n".into()),
        ca_bundle: Some("certificates\n".into()),
        ..HostSettings::default()
    };
    let script = "cat /etc/resolv.conf /etc/hosts $CURL_CA_BUNDLE; echo $PIP_CERT; echo $SSL_CERT_FILE
        (echo x > /etc/resolv.conf) 2>/dev/null || (echo x > /run/iii/x) 2>/dev/null || echo read-only";
    let expected = format!(
        "nameserver 192.0.2.1\n192.0.2.2 corp\n127.0.0.1 box\ncertificates\n/mine\n{CA_BUNDLE}\nread-only\n"
    );
    // As images come: with a file, without, and with a symlink that dangles.
    let dangling = "../run/systemd/resolve/stub-resolv.conf";
    let images: [fn(&Root); 3] = [
        |root| root.write("etc/resolv.conf", "image's\n"),
        |_| {},
        |root| root.symlink("../run/systemd/resolve/stub-resolv.conf", "etc/resolv.conf"),
    ];
    for (image, prepare) in images.into_iter().enumerate() {
        let root = Root::new();
        prepare(&root);
        let mut spec = root.shell(script);
        spec.hostname = "box".into();
        spec.host = settings();
        spec.env.push(("PIP_CERT".into(), "/mine".into()));
        let outcome = run(spec);
        assert_eq!(outcome.stdout, expected, "image {image}: {outcome:?}");
        let left = fs::read_to_string(root.path("etc/resolv.conf")).ok();
        match image {
            0 => assert_eq!(left.as_deref(), Some("image's\n")),
            1 => assert_eq!(left.as_deref(), Some("")),
            _ => assert_eq!(
                fs::read_link(root.path("etc/resolv.conf")).expect("a link"),
                Path::new(dangling)
            ),
        }
        assert!(
            fs::read_dir(root.path("run"))
                .expect("readdir")
                .next()
                .is_none()
        );
    }
}

#[test]
fn no_mount_appears_on_the_host() {
    let mounts = || fs::read_to_string("/proc/self/mountinfo").expect("read");
    let before = mounts();
    let root = Root::new();
    let mut sandbox = start(root.shell("echo ready; sleep 1000"));
    assert_eq!(next_line(&mut sandbox), "ready");
    assert_eq!(mounts(), before);
    drop(sandbox);
    assert_eq!(mounts(), before);
}

/// A directory of the host's as a read-only FUSE filesystem, every file root's.
struct Loaded(Vec<Node>);

struct Node {
    attr: FileAttr,
    contents: Vec<u8>,
    entries: BTreeMap<OsString, usize>,
}

impl Loaded {
    fn new(directory: &Path) -> Self {
        let mut loaded = Self(Vec::new());
        loaded.load(directory);
        loaded
    }

    fn load(&mut self, path: &Path) -> usize {
        let metadata = fs::symlink_metadata(path).expect("stat");
        let (kind, contents) = if metadata.is_dir() {
            (FileType::Directory, Vec::new())
        } else if metadata.is_symlink() {
            let target = fs::read_link(path).expect("readlink");
            (FileType::Symlink, target.as_os_str().as_bytes().to_vec())
        } else {
            (FileType::RegularFile, fs::read(path).expect("read"))
        };
        let index = self.0.len();
        let size = contents.len() as u64;
        let attr = FileAttr {
            ino: INodeNo(index as u64 + 1),
            size,
            blocks: size.div_ceil(512),
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind,
            perm: metadata.mode() as u16 & 0o7777,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        };
        let entries = BTreeMap::new();
        self.0.push(Node {
            attr,
            contents,
            entries,
        });
        if kind == FileType::Directory {
            for entry in fs::read_dir(path).expect("readdir") {
                let entry = entry.expect("readdir");
                let child = self.load(&entry.path());
                self.0[index].entries.insert(entry.file_name(), child);
            }
        }
        index
    }

    fn node(&self, ino: INodeNo) -> &Node {
        &self.0[ino.0 as usize - 1]
    }
}

impl Filesystem for Loaded {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.node(parent).entries.get(name) {
            Some(&child) => reply.entry(&PATIENCE, &self.0[child].attr, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&PATIENCE, &self.node(ino).attr);
    }

    fn readlink(&self, _: &Request, ino: INodeNo, reply: ReplyData) {
        reply.data(&self.node(ino).contents);
    }

    fn read(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let contents = &self.node(ino).contents;
        let from = contents.len().min(offset as usize);
        let to = contents.len().min(from + size as usize);
        reply.data(&contents[from..to]);
    }

    fn readdir(
        &self,
        _: &Request,
        ino: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let entries = self.node(ino).entries.iter().enumerate();
        for (position, (name, &child)) in entries.skip(offset as usize) {
            let attr = &self.0[child].attr;
            if reply.add(attr.ino, position as u64 + 1, attr.kind, name) {
                break;
            }
        }
        reply.ok();
    }
}

struct Server(fuser::BackgroundSession);

impl FuseServer for Server {
    fn join(self: Box<Self>) -> io::Result<()> {
        self.0.join()
    }
}

/// `directory`, served over FUSE by several threads with a descriptor each.
fn served(directory: &Path) -> RootSource {
    let filesystem = Loaded::new(directory);
    RootSource::Fuse(Box::new(|device: OwnedFd| {
        let mut config = fuser::Config::default();
        config.acl = SessionACL::All;
        config.n_threads = Some(2);
        let session = Session::from_fd(filesystem, device, SessionACL::All, config)?;
        Ok(Box::new(Server(session.spawn()?)))
    }))
}

fn fuse_works(what: &str) -> bool {
    let Some(blocker) = probe(&init()).blocker else {
        return true;
    };
    skipped(what, &format!("{blocker}; {:?}", blocker.hint()));
    false
}

#[test]
fn a_fuse_root_serves() {
    if !fuse_works("FUSE") {
        return;
    }
    let root = Root::new();
    root.write("etc/resolv.conf", "");
    root.write("etc/hosts", "");
    let outcome = run(spec_on(
        served(root.0.path()),
        ["sh", "-c", "cat /etc/passwd; mount"],
    ));
    assert!(outcome.status.success(), "{outcome:?}");
    let (passwd, mounts) = outcome
        .stdout
        .split_at(root.path("etc/passwd").metadata().expect("stat").len() as usize);
    assert_eq!(
        passwd,
        fs::read_to_string(root.path("etc/passwd")).expect("read")
    );
    let root_mount = mounts.lines().find(|line| line.contains(" on / "));
    assert_eq!(
        root_mount,
        Some(
            "iii on / type fuse.iii (rw,relatime,user_id=0,group_id=0,default_permissions,allow_other)"
        ),
    );
}

#[test]
fn setuid_programs_work_on_a_fuse_root() {
    const WHAT: &str = "setuid on FUSE";
    if !fuse_works(WHAT) || !many_ids(WHAT) {
        return;
    }
    // Busybox gives its privileges up by itself; cat does not.
    let cat = "/usr/bin/cat";
    let libraries = Command::new("ldd").arg(cat).output().expect("ldd").stdout;
    let root = Root::new();
    for name in ["etc/resolv.conf", "etc/hosts"] {
        root.write(name, "");
    }
    let mut files = vec![(cat.to_owned(), 0o4755)];
    let words = String::from_utf8(libraries).expect("utf-8");
    files.extend(
        words
            .split_whitespace()
            .filter(|word| word.starts_with('/'))
            .map(|path| (path.to_owned(), 0o755)),
    );
    for (path, mode) in files {
        let inside = root.path(path.trim_start_matches('/'));
        fs::create_dir_all(inside.parent().expect("a parent")).expect("mkdir");
        fs::copy(&path, &inside).expect("copy");
        fs::set_permissions(&inside, Permissions::from_mode(mode)).expect("chmod");
    }
    let mut spec = spec_on(served(root.0.path()), [cat, "/proc/self/status"]);
    spec.user = "app".into();
    let outcome = run(spec);
    assert!(
        outcome.stdout.contains("\nUid:\t1000\t0\t0\t0\n"),
        "{outcome:?}"
    );
}

#[test]
fn a_server_that_fails_is_said() {
    if !fuse_works("FUSE") {
        return;
    }
    let root = RootSource::Fuse(Box::new(|_| Err(io::ErrorKind::OutOfMemory.into())));
    let error = refused(spec_on(root, ["true"]));
    assert!(
        matches!(&error, SandboxError::Server(source) if source.kind() == io::ErrorKind::OutOfMemory)
    );
}

/// Runs this test binary, or a copy of it, again, as `play_a_part`, in the part named.
fn part(program: &Path, name: &str) -> Command {
    let mut command = Command::new(program);
    command
        .args(["--exact", "play_a_part", "--nocapture"])
        .env(PART, name);
    command
}

/// Not a test by itself: what another's second process does.
#[test]
fn play_a_part() {
    match std::env::var(PART).as_deref() {
        Ok("supervisor") => supervise_for_ever(),
        Ok("user with subordinate ids") => user_with_subordinate_ids(),
        Ok("user without subordinate ids") => user_without_subordinate_ids(),
        _ => {}
    }
}

/// Starts a sandbox, says so, and waits to be killed.
fn supervise_for_ever() {
    let root = Root::new();
    let mark = std::env::var("MARK").expect("a mark");
    let script =
        format!("setsid sh -c 'sleep 1000; :' {mark} & sh -c 'echo ready; sleep 1000; :' {mark}");
    let argv = ["sh", "-c", &script];
    let spec = if fuse_works("FUSE") {
        root.write("etc/resolv.conf", "");
        root.write("etc/hosts", "");
        spec_on(served(root.0.path()), argv)
    } else {
        root.spec(argv)
    };
    let mut sandbox = start(spec);
    assert_eq!(next_line(&mut sandbox), "ready");
    println!("\npid {} root {}", sandbox.pid(), root.0.path().display());
    io::stdout().flush().expect("flush");
    sandbox.wait().expect("wait");
}

#[test]
fn nothing_outlives_a_killed_supervisor() {
    let mark = mark();
    let this = std::env::current_exe().expect("a path");
    let mut supervisor = part(&this, "supervisor")
        .env("MARK", &mark)
        .stdout(Streams::piped())
        .spawn()
        .expect("spawn");
    let mut lines =
        io::BufRead::lines(io::BufReader::new(supervisor.stdout.take().expect("piped")));
    let line = lines.find_map(|line| Some(line.expect("read").strip_prefix("pid ")?.to_owned()));
    let line = line.expect("it came up");
    let (pid, root) = line.split_once(" root ").expect("both");
    let mounts = PathBuf::from(format!("/proc/{pid}/mounts"));
    assert!(mounts.exists());
    assert!(!processes(&mark).is_empty());

    supervisor.kill().expect("kill");
    supervisor.wait().expect("wait");
    eventually("its sandbox is gone", || {
        processes(&mark).is_empty() && !mounts.exists()
    });
    fs::remove_dir_all(root).expect("nothing is mounted there");
}

/// The mode of `/dev/fuse`, put back when dropped.
struct OpenDevice(u32);

impl OpenDevice {
    fn new() -> Option<Self> {
        let mode = fs::metadata(FUSE_DEVICE).ok()?.mode();
        fs::set_permissions(FUSE_DEVICE, Permissions::from_mode(0o666)).ok()?;
        Some(Self(mode))
    }
}

impl Drop for OpenDevice {
    fn drop(&mut self) {
        let _ = fs::set_permissions(FUSE_DEVICE, Permissions::from_mode(self.0));
    }
}

/// An account with subordinate ids, removed when dropped.
struct Account(String);

impl Account {
    fn new() -> io::Result<Self> {
        let account = Self(format!("iii-test-{}", std::process::id()));
        let check = |command: &mut Command| match command.output()? {
            output if output.status.success() => Ok(()),
            output => Err(io::Error::other(
                String::from_utf8_lossy(&output.stderr).into_owned(),
            )),
        };
        check(Command::new("useradd").args(["--system", "--no-create-home", &account.0]))?;
        let range = "1700000000-1700065535";
        check(Command::new("usermod").args([
            "--add-subuids",
            range,
            "--add-subgids",
            range,
            &account.0,
        ]))?;
        Ok(account)
    }

    fn ids(&self) -> (u32, u32) {
        let passwd = fs::read_to_string("/etc/passwd").expect("read");
        let line = passwd
            .lines()
            .find(|line| line.split(':').next() == Some(&self.0));
        let mut fields = line
            .expect("the account")
            .split(':')
            .skip(2)
            .map(|id| id.parse().expect("an id"));
        (fields.next().expect("a uid"), fields.next().expect("a gid"))
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        let _ = Command::new("userdel").arg(&self.0).output();
    }
}

/// Plays `name` as another user, with programs that every user can reach.
fn play_as((uid, gid): (u32, u32), name: &str) {
    let programs = TempDir::new().expect("tempdir");
    fs::set_permissions(programs.path(), Permissions::from_mode(0o755)).expect("chmod");
    let this = programs.path().join("test");
    let init_copy = programs.path().join("init");
    fs::copy(std::env::current_exe().expect("a path"), &this).expect("copy");
    fs::copy(init(), &init_copy).expect("copy");
    let outcome = part(&this, name)
        .env(INIT, init_copy)
        .env_remove("USER")
        .current_dir("/")
        .uid(uid)
        .gid(gid)
        .output()
        .expect("spawn");
    let stderr = String::from_utf8_lossy(&outcome.stderr);
    assert!(outcome.status.success(), "{stderr}");
    eprintln!("{stderr}");
}

#[test]
fn ordinary_users_have_sandboxes_too() {
    if !is_root() {
        return skipped("ordinary users", "needs root, to become one");
    }
    let _device = OpenDevice::new();
    let nobody_knows = (1_699_999_999, 1_699_999_999);
    play_as(nobody_knows, "user without subordinate ids");
    match Account::new() {
        Ok(account) => play_as(account.ids(), "user with subordinate ids"),
        Err(error) => skipped("a user with subordinate ids", &error.to_string()),
    }
}

fn user_with_subordinate_ids() {
    let support = probe(&init());
    assert!(support.blocker.is_none(), "{support:?}");
    assert_eq!(
        support.warnings,
        [],
        "are newuidmap and newgidmap (package uidmap) installed?"
    );
    let own = rustix::process::getuid().as_raw();
    assert_eq!(support.root_ids.0, own);

    let root = Root::new();
    let script = "set -e
        id -u; touch f; chown 1000:1000 f; stat -c %u:%g f; echo new > /cache/file
        ! (echo 1 > /proc/sys/vm/drop_caches) 2>/dev/null";
    let cache = TempDir::new().expect("tempdir");
    let mut spec = root.shell(script);
    spec.mounts = vec![BindMount {
        host: cache.path().to_owned(),
        target: "/cache".into(),
        read_only: false,
    }];
    let outcome = run(spec);
    assert_eq!(
        (outcome.status.code(), outcome.stdout.as_str()),
        (Some(0), "0\n1000:1000\n"),
        "{outcome:?}"
    );
    let file = fs::metadata(cache.path().join("file")).expect("stat");
    assert_eq!(file.uid(), own);
    // A file of another id keeps its owner.
    root.output("chown 0:0 f");

    ids_are_mapped();
    the_command_runs_as_the_images_user();
    streams_are_the_commands();
    mounts_are_writable_unless_read_only();
    a_fuse_root_serves();
    setuid_programs_work_on_a_fuse_root();
}

fn user_without_subordinate_ids() {
    let support = probe(&init());
    assert!(support.blocker.is_none(), "{support:?}");
    let [warning @ Warning::SingleId { .. }] = &support.warnings[..] else {
        panic!("{support:?}");
    };
    assert!(
        warning.to_string().contains("usermod --add-subuids"),
        "{warning}"
    );

    let root = Root::new();
    let outcome = run(root.shell("id -u; touch f; chown 1000 f || echo as announced"));
    assert_eq!(outcome.stdout, "0\nas announced\n", "{outcome:?}");
    let mut spec = root.spec(["true"]);
    spec.user = "app".into();
    let error = refused(spec);
    assert!(
        matches!(
            error,
            SandboxError::SetUp {
                step: Step::BecomeUser,
                ..
            }
        ),
        "{error}"
    );
    assert!(
        error
            .hint()
            .is_some_and(|hint| hint.contains("/etc/subuid"))
    );

    the_surroundings_are_the_sandboxs_own();
    devices_and_scratch_directories_work();
    root_inside_is_not_root_outside();
    the_init_is_closed_to_the_command();
    mounts_are_writable_unless_read_only();
    the_hosts_settings_lie_above_the_layers();
    a_fuse_root_serves();
}
