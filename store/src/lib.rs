//! The store: objects, trees, layers, keys, refs and leases, shared by every worker of a machine.
//!
//! It knows no network, no terminal, no environment and no home directory; progress is an event
//! handed in.
//!
//! # On disk
//!
//! ```text
//! format                   JSON: version; compat, ro_compat, incompat: names of features (`sealed`: see `seal`;
//!                          `managed_refs`, `snapshot_refs`, `volume_refs`: there are such refs, which keep layers: see
//!                          `refs`; `record_heads`: records are as `keys` says)
//! packs/<pack>.pack .idx   objects below 1 MiB that one ingest brought, and where each is: `pack`
//! loose/<object>           an object of 1 MiB or more
//! loose/<object>.cv        its outboard, by which a part of it can be checked: `outboard`
//! layers/<layer>           a tree with its mtimes, read in place: `layer`
//! keys/<key>               JSON: recipe -> records, each the id of its facts, a layer and its provenance: `keys`
//! facts/<key>.<facts>      JSON: the facts of a record: `keys`
//! refs/<kind>/<name>       JSON: a name and the layers that it keeps: `refs`
//! leases/<random>          what a living process needs; flocked by it: `lease`
//! locks/<key>.flight .key  flocked by who builds a key, or writes its records; gone when free
//! locks/<name>.refs.<kind> flocked by who changes a ref; gone when free
//! locks/format             flocked by who makes the store, or adds a feature to its format
//! locks/gc                 flocked by who takes things out of the store, repairs or migrates it
//! stat/<project>           the stat cache of a project: `snapshot`
//! trash/<generation>/      what a collection took out, until it is taken back or removed: `trash`
//! damaged/<n>/             what repair number n set aside: `repair`; a layer comes back from there once it is
//!                          whole again: `aside`
//! reserve/<n>              what is removed when the disk is full: `reserve`
//! tmp/<lease>.<n>          what the holder of a lease is writing
//! tmp/format               what the holder of `locks/format` is writing
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
//! What is read was checked. The bytes of an object are hashed when the process reads them for the
//! first time, those of a large one group by group: `blob`. An index is hashed when it is opened; a
//! layer's body, and what its header says, too. JSON files are sealed: `seal`. What does not hold
//! is an error that names the file and never other bytes than were stored, with two exceptions: a
//! damaged file of a key holds no records, and a damaged stat cache no files, since both are made
//! again.
//!
//! Existing means durable and whole, so an object that is there is not read when the same contents
//! are stored again; if it was damaged meanwhile, [`verify`] tells, and [`repair`] moves it out of
//! the way. A store from before seals and outboards does not have the incompat feature `sealed`, is
//! refused, and brought up to date by [`migrate`].
//!
//! # Publishing
//!
//! 1. A lease is taken. What will be reused is pinned in it *before* it is looked for.
//! 2. The new objects, the index of their pack and the layer are written under temporary names and
//!    synced, what is ready first while the rest is still being read.
//! 3. The objects get their names (loose files, pack, then index), and these names are synced, with
//!    those of reused objects: whoever stored them may not have come to that yet.
//! 4. The layer gets its name, and that name is synced, also if somebody else gave it.
//! 5. Keys and refs name layers, and only layers that are there.
//!
//! So a name means durable and whole, a layer never names an object that is not there, and a crash
//! at any point leaves at worst temporary files of a dead lease, and objects that no layer names.
//! Deletion runs the other way round, through the trash, beside all of this: `gc`. An ingest that
//! failed to write once writes no more. Leases and stat caches are not synced: a crash ends the
//! ones and the others are checked.
//!
//! The media are assumed to keep what was synced, and to rename atomically. Names that were not
//! synced may be kept or lost in any combination; so an index without its pack is passed over.
//!
//! # Locks
//!
//! Among processes, in this order: flight (a key is being built), lease, gc, key (its records are
//! being written), a ref, format. Among threads: the mutexes of this crate are leaves; no other
//! lock is taken and nothing is called back under one.

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
