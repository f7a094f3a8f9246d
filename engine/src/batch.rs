//! Planning: takes dirty pages out of the accumulator, arms them again, and cuts them into batches.
//!
//! A round has two steps, each closed by a barrier over all lanes. The first carries what changed. The
//! second carries the pages which the encoders put off because another page had their content first: they
//! refer to what the first has delivered (R6).
//!
//! Pages that the guest writes again while they wait come last in the first step, so that most of them are
//! sent once instead of twice; a few of the hottest may wait for the last round.

use std::sync::Arc;

use crate::dirty::{Accumulator, PageBitmap};
use crate::limits::{MAX_BATCH_PAGES, WATCH_AHEAD_PAGES};
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
    /// The guest stands still: nothing is tried out on its time.
    pub urgent: bool,
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
    /// Bits of word `next_word` that are planned already: a page comes once per step (R5), even if it is
    /// dirty again by now.
    planned: u64,
    deferred: PageBitmap,
    hot: HotPages,
    rearm: RearmSpan,
}

/// Pages that wait for the end of the first step because the guest keeps writing them.
#[derive(Debug, Default)]
struct HotPages {
    /// How many may wait for another round; `None` when none waits at all.
    hold: Option<u64>,
    waiting: PageBitmap,
    /// Whether it is their turn.
    due: bool,
    spared: u64,
    /// Dirty pages of words before this one are armed already, to see which are written while they wait.
    watched_to: u64,
}

impl Planner {
    /// A planner for one round, in the order of addresses: for the last, when nothing is written any more.
    pub fn new(round: u32) -> Self {
        Self { round, ..Self::default() }
    }

    /// A planner that lets pages wait which the guest writes meanwhile: to the end of the round's first
    /// step, and up to `hold` of those written even then to the next round.
    pub fn patient(round: u32, hold: u64) -> Self {
        Self { round, hot: HotPages { hold: Some(hold), ..HotPages::default() }, ..Self::default() }
    }

    /// Times that a page was not sent because the guest would have written it again.
    pub fn spared(&self) -> u64 {
        self.hot.spared
    }

    /// The open step.
    pub fn step(&self) -> u32 {
        self.phase.step(self.round)
    }

    /// The next batch of the open step, `None` when it has no more. Every page of it was armed again before
    /// this returns or in the step before, so it may be read (R2), and is in flight (R1).
    pub fn next_batch(&mut self, dirty: &mut Accumulator, rearm: Rearm<'_>) -> VmResult<Option<Batch>> {
        let batch = match &self.phase {
            Phase::Contents => self.next_contents(dirty, rearm)?,
            Phase::Copies(deferred) => {
                let deferred = Arc::clone(deferred);
                self.next_deferred(&deferred, dirty.layout())
            }
        };
        Ok((batch.pages > 0).then_some(batch))
    }

    /// Arms some dirty pages whose turn comes later, so that by then it shows which of them the guest
    /// writes while they wait. Cheap, and done bit by bit: arming a large guest at once would stop it.
    pub fn watch_ahead(&mut self, dirty: &mut Accumulator, rearm: Rearm<'_>) -> VmResult<()> {
        if self.hot.hold.is_none() || self.hot.due || matches!(self.phase, Phase::Copies(_)) {
            return Ok(());
        }
        self.hot.watched_to = self.hot.watched_to.max(self.next_word.saturating_add(1));
        let mut pages = 0;
        while pages < WATCH_AHEAD_PAGES {
            let Some((word, bits)) = dirty.dirty().next_word(self.hot.watched_to) else { break };
            let (region, index) = locate(dirty.layout(), word, bits)?;
            dirty.watch(word, bits);
            self.rearm.add(region, index, bits, rearm)?;
            pages += u64::from(bits.count_ones());
            self.hot.watched_to = word + 1;
        }
        self.rearm.flush(rearm)
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
                (self.next_word, self.planned) = (0, 0);
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
            self.hot.due = true;
        }
    }

    fn next_contents(&mut self, dirty: &mut Accumulator, rearm: Rearm<'_>) -> VmResult<Batch> {
        let mut batch = self.open_batch();
        if !self.hot.due {
            self.add_dirty(&mut batch, dirty, rearm)?;
            if batch.pages == 0 {
                self.hot.due = true;
                (self.next_word, self.planned) = (0, 0);
            }
        }
        if self.hot.due {
            self.add_hot(&mut batch, dirty, rearm)?;
        }
        self.rearm.flush(rearm)?;
        Ok(batch)
    }

    fn add_dirty(&mut self, batch: &mut Batch, dirty: &mut Accumulator, rearm: Rearm<'_>) -> VmResult<()> {
        let mut previous_region = None;
        while batch.pages < MAX_BATCH_PAGES as u64 {
            let Some((word, bits)) = dirty.dirty().next_word(self.next_word) else {
                break;
            };
            let (region, index) = locate(dirty.layout(), word, bits)?;
            let left = bits & !self.planned_in(word);
            let hot = self.put_off_hot(word, left, dirty);
            let taken = self.take(word, left & !hot, batch);
            dirty.take_word(word, taken);
            self.rearm.add(region, index, taken | hot, rearm)?;
            for_each_run(word * PAGES_PER_WORD, taken, |run| batch.push(run, previous_region == Some(region)));
            previous_region = Some(region);
        }
        Ok(())
    }

    /// The pages of a word that have been written while they waited, or were sent in both rounds before:
    /// they wait on, armed, so that it shows whether they are written once more.
    fn put_off_hot(&mut self, word: u64, bits: u64, dirty: &mut Accumulator) -> u64 {
        if self.hot.hold.is_none() {
            return 0;
        }
        let waiting = bits & self.hot.waiting.word(word);
        let hot = bits & !waiting & (dirty.rewritten_word(word) | dirty.steadily_sent_word(word));
        if hot != 0 {
            if self.hot.waiting.page_space() == 0 {
                self.hot.waiting = PageBitmap::new(dirty.layout().page_space());
            }
            self.hot.waiting.insert_word(word, hot);
            dirty.watch(word, hot);
        }
        hot | waiting
    }

    fn add_hot(&mut self, batch: &mut Batch, dirty: &mut Accumulator, rearm: Rearm<'_>) -> VmResult<()> {
        let mut previous_region = None;
        while batch.pages < MAX_BATCH_PAGES as u64 {
            let Some((word, bits)) = self.hot.waiting.next_word(self.next_word) else {
                break;
            };
            let (region, index) = locate(dirty.layout(), word, bits)?;
            let again = bits & dirty.rewritten_word(word);
            self.hot.spared += u64::from(again.count_ones());
            // The first round sends everything once: what is written again is a delta then.
            let hold = if self.round == 0 { 0 } else { self.hot.hold.unwrap_or_default() };
            let held = lowest_bits(again, hold);
            self.hot.hold = self.hot.hold.map(|hold| hold.saturating_sub(held.count_ones().into()));
            dirty.watch(word, again);
            let taken = lowest_bits(bits & !held, MAX_BATCH_PAGES as u64 - batch.pages);
            self.hot.waiting.remove_word(word, taken | held);
            dirty.take_word(word, taken);
            self.rearm.add(region, index, taken | again, rearm)?;
            for_each_run(word * PAGES_PER_WORD, taken, |run| batch.push(run, previous_region == Some(region)));
            previous_region = Some(region);
        }
        Ok(())
    }

    fn next_deferred(&mut self, deferred: &PageBitmap, layout: &Layout) -> Batch {
        let mut batch = self.open_batch();
        let mut previous_region = None;
        while batch.pages < MAX_BATCH_PAGES as u64 {
            let Some((word, bits)) = deferred.next_word(self.next_word) else {
                break;
            };
            let region = locate(layout, word, bits).ok().map(|(region, _)| region);
            let taken = self.take(word, bits & !self.planned_in(word), &batch);
            for_each_run(word * PAGES_PER_WORD, taken, |run| batch.push(run, previous_region == region));
            previous_region = region;
        }
        batch
    }

    fn open_batch(&self) -> Batch {
        let urgent = self.hot.hold.is_none();
        Batch { round: self.round, phase: self.phase.clone(), urgent, ..Batch::default() }
    }

    fn planned_in(&self, word: u64) -> u64 {
        if word == self.next_word { self.planned } else { 0 }
    }

    /// As many of a word's pages as the batch has room for; goes on to the next word if that is all.
    fn take(&mut self, word: u64, bits: u64, batch: &Batch) -> u64 {
        let taken = lowest_bits(bits, MAX_BATCH_PAGES as u64 - batch.pages);
        let planned = self.planned_in(word) | taken;
        (self.next_word, self.planned) = if taken == bits { (word + 1, 0) } else { (word, planned) };
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
        assert!(batches.iter().all(|batch| batch.pages <= MAX_BATCH_PAGES as u64 && batch.round == 3 && batch.urgent));
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

    fn pages_of(batch: &Batch) -> Vec<u64> {
        batch.runs.iter().flat_map(PageRun::pages).map(|page| page.0).collect()
    }

    fn rest(planner: &mut Planner, dirty: &mut Accumulator) -> Vec<u64> {
        let mut pages = Vec::new();
        while let Some(batch) = planner.next_batch(dirty, &mut |_, _, _| Ok(())).unwrap() {
            pages.extend(pages_of(&batch));
        }
        pages
    }

    const NO_TRACKER: fn(RegionId, u64, &[u64]) -> VmResult<()> = |_, _, _| Ok(());

    #[test]
    fn a_page_written_again_behind_the_cursor_does_not_come_twice_in_a_step() {
        let mut dirty = accumulator();
        dirty.mark_range(RegionId(1), 0..700);
        let mut planner = Planner::patient(0, 0);
        let mut seen = pages_of(&planner.next_batch(&mut dirty, &mut { NO_TRACKER }).unwrap().unwrap());
        // The second batch ends within a word; the pages before its end are written again.
        dirty.mark_range(RegionId(1), 0..3);
        dirty.mark_range(RegionId(1), 120..128);
        seen.extend(rest(&mut planner, &mut dirty));
        let before = seen.len();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!((seen.len(), before), (700, 700));
        assert_eq!(dirty.dirty_pages(), 11);
    }

    #[test]
    fn pages_that_are_written_while_they_wait_come_last() {
        let mut dirty = accumulator();
        dirty.mark_range(RegionId(1), 0..700);
        let mut planner = Planner::patient(0, 100);
        let first = planner.next_batch(&mut dirty, &mut { NO_TRACKER }).unwrap().unwrap();
        // A report before they are armed says nothing; one after that does.
        dirty.mark_range(RegionId(1), 600..610);
        planner.watch_ahead(&mut dirty, &mut { NO_TRACKER }).unwrap();
        dirty.mark_range(RegionId(1), 300..305);
        let mut order = pages_of(&first);
        while order.len() < 690 {
            let batch = planner.next_batch(&mut dirty, &mut { NO_TRACKER }).unwrap().unwrap();
            order.extend(pages_of(&batch));
        }
        // Once more while they wait: an early sending would have been for nothing.
        dirty.mark_range(RegionId(1), 300..302);
        order.extend(rest(&mut planner, &mut dirty));
        assert_eq!(order.len(), 700);
        assert_eq!(order[695..], [128 + 300, 128 + 301, 128 + 302, 128 + 303, 128 + 304]);
        assert!(order[..695].is_sorted());
    }

    #[test]
    fn a_page_sent_in_vain_twice_waits_for_the_last_round_within_bounds() {
        let mut dirty = accumulator();
        for round in 0..2 {
            dirty.mark_range(RegionId(0), 0..10);
            assert_eq!(rest(&mut Planner::patient(round, 3), &mut dirty).len(), 10);
            dirty.acknowledge();
        }
        dirty.mark_range(RegionId(0), 0..10);
        dirty.mark_range(RegionId(1), 0..1);
        let mut planner = Planner::patient(2, 3);
        let cold = planner.next_batch(&mut dirty, &mut { NO_TRACKER }).unwrap().unwrap();
        assert_eq!((pages_of(&cold), cold.urgent), (vec![128], false));
        dirty.mark_range(RegionId(0), 0..5);
        assert_eq!(rest(&mut planner, &mut dirty), [3, 4, 5, 6, 7, 8, 9], "three of the five may wait");
        assert_eq!((planner.spared(), dirty.dirty_pages()), (5, 3));
        // In the last round nothing waits.
        dirty.acknowledge();
        assert_eq!(rest(&mut Planner::new(3), &mut dirty), [0, 1, 2]);
    }
}
