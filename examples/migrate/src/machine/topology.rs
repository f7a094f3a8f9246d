//! How CPUID tells a guest which of its vCPUs belong together: all are cores of one socket.
//!
//! KVM's list of supported entries describes the host's own sockets and cores; a guest that believed it would
//! look for the wrong siblings.

use pageferry_kvm::kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

const FEATURES: u32 = 1;
const CACHES: u32 = 4;
const EXTENDED_TOPOLOGY: [u32; 2] = [0xb, 0x1f];
const AMD_FEATURES: u32 = 0x8000_0001;
const AMD_SIZES: u32 = 0x8000_0008;
const AMD_CACHES: u32 = 0x8000_001d;
const AMD_TOPOLOGY: u32 = 0x8000_001e;

/// Bit of ECX in [`AMD_FEATURES`]: "the last two leaves above are there".
const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;

/// Describes `vcpus` cores of one socket.
pub(super) fn set(cpuid: &mut Vec<kvm_cpuid_entry2>, vcpus: u32) {
    let has_extended = cpuid.iter().any(|entry| entry.function == EXTENDED_TOPOLOGY[0]);
    cpuid.retain(|entry| {
        ![EXTENDED_TOPOLOGY[0], EXTENDED_TOPOLOGY[1], AMD_CACHES, AMD_TOPOLOGY].contains(&entry.function)
    });
    for entry in cpuid.iter_mut() {
        match entry.function {
            FEATURES => entry.ebx = entry.ebx & !0x00ff_0000 | vcpus.min(255) << 16,
            CACHES => share_caches(entry, vcpus),
            AMD_FEATURES => entry.ecx &= !TOPOLOGY_EXTENSIONS,
            AMD_SIZES => entry.ecx = id_bits(vcpus) << 12 | (vcpus.min(256) - 1),
            _ => {}
        }
    }
    if has_extended {
        cpuid.extend(levels(vcpus));
    }
}

/// Bits of an APIC id that tell cores apart.
fn id_bits(vcpus: u32) -> u32 {
    vcpus.next_power_of_two().trailing_zeros()
}

/// First and second level caches belong to one core, others to all.
fn share_caches(entry: &mut kvm_cpuid_entry2, vcpus: u32) {
    let level = entry.eax >> 5 & 7;
    let sharing = if level >= 3 { vcpus.min(4096) - 1 } else { 0 };
    let cores = vcpus.min(64) - 1;
    if entry.eax & 0x1f != 0 {
        entry.eax = entry.eax & 0x3fff | sharing << 14 | cores << 26;
    }
}

/// One thread a core, all cores in the socket, nothing above.
fn levels(vcpus: u32) -> [kvm_cpuid_entry2; 3] {
    const THREADS: u32 = 1;
    const CORES: u32 = 2;
    let level = |index, shift, count, kind| kvm_cpuid_entry2 {
        function: EXTENDED_TOPOLOGY[0],
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: kind << 8 | index,
        ..kvm_cpuid_entry2::default()
    };
    [level(0, 0, 1, THREADS), level(1, id_bits(vcpus), vcpus, CORES), level(2, 0, 0, 0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax: u32::MAX, ebx: u32::MAX, ecx: u32::MAX, ..Default::default() }
    }

    fn find(cpuid: &[kvm_cpuid_entry2], function: u32, index: u32) -> &kvm_cpuid_entry2 {
        cpuid.iter().find(|entry| entry.function == function && entry.index == index).unwrap()
    }

    #[test]
    fn every_leaf_tells_of_as_many_cores_in_one_socket() {
        let mut cpuid = vec![entry(1, 0), entry(4, 0), entry(0xb, 0), entry(0xb, 1), entry(0x8000_0008, 0)];
        set(&mut cpuid, 6);
        assert_eq!(find(&cpuid, 1, 0).ebx >> 16 & 0xff, 6);
        assert_eq!(find(&cpuid, 4, 0).eax >> 26, 5);
        assert_eq!((find(&cpuid, 0xb, 1).eax, find(&cpuid, 0xb, 1).ebx), (3, 6));
        assert_eq!(find(&cpuid, 0x8000_0008, 0).ecx, 3 << 12 | 5);
    }

    #[test]
    fn a_host_without_the_extended_leaf_gets_none() {
        let mut cpuid = vec![entry(1, 0), entry(0x8000_001e, 0)];
        set(&mut cpuid, 1);
        assert_eq!(cpuid.len(), 1);
    }
}
