//! Bytes from one descriptor to another, as they come.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::rc::Rc;

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};

/// Bytes that are held between reading and writing. A kernel that has no memory for more in one
/// piece sends a longer write over vsock in several, which `msb_krun` 0.1 drops.
const BUFFER: usize = 16 << 10;

/// Buffers filled before others get their turn.
const TURN: usize = 16;

/// Moves bytes between two descriptors that do not block. When nothing more comes, the receiver is
/// told.
#[derive(Debug)]
pub struct Pump {
    from: Rc<OwnedFd>,
    to: Rc<OwnedFd>,
    /// Bytes that were read and not yet written.
    held: Vec<u8>,
    /// The writers have ended: after the present bytes, no more come.
    last: bool,
    /// Nothing more comes.
    ended: bool,
}

impl Pump {
    /// Both descriptors are set not to block, which concerns everybody who shares them.
    pub fn new(from: Rc<OwnedFd>, to: Rc<OwnedFd>) -> rustix::io::Result<Self> {
        rustix::io::ioctl_fionbio(&from, true)?;
        rustix::io::ioctl_fionbio(&to, true)?;
        Ok(Self {
            from,
            to,
            held: Vec::new(),
            last: false,
            ended: false,
        })
    }

    /// Events to wait for before the next [`Self::step`].
    pub fn interest(&self) -> (BorrowedFd<'_>, PollFlags) {
        if self.held.is_empty() {
            (self.from.as_fd(), PollFlags::IN)
        } else {
            (self.to.as_fd(), PollFlags::OUT)
        }
    }

    /// Makes the present bytes the last, even if a process could write more.
    pub fn finish(&mut self) {
        self.last = true;
    }

    /// Moves what can be moved. False once nothing more will be.
    pub fn step(&mut self) -> bool {
        for _ in 0..TURN {
            match self.empty() {
                Ok(()) => {}
                Err(Errno::AGAIN) => return true,
                // The reader is gone; the writer sees it when `from` closes.
                Err(_) => return false,
            }
            if self.ended {
                let _ = shutdown(&self.to, Shutdown::Write);
                return false;
            }
            self.fill();
            if self.held.is_empty() && !self.ended {
                return true;
            }
        }
        true
    }

    fn empty(&mut self) -> rustix::io::Result<()> {
        while !self.held.is_empty() {
            let written = rustix::io::retry_on_intr(|| rustix::io::write(&self.to, &self.held))?;
            self.held.drain(..written);
        }
        Ok(())
    }

    fn fill(&mut self) {
        self.held.resize(BUFFER, 0);
        let read = rustix::io::retry_on_intr(|| rustix::io::read(&self.from, &mut self.held));
        self.held.truncate(*read.as_ref().unwrap_or(&0));
        self.ended = match read {
            Ok(length) => length == 0,
            Err(Errno::AGAIN) => self.last,
            // A terminal's master fails with EIO when the last slave is closed.
            Err(_) => true,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::pipe::pipe;

    #[test]
    fn moves_everything_and_tells_of_the_end() {
        let (from, writer) = pipe().unwrap();
        let (reader, to) = pipe().unwrap();
        let mut pump = Pump::new(Rc::new(from), Rc::new(to)).unwrap();
        assert!(pump.step(), "nothing has come yet");
        let sent = vec![7; 40_000];
        rustix::io::write(&writer, &sent).unwrap();
        assert!(pump.step());
        rustix::io::write(&writer, &sent).unwrap();
        assert!(pump.step(), "a full pipe has to wait for its reader");
        assert_eq!(pump.interest().1, PollFlags::OUT);
        let mut received = vec![0; 1 << 20];
        let mut length = rustix::io::read(&reader, &mut received).unwrap();
        // The writer lives on, but what it wrote is taken for the last.
        pump.finish();
        assert!(!pump.step());
        drop(pump);
        while let Ok(more @ 1..) = rustix::io::read(&reader, &mut received) {
            length += more;
        }
        assert_eq!(length, 2 * sent.len());
        drop(writer);
    }

    #[test]
    fn ends_when_nobody_reads() {
        let (from, writer) = pipe().unwrap();
        let (reader, to) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut pump = Pump::new(Rc::new(from), Rc::new(to.into())).unwrap();
        drop(reader);
        rustix::io::write(&writer, b"x").unwrap();
        assert!(!pump.step());
    }
}
