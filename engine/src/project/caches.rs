//! Where package managers keep their downloads and builds.
//!
//! While a step runs, each of these directories is a cache volume: layers that all steps share and
//! none can change in place. So a step that runs again downloads nothing twice, and no layer holds
//! a download. A cache may vanish at any time, and a running worker sees none: nothing that a
//! worker needs may live in one. That is why yarn's later versions have none here: with
//! Plug'n'Play, their cache *is* the installation.

use super::manifest::{Language, PackageManager};

/// The contents of a cache, which say who may share it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holds {
    /// Downloads, which are the same on every base.
    Downloads,
    /// Builds, such as a wheel made from an sdist: shared by the steps on equal layers.
    Builds,
}

/// A directory of a package manager's cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheVolume {
    /// Its name, fit for the name of a ref; the same id is the same cache.
    pub id: &'static str,
    /// Its absolute path in the sandbox.
    pub target: String,
    /// Its contents.
    pub holds: Holds,
}

/// The directories and files of a project's tools that are not simply their results.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Caches {
    /// Caches that steps share.
    pub volumes: Vec<CacheVolume>,
    /// Absolute paths of what tools make for themselves and can make again: no layer holds it.
    pub scratch: Vec<String>,
    /// Absolute paths of directories in which the project's tools build: an install begins with
    /// what the project's last install left there, and all of it is in the install layer.
    pub seeds: Vec<String>,
}

impl Caches {
    fn volume(&mut self, id: &'static str, target: &str, holds: Holds) {
        self.volumes.push(CacheVolume {
            id,
            target: target.to_owned(),
            holds,
        });
    }

    fn scratch(&mut self, paths: &[&str]) {
        self.scratch.extend(paths.iter().map(|&path| path.into()));
    }
}

/// The caches of a project.
///
/// `cargo_home` is the base image's own `CARGO_HOME` (rust images set `/usr/local/cargo`). Without
/// it, cargo uses `.cargo` in root's home. Following the image keeps its cargo
/// configuration and installed tools in force, which setting the variable would not.
pub fn caches(
    language: Option<Language>,
    package_manager: Option<PackageManager>,
    cargo_home: Option<&str>,
) -> Caches {
    use Holds::{Builds, Downloads};
    let mut caches = Caches::default();
    caches.volume("apt-archives", "/var/cache/apt/archives", Downloads);
    caches.volume("apt-lists", "/var/lib/apt/lists", Downloads);
    // Derived from the lists; 94 MB after `apt-get install jq`.
    caches.scratch(&[
        "/var/cache/apt/pkgcache.bin",
        "/var/cache/apt/srcpkgcache.bin",
    ]);
    match language {
        None | Some(Language::TypeScript | Language::JavaScript) => {
            // npx and `npm install -g` use npm's cache whatever installs the project. `_npx` beside
            // it is an installation.
            caches.volume("npm", "/root/.npm/_cacache", Downloads);
            caches.scratch(&[
                "/root/.npm/_logs",
                "/root/.npm/_update-notifier-last-checked",
            ]);
            match package_manager {
                // yarn 1 as root.
                Some(PackageManager::Yarn) => {
                    caches.volume("yarn", "/usr/local/share/.cache/yarn", Downloads);
                }
                Some(PackageManager::Pnpm) => {
                    caches.volume("pnpm", PNPM_STORE, Downloads);
                    caches.volume("pnpm-metadata", "/root/.cache/pnpm", Downloads);
                    caches.scratch(&["/root/.local/state/pnpm"]);
                }
                Some(PackageManager::Bun) => {
                    caches.volume("bun", "/root/.bun/install/cache", Downloads);
                }
                Some(PackageManager::Npm) | None => {}
            }
        }
        Some(Language::Python) => {
            // Before and since pip 23.3.
            caches.volume("pip-http", "/root/.cache/pip/http", Downloads);
            caches.volume("pip-http-v2", "/root/.cache/pip/http-v2", Downloads);
            caches.volume("pip-wheels", "/root/.cache/pip/wheels", Builds);
            caches.scratch(&["/root/.cache/pip/selfcheck"]);
            // Wheels from the network and those built here are told apart by names that change with
            // uv's version.
            caches.volume("uv", "/root/.cache/uv", Builds);
        }
        Some(Language::Rust) => {
            let home = cargo_home
                .filter(|home| home.starts_with('/') && home.len() > 1)
                .map_or("/root/.cargo", |home| home.trim_end_matches('/'));
            let at = |name: &str| format!("{home}/{name}");
            caches.volume("cargo-index", &at("registry/index"), Downloads);
            caches.volume("cargo-crates", &at("registry/cache"), Downloads);
            caches.volume("cargo-git", &at("git/db"), Downloads);
            // Locks, and a database of when each crate was used last.
            let own = [".global-cache", ".package-cache", ".package-cache-mutate"];
            caches.scratch.extend(own.map(at));
            // No step writes to unpacked sources, but they tell their own mtimes, as objects built
            // from them do.
            caches.seeds = vec![
                "/workspace/target".to_owned(),
                at("registry/src"),
                at("git/checkouts"),
            ];
        }
    }
    caches
}

const PNPM_STORE: &str = "/root/.local/share/pnpm/store";

/// 1980-01-01 in seconds, the first day that an archive of Python's can name.
pub const FIRST_EPOCH: &str = "315532800";

/// Variables that make a project's tools work with [`caches`] and in a sandbox, for the steps and
/// for the worker alike. They are defaults: the image's and the manifest's own values go before
/// them.
pub fn tool_env(
    language: Option<Language>,
    package_manager: Option<PackageManager>,
) -> &'static [(&'static str, &'static str)] {
    match (language, package_manager) {
        // Output goes to a pipe, where Python would hold it back; uv would warn that it cannot
        // hardlink from its cache. With an epoch, compiled modules name their sources by hash and
        // not by mtime: installed again, they are the same.
        (Some(Language::Python), _) => &[
            ("PYTHONUNBUFFERED", "1"),
            ("UV_LINK_MODE", "copy"),
            ("SOURCE_DATE_EPOCH", FIRST_EPOCH),
        ],
        // Left alone, pnpm puts its store on the file system of the project, which here is a layer,
        // and keeps what install scripts made there, for every base. The second names are those
        // that pnpm 11 reads.
        (None | Some(Language::TypeScript | Language::JavaScript), Some(PackageManager::Pnpm)) => {
            &[
                ("npm_config_store_dir", PNPM_STORE),
                ("pnpm_config_store_dir", PNPM_STORE),
                ("npm_config_side_effects_cache", "false"),
                ("pnpm_config_side_effects_cache", "false"),
            ]
        }
        // No user is there to answer npx, nor to read of newer versions of npm.
        (None | Some(Language::TypeScript | Language::JavaScript), _) => &[
            ("npm_config_yes", "true"),
            ("npm_config_update_notifier", "false"),
        ],
        (Some(Language::Rust), _) => &[],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_toolchain_gets_its_caches() {
        use Language::{JavaScript, Python, Rust, TypeScript};
        use PackageManager::{Bun, Npm, Pnpm, Yarn};
        for (language, manager, expected) in [
            (None, None, "npm"),
            (Some(TypeScript), Some(Npm), "npm"),
            (Some(JavaScript), Some(Yarn), "npm yarn"),
            (Some(TypeScript), Some(Pnpm), "npm pnpm pnpm-metadata"),
            (Some(TypeScript), Some(Bun), "npm bun"),
            (Some(Python), None, "pip-http pip-http-v2 pip-wheels uv"),
            (Some(Rust), None, "cargo-index cargo-crates cargo-git"),
        ] {
            let caches = caches(language, manager, None);
            let ids: Vec<_> = caches.volumes.iter().map(|volume| volume.id).collect();
            let apt = ["apt-archives", "apt-lists"];
            assert_eq!(ids[..2], apt);
            assert_eq!(ids[2..].join(" "), expected);
        }
    }

    #[test]
    fn cargo_follows_the_image() {
        for (home, expected) in [
            (None, "/root/.cargo"),
            (Some("/usr/local/cargo"), "/usr/local/cargo"),
            (Some("/usr/local/cargo/"), "/usr/local/cargo"),
            (Some("relative"), "/root/.cargo"),
            (Some(""), "/root/.cargo"),
            (Some("/"), "/root/.cargo"),
        ] {
            let caches = caches(Some(Language::Rust), None, home);
            let index = caches.volumes.iter().find(|one| one.id == "cargo-index");
            assert_eq!(index.unwrap().target, format!("{expected}/registry/index"));
            assert_eq!(caches.seeds[1], format!("{expected}/registry/src"));
        }
    }

    /// The overlay wants them apart.
    #[test]
    fn no_path_lies_in_another() {
        for language in [None, Some(Language::Python), Some(Language::Rust)] {
            for manager in [
                PackageManager::Npm,
                PackageManager::Pnpm,
                PackageManager::Bun,
            ] {
                let caches = caches(language, Some(manager), None);
                let targets = caches.volumes.iter().map(|volume| &volume.target);
                let all: Vec<&String> = targets
                    .chain(&caches.scratch)
                    .chain(&caches.seeds)
                    .collect();
                for (at, one) in all.iter().enumerate() {
                    assert!(one.starts_with('/') && !one.ends_with('/'));
                    for (other_at, other) in all.iter().enumerate() {
                        let inside = format!("{other}/");
                        assert!(at == other_at || (*one != *other && !one.starts_with(&inside)));
                    }
                }
            }
        }
    }
}
