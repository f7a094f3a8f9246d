//! What goes into a source session, and what comes out.

use std::time::Duration;

use crate::config::SourceConfig;
use crate::converge::Convergence;
use crate::digest::{Digest, DigestKey};
use crate::dirty::Point;
use crate::encode::Tally;
use crate::error::Error;
use crate::memory::Layout;
use crate::stats::Event;
use crate::vm::Step;
use crate::wire::{Message, SessionId};

/// What a source session starts from.
pub struct SourceSetup {
    /// The user's choices.
    pub config: SourceConfig,
    /// Fresh random name of the migration.
    pub session: SessionId,
    /// Fresh random key of its page hashes.
    pub digest_key: DigestKey,
    /// The guest's memory.
    pub layout: Layout,
    /// The VMM's description of the guest.
    pub vm_config: Vec<u8>,
    /// Whether the guest runs.
    pub run: bool,
    /// Machine state expected, in bytes.
    pub state_bytes_estimate: u64,
    /// When to stop.
    pub policy: Box<dyn Convergence>,
}

impl std::fmt::Debug for SourceSetup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SourceSetup").field("config", &self.config).finish_non_exhaustive()
    }
}

/// What happened.
#[derive(Debug)]
pub enum SourceInput {
    /// Time has passed.
    Tick,
    /// A control lane stands, after `Dial` or `DialSettle`.
    Dialled {
        /// The other end.
        peer: String,
    },
    /// All data lanes stand.
    LanesOpen,
    /// A message came on the control lane.
    Message(Message),
    /// Tracking has started, and all pages that may hold content are dirty.
    Tracking {
        /// How many those are.
        dirty_pages: u64,
    },
    /// All batches of the round were handed to lanes (or given back, after `AbandonRound`).
    RoundQueued,
    /// Every lane has sent its end of the round.
    RoundFlushed(Tally),
    /// Dirty bits were taken.
    Harvested {
        /// Pages dirty now.
        dirty_pages: u64,
        /// Writes of pages that were seen since the harvest before
        /// ([`Accumulator::take_writes`](crate::dirty::Accumulator::take_writes)).
        writes: u64,
    },
    /// The guest stands still.
    Paused,
    /// The machine state was saved and its frames handed to the control lane.
    Saved {
        /// Its length.
        bytes: u64,
        /// How long that had to wait for the control lane to take what was saved.
        waited: Duration,
    },
    /// All memory was re-hashed.
    FullDigest(Digest),
    /// `Step(BeforeHandover)` was done.
    StepDone,
    /// The last action failed. The control lane may be sound.
    Failed(Error),
    /// The control lane broke, and all that came on it was delivered.
    LinkLost(Error),
    /// The control lane takes nothing any more; `LinkLost` follows when all that came on it was delivered.
    ControlSendFailed(Error),
    /// A data lane broke.
    DataLaneLost(Error),
    /// The vCPUs are slowed down as ordered.
    Throttled,
    /// The VMM cannot throttle.
    ThrottleRefused,
    /// The user wants the end.
    Cancel,
    /// The user wants the switch-over.
    SwitchOverNow,
    /// The user changed the downtime limit.
    DowntimeLimit(Duration),
}

/// What is to be done, in order.
#[derive(Debug)]
pub enum SourceAction {
    /// Open the control lane; answer `Dialled` or `LinkLost`.
    Dial,
    /// Open a fresh control lane to ask who owns the guest; answer `Dialled` or `LinkLost`.
    DialSettle,
    /// Send a message on the control lane. A failure comes as `ControlSendFailed`.
    Send(Message),
    /// Open data lanes; answer `LanesOpen` or `LinkLost`.
    OpenLanes {
        /// So many.
        count: u16,
        /// The destination lets pages be written straight into its memory.
        exposed: bool,
    },
    /// Start tracking and mark populated pages dirty; answer `Tracking` or `Failed`.
    StartTracking,
    /// Plan and send all dirty pages; answer `RoundQueued`, and `RoundFlushed` later.
    SendRound {
        /// The round.
        round: u32,
        /// Pages that may be left for the next round because the guest writes them again and again;
        /// `None` in a round after which no other is certain to come: the guest stands still.
        hold: Option<u64>,
    },
    /// Stop planning; what was not handed to a lane is dirty again. `RoundQueued` and
    /// `RoundFlushed` come as usual.
    AbandonRound,
    /// The destination holds all that was in flight.
    Acknowledge,
    /// Take dirty bits; answer `Harvested` or `Failed`. May come while a round is under way.
    Harvest(Point),
    /// Slow the vCPUs down by so many per cent; answer `Throttled`, or `ThrottleRefused` if the VMM cannot.
    Throttle(u8),
    /// Stop the guest; answer `Paused` or `Failed`.
    Pause,
    /// Save the machine state and send it in pieces; answer `Saved` or `Failed`.
    Save,
    /// Re-hash all memory; answer `FullDigest` or `Failed`.
    FullDigest,
    /// Tell the VMM; answer `StepDone` or `Failed` to `BeforeHandover`, nothing to the others.
    Step(Step),
    /// Run the guest again. A failure comes as `Failed`.
    Resume,
    /// Stop tracking.
    StopTracking,
    /// Tell the observer.
    Notify(Event),
}
