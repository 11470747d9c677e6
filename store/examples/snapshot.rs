//! Takes a directory into a store, twice, and says how long each took:
//! `snapshot STORE DIR [EXCLUDE…]`.

use std::error::Error;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Instant;

use iii_store::Store;
use iii_store::snapshot::{Options, snapshot};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [store, dir, excludes @ ..] = &args[..] else {
        return Err("usage: snapshot STORE DIR [EXCLUDE…]".into());
    };
    let excludes: Vec<&[u8]> = excludes
        .iter()
        .map(|name| name.as_os_str().as_bytes())
        .collect();
    for _ in 0..2 {
        let begin = Instant::now();
        let store = Store::open(store)?;
        let lease = store.lease("example")?;
        let name = dir.canonicalize()?.to_string_lossy().into_owned();
        let options = Options {
            name: &name,
            at: b"workspace",
            excludes: &excludes,
            uid: 0,
            gid: 0,
        };
        let taken = snapshot(&store, &lease, dir, &options)?;
        println!(
            "{} in {:.3} s: {} files, {} read, {} changed, {} removed; {} files and {} bytes new to the store",
            taken.published.layer_id.short(),
            begin.elapsed().as_secs_f64(),
            taken.files,
            taken.read,
            taken.changed,
            taken.removed,
            taken.published.new_files,
            taken.published.new_bytes,
        );
    }
    Ok(())
}
