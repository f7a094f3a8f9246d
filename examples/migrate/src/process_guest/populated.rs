//! Which pages of a process guest were ever touched: only those need to be sent.
//!
//! The tracker protects untouched pages too, by a marker in the page table that the kernel shows as a swapped-out page.
//! So the memory itself cannot tell them apart any more once tracking has started; what is kept here can.
#![allow(unsafe_code)]

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pageferry::memory::{GuestMemory, Layout, MemoryError, RegionId, Window};

/// The touched pages of each region as found when tracking started; empty while nothing is tracked.
#[derive(Debug, Default)]
pub(super) struct Populated(Mutex<Vec<(RegionId, Vec<Range<u64>>)>>);

impl Populated {
    /// Keeps ranges of pages, in any order and overlapping, for a region.
    pub(super) fn keep(&self, region: RegionId, pages: Vec<Range<u64>>) {
        self.lock().push((region, merged(pages)));
    }

    pub(super) fn forget(&self) {
        self.lock().clear();
    }

    fn of(&self, region: RegionId) -> Option<Vec<Range<u64>>> {
        self.lock().iter().find(|(known, _)| *known == region).map(|(_, pages)| pages.clone())
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(RegionId, Vec<Range<u64>>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The same pages as ascending ranges that do not touch.
fn merged(mut pages: Vec<Range<u64>>) -> Vec<Range<u64>> {
    pages.sort_unstable_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::with_capacity(pages.len());
    for range in pages {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

/// Guest memory that knows its touched pages from the tracker.
pub(super) struct TrackedMemory {
    pub(super) memory: Arc<dyn GuestMemory>,
    pub(super) populated: Arc<Populated>,
}

// SAFETY: every window is the inner memory's, which lives as long as `self`.
unsafe impl GuestMemory for TrackedMemory {
    fn layout(&self) -> &Layout {
        self.memory.layout()
    }

    fn window(&self, region: RegionId) -> Option<Window> {
        self.memory.window(region)
    }

    fn file(&self, region: RegionId) -> Option<BorrowedFd<'_>> {
        self.memory.file(region)
    }

    fn populated(&self, region: RegionId) -> Option<Vec<Range<u64>>> {
        self.populated.of(region).or_else(|| self.memory.populated(region))
    }

    fn discard(&self, region: RegionId, pages: Range<u64>) -> Result<(), MemoryError> {
        self.memory.discard(region, pages)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_merged_in_order() {
        assert_eq!(merged(vec![7..9, 0..2, 1..3, 3..4, 20..21, 8..9]), [0..4, 7..9, 20..21]);
    }
}
