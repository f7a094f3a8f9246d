//! Whole migrations over a transport: every page, one owner.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use pageferry::config::Compress;
use pageferry::transport::{Acceptor, Capabilities, Dialer, Lane, LaneCloser, LaneHalves, LaneRole, TransportError};
use pageferry::{Control, Destination, DestinationConfig, Error, Failed, Source, SourceConfig, Verify};

use crate::Joined;
use crate::frames::in_time;
use crate::guest::{Guest, Room};

const PAGES: u64 = 2048;

/// What became of the room.
type Arrived = JoinHandle<(Room, Result<(), Failed>)>;

fn receive(acceptor: &Arc<dyn Acceptor>) -> Arrived {
    let acceptor = Arc::clone(acceptor);
    std::thread::spawn(move || {
        let (mut room, mut config) = (Room::default(), DestinationConfig::default());
        // A lane may be cut before the source has said what it wants; and a test is to end.
        config.wait_for_source = Some(Duration::from_secs(10));
        (config.peer_timeout, config.settle_window) = (Duration::from_secs(5), Duration::from_secs(3));
        let result = Destination::new(config).run(&mut room, acceptor, &Control::new());
        (room, result.map(|_| ()))
    })
}

fn config(lanes: u16) -> SourceConfig {
    let mut config = SourceConfig::default();
    (config.lanes, config.verify) = (lanes, Verify::Full);
    (config.peer_timeout, config.settle_window) = (Duration::from_secs(5), Duration::from_secs(3));
    config
}

fn join_room(arrived: Arrived) -> (Room, Result<(), Failed>) {
    in_time(move || arrived.join().expect("the destination does not panic"))
}

/// Moves a guest and compares both memories.
fn moves(joined: &Joined, guest: &mut Guest, config: SourceConfig) {
    let arrived = receive(&joined.acceptor);
    let moved = Source::new(config).run(guest, Arc::clone(&joined.dialer), &Control::new());
    let (room, arrival) = join_room(arrived);
    let (Ok(report), Ok(())) = (&moved, &arrival) else { panic!("it does not move: {moved:?}, {arrival:?}") };
    assert!(room.runs && !guest.runs(), "one side runs it");
    assert!(room.content() == guest.content(), "every byte is the same");
    assert_eq!(room.writes, guest.writes());
    assert_eq!(report.full_verify_match, Some(true));
}

/// Pages share the control lane with messages, or have one lane or several.
pub fn a_guest_moves_with_as_many_lanes_as_there_are(join: fn() -> Joined) {
    let joined = join();
    for lanes in [0, 1, 5] {
        let lanes = lanes.min(joined.dialer.capabilities().max_lanes.saturating_sub(1));
        moves(&joined, &mut Guest::new(PAGES, None), config(lanes));
    }
}

/// Several rounds, deltas, and a last one while the guest stands still.
pub fn a_guest_that_writes_moves_with_every_page(join: fn() -> Joined) {
    let joined = join();
    moves(&joined, &mut Guest::new(PAGES, Some(Duration::from_micros(50))), config(3));
}

/// Memory that is given back (by a balloon) and used again after it was sent, so slowly that it is sent again while the guest
/// runs; and as it is, straight from memory where the transport can.
pub fn a_guest_that_gives_memory_back_moves_with_every_page(join: fn() -> Joined) {
    let joined = join();
    let mut config = config(2);
    (config.bandwidth, config.downtime_limit) = (Some(2 << 20), Duration::from_millis(100));
    config.encode.compress = Compress::Off;
    moves(&joined, &mut Guest::giving_back(PAGES / 2, Duration::from_micros(50)), config);
}

/// The cap holds over all lanes, so the transport is never in a hurry.
pub fn a_capped_migration_arrives(join: fn() -> Joined) {
    let mut config = config(2);
    config.bandwidth = Some(4 << 20);
    moves(&join(), &mut Guest::new(PAGES, None), config);
}

/// For a transport whose link changes meanwhile: seconds, however well the guest packs and however slow the machine is.
pub fn a_slow_migration_arrives(join: fn() -> Joined) {
    let mut config = config(2);
    (config.bandwidth, config.encode.compress) = (Some(1 << 20), Compress::Off);
    moves(&join(), &mut Guest::new(PAGES, None), config);
}

/// A failed migration costs nothing, and leaves nothing behind that would be in the way of the next.
pub fn a_cancelled_guest_stays_and_can_move_again(join: fn() -> Joined) {
    let joined = join();
    let mut guest = Guest::new(PAGES, Some(Duration::from_micros(200)));
    let (arrived, control, mut slow) = (receive(&joined.acceptor), Control::new(), config(2));
    slow.bandwidth = Some(256 << 10);
    let canceller = control.clone();
    let cancelling = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        canceller.cancel();
    });
    let failed = Source::new(slow).run(&mut guest, Arc::clone(&joined.dialer), &control).expect_err("it was cancelled");
    cancelling.join().expect("no panic");
    assert!(matches!(failed, Failed::SourceStillOwns { error: Error::Cancelled, .. }), "{failed:?}");
    let (room, result) = join_room(arrived);
    assert!(result.is_err() && !room.runs && guest.runs());
    moves(&joined, &mut guest, config(2));
}

/// For a transport that is about to lose its link for good: the guest never stands still for longer than that takes to notice.
pub fn a_guest_stays_when_the_link_dies(join: fn() -> Joined) {
    let joined = join();
    let mut guest = Guest::new(PAGES, Some(Duration::from_micros(200)));
    let arrived = receive(&joined.acceptor);
    let mut slow = config(2);
    (slow.bandwidth, slow.encode.compress) = (Some(2 << 20), Compress::Off);
    let result = Source::new(slow).run(&mut guest, Arc::clone(&joined.dialer), &Control::new());
    assert!(matches!(result, Err(Failed::SourceStillOwns { .. })), "{result:?}");
    let (room, arrival) = join_room(arrived);
    assert!(arrival.is_err() && !room.runs && guest.runs());
}

/// Whatever the moment, and whichever lane: exactly one side has the guest, or both know that they do not know and keep it paused.
pub fn a_cut_lane_leaves_one_owner(join: fn() -> Joined) {
    // Sent raw at this pace, the guest takes some 700 ms: the last two are cut about its end.
    for (lane, after) in [(0, 0), (1, 0), (2, 30), (1, 120), (0, 200), (0, 650), (0, 750)] {
        let joined = join();
        let mut guest = Guest::new(PAGES, Some(Duration::from_micros(200)));
        let arrived = receive(&joined.acceptor);
        let dialer = Arc::new(CuttingDialer::new(Arc::clone(&joined.dialer), lane, Duration::from_millis(after)));
        let mut slow = config(2);
        (slow.bandwidth, slow.encode.compress) = (Some(4 << 20), Compress::Off);
        let result = Source::new(slow).run(&mut guest, dialer, &Control::new());
        let (room, arrival) = join_room(arrived);
        let case = format!("lane {lane} cut after {after} ms: {result:?}, {arrival:?}");
        assert!(!(room.runs && guest.runs()), "two run. {case}");
        match &result {
            Ok(_) => assert!(room.runs && room.content() == guest.content(), "{case}"),
            Err(Failed::SourceStillOwns { .. }) => assert!(guest.runs() && !room.runs, "{case}"),
            Err(Failed::DestinationOwns { .. }) => assert!(room.runs && !guest.runs(), "{case}"),
            Err(_) => assert!(!guest.runs(), "{case}"),
        }
    }
}

/// Ends one of its lanes after a time, as a broken link would.
pub(crate) struct CuttingDialer {
    dialer: Arc<dyn Dialer>,
    lane: usize,
    after: Duration,
    dialled: AtomicUsize,
    cutting: Mutex<Vec<JoinHandle<()>>>,
}

impl CuttingDialer {
    pub(crate) fn new(dialer: Arc<dyn Dialer>, lane: usize, after: Duration) -> Self {
        Self { dialer, lane, after, dialled: AtomicUsize::new(0), cutting: Mutex::default() }
    }
}

impl Drop for CuttingDialer {
    fn drop(&mut self) {
        let threads = std::mem::take(self.cutting.get_mut().unwrap_or_else(PoisonError::into_inner));
        for thread in threads {
            thread.join().expect("closing does not panic");
        }
    }
}

impl Dialer for CuttingDialer {
    fn dial(&self, role: LaneRole, timeout: Duration) -> Result<Box<dyn Lane>, TransportError> {
        let lane = self.dialer.dial(role, timeout)?;
        if self.dialled.fetch_add(1, Ordering::SeqCst) != self.lane {
            return Ok(lane);
        }
        let peer = lane.peer();
        let halves = lane.split().map_err(|source| TransportError::Dial { peer: peer.clone(), source })?;
        let (closer, after): (Arc<dyn LaneCloser>, _) = (Arc::clone(&halves.closer), self.after);
        let cutting = std::thread::spawn(move || {
            std::thread::sleep(after);
            closer.close();
        });
        self.cutting.lock().unwrap_or_else(PoisonError::into_inner).push(cutting);
        Ok(Box::new(SplitLane { peer, halves }))
    }

    fn capabilities(&self) -> Capabilities {
        self.dialer.capabilities()
    }
}

/// A lane that was taken apart already.
pub(crate) struct SplitLane {
    pub(crate) peer: String,
    pub(crate) halves: LaneHalves,
}

impl Lane for SplitLane {
    fn peer(&self) -> String {
        self.peer.clone()
    }

    fn split(self: Box<Self>) -> std::io::Result<LaneHalves> {
        Ok(self.halves)
    }
}
