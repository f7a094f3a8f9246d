//! A lane in use: who is at its other end, and the numbering of its frames.

use std::io::IoSlice;
use std::sync::Arc;

use super::Counters;
use crate::error::Error;
use crate::transport::{DirectRun, LaneReceiver, LaneRole, LaneSender};
use crate::wire::{FrameBuffer, Message, WireError, wire_error_of};

/// Which lane, for errors.
#[derive(Clone, Debug)]
pub(super) struct LaneName {
    pub(super) role: LaneRole,
    pub(super) peer: String,
}

impl LaneName {
    pub(super) fn broken(&self, source: std::io::Error) -> Error {
        let (lane, peer) = (self.role, self.peer.clone());
        match wire_error_of(source) {
            Ok(source) => Error::InvalidMessage { lane, peer, source },
            Err(source) => Error::LaneBroken { lane, peer, source },
        }
    }

    pub(super) fn invalid(&self, source: WireError) -> Error {
        Error::InvalidMessage { lane: self.role, peer: self.peer.clone(), source }
    }
}

/// A sending half that numbers its frames.
pub(super) struct NumberedSender {
    pub(super) name: LaneName,
    pub(super) sender: Box<dyn LaneSender>,
    pub(super) sequence: u64,
    pub(super) counters: Arc<Counters>,
}

impl NumberedSender {
    pub(super) fn send_message(&mut self, message: &Message) -> Result<(), Error> {
        let frame = message.encode(self.sequence);
        self.send_parts(&mut [IoSlice::new(&frame)], frame.len() as u64)
    }

    /// Writes the pages of the frame that is sent next.
    pub(super) fn write_pages(&mut self, runs: &[DirectRun]) -> Result<(), Error> {
        if runs.is_empty() {
            return Ok(());
        }
        self.sender.write_pages(runs).map_err(|source| self.name.broken(source))
    }

    /// Sends a frame that was sealed with [`sequence`](Self::sequence).
    pub(super) fn send_parts(&mut self, parts: &mut [IoSlice<'_>], len: u64) -> Result<(), Error> {
        self.sender.send(parts).map_err(|source| self.name.broken(source))?;
        self.sequence += 1;
        Counters::add(&self.counters.wire_bytes, len);
        Ok(())
    }
}

/// A receiving half that checks the numbers of its frames.
pub(super) struct NumberedReceiver {
    pub(super) name: LaneName,
    pub(super) receiver: Box<dyn LaneReceiver>,
    pub(super) next: u64,
    pub(super) counters: Arc<Counters>,
}

impl NumberedReceiver {
    /// The next frame. Its checksum is for whoever reads its body to check.
    pub(super) fn receive(&mut self, frame: &mut FrameBuffer) -> Result<(), Error> {
        self.receiver.receive(frame).map_err(|source| self.name.broken(source))?;
        let header = frame.header().map_err(|source| self.name.invalid(source))?;
        if header.sequence != self.next {
            let (expected, found) = (self.next, header.sequence);
            return Err(self.name.invalid(WireError::Sequence { expected, found }));
        }
        self.next += 1;
        Counters::add(&self.counters.frames_received, 1);
        Counters::add(&self.counters.wire_bytes, frame.bytes().len() as u64);
        Ok(())
    }
}
