//! Receiving threads: one per lane. Pages are placed where they arrive; messages go to the driver.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use crossbeam_channel::Sender;

use super::Counters;
use super::destination::{DestinationEvent, LaneEvent};
use super::lane::NumberedReceiver;
use crate::barrier::{Barrier, Entry};
use crate::batch::round_of;
use crate::digest::{Digest, HashTable, PageHasher};
use crate::encode::Tally;
use crate::error::Error;
use crate::limits::MAX_ROUNDS;
use crate::memory::GuestMemory;
use crate::place::{PlaceError, Placer};
use crate::wire::{FrameBuffer, Kind, Message};

/// Where pages go: known once the VMM has made room.
#[derive(Clone)]
pub(super) struct Room {
    pub(super) memory: Arc<dyn GuestMemory>,
    /// The source may write into it.
    pub(super) exposed: bool,
    pub(super) hasher: PageHasher,
    pub(super) table: Arc<HashTable>,
    pub(super) gate: Arc<Gate>,
    /// No data lanes: pages come on the control lane.
    pub(super) single_lane: bool,
}

/// The barrier between steps, for threads.
#[derive(Debug)]
pub(super) struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug)]
struct GateState {
    barrier: Barrier,
    tally: Tally,
    closed: bool,
    /// Lanes that are placing pages now.
    inside: usize,
}

impl Gate {
    pub(super) fn new(lanes: u16) -> Self {
        let state = GateState { barrier: Barrier::new(lanes), tally: Tally::default(), closed: false, inside: 0 };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Lets no lane in or wait any longer, and waits for those that are inside.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        self.changed.notify_all();
        while state.inside > 0 {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until frames of `step` may be handled on `lane`; `None` when no page is wanted any more.
    fn enter(&self, lane: u16, step: u32) -> Result<Option<Inside<'_>>, String> {
        let mut state = self.lock();
        loop {
            if state.closed {
                return Ok(None);
            }
            match state.barrier.enter(lane, step).map_err(|error| error.to_string())? {
                Entry::Now => {
                    state.inside += 1;
                    return Ok(Some(Inside(self)));
                }
                Entry::Wait => state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// A lane has ended the open step. Returns the round and the digest if that was the round's last, and
    /// all lanes have ended it.
    fn end(&self, lane: u16, tally: &Tally) -> Option<(u32, Digest)> {
        let mut state = self.lock();
        state.tally.add(tally);
        let complete = state.barrier.end(lane)?;
        self.changed.notify_all();
        let (round, last) = round_of(complete);
        last.then_some((round, state.tally.digest))
    }

    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A lane is placing pages; dropped when it has.
struct Inside<'a>(&'a Gate);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.inside -= 1;
        if state.closed {
            self.0.changed.notify_all();
        }
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

impl ReceiveDuty {
    fn enter<'a>(&self, room: &'a Room, step: u32) -> Result<Option<Inside<'a>>, Error> {
        room.gate.enter(self.index, step).map_err(|what| self.misbehaved(what))
    }

    fn misbehaved(&self, what: String) -> Error {
        Error::PeerMisbehaved { peer: self.lane.name.peer.clone(), what }
    }
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
                Kind::Pages => self.place(&frame, header.step)?,
                _ => self.on_message(&frame)?,
            };
            if !goes_on {
                return Ok(());
            }
        }
    }

    fn place(&mut self, frame: &FrameBuffer, step: u32) -> Result<bool, Error> {
        let room = self.room()?;
        let placer = self.placer.get_or_insert_with(|| {
            let placer = Placer::new(Arc::clone(&room.memory), room.hasher.clone(), Arc::clone(&room.table));
            placer.exposed(room.exposed)
        });
        let Some(_inside) = self.duty.enter(&room, step)? else { return self.not_wanted() };
        let tally = placer.place(frame).map_err(|error| match error {
            PlaceError::Wire(source) => self.duty.lane.name.invalid(source),
            PlaceError::Memory(error) => error.into(),
        })?;
        self.tally.add(&tally);
        // What was written came past the frames, which are counted where they come.
        Counters::add(&self.duty.counters.wire_bytes, tally.wire_bytes - frame.bytes().len() as u64);
        Counters::add(&self.duty.counters.progress, tally.wire_bytes);
        Counters::add(&self.duty.counters.pages, tally.pages);
        Counters::add(&self.duty.counters.zero_pages, tally.zero_pages);
        Ok(true)
    }

    fn on_message(&mut self, frame: &FrameBuffer) -> Result<bool, Error> {
        let message = Message::decode(frame).map_err(|source| self.duty.lane.name.invalid(source))?;
        match message {
            Message::StepEnd { step } => self.end_step(step),
            message if self.duty.is_control => Ok(self.tell(LaneEvent::Message(message))),
            _ => {
                let kind = frame.header().map_err(|source| self.duty.lane.name.invalid(source))?.kind;
                Err(self.duty.misbehaved(format!("it sent {kind:?} on a data lane")))
            }
        }
    }

    fn end_step(&mut self, step: u32) -> Result<bool, Error> {
        let (round, _) = round_of(step);
        if round > MAX_ROUNDS {
            return Err(self.duty.misbehaved(format!("it began round {round}")));
        }
        let room = self.room()?;
        let Some(inside) = self.duty.enter(&room, step)? else { return self.not_wanted() };
        let tally = std::mem::take(&mut self.tally);
        let complete = room.gate.end(self.duty.index, &tally);
        // Before the driver is told: it may be waiting for this lane to be out.
        drop(inside);
        Ok(complete.is_none_or(|(round, digest)| self.tell(LaneEvent::RoundComplete(round, digest))))
    }

    /// Pages after the end: a data lane is done, the control lane must go on.
    fn not_wanted(&self) -> Result<bool, Error> {
        if self.duty.is_control {
            return Err(self.duty.misbehaved("it sent pages after it had finished".to_owned()));
        }
        Ok(false)
    }

    /// `false` when nobody listens any more.
    fn tell(&self, event: LaneEvent) -> bool {
        self.duty.events.send(DestinationEvent::Lane(self.duty.generation, event)).is_ok()
    }

    fn room(&self) -> Result<Room, Error> {
        match self.duty.room.get() {
            Some(room) if room.single_lane || !self.duty.is_control => Ok(room.clone()),
            _ => Err(self.duty.misbehaved("it sent pages on the control lane, or before it was asked to".to_owned())),
        }
    }
}
