//! How fast a wire is, and what makes it so.

use std::fmt;
use std::str::FromStr;

/// A token bucket must hold one frame of 64 KiB that is cut only later, with its headers, and some more.
const BURST_BYTES: u64 = 98_304;

/// The queue before the shaper holds this much time at the rate ...
const QUEUE_MS: u64 = 20;

/// ... but at least this much: a few frames of 64 KiB.
const LEAST_QUEUE_BYTES: u64 = 512 << 10;

/// What a wire carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Rate {
    /// As fast as the machine can.
    Unshaped,
    BitsPerSecond(u64),
}

impl Rate {
    pub(crate) fn bits_per_second(self) -> Option<u64> {
        match self {
            Self::Unshaped => None,
            Self::BitsPerSecond(bits) => Some(bits),
        }
    }

    /// The arguments of `tc qdisc add`; nothing to add without a rate.
    pub(super) fn shaping(self) -> Option<Vec<String>> {
        let Self::BitsPerSecond(bits) = self else { return None };
        let queue = (bits / 8 * QUEUE_MS / 1000).max(LEAST_QUEUE_BYTES);
        let text = format!("tbf rate {bits}bit burst {BURST_BYTES} limit {queue}");
        Some(text.split(' ').map(str::to_owned).collect())
    }
}

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "unshaped" {
            return Ok(Self::Unshaped);
        }
        let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
        let unit = match &text[digits.len()..] {
            "kbit" => 1_000,
            "mbit" => 1_000_000,
            "gbit" => 1_000_000_000,
            _ => 0,
        };
        let bits = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(unit)).filter(|bits| *bits >= 8_000);
        bits.map(Self::BitsPerSecond)
            .ok_or_else(|| format!("{text:?} is not a rate such as 100mbit, 1gbit or unshaped"))
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::BitsPerSecond(bits) = *self else { return f.write_str("unshaped") };
        for (unit, name) in [(1_000_000_000, "gbit"), (1_000_000, "mbit"), (1_000, "kbit")] {
            if bits.is_multiple_of(unit) {
                return write!(f, "{}{name}", bits / unit);
            }
        }
        write!(f, "{bits}bit")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_come_back_as_they_were_written() {
        for text in ["50mbit", "100mbit", "1gbit", "2500mbit", "64kbit", "unshaped"] {
            assert_eq!(text.parse::<Rate>().unwrap().to_string(), text);
        }
        for text in ["", "100", "fast", "0mbit", "1kbit", "99999999999gbit", "-1mbit"] {
            assert!(text.parse::<Rate>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_queue_is_20_ms_long_but_never_too_short_for_large_frames() {
        let queue = |text: &str| text.parse::<Rate>().unwrap().shaping().unwrap().pop().unwrap();
        assert_eq!(
            (queue("1gbit"), queue("100mbit"), queue("50mbit")),
            ("2500000".into(), "524288".into(), "524288".into())
        );
        assert_eq!(Rate::Unshaped.shaping(), None);
    }
}
