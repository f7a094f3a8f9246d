//! Errors, named by whose fault they are, and the one question after a failure: who owns the guest?

use std::io;
use std::time::Duration;

use crate::memory::{LayoutError, MemoryError};
use crate::stats::Report;
use crate::transport::{LaneRole, TransportError};
use crate::vm::VmError;

/// Why a migration ended early.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A lane could not be opened or accepted.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// A lane broke.
    #[error("the {lane} to {peer} broke: {source}")]
    LaneBroken {
        /// Which lane.
        lane: LaneRole,
        /// The other end.
        peer: String,
        /// What the host said.
        source: io::Error,
    },
    /// The peer stopped answering, though the link may stand.
    #[error("{peer} has not {what} for {silence:?}; it may be hung or cut off")]
    PeerSilent {
        /// The other end.
        peer: String,
        /// What was expected of it.
        what: &'static str,
        /// How long it was waited for.
        silence: Duration,
    },
    /// The peer sent something that is no valid message: corruption, or not a Pageferry.
    #[error("invalid data from {peer} on the {lane}: {source}")]
    InvalidMessage {
        /// Which lane.
        lane: LaneRole,
        /// The other end.
        peer: String,
        /// What was wrong.
        source: crate::wire::WireError,
    },
    /// A valid message that the protocol does not allow now.
    #[error("{peer} misbehaved: {what}")]
    PeerMisbehaved {
        /// The other end.
        peer: String,
        /// What it did.
        what: String,
    },
    /// The peer speaks no version of the protocol that this side speaks.
    #[error(
        "{peer} speaks protocol {theirs_min} to {theirs_max}, this side {ours_min} to {ours_max}: upgrade the older side"
    )]
    Version {
        /// The other end.
        peer: String,
        /// The lowest version it speaks.
        theirs_min: u16,
        /// The highest version it speaks.
        theirs_max: u16,
        /// The lowest version this side speaks.
        ours_min: u16,
        /// The highest version this side speaks.
        ours_max: u16,
    },
    /// The destination refused the guest before the first page.
    #[error("{peer} refused the guest: {reason}")]
    Refused {
        /// The other end.
        peer: String,
        /// Its reason.
        reason: String,
    },
    /// The peer gave up.
    #[error("{peer} gave up: {reason}")]
    PeerAborted {
        /// The other end.
        peer: String,
        /// Its reason.
        reason: String,
    },
    /// The two memories are not the same.
    #[error(
        "memory differs between source and destination ({check}): source {ours}, destination {theirs}; the guest was not handed over"
    )]
    DigestMismatch {
        /// Which comparison found it.
        check: &'static str,
        /// The source's digest.
        ours: crate::digest::Digest,
        /// The destination's digest.
        theirs: crate::digest::Digest,
    },
    /// A call into the VMM failed.
    #[error("the VMM could not {what}: {source}")]
    Vm {
        /// What was asked of it.
        what: &'static str,
        /// Its error.
        source: VmError,
    },
    /// Guest memory could not be reached.
    #[error("guest memory: {0}")]
    Memory(#[from] MemoryError),
    /// The guest's layout cannot be migrated.
    #[error("guest layout: {0}")]
    Layout(#[from] LayoutError),
    /// The guest was paused, and the destination went on and on.
    #[error(
        "the guest had stood still for {stood:.1?}, where {predicted:.1?} were predicted, and {peer} still had not taken all of it: it runs on here; look at the link and at the destination's load"
    )]
    StoodTooLong {
        /// The other end.
        peer: String,
        /// How long the guest has stood still.
        stood: Duration,
        /// What was predicted before it was paused.
        predicted: Duration,
    },
    /// The user asked for the end.
    #[error("cancelled")]
    Cancelled,
    /// The total timeout came.
    #[error(
        "not finished after {0:?}: the guest dirties memory faster than the link carries it; raise the timeout or the downtime limit, allow throttling, or switch over at the timeout"
    )]
    TimedOut(Duration),
    /// So many rounds have not made the guest's memory small enough.
    #[error(
        "not finished after {0} rounds: the guest dirties memory faster than the link carries it; raise the downtime limit, allow throttling, or switch over at the timeout"
    )]
    TooManyRounds(u32),
    /// No source came.
    #[error("no source connected within {0:?}")]
    NoSource(Duration),
    /// The caller asked for something impossible.
    #[error("{0}")]
    Misuse(String),
    /// The host could not give a thread or another resource.
    #[error("the host refused {what}: {source}")]
    Host {
        /// What was asked for.
        what: &'static str,
        /// What it said.
        source: io::Error,
    },
    /// An invariant of the engine broke. The migration ends; the VMM goes on.
    #[error("a bug in pageferry ended the migration: {0}; please report it")]
    Bug(String),
}

impl Error {
    /// A lane ended as it does when the peer closes it: that says nothing about why.
    pub(crate) fn is_end_of_lane(&self) -> bool {
        use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, UnexpectedEof};
        let ends = [BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, UnexpectedEof];
        matches!(self, Self::LaneBroken { source, .. } if ends.contains(&source.kind()))
    }
}

/// A failed migration: who owns the guest, why, and how far it got.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Failed {
    /// The guest is at the source: it was resumed there (or left as it was) and can be migrated again.
    #[error("{error}")]
    SourceStillOwns {
        /// Why it failed.
        error: Error,
        /// How far it got.
        report: Box<Report>,
    },
    /// The guest runs at the destination, but something after that failed.
    #[error("the guest runs at the destination, but: {error}")]
    DestinationOwns {
        /// What failed.
        error: Error,
        /// How far it got.
        report: Box<Report>,
    },
    /// Commit may or may not have arrived, and the peer cannot be asked. The guest is paused here
    /// and its state kept; it must run on one side only.
    #[error("it is undecided which side owns the guest: {error}")]
    Undecided {
        /// What [`crate::Source::settle`] and [`crate::Destination::settle`] ask about later.
        unsettled: Unsettled,
        /// What broke.
        error: Error,
        /// How far it got.
        report: Box<Report>,
    },
}

/// A migration that is to be settled later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unsettled {
    /// Which migration.
    pub session: crate::wire::SessionId,
    /// Whether the guest ran before it.
    pub run: bool,
}

impl Failed {
    /// Why the migration failed.
    pub fn error(&self) -> &Error {
        match self {
            Self::SourceStillOwns { error, .. }
            | Self::DestinationOwns { error, .. }
            | Self::Undecided { error, .. } => error,
        }
    }

    /// How far it got.
    pub fn report(&self) -> &Report {
        match self {
            Self::SourceStillOwns { report, .. }
            | Self::DestinationOwns { report, .. }
            | Self::Undecided { report, .. } => report,
        }
    }
}
