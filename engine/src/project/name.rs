//! Names of workers.

use std::ffi::OsStr;
use std::fmt;
use std::str::FromStr;

/// The longest name, in bytes. It becomes part of file names, of socket paths and of a host name.
pub const MAX_NAME: usize = 64;

/// Prefix of `dev` before a directory's name.
const DEV_PREFIX: &str = "iii-dev-";

/// A worker's name: 1 to [`MAX_NAME`] of `A-Z a-z 0-9 . _ -`, a letter or digit first, no `..`. It
/// is safe as a file name and as an argument.
#[derive(
    Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize,
)]
#[serde(into = "String", try_from = "String")]
pub struct WorkerName(String);

impl From<WorkerName> for String {
    fn from(name: WorkerName) -> Self {
        name.0
    }
}

impl TryFrom<String> for WorkerName {
    type Error = NameError;

    fn try_from(name: String) -> Result<Self, NameError> {
        name.parse()
    }
}

/// A name that no worker can have.
#[derive(Debug, thiserror::Error)]
#[error("worker name {name:?}: {problem}")]
pub struct NameError {
    /// The name, shortened if it is long.
    pub name: String,
    /// The fault.
    pub problem: NameProblem,
}

/// A fault of a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameProblem {
    /// It has no characters.
    #[error("is empty")]
    Empty,
    /// It is longer than [`MAX_NAME`].
    #[error("is longer than {MAX_NAME} characters")]
    TooLong,
    /// It has a character that is not allowed.
    #[error("contains {0:?}; letters, digits, `.`, `_` and `-` are allowed")]
    Character(char),
    /// It starts with punctuation.
    #[error("does not start with a letter or a digit")]
    Start,
    /// It has `..` in it.
    #[error("contains `..`")]
    Dots,
}

impl WorkerName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// `iii-dev-<dir>`, with what a name cannot hold replaced by `-` and cut to length. Different
    /// directories may get the same name; what is kept under it has to say which directory it is
    /// for.
    pub fn for_directory(dir: &OsStr) -> Self {
        Self::cleaned(DEV_PREFIX, &dir.to_string_lossy())
    }

    /// `<dir>`, made a name in the same way; `None` if no letter or digit is in it.
    pub fn of_directory(dir: &OsStr) -> Option<Self> {
        let dir = dir.to_string_lossy();
        let start = dir.find(|c: char| c.is_ascii_alphanumeric())?;
        Some(Self::cleaned("", dir.get(start..)?))
    }

    fn cleaned(prefix: &str, dir: &str) -> Self {
        let mut name = String::from(prefix);
        for c in dir.chars() {
            if name.len() == MAX_NAME {
                break;
            }
            let dots = c == '.' && name.ends_with('.');
            name.push(if allowed(c) && !dots { c } else { '-' });
        }
        WorkerName(name)
    }
}

fn allowed(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-')
}

impl FromStr for WorkerName {
    type Err = NameError;

    fn from_str(name: &str) -> Result<Self, NameError> {
        let problem = if name.is_empty() {
            NameProblem::Empty
        } else if let Some(c) = name.chars().find(|&c| !allowed(c)) {
            NameProblem::Character(c)
        } else if name.len() > MAX_NAME {
            NameProblem::TooLong
        } else if !name.starts_with(|c: char| c.is_ascii_alphanumeric()) {
            NameProblem::Start
        } else if name.contains("..") {
            NameProblem::Dots
        } else {
            return Ok(WorkerName(name.to_owned()));
        };
        Err(NameError {
            name: name.chars().take(MAX_NAME).collect(),
            problem,
        })
    }
}

impl fmt::Display for WorkerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl AsRef<str> for WorkerName {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        for name in ["a", "my-worker", "Math_2.v1", "9", &"x".repeat(MAX_NAME)] {
            assert_eq!(name.parse::<WorkerName>().unwrap().as_str(), name);
        }
        for (name, problem) in [
            ("", NameProblem::Empty),
            (".hidden", NameProblem::Start),
            ("..", NameProblem::Start),
            ("-f", NameProblem::Start),
            ("_a", NameProblem::Start),
            ("a..b", NameProblem::Dots),
            ("a/b", NameProblem::Character('/')),
            ("a b", NameProblem::Character(' ')),
            ("wörker", NameProblem::Character('ö')),
            ("a\n", NameProblem::Character('\n')),
            ("a\0", NameProblem::Character('\0')),
            (&"x".repeat(MAX_NAME + 1), NameProblem::TooLong),
        ] {
            assert_eq!(
                name.parse::<WorkerName>().unwrap_err().problem,
                problem,
                "{name:?}"
            );
        }
        let error = "a b".parse::<WorkerName>().unwrap_err().to_string();
        assert_eq!(
            error,
            "worker name \"a b\": contains ' '; letters, digits, `.`, `_` and `-` are allowed"
        );
    }

    #[test]
    fn every_directory_gives_a_name() {
        use std::os::unix::ffi::OsStrExt as _;
        for (dir, expected) in [
            (&b"my-project"[..], "iii-dev-my-project"),
            (b"My Project!", "iii-dev-My-Project-"),
            (b"a..b...c", "iii-dev-a.-b.-.c"),
            (b".config", "iii-dev-.config"),
            (b"caf\xc3\xa9", "iii-dev-caf-"),
            (b"\xff\xfe", "iii-dev---"),
            (b"", "iii-dev-"),
        ] {
            let name = WorkerName::for_directory(OsStr::from_bytes(dir));
            assert_eq!(name.as_str(), expected);
            assert_eq!(name.as_str().parse::<WorkerName>().unwrap(), name);
        }
        for (dir, expected) in [
            ("my-project", Some("my-project")),
            (".config", Some("config")),
            ("-a b..c", Some("a-b.-c")),
            ("é", None),
            ("", None),
        ] {
            let name = WorkerName::of_directory(OsStr::new(dir));
            assert_eq!(name.as_ref().map(WorkerName::as_str), expected);
            assert!(name.is_none_or(|name| name.as_str().parse::<WorkerName>().is_ok()));
        }
        let long = WorkerName::for_directory(OsStr::new(&"d".repeat(255)));
        assert_eq!(long.as_str().len(), MAX_NAME);
    }
}
