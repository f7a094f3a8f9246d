//! Memory that was hardly ever touched: what is not there is neither read nor made at either side.

use clap::Args;
use pageferry::memory::GuestMemory;

use super::measured::{Way, migrate};
use super::{gib, size};
use crate::guest::{self, RAM, Random};
use crate::outcome::{Outcome, Target};
use crate::over::Over;
use crate::peer::Peer;
use crate::{BenchError, machine};

/// The distance between touched pages: one in this many bytes.
const SPARSE: u64 = 1 << 30;

#[derive(Args, Debug)]
pub(crate) struct HolesOptions {
    /// Memory of the guest; one page in every GiB of it is touched
    #[arg(long, value_parser = size, default_value = "256G")]
    size: u64,
    /// How often; medians are reported
    #[arg(long, default_value = "5", value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
}

/// `pageferry-bench holes`.
pub(crate) fn holes(options: &HolesOptions) -> Result<Outcome, BenchError> {
    let mut outcome = Outcome::new("holes", format!("{} GiB, one page in every GiB touched", gib(options.size)));
    let memory = guest::memory(options.size)?;
    let (mut page, mut random) = ([0; 4096], Random::new(3));
    for offset in (0..options.size).step_by(SPARSE as usize) {
        random.fill(&mut page);
        memory.write(RAM, offset, &page)?;
    }
    let (touched, resident) = (guest::present_pages(&memory), machine::resident_bytes());
    let mut peer = Peer::start()?;
    let (mut times, mut grown) = (Vec::new(), Vec::new());
    for _ in 0..options.runs {
        let (cost, report, received) = migrate(&mut peer, &memory, Way { running: false, lanes: 1, over: Over::Tcp })?;
        let present = guest::present_pages(&memory);
        if present != touched || report.pages_zero + report.pages_sent > touched {
            let covered = report.pages_zero + report.pages_sent;
            let wrong = format!("{touched} pages were there; {covered} were read, {present} are there now");
            return Err(BenchError::Wrong(wrong));
        }
        times.push(cost.seconds * 1e3);
        grown.push(received.grown_bytes as f64 / f64::from(1 << 20));
        outcome_is_sparse(received.present_pages, touched)?;
    }
    let source_growth = machine::resident_bytes().saturating_sub(resident) as f64 / f64::from(1 << 20);
    outcome.series("whole migration", "ms", times);
    outcome.series("memory that the destination grew by", "MiB", grown);
    outcome.figure("memory that the source grew by", "MiB", source_growth, None);
    outcome.figure("pages there before and after", "", touched as f64, None);
    outcome.figure("pages read that were not there", "", 0.0, Some(Target::AtMost(0.0)));
    Ok(outcome)
}

fn outcome_is_sparse(present: u64, touched: u64) -> Result<(), BenchError> {
    // Huge pages: the destination's kernel may make 512 where one was written, as at the source.
    let bound = touched.max(gib(touched) as u64) * 512;
    if present <= bound {
        return Ok(());
    }
    Err(BenchError::Wrong(format!("{touched} pages were there, {present} were made at the destination")))
}
