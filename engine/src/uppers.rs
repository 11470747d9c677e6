//! The uppers of all workers, for the check of them.

use std::io;
use std::path::{Path, PathBuf};

use iii_overlay::upper::{self, UpperError, UpperReport};

use crate::home::Home;

/// An upper that was read.
#[derive(Debug)]
pub struct CheckedUpper {
    /// Its directory, or a directory of workers that could not be listed.
    pub dir: PathBuf,
    /// Its contents, or why it cannot be used.
    pub found: Result<UpperReport, UpperError>,
}

/// Reads the upper of every worker, in the order of their paths. Changes nothing and takes no lock:
/// the workers may run.
pub fn check_all(home: &Home) -> Vec<CheckedUpper> {
    let mut all = Vec::new();
    for workers in [home.all_dev(), home.all_managed()] {
        match uppers_in(&workers) {
            Ok(dirs) => all.extend(dirs.into_iter().filter_map(check)),
            Err(source) => all.push(CheckedUpper {
                found: Err(failed("listing", &workers, source)),
                dir: workers,
            }),
        }
    }
    all
}

/// The places of the uppers of the workers below `workers`. A worker need not have one.
fn uppers_in(workers: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match workers.read_dir() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let dirs = entries.map(|entry| Ok(entry?.path().join("upper")));
    let mut dirs: Vec<PathBuf> = dirs.collect::<io::Result<_>>()?;
    dirs.sort();
    Ok(dirs)
}

/// None if there is no upper.
fn check(dir: PathBuf) -> Option<CheckedUpper> {
    if let Err(source) = dir.symlink_metadata() {
        let absent = [io::ErrorKind::NotFound, io::ErrorKind::NotADirectory];
        return (!absent.contains(&source.kind())).then(|| CheckedUpper {
            found: Err(failed("opening", &dir, source)),
            dir,
        });
    }
    let mut found = upper::check(&dir);
    if found.is_err() {
        // A worker that runs writes meanwhile, and a snapshot puts a new upper in its place: only
        // what still looks wrong is.
        found = upper::check(&dir);
    }
    Some(CheckedUpper { dir, found })
}

fn failed(what: &'static str, path: &Path, source: io::Error) -> UpperError {
    UpperError::Io {
        what,
        path: path.to_path_buf(),
        source,
    }
}
