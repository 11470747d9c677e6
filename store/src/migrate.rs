//! Migration of a store of the layout before seals: its JSON files are sealed, its loose objects
//! get outboards, and last its format says so.
//!
//! An interrupted migration is completed by the next one. Until the format is written, the store is
//! of the earlier layout, and programs of that layout do not read the new files. A store that an
//! earlier program is using cannot be migrated: that program would not know the new files.
//! cannot be migrated: it would not know the new files.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use serde::de::IgnoredAny;

use crate::disk::{Disk, names, read_file};
use crate::error::{IoContext, StoreError};
use crate::id::ObjectId;
use crate::keys::{FACTS_DIR, MAX_KEY_FILE};
use crate::lease::{self, Lease};
use crate::lock::FileLock;
use crate::outboard::Outboard;
use crate::refs::RefKind;
use crate::repair::write_outboard;
use crate::seal;
use crate::store::{DIRS, Format, Found, Store};

/// The result of a migration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Migration {
    /// JSON files that were sealed.
    pub sealed: u64,
    /// Outboards that were made.
    pub outboards: u64,
    /// Files that were damaged before, relative to the store. They are left as they are:
    /// verification reports their effect.
    #[serde(serialize_with = "crate::path_json::all")]
    pub damaged: Vec<PathBuf>,
}

/// Progress of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MigrateEvent {
    /// A collection runs; the migration waits for it.
    Waiting,
    /// This many files are done.
    Done(u64),
}

/// Called with the progress of a migration.
pub type OnMigrate<'a> = &'a dyn Fn(MigrateEvent);

impl Store {
    /// Migrates the store in `dir`, in place, durably. An interrupted migration may be run again; a
    /// store that is up to date is left as it is. While another living process holds a lease, the
    /// result is [`StoreError::InUse`].
    pub fn migrate(
        dir: &Path,
        disk: Arc<dyn Disk>,
        on_event: OnMigrate<'_>,
    ) -> Result<Migration, StoreError> {
        let format = match Format::read(disk.as_ref(), dir)? {
            Found::Current(_) => return Ok(Migration::default()),
            Found::Outdated(format) => format,
            Found::Nothing => {
                return Err(StoreError::Damaged {
                    path: dir.join("format"),
                    what: "it is missing: this directory is not a store",
                });
            }
        };
        let store = Self::assemble(dir, disk, format.read_only());
        let lease = store.lease("migrate")?;
        let on_wait = || on_event(MigrateEvent::Waiting);
        let _gc = FileLock::acquire(store.disk(), &store.gc_lock(), &on_wait)?;
        let lock = dir.join("locks/format");
        let _lock = FileLock::acquire(store.disk(), &lock, &|| {})?;
        let disk = store.disk().as_ref();
        if matches!(Format::read(disk, dir)?, Found::Current(_)) {
            return Ok(Migration::default());
        }
        refuse_in_use(&store, &lease)?;
        for name in DIRS {
            let path = dir.join(name);
            disk.create_dir(&path).at("making", &path)?;
        }
        let mut work = Work {
            store: &store,
            lease: &lease,
            on_event,
            done: Migration::default(),
        };
        // Repeat until a pass finds nothing to do: an earlier program, which knows no seals, may
        // have used the store during the last one.
        loop {
            let before = work.done.clone();
            work.done.damaged.clear();
            work.run()?;
            if work.done == before {
                break;
            }
        }
        refuse_in_use(&store, &lease)?;
        format.sealed().write(store.site())?;
        Ok(work.done)
    }
}

fn refuse_in_use(store: &Store, own: &Lease) -> Result<(), StoreError> {
    let mut others = lease::live(store.site())?;
    others.retain(|lease| lease.name != own.name());
    match others.into_iter().next() {
        None => Ok(()),
        Some(lease) => Err(StoreError::InUse {
            path: store.dir().to_owned(),
            purpose: lease.purpose,
        }),
    }
}

struct Work<'a> {
    store: &'a Store,
    lease: &'a Lease,
    on_event: OnMigrate<'a>,
    done: Migration,
}

impl Work<'_> {
    fn run(&mut self) -> Result<(), StoreError> {
        self.seal_all("keys")?;
        self.seal_all(FACTS_DIR)?;
        for kind in RefKind::ALL {
            self.seal_all(kind.path())?;
        }
        self.outboards()
    }

    fn damaged(&mut self, dir: &str, name: &str) {
        self.done.damaged.push(Path::new(dir).join(name));
    }

    fn did(&self) {
        let count = self.done.sealed + self.done.outboards;
        (self.on_event)(MigrateEvent::Done(count));
    }

    /// Seals the JSON files in a directory.
    fn seal_all(&mut self, name: &str) -> Result<(), StoreError> {
        let disk = self.store.disk().as_ref();
        let dir = self.store.dir().join(name);
        for file in names(disk, &dir)? {
            let path = dir.join(&file);
            let text = match read_file(disk, &path, MAX_KEY_FILE) {
                Err(StoreError::Damaged { .. }) => {
                    self.damaged(name, &file);
                    continue;
                }
                other => other?,
            };
            let Some(text) = text.filter(|text| seal::open(text).is_none()) else {
                continue;
            };
            if serde_json::from_slice::<IgnoredAny>(&text).is_err() {
                self.damaged(name, &file);
                continue;
            }
            let tmp = self.lease.tmp()?;
            tmp.write(&seal::seal(text.trim_ascii_end().to_vec()), 0)?;
            tmp.sync()?;
            tmp.publish(&path)?;
            self.done.sealed += 1;
            self.did();
        }
        disk.sync_dir(&dir).at("syncing", &dir)
    }

    fn outboards(&mut self) -> Result<(), StoreError> {
        let disk = self.store.disk().as_ref();
        for name in names(disk, &self.store.dir().join("loose"))? {
            let Ok(id) = name.parse::<ObjectId>() else {
                continue;
            };
            let path = self.store.places().loose(&id);
            let len = disk.metadata(&path).at("looking at", &path)?.len();
            let stored = read_file(
                disk,
                &self.store.places().outboard(&id),
                Outboard::file_len(len),
            );
            let stored = stored.ok().flatten();
            if stored.is_some_and(|bytes| Outboard::decode(&bytes, &id, len).is_some()) {
                continue;
            }
            if write_outboard(self.store, self.lease, &id)? {
                self.done.outboards += 1;
                self.did();
            } else {
                self.damaged("loose", &name);
            }
        }
        Ok(())
    }
}
