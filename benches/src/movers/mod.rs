//! What moves a guest from one host to the other: `migrate`, and QEMU in several settings.

mod certificates;
mod console;
mod ours;
mod qemu;
mod qmp;
mod setting;
mod subject;

use std::time::Duration;

pub(crate) use ours::{Ours, Setting, migrate_program};
pub(crate) use qemu::Qemu;
pub(crate) use setting::{QEMU_PREFIX, QemuSetting};
pub(crate) use subject::{Memory, Subject, forbidden_kvm};

use crate::BenchError;
use crate::network::Network;
use crate::process::Usage;
use crate::scratch::Scratch;
use crate::study::{self, Proof, Remaining, Stage, Stalls};

/// Where and how long a mover may work.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Task<'a> {
    pub(crate) network: &'a Network,
    pub(crate) subject: &'a Subject,
    /// For sockets, and for files that QEMU runs from.
    pub(crate) scratch: &'a Scratch,
    /// A migration that takes longer is given up.
    pub(crate) limit: Duration,
}

/// What one migration took.
#[derive(Clone, Debug)]
pub(crate) struct Moved {
    /// From the order to migrate until the mover says that it is done.
    pub(crate) seconds: f64,
    /// The guest's standstill as the mover itself tells it.
    pub(crate) downtime_ms: Option<f64>,
    /// The same as the guest tells it, and how long it stood still before and after.
    pub(crate) stalls: Stalls,
    /// What was still to be sent, over time.
    pub(crate) remaining: Vec<Remaining>,
    /// Bytes that left the source's interface.
    pub(crate) wire_bytes: u64,
    pub(crate) source: Usage,
    pub(crate) destination: Usage,
    pub(crate) rounds: u64,
    /// The strongest throttle of the guest.
    pub(crate) throttle_percent: f64,
    /// What the guest wrote meanwhile, as bytes of pages per second.
    pub(crate) guest_bytes_per_second: Option<f64>,
    /// Whether the guest ran at the destination before all of its memory was there.
    pub(crate) in_postcopy: bool,
    /// What shows that the guest arrived as it was.
    pub(crate) verified: Vec<Proof>,
    /// Where its bytes went, if the engine says so.
    pub(crate) stages: Vec<Stage>,
    /// Whether it came to an end in time.
    pub(crate) converged: bool,
}

/// One way to move a guest.
pub(crate) trait Mover: std::fmt::Debug {
    /// Unique among the movers of a run.
    fn name(&self) -> &str;

    /// Whether it is this project's.
    fn is_ours(&self) -> bool {
        false
    }

    /// Whether everything it sends goes over TCP.
    fn is_over_tcp(&self) -> bool {
        true
    }

    /// What a record says of it.
    fn facts(&self) -> study::Mover;

    /// What it needs for these guests and this machine does not have.
    fn missing(&self, subjects: &[Subject]) -> Vec<String>;

    /// Starts the guest, moves it, and checks that it arrived.
    fn run(&self, task: Task<'_>) -> Result<Moved, BenchError>;
}
