//! KVM's dirty log as the engine's tracker of writes.
//!
//! With manual protection a harvest only reads the log; a page is forgotten and write-protected
//! again when it is re-armed, just before it is read. Pages that were not re-armed yet are reported
//! again, which does no harm: the engine only ever adds bits.
//!
//! Where the host has it, logging starts with **all bits set** and nothing write-protected, so that
//! starting costs nothing and each page is protected when its turn comes. But a page that nobody
//! ever touched is never sent, so never re-armed, and would be reported for ever. [`DirtyLog::start`]
//! therefore re-arms every page that [`GuestMemory::populated`](pageferry::memory::GuestMemory::populated) does not list. That loses nothing:
//!
//! - touched before the question: the list has it, its bit stays;
//! - touched between the question and its re-arming: the bit is lost, but the page is populated now,
//!   and the engine asks `populated` after `start` has returned, so it is sent in the first round;
//! - written after its re-arming: that faults, and the bit is set.
//!
//! Without manual protection a harvest write-protects what it reports, and `rearm` has nothing to do.
//! Either way the VMM's own writes ([`HostWrites`]) are reported along with the log.

use std::ops::Range;
use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, kvm_enable_cap,
};
use pageferry::dirty::{DirtySink, DirtySource, Point};
use pageferry::memory::{Layout, RegionId};
use pageferry::units::PAGES_PER_WORD;
use pageferry::vm::VmResult;

use crate::error::{KvmError, call};
use crate::host_writes::HostWrites;
use crate::ioctl;
use crate::vm::{Slot, Vm};

/// Words re-armed per call at the start: 1 GiB of guest memory, which keeps KVM's MMU lock, and so a
/// vCPU that faults meanwhile, for well under a millisecond.
const START_WORDS: usize = 4096;

/// Words looked at together when a harvested bitmap is searched for bits.
const SCAN_WORDS: usize = 64;

/// How writes are logged.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum DirtyLogMode {
    /// The best that the host has.
    #[default]
    Best,
    /// Manual protection, all bits set at first: nothing is write-protected until it is re-armed.
    ManualInitiallySet,
    /// Manual protection, all pages write-protected at the start.
    Manual,
    /// A harvest write-protects what it reports.
    Plain,
}

/// The dirty log of a machine's memory slots, and the VMM's own writes.
#[derive(Debug)]
pub struct DirtyLog {
    vm: Arc<Vm>,
    host_writes: Arc<HostWrites>,
    /// Bits of `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` to work with.
    manual: u32,
    started: bool,
    /// A bitmap as long as the largest slot's, used for every slot and every harvest.
    bitmap: Vec<u64>,
}

impl DirtyLog {
    /// A log that is not started. `available` is the host's `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`.
    pub(crate) fn new(vm: Arc<Vm>, host_writes: Arc<HostWrites>, mode: DirtyLogMode, available: u32) -> Self {
        let manual = available & mode.wanted();
        // Initially-set means nothing without manual protection.
        let manual = if manual & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE == 0 { 0 } else { manual };
        Self { vm, host_writes, manual, started: false, bitmap: Vec::new() }
    }

    /// The mode that is used on this host: the one asked for, or the next simpler one that it has.
    pub fn mode(&self) -> DirtyLogMode {
        match (self.is_manual(), self.is_initially_set()) {
            (true, true) => DirtyLogMode::ManualInitiallySet,
            (true, false) => DirtyLogMode::Manual,
            (false, _) => DirtyLogMode::Plain,
        }
    }

    fn is_manual(&self) -> bool {
        self.manual & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0
    }

    fn is_initially_set(&self) -> bool {
        self.manual & KVM_DIRTY_LOG_INITIALLY_SET != 0
    }

    fn begin(&mut self) -> Result<(), KvmError> {
        let longest = self.vm.slots.iter().map(|slot| slot.pages).max().unwrap_or(0);
        self.bitmap.resize(longest.div_ceil(PAGES_PER_WORD) as usize, 0);
        self.set_manual_protection()?;
        self.logged_slots().try_for_each(|slot| self.vm.log_writes(slot, true))?;
        if self.is_initially_set() {
            self.logged_slots().try_for_each(|slot| self.rearm_untouched(slot))?;
        }
        // What was marked so far is in memory already, where the engine finds it by `populated`.
        self.host_writes.clear();
        Ok(())
    }

    fn end(&self) -> Result<(), KvmError> {
        let results: Vec<_> = self.logged_slots().map(|slot| self.vm.log_writes(slot, false)).collect();
        results.into_iter().collect()
    }

    fn logged_slots(&self) -> impl Iterator<Item = &Slot> {
        self.vm.slots.iter().filter(|slot| slot.travels)
    }

    fn set_manual_protection(&self) -> Result<(), KvmError> {
        let mut capability = kvm_enable_cap { cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, ..Default::default() };
        capability.args[0] = u64::from(self.manual);
        match self.vm.fd.enable_cap(&capability) {
            // A host without it is already in the plain mode.
            Err(_) if !self.is_manual() => Ok(()),
            result => result.map_err(call("choosing how KVM logs writes")),
        }
    }

    /// Re-arms the pages of a slot that nobody has touched; see the module's words.
    fn rearm_untouched(&self, slot: &Slot) -> Result<(), KvmError> {
        let Some(populated) = self.vm.memory.populated(slot.region) else {
            return Ok(());
        };
        let mut words = vec![0; START_WORDS];
        let step = START_WORDS as u64 * PAGES_PER_WORD;
        for first in (slot.first_page..slot.first_page + slot.pages).step_by(step as usize) {
            let end = (first + step).min(slot.first_page + slot.pages);
            let words = &mut words[..(end - first).div_ceil(PAGES_PER_WORD) as usize];
            fill_untouched(words, first..end, &populated);
            if words.iter().any(|&word| word != 0) {
                self.clear(slot, first - slot.first_page, words)?;
            }
        }
        Ok(())
    }

    /// Clears bits of a slot. `first_page` is relative to the slot, and a multiple of 64.
    fn clear(&self, slot: &Slot, first_page: u64, words: &[u64]) -> Result<(), KvmError> {
        // KVM takes whole words of pages, except at the slot's end.
        let pages = (words.len() as u64 * PAGES_PER_WORD).min(slot.pages - first_page);
        ioctl::clear_dirty_log(&self.vm.fd, slot.number, first_page, pages, words)
            .map_err(call(format!("re-arming {pages} pages of memory slot {} from page {first_page}", slot.number)))
    }

    fn harvest_slots(&mut self, sink: &mut dyn DirtySink) -> Result<(), KvmError> {
        let Self { vm, bitmap, .. } = self;
        for slot in vm.slots.iter().filter(|slot| slot.travels) {
            let words = &mut bitmap[..slot.pages.div_ceil(PAGES_PER_WORD) as usize];
            ioctl::dirty_log(&vm.fd, slot.number, slot.pages, words)
                .map_err(call(format!("reading the dirty log of memory slot {}", slot.number)))?;
            report(slot, words, sink);
        }
        Ok(())
    }

    fn rearm_slots(&self, region: RegionId, first_page: u64, words: &[u64]) -> Result<(), KvmError> {
        let wanted = first_page..first_page + words.len() as u64 * PAGES_PER_WORD;
        for slot in self.logged_slots().filter(|slot| slot.region == region) {
            let start = wanted.start.max(slot.first_page);
            let end = wanted.end.min(slot.first_page + slot.pages);
            if start < end {
                // Slots start at multiples of 64 pages, so no word is shared by two of them.
                let from = ((start - first_page) / PAGES_PER_WORD) as usize;
                let to = (end - first_page).div_ceil(PAGES_PER_WORD) as usize;
                self.clear(slot, start - slot.first_page, &words[from..to])?;
            }
        }
        Ok(())
    }
}

impl DirtyLogMode {
    fn wanted(self) -> u32 {
        match self {
            Self::Best | Self::ManualInitiallySet => KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET,
            Self::Manual => KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
            Self::Plain => 0,
        }
    }
}

impl DirtySource for DirtyLog {
    fn start(&mut self, layout: &Layout) -> VmResult<()> {
        if layout != self.vm.memory.layout() {
            return Err(KvmError::Config("the layout to track is not this machine's".to_owned()).into());
        }
        if self.started || !self.vm.claim_log() {
            return Err(KvmError::Order { is: "logging writes already", remedy: "stop that log first" }.into());
        }
        self.started = true;
        self.begin().inspect_err(|_| drop(self.stop())).map_err(Into::into)
    }

    fn harvest(&mut self, _point: Point, sink: &mut dyn DirtySink) -> VmResult<()> {
        if !self.started {
            return Err(not_started());
        }
        self.harvest_slots(sink)?;
        self.host_writes.drain(sink);
        Ok(())
    }

    fn rearm(&mut self, region: RegionId, first_page: u64, words: &[u64]) -> VmResult<()> {
        match (self.started, self.is_manual()) {
            (false, _) => Err(not_started()),
            (true, true) => Ok(self.rearm_slots(region, first_page, words)?),
            (true, false) => Ok(()),
        }
    }

    fn stop(&mut self) -> VmResult<()> {
        if !std::mem::take(&mut self.started) {
            return Ok(());
        }
        let result = self.end();
        self.vm.release_log();
        Ok(result?)
    }
}

impl Drop for DirtyLog {
    fn drop(&mut self) {
        // Best effort: a slot that goes on logging only slows the guest down.
        let _ = self.stop();
    }
}

fn not_started() -> pageferry::vm::VmError {
    KvmError::Order { is: "not logging writes", remedy: "start the log first" }.into()
}

/// Sets the bits of the pages in `pages` that no range of `populated` (ascending) holds. The first
/// page is bit 0 of the first word.
fn fill_untouched(words: &mut [u64], pages: Range<u64>, populated: &[Range<u64>]) {
    words.fill(0);
    let mut at = pages.start;
    let first_range = populated.partition_point(|range| range.end <= pages.start);
    for range in &populated[first_range..] {
        if range.start >= pages.end {
            break;
        }
        set_bits(words, at - pages.start..range.start.max(at) - pages.start);
        at = range.end.min(pages.end).max(at);
    }
    set_bits(words, at - pages.start..pages.end - pages.start);
}

fn set_bits(words: &mut [u64], bits: Range<u64>) {
    let mut at = bits.start;
    while at < bits.end {
        let word_end = (at / 64 + 1) * 64;
        let end = word_end.min(bits.end);
        words[(at / 64) as usize] |= !0u64 >> (64 - (end - at)) << (at % 64);
        at = end;
    }
}

/// Hands the stretches of a bitmap that have bits to the sink, and skips the others fast.
fn report(slot: &Slot, words: &[u64], sink: &mut dyn DirtySink) {
    let mut dirty_from = None;
    for (block, index) in words.chunks(SCAN_WORDS).zip((0..).step_by(SCAN_WORDS)) {
        let is_dirty = block.iter().fold(0, |any, word| any | word) != 0;
        match (dirty_from, is_dirty) {
            (None, true) => dirty_from = Some(index),
            (Some(from), false) => {
                report_words(slot, from, &words[from..index], sink);
                dirty_from = None;
            }
            _ => {}
        }
    }
    if let Some(from) = dirty_from {
        report_words(slot, from, &words[from..], sink);
    }
}

fn report_words(slot: &Slot, first_word: usize, words: &[u64], sink: &mut dyn DirtySink) {
    sink.mark_words(slot.region, slot.first_page + first_word as u64 * PAGES_PER_WORD, words);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn untouched(pages: Range<u64>, populated: &[Range<u64>]) -> Vec<u64> {
        let mut words = vec![!0; (pages.end - pages.start).div_ceil(64) as usize];
        fill_untouched(&mut words, pages.clone(), populated);
        let is_set = |page: &u64| words[((page - pages.start) / 64) as usize] >> ((page - pages.start) % 64) & 1 == 1;
        (pages.start..pages.start + words.len() as u64 * 64).filter(is_set).collect()
    }

    #[test]
    fn untouched_pages_are_exactly_those_outside_all_ranges() {
        let populated = [3..5, 64..65, 130..140, 250..1000];
        let expected = |pages: Range<u64>| -> Vec<u64> {
            pages.filter(|page| !populated.iter().any(|range| range.contains(page))).collect()
        };
        for pages in [0..256, 0..300, 64..128, 128..135, 192..260, 256..512, 0..1] {
            assert_eq!(untouched(pages.clone(), &populated), expected(pages.clone()), "{pages:?}");
        }
        assert_eq!(untouched(0..70, &[]).len(), 70);
    }
}
