//! What each vCPU writes down about itself: one page per vCPU, the only memory besides stacks whose
//! content does not follow from the seed. Every number is kept twice, so that a check finds damage.

use core::mem::size_of;
use core::sync::atomic::{AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release};

use crate::workload::page::{Mismatch, PAGE_WORDS};

/// What is written down.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Entry {
    /// What everyone shall do now, in vCPU 0's ledger.
    Order,
    /// The last order that this vCPU has carried out.
    Done,
    /// Steps of its sweep.
    Steps,
    /// Longest time between two looks at the clock since the last reset, in ticks.
    LongestGap,
    /// The same since the last heartbeat line.
    RecentGap,
    /// Beats so far, in vCPU 0's ledger.
    Beats,
    /// Hash of the hashes of all static pages, in vCPU 0's ledger.
    Seal,
    /// Pages that this vCPU found wrong in the last check.
    WrongPages,
    /// Address of the first wrong word it found.
    WrongAddress,
    /// What it must hold.
    WrongExpected,
    /// What it held.
    WrongFound,
}

const ENTRIES: usize = Entry::WrongFound as usize + 1;

/// A vCPU's page. Written by that vCPU, read by all.
#[derive(Debug)]
#[repr(C, align(4096))]
pub(crate) struct Ledger {
    /// Each number and its complement.
    twins: [(AtomicU64, AtomicU64); ENTRIES],
    /// Zero.
    rest: [AtomicU64; PAGE_WORDS - 2 * ENTRIES],
}

impl Ledger {
    /// Makes every number zero.
    pub(crate) fn clear(&self) {
        self.twins.iter().for_each(|twin| store(twin, 0));
        self.rest.iter().for_each(|word| word.store(0, Relaxed));
    }

    /// Reads a number, and all that its vCPU did before it wrote it.
    pub(crate) fn load(&self, entry: Entry) -> u64 {
        self.twins[entry as usize].0.load(Acquire)
    }

    /// Writes a number.
    pub(crate) fn store(&self, entry: Entry, value: u64) {
        store(&self.twins[entry as usize], value);
    }

    /// Whether all numbers agree with their complements and the rest of the page is zero.
    pub(crate) fn check(&self) -> Result<(), Mismatch> {
        let twins = self.twins.iter().map(|(number, complement)| (number.load(Relaxed), !complement.load(Relaxed)));
        let rest = self.rest.iter().map(|word| (0, word.load(Relaxed)));
        let differs = |&(_, (expected, found)): &(usize, (u64, u64))| expected != found;
        if let Some((index, (expected, found))) = twins.enumerate().find(differs) {
            return Err(Mismatch { offset: index * 16, expected, found });
        }
        match rest.enumerate().find(differs) {
            Some((index, (expected, found))) => {
                Err(Mismatch { offset: size_of::<[(u64, u64); ENTRIES]>() + index * 8, expected, found })
            }
            None => Ok(()),
        }
    }
}

fn store((number, complement): &(AtomicU64, AtomicU64), value: u64) {
    complement.store(!value, Relaxed);
    number.store(value, Release);
}
