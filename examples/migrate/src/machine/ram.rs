//! Where the guest's memory lies: from address 0, with a hole below 4 GiB that belongs to the
//! interrupt controllers, and the rest from 4 GiB on, as on every PC.
#![allow(unsafe_code)]

use pageferry::memory::{GuestMemory, Layout, Region};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::error::MachineError;

/// Where the hole for memory-mapped devices starts (3 GiB) ...
pub(super) const HOLE_START: u64 = 0xc000_0000;
/// ... and ends.
pub(super) const HOLE_END: u64 = 1 << 32;

/// Least memory of a guest: boot tables, a payload, and room to work in.
const MIN_RAM: u64 = 4 << 20;

/// Most memory that the payload can map: 512 GiB of addresses, the hole among them.
const PAYLOAD_MAX: u64 = (512 << 30) - (HOLE_END - HOLE_START);

/// Refuses an amount of memory that no guest can have, or the payload cannot.
pub(crate) fn check_size(ram_bytes: u64, payload: bool) -> Result<(), MachineError> {
    layout(ram_bytes)?;
    if payload && ram_bytes > PAYLOAD_MAX {
        return Err(MachineError::PayloadMemory { bytes: ram_bytes, most: PAYLOAD_MAX });
    }
    Ok(())
}

/// The layout of a guest with this much memory.
pub(crate) fn layout(ram_bytes: u64) -> Result<Layout, MachineError> {
    if ram_bytes < MIN_RAM || !ram_bytes.is_multiple_of(4096) {
        return Err(MachineError::MemorySize { bytes: ram_bytes, least: MIN_RAM });
    }
    let low = ram_bytes.min(HOLE_START);
    let mut regions = vec![Region::ram("low", 0, low)];
    if ram_bytes > low {
        regions.push(Region::ram("high", HOLE_END, ram_bytes - low));
    }
    Layout::new(regions).map_err(MachineError::from)
}

/// The same memory as the kernel loader knows it.
pub(super) fn loader_view(memory: &dyn GuestMemory) -> Result<GuestMemoryMmap, MachineError> {
    let regions = memory.layout().iter().filter_map(|(id, region)| {
        let window = memory.window(id)?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the window is a live mapping of `memory`; the view is used while `memory` is
        // borrowed by the caller and dropped before it, and it does not unmap what it did not map.
        let raw = unsafe {
            MmapRegion::build_raw(
                window.start.as_ptr(),
                window.len,
                protection,
                libc::MAP_PRIVATE | libc::MAP_NORESERVE,
            )
        };
        Some(raw.map(|raw| GuestRegionMmap::new(raw, GuestAddress(region.guest_address))))
    });
    let regions = regions.collect::<Result<Option<Vec<_>>, _>>().map_err(MachineError::loader)?;
    GuestMemoryMmap::from_regions(regions.unwrap_or_default()).map_err(MachineError::loader)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn regions(ram_bytes: u64) -> Vec<(u64, u64)> {
        let layout = layout(ram_bytes).unwrap();
        layout.regions().iter().map(|region| (region.guest_address, region.len)).collect()
    }

    #[test]
    fn memory_goes_round_the_hole_below_4_gib() {
        assert_eq!(regions(256 << 20), [(0, 256 << 20)]);
        assert_eq!(regions(3 << 30), [(0, 3 << 30)]);
        assert_eq!(regions(5 << 30), [(0, 3 << 30), (4 << 30, 2 << 30)]);
    }

    #[test]
    fn sizes_that_cannot_boot_are_refused_with_the_least_one() {
        let error = layout(1 << 20).unwrap_err().to_string();
        assert!(error.contains("4 MiB"), "{error}");
        assert!(layout((256 << 20) + 1).is_err());
        let error = check_size(512 << 30, true).unwrap_err().to_string();
        assert!(error.contains("511 GiB"), "{error}");
        assert!(check_size(512 << 30, false).is_ok() && check_size(511 << 30, true).is_ok());
    }
}
