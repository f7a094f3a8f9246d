//! The console's input: a thread that reads what the operator types and gives it to the guest.
//!
//! While the guest is paused nothing is read: what is typed then waits in the terminal for whoever
//! runs the guest next.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::devices::{Devices, lock};
use super::error::MachineError;

/// How long the thread waits for input before it looks whether it should end.
const POLL_MS: i32 = 50;
/// How long a guest that does not read its console is left alone.
const FULL_WAIT: Duration = Duration::from_millis(10);

/// The thread, and the hand on its switch.
#[derive(Debug)]
pub(super) struct Input {
    gate: Arc<Gate>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum GateState {
    #[default]
    Closed,
    Open,
    Ended,
}

impl Input {
    /// Starts the thread, with the gate closed.
    pub(super) fn start(from: BorrowedFd<'_>, devices: Arc<Devices>) -> Result<Self, MachineError> {
        let from = File::from(from.try_clone_to_owned().map_err(MachineError::Input)?);
        let gate = Arc::new(Gate::default());
        let waiting = Arc::clone(&gate);
        let thread = std::thread::Builder::new()
            .name("console-input".to_owned())
            .spawn(move || while waiting.pass_one(&from, &devices) {})
            .map_err(MachineError::Input)?;
        Ok(Self { gate, thread: Some(thread) })
    }

    /// Lets input through.
    pub(super) fn open(&self) {
        self.gate.set(GateState::Open);
    }

    /// On return no more input reaches the guest.
    pub(super) fn close(&self) {
        self.gate.set(GateState::Closed);
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        self.gate.set(GateState::Ended);
        if let Some(thread) = self.thread.take() {
            // A panic there has been printed already.
            let _ = thread.join();
        }
    }
}

impl Gate {
    fn set(&self, state: GateState) {
        *lock(&self.state) = state;
        self.changed.notify_all();
    }

    /// Passes on a byte when one is there, or waits a little; false when it is time to end.
    fn pass_one(&self, from: &File, devices: &Devices) -> bool {
        let gate = self.wait_until_not_closed();
        if *gate == GateState::Ended {
            return false;
        }
        if !devices.has_input_room() {
            drop(gate);
            std::thread::sleep(FULL_WAIT);
            return true;
        }
        // The gate stays locked until the byte is in the device: `close` waits for that.
        match read_byte(from) {
            Ok(Some(byte)) => devices.type_in(&[byte]) == 1,
            Ok(None) => {
                drop(gate);
                wait_readable(from, POLL_MS).is_ok()
            }
            Err(_) => false,
        }
    }

    fn wait_until_not_closed(&self) -> MutexGuard<'_, GateState> {
        let closed = |state: &mut GateState| *state == GateState::Closed;
        self.changed.wait_while(lock(&self.state), closed).unwrap_or_else(PoisonError::into_inner)
    }
}

/// One byte, so that none is taken from the terminal that the guest has no room for; `None` when
/// there is none now.
fn read_byte(mut from: &File) -> io::Result<Option<u8>> {
    if !wait_readable(from, 0)? {
        return Ok(None);
    }
    let mut byte = [0];
    match from.read(&mut byte)? {
        1 => Ok(Some(byte[0])),
        _ => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

#[allow(unsafe_code)]
fn wait_readable(from: &File, timeout_ms: i32) -> io::Result<bool> {
    let mut poll = libc::pollfd { fd: from.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one valid entry, as said.
    match unsafe { libc::poll(&raw mut poll, 1, timeout_ms) } {
        0 => Ok(false),
        1 => Ok(true),
        _ => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => Ok(false),
            error => Err(error),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::console::Interrupt;
    use std::io::Write;
    use std::os::fd::AsFd;

    /// Waits for something that another thread does.
    fn eventually(what: impl Fn() -> bool) -> bool {
        (0..500).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            what()
        })
    }

    #[test]
    fn what_is_typed_while_the_gate_is_closed_stays_in_the_terminal() {
        let (terminal, mut typist) = std::io::pipe().unwrap();
        let devices = Arc::new(Devices::new(Interrupt(None), None));
        let input = Input::start(terminal.as_fd(), Arc::clone(&devices)).unwrap();
        input.open();
        typist.write_all(b"a").unwrap();
        assert!(eventually(|| devices.save().console.received == *b"a"));
        input.close();
        typist.write_all(b"b").unwrap();
        drop(input);
        assert_eq!(devices.save().console.received, *b"a");
        let mut left = [0; 1];
        (&terminal).read_exact(&mut left).unwrap();
        assert_eq!(left, *b"b");
    }

    #[test]
    fn no_byte_is_lost_when_the_guest_does_not_read() {
        let (terminal, mut typist) = std::io::pipe().unwrap();
        let devices = Arc::new(Devices::new(Interrupt(None), None));
        let input = Input::start(terminal.as_fd(), Arc::clone(&devices)).unwrap();
        input.open();
        typist.write_all(&[b'x'; 100]).unwrap();
        assert!(eventually(|| !devices.has_input_room()));
        drop((input, typist));
        let taken = devices.save().console.received.len();
        let mut left = Vec::new();
        (&terminal).read_to_end(&mut left).unwrap();
        assert_eq!(taken + left.len(), 100);
    }
}
