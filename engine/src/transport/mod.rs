//! How frames travel: the seam that every transport implements.
//!
//! A [`Lane`] carries frames in order, both ways; it may be a byte stream ([`StreamLane`] does the
//! framing then) or a channel of messages. The source dials or accepts, as the host likes: the
//! first frame on every lane says which migration and which lane it is.

mod in_memory;
mod ready;
mod stream;

pub use in_memory::{InMemoryAcceptor, InMemoryDialer, in_memory};
pub use ready::ReadyLanes;
pub use stream::StreamLane;

use std::io::{self, IoSlice};
use std::sync::Arc;
use std::time::Duration;

use crate::memory::{GuestMemory, RegionId};
use crate::wire::FrameBuffer;

/// What a lane is for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum LaneRole {
    /// Messages of the session, in both directions.
    Control,
    /// Page batches, towards the destination.
    Data(u16),
}

impl std::fmt::Display for LaneRole {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Control => write!(f, "control lane"),
            Self::Data(index) => write!(f, "data lane {index}"),
        }
    }
}

/// Why a lane could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// The peer could not be reached.
    #[error("cannot connect to {peer}: {source}")]
    Dial {
        /// The address that was tried.
        peer: String,
        /// What the host said.
        source: io::Error,
    },
    /// This side cannot take connections any more.
    #[error("cannot accept connections on {local}: {source}")]
    Accept {
        /// The address that was listened on.
        local: String,
        /// What the host said.
        source: io::Error,
    },
    /// An option that this host or transport does not support.
    #[error("{option} is not possible here: {source}")]
    Option {
        /// The option and its value.
        option: String,
        /// What the host said.
        source: io::Error,
    },
}

/// What a transport can do; everything defaults to the careful answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Capabilities {
    /// Nobody on the way can read or change frames, and the peer has proved who it is.
    pub encrypted: bool,
    /// Most lanes (control lane included) that one migration may open.
    pub max_lanes: u16,
    /// Lanes can write pages straight from the source's memory into the destination's
    /// ([`LaneSender::write_pages`]).
    pub one_sided: bool,
    /// Most bytes that a lane of this end holds in buffers of its own, such as what it may have to send again. 0 for a lane that
    /// leaves that to the host's kernel.
    pub lane_memory: u64,
}

impl Default for Capabilities {
    fn default() -> Self {
        Self { encrypted: false, max_lanes: u16::MAX, one_sided: false, lane_memory: 0 }
    }
}

/// The source's side of a transport: opens lanes.
pub trait Dialer: Send + Sync {
    /// Opens a lane within `timeout`.
    fn dial(&self, role: LaneRole, timeout: Duration) -> Result<Box<dyn Lane>, TransportError>;

    /// Hears which memory pages may be written from ([`LaneSender::write_pages`]), before data lanes are dialled. Only a
    /// transport that is [one-sided](Capabilities::one_sided) is told, and only if the destination has exposed its
    /// memory. `false` if it cannot do so after all: then pages travel in frames, as they do on the control lane.
    fn attach(&self, memory: Arc<dyn GuestMemory>) -> Result<bool, TransportError> {
        let _ = memory;
        Ok(false)
    }

    /// What this transport can do.
    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }
}

/// The destination's side of a transport: takes lanes as they come. Who they are is the engine's
/// question; a stranger costs a thread for a few seconds and nothing else.
pub trait Acceptor: Send + Sync {
    /// The next lane; `None` when none came within `timeout`.
    fn accept(&self, timeout: Duration) -> Result<Option<Box<dyn Lane>>, TransportError>;

    /// Lets the source write into this memory, within the bounds of its regions that travel. Called before a
    /// guest is accepted and so before its data lanes come, if there are to be any and the transport is
    /// [one-sided](Capabilities::one_sided); `false` if it cannot: the source is told.
    fn expose(&self, memory: Arc<dyn GuestMemory>) -> Result<bool, TransportError> {
        let _ = memory;
        Ok(false)
    }

    /// Nobody may write into exposed memory any more: when this returns nobody can, and what was written before is there. Called
    /// before the guest may run here, and when it is given up.
    fn conceal(&self) {}

    /// What this transport can do.
    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }
}

/// One ordered channel of frames, both ways.
pub trait Lane: Send {
    /// The other end, for messages to people.
    fn peer(&self) -> String;

    /// Takes the lane apart, so that two threads can use the directions.
    fn split(self: Box<Self>) -> io::Result<LaneHalves>;
}

/// A lane's two directions, and the handle that ends both.
pub struct LaneHalves {
    /// Towards the peer.
    pub sender: Box<dyn LaneSender>,
    /// From the peer.
    pub receiver: Box<dyn LaneReceiver>,
    /// Ends the lane from any thread.
    pub closer: Arc<dyn LaneCloser>,
}

impl std::fmt::Debug for LaneHalves {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LaneHalves").finish_non_exhaustive()
    }
}

/// Sends frames.
pub trait LaneSender: Send {
    /// Sends one frame, given in parts that are to be joined; returns when the transport has taken
    /// all of it. Blocks while the peer does not read.
    fn send(&mut self, frame: &mut [IoSlice<'_>]) -> io::Result<()>;

    /// Writes pages from the [attached](Dialer::attach) memory to the same place in the [exposed](Acceptor::expose) one.
    /// They are there before the next frame of this lane is received; what is read is what the pages hold at
    /// any moment until then. Asked only where [`Dialer::attach`] has said that it can be done.
    fn write_pages(&mut self, runs: &[DirectRun]) -> io::Result<()> {
        let _ = runs;
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// A run of pages in one region, in bytes; whole pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DirectRun {
    /// The region.
    pub region: RegionId,
    /// Where in the region.
    pub offset: u64,
    /// How much.
    pub len: u64,
}

/// Receives frames.
pub trait LaneReceiver: Send {
    /// Waits for the next frame and puts all of it into the buffer. The end of the lane is an error
    /// of kind `UnexpectedEof`; a frame longer than the engine's limit is one of kind `InvalidData`.
    fn receive(&mut self, frame: &mut FrameBuffer) -> io::Result<()>;
}

/// Ends a lane.
pub trait LaneCloser: Send + Sync {
    /// Ends both directions now: calls that wait in the other halves return an error soon, and the
    /// peer notices. Calling it again does nothing.
    fn close(&self);
}
