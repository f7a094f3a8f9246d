//! One vCPU and its share of the work.

use core::ops::Range;
use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::hardware::{port_write, tsc};
use crate::heart::{Clock, Heart};
use crate::ledger::{Entry, Ledger};
use crate::memory::{Memory, STACK_PAGES, hash, hash_page, ledger_address};
use crate::workload::content::Content;
use crate::workload::page::{Mismatch, PAGE_BYTES};
use crate::workload::params::Params;
use crate::workload::ports;
use crate::workload::sweep::{Pace, Sweep};

/// Resting shorter than this costs more than it saves.
const SHORTEST_REST_MICROS: u64 = 20;

/// What is the same for all vCPUs.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) params: Params,
    pub(crate) content: Content,
    pub(crate) memory: Memory,
    pub(crate) clock: Clock,
}

impl Guest {
    /// vCPUs, as a number to divide pages by.
    pub(crate) fn vcpus(&self) -> u64 {
        u64::from(self.params.vcpus)
    }

    /// Pages that a check covers: all but the stacks.
    pub(crate) fn checked_pages(&self) -> u64 {
        self.memory.ram_pages() - self.vcpus() * STACK_PAGES
    }

    /// Pages that are written again and again.
    fn working_set(&self) -> u64 {
        (self.params.working_set / PAGE_BYTES as u64).min(self.memory.data_pages())
    }

    /// The first of them among the data pages: they lie in the middle.
    fn working_set_start(&self) -> u64 {
        (self.memory.data_pages() - self.working_set()) / 2
    }
}

/// One vCPU.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) guest: &'static Guest,
    pub(crate) ledger: &'static Ledger,
    pub(crate) heart: Heart,
    index: u64,
    sweep: Sweep,
    pace: Pace,
}

impl Member {
    /// vCPU number `index`.
    pub(crate) fn new(guest: &'static Guest, index: u64) -> Self {
        let ledger = guest.memory.ledger(index);
        let sweep = Sweep::share(guest.working_set(), index, guest.vcpus());
        let pace = Pace::new(guest.params.rate, guest.vcpus(), guest.clock.ticks_per_second(), tsc());
        Self { guest, ledger, heart: Heart::new(ledger), index, sweep, pace }
    }

    /// Sleeps until `end`.
    pub(crate) fn rest_until(&mut self, end: u64) {
        let micros = self.guest.clock.micros(end.saturating_sub(self.heart.look()));
        if micros >= SHORTEST_REST_MICROS {
            port_write(ports::REST, micros as u32);
            self.heart.look();
        }
    }

    /// Fills this vCPU's share of all data pages.
    pub(crate) fn fill(&mut self) {
        let guest = self.guest;
        for index in self.share_of(guest.memory.data_pages()) {
            let (page, at) = guest.memory.data_page(index);
            guest.content.fill(page, at);
            self.heart.look();
        }
    }

    /// Writes what is due, but not after `end`.
    pub(crate) fn write_until(&mut self, end: u64) {
        let mut now = self.heart.look();
        while now < end && self.pace.take(now) {
            self.step();
            now = self.heart.look();
        }
    }

    /// Compares this vCPU's share of all memory with what it must hold, and writes down what is wrong.
    pub(crate) fn check(&mut self) {
        self.ledger.store(Entry::WrongPages, 0);
        self.note(ledger_address(self.index), self.ledger.check());
        if self.index == 0 {
            self.check_static();
        }
        let guest = self.guest;
        let (start, working_set) = (guest.working_set_start(), guest.working_set());
        for index in self.share_of(guest.memory.data_pages() - working_set) {
            self.check_data(index + if index < start { 0 } else { working_set }, 0);
        }
        for (index, generation) in self.sweep.generations(self.ledger.load(Entry::Steps)) {
            self.check_data(start + index, generation);
        }
    }

    /// Takes the hash of every static page: from now on they must not change.
    pub(crate) fn seal(&mut self) {
        let memory = &self.guest.memory;
        for (page, hash) in memory.static_pages().zip(memory.hashes()) {
            hash.store(hash_page(page), Relaxed);
            self.heart.look();
        }
        self.ledger.store(Entry::Seal, hash_all(memory.hashes()));
    }

    fn step(&mut self) {
        let steps = self.ledger.load(Entry::Steps);
        if let Some((index, generation)) = self.sweep.step(steps) {
            let guest = self.guest;
            let (page, at) = guest.memory.data_page(guest.working_set_start() + index);
            guest.content.write(page, generation, at);
            self.ledger.store(Entry::Steps, steps + 1);
        }
    }

    fn check_data(&mut self, index: u64, generation: u64) {
        let guest = self.guest;
        let (page, at) = guest.memory.data_page(index);
        self.note(page * PAGE_BYTES as u64, guest.content.check(page, generation, at));
        self.heart.look();
    }

    fn check_static(&mut self) {
        let memory = &self.guest.memory;
        self.note(memory.hashes_address(), same(self.ledger.load(Entry::Seal), hash_all(memory.hashes())));
        for (page, hash) in memory.static_pages().zip(memory.hashes()) {
            self.note(page * PAGE_BYTES as u64, same(hash.load(Relaxed), hash_page(page)));
            self.heart.look();
        }
    }

    fn note(&mut self, address: u64, result: Result<(), Mismatch>) {
        let Err(Mismatch { offset, expected, found }) = result else { return };
        let wrong_pages = self.ledger.load(Entry::WrongPages) + 1;
        self.ledger.store(Entry::WrongPages, wrong_pages);
        if wrong_pages == 1 {
            self.ledger.store(Entry::WrongAddress, address + offset as u64);
            self.ledger.store(Entry::WrongExpected, expected);
            self.ledger.store(Entry::WrongFound, found);
        }
    }

    fn share_of(&self, pages: u64) -> Range<u64> {
        let vcpus = self.guest.vcpus();
        pages * self.index / vcpus..pages * (self.index + 1) / vcpus
    }
}

fn same(expected: u64, found: u64) -> Result<(), Mismatch> {
    if expected == found { Ok(()) } else { Err(Mismatch { offset: 0, expected, found }) }
}

fn hash_all(words: &[AtomicU64]) -> u64 {
    hash(words.iter().map(|word| word.load(Relaxed)))
}
