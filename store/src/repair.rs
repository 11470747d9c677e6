//! Repairing: damage that verification found is moved aside, and everything that depends on it is
//! dropped, so that it is made again.
//!
//! Nothing is deleted: damaged files are moved to `damaged/<n>/`, under their former paths. Repair
//! runs under the lock of gc, beside everything else, and in this order, so that a crash at any
//! point leaves a state that is no worse than before and can be repaired again:
//!
//! 1. The whole objects of damaged packs are written into a new pack.
//! 2. Records that name lost layers are dropped: layers that are damaged, or name objects that are
//!    lost. A ref stays: it keeps its other layers, and is whole again once the lost ones are
//!    stored again, or their objects: see `aside`.
//! 3. These layers are set aside, in the trash, too.
//! 4. Then the packs and loose objects, indexes first: a process that stores the same contents
//!    again finds that they are not there.
//! 5. Outboards are made again, and the format last.
//!
//! A file that cannot be read now is left as it is, and so is everything that may depend on it: see
//! [`crate::verify`].

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::aside::DAMAGED;
use crate::blob::{hash_file, read_exact};
use crate::disk::{Disk, names, read_file};
use crate::error::{IoContext, StoreError};
use crate::id::{KeyId, LayerId, ObjectId, PackId};
use crate::keys::{FACTS_DIR, HEADS, RecordHead};
use crate::lease::Lease;
use crate::lock::FileLock;
use crate::objects::LOOSE_MIN;
use crate::outboard::Outboard;
use crate::pack::{self, Place};
use crate::pack_writer::PackWriter;
use crate::refs::RefKind;
use crate::store::{Format, Store};
use crate::verify::{Finding, Pass, Report};

/// Longest index that is read to save objects of its pack, in bytes: of 20 million objects.
const MAX_INDEX: u64 = 1 << 30;

/// Something that a repair did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "did", rename_all = "snake_case")]
pub enum Mended {
    /// Moved something out of the way. Both paths are relative to the store.
    SetAside {
        /// Where it was.
        #[serde(serialize_with = "crate::path_json::one")]
        path: PathBuf,
        /// Where it is now.
        #[serde(serialize_with = "crate::path_json::one")]
        to: PathBuf,
    },
    /// Wrote the objects of a damaged pack that hold into another one.
    Salvaged {
        /// The damaged pack.
        pack: PackId,
        /// Objects that were saved.
        objects: u64,
        /// Objects that are lost, until they are stored again.
        lost: u64,
    },
    /// Dropped records of a key: it is built again when it is needed.
    RecordsDropped {
        /// The key.
        key: KeyId,
        /// How many.
        records: u64,
    },
    /// Set aside a ref whose file is damaged, or a cache volume that lost a layer: it keeps no
    /// layer any longer.
    RefDropped {
        /// Kind of the name.
        ref_kind: RefKind,
        /// The name; that of its file if the file is damaged.
        name: String,
    },
    /// Lost layers that a ref names. It keeps the others, and is whole again once these are stored
    /// again.
    RefNotWhole {
        /// Kind of the name.
        ref_kind: RefKind,
        /// The name.
        name: String,
        /// How many layers of it were lost.
        layers: u64,
    },
    /// Made an outboard again.
    Outboard {
        /// The object.
        object: ObjectId,
    },
    /// Made a directory again.
    Directory {
        /// The directory, relative to the store.
        #[serde(serialize_with = "crate::path_json::one")]
        path: PathBuf,
    },
    /// Wrote the format again. The store must be opened anew.
    Format,
}

/// Told of everything that a repair does.
pub type OnRepair<'a> = &'a dyn Fn(&Mended);

impl Store {
    /// Mends what a report says: see [`crate::repair`]. Waits for a collection that runs. A report
    /// that left problems out is mended as far as it goes; verify again. A file that cannot be read
    /// is left as it is.
    pub fn repair(
        &self,
        report: &Report,
        on_event: OnRepair<'_>,
    ) -> Result<Vec<Mended>, StoreError> {
        let mut repair = Repair::begin(self, report, on_event)?;
        repair.run()?;
        Ok(repair.done)
    }
}

/// Files to move aside.
#[derive(Default)]
struct Condemned {
    packs: BTreeSet<PackId>,
    loose: BTreeSet<ObjectId>,
}

struct Repair<'a> {
    store: &'a Store,
    disk: &'a dyn Disk,
    report: &'a Report,
    on_event: OnRepair<'a>,
    lease: Lease,
    _lock: FileLock,
    /// `damaged/<n>`, relative to the store, once it is there.
    aside: Option<PathBuf>,
    done: Vec<Mended>,
}

impl<'a> Repair<'a> {
    fn begin(
        store: &'a Store,
        report: &'a Report,
        on_event: OnRepair<'a>,
    ) -> Result<Self, StoreError> {
        let disk = store.disk().as_ref();
        let mut done = Vec::new();
        // Leases and locks need theirs.
        for problem in &report.problems {
            if problem.finding == Finding::Directory {
                let path = store.dir().join(&problem.path);
                disk.create_dir(&path).at("making", &path)?;
                let path = problem.path.clone();
                done.push(Mended::Directory { path });
            }
        }
        disk.sync_dir(store.dir()).at("syncing", store.dir())?;
        let lease = store.lease_to_repair()?;
        Ok(Self {
            store,
            disk,
            report,
            on_event,
            lease,
            _lock: FileLock::acquire(store.disk(), &store.gc_lock(), &|| {})?,
            aside: None,
            done,
        })
    }

    fn did(&mut self, mended: Mended) {
        (self.on_event)(&mended);
        self.done.push(mended);
    }

    fn sync(&self, dir: &Path) -> Result<(), StoreError> {
        self.disk.sync_dir(dir).at("syncing", dir)
    }

    /// Moves something out of the way, durably. `path` is relative to the store. False if it is not
    /// there.
    fn set_aside(&mut self, path: &Path) -> Result<bool, StoreError> {
        let dir = self.store.dir();
        let from = dir.join(path);
        match self.disk.metadata(&from) {
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(false),
            other => other.at("looking at", &from).map(drop)?,
        }
        let aside = if let Some(aside) = &self.aside {
            aside.clone()
        } else {
            let all = dir.join(DAMAGED);
            self.disk.create_dir(&all).at("making", &all)?;
            let numbers = names(self.disk, &all)?;
            let last = numbers
                .iter()
                .filter_map(|name| name.parse::<u64>().ok())
                .max();
            let aside = Path::new(DAMAGED).join((last.unwrap_or(0) + 1).to_string());
            let path = dir.join(&aside);
            self.disk.create_dir(&path).at("making", &path)?;
            self.sync(&all)?;
            self.sync(dir)?;
            self.aside.insert(aside).clone()
        };
        let mut parent = dir.join(&aside);
        for part in path.parent().into_iter().flat_map(Path::components) {
            parent.push(part);
            self.disk.create_dir(&parent).at("making", &parent)?;
            self.sync(parent.parent().unwrap_or(&parent))?;
        }
        let to = aside.join(path);
        self.disk
            .rename(&from, &dir.join(&to))
            .at("renaming", &from)?;
        self.sync(&parent)?;
        self.sync(from.parent().unwrap_or(dir))?;
        let path = path.to_owned();
        self.did(Mended::SetAside { path, to });
        Ok(true)
    }

    fn run(&mut self) -> Result<(), StoreError> {
        let mut condemned = self.condemned();
        self.salvage(&mut condemned)?;
        // Needed objects that exist only in condemned files are lost.
        let pass = Pass::without(self.store, &condemned.packs, &condemned.loose);
        let broken = pass.broken_layers();
        let there = broken.iter().filter(|(_, path)| path.starts_with("layers"));
        let lost = there.map(|(id, _)| *id).collect();
        self.drop_records(&lost)?;
        self.look_at_refs(&lost)?;
        for (_, path) in broken {
            self.set_aside(&path)?;
        }
        self.store.forget_layers(&lost);
        let packs = Path::new("packs");
        for id in &condemned.packs {
            self.set_aside(&packs.join(format!("{id}.idx")))?;
            self.set_aside(&packs.join(format!("{id}.pack")))?;
        }
        let loose = Path::new("loose");
        for id in &condemned.loose {
            self.set_aside(&loose.join(id.to_string()))?;
            self.set_aside(&loose.join(format!("{id}.cv")))?;
        }
        let report = self.report;
        for problem in &report.problems {
            match problem.finding {
                Finding::StatCache | Finding::Foreign => {
                    self.set_aside(&problem.path)?;
                }
                Finding::Outboard { object } | Finding::NoOutboard { object } => {
                    self.make_outboard(&object)?;
                }
                _ => {}
            }
        }
        if report
            .problems
            .iter()
            .any(|problem| problem.finding == Finding::Format)
        {
            self.set_aside(Path::new("format"))?;
            let lock = self.store.dir().join("locks/format");
            let _lock = FileLock::acquire(self.store.disk(), &lock, &|| {})?;
            let mut format = Format::default();
            if !names(self.disk, &self.store.dir().join(FACTS_DIR))?.is_empty() {
                format.ro_compat.push(HEADS.to_owned());
            }
            for kind in RefKind::ALL {
                let dir = self.store.dir().join(kind.path());
                if !names(self.disk, &dir)?.is_empty() {
                    format.ro_compat.extend(kind.feature().map(str::to_owned));
                }
            }
            format.write(self.store.site())?;
            self.did(Mended::Format);
        }
        // An index that cannot be read is in the report; each read of an object tells of it, too.
        let _ = self.store.objects().refresh();
        Ok(())
    }

    /// The packs and loose objects of the report that are damaged still.
    fn condemned(&self) -> Condemned {
        let mut condemned = Condemned::default();
        for problem in &self.report.problems {
            match problem.finding {
                Finding::Index { pack }
                | Finding::Pack { pack }
                | Finding::Object {
                    pack: Some(pack), ..
                } => {
                    condemned.packs.insert(pack);
                }
                Finding::Object { object, pack: None } => {
                    let path = self.store.places().loose(&object);
                    let file = self.disk.open(&path);
                    let hashed = file.and_then(|file| hash_file(self.disk, &file));
                    // One that cannot be read, or went, is left as it is.
                    if hashed.is_ok_and(|(found, _)| found != object) {
                        condemned.loose.insert(object);
                    }
                }
                _ => {}
            }
        }
        condemned
    }

    /// Writes the good objects of the condemned packs into a new one. A pack that cannot be read is
    /// condemned no longer.
    fn salvage(&mut self, condemned: &mut Condemned) -> Result<(), StoreError> {
        let writer = PackWriter::default();
        let mut saved = Vec::new();
        let mut any = false;
        let mut spared = BTreeSet::new();
        'packs: for id in &condemned.packs {
            let (pack, index) = (self.store.places().pack(id), self.store.places().index(id));
            let (mut good, mut lost) = (0, 0);
            let file = match self.disk.open(&pack) {
                Ok(file) => Some(file),
                Err(err) if err.kind() == io::ErrorKind::NotFound => None,
                Err(_) => {
                    spared.insert(*id);
                    continue;
                }
            };
            let mut places = match read_file(self.disk, &index, MAX_INDEX) {
                Ok(bytes) => pack::salvage_index(&bytes.unwrap_or_default()),
                Err(err) if err.is_damage() => Vec::new(),
                Err(_) => {
                    spared.insert(*id);
                    continue;
                }
            };
            places.sort_unstable_by_key(|(_, place)| place.offset);
            for (object, Place { offset, len }) in places {
                let mut bytes = vec![0; len.min(LOOSE_MIN) as usize];
                let read = match &file {
                    Some(file) => read_exact(self.disk, file, &mut bytes, offset),
                    None => Err(io::ErrorKind::UnexpectedEof.into()),
                };
                let is_read = match read {
                    Ok(()) => true,
                    Err(err) if err.kind() == io::ErrorKind::UnexpectedEof => false,
                    Err(_) => {
                        spared.insert(*id);
                        continue 'packs;
                    }
                };
                if len >= LOOSE_MIN || !is_read || ObjectId::of(&bytes) != object {
                    lost += 1;
                    continue;
                }
                if !any {
                    // An object of its own keeps the new pack from having the name of the damaged
                    // one.
                    let mark = format!("salvaged {}", self.lease.name());
                    let id = ObjectId::of(mark.as_bytes());
                    writer.add(|| self.lease.tmp(), id, mark.as_bytes())?;
                    any = true;
                }
                writer.add(|| self.lease.tmp(), object, &bytes)?;
                good += 1;
            }
            saved.push((*id, good, lost));
        }
        condemned.packs.retain(|id| !spared.contains(id));
        if let Some(pack) = writer.finish()? {
            pack.publish(&self.lease)?;
        }
        for (pack, objects, lost) in saved {
            self.did(Mended::Salvaged {
                pack,
                objects,
                lost,
            });
        }
        Ok(())
    }

    fn is_lost(&self, layer: &LayerId, lost: &BTreeSet<LayerId>) -> Result<bool, StoreError> {
        if lost.contains(layer) {
            return Ok(true);
        }
        match self.store.require_layer(layer) {
            Err(StoreError::MissingLayer(_)) => Ok(true),
            other => other.map(|()| false),
        }
    }

    fn drop_records(&mut self, lost: &BTreeSet<LayerId>) -> Result<(), StoreError> {
        for name in names(self.disk, &self.store.dir().join("keys"))? {
            let Ok(key) = name.parse::<KeyId>() else {
                continue;
            };
            let mut gone = BTreeSet::new();
            let mut damaged = BTreeSet::new();
            match self.store.checked_heads(&key) {
                Err(err) if err.is_damage() => {
                    self.set_aside(&Path::new("keys").join(key.to_string()))?;
                }
                Err(_) => continue,
                Ok(records) => {
                    for record in records {
                        if self.is_lost(&record.layer_id, lost)? {
                            gone.insert(record.layer_id);
                        }
                        match self.store.checked_facts(&key, &record) {
                            Ok(None) => {
                                damaged.insert(record.facts);
                            }
                            Err(err) if err.is_damage() => {
                                let name = format!("{key}.{}", record.facts);
                                self.set_aside(&Path::new(FACTS_DIR).join(name))?;
                                damaged.insert(record.facts);
                            }
                            // They are whole, or cannot be read.
                            Ok(Some(_)) | Err(_) => {}
                        }
                    }
                }
            }
            if gone.is_empty() && damaged.is_empty() {
                continue;
            }
            let go =
                |head: &RecordHead| gone.contains(&head.layer_id) || damaged.contains(&head.facts);
            let records = self.store.drop_records(&self.lease, &key, &go)?;
            if records > 0 {
                self.did(Mended::RecordsDropped { key, records });
            }
        }
        Ok(())
    }

    /// Sets damaged refs aside, and tells of those that name a layer which is lost.
    fn look_at_refs(&mut self, lost: &BTreeSet<LayerId>) -> Result<(), StoreError> {
        for ref_kind in RefKind::ALL {
            let dir = Path::new(ref_kind.path());
            for file in names(self.disk, &self.store.dir().join(dir))? {
                match self.store.read_ref(ref_kind, &file) {
                    Ok(Some((name, content))) => {
                        let gone = content.layers.iter().filter(|id| lost.contains(id));
                        let layers = gone.count() as u64;
                        if layers == 0 {
                            continue;
                        }
                        // A cache is not stored again, but filled again.
                        if ref_kind == RefKind::Volume {
                            self.set_aside(&dir.join(&file))?;
                            self.did(Mended::RefDropped { ref_kind, name });
                        } else {
                            self.did(Mended::RefNotWhole {
                                ref_kind,
                                name,
                                layers,
                            });
                        }
                    }
                    Err(err) if err.is_damage() => {
                        if self.set_aside(&dir.join(&file))? {
                            let name = file;
                            self.did(Mended::RefDropped { ref_kind, name });
                        }
                    }
                    // It went, or cannot be read.
                    Ok(None) | Err(_) => {}
                }
            }
        }
        Ok(())
    }

    fn make_outboard(&mut self, object: &ObjectId) -> Result<(), StoreError> {
        let path = self.store.places().loose(object);
        let file = self.disk.open(&path);
        let hashed = file.and_then(|file| hash_file(self.disk, &file));
        let Ok((found, outboard)) = hashed else {
            return Ok(());
        };
        self.set_aside(&Path::new("loose").join(format!("{object}.cv")))?;
        if found == *object {
            put_outboard(self.store, &self.lease, object, &outboard)?;
            self.did(Mended::Outboard { object: *object });
        }
        Ok(())
    }
}

/// Makes the outboard of a loose object, durably. False if the object is not there, or damaged.
pub(crate) fn write_outboard(
    store: &Store,
    lease: &Lease,
    object: &ObjectId,
) -> Result<bool, StoreError> {
    let (disk, path) = (store.disk().as_ref(), store.places().loose(object));
    let file = match disk.open(&path) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(false),
        other => other.at("opening", &path)?,
    };
    let (found, outboard) = hash_file(disk, &file).at("reading", &path)?;
    if found != *object {
        return Ok(false);
    }
    put_outboard(store, lease, object, &outboard)?;
    Ok(true)
}

fn put_outboard(
    store: &Store,
    lease: &Lease,
    object: &ObjectId,
    outboard: &Outboard,
) -> Result<(), StoreError> {
    let tmp = lease.tmp()?;
    tmp.write(&outboard.encode(), 0)?;
    tmp.sync()?;
    tmp.publish(&store.places().outboard(object))?;
    let dir = store.dir().join("loose");
    store.disk().sync_dir(&dir).at("syncing", &dir)
}
