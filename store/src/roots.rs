//! Roots, which keep layers from being collected.
//!
//! A layer is kept by a ref, by a lease whose holder lives, or by a record of a key. Leases are
//! always read before refs and records: a writer of a ref or a record has the layer pinned until it
//! is stored, so that one of the two shows it.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use crate::disk::names;
use crate::error::StoreError;
use crate::id::{KeyId, LayerId};
use crate::keys::RecordHead;
use crate::lease::{self, LiveLease};
use crate::refs::RefKind;
use crate::store::Store;

/// One thing that keeps a layer.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(tag = "root", rename_all = "snake_case")]
pub enum Root {
    /// A ref names it.
    Ref {
        /// Kind of the name.
        kind: RefKind,
        /// The name.
        name: String,
    },
    /// A living process needs it.
    Lease {
        /// Purpose of the lease.
        purpose: String,
    },
    /// A recipe made it.
    Record {
        /// The recipe.
        key: KeyId,
    },
}

impl Root {
    /// Whether garbage collection may drop this root by age or size: its layers can be made
    /// again.
    pub fn may_go(&self) -> bool {
        match self {
            Self::Ref { kind, .. } => *kind == RefKind::Volume,
            Self::Lease { .. } => false,
            Self::Record { .. } => true,
        }
    }
}

/// All roots of a moment.
#[derive(Debug, Default)]
pub struct Roots {
    /// The roots of each layer; sorted.
    pub layers: HashMap<LayerId, Vec<Root>>,
    /// The records of each key, newest first.
    pub records: BTreeMap<KeyId, Vec<RecordHead>>,
    /// Errors of unreadable refs, whose layers are unknown.
    pub unreadable_refs: Vec<StoreError>,
    /// Keys whose file does not hold: they keep nothing, and are built anew.
    pub damaged_keys: Vec<KeyId>,
    /// The layers of each cache volume, bottom first.
    pub volumes: BTreeMap<String, Vec<LayerId>>,
    /// The leases of the living.
    pub(crate) leases: Vec<LiveLease>,
}

impl Roots {
    /// Reads them, without a ref that cannot be read. Safe beside everything else.
    pub fn read(store: &Store) -> Result<Self, StoreError> {
        let mut roots = Self {
            leases: lease::live(store.site())?,
            ..Self::default()
        };
        for lease in &roots.leases {
            for layer in &lease.layers {
                let root = Root::Lease {
                    purpose: lease.purpose.clone(),
                };
                roots.layers.entry(*layer).or_default().push(root);
            }
        }
        for kind in RefKind::ALL {
            let (refs, unreadable) = store.readable_refs(kind)?;
            let unreadable = unreadable.into_iter().filter(|err| kind.may_keep(err));
            roots.unreadable_refs.extend(unreadable);
            for (name, content) in refs {
                if kind == RefKind::Volume {
                    roots.volumes.insert(name.clone(), content.layers.clone());
                }
                for layer in content.layers {
                    let name = name.clone();
                    let root = Root::Ref { kind, name };
                    roots.layers.entry(layer).or_default().push(root);
                }
            }
        }
        for name in names(store.disk().as_ref(), &store.dir().join("keys"))? {
            let Ok(key) = name.parse::<KeyId>() else {
                continue;
            };
            match store.checked_heads(&key) {
                Ok(records) => {
                    for record in &records {
                        let layer = roots.layers.entry(record.layer_id).or_default();
                        layer.push(Root::Record { key });
                    }
                    roots.records.insert(key, records);
                }
                Err(err) if err.is_damage() => {
                    roots.damaged_keys.push(key);
                }
                Err(err) => return Err(err),
            }
        }
        for reasons in roots.layers.values_mut() {
            reasons.sort_unstable();
            reasons.dedup();
        }
        Ok(roots)
    }

    /// As [`Roots::read`], and an error if a ref cannot be read: a layer without a root may be
    /// collected.
    pub(crate) fn read_all(store: &Store) -> Result<Self, StoreError> {
        let mut roots = Self::read(store)?;
        roots.unreadable_refs.pop().map_or(Ok(roots), Err)
    }

    /// The roots of a layer.
    pub fn of(&self, layer: &LayerId) -> &[Root] {
        self.layers.get(layer).map_or(&[], Vec::as_slice)
    }
}
