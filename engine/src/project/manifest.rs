//! `iii.worker.yaml`, field by field.
//!
//! Parsing is total: a [`Manifest`] holds only values that can be used as they are, and everything
//! else is an error that names the file, the line, the field and the expected value. An accepted
//! value without effect is a warning.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use super::name::{NameError, WorkerName};
use super::yaml::{
    Document, DocumentError, Entry, FieldProblem, Kind, Scalar, Table, closest, quote,
};

/// The manifest's name in the project's root.
pub const MANIFEST_NAME: &str = "iii.worker.yaml";

/// The largest manifest that is read, in bytes.
pub const MAX_MANIFEST_BYTES: u64 = 64 << 10;

/// Memory of a sandbox unless the manifest says otherwise, in MiB.
pub const DEFAULT_MEMORY_MIB: u32 = 2048;

/// CPUs of a sandbox unless the manifest says otherwise.
pub const DEFAULT_CPUS: u32 = 2;

/// Memory that may be asked for, in MiB. Less than the least does not boot a guest; more than the
/// most is a slip of units.
const MEMORY_MIB: (u32, u32) = (64, 1 << 20);

/// CPUs that may be asked for; libkrun counts them in a byte.
const CPUS: (u32, u32) = (1, 255);

/// The longest image reference.
const MAX_IMAGE_REFERENCE: usize = 512;

/// Variables that this tool sets for every worker. Values in a manifest or a `config:` block are
/// ignored.
pub const RESERVED_ENV: [&str; 4] = [
    "III_URL",
    "III_ENGINE_URL",
    "III_WORKER_NAME",
    "III_ISOLATION",
];

/// Language of a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Language {
    /// TypeScript, run by Node or bun.
    TypeScript,
    /// JavaScript, run by Node or bun.
    JavaScript,
    /// Python 3.
    Python,
    /// Rust, built by cargo.
    Rust,
}

impl Language {
    const ALL: [Language; 4] = [
        Language::TypeScript,
        Language::JavaScript,
        Language::Python,
        Language::Rust,
    ];

    /// The manifest's word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Language::TypeScript => "typescript",
            Language::JavaScript => "javascript",
            Language::Python => "python",
            Language::Rust => "rust",
        }
    }

    /// Whether `package_manager` means anything for it.
    pub fn is_node(self) -> bool {
        matches!(self, Language::TypeScript | Language::JavaScript)
    }
}

impl fmt::Display for Language {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Package manager of a Node project.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PackageManager {
    /// npm, the default.
    Npm,
    /// yarn.
    Yarn,
    /// pnpm.
    Pnpm,
    /// bun, which also runs the worker.
    Bun,
}

impl PackageManager {
    const ALL: [PackageManager; 4] = [
        PackageManager::Npm,
        PackageManager::Yarn,
        PackageManager::Pnpm,
        PackageManager::Bun,
    ];

    /// The program's name, which is also the manifest's word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            PackageManager::Npm => "npm",
            PackageManager::Yarn => "yarn",
            PackageManager::Pnpm => "pnpm",
            PackageManager::Bun => "bun",
        }
    }
}

impl fmt::Display for PackageManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The commands of a worker's life, each a shell script run in /workspace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scripts {
    /// Prepares the system below the project.
    pub setup: Option<String>,
    /// Installs the project's dependencies.
    pub install: Option<String>,
    /// Runs the worker.
    pub start: String,
}

/// Resources of a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resources {
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Virtual CPUs.
    pub cpus: u32,
}

impl Resources {
    /// The part of it that a machine with this memory and these CPUs gives: no more CPUs than it
    /// has. `None` if it has too little memory; a machine that is smaller than the default does
    /// with what it has, since many manifests just say that.
    pub fn within(self, memory_mib: u32, cpus: u32) -> Option<Self> {
        (self.memory_mib <= memory_mib.max(DEFAULT_MEMORY_MIB)).then(|| Self {
            memory_mib: self.memory_mib.min(memory_mib),
            cpus: self.cpus.min(cpus),
        })
    }
}

impl Default for Resources {
    fn default() -> Self {
        Resources {
            memory_mib: DEFAULT_MEMORY_MIB,
            cpus: DEFAULT_CPUS,
        }
    }
}

/// Ports of this machine's loopback that a worker in a microVM may reach, besides the engine. In
/// namespaces the network is the host's, and so is its loopback.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct HostLoopback {
    /// Everything.
    pub all: bool,
    /// These ports.
    pub ports: BTreeSet<u16>,
}

impl HostLoopback {
    /// The ports of `text`, which is `all` or a port.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parsed = Self::default();
        if text == "all" {
            parsed.all = true;
        } else {
            parsed
                .ports
                .insert(text.parse().ok().filter(|port| *port != 0)?);
        }
        Some(parsed)
    }

    /// Whether it is nothing.
    pub fn is_none(&self) -> bool {
        !self.all && self.ports.is_empty()
    }

    /// This and that.
    #[must_use]
    pub fn and(mut self, other: &Self) -> Self {
        self.all |= other.all;
        self.ports.extend(&other.ports);
        self
    }
}

/// `runtime:`, as far as it is given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Runtime {
    /// `kind`, or its old name `language`.
    pub kind: Option<Language>,
    /// `package_manager`.
    pub package_manager: Option<PackageManager>,
    /// `entry`: a file, or for Python a file or a module.
    pub entry: Option<String>,
    /// `base_image`, as written.
    pub base_image: Option<String>,
}

/// A whole `iii.worker.yaml`.
#[derive(Clone, Debug, PartialEq)]
pub struct Manifest {
    /// `name`.
    pub name: WorkerName,
    /// `description`.
    pub description: Option<String>,
    /// `runtime`.
    pub runtime: Runtime,
    /// `resources`, defaults filled in.
    pub resources: Resources,
    /// `network.host_loopback`, which is this tool's own.
    pub host_loopback: HostLoopback,
    /// `scripts`; `None` where the key is absent or has no value, and all commands are to be
    /// inferred.
    pub scripts: Option<Scripts>,
    /// `env` without the variables in [`RESERVED_ENV`].
    pub env: BTreeMap<String, String>,
    /// `dependencies`: worker name to version range, neither resolved nor checked further.
    pub dependencies: BTreeMap<String, String>,
    /// `config`: what `add` offers to config.yaml.
    pub config: Option<serde_json::Value>,
    /// Ignored values, each with its place.
    pub warnings: Vec<String>,
}

const TOP_KEYS: &[&str] = &[
    "name",
    "description",
    "runtime",
    "resources",
    "network",
    "scripts",
    "env",
    "dependencies",
    "config",
    // Read by the publishing pipeline of the workers' registry, so a published worker has them;
    // nothing here uses them.
    "iii",
    "deploy",
    "manifest",
    "tags",
];
const RUNTIME_KEYS: &[&str] = &["kind", "language", "package_manager", "entry", "base_image"];
const RESOURCES_KEYS: &[&str] = &["memory", "cpus"];
const NETWORK_KEYS: &[&str] = &["host_loopback"];
const SCRIPTS_KEYS: &[&str] = &["setup", "install", "start"];

/// Keys that are at home in a mapping, for one that was written at the wrong level.
const NESTED_FIELDS: &[&str] = &[
    "runtime.kind",
    "runtime.language",
    "runtime.package_manager",
    "runtime.entry",
    "runtime.base_image",
    "resources.memory",
    "resources.cpus",
    "network.host_loopback",
    "scripts.setup",
    "scripts.install",
    "scripts.start",
];

impl Manifest {
    /// Reads the manifest at `path`.
    pub fn read(path: &Path) -> Result<Self, DocumentError> {
        Self::from_document(&Document::read(path, MAX_MANIFEST_BYTES)?)
    }

    /// Parses `bytes`, the contents of the manifest at `path`.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self, DocumentError> {
        Self::from_document(&Document::parse(path, bytes)?)
    }

    fn from_document(document: &Document) -> Result<Self, DocumentError> {
        let top = document.table();
        top.only(TOP_KEYS, NESTED_FIELDS)?;
        let mut warnings = Vec::new();
        let name = name(&top)?;
        Ok(Manifest {
            description: top.string("description")?.map(str::to_owned),
            runtime: runtime(&top, &mut warnings)?,
            resources: resources(&top)?,
            host_loopback: host_loopback(&top)?,
            scripts: scripts(&top)?,
            env: env(&top, &mut warnings)?,
            dependencies: dependencies(&top, &name)?,
            config: config(&top)?,
            name,
            warnings,
        })
    }
}

fn name(top: &Table<'_>) -> Result<WorkerName, DocumentError> {
    let Some(entry) = top.get("name") else {
        let why = "every manifest names its worker, for example `name: my-worker`";
        return Err(top.fault("name", top.line, FieldProblem::Missing { why }));
    };
    let parsed: Result<_, NameError> = top.text(entry)?.parse();
    parsed.map_err(|error| top.invalid(entry, error.problem))
}

fn runtime(top: &Table<'_>, warnings: &mut Vec<String>) -> Result<Runtime, DocumentError> {
    let Some(table) = top.sub("runtime")? else {
        return Ok(Runtime::default());
    };
    table.only(RUNTIME_KEYS, &["resources.memory", "resources.cpus"])?;
    let kind = choice(&table, "kind", Language::ALL, Language::as_str)?;
    let language = choice(&table, "language", Language::ALL, Language::as_str)?;
    if let (Some(kind), Some(language), Some(entry)) = (kind, language, table.get("language"))
        && kind != language
    {
        let why = format!("contradicts runtime.kind, which is {kind}; remove one of them");
        return Err(table.invalid(entry, why));
    }
    let kind = kind.or(language);
    let mut package_manager = choice(
        &table,
        "package_manager",
        PackageManager::ALL,
        PackageManager::as_str,
    )?;
    if let (Some(kind), Some(entry)) = (kind, table.get("package_manager"))
        && !kind.is_node()
    {
        warnings.push(table.warning(entry, &format!("ignored: it means nothing for {kind}")));
        package_manager = None;
    }
    Ok(Runtime {
        kind,
        package_manager,
        entry: filled(&table, "entry", entry_problem)?,
        base_image: filled(&table, "base_image", image_problem)?,
    })
}

fn resources(top: &Table<'_>) -> Result<Resources, DocumentError> {
    let Some(table) = top.sub("resources")? else {
        return Ok(Resources::default());
    };
    table.only(RESOURCES_KEYS, &[])?;
    let memory_mib = table.number("memory", MEMORY_MIB, "a whole number of MiB")?;
    let cpus = table.number("cpus", CPUS, "a whole number")?;
    Ok(Resources {
        memory_mib: memory_mib.unwrap_or(DEFAULT_MEMORY_MIB),
        cpus: cpus.unwrap_or(DEFAULT_CPUS),
    })
}

fn host_loopback(top: &Table<'_>) -> Result<HostLoopback, DocumentError> {
    const EXPECTED: &str = "`all` or a list of ports from 1 to 65535";
    let Some(table) = top.sub("network")? else {
        return Ok(HostLoopback::default());
    };
    table.only(NETWORK_KEYS, &[])?;
    let Some(entry) = table.get("host_loopback") else {
        return Ok(HostLoopback::default());
    };
    let mut parsed = HostLoopback::default();
    match (&entry.value.kind, entry.value.scalar()) {
        (_, Some(Scalar::Str("all"))) => parsed.all = true,
        (Kind::List(items), _) => {
            for item in items {
                let port = match item.scalar() {
                    Some(Scalar::Int(port)) => u16::try_from(port).ok().filter(|port| *port != 0),
                    _ => None,
                };
                let Some(port) = port else {
                    let why = format!("{} is no port; expected {EXPECTED}", item.describe());
                    return Err(table.invalid(entry, why));
                };
                parsed.ports.insert(port);
            }
        }
        _ => return Err(table.mismatch(entry, EXPECTED)),
    }
    Ok(parsed)
}

fn scripts(top: &Table<'_>) -> Result<Option<Scripts>, DocumentError> {
    let Some(table) = top.sub("scripts")? else {
        return Ok(None);
    };
    table.only(SCRIPTS_KEYS, &[])?;
    let script = |key| -> Result<Option<String>, DocumentError> {
        let text = table.string(key)?.filter(|text| !text.trim().is_empty());
        Ok(text.map(str::to_owned))
    };
    let (setup, install) = (script("setup")?, script("install")?);
    let Some(start) = script("start")? else {
        let why = "nothing is inferred once `scripts` is given, so say what starts the worker";
        let line = table
            .entries
            .iter()
            .find(|entry| entry.key == "start")
            .map_or(table.line, |entry| entry.line);
        return Err(table.fault("start", line, FieldProblem::Missing { why }));
    };
    Ok(Some(Scripts {
        setup,
        install,
        start,
    }))
}

fn env(
    top: &Table<'_>,
    warnings: &mut Vec<String>,
) -> Result<BTreeMap<String, String>, DocumentError> {
    let mut env = BTreeMap::new();
    let Some(table) = top.sub("env")? else {
        return Ok(env);
    };
    for entry in table.entries {
        if entry.key.is_empty() || entry.key.contains(['=', '\0']) {
            let problem = FieldProblem::Invalid {
                found: quote(&entry.key),
                why: "a variable's name is not empty and has neither `=` nor NUL in it".into(),
            };
            return Err(table.fault(&entry.key, entry.line, problem));
        }
        let value = table.text(entry)?;
        if RESERVED_ENV.contains(&entry.key.as_str()) {
            warnings
                .push(table.warning(entry, "set by iii itself; the manifest's value is ignored"));
        } else {
            env.insert(entry.key.clone(), value.to_owned());
        }
    }
    Ok(env)
}

fn dependencies(
    top: &Table<'_>,
    own: &WorkerName,
) -> Result<BTreeMap<String, String>, DocumentError> {
    let mut dependencies = BTreeMap::new();
    let Some(table) = top.sub("dependencies")? else {
        return Ok(dependencies);
    };
    for entry in table.entries {
        let name: WorkerName = entry.key.parse().map_err(|error: NameError| {
            let problem = FieldProblem::Invalid {
                found: quote(&entry.key),
                why: error.problem.to_string(),
            };
            table.fault(&entry.key, entry.line, problem)
        })?;
        if name == *own {
            return Err(table.invalid(entry, "a worker cannot depend on itself"));
        }
        dependencies.insert(entry.key.clone(), table.text(entry)?.to_owned());
    }
    Ok(dependencies)
}

fn config(top: &Table<'_>) -> Result<Option<serde_json::Value>, DocumentError> {
    let Some(entry) = top.get("config") else {
        return Ok(None);
    };
    match entry.value.kind {
        Kind::Map(_) => Ok(Some(entry.value.to_json())),
        _ => Err(top.mismatch(entry, "a mapping")),
    }
}

/// The value of `key`, one of `all`.
fn choice<T: Copy, const N: usize>(
    table: &Table<'_>,
    key: &str,
    all: [T; N],
    word: fn(T) -> &'static str,
) -> Result<Option<T>, DocumentError> {
    let Some(entry) = table.get(key) else {
        return Ok(None);
    };
    let words = all.map(word);
    let text = match &entry.value.kind {
        Kind::Scalar { text, .. } => text.as_str(),
        _ => "",
    };
    if let Some(found) = all.into_iter().find(|&one| word(one) == text) {
        return Ok(Some(found));
    }
    let mut found = entry.value.describe();
    if let Some(meant) = closest(text, &words) {
        found = format!("{found}; did you mean {meant}?");
    }
    let problem = FieldProblem::Expected {
        expected: format!("one of {}", words.join(", ")),
        found,
    };
    Err(table.fault(key, entry.value.line, problem))
}

/// The string at `key`, if `problem` finds none with it.
fn filled(
    table: &Table<'_>,
    key: &str,
    problem: fn(&str) -> Option<&'static str>,
) -> Result<Option<String>, DocumentError> {
    let check = |entry: &'_ Entry, text: &str| match problem(text) {
        Some(why) => Err(table.invalid(entry, why)),
        None => Ok(text.to_owned()),
    };
    table
        .get(key)
        .map(|entry| table.text(entry).and_then(|text| check(entry, text)))
        .transpose()
}

fn entry_problem(entry: &str) -> Option<&'static str> {
    if entry.trim().is_empty() {
        Some("name the file that starts the worker, relative to the project")
    } else if entry.starts_with('-') {
        Some("a path that starts with `-` would be taken for an option")
    } else if entry.contains(char::is_control) {
        Some("contains a control character")
    } else {
        None
    }
}

fn image_problem(image: &str) -> Option<&'static str> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"._-/:@+".contains(&b);
    if image.len() > MAX_IMAGE_REFERENCE {
        Some("longer than the 512 characters of an image reference")
    } else if !image.bytes().all(allowed)
        || !image
            .bytes()
            .next()
            .is_some_and(|b| b.is_ascii_alphanumeric())
    {
        Some("not an image reference such as docker.io/library/node:24-slim")
    } else {
        None
    }
}
