//! A small PC: a machine under KVM with its devices, at the source or at the destination.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::sync::Arc;

use pageferry::memory::{GuestMemory, Layout, MappedMemory};
use pageferry_kvm::{Host, KvmError, Machine, MachineConfig};
use serde::{Deserialize, Serialize};

use super::console::Interrupt;
use super::description::{GuestBacking, State};
use super::devices::Devices;
use super::error::MachineError;
use super::handle::GuestHandle;
use super::input::Input;
use super::room;

/// The interrupt line of COM1.
const SERIAL_LINE: u32 = 4;

/// Where the guest's serial console leads.
#[derive(Default)]
pub(crate) struct ConsoleEnds {
    /// Takes every byte that the guest prints, as it comes.
    pub(crate) output: Option<Box<dyn Write + Send>>,
    /// What is typed to the guest: a terminal or a pipe.
    pub(crate) input: Option<File>,
}

impl std::fmt::Debug for ConsoleEnds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ConsoleEnds").field("input", &self.input).finish_non_exhaustive()
    }
}

/// What a guest is that KVM does not need to know.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Kind {
    pub(super) backing: GuestBacking,
    /// Our own payload, which answers questions.
    pub(super) payload: bool,
}

/// A guest's machine and devices in this process.
#[derive(Debug)]
pub(super) struct Pc {
    // Fields are dropped in this order: nobody may type into a machine that is gone.
    input: Option<Input>,
    pub(super) machine: Machine,
    pub(super) devices: Arc<Devices>,
    pub(super) kind: Kind,
}

impl Pc {
    /// A guest that does not run yet.
    pub(super) fn new(
        host: &Host,
        config: MachineConfig,
        memory: Arc<dyn GuestMemory>,
        kind: Kind,
        console: ConsoleEnds,
    ) -> Result<Self, MachineError> {
        let mut machine = Machine::new(host, config, memory)?;
        let interrupt = Interrupt(Some(machine.irq_line(SERIAL_LINE)));
        let devices = Arc::new(Devices::new(interrupt, console.output));
        machine.start(Arc::clone(&devices) as _)?;
        let input = console.input.map(|file| Input::start(file.as_fd(), Arc::clone(&devices))).transpose()?;
        Ok(Self { input, machine, devices, kind })
    }

    pub(super) fn handle(&self) -> GuestHandle {
        GuestHandle::new(&self.devices, self.kind.payload, self.machine.memory().layout().page_count())
    }

    pub(super) fn resume(&self) -> Result<(), KvmError> {
        self.machine.resume()?;
        self.input.iter().for_each(Input::open);
        Ok(())
    }

    pub(super) fn pause(&self) -> Result<(), KvmError> {
        self.input.iter().for_each(Input::close);
        self.machine.pause()
    }

    pub(super) fn save(&self) -> Result<State, KvmError> {
        Ok(State { machine: self.machine.save()?, devices: self.devices.save() })
    }

    /// Devices come last: they raise interrupts at controllers that have their state by then.
    pub(super) fn load(&self, state: State) -> Result<(), MachineError> {
        self.machine.load(&state.machine)?;
        self.devices.load(state.devices)
    }
}

/// Maps a guest's memory, and touches all of it when asked to.
///
/// Huge pages are always touched: the host promises none before, and ends a process that touches one it does not have.
pub(super) fn map_memory(
    layout: Layout,
    backing: GuestBacking,
    prefault: bool,
) -> Result<Arc<MappedMemory>, MachineError> {
    let bytes = layout.regions().iter().map(|region| region.len).sum();
    let failed = |source| MachineError::Map { bytes, backing: backing.name(), source };
    let huge = backing == GuestBacking::HugePages2M;
    if huge {
        room::check(bytes, backing.into(), room::Allowance::default())?;
    }
    let memory = MappedMemory::new(layout, backing.into()).map_err(failed)?;
    if huge || prefault {
        memory.prefault().map_err(failed)?;
    }
    Ok(Arc::new(memory))
}
