//! Pages that are written straight from one guest memory into another.

mod common;

use std::io::{self, IoSlice};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use common::{acceptor, dialer, missing};
use pageferry::memory::{Backing, GuestMemory, Layout, MappedMemory, Region, RegionId};
use pageferry::transport::{
    Acceptor, Capabilities, Dialer, DirectRun, Lane, LaneHalves, LaneRole, LaneSender, TransportError,
};
use pageferry_conformance::frames::{PATIENCE, in_time, receive, send};
use pageferry_conformance::{Joined, migrations, skips};
use pageferry_rdma::{RdmaAcceptor, RdmaDialer, RdmaOptions, Refusal, WriteFailure};

const PAGE: u64 = 4096;

/// Longer than windows, and no multiple of one.
const LENS: [u64; 3] = [(5 << 20) + 3 * PAGE, 7 * PAGE, 3 << 20];

fn memory(lens: &[u64], filled: bool) -> Arc<MappedMemory> {
    let regions = lens.iter().enumerate().map(|(at, &len)| Region::ram(format!("r{at}"), (at as u64) << 30, len));
    let memory = MappedMemory::new(Layout::new(regions.collect()).unwrap(), Backing::Anonymous).unwrap();
    for (region, &len) in lens.iter().enumerate().filter(|_| filled) {
        let content: Vec<u8> = (0..len).map(|at| (at * 31 + (at >> 12) * 7 + region as u64) as u8).collect();
        memory.write(RegionId(region as u32), 0, &content).unwrap();
    }
    Arc::new(memory)
}

fn bytes(memory: &MappedMemory, run: DirectRun) -> Vec<u8> {
    let mut bytes = vec![0; run.len as usize];
    memory.read(run.region, run.offset, &mut bytes).unwrap();
    bytes
}

fn run(region: u32, first: u64, pages: u64) -> DirectRun {
    DirectRun { region: RegionId(region), offset: first * PAGE, len: pages * PAGE }
}

/// A lane whose peer has already taken its first frame: (dialled, accepted).
fn lane(dialer: &RdmaDialer, acceptor: &Arc<RdmaAcceptor>) -> (LaneHalves, LaneHalves) {
    let accepting = Arc::clone(acceptor);
    let accepting = std::thread::spawn(move || accepting.accept(PATIENCE));
    let mut near = dialer.dial(LaneRole::Data(0), PATIENCE).unwrap().split().unwrap();
    send(&mut near.sender, 0, b"here I am").unwrap();
    let mut far = accepting.join().unwrap().unwrap().unwrap().split().unwrap();
    receive(&mut far.receiver).unwrap();
    (near, far)
}

/// Both memories, with a lane between them.
fn joined(options: RdmaOptions) -> (LaneHalves, LaneHalves, Arc<RdmaAcceptor>, Arc<MappedMemory>, Arc<MappedMemory>) {
    let acceptor = Arc::new(common::acceptor_with(options.clone()));
    let dialer = RdmaDialer::new(acceptor.local_addr().to_string(), options);
    let (from, to) = (memory(&LENS, true), memory(&LENS, false));
    assert!(dialer.attach(from.clone()).unwrap() && acceptor.expose(to.clone()).unwrap());
    let (near, far) = lane(&dialer, &acceptor);
    (near, far, acceptor, from, to)
}

/// The rest of the memory stays as it was.
fn written_pages_arrive_before_the_next_frame(options: RdmaOptions) {
    let (mut near, mut far, _acceptor, from, to) = joined(options);
    let mut state = 5u64;
    let mut next = move |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let batches: Vec<Vec<DirectRun>> = (0..60)
        .map(|_| {
            let one = |next: &mut dyn FnMut(u64) -> u64| {
                let region = next(3);
                let pages = LENS[region as usize] / PAGE;
                let first = next(pages);
                run(region as u32, first, 1 + next((pages - first).min(600)))
            };
            (0..=next(6)).map(|_| one(&mut next)).collect()
        })
        .collect();
    let expected: Vec<_> = batches.iter().flatten().copied().collect();
    let sent = batches.clone();
    let sending = std::thread::spawn(move || {
        for (number, batch) in sent.iter().enumerate() {
            near.sender.write_pages(batch).unwrap();
            send(&mut near.sender, number as u64, b"they are there").unwrap();
        }
        near
    });
    let (there, here) = (from.clone(), to.clone());
    in_time(move || {
        for (number, batch) in batches.into_iter().enumerate() {
            assert_eq!(receive(&mut far.receiver).unwrap().0, number as u64);
            for run in batch {
                assert!(bytes(&there, run) == bytes(&here, run), "frame {number}: {run:?}");
            }
        }
    });
    drop(sending.join().unwrap());
    for (region, len) in LENS.into_iter().enumerate() {
        for page in 0..len / PAGE {
            let here = run(region as u32, page, 1);
            let written = expected
                .iter()
                .any(|run| run.region == here.region && (run.offset..run.offset + run.len).contains(&here.offset));
            let source = if written { bytes(&from, here) } else { vec![0; PAGE as usize] };
            assert!(bytes(&to, here) == source, "{here:?}, written: {written}");
        }
    }
}

#[test]
fn written_pages_arrive_through_few_windows() {
    if skips(missing()) {
        return;
    }
    let mut options = RdmaOptions::default();
    options.locked_memory = Some(4 << 20);
    written_pages_arrive_before_the_next_frame(options);
}

#[test]
fn written_pages_arrive_through_many_windows() {
    if !skips(missing()) {
        written_pages_arrive_before_the_next_frame(RdmaOptions::default());
    }
}

#[test]
fn written_pages_arrive_where_all_memory_is_pinned() {
    if skips(missing()) {
        return;
    }
    let mut options = RdmaOptions::default();
    options.pin_all = true;
    written_pages_arrive_before_the_next_frame(options);
}

fn refusal(error: &io::Error) -> Option<Refusal> {
    match error.get_ref()?.downcast_ref()? {
        WriteFailure::Refused { refusal, .. } => Some(*refusal),
        _ => None,
    }
}

#[test]
fn what_lies_outside_of_the_own_memory_is_not_written() {
    if skips(missing()) {
        return;
    }
    let (mut near, mut far, ..) = joined(RdmaOptions::default());
    let receiving = std::thread::spawn(move || receive(&mut far.receiver));
    for wrong in [run(0, LENS[0] / PAGE, 1), run(3, 0, 1), run(1, 0, 8), run(2, u64::MAX >> 12, 1)] {
        let error = near.sender.write_pages(&[wrong]).unwrap_err();
        assert!(error.to_string().contains("outside region"), "{wrong:?}: {error}");
    }
    near.sender.write_pages(&[run(1, 0, 7)]).unwrap();
    drop(near);
    assert!(receiving.join().unwrap().is_err());
}

#[test]
fn memory_that_the_destination_does_not_have_is_refused_and_the_lane_lives() {
    if skips(missing()) {
        return;
    }
    let acceptor = Arc::new(acceptor());
    let dialer = dialer(acceptor.local_addr());
    let to = memory(&[PAGE * 100], false);
    dialer.attach(memory(&LENS, true)).unwrap();
    acceptor.expose(to.clone()).unwrap();
    let (mut near, mut far) = lane(&dialer, &acceptor);
    let sending = std::thread::spawn(move || {
        for wrong in [run(0, 1000, 1), run(1, 0, 1), run(2, 0, 1)] {
            let error = near.sender.write_pages(&[wrong]).unwrap_err();
            assert_eq!(refusal(&error), Some(Refusal::OutOfBounds), "{wrong:?}: {error}");
        }
        // A window that ends before the run does: what lies behind is asked for, and refused.
        let error = near.sender.write_pages(&[run(0, 90, 20)]).unwrap_err();
        assert_eq!(refusal(&error), Some(Refusal::OutOfBounds), "{error}");
        near.sender.write_pages(&[run(0, 3, 2)]).unwrap();
        send(&mut near.sender, 1, b"done").unwrap();
        near
    });
    let (number, near) = in_time(move || (receive(&mut far.receiver).unwrap().0, sending.join().unwrap()));
    assert_eq!(number, 1);
    assert!(bytes(&to, run(0, 3, 2)) == bytes(&memory(&LENS, true), run(0, 3, 2)));
    drop(near);
}

#[test]
fn nothing_is_opened_before_memory_is_exposed() {
    if skips(missing()) {
        return;
    }
    let acceptor = Arc::new(acceptor());
    let dialer = dialer(acceptor.local_addr());
    dialer.attach(memory(&LENS, true)).unwrap();
    let (mut near, mut far) = lane(&dialer, &acceptor);
    let receiving = std::thread::spawn(move || receive(&mut far.receiver));
    let (error, near) = in_time(move || (near.sender.write_pages(&[run(0, 0, 1)]).unwrap_err(), near));
    drop(near);
    assert_eq!(refusal(&error), Some(Refusal::Concealed), "{error}");
    assert!(error.to_string().contains("not open to writes now"), "{error}");
    assert!(receiving.join().unwrap().is_err());
}

#[test]
fn concealed_memory_cannot_be_written_through_a_window_that_was_open() {
    if skips(missing()) {
        return;
    }
    let (mut near, mut far, acceptor, from, to) = joined(RdmaOptions::default());
    let sending = std::thread::spawn(move || {
        near.sender.write_pages(&[run(0, 0, 4)]).unwrap();
        send(&mut near.sender, 1, b"first").unwrap();
        near
    });
    let (mut near, mut far) = in_time(move || {
        receive(&mut far.receiver).unwrap();
        (sending.join().unwrap(), far)
    });
    acceptor.conceal();
    from.write(RegionId(0), 0, &[0xEE; 4096]).unwrap();
    let receiving = std::thread::spawn(move || receive(&mut far.receiver));
    let error = in_time(move || {
        loop {
            if let Err(error) = near.sender.write_pages(&[run(0, 0, 4)]) {
                return error;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    assert!(error.to_string().contains("refused a write"), "{error}");
    assert!(receiving.join().unwrap().is_err());
    assert!(bytes(&to, run(0, 0, 1)) == bytes(&memory(&LENS, true), run(0, 0, 1)), "what was there before");
}

/// Bytes that migrations wrote directly.
static WRITTEN: AtomicU64 = AtomicU64::new(0);

struct CountingDialer(RdmaDialer);

impl Dialer for CountingDialer {
    fn dial(&self, role: LaneRole, timeout: Duration) -> Result<Box<dyn Lane>, TransportError> {
        Ok(Box::new(CountingLane(self.0.dial(role, timeout)?)))
    }

    fn attach(&self, memory: Arc<dyn GuestMemory>) -> Result<bool, TransportError> {
        self.0.attach(memory)
    }

    fn capabilities(&self) -> Capabilities {
        self.0.capabilities()
    }
}

struct CountingLane(Box<dyn Lane>);

impl Lane for CountingLane {
    fn peer(&self) -> String {
        self.0.peer()
    }

    fn split(self: Box<Self>) -> io::Result<LaneHalves> {
        let mut halves = self.0.split()?;
        halves.sender = Box::new(CountingSender(halves.sender));
        Ok(halves)
    }
}

struct CountingSender(Box<dyn LaneSender>);

impl LaneSender for CountingSender {
    fn send(&mut self, frame: &mut [IoSlice<'_>]) -> io::Result<()> {
        self.0.send(frame)
    }

    fn write_pages(&mut self, runs: &[DirectRun]) -> io::Result<()> {
        WRITTEN.fetch_add(runs.iter().map(|run| run.len).sum(), Ordering::SeqCst);
        self.0.write_pages(runs)
    }
}

fn join_counting() -> Joined {
    let acceptor = acceptor();
    Joined::new(CountingDialer(dialer(acceptor.local_addr())), acceptor)
}

#[test]
fn a_migration_writes_pages_directly() {
    if skips(missing()) {
        return;
    }
    migrations::a_guest_that_writes_moves_with_every_page(join_counting);
    migrations::a_guest_moves_with_as_many_lanes_as_there_are(join_counting);
    assert!(WRITTEN.load(Ordering::SeqCst) > 1 << 20, "{} bytes", WRITTEN.load(Ordering::SeqCst));
}
