//! What a PVH kernel is handed: a start info block with the memory map, the modules and the command line.

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::{BootError, COMMAND_LINE, MapEntry, Placed};

/// Where the block lies; the first vCPU starts with this in EBX.
pub(super) const START_INFO: u64 = 0x6000;
const MODULES: u64 = 0x6100;
const MEMORY_MAP: u64 = 0x6200;

const MAGIC: u32 = 0x336e_c578;

pub(super) fn write(memory: &GuestMemoryMmap, map: &[MapEntry], initrd: Option<Placed>) -> Result<(), BootError> {
    let start_info = hvm_start_info {
        magic: MAGIC,
        version: 1,
        nr_modules: u32::from(initrd.is_some()),
        modlist_paddr: if initrd.is_some() { MODULES } else { 0 },
        cmdline_paddr: COMMAND_LINE,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..hvm_start_info::default()
    };
    let mut params = BootParams::new(&start_info, GuestAddress(START_INFO));
    let map: Vec<_> = map.iter().map(|run| table_entry(*run)).collect();
    params.set_sections(&map, GuestAddress(MEMORY_MAP));
    if let Some(initrd) = initrd {
        let module = hvm_modlist_entry { paddr: initrd.address, size: initrd.len, ..hvm_modlist_entry::default() };
        params.set_modules(&[module], GuestAddress(MODULES));
    }
    Ok(PvhBootConfigurator::write_bootparams(&params, memory)?)
}

fn table_entry(run: MapEntry) -> hvm_memmap_table_entry {
    hvm_memmap_table_entry { addr: run.address, size: run.len, type_: run.kind, reserved: 0 }
}
