//! What is known of the layers: who keeps them, what made them, what they are.

use std::collections::{BTreeMap, BTreeSet};

use iii_store::{KeyId, Layer, LayerId, Record, RefKind, Store, StoreError};
use serde::Serialize;

use crate::plan::Kind;
use crate::ui::Ui;

/// Something that keeps a layer.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(tag = "root", rename_all = "snake_case")]
pub enum Root {
    /// An image has it.
    Image { name: String },
    /// A worker has it.
    Worker { name: String },
    /// A process that runs needs it.
    Lease { purpose: String },
    /// A recipe made it, and can use it again.
    Record { key: KeyId },
}

/// The refs, leases and records of a moment, by layer.
#[derive(Debug, Default)]
pub struct Catalog {
    /// The layers of images and workers, bottom first.
    pub refs: Vec<(RefKind, String, Vec<LayerId>)>,
    roots: BTreeMap<LayerId, BTreeSet<Root>>,
    recipes: BTreeMap<LayerId, Vec<(KeyId, Record)>>,
    projects: BTreeSet<LayerId>,
}

impl Catalog {
    /// Reads them. A key that is damaged keeps nothing, and is named as a warning.
    pub fn read(store: &Store, ui: &Ui) -> Result<Self, StoreError> {
        let mut catalog = Self {
            projects: store.snapshot_layers()?.into_iter().collect(),
            ..Self::default()
        };
        // Leases first: who stores a ref or a record has its layers pinned until then.
        for lease in store.live_leases()? {
            for layer in lease.layers {
                let purpose = lease.purpose.clone();
                catalog.keep(layer, Root::Lease { purpose });
            }
        }
        for (name, content) in store.list_refs(RefKind::Image)? {
            for layer in &content.layers {
                catalog.keep(*layer, Root::Image { name: name.clone() });
            }
            catalog.refs.push((RefKind::Image, name, content.layers));
        }
        for (name, content) in store.list_refs(RefKind::Worker)? {
            for layer in &content.layers {
                catalog.keep(*layer, Root::Worker { name: name.clone() });
            }
            catalog.projects.extend(content.layers.last());
            catalog.refs.push((RefKind::Worker, name, content.layers));
        }
        for key in store.keys()? {
            match store.records(&key) {
                Ok(records) => {
                    for record in records {
                        catalog.keep(record.layer_id, Root::Record { key });
                        let recipes = catalog.recipes.entry(record.layer_id).or_default();
                        recipes.push((key, record));
                    }
                }
                Err(error @ (StoreError::Json { .. } | StoreError::Damaged { .. })) => {
                    ui.warn(format_args!("{error}; what it recorded is built again"));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(catalog)
    }

    fn keep(&mut self, layer: LayerId, root: Root) {
        self.roots.entry(layer).or_default().insert(root);
    }

    /// What keeps a layer, sorted.
    pub fn roots(&self, id: &LayerId) -> Vec<&Root> {
        self.roots.get(id).into_iter().flatten().collect()
    }

    /// What made a layer, as far as it is recorded.
    pub fn recipes(&self, id: &LayerId) -> &[(KeyId, Record)] {
        self.recipes.get(id).map_or(&[], Vec::as_slice)
    }

    /// What a layer is, as far as anything says so: what made it, or where it stands in an image or a worker.
    pub fn kind(&self, id: &LayerId) -> Option<Kind> {
        let provenance = self
            .recipes(id)
            .iter()
            .map(|(_, record)| &record.provenance);
        let recorded = provenance
            .filter_map(|provenance| provenance.get("kind"))
            .find_map(|kind| serde_json::from_value(kind.clone()).ok());
        let in_image = || {
            let roots = self.roots.get(id).into_iter().flatten();
            roots
                .into_iter()
                .any(|root| matches!(root, Root::Image { .. }))
        };
        recorded.or_else(|| {
            if self.projects.contains(id) {
                Some(Kind::Project)
            } else {
                in_image().then_some(Kind::Base)
            }
        })
    }

    /// [`Catalog::kind`], as a cell of a table.
    pub fn kind_text(&self, id: &LayerId) -> String {
        self.kind(id)
            .map_or_else(|| "-".into(), |kind| kind.to_string())
    }
}

/// What keeps a layer, in one cell of a table.
pub fn roots_text(roots: &[&Root]) -> String {
    let names = |what: &str, select: fn(&Root) -> Option<&str>| {
        let names: Vec<&str> = roots.iter().filter_map(|root| select(root)).collect();
        match names[..] {
            [] => None,
            [name] => Some(format!("{what} {name}")),
            _ => Some(format!("{} {what}s", names.len())),
        }
    };
    let parts = [
        names("image", |root| match root {
            Root::Image { name } => Some(name),
            _ => None,
        }),
        names("worker", |root| match root {
            Root::Worker { name } => Some(name),
            _ => None,
        }),
        names("lease", |root| match root {
            Root::Lease { purpose } => Some(purpose),
            _ => None,
        }),
        roots
            .iter()
            .any(|root| matches!(root, Root::Record { .. }))
            .then(|| "recipe".to_owned()),
    ];
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    if parts.is_empty() {
        "nothing".into()
    } else {
        parts.join(", ")
    }
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
