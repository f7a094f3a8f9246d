//! Finding a page that the destination holds already, anywhere in the guest's memory.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::digest::PageHash;
use crate::limits::{DUPLICATE_SLOTS_PER_PAGE, MIN_DUPLICATE_SLOTS};
use crate::units::PageNumber;

/// Slots that one hash may use. A full bucket forgets a page; that costs a page sent twice, no more.
const BUCKET: usize = 8;

/// Buckets per lazily made chunk: 256 KiB.
const CHUNK_BUCKETS: usize = 1 << 12;

/// Bits of a page number plus one (`MAX_PAGES` is 2^36); the rest of a slot is the hash's tag.
const PAGE_BITS: u32 = 37;

/// Page numbers by content hash: a hint, never a proof. It may forget, and it may name a page that has
/// changed since; who uses it compares the full hashes.
#[derive(Debug)]
pub struct DuplicateIndex {
    chunks: Vec<OnceLock<Box<[Bucket]>>>,
    buckets: u64,
}

/// One cache line.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Bucket([AtomicU64; BUCKET]);

impl DuplicateIndex {
    /// An index for so many pages with content, 8 bytes a slot.
    pub fn new(pages: u64) -> Self {
        let slots = (pages * DUPLICATE_SLOTS_PER_PAGE).max(MIN_DUPLICATE_SLOTS);
        let chunks = slots.div_ceil((CHUNK_BUCKETS * BUCKET) as u64);
        Self { chunks: (0..chunks).map(|_| OnceLock::new()).collect(), buckets: chunks * CHUNK_BUCKETS as u64 }
    }

    /// A page that had this content once and for which `holds` says that it still has.
    pub fn find(&self, hash: PageHash, mut holds: impl FnMut(PageNumber) -> bool) -> Option<PageNumber> {
        let (chunk, bucket) = self.bucket(hash);
        let Bucket(slots) = self.chunks.get(chunk)?.get()?.get(bucket)?;
        slots.iter().find_map(|slot| {
            let value = slot.load(Ordering::Relaxed);
            let page = PageNumber((value & ((1 << PAGE_BITS) - 1)).checked_sub(1)?);
            (value >> PAGE_BITS == tag(hash) && holds(page)).then_some(page)
        })
    }

    /// Remembers that a page has this content.
    pub fn insert(&self, hash: PageHash, page: PageNumber) {
        let (chunk, bucket) = self.bucket(hash);
        let Some(cell) = self.chunks.get(chunk) else { return };
        let chunk = cell.get_or_init(|| (0..CHUNK_BUCKETS).map(|_| Bucket::default()).collect());
        let Some(Bucket(slots)) = chunk.get(bucket) else { return };
        let value = tag(hash) << PAGE_BITS | (page.0 + 1);
        for slot in slots {
            let found = slot.load(Ordering::Relaxed);
            if found == value {
                return;
            }
            if found == 0 {
                return slot.store(value, Ordering::Relaxed);
            }
        }
        slots[page.0 as usize % BUCKET].store(value, Ordering::Relaxed);
    }

    fn bucket(&self, hash: PageHash) -> (usize, usize) {
        let bucket = (u128::from(hash.0 as u64) * u128::from(self.buckets)) >> 64;
        (bucket as usize / CHUNK_BUCKETS, bucket as usize % CHUNK_BUCKETS)
    }
}

fn tag(hash: PageHash) -> u64 {
    (hash.0 >> (64 + PAGE_BITS)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(of: u64) -> PageHash {
        PageHash(
            u128::from(of.wrapping_mul(0x9E37_79B9_7F4A_7C15)) << 64
                | u128::from(of.wrapping_mul(0xD1B5_4A32_D192_ED03)),
        )
    }

    #[test]
    fn what_was_inserted_is_found_while_there_is_room() {
        let index = DuplicateIndex::new(20_000);
        for page in 0..20_000 {
            index.insert(hash(page), PageNumber(page + (1 << 35)));
        }
        let found = (0..20_000).filter(|&page| {
            index.find(hash(page), |_| true).is_some_and(|found| found == PageNumber(page + (1 << 35)))
        });
        assert!(found.count() > 19_900);
        assert_eq!(index.find(hash(20_001), |_| true), None);
    }

    #[test]
    fn a_full_index_forgets_and_page_zero_counts() {
        let index = DuplicateIndex::new(0);
        index.insert(hash(7), PageNumber(0));
        assert_eq!(index.find(hash(7), |_| true), Some(PageNumber(0)));
        assert_eq!(index.find(hash(7), |_| false), None);
        for page in 0..1_000_000 {
            index.insert(hash(page), PageNumber(page));
        }
        let found = (0..1_000_000u64).filter(|&page| index.find(hash(page), |_| true).is_some()).count();
        assert!(found as u64 <= MIN_DUPLICATE_SLOTS * 2, "{found}");
    }
}
