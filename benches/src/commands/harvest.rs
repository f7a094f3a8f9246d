//! The engine's own share of a harvest in which nothing was dirty: what it costs every round, and in
//! the downtime, however large the guest is.

use std::hint::black_box;

use clap::Args;
use pageferry::batch::Planner;
use pageferry::dirty::{Accumulator, DirtySink};
use pageferry::memory::{Layout, Region};

use super::{gib, size};
use crate::outcome::{Outcome, Target};
use crate::{BenchError, sys};

/// Milliseconds for 1 TiB.
const MOST_TIME: f64 = 20.0;

#[derive(Args, Debug)]
pub(crate) struct HarvestOptions {
    /// Memory of the guest
    #[arg(long, value_parser = size, default_value = "1T")]
    size: u64,
    /// Regions it comes in, with a hole after each
    #[arg(long, default_value = "64", value_parser = clap::value_parser!(u32).range(1..=4096))]
    regions: u32,
    /// How often; medians are reported
    #[arg(long, default_value = "15", value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
}

/// `pageferry-bench harvest`.
pub(crate) fn harvest(options: &HarvestOptions) -> Result<Outcome, BenchError> {
    let region_bytes = (options.size / u64::from(options.regions)).next_multiple_of(4096);
    let about = format!("{} GiB in {} regions, no page dirty", gib(options.size), options.regions);
    let mut outcome = Outcome::new("harvest", about);
    let layout = sparse_layout(options.regions, region_bytes)?;
    let mut dirty = Accumulator::new(layout.clone());
    // What a dirty log hands over for a region in which nothing was written.
    let clean = vec![0u64; (region_bytes / 4096).div_ceil(64) as usize];
    let mut times = Vec::new();
    for turn in 0..=options.runs {
        let started = sys::thread_seconds();
        for (region, _) in layout.iter() {
            dirty.mark_words(region, 0, black_box(&clean));
        }
        let batch = Planner::new(turn).next_batch(&mut dirty, &mut |_, _, _| Ok(()));
        let found = batch.map_err(|source| BenchError::Engine { what: "plan a round", source })?;
        dirty.acknowledge();
        let spent = (sys::thread_seconds() - started) * 1e3;
        if found.is_some() || dirty.dirty_pages() != 0 {
            return Err(BenchError::Wrong("pages are dirty that nobody wrote".to_owned()));
        }
        // The first turn also takes the memory of the bitmaps.
        times.extend((turn > 0).then_some(spent));
    }
    dirty_bits_survive(&layout, &mut dirty, &clean)?;
    let median = outcome.series("harvest, plan and acknowledge", "ms", times);
    outcome.figure("clean harvest, own code", "ms", median, Some(Target::AtMost(MOST_TIME)));
    Ok(outcome)
}

fn sparse_layout(regions: u32, bytes: u64) -> Result<Layout, BenchError> {
    let region = |index: u64| Region::ram(format!("ram{index}"), index * bytes * 2, bytes);
    Ok(Layout::new((0..u64::from(regions)).map(region).collect())?)
}

/// A harvest that is fast because it sees nothing is no use: one bit at the very end must be found.
fn dirty_bits_survive(layout: &Layout, dirty: &mut Accumulator, clean: &[u64]) -> Result<(), BenchError> {
    let Some((last, described)) = layout.iter().last() else { return Ok(()) };
    let page = described.page_count() - 1;
    let mut words = clean.to_vec();
    words[(page / 64) as usize] = 1 << (page % 64);
    dirty.mark_words(last, 0, &words);
    let found: Vec<_> = dirty.dirty().iter().collect();
    if found.len() == 1 && found[0].0 == layout.pages_of(last).first.0 + page {
        return Ok(());
    }
    Err(BenchError::Wrong(format!("the last page was dirty, the harvest found {found:?}")))
}
