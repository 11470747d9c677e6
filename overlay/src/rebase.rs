//! Carrying an upper over to another chain.
use std::sync::Arc;

use iii_store::{Layer, LayerId};

use crate::OpenError;
use crate::merge::Merged;
use crate::overlay::Objects;
use crate::upper::record::Chain;
use crate::upper::state::State;
use crate::upper::{Opened, UpperError};

/// Where the layers of a former chain come from.
pub type OldLayer<'a> =
    dyn Fn(&LayerId) -> Result<Arc<Layer>, Box<dyn std::error::Error + Send + Sync>> + 'a;

pub(crate) fn rebase(
    _opened: &mut Opened,
    _known: &Chain,
    _old_layer: &OldLayer<'_>,
    _lower: &Arc<Merged>,
    _chain: &Chain,
    _objects: &dyn Objects,
) -> Result<State, OpenError> {
    Err(UpperError::Chain {
        path: std::path::PathBuf::new(),
        source: "another chain".into(),
    }
    .into())
}
