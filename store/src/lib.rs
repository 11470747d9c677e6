//! The store: objects, trees, layers, keys, refs and leases, shared by every worker of a machine.
//!
//! It knows no network, no terminal, no environment and no home directory; progress is an event
//! handed in.
//!
//! # On disk
//!
//! ```text
//! format                   JSON: version; compat, ro_compat, incompat: names of features
//!                          (`sealed`: see `seal`; `managed_refs`, `snapshot_refs`, `volume_refs`:
//!                          the store has such refs, which keep layers: see `refs`;
//!                          `record_heads`: records are as `keys` says)
//! packs/<pack>.pack .idx   objects below 1 MiB of one ingest, and the place of each: `pack`
//! loose/<object>           an object of 1 MiB or more
//! loose/<object>.cv        its outboard, by which a part of it can be checked: `outboard`
//! layers/<layer>           a tree with its mtimes, read in place: `layer`
//! keys/<key>               JSON: recipe -> records, each the id of its facts, a layer and its
//!                          provenance: `keys`
//! facts/<key>.<facts>      JSON: the facts of a record: `keys`
//! refs/<kind>/<name>       JSON: a name and the layers that it keeps: `refs`
//! leases/<random>          what a living process needs; flocked by it: `lease`
//! locks/<key>.flight .key  flocked to build a key, or to write its records; gone when free
//! locks/<name>.refs.<kind> flocked to change a ref; gone when free
//! locks/format             flocked to make the store, or to add a feature to its format
//! locks/gc                 flocked to remove things from the store, to repair or to migrate it
//! stat/<project>           the stat cache of a project: `snapshot`
//! trash/<generation>/      removed by a collection, until brought back or deleted: `trash`
//! damaged/<n>/             set aside by repair number n: `repair`; a layer comes back from there
//!                          once it is whole again: `aside`
//! reserve/<n>              removed when the disk is full: `reserve`
//! tmp/<lease>.<n>          being written by the holder of a lease
//! tmp/format               being written by the holder of `locks/format`
//! ```
//!
//! Directories are flat: a store has hundreds of packs and layers, and thousands of loose objects,
//! which every filesystem indexes well; so publishing syncs one directory of each kind, and one
//! mtime tells of new packs. Everything under `packs`, `loose` and `layers` is immutable: written
//! once, durable before it has its name, and then only ever removed. The rest is replaced as a
//! whole by a rename.
//!
//! # Integrity
//!
//! Every read is checked. The bytes of an object are hashed when the process reads them for the
//! first time, those of a large one group by group: `blob`. An index, a layer's body and its header
//! are checked when the file is opened. JSON files are sealed: `seal`. A check that fails is an
//! error that names the file, and the read never returns other bytes than were stored. Two kinds of
//! damage are no error, since both files are made again: a damaged file of a key holds no records,
//! and a damaged stat cache no files.
//!
//! Existing means durable and whole, so an object that is there is not read when the same contents
//! are stored again; if it was damaged meanwhile, [`verify`] reports it, and [`repair`] moves it
//! out of the way. A store from before seals and outboards lacks the incompat feature `sealed`; it
//! is refused until [`migrate`] brings it up to date.
//!
//! # Publishing
//!
//! 1. A lease is taken. A layer to be reused is pinned in it *before* the process looks for it.
//! 2. The new objects, the index of their pack and the layer are written under temporary names and
//!    synced; finished files are synced while the rest is still being read.
//! 3. The objects get their names (loose files, pack, then index), and these names are synced, with
//!    those of reused objects: the process that stored them may not have synced them yet.
//! 4. The layer gets its name, and that name is synced, even if another process published it.
//! 5. Keys and refs name layers, and only layers that are there.
//!
//! So a name means durable and whole, a layer never names an object that is not there, and a crash
//! at any point leaves at worst temporary files of a dead lease, and objects that no layer names.
//! Deletion runs the other way round, through the trash, beside all of this: `gc`. An ingest that
//! failed to write once writes no more. Leases and stat caches are not synced: a crash ends every
//! lease, and the content of a stat cache is checked.
//!
//! The media are assumed to keep what was synced, and to rename atomically. Names that were not
//! synced may be kept or lost in any combination; so an index without its pack is passed over.
//!
//! # Locks
//!
//! Among processes, in this order: flight (a key is being built), lease, gc, key (its records are
//! being written), a ref, format. Among threads: the mutexes of this crate are leaves. A thread
//! that holds one takes no other lock and calls no callback.

pub mod account;
mod aside;
mod blob;
mod census;
pub mod diff;
pub mod disk;
mod error;
pub mod facts;
mod gc;
pub mod id;
mod ingest;
mod json;
mod keys;
pub mod layer;
mod lease;
mod lock;
mod map;
pub mod migrate;
mod mutex;
mod objects;
pub mod outboard;
pub mod pack;
mod pack_writer;
pub mod path_json;
mod pieces;
mod ref_kind;
mod refs;
pub mod repair;
mod reserve;
mod roots;
pub mod seal;
mod site;
pub mod snapshot;
pub mod stat_cache;
pub mod store;
mod syncer;
mod trash;
pub mod tree;
pub mod verify;
pub mod volume;

pub use account::{Account, Area, LayerUse, RefUse};
pub use blob::Blob;
pub use diff::{Change, ChangeKind, diff};
pub use disk::Space;
pub use error::{StoreError, with_causes};
pub use facts::{Answers, Fact, How, Look, Seen};
pub use gc::{DroppedRecord, DroppedVolume, Garbage, GcEvent, GcPlan, GcReport, Kept, Policy, Why};
pub use id::{FactsId, KeyId, LayerId, LooksId, ObjectId, PackId, SeenHash, TreeId};
pub use ingest::{Added, Ingest, Published};
pub use keys::{MAX_RECORDS, ORIGIN, PREFIX, Record, RecordHead, Search, SearchCost, TakeRecord};
pub use layer::{Kind, Layer, NodeRef};
pub use lease::{Lease, LiveLease};
pub use migrate::{MigrateEvent, Migration};
pub use objects::LOOSE_MIN;
pub use refs::{MAX_REF_LAYERS, MAX_REF_NAME, Ref, RefEdit, RefKind};
pub use repair::Mended;
pub use roots::{Root, Roots};
pub use store::{Flight, Store};
pub use trash::MAX_TRASHED_LAYERS;
pub use verify::{Finding, Problem, Report, Severity, VerifyEvent, VerifyOptions};
pub use volume::{MAX_VOLUME_LAYERS, Merge};
