//! Exports of images and workers, read by other tools.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::process::{Command, Output};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::engine::holds_within;
use crate::harness::{Ended, Home, LIMIT, NODE_IMAGE, Project, busybox_base, files, is_root, skip};
use crate::registry::{Door, Registry, can_run, has};

/// A worker that prints its directory, its environment, and the files of its steps.
fn worker() -> Project {
    let project = Project::scripts(
        "echo made by setup > /etc/setup; rm /etc/passwd-",
        "mkdir -p node_modules/x; echo made by install > node_modules/x/i",
        "echo $GREETING from $(pwd), $III_WORKER_NAME, $III_URL; cat /etc/setup node_modules/x/i main.js",
    );
    let manifest = "iii.worker.yaml";
    let text = fs::read_to_string(project.path().join(manifest)).unwrap();
    project.write(manifest, &format!("{text}env:\n  GREETING: hello\n"));
    project.write("main.js", "// of the project\n");
    project
}

/// A home with a busybox base that has something to remove.
fn home() -> Home {
    let home = Home::new();
    let base = home.path().join("base");
    let status = Command::new("cp")
        .arg("-a")
        .arg(busybox_base())
        .arg(&base)
        .status();
    assert!(status.unwrap().success());
    fs::write(base.join("etc/passwd-"), "old").unwrap();
    home.import(&base, NODE_IMAGE);
    home
}

fn json_of(ended: &Ended) -> Value {
    serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{error}: {}", ended.stdout))
}

fn export(home: &Home, args: &[&str]) -> Value {
    let args: Vec<_> = args.iter().copied().chain(["--json"]).collect();
    json_of(&home.run(&args).ok())
}

fn output(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

fn inspect(image: &str) -> Value {
    let output = output(Command::new("skopeo").args(["inspect", "--config", image]));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn ids(exported: &Value) -> Vec<&str> {
    let layers = exported["layers"].as_array().unwrap();
    layers
        .iter()
        .map(|layer| layer["layer_id"].as_str().unwrap())
        .collect()
}

/// The layers of the image that this path is imported as.
fn imported(home: &Home, path: &Path) -> Vec<String> {
    home.import(path, "again:1");
    let image = json_of(&home.run(&["image", "inspect", "again:1", "--json"]).ok());
    let layers = image["layers"].as_array().unwrap();
    layers
        .iter()
        .map(|id| id.as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn a_worker_is_an_image_like_any_other() {
    let (home, project) = (home(), worker());
    let (dir, archive) = (home.path().join("layout"), home.path().join("worker.tar"));
    let (layout, tar) = (
        format!("oci:{}:v1", dir.display()),
        format!("docker-archive:{}", archive.display()),
    );
    let exported = export(&home, &["worker", "export", project.arg(), "--to", &layout]);
    let kinds: Vec<_> = exported["layers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|layer| &layer["kind"])
        .collect();
    assert_eq!(kinds, ["base", "project", "setup", "install"]);
    home.run(&["worker", "export", project.arg(), "--to", &tar])
        .ok();
    for path in [&dir, &archive] {
        assert_eq!(imported(&Home::new(), path), ids(&exported), "{path:?}");
    }
    if !has("skopeo") || !has("umoci") {
        skip(
            "exported workers in the hands of others",
            "needs skopeo and umoci",
        );
        return;
    }
    let name = project.path().file_name().unwrap().to_str().unwrap();
    let name = format!("iii-dev-{name}");
    for image in [&layout, &tar] {
        let found = inspect(image);
        assert_eq!(found["os"], "linux");
        assert_eq!(found["config"]["WorkingDir"], "/workspace");
        assert_eq!(found["config"]["Cmd"][0], "/bin/sh");
        let env = found["config"]["Env"].as_array().unwrap();
        assert!(
            env.contains(&json!("GREETING=hello"))
                && env.contains(&json!(format!("III_WORKER_NAME={name}")))
        );
        let told = [
            "III_URL",
            "III_ENGINE_URL",
            "III_ISOLATION",
            "SSL_CERT_FILE",
            "DEBIAN_FRONTEND",
        ];
        let is_told = |one: &Value| {
            told.iter()
                .any(|name| one.as_str().unwrap().starts_with(name))
        };
        assert!(!env.iter().any(is_told), "{env:?}");
        let history = found["history"].as_array().unwrap();
        assert_eq!(history.len(), 4);
        assert_eq!(history[3]["created_by"], "iii: install");
    }
    let copy = format!("oci:{}:v1", home.path().join("copy").display());
    output(Command::new("skopeo").args(["--insecure-policy", "copy", "-q", &tar, &copy]));
    for (image, bundle) in [(&layout, "bundle"), (&copy, "bundle2")] {
        let bundle = home.path().join(bundle);
        let mut umoci = Command::new("umoci");
        umoci.args(["unpack", "--image", image.strip_prefix("oci:").unwrap()]);
        if !is_root() {
            umoci.arg("--rootless");
        }
        output(umoci.arg(&bundle));
        let read = |name: &str| fs::read_to_string(bundle.join("rootfs").join(name));
        assert_eq!(read("etc/setup").unwrap(), "made by setup\n");
        assert_eq!(
            read("workspace/node_modules/x/i").unwrap(),
            "made by install\n"
        );
        assert_eq!(read("workspace/main.js").unwrap(), "// of the project\n");
        assert!(read("etc/passwd").is_ok() && read("etc/passwd-").is_err());
    }
    runs_in_podman(&home, &archive, &name);
}

/// In a mount namespace of its own, for the sake of machines with both versions of cgroups, where
/// crun does not run.
fn runs_in_podman(home: &Home, archive: &Path, name: &str) {
    const SCRIPT: &str = r#"
        umount -l /sys/fs/cgroup/unified 2>/dev/null
        exec podman --root "$0/root" --runroot "$0/run" --storage-driver vfs --cgroup-manager cgroupfs --events-backend none "$@"
    "#;
    let what = "an exported worker in podman";
    if !has("podman") || !is_root() {
        skip(what, "needs podman, and root");
        return;
    }
    let dir = tempfile::TempDir::with_prefix("podman-").unwrap();
    let conf = dir.path().join("containers.conf");
    fs::write(
        &conf,
        "[containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]\n",
    )
    .unwrap();
    let podman = |args: &[&str]| {
        let mut unshare = Command::new("unshare");
        unshare
            .args(["--mount", "sh", "-c", SCRIPT])
            .arg(dir.path())
            .args(args);
        unshare
            .env("CONTAINERS_CONF", &conf)
            .env("HOME", home.path());
        unshare.output().unwrap()
    };
    let image = format!("localhost/{}:latest", name.to_lowercase());
    let loaded = podman(&["load", "-q", "-i", archive.to_str().unwrap()]);
    let said = String::from_utf8_lossy(&loaded.stdout).into_owned()
        + &String::from_utf8_lossy(&loaded.stderr);
    assert!(loaded.status.success() && said.contains(&image), "{said}");
    let run = [
        "run",
        "--rm",
        "--cgroups=disabled",
        "--network=host",
        "--pull=never",
    ];
    let own = ["-e", "III_URL=ws://elsewhere:1", &image];
    let ran = podman(&[&run[..], &own].concat());
    let text = String::from_utf8_lossy(&ran.stdout).into_owned();
    if !ran.status.success() && text.is_empty() {
        // Whether containers can be run here at all is for an image that we have not made to say.
        let why = String::from_utf8_lossy(&ran.stderr);
        let why = why.lines().last().unwrap_or("it failed").to_owned();
        let plain = podman(&[&run[..], &["--entrypoint", "/bin/true", &image]].concat());
        assert!(!plain.status.success(), "{why}");
        skip(what, &why);
        return;
    }
    let line = format!("hello from /workspace, {name}, ws://elsewhere:1\n");
    assert_eq!(
        text,
        line + "made by setup\nmade by install\n// of the project\n"
    );
}

#[test]
fn an_image_comes_back_as_it_was_from_wherever_it_went() {
    let home = Home::new();
    let base = home.path().join("base");
    let status = Command::new("cp")
        .arg("-a")
        .arg(busybox_base())
        .arg(&base)
        .status();
    assert!(status.unwrap().success());
    fs::hard_link(base.join("bin/busybox"), base.join("etc/same")).unwrap();
    symlink("no where", base.join("etc/link")).unwrap();
    fs::write(base.join("etc").join("n".repeat(200)), "long").unwrap();
    fs::set_permissions(base.join("etc/same"), fs::Permissions::from_mode(0o4711)).unwrap();
    File::open(base.join("etc"))
        .unwrap()
        .set_modified(std::time::UNIX_EPOCH)
        .unwrap();
    home.import(&base, "base:1");
    let first = export(&home, &["image", "export", "base:1", "--to", "oci:a"]);
    let again = export(&home, &["image", "export", "base:1", "--to", "oci:a"]);
    assert_eq!(first["digest"], again["digest"]);
    assert_eq!(
        (
            &first["layers"][0]["existed"],
            &again["layers"][0]["existed"]
        ),
        (&json!(false), &json!(true))
    );
    // Nothing of the machine, of the store or of the hour is in it.
    let other = Home::new();
    other.import(&base, "base:1");
    let elsewhere = export(&other, &["image", "export", "base:1", "--to", "oci:b"]);
    assert_eq!(elsewhere["digest"], first["digest"]);
    let zstd = export(
        &home,
        &[
            "image",
            "export",
            "base:1",
            "--to",
            "oci:a:zstd",
            "--compression",
            "zstd",
        ],
    );
    assert_eq!(zstd["layers"][0]["diff_id"], first["layers"][0]["diff_id"]);
    assert_ne!(zstd["layers"][0]["digest"], first["layers"][0]["digest"]);
    // Records of exports are told apart from recipes, and hold no layer that nothing else would.
    let id = first["layers"][0]["layer_id"].as_str().unwrap();
    home.run(&["store", "inspect", id])
        .ok()
        .says(&["exported", "(gzip)", "(zstd)"]);
    home.run(&["store", "verify"]).ok();
    home.import_busybox();
    home.run(&["image", "remove", "base:1"]).ok();
    home.run(&["store", "gc", "--keep", "0s", "--grace", "0s"])
        .ok();
    let keys = fs::read_dir(home.state().join("store/v1/keys"))
        .unwrap()
        .count();
    assert_eq!(keys, 0, "records are dropped with their layer");
    if !has("umoci") || !is_root() {
        skip("what umoci unpacks of an export", "needs umoci, and root");
        return;
    }
    let bundle = home.path().join("bundle");
    output(
        Command::new("umoci")
            .args(["unpack", "--image"])
            .arg(home.path().join("a:latest"))
            .arg(&bundle),
    );
    assert_eq!(imported(&home, &bundle.join("rootfs")), ids(&first));
}

#[test]
fn secrets_stay_here() {
    let (home, project) = (home(), worker());
    project.edit(
        "iii.worker.yaml",
        "GREETING: hello",
        "GREETING: hello\n  API_TOKEN: s3cr3t\n  DB: postgres://me:s3cr3t@host/db",
    );
    let ours = format!(
        "workers:\n  - name: {}\n    config:\n      pass: s3cr3t\n",
        "box"
    );
    project.write("config.yaml", &ours);
    let args = [
        "worker",
        "export",
        project.arg(),
        "--compression",
        "none",
        "--to",
    ];
    let told = home.run(&[&args[..], &["oci:out"]].concat()).ok();
    let told = told.says(&[
        "API_TOKEN looks like a secret",
        "DB looks like a secret",
        "iii.worker.yaml is left out",
        "config.yaml is left out",
    ]);
    assert!(!told.stderr.contains("s3cr3t"));
    let holds = |dir: &str| {
        let all = files(&home.path().join(dir));
        all.iter().any(|path| {
            fs::read(path)
                .unwrap()
                .windows(6)
                .any(|part| part == b"s3cr3t")
        })
    };
    assert!(!holds("out"));
    fs::remove_file(project.path().join("config.yaml")).unwrap();
    let some = [&args[..], &["oci:some", "--env", "DB", "--env", "TYPO"]].concat();
    let told = home.run(&some).ok().says(&[
        "API_TOKEN looks like a secret",
        "iii.worker.yaml is left out",
        "--env TYPO: the manifest has no such variable",
    ]);
    assert!(!told.stderr.contains("DB looks"));
    assert!(holds("some"));
    let all = [&args[..], &["oci:all", "--env", "DB", "--env", "API_TOKEN"]].concat();
    assert!(!home.run(&all).ok().stderr.contains("left out"));
    assert!(holds("all"));
}

#[test]
fn a_name_stands_for_what_last_ran() {
    let (home, project) = (home(), worker());
    let name = "named";
    let never = "there is no worker called named";
    home.run(&["worker", "export", name])
        .exits(1)
        .says(&[never, "give the project's path instead"]);
    home.dev(&project, &["--name", name]).finish(LIMIT).ok();
    let ran = export(&home, &["worker", "export", name]);
    let built = home.build(&project, &[]);
    assert_eq!(ids(&ran), built.ids());
    assert!(home.path().join("named/index.json").is_file());
    // Later changes are not in it; a path is built first.
    project.write("main.js", "// changed\n");
    assert_eq!(
        ids(&export(&home, &["worker", "export", name])),
        built.ids()
    );
    let now = export(&home, &["worker", "export", project.arg()]);
    assert_eq!(ids(&now)[2..], built.ids()[2..]);
    assert_ne!(ids(&now)[1], built.ids()[1]);
    // The step of each layer is not recorded any more.
    project.edit(
        "iii.worker.yaml",
        "  setup: \"echo made by setup > /etc/setup; rm /etc/passwd-\"\n",
        "",
    );
    let outdated = home.run(&["worker", "export", name]).exits(1);
    outdated.says(&[
        "is not what the worker named last ran from",
        "iii worker export /",
    ]);
}

#[test]
fn an_export_goes_to_a_registry_and_sends_only_what_is_new() {
    if !can_run("exports to a registry") {
        return;
    }
    let (home, project) = (home(), worker());
    let registry = Registry::start(Door::Open);
    let to = |name: &str| format!("docker://{}/{name}", registry.host);
    let first = export(
        &home,
        &[
            "worker",
            "export",
            project.arg(),
            "--to",
            &to("team/worker:1"),
        ],
    );
    project.write("main.js", "// changed\n");
    let second = export(
        &home,
        &[
            "worker",
            "export",
            project.arg(),
            "--to",
            &to("team/worker:2"),
        ],
    );
    let existed: Vec<_> = second["layers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|layer| &layer["existed"])
        .collect();
    assert_eq!(existed, [true, false, true, true]);
    let other = Home::new();
    for (tag, exported) in [("1", &first), ("2", &second)] {
        let name = format!("{}/team/worker:{tag}", registry.host);
        other.run(&["image", "pull", &name]).ok();
        let image = json_of(&other.run(&["image", "inspect", &name, "--json"]).ok());
        assert_eq!(image["layers"], json!(ids(exported)));
        assert_eq!(image["digest"], exported["digest"]);
        assert_eq!(image["config"]["working_dir"], "/workspace");
    }
}

/// A layout that skopeo has put another image into, and the remains of a killed export.
#[test]
fn a_killed_export_leaves_the_layout_as_it_was() {
    let home = home();
    let layout = home.path().join("layout");
    home.run(&["image", "export", NODE_IMAGE, "--to", "oci:layout:first"])
        .ok();
    if has("skopeo") {
        output(Command::new("skopeo").current_dir(home.path()).args([
            "--insecure-policy",
            "copy",
            "-q",
            "oci:layout:first",
            "oci:layout:theirs",
        ]));
    } else {
        skip("a layout shared with skopeo", "needs skopeo");
    }
    let base = home.path().join("base");
    let mut noise = 1_u64;
    let mut file = File::create(base.join("noise")).unwrap();
    for _ in 0..48 {
        let mut block = Vec::with_capacity(1 << 20);
        while block.len() < 1 << 20 {
            noise ^= noise << 13;
            noise ^= noise >> 7;
            noise ^= noise << 17;
            block.extend(noise.to_le_bytes());
        }
        file.write_all(&block).unwrap();
    }
    home.import(&base, "large:1");
    let args = ["image", "export", "large:1", "--to", "oci:layout:second"];
    let index = || fs::read(layout.join("index.json")).unwrap();
    let begun = || {
        let own = fs::read_dir(&layout).unwrap().flatten();
        let own = own.filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b".iii-"));
        let parts: Vec<_> = own.flat_map(|entry| files(&entry.path())).collect();
        parts
            .iter()
            .any(|path| path.metadata().is_ok_and(|meta| meta.len() > 1 << 20))
    };
    let before = index();
    let mut running = home.start(&args);
    assert!(holds_within(LIMIT, begun), "nothing is written");
    running.signal(Signal::KILL);
    assert_eq!(running.finish(LIMIT).status.code(), None);
    assert_eq!(index(), before);
    assert!(begun(), "it was killed too late");
    home.run(&args).ok();
    assert!(!begun(), "what was left of it is gone");
    let index: Value = serde_json::from_slice(&index()).unwrap();
    let tags: Vec<_> = index["manifests"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| {
            one["annotations"]["org.opencontainers.image.ref.name"]
                .as_str()
                .unwrap()
        })
        .collect();
    let expected: &[_] = if has("skopeo") {
        &["first", "theirs", "second"]
    } else {
        &["first", "second"]
    };
    assert_eq!(tags, expected);
}

#[test]
fn what_cannot_be_exported_is_told_before_anything_is_written() {
    let home = home();
    let at = |name: &str| home.path().join(name);
    fs::write(at("file"), "").unwrap();
    fs::create_dir(at("project")).unwrap();
    fs::write(at("project/package.json"), "{}").unwrap();
    for (to, code, says) in [
        (
            "dir",
            2,
            &["expected oci:DIR[:TAG], docker-archive:FILE[:NAME] or docker://HOST/REPO[:TAG]"][..],
        ),
        ("oci:", 2, &["no path behind oci:"]),
        ("oci:x:a b", 2, &["is not a tag"]),
        ("docker://Host/x@sha256:1", 2, &["digest"]),
        (
            "oci:file",
            1,
            &["exporting to oci:file:latest failed", "making file failed"],
        ),
        (
            "oci:project",
            1,
            &[
                "project is not an OCI layout: it holds other files",
                "does not exist",
            ],
        ),
        ("docker-archive:project", 1, &["writing project failed"]),
        (
            "docker-archive:no/where.tar",
            1,
            &["writing to no failed", "No such file"],
        ),
        ("oci:/proc/x", 1, &["making /proc/x failed"]),
        (
            "docker://127.0.0.1:1/x",
            1,
            &["127.0.0.1:1", "check the network"],
        ),
    ] {
        home.run(&["image", "export", NODE_IMAGE, "--to", to])
            .exits(code)
            .says(says);
    }
    home.run(&["image", "export", "nothing:1", "--to", "oci:new"])
        .exits(1)
        .says(&["no image is called nothing:1"]);
    home.run(&["worker", "export", "./nothing"])
        .exits(1)
        .says(&["no such directory"]);
    home.run(&["image", "export", NODE_IMAGE])
        .exits(2)
        .says(&["--to <DEST>"]);
    home.run(&[
        "image",
        "export",
        NODE_IMAGE,
        "--to",
        "oci:new",
        "--compression",
        "xz",
    ])
    .exits(2)
    .says(&["expected gzip, zstd or none"]);
    // A name that would be a whiteout in the image.
    fs::write(at("base/.wh.odd"), "").unwrap();
    home.import(&at("base"), "odd:1");
    let refused = home
        .run(&["image", "export", "odd:1", "--to", "oci:new"])
        .exits(1);
    refused.says(&["\".wh.odd\": a name that begins with .wh. would be a whiteout there"]);
    assert!(!at("new").exists());
}
