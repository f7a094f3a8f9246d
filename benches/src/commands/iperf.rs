//! The same connection as iperf3 sees it, where that is installed.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use super::measured::Cost;

/// One iperf3 run of this many bytes; `Err` says why there was none.
pub(super) fn run(bytes: u64) -> Result<Cost, String> {
    let port = TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .map_err(|error| error.to_string())?
        .port()
        .to_string();
    let server = Command::new("iperf3")
        .args(["-s", "-1", "-B", "127.0.0.1", "-p", &port])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|error| format!("iperf3: {error}"))?;
    let _server = Running(server);
    client(&port, bytes)
}

/// A child that ends with its owner.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn client(port: &str, bytes: u64) -> Result<Cost, String> {
    let mut last = String::new();
    // The server needs a moment before it listens.
    for _ in 0..50 {
        std::thread::sleep(Duration::from_millis(20));
        let output = Command::new("iperf3")
            .args(["-c", "127.0.0.1", "-p", port, "-J", "-n", &bytes.to_string()])
            .output()
            .map_err(|error| format!("iperf3: {error}"))?;
        let found: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        match found.get("error").and_then(Value::as_str) {
            None => return cost(&found, bytes).ok_or_else(|| "iperf3 printed no figures".to_owned()),
            Some(error) => error.clone_into(&mut last),
        }
    }
    Err(format!("iperf3: {last}"))
}

fn cost(found: &Value, bytes: u64) -> Option<Cost> {
    let end = found.get("end")?;
    let seconds = end.pointer("/sum_received/seconds")?.as_f64()?;
    let moved = end.pointer("/sum_received/bytes")?.as_f64()?;
    let percent = |side: &str| end.pointer(&format!("/cpu_utilization_percent/{side}")).and_then(Value::as_f64);
    // Scaled to the bytes that were asked for: iperf3 stops at a buffer's end.
    let scale = bytes as f64 / moved;
    let cpu = |percent: f64| percent / 100.0 * seconds * scale;
    Some(Cost {
        seconds: seconds * scale,
        source_cpu: cpu(percent("host_total")?),
        destination_cpu: cpu(percent("remote_total")?),
    })
}
