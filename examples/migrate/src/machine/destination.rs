//! A place for a guest to arrive at.

use std::io;
use std::sync::Arc;

use pageferry::memory::{GuestMemory, Layout, MappedMemory};
use pageferry::vm::{DestinationVm, VmResult};
use pageferry_kvm::{Host, MachineConfig};

use super::boot::{BootError, MAX_VCPUS};
use super::description::{Description, GuestBacking, State};
use super::error::MachineError;
use super::handle::GuestHandle;
use super::pc::{ConsoleEnds, Kind, Pc, map_memory};
use super::{ram, room};

/// What the operator of a destination decides.
#[derive(Debug, Default)]
pub(crate) struct ArrivalConfig {
    /// How much guest memory to make room for.
    pub(crate) allowance: room::Allowance,
    /// What the guest's memory is made of here; `None` for the same as at the source.
    pub(crate) backing: Option<GuestBacking>,
    /// Touch all memory before the first page comes.
    pub(crate) prefault: bool,
    /// Memory that was handed over: the source's until `commit`, and not touched before.
    pub(crate) memory: Option<Arc<MappedMemory>>,
    /// Where the guest's console leads from here on.
    pub(crate) console: ConsoleEnds,
}

/// A place for one guest.
#[derive(Debug)]
pub(crate) struct ArrivingGuest {
    config: ArrivalConfig,
    pc: Option<Pc>,
    /// The state of a guest whose memory was handed over. KVM may write memory when it takes over a state, and must not yet.
    waiting: Option<State>,
    handed_over: bool,
}

impl ArrivingGuest {
    /// An empty place.
    pub(crate) fn new(config: ArrivalConfig) -> Self {
        let handed_over = config.memory.is_some();
        Self { config, pc: None, waiting: None, handed_over }
    }

    /// Shows the guest, once there is one.
    pub(crate) fn handle(&self) -> Option<GuestHandle> {
        self.pc.as_ref().map(Pc::handle)
    }

    /// The guest that has arrived, ready to be migrated on; `None` when none has.
    #[cfg(test)]
    pub(super) fn into_live(self) -> Option<super::LiveGuest> {
        self.pc.map(|pc| super::LiveGuest::new(pc, pageferry_kvm::DirtyLogMode::Best))
    }

    fn make_room(&mut self, description: &Description, layout: &Layout) -> Result<Pc, MachineError> {
        let host = Host::open()?;
        let machine = MachineConfig::from_bytes(&description.machine)?;
        if !(1..=u32::from(MAX_VCPUS)).contains(&machine.vcpus) {
            return Err(BootError::VcpuCount { vcpus: machine.vcpus, most: MAX_VCPUS.into() }.into());
        }
        let expected = ram::layout(description.ram_bytes)?;
        if expected != *layout {
            return Err(MachineError::invalid("memory layout", &"it is not one of this program's"));
        }
        let backing = self.config.backing.unwrap_or(description.kind.backing);
        let memory = match self.config.memory.take() {
            Some(memory) => memory,
            None => {
                room::check(description.ram_bytes, backing.into(), self.config.allowance)?;
                map_memory(expected, backing, self.config.prefault)?
            }
        };
        let kind = Kind { backing, ..description.kind };
        Pc::new(&host, machine, memory, kind, std::mem::take(&mut self.config.console))
    }

    fn pc(&self) -> Result<&Pc, MachineError> {
        self.pc.as_ref().ok_or(MachineError::NotPrepared)
    }
}

impl DestinationVm for ArrivingGuest {
    fn prepare(&mut self, config: &[u8], layout: &Layout) -> VmResult<Arc<dyn GuestMemory>> {
        let pc = self.make_room(&Description::read(config)?, layout)?;
        let memory = Arc::clone(pc.machine.memory());
        self.pc = Some(pc);
        Ok(memory)
    }

    fn load(&mut self, state: &mut dyn io::Read) -> VmResult<()> {
        let state = State::read(state)?;
        if self.handed_over {
            self.waiting = Some(state);
            return Ok(());
        }
        Ok(self.pc()?.load(state)?)
    }

    fn commit(&mut self, run: bool) -> VmResult<()> {
        let waiting = self.waiting.take();
        let pc = self.pc()?;
        if let Some(state) = waiting {
            pc.load(state)?;
        }
        if run {
            pc.resume()?;
        }
        Ok(())
    }

    fn abort(&mut self) {
        (self.pc, self.waiting) = (None, None);
    }
}
