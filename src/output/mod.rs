//! Lines for people, all of them on stderr.
//!
//! One line per fact, indented by two spaces, with a mark in front: `✓` done, `⚠` look at this,
//! `error:` failed. Every line makes sense without colour, and a line is written in one piece, so
//! that several threads and several processes can share a terminal. Data for programs (`--json`)
//! goes to stdout and does not pass through here.

use std::fmt::{self, Display, Write as _};
use std::io::{self, IsTerminal as _, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use iii_sandbox::tail::{LineSplitter, clean, inert};

use crate::settings;
use indicatif::{MultiProgress, ProgressDrawTarget};

mod human;
mod progress;

pub use human::{
    human_age, human_bytes, human_count, human_counted, human_duration, human_span, human_time,
};
pub use progress::{ProgressHandle, Unit};

/// How long an operation may take before a bar is drawn for it.
const PROGRESS_DELAY: Duration = Duration::from_millis(250);

/// The width of the first column of [`Ui::step_line`]: the longest kind of layer.
const KIND_WIDTH: usize = "project".len();

/// Where people's lines go. Clones write to the same place.
#[derive(Clone)]
pub struct Ui {
    shared: Arc<Shared>,
}

struct Shared {
    out: Mutex<Box<dyn Write + Send>>,
    colour: bool,
    /// Present where bars can be drawn.
    bars: Option<MultiProgress>,
    delay: Duration,
}

impl fmt::Debug for Ui {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ui")
            .field("colour", &self.shared.colour)
            .field("bars", &self.shared.bars.is_some())
            .finish_non_exhaustive()
    }
}

#[derive(Clone, Copy)]
enum Style {
    Red,
    Green,
    Yellow,
    Dim,
}

impl Style {
    fn code(self) -> u8 {
        match self {
            Style::Red => 31,
            Style::Green => 32,
            Style::Yellow => 33,
            Style::Dim => 2,
        }
    }
}

impl Ui {
    /// Writes to stderr. Bars and colour appear only where stderr is a terminal that can show them,
    /// colour only while `NO_COLOR` is unset or empty.
    pub fn stderr() -> Self {
        let terminal = io::stderr().is_terminal() && settings::terminal_is_capable();
        let colour = terminal && settings::wants_colour();
        let bars = terminal.then(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr()));
        Self::new(Box::new(io::stderr()), colour, bars, PROGRESS_DELAY)
    }

    /// Writes to `out`, as it would to a file.
    pub fn to(out: impl Write + Send + 'static) -> Self {
        Self::new(Box::new(out), false, None, PROGRESS_DELAY)
    }

    /// Writes to the returned buffer, as it would to a file, or with `colour` as to a terminal
    /// without bars.
    #[cfg(test)]
    pub fn for_test(colour: bool) -> (Self, TestOutput) {
        let output = TestOutput::default();
        let ui = Self::new(Box::new(output.clone()), colour, None, PROGRESS_DELAY);
        (ui, output)
    }

    fn new(
        out: Box<dyn Write + Send>,
        colour: bool,
        bars: Option<MultiProgress>,
        delay: Duration,
    ) -> Self {
        Ui {
            shared: Arc::new(Shared {
                out: Mutex::new(out),
                colour,
                bars,
                delay,
            }),
        }
    }

    /// `  ✓ message`
    pub fn ok(&self, message: impl Display) {
        self.message(&format!("  {} ", self.paint(Style::Green, "✓")), &message);
    }

    /// `  ⚠ message`
    pub fn warn(&self, message: impl Display) {
        self.message(&format!("  {} ", self.paint(Style::Yellow, "⚠")), &message);
    }

    /// `    message`: belongs to the line above, or is only of interest.
    pub fn note(&self, message: impl Display) {
        self.message("    ", &message);
    }

    /// `error: message`
    pub fn error(&self, message: impl Display) {
        self.message(&format!("{} ", self.paint(Style::Red, "error:")), &message);
    }

    /// A line that another process of ours has made as it is to be shown.
    pub fn line(&self, line: &str) {
        self.write(&format!("{}\n", inert(line)));
    }

    /// `  ✓ kind     text`: what became of one layer, in columns.
    pub fn step_line(&self, kind: impl Display, text: impl Display) {
        let kind = format!("{:<KIND_WIDTH$}", kind.to_string());
        self.ok(format_args!("{kind}  {text}"));
    }

    /// `    prefix │ line`: one line of a step's output, [made safe](clean). Blank lines are not
    /// shown.
    pub fn output_line(&self, prefix: &str, line: &[u8]) {
        let line = clean(line);
        if !line.is_empty() {
            let prefix = self.paint(Style::Dim, &format!("{prefix} │"));
            self.write(&format!("    {prefix} {line}\n"));
        }
    }

    /// A stream of a step's output, shown line by line as pieces of it come in.
    pub fn output(&self, prefix: impl Into<String>) -> StepOutput {
        StepOutput {
            ui: self.clone(),
            prefix: prefix.into(),
            splitter: Mutex::default(),
        }
    }

    /// Starts to tell how far an operation is. Nothing is drawn before its first update after 250
    /// ms, nor where stderr is not a terminal.
    pub fn progress(&self, title: impl Into<String>, unit: Unit) -> ProgressHandle {
        let title = inert(&title.into());
        ProgressHandle::new(title, unit, self.shared.delay, self.shared.bars.clone())
    }

    /// Writes a message of any number of lines, those after the first aligned with it. Messages
    /// carry names from projects, images and sandboxes, so each line is made [inert].
    fn message(&self, prefix: &str, message: &dyn Display) {
        let message = message.to_string();
        let mut lines = message.lines().map(inert);
        let mut text = format!("{prefix}{}\n", lines.next().unwrap_or_default());
        for line in lines {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "    {line}");
        }
        self.write(&text);
    }

    fn paint(&self, style: Style, text: &str) -> String {
        if self.shared.colour {
            format!("\x1b[{}m{text}\x1b[0m", style.code())
        } else {
            text.to_owned()
        }
    }

    /// Writes whole lines, above the bars if there are any. A closed stderr is ignored.
    fn write(&self, text: &str) {
        let write = || {
            let mut out = self
                .shared
                .out
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
        };
        match &self.shared.bars {
            Some(bars) => bars.suspend(write),
            None => write(),
        }
    }
}

/// The output of one step on its way to the terminal. Dropping it shows what was left without a
/// newline.
#[derive(Debug)]
pub struct StepOutput {
    ui: Ui,
    prefix: String,
    splitter: Mutex<LineSplitter>,
}

impl StepOutput {
    /// Shows the lines that `piece` completes; it may start and end anywhere in a line.
    pub fn push(&self, piece: &[u8]) {
        let mut splitter = self.splitter.lock().unwrap_or_else(PoisonError::into_inner);
        splitter.push(piece, |line| self.ui.output_line(&self.prefix, line));
    }
}

impl Drop for StepOutput {
    fn drop(&mut self) {
        let splitter = self
            .splitter
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        splitter.finish(|line| self.ui.output_line(&self.prefix, line));
    }
}

/// The output of a [`Ui::for_test`].
#[cfg(test)]
#[derive(Clone, Debug, Default)]
pub struct TestOutput(Arc<Mutex<Vec<u8>>>);

#[cfg(test)]
impl TestOutput {
    /// Everything so far.
    pub fn text(&self) -> String {
        let bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

#[cfg(test)]
impl Write for TestOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
