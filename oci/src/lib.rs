//! Base images: from a registry, a directory, an archive or an OCI layout into the store, under the
//! name of an image.
//!
//! An image is a ref of the store: its layers, bottom first, and its configuration.
//! Importing or pulling under a name that is taken replaces the image of that name in one step;
//! a failure leaves no trace except complete layers, which need not be read again. A tag is
//! resolved by a pull, and stands for that image until the next pull.
//!
//! [`stream`] reads blobs and verifies them, [`unpack`] makes trees of archives, [`layers`] keeps
//! what the store has already from being unpacked again; [`layout`] finds images in documents, and
//! [`registry`] brings these from afar. [`limits`] bounds everything that a stranger can make
//! large.

#![forbid(unsafe_code)]
#![warn(clippy::print_stdout, clippy::print_stderr)]
#![cfg_attr(test, allow(clippy::disallowed_methods))]

pub mod digest;
pub mod export;
pub mod layers;
pub mod layout;
pub mod limits;
pub mod platform;
pub mod reference;
pub mod registry;
pub mod rootfs;
pub mod stream;
pub mod tar;
mod text;
pub mod unpack;
pub mod utc;

use std::fs::File;
use std::io::{self, Seek};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use iii_store::{LayerId, Lease, Ref, RefKind, Store, StoreError};
use serde::{Deserialize, Serialize};

pub use digest::Digest;
pub use layers::LayerError;
pub use layout::LayoutError;
pub use limits::{Limit, Limits, Passed};
pub use platform::Platform;
pub use reference::{Reference, ReferenceError};
pub use registry::{RegistryError, Settings, Variables};
pub use rootfs::RootfsError;

use layers::Realised;
use layout::Files;
use stream::{Promise, StreamError};
use unpack::Dialect;

/// Configuration of an image. All empty for a root filesystem that never was an image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ImageConfig {
    /// `NAME=value` each.
    pub env: Vec<String>,
    /// `USER`, `UID`, `USER:GROUP` or `UID:GID`; empty for root.
    pub user: String,
    /// Empty for `/`.
    pub working_dir: String,
    /// The first words of the command.
    pub entrypoint: Vec<String>,
    /// The rest of the command, if no other is given.
    pub cmd: Vec<String>,
}

/// Source of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// A directory with a root filesystem.
    RootfsDir,
    /// A tar archive of a root filesystem.
    RootfsTar,
    /// An OCI layout, or the archive of an image.
    OciLayout,
    /// A registry.
    Registry,
}

/// An image in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Its complete name.
    #[serde(default)]
    pub name: String,
    /// Its layers, bottom first.
    #[serde(default)]
    pub layers: Vec<LayerId>,
    /// Digest of its manifest. Without one: of its configuration, or of the plain archive. None for
    /// a directory.
    pub digest: Option<Digest>,
    /// Its configuration.
    pub config: ImageConfig,
    /// Its source.
    pub origin: Origin,
    /// Its platform, where that is known.
    #[serde(default)]
    pub platform: Option<Platform>,
    /// When, in seconds since 1970.
    pub imported_at: u64,
    /// Sum of the sizes of the files in its layers.
    pub size: u64,
}

/// An image that was imported or pulled.
#[derive(Debug, Clone)]
pub struct Imported {
    /// The image.
    pub image: Image,
    /// Objects that the store did not have before.
    pub new_files: u64,
    /// Their bytes.
    pub new_bytes: u64,
    /// How long it took.
    pub elapsed: Duration,
}

/// Callback for events, from any thread.
pub type Progress<'a> = dyn Fn(Event<'_>) + Sync + 'a;

/// Events of an import or a pull. Layers are read at the same time, in any order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event<'a> {
    /// The store has a layer: nothing is read.
    Found {
        /// From 0.
        index: usize,
        /// How many there are.
        count: usize,
    },
    /// A layer begins, or begins again.
    Layer {
        /// From 0.
        index: usize,
        /// How many there are.
        count: usize,
        /// Bytes to be read for it.
        bytes: u64,
    },
    /// How much of a layer has been read.
    Read {
        /// Which layer.
        index: usize,
        /// Since its beginning.
        bytes: u64,
    },
    /// A layer is in the store.
    Stored {
        /// Which layer.
        index: usize,
    },
    /// Another process is importing the same layer; this one waits for it.
    Waiting,
    /// Something of a directory was left out.
    LeftOut {
        /// What.
        path: &'a Path,
        /// Why.
        why: &'static str,
    },
}

/// Why an image cannot be imported, listed or found.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Not the name of an image.
    #[error(transparent)]
    Name(#[from] ReferenceError),
    /// The pull from its registry failed.
    #[error("pulling {name} failed")]
    Pull {
        /// Its complete name.
        name: String,
        /// The cause.
        source: Box<ImageError>,
    },
    /// The registry cannot be asked.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// A file or directory could not be read.
    #[error("{op} {} failed", path.display())]
    Io {
        /// The operation.
        op: &'static str,
        /// Path of the object.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Nothing that can be imported.
    #[error(
        "{} is no image: expected an OCI layout, an archive of an image, or a root filesystem as a directory or a tar \
         archive (plain, gzip or zstd); {why}",
        path.display()
    )]
    NotAnImage {
        /// Path of the input.
        path: PathBuf,
        /// The fault.
        why: &'static str,
    },
    /// The name has a digest that the image does not have.
    #[error("{name} names an image by its digest, but this one has {}", actual.map_or_else(|| "none".to_owned(), |d| d.to_string()))]
    Pinned {
        /// The name.
        name: String,
        /// The digest of the input.
        actual: Option<Digest>,
    },
    /// The input is not valid.
    #[error("importing {} failed", path.display())]
    Import {
        /// Path of the input.
        path: PathBuf,
        /// The cause.
        source: Box<ImageError>,
    },
    /// The layout or archive of an image is not right.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// A layer is not right.
    #[error("layer {blob} cannot be used")]
    Layer {
        /// The layer's digest, or its name in the archive.
        blob: String,
        /// The cause.
        source: LayerError,
    },
    /// The archive of a root filesystem is not right.
    #[error("the archive cannot be unpacked")]
    Archive(#[source] LayerError),
    /// The directory cannot be taken.
    #[error(transparent)]
    Rootfs(#[from] RootfsError),
    /// The stored record of an image does not parse.
    #[error("the stored record of the image {name} does not parse; import it again")]
    Info {
        /// The image's name.
        name: String,
        /// The cause.
        source: serde_json::Error,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl ImageError {
    /// The exceeded limit, if that is the fault.
    pub fn passed(&self) -> Option<Passed> {
        match self {
            Self::Pull { source, .. } | Self::Import { source, .. } => source.passed(),
            Self::Layout(error) => error.passed(),
            Self::Layer { source, .. } | Self::Archive(source) => source.passed(),
            Self::Rootfs(RootfsError::Limit { passed, .. }) => Some(*passed),
            _ => None,
        }
    }
}

/// Imports `path` into the store as the image `name`, in place of an earlier one of that name.
///
/// `path` is a directory with a root filesystem, a tar archive of one, the directory of an OCI
/// layout, or a tar archive of an image; archives may be compressed with gzip or zstd. Which it is
/// is found out by looking. When this returns, the image is durable; when it fails, nothing has
/// changed.
pub fn import(
    store: &Store,
    path: &Path,
    name: &str,
    limits: &Limits,
    progress: &Progress<'_>,
) -> Result<Imported, ImageError> {
    let start = Instant::now();
    let name: Reference = name.parse()?;
    let lease = store.lease("import of an image")?;
    let importer = Importer {
        store,
        lease: &lease,
        limits,
        progress,
    };
    let content = importer.content(path, &name)?;
    if let Some(expected) = name.digest()
        && content.digest.as_ref() != Some(expected)
    {
        return Err(ImageError::Pinned {
            name: name.to_string(),
            actual: content.digest,
        });
    }
    finish(store, &name, content, start)
}

/// Brings the image `name`, built for `platform`, from its registry into the store, in place of
/// an earlier one of that name.
///
/// A tag is resolved anew; a digest in the name is requested and verified. Layers that the store
/// has are not downloaded, and those that were whole when an earlier pull ended are in the store.
/// When this returns, the image is durable; when it fails, the name stands for the image that it
/// stood for.
pub fn pull(
    store: &Store,
    name: &str,
    platform: Platform,
    settings: &Settings,
    limits: &Limits,
    progress: &Progress<'_>,
) -> Result<Imported, ImageError> {
    let start = Instant::now();
    let name: Reference = name.parse()?;
    let lease = store.lease(&format!("pull of {name}"))?;
    let importer = Importer {
        store,
        lease: &lease,
        limits,
        progress,
    };
    let pulled = || -> Result<Contents, ImageError> {
        let remote = Files::Remote(registry::Repository::new(&name, settings)?);
        importer.image(&remote, &name, platform, Origin::Registry)
    };
    let content = pulled().map_err(|source| ImageError::Pull {
        name: name.to_string(),
        source: Box::new(source),
    })?;
    finish(store, &name, content, start)
}

/// Gives the name to the stored layers. The lease on it must still be held.
fn finish(
    store: &Store,
    name: &Reference,
    content: Contents,
    start: Instant,
) -> Result<Imported, ImageError> {
    let mut size = 0;
    for id in &content.realised.layers {
        size += store.layer(id)?.logical_bytes();
    }
    let imported_at = SystemTime::now().duration_since(UNIX_EPOCH);
    let image = Image {
        name: name.to_string(),
        layers: content.realised.layers,
        digest: content.digest,
        config: content.config,
        origin: content.origin,
        platform: content.platform,
        imported_at: imported_at.map_or(0, |since| since.as_secs()),
        size,
    };
    keep(store, &image)?;
    Ok(Imported {
        image,
        new_files: content.realised.new_files,
        new_bytes: content.realised.new_bytes,
        elapsed: start.elapsed(),
    })
}

/// All images of the store, sorted by name.
pub fn list(store: &Store) -> Result<Vec<Image>, ImageError> {
    let (images, mut unreadable) = readable(store)?;
    unreadable.pop().map_or(Ok(images), Err)
}

/// As [`list`], of those that can be read, and why others cannot.
pub fn readable(store: &Store) -> Result<(Vec<Image>, Vec<ImageError>), ImageError> {
    let (refs, unreadable) = store.readable_refs(RefKind::Image)?;
    let mut unreadable: Vec<ImageError> = unreadable.into_iter().map(ImageError::from).collect();
    let mut images = Vec::new();
    for (name, content) in refs {
        match image_of(name, content) {
            Ok(image) => images.push(image),
            Err(error) => unreadable.push(error),
        }
    }
    Ok((images, unreadable))
}

/// The image that `name`, completed as docker completes names, stands for in the store.
pub fn resolve(store: &Store, name: &str) -> Result<Option<Image>, ImageError> {
    let name = name.parse::<Reference>()?.to_string();
    let content = store.get_ref(RefKind::Image, &name)?;
    content.map(|content| image_of(name, content)).transpose()
}

/// Removes the name of an image, and says whether there was one. Its layers stay until they are
/// collected.
pub fn remove(store: &Store, name: &str) -> Result<bool, ImageError> {
    let name = name.parse::<Reference>()?.to_string();
    Ok(store.remove_ref(RefKind::Image, &name)?)
}

fn keep(store: &Store, image: &Image) -> Result<(), ImageError> {
    let mut info = serde_json::to_value(image).map_err(|source| ImageError::Info {
        name: image.name.clone(),
        source,
    })?;
    // The ref has these itself.
    if let Some(fields) = info.as_object_mut() {
        fields.remove("name");
        fields.remove("layers");
    }
    let content = Ref {
        layers: image.layers.clone(),
        info,
    };
    Ok(store.set_ref(RefKind::Image, &image.name, &content)?)
}

fn image_of(name: String, content: Ref) -> Result<Image, ImageError> {
    let image: Image = match serde_json::from_value(content.info) {
        Ok(image) => image,
        Err(source) => return Err(ImageError::Info { name, source }),
    };
    Ok(Image {
        name,
        layers: content.layers,
        ..image
    })
}

/// Contents of a path, in the store.
struct Contents {
    realised: Realised,
    digest: Option<Digest>,
    config: ImageConfig,
    origin: Origin,
    platform: Option<Platform>,
}

struct Importer<'a> {
    store: &'a Store,
    lease: &'a Lease,
    limits: &'a Limits,
    progress: &'a Progress<'a>,
}

impl Importer<'_> {
    fn content(&self, path: &Path, name: &Reference) -> Result<Contents, ImageError> {
        let metadata = std::fs::metadata(path).map_err(io_error("reading", path))?;
        let content = if metadata.is_dir() {
            self.directory(path, name)
        } else {
            self.archive(path, name)
        };
        content.map_err(|source| match source {
            source @ (ImageError::NotAnImage { .. } | ImageError::Io { .. }) => source,
            source => ImageError::Import {
                path: path.to_owned(),
                source: Box::new(source),
            },
        })
    }

    fn directory(&self, path: &Path, name: &Reference) -> Result<Contents, ImageError> {
        if path.join("oci-layout").is_file() || path.join("index.json").is_file() {
            let files = Files::Dir(path.to_owned());
            return self.image(&files, name, Platform::host(), Origin::OciLayout);
        }
        if path.join("manifest.json").is_file() {
            return Err(ImageError::NotAnImage {
                path: path.to_owned(),
                why: "it has a manifest.json and no index.json: give the archive that it was unpacked from, or an OCI layout",
            });
        }
        check_rootfs(path, |name| path.join(name).symlink_metadata().is_ok())?;
        let ingest = self.store.ingest(self.lease)?;
        let taken = rootfs::take(path, &ingest, self.limits, &|_| {})?;
        for left_out in &taken.left_out {
            (self.progress)(Event::LeftOut {
                path: &left_out.path,
                why: left_out.why,
            });
        }
        Ok(Contents {
            realised: one_layer(&ingest.finish(&taken.tree)?),
            digest: None,
            config: ImageConfig::default(),
            origin: Origin::RootfsDir,
            platform: None,
        })
    }

    fn archive(&self, path: &Path, name: &Reference) -> Result<Contents, ImageError> {
        let (file, size) = layout::open_regular(path).map_err(io_error("opening", path))?;
        let plain = self.plain_image(file.try_clone().map_err(io_error("opening", path))?, path)?;
        let files = match plain {
            Some(plain) => Files::of_archive(plain, self.limits)?,
            None => None,
        };
        match files {
            Some(files) => self.image(&files, name, Platform::host(), Origin::OciLayout),
            None => self.rootfs_archive(file, size, path),
        }
    }

    /// The archive, decompressed, if it begins like one of an image. Other input is read only once.
    fn plain_image(&self, mut file: File, path: &Path) -> Result<Option<File>, ImageError> {
        let rewind = |mut file: &File| file.rewind().map_err(io_error("reading", path));
        let blob = |source: StreamError| ImageError::Archive(source.into());
        let (compression, mut plain) = stream::plain(&file).map_err(blob)?;
        let begins = layout::begins_like_image(&mut *plain, self.limits);
        drop(plain);
        rewind(&file)?;
        if !begins {
            return Ok(None);
        }
        if compression.is_none() {
            return Ok(Some(file));
        }
        let mut copy = tempfile::tempfile_in(self.store.dir())
            .map_err(io_error("making a temporary file in", self.store.dir()))?;
        let read = std::sync::atomic::AtomicU64::new(0);
        let copied =
            stream::read_blob(&mut file, Promise::default(), self.limits, &read, |plain| {
                io::copy(plain, &mut copy).map_err(StreamError::Read)
            });
        copied.map_err(blob)?;
        rewind(&copy)?;
        Ok(Some(copy))
    }

    fn image(
        &self,
        files: &Files,
        name: &Reference,
        platform: Platform,
        origin: Origin,
    ) -> Result<Contents, ImageError> {
        let found = files.find_image(name, platform, self.limits)?;
        Ok(Contents {
            realised: layers::realise(
                self.store,
                self.lease,
                &found.layers,
                self.limits,
                self.progress,
            )?,
            digest: Some(found.digest),
            config: found.config,
            origin,
            platform: Some(found.platform),
        })
    }

    fn rootfs_archive(
        &self,
        mut file: File,
        size: u64,
        path: &Path,
    ) -> Result<Contents, ImageError> {
        // Looking for an image may have moved it.
        file.rewind().map_err(io_error("reading", path))?;
        (self.progress)(Event::Layer {
            index: 0,
            count: 1,
            bytes: size,
        });
        let ingest = self.store.ingest(self.lease)?;
        let (unpacked, seen) = layers::unpack_blob(
            file,
            Promise::default(),
            &ingest,
            Dialect::Rootfs,
            self.limits,
            &|bytes| (self.progress)(Event::Read { index: 0, bytes }),
        )
        .map_err(ImageError::Archive)?;
        check_rootfs(path, |name| unpacked.tree.has(name.as_bytes()))?;
        Ok(Contents {
            realised: one_layer(&ingest.finish(&unpacked.tree)?),
            digest: Some(seen.diff_id),
            config: ImageConfig::default(),
            origin: Origin::RootfsTar,
            platform: None,
        })
    }
}

/// Refuses input given by mistake: a project, a home directory, a directory of downloads.
fn check_rootfs(path: &Path, has: impl Fn(&str) -> bool) -> Result<(), ImageError> {
    if ["usr", "bin", "etc", "lib", "nix"].into_iter().any(has) {
        return Ok(());
    }
    Err(ImageError::NotAnImage {
        path: path.to_owned(),
        why: "it has neither an index.json nor a usr, bin or etc",
    })
}

fn one_layer(published: &iii_store::Published) -> Realised {
    Realised {
        layers: vec![published.layer_id],
        new_files: published.new_files,
        new_bytes: published.new_bytes,
    }
}

fn io_error(op: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ImageError {
    move |source| ImageError::Io {
        op,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
pub(crate) mod tests;
