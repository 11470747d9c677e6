//! Limits of the process of a microVM on this machine: landlock for files, no capabilities,
//! and the filter of [`super::filter`] for the rest.
//!
//! It is put on before there are threads, layers or a guest. From then on the process reads the
//! store, writes its upper and the directories that the guest mounts, and opens `/dev/kvm`. The
//! upper is opened by the tool afterwards, which nothing confines: so only regular files and
//! directories can be made there, and nothing can be moved or linked to it or from it.
//!
//! Landlock says who may open a file, and make or remove a name. It says nothing of modes, owners
//! and times, nor of asking whether something is there. A kernel without it, or before 5.19,
//! confines files by their owners and modes alone; before 6.2, a file that the user may write could
//! be emptied by opening it.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use landlock::{
    ABI, Access as _, AccessFs, BitFlags, CompatLevel, Compatible as _, PathBeneath, PathFd,
    Ruleset, RulesetAttr as _, RulesetCreatedAttr as _, RulesetError, Scope,
};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};

use super::filter;
use crate::kvm;

/// The version that this is written for. Rights of later versions are not used, since they were not
/// tried.
const KNOWN: ABI = ABI::V7;
/// The first version that lets a file move to another directory.
const NEEDED: ABI = ABI::V2;

/// The id of the running kernel, which the overlay reads.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The files that a microVM's process needs.
pub(super) struct Files<'a> {
    /// The store's directory.
    pub store: &'a Path,
    /// The library with the guest's kernel.
    pub libkrunfw: &'a Path,
    /// The directory of the upper, which is there.
    pub upper: &'a Path,
    /// Directories that the guest mounts. They are there.
    pub volumes: Vec<&'a Path>,
}

/// Why a process cannot be confined.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation}")]
pub(super) struct ConfineError {
    operation: &'static str,
    source: io::Error,
}

fn at(operation: &'static str) -> impl FnOnce(io::Error) -> ConfineError {
    move |source| ConfineError { operation, source }
}

/// Whether this kernel has the landlock that is needed.
pub fn has_landlock() -> bool {
    let needed = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(NEEDED))
        .and_then(Ruleset::create);
    needed.is_ok()
}

/// Confines this thread and those that it starts, for good. `control` leads to the tool. Returns
/// what [`super::watch::Watch`] answers on.
pub(super) fn confine(files: &Files<'_>, control: BorrowedFd<'_>) -> Result<OwnedFd, ConfineError> {
    let capabilities = needed_capabilities(files.store);
    restrict(files)
        .map_err(|error| at("restrict which files it opens")(io::Error::other(error)))?;
    let none = CapabilitySet::empty();
    let sets = CapabilitySets {
        effective: capabilities,
        permitted: capabilities,
        inheritable: none,
    };
    set_capabilities(None, sets).map_err(|error| at("drop its capabilities")(error.into()))?;
    filter::install(control).map_err(at("restrict its system calls"))
}

/// None, but for root in a store that is another's, such as `sudo` with that user's home.
fn needed_capabilities(store: &Path) -> CapabilitySet {
    let user = rustix::process::geteuid();
    match store.metadata() {
        Ok(store) if user.is_root() && store.uid() != user.as_raw() => CapabilitySet::DAC_OVERRIDE,
        _ => CapabilitySet::empty(),
    }
}

fn restrict(files: &Files<'_>) -> Result<(), RulesetError> {
    if !has_landlock() {
        return Ok(());
    }
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let change = AccessFs::WriteFile | AccessFs::Truncate | AccessFs::RemoveFile;
    let of_upper = read | change | AccessFs::MakeReg | AccessFs::MakeDir;
    let device = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
    let all = AccessFs::from_all(KNOWN) & !AccessFs::Execute;
    let mut ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(KNOWN))?
        .scope(Scope::from_all(KNOWN))?
        .create()?;
    let mut allow = |path: &Path, access: BitFlags<AccessFs>| {
        // A missing path cannot be opened either; its later user reports the absence.
        if let Ok(path) = PathFd::new(path) {
            (&mut ruleset).add_rule(PathBeneath::new(path, access))?;
        }
        Ok::<_, RulesetError>(())
    };
    allow(files.store, read)?;
    allow(files.libkrunfw, AccessFs::ReadFile.into())?;
    allow(kvm::DEVICE.as_ref(), device)?;
    // An upper's log says during which start of the host it was written.
    allow(BOOT_ID.as_ref(), AccessFs::ReadFile.into())?;
    allow(files.upper, of_upper)?;
    for dir in &files.volumes {
        allow(dir, all)?;
    }
    ruleset.restrict_self()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::{ErrorKind, Write as _};
    use std::net::TcpStream;
    use std::os::fd::AsFd as _;
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixStream;
    use std::thread;

    use rustix::fs::{CWD, FileType, Mode, mknodat};
    use rustix::thread::capabilities;
    use tempfile::TempDir;

    use super::*;

    /// The result of `act` on a thread that is confined to `files`.
    fn confined<T: Send>(files: &Files<'_>, act: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let acting = scope.spawn(|| {
                let control = UnixStream::pair().unwrap().0;
                // No process answers.
                drop(confine(files, control.as_fd()).unwrap());
                act()
            });
            acting.join().unwrap()
        })
    }

    #[test]
    fn a_confined_process_touches_what_is_its_own() {
        if !has_landlock() {
            eprintln!("SKIPPED: which files a microVM's process touches: no landlock");
            return;
        }
        let dir = TempDir::new().unwrap();
        let path = |name: &str| dir.path().join(name);
        for name in [
            "store/layers",
            "store/packs",
            "store/trash/1",
            "upper",
            "volume",
            "ssh",
        ] {
            fs::create_dir_all(path(name)).unwrap();
        }
        for name in [
            "store/layers/a",
            "store/packs/b",
            "store/trash/1/c",
            "ssh/key",
            "volume/file",
            "fw.so",
        ] {
            fs::write(path(name), "text").unwrap();
        }
        let (store, upper, libkrunfw) = (path("store"), path("upper"), path("fw.so"));
        let volume = path("volume");
        let node = |name: &str, kind| {
            mknodat(CWD, path(name), kind, Mode::RUSR, 0).map_err(io::Error::from)
        };
        let files = Files {
            store: &store,
            libkrunfw: &libkrunfw,
            upper: &upper,
            volumes: vec![&volume],
        };
        let kinds = confined(&files, || {
            assert_eq!(fs::read(path("store/layers/a")).unwrap(), b"text");
            assert_eq!(fs::read(path("fw.so")).unwrap(), b"text");
            assert_eq!(fs::read_dir(path("store/packs")).unwrap().count(), 1);
            fs::create_dir(path("upper/data")).unwrap();
            let mut file = File::create(path("upper/data/1")).unwrap();
            file.write_all(b"text").unwrap();
            file.set_len(1).unwrap();
            // As a log is written anew.
            fs::rename(path("upper/data/1"), path("upper/data/2")).unwrap();
            symlink("/etc/shadow", path("volume/link")).unwrap();
            node("volume/fifo", FileType::Fifo).unwrap();
            File::open(path("store/layers"))
                .unwrap()
                .sync_all()
                .unwrap();
            let kept = capabilities(None).unwrap();
            assert!(kept.effective.is_empty() && kept.permitted.is_empty());
            [
                fs::read("/etc/shadow").err(),
                fs::read("/etc/passwd").err(),
                fs::read_dir(path("ssh")).err(),
                fs::read(path("ssh/key")).err(),
                fs::write(path("ssh/authorized_keys"), "mine").err(),
                fs::remove_file(path("store/layers/a")).err(),
                fs::rename(path("store/layers/a"), path("upper/a")).err(),
                fs::write(path("store/packs/b"), "other").err(),
                fs::rename(path("upper/data/2"), path("ssh/2")).err(),
                // The tool opens the files that it finds in the upper.
                symlink("/etc/shadow", path("upper/data/3")).err(),
                node("upper/data/3", FileType::Fifo).err(),
                node("upper/data/3", FileType::Socket).err(),
                fs::rename(path("volume/link"), path("upper/data/3")).err(),
                fs::rename(path("volume/fifo"), path("upper/data/3")).err(),
                fs::hard_link(path("volume/file"), path("upper/data/3")).err(),
                // A process with an open file can write to it anywhere.
                fs::hard_link(path("upper/data/2"), path("store/layers/d")).err(),
                fs::rename(path("upper/data/2"), path("store/packs/d")).err(),
                fs::rename(path("volume/file"), path("store/packs/d")).err(),
                fs::rename(path("store/trash/1/c"), path("store/layers/c")).err(),
                fs::read("/proc/self/environ").err(),
                File::open("/dev/null").err(),
                // Without an answer, a thread does not connect.
                TcpStream::connect("127.0.0.1:1").err(),
            ]
            .map(|error| error.map(|error| error.kind()))
        });
        let (connected, opened) = kinds.split_last().unwrap();
        for (index, kind) in opened.iter().enumerate() {
            let refused = [ErrorKind::PermissionDenied, ErrorKind::CrossesDevices];
            assert!(
                kind.is_some_and(|kind| refused.contains(&kind)),
                "{index}: {kind:?}"
            );
        }
        assert!(connected.is_some());
        assert_eq!(fs::read(path("store/packs/b")).unwrap(), b"text");
    }
}
