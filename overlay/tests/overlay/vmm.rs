//! A made-up virtual machine monitor and its guest, which use memory and rings as no real kernel
//! does.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use iii_overlay::Overlay;
use iii_overlay::adapter::vhost_user::{End, Socket, VhostUserError, serve};
use iii_overlay::fs::{Caller, Filesystem, Special};
use iii_overlay::ino::ROOT;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::MemfdFlags;
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend as _};
use vhost::{VhostBackend as _, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use iii_fuzz_checks::fuse as messages;
use iii_test_support::mutate;

/// The address of the guest's memory in the VMM, and its length.
const VMM_AT: u64 = 0x7000_0000_0000;
const MEMORY: u64 = 8 << 20;
/// Entries of a ring.
const SIZE: u16 = 64;
/// Bytes for the rings of each queue; messages and replies follow them.
const RINGS: u64 = 0x1_0000;
const AVAILABLE: u64 = 0x4000;
const USED: u64 = 0x8000;
const BUFFERS: u64 = 0x10_0000;
const REPLIES: u64 = 0x40_0000;

const QUEUES: usize = 3;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Longest time to wait for a reply.
const PATIENCE: Duration = Duration::from_secs(20);

/// Address, length, flags, next.
type Descriptor = (u64, u32, u16, u16);

struct Machine {
    memory: File,
    vmm: Frontend,
    kicks: Vec<EventFd>,
    calls: Vec<EventFd>,
    offered: [u16; QUEUES],
    serving: Option<JoinHandle<Result<End, VhostUserError>>>,
    overlay: Arc<Overlay>,
    stop: UnixStream,
    dir: tempfile::TempDir,
}

impl Machine {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let overlay = messages::overlay(&dir.path().join("upper"));
        let path = dir.path().join("socket");
        let socket = Socket::bind(&path).unwrap();
        let (stop, stopped) = UnixStream::pair().unwrap();
        let served = Arc::clone(&overlay);
        let serving = std::thread::spawn(move || {
            let tag = "a tag".parse().unwrap();
            serve(served, &socket, &tag, 3, stopped.as_fd())
        });
        let memory = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        let memory = File::from(memory);
        memory.set_len(MEMORY).unwrap();
        let mut vmm = Frontend::connect(&path, QUEUES as u64).unwrap();
        vmm.set_owner().unwrap();
        let protocol = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        let features = vmm.get_features().unwrap();
        assert!(features & protocol != 0);
        let offered = vmm.get_protocol_features().unwrap();
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK;
        assert!(offered.contains(wanted));
        vmm.set_protocol_features(wanted).unwrap();
        let (indirect, version_1) = (1 << 28, 1 << 32);
        vmm.set_features(protocol | indirect | version_1).unwrap();
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY,
            userspace_addr: VMM_AT,
            mmap_offset: 0,
            mmap_handle: memory.as_raw_fd(),
        };
        vmm.set_mem_table(&[region]).unwrap();
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let mut machine = Self {
            memory,
            vmm,
            kicks: (0..QUEUES).map(|_| event()).collect(),
            calls: (0..QUEUES).map(|_| event()).collect(),
            offered: [0; QUEUES],
            serving: Some(serving),
            overlay,
            stop,
            dir,
        };
        (0..QUEUES).for_each(|queue| machine.start(queue));
        machine
    }

    fn start(&mut self, queue: usize) {
        let at = VMM_AT + queue as u64 * RINGS;
        self.vmm.set_vring_num(queue, SIZE).unwrap();
        let rings = VringConfigData {
            queue_max_size: SIZE,
            queue_size: SIZE,
            flags: 0,
            desc_table_addr: at,
            used_ring_addr: at + USED,
            avail_ring_addr: at + AVAILABLE,
            log_addr: None,
        };
        self.vmm.set_vring_addr(queue, &rings).unwrap();
        self.vmm.set_vring_base(queue, self.offered[queue]).unwrap();
        self.vmm.set_vring_call(queue, &self.calls[queue]).unwrap();
        self.vmm.set_vring_kick(queue, &self.kicks[queue]).unwrap();
        self.vmm.set_vring_enable(queue, true).unwrap();
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.memory.write_all_at(bytes, at).unwrap();
    }

    fn get<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.memory.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    fn describe(&self, table: u64, index: u16, descriptor: Descriptor) {
        let (at, len, flags, next) = descriptor;
        let mut bytes = at.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.put(table + u64::from(index) * 16, &bytes);
    }

    /// Makes the chain that begins with descriptor `head` available, without a notification.
    fn offer(&mut self, queue: usize, head: u16) {
        let ring = queue as u64 * RINGS + AVAILABLE;
        let slot = self.offered[queue] % SIZE;
        self.put(ring + 4 + u64::from(slot) * 2, &head.to_le_bytes());
        self.offered[queue] = self.offered[queue].wrapping_add(1);
        self.put(ring + 2, &self.offered[queue].to_le_bytes());
    }

    fn used(&self, queue: usize) -> u16 {
        u16::from_le_bytes(self.get(queue as u64 * RINGS + USED + 2))
    }

    /// Waits until every offered chain has been used.
    fn wait(&self, queue: usize) {
        let until = Instant::now() + PATIENCE;
        while self.used(queue) != self.offered[queue] {
            let left = until.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "queue {queue} is not served");
            self.wait_for_call(queue, left);
        }
    }

    fn wait_for_call(&self, queue: usize, most: Duration) {
        // SAFETY: the event lives as long as the machine.
        let call = unsafe { BorrowedFd::borrow_raw(self.calls[queue].as_raw_fd()) };
        let most = Timespec::try_from(most).unwrap();
        rustix::event::poll(&mut [PollFd::new(&call, PollFlags::IN)], Some(&most)).unwrap();
        // An empty event is no error here.
        let _ = self.calls[queue].read();
    }

    /// Offers `head`, and returns the length of the reply.
    fn go(&mut self, queue: usize, head: u16) -> u32 {
        let slot = u64::from(self.offered[queue] % SIZE);
        self.offer(queue, head);
        self.kicks[queue].write(1).unwrap();
        self.wait(queue);
        let used = queue as u64 * RINGS + USED + 4 + slot * 8;
        assert_eq!(self.get(used), u32::from(head).to_le_bytes());
        u32::from_le_bytes(self.get(used + 4))
    }

    /// Puts a message and room for its reply behind descriptors `head` and the next.
    fn prepare(&self, queue: usize, head: u16, message: &[u8]) {
        let place = (queue as u64 * u64::from(SIZE) + u64::from(head)) * 0x1000;
        let table = queue as u64 * RINGS;
        self.put(BUFFERS + place, message);
        let len = message.len() as u32;
        self.describe(table, head, (BUFFERS + place, len, NEXT, head + 1));
        self.describe(table, head + 1, (REPLIES + place, 0x1000, WRITE, 0));
    }

    /// The error in the reply that [`Machine::prepare`] made room for.
    fn error(&self, queue: usize, head: u16) -> i32 {
        let place = (queue as u64 * u64::from(SIZE) + u64::from(head)) * 0x1000;
        i32::from_le_bytes(self.get(REPLIES + place + 4))
    }

    fn ask(&mut self, message: &[u8]) -> i32 {
        self.prepare(1, 0, message);
        let len = self.go(1, 0);
        assert!(len >= 16, "{len}");
        self.error(1, 0)
    }

    /// Checks that a request of a well-behaved guest succeeds.
    #[track_caller]
    fn lives(&mut self) {
        assert_eq!(self.ask(&lookup(ROOT, b"dir")), 0);
    }

    fn end(&mut self) -> Result<End, VhostUserError> {
        self.serving.take().unwrap().join().unwrap()
    }
}

fn message(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
    let mut message = (40 + body.len() as u32).to_le_bytes().to_vec();
    message.extend(opcode.to_le_bytes());
    message.extend(7_u64.to_le_bytes());
    message.extend(node.to_le_bytes());
    message.extend([0; 16]);
    message.extend(body);
    message
}

fn lookup(node: u64, name: &[u8]) -> Vec<u8> {
    message(1, node, &[name, b"\0"].concat())
}

fn init() -> Vec<u8> {
    let init = [7_u32, 38, 1 << 17, u32::MAX].map(u32::to_le_bytes);
    message(26, 0, &[init.as_flattened(), &[0; 48]].concat())
}

#[test]
fn a_machine_is_told_the_tag_and_served_until_it_goes() {
    let mut machine = Machine::new();
    let flags = VhostUserConfigFlags::WRITABLE;
    let config = machine.vmm.get_config(0, 40, flags, &[0; 40]).unwrap().1;
    assert_eq!(&config[..6], b"a tag\0");
    assert_eq!(&config[36..], 8_u32.to_le_bytes());
    assert_eq!(machine.vmm.get_queue_num().unwrap(), 9);
    assert_eq!(machine.ask(&init()), 0);
    machine.lives();

    // The server serves one connection only.
    let mut other = UnixStream::connect(machine.dir.path().join("socket")).unwrap();
    assert_eq!(other.read(&mut [0]).unwrap(), 0);
    machine.lives();

    // A file without a name ends with the session of the kernel that had it.
    let made = machine.overlay.tmpfile(Caller::default(), ROOT, 0o600);
    let made = made.unwrap().ino;
    let getattr = message(3, made, &[0; 16]);
    assert_eq!(machine.ask(&getattr), 0);
    assert_eq!(machine.ask(&init()), 0);
    assert_eq!(machine.ask(&getattr), -libc::ESTALE);

    let Machine { vmm, serving, .. } = machine;
    drop(vmm);
    assert_eq!(serving.unwrap().join().unwrap().unwrap(), End::Disconnected);
}

#[test]
fn it_ends_when_it_is_told_to() {
    let mut machine = Machine::new();
    machine.lives();
    rustix::io::write(&machine.stop, b"!").unwrap();
    assert_eq!(machine.end().unwrap(), End::Stopped);
}

/// Fills every queue at once, so that the pool has to help, and stops and starts queues.
#[test]
fn bursts_on_all_queues_are_answered() {
    let mut machine = Machine::new();
    assert_eq!(machine.ask(&init()), 0);
    let fsync = message(20, ROOT, &[0; 16]);
    for round in 0..40 {
        for queue in 0..QUEUES {
            for head in (0..SIZE).step_by(2) {
                let asked = match head % 6 {
                    0 => fsync.clone(),
                    2 => lookup(ROOT, b"absent"),
                    _ => lookup(ROOT, b"dir"),
                };
                machine.prepare(queue, head, &asked);
                machine.offer(queue, head);
            }
            machine.kicks[queue].write(1).unwrap();
        }
        for queue in 0..QUEUES {
            machine.wait(queue);
            for head in (0..SIZE).step_by(2) {
                assert_eq!(machine.error(queue, head), 0);
            }
        }
        if round % 10 == 9 {
            let base = machine.vmm.get_vring_base(2).unwrap();
            assert_eq!(base, u32::from(machine.offered[2]));
            machine.start(2);
        }
    }
}

/// Written data and data of a layer arrive exactly where the guest wants them.
#[test]
fn reads_fill_their_room_however_it_is_cut() {
    let mut machine = Machine::new();
    assert_eq!(machine.ask(&init()), 0);
    let overlay = Arc::clone(&machine.overlay);
    let mut below = ROOT;
    for name in [&b"dir"[..], b"below"] {
        below = overlay.lookup(below, name).unwrap().ino;
    }
    let lower = overlay.lookup(below, b"large").unwrap().ino;
    let written = overlay.mknod(Caller::default(), ROOT, b"written", 0o644, Special::File);
    let written = written.unwrap().ino;
    let contents: Vec<u8> = (0..70_000_u32).map(|at| (at % 251) as u8).collect();
    assert_eq!(overlay.write(written, &contents, 0, false), Ok(70_000));

    let asked_at = BUFFERS + 0x8_0000;
    let tiny: &[u32] = &[7, 5, 0, 10, 1, 300, 4096];
    // Lengths of the buffers, the range that is asked for, and the number of bytes returned.
    let cases: [(&str, &[u32], u64, u32, usize); 8] = [
        ("one piece", &[9000], 0, 8192, 8192),
        ("pages", &[16, 4096, 4096], 4096, 8192, 8192),
        ("the header in pieces", tiny, 100, 4000, 4000),
        ("more room than that", &[16, 4096, 4096], 0, 10, 10),
        ("less room than that", &[16, 100, 100], 69, 8192, 200),
        ("across the end", &[16, 4096, 4096], 68_000, 8192, 2000),
        ("at the end", &[16, 4096], 70_000, 4096, 0),
        ("far behind the end", &[16, 4096], u64::MAX - 9, 4096, 0),
    ];
    for (ino, contents) in [(written, contents), (lower, vec![7; 70_000])] {
        for &(what, pieces, offset, size, expected) in &cases {
            let mut body = [0_u64.to_le_bytes(), offset.to_le_bytes()].concat();
            body.extend(size.to_le_bytes());
            body.extend([0; 20]);
            let asked = message(15, ino, &body);
            machine.put(asked_at, &asked);
            machine.describe(RINGS, 10, (asked_at, asked.len() as u32, NEXT, 11));
            machine.put(REPLIES, &vec![0xee; 0x2_0000]);
            // Later buffers have lower addresses.
            let place = |index: usize| REPLIES + 0x2_0000 - 0x4000 * (index as u64 + 1);
            for (index, len) in pieces.iter().enumerate() {
                let last = index + 1 == pieces.len();
                let (flags, next) = if last {
                    (0, 0)
                } else {
                    (NEXT, 12 + index as u16)
                };
                let piece = (place(index), *len, WRITE | flags, next);
                machine.describe(RINGS, 11 + index as u16, piece);
            }
            assert_eq!(machine.go(1, 10) as usize, 16 + expected, "{what}");
            let mut reply: Vec<u8> = Vec::new();
            for (index, len) in pieces.iter().enumerate() {
                let all: [u8; 0x4000] = machine.get(place(index));
                let (piece, behind) = all.split_at(*len as usize);
                reply.extend(piece);
                assert!(behind.iter().all(|byte| *byte == 0xee), "{what}");
            }
            let (reply, behind) = reply.split_at(16 + expected);
            assert_eq!(reply[..4], (16 + expected as u32).to_le_bytes(), "{what}");
            let from = contents.get(offset as usize..).unwrap_or_default();
            assert!(reply[16..] == from[..expected], "{what}");
            assert!(behind.iter().all(|byte| *byte == 0xee), "{what}");
        }
    }
}

#[test]
fn chains_that_make_no_sense_harm_nobody() {
    let mut machine = Machine::new();
    assert_eq!(machine.ask(&init()), 0);
    let asked = lookup(ROOT, b"dir");
    let len = asked.len() as u32;
    let (table, at, reply) = (RINGS, BUFFERS + 0x8_0000, REPLIES + 0x8_0000);
    machine.put(at, &asked);
    let far = MEMORY + 0x1000;
    // Descriptors from number 10 on, and the length of the reply.
    let cases: [(&str, &[Descriptor], u32); 14] = [
        (
            "as it should be",
            &[(at, len, NEXT, 11), (reply, 4096, WRITE, 0)],
            144,
        ),
        ("no room", &[(at, len, 0, 0)], 0),
        (
            "little room",
            &[(at, len, NEXT, 11), (reply, 15, WRITE, 0)],
            0,
        ),
        (
            "room for an error",
            &[(at, len, NEXT, 11), (reply, 16, WRITE, 0)],
            16,
        ),
        ("no message", &[(reply, 4096, WRITE, 0)], 0),
        (
            "half a header",
            &[(at, 20, NEXT, 11), (reply, 4096, WRITE, 0)],
            0,
        ),
        (
            "half a name",
            &[(at, len - 1, NEXT, 11), (reply, 4096, WRITE, 0)],
            16,
        ),
        ("a loop", &[(at, len, NEXT, 10)], 0),
        (
            "a loop of room",
            &[(at, len, NEXT, 11), (reply, 64, WRITE | NEXT, 11)],
            144,
        ),
        (
            "elsewhere",
            &[(far, len, NEXT, 11), (reply, 4096, WRITE, 0)],
            0,
        ),
        (
            "room elsewhere",
            &[(at, len, NEXT, 11), (u64::MAX - 8, 4096, WRITE, 0)],
            0,
        ),
        (
            "very long",
            &[(at, u32::MAX, NEXT, 11), (reply, 4096, WRITE, 0)],
            0,
        ),
        (
            "room before it",
            &[(reply, 4096, WRITE | NEXT, 11), (at, len, 0, 0)],
            0,
        ),
        ("no such next", &[(at, len, NEXT, 999)], 0),
    ];
    for (what, descriptors, expected) in cases {
        for (index, descriptor) in descriptors.iter().enumerate() {
            machine.describe(table, 10 + index as u16, *descriptor);
        }
        assert_eq!(machine.go(1, 10), expected, "{what}");
        machine.lives();
    }

    // The message byte by byte, in an indirect table.
    let indirect = BUFFERS + 0x9_0000;
    for byte in 0..len as u16 {
        machine.describe(indirect, byte, (at + u64::from(byte), 1, NEXT, byte + 1));
    }
    machine.describe(indirect, len as u16, (reply, 4096, WRITE, 0));
    let table_len = (len + 1) * 16;
    for (what, descriptor, expected) in [
        ("byte by byte", (indirect, table_len, INDIRECT, 0), 144),
        (
            "a table that is cut",
            (indirect, table_len - 8, INDIRECT, 0),
            0,
        ),
        ("a table of nothing", (indirect, 0, INDIRECT, 0), 0),
        ("a table elsewhere", (far, table_len, INDIRECT, 0), 0),
        ("a table far too long", (indirect, !15, INDIRECT, 0), 0),
    ] {
        machine.describe(table, 10, descriptor);
        assert_eq!(machine.go(1, 10), expected, "{what}");
        machine.lives();
    }
    machine.describe(indirect, 0, (indirect, table_len, INDIRECT, 0));
    machine.describe(table, 10, (indirect, table_len, INDIRECT, 0));
    assert_eq!(machine.go(1, 10), 0, "a table in a table");
    machine.lives();
}

#[test]
fn a_ring_that_makes_no_sense_ends_the_session() {
    let mut machine = Machine::new();
    machine.lives();
    let overtaken = machine.offered[1].wrapping_add(1000);
    machine.put(RINGS + AVAILABLE + 2, &overtaken.to_le_bytes());
    machine.kicks[1].write(1).unwrap();
    let ended = machine.end();
    assert!(matches!(ended, Err(VhostUserError::Ring(_))), "{ended:?}");
}

/// With rings of noise, the session goes on or fails, and always ends.
#[test]
fn noise_in_the_rings_harms_nobody() {
    for number in 0..150_u64 {
        let mut machine = Machine::new();
        assert_eq!(machine.ask(&init()), 0);
        for head in (0..SIZE).step_by(2) {
            machine.prepare(1, head, &lookup(ROOT, b"dir"));
        }
        let rings: [u8; USED as usize] = machine.get(RINGS);
        let random = blake3::hash(&number.to_le_bytes());
        let random = [random.as_bytes().as_slice(), random.as_bytes()].concat();
        // The noise damages the descriptors in use, or the ring of the available ones.
        let (at, len) = if number % 3 == 0 {
            (AVAILABLE as usize, 4 + 2 * SIZE as usize)
        } else {
            (0, 16 * SIZE as usize)
        };
        machine.put(RINGS + at as u64, &mutate(&rings[at..at + len], &random));
        for head in (0..SIZE).step_by(2) {
            machine.offer(1, head);
        }
        machine.kicks[1].write(1).unwrap();
        // Another queue is still served, unless the session has ended.
        machine.prepare(2, 0, &lookup(ROOT, b"dir"));
        machine.offer(2, 0);
        machine.kicks[2].write(1).unwrap();
        let until = Instant::now() + PATIENCE;
        let done = |machine: &Machine| machine.used(2) == machine.offered[2];
        let ended = |machine: &Machine| machine.serving.as_ref().unwrap().is_finished();
        while !done(&machine) && !ended(&machine) {
            assert!(
                Instant::now() < until,
                "{number}: neither answered nor ended"
            );
            machine.wait_for_call(2, Duration::from_millis(10));
        }
        // The noise decides whether the first queue has an answer, too.
        machine.wait_for_call(1, Duration::from_millis(10));
        rustix::io::write(&machine.stop, b"!").unwrap();
        match machine.end() {
            Ok(_) | Err(VhostUserError::Ring(_)) => {}
            Err(error) => panic!("{number}: {error}"),
        }
    }
}

/// A kernel announces a write by a user that may not keep setuid.
#[test]
fn privileges_go_when_the_kernel_announces_a_write() {
    let mut machine = Machine::new();
    assert_eq!(machine.ask(&init()), 0);
    let dir = machine.overlay.lookup(ROOT, b"dir").unwrap().ino;
    let file = machine.overlay.lookup(dir, b"file").unwrap();
    assert_eq!(file.mode, 0o4755);
    assert_eq!(machine.ask(&message(4, file.ino, &[0; 88])), 0);
    assert_eq!(machine.overlay.getattr(file.ino).unwrap().mode, 0o755);
    // The kernel finds an inode that it has forgotten by its handle.
    assert_eq!(machine.ask(&lookup(file.ino, b".")), 0);
    assert_eq!(machine.ask(&lookup(dir, b"..")), 0);
}
