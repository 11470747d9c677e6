//! Pid 1 at work: runs commands, moves their input and output, forwards signals, reaps, and reports
//! their ends.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, Signal, WaitOptions, kill_process_group, test_kill_process_group, wait,
};
use rustix::pty::{OpenptFlags, grantpt, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::failure::{At as _, Failure, Step};
use crate::message::{Command, CommandId, MAIN, MAX_COMMANDS, Report, Request, Size};
use crate::process::{self, Kernel, Streams};
use crate::pump::Pump;
use crate::signals::Signals;

/// How the tool is reached.
pub trait Link {
    /// Becomes readable when the tool has said something.
    fn as_fd(&self) -> BorrowedFd<'_>;
    /// The tool's messages; called when one may have arrived.
    fn receive(&mut self) -> io::Result<Received>;
    /// Tells the tool.
    fn report(&mut self, report: &Report) -> io::Result<()>;
    /// Connects a command's streams; `fds` came along with the request.
    fn connect(
        &mut self,
        id: CommandId,
        command: &Command,
        fds: Vec<OwnedFd>,
    ) -> io::Result<Connected>;
}

/// The result of reading a [`Link`].
#[derive(Debug)]
pub enum Received {
    /// A request, and descriptors that came along.
    Request(Request, Vec<OwnedFd>),
    /// Nothing, or not all of it.
    Nothing,
    /// The tool is gone, or talks nonsense.
    Closed,
}

/// Where a command's streams lead.
#[derive(Debug)]
pub enum Connected {
    /// To these descriptors themselves.
    Direct(Streams),
    /// Through pipes to these, which are this process's own: input, output, errors.
    Pipes([OwnedFd; 3]),
    /// Through a terminal to this, which is this process's own and goes both ways.
    Terminal(OwnedFd),
}

/// A command that was executed.
struct Running {
    /// Leads its group, which outlives it while members are left.
    pid: Pid,
    /// Its wait status, once it has ended.
    status: Option<i32>,
    pumps: Vec<Pump>,
    /// Those of `pumps` that bring output come first.
    outputs: usize,
    terminal: Option<Rc<OwnedFd>>,
}

/// A stop that was asked for.
struct Stop {
    signal: i32,
    /// `None` for a grace beyond the clock's range.
    deadline: Option<Instant>,
}

/// A main command that is to take the place of the one that runs.
struct Restart {
    command: Command,
    /// How the one that runs is ended.
    stop: Stop,
}

impl Stop {
    /// One that leaves no more time than the one before it.
    fn new(signal: i32, grace: Duration, before: Option<&Self>) -> Self {
        let new = Instant::now().checked_add(grace);
        let old = before.and_then(|before| before.deadline);
        let deadline = old.into_iter().chain(new).min();
        Self { signal, deadline }
    }
}

/// Supervises one sandbox.
pub struct Supervisor<L> {
    link: L,
    kernel: Kernel,
    signals: Signals,
    commands: BTreeMap<CommandId, Running>,
    /// Those of the main command, for the one that takes its place.
    streams: Option<Streams>,
    stop: Option<Stop>,
    /// Nothing while there is a stop.
    restart: Option<Restart>,
}

impl<L: Link> Supervisor<L> {
    /// Runs the main command and reports that.
    pub fn start(
        link: L,
        kernel: Kernel,
        command: &Command,
        fds: Vec<OwnedFd>,
    ) -> Result<Self, Failure> {
        let signals = Signals::block().at(Step::Fork, "")?;
        let mut supervisor = Self {
            link,
            kernel,
            signals,
            commands: BTreeMap::new(),
            streams: None,
            stop: None,
            restart: None,
        };
        supervisor.run(MAIN, command, fds)?;
        supervisor
            .link
            .report(&Report::Running(MAIN))
            .at(Step::Talk, "")?;
        Ok(supervisor)
    }

    /// Serves until the main command has ended, its output is on its way, and its children
    /// behind has had its chance; reports that. Remaining processes die with this one.
    /// False if the tool is gone.
    pub fn supervise(&mut self) -> bool {
        loop {
            let all_gone = self.reap();
            self.pump();
            let restart = self.restart.as_ref().map(|restart| &restart.stop);
            let stop = self.stop.as_ref().or(restart);
            let deadline = stop.and_then(|stop| stop.deadline);
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if self.restart.is_some() {
                let told = if self.makes_room(all_gone, left) {
                    self.run_again()
                } else {
                    // A killed process has no more time, and ends all the same.
                    self.report_ended() && self.wait(left.filter(|left| !left.is_zero()))
                };
                if !told {
                    return false;
                }
                continue;
            }
            let main = self.commands.get(&MAIN);
            let status = main.and_then(|main| main.status);
            let drained = main.is_none_or(|main| main.outputs == 0);
            let ended = match status {
                Some(status) if drained && (self.stop.is_none() || all_gone) => Some(status),
                _ if left == Some(Duration::ZERO) => Some(status.unwrap_or(libc::SIGKILL)),
                _ => None,
            };
            if let Some(status) = ended {
                return self.link.report(&Report::Exited(MAIN, status)).is_ok();
            }
            if !self.report_ended() || !self.wait(left) {
                return false;
            }
        }
    }

    /// The link, once nothing is left to supervise.
    pub fn into_link(self) -> L {
        self.link
    }

    fn run(&mut self, id: CommandId, command: &Command, fds: Vec<OwnedFd>) -> Result<(), Failure> {
        let connected = self.link.connect(id, command, fds).at(Step::Streams, "")?;
        let running = match connected {
            Connected::Direct(streams) => {
                if id == MAIN {
                    self.streams = Some(streams.try_clone().at(Step::Streams, "")?);
                }
                self.with_streams(command, streams)?
            }
            Connected::Pipes(ends) => self.with_pipes(command, ends)?,
            Connected::Terminal(end) => self.with_terminal(command, end)?,
        };
        self.commands.insert(id, running);
        Ok(())
    }

    fn with_streams(&self, command: &Command, streams: Streams) -> Result<Running, Failure> {
        Ok(Running {
            pid: process::spawn(command, self.kernel, streams)?,
            status: None,
            pumps: Vec::new(),
            outputs: 0,
            terminal: None,
        })
    }

    fn with_pipes(&self, command: &Command, ends: [OwnedFd; 3]) -> Result<Running, Failure> {
        let pipe =
            || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).at(Step::Streams, "");
        let pump = |from, to| Pump::new(Rc::new(from), Rc::new(to)).at(Step::Streams, "");
        let [stdin, stdout, stderr] = ends;
        let ((input, to_input), (from_output, output), (from_errors, errors)) =
            (pipe()?, pipe()?, pipe()?);
        let pumps = vec![
            pump(from_output, stdout)?,
            pump(from_errors, stderr)?,
            pump(stdin, to_input)?,
        ];
        let fds = [input, output, errors];
        let streams = Streams::Three { fds, owned: true };
        Ok(Running {
            pid: process::spawn(command, self.kernel, streams)?,
            status: None,
            pumps,
            outputs: 2,
            terminal: None,
        })
    }

    fn with_terminal(&self, command: &Command, end: OwnedFd) -> Result<Running, Failure> {
        let (master, slave) = terminal().at(Step::Streams, "a terminal")?;
        if let Some(size) = command.terminal {
            // A size is a convenience.
            let _ = resize(&master, size);
        }
        let (master, end) = (Rc::new(master), Rc::new(end));
        let pump = |from: &Rc<_>, to: &Rc<_>| {
            Pump::new(Rc::clone(from), Rc::clone(to)).at(Step::Streams, "")
        };
        let pumps = vec![pump(&master, &end)?, pump(&end, &master)?];
        Ok(Running {
            pid: process::spawn(command, self.kernel, Streams::Terminal(slave))?,
            status: None,
            pumps,
            outputs: 1,
            terminal: Some(master),
        })
    }

    /// Whether the main command that is to go has gone, with its children. Processes that
    /// remain when no time is `left` are killed.
    fn makes_room(&self, all_gone: bool, left: Option<Duration>) -> bool {
        let Some(main) = self.commands.get(&MAIN) else {
            return true;
        };
        let (ended, over) = (main.status.is_some(), left == Some(Duration::ZERO));
        if over {
            self.signal(MAIN, libc::SIGKILL);
        }
        if !self.is_alone() {
            // While a group has members, no other process gets its number.
            return ended && (over || test_kill_process_group(main.pid).is_err());
        }
        if over && ended {
            tell_all(libc::SIGKILL);
        }
        all_gone
    }

    /// Runs the command that was to take the main one's place. False if that cannot be told.
    fn run_again(&mut self) -> bool {
        let Some(Restart { command, .. }) = self.restart.take() else {
            return true;
        };
        let streams = match &self.streams {
            Some(streams) => streams.try_clone(),
            None => Err(io::ErrorKind::Unsupported.into()),
        };
        let run = streams
            .at(Step::Streams, "")
            .and_then(|streams| self.with_streams(&command, streams));
        let report = match run {
            Ok(running) => {
                self.commands.insert(MAIN, running);
                Report::Running(MAIN)
            }
            Err(failure) => Report::Failed(MAIN, failure),
        };
        self.link.report(&report).is_ok()
    }

    /// Whether no command runs beside the main one, so that every process is the main one's.
    fn is_alone(&self) -> bool {
        self.commands.keys().all(|id| *id == MAIN)
    }

    /// Reaps ended processes; whether none is left. When the main command ends during a
    /// stop, the others hear of it.
    fn reap(&mut self) -> bool {
        let alone = self.is_alone();
        loop {
            match wait(WaitOptions::NOHANG) {
                Ok(Some((pid, ended))) => {
                    let ours = self
                        .commands
                        .iter_mut()
                        .find(|(_, command)| command.pid == pid);
                    let Some((id, command)) = ours else { continue };
                    command.status = Some(ended.as_raw());
                    for output in command.pumps.iter_mut().take(command.outputs) {
                        output.finish();
                    }
                    let restart = self.restart.as_ref().filter(|_| alone);
                    let stop = self.stop.as_ref().or(restart.map(|restart| &restart.stop));
                    if let (&MAIN, Some(stop)) = (id, stop) {
                        tell_all(stop.signal);
                    }
                }
                Ok(None) => return false,
                Err(_) => return true,
            }
        }
    }

    /// Moves bytes as far as possible.
    fn pump(&mut self) {
        for command in self.commands.values_mut() {
            let outputs = command.outputs;
            let mut index = 0;
            command.pumps.retain_mut(|pump| {
                let is_output = index < outputs;
                index += 1;
                let goes_on = pump.step();
                if is_output && !goes_on {
                    command.outputs -= 1;
                }
                goes_on
            });
        }
    }

    /// Reports the commands beside the main one that have ended. False if the tool is gone.
    fn report_ended(&mut self) -> bool {
        let ended = |(&id, command): (&CommandId, &Running)| {
            let status = command.status.filter(|_| command.outputs == 0)?;
            (id != MAIN).then_some((id, status))
        };
        let ended: Vec<_> = self.commands.iter().filter_map(ended).collect();
        ended.into_iter().all(|(id, status)| {
            self.commands.remove(&id);
            self.link.report(&Report::Exited(id, status)).is_ok()
        })
    }

    /// Waits until there is something to do, at most for `left`, and carries out the tool's
    /// requests. False if it is gone.
    fn wait(&mut self, left: Option<Duration>) -> bool {
        let left = left.and_then(|left| Timespec::try_from(left).ok());
        let mut fds = vec![
            PollFd::from_borrowed_fd(self.link.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.signals.as_fd(), PollFlags::IN),
        ];
        for pump in self.commands.values().flat_map(|command| &command.pumps) {
            let (fd, flags) = pump.interest();
            fds.push(PollFd::from_borrowed_fd(fd, flags));
        }
        let polled = poll(&mut fds, left.as_ref());
        let spoke = fds.first().is_some_and(|link| !link.revents().is_empty());
        self.signals.drain();
        if polled.is_err() || !spoke {
            return true;
        }
        match self.link.receive() {
            Ok(Received::Request(request, fds)) => self.serve(request, fds),
            Ok(Received::Nothing) => true,
            Ok(Received::Closed) | Err(_) => false,
        }
    }

    /// Carries out the tool's requests. False if their outcome cannot be reported.
    fn serve(&mut self, request: Request, fds: Vec<OwnedFd>) -> bool {
        match request {
            Request::Run(id, command) => {
                let room = self.commands.len() <= MAX_COMMANDS && !self.commands.contains_key(&id);
                let run = if room {
                    self.run(id, &command, fds)
                } else {
                    Err(rustix::io::Errno::AGAIN).at(Step::Fork, "")
                };
                let report = match run {
                    Ok(()) => Report::Running(id),
                    Err(failure) => Report::Failed(id, failure),
                };
                return self.link.report(&report).is_ok();
            }
            Request::Signal(id, signal) => self.signal(id, signal),
            Request::Resize(id, size) => {
                let command = self.commands.get(&id);
                if let Some(terminal) = command.and_then(|command| command.terminal.as_ref()) {
                    let _ = resize(terminal, size);
                }
            }
            Request::Stop { signal, grace } => {
                self.stop = Some(Stop::new(signal, grace, self.stop.as_ref()));
                self.signal(MAIN, signal);
                let main = self.commands.get(&MAIN);
                if self.restart.take().is_some() && main.is_none_or(|main| main.status.is_some()) {
                    tell_all(signal);
                }
            }
            // A command that is being stopped does not restart.
            Request::Restart { .. } if self.stop.is_some() => {}
            Request::Restart {
                command,
                signal,
                grace,
            } => {
                let old = self.restart.as_ref().map(|restart| &restart.stop);
                let stop = Stop::new(signal, grace, old);
                let command = *command;
                self.restart = Some(Restart { command, stop });
                self.signal(MAIN, signal);
            }
        }
        true
    }

    fn signal(&self, id: CommandId, signal: i32) {
        if let (Some(command), Some(signal)) =
            (self.commands.get(&id), Signal::from_named_raw(signal))
        {
            let _ = kill_process_group(command.pid, signal);
        }
    }
}

/// Sends a signal to everybody in this sandbox.
fn tell_all(signal: i32) {
    // SAFETY: -1 means everybody in this pid namespace but us.
    unsafe { libc::kill(-1, signal) };
}

/// A terminal of this sandbox: master and slave.
fn terminal() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, flags)?;
    Ok((master, slave))
}

fn resize(terminal: &OwnedFd, size: Size) -> rustix::io::Result<()> {
    let size = Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(terminal, size)
}
