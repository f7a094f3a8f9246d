//! A dirty log that the writers keep themselves: for memory that no hardware watches, and for what
//! a VMM's own devices write into guest memory.

use std::ops::Range;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::{DirtySink, DirtySource, Point};
use crate::memory::{Layout, RegionId};
use crate::units::PAGES_PER_WORD;
use crate::vm::VmResult;

/// A shared log of writes. Clones are the same log: writers keep one, the migration another.
///
/// A writer marks pages *after* it has written them. Marked before, the page could be harvested and
/// sent between the mark and the write, and the write would be lost.
#[derive(Clone, Debug)]
pub struct WriteLog(Arc<Log>);

#[derive(Debug)]
struct Log {
    layout: Layout,
    tracking: AtomicBool,
    words: Words,
    /// Pages given back; made with the first of them.
    zeroed: OnceLock<Words>,
}

type Words = Box<[AtomicU64]>;

impl WriteLog {
    /// An empty log over a layout.
    pub fn new(layout: Layout) -> Self {
        let words = words(&layout);
        Self(Arc::new(Log { layout, tracking: AtomicBool::new(false), words, zeroed: OnceLock::new() }))
    }

    /// Notes that pages of a region were written. Costs next to nothing while no migration runs.
    pub fn mark(&self, region: RegionId, pages: Range<u64>) {
        if self.is_tracking() {
            self.0.note(&self.0.words, region, pages);
        }
    }

    /// Notes that pages of a region were given back to the host and read as zeros now (a balloon, free page reporting): after that
    /// was done, as with [`mark`](Self::mark).
    pub fn mark_zeroed(&self, region: RegionId, pages: Range<u64>) {
        if self.is_tracking() {
            self.0.note(self.0.zeroed.get_or_init(|| words(&self.0.layout)), region, pages);
        }
    }

    fn is_tracking(&self) -> bool {
        // Orders the caller's writes before this look: who does not see tracking yet has written
        // before `start` returns, and so before memory is first read.
        std::sync::atomic::fence(Ordering::SeqCst);
        self.0.tracking.load(Ordering::SeqCst)
    }

    /// Notes that `len` bytes from a guest-physical address were written.
    pub fn mark_address(&self, guest_address: u64, len: u64) {
        let Some(last) = len.checked_sub(1).and_then(|rest| guest_address.checked_add(rest)) else { return };
        let (first, last) = (self.0.layout.locate_address(guest_address), self.0.layout.locate_address(last));
        match (first, last) {
            (Some((region, first)), Some((same, last))) if region == same => self.mark(region, first..last + 1),
            // Across regions, or partly outside: the parts that are memory count.
            _ => {
                for (region, described) in self.0.layout.iter() {
                    let start = guest_address.max(described.guest_address);
                    let end = guest_address.saturating_add(len).min(described.guest_address + described.len);
                    if start < end {
                        let page = |address: u64| (address - described.guest_address) / crate::units::PAGE_SIZE as u64;
                        self.mark(region, page(start)..page(end - 1) + 1);
                    }
                }
            }
        }
    }
}

impl Log {
    fn note(&self, words: &Words, region: RegionId, pages: Range<u64>) {
        let all = self.layout.pages_of(region);
        for page in pages.start..pages.end.min(all.count) {
            let page = all.first.0 + page;
            if let Some(word) = words.get((page / PAGES_PER_WORD) as usize) {
                word.fetch_or(1 << (page % PAGES_PER_WORD), Ordering::SeqCst);
            }
        }
    }

    /// Takes the words of every region: with the region and the first page of each that is not empty.
    fn take(&self, words: &Words, mut each: impl FnMut(RegionId, u64, u64)) {
        for (region, _) in self.layout.iter() {
            let pages = self.layout.pages_of(region);
            let first_word = (pages.first.0 / PAGES_PER_WORD) as usize;
            let count = pages.count.div_ceil(PAGES_PER_WORD) as usize;
            for (index, word) in words[first_word..first_word + count].iter().enumerate() {
                if word.load(Ordering::Relaxed) != 0 {
                    each(region, index as u64 * PAGES_PER_WORD, word.swap(0, Ordering::SeqCst));
                }
            }
        }
    }
}

fn words(layout: &Layout) -> Words {
    let count = layout.page_space().div_ceil(PAGES_PER_WORD);
    (0..count).map(|_| AtomicU64::new(0)).collect()
}

impl DirtySource for WriteLog {
    fn start(&mut self, _layout: &Layout) -> VmResult<()> {
        self.0.tracking.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn harvest(&mut self, _point: Point, sink: &mut dyn DirtySink) -> VmResult<()> {
        self.0.take(&self.0.words, |region, first_page, bits| sink.mark_words(region, first_page, &[bits]));
        if let Some(zeroed) = self.0.zeroed.get() {
            self.0.take(zeroed, |region, first_page, bits| {
                let set = (0..PAGES_PER_WORD).filter(|bit| bits >> bit & 1 == 1);
                set.for_each(|bit| sink.mark_zeroed(region, first_page + bit..first_page + bit + 1));
            });
        }
        Ok(())
    }

    fn stop(&mut self) -> VmResult<()> {
        self.0.tracking.store(false, Ordering::SeqCst);
        for word in self.0.words.iter().chain(self.0.zeroed.get().into_iter().flatten()) {
            word.store(0, Ordering::Relaxed);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dirty::Accumulator;
    use crate::memory::Region;

    fn harvested(log: &mut WriteLog, layout: &Layout) -> Vec<u64> {
        let mut dirty = Accumulator::new(layout.clone());
        log.harvest(Point::Running, &mut dirty).unwrap();
        dirty.dirty().iter().map(|page| page.0).collect()
    }

    #[test]
    fn marks_are_reported_once_and_only_while_tracking() {
        let layout = Layout::new(vec![Region::ram("a", 0, 3 * 4096), Region::ram("b", 1 << 20, 4096)]).unwrap();
        let mut log = WriteLog::new(layout.clone());
        let writer = log.clone();
        writer.mark(RegionId(0), 0..1);
        log.start(&layout).unwrap();
        writer.mark(RegionId(0), 1..99);
        writer.mark_address((1 << 20) + 4095, 1);
        writer.mark_address(4095, 2);
        writer.mark_address(2 * 4096 + 1, 1 << 30);
        writer.mark_address(u64::MAX, 5);
        assert_eq!(harvested(&mut log, &layout), [0, 1, 2, 64]);
        assert_eq!(harvested(&mut log, &layout), []);
        log.stop().unwrap();
        writer.mark(RegionId(0), 0..3);
        writer.mark_zeroed(RegionId(0), 0..3);
        assert_eq!(harvested(&mut log, &layout), []);
    }

    #[test]
    fn pages_given_back_are_reported_as_that_once() {
        let layout = Layout::new(vec![Region::ram("a", 0, 70 * 4096), Region::ram("b", 1 << 20, 4096)]).unwrap();
        let mut log = WriteLog::new(layout.clone());
        log.start(&layout).unwrap();
        log.mark_zeroed(RegionId(0), 63..65);
        log.mark_zeroed(RegionId(1), 0..9);
        log.mark(RegionId(0), 2..3);
        let mut dirty = Accumulator::new(layout.clone());
        log.harvest(Point::Running, &mut dirty).unwrap();
        let given_back = |page: &u64| dirty.given_back().contains(crate::units::PageNumber(*page));
        assert_eq!((0..256).filter(given_back).collect::<Vec<_>>(), [63, 64, 128]);
        assert_eq!(dirty.dirty().iter().map(|page| page.0).collect::<Vec<_>>(), [2, 63, 64, 128]);
        assert_eq!(harvested(&mut log, &layout), []);
    }
}
