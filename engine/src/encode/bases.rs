//! The pages as last sent, as far as they may be needed as bases of deltas: a cache with a cap.
//!
//! A page is worth its room if it will be written again. Nobody knows that in advance, so new pages
//! replace old ones that have not been written since they were sent; a page that has been stays until
//! it was sent again, and if all are like that, a new one is not taken in: a working set larger than
//! the cache gets deltas for a part of it rather than for nothing.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::digest::PageHash;
use crate::units::{PAGE_SIZE, PageNumber};

/// Pages that share a lock; neighbours do, so that a batch takes few of them.
const STRETCH: u64 = 128;

/// Locks.
const SHARDS: u64 = 32;

/// Places in which a page may lie.
const WAYS: usize = 8;

/// Pages per allocation.
const BLOCK: usize = 32;

type Page = [u8; PAGE_SIZE];

/// Pages as last sent.
#[derive(Debug)]
pub struct Bases {
    shards: Vec<Mutex<Shard>>,
    sets: u64,
    /// Whether a page was ever taken in: until then nobody needs to look.
    used: AtomicBool,
}

#[derive(Debug, Default)]
struct Shard {
    entries: Vec<Entry>,
    blocks: Vec<Box<[Page]>>,
    used: u32,
    /// Counts what is stored: the order in which pages were sent.
    clock: u64,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    page: PageNumber,
    hash: PageHash,
    /// Where its bytes are; `NOWHERE` if it was never used.
    place: u32,
    /// The clock when it was last sent.
    sent: u64,
    /// Written since it was sent.
    again: bool,
}

const NOWHERE: u32 = u32::MAX;

impl Default for Entry {
    fn default() -> Self {
        Self { page: PageNumber(u64::MAX), hash: PageHash::ZERO, place: NOWHERE, sent: 0, again: false }
    }
}

impl Bases {
    /// A cache of at most so many bytes of pages; 0 for none. Memory is taken as pages come.
    pub fn new(bytes: u64) -> Self {
        let sets = bytes / PAGE_SIZE as u64 / (SHARDS * WAYS as u64);
        Self { shards: (0..SHARDS).map(|_| Mutex::default()).collect(), sets, used: AtomicBool::new(false) }
    }

    /// The part of the cache in which a page and its neighbours lie; `None` if there is nothing to find
    /// there, and nothing is to be taken in either.
    pub(super) fn near(&self, page: PageNumber, takes_in: bool) -> Option<Near<'_>> {
        if !takes_in && !self.used.load(Ordering::Relaxed) {
            return None;
        }
        let stretch = page.0 / STRETCH;
        let shard = self.shards.get((stretch % SHARDS) as usize).filter(|_| self.sets > 0)?;
        let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
        if shard.entries.is_empty() {
            shard.entries.resize(self.sets as usize * WAYS, Entry::default());
            self.used.store(true, Ordering::Relaxed);
        }
        Some(Near { shard, stretch, sets: self.sets })
    }

    /// Hears which pages are dirty: `dirty` is asked about every page in the cache.
    pub fn note_dirty(&self, dirty: impl Fn(PageNumber) -> bool) {
        for shard in &self.shards {
            let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            for entry in shard.entries.iter_mut().filter(|entry| entry.place != NOWHERE && !entry.again) {
                entry.again = dirty(entry.page);
            }
        }
    }

    /// Bytes taken.
    pub fn bytes(&self) -> u64 {
        let pages = |shard: &Mutex<Shard>| shard.lock().unwrap_or_else(PoisonError::into_inner).used;
        self.shards.iter().map(|shard| u64::from(pages(shard)) * PAGE_SIZE as u64).sum()
    }
}

/// A locked part of the cache.
pub(super) struct Near<'a> {
    shard: MutexGuard<'a, Shard>,
    stretch: u64,
    sets: u64,
}

impl Near<'_> {
    /// Whether the page belongs to this part.
    pub(super) fn covers(&self, page: PageNumber) -> bool {
        page.0 / STRETCH == self.stretch
    }

    /// The page as last sent, if it is here and was that.
    pub(super) fn base(&mut self, page: PageNumber, sent: PageHash) -> Option<&mut Page> {
        let set = self.set(page);
        let entry = self.shard.entries[set].iter().find(|entry| entry.page == page && entry.hash == sent)?;
        let place = entry.place;
        self.shard.bytes(place)
    }

    /// Remembers a page that is sent now; if it is `new` here it may take another's room.
    pub(super) fn store(&mut self, page: PageNumber, hash: PageHash, bytes: &Page, new: bool) {
        let set = self.set(page);
        let shard = &mut *self.shard;
        let entries = &mut shard.entries[set];
        let way = match entries.iter().position(|entry| entry.page == page) {
            Some(way) => way,
            None if new => {
                let stays = |entry: &Entry| entry.place != NOWHERE && entry.again;
                let Some(way) = (0..WAYS).filter(|&way| !stays(&entries[way])).min_by_key(|&way| {
                    let entry = &entries[way];
                    if entry.place == NOWHERE { (0, 0) } else { (1, entry.sent) }
                }) else {
                    return;
                };
                way
            }
            None => return,
        };
        let entry = &mut entries[way];
        if entry.place == NOWHERE {
            entry.place = shard.used;
            if (shard.used as usize).is_multiple_of(BLOCK) {
                shard.blocks.push(vec![[0; PAGE_SIZE]; BLOCK].into_boxed_slice());
            }
            shard.used += 1;
        }
        shard.clock += 1;
        (entry.page, entry.hash, entry.sent, entry.again) = (page, hash, shard.clock, false);
        let place = entry.place;
        if let Some(base) = shard.bytes(place) {
            base.copy_from_slice(bytes);
        }
    }

    /// A page that was written, and is not sent as a literal or a delta, no longer needs to stay. Unless it
    /// `goes_on` to be what was sent, it is of no use as a base: its room is taken first.
    pub(super) fn settle(&mut self, page: PageNumber, goes_on: bool) {
        let set = self.set(page);
        if let Some(entry) = self.shard.entries[set].iter_mut().find(|entry| entry.page == page) {
            entry.again = false;
            entry.sent = if goes_on { entry.sent } else { 0 };
        }
    }

    fn set(&self, page: PageNumber) -> std::ops::Range<usize> {
        let index = page.0 / (STRETCH * SHARDS) * STRETCH + page.0 % STRETCH;
        let first = (index % self.sets) as usize * WAYS;
        first..first + WAYS
    }
}

impl Shard {
    fn bytes(&mut self, place: u32) -> Option<&mut Page> {
        self.blocks.get_mut(place as usize / BLOCK)?.get_mut(place as usize % BLOCK)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store(bases: &Bases, page: u64) {
        let bytes = [page as u8; PAGE_SIZE];
        bases.near(PageNumber(page), true).unwrap().store(PageNumber(page), PageHash(page.into()), &bytes, true);
    }

    fn holds(bases: &Bases, page: u64) -> bool {
        let mut near = bases.near(PageNumber(page), true).unwrap();
        let base = near.base(PageNumber(page), PageHash(page.into()));
        base.is_some_and(|base| *base == [page as u8; PAGE_SIZE])
    }

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_working_set_as_large_as_the_cache_stays_whole() {
        let bases = Bases::new(64 * MIB);
        for page in 0..64 * 256 {
            store(&bases, page + 5000);
        }
        assert_eq!((0..64 * 256).filter(|&page| holds(&bases, page + 5000)).count(), 64 * 256);
        assert_eq!(bases.bytes(), 64 * MIB);
    }

    #[test]
    fn pages_written_again_stay_and_others_make_room() {
        let bases = Bases::new(16 * MIB);
        for page in 0..16 * 256 {
            store(&bases, page);
        }
        let again = |page: PageNumber| page.0.is_multiple_of(4);
        bases.note_dirty(again);
        for page in 100_000..100_000 + 64 * 256 {
            store(&bases, page);
        }
        let kept = (0..16 * 256).filter(|&page| holds(&bases, page)).count();
        assert_eq!(kept, 4 * 256, "exactly those written again");
        assert!((100_000..100_000 + 64 * 256).filter(|&page| holds(&bases, page)).count() == 12 * 256);
        assert_eq!(bases.bytes(), 16 * MIB);
    }

    #[test]
    fn of_pages_not_written_again_the_ones_sent_last_stay() {
        let bases = Bases::new(16 * MIB);
        for page in 0..64 * 256 {
            store(&bases, page);
        }
        assert!((0..48 * 256).all(|page| !holds(&bases, page)));
        assert!((48 * 256..64 * 256).all(|page| holds(&bases, page)));
    }

    #[test]
    fn a_base_is_given_only_for_the_content_that_was_sent() {
        let bases = Bases::new(MIB * 4);
        store(&bases, 9);
        let mut near = bases.near(PageNumber(9), true).unwrap();
        assert!(near.base(PageNumber(9), PageHash(10)).is_none());
        near.store(PageNumber(9), PageHash(10), &[1; PAGE_SIZE], false);
        assert!(near.base(PageNumber(9), PageHash(9)).is_none());
        assert_eq!(near.base(PageNumber(9), PageHash(10)), Some(&mut [1; PAGE_SIZE]));
        near.store(PageNumber(10), PageHash(10), &[1; PAGE_SIZE], false);
        assert!(near.base(PageNumber(10), PageHash(10)).is_none(), "not taken in unasked");
    }

    #[test]
    fn a_page_that_was_looked_at_and_not_sent_makes_room_again() {
        for goes_on in [false, true] {
            let bases = Bases::new(MIB);
            for page in 0..128 * 256 {
                store(&bases, page);
            }
            bases.note_dirty(|_| true);
            for page in 0..128 * 256 {
                bases.near(PageNumber(page), true).unwrap().settle(PageNumber(page), goes_on);
            }
            for page in 1_000_000..1_000_000 + 128 * 256 {
                store(&bases, page);
            }
            let kept = (1_000_000..1_000_000 + 128 * 256).filter(|&page| holds(&bases, page)).count();
            assert_eq!(kept, 256);
        }
    }

    #[test]
    fn a_cache_without_bound_holds_the_whole_guest_and_no_more() {
        let table = std::sync::Arc::new(crate::digest::HashTable::new(5000));
        let config = crate::EncodeConfig { delta_cache: u64::MAX, ..crate::EncodeConfig::default() };
        let bases = crate::encode::Shared::new(table, 5000, &config).bases;
        for page in 0..5000 {
            store(&bases, page);
        }
        assert!((0..5000).all(|page| holds(&bases, page)));
        assert!(bases.sets * SHARDS * WAYS as u64 <= crate::limits::HASH_CHUNK_PAGES);
    }

    #[test]
    fn a_cache_of_nothing_holds_nothing() {
        assert!(Bases::new(0).near(PageNumber(1), true).is_none());
        assert!(Bases::new(MIB - 1).near(PageNumber(1), true).is_none(), "less than a set in every shard");
    }
}
