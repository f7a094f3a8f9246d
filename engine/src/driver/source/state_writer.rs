//! The machine state on its way to the control lane.

use std::io;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;

use crate::host::Control;
use crate::limits::{MAX_STATE, MAX_STATE_PIECES, STATE_CHUNK};
use crate::wire::Message;

/// Cuts the machine state into frames as it is written.
pub(super) struct StateWriter {
    messages: Sender<Message>,
    control: Control,
    buffer: Vec<u8>,
    pub(super) bytes: u64,
    /// How long it has waited for the lane, and how long it may.
    pub(super) waited: Duration,
    patience: Duration,
    /// By how much a piece of state adds to that.
    patience_per_piece: Duration,
    /// The lane has ended, the user has cancelled, or the guest has waited too long: the driver and the session know.
    pub(super) overtaken: bool,
}

impl StateWriter {
    /// A writer that waits for the lane no longer than `patience`, and `patience_per_piece` more for each [`STATE_CHUNK`].
    pub(super) fn new(
        messages: Sender<Message>,
        control: Control,
        patience: Duration,
        patience_per_piece: Duration,
    ) -> Self {
        let (buffer, waited) = (Vec::new(), Duration::ZERO);
        Self { messages, control, buffer, bytes: 0, waited, patience, patience_per_piece, overtaken: false }
    }

    pub(super) fn send(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        // The lane's own end wakes nobody here: a lane that is stuck ends after the peer timeout.
        while self.messages.len() > MAX_STATE_PIECES {
            let reason = match () {
                () if self.control.is_cancelled() => "the migration was cancelled",
                () if self.waited >= self.patience => "the destination takes the machine state too slowly",
                () => {
                    let began = Instant::now();
                    std::thread::sleep(Duration::from_millis(1));
                    self.waited += began.elapsed();
                    continue;
                }
            };
            self.overtaken = true;
            return Err(io::Error::other(reason));
        }
        self.patience = self.patience.saturating_add(self.patience_per_piece);
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

#[cfg(test)]
mod tests {
    use std::io::Write;

    use crossbeam_channel::unbounded;

    use super::*;

    #[test]
    fn a_lane_that_takes_nothing_does_not_hold_the_guest_for_ever() {
        let (messages, lane) = unbounded();
        let patience = Duration::from_millis(5);
        let mut writer = StateWriter::new(messages, Control::new(), patience, Duration::ZERO);
        assert!(writer.write_all(&vec![7; STATE_CHUNK * (MAX_STATE_PIECES + 2)]).is_err());
        assert!(writer.overtaken && writer.waited >= patience);
        assert_eq!(lane.len(), MAX_STATE_PIECES + 1);
    }
}
