//! The fuzz targets' checks over their committed corpus, and over bytes near it: what a toolchain
//! without a fuzzer can do.

use std::fs;
use std::io::Write as _;
use std::path::PathBuf;

use iii_fuzz_checks::oci as checks;
use iii_test_support::{check_seeds, mutate};
use serde_json::json;

use super::archives::sample;
use super::hostile::zstd_frame;
use super::*;

fn corpus(target: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus")).join(target)
}

/// Random bytes that decide the variant.
fn noise(number: u64) -> [u8; 64] {
    let mut bytes = [0; 64];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&number.to_le_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

/// Tries the seeds of a target, and so many variants of each.
fn run(target: &str, check: fn(&[u8]), variants: u64) {
    let entries = fs::read_dir(corpus(target)).unwrap();
    let mut seeds: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    seeds.sort();
    assert!(!seeds.is_empty(), "{target} has no seeds");
    for path in seeds {
        let seed = fs::read(&path).unwrap();
        check(&seed);
        for number in 0..variants {
            let bytes = mutate(&seed, &noise(number));
            let outcome = std::panic::catch_unwind(|| check(&bytes));
            assert!(outcome.is_ok(), "variant {number} of {}", path.display());
        }
    }
}

#[test]
fn no_layer_upsets() {
    run("oci_layer", checks::check_layer, 500);
}

#[test]
fn no_document_upsets() {
    run("oci_manifest", checks::check_manifest, 600);
}

#[test]
fn no_name_upsets() {
    run("oci_reference", checks::check_reference, 3000);
}

/// A layer that depends on those below it, and one that hides some of them.
fn layers() -> Vec<Vec<u8>> {
    let linking = Tar::default()
        .hardlink("copy", "etc/name")
        .file("srv/.wh..wh..opq", "")
        .file("srv/new", "1")
        .end();
    let hiding = Tar::default()
        .dir("d")
        .file(".wh.etc", "")
        .file("d/.wh.x", "")
        .symlink("s", "../d")
        .file("s/y", "1")
        .hardlink("h", "s/y")
        .end();
    // Stored, so that no version of a library makes it another.
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::none());
    gzip.write_all(&hiding).unwrap();
    let gzip = gzip.finish().unwrap();
    let zstd = zstd_frame(17, &hiding);
    vec![sample(), linking, hiding, gzip, zstd]
}

fn documents() -> Vec<Vec<u8>> {
    let digest = format!("sha256:{}", "0".repeat(64));
    let descriptor = |kind: &str| {
        json!({
            "mediaType": format!("application/vnd.oci.image.{kind}"),
            "digest": digest, "size": 7,
            "annotations": { "org.opencontainers.image.ref.name": "t" },
            "platform": { "os": "linux", "architecture": "amd64", "variant": "v1" },
        })
    };
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("config.v1+json"),
        "layers": [descriptor("layer.v1.tar+gzip"), descriptor("layer.v1.tar+zstd")],
    });
    let index = json!({
        "schemaVersion": 2,
        "manifests": [descriptor("manifest.v1+json"), descriptor("index.v1+json")],
    });
    let config = json!({
        "created": "2024-01-01T00:00:00Z", "architecture": "amd64", "os": "linux",
        "config": {
            "Env": ["PATH=/bin"], "User": "1:2", "WorkingDir": "/srv", "Entrypoint": ["a"],
            "Cmd": null, "ExposedPorts": { "80/tcp": {} },
        },
        "rootfs": { "type": "layers", "diff_ids": [digest] },
        "history": [{ "created_by": "x", "empty_layer": true }],
    });
    let saved = json!([{
        "Config": format!("{}.json", "0".repeat(64)), "RepoTags": ["a:t"],
        "Layers": [format!("{}/layer.tar", "0".repeat(64)), "blobs/sha256/0"],
    }]);
    let documents = [manifest, index, config, saved];
    documents
        .iter()
        .map(|document| document.to_string().into_bytes())
        .collect()
}

fn names() -> Vec<Vec<u8>> {
    let digest = "0123456789abcdef".repeat(4);
    [
        "node",
        "localhost:5000/a/b_c.d--e:V1.0_x",
        "[::1]:5000/x",
        "docker.io/library/node:24-slim",
        &format!("ghcr.io/a/b@sha256:{digest}"),
        &format!("a/b:c@sha256:{digest}"),
    ]
    .map(|name| name.as_bytes().to_vec())
    .into()
}

#[test]
fn seeds_are_current() {
    for (target, seeds) in [
        ("oci_layer", layers()),
        ("oci_manifest", documents()),
        ("oci_reference", names()),
    ] {
        check_seeds(&corpus(target), &seeds);
    }
}
