//! The memory that an upper takes. The test counts each allocation, so no other test may run in
//! this process.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use iii_overlay::fs::{Caller, Filesystem as _, Special};
use iii_overlay::ino::ROOT;
use iii_overlay::upper::state::{ENTRY_MEMORY, INODE_MEMORY};
use iii_overlay::{Objects, Overlay, OverlayOptions};
use iii_store::ObjectId;

struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes unchanged to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(live, Relaxed);
        // SAFETY: the caller's contract is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's contract is the same.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

struct Nothing;

impl Objects for Nothing {
    fn read_at(&self, _: &ObjectId, _: &mut [u8], _: u64) -> io::Result<usize> {
        Err(io::ErrorKind::NotFound.into())
    }

    fn copy_to(&self, _: &ObjectId, _: u64, _: &File) -> io::Result<()> {
        Err(io::ErrorKind::NotFound.into())
    }
}

fn open(upper: &Path) -> Overlay {
    let none = |_: &_| Err("no layers".into());
    let options = OverlayOptions::default();
    Overlay::open_with(Arc::new(Nothing), Vec::new(), &none, upper, options).unwrap()
}

/// Bytes per file: of an upper in use, and at most while an upper is opened.
fn measure(files: usize) -> (usize, usize) {
    let dir = tempfile::tempdir().unwrap();
    let upper = dir.path().join("upper");
    let overlay = open(&upper);
    let before = LIVE.load(Relaxed);
    for n in 0..files {
        // A directory holds a thousand files, as a package does.
        let parent = if n % 1000 == 0 {
            let name = format!("d{}", n / 1000);
            overlay.mkdir(Caller::default(), ROOT, name.as_bytes(), 0o755)
        } else {
            overlay.lookup(ROOT, format!("d{}", n / 1000).as_bytes())
        };
        let parent = parent.unwrap().ino;
        let name = format!("file-{n:08}");
        let made = overlay.mknod(
            Caller::default(),
            parent,
            name.as_bytes(),
            0o644,
            Special::File,
        );
        overlay.forget(made.unwrap().ino, 1);
        overlay.forget(parent, 1);
    }
    let used = (LIVE.load(Relaxed) - before) / files;
    drop(overlay);
    let before = LIVE.load(Relaxed);
    PEAK.store(before, Relaxed);
    let overlay = open(&upper);
    // The buffers for reading and writing a log do not grow with it.
    let buffers = 8 << 20;
    let peak = (PEAK.load(Relaxed) - before).saturating_sub(buffers) / files;
    drop(overlay);
    (used, peak)
}

/// An upper takes no more memory than its limit counts, and opening it takes little more, at any
/// size.
#[test]
fn memory_is_what_is_counted_and_linear() {
    const NAME: usize = 13;
    let counted = (INODE_MEMORY + ENTRY_MEMORY) as usize + NAME;
    for files in [20_000, 60_000] {
        let (used, peak) = measure(files);
        eprintln!("{files} files: {used} bytes each, {peak} at most when opened");
        assert!(used <= counted, "{used} of {counted}");
        assert!(used >= counted / 3, "{used} of {counted}: counted too high");
        assert!(peak <= 2 * counted, "{peak}");
    }
}
