//! Messages between the tool and pid 1 of a microVM, over vsock: one connection to [`PORT`]
//! for messages, framed, and one for each stream of a command. Every connection begins with a
//! [`Hello`] that says what it is.
//!
//! ```text
//! pid 1                          tool
//!  Hello(control), Ready      ->
//!                             <- Start
//!  Hello(stream) ...          ->
//!  Report::Running(MAIN)      ->
//!                             <- Request ...
//!  Report::Exited(MAIN)       ->
//!                             <- closes, having read all streams to their ends
//!  sync, power off
//! ```

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::message::{Command, CommandId, HostFile, Report, Request};

/// The port of the host that pid 1 connects to.
pub const PORT: u32 = 49_134;

/// Purpose of a connection, in its first [`Hello::LEN`] bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Hello {
    /// Messages.
    Control,
    /// The command's standard input, or both ways of its terminal.
    Input(CommandId),
    /// Its standard output.
    Output(CommandId),
    /// Its standard error.
    Errors(CommandId),
}

impl Hello {
    /// Length in bytes.
    pub const LEN: usize = 5;

    /// The bytes on the wire.
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let (kind, id) = match self {
            Self::Control => (0, 0),
            Self::Input(id) => (1, id),
            Self::Output(id) => (2, id),
            Self::Errors(id) => (3, id),
        };
        let [a, b, c, d] = id.to_le_bytes();
        [kind, a, b, c, d]
    }

    /// The purpose that was sent, if it is valid.
    pub fn from_bytes([kind, id @ ..]: [u8; Self::LEN]) -> Option<Self> {
        let id = u32::from_le_bytes(id);
        match kind {
            0 if id == 0 => Some(Self::Control),
            1 => Some(Self::Input(id)),
            2 => Some(Self::Output(id)),
            3 => Some(Self::Errors(id)),
            _ => None,
        }
    }
}

/// The tool's first message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// Host name.
    pub hostname: String,
    /// The host's clock, since 1970.
    pub now: Duration,
    /// The host's settings.
    pub files: Vec<HostFile>,
    /// Directories of the host, each a virtiofs of its own.
    pub volumes: Vec<Volume>,
    /// The main command.
    pub command: Command,
}

/// A directory of the host that is visible inside.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// The tag of its virtiofs.
    pub tag: String,
    /// Absolute path inside; created when missing.
    pub target: String,
}

/// From the tool to pid 1.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToGuest {
    /// First, and once.
    Start(Box<Start>),
    /// Afterwards.
    Request(Request),
}

/// From pid 1 to the tool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromGuest {
    /// First: the kernel is up.
    Ready,
    /// Afterwards.
    Report(Report),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hellos_are_what_they_were() {
        for hello in [
            Hello::Control,
            Hello::Input(0),
            Hello::Output(1),
            Hello::Errors(u32::MAX),
        ] {
            assert_eq!(Hello::from_bytes(hello.to_bytes()), Some(hello));
        }
        assert_eq!(Hello::from_bytes([4, 0, 0, 0, 0]), None);
        assert_eq!(Hello::from_bytes([0, 1, 0, 0, 0]), None);
    }
}
