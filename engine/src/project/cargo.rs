//! The binary that `cargo run` runs in a project, from its Cargo.toml files.
//!
//! It follows cargo: `default-run`, else the one binary of the packages that cargo looks at. Where
//! that is not clear, or where the project's cargo configuration has binaries built elsewhere,
//! there is no answer, and cargo itself is to be asked.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use toml_edit::{DocumentMut, Item, TableLike};

/// Longest Cargo.toml that is read, in bytes.
const MAX_CARGO_TOML: u64 = 1 << 20;
/// Most packages of a workspace that are looked at.
const MAX_MEMBERS: usize = 256;

/// A binary of a Rust project.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CargoBinary {
    /// The package to build, if the project's root is not a package.
    pub package: Option<String>,
    /// The name of the binary.
    pub name: String,
}

/// The binary that `cargo run` runs in the directory `root`; of several, the one that is called
/// `entry`, or whose package is.
pub fn binary(root: &Path, entry: Option<&str>) -> Option<CargoBinary> {
    if builds_elsewhere(root) {
        return None;
    }
    let manifest = read(&root.join("Cargo.toml"))?;
    let workspace = table(&manifest, "workspace");
    let packages = match (table(&manifest, "package"), workspace) {
        (Some(_), _) => vec![(true, Package::new(root, &manifest)?)],
        (None, Some(workspace)) => members(root, workspace)
            .into_iter()
            .map(|package| (false, package))
            .collect(),
        (None, None) => return None,
    };
    let all = packages.iter().flat_map(|(is_root, package)| {
        package.binaries.iter().map(move |name| {
            let package = (!is_root).then(|| package.name.clone());
            let name = name.clone();
            CargoBinary { package, name }
        })
    });
    let all: Vec<CargoBinary> = all.collect();
    let called = |one: &&CargoBinary| {
        entry.is_some_and(|entry| one.name == entry || one.package.as_deref() == Some(entry))
    };
    let called: Vec<&CargoBinary> = all.iter().filter(called).collect();
    if let [one] = *called {
        return Some(one.clone());
    }
    let default = packages
        .iter()
        .find_map(|(_, package)| package.default_run.as_ref());
    if let Some(name) = default {
        return all.iter().find(|one| one.name == *name).cloned();
    }
    match &*all {
        [one] => Some(one.clone()),
        _ => None,
    }
}

struct Package {
    name: String,
    default_run: Option<String>,
    binaries: BTreeSet<String>,
}

impl Package {
    fn new(dir: &Path, manifest: &DocumentMut) -> Option<Self> {
        let package = table(manifest, "package")?;
        let text = |key| package.get(key).and_then(Item::as_str).map(str::to_owned);
        let name = text("name")?;
        let mut binaries = BTreeSet::new();
        if let Some(Item::ArrayOfTables(tables)) = manifest.get("bin") {
            let names = tables.iter().filter_map(|bin| bin.get("name"));
            binaries.extend(names.filter_map(Item::as_str).map(str::to_owned));
        } else if let Some(Item::Value(value)) = manifest.get("bin") {
            let tables = value.as_array().into_iter().flatten();
            let names = tables.filter_map(|bin| bin.as_inline_table()?.get("name")?.as_str());
            binaries.extend(names.map(str::to_owned));
        }
        let is_automatic = package.get("autobins").and_then(Item::as_bool);
        if is_automatic.unwrap_or(true) {
            // A [[bin]] may give src/main.rs another name.
            let is_named = names_main(manifest);
            if !is_named && dir.join("src/main.rs").is_file() {
                binaries.insert(name.clone());
            }
            binaries.extend(in_bin_directory(&dir.join("src/bin")));
        }
        Some(Self {
            default_run: text("default-run"),
            name,
            binaries,
        })
    }
}

/// Whether a `[[bin]]` is src/main.rs under a name of its own.
fn names_main(manifest: &DocumentMut) -> bool {
    let tables = manifest.get("bin").and_then(Item::as_array_of_tables);
    let mut paths = tables.into_iter().flatten().map(|bin| bin.get("path"));
    paths.any(|path| path.and_then(Item::as_str) == Some("src/main.rs"))
}

fn in_bin_directory(dir: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let name = |entry: fs::DirEntry| {
        let name = entry.file_name().into_string().ok()?;
        match name.strip_suffix(".rs") {
            Some(stem) => Some(stem.to_owned()),
            None => entry.path().join("main.rs").is_file().then_some(name),
        }
    };
    entries.filter_map(name).collect()
}

/// The packages of a workspace without a root package, in the order of its members.
fn members(root: &Path, workspace: &dyn TableLike) -> Vec<Package> {
    let listed = workspace
        .get("default-members")
        .or(workspace.get("members"));
    let listed = listed.and_then(Item::as_array).into_iter().flatten();
    let mut dirs = Vec::new();
    for path in listed.filter_map(|path| path.as_str()) {
        if let Some(parent) = path.strip_suffix("/*") {
            let entries = fs::read_dir(root.join(parent)).into_iter().flatten();
            let mut found: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
            found.sort_unstable();
            dirs.extend(found);
        } else if path.contains(['*', '?', '[']) {
            // Cargo knows more patterns.
            return Vec::new();
        } else {
            dirs.push(root.join(path));
        }
        if dirs.len() > MAX_MEMBERS {
            return Vec::new();
        }
    }
    let package = |dir: std::path::PathBuf| Package::new(&dir, &read(&dir.join("Cargo.toml"))?);
    dirs.into_iter().filter_map(package).collect()
}

/// Whether the project's own configuration of cargo has binaries somewhere else than in
/// target/release.
fn builds_elsewhere(root: &Path) -> bool {
    let files = ["config.toml", "config"].map(|name| root.join(".cargo").join(name));
    files.iter().filter(|file| file.exists()).any(|file| {
        let Some(config) = read(file) else {
            return true;
        };
        let build = table(&config, "build");
        let key = |key| build.is_some_and(|build| build.contains_key(key));
        key("target") || key("target-dir") || key("build-dir")
    })
}

fn table<'a>(document: &'a DocumentMut, key: &str) -> Option<&'a dyn TableLike> {
    document.get(key)?.as_table_like()
}

/// Nothing where there is no such file, or none that cargo could read either.
fn read(path: &Path) -> Option<DocumentMut> {
    let mut text = String::new();
    let file = File::open(path).ok()?;
    file.take(MAX_CARGO_TOML).read_to_string(&mut text).ok()?;
    text.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACKAGE: &str = "[package]\nname = \"app\"\n";

    /// Files, the entry that the manifest names, and the binary with its package.
    type Case<'a> = (&'a [(&'a str, &'a str)], Option<&'a str>, Option<&'a str>);

    #[test]
    fn the_binary_is_the_one_that_cargo_runs() {
        let bins = "[[bin]]\nname = \"one\"\npath = \"src/main.rs\"\n";
        let two = "[[bin]]\nname = \"one\"\n[[bin]]\nname = \"two\"\n";
        let inline = "bin = [{ name = \"one\" }]\n[package]\nname = \"app\"\nautobins = false\n";
        let default = "[package]\nname = \"app\"\ndefault-run = \"two\"\n";
        let elsewhere = "[build]\ntarget-dir = \"out\"\n";
        let plain = "[net]\nretry = 3\n";
        let workspace = "[workspace]\nmembers = [\"crates/*\", \"tool\"]\n";
        let library = "[package]\nname = \"lib\"\n";
        let cases: [Case<'_>; 14] = [
            (
                &[("Cargo.toml", PACKAGE), ("src/main.rs", "")],
                None,
                Some("app"),
            ),
            (&[("Cargo.toml", PACKAGE), ("src/lib.rs", "")], None, None),
            (
                &[("Cargo.toml", "no toml ["), ("src/main.rs", "")],
                None,
                None,
            ),
            (
                &[
                    ("Cargo.toml", &(PACKAGE.to_owned() + bins)),
                    ("src/main.rs", ""),
                ],
                None,
                Some("one"),
            ),
            (&[("Cargo.toml", &(PACKAGE.to_owned() + two))], None, None),
            (
                &[("Cargo.toml", &(PACKAGE.to_owned() + two))],
                Some("two"),
                Some("two"),
            ),
            (
                &[("Cargo.toml", inline), ("src/main.rs", "")],
                None,
                Some("one"),
            ),
            (
                &[("Cargo.toml", &(default.to_owned() + two))],
                None,
                Some("two"),
            ),
            (
                &[
                    ("Cargo.toml", PACKAGE),
                    ("src/bin/a.rs", ""),
                    ("src/bin/b/main.rs", ""),
                ],
                Some("b"),
                Some("b"),
            ),
            (
                &[
                    ("Cargo.toml", PACKAGE),
                    ("src/bin/a.rs", ""),
                    ("src/bin/c/other.rs", ""),
                ],
                None,
                Some("a"),
            ),
            (
                &[
                    ("Cargo.toml", PACKAGE),
                    ("src/main.rs", ""),
                    (".cargo/config.toml", elsewhere),
                ],
                None,
                None,
            ),
            (
                &[
                    ("Cargo.toml", PACKAGE),
                    ("src/main.rs", ""),
                    (".cargo/config.toml", plain),
                ],
                None,
                Some("app"),
            ),
            (
                &[
                    ("Cargo.toml", workspace),
                    ("crates/lib/Cargo.toml", library),
                    ("tool/Cargo.toml", PACKAGE),
                    ("tool/src/main.rs", ""),
                ],
                None,
                Some("app -p app"),
            ),
            (
                &[("Cargo.toml", "[workspace]\nmembers = [\"**\"]\n")],
                None,
                None,
            ),
        ];
        for (files, entry, expected) in cases {
            let dir = tempfile::tempdir().unwrap();
            for (path, text) in files {
                let path = dir.path().join(path);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, text).unwrap();
            }
            let found = binary(dir.path(), entry).map(|one| match one.package {
                Some(package) => format!("{} -p {package}", one.name),
                None => one.name,
            });
            assert_eq!(found.as_deref(), expected, "{files:?}");
        }
    }
}
