//! What a migration tells about itself: events while it runs, a report at its end.

use std::time::Duration;

use crate::units::PAGE_SIZE;

/// Something happened on the way.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Event {
    /// The peer accepted the migration; pages flow from now on.
    Accepted {
        /// The peer's address.
        peer: String,
        /// Pages of the guest.
        pages_total: u64,
    },
    /// How things stand; a few times a second.
    Progress(Progress),
    /// A round has ended and was acknowledged.
    RoundFinished(RoundReport),
    /// The vCPUs are slowed down by this many per cent from now on.
    Throttled(u8),
    /// The guest was stopped for the switch-over.
    Paused,
    /// The guest runs at the destination.
    HandedOver,
    /// The migration failed; the guest stays at the source.
    Aborted,
}

/// A moment of a running migration.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// Round, from 0.
    pub round: u32,
    /// Pages this round set out to send.
    pub round_pages: u64,
    /// Pages of it still to send.
    pub remaining_pages: u64,
    /// Bytes on the wire so far, all rounds.
    pub wire_bytes: u64,
    /// Bytes of guest memory covered so far, all rounds (zero pages count in full).
    pub guest_bytes: u64,
    /// Bytes per second on the wire, over the last second or so.
    pub wire_rate: f64,
    /// Bytes of guest memory dirtied per second, at the last harvest; `None` before the first.
    pub dirty_rate: Option<f64>,
    /// Time since the start.
    pub elapsed: Duration,
    /// Time left, as far as one can tell; `None` while it does not converge.
    pub remaining: Option<Duration>,
}

/// One round: what it sent, and what had become dirty meanwhile.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RoundReport {
    /// From 0.
    pub round: u32,
    /// Whether the guest was stopped.
    pub stopped: bool,
    /// Pages covered.
    pub pages: u64,
    /// Of them, pages of zeros (no content sent).
    pub zero_pages: u64,
    /// Bytes of guest memory covered.
    pub bytes: u64,
    /// Bytes on the wire, frame headers included.
    pub wire_bytes: u64,
    /// From the first batch to the destination's acknowledgement.
    pub duration: Duration,
    /// Wire bytes per second.
    pub wire_rate: f64,
    /// Pages dirty at its end.
    pub dirty_pages: u64,
    /// Bytes of guest memory dirtied per second during the round: a page counts once, however often it was written.
    pub dirty_rate: f64,
    /// Bytes of pages that the guest wrote per second when it wrote most, as the dirty bits showed it every half second, and
    /// showed it twice. A round that lasts longer than the guest takes for all pages that it ever writes hides this rate from
    /// `dirty_rate`; it is never less than that.
    pub write_rate: f64,
    /// Downtime if the switch-over came now; `None` when the guest is stopped already.
    pub predicted_downtime: Option<Duration>,
    /// vCPU throttle in per cent during the round.
    pub throttle: u8,
    /// What became of its pages.
    pub stages: Stages,
}

/// What became of pages on their way to the wire, and what finding that out took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stages {
    /// Pages of zeros.
    pub zero_pages: u64,
    /// Dirty pages whose content was the same as last sent: nothing was sent.
    pub unchanged_pages: u64,
    /// Pages of one repeated 8-byte value.
    pub pattern_pages: u64,
    /// Pages sent as a delta against what was last sent.
    pub delta_pages: u64,
    /// Pages sent as a reference to an equal page.
    pub copied_pages: u64,
    /// Pages sent whole.
    pub literal_pages: u64,
    /// Times that a page was not sent because the guest would have written it again before the end of the
    /// round, or before it stood still.
    pub spared_pages: u64,
    /// Bytes of deltas before packing.
    pub delta_bytes: u64,
    /// Bytes of frame headers and records.
    pub head_bytes: u64,
    /// Bytes of payload (literal pages, deltas, patterns) before packing.
    pub payload_bytes: u64,
    /// Bytes of payload after packing.
    pub packed_bytes: u64,
    /// Encoder time spent reading, comparing and hashing, over all threads.
    pub scan_time: Duration,
    /// Encoder time spent on deltas.
    pub delta_time: Duration,
    /// Encoder time spent on packing, trials of other levels included.
    pub pack_time: Duration,
}

impl Stages {
    /// Adds others to these.
    pub fn add(&mut self, other: &Self) {
        self.zero_pages += other.zero_pages;
        self.unchanged_pages += other.unchanged_pages;
        self.pattern_pages += other.pattern_pages;
        self.delta_pages += other.delta_pages;
        self.copied_pages += other.copied_pages;
        self.literal_pages += other.literal_pages;
        self.spared_pages += other.spared_pages;
        self.delta_bytes += other.delta_bytes;
        self.head_bytes += other.head_bytes;
        self.payload_bytes += other.payload_bytes;
        self.packed_bytes += other.packed_bytes;
        self.scan_time += other.scan_time;
        self.delta_time += other.delta_time;
        self.pack_time += other.pack_time;
    }

    /// Pages that reached an encoder.
    pub fn pages(&self) -> u64 {
        let references = self.zero_pages + self.unchanged_pages + self.copied_pages;
        references + self.pattern_pages + self.delta_pages + self.literal_pages
    }

    /// Bytes of guest memory that these pages are.
    pub fn covered_bytes(&self) -> u64 {
        self.pages() * PAGE_SIZE as u64
    }

    /// What each stage kept off the wire: `covered_bytes() == saved().total() + packed_bytes`.
    pub fn saved(&self) -> Saved {
        let whole = |pages: u64| pages * PAGE_SIZE as u64;
        Saved {
            zero: whole(self.zero_pages),
            unchanged: whole(self.unchanged_pages),
            pattern: self.pattern_pages * (PAGE_SIZE - size_of::<u64>()) as u64,
            delta: whole(self.delta_pages).saturating_sub(self.delta_bytes),
            copied: whole(self.copied_pages),
            packing: self.payload_bytes.saturating_sub(self.packed_bytes),
        }
    }
}

/// Bytes of page content that each stage kept off the wire. What the stages' own records took instead is
/// in [`Stages::head_bytes`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Saved {
    /// By pages of zeros.
    pub zero: u64,
    /// By pages that had not changed since they were last sent.
    pub unchanged: u64,
    /// By pages of one repeated value.
    pub pattern: u64,
    /// By deltas.
    pub delta: u64,
    /// By references to equal pages.
    pub copied: u64,
    /// By packing what the stages before had left.
    pub packing: u64,
}

impl Saved {
    /// By all stages together.
    pub fn total(&self) -> u64 {
        self.zero + self.unchanged + self.pattern + self.delta + self.copied + self.packing
    }
}

/// The guest's standstill, in parts that add up to [`total`](Self::total). Measured at the source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Downtime {
    /// Stopping vCPUs and devices.
    pub pause: Duration,
    /// Taking the last dirty bits.
    pub harvest: Duration,
    /// The last pages, from the harvest to the destination's having placed them.
    pub pages: Duration,
    /// Saving the machine state, and loading it at the destination.
    pub state: Duration,
    /// Comparing digests, and the full verification if one was asked for.
    pub digest: Duration,
    /// Commit to answer, without the destination's own part in it.
    pub commit: Duration,
    /// Starting the vCPUs at the destination.
    pub resume: Duration,
}

impl Downtime {
    /// From the order to pause until the guest ran at the destination.
    pub fn total(&self) -> Duration {
        self.pause + self.harvest + self.pages + self.state + self.digest + self.commit + self.resume
    }
}

/// What one side did, whatever the outcome.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Report {
    /// The migration; `None` if it never got a name.
    pub session: Option<crate::wire::SessionId>,
    /// From the call to its end.
    pub total: Duration,
    /// The guest's standstill; all zero if it was never stopped for good. Known at the source only.
    pub downtime: Downtime,
    /// Every round. Known at the source only.
    pub rounds: Vec<RoundReport>,
    /// Pages of the guest.
    pub pages_total: u64,
    /// Page contents sent (or received), zero pages not counted; a page sent twice counts twice.
    pub pages_sent: u64,
    /// Zero pages sent (or received) as records.
    pub pages_zero: u64,
    /// Bytes on the wire over all lanes, frame headers included, both directions' payload.
    pub wire_bytes: u64,
    /// Bytes of machine state.
    pub state_bytes: u64,
    /// Whether both sides' digests were equal; `None` if it never came to the comparison.
    pub digest_match: Option<bool>,
    /// Whether the full re-hash of both memories was equal; `None` if none was done.
    pub full_verify_match: Option<bool>,
    /// The strongest throttle in per cent.
    pub throttle_peak: u8,
    /// What became of the pages, and what that took. Known at the source only.
    pub stages: Stages,
}
