//! YAML files written by people, read with the line of every value.
//!
//! Both files this tool reads (`iii.worker.yaml`, `config.yaml`) promise errors that name the file,
//! the line and the field, for a wrong *value* as much as for wrong syntax. A serde front end
//! reports one position per failure and types its message for Rust programmers, and `serde_yaml` is
//! no longer maintained; so this is a small tree over the events of `saphyr-parser`, and the
//! callers pick their fields out of it.
//!
//! A hostile file is bounded here: its size before it is read ([`Document::read`]), its depth
//! ([`MAX_DEPTH`]), and the expansion of its aliases ([`MAX_EXPANDED`]). Aliases share
//! their target, so even a file at the bounds costs memory in proportion to its bytes.

use std::collections::HashMap;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use saphyr_parser::{Event, Parser, ScalarStyle, ScanError, Span, Tag};

/// How deep lists and mappings may nest, aliases included. Manifests need 3 levels; recursion over
/// a tree relies on it.
pub const MAX_DEPTH: usize = 32;

/// Most bytes of a tree with every alias written out: the bytes of its text plus 32 per value.
pub const MAX_EXPANDED: usize = 8 << 20;

/// Bytes that a value counts towards [`MAX_EXPANDED`] besides its text.
const NODE_SIZE: usize = 32;

/// A text longer than this is shortened where a message quotes it.
const MAX_QUOTED: usize = 60;

/// A file that could not be read as a document. Each message starts with `path:` or
/// `path:line:`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DocumentError {
    /// The file could not be opened or read.
    #[error("{}: cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A directory, a FIFO, or the like is in the file's place.
    #[error("{}: is not a regular file", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// The file is larger than such a file may be.
    #[error("{}: larger than the {limit} bytes allowed for this file", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The cap it exceeds.
        limit: u64,
    },
    /// The file is not text in UTF-8.
    #[error("{}:{line}: not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8", path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// The line of the first wrong byte.
        line: usize,
        /// That byte.
        byte: u8,
    },
    /// The file is not YAML of the kind that is accepted.
    #[error("{}:{line}: {problem}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where.
        line: usize,
        /// The fault there.
        problem: SyntaxProblem,
    },
    /// A field is unknown, missing, or has a wrong value.
    #[error("{}:{line}: {field}: {problem}", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// Where.
        line: usize,
        /// Which, in full: `runtime.kind`.
        field: String,
        /// The fault.
        problem: FieldProblem,
    },
}

/// A fault of the YAML itself.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SyntaxProblem {
    /// The parser's own complaint.
    #[error("invalid YAML: {}", .0.info())]
    Scan(ScanError),
    /// A second document follows.
    #[error("a second YAML document starts here; only one is allowed")]
    SecondDocument,
    /// The document as a whole is not `key: value` lines.
    #[error("expected `key: value` lines at the top level; found {found}")]
    NotAMapping {
        /// Its actual type.
        found: String,
    },
    /// The same key twice in one mapping.
    #[error("duplicate key `{key}`, first given on line {first}")]
    DuplicateKey {
        /// The key.
        key: String,
        /// The line that has it already.
        first: usize,
    },
    /// A list or a mapping as a key.
    #[error("a key must be a word, not {found}")]
    ComplexKey {
        /// Its type.
        found: &'static str,
    },
    /// `!include` and the like.
    #[error("the tag `{tag}` is not supported")]
    Tag {
        /// The tag.
        tag: String,
    },
    /// An alias inside its own anchor.
    #[error("an alias refers to the value that contains it")]
    RecursiveAlias,
    /// Deeper than [`MAX_DEPTH`].
    #[error("nested more than {MAX_DEPTH} levels deep")]
    TooDeep,
    /// More than [`MAX_EXPANDED`].
    #[error("its aliases expand to more than {MAX_EXPANDED} bytes")]
    TooMuch,
}

/// A fault of a field.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FieldProblem {
    /// No such field.
    #[error("unknown key{}", suggest(meant.as_deref(), expected))]
    UnknownKey {
        /// The closest field that exists.
        meant: Option<String>,
        /// The fields that exist there.
        expected: &'static [&'static str],
    },
    /// A required field is absent.
    #[error("missing; {why}")]
    Missing {
        /// The reason why it is required.
        why: &'static str,
    },
    /// A value of the wrong type, or none of those allowed.
    #[error("expected {expected}; found {found}")]
    Expected {
        /// The accepted values.
        expected: String,
        /// The present value.
        found: String,
    },
    /// A value of the right type that cannot be used.
    #[error("{found}: {why}")]
    Invalid {
        /// The value.
        found: String,
        /// The violated rule.
        why: String,
    },
}

fn suggest(meant: Option<&str>, expected: &[&str]) -> String {
    match meant {
        Some(meant) => format!("; did you mean `{meant}`?"),
        None => format!("; the keys known here are {}", expected.join(", ")),
    }
}

/// A value and where it is.
#[derive(Debug)]
pub(super) struct Node {
    pub line: usize,
    pub kind: Kind,
    height: usize,
    expanded: usize,
}

#[derive(Debug)]
pub(super) enum Kind {
    Scalar {
        text: String,
        /// Not quoted, so that `5`, `true` and an empty value are not strings.
        plain: bool,
    },
    List(Vec<Rc<Node>>),
    Map(Vec<Entry>),
}

/// One `key: value` of a mapping.
#[derive(Debug)]
pub(super) struct Entry {
    pub key: String,
    pub line: usize,
    pub value: Rc<Node>,
}

/// Type of a scalar by YAML 1.2's core schema.
#[derive(Debug, PartialEq)]
pub(super) enum Scalar<'a> {
    Null,
    Bool(bool),
    Int(i64),
    Float(f64),
    Str(&'a str),
}

impl Node {
    fn new(line: usize, kind: Kind) -> Self {
        let (height, expanded) = match &kind {
            Kind::Scalar { text, .. } => (0, text.len()),
            Kind::List(items) => items.iter().fold((1, 0), |(height, sum), item| {
                (height.max(item.height + 1), sum + item.expanded)
            }),
            Kind::Map(entries) => entries.iter().fold((1, 0), |(height, sum), entry| {
                (
                    height.max(entry.value.height + 1),
                    sum + entry.key.len() + entry.value.expanded,
                )
            }),
        };
        Node {
            line,
            kind,
            height,
            expanded: expanded + NODE_SIZE,
        }
    }

    /// The scalar this is, if it is one.
    pub fn scalar(&self) -> Option<Scalar<'_>> {
        match &self.kind {
            Kind::Scalar { text, plain: true } => Some(resolve(text)),
            Kind::Scalar { text, plain: false } => Some(Scalar::Str(text)),
            Kind::List(_) | Kind::Map(_) => None,
        }
    }

    /// Nothing was written after the colon, or `~` or `null`.
    pub fn is_null(&self) -> bool {
        self.scalar() == Some(Scalar::Null)
    }

    /// Description for a message.
    pub fn describe(&self) -> String {
        match (&self.kind, self.scalar()) {
            (Kind::List(_), _) => "a list".into(),
            (Kind::Map(_), _) => "a mapping".into(),
            (_, Some(Scalar::Null) | None) => "nothing".into(),
            (_, Some(Scalar::Str(text))) => quote(text),
            (Kind::Scalar { text, .. }, Some(Scalar::Bool(_))) => {
                format!("the boolean {}", shorten(text))
            }
            (Kind::Scalar { text, .. }, Some(Scalar::Int(_) | Scalar::Float(_))) => {
                format!("the number {}", shorten(text))
            }
        }
    }

    /// The same value as JSON. A number that JSON cannot hold stays text.
    pub fn to_json(&self) -> serde_json::Value {
        use serde_json::Value;
        match (&self.kind, self.scalar()) {
            (Kind::List(items), _) => items.iter().map(|item| item.to_json()).collect(),
            (Kind::Map(entries), _) => Value::Object(
                entries
                    .iter()
                    .map(|entry| (entry.key.clone(), entry.value.to_json()))
                    .collect(),
            ),
            (_, Some(Scalar::Bool(value))) => value.into(),
            (_, Some(Scalar::Int(value))) => value.into(),
            (Kind::Scalar { text, .. }, Some(Scalar::Float(value))) => {
                serde_json::Number::from_f64(value)
                    .map_or_else(|| text.clone().into(), Value::Number)
            }
            (_, Some(Scalar::Str(text))) => text.into(),
            (_, Some(Scalar::Null) | None) => Value::Null,
        }
    }
}

fn resolve(text: &str) -> Scalar<'_> {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Scalar::Null,
        "true" | "True" | "TRUE" => return Scalar::Bool(true),
        "false" | "False" | "FALSE" => return Scalar::Bool(false),
        ".nan" | ".NaN" | ".NAN" => return Scalar::Float(f64::NAN),
        _ => {}
    }
    if let Some(hex) = text.strip_prefix("0x") {
        return i64::from_str_radix(hex, 16).map_or(Scalar::Str(text), Scalar::Int);
    }
    if let Some(octal) = text.strip_prefix("0o") {
        return i64::from_str_radix(octal, 8).map_or(Scalar::Str(text), Scalar::Int);
    }
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    if matches!(unsigned, ".inf" | ".Inf" | ".INF") {
        let sign = if text.starts_with('-') { -1.0 } else { 1.0 };
        return Scalar::Float(sign * f64::INFINITY);
    }
    // Rust's parser also takes `inf`, `nan` and `infinity`, which YAML reads as words.
    let numeric = unsigned
        .bytes()
        .all(|b| b.is_ascii_digit() || matches!(b, b'.' | b'e' | b'E' | b'+' | b'-'))
        && unsigned.bytes().any(|b| b.is_ascii_digit());
    if !numeric {
        return Scalar::Str(text);
    }
    if let Ok(int) = text.parse() {
        return Scalar::Int(int);
    }
    text.parse().map_or(Scalar::Str(text), Scalar::Float)
}

/// Whether `text`, not in quotes, is a string.
pub(super) fn is_word(text: &str) -> bool {
    matches!(resolve(text), Scalar::Str(_))
}

/// `text` in quotes, control characters escaped, shortened for a message.
pub(super) fn quote(text: &str) -> String {
    format!("{:?}", shorten(text))
}

fn shorten(text: &str) -> String {
    match text.char_indices().nth(MAX_QUOTED) {
        Some((at, _)) => format!("{}…", text.get(..at).unwrap_or_default()),
        None => text.to_owned(),
    }
}

/// The text of `path`, of which at most `limit` bytes may exist.
pub(super) fn read_text(path: &Path, limit: u64) -> Result<String, DocumentError> {
    text_of(path, &read_bytes(path, limit)?).map(str::to_owned)
}

fn read_bytes(path: &Path, limit: u64) -> Result<Vec<u8>, DocumentError> {
    let fail = |source| DocumentError::Read {
        path: path.to_owned(),
        source,
    };
    // Asked first, since opening a FIFO would wait for its writer.
    if !fs::metadata(path).map_err(fail)?.is_file() {
        return Err(DocumentError::NotAFile {
            path: path.to_owned(),
        });
    }
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(limit.saturating_add(1)).read_to_end(&mut bytes))
        .map_err(fail)?;
    if bytes.len() as u64 > limit {
        return Err(DocumentError::TooLarge {
            path: path.to_owned(),
            limit,
        });
    }
    Ok(bytes)
}

fn text_of<'b>(path: &Path, bytes: &'b [u8]) -> Result<&'b str, DocumentError> {
    str::from_utf8(bytes).map_err(|error| {
        let (before, after) = bytes.split_at(error.valid_up_to());
        DocumentError::NotUtf8 {
            path: path.to_owned(),
            line: before.split(|&b| b == b'\n').count(),
            byte: after.first().copied().unwrap_or_default(),
        }
    })
}

/// A parsed file.
#[derive(Debug)]
pub(super) struct Document {
    path: PathBuf,
    root: Rc<Node>,
}

impl Document {
    /// Reads and parses `path`, of which at most `limit` bytes may exist. An empty file is an empty
    /// mapping.
    pub fn read(path: &Path, limit: u64) -> Result<Self, DocumentError> {
        Self::parse(path, &read_bytes(path, limit)?)
    }

    /// Parses the file `path`.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self, DocumentError> {
        let text = text_of(path, bytes)?;
        let syntax = |(line, problem)| DocumentError::Syntax {
            path: path.to_owned(),
            line,
            problem,
        };
        let root = load(text.strip_prefix('\u{feff}').unwrap_or(text))
            .map_err(syntax)?
            .unwrap_or_else(|| Rc::new(Node::new(1, Kind::Map(Vec::new()))));
        let root = match &root.kind {
            Kind::Map(_) => root,
            _ if root.is_null() => Rc::new(Node::new(1, Kind::Map(Vec::new()))),
            _ => {
                let found = root.describe();
                return Err(syntax((root.line, SyntaxProblem::NotAMapping { found })));
            }
        };
        Ok(Document {
            path: path.to_owned(),
            root,
        })
    }

    /// All that it says.
    pub fn to_json(&self) -> serde_json::Value {
        self.root.to_json()
    }

    /// The top-level mapping.
    pub fn table(&self) -> Table<'_> {
        let entries = match &self.root.kind {
            Kind::Map(entries) => entries.as_slice(),
            _ => &[],
        };
        Table {
            document: self,
            name: String::new(),
            line: self.root.line,
            entries,
        }
    }
}

/// A mapping, with the means to report faults in it.
#[derive(Debug)]
pub(super) struct Table<'a> {
    document: &'a Document,
    /// The field this is the value of; empty at the top.
    name: String,
    /// Where it starts.
    pub line: usize,
    pub entries: &'a [Entry],
}

impl<'a> Table<'a> {
    /// The full name of the field `key` of this mapping.
    pub fn field(&self, key: &str) -> String {
        // A key is a stranger's: control characters are escaped, and its length is
        // limited.
        let key = shorten(key);
        let key = key.escape_debug();
        if self.name.is_empty() {
            key.to_string()
        } else {
            format!("{}.{key}", self.name)
        }
    }

    /// The error that `problem` is with `key`.
    pub fn fault(&self, key: &str, line: usize, problem: FieldProblem) -> DocumentError {
        DocumentError::Field {
            path: self.document.path.clone(),
            line,
            field: self.field(key),
            problem,
        }
    }

    /// The error that `entry` has a value of the wrong type.
    pub fn mismatch(&self, entry: &Entry, expected: impl fmt::Display) -> DocumentError {
        let problem = FieldProblem::Expected {
            expected: expected.to_string(),
            found: entry.value.describe(),
        };
        self.fault(&entry.key, entry.value.line, problem)
    }

    /// The error that `entry` has a value that `why` rules out.
    pub fn invalid(&self, entry: &Entry, why: impl fmt::Display) -> DocumentError {
        let problem = FieldProblem::Invalid {
            found: entry.value.describe(),
            why: why.to_string(),
        };
        self.fault(&entry.key, entry.value.line, problem)
    }

    /// A warning that points at `entry`.
    pub fn warning(&self, entry: &Entry, message: &str) -> String {
        format!(
            "{}:{}: {}: {message}",
            self.document.path.display(),
            entry.line,
            self.field(&entry.key),
        )
    }

    /// Refuses any key but `known`. `elsewhere` lists fields by the full name they have in another
    /// mapping.
    pub fn only(
        &self,
        known: &'static [&'static str],
        elsewhere: &[&str],
    ) -> Result<(), DocumentError> {
        let Some(stray) = self
            .entries
            .iter()
            .find(|entry| !known.contains(&entry.key.as_str()))
        else {
            return Ok(());
        };
        let moved = elsewhere
            .iter()
            .find(|field| field.rsplit('.').next() == Some(&stray.key));
        let meant = match moved {
            Some(field) => Some((*field).to_owned()),
            None => closest(&stray.key, known).map(|key| self.field(key)),
        };
        let problem = FieldProblem::UnknownKey {
            meant,
            expected: known,
        };
        Err(self.fault(&stray.key, stray.line, problem))
    }

    /// The entry `key`, unless it is absent or null.
    pub fn get(&self, key: &str) -> Option<&'a Entry> {
        self.entries
            .iter()
            .find(|entry| entry.key == key && !entry.value.is_null())
    }

    /// The string at `key`.
    pub fn string(&self, key: &str) -> Result<Option<&'a str>, DocumentError> {
        self.get(key).map(|entry| self.text(entry)).transpose()
    }

    /// The value of `entry`, which must be a string that a program can be given (no NUL).
    pub fn text(&self, entry: &'a Entry) -> Result<&'a str, DocumentError> {
        match entry.value.scalar() {
            Some(Scalar::Str(text)) if text.contains('\0') => {
                Err(self.invalid(entry, "contains a NUL character"))
            }
            Some(Scalar::Str(text)) => Ok(text),
            Some(Scalar::Bool(_) | Scalar::Int(_) | Scalar::Float(_)) => {
                Err(self.mismatch(entry, "a string (put it in quotes)"))
            }
            Some(Scalar::Null) | None => Err(self.mismatch(entry, "a string")),
        }
    }

    /// The whole number at `key`, which must lie between the bounds.
    pub fn number(
        &self,
        key: &str,
        (least, most): (u32, u32),
        what: &str,
    ) -> Result<Option<u32>, DocumentError> {
        let Some(entry) = self.get(key) else {
            return Ok(None);
        };
        let value = match entry.value.scalar() {
            Some(Scalar::Int(value)) => u32::try_from(value).ok(),
            _ => None,
        };
        match value {
            Some(value) if (least..=most).contains(&value) => Ok(Some(value)),
            _ => Err(self.mismatch(entry, format_args!("{what} from {least} to {most}"))),
        }
    }

    /// The mapping at `key`.
    pub fn sub(&self, key: &str) -> Result<Option<Table<'a>>, DocumentError> {
        let Some(entry) = self.get(key) else {
            return Ok(None);
        };
        match &entry.value.kind {
            Kind::Map(entries) => Ok(Some(Table {
                document: self.document,
                name: self.field(key),
                line: entry.line,
                entries,
            })),
            _ => Err(self.mismatch(entry, "a mapping")),
        }
    }

    /// The list at `key`; each item that is a mapping comes as a table named `key[i]`, any other is
    /// an error.
    pub fn list(&self, key: &str) -> Result<Vec<Table<'a>>, DocumentError> {
        let Some(entry) = self.get(key) else {
            return Ok(Vec::new());
        };
        let Kind::List(items) = &entry.value.kind else {
            return Err(self.mismatch(entry, "a list"));
        };
        let table = |(index, item): (usize, &'a Rc<Node>)| {
            let key = format!("{key}[{index}]");
            if let Kind::Map(entries) = &item.kind {
                return Ok(Table {
                    document: self.document,
                    name: self.field(&key),
                    line: item.line,
                    entries,
                });
            }
            let problem = FieldProblem::Expected {
                expected: "a mapping".into(),
                found: item.describe(),
            };
            Err(self.fault(&key, item.line, problem))
        };
        items.iter().enumerate().map(table).collect()
    }
}

/// The one of `known` that `word` is a likely misspelling of.
pub(super) fn closest<'k>(word: &str, known: &[&'k str]) -> Option<&'k str> {
    // The distance is quadratic in the length, and nothing that long is a typo.
    if word.len() > 32 {
        return None;
    }
    let lower = word.to_lowercase().replace('-', "_");
    known
        .iter()
        .map(|&key| (strsim::damerau_levenshtein(&lower, key), key))
        .filter(|(distance, key)| *distance <= (key.len() / 3).clamp(1, 3))
        .min()
        .map(|(_, key)| key)
}

type Fault = (usize, SyntaxProblem);

/// The document of `text`, or `None` if it has only comments.
fn load(text: &str) -> Result<Option<Rc<Node>>, Fault> {
    let mut loader = Loader::default();
    for event in Parser::new_from_str(text) {
        let (event, span) =
            event.map_err(|error| (error.marker().line(), SyntaxProblem::Scan(error)))?;
        loader.event(event, span)?;
    }
    Ok(loader.root)
}

/// A list or mapping whose end has not been seen.
#[derive(Debug)]
struct Open {
    line: usize,
    anchor: usize,
    body: Body,
}

#[derive(Debug)]
enum Body {
    List(Vec<Rc<Node>>),
    Map {
        entries: Vec<Entry>,
        /// Where each key was first given, so that a duplicate is found without a scan.
        lines: HashMap<String, usize>,
        /// A key that waits for its value.
        key: Option<(String, usize)>,
    },
}

#[derive(Debug, Default)]
struct Loader {
    open: Vec<Open>,
    anchors: HashMap<usize, Rc<Node>>,
    root: Option<Rc<Node>>,
}

impl Loader {
    fn event(&mut self, event: Event<'_>, span: Span) -> Result<(), Fault> {
        let line = span.start.line();
        match event {
            Event::DocumentStart(_) if self.root.is_some() => {
                Err((line, SyntaxProblem::SecondDocument))
            }
            Event::Nothing
            | Event::StreamStart
            | Event::StreamEnd
            | Event::DocumentStart(_)
            | Event::DocumentEnd => Ok(()),
            Event::Alias(anchor) => match self.anchors.get(&anchor) {
                Some(node) => self.attach(line, Rc::clone(node)),
                None => Err((line, SyntaxProblem::RecursiveAlias)),
            },
            Event::Scalar(text, style, anchor, tag) => {
                let is_str = core_tag(line, tag.as_deref())? == Some("str");
                let kind = Kind::Scalar {
                    text: text.into_owned(),
                    plain: style == ScalarStyle::Plain && !is_str,
                };
                self.finish(line, anchor, kind)
            }
            Event::SequenceStart(anchor, tag) => {
                core_tag(line, tag.as_deref())?;
                self.open(line, anchor, Body::List(Vec::new()))
            }
            Event::MappingStart(anchor, tag) => {
                core_tag(line, tag.as_deref())?;
                let body = Body::Map {
                    entries: Vec::new(),
                    lines: HashMap::new(),
                    key: None,
                };
                self.open(line, anchor, body)
            }
            Event::SequenceEnd | Event::MappingEnd => {
                let Some(Open { line, anchor, body }) = self.open.pop() else {
                    return Ok(());
                };
                let kind = match body {
                    Body::List(items) => Kind::List(items),
                    Body::Map { entries, .. } => Kind::Map(entries),
                };
                self.finish(line, anchor, kind)
            }
        }
    }

    fn open(&mut self, line: usize, anchor: usize, body: Body) -> Result<(), Fault> {
        if self.open.len() >= MAX_DEPTH {
            return Err((line, SyntaxProblem::TooDeep));
        }
        self.open.push(Open { line, anchor, body });
        Ok(())
    }

    fn finish(&mut self, line: usize, anchor: usize, kind: Kind) -> Result<(), Fault> {
        let node = Rc::new(Node::new(line, kind));
        if node.expanded > MAX_EXPANDED {
            return Err((line, SyntaxProblem::TooMuch));
        }
        // The parser numbers anchors from 1; 0 means no anchor.
        if anchor != 0 {
            self.anchors.insert(anchor, Rc::clone(&node));
        }
        self.attach(line, node)
    }

    /// Puts a whole value where the parser stands.
    fn attach(&mut self, line: usize, node: Rc<Node>) -> Result<(), Fault> {
        if self.open.len() + node.height > MAX_DEPTH {
            return Err((line, SyntaxProblem::TooDeep));
        }
        match self.open.last_mut().map(|open| &mut open.body) {
            None => self.root = Some(node),
            Some(Body::List(items)) => items.push(node),
            Some(Body::Map {
                entries,
                lines,
                key,
            }) => {
                if let Some((key, line)) = key.take() {
                    let value = node;
                    entries.push(Entry { key, line, value });
                } else {
                    let text = key_text(line, &node)?;
                    if let Some(first) = lines.insert(text.to_owned(), line) {
                        let key = shorten(text).escape_debug().to_string();
                        return Err((line, SyntaxProblem::DuplicateKey { key, first }));
                    }
                    *key = Some((text.to_owned(), line));
                }
            }
        }
        Ok(())
    }
}

fn key_text(line: usize, node: &Node) -> Result<&str, Fault> {
    let found = match &node.kind {
        Kind::Scalar { text, .. } => return Ok(text),
        Kind::List(_) => "a list",
        Kind::Map(_) => "a mapping",
    };
    Err((line, SyntaxProblem::ComplexKey { found }))
}

/// The name of a tag of YAML's core schema. Any other tag asks for something we do not do.
fn core_tag(line: usize, tag: Option<&Tag>) -> Result<Option<&str>, Fault> {
    match tag {
        None => Ok(None),
        Some(tag) if tag.is_yaml_core_schema() => Ok(Some(&tag.suffix)),
        // `!` alone is YAML's way to say "not what it looks like": a string.
        Some(tag) if tag.suffix.is_empty() => Ok(Some("str")),
        Some(tag) => {
            let tag = shorten(&tag.to_string()).escape_debug().to_string();
            Err((line, SyntaxProblem::Tag { tag }))
        }
    }
}
