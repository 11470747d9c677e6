//! Pulling from Debian's own registry on loopback, with images that umoci and skopeo made.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::engine::{free_port, holds_within};
use crate::harness::{Home, LIMIT, Project, busybox_base, skip};

/// The user and the password of a registry that wants some, as `htpasswd` writes them.
const HTPASSWD: &str = "user:$2b$05$OACckZAo.GBuZHFSjURxeun1FsFEWPtnzZkVpnJbHQH/X04R8S8Sm\n";
const USER: &str = "user";
const PASSWORD: &str = "secret";

/// The login that the registry demands.
#[derive(Clone, Copy, PartialEq)]
pub enum Door {
    Open,
    /// TLS with a CA of the test's own, and a login.
    Guarded,
}

/// A registry with a directory of its own. Dropped, it is killed.
pub struct Registry {
    pub dir: TempDir,
    pub host: String,
    child: Child,
    door: Door,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn has(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

/// Whether the tools of these tests are installed; reports a skip if not.
pub fn can_run(what: &str) -> bool {
    let needed = ["docker-registry", "skopeo", "umoci", "openssl"];
    let missing: Vec<_> = needed.into_iter().filter(|one| !has(one)).collect();
    if !missing.is_empty() {
        skip(what, &format!("needs {}", missing.join(", ")));
    }
    missing.is_empty()
}

pub fn run(dir: &Path, program: &str, args: &[&str]) {
    let output = Command::new(program)
        .args(args)
        .current_dir(dir)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{program} {args:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A CA, and a certificate of it for 127.0.0.2, which a proxy may call 0.0.0.0.
pub fn make_certificates(dir: &Path) {
    let subject = "subjectAltName=IP:127.0.0.2,IP:0.0.0.0\nbasicConstraints=CA:FALSE\n";
    fs::write(dir.join("ext"), subject).unwrap();
    let ec = [
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
    ];
    let with = |args: &[&'static str]| [&["req"], &ec[..], args].concat();
    let ca = [
        "-x509", "-subj", "/CN=ca", "-keyout", "ca.key", "-out", "ca.crt",
    ];
    run(dir, "openssl", &with(&ca));
    let request = ["-subj", "/CN=registry", "-keyout", "key", "-out", "csr"];
    run(dir, "openssl", &with(&request));
    let sign = [
        "x509",
        "-req",
        "-in",
        "csr",
        "-CA",
        "ca.crt",
        "-CAkey",
        "ca.key",
        "-CAcreateserial",
        "-extfile",
        "ext",
        "-out",
        "crt",
    ];
    run(dir, "openssl", &sign);
}

impl Registry {
    pub fn start(door: Door) -> Self {
        let dir = TempDir::with_prefix("registry-").unwrap();
        let port = free_port();
        // Only 127.0.0.1 is spoken to without TLS.
        let address = match door {
            Door::Open => "127.0.0.1",
            Door::Guarded => "127.0.0.2",
        };
        let mut config = json!({
            "version": 0.1,
            "log": { "level": "error" },
            "storage": { "filesystem": { "rootdirectory": dir.path().join("data") } },
            "http": { "addr": format!("{address}:{port}") },
        });
        if door == Door::Guarded {
            make_certificates(dir.path());
            fs::write(dir.path().join("htpasswd"), HTPASSWD).unwrap();
            config["http"]["tls"] = json!({
                "certificate": dir.path().join("crt"), "key": dir.path().join("key"),
            });
            config["auth"] = json!({
                "htpasswd": { "realm": "test", "path": dir.path().join("htpasswd") },
            });
        }
        let path = dir.path().join("config.yml");
        // JSON is YAML.
        fs::write(&path, config.to_string()).unwrap();
        let log = fs::File::create(dir.path().join("log")).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&path)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let host = format!("{address}:{port}");
        let listens = holds_within(LIMIT, || TcpStream::connect(&host).is_ok());
        assert!(listens, "docker-registry does not listen");
        Self {
            dir,
            host,
            child,
            door,
        }
    }

    /// A file of the registry's directory.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn push(&self, layout: &Layout, tag: &str, name: &str, options: &[&str]) {
        let (from, to) = (
            format!("oci:{}:{tag}", layout.path().display()),
            format!("docker://{}/{name}", self.host),
        );
        let login = format!("{USER}:{PASSWORD}");
        let mut args = vec![
            "--insecure-policy",
            "copy",
            "--quiet",
            "--dest-tls-verify=false",
        ];
        args.extend(options);
        if self.door == Door::Guarded {
            args.extend(["--dest-creds", &login]);
        }
        args.extend([&*from, &*to]);
        run(self.dir.path(), "skopeo", &args);
    }

    /// A request without TLS. Returns the answer's head and body.
    pub fn ask(&self, method: &str, path: &str, media_type: &str, body: &str) -> (String, String) {
        let mut stream = TcpStream::connect(&self.host).unwrap();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nAccept: {media_type}\r\n\
             Content-Type: {media_type}\r\nContent-Length: {}\r\n\r\n{body}",
            self.host,
            body.len()
        );
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head.to_owned(), body.to_owned())
    }
}

/// An OCI layout that umoci writes.
pub struct Layout {
    dir: TempDir,
}

impl Layout {
    pub fn new() -> Self {
        let dir = TempDir::with_prefix("layout-").unwrap();
        run(dir.path(), "umoci", &["init", "--layout", "layout"]);
        Self { dir }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("layout")
    }

    fn umoci(&self, args: &[&str]) {
        run(self.dir.path(), "umoci", args);
    }

    /// The image `tag`: busybox, and other files, each given as a name and a size, each in a layer
    /// of its own.
    pub fn image(&self, tag: &str, arch: &str, files: &[(&str, usize)]) {
        let image = format!("layout:{tag}");
        self.umoci(&["new", "--image", &image]);
        let config = [
            "--os",
            "linux",
            "--architecture",
            arch,
            "--config.env",
            "MADE_BY=umoci",
        ];
        self.umoci(&[&["config", "--image", &image], &config[..]].concat());
        let base = busybox_base().to_str().unwrap().to_owned();
        self.umoci(&["insert", "--rootless", "--image", &image, &base, "/"]);
        for (name, size) in files {
            let path = self.dir.path().join(name);
            let mut random = fs::File::open("/dev/urandom").unwrap().take(*size as u64);
            // The same name is the same file, in all images of the layout.
            if !path.exists() {
                std::io::copy(&mut random, &mut fs::File::create(&path).unwrap()).unwrap();
            }
            let inside = format!("/opt/{name}");
            let from = path.to_str().unwrap();
            self.umoci(&["insert", "--rootless", "--image", &image, from, &inside]);
        }
    }
}

pub fn arch() -> &'static str {
    match std::env::consts::ARCH {
        "aarch64" => "arm64",
        _ => "amd64",
    }
}

pub fn inspect(home: &Home, name: &str) -> Value {
    let ended = home.run(&["image", "inspect", name, "--json"]).ok();
    serde_json::from_str(&ended.stdout).unwrap()
}

/// Passes connections on, and counts the bytes of both directions. Past `limit` bytes
/// nothing comes any more, and nothing ends.
pub struct Counter {
    pub host: String,
    bytes: Arc<AtomicU64>,
    sent: Arc<AtomicU64>,
}

impl Counter {
    pub fn new(to: &str, limit: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let bytes = Arc::new(AtomicU64::new(0));
        let (count, to) = (Arc::clone(&bytes), to.to_owned());
        let sent = Arc::new(AtomicU64::new(0));
        let sent_count = Arc::clone(&sent);
        // Ends with the process.
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let Ok(server) = TcpStream::connect(&to) else {
                    continue;
                };
                let (mut from_client, mut to_server) =
                    (client.try_clone().unwrap(), server.try_clone().unwrap());
                let sent = Arc::clone(&sent_count);
                thread::spawn(move || {
                    let mut buffer = vec![0; 64 << 10];
                    while let Ok(got @ 1..) = from_client.read(&mut buffer) {
                        sent.fetch_add(got as u64, Ordering::Relaxed);
                        if to_server.write_all(&buffer[..got]).is_err() {
                            break;
                        }
                    }
                    let _ = to_server.shutdown(Shutdown::Write);
                });
                let count = Arc::clone(&count);
                thread::spawn(move || pass_back(server, client, &count, limit));
            }
        });
        Self { host, bytes, sent }
    }

    /// Bytes received since the last call.
    pub fn take(&self) -> u64 {
        self.bytes.swap(0, Ordering::Relaxed)
    }

    /// Bytes sent since the last call.
    pub fn take_sent(&self) -> u64 {
        self.sent.swap(0, Ordering::Relaxed)
    }
}

fn pass_back(mut server: TcpStream, mut client: TcpStream, count: &AtomicU64, limit: u64) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(got @ 1..) = server.read(&mut buffer) {
        if count.fetch_add(got as u64, Ordering::Relaxed) >= limit {
            // Until the client gives up.
            let _ = client.read(&mut [0]);
            break;
        }
        if client.write_all(&buffer[..got]).is_err() {
            break;
        }
    }
    let _ = client.shutdown(Shutdown::Both);
}

#[test]
fn what_umoci_and_skopeo_make_is_pulled_as_it_is_imported() {
    if !can_run("pulling images of umoci and skopeo") {
        return;
    }
    let layout = Layout::new();
    layout.image("one", arch(), &[("a", 100_000), ("b", 10)]);
    let home = Home::new();
    home.import(&layout.path(), "imported:1");
    let imported = inspect(&home, "imported:1");
    assert_eq!(imported["layers"].as_array().unwrap().len(), 3);
    for (tag, options) in [
        ("gzip", &[][..]),
        ("zstd", &["--dest-compress-format", "zstd"]),
        ("docker", &["--format", "v2s2"]),
    ] {
        // Skopeo does not compress a layer anew that a registry has.
        let registry = Registry::start(Door::Open);
        registry.push(&layout, "one", &format!("some/box:{tag}"), options);
        let name = format!("{}/some/box:{tag}", registry.host);
        // In a home of its own nothing is known yet.
        let other = Home::new();
        for home in [&other, &home] {
            home.run(&["image", "pull", &name]).ok().says(&[&name]);
            let pulled = inspect(home, &name);
            assert_eq!(pulled["layers"], imported["layers"], "{tag}");
            assert_eq!(pulled["config"], imported["config"], "{tag}");
            assert_eq!(pulled["origin"], "registry");
        }
        let digest = inspect(&home, &name)["digest"].as_str().unwrap().to_owned();
        let path = format!("/v2/some/box/manifests/{digest}");
        let media_type = if tag == "docker" {
            "application/vnd.docker.distribution.manifest.v2+json"
        } else {
            "application/vnd.oci.image.manifest.v1+json"
        };
        let (head, manifest) = registry.ask("GET", &path, media_type, "");
        assert!(head.contains(" 200 "), "{tag}: {head}");
        if tag != "docker" {
            assert!(manifest.contains(&format!("tar+{tag}")), "{manifest}");
        }
        home.run(&["image", "list"])
            .ok()
            .says(&[&name, &digest["sha256:".len()..][..12]]);
        home.run(&["image", "remove", &name]).ok();
        home.run(&["image", "inspect", &name])
            .fails()
            .says(&["no image is called", "iii image pull"]);
        let other = format!("{}/some/box:other", registry.host);
        home.run(&["image", "pull", &other]).fails().says(&[
            &registry.host,
            "some/box",
            "does not exist",
            "the tag",
        ]);
    }
}

#[test]
fn an_index_has_an_image_for_every_platform() {
    if !can_run("pulling from an index of images") {
        return;
    }
    let registry = Registry::start(Door::Open);
    let layout = Layout::new();
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let mut manifests = Vec::new();
    for arch in ["arm64", "amd64"] {
        layout.image(arch, arch, &[(arch, 10)]);
        registry.push(&layout, arch, &format!("box:{arch}"), &[]);
        let path = format!("/v2/box/manifests/{arch}");
        let (head, body) = registry.ask("GET", &path, media_type, "");
        let digest = head
            .lines()
            .find_map(|line| line.strip_prefix("Docker-Content-Digest: "));
        manifests.push(json!({
            "mediaType": media_type, "digest": digest.unwrap(), "size": body.len(),
            "platform": { "os": "linux", "architecture": arch },
        }));
    }
    let index_type = "application/vnd.oci.image.index.v1+json";
    let index = json!({ "schemaVersion": 2, "mediaType": index_type, "manifests": manifests });
    let put = registry.ask("PUT", "/v2/box/manifests/1", index_type, &index.to_string());
    assert!(put.0.contains(" 201 "), "{put:?}");

    let home = Home::new();
    let name = format!("{}/box:1", registry.host);
    for manifest in &manifests {
        let arch = manifest["platform"]["architecture"].as_str().unwrap();
        let platform = format!("linux/{arch}");
        home.run(&["image", "pull", &name, "--platform", &platform])
            .ok();
        let image = inspect(&home, &name);
        assert_eq!(image["digest"], manifest["digest"]);
        assert_eq!(image["platform"], platform);
    }
    home.run(&["image", "pull", &name]).ok();
    let own = format!("linux/{}", arch());
    assert_eq!(inspect(&home, &name)["platform"], own);
    home.run(&["image", "pull", &name, "--platform", "plan9/vax"])
        .exits(2)
        .says(&["expected linux/amd64 or linux/arm64"]);
}

#[test]
fn only_what_is_new_is_moved() {
    const LARGE: usize = 4 << 20;
    if !can_run("counting what a pull moves") {
        return;
    }
    let registry = Registry::start(Door::Open);
    let layout = Layout::new();
    layout.image("one", arch(), &[("large", LARGE)]);
    layout.image("two", arch(), &[("large", LARGE), ("small", 50_000)]);
    registry.push(&layout, "one", "box:1", &[]);
    registry.push(&layout, "two", "box:2", &[]);
    let counter = Counter::new(&registry.host, u64::MAX);
    let home = Home::new();
    let name = |tag| format!("{}/box:{tag}", counter.host);
    home.run(&["image", "pull", &name(1)]).ok();
    assert!(counter.take() > LARGE as u64);
    home.run(&["image", "pull", &name(2)]).ok();
    let moved = counter.take();
    assert!((50_000..100_000).contains(&moved), "{moved} bytes");
    home.run(&["image", "pull", &name(2)]).ok();
    assert!(counter.take() < 20_000, "a manifest and a configuration");
}

#[test]
fn a_killed_pull_goes_on() {
    const LARGE: usize = 4 << 20;
    if !can_run("killing a pull") {
        return;
    }
    let registry = Registry::start(Door::Open);
    let layout = Layout::new();
    let files = [("a", LARGE), ("b", LARGE), ("c", LARGE), ("d", LARGE)];
    layout.image("one", arch(), &files);
    registry.push(&layout, "one", "box:1", &[]);
    let size = files.len() * LARGE;
    let home = Home::new();
    // At most one layer is missing by then, apart from busybox.
    let stops = Counter::new(&registry.host, (size - LARGE / 2) as u64);
    let name = format!("{}/box:1", stops.host);
    let mut pulling = home.start(&["image", "pull", &name]);
    // A layer without a record of its diff id is not found again.
    let keys = home.state().join("store/v1/keys");
    let stored = || fs::read_dir(&keys).map_or(0, Iterator::count);
    assert!(holds_within(LIMIT, || {
        stops.bytes.load(Ordering::Relaxed) > (size - LARGE / 2) as u64 && stored() >= 2
    }));
    assert!(pulling.is_running());
    pulling.signal(Signal::KILL);
    let ended = pulling.finish(LIMIT);
    assert_eq!(ended.status.code(), None);
    home.run(&["image", "list"]).ok();
    assert!(
        !home
            .run(&["image", "list", "--json"])
            .stdout
            .contains(&name)
    );

    let kept = stored();
    let counter = Counter::new(&registry.host, u64::MAX);
    let again = format!("{}/box:1", counter.host);
    home.run(&["image", "pull", &again]).ok();
    let moved = counter.take();
    let left = (files.len() + 1 - kept) as u64;
    assert!(
        moved < left * LARGE as u64 + (1 << 20),
        "{kept} layers were kept, and {moved} bytes were moved"
    );
    let tmp = home.state().join("store/v1/tmp");
    assert_eq!(fs::read_dir(tmp).unwrap().count(), 0);
}

#[test]
fn tls_and_logins() {
    if !can_run("pulling with TLS and a login") {
        return;
    }
    let registry = Registry::start(Door::Guarded);
    let layout = Layout::new();
    layout.image("one", arch(), &[]);
    registry.push(&layout, "one", "box:1", &[]);
    let name = format!("{}/box:1", registry.host);
    let pull = ["image", "pull", &name];
    // No client trusts this CA.
    Home::new()
        .run(&pull)
        .fails()
        .says(&[&registry.host, "certificate", "SSL_CERT_FILE"]);
    let trust = format!(
        "SSL_CERT_FILE={}",
        registry.dir.path().join("ca.crt").display()
    );
    let program = ["/usr/bin/env", &trust, env!("CARGO_BIN_EXE_iii")];
    let home = Home::through(
        TempDir::with_prefix("home-").unwrap(),
        program.map(PathBuf::from).to_vec(),
    );
    home.run(&pull)
        .fails()
        .says(&["refuses access", "without a login", "docker login"]);
    let docker = home.path().join(".docker");
    fs::create_dir(&docker).unwrap();
    for (auth, fits) in [("dXNlcjp3cm9uZw==", false), ("dXNlcjpzZWNyZXQ=", true)] {
        let file = json!({ "auths": { &registry.host: { "auth": auth } } });
        fs::write(docker.join("config.json"), file.to_string()).unwrap();
        let ended = home.run(&pull);
        if fits {
            ended.ok();
        } else {
            ended
                .fails()
                .says(&["refuses access", "with the login that is stored"]);
        }
    }
    assert_eq!(
        inspect(&home, &name)["config"]["env"],
        json!(["MADE_BY=umoci"])
    );
}

#[test]
fn a_worker_brings_its_base() {
    if !can_run("a worker that pulls its base") {
        return;
    }
    let registry = Registry::start(Door::Open);
    let layout = Layout::new();
    layout.image("one", arch(), &[("a", 10)]);
    registry.push(&layout, "one", "box:1", &[]);
    let name = format!("{}/box:1", registry.host);
    let limited = [
        "/usr/bin/env",
        "III_LIMITS=document=300",
        env!("CARGO_BIN_EXE_iii"),
    ];
    let limited = Home::through(
        TempDir::with_prefix("home-").unwrap(),
        limited.map(PathBuf::from).to_vec(),
    );
    let home = Home::new();
    let project = Project::scripts("true", "true", "echo made by $MADE_BY; exec sleep 1000");
    limited
        .run(&["worker", "build", project.arg(), "--base", &name])
        .fails()
        .says(&[
            "is over the limit of 300 (document)",
            "III_LIMITS=document=600",
        ]);
    let mut worker = home.dev(&project, &["--base", &name]);
    worker.wait_for("pulled in");
    worker.wait_for("made by umoci");
    worker.stop();
    let digest = inspect(&home, &name)["digest"].clone();

    // The tag moves, and still stands for the old image.
    layout.image("two", arch(), &[("b", 10)]);
    registry.push(&layout, "two", "box:1", &[]);
    let ended = home
        .run(&["worker", "build", project.arg(), "--base", &name])
        .ok();
    assert!(!ended.stderr.contains("pulled"), "{}", ended.stderr);
    assert_eq!(inspect(&home, &name)["digest"], digest);
    // Until it is to be built anew.
    home.run(&[
        "worker",
        "build",
        project.arg(),
        "--base",
        &name,
        "--rebuild",
    ])
    .ok()
    .says(&["pulled in"]);
    let moved = inspect(&home, &name)["digest"].clone();
    assert_ne!(moved, digest);
    // Without the registry, the stored image serves.
    drop(registry);
    home.run(&[
        "worker",
        "build",
        project.arg(),
        "--base",
        &name,
        "--rebuild",
    ])
    .ok()
    .says(&["stays at its stored version"]);
    assert_eq!(inspect(&home, &name)["digest"], moved);
}
