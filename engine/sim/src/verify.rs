//! The full verification, done by the book: every page that may hold something is read and hashed.

use std::time::Duration;

use pageferry::digest::{Digest, PageHash, PageHasher};
use pageferry::encode::populated_runs;
use pageferry::memory::{GuestMemory, is_zero_portable};
use pageferry::units::PAGE_SIZE;

use crate::guest::{SharedGuest, lock};

/// How long it takes.
pub(crate) fn time(guest: &SharedGuest) -> Duration {
    Duration::from_micros(5) + Duration::from_nanos(300) * lock(guest).layout.page_space() as u32
}

/// The digest of a memory as it is.
pub(crate) fn digest(memory: &dyn GuestMemory, hasher: &PageHasher) -> Digest {
    let mut digest = Digest::default();
    let mut buffer = [0; PAGE_SIZE];
    for run in populated_runs(memory, u64::MAX) {
        let Some((region, first)) = memory.layout().locate_run(run) else { continue };
        for (index, page) in (first..).zip(run.pages()) {
            let read = memory.read(region, index * PAGE_SIZE as u64, &mut buffer).is_ok();
            if read && !is_zero_portable(&buffer) {
                digest.replace(page, PageHash::ZERO, hasher.hash(&buffer));
            }
        }
    }
    digest
}
