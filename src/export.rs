//! `iii image export` and `iii worker export`.

use std::collections::{BTreeMap, HashMap};
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use iii_engine::export::{LeftOut, WorkerImage};
use iii_engine::home::Home;
use iii_engine::plan::Kind;
use iii_engine::worker::dev;
use iii_engine::worker::error::RunError;
use iii_engine::worker::supervise::Signals;
use iii_engine::worker::target::Target;
use iii_oci::export::{Destination, Event, Export, ExportedLayer, Part};
use iii_oci::reference::DEFAULT_TAG;
use iii_oci::{Digest, Platform, Reference};
use iii_store::Store;
use serde::Serialize;

use super::args::{ExportImage, ExportWorker, Where};
use super::worker::{Printer, caches, usual_sandbox};
use super::{CliError, image, limits, print_json, settings};
use crate::output::{ProgressHandle, Ui, Unit, human_bytes, human_counted, human_duration};

pub fn image(
    home: &Home,
    store: &Store,
    args: &ExportImage,
    ui: &Ui,
) -> Result<ExitCode, CliError> {
    let image = image::find(store, &args.name)?;
    let lease = store.lease(&format!("export of {}", image.name))?;
    lease.pin(&image.layers)?;
    let layers = image.layers.iter().map(|id| store.layer(id));
    let layers = layers.collect::<Result<Vec<_>, _>>()?;
    let what = format!("base {}", image.name);
    let parts = layers.iter().map(|layer| Part {
        layer,
        what: &what,
        omit: &[],
        remember: true,
    });
    let export = Export {
        store,
        lease: &lease,
        parts: parts.collect(),
        config: image.config,
        labels: HashMap::new(),
        platform: image.platform.unwrap_or(Platform::host()),
        created: created()?,
        compression: args.place.compression,
    };
    let kinds = vec!["base".to_owned(); image.layers.len()];
    put(home, export, &kinds, &args.place, &args.to, &image.name, ui)
}

pub fn worker(
    home: &Home,
    signals: &Signals,
    args: &ExportWorker,
    ui: &Ui,
) -> Result<ExitCode, CliError> {
    let worker = if args.worker.starts_with(['.', '/', '~']) {
        let target = Target {
            path: args.worker.clone().into(),
            rebuild: false,
            name: None,
            base: args.base.clone(),
            collect: settings::may_collect(),
            limits: limits::with(&[])?,
            caches: caches(Vec::new(), None)?,
            sandbox: usual_sandbox()?,
        };
        let printer = Printer::new(ui);
        dev::built(home, &target, signals, &|event| printer.show(&event))?
    } else {
        let name = args.worker.parse().map_err(RunError::from)?;
        dev::last_run(home, name, args.base.as_deref())?
    };
    let made = WorkerImage::of(&worker, &args.env);
    for left_out in &made.left_out {
        tell(left_out, ui);
    }
    for name in args
        .env
        .iter()
        .filter(|name| !worker.project.env.contains_key(*name))
    {
        ui.warn(format_args!(
            "--env {name}: the manifest has no such variable"
        ));
    }
    let omitted = made.omitted();
    let omitted: Vec<&[u8]> = omitted.iter().map(Vec::as_slice).collect();
    let base = format!("base {}", worker.image.name);
    let kinds: Vec<String> = worker
        .layers
        .iter()
        .map(|(kind, _)| kind.to_string())
        .collect();
    let parts = worker
        .layers
        .iter()
        .zip(&kinds)
        .map(|((kind, layer), text)| {
            let is_project = *kind == Kind::Project;
            Part {
                layer,
                what: if *kind == Kind::Base { &base } else { text },
                omit: if is_project { &omitted } else { &[] },
                remember: !is_project,
            }
        });
    let export = Export {
        store: &worker.store,
        lease: &worker.lease,
        parts: parts.collect(),
        config: made.config,
        labels: made.labels,
        platform: worker.image.platform.unwrap_or(Platform::host()),
        created: created()?,
        compression: args.place.compression,
    };
    let to = args.to.clone().unwrap_or_else(|| Destination::Layout {
        dir: worker.name.as_str().into(),
        tag: DEFAULT_TAG.to_owned(),
    });
    let name = image_name(worker.name.as_str());
    put(home, export, &kinds, &args.place, &to, &name, ui)
}

/// Name of a worker's image in an archive: `localhost/NAME:latest`, with `-` in place of characters
/// that an image name cannot have.
fn image_name(worker: &str) -> String {
    let named = |name: &str| format!("localhost/{name}:{DEFAULT_TAG}");
    let name = worker.to_ascii_lowercase();
    if named(&name).parse::<Reference>().is_ok() {
        return named(&name);
    }
    let words = name.split(|c: char| !c.is_ascii_alphanumeric());
    let words: Vec<&str> = words.filter(|word| !word.is_empty()).collect();
    named(&words.join("-"))
}

fn tell(left_out: &LeftOut, ui: &Ui) {
    match left_out {
        LeftOut::Variable(name) => ui.warn(format_args!(
            "{name} looks like a secret and is left out; set it where the image runs, or include it with --env {name}"
        )),
        LeftOut::File(name) => ui.warn(format_args!(
            "{name} is left out of the project's files: it holds secrets, or is for this machine"
        )),
    }
}

fn created() -> Result<Option<i64>, CliError> {
    let Some(text) = settings::source_date_epoch() else {
        return Ok(None);
    };
    let seconds = text.to_str().and_then(|text| text.parse::<u32>().ok());
    match seconds {
        Some(seconds) => Ok(Some(seconds.into())),
        None => Err(CliError::SourceDateEpoch {
            text: text.to_string_lossy().into_owned(),
        }),
    }
}

/// The output of `--json`.
#[derive(Serialize)]
struct Report<'a> {
    destination: String,
    digest: Digest,
    layers: Vec<LayerReport<'a>>,
}

#[derive(Serialize)]
struct LayerReport<'a> {
    kind: &'a str,
    #[serde(flatten)]
    layer: ExportedLayer,
}

/// Writes an image to its destination, and reports it.
fn put(
    home: &Home,
    export: Export<'_>,
    kinds: &[String],
    place: &Where,
    to: &Destination,
    own_name: &str,
    ui: &Ui,
) -> Result<ExitCode, CliError> {
    let start = Instant::now();
    let failed = |source| CliError::Export {
        to: to.to_string(),
        source,
    };
    let export = Export {
        compression: to.compression().unwrap_or(export.compression),
        ..export
    };
    let checked = export.check().map_err(failed)?;
    let sink = to.open(own_name, || home.registries()).map_err(failed)?;
    let bars = Bars {
        ui,
        layers: Mutex::default(),
    };
    let exported = checked.put(&*sink, to.tag(), &|event| bars.show(event));
    drop(bars);
    let exported = exported.map_err(failed)?;
    let written = exported.layers.iter().filter(|layer| !layer.existed);
    let bytes: u64 = written.clone().map(|layer| layer.size).sum();
    ui.ok(format_args!(
        "exported to {to} in {}: {}, {} written",
        human_duration(start.elapsed()),
        human_counted(exported.layers.len() as u64, "layer"),
        human_bytes(bytes),
    ));
    ui.note(exported.digest);
    if place.json {
        let layers = kinds.iter().zip(&exported.layers);
        print_json(&Report {
            destination: to.to_string(),
            digest: exported.digest,
            layers: layers
                .map(|(kind, layer)| LayerReport {
                    kind,
                    layer: *layer,
                })
                .collect(),
        })?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Draws a bar for each layer that is being written.
struct Bars<'a> {
    ui: &'a Ui,
    layers: Mutex<BTreeMap<usize, ProgressHandle>>,
}

impl Bars<'_> {
    fn show(&self, event: &Event) {
        let mut layers = self.layers.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Found { .. } => {}
            Event::Layer {
                index,
                count,
                bytes,
            } => {
                let title = format!("exporting layer {}/{count}", index + 1);
                let bar = self.ui.progress(title, Unit::Bytes);
                bar.set_length(*bytes);
                layers.insert(*index, bar);
            }
            Event::Written { index, bytes } => {
                if let Some(bar) = layers.get(index) {
                    bar.set(*bytes);
                }
            }
            Event::Stored { index } => drop(layers.remove(index)),
            Event::LeftOut { entry } => {
                self.ui
                    .warn(format_args!("{entry}: left out: it is a socket"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_called_like_its_worker() {
        for (worker, image) in [
            ("iii-dev-api", "localhost/iii-dev-api:latest"),
            ("My_Worker", "localhost/my_worker:latest"),
            ("a__b.c", "localhost/a__b.c:latest"),
            ("a_-b.", "localhost/a-b:latest"),
        ] {
            let name = image_name(worker);
            assert_eq!(name, image);
            assert!(name.parse::<Reference>().is_ok(), "{name}");
        }
    }
}
