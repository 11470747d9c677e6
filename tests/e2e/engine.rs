//! A stand-in for the iii engine: as much of its WebSocket protocol as the SDKs need to register
//! functions and answer calls.

use std::collections::HashMap;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tungstenite::{Error, Message, accept};

/// How long a connection listens before it looks for something to send.
const TURN: Duration = Duration::from_millis(20);

/// How long a worker may take to answer one call.
const ANSWER: Duration = Duration::from_secs(20);

#[derive(Default)]
struct State {
    /// Registered function -> outbox of the connection that serves it.
    functions: HashMap<String, Sender<Value>>,
    /// Open call -> who waits for its result.
    calls: HashMap<String, Sender<Value>>,
    next_call: u64,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// Listens on a loopback port of its own until the process ends.
pub struct Engine {
    pub port: u16,
    shared: Arc<Shared>,
}

impl Engine {
    pub fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Shared::default());
        let accepting = Arc::clone(&shared);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let shared = Arc::clone(&accepting);
                thread::spawn(move || serve(stream, &shared));
            }
        });
        Engine { port, shared }
    }

    /// Blocks until a connected worker has registered `function`.
    pub fn wait_for(&self, function: &str, limit: Duration) {
        let state = self.shared.state.lock().unwrap();
        let (_state, timeout) = self
            .shared
            .changed
            .wait_timeout_while(state, limit, |state| {
                !state.functions.contains_key(function)
            })
            .unwrap();
        assert!(
            !timeout.timed_out(),
            "no worker registered {function} within {limit:?}"
        );
    }

    /// Blocks until no connected worker has `function`.
    pub fn wait_gone(&self, function: &str, limit: Duration) {
        let state = self.shared.state.lock().unwrap();
        let (_state, timeout) = self
            .shared
            .changed
            .wait_timeout_while(state, limit, |state| state.functions.contains_key(function))
            .unwrap();
        assert!(
            !timeout.timed_out(),
            "the worker with {function} is still connected after {limit:?}"
        );
    }

    /// Calls `function` and returns the message of the worker, `result` or `error` in it.
    pub fn invoke(&self, function: &str, data: &Value) -> Value {
        let (answer, answered) = channel();
        let mut state = self.shared.state.lock().unwrap();
        state.next_call += 1;
        let call = format!("00000000-0000-4000-8000-{:012x}", state.next_call);
        state.calls.insert(call.clone(), answer);
        let message = json!({
            "type": "invokefunction",
            "invocation_id": call,
            "function_id": function,
            "data": data,
        });
        let outbox = state.functions.get(function);
        let outbox = outbox.unwrap_or_else(|| panic!("nobody serves {function}"));
        outbox.send(message).unwrap();
        drop(state);
        answered
            .recv_timeout(ANSWER)
            .unwrap_or_else(|error| panic!("no answer from {function}: {error}"))
    }
}

/// One connection, from its handshake to its end. Telemetry, which comes in binary, is read and
/// dropped.
fn serve(stream: TcpStream, shared: &Shared) {
    let Ok(mut socket) = accept(stream) else {
        return;
    };
    socket.get_ref().set_read_timeout(Some(TURN)).unwrap();
    let (outbox, outgoing) = channel();
    let mut mine = Vec::new();
    while turn(&mut socket, &outbox, &outgoing, shared, &mut mine) {}
    let mut state = shared.state.lock().unwrap();
    for function in mine {
        state.functions.remove(&function);
    }
    shared.changed.notify_all();
}

/// Sends what is to be sent and reads one message. False once the connection has ended.
fn turn(
    socket: &mut tungstenite::WebSocket<TcpStream>,
    outbox: &Sender<Value>,
    outgoing: &Receiver<Value>,
    shared: &Shared,
    mine: &mut Vec<String>,
) -> bool {
    for message in outgoing.try_iter() {
        if socket.send(Message::text(message.to_string())).is_err() {
            return false;
        }
    }
    let text = match socket.read() {
        Ok(Message::Text(text)) => text,
        Ok(_) => return true,
        Err(Error::Io(error))
            if matches!(
                error.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
            ) =>
        {
            return true;
        }
        Err(_) => return false,
    };
    let message: Value = serde_json::from_str(&text).unwrap();
    let word = |key: &str| message[key].as_str().unwrap_or_default().to_owned();
    let mut state = shared.state.lock().unwrap();
    match word("type").as_str() {
        "registerfunction" => {
            mine.push(word("id"));
            state.functions.insert(word("id"), outbox.clone());
            shared.changed.notify_all();
        }
        "invokefunction" if message["invocation_id"].is_string() => {
            let answer = json!({
                "type": "invocationresult",
                "invocation_id": message["invocation_id"],
                "function_id": message["function_id"],
                "result": {},
            });
            outbox.send(answer).unwrap();
        }
        "invocationresult" => {
            if let Some(caller) = state.calls.remove(&word("invocation_id")) {
                // The caller may have given up waiting.
                let _ = caller.send(message);
            }
        }
        _ => {}
    }
    true
}

/// A loopback port on which no process listens.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// Calls `check` until it holds; false after `limit`.
pub fn holds_within(limit: Duration, mut check: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if check() {
            return true;
        }
        if Instant::now() > deadline {
            return false;
        }
        thread::sleep(Duration::from_millis(20));
    }
}
