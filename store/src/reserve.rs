//! The reserve: files whose only use is to be removed when the disk is full, so that freeing space
//! never fails for want of it.
//!
//! A collection, and the removal of a ref, write a little: a lease, locks, a generation of the
//! trash. On a filesystem without a free block or inode they remove the reserve first and make it
//! again when there is room. Another process may take the freed space, and a store of an earlier
//! program has no reserve; then stat caches go, which only save time.

use std::io;
use std::path::Path;

use crate::disk::{Disk, names};
use crate::error::{IoContext, StoreError};
use crate::lease;
use crate::site::Site;

/// The directory of the reserve.
pub(crate) const RESERVE: &str = "reserve";
/// Its files: as many as a collection has of its own at most, and a few more.
const FILES: usize = 12;
/// Length of each, in bytes: as much as a collection writes to one file, whatever the filesystem's
/// block.
const LEN: usize = 16 << 10;

/// Makes the files of the reserve that are not there, as far as there is room.
pub(crate) fn fill(site: &Site) {
    // The store is as good without it, as long as the disk is not full.
    let _ = try_fill(site.disk().as_ref(), &site.dir().join(RESERVE));
}

/// Frees a little: the reserve, or else the largest stat cache. False if there is neither.
pub(crate) fn make_room(site: &Site) -> Result<bool, StoreError> {
    let disk = site.disk().as_ref();
    let dir = site.dir().join(RESERVE);
    let mut freed = false;
    if disk.metadata(&dir).is_ok() {
        for name in names(disk, &dir)? {
            freed |= remove(disk, &dir.join(name))?;
        }
    }
    if freed {
        return Ok(true);
    }
    let dir = site.dir().join("stat");
    let mut caches = Vec::new();
    for name in names(disk, &dir)? {
        let path = dir.join(name);
        // One that went meanwhile has made room, too.
        caches.extend(disk.metadata(&path).ok().map(|meta| (meta.len(), path)));
    }
    match caches.into_iter().max() {
        Some((_, path)) => remove(disk, &path),
        None => Ok(false),
    }
}

/// Makes room for `free`, which frees something, on a disk without a free block or inode.
pub(crate) fn with_room<T>(
    site: &Site,
    mut free: impl FnMut() -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    let mut result = free();
    if !is_full(&result) {
        return result;
    }
    // No process needs the remains of interrupted ones.
    lease::sweep(site)?;
    result = free();
    while is_full(&result) && make_room(site)? {
        result = free();
    }
    if result.is_ok() {
        fill(site);
    }
    result
}

fn is_full<T>(result: &Result<T, StoreError>) -> bool {
    result.as_ref().is_err_and(StoreError::is_full)
}

fn remove(disk: &dyn Disk, path: &Path) -> Result<bool, StoreError> {
    match disk.remove(path) {
        Ok(()) => Ok(true),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(err) => Err(err).at("removing", path),
    }
}

fn try_fill(disk: &dyn Disk, dir: &Path) -> io::Result<()> {
    let there = disk.list(dir)?;
    if there.len() >= FILES {
        return Ok(());
    }
    // Bytes that do not compress, so that they take blocks everywhere.
    let mut bytes = vec![0; LEN];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    for number in 0..FILES {
        let path = dir.join(number.to_string());
        let file = match disk.create(&path) {
            Err(err) if err.kind() == io::ErrorKind::AlreadyExists => continue,
            other => other?,
        };
        // Half a file is better than none, and than an inode that is needed elsewhere.
        disk.write_at(&file, &bytes, 0)?;
    }
    Ok(())
}
