//! The virtual machine's descriptor and its memory slots.
//!
//! A region of the layout becomes one slot, or several where it is larger than [`MAX_SLOT_PAGES`].
//! Whoever holds a [`Vm`] keeps the guest's memory mapped: a vCPU must never run on addresses that
//! this process has given to something else.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use pageferry::memory::{GuestMemory, Region, RegionId, Transfer};
use pageferry::units::PAGE_SIZE;

use crate::error::{KvmError, call};

/// Pages in a slot. KVM allows 2^31 - 1; 1 TiB keeps the bitmap of a slot at 32 MiB.
const MAX_SLOT_PAGES: u64 = 1 << 28;

/// A run of guest memory as KVM knows it.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    pub(crate) number: u32,
    pub(crate) region: RegionId,
    /// Index in the region of the slot's first page; a multiple of 64.
    pub(crate) first_page: u64,
    pub(crate) pages: u64,
    /// Whether the region's content travels, so that writes to it are worth logging.
    pub(crate) travels: bool,
    guest_address: u64,
    host_address: u64,
}

/// A virtual machine and the memory its slots point to.
pub(crate) struct Vm {
    pub(crate) fd: VmFd,
    pub(crate) slots: Vec<Slot>,
    pub(crate) memory: Arc<dyn GuestMemory>,
    /// Whether a dirty log has been started: KVM keeps one bitmap per slot, so there can be one.
    logging: AtomicBool,
}

impl std::fmt::Debug for Vm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vm").field("fd", &self.fd).field("slots", &self.slots).finish_non_exhaustive()
    }
}

impl Vm {
    /// Gives the machine its memory.
    pub(crate) fn new(fd: VmFd, memory: Arc<dyn GuestMemory>) -> Result<Self, KvmError> {
        let slots = slots_of(&*memory)?;
        let vm = Self { fd, slots, memory, logging: AtomicBool::new(false) };
        vm.slots.iter().try_for_each(|slot| vm.set_slot(slot, 0))?;
        Ok(vm)
    }

    /// Switches logging of writes to a slot on or off.
    pub(crate) fn log_writes(&self, slot: &Slot, on: bool) -> Result<(), KvmError> {
        self.set_slot(slot, if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 })
    }

    /// Claims the machine's one dirty log; false if it is in use.
    pub(crate) fn claim_log(&self) -> bool {
        !self.logging.swap(true, Ordering::AcqRel)
    }

    /// Gives the claim back.
    pub(crate) fn release_log(&self) {
        self.logging.store(false, Ordering::Release);
    }

    #[allow(unsafe_code)]
    fn set_slot(&self, slot: &Slot, flags: u32) -> Result<(), KvmError> {
        let region = kvm_userspace_memory_region {
            slot: slot.number,
            flags,
            guest_phys_addr: slot.guest_address,
            memory_size: slot.pages * PAGE_SIZE as u64,
            userspace_addr: slot.host_address,
        };
        // SAFETY: the addresses are those of a window of `self.memory`, which keeps it mapped for as
        // long as this `Vm` lives; the layout's regions do not overlap.
        unsafe { self.fd.set_user_memory_region(region) }
            .map_err(call(format!("setting memory slot {} at guest-physical {:#x}", slot.number, slot.guest_address)))
    }
}

/// Cuts every region that is not empty into slots.
fn slots_of(memory: &dyn GuestMemory) -> Result<Vec<Slot>, KvmError> {
    let mut slots = Vec::new();
    for (id, region) in memory.layout().iter().filter(|(_, region)| region.len > 0) {
        let window = memory.window(id).filter(|window| window.len as u64 >= region.len).ok_or_else(|| {
            KvmError::Config(format!("region {:?} is not mapped in this process; KVM needs its address", region.name))
        })?;
        append_slots(&mut slots, id, region, window.start.as_ptr() as u64);
    }
    Ok(slots)
}

fn append_slots(slots: &mut Vec<Slot>, id: RegionId, region: &Region, host_address: u64) {
    let mut first_page = 0;
    while first_page < region.page_count() {
        let pages = (region.page_count() - first_page).min(MAX_SLOT_PAGES);
        let offset = first_page * PAGE_SIZE as u64;
        slots.push(Slot {
            number: slots.len() as u32,
            region: id,
            first_page,
            pages,
            travels: region.transfer == Transfer::Copy,
            guest_address: region.guest_address + offset,
            host_address: host_address + offset,
        });
        first_page += pages;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_region_larger_than_a_slot_becomes_slots_that_join_exactly() {
        let pages = 2 * MAX_SLOT_PAGES + 5;
        let region = Region::ram("huge", 1 << 40, pages * 4096);
        let mut slots = Vec::new();
        append_slots(&mut slots, RegionId(3), &region, 1 << 44);
        assert_eq!(slots.iter().map(|slot| slot.number).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!(slots.iter().map(|slot| slot.pages).sum::<u64>(), pages);
        for pair in slots.windows(2) {
            assert_eq!(pair[1].first_page, pair[0].first_page + pair[0].pages);
            assert_eq!(pair[1].guest_address, pair[0].guest_address + pair[0].pages * 4096);
            assert_eq!(pair[1].host_address - (1 << 44), pair[1].guest_address - (1 << 40));
            assert_eq!(pair[1].first_page % 64, 0);
        }
    }
}
