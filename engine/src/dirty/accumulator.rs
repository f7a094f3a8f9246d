//! The engine's own record of dirty pages. Trackers forget what they report (R1), so a bit lives
//! here until the destination has acknowledged the round that carried the page: it moves from
//! `dirty` to `in_flight` when the page is planned, and comes back if the round is abandoned.

use std::ops::Range;
use std::sync::Arc;

use super::bitmap::for_each_word;
use super::{DirtySink, PageBitmap, PageSet};
use crate::memory::{Layout, RegionId, Transfer};
use crate::units::{PAGE_SIZE, PAGES_PER_WORD, PageNumber, PageRun};

/// Dirty pages of a guest, OR-only towards trackers.
#[derive(Debug)]
pub struct Accumulator {
    layout: Layout,
    dirty: PageBitmap,
    in_flight: PageBitmap,
    /// Dirty, and armed all the same: a report says that they were written once more. Of others it says
    /// nothing, since trackers report a page until it is armed.
    watched: PageBitmap,
    /// Watched, and reported since.
    rewritten: PageBitmap,
    /// Sent in the last round, and in the one before.
    sent: [PageBitmap; 2],
    given_back: Arc<PageSet>,
    /// Writes seen since they were last taken.
    writes: u64,
}

impl Accumulator {
    /// Nothing dirty, nothing in flight.
    pub fn new(layout: Layout) -> Self {
        let none = || PageBitmap::new(layout.page_space());
        let given_back = Arc::new(PageSet::new(layout.page_space()));
        let (dirty, in_flight, watched, rewritten, sent) = (none(), none(), none(), none(), [none(), none()]);
        Self { layout, dirty, in_flight, watched, rewritten, sent, given_back, writes: 0 }
    }

    /// The layout whose pages these are.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Pages that must be sent (again).
    pub fn dirty_pages(&self) -> u64 {
        self.dirty.count()
    }

    /// Pages planned and not yet acknowledged.
    pub fn in_flight_pages(&self) -> u64 {
        self.in_flight.count()
    }

    /// Every page that was ever reported as given back (R9).
    pub fn given_back(&self) -> &Arc<PageSet> {
        &self.given_back
    }

    /// How many writes of pages were seen since the last call: reports of pages that were clean, or watched. A page that is
    /// dirty and not armed is not seen, however often the guest writes it.
    pub fn take_writes(&mut self) -> u64 {
        std::mem::take(&mut self.writes)
    }

    /// The dirty pages themselves.
    pub fn dirty(&self) -> &PageBitmap {
        &self.dirty
    }

    /// Dirty pages of a word that are about to be armed, to see whether they are written again while they
    /// wait.
    pub(crate) fn watch(&mut self, word: u64, bits: u64) {
        self.rewritten.remove_word(word, bits);
        self.watched.insert_word(word, bits);
    }

    /// Pages of a word that were written again while they were watched.
    pub(crate) fn rewritten_word(&self, word: u64) -> u64 {
        self.rewritten.word(word)
    }

    /// Pages of a word that were sent in each of the last two rounds.
    pub(crate) fn steadily_sent_word(&self, word: u64) -> u64 {
        self.sent[0].word(word) & self.sent[1].word(word)
    }

    /// Moves the given pages of a bitmap word from dirty to in flight.
    pub(crate) fn take_word(&mut self, word: u64, bits: u64) {
        self.watched.remove_word(word, bits);
        self.rewritten.remove_word(word, bits);
        self.dirty.remove_word(word, bits);
        self.in_flight.insert_word(word, bits);
    }

    /// The destination holds everything that was in flight.
    pub fn acknowledge(&mut self) {
        self.sent.swap(0, 1);
        std::mem::swap(&mut self.sent[0], &mut self.in_flight);
        self.in_flight.clear();
    }

    /// Whatever was in flight may be lost: all of it is dirty again.
    pub fn abandon_in_flight(&mut self) {
        self.dirty.insert_all(&self.in_flight);
        self.in_flight.clear();
    }

    /// Planned pages that were not handed to a lane after all are dirty again.
    pub fn give_back(&mut self, run: PageRun) {
        self.in_flight.remove_run(run);
        self.dirty.insert_run(run);
    }

    fn mark_word(&mut self, word: u64, bits: u64) {
        let before = self.rewritten.count() + self.dirty.count();
        self.rewritten.insert_word(word, bits & self.watched.word(word));
        self.dirty.insert_word(word, bits);
        self.writes += self.rewritten.count() + self.dirty.count() - before;
    }

    /// The pages of a region that travel: none when its content stays.
    fn travelling(&self, region: RegionId) -> Option<PageRun> {
        let described = self.layout.region(region)?;
        (described.transfer == Transfer::Copy).then(|| self.layout.pages_of(region))
    }
}

impl DirtySink for Accumulator {
    fn mark_words(&mut self, region: RegionId, first_page: u64, words: &[u64]) {
        let Some(pages) = self.travelling(region) else {
            return;
        };
        let first_word = (pages.first.0 + first_page) / PAGES_PER_WORD;
        let end = pages.end();
        for (word, &bits) in (first_word..).zip(words) {
            if bits == 0 {
                continue;
            }
            let word_start = word * PAGES_PER_WORD;
            if word_start >= end {
                break;
            }
            let valid = end - word_start;
            let mask = if valid >= PAGES_PER_WORD { !0 } else { (1 << valid) - 1 };
            self.mark_word(word, bits & mask);
        }
    }

    fn mark_range(&mut self, region: RegionId, pages: Range<u64>) {
        let Some(all) = self.travelling(region) else {
            return;
        };
        let end = pages.end.min(all.count);
        if pages.start < end {
            let run = PageRun { first: PageNumber(all.first.0 + pages.start), count: end - pages.start };
            for_each_word(run, |word, bits| self.mark_word(word, bits));
        }
    }

    fn mark_gpa(&mut self, guest_address: u64, len: u64) {
        let end = guest_address.saturating_add(len);
        let hits: Vec<(RegionId, Range<u64>)> = self
            .layout
            .iter()
            .filter_map(|(id, region)| {
                let start = guest_address.max(region.guest_address);
                let end = end.min(region.guest_address + region.len);
                let page = |address: u64| (address - region.guest_address) / PAGE_SIZE as u64;
                (start < end).then(|| (id, page(start)..page(end - 1) + 1))
            })
            .collect();
        for (region, pages) in hits {
            self.mark_range(region, pages);
        }
    }

    fn mark_zeroed(&mut self, region: RegionId, pages: Range<u64>) {
        // The page reads as zeros now: sent as any other change, it costs a few bytes of record. No throttle slows whoever
        // gives pages back.
        let writes = self.writes;
        self.mark_range(region, pages.clone());
        self.writes = writes;
        if let Some(all) = self.travelling(region) {
            (pages.start..pages.end.min(all.count))
                .for_each(|page| self.given_back.insert(PageNumber(all.first.0 + page)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Region;

    fn accumulator() -> Accumulator {
        let mut skipped = Region::ram("rom", 0x10_0000, 8 * 4096);
        skipped.transfer = Transfer::Skip;
        let regions = vec![Region::ram("low", 0, 70 * 4096), skipped, Region::ram("high", 0x20_0000, 4096)];
        Accumulator::new(Layout::new(regions).unwrap())
    }

    fn dirty(accumulator: &Accumulator) -> Vec<u64> {
        accumulator.dirty().iter().map(|page| page.0).collect()
    }

    #[test]
    fn marks_outside_a_region_or_in_a_skipped_one_are_ignored() {
        let mut acc = accumulator();
        acc.mark_words(RegionId(0), 64, &[!0, !0]);
        assert_eq!(dirty(&acc), [64, 65, 66, 67, 68, 69]);
        acc.mark_range(RegionId(1), 0..8);
        acc.mark_words(RegionId(9), 0, &[!0]);
        acc.mark_range(RegionId(0), 69..1000);
        assert_eq!(acc.dirty_pages(), 6);
    }

    #[test]
    fn writes_are_seen_of_pages_that_were_clean_or_are_watched() {
        let mut dirty = accumulator();
        dirty.mark_range(RegionId(0), 0..3);
        assert_eq!(dirty.take_writes(), 3);
        dirty.mark_range(RegionId(0), 0..3);
        assert_eq!(dirty.take_writes(), 0, "nobody can tell whether these were written once more");
        dirty.watch(0, 0b11);
        for seen in [2, 0] {
            dirty.mark_range(RegionId(0), 0..3);
            assert_eq!(dirty.take_writes(), seen);
        }
        dirty.take_word(0, 0b111);
        dirty.mark_range(RegionId(0), 1..3);
        assert_eq!(dirty.take_writes(), 2);
    }

    #[test]
    fn pages_that_were_given_back_are_dirty_and_remembered() {
        let mut acc = accumulator();
        acc.mark_range(RegionId(0), 3..4);
        acc.mark_zeroed(RegionId(0), 60..99);
        acc.mark_zeroed(RegionId(1), 0..8);
        acc.mark_zeroed(RegionId(2), 0..1);
        acc.take_word(0, !0);
        acc.acknowledge();
        let remembered: Vec<u64> = (0..256).filter(|&page| acc.given_back().contains(PageNumber(page))).collect();
        assert_eq!(remembered, (60..70).chain([192]).collect::<Vec<_>>());
        assert_eq!(dirty(&acc), [64, 65, 66, 67, 68, 69, 192]);
    }

    #[test]
    fn guest_physical_bytes_mark_every_page_they_touch_in_every_region() {
        let mut acc = accumulator();
        acc.mark_gpa(4095, 2);
        acc.mark_gpa(69 * 4096, 0x20_0000);
        assert_eq!(dirty(&acc), [0, 1, 69, 192]);
        acc.mark_gpa(u64::MAX - 1, 100);
        acc.mark_gpa(8192, 0);
        assert_eq!(acc.dirty_pages(), 4);
    }

    #[test]
    fn a_bit_leaves_only_when_acknowledged_and_comes_back_when_abandoned() {
        let mut acc = accumulator();
        acc.mark_range(RegionId(0), 0..4);
        acc.take_word(0, 0b0011);
        assert_eq!((acc.dirty_pages(), acc.in_flight_pages()), (2, 2));
        acc.mark_range(RegionId(0), 0..1);
        acc.abandon_in_flight();
        assert_eq!(dirty(&acc), [0, 1, 2, 3]);
        acc.take_word(0, 0b1111);
        acc.give_back(PageRun { first: PageNumber(3), count: 1 });
        acc.acknowledge();
        assert_eq!((dirty(&acc), acc.in_flight_pages()), (vec![3], 0));
    }
}
