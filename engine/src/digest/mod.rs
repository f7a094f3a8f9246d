//! The proof that both sides hold the same memory (R8).
//!
//! Every page has a keyed 128-bit content hash ([`PageHasher`], with a key made fresh for the migration,
//! R7); zero pages count as 0. The digest is the sum of all pages' hashes, each mixed with its page
//! number: replacing a page is one subtraction and one addition, in any order, on any thread.

mod hasher;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use std::fmt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::limits::HASH_CHUNK_PAGES;
use crate::units::PageNumber;

pub use hasher::PageHasher;

/// The random secret of a migration; the destination learns it from the source.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct DigestKey(pub [u8; 32]);

impl fmt::Debug for DigestKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DigestKey(..)")
    }
}

/// Sum of mixed page hashes. Equal digests under an unpredictable key mean equal memory.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Digest(pub u128);

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl Digest {
    /// The digest of two disjoint parts together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self(self.0.wrapping_add(other.0))
    }

    /// Replaces a page's hash by another.
    pub fn replace(&mut self, page: PageNumber, old: PageHash, new: PageHash) {
        self.0 = self.0.wrapping_sub(old.term(page)).wrapping_add(new.term(page));
    }
}

/// A page's keyed content hash; zero pages have [`PageHash::ZERO`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PageHash(pub u128);

impl PageHash {
    /// The hash of a page of zeros, by definition.
    pub const ZERO: Self = Self(0);

    /// What the page adds to the digest: depends on the content and on where it lies, so that two
    /// pages that changed places do not cancel out.
    fn term(self, page: PageNumber) -> u128 {
        if self == Self::ZERO {
            return 0;
        }
        let place = page.0.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let low = finalise(self.0 as u64 ^ place);
        let high = finalise((self.0 >> 64) as u64 ^ place.rotate_left(32) ^ low);
        u128::from(high) << 64 | u128::from(low)
    }
}

/// The 64-bit finaliser of MurmurHash3: every input bit reaches every output bit.
fn finalise(mut x: u64) -> u64 {
    x = (x ^ (x >> 33)).wrapping_mul(0xFF51_AFD7_ED55_8CCD);
    x = (x ^ (x >> 33)).wrapping_mul(0xC4CE_B9FE_1A85_EC53);
    x ^ (x >> 33)
}

/// The hash of every page as last sent or placed: 16 bytes a page, taken in chunks as pages appear.
///
/// Threads may update different pages at the same time; the protocol never has one page in two
/// batches of a round, so no page is updated by two threads at once.
#[derive(Debug)]
pub struct HashTable {
    chunks: Vec<OnceLock<Box<[AtomicU64]>>>,
}

impl HashTable {
    /// All pages zero.
    pub fn new(page_space: u64) -> Self {
        let count = page_space.div_ceil(HASH_CHUNK_PAGES) as usize;
        Self { chunks: (0..count).map(|_| OnceLock::new()).collect() }
    }

    /// Pages that the table has room for.
    pub(crate) fn page_space(&self) -> u64 {
        self.chunks.len() as u64 * HASH_CHUNK_PAGES
    }

    /// A page's hash.
    pub fn load(&self, page: PageNumber) -> PageHash {
        let Some(chunk) = self.chunk(page).and_then(OnceLock::get) else {
            return PageHash::ZERO;
        };
        let at = slot(page);
        PageHash(join(chunk[at].load(Ordering::Relaxed), chunk[at + 1].load(Ordering::Relaxed)))
    }

    /// Puts a page's hash in place and returns the one before. Pages past the end are ignored.
    pub fn swap(&self, page: PageNumber, new: PageHash) -> PageHash {
        let Some(cell) = self.chunk(page) else {
            return PageHash::ZERO;
        };
        if new == PageHash::ZERO && cell.get().is_none() {
            return PageHash::ZERO;
        }
        let chunk = cell.get_or_init(|| (0..HASH_CHUNK_PAGES * 2).map(|_| AtomicU64::new(0)).collect());
        let at = slot(page);
        let old = join(chunk[at].load(Ordering::Relaxed), chunk[at + 1].load(Ordering::Relaxed));
        chunk[at].store(new.0 as u64, Ordering::Relaxed);
        chunk[at + 1].store((new.0 >> 64) as u64, Ordering::Relaxed);
        PageHash(old)
    }

    fn chunk(&self, page: PageNumber) -> Option<&OnceLock<Box<[AtomicU64]>>> {
        self.chunks.get((page.0 / HASH_CHUNK_PAGES) as usize)
    }
}

fn slot(page: PageNumber) -> usize {
    (page.0 % HASH_CHUNK_PAGES) as usize * 2
}

fn join(low: u64, high: u64) -> u128 {
    u128::from(high) << 64 | u128::from(low)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::PAGE_SIZE;

    fn page(fill: u8) -> [u8; PAGE_SIZE] {
        [fill; PAGE_SIZE]
    }

    #[test]
    fn replacing_pages_in_any_order_gives_the_digest_of_the_final_memory() {
        let hasher = PageHasher::new(&DigestKey([7; 32]));
        let table = HashTable::new(100);
        let mut digest = Digest::default();
        for (number, fill) in [(1, 1), (2, 2), (1, 3), (70, 1), (2, 0)] {
            let new = if fill == 0 { PageHash::ZERO } else { hasher.hash(&page(fill)) };
            let old = table.swap(PageNumber(number), new);
            digest.replace(PageNumber(number), old, new);
        }
        let mut expected = Digest::default();
        expected.replace(PageNumber(70), PageHash::ZERO, hasher.hash(&page(1)));
        expected.replace(PageNumber(1), PageHash::ZERO, hasher.hash(&page(3)));
        assert_eq!(digest, expected);
        assert_ne!(digest, Digest::default());
    }

    #[test]
    fn exchanged_pages_and_other_keys_change_the_digest() {
        let sum = |key: u8, first: u8, second: u8| {
            let hasher = PageHasher::new(&DigestKey([key; 32]));
            let mut digest = Digest::default();
            digest.replace(PageNumber(0), PageHash::ZERO, hasher.hash(&page(first)));
            digest.replace(PageNumber(1 << 32), PageHash::ZERO, hasher.hash(&page(second)));
            digest
        };
        assert_eq!(sum(1, 5, 6), sum(1, 5, 6));
        assert_ne!(sum(1, 5, 6), sum(1, 6, 5));
        assert_ne!(sum(1, 5, 6), sum(2, 5, 6));
    }

    #[test]
    fn the_table_takes_no_memory_for_zero_pages() {
        let table = HashTable::new(1 << 30);
        assert_eq!(table.swap(PageNumber(1 << 29), PageHash::ZERO), PageHash::ZERO);
        assert!(table.chunks.iter().all(|chunk| chunk.get().is_none()));
        assert_eq!(table.swap(PageNumber(u64::MAX), PageHash(5)), PageHash::ZERO);
    }
}
