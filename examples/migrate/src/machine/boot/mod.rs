//! Puts a kernel into fresh guest memory, and what it must find there: its command line, its
//! initial RAM disk, the memory map and the processor table.
//!
//! Two ways in. PVH (an ELF note names a 32-bit entry point): our payload, and Linux's `vmlinux`.
//! The 64-bit Linux protocol: bzImages, and ELF kernels without that note.

mod linux64;
mod mp_table;
mod pvh;
mod registers;

use std::borrow::Cow;
use std::io::Cursor;

use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader, KernelLoaderResult};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};

pub(crate) use mp_table::MAX_VCPUS;
pub(super) use registers::Entry;

use super::error::MachineError;
use super::ram::{HOLE_END, HOLE_START};
use crate::payload;
use crate::workload::params::Params;

/// First address above the BIOS area: kernels are loaded from here on.
const HIGH_MEMORY: u64 = 0x10_0000;
/// End of the memory below the BIOS area.
const LOW_MEMORY_END: u64 = 0x9_fc00;
const COMMAND_LINE: u64 = 0x2_0000;
/// Linux reads no more than this, its ending zero included.
const COMMAND_LINE_MAX: usize = 2048;
/// bzImages say how far up they look for an initial RAM disk; ELF kernels manage the same.
const INITRD_MAX: u64 = 0x7fff_ffff;

/// What a guest does.
#[derive(Debug, Clone)]
pub(crate) enum Boots {
    /// Our own program, told to work like this; vCPU count and clock speed are filled in.
    Payload(Params),
    /// A kernel of the user's.
    Image(BootImage),
}

impl Boots {
    pub(super) fn image(self, vcpus: u32, tsc_khz: u32) -> BootImage {
        match self {
            Self::Image(image) => image,
            Self::Payload(params) => {
                let command_line = Params { vcpus, tsc_khz, ..params }.to_string();
                BootImage { kernel: Cow::Borrowed(payload::IMAGE), initrd: None, command_line }
            }
        }
    }
}

/// What a guest starts from.
#[derive(Clone)]
pub(crate) struct BootImage {
    /// An ELF kernel (with a PVH entry or for the 64-bit Linux protocol), or a bzImage.
    pub(crate) kernel: Cow<'static, [u8]>,
    /// An initial RAM disk.
    pub(crate) initrd: Option<Vec<u8>>,
    /// The kernel's command line.
    pub(crate) command_line: String,
}

impl std::fmt::Debug for BootImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (kernel, initrd) = (self.kernel.len(), self.initrd.as_ref().map(Vec::len));
        write!(f, "BootImage(kernel of {kernel} bytes, initrd {initrd:?}, {:?})", self.command_line)
    }
}

/// Why a guest cannot boot from an image.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    /// Neither an ELF file nor a bzImage.
    #[error("the kernel is neither a 64-bit ELF file nor a bzImage (it starts with {start:02x?})")]
    UnknownFormat { start: Vec<u8> },
    /// The loader refused it.
    #[error("the kernel cannot be loaded: {0}; is the guest's memory large enough for it?")]
    Load(#[from] linux_loader::loader::Error),
    /// Only its 32-bit or 16-bit entry could be used.
    #[error("this bzImage has no 64-bit entry point; only 64-bit kernels can be booted")]
    Not64Bit,
    /// The initial RAM disk does not fit.
    #[error(
        "the initial RAM disk of {bytes} bytes does not fit above the kernel, which ends at {kernel_end:#x}; give the guest more memory"
    )]
    InitrdTooLarge { bytes: u64, kernel_end: u64 },
    /// The command line does not fit.
    #[error("the kernel command line has {bytes} bytes; at most {most} are read")]
    CommandLineTooLong { bytes: usize, most: usize },
    /// More processors than the table has room for.
    #[error("{vcpus} vCPUs are not possible; 1 to {most} are")]
    VcpuCount { vcpus: u32, most: u32 },
    /// The boot parameters lie outside memory.
    #[error("cannot write boot parameters to guest memory: {0}")]
    Parameters(#[from] linux_loader::configurator::Error),
    /// A boot structure lies outside memory.
    #[error("cannot write boot structures to guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Where an initial RAM disk was put.
#[derive(Clone, Copy)]
struct Placed {
    address: u64,
    len: u64,
}

/// Loads an image for a guest of `vcpus` vCPUs into its fresh memory; says how its first vCPU starts.
pub(super) fn load(
    memory: &GuestMemoryMmap,
    ram_bytes: u64,
    vcpus: u8,
    image: &BootImage,
) -> Result<Entry, MachineError> {
    Ok(load_image(memory, ram_bytes, vcpus, image)?)
}

fn load_image(memory: &GuestMemoryMmap, ram_bytes: u64, vcpus: u8, image: &BootImage) -> Result<Entry, BootError> {
    let kernel = load_kernel(memory, &image.kernel)?;
    let initrd = match &image.initrd {
        Some(bytes) => Some(place_initrd(memory, ram_bytes, kernel.kernel_end, bytes)?),
        None => None,
    };
    write_command_line(memory, &image.command_line)?;
    memory.write_slice(&mp_table::build(vcpus)?, GuestAddress(mp_table::ADDRESS))?;
    let map = memory_map(ram_bytes);
    if let PvhBootCapability::PvhEntryPresent(entry) = kernel.pvh_boot_cap {
        pvh::write(memory, &map, initrd)?;
        return Ok(Entry::Pvh { entry: entry.raw_value(), start_info: pvh::START_INFO });
    }
    let entry = linux64::entry(&kernel)?;
    linux64::write(memory, &map, initrd, kernel.setup_header)?;
    let (boot_params, page_table, segment_table) = (linux64::BOOT_PARAMS, linux64::PAGE_TABLE, linux64::SEGMENT_TABLE);
    Ok(Entry::Linux64 { entry, boot_params, page_table, segment_table })
}

fn load_kernel(memory: &GuestMemoryMmap, kernel: &[u8]) -> Result<KernelLoaderResult, BootError> {
    let mut file = Cursor::new(kernel);
    let above = Some(GuestAddress(HIGH_MEMORY));
    if kernel.starts_with(b"\x7fELF") {
        Ok(Elf::load(memory, None, &mut file, above)?)
    } else if kernel.get(0x202..0x206) == Some(b"HdrS") {
        Ok(BzImage::load(memory, None, &mut file, above)?)
    } else {
        Err(BootError::UnknownFormat { start: kernel.iter().copied().take(4).collect() })
    }
}

/// As high as guests look for it, so that the kernel has room to unpack below.
fn place_initrd(memory: &GuestMemoryMmap, ram_bytes: u64, kernel_end: u64, bytes: &[u8]) -> Result<Placed, BootError> {
    let len = bytes.len() as u64;
    let top = ram_bytes.min(HOLE_START).min(INITRD_MAX);
    let address = top.saturating_sub(len) & !0xfff;
    if address < kernel_end {
        return Err(BootError::InitrdTooLarge { bytes: len, kernel_end });
    }
    memory.write_slice(bytes, GuestAddress(address))?;
    Ok(Placed { address, len })
}

fn write_command_line(memory: &GuestMemoryMmap, line: &str) -> Result<(), BootError> {
    if line.len() >= COMMAND_LINE_MAX {
        return Err(BootError::CommandLineTooLong { bytes: line.len(), most: COMMAND_LINE_MAX - 1 });
    }
    let mut bytes = line.as_bytes().to_vec();
    bytes.push(0);
    Ok(memory.write_slice(&bytes, GuestAddress(COMMAND_LINE))?)
}

/// A run of the guest's address space as the firmware of a PC would report it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct MapEntry {
    address: u64,
    len: u64,
    kind: u32,
}

const KIND_RAM: u32 = 1;
const KIND_RESERVED: u32 = 2;

fn memory_map(ram_bytes: u64) -> Vec<MapEntry> {
    let run = |start: u64, end: u64, kind| MapEntry { address: start, len: end.saturating_sub(start), kind };
    let low_end = ram_bytes.min(HOLE_START);
    let mut map = vec![
        run(0, LOW_MEMORY_END, KIND_RAM),
        run(mp_table::ADDRESS, HIGH_MEMORY, KIND_RESERVED),
        run(HIGH_MEMORY, low_end, KIND_RAM),
    ];
    if ram_bytes > low_end {
        map.push(run(HOLE_END, HOLE_END + ram_bytes - low_end, KIND_RAM));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(ram_bytes: u64) -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), ram_bytes as usize)]).unwrap()
    }

    fn image(kernel: &[u8]) -> BootImage {
        BootImage { kernel: kernel.to_vec().into(), initrd: None, command_line: String::new() }
    }

    #[test]
    fn the_memory_map_has_all_ram_but_the_bios_area() {
        let ram = |bytes| memory_map(bytes).iter().filter(|run| run.kind == KIND_RAM).map(|run| run.len).sum::<u64>();
        assert_eq!(ram(256 << 20), (256 << 20) - (HIGH_MEMORY - LOW_MEMORY_END));
        assert_eq!(ram(8 << 30), (8 << 30) - (HIGH_MEMORY - LOW_MEMORY_END));
        assert_eq!(memory_map(8 << 30).last().map(|run| run.address), Some(HOLE_END));
    }

    #[test]
    fn what_is_no_kernel_is_refused_by_its_first_bytes() {
        let error = load_image(&memory(8 << 20), 8 << 20, 1, &image(b"#!/bin/sh")).err().unwrap();
        assert!(error.to_string().contains("[23, 21, 2f, 62]"), "{error}");
    }

    #[test]
    fn a_ram_disk_that_reaches_into_the_kernel_is_refused() {
        let memory = memory(16 << 20);
        let placed = place_initrd(&memory, 16 << 20, 4 << 20, &[7; 5000]).unwrap();
        assert_eq!((placed.address, placed.len), ((16 << 20) - 8192, 5000));
        assert!(place_initrd(&memory, 16 << 20, 15 << 20, &vec![0; 1 << 20]).is_ok());
        assert!(place_initrd(&memory, 16 << 20, 15 << 20, &vec![0; (1 << 20) + 1]).is_err());
        assert!(place_initrd(&memory, 16 << 20, 15 << 20, &vec![0; 32 << 20]).is_err());
    }

    #[test]
    fn a_command_line_that_would_be_cut_is_refused() {
        let memory = memory(8 << 20);
        assert!(write_command_line(&memory, &"x".repeat(COMMAND_LINE_MAX - 1)).is_ok());
        assert!(write_command_line(&memory, &"x".repeat(COMMAND_LINE_MAX)).is_err());
    }
}
