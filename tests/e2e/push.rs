//! Images that go to Debian's own registry on loopback, and what others make of them there.

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::{Home, busybox_base, is_root, skip};
use crate::registry::{Counter, Door, Registry, can_run, has};

/// A home that trusts the registry's CA.
fn home_at(registry: &Registry) -> Home {
    let trust = format!(
        "SSL_CERT_FILE={}",
        registry.dir.path().join("ca.crt").display()
    );
    let program = ["/usr/bin/env", &trust, env!("CARGO_BIN_EXE_iii")];
    Home::through(
        TempDir::with_prefix("home-").unwrap(),
        program.map(PathBuf::from).to_vec(),
    )
}

fn log_in(home: &Home, registry: &Registry) {
    let docker = home.path().join(".docker");
    fs::create_dir(&docker).unwrap();
    let file = json!({ "auths": { &registry.host: { "auth": "dXNlcjpzZWNyZXQ=" } } });
    fs::write(docker.join("config.json"), file.to_string()).unwrap();
}

/// The image `large:1`: busybox and what does not fit into one piece, however it is compressed.
fn import_large(home: &Home) {
    let base = home.path().join("base");
    let mut copy = Command::new("cp");
    let status = copy.arg("-a").arg(busybox_base()).arg(&base).status();
    assert!(status.unwrap().success());
    let mut random = fs::File::open("/dev/urandom").unwrap().take(20 << 20);
    let mut file = fs::File::create(base.join("large")).unwrap();
    std::io::copy(&mut random, &mut file).unwrap();
    home.import(&base, "large:1");
}

fn layers(home: &Home, name: &str) -> Value {
    let ended = home.run(&["image", "inspect", name, "--json"]).ok();
    let image: Value = serde_json::from_str(&ended.stdout).unwrap();
    image["layers"].clone()
}

fn run(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn what_is_pushed_with_tls_and_a_login_is_pulled_by_skopeo_podman_and_us() {
    if !can_run("pushing with TLS and a login") {
        return;
    }
    let registry = Registry::start(Door::Guarded);
    let home = home_at(&registry);
    import_large(&home);
    let name = format!("{}/team/large:1", registry.host);
    let to = format!("docker://{name}");
    let push = ["image", "export", "large:1", "--to", &to];
    home.run(&push).fails().says(&[
        "without a login",
        &format!("docker login {}", registry.host),
    ]);
    log_in(&home, &registry);
    home.run(&push).ok();

    let other = home_at(&registry);
    log_in(&other, &registry);
    other.run(&["image", "pull", &name]).ok();
    assert_eq!(layers(&other, &name), layers(&home, "large:1"));

    let dir = TempDir::with_prefix("pulled-").unwrap();
    let certs = certificates(&registry, dir.path());
    let layout = dir.path().join("layout");
    run(Command::new("skopeo")
        .args([
            "--insecure-policy",
            "copy",
            "--quiet",
            "--src-creds",
            "user:secret",
        ])
        .arg("--src-cert-dir")
        .arg(&certs)
        .arg(&to)
        .arg(format!("oci:{}:1", layout.display())));
    let skopeos = Home::new();
    skopeos.import(&layout, "large:1");
    assert_eq!(layers(&skopeos, "large:1"), layers(&home, "large:1"));

    if !has("podman") || !is_root() {
        skip(
            "pulling with podman what was pushed",
            "needs podman, and root",
        );
        return;
    }
    let storage = |name: &str| dir.path().join(name);
    let mut podman = Command::new("podman");
    podman
        .args([
            "--storage-driver",
            "vfs",
            "--events-backend",
            "none",
            "--cgroup-manager",
            "cgroupfs",
        ])
        .arg("--root")
        .arg(storage("root"))
        .arg("--runroot")
        .arg(storage("run"))
        .args(["pull", "--quiet", "--creds", "user:secret", "--cert-dir"])
        .arg(&certs)
        .arg(&name)
        .env("HOME", dir.path());
    run(&mut podman);
}

/// The directory that holds the CA, as skopeo and podman want it.
fn certificates(registry: &Registry, dir: &Path) -> PathBuf {
    let certs = dir.join("certs");
    fs::create_dir(&certs).unwrap();
    fs::copy(registry.dir.path().join("ca.crt"), certs.join("ca.crt")).unwrap();
    certs
}

#[test]
fn a_second_push_moves_nothing() {
    if !can_run("counting what a push sends") {
        return;
    }
    let registry = Registry::start(Door::Open);
    let counter = Counter::new(&registry.host, u64::MAX);
    let home = Home::new();
    import_large(&home);
    let to = |tag: &str| format!("docker://{}/team/large:{tag}", counter.host);
    home.run(&["image", "export", "large:1", "--to", &to("1")])
        .ok();
    assert!(counter.take_sent() > 20 << 20);
    // Under another name, too.
    for tag in ["1", "2"] {
        home.run(&["image", "export", "large:1", "--to", &to(tag)])
            .ok();
        let sent = counter.take_sent();
        assert!(sent < 8192, "{tag}: {sent}");
    }
}
