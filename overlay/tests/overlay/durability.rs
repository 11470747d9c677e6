//! Uppers on damaged, full and suddenly cut disks.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use iii_overlay::fs::{Caller, Errno, Filesystem as _, Rename, SetAttr, Special};
use iii_overlay::ino::{Ino, ROOT};
use iii_overlay::upper::{UpperError, UpperReport, check};
use iii_overlay::{OpenError, Overlay, OverlayOptions};

use crate::mounted::Mount;
use crate::powercut::{Again, copy_dir};
use crate::support::{Home, view};

const OTHER_BOOT: [u8; 16] = [2; 16];

fn make(overlay: &Overlay, name: &[u8]) -> Result<Ino, Errno> {
    let made = overlay.mknod(Caller::default(), ROOT, name, 0o644, Special::File)?;
    Ok(made.ino)
}

fn write(overlay: &Overlay, name: &[u8], bytes: &[u8]) -> Ino {
    let ino = make(overlay, name).unwrap();
    overlay.write(ino, bytes, 0, false).unwrap();
    ino
}

fn read(overlay: &Overlay, name: &[u8]) -> Vec<u8> {
    let attr = overlay.lookup(ROOT, name).unwrap();
    let mut bytes = vec![0; attr.size as usize];
    let count = overlay.read(attr.ino, &mut bytes, 0).unwrap();
    assert_eq!(count, bytes.len(), "stat and read agree");
    bytes
}

/// All files below a directory with their contents.
fn everything(dir: &Path) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(everything(&path));
        } else {
            let bytes = fs::read(&path).unwrap();
            found.push((path, bytes));
        }
    }
    found.sort();
    found
}

/// After a flipped bit of the log, no synced file is lost, or the upper does not open and nothing
/// in it is changed.
#[test]
fn a_flipped_bit_in_the_log_takes_nothing_that_was_synced() {
    let home = Home::new();
    let overlay = home.open(&[]);
    for n in 0..20 {
        let ino = write(&overlay, format!("f{n}").as_bytes(), b"contents");
        overlay.fsync(ino, false).unwrap();
    }
    let before = view(&overlay);
    let killed = home.dir.path().join("killed");
    copy_dir(&home.upper(), &killed);
    drop(overlay);
    let log = killed.join("log");
    let bytes = fs::read(&log).unwrap();
    let end = bytes.iter().rposition(|&byte| byte != 0).unwrap() + 1;
    let good = bytes[..end].to_vec();
    fs::write(&log, &good).unwrap();
    let report = UpperReport {
        inodes: 21,
        files: 20,
        ..UpperReport::default()
    };
    assert_eq!(check(&killed).unwrap(), report);
    let mut refused = 0;
    for at in 0..end {
        let mut bytes = good.clone();
        bytes[at] ^= 1 << (at % 8);
        fs::write(&log, &bytes).unwrap();
        let was = everything(&killed);
        match home.try_open(&[], &killed, OverlayOptions::default()) {
            Ok(opened) => assert_eq!(view(&opened), before, "byte {at}"),
            Err(OpenError::Upper(error)) => {
                refused += 1;
                assert!(check(&killed).is_err());
                assert_eq!(everything(&killed), was, "byte {at}: {error}");
                if at >= 12 {
                    assert!(
                        matches!(&error, UpperError::Damaged { path, offset }
                            if *path == log && *offset <= at as u64),
                        "byte {at}: {error:?}"
                    );
                }
            }
            Err(error) => panic!("{error:?}"),
        }
    }
    assert!(refused > end * 9 / 10, "{refused} of {end}");
    // Data is not removed either if the log that names it is missing.
    fs::write(&log, "").unwrap();
    let was = everything(&killed);
    assert!(
        home.try_open(&[], &killed, OverlayOptions::default())
            .is_err()
    );
    assert_eq!(everything(&killed), was);
}

/// The log grows by the changed parts of an inode alone.
#[test]
fn changing_an_owner_does_not_write_the_target_again() {
    const TARGET: usize = 4000;
    const TIMES: u32 = 100;
    let home = Home::new();
    let overlay = home.open(&[]);
    let target = vec![b't'; TARGET];
    let link = overlay.symlink(Caller::default(), ROOT, b"l", &target);
    let link = link.unwrap().ino;
    for uid in 0..TIMES {
        let set = SetAttr {
            uid: Some(uid),
            ..SetAttr::default()
        };
        overlay.setattr(link, &set).unwrap();
    }
    drop(overlay);
    let size = home.upper().join("log").metadata().unwrap().len();
    assert!(
        size < TARGET as u64 + u64::from(TIMES) * 80 + 1000,
        "{size}"
    );
}

/// After a clean end and a power cut, `stat` and `read` agree about every file: the times that tar
/// sets promise nothing about contents.
#[test]
fn a_length_whose_bytes_are_lost_is_not_told() {
    use iii_overlay::fs::{SetTime, Time};
    let home = Home::new();
    let overlay = home.open(&[]);
    for name in [&b"short"[..], b"gone", b"whole"] {
        let ino = write(&overlay, name, b"contents");
        let time = SetTime::At(Time { sec: 5, nsec: 0 });
        let set = SetAttr {
            mtime: Some(time),
            ..SetAttr::default()
        };
        overlay.setattr(ino, &set).unwrap();
    }
    drop(overlay);
    let shard = home.upper().join("data/0");
    let flat = |n: usize| shard.join(n.to_string());
    fs::write(flat(1), "con").unwrap();
    fs::remove_file(flat(2)).unwrap();
    for _ in 0..2 {
        let disk = Arc::new(Again(OTHER_BOOT));
        let overlay = home.open_on(disk, &[], &home.upper());
        assert_eq!(read(&overlay, b"short"), b"con");
        assert_eq!(read(&overlay, b"gone"), b"");
        assert_eq!(read(&overlay, b"whole"), b"contents");
        let mtime = |name| overlay.lookup(ROOT, name).unwrap().mtime.sec;
        assert_ne!(mtime(&b"short"[..]), 5);
        assert_eq!(mtime(&b"whole"[..]), 5);
        drop(overlay);
        // The log has it, too.
        let overlay = home.open(&[]);
        assert_eq!(read(&overlay, b"short"), b"con");
    }
}

/// On a completely full disk, each file can be removed, however many there are, and an upper opens
/// on other layers, or reports that it cannot.
#[test]
fn a_full_disk_can_be_emptied_file_by_file() {
    let home = Home::new();
    let upper = home.dir.path().join("small");
    let Some(mount) = Mount::new("emptying a full disk", "tmpfs", &upper, "size=8m") else {
        return;
    };
    let overlay = home.open_at(&[], &upper, OverlayOptions::default());
    let name = |n: usize| format!("a name of some length {n}").into_bytes();
    let mut made = 0;
    // Removing most of them frees nothing.
    while made < 12_000 {
        make(&overlay, &name(made)).unwrap();
        made += 1;
    }
    let big = make(&overlay, b"big").unwrap();
    let page = vec![1; 65_536];
    let mut at = 0;
    while let Ok(count) = overlay.write(big, &page, at, false) {
        at += count as u64;
    }
    while make(&overlay, &name(made)).is_ok() {
        made += 1;
    }
    let before = view(&overlay);
    drop(overlay);
    let mut tree = iii_store::tree::Tree::implicit();
    crate::support::put(&mut tree, b"other", b"");
    let other = [home.layer(&tree, &[])];
    if let Ok(opened) = home.try_open(&other, &upper, OverlayOptions::default()) {
        drop(opened);
    }
    assert!(!upper.join("log.new").exists());
    let overlay = home.open_at(&[], &upper, OverlayOptions::default());
    assert_eq!(view(&overlay).len(), before.len());
    for n in 0..made {
        let removed = overlay.unlink(ROOT, &name(n));
        assert_eq!(removed, Ok(()), "{n} of {made}");
    }
    overlay.unlink(ROOT, b"big").unwrap();
    let again = make(&overlay, b"again").unwrap();
    assert_eq!(overlay.write(again, &page, 0, false), Ok(page.len()));
    assert_eq!(view(&overlay).len(), 2);
    drop(overlay);
    drop(mount);
}

/// Shuts the filesystem down without a clean unmount, and without the data that is not in the
/// journal yet.
fn shut_down(at: &Path) {
    use std::os::fd::AsRawFd as _;
    const EXT4_IOC_SHUTDOWN: u64 = 0x8004_587d;
    const NOLOGFLUSH: u32 = 2;
    let dir = fs::File::open(at).unwrap();
    // SAFETY: the descriptor is open, and the call reads four bytes from the pointer.
    let done = unsafe {
        libc::ioctl(
            dir.as_raw_fd(),
            EXT4_IOC_SHUTDOWN as _,
            std::ptr::from_ref(&NOLOGFLUSH),
        )
    };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

/// A mounted ext4 in a file.
struct Disk<'a> {
    image: &'a Path,
    at: &'a Path,
}

impl<'a> Disk<'a> {
    fn mount(image: &'a Path, at: &'a Path) -> Result<Self, String> {
        run("mount", &["-o".as_ref(), "loop".as_ref(), image, at])?;
        Ok(Self { image, at })
    }

    fn cut(self, overlay: Overlay) -> Self {
        shut_down(self.at);
        // Dropping it fails to log anything.
        drop(overlay);
        let (image, at) = (self.image, self.at);
        drop(self);
        Disk::mount(image, at).unwrap()
    }
}

impl Drop for Disk<'_> {
    fn drop(&mut self) {
        let _ = run("umount", &[self.at]);
    }
}

fn run(program: &str, args: &[&Path]) -> Result<(), String> {
    let output = Command::new(program).args(args).output();
    let output = output.map_err(|error| format!("{program}: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    output
        .status
        .success()
        .then_some(())
        .ok_or_else(|| said.trim().into())
}

/// After a real power cut, a file that another was renamed over has the old or the new contents,
/// and a synced file is there.
#[test]
fn a_real_power_cut_leaves_old_or_new() {
    const FILES: usize = 20;
    let home = Home::new();
    let (image, at) = (home.dir.path().join("disk"), home.dir.path().join("at"));
    fs::create_dir(&at).unwrap();
    fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
    let made = run("mkfs.ext4", &["-q".as_ref(), &image]);
    let disk = match made.and_then(|()| Disk::mount(&image, &at)) {
        Ok(disk) => disk,
        Err(error) => {
            eprintln!("SKIPPED: a real power cut: {error}");
            return;
        }
    };
    let upper = at.join("upper");
    let again = || home.open_on(Arc::new(Again(OTHER_BOOT)), &[], &upper);
    let name = |n: usize| format!("cfg{n}").into_bytes();
    let overlay = home.open_at(&[], &upper, OverlayOptions::default());
    for n in 0..FILES {
        let ino = write(&overlay, &name(n), b"old");
        overlay.fsync(ino, false).unwrap();
    }
    let replace = |overlay: &Overlay, bytes: &[u8]| {
        for n in 0..FILES {
            write(overlay, b"tmp", bytes);
            let how = Rename::Replace;
            overlay.rename(ROOT, b"tmp", ROOT, &name(n), how).unwrap();
        }
    };
    replace(&overlay, b"new");
    let other = write(&overlay, b"other", b"synced");
    overlay.fsync(other, false).unwrap();
    let disk = disk.cut(overlay);
    let overlay = again();
    assert_eq!(read(&overlay, b"other"), b"synced");
    for n in 0..FILES {
        assert_eq!(read(&overlay, &name(n)), b"new", "the sync came after it");
    }
    replace(&overlay, b"newer");
    let disk = disk.cut(overlay);
    let overlay = again();
    for n in 0..FILES {
        let found = read(&overlay, &name(n));
        assert!(found == b"new" || found == b"newer", "{found:?}");
    }
    drop(overlay);
    drop(disk);
}
