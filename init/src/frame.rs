//! Messages over a byte stream: four bytes of length, little-endian, then the message.

use std::io::{self, Read, Write};

use serde::{Serialize, de::DeserializeOwned};

/// Largest message of a machine: an environment, and the host's certificates.
pub const MAX_FRAME: usize = 16 << 20;
/// Largest message that a sandbox may send.
pub const MAX_REPORT: usize = 4096;

/// Bytes of a message's length.
pub(crate) const LENGTH: usize = 4;

/// How much is read at once. A frame's buffer grows with the received bytes, not with its claimed
/// length.
const PIECE: usize = 8 << 10;

/// Sends a message that is no longer than [`MAX_FRAME`].
pub fn send(stream: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    stream.write_all(&bytes_of(message)?)
}

/// The frame of a message of at most [`MAX_FRAME`] bytes.
pub fn bytes_of(message: &impl Serialize) -> io::Result<Vec<u8>> {
    framed(message, MAX_FRAME)
}

/// The frame of a message of at most `limit` bytes, which fits into a length.
pub(crate) fn framed(message: &impl Serialize, limit: usize) -> io::Result<Vec<u8>> {
    let mut frame = postcard::to_extend(message, vec![0; LENGTH]).map_err(invalid)?;
    let length = frame.len() - LENGTH;
    if length > limit {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    for (to, byte) in frame.iter_mut().zip((length as u32).to_le_bytes()) {
        *to = byte;
    }
    Ok(frame)
}

/// The message in these bytes.
pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> io::Result<T> {
    postcard::from_bytes(bytes).map_err(invalid)
}

fn invalid(error: postcard::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// Puts messages together from what a stream brings.
#[derive(Debug)]
pub struct Receiver {
    bytes: Vec<u8>,
    limit: usize,
}

/// The result of [`Receiver::read`].
#[derive(Debug, PartialEq, Eq)]
pub enum Received<T> {
    /// A message.
    Message(T),
    /// A message is not complete yet, and reading on would block.
    Nothing,
    /// The stream has ended.
    Closed,
}

impl Receiver {
    /// For messages of at most `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self {
            bytes: Vec::new(),
            limit,
        }
    }

    /// The next message. Blocks where the stream does; where that would block,
    /// [`Received::Nothing`]. Fails on a message that is too long or makes no sense: the stream has
    /// lost its place then.
    pub fn read<T: DeserializeOwned>(&mut self, stream: &mut impl Read) -> io::Result<Received<T>> {
        let mut piece = [0; PIECE];
        loop {
            if let Some(message) = self.take()? {
                return Ok(Received::Message(message));
            }
            match stream.read(&mut piece) {
                Ok(0) => return Ok(Received::Closed),
                Ok(length) => self.bytes.extend(piece.iter().take(length)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(Received::Nothing);
                }
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Ok(Received::Closed);
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn take<T: DeserializeOwned>(&mut self) -> io::Result<Option<T>> {
        let Some((length, rest)) = self.bytes.split_first_chunk::<LENGTH>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*length) as usize;
        if length > self.limit {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let Some(body) = rest.get(..length) else {
            return Ok(None);
        };
        let message = decode(body)?;
        self.bytes.drain(..LENGTH + length);
        Ok(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::{Failure, Step};
    use crate::message::{MAIN, Report};

    /// Gives one byte at a time, and between them nothing.
    struct Trickle<'a>(&'a [u8], bool);

    impl Read for Trickle<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.1 = !self.1;
            if self.1 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let length = self.0.len().min(1);
            buffer[..length].copy_from_slice(&self.0[..length]);
            self.0 = &self.0[length..];
            Ok(length)
        }
    }

    #[test]
    fn messages_arrive_whole_however_they_are_cut() {
        let sent = [Report::Running(7), Report::Exited(7, 256)];
        let mut bytes = Vec::new();
        for report in &sent {
            send(&mut bytes, report).expect("send");
        }
        let mut stream = Trickle(&bytes, false);
        let (mut receiver, mut came) = (Receiver::new(100), Vec::new());
        loop {
            match receiver.read::<Report>(&mut stream).expect("read") {
                Received::Message(report) => came.push(report),
                Received::Nothing => {}
                Received::Closed => break,
            }
        }
        assert_eq!(came, sent);
    }

    #[test]
    fn the_longest_failure_is_a_report() {
        let enoent = io::Error::from_raw_os_error(libc::ENOENT);
        let failure = Failure::new(Step::Bind, "ü".repeat(MAX_REPORT), &enoent);
        let bytes =
            framed(&Report::Failed(MAIN, failure), MAX_REPORT).expect("no longer than that");
        let read = Receiver::new(MAX_REPORT).read(&mut bytes.as_slice());
        let Ok(Received::Message(Report::Failed(MAIN, Failure { step, what, errno }))) = read
        else {
            panic!("{read:?}");
        };
        assert_eq!((step, errno), (Step::Bind, libc::ENOENT));
        assert!(what.chars().all(|c| c == 'ü') && what.len() <= Failure::MAX_WHAT);
    }

    #[test]
    fn garbage_is_an_error() {
        for bytes in [
            &[0xff; 4][..],
            &[1, 0, 0, 0, 0xff],
            &[0, 0, 0, 0],
            &[101, 0, 0, 0, 0, 0],
        ] {
            let mut bytes = bytes;
            let read = Receiver::new(100).read::<Report>(&mut bytes);
            assert!(read.is_err(), "{bytes:?}");
        }
    }
}
