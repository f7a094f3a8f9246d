//! The guest that knows the truth: what every page of it must hold, who may run it, and what the two
//! VMs were told. The checks of ownership and content live here, where nothing can pass them by.

mod writes;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub(crate) use writes::Mix;

use pageferry::memory::{GuestMemory, Layout, MappedMemory, RegionId, Transfer};
use pageferry::units::PAGE_SIZE;
use pageferry::vm::VmResult;

use crate::fault::Call;
use crate::random::Random;
use crate::scenario::{Pattern, Tracking};

/// The guest's place at the source.
pub(crate) struct SourceSide {
    pub(crate) memory: Arc<MappedMemory>,
    pub(crate) runs: bool,
    /// The VMM holds the locks of the guest's disks.
    pub(crate) locks: bool,
    pub(crate) throttle: u8,
    /// The migration has ended with the guest here.
    pub(crate) owns: bool,
}

/// The guest's place at the destination.
#[allow(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
#[derive(Default)]
pub(crate) struct DestinationSide {
    pub(crate) memory: Option<Arc<MappedMemory>>,
    /// The guest's own counter, from the machine state.
    pub(crate) loaded: Option<u64>,
    pub(crate) committed: bool,
    pub(crate) runs: bool,
    pub(crate) aborted: bool,
    /// Its process was killed.
    pub(crate) dead: bool,
}

/// What tracks writes at the source, as KVM's dirty log does.
#[derive(Default)]
pub(crate) struct DirtyLog {
    pub(crate) on: bool,
    pub(crate) words: Vec<u64>,
    pub(crate) given_back: Vec<(RegionId, Range<u64>)>,
}

/// The guest.
pub(crate) struct Guest {
    pub(crate) layout: Layout,
    pub(crate) tracking: Tracking,
    pub(crate) source: SourceSide,
    pub(crate) destination: DestinationSide,
    /// The destination's memory, as far as the source may write into it.
    pub(crate) exposed: Option<Arc<MappedMemory>>,
    pub(crate) log: DirtyLog,
    /// Whether it ran when the migration began.
    pub(crate) ran: bool,
    /// Stands for the machine state: counts what the guest has done.
    pub(crate) counter: u64,
    pub(crate) commit_sent: bool,
    /// The first broken rule.
    pub(crate) violation: Option<String>,
    /// Of which page the next read is torn by a write.
    pub(crate) tearing: bool,
    pub(crate) failures: Vec<(Call, u32)>,
    pub(crate) calls: BTreeMap<Call, u32>,
    pub(crate) failed_calls: Vec<Call>,
    truth: Vec<Vec<u8>>,
    pattern: Pattern,
    random: Random,
}

/// A guest that both VMs, the tracker and the memory can reach.
pub(crate) type SharedGuest = Arc<Mutex<Guest>>;

pub(crate) fn lock(guest: &SharedGuest) -> MutexGuard<'_, Guest> {
    guest.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Guest {
    pub(crate) fn new(
        memory: Arc<MappedMemory>,
        ran: bool,
        pattern: Pattern,
        tracking: Tracking,
        failures: Vec<(Call, u32)>,
        random: Random,
    ) -> Self {
        let layout = memory.layout().clone();
        let truth = layout.regions().iter().map(|region| vec![0; region.len as usize]).collect();
        let words = vec![0; layout.page_space().div_ceil(64) as usize];
        Self {
            layout,
            tracking,
            source: SourceSide { memory, runs: ran, locks: true, throttle: 0, owns: true },
            destination: DestinationSide::default(),
            exposed: None,
            log: DirtyLog { words, ..DirtyLog::default() },
            ran,
            counter: 1,
            commit_sent: false,
            violation: None,
            tearing: false,
            failures,
            calls: BTreeMap::new(),
            failed_calls: Vec::new(),
            truth,
            pattern,
            random,
        }
    }

    pub(crate) fn violate(&mut self, what: impl Into<String>) {
        self.violation.get_or_insert_with(|| what.into());
    }

    /// Whether a call into a VM succeeds this time.
    pub(crate) fn attempt(&mut self, call: Call) -> VmResult<()> {
        let nth = self.calls.entry(call).or_default();
        *nth += 1;
        if self.failures.contains(&(call, *nth - 1)) {
            self.failed_calls.push(call);
            return Err(format!("{call:?} fails by plan").into());
        }
        Ok(())
    }

    // ---- what the guest does ----

    /// Fills memory before the first migration: some pages, the others were never touched.
    pub(crate) fn fill(&mut self, percent: u64) {
        for (region, described) in self.layout.clone().iter() {
            for page in 0..described.page_count() {
                if self.random.chance(percent) {
                    self.fill_page((region, page));
                }
            }
        }
    }

    /// One step of a running guest.
    pub(crate) fn step(&mut self) {
        if !self.is_running() || self.random.below(100) < u64::from(self.source.throttle) {
            return;
        }
        self.counter += 1;
        for _ in 0..self.pattern.writes {
            self.write_somewhere();
        }
    }

    pub(crate) fn is_running(&self) -> bool {
        self.source.runs || (self.destination.runs && !self.destination.dead)
    }

    /// Devices write while the guest stands still: saving the machine state may do so.
    pub(crate) fn write_as_device(&mut self, writes: u64) {
        for _ in 0..writes {
            self.write_somewhere();
        }
    }

    /// The page that is being read changes between the reading of its first and second half.
    pub(crate) fn write_amid(&mut self, region: RegionId, page: u64) {
        if self.source.runs && self.tearing && self.random.chance(30) {
            let mut bytes = [0; 32];
            self.random.fill(&mut bytes);
            self.counter += 1;
            self.write(region, page, PAGE_SIZE / 2 - 16, &bytes);
        }
    }

    fn write(&mut self, region: RegionId, page: u64, at: usize, bytes: &[u8]) {
        let offset = page * PAGE_SIZE as u64 + at as u64;
        let Some(memory) = self.memory() else { return };
        if let Err(error) = memory.write(region, offset, bytes) {
            return self.violate(format!("the simulator could not write guest memory: {error}"));
        }
        let start = offset as usize;
        self.truth[region.0 as usize][start..start + bytes.len()].copy_from_slice(bytes);
        self.mark(region, page);
    }

    fn give_back(&mut self, (region, page): (RegionId, u64)) {
        let Some(memory) = self.memory() else { return };
        if let Err(error) = memory.discard(region, page..page + 1) {
            return self.violate(format!("the simulator could not discard guest memory: {error}"));
        }
        let start = page as usize * PAGE_SIZE;
        self.truth[region.0 as usize][start..start + PAGE_SIZE].fill(0);
        if self.log.on && !self.destination.committed {
            self.log.given_back.push((region, page..page + 1));
        }
    }

    /// Where the guest lives now.
    fn memory(&self) -> Option<Arc<MappedMemory>> {
        if self.destination.committed { self.destination.memory.clone() } else { Some(Arc::clone(&self.source.memory)) }
    }

    fn mark(&mut self, region: RegionId, page: u64) {
        if self.log.on && !self.destination.committed {
            let page = self.layout.pages_of(region).first.0 + page;
            self.log.words[(page / 64) as usize] |= 1 << (page % 64);
        }
    }

    // ---- what the VMs are told, and the rules ----

    pub(crate) fn resume_source(&mut self) {
        if self.destination.committed {
            self.violate("two owners: the source resumes the guest that the destination has taken over");
        }
        if self.commit_sent && !self.destination.aborted {
            self.violate("the source resumes after Commit, and the destination has not let go of the guest");
        }
        if !self.source.locks {
            self.violate("the source resumes the guest without the locks that it released");
        }
        self.source.runs = true;
    }

    /// The destination is about to run the guest.
    pub(crate) fn commit_destination(&mut self) {
        if self.source.runs {
            self.violate("two owners: the destination starts the guest while it runs at the source");
        } else if self.source.owns {
            self.violate("two owners: the destination starts the guest that the source has kept");
        }
        if self.destination.aborted {
            self.violate("the destination starts the guest after it has let go of it");
        }
        if self.destination.committed {
            self.violate("the destination starts the guest twice");
        }
        if self.source.locks {
            self.violate("the destination starts the guest while the source holds its locks");
        }
        if self.destination.loaded != Some(self.counter) {
            let (found, expected) = (self.destination.loaded, self.counter);
            self.violate(format!("machine state differs: loaded {found:?}, expected {expected}"));
        }
        if let Some(memory) = self.destination.memory.clone() {
            self.compare(&memory, "at hand-over");
        } else {
            self.violate("the destination starts a guest without memory");
        }
        self.destination.committed = true;
        self.log.on = false;
    }

    pub(crate) fn abort_destination(&mut self) {
        if self.destination.committed {
            self.violate("no owner: the destination lets go of the guest that it has taken over");
        }
        self.destination.aborted = true;
        self.destination.memory = None;
    }

    /// Compares a memory with the truth, page by page.
    pub(crate) fn compare(&mut self, memory: &MappedMemory, when: &str) {
        for (region, described) in self.layout.clone().iter() {
            if described.transfer == Transfer::Copy
                && let Some(page) = self.first_difference(memory, region, described.page_count())
            {
                let first = self.layout.pages_of(region).first.0;
                self.violate(format!("memory differs {when}: page {page} of {region} (number {})", first + page));
            }
        }
    }

    fn first_difference(&self, memory: &MappedMemory, region: RegionId, pages: u64) -> Option<u64> {
        let truth = &self.truth[region.0 as usize];
        let populated = memory.populated(region).unwrap_or_else(|| std::iter::once(0..pages).collect());
        let mut buffer = [0; PAGE_SIZE];
        let mut ranges = populated.into_iter().peekable();
        (0..pages).find(|&page| {
            while ranges.next_if(|range| range.end <= page).is_some() {}
            let touched = ranges.peek().is_some_and(|range| range.contains(&page));
            let bytes = &truth[page as usize * PAGE_SIZE..][..PAGE_SIZE];
            buffer.fill(0);
            let read = !touched || memory.read(region, page * PAGE_SIZE as u64, &mut buffer).is_ok();
            !read || buffer != *bytes
        })
    }

    /// The migration is over; the guest is where it is, and can be migrated again from there.
    pub(crate) fn settle_down(&mut self) {
        if self.destination.committed {
            if let Some(memory) = self.destination.memory.take() {
                self.source.memory = memory;
            }
            self.source.runs = self.destination.runs;
        }
        self.source.locks = true;
        self.source.owns = true;
        self.source.throttle = 0;
        self.destination = DestinationSide::default();
        self.commit_sent = false;
        self.failures.clear();
        self.ran = self.source.runs;
    }
}
