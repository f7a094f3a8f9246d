//! Memory that was touched and holds zeros: every page is read, none is sent.

use clap::Args;

use super::measured::{Way, migrate};
use super::{gib, size};
use crate::outcome::{Outcome, Target};
use crate::over::Over;
use crate::peer::Peer;
use crate::{BenchError, guest, machine};

/// Bytes per second of touched zeros that a migration must reach, in GB.
const LEAST_SPEED: f64 = 10.0;

#[derive(Args, Debug)]
pub(crate) struct ZeroOptions {
    /// Memory of the guest
    #[arg(long, value_parser = size, default_value = "8G")]
    size: u64,
    /// How often; medians are reported
    #[arg(long, default_value = "5", value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// Data lanes, each with a thread that reads memory
    #[arg(long, default_value = "1", value_parser = clap::value_parser!(u16).range(1..=128))]
    lanes: u16,
}

/// `pageferry-bench zero`.
pub(crate) fn zero(options: &ZeroOptions) -> Result<Outcome, BenchError> {
    if options.size > machine::available_bytes() / 10 * 9 {
        return Err(BenchError::Skipped(
            "this machine has not that much memory left; choose a smaller --size".to_owned(),
        ));
    }
    let about = format!("{} GiB of touched zero pages, {} lane(s)", gib(options.size), options.lanes);
    let mut outcome = Outcome::new("zero", about);
    let memory = guest::prefaulted(options.size)?;
    let mut peer = Peer::start()?;
    let (mut speeds, mut cpu) = (Vec::new(), Vec::new());
    for turn in 0..=options.runs {
        let (cost, report, received) =
            migrate(&mut peer, &memory, Way { running: false, lanes: options.lanes, over: Over::Tcp })?;
        if report.pages_zero != options.size / 4096 || report.pages_sent != 0 || received.present_pages != 0 {
            return Err(BenchError::Wrong(format!("not all pages went as zeros: {report:?}, {received:?}")));
        }
        if turn > 0 {
            speeds.push(cost.speed(options.size));
            cpu.push(cost.cpu_per_gib(options.size));
        }
    }
    let speed = outcome.series("guest memory covered", "GB/s", speeds);
    outcome.series("CPU, both sides", "s/GiB", cpu);
    outcome.figure("touched zero pages", "GB/s", speed, Some(Target::AtLeast(LEAST_SPEED)));
    outcome.note("no page was touched at the destination");
    Ok(outcome)
}
