//! The guest program under KVM: it boots on machines of many shapes, does the work it is told to do, and
//! its check of its own memory finds every kind of damage and nothing else.
//!
//! The small machine in `machine.rs` stands in for `migrate`'s own, so that a failure here is the guest's.

mod machine;
#[path = "../../src/payload.rs"]
mod payload;
#[allow(dead_code)]
#[path = "../../src/workload/mod.rs"]
mod workload;

use std::time::Duration;

use machine::{Machine, have_kvm};
use workload::content::Kind;
use workload::line::{Line, WrongPage};
use workload::page::PAGE_BYTES;
use workload::params::{Params, Rate, Writes};
use workload::ports::Command;

const MIB: u64 = 1 << 20;
const PAGES_PER_MIB: u64 = MIB / PAGE_BYTES as u64;
const STACK_PAGES: u64 = 7;

/// A small working set, gone over many times a second.
const BUSY: &str = "mix=30,10,40,20 seed=5 ws=1M rate=40M report=20";

fn params(line: &str) -> Params {
    Params::parse(line).unwrap()
}

fn check(machine: &Machine) -> Result<u64, WrongPage> {
    machine.command(Command::Check);
    machine.wait_for(|line| match line {
        Line::CheckOk { pages, .. } => Some(Ok(pages)),
        Line::CheckFailed(wrong) => Some(Err(wrong)),
        _ => None,
    })
}

fn wait_until_ready(machine: &Machine) {
    machine.wait_for(|line| matches!(line, Line::Ready { .. }).then_some(()));
}

fn stop(machine: &Machine) -> u64 {
    machine.command(Command::Stop);
    machine.wait_for(|line| if let Line::Stopped { writes } = line { Some(writes) } else { None })
}

fn resume(machine: &Machine) {
    machine.command(Command::Resume);
    machine.wait_for(|line| matches!(line, Line::Resumed).then_some(()));
}

fn wait_for_writes(machine: &Machine, wanted: u64) {
    machine.wait_for(|line| matches!(line, Line::Heartbeat { writes, .. } if writes >= wanted).then_some(()));
}

/// Whether it comes true within a time in which a guest does much.
fn eventually(mut what: impl FnMut() -> bool) -> bool {
    (0..10_000).any(|_| {
        std::thread::sleep(Duration::from_millis(1));
        what()
    })
}

/// Boots, lets the guest write some, and has it check itself twice meanwhile.
fn works(ram: &[(u64, u64)], params: Params) {
    if !have_kvm() {
        return;
    }
    let machine = Machine::start(ram, params);
    wait_until_ready(&machine);
    // Between 640 KiB and 1 MiB the map has no RAM.
    let pages = ram.iter().map(|(_, len)| len / PAGE_BYTES as u64).sum::<u64>() - 96;
    for round in 1..=2 {
        wait_for_writes(&machine, round * 100);
        assert_eq!(check(&machine), Ok(pages - STACK_PAGES * u64::from(params.vcpus)));
    }
}

#[test]
fn the_smallest_guest_works() {
    works(&[(0, 16 * MIB)], params(BUSY));
}

#[test]
fn two_vcpus_share_the_work() {
    works(&[(0, 64 * MIB)], Params { vcpus: 2, ..params(BUSY) });
}

#[test]
fn more_vcpus_than_the_host_has_share_the_work() {
    works(&[(0, 32 * MIB)], Params { vcpus: 7, ..params(BUSY) });
}

#[test]
fn whole_pages_are_written() {
    works(&[(0, 64 * MIB)], Params { vcpus: 2, writes: Writes::Full, ..params(BUSY) });
}

#[test]
fn a_guest_writes_as_fast_as_it_can() {
    works(&[(0, 64 * MIB)], Params { vcpus: 2, rate: Rate::Max, working_set: 32 * MIB, ..params(BUSY) });
}

#[test]
fn a_working_set_larger_than_memory_is_all_of_memory() {
    works(&[(0, 32 * MIB)], Params { working_set: u64::MAX, ..params(BUSY) });
}

#[test]
fn ram_around_a_hole_below_4_gib_works() {
    let ram = [(0, 64 * MIB), (4 << 30, 32 * MIB), (70 << 30, 16 * MIB)];
    works(&ram, Params { working_set: 100 * MIB, ..params(BUSY) });
}

#[test]
fn zero_pages_may_be_touched() {
    works(&[(0, 32 * MIB)], Params { touch_zero: true, ..params(BUSY) });
}

#[test]
fn an_idle_guest_beats_and_does_not_write() {
    if !have_kvm() {
        return;
    }
    let machine = Machine::start(&[(0, 16 * MIB)], Params { vcpus: 2, ..params("idle report=20") });
    wait_until_ready(&machine);
    let number =
        |line: Line<'_>| if let Line::Heartbeat { number: 5, writes, .. } = line { Some(writes) } else { None };
    assert_eq!(machine.wait_for(number), 0);
    let beats = machine.beats();
    assert!(eventually(|| machine.beats() > beats));
}

#[test]
fn a_stopped_guest_writes_nothing_until_it_is_resumed() {
    if !have_kvm() {
        return;
    }
    let machine = Machine::start(&[(0, 16 * MIB)], Params { vcpus: 2, ..params(BUSY) });
    wait_until_ready(&machine);
    let stopped_at = stop(&machine);
    let next = |line: Line<'_>| if let Line::Heartbeat { writes, .. } = line { Some(writes) } else { None };
    assert_eq!((machine.wait_for(next), machine.wait_for(next)), (stopped_at, stopped_at));
    assert_eq!(stop(&machine), stopped_at);
    resume(&machine);
    wait_for_writes(&machine, stopped_at + 100);
}

#[test]
fn the_guest_notices_that_it_stood_still() {
    if !have_kvm() {
        return;
    }
    let machine = Machine::start(&[(0, 16 * MIB)], params(BUSY));
    wait_until_ready(&machine);
    let pause = Duration::from_millis(300);
    machine.hold_next_beat(pause);
    machine.command(Command::ReportStall);
    let longest = machine.wait_for(|line| if let Line::Stall { longest_us } = line { Some(longest_us) } else { None });
    assert!(Duration::from_micros(longest) >= pause, "{longest} us");
    // A busy host makes the guest stand still too, but not every time for so long.
    let forgotten = (0..50).any(|_| {
        machine.command(Command::ResetStall);
        machine.command(Command::ReportStall);
        let longest =
            machine.wait_for(|line| if let Line::Stall { longest_us } = line { Some(longest_us) } else { None });
        Duration::from_micros(longest) < pause
    });
    assert!(forgotten, "a reset begins anew");
}

/// A stopped guest of 32 MiB whose memory was checked.
fn stopped_guest(params: Params) -> Machine {
    let machine = Machine::start(&[(0, 32 * MIB)], params);
    wait_until_ready(&machine);
    wait_for_writes(&machine, 2 * PAGES_PER_MIB);
    stop(&machine);
    assert!(check(&machine).is_ok());
    machine
}

/// Checks that the guest names exactly this page when it holds `damaged`, and none when it is mended.
fn finds(machine: &Machine, page: u64, damaged: &[u8], what: &str) {
    let right = machine.read(page);
    assert!(right != damaged, "{what}: nothing is damaged");
    machine.write(page, damaged);
    let wrong = check(machine).expect_err(what);
    assert_eq!((wrong.address, wrong.wrong_pages), (page * PAGE_BYTES as u64, 1), "{what}: {wrong}");
    machine.write(page, &right);
    assert!(check(machine).is_ok(), "{what}");
}

/// The page with one bit changed at `offset`.
fn flipped(machine: &Machine, page: u64, offset: usize) -> Vec<u8> {
    let mut bytes = machine.read(page);
    bytes[offset] ^= 0x10;
    bytes
}

#[test]
fn a_flipped_bit_is_found_in_data_of_every_kind() {
    if !have_kvm() {
        return;
    }
    let params = Params { vcpus: 2, ..params(BUSY) };
    let machine = stopped_guest(params);
    for kind in [Kind::Zero, Kind::Duplicate, Kind::Text, Kind::Random] {
        let page = (0..32 * PAGES_PER_MIB).rev().find(|&page| params.content().kind(page) == kind).unwrap();
        for offset in [0, 2049, PAGE_BYTES - 1] {
            finds(&machine, page, &flipped(&machine, page, offset), &format!("{kind:?} at {offset}"));
        }
    }
}

#[test]
fn a_flipped_bit_is_found_in_the_guest_itself() {
    if !have_kvm() {
        return;
    }
    let machine = stopped_guest(params(BUSY));
    let ledger = machine.first_page_after_image();
    let directory = ledger + 1 + STACK_PAGES;
    for (what, page, offset) in [
        ("loader's memory", 0x50, 17),
        ("trampoline", 8, 1),
        ("program", 0x100, 5), // in the PVH note, which nobody needs any more
        ("ledger", ledger, PAGE_BYTES - 1),
        ("page directory", directory, 1), // a bit that the CPU ignores
        ("hashes", directory + 3, PAGE_BYTES - 1),
    ] {
        finds(&machine, page, &flipped(&machine, page, offset), what);
    }
}

#[test]
fn an_older_copy_of_a_written_page_is_found() {
    for writes in [Writes::Few, Writes::Full] {
        if !have_kvm() {
            return;
        }
        let machine = stopped_guest(Params { vcpus: 2, writes, ..params(BUSY) });
        // The working set lies in the middle of what the guest itself leaves of memory.
        let pages = 16 * PAGES_PER_MIB + 100..16 * PAGES_PER_MIB + 120;
        let older: Vec<_> = pages.clone().map(|page| machine.read(page)).collect();
        // Each vCPU writes a part of them, and a busy host may let one of them wait.
        let written = (0..1000).any(|_| {
            let before = stop(&machine);
            resume(&machine);
            wait_for_writes(&machine, before + 3 * PAGES_PER_MIB);
            stop(&machine);
            pages.clone().zip(&older).all(|(page, older)| machine.read(page) != *older)
        });
        assert!(written, "some pages are never written");
        for (page, older) in pages.zip(older) {
            finds(&machine, page, &older, "an older copy");
        }
    }
}

#[test]
fn a_lost_page_of_bookkeeping_is_found() {
    if !have_kvm() {
        return;
    }
    let machine = stopped_guest(params(BUSY));
    let ledger = machine.first_page_after_image();
    let (older, before) = (machine.read(ledger), stop(&machine));
    resume(&machine);
    wait_for_writes(&machine, before + 10 * PAGES_PER_MIB);
    stop(&machine);
    let newer = machine.read(ledger);
    // The older page agrees with itself; only the number of steps (its third twin) tells that it is old.
    let mut stale = newer.clone();
    stale[32..48].copy_from_slice(&older[32..48]);
    machine.write(ledger, &stale);
    assert!(check(&machine).expect_err("an older number of steps").wrong_pages > 0);
    machine.write(ledger, &newer);
}
