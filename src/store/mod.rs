//! `iii store`.

mod catalog;
mod df;
mod gc;
mod layers;
#[cfg(target_os = "linux")]
mod serve;
mod uppers;
mod verify;

use std::process::ExitCode;

use iii_store::{LayerId, Store};

use super::CliError;
use super::args;
use crate::output::Ui;

/// Fewest hex digits that name a layer.
pub const MIN_PREFIX: usize = 4;

pub fn run(command: args::Store, ui: &Ui) -> Result<ExitCode, CliError> {
    let home = crate::settings::home()?;
    let dir = home.store();
    #[cfg_attr(
        not(target_os = "linux"),
        expect(unused_variables, reason = "only `store serve` looks at it")
    )]
    let threads = iii_engine::threads::start().map_err(CliError::Threads)?;
    let open = || Store::open(&dir);
    match command {
        args::Store::Df(args) => df::df(&home, &open()?, &args, ui),
        args::Store::List(args) => layers::list(&open()?, &args, ui),
        args::Store::Inspect(args) => layers::inspect(&open()?, &args, ui),
        args::Store::Diff(args) => layers::diff(&open()?, &args, ui),
        args::Store::Why(args) => layers::why(&open()?, &args, ui),
        args::Store::Gc(args) => gc::gc(&open()?, &args, ui),
        #[cfg(target_os = "linux")]
        args::Store::Serve(_) if threads == 0 => Err(CliError::NoThread),
        #[cfg(target_os = "linux")]
        args::Store::Serve(args) => serve::serve(&home, &open()?, &args, ui),
        // For stores that cannot be opened.
        args::Store::Verify(args) => verify::verify(&home, &args, ui),
        args::Store::Migrate(args) => verify::migrate(&dir, &args, ui),
    }
}

/// Whether this could be the beginning of an id.
fn is_prefix(text: &str) -> bool {
    (MIN_PREFIX..=2 * iii_store::id::ID_LEN).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The layer whose id begins with `text`.
fn resolve(store: &Store, text: &str) -> Result<LayerId, CliError> {
    choose(text, &store.layer_ids()?)
}

fn choose(text: &str, ids: &[LayerId]) -> Result<LayerId, CliError> {
    let prefix = text.to_ascii_lowercase();
    let text = text.to_owned();
    if !is_prefix(&prefix) {
        return Err(CliError::NotALayer { text });
    }
    let found = ids.iter().filter(|id| id.to_string().starts_with(&prefix));
    let found: Vec<LayerId> = found.copied().collect();
    match found[..] {
        [id] => Ok(id),
        [] => Err(CliError::NoLayer { text }),
        _ => Err(CliError::Ambiguous { text, found }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes() {
        let id = |start: &str| -> LayerId {
            let digits = format!("{start:0<64}");
            digits.parse().unwrap_or_else(|error| panic!("{error}"))
        };
        let ids = [id("abcd1"), id("abcd2"), id("beef")];
        let full = ids[0].to_string();
        for (text, expected) in [
            ("abcd1", "abcd1"),
            ("ABCD2", "abcd2"),
            ("beef", "beef"),
            (&full[..], "abcd1"),
        ] {
            let found = choose(text, &ids).map_err(|error| error.to_string());
            assert_eq!(found, Ok(id(expected)), "{text}");
        }
        let long = "a".repeat(65);
        for (text, expected) in [
            (
                "abcd",
                "the ids of 2 layers begin with abcd: abcd100000, abcd200000",
            ),
            ("beef1", "no layer has an id that begins with beef1"),
            (
                "bee",
                "\"bee\" names no layer: expected the first 4 or more hex digits of its id",
            ),
            ("", "\"\" names no layer"),
            ("beeg", "\"beeg\" names no layer"),
            (&long, "names no layer"),
        ] {
            match choose(text, &ids) {
                Ok(id) => panic!("{text} is {id}"),
                Err(error) => assert!(error.to_string().contains(expected), "{error}"),
            }
        }
    }
}
