//! Writes to guest memory that KVM does not see: the VMM's own.
//!
//! KVM logs what the guest and KVM itself write. A VMM that writes through its mapping of guest
//! memory (a kernel loader, a device model that answers into a ring) leaves no trace there, so it
//! marks the pages here and the dirty log reports both together.
//!
//! The bitmap has two levels, so that a harvest looks only at what was marked. A marker sets the
//! page's bit first and the summary bit after it; a harvest takes them in the other order. A mark
//! that races with a harvest is therefore seen by it or by the next one.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use pageferry::dirty::DirtySink;
use pageferry::memory::{Layout, RegionId};
use pageferry::units::{PAGE_SIZE, PAGES_PER_WORD};

/// Collects the pages that the VMM itself writes. Shared by everything that writes; a mark costs
/// two atomic operations per 64 pages.
pub struct HostWrites {
    regions: Vec<MarkedRegion>,
}

struct MarkedRegion {
    guest_address: u64,
    len: u64,
    words: Vec<AtomicU64>,
    /// Bit `w % 64` of `summary[w / 64]` is set when `words[w]` may be other than zero.
    summary: Vec<AtomicU64>,
}

impl std::fmt::Debug for HostWrites {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HostWrites({} regions)", self.regions.len())
    }
}

impl HostWrites {
    /// Nothing marked yet. Takes a bit of memory a page.
    pub fn new(layout: &Layout) -> Self {
        let regions = layout.regions().iter();
        Self { regions: regions.map(|region| MarkedRegion::new(region.guest_address, region.len)).collect() }
    }

    /// Bytes of guest-physical memory were written. Call it after the write and before the guest is
    /// told of it: a mark that comes first could be harvested before the write has happened. What
    /// lies in no region is ignored.
    pub fn mark(&self, guest_address: u64, len: u64) {
        let end = guest_address.saturating_add(len);
        for region in &self.regions {
            let start = guest_address.max(region.guest_address);
            let end = end.min(region.guest_address + region.len);
            if start < end {
                region.mark(start - region.guest_address..end - region.guest_address);
            }
        }
    }

    /// Reports what was marked since the last call, and forgets it.
    pub(crate) fn drain(&self, sink: &mut dyn DirtySink) {
        for (region, id) in self.regions.iter().zip(0..) {
            region.drain(|word, bits| sink.mark_words(RegionId(id), word * PAGES_PER_WORD, &[bits]));
        }
    }

    /// Forgets what was marked.
    pub(crate) fn clear(&self) {
        for region in &self.regions {
            region.drain(|_, _| ());
        }
    }
}

impl MarkedRegion {
    fn new(guest_address: u64, len: u64) -> Self {
        let words = (len / PAGE_SIZE as u64).div_ceil(PAGES_PER_WORD) as usize;
        Self { guest_address, len, words: zeros(words), summary: zeros(words.div_ceil(64)) }
    }

    /// Marks every page that a range of bytes touches; the range is not empty and inside the region.
    fn mark(&self, bytes: Range<u64>) {
        let mut page = bytes.start / PAGE_SIZE as u64;
        let end = bytes.end.div_ceil(PAGE_SIZE as u64);
        while page < end {
            let word = page / PAGES_PER_WORD;
            let word_end = ((word + 1) * PAGES_PER_WORD).min(end);
            let bits = !0u64 >> (PAGES_PER_WORD - (word_end - page)) << (page % PAGES_PER_WORD);
            self.words[word as usize].fetch_or(bits, Ordering::AcqRel);
            self.summary[word as usize / 64].fetch_or(1 << (word % 64), Ordering::AcqRel);
            page = word_end;
        }
    }

    fn drain(&self, mut report: impl FnMut(u64, u64)) {
        for (summary, base) in self.summary.iter().zip((0u64..).step_by(64)) {
            if summary.load(Ordering::Relaxed) == 0 {
                continue;
            }
            let mut marked = summary.swap(0, Ordering::AcqRel);
            while marked != 0 {
                let word = base + u64::from(marked.trailing_zeros());
                marked &= marked - 1;
                report(word, self.words[word as usize].swap(0, Ordering::AcqRel));
            }
        }
    }
}

fn zeros(len: usize) -> Vec<AtomicU64> {
    std::iter::repeat_with(AtomicU64::default).take(len).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry::dirty::Accumulator;
    use pageferry::memory::Region;
    use std::collections::BTreeSet;

    fn layout() -> Layout {
        Layout::new(vec![
            Region::ram("low", 0, 70 * 4096),
            Region::ram("none", 0x4000_0000, 0),
            Region::ram("high", 0x1_0000_0000, 130 * 4096),
        ])
        .unwrap()
    }

    fn drained(writes: &HostWrites) -> Vec<u64> {
        let mut accumulator = Accumulator::new(layout());
        writes.drain(&mut accumulator);
        accumulator.dirty().iter().map(|page| page.0).collect()
    }

    #[test]
    fn every_page_that_a_write_touches_is_reported_once() {
        let writes = HostWrites::new(&layout());
        writes.mark(4095, 2);
        writes.mark(63 * 4096, 4096 + 1);
        writes.mark(0x1_0000_0000 + 129 * 4096, 1);
        assert_eq!(drained(&writes), [0, 1, 63, 64, 128 + 129]);
        assert_eq!(drained(&writes), []);
    }

    #[test]
    fn what_lies_in_no_region_is_ignored_and_ends_are_exact() {
        let writes = HostWrites::new(&layout());
        writes.mark(70 * 4096, 0x1000_0000);
        writes.mark(0x8000, 0);
        writes.mark(u64::MAX - 1, 1000);
        assert_eq!(drained(&writes), []);
        writes.mark(0, u64::MAX);
        assert_eq!(drained(&writes).len(), 70 + 130);
    }

    #[test]
    fn clearing_forgets_earlier_marks_only() {
        let writes = HostWrites::new(&layout());
        writes.mark(0, 4096);
        writes.clear();
        writes.mark(8192, 4096);
        assert_eq!(drained(&writes), [2]);
    }

    #[test]
    fn marks_that_race_with_harvests_are_never_lost() {
        let writes = HostWrites::new(&layout());
        let mut seen = BTreeSet::new();
        std::thread::scope(|scope| {
            let marker = scope.spawn(|| (0..70).for_each(|page| writes.mark(page * 4096, 1)));
            while !marker.is_finished() {
                seen.extend(drained(&writes));
            }
        });
        seen.extend(drained(&writes));
        assert!(seen.into_iter().eq(0..70));
    }
}
