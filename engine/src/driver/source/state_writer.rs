//! The machine state on its way to the control lane.

use std::io;
use std::time::Duration;

use crossbeam_channel::Sender;

use crate::host::Control;
use crate::limits::{MAX_STATE, MAX_STATE_PIECES, STATE_CHUNK};
use crate::wire::Message;

/// Cuts the machine state into frames as it is written.
pub(super) struct StateWriter {
    pub(super) messages: Sender<Message>,
    pub(super) control: Control,
    pub(super) buffer: Vec<u8>,
    pub(super) bytes: u64,
    /// The lane has ended, or the user has cancelled: the driver hears of it elsewhere.
    pub(super) overtaken: bool,
}

impl StateWriter {
    pub(super) fn send(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        // The lane's own end wakes nobody here: a lane that is stuck ends after the peer timeout.
        while self.messages.len() > MAX_STATE_PIECES {
            if self.control.is_cancelled() {
                self.overtaken = true;
                return Err(io::Error::other("the migration was cancelled"));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let piece = std::mem::take(&mut self.buffer);
        self.messages.send(Message::State(piece)).map_err(|_| {
            self.overtaken = true;
            io::ErrorKind::BrokenPipe.into()
        })
    }
}

impl io::Write for StateWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(STATE_CHUNK - self.buffer.len());
        if self.bytes + taken as u64 > MAX_STATE {
            return Err(io::Error::other(format!("the machine state is over the limit of {MAX_STATE} bytes")));
        }
        self.buffer.extend_from_slice(&bytes[..taken]);
        self.bytes += taken as u64;
        if self.buffer.len() == STATE_CHUNK {
            self.send()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
