//! Whether the sandboxes of a worker are microVMs or namespaces: decided here, before anything is
//! built, and passed on as an [`Isolation`].

#[cfg(feature = "libkrun")]
use std::thread;

#[cfg(feature = "libkrun")]
use iii_oci::ImageError;
#[cfg(feature = "libkrun")]
use iii_sandbox::reach::Reach;
use iii_sandbox::{HAS_NAMESPACES, kvm};

use crate::build::Event;
#[cfg(feature = "libkrun")]
use crate::compose::Hardware;
use crate::compose::Isolation;
#[cfg(feature = "libkrun")]
use crate::firmware::{Package, Places};
use crate::home::Home;
#[cfg(feature = "libkrun")]
use crate::project::MANIFEST_NAME;
use crate::project::{HostLoopback, Project};
use crate::worker::error::RunError;

/// What somebody said of sandboxes.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SandboxOptions {
    /// What they are.
    pub runtime: Runtime,
    /// What of the host's loopback a microVM may reach, besides what the manifest says and the
    /// engine.
    pub host_loopback: HostLoopback,
}

/// What a worker and its steps run in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Runtime {
    /// A microVM where one can run, else namespaces.
    #[default]
    Auto,
    /// Linux namespaces.
    Namespace,
    /// A libkrun microVM.
    Libkrun,
}

/// Has nobody try a microVM again until the machine is started anew, but who asks for one.
pub(crate) fn distrust_kvm(home: &Home, error: &RunError, events: &dyn Fn(Event<'_>)) {
    kvm::distrust(&home.kvm(), "a microVM was started and said nothing".into());
    events(Event::Chosen(&Isolation::Namespace, Some(error)));
}

/// How the sandboxes of `project` are to be kept apart from the host.
pub(crate) fn isolation(
    home: &Home,
    options: &SandboxOptions,
    project: &Project,
    events: &dyn Fn(Event<'_>),
) -> Result<Isolation, RunError> {
    let machine = || machine(home, options, project, events);
    match options.runtime {
        Runtime::Namespace => Ok(Isolation::Namespace),
        Runtime::Libkrun => machine(),
        Runtime::Auto if !HAS_NAMESPACES => {
            let machine = machine()?;
            events(Event::Chosen(&machine, None));
            Ok(machine)
        }
        Runtime::Auto => {
            let (chosen, why) = match machine() {
                Ok(machine) => (machine, None),
                // Namespaces would run it, and what it was to have would not be missed before it is
                // needed.
                Err(error @ RunError::Memory { .. }) => return Err(error),
                Err(error) => (Isolation::Namespace, Some(error)),
            };
            // That a machine has no KVM is how most of them are; `worker doctor` says so.
            let why = why
                .as_ref()
                .filter(|why| !matches!(why, RunError::NoKvm { .. } | RunError::NoLibkrun));
            events(Event::Chosen(&chosen, why.map(|why| why as _)));
            Ok(chosen)
        }
    }
}

/// A microVM for the project. The guest's kernel is fetched if it is missing.
#[cfg(feature = "libkrun")]
fn machine(
    home: &Home,
    options: &SandboxOptions,
    project: &Project,
    events: &dyn Fn(Event<'_>),
) -> Result<Isolation, RunError> {
    kvm::usable(&home.kvm()).map_err(|why| RunError::NoKvm { why })?;
    let (memory, cpus) = (memory_mib(), thread::available_parallelism());
    let cpus = cpus.map_or(u32::MAX, |cpus| cpus.get() as u32);
    let asked = project.resources;
    let resources = asked.within(memory, cpus).ok_or_else(|| RunError::Memory {
        manifest: project.root.join(MANIFEST_NAME),
        asked: asked.memory_mib,
        there: memory,
    })?;
    let places = Places::new(home);
    let libkrunfw = if let Some((path, _)) = places.find()? {
        path
    } else {
        let package = Package::of_this_machine();
        let size = package.as_ref().map_or(0, |package| package.size);
        let settings = home.registries().map_err(ImageError::from)?;
        let progress = |come| events(Event::Kernel(come, size));
        progress(0);
        let path = places.find_or_fetch(package.as_ref(), &settings, &progress)?;
        progress(size);
        path
    };
    let loopback = &project.host_loopback;
    if !loopback.is_none() {
        // The manifest is not this user's, perhaps.
        let what = if loopback.all {
            "all of this machine's localhost".to_owned()
        } else {
            let ports: Vec<_> = loopback.ports.iter().map(u16::to_string).collect();
            format!("localhost:{} of this machine", ports.join(", "))
        };
        events(Event::Note(format!(
            "the manifest lets the worker reach {what}"
        )));
    }
    let loopback = options.host_loopback.clone().and(loopback);
    Ok(Isolation::Machine(Hardware {
        libkrunfw,
        // The manifest allows what fits.
        cpus: u8::try_from(resources.cpus).unwrap_or(u8::MAX),
        memory_mib: resources.memory_mib,
        reach: Reach::of_loopback(loopback.ports, loopback.all),
        may_fall_back: options.runtime == Runtime::Auto && HAS_NAMESPACES,
    }))
}

/// What this machine has of memory, swap space included.
#[cfg(all(feature = "libkrun", target_os = "linux"))]
fn memory_mib() -> u32 {
    let info = rustix::system::sysinfo();
    let units = info.totalram.saturating_add(info.totalswap);
    let bytes = units.saturating_mul(info.mem_unit.into());
    u32::try_from(bytes >> 20).unwrap_or(u32::MAX)
}

/// Where it is not asked, all that a manifest may ask for.
#[cfg(all(feature = "libkrun", not(target_os = "linux")))]
fn memory_mib() -> u32 {
    u32::MAX
}

#[cfg(not(feature = "libkrun"))]
fn machine(
    _: &Home,
    _: &SandboxOptions,
    _: &Project,
    _: &dyn Fn(Event<'_>),
) -> Result<Isolation, RunError> {
    Err(RunError::NoLibkrun)
}
