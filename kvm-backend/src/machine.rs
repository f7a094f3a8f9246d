//! A virtual machine: memory slots, interrupt controllers, vCPUs, and what a migration asks of them.

use std::ops::Deref;
use std::sync::{Arc, MutexGuard};

use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::{VcpuFd, VmFd};
use pageferry::memory::MappedMemory;

use crate::dirty_log::{DirtyLog, DirtyLogMode};
use crate::error::KvmError;
use crate::exit::{Ending, ExitHandler};
use crate::host::Host;
use crate::host_writes::HostWrites;

/// What a machine is made of, besides its memory. The destination must make one of the same
/// configuration before the guest's pages come.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// How many vCPUs.
    pub vcpus: u32,
    /// The CPUID entries of every vCPU; what differs between them (the APIC id) is filled in.
    pub cpuid: Vec<kvm_cpuid_entry2>,
}

impl MachineConfig {
    /// As many vCPUs, with every CPU feature that the host can give (except nested virtualisation, whose state does
    /// not migrate).
    pub fn new(_host: &Host, _vcpus: u32) -> Self {
        todo!()
    }

    /// Bytes for the destination, to go into `SourceVm::describe`.
    pub fn to_bytes(&self) -> Vec<u8> {
        todo!()
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote; the bytes come from the peer and are checked.
    pub fn from_bytes(_bytes: &[u8]) -> Result<Self, KvmError> {
        todo!()
    }
}

/// A vCPU that does not run now: its registers can be read and written.
#[derive(Debug)]
pub struct PausedVcpu<'a>(MutexGuard<'a, VcpuFd>);

impl Deref for PausedVcpu<'_> {
    type Target = VcpuFd;

    fn deref(&self) -> &VcpuFd {
        &self.0
    }
}

/// An interrupt line of the machine's controllers. Clones drive the same line.
#[derive(Clone, Debug)]
pub struct IrqLine {}

impl IrqLine {
    /// Raises or lowers the line.
    pub fn set(&self, _active: bool) -> Result<(), KvmError> {
        todo!()
    }

    /// Raises and lowers the line: an edge.
    pub fn pulse(&self) -> Result<(), KvmError> {
        todo!()
    }
}

/// A virtual machine under KVM.
#[derive(Debug)]
pub struct Machine {}

impl Machine {
    /// Makes a machine over guest memory, refusing a configuration that this host cannot give
    /// ([`KvmError::Cpu`] names what is missing). The vCPUs are as after a reset: all but the first wait for the
    /// guest to start them.
    pub fn new(_host: &Host, _config: MachineConfig, _memory: Arc<MappedMemory>) -> Result<Self, KvmError> {
        todo!()
    }

    /// What it was made of.
    pub fn config(&self) -> &MachineConfig {
        todo!()
    }

    /// The guest's memory.
    pub fn memory(&self) -> &Arc<MappedMemory> {
        todo!()
    }

    /// The VM's descriptor, for irqfds, ioeventfds and the like.
    pub fn vm_fd(&self) -> &VmFd {
        todo!()
    }

    /// Where the VMM reports its own writes to guest memory.
    pub fn host_writes(&self) -> Arc<HostWrites> {
        todo!()
    }

    /// A tracker of writes to guest memory for a migration. One can track at a time.
    pub fn dirty_log(&self, _mode: DirtyLogMode) -> DirtyLog {
        todo!()
    }

    /// An interrupt line (a GSI; 0 to 23 are the pins of PIC and IOAPIC).
    pub fn irq_line(&self, _gsi: u32) -> IrqLine {
        todo!()
    }

    /// A vCPU's registers; an error while it runs.
    pub fn vcpu(&self, _index: u32) -> Result<PausedVcpu<'_>, KvmError> {
        todo!()
    }

    /// Starts the vCPU threads, parked. Call it once, before [`resume`](Self::resume); both before and after
    /// [`load`](Self::load) are fine.
    pub fn start(&mut self, _handler: Arc<dyn ExitHandler>) -> Result<(), KvmError> {
        todo!()
    }

    /// Runs the vCPUs.
    pub fn resume(&self) -> Result<(), KvmError> {
        todo!()
    }

    /// Stops the vCPUs. On return none runs and none has an unfinished I/O instruction.
    pub fn pause(&self) -> Result<(), KvmError> {
        todo!()
    }

    /// Whether the vCPUs were resumed and not paused since, and the guest has not ended.
    pub fn is_running(&self) -> bool {
        todo!()
    }

    /// How the guest ended, if it did.
    pub fn ended(&self) -> Option<Ending> {
        todo!()
    }

    /// Takes about `percent` (0 to 99) of the vCPUs' time away, in slices of some milliseconds; 0 ends it.
    pub fn throttle(&self, _percent: u8) -> Result<(), KvmError> {
        todo!()
    }

    /// The state of all vCPUs and of the machine; the vCPUs must be paused.
    pub fn save(&self) -> Result<Vec<u8>, KvmError> {
        todo!()
    }

    /// Takes over a state that [`save`](Self::save) wrote on a machine of the same configuration. The bytes come
    /// from the peer and are checked; after an error the machine must not run.
    pub fn load(&self, _state: &[u8]) -> Result<(), KvmError> {
        todo!()
    }
}
