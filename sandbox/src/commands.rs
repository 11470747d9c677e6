//! Commands beside the main one, as the tool sees them: who waits for news of which.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};

use iii_init::message::{CommandId, MAIN, Report};

/// News of a command.
pub(super) enum News {
    Report(Report),
    /// A stream that it has connected, which of its streams it is, by
    /// [`Hello`](iii_init::vm::Hello).
    #[cfg_attr(
        not(feature = "libkrun"),
        expect(dead_code, reason = "streams of namespaces are given")
    )]
    Stream(iii_init::vm::Hello, OwnedFd),
}

/// The commands of one sandbox.
#[derive(Default)]
pub(super) struct Commands(Mutex<State>);

#[derive(Default)]
struct State {
    last: CommandId,
    waiting: HashMap<CommandId, Sender<News>>,
    /// The sandbox has ended.
    closed: bool,
}

impl Commands {
    /// A new command. No news will come where the sandbox has ended.
    pub fn add(&self) -> (CommandId, Receiver<News>) {
        let (sender, news) = channel();
        let mut state = self.lock();
        state.last = state.last.wrapping_add(1).max(MAIN + 1);
        let id = state.last;
        if !state.closed {
            state.waiting.insert(id, sender);
        }
        (id, news)
    }

    /// News of the main command from now on, for one who listens at a time. None will come where
    /// the sandbox has ended.
    pub fn main(&self) -> Receiver<News> {
        let (sender, news) = channel();
        let mut state = self.lock();
        if !state.closed {
            state.waiting.insert(MAIN, sender);
        }
        news
    }

    pub fn remove(&self, id: CommandId) {
        self.lock().waiting.remove(&id);
    }

    /// Hands news on. News without a waiter is dropped.
    pub fn tell(&self, id: CommandId, news: News) {
        if let Some(waiting) = self.lock().waiting.get(&id) {
            let _ = waiting.send(news);
        }
    }

    pub fn report(&self, report: Report) {
        let (Report::Running(id) | Report::Exited(id, _) | Report::Failed(id, _)) = report;
        self.tell(id, News::Report(report));
    }

    /// Nothing more comes.
    pub fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.waiting.clear();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
