//! Receiving threads: one per lane. Pages are placed where they arrive; messages go to the driver.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use crossbeam_channel::Sender;

use super::Counters;
use super::destination::{DestinationEvent, LaneEvent};
use super::lane::NumberedReceiver;
use crate::barrier::{Entry, RoundBarrier};
use crate::digest::{Digest, HashTable, PageHasher};
use crate::encode::Tally;
use crate::error::Error;
use crate::memory::GuestMemory;
use crate::place::{PlaceError, Placer};
use crate::wire::{FrameBuffer, Kind, Message};

/// Where pages go: known once the VMM has made room.
#[derive(Clone)]
pub(super) struct Room {
    pub(super) memory: Arc<dyn GuestMemory>,
    pub(super) hasher: PageHasher,
    pub(super) table: Arc<HashTable>,
    pub(super) gate: Arc<Gate>,
    /// No data lanes: pages come on the control lane.
    pub(super) single_lane: bool,
}

/// The round barrier, for threads.
#[derive(Debug)]
pub(super) struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug)]
struct GateState {
    barrier: RoundBarrier,
    tally: Tally,
    closed: bool,
}

impl Gate {
    pub(super) fn new(lanes: u16) -> Self {
        let state = GateState { barrier: RoundBarrier::new(lanes), tally: Tally::default(), closed: false };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Lets no lane wait any longer.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// Waits until frames of `round` may be handled on `lane`; `false` when the migration is over.
    fn enter(&self, lane: u16, round: u32) -> Result<bool, String> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return Ok(false);
            }
            match state.barrier.enter(lane, round).map_err(|error| error.to_string())? {
                Entry::Now => return Ok(true),
                Entry::Wait => state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// A lane has ended its round. Returns the round and the digest if all lanes have.
    fn end(&self, lane: u16, tally: &Tally) -> Option<(u32, Digest)> {
        let mut state = self.lock();
        state.tally.add(tally);
        let complete = state.barrier.end(lane)?;
        self.changed.notify_all();
        Some((complete, state.tally.digest))
    }

    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a receiving thread works with.
pub(super) struct ReceiveDuty {
    pub(super) lane: NumberedReceiver,
    /// Its number among the lanes that carry pages; the control lane has 0 if it is the only one.
    pub(super) index: u16,
    pub(super) is_control: bool,
    pub(super) room: Arc<OnceLock<Room>>,
    pub(super) counters: Arc<Counters>,
    pub(super) generation: u64,
    pub(super) events: Sender<DestinationEvent>,
}

/// Receives until the lane ends.
pub(super) fn run(duty: ReceiveDuty) {
    let (events, generation, is_control) = (duty.events.clone(), duty.generation, duty.is_control);
    let mut receiver = Receiver { duty, placer: None, tally: Tally::default() };
    let error = match receiver.receive_all() {
        Ok(()) => return,
        Err(error) => error,
    };
    let event = match error {
        // Our own memory's fault, not the lane's.
        Error::Memory(_) => LaneEvent::PlacingFailed(error),
        _ if is_control => LaneEvent::ControlBroken(error),
        _ => LaneEvent::DataLaneBroken(error),
    };
    let _ = events.send(DestinationEvent::Lane(generation, event));
}

struct Receiver {
    duty: ReceiveDuty,
    placer: Option<Placer>,
    tally: Tally,
}

impl Receiver {
    /// Ends without an error when the migration is over.
    fn receive_all(&mut self) -> Result<(), Error> {
        let mut frame = FrameBuffer::new();
        loop {
            self.duty.lane.receive(&mut frame)?;
            let header = frame.header().map_err(|source| self.duty.lane.name.invalid(source))?;
            let goes_on = match header.kind {
                Kind::Pages => self.place(&frame, header.round)?,
                _ => self.on_message(&frame)?,
            };
            if !goes_on {
                return Ok(());
            }
        }
    }

    fn place(&mut self, frame: &FrameBuffer, round: u32) -> Result<bool, Error> {
        let room = self.room()?;
        if !self.enter(&room, round)? {
            return Ok(false);
        }
        let placer = self
            .placer
            .get_or_insert_with(|| Placer::new(Arc::clone(&room.memory), room.hasher.clone(), Arc::clone(&room.table)));
        let tally = placer.place(frame).map_err(|error| match error {
            PlaceError::Wire(source) => self.duty.lane.name.invalid(source),
            PlaceError::Memory(error) => error.into(),
        })?;
        self.tally.add(&tally);
        Counters::add(&self.duty.counters.progress, tally.wire_bytes);
        Counters::add(&self.duty.counters.pages, tally.pages);
        Counters::add(&self.duty.counters.zero_pages, tally.zero_pages);
        Ok(true)
    }

    fn on_message(&mut self, frame: &FrameBuffer) -> Result<bool, Error> {
        let message = Message::decode(frame).map_err(|source| self.duty.lane.name.invalid(source))?;
        match message {
            Message::RoundEnd { round } => self.end_round(round),
            message if self.duty.is_control => Ok(self.tell(LaneEvent::Message(message))),
            message => Err(self.misbehaved(format!("it sent {message:?} on a data lane"))),
        }
    }

    fn end_round(&mut self, round: u32) -> Result<bool, Error> {
        let room = self.room()?;
        if !self.enter(&room, round)? {
            return Ok(false);
        }
        let tally = std::mem::take(&mut self.tally);
        if let Some((round, digest)) = room.gate.end(self.duty.index, &tally) {
            return Ok(self.tell(LaneEvent::RoundComplete(round, digest)));
        }
        Ok(true)
    }

    /// `false` when nobody listens any more.
    fn tell(&self, event: LaneEvent) -> bool {
        self.duty.events.send(DestinationEvent::Lane(self.duty.generation, event)).is_ok()
    }

    fn enter(&self, room: &Room, round: u32) -> Result<bool, Error> {
        room.gate.enter(self.duty.index, round).map_err(|what| self.misbehaved(what))
    }

    fn room(&self) -> Result<Room, Error> {
        match self.duty.room.get() {
            Some(room) if room.single_lane || !self.duty.is_control => Ok(room.clone()),
            _ => Err(self.misbehaved("it sent pages on the control lane, or before it was asked to".to_owned())),
        }
    }

    fn misbehaved(&self, what: String) -> Error {
        Error::PeerMisbehaved { peer: self.duty.lane.name.peer.clone(), what }
    }
}
