//! What goes into a destination session, and what comes out.

use std::time::Duration;

use crate::config::DestinationConfig;
use crate::digest::Digest;
use crate::error::Error;
use crate::stats::Event;
use crate::wire::{Greeting, GreetingRole, Message, Offer};

/// What a destination session starts from.
#[derive(Debug, Clone, Default)]
pub struct DestinationSetup {
    /// The user's choices.
    pub config: DestinationConfig,
}

/// The driver's name for a lane that has introduced itself.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct LaneKey(pub u64);

/// What happened.
#[derive(Debug)]
pub enum DestinationInput {
    /// Time has passed.
    Tick,
    /// A new lane introduced itself. Answered by `Adopt`, `Answer` or `Drop`.
    Greeted {
        /// The lane.
        lane: LaneKey,
        /// What it said.
        greeting: Greeting,
        /// The other end.
        peer: String,
    },
    /// A message came on the control lane.
    Message(Message),
    /// A frame came on some lane.
    Heard,
    /// Pages were placed, or memory verified.
    Progress,
    /// No lane can come in any more.
    DoorBroken(Error),
    /// The VMM has made room.
    RoomMade {
        /// The source may write into it.
        exposed: bool,
    },
    /// The VMM refuses the guest.
    RoomRefused(String),
    /// All lanes have ended a round and all its pages were placed.
    RoundComplete {
        /// The round.
        round: u32,
        /// Digest of all memory as placed so far.
        digest: Digest,
    },
    /// All memory was re-hashed.
    Verified {
        /// The digest.
        digest: Digest,
        /// How long it took.
        took: Duration,
    },
    /// The machine state was loaded.
    Loaded {
        /// How long it took.
        took: Duration,
    },
    /// The VMM has taken over, and runs the guest if it is to run.
    Started {
        /// How long it took.
        took: Duration,
    },
    /// The last action failed.
    Failed(Error),
    /// The control lane broke, and all that came on it was delivered.
    LinkLost(Error),
    /// The control lane takes nothing any more; `LinkLost` follows when all that came on it was delivered.
    ControlSendFailed(Error),
    /// A data lane broke.
    DataLaneLost(Error),
    /// The user wants the end.
    Cancel,
}

/// What is to be done, in order.
#[derive(Debug)]
pub enum DestinationAction {
    /// The lane belongs to the migration, as what its greeting said. A control lane replaces the one before.
    Adopt(LaneKey, GreetingRole),
    /// Send one message on the lane and close it.
    Answer(LaneKey, Message),
    /// Close the lane.
    Drop(LaneKey),
    /// Close all lanes of the migration; new ones may come.
    CloseLanes,
    /// Send a message on the control lane. A failure comes as `ControlSendFailed`.
    Send(Message),
    /// Ask the VMM for room; answer `RoomMade` or `RoomRefused`.
    MakeRoom(Box<Offer>),
    /// Place no page any more; return when no lane does.
    StopPlacing,
    /// Re-hash all memory; answer `Verified` or `Failed`.
    Verify,
    /// Load the machine state; answer `Loaded` or `Failed`.
    Load(Vec<u8>),
    /// The guest is this side's: take over, and run it if `run`; answer `Started` or `Failed`.
    Start {
        /// Whether it ran at the source.
        run: bool,
    },
    /// The guest is the source's: let go of it.
    AbortVm,
    /// Tell the observer.
    Notify(Event),
}

/// Where a destination session stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Nobody has come yet.
    Waiting,
    /// A source has introduced itself.
    AwaitOffer,
    /// The VMM makes room.
    MakingRoom,
    /// Pages come in.
    Receiving,
    /// Everything is here; re-hashing.
    Verifying,
    /// Everything is here; loading the machine state.
    Loading,
    /// Prepared was said; Commit was not heard.
    Ready,
    /// Commit was heard; the VMM starts the guest.
    Starting,
    /// The guest runs; the source may not know yet.
    AwaitDone,
    /// The guest was given up around Commit; the source may not know yet.
    GivenBack,
    /// The migration has failed before Prepared, and the source may have said why.
    AwaitReason,
    /// Over.
    Ended,
}
