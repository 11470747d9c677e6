//! `iii store serve`.

use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use iii_engine::home::Home;
use iii_engine::serve::{Options, Served, serve as serve_layers};
use iii_oci as oci;
use iii_overlay::adapter::vhost_user::End;
use iii_store::Store;
use serde_json::{Map, Value, json};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::resolve;
use crate::args::Serve;
use crate::output::{Ui, human_count, human_counted};
use crate::{CliError, print_json};

pub fn serve(home: &Home, store: &Store, args: &Serve, ui: &Ui) -> Result<ExitCode, CliError> {
    let mut layers = Vec::new();
    if let Some(name) = &args.image {
        let image =
            oci::resolve(store, name)?.ok_or_else(|| CliError::NoImage { name: name.clone() })?;
        layers.extend(image.layers);
    }
    for text in &args.layers {
        layers.push(resolve(store, text)?);
    }
    let count = layers.len() as u64;
    let options = Options {
        layers,
        upper: args.upper.clone(),
        socket: args.socket.clone(),
        tag: args.tag.clone(),
        threads: args.threads.into(),
    };
    let stop = on_signals().map_err(CliError::Signals)?;
    let listening = || {
        ui.ok(format_args!(
            "{} on {}",
            human_counted(count, "layer"),
            args.socket.display()
        ));
    };
    let served = serve_layers(home, store, &options, stop.as_fd(), &listening)?;
    if args.json {
        print_json(&json!({
            "end": match served.end {
                End::Disconnected => "disconnected",
                End::Stopped => "stopped",
            },
            "requests": requests(&served),
        }))?;
    } else {
        let sum: u64 = served.requests.iter().map(|(_, count)| count).sum();
        ui.note(format_args!(
            "{} after {} requests",
            match served.end {
                End::Disconnected => "the virtual machine disconnected",
                End::Stopped => "stopped",
            },
            human_count(sum)
        ));
    }
    Ok(ExitCode::SUCCESS)
}

fn requests(served: &Served) -> Map<String, Value> {
    let requests = served.requests.iter();
    requests
        .map(|(name, count)| ((*name).to_owned(), json!(count)))
        .collect()
}

/// Becomes readable once this process is asked to end.
fn on_signals() -> std::io::Result<UnixStream> {
    let (stop, signalled) = UnixStream::pair()?;
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::low_level::pipe::register(signal, signalled.try_clone()?)?;
    }
    Ok(stop)
}
