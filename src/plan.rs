//! What has to be done, without doing any of it.
//!
//! A step (setup or install) is named by a key: its script, how it is run, and the tree ids of the layers below it. Not in
//! the key: the project, whose part is played by the facts that the step observed; memory, cpus, ports and names; and
//! the worker's own environment, so that no secret enters a layer or a key.
//!
//! **Invariant:** nothing here reads a file, a clock or the environment.

use std::collections::BTreeMap;
use std::fmt;

use iii_store::facts::{self, Fact, Seen};
use iii_store::{KeyId, NodeRef, Record, TreeId};

/// Context of the recipe hash. Any change to what a key covers takes a new one.
const KEY_CONTEXT: &str = "iii 2026 recipe v1";

/// Names that are left out of a project, at any depth.
pub const EXCLUDED: [&str; 6] = [
    "node_modules",
    ".git",
    "target",
    "__pycache__",
    ".venv",
    "dist",
];

/// Where the project stands in a sandbox, as a path from the root without its slash.
pub const WORKSPACE: &str = "workspace";

/// The layers above the base, in their order.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A layer of the image.
    Base,
    /// What `scripts.setup` wrote.
    Setup,
    /// What `scripts.install` wrote.
    Install,
    /// The project's files.
    Project,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Base => "base",
            Self::Setup => "setup",
            Self::Install => "install",
            Self::Project => "project",
        })
    }
}

/// All that decides a step's outcome, apart from the project.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recipe {
    /// Setup or install.
    pub kind: Kind,
    /// The layers below, bottom first, by what they hold: a setup that runs again to the same tree keeps every install
    /// layer above it.
    pub below: Vec<TreeId>,
    /// The script.
    pub script: String,
    /// The command that runs it, up to the script.
    pub shell: Vec<String>,
    /// The machine it runs on, as in `x86_64`.
    pub arch: String,
    /// The user it runs as, as the image names it.
    pub user: String,
    /// The declared build environment.
    pub env: BTreeMap<String, String>,
}

impl Recipe {
    /// The key: every field, each preceded by its length.
    pub fn key(&self) -> KeyId {
        let mut hasher = blake3::Hasher::new_derive_key(KEY_CONTEXT);
        let mut put = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        put(self.kind.to_string().as_bytes());
        put(&self
            .below
            .iter()
            .flat_map(|id| *id.as_bytes())
            .collect::<Vec<u8>>());
        put(self.script.as_bytes());
        put(&(self.shell.len() as u64).to_le_bytes());
        self.shell.iter().for_each(|word| put(word.as_bytes()));
        put(self.arch.as_bytes());
        put(self.user.as_bytes());
        for (name, value) in &self.env {
            put(name.as_bytes());
            put(value.as_bytes());
        }
        hasher.finalize().into()
    }
}

/// Why a step has to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// Nothing was ever built from this recipe.
    New,
    /// `--rebuild`.
    Asked,
    /// It was, but something that it looked at is different now.
    Changed(Change),
}

/// Something a step looked at that is different now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The path in the project; empty for the project's root.
    pub path: Vec<u8>,
    /// What happened to it.
    pub how: How,
}

/// What happened to a path that a step looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// It was looked up in vain and is there now.
    Appeared,
    /// It is not there any more.
    Gone,
    /// Its type or mode is different.
    Mode,
    /// A directory has other entries.
    Entries,
    /// A file has other contents, or a symlink another target.
    Contents,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = String::from_utf8_lossy(&self.path);
        let path = if path.is_empty() {
            "the project".into()
        } else {
            path
        };
        match self.how {
            How::Appeared => write!(f, "{path} appeared"),
            How::Gone => write!(f, "{path} is gone"),
            How::Mode => write!(f, "the type or mode of {path} changed"),
            How::Entries => write!(f, "the entries of {path} changed"),
            How::Contents => write!(f, "{path} changed"),
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::New => f.write_str("never built with this script on these layers"),
            Self::Asked => f.write_str("asked for by --rebuild"),
            Self::Changed(change) => change.fmt(f),
        }
    }
}

/// What is to be done for a step.
#[derive(Debug, Clone, PartialEq)]
pub enum Decision {
    /// This layer still holds.
    Hit(Record),
    /// The step has to run.
    Run(Reason),
}

/// Decides whether one of `records`, newest first, still holds for the project at `project`.
pub fn decide(records: &[Record], project: NodeRef<'_>) -> Decision {
    let mut newest_change = None;
    for record in records {
        match facts::first_mismatch(&record.facts, project) {
            None => return Decision::Hit(record.clone()),
            Some(fact) => {
                newest_change.get_or_insert_with(|| change(fact, project));
            }
        }
    }
    Decision::Run(newest_change.map_or(Reason::New, Reason::Changed))
}

fn change(fact: &Fact, project: NodeRef<'_>) -> Change {
    let there = iii_store::tree::components(&fact.path)
        .try_fold(project, NodeRef::child)
        .is_some();
    let how = match fact.seen {
        Seen::Absent => How::Appeared,
        _ if !there => How::Gone,
        Seen::Stat { .. } => How::Mode,
        Seen::Listing(_) => How::Entries,
        _ => How::Contents,
    };
    Change {
        path: fact.path.clone(),
        how,
    }
}
