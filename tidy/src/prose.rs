//! Takes sources apart into the sentences that people read.

use crate::markdown;

/// Where a paragraph stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// A document, or a comment of any language.
    Text,
    /// A string literal of Rust: an error, a hint, a help text.
    Literal,
}

/// Lines that are read as one.
#[derive(Debug, PartialEq, Eq)]
pub struct Paragraph {
    pub place: Place,
    /// Each with its number in the file, from 1.
    pub lines: Vec<(usize, String)>,
}

/// A line of Rust, or a part of one, by its role.
enum Piece {
    /// Whether code stands before it, and the text behind `//`, `///` or `//!`.
    Comment(bool, String),
    Literal(String),
}

fn is_item(text: &str) -> bool {
    let text = text.trim_start();
    let digits = text.trim_start_matches(|char: char| char.is_ascii_digit());
    text.starts_with("- ")
        || text.starts_with("* ")
        || (digits.len() < text.len() && digits.starts_with(". "))
}

/// Adds `text` to the open paragraph, or opens one where `text` begins an item or a heading.
fn add(open: &mut Vec<(usize, String)>, found: &mut Vec<Paragraph>, number: usize, text: &str) {
    let text = text.trim();
    if text.is_empty() || is_item(text) || text.starts_with(['#', '|']) {
        close(open, found);
    }
    if !text.is_empty() {
        let plain = markdown::without_code(text);
        open.push((number, plain));
    }
    if text.starts_with('#') {
        close(open, found);
    }
}

fn close(open: &mut Vec<(usize, String)>, found: &mut Vec<Paragraph>) {
    if !open.is_empty() {
        found.push(Paragraph {
            place: Place::Text,
            lines: std::mem::take(open),
        });
    }
}

/// The paragraphs of a Markdown document, without fenced blocks and code spans.
pub fn of_markdown(text: &str) -> Vec<Paragraph> {
    let (mut found, mut open) = (Vec::new(), Vec::new());
    let mut last = 0;
    for line in markdown::parse(text).lines {
        // A block or a comment stood between.
        if line.number != last + 1 {
            close(&mut open, &mut found);
        }
        last = line.number;
        if line.text.starts_with("    ") && open.is_empty() {
            continue;
        }
        if let Some(row) = line.text.trim().strip_prefix('|') {
            close(&mut open, &mut found);
            for cell in row.split('|') {
                add(&mut open, &mut found, line.number, cell);
                close(&mut open, &mut found);
            }
            continue;
        }
        add(&mut open, &mut found, line.number, line.text);
    }
    close(&mut open, &mut found);
    found
}

/// The comments of a script, of TOML or of YAML.
pub fn of_script(text: &str) -> Vec<Paragraph> {
    let (mut found, mut open) = (Vec::new(), Vec::new());
    for (index, line) in text.lines().enumerate() {
        match script_comment(line) {
            Some(comment) => add(&mut open, &mut found, index + 1, comment),
            None => close(&mut open, &mut found),
        }
    }
    close(&mut open, &mut found);
    found
}

fn script_comment(line: &str) -> Option<&str> {
    if let Some(comment) = line.trim_start().strip_prefix('#') {
        return (!comment.starts_with('!')).then_some(comment);
    }
    line.split_once(" # ").map(|(_, comment)| comment)
}

/// The comments of a Rust file, and the string literals of what is no test.
pub fn of_rust(text: &str) -> Vec<Paragraph> {
    let (mut found, mut open) = (Vec::new(), Vec::new());
    let tests = text.find("#[cfg(test)]\nmod ");
    let tests = tests.map_or(usize::MAX, |at| text[..at].lines().count());
    let mut fenced = false;
    let mut last = 0;
    for (number, piece) in pieces(text) {
        match piece {
            Piece::Comment(is_trailing, comment) => {
                if number > last + 1 || is_trailing {
                    close(&mut open, &mut found);
                    fenced = false;
                }
                last = number;
                if comment.trim_start().starts_with("```") {
                    fenced = !fenced;
                    close(&mut open, &mut found);
                } else if !fenced && !is_drawing(&comment) {
                    let cell = comment.trim_start().starts_with('|');
                    add(
                        &mut open,
                        &mut found,
                        number,
                        comment.trim().trim_matches('|'),
                    );
                    if cell {
                        close(&mut open, &mut found);
                    }
                }
            }
            Piece::Literal(text) if number <= tests => {
                let lines = text.lines().enumerate();
                let lines: Vec<_> = lines
                    .map(|(index, line)| {
                        (
                            number + index,
                            without_values(&markdown::without_code(line.trim())),
                        )
                    })
                    .filter(|(_, line)| !line.is_empty())
                    .collect();
                if !lines.is_empty() {
                    found.push(Paragraph {
                        place: Place::Literal,
                        lines,
                    });
                }
            }
            Piece::Literal(_) => {}
        }
    }
    close(&mut open, &mut found);
    found
}

/// `text` without the values of a format string, each replaced by one `` ` ``.
fn without_values(text: &str) -> String {
    let mut depth = 0_usize;
    let kept = text.chars().filter_map(|char| {
        let was = depth;
        match char {
            '{' => depth += 1,
            '}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        match (was, depth) {
            (0, 1) => Some('`'),
            (0, 0) => Some(char),
            _ => None,
        }
    });
    kept.collect()
}

/// Whether a comment is a figure, or code that is indented as such.
fn is_drawing(comment: &str) -> bool {
    comment.starts_with("    ") || comment.chars().any(|char| ('─'..='▟').contains(&char))
}

/// The numbers of lines of Rust that are longer than `most` columns because of a comment, unless
/// one word, such as an address, is what does not fit.
pub fn wide_comments(text: &str, most: usize) -> Vec<usize> {
    let lines: Vec<&str> = text.lines().collect();
    let wide = pieces(text).into_iter().filter(|(number, piece)| {
        let line = lines[number - 1];
        matches!(piece, Piece::Comment(..)) && is_wide(line, most)
    });
    wide.map(|(number, _)| number).collect()
}

/// Whether `line` has more than `most` columns and could be broken before them.
pub fn is_wide(line: &str, most: usize) -> bool {
    let Some((at, _)) = line.char_indices().nth(most) else {
        return false;
    };
    let indented = line.trim_start_matches(['/', '!', '#', '-', ' ', '*']);
    let start = line.len() - indented.len();
    let end = line[at..].find(' ').map_or(line.len(), |space| at + space);
    // More than one word, or a word that ends a line alone.
    line[start.min(at)..at].contains(' ') || end < line.len()
}

/// The comments and string literals of a Rust file, each with the number of its first line.
fn pieces(text: &str) -> Vec<(usize, Piece)> {
    let chars: Vec<char> = text.chars().collect();
    let mut found = Vec::new();
    let (mut at, mut line, mut start) = (0, 1, 0);
    while at < chars.len() {
        let rest = &chars[at..];
        let before = at.checked_sub(1).map(|at| chars[at]);
        match rest {
            ['\n', ..] => {
                line += 1;
                at += 1;
                start = at;
            }
            ['/', '/', ..] => {
                let end = rest.iter().position(|&char| char == '\n');
                let end = at + end.unwrap_or(rest.len());
                let comment: String = chars[at..end].iter().collect();
                let body = ["///", "//!", "//"]
                    .iter()
                    .find_map(|mark| comment.strip_prefix(mark));
                found.push((
                    line,
                    Piece::Comment(
                        is_code(&chars[start..at]),
                        body.unwrap_or_default().to_owned(),
                    ),
                ));
                at = end;
            }
            ['/', '*', ..] => {
                let end = (at + 2..chars.len()).find(|&end| chars[end..].starts_with(&['*', '/']));
                let end = end.map_or(chars.len(), |end| end + 2);
                line += chars[at..end].iter().filter(|&&char| char == '\n').count();
                at = end;
            }
            ['r', '"' | '#', ..] if !before.is_some_and(is_word) && raw_string(rest).is_some() => {
                let (body, length) = raw_string(rest).expect("the guard asked");
                let first = line;
                line += body.matches('\n').count();
                found.push((first, Piece::Literal(body)));
                at += length;
            }
            ['"', ..] => {
                let (body, length, newlines) = string(rest);
                found.push((line, Piece::Literal(body)));
                line += newlines;
                at += length;
            }
            ['\'', '\\', ..] => {
                let end = (3..rest.len()).find(|&end| rest[end] == '\'');
                at += end.map_or(rest.len(), |end| end + 1);
            }
            ['\'', _, '\'', ..] => at += 3,
            _ => at += 1,
        }
    }
    found
}

fn is_code(before: &[char]) -> bool {
    before.iter().any(|char| !char.is_whitespace())
}

fn is_word(char: char) -> bool {
    char.is_alphanumeric() || char == '_'
}

/// The body of the raw string that `chars` begin with, and its length with all marks.
fn raw_string(chars: &[char]) -> Option<(String, usize)> {
    let hashes = chars[1..].iter().take_while(|&&char| char == '#').count();
    let open = 1 + hashes;
    if chars.get(open) != Some(&'"') {
        return None;
    }
    let close: Vec<char> = std::iter::once('"')
        .chain(std::iter::repeat_n('#', hashes))
        .collect();
    let end = (open + 1..chars.len()).find(|&end| chars[end..].starts_with(&close))?;
    Some((chars[open + 1..end].iter().collect(), end + close.len()))
}

/// The body of the string that `chars` begin with, with escaped ends of lines joined and `\n` as
/// such; its length with all marks; and how many lines of the source it ends.
fn string(chars: &[char]) -> (String, usize, usize) {
    let (mut body, mut at, mut newlines) = (String::new(), 1, 0);
    while let Some(&char) = chars.get(at) {
        at += 1;
        match char {
            '"' => break,
            '\\' => {
                match chars.get(at) {
                    Some('\n') => {
                        newlines += 1;
                        while chars.get(at + 1).is_some_and(|char| *char == ' ') {
                            at += 1;
                        }
                    }
                    Some('n') => body.push('\n'),
                    Some('"') => body.push('"'),
                    _ => {}
                }
                at += 1;
            }
            char => {
                newlines += usize::from(char == '\n');
                body.push(char);
            }
        }
    }
    (body, at, newlines)
}

#[cfg(test)]
mod tests {
    use super::Place::{Literal, Text};
    use super::*;

    fn joined(paragraphs: &[Paragraph]) -> Vec<(Place, usize, String)> {
        let joined = paragraphs.iter().map(|paragraph| {
            let lines: Vec<&str> = paragraph
                .lines
                .iter()
                .map(|(_, line)| line.as_str())
                .collect();
            (paragraph.place, paragraph.lines[0].0, lines.join(" "))
        });
        joined.collect()
    }

    #[test]
    fn rust_is_comments_and_literals() {
        let text = "\
//! First
//! second.
//!
//! Third `code`.
fn f() { // trailing
    let a = \"text {what:?} \\\n        goes on\"; let b = 'x'; let c = '\"';
    let d = r#\"raw \"quoted\"\"#; let e: &'static str = b;
}
/// - item one
/// - item two
struct S;
#[cfg(test)]
mod tests {
    const T: &str = \"of a test\"; // comment
}
";
        let expected = [
            (Text, 1, "First second."),
            (Text, 4, "Third `."),
            (Literal, 6, "text ` goes on"),
            (Literal, 8, "raw \"quoted\""),
            (Text, 5, "trailing"),
            (Text, 10, "- item one"),
            (Text, 11, "- item two"),
            (Text, 15, "comment"),
        ];
        let expected = expected.map(|(place, line, text)| (place, line, text.to_owned()));
        let mut found = joined(&of_rust(text));
        let mut expected = expected.to_vec();
        found.sort_by_key(|(_, line, _)| *line);
        expected.sort_by_key(|(_, line, _)| *line);
        assert_eq!(found, expected);
    }

    #[test]
    fn markdown_is_paragraphs_items_and_cells() {
        let text =
            "# Head\nText\ngoes on.\n- item\n  more\n\n| a | b `c` |\n|---|---|\n\n```\nx\n```\n";
        let found: Vec<String> = joined(&of_markdown(text))
            .into_iter()
            .map(|(.., t)| t)
            .collect();
        assert_eq!(
            found,
            [
                "# Head",
                "Text goes on.",
                "- item more",
                "a",
                "b `",
                "---",
                "---"
            ]
        );
    }

    #[test]
    fn scripts_are_their_comments() {
        let text = "#!/bin/sh\n# One\n# two.\nx=1 # three\necho '#'\n";
        let found: Vec<String> = joined(&of_script(text))
            .into_iter()
            .map(|(.., t)| t)
            .collect();
        assert_eq!(found, ["One two. three"]);
    }

    #[test]
    fn a_word_that_does_not_fit_is_not_wide() {
        for (line, expected) in [
            ("short", false),
            ("// https://example.com/a/very/long/address", false),
            ("// words and more words and", true),
            ("- [a link](https://example.com/a/b/c/d)", true),
        ] {
            assert_eq!(is_wide(line, 20), expected, "{line}");
        }
    }
}
