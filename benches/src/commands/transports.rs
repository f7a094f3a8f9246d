//! The same migration of incompressible memory over every transport, in turn.

use clap::Args;

use super::measured::Way;
use super::throughput::{Stage, add};
use super::{gib, size};
use crate::BenchError;
use crate::outcome::{Outcome, Target};
use crate::over::Over;

/// Of plain TCP's throughput, what TLS must reach; and in GB/s.
const TLS_LEAST: (f64, f64) = (0.6, 1.0);

/// What is measured.
#[derive(Args, Debug)]
pub(crate) struct TransportsOptions {
    /// Memory to move
    #[arg(long, value_parser = size, default_value = "2G")]
    size: u64,
    /// How often; medians are reported
    #[arg(long, default_value = "5", value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// Data lanes
    #[arg(long, default_value = "2", value_parser = clap::value_parser!(u16).range(1..=128))]
    lanes: u16,
    /// Which, beside plain TCP
    #[arg(long, value_enum, value_delimiter = ',', default_value = "tls,unix,paths")]
    over: Vec<Over>,
}

/// `pageferry-bench transports`.
pub(crate) fn transports(options: &TransportsOptions) -> Result<Outcome, BenchError> {
    let bytes = options.size;
    let about = format!("{} GiB incompressible, idle guest, {} lane(s), each in turn", gib(bytes), options.lanes);
    let mut outcome = Outcome::new("transports", about);
    let mut stage = Stage::new(bytes)?;
    let all: Vec<Over> =
        std::iter::once(Over::Tcp).chain(options.over.iter().copied().filter(|over| *over != Over::Tcp)).collect();
    let mut costs = vec![Vec::new(); all.len()];
    // The first turn only warms up.
    for turn in 0..=options.runs {
        for (over, costs) in all.iter().zip(&mut costs) {
            let cost = stage.migration(Way { running: true, lanes: options.lanes, over: *over })?;
            costs.extend((turn > 0).then_some(cost));
        }
    }
    let mut plain = None;
    for (over, costs) in all.iter().zip(&costs) {
        let (speed, cpu) = add(&mut outcome, &over.to_string(), bytes, costs);
        outcome.figure(format!("{over}: CPU, both sides"), "s/GiB", cpu, None);
        let Some(plain) = plain else {
            plain = Some(speed);
            continue;
        };
        let (ratio, least) = match over {
            Over::Tls => (Some(TLS_LEAST.0), Some(TLS_LEAST.1)),
            _ => (None, None),
        };
        outcome.figure(format!("{over}: of plain TCP"), "", speed / plain, ratio.map(Target::AtLeast));
        if let Some(least) = least {
            outcome.figure(format!("{over}: throughput, at least"), "GB/s", speed, Some(Target::AtLeast(least)));
        }
    }
    Ok(outcome)
}
