//! The refs that keep the layers of workers.

use iii_store::{LayerId, Ref, RefKind, Store, StoreError};
use serde::Deserialize as _;

/// How many of the layers of a worker's ref it runs on, or ran on last; they come first.
#[derive(serde::Serialize, serde::Deserialize)]
struct RefInfo {
    runs_on: usize,
}

/// The layers that the worker of this ref runs on, or ran on last, bottom first. Those that are kept besides are for its upper.
pub fn run_on(kept: &Ref) -> &[LayerId] {
    let info = RefInfo::deserialize(&kept.info);
    let count = info.map_or(kept.layers.len(), |info| info.runs_on);
    kept.layers.get(..count).unwrap_or(&kept.layers)
}

/// The ref of a worker that runs on some layers, bottom first, and whose upper needs others besides.
fn worker_ref(mut layers: Vec<LayerId>, besides: &[LayerId]) -> Ref {
    let runs_on = layers.len();
    for id in besides {
        if !layers.contains(id) {
            layers.push(*id);
        }
    }
    let info = if layers.len() == runs_on {
        serde_json::Value::Null
    } else {
        serde_json::json!(RefInfo { runs_on })
    };
    Ref { layers, info }
}

/// Has a worker's name keep the layers that it runs on, bottom first, those that its upper needs besides, and no others. They are
/// pinned. Only who holds the worker knows what those are.
pub(crate) fn keep_layers(
    store: &Store,
    kind: RefKind,
    name: &str,
    layers: Vec<LayerId>,
    besides: &[LayerId],
) -> Result<(), StoreError> {
    store.set_ref(kind, name, &worker_ref(layers, besides))
}

/// Has a worker's name keep these layers, those that it needs besides, which are all pinned, and what it keeps already, whoever
/// changes that meanwhile. Returns whether it did not keep just these before.
pub(crate) fn keep_also(
    store: &Store,
    kind: RefKind,
    name: &str,
    layers: &[LayerId],
    besides: &[LayerId],
) -> Result<bool, StoreError> {
    let edit = store.edit_ref(kind, name)?;
    let last = match edit.get() {
        // It is about to be written anew.
        Err(StoreError::Damaged { .. } | StoreError::Json { .. }) => None,
        other => other?,
    };
    let wanted = worker_ref(layers.to_vec(), besides);
    if last.as_ref() == Some(&wanted) {
        return Ok(false);
    }
    // A lost layer stays named: a layer of the same tree may carry the upper over.
    let (runs_on, all) = match &last {
        Some(last) => (run_on(last).to_vec(), last.layers.clone()),
        None => Default::default(),
    };
    if all.is_empty() {
        edit.set(&wanted)?;
    } else if !wanted.layers.iter().all(|id| all.contains(id)) {
        edit.set(&worker_ref(runs_on, &[all, wanted.layers].concat()))?;
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::thread;

    use iii_store::tree::Tree;

    use super::*;

    /// As when a worker is added anew that runs and takes a change of its project.
    #[test]
    fn who_keeps_layers_at_once_loses_none() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let lease = store.lease("test").unwrap();
        let layers: Vec<_> = (b'a'..=b'p')
            .map(|name| {
                let mut tree = Tree::implicit();
                tree.dir_at(&[name]).unwrap();
                let ingest = store.ingest(&lease).unwrap();
                ingest.finish(&tree).unwrap().layer_id
            })
            .collect();
        thread::scope(|scope| {
            for id in &layers {
                let store = &store;
                scope.spawn(move || {
                    keep_also(store, RefKind::Managed, "box", &[*id], &[]).unwrap();
                });
            }
        });
        let mut kept = store.get_ref(RefKind::Managed, "box").unwrap().unwrap();
        assert_eq!(run_on(&kept).len(), 1);
        let mut layers = layers;
        kept.layers.sort();
        layers.sort();
        assert_eq!(kept.layers, layers);
    }
}
