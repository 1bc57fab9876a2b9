//! Values as people write them: sizes (`1GiB`), times (`30s`), switches.

use std::time::Duration;

/// Bytes from `1073741824`, `1GiB`, `512 MB`. Decimal suffixes (kB, MB, GB) are powers of 1000,
/// binary ones (KiB, MiB, GiB, and the bare letters K, M, G) powers of 1024.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let (number, unit) = split_number(text);
    let scale: u64 = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        _ => {
            return Err(format!(
                "'{text}' is not a size; write 512MiB, 1GiB or bytes"
            ));
        }
    };
    let number: f64 = number
        .parse()
        .map_err(|_| format!("'{text}' is not a size; write 512MiB, 1GiB or bytes"))?;
    let bytes = number * scale as f64;
    // 2^53: beyond it a float no longer counts single bytes.
    if bytes > 9_007_199_254_740_992.0 {
        return Err(format!("'{text}' is too large"));
    }
    Ok(bytes as u64)
}

/// A size for people: three significant digits, binary units.
pub(crate) fn format_size(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = match value {
        _ if unit == 0 => 0,
        v if v < 10.0 => 2,
        v if v < 100.0 => 1,
        _ => 0,
    };
    format!("{value:.digits$} {}", units[unit])
}

/// A size that [`parse_size`] reads back exactly: in the largest unit that divides it.
pub(crate) fn exact_size(bytes: u64) -> String {
    for (suffix, scale) in [("GiB", 1u64 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)] {
        if bytes >= scale && bytes.is_multiple_of(scale) {
            return format!("{}{suffix}", bytes / scale);
        }
    }
    bytes.to_string()
}

/// A time span from `30`, `30s`, `500ms`, `5m`, `1h`; a bare number is seconds.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let complaint = || format!("'{text}' is not a time span; write 500ms, 30s or 5m");
    let (number, unit) = split_number(text);
    let scale = match unit {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        _ => return Err(complaint()),
    };
    let number: f64 = number.parse().map_err(|_| complaint())?;
    let seconds = number * scale;
    // A year: later arithmetic on clocks can't overflow.
    if seconds > 31_536_000.0 {
        return Err(format!("'{text}' is longer than a year"));
    }
    Duration::try_from_secs_f64(seconds).map_err(|_| complaint())
}

/// A time span that [`parse_duration`] reads back.
pub(crate) fn format_duration(span: Duration) -> String {
    match span.subsec_millis() {
        0 => format!("{}s", span.as_secs()),
        _ => format!("{}ms", span.as_millis()),
    }
}

/// `true` or `false`, also as on/off, yes/no, 1/0.
pub(crate) fn parse_switch(text: &str) -> Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "on" | "yes" | "1" => Ok(true),
        "false" | "off" | "no" | "0" => Ok(false),
        _ => Err(format!("'{text}' is neither true nor false")),
    }
}

/// A whole number within bounds.
pub(crate) fn parse_number(text: &str, min: u64, max: u64) -> Result<u64, String> {
    match text.parse() {
        Ok(number) if (min..=max).contains(&number) => Ok(number),
        _ => Err(format!(
            "'{text}' is not a whole number from {min} to {max}"
        )),
    }
}

fn split_number(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    (&text[..end], text[end..].trim())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn sizes_read_as_written() {
        for (text, bytes) in [
            ("0", 0),
            ("1024", 1024),
            ("1GiB", 1 << 30),
            ("1.5 GiB", 3 << 29),
            ("2gb", 2_000_000_000),
            ("512M", 512 << 20),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "GiB",
            "-1",
            "1e9",
            "1XB",
            "1.2.3",
            "99999999999GiB",
            "NaN",
            "inf",
        ] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_shown_reads_back() {
        for bytes in [0, 1, 1023, 1024, 5 << 20, (1 << 30) + 1, 7 << 30] {
            assert_eq!(parse_size(&exact_size(bytes)), Ok(bytes));
        }
        for millis in [0, 1, 999, 1000, 90_000, 3_600_500] {
            let span = Duration::from_millis(millis);
            assert_eq!(parse_duration(&format_duration(span)), Ok(span));
        }
    }

    #[test]
    fn spans_are_bounded() {
        assert_eq!(parse_duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(parse_duration("2m"), Ok(Duration::from_secs(120)));
        for text in ["", "s", "-1s", "1d", "1e400", "400000h"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_for_people() {
        assert_eq!(format_size(512), "512 B");
        assert_eq!(format_size(98_362_432), "93.8 MiB");
        assert_eq!(format_size(1 << 30), "1.00 GiB");
    }
}
