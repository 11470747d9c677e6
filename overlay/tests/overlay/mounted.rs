//! Overlays with a real kernel: mounts of FUSE and of a small tmpfs. They need root.

use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use iii_overlay::adapter::Mode;
use iii_overlay::adapter::fuse::{FuseSession, serve};
use iii_overlay::fs::{Caller, Errno, Filesystem, Special};
use iii_overlay::ino::ROOT;
use iii_overlay::{Overlay, OverlayOptions, Project};
use iii_store::tree::Tree;
use rustix::mount::{MountFlags, UnmountFlags};

use crate::support::{Home, put, view};

/// A mount that ends when this is dropped.
pub struct Mount {
    pub at: PathBuf,
    session: Option<FuseSession>,
}

impl Mount {
    pub fn new(what: &str, kind: &str, at: &Path, data: &str) -> Option<Self> {
        fs::create_dir_all(at).unwrap();
        let data = CString::new(data).unwrap();
        match rustix::mount::mount(kind, at, kind, MountFlags::empty(), Some(data.as_c_str())) {
            Ok(()) => Some(Self {
                at: at.to_path_buf(),
                session: None,
            }),
            Err(error) => {
                eprintln!("SKIPPED: {what}: mounting {kind}: {error}");
                None
            }
        }
    }

    pub fn fuse(what: &str, overlay: &Arc<Overlay>, at: &Path, mode: Mode) -> Option<Self> {
        let device = match File::options().read(true).write(true).open("/dev/fuse") {
            Ok(device) => device,
            Err(error) => {
                eprintln!("SKIPPED: {what}: opening /dev/fuse: {error}");
                return None;
            }
        };
        let data = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other",
            device.as_raw_fd()
        );
        let mut mount = Self::new(what, "fuse", at, &data)?;
        mount.session = Some(serve(Arc::clone(overlay), device.into(), 2, mode).unwrap());
        Some(mount)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.at, UnmountFlags::DETACH).unwrap();
        if let Some(session) = self.session.take() {
            session.join().unwrap();
        }
    }
}

fn counts(overlay: &Overlay) -> Vec<(&'static str, u64)> {
    overlay.stats()
}

fn walk(dir: &Path) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let meta = path.symlink_metadata().unwrap();
        if meta.is_dir() {
            walk(&path);
        } else if meta.is_file() {
            fs::read(&path).unwrap();
        }
        assert!(!dir.join("absent").exists());
    }
}

fn sample(home: &Home) -> Arc<iii_store::Layer> {
    let mut tree = Tree::implicit();
    let files: [(&[u8], &[u8]); 4] = [
        (b"w/package.json", b"{}"),
        (b"w/src/index.js", b"index"),
        (b"w/empty", b""),
        (b"etc/hosts", b"127.0.0.1"),
    ];
    for (path, bytes) in files {
        put(&mut tree, path, bytes);
    }
    home.layer(&tree, &files.map(|(_, bytes)| bytes))
}

#[test]
fn what_the_kernel_knows_it_does_not_ask_again() {
    let home = Home::new();
    let overlay = Arc::new(home.open(&[sample(&home)]));
    let at = home.dir.path().join("mnt");
    let Some(_mount) = Mount::fuse("cached reads", &overlay, &at, Mode::Quiet) else {
        return;
    };
    walk(&at);
    // The first read makes the kernel forget the time of the last access.
    walk(&at);
    let before = counts(&overlay);
    walk(&at);
    assert_eq!(counts(&overlay), before);
}

#[test]
fn an_update_shows_without_a_mount() {
    let home = Home::new();
    let project = |files: &[(&[u8], &[u8])]| {
        let mut tree = Tree::implicit();
        for (path, bytes) in files {
            put(&mut tree, path, bytes);
        }
        let contents: Vec<&[u8]> = files.iter().map(|(_, bytes)| *bytes).collect();
        home.layer(&tree, &contents)
    };
    let before = project(&[
        (b"w/src/a.js", b"a1"),
        (b"w/src/same.js", b"same"),
        (b"w/old/b.js", b"b1"),
        (b"w/turns", b"file"),
    ]);
    let after = project(&[
        (b"w/src/a.js", b"longer"),
        (b"w/src/same.js", b"same"),
        (b"w/src/new/c.js", b"c"),
        (b"w/turns/into", b"dir"),
    ]);
    let options = OverlayOptions {
        project: Some(Project {
            path: b"w".to_vec(),
            slot: 1,
        }),
        ..OverlayOptions::default()
    };
    let layers = [home.layer(&Tree::implicit(), &[]), before];
    let overlay = Arc::new(home.open_at(&layers, &home.upper(), options));
    let at = home.dir.path().join("mnt");
    let Some(mount) = Mount::fuse("an update", &overlay, &at, Mode::Quiet) else {
        return;
    };
    let at = at.join("w");
    fs::write(at.join("src/own"), "own").unwrap();
    // The kernel knows all entries, and knows that no others exist.
    walk(&at);
    walk(&at);
    assert!(!at.join("src/new").exists());
    let same = at.join("src/same.js").metadata().unwrap().ino();
    let open = File::open(at.join("src/a.js")).unwrap();
    let dir = File::open(at.join("old")).unwrap();

    let stale = overlay.update(&after).unwrap();
    mount
        .session
        .as_ref()
        .unwrap()
        .forgetter()
        .forget(&stale)
        .unwrap();

    let read = |path: &str| fs::read_to_string(at.join(path)).unwrap();
    let names = |path: &str| {
        let entries = fs::read_dir(at.join(path)).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(read("src/a.js"), "longer");
    assert_eq!(at.join("src/a.js").metadata().unwrap().len(), 6);
    assert_eq!(read("src/new/c.js"), "c");
    assert_eq!(read("turns/into"), "dir");
    assert_eq!(read("src/own"), "own");
    assert_eq!(names(""), ["src", "turns"]);
    assert_eq!(names("src"), ["a.js", "new", "own", "same.js"]);
    assert!(!at.join("old").exists());
    assert_eq!(at.join("src/same.js").metadata().unwrap().ino(), same);
    // An open file keeps its contents.
    let mut bytes = [0; 2];
    open.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"a1");
    drop((open, dir));
    // The kernel still knows the entries that it has learned since.
    walk(&at);
    walk(&at);
    let counted = counts(&overlay);
    walk(&at);
    assert_eq!(counts(&overlay), counted);
}

#[test]
fn programs_see_files() {
    let home = Home::new();
    let layers = [sample(&home)];
    let overlay = Arc::new(home.open(&layers));
    let at = home.dir.path().join("mnt");
    let Some(mount) = Mount::fuse("files", &overlay, &at, Mode::Quiet) else {
        return;
    };
    let index = at.join("w/src/index.js");
    let ino = index.metadata().unwrap().ino();
    let open = File::options().read(true).write(true).open(&index).unwrap();
    open.write_all_at(b"!", 5).unwrap();
    assert_eq!(fs::read(&index).unwrap(), b"index!");
    assert_eq!(index.metadata().unwrap().ino(), ino);
    fs::rename(at.join("w/src"), at.join("moved")).unwrap();
    fs::remove_file(at.join("moved/index.js")).unwrap();
    assert_eq!(open.metadata().unwrap().nlink(), 0);
    let mut bytes = [0; 6];
    open.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"index!");
    drop(open);
    fs::write(at.join("w/package.json"), b"new").unwrap();
    fs::hard_link(at.join("w/package.json"), at.join("link")).unwrap();
    assert_eq!(at.join("link").metadata().unwrap().nlink(), 2);
    let mode = fs::Permissions::from_mode(0o4755);
    fs::set_permissions(at.join("link"), mode).unwrap();
    std::os::unix::fs::symlink("link", at.join("sym")).unwrap();
    assert_eq!(fs::read(at.join("sym")).unwrap(), b"new");
    File::open(at.join("link")).unwrap().sync_all().unwrap();
    assert!(fs::remove_dir(at.join("w")).is_err());
    fs::create_dir(at.join("w/src")).unwrap();
    let names = || {
        let names = fs::read_dir(at.join("w")).unwrap();
        let mut names: Vec<_> = names.map(|name| name.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names(), ["empty", "package.json", "src"]);
    drop(mount);
    let seen = view(&*overlay);
    drop(overlay);
    assert_eq!(view(&home.open(&layers)), seen);
}

#[test]
fn the_kernel_hides_no_look_of_a_build_step() {
    let home = Home::new();
    let options = OverlayOptions {
        project: Some(Project {
            path: b"w".to_vec(),
            slot: 0,
        }),
        observe: true,
        volatile: true,
        ..OverlayOptions::default()
    };
    let overlay = home.open_at(&[sample(&home)], &home.upper(), options);
    let overlay = Arc::new(overlay);
    let at = home.dir.path().join("mnt");
    let Some(_mount) = Mount::fuse("facts", &overlay, &at, Mode::Observed) else {
        return;
    };
    // Listing yields the names only.
    assert_eq!(fs::read_dir(at.join("w")).unwrap().count(), 3);
    let paths = || -> Vec<_> {
        let facts = overlay.facts().into_iter();
        facts
            .map(|fact| String::from_utf8(fact.path).unwrap())
            .collect()
    };
    assert_eq!(paths(), [""]);
    assert!(at.join("w/package.json").exists());
    assert_eq!(paths(), ["", "package.json"]);
    fs::read(at.join("w/empty")).unwrap();
    assert_eq!(paths(), ["", "empty", "package.json"]);
    fs::write(at.join("w/made"), b"x").unwrap();
    fs::read(at.join("w/made")).unwrap();
    fs::read(at.join("etc/hosts")).unwrap();
    // The recorded fact is that it was absent before.
    assert_eq!(paths(), ["", "empty", "made", "package.json"]);
}

#[test]
fn a_full_disk_is_enospc_and_can_be_emptied() {
    let home = Home::new();
    let upper = home.dir.path().join("small");
    let Some(_mount) = Mount::new("a full disk", "tmpfs", &upper, "size=4m") else {
        return;
    };
    let overlay = home.open_at(&[], &upper, OverlayOptions::default());
    let create = |name: &[u8]| overlay.mknod(Caller::default(), ROOT, name, 0o644, Special::File);
    let big = create(b"big").unwrap().ino;
    let page = vec![1; 65_536];
    let mut at = 0;
    let full = loop {
        match overlay.write(big, &page, at, true) {
            Ok(count) => at += count as u64,
            Err(error) => break error,
        }
    };
    assert_eq!(full, Errno::NOSPC);
    assert_eq!(overlay.getattr(big).unwrap().size, at);
    let mut made = 0_u32;
    let full = loop {
        match create(format!("f{made}").as_bytes()) {
            Ok(_) => made += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(full, Errno::NOSPC);
    assert!(made > 0);
    let before = view(&overlay);
    drop(overlay);
    let overlay = home.open_at(&[], &upper, OverlayOptions::default());
    assert_eq!(view(&overlay), before);
    overlay.unlink(ROOT, b"big").unwrap();
    let create = |name: &[u8]| overlay.mknod(Caller::default(), ROOT, name, 0o644, Special::File);
    let again = create(b"again").unwrap().ino;
    assert_eq!(overlay.write(again, &page, 0, true), Ok(65_536));
    drop(overlay);
}
