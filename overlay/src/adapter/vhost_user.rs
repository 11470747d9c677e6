//! Serving over vhost-user-fs, to any VMM that has it: QEMU, cloud-hypervisor, crosvm, User-Mode
//! Linux.
//!
//! `vhost-user-backend` speaks with the VMM and maps the guest's memory, `virtio-queue` walks the
//! rings, and [`super::server`] answers the messages in them. One socket, one VMM, one session:
//! when the VMM goes, serving ends.
//!
//! # Threads
//!
//! Every request queue has a thread that takes requests from it, and answers them itself as long as
//! few wait, as the two that a kernel sends to read ahead: waking another thread costs more than
//! most take to answer. Long bursts, and requests that wait for the disk, go to a pool that all
//! queues share. Priority requests tell of forgotten inodes; the guest waits for none of them.
//!
//! # Limits of a guest
//!
//! Its memory holds rings, descriptors and messages, and it may change them at any time. Everything
//! is read once, into memory of ours, before it is looked at; every address is checked against the
//! guest's memory by `vm-memory`; a chain ends after as many descriptors as there can be, so loops
//! do; a chain longer than any message is cut. A message that makes no sense is answered with an
//! error. A ring that makes no sense ends the session, which is the guest's own. A guest
//! causes no allocations except one message and one reply for each thread, and the memory that the
//! filesystem needs for the requests.
//!
//! The VMM is trusted as far as its guest's memory goes: were it to shorten the memory behind the
//! mapping, this process would be killed.
//!
//! # Not offered
//!
//! A DAX window. Through it a guest maps files of the host, and those of the store are handed out
//! to no guest: most are parts of packs, and nothing of them may be read past the check of its
//! hash. That leaves files that the guest has written, and the two VMMs that are run most, QEMU and
//! cloud-hypervisor, have no window for this device. (`vhost` has the messages, `SHMEM_MAP` and
//! `SHMEM_UNMAP`, should a VMM with a window need it.) Nor migration: an upper belongs to one
//! machine.

use std::cell::RefCell;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use rustix::event::{EventfdFlags, PollFd, PollFlags};
use rustix::fs::{FlockOperation, Mode};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{
    ShutdownHandle, VhostUserBackend, VhostUserDaemon, VringMutex, VringT as _,
};
use virtio_queue::{DescriptorChain, QueueOwnedT as _, QueueT as _};
use vm_memory::{
    Address as _, Bytes as _, GuestAddress, GuestAddressSpace as _, GuestMemory as _,
    GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryMmap, Permissions,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use super::server::{Room, Server};
use super::wire::Reply;
use crate::fs::Filesystem;

/// Longest tag that the device's configuration has room for, in bytes.
pub const MAX_TAG: usize = 36;
/// Most threads that serve one guest.
pub const MAX_THREADS: usize = 64;

/// Queues for requests. A VMM takes as many of them as it likes.
const REQUEST_QUEUES: usize = 8;
/// And the one for priority requests, which comes first.
const QUEUES: usize = 1 + REQUEST_QUEUES;
/// Most entries of a ring: as many as QEMU gives one, and enough for four of the longest requests.
const QUEUE_SIZE: usize = 1024;
/// Most descriptors of one chain that are looked at. The longest request takes one for every page,
/// and a few.
const MAX_SEGMENTS: usize = 1024;
/// Most pieces of memory that the kernel reads a file into at once.
const IOV_MAX: usize = 1024;
/// Most requests of a queue that wait for its own thread, and not for the pool.
const IN_TURN: u16 = 4;
/// Most requests that wait for the pool.
const BACKLOG: usize = 256;

// From the virtio specification.
const VIRTIO_RING_F_INDIRECT_DESC: u64 = 1 << 28;
const VIRTIO_RING_F_EVENT_IDX: u64 = 1 << 29;
const VIRTIO_F_VERSION_1: u64 = 1 << 32;

/// Why a filesystem cannot be served, or no longer.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "their messages say it")]
pub enum VhostUserError {
    #[error("a tag is 1 to {MAX_TAG} bytes without NUL, not {0:?}")]
    Tag(String),
    #[error("another process listens on {}", .0.display())]
    InUse(PathBuf),
    #[error("{} exists and is no socket", .0.display())]
    NotASocket(PathBuf),
    #[error("cannot {operation} the socket {}", path.display())]
    Socket {
        operation: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("cannot {operation}")]
    Io {
        operation: &'static str,
        source: io::Error,
    },
    // `vhost-user-backend` has no `Error` that could be a source.
    #[error("the VMM and this program do not understand each other: {0}")]
    Vmm(String),
    #[error("the guest's ring makes no sense")]
    Ring(#[source] virtio_queue::Error),
}

#[expect(clippy::needless_pass_by_value, reason = "for `map_err`")]
fn vmm_error(error: vhost_user_backend::Error) -> VhostUserError {
    VhostUserError::Vmm(error.to_string())
}

fn io_error(operation: &'static str) -> impl FnOnce(io::Error) -> VhostUserError {
    move |source| VhostUserError::Io { operation, source }
}

/// The name by which a guest mounts the filesystem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tag(String);

impl std::str::FromStr for Tag {
    type Err = VhostUserError;

    fn from_str(text: &str) -> Result<Self, VhostUserError> {
        if text.is_empty() || text.len() > MAX_TAG || text.contains('\0') {
            return Err(VhostUserError::Tag(text.into()));
        }
        Ok(Self(text.into()))
    }
}

/// A socket in the filesystem that a VMM can connect to, for its owner alone. Removed when dropped.
#[derive(Debug)]
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the socket that was made there.
    made: (u64, u64),
}

impl Socket {
    /// Listens on `path`, in place of a socket without a listener.
    pub fn bind(path: &Path) -> Result<Self, VhostUserError> {
        let failed = |operation| {
            move |source: io::Error| VhostUserError::Socket {
                operation,
                path: path.to_owned(),
                source,
            }
        };
        let parent = path.parent().filter(|dir| !dir.as_os_str().is_empty());
        let dir = File::open(parent.unwrap_or(Path::new("."))).map_err(failed("make"))?;
        // Of two processes that find a dead socket, one would remove what the other has just made.
        rustix::fs::flock(&dir, FlockOperation::LockExclusive)
            .map_err(|error| failed("make")(error.into()))?;
        clear(path)?;
        let listener = listen(path).map_err(|error| failed("make")(error.into()))?;
        let found = path.symlink_metadata().map_err(failed("make"))?;
        Ok(Self {
            listener: listener.into(),
            path: path.to_owned(),
            made: (found.dev(), found.ino()),
        })
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let found = self.path.symlink_metadata();
        if found.is_ok_and(|found| (found.dev(), found.ino()) == self.made) {
            // It would only be in the way, and of that [`clear`] takes care.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Removes the socket at `path` if it has no listener.
fn clear(path: &Path) -> Result<(), VhostUserError> {
    let failed = |operation| {
        move |source: io::Error| VhostUserError::Socket {
            operation,
            path: path.to_owned(),
            source,
        }
    };
    match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("look at")(error)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(VhostUserError::NotASocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    // Connecting a socket of another type shows whether the first has a listener, unnoticed by it.
    let probe = UnixDatagram::unbound().map_err(failed("look at"))?;
    match probe.connect(path) {
        Err(error) if error.raw_os_error() == Some(libc::ECONNREFUSED) => {
            fs::remove_file(path).map_err(failed("remove"))
        }
        _ => Err(VhostUserError::InUse(path.to_owned())),
    }
}

fn listen(path: &Path) -> rustix::io::Result<std::os::fd::OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // The name is made with this mode.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, 1)?;
    Ok(socket)
}

/// How serving ended, if nothing failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The VMM has gone.
    Disconnected,
    /// It was asked to.
    Stopped,
}

/// Serves `fs` to the first VMM that connects to `socket`, on about `threads` threads, until that
/// one goes or `stop` can be read from. All requests have been answered, or are not going to be,
/// when it returns.
pub fn serve<F: Filesystem + 'static>(
    fs: Arc<F>,
    socket: &Socket,
    tag: &Tag,
    threads: usize,
    stop: BorrowedFd<'_>,
) -> Result<End, VhostUserError> {
    if readable(&[stop, socket.listener.as_fd()])? == Some(0) {
        return Ok(End::Stopped);
    }
    let threads = threads.clamp(1, MAX_THREADS);
    let event = || rustix::event::eventfd(0, EventfdFlags::CLOEXEC);
    let broken = event().map_err(|error| io_error("make an event")(error.into()))?;
    let ended = event().map_err(|error| io_error("make an event")(error.into()))?;
    let session = Arc::new(Session {
        server: Server::new(fs),
        stopping: AtomicBool::new(false),
        failure: Mutex::default(),
        broken,
    });
    let (pool, helpers) = Pool::start(&session, threads - 1).map_err(io_error("start threads"))?;
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let backend = Arc::new(Backend {
        session: Arc::clone(&session),
        pool,
        memory: memory.clone(),
        busy: std::array::from_fn(|_| Arc::default()),
        leaders: threads.min(QUEUES),
        tag: tag.clone(),
    });
    let listener = socket.listener.try_clone();
    let mut listener = Listener::from(listener.map_err(io_error("listen"))?);
    let mut daemon =
        VhostUserDaemon::new("vhost-user".into(), backend, memory).map_err(vmm_error)?;
    daemon.start(&mut listener).map_err(vmm_error)?;

    let connection = daemon.shutdown_handle();
    let (stopped, waited) = thread::scope(|scope| {
        let watcher = scope
            .spawn(|| session.watch(stop, ended.as_fd(), &socket.listener, connection.as_ref()));
        let waited = daemon.wait();
        // An event that cannot be written has been.
        let _ = rustix::io::write(&ended, &1_u64.to_ne_bytes());
        (watcher.join().unwrap_or(false), waited)
    });
    session.stopping.store(true, Ordering::Release);
    // Its threads end, and with the last of them the pool.
    drop(daemon);
    for helper in helpers {
        // A thread that panicked has said so.
        let _ = helper.join();
    }
    if let Some(error) = lock(&session.failure).take() {
        return Err(VhostUserError::Ring(error));
    }
    match waited {
        _ if stopped => Ok(End::Stopped),
        Ok(()) => Ok(End::Disconnected),
        Err(error) if is_hangup(&error) => Ok(End::Disconnected),
        Err(error) => Err(vmm_error(error)),
    }
}

fn is_hangup(error: &vhost_user_backend::Error) -> bool {
    use vhost::vhost_user::Error as Vhost;
    matches!(
        error,
        vhost_user_backend::Error::HandleRequest(
            Vhost::Disconnected | Vhost::PartialMessage | Vhost::SocketBroken(_)
        )
    )
}

/// Blocks until one of `fds` can be read from, and says which is the first.
fn readable(fds: &[BorrowedFd<'_>]) -> Result<Option<usize>, VhostUserError> {
    let mut polled: Vec<PollFd<'_>> = fds
        .iter()
        .map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN))
        .collect();
    loop {
        match rustix::event::poll(&mut polled, None) {
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(io_error("wait for the VMM")(error.into())),
            Ok(_) => return Ok(polled.iter().position(|fd| !fd.revents().is_empty())),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
type Vring = VringMutex<Memory>;
type Chain = DescriptorChain<GuestMemoryLoadGuard<GuestMemoryMmap>>;

/// State that all threads of a session share.
struct Session<F> {
    server: Server<F>,
    /// No more requests are taken.
    stopping: AtomicBool,
    /// Why the session cannot go on.
    failure: Mutex<Option<virtio_queue::Error>>,
    /// Can be read from once there is a failure.
    broken: std::os::fd::OwnedFd,
}

impl<F: Filesystem> Session<F> {
    /// Cuts the connection when `stop` or a failure says so; returns at the latest when `ended` can
    /// be read from. Whether it was `stop`. Other connections meanwhile are turned away.
    fn watch(
        &self,
        stop: BorrowedFd<'_>,
        ended: BorrowedFd<'_>,
        listener: &UnixListener,
        connection: Option<&ShutdownHandle>,
    ) -> bool {
        let watched = [stop, self.broken.as_fd(), ended, listener.as_fd()];
        let mut watched = &watched[..];
        let first = loop {
            match readable(watched) {
                Ok(Some(3)) if listener.accept().is_ok() => {}
                // The other client has to wait.
                Ok(Some(3)) => watched = &watched[..3],
                first => break first,
            }
        };
        self.stopping.store(true, Ordering::Release);
        if let Some(connection) = connection {
            connection.shutdown();
        }
        matches!(first, Ok(Some(0)))
    }

    fn fail(&self, error: virtio_queue::Error) {
        self.stopping.store(true, Ordering::Release);
        lock(&self.failure).get_or_insert(error);
        let _ = rustix::io::write(&self.broken, &1_u64.to_ne_bytes());
    }

    /// Answers one request, and tells the guest.
    fn answer(&self, vring: &Vring, chain: &Chain) -> Result<(), virtio_queue::Error> {
        thread_local! {
            static BUFFERS: RefCell<Buffers> = RefCell::default();
        }
        let written = BUFFERS.with_borrow_mut(|buffers| buffers.answer(&self.server, chain));
        let mut vring = vring.get_mut();
        vring.add_used(chain.head_index(), written)?;
        if vring.needs_notification()? {
            // A VMM that cannot be told is going.
            let _ = vring.signal_used_queue();
        }
        Ok(())
    }
}

/// Memory for one request at a time.
#[derive(Default)]
struct Buffers {
    /// Bytes behind the message are left from earlier ones.
    message: Vec<u8>,
    reply: Reply,
    /// Where in the guest's memory the reply goes.
    room: Vec<(GuestAddress, usize)>,
    /// The same, or a part of it, for the kernel.
    targets: Vec<libc::iovec>,
}

/// The memory of a guest that a reply goes to.
struct GuestRoom<'a> {
    memory: &'a GuestMemoryMmap,
    parts: &'a [(GuestAddress, usize)],
    /// The sum of the parts.
    size: usize,
    targets: &'a mut Vec<libc::iovec>,
    /// How much the room was filled with.
    filled: usize,
}

impl GuestRoom<'_> {
    /// Sets `targets` to the memory behind the first `skip` bytes, up to `size` bytes in up to
    /// `IOV_MAX` pieces.
    fn target(&mut self, mut skip: usize, mut size: usize) -> io::Result<()> {
        self.targets.clear();
        for &(at, len) in self.parts {
            let skipped = skip.min(len);
            skip -= skipped;
            let len = size.min(len - skipped);
            let at = at.checked_add(skipped as u64);
            let Some(at) = at.filter(|_| len > 0) else {
                continue;
            };
            let fault = |_| io::Error::from_raw_os_error(libc::EFAULT);
            let slices = self.memory.get_slices(at, len, Permissions::Write);
            for slice in slices.map_err(fault)? {
                if self.targets.len() == IOV_MAX {
                    return Ok(());
                }
                let slice = slice.map_err(fault)?;
                self.targets.push(libc::iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                });
            }
            size -= len;
        }
        Ok(())
    }
}

impl Room for GuestRoom<'_> {
    fn size(&self) -> usize {
        self.size
    }

    fn fill(&mut self, skip: usize, file: &File, offset: u64, size: usize) -> io::Result<usize> {
        let mut done = 0;
        while done < size {
            self.target(skip + done, size - done)?;
            let at = libc::off_t::try_from(offset.saturating_add(done as u64))
                .map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
            // SAFETY: the targets are ranges of the guest's memory, which `self.memory` keeps
            // mapped, and which no reference of ours points to. They are at most `IOV_MAX`
            // many.
            let got = unsafe {
                libc::preadv(
                    file.as_raw_fd(),
                    self.targets.as_ptr(),
                    self.targets.len() as libc::c_int,
                    at,
                )
            };
            match usize::try_from(got) {
                Ok(0) => break,
                Ok(got) => done += got,
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        self.filled = done;
        Ok(done)
    }
}

impl Buffers {
    /// Answers the message in `chain`, and returns the length of the reply. A part of the chain
    /// outside of the guest's memory, and all after it, counts as absent.
    fn answer<F: Filesystem>(&mut self, server: &Server<F>, chain: &Chain) -> u32 {
        let memory = chain.memory();
        self.room.clear();
        let (mut read, mut size) = (0, 0);
        for segment in chain.clone().take(MAX_SEGMENTS) {
            let (at, len) = (segment.addr(), segment.len() as usize);
            if segment.is_write_only() {
                let len = len.min(Server::<F>::MAX_REPLY - size);
                if !memory.check_range(at, len, Permissions::Write) {
                    break;
                }
                self.room.push((at, len));
                size += len;
            } else if self.room.is_empty() {
                let end = read + len.min(Server::<F>::MAX_MESSAGE - read);
                if self.message.len() < end {
                    self.message.resize(end, 0);
                }
                if memory.read_slice(&mut self.message[read..end], at).is_err() {
                    break;
                }
                read = end;
            } else {
                // The specification has no such order.
                break;
            }
        }
        let mut room = GuestRoom {
            memory,
            parts: &self.room,
            size,
            targets: &mut self.targets,
            filled: 0,
        };
        let reply = server.handle(&self.message[..read], &mut room, &mut self.reply);
        let filled = room.filled;
        let mut rest = reply;
        for &(at, len) in &self.room {
            let (part, after) = rest.split_at(len.min(rest.len()));
            if rest.is_empty() || memory.write_slice(part, at).is_err() {
                break;
            }
            rest = after;
        }
        (reply.len() - rest.len() + filled) as u32
    }
}

/// How many threads are at requests of a queue.
#[derive(Default)]
struct Busy {
    count: Mutex<usize>,
    idle: Condvar,
}

struct BusyGuard(Arc<Busy>);

impl Busy {
    fn begin(self: &Arc<Self>) -> BusyGuard {
        *lock(&self.count) += 1;
        BusyGuard(Arc::clone(self))
    }

    fn wait(&self) {
        let mut count = lock(&self.count);
        while *count > 0 {
            count = self
                .idle
                .wait(count)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for BusyGuard {
    fn drop(&mut self) {
        *lock(&self.0.count) -= 1;
        self.0.idle.notify_all();
    }
}

struct Job {
    vring: Vring,
    chain: Chain,
    _busy: BusyGuard,
}

/// Threads that answer requests for which the queues' own have no time.
struct Pool(Option<SyncSender<Job>>);

impl Pool {
    /// Its threads end when the pool is dropped.
    fn start<F: Filesystem + 'static>(
        session: &Arc<Session<F>>,
        threads: usize,
    ) -> io::Result<(Self, Vec<JoinHandle<()>>)> {
        if threads == 0 {
            return Ok((Self(None), Vec::new()));
        }
        let (sender, receiver) = sync_channel(BACKLOG);
        let receiver = Arc::new(Mutex::new(receiver));
        let start = |_| {
            let (session, receiver) = (Arc::clone(session), Arc::clone(&receiver));
            thread::Builder::new()
                .name("vhost-pool".into())
                .spawn(move || work(&session, &receiver))
        };
        let helpers = (0..threads).map(start).collect::<io::Result<_>>()?;
        Ok((Self(Some(sender)), helpers))
    }

    /// Returns the job where no thread can take it.
    fn take(&self, job: Job) -> Option<Job> {
        let Some(sender) = &self.0 else {
            return Some(job);
        };
        match sender.try_send(job) {
            Ok(()) => None,
            Err(TrySendError::Full(job) | TrySendError::Disconnected(job)) => Some(job),
        }
    }
}

fn work<F: Filesystem>(session: &Session<F>, jobs: &Mutex<Receiver<Job>>) {
    loop {
        let job = lock(jobs).recv();
        let Ok(job) = job else {
            return;
        };
        if let Err(error) = session.answer(&job.vring, &job.chain) {
            session.fail(error);
        }
    }
}

/// The side of a device that `vhost-user-backend` calls.
struct Backend<F> {
    session: Arc<Session<F>>,
    pool: Pool,
    memory: Memory,
    busy: [Arc<Busy>; QUEUES],
    /// Threads that take requests from queues: queue n is that of thread n modulo this.
    leaders: usize,
    tag: Tag,
}

impl<F: Filesystem> Backend<F> {
    /// The next request, and how many more there are.
    fn pop(&self, vring: &Vring) -> Result<Option<(Chain, u16)>, virtio_queue::Error> {
        if self.session.stopping.load(Ordering::Acquire) {
            return Ok(None);
        }
        let mut vring = vring.get_mut();
        let queue = vring.get_queue_mut();
        if !queue.ready() {
            return Ok(None);
        }
        let memory = self.memory.memory();
        let Some(chain) = queue.iter(memory.clone())?.next() else {
            return Ok(None);
        };
        let end = queue.avail_idx(&*memory, Ordering::Relaxed)?.0;
        Ok(Some((chain, end.wrapping_sub(queue.next_avail()))))
    }

    fn drain(&self, vring: &Vring, busy: &Arc<Busy>) -> Result<(), virtio_queue::Error> {
        while let Some((chain, more)) = self.pop(vring)? {
            let mut mine = Some(chain);
            if more >= IN_TURN || mine.as_ref().is_some_and(waits_for_disk) {
                mine = mine.and_then(|chain| {
                    let job = Job {
                        vring: vring.clone(),
                        chain,
                        _busy: busy.begin(),
                    };
                    self.pool.take(job).map(|job| job.chain)
                });
            }
            if let Some(chain) = mine {
                self.session.answer(vring, &chain)?;
            }
        }
        Ok(())
    }

    /// Answers all that is in the queue, and returns when the guest has agreed to kick for more.
    fn attend(&self, vring: &Vring, busy: &Arc<Busy>) -> Result<(), virtio_queue::Error> {
        if !vring.get_ref().get_queue().ready() {
            return Ok(());
        }
        loop {
            vring.disable_notification()?;
            self.drain(vring, busy)?;
            let stopping = self.session.stopping.load(Ordering::Acquire);
            if !vring.enable_notification()? || stopping {
                return Ok(());
            }
            if !vring.get_ref().get_queue().ready() {
                return Ok(());
            }
        }
    }
}

/// Whether the request at the beginning of the chain is of a kind that can take long.
fn waits_for_disk(chain: &Chain) -> bool {
    let mut words = [0; 8];
    let first = chain.clone().next();
    let read = first.is_some_and(|at| chain.memory().read_slice(&mut words, at.addr()).is_ok());
    read && super::wire::waits_for_disk(&words)
}

impl<F: Filesystem + 'static> VhostUserBackend for Backend<F> {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE
    }

    fn features(&self) -> u64 {
        VIRTIO_F_VERSION_1
            | VIRTIO_RING_F_INDIRECT_DESC
            | VIRTIO_RING_F_EVENT_IDX
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
    }

    fn reset_device(&self) {
        self.session.server.reset();
    }

    fn set_event_idx(&self, _enabled: bool) {}

    /// The tag, padded with NULs, and the number of request queues.
    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut config = self.tag.0.clone().into_bytes();
        config.resize(MAX_TAG, 0);
        config.extend((REQUEST_QUEUES as u32).to_le_bytes());
        let asked = config.into_iter().skip(offset as usize);
        asked.take(size as usize).collect()
    }

    fn update_memory(&self, _memory: Memory) -> io::Result<()> {
        // It is the one that is known already.
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        let queues = |leader| (leader..QUEUES).step_by(self.leaders);
        let masks = (0..self.leaders).map(|leader| queues(leader).fold(0, |m, q| m | 1 << q));
        masks.collect()
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()
    }

    fn stop_vring(&self, queue: u32) -> io::Result<()> {
        // From here on the ring is not ours to write to.
        if let Some(busy) = self.busy.get(queue as usize) {
            busy.wait();
        }
        Ok(())
    }

    fn handle_event(
        &self,
        event: u16,
        _events: EventSet,
        vrings: &[Vring],
        thread: usize,
    ) -> io::Result<()> {
        let queue = thread + usize::from(event) * self.leaders;
        let (Some(vring), Some(busy)) = (vrings.get(usize::from(event)), self.busy.get(queue))
        else {
            return Ok(());
        };
        let _busy = busy.begin();
        if let Err(error) = self.attend(vring, busy) {
            self.session.fail(error);
        }
        Ok(())
    }
}
