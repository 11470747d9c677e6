//! Trash: files that gc has moved out of their places, where no process can look them up any more,
//! but can still take them back.
//!
//! ```text
//! trash/<generation>/       files of one gc; generations are numbered upwards
//!   born                    JSON: when that was
//!   waits                   JSON: the ingests that were open after objects had been taken out
//!   <layer>.layer           as in layers/
//!   <pack>.pack <pack>.idx  as in packs/
//!   <object>.loose .cv      as in loose/
//! ```
//!
//! A name moves by one rename, so that taking back and removing cannot both succeed. Of a pack the
//! index decides: it is the first to be taken out and the first to be removed, and the last to be
//! taken back.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::disk::{Disk, names};
use crate::error::{IoContext, StoreError};
use crate::id::{LayerId, ObjectId, PackId};
use crate::json::{read_json, write_json};
use crate::lease::Lease;
use crate::pack::Index;
use crate::site::Site;

/// The extension of a layer in the trash.
pub(crate) const LAYER: &str = "layer";
/// The extension of a loose object in the trash.
pub(crate) const LOOSE: &str = "loose";
/// The extension of an outboard, in the trash, too.
pub(crate) const OUTBOARD: &str = "cv";

/// Most layers that stay in the trash; the oldest go first. An editor that saves all day makes a
/// layer each time.
pub const MAX_TRASHED_LAYERS: usize = 16;

/// Longest `born` or `waits` file, in bytes.
pub(crate) const MAX_TRASH_FILE: u64 = 16 << 20;

/// How often a process that may not take anything back looks again, and how long it waits in
/// between. A collection that has taken out a pinned file puts it back as soon as it has read
/// the leases.
const PATIENCE: (u32, Duration) = (250, Duration::from_millis(20));

/// The generations in the trash of the store in `dir`, oldest first.
pub(crate) fn generations(disk: &dyn Disk, dir: &Path) -> Result<Vec<(u64, PathBuf)>, StoreError> {
    let trash = dir.join("trash");
    let mut found = Vec::new();
    for name in list(disk, &trash)? {
        if let Ok(number) = name.parse::<u64>() {
            found.push((number, trash.join(name)));
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// The names in the trash, or in a generation; none if it went meanwhile.
pub(crate) fn list(disk: &dyn Disk, generation: &Path) -> Result<Vec<String>, StoreError> {
    match names(disk, generation) {
        Err(err) if err.io_kind() == Some(io::ErrorKind::NotFound) => Ok(Vec::new()),
        other => other,
    }
}

/// Moves a name. False if it is not there, or not any more.
pub(crate) fn move_name(disk: &dyn Disk, from: &Path, to: &Path) -> Result<bool, StoreError> {
    match disk.rename(from, to) {
        Ok(()) => Ok(true),
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(err) => Err(err).at("renaming", from),
    }
}

/// Takes something back. Where this process may read the store and not rename in it, as that of a
/// microVM, a collection is left the time to do so.
pub(crate) fn patiently(
    mut take_back: impl FnMut() -> Result<bool, StoreError>,
) -> Result<bool, StoreError> {
    let (looks, pause) = PATIENCE;
    for _ in 0..looks {
        match take_back() {
            Err(err) if is_refusal(&err) => thread::sleep(pause),
            other => return other,
        }
    }
    take_back()
}

pub(crate) fn is_refusal(err: &StoreError) -> bool {
    // Landlock says either.
    let refusals = [
        io::ErrorKind::PermissionDenied,
        io::ErrorKind::CrossesDevices,
    ];
    err.io_kind().is_some_and(|kind| refusals.contains(&kind))
}

/// Where things are when they are not in the trash.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Places<'a> {
    pub(crate) disk: &'a dyn Disk,
    /// The store.
    pub(crate) dir: &'a Path,
}

impl<'a> Places<'a> {
    pub(crate) fn of(site: &'a Site) -> Self {
        let (disk, dir) = (site.disk().as_ref(), site.dir());
        Self { disk, dir }
    }

    pub(crate) fn layer(&self, id: &LayerId) -> PathBuf {
        self.dir.join("layers").join(id.to_string())
    }

    pub(crate) fn pack(&self, id: &PackId) -> PathBuf {
        self.dir.join("packs").join(format!("{id}.pack"))
    }

    pub(crate) fn index(&self, id: &PackId) -> PathBuf {
        self.dir.join("packs").join(format!("{id}.idx"))
    }

    pub(crate) fn loose(&self, id: &ObjectId) -> PathBuf {
        self.dir.join("loose").join(id.to_string())
    }

    pub(crate) fn outboard(&self, id: &ObjectId) -> PathBuf {
        self.dir.join("loose").join(format!("{id}.{OUTBOARD}"))
    }

    fn sync(&self, kind: &str) -> Result<(), StoreError> {
        let dir = self.dir.join(kind);
        self.disk.sync_dir(&dir).at("syncing", &dir)
    }

    /// Takes a layer back, durably. False if it is not in the trash.
    pub(crate) fn take_back_layer(&self, id: &LayerId) -> Result<bool, StoreError> {
        for (_, generation) in generations(self.disk, self.dir)? {
            let from = generation.join(format!("{id}.{LAYER}"));
            if move_name(self.disk, &from, &self.layer(id))? {
                self.sync("layers")?;
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Takes a pack back from a generation, durably. False if it is not there, or not any more.
    pub(crate) fn take_back_pack(
        &self,
        generation: &Path,
        id: &PackId,
    ) -> Result<bool, StoreError> {
        // Already back, if another process does the same.
        let from = generation.join(format!("{id}.pack"));
        move_name(self.disk, &from, &self.pack(id))?;
        let from = generation.join(format!("{id}.idx"));
        let taken = move_name(self.disk, &from, &self.index(id))?;
        if taken {
            self.sync("packs")?;
        }
        Ok(taken)
    }

    /// Takes a loose object back from a generation, durably. False if it is not there, or not any
    /// more.
    pub(crate) fn take_back_loose(
        &self,
        generation: &Path,
        id: &ObjectId,
    ) -> Result<bool, StoreError> {
        let outboard = generation.join(format!("{id}.{OUTBOARD}"));
        move_name(self.disk, &outboard, &self.outboard(id))?;
        let from = generation.join(format!("{id}.{LOOSE}"));
        let taken = move_name(self.disk, &from, &self.loose(id))?;
        if taken {
            self.sync("loose")?;
        }
        Ok(taken)
    }

    /// Takes an object back, with the pack that holds it. False if it is not in the trash.
    pub(crate) fn take_back_object(&self, id: &ObjectId) -> Result<bool, StoreError> {
        for (_, generation) in generations(self.disk, self.dir)? {
            if self.take_back_loose(&generation, id)? {
                return Ok(true);
            }
            for name in list(self.disk, &generation)? {
                let Some((pack, suffix)) = name.split_once('.') else {
                    continue;
                };
                let Ok(pack) = pack.parse::<PackId>() else {
                    continue;
                };
                if suffix == "idx" {
                    if self.holds(&generation.join(&name), &pack, id)
                        && self.take_back_pack(&generation, &pack)?
                    {
                        return Ok(true);
                    }
                } else if suffix == "pack" && self.holds(&self.index(&pack), &pack, id) {
                    // It is just being taken out, or back: its index is still, or already, in its
                    // place.
                    move_name(self.disk, &generation.join(&name), &self.pack(&pack))?;
                    self.sync("packs")?;
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// Whether this index is there and names the object.
    fn holds(&self, index: &Path, pack: &PackId, id: &ObjectId) -> bool {
        let index = self
            .disk
            .open(index)
            .map(|file| Index::open(self.disk, &file, pack));
        index.is_ok_and(|index| index.is_ok_and(|index| index.position(id).is_some()))
    }
}

/// When a generation of the trash was made.
#[derive(Debug, Serialize, Deserialize)]
struct Born {
    unix_seconds: u64,
}

/// Writes down when a generation is made.
pub(crate) fn note_birth(lease: &Lease, generation: &Path) -> Result<(), StoreError> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let born = Born {
        unix_seconds: now.unwrap_or_default().as_secs(),
    };
    write_json(lease, &generation.join("born"), &born, MAX_TRASH_FILE)
}

/// A layer in the trash, and when its generation was made.
pub(crate) struct TrashedLayer {
    pub(crate) id: LayerId,
    pub(crate) path: PathBuf,
    pub(crate) born: SystemTime,
}

fn born(site: &Site, generation: &Path) -> Result<SystemTime, StoreError> {
    let path = generation.join("born");
    match read_json::<Born>(site.disk().as_ref(), &path, MAX_TRASH_FILE) {
        Ok(Some(born)) => Ok(UNIX_EPOCH + Duration::from_secs(born.unix_seconds)),
        // It is written before anything is moved here, so this is damage of unknown age.
        // A generation without an end would stay for good.
        Ok(None) | Err(StoreError::Json { .. } | StoreError::Damaged { .. }) => Ok(UNIX_EPOCH),
        Err(err) => Err(err),
    }
}

/// The layers of `trashed`, oldest generation first, whose time is over when `more` layers come
/// into the trash: they are older than `grace`, or not among the last [`MAX_TRASHED_LAYERS`].
pub(crate) fn over(trashed: &[TrashedLayer], more: usize, grace: Duration) -> HashSet<LayerId> {
    let too_many = (trashed.len() + more).saturating_sub(MAX_TRASHED_LAYERS);
    let over = trashed.iter().enumerate();
    let over = over.filter(|(ix, layer)| *ix < too_many || is_over(layer.born, grace));
    over.map(|(_, layer)| layer.id).collect()
}

/// Of `garbage` layers that come into the trash, how many leave it at once. Those with the least
/// ids do.
pub(crate) fn at_once(garbage: usize, grace: Duration) -> usize {
    if grace.is_zero() {
        return garbage;
    }
    garbage.saturating_sub(MAX_TRASHED_LAYERS)
}

/// The layers in the trash, oldest generation first, and by id in each.
pub(crate) fn layers(site: &Site) -> Result<Vec<TrashedLayer>, StoreError> {
    let disk = site.disk().as_ref();
    let mut layers = Vec::new();
    for (_, generation) in generations(disk, site.dir())? {
        let born = born(site, &generation)?;
        let mut names = list(disk, &generation)?;
        names.sort_unstable();
        for name in names {
            let id = name.strip_suffix(LAYER).and_then(|id| id.strip_suffix('.'));
            if let Some(id) = id.and_then(|id| id.parse().ok()) {
                let path = generation.join(name);
                layers.push(TrashedLayer { id, path, born });
            }
        }
    }
    Ok(layers)
}

/// Whether a generation of that time has been in the trash for this long.
pub(crate) fn is_over(born: SystemTime, grace: Duration) -> bool {
    // A clock that was set back makes nothing younger than new.
    let age = SystemTime::now().duration_since(born).unwrap_or_default();
    age >= grace
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_not_take_back_waits_for_who_may() {
        let fails = |kind: io::ErrorKind| Err(io::Error::from(kind)).at("renaming", Path::new("x"));
        let refusals = [
            io::ErrorKind::PermissionDenied,
            io::ErrorKind::CrossesDevices,
        ];
        let mut answers = refusals.map(fails).into_iter();
        // By then it is not in the trash any more.
        let taken = patiently(|| answers.next().unwrap_or(Ok(false)));
        assert!(!taken.unwrap());
        assert!(answers.next().is_none());
        let mut looks = 0;
        let failed = patiently(|| {
            looks += 1;
            fails(io::ErrorKind::StorageFull)
        });
        assert_eq!(
            (failed.unwrap_err().io_kind(), looks),
            (Some(io::ErrorKind::StorageFull), 1)
        );
    }
}
