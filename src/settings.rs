//! Everything that the environment says. Each variable is read here and nowhere else; what the
//! engine needs of them goes along with the [`Home`].

use std::env;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use iii_engine::home::Home;
use iii_engine::managed::ManagedError;
use iii_engine::managed::supervisor::EngineProcess;
use iii_engine::worker::engine::Engine;

/// Where the engine's config.yaml is, relative to the working directory, unless an option or a
/// variable names it.
pub const CONFIG: &str = "config.yaml";
/// Host and port of the engine, unless an option or a variable names them.
pub const ENGINE: (&str, u16) = ("localhost", 49134);

const CONFIG_PATH: &str = "III_CONFIG_PATH";
const ENGINE_PID: &str = "III_ENGINE_PID";
const ENGINE_URLS: [&str; 2] = ["III_URL", "III_ENGINE_URL"];
const GC: &str = "III_GC";
const LIFELINE: &str = "III_LIFELINE_FD";
const RUNTIME: &str = "III_RUNTIME";
/// Limits for everything that pulls or imports.
pub const LIMITS: &str = "III_LIMITS";
/// Caches that layers are fetched from, and the one that takes them.
pub const CACHES: [&str; 2] = ["III_CACHE_FROM", "III_CACHE_TO"];
/// The time of images that are made now:
/// <https://reproducible-builds.org/specs/source-date-epoch/>.
const SOURCE_DATE_EPOCH: &str = "SOURCE_DATE_EPOCH";

/// The user has no home directory.
#[derive(Debug, thiserror::Error)]
#[error("no home directory: HOME is not set")]
pub struct NoHome;

/// The state directory of the user who runs this process.
pub fn home() -> Result<Home, NoHome> {
    let home = env::home_dir().filter(|home| home.is_absolute());
    let home = home.ok_or(NoHome)?;
    Ok(Home::of_user(&home, env::vars_os()))
}

/// The engine's config.yaml, if a variable names it.
pub fn config_path() -> Option<PathBuf> {
    env::var_os(CONFIG_PATH).map(PathBuf::from)
}

/// Whether a variable is to name the engine.
pub fn names_engine() -> bool {
    ENGINE_URLS
        .into_iter()
        .any(|name| env::var_os(name).is_some())
}

/// The address of the engine that a variable names, or else the default.
pub fn engine() -> Engine {
    let mut named = ENGINE_URLS.into_iter().filter_map(text);
    named
        .find_map(|url| Engine::of_url(&url))
        .unwrap_or(Engine {
            host: ENGINE.0.to_owned(),
            port: ENGINE.1,
        })
}

/// The process of the engine that started this one, if it did.
pub fn engine_process() -> Result<Option<EngineProcess>, ManagedError> {
    let pid = env::var_os(ENGINE_PID);
    pid.map(|pid| EngineProcess::named(&pid)).transpose()
}

/// Whether the store may be cleared without being asked to.
pub fn may_collect() -> bool {
    env::var_os(GC).is_none_or(|gc| gc != "off")
}

/// The runtime of sandboxes where no option names one; empty for the default.
pub fn runtime() -> String {
    text(RUNTIME).unwrap_or_default()
}

/// The descriptor that the manager daemon watches.
pub fn lifeline() -> Option<OsString> {
    env::var_os(LIFELINE)
}

/// The value of a variable that lists things; empty where it is not set.
pub fn list(name: &str) -> String {
    text(name).unwrap_or_default()
}

/// [`SOURCE_DATE_EPOCH`], if it is set.
pub fn source_date_epoch() -> Option<OsString> {
    env::var_os(SOURCE_DATE_EPOCH)
}

/// Whether standard error, if it is a terminal, can show bars and colour.
pub fn terminal_is_capable() -> bool {
    is_capable(env::var_os("TERM").as_deref())
}

/// Whether the user wants colour.
pub fn wants_colour() -> bool {
    is_wanted(env::var_os("NO_COLOR").as_deref())
}

fn is_capable(term: Option<&OsStr>) -> bool {
    term != Some(OsStr::new("dumb"))
}

/// See <https://no-color.org>: set to anything but nothing, it means no.
fn is_wanted(no_color: Option<&OsStr>) -> bool {
    no_color.is_none_or(OsStr::is_empty)
}

fn text(name: &str) -> Option<String> {
    env::var(name).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colour_is_for_terminals_whose_users_want_it() {
        for (term, no_color, capable, wanted) in [
            (None, None, true, true),
            (Some("xterm"), Some(""), true, true),
            (Some("dumb"), Some("1"), false, false),
            (Some(""), Some("0"), true, false),
        ] {
            assert_eq!(is_capable(term.map(OsStr::new)), capable, "{term:?}");
            assert_eq!(is_wanted(no_color.map(OsStr::new)), wanted, "{no_color:?}");
        }
    }
}
