//! A step on the way to a running command that failed.

use std::fmt;
use std::io;

use serde::{Deserialize, Serialize};

/// A step on the way to a running command. Displays as the failed action.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "their Display says it")]
pub enum Step {
    Talk,
    OpenRoot,
    OpenMount,
    OpenHost,
    Unshare,
    OpenFuse,
    BecomeRoot,
    Fork,
    MountFuse,
    MountRoot,
    Mount,
    Bind,
    HostFile,
    Pivot,
    Hostname,
    Clock,
    Network,
    FindUser,
    BecomeUser,
    DropCapabilities,
    Chdir,
    Streams,
    Exec,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Talk => "talk to the tool",
            Self::OpenRoot => "open the root directory",
            Self::OpenMount => "open the mounted directory",
            Self::OpenHost => "take over from the host",
            Self::Unshare => "create the namespaces",
            Self::OpenFuse => "open",
            Self::BecomeRoot => "become root inside the user namespace",
            Self::Fork => "fork",
            Self::MountFuse => "mount the overlay over FUSE",
            Self::MountRoot => "mount the root directory",
            Self::Mount => "mount",
            Self::Bind => "make visible inside",
            Self::HostFile => "place the host's settings at",
            Self::Pivot => "switch to the new root",
            Self::Hostname => "set the host name",
            Self::Clock => "set the clock",
            Self::Network => "bring up the network interface",
            Self::FindUser => "find the user in /etc/passwd or the group in /etc/group",
            Self::BecomeUser => "become the user",
            Self::DropCapabilities => "drop capabilities",
            Self::Chdir => "change to the working directory",
            Self::Streams => "set up the standard streams",
            Self::Exec => "execute",
        })
    }
}

/// A step that failed, and on what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The step.
    pub step: Step,
    /// Object of the step; may be empty.
    pub what: String,
    /// Why.
    pub errno: i32,
}

impl Failure {
    /// Bound on `what`, so that a failure always fits a message.
    pub const MAX_WHAT: usize = 1024;

    /// `what` is cut to [`Self::MAX_WHAT`]; an error without a number counts as `EINVAL`.
    pub fn new(step: Step, what: impl Into<String>, error: &io::Error) -> Self {
        let mut what = what.into();
        while what.len() > Self::MAX_WHAT {
            what.pop();
        }
        let errno = error.raw_os_error().unwrap_or(libc::EINVAL);
        Self { step, what, errno }
    }
}

/// Attaches step and object to an error.
pub trait At<T> {
    /// `self`, with the failure of `step` on `what` in place of its error.
    fn at(self, step: Step, what: &str) -> Result<T, Failure>;
}

impl<T, E: Into<io::Error>> At<T> for Result<T, E> {
    fn at(self, step: Step, what: &str) -> Result<T, Failure> {
        self.map_err(|error| Failure::new(step, what, &error.into()))
    }
}
