//! Sizes, rates and durations as people write them: `128M`, `20M/s`, `1Gbit/s`, `300ms`.
//!
//! `K`, `M`, `G`, `T` and `KiB`, `MiB`, ... count in 1024s, as memory does; `kB`, `MB`, ... and
//! everything in bits count in 1000s, as links do.

use std::time::Duration;

/// A number with a unit that could not be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UnitError {
    /// No number in front.
    #[error("{text:?} does not start with a number; write for example {example}")]
    Number { text: String, example: &'static str },
    /// A unit nobody knows.
    #[error("{unit:?} is no unit here; write for example {example}")]
    Unit { unit: String, example: &'static str },
    /// Past what the program can hold.
    #[error("{0:?} is too large")]
    TooLarge(String),
}

const SIZE_EXAMPLE: &str = "512M, 1G or 2GiB";
const RATE_EXAMPLE: &str = "20M/s, 100Mbit/s or 1Gbit/s";
const DURATION_EXAMPLE: &str = "300ms, 10s or 2m";

/// Bytes: `4096`, `64K`, `1G`, `1GiB`, `1GB`.
pub(crate) fn size(text: &str) -> Result<u64, UnitError> {
    let (number, unit) = split(text, SIZE_EXAMPLE)?;
    let factor = byte_factor(unit).ok_or_else(|| UnitError::Unit { unit: unit.to_owned(), example: SIZE_EXAMPLE })?;
    scale(number, factor, text)
}

/// Bytes per second: `20M/s`, `20MiB/s`, `100Mbit/s`, `1Gbps`; the `/s` may be left out.
pub(crate) fn rate(text: &str) -> Result<u64, UnitError> {
    let (number, unit) = split(text, RATE_EXAMPLE)?;
    let unit_of_volume = unit.strip_suffix("/s").or_else(|| unit.strip_suffix("ps")).unwrap_or(unit);
    let factor = bit_factor(unit_of_volume)
        .or_else(|| byte_factor(unit_of_volume))
        .ok_or_else(|| UnitError::Unit { unit: unit.to_owned(), example: RATE_EXAMPLE })?;
    scale(number, factor, text)
}

/// A span of time: `300ms`, `1.5s`, `10s`, `2m`, `1h`.
pub(crate) fn duration(text: &str) -> Result<Duration, UnitError> {
    let (number, unit) = split(text, DURATION_EXAMPLE)?;
    let seconds = match unit {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" | "sec" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        _ => return Err(UnitError::Unit { unit: unit.to_owned(), example: DURATION_EXAMPLE }),
    };
    Duration::try_from_secs_f64(number * seconds).map_err(|_| UnitError::TooLarge(text.to_owned()))
}

/// A number of things: `1 vCPU`, `2 vCPUs`.
pub(crate) fn show_count(count: u32, thing: &str) -> String {
    format!("{count} {thing}{}", if count == 1 { "" } else { "s" })
}

/// The number in front, and what follows it.
fn split<'a>(text: &'a str, example: &'static str) -> Result<(f64, &'a str), UnitError> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number = number.parse().map_err(|_| UnitError::Number { text: text.to_owned(), example })?;
    Ok((number, unit.trim()))
}

fn byte_factor(unit: &str) -> Option<f64> {
    let (power, base) = match unit {
        "" | "B" => (0, 1),
        "K" | "k" | "KiB" => (1, 1024),
        "M" | "MiB" => (2, 1024),
        "G" | "GiB" => (3, 1024),
        "T" | "TiB" => (4, 1024),
        "kB" | "KB" => (1, 1000),
        "MB" => (2, 1000),
        "GB" => (3, 1000),
        "TB" => (4, 1000),
        _ => return None,
    };
    Some(f64::from(base).powi(power))
}

fn bit_factor(unit: &str) -> Option<f64> {
    let power = match unit {
        "bit" => 0,
        "kbit" | "Kbit" | "kb" => 1,
        "Mbit" | "mbit" | "Mb" => 2,
        "Gbit" | "gbit" | "Gb" => 3,
        _ => return None,
    };
    Some(1000f64.powi(power) / 8.0)
}

fn scale(number: f64, factor: f64, text: &str) -> Result<u64, UnitError> {
    let value = (number * factor).round();
    // 2^53: up to here every whole number is exact in an f64.
    if value <= 9_007_199_254_740_992.0 { Ok(value as u64) } else { Err(UnitError::TooLarge(text.to_owned())) }
}

/// Bytes for people: `1 GiB`, `20.5 MiB`.
pub(crate) fn show_bytes(bytes: u64) -> String {
    show_bytes_f64(bytes as f64)
}

/// A rate for people: `20.5 MiB/s`.
pub(crate) fn show_rate(bytes_per_second: f64) -> String {
    format!("{}/s", show_bytes_f64(bytes_per_second))
}

fn show_bytes_f64(bytes: f64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes.max(0.0);
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = usize::from(value < 100.0 && value.fract() > 0.005);
    format!("{value:.digits$} {}", units[unit])
}

/// A span for people: `870 us`, `4.2 ms`, `12.3 s`, `2 m 05 s`.
pub(crate) fn show_duration(span: Duration) -> String {
    let seconds = span.as_secs_f64();
    match seconds {
        s if s < 1e-3 => format!("{:.0} us", s * 1e6),
        s if s < 1e-1 => format!("{:.1} ms", s * 1e3),
        s if s < 1.0 => format!("{:.0} ms", s * 1e3),
        s if s < 60.0 => format!("{s:.1} s"),
        s => format!("{} m {:02} s", s as u64 / 60, s as u64 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_count_in_1024s_unless_written_as_decimal_bytes() {
        assert_eq!(size("4096"), Ok(4096));
        assert_eq!(size("64K"), Ok(64 << 10));
        assert_eq!(size("1.5 GiB"), Ok(3 << 29));
        assert_eq!(size("2GB"), Ok(2_000_000_000));
    }

    #[test]
    fn rates_in_bits_count_in_1000s() {
        assert_eq!(rate("20M/s"), Ok(20 << 20));
        assert_eq!(rate("20M"), Ok(20 << 20));
        assert_eq!(rate("100Mbit/s"), Ok(12_500_000));
        assert_eq!(rate("1Gbps"), Ok(125_000_000));
        assert_eq!(rate("1Gbit"), Ok(125_000_000));
    }

    #[test]
    fn durations_need_a_unit() {
        assert_eq!(duration("300ms"), Ok(Duration::from_millis(300)));
        assert_eq!(duration("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(duration("2m"), Ok(Duration::from_secs(120)));
        assert!(duration("300").unwrap_err().to_string().contains("300ms"));
    }

    #[test]
    fn nonsense_is_answered_with_an_example() {
        assert!(size("lots").unwrap_err().to_string().contains("512M"));
        assert!(size("5 parsecs").unwrap_err().to_string().contains("parsecs"));
        assert!(size("-1").is_err() && size("").is_err() && size("1..2").is_err());
        assert!(matches!(size("99999999T"), Err(UnitError::TooLarge(_))));
        assert!(matches!(duration("1e9h"), Err(UnitError::Unit { .. })));
    }

    #[test]
    fn values_are_shown_with_the_unit_that_keeps_them_short() {
        assert_eq!(show_bytes(1 << 30), "1 GiB");
        assert_eq!(show_bytes(20 << 20 | 1 << 19), "20.5 MiB");
        assert_eq!(show_rate(512.0), "512 B/s");
        assert_eq!(show_duration(Duration::from_micros(4_200)), "4.2 ms");
        assert_eq!(show_duration(Duration::from_secs(125)), "2 m 05 s");
    }
}
