//! Signals while something runs in a sandbox.
//!
//! A sandbox has a session of its own, so a terminal's Ctrl-C reaches only this process, which
//! passes it on: the first SIGINT, SIGTERM or SIGHUP asks the command to end and gives it
//! [`GRACE`], the second kills it. While nothing runs in a sandbox the process just ends, unless a
//! caller wants to be told first: its work can end anywhere. The third ends it in any case, with
//! its sandbox.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use iii_sandbox::Controller;
use rustix::process::Signal;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

/// How long a worker has to end after it was asked to, before it is killed.
pub const GRACE: Duration = Duration::from_secs(10);

/// With this many signals the process ends, whatever it waits for.
const INSISTENCE: u32 = 3;

/// Takes over SIGINT, SIGTERM and SIGHUP for the rest of the process.
#[derive(Clone)]
pub struct Signals {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    running: BTreeMap<u64, Controller>,
    /// Callbacks for the first signal.
    told: BTreeMap<u64, Box<dyn Fn() + Send>>,
    next: u64,
    /// The first signal. Commands that are supervised after it are asked to end at once.
    received: Option<Signal>,
    /// How many came.
    count: u32,
}

impl Signals {
    /// Installs the handlers.
    pub fn install() -> io::Result<Self> {
        let state = Arc::new(Mutex::new(State::default()));
        let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP])?;
        let shared = Arc::clone(&state);
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || {
                for number in signals.forever() {
                    receive(&mut lock(&shared), number);
                }
            })?;
        Ok(Self { state })
    }

    /// Calls `wait`, and meanwhile passes signals on to the sandbox of `controller`. Returns the
    /// result of `wait` and the first signal, if one came. Several threads may do so at once.
    pub fn attend<R>(
        &self,
        controller: Controller,
        wait: impl FnOnce() -> R,
    ) -> (R, Option<Signal>) {
        let number = {
            let mut state = lock(&self.state);
            if let Some(signal) = state.received {
                // It can only fail when the sandbox is gone, as intended.
                let _ = controller.stop(signal, GRACE);
            }
            let number = state.number();
            state.running.insert(number, controller);
            number
        };
        let result = wait();
        let mut state = lock(&self.state);
        state.running.remove(&number);
        (result, state.received)
    }

    /// Calls `run`, and meanwhile `told` when the first signal comes. That does not end the process
    /// even while nothing runs in a sandbox; the second does.
    pub fn heed<R>(&self, told: impl Fn() + Send + 'static, run: impl FnOnce() -> R) -> R {
        let number = {
            let mut state = lock(&self.state);
            let number = state.number();
            state.told.insert(number, Box::new(told));
            number
        };
        let result = run();
        lock(&self.state).told.remove(&number);
        result
    }

    /// The first signal that came.
    pub fn received(&self) -> Option<Signal> {
        lock(&self.state).received
    }
}

impl State {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }
}

fn lock(state: &Mutex<State>) -> std::sync::MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn receive(state: &mut State, number: i32) {
    let is_first = state.received.is_none();
    state.count += 1;
    // The sandbox that still counts as running may long be gone, while something is pulled or
    // waited for.
    let insists = state.count >= INSISTENCE;
    if insists || state.running.is_empty() && (state.told.is_empty() || !is_first) {
        std::process::exit(128 + number);
    }
    let signal = match number {
        SIGINT => Signal::INT,
        SIGHUP => Signal::HUP,
        _ => Signal::TERM,
    };
    for controller in state.running.values() {
        // It can only fail when the sandbox is gone, as intended.
        let _ = if is_first {
            controller.stop(signal, GRACE)
        } else {
            controller.stop(Signal::KILL, Duration::ZERO)
        };
    }
    state.received.get_or_insert(signal);
    for told in state.told.values().filter(|_| is_first) {
        told();
    }
}
