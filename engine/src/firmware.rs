//! libkrunfw, the library that holds the guest kernel of a microVM: found on this machine, or
//! fetched once.
//!
//! It is looked for where somebody said, in `~/.iii/lib`, and where the system keeps its libraries,
//! in this order. Where it is nowhere, it is fetched from npm: the package of another program that
//! carries it, of one version, whose digest is written here. Nothing of it is part of this program.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use iii_oci::Limits;
use iii_oci::digest::Digest;
use iii_oci::registry::{self, RegistryError, Settings};
use iii_oci::stream::{self, Promise, StreamError};
use iii_oci::tar::{Archive, TarError};

use crate::home::Home;

/// Names the library; where it is set, no other place is looked at.
pub const VARIABLE: &str = "III_LIBKRUNFW";
/// Size of the largest library that is taken from a package.
const MAX_LIBRARY: u64 = 128 << 20;
/// Times that a fetch is begun, where what fails may pass.
const TRIES: u32 = 3;
/// Bytes between two reports of progress.
const REPORT: u64 = 1 << 20;

/// The file's name, as the dynamic linker and `msb_krun` know it.
#[cfg(target_os = "macos")]
pub const FILE_NAME: &str = "libkrunfw.5.dylib";
/// The file's name, as the dynamic linker and `msb_krun` know it.
#[cfg(not(target_os = "macos"))]
pub const FILE_NAME: &str = "libkrunfw.so.5";

/// Where the system's libraries may be, besides what the dynamic linker is told by its variable.
const SYSTEM: &[&str] = if cfg!(target_os = "macos") {
    &["/opt/homebrew/lib", "/usr/local/lib"]
} else if cfg!(target_arch = "aarch64") {
    &[
        "/usr/local/lib64",
        "/usr/local/lib",
        "/usr/lib/aarch64-linux-gnu",
        "/usr/lib64",
        "/usr/lib",
    ]
} else {
    &[
        "/usr/local/lib64",
        "/usr/local/lib",
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib64",
        "/usr/lib",
    ]
};

/// A package that has the library in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    /// Address of the gzipped archive.
    pub url: String,
    /// Digest of the archive.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// The library's name in it.
    pub member: String,
}

impl Package {
    /// The package for this machine; none where there is none.
    pub fn of_this_machine() -> Option<Self> {
        let (name, digest, size, file) = if cfg!(all(target_os = "linux", target_arch = "x86_64")) {
            (
                "microsandbox-linux-x64-gnu",
                "sha256:f53ef7c444afd7d78ff089a84018a049db41054d494a32ec2cedc9c93eb7a79a",
                33_558_875,
                "libkrunfw.so.5.6.1",
            )
        } else if cfg!(all(target_os = "linux", target_arch = "aarch64")) {
            (
                "microsandbox-linux-arm64-gnu",
                "sha256:604d5c9e26d6e024cc1d5b4d751cb70eb6e0af305020eee15e64216ad7c87cb4",
                36_972_941,
                "libkrunfw.so.5.6.1",
            )
        } else if cfg!(all(target_os = "macos", target_arch = "aarch64")) {
            (
                "microsandbox-darwin-arm64",
                "sha256:f77f6e2b4193799277d08824831144382913ad16d0705a8d889184e5659c5ffa",
                35_171_624,
                "libkrunfw.5.dylib",
            )
        } else {
            return None;
        };
        Some(Self {
            url: format!("https://registry.npmjs.org/@superradcompany/{name}/-/{name}-0.6.8.tgz"),
            // A constant, which a test parses.
            digest: digest.parse().ok()?,
            size,
            member: format!("package/lib/{file}"),
        })
    }
}

/// Who says where the library is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The command line.
    Flag,
    /// [`VARIABLE`].
    Variable,
    /// It was fetched, or put where fetched ones are.
    Home,
    /// The system's libraries.
    System,
}

/// What may happen on the way to the library.
#[derive(Debug, thiserror::Error)]
pub enum FirmwareError {
    /// Somebody named a file that is not there.
    #[error("{} is no file, though {by} names it as libkrunfw", path.display())]
    NotThere {
        /// The file.
        path: PathBuf,
        /// The flag or variable.
        by: &'static str,
    },
    /// No package has one for this machine.
    #[error("there is no libkrunfw for this machine to be fetched")]
    NoPackage,
    /// It cannot be fetched.
    #[error(transparent)]
    Fetch(#[from] RegistryError),
    /// What came is not what was meant.
    #[error("the package at {url} cannot be used")]
    Package {
        /// Its address.
        url: String,
        /// The cause.
        source: StreamError,
    },
    /// What came is no archive.
    #[error("the package at {url} cannot be unpacked")]
    Archive {
        /// Its address.
        url: String,
        /// The cause.
        source: TarError,
    },
    /// The package does not have the library.
    #[error("the package at {url} has no {member} of at most {MAX_LIBRARY} bytes")]
    Missing {
        /// Its address.
        url: String,
        /// What it should have.
        member: String,
    },
    /// A file of this machine.
    #[error("cannot {operation} {}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

/// Where to look.
#[derive(Debug, Clone, Default)]
pub struct Places {
    /// What the command line names.
    pub flag: Option<PathBuf>,
    /// What [`VARIABLE`] names.
    pub variable: Option<PathBuf>,
    /// Where fetched libraries are.
    pub home: PathBuf,
    /// The system's directories, first one first.
    pub system: Vec<PathBuf>,
}

impl Places {
    /// What the environment says, with libraries fetched to `home`.
    pub fn new(home: &Home) -> Self {
        let linker = if cfg!(target_os = "macos") {
            "DYLD_FALLBACK_LIBRARY_PATH"
        } else {
            "LD_LIBRARY_PATH"
        };
        let told = home.variable(linker).unwrap_or_default();
        let told = std::env::split_paths(told).filter(|path| path.is_absolute());
        Self {
            flag: None,
            variable: home
                .variable(VARIABLE)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from),
            home: home.lib(),
            system: told.chain(SYSTEM.iter().map(PathBuf::from)).collect(),
        }
    }

    /// The library, if it is on this machine. What the flag or the variable names must be there.
    pub fn find(&self) -> Result<Option<(PathBuf, Source)>, FirmwareError> {
        for (named, source, by) in [
            (&self.flag, Source::Flag, "--libkrunfw"),
            (&self.variable, Source::Variable, VARIABLE),
        ] {
            if let Some(path) = named {
                return if path.is_file() {
                    Ok(Some((path.clone(), source)))
                } else {
                    let path = path.clone();
                    Err(FirmwareError::NotThere { path, by })
                };
            }
        }
        let home = (&self.home, Source::Home);
        let system = self.system.iter().map(|dir| (dir, Source::System));
        Ok(std::iter::once(home)
            .chain(system)
            .map(|(dir, source)| (dir.join(FILE_NAME), source))
            .find(|(path, _)| path.is_file()))
    }

    /// The library, fetched from `package` if it is nowhere. Told how many bytes of the package
    /// have come. When this returns, the file is durable and the next [`Places::find`] has it; of
    /// two processes one fetches and the other waits.
    pub fn find_or_fetch(
        &self,
        package: Option<&Package>,
        settings: &Settings,
        progress: &dyn Fn(u64),
    ) -> Result<PathBuf, FirmwareError> {
        if let Some((path, _)) = self.find()? {
            return Ok(path);
        }
        let package = package.ok_or(FirmwareError::NoPackage)?;
        fs::create_dir_all(&self.home).map_err(at("create", &self.home))?;
        let lock = self.home.join("lock");
        let file = File::create(&lock).map_err(at("open", &lock))?;
        file.lock().map_err(at("lock", &lock))?;
        if let Some((path, _)) = self.find()? {
            return Ok(path);
        }
        let mut tried = 1;
        loop {
            match self.fetch(package, settings, progress) {
                Err(error) if error.is_passing() && tried < TRIES => {
                    settings.patience.pause(tried);
                    tried += 1;
                }
                result => return result,
            }
        }
    }

    fn fetch(
        &self,
        package: &Package,
        settings: &Settings,
        progress: &dyn Fn(u64),
    ) -> Result<PathBuf, FirmwareError> {
        // A process that was killed leaves it, the next one writes over it; the lock is held.
        let partial = self.home.join("partial");
        let mut file = File::create(&partial).map_err(at("create", &partial))?;
        let body = registry::download(&package.url, settings)?;
        let promise = Promise {
            digest: Some(package.digest),
            size: Some(package.size),
            diff_id: None,
        };
        let limits = Limits::default();
        let read = AtomicU64::new(0);
        let unpack = |plain: &mut dyn Read| {
            let mut archive = Archive::new(plain, &limits);
            let mut found = false;
            while let Some(member) = archive.next_member()? {
                progress(read.load(Ordering::Relaxed));
                if member.path == package.member.as_bytes() && member.size <= MAX_LIBRARY {
                    copy(&mut archive.contents(), &mut file, &|| {
                        progress(read.load(Ordering::Relaxed));
                    })
                    .map_err(Unpack::Write)?;
                    found = true;
                }
            }
            Ok::<_, Unpack>(found)
        };
        let url = || package.url.clone();
        let (found, _) = stream::read_blob(body, promise, &limits, &read, unpack).map_err(
            |error| match error {
                Unpack::Stream(source) => FirmwareError::Package { url: url(), source },
                Unpack::Tar(source) => FirmwareError::Archive { url: url(), source },
                Unpack::Write(source) => at("write", &partial)(source),
            },
        )?;
        if !found {
            return Err(FirmwareError::Missing {
                url: url(),
                member: package.member.clone(),
            });
        }
        file.sync_all().map_err(at("sync", &partial))?;
        let path = self.home.join(FILE_NAME);
        fs::rename(&partial, &path).map_err(at("rename to", &path))?;
        File::open(&self.home)
            .and_then(|dir| dir.sync_all())
            .map_err(at("sync", &self.home))?;
        Ok(path)
    }
}

#[derive(Debug)]
enum Unpack {
    Stream(StreamError),
    Tar(TarError),
    Write(io::Error),
}

impl From<StreamError> for Unpack {
    fn from(error: StreamError) -> Self {
        Self::Stream(error)
    }
}

impl From<TarError> for Unpack {
    fn from(error: TarError) -> Self {
        Self::Tar(error)
    }
}

impl FirmwareError {
    /// Whether the same may succeed a moment later.
    fn is_passing(&self) -> bool {
        match self {
            Self::Fetch(error) => error.is_passing(),
            // A connection that ends early makes a package that is too short.
            Self::Package { source, .. } => {
                matches!(source, StreamError::Read(_) | StreamError::Size { .. })
            }
            _ => false,
        }
    }
}

fn copy(from: &mut dyn Read, to: &mut File, report: &dyn Fn()) -> io::Result<()> {
    while io::copy(&mut from.take(REPORT), to)? > 0 {
        report();
    }
    Ok(())
}

fn at(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FirmwareError {
    let path = path.to_owned();
    move |source| FirmwareError::Io {
        operation,
        path,
        source,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::net::TcpListener;
    use std::thread;

    use flate2::write::GzEncoder;
    use iii_store::with_causes;
    use tempfile::TempDir;

    use super::*;
    use iii_test_support::Tar;

    /// Answers each connection with the next of `answers`, then no more.
    fn server(answers: Vec<Vec<u8>>) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/p.tgz", listener.local_addr().unwrap());
        thread::spawn(move || {
            for answer in answers {
                let Ok((mut stream, _)) = listener.accept() else {
                    return;
                };
                let mut request = [0; 4096];
                let _ = stream.read(&mut request);
                let _ = stream.write_all(&answer);
            }
        });
        url
    }

    fn answer(status: &str, body: &[u8]) -> Vec<u8> {
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n", body.len());
        [head.as_bytes(), b"Connection: close\r\n\r\n", body].concat()
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn package(bytes: &[u8], url: String) -> Package {
        Package {
            url,
            digest: Digest::of(bytes),
            size: bytes.len() as u64,
            member: "package/lib/it.so".into(),
        }
    }

    fn hasty() -> Settings {
        let mut settings = Settings::default();
        settings.patience.backoff = std::time::Duration::ZERO;
        settings
    }

    fn places(home: &Path) -> Places {
        Places {
            home: home.join("lib"),
            ..Places::default()
        }
    }

    fn archive() -> Vec<u8> {
        let tar = Tar::default();
        let tar = tar
            .file("package/package.json", "{}")
            .file("package/lib/it.so", "ELF");
        gzip(&tar.file("package/bin/msb", vec![7; 3 << 20]).end())
    }

    #[test]
    fn the_first_place_that_has_it_wins() {
        let dir = TempDir::new().unwrap();
        let at = |name: &str| dir.path().join(name);
        let put = |name: &str| {
            fs::create_dir_all(at(name)).unwrap();
            fs::write(at(name).join(FILE_NAME), "").unwrap();
        };
        let mut places = places(dir.path());
        places.system = vec![at("a"), at("b")];
        assert_eq!(places.find().unwrap(), None);
        put("b");
        let found = places.find().unwrap();
        assert_eq!(found, Some((at("b").join(FILE_NAME), Source::System)));
        put("a");
        let found = places.find().unwrap();
        assert_eq!(found, Some((at("a").join(FILE_NAME), Source::System)));
        put("lib");
        let found = places.find().unwrap();
        assert_eq!(found, Some((at("lib").join(FILE_NAME), Source::Home)));
        fs::write(at("mine"), "").unwrap();
        places.variable = Some(at("mine"));
        assert_eq!(places.find().unwrap(), Some((at("mine"), Source::Variable)));
        places.flag = Some(at("none"));
        let error = places.find().unwrap_err().to_string();
        assert!(
            error.contains("none is no file, though --libkrunfw"),
            "{error}"
        );
    }

    #[test]
    fn it_is_fetched_once_and_tried_again_where_that_may_help() {
        let dir = TempDir::new().unwrap();
        let bytes = archive();
        let whole = answer("200 OK", &bytes);
        let url = server(vec![
            answer("503 Busy", b""),
            whole[..whole.len() / 2].to_vec(),
            whole,
        ]);
        let places = places(dir.path());
        let package = package(&bytes, url);
        let path = places
            .find_or_fetch(Some(&package), &hasty(), &|_| {})
            .unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"ELF");
        // The server answers no more.
        let again = places.find_or_fetch(Some(&package), &hasty(), &|_| {});
        assert_eq!(again.unwrap(), path);
        assert!(!places.home.join("partial").exists());
    }

    #[test]
    fn what_is_not_meant_is_refused() {
        let bytes = archive();
        let other = gzip(&Tar::default().file("package/lib/other.so", "ELF").end());
        let long = [&bytes[..], &[0; 64]].concat();
        for (sent, meant, expected) in [
            (&other, &bytes, "its size is not the"),
            (&other, &other, "has no package/lib/it.so"),
            (&long, &bytes, "its size is not the"),
            (&vec![0; bytes.len()], &bytes, "its digest is sha256:"),
        ] {
            let dir = TempDir::new().unwrap();
            let url = server(vec![answer("200 OK", sent); TRIES as usize]);
            let error = places(dir.path())
                .find_or_fetch(Some(&package(meant, url)), &hasty(), &|_| {})
                .unwrap_err();
            let error = with_causes(&error);
            assert!(error.contains(expected), "{error}");
            assert_eq!(places(dir.path()).find().unwrap(), None);
        }
        let dir = TempDir::new().unwrap();
        let url = server(vec![answer("404 Gone", b"")]);
        let error = places(dir.path())
            .find_or_fetch(Some(&package(&bytes, url)), &hasty(), &|_| {})
            .unwrap_err();
        assert!(matches!(error, FirmwareError::Fetch(_)), "{error:?}");
    }

    #[test]
    fn there_is_a_package_for_this_machine() {
        let package = Package::of_this_machine().unwrap();
        assert!(package.url.ends_with("-0.6.8.tgz"), "{}", package.url);
    }

    #[test]
    #[ignore = "fetches 33 MB from npm"]
    fn the_package_is_what_it_was() {
        let dir = TempDir::new().unwrap();
        let settings = Settings::from_variables(&|name| std::env::var_os(name)).unwrap();
        let package = Package::of_this_machine();
        let path = places(dir.path())
            .find_or_fetch(package.as_ref(), &settings, &|_| {})
            .unwrap();
        assert_eq!(&fs::read(path).unwrap()[..4], b"\x7fELF");
    }
}
