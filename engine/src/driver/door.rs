//! The door of the destination: accepts lanes, hears who they are, and drops strangers and slow
//! starters, while a migration goes on undisturbed behind it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;

use super::Lent;
use super::destination::DestinationEvent;
use crate::host::ThreadRole;
use crate::limits::{GREETING_TIMEOUT, MAX_GREETING, MAX_PENDING_LANES};
use crate::session::LaneKey;
use crate::transport::{Acceptor, Lane, LaneCloser, LaneHalves};
use crate::wire::{FrameBuffer, Greeting, Message};

/// How often the door looks at the clock and at its closing.
const LOOK: Duration = Duration::from_millis(50);

/// Pause after a failed accept, so that a host without descriptors is not asked in a tight loop.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Accept failures in a row after which the listener is taken for dead.
const MAX_ACCEPT_FAILURES: u32 = 50;

/// A lane that has introduced itself.
pub(super) struct Guest {
    pub(super) greeting: Greeting,
    pub(super) halves: LaneHalves,
    pub(super) peer: String,
}

/// Callers that the driver has not heard of yet; those that have greeted have no deadline any more.
type Pending = Arc<Mutex<HashMap<u64, (Arc<dyn LaneCloser>, Option<Instant>)>>>;

/// Accepts lanes until `closed` is set.
pub(super) fn keep(acceptor: &dyn Acceptor, lent: &Lent, events: &Sender<DestinationEvent>, closed: &AtomicBool) {
    let pending = Pending::default();
    let (mut next_key, mut failures) = (0, 0);
    while !closed.load(Ordering::Acquire) {
        match acceptor.accept(LOOK) {
            Ok(Some(lane)) => {
                failures = 0;
                next_key += 1;
                admit(lane, next_key, &pending, lent, events);
            }
            Ok(None) => {}
            Err(error) => {
                failures += 1;
                if failures == MAX_ACCEPT_FAILURES {
                    let _ = events.send(DestinationEvent::DoorBroken(error));
                    return;
                }
                std::thread::sleep(ACCEPT_RETRY);
            }
        }
        close_overdue(&pending);
    }
    for (closer, _) in lock(&pending).values() {
        closer.close();
    }
}

fn admit(lane: Box<dyn Lane>, key: u64, pending: &Pending, lent: &Lent, events: &Sender<DestinationEvent>) {
    if lock(pending).len() >= MAX_PENDING_LANES {
        return;
    }
    let peer = lane.peer();
    let Ok(halves) = lane.split() else { return };
    lock(pending).insert(key, (Arc::clone(&halves.closer), Some(Instant::now() + GREETING_TIMEOUT)));
    let (waiting, events) = (Arc::clone(pending), events.clone());
    let hear = move || {
        let mut halves = halves;
        let greeting = hear_greeting(&mut halves);
        // Whoever is no longer in the list was closed for being late.
        let in_time = lock(&waiting).get_mut(&key).map(|(_, deadline)| *deadline = None).is_some();
        match greeting {
            Some(greeting) if in_time => {
                let guest = Box::new(Guest { greeting, halves, peer });
                let _ = events.send(DestinationEvent::Greeted(LaneKey(key), guest));
            }
            _ => halves.closer.close(),
        }
        lock(&waiting).remove(&key);
    };
    if lent.spawn(ThreadRole::Door, hear).is_err() {
        lock(pending).remove(&key);
    }
}

fn hear_greeting(halves: &mut LaneHalves) -> Option<Greeting> {
    // A stranger gets room for a greeting, and for nothing else.
    let mut frame = FrameBuffer::with_limit(MAX_GREETING);
    halves.receiver.receive(&mut frame).ok()?;
    let first = frame.header().ok()?.sequence == 0;
    match Message::decode(&frame) {
        Ok(Message::Greeting(greeting)) if first => Some(greeting),
        _ => None,
    }
}

fn close_overdue(pending: &Pending) {
    let now = Instant::now();
    lock(pending).retain(|_, (closer, deadline)| {
        let in_time = deadline.is_none_or(|deadline| now < deadline);
        if !in_time {
            closer.close();
        }
        in_time
    });
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
