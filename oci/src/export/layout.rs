//! An OCI layout as a destination: a directory that other images may be in, too.
//!
//! Blobs are written in a directory of this process within the layout, synced, and renamed to their
//! digests. The index comes last, under a lock, and is replaced whole: a killed process leaves the
//! earlier images. The lock is on the layout's directory itself, so that nothing is
//! left in it for it.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read as _, Write};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{ExportError, Hashing, Sink, Stored, WriteBlob, io_error, tmp};
use crate::digest::Digest;
use crate::limits::MAX_DOCUMENT;

const TMP: &str = ".iii-";
const REF_NAME: &str = "org.opencontainers.image.ref.name";
const WRITE_BUFFER: usize = 256 << 10;

/// An OCI layout that is written to.
pub struct LayoutSink {
    dir: PathBuf,
    tmp: tmp::LockedDir,
}

impl LayoutSink {
    /// Opens the layout in `dir`, or makes one where there is nothing or an empty directory. From
    /// then on it is a valid layout. A directory that holds anything else is refused.
    pub fn open(dir: &Path) -> Result<Self, ExportError> {
        fs::create_dir_all(dir).map_err(io_error("making", dir))?;
        let _lock = tmp::lock_dir(dir)?;
        check_layout(dir)?;
        let blobs = blobs(dir);
        fs::create_dir_all(&blobs).map_err(io_error("making", &blobs))?;
        tmp::sweep(dir, TMP);
        let tmp = tmp::directory(dir, TMP)?;
        let sink = Self {
            dir: dir.to_owned(),
            tmp,
        };
        let index = json!({ "schemaVersion": 2, "manifests": [] });
        for (name, content) in [
            ("index.json", index),
            ("oci-layout", json!({ "imageLayoutVersion": "1.0.0" })),
        ] {
            if !dir.join(name).exists() {
                sink.document(name, &content)?;
            }
        }
        Ok(sink)
    }

    fn blob(&self, digest: &Digest) -> PathBuf {
        blobs(&self.dir).join(digest.hex())
    }

    fn document(&self, name: &str, content: &Value) -> Result<(), ExportError> {
        let mut file = tmp::file(self.tmp.dir.path(), "")?;
        let text = content.to_string();
        file.write_all(text.as_bytes())
            .map_err(io_error("writing", file.path()))?;
        tmp::rename(file, &self.dir.join(name))?;
        tmp::sync_dir(&self.dir)
    }

    fn index(&self) -> Result<Value, ExportError> {
        let path = self.dir.join("index.json");
        let file = File::open(&path).map_err(io_error("opening", &path))?;
        let mut text = Vec::new();
        file.take(MAX_DOCUMENT + 1)
            .read_to_end(&mut text)
            .map_err(io_error("reading", &path))?;
        let not_an_index = |why| ExportError::NotALayout {
            path: self.dir.clone(),
            why,
        };
        if text.len() as u64 > MAX_DOCUMENT {
            return Err(not_an_index("its index.json is too large"));
        }
        let index: Value = serde_json::from_slice(&text)
            .map_err(|_| not_an_index("its index.json does not parse"))?;
        if index["manifests"].is_array() {
            Ok(index)
        } else {
            Err(not_an_index("its index.json has no list of manifests"))
        }
    }
}

fn blobs(dir: &Path) -> PathBuf {
    dir.join("blobs/sha256")
}

/// An error unless `dir` is a layout, or nothing yet.
fn check_layout(dir: &Path) -> Result<(), ExportError> {
    let refuse = |why| ExportError::NotALayout {
        path: dir.to_owned(),
        why,
    };
    let path = dir.join("oci-layout");
    let mut text = Vec::new();
    match File::open(&path) {
        Ok(file) => file
            .take(MAX_DOCUMENT)
            .read_to_end(&mut text)
            .map_err(io_error("reading", &path))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            // One that was cut short while it was made has no more than this.
            for entry in fs::read_dir(dir).map_err(io_error("listing", dir))? {
                let name = entry.map_err(io_error("listing", dir))?.file_name();
                let begun = name == "blobs"
                    || name == "index.json"
                    || name.as_encoded_bytes().starts_with(TMP.as_bytes());
                if !begun {
                    return Err(refuse("it holds other files"));
                }
            }
            return Ok(());
        }
        Err(error) => return Err(io_error("opening", &path)(error)),
    };
    let version = serde_json::from_slice::<Value>(&text);
    let version = version
        .as_ref()
        .ok()
        .and_then(|text| text["imageLayoutVersion"].as_str());
    if version.is_some_and(|version| version.starts_with("1.")) {
        Ok(())
    } else {
        Err(refuse("its oci-layout is of a version that is not known"))
    }
}

impl Sink for LayoutSink {
    /// Its length is looked at, and not its bytes: what has its name was synced before.
    fn has_blob(&self, digest: &Digest, size: u64) -> Result<bool, ExportError> {
        let path = self.blob(digest);
        match fs::metadata(&path) {
            Ok(meta) => Ok(meta.is_file() && meta.len() == size),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(io_error("looking at", &path)(error)),
        }
    }

    fn put_blob(&self, write: &mut WriteBlob<'_>) -> Result<Stored, ExportError> {
        let file = tmp::file(self.tmp.dir.path(), "")?;
        let failed = |error| match error {
            ExportError::Write(source) => io_error("writing to", &self.dir)(source),
            other => other,
        };
        let mut out = Hashing::new(BufWriter::with_capacity(WRITE_BUFFER, file.as_file()));
        write(&mut out).map_err(failed)?;
        out.flush().map_err(io_error("writing to", &self.dir))?;
        let (_, stored) = out.finish();
        if !self.has_blob(&stored.digest, stored.size)? {
            tmp::rename(file, &self.blob(&stored.digest))?;
        }
        Ok(stored)
    }

    fn put_manifest(
        &self,
        media_type: &str,
        bytes: &[u8],
        tag: Option<&str>,
    ) -> Result<Digest, ExportError> {
        let stored = self.put_blob(&mut |out| out.write_all(bytes).map_err(ExportError::Write))?;
        tmp::sync_dir(&blobs(&self.dir))?;
        let mut descriptor = json!({
            "mediaType": media_type,
            "digest": stored.digest.to_string(),
            "size": stored.size,
        });
        if let Some(tag) = tag {
            descriptor["annotations"] = json!({ REF_NAME: tag });
        }
        let _lock = tmp::lock_dir(&self.dir)?;
        let mut index = self.index()?;
        let before = index.clone();
        if let Some(manifests) = index["manifests"].as_array_mut() {
            let goes = |other: &Value| match tag {
                Some(tag) => other["annotations"][REF_NAME] == tag,
                None => other["digest"] == descriptor["digest"] && other["annotations"].is_null(),
            };
            let at = manifests.iter().position(goes).unwrap_or(manifests.len());
            manifests.retain(|other| !goes(other));
            manifests.insert(at.min(manifests.len()), descriptor.clone());
        }
        if index != before {
            self.document("index.json", &index)?;
        }
        Ok(stored.digest)
    }
}
