//! A guest that runs here and may be migrated away.

use std::io;
use std::sync::Arc;

use pageferry::dirty::DirtySource;
use pageferry::memory::GuestMemory;
use pageferry::vm::{SourceVm, VmResult};
use pageferry_kvm::{DirtyLog, DirtyLogMode, Host, Machine, MachineConfig};

use super::boot::{self, BootError, Boots, Entry, MAX_VCPUS};
use super::description::{Description, GuestBacking};
use super::error::MachineError;
use super::handle::GuestHandle;
use super::pc::{ConsoleEnds, Kind, Pc, map_memory};
use super::ram;

/// Bytes of machine state: interrupt controllers and console, then each vCPU with its XSAVE area, local APIC and MSRs.
const STATE_SHARED: u64 = 3 << 10;
const STATE_PER_VCPU: u64 = 12 << 10;

/// A guest to boot.
#[derive(Debug)]
pub(crate) struct GuestConfig {
    /// Bytes of memory; a multiple of 4096.
    pub(crate) ram_bytes: u64,
    /// How many vCPUs, 1 to 254.
    pub(crate) vcpus: u32,
    /// What its memory is made of.
    pub(crate) backing: GuestBacking,
    /// What it boots.
    pub(crate) boots: Boots,
    /// Where its console leads.
    pub(crate) console: ConsoleEnds,
    /// How writes to its memory are tracked.
    pub(crate) dirty_log: DirtyLogMode,
}

/// A guest that runs here.
#[derive(Debug)]
pub(crate) struct LiveGuest {
    pc: Pc,
    dirty: DirtyLog,
}

impl LiveGuest {
    /// Makes a guest and loads what it boots; [`resume`](SourceVm::resume) then starts it.
    pub(crate) fn boot(config: GuestConfig) -> Result<Self, MachineError> {
        ram::check_size(config.ram_bytes, matches!(config.boots, Boots::Payload(_)))?;
        let host = Host::open()?;
        let most = u32::from(MAX_VCPUS);
        let vcpus = u8::try_from(config.vcpus).ok().filter(|&count| (1..=MAX_VCPUS).contains(&count));
        let vcpus = vcpus.ok_or(BootError::VcpuCount { vcpus: config.vcpus, most })?;
        let memory = map_memory(ram::layout(config.ram_bytes)?, config.backing, false)?;
        let machine = MachineConfig::new(&host, config.vcpus);
        let kind = Kind { backing: config.backing, payload: matches!(config.boots, Boots::Payload(_)) };
        let pc = Pc::new(&host, machine, memory, kind, config.console)?;
        let image = config.boots.image(config.vcpus, pc.machine.config().tsc_khz.unwrap_or(0));
        let entry = boot::load(&ram::loader_view(&**pc.machine.memory())?, config.ram_bytes, vcpus, &image)?;
        enter(&pc.machine, entry)?;
        Ok(Self::new(pc, config.dirty_log))
    }

    pub(super) fn new(pc: Pc, mode: DirtyLogMode) -> Self {
        let dirty = pc.machine.dirty_log(mode);
        Self { pc, dirty }
    }

    /// Shows the guest to others.
    pub(crate) fn handle(&self) -> GuestHandle {
        self.pc.handle()
    }
}

fn enter(machine: &Machine, entry: Entry) -> Result<(), MachineError> {
    let vcpu = machine.vcpu(0)?;
    let mut special = vcpu.get_sregs().map_err(MachineError::Registers)?;
    entry.enter(&mut special);
    vcpu.set_sregs(&special).map_err(MachineError::Registers)?;
    vcpu.set_regs(&entry.registers()).map_err(MachineError::Registers)
}

impl SourceVm for LiveGuest {
    fn memory(&self) -> Arc<dyn GuestMemory> {
        Arc::clone(self.pc.machine.memory()) as _
    }

    fn dirty(&mut self) -> &mut dyn DirtySource {
        &mut self.dirty
    }

    fn describe(&mut self, out: &mut dyn io::Write) -> VmResult<()> {
        if let Some(end) = self.handle().ended() {
            return Err(MachineError::Ended(end).into());
        }
        Ok(Description::of(&self.pc).write(out)?)
    }

    fn is_running(&self) -> bool {
        self.pc.machine.is_running()
    }

    fn pause(&mut self) -> VmResult<()> {
        Ok(self.pc.pause()?)
    }

    fn resume(&mut self) -> VmResult<()> {
        Ok(self.pc.resume()?)
    }

    fn throttle(&mut self, percent: u8) -> VmResult<()> {
        Ok(self.pc.machine.throttle(percent)?)
    }

    fn save(&mut self, out: &mut dyn io::Write) -> VmResult<()> {
        Ok(self.pc.save()?.write(out)?)
    }

    fn state_bytes_estimate(&self) -> u64 {
        STATE_SHARED + STATE_PER_VCPU * u64::from(self.pc.machine.config().vcpus)
    }
}
