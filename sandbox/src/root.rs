//! The sandbox's root filesystem, and the mounts on it.
//!
//! Needs `open_tree` and `mount_setattr`, that is Linux 5.12.

use std::ffi::{CString, OsStr};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use iii_init::failure::{At as _, Failure, Step};
use iii_init::mounts;
use iii_init::packet::Socket;
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount_change,
    move_mount, open_tree, unmount,
};

use super::wire::{FromInit, Plan, Root};

pub(super) const FUSE_DEVICE: &str = "/dev/fuse";

/// Devices that are the host's: they hold no state that a sandbox could spoil.
const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];

/// A directory of every host; covered, in our mount namespace alone, while the root is put
/// together.
const SCRATCH: &str = "/tmp";
const NEW_ROOT: &str = "/tmp/root";

/// Detached copies of the host's mounts, to be attached inside.
pub(super) struct Sources {
    root: Option<OwnedFd>,
    sys: OwnedFd,
    devices: Vec<(&'static str, OwnedFd)>,
    mounts: Vec<OwnedFd>,
}

impl Sources {
    pub(super) fn open(plan: &Plan) -> Result<Self, Failure> {
        let root = match &plan.root {
            Root::Dir(path) => {
                Some(clone_tree(CWD, path, 0).at(Step::OpenRoot, &path.to_string_lossy())?)
            }
            Root::Fuse | Root::Probe => None,
        };
        let no_devices = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
        let mut devices = Vec::new();
        for name in DEVICES {
            let path = format!("/dev/{name}");
            devices.push((
                name,
                clone_tree(CWD, path.as_ref(), 0).at(Step::OpenHost, &path)?,
            ));
        }
        let mut mounts = Vec::new();
        for mount in &plan.mounts {
            let read_only = if mount.read_only {
                libc::MOUNT_ATTR_RDONLY
            } else {
                0
            };
            let tree = clone_tree(CWD, &mount.host, no_devices | read_only);
            mounts.push(tree.at(Step::OpenMount, &mount.host.to_string_lossy())?);
        }
        // The network namespace is the host's, so a sysfs of our own may not be mounted.
        let sys = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOEXEC | no_devices;
        let sys = clone_tree(CWD, "/sys".as_ref(), sys).at(Step::OpenHost, "/sys")?;
        Ok(Self {
            root,
            sys,
            devices,
            mounts,
        })
    }
}

/// Mounts the root, still invisible to the sandbox; returns the host's.
pub(super) fn mount(
    control: &Socket,
    root: &Root,
    sources: &Sources,
    fuse: Option<OwnedFd>,
) -> Result<OwnedFd, Failure> {
    let recursive = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", recursive).at(Step::Mount, "/")?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let old_root = rustix::fs::open("/", flags, Mode::empty()).at(Step::MountRoot, "/")?;
    mounts::filesystem("tmpfs", "tmpfs", SCRATCH, MountFlags::empty(), "mode=700")?;
    fs::create_dir(NEW_ROOT).at(Step::MountRoot, NEW_ROOT)?;
    if let Some(fuse) = fuse {
        mount_fuse(&fuse).at(Step::MountFuse, "")?;
        // Our copy goes at once: the connection has to end with the tool.
        control
            .send(&FromInit::FuseMounted, &[fuse.as_fd()])
            .at(Step::Talk, "")?;
    }
    if let (Root::Dir(path), Some(tree)) = (root, &sources.root) {
        attach(tree, NEW_ROOT).at(Step::MountRoot, &path.to_string_lossy())?;
    }
    Ok(old_root)
}

fn mount_fuse(device: &OwnedFd) -> io::Result<()> {
    // `default_permissions`: the kernel checks modes, knowing the ids of the sandbox.
    // `allow_other`: for all of them. Neither nosuid, so that sudo and the like work inside, nor
    // nodev, which the kernel adds by itself.
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions",
        device.as_raw_fd()
    );
    let options = CString::new(options)?;
    rustix::mount::mount(
        "iii",
        NEW_ROOT,
        "fuse.iii",
        MountFlags::empty(),
        options.as_c_str(),
    )?;
    Ok(())
}

/// Makes the new root `/`, unmounts the host's, and adds the mounts of every sandbox.
///
/// From `pivot_root` on, every name is resolved inside, the image's symlinks included. The old root
/// stays mounted, beneath no name, until proc is there: the kernel allows a new proc only where
/// another is visible. It and its descriptor go before anything else is looked up, since with proc
/// in place a symlink could lead through `/proc/self/fd` as well.
pub(super) fn enter(plan: &Plan, sources: &Sources, old_root: OwnedFd) -> Result<(), Failure> {
    // The first access to a FUSE root: waits for its server.
    rustix::process::chdir(NEW_ROOT).at(Step::Pivot, "")?;
    rustix::process::pivot_root(".", ".").at(Step::Pivot, "")?;
    proc(old_root.as_fd())?;
    rustix::process::fchdir(&old_root).at(Step::Pivot, "")?;
    unmount(".", UnmountFlags::DETACH).at(Step::Pivot, "")?;
    rustix::process::chdir("/").at(Step::Pivot, "")?;
    drop(old_root);

    mounts::directory("/sys")
        .and_then(|()| attach(&sources.sys, "/sys"))
        .at(Step::Bind, "/sys")?;
    devices(&sources.devices)?;
    mounts::scratch()?;
    mounts::host_files(&plan.files)?;
    for (mount, tree) in plan.mounts.iter().zip(&sources.mounts) {
        bind(tree, &mount.target).at(Step::Bind, &mount.target)?;
    }
    Ok(())
}

fn proc(old_root: BorrowedFd<'_>) -> Result<(), Failure> {
    match mounts::proc() {
        // In a container that masks parts of proc. The container's own shows more processes, but
        // no more than the ids of the sandbox may see.
        Err(failure) if failure.errno == libc::EPERM => clone_tree(old_root, "proc".as_ref(), 0)
            .and_then(|tree| attach(&tree, "/proc"))
            .at(Step::Mount, "/proc"),
        result => result,
    }
}

fn devices(devices: &[(&'static str, OwnedFd)]) -> Result<(), Failure> {
    let options = "mode=755,size=1m";
    mounts::filesystem("tmpfs", "tmpfs", "/dev", MountFlags::NOSUID, options)?;
    for (name, tree) in devices {
        let path = format!("/dev/{name}");
        File::create(&path)
            .and_then(|_| attach(tree, &path))
            .at(Step::Bind, &path)?;
    }
    mounts::devices()
}

/// A private detached copy of what is mounted at `path` and below.
fn clone_tree(at: impl AsFd, path: &OsStr, attributes: u64) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(at, path, flags)?;
    let attributes = libc::mount_attr {
        attr_set: attributes,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    // SAFETY: the path is a NUL-terminated string and the struct is as large as the call is told.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const attributes,
            size_of_val(&attributes),
        )
    };
    if result == 0 {
        Ok(tree)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Mounts `tree` at `target`, which has to exist.
fn attach(tree: &OwnedFd, target: impl AsRef<Path>) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
    move_mount(tree, "", CWD, target.as_ref(), flags)?;
    Ok(())
}

/// Mounts `tree` at `target`, made if missing: a directory or an empty file, as the tree is.
fn bind(tree: &OwnedFd, target: &str) -> io::Result<()> {
    let kind = FileType::from_raw_mode(rustix::fs::fstat(tree)?.st_mode);
    attach(
        tree,
        mounts::mount_point(target, kind == FileType::Directory)?,
    )
}
