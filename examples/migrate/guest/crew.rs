//! How the vCPUs work together: vCPU 0 gives an order, each carries it out and says that it is done.
//!
//! While the order is to write, everyone writes what is due and rests till the next beat. Any other
//! order begins after everyone stopped writing, so that memory stands still at a known number of steps.

use core::cell::UnsafeCell;
use core::mem::MaybeUninit;
use core::sync::atomic::Ordering::Relaxed;

use crate::hardware::{arrived, port_read, read_byte, start_other_vcpus, tsc_khz};
use crate::heart::Clock;
use crate::ledger::{Entry, Ledger};
use crate::member::{Guest, Member};
use crate::memory::Memory;
use crate::pvh::StartInfo;
use crate::workload::line::{Line, WrongPage};
use crate::workload::page::{Mismatch, PAGE_BYTES};
use crate::workload::params::{BadParameter, Params};
use crate::workload::ports::{self, Command};

/// How long the others may take to start: emulated, they take milliseconds.
const START_PATIENCE_MS: u32 = 10_000;
/// Between two looks whether the others are done.
const WAIT_MICROS: u64 = 200;
/// Between two looks for a command.
const COMMAND_INTERVAL_MS: u32 = 5;
/// Between two looks for an order by a vCPU that has nothing to write.
const IDLE_REST_MS: u32 = 10;

/// What everyone does; an order is the task with a serial number above it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Task {
    Rest = 0,
    Fill = 1,
    Write = 2,
    Check = 3,
}

const TASK_BITS: u32 = 2;

impl Task {
    const fn of(order: u64) -> Self {
        match order % (1 << TASK_BITS) {
            0 => Self::Rest,
            1 => Self::Fill,
            2 => Self::Write,
            _ => Self::Check,
        }
    }
}

/// Set once by vCPU 0 before the others start.
struct Shared(UnsafeCell<MaybeUninit<Guest>>);

// SAFETY: written once before any other vCPU runs, only read afterwards.
unsafe impl Sync for Shared {}

static GUEST: Shared = Shared(UnsafeCell::new(MaybeUninit::uninit()));

/// The life of vCPU 0.
pub(crate) fn lead(start_info: u64) -> ! {
    let guest = boot(start_info);
    let mut leader = Leader::new(guest);
    leader.start_others();
    leader.fill();
    leader.run()
}

/// The life of every other vCPU.
pub(crate) fn follow(index: u64) -> ! {
    // SAFETY: vCPU 0 has written it before it started this one.
    let guest = unsafe { (*GUEST.0.get()).assume_init_ref() };
    let mut member = Member::new(guest, index);
    let leader = guest.memory.ledger(0);
    loop {
        let order = leader.load(Entry::Order);
        if order != member.ledger.load(Entry::Done) {
            carry_out(&mut member, order);
        }
        let writes = Task::of(order) == Task::Write;
        let pause_ms = if writes && guest.params.is_idle() { IDLE_REST_MS } else { guest.params.heartbeat_ms };
        let end = member.heart.look() + guest.clock.ticks(pause_ms);
        if writes {
            member.write_until(end);
        }
        member.rest_until(end);
    }
}

fn carry_out(member: &mut Member, order: u64) {
    match Task::of(order) {
        Task::Fill => member.fill(),
        Task::Check => member.check(),
        Task::Write | Task::Rest => {}
    }
    member.ledger.store(Entry::Done, order);
}

/// Makes the guest from what the loader left.
fn boot(start_info: u64) -> &'static Guest {
    // SAFETY: boot.s passes on what the loader gave it, and nothing has been written yet.
    let info = unsafe { StartInfo::at(start_info) };
    let params = match Params::parse(info.command_line()) {
        Ok(params) => params,
        Err(BadParameter(word)) => panic!("bad parameter: {word}"),
    };
    let khz = Some(u64::from(params.tsc_khz)).filter(|&khz| khz > 0).or_else(tsc_khz);
    let clock = Clock::new(khz.expect("the CPU does not tell its clock frequency: give tsc_khz=<kHz>"));
    let memory = Memory::new(info.ram(), u64::from(params.vcpus));
    memory.map();
    (0..u64::from(params.vcpus)).for_each(|vcpu| memory.ledger(vcpu).clear());
    memory.hashes().iter().for_each(|hash| hash.store(0, Relaxed));
    let guest = Guest { params, content: params.content(), memory, clock };
    // SAFETY: no other vCPU runs and no reference exists yet.
    unsafe { (*GUEST.0.get()).write(guest) }
}

/// vCPU 0 and what only it does.
struct Leader {
    member: Member,
    /// Whether the host wants the guest to write.
    writing: bool,
    reports: u64,
    next_report: u64,
    next_command: u64,
}

impl Leader {
    fn new(guest: &'static Guest) -> Self {
        let mut member = Member::new(guest, 0);
        member.heart.beat_every(guest.clock.ticks(guest.params.heartbeat_ms));
        Self { member, writing: true, reports: 0, next_report: 0, next_command: 0 }
    }

    fn start_others(&mut self) {
        let others = self.guest().params.vcpus - 1;
        if others > 0 {
            start_other_vcpus(others);
        }
        let deadline = self.member.heart.look() + self.guest().clock.ticks(START_PATIENCE_MS);
        while arrived() < others {
            assert!(self.member.heart.look() < deadline, "{} of {others} other vCPUs started", arrived());
        }
    }

    fn fill(&mut self) {
        let memory = &self.guest().memory;
        self.print(&Line::Boot { ram_pages: memory.ram_pages(), data_pages: memory.data_pages() });
        self.member.seal();
        let ms = self.together(Task::Fill);
        self.print(&Line::Ready { ms });
        self.member.heart.forget_gaps();
    }

    fn run(mut self) -> ! {
        self.together(Task::Write);
        loop {
            let end = self.member.heart.next_beat();
            if self.writing {
                self.member.write_until(end);
            }
            self.member.rest_until(end);
            let now = self.member.heart.look();
            if now >= self.next_command {
                self.next_command = now + self.guest().clock.ticks(COMMAND_INTERVAL_MS);
                if let Some(command) = pending_command() {
                    self.obey(command);
                }
            }
            if now >= self.next_report && self.guest().params.report_ms > 0 {
                self.next_report = now + self.guest().clock.ticks(self.guest().params.report_ms);
                self.report(now);
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Check => self.check(),
            Command::Stop => self.stop(),
            Command::Resume => self.resume(),
            Command::ReportStall => {
                let longest_us = self.guest().clock.micros(self.member.ledger.load(Entry::LongestGap));
                self.print(&Line::Stall { longest_us });
            }
            Command::ResetStall => self.member.heart.forget_gaps(),
        }
    }

    fn stop(&mut self) {
        self.together(Task::Rest);
        self.writing = false;
        self.print(&Line::Stopped { writes: self.writes() });
    }

    fn resume(&mut self) {
        self.together(Task::Write);
        self.writing = true;
        self.print(&Line::Resumed);
    }

    fn check(&mut self) {
        self.together(Task::Rest);
        let ms = self.together(Task::Check);
        let wrong_pages = self.ledgers().map(|ledger| ledger.load(Entry::WrongPages)).sum();
        let first = self.ledgers().filter(|ledger| ledger.load(Entry::WrongPages) > 0);
        match first.min_by_key(|ledger| ledger.load(Entry::WrongAddress)) {
            None => self.print(&Line::CheckOk { pages: self.guest().checked_pages(), ms }),
            Some(ledger) => self.print(&Line::CheckFailed(wrong_page(ledger, wrong_pages))),
        }
        self.together(if self.writing { Task::Write } else { Task::Rest });
    }

    fn report(&mut self, now: u64) {
        self.reports += 1;
        let stall_us = self.guest().clock.micros(self.member.ledger.load(Entry::RecentGap));
        self.member.ledger.store(Entry::RecentGap, 0);
        self.print(&Line::Heartbeat { number: self.reports, tsc: now, stall_us, writes: self.writes() });
    }

    /// Gives an order, carries it out, and waits till all have; returns the milliseconds it took.
    fn together(&mut self, task: Task) -> u64 {
        let start = self.member.heart.look();
        let order = ((self.member.ledger.load(Entry::Order) >> TASK_BITS) + 1) << TASK_BITS | task as u64;
        self.member.ledger.store(Entry::Order, order);
        carry_out(&mut self.member, order);
        while self.ledgers().any(|ledger| ledger.load(Entry::Done) != order) {
            let now = self.member.heart.look();
            self.member.rest_until(now + self.guest().clock.ticks(1) * WAIT_MICROS / 1000);
        }
        self.guest().clock.micros(self.member.heart.look() - start) / 1000
    }

    fn writes(&self) -> u64 {
        self.ledgers().map(|ledger| ledger.load(Entry::Steps)).sum()
    }

    fn ledgers(&self) -> impl Iterator<Item = &'static Ledger> + use<> {
        let guest = self.guest();
        (0..guest.vcpus()).map(|vcpu| guest.memory.ledger(vcpu))
    }

    fn print(&mut self, line: &Line<'_>) {
        self.member.heart.print(line);
    }

    fn guest(&self) -> &'static Guest {
        self.member.guest
    }
}

fn wrong_page(ledger: &Ledger, wrong_pages: u64) -> WrongPage {
    let address = ledger.load(Entry::WrongAddress);
    let offset = address as usize % PAGE_BYTES;
    let mismatch =
        Mismatch { offset, expected: ledger.load(Entry::WrongExpected), found: ledger.load(Entry::WrongFound) };
    WrongPage { address: address - offset as u64, mismatch, wrong_pages }
}

/// What the host asks, if anything.
fn pending_command() -> Option<Command> {
    match port_read(ports::COMMAND) {
        Command::NO_PORT => Command::from_serial(read_byte()?),
        value => Command::from_port(value),
    }
}
