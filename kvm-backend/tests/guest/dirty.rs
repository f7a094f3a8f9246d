//! The dirty log: what the guest writes is reported, what it does not write is not, in every mode.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use pageferry::dirty::{Accumulator, DirtySource, Point};
use pageferry::memory::{Backing, GuestMemory, MappedMemory, RegionId};
use pageferry::units::{PageNumber, PageRun};
use pageferry_kvm::kvm_bindings::kvm_regs;
use pageferry_kvm::{DirtyLog, DirtyLogMode, Host, Machine};

use crate::fixture::*;

const MODES: [DirtyLogMode; 3] = [DirtyLogMode::ManualInitiallySet, DirtyLogMode::Manual, DirtyLogMode::Plain];

/// Page number of the first page of the high region.
const HIGH_PAGE: u64 = LOW_LEN / 4096;

/// AMD's nested paging counts a walk through the guest's page tables as a write to them.
const PAGE_TABLES: RangeInclusive<u64> = 1..=4;

/// A page that no test looks at.
const SCRATCH: u64 = 0x18_0000;

struct Tracked {
    machine: Machine,
    memory: Arc<MappedMemory>,
    device: Arc<Device>,
    log: DirtyLog,
}

impl Tracked {
    fn new(host: &Host, backing: Backing, mode: DirtyLogMode) -> Self {
        let (mut machine, memory) = loaded_with(host, 1, SWEEP, memory(backing));
        let device = Arc::new(Device::default());
        machine.start(device.clone()).unwrap();
        let log = machine.dirty_log(mode);
        assert_eq!(log.mode(), mode, "this host has every mode");
        let guest = Self { machine, memory, device, log };
        // KVM reports a page as dirty when it first maps it writable, if only to execute from it.
        guest.sweep(SCRATCH, 1, 1);
        guest
    }

    fn start(&mut self) {
        self.log.start(&layout()).unwrap();
    }

    /// Lets the guest write once to `count` pages from `address`, `step` pages apart.
    fn sweep(&self, address: u64, count: u64, step: u64) {
        self.aim(address, count, step);
        self.device.hold.store(true, Ordering::SeqCst);
        let before = self.device.outs.load(Ordering::SeqCst);
        self.machine.resume().unwrap();
        until("the sweep is done", || self.device.outs.load(Ordering::SeqCst) > before);
        self.machine.pause().unwrap();
    }

    fn aim(&self, address: u64, count: u64, step: u64) {
        let registers = kvm_regs { rsi: count, rbp: step * 4096, ..registers(address) };
        self.machine.vcpu(0).unwrap().set_regs(&registers).unwrap();
    }

    /// Harvests, and compares with what the guest has written.
    fn expect(&mut self, expected: &[u64], when: &str) {
        let found = self.harvest();
        let missing: Vec<_> = expected.iter().filter(|page| !found.contains(page)).take(8).collect();
        let unexpected = |page: &&u64| !expected.contains(page) && !PAGE_TABLES.contains(page);
        let extra: Vec<_> = found.iter().filter(unexpected).take(8).collect();
        let mode = self.log.mode();
        assert!(missing.is_empty() && extra.is_empty(), "{mode:?}, {when}: missing {missing:?}, extra {extra:?}");
    }

    fn harvest(&mut self) -> Vec<u64> {
        let mut accumulator = Accumulator::new(layout());
        self.log.harvest(Point::Stopped, &mut accumulator).unwrap();
        accumulator.dirty().iter().map(|page| page.0).collect()
    }

    fn rearm(&mut self, pages: &[u64]) {
        let mut bitmap = Accumulator::new(layout());
        for &page in pages {
            bitmap.give_back(PageRun { first: PageNumber(page), count: 1 });
        }
        let mut at = 0;
        while let Some((word, bits)) = bitmap.dirty().next_word(at) {
            let (region, first) = layout().locate(PageNumber(word * 64)).unwrap();
            self.log.rearm(region, first, &[bits]).unwrap();
            at = word + 1;
        }
    }

    /// What the engine sends in its first round, and re-arms on the way.
    fn populated(&self) -> Vec<u64> {
        let layout = layout();
        let pages_of = |id: RegionId| {
            let all = layout.pages_of(id);
            let first = all.first.0;
            // Unknown means all of them.
            let whole = 0..all.count;
            let ranges = self.memory.populated(id).unwrap_or_else(|| vec![whole]);
            ranges.into_iter().flatten().map(move |page| first + page)
        };
        layout.iter().flat_map(|(id, _)| pages_of(id)).collect()
    }

    fn start_and_arm(&mut self) {
        self.start();
        let populated = self.populated();
        self.rearm(&populated);
    }
}

fn pages(first: u64, count: u64, step: u64) -> Vec<u64> {
    (0..count).map(|index| first + index * step).collect()
}

fn in_every_mode(test: impl Fn(&Host, Backing, DirtyLogMode)) {
    let Some(host) = host() else { return };
    for backing in [Backing::Anonymous, Backing::Memfd] {
        for mode in MODES {
            test(&host, backing, mode);
        }
    }
}

#[test]
fn exactly_the_pages_written_are_reported_until_they_are_armed_again() {
    in_every_mode(|host, backing, mode| {
        let mut guest = Tracked::new(host, backing, mode);
        guest.sweep(0x20_0000, 600, 1);
        guest.sweep(HIGH, 100, 2);
        guest.start_and_arm();
        guest.expect(&[], "pages touched before and pages never touched");

        guest.sweep(0x21_0000, 90, 3);
        guest.sweep(HIGH + 4096, 700, 2);
        let written = [pages(0x210, 90, 3), pages(HIGH_PAGE + 1, 700, 2)].concat();
        guest.expect(&written, "written");
        guest.expect(if mode == DirtyLogMode::Plain { &[] } else { &written }, "not armed since");

        guest.rearm(&written);
        guest.expect(&[], "armed again");
        guest.sweep(0x21_0000, 2, 6);
        guest.expect(&[0x210, 0x216], "written once more");
    });
}

#[test]
fn re_arming_touches_no_page_but_those_named() {
    in_every_mode(|host, backing, mode| {
        if mode == DirtyLogMode::Plain {
            return;
        }
        let mut guest = Tracked::new(host, backing, mode);
        guest.start_and_arm();
        guest.sweep(HIGH, HIGH_LEN / 4096, 1);
        let all = pages(HIGH_PAGE, HIGH_LEN / 4096, 1);
        guest.expect(&all, "a whole region");
        let (odd, even): (Vec<u64>, Vec<u64>) = all.iter().partition(|&page| page % 2 == 1);
        guest.rearm(&odd);
        guest.expect(&even, "every other page armed");
    });
}

#[test]
fn a_copy_kept_up_by_the_log_equals_memory_in_the_end() {
    in_every_mode(|host, backing, mode| {
        let mut guest = Tracked::new(host, backing, mode);
        guest.aim(HIGH, HIGH_LEN / 4096, 1);
        guest.machine.resume().unwrap();
        let device = Arc::clone(&guest.device);
        until("the guest writes", || device.outs.load(Ordering::SeqCst) > 0);
        guest.start();
        let mut copy = vec![0u8; (LOW_LEN + HIGH_LEN) as usize];
        let mut to_copy = guest.populated();
        for round in 0..12 {
            guest.rearm(&to_copy);
            for &page in &to_copy {
                let (region, index) = layout().locate(PageNumber(page)).unwrap();
                let at = (page * 4096) as usize;
                guest.memory.read(region, index * 4096, &mut copy[at..at + 4096]).unwrap();
            }
            if round == 10 {
                guest.machine.pause().unwrap();
            }
            to_copy = guest.harvest();
        }
        let mut now = vec![0u8; copy.len()];
        let (low, high) = now.split_at_mut(LOW_LEN as usize);
        guest.memory.read(RegionId(0), 0, low).unwrap();
        guest.memory.read(RegionId(2), 0, high).unwrap();
        let wrong = copy.chunks(4096).zip(now.chunks(4096)).position(|(copy, now)| copy != now);
        assert_eq!(wrong, None, "{backing:?} {mode:?}: the first page that differs");
    });
}

#[test]
fn a_stopped_log_can_be_started_again_and_reports_afresh() {
    in_every_mode(|host, backing, mode| {
        let mut guest = Tracked::new(host, backing, mode);
        for _ in 0..3 {
            guest.start_and_arm();
            guest.sweep(0x40_0000, 5, 2);
            guest.expect(&pages(0x400, 5, 2), "written since the start");
            guest.log.stop().unwrap();
            guest.sweep(0x50_0000, 5, 1);
        }
    });
}

#[test]
fn the_vmms_own_writes_are_reported_with_the_guests() {
    in_every_mode(|host, backing, mode| {
        let mut guest = Tracked::new(host, backing, mode);
        let own = guest.machine.host_writes();
        own.mark(0x60_0000, 4096);
        guest.start_and_arm();
        guest.memory.write(RegionId(2), 0x3000, b"from a device").unwrap();
        own.mark(HIGH + 0x3000, 13);
        guest.sweep(0x70_0000, 1, 1);
        guest.expect(&[0x700, HIGH_PAGE + 3], "the guest's and the VMM's");
        guest.rearm(&[0x700]);
        guest.expect(&[], "reported once");
    });
}

#[test]
fn calls_at_the_wrong_time_are_errors_and_a_dropped_log_frees_its_place() {
    let Some(host) = host() else { return };
    let (machine, _memory) = bare(&host, 1);
    let mut sink = Accumulator::new(layout());
    let mut log = machine.dirty_log(DirtyLogMode::Best);
    assert!(log.harvest(Point::Running, &mut sink).is_err());
    assert!(log.rearm(RegionId(0), 0, &[1]).is_err());
    log.stop().unwrap();
    log.start(&layout()).unwrap();
    assert!(log.start(&layout()).is_err());
    let mut second = machine.dirty_log(DirtyLogMode::Best);
    assert!(second.start(&layout()).unwrap_err().to_string().contains("stop that log"));
    drop(log);
    second.start(&layout()).unwrap();
    second.stop().unwrap();
    let other = pageferry::memory::Layout::new(vec![]).unwrap();
    assert!(second.start(&other).is_err());
}
