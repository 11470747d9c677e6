//! Files that install made or changed among the project's own.
//!
//! They are in install's layer and not in the project's directory, so version control does not see
//! them: above all a lock file that a package manager completed.

use std::fmt;

use iii_store::facts::{How, path_text};
use iii_store::{Kind, Layer, NodeRef};

use crate::plan::{EXCLUDED, WORKSPACE};

/// Lock files of package managers.
const LOCK_FILES: [&str; 7] = [
    "package-lock.json",
    "yarn.lock",
    "pnpm-lock.yaml",
    "bun.lock",
    "uv.lock",
    "poetry.lock",
    "Cargo.lock",
];
/// Most files of one list that are named.
const MAX_NAMED: usize = 5;

/// Files of a layer beside or over those of the project, by path.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OwnFiles {
    /// Lock files that the project does not have.
    pub made: Vec<String>,
    /// Files of the project that are different in the layer.
    pub changed: Vec<String>,
}

impl OwnFiles {
    /// Those of `layer` over `project`. Only directories that the project has are searched, so the
    /// lock files of installed packages do not count.
    pub fn of(layer: &Layer, project: &Layer) -> Self {
        let mut found = Self::default();
        let roots = [layer, project].map(|layer| layer.lookup(WORKSPACE.as_bytes()));
        let [Some(upper), Some(lower)] = roots else {
            return found;
        };
        let mut open = vec![(Vec::new(), upper, lower)];
        while let Some((path, upper, lower)) = open.pop() {
            for node in upper.children() {
                let name = node.name();
                if EXCLUDED.iter().any(|excluded| excluded.as_bytes() == name) {
                    continue;
                }
                let mut path = path.clone();
                if !path.is_empty() {
                    path.push(b'/');
                }
                path.extend_from_slice(name);
                match (node.kind(), lower.child(name)) {
                    (Kind::Dir, Some(own)) if own.kind() == Kind::Dir => {
                        open.push((path, node, own));
                    }
                    (Kind::File, None) if is_lock_file(name) => {
                        found.made.push(path_text(&path));
                    }
                    (Kind::File | Kind::Symlink, Some(own)) if is_different(node, own) => {
                        found.changed.push(path_text(&path));
                    }
                    _ => {}
                }
            }
        }
        found.made.sort_unstable();
        found.changed.sort_unstable();
        found
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.made.is_empty() && self.changed.is_empty()
    }
}

fn is_lock_file(name: &[u8]) -> bool {
    LOCK_FILES.iter().any(|lock| lock.as_bytes() == name)
}

/// As facts see it: other times and owners make no difference.
fn is_different(node: NodeRef<'_>, own: NodeRef<'_>) -> bool {
    let how = How::full(node.kind());
    how.at(Some(node)) != how.at(Some(own))
}

impl fmt::Display for OwnFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lists = [("made", &self.made), ("changed", &self.changed)];
        let mut before = "";
        for (verb, paths) in lists.into_iter().filter(|(_, paths)| !paths.is_empty()) {
            let named = &paths[..paths.len().min(MAX_NAMED)];
            write!(f, "{before}{verb} {}", named.join(", "))?;
            if paths.len() > MAX_NAMED {
                write!(f, " and {} more", paths.len() - MAX_NAMED)?;
            }
            before = ", ";
        }
        let them = match self.made.len() + self.changed.len() {
            1 => "it",
            _ => "them",
        };
        write!(f, "; copy {them} into the project to keep {them}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_names_the_first_files_and_counts_the_rest() {
        let paths = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        let many = ["a", "b", "c", "d", "e", "f", "g"];
        for (made, changed, says) in [
            (
                &["yarn.lock"][..],
                &[][..],
                "made yarn.lock; copy it into the project to keep it",
            ),
            (
                &["uv.lock"],
                &["run.sh"],
                "made uv.lock, changed run.sh; copy them into the project to keep them",
            ),
            (
                &[],
                &many,
                "changed a, b, c, d, e and 2 more; copy them into the project to keep them",
            ),
        ] {
            let own = OwnFiles {
                made: paths(made),
                changed: paths(changed),
            };
            assert_eq!(own.to_string(), says);
        }
    }
}
