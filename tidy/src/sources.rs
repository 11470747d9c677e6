//! Which files the checks read.

use std::fs;
use std::path::{Path, PathBuf};

/// Directories that hold no sources, by name, at any depth.
const NOT_SOURCES: [&str; 8] = [
    "target",
    "node_modules",
    ".git",
    ".venv",
    "corpus",
    "artifacts",
    "dist",
    "coverage",
];

/// A file of the repository.
pub struct Source {
    /// Relative to the repository, with `/`.
    pub path: String,
    pub text: String,
}

/// How the checks read a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Rust,
    Markdown,
    /// Scripts, TOML and YAML: only comments are prose, and begin with `#`.
    Hashes,
}

impl Source {
    pub fn format(&self) -> Format {
        format(&self.path).expect("only files with a format are sources")
    }
}

pub fn repository() -> PathBuf {
    let tidy = Path::new(env!("CARGO_MANIFEST_DIR"));
    tidy.parent()
        .expect("the repository holds this crate")
        .to_owned()
}

/// All files of the repository that are text for people: Rust, Markdown, TOML, YAML and scripts.
pub fn all() -> Vec<Source> {
    let root = repository();
    let mut found = Vec::new();
    let mut to_do = vec![root.clone()];
    while let Some(dir) = to_do.pop() {
        for entry in fs::read_dir(&dir).expect("a directory of the repository is readable") {
            let entry = entry.expect("a directory of the repository is readable");
            let path = entry.path();
            let name = entry.file_name().to_string_lossy().into_owned();
            if path.is_dir() && !path.is_symlink() {
                if !NOT_SOURCES.contains(&name.as_str()) {
                    to_do.push(path);
                }
                continue;
            }
            let relative = path.strip_prefix(&root).expect("it is below the root");
            let relative = relative.to_string_lossy().replace('\\', "/");
            if let Some(text) = format(&relative).and_then(|_| fs::read_to_string(&path).ok()) {
                found.push(Source {
                    path: relative,
                    text,
                });
            }
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found
}

fn format(path: &str) -> Option<Format> {
    let name = path.rsplit('/').next().unwrap_or(path);
    match name.rsplit_once('.') {
        Some((_, "rs")) => Some(Format::Rust),
        Some((_, "md")) => Some(Format::Markdown),
        Some((_, "toml" | "yml" | "sh")) => Some(Format::Hashes),
        Some(_) => None,
        None => ["scripts/", ".ci/"]
            .iter()
            .any(|dir| path.starts_with(dir))
            .then_some(Format::Hashes),
    }
}

#[test]
fn the_sources_are_found() {
    let all = all();
    for path in ["README.md", "Cargo.toml", "scripts/test", "tidy/src/lib.rs"] {
        assert!(all.iter().any(|source| source.path == path), "{path}");
    }
    assert!(all.iter().all(|source| !source.path.contains("target/")));
}
