//! The CPU that a guest sees: what is offered to it, and whether another host can give it the same.

mod names;

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use crate::error::KvmError;
use crate::host::Features;

const SVM: u32 = 1 << 2;
const VMX: u32 = 1 << 5;
const TSC_DEADLINE: u32 = 1 << 24;
const OSXSAVE: u32 = 1 << 27;
const HYPERVISOR: u32 = 1 << 31;
const HYPER_THREADING: u32 = 1 << 28;
const OSPKE: u32 = 1 << 4;

/// Adds what KVM can do but leaves to the VMM to announce.
pub(crate) fn complete(supported: &mut [kvm_cpuid_entry2], features: Features) {
    for entry in supported.iter_mut().filter(|entry| entry.function == 1) {
        entry.ecx |= HYPERVISOR | if features.tsc_deadline { TSC_DEADLINE } else { 0 };
    }
}

/// The CPU that a guest gets when nobody chooses: everything the host has but nested virtualisation,
/// in one package with a core per vCPU.
pub(crate) fn default_for(supported: &[kvm_cpuid_entry2], vcpus: u32) -> Vec<kvm_cpuid_entry2> {
    let kept = supported.iter().filter(|entry| !matches!(entry.function, 0xb | 0x1f));
    let mut cpuid: Vec<_> = kept.copied().collect();
    for entry in &mut cpuid {
        simplify(entry, vcpus);
    }
    if supported.iter().any(|entry| entry.function == 0xb) {
        cpuid.extend(topology(vcpus));
    }
    cpuid
}

fn simplify(entry: &mut kvm_cpuid_entry2, vcpus: u32) {
    let others = vcpus.saturating_sub(1);
    match entry.function {
        1 => {
            entry.ecx &= !VMX;
            entry.ebx = entry.ebx & 0x0000_ffff | vcpus.min(255) << 16;
            entry.edx = entry.edx & !HYPER_THREADING | if others > 0 { HYPER_THREADING } else { 0 };
        }
        // Caches: who shares them (bits 14 to 25; here only the third level is shared), and on Intel
        // the cores of the package (bits 26 to 31).
        4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
            let sharing = if entry.eax >> 5 & 7 >= 3 { others.min(0xfff) } else { 0 };
            let cores = if entry.function == 4 { others.min(0x3f) } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14 | cores << 26;
        }
        0x8000_0001 => entry.ecx &= !SVM,
        0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | others.min(0xff),
        _ => {}
    }
}

/// Leaf 0xb: a thread per core, all cores in one package.
fn topology(vcpus: u32) -> [kvm_cpuid_entry2; 2] {
    let bits = vcpus.next_power_of_two().trailing_zeros();
    let level = |index, kind: u32, shift, count| kvm_cpuid_entry2 {
        function: 0xb,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: kind << 8 | index,
        ..Default::default()
    };
    [level(0, 1, 0, 1), level(1, 2, bits, vcpus)]
}

/// A machine's CPUID for one of its vCPUs: with its APIC id.
pub(crate) fn for_vcpu(cpuid: &[kvm_cpuid_entry2], apic_id: u32) -> Result<CpuId, KvmError> {
    let mut entries = cpuid.to_vec();
    for entry in &mut entries {
        match entry.function {
            1 => entry.ebx = entry.ebx & 0x00ff_ffff | apic_id << 24,
            0xb | 0x1f => entry.edx = apic_id,
            0x8000_001e => (entry.eax, entry.ebx) = (apic_id, entry.ebx & !0xff | apic_id & 0xff),
            _ => {}
        }
    }
    CpuId::from_entries(&entries)
        .map_err(|_| KvmError::Config(format!("{} CPUID entries are more than KVM takes", entries.len())))
}

/// What a guest sees that `host` does not offer, one thing each, in words: leaf, register, bit, and
/// the usual name where it has one. Empty when the guest can run there.
pub fn missing_features(guest: &[kvm_cpuid_entry2], host: &[kvm_cpuid_entry2]) -> Vec<String> {
    let mut missing = Vec::new();
    missing.extend(other_vendor(guest, host));
    missing.extend(narrower_addresses(guest, host));
    for entry in guest {
        let offered = find(host, entry.function, entry.index).copied().unwrap_or_default();
        if entry.function == 0xd && entry.index >= 2 && entry.eax != 0 {
            missing.extend(other_save_area(entry, &offered));
        }
        for register in names::REGISTERS {
            let lacking = register.of(entry) & !register.of(&offered) & names::feature_mask(entry, register);
            missing.extend(bits(lacking).map(|bit| names::describe(entry, register, bit)));
        }
    }
    missing
}

/// Refuses a guest that sees what `host` does not offer.
pub(crate) fn require(guest: &[kvm_cpuid_entry2], host: &[kvm_cpuid_entry2]) -> Result<(), KvmError> {
    let missing = missing_features(guest, host);
    if missing.is_empty() { Ok(()) } else { Err(KvmError::Cpu(missing)) }
}

/// Whether a guest is offered to be a host itself.
pub(crate) fn has_nested_virtualisation(cpuid: &[kvm_cpuid_entry2]) -> bool {
    let bits = |function| find(cpuid, function, 0).map_or(0, |entry| entry.ecx);
    bits(1) & VMX != 0 || bits(0x8000_0001) & SVM != 0
}

fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> Option<&kvm_cpuid_entry2> {
    entries.iter().find(|entry| entry.function == function && entry.index == index)
}

fn bits(value: u32) -> impl Iterator<Item = u32> {
    (0..32).filter(move |bit| value >> bit & 1 == 1)
}

fn vendor(entries: &[kvm_cpuid_entry2]) -> Option<String> {
    let leaf = find(entries, 0, 0)?;
    let bytes = [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat();
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

fn other_vendor(guest: &[kvm_cpuid_entry2], host: &[kvm_cpuid_entry2]) -> Option<String> {
    let (guest, host) = (vendor(guest)?, vendor(host)?);
    (guest != host).then(|| format!("a CPU of {guest:?} (this one is of {host:?})"))
}

fn narrower_addresses(guest: &[kvm_cpuid_entry2], host: &[kvm_cpuid_entry2]) -> Vec<String> {
    let sizes = |entries| find(entries, 0x8000_0008, 0).map_or(0, |leaf| leaf.eax);
    let (guest, host) = (sizes(guest), sizes(host));
    [("physical", 0), ("linear", 8)]
        .into_iter()
        .map(|(kind, shift)| (kind, guest >> shift & 0xff, host >> shift & 0xff))
        .filter(|(_, guest, host)| guest > host)
        .map(|(kind, guest, host)| format!("{kind} addresses of {guest} bits (this host has {host})"))
        .collect()
}

/// A guest's XSAVE instructions write where its CPUID says: each part must lie in the same place.
fn other_save_area(guest: &kvm_cpuid_entry2, host: &kvm_cpuid_entry2) -> Option<String> {
    let place = |entry: &kvm_cpuid_entry2| (entry.eax, entry.ebx);
    let lacks_it = host.eax == 0;
    (!lacks_it && place(guest) != place(host)).then(|| {
        let (size, offset) = place(guest);
        format!("XSAVE component {} at offset {offset} with {size} bytes (here {:?})", guest.index, place(host))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    #[test]
    fn a_host_that_offers_everything_misses_nothing() {
        let host = [leaf(1, 0, [0, 0, !0, !0]), leaf(7, 0, [0, !0, !0, !0]), leaf(0x8000_0008, 0, [0x302e, 0, 0, 0])];
        assert_eq!(missing_features(&host, &host), Vec::<String>::new());
        assert_eq!(missing_features(&[], &host), Vec::<String>::new());
    }

    #[test]
    fn missing_bits_are_named_with_leaf_register_and_bit() {
        let guest = [leaf(1, 0, [0, 0, 1 << 25, 0]), leaf(7, 0, [0, 1 << 5 | 1 << 13, 0, 0])];
        let host = [leaf(1, 0, [0; 4]), leaf(7, 0, [0; 4])];
        let missing = missing_features(&guest, &host);
        assert_eq!(missing, ["AES (leaf 0x1 ECX bit 25)", "AVX2 (leaf 0x7 EBX bit 5)", "leaf 0x7 EBX bit 13"]);
        assert_eq!(missing_features(&guest, &[]).len(), 3, "an absent leaf offers nothing");
    }

    #[test]
    fn bits_that_follow_the_guest_itself_do_not_count() {
        let guest = [leaf(1, 0, [0xffff, 0xff00_0000, OSXSAVE, HYPER_THREADING]), leaf(7, 0, [9, 0, OSPKE, 0])];
        assert_eq!(missing_features(&guest, &[leaf(1, 0, [0; 4])]), Vec::<String>::new());
    }

    #[test]
    fn vendor_address_width_and_save_area_must_fit() {
        let words = |text: &[u8; 12]| {
            let word = |at: usize| u32::from_le_bytes([text[at], text[at + 1], text[at + 2], text[at + 3]]);
            leaf(0, 0, [1, word(0), word(8), word(4)])
        };
        let guest = [words(b"GenuineIntel"), leaf(0x8000_0008, 0, [0x392e, 0, 0, 0]), leaf(0xd, 9, [8, 2688, 0, 0])];
        let host = [words(b"AuthenticAMD"), leaf(0x8000_0008, 0, [0x3930, 0, 0, 0]), leaf(0xd, 9, [8, 2432, 0, 0])];
        let missing = missing_features(&guest, &host);
        assert_eq!(missing.len(), 2, "{missing:?}");
        assert!(missing[0].contains("GenuineIntel") && missing[0].contains("AuthenticAMD"));
        assert!(missing[1].contains("component 9 at offset 2688"));
        let back = missing_features(&host, &guest);
        assert!(
            back.iter().any(|thing| thing.contains("physical addresses of 48 bits (this host has 46)")),
            "{back:?}"
        );
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id_in_every_leaf_that_tells_it() {
        let supported = [
            leaf(1, 0, [0, 0x0102_0800, VMX, 0]),
            leaf(4, 3, [0x0400_4163, 0, 0, 0]),
            leaf(0xb, 0, [0, 0, 0, 1]),
            leaf(0x8000_0001, 0, [0, 0, SVM, 0]),
        ];
        let cpuid = default_for(&supported, 3);
        let third = for_vcpu(&cpuid, 2).unwrap();
        let third = third.as_slice();
        assert_eq!(find(third, 1, 0).unwrap().ebx, 0x0203_0800);
        assert_eq!((find(third, 1, 0).unwrap().ecx, find(third, 0x8000_0001, 0).unwrap().ecx), (0, 0));
        assert_eq!(find(third, 4, 3).unwrap().eax, 2 << 26 | 2 << 14 | 0x163);
        let core = find(third, 0xb, 1).unwrap();
        assert_eq!((core.eax, core.ebx, core.ecx, core.edx), (2, 3, 0x201, 2));
    }
}
