//! The process guest's [`DirtySource`]: the writes to a mapping of this process, as the kernel sees them.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use pageferry::dirty::{DirtySink, DirtySource, Point};
use pageferry::memory::{GuestMemory, Layout, MappedMemory, NotShareable, RegionId};
use pageferry::units::PAGE_SIZE;
use pageferry::vm::VmResult;

use super::faults::FaultTracker;
use super::pagemap::{TrackingError, WriteTracker};
use super::populated::{Populated, TrackedMemory};

/// Who keeps the record of the pages written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Tracking {
    /// The kernel (Linux 6.7).
    Kernel,
    /// This program, by the faults that first writes are (Linux 5.19). Needs memory behind a memfd.
    Faults,
}

impl Tracking {
    /// The kernel's record where it keeps one, which costs the guest less.
    pub(crate) fn of_this_host() -> Self {
        match WriteTracker::new() {
            Err(TrackingError::WriteProtect(_)) => Self::Faults,
            // Where there is no userfaultfd at all, `start` says so.
            _ => Self::Kernel,
        }
    }
}

/// Tracks the writes to memory that is mapped in this process.
pub(crate) struct ProcessTracker {
    /// As the vCPUs write it.
    memory: Arc<dyn GuestMemory>,
    /// As the engine reads it.
    view: Arc<dyn GuestMemory>,
    tracking: Tracking,
    active: Option<Active>,
    populated: Arc<Populated>,
}

#[derive(Debug)]
enum Active {
    Kernel(WriteTracker),
    Faults(FaultTracker),
}

impl std::fmt::Debug for ProcessTracker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ProcessTracker").field("active", &self.active).finish_non_exhaustive()
    }
}

impl ProcessTracker {
    /// A tracker that is not tracking yet.
    pub(crate) fn new(memory: Arc<dyn GuestMemory>, tracking: Tracking) -> Result<Self, TrackingError> {
        let view = match tracking {
            Tracking::Kernel => Arc::clone(&memory),
            Tracking::Faults => Arc::new(mapped_again(&*memory)?),
        };
        Ok(Self { memory, view, tracking, active: None, populated: Arc::default() })
    }

    /// The same memory, which tells its touched pages while they are tracked.
    pub(super) fn memory(&self) -> Arc<dyn GuestMemory> {
        Arc::new(TrackedMemory { memory: Arc::clone(&self.view), populated: Arc::clone(&self.populated) })
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

    fn start_with_kernel(&self) -> Result<WriteTracker, TrackingError> {
        let tracker = WriteTracker::new()?;
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
        Ok(tracker)
    }
}

/// Another mapping of the same memory.
fn mapped_again(memory: &dyn GuestMemory) -> Result<MappedMemory, TrackingError> {
    let filled = memory.layout().iter().filter(|(_, region)| region.len > 0);
    let files = filled.map(|(id, region)| {
        let file = memory.file(id).ok_or_else(|| TrackingError::NotShared(region.name.clone()))?;
        let host = |source| NotShareable::Host { name: region.name.clone(), source };
        Ok::<_, TrackingError>(File::from(file.try_clone_to_owned().map_err(host)?))
    });
    Ok(MappedMemory::from_files(memory.layout().clone(), files.collect::<Result<_, _>>()?)?)
}

impl DirtySource for ProcessTracker {
    fn start(&mut self, _layout: &Layout) -> VmResult<()> {
        self.populated.forget();
        self.active = Some(match self.tracking {
            Tracking::Kernel => Active::Kernel(self.start_with_kernel()?),
            // The memfd itself knows its touched pages.
            Tracking::Faults => Active::Faults(FaultTracker::start(self.windows())?),
        });
        Ok(())
    }

    fn harvest(&mut self, _point: Point, sink: &mut dyn DirtySink) -> VmResult<()> {
        match self.active.as_ref().ok_or("the process guest's writes are not tracked")? {
            Active::Kernel(tracker) => {
                for (region, bytes) in self.windows() {
                    tracker.harvest(&bytes, |found| sink.mark_range(region, pages_in(&bytes, &found)))?;
                }
            }
            Active::Faults(tracker) => tracker.harvest(sink)?,
        }
        Ok(())
    }

    fn rearm(&mut self, region: RegionId, first_page: u64, words: &[u64]) -> VmResult<()> {
        match &self.active {
            Some(Active::Faults(tracker)) => Ok(tracker.rearm(region, first_page, words)?),
            // Armed again by the harvest.
            _ => Ok(()),
        }
    }

    fn stop(&mut self) -> VmResult<()> {
        self.populated.forget();
        match self.active.take() {
            Some(Active::Kernel(tracker)) => {
                let released: Vec<Result<(), TrackingError>> =
                    self.windows().iter().map(|(_, bytes)| tracker.release(bytes)).collect();
                Ok(released.into_iter().collect::<Result<_, _>>()?)
            }
            Some(Active::Faults(tracker)) => Ok(tracker.stop()?),
            None => Ok(()),
        }
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

    /// Every way to track every kind of memory that it is for.
    const WAYS: [(Tracking, Backing); 3] = [
        (Tracking::Kernel, Backing::Anonymous),
        (Tracking::Kernel, Backing::Memfd),
        (Tracking::Faults, Backing::Memfd),
    ];

    #[derive(Default)]
    struct Seen(BTreeSet<(u32, u64)>);

    impl DirtySink for Seen {
        fn mark_words(&mut self, region: RegionId, first_page: u64, words: &[u64]) {
            let set = |page: &u64| words[(page / 64) as usize] >> (page % 64) & 1 == 1;
            self.0.extend((0..64 * words.len() as u64).filter(set).map(|page| (region.0, first_page + page)));
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
    fn started(memory: &Arc<MappedMemory>, tracking: Tracking) -> Option<ProcessTracker> {
        let mut tracker = ProcessTracker::new(Arc::clone(memory) as Arc<dyn GuestMemory>, tracking).unwrap();
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
        for &(region, page) in &seen.0 {
            rearm(tracker, region, page);
        }
        seen.0
    }

    fn rearm(tracker: &mut ProcessTracker, region: u32, page: u64) {
        tracker.rearm(RegionId(region), page / 64 * 64, &[1 << (page % 64)]).unwrap();
    }

    #[test]
    fn exactly_the_pages_written_since_the_last_harvest_are_reported() {
        for (tracking, backing) in WAYS {
            let memory = memory(backing);
            // Some pages exist before tracking starts, some do not.
            for page in 0..PAGES / 2 {
                write(&memory, 0, page, 1);
            }
            let Some(mut tracker) = started(&memory, tracking) else { continue };
            assert_eq!(harvest(&mut tracker), BTreeSet::new(), "{tracking:?} {backing:?}");
            let truth: BTreeSet<_> =
                (0..PAGES).step_by(3).flat_map(|page| [(0, page), (2, PAGES - 1 - page)]).collect();
            for &(region, page) in &truth {
                write(&memory, region, page, 2);
            }
            assert_eq!(harvest(&mut tracker), truth, "{tracking:?} {backing:?}");
            assert_eq!(harvest(&mut tracker), BTreeSet::new(), "{tracking:?} {backing:?}");
            write(&memory, 2, 5, 3);
            assert_eq!(harvest(&mut tracker), BTreeSet::from([(2, 5)]), "{tracking:?} {backing:?}");
        }
    }

    fn populated(tracker: &ProcessTracker, region: u32) -> BTreeSet<u64> {
        tracker.memory().populated(RegionId(region)).unwrap().into_iter().flatten().collect()
    }

    #[test]
    fn pages_that_were_never_touched_are_not_populated_however_they_are_tracked() {
        for (tracking, backing) in WAYS {
            let memory = memory(backing);
            write(&memory, 0, 7, 1);
            let Some(mut tracker) = started(&memory, tracking) else { continue };
            // One write may have brought a huge page.
            let touched = populated(&tracker, 0);
            assert!(touched.contains(&7) && touched.len() < PAGES as usize, "{tracking:?} {backing:?}");
            assert_eq!(populated(&tracker, 2), BTreeSet::new(), "{tracking:?} {backing:?}");
            write(&memory, 2, 9, 1);
            assert_eq!(harvest(&mut tracker), BTreeSet::from([(2, 9)]), "{tracking:?} {backing:?}");
        }
    }

    #[test]
    fn no_page_that_is_first_touched_while_tracking_starts_escapes() {
        for (round, (tracking, backing)) in (0..20).flat_map(|round| WAYS.map(|way| (round, way))) {
            let memory = memory(backing);
            let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
            let seen = std::thread::scope(|scope| {
                scope.spawn(|| write_randomly(&memory, 1, &stop, &written));
                let tracker = started(&memory, tracking);
                // As the engine does it: right after the start, while the guest runs.
                let touched = tracker.as_ref().map(|tracker| populated(tracker, 0));
                stop.store(true, Ordering::Relaxed);
                tracker.zip(touched)
            });
            let Some((mut tracker, mut known)) = seen else { continue };
            known.extend(harvest(&mut tracker).into_iter().map(|(_, page)| page));
            let holds_something = |page: &u64| content(&*memory, *page) != [0; 8];
            let missed: Vec<u64> = (0..PAGES).filter(holds_something).filter(|page| !known.contains(page)).collect();
            assert_eq!(missed, Vec::<u64>::new(), "{tracking:?} {backing:?}, round {round}");
        }
    }

    #[test]
    fn reading_a_page_does_not_make_it_dirty() {
        for (tracking, backing) in WAYS {
            let memory = memory(backing);
            let Some(mut tracker) = started(&memory, tracking) else { continue };
            let mut page = [0; 4096];
            for number in 0..PAGES {
                memory.read(RegionId(0), number * 4096, &mut page).unwrap();
                tracker.memory().read(RegionId(2), number * 4096, &mut page).unwrap();
            }
            assert_eq!(harvest(&mut tracker), BTreeSet::new(), "{tracking:?} {backing:?}");
            // Nor does it hide the write that follows.
            write(&memory, 0, 3, 1);
            write(&memory, 2, 4, 1);
            assert_eq!(harvest(&mut tracker), BTreeSet::from([(0, 3), (2, 4)]), "{tracking:?} {backing:?}");
        }
    }

    /// A copy that follows the reports, as the engine makes it; a missed write leaves it stale for good.
    struct Copy {
        pages: Vec<[u8; 8]>,
        /// Reported, and not copied since.
        dirty: BTreeSet<u64>,
    }

    impl Copy {
        fn harvest(&mut self, tracker: &mut ProcessTracker) {
            let mut seen = Seen::default();
            tracker.harvest(Point::Running, &mut seen).unwrap();
            self.dirty.extend(seen.0.into_iter().map(|(_, page)| page));
        }

        /// Copies some of the dirty pages; all of them if it is one in 1.
        fn take(&mut self, tracker: &mut ProcessTracker, one_in: u64) {
            let taken: Vec<u64> = self.dirty.iter().copied().filter(|page| page % one_in == 0).collect();
            for chunk in taken.chunk_by(|page, next| page / 64 == next / 64) {
                let word = chunk.iter().fold(0, |word, page| word | 1 << (page % 64));
                tracker.rearm(RegionId(0), chunk[0] / 64 * 64, &[word]).unwrap();
                for &page in chunk {
                    self.pages[page as usize] = content(&*tracker.memory(), page);
                    self.dirty.remove(&page);
                }
            }
        }
    }

    #[test]
    fn no_write_of_concurrent_writers_escapes() {
        for (tracking, backing) in WAYS {
            let memory = memory(backing);
            let Some(mut tracker) = started(&memory, tracking) else { continue };
            let mut copy = Copy { pages: vec![[0; 8]; PAGES as usize], dirty: BTreeSet::new() };
            let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
            std::thread::scope(|scope| {
                for writer in 0..4 {
                    let (memory, stop, written) = (&memory, &stop, &written);
                    scope.spawn(move || write_randomly(memory, writer, stop, written));
                }
                let mut round = 0;
                while written.load(Ordering::Relaxed) < 400_000 {
                    copy.harvest(&mut tracker);
                    copy.take(&mut tracker, 1 + round % 3);
                    round += 1;
                }
                stop.store(true, Ordering::Relaxed);
            });
            copy.harvest(&mut tracker);
            copy.take(&mut tracker, 1);
            for (page, held) in copy.pages.iter().enumerate() {
                assert_eq!(held, &content(&*memory, page as u64), "{tracking:?} {backing:?}: page {page}");
            }
        }
    }

    fn content(memory: &dyn GuestMemory, page: u64) -> [u8; 8] {
        let mut content = [0; 8];
        memory.read(RegionId(0), page * 4096, &mut content).unwrap();
        content
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

    #[test]
    fn a_stopped_tracker_can_start_again() {
        for (tracking, backing) in WAYS {
            let memory = memory(backing);
            let Some(mut tracker) = started(&memory, tracking) else { continue };
            write(&memory, 0, 1, 1);
            tracker.stop().unwrap();
            assert!(tracker.harvest(Point::Running, &mut Seen::default()).is_err());
            write(&memory, 0, 3, 1);
            tracker.start(memory.layout()).unwrap();
            write(&memory, 0, 2, 1);
            assert_eq!(harvest(&mut tracker), BTreeSet::from([(0, 2)]), "{tracking:?} {backing:?}");
        }
    }

    #[test]
    fn writers_go_on_when_tracking_ends_under_them() {
        for (number, (tracking, backing)) in (0..10).flat_map(|number| WAYS.map(|way| (number, way))) {
            let memory = memory(backing);
            let Some(mut tracker) = started(&memory, tracking) else { continue };
            let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
            std::thread::scope(|scope| {
                let more = || {
                    let before = written.load(Ordering::Relaxed);
                    while written.load(Ordering::Relaxed) < before + 2000 {
                        std::thread::yield_now();
                    }
                };
                scope.spawn(|| write_randomly(&memory, 1, &stop, &written));
                more();
                if number % 2 == 0 {
                    tracker.stop().unwrap();
                }
                drop(tracker);
                more();
                stop.store(true, Ordering::Relaxed);
            });
        }
    }

    #[test]
    fn memory_that_is_not_shared_cannot_be_tracked_by_faults() {
        let error = ProcessTracker::new(memory(Backing::Anonymous), Tracking::Faults).unwrap_err().to_string();
        assert!(error.contains("\"low\"") && error.contains("--backing"), "{error}");
    }
}
