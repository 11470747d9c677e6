//! The tool's side of the filter of a microVM's process: connects, binds and sends in its stead,
//! where its guest may.
//!
//! The kernel asks here before that process connects, binds, or sends to an address. The address is
//! read once, looked at, and used from here, on the same socket: later changes of that
//! process's memory have no effect, so that the policy binds one that the guest has taken over,
//! too.

use std::io;
use std::mem;
use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::SendFlags;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use crate::reach::{Reach, narrowed};

/// Longest address that is looked at: that of a Unix socket is the longest there is.
const MAX_ADDRESS: usize = size_of::<libc::sockaddr_un>();
/// Most bytes that are sent to an address at once. A datagram has less; of a stream the rest is
/// sent by the next call.
const MAX_DATA: usize = 1 << 16;

/// Flags of a call that are passed on. Others would make the kernel do more than send:
/// `MSG_ZEROCOPY` sends from this process's memory after it has been put to another use.
const FLAGS: SendFlags = SendFlags::MORE
    .union(SendFlags::OOB)
    .union(SendFlags::DONTROUTE)
    .union(SendFlags::CONFIRM)
    .union(SendFlags::EOR);

/// A process that has the filter.
pub struct Watch {
    listener: OwnedFd,
    process: OwnedFd,
}

impl Watch {
    /// Of the process `pid`, whose filter has this listener. An error where this process may not
    /// look into that one: it is its parent, but a container may forbid that.
    pub fn new(listener: OwnedFd, pid: Pid) -> io::Result<Self> {
        let process = pidfd_open(pid, PidfdFlags::empty())?;
        // Its standard input. A refusal now would otherwise be a silent failure of each connection.
        pidfd_getfd(&process, 0, PidfdGetfdFlags::empty())?;
        Ok(Self { listener, process })
    }

    /// Answers until nothing is left that has the filter. A socket that blocks while it connects
    /// holds up those after it, which are the same guest's.
    pub fn answer(&self, reach: &Reach) -> io::Result<()> {
        loop {
            let mut fds = [PollFd::new(&self.listener, PollFlags::IN)];
            match poll(&mut fds, None) {
                Err(rustix::io::Errno::INTR) => continue,
                other => other?,
            };
            let events = fds.map(|fd| fd.revents());
            if !events.iter().any(|events| events.contains(PollFlags::IN)) {
                return Ok(());
            }
            // SAFETY: the kernel demands an all-zero notification.
            let mut asked: libc::seccomp_notif = unsafe { mem::zeroed() };
            if !control(&self.listener, libc::SECCOMP_IOCTL_NOTIF_RECV, &mut asked)? {
                continue;
            }
            let (val, error) = match self.act(reach, &asked) {
                Ok(val) => (val, 0),
                Err(error) => (0, -error.raw_os_error().unwrap_or(libc::EPERM)),
            };
            let mut reply = libc::seccomp_notif_resp {
                id: asked.id,
                val,
                error,
                flags: 0,
            };
            control(&self.listener, libc::SECCOMP_IOCTL_NOTIF_SEND, &mut reply)?;
        }
    }

    /// Carries out a permitted call. Returns the result of the call.
    fn act(&self, reach: &Reach, asked: &libc::seccomp_notif) -> io::Result<i64> {
        let [fd, second, third, fourth, fifth, sixth] = asked.data.args;
        let call = i64::from(asked.data.nr);
        let (at, len) = if call == libc::SYS_sendto {
            (fifth, sixth)
        } else {
            (second, third)
        };
        let mut bytes = [0; MAX_ADDRESS];
        let len = usize::try_from(len).unwrap_or(usize::MAX).min(MAX_ADDRESS);
        let bytes = bytes.get_mut(..len).unwrap_or_default();
        read_memory(asked.pid, at, bytes)?;
        let mut data = Vec::new();
        if call == libc::SYS_sendto {
            data.resize(
                usize::try_from(third).unwrap_or(usize::MAX).min(MAX_DATA),
                0,
            );
            read_memory(asked.pid, second, &mut data)?;
        }
        let fd = RawFd::try_from(fd).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
        let socket = pidfd_getfd(&self.process, fd, PidfdGetfdFlags::empty())?;
        // The thread that had this number may be gone, and the read bytes belong to another one.
        let mut id = asked.id;
        if !control(&self.listener, libc::SECCOMP_IOCTL_NOTIF_ID_VALID, &mut id)? {
            return Err(io::ErrorKind::NotFound.into());
        }
        let family = bytes
            .first_chunk()
            .map(|family| i32::from(u16::from_ne_bytes(*family)));
        let address = match family {
            Some(libc::AF_INET | libc::AF_INET6) => {
                internet(bytes).ok_or(io::Error::from_raw_os_error(libc::EINVAL))?
            }
            // Dissolves a connection, and reaches no process.
            Some(libc::AF_UNSPEC) if call == libc::SYS_connect => {
                rustix::net::connect_unspec(&socket)?;
                return Ok(0);
            }
            // Sockets of the host, as docker's, and whatever else there is.
            _ => return Err(io::Error::from_raw_os_error(libc::EACCES)),
        };
        if call == libc::SYS_bind {
            // Port 0 is a socket that is about to send; its reach is checked when it does.
            let address = if address.port() == 0 {
                address
            } else {
                narrowed(address)
            };
            rustix::net::bind(&socket, &address)?;
            return Ok(0);
        }
        let address = reach
            .target(address)
            .ok_or(io::Error::from_raw_os_error(libc::ECONNREFUSED))?;
        if call == libc::SYS_connect {
            rustix::net::connect(&socket, &address)?;
            return Ok(0);
        }
        let flags = send_flags(fourth);
        let sent = rustix::net::sendto(&socket, &data, flags, &address)?;
        Ok(sent as i64)
    }
}

/// The flags to send with, in place of these.
fn send_flags(asked: u64) -> SendFlags {
    let asked = SendFlags::from_bits_truncate(asked as u32);
    (asked & FLAGS) | SendFlags::NOSIGNAL | SendFlags::DONTWAIT
}

/// The address in the bytes of a `sockaddr_in` or `sockaddr_in6`.
fn internet(bytes: &[u8]) -> Option<SocketAddr> {
    let (_, rest) = bytes.split_first_chunk::<2>()?;
    let (port, rest) = rest.split_first_chunk()?;
    let port = u16::from_be_bytes(*port);
    if bytes.len() >= size_of::<libc::sockaddr_in6>() {
        let (flow, rest) = rest.split_first_chunk()?;
        let (ip, rest) = rest.split_first_chunk::<16>()?;
        let scope = rest.first_chunk()?;
        let (flow, scope) = (u32::from_be_bytes(*flow), u32::from_ne_bytes(*scope));
        if bytes.first_chunk() == Some(&(libc::AF_INET6 as u16).to_ne_bytes()) {
            return Some(SocketAddrV6::new((*ip).into(), port, flow, scope).into());
        }
    }
    let ip = rest.first_chunk::<4>()?;
    let is_v4 = bytes.first_chunk() == Some(&(libc::AF_INET as u16).to_ne_bytes());
    is_v4.then(|| SocketAddrV4::new((*ip).into(), port).into())
}

fn read_memory(thread: u32, at: u64, into: &mut [u8]) -> io::Result<()> {
    let local = libc::iovec {
        iov_base: into.as_mut_ptr().cast(),
        iov_len: into.len(),
    };
    let remote = libc::iovec {
        iov_base: at as *mut libc::c_void,
        iov_len: into.len(),
    };
    // SAFETY: the local piece is ours to write to; the remote one is only read, by the kernel,
    // which checks it.
    let read = unsafe {
        libc::process_vm_readv(
            thread as libc::pid_t,
            &raw const local,
            1,
            &raw const remote,
            1,
            0,
        )
    };
    match usize::try_from(read) {
        Ok(read) if read == into.len() => Ok(()),
        Ok(_) => Err(io::Error::from_raw_os_error(libc::EFAULT)),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// One of the requests of seccomp's listeners, with its argument. False where who asked
/// is gone.
fn control<T>(listener: impl AsFd, request: libc::Ioctl, argument: &mut T) -> io::Result<bool> {
    loop {
        // SAFETY: each request is called with the structure that it is defined for.
        let result = unsafe {
            libc::ioctl(
                listener.as_fd().as_raw_fd(),
                request,
                std::ptr::from_mut(argument),
            )
        };
        if result >= 0 {
            return Ok(true);
        }
        match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => {}
            error if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            error => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc;
    use std::thread;

    use iii_init::packet::Socket;
    use rustix::net::SocketAddrUnix;

    use super::super::filter;
    use super::*;

    #[test]
    fn addresses_are_parsed_and_nothing_else() {
        let address =
            |family: i32, rest: &[u8]| [&(family as u16).to_ne_bytes()[..], rest].concat();
        let v4 = address(libc::AF_INET, &[0, 80, 1, 2, 3, 4, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(internet(&v4), Some("1.2.3.4:80".parse().unwrap()));
        let v6 = [&[1, 187, 0, 0, 0, 0][..], &[0; 15], &[1], &[0; 4]].concat();
        let v6 = address(libc::AF_INET6, &v6);
        assert_eq!(internet(&v6), Some("[::1]:443".parse().unwrap()));
        for short in [&v4[..7], &v6[..27], &v6[..1], &[]] {
            assert_eq!(internet(short), None, "{short:?}");
        }
    }

    #[test]
    fn only_known_flags_are_passed_on() {
        let always = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
        for (asked, passed) in [
            (0, 0),
            (
                libc::MSG_MORE | libc::MSG_OOB,
                libc::MSG_MORE | libc::MSG_OOB,
            ),
            (libc::MSG_ZEROCOPY | libc::MSG_FASTOPEN, 0),
            (
                -1,
                libc::MSG_MORE
                    | libc::MSG_OOB
                    | libc::MSG_DONTROUTE
                    | libc::MSG_CONFIRM
                    | libc::MSG_EOR,
            ),
        ] {
            let flags = send_flags(asked as u64);
            assert_eq!(flags.bits(), (passed | always) as u32, "{asked:#x}");
        }
    }

    /// Runs `act` under the filter, in a thread of its own.
    fn confined<T: Send + 'static>(
        reach: &Reach,
        act: impl FnOnce(Socket) -> T + Send + 'static,
    ) -> Option<T> {
        let (sender, receiver) = mpsc::channel();
        let acting = thread::spawn(move || {
            let (control, _tool) = Socket::pair().unwrap();
            let listener = match filter::install(control.as_fd()) {
                Ok(listener) => listener,
                Err(error) => {
                    eprintln!("SKIPPED: what a guest's connections may reach: seccomp: {error}");
                    return None;
                }
            };
            sender.send(listener).unwrap();
            Some(act(control))
        });
        if let Ok(listener) = receiver.recv() {
            let watch = Watch::new(listener, rustix::process::getpid()).unwrap();
            watch.answer(reach).unwrap();
        }
        acting.join().unwrap()
    }

    #[test]
    fn a_confined_process_reaches_what_it_may() {
        let engine = TcpListener::bind("127.0.0.1:0").unwrap();
        let secret = TcpListener::bind("127.0.0.1:0").unwrap();
        let (open, closed) = (engine.local_addr().unwrap(), secret.local_addr().unwrap());
        let [resolver, other] = ["127.0.0.1:0"; 2].map(|any| UdpSocket::bind(any).unwrap());
        let (asked, udp) = (resolver.local_addr().unwrap(), other.local_addr().unwrap());
        let reach = Reach::of_loopback([open.port(), asked.port()], false);
        let Some(kinds) = confined(&reach, move |_| {
            let mut stream = TcpStream::connect(open).unwrap();
            // The tool does not look at the bytes.
            stream.write_all(b"hello").unwrap();
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            assert_eq!(socket.send_to(b"who is it?", asked).unwrap(), 10);
            let (pair, _other) = UnixStream::pair().unwrap();
            let docker = SocketAddrUnix::new("/run/docker.sock").unwrap();
            let connected = rustix::net::connect(&pair, &docker);
            [
                TcpStream::connect(closed).unwrap_err().kind(),
                socket.send_to(b"x", udp).unwrap_err().kind(),
                io::Error::from(connected.unwrap_err()).kind(),
            ]
        }) else {
            return;
        };
        let refused = io::ErrorKind::ConnectionRefused;
        assert_eq!(kinds, [refused, refused, io::ErrorKind::PermissionDenied]);
        let mut text = String::new();
        let (mut stream, _) = engine.accept().unwrap();
        stream.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello");
        let mut datagram = [0; 32];
        let (length, _) = resolver.recv_from(&mut datagram).unwrap();
        assert_eq!(datagram.get(..length), Some(&b"who is it?"[..]));
    }

    #[test]
    fn what_listens_does_so_on_the_loopback() {
        let Some(address) = confined(&Reach::default(), |_| {
            // A port that is free a moment later as well, most likely.
            let free = TcpListener::bind("127.0.0.1:0").unwrap();
            let port = free.local_addr().unwrap().port();
            drop(free);
            let wide = TcpListener::bind(("0.0.0.0", port)).unwrap();
            (wide.local_addr().unwrap(), port)
        }) else {
            return;
        };
        assert_eq!(address.0, (Ipv4Addr::LOCALHOST, address.1).into());
    }

    #[test]
    fn what_a_virtual_machine_never_needs_is_refused() {
        let tried = confined(&Reach::default(), |control| {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let call = |number: i64, arguments: [i64; 4]| {
                let [a, b, c, d] = arguments;
                // SAFETY: each of these calls is refused before it looks at what it is given; one
                // that is not fails on it.
                match unsafe { libc::syscall(number, a, b, c, d) } {
                    -1 => io::Error::last_os_error().raw_os_error(),
                    _ => None,
                }
            };
            let fd = i64::from(control.as_raw_fd());
            let of_ours = i64::from(ours.as_raw_fd());
            let parent = i64::from(rustix::process::getppid().unwrap().as_raw_pid());
            let message = control.send(&"from the guest", &[theirs.as_fd()]);
            let elsewhere = Socket::from(ours.try_clone().unwrap()).send(&"from the guest", &[]);
            let spawned = std::process::Command::new("/bin/true").spawn();
            // A thread is well.
            assert_eq!(thread::spawn(|| 1).join().unwrap(), 1);
            let file = tempfile::tempfile().unwrap();
            (&file).write_all(b"and so are files").unwrap();
            assert!(message.is_ok());
            let unix = i64::from(libc::AF_UNIX);
            let (inet, netlink) = (i64::from(libc::AF_INET), i64::from(libc::AF_NETLINK));
            [
                call(libc::SYS_socket, [unix, i64::from(libc::SOCK_STREAM), 0, 0]),
                call(
                    libc::SYS_socket,
                    [netlink, i64::from(libc::SOCK_DGRAM), 0, 0],
                ),
                call(libc::SYS_socket, [inet, i64::from(libc::SOCK_RAW), 6, 0]),
                // SCTP connects by an option, too.
                call(
                    libc::SYS_socket,
                    [inet, i64::from(libc::SOCK_STREAM), 132, 0],
                ),
                spawned.unwrap_err().raw_os_error(),
                elsewhere.unwrap_err().raw_os_error(),
                call(
                    libc::SYS_ptrace,
                    [i64::from(libc::PTRACE_ATTACH), parent, 0, 0],
                ),
                call(libc::SYS_kill, [parent, 0, 0, 0]),
                call(libc::SYS_unshare, [i64::from(libc::CLONE_NEWUSER), 0, 0, 0]),
                call(libc::SYS_clone, [i64::from(libc::CLONE_NEWUSER), 0, 0, 0]),
                call(libc::SYS_io_uring_setup, [1, 0, 0, 0]),
                call(libc::SYS_bpf, [0; 4]),
                call(libc::SYS_open_by_handle_at, [-1, 0, 0, 0]),
                call(libc::SYS_close, [fd, 0, 0, 0]),
                call(libc::SYS_dup3, [of_ours, fd, 0, 0]),
                call(libc::SYS_prlimit64, [parent, 0, 0, 0]),
                // Neither a thread nor a process that would run here: a kernel that is asked says
                // `EINVAL`.
                call(libc::SYS_clone, [i64::from(libc::CLONE_SIGHAND), 0, 0, 0]),
            ]
        });
        let Some(tried) = tried else { return };
        let (refused, no_such) = (Some(libc::EPERM), Some(libc::EAFNOSUPPORT));
        assert_eq!(tried[..4], [no_such; 4]);
        assert_eq!(tried[4..], [refused; 13]);
    }
}
