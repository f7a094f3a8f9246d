//! Planning: takes dirty pages out of the accumulator, arms them again, and cuts them into batches.
//!
//! A round has two steps, each closed by a barrier over all lanes. The first carries what changed. The
//! second carries the pages which the encoders put off because another page had their content first: they
//! refer to what the first has delivered (R6).

use std::sync::Arc;

use crate::dirty::{Accumulator, PageBitmap};
use crate::limits::MAX_BATCH_PAGES;
use crate::memory::{Layout, RegionId};
use crate::units::{PAGES_PER_WORD, PageNumber, PageRun};
use crate::vm::VmResult;

/// Words without a dirty page that are bridged to arm the pages on both sides in one call.
const REARM_GAP_WORDS: u64 = 64;

/// Arms pages again: region, first page (a multiple of 64), bitmap words. See
/// [`DirtySource::rearm`](crate::dirty::DirtySource::rearm).
pub type Rearm<'a> = &'a mut dyn FnMut(RegionId, u64, &[u64]) -> VmResult<()>;

/// Which step of a round.
#[derive(Debug, Clone, Default)]
pub enum Phase {
    /// What changed.
    #[default]
    Contents,
    /// Duplicates: all pages that were put off in the first step.
    Copies(Arc<PageBitmap>),
}

impl Phase {
    /// The step's number among all: two per round.
    pub fn step(&self, round: u32) -> u32 {
        round.saturating_mul(2).saturating_add(u32::from(matches!(self, Self::Copies(_))))
    }
}

/// The round that a step belongs to, and whether it is the round's last step.
pub fn round_of(step: u32) -> (u32, bool) {
    (step / 2, step % 2 == 1)
}

/// Pages that one worker encodes into one frame, ascending.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// The round it belongs to.
    pub round: u32,
    /// The step of the round.
    pub phase: Phase,
    /// Its pages; no run crosses a region.
    pub runs: Vec<PageRun>,
    /// How many pages all runs have.
    pub pages: u64,
}

impl Batch {
    /// The number of its step.
    pub fn step(&self) -> u32 {
        self.phase.step(self.round)
    }

    fn push(&mut self, run: PageRun, joins_previous: bool) {
        self.pages += run.count;
        match self.runs.last_mut() {
            Some(last) if joins_previous && last.end() == run.first.0 => last.count += run.count,
            _ => self.runs.push(run),
        }
    }
}

/// Walks over the pages of a round: first those that are dirty, then those put off.
#[derive(Debug, Default)]
pub struct Planner {
    round: u32,
    phase: Phase,
    next_word: u64,
    /// Bits of word `next_word` that are planned already, in the second step.
    planned: u64,
    deferred: PageBitmap,
    rearm: RearmSpan,
}

impl Planner {
    /// A planner for one round.
    pub fn new(round: u32) -> Self {
        Self { round, ..Self::default() }
    }

    /// The open step.
    pub fn step(&self) -> u32 {
        self.phase.step(self.round)
    }

    /// The next batch of the open step, `None` when it has no more. Every page of it was armed again before
    /// this returns or in the step before, so it may be read (R2), and is in flight (R1).
    pub fn next_batch(&mut self, dirty: &mut Accumulator, rearm: Rearm<'_>) -> VmResult<Option<Batch>> {
        let batch = match &self.phase {
            Phase::Contents => self.next_dirty(dirty, rearm)?,
            Phase::Copies(deferred) => {
                let deferred = Arc::clone(deferred);
                self.next_deferred(&deferred, dirty.layout())
            }
        };
        Ok((batch.pages > 0).then_some(batch))
    }

    /// Takes note of pages that an encoder has put off.
    pub fn defer(&mut self, layout: &Layout, runs: &[PageRun]) {
        if self.deferred.page_space() == 0 && !runs.is_empty() {
            self.deferred = PageBitmap::new(layout.page_space());
        }
        for run in runs {
            self.deferred.insert_run(*run);
        }
    }

    /// Goes on to the second step once all lanes have sent the first; `false` when the round is over.
    pub fn begin_copies(&mut self) -> bool {
        match self.phase {
            Phase::Contents => {
                self.phase = Phase::Copies(Arc::new(std::mem::take(&mut self.deferred)));
                self.next_word = 0;
                true
            }
            Phase::Copies(_) => false,
        }
    }

    /// Leaves out what is still to be planned of the dirty pages. Pages put off are not left out: the
    /// source has booked them as sent.
    pub fn abandon(&mut self) {
        if matches!(self.phase, Phase::Contents) {
            self.next_word = u64::MAX;
        }
    }

    fn next_dirty(&mut self, dirty: &mut Accumulator, rearm: Rearm<'_>) -> VmResult<Batch> {
        let mut batch = self.open_batch();
        let mut previous_region = None;
        while batch.pages < MAX_BATCH_PAGES as u64 {
            let Some((word, bits)) = dirty.dirty().next_word(self.next_word) else {
                break;
            };
            let (region, index) = locate(dirty.layout(), word, bits)?;
            let taken = self.take(word, bits, &batch);
            dirty.take_word(word, taken);
            self.rearm.add(region, index, taken, rearm)?;
            for_each_run(word * PAGES_PER_WORD, taken, |run| batch.push(run, previous_region == Some(region)));
            previous_region = Some(region);
        }
        self.rearm.flush(rearm)?;
        Ok(batch)
    }

    fn next_deferred(&mut self, deferred: &PageBitmap, layout: &Layout) -> Batch {
        let mut batch = self.open_batch();
        let mut previous_region = None;
        while batch.pages < MAX_BATCH_PAGES as u64 {
            let Some((word, bits)) = deferred.next_word(self.next_word) else {
                break;
            };
            // What the last batch had no room for.
            let left = bits & !self.planned;
            let region = locate(layout, word, bits).ok().map(|(region, _)| region);
            let taken = self.take(word, left, &batch);
            self.planned = if taken == left { 0 } else { self.planned | taken };
            for_each_run(word * PAGES_PER_WORD, taken, |run| batch.push(run, previous_region == region));
            previous_region = region;
        }
        batch
    }

    fn open_batch(&self) -> Batch {
        Batch { round: self.round, phase: self.phase.clone(), ..Batch::default() }
    }

    /// As many of a word's pages as the batch has room for; goes on to the next word if that is all.
    fn take(&mut self, word: u64, bits: u64, batch: &Batch) -> u64 {
        let taken = lowest_bits(bits, MAX_BATCH_PAGES as u64 - batch.pages);
        self.next_word = if taken == bits { word + 1 } else { word };
        taken
    }
}

/// The region of a word's pages, and the word's first page in it. Bits of one word belong to one
/// region: regions start at word boundaries.
fn locate(layout: &Layout, word: u64, bits: u64) -> VmResult<(RegionId, u64)> {
    let lowest = u64::from(bits.trailing_zeros());
    let page = PageNumber(word * PAGES_PER_WORD + lowest);
    let (region, index) = layout.locate(page).ok_or_else(|| format!("a dirty bit outside every region: {page}"))?;
    Ok((region, index - lowest))
}

/// The `count` lowest set bits.
fn lowest_bits(bits: u64, count: u64) -> u64 {
    let mut rest = bits;
    for _ in 0..count.min(64) {
        rest &= rest.wrapping_sub(1);
    }
    bits & !rest
}

fn for_each_run(first_page: u64, bits: u64, mut visit: impl FnMut(PageRun)) {
    let mut left = bits;
    while left != 0 {
        let start = left.trailing_zeros();
        let count = (left >> start).trailing_ones();
        visit(PageRun { first: PageNumber(first_page + u64::from(start)), count: count.into() });
        let run = if count == 64 { !0 } else { ((1 << count) - 1) << start };
        left &= !run;
    }
}

/// Collects neighbouring words, so that a tracker is called once per stretch.
#[derive(Debug, Default)]
struct RearmSpan {
    region: Option<RegionId>,
    first_page: u64,
    words: Vec<u64>,
}

impl RearmSpan {
    fn add(&mut self, region: RegionId, first_page: u64, bits: u64, rearm: Rearm<'_>) -> VmResult<()> {
        let position = first_page.checked_sub(self.first_page).map(|pages| pages / PAGES_PER_WORD);
        let next = self.words.len() as u64;
        match position {
            Some(at) if self.region == Some(region) && at + 1 >= next && at < next + REARM_GAP_WORDS => {
                self.words.resize(at as usize + 1, 0);
                self.words[at as usize] |= bits;
            }
            _ => {
                self.flush(rearm)?;
                self.region = Some(region);
                self.first_page = first_page;
                self.words.push(bits);
            }
        }
        Ok(())
    }

    fn flush(&mut self, rearm: Rearm<'_>) -> VmResult<()> {
        let Some(region) = self.region.take() else {
            return Ok(());
        };
        let result = rearm(region, self.first_page, &self.words);
        self.words.clear();
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dirty::DirtySink;
    use crate::memory::{Layout, Region};

    const PAGE: u64 = 4096;

    fn accumulator() -> Accumulator {
        let regions = vec![Region::ram("a", 0, 128 * PAGE), Region::ram("b", 128 * PAGE, 700 * PAGE)];
        Accumulator::new(Layout::new(regions).unwrap())
    }

    type Armed = Vec<(RegionId, u64, Vec<u64>)>;

    fn plan(dirty: &mut Accumulator) -> (Vec<Batch>, Armed) {
        let (mut batches, mut armed) = (Vec::new(), Armed::new());
        let mut planner = Planner::new(3);
        let mut rearm = |region, first, words: &[u64]| {
            armed.push((region, first, words.to_vec()));
            Ok(())
        };
        while let Some(batch) = planner.next_batch(dirty, &mut rearm).unwrap() {
            batches.push(batch);
        }
        (batches, armed)
    }

    fn armed_pages(layout: &Layout, armed: &Armed) -> Vec<u64> {
        let mut pages = Vec::new();
        for (region, first, words) in armed {
            let start = layout.first_page(*region).unwrap().0 + first;
            for (word, bits) in words.iter().enumerate() {
                pages.extend((0..64).filter(|bit| bits >> bit & 1 == 1).map(|bit| start + word as u64 * 64 + bit));
            }
        }
        pages
    }

    #[test]
    fn every_dirty_page_is_planned_once_armed_once_and_in_flight() {
        let mut dirty = accumulator();
        let mut state = 5u64;
        let mut expected = std::collections::BTreeSet::new();
        for _ in 0..400 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(7);
            let (region, page) = if state >> 63 == 0 { (0, (state >> 20) % 128) } else { (1, (state >> 20) % 700) };
            dirty.mark_range(RegionId(region), page..page + 1);
            expected.insert(u64::from(region) * 128 + page);
        }
        let (batches, armed) = plan(&mut dirty);
        let planned: Vec<u64> =
            batches.iter().flat_map(|b| &b.runs).flat_map(super::super::units::PageRun::pages).map(|p| p.0).collect();
        assert!(planned.iter().eq(expected.iter()));
        assert_eq!(armed_pages(dirty.layout(), &armed), planned);
        assert!(batches.iter().all(|batch| batch.pages <= MAX_BATCH_PAGES as u64 && batch.round == 3));
        assert_eq!((dirty.dirty_pages(), dirty.in_flight_pages()), (0, expected.len() as u64));
    }

    #[test]
    fn runs_never_cross_a_region_and_full_memory_makes_full_batches() {
        let mut dirty = accumulator();
        dirty.mark_range(RegionId(0), 0..128);
        dirty.mark_range(RegionId(1), 0..700);
        let (batches, _) = plan(&mut dirty);
        assert_eq!(batches.iter().map(|batch| batch.pages).collect::<Vec<_>>(), [128, 128, 128, 128, 128, 128, 60]);
        let layout = dirty.layout();
        assert!(batches.iter().flat_map(|batch| &batch.runs).all(|run| layout.locate_run(*run).is_some()));
        dirty.acknowledge();
        dirty.mark_range(RegionId(0), 100..128);
        dirty.mark_range(RegionId(1), 0..20);
        assert_eq!(plan(&mut dirty).0[0].runs.len(), 2);
    }

    #[test]
    fn a_tracker_that_fails_ends_the_plan() {
        let mut dirty = accumulator();
        dirty.mark_range(RegionId(1), 0..3);
        let result = Planner::new(0).next_batch(&mut dirty, &mut |_, _, _| Err("ioctl failed".into()));
        assert_eq!(result.unwrap_err().to_string(), "ioctl failed");
    }
}
