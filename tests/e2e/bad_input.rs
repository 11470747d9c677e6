//! Projects, images and machines that are not as they should be.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufWriter, Write as _};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use rustix::mount::{MountFlags, mount};
use tempfile::TempDir;

use crate::harness::{Home, LIMIT, Project, is_root, skip};

/// The fault, the project's only file and its text, and the words of the error.
type Case<'a> = (&'a str, Option<(&'a str, &'a str)>, &'a [&'a str]);

#[test]
fn a_project_that_cannot_be_opened() {
    let home = Home::with_busybox();
    let long = format!("name: box\ndescription: {}\n", "x".repeat(65 << 10));
    let cases: &[Case] = &[
        ("an empty directory", None, &["empty", "package.json"]),
        (
            "an unknown type",
            Some(("notes.txt", "")),
            &["package.json", "Cargo.toml", "pyproject.toml"],
        ),
        (
            "an unknown key",
            Some(("iii.worker.yaml", "name: box\nresource:\n  cpus: 1\n")),
            &["iii.worker.yaml:2", "resource"],
        ),
        (
            "a wrong type",
            Some((
                "iii.worker.yaml",
                "name: box\nruntime:\n  kind: javascript\nresources:\n  memory: lots\n",
            )),
            &["iii.worker.yaml:5", "memory"],
        ),
        (
            "no name",
            Some(("iii.worker.yaml", "runtime:\n  kind: javascript\n")),
            &["iii.worker.yaml", "name"],
        ),
        (
            "too long",
            Some(("iii.worker.yaml", &long)),
            &["iii.worker.yaml", "65536"],
        ),
        (
            "not YAML",
            Some(("iii.worker.yaml", "name: [box\n")),
            &["iii.worker.yaml"],
        ),
    ];
    for (what, file, says) in cases {
        let project = Project::empty();
        if let Some((name, text)) = file {
            project.write(name, text);
        }
        for command in ["build", "dev"] {
            eprintln!("{what}, worker {command}");
            home.run(&["worker", command, project.arg()])
                .fails()
                .says(says);
        }
    }
    home.run(&["worker", "dev", "/nonexistent/project"])
        .fails()
        .says(&["/nonexistent/project"]);
}

#[test]
fn a_missing_base_says_how_to_get_one() {
    let home = Home::new();
    let project = Project::scripts("true", "true", "true");
    // No process listens there, and no host can have that name.
    for image in ["127.0.0.1:1/some/image:1", "registry.invalid/some/image:1"] {
        let args = ["worker", "build", project.arg(), "--base", image];
        home.run(&args).fails().says(&[image, "iii image import"]);
    }
}

#[test]
fn names_and_links_that_are_odd_are_simply_right() {
    let home = Home::with_busybox();
    let project = Project::scripts(
        "true",
        "true",
        "ls -A | wc -l; cat *.odd; readlink loop; readlink dangling; test ! -e socket && echo no socket; echo started; exec sleep 1000",
    );
    let mut name = vec![0xff_u8; 251];
    name.extend(b".odd");
    fs::write(
        project.path().join(OsStr::from_bytes(&name)),
        "odd contents\n",
    )
    .unwrap();
    symlink("loop", project.path().join("loop")).unwrap();
    symlink("/nowhere", project.path().join("dangling")).unwrap();
    let _socket = UnixListener::bind(project.path().join("socket")).unwrap();
    let mut dev = home.dev(&project, &[]);
    dev.wait_for("4");
    dev.wait_for("odd contents");
    dev.wait_for("loop");
    dev.wait_for("/nowhere");
    dev.wait_for("no socket");
    dev.wait_for("started");
    let ended = dev.stop();
    assert!(ended.stderr.contains("socket"), "{}", ended.stderr);
    assert_eq!(home.build(&project, &[]).built(), "");
}

#[test]
fn a_start_command_that_ends_at_once() {
    let home = Home::with_busybox();
    let project = Project::scripts("true", "true", "no-such-program");
    home.run(&["worker", "dev", project.arg()])
        .exits(127)
        .says(&["no-such-program", "127"]);
}

#[test]
fn excluded_directories_are_left_out() {
    let home = Home::with_busybox();
    let project = Project::scripts(
        "true",
        "true",
        "find . | sort | tr '\\n' ' '; echo; exec sleep 1000",
    );
    for name in [
        "node_modules/a",
        "sub/node_modules/b",
        ".git/c",
        "target/d",
        "__pycache__/e",
        ".venv/f",
        "dist/g",
        "sub/kept",
    ] {
        project.write(name, "");
    }
    let mut dev = home.dev(&project, &[]);
    dev.wait_for(". ./iii.worker.yaml ./sub ./sub/kept");
    dev.stop();
}

#[test]
fn a_full_disk() {
    if !is_root() {
        skip("a full disk", "needs root to mount a small tmpfs");
        return;
    }
    let home = Home::new();
    fs::create_dir(home.state()).unwrap();
    mount(
        "tmpfs",
        home.state(),
        "tmpfs",
        MountFlags::empty(),
        Some(c"size=48m"),
    )
    .unwrap();
    home.import_busybox();

    // In the sandbox: the writer hears of it, and the sandbox goes on.
    let project = Project::scripts(
        "true",
        "echo installed >installed.txt",
        "dd if=/dev/zero of=/big bs=1M count=100 2>&1 || true; cat installed.txt; rm -f /big; echo again >/small && cat /small; exec sleep 1000",
    );
    let mut dev = home.dev(&project, &[]);
    dev.wait_for("No space left on device");
    dev.wait_for("installed");
    dev.wait_for("again");
    dev.stop();
    assert_eq!(home.build(&project, &[]).built(), "");

    // In a step: it fails, commits nothing, and gives the space back.
    project.edit(
        "iii.worker.yaml",
        "echo installed",
        "dd if=/dev/zero of=big bs=1M count=100; echo installed",
    );
    home.run(&["worker", "build", project.arg()])
        .fails()
        .says(&["No space left on device"]);
    project.edit("iii.worker.yaml", "count=100", "count=1");
    assert_eq!(home.build(&project, &[]).built(), "project install");

    // In the project itself, on its way into the store.
    let big: Vec<u8> = (0..60_u32 << 20 >> 2)
        .flat_map(|n| n.wrapping_mul(0x9e37_79b9).to_le_bytes())
        .collect();
    fs::write(project.path().join("big-file"), big).unwrap();
    home.run(&["worker", "build", project.arg()])
        .fails()
        .says(&["No space left on device"]);
    project.remove("big-file");
    assert_eq!(home.build(&project, &[]).bytes(), 0);
}

/// A home whose runs have this in their environment.
fn home_with(variable: &str) -> Home {
    let program = ["/usr/bin/env", variable, env!("CARGO_BIN_EXE_iii")];
    Home::through(
        TempDir::with_prefix("home-").unwrap(),
        program.map(PathBuf::from).to_vec(),
    )
}

/// An archive with a file below `usr` and directories of two letters.
fn deep_archive(dir: &Path, depth: usize) -> PathBuf {
    let path = dir.join(format!("{depth}.tar"));
    fs::create_dir_all(dir.join("usr")).unwrap();
    fs::write(dir.join("usr/file"), "").unwrap();
    let transform = format!("--transform=s,^usr/file,usr/{}file,", "ab/".repeat(depth));
    let made = Command::new("tar")
        .args(["--format=pax", &transform, "-C"])
        .args([dir.as_os_str(), "-cf".as_ref(), path.as_os_str()])
        .arg("usr")
        .status()
        .unwrap();
    assert!(made.success());
    path
}

#[test]
fn limits_are_told_and_raised() {
    let dir = TempDir::new().unwrap();
    let archive = deep_archive(dir.path(), 1800);
    let import = ["image", "import", archive.to_str().unwrap(), "--as", "deep"];
    let with = |more: &[&'static str]| [&import[..], more].concat();
    let home = Home::new();
    home.run(&import).fails().says(&[
        "the length of its name is over the limit of 4096 (path)",
        "--limit path=8KiB",
    ]);
    home.run(&with(&["--limit", "entries=9000", "--limit", "path=8KiB"]))
        .ok();
    home.run(&with(&["--limit", "path=8KiB", "--limit", "entries=100"]))
        .fails()
        .says(&[
            "the number of entries is over the limit of 100 (entries)",
            "--limit entries=200",
        ]);
    for (text, says) in [
        ("depth=1", "no limit is called \"depth\""),
        ("bytes=1YB", "bytes takes a size, as in bytes=20MiB"),
        ("entries=0", "entries must be from 1"),
        ("entries", "the names are entries, path, metadata"),
    ] {
        home.run(&with(&["--limit", text])).exits(2).says(&[says]);
        let home = home_with(&format!("III_LIMITS={text}"));
        home.run(&import).fails().says(&["III_LIMITS", says]);
    }
    // The variable alone, and what the command line says before it.
    let home = home_with("III_LIMITS=path=8KiB,entries=100");
    home.run(&import).fails().says(&["--limit entries=200"]);
    home.run(&with(&["--limit", "entries=9000"])).ok();
    // No flag lets a store have what it cannot.
    let archive = deep_archive(dir.path(), 2100);
    let import = ["image", "import", archive.to_str().unwrap(), "--as", "deep"];
    let ended = home
        .run(&[&import[..], &["--limit", "entries=9000"]].concat())
        .fails()
        .says(&["the depth of its directories is over the limit of 2048, which cannot be raised"]);
    assert!(!ended.stderr.contains("--limit"), "{}", ended.stderr);
}

/// The most memory that a process has had so far, in KiB; nothing once it has ended.
fn peak_memory(pid: i32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().trim_end_matches(" kB").parse().ok()
}

/// Imports an archive of so many empty files, a hundred in a directory. Returns the most memory
/// that it took, in KiB.
fn import_many(entries: u32, limit: Duration) -> u64 {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("many.tar");
    let mut archive = BufWriter::new(fs::File::create(&path).unwrap());
    let mut block = [0_u8; 512];
    block[100..107].copy_from_slice(b"0000644");
    for at in [108, 116] {
        block[at..at + 7].copy_from_slice(b"0000000");
    }
    for at in [124, 136] {
        block[at..at + 11].copy_from_slice(b"00000000000");
    }
    block[156] = b'0';
    block[257..265].copy_from_slice(b"ustar\x0000");
    // With their directories, `usr` and the root.
    for ix in 0..entries - entries / 101 - 4 {
        let name = format!("usr/{:08x}/{:048x}", ix / 100, ix);
        block[..name.len()].copy_from_slice(name.as_bytes());
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        archive.write_all(&block).unwrap();
    }
    archive.write_all(&[0; 1024]).unwrap();
    drop(archive);
    let home = Home::new();
    let mut running = home.start(&["image", "import", path.to_str().unwrap(), "--as", "many"]);
    let mut peak = 0;
    while running.is_running() {
        peak = peak_memory(running.pid()).map_or(peak, |memory| memory.max(peak));
        thread::sleep(Duration::from_millis(2));
    }
    running.finish(limit).ok();
    assert!(peak > 0);
    peak
}

#[test]
fn many_entries_take_little_memory() {
    let peak = import_many(100_000, LIMIT);
    assert!(peak < 64 << 10, "{peak} KiB");
}

/// As many as a layer can have.
#[test]
#[ignore = "takes a minute"]
fn a_million_entries_take_256_mib() {
    let peak = import_many(1 << 20, 3 * LIMIT);
    assert!(peak < 256 << 10, "{peak} KiB");
}
