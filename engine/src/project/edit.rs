//! Changes to the engine's `config.yaml` as changes to its text: comments, order and every other
//! entry stay byte for byte.
//!
//! The text is parsed for where things are, a piece of it is replaced, and the result is parsed
//! again: unless it says the same as the text before, with just the intended change, nothing is
//! changed and the caller gets the text to write by hand. So however strange the YAML, it is edited
//! rightly or not at all.

use std::fs::{self, File, Metadata};
use std::io::{self, Write as _};
use std::ops::Range;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use saphyr_parser::{Event, Parser, Span};
use serde_json::{Value, json};

use super::yaml::{Document, DocumentError, MAX_DEPTH};

const WORKERS: &str = "workers";
const NAME: &str = "name";
const PATH: &str = "worker_path";
const CONFIG: &str = "config";

/// Why a file is not edited.
#[derive(Debug, thiserror::Error)]
pub enum EditError {
    /// It is not valid.
    #[error(transparent)]
    Document(#[from] DocumentError),
    /// `workers` is there and no list.
    #[error("{path}: `workers` is not a list")]
    NotAList {
        /// The file.
        path: String,
    },
    /// Two workers have the name.
    #[error(
        "{path}: two workers are called {name}, on lines {first} and {second}; remove one of them"
    )]
    Twice {
        /// The file.
        path: String,
        /// The name.
        name: String,
        /// Where it is first.
        first: usize,
        /// Where it is again.
        second: usize,
    },
    /// The change is within brackets, where a text of one line may hold everything. Lines are
    /// edited instead.
    #[error(
        "{path}:{line}: an entry in brackets is not edited; write each entry on lines of its own, \
         `- name: {name}` and below it `  worker_path: DIRECTORY`, and try again"
    )]
    InBrackets {
        /// The file.
        path: String,
        /// The line of the opening bracket.
        line: usize,
        /// The worker.
        name: String,
    },
    /// The entry is shared with others through an anchor, or written in a way that the change
    /// cannot be made in place.
    #[error("{path}: cannot be changed without changing more than {what}; do it by hand")]
    ByHand {
        /// The file.
        path: String,
        /// The intended change.
        what: String,
    },
    /// It could not be read or written. It is as it was.
    #[error("cannot {operation} {}", path.display())]
    Io {
        /// The operation.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

/// A change to the entry of one worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change<'a> {
    /// It is there with this path; its other keys stay.
    Add {
        /// The worker.
        name: &'a str,
        /// Its directory.
        worker_path: &'a str,
    },
    /// It is there, with a copy of another worker's entry, if that has one; else with this path.
    Copy {
        /// The worker.
        name: &'a str,
        /// The other one.
        from: &'a str,
        /// Its directory.
        worker_path: &'a str,
    },
    /// It has no `config:`.
    DropConfig {
        /// The worker.
        name: &'a str,
    },
    /// It is not there.
    Remove {
        /// The worker.
        name: &'a str,
    },
}

impl Change<'_> {
    fn name(&self) -> &str {
        match self {
            Self::Add { name, .. }
            | Self::Copy { name, .. }
            | Self::DropConfig { name }
            | Self::Remove { name } => name,
        }
    }

    fn describe(&self) -> String {
        let name = self.name();
        match self {
            Self::Add { worker_path, .. } => {
                format!("the entry of {name} under `workers`, with `worker_path: {worker_path}`")
            }
            Self::Copy { from, .. } => {
                format!("the entry of {name} under `workers`, with all that of {from} has")
            }
            Self::DropConfig { .. } => format!("`config` in the entry of {name}"),
            Self::Remove { .. } => format!("the entry of {name} under `workers`"),
        }
    }

    /// The values of the file afterwards.
    fn apply(&self, root: &mut Value) {
        let Some(root) = root.as_object_mut() else {
            return;
        };
        let workers = root.entry(WORKERS).or_insert(Value::Null);
        if workers.is_null() {
            *workers = json!([]);
        }
        let Some(workers) = workers.as_array_mut() else {
            return;
        };
        let is = |entry: &Value, text: &str| {
            let name = entry.get(NAME);
            name.is_some_and(|name| is_text(name, text))
        };
        let is_it = |entry: &Value| is(entry, self.name());
        match self {
            Self::Add { name, worker_path } => match workers.iter_mut().find(|one| is_it(one)) {
                Some(entry) => entry[PATH] = json!(worker_path),
                None => workers.push(json!({ NAME: name, PATH: worker_path })),
            },
            Self::Copy { .. } if workers.iter().any(is_it) => {}
            Self::Copy {
                name,
                from,
                worker_path,
            } => match workers.iter().find(|one| is(one, from)).cloned() {
                Some(mut entry) => {
                    entry[NAME] = json!(name);
                    workers.push(entry);
                }
                None => workers.push(json!({ NAME: name, PATH: worker_path })),
            },
            Self::DropConfig { .. } => {
                for entry in workers.iter_mut().filter(|one| is_it(one)) {
                    if let Some(entry) = entry.as_object_mut() {
                        entry.remove(CONFIG);
                    }
                }
            }
            Self::Remove { .. } => workers.retain(|one| !is_it(one)),
        }
    }
}

/// Whether a value is this text, or a number or word that is written like it.
fn is_text(value: &Value, text: &str) -> bool {
    match value {
        Value::String(value) => value == text,
        Value::Null => false,
        other => format!("{other}") == text,
    }
}

/// `text`, the contents of the file at `path`, with `change` made; `None` if it says so already.
pub fn edit(path: &Path, text: &str, change: &Change<'_>) -> Result<Option<String>, EditError> {
    let before = Document::parse(path, text.as_bytes())?.to_json();
    let shown = path.display().to_string();
    let mut meant = before.clone();
    change.apply(&mut meant);
    if !before
        .get(WORKERS)
        .is_none_or(|workers| workers.is_array() || workers.is_null())
    {
        return Err(EditError::NotAList { path: shown });
    }
    let by_hand = || EditError::ByHand {
        path: shown.clone(),
        what: change.describe(),
    };
    let layout = Layout::of(text).ok_or_else(by_hand)?;
    let named: Vec<&Item> = layout
        .items
        .iter()
        .filter(|item| item.is(change.name()))
        .collect();
    if let [first, second, ..] = named[..] {
        return Err(EditError::Twice {
            path: shown.clone(),
            name: change.name().to_owned(),
            first: line_of(text, first.at.start),
            second: line_of(text, second.at.start),
        });
    }
    let is_done = match change {
        Change::Add { .. } => meant == before,
        Change::DropConfig { .. } => named.iter().all(|item| item.field(CONFIG).is_none()),
        Change::Remove { .. } => named.is_empty(),
        Change::Copy { .. } => !named.is_empty(),
    };
    if is_done {
        return Ok(None);
    }
    if let Some(at) = layout.bracket(text, change, named.first().copied()) {
        return Err(EditError::InBrackets {
            path: shown.clone(),
            line: line_of(text, at),
            name: change.name().to_owned(),
        });
    }
    let (range, with) = layout
        .splice(text, change, named.first().copied())
        .ok_or_else(by_hand)?;
    let mut edited = text.to_owned();
    edited.replace_range(range, &with);
    let after = Document::parse(path, edited.as_bytes());
    match after {
        Ok(after) if after.to_json() == meant => Ok(Some(edited)),
        _ => Err(by_hand()),
    }
}

/// A change of a file.
struct Edit {
    /// The file itself, past symlinks.
    real: PathBuf,
    before: Option<Metadata>,
    text: String,
}

/// The file at `path`, past symlinks; it need not exist.
fn real(path: &Path) -> Result<PathBuf, EditError> {
    match fs::canonicalize(path) {
        Ok(real) => Ok(real),
        Err(error) if error.kind() == io::ErrorKind::NotFound && !path.is_symlink() => {
            let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
            let dir = fs::canonicalize(dir.unwrap_or(Path::new("."))).map_err(at(path, "find"))?;
            Ok(dir.join(path.file_name().unwrap_or_default()))
        }
        Err(error) => Err(at(path, "open")(error)),
    }
}

fn at(path: &Path, operation: &'static str) -> impl FnOnce(io::Error) -> EditError {
    move |source| EditError::Io {
        operation,
        path: path.to_owned(),
        source,
    }
}

/// The change of the file at `path`; `None` if it needs none.
fn prepare(path: &Path, change: &Change<'_>) -> Result<Option<Edit>, EditError> {
    let real = real(path)?;
    let before = match fs::metadata(&real) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        metadata => Some(metadata.map_err(at(path, "look at"))?),
    };
    let text = match &before {
        None => String::new(),
        Some(_) => super::yaml::read_text(path, super::config::MAX_CONFIG_BYTES)?,
    };
    let Some(text) = edit(path, &text, change)? else {
        return Ok(None);
    };
    // Renaming would get around it.
    if before
        .as_ref()
        .is_some_and(|before| before.mode() & 0o222 == 0)
    {
        return Err(at(path, "change")(io::ErrorKind::PermissionDenied.into()));
    }
    Ok(Some(Edit { real, before, text }))
}

/// Finds out whether [`edit_file`] could make `change`, as things are. Returns whether there is
/// anything to change.
pub fn check_file(path: &Path, change: &Change<'_>) -> Result<bool, EditError> {
    Ok(prepare(path, change)?.is_some())
}

/// Makes `change` in the file at `path`, which is created if it is missing. Returns whether there
/// was anything to change.
///
/// Another process that does the same waits. The file is replaced in one step, durably, with its
/// owner and mode; a symlink stays, and its target is replaced.
pub fn edit_file(path: &Path, change: &Change<'_>) -> Result<bool, EditError> {
    let dir = real(path)?;
    let dir = dir.parent().unwrap_or(Path::new("/"));
    let lock = File::open(dir).map_err(at(path, "lock"))?;
    lock.lock().map_err(at(path, "lock"))?;
    let Some(edit) = prepare(path, change)? else {
        return Ok(false);
    };
    let mode = edit
        .before
        .as_ref()
        .map_or(0o644, |before| before.mode() & 0o7777);
    let mut file = tempfile::Builder::new()
        .prefix(".config.yaml.")
        .permissions(fs::Permissions::from_mode(mode))
        .tempfile_in(dir)
        .map_err(at(path, "write beside"))?;
    if let Some(before) = &edit.before {
        // Only root can, and only root needs to.
        let _ = std::os::unix::fs::fchown(&file, Some(before.uid()), Some(before.gid()));
    }
    file.write_all(edit.text.as_bytes())
        .and_then(|()| {
            file.as_file()
                .set_permissions(fs::Permissions::from_mode(mode))
        })
        .and_then(|()| file.as_file().sync_all())
        .map_err(at(path, "write beside"))?;
    file.persist(&edit.real)
        .map_err(|error| at(path, "replace")(error.error))?;
    lock.sync_all().map_err(at(path, "sync the directory of"))?;
    Ok(true)
}

fn line_of(text: &str, at: usize) -> usize {
    text.bytes().take(at).filter(|&byte| byte == b'\n').count() + 1
}

/// Where a key and its value are.
struct Field {
    key: String,
    /// From the key's first byte to the value's last.
    at: Range<usize>,
    value: Range<usize>,
}

/// Where a worker's entry is.
struct Item {
    /// From its first byte, after the dash, to its last.
    at: Range<usize>,
    name: Option<String>,
    fields: Vec<Field>,
    is_flow: bool,
}

impl Item {
    fn is(&self, name: &str) -> bool {
        self.name.as_deref() == Some(name)
    }

    fn field(&self, key: &str) -> Option<&Field> {
        self.fields.iter().find(|field| field.key == key)
    }
}

/// The value of `workers:`.
enum Workers {
    /// Nothing: there is no such key.
    Absent,
    /// The key, up to its colon, and the place of its value, which is empty or says null.
    Null { key_end: usize, value: Range<usize> },
    /// `[…]`.
    Flow(Range<usize>),
    /// Lines that begin with a dash in this column, below the key that ends there.
    Block { indent: usize, key_end: usize },
}

struct Layout {
    workers: Workers,
    items: Vec<Item>,
    newline: &'static str,
}

impl Layout {
    fn of(text: &str) -> Option<Self> {
        let root = Tree::parse(text)?;
        let newline = if text.contains("\r\n") { "\r\n" } else { "\n" };
        let mut layout = Self {
            workers: Workers::Absent,
            items: Vec::new(),
            newline,
        };
        let Tree::Map { fields, .. } = root else {
            return Some(layout);
        };
        let Some((_, key_at, value)) = fields.into_iter().find(|(key, ..)| key == WORKERS) else {
            return Some(layout);
        };
        layout.workers = match value {
            Tree::Leaf { at, .. } => Workers::Null {
                key_end: key_at.end,
                value: at,
            },
            Tree::List { at, items } => {
                layout.items = items.into_iter().map(item).collect();
                if text.get(at.start..)?.starts_with('[') {
                    Workers::Flow(at)
                } else {
                    let dash = dash_before(text, layout.items.first()?.at.start)?;
                    Workers::Block {
                        indent: column(text, dash),
                        key_end: key_at.end,
                    }
                }
            }
            Tree::Map { .. } => return None,
        };
        for item in &mut layout.items {
            item.is_flow = text.get(item.at.start..)?.starts_with('{');
        }
        Some(layout)
    }

    /// [`splice`](Self::splice) of an entry that is like `source` but for its name.
    fn splice_copy(&self, text: &str, name: &str, source: &Item) -> Option<(Range<usize>, String)> {
        let named = &source.field(NAME)?.value;
        let end = self.items.last()?.at.end;
        let copy = |at: Range<usize>| {
            let (head, tail) = (at.start..named.start, named.end..at.end);
            Some([text.get(head)?, &scalar(name), text.get(tail)?].concat())
        };
        let first = line_start(text, dash_before(text, source.at.start)?);
        let copied = copy(first..line_end(text, source.at.end))?;
        let end = line_end(text, end);
        let gap = missing_newline(text, end, self.newline);
        let rest = missing_newline(&copied, copied.len(), self.newline);
        Some((end..end, format!("{gap}{copied}{rest}")))
    }

    /// [`splice`](Self::splice) that takes an entry away.
    fn splice_out(&self, text: &str, item: &Item) -> Option<(Range<usize>, String)> {
        match &self.workers {
            // The list must stay a list. Comments above the entry stay as well.
            Workers::Block { key_end, .. } if self.items.len() == 1 => {
                let dash = dash_before(text, item.at.start)?;
                let colon = key_end + text.get(*key_end..dash)?.find(':')? + 1;
                let between = text.get(colon..line_start(text, dash))?;
                let end = line_end(text, item.at.end);
                Some((colon..end, format!(" []{between}")))
            }
            Workers::Block { .. } => {
                let dash = dash_before(text, item.at.start)?;
                Some((
                    line_start(text, dash)..line_end(text, item.at.end),
                    String::new(),
                ))
            }
            Workers::Flow(_) | Workers::Absent | Workers::Null { .. } => None,
        }
    }

    /// The opening bracket of the collection that `change` would be made in, if there is one.
    fn bracket(&self, text: &str, change: &Change<'_>, item: Option<&Item>) -> Option<usize> {
        if let Workers::Flow(at) = &self.workers {
            let inside = text.get(at.start + 1..at.end - 1).unwrap_or_default();
            return (!inside.trim().is_empty()).then_some(at.start);
        }
        let is_inside = matches!(change, Change::Add { .. } | Change::DropConfig { .. });
        let item = item.filter(|item| is_inside && item.is_flow)?;
        Some(item.at.start)
    }

    /// [`splice`](Self::splice) of the first entry into a list that is written as `[]` or as null
    /// at `at`. A comment behind it stays.
    fn splice_first(
        &self,
        text: &str,
        at: &Range<usize>,
        lines: &str,
    ) -> Option<(Range<usize>, String)> {
        let start = text.get(..at.start)?.trim_end_matches(' ').len();
        let end = line_end(text, at.end);
        let rest = text.get(at.end..end)?.trim_end();
        let is_last = rest.is_empty() || rest.trim_start().starts_with('#');
        is_last.then(|| (start..end, format!("{rest}{}{lines}", self.newline)))
    }

    /// Replaces a range of the text.
    fn splice(
        &self,
        text: &str,
        change: &Change<'_>,
        item: Option<&Item>,
    ) -> Option<(Range<usize>, String)> {
        let newline = self.newline;
        if let Change::Copy { name, from, .. } = change
            && let Some(source) = self.items.iter().find(|item| item.is(from))
        {
            return self.splice_copy(text, name, source);
        }
        match (change, item) {
            (
                Change::Add { name, worker_path }
                | Change::Copy {
                    name, worker_path, ..
                },
                None,
            ) => {
                let (name, path) = (scalar(name), scalar(worker_path));
                let lines = |indent: usize| {
                    let pad = " ".repeat(indent);
                    format!("{pad}- {NAME}: {name}{newline}{pad}  {PATH}: {path}{newline}")
                };
                match &self.workers {
                    Workers::Absent => {
                        let gap = missing_newline(text, text.len(), newline);
                        let lines = format!("{gap}{WORKERS}:{newline}{}", lines(2));
                        Some((text.len()..text.len(), lines))
                    }
                    Workers::Null { key_end, value } => {
                        if value.is_empty() {
                            let at = line_end(text, *key_end);
                            let gap = missing_newline(text, at, newline);
                            return Some((at..at, format!("{gap}{}", lines(2))));
                        }
                        self.splice_first(text, value, &lines(2))
                    }
                    Workers::Flow(at) => self.splice_first(text, at, &lines(2)),
                    Workers::Block { indent, .. } => {
                        let end = line_end(text, self.items.last()?.at.end);
                        let gap = missing_newline(text, end, newline);
                        Some((end..end, format!("{gap}{}", lines(*indent))))
                    }
                }
            }
            (Change::Add { worker_path, .. }, Some(item)) => {
                let path = scalar(worker_path);
                if let Some(field) = item.field(PATH) {
                    let gap = if field.value.is_empty() { " " } else { "" };
                    return Some((field.value.clone(), format!("{gap}{path}")));
                }
                let name = item.field(NAME)?;
                let end = line_end(text, name.at.end);
                let pad = " ".repeat(column(text, name.at.start));
                let gap = missing_newline(text, end, newline);
                Some((end..end, format!("{gap}{pad}{PATH}: {path}{newline}")))
            }
            (Change::DropConfig { .. }, Some(item)) => {
                let field = item.field(CONFIG)?;
                let start = line_start(text, field.at.start);
                // The first key stands behind the dash, which stays.
                if !text.get(start..field.at.start)?.trim().is_empty() {
                    let next = item.fields.get(1)?;
                    return Some((field.at.start..next.at.start, String::new()));
                }
                Some((start..line_end(text, field.at.end), String::new()))
            }
            (Change::Remove { .. }, Some(item)) => self.splice_out(text, item),
            (Change::DropConfig { .. } | Change::Remove { .. }, None)
            | (Change::Copy { .. }, Some(_)) => None,
        }
    }
}

/// The line break before text that is appended at `at`, if the text has none there.
fn missing_newline(text: &str, at: usize, newline: &'static str) -> &'static str {
    match text.get(..at) {
        None | Some("") => "",
        Some(before) if before.ends_with('\n') => "",
        Some(_) => newline,
    }
}

fn line_start(text: &str, at: usize) -> usize {
    text.get(..at)
        .and_then(|text| text.rfind('\n'))
        .map_or(0, |end| end + 1)
}

/// The beginning of the line after the one that `at` is in.
fn line_end(text: &str, at: usize) -> usize {
    // The end of a value may be the beginning of the next line.
    if at > 0 && text.as_bytes().get(at - 1) == Some(&b'\n') {
        return at;
    }
    let rest = text.get(at..).and_then(|text| text.find('\n'));
    rest.map_or(text.len(), |end| at + end + 1)
}

fn column(text: &str, at: usize) -> usize {
    at - line_start(text, at)
}

/// The dash of the entry at `at`: on its line, or on one above it with nothing but comments and
/// blank lines in between.
fn dash_before(text: &str, at: usize) -> Option<usize> {
    let mut end = at;
    loop {
        let start = line_start(text, end);
        let line = text.get(start..end)?;
        let words = line.trim_start_matches(' ');
        if words.starts_with('-') {
            return Some(start + line.len() - words.len());
        }
        if !words.trim().is_empty() && !words.starts_with('#') {
            return None;
        }
        end = start.checked_sub(1)?;
    }
}

fn item(tree: Tree) -> Item {
    let at = tree.at().clone();
    let mut item = Item {
        at,
        name: None,
        fields: Vec::new(),
        is_flow: false,
    };
    if let Tree::Map { fields, .. } = tree {
        for (key, key_at, value) in fields {
            if let (NAME, Tree::Leaf { text, .. }) = (key.as_str(), &value) {
                item.name.clone_from(text);
            }
            let value_at = value.at().clone();
            item.fields.push(Field {
                key,
                at: key_at.start..value_at.end.max(key_at.end + 1),
                value: value_at,
            });
        }
    }
    item
}

/// A text as YAML reads it back: plain where that is safe.
fn scalar(text: &str) -> String {
    let is_plain = !text.is_empty()
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "/._-+@~".contains(c))
        && text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/')
        && super::yaml::is_word(text);
    if is_plain {
        return text.to_owned();
    }
    // JSON's strings are YAML's.
    Value::from(text).to_string()
}

/// A document with the place of everything in it.
enum Tree {
    Leaf {
        /// None for an alias.
        text: Option<String>,
        at: Range<usize>,
    },
    List {
        items: Vec<Tree>,
        at: Range<usize>,
    },
    Map {
        fields: Vec<(String, Range<usize>, Tree)>,
        at: Range<usize>,
    },
}

impl Tree {
    fn at(&self) -> &Range<usize> {
        match self {
            Self::Leaf { at, .. } | Self::List { at, .. } | Self::Map { at, .. } => at,
        }
    }

    /// The document in `text`, which parses. An empty one is an empty mapping.
    fn parse(text: &str) -> Option<Self> {
        // The parser counts characters.
        let bom = if text.starts_with('\u{feff}') {
            '\u{feff}'.len_utf8()
        } else {
            0
        };
        let body = text.get(bom..)?;
        let mut offsets: Vec<usize> = body.char_indices().map(|(at, _)| at + bom).collect();
        offsets.push(text.len());
        let mut events = Events {
            parser: Parser::new_from_str(body),
            offsets,
            text,
        };
        loop {
            let (event, span) = events.next()?;
            match event {
                Event::StreamStart | Event::DocumentStart(_) => {}
                Event::StreamEnd | Event::DocumentEnd => {
                    let (fields, at) = (Vec::new(), 0..0);
                    return Some(Self::Map { fields, at });
                }
                event => return events.tree(event, span, 0),
            }
        }
    }
}

struct Events<'t> {
    parser: Parser<'t, saphyr_parser::StrInput<'t>>,
    /// The byte at which each character begins.
    offsets: Vec<usize>,
    text: &'t str,
}

impl<'t> Events<'t> {
    fn next(&mut self) -> Option<(Event<'t>, Range<usize>)> {
        let (event, span) = self.parser.next_event()?.ok()?;
        Some((event, self.bytes(span)))
    }

    fn bytes(&self, span: Span) -> Range<usize> {
        let at = |index: usize| self.offsets.get(index).copied().unwrap_or(self.text.len());
        at(span.start.index())..at(span.end.index())
    }

    fn tree(&mut self, event: Event<'t>, at: Range<usize>, depth: usize) -> Option<Tree> {
        if depth > MAX_DEPTH {
            return None;
        }
        match event {
            Event::Alias(_) => Some(Tree::Leaf { text: None, at }),
            Event::Scalar(text, ..) => {
                let text = Some(text.into_owned());
                Some(Tree::Leaf { text, at })
            }
            Event::SequenceStart(..) => {
                let mut items = Vec::new();
                loop {
                    match self.next()? {
                        (Event::SequenceEnd, end) => {
                            let last = items.last().map_or(at.end, |item: &Tree| item.at().end);
                            let at = self.whole(&at, last, &end);
                            return Some(Tree::List { items, at });
                        }
                        (event, at) => items.push(self.tree(event, at, depth + 1)?),
                    }
                }
            }
            Event::MappingStart(..) => {
                let mut fields: Vec<(String, Range<usize>, Tree)> = Vec::new();
                loop {
                    match self.next()? {
                        (Event::MappingEnd, end) => {
                            let last = fields
                                .last()
                                .map_or(at.end, |(_, key, value)| value.at().end.max(key.end + 1));
                            let start = fields.first().map_or(at.start, |(_, key, _)| key.start);
                            let at = self.whole(&(at.start.min(start)..at.end), last, &end);
                            return Some(Tree::Map { fields, at });
                        }
                        (Event::Scalar(key, ..), key_at) => {
                            let (event, at) = self.next()?;
                            let value = self.tree(event, at, depth + 1)?;
                            fields.push((key.into_owned(), key_at, value));
                        }
                        _ => return None,
                    }
                }
            }
            _ => None,
        }
    }

    /// A flow collection ends with its bracket, behind which the parser's span has blanks; a block
    /// ends with its last value.
    fn whole(&self, start: &Range<usize>, last: usize, end: &Range<usize>) -> Range<usize> {
        let is_flow = self
            .text
            .get(start.start..)
            .is_some_and(|text| text.starts_with(['[', '{']));
        start.start..if is_flow { end.start + 1 } else { last }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(text: &str, change: &Change<'_>) -> String {
        match edit(Path::new("config.yaml"), text, change) {
            Ok(Some(text)) => text,
            Ok(None) => "as it was".into(),
            Err(error) => format!("error: {error}"),
        }
    }

    fn add(text: &str) -> String {
        let (name, worker_path) = ("new", "/srv/new");
        made(text, &Change::Add { name, worker_path })
    }

    fn remove(text: &str) -> String {
        made(text, &Change::Remove { name: "old" })
    }

    fn drop_config(text: &str) -> String {
        made(text, &Change::DropConfig { name: "old" })
    }

    #[track_caller]
    fn check(edit: fn(&str) -> String, cases: &[(&str, &str)]) {
        for (before, after) in cases {
            assert_eq!(edit(before), *after, "of\n{before}");
        }
    }

    const ENTRY: &str = "workers:\n  - name: new\n    worker_path: /srv/new\n";

    #[test]
    fn an_entry_is_added() {
        let commented = format!("{}port: 1", ENTRY.replace("workers:", "workers: # none"));
        check(
            add,
            &[
                ("", ENTRY),
                ("# mine\n", &format!("# mine\n{ENTRY}")),
                ("port: 1", &format!("port: 1\n{ENTRY}")),
                ("workers:", ENTRY),
                ("workers: []\n", ENTRY),
                ("workers: [ ]  \nport: 1\n", &format!("{ENTRY}port: 1\n")),
                (
                    "workers:  # all of them\nport: 1\n",
                    &ENTRY
                        .replace("workers:", "workers:  # all of them")
                        .replace("/srv/new\n", "/srv/new\nport: 1\n"),
                ),
                ("workers: ~\n", ENTRY),
                ("workers: ~ # none\nport: 1", &commented),
                ("workers: [] # none\nport: 1", &commented),
                (
                    "workers:\n- name: a # first\n  config:\n    x: [1,\n      2]\n\n# the port\nport: 1\n",
                    "workers:\n- name: a # first\n  config:\n    x: [1,\n      2]\n- name: new\n  worker_path: /srv/new\n\n# the port\nport: 1\n",
                ),
                (
                    "workers:\r\n    -   name: a\r\n",
                    "workers:\r\n    -   name: a\r\n    - name: new\r\n      worker_path: /srv/new\r\n",
                ),
                (
                    "\u{feff}workers:\n  - name: \u{e4}\n    config:\n      k: |\n        text\n",
                    "\u{feff}workers:\n  - name: \u{e4}\n    config:\n      k: |\n        text\n  - name: new\n    worker_path: /srv/new\n",
                ),
                (
                    "workers:\n  - name: new\n    # where it was\n    worker_path: /old # moved\n    config: {a: 1}\n",
                    "workers:\n  - name: new\n    # where it was\n    worker_path: /srv/new # moved\n    config: {a: 1}\n",
                ),
                (
                    "workers:\n  - config: {a: 1}\n    name: new",
                    "workers:\n  - config: {a: 1}\n    name: new\n    worker_path: /srv/new\n",
                ),
                (ENTRY, "as it was"),
            ],
        );
    }

    #[test]
    fn an_entry_is_copied() {
        let copy = |text: &str| {
            let (name, from, worker_path) = ("new", "old", "/srv/new");
            let change = Change::Copy {
                name,
                from,
                worker_path,
            };
            made(text, &change)
        };
        check(
            copy,
            &[
                ("", ENTRY),
                (
                    "workers:\n  - name: old # mine\n    worker_path: ./old\n    config: {a: 1} # kept\n  - name: b\n\n# end\n",
                    "workers:\n  - name: old # mine\n    worker_path: ./old\n    config: {a: 1} # kept\n  - name: b\n  - name: new # mine\n    worker_path: ./old\n    config: {a: 1} # kept\n\n# end\n",
                ),
                (
                    "workers:\n  -\n    worker_path: /x\n    name: \"old\"",
                    "workers:\n  -\n    worker_path: /x\n    name: \"old\"\n  -\n    worker_path: /x\n    name: new\n",
                ),
                (
                    "workers:\n  - {name: old, worker_path: /x}\n",
                    "workers:\n  - {name: old, worker_path: /x}\n  - {name: new, worker_path: /x}\n",
                ),
                (ENTRY, "as it was"),
            ],
        );
    }

    #[test]
    fn an_entry_is_removed() {
        check(
            remove,
            &[
                ("", "as it was"),
                (ENTRY, "as it was"),
                (
                    "workers:\n  # one\n  - name: old\n    worker_path: /x\n\n# end\n",
                    "workers: []\n  # one\n\n# end\n",
                ),
                (
                    "workers:\n  - name: a\n  # one\n  -\n    name: old\n    config:\n      a: 1\n  - name: b\n",
                    "workers:\n  - name: a\n  # one\n  - name: b\n",
                ),
                (
                    "workers:\n  - {name: old}\n  - name: b\n",
                    "workers:\n  - name: b\n",
                ),
                (
                    "workers:\n  - name: a\n    config: &c {x: 1}\n  - name: old\n    config: *c\n",
                    "workers:\n  - name: a\n    config: &c {x: 1}\n",
                ),
                (
                    "workers:\n  - name: old\n    config: &c {x: 1}\n  - name: b\n    config: *c\n",
                    "error: config.yaml: cannot be changed without changing more than the entry of old under `workers`; do it by hand",
                ),
            ],
        );
        let number = "workers:\n  - name: 7\n  - name: b\n";
        let removed = made(number, &Change::Remove { name: "7" });
        assert_eq!(removed, "workers:\n  - name: b\n");
    }

    #[test]
    fn the_config_of_an_entry_is_dropped() {
        check(
            drop_config,
            &[
                ("workers:\n  - name: old\n", "as it was"),
                (
                    "workers:\n  - name: old\n    config:\n      a: 1\n      # deep\n      b: {c: 2}\n    worker_path: /x\n",
                    "workers:\n  - name: old\n    worker_path: /x\n",
                ),
                (
                    "workers:\n  - config: {a: 1}\n    name: old\n",
                    "workers:\n  - name: old\n",
                ),
            ],
        );
    }

    type Made<'a> = &'a dyn Fn(&str) -> String;

    #[test]
    fn brackets_are_refused() {
        let refused = |line: usize, name: &str| {
            format!(
                "error: config.yaml:{line}: an entry in brackets is not edited; write each entry \
                 on lines of its own, `- name: {name}` and below it `  worker_path: DIRECTORY`, \
                 and try again"
            )
        };
        let copy = |text: &str| {
            let (name, from, worker_path) = ("new", "old", "/srv/new");
            let change = Change::Copy {
                name,
                from,
                worker_path,
            };
            made(text, &change)
        };
        for (make, name, text, line) in [
            (&add as Made<'_>, "new", "workers: [{name: a}]\n", 1),
            (&add, "new", "{workers: [\n  {name: a},\n]}\n", 1),
            (&add, "new", "workers: [ # none\n  ]\n", 1),
            (&add, "new", "workers: [{name: new}, {name: b}]", 1),
            (&add, "new", "workers:\n  - name: a\n  - {name: new}\n", 3),
            (&copy, "new", "workers: [{name: old, worker_path: /x}]\n", 1),
            (
                &remove,
                "old",
                "port: 1\nworkers: [{name: a}, {name: old}]",
                2,
            ),
            (
                &drop_config,
                "old",
                "workers: [{name: old, config: {a: 1}}]",
                1,
            ),
            (
                &drop_config,
                "old",
                "workers:\n  - {name: old, config: {a: 1}}",
                2,
            ),
        ] {
            assert_eq!(make(text), refused(line, name), "of\n{text}");
        }
        for (make, text) in [
            (
                &add as Made<'_>,
                "workers: [{name: new, worker_path: /srv/new}]",
            ),
            (&remove, "workers: [{name: a}]"),
            (&drop_config, "workers: [{name: old}]"),
        ] {
            assert_eq!(make(text), "as it was", "of\n{text}");
        }
    }

    #[test]
    fn what_cannot_be_edited_is_refused() {
        check(
            add,
            &[
                (
                    "workers: {a: 1}\n",
                    "error: config.yaml: `workers` is not a list",
                ),
                (
                    "workers: 5\n",
                    "error: config.yaml: `workers` is not a list",
                ),
                (
                    "workers:\n  - name: new\n  - name: b\n  - name: new\n",
                    "error: config.yaml: two workers are called new, on lines 2 and 4; remove one of them",
                ),
                (
                    "a: &w\n  - name: b\nworkers: *w\n",
                    "error: config.yaml: cannot be changed without changing more than the entry of new under `workers`, with `worker_path: /srv/new`; do it by hand",
                ),
                (
                    "workers:\n\t- name: b\n",
                    "error: config.yaml:2: invalid YAML: tabs disallowed within this context (block indentation)",
                ),
            ],
        );
    }

    #[test]
    fn names_and_paths_are_quoted_where_yaml_would_read_something_else() {
        for (text, written) in [
            ("/srv/a-b.c_d@1", "/srv/a-b.c_d@1"),
            ("true", "\"true\""),
            ("7", "\"7\""),
            ("/a b", "\"/a b\""),
            ("/a: #b", "\"/a: #b\""),
            ("/\u{e4}\n\"", "\"/\u{e4}\\n\\\"\""),
            ("-", "\"-\""),
            ("", "\"\""),
        ] {
            assert_eq!(scalar(text), written);
            let change = Change::Add {
                name: "n",
                worker_path: text,
            };
            let edited = edit(Path::new("c"), "", &change).unwrap().unwrap();
            let read = Document::parse(Path::new("c"), edited.as_bytes())
                .unwrap()
                .to_json();
            assert_eq!(read["workers"][0][PATH], text);
        }
    }

    fn add_to(path: &Path, name: &str) -> Result<bool, EditError> {
        let worker_path = "/x";
        edit_file(path, &Change::Add { name, worker_path })
    }

    #[test]
    fn a_file_is_replaced_in_one_step() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.yaml");
        assert!(add_to(&path, "a").unwrap());
        assert!(!add_to(&path, "a").unwrap());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let link = dir.path().join("link.yaml");
        std::os::unix::fs::symlink("config.yaml", &link).unwrap();
        assert!(add_to(&link, "b").unwrap());
        assert!(link.is_symlink());
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text.matches("- name:").count(), 2, "{text}");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o640);

        fs::set_permissions(&path, fs::Permissions::from_mode(0o444)).unwrap();
        let refused = add_to(&path, "c").unwrap_err();
        assert!(
            refused.to_string().starts_with("cannot change "),
            "{refused}"
        );
        let nowhere = add_to(&dir.path().join("no/config.yaml"), "c").unwrap_err();
        assert!(matches!(
            nowhere,
            EditError::Io {
                operation: "find",
                ..
            }
        ));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        fs::write(&path, b"\xff").unwrap();
        assert!(matches!(add_to(&path, "c"), Err(EditError::Document(_))));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn edits_at_once_are_all_made() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.yaml");
        std::thread::scope(|scope| {
            for n in 0..8 {
                let path = &path;
                scope.spawn(move || add_to(path, &format!("w{n}")).unwrap());
            }
        });
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text.matches("- name:").count(), 8, "{text}");
    }

    proptest::proptest! {
        /// For every text, the result has the same values with the change, or does not exist.
        #[test]
        fn nothing_else_changes(
            pieces in proptest::collection::vec(
                proptest::sample::select(&[
                    "workers:", "\n", "  ", "- ", "name: old", "name: b", "worker_path: /x", "config:", "    a: 1", "[", "]", "{", "}",
                    ", ", "# c", "port: 1", "&a ", "*a", "|", "'", "\"", "\r\n", "~", ": ", "\u{e4}",
                ][..]),
                0..24,
            )
        ) {
            let text = pieces.concat();
            for change in [
                Change::Add { name: "old", worker_path: "/new" },
                Change::Remove { name: "old" },
                Change::DropConfig { name: "old" },
            ] {
                let Ok(Some(edited)) = edit(Path::new("c"), &text, &change) else { continue };
                let read = |text: &str| Document::parse(Path::new("c"), text.as_bytes()).unwrap().to_json();
                let mut meant = read(&text);
                change.apply(&mut meant);
                proptest::prop_assert_eq!(read(&edited), meant);
                // Done twice it is done.
                let again = edit(Path::new("c"), &edited, &change);
                proptest::prop_assert!(matches!(again, Ok(None)), "{:?}", again);
            }
        }
    }
}
