//! Everything the guest reaches by port I/O, and the state of it that migrates.

use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pageferry_kvm::{Ending, ExitHandler, Reaction};
use serde::{Deserialize, Serialize};

use super::console::{Console, ConsoleState, Interrupt};
use super::error::MachineError;
use super::ports;
use super::watch::Watch;

/// Longest rest a guest is granted at once: it also looks for commands when it wakes.
const REST_MAX: Duration = Duration::from_millis(100);

/// Commands that wait for the guest; more are a peer's invention.
const COMMANDS_MAX: usize = 64;

/// The devices of one guest.
pub(super) struct Devices {
    console: Mutex<Console>,
    commands: Mutex<VecDeque<u32>>,
    pub(super) watch: Arc<Watch>,
}

/// State of all devices: part of the machine state.
#[derive(Serialize, Deserialize, Debug, PartialEq, Eq)]
pub(super) struct DevicesState {
    pub(super) console: ConsoleState,
    commands: Vec<u32>,
    ready: bool,
    /// When the payload's heart last beat, by the host's wall clock.
    last_beat_ns: Option<u64>,
}

impl Devices {
    pub(super) fn new(interrupt: Interrupt, echo: Option<Box<dyn Write + Send>>) -> Self {
        let watch = Arc::<Watch>::default();
        let lines = Arc::clone(&watch);
        Self {
            console: Mutex::new(Console::new(interrupt, echo, Box::new(move |line| lines.line(line)))),
            commands: Mutex::default(),
            watch,
        }
    }

    /// Types into the console; says how many bytes it took.
    pub(super) fn type_in(&self, input: &[u8]) -> usize {
        lock(&self.console).receive(input)
    }

    /// Whether the console takes another byte of input.
    pub(super) fn has_input_room(&self) -> bool {
        lock(&self.console).has_input_room()
    }

    /// Leaves a command for the guest to pick up.
    pub(super) fn command(&self, command: u32) {
        lock(&self.commands).push_back(command);
    }

    pub(super) fn save(&self) -> DevicesState {
        DevicesState {
            console: lock(&self.console).save(),
            commands: lock(&self.commands).iter().copied().collect(),
            ready: self.watch.is_ready(),
            last_beat_ns: self.watch.last_beat_ns(),
        }
    }

    pub(super) fn load(&self, state: DevicesState) -> Result<(), MachineError> {
        if state.commands.len() > COMMANDS_MAX {
            return Err(MachineError::invalid("device state", &"too many commands wait"));
        }
        lock(&self.console).load(state.console)?;
        *lock(&self.commands) = state.commands.into();
        self.watch.set_ready(state.ready);
        self.watch.set_left(state.last_beat_ns);
        Ok(())
    }

    fn serial_out(&self, port: u16, data: &[u8]) {
        let mut console = lock(&self.console);
        let register = (port - ports::SERIAL.start()) as u8;
        for &byte in data {
            console.write(register, byte);
        }
    }

    fn serial_in(&self, port: u16, data: &mut [u8]) {
        let mut console = lock(&self.console);
        let register = (port - ports::SERIAL.start()) as u8;
        for byte in data {
            *byte = console.read(register);
        }
    }

    fn take_command(&self) -> u32 {
        lock(&self.commands).pop_front().unwrap_or(0)
    }
}

impl std::fmt::Debug for Devices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Devices").finish_non_exhaustive()
    }
}

impl ExitHandler for Devices {
    fn pio_out(&self, _vcpu: u32, port: u16, data: &[u8]) -> Reaction {
        match port {
            ports::BEAT => self.watch.beat(),
            ports::REST => return Reaction::Rest(Duration::from_micros(number(data).into()).min(REST_MAX)),
            ports::KEYBOARD if data[0] == ports::KEYBOARD_RESET => return Reaction::End,
            _ if ports::SERIAL.contains(&port) => self.serial_out(port, data),
            _ => {}
        }
        Reaction::Continue
    }

    fn pio_in(&self, _vcpu: u32, port: u16, data: &mut [u8]) -> Reaction {
        match port {
            ports::COMMAND => fill(data, self.take_command()),
            ports::KEYBOARD => data.fill(ports::KEYBOARD_STATUS),
            ports::CLOCK_DATA => data.fill(0),
            _ if ports::SERIAL.contains(&port) => self.serial_in(port, data),
            _ => data.fill(0xff),
        }
        Reaction::Continue
    }

    fn ended(&self, _vcpu: u32, ending: &Ending) {
        self.watch.ended(ending.to_string());
    }
}

/// The value of a port write of up to 32 bits.
fn number(data: &[u8]) -> u32 {
    data.iter().take(4).rev().fold(0, |value, &byte| value << 8 | u32::from(byte))
}

/// Answers a port read.
fn fill(data: &mut [u8], value: u32) {
    let bytes = value.to_le_bytes();
    for (to, &from) in data.iter_mut().zip(bytes.iter().chain(std::iter::repeat(&0))) {
        *to = from;
    }
}

/// A device is whole after every call: a panic elsewhere does not spoil it.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn devices() -> Devices {
        Devices::new(Interrupt(None), None)
    }

    fn read(devices: &Devices, port: u16) -> u32 {
        let mut data = [0xee; 4];
        assert_eq!(devices.pio_in(0, port, &mut data), Reaction::Continue);
        u32::from_le_bytes(data)
    }

    #[test]
    fn commands_are_taken_once_in_order_and_migrate() {
        let source = devices();
        (1..=3).for_each(|command| source.command(command));
        assert_eq!(read(&source, ports::COMMAND), 1);
        let destination = devices();
        destination.load(source.save()).unwrap();
        let taken = [(); 3].map(|()| read(&destination, ports::COMMAND));
        assert_eq!(taken, [2, 3, 0]);
    }

    #[test]
    fn a_rest_is_granted_but_not_for_ever() {
        let devices = devices();
        let rest = |us: u32| devices.pio_out(0, ports::REST, &us.to_le_bytes());
        assert_eq!(rest(500), Reaction::Rest(Duration::from_micros(500)));
        assert_eq!(rest(u32::MAX), Reaction::Rest(REST_MAX));
    }

    #[test]
    fn a_reset_by_the_keyboard_controller_ends_the_guest() {
        let devices = devices();
        assert_eq!(devices.pio_out(0, ports::KEYBOARD, &[0xd1]), Reaction::Continue);
        assert_eq!(devices.pio_out(0, ports::KEYBOARD, &[ports::KEYBOARD_RESET]), Reaction::End);
    }

    #[test]
    fn absent_devices_answer_with_ones() {
        assert_eq!(read(&devices(), 0xcfc), u32::MAX);
    }
}
