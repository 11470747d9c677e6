//! The system calls of a microVM's process: a seccomp filter.
//!
//! It refuses calls that a virtual machine monitor never needs and an attacker inside one would:
//! programs, other processes, namespaces and mounts, keys, modules, and the interfaces with a
//! history of holes. It is a list of refused calls, not of allowed ones: the calls of a libc,
//! an allocator and KVM's next version are not known, and a worker that dies of an upgrade would
//! teach people to switch the filter off. Files are landlock's part: see `confine`.
//!
//! Every call that leads to another process by an address goes through [`super::watch`] in the
//! tool: connecting, binding, and sending to an address. Messages with descriptors may be sent to
//! the tool alone.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};

use libc::{
    BPF_ABS, BPF_ALU, BPF_AND, BPF_JEQ, BPF_JGE, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W,
    SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO, SECCOMP_RET_KILL_PROCESS, SECCOMP_RET_USER_NOTIF,
    sock_filter,
};

#[cfg(target_arch = "x86_64")]
const ARCH: u32 = 0xc000_003e;
#[cfg(target_arch = "aarch64")]
const ARCH: u32 = 0xc000_00b7;
/// Numbers of system calls from here on are those of another interface, x32.
#[cfg(target_arch = "x86_64")]
const FOREIGN: u32 = 0x4000_0000;
#[cfg(target_arch = "aarch64")]
const FOREIGN: u32 = u32::MAX;

/// Calls that are never needed.
const REFUSED: &[i64] = &[
    // Programs.
    libc::SYS_execve,
    libc::SYS_execveat,
    // Other processes.
    #[cfg(target_arch = "x86_64")]
    libc::SYS_fork,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_vfork,
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_process_mrelease,
    libc::SYS_kcmp,
    libc::SYS_pidfd_getfd,
    libc::SYS_kill,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_rt_tgsigqueueinfo,
    libc::SYS_pidfd_send_signal,
    #[cfg(not(target_env = "musl"))]
    libc::SYS_tkill,
    // Namespaces and mounts.
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    // Files by other ways than their names.
    libc::SYS_open_by_handle_at,
    libc::SYS_name_to_handle_at,
    libc::SYS_fanotify_init,
    // Older landlocks do not see it.
    libc::SYS_truncate,
    // Calls that pass by this filter.
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_sendmmsg,
    // Closes, among others, descriptors that must stay open.
    libc::SYS_close_range,
    // Holes of the past.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_personality,
    libc::SYS_vmsplice,
    libc::SYS_quotactl,
    libc::SYS_lookup_dcookie,
    // The machine.
    libc::SYS_kexec_load,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_reboot,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_acct,
    libc::SYS_syslog,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_vhangup,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_uselib,
];

/// Any of the flags that make a namespace.
const NEW_NAMESPACE: u32 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET) as u32;

const fn fails_with(errno: i32) -> u32 {
    SECCOMP_RET_ERRNO | errno as u32
}

/// A part of a program.
#[derive(Default)]
struct Program(Vec<sock_filter>);

impl Program {
    fn push(&mut self, code: u32, [jt, jf]: [u8; 2], k: u32) -> &mut Self {
        let code = code as u16;
        self.0.push(sock_filter { code, jt, jf, k });
        self
    }

    fn load(&mut self, offset: usize) -> &mut Self {
        self.push(BPF_LD | BPF_W | BPF_ABS, [0, 0], offset as u32)
    }

    fn answer(&mut self, answer: u32) -> &mut Self {
        self.push(BPF_RET | BPF_K, [0, 0], answer)
    }

    /// The rule of a call; `what` has to end with an answer.
    fn on(&mut self, call: i64, what: impl FnOnce(&mut Self)) -> &mut Self {
        let mut part = Self::default();
        what(&mut part);
        self.push(
            BPF_JMP | BPF_JEQ | BPF_K,
            [0, part.0.len() as u8],
            call as u32,
        );
        self.0.append(&mut part.0);
        self
    }

    /// Goes on where the lower half of an argument, as far as it is in `mask`, is one of `values`.
    fn only(&mut self, argument: usize, mask: u32, values: &[u32], or_else: u32) -> &mut Self {
        self.load(of_argument(argument));
        if mask != u32::MAX {
            self.push(BPF_ALU | BPF_AND | BPF_K, [0, 0], mask);
        }
        for (index, value) in values.iter().enumerate() {
            let past_answer = (values.len() - index) as u8;
            self.push(BPF_JMP | BPF_JEQ | BPF_K, [past_answer, 0], *value);
        }
        self.answer(or_else)
    }
}

/// Where the lower half of an argument is. Descriptors and flags have no other half.
fn of_argument(index: usize) -> usize {
    mem::offset_of!(libc::seccomp_data, args) + index * size_of::<u64>()
}

/// The filter of a process `pid` that talks to the tool over `control`.
fn program(control: RawFd, pid: u32) -> Vec<sock_filter> {
    const ALL: u32 = u32::MAX;
    let (allow, refuse) = (SECCOMP_RET_ALLOW, fails_with(libc::EPERM));
    let control = control as u32;
    let mut program = Program::default();
    program
        .load(mem::offset_of!(libc::seccomp_data, arch))
        .push(BPF_JMP | BPF_JEQ | BPF_K, [1, 0], ARCH)
        .answer(SECCOMP_RET_KILL_PROCESS)
        .load(mem::offset_of!(libc::seccomp_data, nr))
        .push(BPF_JMP | BPF_JGE | BPF_K, [0, 1], FOREIGN)
        .answer(SECCOMP_RET_KILL_PROCESS);
    for call in [libc::SYS_connect, libc::SYS_bind] {
        program.on(call, |it| {
            it.answer(SECCOMP_RET_USER_NOTIF);
        });
    }
    // Most messages go to the peer that the socket is connected to.
    program.on(libc::SYS_sendto, |it| {
        it.only(4, ALL, &[0], SECCOMP_RET_USER_NOTIF)
            .load(of_argument(4) + size_of::<u32>())
            .push(BPF_JMP | BPF_JEQ | BPF_K, [1, 0], 0)
            .answer(SECCOMP_RET_USER_NOTIF)
            .answer(allow);
    });
    program.on(libc::SYS_sendmsg, |it| {
        it.only(0, ALL, &[control], refuse).answer(allow);
    });
    // No other socket may take the place of that one.
    program.on(libc::SYS_close, |it| {
        it.load(of_argument(0))
            .push(BPF_JMP | BPF_JEQ | BPF_K, [0, 1], control)
            .answer(refuse)
            .answer(allow);
    });
    for call in [
        libc::SYS_dup3,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_dup2,
    ] {
        program.on(call, |it| {
            it.load(of_argument(1))
                .push(BPF_JMP | BPF_JEQ | BPF_K, [0, 1], control)
                .answer(refuse)
                .answer(allow);
        });
    }
    let no_such = fails_with(libc::EAFNOSUPPORT);
    program.on(libc::SYS_socket, |it| {
        let families = [libc::AF_INET, libc::AF_INET6].map(|it| it as u32);
        let types = [libc::SOCK_STREAM, libc::SOCK_DGRAM].map(|it| it as u32);
        let protocols = [0, libc::IPPROTO_TCP, libc::IPPROTO_UDP].map(|it| it as u32);
        it.only(0, ALL, &families, no_such)
            .only(1, 0xf, &types, no_such)
            .only(2, ALL, &protocols, no_such)
            .answer(allow);
    });
    program.on(libc::SYS_socketpair, |it| {
        it.only(0, ALL, &[libc::AF_UNIX as u32], no_such)
            .answer(allow);
    });
    // Its flags are in memory, where a filter does not see them; a libc then takes the older call.
    program.on(libc::SYS_clone3, |it| {
        it.answer(fails_with(libc::ENOSYS));
    });
    // Threads, and nothing else: another process would have the socket to the tool, and outlive
    // this one.
    program.on(libc::SYS_clone, |it| {
        let thread = libc::CLONE_THREAD as u32;
        it.only(0, NEW_NAMESPACE | thread, &[thread], refuse)
            .answer(allow);
    });
    program.on(libc::SYS_tgkill, |it| {
        it.only(0, ALL, &[pid], refuse).answer(allow);
    });
    program.on(libc::SYS_prlimit64, |it| {
        it.only(0, ALL, &[0, pid], refuse).answer(allow);
    });
    for call in REFUSED {
        program.on(*call, |it| {
            it.answer(refuse);
        });
    }
    program.answer(allow);
    program.0
}

/// Puts the filter on this thread and those that it starts from now on, for good. Returns what a
/// [`super::watch::Watch`] answers on: until there is one, calls that it is asked about wait.
pub fn install(control: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let program = program(control.as_raw_fd(), std::process::id());
    let filter = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_ptr().cast_mut(),
    };
    rustix::thread::set_no_new_privs(true)?;
    // SAFETY: the program is as long as said and outlives the call, which copies it; what comes
    // back is a new descriptor.
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
