//! Sizes and durations as people write them.

use std::time::Duration;

/// A text was not a size or duration.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum UnitError {
    #[error("{text:?} is not a size (a number of bytes, or one with a unit: 500M, 60G, 1.5TiB)")]
    Size { text: String },
    #[error("{text:?} is not a duration (a number with a unit: 500ms, 90s, 5m, 2h)")]
    Duration { text: String },
}

/// Reads `4096`, `512k`, `60G`, `1.5TiB`. Units are powers of 1024, as `du -h`
/// and `systemd` have them, with or without `B` or `iB`.
///
/// # Errors
///
/// [`UnitError::Size`] for anything else, and for what does not fit 64 bits.
pub fn parse_size(text: &str) -> Result<u64, UnitError> {
    let error = || UnitError::Size {
        text: text.to_owned(),
    };
    let (number, unit) = split_unit(text);
    let unit = unit.to_ascii_lowercase();
    let unit = unit
        .strip_suffix("ib")
        .or_else(|| unit.strip_suffix('b'))
        .unwrap_or(&unit);
    let shift = match unit {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "p" => 50,
        _ => return Err(error()),
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(1 << shift).ok_or_else(error);
    }
    let bytes = number.parse::<f64>().map_err(|_| error())? * (1u64 << shift) as f64;
    if !(0.0..u64::MAX as f64).contains(&bytes) {
        return Err(error());
    }
    Ok(bytes as u64)
}

/// Reads `500ms`, `90s`, `90`, `5m`, `2h`, `7d`; a bare number is seconds.
///
/// # Errors
///
/// [`UnitError::Duration`] for anything else.
pub fn parse_duration(text: &str) -> Result<Duration, UnitError> {
    let error = || UnitError::Duration {
        text: text.to_owned(),
    };
    let (number, unit) = split_unit(text);
    let seconds = match unit {
        "ms" => 0.001,
        "" | "s" | "sec" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        "d" => 86_400.0,
        _ => return Err(error()),
    };
    let number = number.parse::<f64>().map_err(|_| error())?;
    Duration::try_from_secs_f64(number * seconds).map_err(|_| error())
}

/// Splits a number from the unit behind it.
fn split_unit(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    (&text[..end], text[end..].trim_start())
}

/// Writes a size with the unit that suits it: `0 B`, `1.5 GiB`.
#[must_use]
pub fn format_size(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{bytes} B")
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// Turns days since 1970 into a date (Hinnant, "chrono-Compatible Low-Level Date Algorithms").
#[must_use]
pub fn civil_date(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let era = z / 146_097;
    let doe = z % 146_097;
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    (yoe + era * 400 + u64::from(month <= 2), month, day)
}

/// `2026-01-01 00:00:00 UTC`, of milliseconds since 1970.
#[must_use]
pub fn format_moment(millis: u64) -> String {
    let seconds = millis / 1000;
    let (year, month, day) = civil_date(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_users_write_them() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("512k", 512 << 10),
            ("60G", 60 << 30),
            ("60 GiB", 60 << 30),
            ("1.5T", 3 << 39),
            ("10MB", 10 << 20),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "G", "-1", "10X", "1e3", "99999999P", "nan", "1..2"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations_read_as_users_write_them() {
        for (text, millis) in [
            ("90", 90_000),
            ("90s", 90_000),
            ("500ms", 500),
            ("1.5m", 90_000),
            ("2h", 7_200_000),
        ] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "s", "-5s", "5 weeks"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_print_with_the_unit_that_suits_them() {
        assert_eq!(format_size(1023), "1023 B");
        assert_eq!(format_size(3 << 29), "1.5 GiB");
    }

    #[test]
    fn moments_are_those_of_the_calendar() {
        assert_eq!(format_moment(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(format_moment(951_827_696_789), "2000-02-29 12:34:56 UTC");
    }
}
