//! Syncing in the background, so that the disk works while the next files are read and hashed.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread::JoinHandle;

use crate::disk::Disk;
use crate::error::{IoContext, StoreError};

/// Files that wait to be synced; each is held open. Who adds one more waits.
const MAX_WAITING: usize = 64;

struct Job {
    file: Arc<File>,
    path: PathBuf,
}

/// A thread that syncs files in the order in which they come. Dropping it gives up what waits.
#[derive(Debug)]
pub(crate) struct Syncer {
    jobs: Option<SyncSender<Job>>,
    thread: Option<JoinHandle<Result<(), StoreError>>>,
    abandoned: Arc<AtomicBool>,
}

impl Syncer {
    pub(crate) fn start(disk: Arc<dyn Disk>) -> Self {
        let (sender, receiver) = sync_channel::<Job>(MAX_WAITING);
        let abandoned = Arc::new(AtomicBool::new(false));
        let give_up = Arc::clone(&abandoned);
        let thread = std::thread::spawn(move || {
            for Job { file, path } in receiver {
                if give_up.load(Ordering::Relaxed) {
                    break;
                }
                disk.sync(&file).at("syncing", &path)?;
            }
            Ok(())
        });
        Self {
            jobs: Some(sender),
            thread: Some(thread),
            abandoned,
        }
    }

    /// A way to add files from any thread.
    pub(crate) fn queue(&self) -> Option<Queue> {
        self.jobs.clone().map(Queue)
    }

    /// Waits until all that was added is durable.
    pub(crate) fn finish(mut self) -> Result<(), StoreError> {
        self.join()
    }

    fn join(&mut self) -> Result<(), StoreError> {
        self.jobs = None;
        let result = self.thread.take().map(JoinHandle::join);
        // A thread that panicked synced nothing that can be relied on.
        result
            .unwrap_or(Ok(Ok(())))
            .unwrap_or(Err(StoreError::Poisoned))
    }
}

impl Drop for Syncer {
    fn drop(&mut self) {
        self.abandoned.store(true, Ordering::Relaxed);
        // What it failed at was not asked for by anybody.
        let _ = self.join();
    }
}

/// Where files to be synced are added.
pub(crate) struct Queue(SyncSender<Job>);

impl Queue {
    /// Adds a file. False if the thread gave up because of an error, which [`Syncer::finish`] tells.
    pub(crate) fn push(&self, file: Arc<File>, path: PathBuf) -> bool {
        self.0.send(Job { file, path }).is_ok()
    }
}
