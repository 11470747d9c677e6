//! Pushing to a registry of the tests' own, which breaks and lies.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use iii_store::with_causes;
use serde_json::json;

use super::super::tests::{Reply, Request as Asked, Server, ok, settings, status};
use super::super::{AuthFiles, Settings};
use super::*;

/// Bytes of a piece here.
const PIECE: usize = 1000;

/// Contents of a registry.
#[derive(Default)]
struct State {
    /// Uploads under way, by their names.
    uploads: BTreeMap<String, Vec<u8>>,
    /// Blobs and manifests, by their paths.
    things: BTreeMap<String, Vec<u8>>,
    /// Requests of the kind that is being counted.
    turn: usize,
}

type Shared = Arc<Mutex<State>>;

/// The answer to a request by its number from 1, given the right answer.
type Break = fn(usize, &dyn Fn() -> Reply) -> Reply;

/// Answers of a registry that takes everything, as the OCI distribution specification demands.
fn honest(state: &Shared, asked: &Asked) -> Reply {
    let mut state = state.lock().unwrap();
    let (path, query) = asked.path.split_once('?').unwrap_or((&asked.path, ""));
    let accepted = |status, name: &str, len: usize| {
        let range = format!("0-{}", len.saturating_sub(1));
        let location = format!("/v2/a/b/blobs/uploads/{name}?_state={len}");
        Reply::Full(
            status,
            vec![("Location", location), ("Range", range)],
            vec![],
        )
    };
    let Some(name) = path.strip_prefix("/v2/a/b/blobs/uploads/") else {
        return match &*asked.method {
            "PUT" => {
                state.things.insert(path.to_owned(), asked.body.clone());
                status(201)
            }
            "HEAD" if state.things.contains_key(path) => status(200),
            _ => state
                .things
                .get(path)
                .map_or_else(|| status(404), |thing| ok(&**thing)),
        };
    };
    match &*asked.method {
        "POST" => {
            let name = format!("upload{}", state.uploads.len());
            state.uploads.insert(name.clone(), Vec::new());
            accepted(202, &name, 0)
        }
        "GET" => accepted(204, name, state.uploads[name].len()),
        "PATCH" => {
            let upload = state.uploads.get_mut(name).unwrap();
            let (from, to) = asked.header("content-range").split_once('-').unwrap();
            let (from, to): (usize, usize) = (from.parse().unwrap(), to.parse().unwrap());
            assert_eq!(to + 1 - from, asked.body.len());
            if from != upload.len() {
                return accepted(416, name, upload.len());
            }
            upload.extend(&asked.body);
            let len = upload.len();
            accepted(202, name, len)
        }
        "PUT" => {
            let mut upload = state.uploads.remove(name).unwrap();
            upload.extend(&asked.body);
            let digest = Digest::of(&upload);
            let says = query.rsplit("digest=").next().unwrap().replace("%3A", ":");
            if says != digest.to_string() {
                return status(400);
            }
            let path = format!("/v2/a/b/blobs/{digest}");
            state.things.insert(path.clone(), upload);
            let headers = vec![("Location", path), ("Docker-Content-Digest", says)];
            Reply::Full(201, headers, vec![])
        }
        _ => status(405),
    }
}

fn repository(server: &Server, settings: &Settings) -> Arc<Repository> {
    let name = format!("{}/a/b", server.host).parse().unwrap();
    Repository::for_push(&name, settings).unwrap()
}

fn bytes(size: usize) -> Vec<u8> {
    (0..size).map(|at| (at * 7 + at / 251) as u8).collect()
}

fn push(repository: &Repository, bytes: &[u8]) -> Result<(Digest, u64), String> {
    let mut upload = repository.upload();
    upload.chunk = PIECE;
    let write = bytes.chunks(333).try_for_each(|some| upload.write(some));
    write
        .and_then(|()| upload.finish())
        .map_err(|error| with_causes(&error))
}

/// A registry that does as `lie` says with requests of one method, by their number from 1, and else
/// as it should.
fn lying(
    method: &'static str,
    lie: impl Fn(usize, &Asked, &dyn Fn() -> Reply) -> Reply + Send + Sync + 'static,
) -> (Server, Shared) {
    let state = Shared::default();
    let shared = Arc::clone(&state);
    let server = Server::new(move |asked| {
        let truth = || honest(&shared, asked);
        if asked.method != method {
            return truth();
        }
        let turn = {
            let mut state = shared.lock().unwrap();
            state.turn += 1;
            state.turn
        };
        lie(turn, asked, &truth)
    });
    (server, state)
}

fn sizes(server: &Server, method: &str) -> Vec<usize> {
    let seen = server.seen();
    let of = seen.iter().filter(|one| one.method == method);
    of.map(|one| one.body.len()).collect()
}

#[test]
fn a_blob_goes_in_pieces_and_a_small_one_in_one() {
    for (size, pieces, last) in [
        (0, vec![], 0),
        (1, vec![], 1),
        (PIECE, vec![], PIECE),
        (PIECE + 1, vec![PIECE, 1], 0),
        (3 * PIECE, vec![PIECE; 3], 0),
        (3 * PIECE + 5, vec![PIECE, PIECE, PIECE, 5], 0),
    ] {
        let (server, state) = lying("", |_, _, truth| truth());
        let repository = repository(&server, &settings());
        let blob = bytes(size);
        let digest = Digest::of(&blob);
        assert!(!repository.has_blob(&digest).unwrap());
        assert_eq!(push(&repository, &blob).unwrap(), (digest, size as u64));
        let path = format!("/v2/a/b/blobs/{digest}");
        assert_eq!(state.lock().unwrap().things[&path], blob, "{size}");
        assert_eq!(sizes(&server, "PATCH"), pieces, "{size}");
        assert_eq!(sizes(&server, "PUT"), [last], "{size}");
        assert!(repository.has_blob(&digest).unwrap());
        // A present blob is not sent again.
        let before = server.seen().len();
        assert_eq!(repository.put_blob(&blob).unwrap(), digest);
        assert_eq!(server.seen().len(), before + 1);
    }
}

#[test]
fn a_manifest_gets_its_name() {
    let (server, state) = lying("", |_, _, truth| truth());
    let repository = repository(&server, &settings());
    let digest = repository.put_manifest("1", "a/b", b"{}").unwrap();
    assert_eq!(digest, Digest::of(b"{}"));
    assert_eq!(state.lock().unwrap().things["/v2/a/b/manifests/1"], b"{}");
    let seen = server.seen();
    assert_eq!(seen[0].header("content-type"), "a/b");
}

#[test]
fn what_breaks_costs_one_piece() {
    let cases: [(&str, Break, usize); 5] = [
        // Sent four times: three, and one again.
        (
            "a connection that ends before the piece was taken",
            |turn, truth| {
                if turn == 2 {
                    Reply::Raw(vec![])
                } else {
                    truth()
                }
            },
            4,
        ),
        (
            "a connection that ends after the piece was taken",
            |turn, truth| {
                let reply = truth();
                if turn == 2 { Reply::Raw(vec![]) } else { reply }
            },
            3,
        ),
        (
            "a failure that passes",
            |turn, truth| if turn == 2 { status(500) } else { truth() },
            4,
        ),
        (
            "a registry that asks for time",
            |turn, truth| {
                if turn == 2 {
                    Reply::Full(429, vec![("Retry-After", "0".into())], vec![])
                } else {
                    truth()
                }
            },
            4,
        ),
        (
            "an answer that says nothing",
            |_, truth| match truth() {
                Reply::Full(status, _, _) => Reply::Full(status, vec![], vec![]),
                reply => reply,
            },
            3,
        ),
    ];
    for (what, breaks, pieces) in cases {
        let (server, _) = lying("PATCH", move |turn, _, truth| breaks(turn, truth));
        let repository = repository(&server, &settings());
        push(&repository, &bytes(3 * PIECE)).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(sizes(&server, "PATCH"), vec![PIECE; pieces], "{what}");
    }
}

#[test]
fn a_piece_that_came_in_part_goes_on_there() {
    let state = Shared::default();
    let shared = Arc::clone(&state);
    let server = Server::new(move |asked| {
        let mut asked = asked.clone();
        let cut = asked.method == "PATCH" && asked.body.len() > 400;
        if cut {
            asked.body.truncate(400);
            let range = asked.header("content-range").split_once('-').unwrap();
            let from: usize = range.0.parse().unwrap();
            asked.set_header("content-range", format!("{from}-{}", from + 399));
        }
        honest(&shared, &asked)
    });
    let repository = repository(&server, &settings());
    push(&repository, &bytes(2 * PIECE)).unwrap();
    assert_eq!(sizes(&server, "PATCH"), [1000, 600, 200, 1000, 600, 200]);
}

#[test]
fn the_end_may_break_too() {
    let cases: [(&str, Break); 2] = [
        (
            "before",
            |turn, truth| {
                if turn == 1 { status(503) } else { truth() }
            },
        ),
        ("after", |turn, truth| {
            let reply = truth();
            if turn == 1 { Reply::Raw(vec![]) } else { reply }
        }),
    ];
    for (when, breaks) in cases {
        for size in [10, 2 * PIECE] {
            let (server, state) = lying("PUT", move |turn, _, truth| breaks(turn, truth));
            let blob = bytes(size);
            let (digest, _) = push(&repository(&server, &settings()), &blob)
                .unwrap_or_else(|error| panic!("{when} it was taken: {error}"));
            let path = format!("/v2/a/b/blobs/{digest}");
            assert_eq!(state.lock().unwrap().things[&path], blob);
        }
    }
}

#[test]
fn a_registry_may_want_larger_pieces_within_bounds() {
    for (min, pieces) in [
        ("1500", Some(vec![1500, 1500, 0])),
        ("500", None),
        ("x", None),
    ] {
        let min = min.to_owned();
        let (server, _) = lying("POST", move |_, _, truth| match truth() {
            Reply::Full(status, mut headers, body) => {
                headers.push(("OCI-Chunk-Min-Length", min.clone()));
                Reply::Full(status, headers, body)
            }
            reply => reply,
        });
        push(&repository(&server, &settings()), &bytes(3000)).unwrap();
        let expected = pieces.unwrap_or(vec![1000; 3]);
        let expected: Vec<_> = expected.into_iter().filter(|&size| size > 0).collect();
        assert_eq!(sizes(&server, "PATCH"), expected);
    }
}

/// Every lie, the request, and the message of the error. Each has to end by itself, and soon.
#[test]
#[expect(clippy::too_many_lines, reason = "it is a table")]
fn lies_are_refused_within_bounds() {
    fn with(truth: &dyn Fn() -> Reply, name: &'static str, value: &str) -> Reply {
        match truth() {
            Reply::Full(status, mut headers, body) => {
                headers.retain(|(other, _)| *other != name);
                headers.push((name, value.to_owned()));
                Reply::Full(status, headers, body)
            }
            reply => reply,
        }
    }
    let cases: Vec<(&str, &str, Break, &str)> = vec![
        ("always busy", "PATCH", |_, _| status(503), "answers 503"),
        (
            "never there",
            "POST",
            |_, _| Reply::Raw(vec![]),
            "requesting",
        ),
        (
            "more than was sent",
            "PATCH",
            |_, truth| with(truth, "Range", "0-2000"),
            "says that it has 2001 bytes of the 1000 that were sent",
        ),
        (
            "as much as there can be",
            "PATCH",
            |_, truth| with(truth, "Range", "0-18446744073709551615"),
            "says that it has",
        ),
        (
            "less and less",
            "PATCH",
            |turn, truth| {
                if turn == 2 {
                    with(truth, "Range", "0-10")
                } else {
                    truth()
                }
            },
            "says that it has 11 bytes of the 2000 that were sent",
        ),
        (
            "nothing at all, again and again",
            "PATCH",
            |_, truth| {
                truth();
                Reply::Full(202, vec![("Range", "0-0".into())], vec![])
            },
            "says that it has 0 bytes of the 1000 that were sent",
        ),
        (
            "one byte at a time",
            "PATCH",
            |turn, _| Reply::Full(202, vec![("Range", format!("0-{turn}"))], vec![]),
            "of the 1000 that were sent",
        ),
        (
            "no place to send to",
            "POST",
            |_, _| status(202),
            "which is not an http or https address",
        ),
        (
            "a place that is a file",
            "POST",
            |_, truth| with(truth, "Location", "file:///etc/passwd"),
            "which is not an http or https address",
        ),
        (
            "a place with a user",
            "POST",
            |_, truth| with(truth, "Location", "http://a:b@127.0.0.1/"),
            "which is not an http or https address",
        ),
        (
            "a place that was never said",
            "PATCH",
            |_, truth| with(truth, "Location", "http://"),
            "which is not an http or https address",
        ),
        (
            "a redirect of what is sent",
            "PATCH",
            |_, _| Reply::Full(307, vec![("Location", "/elsewhere".into())], vec![]),
            "answers 307",
        ),
        (
            "no pieces",
            "PATCH",
            |_, _| status(405),
            "does not take a blob in pieces",
        ),
        (
            "only large pieces",
            "POST",
            |_, truth| with(truth, "OCI-Chunk-Min-Length", "999999999"),
            "does not take a blob in pieces of less than 999999999 bytes",
        ),
        (
            "an upload that is forgotten",
            "PATCH",
            |turn, truth| if turn == 2 { status(404) } else { truth() },
            "does not exist",
        ),
        (
            "another digest",
            "PUT",
            |_, truth| {
                let other = Digest::of(b"other").to_string();
                with(truth, "Docker-Content-Digest", &other)
            },
            "says that it stored sha256:d9298a10d1b0735837dc4bd85dac641b0f3cef27a47e5d53a54f2f3f5b2fcffa",
        ),
        (
            "no",
            "POST",
            |_, _| {
                let body = json!({ "errors": [{ "code": "DENIED", "message": "no\u{1b}[31m!" }] });
                Reply::Full(403, vec![], body.to_string().into())
            },
            "does not let you push to a/b without a login (it says: no!)",
        ),
        ("read only", "POST", |_, _| status(405), "answers 405"),
        (
            "an endless error",
            "PUT",
            |_, _| {
                let head = b"HTTP/1.1 400 x\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
                let piece = [b"10000\r\n".to_vec(), vec![b' '; 1 << 16], b"\r\n".to_vec()];
                Reply::Endless(head, piece.concat())
            },
            "answers 400",
        ),
        (
            "endless headers",
            "PATCH",
            |_, _| Reply::Endless(b"HTTP/1.1 202 x\r\n".to_vec(), b"X: y\r\n".repeat(1000)),
            "requesting",
        ),
        (
            "an endless success",
            "PUT",
            |_, truth| {
                truth();
                let head = b"HTTP/1.1 201 x\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
                let piece = [b"10000\r\n".to_vec(), vec![b' '; 1 << 16], b"\r\n".to_vec()];
                Reply::Endless(head, piece.concat())
            },
            "",
        ),
    ];
    for (what, method, lie, message) in cases {
        let (server, _) = lying(method, move |turn, _, truth| lie(turn, truth));
        let pushed = push(&repository(&server, &settings()), &bytes(3 * PIECE));
        match pushed {
            Ok(_) => assert_eq!(message, "", "{what}"),
            Err(error) => assert!(
                !message.is_empty() && error.contains(message),
                "{what}: {error}"
            ),
        }
        let asked = server.seen().len();
        assert!(asked < 200, "{what}: {asked} requests");
    }
}

/// Settings with a login for `host`, and what keeps its file.
fn login(host: &str) -> (tempfile::TempDir, Settings) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("auth.json");
    let file = json!({ "auths": { host: { "auth": "dXNlcjpzZWNyZXQ=" } } });
    std::fs::write(&path, file.to_string()).unwrap();
    let settings = Settings {
        auth: AuthFiles(vec![path]),
        ..settings()
    };
    (dir, settings)
}

#[test]
fn a_token_that_runs_out_is_asked_for_again() {
    let state = Shared::default();
    let shared = Arc::clone(&state);
    // A token is good for three requests.
    let server = Server::new(move |asked| {
        if asked.path.starts_with("/token") {
            assert_eq!(asked.header("authorization"), "Basic dXNlcjpzZWNyZXQ=");
            let scope = "scope=repository%3Aa%2Fb%3Apull%2Cpush";
            assert!(asked.path.contains(scope), "{}", asked.path);
            let mut state = shared.lock().unwrap();
            state.turn = (state.turn / 3 + 1) * 3;
            return ok(json!({ "token": format!("t{}", state.turn / 3) }).to_string());
        }
        let good = {
            let mut state = shared.lock().unwrap();
            let good = format!("Bearer t{}", state.turn / 3);
            state.turn += 1;
            asked.header("authorization") == good && state.turn > 3
        };
        if good {
            return honest(&shared, asked);
        }
        let realm = format!("Bearer realm=\"http://{}/token\"", asked.header("host"));
        Reply::Full(401, vec![("WWW-Authenticate", realm)], vec![])
    });
    let (_dir, settings) = login(&server.host);
    push(&repository(&server, &settings), &bytes(9 * PIECE)).unwrap();
    assert!(server.count("/token") >= 3, "{}", server.count("/token"));
}

#[test]
fn an_upload_elsewhere_goes_without_the_login_and_never_to_http() {
    let elsewhere = {
        let state = Shared::default();
        let name = "elsewhere".to_owned();
        state.lock().unwrap().uploads.insert(name, Vec::new());
        Server::new(move |asked| {
            assert_eq!(asked.header("authorization"), "");
            honest(&state, asked)
        })
    };
    let place = format!("http://{}/v2/a/b/blobs/uploads/elsewhere", elsewhere.host);
    let server = Server::new(move |asked| {
        if asked.header("authorization") != "Basic dXNlcjpzZWNyZXQ=" {
            let basic = "Basic realm=\"x\"".to_owned();
            return Reply::Full(401, vec![("WWW-Authenticate", basic)], vec![]);
        }
        Reply::Full(202, vec![("Location", place.clone())], vec![])
    });
    let (_dir, settings) = login(&server.host);
    push(&repository(&server, &settings), &bytes(2 * PIECE)).unwrap();
    assert_eq!(sizes(&elsewhere, "PATCH"), [PIECE, PIECE]);
    // A place that wants a login of its own gets none.
    let thief = Server::new(|asked| {
        assert_eq!(asked.header("authorization"), "");
        let realm = format!("Bearer realm=\"http://{}/token\"", asked.header("host"));
        Reply::Full(401, vec![("WWW-Authenticate", realm)], vec![])
    });
    let place = format!("http://{}/x", thief.host);
    let server = Server::new(move |_| Reply::Full(202, vec![("Location", place.clone())], vec![]));
    let error = push(&repository(&server, &settings), &bytes(2 * PIECE)).unwrap_err();
    assert!(error.contains("does not let you push"), "{error}");
    assert_eq!(thief.count("/token"), 0);
    let from = "https://a/v2/a/b/blobs/uploads/".parse().unwrap();
    let error = http::next(&from, "http://a/v2/").unwrap_err();
    assert!(error.to_string().contains("not encrypted"), "{error}");
}

#[test]
fn mirrors_are_not_pushed_to() {
    let (server, _) = lying("", |_, _, truth| truth());
    let mirror = Server::new(|_| status(500));
    let settings = Settings {
        mirrors: vec![super::super::Mirror {
            of: server.host.clone(),
            host: mirror.host.clone(),
            prefix: String::new(),
        }],
        ..settings()
    };
    push(&repository(&server, &settings), b"x").unwrap();
    assert_eq!(mirror.seen().len(), 0);
}

#[test]
fn an_export_goes_to_a_registry() {
    use crate::export::{ExportError, Sink, Stored};
    let (server, state) = lying("", |_, _, truth| truth());
    let repository = repository(&server, &settings());
    let sink: &dyn Sink = &*repository;
    let stored = sink
        .put_blob(&mut |out| out.write_all(b"blob").map_err(ExportError::Write))
        .unwrap();
    let digest = Digest::of(b"blob");
    assert_eq!(stored, Stored { digest, size: 4 });
    assert!(sink.has_blob(&digest, 4).unwrap());
    let manifest = sink.put_manifest("a/b", b"{}", None).unwrap();
    let path = format!("/v2/a/b/manifests/{manifest}");
    assert_eq!(state.lock().unwrap().things[&path], b"{}");
    // One that takes no pieces gets all of it at once.
    let (server, state) = lying("PATCH", |_, _, _| status(405));
    let repository = self::repository(&server, &settings());
    let blob = bytes(CHUNK + 1);
    let mut write = |out: &mut dyn std::io::Write| out.write_all(&blob).map_err(ExportError::Write);
    let stored = Sink::put_blob(&*repository, &mut write).unwrap();
    assert_eq!(stored.digest, Digest::of(&blob));
    let path = format!("/v2/a/b/blobs/{}", stored.digest);
    assert_eq!(state.lock().unwrap().things[&path], blob);
    assert_eq!(sizes(&server, "PUT"), [CHUNK + 1]);
    // The error is the registry's message, and not that writing failed.
    let (server, _) = lying("PATCH", |_, _, _| status(403));
    let repository = self::repository(&server, &settings());
    let error = Sink::put_blob(&*repository, &mut write).unwrap_err();
    assert!(
        error.to_string().contains("does not let you push"),
        "{error}"
    );
}
