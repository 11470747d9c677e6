//! Images made by hand, imported under names.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;

use serde_json::{Value, json};

use super::super::digest::Digest;
use super::super::{self as oci, Event, Image, Imported, Origin};
use super::*;

const NAME: &str = "docker.io/iiidev/node:latest";

#[derive(Clone, Copy, Debug)]
pub enum Packing {
    Plain,
    Gzip,
    Zstd,
}

pub fn pack(bytes: &[u8], packing: Packing) -> Vec<u8> {
    match packing {
        Packing::Plain => bytes.to_vec(),
        Packing::Gzip => {
            // Two members, as tools that compress in parallel write them.
            let half = bytes.len() / 2;
            [&bytes[..half], &bytes[half..]]
                .iter()
                .flat_map(|part| {
                    let mut encoder =
                        flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                    encoder.write_all(part).unwrap();
                    encoder.finish().unwrap()
                })
                .collect()
        }
        Packing::Zstd => zstd::encode_all(bytes, 1).unwrap(),
    }
}

/// An OCI layout in the making.
pub struct Layout {
    pub dir: PathBuf,
}

impl Layout {
    fn new(test: &TestStore, name: &str) -> Self {
        let dir = test.dir.path().join(name);
        fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
        fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        Self { dir }
    }

    fn blob_path(&self, digest: &str) -> PathBuf {
        self.dir.join("blobs").join(digest.replace(':', "/"))
    }

    fn blob(&self, media_type: &str, bytes: &[u8]) -> Value {
        let digest = Digest::of(bytes).to_string();
        fs::write(self.blob_path(&digest), bytes).unwrap();
        json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() })
    }

    fn json(&self, media_type: &str, value: &Value) -> Value {
        self.blob(media_type, value.to_string().as_bytes())
    }

    fn layer(&self, archive: &[u8], packing: Packing) -> Value {
        let media_type = match packing {
            Packing::Plain => "application/vnd.oci.image.layer.v1.tar",
            Packing::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Packing::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
        };
        self.blob(media_type, &pack(archive, packing))
    }

    /// The descriptor of a manifest with these layers.
    fn manifest(&self, config: &Value, layers: &[Value]) -> Value {
        let config = self.json("application/vnd.oci.image.config.v1+json", config);
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config,
            "layers": layers,
        });
        self.json("application/vnd.oci.image.manifest.v1+json", &manifest)
    }

    fn index(&self, manifests: &[Value]) {
        let index = json!({ "schemaVersion": 2, "manifests": manifests });
        fs::write(self.dir.join("index.json"), index.to_string()).unwrap();
    }

    /// The whole layout as an archive.
    fn archive(&self) -> Vec<u8> {
        let read = |name: &str| fs::read(self.dir.join(name)).unwrap();
        let mut tar = Tar::default().dir("./").dir("blobs/").dir("blobs/sha256/");
        for entry in fs::read_dir(self.dir.join("blobs/sha256")).unwrap() {
            let name = format!("blobs/sha256/{}", entry.unwrap().file_name().display());
            tar = tar.file(&name, read(&name));
        }
        tar.file("oci-layout", read("oci-layout"))
            .file("./index.json", read("index.json"))
            .end()
    }
}

fn arch() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn config_for(arch: &str, archives: &[&[u8]]) -> Value {
    let diff_ids: Vec<_> = archives.iter().map(|bytes| Digest::of(bytes)).collect();
    json!({
        "created": "2024-01-01T00:00:00Z",
        "architecture": arch,
        "os": "linux",
        "config": {
            "Env": ["PATH=/usr/bin", "NODE_VERSION=24"],
            "User": "node",
            "WorkingDir": "/app",
            "Entrypoint": ["tini", "--"],
            "Cmd": ["node"],
            "Volumes": null,
            "ExposedPorts": { "80/tcp": {} },
            "Labels": { "a": "b" },
        },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
        "history": [{ "created_by": "test" }],
    })
}

fn config(archives: &[&[u8]]) -> Value {
    config_for(arch(), archives)
}

fn base() -> Vec<u8> {
    Tar::default()
        .dir("./")
        .dir("etc")
        .file("etc/name", "base")
        .file("old", "1")
        .end()
}

fn upper() -> Vec<u8> {
    Tar::default()
        .file(".wh.old", "")
        .file("etc/more", "2")
        .hardlink("linked", "etc/name")
        .end()
}

fn import(test: &TestStore, path: &std::path::Path, name: &str) -> Result<Imported, String> {
    oci::import(&test.store, path, name, &Limits::default(), &|_| {})
        .map_err(|error| with_causes(&error))
}

fn show(test: &TestStore, image: &Image) -> Vec<Vec<String>> {
    let layers = image.layers.iter();
    layers
        .map(|id| test.show(&test.store.layer(id).unwrap()))
        .collect()
}

fn two_layers() -> [Vec<&'static str>; 2] {
    [
        vec!["etc/", "etc/name = base", "old = 1"],
        vec![
            "/ implicit",
            "etc/ implicit",
            "etc/more = 2",
            "etc/name = base link#0",
            "linked = base link#0",
            "old gone",
        ],
    ]
}

#[test]
fn a_layout_becomes_an_image() {
    let (lower, above) = (base(), upper());
    for packing in [Packing::Plain, Packing::Gzip, Packing::Zstd] {
        let test = TestStore::new();
        let layout = Layout::new(&test, "layout");
        let layers = [layout.layer(&lower, packing), layout.layer(&above, packing)];
        let manifest = layout.manifest(&config(&[&lower, &above]), &layers);
        layout.index(std::slice::from_ref(&manifest));
        let archive = test.dir.path().join("image.tar");
        fs::write(&archive, pack(&layout.archive(), packing)).unwrap();
        let mut images = Vec::new();
        for path in [&layout.dir, &archive] {
            let imported = import(&test, path, "iiidev/node").unwrap();
            assert_eq!(show(&test, &imported.image), two_layers(), "{packing:?}");
            images.push(imported);
        }
        // The second found every layer in the store.
        assert_eq!(images[1].new_files, 0);
        let image = oci::resolve(&test.store, "iiidev/node").unwrap().unwrap();
        assert_eq!(image, images[1].image);
        assert_eq!(image.name, NAME);
        assert_eq!(image.origin, Origin::OciLayout);
        assert_eq!(image.digest.unwrap().to_string(), manifest["digest"]);
        assert_eq!(image.config.env, ["PATH=/usr/bin", "NODE_VERSION=24"]);
        assert_eq!(image.config.user, "node");
        assert_eq!(image.config.working_dir, "/app");
        assert_eq!(image.config.entrypoint, ["tini", "--"]);
        assert_eq!(image.config.cmd, ["node"]);
        assert_eq!(oci::list(&test.store).unwrap(), [image]);
    }
}

#[test]
fn a_layer_is_unpacked_once() {
    let test = TestStore::new();
    let (lower, above) = (base(), upper());
    let layout = Layout::new(&test, "one");
    let mut bottom = layout.layer(&lower, Packing::Gzip);
    bottom["mediaType"] = json!("application/vnd.docker.image.rootfs.diff.tar.gzip");
    layout.index(&[layout.manifest(&config(&[&lower]), std::slice::from_ref(&bottom))]);
    let one = import(&test, &layout.dir, "one").unwrap();
    let layout = Layout::new(&test, "two");
    let layers = [
        layout.layer(&lower, Packing::Zstd),
        layout.layer(&above, Packing::Plain),
    ];
    layout.index(&[layout.manifest(&config(&[&lower, &above]), &layers)]);
    // Known by its plain contents, so the blob is not even opened.
    fs::remove_file(layout.blob_path(layers[0]["digest"].as_str().unwrap())).unwrap();
    let two = import(&test, &layout.dir, "two").unwrap();
    assert_eq!(two.image.layers[0], one.image.layers[0]);
    assert_eq!(show(&test, &two.image), two_layers());
    // Entries that a layer took from those below are not its own on others.
    let other = Tar::default().file("etc/name", "other").end();
    let layers = [
        layout.layer(&other, Packing::Plain),
        layout.layer(&above, Packing::Plain),
    ];
    layout.index(&[layout.manifest(&config(&[&other, &above]), &layers)]);
    let three = import(&test, &layout.dir, "three").unwrap();
    assert_ne!(three.image.layers[1], two.image.layers[1]);
    assert!(show(&test, &three.image)[1].contains(&"linked = other link#0".to_owned()));
}

#[test]
fn an_opaque_directory_without_an_entry_depends_on_the_layers_below() {
    let srv = |mode: &str, uid: &str| {
        let mut head = Head::new(b'5', "srv", 0);
        head.put(100, mode).put(108, uid);
        Tar::default().dir("etc").head(&head).file("srv/old", "1")
    };
    let bases = [
        (None, "srv/ opaque"),
        (
            Some(Tar::default().dir("etc").dir("srv").end()),
            "srv/ opaque",
        ),
        (Some(srv("0000711", "0000005").end()), "srv/ opaque 711 5:0"),
        (Some(Tar::default().dir("etc").end()), "srv/ opaque"),
        (Some(srv("0002770", "0000000").end()), "srv/ opaque 2770"),
    ];
    let above = Tar::default()
        .file("srv/.wh..wh..opq", "")
        .file("srv/new", "2")
        .end();
    // Whichever comes first, none is taken for another's.
    for first in 0..bases.len() {
        let test = TestStore::new();
        for (base, expected) in bases.iter().cycle().skip(first).take(bases.len()) {
            let layout = Layout::new(&test, "layout");
            let archives: Vec<&[u8]> = base.iter().chain([&above]).map(|one| &**one).collect();
            let layers: Vec<_> = archives
                .iter()
                .map(|archive| layout.layer(archive, Packing::Plain))
                .collect();
            layout.index(&[layout.manifest(&config(&archives), &layers)]);
            for _ in 0..2 {
                let image = import(&test, &layout.dir, "x").unwrap().image;
                let shown = show(&test, &image).pop().unwrap();
                assert_eq!(shown, ["/ implicit", expected, "srv/new = 2"], "{first}");
            }
        }
    }
}

#[test]
fn a_name_stands_for_one_image_at_a_time() {
    let test = TestStore::new();
    let path = test.dir.path().join("rootfs.tar");
    fs::write(
        &path,
        Tar::default().dir("usr").file("usr/.wh.x", "1").end(),
    )
    .unwrap();
    let first = import(&test, &path, "node").unwrap().image;
    assert_eq!(show(&test, &first), [["usr/", "usr/.wh.x = 1"]]);
    assert_eq!(first.origin, Origin::RootfsTar);
    fs::write(&path, "no archive").unwrap();
    assert!(import(&test, &path, "node").is_err());
    assert_eq!(oci::resolve(&test.store, "node").unwrap().unwrap(), first);
    let other = Tar::default().dir("usr").end();
    fs::write(&path, pack(&other, Packing::Gzip)).unwrap();
    let second = import(&test, &path, "node:latest").unwrap().image;
    assert_eq!(second.digest, Some(Digest::of(&other)));
    assert_eq!(oci::list(&test.store).unwrap(), [second]);
    assert_eq!(oci::resolve(&test.store, "node:24").unwrap(), None);
    assert!(oci::remove(&test.store, "node").unwrap());
    assert!(!oci::remove(&test.store, "node").unwrap());
    assert_eq!(oci::list(&test.store).unwrap(), []);
}

#[test]
fn a_directory_becomes_an_image() {
    let test = TestStore::new();
    let root = test.dir.path().join("root");
    fs::create_dir_all(root.join("usr")).unwrap();
    let _listener = std::os::unix::net::UnixListener::bind(root.join("socket")).unwrap();
    let told = std::sync::Mutex::new(Vec::new());
    let imported = oci::import(&test.store, &root, "dir", &Limits::default(), &|event| {
        if let Event::LeftOut { path, why } = event {
            told.lock()
                .unwrap()
                .push(format!("{}: {why}", path.display()));
        }
    });
    let image = imported.unwrap().image;
    assert_eq!((image.origin, image.digest), (Origin::RootfsDir, None));
    assert_eq!(
        told.into_inner().unwrap(),
        [format!("{}: it is a socket", root.join("socket").display())]
    );
    fs::remove_dir(root.join("usr")).unwrap();
    let error = import(&test, &root, "dir").unwrap_err();
    assert!(
        error.contains("has neither an index.json nor a usr, bin or etc"),
        "{error}"
    );
    fs::write(root.join("oci-layout"), "{}").unwrap();
    let error = import(&test, &root, "dir").unwrap_err();
    assert!(error.contains("index.json is missing"), "{error}");
    let other = test.dir.path().join("other.tar");
    let rootfs = Tar::default().dir("./").file("blobs/x", "1").dir("usr");
    fs::write(&other, rootfs.end()).unwrap();
    let image = import(&test, &other, "dir").unwrap().image;
    assert_eq!(
        show(&test, &image),
        [["blobs/ implicit", "blobs/x = 1", "usr/"]]
    );
    fs::write(&other, Tar::default().file("README", "").end()).unwrap();
    let error = import(&test, &other, "dir").unwrap_err();
    assert!(
        error.contains("has neither an index.json nor a usr"),
        "{error}"
    );
    let error = import(&test, &test.dir.path().join("nothing"), "dir").unwrap_err();
    assert!(error.contains("nothing failed: No such file"), "{error}");
}

#[test]
fn the_image_for_this_machine_is_chosen() {
    let test = TestStore::new();
    let layout = Layout::new(&test, "layout");
    let archives: Vec<_> = (0..3)
        .map(|ix| Tar::default().file("which", ix.to_string()).end())
        .collect();
    let manifests: Vec<_> = archives
        .iter()
        .map(|archive| {
            let layer = layout.layer(archive, Packing::Plain);
            layout.manifest(&config(&[archive]), &[layer])
        })
        .collect();
    let with = |descriptor: &Value, key: &str, value: Value| {
        let mut descriptor = descriptor.clone();
        descriptor[key] = value;
        descriptor
    };
    let platform = |arch: &str| json!({ "architecture": arch, "os": "linux" });
    let named = |name: &str| json!({ "org.opencontainers.image.ref.name": name });
    let chosen = |manifests: &[Value], name: &str| {
        layout.index(manifests);
        let image = import(&test, &layout.dir, name)?.image;
        Ok::<_, String>(show(&test, &image)[0][1].clone())
    };

    let [a, b, c] = &manifests[..] else { panic!() };
    let attestation = with(
        a,
        "platform",
        json!({ "architecture": "unknown", "os": "unknown" }),
    );
    let nested = json!({
        "schemaVersion": 2,
        "manifests": [with(a, "platform", platform("s390x")), with(b, "platform", platform(arch())), attestation],
    });
    let nested = layout.json("application/vnd.oci.image.index.v1+json", &nested);
    assert_eq!(chosen(&[nested], "x").unwrap(), "which = 1");
    let tagged = [
        with(a, "annotations", named("v1")),
        with(b, "annotations", named("docker.io/library/x:v2")),
        with(c, "annotations", named("v3")),
    ];
    for (name, expected) in [
        ("x:v1", "which = 0"),
        ("x:v2", "which = 1"),
        ("x:v3", "which = 2"),
    ] {
        assert_eq!(chosen(&tagged, name).unwrap(), expected);
    }
    for (manifests, message) in [
        (
            &tagged[..],
            "several images, and none is named docker.io/library/x:latest: v1, docker.io/library/x:v2, v3",
        ),
        (
            &[with(a, "platform", platform("s390x"))],
            "only for linux/s390x",
        ),
        (&[], "only for nothing that is an image"),
    ] {
        let error = chosen(manifests, "x").unwrap_err();
        assert!(error.contains(message), "{error}");
    }
    let pinned = format!("x@{}", a["digest"].as_str().unwrap());
    assert_eq!(
        chosen(std::slice::from_ref(a), &pinned).unwrap(),
        "which = 0"
    );
    let error = chosen(std::slice::from_ref(b), &pinned).unwrap_err();
    assert!(error.contains("names an image by its digest"), "{error}");
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn what_a_layout_promises_is_verified() {
    type Break = fn(&Layout, &[u8]);
    let cases: [(Break, &str); 13] = [
        (
            |layout, archive| {
                let layer = layout.layer(archive, Packing::Gzip);
                let path = layout.blob_path(layer["digest"].as_str().unwrap());
                let mut bytes = fs::read(&path).unwrap();
                let middle = bytes.len() / 2;
                bytes[middle] ^= 1;
                fs::write(&path, bytes).unwrap();
                layout.index(&[layout.manifest(&config(&[archive]), &[layer])]);
            },
            "cannot be used: its digest is sha256:",
        ),
        (
            |layout, archive| {
                let mut layer = layout.layer(archive, Packing::Plain);
                layer["size"] = json!(archive.len() + 1);
                layout.index(&[layout.manifest(&config(&[archive]), &[layer])]);
            },
            "its size is not the",
        ),
        (
            |layout, archive| {
                let mut layer = layout.layer(archive, Packing::Zstd);
                layer["size"] = json!(20);
                layout.index(&[layout.manifest(&config(&[archive]), &[layer])]);
            },
            "its size is not the 20 bytes",
        ),
        (
            |layout, archive| {
                let layer = layout.layer(archive, Packing::Gzip);
                layout.index(&[layout.manifest(&config(&[b"other"]), &[layer])]);
            },
            "but the image's configuration promises",
        ),
        (
            |layout, archive| {
                let packed = pack(archive, Packing::Gzip);
                let layer = layout.blob(
                    "application/vnd.oci.image.layer.v1.tar",
                    &packed[..packed.len() - 9],
                );
                layout.index(&[layout.manifest(&config(&[archive]), &[layer])]);
            },
            "decompressing (gzip) failed",
        ),
        (
            |layout, archive| {
                let layer = layout.blob(
                    "application/vnd.oci.image.layer.v1.tar",
                    b"\xfd7zXZ\0 and so on",
                );
                layout.index(&[layout.manifest(&config(&[archive]), &[layer])]);
            },
            "xz compression is not supported",
        ),
        (
            |layout, archive| {
                let layer = layout.layer(archive, Packing::Gzip);
                fs::remove_file(layout.blob_path(layer["digest"].as_str().unwrap())).unwrap();
                layout.index(&[layout.manifest(&config(&[archive]), &[layer])]);
            },
            "is missing",
        ),
        (
            |layout, archive| {
                let layer = layout.blob(
                    "application/vnd.cncf.helm.chart.content.v1.tar+gzip",
                    archive,
                );
                layout.index(&[layout.manifest(&config(&[archive]), &[layer])]);
            },
            "which is not a layer of an image",
        ),
        (
            |layout, archive| {
                let layer = layout.layer(archive, Packing::Plain);
                layout.index(&[layout.manifest(&config(&[archive, archive]), &[layer])]);
            },
            "the manifest has 1 layers and the configuration 2 diff ids",
        ),
        (
            |layout, archive| {
                let layer = layout.layer(archive, Packing::Plain);
                layout.index(&[layout.manifest(&config_for("mips", &[archive]), &[layer])]);
            },
            "only for linux/mips",
        ),
        (
            |layout, archive| {
                let mut layer = layout.layer(archive, Packing::Plain);
                layer["digest"] = json!("sha256:../../../../../../etc/passwd");
                layout.index(&[layout.manifest(&config(&[archive]), &[layer])]);
            },
            "not a valid image manifest",
        ),
        (
            |layout, _| fs::write(layout.dir.join("index.json"), " ".repeat(5 << 20)).unwrap(),
            "the size of a JSON document, in bytes, is over the limit of 4194304 (document)",
        ),
        (
            |layout, _| fs::write(layout.dir.join("index.json"), "{").unwrap(),
            "index.json is not a valid image index",
        ),
    ];
    for (break_it, expected) in cases {
        let test = TestStore::new();
        let layout = Layout::new(&test, "layout");
        break_it(&layout, &base());
        let error = import(&test, &layout.dir, "x").unwrap_err();
        assert!(error.contains(expected), "{error}");
        assert!(
            error.starts_with(&format!("importing {} failed: ", layout.dir.display())),
            "{error}"
        );
        assert_eq!(oci::list(&test.store).unwrap(), []);
        let layers = fs::read_dir(test.store.dir().join("layers")).unwrap();
        assert_eq!(layers.count(), 0, "{expected}");
    }
}

#[test]
fn what_docker_saves_becomes_an_image() {
    let (lower, above) = (base(), upper());
    let configuration = config(&[&lower, &above]).to_string();
    let id = Digest::of(configuration.as_bytes());
    let saved = |config_name: &str, layers: &Value| {
        let manifest = json!([{ "Config": config_name, "RepoTags": ["iiidev/node:latest"], "Layers": layers }]);
        Tar::default()
            .file(config_name, &configuration)
            .dir("a".repeat(64))
            .file(format!("{}/layer.tar", "a".repeat(64)), &lower)
            .symlink(
                format!("{}/y.tar", "a".repeat(64)),
                format!("../{}/x", "c".repeat(64)),
            )
            .file(format!("{}/x", "c".repeat(64)), &above)
            .file("manifest.json", manifest.to_string())
            .end()
    };
    let layers = json!([
        format!("{}/layer.tar", "a".repeat(64)),
        format!("{}/y.tar", "a".repeat(64))
    ]);
    let test = TestStore::new();
    let path = test.dir.path().join("saved.tar");
    for packing in [Packing::Plain, Packing::Gzip] {
        fs::write(
            &path,
            pack(&saved(&format!("{}.json", id.hex()), &layers), packing),
        )
        .unwrap();
        let image = import(&test, &path, NAME).unwrap().image;
        assert_eq!(show(&test, &image), two_layers());
        assert_eq!(image.digest, Some(id));
    }
    for (config_name, layers, expected) in [
        (format!("{}.json", "0".repeat(64)), layers, "its digest is"),
        (
            format!("{}.json", id.hex()),
            json!(["../../etc/passwd", "/etc/passwd"]),
            "../../etc/passwd is missing",
        ),
        (
            format!("{}.json", id.hex()),
            json!([]),
            "the manifest has 0 layers and the configuration 2",
        ),
    ] {
        fs::write(&path, saved(&config_name, &layers)).unwrap();
        let error = import(&test, &path, NAME).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn bombs_are_refused_by_their_ratio() {
    let test = TestStore::new();
    let limits = Limits {
        ratio: 50,
        ratio_from: 1 << 20,
        ..Limits::default()
    };
    for packing in [Packing::Gzip, Packing::Zstd] {
        let bomb = pack(
            &Tar::default().file("zeros", vec![0; 16 << 20]).end(),
            packing,
        );
        let lease = test.store.lease("test").unwrap();
        let ingest = test.store.ingest(&lease).unwrap();
        let error = oci::layers::unpack_blob(
            &bomb[..],
            oci::stream::Promise::default(),
            &ingest,
            Dialect::Rootfs,
            &limits,
            &|_| {},
        );
        let error = with_causes(&error.unwrap_err());
        assert_eq!(
            error,
            "the ratio at which it is compressed is over the limit of 50 (ratio)"
        );
    }
}

/// Runs another tool; `None` where it is not installed, which is told.
pub fn tool(command: &mut Command) -> Option<()> {
    let Ok(output) = command.output() else {
        let name = command.get_program().display();
        eprintln!("SKIPPED: images made by {name}: it is not installed");
        return None;
    };
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {complaint}");
    Some(())
}

/// A layout with one image, tagged `t`.
pub fn tagged(test: &TestStore, archives: &[&[u8]]) -> Layout {
    let layout = Layout::new(test, "layout");
    let layers: Vec<_> = archives
        .iter()
        .map(|archive| layout.layer(archive, Packing::Gzip))
        .collect();
    let mut config = config(archives);
    // umoci looks names up in the image's own passwd file.
    config["config"]["User"] = json!("0:0");
    let mut manifest = layout.manifest(&config, &layers);
    manifest["annotations"] = json!({ "org.opencontainers.image.ref.name": "t" });
    layout.index(&[manifest]);
    layout
}

#[test]
fn what_skopeo_makes_of_an_image_is_the_same_image() {
    let test = TestStore::new();
    let layout = tagged(&test, &[&base(), &upper()]);
    let original = import(&test, &layout.dir, "x:t").unwrap().image;
    let source = format!("oci:{}:t", layout.dir.display());
    for target in [
        "oci:DIR/copy:t",
        "oci-archive:DIR/copy.tar:t",
        "docker-archive:DIR/saved.tar:x:t",
    ] {
        let target = target.replace("DIR", test.dir.path().to_str().unwrap());
        let copied = tool(Command::new("skopeo").args([
            "--insecure-policy",
            "copy",
            "--dest-compress-format=zstd",
            &source,
            &target,
        ]));
        if copied.is_none() {
            return;
        }
        let path = target.split(':').nth(1).unwrap();
        let elsewhere = TestStore::new();
        let image = import(&elsewhere, path.as_ref(), "x:t").unwrap().image;
        assert_eq!(image.layers, original.layers, "{target}");
        assert_eq!(image.config, original.config, "{target}");
    }
}

#[test]
fn umoci_unpacks_and_repacks_to_the_same_trees() {
    let test = TestStore::new();
    let layout = tagged(&test, &[&base()]);
    let original = import(&test, &layout.dir, "x:t").unwrap().image;
    let bundle = test.dir.path().join("bundle");
    let image = format!("{}:t", layout.dir.display());
    let mut unpack = Command::new("umoci");
    unpack.args(["unpack", "--image", &image]).arg(&bundle);
    let rootfs = bundle.join("rootfs");
    if test.dir.path().metadata().unwrap().uid() != 0 {
        eprintln!("SKIPPED: images made by umoci: needs root");
        return;
    }
    if tool(&mut unpack).is_none() {
        return;
    }
    let taken = super::gnu_tar::take(&test, &rootfs);
    assert_eq!(taken.layer_id(), original.layers[0]);

    fs::remove_file(rootfs.join("old")).unwrap();
    fs::remove_dir_all(rootfs.join("etc")).unwrap();
    fs::create_dir(rootfs.join("etc")).unwrap();
    fs::write(rootfs.join("etc/new"), "new").unwrap();
    let epoch = std::time::UNIX_EPOCH;
    for name in ["etc/new", "etc", ""] {
        fs::File::open(rootfs.join(name))
            .unwrap()
            .set_modified(epoch)
            .unwrap();
    }
    tool(
        Command::new("umoci")
            .args(["repack", "--image", &image])
            .arg(&bundle),
    )
    .unwrap();
    let repacked = import(&test, &layout.dir, "x:t").unwrap().image;
    assert_eq!(repacked.layers[0], original.layers[0]);
    let expected = [
        "/ implicit",
        "etc/ implicit",
        "etc/name gone",
        "etc/new = new",
        "old gone",
    ];
    assert_eq!(show(&test, &repacked)[1], expected);
}
