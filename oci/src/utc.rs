//! Times as text.

/// A time in UTC as RFC 3339 has it, from the seconds since 1970: `2026-11-22T01:36:27Z`. Only
/// years from 0 to 9999 are of the standard's form.
pub fn rfc3339(seconds: i64) -> String {
    const DAY: i64 = 24 * 3600;
    // <https://howardhinnant.github.io/date_algorithms.html#civil_from_days>: years begin in March,
    // so that the day that leaps is the last of one.
    let days = seconds.div_euclid(DAY) + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12 + 1;
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let second = seconds.rem_euclid(DAY);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z",
        second / 3600,
        second / 60 % 60,
        second % 60
    )
}
