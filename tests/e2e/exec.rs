//! Commands beside the worker's own.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::thread;

use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::engine::holds_within;
use crate::harness::{Home, LIMIT, Project};

const STAY: &str = "echo started; exec sleep 1000";

#[test]
fn commands_run_beside_the_worker() {
    let home = Home::with_busybox();
    let project = Project::scripts("true", "true", STAY);
    let mut dev = home.dev(&project, &["--name", "box"]);
    dev.wait_for("started");
    let exec = |args: &[&str]| {
        let args = [&["worker", "exec", "box"], args].concat();
        home.start(&args).finish(LIMIT)
    };
    let ended = exec(&[
        "--",
        "sh",
        "-c",
        "pwd; id -u; echo $III_WORKER_NAME; echo oops >&2; exit 9",
    ]);
    assert_eq!(ended.stdout, "/workspace\n0\nbox\n");
    ended.exits(9).says(&["oops"]);
    let ended = exec(&[
        "-e",
        "A=1",
        "-e",
        "A=2",
        "-w",
        "/tmp/x",
        "--",
        "sh",
        "-c",
        "echo $A; pwd",
    ]);
    assert_eq!(ended.ok().stdout, "2\n/tmp/x\n");
    let ended = exec(&["--", "sh", "-c", "kill -TERM $$"]);
    ended.exits(128 + 15);
    exec(&["--", "not-there"]).exits(127).says(&["not-there"]);
    exec(&["--timeout", "1", "--", "sleep", "1000"]).exits(124);
    exec(&["-e", "=x", "--", "true"]).exits(2);
    // More than fits a packet.
    let long = format!("A={}", "x".repeat(100_000));
    let ended = exec(&["-e", &long, "--", "sh", "-c", "echo ${#A}"]);
    assert_eq!(ended.ok().stdout, "100000\n");

    // Whose client goes, goes.
    let mut waiting = home.start(&[
        "worker",
        "exec",
        "box",
        "--",
        "sh",
        "-c",
        "echo here; exec sleep 1001",
    ]);
    waiting.wait_for("here");
    waiting.signal(Signal::KILL);
    waiting.finish(LIMIT);
    let gone = || {
        let ended = exec(&["--", "sh", "-c", "ps | grep -q '[s]leep 1001' || echo gone"]);
        ended.stdout.contains("gone")
    };
    assert!(holds_within(LIMIT, gone));

    // And all go with the sandbox.
    let mut waiting = home.start(&[
        "worker",
        "exec",
        "box",
        "--",
        "sh",
        "-c",
        "echo here; exec sleep 1002",
    ]);
    waiting.wait_for("here");
    dev.signal(Signal::INT);
    waiting.finish(LIMIT).fails().says(&["the sandbox ended"]);
    dev.finish(LIMIT).ok();
    exec(&["--", "true"]).exits(1).says(&["does not run"]);
    home.assert_nothing_left();
}

#[test]
fn a_terminal_is_one() {
    let home = Home::with_busybox();
    let project = Project::scripts("true", "true", STAY);
    let mut dev = home.dev(&project, &["--name", "box"]);
    dev.wait_for("started");

    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let size = Winsize {
        ws_row: 33,
        ws_col: 44,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(&master, size).unwrap();
    let slave: OwnedFd =
        rustix::pty::ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    let stream = || Stdio::from(slave.try_clone().unwrap());
    let mut exec = Command::new(env!("CARGO_BIN_EXE_iii"))
        .args(["worker", "exec", "box", "-t", "--", "sh", "-c"])
        .arg("trap 'echo interrupted; exit 4' INT; tty -s && stty size; read line; echo got $line; while :; do sleep 1; done")
        .env("HOME", home.path())
        .stdin(stream())
        .stdout(stream())
        .stderr(stream())
        .spawn()
        .unwrap();
    drop(slave);
    let mut master = File::from(master);
    let mut keyboard = master.try_clone().unwrap();
    let reader = thread::spawn(move || {
        let (mut seen, mut piece) = (Vec::new(), [0; 1000]);
        let mut typed = 0;
        // A master fails when the last slave is closed.
        while let Ok(length @ 1..) = master.read(&mut piece) {
            seen.extend(&piece[..length]);
            let text = String::from_utf8_lossy(&seen);
            if typed == 0 && text.contains("33 44") {
                typed = 1;
                keyboard.write_all(b"hello\r").unwrap();
            }
            if typed == 1 && text.contains("got hello") {
                typed = 2;
                // Ctrl-C, which is the command's and not ours.
                keyboard.write_all(b"\x03").unwrap();
            }
        }
        String::from_utf8_lossy(&seen).into_owned()
    });
    let status = exec.wait().unwrap();
    let seen = reader.join().unwrap();
    assert_eq!(status.code(), Some(4), "{seen}");
    assert!(seen.contains("interrupted"), "{seen}");
    dev.stop();
}
