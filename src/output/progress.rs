//! Bars that appear only for long operations, and leave nothing behind.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

/// The unit of a bar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Things.
    Count,
    /// Bytes.
    Bytes,
}

/// How far one operation is. Updates are cheap and may come from any thread; dropping it takes the
/// bar away.
#[derive(Debug)]
pub struct ProgressHandle {
    title: String,
    unit: Unit,
    started: Instant,
    /// How long the operation must take before a bar is worth the reader's attention.
    delay: Duration,
    position: AtomicU64,
    /// The total; 0 while it is unknown.
    length: AtomicU64,
    bars: Option<MultiProgress>,
    bar: OnceLock<ProgressBar>,
}

impl ProgressHandle {
    pub(super) fn new(
        title: String,
        unit: Unit,
        delay: Duration,
        bars: Option<MultiProgress>,
    ) -> Self {
        ProgressHandle {
            title,
            unit,
            started: Instant::now(),
            delay,
            position: AtomicU64::new(0),
            length: AtomicU64::new(0),
            bars,
            bar: OnceLock::new(),
        }
    }

    /// Adds to what is done.
    pub fn inc(&self, delta: u64) {
        self.position.fetch_add(delta, Ordering::Relaxed);
        self.show();
    }

    /// Says how much is done.
    pub fn set(&self, position: u64) {
        self.position.store(position, Ordering::Relaxed);
        self.show();
    }

    /// Says how much there is to do.
    pub fn set_length(&self, length: u64) {
        self.length.store(length, Ordering::Relaxed);
        self.show();
    }

    /// How much is done.
    pub fn position(&self) -> u64 {
        self.position.load(Ordering::Relaxed)
    }

    fn show(&self) {
        let Some(bars) = &self.bars else {
            return;
        };
        let bar = match self.bar.get() {
            Some(bar) => bar,
            None if self.started.elapsed() < self.delay => return,
            None => self.bar.get_or_init(|| self.bar(bars)),
        };
        match self.length.load(Ordering::Relaxed) {
            0 => {}
            length if bar.length() == Some(length) => {}
            length => {
                bar.set_length(length);
                bar.set_style(style(self.unit, true));
            }
        }
        bar.set_position(self.position());
    }

    fn bar(&self, bars: &MultiProgress) -> ProgressBar {
        // Elapsed time is the operation's, which began before the bar did.
        let bar = ProgressBar::no_length()
            .with_style(style(self.unit, false))
            .with_elapsed(self.started.elapsed())
            .with_message(self.title.clone());
        bars.add(bar)
    }
}

impl Drop for ProgressHandle {
    fn drop(&mut self) {
        if let (Some(bar), Some(bars)) = (self.bar.get(), &self.bars) {
            bar.finish_and_clear();
            bars.remove(bar);
        }
    }
}

fn style(unit: Unit, bounded: bool) -> ProgressStyle {
    let template = match (unit, bounded) {
        (Unit::Count, true) => "  {msg} {bar:24} {human_pos}/{human_len}",
        (Unit::Count, false) => "  {msg} {human_pos}",
        (Unit::Bytes, true) => "  {msg} {bar:24} {binary_bytes}/{binary_total_bytes}",
        (Unit::Bytes, false) => "  {msg} {binary_bytes}",
    };
    // The templates are constants that the tests draw; the default only stands in for an impossible
    // error.
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("━╸─")
}
