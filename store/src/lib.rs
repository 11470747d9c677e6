//! The store: objects, trees, layers, keys, refs and leases, shared by every worker of a machine.
//!
//! It knows no network, no terminal, no environment and no home directory; progress is an event handed in.

pub mod id;
pub mod layer;
pub mod tree;

pub use id::{KeyId, LayerId, ObjectId, TreeId};
pub use layer::{Kind, Layer, NodeRef};
