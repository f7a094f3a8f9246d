//! A lane as the engine sees it: two halves and what closes them.

use std::io::{self, IoSlice};
use std::sync::{Arc, Mutex, PoisonError};

use pageferry::limits::MAX_FRAME_BODY;
use pageferry::transport::{DirectRun, Lane, LaneCloser, LaneHalves, LaneReceiver, LaneSender};
use pageferry::wire::{FrameBuffer, HEADER_LEN};

use crate::failure::LaneFailure;
use crate::lane::Core;
use crate::ledger::Arrived;
use crate::message::{Kind, PREFIX, SLOT};
use crate::verbs::Place;
use crate::windows::{Exposure, Extent, Granted, Writer};

/// Bytes of a frame that a slot takes.
const PART: usize = SLOT - PREFIX;

/// What a lane's side may do with the other's memory.
pub(crate) enum Direct {
    /// The dialling side writes.
    Writes(Box<Mutex<Writer>>),
    /// The accepting side opens windows.
    Opens { exposure: Arc<Exposure>, granted: Arc<Mutex<Granted>>, extent: Extent },
}

/// A connected lane. Its end is told to the peer when the last part of it is dropped.
pub(crate) struct RdmaLane {
    // Dropped first: waits until nothing that was written from a window is under way any more.
    core: Core,
    direct: Direct,
}

impl RdmaLane {
    pub(crate) fn new(core: Core, direct: Direct) -> Self {
        Self { core, direct }
    }
}

/// For tests that do what the engine does not.
#[cfg(test)]
impl RdmaLane {
    pub(crate) fn core(&self) -> &Core {
        &self.core
    }
}

impl Lane for RdmaLane {
    fn peer(&self) -> String {
        self.core.peer().to_owned()
    }

    fn split(self: Box<Self>) -> io::Result<LaneHalves> {
        let lane: Arc<Self> = Arc::from(self);
        Ok(LaneHalves {
            sender: Box::new(Sender(Arc::clone(&lane))),
            receiver: Box::new(Receiver { lane: Arc::clone(&lane), delivered: false }),
            closer: Arc::new(Closer(lane)),
        })
    }
}

struct Sender(Arc<RdmaLane>);

impl LaneSender for Sender {
    fn send(&mut self, frame: &mut [IoSlice<'_>]) -> io::Result<()> {
        let mut left: usize = frame.iter().map(|part| part.len()).sum();
        let mut parts = frame;
        while left > 0 {
            let (len, core) = (left.min(PART), &self.0.core);
            let slot = core.slot().map_err(broken)?;
            let mut at = 0;
            while at < len {
                IoSlice::advance_slices(&mut parts, 0);
                let taken = parts[0].len().min(len - at);
                core.queue().put(Place::Slot(slot), PREFIX + at, &parts[0][..taken]);
                IoSlice::advance_slices(&mut parts, taken);
                at += taken;
            }
            core.send_fragment(slot, left, len).map_err(broken)?;
            left -= len;
        }
        Ok(())
    }

    fn write_pages(&mut self, runs: &[DirectRun]) -> io::Result<()> {
        match &self.0.direct {
            Direct::Writes(writer) => writer.lock().unwrap_or_else(PoisonError::into_inner).write(&self.0.core, runs),
            Direct::Opens { .. } => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}

/// An end that was told is nothing to read from here.
fn broken(failure: LaneFailure) -> io::Error {
    match failure {
        LaneFailure::Closed | LaneFailure::ClosedHere => io::Error::new(io::ErrorKind::BrokenPipe, failure),
        other => other.into(),
    }
}

struct Receiver {
    lane: Arc<RdmaLane>,
    /// The caller has taken a frame and wants more.
    delivered: bool,
}

impl Receiver {
    /// The first part of the next frame. What the peer asks meanwhile is answered.
    fn first_part(&self) -> io::Result<(Arrived, usize)> {
        loop {
            let arrived = self.lane.core.next_arrived()?;
            match arrived.kind {
                Kind::Fragment { left } => return Ok((arrived, left as usize)),
                _ => self.answer(arrived)?,
            }
        }
    }

    /// Strangers get nothing: the host hears one frame of a caller, and goes on listening only to those that it knows.
    fn answer(&self, arrived: Arrived) -> io::Result<()> {
        let (Kind::Ask(ask), true) = (arrived.kind, self.delivered) else {
            return Err(LaneFailure::Protocol("a question that it may not ask").into());
        };
        let Direct::Opens { exposure, granted, extent } = &self.lane.direct else {
            return Err(LaneFailure::Protocol("a question that only a source may ask").into());
        };
        let core = &self.lane.core;
        core.recycle(arrived.slot)?;
        core.reply(exposure.answer(granted, core.queue(), ask, *extent))?;
        Ok(())
    }
}

impl LaneReceiver for Receiver {
    fn receive(&mut self, frame: &mut FrameBuffer) -> io::Result<()> {
        let core = &self.lane.core;
        let (mut arrived, total) = self.first_part()?;
        if !(HEADER_LEN..=HEADER_LEN + MAX_FRAME_BODY).contains(&total) {
            return Err(LaneFailure::Protocol("a frame of impossible length").into());
        }
        frame.prepare(0)?;
        let mut left = total;
        loop {
            let len = arrived.len - PREFIX;
            core.queue().get(arrived.slot, PREFIX, frame.extend(len)?);
            core.recycle(arrived.slot)?;
            left -= len;
            if left == 0 {
                break;
            }
            arrived = core.next_arrived()?;
            if arrived.kind != (Kind::Fragment { left: left as u32 }) {
                return Err(LaneFailure::Protocol("parts of frames that do not fit together").into());
            }
        }
        if HEADER_LEN + frame.announced_body()? != total {
            return Err(LaneFailure::Protocol("a frame of another length than it says").into());
        }
        self.delivered = true;
        Ok(())
    }
}

struct Closer(Arc<RdmaLane>);

impl LaneCloser for Closer {
    fn close(&self) {
        self.0.core.close();
    }
}
