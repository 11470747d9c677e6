//! `iii store list`, `inspect`, `diff` and `why`.

use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use iii_oci::Reference;
use iii_oci::export::EXPORTED;
use iii_sandbox::tail::inert;
use iii_store::facts::path_text;
use iii_store::tree::DirKind;
use iii_store::{
    Change, ChangeKind, Fact, KeyId, Kind, Layer, LayerId, NodeRef, Policy, Record, RefKind, Root,
    Seen, Store,
};
use serde_json::{Value, json};

use super::catalog::{Catalog, Counts, age_text, ref_kind_text, roots_text, unix_seconds};
use super::{choose, resolve};
use crate::args::{Diff, Inspect, List, Why};
use crate::output::{
    Ui, human_bytes, human_count, human_counted, human_duration, human_span, human_time,
};
use crate::table::{Align, Table};
use crate::{CliError, print, print_json};

pub fn list(store: &Store, args: &List, ui: &Ui) -> Result<ExitCode, CliError> {
    let account = store.account()?;
    let catalog = Catalog::read(store, ui)?;
    for error in &account.unreadable {
        ui.warn(format_args!("{error}; see `iii store verify`"));
    }
    let mut layers: Vec<_> = account.layers.iter().collect();
    layers.sort_by_key(|layer| (std::cmp::Reverse(layer.used), layer.id));
    if args.json {
        let layers = layers.into_iter().map(|layer| {
            json!({
                "id": layer.id,
                "tree_id": layer.tree_id,
                "kind": catalog.kind(&layer.id),
                "logical": layer.logical,
                "unique": layer.unique,
                "shared": layer.shared,
                "used": unix_seconds(layer.used),
                "kept_by": catalog.roots(&layer.id),
            })
        });
        print_json(&json!({ "layers": layers.collect::<Vec<_>>() }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new([
        ("LAYER", Align::Left),
        ("KIND", Align::Left),
        ("LOGICAL", Align::Right),
        ("UNIQUE", Align::Right),
        ("USED", Align::Right),
        ("KEPT BY", Align::Left),
    ]);
    for layer in layers {
        table.row([
            layer.id.short(),
            catalog.kind_text(&layer.id),
            human_bytes(layer.logical),
            human_bytes(layer.unique),
            age_text(layer.used),
            roots_text(catalog.roots(&layer.id)),
        ]);
    }
    print(&table.text())?;
    Ok(ExitCode::SUCCESS)
}

pub fn inspect(store: &Store, args: &Inspect, ui: &Ui) -> Result<ExitCode, CliError> {
    let catalog = Catalog::read(store, ui)?;
    let ids = store.layer_ids()?;
    match choose(&args.layer, &ids) {
        Ok(id) => inspect_layer(store, &catalog, &id, args)?,
        Err(CliError::NoLayer { text } | CliError::NotALayer { text }) => {
            let refs = refs_called(&catalog, &text);
            if refs.is_empty() {
                return Err(CliError::NothingCalled { text });
            }
            inspect_refs(store, &catalog, &refs, args.json)?;
        }
        Err(error) => return Err(error),
    }
    Ok(ExitCode::SUCCESS)
}

/// The workers and images of this name; an image's may be short.
fn refs_called<'a>(catalog: &'a Catalog, name: &str) -> Vec<(RefKind, &'a str, &'a [LayerId])> {
    let image = name.parse::<Reference>().map(|image| image.to_string());
    let image = image.as_deref().unwrap_or(name);
    let refs = catalog.refs.iter().filter(|(kind, own, _)| match kind {
        RefKind::Image => own == image,
        RefKind::Worker | RefKind::Managed | RefKind::Snapshot | RefKind::Volume => own == name,
    });
    refs.map(|(kind, name, layers)| (*kind, name.as_str(), layers.as_slice()))
        .collect()
}

fn inspect_refs(
    store: &Store,
    catalog: &Catalog,
    refs: &[(RefKind, &str, &[LayerId])],
    as_json: bool,
) -> Result<(), CliError> {
    if as_json {
        let mut found = Vec::new();
        for (kind, name, ids) in refs {
            let mut layers = Vec::new();
            for id in *ids {
                let layer = store.layer(id)?;
                layers.push(json!({
                    "id": id,
                    "tree_id": layer.tree_id(),
                    "kind": catalog.kind(id),
                    "logical": layer.logical_bytes(),
                }));
            }
            found.push(json!({ "kind": ref_kind_text(*kind), "name": name, "layers": layers }));
        }
        return print_json(&json!({ "refs": found }));
    }
    for (kind, name, ids) in refs {
        let mut table = Table::new([
            ("LAYER", Align::Left),
            ("KIND", Align::Left),
            ("LOGICAL", Align::Right),
        ]);
        for id in *ids {
            let layer = store.layer(id)?;
            table.row([
                id.short(),
                catalog.kind_text(id),
                human_bytes(layer.logical_bytes()),
            ]);
        }
        let name = inert(name);
        print(&format!(
            "{} {name}, bottom first\n{}",
            ref_kind_text(*kind),
            table.text()
        ))?;
    }
    Ok(())
}

fn inspect_layer(
    store: &Store,
    catalog: &Catalog,
    id: &LayerId,
    args: &Inspect,
) -> Result<(), CliError> {
    let layer = store.layer(id)?;
    let counts = Counts::of(&layer);
    if args.json {
        let mut recipes = Vec::new();
        for (key, head) in catalog.recipes(id) {
            let mut recipe = serde_json::Map::from_iter([("key".to_owned(), json!(key))]);
            recipe.extend(head.provenance.clone());
            let record = store.record(key, head.clone())?;
            recipe.insert("facts".into(), json!(record.map(|record| record.facts)));
            recipes.push(recipe);
        }
        let mut value = json!({
            "id": id,
            "tree_id": layer.tree_id(),
            "kind": catalog.kind(id),
            "logical": layer.logical_bytes(),
            "counts": counts,
            "kept_by": catalog.roots(id),
            "recipes": recipes,
        });
        if args.entries {
            value["entries"] = layer.nodes().map(entry_json).collect();
        }
        return print_json(&value);
    }
    let mut text = String::new();
    let mut line = |name: &str, value: &str| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{name:<9} {}", inert(value));
    };
    line("layer", &id.to_string());
    line("tree", &layer.tree_id().to_string());
    line("kind", &catalog.kind_text(id));
    line("holds", &counts_text(&counts, layer.logical_bytes()));
    line("kept by", &roots_text(catalog.roots(id)));
    for (key, head) in catalog.recipes(id) {
        if let Some(record) = store.record(key, head.clone())? {
            recipe_lines(key, &record, &mut line);
        }
    }
    if args.entries {
        text.push('\n');
        text.push_str(&entries_text(&layer));
    }
    print(&text)
}

fn counts_text(counts: &Counts, logical: u64) -> String {
    let mut parts = vec![format!(
        "{} ({})",
        human_counted(counts.files, "file"),
        human_bytes(logical)
    )];
    for (count, one, many) in [
        (counts.directories, "directory", "directories"),
        (counts.symlinks, "symlink", "symlinks"),
        (counts.whiteouts, "whiteout", "whiteouts"),
        (
            counts.special,
            "pipe, socket or device",
            "pipes, sockets and devices",
        ),
    ] {
        if count > 0 {
            let noun = if count == 1 { one } else { many };
            parts.push(format!("{} {noun}", human_count(count)));
        }
    }
    parts.join(", ")
}

fn recipe_lines(key: &KeyId, record: &Record, line: &mut impl FnMut(&str, &str)) {
    let known = &record.provenance;
    let text = |name: &str| known.get(name).and_then(Value::as_str);
    if text("kind") == Some(EXPORTED) {
        let compression = text("compression").unwrap_or_default();
        line(
            "exported",
            &format!("{} ({compression})", text("digest").unwrap_or_default()),
        );
        line("  diff id", text("diff_id").unwrap_or_default());
        return;
    }
    line("recipe", &key.to_string());
    if let Some(created) = known.get("created").and_then(Value::as_i64) {
        let seconds = known.get("seconds").and_then(Value::as_f64);
        let seconds = seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        let took = seconds.map_or_else(String::new, |took| {
            format!(", took {}", human_duration(took))
        });
        line("  ran", &format!("{}{took}", human_time(created)));
    }
    for (name, value) in [
        ("  from", record.origin()),
        ("  because", text("reason")),
        ("  diff id", text("diff_id")),
    ] {
        if let Some(value) = value {
            line(name, value);
        }
    }
    let facts = &record.facts;
    if !facts.is_empty() || text("kind") != Some("base") {
        let facts = human_counted(facts.len() as u64, "fact");
        line("  saw", &format!("{facts} about the project"));
    }
    for fact in facts {
        line("", &format!("  {}", fact_text(fact)));
    }
}

fn fact_text(fact: &Fact) -> String {
    let path = if fact.path.is_empty() {
        ".".to_owned()
    } else {
        path_text(&fact.path)
    };
    match fact.seen {
        Seen::Absent => format!("absent    {path}"),
        Seen::Stat { kind, .. } => format!("type      {path} ({})", type_text(kind)),
        Seen::Listing(_) => format!("listing   {path}"),
        Seen::Contents { object, .. } => format!("contents  {path} ({})", object.short()),
        Seen::Target(_) => format!("target    {path}"),
        Seen::Tree(id) => format!("subtree   {path} ({})", id.short()),
    }
}

fn type_text(kind: Kind) -> &'static str {
    match kind {
        Kind::Dir => "dir",
        Kind::File => "file",
        Kind::Symlink => "symlink",
        Kind::Fifo => "fifo",
        Kind::Socket => "socket",
        Kind::Char => "char",
        Kind::Block => "block",
        Kind::Whiteout => "whiteout",
    }
}

/// Type and permissions as `ls -l` shows them; a whiteout is a `w`.
fn mode_text(kind: Kind, mode: u16) -> String {
    let mut text = String::with_capacity(10);
    text.push(match kind {
        Kind::Dir => 'd',
        Kind::File => '-',
        Kind::Symlink => 'l',
        Kind::Fifo => 'p',
        Kind::Socket => 's',
        Kind::Char => 'c',
        Kind::Block => 'b',
        Kind::Whiteout => 'w',
    });
    for (shift, special, letter) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
        let bits = mode >> shift;
        text.push(if bits & 4 == 0 { '-' } else { 'r' });
        text.push(if bits & 2 == 0 { '-' } else { 'w' });
        text.push(match (mode & special != 0, bits & 1 != 0) {
            (true, true) => letter,
            (true, false) => letter.to_ascii_uppercase(),
            (false, true) => 'x',
            (false, false) => '-',
        });
    }
    text
}

/// The mark of a directory in a single layer.
fn dir_note(node: NodeRef<'_>) -> &'static str {
    match node.dir_kind() {
        DirKind::Merged => "",
        DirKind::Opaque => " (opaque: hides the layers below)",
        DirKind::Implicit => " (only a parent: metadata from below)",
    }
}

fn entries_text(layer: &Layer) -> String {
    let owner = |node: NodeRef<'_>| format!("{}:{}", node.uid(), node.gid());
    let size = |node: NodeRef<'_>| match node.kind() {
        Kind::Char | Kind::Block => format!("{}, {}", node.rdev().major, node.rdev().minor),
        _ => node.size().to_string(),
    };
    let width = |cell: &dyn Fn(NodeRef<'_>) -> String| {
        layer
            .nodes()
            .map(|node| cell(node).len())
            .max()
            .unwrap_or_default()
    };
    let (owner_width, size_width) = (width(&owner), width(&size));
    let mut text = String::new();
    for node in in_order(layer) {
        let path = match node.index() {
            0 => ".".to_owned(),
            _ => path_text(&node.path()),
        };
        let target = match node.kind() {
            Kind::Symlink => format!(" -> {}", path_text(node.target())),
            _ => String::new(),
        };
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{} {:<owner_width$} {:>size_width$} {} {path}{target}{}",
            mode_text(node.kind(), node.mode()),
            owner(node),
            size(node),
            human_time(node.mtime().sec),
            dir_note(node),
        );
    }
    text
}

/// All entries, a directory before what is in it.
fn in_order(layer: &Layer) -> Vec<NodeRef<'_>> {
    let mut ordered = Vec::with_capacity(layer.node_count() as usize);
    let mut todo = vec![layer.root()];
    while let Some(node) = todo.pop() {
        ordered.push(node);
        let first = todo.len();
        todo.extend(node.children());
        todo[first..].reverse();
    }
    ordered
}

fn entry_json(node: NodeRef<'_>) -> Value {
    let mut entry = json!({
        "path": path_text(&node.path()),
        "type": type_text(node.kind()),
        "mode": format!("{:04o}", node.mode()),
        "uid": node.uid(),
        "gid": node.gid(),
        "mtime": [node.mtime().sec, i64::from(node.mtime().nsec)],
    });
    match node.kind() {
        Kind::File => {
            entry["size"] = node.size().into();
            entry["object"] = json!(node.object());
        }
        Kind::Symlink => entry["target"] = path_text(node.target()).into(),
        Kind::Char | Kind::Block => {
            entry["rdev"] = json!([node.rdev().major, node.rdev().minor]);
        }
        Kind::Dir => match node.dir_kind() {
            DirKind::Merged => {}
            DirKind::Opaque => entry["opaque"] = true.into(),
            DirKind::Implicit => entry["implicit"] = true.into(),
        },
        Kind::Fifo | Kind::Socket | Kind::Whiteout => {}
    }
    entry
}

pub fn diff(store: &Store, args: &Diff, ui: &Ui) -> Result<ExitCode, CliError> {
    let ids = store.layer_ids()?;
    let old = store.layer(&choose(&args.old, &ids)?)?;
    let new = store.layer(&choose(&args.new, &ids)?)?;
    let changes = iii_store::diff(&old, &new);
    if args.json {
        let changes = changes.iter().map(|change| change_json(change, &old, &new));
        print_json(&json!({
            "old": old.layer_id(),
            "new": new.layer_id(),
            "changes": changes.collect::<Vec<_>>(),
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut text = String::new();
    for change in &changes {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{} {}", letter(change.kind), change_path(change));
    }
    print(&text)?;
    if old.layer_id() == new.layer_id() {
        ui.note("they are one layer");
    } else if changes.is_empty() {
        ui.note("they differ in mtimes or hardlinks only");
    }
    Ok(ExitCode::SUCCESS)
}

fn letter(kind: ChangeKind) -> char {
    match kind {
        ChangeKind::Added => 'A',
        ChangeKind::Removed => 'D',
        ChangeKind::Modified => 'M',
    }
}

fn change_path(change: &Change) -> String {
    if change.path.is_empty() {
        ".".into()
    } else {
        path_text(&change.path)
    }
}

fn change_json(change: &Change, old: &Layer, new: &Layer) -> Value {
    let size = |layer: &Layer| layer.lookup(&change.path).map(NodeRef::size);
    json!({
        "change": letter(change.kind).to_string(),
        "path": change_path(change),
        "old_size": size(old),
        "new_size": size(new),
    })
}

pub fn why(store: &Store, args: &Why, ui: &Ui) -> Result<ExitCode, CliError> {
    let catalog = Catalog::read(store, ui)?;
    let id = resolve(store, &args.layer)?;
    let roots = catalog.roots(&id);
    if args.json {
        print_json(&json!({
            "id": id,
            "kind": catalog.kind(&id),
            "kept_by": roots,
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut text = String::new();
    for root in roots {
        let (what, name) = match root {
            Root::Ref { kind, name } => (ref_kind_text(*kind), inert(name)),
            Root::Lease { purpose } => ("lease", format!("{}, running now", inert(purpose))),
            Root::Record { key } => ("recipe", key.to_string()),
        };
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{what:<7} {name}");
    }
    print(&text)?;
    if roots.is_empty() {
        ui.note(format_args!(
            "nothing keeps {}: `iii store gc` frees it",
            id.short()
        ));
    } else if roots.iter().all(|root| matches!(root, Root::Record { .. })) {
        ui.note(format_args!(
            "kept for use again: `iii store gc` frees it {} after its last use, or earlier where space is short",
            human_span(Policy::default().keep)
        ));
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes() {
        for (kind, mode, expected) in [
            (Kind::File, 0o644, "-rw-r--r--"),
            (Kind::Dir, 0o1777, "drwxrwxrwt"),
            (Kind::File, 0o4755, "-rwsr-xr-x"),
            (Kind::File, 0o6644, "-rwSr-Sr--"),
            (Kind::Dir, 0o1000, "d--------T"),
            (Kind::Symlink, 0o777, "lrwxrwxrwx"),
            (Kind::Char, 0o600, "crw-------"),
            (Kind::Whiteout, 0, "w---------"),
        ] {
            assert_eq!(mode_text(kind, mode), expected);
        }
    }
}
