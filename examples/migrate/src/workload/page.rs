//! One page: a private one to compose content in, and a live one that others look at meanwhile.
//!
//! A live page may be read by a migration while it is written here, so it is only ever touched by
//! volatile accesses through a raw pointer; no Rust reference to it exists.
#![allow(unsafe_code)]

/// Bytes in a page.
pub(crate) const PAGE_BYTES: usize = 4096;
/// 64-bit words in a page.
pub(crate) const PAGE_WORDS: usize = PAGE_BYTES / 8;

/// A private page, as little-endian words.
#[derive(Clone, Debug, PartialEq, Eq)]
#[repr(align(64))]
pub(crate) struct Page(pub(crate) [u64; PAGE_WORDS]);

impl Page {
    /// A page of zeros.
    pub(crate) const ZERO: Self = Self([0; PAGE_WORDS]);
}

/// The first word that is not what it must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mismatch {
    /// Where the word starts, in bytes from the start of the page.
    pub(crate) offset: usize,
    /// What it must hold.
    pub(crate) expected: u64,
    /// What it holds.
    pub(crate) found: u64,
}

/// A page of guest memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LivePage(*mut u64);

impl LivePage {
    /// The page that starts at `at`.
    ///
    /// # Safety
    ///
    /// `at` must be 8-byte aligned and readable and writable for a page for as long as the value is used.
    pub(crate) const unsafe fn new(at: *mut u8) -> Self {
        Self(at.cast())
    }

    /// Writes the whole page.
    pub(crate) fn store(self, page: &Page) {
        self.store_words(0, &page.0);
    }

    /// Writes some words, the first of them at word number `first`.
    pub(crate) fn store_words(self, first: usize, words: &[u64]) {
        assert!(first + words.len() <= PAGE_WORDS);
        for (index, &word) in words.iter().enumerate() {
            // SAFETY: inside the page (asserted above) that `new`'s caller vouched for.
            unsafe { self.0.add(first + index).write_volatile(word) };
        }
    }

    /// Compares the whole page with what it must hold.
    pub(crate) fn compare(self, page: &Page) -> Result<(), Mismatch> {
        for (index, &expected) in page.0.iter().enumerate() {
            // SAFETY: `index` is below PAGE_WORDS; `new`'s caller vouched for the page.
            let found = unsafe { self.0.add(index).read_volatile() };
            if found != expected {
                return Err(Mismatch { offset: index * 8, expected, found });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn live(page: &mut Page) -> LivePage {
        // SAFETY: the page outlives its use in each test and is a page long.
        unsafe { LivePage::new(page.0.as_mut_ptr().cast()) }
    }

    #[test]
    fn a_stored_page_compares_equal() {
        let mut memory = Page::ZERO;
        let mut content = Page::ZERO;
        content.0[17] = 5;
        live(&mut memory).store(&content);
        assert_eq!(live(&mut memory).compare(&content), Ok(()));
    }

    #[test]
    fn the_first_wrong_word_is_named() {
        let mut memory = Page::ZERO;
        live(&mut memory).store_words(100, &[7, 8]);
        let wrong = live(&mut memory).compare(&Page::ZERO);
        assert_eq!(wrong, Err(Mismatch { offset: 800, expected: 0, found: 7 }));
    }
}
