//! The mounts of every sandbox, on any root.

use std::ffi::CString;
use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, symlink};
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, mount_bind, mount_remount};

use crate::failure::{At as _, Failure, Step};
use crate::message::HostFile;

/// Where the host's settings lie.
const HOST_FILES: &str = "/run/iii";

/// Symlinks followed on the way to a mount point.
const MAX_SYMLINKS: usize = 40;

/// Mounts a filesystem of `kind` at `target`, which is made when missing.
pub fn filesystem(
    kind: &str,
    source: &str,
    target: &str,
    flags: MountFlags,
    options: &str,
) -> Result<(), Failure> {
    directory(target).at(Step::Mount, target)?;
    CString::new(options)
        .map_err(io::Error::from)
        .and_then(|options| {
            rustix::mount::mount(source, target, kind, flags, options.as_c_str())?;
            Ok(())
        })
        .at(Step::Mount, target)
}

/// The directory `path` and its parents, those that are missing.
pub fn directory(path: impl AsRef<Path>) -> io::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path)
}

/// A proc of this pid namespace.
pub fn proc() -> Result<(), Failure> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    filesystem("proc", "proc", "/proc", flags, "")
}

/// Terminals, shared memory and the usual links, in a `/dev` that is there.
pub fn devices() -> Result<(), Failure> {
    let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
    let options = "newinstance,ptmxmode=666,mode=620";
    let terminals = |options: &str| filesystem("devpts", "devpts", "/dev/pts", flags, options);
    // Group tty, unless one id is all there is.
    terminals(&format!("{options},gid=5")).or_else(|_| terminals(options))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    filesystem("tmpfs", "tmpfs", "/dev/shm", flags, "mode=1777")?;
    for (link, target) in [
        ("/dev/ptmx", "pts/ptmx"),
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        // A devtmpfs has a ptmx of its own, which is that of the host's instance.
        let _ = fs::remove_file(link);
        symlink(target, link).at(Step::Mount, link)?;
    }
    Ok(())
}

/// `/tmp` and `/run`, in memory.
pub fn scratch() -> Result<(), Failure> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV;
    filesystem("tmpfs", "tmpfs", "/tmp", flags, "mode=1777")?;
    filesystem("tmpfs", "tmpfs", "/run", flags, "mode=755")?;
    fs::DirBuilder::new()
        .mode(0o1777)
        .create("/run/lock")
        .at(Step::Mount, "/run/lock")
}

/// The host's settings, on a tmpfs that ends up read-only.
pub fn host_files(files: &[HostFile]) -> Result<(), Failure> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    filesystem("tmpfs", "tmpfs", HOST_FILES, flags, "mode=755")?;
    for file in files {
        let path = format!("{HOST_FILES}/{}", file.name);
        fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o644)
            .open(&path)
            .and_then(|mut opened| opened.write_all(file.contents.as_bytes()))
            .at(Step::HostFile, &path)?;
        if let Some(covers) = &file.covers {
            mount_point(covers, false)
                .and_then(|target| Ok(mount_bind(&path, target)?))
                .at(Step::HostFile, covers)?;
        }
    }
    mount_remount(HOST_FILES, flags | MountFlags::RDONLY, "").at(Step::HostFile, HOST_FILES)
}

/// Where to mount so that it is seen at `target`: what is there, or a directory or an empty file
/// that is made. To be called where names are resolved inside the sandbox.
pub fn mount_point(target: &str, is_directory: bool) -> io::Result<PathBuf> {
    if is_directory {
        directory(target)?;
        return Ok(target.into());
    }
    // A dangling symlink, as /etc/resolv.conf often is, counts as the name it stands for. It may
    // lead to /run, and then not even the empty file reaches the image's layers.
    let mut path = PathBuf::from(target);
    for _ in 0..MAX_SYMLINKS {
        match fs::read_link(&path) {
            Ok(link) => path = path.parent().unwrap_or(Path::new("/")).join(link),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if let Some(parent) = path.parent() {
                    directory(parent)?;
                }
                fs::OpenOptions::new()
                    .write(true)
                    .create_new(true)
                    .mode(0o644)
                    .open(&path)?;
                return Ok(path);
            }
            Err(_) => return Ok(path),
        }
    }
    Err(io::Error::from_raw_os_error(libc::ELOOP))
}
