//! A set of pages: one bit each, with a summary above so that empty stretches cost nothing.

use crate::units::{PAGES_PER_WORD, PageNumber, PageRun};

/// Pages of a page space, as a bitmap of two levels: a word per 64 pages, and a summary bit per
/// word. Memory is one bit a page, taken only where bits were ever set.
#[derive(Debug, Clone, Default)]
pub struct PageBitmap {
    words: Vec<u64>,
    /// Bit `w % 64` of `summary[w / 64]` is set when `words[w]` is not zero.
    summary: Vec<u64>,
    count: u64,
}

impl PageBitmap {
    /// An empty set over pages `0..page_space`.
    pub fn new(page_space: u64) -> Self {
        let words = page_space.div_ceil(PAGES_PER_WORD) as usize;
        Self { words: vec![0; words], summary: vec![0; words.div_ceil(64)], count: 0 }
    }

    /// Pages that the set could hold, rounded up to whole words.
    pub fn page_space(&self) -> u64 {
        self.words.len() as u64 * PAGES_PER_WORD
    }

    /// Pages in the set.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Whether the set is empty.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether a page is in the set.
    pub fn contains(&self, page: PageNumber) -> bool {
        let word = (page.0 / PAGES_PER_WORD) as usize;
        self.words.get(word).is_some_and(|bits| bits >> (page.0 % PAGES_PER_WORD) & 1 == 1)
    }

    /// The bits of word number `word`; none past the end.
    pub fn word(&self, word: u64) -> u64 {
        self.words.get(word as usize).copied().unwrap_or_default()
    }

    /// Adds the pages whose bits are set in `bits`, of word number `word`. Words past the end are ignored.
    pub fn insert_word(&mut self, word: u64, bits: u64) {
        let index = word as usize;
        if bits == 0 || index >= self.words.len() {
            return;
        }
        self.count += u64::from((bits & !self.words[index]).count_ones());
        self.words[index] |= bits;
        self.summary[index / 64] |= 1 << (index % 64);
    }

    /// Takes the pages whose bits are set in `bits` out of word number `word`.
    pub fn remove_word(&mut self, word: u64, bits: u64) {
        let index = word as usize;
        if index >= self.words.len() {
            return;
        }
        self.count -= u64::from((bits & self.words[index]).count_ones());
        self.words[index] &= !bits;
        if self.words[index] == 0 {
            self.summary[index / 64] &= !(1 << (index % 64));
        }
    }

    /// Adds a run of pages.
    pub fn insert_run(&mut self, run: PageRun) {
        for_each_word(run, |word, bits| self.insert_word(word, bits));
    }

    /// Takes a run of pages out.
    pub fn remove_run(&mut self, run: PageRun) {
        for_each_word(run, |word, bits| self.remove_word(word, bits));
    }

    /// Adds all pages of another set over the same space.
    pub fn insert_all(&mut self, other: &Self) {
        let mut at = 0;
        while let Some((word, bits)) = other.next_word(at) {
            self.insert_word(word, bits);
            at = word + 1;
        }
    }

    /// Empties the set.
    pub fn clear(&mut self) {
        let mut at = 0;
        while let Some((word, _)) = self.next_word(at) {
            self.words[word as usize] = 0;
            at = word + 1;
        }
        self.summary.fill(0);
        self.count = 0;
    }

    /// The first word at or after number `from` that holds a page, and its bits.
    pub fn next_word(&self, from: u64) -> Option<(u64, u64)> {
        let from = from as usize;
        if from >= self.words.len() {
            return None;
        }
        let mut summary_index = from / 64;
        let mut bits = self.summary[summary_index] & (!0 << (from % 64));
        while bits == 0 {
            summary_index += 1;
            bits = *self.summary.get(summary_index)?;
        }
        let word = summary_index * 64 + bits.trailing_zeros() as usize;
        Some((word as u64, self.words[word]))
    }

    /// Every page of the set, in order.
    pub fn iter(&self) -> impl Iterator<Item = PageNumber> + '_ {
        let mut next = self.next_word(0);
        std::iter::from_fn(move || {
            let (word, bits) = next?;
            let page = PageNumber(word * PAGES_PER_WORD + u64::from(bits.trailing_zeros()));
            let rest = bits & (bits - 1);
            next = if rest == 0 { self.next_word(word + 1) } else { Some((word, rest)) };
            Some(page)
        })
    }
}

/// Splits a run of pages at word boundaries.
pub(super) fn for_each_word(run: PageRun, mut visit: impl FnMut(u64, u64)) {
    let mut page = run.first.0;
    let end = run.end();
    while page < end {
        let word = page / PAGES_PER_WORD;
        let word_end = ((word + 1) * PAGES_PER_WORD).min(end);
        let bits = !0u64 >> (PAGES_PER_WORD - (word_end - page)) << (page % PAGES_PER_WORD);
        visit(word, bits);
        page = word_end;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn run(first: u64, count: u64) -> PageRun {
        PageRun { first: PageNumber(first), count }
    }

    #[test]
    fn agrees_with_a_set_of_integers_under_random_runs() {
        let mut bitmap = PageBitmap::new(10_000);
        let mut oracle = BTreeSet::new();
        let mut state = 3u64;
        for step in 0..3000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(99);
            let first = (state >> 20) % 9_900;
            let count = 1 + (state >> 50) % 100;
            if step % 3 == 2 {
                bitmap.remove_run(run(first, count));
                oracle.retain(|page| !(first..first + count).contains(page));
            } else if step % 997 == 0 {
                bitmap.clear();
                oracle.clear();
            } else {
                bitmap.insert_run(run(first, count));
                oracle.extend(first..first + count);
            }
            assert_eq!(bitmap.count(), oracle.len() as u64);
        }
        assert!(!oracle.is_empty());
        assert!(bitmap.iter().map(|page| page.0).eq(oracle.iter().copied()));
        assert!(oracle.iter().all(|&page| bitmap.contains(PageNumber(page))));
    }

    #[test]
    fn words_past_the_end_and_empty_spaces_are_harmless() {
        let mut bitmap = PageBitmap::new(0);
        bitmap.insert_word(0, 1);
        bitmap.remove_word(5, 1);
        assert!(bitmap.is_empty() && bitmap.next_word(0).is_none());
        let mut bitmap = PageBitmap::new(64);
        bitmap.insert_run(run(0, 64));
        assert_eq!(bitmap.next_word(0), Some((0, !0)));
        assert_eq!(bitmap.next_word(1), None);
    }
}
