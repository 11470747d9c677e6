//! A registry of the tests' own, on loopback, that can be told to lie.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use iii_store::with_causes;
use serde_json::{Value, json};

use super::auth::Bearer;
use super::*;
use crate::tests::{Tar, TestStore};
use crate::{Image, Imported, Limits, Platform};

/// A request as the server sees it.
#[derive(Debug, Clone)]
pub struct Request {
    pub method: String,
    /// Path and query.
    pub path: String,
    headers: HashMap<String, String>,
    pub body: Vec<u8>,
}

impl Request {
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }

    pub fn set_header(&mut self, name: &str, value: String) {
        self.headers.insert(name.to_owned(), value);
    }
}

/// The server's reaction to a request.
pub enum Reply {
    /// Status, headers, body; the length of the body is added.
    Full(u16, Vec<(&'static str, String)>, Vec<u8>),
    /// Exactly these bytes, then the end of the connection.
    Raw(Vec<u8>),
    /// These bytes, and then the last ones again and again until the client is gone.
    Endless(Vec<u8>, Vec<u8>),
}

pub type Handler = dyn Fn(&Request) -> Reply + Send + Sync;

/// Answers on a port of its own until it is dropped.
pub struct Server {
    pub host: String,
    seen: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    pub fn new(handler: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&seen);
        let handler: Arc<Handler> = Arc::new(handler);
        // Ends with the process: a test that failed leaves it waiting.
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (handler, log) = (Arc::clone(&handler), Arc::clone(&log));
                thread::spawn(move || serve(stream, &*handler, &log));
            }
        });
        Self { host, seen }
    }

    pub fn seen(&self) -> Vec<Request> {
        self.seen.lock().unwrap().clone()
    }

    /// How often something was asked for whose path has `part` in it.
    pub fn count(&self, part: &str) -> usize {
        let seen = self.seen();
        seen.iter().filter(|one| one.path.contains(part)).count()
    }
}

fn serve(stream: TcpStream, handler: &Handler, log: &Mutex<Vec<Request>>) {
    let mut out = stream.try_clone().unwrap();
    let mut input = BufReader::new(stream);
    while let Some(request) = read_request(&mut input) {
        log.lock().unwrap().push(request.clone());
        let sent = match handler(&request) {
            Reply::Full(status, headers, body) => {
                let mut head = format!("HTTP/1.1 {status} x\r\nContent-Length: {}\r\n", body.len());
                for (name, value) in headers {
                    head = format!("{head}{name}: {value}\r\n");
                }
                out.write_all(head.as_bytes())
                    .and_then(|()| out.write_all(b"\r\n"))
                    .and_then(|()| out.write_all(&body))
            }
            Reply::Raw(bytes) => {
                let _ = out.write_all(&bytes);
                let _ = out.shutdown(std::net::Shutdown::Both);
                return;
            }
            Reply::Endless(bytes, again) => {
                let mut sent = out.write_all(&bytes);
                while sent.is_ok() {
                    sent = out.write_all(&again);
                }
                sent
            }
        };
        if sent.is_err() {
            return;
        }
    }
}

fn read_request(input: &mut BufReader<TcpStream>) -> Option<Request> {
    let mut line = String::new();
    input.read_line(&mut line).ok().filter(|&read| read > 0)?;
    let mut words = line.split(' ').map(str::to_owned);
    let (method, path) = (words.next()?, words.next()?);
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        input.read_line(&mut line).ok()?;
        let line = line.trim_end();
        if line.is_empty() {
            break;
        }
        let (name, value) = line.split_once(':')?;
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let length = headers
        .get("content-length")
        .map_or(0, |text| text.parse().unwrap());
    let mut body = vec![0; length];
    input.read_exact(&mut body).ok()?;
    Some(Request {
        method,
        path,
        headers,
        body,
    })
}

pub fn ok(body: impl Into<Vec<u8>>) -> Reply {
    Reply::Full(200, Vec::new(), body.into())
}

pub fn status(status: u16) -> Reply {
    Reply::Full(status, Vec::new(), Vec::new())
}

fn to(location: impl Into<String>) -> Reply {
    Reply::Full(307, vec![("Location", location.into())], Vec::new())
}

/// The documents and blobs of an image, by the paths under which a registry has them.
#[derive(Clone, Default)]
struct Content(HashMap<String, Vec<u8>>);

const BASE: &str = "/v2/a/b";

impl Content {
    fn blob(&mut self, media_type: &str, bytes: &[u8]) -> Value {
        let digest = Digest::of(bytes).to_string();
        let kind = if media_type.contains("manifest") || media_type.contains("index") {
            "manifests"
        } else {
            "blobs"
        };
        self.0
            .insert(format!("{BASE}/{kind}/{digest}"), bytes.to_vec());
        json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() })
    }

    /// An image of these layers under the tag `tag`. Returns its descriptor, and those of its
    /// layers.
    fn image(&mut self, tag: &str, arch: &str, archives: &[Vec<u8>]) -> (Value, Vec<Value>) {
        let diff_ids: Vec<_> = archives.iter().map(|one| Digest::of(one)).collect();
        let config = json!({
            "architecture": arch, "os": "linux",
            "config": { "Env": ["A=b"] },
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = self.blob(
            "application/vnd.oci.image.config.v1+json",
            config.to_string().as_bytes(),
        );
        let layers: Vec<_> = archives
            .iter()
            .map(|one| self.blob("application/vnd.oci.image.layer.v1.tar", one))
            .collect();
        let manifest_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({
            "schemaVersion": 2, "mediaType": manifest_type, "config": config, "layers": layers,
        });
        let manifest = manifest.to_string().into_bytes();
        let mut descriptor = self.blob(manifest_type, &manifest);
        descriptor["platform"] = json!({ "os": "linux", "architecture": arch });
        self.0.insert(format!("{BASE}/manifests/{tag}"), manifest);
        (descriptor, layers)
    }

    fn get(&self, request: &Request) -> Reply {
        match self.0.get(&request.path) {
            Some(bytes) => ok(bytes.clone()),
            None => status(404),
        }
    }
}

fn arch() -> &'static str {
    match Platform::host() {
        Platform::Amd64 => "amd64",
        Platform::Arm64 => "arm64",
    }
}

/// An archive with a file of `size` bytes that do not repeat.
fn archive(seed: u64, size: usize) -> Vec<u8> {
    let mut state = seed;
    let mut bytes = Vec::with_capacity(size);
    while bytes.len() < size {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        bytes.push((state >> 56) as u8);
    }
    Tar::default()
        .dir("etc")
        .file(format!("etc/{seed}"), bytes)
        .end()
}

pub fn settings() -> Settings {
    Settings {
        patience: Patience {
            connect: Duration::from_secs(5),
            idle: Duration::from_secs(5),
            backoff: Duration::from_millis(1),
            tries: 3,
        },
        ..Settings::default()
    }
}

fn pull_with(test: &TestStore, name: &str, settings: &Settings) -> Result<Imported, String> {
    crate::pull(
        &test.store,
        name,
        Platform::host(),
        settings,
        &Limits::default(),
        &|_| {},
    )
    .map_err(|error| with_causes(&error))
}

fn pull(test: &TestStore, server: &Server) -> Result<Image, String> {
    let name = format!("{}/a/b:1", server.host);
    pull_with(test, &name, &settings()).map(|pulled| pulled.image)
}

#[test]
fn an_image_comes_whole_and_only_once() {
    let test = TestStore::new();
    let mut content = Content::default();
    let archives = [archive(1, 3 << 20), archive(2, 10), archive(1, 3 << 20)];
    let (manifest, _) = content.image("1", arch(), &archives);
    let server = Server::new(move |request| content.get(request));
    let image = pull(&test, &server).unwrap();
    assert_eq!(image.name, format!("{}/a/b:1", server.host));
    assert_eq!(image.digest.unwrap().to_string(), manifest["digest"]);
    assert_eq!(image.origin, crate::Origin::Registry);
    assert_eq!(image.platform, Some(Platform::host()));
    assert_eq!(image.config.env, ["A=b"]);
    assert_eq!(image.layers.len(), 3);
    assert_eq!(image.layers[0], image.layers[2]);
    // A manifest, a configuration and two different layers.
    assert_eq!(server.seen().len(), 4);
    let again = pull(&test, &server).unwrap();
    assert_eq!(again.layers, image.layers);
    assert_eq!(server.seen().len(), 6, "no layer is downloaded twice");
    // Asked for by its digest, it has to be that.
    let pinned = format!("{}/a/b@{}", server.host, image.digest.unwrap());
    pull_with(&test, &pinned, &settings()).unwrap();
    assert_eq!(crate::list(&test.store).unwrap().len(), 2);
}

#[test]
fn layers_that_take_from_those_below_are_read_in_order() {
    let test = TestStore::new();
    let lower = Tar::default().dir("etc").file("etc/name", "x").end();
    let above = Tar::default().hardlink("linked", "etc/name").end();
    let mut content = Content::default();
    content.image("1", arch(), &[lower, above]);
    let server = Server::new(move |request| content.get(request));
    let image = pull(&test, &server).unwrap();
    let shown = test.show(&test.store.layer(&image.layers[1]).unwrap());
    assert!(shown.contains(&"linked = x link#0".to_owned()), "{shown:?}");
}

#[test]
fn of_an_index_the_right_platform_is_taken() {
    let test = TestStore::new();
    let mut content = Content::default();
    let (amd, _) = content.image("amd", "amd64", &[archive(1, 10)]);
    let (arm, _) = content.image("arm", "arm64", &[archive(2, 10)]);
    let (mips, _) = content.image("mips", "mips64", &[archive(3, 10)]);
    let docker = "application/vnd.docker.distribution.manifest.list.v2+json";
    let index = |manifests: &[&Value]| {
        json!({ "schemaVersion": 2, "mediaType": docker, "manifests": manifests }).to_string()
    };
    let tag = |tag| format!("{BASE}/manifests/{tag}");
    content
        .0
        .insert(tag("1"), index(&[&mips, &amd, &arm]).into());
    content.0.insert(tag("2"), index(&[&mips]).into());
    let server = Server::new(move |request| content.get(request));
    for (platform, expected) in [(Platform::Amd64, &amd), (Platform::Arm64, &arm)] {
        let name = format!("{}/a/b:1", server.host);
        let image = crate::pull(
            &test.store,
            &name,
            platform,
            &settings(),
            &Limits::default(),
            &|_| {},
        )
        .unwrap()
        .image;
        assert_eq!(image.digest.unwrap().to_string(), expected["digest"]);
        assert_eq!(image.platform, Some(platform));
    }
    let name = format!("{}/a/b:2", server.host);
    let error = pull_with(&test, &name, &settings()).unwrap_err();
    assert!(error.contains("only for linux/mips64"), "{error}");
}

/// Every lie, what is lied about, and what the error says. Each has to end by itself, and soon.
#[test]
#[expect(clippy::too_many_lines, reason = "it is a table")]
fn lies_are_refused_within_bounds() {
    /// Whether the request is the one that is lied to; `LAYER` stands for the layer's blob.
    const LAYER: &str = "LAYER";
    const TAG: &str = "/manifests/1";
    type Lie = Box<dyn Fn(&Request, &[u8]) -> Reply + Send + Sync>;
    let chunked = |bytes: &[u8]| {
        let mut reply = b"HTTP/1.1 200 x\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
        reply.extend(format!("{:x}\r\n", bytes.len()).bytes());
        reply.extend(bytes);
        reply.extend(b"\r\n");
        reply
    };
    let piece = [b"10000\r\n".to_vec(), vec![b' '; 1 << 16], b"\r\n".to_vec()].concat();
    let (piece, other_piece) = (piece.clone(), piece);
    let cases: Vec<(&str, &str, Lie, &str)> = vec![
        (
            "other bytes of the right length",
            LAYER,
            Box::new(|_, truth| ok(vec![0; truth.len()])),
            "its digest is",
        ),
        (
            "announced as longer",
            LAYER,
            Box::new(|_, truth| ok([truth, &b"x"[..]].concat())),
            "bytes, but",
        ),
        (
            "announced as shorter",
            LAYER,
            Box::new(|_, truth| ok(truth[1..].to_vec())),
            "bytes, but",
        ),
        (
            "announced as 3 GiB",
            LAYER,
            Box::new(|_, _| {
                Reply::Raw(b"HTTP/1.1 200 x\r\nContent-Length: 3221225472\r\n\r\n".to_vec())
            }),
            "3221225472 bytes, but",
        ),
        (
            "longer, unannounced",
            LAYER,
            Box::new(move |_, truth| {
                Reply::Raw([chunked(truth), b"1\r\nx\r\n0\r\n\r\n".to_vec()].concat())
            }),
            "its size is not",
        ),
        (
            "shorter, unannounced, every time",
            LAYER,
            Box::new(move |_, truth| {
                Reply::Raw([chunked(&truth[..5]), b"0\r\n\r\n".to_vec()].concat())
            }),
            "could not be resumed",
        ),
        (
            "endless",
            LAYER,
            Box::new(move |_, truth| Reply::Endless(chunked(truth), piece.clone())),
            "its size is not",
        ),
        (
            "cut off at the same byte every time",
            LAYER,
            Box::new(|_, truth| {
                let head = format!("HTTP/1.1 200 x\r\nContent-Length: {}\r\n\r\n", truth.len());
                Reply::Raw([head.as_bytes(), &truth[..100]].concat())
            }),
            "broke off at byte 100 of",
        ),
        (
            "another part than was asked for",
            LAYER,
            Box::new(|request, truth| {
                let head = if request.header("range").is_empty() {
                    format!("HTTP/1.1 200 x\r\nContent-Length: {}\r\n\r\n", truth.len())
                } else {
                    format!(
                        "HTTP/1.1 206 x\r\nContent-Length: {}\r\nContent-Range: bytes 0-\r\n\r\n",
                        truth.len()
                    )
                };
                Reply::Raw([head.as_bytes(), &truth[..100]].concat())
            }),
            "does not go on from where it broke off",
        ),
        (
            "a manifest of 3 GiB",
            TAG,
            Box::new(|_, _| {
                let head = b"HTTP/1.1 200 x\r\nContent-Length: 3221225472\r\n\r\n{".to_vec();
                Reply::Endless(head, vec![b' '; 1 << 16])
            }),
            "over the limit of 4194304",
        ),
        (
            "an endless manifest",
            TAG,
            Box::new(move |_, _| Reply::Endless(chunked(b"{"), other_piece.clone())),
            "over the limit of 4194304",
        ),
        (
            "no manifest",
            TAG,
            Box::new(|_, _| ok("<html>")),
            "is not a valid image manifest",
        ),
        (
            "a manifest of another kind",
            TAG,
            Box::new(|_, _| {
                ok(json!({ "schemaVersion": 1, "mediaType": "application/vnd.docker.distribution.manifest.v1+prettyjws" }).to_string())
            }),
            "which is not an image or an index of images",
        ),
        (
            "an index that leads to something else",
            "/manifests/",
            Box::new(|_, truth| {
                let itself = json!({
                    "mediaType": "application/vnd.oci.image.index.v1+json",
                    "digest": Digest::of(truth).to_string(), "size": truth.len(),
                });
                ok(json!({
                    "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
                    "manifests": vec![itself; 1000],
                })
                .to_string())
            }),
            "its size is not",
        ),
        (
            "a redirect in a circle",
            TAG,
            Box::new(|request, _| to(request.path.clone())),
            "more than 8 redirects",
        ),
        (
            "a redirect to a file",
            TAG,
            Box::new(|_, _| to("file:///etc/passwd")),
            "which is not an http or https address",
        ),
        (
            "a redirect with a user",
            TAG,
            Box::new(|_, _| to("http://a:b@127.0.0.1/")),
            "which is not an http or https address",
        ),
        (
            "a redirect to nowhere",
            TAG,
            Box::new(|_, _| status(307)),
            "which is not an http or https address",
        ),
        (
            "a login that is never enough",
            TAG,
            Box::new(|request, _| {
                let realm = format!("Bearer realm=\"http://{}/token\"", request.header("host"));
                Reply::Full(401, vec![("WWW-Authenticate", realm)], Vec::new())
            }),
            "refuses access",
        ),
        (
            "a challenge of an unknown kind",
            TAG,
            Box::new(|_, _| {
                let negotiate = "Negotiate".to_owned();
                Reply::Full(401, vec![("WWW-Authenticate", negotiate)], Vec::new())
            }),
            "asks for a login in a way that is not supported",
        ),
        (
            "no such image, in a strange voice",
            TAG,
            Box::new(|_, _| {
                let body =
                    json!({ "errors": [{ "code": "X", "message": "gone\u{1b}[31m\u{7}!" }] });
                Reply::Full(404, Vec::new(), body.to_string().into())
            }),
            "does not exist (it says: gone!)",
        ),
        (
            "headers without end",
            TAG,
            Box::new(|_, _| {
                Reply::Endless(b"HTTP/1.1 200 x\r\n".to_vec(), b"X: y\r\n".repeat(1000))
            }),
            "requesting",
        ),
        (
            "not HTTP",
            TAG,
            Box::new(|_, _| Reply::Raw(b"SSH-2.0-x\r\n".to_vec())),
            "requesting",
        ),
    ];
    for (what, where_, lie, message) in cases {
        let mut content = Content::default();
        let (_, layers) = content.image("1", arch(), &[archive(7, 300_000)]);
        let layer = format!("/blobs/{}", layers[0]["digest"].as_str().unwrap());
        let where_ = if where_ == LAYER {
            layer
        } else {
            where_.to_owned()
        };
        let server = Server::new(move |request| {
            if request.path.starts_with("/token") {
                ok(json!({ "token": "t" }).to_string())
            } else if request.path.contains(&where_) {
                let truth = content.0.get(&request.path).map_or(&b""[..], Vec::as_slice);
                lie(request, truth)
            } else {
                content.get(request)
            }
        });
        let test = TestStore::new();
        let error = pull(&test, &server).expect_err(what);
        assert!(error.contains(message), "{what}: {error}");
        // Nothing of it has a name.
        assert_eq!(crate::list(&test.store).unwrap(), [], "{what}");
        assert!(server.seen().len() < 80, "{what}: {}", server.seen().len());
    }
}

#[test]
fn what_breaks_goes_on_where_it_broke() {
    let bytes = archive(5, 2_000_000);
    let mut content = Content::default();
    content.image("1", arch(), std::slice::from_ref(&bytes));
    // Cuts every answer after 300,000 bytes; one server can send parts, the other cannot.
    for parts in [true, false] {
        let content = content.clone();
        let sent = Arc::new(Mutex::new(0));
        let counter = Arc::clone(&sent);
        let server = Server::new(move |request| {
            let Reply::Full(200, _, body) = content.get(request) else {
                return status(404);
            };
            if body.len() < 1_000_000 {
                return ok(body);
            }
            let range = request.header("range");
            let from = range.strip_prefix("bytes=").map_or(0, |range| {
                range.trim_end_matches('-').parse::<usize>().unwrap()
            });
            let (head, rest) = if parts && from > 0 {
                let head = format!(
                    "HTTP/1.1 206 x\r\nContent-Range: bytes {from}-{}/{}\r\n",
                    body.len() - 1,
                    body.len()
                );
                (head, &body[from..])
            } else {
                ("HTTP/1.1 200 x\r\n".to_owned(), &body[..])
            };
            let head = format!("{head}Content-Length: {}\r\n\r\n", rest.len());
            // The second server gets further each time.
            let cut = if parts { 300_000 } else { from + 300_000 };
            let piece = &rest[..rest.len().min(cut)];
            *counter.lock().unwrap() += piece.len();
            Reply::Raw([head.as_bytes(), piece].concat())
        });
        let test = TestStore::new();
        let image = pull(&test, &server).unwrap();
        let shown = test.show(&test.store.layer(&image.layers[0]).unwrap());
        assert!(shown.iter().any(|line| line.starts_with("etc/5 = ")));
        assert_eq!(server.count("/blobs/"), 1 + bytes.len().div_ceil(300_000));
        if parts {
            assert_eq!(*sent.lock().unwrap(), bytes.len(), "nothing is sent twice");
        }
    }
}

#[test]
fn a_pull_that_failed_keeps_its_whole_layers() {
    let mut content = Content::default();
    let archives = [
        archive(1, 10),
        archive(2, 10),
        archive(3, 10),
        archive(4, 10),
    ];
    let (_, layers) = content.image("1", arch(), &archives);
    let last = layers[3]["digest"].as_str().unwrap().to_owned();
    let broken = Arc::new(Mutex::new(true));
    let is_broken = Arc::clone(&broken);
    let missing = last.clone();
    let server = Server::new(move |request| {
        if request.path.contains(&missing) && *is_broken.lock().unwrap() {
            return status(404);
        }
        content.get(request)
    });
    let test = TestStore::new();
    let error = pull(&test, &server).unwrap_err();
    assert!(
        error.contains(&last) && error.contains(&server.host),
        "{error}"
    );
    *broken.lock().unwrap() = false;
    let before = server.count("/blobs/");
    pull(&test, &server).unwrap();
    // The configuration, and at most the layers that were being read beside the one that failed.
    assert!(server.count("/blobs/") - before <= 1 + crate::layers::MAX_PARALLEL);
    assert!(server.count("/blobs/") - before >= 2);
}

#[test]
fn passing_failures_are_tried_again_and_others_are_not() {
    for (code, tries) in [(503, 3), (429, 3), (500, 3), (404, 1), (403, 1), (400, 1)] {
        let server = Server::new(move |_| status(code));
        let error = pull(&TestStore::new(), &server).unwrap_err();
        assert_eq!(server.seen().len(), tries, "{code}: {error}");
        assert!(error.contains(&server.host), "{error}");
    }
    let mut content = Content::default();
    content.image("1", arch(), &[archive(1, 10)]);
    let turn = Mutex::new(0);
    let server = Server::new(move |request| {
        let mut turn = turn.lock().unwrap();
        *turn += 1;
        if *turn % 2 == 1 {
            Reply::Full(503, vec![("Retry-After", "0".into())], Vec::new())
        } else {
            content.get(request)
        }
    });
    pull(&TestStore::new(), &server).unwrap();
}

/// A registry that wants a token, which is given for `user:secret` or for an identity.
fn guarded(content: Content) -> Server {
    Server::new(move |request| {
        if request.path.starts_with("/token") {
            let body = String::from_utf8_lossy(&request.body);
            let knows = request.header("authorization") == "Basic dXNlcjpzZWNyZXQ="
                || body.contains("refresh_token=id%2Ftoken");
            let scope = "scope=repository%3Aa%2Fb%3Apull";
            let asks = request.path.contains(scope) || body.contains(scope);
            return if knows && asks {
                ok(json!({ "access_token": "good" }).to_string())
            } else {
                status(401)
            };
        }
        if request.header("authorization") == "Bearer good" {
            return content.get(request);
        }
        let challenge = format!(
            "Bearer realm=\"http://{}/token\",service=\"the registry\",scope=\"repository:a/b:pull\"",
            request.header("host")
        );
        Reply::Full(401, vec![("WWW-Authenticate", challenge)], Vec::new())
    })
}

#[test]
fn logins_are_found_in_the_files_of_docker_and_podman() {
    let mut content = Content::default();
    content.image("1", arch(), &[archive(1, 10)]);
    let server = guarded(content);
    let host = &server.host;
    let cases = [
        (
            json!({ "auths": { host: { "auth": "dXNlcjpzZWNyZXQ=" } } }),
            "",
        ),
        (
            json!({ "auths": { format!("https://{host}/v1/"): { "username": "user", "password": "secret" } } }),
            "",
        ),
        (
            json!({ "auths": {
                host: { "auth": "d3Jvbmc6d3Jvbmc=" },
                format!("{host}/a"): { "auth": "dXNlcjpzZWNyZXQ=" },
            } }),
            "",
        ),
        (
            json!({ "auths": { host: { "identitytoken": "id/token" } } }),
            "",
        ),
        (
            json!({ "auths": { host: { "auth": "d3Jvbmc6d3Jvbmc=" } } }),
            "with the login that is stored",
        ),
        (json!({ "auths": {} }), "without a login"),
        (json!({ "auths": 7 }), "not a valid file of credentials"),
        (
            json!({ "credHelpers": { host: "of-nobody-at-all" } }),
            "docker-credential-of-nobody-at-all failed",
        ),
        (
            json!({ "credsStore": "../../bin/sh" }),
            "docker-credential-../../bin/sh failed",
        ),
    ];
    for (file, message) in cases {
        let test = TestStore::new();
        let path = test.dir.path().join("auth.json");
        std::fs::write(&path, file.to_string()).unwrap();
        let settings = Settings {
            auth: AuthFiles(vec![test.dir.path().join("none.json"), path]),
            ..settings()
        };
        let pulled = pull_with(&test, &format!("{host}/a/b:1"), &settings);
        match pulled {
            Ok(_) => assert_eq!(message, "", "{file}"),
            Err(error) => {
                assert!(
                    !message.is_empty() && error.contains(message),
                    "{file}: {error}"
                );
                assert!(!error.contains("secret"), "{error}");
            }
        }
    }
}

#[test]
fn a_login_stays_with_the_registry() {
    let blob_host = Server::new(|request| {
        assert_eq!(request.header("authorization"), "");
        status(404)
    });
    let elsewhere = format!("http://{}", blob_host.host);
    let server = Server::new(move |request| {
        if request.header("authorization") == "Basic dXNlcjpzZWNyZXQ=" {
            return to(format!("{elsewhere}{}", request.path));
        }
        let basic = "Basic realm=\"x\"".to_owned();
        Reply::Full(401, vec![("WWW-Authenticate", basic)], Vec::new())
    });
    let test = TestStore::new();
    let path = test.dir.path().join("auth.json");
    let file = json!({ "auths": { &server.host: { "auth": "dXNlcjpzZWNyZXQ=" } } });
    std::fs::write(&path, file.to_string()).unwrap();
    let settings = Settings {
        auth: AuthFiles(vec![path]),
        ..settings()
    };
    let error = pull_with(&test, &format!("{}/a/b:1", server.host), &settings).unwrap_err();
    assert!(error.contains("does not exist"), "{error}");
    assert_eq!(blob_host.seen().len(), 1);
}

#[test]
fn a_host_that_a_redirect_leads_to_asks_for_a_login_in_vain() {
    let thief = Server::new(|request| {
        assert_eq!(request.header("authorization"), "");
        let realm = format!("Bearer realm=\"http://{}/token\"", request.header("host"));
        Reply::Full(401, vec![("WWW-Authenticate", realm)], Vec::new())
    });
    let elsewhere = format!("http://{}/x", thief.host);
    let server = Server::new(move |_| to(elsewhere.clone()));
    let test = TestStore::new();
    let path = test.dir.path().join("auth.json");
    let file = json!({ "auths": { &server.host: { "auth": "dXNlcjpzZWNyZXQ=" } } });
    std::fs::write(&path, file.to_string()).unwrap();
    let settings = Settings {
        auth: AuthFiles(vec![path]),
        ..settings()
    };
    let error = pull_with(&test, &format!("{}/a/b:1", server.host), &settings).unwrap_err();
    assert!(error.contains("refuses access"), "{error}");
    assert_eq!(thief.count("/token"), 0);
}

#[test]
fn what_a_location_means() {
    for (at, location, expected) in [
        ("http://a:1/b/c?d", "http://e/f", "http://e/f"),
        ("http://a:1/b/c?d", "/f?g", "http://a:1/f?g"),
        ("http://a:1/b/c?d", "//e/f", "http://e/f"),
        ("http://a:1/b/c?d", "f/g?h:i", "http://a:1/b/f/g?h:i"),
        ("http://a:1/b/c?d", "?e=f", "http://a:1/b/c?e=f"),
    ] {
        let next = http::next(&at.parse().unwrap(), location).unwrap();
        assert_eq!(next.to_string(), expected, "{at} {location}");
    }
    for location in ["", "x:y", "file:///z", "http://u@a/", "http://"] {
        let at = "http://a:1/b".parse().unwrap();
        http::next(&at, location).unwrap_err();
    }
}

#[test]
fn nothing_leads_from_https_to_http() {
    for (from, to, message) in [
        ("https://a/x", "http://a/x", "which is not encrypted"),
        (
            "https://a/x?secret",
            "http://b/?secret",
            "which is not encrypted",
        ),
        ("http://a/x", "ftp://a/x", "not an http or https address"),
        ("http://a/x", "", "not an http or https address"),
        ("http://a/x", "http:///x", "not an http or https address"),
    ] {
        let error = http::checked(from, to).unwrap_err().to_string();
        assert!(error.contains(message), "{from} {to}: {error}");
        assert!(!error.contains("secret"), "{error}");
    }
    for (from, to) in [
        ("http://a", "https://b/"),
        ("https://a", "https://b/"),
        ("http://a", "http://b/"),
    ] {
        http::checked(from, to).unwrap();
    }
}

#[test]
fn mirrors_are_asked_first_and_the_registry_last() {
    let mut content = Content::default();
    content.image("1", arch(), &[archive(1, 10)]);
    let mirrored = content.clone();
    // A mirror of everything but the layers, below a prefix.
    let mirror = Server::new(move |request| {
        let mut request = request.clone();
        request.path = request.path.replace("/v2/pre/fix/", "/v2/");
        if request.path.contains("/manifests/") {
            mirrored.get(&request)
        } else {
            status(503)
        }
    });
    let server = Server::new(move |request| content.get(request));
    let entry = format!("{}={}/pre/fix", server.host, mirror.host);
    let settings = Settings {
        mirrors: parse_mirrors(&[entry]).unwrap(),
        ..settings()
    };
    pull_with(
        &TestStore::new(),
        &format!("{}/a/b:1", server.host),
        &settings,
    )
    .unwrap();
    assert_eq!(mirror.count("/v2/pre/fix/a/b/manifests/1"), 1);
    assert_eq!(server.count("/manifests/"), 0);
    assert_eq!(server.count("/blobs/"), 2);
}

#[test]
fn mirrors_parse_or_are_errors() {
    let parse = |text: &str| parse_mirrors(&[text.to_owned()]);
    for (text, host, prefix) in [
        ("docker.io=mirror.example:5000", "mirror.example:5000", ""),
        ("docker.io=localhost/a/b", "localhost", "a/b/"),
        ("docker.io=localhost/a/", "localhost", "a/"),
    ] {
        let mirror = parse(text).unwrap().remove(0);
        assert_eq!(
            (mirror.host.as_str(), mirror.prefix.as_str()),
            (host, prefix)
        );
    }
    for text in [
        "docker.io",
        "docker.io=",
        "=localhost",
        "docker.io=https://x",
        "docker.io=x/../y",
    ] {
        let error = parse(text).unwrap_err().to_string();
        assert!(error.contains("III_REGISTRY_MIRRORS"), "{error}");
    }
}

#[test]
fn loopback_and_what_is_listed_is_plain_http() {
    let settings = Settings {
        insecure: vec!["plain.example".into(), "one.example:5000".into()],
        ..Settings::default()
    };
    for (host, insecure) in [
        ("localhost", true),
        ("localhost:5000", true),
        ("127.0.0.1:5000", true),
        ("[::1]:5000", true),
        ("[::1]", true),
        ("127.0.0.2:5000", false),
        ("docker.io", false),
        ("plain.example", true),
        ("plain.example:99", true),
        ("one.example:5000", true),
        ("one.example", false),
        ("not.plain.example", false),
        ("localhost.example", false),
    ] {
        assert_eq!(settings.is_insecure(host), insecure, "{host}");
    }
}

#[test]
fn challenges_parse() {
    let bearer = |realm: &str, service: Option<&str>| {
        Some(Challenge::Bearer(Bearer {
            realm: realm.into(),
            service: service.map(str::to_owned),
        }))
    };
    for (header, expected) in [
        ("Basic realm=\"x\"", Some(Challenge::Basic)),
        ("basic", Some(Challenge::Basic)),
        (
            "Bearer realm=\"https://a/t\",service=\"s, \\\"t\\\"\",scope=\"r:p\"",
            bearer("https://a/t", Some("s, \"t\"")),
        ),
        ("Basic realm=\"x\", Bearer realm=\"y\"", bearer("y", None)),
        ("BEARER realm=y , service = z", bearer("y", Some("z"))),
        ("Negotiate, Basic realm=x", Some(Challenge::Basic)),
        ("Bearer service=\"x\"", None),
        ("Bearer realm=\"x", None),
        ("Negotiate abc==", None),
        ("", None),
        ("\"\"\"", None),
        (",,,", None),
        ("Bearer realm=\"é\\", None),
    ] {
        assert_eq!(Challenge::parse(header), expected, "{header}");
    }
}
