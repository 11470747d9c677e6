//! Where package managers keep what they have downloaded or compiled.
//!
//! These directories are mounted over the sandbox from outside its layers, so that a step that runs again downloads
//! nothing twice and no layer holds a download. A cache may vanish at any time: nothing that a worker needs at run time
//! may live in one. That is why yarn's later versions have none here: with Plug'n'Play, their cache *is* the installation.

use super::manifest::{Language, PackageManager};

/// Who sees a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CacheScope {
    /// Every sandbox of this user.
    Shared,
    /// The sandboxes of one project.
    PerProject,
}

/// A directory mounted over the sandbox while a step or the worker runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CacheMount {
    /// Its name, fit for a file name; the same id is the same directory.
    pub id: &'static str,
    /// Its absolute path in the sandbox.
    pub target: String,
    /// Who shares it.
    pub scope: CacheScope,
    /// Whether one step at a time may use it, because the tool itself does not guard against another instance of itself
    /// in another sandbox. A running worker does not take the lock, or a build would wait for days.
    pub lock: bool,
}

/// The caches of a project.
///
/// `cargo_home` is the base image's own `CARGO_HOME` (rust images set `/usr/local/cargo`). Where there is none, cargo uses
/// `.cargo` in root's home. Following the image keeps its cargo configuration and installed tools in force, which setting
/// the variable would not.
pub fn caches(
    language: Option<Language>,
    package_manager: Option<PackageManager>,
    cargo_home: Option<&str>,
) -> Vec<CacheMount> {
    use CacheScope::{PerProject, Shared};
    let mount = |id, target: &str, scope, lock| CacheMount {
        id,
        target: target.to_owned(),
        scope,
        lock,
    };
    // apt locks these directories with fcntl locks, and fails where it should wait.
    let mut mounts = vec![
        mount("apt-archives", "/var/cache/apt/archives", Shared, true),
        mount("apt-lists", "/var/lib/apt/lists", Shared, true),
    ];
    match language {
        None | Some(Language::TypeScript | Language::JavaScript) => {
            // npx and `npm install -g` use npm's cache whatever installs the project.
            mounts.push(mount("npm", "/root/.npm", Shared, false));
            match package_manager {
                // yarn 1 as root; two instances corrupt each other's unpacking.
                Some(PackageManager::Yarn) => {
                    mounts.push(mount("yarn", "/usr/local/share/.cache/yarn", Shared, true));
                }
                Some(PackageManager::Pnpm) => mounts.push(mount("pnpm", PNPM_STORE, Shared, false)),
                Some(PackageManager::Bun) => {
                    mounts.push(mount("bun", "/root/.bun/install/cache", Shared, false));
                }
                Some(PackageManager::Npm) | None => {}
            }
        }
        Some(Language::Python) => {
            mounts.push(mount("pip", "/root/.cache/pip", Shared, false));
            mounts.push(mount("uv", "/root/.cache/uv", Shared, false));
        }
        Some(Language::Rust) => {
            let home = cargo_home
                .filter(|home| home.starts_with('/'))
                .map_or("/root/.cargo", |home| home.trim_end_matches('/'));
            let registry = format!("{home}/registry");
            mounts.push(mount("cargo-registry", &registry, Shared, false));
            mounts.push(mount("cargo-git", &format!("{home}/git"), Shared, false));
            mounts.push(mount("cargo-target", "/workspace/target", PerProject, true));
        }
    }
    mounts
}

const PNPM_STORE: &str = "/root/.local/share/pnpm/store";

/// Variables that make a project's tools work with [`caches`] and in a sandbox, for the steps and for the worker alike.
/// They are defaults: the image's and the manifest's own values go before them.
pub fn tool_env(
    language: Option<Language>,
    package_manager: Option<PackageManager>,
) -> &'static [(&'static str, &'static str)] {
    match (language, package_manager) {
        // Output goes to a pipe, where Python would hold it back; uv would warn that it cannot hardlink from its cache.
        (Some(Language::Python), _) => &[("PYTHONUNBUFFERED", "1"), ("UV_LINK_MODE", "copy")],
        // Left alone, pnpm puts its store on the file system of the project, which here is a layer. The second name is
        // the one that pnpm 11 reads.
        (None | Some(Language::TypeScript | Language::JavaScript), Some(PackageManager::Pnpm)) => {
            &[
                ("npm_config_store_dir", PNPM_STORE),
                ("pnpm_config_store_dir", PNPM_STORE),
            ]
        }
        // Nobody is there to answer npx, nor to read of newer versions of npm.
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

    fn ids(language: Option<Language>, manager: Option<PackageManager>) -> String {
        let mounts = caches(language, manager, None);
        let ids: Vec<_> = mounts.iter().map(|mount| mount.id).collect();
        ids.join(" ")
    }

    #[test]
    fn each_toolchain_gets_its_caches() {
        use Language::{JavaScript, Python, Rust, TypeScript};
        use PackageManager::{Bun, Npm, Pnpm, Yarn};
        for (language, manager, expected) in [
            (None, None, "apt-archives apt-lists npm"),
            (Some(TypeScript), Some(Npm), "apt-archives apt-lists npm"),
            (
                Some(JavaScript),
                Some(Yarn),
                "apt-archives apt-lists npm yarn",
            ),
            (
                Some(TypeScript),
                Some(Pnpm),
                "apt-archives apt-lists npm pnpm",
            ),
            (
                Some(TypeScript),
                Some(Bun),
                "apt-archives apt-lists npm bun",
            ),
            (Some(Python), None, "apt-archives apt-lists pip uv"),
            (
                Some(Rust),
                None,
                "apt-archives apt-lists cargo-registry cargo-git cargo-target",
            ),
        ] {
            assert_eq!(ids(language, manager), expected);
        }
    }

    #[test]
    fn cargo_follows_the_image() {
        for (home, expected) in [
            (None, "/root/.cargo/registry"),
            (Some("/usr/local/cargo"), "/usr/local/cargo/registry"),
            (Some("/usr/local/cargo/"), "/usr/local/cargo/registry"),
            (Some("relative"), "/root/.cargo/registry"),
            (Some(""), "/root/.cargo/registry"),
        ] {
            let mounts = caches(Some(Language::Rust), None, home);
            let registry = mounts.iter().find(|mount| mount.id == "cargo-registry");
            assert_eq!(registry.unwrap().target, expected);
        }
    }

    #[test]
    fn only_a_projects_own_build_is_not_shared() {
        for language in [None, Some(Language::Python), Some(Language::Rust)] {
            for mount in caches(language, Some(PackageManager::Pnpm), None) {
                assert_eq!(
                    mount.scope == CacheScope::PerProject,
                    mount.id == "cargo-target"
                );
                assert!(mount.target.starts_with('/'));
            }
        }
    }
}
