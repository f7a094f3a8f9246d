//! The receiving threads of the destination, and the barrier between steps at which they wait.

use std::io;
use std::sync::Arc;

use pageferry::Error;
use pageferry::barrier::{Barrier, Entry};
use pageferry::batch::round_of;
use pageferry::digest::{Digest, HashTable, PageHasher};
use pageferry::encode::Tally;
use pageferry::limits::MAX_ROUNDS;
use pageferry::memory::MappedMemory;
use pageferry::place::{PlaceError, Placer};
use pageferry::transport::LaneRole;
use pageferry::wire::{FrameBuffer, Kind, Message, WireError};

use crate::network::{End, LaneId};
use crate::source::{broken, invalid};
use crate::world::Context;

/// What a receiving thread tells its driver.
#[derive(Debug)]
pub(crate) enum Received {
    Message(Message),
    RoundComplete(u32, Digest),
    PlacingFailed(Error),
    ControlBroken(Error),
    DataLaneBroken(Error),
}

/// Where pages go, once the VM has made room.
#[allow(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub(crate) struct Room {
    pub(crate) memory: Arc<MappedMemory>,
    pub(crate) hasher: PageHasher,
    pub(crate) table: Arc<HashTable>,
    pub(crate) single_lane: bool,
    pub(crate) barrier: Barrier,
    pub(crate) tally: Tally,
    pub(crate) closed: bool,
    /// The source may write into the memory.
    pub(crate) exposed: bool,
    /// Bytes of pages that came: what signs of life tell.
    pub(crate) progress: u64,
    /// The canary.
    pub(crate) overtakes: Overtakes,
    /// Whether a step was completed since somebody last looked.
    pub(crate) opened: bool,
}

/// What does not wait at a barrier that is broken on purpose.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Overtakes {
    Nothing,
    /// Pages of a newer step.
    Everything,
    /// Copies, the round's second step.
    Copies,
}

impl Overtakes {
    fn covers(self, step: u32) -> bool {
        match self {
            Self::Nothing => false,
            Self::Everything => true,
            Self::Copies => round_of(step).1,
        }
    }
}

/// A receiving thread.
pub(crate) struct Receiver {
    pub(crate) lane: LaneId,
    /// Of which control lane's time it is.
    pub(crate) generation: u64,
    /// Frames that came, however they are taken: signs of life.
    pub(crate) frames: u64,
    role: LaneRole,
    index: u16,
    next: u64,
    frame: FrameBuffer,
    /// The frame in the buffer waits at the barrier.
    pub(crate) waits: bool,
    pub(crate) gone: bool,
    placer: Option<Placer>,
    tally: Tally,
}

enum Step {
    Told(Received),
    /// Nothing to tell; there may be more to read.
    GoOn,
    /// The frame has to wait.
    Wait,
    /// The migration is over.
    Stop,
}

impl Receiver {
    pub(crate) fn new(lane: LaneId, role: LaneRole, generation: u64) -> Self {
        let index = if let LaneRole::Data(index) = role { index } else { 0 };
        Self {
            lane,
            generation,
            frames: 0,
            role,
            index,
            next: 1,
            frame: FrameBuffer::new(),
            waits: false,
            gone: false,
            placer: None,
            tally: Tally::default(),
        }
    }

    /// Reads and handles frames until there is no more, one has to wait, or something is to be told.
    pub(crate) fn run(&mut self, ctx: &mut Context, room: &mut Option<Room>) -> Option<Received> {
        while !self.gone {
            match self.step(ctx, room) {
                Ok(Some(Step::Told(received))) => return Some(received),
                Ok(Some(Step::GoOn)) => {}
                Ok(Some(Step::Stop)) => self.gone = true,
                Ok(Some(Step::Wait)) => {
                    self.waits = true;
                    return None;
                }
                Ok(None) => return None,
                Err(error) => {
                    self.gone = true;
                    return Some(match error {
                        Error::Memory(_) => Received::PlacingFailed(error),
                        _ if self.is_control() => Received::ControlBroken(error),
                        _ => Received::DataLaneBroken(error),
                    });
                }
            }
        }
        None
    }

    fn step(&mut self, ctx: &mut Context, room: &mut Option<Room>) -> Result<Option<Step>, Error> {
        if !std::mem::replace(&mut self.waits, false) {
            let read = ctx.network.read(&mut ctx.clock, self.lane, End::Destination, &mut self.frame);
            match read {
                Ok(true) => {}
                Ok(false) => return Ok(None),
                Err(source) => return Err(self.broken(source)),
            }
            let found = self.header()?.sequence;
            if found != self.next {
                return Err(invalid(self.role, WireError::Sequence { expected: self.next, found }));
            }
            self.next += 1;
            self.frames += 1;
        }
        let header = self.header()?;
        match header.kind {
            Kind::Pages => self.place(room, header.step),
            _ => self.on_message(room),
        }
        .map(Some)
    }

    fn broken(&self, source: io::Error) -> Error {
        match source.get_ref().and_then(|inner| inner.downcast_ref::<WireError>()) {
            Some(wire) => invalid(self.role, wire.clone()),
            None => broken(self.role, source),
        }
    }

    fn header(&self) -> Result<pageferry::wire::Header, Error> {
        self.frame.header().map_err(|source| invalid(self.role, source))
    }

    fn is_control(&self) -> bool {
        self.role == LaneRole::Control
    }

    fn place(&mut self, room: &mut Option<Room>, step: u32) -> Result<Step, Error> {
        let room = self.room(room)?;
        if room.closed {
            return self.not_wanted();
        }
        let placer = self.placer.get_or_insert_with(|| {
            let placer = Placer::new(room.memory.clone(), room.hasher.clone(), Arc::clone(&room.table));
            placer.exposed(room.exposed)
        });
        let entry = room.barrier.enter(self.index, step).map_err(|error| misbehaved(error.to_string()))?;
        if entry == Entry::Wait && !room.overtakes.covers(step) {
            return Ok(Step::Wait);
        }
        let tally = placer.place(&self.frame).map_err(|error| match error {
            PlaceError::Memory(error) => error.into(),
            PlaceError::Wire(source) => invalid(self.role, source),
            error => Error::Bug(error.to_string()),
        })?;
        self.tally.add(&tally);
        room.progress += tally.wire_bytes;
        Ok(Step::GoOn)
    }

    fn on_message(&mut self, room: &mut Option<Room>) -> Result<Step, Error> {
        match Message::decode(&self.frame).map_err(|source| invalid(self.role, source))? {
            Message::StepEnd { step } => self.end_step(room, step),
            message if self.is_control() => Ok(Step::Told(Received::Message(message))),
            message => Err(misbehaved(format!("it sent {message:?} on a data lane"))),
        }
    }

    fn end_step(&mut self, room: &mut Option<Room>, step: u32) -> Result<Step, Error> {
        let (round, _) = round_of(step);
        if round > MAX_ROUNDS {
            return Err(misbehaved(format!("it began round {round}")));
        }
        let room = self.room(room)?;
        if room.closed {
            return self.not_wanted();
        }
        let entry = room.barrier.enter(self.index, step).map_err(|error| misbehaved(error.to_string()))?;
        if entry == Entry::Wait {
            return Ok(Step::Wait);
        }
        room.tally.add(&std::mem::take(&mut self.tally));
        let Some(complete) = room.barrier.end(self.index) else { return Ok(Step::GoOn) };
        room.opened = true;
        let (round, last) = round_of(complete);
        Ok(if last { Step::Told(Received::RoundComplete(round, room.tally.digest)) } else { Step::GoOn })
    }

    /// Pages after the end: a data lane is done, the control lane must go on.
    fn not_wanted(&self) -> Result<Step, Error> {
        if self.is_control() {
            return Err(misbehaved("it sent pages after it had finished".to_owned()));
        }
        Ok(Step::Stop)
    }

    fn room<'a>(&self, room: &'a mut Option<Room>) -> Result<&'a mut Room, Error> {
        let is_control = self.is_control();
        match room {
            Some(room) if room.single_lane || !is_control => Ok(room),
            _ => Err(misbehaved("it sent pages on the control lane, or before it was asked to".to_owned())),
        }
    }
}

fn misbehaved(what: String) -> Error {
    Error::PeerMisbehaved { peer: "the source".to_owned(), what }
}
