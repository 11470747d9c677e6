//! Makes an upper of a layer that was frozen from an upper.
//!
//! Over a chain, the new upper shows the same as the chain with the layer on top. The layer is not
//! part of the chain, though: its entries give way to changes of the project, as those of any upper
//! do ([`crate::rebase`]), and the sandbox goes on writing to the upper. Files are records that
//! refer to the layer's objects, so thawing costs time and space for metadata alone, until a file
//! is written to. The layer has no times but mtimes: each stands for the other times of its entry
//! too.
//!
//! Freezing the upper again over the same chain gives the same layer.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use iii_store::Layer;
use iii_store::layer::{Kind, NodeRef};
use iii_store::tree::DirKind;

use crate::ino::{Ino, ROOT};
use crate::merge::Merged;
use crate::upper::batch::lower_record;
use crate::upper::record::{Chain, Op, Record};
use crate::upper::state::State;
use crate::upper::{Opened, io_error};
use crate::{Footing, OpenError};

/// Makes the directory `dir`, and in it an upper that stands on `footing`, whose layers are
/// `layers`, and shows `frozen` on top of them. The upper is durable on return, except for the name
/// of `dir`. After an error, the contents of `dir` are unusable.
///
/// The upper refers to contents of `frozen`: the caller keeps that layer for as long as the upper
/// exists. `footing.thawed` is ignored.
pub fn thaw(
    dir: &Path,
    footing: &Footing,
    layers: Vec<Arc<Layer>>,
    frozen: &Layer,
) -> Result<(), OpenError> {
    let slot = footing.project;
    if slot.is_some_and(|slot| slot >= layers.len()) {
        return Err(OpenError::NoProject);
    }
    let chain = Chain {
        layers: layers.iter().map(|l| *l.layer_id().as_bytes()).collect(),
        project: slot.map(|slot| slot as u32),
    };
    let lower = Arc::new(Merged::new(layers)?);
    let mut state = State::new(lower);
    state.chain = chain;
    state.applied = footing.applied.iter().map(|l| *l.as_bytes()).collect();
    state.thawed = Some(*frozen.layer_id().as_bytes());
    fill(&mut state, frozen);
    std::fs::create_dir(dir).map_err(io_error("creating", dir))?;
    Opened::new(dir)?.start(state, false, false)?;
    Ok(())
}

/// Fills an empty state with the contents of `frozen`.
fn fill(state: &mut State, frozen: &Layer) {
    let lower = Arc::clone(&state.lower);
    // The numbers of files with several names, by the index of the first name.
    let mut links: HashMap<u32, u64> = HashMap::new();
    let root = frozen.root();
    if root.dir_kind() == DirKind::Implicit && root.children().next().is_none() {
        return;
    }
    let add = |state: &mut State, record: Record| {
        let number = state.next_number();
        state.apply(Op::Inode(number, Box::new(record)));
        number
    };
    let number = match lower.get(ROOT) {
        Some(there) => add(state, described(lower_record(&lower, there), root)),
        None => return,
    };
    let mut pending = vec![(root, Some(ROOT), number)];
    while let Some((dir, base, number)) = pending.pop() {
        for child in dir.children() {
            let name: Box<[u8]> = child.name().into();
            let below = base.and_then(|base: Ino| lower.lookup(base, &name));
            match child.kind() {
                Kind::Whiteout => {
                    if below.is_some() {
                        state.apply(Op::Entry(number, name, None));
                    }
                }
                Kind::Dir => {
                    let shows = below.filter(|below| {
                        below.node.kind() == Kind::Dir && child.dir_kind() != DirKind::Opaque
                    });
                    let made = if let Some(there) = shows {
                        add(state, described(lower_record(&lower, there), child))
                    } else {
                        let made = add(state, own(child, 1));
                        state.apply(Op::Entry(number, name, Some(made)));
                        made
                    };
                    pending.push((child, shows.map(|there| there.ino), made));
                }
                _ => {
                    let first = child.links().next().map_or(child.index(), NodeRef::index);
                    let made = links.get(&first).copied().unwrap_or_else(|| {
                        let names = child.links().count().max(1);
                        add(state, own(child, names as u32))
                    });
                    links.insert(first, made);
                    state.apply(Op::Entry(number, name, Some(made)));
                }
            }
        }
    }
}

/// The record of a lower directory, with the metadata of the layer if the layer has any.
fn described(record: Record, says: NodeRef<'_>) -> Record {
    if says.dir_kind() == DirKind::Implicit {
        return record;
    }
    Record {
        origin: record.origin,
        ..own(says, 1)
    }
}

/// The record of an inode of the upper's own, equal to that of the layer.
fn own(node: NodeRef<'_>, nlink: u32) -> Record {
    Record {
        origin: None,
        ..Record::of_lower(node, node, nlink, b"")
    }
}
