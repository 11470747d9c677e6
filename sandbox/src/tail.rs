//! A step's output: cut into lines, made safe to show, and its end kept for when the step fails.
//!
//! The bytes come from inside a sandbox. They may be of any length without a newline, in any
//! encoding, and hold sequences that would act on the terminal that shows them.

use std::collections::VecDeque;

/// How many lines [`Tail`] keeps.
pub const TAIL_LINES: usize = 20;

/// How many bytes [`Tail`] keeps, whatever the lines.
pub const TAIL_BYTES: usize = 8 << 10;

/// A longer line is cut into lines of this many bytes.
pub const MAX_LINE: usize = 1 << 10;

/// Cuts pieces of a stream into lines, never holding more than [`MAX_LINE`] bytes.
#[derive(Debug, Default)]
pub struct LineSplitter {
    partial: Vec<u8>,
}

impl LineSplitter {
    /// Calls `line` for every line that `piece` completes, without its newline.
    pub fn push(&mut self, mut piece: &[u8], mut line: impl FnMut(&[u8])) {
        while let Some(at) = piece.iter().position(|&b| b == b'\n') {
            let (head, rest) = piece.split_at(at);
            self.extend(head, &mut line);
            line(&self.partial);
            self.partial.clear();
            piece = rest.get(1..).unwrap_or_default();
        }
        self.extend(piece, &mut line);
    }

    /// Calls `line` for a last line without a newline, if any.
    pub fn finish(&mut self, mut line: impl FnMut(&[u8])) {
        if !self.partial.is_empty() {
            line(&self.partial);
            self.partial.clear();
        }
    }

    fn extend(&mut self, mut bytes: &[u8], line: &mut impl FnMut(&[u8])) {
        // `>` and not `>=`: a line of exactly the limit is not followed by an empty one.
        while self.partial.len() + bytes.len() > MAX_LINE {
            let (head, rest) = bytes.split_at(MAX_LINE - self.partial.len());
            self.partial.extend_from_slice(head);
            let carried = self.partial.split_off(char_boundary(&self.partial));
            line(&self.partial);
            self.partial = carried;
            bytes = rest;
        }
        self.partial.extend_from_slice(bytes);
    }
}

/// Where `bytes` may be cut at its end without cutting a character.
fn char_boundary(bytes: &[u8]) -> usize {
    let len = bytes.len();
    let lead = |back: &usize| {
        bytes
            .get(len - back)
            .is_some_and(|b| !(0x80..0xc0).contains(b))
    };
    match (1..=len.min(3)).find(lead) {
        Some(back) => {
            let first = bytes.get(len - back).copied().unwrap_or_default();
            let wanted = match first {
                0xf0.. => 4,
                0xe0.. => 3,
                0xc0.. => 2,
                _ => 1,
            };
            // A cut at 0 would make no progress, and only nonsense asks for one.
            if back < wanted && back < len {
                len - back
            } else {
                len
            }
        }
        None => len,
    }
}

/// A line of output as [inert] text: invalid UTF-8 replaced, and of a line that was drawn over with
/// carriage returns the last state.
pub fn clean(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(line);
    let text = text.trim_end_matches('\r');
    inert(text.rsplit('\r').next().unwrap_or_default())
}

/// `text` that only shows and does nothing to a terminal: without escape sequences, control
/// characters and the blanks at its end.
pub fn inert(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            '\x1b' => skip_escape(&mut chars),
            '\t' => out.push(c),
            c if c.is_control() => {}
            c => out.push(c),
        }
    }
    out.truncate(out.trim_end().len());
    out
}

/// Skips the rest of an escape sequence (ECMA-48), whose ESC has been read.
fn skip_escape(chars: &mut std::str::Chars<'_>) {
    match chars.next() {
        // A control sequence ends with a byte from `@` on.
        Some('[') => {
            chars.find(|c| ('@'..='~').contains(c));
        }
        // A string (title, clipboard, hyperlink …) ends with BEL or ESC \.
        Some(']' | 'P' | 'X' | '^' | '_') => {
            while let Some(c) = chars.next() {
                if c == '\x07' || (c == '\x1b' && chars.next() == Some('\\')) {
                    break;
                }
            }
        }
        // Intermediate bytes, then one more.
        Some(' '..='/') => {
            chars.find(|c| !(' '..='/').contains(c));
        }
        Some(_) | None => {}
    }
}

/// The last [`TAIL_LINES`] lines, and at most [`TAIL_BYTES`] bytes, of what was pushed. Blank lines
/// are not kept.
#[derive(Debug, Default)]
pub struct Tail {
    splitter: LineSplitter,
    ring: Ring,
}

#[derive(Debug, Default)]
struct Ring {
    lines: VecDeque<String>,
    bytes: usize,
}

impl Tail {
    /// Adds a piece of output; it may start and end anywhere in a line.
    pub fn push(&mut self, piece: &[u8]) {
        self.splitter.push(piece, |line| self.ring.push(line));
    }

    /// The lines, oldest first, each [clean].
    pub fn into_lines(mut self) -> Vec<String> {
        self.splitter.finish(|line| self.ring.push(line));
        self.ring.lines.into()
    }
}

impl Ring {
    fn push(&mut self, line: &[u8]) {
        let line = clean(line);
        if line.is_empty() {
            return;
        }
        self.bytes += line.len();
        self.lines.push_back(line);
        while self.lines.len() > TAIL_LINES || self.bytes > TAIL_BYTES {
            let dropped = self.lines.pop_front().unwrap_or_default();
            self.bytes -= dropped.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn split(pieces: &[&[u8]]) -> Vec<Vec<u8>> {
        let mut splitter = LineSplitter::default();
        let mut lines = Vec::new();
        for piece in pieces {
            splitter.push(piece, |line| lines.push(line.to_vec()));
        }
        splitter.finish(|line| lines.push(line.to_vec()));
        lines
    }

    fn tail(pieces: &[&[u8]]) -> Vec<String> {
        let mut tail = Tail::default();
        for piece in pieces {
            tail.push(piece);
        }
        tail.into_lines()
    }

    #[test]
    fn pieces_become_lines() {
        for (pieces, expected) in [
            (&[&b""[..]][..], &[][..]),
            (&[b"one\ntwo\n"], &["one", "two"]),
            (&[b"one\ntwo"], &["one", "two"]),
            (&[b"o", b"n", b"e\nt", b"wo\n"], &["one", "two"]),
            (&[b"\n\n"], &["", ""]),
            (&[b"one\n", b"\n", b"two"], &["one", "", "two"]),
        ] {
            let lines = split(pieces);
            let lines: Vec<_> = lines
                .iter()
                .map(|line| str::from_utf8(line).unwrap())
                .collect();
            assert_eq!(lines, expected, "{pieces:?}");
        }
    }

    #[test]
    fn endless_lines_are_cut_between_characters() {
        let line = vec![b'x'; MAX_LINE];
        assert_eq!(split(&[&line, b"\n"]), [line.as_slice()]);
        let endless = vec![b'x'; 1 << 20];
        assert!(split(&[&endless]).iter().all(|line| line.len() == MAX_LINE));
        for c in ["é", "☃", "🦀"] {
            for shift in 0..c.len() {
                let text = format!("{}{}", "x".repeat(shift), c.repeat(MAX_LINE));
                let lines = split(&[text.as_bytes()]);
                assert!(
                    lines.iter().all(|line| str::from_utf8(line).is_ok()),
                    "{c} {shift}"
                );
                assert_eq!(lines.concat(), text.as_bytes());
            }
        }
    }

    #[test]
    fn what_acts_on_a_terminal_is_dropped() {
        for (line, expected) in [
            (&b"plain \xe2\x9c\x93"[..], "plain ✓"),
            (b"a\tb   ", "a\tb"),
            (b"\x1b[1;31mred\x1b[0m text", "red text"),
            (b"\x1b]0;title\x07after", "after"),
            (b"\x1b]52;c;ZXZpbA==\x1b\\after", "after"),
            (b"\x1bPq#0\x1b\\after", "after"),
            (b"\x1b(Bcharset \x1bcreset", "charset reset"),
            (b"\x1b[2J\x1b[H", ""),
            (b"\x1b[31", ""),
            (b"\x1b]0;unterminated", ""),
            (b"\x1b", ""),
            (b"10%\r50%\r100%\r", "100%"),
            (b"windows\r", "windows"),
            (b"bell\x07 back\x08space \xc2\x9b31m", "bell backspace 31m"),
            (b"latin \xe9 \xff", "latin \u{fffd} \u{fffd}"),
            (b"nul\0", "nul"),
        ] {
            assert_eq!(clean(line), expected, "{line:?}");
        }
    }

    #[test]
    fn the_tail_is_the_end() {
        assert_eq!(tail(&[]), [""; 0]);
        assert_eq!(tail(&[b"one\n\n  \ntwo"]), ["one", "two"]);
        let many: Vec<String> = (0..100).map(|i| i.to_string()).collect();
        assert_eq!(tail(&[many.join("\n").as_bytes()]), many[80..]);
        let long = tail(&[&vec![b'x'; 1 << 20]]);
        assert_eq!(long.concat().len(), TAIL_BYTES);
        // Bytes that grow when they are replaced still fit.
        let invalid = tail(&[&vec![0xff; 1 << 20]]);
        assert!(!invalid.is_empty() && invalid.concat().len() <= TAIL_BYTES);
    }

    proptest! {
        #[test]
        fn any_bytes_are_kept_within_bounds(pieces in proptest::collection::vec(
            proptest::collection::vec(any::<u8>(), 0..3000), 0..8,
        )) {
            let pieces: Vec<&[u8]> = pieces.iter().map(Vec::as_slice).collect();
            let lines = tail(&pieces);
            prop_assert!(lines.len() <= TAIL_LINES);
            prop_assert!(lines.iter().map(String::len).sum::<usize>() <= TAIL_BYTES);
            prop_assert!(lines.iter().all(|line| !line.contains(|c: char| c.is_control() && c != '\t')));
            // Only newlines are cut.
            let joined: Vec<u8> = pieces.concat().into_iter().filter(|&b| b != b'\n').collect();
            prop_assert_eq!(split(&pieces).concat(), joined);
        }
    }
}
