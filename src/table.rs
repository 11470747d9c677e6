//! Columns of text, for standard output.

use std::fmt::Write as _;

use iii_sandbox::tail::inert;

/// How a column is filled up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Align {
    Left,
    Right,
}

/// Rows under a header, each column as wide as its widest cell. The last column is not filled up.
#[derive(Debug)]
pub struct Table<const N: usize> {
    align: [Align; N],
    rows: Vec<[String; N]>,
}

impl<const N: usize> Table<N> {
    pub fn new(columns: [(&str, Align); N]) -> Self {
        Self {
            align: columns.map(|(_, align)| align),
            rows: vec![columns.map(|(name, _)| name.to_owned())],
        }
    }

    /// Cells may hold names from projects, images and sandboxes: they are made [inert].
    pub fn row(&mut self, cells: [String; N]) {
        self.rows.push(cells.map(|cell| inert(&cell)));
    }

    /// The whole table, a line per row.
    pub fn text(&self) -> String {
        let mut widths = [0; N];
        for row in &self.rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = cell.chars().count().max(*width);
            }
        }
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for ((cell, &width), align) in row.iter().zip(&widths).zip(self.align) {
                // Writing to a string cannot fail.
                let _ = match align {
                    Align::Left => write!(line, "{cell:<width$}  "),
                    Align::Right => write!(line, "{cell:>width$}  "),
                };
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let mut table = Table::new([
            ("NAME", Align::Left),
            ("SIZE", Align::Right),
            ("KEPT BY", Align::Left),
        ]);
        for [name, size, kept] in [["é", "1.0 MiB", "x\x1b[31m"], ["a-longer-name", "9 B", ""]] {
            table.row([name.into(), size.into(), kept.into()]);
        }
        assert_eq!(
            table.text(),
            "NAME              SIZE  KEPT BY\n\
             é              1.0 MiB  x\n\
             a-longer-name      9 B\n"
        );
    }
}
