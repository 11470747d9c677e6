//! `worker init`: a small project that works, in each language. The templates are the project's
//! examples.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use crate::project::{Language, WorkerName};

/// The manifest's place in a template; its first line is the name.
const MANIFEST: &str = "iii.worker.yaml";

/// Why there is no new project.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "their messages say it")]
pub enum ScaffoldError {
    #[error("{} exists already; nothing was written", path.display())]
    Exists { path: PathBuf },
    #[error("cannot {operation} {}", path.display())]
    Io {
        operation: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

macro_rules! template {
    ($dir:literal, $($file:literal),+) => {
        &[$(($file, include_str!(concat!("../../../examples/", $dir, "/", $file)))),+]
    };
}

/// The files of a language's template, by their paths.
fn template(language: Language) -> &'static [(&'static str, &'static str)] {
    match language {
        Language::TypeScript => template!(
            "typescript",
            "iii.worker.yaml",
            "package.json",
            "src/index.ts"
        ),
        Language::JavaScript => template!(
            "javascript",
            "iii.worker.yaml",
            "package.json",
            "src/index.js"
        ),
        Language::Python => template!(
            "python",
            "iii.worker.yaml",
            "pyproject.toml",
            "src/hello/__init__.py",
            "src/hello/__main__.py"
        ),
        Language::Rust => template!("rust", "iii.worker.yaml", "Cargo.toml", "src/main.rs"),
    }
}

/// Writes a project for the worker `name` into `dir`, which is made if it is missing. Nothing is
/// written where one of its files is there already. Returns the files, relative to `dir`.
pub fn init(
    dir: &Path,
    language: Language,
    name: &WorkerName,
) -> Result<Vec<&'static str>, ScaffoldError> {
    let at = |operation, path: &Path| {
        let path = path.to_owned();
        move |source| ScaffoldError::Io {
            operation,
            path,
            source,
        }
    };
    let files = template(language);
    for (file, _) in files {
        let path = dir.join(file);
        if path.symlink_metadata().is_ok() {
            return Err(ScaffoldError::Exists { path });
        }
    }
    for (file, text) in files {
        let path = dir.join(file);
        let parent = path.parent().unwrap_or(dir);
        fs::create_dir_all(parent).map_err(at("create", parent))?;
        let mut open = File::create_new(&path).map_err(at("create", &path))?;
        let text = if *file == MANIFEST {
            let rest = text.split_once('\n').map_or("", |(_, rest)| rest);
            // Quoted: a name may look like a number.
            format!("name: \"{name}\"\n{rest}")
        } else {
            (*text).to_owned()
        };
        open.write_all(text.as_bytes())
            .map_err(at("write", &path))?;
    }
    Ok(files.iter().map(|(file, _)| *file).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::project::Project;

    #[test]
    fn every_template_is_a_project_of_its_language() {
        for language in [
            Language::TypeScript,
            Language::JavaScript,
            Language::Python,
            Language::Rust,
        ] {
            let dir = tempfile::tempdir().unwrap_or_else(|error| panic!("{error}"));
            let name: WorkerName = "1.5".parse().unwrap_or_else(|error| panic!("{error}"));
            let files = init(dir.path(), language, &name);
            assert!(files.is_ok_and(|files| files.len() > 2));
            let project = Project::open(dir.path()).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(
                (project.language, project.name),
                (Some(language), Some(name.clone()))
            );
            assert!(project.scripts.install.is_some(), "{language:?}");
            let again = init(dir.path(), language, &name);
            assert!(matches!(again, Err(ScaffoldError::Exists { .. })));
        }
    }
}
