//! Layers that a step sees and that its result does not stand on: cache volumes, and the seed of an
//! install.
//!
//! The seed is the result of the project's last install, on the same layers below, in directories
//! that its tools build in, such as cargo's `target`. Such tools compare mtimes, so a seed serves
//! only if each file of the project that differs from that install's was changed after its end: an
//! older file would pass for built. Else the install builds from nothing.
//!
//! A failure here costs time and no result: a step without its caches downloads, one without
//! its seed builds.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use iii_overlay::Aside;
use iii_overlay::merge::{MergeError, Merged};
use iii_store::layer::{self, Kind as NodeKind};
use iii_store::tree::{DirKind, Mtime, Node, Tree, components};
use iii_store::{
    Change, ChangeKind, Layer, LayerId, Ref, RefKind, Store, StoreError, TreeId, diff,
};

use super::{BuildError, Builder, Event, project_id};
use crate::compose::Isolation;
use crate::plan::Kind;
use crate::project::Holds;

/// Context of the digest of the layers below a step.
const BELOW_CONTEXT: &str = "iii 2026 layers below a cache v1";
/// Hexadecimal digits of that digest in a name.
const BELOW_DIGITS: usize = 32;
/// The end of a seed's install in the info of its ref, in nanoseconds since 1970.
const ENDED: &str = "ended";

/// Layers lent to a step.
#[derive(Default)]
pub(super) struct Lent {
    /// To be put on top of the step's chain, bottom first.
    pub layers: Vec<Arc<Layer>>,
    /// The parts; [`Aside::slots`] is empty.
    pub aside: Aside,
    /// The names of the volumes, as their paths are in [`Aside::volumes`].
    names: Vec<String>,
    /// The name of the project's seed.
    seed: Option<String>,
}

impl Lent {
    /// The layers lent to a step on `below`, for the project whose layer is `project`.
    pub fn new(
        builder: &Builder<'_>,
        kind: Kind,
        below: &[Arc<Layer>],
        project: &Arc<Layer>,
    ) -> Result<Self, BuildError> {
        let cargo_home = builder.env.get("CARGO_HOME").map(String::as_str);
        let caches = builder.project.caches(cargo_home);
        let below_digest = digest(below.iter().map(|layer| layer.tree_id()));
        let mut plain = below.to_vec();
        plain.push(Arc::clone(project));
        let compose = |source: iii_overlay::merge::MergeError| BuildError::Compose {
            kind,
            source: source.into(),
        };
        let plain = Merged::new(plain).map_err(compose)?;
        let relative = |path: &String| path.trim_start_matches('/').as_bytes().to_vec();

        let mut lent = Self::default();
        let mut volumes = Vec::new();
        let mut tree = Tree::implicit();
        for cache in &caches.volumes {
            let path = relative(&cache.target);
            // Where a symlink leads elsewhere, the cache is a part of the result.
            if !is_free(&plain, &path) {
                continue;
            }
            let name = match cache.holds {
                Holds::Downloads => cache.id.to_owned(),
                Holds::Builds => format!("{}-{below_digest}", cache.id),
            };
            volumes.extend(builder.store.volume(builder.lease, &name)?);
            tree.dir_at(&path).map_err(StoreError::from)?;
            lent.aside.volumes.push(path);
            lent.names.push(name);
        }
        lent.aside.scratch = caches.scratch.iter().map(relative).collect();
        if kind == Kind::Install && !caches.seeds.is_empty() {
            lent.aside.seeds = caches.seeds.iter().map(relative).collect();
            let name = format!("seed-{}-{below_digest}", project_id(builder.project));
            if !builder.rebuild {
                lent.sow(builder, &name, project, &mut tree)?;
            }
            lent.seed = Some(name);
        }
        if !tree.entries.is_empty() {
            let frame = match builder.isolation {
                Isolation::Namespace => in_memory(&tree).map_err(compose)?,
                // The process of a microVM looks for it in the store.
                #[cfg(feature = "libkrun")]
                Isolation::Machine(_) => {
                    let ingest = builder.store.ingest(builder.lease)?;
                    let id = ingest.finish(&tree)?.layer_id;
                    builder.store.layer(&id)?
                }
            };
            lent.layers.push(frame);
        }
        lent.layers.extend(volumes);
        Ok(lent)
    }

    /// Adds the seed to `tree`, if there is one that serves.
    fn sow(
        &self,
        builder: &Builder<'_>,
        name: &str,
        project: &Layer,
        tree: &mut Tree,
    ) -> Result<(), BuildError> {
        let layers = builder.store.volume(builder.lease, name)?;
        let ended = ended(builder.store, name);
        let ([last, last_project], Some(ended)) = (&*layers, ended) else {
            return Ok(());
        };
        if let Some(path) = older_change(last_project, project, ended) {
            (builder.events)(Event::Note(format!(
                "install builds from nothing: {} differs from the last build and has an older mtime",
                String::from_utf8_lossy(&path)
            )));
            return Ok(());
        }
        let last = last.to_tree();
        for path in &self.aside.seeds {
            if let Some(Node::Dir(dir)) = last.get(path) {
                let seed = tree.dir_at(path).map_err(StoreError::from)?;
                *seed = dir.clone();
                seed.kind = DirKind::Merged;
            }
        }
        Ok(())
    }

    /// Merges what the step added to its volumes. A failure is worth a line.
    pub fn give_back(&self, builder: &Builder<'_>, changes: &[Tree]) {
        for (name, tree) in self.names.iter().zip(changes) {
            if let Err(error) = builder.store.merge_volume(builder.lease, name, tree) {
                (builder.events)(Event::Note(format!(
                    "the downloads for the cache {name} are not kept: {}",
                    iii_store::with_causes(&error)
                )));
            }
        }
    }

    /// Keeps the result of this install, which `ended`, as the beginning of the next one.
    pub fn keep_seed(
        &self,
        builder: &Builder<'_>,
        install: LayerId,
        project: &Layer,
        ended: SystemTime,
    ) {
        let Some(name) = &self.seed else {
            return;
        };
        let since = ended.duration_since(SystemTime::UNIX_EPOCH);
        let nanos = since.unwrap_or_default().as_nanos();
        let seed = Ref {
            layers: vec![install, project.layer_id()],
            info: serde_json::json!({ ENDED: u64::try_from(nanos).unwrap_or(u64::MAX) }),
        };
        if let Err(error) = builder.store.set_ref(RefKind::Volume, name, &seed) {
            (builder.events)(Event::Note(format!(
                "the next install will build from nothing: {}",
                iii_store::with_causes(&error)
            )));
        }
    }
}

/// The end of the install that left this seed.
fn ended(store: &Store, name: &str) -> Option<Mtime> {
    let content = store.get_ref(RefKind::Volume, name).ok().flatten()?;
    let ended = Duration::from_nanos(content.info.get(ENDED)?.as_u64()?);
    Some(Mtime {
        sec: i64::try_from(ended.as_secs()).ok()?,
        nsec: ended.subsec_nanos(),
    })
}

/// A path that differs between two project layers, and whose new mtime is not after `ended`.
fn older_change(old: &Layer, new: &Layer, ended: Mtime) -> Option<Vec<u8>> {
    let is_older = |change: &Change| {
        // A directory tells by its own mtime of names that are gone.
        change.kind != ChangeKind::Removed
            && new
                .lookup(&change.path)
                .is_some_and(|node| node.kind() != NodeKind::Dir && node.mtime() <= ended)
    };
    let older = diff(old, new).into_iter().find(is_older);
    older.map(|change| change.path)
}

/// A layer that only this step needs, and that is in no store.
fn in_memory(tree: &Tree) -> Result<Arc<Layer>, MergeError> {
    Ok(Arc::new(Layer::from_bytes(layer::encode(tree)?.bytes)?))
}

/// Whether a directory can be shown at `path`: all that is there of the way to it are directories.
fn is_free(plain: &Merged, path: &[u8]) -> bool {
    let names: Vec<&[u8]> = components(path).collect();
    (1..=names.len()).all(|count| {
        let there = plain.lookup_path(&names[..count].join(&b'/'));
        there.is_none_or(|there| there.node.kind() == NodeKind::Dir)
    })
}

/// A name for the layers below a step, by what they hold.
fn digest(below: impl Iterator<Item = TreeId>) -> String {
    let mut hasher = blake3::Hasher::new_derive_key(BELOW_CONTEXT);
    for id in below {
        hasher.update(id.as_bytes());
    }
    hasher.finalize().to_hex()[..BELOW_DIGITS].to_owned()
}
