//! The output, to the byte.

use std::sync::atomic::{AtomicUsize, Ordering};

use indicatif::TermLike;

use super::*;

fn say_everything(ui: &Ui) {
    ui.ok("my-worker started (pid: 123)");
    ui.warn("no engine at ws://localhost:49134\nstart one with `iii`");
    ui.note("in the namespace runtime");
    ui.step_line("base", "cached");
    ui.step_line(
        "project",
        format_args!("changed ({})", human_counted(3, "file")),
    );
    ui.output_line("install", b"added 30 packages\r");
    ui.output_line("install", b"\x1b[2K");
    ui.error("setup failed: exit code 1");
}

#[test]
fn plain_lines() {
    let (ui, out) = Ui::for_test(false);
    say_everything(&ui);
    assert_eq!(
        out.text(),
        "  ✓ my-worker started (pid: 123)\n\
         \x20 ⚠ no engine at ws://localhost:49134\n\
         \x20   start one with `iii`\n\
         \x20   in the namespace runtime\n\
         \x20 ✓ base     cached\n\
         \x20 ✓ project  changed (3 files)\n\
         \x20   install │ added 30 packages\n\
         error: setup failed: exit code 1\n"
    );
}

#[test]
fn colour_is_only_paint() {
    let (plain, plain_out) = Ui::for_test(false);
    let (coloured, coloured_out) = Ui::for_test(true);
    say_everything(&plain);
    say_everything(&coloured);
    let text = coloured_out.text();
    for part in [
        "\x1b[32m✓\x1b[0m my-worker",
        "\x1b[33m⚠\x1b[0m no engine",
        "\x1b[31merror:\x1b[0m setup",
        "\x1b[2minstall │\x1b[0m added",
    ] {
        assert!(text.contains(part), "{text:?}");
    }
    let stripped: Vec<String> = text.lines().map(|line| clean(line.as_bytes())).collect();
    assert_eq!(stripped, plain_out.text().lines().collect::<Vec<_>>());
}

#[test]
fn messages_cannot_act_on_the_terminal() {
    let (ui, out) = Ui::for_test(false);
    ui.warn("skipped evil\x1b]0;owned\x07\x1b[2J\rname");
    ui.ok("");
    assert_eq!(out.text(), "  ⚠ skipped evilname\n  ✓ \n");
}

#[test]
fn a_stream_is_shown_by_lines() {
    let (ui, out) = Ui::for_test(false);
    let stream = ui.output("setup");
    stream.push(b"one\ntw");
    assert_eq!(out.text(), "    setup │ one\n");
    stream.push(b"o\n\n\xff");
    drop(stream);
    assert_eq!(
        out.text(),
        "    setup │ one\n    setup │ two\n    setup │ \u{fffd}\n"
    );
}

#[test]
fn threads_write_whole_lines() {
    let (ui, out) = Ui::for_test(false);
    std::thread::scope(|scope| {
        for name in ["a", "b", "c", "d"] {
            let ui = ui.clone();
            scope.spawn(move || {
                let stream = ui.output(name);
                for _ in 0..200 {
                    stream.push(name.repeat(30).as_bytes());
                    stream.push(b"\n");
                }
            });
        }
    });
    let text = out.text();
    assert_eq!(text.lines().count(), 800);
    for line in text.lines() {
        let name = &line[4..5];
        assert_eq!(line, format!("    {name} │ {}", name.repeat(30)));
    }
}

/// A terminal that remembers what was drawn and counts the clears.
#[derive(Clone, Debug, Default)]
struct FakeTerm {
    drawn: TestOutput,
    clears: Arc<AtomicUsize>,
}

impl TermLike for FakeTerm {
    fn width(&self) -> u16 {
        80
    }
    fn move_cursor_up(&self, _: usize) -> io::Result<()> {
        Ok(())
    }
    fn move_cursor_down(&self, _: usize) -> io::Result<()> {
        Ok(())
    }
    fn move_cursor_right(&self, _: usize) -> io::Result<()> {
        Ok(())
    }
    fn move_cursor_left(&self, _: usize) -> io::Result<()> {
        Ok(())
    }
    fn write_line(&self, text: &str) -> io::Result<()> {
        self.write_str(text)
    }
    fn write_str(&self, text: &str) -> io::Result<()> {
        self.drawn.clone().write_all(text.as_bytes())
    }
    fn clear_line(&self) -> io::Result<()> {
        self.clears.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

fn on_terminal(delay: Duration) -> (Ui, FakeTerm, TestOutput) {
    let (term, out) = (FakeTerm::default(), TestOutput::default());
    let target = ProgressDrawTarget::term_like(Box::new(term.clone()));
    let bars = MultiProgress::with_draw_target(target);
    let ui = Ui::new(Box::new(out.clone()), false, Some(bars), delay);
    (ui, term, out)
}

#[test]
fn a_bar_is_drawn_and_taken_away() {
    for (unit, length, expected) in [
        (Unit::Count, Some(30_000), "  Reading files ━━━━"),
        (Unit::Count, Some(30_000), "15,000/30,000"),
        (Unit::Bytes, Some(30_000), "14.65 KiB/29.30 KiB"),
        (Unit::Count, None, "  Reading files 15,000"),
        (Unit::Bytes, None, "  Reading files 14.65 KiB"),
    ] {
        let (ui, term, out) = on_terminal(Duration::ZERO);
        let progress = ui.progress("Reading files", unit);
        if let Some(length) = length {
            progress.set_length(length);
        }
        progress.set(14_000);
        progress.inc(1_000);
        ui.ok("meanwhile");
        let drawn = term.drawn.text();
        assert!(drawn.contains(expected), "{expected}: {drawn:?}");
        assert_eq!(progress.position(), 15_000);
        let clears = term.clears.load(Ordering::Relaxed);
        drop(progress);
        assert!(term.clears.load(Ordering::Relaxed) > clears);
        assert_eq!(out.text(), "  ✓ meanwhile\n");
    }
}

#[test]
fn short_work_draws_nothing() {
    let (ui, term, _) = on_terminal(Duration::MAX);
    let progress = ui.progress("Reading files", Unit::Count);
    progress.set_length(2);
    progress.inc(1);
    drop(progress);
    assert_eq!(term.drawn.text(), "");
}

#[test]
fn a_bar_may_be_moved_from_many_threads() {
    let (ui, _, _) = on_terminal(Duration::ZERO);
    let progress = ui.progress("Reading files", Unit::Count);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..1_000 {
                    progress.inc(1);
                }
            });
        }
    });
    assert_eq!(progress.position(), 4_000);
}
