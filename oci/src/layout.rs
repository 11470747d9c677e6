//! Images as documents and blobs: OCI layouts, as a directory or a tar archive of one, archives
//! of `docker save`, and documents of a registry.
//!
//! Nothing is taken on trust: every document and every blob is checked against the digest that
//! names it, and names that stand in documents are looked up in an index of the archive, never as
//! paths of this machine.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci_spec::image::{Descriptor, ImageConfiguration, ImageIndex, ImageManifest, MediaType};
use serde::de::DeserializeOwned;

use super::digest::Digest;
use super::layers::{Blob, Open};
use super::platform::Platform;
use super::reference::Reference;
use super::registry::{RegistryError, Repository};
use super::stream::{self, Promise, StreamError};
use super::tar::{Archive, Member, MemberKind, Seekable, TarError};
use super::{ImageConfig, Limits, Passed};

/// Most layers of one image.
pub const MAX_LAYERS: usize = 512;
/// Most manifests looked at, and deepest nesting of indexes, on the way to one.
const MAX_MANIFESTS: usize = 1024;
/// Most indexes read on the way to a manifest.
const MAX_INDEXES: usize = 64;
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
    /// A document that does not keep its name's promise.
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
        /// The expected form.
        what: &'static str,
        /// The cause.
        source: serde_json::Error,
    },
    /// A digest that cannot be verified.
    #[error("{name} names a blob by an invalid digest")]
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
        /// The expected form.
        what: &'static str,
    },
    /// The registry does not give it.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// Nothing for the platform that is asked for.
    #[error("no image for {wanted}, only for {}", available(.found))]
    Platform {
        /// The platform that is asked for.
        wanted: Platform,
        /// The platforms that are there.
        found: Vec<String>,
    },
    /// Several images, and none has the name that is asked for.
    #[error("several images, and none is named {wanted}: {}", .found.join(", "))]
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
    #[error("{0}")]
    Limit(Passed),
}

impl LayoutError {
    /// The exceeded limit, if that is the fault.
    pub fn passed(&self) -> Option<Passed> {
        match self {
            Self::Limit(passed)
            | Self::Blob {
                source: StreamError::Limit(passed),
                ..
            }
            | Self::Tar(TarError::Limit { passed, .. }) => Some(*passed),
            _ => None,
        }
    }
}

fn fixed(what: &'static str, limit: usize) -> LayoutError {
    LayoutError::Limit(Passed::fixed(what, limit as u64))
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
    /// A repository of a registry.
    Remote(Arc<Repository>),
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
    /// Its platform.
    pub platform: Platform,
    /// Its configuration.
    pub config: ImageConfig,
    /// Its layers, bottom first.
    pub layers: Vec<Blob<'f>>,
}

impl Files {
    /// The members of the tar archive `file`, if all of them can belong to an image; `None` where
    /// one cannot, so that the archive is something else.
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
                return Err(fixed(
                    "the number of files in the archive of an image",
                    MAX_MEMBERS,
                ));
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

    /// Finds the image that `name` stands for, built for `platform`.
    pub fn find_image(
        &self,
        name: &Reference,
        platform: Platform,
        limits: &Limits,
    ) -> Result<FoundImage<'_>, LayoutError> {
        if let Self::Remote(repository) = self {
            self.find_remote(repository, name, platform, limits)
        } else if self.has("manifest.json") && !self.has("index.json") {
            self.find_docker(name, platform, limits)
        } else {
            self.find_in_index(name, platform, limits)
        }
    }

    fn has(&self, name: &str) -> bool {
        match self {
            Self::Dir(dir) => dir.join(name).is_file(),
            Self::Archive(archive) => archive.members.contains_key(name.as_bytes()),
            Self::Remote(_) => false,
        }
    }

    /// Opens what is named by its digest. `media_type` says where a registry has it.
    fn open_blob(
        &self,
        digest: Digest,
        size: u64,
        media_type: &str,
    ) -> Result<Box<dyn Read + Send>, LayoutError> {
        match self {
            Self::Remote(repository) if is_manifest(media_type) || is_index(media_type) => {
                Ok(repository.manifest(&digest.to_string())?.0)
            }
            Self::Remote(repository) => Ok(repository.blob(digest, size)?),
            Self::Dir(_) | Self::Archive(_) => Ok(self.open(&blob_path(&digest))?.0),
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
            Self::Remote(_) => Err(LayoutError::Missing(name.to_owned())),
        }
    }

    fn document<T: DeserializeOwned>(
        &self,
        name: &str,
        promise: Promise,
        what: &'static str,
        limits: &Limits,
    ) -> Result<(T, Digest), LayoutError> {
        let (reader, _) = self.open(name)?;
        let bytes = read_document(reader, promise, name, limits)?;
        Ok((parse(&bytes, name, what)?, Digest::of(&bytes)))
    }

    fn blob<T: DeserializeOwned>(
        &self,
        descriptor: &Descriptor,
        what: &'static str,
        limits: &Limits,
    ) -> Result<(T, Digest), LayoutError> {
        let digest = digest_of(descriptor)?;
        let promise = Promise {
            digest: Some(digest),
            size: Some(descriptor.size()),
            diff_id: None,
        };
        let media_type = descriptor.media_type().to_string();
        let name = blob_path(&digest);
        if promise.size > Some(limits.document) {
            // Not even asked for.
            read_document(io::empty(), promise, &name, limits)?;
        }
        let reader = self.open_blob(digest, descriptor.size(), &media_type)?;
        let bytes = read_document(reader, promise, &name, limits)?;
        Ok((parse(&bytes, &name, what)?, digest))
    }

    fn find_in_index(
        &self,
        name: &Reference,
        platform: Platform,
        limits: &Limits,
    ) -> Result<FoundImage<'_>, LayoutError> {
        let (index, _): (ImageIndex, _) =
            self.document("index.json", Promise::default(), "image index", limits)?;
        let mut found = Collected::default();
        self.collect(&index, None, 0, &mut found, limits)?;
        let chosen = choose(found.candidates, Some(name), platform)?;
        let (manifest, digest): (ImageManifest, _) =
            self.blob(&chosen.descriptor, "image manifest", limits)?;
        self.of_manifest(&manifest, digest, platform, limits)
    }

    /// The digest of the name, else its tag, is asked for once. All else is named by digests.
    fn find_remote(
        &self,
        repository: &Repository,
        name: &Reference,
        platform: Platform,
        limits: &Limits,
    ) -> Result<FoundImage<'_>, LayoutError> {
        let asked = match (name.digest(), name.tag()) {
            (Some(digest), _) => digest.to_string(),
            (None, tag) => tag.unwrap_or(super::reference::DEFAULT_TAG).to_owned(),
        };
        let document = format!("the manifest of {name}");
        let promise = Promise {
            digest: name.digest().copied(),
            ..Promise::default()
        };
        let (reader, header) = repository.manifest(&asked)?;
        let bytes = read_document(reader, promise, &document, limits)?;
        let digest = Digest::of(&bytes);
        let top: Top = parse(&bytes, &document, "image manifest")?;
        let media_type = match (top.media_type.or(header), top.manifests) {
            (Some(media_type), _) if is_index(&media_type) || is_manifest(&media_type) => {
                media_type
            }
            // Registries that serve files as they lie there know no better; the document shows what
            // it is.
            (Some(media_type), _) if media_type.starts_with("application/vnd.") => media_type,
            (_, Some(_)) => MediaType::ImageIndex.to_string(),
            (_, None) => MediaType::ImageManifest.to_string(),
        };
        if is_manifest(&media_type) {
            let manifest = parse(&bytes, &document, "image manifest")?;
            return self.of_manifest(&manifest, digest, platform, limits);
        }
        if !is_index(&media_type) {
            return Err(LayoutError::MediaType {
                name: document,
                media_type,
                what: "an image or an index of images",
            });
        }
        let index = parse(&bytes, &document, "image index")?;
        let mut found = Collected::default();
        self.collect(&index, None, 0, &mut found, limits)?;
        let chosen = choose(found.candidates, None, platform)?;
        let (manifest, digest): (ImageManifest, _) =
            self.blob(&chosen.descriptor, "image manifest", limits)?;
        self.of_manifest(&manifest, digest, platform, limits)
    }

    fn of_manifest(
        &self,
        manifest: &ImageManifest,
        digest: Digest,
        platform: Platform,
        limits: &Limits,
    ) -> Result<FoundImage<'_>, LayoutError> {
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
            self.blob(config, "image configuration", limits)?;
        check_platform(&config, platform)?;
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
            let size = descriptor.size();
            let open: Open<'_> = Box::new(move || Ok(self.open_blob(digest, size, LAYER)?));
            layers.push(Blob {
                name: digest.to_string(),
                diff_id,
                digest: Some(digest),
                size,
                open,
            });
        }
        Ok(FoundImage {
            digest,
            platform,
            config: image_config(&config),
            layers,
        })
    }

    fn collect(
        &self,
        index: &ImageIndex,
        name: Option<&str>,
        depth: usize,
        found: &mut Collected,
        limits: &Limits,
    ) -> Result<(), LayoutError> {
        found.indexes += 1;
        if found.indexes > MAX_INDEXES {
            return Err(fixed("the number of image indexes", MAX_INDEXES));
        }
        if depth >= MAX_INDEX_DEPTH {
            return Err(fixed("the nesting of image indexes", MAX_INDEX_DEPTH));
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
            let media_type = descriptor.media_type().as_ref();
            if is_index(media_type) {
                let (nested, _): (ImageIndex, _) = self.blob(descriptor, "image index", limits)?;
                self.collect(&nested, name, depth + 1, found, limits)?;
            } else if is_manifest(media_type) {
                if found.candidates.len() >= MAX_MANIFESTS {
                    return Err(fixed("the number of manifests", MAX_MANIFESTS));
                }
                found.candidates.push(Candidate {
                    descriptor: descriptor.clone(),
                    name: name.map(str::to_owned),
                });
            }
        }
        Ok(())
    }

    /// The older format of `docker save`, and podman's `docker-archive`.
    fn find_docker(
        &self,
        name: &Reference,
        platform: Platform,
        limits: &Limits,
    ) -> Result<FoundImage<'_>, LayoutError> {
        let (images, _): (Vec<DockerImage>, _) = self.document(
            "manifest.json",
            Promise::default(),
            "list of saved images",
            limits,
        )?;
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
            self.document(&image.config, promise, "image configuration", limits)?;
        check_platform(&config, platform)?;
        let diff_ids = diff_ids(&config, &image.config, image.layers.len())?;
        let mut layers = Vec::new();
        for (member, diff_id) in image.layers.iter().zip(diff_ids) {
            let (_, size) = self.open(member)?;
            let (blob, name) = (member.clone(), member.clone());
            layers.push(Blob {
                name,
                diff_id,
                digest: None,
                size,
                open: Box::new(move || Ok(self.open(&blob)?.0)),
            });
        }
        Ok(FoundImage {
            digest,
            platform,
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

/// The entries of an index.
#[derive(Default)]
struct Collected {
    candidates: Vec<Candidate>,
    indexes: usize,
}

struct Candidate {
    descriptor: Descriptor,
    name: Option<String>,
}

/// The common part of a manifest and an index, enough to tell them apart.
#[derive(serde::Deserialize)]
#[serde(rename_all = "camelCase")]
struct Top {
    media_type: Option<String>,
    manifests: Option<serde::de::IgnoredAny>,
}

fn read_document(
    reader: impl Read,
    promise: Promise,
    name: &str,
    limits: &Limits,
) -> Result<Vec<u8>, LayoutError> {
    stream::read_document(reader, promise, limits).map_err(|source| LayoutError::Blob {
        name: name.to_owned(),
        source,
    })
}

fn parse<T: DeserializeOwned>(
    bytes: &[u8],
    name: &str,
    what: &'static str,
) -> Result<T, LayoutError> {
    serde_json::from_slice(bytes).map_err(|source| LayoutError::Json {
        name: name.to_owned(),
        what,
        source,
    })
}

fn check_platform(config: &ImageConfiguration, wanted: Platform) -> Result<(), LayoutError> {
    if wanted.is(config.os(), config.architecture()) {
        return Ok(());
    }
    Err(LayoutError::Platform {
        wanted,
        found: vec![format!("{}/{}", config.os(), config.architecture())],
    })
}

/// The manifest for `platform`; among several, the one that has the name that is asked for, or the
/// first if none is.
fn choose(
    candidates: Vec<Candidate>,
    name: Option<&Reference>,
    platform: Platform,
) -> Result<Candidate, LayoutError> {
    let stated = |candidate: &Candidate| candidate.descriptor.platform().clone();
    let found: Vec<String> = candidates
        .iter()
        .filter_map(stated)
        .map(|stated| format!("{}/{}", stated.os(), stated.architecture()))
        .collect();
    // The platform of one without it is read from its configuration later.
    let fits = |candidate: &Candidate| {
        stated(candidate).is_none_or(|stated| platform.is(stated.os(), stated.architecture()))
    };
    let (sure, unsure): (Vec<_>, Vec<_>) = candidates
        .into_iter()
        .filter(fits)
        .partition(|candidate| stated(candidate).is_some());
    let mut fitting = if sure.is_empty() { unsure } else { sure };
    fitting.dedup_by(|a, b| a.descriptor.digest() == b.descriptor.digest());
    match name {
        Some(name) if fitting.len() > 1 => {
            let names: Vec<String> = fitting.iter().filter_map(|one| one.name.clone()).collect();
            fitting.retain(|one| one.name.as_deref().is_some_and(|text| is_named(text, name)));
            if fitting.len() != 1 {
                return Err(LayoutError::Several {
                    wanted: name.to_string(),
                    found: names,
                });
            }
        }
        _ => fitting.truncate(1),
    }
    fitting.pop().ok_or(LayoutError::Platform {
        wanted: platform,
        found,
    })
}

/// An annotation has the whole name, or the tag alone.
fn is_named(text: &str, name: &Reference) -> bool {
    name.tag() == Some(text) || text.parse().is_ok_and(|parsed: Reference| parsed == *name)
}

const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

fn is_index(media_type: &str) -> bool {
    matches!(
        media_type,
        "application/vnd.oci.image.index.v1+json"
            | "application/vnd.docker.distribution.manifest.list.v2+json"
    )
}

fn is_manifest(media_type: &str) -> bool {
    matches!(
        media_type,
        "application/vnd.oci.image.manifest.v1+json"
            | "application/vnd.docker.distribution.manifest.v2+json"
    )
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
        return Err(fixed("the number of layers", MAX_LAYERS));
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

/// Target of a link in the archive, from the root of the archive.
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
