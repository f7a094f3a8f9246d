//! What the 64-bit Linux boot protocol asks for: the "zero page" of boot parameters, and page
//! tables that map the first 4 GiB to themselves.

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::KernelLoaderResult;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

use super::{BootError, COMMAND_LINE, MapEntry, Placed};

/// Where the boot parameters lie; the first vCPU starts with this in RSI.
pub(super) const BOOT_PARAMS: u64 = 0x7000;
/// The top-level page table, followed by one of the next level and four of 2 MiB pages.
pub(super) const PAGE_TABLE: u64 = 0x9000;

/// A descriptor table with the segments that the protocol names (code 0x10, data 0x18).
pub(super) const SEGMENT_TABLE: u64 = 0x500;
const SEGMENTS: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// Offset of a bzImage's 64-bit entry point from where it was loaded, and the flag that says it has one.
const ENTRY_64_OFFSET: u64 = 0x200;
const XLF_KERNEL_64: u16 = 1;

pub(super) fn entry(kernel: &KernelLoaderResult) -> Result<u64, BootError> {
    match kernel.setup_header {
        None => Ok(kernel.kernel_load.raw_value()),
        Some(header) if header.xloadflags & XLF_KERNEL_64 != 0 => Ok(kernel.kernel_load.raw_value() + ENTRY_64_OFFSET),
        Some(_) => Err(BootError::Not64Bit),
    }
}

pub(super) fn write(
    memory: &GuestMemoryMmap,
    map: &[MapEntry],
    initrd: Option<Placed>,
    header: Option<setup_header>,
) -> Result<(), BootError> {
    let mut params = boot_params { hdr: header.unwrap_or_else(elf_header), ..boot_params::default() };
    params.hdr.type_of_loader = 0xff; // "unknown", for loaders without a number of their own
    params.hdr.cmd_line_ptr = COMMAND_LINE as u32;
    if let Some(initrd) = initrd {
        params.hdr.ramdisk_image = initrd.address as u32;
        params.hdr.ramdisk_size = initrd.len as u32;
    }
    for (slot, run) in params.e820_table.iter_mut().zip(map) {
        *slot = boot_e820_entry { addr: run.address, size: run.len, r#type: run.kind };
    }
    params.e820_entries = map.len() as u8;
    LinuxBootConfigurator::write_bootparams(&BootParams::new(&params, GuestAddress(BOOT_PARAMS)), memory)?;
    memory.write_slice(&SEGMENTS.map(u64::to_le_bytes).concat(), GuestAddress(SEGMENT_TABLE))?;
    write_page_tables(memory)
}

/// What a bzImage would bring itself.
fn elf_header() -> setup_header {
    setup_header { boot_flag: 0xaa55, header: 0x5372_6448, kernel_alignment: 0x0100_0000, ..setup_header::default() }
}

fn write_page_tables(memory: &GuestMemoryMmap) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    const TABLE: u64 = 4096;
    let third = PAGE_TABLE + TABLE;
    let second = third + TABLE;
    memory.write_obj(third | PRESENT_WRITABLE, GuestAddress(PAGE_TABLE))?;
    for gib in 0..4u64 {
        memory.write_obj((second + gib * TABLE) | PRESENT_WRITABLE, GuestAddress(third + gib * 8))?;
    }
    for page in 0..4 * 512u64 {
        memory.write_obj((page << 21) | PRESENT_WRITABLE | LARGE, GuestAddress(second + page * 8))?;
    }
    Ok(())
}
