//! Text of a registry, made safe to show.

use anstream::adapter::strip_str;

/// The first `limit` characters of `text`, without escape sequences and control characters.
pub fn shown(text: &str, limit: usize) -> String {
    let text: String = strip_str(text).to_string();
    let plain = text.chars().filter(|c| !c.is_control());
    plain.take(limit).collect::<String>().trim_end().to_owned()
}
