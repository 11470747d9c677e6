//! The words and the width of documents, comments, help texts and errors.
//!
//! CONTRIBUTING.md has the rules as a reader needs them; this is the part of them that a machine
//! can hold.

use std::fmt::Write as _;

use crate::prose::{self, Paragraph, Place};
use crate::sources::{self, Format, Source};

/// Directories and files that do not yet follow the rules. Delete the line of a directory once its
/// files pass: they are held from then on.
const TO_DO: &[&str] = &[
    "engine/src/build/jobs.rs",
    "engine/src/build/mod.rs",
    "engine/src/build/realise.rs",
    "engine/src/firmware.rs",
    "engine/src/managed/add.rs",
    "engine/src/managed/mod.rs",
    "engine/src/managed/supervisor.rs",
    "engine/src/plan/mod.rs",
    "engine/src/shared_cache/mod.rs",
    "engine/src/worker/dev.rs",
    "engine/src/worker/error.rs",
    "engine/src/worker/isolation.rs",
    "engine/src/worker/place.rs",
    "engine/src/worker/program.rs",
    "engine/src/worker/session.rs",
    "engine/src/worker/snapshot.rs",
    "overlay/tests/overlay/kernel.rs",
    "overlay/tests/overlay/rebase.rs",
];

/// Most columns of a line.
const WIDTH: usize = 100;

/// Words that have a better one in each place: callers, the user, another process, the kernel.
const NEVER: &[&str] = &[
    "whoever",
    "whomever",
    "somebody",
    "nobody",
    "anybody",
    "is another",
    "are another",
    "is none",
    "is of no use",
    "are of no use",
    "cannot be had",
    "can be had",
    "besides that",
    "that is as it is",
    "lets go of",
    "let go of",
    "gives away",
    "give away",
];

/// No sentence begins with these: its subject does.
const NEVER_FIRST: &[&str] = &[
    "what ",
    "who ",
    "whoever ",
    "whatever ",
    "there is ",
    "there are ",
    "has ",
    "have the ",
    "of these ",
    "of those ",
];

/// Words that are right now and then: how often a file may have them, by its length.
const SELDOM: &[(&str, usize)] = &[("what", 400), ("who", 400), ("whatever", 1000)];

/// Sentences that pass all the same, by file and words, each for a reason.
const EXCEPTIONS: &[(&str, &str)] = &[
    // The rules name the words that they forbid.
    ("CONTRIBUTING.md", "nobody"),
    ("CONTRIBUTING.md", "somebody"),
    ("CONTRIBUTING.md", "whoever"),
];

struct Fault {
    line: usize,
    message: String,
}

/// `text` in lower case, with everything but letters, digits and the ends of sentences as one
/// space.
fn plain(text: &str) -> String {
    let mut plain = String::from(" ");
    for char in text.chars() {
        match char {
            char if char.is_alphanumeric() || "'’`".contains(char) => {
                plain.extend(char.to_lowercase());
            }
            '.' | '!' | '?' | ':' => plain.push(char),
            _ if plain.ends_with(' ') => {}
            _ => plain.push(' '),
        }
    }
    plain.push(' ');
    plain
}

/// The sentences of `text`, which is plain. A colon begins a sentence only in a literal, where it
/// ends the name of the thing that the message is about.
fn sentences(text: &str) -> impl Iterator<Item = &str> {
    let ends = [". ", "! ", "? "];
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let text = rest?;
        let end = ends.iter().filter_map(|end| text.find(end)).min();
        rest = end.map(|end| &text[end + 2..]);
        Some(text[..end.unwrap_or(text.len())].trim_start())
    })
}

fn words_of(paragraph: &Paragraph) -> Vec<Fault> {
    let mut faults = Vec::new();
    let whole: Vec<&str> = paragraph
        .lines
        .iter()
        .map(|(_, line)| line.as_str())
        .collect();
    let whole = plain(&whole.join(" "));
    let line_of = |word: &str| {
        let first = word
            .split(' ')
            .find(|word| !word.is_empty())
            .unwrap_or(word);
        let has = |(_, line): &&(usize, String)| plain(line).contains(first);
        let found = paragraph.lines.iter().find(has);
        found.unwrap_or(&paragraph.lines[0]).0
    };
    for word in NEVER {
        if whole.contains(&format!(" {word} ")) || whole.contains(&format!(" {word}.")) {
            faults.push(Fault {
                line: line_of(word),
                message: format!("`{word}`"),
            });
        }
    }
    // Literals of one word are data.
    for sentence in sentences(&whole) {
        let first = NEVER_FIRST
            .iter()
            .find(|first| sentence.starts_with(**first));
        if let Some(first) = first.filter(|_| sentence.trim().contains(' ')) {
            faults.push(Fault {
                line: line_of(first),
                message: format!("a sentence begins with `{}`", first.trim()),
            });
        }
    }
    faults
}

/// Faults that show only in a whole file.
fn density(paragraphs: &[Paragraph]) -> Vec<Fault> {
    let mut faults = Vec::new();
    let lines = || paragraphs.iter().flat_map(|paragraph| &paragraph.lines);
    let total: usize = lines()
        .map(|(_, line)| line.split_whitespace().count())
        .sum();
    for (word, share) in SELDOM {
        let most = 2 + total / share;
        let has = |line: &str| {
            plain(line)
                .split([' ', '.', ':'])
                .filter(|w| w == word)
                .count()
        };
        let found: usize = lines().map(|(_, line)| has(line)).sum();
        if found > most {
            let first = lines()
                .find(|(_, line)| has(line) > 0)
                .map_or(1, |(number, _)| *number);
            faults.push(Fault {
                line: first,
                message: format!("`{word}` {found} times; {total} words take {most}"),
            });
        }
    }
    faults
}

fn wide(source: &Source) -> Vec<Fault> {
    let text = &source.text;
    let numbers: Vec<usize> = match source.format() {
        Format::Rust => prose::wide_comments(text, WIDTH),
        Format::Markdown => {
            let lines = crate::markdown::parse(text).lines.into_iter();
            lines
                .filter(|line| !line.text.trim_start().starts_with('|'))
                .filter(|line| prose::is_wide(line.text, WIDTH) && !line.text.contains("]("))
                .map(|line| line.number)
                .collect()
        }
        Format::Hashes => {
            let lines = text.lines().enumerate();
            lines
                .filter(|(_, line)| line.trim_start().starts_with('#'))
                .filter(|(_, line)| prose::is_wide(line, WIDTH))
                .map(|(index, _)| index + 1)
                .collect()
        }
    };
    let fault = |line| Fault {
        line,
        message: format!("more than {WIDTH} columns"),
    };
    numbers.into_iter().map(fault).collect()
}

/// Literals of these are data of tests, or of this crate.
fn has_data(path: &str) -> bool {
    let parts = [
        "tests/",
        "benches/",
        "fuzz/",
        "tidy/",
        "test-support/",
        "examples/",
    ];
    parts
        .iter()
        .any(|part| path.starts_with(part) || path.contains(&format!("/{part}")))
        || path.ends_with("/tests.rs")
}

fn faults(source: &Source) -> Vec<Fault> {
    let mut paragraphs = match source.format() {
        Format::Rust => prose::of_rust(&source.text),
        Format::Markdown => prose::of_markdown(&source.text),
        Format::Hashes => prose::of_script(&source.text),
    };
    if has_data(&source.path) {
        paragraphs.retain(|paragraph| paragraph.place == Place::Text);
    }
    let excepted = |fault: &Fault| {
        let own = EXCEPTIONS.iter().filter(|(path, _)| *path == source.path);
        own.clone().any(|(_, words)| fault.message.contains(words))
    };
    let mut faults: Vec<Fault> = paragraphs.iter().flat_map(words_of).collect();
    faults.extend(density(&paragraphs));
    faults.extend(wide(source));
    faults.retain(|fault| !excepted(fault));
    faults.sort_by_key(|fault| fault.line);
    faults
}

fn report(sources: &[Source], is_held: impl Fn(&str) -> bool) -> (usize, String) {
    let (mut count, mut text) = (0, String::new());
    for source in sources.iter().filter(|source| is_held(&source.path)) {
        for fault in faults(source) {
            count += 1;
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{}:{}: {}", source.path, fault.line, fault.message);
        }
    }
    (count, text)
}

#[test]
fn words_and_widths_are_held() {
    let is_held = |path: &str| !TO_DO.iter().any(|dir| path.starts_with(dir));
    let (count, text) = report(&sources::all(), is_held);
    assert!(
        count == 0,
        "{count} faults; CONTRIBUTING.md has the rules\n{text}"
    );
}

/// `cargo test -p iii-tidy -- --ignored to_do` lists the faults of the directories to be done;
/// `III_TIDY=store/src` those of one of them, or of one file.
#[test]
#[ignore = "lists faults that are known"]
fn to_do() {
    let only = std::env::var("III_TIDY").unwrap_or_default();
    let is_held = |path: &str| {
        path.starts_with(&only) && (!only.is_empty() || TO_DO.iter().any(|d| path.starts_with(d)))
    };
    let (count, text) = report(&sources::all(), is_held);
    assert!(count == 0, "{count} faults\n{text}");
}

#[test]
fn faults_are_found() {
    let check = |path: &str, text: &str| -> Vec<(usize, String)> {
        let source = Source {
            path: path.to_owned(),
            text: text.to_owned(),
        };
        let faults = faults(&source).into_iter();
        faults.map(|fault| (fault.line, fault.message)).collect()
    };
    let wide = format!("// {}", "word ".repeat(25));
    let table = format!("| {} |", "word ".repeat(25));
    for (path, text, expected) in [
        (
            "a.md",
            "Text.\nWhat is here. Good.",
            &[(2, "a sentence begins with `what`")][..],
        ),
        ("a.md", "He said what is here.", &[]),
        (
            "a.md",
            "- There is a file.",
            &[(1, "a sentence begins with `there is`")],
        ),
        ("a.md", "`what` and `nobody` are code", &[]),
        ("a.md", "Nobody reads it.", &[(1, "`nobody`")]),
        ("a.md", "That\nis\nanother thing.", &[(2, "`is another`")]),
        ("a.md", &table, &[]),
        (
            "a.rs",
            "/// Whoever calls.",
            &[(1, "`whoever`"), (1, "a sentence begins with `whoever`")],
        ),
        (
            "a.rs",
            "let x = \"there is no x\";",
            &[(1, "a sentence begins with `there is`")],
        ),
        ("a.rs", "let x = \"what\";", &[]),
        ("a.rs", &wide, &[(1, "more than 100 columns")]),
        ("a/tests/b.rs", "let x = \"there is no x\";", &[]),
        ("a.toml", "# Somebody's.\nx = 1", &[]),
        ("a.toml", "# Of somebody.\nx = 1", &[(1, "`somebody`")]),
        (
            "a.rs",
            "// so what what\n\n// so what",
            &[(1, "`what` 3 times; 5 words take 2")],
        ),
    ] {
        let expected: Vec<_> = expected
            .iter()
            .map(|(n, text)| (*n, (*text).to_owned()))
            .collect();
        assert_eq!(check(path, text), expected, "{path}: {text}");
    }
}
