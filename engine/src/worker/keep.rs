//! The refs that keep the layers of workers.

use iii_store::{LayerId, Ref, RefKind, Store, StoreError};
use serde::Deserialize as _;

/// The info of a worker's ref.
#[derive(serde::Serialize, serde::Deserialize)]
struct RefInfo {
    /// The number of layers that the worker runs on, or ran on last; they come first.
    runs_on: usize,
    /// The index of the project's layer. Earlier programs wrote none: theirs is the last that the
    /// worker runs on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    project: Option<usize>,
}

/// The layers that a worker runs on, or ran on last.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RunsOn {
    /// The layers, bottom first.
    pub layers: Vec<LayerId>,
    /// The index of the project's layer.
    pub project: Option<usize>,
}

impl RunsOn {
    /// The layers that the worker of this ref runs on, or ran on last. Those that are kept besides
    /// are for its upper.
    pub fn of(kept: &Ref) -> Self {
        let info = RefInfo::deserialize(&kept.info).ok();
        let count = info.as_ref().map_or(kept.layers.len(), |info| info.runs_on);
        let layers = kept.layers.get(..count).unwrap_or(&kept.layers);
        let last = layers.len().checked_sub(1);
        let project = info.and_then(|info| info.project).or(last);
        Self {
            layers: layers.to_vec(),
            project: project.filter(|project| *project < layers.len()),
        }
    }

    /// The project's layer.
    pub fn project_layer(&self) -> Option<LayerId> {
        self.layers.get(self.project?).copied()
    }
}

/// The ref of a worker that runs on some layers and whose upper needs others besides.
fn worker_ref(on: &RunsOn, besides: &[LayerId]) -> Ref {
    let mut layers = on.layers.clone();
    for id in besides {
        if !layers.contains(id) {
            layers.push(*id);
        }
    }
    let info = serde_json::json!(RefInfo {
        runs_on: on.layers.len(),
        project: on.project,
    });
    Ref { layers, info }
}

/// Makes a worker's name keep the layers that it runs on, bottom first, those that its upper needs
/// besides, and no others. They are pinned. Only who holds the worker knows what those are.
pub(crate) fn keep_layers(
    store: &Store,
    kind: RefKind,
    name: &str,
    on: &RunsOn,
    besides: &[LayerId],
) -> Result<(), StoreError> {
    store.set_ref(kind, name, &worker_ref(on, besides))
}

/// Makes a worker's name keep these layers, those that it needs besides, which are all pinned, and
/// its present ones, even if another process changes them meanwhile. Returns whether it did not
/// keep just these before.
pub(crate) fn keep_also(
    store: &Store,
    kind: RefKind,
    name: &str,
    on: &RunsOn,
    besides: &[LayerId],
) -> Result<bool, StoreError> {
    let edit = store.edit_ref(kind, name)?;
    let last = match edit.get() {
        // It is about to be written anew.
        Err(StoreError::Damaged { .. } | StoreError::Json { .. }) => None,
        other => other?,
    };
    let wanted = worker_ref(on, besides);
    if last.as_ref() == Some(&wanted) {
        return Ok(false);
    }
    // A lost layer stays named: a layer of the same tree may carry the upper over.
    let (runs_on, all) = match &last {
        Some(last) => (RunsOn::of(last), last.layers.clone()),
        None => Default::default(),
    };
    if all.is_empty() {
        edit.set(&wanted)?;
    } else if !wanted.layers.iter().all(|id| all.contains(id)) {
        edit.set(&worker_ref(&runs_on, &[all, wanted.layers].concat()))?;
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
                    let on = RunsOn {
                        layers: vec![*id],
                        project: Some(0),
                    };
                    keep_also(store, RefKind::Managed, "box", &on, &[]).unwrap();
                });
            }
        });
        let mut kept = store.get_ref(RefKind::Managed, "box").unwrap().unwrap();
        assert_eq!(RunsOn::of(&kept).layers.len(), 1);
        let mut layers = layers;
        kept.layers.sort();
        layers.sort();
        assert_eq!(kept.layers, layers);
    }
}
