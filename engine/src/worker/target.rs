//! The project whose layers are wanted, and how.

use std::path::PathBuf;

use iii_oci::Limits;

use crate::shared_cache::CacheOptions;
use crate::worker::isolation::SandboxOptions;

/// A project to realise.
#[derive(Debug, Clone)]
pub struct Target {
    /// The project's directory.
    pub path: PathBuf,
    /// Runs setup and install again and forgets what the sandbox wrote.
    pub rebuild: bool,
    /// The sandbox's name, unless it follows from the directory.
    pub name: Option<String>,
    /// The base image, unless it follows from the project.
    pub base: Option<String>,
    /// Lets the store be cleared after a build that leaves it or the disk too full.
    pub collect: bool,
    /// How much of anything what is pulled or fetched may bring.
    pub limits: Limits,
    /// Where layers are fetched from, and where they are put for others.
    pub caches: CacheOptions,
    /// Its sandbox.
    pub sandbox: SandboxOptions,
}
