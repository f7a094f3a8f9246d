//! The standstill of a real, idle guest, by its own clock: `migrate demo`, several times.

use std::path::PathBuf;
use std::process::Command;

use clap::Args;
use serde_json::Value;

use super::{gib, size};
use crate::outcome::{Outcome, Target};
use crate::{BenchError, host};

/// Milliseconds between two heartbeats of the guest.
const MOST_STALL: f64 = 10.0;

/// Milliseconds of it that are the engine's.
const MOST_ENGINE: f64 = 5.0;

/// The parts of the standstill that are the engine's own; the rest is the VMM's.
const ENGINE_PARTS: [&str; 4] = ["harvest", "pages", "digest", "commit"];

#[derive(Args, Debug)]
pub(crate) struct DowntimeOptions {
    /// Memory of the guest
    #[arg(long, value_parser = size, default_value = "1G")]
    size: u64,
    /// Its vCPUs
    #[arg(long, default_value = "2")]
    vcpus: u32,
    /// How often; medians are reported
    #[arg(long, default_value = "7", value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// The `migrate` program; without it, the one beside this program
    #[arg(long, value_name = "FILE")]
    migrate: Option<PathBuf>,
}

/// `pageferry-bench downtime`.
pub(crate) fn downtime(options: &DowntimeOptions) -> Result<Outcome, BenchError> {
    if !std::path::Path::new("/dev/kvm").exists() {
        return Err(BenchError::Skipped("this machine has no /dev/kvm".to_owned()));
    }
    let program = program(options)?;
    let about = format!("idle KVM guest, {} GiB, {} vCPUs", gib(options.size), options.vcpus);
    let mut outcome = Outcome::new("downtime", about);
    let reports = (0..options.runs).map(|_| demo(&program, options)).collect::<Result<Vec<_>, _>>()?;
    let column = |pick: &dyn Fn(&Value) -> Option<f64>| reports.iter().filter_map(pick).collect::<Vec<f64>>();
    let stall = outcome.series(
        "longest gap between the guest's heartbeats",
        "ms",
        column(&|report| report.get("guest_longest_stall_ms")?.as_f64()),
    );
    outcome.series("downtime by the source's clock", "ms", column(&|report| report.get("downtime_ms")?.as_f64()));
    for part in ["pause", "harvest", "pages", "state", "digest", "commit", "resume"] {
        outcome.series(format!("of it, {part}"), "ms", column(&|report| part_of(report, part)));
    }
    let engine = outcome.series(
        "engine's share",
        "ms",
        column(&|report| ENGINE_PARTS.iter().map(|part| part_of(report, part)).sum()),
    );
    outcome.figure("guest's longest stall", "ms", stall, Some(Target::AtMost(MOST_STALL)));
    outcome.figure("engine's share of the downtime", "ms", engine, Some(Target::AtMost(MOST_ENGINE)));
    Ok(outcome)
}

fn part_of(report: &Value, part: &str) -> Option<f64> {
    report.get("downtime_parts_ms")?.get(part)?.as_f64()
}

fn program(options: &DowntimeOptions) -> Result<PathBuf, BenchError> {
    let beside = || std::env::current_exe().ok().map(|own| own.with_file_name("migrate"));
    match options.migrate.clone().or_else(beside) {
        Some(program) if program.exists() => Ok(program),
        _ => Err(BenchError::Skipped("`migrate` is not built: cargo build --release -p migrate".to_owned())),
    }
}

/// One migration; its final report, with the guest's proof checked.
fn demo(program: &std::path::Path, options: &DowntimeOptions) -> Result<Value, BenchError> {
    let output = Command::new(program)
        .args(["demo", "--json", "--guest", "kvm", "--idle"])
        .args(["--memory", &options.size.to_string(), "--vcpus", &options.vcpus.to_string()])
        .output()
        .map_err(host("cannot start migrate"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let report: Value = text.lines().last().and_then(|line| serde_json::from_str(line).ok()).unwrap_or_default();
    let checks = ["completed", "ok"].map(Some);
    let found = ["outcome", "guest_self_check"].map(|key| report.get(key).and_then(Value::as_str));
    if found == checks && report.get("digest_match") == Some(&Value::Bool(true)) {
        return Ok(report);
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    Err(BenchError::Wrong(format!("migrate demo ended with {found:?}: {errors}{text}")))
}
