//! What of the network a process that acts for a guest may reach.
//!
//! A microVM has no network of its own: its connections are made by the process that runs it, on the host. So `localhost` of the
//! guest would be the host's, with every service that trusts whoever reaches it there. A filter (seccomp) has the kernel
//! ask the tool before that process connects, sends to an address, or binds one; the tool looks at the address:
//!
//! - outside, everything may be reached;
//! - of this machine's own loopback, the ports that are allowed, which are the engine's, and the name servers that the host uses;
//! - what listens does so on the loopback: a port that a worker opens is there for its developer, and for nobody else.
//!
//! The guest does not see the memory in which the address lies, so it cannot change it after it was looked at; a process that the
//! guest has taken over could. This is a policy for guests, not the confinement of that process.

use std::io;
use std::mem;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, FromRawFd as _, OwnedFd, RawFd};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

/// Longest address that is looked at: that of a Unix socket is the longest there is.
const MAX_ADDRESS: usize = size_of::<libc::sockaddr_un>();

/// What may be reached.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reach {
    /// Ports of the loopback.
    pub ports: Vec<u16>,
    /// Name servers of the host, which may be on the loopback.
    pub resolvers: Vec<IpAddr>,
    /// The whole loopback.
    pub loopback: bool,
}

const DNS: u16 = 53;

impl Reach {
    /// Whether this address may be connected or sent to.
    pub fn allows(&self, address: &SocketAddr) -> bool {
        let ip = address.ip().to_canonical();
        // The unspecified address is the loopback for whoever connects to it.
        if self.loopback || !(ip.is_loopback() || ip.is_unspecified()) {
            return true;
        }
        self.ports.contains(&address.port())
            || address.port() == DNS && self.resolvers.iter().any(|one| one.to_canonical() == ip)
    }
}

/// The same address on the loopback, where it is that of every interface.
fn narrowed(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => (Ipv4Addr::LOCALHOST, v4.port()).into(),
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => (Ipv6Addr::LOCALHOST, v6.port()).into(),
        other => other,
    }
}

#[cfg(target_arch = "x86_64")]
const ARCH: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCH: u32 = 0xc000_00b7;
/// Numbers of system calls from here on are those of another interface, x32.
#[cfg(target_arch = "x86_64")]
const FOREIGN: u32 = 0x4000_0000;
#[cfg(target_arch = "aarch64")]
const FOREIGN: u32 = u32::MAX;

/// Puts the filter on this thread and those that it starts from now on, for good. Returns what [`supervise`] answers on: until
/// somebody does, calls that are asked about wait.
pub fn install() -> io::Result<OwnedFd> {
    use libc::{
        BPF_ABS, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, SECCOMP_RET_ALLOW,
        SECCOMP_RET_KILL_PROCESS, SECCOMP_RET_USER_NOTIF,
    };
    let load = |offset: usize| (BPF_LD | BPF_W | BPF_ABS, 0, 0, offset as u32);
    let is = |value: u32, yes: u8, no: u8| (BPF_JMP | BPF_JEQ | BPF_K, yes, no, value);
    let is_from = |value: u32, yes: u8, no: u8| (BPF_JMP | BPF_JGE | BPF_K, yes, no, value);
    let answer = |value: u32| (BPF_RET | BPF_K, 0, 0, value);
    let data = |field: usize| load(field);
    // The fifth argument of sendto, an address of 8 bytes.
    let to = mem::offset_of!(libc::seccomp_data, args) + 4 * size_of::<u64>();
    let program = [
        data(mem::offset_of!(libc::seccomp_data, arch)),
        is(ARCH, 1, 0),
        answer(SECCOMP_RET_KILL_PROCESS),
        data(mem::offset_of!(libc::seccomp_data, nr)),
        is_from(FOREIGN, 0, 1),
        answer(SECCOMP_RET_KILL_PROCESS),
        is(libc::SYS_connect as u32, 7, 0),
        is(libc::SYS_bind as u32, 6, 0),
        is(libc::SYS_sendto as u32, 0, 4),
        // Most of what is sent goes where the socket is connected to.
        data(to),
        is(0, 0, 3),
        data(to + 4),
        is(0, 0, 1),
        answer(SECCOMP_RET_ALLOW),
        answer(SECCOMP_RET_USER_NOTIF),
    ];
    let program = program.map(|(code, jt, jf, k)| libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    });
    let filter = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_ptr().cast_mut(),
    };
    rustix::thread::set_no_new_privs(true)?;
    // SAFETY: the program is as long as said and outlives the call, which copies it; what comes back is a new descriptor.
    unsafe {
        let fd = libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &raw const filter,
        );
        match RawFd::try_from(fd) {
            Ok(fd) if fd >= 0 => Ok(OwnedFd::from_raw_fd(fd)),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Answers for the process `pid` until nothing is left that has the filter.
pub fn supervise(listener: &OwnedFd, pid: Pid, reach: &Reach) -> io::Result<()> {
    let process = pidfd_open(pid, PidfdFlags::empty())?;
    loop {
        let mut fds = [PollFd::new(listener, PollFlags::IN)];
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other?,
        };
        let events = fds.map(|fd| fd.revents());
        if !events.iter().any(|events| events.contains(PollFlags::IN)) {
            return Ok(());
        }
        // SAFETY: an all-zero notification is what the kernel wants to be given.
        let mut asked: libc::seccomp_notif = unsafe { mem::zeroed() };
        match control(listener, libc::SECCOMP_IOCTL_NOTIF_RECV, &mut asked) {
            // Who asked is gone.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            other => other?,
        }
        let verdict = judge(listener, &process, reach, &asked);
        let (error, flags) = match verdict {
            Ok(Verdict::GoOn) => (0, libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32),
            Ok(Verdict::Done) => (0, 0),
            Err(error) => (-error.raw_os_error().unwrap_or(libc::EPERM), 0),
        };
        let mut reply = libc::seccomp_notif_resp {
            id: asked.id,
            val: 0,
            error,
            flags,
        };
        match control(listener, libc::SECCOMP_IOCTL_NOTIF_SEND, &mut reply) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => other?,
        }
    }
}

enum Verdict {
    /// The call is made.
    GoOn,
    /// It was made in its stead.
    Done,
}

/// What becomes of a call; an error is what it fails with.
fn judge(
    listener: &OwnedFd,
    process: &OwnedFd,
    reach: &Reach,
    asked: &libc::seccomp_notif,
) -> io::Result<Verdict> {
    let [fd, second, third, _, fifth, sixth] = asked.data.args;
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
    // The thread that had this number may be gone, and what was read be somebody else's.
    let mut id = asked.id;
    control(listener, libc::SECCOMP_IOCTL_NOTIF_ID_VALID, &mut id)?;
    let family = bytes
        .first_chunk()
        .map(|family| i32::from(u16::from_ne_bytes(*family)));
    let address = match family {
        Some(libc::AF_INET | libc::AF_INET6) => {
            internet(bytes).ok_or(io::ErrorKind::InvalidInput)?
        }
        // Dissolves a connection, which reaches nobody.
        Some(libc::AF_UNSPEC) if call == libc::SYS_connect => return Ok(Verdict::GoOn),
        // Sockets of the host, as docker's, and whatever else there is.
        _ => return Err(io::Error::from_raw_os_error(libc::EACCES)),
    };
    if call != libc::SYS_bind {
        return if reach.allows(&address) {
            Ok(Verdict::GoOn)
        } else {
            Err(io::Error::from_raw_os_error(libc::ECONNREFUSED))
        };
    }
    let narrow = narrowed(address);
    // Port 0 is a socket that is about to send; what it may reach is asked when it does.
    if narrow == address || address.port() == 0 {
        return Ok(Verdict::GoOn);
    }
    let fd = RawFd::try_from(fd).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    let socket = pidfd_getfd(process, fd, PidfdGetfdFlags::empty())?;
    rustix::net::bind(&socket, &narrow)?;
    Ok(Verdict::Done)
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
    // SAFETY: the local piece is ours to write to; the remote one is only read, by the kernel, which checks it.
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

/// One of the requests of seccomp's listeners, with what it takes or gives.
fn control<T>(listener: impl AsFd, request: libc::Ioctl, argument: &mut T) -> io::Result<()> {
    // SAFETY: each request is called with the structure that it is defined for.
    let result = unsafe {
        libc::ioctl(
            listener.as_fd().as_raw_fd(),
            request,
            std::ptr::from_mut(argument),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    #[test]
    fn the_loopback_is_closed_but_for_what_is_allowed() {
        let reach = Reach {
            ports: vec![49134],
            resolvers: vec!["127.0.0.53".parse().unwrap()],
            loopback: false,
        };
        for (address, allowed) in [
            ("93.184.216.34:443", true),
            ("[2606:2800::1]:443", true),
            ("192.168.1.2:5432", true),
            ("127.0.0.1:49134", true),
            ("[::1]:49134", true),
            ("127.0.0.1:5432", false),
            ("127.200.1.1:5432", false),
            ("[::1]:5432", false),
            ("0.0.0.0:5432", false),
            ("[::]:5432", false),
            ("[::ffff:127.0.0.1]:5432", false),
            ("[::ffff:127.0.0.53]:53", true),
            ("127.0.0.53:53", true),
            ("127.0.0.54:53", false),
            ("127.0.0.53:80", false),
        ] {
            assert_eq!(
                reach.allows(&address.parse().unwrap()),
                allowed,
                "{address}"
            );
        }
        let all = Reach {
            loopback: true,
            ..reach
        };
        assert!(all.allows(&"127.0.0.1:5432".parse().unwrap()));
    }

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

    /// Runs `act` under the filter, in a thread of its own.
    fn confined<T: Send + 'static>(
        reach: &Reach,
        act: impl FnOnce() -> T + Send + 'static,
    ) -> Option<T> {
        let (sender, receiver) = mpsc::channel();
        let acting = thread::spawn(move || {
            let listener = match install() {
                Ok(listener) => listener,
                Err(error) => {
                    eprintln!("SKIPPED: what a guest's connections may reach: seccomp: {error}");
                    return None;
                }
            };
            sender.send(listener).unwrap();
            Some(act())
        });
        if let Ok(listener) = receiver.recv() {
            supervise(&listener, rustix::process::getpid(), reach).unwrap();
        }
        acting.join().unwrap()
    }

    #[test]
    fn a_confined_process_reaches_what_it_may() {
        let engine = TcpListener::bind("127.0.0.1:0").unwrap();
        let secret = TcpListener::bind("127.0.0.1:0").unwrap();
        let (open, closed) = (engine.local_addr().unwrap(), secret.local_addr().unwrap());
        let datagrams = UdpSocket::bind("127.0.0.1:0").unwrap();
        let udp = datagrams.local_addr().unwrap();
        let reach = Reach {
            ports: vec![open.port()],
            ..Reach::default()
        };
        let Some(kinds) = confined(&reach, move || {
            let mut stream = TcpStream::connect(open).unwrap();
            // What is sent on it is nobody's business.
            stream.write_all(b"hello").unwrap();
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            [
                TcpStream::connect(closed).unwrap_err().kind(),
                socket.send_to(b"x", udp).unwrap_err().kind(),
                UnixStream::connect("/run/nobody.sock").unwrap_err().kind(),
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
    }

    #[test]
    fn what_listens_does_so_on_the_loopback() {
        let Some(address) = confined(&Reach::default(), || {
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
}
