//! Model-specific registers: which of them make up a vCPU's state, and how they are moved.
//!
//! The list is made once, when the machine is made, by trying on a fresh vCPU which registers can be
//! read and written back. Saving is then one call per 256 registers, with nothing to find out while
//! the guest stands still.

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use crate::error::{KvmError, call};

const IA32_TSC: u32 = 0x10;
const IA32_TSC_DEADLINE: u32 = 0x6e0;
const IA32_MCG_CAP: u32 = 0x179;
const IA32_MC0_CTL: u32 = 0x400;
const MSR_KVM_WALL_CLOCK: u32 = 0x11;
const MSR_KVM_WALL_CLOCK_NEW: u32 = 0x4b56_4d00;

/// Memory-type range registers: part of the state, but missing in KVM's list.
const MTRRS: [u32; 28] = [
    0x200, 0x201, 0x202, 0x203, 0x204, 0x205, 0x206, 0x207, 0x208, 0x209, 0x20a, 0x20b, 0x20c, 0x20d, 0x20e, 0x20f,
    0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f, 0x2ff,
];

/// The MSRs that make up a vCPU's state on this host, the TSC deadline last: it can be set only when the TSC and
/// the local APIC are as they were.
#[derive(Clone, Debug)]
pub(crate) struct MsrList {
    indices: Vec<u32>,
    /// Those that are not zero in a vCPU that has not run.
    preset: Vec<u32>,
}

impl MsrList {
    /// Tries out which MSRs of `candidates`, and of those that KVM does not list, a vCPU has. It must
    /// have its CPUID, and must not have run yet.
    pub(crate) fn probe(vcpu: &VcpuFd, candidates: &[u32]) -> Result<Self, KvmError> {
        let banks = read_one(vcpu, IA32_MCG_CAP).map_or(0, |value| value as u32 & 0xff);
        let machine_checks = IA32_MC0_CTL..IA32_MC0_CTL + 4 * banks;
        let mut indices: Vec<u32> = candidates.iter().copied().chain(MTRRS).chain(machine_checks).collect();
        indices.sort_unstable();
        indices.dedup();
        indices.retain(|&index| !is_left_out(index));
        indices.sort_by_key(|&index| index == IA32_TSC_DEADLINE);
        let readable = readable(vcpu, &indices)?;
        let indices = writable(vcpu, &readable)?;
        let preset = readable.iter().filter(|msr| msr.data != 0 && indices.contains(&msr.index));
        Ok(Self { preset: preset.map(|msr| msr.index).collect(), indices })
    }

    /// The MSRs that a destination must have: where one is missing, its value can never be taken over.
    pub(crate) fn preset(&self) -> &[u32] {
        &self.preset
    }

    /// Refuses a source's preset MSRs if this host does not have them all.
    pub(crate) fn require(&self, preset: &[u32]) -> Result<(), KvmError> {
        let missing = preset.iter().filter(|index| !self.indices.contains(index));
        let missing: Vec<_> = missing.map(|index| format!("MSR {index:#x}")).collect();
        if missing.is_empty() { Ok(()) } else { Err(KvmError::Cpu(missing)) }
    }

    /// Reads all of them.
    pub(crate) fn read(&self, vcpu: &VcpuFd, index: u32) -> Result<Vec<kvm_msr_entry>, KvmError> {
        let mut values = Vec::with_capacity(self.indices.len());
        for chunk in self.indices.chunks(KVM_MAX_MSR_ENTRIES) {
            let mut msrs = entries(chunk.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }))?;
            let read = vcpu.get_msrs(&mut msrs).map_err(call(format!("reading the MSRs of vCPU {index}")))?;
            if let Some(&failed) = chunk.get(read) {
                return Err(KvmError::State(format!("MSR {failed:#x} of vCPU {index} can no longer be read")));
            }
            values.extend_from_slice(msrs.as_slice());
        }
        Ok(values)
    }
}

/// Writes the MSRs of a vCPU in the order given. One that this host does not have is an error that
/// names it, unless the guest left it at zero.
pub(crate) fn write(vcpu: &VcpuFd, index: u32, values: &[kvm_msr_entry]) -> Result<(), KvmError> {
    let mut rest = values;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
        let msrs = entries(chunk.iter().copied())?;
        let written = vcpu.set_msrs(&msrs).map_err(call(format!("writing the MSRs of vCPU {index}")))?;
        rest = &rest[written.min(chunk.len())..];
        if written < chunk.len() {
            let refused = rest[0];
            if refused.data != 0 {
                let (msr, value) = (refused.index, refused.data);
                return Err(KvmError::State(format!("this host refuses MSR {msr:#x} = {value:#x} of vCPU {index}")));
            }
            rest = &rest[1..];
        }
    }
    Ok(())
}

/// Writing these has an effect of its own: KVM puts the host's time into guest memory.
fn is_left_out(index: u32) -> bool {
    matches!(index, MSR_KVM_WALL_CLOCK | MSR_KVM_WALL_CLOCK_NEW)
}

fn read_one(vcpu: &VcpuFd, index: u32) -> Option<u64> {
    let mut msrs = entries([kvm_msr_entry { index, ..Default::default() }].into_iter()).ok()?;
    (vcpu.get_msrs(&mut msrs) == Ok(1)).then(|| msrs.as_slice()[0].data)
}

/// Reads as many as KVM can at a time; the one it stops at is not there.
fn readable(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let mut found = Vec::new();
    let mut rest = indices;
    while !rest.is_empty() {
        let chunk = &rest[..rest.len().min(KVM_MAX_MSR_ENTRIES)];
        let mut msrs = entries(chunk.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }))?;
        let read = vcpu.get_msrs(&mut msrs).map_err(call("trying which MSRs can be read"))?.min(chunk.len());
        found.extend_from_slice(&msrs.as_slice()[..read]);
        let absent = usize::from(read < chunk.len());
        rest = &rest[read + absent..];
    }
    Ok(found)
}

/// Writes back what was read; the one that KVM stops at cannot be written. The TSC goes unwritten: it
/// would come late.
fn writable(vcpu: &VcpuFd, values: &[kvm_msr_entry]) -> Result<Vec<u32>, KvmError> {
    let mut found = Vec::new();
    for value in values {
        let msrs = entries([*value].into_iter())?;
        let written =
            value.index == IA32_TSC || vcpu.set_msrs(&msrs).map_err(call("trying which MSRs can be written"))? == 1;
        if written {
            found.push(value.index);
        }
    }
    Ok(found)
}

fn entries(values: impl Iterator<Item = kvm_msr_entry>) -> Result<Msrs, KvmError> {
    let values: Vec<_> = values.collect();
    Msrs::from_entries(&values).map_err(|_| KvmError::State("more MSRs than KVM takes at once".to_owned()))
}
