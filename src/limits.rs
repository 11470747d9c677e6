//! Raised limits of images: `--limit NAME=VALUE`, and `III_LIMITS=NAME=VALUE,…` for every command
//! that pulls or imports.

use iii_oci::{Limit, Limits};

use super::quantity::{self, QuantityError};
use super::{CliError, settings};

/// Why a text is not a limit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LimitError {
    #[error("{text:?} is not of the form NAME=VALUE; the names are {}", names())]
    Form { text: String },
    #[error("no limit is called {name:?}; the names are {}", names())]
    Name { name: String },
    #[error("{limit} takes a whole number from 1, not {value:?}")]
    Count { limit: Limit, value: String },
    #[error("{limit} takes a size, as in {limit}=20MiB, not {value:?}")]
    Size { limit: Limit, value: String },
    #[error("{limit} must be from 1 to {}, not {value}", limit.most())]
    Range { limit: Limit, value: String },
}

fn names() -> String {
    Limit::ALL.map(Limit::name).join(", ")
}

/// `bytes=128GiB`, `entries=2000000`.
pub fn parse(text: &str) -> Result<(Limit, u64), LimitError> {
    let Some((name, value)) = text.split_once('=') else {
        let text = text.to_owned();
        return Err(LimitError::Form { text });
    };
    let limit = Limit::ALL.into_iter().find(|limit| limit.name() == name);
    let limit = limit.ok_or_else(|| LimitError::Name {
        name: name.to_owned(),
    })?;
    let text = || value.to_owned();
    let number = if limit.is_size() {
        match quantity::size(value) {
            // Too large for any limit.
            Err(QuantityError::TooLarge) => u64::MAX,
            size => size.map_err(|_| LimitError::Size {
                limit,
                value: text(),
            })?,
        }
    } else {
        let is_number = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit());
        if !is_number {
            let value = text();
            return Err(LimitError::Count { limit, value });
        }
        // Only a number too large for any limit does not parse.
        value.parse().unwrap_or(u64::MAX)
    };
    if number == 0 || number > limit.most() {
        let value = text();
        return Err(LimitError::Range { limit, value });
    }
    Ok((limit, number))
}

/// The usual limits, but for those of the environment, and of these before them.
pub fn with(flags: &[(Limit, u64)]) -> Result<Limits, CliError> {
    let text = settings::list(settings::LIMITS);
    let mut limits = Limits::default();
    for (limit, value) in parse_list(&text)?.iter().chain(flags) {
        limits.set(*limit, *value);
    }
    Ok(limits)
}

fn parse_list(text: &str) -> Result<Vec<(Limit, u64)>, CliError> {
    let parts = text.split(',').map(str::trim);
    parts
        .filter(|part| !part.is_empty())
        .map(|part| parse(part).map_err(CliError::Limits))
        .collect()
}

/// A value with more room, as `parse` takes it.
pub fn raised(limit: Limit, value: u64) -> String {
    let more = value.saturating_mul(2).min(limit.most());
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    let fits = |(shift, _): &(u32, &str)| more.trailing_zeros() >= *shift;
    match units.into_iter().find(fits) {
        Some((shift, unit)) if limit.is_size() && more > 0 => {
            format!("{limit}={}{unit}", more >> shift)
        }
        _ => format!("{limit}={more}"),
    }
}

#[cfg(test)]
mod tests {
    use iii_store::with_causes;

    use super::*;

    #[test]
    fn limits_parse_or_say_what_there_is() {
        for (text, expected) in [
            ("bytes=128GiB", Ok((Limit::Bytes, 128 << 30))),
            ("bytes=1", Ok((Limit::Bytes, 1))),
            ("entries=2000000", Ok((Limit::Entries, 2_000_000))),
            ("ratio=1032", Ok((Limit::Ratio, 1032))),
            ("ratio-from=10MB", Ok((Limit::RatioFrom, 10_000_000))),
            ("path=8KiB", Ok((Limit::Path, 8192))),
            ("metadata=1GiB", Ok((Limit::Metadata, 1 << 30))),
            ("extension=2MiB", Ok((Limit::Extension, 2 << 20))),
            ("holes=64GiB", Ok((Limit::Holes, 64 << 30))),
            ("segments=100000", Ok((Limit::Segments, 100_000))),
            ("document=16MiB", Ok((Limit::Document, 16 << 20))),
            ("bytes", Err("\"bytes\" is not of the form NAME=VALUE")),
            ("", Err("the names are entries, path, metadata, extension")),
            (
                "=1",
                Err("no limit is called \"\"; the names are entries, path"),
            ),
            ("size=1GB", Err("ratio-from, holes, segments, document")),
            ("Bytes=1GB", Err("no limit is called \"Bytes\"")),
            (
                "bytes=",
                Err("bytes takes a size, as in bytes=20MiB, not \"\""),
            ),
            ("bytes=lots", Err("not \"lots\"")),
            ("bytes=-1", Err("bytes takes a size")),
            ("bytes=0", Err("bytes must be from 1 to")),
            ("bytes=none", Err("bytes takes a size")),
            (
                "bytes=9000TiB",
                Err("bytes must be from 1 to 1125899906842624, not 9000TiB"),
            ),
            ("entries=1MB", Err("entries takes a whole number from 1")),
            ("entries=0", Err("entries must be from 1 to 2147483647")),
            ("entries=1.5", Err("entries takes a whole number from 1")),
            ("entries=+1", Err("entries takes a whole number from 1")),
            ("entries=99999999999999999999", Err("must be from 1 to")),
            ("segments=4294967296", Err("must be from 1 to 1073741824")),
            ("document=2GiB", Err("document must be from 1 to")),
            ("ratio=1=2", Err("ratio takes a whole number")),
        ] {
            let parsed = parse(text).map_err(|error| with_causes(&error));
            match (parsed, expected) {
                (Ok(parsed), Ok(expected)) => assert_eq!(parsed, expected, "{text:?}"),
                (Err(error), Err(part)) => assert!(error.contains(part), "{text:?}: {error}"),
                (parsed, expected) => panic!("{text:?}: {parsed:?}, expected {expected:?}"),
            }
        }
    }

    #[test]
    fn a_list_of_limits_parses() {
        let parse = |text| parse_list(text).map_err(|error| with_causes(&error));
        assert_eq!(parse(""), Ok(Vec::new()));
        let both = Ok(vec![(Limit::Bytes, 1 << 40), (Limit::Ratio, 500)]);
        assert_eq!(parse("bytes=1TiB,ratio=500"), both);
        assert_eq!(parse(" bytes=1TiB , ,ratio=500,"), both);
        let error = parse("bytes=1TiB,nothing=1").unwrap_err();
        assert!(error.contains("III_LIMITS"), "{error}");
        assert!(error.contains("no limit is called \"nothing\""), "{error}");
    }

    #[test]
    fn what_raises_a_limit_is_taken() {
        for limit in Limit::ALL {
            let usual = Limits::default().get(limit);
            assert_eq!(parse(&raised(limit, usual)), Ok((limit, usual * 2)));
            let most = limit.most();
            assert_eq!(parse(&raised(limit, most)), Ok((limit, most)));
        }
        assert_eq!(raised(Limit::Bytes, 64 << 30), "bytes=128GiB");
        assert_eq!(raised(Limit::Ratio, 200), "ratio=400");
        assert_eq!(raised(Limit::Holes, 3), "holes=6");
    }
}
