//! Pages that the transport writes straight from one memory into the other, past encoder and frames.
#![allow(missing_docs)]

mod common;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::direct::{Call, DirectAcceptor, DirectDialer, Held, Known, Meddler, Moment, PAGE};
use common::{Guest, Room, Shared, content};
use pageferry::batch::{Batch, Phase};
use pageferry::digest::{DigestKey, HashTable, PageHasher};
use pageferry::encode::{Choice, EncodedBatch, Encoder};
use pageferry::memory::{GuestMemory, RegionId};
use pageferry::place::{PlaceError, Placer};
use pageferry::transport;
use pageferry::units::{PageNumber, PageRun};
use pageferry::wire::{FrameBuffer, WireError};
use pageferry::{Compress, Control, Destination, DestinationConfig, Error, Failed, Source, SourceConfig, Verify};

fn config(lanes: u16) -> SourceConfig {
    let mut config = SourceConfig::default();
    (config.lanes, config.verify, config.encode.compress) = (lanes, Verify::Full, Compress::Off);
    config
}

/// Moves a guest; everything that both sides can compare is compared.
fn moves(guest: &mut Guest, known: Known, config: SourceConfig) -> (pageferry::Report, pageferry::Report, Arc<Known>) {
    let known = Arc::new(known);
    let (dialer, acceptor) = transport::in_memory();
    let (dialer, acceptor) = (DirectDialer(dialer, known.clone()), DirectAcceptor(acceptor, known.clone()));
    let arrival = std::thread::spawn(move || {
        let (mut room, mut config) = (Room::default(), DestinationConfig::default());
        config.wait_for_source = Some(Duration::from_secs(20));
        let result = Destination::new(config).run(&mut room, Arc::new(acceptor), &Control::new());
        (room, result)
    });
    let sent = Source::new(config).run(guest, Arc::new(dialer), &Control::new()).unwrap();
    let (room, arrived) = arrival.join().unwrap();
    assert!(content(&room.memory.unwrap()) == guest.content(), "memory differs");
    assert_eq!((sent.digest_match, sent.full_verify_match), (Some(true), Some(true)));
    assert!(known.to.lock().unwrap().is_none(), "exposed memory is concealed in the end");
    (sent, arrived.unwrap(), known)
}

#[test]
fn pages_that_are_written_straight_into_memory_arrive_whole_and_are_counted() {
    for lanes in [1, 3] {
        let mut guest = Guest::new(3000, Some(Duration::from_micros(50)));
        let (sent, arrived, known) = moves(&mut guest, Known::default(), config(lanes));
        let written = known.written.load(Ordering::SeqCst);
        // All pages with content that were sent while the guest ran.
        assert!(written >= 1900, "{written}");
        assert_eq!(sent.stages.covered_bytes(), sent.stages.saved().total() + sent.stages.packed_bytes);
        assert!(sent.wire_bytes > written * PAGE && arrived.wire_bytes > written * PAGE);
        assert_eq!((sent.pages_sent, sent.pages_zero), (arrived.pages_sent, arrived.pages_zero));
    }
}

#[test]
fn the_control_lane_alone_carries_frames_and_no_memory_is_exposed_for_it() {
    let (_, _, known) = moves(&mut Guest::new(500, None), Known::default(), config(0));
    assert_eq!(known.written.load(Ordering::SeqCst), 0);
    assert_eq!(known.calls.lock().unwrap().as_slice(), []);
}

#[test]
fn memory_is_exposed_and_attached_before_any_lane_is_dialled_that_is_to_write() {
    let (_, _, known) = moves(&mut Guest::new(500, None), Known::default(), config(2));
    let calls = [Call::Expose, Call::Attach, Call::Dial(0), Call::Dial(1), Call::Conceal];
    assert!(known.calls.lock().unwrap().starts_with(&calls), "{:?}", known.calls);
}

#[test]
fn where_one_end_alone_is_one_sided_pages_travel_in_frames() {
    for (source, destination) in [(true, false), (false, true)] {
        let (_, _, known) =
            moves(&mut Guest::new(500, None), Known { source, destination, ..Known::default() }, config(2));
        assert_eq!(known.written.load(Ordering::SeqCst), 0, "{source} {destination}");
        assert!(known.from.lock().unwrap().is_none(), "the source learns it before it attaches its memory");
    }
}

#[test]
fn a_transport_that_cannot_after_all_sends_frames() {
    let known = Known { refuses: true, ..Known::default() };
    let (_, _, known) = moves(&mut Guest::new(500, None), known, config(2));
    assert_eq!(known.written.load(Ordering::SeqCst), 0);
}

#[test]
fn pages_are_packed_in_frames_when_that_is_asked_for() {
    let mut packed = config(2);
    packed.encode.compress = Compress::Level(1);
    let (_, _, known) = moves(&mut Guest::new(500, None), Known::default(), packed);
    assert_eq!(known.written.load(Ordering::SeqCst), 0);
}

/// Changes a page for the time in which it is written: what lands is not what was hashed, and yet the page is in the end as it
/// was when it was hashed.
fn there_and_back(shared: &Arc<Shared>, every: u64, then: fn(u64) -> u8) -> Meddler {
    let shared = shared.clone();
    let writes = AtomicU64::new(0);
    // What the page was, while it is another.
    let was = Mutex::new(None);
    Arc::new(move |region, offset, moment| {
        let mut was = was.lock().unwrap();
        if moment == Moment::Before {
            // Not for ever: the migration is to end. And a guest that stands still writes nothing.
            let meddles = (offset / PAGE).is_multiple_of(every) && *shared.running();
            if !meddles || writes.fetch_add(1, Ordering::SeqCst) > 600 {
                return;
            }
            let mut bytes = [0; 16];
            shared.memory.read(region, offset, &mut bytes).unwrap();
            *was = Some(bytes);
            shared.memory.write(region, offset, &[0xAA; 16]).unwrap();
        } else if let Some(bytes) = was.take() {
            shared.memory.write(region, offset, &bytes).unwrap();
            shared.memory.write(region, offset + 4090, &[then(offset / PAGE)]).unwrap();
        } else {
            return;
        }
        shared.log.mark(region, offset / PAGE..offset / PAGE + 1);
    })
}

#[test]
fn a_page_that_was_another_only_while_it_was_written_is_sent_again() {
    // What is there at the end is what was hashed at first: nothing has changed, as far as hashes tell.
    let mut guest = Guest::new(2000, None);
    let meddler = there_and_back(&guest.shared, 3, |_| 0);
    moves(&mut guest, Known { meddler: Some(meddler), ..Known::default() }, config(1));
    // And with a little change besides: what would be a delta.
    let mut guest = Guest::new(2000, None);
    let meddler = there_and_back(&guest.shared, 2, |page| page as u8);
    moves(&mut guest, Known { meddler: Some(meddler), ..Known::default() }, config(1));
}

#[test]
fn pages_that_became_equal_are_not_copied_from_one_that_is_not_certain() {
    let mut guest = Guest::new(1200, None);
    for page in 0..600 {
        guest.shared.memory.write(RegionId(0), page * PAGE, &[7; 4000]).unwrap();
    }
    let meddler = there_and_back(&guest.shared, 1, |_| 0);
    let mut slow = config(1);
    // So slow that duplicates are looked for.
    slow.bandwidth = Some(8 << 20);
    moves(&mut guest, Known { meddler: Some(meddler), ..Known::default() }, slow);
}

#[test]
fn pages_that_were_given_back_while_a_device_held_them_arrive_as_they_are() {
    let mut guest = Guest::new(2000, None);
    let (shared, held) = (guest.shared.clone(), Held::default());
    let holding = held.clone();
    let meddler: Meddler = Arc::new(move |region, offset, moment| {
        let page = offset / PAGE;
        let mut holding = holding.lock().unwrap();
        let meddles = !page.is_multiple_of(4) && !holding.contains_key(&(region, offset)) && *shared.running();
        if moment == Moment::Before || !meddles {
            return;
        }
        let mut bytes = [0; PAGE as usize];
        shared.memory.read(region, offset, &mut bytes).unwrap();
        holding.insert((region, offset), bytes);
        shared.memory.discard(region, page..page + 1).unwrap();
        shared.log.mark_zeroed(region, page..page + 1);
        // Some are used again at once.
        if page.is_multiple_of(2) {
            shared.memory.write(region, offset + 99, &page.to_le_bytes()).unwrap();
            shared.log.mark(region, page..page + 1);
        }
    });
    // So slow that what was given back and used again is sent while the guest runs.
    let mut slow = config(2);
    (slow.bandwidth, slow.downtime_limit) = (Some(8 << 20), Duration::from_millis(20));
    let (_, _, known) = moves(&mut guest, Known { meddler: Some(meddler), held, ..Known::default() }, slow);
    assert!(known.held.lock().unwrap().len() > 100);
}

#[test]
fn a_source_that_says_it_has_written_where_it_cannot_is_refused() {
    let guest = Guest::new(10, None);
    let hasher = || PageHasher::new(&DigestKey([1; 32]));
    let table = Arc::new(HashTable::new(128));
    let shared = pageferry::encode::Shared::plain(table.clone());
    let mut encoder = Encoder::new(guest.shared.memory.clone(), hasher(), Arc::new(shared));
    let runs = vec![PageRun { first: PageNumber(0), count: 5 }];
    let batch = Batch { round: 0, phase: Phase::Contents, runs, pages: 5, urgent: false };
    let mut encoded = EncodedBatch::default();
    encoder.encode(&batch, Choice { direct: true, ..Choice::default() }, &mut encoded).unwrap();
    assert_eq!(encoded.written_bytes(), 3 * PAGE);
    let mut frame = FrameBuffer::new();
    let bytes: Vec<u8> = encoded.seal(0).iter().flat_map(|part| part.to_vec()).collect();
    frame.fill(&bytes).unwrap();
    let placer = || Placer::new(guest.shared.memory.clone(), hasher(), table.clone());
    assert!(matches!(placer().place(&frame), Err(PlaceError::Wire(WireError::NotExposed))));
    assert_eq!(placer().exposed(true).place(&frame).unwrap().pages, 5);
}

#[test]
fn a_write_that_fails_ends_the_lane_and_the_guest_stays() {
    let known = Arc::new(Known { fails: true, ..Known::default() });
    let (dialer, acceptor) = transport::in_memory();
    let acceptor = DirectAcceptor(acceptor, known.clone());
    let arrival = std::thread::spawn(move || {
        let mut room = Room::default();
        (
            Destination::new(DestinationConfig::default()).run(&mut room, Arc::new(acceptor), &Control::new()),
            room.committed,
        )
    });
    let mut guest = Guest::new(500, None);
    let failed = Source::new(config(2)).run(&mut guest, Arc::new(DirectDialer(dialer, known)), &Control::new());
    // The destination, which sees no more than a lane end, may give up a moment earlier.
    let Err(Failed::SourceStillOwns { error: error @ (Error::LaneBroken { .. } | Error::PeerAborted { .. }), .. }) =
        failed
    else {
        panic!("{failed:?}");
    };
    assert!(error.to_string().contains("permission denied"), "{error}");
    assert!(guest.is_running_now());
    let (arrived, committed) = arrival.join().unwrap();
    assert!(arrived.is_err() && committed.is_none());
}
