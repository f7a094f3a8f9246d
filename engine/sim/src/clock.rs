//! Virtual time: a queue of events, and nothing happens between two of them.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;

use pageferry::transport::LaneRole;

use crate::network::{End, LaneId, Way};
use crate::random::Random;
use crate::trace::Trace;

/// A process that takes part: a source or a destination. A new process has a new number.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub(crate) struct HostId(pub(crate) u32);

/// What can happen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Event {
    /// The next segment on its way arrives.
    Deliver(LaneId, Way),
    /// A stalled direction moves again.
    Unstall(LaneId, Way),
    /// One end of a cut lane learns of it.
    Notice(LaneId, End),
    /// There may be something to read.
    Readable(LaneId, End),
    /// There may be room to write, or an error.
    Writable(LaneId, End),
    /// An attempt to connect, begun at the given time, gets through or fails.
    Dial(HostId, LaneRole, Duration),
    /// A driver's thread looks at what it waits for.
    Turn(HostId),
    /// A driver's waiting time is over; valid for the given wait only.
    Timer(HostId, u64),
    /// A call into the VM returns.
    Work(HostId),
    /// An encoder thread goes on.
    Encoder(HostId, usize),
    /// A sending thread goes on.
    Sender(HostId, usize),
    /// A sending thread has been idle since the given moment.
    Heartbeat(HostId, usize, u64),
    /// A receiving thread that waited at the barrier goes on.
    Receiver(HostId, usize),
    /// All memory has been hashed.
    Verified(HostId),
    /// A lane has stood in the door for too long.
    DoorTimeout(LaneId),
    /// The last message has had its time to leave.
    Farewell(HostId),
    /// A lane that was only answered is closed.
    CloseAnswered(LaneId),
    /// The guest does something.
    Guest,
    /// Something goes wrong: an index into the scenario's faults.
    Fault(usize),
    /// A stranger does something at the destination's door.
    Stranger(usize),
}

#[derive(PartialEq, Eq)]
struct Entry {
    at: Duration,
    order: u64,
    event: Event,
}

impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// Time, chance and memory of a run.
pub(crate) struct Clock {
    pub(crate) now: Duration,
    pub(crate) random: Random,
    pub(crate) trace: Trace,
    /// Events handled so far.
    pub(crate) steps: u64,
    queue: BinaryHeap<Reverse<Entry>>,
    order: u64,
}

impl Clock {
    pub(crate) fn new(random: Random, trace: Trace) -> Self {
        Self { now: Duration::ZERO, random, trace, steps: 0, queue: BinaryHeap::new(), order: 0 }
    }

    pub(crate) fn at(&mut self, at: Duration, event: Event) {
        self.order += 1;
        self.queue.push(Reverse(Entry { at: at.max(self.now), order: self.order, event }));
    }

    pub(crate) fn after(&mut self, delay: Duration, event: Event) {
        self.at(self.now.saturating_add(delay), event);
    }

    /// Goes to the next event.
    pub(crate) fn pop(&mut self) -> Option<Event> {
        let Reverse(entry) = self.queue.pop()?;
        self.now = entry.at;
        self.steps += 1;
        Some(entry.event)
    }

    pub(crate) fn note(&mut self, who: &str, what: impl std::hash::Hash, text: impl FnOnce() -> String) {
        self.trace.note(self.now, who, what, text);
    }
}
