//! Platforms of images.

use std::fmt;
use std::str::FromStr;

use oci_spec::image::{Arch, Os};

/// Linux on one of the architectures that sandboxes run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Platform {
    /// x86-64.
    #[serde(rename = "linux/amd64")]
    Amd64,
    /// 64-bit ARM.
    #[serde(rename = "linux/arm64")]
    Arm64,
}

/// A platform that is not supported.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a platform: expected linux/amd64 or linux/arm64")]
pub struct ParsePlatformError(String);

impl Platform {
    /// Platform of this machine. Sandboxes run Linux on any host.
    pub const fn host() -> Self {
        if cfg!(target_arch = "aarch64") {
            Self::Arm64
        } else {
            Self::Amd64
        }
    }

    /// Whether this is what OCI calls `os` and `arch`.
    pub fn is(self, os: &Os, arch: &Arch) -> bool {
        *os == Os::Linux && *arch == self.arch()
    }

    /// Its architecture in OCI's terms.
    pub fn arch(self) -> Arch {
        match self {
            Self::Amd64 => Arch::Amd64,
            Self::Arm64 => Arch::ARM64,
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Amd64 => "linux/amd64",
            Self::Arm64 => "linux/arm64",
        })
    }
}

impl FromStr for Platform {
    type Err = ParsePlatformError;

    fn from_str(text: &str) -> Result<Self, ParsePlatformError> {
        match text {
            "linux/amd64" => Ok(Self::Amd64),
            "linux/arm64" | "linux/arm64/v8" => Ok(Self::Arm64),
            _ => Err(ParsePlatformError(text.chars().take(80).collect())),
        }
    }
}
