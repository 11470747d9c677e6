//! What has to be done, without doing any of it.
//!
//! A step (setup or install) is named by a key: its script, how it is run, and the tree ids of the
//! layers below it. Not in the key: the project, whose part is played by the facts that the step
//! observed; memory, cpus, ports and names; and the worker's own environment, so that no secret
//! enters a layer or a key.
//!
//! **Invariant:** nothing here reads a file, a clock or the environment.

#![deny(clippy::disallowed_types)]

pub mod environment;
pub mod graph;

use std::collections::BTreeMap;
use std::fmt;

use iii_store::facts::{self, Fact, Seen};
use iii_store::{KeyId, NodeRef, Record, SeenHash, TreeId};

/// Context of the recipe hash. Any change to what a key covers takes a new one.
const KEY_CONTEXT: &str = "iii 2026 recipe v2";

/// Context of the digests of a recipe's parts.
const PART_CONTEXT: &str = "iii 2026 recipe part v1";

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
    /// The layers below, bottom first, by what they hold: a setup that runs again to the same tree
    /// keeps every install layer above it.
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
    /// The digests of its parts.
    pub fn parts(&self) -> RecipeParts {
        let digest = |parts: &mut dyn Iterator<Item = &[u8]>| {
            let mut hasher = blake3::Hasher::new_derive_key(PART_CONTEXT);
            for part in parts {
                hasher.update(&(part.len() as u64).to_le_bytes());
                hasher.update(part);
            }
            hasher.finalize().into()
        };
        let env = self.env.iter();
        RecipeParts {
            script: digest(&mut [self.script.as_bytes()].into_iter()),
            below: digest(&mut self.below.iter().map(|id| &id.as_bytes()[..])),
            env: digest(&mut env.flat_map(|(name, value)| [name.as_bytes(), value.as_bytes()])),
        }
    }

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
    /// This project was never built with this script.
    New,
    /// `--rebuild`.
    Asked,
    /// Its last build was from another recipe.
    Recipe(RecipePart),
    /// Its last build saw something that is different now.
    Changed(Change),
    /// The layer of its last build would hold, but is not in the store any more.
    Lost,
}

/// A part of a recipe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecipePart {
    /// The script.
    Script,
    /// The layers below.
    Below,
    /// The build environment.
    Env,
    /// The shell, the user, or the architecture.
    Machine,
}

/// Digests of the parts of a recipe, to tell which of them changed.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RecipeParts {
    script: SeenHash,
    below: SeenHash,
    env: SeenHash,
}

impl RecipeParts {
    /// The part that differs from `other`, of which it is known that something does.
    pub fn first_difference(&self, other: &Self) -> RecipePart {
        if self.script != other.script {
            RecipePart::Script
        } else if self.below != other.below {
            RecipePart::Below
        } else if self.env != other.env {
            RecipePart::Env
        } else {
            RecipePart::Machine
        }
    }
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
    /// It is of another type, or executable or not where it was otherwise.
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
            Self::New => f.write_str("first build of this project with this script"),
            Self::Asked => f.write_str("asked for by --rebuild"),
            Self::Recipe(RecipePart::Script) => f.write_str("the script changed"),
            Self::Recipe(RecipePart::Below) => f.write_str("the layers below changed"),
            Self::Recipe(RecipePart::Env) => f.write_str("the build environment changed"),
            Self::Recipe(RecipePart::Machine) => {
                f.write_str("the shell, the user or the architecture changed")
            }
            Self::Lost => f.write_str("the layer of the last build is not in the store any more"),
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

/// What became of something that a step saw.
pub fn change(fact: &Fact, project: NodeRef<'_>) -> Change {
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

#[cfg(test)]
mod tests {
    use iii_store::layer::{self, Layer};
    use iii_store::tree::{Content, Leaf, Meta, Node, Tree};
    use iii_store::{LayerId, ObjectId};

    use super::*;

    fn recipe() -> Recipe {
        Recipe {
            kind: Kind::Install,
            below: vec![TreeId::from_bytes([7; 32])],
            script: "npm install".into(),
            shell: vec!["/bin/sh".into(), "-ec".into()],
            arch: "x86_64".into(),
            user: String::new(),
            env: BTreeMap::from([("PATH".into(), "/bin".into())]),
        }
    }

    /// The recipe hash: this value may change only together with its context.
    #[test]
    fn golden_key() {
        assert_eq!(
            recipe().key().to_string(),
            "0ece1dba8e916e00dca1bc7f5aee2dfb4d45c7bbf61ccec291b5229373c846f0"
        );
    }

    #[test]
    fn every_field_is_in_the_key() {
        let changed: [fn(&mut Recipe); 8] = [
            |r| r.kind = Kind::Setup,
            |r| r.below.push(TreeId::from_bytes([7; 32])),
            |r| r.script.push(' '),
            |r| r.shell.push(String::new()),
            |r| r.arch = "aarch64".into(),
            |r| r.user = "node".into(),
            |r| r.env = BTreeMap::from([("PATH".into(), "/bin:".into())]),
            |r| r.env = BTreeMap::from([("PATH/bin".into(), String::new())]),
        ];
        let mut keys: Vec<KeyId> = changed
            .iter()
            .map(|change| {
                let mut recipe = recipe();
                change(&mut recipe);
                recipe.key()
            })
            .collect();
        keys.push(recipe().key());
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), changed.len() + 1);
    }

    fn project(files: &[(&str, &str)]) -> Layer {
        let mut tree = Tree::default();
        for (path, text) in files {
            let (dir, name) = path.rsplit_once('/').unwrap_or(("", path));
            let leaf = Leaf {
                meta: Meta {
                    mode: 0o644,
                    ..Meta::default()
                },
                content: Content::File {
                    object: ObjectId::of(text.as_bytes()),
                    size: text.len() as u64,
                },
                link: None,
            };
            let dir = tree.dir_at(dir.as_bytes()).expect("a path of the test");
            dir.entries.insert(name.as_bytes().into(), Node::Leaf(leaf));
        }
        let bytes = layer::encode(&tree).expect("a tree of the test").bytes;
        Layer::from_bytes(bytes).expect("a layer")
    }

    fn record(facts: &[(&str, Seen)], id: u8) -> Record {
        Record {
            facts: facts
                .iter()
                .map(|(path, seen)| Fact {
                    path: path.as_bytes().to_vec(),
                    seen: *seen,
                })
                .collect(),
            layer_id: LayerId::from_bytes([id; 32]),
            tree_id: TreeId::from_bytes([id; 32]),
            provenance: serde_json::Map::new(),
        }
    }

    #[test]
    fn a_step_runs_again_when_what_it_saw_has_changed_and_says_what() {
        let contents = |text: &str| Seen::Contents {
            object: ObjectId::of(text.as_bytes()),
            exec: false,
        };
        let list = |names: &[&str]| {
            Seen::listing(
                names
                    .iter()
                    .map(|name| (name.as_bytes(), iii_store::Kind::File)),
            )
        };
        let stat = |exec| Seen::Stat {
            kind: iii_store::Kind::File,
            exec,
        };
        let here = [("package.json", "{}"), ("src/a.js", "1")];
        for (seen, says) in [
            (("package.json", contents("{}")), None),
            (
                ("package.json", contents("{ }")),
                Some("package.json changed"),
            ),
            (("package.json", stat(false)), None),
            (
                ("package.json", stat(true)),
                Some("the type or mode of package.json changed"),
            ),
            (("yarn.lock", Seen::Absent), None),
            (("yarn.lock", contents("")), Some("yarn.lock is gone")),
            (("src/a.js", Seen::Absent), Some("src/a.js appeared")),
            (("src", list(&["a.js"])), None),
            (
                ("src", list(&["a.js", "b.js"])),
                Some("the entries of src changed"),
            ),
            (
                ("", list(&["package.json"])),
                Some("the entries of the project changed"),
            ),
        ] {
            let layer = project(&here);
            let told = match decide(&[record(&[seen], 1)], layer.root()) {
                Decision::Hit(_) => None,
                Decision::Run(reason) => Some(reason.to_string()),
            };
            assert_eq!(told.as_deref(), says, "{seen:?}");
        }
    }

    #[test]
    fn the_newest_record_that_holds_is_taken_and_the_newest_that_does_not_is_blamed() {
        let contents = |text: &str| Seen::Contents {
            object: ObjectId::of(text.as_bytes()),
            exec: false,
        };
        let layer = project(&[("package.json", "2"), ("lock", "x")]);
        let records = [
            record(&[("package.json", contents("3"))], 3),
            record(&[("package.json", contents("2"))], 2),
            record(&[("package.json", contents("2"))], 1),
        ];
        let Decision::Hit(hit) = decide(&records, layer.root()) else {
            panic!("one of them holds");
        };
        assert_eq!(hit.layer_id, LayerId::from_bytes([2; 32]));
        let blamed = [
            record(&[("lock", contents("y"))], 2),
            record(&[("package.json", contents("1"))], 1),
        ];
        let Decision::Run(Reason::Changed(change)) = decide(&blamed, layer.root()) else {
            panic!("none of them holds");
        };
        assert_eq!((&*change.path, change.how), (&b"lock"[..], How::Contents));
        assert_eq!(decide(&[], layer.root()), Decision::Run(Reason::New));
    }
}
