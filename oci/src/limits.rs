//! Limits of archives and documents, and their names for the user who raises them.

use std::fmt;

/// Most entries of one archive, replaced ones included: as many as a layer can have.
pub const MAX_ENTRIES: u64 = iii_store::tree::MAX_NODES as u64;
/// Longest name, and longest link target, in bytes (Linux's `PATH_MAX`).
pub const MAX_PATH: usize = 4096;
/// Most bytes of names, link targets and xattrs of one archive together; they are held in memory.
pub const MAX_METADATA: u64 = 256 << 20;
/// Longest PAX header or GNU long name, in bytes (as in Go's `archive/tar`).
pub const MAX_EXTENSION: u64 = 1 << 20;
/// Most bytes of one archive, and of all files in it together.
pub const MAX_BYTES: u64 = 64 << 30;
/// Most plain bytes per compressed byte. DEFLATE reaches 1032, on zeros alone.
pub const MAX_RATIO: u64 = 200;
/// Plain bytes of an archive below which its ratio does not matter.
pub const RATIO_FROM: u64 = 1 << 30;
/// Most bytes of holes in the sparse files of one archive together. They are stored as zeros.
pub const MAX_HOLES: u64 = 4 << 30;
/// Most stretches of data between the holes of one sparse file.
pub const MAX_SEGMENTS: usize = 64 << 10;
/// Longest index, manifest or configuration, in bytes.
pub const MAX_DOCUMENT: u64 = 4 << 20;

/// How much of anything an archive may bring. The values of [`Limits::default`] are the constants
/// of this module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// See [`MAX_ENTRIES`].
    pub entries: u64,
    /// See [`MAX_PATH`].
    pub path: usize,
    /// See [`MAX_METADATA`].
    pub metadata: u64,
    /// See [`MAX_EXTENSION`].
    pub extension: u64,
    /// See [`MAX_BYTES`].
    pub bytes: u64,
    /// See [`MAX_RATIO`].
    pub ratio: u64,
    /// See [`RATIO_FROM`].
    pub ratio_from: u64,
    /// See [`MAX_HOLES`].
    pub holes: u64,
    /// See [`MAX_SEGMENTS`].
    pub segments: usize,
    /// See [`MAX_DOCUMENT`].
    pub document: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            entries: MAX_ENTRIES,
            path: MAX_PATH,
            metadata: MAX_METADATA,
            extension: MAX_EXTENSION,
            bytes: MAX_BYTES,
            ratio: MAX_RATIO,
            ratio_from: RATIO_FROM,
            holes: MAX_HOLES,
            segments: MAX_SEGMENTS,
            document: MAX_DOCUMENT,
        }
    }
}

/// One of [`Limits`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields of `Limits` say it")]
pub enum Limit {
    Entries,
    Path,
    Metadata,
    Extension,
    Bytes,
    Ratio,
    RatioFrom,
    Holes,
    Segments,
    Document,
}

impl Limit {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Entries,
        Self::Path,
        Self::Metadata,
        Self::Extension,
        Self::Bytes,
        Self::Ratio,
        Self::RatioFrom,
        Self::Holes,
        Self::Segments,
        Self::Document,
    ];

    /// Its name for users.
    pub fn name(self) -> &'static str {
        match self {
            Self::Entries => "entries",
            Self::Path => "path",
            Self::Metadata => "metadata",
            Self::Extension => "extension",
            Self::Bytes => "bytes",
            Self::Ratio => "ratio",
            Self::RatioFrom => "ratio-from",
            Self::Holes => "holes",
            Self::Segments => "segments",
            Self::Document => "document",
        }
    }

    /// Whether it counts bytes.
    pub fn is_size(self) -> bool {
        !matches!(self, Self::Entries | Self::Ratio | Self::Segments)
    }

    /// The largest value that it can have: what a number in the code can hold, with room to count
    /// on.
    pub fn most(self) -> u64 {
        match self {
            // Entries of a tree that is being built are numbered with 32 bits.
            Self::Entries => u32::MAX as u64 / 2,
            // These are held in memory, each at once.
            Self::Path | Self::Extension | Self::Segments | Self::Document => 1 << 30,
            Self::Metadata | Self::Bytes | Self::Ratio | Self::RatioFrom | Self::Holes => 1 << 50,
        }
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Limits {
    /// The value of one of them.
    pub fn get(&self, limit: Limit) -> u64 {
        match limit {
            Limit::Entries => self.entries,
            Limit::Path => self.path as u64,
            Limit::Metadata => self.metadata,
            Limit::Extension => self.extension,
            Limit::Bytes => self.bytes,
            Limit::Ratio => self.ratio,
            Limit::RatioFrom => self.ratio_from,
            Limit::Holes => self.holes,
            Limit::Segments => self.segments as u64,
            Limit::Document => self.document,
        }
    }

    /// Gives one of them another value, [`Limit::most`] where it is larger than that.
    pub fn set(&mut self, limit: Limit, value: u64) {
        let value = value.min(limit.most());
        match limit {
            Limit::Entries => self.entries = value,
            // At most 2^30.
            Limit::Path => self.path = value as usize,
            Limit::Metadata => self.metadata = value,
            Limit::Extension => self.extension = value,
            Limit::Bytes => self.bytes = value,
            Limit::Ratio => self.ratio = value,
            Limit::RatioFrom => self.ratio_from = value,
            Limit::Holes => self.holes = value,
            Limit::Segments => self.segments = value as usize,
            Limit::Document => self.document = value,
        }
    }

    /// That `what` is over one of them.
    pub fn passed(&self, limit: Limit, what: &'static str) -> Passed {
        Passed {
            what,
            value: self.get(limit),
            limit: Some(limit),
        }
    }
}

/// Something that is larger than it may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Passed {
    /// The exceeded limit.
    pub what: &'static str,
    /// The limit that it is over.
    pub value: u64,
    /// The limit; `None` for one that cannot be raised.
    pub limit: Option<Limit>,
}

impl Passed {
    /// That `what` is over a limit of the format, of Linux or of the store.
    pub fn fixed(what: &'static str, value: u64) -> Self {
        Self {
            what,
            value,
            limit: None,
        }
    }
}

impl fmt::Display for Passed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, value, limit } = self;
        write!(f, "{what} is over the limit of {value}")?;
        match limit {
            Some(limit) => write!(f, " ({limit})"),
            None => f.write_str(", which cannot be raised"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_limit_has_a_name_and_can_be_set() {
        let usual = Limits::default();
        for limit in Limit::ALL {
            let mut limits = usual.clone();
            let raised = usual.get(limit) + 1;
            limits.set(limit, raised);
            for other in Limit::ALL {
                let expected = usual.get(other) + u64::from(other == limit);
                assert_eq!(limits.get(other), expected, "{limit}: {other}");
                assert_eq!(other == limit, other.name() == limit.name());
            }
            limits.set(limit, u64::MAX);
            assert_eq!(limits.get(limit), limit.most());
            let passed = usual.passed(limit, "something").to_string();
            let value = usual.get(limit);
            assert_eq!(
                passed,
                format!("something is over the limit of {value} ({limit})")
            );
        }
        assert_eq!(
            Passed::fixed("something", 7).to_string(),
            "something is over the limit of 7, which cannot be raised"
        );
    }
}
