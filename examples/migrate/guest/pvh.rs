//! What the loader left for us: the PVH start info (Xen's `hvm_start_info`), its memory map and command line.

use core::ffi::{CStr, c_char};
use core::ops::Range;
use core::slice;

const MAGIC: u32 = 0x336e_c578;
const USABLE: u32 = 1;

/// Xen's `hvm_start_info`, version 1.
#[repr(C)]
pub(crate) struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    module_count: u32,
    modules: u64,
    command_line: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

/// Xen's `hvm_memmap_table_entry`.
#[repr(C)]
struct MapEntry {
    address: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

impl StartInfo {
    /// The start info at the address that the loader passed.
    ///
    /// # Safety
    ///
    /// `address` must be the one the PVH entry got; the memory must not have been changed since.
    pub(crate) unsafe fn at(address: u64) -> &'static Self {
        // SAFETY: the convention puts the structure there.
        let info = unsafe { &*(address as *const Self) };
        assert!(info.magic == MAGIC && info.version >= 1, "no PVH start info with a memory map");
        info
    }

    /// The command line; empty if there is none.
    pub(crate) fn command_line(&self) -> &'static str {
        if self.command_line == 0 {
            return "";
        }
        // SAFETY: the convention puts a zero-terminated string there.
        let line = unsafe { CStr::from_ptr(self.command_line as *const c_char) };
        line.to_str().expect("the command line is text")
    }

    /// All RAM.
    pub(crate) fn ram(&self) -> impl Iterator<Item = Range<u64>> {
        // SAFETY: the convention puts so many entries there.
        let map =
            unsafe { slice::from_raw_parts(self.memory_map as *const MapEntry, self.memory_map_entries as usize) };
        map.iter().filter(|entry| entry.kind == USABLE).map(|entry| entry.address..entry.address + entry.size)
    }
}
