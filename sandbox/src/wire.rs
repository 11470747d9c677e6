//! Messages between the tool and the namespace runtime's init while a sandbox is set up; from then
//! on, the requests and reports of every sandbox.

use std::ffi::OsString;

use iii_init::failure::Failure;
use iii_init::message::{Command, HostFile, Report, Request};
use serde::{Deserialize, Serialize};

/// The spec as the init needs it, everything about the host decided.
#[derive(Serialize, Deserialize)]
pub(super) struct Plan {
    pub root: Root,
    pub hostname: String,
    pub mounts: Vec<Mount>,
    pub files: Vec<HostFile>,
    pub command: Command,
    /// The output streams are pipes made for this sandbox, so they may be given to its user.
    pub owns_output: bool,
}

#[derive(Serialize, Deserialize)]
pub(super) enum Root {
    Fuse,
    Dir(OsString),
    /// Mount a FUSE filesystem without a server, then end: shows that a sandbox could start.
    Probe,
}

#[derive(Serialize, Deserialize)]
pub(super) struct Mount {
    pub host: OsString,
    pub target: String,
    pub read_only: bool,
}

/// From the tool to the init.
#[derive(Serialize, Deserialize)]
pub(super) enum ToInit {
    /// With the three standard streams.
    Start(Box<Plan>),
    MapsWritten,
    Request(Request),
}

/// From the init to the tool.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum FromInit {
    Unshared,
    /// With the mounted `/dev/fuse` descriptor.
    FuseMounted,
    /// Of a [`Root::Probe`]: a sandbox could start.
    Probed,
    /// There will be no command.
    Failed(Failure),
    Report(Report),
}
