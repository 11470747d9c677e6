//! Messages over a `SOCK_SEQPACKET` pair: one message per packet, descriptors riding along. A message that is too long for
//! a packet rides along, too, as a file.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read as _, Seek as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use serde::{Serialize, de::DeserializeOwned};

/// Longest message in a packet of its own.
pub const MAX_MESSAGE: usize = 4096;
/// Longest message in a file: what a build step can have looked at.
const MAX_FILE: u64 = 256 << 20;
/// Most descriptors in a message: its file and three standard streams.
const MAX_FDS: usize = 4;
/// The first byte of a packet: the message follows.
const HERE: u8 = 0;
/// The first byte of a packet: the message is in the first file.
const IN_FILE: u8 = 1;

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

/// Sends a message, with at most three descriptors.
pub fn send(socket: impl AsFd, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut bytes = encode(message)?;
    let mut fds = fds.to_vec();
    let file;
    if bytes.len() > MAX_MESSAGE {
        file = file_of(&bytes)?;
        fds.insert(0, file.as_fd());
        bytes = vec![IN_FILE];
    } else {
        bytes.insert(0, HERE);
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
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
    let mut bytes = [0; 1 + MAX_MESSAGE];
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
        Some([HERE, bytes @ ..]) => Ok(Some((decode(bytes)?, fds))),
        Some([IN_FILE]) if !fds.is_empty() => {
            let file = File::from(fds.remove(0));
            // Of anything else, the end may never come.
            if !file.metadata()?.is_file() {
                return Err(io::ErrorKind::InvalidData.into());
            }
            let mut bytes = Vec::new();
            file.take(MAX_FILE).read_to_end(&mut bytes)?;
            Ok(Some((decode(&bytes)?, fds)))
        }
        Some(_) => Err(io::ErrorKind::InvalidData.into()),
    }
}

fn file_of(bytes: &[u8]) -> io::Result<File> {
    let mut file = File::from(memfd_create("iii-message", MemfdFlags::CLOEXEC)?);
    file.write_all(bytes)?;
    file.rewind()?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::{Failure, Step};
    use crate::message::{MAIN, Report};

    #[test]
    fn a_long_message_rides_along() {
        let (ours, theirs) = pair().expect("pair");
        let long = "x".repeat(1 << 20);
        let reader = std::io::pipe().expect("pipe").0;
        send(&ours, &long, &[reader.as_fd()]).expect("send");
        let (message, fds) = recv::<String>(&theirs).expect("recv").expect("a message");
        assert!(message == long && fds.len() == 1);
        drop(ours);
        assert!(recv::<String>(&theirs).expect("recv").is_none());
    }

    #[test]
    fn a_message_in_a_pipe_is_not_waited_for() {
        let (ours, theirs) = pair().expect("pair");
        let (reader, _writer) = std::io::pipe().expect("pipe");
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let fds = [reader.as_fd()];
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
        let packet = [IoSlice::new(&[IN_FILE])];
        sendmsg(&ours, &packet, &mut ancillary, SendFlags::NOSIGNAL).expect("send");
        let error = recv::<String>(&theirs).expect_err("no file");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

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
