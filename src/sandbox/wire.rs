//! What the tool and the sandbox's init say to each other, over a `SOCK_SEQPACKET` pair: one
//! message per packet, descriptors riding along.

use std::ffi::OsString;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::error::Step;

/// Largest message. The plan travels in a memfd of its own, since a CA bundle would not fit.
const MAX_MESSAGE: usize = 4096;
/// Most descriptors in a message: the plan and three standard streams.
const MAX_FDS: usize = 4;

/// The spec as the init needs it, everything about the host decided.
#[derive(Serialize, Deserialize)]
pub(super) struct Plan {
    pub root: Root,
    pub argv: Vec<OsString>,
    pub env: Vec<(String, String)>,
    pub cwd: String,
    pub user: String,
    pub hostname: String,
    pub mounts: Vec<Mount>,
    pub files: Vec<HostFile>,
    /// The output streams are pipes made for this sandbox, so they may be given to its user.
    pub owns_output: bool,
}

#[derive(Serialize, Deserialize)]
pub(super) enum Root {
    Fuse,
    Dir(OsString),
    /// Mount a FUSE filesystem that nobody serves, then end: shows that a sandbox could start.
    Probe,
}

#[derive(Serialize, Deserialize)]
pub(super) struct Mount {
    pub host: OsString,
    pub target: String,
    pub read_only: bool,
}

/// A file on the read-only tmpfs at `/run/iii`.
#[derive(Serialize, Deserialize)]
pub(super) struct HostFile {
    pub name: String,
    /// The path it covers, too.
    pub covers: Option<String>,
    pub contents: String,
}

/// From the tool to the init.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Request {
    /// With the plan's memfd and the three standard streams.
    Start,
    MapsWritten,
    Signal(i32),
    Stop {
        signal: i32,
        grace: Duration,
    },
}

/// From the init to the tool.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Report {
    Unshared,
    /// With the mounted `/dev/fuse` descriptor.
    FuseMounted,
    Running,
    /// The command's wait status.
    Exited(i32),
    Failed(Failure),
}

/// A set-up step that failed, and on what.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Failure {
    pub step: Step,
    pub what: String,
    pub errno: i32,
}

impl Failure {
    /// Bound on `what`, so that a failure always fits a message.
    const MAX_WHAT: usize = 1024;

    pub(super) fn new(step: Step, what: impl Into<String>, error: &io::Error) -> Self {
        let mut what = what.into();
        while what.len() > Self::MAX_WHAT {
            what.pop();
        }
        let errno = error.raw_os_error().unwrap_or(libc::EINVAL);
        Self { step, what, errno }
    }
}

pub(super) fn encode(message: &impl Serialize) -> io::Result<Vec<u8>> {
    postcard::to_allocvec(message).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

pub(super) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> io::Result<T> {
    postcard::from_bytes(bytes).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// Two connected sockets that close on exec.
pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let pair = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    );
    Ok(pair?)
}

pub(super) fn send(
    socket: impl AsFd,
    message: &impl Serialize,
    fds: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let bytes = encode(message)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::ErrorKind::ArgumentListTooLong.into());
    }
    rustix::io::retry_on_intr(|| {
        sendmsg(
            &socket,
            &[IoSlice::new(&bytes)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )
    })?;
    Ok(())
}

/// The next message; `None` once the other side is gone.
pub(super) fn recv<T: DeserializeOwned>(
    socket: impl AsFd,
) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut bytes = [0; MAX_MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        recvmsg(
            &socket,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        )
    });
    let length = match received {
        Ok(message) => message.bytes,
        Err(rustix::io::Errno::CONNRESET) => 0,
        Err(error) => return Err(error.into()),
    };
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    match bytes.get(..length) {
        None | Some([]) => Ok(None),
        Some(bytes) => Ok(Some((decode(bytes)?, fds))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_failure_fits_a_message() {
        let failure = Failure::new(
            Step::Bind,
            "ü".repeat(MAX_MESSAGE),
            &io::Error::from_raw_os_error(libc::ENOENT),
        );
        let (ours, theirs) = pair().expect("pair");
        send(&ours, &Report::Failed(failure), &[]).expect("send");
        let (report, fds) = recv::<Report>(&theirs).expect("recv").expect("a message");
        assert!(fds.is_empty());
        let Report::Failed(Failure { step, what, errno }) = report else {
            panic!("{report:?}");
        };
        assert_eq!((step, errno), (Step::Bind, libc::ENOENT));
        assert!(what.chars().all(|c| c == 'ü') && what.len() <= Failure::MAX_WHAT);
    }
}
