//! Whether layers above one of the chain hide a path of it.

use std::sync::Arc;

use iii_store::layer::{Kind, Layer};
use iii_store::tree::{DirKind, components};

/// Whether one of `above`, layers in any order, hides what layers below them have at `path`: by a
/// whiteout, by something that is no directory, or by an opaque directory. A directory that is not
/// opaque adds to what is below it.
pub(crate) fn hide(above: &[Arc<Layer>], path: &[u8]) -> bool {
    above.iter().any(|layer| hides(layer, path))
}

fn hides(layer: &Layer, path: &[u8]) -> bool {
    let mut node = layer.root();
    if node.dir_kind() == DirKind::Opaque {
        return true;
    }
    for name in components(path) {
        let Some(child) = node.child(name) else {
            return false;
        };
        if child.kind() != Kind::Dir || child.dir_kind() == DirKind::Opaque {
            return true;
        }
        node = child;
    }
    false
}
