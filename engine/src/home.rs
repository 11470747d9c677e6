//! Where things are on this machine: `~/.iii` and what is in it.
//!
//! ```text
//! store/v1/         the store
//! dev/<name>/       a sandbox of `worker dev`: lock, project, upper/, upper.new/ while it is replaced, exec.sock while it runs,
//!                   console.log of its microVM
//! managed/<name>/   a managed worker: the same, start.json, and vm.pid while it runs
//! logs/<name>/      what a managed worker prints
//! cache/            of older versions, which nothing reads any more: what package managers had downloaded
//! build/            uppers that are thrown away: of build steps under way, of what `store serve` serves
//! ```

use std::path::{Path, PathBuf};

/// Why there is no state directory.
#[derive(Debug, thiserror::Error)]
pub enum HomeError {
    /// Neither a `HOME` nor an entry in the password file.
    #[error("there is no home directory: HOME is not set")]
    NoHome,
}

/// The state directory, `~/.iii`. Nothing is created by naming a path.
#[derive(Debug, Clone)]
pub struct Home {
    root: PathBuf,
}

impl Home {
    /// The state directory of the user who runs this process.
    pub fn of_user() -> Result<Self, HomeError> {
        let home = std::env::home_dir().filter(|home| home.is_absolute());
        home.map(|home| Self::at(home.join(".iii")))
            .ok_or(HomeError::NoHome)
    }

    /// A state directory at `root`.
    pub fn at(root: PathBuf) -> Self {
        Self { root }
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The store.
    pub fn store(&self) -> PathBuf {
        self.root.join("store/v1")
    }

    /// The sandbox of `worker dev` called `name`.
    pub fn dev(&self, name: &str) -> PathBuf {
        self.root.join("dev").join(name)
    }

    /// All managed workers.
    pub fn all_managed(&self) -> PathBuf {
        self.root.join("managed")
    }

    /// The managed worker called `name`.
    pub fn managed(&self, name: &str) -> PathBuf {
        self.all_managed().join(name)
    }

    /// What the managed worker called `name` prints.
    pub fn logs(&self, name: &str) -> PathBuf {
        self.root.join("logs").join(name)
    }

    /// The caches of package managers that older versions kept beside the store. Nothing reads them any more.
    pub fn old_caches(&self) -> PathBuf {
        self.root.join("cache")
    }

    /// Libraries that were fetched.
    pub fn lib(&self) -> PathBuf {
        self.root.join("lib")
    }

    /// What is known of `/dev/kvm` since this machine's boot.
    pub fn kvm(&self) -> PathBuf {
        self.root.join("kvm.json")
    }

    /// Uppers that are thrown away when the build step, or whatever else made them, ends.
    pub fn build(&self) -> PathBuf {
        self.root.join("build")
    }
}
