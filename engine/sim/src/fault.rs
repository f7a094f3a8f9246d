//! What can go wrong, and when.

use std::time::Duration;

use pageferry::transport::LaneRole;
use pageferry::wire::Kind;

/// When a fault strikes. It strikes once.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Trigger {
    /// At a moment.
    At(Duration),
    /// When a frame is handed to its lane.
    Sent(Which),
    /// When a frame has arrived as a whole.
    Arrived(Which),
}

/// Which frame.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Which {
    /// Counted over all lanes and both directions, from 0.
    Number(u64),
    /// The nth of its kind, from 0.
    Kind(Kind, u64),
}

/// Which lanes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Scope {
    /// The lane of the frame that triggered the fault; all lanes if none did.
    Lane,
    /// Lanes with a role.
    Role(LaneRole),
    /// All lanes, and connecting is impossible too.
    Link,
}

/// A broken connection.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Cut {
    pub(crate) scope: Scope,
    /// After how long the source's host reports it; `None` when it only falls silent.
    pub(crate) source_notices: Option<Duration>,
    /// The same at the destination.
    pub(crate) destination_notices: Option<Duration>,
    /// For a whole link: when connecting works again.
    pub(crate) heals_after: Option<Duration>,
}

/// What goes wrong.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Fault {
    /// One byte of the triggering frame changes on the way.
    Flip { offset: u64, mask: u8 },
    /// Of the triggering frame only so many bytes arrive, then the cut.
    Truncate { bytes: u64, cut: Cut },
    /// The connection breaks.
    Cut(Cut),
    /// Nothing arrives in the given directions for a while, or for ever.
    Stall { scope: Scope, out: bool, back: bool, lasts: Option<Duration> },
    /// The destination's process dies; another may listen in its place, which knows nothing.
    Kill { restart: bool },
    /// The user cancels at the source.
    CancelSource,
    /// The user cancels at the destination.
    CancelDestination,
    /// The user wants the switch-over now.
    SwitchOver,
    /// The user changes the downtime limit.
    DowntimeLimit(Duration),
}

impl Fault {
    /// For statistics.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Flip { .. } => "flip",
            Self::Truncate { .. } => "truncate",
            Self::Cut(Cut { scope: Scope::Link, .. }) => "cut link",
            Self::Cut(_) => "cut lane",
            Self::Stall { lasts: None, .. } => "stall for ever",
            Self::Stall { .. } => "stall",
            Self::Kill { restart: true } => "kill and restart destination",
            Self::Kill { restart: false } => "kill destination",
            Self::CancelSource => "cancel at source",
            Self::CancelDestination => "cancel at destination",
            Self::SwitchOver => "switch over now",
            Self::DowntimeLimit(_) => "new downtime limit",
        }
    }

    /// Whether it needs a frame to strike at.
    pub(crate) fn damages_frame(&self) -> bool {
        matches!(self, Self::Flip { .. } | Self::Truncate { .. })
    }
}

/// Calls into the VMs that can fail.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub(crate) enum Call {
    Begin,
    StartTracking,
    Harvest,
    Rearm,
    Throttle,
    Pause,
    Save,
    BeforeHandover,
    Resume,
    Prepare,
    Load,
    Commit,
}
