//! The parts of a Markdown document that can be checked: fenced blocks, links and headings.

/// A fenced block of a document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// Line of the opening fence, from 1.
    pub line: usize,
    /// The word behind the opening fence; empty without one.
    pub language: String,
    /// Text of the HTML comment that stands directly above the fence.
    pub directive: Option<String>,
    /// The lines between the fences.
    pub lines: Vec<String>,
}

/// A line of a document outside fenced blocks and HTML comments, with its number from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Line<'a> {
    /// Number in the document, from 1.
    pub number: usize,
    /// The line without its end.
    pub text: &'a str,
}

/// A document, split into fenced blocks and the lines between them.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Document<'a> {
    /// In the order of the document.
    pub blocks: Vec<Block>,
    /// In the order of the document. HTML comments are left out.
    pub lines: Vec<Line<'a>>,
}

/// Splits `text`. An unclosed fence or comment extends to the end of the document.
pub fn parse(text: &str) -> Document<'_> {
    let mut document = Document::default();
    let mut directive: Option<String> = None;
    let mut lines = text.lines().enumerate();
    while let Some((index, line)) = lines.next() {
        let trimmed = line.trim_start();
        if let Some(language) = trimmed.strip_prefix("```") {
            let body = lines
                .by_ref()
                .map(|(_, line)| line)
                .take_while(|line| line.trim_start() != "```");
            document.blocks.push(Block {
                line: index + 1,
                language: language.trim().to_owned(),
                directive: directive.take(),
                lines: body.map(str::to_owned).collect(),
            });
        } else if let Some(comment) = trimmed.strip_prefix("<!--") {
            let mut comment = comment.to_owned();
            while !comment.contains("-->") {
                let Some((_, more)) = lines.next() else { break };
                comment.push(' ');
                comment.push_str(more.trim());
            }
            let end = comment.find("-->").unwrap_or(comment.len());
            directive = Some(comment[..end].trim().to_owned());
        } else {
            if !trimmed.is_empty() {
                directive = None;
            }
            document.lines.push(Line {
                number: index + 1,
                text: line,
            });
        }
    }
    document
}

/// `line` without its code spans, each replaced by one `` ` ``, so that offsets change but words
/// around a span stay apart.
pub fn without_code(line: &str) -> String {
    let parts = line.split('`').enumerate();
    parts.fold(String::new(), |mut text, (index, part)| {
        if index % 2 == 0 {
            text.push_str(part);
        } else {
            text.push('`');
        }
        text
    })
}

/// The code spans of `line`.
pub fn code_spans(line: &str) -> impl Iterator<Item = &str> {
    line.split('`').skip(1).step_by(2)
}

/// The targets of the links in `line`, as in `[text](target)`.
pub fn link_targets(line: &str) -> Vec<String> {
    let text = without_code(line);
    let mut targets = Vec::new();
    let mut rest = text.as_str();
    while let Some((_, behind)) = rest.split_once("](") {
        let Some((target, behind)) = behind.split_once(')') else {
            break;
        };
        targets.push(target.to_owned());
        rest = behind;
    }
    targets
}

/// The anchor that a forge gives to a heading: lower case, spaces as `-`, other punctuation left
/// out.
pub fn anchor(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim().to_lowercase();
    text.chars()
        .filter_map(|char| match char {
            ' ' => Some('-'),
            '-' | '_' => Some(char),
            char if char.is_alphanumeric() => Some(char),
            _ => None,
        })
        .collect()
}

/// The anchors of a document's headings.
pub fn anchors(document: &Document<'_>) -> Vec<String> {
    let headings = document
        .lines
        .iter()
        .filter(|line| line.text.starts_with('#'));
    headings.map(|line| anchor(line.text)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "\
# A page: `with` code

Text with a [link](other.md#part) and `[no](link)`.

<!-- not run: needs a
     registry -->
```console
$ iii image pull x
```

<!-- of the text, not of the block -->
More.

```
plain
```
";

    #[test]
    fn a_block_has_the_comment_above_it() {
        let document = parse(PAGE);
        let found: Vec<_> = document
            .blocks
            .iter()
            .map(|block| {
                let directive = block.directive.as_deref();
                (
                    block.line,
                    block.language.as_str(),
                    directive,
                    block.lines.join("|"),
                )
            })
            .collect();
        assert_eq!(
            found,
            [
                (
                    7,
                    "console",
                    Some("not run: needs a registry"),
                    "$ iii image pull x".to_owned()
                ),
                (14, "", None, "plain".to_owned()),
            ]
        );
        assert!(
            document
                .lines
                .iter()
                .all(|line| !line.text.contains("<!--"))
        );
    }

    #[test]
    fn links_are_found_outside_code() {
        assert_eq!(
            link_targets("a [link](other.md#part) and `[no](link)`"),
            ["other.md#part"]
        );
        assert_eq!(code_spans("`a` b `c`").collect::<Vec<_>>(), ["a", "c"]);
    }

    #[test]
    fn anchors_are_those_of_a_forge() {
        assert_eq!(anchors(&parse(PAGE)), ["a-page-with-code"]);
        assert_eq!(anchor("## Exit codes, and III_GC"), "exit-codes-and-iii_gc");
    }
}
