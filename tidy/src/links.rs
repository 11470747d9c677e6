//! Links and paths in documents lead to files and headings that exist.

use std::collections::BTreeMap;

use crate::markdown::{self, Document};
use crate::prose::{self, Place};
use crate::sources::{self, Format, Source};

/// `dir/../name` without `.` and `..`; the documents never leave the repository.
fn join(dir: &str, target: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in dir.split('/').chain(target.split('/')) {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

fn directory(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(dir, _)| dir)
}

/// Whether a code span reads as a path of this repository: one with a slash inside, to a file or
/// directory of it.
fn is_path(span: &str) -> bool {
    let plain = |char: char| char.is_ascii_alphanumeric() || "_-./".contains(char);
    let ends = [".rs", ".md", ".toml", "/"]
        .iter()
        .any(|end| span.ends_with(end));
    span.trim_end_matches('/').contains('/')
        && ends
        && span.chars().all(plain)
        && !span.starts_with(['.', '/'])
}

#[test]
fn links_lead_somewhere() {
    let root = sources::repository();
    let documents: Vec<Source> = sources::all()
        .into_iter()
        .filter(|source| source.format() == Format::Markdown)
        .collect();
    let parsed: BTreeMap<&str, Document<'_>> = documents
        .iter()
        .map(|source| (source.path.as_str(), markdown::parse(&source.text)))
        .collect();
    let mut faults = Vec::new();
    for (path, document) in &parsed {
        for line in &document.lines {
            for target in markdown::link_targets(line.text) {
                if target.contains("://") || target.starts_with("mailto:") {
                    continue;
                }
                let (file, anchor) = target.split_once('#').unwrap_or((&target, ""));
                let file = if file.is_empty() {
                    (*path).to_owned()
                } else {
                    join(directory(path), file)
                };
                let is_there = root.join(&file).exists();
                let has_anchor = anchor.is_empty()
                    || parsed
                        .get(file.as_str())
                        .is_some_and(|other| markdown::anchors(other).iter().any(|a| a == anchor));
                if !is_there || !has_anchor {
                    faults.push(format!("{path}:{}: no {target}", line.number));
                }
            }
            for span in markdown::code_spans(line.text).filter(|span| is_path(span)) {
                let beside = join(directory(path), span);
                if !root.join(span).exists() && !root.join(beside).exists() {
                    faults.push(format!("{path}:{}: no file {span}", line.number));
                }
            }
        }
    }
    assert!(
        faults.is_empty(),
        "links that lead nowhere:\n{}",
        faults.join("\n")
    );
}

#[test]
fn every_page_is_reached_from_the_readme() {
    let documents = sources::all();
    let mut reached = vec!["README.md".to_owned()];
    let mut next = 0;
    while let Some(path) = reached.get(next).cloned() {
        next += 1;
        let Some(source) = documents.iter().find(|source| source.path == path) else {
            continue;
        };
        for line in markdown::parse(&source.text).lines {
            for target in markdown::link_targets(line.text) {
                let file = target.split('#').next().unwrap_or_default();
                let file = join(directory(&path), file);
                if !reached.contains(&file) {
                    reached.push(file);
                }
            }
        }
    }
    let is_page = |source: &&Source| {
        let path = &source.path;
        source.format() == Format::Markdown && (path.starts_with("docs/") || !path.contains('/'))
    };
    let lost: Vec<&String> = documents
        .iter()
        .filter(is_page)
        .map(|source| &source.path)
        .filter(|path| !reached.contains(path))
        .collect();
    assert!(lost.is_empty(), "no link leads to {lost:?}");
}

#[test]
fn paths_are_told_from_other_spans() {
    for (span, expected) in [
        ("store/src/lib.rs", true),
        ("overlay/src/", true),
        ("overlay/", false),
        ("docs/start.md", true),
        ("~/.iii/dev/", false),
        ("/dev/fuse", false),
        ("./my-project/", false),
        ("lib.rs", false),
        ("docker://host/repo", false),
    ] {
        assert_eq!(is_path(span), expected, "{span}");
    }
    assert_eq!(join("docs/dev", "../start.md"), "docs/start.md");
}

/// The messages that `docs/troubleshooting.md` explains are those of the program. In a heading,
/// words in capitals stand for names and numbers.
#[test]
fn explained_messages_exist() {
    let sources = sources::all();
    let literals: String = sources
        .iter()
        .filter(|source| source.format() == Format::Rust && !source.path.starts_with("tests/"))
        .flat_map(|source| prose::of_rust(&source.text))
        .filter(|paragraph| paragraph.place == Place::Literal)
        .flat_map(|paragraph| paragraph.lines)
        .map(|(_, line)| line + "\n")
        .collect();
    let page = sources
        .iter()
        .find(|source| source.path == "docs/troubleshooting.md")
        .expect("the page exists");
    let mut missing = Vec::new();
    for line in markdown::parse(&page.text).lines {
        let Some(message) = line.text.strip_prefix("### `") else {
            continue;
        };
        let is_name = |word: &&str| word.len() > 1 && word.chars().all(|c| c.is_ascii_uppercase());
        let message = message.trim_end_matches('`');
        let names: Vec<&str> = message
            .split(|char: char| !char.is_alphanumeric())
            .filter(|word| is_name(word) && !KEPT.contains(word))
            .collect();
        let mut rest = message;
        let mut fragments = Vec::new();
        for name in names {
            let (before, behind) = rest.split_once(name).expect("it is a part");
            fragments.push(before);
            rest = behind;
        }
        fragments.push(rest);
        let known = |fragment: &&str| literals.contains(fragment.trim());
        if !fragments.iter().all(known) {
            missing.push(format!(
                "docs/troubleshooting.md:{}: {message}",
                line.number
            ));
        }
    }
    assert!(
        missing.is_empty(),
        "no such message:\n{}",
        missing.join("\n")
    );
}

/// Words in capitals that are parts of messages.
const KEPT: [&str; 2] = ["FUSE", "OCI"];
