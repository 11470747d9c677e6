//! A process that wants something of a sandbox that another process runs.

use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use iii_init::packet::Socket;
use iii_sandbox::Size;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::Signal;

use super::{Asked, ExecError, FromClient, NotTaken, ToClient, at, at_address};
use crate::worker::snapshot::{Keeper, SnapshotError, Taken};

/// A connection to the process that runs a sandbox.
#[derive(Debug)]
pub struct Client(Socket);

impl Client {
    /// To the sandbox `name`, whose directory is `dir`.
    pub fn connect(dir: &Path, name: &str) -> Result<Self, ExecError> {
        let server = at_address(dir, |path| UnixStream::connect(path));
        let server = server.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ExecError::NotRunning {
                name: name.to_owned(),
            },
            _ => at("connect to the process that runs the sandbox")(error),
        })?;
        Ok(Self(server.into()))
    }

    /// Starts a command on three streams, or on a socket that stands for its terminal.
    pub fn run(self, asked: Asked, fds: &[BorrowedFd<'_>]) -> Result<RemoteCommand, ExecError> {
        let sent = self.0.send(&FromClient::Run(asked), fds);
        sent.map_err(at("ask for the command"))?;
        Ok(RemoteCommand(self.0))
    }
}

/// A command that runs in a sandbox. When this is dropped, the command is killed.
#[derive(Debug)]
pub struct RemoteCommand(Socket);

impl RemoteCommand {
    /// Gives its terminal a size.
    pub fn resize(&self, size: Size) -> io::Result<()> {
        self.0.send(&FromClient::Resize(size), &[])
    }

    /// Waits for its end, and kills it when `timeout` is over.
    pub fn wait(&self, timeout: Option<Duration>) -> Result<ExitStatus, ExecError> {
        let is_over = answers_within(timeout, Instant::now, |limit| {
            poll(&mut [PollFd::new(&self.0, PollFlags::IN)], limit)
        });
        match (is_over.map_err(at("wait for the command"))?, timeout) {
            (false, Some(limit)) => {
                let kill = FromClient::Signal(Signal::KILL.as_raw());
                let sent = self.0.send(&kill, &[]);
                sent.map_err(at("end the command"))?;
                Err(ExecError::Timeout { limit })
            }
            _ => match answer(&self.0)? {
                ToClient::Exited(status) => Ok(ExitStatus::from_raw(status)),
                ToClient::Refused(source, code) => Err(ExecError::Refused { source, code }),
                _ => Err(ExecError::Ended),
            },
        }
    }
}

/// Polls until there is an answer. False once `timeout` is over, which a signal does not begin
/// anew.
fn answers_within(
    timeout: Option<Duration>,
    now: impl Fn() -> Instant,
    mut poll: impl FnMut(Option<&Timespec>) -> rustix::io::Result<usize>,
) -> rustix::io::Result<bool> {
    // A deadline beyond the clock's range means no deadline.
    let deadline = timeout.and_then(|timeout| now().checked_add(timeout));
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(now()));
        let limit = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(limit.as_ref()) {
            Err(Errno::INTR) if left.is_some_and(|left| left.is_zero()) => return Ok(false),
            Err(Errno::INTR) => {}
            Ok(count) => return Ok(count > 0),
            Err(error) => return Err(error),
        }
    }
}

fn answer(server: &Socket) -> Result<ToClient, ExecError> {
    match server.recv().map_err(at("hear of the command"))? {
        Some((answer, _)) => Ok(answer),
        None => Err(ExecError::Ended),
    }
}

/// Asks the process that runs the sandbox `name`, whose directory is `dir`, to freeze what it
/// wrote.
pub(crate) fn ask_for_snapshot(
    dir: &Path,
    name: &str,
    keeper: Keeper,
) -> Result<Result<Taken, SnapshotError>, ExecError> {
    let Client(server) = Client::connect(dir, name)?;
    server
        .send(&FromClient::Snapshot(keeper), &[])
        .map_err(at("ask for the snapshot"))?;
    let name = name.to_owned();
    Ok(match answer(&server)? {
        ToClient::Taken(taken) => Ok(taken),
        ToClient::NotTaken(NotTaken::InVm) => Err(SnapshotError::InVm { name }),
        ToClient::NotTaken(NotTaken::Exists(tag)) => Err(SnapshotError::Exists { name, tag }),
        ToClient::NotTaken(NotTaken::Failed(source)) => Err(SnapshotError::Remote { name, source }),
        _ => return Err(ExecError::Ended),
    })
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const STEP: Duration = Duration::from_millis(40);

    #[test]
    fn a_signal_does_not_begin_the_timeout_anew() {
        let (start, ticks) = (Instant::now(), Cell::new(0));
        let polls = Cell::new(0);
        // Each wait ends after 40 ms, by a signal.
        let answered = answers_within(
            Some(3 * STEP),
            || start + STEP * ticks.get(),
            |limit| {
                polls.set(polls.get() + 1);
                assert!(polls.get() < 10, "it would wait for ever");
                let limit = Duration::try_from(*limit.unwrap()).unwrap();
                assert_eq!(limit, STEP * 3_u32.saturating_sub(ticks.get()));
                ticks.set(ticks.get() + 1);
                Err(Errno::INTR)
            },
        );
        assert_eq!(answered, Ok(false));
    }

    #[test]
    fn an_answer_ends_the_wait() {
        for (timeout, result) in [
            (None, Ok(1)),
            (Some(STEP), Ok(1)),
            (Some(Duration::MAX), Ok(1)),
            (Some(STEP), Ok(0)),
            (None, Err(Errno::BADF)),
        ] {
            let answered = answers_within(timeout, Instant::now, |_| result);
            assert_eq!(answered, result.map(|count| count > 0), "{timeout:?}");
        }
    }
}
