//! A place for a guest to arrive at.

use std::io;
use std::sync::Arc;

use pageferry::memory::{GuestMemory, Layout};
use pageferry::vm::{DestinationVm, VmResult};
use pageferry_kvm::{DirtyLogMode, Host, MachineConfig};

use super::boot::{BootError, MAX_VCPUS};
use super::description::{Description, GuestBacking, State};
use super::error::MachineError;
use super::guest::{ConsoleEnds, Guest, GuestHandle, map_memory};
use super::source::LiveGuest;
use super::{ram, room};

/// What the operator of a destination decides.
#[derive(Debug, Default)]
pub(crate) struct ArrivalConfig {
    /// Most guest memory to make room for; `None` for what the host has.
    pub(crate) max_memory: Option<u64>,
    /// What the guest's memory is made of here; `None` for the same as at the source.
    pub(crate) backing: Option<GuestBacking>,
    /// Touch all memory before the first page comes.
    pub(crate) prefault: bool,
    /// Where the guest's console leads from here on.
    pub(crate) console: ConsoleEnds,
    /// How writes are tracked, should the guest migrate on.
    pub(crate) dirty_log: DirtyLogMode,
}

/// A place for one guest.
#[derive(Debug)]
pub(crate) struct ArrivingGuest {
    config: ArrivalConfig,
    guest: Option<Guest>,
}

impl ArrivingGuest {
    /// An empty place.
    pub(crate) fn new(config: ArrivalConfig) -> Self {
        Self { config, guest: None }
    }

    /// Shows the guest, once there is one.
    pub(crate) fn handle(&self) -> Option<GuestHandle> {
        self.guest.as_ref().map(Guest::handle)
    }

    /// The guest that has arrived, ready to be migrated on; `None` when none has.
    pub(crate) fn into_live(self) -> Option<LiveGuest> {
        let mode = self.config.dirty_log;
        self.guest.map(|guest| LiveGuest::new(guest, mode))
    }

    fn make_room(&mut self, description: &Description, layout: &Layout) -> Result<Guest, MachineError> {
        let host = Host::open()?;
        let machine = MachineConfig::from_bytes(&description.machine)?;
        if !(1..=u32::from(MAX_VCPUS)).contains(&machine.vcpus) {
            return Err(BootError::VcpuCount { vcpus: machine.vcpus, most: MAX_VCPUS.into() }.into());
        }
        let expected = ram::layout(description.ram_bytes)?;
        if expected != *layout {
            return Err(MachineError::invalid("memory layout", &"it is not one of this program's"));
        }
        let backing = self.config.backing.unwrap_or(description.backing);
        room::check(description.ram_bytes, backing.into(), self.config.max_memory)?;
        let memory = map_memory(expected, backing)?;
        if self.config.prefault {
            let bytes = description.ram_bytes;
            memory.prefault().map_err(|source| MachineError::Map { bytes, backing: backing.name(), source })?;
        }
        let guest = Guest::new(&host, machine, memory, backing, std::mem::take(&mut self.config.console))?;
        description.check_clock(&guest)?;
        Ok(guest)
    }

    fn guest(&self) -> Result<&Guest, MachineError> {
        self.guest.as_ref().ok_or(MachineError::NotPrepared)
    }
}

impl DestinationVm for ArrivingGuest {
    fn prepare(&mut self, config: &[u8], layout: &Layout) -> VmResult<Arc<dyn GuestMemory>> {
        let guest = self.make_room(&Description::read(config)?, layout)?;
        let memory = Arc::clone(guest.machine.memory());
        self.guest = Some(guest);
        Ok(memory)
    }

    fn load(&mut self, state: &mut dyn io::Read) -> VmResult<()> {
        let state = State::read(state)?;
        Ok(self.guest()?.load(state)?)
    }

    fn commit(&mut self, run: bool) -> VmResult<()> {
        let guest = self.guest()?;
        if run {
            guest.resume()?;
        }
        Ok(())
    }

    fn abort(&mut self) {
        self.guest = None;
    }
}
