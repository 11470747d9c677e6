//! `iii store df`.

use std::collections::BTreeSet;
use std::process::ExitCode;

use iii_engine::build::collect;
use iii_engine::home::Home;
use iii_store::{Account, GcPlan, LayerId, LayerUse, RefKind, Store, StoreError};
use serde_json::json;

use super::catalog::{Catalog, ref_kind_text, roots_text, unix_seconds};
use crate::args::Df;
use crate::output::{Ui, human_bytes, human_counted, human_span};
use crate::table::{Align, Table};
use crate::{CliError, print, print_json};

/// Layers that are shown unless all are asked for.
const LARGEST: usize = 20;

pub fn df(home: &Home, store: &Store, args: &Df, ui: &Ui) -> Result<ExitCode, CliError> {
    let account = store.account()?;
    let catalog = Catalog::read(store, ui)?;
    warn_of_damage(&account, ui);
    warn_of_old_caches(home, ui);
    let plan = match store.plan_gc(&collect::policy(store.space()?)) {
        Err(error @ StoreError::NothingKept { .. }) => {
            ui.warn(error);
            GcPlan::default()
        }
        // The catalog has told of it.
        Err(_) if catalog.lacks_refs() => GcPlan::default(),
        plan => plan?,
    };
    if args.json {
        print_json(&as_json(store, &account, &catalog, &plan))?;
        return Ok(ExitCode::SUCCESS);
    }
    let tables = [
        totals(store, &account, &plan),
        by_ref(&account),
        by_layer(&account, &catalog, args.all),
    ];
    print(&tables.join("\n"))?;
    let hidden = account.layers.len().saturating_sub(LARGEST);
    if hidden > 0 && !args.all {
        ui.note(format_args!(
            "and {} more: --all",
            human_counted(hidden as u64, "smaller layer")
        ));
    }
    Ok(ExitCode::SUCCESS)
}

/// Package caches are in the store now.
fn warn_of_old_caches(home: &Home, ui: &Ui) {
    let dir = home.old_caches();
    if dir.exists() {
        ui.warn(format_args!(
            "{} holds package caches of an older version, which nothing reads any more; remove it: rm -rf {}",
            dir.display(),
            dir.display()
        ));
    }
}

fn warn_of_damage(account: &Account, ui: &Ui) {
    for error in &account.unreadable {
        ui.warn(format_args!("{error}; left out of the sums"));
    }
    for layer in account.layers.iter().filter(|layer| layer.missing > 0) {
        ui.warn(format_args!(
            "layer {}: the contents of {} are not in the store",
            layer.id.short(),
            human_counted(layer.missing, "file")
        ));
    }
    if !account.unreadable.is_empty() || account.layers.iter().any(|layer| layer.missing > 0) {
        ui.note("`iii store verify` lists the damage");
    }
}

/// Bytes of all refs without a store, each with its own files.
fn as_copies(account: &Account) -> u64 {
    let refs = account.refs.iter();
    let refs = refs.filter(|name| name.kind != RefKind::Volume);
    refs.map(|name| name.logical).sum()
}

fn totals(store: &Store, account: &Account, plan: &GcPlan) -> String {
    let mut table = Table::new([("ON DISK", Align::Right), ("", Align::Left)]);
    let padding = account.padding();
    let sign = if padding < 0 { "-" } else { "" };
    let row = |bytes: u64, what: &str| [human_bytes(bytes), what.to_owned()];
    table.row(row(account.named, "contents of files that layers name"));
    table.row(row(account.in_trash, "layers and contents in the trash"));
    table.row(row(account.unnamed, "contents that no layer names"));
    table.row(row(
        account.layer_files,
        "layers: names, modes, owners, times",
    ));
    table.row(row(
        account.indexes,
        "indexes of packs, outboards of large files",
    ));
    for (bytes, what) in [
        (account.unfinished, "being written now"),
        (
            account.abandoned,
            "remains of interrupted imports, builds and snapshots",
        ),
    ] {
        if bytes > 0 {
            table.row(row(bytes, what));
        }
    }
    table.row(row(
        account.other,
        "refs, keys, stat caches, leases, damage moved aside",
    ));
    let padding = format!("{sign}{}", human_bytes(padding.unsigned_abs()));
    table.row([
        padding,
        "padding: alignment in packs, rest of blocks, directories".into(),
    ]);
    table.row(row(
        account.on_disk(),
        &format!("in all, in {}", store.dir().display()),
    ));
    table.row([String::new(), String::new()]);
    table.row(row(
        as_copies(account),
        "without sharing between workers and images",
    ));
    let later = match plan.frees_later {
        0 => String::new(),
        bytes => format!(
            ", and {} after {} in the trash",
            human_bytes(bytes),
            human_span(plan.grace)
        ),
    };
    table.row(row(
        plan.frees,
        &format!("that `iii store gc` frees now{later}"),
    ));
    table.text()
}

fn by_ref(account: &Account) -> String {
    let mut table = Table::new([
        ("WORKER, IMAGE OR CACHE", Align::Left),
        ("LAYERS", Align::Right),
        ("LOGICAL", Align::Right),
        ("UNIQUE", Align::Right),
        ("SHARED", Align::Right),
    ]);
    let mut refs: Vec<_> = account.refs.iter().collect();
    refs.sort_by_key(|name| (name.kind, std::cmp::Reverse(name.unique)));
    for name in refs {
        table.row([
            format!("{} {}", ref_kind_text(name.kind), name.name),
            name.layers.len().to_string(),
            human_bytes(name.logical),
            human_bytes(name.unique),
            human_bytes(name.shared),
        ]);
    }
    let none = String::new;
    for (what, bytes) in [
        ("(several of them)", account.shared_by_refs),
        ("(none of them)", account.in_no_ref),
    ] {
        table.row([what.into(), none(), none(), human_bytes(bytes), none()]);
    }
    table.text()
}

/// The largest first.
fn sorted(account: &Account) -> Vec<&LayerUse> {
    let mut layers: Vec<_> = account.layers.iter().collect();
    layers.sort_by_key(|layer| (std::cmp::Reverse(layer.unique + layer.shared), layer.id));
    layers
}

fn by_layer(account: &Account, catalog: &Catalog, all: bool) -> String {
    let mut table = Table::new([
        ("LAYER", Align::Left),
        ("KIND", Align::Left),
        ("LOGICAL", Align::Right),
        ("UNIQUE", Align::Right),
        ("SHARED", Align::Right),
        ("KEPT BY", Align::Left),
    ]);
    let shown = if all { usize::MAX } else { LARGEST };
    for layer in sorted(account).into_iter().take(shown) {
        table.row([
            layer.id.short(),
            catalog.kind_text(&layer.id),
            human_bytes(layer.logical),
            human_bytes(layer.unique),
            human_bytes(layer.shared),
            roots_text(catalog.roots(&layer.id)),
        ]);
    }
    let none = String::new;
    let several = human_bytes(account.shared_by_layers);
    table.row(["(several)".into(), none(), none(), several, none(), none()]);
    table.text()
}

fn as_json(
    store: &Store,
    account: &Account,
    catalog: &Catalog,
    plan: &GcPlan,
) -> serde_json::Value {
    let goes: BTreeSet<LayerId> = plan.layers.iter().map(|layer| layer.layer).collect();
    let areas = account.areas.iter().map(|area| {
        json!({
            "name": area.name,
            "files": area.files,
            "bytes": area.bytes,
            "on_disk": area.on_disk,
        })
    });
    let refs = account.refs.iter().map(|name| {
        json!({
            "kind": ref_kind_text(name.kind),
            "name": name.name,
            "layers": name.layers,
            "logical": name.logical,
            "unique": name.unique,
            "shared": name.shared,
        })
    });
    let layers = sorted(account).into_iter().map(|layer| {
        json!({
            "id": layer.id,
            "tree_id": layer.tree_id,
            "kind": catalog.kind(&layer.id),
            "logical": layer.logical,
            "unique": layer.unique,
            "shared": layer.shared,
            "reclaimable": if goes.contains(&layer.id) { layer.unique } else { 0 },
            "missing": layer.missing,
            "used": unix_seconds(layer.used),
            "kept_by": catalog.roots(&layer.id),
        })
    });
    let unreadable = account.unreadable.iter().map(ToString::to_string);
    json!({
        "store": iii_store::path_json::text(store.dir()),
        "on_disk": account.on_disk(),
        "named": account.named,
        "in_trash": account.in_trash,
        "unnamed": account.unnamed,
        "layer_files": account.layer_files,
        "indexes": account.indexes,
        "unfinished": account.unfinished,
        "abandoned": account.abandoned,
        "other": account.other,
        "padding": account.padding(),
        "as_copies": as_copies(account),
        "reclaimable": plan.frees,
        "reclaimable_later": plan.frees_later,
        "shared_by_layers": account.shared_by_layers,
        "shared_by_refs": account.shared_by_refs,
        "in_no_ref": account.in_no_ref,
        "areas": areas.collect::<Vec<_>>(),
        "refs": refs.collect::<Vec<_>>(),
        "layers": layers.collect::<Vec<_>>(),
        "unreadable": unreadable.collect::<Vec<_>>(),
    })
}
