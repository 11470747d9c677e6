//! Entries of workers in the engine's `config.yaml`. Read here; [`edit`](super::edit) writes it.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry as Slot;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::manifest::RESERVED_ENV;
use super::yaml::{Document, DocumentError, Entry, FieldProblem, Kind, Scalar, Table, quote};

/// The largest config.yaml that is read, in bytes.
pub const MAX_CONFIG_BYTES: u64 = 256 << 10;

/// A worker's entry under `workers:`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkerConfig {
    /// `worker_path`, as written.
    pub worker_path: Option<PathBuf>,
    /// `config:` as environment variables: keys in upper case, nested ones joined by `_`; a list is
    /// its JSON; a key without a value gives no variable. It goes before the manifest's `env` and
    /// never holds one of [`RESERVED_ENV`].
    pub env: BTreeMap<String, String>,
    /// Ignored values, each with its place.
    pub warnings: Vec<String>,
}

/// Reads the entry of `worker` in the file at `path`; `None` where either is missing.
///
/// `${NAME}` and `${NAME:default}` in values are replaced by what `variable` gives for the name, as
/// the engine does it in the same file; a name without value and default is an error.
pub fn read(
    path: &Path,
    worker: &str,
    variable: &dyn Fn(&str) -> Option<String>,
) -> Result<Option<WorkerConfig>, DocumentError> {
    let document = match Document::read(path, MAX_CONFIG_BYTES) {
        Err(DocumentError::Read { source, .. })
            if source.kind() == std::io::ErrorKind::NotFound =>
        {
            return Ok(None);
        }
        document => document?,
    };
    let workers = document.table().list("workers")?;
    // Compared as text, since `- name: 7` is a number to YAML and a worker to its author.
    let is_named =
        |entry: &Entry| matches!(&entry.value.kind, Kind::Scalar { text, .. } if text == worker);
    let Some(table) = workers
        .into_iter()
        .find(|table| table.get("name").is_some_and(is_named))
    else {
        return Ok(None);
    };
    let mut config = WorkerConfig {
        worker_path: table.string("worker_path")?.map(PathBuf::from),
        ..WorkerConfig::default()
    };
    if let Some(block) = table.sub("config")? {
        flatten(&block, "", variable, &mut config)?;
    }
    Ok(Some(config))
}

/// One entry under `workers:`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its name, as written.
    pub name: String,
    /// Its `worker_path`, which only local workers have, as written.
    pub worker_path: Option<PathBuf>,
}

/// The workers in the file at `path`, in its order; those without a name are left out. A
/// missing file has none.
pub fn list(path: &Path) -> Result<Vec<Listed>, DocumentError> {
    let document = match Document::read(path, MAX_CONFIG_BYTES) {
        Err(DocumentError::Read { source, .. })
            if source.kind() == std::io::ErrorKind::NotFound =>
        {
            return Ok(Vec::new());
        }
        document => document?,
    };
    let mut listed = Vec::new();
    for table in document.table().list("workers")? {
        if let Some(Kind::Scalar { text, .. }) = table.get("name").map(|entry| &entry.value.kind) {
            listed.push(Listed {
                name: text.clone(),
                worker_path: table.string("worker_path")?.map(PathBuf::from),
            });
        }
    }
    Ok(listed)
}

fn flatten(
    table: &Table<'_>,
    prefix: &str,
    variable: &dyn Fn(&str) -> Option<String>,
    config: &mut WorkerConfig,
) -> Result<(), DocumentError> {
    for entry in table.entries {
        let name = format!("{prefix}{}", entry.key.to_uppercase());
        if entry.key.is_empty() || name.contains(['=', '\0']) {
            let problem = FieldProblem::Invalid {
                found: quote(&entry.key),
                why: "cannot be part of a variable's name".into(),
            };
            return Err(table.fault(&entry.key, entry.line, problem));
        }
        let expand = |text: &str| {
            expand(text, variable).map_err(|name| {
                let name = name.escape_debug();
                let why = format!("{name} is not set; set it, or write ${{{name}:default}}");
                table.invalid(entry, why)
            })
        };
        let value = match (&entry.value.kind, entry.value.scalar()) {
            (Kind::Map(_), _) => {
                if let Some(nested) = table.sub(&entry.key)? {
                    flatten(&nested, &format!("{name}_"), variable, config)?;
                }
                continue;
            }
            (_, Some(Scalar::Null)) => continue,
            (_, Some(Scalar::Bool(value))) => value.to_string(),
            // As written: 1.10 is a version as often as a number.
            (Kind::Scalar { text, .. }, _) => expand(text)?,
            (Kind::List(_), _) => expand_json(entry.value.to_json(), &expand)?.to_string(),
        };
        if value.contains('\0') {
            return Err(table.invalid(entry, "contains a NUL character"));
        }
        if RESERVED_ENV.contains(&name.as_str()) {
            config
                .warnings
                .push(table.warning(entry, "set by iii itself; ignored"));
            continue;
        }
        match config.env.entry(name) {
            Slot::Vacant(slot) => {
                slot.insert(value);
            }
            Slot::Occupied(mut slot) => {
                let message = format!("gives {} another value; the last one counts", slot.key());
                config.warnings.push(table.warning(entry, &message));
                slot.insert(value);
            }
        }
    }
    Ok(())
}

/// `text` with its `${…}` replaced, or the name that has neither value nor default. An unclosed
/// `${` is plain text.
fn expand(text: &str, variable: &dyn Fn(&str) -> Option<String>) -> Result<String, String> {
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, reference)) = rest.split_once("${") {
        let Some((reference, after)) = reference.split_once('}') else {
            break;
        };
        let (name, default) = match reference.split_once(':') {
            Some((name, default)) => (name, Some(default)),
            None => (reference, None),
        };
        out.push_str(before);
        match (variable(name), default) {
            (Some(value), _) => out.push_str(&value),
            (None, Some(default)) => out.push_str(default),
            (None, None) => return Err(name.to_owned()),
        }
        rest = after;
    }
    out.push_str(rest);
    Ok(out)
}

/// `value` with every text in it passed through `expand`.
fn expand_json<E>(value: Value, expand: &dyn Fn(&str) -> Result<String, E>) -> Result<Value, E> {
    Ok(match value {
        Value::String(text) => Value::String(expand(&text)?),
        Value::Array(items) => items
            .into_iter()
            .map(|item| expand_json(item, expand))
            .collect::<Result<_, E>>()?,
        Value::Object(map) => map
            .into_iter()
            .map(|(key, item)| Ok((key, expand_json(item, expand)?)))
            .collect::<Result<_, E>>()?,
        other => other,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str, worker: &str) -> Result<Option<WorkerConfig>, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.yaml");
        std::fs::write(&path, text).unwrap();
        let variable = |name: &str| (name == "HOST_KEY").then(|| "s3cret".to_owned());
        read(&path, worker, &variable).map_err(|error| {
            error
                .to_string()
                .replace(&format!("{}/", dir.path().display()), "")
        })
    }

    const SAMPLE: &str = r#"
port: 49134          # the engine's own settings are not ours to judge
workers:
  - name: iii-http
    config: {port: 3111}
  - name: my-worker
    worker_path: /abs/path
    config:
      log_level: info
      Retries: 3
      ratio: 1.10
      on: true
      upper: TRUE
      nothing:
      empty: ""
      quoted: "007"
      database:
        url: "pg://${HOST_USER:app}:${HOST_KEY}@db"
        pool: {size: 5}
      tags: [a, "${HOST_KEY}", 1]
      open: "${not closed"
      III_URL: ws://elsewhere
      database_pool: {size: 6}
"#;

    #[test]
    fn a_config_block_becomes_variables() {
        let config = read_text(SAMPLE, "my-worker").unwrap().unwrap();
        assert_eq!(config.worker_path.as_deref(), Some(Path::new("/abs/path")));
        let env: Vec<String> = config.env.iter().map(|(k, v)| format!("{k}={v}")).collect();
        assert_eq!(
            env,
            [
                "DATABASE_POOL_SIZE=6",
                "DATABASE_URL=pg://app:s3cret@db",
                "EMPTY=",
                "LOG_LEVEL=info",
                "ON=true",
                "OPEN=${not closed",
                "QUOTED=007",
                "RATIO=1.10",
                "RETRIES=3",
                "TAGS=[\"a\",\"s3cret\",1]",
                "UPPER=true",
            ]
        );
        assert_eq!(config.warnings.len(), 2, "{:?}", config.warnings);
        assert!(
            config.warnings[0].contains("config.yaml:22: workers[1].config.III_URL: set by iii")
        );
        assert!(config.warnings[1].contains("DATABASE_POOL_SIZE another value"));
    }

    #[test]
    fn workers_are_listed_in_their_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.yaml");
        assert_eq!(list(&path).unwrap(), []);
        std::fs::write(
            &path,
            "workers:\n  - name: 7\n  - name: b\n    worker_path: /b\n  - {}\n",
        )
        .unwrap();
        let one = |name: &str, path: Option<&str>| Listed {
            name: name.into(),
            worker_path: path.map(PathBuf::from),
        };
        assert_eq!(list(&path).unwrap(), [one("7", None), one("b", Some("/b"))]);
        std::fs::write(&path, "workers: 7\n").unwrap();
        assert!(list(&path).is_err());
    }

    #[test]
    fn absent_is_none() {
        assert_eq!(read_text(SAMPLE, "other").unwrap(), None);
        assert_eq!(read_text("", "other").unwrap(), None);
        assert_eq!(read_text("workers:\n", "other").unwrap(), None);
        let nowhere = read(Path::new("/nonexistent/config.yaml"), "w", &|_| None);
        assert!(matches!(nowhere, Ok(None)));
        let bare = read_text("workers: [{name: 7}]", "7").unwrap();
        assert_eq!(bare, Some(WorkerConfig::default()));
    }

    #[test]
    fn errors_name_the_place() {
        for (text, expected) in [
            (
                "workers: {a: b}",
                "config.yaml:1: workers: expected a list; found a mapping",
            ),
            (
                "workers:\n  - w",
                "config.yaml:2: workers[0]: expected a mapping; found \"w\"",
            ),
            (
                "workers:\n  - name: w\n    config: 5",
                "config.yaml:3: workers[0].config: expected a mapping; found the number 5",
            ),
            (
                "workers:\n  - name: w\n    worker_path: []",
                "config.yaml:3: workers[0].worker_path: expected a string; found a list",
            ),
            (
                "workers:\n  - name: w\n    config:\n      a: {b: \"x${MISSING}\"}",
                "config.yaml:4: workers[0].config.a.b: \"x${MISSING}\": MISSING is not set; set it, or write ${MISSING:default}",
            ),
            (
                "workers:\n  - name: w\n    config:\n      a=b: 1",
                "config.yaml:4: workers[0].config.a=b: \"a=b\": cannot be part of a variable's name",
            ),
            (
                "workers:\n  - name: w\n    config:\n      a: \"\\0\"",
                "config.yaml:4: workers[0].config.a: \"\\0\": contains a NUL character",
            ),
        ] {
            assert_eq!(read_text(text, "w").unwrap_err(), expected, "{text}");
        }
    }
}
