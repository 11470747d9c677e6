//! The fuzz target's check of FUSE messages over its committed corpus, and over bytes near it.

use std::fs;
use std::path::PathBuf;

use iii_fuzz_checks::fuse::{check_messages, check_session, frame, overlay};
use iii_test_support::{check_seeds, mutate};

/// Variants of each seed.
const VARIANTS: u64 = 3000;
/// Variants that share a filesystem.
const SHARING: u64 = 250;

fn corpus() -> PathBuf {
    concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/fuse_message").into()
}

fn noise(number: u64) -> [u8; 64] {
    let mut bytes = [0; 64];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&number.to_le_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

#[test]
fn no_message_of_the_corpus_makes_it_stumble() {
    for number in 0..seeds().len() {
        let seed = fs::read(corpus().join(format!("seed-{number}"))).unwrap();
        check_messages(&seed);
        for first in (0..VARIANTS).step_by(SHARING as usize) {
            let dir = tempfile::tempdir().unwrap();
            let overlay = overlay(&dir.path().join("upper"));
            for variant in first..first + SHARING {
                let bytes = mutate(&seed, &noise(variant));
                let check = std::panic::AssertUnwindSafe(|| check_session(&overlay, &bytes));
                let outcome = std::panic::catch_unwind(check);
                assert!(outcome.is_ok(), "variant {variant} of seed {number}");
            }
        }
    }
}

struct Session(Vec<u8>);

impl Session {
    /// A session of a kernel that offers these features.
    fn new(flags: u32) -> Self {
        let mut session = Self(Vec::new());
        let init = [7_u32, 38, 1 << 17, flags];
        session.add(
            26,
            0,
            &[init.map(u32::to_le_bytes).as_flattened(), &[0xff; 48]].concat(),
        );
        session
    }

    fn add_with_room(&mut self, room: u16, opcode: u32, node: u64, body: &[u8]) {
        let mut message = (40 + body.len() as u32).to_le_bytes().to_vec();
        message.extend(opcode.to_le_bytes());
        message.extend(u64::from(opcode).to_le_bytes());
        message.extend(node.to_le_bytes());
        message.extend([0; 16]);
        message.extend(body);
        frame(&mut self.0, room, &message);
    }

    /// Adds a message. The node is an index into the inodes that replies have named; 0 is the root.
    fn add(&mut self, opcode: u32, node: u64, body: &[u8]) {
        self.add_with_room(4096, opcode, node, body);
    }

    fn words(&mut self, opcode: u32, node: u64, words: &[u64]) {
        self.add(opcode, node, &bytes(words));
    }
}

fn bytes(words: &[u64]) -> Vec<u8> {
    words.iter().copied().flat_map(u64::to_le_bytes).collect()
}

/// Packs two numbers of 32 bits.
fn pair(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}

fn seeds() -> Vec<Vec<u8>> {
    vec![looks(), changes(), contents(), nonsense()]
}

fn looks() -> Vec<u8> {
    let mut s = Session::new(u32::MAX);
    s.add(1, 0, b"dir\0");
    s.add(1, 1, b"below\0");
    s.add(1, 2, b"large\0");
    s.add(1, 2, b"absent\0");
    s.words(3, 3, &[0, 0]);
    s.words(14, 3, &[0]);
    s.words(27, 2, &[0]);
    for opcode in [28, 44] {
        for offset in [0, 2] {
            s.words(opcode, 1, &[0, offset, pair(4096, 0), 0, 0]);
        }
    }
    for offset in [0, 65_536, 1 << 40] {
        s.words(15, 3, &[0, offset, pair(4096, 0), 0, 0]);
    }
    s.words(46, 3, &[0, 0, pair(4, 0)]);
    s.words(17, 0, &[]);
    s.words(5, 3, &[]);
    s.words(34, 3, &[7]);
    s.words(36, 0, &[5]);
    s.words(2, 3, &[1]);
    s.words(42, 0, &[pair(2, 0), 5, 1, 6, 9]);
    s.words(18, 3, &[0, 0, 0]);
    s.words(38, 0, &[]);
    s.0
}

fn changes() -> Vec<u8> {
    let mut s = Session::new(0);
    s.add(9, 0, &[&bytes(&[pair(0o755, 0)])[..], b"made\0"].concat());
    let file = pair(0o100_644, 0);
    s.add(8, 1, &[&bytes(&[file, 0])[..], b"file\0"].concat());
    s.add(
        8,
        1,
        &[&bytes(&[pair(0o020_600, 0x103), 0])[..], b"null\0"].concat(),
    );
    s.add(6, 1, b"link\0made/file\0");
    s.add(
        35,
        1,
        &[&bytes(&[pair(0o102, 0o100_600), 0])[..], b"created\0"].concat(),
    );
    s.add(
        51,
        1,
        &[&bytes(&[pair(2, 0o100_600), 0])[..], b"/\0"].concat(),
    );
    s.words(5, 4, &[]);
    s.add(13, 1, &[&bytes(&[6])[..], b"named\0"].concat());
    s.add(12, 1, &[&bytes(&[0])[..], b"file\0moved\0"].concat());
    for flags in [1, 2, 4] {
        let head = bytes(&[1, pair(flags, 0)]);
        s.add(45, 1, &[&head[..], b"created\0named\0"].concat());
    }
    s.add(12, 0, &[&bytes(&[1])[..], b"dir\0lower\0"].concat());
    s.add(10, 0, b"moved\0");
    s.add(10, 1, b"null\0");
    s.add(11, 0, b"made\0");
    s.words(20, 2, &[0, 1]);
    s.words(30, 1, &[0, 0]);
    s.words(50, 0, &[0]);
    s.words(2, 6, &[2]);
    s.0
}

fn contents() -> Vec<u8> {
    let mut s = Session::new(u32::MAX);
    s.add(1, 0, b"dir\0");
    s.add(1, 1, b"file\0");
    s.add(1, 1, b"below\0");
    s.add(1, 3, b"large\0");
    for offset in [2, 100_000] {
        let head = bytes(&[0, offset, pair(5, 4), 0, 0]);
        s.add(16, 2, &[&head[..], b"bytes"].concat());
    }
    let valid = 0b1001_1011_1111;
    s.words(
        4,
        2,
        &[
            pair(valid, 0),
            0,
            1000,
            0,
            7,
            8,
            9,
            pair(1, 2),
            pair(3, 0o4711),
            pair(0, 12),
            pair(34, 0),
        ],
    );
    for mode in [0, 1, 3, 16, 17] {
        s.words(43, 4, &[0, 4096, 8192, pair(mode, 0)]);
    }
    s.words(47, 4, &[0, 100, 2, 0, 7, 5000, 0]);
    s.words(46, 4, &[0, 0, pair(3, 0)]);
    s.add(21, 2, &[&bytes(&[pair(3, 1)])[..], b"user.a\0abc"].concat());
    for size in [0, 2, 64] {
        s.add(22, 2, &[&bytes(&[pair(size, 0)])[..], b"user.a\0"].concat());
        s.words(23, 2, &[pair(size, 0)]);
    }
    s.add(24, 2, b"user.a\0");
    s.words(15, 4, &[0, 4000, pair(4096, 0), 0, 0]);
    s.0
}

/// Messages that no kernel sends.
fn nonsense() -> Vec<u8> {
    let mut s = Session::new(u32::MAX);
    let long = [vec![b'n'; 300], vec![0]].concat();
    for name in [&b"..\0"[..], b".\0", b"a/b\0", b"\0", b"unended", &long] {
        s.add(1, 0, name);
        s.add(9, 0, &[&bytes(&[pair(0o777, 0)])[..], name].concat());
    }
    let file = pair(0o100_644, 0);
    s.add(8, 0, &[&bytes(&[file, 0])[..], b"f\0"].concat());
    let most = u64::MAX;
    s.add(
        16,
        1,
        &[&bytes(&[0, most, pair(1, 0), 0, 0])[..], b"x"].concat(),
    );
    s.add(
        16,
        1,
        &[&bytes(&[0, most / 2, pair(1, 0), 0, 0])[..], b"x"].concat(),
    );
    s.add(16, 1, &bytes(&[0, 0, pair(u32::MAX, 0), 0, 0]));
    s.words(15, 1, &[0, most, pair(u32::MAX, 0), 0, 0]);
    s.words(28, 0, &[0, most, pair(u32::MAX, 0), 0, 0]);
    s.words(44, 0, &[0, 0, pair(16, 0), 0, 0]);
    s.words(43, 1, &[0, most, most, 0]);
    s.words(46, 1, &[0, most, pair(3, 0)]);
    s.words(47, 1, &[0, most, 1, 0, most, most, 0]);
    s.words(2, 1, &[most]);
    s.words(2, most, &[most]);
    s.words(42, 0, &[pair(u32::MAX, 0)]);
    s.words(
        4,
        1,
        &[
            pair(u32::MAX, 0),
            0,
            most,
            0,
            most,
            most,
            most,
            most,
            most,
            most,
            most,
        ],
    );
    s.words(3, most, &[0, 0]);
    s.words(999, 0, &[0]);
    for room in [0, 15, 16, 100] {
        s.add_with_room(room, 1, 0, b"dir\0");
        s.add_with_room(room, 17, 0, &[]);
    }
    s.add(26, 0, &[0; 16]);
    s.add(26, 0, &[7; 3]);
    s.0
}

/// The committed seeds equal the messages above.
#[test]
fn seeds_are_current() {
    check_seeds(&corpus(), &seeds());
}
