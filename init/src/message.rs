//! Messages between the tool and a sandbox's pid 1, over any transport.
//!
//! Either side may be hostile to the other. A message is decoded into these types, within the
//! bounds of its carrier, before anything is done; an id that is not known means nothing.

use std::ffi::OsString;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::failure::Failure;

/// Names a command of a sandbox. The tool chooses it, and never twice.
pub type CommandId = u32;

/// The command that the sandbox is for: its end is the sandbox's.
pub const MAIN: CommandId = 0;

/// Most commands that run at once beside the main one.
pub const MAX_COMMANDS: usize = 256;

/// A command to run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    /// The program and its arguments. A name without `/` is looked up in the `PATH` of `env`.
    pub argv: Vec<OsString>,
    /// The whole environment, but for `HOME` of the user, which is added where absent.
    pub env: Vec<(String, String)>,
    /// Working directory, absolute; created when missing.
    pub cwd: String,
    /// As `User` in an OCI image's config, looked up inside.
    pub user: String,
    /// Gives the command a terminal of this size in place of three streams.
    pub terminal: Option<Size>,
}

/// The size of a terminal, in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// A file on the read-only tmpfs at `/run/iii`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFile {
    /// Its name there.
    pub name: String,
    /// The path it covers, too.
    pub covers: Option<String>,
    /// Its contents.
    pub contents: String,
}

/// From the tool to pid 1, once the sandbox is set up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Run one more command. Answered by [`Report::Running`] or [`Report::Failed`].
    Run(CommandId, Box<Command>),
    /// Send a signal to the command's process group.
    Signal(CommandId, i32),
    /// Change the size of the command's terminal.
    Resize(CommandId, Size),
    /// End the sandbox: the signal to the main command's process group; once that has ended, to
    /// whatever it left running; after the grace, SIGKILL to all. Again, it can only shorten the
    /// grace.
    Stop {
        /// The signal.
        signal: i32,
        /// How long they have.
        grace: Duration,
    },
    /// Run another main command in place of the one that runs, on the same streams, which only a
    /// command can have that was given its own. The signal goes to the process group of the old one
    /// and, once that has ended, to whatever it left running, if no command runs beside it; after
    /// the grace, SIGKILL. Answered by [`Report::Running`] or [`Report::Failed`]; by neither, if
    /// the sandbox ends first.
    Restart {
        /// The new command.
        command: Box<Command>,
        /// The signal.
        signal: i32,
        /// How long they have.
        grace: Duration,
    },
}

/// From pid 1 to the tool.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Report {
    /// The command was executed.
    Running(CommandId),
    /// The command has ended with this wait status, and all that it printed is on its way.
    Exited(CommandId, i32),
    /// The command could not be run; of [`MAIN`], the sandbox is not to be.
    Failed(CommandId, Failure),
}
