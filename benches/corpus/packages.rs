//! A `node_modules` of about 30,000 files.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};

use crate::corpus::cache;
use crate::support::{Result, failed, run};

const MANIFEST: &[u8] = include_bytes!("package.json");
const LOCKFILE: &[u8] = include_bytes!("package-lock.json");
const REQUIRE: &[u8] = include_bytes!("require.js");

/// A directory with a `node_modules` of about 30,000 files of real packages, and `require.js`,
/// which loads them.
pub fn node_modules() -> Result<PathBuf> {
    let key = Sha256::new()
        .chain_update(MANIFEST)
        .chain_update(LOCKFILE)
        .chain_update(REQUIRE)
        .finalize();
    let key = key[..8]
        .iter()
        .fold(String::new(), |key, byte| format!("{key}{byte:02x}"));
    let dir = cache()?.join(format!("node_modules-{key}"));
    once(&dir, |dir| {
        eprintln!("corpus: installing packages from npm");
        let put = |name: &str, bytes: &[u8]| {
            let path = dir.join(name);
            fs::write(&path, bytes).map_err(failed("writing", &path))
        };
        put("package.json", MANIFEST)?;
        put("package-lock.json", LOCKFILE)?;
        put("require.js", REQUIRE)?;
        let mut npm = Command::new("npm");
        npm.args([
            "ci",
            "--ignore-scripts",
            "--no-audit",
            "--no-fund",
            "--loglevel=error",
        ]);
        run(npm.current_dir(dir))?;
        Ok(())
    })
}

/// `dir`, filled by `fill` unless it was before; never half full.
fn once(dir: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    if dir.is_dir() {
        return Ok(dir.to_owned());
    }
    let tmp = tempfile::Builder::new()
        .prefix(".making-")
        .tempdir_in(dir.parent().unwrap_or(dir))
        .map_err(failed("making", dir))?;
    fill(tmp.path())?;
    let tmp = tmp.keep();
    match fs::rename(&tmp, dir) {
        Ok(()) => Ok(dir.to_owned()),
        // Another run was faster.
        Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
            fs::remove_dir_all(&tmp).map_err(failed("removing", &tmp))?;
            Ok(dir.to_owned())
        }
        Err(error) => Err(failed("naming", dir)(error)),
    }
}
