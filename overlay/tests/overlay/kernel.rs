//! Faults that the kernel has a part in: mounts of FUSE. They need root.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use iii_overlay::Overlay;
use iii_overlay::adapter::Mode;
use iii_overlay::fs::Filesystem as _;
use rustix::fs::{AtFlags, FallocateFlags, StatxFlags};
use rustix::process::{Gid, Uid};

use crate::mounted::Mount;
use crate::support::Home;

/// A mounted overlay that other users can get to. The mount goes before its directory.
struct Mounted {
    at: PathBuf,
    overlay: Arc<Overlay>,
    _mount: Mount,
    _home: Home,
}

fn mounted(what: &str, mode: Mode) -> Option<Mounted> {
    let home = Home::new();
    let open = fs::Permissions::from_mode(0o755);
    fs::set_permissions(home.dir.path(), open.clone()).unwrap();
    let overlay = Arc::new(home.open(&[]));
    let at = home.dir.path().join("mnt");
    let mount = Mount::fuse(what, &overlay, &at, mode)?;
    fs::set_permissions(&at, open).unwrap();
    Some(Mounted {
        at,
        overlay,
        _mount: mount,
        _home: home,
    })
}

/// Runs something as a user without privileges.
fn as_user<T: Send>(does: impl FnOnce() -> T + Send) -> T {
    let run = || {
        let id = 1000;
        let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
        rustix::thread::set_thread_res_gid(gid, gid, gid).unwrap();
        rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
        does()
    };
    std::thread::scope(|scope| scope.spawn(run).join().unwrap())
}

/// The mode that the kernel acts upon: what it knows, without asking.
fn known_mode(path: &Path) -> u32 {
    let cached = AtFlags::from_bits_retain(libc::AT_STATX_DONT_SYNC as u32);
    let stat = rustix::fs::statx(rustix::fs::CWD, path, cached, StatxFlags::MODE).unwrap();
    u32::from(stat.stx_mode) & 0o7777
}

fn writable(path: &Path) -> File {
    File::options().write(true).open(path).unwrap()
}

type Change = fn(&Path);

const CHANGES: [(&str, Change); 7] = [
    ("write", |path| {
        writable(path).write_all(b"#!/bin/sh").unwrap();
    }),
    ("direct write", |path| {
        let mut options = File::options();
        let file = options.write(true).custom_flags(libc::O_DIRECT).open(path);
        let page = vec![b'x'; 8192];
        let skip = page.as_ptr().align_offset(4096);
        file.unwrap()
            .write_all_at(&page[skip..skip + 4096], 0)
            .unwrap();
    }),
    ("truncate", |path| writable(path).set_len(3).unwrap()),
    ("open with O_TRUNC", |path| {
        File::options()
            .write(true)
            .truncate(true)
            .open(path)
            .unwrap();
    }),
    ("fallocate", |path| {
        rustix::fs::fallocate(writable(path), FallocateFlags::empty(), 0, 100).unwrap();
    }),
    ("punch", |path| {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(writable(path), flags, 0, 2).unwrap();
    }),
    ("copy_file_range", |path| {
        let other = File::open(path.with_file_name("other")).unwrap();
        let copied = rustix::fs::copy_file_range(other, None, writable(path), None, 5);
        assert_eq!(copied, Ok(5));
    }),
];

/// Before anything is written, the kernel no longer takes the file for one that runs as its owner.
#[test]
fn what_others_write_does_not_run_as_the_owner() {
    for mode in [Mode::Quiet, Mode::Observed] {
        let Some(mounted) = mounted("setuid", mode) else {
            return;
        };
        fs::write(mounted.at.join("other"), "other").unwrap();
        for (what, change) in CHANGES {
            for bits in [0o4777, 0o2777, 0o6777] {
                let path = mounted.at.join(format!("{what}{bits:o}"));
                fs::write(&path, "contents").unwrap();
                fs::set_permissions(&path, fs::Permissions::from_mode(bits)).unwrap();
                assert_eq!(known_mode(&path), bits);
                as_user(|| change(&path));
                assert_eq!(known_mode(&path), 0o777, "{what} of {bits:o}, {mode:?}");
                let told = path.metadata().unwrap().permissions().mode() & 0o7777;
                assert_eq!(told, 0o777, "{what} of {bits:o}, {mode:?}");
            }
        }
        let path = mounted.at.join("owner");
        fs::write(&path, "contents").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o6777)).unwrap();
        chown(&path, Some(7), None).unwrap();
        assert_eq!(known_mode(&path), 0o777);
        drop(mounted);
    }
}

/// As on ext4: root with its capabilities keeps them, but not those of the file.
#[test]
fn root_keeps_setuid_but_no_capabilities() {
    const CAPABILITY: &str = "security.capability";
    let Some(mounted) = mounted("capabilities", Mode::Quiet) else {
        return;
    };
    let path = mounted.at.join("f");
    fs::write(&path, "contents").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o4755)).unwrap();
    writable(&path).write_all(b"new").unwrap();
    assert_eq!(known_mode(&path), 0o4755);
    // VFS_CAP_REVISION_2 with CAP_CHOWN.
    let mut capability = [0; 20];
    (capability[3], capability[4]) = (2, 1);
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(&path, CAPABILITY, &capability, flags).unwrap();
    writable(&path).write_all(b"new").unwrap();
    let mut value = [0; 64];
    let left = rustix::fs::getxattr(&path, CAPABILITY, &mut value);
    assert_eq!(left, Err(rustix::io::Errno::NODATA));
    drop(mounted);
}

#[test]
fn an_inode_is_found_by_its_handle_when_the_kernel_forgot_it() {
    let Some(mounted) = mounted("handles", Mode::Quiet) else {
        return;
    };
    fs::create_dir(mounted.at.join("d")).unwrap();
    fs::write(mounted.at.join("d/f"), "contents").unwrap();
    let paths = ["d", "d/f"].map(|path| mounted.at.join(path));
    let handles = paths.each_ref().map(|path| handle(path));
    let inodes = paths.map(|path| path.metadata().unwrap().ino());
    let root = File::open(&mounted.at).unwrap();
    // Remounting drops the entries that are in no use. Their inodes go once their files are released, and the overlay hears of
    // it later still: the kernel waits for neither.
    let forget = |forgotten: &dyn Fn() -> bool| {
        let until = Instant::now() + PATIENCE;
        while !forgotten() {
            assert!(Instant::now() < until, "the kernel forgets nothing");
            let flags = rustix::mount::MountFlags::empty();
            rustix::mount::mount_remount(&mounted.at, flags, c"").unwrap();
            std::thread::yield_now();
        }
    };
    forget(&|| !inodes.iter().any(|ino| mounted.overlay.remembers(*ino)));
    let known = |overlay: &Overlay| {
        let stats = overlay.stats().into_iter();
        stats
            .filter(|(op, _)| *op == "lookup")
            .map(|(_, n)| n)
            .sum::<u64>()
    };
    let before = known(&mounted.overlay);
    let [dir, file] = handles.map(|handle| open_handle(&root, handle));
    assert!(known(&mounted.overlay) >= before + 2);
    let mut bytes = [0; 8];
    file.unwrap().read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"contents");
    let found = dir.unwrap().metadata().unwrap().ino();
    assert_eq!(found, mounted.at.join("d").metadata().unwrap().ino());
    // A removed file is found by no handle.
    let gone = handle(&mounted.at.join("d/f"));
    fs::remove_file(mounted.at.join("d/f")).unwrap();
    forget(&|| mounted.overlay.getattr(inodes[1]).is_err());
    let error = open_handle(&root, gone).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ESTALE));
    drop(root);
}

/// How long the kernel may take to forget an inode that is in no use.
const PATIENCE: Duration = Duration::from_secs(60);
const HANDLE: usize = 128;

#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Handle {
    bytes: u32,
    kind: i32,
    opaque: [u8; HANDLE],
}

fn handle(path: &Path) -> Handle {
    use std::os::unix::ffi::OsStrExt as _;
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    let mut handle = Handle {
        bytes: HANDLE as u32,
        kind: 0,
        opaque: [0; HANDLE],
    };
    let mut mount = 0;
    // SAFETY: the struct is laid out as `struct file_handle` with room for `bytes` bytes.
    let done = unsafe {
        libc::name_to_handle_at(
            libc::AT_FDCWD,
            path.as_ptr(),
            (&raw mut handle).cast(),
            &raw mut mount,
            0,
        )
    };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    handle
}

fn open_handle(mount: &File, mut handle: Handle) -> std::io::Result<File> {
    use std::os::fd::FromRawFd as _;
    // SAFETY: as above; no other owner has the descriptor that is returned.
    unsafe {
        let fd =
            libc::open_by_handle_at(mount.as_raw_fd(), (&raw mut handle).cast(), libc::O_RDONLY);
        if fd < 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok(File::from_raw_fd(fd))
    }
}

/// The earliest time that a program can name, and others around which a sign changes.
#[test]
fn any_time_can_be_set() {
    let Some(mounted) = mounted("times", Mode::Quiet) else {
        return;
    };
    let path = mounted.at.join("f");
    fs::write(&path, "").unwrap();
    for sec in [i64::MIN, i64::MIN + 1, -2, -1, 0, 1, i64::MAX - 1, i64::MAX] {
        for nsec in [0, 1, 999_999_999] {
            let time = rustix::fs::Timespec {
                tv_sec: sec,
                tv_nsec: nsec,
            };
            let times = rustix::fs::Timestamps {
                last_access: time,
                last_modification: time,
            };
            rustix::fs::utimensat(rustix::fs::CWD, &path, &times, AtFlags::empty()).unwrap();
            // The kernel has nothing to say of fractions at the ends.
            let nsec = if sec == i64::MIN || sec == i64::MAX {
                0
            } else {
                nsec
            };
            let stat = rustix::fs::stat(&path).unwrap();
            assert_eq!((stat.st_mtime, stat.st_mtime_nsec as i64), (sec, nsec));
        }
    }
    drop(mounted);
}

const WRITES: usize = 16;
const WRITE: usize = 64 << 10;

/// `struct iocb` and `struct io_event` of `linux/aio_abi.h`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Iocb {
    data: u64,
    key: u32,
    flags: u32,
    opcode: u16,
    priority: i16,
    file: u32,
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    more_flags: u32,
    eventfd: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct IoEvent {
    data: u64,
    iocb: u64,
    result: i64,
    more: i64,
}

const IOCB_CMD_PWRITE: u16 = 1;

/// Asynchronous direct writes of a whole file, all at once.
struct Aio(libc::c_ulong);

impl Aio {
    fn new() -> Self {
        let mut context: libc::c_ulong = 0;
        // SAFETY: `context` is zero, as the call wants it.
        let made = unsafe { libc::syscall(libc::SYS_io_setup, WRITES, &raw mut context) };
        assert_eq!(made, 0, "{}", std::io::Error::last_os_error());
        Self(context)
    }

    fn write(&self, file: &File, bytes: &[u8]) {
        assert_eq!(bytes.len(), WRITES * WRITE);
        let control = |number: usize| Iocb {
            opcode: IOCB_CMD_PWRITE,
            file: file.as_raw_fd() as u32,
            buffer: bytes[number * WRITE..].as_ptr() as u64,
            bytes: WRITE as u64,
            offset: (number * WRITE) as i64,
            ..Iocb::default()
        };
        let controls: [Iocb; WRITES] = std::array::from_fn(control);
        let list = controls.each_ref().map(std::ptr::from_ref);
        let mut events = [IoEvent::default(); WRITES];
        let none = std::ptr::null::<libc::timespec>();
        // SAFETY: the blocks and the bytes outlive the requests, all of which are waited for.
        unsafe {
            let sent = libc::syscall(libc::SYS_io_submit, self.0, WRITES, list.as_ptr());
            assert_eq!(sent, WRITES as i64, "{}", std::io::Error::last_os_error());
            let events = events.as_mut_ptr();
            let call = libc::SYS_io_getevents;
            let done = libc::syscall(call, self.0, WRITES, WRITES, events, none);
            assert_eq!(done, WRITES as i64);
        }
        assert!(events.iter().all(|event| event.result == WRITE as i64));
    }
}

impl Drop for Aio {
    fn drop(&mut self) {
        // SAFETY: no request is under way.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.0) };
    }
}

/// Buffered reads beside asynchronous direct writes leave nothing old in the page cache
/// (xfstests generic/451).
#[test]
fn direct_writes_are_seen_by_buffered_readers() {
    const ROUNDS: u8 = 200;
    let Some(mounted) = mounted("direct writes", Mode::Quiet) else {
        return;
    };
    let path = mounted.at.join("f");
    fs::write(&path, vec![0; WRITES * WRITE]).unwrap();
    let mut options = File::options();
    let direct = options.write(true).custom_flags(libc::O_DIRECT);
    let direct = direct.open(&path).unwrap();
    let aio = Aio::new();
    let memory = vec![0_u8; WRITES * WRITE + 4096];
    let skip = memory.as_ptr().align_offset(4096);
    let mut memory = memory;
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                fs::read(&path).unwrap();
            }
        });
        for round in 1..=ROUNDS {
            let bytes = &mut memory[skip..skip + WRITES * WRITE];
            bytes.fill(round);
            aio.write(&direct, bytes);
            let read = fs::read(&path).unwrap();
            let stale = read.iter().position(|&byte| byte != round);
            if stale.is_some() {
                stop.store(true, std::sync::atomic::Ordering::Relaxed);
            }
            assert_eq!(stale, None, "round {round}");
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}
