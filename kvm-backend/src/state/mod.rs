//! Machine state: everything that a paused guest consists of besides its memory.
//!
//! The bytes begin with a magic number and a version. CPUID and TSC frequency are not in them: they
//! belong to the [`MachineConfig`](crate::MachineConfig), with which the destination has made its
//! machine, and checked it, before the first page came.

mod machine;
mod msrs;
mod vcpu;

pub(crate) use msrs::MsrList;
pub(crate) use vcpu::{Knowledge, MAX_MSRS};

use serde::{Deserialize, Serialize};

use crate::config::MAX_VCPUS;
use crate::error::KvmError;
use crate::packed::{AtMost, Format};
use crate::vcpu::Vcpu;
use crate::vm::Vm;
use machine::SharedState;
use vcpu::VcpuState;

const FORMAT: Format = Format { what: "the machine's state", magic: *b"PFKVMSTA", version: 1 };

#[derive(Serialize, Deserialize)]
struct MachineState {
    shared: SharedState,
    vcpus: AtMost<VcpuState, { MAX_VCPUS as usize }>,
}

/// Reads the state of a machine whose vCPUs are paused.
pub(crate) fn save(vm: &Vm, vcpus: &[Vcpu], knowledge: &Knowledge) -> Result<Vec<u8>, KvmError> {
    let shared = SharedState::save(&vm.fd)?;
    let saved: Result<_, KvmError> =
        vcpus.iter().map(|vcpu| VcpuState::save(&*vcpu.paused()?, vcpu.index, knowledge)).collect();
    Ok(FORMAT.pack(&MachineState { shared, vcpus: AtMost(saved?) }))
}

/// Writes a state into a machine whose vCPUs have never run.
pub(crate) fn load(vm: &Vm, vcpus: &[Vcpu], knowledge: &Knowledge, bytes: &[u8]) -> Result<(), KvmError> {
    let state: MachineState = FORMAT.unpack(bytes).map_err(KvmError::State)?;
    let AtMost(states) = state.vcpus;
    if states.len() != vcpus.len() {
        let (theirs, ours) = (states.len(), vcpus.len());
        return Err(KvmError::State(format!("it is of {theirs} vCPUs, this machine has {ours}")));
    }
    for (state, vcpu) in states.iter().zip(vcpus) {
        state.load(&*vcpu.paused()?, vcpu.index, knowledge)?;
    }
    state.shared.load(&vm.fd)
}
