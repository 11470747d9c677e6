//! The threads that share the work of this process on the store.

use std::io;
use std::sync::mpsc::{Sender, channel};
use std::thread;

use rayon::{ThreadBuilder, ThreadPoolBuilder};

/// Starts one thread for each processor, or as many as the system allows, and returns their number.
/// With none, the calling thread does all the work, and only that thread may hand work over. Call
/// it once, before the first work: rayon by itself panics where it cannot start all its threads.
pub fn start() -> io::Result<usize> {
    let wanted = thread::available_parallelism().map_or(1, Into::into);
    let started: Vec<_> = (0..wanted).map_while(|_| wait_for_work().ok()).collect();
    let count = started.len();
    let pool = ThreadPoolBuilder::new();
    let mut started = started.into_iter();
    let built = if count == 0 {
        pool.num_threads(1).use_current_thread().build_global()
    } else {
        let hand_over = |work: ThreadBuilder| {
            let thread = started.next().ok_or(io::ErrorKind::WouldBlock)?;
            thread.send(work).map_err(|_| io::ErrorKind::BrokenPipe)?;
            Ok(())
        };
        pool.num_threads(count)
            .spawn_handler(hand_over)
            .build_global()
    };
    built.map_err(io::Error::other)?;
    Ok(count)
}

/// Starts a thread before the pool exists: a pool that cannot start all its threads is lost.
fn wait_for_work() -> io::Result<Sender<ThreadBuilder>> {
    let (sender, given) = channel::<ThreadBuilder>();
    let run = move || {
        if let Ok(work) = given.recv() {
            work.run();
        }
    };
    thread::Builder::new().name("work".into()).spawn(run)?;
    Ok(sender)
}
