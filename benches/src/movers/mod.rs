//! What moves a guest from one host to the other: `migrate`, and QEMU in several settings.

mod certificates;
mod ours;
mod qemu;
mod qmp;
mod subject;

use std::time::Duration;

pub(crate) use ours::{Ours, Setting, migrate_program};
pub(crate) use qemu::{QEMU_PREFIX, Qemu, QemuSetting};
pub(crate) use subject::{Memory, Subject};

use crate::BenchError;
use crate::network::Network;
use crate::process::Usage;
use crate::scratch::Scratch;

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
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moved {
    /// From the order to migrate until the mover says that it is done.
    pub(crate) seconds: f64,
    /// The guest's standstill as the mover itself tells it.
    pub(crate) downtime_ms: Option<f64>,
    /// Bytes that left the source's interface.
    pub(crate) wire_bytes: u64,
    pub(crate) source: Usage,
    pub(crate) destination: Usage,
    pub(crate) rounds: u64,
    /// The strongest throttle of the guest.
    pub(crate) throttle_percent: f64,
    /// Whether it came to an end in time.
    pub(crate) converged: bool,
}

/// One way to move a guest.
pub(crate) trait Mover: std::fmt::Debug {
    /// Unique among the movers of a run.
    fn name(&self) -> &str;

    /// What it needs for these guests and this machine does not have.
    fn missing(&self, subjects: &[Subject]) -> Vec<String>;

    /// Starts the guest, moves it, and checks that it arrived.
    fn run(&self, task: Task<'_>) -> Result<Moved, BenchError>;
}
