//! The same archive, unpacked here and extracted by GNU tar, gives the same tree.

use std::fs::{self, File, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, lchown, symlink};
use std::path::Path;
use std::process::Command;

use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};

use super::super::rootfs;
use super::*;

/// A directory with one of everything that its user may make.
pub fn fill(root: &Path, is_root: bool) {
    let write = |name: &str, bytes: &[u8]| fs::write(root.join(name), bytes).unwrap();
    fs::create_dir_all(root.join("usr/bin")).unwrap();
    fs::create_dir_all(root.join("var/empty")).unwrap();
    write("usr/bin/tool", b"#!/bin/sh\n");
    write("empty", b"");
    write("large", &b"0123456789abcdef".repeat(200_000));
    let sparse = File::create(root.join("sparse")).unwrap();
    for at in (0..40).map(|ix| ix * 300_000) {
        sparse.write_all_at(b"data", at).unwrap();
    }
    sparse.set_len(13_000_000).unwrap();
    fs::hard_link(root.join("usr/bin/tool"), root.join("usr/bin/same")).unwrap();
    symlink("usr/bin", root.join("bin")).unwrap();
    symlink("t".repeat(300), root.join("long target")).unwrap();
    fs::hard_link(root.join("bin"), root.join("bin2")).unwrap();
    let odd = std::ffi::OsStr::from_bytes(b"\xff\n\x01 odd");
    fs::write(root.join(odd), b"odd").unwrap();
    let long = root.join("l".repeat(255)).join("m".repeat(255));
    fs::create_dir_all(&long).unwrap();
    fs::write(long.join("n".repeat(255)), b"long").unwrap();
    fs::set_permissions(root.join("var/empty"), Permissions::from_mode(0o1770)).unwrap();
    fs::set_permissions(root.join("usr/bin/tool"), Permissions::from_mode(0o4711)).unwrap();
    let set = |name: &str, attr: &str, value: &[u8]| {
        rustix::fs::setxattr(root.join(name), attr, value, XattrFlags::empty()).unwrap();
    };
    set("empty", "user.note", b"a\nb=c\0d");
    set("var", "user.dir", b"1");
    if is_root {
        set("large", "trusted.x", b"y");
        set(
            "usr/bin/tool",
            "security.capability",
            b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
        );
        let node = |name: &str, kind, dev| {
            rustix::fs::mknodat(CWD, root.join(name), kind, Mode::from(0o640), dev).unwrap();
        };
        node("null", FileType::CharacterDevice, rustix::fs::makedev(1, 3));
        node("disk", FileType::BlockDevice, rustix::fs::makedev(259, 300));
        chown(root.join("empty"), Some(4_000_000), Some(65534)).unwrap();
        lchown(root.join("long target"), Some(3), Some(4)).unwrap();
        chown(root.join("var"), Some(5), Some(6)).unwrap();
    }
    rustix::fs::mknodat(CWD, root.join("pipe"), FileType::Fifo, Mode::from(0o600), 0).unwrap();
    let time = |name: &str, sec, nsec| {
        let time = Timespec {
            tv_sec: sec,
            tv_nsec: nsec,
        };
        let times = Timestamps {
            last_access: time,
            last_modification: time,
        };
        rustix::fs::utimensat(CWD, root.join(name), &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    };
    time("empty", -86_400, 250_000_000);
    time("long target", 1_000_000_000, 0);
    time("var/empty", 1, 999_999_999);
    time("usr", 2, 0);
}

pub fn take(test: &TestStore, root: &Path) -> Arc<Layer> {
    let lease = test.store.lease("test").unwrap();
    let ingest = test.store.ingest(&lease).unwrap();
    let taken = rootfs::take(root, &ingest, &Limits::default(), &|_| {}).unwrap();
    assert_eq!(taken.left_out, []);
    let published = ingest.finish(&taken.tree).unwrap();
    test.store.layer(&published.layer_id).unwrap()
}

pub fn run(command: &mut Command) {
    let output = command.output().unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{command:?}: {complaint}");
}

#[test]
fn an_archive_means_what_gnu_tar_makes_of_it() {
    let test = TestStore::new();
    let root = test.dir.path().join("root");
    fs::create_dir(&root).unwrap();
    let is_root = root.metadata().unwrap().uid() == 0;
    if !is_root {
        eprintln!("SKIPPED: owners, devices, trusted and security xattrs: needs root");
    }
    fill(&root, is_root);
    let taken = take(&test, &root);
    for (format, options) in [
        ("gnu", &[][..]),
        ("gnu", &["--sparse"]),
        ("oldgnu", &["--sparse"]),
        ("pax", &["--xattrs", "--xattrs-include=*"]),
        (
            "pax",
            &[
                "--xattrs",
                "--xattrs-include=*",
                "--sparse",
                "--sparse-version=0.0",
            ],
        ),
        (
            "pax",
            &[
                "--xattrs",
                "--xattrs-include=*",
                "--sparse",
                "--sparse-version=0.1",
            ],
        ),
        (
            "pax",
            &[
                "--xattrs",
                "--xattrs-include=*",
                "--sparse",
                "--sparse-version=1.0",
            ],
        ),
    ] {
        let archive = test.dir.path().join("archive.tar");
        run(Command::new("tar")
            .arg(format!("--format={format}"))
            .args(options)
            .arg("-C")
            .arg(&root)
            .arg("-cf")
            .args([archive.as_os_str(), ".".as_ref()]));
        let out = test.dir.path().join("out");
        fs::create_dir(&out).unwrap();
        run(Command::new("tar")
            .args(["--xattrs", "--xattrs-include=*", "-C"])
            .arg(&out)
            .arg("-xpf")
            .arg(&archive));
        let bytes = fs::read(&archive).unwrap();
        let (ours, _) = test
            .unpack(&bytes, Dialect::Rootfs, &Limits::default())
            .unwrap();
        let theirs = take(&test, &out);
        compare(&test, &ours, &theirs, format);
        if format == "pax" {
            compare(&test, &ours, &taken, "the directory itself");
        }
        fs::remove_dir_all(&out).unwrap();
    }
}

#[track_caller]
pub fn compare(test: &TestStore, ours: &Layer, theirs: &Layer, what: &str) {
    if ours.layer_id() != theirs.layer_id() {
        let (ours, theirs) = (test.show(ours), test.show(theirs));
        let differ = ours.iter().zip(&theirs).find(|(a, b)| a != b);
        panic!(
            "{what}: {differ:?}, {} and {} entries",
            ours.len(),
            theirs.len()
        );
    }
}

#[test]
fn what_cannot_be_taken_is_told() {
    let test = TestStore::new();
    let root = test.dir.path().join("root");
    fs::create_dir_all(root.join("run")).unwrap();
    let _listener = std::os::unix::net::UnixListener::bind(root.join("run/socket")).unwrap();
    symlink("/", root.join("out")).unwrap();
    symlink("loop", root.join("loop")).unwrap();
    let lease = test.store.lease("test").unwrap();
    let ingest = test.store.ingest(&lease).unwrap();
    let taken = rootfs::take(&root, &ingest, &Limits::default(), &|_| {}).unwrap();
    let expected = rootfs::LeftOut {
        path: root.join("run/socket"),
        why: "it is a socket",
    };
    assert_eq!(taken.left_out, [expected]);
    let names: Vec<_> = taken
        .tree
        .entries
        .iter()
        .map(|(name, _)| name.escape_ascii().to_string())
        .collect();
    assert_eq!(names, ["loop", "out", "run"]);
    let few = Limits {
        entries: 2,
        ..Limits::default()
    };
    let error = rootfs::take(&root, &ingest, &few, &|_| {}).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("the number of entries is over the limit of 2")
    );
}
