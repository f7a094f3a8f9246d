//! What the host lends the engine: threads, an ear for events, and a hand on the controls.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::stats::Event;

/// What a thread of the engine does, for its name and its seccomp filter.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum ThreadRole {
    /// Reads the control lane.
    Control,
    /// Encodes batches.
    Encoder(u16),
    /// Sends on a data lane.
    Sender(u16),
    /// Receives and places from a data lane.
    Receiver(u16),
    /// Accepts lanes and hears their introduction.
    Door,
    /// Re-hashes memory for a full verification.
    Verifier(u16),
    /// Writes or reads a saved guest's file.
    File(u16),
    /// A transport's own work, by its name.
    Transport(&'static str),
}

/// Runs the engine's threads. VMMs that filter system calls per thread lend their own.
pub trait Spawner: Send + Sync {
    /// Starts `work` on a thread of its own.
    fn spawn(&self, role: ThreadRole, work: Box<dyn FnOnce() + Send>) -> io::Result<Box<dyn Joiner>>;
}

/// A started thread.
pub trait Joiner: Send {
    /// Waits for its end.
    fn join(self: Box<Self>);
}

/// Plain `std::thread`s, named after their role.
#[derive(Debug, Default, Clone, Copy)]
pub struct StdSpawner;

impl Spawner for StdSpawner {
    fn spawn(&self, role: ThreadRole, work: Box<dyn FnOnce() + Send>) -> io::Result<Box<dyn Joiner>> {
        let name = match role {
            ThreadRole::Control => "ferry-control".to_owned(),
            ThreadRole::Encoder(index) => format!("ferry-encode-{index}"),
            ThreadRole::Sender(lane) => format!("ferry-send-{lane}"),
            ThreadRole::Receiver(lane) => format!("ferry-recv-{lane}"),
            ThreadRole::Door => "ferry-door".to_owned(),
            ThreadRole::Verifier(index) => format!("ferry-hash-{index}"),
            ThreadRole::File(index) => format!("ferry-file-{index}"),
            ThreadRole::Transport(work) => format!("ferry-{work}"),
        };
        let thread = std::thread::Builder::new().name(name).spawn(work)?;
        Ok(Box::new(StdJoiner(thread)))
    }
}

struct StdJoiner(std::thread::JoinHandle<()>);

impl Joiner for StdJoiner {
    fn join(self: Box<Self>) {
        // A panic was caught and told by the thread itself.
        let _ = self.0.join();
    }
}

/// Hears what happens. Called from the thread that runs the migration: return quickly.
pub trait Observer: Send + Sync {
    /// Something happened.
    fn event(&self, event: &Event);
}

impl<F: Fn(&Event) + Send + Sync> Observer for F {
    fn event(&self, event: &Event) {
        self(event);
    }
}

/// Steers a running migration from any thread. Clones steer the same one.
#[derive(Clone, Debug)]
pub struct Control(Arc<ControlState>);

#[derive(Debug)]
struct ControlState {
    cancelled: AtomicBool,
    switch_now: AtomicBool,
    /// Microseconds; `u64::MAX` for "as configured".
    downtime_limit_us: AtomicU64,
    /// Bytes per second, 0 for none; `u64::MAX` for "as configured".
    bandwidth: AtomicU64,
    doorbell: Sender<()>,
    rung: Receiver<()>,
}

impl Default for Control {
    fn default() -> Self {
        let (doorbell, rung) = bounded(1);
        Self(Arc::new(ControlState {
            cancelled: AtomicBool::new(false),
            switch_now: AtomicBool::new(false),
            downtime_limit_us: AtomicU64::new(u64::MAX),
            bandwidth: AtomicU64::new(u64::MAX),
            doorbell,
            rung,
        }))
    }
}

impl Control {
    /// A handle for one migration.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks the migration to end with the guest at the source. Too late once Commit has left; a
    /// settling that is only asked for ends undecided.
    pub fn cancel(&self) {
        self.0.cancelled.store(true, Ordering::Release);
        self.ring();
    }

    /// Asks for the switch-over now, whatever downtime is predicted.
    pub fn switch_over_now(&self) {
        self.0.switch_now.store(true, Ordering::Release);
        self.ring();
    }

    /// Changes the downtime limit.
    pub fn set_downtime_limit(&self, limit: Duration) {
        let us = u64::try_from(limit.as_micros()).unwrap_or(u64::MAX - 1);
        self.0.downtime_limit_us.store(us, Ordering::Release);
        self.ring();
    }

    /// Changes the bandwidth cap (bytes per second over all lanes together, at least
    /// [`MIN_BANDWIDTH`](crate::limits::MIN_BANDWIDTH)); `None` lifts it.
    pub fn set_bandwidth(&self, bytes_per_second: Option<u64>) {
        let value = bytes_per_second.map_or(0, |rate| rate.clamp(crate::limits::MIN_BANDWIDTH, u64::MAX - 1));
        self.0.bandwidth.store(value, Ordering::Release);
        self.ring();
    }

    /// Whether [`cancel`](Self::cancel) was called.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::Acquire)
    }

    pub(crate) fn wants_switch_over(&self) -> bool {
        self.0.switch_now.load(Ordering::Acquire)
    }

    pub(crate) fn downtime_limit(&self) -> Option<Duration> {
        let us = self.0.downtime_limit_us.load(Ordering::Acquire);
        (us != u64::MAX).then(|| Duration::from_micros(us))
    }

    /// `Some(None)` when the cap was lifted.
    #[allow(clippy::option_option)]
    pub(crate) fn bandwidth(&self) -> Option<Option<u64>> {
        match self.0.bandwidth.load(Ordering::Acquire) {
            u64::MAX => None,
            0 => Some(None),
            rate => Some(Some(rate)),
        }
    }

    pub(crate) fn doorbell(&self) -> &Receiver<()> {
        &self.0.rung
    }

    fn ring(&self) {
        // A full doorbell is one that rings already.
        let _ = self.0.doorbell.try_send(());
    }
}
