//! Roots, recipes and kinds of all layers.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{SystemTime, UNIX_EPOCH};

use iii_engine::plan::Kind;
use iii_engine::worker::keep::RunsOn;
use iii_engine::worker::snapshot::project_of;
use iii_store::{KeyId, Layer, LayerId, RecordHead, RefKind, Root, Roots, Store, StoreError};
use serde::Serialize;

use crate::output::{Ui, human_age};

/// The refs, leases and records of a moment, by layer.
#[derive(Debug)]
pub struct Catalog {
    /// The layers of images and workers, bottom first.
    pub refs: Vec<(RefKind, String, Vec<LayerId>)>,
    roots: Roots,
    recipes: BTreeMap<LayerId, Vec<(KeyId, RecordHead)>>,
    projects: BTreeSet<LayerId>,
    /// Layers of snapshots.
    frozen: BTreeSet<LayerId>,
}

impl Catalog {
    /// Reads the store. A damaged key keeps nothing, and causes a warning; so does a ref that
    /// cannot be read.
    pub fn read(store: &Store, ui: &Ui) -> Result<Self, StoreError> {
        let mut roots = Roots::read(store)?;
        for key in &roots.damaged_keys {
            ui.warn(format_args!(
                "the records of key {} are damaged; their layers are built again",
                key.short()
            ));
        }
        for error in &roots.unreadable_refs {
            ui.warn(format_args!(
                "{error}; the layers that it keeps are not known, and gc does not run"
            ));
        }
        let mut recipes: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for (key, records) in std::mem::take(&mut roots.records) {
            for record in records {
                let made = recipes.entry(record.layer_id).or_default();
                made.push((key, record));
            }
        }
        let mut refs = Vec::new();
        let mut frozen = BTreeSet::new();
        let mut projects: BTreeSet<LayerId> = store.snapshot_layers()?.into_iter().collect();
        for kind in RefKind::ALL {
            for (name, content) in store.readable_refs(kind)?.0 {
                match kind {
                    RefKind::Image | RefKind::Volume => {}
                    RefKind::Worker | RefKind::Managed => {
                        projects.extend(RunsOn::of(&content).project_layer());
                    }
                    RefKind::Snapshot => {
                        frozen.extend(content.layers.first());
                        projects.extend(project_of(&content));
                    }
                }
                refs.push((kind, name, content.layers));
            }
        }
        Ok(Self {
            refs,
            roots,
            recipes,
            projects,
            frozen,
        })
    }

    /// Whether a ref cannot be read.
    pub fn lacks_refs(&self) -> bool {
        !self.roots.unreadable_refs.is_empty()
    }

    /// The roots that keep a layer, sorted.
    pub fn roots(&self, id: &LayerId) -> &[Root] {
        self.roots.of(id)
    }

    /// The recorded recipes of a layer.
    pub fn recipes(&self, id: &LayerId) -> &[(KeyId, RecordHead)] {
        self.recipes.get(id).map_or(&[], Vec::as_slice)
    }

    /// Kind of a layer: from its recipe, or from its place in an image, a worker or a snapshot.
    pub fn kind(&self, id: &LayerId) -> Option<String> {
        let provenance = self
            .recipes(id)
            .iter()
            .map(|(_, record)| &record.provenance);
        let recorded = provenance
            .filter_map(|provenance| provenance.get("kind"))
            .find_map(|kind| serde_json::from_value::<Kind>(kind.clone()).ok());
        let in_image = || {
            let image = |root: &Root| {
                matches!(
                    root,
                    Root::Ref {
                        kind: RefKind::Image,
                        ..
                    }
                )
            };
            self.roots(id).iter().any(image)
        };
        let kind = recorded.or_else(|| {
            if self.projects.contains(id) {
                Some(Kind::Project)
            } else {
                in_image().then_some(Kind::Base)
            }
        });
        let frozen = || self.frozen.contains(id).then(|| "snapshot".to_owned());
        kind.map(|kind| kind.to_string()).or_else(frozen)
    }

    /// [`Catalog::kind`], as a cell of a table.
    pub fn kind_text(&self, id: &LayerId) -> String {
        self.kind(id).unwrap_or_else(|| "-".into())
    }
}

/// The roots of a layer, in one cell of a table.
pub fn roots_text(roots: &[Root]) -> String {
    let mut parts = Vec::new();
    let mut put = |what: &str, names: &[&str]| match names {
        [] => {}
        [name] => parts.push(format!("{what} {name}")),
        _ => parts.push(format!("{} {what}s", names.len())),
    };
    for kind in RefKind::ALL {
        let names: Vec<&str> = roots
            .iter()
            .filter_map(|root| match root {
                Root::Ref { kind: own, name } if *own == kind => Some(name.as_str()),
                _ => None,
            })
            .collect();
        put(ref_kind_text(kind), &names);
    }
    let purposes: Vec<&str> = roots
        .iter()
        .filter_map(|root| match root {
            Root::Lease { purpose } => Some(purpose.as_str()),
            _ => None,
        })
        .collect();
    put("lease", &purposes);
    if roots.iter().any(|root| matches!(root, Root::Record { .. })) {
        parts.push("recipe".into());
    }
    if parts.is_empty() {
        "nothing".into()
    } else {
        parts.join(", ")
    }
}

/// The kind of a name, in a word.
pub fn ref_kind_text(kind: RefKind) -> &'static str {
    match kind {
        RefKind::Image => "image",
        RefKind::Worker => "worker",
        RefKind::Managed => "managed worker",
        RefKind::Snapshot => "snapshot",
        RefKind::Volume => "cache",
    }
}

/// Seconds since 1970, negative before.
pub fn unix_seconds(time: SystemTime) -> i64 {
    match time.duration_since(UNIX_EPOCH) {
        Ok(since) => since.as_secs() as i64,
        Err(before) => -(before.duration().as_secs() as i64),
    }
}

/// How long ago something was, as a cell of a table.
pub fn age_text(time: SystemTime) -> String {
    human_age(time.elapsed().unwrap_or_default())
}

/// How many entries of each type a layer has, the root apart.
#[derive(Debug, Default, Serialize)]
pub struct Counts {
    pub files: u64,
    pub directories: u64,
    pub symlinks: u64,
    pub whiteouts: u64,
    /// Pipes, sockets and devices.
    pub special: u64,
}

impl Counts {
    pub fn of(layer: &Layer) -> Self {
        let mut counts = Self::default();
        for node in layer.nodes().skip(1) {
            use iii_store::Kind as Type;
            *match node.kind() {
                Type::File => &mut counts.files,
                Type::Dir => &mut counts.directories,
                Type::Symlink => &mut counts.symlinks,
                Type::Whiteout => &mut counts.whiteouts,
                Type::Fifo | Type::Socket | Type::Char | Type::Block => &mut counts.special,
            } += 1;
        }
        counts
    }
}
