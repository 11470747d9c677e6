//! Errors of sandboxes, and remedies.

use std::error::Error;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::Duration;

use iii_init::failure::{Failure, Step};
use serde::{Deserialize, Serialize};

/// Why a sandbox did not start, or could not be waited for.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The spec contradicts itself.
    #[error("sandbox: {0}")]
    Spec(String),
    /// This operating system has no namespaces.
    #[error("sandboxes of namespaces need Linux; elsewhere workers run in microVMs")]
    NoNamespaces,
    /// The init program did not start.
    #[error("sandbox: cannot start {}", program.display())]
    Spawn {
        /// The program.
        program: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A step inside failed before the command ran.
    #[error("sandbox: cannot {step}{}{what}", if what.is_empty() { "" } else { " " })]
    SetUp {
        /// The step.
        step: Step,
        /// Object of the step; may be empty.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// Nothing in the sandbox goes by the command's name.
    #[error("{command}: command not found in the sandbox")]
    CommandNotFound {
        /// The command.
        command: String,
    },
    /// The command is there but cannot be executed.
    #[error("{command}: cannot be executed in the sandbox")]
    NotExecutable {
        /// The command.
        command: String,
        /// Why.
        source: io::Error,
    },
    /// An operation on the host's side failed.
    #[error("sandbox: cannot {operation} {}", path.display())]
    Host {
        /// The operation.
        operation: &'static str,
        /// Object of the operation.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// `newuidmap` or `newgidmap` refused.
    #[error("sandbox: {helper} refused to map ids: {message}")]
    IdHelper {
        /// Which.
        helper: &'static str,
        /// Its output.
        message: String,
    },
    /// The root's filesystem server failed.
    #[error("sandbox: the root's filesystem server failed")]
    Server(#[source] io::Error),
    /// The socket to the init failed.
    #[error("sandbox: cannot talk to the init")]
    Talk(#[source] io::Error),
    /// The process of a microVM could not run it.
    #[error("the microVM cannot run")]
    Machine(#[from] RemoteError),
    /// The connections of a microVM's guest cannot be made.
    #[error("sandbox: cannot look after the microVM's connections")]
    Watch(#[source] io::Error),
    /// A microVM's init said nothing before its time was up or its process ended.
    #[error(
        "the microVM's init did not start{}{}",
        status.map_or_else(|| format!(" within {} s", limit.as_secs()), |status| format!(" ({status})")),
        quoted(console)
    )]
    Boot {
        /// How long it had.
        limit: Duration,
        /// How its process ended, if it did.
        status: Option<ExitStatus>,
        /// The last lines of its console.
        console: Vec<String>,
    },
    /// A microVM ended before its command did.
    #[error(
        "the microVM ended before its command did ({status}){}",
        quoted(console)
    )]
    MachineEnded {
        /// How its process ended.
        status: ExitStatus,
        /// The last lines of its console.
        console: Vec<String>,
    },
    /// The init was killed before the command ran.
    #[error("sandbox: killed before the command ran")]
    Killed,
}

/// The end of a console, as the end of a message.
fn quoted(console: &[String]) -> String {
    if console.is_empty() {
        return "; its console is empty".into();
    }
    format!("; its console ends with\n  {}", console.join("\n  "))
}

/// An error of another process, and its causes.
#[derive(Debug, Serialize, Deserialize)]
pub struct RemoteError {
    message: String,
    cause: Option<Box<RemoteError>>,
}

impl RemoteError {
    /// Most errors in a chain, and bytes of each.
    const MAX: (usize, usize) = (8, 400);

    /// The part of `error` that can be sent.
    pub fn new(error: &(dyn Error + 'static)) -> Self {
        let mut chain: Vec<_> = std::iter::successors(Some(error), |error| (*error).source())
            .take(Self::MAX.0)
            .map(|error| {
                let mut message = error.to_string();
                while message.len() > Self::MAX.1 {
                    message.pop();
                }
                message
            })
            .collect();
        let mut remote = Self {
            message: chain.pop().unwrap_or_default(),
            cause: None,
        };
        while let Some(message) = chain.pop() {
            let cause = Some(Box::new(remote));
            remote = Self { message, cause };
        }
        remote
    }
}

impl fmt::Display for RemoteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for RemoteError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.cause.as_deref().map(|cause| cause as _)
    }
}

impl From<Failure> for SandboxError {
    fn from(Failure { step, what, errno }: Failure) -> Self {
        let source = io::Error::from_raw_os_error(errno);
        match (step, errno) {
            (Step::Exec, libc::ENOENT) => Self::CommandNotFound { command: what },
            (Step::Exec, _) => Self::NotExecutable {
                command: what,
                source,
            },
            _ => Self::SetUp { step, what, source },
        }
    }
}

impl SandboxError {
    /// The exit code that shells and container engines give to this.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::CommandNotFound { .. } => 127,
            Self::NotExecutable { .. } => 126,
            _ => 125,
        }
    }

    /// The remedy, where one is known.
    pub fn hint(&self) -> Option<String> {
        let (step, source) = match self {
            Self::SetUp { step, source, .. } => (step, source),
            Self::Watch(_) => {
                return Some(
                    "pidfd_getfd is refused, as in most containers; run outside of it, or give the container \
                     --cap-add SYS_PTRACE"
                        .into(),
                );
            }
            _ => return None,
        };
        let errno = source.raw_os_error()?;
        let sysctl = |name: &str| {
            let path = format!("/proc/sys/{}", name.replace('.', "/"));
            let value = std::fs::read_to_string(path).ok()?;
            value.trim().parse::<u64>().ok()
        };
        let refused = matches!(errno, libc::EPERM | libc::EACCES);
        let hint = match step {
            Step::Unshare if sysctl("user.max_user_namespaces") == Some(0) => {
                "user namespaces are switched off; as root: sysctl user.max_user_namespaces=15000"
            }
            Step::Unshare if refused && sysctl("kernel.unprivileged_userns_clone") == Some(0) => {
                "user namespaces are for root only here; as root: sysctl kernel.unprivileged_userns_clone=1"
            }
            Step::Unshare | Step::BecomeRoot | Step::MountFuse | Step::Mount
                if refused && sysctl("kernel.apparmor_restrict_unprivileged_userns") == Some(1) =>
            {
                "AppArmor restricts user namespaces; as root: sysctl kernel.apparmor_restrict_unprivileged_userns=0, \
                 or give this program a profile with the `userns` permission"
            }
            Step::Unshare if refused => {
                "user namespaces are refused, as in most containers; run outside of it, \
                 or give the container --privileged (or a seccomp profile that allows unshare and mount)"
            }
            Step::OpenFuse if errno == libc::ENOENT || errno == libc::ENODEV => {
                "the FUSE device is missing; as root: modprobe fuse (in a container: --device /dev/fuse)"
            }
            Step::OpenFuse if refused => {
                "the FUSE device must be open to you; as root: chmod 666 /dev/fuse"
            }
            Step::MountFuse if refused => {
                "mounting FUSE in a user namespace needs Linux 4.18 and a container that allows mount"
            }
            Step::BecomeUser if errno == libc::EINVAL => {
                "that id is not mapped into the sandbox; see the warning about /etc/subuid"
            }
            _ if errno == libc::ENOSYS => "the namespace runtime needs Linux 5.12",
            _ => return None,
        };
        Some(hint.into())
    }
}

/// A restriction of the sandbox. Displays as one line with its remedy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Warning {
    /// Only one id exists inside the sandbox.
    SingleId {
        /// Why no more could be mapped.
        reason: String,
        /// The remedy.
        remedy: String,
    },
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::SingleId { reason, remedy } = self;
        write!(
            f,
            "only root exists inside the sandbox ({reason}): chown to another user and programs that change \
             user, such as apt's _apt or a database's own account, will fail; {remedy}"
        )
    }
}
