//! Operations on a filesystem that shell commands cannot do, against a model in memory. Runs
//! here on a plain directory, which shows that the exerciser is right, and inside virtual machines
//! on the overlay: see [`crate::vm`].

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use memmap2::{MmapMut, MmapOptions};
use rustix::fs::{AtFlags, CWD, FallocateFlags, FlockOperation, Mode, OFlags, XattrFlags};
use rustix::io::Errno;

/// The directory to work in, where this program runs inside of something.
pub const DIR: &str = "TEST_POSIX_DIR";
/// How many operations [`fsx`] does.
const OPS: &str = "TEST_POSIX_OPS";

/// Longest that the file gets.
const MAX_LEN: usize = 256 << 10;
/// Longest range of one operation.
const MAX_RANGE: usize = 24 << 10;

/// The file that [`fsx`] leaves behind.
pub const FSX: &str = "fsx";

fn place() -> (Option<tempfile::TempDir>, PathBuf) {
    if let Some(dir) = std::env::var_os(DIR) {
        return (None, dir.into());
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    (Some(dir), path)
}

/// xorshift64
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }
}

/// A hash that says whether two runs left the same bytes: FNV-1a.
pub fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

struct Fsx {
    path: PathBuf,
    file: File,
    model: Vec<u8>,
    random: Random,
    /// The last operations, for the message of a failure.
    log: Vec<String>,
}

impl Fsx {
    fn range(&mut self) -> (usize, usize) {
        let at = self.random.below(MAX_LEN - 1);
        let len = 1 + self.random.below(MAX_RANGE.min(MAX_LEN - at));
        (at, len)
    }

    /// A range within the file, unless that is empty.
    fn range_inside(&mut self) -> Option<(usize, usize)> {
        let size = self.model.len();
        let at = self.random.below(size);
        let len = 1 + self.random.below(MAX_RANGE.min(size - at.min(size)).max(1));
        (at + len <= size).then_some((at, len))
    }

    fn grow(&mut self, end: usize) {
        if self.model.len() < end {
            self.model.resize(end, 0);
        }
    }

    fn map(&self) -> MmapMut {
        // SAFETY: only this process has the file, and it is not shortened before the mapping goes.
        unsafe { MmapOptions::new().map_mut(&self.file) }.unwrap()
    }

    fn fallocate(&mut self, flags: FallocateFlags, at: usize, len: usize) -> bool {
        match rustix::fs::fallocate(&self.file, flags, at as u64, len as u64) {
            Ok(()) => true,
            // Not every filesystem below has all of them.
            Err(Errno::OPNOTSUPP) => false,
            Err(error) => self.fail(&format!("fallocate: {error}")),
        }
    }

    fn fail(&self, what: &str) -> ! {
        let last = self.log.len().saturating_sub(20);
        panic!("{what}, after {:#?}", &self.log[last..]);
    }

    fn check(&self, at: usize, len: usize) {
        let mut bytes = vec![0xee; len];
        let end = self.model.len().min(at + len);
        let expected = self.model.get(at..end).unwrap_or_default();
        let mut read = 0;
        while read < len {
            match self.file.read_at(&mut bytes[read..], (at + read) as u64) {
                Ok(0) => break,
                Ok(count) => read += count,
                Err(error) => self.fail(&format!("reading: {error}")),
            }
        }
        if bytes[..read] != *expected {
            let differs = bytes.iter().zip(expected).position(|(a, b)| a != b);
            self.fail(&format!(
                "{len} bytes at {at} differ at {differs:?}, {read} were read"
            ));
        }
    }

    fn step(&mut self) {
        let op = self.random.below(12);
        let (at, len) = self.range();
        let inside = self.range_inside();
        self.log.push(format!(
            "op {op} {at}+{len} {inside:?} of {}",
            self.model.len()
        ));
        match op {
            0 | 1 => {
                let byte = self.random.next() as u8;
                let bytes: Vec<u8> = (0..len).map(|i| byte.wrapping_add(i as u8)).collect();
                self.file.write_all_at(&bytes, at as u64).unwrap();
                self.grow(at + len);
                self.model[at..at + len].copy_from_slice(&bytes);
            }
            2 | 3 => self.check(at, len),
            4 => {
                self.file.set_len(at as u64).unwrap();
                self.model.resize(at, 0);
            }
            5 => {
                if let Some((at, len)) = inside {
                    let map = self.map();
                    if map[at..at + len] != self.model[at..at + len] {
                        self.fail("a mapping says something else");
                    }
                }
            }
            6 => {
                if let Some((at, len)) = inside {
                    let byte = self.random.next() as u8;
                    let mut map = self.map();
                    map[at..at + len].fill(byte);
                    if self.random.below(2) == 0 {
                        map.flush().unwrap();
                    }
                    drop(map);
                    self.model[at..at + len].fill(byte);
                }
            }
            7 => {
                if self.fallocate(FallocateFlags::empty(), at, len) {
                    self.grow(at + len);
                }
            }
            8 => {
                self.fallocate(FallocateFlags::KEEP_SIZE, at, len);
            }
            9 => {
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                if self.fallocate(flags, at, len) {
                    let end = self.model.len().min(at + len);
                    self.model.get_mut(at..end).unwrap_or_default().fill(0);
                }
            }
            10 => {
                if self.fallocate(FallocateFlags::ZERO_RANGE, at, len) {
                    self.grow(at + len);
                    self.model[at..at + len].fill(0);
                }
            }
            _ => match self.random.below(3) {
                0 => self.file.sync_data().unwrap(),
                1 => self.file = open(&self.path),
                _ => {
                    let size = self.file.metadata().unwrap().len();
                    if size != self.model.len() as u64 {
                        self.fail(&format!("the file has {size} bytes"));
                    }
                }
            },
        }
    }
}

fn open(path: &Path) -> File {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    options.open(path).unwrap()
}

/// Does what fsx does: reads, writes, maps, truncates, allocates and punches one file at random,
/// and compares.
#[test]
fn fsx() {
    let (_temporary, dir) = place();
    let ops = std::env::var(OPS).map_or(3000, |ops| ops.parse().unwrap());
    let path = dir.join(FSX);
    // The file belongs to a layer, and is to be copied up.
    let model = fs::read(&path).unwrap_or_default();
    let mut fsx = Fsx {
        file: open(&path),
        path,
        model,
        random: Random(0x5eed_0f75),
        log: Vec::new(),
    };
    for _ in 0..ops {
        fsx.step();
    }
    fsx.file = open(&fsx.path);
    fsx.check(0, MAX_LEN);
    println!("FSX {} {:x}", fsx.model.len(), hash(&fsx.model));
}

/// The rest: files without names, locks, xattrs, copies, holes, links, modes.
#[test]
fn calls() {
    let (_temporary, dir) = place();
    let at = |name: &str| dir.join(name);

    // A file without a name gets one.
    let flags = OFlags::TMPFILE | OFlags::RDWR;
    let nameless = rustix::fs::open(&dir, flags, Mode::from(0o640)).unwrap();
    let mut nameless = File::from(nameless);
    nameless.write_all(b"named later").unwrap();
    assert_eq!(nameless.metadata().unwrap().nlink(), 0);
    let link = format!(
        "/proc/self/fd/{}",
        std::os::fd::AsRawFd::as_raw_fd(&nameless)
    );
    rustix::fs::linkat(CWD, &link, CWD, at("named"), AtFlags::SYMLINK_FOLLOW).unwrap();
    assert_eq!(fs::read(at("named")).unwrap(), b"named later");
    assert_eq!(fs::metadata(at("named")).unwrap().mode() & 0o7777, 0o640);
    // And one that never gets a name goes.
    drop(rustix::fs::open(&dir, flags, Mode::from(0o600)).unwrap());

    // A removed file stays readable through open descriptors.
    fs::write(at("removed"), "still here").unwrap();
    let mut removed = File::open(at("removed")).unwrap();
    fs::remove_file(at("removed")).unwrap();
    let mut text = String::new();
    removed.read_to_string(&mut text).unwrap();
    assert_eq!(
        (text.as_str(), removed.metadata().unwrap().nlink()),
        ("still here", 0)
    );

    // Locks of two descriptors keep each other out.
    let locks = [open(&at("lock")), open(&at("lock"))];
    rustix::fs::flock(&locks[0], FlockOperation::NonBlockingLockExclusive).unwrap();
    let second = rustix::fs::flock(&locks[1], FlockOperation::NonBlockingLockExclusive);
    assert_eq!(second, Err(Errno::AGAIN));

    let name = "user.colour";
    let path = at("named");
    match rustix::fs::setxattr(&path, name, b"blue", XattrFlags::CREATE) {
        // As on the tmpfs of older kernels.
        Err(Errno::OPNOTSUPP) => {}
        set => {
            set.unwrap();
            let again = rustix::fs::setxattr(&path, name, b"red", XattrFlags::CREATE);
            assert_eq!(again, Err(Errno::EXIST));
            let mut value = [0; 16];
            let len = rustix::fs::getxattr(&path, name, &mut value).unwrap();
            assert_eq!(&value[..len], b"blue");
            let small = rustix::fs::getxattr(&path, name, &mut value[..2]);
            assert_eq!(small, Err(Errno::RANGE));
        }
    }

    // A hole is found, and a copy within the filesystem has the same bytes.
    let sparse = open(&at("sparse"));
    sparse.write_all_at(b"end", 1 << 20).unwrap();
    let hole = rustix::fs::seek(&sparse, rustix::fs::SeekFrom::Hole(0)).unwrap();
    assert!(hole <= 1 << 20, "{hole}");
    let copy = open(&at("copy"));
    let (mut from, mut to) = (1 << 20, 7);
    let copied =
        rustix::fs::copy_file_range(sparse.as_fd(), Some(&mut from), &copy, Some(&mut to), 3);
    assert_eq!(copied, Ok(3));
    let mut bytes = Vec::new();
    (&copy).seek(SeekFrom::Start(0)).unwrap();
    (&copy).read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, b"\0\0\0\0\0\0\0end");

    // Two names of one file, and directories swapped.
    fs::hard_link(at("copy"), at("copy too")).unwrap();
    assert_eq!(fs::metadata(at("copy")).unwrap().nlink(), 2);
    for name in ["left", "right"] {
        fs::create_dir(at(name)).unwrap();
        fs::write(at(name).join(name), name).unwrap();
    }
    let exchange = rustix::fs::RenameFlags::EXCHANGE;
    rustix::fs::renameat_with(CWD, at("left"), CWD, at("right"), exchange).unwrap();
    assert_eq!(fs::read_to_string(at("left/right")).unwrap(), "right");

    // Created read-only, written through the descriptor that made it.
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY;
    let sealed = rustix::fs::open(at("sealed"), flags, Mode::from(0o444)).unwrap();
    rustix::io::write(&sealed, b"once").unwrap();
    assert_eq!(fs::read(at("sealed")).unwrap(), b"once");

    // Times to the nanosecond, before 1970 as well.
    let time = |sec, nsec| rustix::fs::Timespec {
        tv_sec: sec,
        tv_nsec: nsec,
    };
    let times = rustix::fs::Timestamps {
        last_access: time(-2, 999_999_999),
        last_modification: time(1 << 33, 123_456_789),
    };
    rustix::fs::utimensat(CWD, at("sealed"), &times, AtFlags::empty()).unwrap();
    let found = fs::metadata(at("sealed")).unwrap();
    assert_eq!((found.mtime(), found.mtime_nsec()), (1 << 33, 123_456_789));
    assert_eq!((found.atime(), found.atime_nsec()), (-2, 999_999_999));
    let mode = fs::Permissions::from_mode(0o4755);
    fs::set_permissions(at("sealed"), mode).unwrap();
    assert_eq!(fs::metadata(at("sealed")).unwrap().mode() & 0o7777, 0o4755);
}
