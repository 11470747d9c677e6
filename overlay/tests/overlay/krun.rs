//! The adapter of microVMs, called as `msb_krun` calls it, without a microVM.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use iii_overlay::Overlay;
use iii_overlay::adapter::Mode;
use iii_overlay::adapter::krun::{Krun, RESERVED};
use iii_overlay::fs::{Errno, Filesystem as _, Kind};
use iii_overlay::ino::ROOT;
use iii_store::tree::Tree;
use msb_krun_devices::virtio::fs::dyn_filesystem::DynFileSystem as _;
use msb_krun_devices::virtio::fs::filesystem::{
    Context, Extensions, GetxattrReply, SetattrValid, ZeroCopyReader, ZeroCopyWriter,
};

use crate::support::{CONTENTS, Home, put};

const INIT: &[u8] = b"#!init";
const ME: Context = Context {
    uid: 7,
    gid: 8,
    pid: 1,
};

/// The memory of the guest for a request.
#[derive(Default)]
struct Memory(Vec<u8>);

impl ZeroCopyWriter for Memory {
    fn write_from(&mut self, file: &File, count: usize, offset: u64) -> io::Result<usize> {
        // It takes less than was asked, as memory in pieces does.
        let mut piece = vec![0; count.min(1000)];
        file.read_exact_at(&mut piece, offset)?;
        self.0.write(&piece)
    }
}

impl ZeroCopyReader for Memory {
    fn read_to(&mut self, file: &File, count: usize, offset: u64) -> io::Result<usize> {
        let count = count.min(self.0.len()).min(1000);
        file.write_all_at(&self.0[..count], offset)?;
        self.0.drain(..count);
        Ok(count)
    }
}

fn guest(mode: Mode) -> (Home, Arc<Overlay>, Krun<Overlay>) {
    let home = Home::new();
    let mut tree = Tree::default();
    put(&mut tree, b"dir/file", CONTENTS[1]);
    let overlay = Arc::new(home.open(&[home.layer(&tree, &CONTENTS)]));
    let krun = Krun::new(Arc::clone(&overlay), mode, INIT, home.dir.path()).unwrap();
    (home, overlay, krun)
}

fn name(name: &[u8]) -> CString {
    CString::new(name).unwrap()
}

fn errno<T>(result: io::Result<T>) -> Option<Errno> {
    result.err().and_then(|error| Errno::from_io_error(&error))
}

fn lookup(krun: &Krun<Overlay>, parent: u64, entry: &CStr) -> u64 {
    krun.lookup(ME, parent, entry).unwrap().inode
}

fn read(krun: &Krun<Overlay>, ino: u64, size: u32, offset: u64) -> Vec<u8> {
    let mut memory = Memory::default();
    let count = krun.read(ME, ino, 0, &mut memory, size, offset, None, 0);
    assert_eq!(count.unwrap(), memory.0.len());
    memory.0
}

#[test]
fn files_are_read_and_written() {
    let (_home, overlay, krun) = guest(Mode::Quiet);
    let dir = lookup(&krun, ROOT, c"dir");
    let file = lookup(&krun, dir, c"file");
    assert_eq!(read(&krun, file, 1 << 20, 0), CONTENTS[1]);

    let extensions = Extensions::default();
    let (entry, _, _) = krun
        .create(
            ME,
            dir,
            c"new",
            0o100_640,
            false,
            libc::O_RDWR as u32,
            0,
            extensions,
        )
        .unwrap();
    let bytes: Vec<u8> = (0..100_000_u32).map(|n| (n % 251) as u8).collect();
    let mut memory = Memory(bytes.clone());
    let size = bytes.len() as u32;
    let written = krun.write(
        ME,
        entry.inode,
        0,
        &mut memory,
        size,
        5,
        None,
        false,
        false,
        0,
    );
    assert_eq!(written.unwrap(), bytes.len());
    assert_eq!(read(&krun, entry.inode, 1 << 20, 5), bytes);
    // If a guest sends fewer bytes than it announces, the write has the sent bytes.
    let mut memory = Memory(b"xy".to_vec());
    let written = krun.write(
        ME,
        entry.inode,
        0,
        &mut memory,
        u32::MAX,
        0,
        None,
        false,
        false,
        0,
    );
    assert_eq!(written.unwrap(), 2);

    let attr = overlay.getattr(entry.inode).unwrap();
    assert_eq!((attr.uid, attr.gid, attr.mode), (7, 8, 0o640));
    let (stat, _) = krun.getattr(ME, entry.inode, None).unwrap();
    assert_eq!((stat.st_size, stat.st_mode), (100_005, 0o100_640));
    let mut set = stat;
    set.st_mtime = -5;
    set.st_mtime_nsec = 6;
    let (stat, _) = krun
        .setattr(ME, entry.inode, set, None, SetattrValid::MTIME)
        .unwrap();
    assert_eq!((stat.st_mtime, stat.st_mtime_nsec), (-5, 6));
    set.st_mtime_nsec = 1 << 31;
    let refused = krun.setattr(ME, entry.inode, set, None, SetattrValid::MTIME);
    assert_eq!(errno(refused), Some(Errno::INVAL));

    krun.setxattr(ME, entry.inode, c"user.a", b"value", 0)
        .unwrap();
    let size = |size| krun.getxattr(ME, entry.inode, c"user.a", size);
    assert!(matches!(size(0), Ok(GetxattrReply::Count(5))));
    assert!(matches!(size(5), Ok(GetxattrReply::Value(value)) if value == b"value"));
    assert_eq!(errno(size(4)), Some(Errno::RANGE));

    // Opening truncates the file, as msb_krun promises the guest.
    krun.open(
        ME,
        entry.inode,
        true,
        (libc::O_WRONLY | libc::O_TRUNC) as u32,
    )
    .unwrap();
    assert_eq!(overlay.getattr(entry.inode).unwrap().size, 0);
}

#[test]
fn the_init_is_there_and_in_nothing() {
    let (home, overlay, krun) = guest(Mode::Observed);
    let reserved = lookup(&krun, ROOT, &name(RESERVED.as_bytes()));
    let init = lookup(&krun, reserved, c"init");
    assert_eq!(read(&krun, init, 100, 0), INIT);
    assert_eq!(read(&krun, init, 3, 2), &INIT[2..5]);
    assert_eq!(read(&krun, init, 3, u64::MAX), b"");
    let (stat, _) = krun.getattr(ME, init, None).unwrap();
    assert_eq!((stat.st_mode, stat.st_size), (0o100_555, INIT.len() as i64));
    assert_eq!(lookup(&krun, reserved, c"other"), 0);

    let mut listed = Vec::new();
    krun.readdirplus_for_each(ME, ROOT, 0, 1 << 20, 0, &mut |entry, attr| {
        listed.push((entry.name.to_vec(), entry.type_, attr.inode != 0));
        Ok(1)
    })
    .unwrap();
    listed.sort();
    let dir = u32::from(libc::DT_DIR);
    let expected = [
        (b".".to_vec(), dir, false),
        (b"..".to_vec(), dir, false),
        (b"dir".to_vec(), dir, true),
    ];
    assert_eq!(listed, expected);

    // The guest cannot write to it, replace it or move it.
    let readonly = Some(Errno::ROFS);
    let at = |parent, entry: &[u8]| {
        krun.mkdir(ME, parent, &name(entry), 0o755, 0, Extensions::default())
    };
    assert_eq!(errno(at(ROOT, RESERVED.as_bytes())), readonly);
    assert_eq!(errno(at(reserved, b"more")), readonly);
    assert_eq!(errno(krun.unlink(ME, reserved, c"init")), readonly);
    assert_eq!(
        errno(krun.rename(ME, ROOT, c"dir", reserved, c"dir", 0)),
        readonly
    );
    assert_eq!(errno(krun.link(ME, init, ROOT, c"linked")), readonly);
    assert_eq!(
        errno(krun.open(ME, init, false, libc::O_WRONLY as u32)),
        readonly
    );
    let mut memory = Memory(b"x".to_vec());
    let written = krun.write(ME, init, 0, &mut memory, 1, 0, None, false, false, 0);
    assert_eq!(errno(written), readonly);
    krun.forget(ME, init, u64::MAX);
    assert_eq!(read(&krun, init, 100, 0), INIT);
    drop(krun);
    assert_eq!(overlay.lookup(ROOT, RESERVED.as_bytes()), Err(Errno::NOENT));
    assert!(home.frozen(&overlay).entries.is_empty());
}

#[test]
fn names_that_are_none_are_refused() {
    let (_home, overlay, krun) = guest(Mode::Quiet);
    let long = vec![b'n'; 300];
    for (bad, expected) in [
        (&b""[..], Errno::INVAL),
        (b"a/b", Errno::INVAL),
        (b"/", Errno::INVAL),
        (&long, Errno::NAMETOOLONG),
    ] {
        let bad = &name(bad);
        let none = Extensions::default;
        let results = [
            errno(krun.lookup(ME, ROOT, bad)),
            errno(krun.mkdir(ME, ROOT, bad, 0o755, 0, none())),
            errno(krun.mknod(ME, ROOT, bad, 0o644, 0, 0, none())),
            errno(krun.symlink(ME, c"target", ROOT, bad, none())),
            errno(krun.rename(ME, ROOT, c"dir", ROOT, bad, 0)),
        ];
        assert_eq!(results, [Some(expected); 5], "{bad:?}");
    }
    for dots in [c".", c".."] {
        let made = krun.mkdir(ME, ROOT, dots, 0o755, 0, Extensions::default());
        assert_eq!(errno(made), Some(Errno::INVAL));
    }
    // Every number gets a reply.
    for ino in [0, 2, 1 << 52, u64::MAX] {
        assert!(krun.getattr(ME, ino, None).is_err());
        assert!(krun.readlink(ME, ino).is_err());
        assert!(
            krun.copyfilerange(ME, ino, 0, u64::MAX, ino, 0, u64::MAX, u64::MAX, 0)
                .is_err()
        );
        assert!(
            krun.fallocate(ME, ino, 0, u32::MAX, u64::MAX, u64::MAX)
                .is_err()
        );
        assert!(krun.lseek(ME, ino, 0, u64::MAX, u32::MAX).is_err());
        krun.forget(ME, ino, u64::MAX);
    }
    assert_eq!(overlay.lookup(ROOT, b"dir").unwrap().kind, Kind::Dir);
}

#[test]
fn an_inode_is_found_by_its_number() {
    let (_home, _overlay, krun) = guest(Mode::Quiet);
    let dir = lookup(&krun, ROOT, c"dir");
    let file = lookup(&krun, dir, c"file");
    let reserved = lookup(&krun, ROOT, &name(RESERVED.as_bytes()));
    for ino in [ROOT, dir, file, reserved, lookup(&krun, reserved, c"init")] {
        assert_eq!(lookup(&krun, ino, c"."), ino);
    }
    assert_eq!(lookup(&krun, dir, c".."), ROOT);
}

/// A kernel announces a write by a user that may not keep setuid, and takes the mode from the
/// reply.
#[test]
fn privileges_go_when_the_kernel_announces_a_write() {
    let (_home, overlay, krun) = guest(Mode::Quiet);
    let dir = lookup(&krun, ROOT, c"dir");
    let file = lookup(&krun, dir, c"file");
    let set = iii_overlay::fs::SetAttr {
        mode: Some(0o6755),
        ..Default::default()
    };
    overlay.setattr(file, &set).unwrap();
    // SAFETY: the struct is made of integers alone.
    let nothing = unsafe { std::mem::zeroed() };
    let told = krun.setattr(ME, file, nothing, None, SetattrValid::empty());
    assert_eq!(told.unwrap().0.st_mode & 0o7777, 0o755);
}
