//! The state of what all vCPUs share: interrupt controllers, timer chip and clock.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip, kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use crate::error::{KvmError, call};
use crate::packed::Exact;

const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// What all vCPUs share.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct SharedState {
    chips: [Exact<kvm_irqchip>; 3],
    pit: Exact<kvm_pit_state2>,
    clock: Exact<kvm_clock_data>,
}

impl SharedState {
    /// Reads the state; the clock first, so that it stands as near as can be to the pause.
    pub(crate) fn save(vm: &VmFd) -> Result<Self, KvmError> {
        let clock = vm.get_clock().map_err(call("reading the guest's clock"))?;
        let mut chips = CHIPS.map(|chip_id| Exact(kvm_irqchip { chip_id, ..Default::default() }));
        for Exact(chip) in &mut chips {
            vm.get_irqchip(chip).map_err(call(format!("reading interrupt controller {}", chip.chip_id)))?;
        }
        let pit = vm.get_pit2().map_err(call("reading the timer chip"))?;
        Ok(Self { chips, pit: Exact(pit), clock: Exact(clock) })
    }

    /// Writes the state, after that of the vCPUs: the IOAPIC delivers what waits in it, and a local
    /// APIC that is written later would forget it. The timer follows the controllers it raises. The
    /// clock comes last and goes on from where it stood: the time of the move has not passed for the guest.
    pub(crate) fn load(&self, vm: &VmFd) -> Result<(), KvmError> {
        for (Exact(chip), expected) in self.chips.iter().zip(CHIPS) {
            if chip.chip_id != expected {
                return Err(KvmError::State(format!("interrupt controller {} in place of {expected}", chip.chip_id)));
            }
            vm.set_irqchip(chip).map_err(call(format!("writing interrupt controller {expected}")))?;
        }
        vm.set_pit2(&self.pit.0).map_err(call("writing the timer chip"))?;
        let clock = kvm_clock_data { clock: self.clock.0.clock, ..Default::default() };
        vm.set_clock(&clock).map_err(call("writing the guest's clock"))
    }
}
