//! Freezes an upper in use, and makes uppers of frozen ones.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use iii_overlay::fs::{Caller, Filesystem, Special};
use iii_overlay::ino::ROOT;
use iii_overlay::upper::UpperError;
use iii_overlay::{Footing, FreezeError, OpenError, OverlayOptions};
use iii_store::ObjectId;
use iii_store::tree::{Content, Node, Tree};

use crate::support::{Home, put, view};

const CALLER: Caller = Caller { uid: 0, gid: 0 };

fn object(tree: &Tree, name: &[u8]) -> (ObjectId, u64) {
    match &tree.entries.get(name).unwrap() {
        Node::Leaf(leaf) => match leaf.content {
            Content::File { object, size } => (object, size),
            _ => panic!("{name:?} is no file"),
        },
        Node::Dir(_) => panic!("{name:?} is a directory"),
    }
}

/// Sets the flag when it is dropped, on every path.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// One writer writes a number into one file, and then into the other, each in one request. At any
/// moment, both numbers are equal or the first is larger by one.
#[test]
fn what_is_frozen_while_it_is_written_to_is_of_one_moment() {
    const LEN: usize = 40_000;
    let home = Home::new();
    let overlay = home.open(&[home.layer(&Tree::implicit(), &[])]);
    let [one, two] = [&b"one"[..], b"two"].map(|name| {
        let made = overlay.mknod(CALLER, ROOT, name, 0o644, Special::File);
        made.unwrap().ino
    });
    let write = |ino, round: u32| {
        let bytes = round.to_le_bytes().repeat(LEN / 4);
        assert_eq!(overlay.write(ino, &bytes, 0, true), Ok(LEN));
    };
    write(one, 0);
    write(two, 0);
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut round = 0;
            while !is_over.load(Ordering::Relaxed) {
                round += 1;
                write(one, round);
                write(two, round);
            }
        });
        let over = Over(&is_over);
        for _ in 0..20 {
            let (tree, layer) = home.published(&overlay);
            let said = [&b"one"[..], b"two"].map(|name| {
                let (id, size) = object(&tree, name);
                assert_eq!(size, LEN as u64);
                let mut bytes = vec![0; LEN];
                let read = home.store.object(&id).unwrap().read_at(&mut bytes, 0);
                assert_eq!(read.unwrap(), LEN, "of {layer}");
                let first: [u8; 4] = bytes[..4].try_into().unwrap();
                assert!(bytes.chunks(4).all(|chunk| chunk == first), "a torn write");
                u32::from_le_bytes(first)
            });
            assert!(said[0] == said[1] || said[0] == said[1] + 1, "{said:?}");
        }
        drop(over);
    });
}

#[test]
fn where_too_much_is_written_there_is_no_such_moment() {
    let home = Home::new();
    let overlay = home.open(&[]);
    let made = overlay.mknod(CALLER, ROOT, b"large", 0o644, Special::File);
    let ino = made.unwrap().ino;
    let beyond = iii_overlay::HELD_BYTES;
    overlay.write(ino, b"x", beyond, true).unwrap();
    let is_over = AtomicBool::new(false);
    let started = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                overlay.write(ino, b"x", 0, true).unwrap();
                started.store(true, Ordering::Relaxed);
            }
        });
        let over = Over(&is_over);
        while !started.load(Ordering::Relaxed) {
            std::thread::yield_now();
        }
        let ingest = home.store.ingest(&home.lease).unwrap();
        let frozen = overlay.freeze(&ingest).unwrap_err();
        drop(over);
        assert!(matches!(frozen, FreezeError::Restless), "{frozen}");
    });
    // Once the writer has stopped, the size of the file does not matter.
    let ingest = home.store.ingest(&home.lease).unwrap();
    overlay.freeze(&ingest).unwrap();
}

/// The layer that an upper was made from is needed for as long as the upper exists: no other place
/// has its contents.
#[test]
fn an_upper_whose_snapshot_is_gone_says_so() {
    let home = Home::new();
    let base = home.layer(&Tree::implicit(), &[]);
    let mut tree = Tree::implicit();
    put(&mut tree, b"a/file", b"kept");
    let upper = home.upper();
    let footing = Footing::default();
    let open =
        |layers: &[Arc<iii_store::Layer>]| home.try_open(layers, &upper, OverlayOptions::default());
    // This layer is never put into the store.
    let frozen = iii_store::Layer::from_bytes(iii_store::layer::encode(&tree).unwrap().bytes);
    iii_overlay::thaw(&upper, &footing, vec![base.clone()], &frozen.unwrap()).unwrap();
    for layers in [&[base.clone()][..], &[]] {
        let error = open(layers).unwrap_err();
        assert!(
            matches!(error, OpenError::Upper(UpperError::Thawed { .. })),
            "{error}"
        );
    }
    // With the layer, the upper opens: the failed attempt lost nothing.
    let frozen = home.layer(&tree, &[b"kept"]);
    for layers in [&[base.clone()][..], &[]] {
        let overlay = open(layers).unwrap();
        assert_eq!(view(&overlay)[&b"a/file"[..]].bytes, b"kept");
        drop(overlay);
        let footing = iii_overlay::footing_of(&upper).unwrap().unwrap();
        assert_eq!(footing.thawed, Some(frozen.layer_id()));
        let data = upper.join("data");
        assert_eq!(
            std::fs::read_dir(data).unwrap().count(),
            0,
            "nothing is copied"
        );
    }
    // Thawing into an existing directory fails and changes nothing.
    let again = iii_overlay::thaw(&upper, &footing, vec![base], &frozen);
    assert!(matches!(
        again,
        Err(OpenError::Upper(UpperError::Io { .. }))
    ));
}
