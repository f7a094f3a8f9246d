//! The benchmarks, one file each.

mod compare;
mod demo;
mod downtime;
mod harness;
mod harvest;
mod holes;
mod image;
mod iperf;
mod kernels;
mod link;
mod measured;
mod report;
mod throughput;
mod transports;
mod zero;

pub(crate) use compare::{CompareOptions, compare};
pub(crate) use downtime::{DowntimeOptions, downtime};
pub(crate) use harness::{HarnessOptions, harness};
pub(crate) use harvest::{HarvestOptions, harvest};
pub(crate) use holes::{HolesOptions, holes};
pub(crate) use image::{ImageOptions, image};
pub(crate) use kernels::{KernelsOptions, kernels};
pub(crate) use link::{LinkOptions, link};
pub(crate) use report::{ReportOptions, report};
pub(crate) use throughput::{ReferenceOptions, ThroughputOptions, reference, throughput};
pub(crate) use transports::{TransportsOptions, transports};
pub(crate) use zero::{ZeroOptions, zero};

/// Bytes of a size such as `512M` or `8G`.
fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_uppercase().trim_end_matches("IB") {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        unit => return Err(format!("{unit:?} is no unit; use K, M, G or T")),
    };
    let number: u64 = digits.parse().map_err(|_| format!("{text:?} is not a size such as 512M or 8G"))?;
    let bytes = number.checked_mul(1 << shift).filter(|bytes| bytes % 4096 == 0 && *bytes > 0);
    bytes.ok_or_else(|| format!("{text:?} is not a whole number of 4 KiB pages"))
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

fn gigabytes_per_second(bytes: u64, seconds: f64) -> f64 {
    bytes as f64 / 1e9 / seconds
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn sizes_have_binary_units_and_whole_pages() {
        assert_eq!((size("8192"), size("4K"), size("2GiB")), (Ok(8192), Ok(4096), Ok(2 << 30)));
        assert_eq!(size("1t"), Ok(1 << 40));
        assert!(size("1").is_err() && size("5X").is_err() && size("G").is_err() && size("0").is_err());
        assert!(size("99999999999T").is_err());
    }
}
