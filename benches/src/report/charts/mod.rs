//! The pictures of a report, one file each. Every picture can be read by itself: lines and bars carry their names.

mod bars;
mod bytes;
mod cpu;
mod outlook;
mod rates;
mod remaining;
mod summary;

pub(crate) use bytes::{bytes, stage_key};
pub(crate) use cpu::cpu;
pub(crate) use outlook::outlook;
pub(crate) use rates::{by_dirty_rate, kinds};
pub(crate) use remaining::remaining;
pub(crate) use summary::summary;

use crate::study::Study;

use super::words;

/// How wide one of the pictures is that stand side by side, one for each link.
fn width(study: &Study) -> f64 {
    if study.links.len() > 2 { 420.0 } else { 560.0 }
}

/// Seconds on an axis: `10 ms`, `0 s`, `100 s`.
fn axis_seconds(value: f64) -> String {
    rounded(&words::seconds(value))
}

fn axis_bytes(value: f64) -> String {
    rounded(&words::bytes(value))
}

fn axis_rate(value: f64) -> String {
    rounded(&format!("{} ", words::digits(value))).trim_end().to_owned()
}

/// Without zeros behind the point.
fn rounded(words: &str) -> String {
    let Some((number, unit)) = words.split_once(' ') else { return words.to_owned() };
    format!("{} {unit}", words::trimmed(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_have_short_numbers() {
        let words = [1.0, 0.05, 20.0, 0.0].map(axis_seconds);
        assert_eq!(words, ["1 s", "50 ms", "20 s", "0 s"]);
        assert_eq!([0.0, 0.5, 10.0, 200.0].map(axis_rate), ["0", "0.5", "10", "200"]);
        assert_eq!([1_073_741_824.0, 268_435_456.0, 1_610_612_736.0].map(axis_bytes), ["1 GiB", "256 MiB", "1.5 GiB"]);
    }
}
