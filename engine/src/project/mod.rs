//! A worker's project: its manifest, the detection by its files, and the commands of both.
//!
//! [`Project::open`] is the only entry point that a command needs. The module reads the manifest
//! and looks for files by name; it knows no environment, no terminal and no network, and runs
//! nothing.
//!
//! ```text
//! yaml       a file people write, as values with their lines
//! manifest   iii.worker.yaml
//! config     one worker's entry in config.yaml
//! detect     file names -> language, package manager, entry        (pure)
//! commands   language, package manager, entry -> scripts, image    (pure)
//! caches     language, package manager -> directories to mount     (pure)
//! ```

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

mod caches;
mod cargo;
mod commands;
pub mod config;
mod detect;
pub mod edit;
mod manifest;
mod name;
pub mod scaffold;
mod yaml;

pub use caches::{CacheVolume, Caches, FIRST_EPOCH, Holds};
use commands::Recipe;
pub use config::WorkerConfig;
pub use manifest::{
    HostLoopback, Language, MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, PackageManager,
    RESERVED_ENV, Resources, Runtime, Scripts,
};
pub use name::{MAX_NAME, NameError, NameProblem, WorkerName};
pub use yaml::{DocumentError, FieldProblem, MAX_DEPTH, MAX_EXPANDED, SyntaxProblem};

/// A project that can be built and started.
#[derive(Clone, Debug, PartialEq)]
pub struct Project {
    /// Its directory: absolute, without symlinks.
    pub root: PathBuf,
    /// The manifest's name, if there is a manifest.
    pub name: Option<WorkerName>,
    /// The manifest's description.
    pub description: Option<String>,
    /// Its language; `None` only if the manifest has `scripts` and nothing tells.
    pub language: Option<Language>,
    /// Its package manager, if it is a Node project.
    pub package_manager: Option<PackageManager>,
    /// Its entry, where that is known.
    pub entry: Option<String>,
    /// The image it is built on, as the manifest writes it or else the language's.
    pub base_image: String,
    /// Resources of its sandbox.
    pub resources: Resources,
    /// Ports of the host's loopback that the manifest asks for.
    pub host_loopback: HostLoopback,
    /// The manifest's commands, or else the inferred ones.
    pub scripts: Scripts,
    /// The manifest's variables for the worker (not for setup and install).
    pub env: BTreeMap<String, String>,
    /// The manifest's `dependencies`.
    pub dependencies: BTreeMap<String, String>,
    /// The manifest's `config`.
    pub config: Option<serde_json::Value>,
    /// Ignored values, for the user to read.
    pub warnings: Vec<String>,
}

/// A project that cannot be opened. Each message says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProjectError {
    /// Nothing is at the path.
    #[error("no such directory: {}", path.display())]
    NotFound {
        /// The path as given.
        path: PathBuf,
    },
    /// The path leads to something else.
    #[error("{} is not a directory; name the directory that holds the project", path.display())]
    NotADirectory {
        /// The path as given.
        path: PathBuf,
    },
    /// The directory cannot be read.
    #[error("cannot {operation} {}", path.display())]
    Io {
        /// The operation.
        operation: &'static str,
        /// The path.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The directory has no files at all.
    #[error("{} is empty; a project has {LOOKED_FOR}", path.display())]
    Empty {
        /// The path as given.
        path: PathBuf,
    },
    /// The directory has files, but none that tells what it is.
    #[error("{} is no project that is known; looked for {LOOKED_FOR}", path.display())]
    Unknown {
        /// The path as given.
        path: PathBuf,
    },
    /// The manifest leaves the language open, and so do the files.
    #[error(
        "{}: the project's language is unknown; give runtime.kind or scripts, or add package.json, Cargo.toml, \
         pyproject.toml or requirements.txt", path.display()
    )]
    UnknownLanguage {
        /// The manifest.
        path: PathBuf,
    },
    /// A Python project of which nothing says how to start it.
    #[error(
        "{}: nothing says what starts this Python project; add {} or one package with a __main__.py, or name the file or \
         module as runtime.entry in {MANIFEST_NAME}", path.display(), detect::PYTHON_MAINS.join(", ")
    )]
    NoEntry {
        /// The path as given.
        path: PathBuf,
    },
    /// The manifest is wrong.
    #[error(transparent)]
    Manifest(#[from] DocumentError),
}

const LOOKED_FOR: &str = "iii.worker.yaml, package.json (Node), Cargo.toml (Rust), pyproject.toml or requirements.txt (Python)";

/// A name that is easily mistaken for the manifest's.
const NOT_THE_MANIFEST: &str = "iii.worker.yml";

impl Project {
    /// Opens the project in the directory `path`.
    pub fn open(path: &Path) -> Result<Self, ProjectError> {
        let io_error = |operation| {
            move |source| ProjectError::Io {
                operation,
                path: path.to_owned(),
                source,
            }
        };
        match fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => {}
            Ok(_) => {
                return Err(ProjectError::NotADirectory {
                    path: path.to_owned(),
                });
            }
            Err(error) => {
                return Err(match error.kind() {
                    io::ErrorKind::NotFound => ProjectError::NotFound {
                        path: path.to_owned(),
                    },
                    io::ErrorKind::NotADirectory => ProjectError::NotADirectory {
                        path: path.to_owned(),
                    },
                    _ => io_error("open")(error),
                });
            }
        }
        let root = fs::canonicalize(path).map_err(io_error("resolve"))?;
        if fs::read_dir(path)
            .map_err(io_error("list"))?
            .next()
            .is_none()
        {
            return Err(ProjectError::Empty {
                path: path.to_owned(),
            });
        }
        let has = |name: &str| path.join(name).is_file();
        let manifest_path = path.join(MANIFEST_NAME);
        // Asked without following, so that a dangling symlink is an error and not a project without
        // a manifest.
        let manifest = match fs::symlink_metadata(&manifest_path) {
            Ok(_) => Some(Manifest::read(&manifest_path)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(io_error("look into")(error)),
        };
        let mut project = Self::infer(path, root, &has, manifest.as_ref())?;
        if let Some(manifest) = manifest {
            project.name = Some(manifest.name);
            project.description = manifest.description;
            project.resources = manifest.resources;
            project.host_loopback = manifest.host_loopback;
            project.env = manifest.env;
            project.dependencies = manifest.dependencies;
            project.config = manifest.config;
            project.warnings = manifest.warnings;
        }
        if has(NOT_THE_MANIFEST) {
            let other = path.join(NOT_THE_MANIFEST);
            let warning = format!(
                "{}: not read; the manifest is named {MANIFEST_NAME}",
                other.display()
            );
            project.warnings.push(warning);
        }
        Ok(project)
    }

    /// The project as far as its language, scripts and image go.
    fn infer(
        path: &Path,
        root: PathBuf,
        has: &dyn Fn(&str) -> bool,
        manifest: Option<&Manifest>,
    ) -> Result<Self, ProjectError> {
        let runtime = manifest.map_or_else(Runtime::default, |manifest| manifest.runtime.clone());
        let declared = manifest.and_then(|manifest| manifest.scripts.clone());
        let language = match (runtime.kind, runtime.package_manager) {
            (Some(kind), _) => Some(kind),
            (None, Some(_)) => Some(detect::node_language(has)),
            (None, None) => detect::language(has),
        };
        let package_manager = language.filter(|language| language.is_node()).map(|_| {
            runtime
                .package_manager
                .unwrap_or_else(|| detect::package_manager(has))
        });
        let mut entry = runtime.entry;
        let scripts = match (declared, language) {
            (Some(scripts), _) => scripts,
            (None, Some(language)) => {
                if language == Language::Python && entry.is_none() {
                    entry = detect::python_entry(has, &runnable_packages(path));
                }
                let binary = (language == Language::Rust)
                    .then(|| cargo::binary(path, entry.as_deref()))
                    .flatten();
                let recipe = Recipe {
                    language,
                    package_manager: package_manager.unwrap_or(PackageManager::Npm),
                    entry: entry.as_deref(),
                    python: detect::python_inputs(has),
                    binary: binary.as_ref(),
                };
                commands::infer(recipe).ok_or_else(|| ProjectError::NoEntry {
                    path: path.to_owned(),
                })?
            }
            (None, None) if manifest.is_some() => {
                return Err(ProjectError::UnknownLanguage {
                    path: path.join(MANIFEST_NAME),
                });
            }
            (None, None) => {
                return Err(ProjectError::Unknown {
                    path: path.to_owned(),
                });
            }
        };
        let base_image = runtime
            .base_image
            .unwrap_or_else(|| commands::base_image(language, package_manager).to_owned());
        Ok(Project {
            root,
            name: None,
            description: None,
            language,
            package_manager,
            entry,
            base_image,
            resources: Resources::default(),
            host_loopback: HostLoopback::default(),
            scripts,
            env: BTreeMap::new(),
            dependencies: BTreeMap::new(),
            config: None,
            warnings: Vec::new(),
        })
    }

    /// The name `worker dev` gives its sandbox: `iii-dev-<dir>`.
    pub fn dev_name(&self) -> WorkerName {
        WorkerName::for_directory(self.root.file_name().unwrap_or(OsStr::new("root")))
    }

    /// The name under which it is added, unless one is given: the manifest's, or else the
    /// directory's.
    pub fn managed_name(&self) -> WorkerName {
        let dir = self.root.file_name().unwrap_or(OsStr::new("root"));
        let own = self.name.clone().or_else(|| WorkerName::of_directory(dir));
        own.unwrap_or_else(|| self.dev_name())
    }

    /// The package managers' directories to mount over the sandbox; `cargo_home` is the base
    /// image's `CARGO_HOME`.
    pub fn caches(&self, cargo_home: Option<&str>) -> Caches {
        caches::caches(self.language, self.package_manager, cargo_home)
    }

    /// Variables that the project's tools need in a sandbox with [`caches`](Self::caches), for the
    /// steps and for the worker alike; the image's and the manifest's own values go before them.
    pub fn tool_env(&self) -> &'static [(&'static str, &'static str)] {
        caches::tool_env(self.language, self.package_manager)
    }
}

/// The packages of a Python project that `python -m` can run: directories with a `__main__.py` in
/// the root or in `src`. A directory that cannot be listed has none.
fn runnable_packages(root: &Path) -> Vec<String> {
    let dirs = [root.to_owned(), root.join("src")];
    let entries = dirs
        .iter()
        .filter_map(|dir| fs::read_dir(dir).ok())
        .flatten()
        .flatten();
    let mut packages: Vec<String> = entries
        .filter(|entry| entry.path().join("__main__.py").is_file())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'))
        .collect();
    packages.sort_unstable();
    packages
}

#[cfg(test)]
mod tests;
