//! `iii store verify` and `iii store migrate`.

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use iii_engine::home::Home;
use iii_engine::uppers::check_all;
use iii_store::disk::RealDisk;
use iii_store::{
    Mended, MigrateEvent, Report, Severity, Store, StoreError, VerifyEvent, VerifyOptions,
};
use serde_json::json;

use super::catalog::ref_kind_text;
use super::uppers;
use crate::args::{Migrate, Verify};
use crate::output::{Ui, Unit, human_bytes, human_count, human_counted, human_duration};
use crate::table::{Align, Table};
use crate::{CliError, print, print_json};

/// The exit code where nothing is wrong but that something could not be checked.
const UNCHECKED: u8 = 3;

pub fn verify(home: &Home, args: &Verify, ui: &Ui) -> Result<ExitCode, CliError> {
    let dir = &home.store();
    let store = open(dir)?;
    let report = look(&store, args, ui)?;
    if !args.json {
        print(&problems_text(&report))?;
    }
    let (mut mended, mut after) = (Vec::new(), None);
    if args.repair && !report.is_clean() {
        mended = store.repair(&report, &|done| ui.ok(mended_text(done)))?;
        // Opened again: the format may have been written.
        let report = look(&open(dir)?, args, ui)?;
        if !args.json && !report.is_clean() {
            ui.warn(if report.is_mended() {
                "to be imported or built again:"
            } else {
                "not repaired:"
            });
            print(&problems_text(&report))?;
        }
        after = Some(report);
    }
    let checked = check_all(home);
    uppers::say(&checked, args.repair, ui);
    if args.json {
        let uppers = uppers::as_json(&checked);
        print_json(
            &json!({ "report": report, "mended": mended, "after": after, "uppers": uppers }),
        )?;
    }
    let of_store = verdict(after.as_ref().unwrap_or(&report), args, ui);
    let verdict = of_store.max(uppers::verdict(&checked));
    Ok(match verdict {
        Verdict::Healthy => ExitCode::SUCCESS,
        // An error of the machine is no verdict on the store.
        Verdict::Unchecked => ExitCode::from(UNCHECKED),
        Verdict::Damaged => ExitCode::FAILURE,
    })
}

/// How a check ends, best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    Healthy,
    Unchecked,
    Damaged,
}

/// Says how many problems the store has at last.
fn verdict(last: &Report, args: &Verify, ui: &Ui) -> Verdict {
    if last.is_clean() || (args.repair && last.is_mended()) {
        return Verdict::Healthy;
    }
    let count = |severity: Severity| {
        let problems = last.problems.iter();
        problems.filter(|one| one.severity == severity).count() as u64
    };
    let (damaged, unchecked) = (count(Severity::Damage), count(Severity::Unchecked));
    let problems = damaged + unchecked + count(Severity::Warning) + last.omitted;
    ui.error(format_args!(
        "the store has {}, {} of them damage",
        human_counted(problems, "problem"),
        human_count(damaged)
    ));
    if unchecked > 0 {
        ui.note(format_args!(
            "{} could not be checked and may be whole: a repair leaves that as it is",
            human_count(unchecked)
        ));
    }
    if !args.repair && problems > unchecked {
        ui.note("`iii store verify --repair` moves damage aside and drops everything that depends on it, so that it is built again");
    }
    if problems == unchecked {
        return Verdict::Unchecked;
    }
    Verdict::Damaged
}

fn open(dir: &Path) -> Result<Store, StoreError> {
    Store::open_to_repair(dir, Arc::new(RealDisk))
}

fn look(store: &Store, args: &Verify, ui: &Ui) -> Result<Report, CliError> {
    let start = Instant::now();
    let progress = ui.progress("verifying", Unit::Bytes);
    let options = VerifyOptions { data: args.data };
    let report = store.verify(options, &|event| match event {
        VerifyEvent::Data { done, total } => {
            progress.set_length(total);
            progress.set(done);
        }
    })?;
    drop(progress);
    let hashed = if args.data {
        format!("{} hashed", human_bytes(report.hashed))
    } else {
        "structure only; --data hashes everything".to_owned()
    };
    let looked_at = format!(
        "{}, {} in {}, {}, {}, {} ({hashed}, {})",
        human_counted(report.layers, "layer"),
        human_counted(report.packed_objects, "object"),
        human_counted(report.packs, "pack"),
        human_counted(report.loose_objects, "loose object"),
        human_counted(report.keys, "key"),
        human_counted(report.refs, "ref"),
        human_duration(start.elapsed()),
    );
    if report.is_clean() {
        ui.ok(format_args!("verified: {looked_at}"));
    } else {
        ui.note(format_args!("checked {looked_at}"));
    }
    Ok(report)
}

fn problems_text(report: &Report) -> String {
    if report.problems.is_empty() {
        return String::new();
    }
    let mut table = Table::new([
        ("SEVERITY", Align::Left),
        ("PATH", Align::Left),
        ("PROBLEM", Align::Left),
    ]);
    for problem in &report.problems {
        let severity = match problem.severity {
            Severity::Note => "note",
            Severity::Warning => "warning",
            Severity::Unchecked => "unchecked",
            Severity::Damage => "damage",
        };
        table.row([
            severity.to_owned(),
            problem.path.display().to_string(),
            format!("{}: {}", problem.what, problem.finding.meaning()),
        ]);
    }
    let mut text = table.text();
    if report.omitted > 0 {
        text.push_str("and ");
        text.push_str(&human_counted(report.omitted, "more problem"));
        text.push('\n');
    }
    text
}

fn mended_text(done: &Mended) -> String {
    match done {
        Mended::SetAside { path, to } => {
            format!("{} moved aside to {}", path.display(), to.display())
        }
        Mended::Salvaged {
            pack,
            objects,
            lost,
        } => format!(
            "pack {}: {} saved, {} lost",
            pack.short(),
            human_counted(*objects, "object"),
            human_count(*lost)
        ),
        Mended::RecordsDropped { key, records } => format!(
            "key {}: {} dropped; the step runs again when it is needed",
            key.short(),
            human_counted(*records, "record")
        ),
        Mended::RefDropped { ref_kind, name } => {
            let what = ref_kind_text(*ref_kind);
            format!("{what} {name} dropped: its file is damaged")
        }
        Mended::RefNotWhole {
            ref_kind,
            name,
            layers,
        } => {
            let what = ref_kind_text(*ref_kind);
            let lost = human_counted(*layers, "layer");
            format!("{what} {name} keeps its other layers; {lost} must be stored again")
        }
        Mended::Outboard { object } => format!("outboard of {} made again", object.short()),
        Mended::Directory { path } => format!("directory {} made again", path.display()),
        Mended::Format => "format written again".to_owned(),
    }
}

pub fn migrate(dir: &Path, args: &Migrate, ui: &Ui) -> Result<ExitCode, CliError> {
    let progress = ui.progress("migrating", Unit::Count);
    let migration = Store::migrate(dir, Arc::new(RealDisk), &|event| match event {
        MigrateEvent::Waiting => ui.note("a gc is running; waiting"),
        MigrateEvent::Done(files) => progress.set(files),
    })?;
    drop(progress);
    for path in &migration.damaged {
        ui.warn(format_args!(
            "{} is damaged and was left as it is",
            path.display()
        ));
    }
    if !migration.damaged.is_empty() {
        ui.note("`iii store verify --repair` explains and repairs the damage");
    }
    if args.json {
        print_json(&json!({ "migrated": migration }))?;
    } else if migration.sealed == 0 && migration.outboards == 0 {
        ui.ok("the store is up to date");
    } else {
        ui.ok(format_args!(
            "the store is updated: {} sealed, {} made",
            human_counted(migration.sealed, "file"),
            human_counted(migration.outboards, "outboard")
        ));
    }
    Ok(ExitCode::SUCCESS)
}
