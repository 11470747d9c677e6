//! A layer as an upper: what freezing made of an upper is made one again.
//!
//! The new upper shows over a chain what the chain and the layer, laid on top of it, show together.
//! It is no layer of the chain, though: what it says gives way to changes of the project as what
//! any upper says ([`crate::rebase`]), and the sandbox goes on writing to it. Files are records
//! that refer to the layer's objects, so that it takes time and space for metadata alone, until one
//! of them is written to. Of times, the layer has only mtimes: they stand for the others.
//!
//! Frozen again over the same chain, the upper is the same layer.

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
/// `layers`, and says what `frozen` does. It is durable when this returns, but for the name of
/// `dir`; after an error, what is in `dir` is of no use.
///
/// The upper holds contents of `frozen`: the caller keeps that for as long as the upper is there.
/// What `footing` says of another layer that an upper was made from means nothing here.
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

/// Has an empty state say what `frozen` does.
fn fill(state: &mut State, frozen: &Layer) {
    let lower = Arc::clone(&state.lower);
    // The numbers of files with several names, by the first of those.
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

/// A lower directory's record, with what the layer says of it.
fn described(record: Record, says: NodeRef<'_>) -> Record {
    if says.dir_kind() == DirKind::Implicit {
        return record;
    }
    Record {
        origin: record.origin,
        ..own(says, 1)
    }
}

/// The record of an inode of the upper's own that is like that of the layer.
fn own(node: NodeRef<'_>, nlink: u32) -> Record {
    Record {
        origin: None,
        ..Record::of_lower(node, node, nlink, b"")
    }
}
