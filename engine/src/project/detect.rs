//! The kind of a directory's project, by the names of its files alone.

use super::manifest::{Language, PackageManager};

/// The files that tell a project's language, in the order in which they decide.
pub const PROJECT_FILES: [(&str, &str); 4] = [
    ("package.json", "Node"),
    ("Cargo.toml", "Rust"),
    ("pyproject.toml", "Python"),
    ("requirements.txt", "Python"),
];

/// The language of a project whose root has the files `has` says it has.
pub fn language(has: &dyn Fn(&str) -> bool) -> Option<Language> {
    let (_, family) = PROJECT_FILES.into_iter().find(|(file, _)| has(file))?;
    Some(match family {
        "Rust" => Language::Rust,
        "Python" => Language::Python,
        _ => node_language(has),
    })
}

/// Which of Node's two languages a project is written in.
pub fn node_language(has: &dyn Fn(&str) -> bool) -> Language {
    if has("tsconfig.json") {
        Language::TypeScript
    } else {
        Language::JavaScript
    }
}

/// The package manager whose lockfile is there; npm without one.
pub fn package_manager(has: &dyn Fn(&str) -> bool) -> PackageManager {
    if has("bun.lock") || has("bun.lockb") {
        PackageManager::Bun
    } else if has("pnpm-lock.yaml") {
        PackageManager::Pnpm
    } else if has("yarn.lock") {
        PackageManager::Yarn
    } else {
        PackageManager::Npm
    }
}

/// How a Python project says what to install.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PythonInputs {
    /// It is a package (`pyproject.toml`, or its forerunner `setup.py`).
    pub package: bool,
    /// It has a `requirements.txt`.
    pub requirements: bool,
}

/// The parts of a project that `pip` can install.
pub fn python_inputs(has: &dyn Fn(&str) -> bool) -> PythonInputs {
    PythonInputs {
        package: has("pyproject.toml") || has("setup.py"),
        requirements: has("requirements.txt"),
    }
}

/// Files that start a Python worker when the manifest names no entry; the first that exists is
/// taken.
pub const PYTHON_MAINS: [&str; 5] = [
    "main.py",
    "worker.py",
    "app.py",
    "src/main.py",
    "__main__.py",
];

/// The entry of a Python project whose manifest gives none: one of [`PYTHON_MAINS`], else the only
/// package that can be run with `-m`. `packages` are the names of the packages that have a
/// `__main__.py`.
pub fn python_entry(has: &dyn Fn(&str) -> bool, packages: &[String]) -> Option<String> {
    let main = PYTHON_MAINS.into_iter().find(|file| has(file));
    match (main, packages) {
        (Some(file), _) => Some(file.to_owned()),
        (None, [package]) => Some(package.clone()),
        (None, _) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_tell_the_language_and_the_package_manager() {
        use Language::{JavaScript, Python, Rust, TypeScript};
        use PackageManager::{Bun, Npm, Pnpm, Yarn};
        for (files, expected, manager) in [
            (&["package.json"][..], Some(JavaScript), Npm),
            (
                &["package.json", "package-lock.json"],
                Some(JavaScript),
                Npm,
            ),
            (&["package.json", "tsconfig.json"], Some(TypeScript), Npm),
            (&["package.json", "bun.lock"], Some(JavaScript), Bun),
            (&["package.json", "bun.lockb"], Some(JavaScript), Bun),
            (
                &["package.json", "bun.lock", "yarn.lock"],
                Some(JavaScript),
                Bun,
            ),
            (
                &["package.json", "pnpm-lock.yaml", "yarn.lock"],
                Some(JavaScript),
                Pnpm,
            ),
            (&["package.json", "yarn.lock"], Some(JavaScript), Yarn),
            (
                &["package.json", "Cargo.toml", "pyproject.toml"],
                Some(JavaScript),
                Npm,
            ),
            (&["Cargo.toml"], Some(Rust), Npm),
            (&["Cargo.toml", "requirements.txt"], Some(Rust), Npm),
            (&["pyproject.toml"], Some(Python), Npm),
            (&["requirements.txt"], Some(Python), Npm),
            (&["setup.py"], None, Npm),
            (&["README.md", "index.js", "tsconfig.json"], None, Npm),
            (&[], None, Npm),
        ] {
            let has = |name: &str| files.contains(&name);
            assert_eq!(language(&has), expected, "{files:?}");
            assert_eq!(package_manager(&has), manager, "{files:?}");
        }
    }

    #[test]
    fn python_entries() {
        for (files, packages, expected) in [
            (&["main.py", "app.py"][..], &["pkg"][..], Some("main.py")),
            (&["src/main.py"], &[], Some("src/main.py")),
            (&[], &["pkg"], Some("pkg")),
            (&[], &["one", "two"], None),
            (&["other.py"], &[], None),
        ] {
            let packages: Vec<String> = packages.iter().map(|&p| p.to_owned()).collect();
            let found = python_entry(&|name| files.contains(&name), &packages);
            assert_eq!(found.as_deref(), expected, "{files:?} {packages:?}");
        }
    }
}
