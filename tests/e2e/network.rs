//! Obstacles between this machine and a registry: proxies, redirects, logins.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread;

use serde_json::json;
use tempfile::TempDir;

use crate::harness::Home;
use crate::registry::{Door, Layout, Registry, arch, can_run, make_certificates};

/// A proxy of HTTP that wants a login, and brings whatever it is asked for from one place.
struct Proxy {
    host: String,
    /// The first lines of the requests that it let pass.
    seen: Arc<Mutex<Vec<String>>>,
}

/// `me:pass word`
const PROXY_LOGIN: &str = "Basic bWU6cGFzcyB3b3Jk";

impl Proxy {
    fn new(to: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (log, to) = (Arc::clone(&seen), to.to_owned());
        // Ends with the process.
        thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let (log, to) = (Arc::clone(&log), to.clone());
                thread::spawn(move || proxy(client, &to, &log));
            }
        });
        Self { host, seen }
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.seen.lock().unwrap())
    }
}

/// Passes one connection on: by CONNECT, or a request for a whole address.
fn proxy(client: TcpStream, to: &str, log: &Mutex<Vec<String>>) -> Option<()> {
    let mut answers = client.try_clone().ok()?;
    let mut input = BufReader::new(client);
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        input.read_line(&mut line).ok().filter(|&read| read > 0)?;
        if line.trim_end().is_empty() {
            break;
        }
        lines.push(line.trim_end().to_owned());
    }
    let has_login = lines.iter().any(|line| {
        let header = line.split_once(": ");
        header.is_some_and(|(name, value)| {
            name.eq_ignore_ascii_case("proxy-authorization") && value == PROXY_LOGIN
        })
    });
    if !has_login {
        let refusal =
            "HTTP/1.1 407 x\r\nProxy-Authenticate: Basic realm=x\r\nContent-Length: 0\r\n\r\n";
        answers.write_all(refusal.as_bytes()).ok()?;
        return None;
    }
    log.lock().unwrap().push(lines.first()?.clone());
    let mut server = TcpStream::connect(to).ok()?;
    let request = lines.first()?;
    if request.starts_with("CONNECT ") {
        answers.write_all(b"HTTP/1.1 200 x\r\n\r\n").ok()?;
    } else {
        // http://host/path becomes /path; one request for each connection.
        let (method, rest) = request.split_once(" http://")?;
        let path = rest.find('/').map(|at| &rest[at..])?;
        let head = lines.iter().skip(1).filter(|line| {
            let name = line.to_ascii_lowercase();
            !name.starts_with("connection:") && !name.starts_with("proxy-")
        });
        let head: Vec<_> = head.map(String::as_str).collect();
        let head = head.join("\r\n");
        let request = format!("{method} {path}\r\n{head}\r\nConnection: close\r\n\r\n");
        server.write_all(request.as_bytes()).ok()?;
    }
    let mut back = server.try_clone().ok()?;
    let upward = thread::spawn(move || {
        let _ = std::io::copy(&mut input, &mut server);
        let _ = server.shutdown(Shutdown::Write);
    });
    let _ = std::io::copy(&mut back, &mut answers);
    let _ = answers.shutdown(Shutdown::Both);
    upward.join().ok()
}

/// A home whose runs have these in their environment.
fn home_with(variables: &[String]) -> Home {
    let program = ["/usr/bin/env"].into_iter();
    let program = program.chain(variables.iter().map(String::as_str));
    let program = program.chain([env!("CARGO_BIN_EXE_iii")]);
    Home::through(
        TempDir::with_prefix("home-").unwrap(),
        program.map(PathBuf::from).collect(),
    )
}

fn port(host: &str) -> &str {
    host.rsplit(':').next().unwrap()
}

#[test]
fn a_proxy_is_asked_for_what_it_is_for() {
    if !can_run("pulling through a proxy") {
        return;
    }
    let layout = Layout::new();
    layout.image("one", arch(), &[("a", 100_000)]);
    for door in [Door::Open, Door::Guarded] {
        let registry = Registry::start(door);
        registry.push(&layout, "one", "box:1", &[]);
        let proxy = Proxy::new(&registry.host);
        // Not a loopback address, though it leads there: those are asked directly.
        let name = format!("0.0.0.0:{}/box:1", port(&registry.host));
        let (variable, other) = match door {
            Door::Open => ("http_proxy", "HTTPS_PROXY"),
            Door::Guarded => ("HTTPS_PROXY", "http_proxy"),
        };
        let mut common = vec![format!("{other}=http://127.0.0.1:1")];
        if door == Door::Open {
            common.push("III_INSECURE_REGISTRIES=0.0.0.0".to_owned());
        } else {
            common.push(format!(
                "SSL_CERT_FILE={}",
                registry.file("ca.crt").display()
            ));
            let auth = json!({ "auths": { name.split('/').next().unwrap(): { "auth": "dXNlcjpzZWNyZXQ=" } } });
            fs::write(registry.file("auth.json"), auth.to_string()).unwrap();
            common.push(format!(
                "REGISTRY_AUTH_FILE={}",
                registry.file("auth.json").display()
            ));
        }
        let with = |more: &[String]| home_with(&[&common[..], more].concat());
        let address = |login: &str| format!("{variable}=http://{login}{}", proxy.host);
        let home = with(&[address("me:pass%20word@")]);
        home.run(&["image", "pull", &name]).ok();
        let seen = proxy.take();
        assert!(!seen.is_empty());
        for line in &seen {
            assert!(
                line.contains(&format!("0.0.0.0:{}", port(&registry.host))),
                "{line}"
            );
        }
        // It does not let everybody through, and what it is told is not shown.
        for login in ["", "me:wrong-word@"] {
            let ended = with(&[address(login)])
                .run(&["image", "pull", &name])
                .fails();
            assert!(!ended.stderr.contains("wrong-word"), "{}", ended.stderr);
            assert_eq!(proxy.take(), [""; 0]);
        }
        // Asked directly, only the one without TLS is there: the other listens elsewhere.
        for except in ["0.0.0.0", "example.com, 0.0.0.0", "*"] {
            let except = format!("NO_PROXY={except}");
            let ended = with(&[address("me:pass%20word@"), except]).run(&["image", "pull", &name]);
            if door == Door::Open {
                ended.ok();
            } else {
                ended.fails();
            }
            assert_eq!(proxy.take(), [""; 0]);
        }
        for elsewhere in ["NO_PROXY=example.com", "NO_PROXY="] {
            let home = with(&[address("me:pass%20word@"), elsewhere.to_owned()]);
            home.run(&["image", "pull", &name]).ok();
            assert!(!proxy.take().is_empty());
        }
    }
}

/// A server with TLS that sends everybody elsewhere.
fn redirecting(dir: &TempDir, to: String) -> String {
    use rustls::pki_types::pem::PemObject as _;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let read = |name: &str| dir.path().join(name);
    let certificate = CertificateDer::from_pem_file(read("crt")).unwrap();
    let key = PrivateKeyDer::from_pem_file(read("key")).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap();
    let config = Arc::new(config);
    let listener = TcpListener::bind("127.0.0.2:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    thread::spawn(move || {
        for client in listener.incoming().map_while(Result::ok) {
            let session = rustls::ServerConnection::new(Arc::clone(&config)).unwrap();
            let mut stream = rustls::StreamOwned::new(session, client);
            let mut request = Vec::new();
            let mut buffer = [0; 4096];
            while !request.ends_with(b"\r\n\r\n") {
                match stream.read(&mut buffer) {
                    Ok(got @ 1..) => request.extend(&buffer[..got]),
                    _ => break,
                }
            }
            let answer = format!("HTTP/1.1 307 x\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n");
            let _ = stream.write_all(answer.as_bytes());
            stream.conn.send_close_notify();
            let _ = stream.flush();
        }
    });
    host
}

#[test]
fn nothing_goes_from_https_to_http() {
    if !can_run("a redirect from https to http") {
        return;
    }
    let dir = TempDir::new().unwrap();
    make_certificates(dir.path());
    let open = TcpListener::bind("127.0.0.1:0").unwrap();
    open.set_nonblocking(true).unwrap();
    let to = format!("http://{}/v2/box/manifests/1", open.local_addr().unwrap());
    let host = redirecting(&dir, to.clone());
    let home = home_with(&[format!(
        "SSL_CERT_FILE={}",
        dir.path().join("ca.crt").display()
    )]);
    home.run(&["image", "pull", &format!("{host}/box:1")])
        .fails()
        .says(&[&host, "leads to", &to, "which is not encrypted"]);
    let came = open.accept().map(drop).map_err(|error| error.kind());
    assert_eq!(came, Err(std::io::ErrorKind::WouldBlock));
}

#[test]
fn logins_are_looked_for_where_docker_and_podman_keep_them() {
    if !can_run("where logins are looked for") {
        return;
    }
    let registry = Registry::start(Door::Guarded);
    let layout = Layout::new();
    layout.image("one", arch(), &[]);
    registry.push(&layout, "one", "box:1", &[]);
    let name = format!("{}/box:1", registry.host);
    // Each goes before those after it; the last two are one place, which a variable moves.
    let places = [
        ("REGISTRY_AUTH_FILE", "own.json"),
        ("XDG_RUNTIME_DIR", "containers/auth.json"),
        ("XDG_CONFIG_HOME", "containers/auth.json"),
        ("DOCKER_CONFIG", "config.json"),
    ];
    let write = |path: PathBuf, file: &serde_json::Value| {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, file.to_string()).unwrap();
    };
    let auth = |text: &str| json!({ "auths": { &registry.host: { "auth": text } } });
    let (right, wrong) = (auth("dXNlcjpzZWNyZXQ="), auth("dXNlcjp3cm9uZw=="));
    let trust = format!("SSL_CERT_FILE={}", registry.file("ca.crt").display());
    let dir = TempDir::new().unwrap();
    // The right login is in the first that is set, or in one after it.
    for first in 0..places.len() {
        for at in first..places.len() {
            let mut variables = vec![trust.clone()];
            for (ix, (variable, file)) in places.iter().enumerate().skip(first) {
                let place = dir.path().join(format!("{first}-{at}-{ix}"));
                write(place.join(file), if ix == at { &right } else { &wrong });
                let value = if ix == 0 { place.join(file) } else { place };
                variables.push(format!("{variable}={}", value.display()));
            }
            let ended = home_with(&variables).run(&["image", "pull", &name]);
            if at == first {
                ended.ok();
            } else {
                ended.fails().says(&["with the login that is stored"]);
            }
        }
    }
    // Below the home directory, where no variable says otherwise.
    let home = home_with(std::slice::from_ref(&trust));
    write(home.path().join(".docker/config.json"), &right);
    home.run(&["image", "pull", &name]).ok();
    write(home.path().join(".config/containers/auth.json"), &wrong);
    home.run(&["image", "pull", &name]).fails();
    write(
        home.path().join(".config/containers/auth.json"),
        &json!({ "auths": {} }),
    );
    home.run(&["image", "pull", &name]).ok();
}

#[test]
fn a_credential_helper_is_asked() {
    if !can_run("credential helpers") {
        return;
    }
    let registry = Registry::start(Door::Guarded);
    let layout = Layout::new();
    layout.image("one", arch(), &[]);
    registry.push(&layout, "one", "box:1", &[]);
    let host = &registry.host;
    let name = format!("{host}/box:1");
    let dir = TempDir::new().unwrap();
    let helper = |name: &str, script: &str| {
        let path = dir.path().join(format!("docker-credential-{name}"));
        // By a process of its own: a file that this one has written may be open in another test's
        // child, and not run.
        let made = Command::new("sh")
            .args([
                "-c",
                r#"printf '#!/bin/sh\n%s\n' "$1" >"$0" && chmod 755 "$0""#,
            ])
            .args([path.as_os_str(), script.as_ref()])
            .status();
        assert!(made.unwrap().success());
    };
    let says = |user: &str, secret: &str| {
        format!(
            "read host; test \"$1 $host\" = 'get {host}' && echo '{{\"Username\":\"{user}\",\"Secret\":\"{secret}\"}}'"
        )
    };
    helper("good", &says("user", "secret"));
    helper("wrong", &says("user", "other-word"));
    helper(
        "nothing",
        "echo credentials not found in native keychain; exit 1",
    );
    helper("garbage", "echo hidden-word");
    let path = std::env::var("PATH").unwrap();
    let home = home_with(&[
        format!("SSL_CERT_FILE={}", registry.file("ca.crt").display()),
        format!("PATH={}:{path}", dir.path().display()),
    ]);
    let stored = json!({ host: { "auth": "dXNlcjpzZWNyZXQ=" } });
    let nobody = json!({});
    for (file, says) in [
        (json!({ "credsStore": "good" }), ""),
        (json!({ "credHelpers": { host: "good" } }), ""),
        (
            json!({ "credHelpers": { host: "good" }, "credsStore": "garbage" }),
            "",
        ),
        (
            json!({ "credHelpers": { "elsewhere": "garbage" }, "credsStore": "good" }),
            "",
        ),
        (
            json!({ "credHelpers": { host: "nothing" }, "auths": stored }),
            "",
        ),
        (
            json!({ "credsStore": "wrong" }),
            "with the login that is stored",
        ),
        (
            json!({ "credsStore": "nothing", "auths": nobody }),
            "without a login",
        ),
        (
            json!({ "credsStore": "garbage" }),
            "docker-credential-garbage failed: its answer is no login",
        ),
        (
            json!({ "credsStore": "absent" }),
            "docker-credential-absent failed: No such file",
        ),
    ] {
        fs::create_dir_all(home.path().join(".docker")).unwrap();
        fs::write(home.path().join(".docker/config.json"), file.to_string()).unwrap();
        let ended = home.run(&["image", "pull", &name]);
        for word in ["secret", "other-word", "hidden-word"] {
            assert!(!ended.stderr.contains(word), "{}", ended.stderr);
        }
        if says.is_empty() {
            ended.ok();
        } else {
            ended.fails().says(&[says]);
        }
    }
}
