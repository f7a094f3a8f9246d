//! Whole migrations between two threads over in-memory lanes: what is promised to a VMM.
#![allow(missing_docs)]

mod common;

use std::io::IoSlice;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use common::{Guest, Room, content};
use pageferry::transport::{
    self, Acceptor, Dialer, InMemoryAcceptor, Lane, LaneHalves, LaneRole, LaneSender, TransportError,
};
use pageferry::vm::Step;
use pageferry::wire::{Greeting, GreetingRole, Message, PROTOCOL_MAX, SessionId};
use pageferry::{
    Compress, Control, Destination, DestinationConfig, Error, Failed, OnTimeout, Report, Source, SourceConfig,
    Unsettled, Verify,
};

/// Longer than a busy machine stands still. Lanes that are cut say so at once.
const PEER_TIMEOUT: Duration = Duration::from_secs(10);

fn destination_config() -> DestinationConfig {
    let mut config = DestinationConfig::default();
    config.wait_for_source = Some(Duration::from_secs(20));
    config.peer_timeout = PEER_TIMEOUT;
    config.settle_window = Duration::from_secs(2);
    config
}

fn source_config() -> SourceConfig {
    let mut config = SourceConfig::default();
    config.peer_timeout = PEER_TIMEOUT;
    config.settle_window = Duration::from_secs(2);
    config
}

type Arrival = std::thread::JoinHandle<(Room, Result<Report, Failed>)>;

fn receive(acceptor: InMemoryAcceptor, mut room: Room) -> Arrival {
    std::thread::spawn(move || {
        let result = Destination::new(destination_config()).run(&mut room, Arc::new(acceptor), &Control::new());
        (room, result)
    })
}

#[track_caller]
fn assert_arrived(guest: &Guest, arrival: Arrival) {
    let (room, result) = arrival.join().unwrap();
    result.unwrap();
    assert_eq!(room.committed, Some(guest.was_running));
    assert_eq!(room.writes, Some(guest.shared.writes.load(Ordering::SeqCst)));
    assert!(content(&room.memory.unwrap()) == guest.content(), "memory differs");
    assert!(!guest.is_running_now());
    assert_eq!(guest.steps, [Step::Begin, Step::BeforeHandover, Step::Committed]);
}

#[test]
fn a_guest_that_keeps_writing_arrives_whole_over_any_number_of_lanes() {
    for lanes in [0, 1, 4, 16] {
        let (dialer, acceptor) = transport::in_memory();
        let mut guest = Guest::new(2000, Some(Duration::from_micros(50)));
        let arrival = receive(acceptor, Room::default());
        let mut config = source_config();
        config.lanes = lanes;
        config.verify = Verify::Full;
        let report = Source::new(config).run(&mut guest, Arc::new(dialer), &Control::new()).unwrap();
        assert_eq!((report.digest_match, report.full_verify_match), (Some(true), Some(true)));
        assert_eq!(report.pages_total, 2000);
        assert!(report.rounds.last().unwrap().stopped);
        assert_eq!(report.rounds.iter().map(|round| round.pages).sum::<u64>(), report.stages.pages());
        assert_eq!(report.pages_sent + report.pages_zero + report.stages.unchanged_pages, report.stages.pages());
        let stages = report.stages;
        assert_eq!(stages.covered_bytes(), stages.saved().total() + stages.packed_bytes);
        assert!(report.wire_bytes > stages.packed_bytes + stages.head_bytes);
        assert!(report.downtime.total() <= report.total && report.downtime.total() > Duration::ZERO);
        assert_arrived(&guest, arrival);
    }
}

#[test]
fn a_downtime_limit_that_nothing_can_meet_does_not_keep_an_idle_guest() {
    let (dialer, acceptor) = transport::in_memory();
    let arrival = receive(acceptor, Room::default());
    let mut guest = Guest::new(500, None);
    let mut config = source_config();
    config.downtime_limit = Duration::ZERO;
    let report = Source::new(config).run(&mut guest, Arc::new(dialer), &Control::new()).unwrap();
    assert!(report.rounds.len() < 5, "{} rounds", report.rounds.len());
    assert_eq!(report.throttle_peak, 0);
    assert_arrived(&guest, arrival);
}

#[test]
fn odd_sizes_migrate() {
    for pages in [0, 1, 2, 63, 64, 65, 129] {
        let (dialer, acceptor) = transport::in_memory();
        let mut guest = Guest::new(pages, Some(Duration::from_micros(100)));
        let arrival = receive(acceptor, Room::default());
        Source::new(source_config()).run(&mut guest, Arc::new(dialer), &Control::new()).unwrap();
        assert_arrived(&guest, arrival);
    }
}

#[test]
fn a_guest_that_was_paused_arrives_paused() {
    let (dialer, acceptor) = transport::in_memory();
    let mut guest = Guest::new(100, None);
    guest.was_running = false;
    let arrival = receive(acceptor, Room::default());
    Source::new(source_config()).run(&mut guest, Arc::new(dialer), &Control::new()).unwrap();
    assert_arrived(&guest, arrival);
}

#[track_caller]
fn assert_kept(guest: &Guest, failed: &Failed) {
    assert!(matches!(failed, Failed::SourceStillOwns { .. }), "{failed:?}");
    assert!(guest.is_running_now());
    assert_eq!(guest.shared.throttle.load(Ordering::SeqCst), 0);
    assert_ne!(guest.steps.last(), Some(&Step::Committed));
    if guest.steps.contains(&Step::Begin) {
        assert_eq!(guest.steps.last(), Some(&Step::Aborted));
    }
}

#[test]
fn a_refused_guest_runs_on_and_the_reason_is_told() {
    let (dialer, acceptor) = transport::in_memory();
    let mut guest = Guest::new(100, None);
    let arrival = receive(acceptor, Room { refuse: Some("8 GiB are needed, 2 are free"), ..Room::default() });
    let failed = Source::new(source_config()).run(&mut guest, Arc::new(dialer), &Control::new()).unwrap_err();
    assert_kept(&guest, &failed);
    assert!(failed.to_string().contains("8 GiB are needed, 2 are free"), "{failed}");
    assert!(guest.steps.is_empty(), "a refusal costs the guest nothing");
    let (room, result) = arrival.join().unwrap();
    assert!(matches!(result, Err(Failed::SourceStillOwns { error: Error::Refused { .. }, .. })));
    assert!(room.committed.is_none());
}

#[test]
fn a_destination_that_cannot_start_the_guest_gives_it_back() {
    let (dialer, acceptor) = transport::in_memory();
    let mut guest = Guest::new(500, Some(Duration::from_micros(100)));
    let arrival = receive(acceptor, Room { commit_fails: true, ..Room::default() });
    let failed = Source::new(source_config()).run(&mut guest, Arc::new(dialer), &Control::new()).unwrap_err();
    assert_kept(&guest, &failed);
    let (room, result) = arrival.join().unwrap();
    assert!(matches!(result, Err(Failed::SourceStillOwns { .. })));
    assert!(room.aborted);
}

#[test]
fn cancelling_at_any_moment_leaves_the_guest_running_or_hands_it_over_whole() {
    for moment in 0..25 {
        let (dialer, acceptor) = transport::in_memory();
        let mut guest = Guest::new(3000, Some(Duration::from_micros(30)));
        let arrival = receive(acceptor, Room::default());
        let control = Control::new();
        let canceller = control.clone();
        std::thread::spawn(move || {
            std::thread::sleep(Duration::from_micros(moment * 700));
            canceller.cancel();
        });
        match Source::new(source_config()).run(&mut guest, Arc::new(dialer), &control) {
            Ok(_) => assert_arrived(&guest, arrival),
            Err(failed) => {
                assert_kept(&guest, &failed);
                assert!(matches!(failed.error(), Error::Cancelled));
                let (room, result) = arrival.join().unwrap();
                assert!(result.is_err() && room.committed.is_none());
            }
        }
    }
}

#[test]
fn a_guest_too_fast_for_the_link_is_cancelled_or_switched_over_at_the_timeout() {
    for on_timeout in [OnTimeout::Cancel, OnTimeout::SwitchOver] {
        let (dialer, acceptor) = transport::in_memory();
        let mut guest = Guest::new(3000, Some(Duration::from_micros(10)));
        let arrival = receive(acceptor, Room::default());
        let mut config = source_config();
        config.bandwidth = Some(4 << 20);
        // A few bytes a page would fit the link as deltas.
        config.encode.delta_cache = 0;
        config.encode.duplicates = false;
        config.encode.compress = Compress::Off;
        config.downtime_limit = Duration::from_micros(1);
        config.max_throttle = 0;
        config.timeout = Duration::from_millis(700);
        config.on_timeout = on_timeout;
        let control = Control::new();
        let freer = control.clone();
        std::thread::spawn(move || {
            // The cap can be lifted while a lane waits for it.
            std::thread::sleep(Duration::from_millis(900));
            freer.set_bandwidth(None);
        });
        let result = Source::new(config).run(&mut guest, Arc::new(dialer), &control);
        match on_timeout {
            OnTimeout::SwitchOver => {
                result.unwrap();
                assert_arrived(&guest, arrival);
            }
            OnTimeout::Cancel => {
                let failed = result.unwrap_err();
                assert_kept(&guest, &failed);
                assert!(matches!(failed.error(), Error::TimedOut(_)), "{failed:?}");
                arrival.join().unwrap().1.unwrap_err();
            }
        }
    }
}

#[test]
fn a_guest_that_outruns_the_link_is_throttled_until_it_fits() {
    let (dialer, acceptor) = transport::in_memory();
    let mut guest = Guest::steady(3000, Duration::from_micros(70));
    let arrival = receive(acceptor, Room::default());
    let mut config = source_config();
    config.bandwidth = Some(20 << 20);
    config.downtime_limit = Duration::from_millis(30);
    // A few bytes a page would fit the link as deltas.
    config.encode.delta_cache = 0;
    config.encode.duplicates = false;
    config.encode.compress = Compress::Off;
    let report = Source::new(config).run(&mut guest, Arc::new(dialer), &Control::new()).unwrap();
    assert!(report.throttle_peak > 0);
    assert_arrived(&guest, arrival);
}

// ---- links that break ----

/// Cuts every lane once so many bytes have left the source.
struct CuttingDialer {
    inner: transport::InMemoryDialer,
    left: Arc<AtomicI64>,
    heals: bool,
}

impl Dialer for CuttingDialer {
    fn dial(&self, role: LaneRole, timeout: Duration) -> Result<Box<dyn Lane>, TransportError> {
        let cut = self.left.load(Ordering::SeqCst) < 0;
        if cut && !self.heals {
            let source = std::io::ErrorKind::HostUnreachable.into();
            return Err(TransportError::Dial { peer: "the cut-off destination".to_owned(), source });
        }
        let left = if cut { Arc::new(AtomicI64::new(i64::MAX)) } else { Arc::clone(&self.left) };
        Ok(Box::new(CuttingLane { inner: self.inner.dial(role, timeout)?, left }))
    }
}

struct CuttingLane {
    inner: Box<dyn Lane>,
    left: Arc<AtomicI64>,
}

impl Lane for CuttingLane {
    fn peer(&self) -> String {
        self.inner.peer()
    }

    fn split(self: Box<Self>) -> std::io::Result<LaneHalves> {
        let mut halves = self.inner.split()?;
        let closer = Arc::clone(&halves.closer);
        halves.sender = Box::new(CuttingSender { inner: halves.sender, left: self.left, closer });
        Ok(halves)
    }
}

struct CuttingSender {
    inner: Box<dyn LaneSender>,
    left: Arc<AtomicI64>,
    closer: Arc<dyn transport::LaneCloser>,
}

impl LaneSender for CuttingSender {
    fn send(&mut self, frame: &mut [IoSlice<'_>]) -> std::io::Result<()> {
        let len: usize = frame.iter().map(|part| part.len()).sum();
        if self.left.fetch_sub(len as i64, Ordering::SeqCst) < len as i64 {
            self.closer.close();
            return Err(std::io::ErrorKind::ConnectionReset.into());
        }
        self.inner.send(frame)
    }
}

/// What a whole migration of this guest sends, roughly.
const BYTES: i64 = 2_000 * 4096 * 2 / 3;

#[test]
fn wherever_the_link_is_cut_exactly_one_side_has_the_guest() {
    let mut settled = 0;
    let mut config = source_config();
    // How many bytes there are must not depend on how fast they go.
    config.encode.compress = Compress::Off;
    for step in 0..40 {
        let heals = step % 2 == 0;
        // Most cuts near the end, where the hand-over is.
        let at = if step < 10 { BYTES * step / 10 } else { BYTES + (step - 10) * 300_000 / 30 };
        let (inner, acceptor) = transport::in_memory();
        let dialer = CuttingDialer { inner, left: Arc::new(AtomicI64::new(at)), heals };
        let mut guest = Guest::new(2000, None);
        let arrival = receive(acceptor, Room::default());
        let result = Source::new(config.clone()).run(&mut guest, Arc::new(dialer), &Control::new());
        let (room, arrived) = arrival.join().unwrap();
        let runs_there = room.committed == Some(true);
        match result {
            Ok(_) => {
                arrived.unwrap();
                assert!(runs_there && !guest.is_running_now(), "cut at {at}");
            }
            Err(Failed::SourceStillOwns { .. }) => {
                arrived.unwrap_err();
                assert!(!runs_there && guest.is_running_now(), "cut at {at}");
                settled += 1;
            }
            Err(failed) => {
                assert!(matches!(failed, Failed::Undecided { .. }), "cut at {at}: {failed:?}");
                assert!(!guest.is_running_now());
            }
        }
    }
    assert!(settled > 5);
}

#[test]
fn an_undecided_guest_is_given_back_once_both_sides_can_talk() {
    let (dialer, acceptor) = transport::in_memory();
    let mut guest = Guest::new(100, None);
    let unsettled = Unsettled { session: SessionId([5; 16]), run: true };
    *guest_running(&guest) = false;
    let room = std::thread::spawn(move || {
        let mut room = Room::default();
        let result =
            Destination::new(destination_config()).settle(&mut room, Arc::new(acceptor), &Control::new(), unsettled);
        (room, result)
    });
    let result = Source::new(source_config()).settle(&mut guest, Arc::new(dialer), &Control::new(), unsettled);
    assert!(matches!(result, Err(Failed::SourceStillOwns { .. })), "{result:?}");
    assert!(guest.is_running_now());
    let (room, result) = room.join().unwrap();
    assert!(room.aborted && matches!(result, Err(Failed::SourceStillOwns { .. })));
}

fn guest_running(guest: &Guest) -> std::sync::MutexGuard<'_, bool> {
    guest.shared.running()
}

#[test]
fn nobody_there_is_a_clear_error() {
    let (dialer, acceptor) = transport::in_memory();
    drop(acceptor);
    let mut guest = Guest::new(10, None);
    let failed = Source::new(source_config()).run(&mut guest, Arc::new(dialer), &Control::new()).unwrap_err();
    assert_kept(&guest, &failed);
    assert!(failed.to_string().contains("cannot connect"), "{failed}");
}

#[test]
fn a_destination_nobody_comes_to_gives_up() {
    let (_dialer, acceptor) = transport::in_memory();
    let mut config = destination_config();
    config.wait_for_source = Some(Duration::from_millis(100));
    let result = Destination::new(config).run(&mut Room::default(), Arc::new(acceptor), &Control::new());
    assert!(matches!(result, Err(Failed::SourceStillOwns { error: Error::NoSource(_), .. })));
}

// ---- strangers ----

fn greet(dialer: &dyn Dialer, greeting: Greeting) -> LaneHalves {
    let mut halves = dialer.dial(LaneRole::Control, Duration::from_secs(1)).unwrap().split().unwrap();
    let frame = Message::Greeting(greeting).encode(0);
    halves.sender.send(&mut [IoSlice::new(&frame)]).unwrap();
    halves
}

/// A caller that hung up may be noticed a moment later: until then the destination is busy.
fn migrate_once_free(guest: &mut Guest, dialer: &transport::InMemoryDialer) -> Report {
    loop {
        match Source::new(source_config()).run(guest, Arc::new(dialer.clone()), &Control::new()) {
            Ok(report) => return report,
            Err(failed) => assert!(failed.to_string().contains("busy"), "{failed}"),
        }
    }
}

#[test]
fn strangers_before_and_during_a_migration_do_not_disturb_it() {
    let (dialer, acceptor) = transport::in_memory();
    let arrival = receive(acceptor, Room::default());
    // Random bytes; silence; another version; another migration's lanes; a caller that hangs up.
    let mut noise = dialer.dial(LaneRole::Control, Duration::from_secs(1)).unwrap().split().unwrap();
    noise.sender.send(&mut [IoSlice::new(&[0xA5; 100])]).unwrap();
    let _silent = dialer.dial(LaneRole::Control, Duration::from_secs(1)).unwrap().split().unwrap();
    let greeting =
        |version, role| Greeting { version_min: version, version_max: version, session: SessionId([1; 16]), role };
    let mut future = greet(&dialer, greeting(999, GreetingRole::Control));
    let _lane = greet(&dialer, greeting(PROTOCOL_MAX, GreetingRole::Data(0)));
    let _settle = greet(&dialer, greeting(PROTOCOL_MAX, GreetingRole::Settle));
    greet(&dialer, greeting(PROTOCOL_MAX, GreetingRole::Control)).closer.close();
    let mut frame = pageferry::wire::FrameBuffer::new();
    future.receiver.receive(&mut frame).unwrap();
    let refusal = Message::decode(&frame).unwrap();
    assert!(matches!(refusal, Message::Refuse(pageferry::wire::Refusal::Version { .. })), "{refusal:?}");

    let mut guest = Guest::new(2000, Some(Duration::from_micros(100)));
    let meanwhile = dialer.clone();
    let (told, hear) = std::sync::mpsc::channel();
    let disturber = std::thread::spawn(move || {
        for _ in 0..50 {
            // Whoever comes when the guest has moved finds nobody.
            let Ok(lane) = meanwhile.dial(LaneRole::Control, Duration::from_secs(1)) else { break };
            let _ = told.send(());
            let mut lane = lane.split().unwrap();
            let _ = lane.sender.send(&mut [IoSlice::new(b"GET / HTTP/1.1\r\n\r\n and so on, and so on")]);
        }
    });
    hear.recv().unwrap();
    let report = migrate_once_free(&mut guest, &dialer);
    assert_eq!(report.digest_match, Some(true));
    assert_arrived(&guest, arrival);
    disturber.join().unwrap();
}

#[test]
fn a_caller_that_asks_for_a_guest_it_never_offered_is_a_stranger() {
    let (dialer, acceptor) = transport::in_memory();
    let arrival = receive(acceptor, Room::default());
    let greeting =
        |role| Greeting { version_min: PROTOCOL_MAX, version_max: PROTOCOL_MAX, session: SessionId([1; 16]), role };
    let mut caller = greet(&dialer, greeting(GreetingRole::Control));
    let mut frame = pageferry::wire::FrameBuffer::new();
    caller.receiver.receive(&mut frame).unwrap();
    assert_eq!(Message::decode(&frame).unwrap(), Message::Welcome { version: PROTOCOL_MAX });
    let mut asking = greet(&dialer, greeting(GreetingRole::Settle));
    let answer = asking.receiver.receive(&mut frame);
    assert!(answer.is_err(), "{:?}", Message::decode(&frame));
    caller.closer.close();

    let mut guest = Guest::new(100, None);
    migrate_once_free(&mut guest, &dialer);
    assert_arrived(&guest, arrival);
}

#[test]
fn too_many_lanes_are_refused_before_anything_happens() {
    let (dialer, _acceptor) = transport::in_memory();
    let mut config = source_config();
    config.lanes = 129;
    let mut guest = Guest::new(10, None);
    let failed = Source::new(config).run(&mut guest, Arc::new(dialer), &Control::new()).unwrap_err();
    assert!(matches!(failed.error(), Error::Misuse(_)));
    assert!(guest.is_running_now());
}

/// An acceptor that fails for a while, as a host out of descriptors does.
struct Flaky(InMemoryAcceptor, AtomicI64);

impl Acceptor for Flaky {
    fn accept(&self, timeout: Duration) -> Result<Option<Box<dyn Lane>>, TransportError> {
        if self.1.fetch_sub(1, Ordering::SeqCst) > 0 {
            let source = std::io::Error::from_raw_os_error(24);
            return Err(TransportError::Accept { local: "here".to_owned(), source });
        }
        self.0.accept(timeout)
    }
}

#[test]
fn a_host_short_of_descriptors_for_a_moment_still_receives() {
    let (dialer, acceptor) = transport::in_memory();
    let arrival = std::thread::spawn(move || {
        let mut room = Room::default();
        let acceptor = Arc::new(Flaky(acceptor, AtomicI64::new(3)));
        let result = Destination::new(destination_config()).run(&mut room, acceptor, &Control::new());
        (room, result)
    });
    let mut guest = Guest::new(100, None);
    Source::new(source_config()).run(&mut guest, Arc::new(dialer), &Control::new()).unwrap();
    assert_arrived(&guest, arrival);
}
