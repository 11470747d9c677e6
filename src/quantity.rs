//! Sizes, shares and lengths of time, as people type them.

use std::time::Duration;

/// Why a text is not a quantity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    #[error(
        "expected a number of bytes with a unit: B, KB, MB, GB, TB (of 1000) or KiB, MiB, GiB, TiB (of 1024), as in 20GB"
    )]
    Size,
    #[error("expected a share of the disk, as in 10%, or a number of bytes, as in 20GB")]
    Room,
    #[error("a share is from 0% to 100%")]
    Share,
    #[error("expected a length of time with a unit: s, m, h, d or w, as in 14d")]
    Time,
    #[error("that is more than can be counted")]
    TooLarge,
}

/// Free room on a disk.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Room {
    /// So many bytes.
    Bytes(u64),
    /// A part of the whole, from 0 to 1.
    Share(f64),
}

/// A limit that can be lifted with `none`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit<T> {
    /// No limit.
    None,
    /// This one.
    At(T),
}

impl<T> Limit<T> {
    /// The limit, if there is one.
    pub fn at(self) -> Option<T> {
        match self {
            Self::None => None,
            Self::At(limit) => Some(limit),
        }
    }
}

/// `20GB`, `512MiB`, `1.5 TB`, `4096B`; a plain number is bytes.
pub fn size(text: &str) -> Result<u64, QuantityError> {
    let (number, unit) = split(text).ok_or(QuantityError::Size)?;
    let factor = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" => 1000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "tib" => 1 << 40,
        _ => return Err(QuantityError::Size),
    };
    times(number, factor)
}

/// A [size], or `none`.
pub fn size_limit(text: &str) -> Result<Limit<u64>, QuantityError> {
    match text {
        "none" => Ok(Limit::None),
        text => size(text).map(Limit::At),
    }
}

/// `10%`, or a [size], or `none`.
pub fn room(text: &str) -> Result<Limit<Room>, QuantityError> {
    if text == "none" {
        return Ok(Limit::None);
    }
    match split(text) {
        Some((number, "%")) if number <= 100.0 => Ok(Limit::At(Room::Share(number / 100.0))),
        Some((_, "%")) => Err(QuantityError::Share),
        _ => match size(text) {
            Err(QuantityError::Size) => Err(QuantityError::Room),
            other => other.map(|bytes| Limit::At(Room::Bytes(bytes))),
        },
    }
}

/// `90s`, `10m`, `36h`, `14d`, `2w`; `0` needs no unit.
pub fn time(text: &str) -> Result<Duration, QuantityError> {
    let (number, unit) = split(text).ok_or(QuantityError::Time)?;
    let factor = match unit {
        "" if number == 0.0 => 1,
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        "w" => 7 * 86_400,
        _ => return Err(QuantityError::Time),
    };
    // Whole seconds are enough here.
    times(number, factor).map(Duration::from_secs)
}

/// A decimal number and what follows it.
fn split(text: &str) -> Option<(f64, &str)> {
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    // `.parse` would take a lone point apart in its own way.
    if !number.starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    Some((number.parse().ok()?, unit.trim_start()))
}

fn times(number: f64, factor: u64) -> Result<u64, QuantityError> {
    // 2^53: a double holds every whole number up to here.
    const MOST: f64 = 9_007_199_254_740_992.0;
    // Every factor is below it.
    #[allow(clippy::cast_precision_loss)]
    let product = number * factor as f64;
    if product < MOST {
        Ok(product as u64)
    } else {
        Err(QuantityError::TooLarge)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("0", Ok(0)),
            ("4096", Ok(4096)),
            ("4096B", Ok(4096)),
            ("20GB", Ok(20_000_000_000)),
            ("20gb", Ok(20_000_000_000)),
            ("20 GB", Ok(20_000_000_000)),
            ("20GiB", Ok(20 << 30)),
            ("1.5MiB", Ok(3 << 19)),
            ("0.5KB", Ok(500)),
            ("1TB", Ok(1_000_000_000_000)),
            ("8191TiB", Ok(8191 << 40)),
            ("8192TiB", Err(QuantityError::TooLarge)),
            ("99999999999999999999999GB", Err(QuantityError::TooLarge)),
            ("20G", Err(QuantityError::Size)),
            ("GB", Err(QuantityError::Size)),
            ("", Err(QuantityError::Size)),
            ("-1GB", Err(QuantityError::Size)),
            ("+1GB", Err(QuantityError::Size)),
            (".5GB", Err(QuantityError::Size)),
            ("1.2.3GB", Err(QuantityError::Size)),
            ("1e9", Err(QuantityError::Size)),
            ("inf", Err(QuantityError::Size)),
            ("10%", Err(QuantityError::Size)),
        ] {
            assert_eq!(size(text), bytes, "{text:?}");
        }
        assert_eq!(size_limit("none"), Ok(Limit::None));
        assert_eq!(size_limit("1KB"), Ok(Limit::At(1000)));
    }

    #[test]
    fn rooms() {
        for (text, expected) in [
            ("10%", Ok(Limit::At(Room::Share(0.1)))),
            ("0%", Ok(Limit::At(Room::Share(0.0)))),
            ("100 %", Ok(Limit::At(Room::Share(1.0)))),
            ("5GB", Ok(Limit::At(Room::Bytes(5_000_000_000)))),
            ("none", Ok(Limit::None)),
            ("101%", Err(QuantityError::Share)),
            ("%", Err(QuantityError::Room)),
            ("ten", Err(QuantityError::Room)),
        ] {
            assert_eq!(room(text), expected, "{text:?}");
        }
    }

    #[test]
    fn times_have_units() {
        for (text, seconds) in [
            ("0", Ok(0)),
            ("0s", Ok(0)),
            ("90s", Ok(90)),
            ("10m", Ok(600)),
            ("1.5h", Ok(5400)),
            ("14d", Ok(14 * 86_400)),
            ("2w", Ok(14 * 86_400)),
            ("14", Err(QuantityError::Time)),
            ("14 days", Err(QuantityError::Time)),
            ("d", Err(QuantityError::Time)),
            ("-1d", Err(QuantityError::Time)),
            ("99999999999999999w", Err(QuantityError::TooLarge)),
        ] {
            assert_eq!(time(text), seconds.map(Duration::from_secs), "{text:?}");
        }
    }
}
