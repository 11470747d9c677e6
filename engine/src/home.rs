//! Paths on this machine: `~/.iii` and its contents.
//!
//! ```text
//! store/v1/         the store
//! dev/<name>/       a sandbox of `worker dev`: lock, project, upper/, upper.new/ while it is
//!                   replaced, exec.sock while it runs, console.log of its microVM
//! managed/<name>/   a managed worker: the same, start.json, and vm.pid while it runs
//! logs/<name>/      what a managed worker prints
//! cache/            downloads of package managers, of older versions; unused now
//! last/<project>    which records the steps of a project used last
//! build/            temporary uppers: of running build steps, and of `store serve`
//! ```

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use iii_oci::{RegistryError, Settings};
use iii_sandbox::HostSettings;

/// The state directory, `~/.iii`, and the environment variables that the program was started with.
/// Nothing is created by naming a path.
#[derive(Debug, Clone)]
pub struct Home {
    root: PathBuf,
    variables: Arc<BTreeMap<OsString, OsString>>,
}

impl Home {
    /// The state directory below the home directory of a user, whose environment this is.
    pub fn of_user(home: &Path, variables: impl IntoIterator<Item = (OsString, OsString)>) -> Self {
        let mut variables = BTreeMap::from_iter(variables);
        variables.insert("HOME".into(), home.into());
        Self {
            root: home.join(".iii"),
            variables: Arc::new(variables),
        }
    }

    /// A state directory at `root`, with no variables.
    pub fn at(root: PathBuf) -> Self {
        Self {
            root,
            variables: Arc::default(),
        }
    }

    /// An environment variable.
    pub fn variable(&self, name: &str) -> Option<&OsStr> {
        self.variables
            .get(OsStr::new(name))
            .map(OsString::as_os_str)
    }

    /// How registries are reached.
    pub fn registries(&self) -> Result<Settings, RegistryError> {
        Settings::from_variables(&|name| self.variable(name).map(OsStr::to_owned))
    }

    /// Settings of this machine for sandboxes, as they are now.
    pub fn host_settings(&self) -> HostSettings {
        HostSettings::detect(|name| self.variable(name).map(OsStr::to_owned))
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The store.
    pub fn store(&self) -> PathBuf {
        self.root.join("store/v1")
    }

    /// All sandboxes of `worker dev`.
    pub fn all_dev(&self) -> PathBuf {
        self.root.join("dev")
    }

    /// The sandbox of `worker dev` called `name`.
    pub fn dev(&self, name: &str) -> PathBuf {
        self.all_dev().join(name)
    }

    /// All managed workers.
    pub fn all_managed(&self) -> PathBuf {
        self.root.join("managed")
    }

    /// The managed worker called `name`.
    pub fn managed(&self, name: &str) -> PathBuf {
        self.all_managed().join(name)
    }

    /// Output of the managed worker called `name`.
    pub fn logs(&self, name: &str) -> PathBuf {
        self.root.join("logs").join(name)
    }

    /// The caches of package managers that older versions kept beside the store. Nothing reads them
    /// any more.
    pub fn old_caches(&self) -> PathBuf {
        self.root.join("cache")
    }

    /// Libraries that were fetched.
    pub fn lib(&self) -> PathBuf {
        self.root.join("lib")
    }

    /// The verdict about `/dev/kvm` since this machine's boot.
    pub fn kvm(&self) -> PathBuf {
        self.root.join("kvm.json")
    }

    /// Records that the steps of the project with this id used last.
    pub fn last_build(&self, project_id: &str) -> PathBuf {
        self.root.join("last").join(project_id)
    }

    /// Uppers that are thrown away when the build step, or whatever else made them, ends.
    pub fn build(&self) -> PathBuf {
        self.root.join("build")
    }
}
