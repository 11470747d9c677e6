//! Where the filesystem can share blocks, large files come in and go out without being copied. The
//! filesystem is a small XFS, mounted in a mount namespace of its own, in which this binary runs
//! itself again.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use iii_store::Store;
use iii_store::tree::Tree;

use crate::helpers::{noise, put};

const DIR: &str = "III_STORE_TEST_XFS";
const SIZE: usize = 48 << 20;
/// Most bytes of metadata that sharing may cost.
const SLACK: u64 = 8 << 20;

fn free(dir: &Path) -> u64 {
    let fs = rustix::fs::statvfs(dir).unwrap();
    fs.f_bfree * fs.f_frsize
}

#[test]
fn large_files_share_their_blocks() {
    if !rustix::process::getuid().is_root() {
        eprintln!("SKIPPED: reflinks: mounting a filesystem needs root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    File::create(&image).unwrap().set_len(400 << 20).unwrap();
    let made = Command::new("mkfs.xfs").arg("-q").arg(&image).status();
    if !made.is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED: reflinks: there is no mkfs.xfs (Debian's xfsprogs)");
        return;
    }
    let mount = dir.path().join("mount");
    fs::create_dir(&mount).unwrap();
    // The mount ends with the namespace, and that with its only process.
    let script = "mount -o loop -t xfs \"$1\" \"$2\" || exit 77; shift 2; exec \"$@\"";
    let output = Command::new("unshare")
        .args(["-m", "sh", "-c", script, "sh"])
        .args([&image, &mount])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "reflinks::inside", "--ignored", "--nocapture"])
        .env(DIR, &mount)
        .output()
        .unwrap();
    if output.status.code() == Some(77) {
        let why = String::from_utf8_lossy(&output.stderr);
        eprintln!("SKIPPED: reflinks: XFS cannot be mounted here: {why}");
        return;
    }
    assert!(
        output.status.success(),
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Not a test: the work in the namespace.
#[test]
#[ignore = "run by the test beside it"]
fn inside() {
    let Some(dir) = std::env::var_os(DIR) else {
        return;
    };
    let dir = Path::new(&dir);
    let bytes = noise(SIZE, 1);
    let source = dir.join("source");
    fs::write(&source, &bytes).unwrap();
    let file = File::open(&source).unwrap();
    file.sync_all().unwrap();
    let before = free(dir);

    let store = Store::open(dir.join("store")).unwrap();
    let lease = store.lease("test").unwrap();
    let ingest = store.ingest(&lease).unwrap();
    let added = ingest.add_file(&file).unwrap();
    let mut tree = Tree::default();
    put(&mut tree, b"source", added.object, added.size);
    ingest.finish(&tree).unwrap();
    let taken = before.saturating_sub(free(dir));
    assert!(taken < SLACK, "{taken} bytes to take in {SIZE}");

    // Later writes to the source do not reach the store.
    fs::write(&source, b"other").unwrap();
    let blob = store.object(&added.object).unwrap();
    assert_eq!(blob.read_all(SIZE as u64).unwrap(), bytes);
}
