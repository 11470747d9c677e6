//! Messages of a sandbox to the tool. For all bytes, cut in any way, the decoder never panics and
//! never takes more than there is, and a decoded message can be encoded again.
//!
//! Part of two crates: the fuzz targets, and the tests of the init, which run it over the corpus.

use std::io::{self, Read, Write as _};
use std::os::unix::net::UnixStream;

use iii_init::frame::{self, MAX_REPORT, Received, Receiver};
use iii_init::packet::Socket;
use iii_init::vm::{FromGuest, Hello};

/// Gives pieces of a few bytes, and sometimes nothing yet.
struct Pieces<'a> {
    bytes: &'a [u8],
    at_most: usize,
    is_late: bool,
}

impl Read for Pieces<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.is_late = !self.is_late;
        if self.is_late {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let length = self.bytes.len().min(self.at_most).min(buffer.len());
        let (now, later) = self.bytes.split_at(length);
        buffer[..length].copy_from_slice(now);
        self.bytes = later;
        Ok(length)
    }
}

/// The messages of `bytes`, read in pieces of at most `at_most`.
fn heard(bytes: &[u8], at_most: usize) -> Vec<FromGuest> {
    let mut receiver = Receiver::new(MAX_REPORT);
    let mut pieces = Pieces {
        bytes,
        at_most,
        is_late: false,
    };
    let mut said = Vec::new();
    loop {
        match receiver.read(&mut pieces) {
            Ok(Received::Message(message)) => said.push(message),
            Ok(Received::Nothing) => {}
            Ok(Received::Closed) | Err(_) => return said,
        }
    }
}

/// A stream of pid 1's: how it begins, then messages.
pub fn check_guest_message(bytes: &[u8]) {
    if let Some(hello) = bytes.first_chunk().copied().and_then(Hello::from_bytes) {
        assert_eq!(hello.to_bytes(), bytes[..Hello::LEN]);
    }
    let bytes = bytes.get(Hello::LEN..).unwrap_or_default();
    let said = heard(bytes, usize::MAX);
    assert!(said.len() * 5 <= bytes.len(), "more than was said");
    assert_eq!(heard(bytes, 3), said);
    for message in said {
        let frame = frame::bytes_of(&message).expect("what is short can be said");
        assert_eq!(heard(&frame, 7), [message]);
    }

    // The same over a socket, which has another bound, and waits for the rest of what has begun.
    let (Ok((mut ours, theirs)), true) = (UnixStream::pair(), bytes.len() <= 64 << 10) else {
        return;
    };
    ours.write_all(bytes).expect("it fits");
    drop(ours);
    let socket = Socket::from(theirs);
    while let Ok(Some((_, fds))) = socket.recv::<FromGuest>() {
        assert!(fds.is_empty());
    }
}
