//! Messages over a `SOCK_SEQPACKET` pair: one message per packet, descriptors riding along.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use serde::{Serialize, de::DeserializeOwned};

/// Largest message. What may be larger travels in a memfd of its own.
pub const MAX_MESSAGE: usize = 4096;
/// Most descriptors in a message: a memfd and three standard streams.
const MAX_FDS: usize = 4;

/// A message's bytes.
pub fn encode(message: &impl Serialize) -> io::Result<Vec<u8>> {
    postcard::to_allocvec(message).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// The message in these bytes.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> io::Result<T> {
    postcard::from_bytes(bytes).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// Two connected sockets that close on exec.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let pair = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    );
    Ok(pair?)
}

/// Sends a message that is no longer than [`MAX_MESSAGE`].
pub fn send(socket: impl AsFd, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
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
pub fn recv<T: DeserializeOwned>(socket: impl AsFd) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
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
    use crate::failure::{Failure, Step};
    use crate::message::{MAIN, Report};

    #[test]
    fn the_longest_failure_fits_a_message() {
        let failure = Failure::new(
            Step::Bind,
            "ü".repeat(MAX_MESSAGE),
            &io::Error::from_raw_os_error(libc::ENOENT),
        );
        let (ours, theirs) = pair().expect("pair");
        send(&ours, &Report::Failed(MAIN, failure), &[]).expect("send");
        let (report, fds) = recv::<Report>(&theirs).expect("recv").expect("a message");
        assert!(fds.is_empty());
        let Report::Failed(MAIN, Failure { step, what, errno }) = report else {
            panic!("{report:?}");
        };
        assert_eq!((step, errno), (Step::Bind, libc::ENOENT));
        assert!(what.chars().all(|c| c == 'ü') && what.len() <= Failure::MAX_WHAT);
    }
}
