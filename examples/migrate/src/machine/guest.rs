//! A guest with its machine and devices, whichever side it is on, and the handle that shows it to others.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;
use std::sync::{Arc, Weak};

use crossbeam_channel::Receiver;
use pageferry::memory::{Layout, MappedMemory};
use pageferry_kvm::kvm_ioctls::Cap;
use pageferry_kvm::{Host, KvmError, Machine, MachineConfig};

use super::console::Interrupt;
use super::description::{GuestBacking, State};
use super::devices::Devices;
use super::error::MachineError;
use super::input::Input;
use super::watch::{Beat, GuestLine, Watch};

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

/// Shows a guest, and passes it commands. Clones show the same one; they do not keep it alive.
#[derive(Clone, Debug)]
pub(crate) struct GuestHandle {
    machine: Weak<Machine>,
    devices: Arc<Devices>,
    watch: Arc<Watch>,
}

impl GuestHandle {
    /// Every line that the guest prints from now on, until it ends.
    pub(crate) fn lines(&self) -> Receiver<GuestLine> {
        self.watch.listen()
    }

    /// The payload's last heartbeat.
    pub(crate) fn last_beat(&self) -> Option<Beat> {
        self.watch.last_beat()
    }

    /// Leaves a command for the payload, which looks for one every few milliseconds while it runs.
    pub(crate) fn command(&self, command: u32) {
        self.devices.command(command);
    }

    /// Whether the guest runs here now.
    pub(crate) fn is_running(&self) -> bool {
        self.machine.upgrade().is_some_and(|machine| machine.is_running())
    }

    /// How the guest ended, if it did: a crash or a switch-off, not a migration.
    pub(crate) fn ended(&self) -> Option<String> {
        self.watch.end()
    }
}

/// A guest in this process.
#[derive(Debug)]
pub(super) struct Guest {
    // Fields are dropped in this order: nobody may type into a machine that is gone.
    input: Option<Input>,
    pub(super) machine: Arc<Machine>,
    pub(super) devices: Arc<Devices>,
    watch: Arc<Watch>,
    pub(super) backing: GuestBacking,
    /// Speed of the time stamp counter; 0 when KVM does not say.
    pub(super) tsc_khz: u32,
}

impl Guest {
    /// A guest that does not run yet.
    pub(super) fn new(
        host: &Host,
        config: MachineConfig,
        memory: Arc<MappedMemory>,
        backing: GuestBacking,
        console: ConsoleEnds,
    ) -> Result<Self, MachineError> {
        let mut machine = Machine::new(host, config, memory)?;
        let watch = Arc::new(Watch::default());
        let interrupt = Interrupt(Some(machine.irq_line(SERIAL_LINE)));
        let devices = Arc::new(Devices::new(interrupt, console.output, Arc::clone(&watch)));
        machine.start(Arc::clone(&devices) as _)?;
        let input = console.input.map(|file| Input::start(file.as_fd(), Arc::clone(&devices))).transpose()?;
        let tsc_khz = machine.vcpu(0)?.get_tsc_khz().unwrap_or(0);
        Ok(Self { input, machine: Arc::new(machine), devices, watch, backing, tsc_khz })
    }

    pub(super) fn handle(&self) -> GuestHandle {
        GuestHandle {
            machine: Arc::downgrade(&self.machine),
            devices: Arc::clone(&self.devices),
            watch: Arc::clone(&self.watch),
        }
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

    /// Whether KVM can give a guest a clock of another speed than the host's.
    pub(super) fn can_scale_clock(&self) -> bool {
        self.machine.vm_fd().check_extension(Cap::TscControl)
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

/// Maps a guest's memory.
pub(super) fn map_memory(layout: Layout, backing: GuestBacking) -> Result<Arc<MappedMemory>, MachineError> {
    let bytes = layout.regions().iter().map(|region| region.len).sum();
    let memory = MappedMemory::new(layout, backing.into());
    memory.map(Arc::new).map_err(|source| MachineError::Map { bytes, backing: backing.name(), source })
}
