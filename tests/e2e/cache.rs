//! The shared layer cache, in Debian's own registry on loopback: one home builds a layer, a second
//! one fetches it.

use std::fs;
use std::net::TcpListener;
use std::path::PathBuf;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::{Home, LIMIT, Layers, Project, files};
use crate::registry::{Counter, Door, Registry, can_run};

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// A project whose install looks at package.json. Both steps say that they run.
fn project() -> Project {
    let project = Project::scripts(
        "echo setting up; mkdir -p /opt; head -c 300000 /dev/urandom > /opt/tool; chmod 4755 /opt/tool",
        "echo installing; cp package.json /opt/installed; ln -s installed /opt/link; mkfifo /opt/pipe; rm /etc/profile || true",
        "cat /opt/installed; sleep 1000",
    );
    project.write("package.json", "{\"version\": 1}\n");
    project.write("src.js", "1\n");
    project
}

fn copy(of: &Project) -> Project {
    Project::copy(of.path())
}

fn cache(host: &str) -> String {
    format!("docker://{host}/team/cache")
}

/// `iii worker build --json`, with what it said on stderr.
fn build(home: &Home, project: &Project, options: &[&str]) -> (Layers, String) {
    let args = ["worker", "build", project.arg(), "--json"];
    let ended = home.run(&[&args[..], options].concat()).ok();
    (Layers::parse(&ended), ended.stderr)
}

#[test]
fn what_one_machine_builds_another_fetches() {
    if !can_run("the shared layer cache") {
        return;
    }
    let registry = Registry::start(Door::Open);
    let to = cache(&registry.host);
    let (first, second) = (Home::with_busybox(), Home::with_busybox());
    let project = project();
    let built = first.build(&project, &["--cache-to", &to]);
    assert_eq!(built.statuses(), "built built built");
    // No home sends a blob that the registry has.
    let stored = files(registry.dir.path()).len();
    let counter = Counter::new(&registry.host, u64::MAX);
    let from = cache(&counter.host);
    let again = first.build(&project, &["--cache-to", &from]);
    assert_eq!(again.statuses(), "hit hit hit");
    assert_eq!(files(registry.dir.path()).len(), stored);
    assert!(counter.take_sent() < 4096 && counter.take() < 8192);

    let theirs = copy(&project);
    let (fetched, said) = build(
        &second,
        &theirs,
        &["--cache-from", &from, "--cache-to", &to],
    );
    assert_eq!(fetched.statuses(), "built fetched fetched");
    for kind in ["base", "setup", "install"] {
        assert_eq!(fetched.get(kind).layer_id, built.get(kind).layer_id);
    }
    assert!(!said.contains("installing"), "{said}");
    assert!(said.contains(&format!("from {from}")), "{said}");
    assert_eq!(files(registry.dir.path()).len(), stored);
    let took = counter.take();
    assert!((300_000..400_000).contains(&took), "{took}");

    // From then on it is in the store, and no cache is asked.
    let (hit, _) = build(&second, &theirs, &["--cache-from", &from]);
    assert_eq!(hit.statuses(), "hit hit hit");
    assert_eq!(counter.take(), 0);
    // Of a cache that is not named, nothing is used.
    let (own, said) = build(&second, &theirs, &[]);
    assert_eq!(own.statuses(), "hit built built");
    assert!(said.contains("installing"), "{said}");
    // Layers that were built here come first from now on.
    let (hit, _) = build(&second, &theirs, &["--cache-from", &from]);
    assert_eq!(hit.ids(), own.ids());
    assert_eq!(counter.take(), 0);
    second.run(&["store", "verify", "--data"]).ok();
}

#[test]
fn facts_decide_over_what_is_fetched() {
    if !can_run("facts of the shared layer cache") {
        return;
    }
    let registry = Registry::start(Door::Open);
    let cache = cache(&registry.host);
    let project = project();
    let first = Home::with_busybox();
    let built = first.build(&project, &["--cache-to", &cache]);
    let from = ["--cache-from", &*cache, "--cache-to", &*cache];
    // A file that install did not look at may differ.
    let theirs = copy(&project);
    theirs.write("src.js", "2\n");
    let (fetched, _) = build(&Home::with_busybox(), &theirs, &from);
    assert_eq!(fetched.statuses(), "built fetched fetched");
    // A file that it looked at may not.
    theirs.write("package.json", "{\"version\": 2}\n");
    let (other, said) = build(&Home::with_busybox(), &theirs, &from);
    assert_eq!(other.statuses(), "built fetched built");
    assert!(said.contains("installing"), "{said}");
    // Now the cache has both.
    for (project, expected) in [(&project, &built), (&theirs, &other)] {
        let (fetched, _) = build(&Home::with_busybox(), project, &from);
        assert_eq!(fetched.statuses(), "built fetched fetched");
        assert_eq!(fetched.ids()[..3], expected.ids()[..3]);
    }
    // --rebuild asks no cache, and uploads its layers.
    let (rebuilt, _) = build(&first, &project, &[&from[..], &["--rebuild"]].concat());
    assert_eq!(rebuilt.statuses(), "hit built built");
    assert_ne!(rebuilt.get("setup").layer_id, built.get("setup").layer_id);
    let (fetched, _) = build(&Home::with_busybox(), &project, &from);
    assert_eq!(fetched.ids()[..3], rebuilt.ids()[..3]);
}

/// The contents of a cache, and how to spoil them.
struct Poisoner<'a> {
    registry: &'a Registry,
}

impl Poisoner<'_> {
    fn get(&self, name: &str, media_type: &str) -> Value {
        let path = format!("/v2/team/cache/manifests/{name}");
        let (head, body) = self.registry.ask("GET", &path, media_type, "");
        assert!(head.contains(" 200 "), "{head}");
        serde_json::from_str(&body).unwrap()
    }

    /// The tags, which are keys, with the manifest of the newest record of each.
    fn keys(&self) -> Vec<(String, Value)> {
        let (_, body) = self.registry.ask("GET", "/v2/team/cache/tags/list", "", "");
        let tags: Value = serde_json::from_str(&body).unwrap();
        let tags = tags["tags"].as_array().unwrap().iter();
        tags.map(|tag| {
            let tag = tag.as_str().unwrap().to_owned();
            let index = self.get(&tag, INDEX);
            let newest = index["manifests"][0]["digest"].as_str().unwrap();
            let manifest = self.get(newest, MANIFEST);
            (tag, manifest)
        })
        .collect()
    }

    fn record(&self, manifest: &Value) -> Value {
        let digest = manifest["config"]["digest"].as_str().unwrap();
        let path = format!("/v2/team/cache/blobs/{digest}");
        let (_, body) = self.registry.ask("GET", &path, "", "");
        serde_json::from_str(&body).unwrap()
    }

    /// Puts `manifest` in the place of the records of `key`.
    fn put(&self, key: &str, manifest: &Value) {
        let body = manifest.to_string();
        let digest = digest(&body);
        let put = |name: &str, media_type: &str, body: &str| {
            let path = format!("/v2/team/cache/manifests/{name}");
            let (head, said) = self.registry.ask("PUT", &path, media_type, body);
            assert!(head.contains(" 201 "), "{head} {said}");
        };
        put(&digest, MANIFEST, &body);
        let artifact = "application/vnd.iii.layer-cache.v1";
        let entry = json!({
            "mediaType": MANIFEST, "digest": digest, "size": body.len(), "artifactType": artifact,
        });
        let index = json!({
            "schemaVersion": 2, "mediaType": INDEX, "artifactType": artifact, "manifests": [entry],
        });
        put(key, INDEX, &index.to_string());
    }

    /// Replaces the record of `manifest`.
    fn with_record(&self, manifest: &Value, record: &Value) -> Value {
        let body = record.to_string();
        let digest = digest(&body);
        let (head, _) = self
            .registry
            .ask("POST", "/v2/team/cache/blobs/uploads/", "", "");
        let location = head
            .lines()
            .find_map(|line| line.strip_prefix("Location: "))
            .unwrap();
        let path = location.trim().strip_prefix("http://").unwrap();
        let path = path.strip_prefix(&self.registry.host).unwrap();
        let path = format!("{path}&digest={digest}");
        let (head, _) = self
            .registry
            .ask("PUT", &path, "application/octet-stream", &body);
        assert!(head.contains(" 201 "), "{head}");
        let mut manifest = manifest.clone();
        manifest["config"]["digest"] = digest.into();
        manifest["config"]["size"] = body.len().into();
        manifest
    }
}

fn digest(body: &str) -> String {
    iii_oci::Digest::of(body.as_bytes()).to_string()
}

#[test]
fn a_poisoned_cache_is_refused_and_leaves_no_trace() {
    type Spoil = fn(&Poisoner<'_>, &Value, &Value) -> Value;
    if !can_run("poisoned layer caches") {
        return;
    }
    let cases: [(&str, Spoil, &str); 6] = [
        (
            "the blob of another layer",
            |_, install, setup| {
                let mut install = install.clone();
                install["layers"] = setup["layers"].clone();
                install
            },
            "its digest is",
        ),
        (
            "the blob of another layer, with its diff id",
            |with, install, setup| {
                let mut record = with.record(install);
                record["diff_id"] = with.record(setup)["diff_id"].clone();
                let mut install = with.with_record(install, &record);
                install["layers"] = setup["layers"].clone();
                install
            },
            "but its record promises",
        ),
        (
            "another tree id",
            |with, install, setup| {
                let mut record = with.record(install);
                record["tree_id"] = with.record(setup)["tree_id"].clone();
                with.with_record(install, &record)
            },
            "promises another tree",
        ),
        (
            "the record of another key",
            |_, _, setup| setup.clone(),
            "a record of another key",
        ),
        (
            "a later format",
            |with, install, _| {
                let mut record = with.record(install);
                record["format"] = 3.into();
                with.with_record(install, &record)
            },
            "it is of format 3",
        ),
        (
            "facts out of order",
            |with, install, _| {
                let mut record = with.record(install);
                let facts = record["facts"].as_array_mut().unwrap();
                facts.insert(0, json!({ "path": "zzz", "seen": "absent" }));
                with.with_record(install, &record)
            },
            "its facts are wrong",
        ),
    ];
    let project = project();
    let built = Home::with_busybox();
    for (what, spoil, message) in cases {
        let registry = Registry::start(Door::Open);
        let cache = cache(&registry.host);
        built.build(&project, &["--cache-to", &cache]);
        let poisoner = Poisoner {
            registry: &registry,
        };
        let keys = poisoner.keys();
        let of = |kind: &str| {
            let is_it =
                |(_, manifest): &&(String, Value)| poisoner.record(manifest)["kind"] == kind;
            keys.iter().find(is_it).unwrap()
        };
        let ((key, install), (_, setup)) = (of("install"), of("setup"));
        poisoner.put(key, &spoil(&poisoner, install, setup));

        let home = Home::with_busybox();
        let (layers, said) = build(&home, &project, &["--cache-from", &cache]);
        assert_eq!(layers.statuses(), "built fetched built", "{what}: {said}");
        assert!(said.contains(message), "{what}: {said}");
        assert!(said.contains(&cache), "{what}: {said}");
        // Without the cache, setup has to be made anew, and on it install; nothing that was fetched
        // is used.
        let (layers, said) = build(&home, &project, &[]);
        assert_eq!(layers.statuses(), "hit built built", "{what}: {said}");
        home.run(&["store", "verify", "--data"]).ok();
    }
}

#[test]
fn a_cache_that_is_not_there_costs_a_line() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let nobody = cache(&listener.local_addr().unwrap().to_string());
    drop(listener);
    let home = Home::with_busybox();
    let both = ["--cache-from", &*nobody, "--cache-to", &*nobody];
    let (layers, said) = build(&home, &project(), &both);
    assert_eq!(layers.statuses(), "built built built");
    assert_eq!(said.matches(&*nobody).count(), 1, "{said}");
    assert!(said.contains("III_INSECURE_REGISTRIES"), "{said}");
    for name in [
        "localhost:5000/x",
        "docker://x",
        "docker://x/y:1",
        "docker://X/Y",
    ] {
        let project = project();
        let args = ["worker", "build", project.arg(), "--cache-from", name];
        home.run(&args).exits(2).says(&["is not a cache"]);
    }
}

#[test]
fn of_two_at_once_one_fetches() {
    if !can_run("fetching the same layer twice at once") {
        return;
    }
    let registry = Registry::start(Door::Open);
    let project = project();
    Home::with_busybox().build(&project, &["--cache-to", &cache(&registry.host)]);
    let counter = Counter::new(&registry.host, u64::MAX);
    let from = cache(&counter.host);
    let home = Home::with_busybox();
    let args = [
        "worker",
        "build",
        project.arg(),
        "--json",
        "--cache-from",
        &from,
    ];
    let running = [home.start(&args), home.start(&args)];
    let ended = running.map(|one| Layers::parse(&one.finish(LIMIT).ok()));
    for kind in ["setup", "install"] {
        let mut statuses = ended
            .each_ref()
            .map(|layers| layers.get(kind).status.clone());
        statuses.sort();
        assert_eq!(statuses, ["fetched", "hit"], "{kind}");
    }
    let took = counter.take();
    assert!((300_000..400_000).contains(&took), "{took}");
}

#[test]
fn a_worker_runs_while_its_layers_are_shared() {
    if !can_run("sharing layers beside a worker, with TLS and a login") {
        return;
    }
    let registry = Registry::start(Door::Guarded);
    let cache = cache(&registry.host);
    let trust = format!(
        "SSL_CERT_FILE={}",
        registry.dir.path().join("ca.crt").display()
    );
    let guest = || {
        let program = ["/usr/bin/env", &trust, env!("CARGO_BIN_EXE_iii")];
        let home = Home::through(
            TempDir::with_prefix("home-").unwrap(),
            program.map(PathBuf::from).to_vec(),
        );
        home.import_busybox();
        home
    };
    let member = || {
        let home = guest();
        let docker = home.path().join(".docker");
        fs::create_dir(&docker).unwrap();
        let file = json!({ "auths": { &registry.host: { "auth": "dXNlcjpzZWNyZXQ=" } } });
        fs::write(docker.join("config.json"), file.to_string()).unwrap();
        home
    };
    let project = project();
    // A user without the right to write there is told so, and works on.
    let (layers, said) = build(&guest(), &project, &["--cache-to", &cache]);
    assert_eq!(layers.statuses(), "built built built");
    assert!(said.contains("docker login"), "{said}");

    let home = member();
    let mut running = home.dev(&project, &["--cache-to", &cache]);
    running.wait_for("\"version\": 1");
    running.stop();
    let (layers, _) = build(&member(), &project, &["--cache-from", &cache]);
    assert_eq!(layers.statuses(), "built fetched fetched");
    let (layers, said) = build(&guest(), &project, &["--cache-from", &cache]);
    assert_eq!(layers.statuses(), "built built built");
    assert!(said.contains("refuses access"), "{said}");
}

#[test]
fn the_environment_names_caches_for_ci() {
    if !can_run("caches that the environment names") {
        return;
    }
    let registry = Registry::start(Door::Open);
    let cache = cache(&registry.host);
    let with = |variable: &str| {
        let program = ["/usr/bin/env", variable, env!("CARGO_BIN_EXE_iii")];
        let home = Home::through(
            TempDir::with_prefix("home-").unwrap(),
            program.map(PathBuf::from).to_vec(),
        );
        home.import_busybox();
        home
    };
    let project = project();
    let (built, _) = build(&with(&format!("III_CACHE_TO={cache}")), &project, &[]);
    assert_eq!(built.statuses(), "built built built");
    // The first of them is not there; the next one is asked all the same.
    let both = format!("III_CACHE_FROM=docker://127.0.0.1:1/x, {cache}");
    let (fetched, said) = build(&with(&both), &project, &[]);
    assert_eq!(fetched.statuses(), "built fetched fetched");
    assert_eq!(said.matches("docker://127.0.0.1:1/x").count(), 1, "{said}");
    with("III_CACHE_FROM=localhost:5000/x")
        .run(&["worker", "build", project.arg()])
        .fails()
        .says(&["III_CACHE_FROM", "expected docker://HOST/REPOSITORY"]);
}
