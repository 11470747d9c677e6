//! Output of managed workers, in files of bounded size.
//!
//! `worker.log` in the worker's directory is the newest; at [`MAX_FILE`] it becomes `worker.log.1`,
//! that one `worker.log.2`, and so on up to [`OLDER`]. A file begins and ends with a line, unless a
//! line is as long as a file.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use notify::{RecursiveMode, Watcher as _};

/// Bytes at which a file is put aside.
pub const MAX_FILE: u64 = 10 << 20;
/// Most files that were put aside.
pub const OLDER: u32 = 3;
/// Bytes read at once.
const BLOCK: usize = 64 << 10;

fn path(dir: &Path, age: u32) -> PathBuf {
    match age {
        0 => dir.join("worker.log"),
        age => dir.join(format!("worker.log.{age}")),
    }
}

/// Writes a worker's log.
#[derive(Debug)]
pub struct Log {
    dir: PathBuf,
    file: File,
    len: u64,
    limit: u64,
    /// Whether the last byte ended a line.
    at_line_end: bool,
}

impl Log {
    /// Goes on writing the log in `dir`, which is made if it is missing.
    pub fn open(dir: &Path) -> io::Result<Self> {
        Self::with_limit(dir, MAX_FILE)
    }

    fn with_limit(dir: &Path, limit: u64) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let (file, len) = open(dir)?;
        Ok(Self {
            dir: dir.to_owned(),
            file,
            len,
            limit,
            at_line_end: true,
        })
    }

    fn put_aside(&mut self) -> io::Result<()> {
        for age in (0..OLDER).rev() {
            match fs::rename(path(&self.dir, age), path(&self.dir, age + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        (self.file, self.len) = open(&self.dir)?;
        Ok(())
    }
}

fn open(dir: &Path) -> io::Result<(File, u64)> {
    // A worker's output may be as secret as its data.
    let mut options = File::options();
    let file = options.append(true).create(true).mode(0o600);
    let file = file.open(path(dir, 0))?;
    let len = file.metadata()?.len();
    Ok((file, len))
}

impl Write for Log {
    /// Writes up to the end of a line where a file is full, so that may be less than `bytes`.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.len >= self.limit && (self.at_line_end || self.len >= 2 * self.limit) {
            self.put_aside()?;
        }
        let left = usize::try_from(self.limit.saturating_sub(self.len)).unwrap_or(usize::MAX);
        let line_end = |from: usize| {
            let rest = bytes.get(from..)?;
            let at = rest.iter().position(|&byte| byte == b'\n')?;
            Some(from + at + 1)
        };
        let end = if left < bytes.len() {
            line_end(left.saturating_sub(1)).unwrap_or(bytes.len())
        } else {
            bytes.len()
        };
        let written = self.file.write(bytes.get(..end).unwrap_or(bytes))?;
        self.len += written as u64;
        if let Some(last) = written.checked_sub(1).and_then(|at| bytes.get(at)) {
            self.at_line_end = *last == b'\n';
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// Removes the log in `dir`, and `dir` if nothing else is in it.
pub fn remove(dir: &Path) -> io::Result<()> {
    let gone = |removed: io::Result<()>| match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    };
    for age in 0..=OLDER {
        gone(fs::remove_file(path(dir, age)))?;
    }
    match fs::remove_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
        removed => gone(removed),
    }
}

/// Reads a worker's log while it is being written.
#[derive(Debug)]
pub struct Reader {
    dir: PathBuf,
    /// The file that was read last; none if there was none.
    file: Option<File>,
}

impl Reader {
    /// Hands the last `lines` lines of the log in `dir` to `show`, and stands behind them.
    pub fn last(
        dir: &Path,
        lines: usize,
        show: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<Self> {
        // Newest first. A file that is put aside meanwhile stays the file that it is.
        let mut files = Vec::new();
        let mut left = lines;
        for age in 0..=OLDER {
            let mut file = match File::open(path(dir, age)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => break,
                file => file?,
            };
            let seen = files.iter().any(|(other, _)| is_same(other, &file));
            if seen {
                continue;
            }
            let (start, found) = start_of_last(&mut file, left)?;
            files.push((file, start));
            left = left.saturating_sub(found);
            if left == 0 {
                break;
            }
        }
        let mut reader = Self {
            dir: dir.to_owned(),
            file: None,
        };
        for (mut file, start) in files.into_iter().rev() {
            file.seek(SeekFrom::Start(start))?;
            drain(&mut file, show)?;
            reader.file = Some(file);
        }
        Ok(reader)
    }

    /// Hands to `show` whatever comes, as it comes. Once there is nothing left, and whenever
    /// `pause` has passed without anything new, `is_over` is asked whether more is to be expected.
    pub fn follow(
        mut self,
        pause: Duration,
        is_over: &mut dyn FnMut() -> bool,
        show: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let (sender, changes) = mpsc::sync_channel(1);
        let told = move |event: notify::Result<notify::Event>| {
            if event.is_ok_and(|event| !event.kind.is_access()) {
                // Several notifications are one change.
                let _ = sender.try_send(());
            }
        };
        let mut watcher = notify::recommended_watcher(told).map_err(io::Error::other)?;
        let watched = watcher.watch(&self.dir, RecursiveMode::NonRecursive);
        watched.map_err(io::Error::other)?;
        loop {
            let over = is_over();
            self.catch_up(show)?;
            if over {
                return Ok(());
            }
            let _ = changes.recv_timeout(pause);
        }
    }

    fn catch_up(&mut self, show: &mut dyn FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
        if let Some(file) = &mut self.file {
            drain(file, show)?;
        }
        // The newest last: those between the one that was read last and this one were put aside
        // meanwhile.
        let mut newer = Vec::new();
        for age in 0..=OLDER {
            let Ok(file) = File::open(path(&self.dir, age)) else {
                break;
            };
            if self.file.as_ref().is_some_and(|read| is_same(read, &file)) {
                break;
            }
            newer.push(file);
        }
        for mut file in newer.into_iter().rev() {
            drain(&mut file, show)?;
            self.file = Some(file);
        }
        Ok(())
    }
}

fn is_same(one: &File, other: &File) -> bool {
    let id = |file: &File| file.metadata().ok().map(|meta| (meta.dev(), meta.ino()));
    id(one).is_some() && id(one) == id(other)
}

fn drain(file: &mut File, show: &mut dyn FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
    let mut block = vec![0; BLOCK];
    loop {
        match file.read(&mut block)? {
            0 => return Ok(()),
            read => show(block.get(..read).unwrap_or_default())?,
        }
    }
}

/// Where the last `lines` lines begin, and how many they are.
fn start_of_last(file: &mut File, lines: usize) -> io::Result<(u64, usize)> {
    let len = file.metadata()?.len();
    if lines == 0 {
        return Ok((len, 0));
    }
    let mut end = len;
    let mut found = 0;
    let mut block = vec![0; BLOCK];
    while end > 0 {
        let start = end.saturating_sub(BLOCK as u64);
        let part = block.get_mut(..(end - start) as usize).unwrap_or_default();
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(part)?;
        for (at, _) in part
            .iter()
            .enumerate()
            .rev()
            .filter(|(_, byte)| **byte == b'\n')
        {
            let at = start + at as u64;
            // The one at the very end ends the last line.
            if at + 1 == len {
                continue;
            }
            found += 1;
            if found == lines {
                return Ok((at + 1, found));
            }
        }
        end = start;
    }
    // The first line has no newline before it.
    Ok((0, if len > 0 { found + 1 } else { 0 }))
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::fmt::Write as _;

    use tempfile::TempDir;

    use super::*;

    fn last(dir: &Path, lines: usize) -> (String, Reader) {
        let mut text = Vec::new();
        let reader = Reader::last(dir, lines, &mut |bytes| text.write_all(bytes)).unwrap();
        (String::from_utf8(text).unwrap(), reader)
    }

    fn lines(range: std::ops::Range<u32>) -> String {
        let mut text = String::new();
        for n in range {
            let _ = writeln!(text, "line {n:03}");
        }
        text
    }

    #[test]
    fn files_are_put_aside_at_ends_of_lines() {
        let dir = TempDir::new().unwrap();
        let mut log = Log::with_limit(dir.path(), 100).unwrap();
        // In pieces that begin and end anywhere.
        for piece in lines(0..40).as_bytes().chunks(7) {
            log.write_all(piece).unwrap();
        }
        let text = |age| fs::read_to_string(path(dir.path(), age)).unwrap();
        let kept: Vec<String> = (0..=OLDER).rev().map(text).collect();
        let whole = kept.concat();
        assert!(
            whole.len() >= 300 && lines(0..40).ends_with(&whole),
            "{whole}"
        );
        for file in &kept {
            assert!(file.len() <= 100 + 16 && file.ends_with('\n') && file.starts_with("line"));
        }
        assert!(!path(dir.path(), OLDER + 1).exists());
        assert_eq!(
            fs::metadata(path(dir.path(), 0)).unwrap().mode() & 0o777,
            0o600
        );
    }

    #[test]
    fn a_line_without_end_does_not_fill_the_disk() {
        let dir = TempDir::new().unwrap();
        let mut log = Log::with_limit(dir.path(), 100).unwrap();
        for _ in 0..1000 {
            log.write_all(&[b'x'; 10]).unwrap();
        }
        let size: u64 = fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().metadata().unwrap().len())
            .sum();
        assert!(size <= 4 * 210, "{size}");
    }

    #[test]
    fn the_last_lines_come_from_as_many_files_as_it_takes() {
        let dir = TempDir::new().unwrap();
        assert_eq!(last(dir.path(), 5).0, "");
        let mut log = Log::with_limit(dir.path(), 100).unwrap();
        log.write_all(lines(0..25).as_bytes()).unwrap();
        assert_eq!(last(dir.path(), 3).0, lines(22..25));
        assert_eq!(last(dir.path(), 20).0, lines(5..25));
        assert_eq!(last(dir.path(), 1000).0, lines(0..25));
        assert_eq!(last(dir.path(), 0).0, "");
        log.write_all(b"no end").unwrap();
        assert_eq!(last(dir.path(), 2).0, format!("{}no end", lines(24..25)));
        // Longer than a block.
        let long = "y".repeat(3 * BLOCK);
        log.write_all(format!("\n{long}\nend\n").as_bytes())
            .unwrap();
        assert_eq!(last(dir.path(), 2).0, format!("{long}\nend\n"));
    }

    #[test]
    fn nothing_is_missed_while_files_are_put_aside() {
        let dir = TempDir::new().unwrap();
        let mut log = Log::with_limit(dir.path(), 200).unwrap();
        log.write_all(lines(0..10).as_bytes()).unwrap();
        let (before, reader) = last(dir.path(), 5);
        assert_eq!(before, lines(5..10));
        let seen = RefCell::new(before.into_bytes());
        let mut next = 10;
        // Between two looks, up to three files are filled.
        let mut is_over = || {
            let more = lines(next..next + 50);
            log.write_all(more.as_bytes()).unwrap();
            next += 50;
            next > 400
        };
        reader
            .follow(Duration::from_secs(10), &mut is_over, &mut |bytes| {
                seen.borrow_mut().write_all(bytes)
            })
            .unwrap();
        assert_eq!(
            String::from_utf8(seen.into_inner()).unwrap(),
            lines(5..next)
        );
    }
}
