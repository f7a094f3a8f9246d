//! The unit everything is counted in: the 4 KiB page, and its number.
//!
//! A migration numbers the pages of all regions in one space, so that a bitmap, a table or a wire
//! record needs one integer. [`crate::memory::Layout`] hands out the numbers and translates back.

use std::fmt;

/// Bytes in a page: the unit of tracking and of the wire, whatever backs the memory.
pub const PAGE_SIZE: usize = 4096;

/// Pages in one word of a dirty bitmap; regions start at a multiple of this in the page space, so
/// that a tracker's words can be merged without shifting.
pub const PAGES_PER_WORD: u64 = 64;

/// The number of a page in a migration's page space.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct PageNumber(pub u64);

impl fmt::Display for PageNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "page {:#x}", self.0)
    }
}

/// A run of consecutive pages.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PageRun {
    /// The first page of the run.
    pub first: PageNumber,
    /// How many pages; a run in use is never empty.
    pub count: u64,
}

impl PageRun {
    /// The page number after the last page.
    pub fn end(&self) -> u64 {
        self.first.0 + self.count
    }

    /// Every page number of the run, in order.
    pub fn pages(&self) -> impl Iterator<Item = PageNumber> + use<> {
        (self.first.0..self.end()).map(PageNumber)
    }
}
