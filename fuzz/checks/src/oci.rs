//! Layers, documents of images, and names from strangers. For all bytes, no decoder panics, grows
//! without bound or never ends, and accepted input keeps the requested limits.
//!
//! Part of two crates: the fuzz targets, and the tests of `iii-oci`, which run it over the corpus.

use std::fs::File;
use std::io::{Read, Write as _};
use std::sync::Arc;

use iii_oci::layers::unpack_blob;
use iii_oci::layout::{Files, MAX_LAYERS};
use iii_oci::stream::Promise;
use iii_oci::tar::Archive;
use iii_oci::unpack::{Dialect, UnpackError, unpack};
use iii_oci::{Digest, Limits, Platform, Reference};
use iii_store::tree::{MAX_DEPTH, check_name, components};
use iii_store::{Kind, Layer, Lease, NodeRef, Store, layer};
use rustix::fs::{MemfdFlags, memfd_create};

/// Little of everything, so that a missing bound shows.
fn limits() -> Limits {
    Limits {
        entries: 2000,
        path: 4096,
        metadata: 1 << 20,
        extension: 64 << 10,
        bytes: 4 << 20,
        ratio: 100,
        ratio_from: 1 << 20,
        holes: 1 << 20,
        segments: 1000,
        document: 64 << 10,
    }
}

/// Where layers are unpacked to, and what lies below them.
struct World {
    lease: Lease,
    store: Store,
    below: Vec<Arc<Layer>>,
    _dir: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let store = Store::open(dir.path().join("store")).expect("a store");
        let lease = store.lease("fuzz").expect("a lease");
        let lower = tar(&[("etc/name", b"x"), ("srv/old", b"y"), ("d/x", b"")]);
        let ingest = store.ingest(&lease).expect("an ingest");
        let unpacked = unpack(
            &mut &lower[..],
            &ingest,
            Dialect::Layer(&[]),
            &limits(),
            &|_| {},
        );
        let published = ingest.finish(&unpacked.expect("an archive").tree);
        let id = published.expect("a layer").layer_id;
        let below = vec![store.layer(&id).expect("the layer")];
        Self {
            lease,
            store,
            below,
            _dir: dir,
        }
    }

    /// The tree of an archive as a layer, and whether it depends on the layers below.
    fn unpack(&self, bytes: &[u8], dialect: Dialect<'_>) -> Result<(Layer, bool), UnpackError> {
        let ingest = self.store.ingest(&self.lease).expect("an ingest");
        let unpacked = unpack(&mut &*bytes, &ingest, dialect, &limits(), &|_| {})?;
        let encoded = layer::encode(&unpacked.tree).expect("a tree within the store's limits");
        let layer = Layer::from_bytes(encoded.bytes).expect("an encoded layer can be decoded");
        Ok((layer, unpacked.took_from_below))
    }
}

thread_local! {
    static WORLD: World = World::new();
}

/// The blob of a layer.
pub fn check_layer(bytes: &[u8]) {
    check_members(bytes);
    let mut summed = bytes.to_vec();
    mend_checksums(&mut summed);
    check_members(&summed);
    WORLD.with(|world| {
        check_trees(world, &summed);
        check_blob(world, bytes);
    });
}

/// A header whose checksum is wrong hides everything behind it from a fuzzer that cannot guess it.
fn mend_checksums(bytes: &mut [u8]) {
    for block in bytes.chunks_exact_mut(512) {
        if block[257..262] == *b"ustar" {
            sum(block);
        }
    }
}

fn sum(block: &mut [u8]) {
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// Reading ends, with an answer and within the archive's own length.
fn check_members(bytes: &[u8]) {
    let limits = limits();
    let mut input = bytes;
    let input: &mut dyn Read = &mut input;
    let mut archive = Archive::new(input, &limits);
    let mut buf = [0; 700];
    let mut total = 0;
    while let Ok(Some(member)) = archive.next_member() {
        let mut size = 0;
        while let Ok(got @ 1..) = archive.read_contents(&mut buf) {
            size += got as u64;
        }
        assert!(size <= member.size);
        total += size;
    }
    assert!(total <= bytes.len() as u64 + limits.holes);
    assert!(archive.offset() <= bytes.len() as u64);
}

/// An unpacked layer can be stored, has no name that leads elsewhere, and depends on the layers
/// below only where it says so.
fn check_trees(world: &World, bytes: &[u8]) {
    if let Ok((layer, took)) = world.unpack(bytes, Dialect::Rootfs) {
        assert!(!took);
        check_names(&layer);
        assert!((0..layer.node_count()).all(|ix| {
            let node = layer.node(ix);
            node.is_some_and(|node| node.kind() != Kind::Whiteout)
        }));
    }
    let on = world.unpack(bytes, Dialect::Layer(&world.below));
    let alone = world.unpack(bytes, Dialect::LayerAlone);
    match (on, alone) {
        (Ok((on, took)), Ok((alone, alone_took))) => {
            assert!(!took && !alone_took);
            assert_eq!(on.layer_id(), alone.layer_id());
            check_names(&on);
        }
        (Ok((on, took)), Err(UnpackError::NeedsBelow)) => {
            assert!(took);
            check_names(&on);
        }
        (Err(_), Err(_)) => {}
        (on, alone) => panic!(
            "on another layer: {:?}, alone: {:?}",
            on.map(|_| ()),
            alone.map(|_| ())
        ),
    }
}

fn check_names(layer: &Layer) {
    // A hardlink into a layer below brings its target along.
    assert!(u64::from(layer.node_count()) <= 2 * limits().entries + 1);
    for ix in 1..layer.node_count() {
        let node = layer.node(ix).expect("a node");
        assert_eq!(check_name(node.name()), Ok(()));
        let path = node.path();
        assert!(components(&path).count() <= MAX_DEPTH + 1);
        assert_eq!(layer.lookup(&path).map(NodeRef::index), Some(ix));
    }
}

/// The same, by way of decompression.
fn check_blob(world: &World, bytes: &[u8]) {
    if !matches!(bytes.first(), Some(0x1f | 0x28 | 0x50..=0x5f)) {
        return;
    }
    let ingest = world.store.ingest(&world.lease).expect("an ingest");
    let layer = Dialect::Layer(&world.below);
    let promise = Promise::default();
    let limits = limits();
    if let Ok((_, seen)) = unpack_blob(bytes, promise, &ingest, layer, &limits, &|_| {}) {
        assert_eq!(seen.size, bytes.len() as u64);
        assert_eq!(seen.digest, Digest::of(bytes));
    }
}

/// An archive of these files.
pub fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (name, bytes) in files {
        let mut block = [0; 512];
        block[..name.len()].copy_from_slice(name.as_bytes());
        block[100..107].copy_from_slice(b"0000644");
        block[124..135].copy_from_slice(format!("{:011o}", bytes.len()).as_bytes());
        block[156] = b'0';
        block[257..265].copy_from_slice(b"ustar\x0000");
        sum(&mut block);
        archive.extend(block);
        archive.extend(*bytes);
        archive.resize(archive.len().next_multiple_of(512), 0);
    }
    archive.resize(archive.len() + 1024, 0);
    archive
}

/// A document of an image, in each of the places where one can stand: as an index, a manifest, a
/// configuration, and the list of `docker save`.
pub fn check_manifest(bytes: &[u8]) {
    let digest = Digest::of(bytes);
    let blob = format!("blobs/sha256/{}", digest.hex());
    let descriptor = |kind: &str, digest: &Digest, size| {
        serde_json::json!({
            "mediaType": format!("application/vnd.oci.image.{kind}.v1+json"), "digest": digest, "size": size,
        })
    };
    let index = |digest: &Digest, size| {
        let manifest = descriptor("manifest", digest, size);
        serde_json::json!({ "schemaVersion": 2, "manifests": [manifest] }).to_string()
    };
    check_image(&[("index.json", bytes)]);
    let around = index(&digest, bytes.len());
    check_image(&[("index.json", around.as_bytes()), (&blob, bytes)]);
    let layer = serde_json::json!({
        "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": digest, "size": bytes.len(),
    });
    let manifest = serde_json::json!({
        "schemaVersion": 2, "config": descriptor("config", &digest, bytes.len()), "layers": [layer],
    });
    let manifest = manifest.to_string();
    let manifest_digest = Digest::of(manifest.as_bytes());
    let around = index(&manifest_digest, manifest.len());
    let manifest_blob = format!("blobs/sha256/{}", manifest_digest.hex());
    check_image(&[
        ("index.json", around.as_bytes()),
        (&manifest_blob, manifest.as_bytes()),
        (&blob, bytes),
    ]);
    check_image(&[("manifest.json", bytes), (&blob, bytes)]);
}

fn check_image(files: &[(&str, &[u8])]) {
    let archive = || -> std::io::Result<File> {
        let file = memfd_create("archive", MemfdFlags::CLOEXEC)?;
        let mut file = File::from(file);
        file.write_all(&tar(files))?;
        std::io::Seek::rewind(&mut file)?;
        Ok(file)
    };
    let limits = limits();
    let archive = archive().expect("a file in memory");
    let files = Files::of_archive(archive, &limits).expect("an archive");
    let files = files.expect("an archive of an image");
    let name: Reference = "a:t".parse().expect("a name");
    let platform: Platform = "linux/amd64".parse().expect("a platform");
    let Ok(found) = files.find_image(&name, platform, &limits) else {
        return;
    };
    assert!(found.layers.len() <= MAX_LAYERS);
    for layer in &found.layers {
        if let Ok(mut blob) = (layer.open)() {
            let mut bytes = Vec::new();
            let read = blob.read_to_end(&mut bytes);
            assert!(read.is_ok_and(|read| read as u64 <= limits.bytes));
        }
    }
}

/// The name of an image.
pub fn check_reference(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    let Ok(name) = text.parse::<Reference>() else {
        return;
    };
    // A complete name is its own completion, and has no way out.
    let full = name.to_string();
    assert_eq!(full.parse::<Reference>().as_ref(), Ok(&name));
    let parts = name.repository().split('/');
    for part in parts.chain(name.tag()) {
        assert!(!part.is_empty() && !part.starts_with('.'), "{full}");
        assert!(part.bytes().all(|byte| byte.is_ascii_graphic()), "{full}");
    }
    assert!(!name.registry().contains('/'), "{full}");
}
