//! Threads that work a queue off, of which each task may add others.

use std::panic::resume_unwind;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

/// Tasks, some of which may wait for others.
pub trait Queue {
    /// Everything that a thread needs to do a task.
    type Work;
    /// The result of a task.
    type Done;

    /// Whether no task is left, begun or not.
    fn is_over(&self) -> bool;
    /// A task that may begin now. `None` where each waits for one that has begun.
    fn take(&mut self) -> Option<Self::Work>;
    /// Ends a task that was taken.
    fn finish(&mut self, done: Self::Done);
}

struct Shared<Q> {
    state: Mutex<State<Q>>,
    changed: Condvar,
}

struct State<Q> {
    queue: Q,
    /// A thread has panicked: its task will never finish, so the others would wait for ever.
    is_abandoned: bool,
}

impl<Q> Shared<Q> {
    fn lock(&self) -> MutexGuard<'_, State<Q>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells the other threads that this one panics.
struct Alarm<'a, Q>(&'a Shared<Q>);

impl<Q> Drop for Alarm<'_, Q> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.lock().is_abandoned = true;
            self.0.changed.notify_all();
        }
    }
}

/// Does all tasks of `queue` on this thread and others, `threads` in all. `work` runs with nothing
/// locked; the queue's own methods run one at a time. A panic on any thread ends the others after
/// the tasks that they are at, and goes on in the caller.
pub fn work_off<Q: Queue + Send>(
    queue: Q,
    threads: usize,
    work: impl Fn(Q::Work) -> Q::Done + Sync,
) -> Q {
    let shared = Shared {
        state: Mutex::new(State {
            queue,
            is_abandoned: false,
        }),
        changed: Condvar::new(),
    };
    thread::scope(|scope| {
        // With fewer threads than asked for, the work takes longer.
        let others: Vec<_> = (1..threads)
            .map_while(|_| {
                let thread = thread::Builder::new();
                thread.spawn_scoped(scope, || work_on(&shared, &work)).ok()
            })
            .collect();
        work_on(&shared, &work);
        for other in others {
            if let Err(panic) = other.join() {
                resume_unwind(panic);
            }
        }
    });
    let state = shared.state.into_inner();
    state.unwrap_or_else(PoisonError::into_inner).queue
}

fn work_on<Q: Queue>(shared: &Shared<Q>, work: &impl Fn(Q::Work) -> Q::Done) {
    let _alarm = Alarm(shared);
    let mut state = shared.lock();
    while !state.is_abandoned && !state.queue.is_over() {
        let Some(task) = state.queue.take() else {
            let waited = shared.changed.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        drop(state);
        let done = work(task);
        state = shared.lock();
        state.queue.finish(done);
        shared.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    /// Numbers up to a limit, each of which waits for the one before.
    #[derive(Debug)]
    struct Chain {
        next: u32,
        limit: u32,
        is_busy: bool,
        done: Vec<u32>,
    }

    impl Chain {
        fn new(limit: u32) -> Self {
            Self {
                next: 0,
                limit,
                is_busy: false,
                done: Vec::new(),
            }
        }
    }

    impl Queue for Chain {
        type Work = u32;
        type Done = u32;

        fn is_over(&self) -> bool {
            self.next == self.limit && !self.is_busy
        }

        fn take(&mut self) -> Option<u32> {
            let is_free = !self.is_busy && self.next < self.limit;
            is_free.then(|| {
                self.is_busy = true;
                self.next += 1;
                self.next - 1
            })
        }

        fn finish(&mut self, done: u32) {
            assert_ne!(done, 77, "a queue that panics");
            self.is_busy = false;
            self.done.push(done);
        }
    }

    #[test]
    fn tasks_that_wait_for_others_are_all_done() {
        for threads in [1, 2, 5] {
            let queue = work_off(Chain::new(70), threads, |task| task);
            assert!(queue.done.into_iter().eq(0..70), "{threads} threads");
        }
    }

    #[test]
    fn a_panic_ends_the_threads_that_wait() {
        for (threads, at) in [(1, 3), (4, 3), (4, 77)] {
            let (told, end) = channel();
            // A thread of its own: where the others wait for ever, only this one would be lost.
            thread::spawn(move || {
                let run = || {
                    work_off(Chain::new(100), threads, |task| {
                        assert!(task != at || at == 77, "task {at} panics");
                        task
                    })
                };
                let _ = told.send(catch_unwind(AssertUnwindSafe(run)).is_err());
            });
            assert_eq!(
                end.recv_timeout(Duration::from_secs(60)),
                Ok(true),
                "{threads} {at}"
            );
        }
    }
}
