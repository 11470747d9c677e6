//! The commands about snapshots of workers.

use std::process::ExitCode;

use iii_engine::home::Home;
use iii_engine::managed::{self, State};
use iii_engine::project::WorkerName;
use iii_engine::worker::snapshot::{self, Keeper, Snapshot, Subject, Tag};
use iii_store::{RefKind, Store};

use super::args::{Fork, ListSnapshots, Rollback, TakeSnapshot};
use super::managed::{config_path, orders_again, run};
use super::table::{Align, Table};
use super::{CliError, print, print_json};
use crate::output::Ui;

pub fn take(home: &Home, args: &TakeSnapshot, ui: &Ui) -> Result<ExitCode, CliError> {
    let subject = Subject::find(home, &config_path(&args.config)?, &args.name.parse()?)?;
    let tag: Option<Tag> = args.tag.as_deref().map(str::parse).transpose()?;
    let store = Store::open(home.store())?;
    let name = &subject.name;
    if let Some(tag) = tag.as_ref().filter(|_| args.remove) {
        snapshot::remove(&store, &subject, tag)?;
        ui.ok(format_args!("snapshot {tag} of {name} removed"));
        return Ok(ExitCode::SUCCESS);
    }
    let force = args.force;
    let taken = snapshot::take(&store, &subject, &Keeper::Snapshot { tag, force })?;
    if let Some(tag) = taken.tag {
        ui.ok(format_args!("snapshot {tag} of {name} taken"));
    }
    Ok(ExitCode::SUCCESS)
}

/// The output of `worker snapshots --json`.
#[derive(serde::Serialize)]
struct Snapshots {
    snapshots: Vec<Snapshot>,
}

pub fn list(home: &Home, args: &ListSnapshots, ui: &Ui) -> Result<ExitCode, CliError> {
    let subject = Subject::find(home, &config_path(&args.config)?, &args.name.parse()?)?;
    let (snapshots, unreadable) = snapshot::list(&Store::open(home.store())?, &subject)?;
    for error in &unreadable {
        ui.warn(format_args!("{error}; `iii store verify` says more"));
    }
    if args.json {
        print_json(&Snapshots { snapshots })?;
        return Ok(ExitCode::SUCCESS);
    }
    let columns = [
        ("TAG", Align::Left),
        ("TAKEN", Align::Left),
        ("LAYER", Align::Left),
    ];
    let mut table = Table::new(columns);
    for snapshot in snapshots {
        let layer = snapshot.layer.short();
        table.row([snapshot.tag.to_string(), snapshot.taken, layer]);
    }
    print(&table.text())?;
    Ok(ExitCode::SUCCESS)
}

pub fn roll_back(home: &Home, args: &Rollback, ui: &Ui) -> Result<ExitCode, CliError> {
    let name: WorkerName = args.start.name.parse()?;
    let orders = orders_again(home, &name, &args.start)?;
    let subject = Subject::find(home, &orders.config, &name)?;
    let tag: Tag = args.tag.parse()?;
    let store = Store::open(home.store())?;
    // Before anything is stopped.
    let snapshot = snapshot::find(&store, &subject, &tag)?;
    let is_managed = subject.keeper == RefKind::Managed;
    let ran = is_managed && managed::state(home, &name)?.0 != State::Stopped;
    if ran {
        managed::stop(home, &name)?;
    }
    let rolled = snapshot::roll_back(&store, &subject, &tag);
    if rolled.is_ok() {
        ui.ok(format_args!(
            "{name} is what it was at {tag}, {}; its later files are dropped",
            snapshot.taken
        ));
    }
    // Also if it is what it was before.
    let started = if ran {
        run(home, &name, orders, args.start.no_wait, ui)
    } else {
        Ok(ExitCode::SUCCESS)
    };
    rolled?;
    started
}

pub fn fork(home: &Home, args: &Fork, ui: &Ui) -> Result<ExitCode, CliError> {
    let config = config_path(&args.config)?;
    let (from, tag) = match args.from.split_once('@') {
        Some((from, tag)) => (from, Some(tag.parse::<Tag>()?)),
        None => (args.from.as_str(), None),
    };
    let subject = Subject::find(home, &config, &from.parse()?)?;
    let new = args.new.parse()?;
    let store = Store::open(home.store())?;
    snapshot::fork(home, &config, &store, &subject, tag.as_ref(), &new)?;
    ui.ok(format_args!(
        "{new} forked from {}, and added to config.yaml",
        args.from
    ));
    Ok(ExitCode::SUCCESS)
}
