//! What one TCP connection carries over the wire, by iperf3.

use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use super::{Network, Rate, Side};
use crate::BenchError;
use crate::process::Program;

const PORT: &str = "5201";

/// The start of a connection is not what a migration sees; left out, in seconds.
const START: u32 = 1;

/// Beyond the test itself, iperf3 may take this long.
const PATIENCE: Duration = Duration::from_secs(20);

/// A shaped link carries 94 to 96 % of its rate as payload. Less than this was not the link: on a busy machine a
/// connection sometimes starts with a wrong idea of it, and keeps it for seconds.
const LEAST_SHARE: f64 = 0.9;

/// So often it is tried again; the best counts.
pub(super) const TRIES: u32 = 3;

/// Bytes of payload per second that the link carries.
pub(super) fn measure(network: &Network, seconds: u32) -> Result<f64, BenchError> {
    let mut best: f64 = 0.0;
    for _ in 0..TRIES {
        best = best.max(measure_once(network, seconds)?);
        if is_plausible(network.rate(), best) {
            break;
        }
    }
    Ok(best)
}

pub(super) fn is_plausible(rate: Rate, bytes_per_second: f64) -> bool {
    match rate {
        Rate::Unshaped => true,
        Rate::BitsPerSecond(bits) => bytes_per_second * 8.0 >= bits as f64 * LEAST_SHARE,
    }
}

fn measure_once(network: &Network, seconds: u32) -> Result<f64, BenchError> {
    let mut server = network.command(Side::Destination, Path::new("iperf3"));
    server.args(["-s", "-1", "-B", &Side::Destination.address(), "-p", PORT, "--forceflush"]);
    let mut server = Program::start("iperf3", server)?;
    server.wait_for_line(PATIENCE, |line| line.contains("listening"))?;
    let mut client = network.command(Side::Source, Path::new("iperf3"));
    client.args(["-c", &Side::Destination.address(), "-p", PORT, "-J"]);
    client.args(["-t", &seconds.to_string(), "-O", &START.to_string()]);
    let client = Program::start("iperf3", client)?;
    let text = client.output(PATIENCE + Duration::from_secs(u64::from(seconds + START)))?;
    bytes_per_second(&text).ok_or_else(|| BenchError::Tool(format!("iperf3 printed no figures: {}", text.trim())))
}

fn bytes_per_second(json: &str) -> Option<f64> {
    let found: Value = serde_json::from_str(json).ok()?;
    let bits = found.pointer("/end/sum_received/bits_per_second")?.as_f64()?;
    (bits > 0.0).then_some(bits / 8.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_that_seems_too_slow_is_measured_again() {
        let rate = Rate::BitsPerSecond(100_000_000);
        assert!(is_plausible(rate, 95.6e6 / 8.0) && !is_plausible(rate, 56.9e6 / 8.0));
        assert!(is_plausible(Rate::Unshaped, 1.0));
    }

    #[test]
    fn what_was_received_counts() {
        let json = r#"{"end": {"sum_sent": {"bits_per_second": 9e8}, "sum_received": {"bits_per_second": 8e8}}}"#;
        assert_eq!(bytes_per_second(json), Some(1e8));
        assert_eq!(bytes_per_second(r#"{"error": "unable to connect"}"#), None);
    }
}
