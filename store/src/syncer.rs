//! Syncing in the background, so that the disk works while the next files are read and hashed.

use std::fs::File;
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::{self, JoinHandle};

use crate::disk::Disk;
use crate::error::{IoContext, Latch, StoreError};

/// Files that wait to be synced; each is held open. Adding one more waits.
const MAX_WAITING: usize = 64;

pub(crate) struct Job {
    file: Arc<File>,
    path: PathBuf,
}

/// A thread that syncs files in the order in which they come; where no thread can be started, the
/// caller syncs them. Dropping it gives up what waits.
#[derive(Debug)]
pub(crate) struct Syncer {
    disk: Arc<dyn Disk>,
    failed: Latch,
    /// None once it has ended, or where there is no thread.
    jobs: Option<SyncSender<Job>>,
    thread: Option<JoinHandle<()>>,
    abandoned: Arc<AtomicBool>,
}

impl Syncer {
    /// The first sync that fails is kept in `failed`, and ends the thread.
    pub(crate) fn start(disk: Arc<dyn Disk>, failed: Latch) -> Self {
        let (sender, receiver) = sync_channel::<Job>(MAX_WAITING);
        let abandoned = Arc::new(AtomicBool::new(false));
        let run = {
            let (disk, failed) = (Arc::clone(&disk), failed.clone());
            let give_up = Arc::clone(&abandoned);
            move || {
                for Job { file, path } in receiver {
                    if give_up.load(Ordering::Relaxed) {
                        break;
                    }
                    if let Err(err) = disk.sync(&file).at("syncing", &path) {
                        failed.set(err);
                        break;
                    }
                }
            }
        };
        let thread = thread::Builder::new().spawn(run).ok();
        Self {
            disk,
            failed,
            jobs: thread.is_some().then_some(sender),
            thread,
            abandoned,
        }
    }

    /// A way to add files from any thread.
    pub(crate) fn queue(&self) -> Queue {
        match &self.jobs {
            Some(jobs) => Queue::Thread(jobs.clone()),
            None => Queue::Here(Arc::clone(&self.disk)),
        }
    }

    /// Waits until all that was added is durable.
    pub(crate) fn finish(mut self) -> Result<(), StoreError> {
        if let Some(Err(panic)) = self.join() {
            resume_unwind(panic);
        }
        self.failed.check()
    }

    fn join(&mut self) -> Option<thread::Result<()>> {
        self.jobs = None;
        self.thread.take().map(JoinHandle::join)
    }
}

impl Drop for Syncer {
    fn drop(&mut self) {
        self.abandoned.store(true, Ordering::Relaxed);
        // An ingest that is given up needs nothing of it.
        let _ = self.join();
    }
}

/// Where files to be synced are added.
pub(crate) enum Queue {
    Thread(SyncSender<Job>),
    Here(Arc<dyn Disk>),
}

impl Queue {
    /// Adds a file. False if the thread has ended, because of an error that [`Syncer::finish`]
    /// returns.
    pub(crate) fn push(&self, file: Arc<File>, path: PathBuf) -> Result<bool, StoreError> {
        match self {
            Self::Thread(jobs) => Ok(jobs.send(Job { file, path }).is_ok()),
            Self::Here(disk) => disk.sync(&file).at("syncing", &path).map(|()| true),
        }
    }
}
