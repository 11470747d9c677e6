//! `iii store gc`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::process::ExitCode;

use iii_engine::build::collect;
use iii_store::{GcEvent, GcPlan, GcReport, LayerId, Policy, Space, Store, Why};
use serde_json::{Value, json};

use super::catalog::{Catalog, age_text, roots_text, unix_seconds};
use crate::args::Gc;
use crate::output::{Ui, human_bytes, human_counted, human_span};
use crate::quantity::{Limit, Room};
use crate::table::{Align, Table};
use crate::{CliError, print, print_json};

pub fn gc(store: &Store, args: &Gc, ui: &Ui) -> Result<ExitCode, CliError> {
    let policy = policy(args, store.space()?);
    let catalog = Catalog::read(store, ui)?;
    let plan = store.plan_gc(&policy)?;
    if !args.json {
        print(&plan_text(&plan, &catalog, &policy))?;
    }
    if plan.still_over > 0 {
        ui.warn(format_args!(
            "the store stays {} over the limits: workers, images and running processes keep the rest",
            human_bytes(plan.still_over)
        ));
    }
    let report = if args.dry_run {
        if let Some(why) = &plan.blocked {
            blocked(why, ui);
        }
        ui.note("nothing was changed (--dry-run)");
        None
    } else {
        let report = store.gc(&plan, &|event| match event {
            GcEvent::Waiting => ui.note("another gc is running; waiting"),
            GcEvent::Blocked(why) => blocked(why, ui),
            GcEvent::Unreadable(pack) => ui.warn(format_args!(
                "pack {}: an object in it cannot be read; the pack stays as it is",
                pack.short()
            )),
        })?;
        ui.ok(report_text(&report));
        Some(report)
    };
    if args.json {
        print_json(&json!({
            "plan": plan_json(&plan, &catalog),
            "report": report,
        }))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn policy(args: &Gc, disk: Space) -> Policy {
    let default = collect::policy(disk);
    Policy {
        keep: args.keep.unwrap_or(default.keep),
        max_bytes: args.max_size.map_or(default.max_bytes, Limit::at),
        min_free: args.min_free.map_or(default.min_free, |limit| {
            limit.at().map(|room| match room {
                Room::Bytes(bytes) => bytes,
                #[allow(clippy::cast_precision_loss)]
                Room::Share(share) => (disk.total as f64 * share) as u64,
            })
        }),
        grace: args.grace.unwrap_or(default.grace),
    }
}

fn blocked(why: &str, ui: &Ui) {
    ui.warn(format_args!(
        "no file contents can be freed: {why}\n`iii store verify --repair` moves damage aside"
    ));
}

/// Why each evicted layer goes. A layer that no record kept has no root.
fn reasons(plan: &GcPlan) -> BTreeMap<LayerId, Why> {
    let records = plan.records.iter();
    let records = records.map(|record| (record.layer, record.why));
    let volumes = plan.volumes.iter().flat_map(|volume| {
        let layers = volume.layers.iter();
        layers.map(|layer| (*layer, volume.why))
    });
    volumes.chain(records).collect()
}

fn why_text(why: Option<&Why>, policy: &Policy) -> String {
    match why {
        None => "nothing keeps it".into(),
        Some(Why::Unused) => format!("not used for {}", human_span(policy.keep)),
        Some(Why::MaxSize) => "the store is too large".into(),
        Some(Why::MinFree) => "the disk is too full".into(),
        Some(Why::Missing) => "its layer is gone".into(),
    }
}

fn plan_text(plan: &GcPlan, catalog: &Catalog, policy: &Policy) -> String {
    let mut text = String::new();
    if !plan.layers.is_empty() {
        let reasons = reasons(plan);
        let mut table = Table::new([
            ("GOES", Align::Left),
            ("KIND", Align::Left),
            ("LOGICAL", Align::Right),
            ("USED", Align::Right),
            ("WHY", Align::Left),
        ]);
        for layer in &plan.layers {
            table.row([
                layer.layer.short(),
                catalog.kind_text(&layer.layer),
                human_bytes(layer.logical_bytes),
                age_text(layer.last_used),
                why_text(reasons.get(&layer.layer), policy),
            ]);
        }
        text.push_str(&table.text());
        text.push('\n');
    }
    if !plan.kept.is_empty() {
        let mut table = Table::new([
            ("STAYS", Align::Left),
            ("KIND", Align::Left),
            ("LOGICAL", Align::Right),
            ("USED", Align::Right),
            ("KEPT BY", Align::Left),
        ]);
        for layer in &plan.kept {
            table.row([
                layer.layer.short(),
                catalog.kind_text(&layer.layer),
                human_bytes(layer.logical_bytes),
                age_text(layer.last_used),
                roots_text(&layer.roots),
            ]);
        }
        text.push_str(&table.text());
        text.push('\n');
    }
    let expired = plan.expired.len() as u64;
    let caches = plan.stat_caches.len() as u64;
    for (count, noun, what) in [
        (expired, "layer", "out of the trash"),
        (plan.dead_packs, "pack", "as a whole"),
        (
            plan.rewritten_packs,
            "pack",
            "rewritten without unneeded objects",
        ),
        (caches, "stat cache", "of projects without a layer"),
        (
            plan.leftovers,
            "file",
            "left by interrupted imports, builds and snapshots",
        ),
        (
            plan.volumes.len() as u64,
            "package cache",
            "that a later step fills again",
        ),
    ] {
        if count > 0 {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{} {what}", human_counted(count, noun));
        }
    }
    let _ = write!(
        text,
        "frees about {} of {}",
        human_bytes(plan.frees),
        human_bytes(plan.store_bytes)
    );
    if plan.frees_later > 0 {
        let _ = write!(
            text,
            ", and {} in a gc after {} in the trash",
            human_bytes(plan.frees_later),
            human_span(plan.grace)
        );
    }
    text.push('\n');
    text
}

fn report_text(report: &GcReport) -> String {
    let mut text = format!("freed {}", human_bytes(report.freed));
    for (count, done) in [
        (report.layers_removed, "removed"),
        (report.layers_trashed, "moved into the trash"),
    ] {
        if count > 0 {
            // Writing to a string cannot fail.
            let _ = write!(text, ", {} {done}", human_counted(count, "layer"));
        }
    }
    if report.leftovers_removed > 0 {
        let files = human_counted(report.leftovers_removed, "file");
        let _ = write!(text, ", {files} of interrupted processes removed");
    }
    if report.waiting > 0 {
        let _ = write!(text, "; {} wait in the trash", human_bytes(report.waiting));
    }
    text
}

fn plan_json(plan: &GcPlan, catalog: &Catalog) -> Value {
    let reasons = reasons(plan);
    let goes = plan.layers.iter().map(|layer| {
        json!({
            "id": layer.layer,
            "kind": catalog.kind(&layer.layer),
            "logical": layer.logical_bytes,
            "used": unix_seconds(layer.last_used),
            "why": reasons.get(&layer.layer),
        })
    });
    let stays = plan.kept.iter().map(|layer| {
        json!({
            "id": layer.layer,
            "kind": catalog.kind(&layer.layer),
            "logical": layer.logical_bytes,
            "used": unix_seconds(layer.last_used),
            "kept_by": layer.roots,
        })
    });
    json!({
        "on_disk": plan.store_bytes,
        "frees": plan.frees,
        "frees_later": plan.frees_later,
        "grace_seconds": plan.grace.as_secs(),
        "still_over": plan.still_over,
        "blocked": plan.blocked,
        "goes": goes.collect::<Vec<_>>(),
        "stays": stays.collect::<Vec<_>>(),
        "records": plan.records,
        "volumes": plan.volumes,
        "expired": plan.expired,
        "objects": plan.objects,
        "object_bytes": plan.object_bytes,
        "dead_packs": plan.dead_packs,
        "rewritten_packs": plan.rewritten_packs,
        "stat_caches": plan.stat_caches,
        "leftovers": plan.leftovers,
        "leftover_bytes": plan.leftover_bytes,
    })
}
