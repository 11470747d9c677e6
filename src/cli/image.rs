//! `iii image`.

use std::process::ExitCode;

use iii_store::Store;

use super::args::{Image, Import, List};
use super::{CliError, print_json};
use crate::home::Home;
use crate::oci::{self, Event};
use crate::ui::{Ui, Unit, human_bytes, human_counted, human_duration};

pub fn run(command: Image, ui: &Ui) -> Result<ExitCode, CliError> {
    let store = Store::open(Home::of_user()?.store())?;
    match command {
        Image::Import(args) => import(&store, &args, ui),
        Image::List(args) => list(&store, &args),
    }
}

fn import(store: &Store, args: &Import, ui: &Ui) -> Result<ExitCode, CliError> {
    let progress = ui.progress("importing", Unit::Bytes);
    let imported = oci::import(store, &args.path, &args.name, &|event| match event {
        Event::Layer { bytes, .. } => {
            progress.set(0);
            progress.set_length(bytes);
        }
        Event::Read { bytes } => progress.set(bytes),
        Event::Waiting => ui.note("another process is importing the same layer; waiting"),
        Event::LeftOut { path, why } => {
            ui.warn(format_args!("{}: left out: {why}", path.display()));
        }
    })?;
    progress.finish();
    ui.ok(format_args!(
        "{} imported in {}: {}, {} new",
        imported.image.name,
        human_duration(imported.elapsed),
        human_counted(imported.image.layers.len() as u64, "layer"),
        human_bytes(imported.new_bytes),
    ));
    Ok(ExitCode::SUCCESS)
}

fn list(store: &Store, args: &List) -> Result<ExitCode, CliError> {
    let images = oci::list(store)?;
    if args.json {
        print_json(&serde_json::json!({ "images": images }))?;
    } else {
        println!("{:<48} {:>6} {:>10}", "NAME", "LAYERS", "SIZE");
        for image in &images {
            println!(
                "{:<48} {:>6} {:>10}",
                image.name,
                image.layers.len(),
                human_bytes(image.size)
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}
