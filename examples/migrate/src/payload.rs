//! The guest program that `migrate` boots, as `build.rs` compiled it from `guest/`.

/// An ELF file with a PVH entry.
pub(crate) const IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest.elf"));
