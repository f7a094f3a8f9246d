//! The standstill of a real, idle guest, by its own clock: `migrate demo`, several times.

use clap::Args;
use serde_json::Value;

use super::demo::{Demo, DemoOptions, column, number};
use super::{gib, size};
use crate::BenchError;
use crate::outcome::{Outcome, Target};

/// Milliseconds between two heartbeats of the guest.
const MOST_STALL: f64 = 10.0;

/// Milliseconds of it that are the engine's.
const MOST_ENGINE: f64 = 5.0;

/// The parts of the standstill that are the engine's own; the others are the VMM's.
const ENGINE_PARTS: [&str; 4] = ["harvest", "pages", "digest", "commit"];

#[derive(Args, Debug)]
pub(crate) struct DowntimeOptions {
    /// Memory of the guest
    #[arg(long, value_parser = size, default_value = "1G")]
    size: u64,
    /// How often; medians are reported
    #[arg(long, default_value = "7", value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    #[command(flatten)]
    demo: DemoOptions,
}

/// `pageferry-bench downtime`.
pub(crate) fn downtime(options: &DowntimeOptions) -> Result<Outcome, BenchError> {
    let demo = Demo::new(&options.demo, options.size, None)?;
    let about = format!("idle KVM guest, {} GiB, {} vCPUs", gib(options.size), options.demo.vcpus);
    let mut outcome = Outcome::new("downtime", about);
    let reports = (0..options.runs).map(|_| demo.run()).collect::<Result<Vec<_>, _>>()?;
    let stalls = column(&reports, "/guest_longest_stall_ms")?;
    let stall = outcome.series("longest gap between the guest's heartbeats", "ms", stalls);
    outcome.series("downtime by the source's clock", "ms", column(&reports, "/downtime_ms")?);
    for part in ["pause", "harvest", "pages", "state", "digest", "commit", "resume"] {
        outcome.series(format!("of it, {part}"), "ms", column(&reports, &format!("/downtime_parts_ms/{part}"))?);
    }
    let engine = outcome.series("engine's share", "ms", reports.iter().map(engine_share).collect::<Result<_, _>>()?);
    outcome.figure("guest's longest stall", "ms", stall, Some(Target::AtMost(MOST_STALL)));
    outcome.figure("engine's share of the downtime", "ms", engine, Some(Target::AtMost(MOST_ENGINE)));
    Ok(outcome)
}

fn engine_share(report: &Value) -> Result<f64, BenchError> {
    ENGINE_PARTS.iter().map(|part| number(report, &format!("/downtime_parts_ms/{part}"))).sum()
}
