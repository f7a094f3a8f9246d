//! The state in which a guest's first vCPU starts.

use pageferry_kvm::kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};

const CR0_PROTECTED: u64 = 1;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG_MODE: u64 = (1 << 8) | (1 << 10);
/// Bit 1 of the flags register always reads as one.
const FLAGS: u64 = 2;

const CODE: u8 = 0b1011;
const DATA: u8 = 0b0011;

/// How a loaded kernel wants to be entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// In 32-bit protected mode without paging.
    Pvh { entry: u64, start_info: u64 },
    /// In 64-bit mode.
    Linux64 { entry: u64, boot_params: u64, page_table: u64, segment_table: u64 },
}

impl Entry {
    /// General registers at the entry point.
    pub(crate) fn registers(self) -> kvm_regs {
        match self {
            Self::Pvh { entry, start_info } => {
                kvm_regs { rip: entry, rbx: start_info, rflags: FLAGS, ..kvm_regs::default() }
            }
            Self::Linux64 { entry, boot_params, .. } => {
                kvm_regs { rip: entry, rsi: boot_params, rflags: FLAGS, ..kvm_regs::default() }
            }
        }
    }

    /// Changes the special registers of a vCPU after reset.
    ///
    /// The task register stays as it was: a task state segment over the zeros at address 0, whose I/O bitmap
    /// lets user code reach all ports. Our payload works in ring 3, and not every KVM keeps its I/O privilege level.
    pub(crate) fn enter(self, special: &mut kvm_sregs) {
        let long = matches!(self, Self::Linux64 { .. });
        special.cs = segment(0x10, CODE, long);
        for data in [&mut special.ds, &mut special.es, &mut special.fs, &mut special.gs, &mut special.ss] {
            *data = segment(0x18, DATA, false);
        }
        special.cr0 = CR0_PROTECTED;
        special.cr4 = 0;
        if let Self::Linux64 { page_table, segment_table, .. } = self {
            special.gdt.base = segment_table;
            special.gdt.limit = 4 * 8 - 1;
            special.cr3 = page_table;
            special.cr4 = CR4_PAE;
            special.cr0 |= CR0_PAGING;
            special.efer |= EFER_LONG_MODE;
        }
    }
}

/// A flat segment over all addresses.
fn segment(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..kvm_segment::default()
    }
}
