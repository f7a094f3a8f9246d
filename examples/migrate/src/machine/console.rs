//! The guest's serial console: a 16550 at the ports of COM1, whose registers migrate with the guest.
//!
//! Output leaves the device during the guest's own port write, so a paused guest has no byte of it
//! under way. What was printed of an unfinished line migrates too: the destination's line listeners
//! hear the whole line, once.

use std::convert::Infallible;
use std::io::{self, Write};

use pageferry_kvm::IrqLine;
use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial, SerialState};

use super::error::MachineError;

/// Longest line that listeners are given as one; what is longer comes in pieces.
const LINE_MAX: usize = 4096;

/// Hears every line that the guest has finished, without its line end.
pub(super) type LineSink = Box<dyn FnMut(&str) + Send>;

/// What the console's registers and buffers hold: part of the machine state.
#[derive(Serialize, Deserialize, Debug, PartialEq, Eq, Clone)]
pub(super) struct ConsoleState {
    registers: [u8; 9],
    pub(super) received: Vec<u8>,
    unfinished_line: Vec<u8>,
}

/// The console.
pub(super) struct Console {
    serial: Serial<Interrupt, NoEvents, Output>,
}

impl Console {
    /// A console after reset. `echo` takes every byte as it comes, `lines` every finished line.
    pub(super) fn new(interrupt: Interrupt, echo: Option<Box<dyn Write + Send>>, lines: LineSink) -> Self {
        let output = Output { echo, lines, unfinished_line: Vec::new() };
        Self { serial: Serial::new(interrupt, output) }
    }

    /// The guest writes a register.
    pub(super) fn write(&mut self, register: u8, value: u8) {
        // Neither output nor interrupt report errors; a full input buffer in loop-back mode loses a byte, as hardware would.
        let _ = self.serial.write(register, value);
    }

    /// The guest reads a register.
    pub(super) fn read(&mut self, register: u8) -> u8 {
        self.serial.read(register)
    }

    /// Gives the guest input; says how many bytes its buffer took.
    pub(super) fn receive(&mut self, input: &[u8]) -> usize {
        let room = self.serial.fifo_capacity().min(input.len());
        self.serial.enqueue_raw_bytes(&input[..room]).unwrap_or(0)
    }

    /// Whether there is room for another byte of input.
    pub(super) fn has_input_room(&self) -> bool {
        self.serial.fifo_capacity() > 0
    }

    pub(super) fn save(&self) -> ConsoleState {
        let state = self.serial.state();
        ConsoleState {
            registers: [
                state.baud_divisor_low,
                state.baud_divisor_high,
                state.interrupt_enable,
                state.interrupt_identification,
                state.line_control,
                state.line_status,
                state.modem_control,
                state.modem_status,
                state.scratch,
            ],
            received: state.in_buffer,
            unfinished_line: self.serial.writer().unfinished_line.clone(),
        }
    }

    /// Takes over another console's state. Call it after the interrupt controllers have theirs: a
    /// pending interrupt is raised again.
    pub(super) fn load(&mut self, saved: ConsoleState) -> Result<(), MachineError> {
        if saved.unfinished_line.len() > LINE_MAX {
            return Err(MachineError::invalid("console state", &"its unfinished line is too long"));
        }
        let output = Output {
            echo: self.serial.writer_mut().echo.take(),
            lines: std::mem::replace(&mut self.serial.writer_mut().lines, Box::new(|_| ())),
            unfinished_line: saved.unfinished_line,
        };
        let interrupt = self.serial.interrupt_evt().clone();
        let state = serial_state(saved.registers, saved.received);
        self.serial = Serial::from_state(&state, interrupt, NoEvents, output)
            .map_err(|error| MachineError::invalid("console state", &error))?;
        Ok(())
    }
}

fn serial_state(registers: [u8; 9], received: Vec<u8>) -> SerialState {
    let [low, high, enable, identification, line, line_status, modem, modem_status, scratch] = registers;
    SerialState {
        baud_divisor_low: low,
        baud_divisor_high: high,
        interrupt_enable: enable,
        interrupt_identification: identification,
        line_control: line,
        line_status,
        modem_control: modem,
        modem_status,
        scratch,
        in_buffer: received,
    }
}

/// The console's interrupt line; none in tests.
#[derive(Clone, Debug)]
pub(super) struct Interrupt(pub(super) Option<IrqLine>);

impl Trigger for Interrupt {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        if let Some(line) = &self.0 {
            // The guest's driver also polls: a lost edge delays the console and breaks nothing.
            let _ = line.pulse();
        }
        Ok(())
    }
}

/// Where the guest's bytes go.
struct Output {
    echo: Option<Box<dyn Write + Send>>,
    lines: LineSink,
    unfinished_line: Vec<u8>,
}

impl Output {
    fn split_lines(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            match byte {
                b'\n' => self.finish_line(),
                b'\r' => {}
                _ => self.unfinished_line.push(byte),
            }
            if self.unfinished_line.len() >= LINE_MAX {
                self.finish_line();
            }
        }
    }

    fn finish_line(&mut self) {
        (self.lines)(&String::from_utf8_lossy(&self.unfinished_line));
        self.unfinished_line.clear();
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(echo) = &mut self.echo
            && echo.write_all(bytes).and_then(|()| echo.flush()).is_err()
        {
            // Nobody listens any more: the guest must not suffer from that.
            self.echo = None;
        }
        self.split_lines(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    type Heard = Arc<Mutex<Vec<String>>>;

    fn console() -> (Console, Heard) {
        let heard = Heard::default();
        let listener = Arc::clone(&heard);
        let lines = Box::new(move |line: &str| listener.lock().unwrap().push(line.to_owned()));
        (Console::new(Interrupt(None), None, lines), heard)
    }

    fn print(console: &mut Console, text: &str) {
        text.bytes().for_each(|byte| console.write(0, byte));
    }

    #[test]
    fn a_line_begun_before_a_migration_is_heard_whole_and_once() {
        let (mut source, heard_before) = console();
        print(&mut source, "one\r\ntwo, un");
        let (mut destination, heard_after) = console();
        destination.load(source.save()).unwrap();
        print(&mut destination, "finished\nthree\n");
        assert_eq!(*heard_before.lock().unwrap(), ["one"]);
        assert_eq!(*heard_after.lock().unwrap(), ["two, unfinished", "three"]);
    }

    #[test]
    fn registers_and_unread_input_survive() {
        let (mut source, _) = console();
        source.write(7, 0x5a);
        source.write(1, 0x01);
        assert_eq!(source.receive(b"hello"), 5);
        let saved = source.save();
        let (mut destination, _) = console();
        destination.load(saved.clone()).unwrap();
        assert_eq!(destination.save(), saved);
        assert_eq!(destination.read(7), 0x5a);
        assert_eq!([(); 5].map(|()| destination.read(0)), *b"hello");
    }

    #[test]
    fn input_beyond_the_buffer_is_left_with_the_caller() {
        let (mut console, _) = console();
        assert_eq!(console.receive(&[b'x'; 100]), 64);
        assert_eq!(console.receive(b"y"), 0);
    }

    #[test]
    fn state_with_an_impossible_buffer_is_refused() {
        let (mut console, _) = console();
        let mut state = console.save();
        state.received = vec![0; 65];
        assert!(console.load(state).is_err());
    }
}
