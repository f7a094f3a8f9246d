//! The door of the destination: accepts lanes, hears who they are, and drops strangers and slow
//! starters, while a migration goes on undisturbed behind it.

use std::collections::{BTreeMap, HashMap};
use std::io::IoSlice;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;

use super::Lent;
use super::destination::DestinationEvent;
use crate::host::ThreadRole;
use crate::limits::{GREETED_TIMEOUT, GREETING_TIMEOUT, MAX_GREETING, MAX_PENDING_LANES};
use crate::session::LaneKey;
use crate::transport::{Acceptor, Lane, LaneCloser, LaneHalves};
use crate::wire::{FrameBuffer, Greeting, Kind, Message, Refusal};

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

/// Callers that the driver has not heard of yet, in the order in which they came.
type Pending = Arc<Mutex<BTreeMap<u64, Caller>>>;

/// Somebody in the door.
struct Caller {
    closer: Arc<dyn LaneCloser>,
    /// The peer's host, or its network: without its port.
    host: String,
    has_greeted: bool,
    /// By when it has to greet, or the driver to hear of it.
    deadline: Instant,
}

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
    for caller in lock(&pending).values() {
        caller.closer.close();
    }
}

fn admit(lane: Box<dyn Lane>, key: u64, pending: &Pending, lent: &Lent, events: &Sender<DestinationEvent>) {
    if !make_room(&mut lock(pending)) {
        return;
    }
    let peer = lane.peer();
    let Ok(halves) = lane.split() else { return };
    let (closer, host) = (Arc::clone(&halves.closer), host_of(&peer));
    let deadline = Instant::now() + GREETING_TIMEOUT;
    lock(pending).insert(key, Caller { closer, host, has_greeted: false, deadline });
    let (waiting, events) = (Arc::clone(pending), events.clone());
    let hear = move || {
        let mut halves = halves;
        let greeting = hear_greeting(&mut halves);
        // Whoever is no longer in the list was closed for being late. From here on `announce` sees to the time; the list's is
        // longer, so that no lane is closed that the driver has just taken.
        let in_time = lock(&waiting).get_mut(&key).map(|caller| caller.has_greeted(GREETED_TIMEOUT * 2)).is_some();
        match greeting {
            Some(greeting) if in_time => {
                announce(&events, LaneKey(key), Box::new(Guest { greeting, halves, peer }), GREETED_TIMEOUT);
            }
            _ => halves.closer.close(),
        }
        lock(&waiting).remove(&key);
    };
    if lent.spawn(ThreadRole::Door, hear).is_err() {
        lock(pending).remove(&key);
    }
}

impl Caller {
    fn has_greeted(&mut self, patience: Duration) {
        (self.has_greeted, self.deadline) = (true, Instant::now() + patience);
    }
}

/// Tells the driver of a caller, which may be busy with a call into the VMM.
fn announce(events: &Sender<DestinationEvent>, key: LaneKey, guest: Box<Guest>, patience: Duration) {
    let closer = Arc::clone(&guest.halves.closer);
    if events.send_timeout(DestinationEvent::Greeted(key, guest), patience).is_err() {
        closer.close();
    }
}

fn hear_greeting(halves: &mut LaneHalves) -> Option<Greeting> {
    // A stranger gets room for a greeting, and for nothing else.
    let mut frame = FrameBuffer::with_limit(MAX_GREETING);
    halves.receiver.receive(&mut frame).ok()?;
    let header = frame.header().ok()?;
    if header.kind == Kind::Transport {
        explain(halves, &mut frame);
        return None;
    }
    let first = header.sequence == 0;
    match Message::decode(&frame) {
        Ok(Message::Greeting(greeting)) if first => Some(greeting),
        _ => None,
    }
}

/// A transport of the source begins its lanes with a word of its own, which this side's transport does not know. Whatever it is, it
/// passes on to its engine what the engine says.
fn explain(halves: &mut LaneHalves, frame: &mut FrameBuffer) {
    let refusal = Message::Refuse(Refusal::Guest(OTHER_TRANSPORT.to_owned())).encode(0);
    if halves.sender.send(&mut [IoSlice::new(&refusal)]).is_ok() {
        // Closing at once could overtake it; the caller's time is limited.
        while halves.receiver.receive(frame).is_ok() {}
    }
}

const OTHER_TRANSPORT: &str = "its lanes come by another transport than this destination's: where one side names several addresses \
                               (paths), the other must name the same ones";

fn close_overdue(pending: &Pending) {
    let now = Instant::now();
    lock(pending).retain(|_, caller| {
        let in_time = now < caller.deadline;
        if !in_time {
            caller.closer.close();
        }
        in_time
    });
}

/// Whether there is room for one more in the door. Where it is full, whoever has stood there longest without a word has to
/// go, of the host with the most callers: a host that fills the door pushes out its own.
fn make_room(pending: &mut BTreeMap<u64, Caller>) -> bool {
    if pending.len() < MAX_PENDING_LANES {
        return true;
    }
    let mut silent: HashMap<&str, (usize, u64)> = HashMap::new();
    for (&key, caller) in pending.iter().filter(|(_, caller)| !caller.has_greeted) {
        silent.entry(&caller.host).or_insert((0, key)).0 += 1;
    }
    let most = silent.into_values().max_by_key(|&(count, first)| (count, std::cmp::Reverse(first)));
    let Some(caller) = most.and_then(|(_, first)| pending.remove(&first)) else { return false };
    caller.closer.close();
    true
}

/// A peer's name without the port, where it has one. Of an IPv6 address the network of 64 bits, which a single host can have for
/// itself; an IPv4 address is the same however it is written.
fn host_of(peer: &str) -> String {
    match peer.parse::<SocketAddr>().map(|address| address.ip().to_canonical()) {
        Ok(IpAddr::V6(address)) => format!("{}/64", Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
        Ok(address @ IpAddr::V4(_)) => address.to_string(),
        Err(_) => peer.rsplit_once(':').map_or(peer, |(host, _)| host).to_owned(),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[derive(Default)]
    struct Closed(AtomicUsize);

    impl LaneCloser for Closed {
        fn close(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn caller(closed: &Arc<Closed>, host: &str, silent: bool) -> Caller {
        let (closer, host) = (Arc::clone(closed), host.to_owned());
        Caller { closer, host, has_greeted: !silent, deadline: Instant::now() + GREETING_TIMEOUT }
    }

    #[test]
    fn whoever_fills_the_door_pushes_out_its_own_callers() {
        let (ours, theirs) = (Arc::new(Closed::default()), Arc::new(Closed::default()));
        let mut pending = BTreeMap::new();
        for key in 0..3000 {
            assert!(make_room(&mut pending));
            let one_of_ours = key % 500 == 10;
            let (closed, host) = if one_of_ours { (&ours, "192.0.2.1") } else { (&theirs, "198.51.100.9") };
            pending.insert(key, caller(closed, host, true));
        }
        assert_eq!(pending.len(), MAX_PENDING_LANES);
        assert_eq!((ours.0.load(Ordering::SeqCst), theirs.0.load(Ordering::SeqCst)), (0, 3000 - MAX_PENDING_LANES));
        // The oldest go first.
        assert!(pending.values().next_back().is_some_and(|last| last.host == "198.51.100.9"));
        assert!(pending.range(2500..).count() == MAX_PENDING_LANES - 5);
    }

    #[test]
    fn whoever_has_greeted_is_not_pushed_out() {
        let closed = Arc::new(Closed::default());
        let mut pending: BTreeMap<_, _> =
            (0..MAX_PENDING_LANES as u64).map(|key| (key, caller(&closed, "h", key == 77))).collect();
        assert!(make_room(&mut pending) && !pending.contains_key(&77));
        pending.insert(1000, caller(&closed, "h", false));
        assert!(!make_room(&mut pending));
        assert_eq!(closed.0.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn whoever_has_greeted_is_not_waited_for_without_end_either() {
        let closed = Arc::new(Closed::default());
        let pending = Pending::default();
        for (key, patience) in [(1, Duration::ZERO), (2, GREETED_TIMEOUT)] {
            let mut greeted = caller(&closed, "h", true);
            greeted.has_greeted(patience);
            lock(&pending).insert(key, greeted);
        }
        close_overdue(&pending);
        assert_eq!((lock(&pending).len(), closed.0.load(Ordering::SeqCst)), (1, 1));
    }

    #[test]
    fn a_caller_of_whom_the_driver_does_not_hear_in_time_is_closed() {
        let (dialer, acceptor) = crate::transport::in_memory();
        let _near = crate::transport::Dialer::dial(&dialer, crate::transport::LaneRole::Control, LOOK).unwrap();
        let mut halves = acceptor.accept(LOOK).unwrap().unwrap().split().unwrap();
        let closed = Arc::new(Closed::default());
        halves.closer = Arc::clone(&closed) as _;
        let greeting = Greeting {
            version_min: 1,
            version_max: 1,
            session: crate::wire::SessionId([0; 16]),
            role: crate::wire::GreetingRole::Control,
        };
        let (events, driver) = crossbeam_channel::bounded(0);
        announce(&events, LaneKey(1), Box::new(Guest { greeting, halves, peer: String::new() }), Duration::ZERO);
        assert_eq!(closed.0.load(Ordering::SeqCst), 1);
        drop(driver);
    }

    #[test]
    fn a_host_is_a_peer_without_its_port() {
        for (peer, host) in [
            ("192.0.2.1:7000", "192.0.2.1"),
            ("[::ffff:192.0.2.1]:7000", "192.0.2.1"),
            ("[2001:db8::1]:7", "2001:db8::/64"),
            ("[2001:db8:0:0:ffff::1]:8", "2001:db8::/64"),
            ("[2001:db8:0:1::1]:8", "2001:db8:0:1::/64"),
            ("/run/s", "/run/s"),
            ("host:7", "host"),
        ] {
            assert_eq!(host_of(peer), host);
        }
    }
}
