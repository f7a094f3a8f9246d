//! Guests that are put away and fetched later: every page, and never a half of one.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use pageferry::config::Compress;
use pageferry::transport::{Acceptor, Capabilities, Dialer, Lane, TransportError};
use pageferry::{Control, Destination, DestinationConfig, Error, Failed, Report, Source, SourceConfig, Verify};

use crate::frames::in_time;
use crate::guest::{Guest, Room};
use crate::migrations::{CuttingDialer, SplitLane};

const PAGES: u64 = 2048;

/// A place for one guest.
pub trait Shelf: Send + Sync {
    /// A new end for the source; replaces a guest that is there already.
    fn dialer(&self) -> Arc<dyn Dialer>;

    /// A new end for the destination, once a guest is there.
    fn acceptor(&self) -> Arc<dyn Acceptor>;

    /// Whether a guest is there.
    fn is_full(&self) -> bool;

    /// Whether anything is there beside it.
    fn is_clean(&self) -> bool;
}

/// What the cases save with.
pub fn config(lanes: u16) -> SourceConfig {
    let mut config = SourceConfig::default();
    config.lanes = lanes;
    (config.peer_timeout, config.settle_window) = (Duration::from_secs(5), Duration::from_secs(3));
    config
}

/// Saves a guest.
pub fn save(shelf: &dyn Shelf, guest: &mut Guest, config: SourceConfig) -> Result<Report, Failed> {
    Source::new(config).run(guest, shelf.dialer(), &Control::new())
}

/// Restores a guest, on a thread that the test does not wait for longer than anything takes.
pub fn restore(acceptor: Arc<dyn Acceptor>, control: Control) -> (Room, Result<Report, Failed>) {
    in_time(move || {
        let (mut room, mut config) = (Room::default(), DestinationConfig::default());
        config.wait_for_source = Some(Duration::from_secs(10));
        (config.peer_timeout, config.settle_window) = (Duration::from_secs(5), Duration::from_secs(3));
        let result = Destination::new(config).run(&mut room, acceptor, &control);
        (room, result)
    })
}

/// Restores what is there and compares it with the guest that was saved.
fn comes_back(shelf: &dyn Shelf, guest: &Guest) {
    let (room, result) = restore(shelf.acceptor(), Control::new());
    let report = result.expect("it is restored");
    assert_eq!(report.digest_match, Some(true));
    assert!(room.runs, "it runs");
    assert!(room.content() == guest.content(), "every byte is the same");
    assert_eq!(room.writes, guest.writes());
}

fn saved_and_back(shelf: &dyn Shelf, guest: &mut Guest, config: SourceConfig) {
    save(shelf, guest, config).expect("it is saved");
    assert!(!guest.runs() && shelf.is_full() && shelf.is_clean());
    comes_back(shelf, guest);
}

/// Pages share the control lane with messages, or have one lane or several.
pub fn a_guest_comes_back_with_every_page_over_as_many_lanes_as_there_are(shelf: fn() -> Box<dyn Shelf>) {
    for lanes in [0, 1, 5] {
        saved_and_back(&*shelf(), &mut Guest::new(PAGES, None), config(lanes));
    }
}

/// Several rounds, deltas, and a last one while the guest stands still.
pub fn a_guest_that_writes_comes_back_with_its_last_write(shelf: fn() -> Box<dyn Shelf>) {
    for lanes in [0, 3] {
        let interval = Some(Duration::from_micros(50));
        saved_and_back(&*shelf(), &mut Guest::new(PAGES, interval), config(lanes));
    }
}

/// The cap holds, and the control lane has time for signs of life.
pub fn a_capped_save_is_complete(shelf: fn() -> Box<dyn Shelf>) {
    for lanes in [0, 2] {
        let mut config = config(lanes);
        (config.bandwidth, config.encode.compress) = (Some(2 << 20), Compress::Off);
        saved_and_back(&*shelf(), &mut Guest::new(PAGES, None), config);
    }
}

/// Every lane carries more than is written at a time.
pub fn a_guest_of_more_than_one_extent_comes_back(shelf: fn() -> Box<dyn Shelf>) {
    let mut config = config(2);
    (config.encode.compress, config.encode.duplicates) = (Compress::Off, false);
    saved_and_back(&*shelf(), &mut Guest::new(24 << 10, Some(Duration::from_micros(500))), config);
}

/// A save that fails costs nothing, and leaves nothing behind.
pub fn a_cancelled_guest_stays_and_can_be_saved_again(shelf: fn() -> Box<dyn Shelf>) {
    let shelf = shelf();
    let mut guest = Guest::new(PAGES, Some(Duration::from_micros(200)));
    let (control, mut slow) = (Control::new(), config(2));
    slow.bandwidth = Some(256 << 10);
    let canceller = control.clone();
    let cancelling = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        canceller.cancel();
    });
    let dialer = shelf.dialer();
    let failed = Source::new(slow).run(&mut guest, Arc::clone(&dialer), &control).expect_err("it was cancelled");
    cancelling.join().expect("no panic");
    assert!(matches!(failed, Failed::SourceStillOwns { error: Error::Cancelled, .. }), "{failed:?}");
    assert!(guest.runs() && !shelf.is_full() && shelf.is_clean());
    // By the same dialer, and by another.
    Source::new(config(1)).run(&mut guest, dialer, &Control::new()).expect("it is saved");
    comes_back(&*shelf, &guest);
}

/// Whatever the moment, and whichever lane: the guest runs and nothing was saved, or it stands still and was.
pub fn a_cut_lane_leaves_the_guest_or_a_save(shelf: fn() -> Box<dyn Shelf>) {
    // At this pace the guest takes some 700 ms: the last ones are cut about its end, or after it.
    for (lane, after) in [(0, 0), (1, 0), (2, 30), (1, 120), (0, 200), (0, 600), (0, 680), (0, 700), (0, 720), (0, 760)]
    {
        let shelf = shelf();
        let mut guest = Guest::new(PAGES, Some(Duration::from_micros(200)));
        let dialer = Arc::new(CuttingDialer::new(shelf.dialer(), lane, Duration::from_millis(after)));
        let mut slow = config(2);
        (slow.bandwidth, slow.encode.compress) = (Some(4 << 20), Compress::Off);
        let result = Source::new(slow).run(&mut guest, dialer, &Control::new());
        let case = format!("lane {lane} cut after {after} ms: {result:?}");
        assert!(shelf.is_clean(), "{case}");
        match &result {
            Ok(_) => {
                assert!(!guest.runs() && shelf.is_full(), "{case}");
                comes_back(&*shelf, &guest);
            }
            Err(Failed::SourceStillOwns { .. }) => assert!(guest.runs() && !shelf.is_full(), "{case}"),
            Err(_) => panic!("it is known who has it. {case}"),
        }
    }
}

/// Fetching leaves it where it is.
pub fn a_saved_guest_can_be_restored_twice(shelf: fn() -> Box<dyn Shelf>) {
    let (shelf, mut guest) = (shelf(), Guest::new(PAGES, None));
    saved_and_back(&*shelf, &mut guest, config(2));
    comes_back(&*shelf, &guest);
    assert!(shelf.is_full() && shelf.is_clean());
}

/// A restore that fails costs nothing.
pub fn a_cancelled_restore_can_be_repeated(shelf: fn() -> Box<dyn Shelf>) {
    let (shelf, mut guest) = (shelf(), Guest::new(PAGES, None));
    save(&*shelf, &mut guest, config(1)).expect("it is saved");
    let control = Control::new();
    control.cancel();
    let (room, result) = restore(shelf.acceptor(), control);
    assert!(result.is_err() && !room.runs);
    comes_back(&*shelf, &guest);
}

/// Whatever the moment: what is reported is what is.
pub fn a_cut_restore_runs_the_guest_or_says_that_it_does_not(shelf: fn() -> Box<dyn Shelf>) {
    let (shelf, mut guest) = (shelf(), Guest::new(8 * PAGES, None));
    save(&*shelf, &mut guest, config(2)).expect("it is saved");
    for (lane, after) in [(0, 0), (1, 0), (2, 3), (0, 5), (0, 10), (0, 15), (0, 20), (0, 30), (0, 40), (0, 60)] {
        let acceptor = CuttingAcceptor {
            acceptor: shelf.acceptor(),
            lane,
            after,
            given: AtomicUsize::new(0),
            cutting: Mutex::default(),
        };
        let (room, result) = restore(Arc::new(acceptor), Control::new());
        let case = format!("lane {lane} cut after {after} ms: {result:?}");
        match &result {
            Ok(_) | Err(Failed::DestinationOwns { .. }) => {
                assert!(room.runs && room.content() == guest.content(), "{case}");
            }
            Err(Failed::SourceStillOwns { .. }) => assert!(!room.runs, "{case}"),
            Err(_) => panic!("it is known who has it. {case}"),
        }
    }
    comes_back(&*shelf, &guest);
}

/// There is no second memory to compare with.
pub fn a_full_verification_is_refused(shelf: fn() -> Box<dyn Shelf>) {
    let (shelf, mut guest) = (shelf(), Guest::new(PAGES, None));
    let mut config = config(1);
    config.verify = Verify::Full;
    let failed = save(&*shelf, &mut guest, config).expect_err("it cannot be had");
    assert!(matches!(failed, Failed::SourceStillOwns { error: Error::Refused { .. }, .. }), "{failed:?}");
    assert!(guest.runs() && !shelf.is_full() && shelf.is_clean());
}

/// Ends one of its lanes after a time.
struct CuttingAcceptor {
    acceptor: Arc<dyn Acceptor>,
    lane: usize,
    after: u64,
    given: AtomicUsize,
    cutting: Mutex<Vec<JoinHandle<()>>>,
}

impl Acceptor for CuttingAcceptor {
    fn accept(&self, timeout: Duration) -> Result<Option<Box<dyn Lane>>, TransportError> {
        let Some(lane) = self.acceptor.accept(timeout)? else { return Ok(None) };
        if self.given.fetch_add(1, Ordering::SeqCst) != self.lane {
            return Ok(Some(lane));
        }
        let (peer, after) = (lane.peer(), Duration::from_millis(self.after));
        let local = peer.clone();
        let halves = lane.split().map_err(|source| TransportError::Accept { local, source })?;
        let closer = Arc::clone(&halves.closer);
        let cutting = std::thread::spawn(move || {
            std::thread::sleep(after);
            closer.close();
        });
        self.cutting.lock().unwrap_or_else(PoisonError::into_inner).push(cutting);
        Ok(Some(Box::new(SplitLane { peer, halves })))
    }

    fn capabilities(&self) -> Capabilities {
        self.acceptor.capabilities()
    }
}

impl Drop for CuttingAcceptor {
    fn drop(&mut self) {
        for thread in self.cutting.get_mut().unwrap_or_else(PoisonError::into_inner).drain(..) {
            thread.join().expect("closing does not panic");
        }
    }
}
