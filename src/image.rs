//! `iii image`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};

use iii_engine::build::collect;
use iii_engine::home::Home;
use iii_oci::{self as oci, Event, ImageError, Imported, Platform};
use iii_sandbox::tail::inert;
use iii_store::{GcReport, Store};

use super::args::{Image, Import, InspectImage, List, Pull, RemoveImage};
use super::table::{Align, Table};
use super::{CliError, export, limits, print, print_json, settings};
use crate::output::{
    ProgressHandle, Ui, Unit, human_bytes, human_counted, human_duration, human_time,
};

/// Hex digits of a digest that tell images of one machine apart.
const SHORT_DIGEST: usize = 12;

pub fn run(command: Image, ui: &Ui) -> Result<ExitCode, CliError> {
    let home = settings::home()?;
    let store = Store::open(home.store())?;
    if matches!(command, Image::Pull(_) | Image::Import(_)) {
        crate::start_threads()?;
    }
    match command {
        Image::Pull(args) => pull(&home, &store, &args, ui),
        Image::Import(args) => import(&store, &args, ui),
        Image::Export(args) => export::image(&home, &store, &args, ui),
        Image::List(args) => list(&store, &args, ui),
        Image::Inspect(args) => inspect(&store, &args),
        Image::Remove(args) => remove(&store, &args, ui),
    }
}

fn pull(home: &Home, store: &Store, args: &Pull, ui: &Ui) -> Result<ExitCode, CliError> {
    let settings = home.registries().map_err(ImageError::from)?;
    let platform = args.platform.unwrap_or(Platform::host());
    let limits = limits::with(&args.limits.limits)?;
    let bars = Bars::new(ui, "pulling");
    store.sweep_dead_leases()?;
    let pulled = oci::pull(store, &args.name, platform, &settings, &limits, &|event| {
        bars.show(&event);
    });
    drop(bars);
    finish(store, pulled, "pulled", ui)?;
    Ok(ExitCode::SUCCESS)
}

fn import(store: &Store, args: &Import, ui: &Ui) -> Result<ExitCode, CliError> {
    let limits = limits::with(&args.limits.limits)?;
    let bars = Bars::new(ui, "importing");
    store.sweep_dead_leases()?;
    let imported = oci::import(store, &args.path, &args.name, &limits, &|event| {
        bars.show(&event);
    });
    drop(bars);
    finish(store, imported, "imported", ui)?;
    Ok(ExitCode::SUCCESS)
}

/// Reports the new image, and collects if the store or the disk is too full now, even after a
/// failure, which may be for want of space.
fn finish(
    store: &Store,
    imported: Result<Imported, ImageError>,
    how: &str,
    ui: &Ui,
) -> Result<(), ImageError> {
    if let Ok(imported) = &imported {
        done(imported, how, ui);
    }
    if settings::may_collect() {
        match collect::if_full(store) {
            Ok(Some(report)) if report.freed > 0 => cleared(&report, ui),
            Ok(_) => {}
            Err(error) => ui.warn(format_args!("the automatic gc failed: {error}")),
        }
    }
    imported.map(drop)
}

/// Reports the result of an automatic collection.
pub fn cleared(report: &GcReport, ui: &Ui) {
    ui.ok(format_args!(
        "gc freed {} of unneeded layers (III_GC=off disables it)",
        human_bytes(report.freed)
    ));
}

/// Reports a new image.
pub fn done(imported: &Imported, how: &str, ui: &Ui) {
    ui.ok(format_args!(
        "{} {how} in {}: {}, {} new",
        imported.image.name,
        human_duration(imported.elapsed),
        human_counted(imported.image.layers.len() as u64, "layer"),
        human_bytes(imported.new_bytes),
    ));
}

/// Draws an import or a pull, with a bar for each layer in progress.
pub struct Bars<'a> {
    ui: &'a Ui,
    what: &'static str,
    layers: Mutex<BTreeMap<usize, ProgressHandle>>,
}

impl<'a> Bars<'a> {
    pub fn new(ui: &'a Ui, what: &'static str) -> Self {
        Self {
            ui,
            what,
            layers: Mutex::default(),
        }
    }

    pub fn show(&self, event: &Event<'_>) {
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Found { .. } => {}
            Event::Layer {
                index,
                count,
                bytes,
            } => {
                let title = format!("{} layer {}/{count}", self.what, index + 1);
                let bar = self.ui.progress(title, Unit::Bytes);
                bar.set_length(*bytes);
                layers.insert(*index, bar);
            }
            Event::Read { index, bytes } => {
                if let Some(bar) = layers.get(index) {
                    bar.set(*bytes);
                }
            }
            Event::Stored { index } => drop(layers.remove(index)),
            Event::Waiting => self
                .ui
                .note("another process is reading the same layer; waiting"),
            Event::LeftOut { path, why } => {
                self.ui
                    .warn(format_args!("{}: left out: {why}", path.display()));
            }
        }
    }
}

fn list(store: &Store, args: &List, ui: &Ui) -> Result<ExitCode, CliError> {
    let (images, unreadable) = oci::readable(store)?;
    for error in &unreadable {
        ui.warn(format_args!("{error}; `iii store verify` says more"));
    }
    if args.json {
        print_json(&serde_json::json!({ "images": images }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new([
        ("NAME", Align::Left),
        ("DIGEST", Align::Left),
        ("LAYERS", Align::Right),
        ("SIZE", Align::Right),
    ]);
    for image in images {
        let digest = image.digest.map_or_else(String::new, |digest| digest.hex());
        table.row([
            image.name,
            digest.chars().take(SHORT_DIGEST).collect(),
            image.layers.len().to_string(),
            human_bytes(image.size),
        ]);
    }
    print(&table.text())?;
    Ok(ExitCode::SUCCESS)
}

/// The image `name` of the store.
pub fn find(store: &Store, name: &str) -> Result<oci::Image, CliError> {
    oci::resolve(store, name)?.ok_or_else(|| CliError::NoImage {
        name: name.to_owned(),
    })
}

fn inspect(store: &Store, args: &InspectImage) -> Result<ExitCode, CliError> {
    let image = find(store, &args.name)?;
    if args.json {
        print_json(&image)?;
        return Ok(ExitCode::SUCCESS);
    }
    let config = &image.config;
    let mut lines = vec![
        ("name", image.name.clone()),
        (
            "digest",
            image
                .digest
                .map_or_else(|| "none".into(), |d| d.to_string()),
        ),
        (
            "platform",
            image
                .platform
                .map_or_else(|| "unknown".into(), |p| p.to_string()),
        ),
        (
            "made from",
            match image.origin {
                oci::Origin::RootfsDir => "a directory",
                oci::Origin::RootfsTar => "an archive of a root filesystem",
                oci::Origin::OciLayout => "an OCI layout or the archive of an image",
                oci::Origin::Registry => "a registry",
            }
            .into(),
        ),
        ("since", human_time(image.imported_at as i64)),
        ("size", human_bytes(image.size)),
    ];
    lines.extend(config.env.iter().map(|one| ("env", one.clone())));
    for (name, value) in [
        ("user", &config.user),
        ("working dir", &config.working_dir),
        ("entrypoint", &config.entrypoint.join(" ")),
        ("command", &config.cmd.join(" ")),
    ] {
        if !value.is_empty() {
            lines.push((name, value.clone()));
        }
    }
    lines.extend(image.layers.iter().map(|id| ("layer", id.to_string())));
    let mut text = String::new();
    for (name, value) in lines {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{name:<12} {}", inert(&value));
    }
    print(&text)?;
    Ok(ExitCode::SUCCESS)
}

fn remove(store: &Store, args: &RemoveImage, ui: &Ui) -> Result<ExitCode, CliError> {
    let image = find(store, &args.name)?;
    oci::remove(store, &image.name)?;
    ui.ok(format_args!("{} removed", image.name));
    Ok(ExitCode::SUCCESS)
}
