//! Sandboxes: where a worker's steps and its start command run.
//!
//! A [`SandboxSpec`] names a command and its root filesystem. The libkrun runtime (`krun`) runs
//! it in a microVM. The namespace runtime runs it as an ordinary process tree in Linux namespaces
//! of its own (user, mount, pid, ipc, uts, cgroup); the rest of this page is about that one, which
//! is Linux's.
//!
//! Isolation of the namespace runtime: files, processes, ids, System V ipc and host name are the
//! sandbox's own; the **kernel and the network are the host's**. `localhost` inside is `localhost`
//! outside, which is how a worker reaches the engine. Memory and cpus are not limited.
//!
//! # How a sandbox of namespaces comes to life
//!
//! ```text
//! tool                      stage 1 (tool's own binary)      pid 1 (fork of stage 1)    command
//!  spawn self, socket = fd 0 ->
//!  Start + plan, stdio fds   ->
//!                             unshare, open /dev/fuse
//!                            <- Unshared
//!  write uid_map, gid_map
//!  MapsWritten               ->
//!                             become root inside, fork   ->
//!                                                          mount the root
//!                            <- FuseMounted + fd
//!  serve the filesystem                                    proc, sys, dev, binds
//!                                                          pivot_root, fork        ->
//!                                                                                     exec
//!                            <- Running
//!  Signal, Stop              ->                            forward, reap
//!                            <- Exited
//! ```
//!
//! # Invariants
//!
//! - Every mount is made in the sandbox's own mount namespace, and after `pivot_root` wherever a
//!   name of the image takes part: nothing appears in the host's mount table, and a symlink in an
//!   image never resolves on the host.
//! - Pid 1 lives no longer than the tool: when the control socket closes, for whatever reason, it
//!   exits and the kernel kills everything in its pid namespace. The mounts go with the last
//!   process. A parent-death signal would not do between tool and stage 1, since it fires when the
//!   *thread* that spawned it ends; between stage 1 and pid 1, both single-threaded, it serves.
//! - Root inside is never root outside. See [`IdMaps`](ids::IdMaps).
//! - The host's DNS settings, `hosts` and certificates lie on a read-only tmpfs above the layers.

#![warn(clippy::print_stdout, clippy::print_stderr)]
#![cfg_attr(test, allow(clippy::disallowed_methods))]

mod commands;
mod error;
mod host;
#[cfg(target_os = "linux")]
mod ids;
#[cfg(target_os = "linux")]
mod init;
#[cfg(feature = "libkrun")]
mod krun;
pub mod kvm;
#[cfg(target_os = "linux")]
mod namespace;
#[cfg(not(target_os = "linux"))]
mod no_namespace;
pub mod process;
pub mod reach;
#[cfg(target_os = "linux")]
mod root;
mod running;
mod spec;
pub mod tail;
#[cfg(target_os = "linux")]
mod wire;

#[cfg(not(target_os = "linux"))]
use no_namespace as namespace;

pub use error::{RemoteError, SandboxError, Warning};
pub use host::{CA_BUNDLE, HostSettings};
pub use iii_init::failure::Step;
pub use iii_init::message::{Command, Size};
#[cfg(target_os = "linux")]
pub use init::{MARKER as INIT_MARKER, run_init};
#[cfg(all(feature = "libkrun", target_os = "linux"))]
pub use krun::has_landlock;
#[cfg(feature = "libkrun")]
pub use krun::{BOOT_LIMIT, MARKER as VM_MARKER, Machine, run as run_vm};
pub use namespace::{NamespaceSupport, probe};
pub use running::{CommandController, Controller, Sandbox, Started};
pub use spec::{BindMount, FuseServer, RootSource, SandboxSpec, ServeFuse, Stdio};

/// Whether this operating system has namespaces to run sandboxes in.
pub const HAS_NAMESPACES: bool = cfg!(target_os = "linux");
