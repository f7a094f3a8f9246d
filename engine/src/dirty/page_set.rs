//! A set of pages that threads change at the same time.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::units::{PAGES_PER_WORD, PageNumber};

/// Pages per lazily made chunk: 1 GiB of guest memory, 32 KiB of bits.
const CHUNK_PAGES: u64 = 1 << 18;

/// Pages of a page space; a bit each, in chunks that are made when first needed.
#[derive(Debug)]
pub struct PageSet {
    chunks: Vec<OnceLock<Box<[AtomicU64]>>>,
    /// Whether there ever was a page in it: until then nobody needs to look.
    used: AtomicBool,
}

impl PageSet {
    /// An empty set.
    pub fn new(page_space: u64) -> Self {
        let count = page_space.div_ceil(CHUNK_PAGES) as usize;
        Self { chunks: (0..count).map(|_| OnceLock::new()).collect(), used: AtomicBool::new(false) }
    }

    /// Whether a page is in the set.
    pub fn contains(&self, page: PageNumber) -> bool {
        self.used.load(Ordering::Relaxed)
            && self.word(page).is_some_and(|(word, bit)| word.load(Ordering::Relaxed) & bit != 0)
    }

    /// Adds a page; one past the end is ignored.
    pub fn insert(&self, page: PageNumber) {
        self.used.store(true, Ordering::Relaxed);
        if let Some(chunk) = self.chunks.get((page.0 / CHUNK_PAGES) as usize) {
            chunk.get_or_init(|| (0..CHUNK_PAGES / PAGES_PER_WORD).map(|_| AtomicU64::new(0)).collect());
        }
        if let Some((word, bit)) = self.word(page) {
            word.fetch_or(bit, Ordering::Relaxed);
        }
    }

    /// Takes a page out; says whether it was there.
    pub fn remove(&self, page: PageNumber) -> bool {
        let Some((word, bit)) = self.word(page).filter(|_| self.contains(page)) else { return false };
        word.fetch_and(!bit, Ordering::Relaxed) & bit != 0
    }

    fn word(&self, page: PageNumber) -> Option<(&AtomicU64, u64)> {
        let chunk = self.chunks.get((page.0 / CHUNK_PAGES) as usize)?.get()?;
        let at = page.0 % CHUNK_PAGES;
        Some((&chunk[(at / PAGES_PER_WORD) as usize], 1 << (at % PAGES_PER_WORD)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_come_and_go() {
        let set = PageSet::new(3 * CHUNK_PAGES);
        let pages = [0, 1, 63, 64, CHUNK_PAGES - 1, CHUNK_PAGES, 3 * CHUNK_PAGES - 1].map(PageNumber);
        assert!(pages.iter().all(|page| !set.contains(*page) && !set.remove(*page)));
        for page in pages {
            set.insert(page);
        }
        assert!(pages.iter().all(|page| set.contains(*page)));
        assert!(!set.contains(PageNumber(2)) && !set.contains(PageNumber(2 * CHUNK_PAGES)));
        assert!(set.remove(PageNumber(63)) && !set.remove(PageNumber(63)) && set.contains(PageNumber(64)));
        set.insert(PageNumber(u64::MAX));
        assert!(!set.contains(PageNumber(u64::MAX)));
    }

    #[test]
    fn an_empty_set_takes_no_memory() {
        let set = PageSet::new(1 << 30);
        assert!(!set.contains(PageNumber(1 << 29)) && set.chunks.iter().all(|chunk| chunk.get().is_none()));
    }
}
