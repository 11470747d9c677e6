//! Images as files: OCI layouts, as a directory or a tar archive of one, and what `docker save` writes.
//!
//! Nothing is taken on trust: every document and every blob is checked against the digest that names it, and names that
//! stand in documents are looked up in an index of the archive, never as paths of this machine.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci_spec::image::{
    Arch, Descriptor, ImageConfiguration, ImageIndex, ImageManifest, MediaType, Os, Platform,
};
use serde::de::DeserializeOwned;

use super::digest::Digest;
use super::layers::Blob;
use super::reference::Reference;
use super::stream::{self, Promise, StreamError};
use super::tar::{Archive, Member, MemberKind, Seekable, TarError};
use super::{ImageConfig, ImageError, Limits};

/// Longest index, manifest or configuration, in bytes.
pub const MAX_DOCUMENT: u64 = 4 << 20;
/// Most layers of one image.
pub const MAX_LAYERS: usize = 512;
/// Most manifests looked at, and deepest nesting of indexes, on the way to one.
const MAX_MANIFESTS: usize = 1024;
const MAX_INDEX_DEPTH: usize = 4;
/// Most members of an archive of an image.
const MAX_MEMBERS: usize = 16 << 10;
/// Symlinks among the members of an archive followed for one name.
const MAX_ALIASES: usize = 8;

/// Why an OCI layout or an archive of an image cannot be imported.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// A file that must be there is not.
    #[error("{0} is missing")]
    Missing(String),
    /// A file could not be read.
    #[error("reading {name} failed")]
    Read {
        /// Its name in the layout.
        name: String,
        /// The cause.
        source: io::Error,
    },
    /// The archive could not be read.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// A document that is not what its name promises.
    #[error("{name} is not valid")]
    Blob {
        /// Its name in the layout.
        name: String,
        /// The cause.
        source: StreamError,
    },
    /// A document that does not parse.
    #[error("{name} is not a valid {what}")]
    Json {
        /// Its name in the layout.
        name: String,
        /// What it should be.
        what: &'static str,
        /// The cause.
        source: serde_json::Error,
    },
    /// A digest that cannot be verified.
    #[error("{name} names a blob by what is not a digest")]
    Digest {
        /// The document.
        name: String,
        /// The cause.
        source: super::digest::ParseDigestError,
    },
    /// Of an unknown media type, or of one that is no image.
    #[error("{name} is of type {media_type:?}, which is not {what}")]
    MediaType {
        /// The blob.
        name: String,
        /// Its media type.
        media_type: String,
        /// What it should be.
        what: &'static str,
    },
    /// Nothing for this machine.
    #[error("there is no image for {wanted}, only for {}", available(.found))]
    Platform {
        /// This machine's platform.
        wanted: String,
        /// The platforms that are there.
        found: Vec<String>,
    },
    /// Several images, and none has the name that is asked for.
    #[error("there are several images and none is named {wanted}: {}", .found.join(", "))]
    Several {
        /// The name under which the image is imported.
        wanted: String,
        /// The names that are there.
        found: Vec<String>,
    },
    /// The manifest and the configuration do not agree.
    #[error("the manifest has {layers} layers and the configuration {diff_ids} diff ids")]
    LayerCount {
        /// Layers in the manifest.
        layers: usize,
        /// Diff ids in the configuration.
        diff_ids: usize,
    },
    /// More than this program accepts.
    #[error("{what} is over the limit of {limit}")]
    Limit {
        /// What is too large.
        what: &'static str,
        /// The limit.
        limit: usize,
    },
}

fn available(found: &[String]) -> String {
    if found.is_empty() {
        "nothing that is an image".to_owned()
    } else {
        found.join(", ")
    }
}

/// Where blobs and documents are found by their names.
pub enum Files {
    /// The directory of an OCI layout.
    Dir(PathBuf),
    /// A tar archive of an OCI layout or of `docker save`.
    Archive(ArchiveFiles),
}

/// The members of an archive, where they lie in it.
pub struct ArchiveFiles {
    file: Arc<File>,
    members: HashMap<Vec<u8>, Place>,
}

enum Place {
    File { offset: u64, size: u64 },
    Alias(Vec<u8>),
}

/// An image that can be imported.
pub struct FoundImage<'f> {
    /// Digest of its manifest; of its configuration where there is no manifest.
    pub digest: Digest,
    /// What it says about running it.
    pub config: ImageConfig,
    /// Its layers, bottom first.
    pub layers: Vec<Blob<'f>>,
}

impl Files {
    /// The members of the tar archive `file`, if all of them can belong to an image; `None` where one cannot, so that the
    /// archive is something else.
    pub fn of_archive(file: File, limits: &Limits) -> Result<Option<Self>, LayoutError> {
        let mut members = HashMap::new();
        let name = || "the archive".to_owned();
        let length = file
            .metadata()
            .map_err(|source| LayoutError::Read {
                name: name(),
                source,
            })?
            .len();
        let mut archive = Archive::new(Seekable(BufReader::new(&file)), limits);
        while let Some(member) = archive.next_member()? {
            let Some(path) = image_path(&member) else {
                return Ok(None);
            };
            let place = match member.kind {
                MemberKind::File => Place::File {
                    offset: archive.offset(),
                    size: member.size,
                },
                MemberKind::Symlink => Place::Alias(alias(&path, &member.link)),
                MemberKind::Hardlink => Place::Alias(alias(b"", &member.link)),
                _ => continue,
            };
            if let Place::File { offset, size } = place
                && offset.checked_add(size).is_none_or(|end| end > length)
            {
                return Err(TarError::Truncated {
                    offset: length,
                    entry: member.name(),
                }
                .into());
            }
            if members.len() >= MAX_MEMBERS {
                return Err(LayoutError::Limit {
                    what: "the number of files in the archive of an image",
                    limit: MAX_MEMBERS,
                });
            }
            members.insert(path, place);
        }
        let is_image =
            members.contains_key(&b"index.json"[..]) || members.contains_key(&b"manifest.json"[..]);
        drop(archive);
        Ok(is_image.then(|| {
            Self::Archive(ArchiveFiles {
                file: Arc::new(file),
                members,
            })
        }))
    }

    /// Finds the image that `name` stands for, built for this machine.
    pub fn find_image(&self, name: &Reference) -> Result<FoundImage<'_>, LayoutError> {
        if self.has("manifest.json") && !self.has("index.json") {
            self.find_docker(name)
        } else {
            self.find_in_index(name)
        }
    }

    fn has(&self, name: &str) -> bool {
        match self {
            Self::Dir(dir) => dir.join(name).is_file(),
            Self::Archive(archive) => archive.members.contains_key(name.as_bytes()),
        }
    }

    /// Opens a file and says how long it is.
    fn open(&self, name: &str) -> Result<(Box<dyn Read + Send>, u64), LayoutError> {
        let failed = |source: io::Error| {
            if source.kind() == io::ErrorKind::NotFound {
                LayoutError::Missing(name.to_owned())
            } else {
                let name = name.to_owned();
                LayoutError::Read { name, source }
            }
        };
        match self {
            Self::Dir(dir) => {
                let (file, size) = open_regular(&dir.join(name)).map_err(failed)?;
                Ok((Box::new(file), size))
            }
            Self::Archive(archive) => archive
                .open(name)
                .ok_or_else(|| LayoutError::Missing(name.to_owned())),
        }
    }

    fn document<T: DeserializeOwned>(
        &self,
        name: &str,
        promise: Promise,
        what: &'static str,
    ) -> Result<(T, Digest), LayoutError> {
        let (reader, _) = self.open(name)?;
        let bytes = stream::read_small(reader, promise, MAX_DOCUMENT).map_err(|source| {
            LayoutError::Blob {
                name: name.to_owned(),
                source,
            }
        })?;
        let parsed = serde_json::from_slice(&bytes).map_err(|source| LayoutError::Json {
            name: name.to_owned(),
            what,
            source,
        })?;
        Ok((parsed, Digest::of(&bytes)))
    }

    fn blob<T: DeserializeOwned>(
        &self,
        descriptor: &Descriptor,
        what: &'static str,
    ) -> Result<(T, Digest), LayoutError> {
        let digest = digest_of(descriptor)?;
        let promise = Promise {
            digest: Some(digest),
            size: Some(descriptor.size()),
            diff_id: None,
        };
        self.document(&blob_path(&digest), promise, what)
    }

    fn find_in_index(&self, name: &Reference) -> Result<FoundImage<'_>, LayoutError> {
        let (index, _): (ImageIndex, _) =
            self.document("index.json", Promise::default(), "image index")?;
        let mut candidates = Vec::new();
        self.collect(&index, None, 0, &mut candidates)?;
        let chosen = choose(candidates, name)?;
        let (manifest, digest): (ImageManifest, _) =
            self.blob(&chosen.descriptor, "image manifest")?;
        let manifest_name = || blob_path(&digest);
        let config = manifest.config();
        if !is_config(config.media_type()) {
            return Err(LayoutError::MediaType {
                name: manifest_name(),
                media_type: config.media_type().to_string(),
                what: "the configuration of an image",
            });
        }
        let (config, config_digest): (ImageConfiguration, _) =
            self.blob(config, "image configuration")?;
        check_platform(&config)?;
        let diff_ids = diff_ids(&config, &blob_path(&config_digest), manifest.layers().len())?;
        let mut layers = Vec::new();
        for (descriptor, diff_id) in manifest.layers().iter().zip(diff_ids) {
            if !is_layer(descriptor.media_type()) {
                return Err(LayoutError::MediaType {
                    name: manifest_name(),
                    media_type: descriptor.media_type().to_string(),
                    what: "a layer of an image",
                });
            }
            let digest = digest_of(descriptor)?;
            layers.push(Blob {
                name: digest.to_string(),
                diff_id,
                digest: Some(digest),
                size: descriptor.size(),
                open: self.opener(blob_path(&digest)),
            });
        }
        Ok(FoundImage {
            digest,
            config: image_config(&config),
            layers,
        })
    }

    fn opener(
        &self,
        name: String,
    ) -> Box<dyn Fn() -> Result<Box<dyn Read + Send>, ImageError> + '_> {
        Box::new(move || Ok(self.open(&name)?.0))
    }

    fn collect(
        &self,
        index: &ImageIndex,
        name: Option<&str>,
        depth: usize,
        candidates: &mut Vec<Candidate>,
    ) -> Result<(), LayoutError> {
        if depth >= MAX_INDEX_DEPTH {
            return Err(LayoutError::Limit {
                what: "the nesting of image indexes",
                limit: MAX_INDEX_DEPTH,
            });
        }
        for descriptor in index.manifests() {
            let annotation = |key| {
                descriptor
                    .annotations()
                    .as_ref()?
                    .get(key)
                    .map(String::as_str)
            };
            if annotation("vnd.docker.reference.type").is_some() {
                continue;
            }
            let name = annotation("io.containerd.image.name")
                .or_else(|| annotation("org.opencontainers.image.ref.name"))
                .or(name);
            match descriptor.media_type().as_ref() {
                "application/vnd.oci.image.index.v1+json"
                | "application/vnd.docker.distribution.manifest.list.v2+json" => {
                    let (nested, _): (ImageIndex, _) = self.blob(descriptor, "image index")?;
                    self.collect(&nested, name, depth + 1, candidates)?;
                }
                "application/vnd.oci.image.manifest.v1+json"
                | "application/vnd.docker.distribution.manifest.v2+json" => {
                    if candidates.len() >= MAX_MANIFESTS {
                        return Err(LayoutError::Limit {
                            what: "the number of manifests",
                            limit: MAX_MANIFESTS,
                        });
                    }
                    candidates.push(Candidate {
                        descriptor: descriptor.clone(),
                        name: name.map(str::to_owned),
                    });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// What `docker save` wrote before it wrote OCI layouts, and podman's `docker-archive`.
    fn find_docker(&self, name: &Reference) -> Result<FoundImage<'_>, LayoutError> {
        let (images, _): (Vec<DockerImage>, _) =
            self.document("manifest.json", Promise::default(), "list of saved images")?;
        let named = |image: &&DockerImage| {
            let tags = image.repo_tags.iter().flatten();
            tags.filter_map(|tag| tag.parse().ok())
                .any(|tag: Reference| tag == *name)
        };
        let image = match images.as_slice() {
            [] => return Err(LayoutError::Missing("an image in manifest.json".to_owned())),
            [only] => only,
            several => several
                .iter()
                .find(named)
                .ok_or_else(|| LayoutError::Several {
                    wanted: name.to_string(),
                    found: several
                        .iter()
                        .flat_map(|i| i.repo_tags.iter().flatten().cloned())
                        .collect(),
                })?,
        };
        // The configuration is named by its digest.
        let stem = image.config.rsplit('/').next().unwrap_or_default();
        let promise = Promise {
            digest: format!("sha256:{}", stem.trim_end_matches(".json"))
                .parse()
                .ok(),
            ..Promise::default()
        };
        let (config, digest): (ImageConfiguration, _) =
            self.document(&image.config, promise, "image configuration")?;
        check_platform(&config)?;
        let diff_ids = diff_ids(&config, &image.config, image.layers.len())?;
        let mut layers = Vec::new();
        for (member, diff_id) in image.layers.iter().zip(diff_ids) {
            let (_, size) = self.open(member)?;
            layers.push(Blob {
                name: member.clone(),
                diff_id,
                digest: None,
                size,
                open: self.opener(member.clone()),
            });
        }
        Ok(FoundImage {
            digest,
            config: image_config(&config),
            layers,
        })
    }
}

impl ArchiveFiles {
    fn open(&self, name: &str) -> Option<(Box<dyn Read + Send>, u64)> {
        let mut name = name.as_bytes();
        for _ in 0..MAX_ALIASES {
            match self.members.get(name)? {
                Place::Alias(target) => name = target,
                Place::File { offset, size } => {
                    let part = Part {
                        file: Arc::clone(&self.file),
                        offset: *offset,
                        left: *size,
                    };
                    return Some((Box::new(part), *size));
                }
            }
        }
        None
    }
}

/// A stretch of a file.
struct Part {
    file: Arc<File>,
    offset: u64,
    left: u64,
}

impl Read for Part {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let want = buf
            .len()
            .min(usize::try_from(self.left).unwrap_or(buf.len()));
        let got = self.file.read_at(&mut buf[..want], self.offset)?;
        self.offset += got as u64;
        self.left -= got as u64;
        Ok(got)
    }
}

/// Opens a file for reading, and nothing that blocks or has no length.
pub fn open_regular(path: &Path) -> io::Result<(File, u64)> {
    let file = File::options()
        .read(true)
        .custom_flags(rustix::fs::OFlags::NONBLOCK.bits() as i32)
        .open(path)?;
    let metadata = file.metadata()?;
    if metadata.is_file() {
        Ok((file, metadata.len()))
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a regular file",
        ))
    }
}

#[derive(serde::Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

struct Candidate {
    descriptor: Descriptor,
    name: Option<String>,
}

/// The platform of this machine, as OCI calls it.
fn host() -> (Os, Arch) {
    // What runs in a sandbox is Linux on any host.
    (
        Os::Linux,
        Arch::from(match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        }),
    )
}

fn platform_name(os: &Os, arch: &Arch) -> String {
    format!("{os}/{arch}")
}

fn fits(platform: &Platform) -> bool {
    let (os, arch) = host();
    *platform.os() == os && *platform.architecture() == arch
}

fn check_platform(config: &ImageConfiguration) -> Result<(), LayoutError> {
    let (os, arch) = host();
    if *config.os() == os && *config.architecture() == arch {
        return Ok(());
    }
    Err(LayoutError::Platform {
        wanted: platform_name(&os, &arch),
        found: vec![platform_name(config.os(), config.architecture())],
    })
}

/// The manifest for this machine; among several, the one that has the name that is asked for.
fn choose(candidates: Vec<Candidate>, name: &Reference) -> Result<Candidate, LayoutError> {
    let platform_of = |candidate: &Candidate| candidate.descriptor.platform().clone();
    let found: Vec<String> = candidates
        .iter()
        .filter_map(platform_of)
        .map(|platform| platform_name(platform.os(), platform.architecture()))
        .collect();
    // One that does not say what it is for is asked again when its configuration is read.
    let (stated, unstated): (Vec<_>, Vec<_>) = candidates
        .into_iter()
        .filter(|candidate| platform_of(candidate).is_none_or(|platform| fits(&platform)))
        .partition(|candidate| platform_of(candidate).is_some());
    let mut fitting = if stated.is_empty() { unstated } else { stated };
    fitting.dedup_by(|a, b| a.descriptor.digest() == b.descriptor.digest());
    if fitting.len() > 1 {
        let names: Vec<String> = fitting.iter().filter_map(|one| one.name.clone()).collect();
        fitting.retain(|one| one.name.as_deref().is_some_and(|text| is_named(text, name)));
        if fitting.len() != 1 {
            return Err(LayoutError::Several {
                wanted: name.to_string(),
                found: names,
            });
        }
    }
    fitting.pop().ok_or_else(|| {
        let (os, arch) = host();
        LayoutError::Platform {
            wanted: platform_name(&os, &arch),
            found,
        }
    })
}

/// An annotation has the whole name, or the tag alone.
fn is_named(text: &str, name: &Reference) -> bool {
    name.tag() == Some(text) || text.parse().is_ok_and(|parsed: Reference| parsed == *name)
}

fn is_config(media_type: &MediaType) -> bool {
    matches!(
        media_type.as_ref(),
        "application/vnd.oci.image.config.v1+json"
            | "application/vnd.docker.container.image.v1+json"
    )
}

fn is_layer(media_type: &MediaType) -> bool {
    matches!(
        media_type.as_ref(),
        "application/vnd.oci.image.layer.v1.tar"
            | "application/vnd.oci.image.layer.v1.tar+gzip"
            | "application/vnd.oci.image.layer.v1.tar+zstd"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd"
            | "application/vnd.docker.image.rootfs.diff.tar"
            | "application/vnd.docker.image.rootfs.diff.tar.gzip"
            | "application/vnd.docker.image.rootfs.diff.tar.zstd"
            | "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
    )
}

fn digest_of(descriptor: &Descriptor) -> Result<Digest, LayoutError> {
    let text = descriptor.digest().to_string();
    text.parse().map_err(|source| LayoutError::Digest {
        name: format!("a descriptor of {}", descriptor.media_type()),
        source,
    })
}

fn blob_path(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn diff_ids(
    config: &ImageConfiguration,
    name: &str,
    layers: usize,
) -> Result<Vec<Digest>, LayoutError> {
    let texts = config.rootfs().diff_ids();
    if texts.len() != layers {
        return Err(LayoutError::LayerCount {
            layers,
            diff_ids: texts.len(),
        });
    }
    if layers > MAX_LAYERS {
        return Err(LayoutError::Limit {
            what: "the number of layers",
            limit: MAX_LAYERS,
        });
    }
    let parse = |text: &String| {
        text.parse().map_err(|source| LayoutError::Digest {
            name: name.to_owned(),
            source,
        })
    };
    texts.iter().map(parse).collect()
}

fn image_config(config: &ImageConfiguration) -> ImageConfig {
    let Some(config) = config.config() else {
        return ImageConfig::default();
    };
    ImageConfig {
        env: config.env().clone().unwrap_or_default(),
        user: config.user().clone().unwrap_or_default(),
        working_dir: config.working_dir().clone().unwrap_or_default(),
        entrypoint: config.entrypoint().clone().unwrap_or_default(),
        cmd: config.cmd().clone().unwrap_or_default(),
    }
}

/// Whether the first member of an archive can belong to the archive of an image.
pub fn begins_like_image(plain: &mut dyn Read, limits: &Limits) -> bool {
    let mut archive = Archive::new(plain, limits);
    loop {
        match archive.next_member() {
            // The root says nothing.
            Ok(Some(member)) => match image_path(&member) {
                Some(path) if path.is_empty() => {}
                path => return path.is_some(),
            },
            Ok(None) | Err(_) => return false,
        }
    }
}

/// The name of a member that can belong to the archive of an image.
fn image_path(member: &Member) -> Option<Vec<u8>> {
    let parts: Vec<&[u8]> = iii_store::tree::components(&member.path)
        .filter(|part| *part != b".")
        .collect();
    let top = match parts.first() {
        Some(top) => *top,
        None => return Some(Vec::new()),
    };
    let documents = [
        &b"index.json"[..],
        b"oci-layout",
        b"manifest.json",
        b"repositories",
        b"blobs",
    ];
    let stem = top
        .strip_suffix(b".json")
        .or_else(|| top.strip_suffix(b".tar"))
        .unwrap_or(top);
    let is_id = stem.len() == 64 && stem.iter().all(u8::is_ascii_hexdigit);
    (documents.contains(&top) || is_id).then(|| parts.join(&b'/'))
}

/// What a link in the archive stands for, seen from the root of the archive.
fn alias(path: &[u8], link: &[u8]) -> Vec<u8> {
    let mut parts: Vec<&[u8]> = iii_store::tree::components(path).collect();
    parts.pop();
    for part in iii_store::tree::components(link) {
        match part {
            b"." => {}
            b".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join(&b'/')
}
