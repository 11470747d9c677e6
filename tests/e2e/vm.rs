//! Layers served over vhost-user-fs to real Linux kernels, in QEMU without KVM and as User-Mode
//! Linux.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::thread;

use iii_overlay::adapter::vhost_user::{self, End, Socket, Tag};
use iii_overlay::fs::{Errno, Filesystem, Kind};
use iii_overlay::ino::{Ino, ROOT};
use iii_overlay::{Overlay, OverlayOptions};
use iii_store::Store;
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::harness::{self, Home, busybox_base, repository, skip};
use crate::machine::{Kernel, Vm};
use crate::posix;

/// Does `test` with each available kernel; reports the others as skipped.
fn with_kernels(what: &str, mut test: impl FnMut(Kernel, &Path)) {
    for kernel in Kernel::ALL {
        match kernel.made(&harness::cache()) {
            Ok(made) => test(kernel, made),
            Err(why) => skip(&format!("{what}, in {}", kernel.name()), why),
        }
    }
}

/// The image that guests have as their root.
const IMAGE: &str = "vm:latest";
/// A root filesystem with busybox, made more of by `add`, as [`IMAGE`] in a home of its own.
fn home(add: impl FnOnce(&Path)) -> Home {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    let copied = Command::new("cp")
        .arg("-a")
        .args([busybox_base(), &root])
        .status();
    assert!(copied.unwrap().success());
    add(&root);
    let home = Home::new();
    home.import(&root, IMAGE);
    home
}

/// Copies a program of this machine and its libraries into the root filesystem `root`, as
/// /bin/`name`.
pub fn install(program: &Path, root: &Path, name: &str) {
    fs::copy(program, root.join("bin").join(name)).unwrap();
    let libraries = Command::new("ldd").arg(program).output().unwrap();
    let libraries = String::from_utf8(libraries.stdout).unwrap();
    for library in libraries.split_whitespace().filter(|w| w.starts_with('/')) {
        let to = root.join(&library[1..]);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(library, to).unwrap();
    }
}

/// A short path: the name of a socket has 108 bytes at most.
fn socket() -> (TempDir, PathBuf) {
    let dir = TempDir::with_prefix("vm-").unwrap();
    let path = dir.path().join("fs.sock");
    (dir, path)
}

/// The overlay of [`IMAGE`] in `home` and `upper`, in this process.
fn overlay(home: &Home, upper: &Path) -> Overlay {
    let store = Store::open(home.state().join("store/v1")).unwrap();
    let shown = home.run(&["image", "inspect", IMAGE, "--json"]).ok();
    let shown: Value = serde_json::from_str(&shown.stdout).unwrap();
    let layers = shown["layers"].as_array().unwrap().iter();
    let layers = layers.map(|layer| {
        let id = layer["id"].as_str().or(layer.as_str()).unwrap();
        store.layer(&id.parse().unwrap()).unwrap()
    });
    let layers = layers.collect();
    Overlay::open(&store, layers, upper, OverlayOptions::default()).unwrap()
}

fn find(overlay: &Overlay, path: &str) -> Result<Ino, Errno> {
    path.split('/').try_fold(ROOT, |dir, name| {
        Ok(overlay.lookup(dir, name.as_bytes())?.ino)
    })
}

fn contents(overlay: &Overlay, path: &str) -> Vec<u8> {
    let ino = find(overlay, path).unwrap();
    let size = overlay.getattr(ino).unwrap().size;
    let mut bytes = vec![0; size as usize];
    assert_eq!(overlay.read(ino, &mut bytes, 0), Ok(size as usize));
    bytes
}

#[test]
fn a_guest_works_in_its_root_and_what_it_wrote_stays() {
    with_kernels("layers served to a virtual machine", works_in_its_root);
}

fn works_in_its_root(kernel: Kernel, made: &Path) {
    let home = home(|root| {
        install(&std::env::current_exe().unwrap(), root, "tests");
        fs::create_dir_all(root.join("data/dir/below")).unwrap();
        for (name, text) in [
            ("a", "A"),
            ("b", "B"),
            ("c", "C"),
            ("dir/x", "X"),
            ("dir/below/y", "Y"),
        ] {
            fs::write(root.join("data").join(name), text).unwrap();
        }
        // The exerciser's file is copied up from a layer.
        fs::write(root.join("data").join(posix::FSX), vec![7; 100_000]).unwrap();
    });
    let (_dir, socket) = socket();
    let upper = home.path().join("upper");
    let (socket_arg, upper_arg) = (socket.to_str().unwrap(), upper.to_str().unwrap());
    let serve = [
        "store", "serve", "--image", IMAGE, "--socket", socket_arg, "--upper", upper_arg, "--json",
    ];
    let mut serving = home.start(&serve);
    serving.wait_for("fs.sock");

    // A second server of the socket is refused, and disturbs no session.
    home.start(&["store", "serve", "--image", IMAGE, "--socket", socket_arg])
        .finish(harness::LIMIT)
        .fails()
        .says(&["another process listens", "another --socket"]);

    let vm = Vm::boot(
        kernel,
        made,
        &socket,
        r#"
            cd /data
            [ "$(cat a)" = A ]; echo more >>a; [ "$(cat a)" = Amore ]
            rm b; [ ! -e b ]
            mv dir moved; [ "$(cat moved/below/y)" = Y ]; [ ! -e dir ]
            ln c c2; echo too >>c2; [ "$(cat c)" = Ctoo ]; [ "$(stat -c %h c)" = 2 ]
            [ ! -e new ]; mkdir new; echo N >new/n; mv new/n n; rmdir new
            ln -s moved/x s; [ "$(cat s)" = X ]
            mkfifo p; mknod null c 1 3; echo gone >null; chown 12:34 n; chmod 4750 n
            [ "$(stat -c '%u %g %a' n)" = "12 34 4750" ]
            cp /bin/busybox busybox; ./busybox true
            [ "$(ls | tr '\n' ' ')" = "a busybox c c2 fsx moved n null p s " ]
            mkdir calls
            TEST_POSIX_DIR=/data/calls tests --exact posix::calls --nocapture
            TEST_POSIX_DIR=/data tests --exact posix::fsx --nocapture
        "#,
    );
    let console = vm.finish();
    let ended = serving.finish(harness::LIMIT).ok();
    assert!(!socket.exists(), "the socket is left");
    home.assert_nothing_left();

    let said: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(said["end"], "disconnected");
    let requests = &said["requests"];
    // The kernel was told to open, close and create without asking, and believes it.
    assert_eq!(requests["open"], 0, "{requests:#}");
    assert_eq!(requests["tmpfile"], 2, "{requests:#}");

    let overlay = overlay(&home, &upper);
    assert_eq!(contents(&overlay, "data/a"), b"Amore\n");
    assert_eq!(contents(&overlay, "data/c"), b"Ctoo\n");
    assert_eq!(contents(&overlay, "data/moved/below/y"), b"Y");
    assert_eq!(contents(&overlay, "data/calls/named"), b"named later");
    for gone in ["data/b", "data/dir", "data/new", "data/calls/removed"] {
        assert_eq!(find(&overlay, gone), Err(Errno::NOENT), "{gone}");
    }
    let attr = |path| overlay.getattr(find(&overlay, path).unwrap()).unwrap();
    let n = attr("data/n");
    assert_eq!((n.uid, n.gid, n.mode), (12, 34, 0o4750));
    assert_eq!(attr("data/null").kind, Kind::Char);
    assert_eq!(attr("data/c").ino, attr("data/c2").ino);
    // The exerciser prints the final contents of its file.
    let fsx = contents(&overlay, &format!("data/{}", posix::FSX));
    let expected = format!("FSX {} {:x}", fsx.len(), posix::hash(&fsx));
    assert!(
        console.iter().any(|line| line.contains(&expected)),
        "no {expected:?} in {console:#?}"
    );
}

#[test]
fn pjdfstest_passes_in_a_guest() {
    let what = "pjdfstest in a virtual machine";
    let pjdfstest = harness::cache().join("pjdfstest-0.2.2/bin/pjdfstest");
    if !pjdfstest.exists() {
        return skip(what, "scripts/test brings it, and has not been run");
    }
    with_kernels(what, |kernel, made| {
        pjdfstest_passes(&pjdfstest, kernel, made);
    });
}

fn pjdfstest_passes(pjdfstest: &Path, kernel: Kernel, made: &Path) {
    let home = home(|root| {
        install(pjdfstest, root, "pjdfstest");
        let config = repository("scripts/pjdfstest.toml");
        fs::copy(config, root.join("etc/pjdfstest.toml")).unwrap();
        let users =
            "root:x:0:0::/:/bin/sh\ndaemon:x:1:1::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n";
        fs::write(root.join("etc/passwd"), users).unwrap();
        let groups = "root:x:0:\ndaemon:x:1:\nnogroup:x:65534:\n";
        fs::write(root.join("etc/group"), groups).unwrap();
        fs::create_dir(root.join("work")).unwrap();
    });
    let (_dir, socket) = socket();
    let serve = [
        "store",
        "serve",
        "--image",
        IMAGE,
        "--socket",
        socket.to_str().unwrap(),
    ];
    let mut serving = home.start(&serve);
    serving.wait_for("fs.sock");
    // Tests that fail on the guest's tmpfs are the kernel's faults; the rest are ours.
    let vm = Vm::boot(
        kernel,
        made,
        &socket,
        r#"
            mkdir /dev/shm/work
            for dir in /work /dev/shm/work; do
                other=/dev/shm; [ $dir = /work ] || other=/work
                NO_COLOR=1 pjdfstest -c /etc/pjdfstest.toml -p $dir -s $other >/dev/shm/log 2>&1 || true
                grep '^Summary: ' /dev/shm/log
                awk -v dir=$dir '$NF == "FAILED" { print "FAILED", dir, $1 }' /dev/shm/log
            done
        "#,
    );
    let console = vm.finish();
    serving.finish(harness::LIMIT).ok();
    let failed = |dir: &str| -> Vec<&str> {
        let beginning = format!("FAILED {dir} ");
        let lines = console.iter();
        lines
            .filter_map(|line| line.strip_prefix(&beginning))
            .collect()
    };
    let plain = failed("/dev/shm/work");
    let mut ours = failed("/work");
    ours.retain(|name| !plain.contains(name));
    assert!(ours.is_empty(), "fails here and not on a tmpfs: {ours:#?}");
    let summaries = console.iter().filter(|line| line.starts_with("Summary: "));
    assert_eq!(summaries.count(), 2, "{console:#?}");
}

/// Requests by operation since `before`, where there were any, but those that ask a program that is
/// run for its capabilities, of which the kernel keeps nothing.
fn since(overlay: &Overlay, before: &[(&'static str, u64)]) -> Vec<(&'static str, u64)> {
    let now = overlay.stats().into_iter();
    now.zip(before)
        .map(|((name, now), (_, before))| (name, now - before))
        .filter(|(name, count)| *count != 0 && *name != "getxattr")
        .collect()
}

#[test]
fn what_a_guest_knows_it_does_not_ask_again() {
    with_kernels("requests of a virtual machine", asks_once);
}

fn asks_once(kernel: Kernel, made: &Path) {
    const PACKAGES: usize = 120;
    const FILES: usize = 18;
    let home = home(|root| {
        // As npm leaves it: many directories, few files in each, most of them small.
        for package in 0..PACKAGES {
            let dir = root.join(format!("node_modules/package-{package}"));
            fs::create_dir_all(dir.join("lib")).unwrap();
            fs::write(
                dir.join("package.json"),
                format!("{{\"version\":{package}}}"),
            )
            .unwrap();
            for file in 0..FILES {
                let text = format!("exports.{package} = {file};\n").repeat(1 + file * 9);
                fs::write(dir.join(format!("lib/{file}.js")), text).unwrap();
            }
        }
    });
    let overlay = Arc::new(overlay(&home, &home.path().join("upper")));
    let (_dir, path) = socket();
    let listening = Socket::bind(&path).unwrap();
    let (stop, _stopper) = std::os::unix::net::UnixStream::pair().unwrap();
    thread::scope(|scope| {
        let served = Arc::clone(&overlay);
        let server = scope.spawn(|| {
            use std::os::fd::AsFd as _;
            let tag: Tag = "root".parse().unwrap();
            vhost_user::serve(served, &listening, &tag, 4, stop.as_fd())
        });
        let mut vm = Vm::boot(
            kernel,
            made,
            &path,
            r#"
                phase() { echo "PHASE $1"; read go </dev/console; "$@" >/dev/null; }
                stats() { find /node_modules -size +100000; }
                reads() { find /node_modules -type f -exec cat {} +; }
                requires() {
                    for i in 1 2 3 4 5 6 7 8; do
                        cd /node_modules/package-$i
                        [ ! -e index.js ]; cat package.json lib/$i.js
                    done
                }
                find /tmp -size +1 -type f -exec cat {} + >/dev/null; cat /etc/passwd >/dev/null
                for i in 1 2 3; do phase stats; done
                for i in 1 2 3; do phase reads; done
                phase requires; phase requires; phase true
            "#,
        );
        let mut phases = Vec::new();
        let mut before = overlay.stats();
        for _ in 0..9 {
            vm.wait_for("PHASE ");
            phases.push(since(&overlay, &before));
            before = overlay.stats();
            vm.type_line("go");
        }
        vm.finish();
        assert_eq!(server.join().unwrap().unwrap(), End::Disconnected);

        // Those that bring entries, of which a page of the kernel's has room for 24, and those that
        // say that these were all.
        let (dirs, files) = (1 + 2 * PACKAGES, PACKAGES * (1 + FILES));
        let listings = 2 * dirs + PACKAGES / 24 + 1;
        let expected: [(&str, &[(&str, usize)]); 8] = [
            ("stats", &[("lookup", 1), ("readdir", listings)]),
            // The kernel has forgotten the atime of what it listed.
            ("stats", &[("getattr", dirs)]),
            ("stats", &[]),
            ("reads", &[("read", files)]),
            // And of what it read.
            ("reads", &[("getattr", files)]),
            ("reads", &[]),
            // An absent name is in no listing.
            ("requires", &[("lookup", 8)]),
            ("requires", &[]),
        ];
        // The first is the boot.
        for ((what, most), counts) in expected.into_iter().zip(&phases[1..]) {
            for (operation, count) in counts {
                let most = most.iter().find(|(name, _)| name == operation);
                let most = most.map_or(0, |(_, most)| *most as u64);
                assert!(
                    *count <= most,
                    "{operation}: {count} > {most} in {what}: {phases:#?}"
                );
            }
        }
    });
}

#[test]
fn a_signal_ends_serving() {
    let home = Home::with_busybox();
    let (_dir, socket) = socket();
    let arg = socket.to_str().unwrap();
    let serve = [
        "store",
        "serve",
        "--image",
        harness::NODE_IMAGE,
        "--socket",
        arg,
    ];
    for signal in [Signal::TERM, Signal::INT] {
        let mut serving = home.start(&serve);
        serving.wait_for("fs.sock");
        // A client has connected, and sends nothing.
        let connection = (signal == Signal::INT)
            .then(|| std::os::unix::net::UnixStream::connect(&socket).unwrap());
        serving.signal(signal);
        serving.finish(harness::LIMIT).ok().says(&["stopped"]);
        drop(connection);
        assert!(!socket.exists());
    }
    home.assert_nothing_left();

    // The socket of a killed server is no obstacle, and no other file is taken for it.
    let mut serving = home.start(&serve);
    serving.wait_for("fs.sock");
    serving.signal(Signal::KILL);
    serving.finish(harness::LIMIT);
    assert!(socket.exists());
    let mut serving = home.start(&serve);
    serving.wait_for("fs.sock");
    serving.signal(Signal::TERM);
    serving.finish(harness::LIMIT).ok();
    fs::write(&socket, "precious").unwrap();
    home.run(&serve).fails().says(&["is no socket"]);
    assert_eq!(fs::read_to_string(&socket).unwrap(), "precious");
    let tag = "t".repeat(37);
    let ended = home.run(&[
        "store", "serve", "--image", "x", "--socket", arg, "--tag", &tag,
    ]);
    ended.exits(2).says(&["a tag is 1 to 36 bytes"]);
}
