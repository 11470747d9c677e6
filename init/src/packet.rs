//! Messages over a pair of Unix stream sockets, as in [`frame`](crate::frame), with descriptors
//! that ride along.
//!
//! A stream, since that is the one kind of Unix socket that every system has and whose end is told.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read as _};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, send, sendmsg,
};
use serde::{Serialize, de::DeserializeOwned};

use crate::frame::{LENGTH, decode, framed};

/// Longest message, in bytes: the observations of a build step.
const MAX_MESSAGE: usize = 256 << 20;
/// Most descriptors in a message: three standard streams.
const MAX_FDS: usize = 3;

// Elsewhere a program asks for this once, for all that it does, as every Rust program has.
#[cfg(target_os = "linux")]
const NO_SIGNAL: SendFlags = SendFlags::NOSIGNAL;
#[cfg(not(target_os = "linux"))]
const NO_SIGNAL: SendFlags = SendFlags::empty();

// Elsewhere there is a moment in which another thread's child could inherit it.
#[cfg(target_os = "linux")]
const CLOSE_ON_EXEC: RecvFlags = RecvFlags::CMSG_CLOEXEC;
#[cfg(not(target_os = "linux"))]
const CLOSE_ON_EXEC: RecvFlags = RecvFlags::empty();

/// One end. Any number of threads may send, and one may receive.
#[derive(Debug)]
pub struct Socket {
    stream: UnixStream,
    /// Held while a message is sent, so that each stays in one piece.
    sending: Mutex<()>,
}

impl Socket {
    /// Two connected ends, which close on exec.
    pub fn pair() -> io::Result<(Self, Self)> {
        let (one, other) = UnixStream::pair()?;
        Ok((one.into(), other.into()))
    }

    /// The one that is this process's standard input, which becomes empty.
    pub fn take_stdin() -> io::Result<Self> {
        let socket = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?;
        rustix::stdio::dup2_stdin(File::open("/dev/null")?)?;
        Ok(socket.into())
    }

    /// Sends a message, with at most three descriptors.
    pub fn send(&self, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let frame = framed(message, MAX_MESSAGE)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::ErrorKind::ArgumentListTooLong.into());
        }
        let _whole = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        let pieces = [IoSlice::new(&frame)];
        let mut sent = rustix::io::retry_on_intr(|| {
            sendmsg(&self.stream, &pieces, &mut ancillary, NO_SIGNAL)
        })?;
        while let Some(rest) = frame.get(sent..).filter(|rest| !rest.is_empty()) {
            sent += rustix::io::retry_on_intr(|| send(&self.stream, rest, NO_SIGNAL))?;
        }
        Ok(())
    }

    /// The next message, and its descriptors; `None` once the other end is gone. Waits for the
    /// whole of a message that has begun.
    pub fn recv<T: DeserializeOwned>(&self) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        let mut length = [0; LENGTH];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        // Descriptors come with the first byte of their message.
        let received = rustix::io::retry_on_intr(|| {
            let mut pieces = [IoSliceMut::new(&mut length)];
            recvmsg(&self.stream, &mut pieces, &mut ancillary, CLOSE_ON_EXEC)
        });
        let come = match received {
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
        if come == 0 {
            return Ok(None);
        }
        #[cfg(not(target_os = "linux"))]
        for fd in &fds {
            rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC)?;
        }
        let rest = length.get_mut(come..).unwrap_or_default();
        (&self.stream).read_exact(rest)?;
        let length = u32::from_le_bytes(length) as usize;
        if length > MAX_MESSAGE {
            return Err(io::ErrorKind::InvalidData.into());
        }
        // It grows with the received bytes, not with the claimed length.
        let mut message = Vec::new();
        (&self.stream)
            .take(length as u64)
            .read_to_end(&mut message)?;
        if message.len() < length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Some((decode(&message)?, fds)))
    }

    /// Ends reading, writing, or both, for waiters at either end.
    pub fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        self.stream.shutdown(how)
    }

    /// Another descriptor of this end. Messages sent on both of them mix.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(self.stream.try_clone()?.into())
    }
}

impl From<UnixStream> for Socket {
    fn from(stream: UnixStream) -> Self {
        Self {
            stream,
            sending: Mutex::default(),
        }
    }
}

impl From<OwnedFd> for Socket {
    fn from(fd: OwnedFd) -> Self {
        UnixStream::from(fd).into()
    }
}

impl From<Socket> for OwnedFd {
    fn from(socket: Socket) -> Self {
        socket.stream.into()
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::thread;

    use super::*;

    #[test]
    fn messages_and_descriptors_arrive_together() {
        let (ours, theirs) = Socket::pair().expect("pair");
        // More than a socket holds, one without descriptors, and one that has them.
        let long = "x".repeat(1 << 20);
        let sent = long.clone();
        let sending = thread::spawn(move || {
            let (reader, mut writer) = std::io::pipe().expect("pipe");
            ours.send(&sent, &[reader.as_fd()]).expect("send");
            ours.send(&"and", &[]).expect("send");
            let fds = [reader.as_fd(), writer.as_fd(), reader.as_fd()];
            ours.send(&"three", &fds).expect("send");
            writer.write_all(b"from far").expect("write");
        });
        let mut last = Vec::new();
        for (message, count) in [(long.as_str(), 1), ("and", 0), ("three", 3)] {
            let (come, fds) = theirs.recv::<String>().expect("recv").expect("a message");
            assert!(
                come == message && fds.len() == count,
                "{count} of {message:.9}"
            );
            last = fds;
        }
        sending.join().expect("join");
        assert!(theirs.recv::<String>().expect("recv").is_none());
        let mut text = [0; 8];
        let mut pipe = std::fs::File::from(last.remove(0));
        pipe.read_exact(&mut text).expect("read");
        assert_eq!(&text, b"from far");
        let flags = rustix::io::fcntl_getfd(&last[0]).expect("fcntl");
        assert!(flags.contains(rustix::io::FdFlags::CLOEXEC));
    }

    #[test]
    fn messages_of_many_threads_stay_whole() {
        let (ours, theirs) = Socket::pair().expect("pair");
        let texts: Vec<_> = (0..4).map(|n| n.to_string().repeat(300_000)).collect();
        thread::scope(|scope| {
            for text in &texts {
                scope.spawn(|| ours.send(text, &[]).expect("send"));
            }
            let mut come: Vec<String> = (0..texts.len())
                .map(|_| theirs.recv().expect("recv").expect("a message").0)
                .collect();
            come.sort();
            assert!(come == texts);
        });
    }

    #[test]
    fn what_makes_no_sense_is_an_error() {
        let mut long = u32::MAX.to_le_bytes().to_vec();
        long.push(0);
        for (bytes, kind) in [
            (&long[..], io::ErrorKind::InvalidData),
            (&[1, 0, 0, 0, 0xff], io::ErrorKind::InvalidData),
            (&[0, 0, 0, 0], io::ErrorKind::InvalidData),
            (&[1, 0], io::ErrorKind::UnexpectedEof),
            (&[9, 0, 0, 0, 1], io::ErrorKind::UnexpectedEof),
        ] {
            let (mut ours, theirs) = UnixStream::pair().expect("pair");
            ours.write_all(bytes).expect("write");
            drop(ours);
            let error = Socket::from(theirs)
                .recv::<String>()
                .expect_err("no message");
            assert_eq!(error.kind(), kind, "{bytes:?}");
        }
    }

    #[test]
    fn an_end_that_is_gone_is_told() {
        let (ours, theirs) = Socket::pair().expect("pair");
        ours.send(&"unread", &[]).expect("send");
        drop(theirs);
        assert!(ours.recv::<String>().expect("recv").is_none());
        let error = ours.send(&"more", &[]).expect_err("nobody");
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    }
}
