//! The process guest's [`DirtySource`]: the writes to a mapping of this process, as the kernel sees them.

use std::ops::Range;
use std::sync::Arc;

use pageferry::dirty::{DirtySink, DirtySource, Point};
use pageferry::memory::{GuestMemory, Layout, RegionId};
use pageferry::units::PAGE_SIZE;
use pageferry::vm::VmResult;

use super::pagemap::{TrackingError, WriteTracker};
use super::populated::{Populated, TrackedMemory};

/// Tracks the writes to memory that is mapped in this process.
pub(crate) struct ProcessTracker {
    memory: Arc<dyn GuestMemory>,
    active: Option<WriteTracker>,
    populated: Arc<Populated>,
}

impl std::fmt::Debug for ProcessTracker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ProcessTracker").field("active", &self.active).finish_non_exhaustive()
    }
}

impl ProcessTracker {
    /// A tracker that is not tracking yet.
    pub(crate) fn new(memory: Arc<dyn GuestMemory>) -> Self {
        Self { memory, active: None, populated: Arc::default() }
    }

    /// The same memory, which tells its touched pages while they are tracked.
    pub(super) fn memory(&self) -> Arc<dyn GuestMemory> {
        Arc::new(TrackedMemory { memory: Arc::clone(&self.memory), populated: Arc::clone(&self.populated) })
    }

    /// Every region that has pages, and the addresses it is mapped at.
    fn windows(&self) -> Vec<(RegionId, Range<u64>)> {
        let regions = self.memory.layout().iter().filter(|(_, region)| region.len > 0);
        let mapped = regions.filter_map(|(id, region)| {
            let start = self.memory.window(id)?.start.as_ptr() as u64;
            Some((id, start..start + region.len))
        });
        mapped.collect()
    }
}

impl DirtySource for ProcessTracker {
    fn start(&mut self, _layout: &Layout) -> VmResult<()> {
        let tracker = WriteTracker::new()?;
        self.populated.forget();
        // An error on the way drops the tracker, and the kernel forgets what was registered.
        for (region, bytes) in self.windows() {
            let before = self.memory.populated(region);
            tracker.track(&bytes)?;
            if let Some(mut pages) = before {
                // Pages that were touched between the first look and the protection: too young to be swapped out.
                tracker.present(&bytes, |found| pages.push(pages_in(&bytes, &found)))?;
                self.populated.keep(region, pages);
            }
        }
        self.active = Some(tracker);
        Ok(())
    }

    fn harvest(&mut self, _point: Point, sink: &mut dyn DirtySink) -> VmResult<()> {
        let tracker = self.active.as_ref().ok_or("the process guest's writes are not tracked")?;
        for (region, bytes) in self.windows() {
            tracker.harvest(&bytes, |found| sink.mark_range(region, pages_in(&bytes, &found)))?;
        }
        Ok(())
    }

    fn stop(&mut self) -> VmResult<()> {
        self.populated.forget();
        let Some(tracker) = self.active.take() else {
            return Ok(());
        };
        let released: Vec<Result<(), TrackingError>> =
            self.windows().iter().map(|(_, bytes)| tracker.release(bytes)).collect();
        Ok(released.into_iter().collect::<Result<_, _>>()?)
    }
}

/// Addresses as pages relative to the window they lie in.
fn pages_in(window: &Range<u64>, found: &Range<u64>) -> Range<u64> {
    let page = |address: u64| (address - window.start) / PAGE_SIZE as u64;
    page(found.start)..page(found.end)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    use pageferry::memory::{Backing, MappedMemory, Region};

    use super::*;

    const PAGES: u64 = 1024;

    #[derive(Default)]
    struct Seen(BTreeSet<(u32, u64)>);

    impl DirtySink for Seen {
        fn mark_words(&mut self, _: RegionId, _: u64, _: &[u64]) {
            unreachable!("this tracker reports ranges");
        }
        fn mark_range(&mut self, region: RegionId, pages: Range<u64>) {
            self.0.extend(pages.map(|page| (region.0, page)));
        }
        fn mark_gpa(&mut self, _: u64, _: u64) {}
        fn mark_zeroed(&mut self, _: RegionId, _: Range<u64>) {}
    }

    fn memory(backing: Backing) -> Arc<MappedMemory> {
        let regions = vec![
            Region::ram("low", 0, PAGES * 4096),
            Region::ram("none", 1 << 31, 0),
            Region::ram("high", 1 << 32, PAGES * 4096),
        ];
        Arc::new(MappedMemory::new(Layout::new(regions).unwrap(), backing).unwrap())
    }

    /// A tracker that has started, or `None` with the reason printed.
    fn started(memory: &Arc<MappedMemory>) -> Option<ProcessTracker> {
        let mut tracker = ProcessTracker::new(Arc::clone(memory) as Arc<dyn GuestMemory>);
        match tracker.start(memory.layout()) {
            Ok(()) => Some(tracker),
            Err(error) => {
                drop(std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("skipped: {error}\n")));
                None
            }
        }
    }

    fn write(memory: &MappedMemory, region: u32, page: u64, value: u8) {
        memory.write(RegionId(region), page * 4096 + page % 4096, &[value]).unwrap();
    }

    fn harvest(tracker: &mut ProcessTracker) -> BTreeSet<(u32, u64)> {
        let mut seen = Seen::default();
        tracker.harvest(Point::Running, &mut seen).unwrap();
        seen.0
    }

    #[test]
    fn exactly_the_pages_written_since_the_last_harvest_are_reported() {
        for backing in [Backing::Anonymous, Backing::Memfd] {
            let memory = memory(backing);
            // Some pages exist before tracking starts, some do not.
            for page in 0..PAGES / 2 {
                write(&memory, 0, page, 1);
            }
            let Some(mut tracker) = started(&memory) else { return };
            assert_eq!(harvest(&mut tracker), BTreeSet::new(), "{backing:?}");
            let truth: BTreeSet<_> =
                (0..PAGES).step_by(3).flat_map(|page| [(0, page), (2, PAGES - 1 - page)]).collect();
            for &(region, page) in &truth {
                write(&memory, region, page, 2);
            }
            assert_eq!(harvest(&mut tracker), truth, "{backing:?}");
            assert_eq!(harvest(&mut tracker), BTreeSet::new(), "{backing:?}");
            write(&memory, 2, 5, 3);
            assert_eq!(harvest(&mut tracker), BTreeSet::from([(2, 5)]), "{backing:?}");
        }
    }

    fn populated(tracker: &ProcessTracker, region: u32) -> BTreeSet<u64> {
        tracker.memory().populated(RegionId(region)).unwrap().into_iter().flatten().collect()
    }

    #[test]
    fn pages_that_were_never_touched_are_not_populated_however_they_are_tracked() {
        for backing in [Backing::Anonymous, Backing::Memfd] {
            let memory = memory(backing);
            write(&memory, 0, 7, 1);
            let Some(mut tracker) = started(&memory) else { return };
            // One write may have brought a huge page.
            let touched = populated(&tracker, 0);
            assert!(touched.contains(&7) && touched.len() < PAGES as usize, "{backing:?}");
            assert_eq!(populated(&tracker, 2), BTreeSet::new(), "{backing:?}");
            write(&memory, 2, 9, 1);
            assert_eq!(harvest(&mut tracker), BTreeSet::from([(2, 9)]), "{backing:?}");
        }
    }

    #[test]
    fn no_page_that_is_first_touched_while_tracking_starts_escapes() {
        for _ in 0..20 {
            let memory = memory(Backing::Anonymous);
            let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
            let seen = std::thread::scope(|scope| {
                scope.spawn(|| write_randomly(&memory, 1, &stop, &written));
                let tracker = started(&memory);
                stop.store(true, Ordering::Relaxed);
                tracker
            });
            let Some(mut tracker) = seen else { return };
            let mut known = populated(&tracker, 0);
            known.extend(harvest(&mut tracker).into_iter().map(|(_, page)| page));
            let holds_something = |page: &u64| {
                let mut now = [0; 8];
                memory.read(RegionId(0), page * 4096, &mut now).unwrap();
                now != [0; 8]
            };
            let missed: Vec<u64> = (0..PAGES).filter(holds_something).filter(|page| !known.contains(page)).collect();
            assert_eq!(missed, Vec::<u64>::new());
        }
    }

    #[test]
    fn reading_a_page_does_not_make_it_dirty() {
        let memory = memory(Backing::Anonymous);
        let Some(mut tracker) = started(&memory) else { return };
        let mut page = [0; 4096];
        for number in 0..PAGES {
            memory.read(RegionId(0), number * 4096, &mut page).unwrap();
        }
        assert_eq!(harvest(&mut tracker), BTreeSet::new());
    }

    #[test]
    fn no_write_of_concurrent_writers_escapes() {
        let memory = memory(Backing::Anonymous);
        let Some(mut tracker) = started(&memory) else { return };
        // What a copy that follows the reports holds; a missed write leaves it stale for good.
        let mut copy = vec![[0u8; 8]; PAGES as usize];
        let stop = AtomicBool::new(false);
        let written = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for writer in 0..4 {
                let (memory, stop, written) = (&memory, &stop, &written);
                scope.spawn(move || write_randomly(memory, writer, stop, written));
            }
            while written.load(Ordering::Relaxed) < 400_000 {
                follow(&memory, &mut tracker, &mut copy);
            }
            stop.store(true, Ordering::Relaxed);
        });
        follow(&memory, &mut tracker, &mut copy);
        for (page, held) in copy.iter().enumerate() {
            let mut now = [0; 8];
            memory.read(RegionId(0), page as u64 * 4096, &mut now).unwrap();
            assert_eq!(held, &now, "page {page}");
        }
    }

    fn write_randomly(memory: &MappedMemory, writer: u64, stop: &AtomicBool, written: &AtomicU64) {
        let mut state = writer + 1;
        while !stop.load(Ordering::Relaxed) {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let page = (state >> 40) % PAGES;
            memory.write(RegionId(0), page * 4096, &state.to_le_bytes()).unwrap();
            written.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn follow(memory: &MappedMemory, tracker: &mut ProcessTracker, copy: &mut [[u8; 8]]) {
        for (_, page) in harvest(tracker) {
            memory.read(RegionId(0), page * 4096, &mut copy[page as usize]).unwrap();
        }
    }

    #[test]
    fn a_stopped_tracker_can_start_again() {
        let memory = memory(Backing::Anonymous);
        let Some(mut tracker) = started(&memory) else { return };
        write(&memory, 0, 1, 1);
        tracker.stop().unwrap();
        assert!(tracker.harvest(Point::Running, &mut Seen::default()).is_err());
        tracker.start(memory.layout()).unwrap();
        write(&memory, 0, 2, 1);
        assert_eq!(harvest(&mut tracker), BTreeSet::from([(0, 2)]));
    }
}
