//! Layers that repair set aside because objects of theirs were lost.
//!
//! Such a layer's file is in `damaged/<n>/layers/`, and holds. Once its objects are stored again,
//! it is whole again: the next look for it takes it back. Until then, as long as a root names it,
//! gc keeps the objects that it still has. Nothing is written down of that: whether a layer is
//! whole is computed.

use std::path::PathBuf;

use crate::error::{IoContext, StoreError};
use crate::id::LayerId;
use crate::layer::Layer;
use crate::roots::Roots;
use crate::store::Store;
use crate::trash;

/// Where repair sets things aside, relative to the store.
pub(crate) const DAMAGED: &str = "damaged";

/// A layer that was set aside, and whose file holds.
pub(crate) struct AsideLayer {
    pub(crate) id: LayerId,
    pub(crate) path: PathBuf,
}

impl Store {
    /// The directories that repairs set things aside in, the last first.
    fn aside_dirs(&self) -> Result<Vec<PathBuf>, StoreError> {
        let (disk, all) = (self.disk().as_ref(), self.dir().join(DAMAGED));
        let names = trash::list(disk, &all)?.into_iter();
        let mut numbers: Vec<u64> = names.filter_map(|name| name.parse().ok()).collect();
        numbers.sort_unstable();
        let dirs = numbers.into_iter().rev();
        Ok(dirs.map(|number| all.join(number.to_string())).collect())
    }

    /// The layer of this id that was set aside, if its file holds.
    pub(crate) fn aside_layer(&self, id: &LayerId) -> Result<Option<(PathBuf, Layer)>, StoreError> {
        for dir in self.aside_dirs()? {
            let path = dir.join("layers").join(id.to_string());
            match self.open_layer_file(id, &path) {
                Ok(Some(layer)) => return Ok(Some((path, layer))),
                Ok(None) => {}
                Err(err) if err.is_damage() => {}
                Err(err) => return Err(err),
            }
        }
        Ok(None)
    }

    /// The layers that were set aside, are not in their place, and have a root.
    pub(crate) fn aside_layers(&self) -> Result<Vec<AsideLayer>, StoreError> {
        let disk = self.disk().as_ref();
        let mut ids = Vec::new();
        for dir in self.aside_dirs()? {
            let names = trash::list(disk, &dir.join("layers"))?;
            ids.extend(names.iter().filter_map(|name| name.parse::<LayerId>().ok()));
        }
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        ids.sort_unstable();
        ids.dedup();
        let roots = Roots::read_all(self)?;
        ids.retain(|id| !roots.of(id).is_empty() && self.is_out_of_place(id));
        let layers = ids.into_iter().map(|id| {
            let found = self.aside_layer(&id)?;
            Ok(found.map(|(path, _)| AsideLayer { id, path }))
        });
        layers.filter_map(Result::transpose).collect()
    }

    fn is_out_of_place(&self, id: &LayerId) -> bool {
        self.disk().metadata(&self.places().layer(id)).is_err()
    }

    /// Takes a layer back that was set aside, durably, if it is whole. False if it is not.
    pub(crate) fn restore_layer(&self, id: &LayerId) -> Result<bool, StoreError> {
        // A search: what cannot be read is not found.
        let Ok(Some((path, layer))) = self.aside_layer(id) else {
            return Ok(false);
        };
        if !self.is_whole(&layer)? {
            return Ok(false);
        }
        let (disk, place) = (self.disk().as_ref(), self.places().layer(id));
        match trash::move_name(disk, &path, &place) {
            // Another process may rename here, and this one may not.
            Err(err) if trash::is_refusal(&err) => return Ok(false),
            Ok(false) => return Ok(false),
            other => other?,
        };
        self.sync_layers()?;
        // A collection that listed the layers before may have taken an object out since; one that
        // lists them from now on brings it back itself. See `gc`.
        if self.is_whole(&layer)? {
            return Ok(true);
        }
        disk.rename(&place, &path).at("renaming", &place)?;
        self.sync_layers()?;
        Ok(false)
    }

    /// Whether every object of a layer is in its place, if need be because it was taken back from
    /// the trash.
    fn is_whole(&self, layer: &Layer) -> Result<bool, StoreError> {
        for object in layer.objects() {
            match self.objects().require(&object) {
                Ok(()) => {}
                Err(StoreError::MissingObject(_)) => return Ok(false),
                Err(err) => return Err(err),
            }
        }
        Ok(true)
    }
}
