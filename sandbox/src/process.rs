//! Processes of this machine that need not be children of this one.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal};

pub use system::started;

/// A process that ran when this was made. It stays that one, even if a later process gets its pid.
#[derive(Debug)]
pub struct Process {
    /// Becomes readable when it ends.
    end: OwnedFd,
    /// Where that descriptor cannot be sent a signal: the pid, and what tells the process from one
    /// that has the pid later.
    #[cfg(not(target_os = "linux"))]
    id: (Pid, u64),
}

impl Process {
    /// The process that has this pid now.
    pub fn open(pid: i32) -> io::Result<Self> {
        let no_such = || io::Error::from(rustix::io::Errno::SRCH);
        let pid = Pid::from_raw(pid).ok_or_else(no_such)?;
        #[cfg(not(target_os = "linux"))]
        let began = started(pid.as_raw_pid()).ok_or_else(no_such)?;
        let end = system::open(pid)?;
        // Another one may have got the pid before its end was asked for.
        #[cfg(not(target_os = "linux"))]
        if started(pid.as_raw_pid()) != Some(began) {
            return Err(no_such());
        }
        Ok(Self {
            end,
            #[cfg(not(target_os = "linux"))]
            id: (pid, began),
        })
    }

    /// Sends a signal. It does nothing where the process has ended. Where the system has no handles
    /// of processes (macOS), one that gets the pid in the moment between a look and the signal is
    /// hit in its place.
    pub fn signal(&self, signal: Signal) {
        // It can only fail for one that has ended, or belongs to another user; its end is awaited
        // all the same.
        let _ = system::signal(self, signal);
    }

    /// Waits for its end, until `deadline` if there is one. Whether it has ended.
    pub fn ends(&self, deadline: Option<Instant>) -> bool {
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let left = left.and_then(|left: Duration| Timespec::try_from(left).ok());
            let mut fds = [PollFd::new(&self.end, PollFlags::IN)];
            match poll(&mut fds, left.as_ref()) {
                Ok(0) => return false,
                Err(rustix::io::Errno::INTR) => {}
                _ => return true,
            }
        }
    }
}

/// This program, to be run once more. On Linux the very file, also where another one has taken its
/// place.
pub fn this_program() -> PathBuf {
    if cfg!(target_os = "linux") {
        return "/proc/self/exe".into();
    }
    std::env::current_exe().unwrap_or_else(|_| "iii".into())
}

/// Identifies this boot of the machine.
pub fn boot_id() -> Option<String> {
    system::boot_id()
}

#[cfg(target_os = "linux")]
mod system {
    use std::fs;
    use std::os::fd::OwnedFd;

    use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

    use super::Process;

    pub fn open(pid: Pid) -> rustix::io::Result<OwnedFd> {
        pidfd_open(pid, PidfdFlags::empty())
    }

    pub fn signal(process: &Process, signal: Signal) -> rustix::io::Result<()> {
        pidfd_send_signal(&process.end, signal)
    }

    /// When a process started, in clock ticks since the machine's start: see `proc_pid_stat(5)`.
    pub fn started(pid: i32) -> Option<u64> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name before the last parenthesis may hold anything.
        let mut fields = stat.rsplit_once(") ")?.1.split(' ');
        fields.nth(19)?.parse().ok()
    }

    pub fn boot_id() -> Option<String> {
        let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        Some(id.trim().to_owned())
    }
}

#[cfg(target_os = "macos")]
mod system {
    //! Compiled, and not run yet.

    use std::ffi::CStr;
    use std::os::fd::OwnedFd;
    use std::ptr;
    use std::time::Duration;

    use rustix::event::kqueue::{Event, EventFilter, EventFlags, ProcessEvents, kevent, kqueue};
    use rustix::process::{Pid, Signal, kill_process};

    use super::Process;

    pub fn open(pid: Pid) -> rustix::io::Result<OwnedFd> {
        let queue = kqueue()?;
        let flags = ProcessEvents::EXIT;
        let filter = EventFilter::Proc { pid, flags };
        let end = Event::new(filter, EventFlags::ADD, ptr::null_mut());
        let mut nothing: [Event; 0] = [];
        // SAFETY: the event has no descriptor that could be closed.
        unsafe { kevent(&queue, &[end], &mut nothing, Some(Duration::ZERO)) }?;
        Ok(queue)
    }

    pub fn signal(process: &Process, signal: Signal) -> rustix::io::Result<()> {
        let (pid, began) = process.id;
        if started(pid.as_raw_pid()) == Some(began) {
            kill_process(pid, signal)?;
        }
        Ok(())
    }

    /// When a process started, in microseconds since 1970.
    pub fn started(pid: i32) -> Option<u64> {
        let size = size_of::<libc::proc_bsdinfo>() as libc::c_int;
        // SAFETY: zeroes are such a struct, and the call writes no more than its size.
        let info = unsafe {
            let mut info: libc::proc_bsdinfo = std::mem::zeroed();
            let to = (&raw mut info).cast();
            if libc::proc_pidinfo(pid, libc::PROC_PIDTBSDINFO, 0, to, size) != size {
                return None;
            }
            info
        };
        Some(info.pbi_start_tvsec * 1_000_000 + info.pbi_start_tvusec)
    }

    pub fn boot_id() -> Option<String> {
        let mut text = [0_u8; 64];
        let mut length = text.len();
        let name = c"kern.bootsessionuuid".as_ptr();
        // SAFETY: the name ends with a NUL, and the call writes no more than the length it is
        // given.
        let done = unsafe {
            let to = text.as_mut_ptr().cast();
            libc::sysctlbyname(name, to, &raw mut length, ptr::null_mut(), 0)
        };
        let text = CStr::from_bytes_until_nul(&text).ok()?;
        (done == 0).then(|| text.to_string_lossy().into_owned())
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_is_known_by_its_start() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = child.id() as i32;
        let (own, other) = (started(std::process::id() as i32), started(pid));
        assert!(own.is_some() && own <= other);
        let process = Process::open(pid).unwrap();
        assert!(!process.ends(Some(Instant::now())));
        process.signal(Signal::KILL);
        assert!(process.ends(None));
        child.wait().unwrap();
        assert_eq!(started(pid), None);
        assert!(process.ends(Some(Instant::now())));
        // The process has ended already.
        process.signal(Signal::KILL);
        assert!(Process::open(pid).is_err() && Process::open(0).is_err());
    }

    #[test]
    fn a_boot_has_a_name() {
        assert!(boot_id().is_some_and(|id| id.len() > 8));
        assert_eq!(boot_id(), boot_id());
    }
}
