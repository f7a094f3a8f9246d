//! The drivers: they own threads, lanes and the clock, perform what a session asks for, and tell it
//! what happened. They decide nothing (R15).

mod destination;
mod door;
mod lane;
mod pace;
mod receive;
mod send;
mod source;
mod verify;

pub use destination::Destination;
pub use source::Source;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::Error;
use crate::host::{Joiner, Observer, Spawner, StdSpawner, ThreadRole};
use crate::stats::Event;

/// What the caller may lend beside its VM.
#[derive(Clone)]
struct Lent {
    observer: Option<Arc<dyn Observer>>,
    spawner: Arc<dyn Spawner>,
}

impl Default for Lent {
    fn default() -> Self {
        Self { observer: None, spawner: Arc::new(StdSpawner) }
    }
}

impl Lent {
    fn notify(&self, event: &Event) {
        if let Some(observer) = &self.observer {
            observer.event(event);
        }
    }

    fn spawn(&self, role: ThreadRole, work: impl FnOnce() + Send + 'static) -> Result<Box<dyn Joiner>, Error> {
        self.spawner.spawn(role, Box::new(work)).map_err(|source| Error::Host { what: "a thread", source })
    }
}

/// Counts that all threads of one side keep.
#[derive(Debug, Default)]
struct Counters {
    /// Bytes of frames, both directions.
    wire_bytes: AtomicU64,
    /// Frames received on any lane: signs of life.
    frames_received: AtomicU64,
    /// Bytes of page data received, or of memory verified: what the other side sees as progress.
    progress: AtomicU64,
    /// Pages covered so far.
    pages: AtomicU64,
    /// Of them, zero pages.
    zero_pages: AtomicU64,
}

impl Counters {
    fn add(counter: &AtomicU64, value: u64) {
        counter.fetch_add(value, Ordering::Relaxed);
    }

    fn read(counter: &AtomicU64) -> u64 {
        counter.load(Ordering::Relaxed)
    }
}
