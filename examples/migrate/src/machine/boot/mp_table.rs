//! The table that tells a guest of its processors and how interrupt lines reach them (Intel
//! MultiProcessor Specification 1.4). Much smaller than ACPI, and all that a guest needs that
//! finds its devices at fixed ports.

use super::BootError;

/// Where the table lies: in the BIOS area, one of the places that guests search.
pub(super) const ADDRESS: u64 = 0xf_0000;

/// Local and I/O interrupt controllers answer here, as KVM's do.
const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;

/// Interrupt lines of the ISA bus; line `n` ends at pin `n` of the I/O interrupt controller.
const ISA_LINES: u8 = 16;

/// APIC ids are bytes here; 255 means "all".
pub(crate) const MAX_VCPUS: u8 = 254;

const SPECIFICATION_1_4: u8 = 4;
const APIC_VERSION: u8 = 0x14;
const ISA_BUS: u8 = 0;
const ALL_APICS: u8 = 255;

mod entry {
    pub(super) const PROCESSOR: u8 = 0;
    pub(super) const BUS: u8 = 1;
    pub(super) const IO_APIC: u8 = 2;
    pub(super) const IO_INTERRUPT: u8 = 3;
    pub(super) const LOCAL_INTERRUPT: u8 = 4;
}

mod interrupt {
    pub(super) const VECTORED: u8 = 0;
    pub(super) const NMI: u8 = 1;
    pub(super) const EXTERNAL: u8 = 3;
}

/// The bytes to put at [`ADDRESS`]: the pointer that guests search for, then the table.
pub(super) fn build(vcpus: u8) -> Result<Vec<u8>, BootError> {
    if vcpus == 0 || vcpus > MAX_VCPUS {
        return Err(BootError::VcpuCount { vcpus: u32::from(vcpus), most: u32::from(MAX_VCPUS) });
    }
    let io_apic_id = vcpus;
    let mut entries = Entries::default();
    (0..vcpus).for_each(|id| entries.processor(id));
    entries.push(entry::BUS, &[ISA_BUS, b'I', b'S', b'A', b' ', b' ', b' ']);
    entries.push(entry::IO_APIC, &io_apic(io_apic_id));
    (0..ISA_LINES).for_each(|line| entries.interrupt(entry::IO_INTERRUPT, interrupt::VECTORED, line, io_apic_id, line));
    entries.interrupt(entry::LOCAL_INTERRUPT, interrupt::EXTERNAL, 0, ALL_APICS, 0);
    entries.interrupt(entry::LOCAL_INTERRUPT, interrupt::NMI, 0, ALL_APICS, 1);
    let mut bytes = floating_pointer(ADDRESS as u32 + 16);
    bytes.extend(entries.into_table());
    Ok(bytes)
}

fn io_apic(id: u8) -> [u8; 7] {
    let [a, b, c, d] = IO_APIC.to_le_bytes();
    [id, APIC_VERSION, 1, a, b, c, d]
}

fn floating_pointer(table: u32) -> Vec<u8> {
    let mut bytes = b"_MP_".to_vec();
    bytes.extend(table.to_le_bytes());
    bytes.extend([1, SPECIFICATION_1_4, 0, 0, 0, 0, 0, 0]);
    bytes[10] = checksum(&bytes);
    bytes
}

#[derive(Default)]
struct Entries {
    bytes: Vec<u8>,
    count: u16,
}

impl Entries {
    fn push(&mut self, kind: u8, body: &[u8]) {
        self.bytes.push(kind);
        self.bytes.extend(body);
        self.count += 1;
    }

    fn processor(&mut self, id: u8) {
        const ENABLED: u8 = 1;
        const BOOT_PROCESSOR: u8 = 2;
        // Family and features: guests ask CPUID.
        let mut body = [0; 19];
        body[0] = id;
        body[1] = APIC_VERSION;
        body[2] = ENABLED | if id == 0 { BOOT_PROCESSOR } else { 0 };
        self.push(entry::PROCESSOR, &body);
    }

    /// Polarity and trigger (the two zeros) are the ISA bus's own: active high, edge.
    fn interrupt(&mut self, entry: u8, kind: u8, line: u8, apic: u8, pin: u8) {
        self.push(entry, &[kind, 0, 0, ISA_BUS, line, apic, pin]);
    }

    fn into_table(self) -> Vec<u8> {
        const HEADER: usize = 44;
        const CHECKSUM_AT: usize = 7;
        let mut table = b"PCMP".to_vec();
        table.extend(((HEADER + self.bytes.len()) as u16).to_le_bytes());
        table.extend([SPECIFICATION_1_4, 0]);
        table.extend(b"FERRY   MIGRATE     ");
        table.extend([0; 6]);
        table.extend(self.count.to_le_bytes());
        table.extend(LOCAL_APIC.to_le_bytes());
        table.extend([0; 4]);
        table.extend(self.bytes);
        table[CHECKSUM_AT] = checksum(&table);
        table
    }
}

/// What makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pointer_and_table_sum_to_zero_and_say_their_length() {
        for vcpus in [1, 2, 254] {
            let bytes = build(vcpus).unwrap();
            let (pointer, table) = bytes.split_at(16);
            assert_eq!(checksum(pointer), 0);
            assert_eq!(checksum(table), 0);
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
            assert_eq!(table.len(), 44 + 20 * usize::from(vcpus) + 8 * (1 + 1 + 16 + 2));
            assert!(ADDRESS + bytes.len() as u64 <= 0x10_0000);
        }
    }

    #[test]
    fn counts_that_do_not_fit_are_refused() {
        assert!(build(0).is_err());
        assert!(build(255).is_err());
    }
}
