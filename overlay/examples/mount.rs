//! Mounts an overlay of plain directories, for suites and benchmarks: as root,
//!
//! ```text
//! mount [--upper DIR] [--threads N] [--observe] MOUNTPOINT [LOWER_DIR…]
//! ```
//!
//! takes the lower directories, bottom first, into a temporary store, mounts them with the upper (a
//! temporary one unless named) and serves in the foreground until it is unmounted, or unmounts when
//! it is told to end. Then it prints how many requests of each kind it served.

use std::collections::BTreeMap;
use std::error::Error;
use std::ffi::CString;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use iii_overlay::adapter::Mode;
use iii_overlay::adapter::fuse::serve;
use iii_overlay::{Overlay, OverlayOptions, Project};
use iii_store::tree::{Content, Dir, Leaf, Meta, Mtime, Node, Rdev, Tree};
use iii_store::{Ingest, Layer, Store};
use rustix::mount::{MountFlags, UnmountFlags};

#[derive(Default)]
struct Args {
    upper: Option<PathBuf>,
    threads: usize,
    observe: bool,
    mountpoint: PathBuf,
    lower: Vec<PathBuf>,
}

fn parse() -> Result<Args, Box<dyn Error>> {
    let mut args = Args {
        threads: 2,
        ..Args::default()
    };
    let mut positional = Vec::new();
    let mut words = std::env::args_os().skip(1);
    while let Some(word) = words.next() {
        match word.to_str() {
            Some("--upper") => args.upper = words.next().map(PathBuf::from),
            Some("--threads") => {
                let threads = words.next().and_then(|word| word.to_str()?.parse().ok());
                args.threads = threads.ok_or("--threads needs a number")?;
            }
            Some("--observe") => args.observe = true,
            _ => positional.push(PathBuf::from(word)),
        }
    }
    let mut positional = positional.into_iter();
    args.mountpoint = positional.next().ok_or("no mountpoint given")?;
    args.lower = positional.collect();
    Ok(args)
}

fn meta(meta: &std::fs::Metadata) -> Meta {
    Meta {
        mode: (meta.mode() & 0o7777) as u16,
        uid: meta.uid(),
        gid: meta.gid(),
        mtime: Mtime {
            sec: meta.mtime(),
            nsec: meta.mtime_nsec() as u32,
        },
        xattrs: BTreeMap::new(),
    }
}

fn take_in(path: &Path, ingest: &Ingest<'_>) -> Result<Dir, Box<dyn Error>> {
    let mut dir = Dir {
        meta: meta(&path.symlink_metadata()?),
        ..Dir::default()
    };
    for entry in path.read_dir()? {
        let entry = entry?;
        let path = entry.path();
        let found = entry.metadata()?;
        let kind = found.file_type();
        let rdev = Rdev {
            major: rustix::fs::major(found.rdev()),
            minor: rustix::fs::minor(found.rdev()),
        };
        let node = if kind.is_dir() {
            Node::Dir(take_in(&path, ingest)?)
        } else {
            let content = if kind.is_file() {
                let added = ingest.add_file(&File::open(&path)?)?;
                Content::File {
                    object: added.object,
                    size: added.size,
                }
            } else if kind.is_symlink() {
                Content::Symlink {
                    target: path.read_link()?.as_os_str().as_bytes().into(),
                }
            } else if kind.is_fifo() {
                Content::Fifo
            } else if kind.is_char_device() {
                Content::Char(rdev)
            } else if kind.is_block_device() {
                Content::Block(rdev)
            } else {
                Content::Socket
            };
            Node::Leaf(Leaf {
                meta: meta(&found),
                content,
                link: (found.nlink() > 1).then(|| found.ino()),
            })
        };
        dir.entries
            .insert(entry.file_name().as_bytes().into(), node);
    }
    Ok(dir)
}

fn main() -> Result<(), Box<dyn Error>> {
    let args = parse()?;
    let work = tempfile::tempdir()?;
    let store = Store::open(work.path().join("store"))?;
    let lease = store.lease("mount example")?;
    let mut layers: Vec<Arc<Layer>> = Vec::new();
    for lower in &args.lower {
        let ingest = store.ingest(&lease)?;
        let tree: Tree = take_in(lower, &ingest)?;
        let published = ingest.finish(&tree)?;
        layers.push(store.layer(&published.layer_id)?);
    }
    if layers.is_empty() {
        let ingest = store.ingest(&lease)?;
        let mut root = Tree::default();
        root.meta.mode = 0o755;
        let published = ingest.finish(&root)?;
        layers.push(store.layer(&published.layer_id)?);
    }
    let options = OverlayOptions {
        project: args.observe.then(|| Project {
            path: Vec::new(),
            slot: layers.len() - 1,
        }),
        observe: args.observe,
        volatile: false,
        ..OverlayOptions::default()
    };
    let upper = args.upper.unwrap_or_else(|| work.path().join("upper"));
    let begin = std::time::Instant::now();
    let overlay = Arc::new(Overlay::open(&store, layers, &upper, options)?);
    let opened = begin.elapsed();

    let fuse = File::options().read(true).write(true).open("/dev/fuse")?;
    let data = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other",
        fuse.as_raw_fd()
    );
    rustix::mount::mount(
        "iii-overlay",
        &args.mountpoint,
        "fuse.iii",
        MountFlags::empty(),
        Some(CString::new(data)?.as_c_str()),
    )?;
    let mode = if args.observe {
        Mode::Observed
    } else {
        Mode::Quiet
    };
    let session = serve(Arc::clone(&overlay), fuse.into(), args.threads, mode)?;
    eprintln!(
        "serving on {}, opened in {opened:?}",
        args.mountpoint.display()
    );
    let mountpoint = args.mountpoint.clone();
    let mut signals = signal_hook::iterator::Signals::new([libc::SIGINT, libc::SIGTERM])?;
    std::thread::spawn(move || {
        for _ in signals.forever() {
            // Where it is unmounted already there is nothing to do.
            let _ = rustix::mount::unmount(&mountpoint, UnmountFlags::DETACH);
        }
    });
    session.join()?;
    for (name, count) in overlay.stats() {
        if count != 0 {
            eprintln!("{name:>16} {count}");
        }
    }
    for fact in overlay.facts() {
        eprintln!("{} {:?}", String::from_utf8_lossy(&fact.path), fact.seen);
    }
    Ok(())
}
