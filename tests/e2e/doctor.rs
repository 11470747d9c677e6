//! `iii worker doctor`, on this machine and on one without user namespaces.

use serde_json::Value;
use tempfile::TempDir;

use crate::engine::free_port;
use crate::harness::{Home, is_root, skip};

#[test]
fn a_machine_that_can_run_workers() {
    let home = Home::new();
    let port = free_port().to_string();
    let ended = home
        .run(&["worker", "doctor", "--port", &port, "--json"])
        .ok();
    let diagnosis: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(diagnosis["runtime"], "namespace");
    let findings = diagnosis["findings"].as_array().unwrap();
    let state = |what: &str| {
        let one = findings.iter().find(|finding| finding["what"] == what);
        one.unwrap_or_else(|| panic!("nothing on {what}\n{}", ended.stdout))["state"].clone()
    };
    assert_eq!(state("namespaces"), "good");
    assert_eq!(state("engine"), "fair");
    for what in ["kvm", "libkrunfw", "ids", "disk"] {
        state(what);
    }
    // It looks, and makes nothing.
    assert!(!home.state().join("store").exists());
    home.run(&["worker", "doctor"])
        .ok()
        .says(&["workers run with --runtime namespace", "✓ namespaces"]);
}

#[test]
fn a_machine_without_user_namespaces() {
    if !is_root() {
        skip(
            "doctor without user namespaces",
            "needs root to forbid them",
        );
        return;
    }
    let script = "echo 0 >/proc/sys/user/max_user_namespaces && exec \"$0\" \"$@\"";
    let program = ["unshare", "--user", "--map-root-user", "sh", "-c", script];
    let program = program.iter().map(Into::into);
    let program = program.chain([env!("CARGO_BIN_EXE_iii").into()]).collect();
    let home = Home::through(TempDir::new().unwrap(), program);
    home.run(&["worker", "doctor"]).exits(1).says(&[
        "no worker can run here",
        "✗ namespaces",
        "user.max_user_namespaces",
    ]);
}
