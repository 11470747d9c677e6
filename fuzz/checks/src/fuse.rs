//! FUSE messages, as a guest sends them: whatever the bytes, the server never panics, and its
//! replies are replies to the kernel.
//!
//! Part of two crates: the fuzz targets, and the overlay's own tests, which run it over the corpus.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use iii_overlay::adapter::server::{Room, Server};
use iii_overlay::adapter::wire::Reply;
use iii_overlay::fs::Filesystem;
use iii_overlay::ino::{Ino, ROOT};
use iii_overlay::{Objects, Overlay, OverlayOptions};
use iii_store::tree::{Content, Leaf, Meta, Node, Tree};
use iii_store::{Layer, ObjectId, layer};

/// Bytes before a message: how much room the reply has, and how long the message is.
const FRAME: usize = 4;
/// Set in the room: the length in the message's header stays as it is, right or wrong.
const AS_IS: u16 = 1 << 15;
const HEADER: usize = 40;
/// Most that a message may have allocated on the machine that runs this.
const MAX_ALLOCATED: u64 = 1 << 20;

const OP_RENAME: u32 = 12;
const OP_LINK: u32 = 13;
const OP_FALLOCATE: u32 = 43;
const OP_READDIRPLUS: u32 = 44;
const OP_READDIR: u32 = 28;
const OP_RENAME2: u32 = 45;
const OP_COPY: u32 = 47;
/// Requests whose reply begins with an entry: LOOKUP, SYMLINK, MKNOD, MKDIR, LINK, CREATE, TMPFILE.
const ENTRIES: [u32; 7] = [1, 6, 8, 9, OP_LINK, 35, 51];

struct Held(HashMap<ObjectId, Vec<u8>>);

impl Objects for Held {
    fn read_at(&self, object: &ObjectId, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let bytes = self.0.get(object).ok_or(io::ErrorKind::NotFound)?;
        let rest = bytes.get(offset as usize..).unwrap_or_default();
        let count = rest.len().min(buf.len());
        buf[..count].copy_from_slice(&rest[..count]);
        Ok(count)
    }

    fn copy_to(&self, object: &ObjectId, len: u64, to: &File) -> io::Result<()> {
        let bytes = self.0.get(object).ok_or(io::ErrorKind::NotFound)?;
        to.write_all_at(&bytes[..len as usize], 0)
    }
}

/// A small filesystem of a layer and an upper.
pub fn overlay(upper: &std::path::Path) -> Arc<Overlay> {
    let mut tree = Tree::default();
    tree.meta.mode = 0o755;
    let mut held = HashMap::new();
    let large = vec![7; 70_000];
    for (dir, name, text) in [
        (&b"dir"[..], &b"file"[..], &b"text"[..]),
        (b"dir/below", b"large", &large),
        (b"dir/below", b"empty", b""),
    ] {
        held.insert(ObjectId::of(text), text.to_vec());
        let content = Content::File {
            object: ObjectId::of(text),
            size: text.len() as u64,
        };
        let leaf = Node::Leaf(Leaf {
            meta: Meta {
                mode: 0o4755,
                ..Meta::default()
            },
            content,
            link: None,
        });
        let dir = tree.dir_at(dir).expect("a directory");
        dir.entries.insert(name.into(), leaf);
    }
    let encoded = layer::encode(&tree).expect("a tree");
    let layer = Arc::new(Layer::from_bytes(encoded.bytes).expect("a layer"));
    let options = OverlayOptions {
        volatile: true,
        ..OverlayOptions::default()
    };
    let old = |_: &_| Err("there is no other chain".into());
    let overlay = Overlay::open_with(Arc::new(Held(held)), vec![layer], &old, upper, options);
    Arc::new(overlay.expect("an overlay"))
}

/// Room for a reply, and what it was filled with besides.
struct Bounded {
    size: usize,
    filled: Vec<u8>,
}

impl Room for Bounded {
    fn size(&self) -> usize {
        self.size
    }

    fn fill(&mut self, skip: usize, file: &File, offset: u64, size: usize) -> io::Result<usize> {
        assert!(skip + size <= self.size, "{skip} + {size} > {}", self.size);
        let mut done = 0;
        self.filled.resize(size, 0);
        while done < size {
            match file.read_at(&mut self.filled[done..], offset + done as u64)? {
                0 => break,
                count => done += count,
            }
        }
        self.filled.truncate(done);
        Ok(done)
    }
}

/// Puts `message` where the next one in `session` is to be, with this much room for its reply.
pub fn frame(session: &mut Vec<u8>, room: u16, message: &[u8]) {
    session.extend(room.to_le_bytes());
    session.extend((message.len() as u16).to_le_bytes());
    session.extend(message);
}

/// A session of framed messages. Small numbers where a message names an inode stand for those that
/// earlier replies told of.
pub fn check_session(overlay: &Arc<Overlay>, mut bytes: &[u8]) {
    let server = Server::new(Arc::clone(overlay));
    let mut known = vec![ROOT];
    let mut buffer = Reply::default();
    while let Some((frame, rest)) = bytes.split_at_checked(FRAME) {
        let room = u16::from_le_bytes([frame[0], frame[1]]);
        let len = usize::from(u16::from_le_bytes([frame[2], frame[3]]));
        let (message, rest) = rest.split_at(len.min(rest.len()));
        bytes = rest;
        let mut message = message.to_vec();
        tame(&mut message, room & AS_IS == 0, &known);
        let mut room = Bounded {
            size: usize::from(room & !AS_IS),
            filled: Vec::new(),
        };
        let reply = server.handle(&message, &mut room, &mut buffer);
        let reply = [reply, &room.filled].concat();
        check_reply(&message, room.size, &reply, &mut known);
    }
    server.reset();
    let listed = overlay.readdir(ROOT, 0, false, &mut |_| true);
    assert_eq!(listed, Ok(()), "the filesystem is no longer one");
}

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

fn set_word(bytes: &mut [u8], at: usize, value: u64) {
    if let Some(word) = bytes.get_mut(at..at + 8) {
        word.copy_from_slice(&value.to_le_bytes());
    }
}

fn opcode(message: &[u8]) -> Option<u32> {
    Some(u32::from_le_bytes(message.get(4..8)?.try_into().ok()?))
}

/// Makes a message get further than chance would bring it, and keeps it from filling the disk.
fn tame(message: &mut [u8], lengthen: bool, known: &[Ino]) {
    let Some(opcode) = opcode(message) else {
        return;
    };
    if lengthen {
        let len = (message.len() as u32).to_le_bytes();
        message[..4].copy_from_slice(&len);
    }
    let inode = |message: &mut [u8], at| {
        if let Some(number) = word(message, at).filter(|&number| number < 64) {
            let ino = known[number as usize % known.len()];
            set_word(message, at, ino);
        }
    };
    inode(message, 16);
    match opcode {
        OP_RENAME | OP_RENAME2 | OP_LINK => inode(message, HEADER),
        OP_COPY => inode(message, HEADER + 16),
        OP_FALLOCATE => {
            let len = word(message, HEADER + 16).unwrap_or_default();
            set_word(message, HEADER + 16, len % MAX_ALLOCATED);
        }
        _ => {}
    }
}

fn check_reply(message: &[u8], room: usize, reply: &[u8], known: &mut Vec<Ino>) {
    if reply.is_empty() {
        return;
    }
    assert!(reply.len() <= room, "{} > {room}", reply.len());
    let len = u32::from_le_bytes(reply[..4].try_into().expect("a header"));
    let error = i32::from_le_bytes(reply[4..8].try_into().expect("a header"));
    assert_eq!(len as usize, reply.len());
    assert_eq!(word(reply, 8), word(message, 8));
    // The range of an error in the kernel's eyes.
    assert!(error <= 0 && error > -512, "{error}");
    assert!(error == 0 || len == 16, "{error} in {len} bytes");
    let opcode = opcode(message).unwrap_or_default();
    let body = &reply[16..];
    if error != 0 {
        return;
    }
    if ENTRIES.contains(&opcode) {
        let ino = word(body, 0).expect("an entry");
        // Absent entries are told to LOOKUP alone.
        assert!(ino != 0 || opcode == ENTRIES[0]);
        if ino != 0 && known.len() < 64 && !known.contains(&ino) {
            known.push(ino);
        }
    }
    if opcode == OP_READDIR || opcode == OP_READDIRPLUS {
        let entry = if opcode == OP_READDIRPLUS { 128 } else { 0 };
        let mut rest = body;
        while !rest.is_empty() {
            let name_len = &rest[entry + 16..][..4];
            let name_len = u32::from_le_bytes(name_len.try_into().expect("a length")) as usize;
            let name = &rest[entry + 24..][..name_len];
            assert!(!name.is_empty() && !name.contains(&b'/') && !name.contains(&0));
            rest = &rest[entry + (24 + name_len).next_multiple_of(8)..];
        }
    }
}

/// A session on a filesystem of its own.
pub fn check_messages(bytes: &[u8]) {
    let dir = tempfile::tempdir().expect("a directory");
    check_session(&overlay(&dir.path().join("upper")), bytes);
}
