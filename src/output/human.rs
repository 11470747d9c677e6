//! Numbers as people read them.

use std::time::Duration;

use iii_oci::utc;

/// Units of time and their seconds, the largest first.
const UNITS: [(u64, &str); 4] = [(24 * 3600, "d"), (3600, "h"), (60, "m"), (1, "s")];

/// A size: `512 B`, `4.0 KiB`, `12.3 MiB`.
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    // One decimal is shown, so the bits that a double lacks do not matter.
    #[allow(clippy::cast_precision_loss)]
    let mut value = bytes as f64;
    let mut unit = "";
    for name in UNITS {
        value /= 1024.0;
        unit = name;
        // A value that would print as 1024.0 goes to the next unit.
        if value < 1023.95 {
            break;
        }
    }
    format!("{value:.1} {unit}")
}

/// A length of time: `34ms`, `2.1s`, `1m 05s`, `2h 03m`.
pub fn human_duration(duration: Duration) -> String {
    // Rounded first, then cut into units, so that no part shows as a full next one.
    let millis = (duration.as_micros() + 500) / 1000;
    let tenths = (duration.as_millis() + 50) / 100;
    let seconds = (duration.as_millis() + 500) / 1000;
    if millis < 1000 {
        format!("{millis}ms")
    } else if tenths < 600 {
        format!("{}.{}s", tenths / 10, tenths % 10)
    } else if seconds < 3600 {
        format!("{}m {:02}s", seconds / 60, seconds % 60)
    } else {
        format!("{}h {:02}m", seconds / 3600, seconds / 60 % 60)
    }
}

/// A length of time as it is set, in the largest unit that says it exactly: `14d`, `36h`, `90s`.
pub fn human_span(span: Duration) -> String {
    let seconds = span.as_secs();
    let unit = UNITS
        .into_iter()
        .find(|(unit, _)| seconds >= *unit && seconds.is_multiple_of(*unit));
    unit.map_or_else(
        || "0s".to_owned(),
        |(unit, name)| format!("{}{name}", seconds / unit),
    )
}

/// How long ago something was, in its largest unit: `now`, `34s ago`, `5m ago`, `3h ago`,
/// `12d ago`.
pub fn human_age(age: Duration) -> String {
    let seconds = age.as_secs();
    let unit = UNITS.into_iter().find(|(unit, _)| seconds >= *unit);
    unit.map_or_else(
        || "now".to_owned(),
        |(unit, name)| format!("{}{name} ago", seconds / unit),
    )
}

/// A time in UTC, from the seconds since 1970: `2026-11-22 01:36:27Z`.
pub fn human_time(seconds: i64) -> String {
    utc::rfc3339(seconds).replace('T', " ")
}

/// A count with its thousands apart: `30,512`.
pub fn human_count(count: u64) -> String {
    let digits = count.to_string();
    let mut out = String::with_capacity(digits.len() * 4 / 3 + 1);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A count of things: `1 file`, `30,512 files`.
pub fn human_counted(count: u64, noun: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{} {noun}{plural}", human_count(count))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        for (bytes, expected) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            ((1 << 20) - 1, "1.0 MiB"),
            (1 << 20, "1.0 MiB"),
            (386_924_000, "369.0 MiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(human_bytes(bytes), expected);
        }
    }

    #[test]
    fn durations() {
        for (micros, expected) in [
            (0, "0ms"),
            (400, "0ms"),
            (34_000, "34ms"),
            (999_400, "999ms"),
            (999_600, "1.0s"),
            (2_140_000, "2.1s"),
            (59_940_000, "59.9s"),
            (59_960_000, "1m 00s"),
            (65_000_000, "1m 05s"),
            (3_599_600_000, "1h 00m"),
            (7_380_000_000, "2h 03m"),
        ] {
            assert_eq!(human_duration(Duration::from_micros(micros)), expected);
        }
        assert!(human_duration(Duration::MAX).ends_with('m'));
    }

    #[test]
    fn ages() {
        for (seconds, expected) in [
            (0, "now"),
            (59, "59s ago"),
            (60, "1m ago"),
            (7199, "1h ago"),
            (86_399, "23h ago"),
            (86_400 * 400, "400d ago"),
        ] {
            assert_eq!(human_age(Duration::from_secs(seconds)), expected);
        }
    }

    #[test]
    fn spans() {
        for (seconds, expected) in [
            (0, "0s"),
            (90, "90s"),
            (600, "10m"),
            (36 * 3600, "36h"),
            (14 * 86_400, "14d"),
        ] {
            assert_eq!(human_span(Duration::from_secs(seconds)), expected);
        }
    }

    /// Against `date -u -d @…`.
    #[test]
    fn times() {
        for (seconds, expected) in [
            (0, "1970-01-01 00:00:00Z"),
            (-1, "1969-12-31 23:59:59Z"),
            (951_782_399, "2000-02-28 23:59:59Z"),
            (951_782_400, "2000-02-29 00:00:00Z"),
            (951_868_800, "2000-03-01 00:00:00Z"),
            (1_709_251_199, "2024-02-29 23:59:59Z"),
            (4_107_542_400, "2100-03-01 00:00:00Z"),
            (1_795_311_387, "2026-11-22 01:36:27Z"),
            (-62_135_596_801, "0000-12-31 23:59:59Z"),
        ] {
            assert_eq!(human_time(seconds), expected);
        }
        assert!(human_time(i64::MIN).ends_with('Z'));
        assert!(human_time(i64::MAX).ends_with('Z'));
    }

    #[test]
    fn counts() {
        for (count, expected) in [
            (0, "0 files"),
            (1, "1 file"),
            (999, "999 files"),
            (1000, "1,000 files"),
            (30_512, "30,512 files"),
            (1_234_567, "1,234,567 files"),
            (u64::MAX, "18,446,744,073,709,551,615 files"),
        ] {
            assert_eq!(human_counted(count, "file"), expected);
        }
    }
}
