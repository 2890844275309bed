//! Sizes, times and tables for people.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];

/// `1536` as `1.5 KiB`.
pub fn size(bytes: u64) -> String {
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64;
    let mut unit = "B";
    for next in UNITS {
        if value < 1023.95 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    if value < 99.95 {
        format!("{value:.1} {unit}")
    } else {
        format!("{value:.0} {unit}")
    }
}

/// `16K`, `16KiB`, `1.5G` or a number of bytes.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let power = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 1,
        "m" | "mib" => 2,
        "g" | "gib" => 3,
        "t" | "tib" => 4,
        _ => return Err("a size is a number with B, K, M, G or T".to_owned()),
    };
    let number: f64 = digits.parse().map_err(|_| "not a number".to_owned())?;
    let bytes = number * 1024_f64.powi(power);
    if bytes >= 1e18 {
        Err("more bytes than can be counted".to_owned())
    } else if bytes >= 0.0 && bytes.fract() == 0.0 {
        Ok(bytes as u64)
    } else {
        Err("not a whole number of bytes".to_owned())
    }
}

/// The same for the most that an overlay may hold, of which a block is the least.
pub fn parse_limit(text: &str) -> Result<u64, String> {
    const BLOCK_BYTES: u64 = 4096;
    match parse_size(text)? {
        bytes if bytes >= BLOCK_BYTES => Ok(bytes),
        _ => Err("nothing could be written then; give 4K or more, or leave it out".to_owned()),
    }
}

/// The same for what the kernel reads around a fault, which it caps at 128 KiB.
pub fn parse_read_ahead(text: &str) -> Result<u64, String> {
    const MOST_BYTES: u64 = 128 << 10;
    match parse_size(text)? {
        bytes if bytes <= MOST_BYTES => Ok(bytes),
        _ => Err("at most 128K: the kernel reads no more at once".to_owned()),
    }
}

/// `1234567` as `1 234 567`.
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::new();
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            out.push(' ');
        }
        out.push(digit);
    }
    out
}

/// `1 pack`, `2 packs`: of what has its plural with an s.
pub fn counted(number: u64, what: &str) -> String {
    match number {
        1 => format!("1 {what}"),
        number => format!("{} {what}s", count(number)),
    }
}

/// Seconds as a time that is short: `0.0123` as `12.3 ms`.
pub fn millis(seconds: f64) -> String {
    if seconds < 9.9995 {
        format!("{:.1} ms", seconds * 1e3)
    } else {
        format!("{seconds:.1} s")
    }
}

/// Seconds as a time that may be long: `75` as `1m15s`.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.max(0.0) as u64;
    match whole {
        0..60 => format!("{whole}s"),
        60..3600 => format!("{}m{:02}s", whole / 60, whole % 60),
        3600..86_400 => format!("{}h{:02}m", whole / 3600, whole % 3600 / 60),
        _ => format!("{}d{:02}h", whole / 86_400, whole % 86_400 / 3600),
    }
}

/// A UTC date and time, to the minute.
pub fn time(when: SystemTime) -> String {
    let seconds = when
        .duration_since(UNIX_EPOCH)
        .unwrap_or(Duration::ZERO)
        .as_secs();
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil_date(days);
    format!(
        "{year:04}-{month:02}-{day:02} {:02}:{:02}",
        rest / 3600,
        rest % 3600 / 60
    )
}

/// Days since 1970-01-01 to a date (the era-based algorithm of H. Hinnant's
/// "chrono-Compatible Low-Level Date Algorithms").
fn civil_date(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

/// Lines up columns; the first `left` of them on the left, the others on the right.
pub fn table(header: &[&str], left: usize, rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = header.iter().map(|name| name.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = String::new();
    let header: Vec<String> = header.iter().map(|name| (*name).to_owned()).collect();
    for row in std::iter::once(&header).chain(rows) {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let gap = if column == 0 { "" } else { "  " };
            let width = *width;
            let _ = if column < left {
                write!(line, "{gap}{cell:<width$}")
            } else {
                write!(line, "{gap}{cell:>width$}")
            };
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn read_ahead_is_at_most_what_the_kernel_takes() {
        assert_eq!(parse_read_ahead("128K"), Ok(128 << 10));
        assert_eq!(parse_read_ahead("0"), Ok(0));
        assert!(parse_read_ahead("129K").is_err());
        assert!(parse_read_ahead("1G").is_err());
    }

    #[test]
    fn sizes_go_both_ways() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1536, "1.5 KiB"),
            (512 << 20, "512 MiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
        for (text, bytes) in [
            ("4096", 4096),
            ("16K", 16384),
            ("1.5KiB", 1536),
            ("2g", 2 << 30),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "K", "1.0001K", "-4K", "4X", "nan", "1e30"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn dates_of_known_days() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00"),
            (951_826_500, "2000-02-29 12:15"),
            (1_709_164_800, "2024-02-29 00:00"),
            (4_102_444_740, "2099-12-31 23:59"),
        ] {
            assert_eq!(time(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn thousands_are_set_apart() {
        assert_eq!(count(7), "7");
        assert_eq!(count(1_234_567), "1 234 567");
    }
}
