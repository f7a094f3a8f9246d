//! The protocol, without I/O: inputs and the time go in, actions come out (R15).
//!
//! Two state machines, [`SourceSession`] and [`DestinationSession`]. Whoever drives one hands every
//! event to `handle`, then performs what `poll_action` returns, in order, until it returns `None`,
//! and calls `handle(Tick)` when `poll_timeout` is reached. Times are measured from the start of the
//! session. No clock, thread, socket or random source is in here, so the simulator runs exactly what
//! a real migration runs.

mod destination;
mod measure;
mod source;

pub use destination::{DestinationAction, DestinationInput, DestinationSession, DestinationSetup, LaneKey, Phase};
pub use source::{SourceAction, SourceInput, SourceSession, SourceSetup};

use crate::error::Error;

/// How a session ended.
#[derive(Debug)]
pub enum Outcome {
    /// The guest runs at the destination, and both sides know it.
    HandedOver,
    /// The guest is the source's.
    SourceOwns(Error),
    /// The guest is the destination's, but something was not as it should be.
    DestinationOwns(Error),
    /// Commit may or may not have arrived.
    Undecided(Error),
}
