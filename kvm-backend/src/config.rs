//! What a machine is made of besides its memory, in a form that travels to the destination before
//! any page does.

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use serde::{Deserialize, Serialize};

use crate::cpuid;
use crate::error::KvmError;
use crate::host::Host;
use crate::packed::{AtMost, Exact, Format};
use crate::state::MAX_MSRS;

const FORMAT: Format = Format { what: "a machine's configuration", magic: *b"PFKVMCFG", version: 2 };

/// Most vCPUs: APIC ids of 8 bits, of which 255 means all.
pub(crate) const MAX_VCPUS: u32 = 255;

/// What a machine is made of besides its memory. The destination must make one of the same
/// configuration before the guest's pages come.
#[derive(Clone, Debug, PartialEq)]
pub struct MachineConfig {
    /// How many vCPUs: 1 to 255.
    pub vcpus: u32,
    /// The CPUID entries of every vCPU; what differs between them (the APIC id) is filled in. Kept as
    /// they were chosen, not as KVM returns them: some hosts add bits of their own.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// The TSC's frequency in kHz; the host's own if `None`. Known in [`crate::Machine::config`].
    pub tsc_khz: Option<u32>,
    /// The CPUID entries as KVM has put them into force at the source, which may have added bits. Empty until the
    /// machine is made.
    pub(crate) cpuid_in_force: Vec<kvm_cpuid_entry2>,
    /// The MSRs that the destination must have. Empty until the machine is made.
    pub(crate) msrs: Vec<u32>,
}

#[derive(Serialize, Deserialize)]
struct Packed {
    vcpus: u32,
    tsc_khz: Option<u32>,
    cpuid: Entries,
    cpuid_in_force: Entries,
    msrs: AtMost<u32, MAX_MSRS>,
}

type Entries = AtMost<Exact<kvm_cpuid_entry2>, KVM_MAX_CPUID_ENTRIES>;

impl MachineConfig {
    /// As many vCPUs, with every CPU feature that the host can give (except nested virtualisation,
    /// whose state this crate does not migrate).
    pub fn new(host: &Host, vcpus: u32) -> Self {
        // More are refused later, with the right words.
        let cpuid = cpuid::default_for(host.supported_cpuid(), vcpus.min(MAX_VCPUS));
        Self { vcpus, cpuid, tsc_khz: None, cpuid_in_force: Vec::new(), msrs: Vec::new() }
    }

    /// Bytes for the destination, to go into `SourceVm::describe`. Take them from
    /// [`crate::Machine::config`], which knows more than the configuration that the machine was made from.
    pub fn to_bytes(&self) -> Vec<u8> {
        let packed = Packed {
            vcpus: self.vcpus,
            tsc_khz: self.tsc_khz,
            cpuid: pack(&self.cpuid),
            cpuid_in_force: pack(&self.cpuid_in_force),
            msrs: AtMost(self.msrs.clone()),
        };
        FORMAT.pack(&packed)
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote; the bytes come from the peer and are checked.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, KvmError> {
        let packed: Packed = FORMAT.unpack(bytes).map_err(KvmError::Config)?;
        Ok(Self {
            vcpus: packed.vcpus,
            tsc_khz: packed.tsc_khz,
            cpuid: unpack(packed.cpuid),
            cpuid_in_force: unpack(packed.cpuid_in_force),
            msrs: packed.msrs.0,
        })
    }

    /// Refuses what no machine on this host can be.
    pub(crate) fn check(&self, host: &Host) -> Result<(), KvmError> {
        let limit = host.features().max_vcpus.min(MAX_VCPUS);
        if self.vcpus == 0 || self.vcpus > limit {
            return Err(KvmError::Config(format!("{} vCPUs are not possible: 1 to {limit} are", self.vcpus)));
        }
        if cpuid::has_nested_virtualisation(&self.cpuid) {
            let refusal =
                "the guest's CPUID offers VMX or SVM: clear them, the state of nested guests does not migrate";
            return Err(KvmError::Config(refusal.to_owned()));
        }
        cpuid::require(&self.cpuid, host.supported_cpuid())
    }
}

fn pack(entries: &[kvm_cpuid_entry2]) -> Entries {
    AtMost(entries.iter().copied().map(Exact).collect())
}

fn unpack(entries: Entries) -> Vec<kvm_cpuid_entry2> {
    entries.0.into_iter().map(|Exact(entry)| entry).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_survives_its_journey_and_damage_does_not() {
        let entry = kvm_cpuid_entry2 { function: 7, ebx: 0x20, ..Default::default() };
        let config = MachineConfig {
            vcpus: 3,
            cpuid: vec![entry; 40],
            tsc_khz: Some(2_000_000),
            cpuid_in_force: vec![entry],
            msrs: vec![0x10, 0x277],
        };
        let bytes = config.to_bytes();
        assert_eq!(MachineConfig::from_bytes(&bytes).unwrap(), config);
        assert!((0..bytes.len()).all(|len| MachineConfig::from_bytes(&bytes[..len]).is_err()));
        let too_many = MachineConfig { cpuid: vec![entry; 300], ..config };
        assert!(MachineConfig::from_bytes(&too_many.to_bytes()).is_err());
    }
}
