//! The seams that the engine calls, over the simulated guest: its memory (whose pages can be torn
//! while they are read) and its dirty tracker with the two behaviours that KVM has.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use pageferry::dirty::{DirtySink, DirtySource, Point};
use pageferry::memory::{GuestMemory, Layout, MappedMemory, MemoryError, RegionId, Transfer, Window};
use pageferry::units::PAGE_SIZE;
use pageferry::vm::VmResult;

use crate::fault::Call;
use crate::guest::{Guest, SharedGuest, lock};
use crate::scenario::Report;

/// Guest memory without a window: every page is read in two halves, and the guest may write between.
pub(crate) struct TearingMemory {
    inner: Arc<MappedMemory>,
    guest: SharedGuest,
    knows_populated: bool,
    interruption: Interruption,
}

impl TearingMemory {
    pub(crate) fn new(inner: Arc<MappedMemory>, guest: SharedGuest, knows_populated: bool) -> Self {
        Self { inner, guest, knows_populated, interruption: Interruption::default() }
    }

    /// What may come between the reading of two pages.
    pub(crate) fn interruption(&self) -> Interruption {
        self.interruption.clone()
    }
}

/// Something that another thread does while one reads memory.
#[derive(Clone, Default)]
pub(crate) struct Interruption(Arc<Mutex<Option<Pending>>>);

struct Pending {
    reads_before: u64,
    work: Box<dyn FnOnce() + Send>,
}

impl Interruption {
    /// Has `work` done in the middle of the reads that follow.
    pub(crate) fn begin(&self, reads_before: u64, work: impl FnOnce() + Send + 'static) {
        *self.pending() = Some(Pending { reads_before, work: Box::new(work) });
    }

    /// The reads are over.
    pub(crate) fn end(&self) {
        *self.pending() = None;
    }

    fn on_read(&self) {
        let mut pending = self.pending();
        match &mut *pending {
            Some(Pending { reads_before: left @ 1.., .. }) => *left -= 1,
            due => {
                let due = due.take();
                // It reads, too.
                drop(pending);
                if let Some(due) = due {
                    (due.work)();
                }
            }
        }
    }

    fn pending(&self) -> std::sync::MutexGuard<'_, Option<Pending>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

// SAFETY: no window is ever given out, so there is no address to keep mapped.
#[allow(unsafe_code)]
unsafe impl GuestMemory for TearingMemory {
    fn layout(&self) -> &Layout {
        self.inner.layout()
    }

    fn window(&self, _region: RegionId) -> Option<Window> {
        None
    }

    fn read(&self, region: RegionId, offset: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        let half = into.len() / 2;
        let (first, second) = into.split_at_mut(half);
        self.inner.read(region, offset, first)?;
        lock(&self.guest).write_amid(region, offset / PAGE_SIZE as u64);
        self.inner.read(region, offset + half as u64, second)?;
        self.interruption.on_read();
        Ok(())
    }

    fn write(&self, region: RegionId, offset: u64, from: &[u8]) -> Result<(), MemoryError> {
        self.inner.write(region, offset, from)
    }

    fn populated(&self, region: RegionId) -> Option<Vec<Range<u64>>> {
        if self.knows_populated { self.inner.populated(region) } else { None }
    }
}

/// Tracks writes as KVM does.
///
/// With manual protection a harvest reports and forgets nothing; arming a page again forgets it. A
/// plain log forgets and arms in the harvest.
pub(crate) struct Tracker(pub(crate) SharedGuest);

impl DirtySource for Tracker {
    fn start(&mut self, _layout: &Layout) -> VmResult<()> {
        let mut guest = lock(&self.0);
        guest.attempt(Call::StartTracking)?;
        let initial = if guest.tracking.initially_set { !0 } else { 0 };
        guest.log.words.fill(initial);
        guest.log.given_back.clear();
        guest.log.on = true;
        Ok(())
    }

    fn harvest(&mut self, point: Point, sink: &mut dyn DirtySink) -> VmResult<()> {
        let mut guest = lock(&self.0);
        guest.attempt(Call::Harvest)?;
        lose_a_bit(&mut guest, point);
        let report = guest.tracking.report;
        for (region, described) in guest.layout.clone().iter() {
            let pages = guest.layout.pages_of(region);
            let first = (pages.first.0 / 64) as usize;
            let words = &guest.log.words[first..first + pages.count.div_ceil(64) as usize];
            match report {
                Report::Words => sink.mark_words(region, 0, words),
                Report::Ranges => each_page(words, |page| sink.mark_range(region, page..page + 1)),
                Report::Addresses => each_page(words, |page| {
                    let address = described.guest_address + page * PAGE_SIZE as u64;
                    if page < pages.count {
                        sink.mark_gpa(address + 7, 1);
                    }
                }),
            }
        }
        if !guest.tracking.manual {
            guest.log.words.fill(0);
        }
        for (region, pages) in std::mem::take(&mut guest.log.given_back) {
            sink.mark_zeroed(region, pages);
        }
        Ok(())
    }

    fn rearm(&mut self, region: RegionId, first_page: u64, words: &[u64]) -> VmResult<()> {
        let mut guest = lock(&self.0);
        guest.attempt(Call::Rearm)?;
        let pages = guest.layout.pages_of(region);
        let stray = |word: usize, bits: u64| {
            (0..64).any(|bit| bits >> bit & 1 == 1 && first_page + word as u64 * 64 + bit >= pages.count)
        };
        if !first_page.is_multiple_of(64) || words.iter().enumerate().any(|(word, bits)| stray(word, *bits)) {
            guest.violate(format!("pages outside {region} are armed, from {first_page}"));
            return Ok(());
        }
        if guest.tracking.manual {
            let first = ((pages.first.0 + first_page) / 64) as usize;
            for (word, bits) in guest.log.words[first..].iter_mut().zip(words) {
                *word &= !bits;
            }
        }
        Ok(())
    }

    fn stop(&mut self) -> VmResult<()> {
        lock(&self.0).log.on = false;
        Ok(())
    }
}

/// The canary: of what was written last, one page is never reported.
fn lose_a_bit(guest: &mut Guest, point: Point) {
    if !guest.tracking.loses_a_bit || point == Point::Running {
        return;
    }
    for (region, _) in guest.layout.clone().iter().filter(|(_, region)| region.transfer == Transfer::Copy) {
        let pages = guest.layout.pages_of(region);
        let first = (pages.first.0 / 64) as usize;
        let last = first + pages.count.div_ceil(64) as usize;
        if let Some(word) = guest.log.words[first..last].iter_mut().find(|word| **word != 0) {
            *word &= *word - 1;
            guest.tracking.loses_a_bit = false;
            return;
        }
    }
}

fn each_page(words: &[u64], mut visit: impl FnMut(u64)) {
    for (word, &bits) in (0..).zip(words) {
        for bit in (0..64).filter(|bit| bits >> bit & 1 == 1) {
            visit(word * 64 + bit);
        }
    }
}
