//! Tracking of writes where the kernel does not keep a record of them: each first write to a protected page is a fault, which a
//! thread of this program books before it lets the write happen.
//!
//! **No write is missed.** Each page has two bits, *written* and *open*, and each stretch of pages a lock. Under it holds: a page
//! that is not open is protected, and a page that was opened since it was last harvested is written. The handler makes a page
//! open and written before it takes the protection off; re-arming protects a page before it makes it not open; harvesting
//! takes the written bits only. Each of the three does all of that under the lock, since otherwise a handler that has booked a page
//! could open it after it was harvested and re-armed. So take any write. The page was open then, by a fault whose booking came first.
//! Either a later harvest reports that booking, or an earlier one did and the page was not re-armed before the write: then the
//! engine still has the page to send, re-arms it, and reads it after that (R2), when the kernel has flushed the TLBs of all CPUs.
//!
//! **Memory is mapped twice.** The vCPUs' mapping is the one that is tracked. The engine and the kernel on its behalf read
//! through another, so an RDMA device that pins pages (before Linux 6.2 as if it were to write them) finds none protected, and books
//! none. Both mappings show the same pages of a memfd: nothing is ever copied on write, pinned or not. That is why private
//! memory is not tracked here. (Soft-dirty bits, the older interface, cannot be read and cleared in one step while the guest runs.)

use std::io::{PipeReader, PipeWriter, pipe};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;

use pageferry::dirty::DirtySink;
use pageferry::memory::RegionId;
use pageferry::units::PAGE_SIZE;

use super::pagemap::TrackingError;
use super::userfault::{Features, Userfault};

const PAGE_BYTES: u64 = PAGE_SIZE as u64;

/// Words of a stretch of pages: a lock for 2 MiB of memory.
const WORDS: usize = 8;

const STRETCH_PAGES: u64 = WORDS as u64 * 64;

/// Tracks writes to shared mappings of this process.
#[derive(Debug)]
pub(super) struct FaultTracker {
    tracked: Arc<Tracked>,
    handler: Option<JoinHandle<()>>,
    /// Dropped to end the handler.
    end: Option<PipeWriter>,
}

/// What the handler and the engine share.
#[derive(Debug)]
struct Tracked {
    userfault: Userfault,
    regions: Vec<TrackedRegion>,
    /// Why the handler has ended by itself.
    failure: OnceLock<Arc<TrackingError>>,
}

#[derive(Debug)]
struct TrackedRegion {
    region: RegionId,
    bytes: Range<u64>,
    stretches: Vec<Mutex<Stretch>>,
}

/// Bits of neighbouring pages.
#[derive(Debug, Default)]
struct Stretch {
    written: [u64; WORDS],
    open: [u64; WORDS],
}

impl FaultTracker {
    /// Starts tracking regions that are mapped at these addresses. Every write that happens after the return is found by
    /// [`harvest`](Self::harvest).
    pub(super) fn start(regions: Vec<(RegionId, Range<u64>)>) -> Result<Self, TrackingError> {
        let userfault = Userfault::open().map_err(TrackingError::Userfaultfd)?;
        userfault.enable(&[Features::WP_HUGETLBFS_SHMEM]).map_err(TrackingError::WriteFaults)?;
        let regions = regions.into_iter().map(|(region, bytes)| TrackedRegion::new(region, bytes)).collect();
        let tracked = Arc::new(Tracked { userfault, regions, failure: OnceLock::new() });
        let (ended, end) = pipe().map_err(TrackingError::Thread)?;
        let handling = Arc::clone(&tracked);
        let builder = std::thread::Builder::new().name("write faults".to_owned());
        let handler = builder.spawn(move || handling.handle(&ended)).map_err(TrackingError::Thread)?;
        let tracker = Self { tracked, handler: Some(handler), end: Some(end) };
        for TrackedRegion { bytes, .. } in &tracker.tracked.regions {
            let userfault = &tracker.tracked.userfault;
            userfault.register(bytes).map_err(|error| TrackingError::at("register", bytes, error))?;
            userfault.protect(bytes).map_err(|error| TrackingError::at("write-protect", bytes, error))?;
        }
        Ok(tracker)
    }

    /// Reports the pages written since they were last reported. They stay open to writes.
    pub(super) fn harvest(&self, sink: &mut dyn DirtySink) -> Result<(), TrackingError> {
        for region in &self.tracked.regions {
            for (first, stretch) in (0..).step_by(STRETCH_PAGES as usize).zip(&region.stretches) {
                let written = std::mem::take(&mut lock(stretch).written);
                if written != [0; WORDS] {
                    sink.mark_words(region.region, first, &written);
                }
            }
        }
        self.tracked.check()
    }

    /// Protects the pages of a bitmap that begins with this page, a multiple of 64: from now on writes to them are booked.
    pub(super) fn rearm(&self, region: RegionId, first_page: u64, words: &[u64]) -> Result<(), TrackingError> {
        let Some(region) = self.tracked.regions.iter().find(|tracked| tracked.region == region) else {
            return Ok(());
        };
        let mut words = words;
        let mut first_word = (first_page / 64) as usize;
        while !words.is_empty() {
            let (stretch, at) = (first_word / WORDS, first_word % WORDS);
            let (here, rest) = words.split_at(words.len().min(WORDS - at));
            let mut wanted = [0; WORDS];
            wanted[at..at + here.len()].copy_from_slice(here);
            self.tracked.close(region, stretch, wanted)?;
            (words, first_word) = (rest, first_word + here.len());
        }
        Ok(())
    }

    /// Ends tracking; writes cost nothing any more.
    pub(super) fn stop(mut self) -> Result<(), TrackingError> {
        self.tracked.release()?;
        self.end();
        self.tracked.check()
    }

    fn end(&mut self) {
        self.end = None;
        if let Some(handler) = self.handler.take() {
            // It cannot panic in a way that matters here: tracking is over.
            let _ = handler.join();
        }
    }
}

impl Drop for FaultTracker {
    fn drop(&mut self) {
        // What is still protected the kernel lets go of with the last descriptor, which is ours once the handler has ended.
        self.end();
    }
}

impl TrackedRegion {
    fn new(region: RegionId, bytes: Range<u64>) -> Self {
        let stretches = (bytes.end - bytes.start).div_ceil(STRETCH_PAGES * PAGE_BYTES);
        Self { region, bytes, stretches: (0..stretches).map(|_| Mutex::default()).collect() }
    }

    /// The addresses of pages of a stretch.
    fn addresses(&self, stretch: usize, pages: &Range<u64>) -> Range<u64> {
        let address = |page: u64| self.bytes.start + (stretch as u64 * STRETCH_PAGES + page) * PAGE_BYTES;
        address(pages.start)..address(pages.end)
    }
}

/// Faults that nobody answers any more: nothing may be protected.
struct Deserted<'a>(&'a Tracked);

impl Drop for Deserted<'_> {
    fn drop(&mut self) {
        self.0.failure.get_or_init(|| Arc::new(TrackingError::Faults(std::io::Error::other("their handler ended"))));
        let _ = self.0.release();
    }
}

impl Tracked {
    /// The handler's work: books faults and opens their pages, until the other end of the pipe is closed.
    fn handle(&self, end: &PipeReader) {
        // Also if it unwinds: vCPUs that nobody answers would wait for ever.
        let guard = Deserted(self);
        match self.handle_faults(end) {
            Ok(()) => std::mem::forget(guard),
            Err(failure) => drop(self.failure.set(Arc::new(failure))),
        }
    }

    fn handle_faults(&self, end: &PipeReader) -> Result<(), TrackingError> {
        while !self.userfault.wait(end).map_err(TrackingError::Faults)? {
            let mut outcome = Ok(());
            let mut book = |address| {
                if let Err(error) = self.open(address) {
                    outcome = Err(error);
                }
            };
            self.userfault.faults(&mut book).map_err(TrackingError::Faults)?;
            outcome?;
        }
        Ok(())
    }

    /// Books the page at an address as written, and lets it be written.
    fn open(&self, address: u64) -> Result<(), TrackingError> {
        let Some(region) = self.regions.iter().find(|region| region.bytes.contains(&address)) else {
            return Ok(());
        };
        let page = (address - region.bytes.start) / PAGE_BYTES;
        let (number, within) = ((page / STRETCH_PAGES) as usize, page % STRETCH_PAGES);
        let (word, bit) = ((within / 64) as usize, 1 << (within % 64));
        let mut stretch = lock(&region.stretches[number]);
        stretch.written[word] |= bit;
        stretch.open[word] |= bit;
        let bytes = region.addresses(number, &(within..within + 1));
        match self.userfault.open_to_writes(&bytes) {
            // It was released meanwhile, and whoever waited for it with it.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            done => done.map_err(|error| TrackingError::at("open to writes", &bytes, error)),
        }
    }

    /// Protects those of the wanted pages of a stretch that are open.
    fn close(&self, region: &TrackedRegion, number: usize, wanted: [u64; WORDS]) -> Result<(), TrackingError> {
        let Some(stretch) = region.stretches.get(number) else { return Ok(()) };
        let mut stretch = lock(stretch);
        let mut closing = wanted;
        for (bits, open) in closing.iter_mut().zip(stretch.open) {
            *bits &= open;
        }
        for pages in runs(&closing) {
            let bytes = region.addresses(number, &pages);
            self.userfault.protect(&bytes).map_err(|error| TrackingError::at("write-protect", &bytes, error))?;
        }
        for (open, closed) in stretch.open.iter_mut().zip(closing) {
            *open &= !closed;
        }
        Ok(())
    }

    fn release(&self) -> Result<(), TrackingError> {
        let released = self.regions.iter().map(|TrackedRegion { bytes, .. }| {
            self.userfault.unregister(bytes).map_err(|error| TrackingError::at("release", bytes, error))
        });
        released.collect::<Vec<_>>().into_iter().collect()
    }

    fn check(&self) -> Result<(), TrackingError> {
        self.failure.get().map_or(Ok(()), |failure| Err(TrackingError::Over(Arc::clone(failure))))
    }
}

/// Runs of set bits, in order.
fn runs(words: &[u64; WORDS]) -> impl Iterator<Item = Range<u64>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let start = next(words, at, false)?;
        at = next(words, start, true).unwrap_or(STRETCH_PAGES);
        Some(start..at)
    })
}

/// The next set bit from one on, or the next clear one.
fn next(words: &[u64; WORDS], from: u64, clear: bool) -> Option<u64> {
    let mut at = from;
    while let Some(&word) = words.get((at / 64) as usize) {
        let rest = (if clear { !word } else { word }) >> (at % 64);
        if rest != 0 {
            return Some(at + u64::from(rest.trailing_zeros()));
        }
        at = (at / 64 + 1) * 64;
    }
    None
}

fn lock(stretch: &Mutex<Stretch>) -> MutexGuard<'_, Stretch> {
    stretch.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_the_set_bits() {
        let mut state = 9u64;
        for round in 0..200 {
            let words: [u64; WORDS] = std::array::from_fn(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                match (state >> 33) % 4 {
                    0 => 0,
                    1 => !0,
                    2 => state & (state >> 7),
                    _ => state | (state << 9),
                }
            });
            let set = |page: &u64| words[(page / 64) as usize] >> (page % 64) & 1 == 1;
            let expected: Vec<u64> = (0..STRETCH_PAGES).filter(set).collect();
            let found: Vec<_> = runs(&words).collect();
            assert_eq!(found.iter().cloned().flatten().collect::<Vec<_>>(), expected, "round {round}");
            assert!(found.windows(2).all(|pair| pair[0].end < pair[1].start), "round {round}: {found:?}");
        }
        assert!(runs(&[!0; WORDS]).eq(std::iter::once(0..STRETCH_PAGES)));
    }
}
