//! The archive that `docker load` and `podman load` take, as a destination: one image in one file.
//!
//! Members stand one behind the other in the order in which they come, `blobs/sha256/DIGEST` each,
//! and `manifest.json` at the end. The digest and length of a blob are known only when it is
//! written, so its header is written last, into the room left for it: no blob is kept anywhere
//! meanwhile, and the file must be one that can be written to anywhere. It gets its name when it is
//! whole.

use std::collections::HashMap;
use std::io::{self, BufWriter, Seek as _, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::json;
use tempfile::NamedTempFile;

use super::archive::{BLOCK, END, file_header, padding};
use super::{ExportError, Hashing, Sink, Stored, WriteBlob, io_error, tmp};
use crate::digest::Digest;

const WRITE_BUFFER: usize = 256 << 10;

/// The archive of one image, being written.
pub struct DockerArchiveSink {
    path: PathBuf,
    name: String,
    state: Mutex<State>,
}

struct State {
    /// None once the archive is whole.
    file: Option<NamedTempFile>,
    /// Where the next member begins.
    at: u64,
    members: HashMap<Digest, u64>,
}

impl DockerArchiveSink {
    /// Begins an archive that will be the file `path`, in place of one that is there. The image in
    /// it will have the name `name`.
    pub fn create(path: &Path, name: String) -> Result<Self, ExportError> {
        if path.is_dir() {
            return Err(ExportError::Io {
                op: "writing",
                path: path.to_owned(),
                source: io::ErrorKind::IsADirectory.into(),
            });
        }
        let own = path.file_name().unwrap_or_default().to_string_lossy();
        let prefix = format!(".{own}.iii-");
        tmp::sweep(tmp::parent(path), &prefix);
        Ok(Self {
            path: path.to_owned(),
            name,
            state: Mutex::new(State {
                file: Some(tmp::file(tmp::parent(path), &prefix)?),
                at: 0,
                members: HashMap::new(),
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends a member that `write` writes, under the name that follows from what it was.
    fn append(
        &self,
        state: &mut State,
        write: &mut WriteBlob<'_>,
        name: impl Fn(&Digest) -> String,
    ) -> Result<Stored, ExportError> {
        let failed = io_error("writing", &self.path);
        let whole = || {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                "the archive has its image already",
            )
        };
        let Some(file) = &state.file else {
            return Err(failed(whole()));
        };
        let mut file = file.as_file();
        let begin = |file: &mut &std::fs::File| -> io::Result<()> {
            file.seek(SeekFrom::Start(state.at))?;
            file.write_all(&END[..BLOCK])
        };
        begin(&mut file).map_err(io_error("writing", &self.path))?;
        let mut out = Hashing::new(BufWriter::with_capacity(WRITE_BUFFER, file));
        write(&mut out).map_err(|error| match error {
            ExportError::Write(source) => io_error("writing", &self.path)(source),
            other => other,
        })?;
        out.flush().map_err(io_error("writing", &self.path))?;
        let (_, stored) = out.finish();
        if state.members.contains_key(&stored.digest) {
            return Ok(stored);
        }
        let padding = padding(stored.size);
        let header = file_header(name(&stored.digest).as_bytes(), stored.size);
        let finish = |file: &mut &std::fs::File| -> io::Result<()> {
            file.write_all(&END[..padding])?;
            file.seek(SeekFrom::Start(state.at))?;
            file.write_all(&header)
        };
        finish(&mut file).map_err(failed)?;
        state.at += BLOCK as u64 + stored.size + padding as u64;
        state.members.insert(stored.digest, stored.size);
        Ok(stored)
    }
}

fn member_name(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

#[derive(serde::Deserialize)]
struct Manifest {
    config: Descriptor,
    layers: Vec<Descriptor>,
}

#[derive(serde::Deserialize)]
struct Descriptor {
    digest: Digest,
}

impl Sink for DockerArchiveSink {
    fn has_blob(&self, digest: &Digest, size: u64) -> Result<bool, ExportError> {
        Ok(self.lock().members.get(digest) == Some(&size))
    }

    /// One at a time: others wait.
    fn put_blob(&self, write: &mut WriteBlob<'_>) -> Result<Stored, ExportError> {
        self.append(&mut self.lock(), write, member_name)
    }

    /// Writes the list of the image's parts, which is what engines read instead of its manifest,
    /// and gives the archive its name. It takes one manifest, and `_tag` is of no account: the name
    /// is the archive's. The digest is that of the image's configuration, by which engines call it:
    /// the manifest is not in the archive.
    fn put_manifest(
        &self,
        _media_type: &str,
        bytes: &[u8],
        _tag: Option<&str>,
    ) -> Result<Digest, ExportError> {
        let manifest: Manifest = serde_json::from_slice(bytes).map_err(ExportError::Json)?;
        let layers: Vec<String> = manifest
            .layers
            .iter()
            .map(|one| member_name(&one.digest))
            .collect();
        let list = json!([{
            "Config": member_name(&manifest.config.digest),
            "RepoTags": [self.name],
            "Layers": layers,
        }]);
        let list = list.to_string();
        let mut state = self.lock();
        self.append(
            &mut state,
            &mut |out| out.write_all(list.as_bytes()).map_err(ExportError::Write),
            |_| "manifest.json".to_owned(),
        )?;
        let Some(file) = state.file.take() else {
            return Ok(manifest.config.digest);
        };
        let end = |mut file: &std::fs::File| -> io::Result<()> {
            file.seek(SeekFrom::Start(state.at))?;
            file.write_all(&END)
        };
        end(file.as_file()).map_err(io_error("writing", &self.path))?;
        tmp::rename(file, &self.path)?;
        tmp::sync_dir(tmp::parent(&self.path))?;
        Ok(manifest.config.digest)
    }
}
