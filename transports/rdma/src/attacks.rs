//! What a peer may try that speaks the protocol, and does not keep to it. Each attack ends its own lane at most, in words; the
//! victim's memory and its other lanes stay as they are.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use pageferry::memory::{Backing, GuestMemory, Layout, MappedMemory, Region, RegionId, Transfer};
use pageferry::transport::{Acceptor, DirectRun, LaneHalves, LaneRole};
use pageferry_conformance::frames::{PATIENCE, header, in_time, receive, send};
use pageferry_conformance::skips;

use crate::failure::LaneFailure;
use crate::halves::RdmaLane;
use crate::message::{Answer, Ask, Grant, Kind, PREFIX, Refusal};
use crate::registered::{Access, Window};
use crate::verbs::{Place, Remote};
use crate::{RdmaAcceptor, RdmaDialer, RdmaOptions};

const LEN: u64 = 8 << 20;
const FILL: u8 = 0x5A;

/// A destination with memory, and another lane to it that works before and after every attack.
struct Victim {
    acceptor: Arc<RdmaAcceptor>,
    memory: Arc<MappedMemory>,
    bystander: Option<(RdmaLane, LaneHalves)>,
}

/// A lane of an attacker, and where the victim hears it.
struct Attacker {
    lane: RdmaLane,
    heard: std::thread::JoinHandle<std::io::Result<(u64, Vec<u8>)>>,
    /// The attacker's own memory.
    window: Window,
}

fn layout() -> Layout {
    let mut hidden = Region::ram("hidden", 1 << 32, 1 << 20);
    hidden.transfer = Transfer::Skip;
    Layout::new(vec![Region::ram("ram", 0, LEN), hidden]).unwrap()
}

impl Victim {
    /// `None` where there is no device.
    fn new() -> Option<Self> {
        let address =
            std::env::var("PAGEFERRY_RDMA_ADDRESS").map_err(|_| "no RDMA device: see transports/rdma/vm".to_owned());
        if skips(address.clone().err()) {
            return None;
        }
        let acceptor = RdmaAcceptor::bind(&format!("{}:0", address.ok()?), RdmaOptions::default()).unwrap();
        let memory = Arc::new(MappedMemory::new(layout(), Backing::Anonymous).unwrap());
        memory.write(RegionId(0), 0, &vec![FILL; LEN as usize]).unwrap();
        acceptor.expose(memory.clone()).unwrap();
        let mut victim = Self { acceptor: Arc::new(acceptor), memory, bystander: None };
        victim.bystander = Some(victim.lane(true));
        Some(victim)
    }

    /// Both ends of a new lane, with its first frame taken if it is to be `known`.
    fn lane(&self, known: bool) -> (RdmaLane, LaneHalves) {
        let acceptor = Arc::clone(&self.acceptor);
        let accepting = std::thread::spawn(move || acceptor.accept(PATIENCE).unwrap().unwrap());
        let address = self.acceptor.local_addr();
        let dialer = RdmaDialer::new(address.to_string(), RdmaOptions::default());
        let lane = dialer.connect(address, LaneRole::Data(0), PATIENCE).unwrap();
        frame(&lane, 0);
        let mut halves = accepting.join().unwrap().split().unwrap();
        if known {
            receive(&mut halves.receiver).unwrap();
        }
        (lane, halves)
    }

    fn attacker(&self) -> Attacker {
        let (lane, halves) = self.lane(true);
        let LaneHalves { mut receiver, .. } = halves;
        let heard = std::thread::spawn(move || receive(&mut receiver));
        let memory: Arc<dyn GuestMemory> = Arc::new(MappedMemory::new(layout(), Backing::Anonymous).unwrap());
        let window = lane.core().queue().domain().open_window(&memory, RegionId(0), 0, 1 << 20, Access::Read).unwrap();
        Attacker { lane, heard, window }
    }

    /// Nothing was harmed.
    fn goes_on(mut self) {
        let mut bytes = vec![0; LEN as usize];
        self.memory.read(RegionId(0), 0, &mut bytes).unwrap();
        assert!(bytes.iter().all(|&byte| byte == FILL), "the victim's memory changed");
        let (lane, mut halves) = self.bystander.take().unwrap();
        frame(&lane, 77);
        assert_eq!(in_time(move || receive(&mut halves.receiver).unwrap().0), 77, "another lane was harmed");
        let (lane, mut halves) = self.lane(true);
        frame(&lane, 78);
        assert_eq!(in_time(move || receive(&mut halves.receiver).unwrap().0), 78, "new lanes cannot be had");
    }
}

/// Sends a frame as the engine would.
fn frame(lane: &RdmaLane, sequence: u64) {
    try_frame(lane, sequence).unwrap();
}

fn try_frame(lane: &RdmaLane, sequence: u64) -> Result<(), LaneFailure> {
    let bytes = [header(sequence, 3).as_slice(), b"abc"].concat();
    let slot = lane.core().slot()?;
    lane.core().queue().put(Place::Slot(slot), PREFIX, &bytes);
    lane.core().send_fragment(slot, bytes.len(), bytes.len())
}

impl Attacker {
    fn grant(&self, offset: u64) -> Grant {
        match self.ask(RegionId(0), offset, 0) {
            Answer::Granted(grant) => grant,
            Answer::Refused(refusal) => panic!("{refusal}"),
        }
    }

    fn ask(&self, region: RegionId, offset: u64, release: u32) -> Answer {
        self.lane.core().ask(Ask { release, region, offset }).unwrap();
        self.lane.core().answer().unwrap()
    }

    /// Writes zeros there, and says how that ended for attacker and victim.
    fn write(self, address: u64, key: u32, len: u32) -> (LaneFailure, String) {
        let core = self.lane.core();
        let outcome =
            core.write(&self.window, 0, len, Remote { address, key }, true).and_then(|number| core.finish(number));
        let heard = in_time(move || self.heard.join().unwrap()).expect_err("the victim's lane is over");
        (outcome.expect_err("it was refused"), heard.to_string())
    }

    fn may_not_write(self, address: u64, key: u32, len: u32) {
        let (failure, heard) = self.write(address, key, len);
        assert_eq!(failure, LaneFailure::WriteRefused);
        assert!(heard.contains("outside of the windows"), "{heard}");
    }
}

#[test]
fn a_made_up_key_writes_nothing() {
    let Some(victim) = Victim::new() else { return };
    for wrong in [1u32, 0x100, 0xFFFF_FF00] {
        let attacker = victim.attacker();
        let grant = attacker.grant(0);
        attacker.may_not_write(grant.address, grant.key ^ wrong, 4096);
    }
    let attacker = victim.attacker();
    attacker.may_not_write(0, 0, 4096);
    victim.goes_on();
}

#[test]
fn a_write_that_leaves_its_window_writes_nothing() {
    let Some(victim) = Victim::new() else { return };
    let past = |grant: Grant| (grant.address + grant.len, 4096);
    let across = |grant: Grant| (grant.address + grant.len - 4096, 8192);
    let before = |grant: Grant| (grant.address - 4096, 8192);
    let far = |grant: Grant| (grant.address.wrapping_sub(1 << 40), 4096);
    let wraps = |_: Grant| (u64::MAX - 4095, 8192);
    let ways: [fn(Grant) -> (u64, u32); 5] = [past, across, before, far, wraps];
    for way in ways {
        let attacker = victim.attacker();
        let grant = attacker.grant(2 << 20);
        let (address, len) = way(grant);
        attacker.may_not_write(address, grant.key, len);
    }
    victim.goes_on();
}

#[test]
fn the_key_of_another_lane_opens_nothing() {
    let Some(victim) = Victim::new() else { return };
    let honest = victim.attacker();
    let grant = honest.grant(0);
    victim.attacker().may_not_write(grant.address, grant.key, 4096);
    // Its own lane is not harmed by that.
    assert!(matches!(honest.ask(RegionId(0), 4 << 20, 0), Answer::Granted(_)));
    drop(honest.lane);
    assert!(honest.heard.join().unwrap().is_err());
    victim.goes_on();
}

#[test]
fn a_window_that_was_given_back_or_concealed_is_shut() {
    let Some(victim) = Victim::new() else { return };
    let attacker = victim.attacker();
    let grant = attacker.grant(0);
    assert!(matches!(attacker.ask(RegionId(0), 2 << 20, grant.id), Answer::Granted(_)));
    attacker.may_not_write(grant.address, grant.key, 4096);

    let attacker = victim.attacker();
    let grant = attacker.grant(0);
    victim.acceptor.conceal();
    assert_eq!(attacker.ask(RegionId(0), 0, 0), Answer::Refused(Refusal::Concealed));
    attacker.may_not_write(grant.address, grant.key, 4096);
    victim.goes_on();
}

#[test]
fn a_concealed_window_is_shut_in_the_middle_of_writing() {
    let Some(victim) = Victim::new() else { return };
    let (attacker, (told, hear)) = (victim.attacker(), std::sync::mpsc::channel());
    let grant = attacker.grant(0);
    let writing = std::thread::spawn(move || {
        let core = attacker.lane.core();
        let remote = Remote { address: grant.address, key: grant.key };
        let mut writes = 0u32;
        let failure = loop {
            match core.write(&attacker.window, 0, 1 << 20, remote, true) {
                Ok(_) => writes += 1,
                Err(failure) => break failure,
            }
            if writes == 4 {
                told.send(()).unwrap();
            }
        };
        (failure, attacker)
    });
    hear.recv().unwrap();
    victim.acceptor.conceal();
    let fill = vec![FILL; 1 << 20];
    victim.memory.write(RegionId(0), 0, &fill).unwrap();
    let (failure, attacker) = in_time(move || writing.join().unwrap());
    assert!(matches!(failure, LaneFailure::WriteRefused | LaneFailure::BrokenOff | LaneFailure::Dropped), "{failure}");
    assert!(in_time(move || attacker.heard.join().unwrap()).is_err());
    std::thread::sleep(Duration::from_millis(100));
    victim.goes_on();
}

#[test]
fn places_that_do_not_exist_are_refused_and_the_lane_lives() {
    let Some(victim) = Victim::new() else { return };
    let attacker = victim.attacker();
    for (region, offset) in [(0, LEN), (0, u64::MAX), (0, 1 << 63), (1, 0), (2, 0), (u32::MAX, 0), (u32::MAX, u64::MAX)]
    {
        let answer = attacker.ask(RegionId(region), offset, 0);
        assert_eq!(answer, Answer::Refused(Refusal::OutOfBounds), "region {region}, offset {offset:#x}");
    }
    // Windows that were never there can be given back.
    assert!(matches!(attacker.ask(RegionId(0), 0, 12345), Answer::Granted(_)));
    frame(&attacker.lane, 5);
    assert_eq!(in_time(move || attacker.heard.join().unwrap()).unwrap().0, 5);
    victim.goes_on();
}

#[test]
fn a_lane_gets_no_more_windows_than_agreed_on() {
    let Some(victim) = Victim::new() else { return };
    let attacker = victim.attacker();
    let granted = (0..20).filter(|_| matches!(attacker.ask(RegionId(0), 0, 0), Answer::Granted(_))).count();
    assert_eq!(granted, 8);
    assert_eq!(attacker.ask(RegionId(0), 0, 0), Answer::Refused(Refusal::TooMany));
    drop(attacker.lane);
    assert!(in_time(move || attacker.heard.join().unwrap()).is_err());
    victim.goes_on();
}

#[test]
fn a_stranger_that_was_heard_once_is_given_no_window() {
    let Some(victim) = Victim::new() else { return };
    let (lane, mut halves) = victim.lane(false);
    lane.core().ask(Ask { release: 0, region: RegionId(0), offset: 0 }).unwrap();
    let lane = Arc::new(Mutex::new(lane));
    let asking = Arc::clone(&lane);
    // The host hears the first frame, and does not know who that is.
    receive(&mut halves.receiver).unwrap();
    let answered = std::thread::spawn(move || asking.lock().unwrap().core().answer());
    std::thread::sleep(Duration::from_millis(200));
    drop(halves);
    assert_eq!(in_time(move || answered.join().unwrap()), Err(LaneFailure::Closed));

    // Nor one that asks before it says a word.
    let (acceptor, address) = (Arc::clone(&victim.acceptor), victim.acceptor.local_addr());
    let accepting = std::thread::spawn(move || acceptor.accept(PATIENCE).unwrap().unwrap());
    let dialer = RdmaDialer::new(address.to_string(), RdmaOptions::default());
    let rude = dialer.connect(address, LaneRole::Control, PATIENCE).unwrap();
    rude.core().ask(Ask { release: 0, region: RegionId(0), offset: 0 }).unwrap();
    let mut halves = accepting.join().unwrap().split().unwrap();
    let error = receive(&mut halves.receiver).unwrap_err().to_string();
    assert!(error.contains("may not ask"), "{error}");
    victim.goes_on();
}

#[test]
fn messages_against_the_rules_end_their_lane() {
    let Some(victim) = Victim::new() else { return };
    let grant = Grant { id: 1, key: 2, region: RegionId(0), start: 0, len: 4096, address: 0 };
    for (kind, credits, expected) in [
        (Kind::Credits, 1, "more credits than it has slots"),
        (Kind::Credits, u16::MAX, "more credits than it has slots"),
        (Kind::Answer(Answer::Granted(grant)), 0, "an answer to nothing"),
        (Kind::Answer(Answer::Refused(Refusal::Host)), 0, "an answer to nothing"),
        (Kind::Fragment { left: u32::MAX }, 0, "no known kind"),
    ] {
        let attacker = victim.attacker();
        attacker.lane.core().send_raw(kind, credits);
        let heard = in_time(move || attacker.heard.join().unwrap()).unwrap_err().to_string();
        assert!(heard.contains(expected), "{kind:?}: {heard}");
    }
    // Frames that are too long, or whose parts do not fit.
    for (first, second, expected) in
        [(4 << 20, 0, "impossible length"), (8, 0, "impossible length"), (9000, 42, "do not fit")]
    {
        let attacker = victim.attacker();
        let core = attacker.lane.core();
        for left in [first, second] {
            // The victim may have ended the lane over the first already.
            let Ok(slot) = core.slot() else { break };
            let _ = core.send_fragment(slot, left, left.clamp(1, 8));
        }
        let heard = in_time(move || attacker.heard.join().unwrap()).unwrap_err().to_string();
        assert!(heard.contains(expected), "{first}: {heard}");
    }
    victim.goes_on();
}

#[test]
fn messages_without_credits_end_their_lane() {
    let Some(victim) = Victim::new() else { return };
    // Nobody receives on this one: its slots fill up.
    let (lane, mut halves) = victim.lane(true);
    let mut sent = 0;
    let failure = in_time(move || {
        loop {
            lane.core().steal_credit();
            if let Err(failure) = try_frame(&lane, sent) {
                break failure;
            }
            sent += 1;
            assert!(sent < 10_000, "it goes on for ever");
        }
    });
    assert_ne!(failure, LaneFailure::Closed);
    let error = in_time(move || {
        loop {
            if let Err(error) = receive(&mut halves.receiver) {
                return error.to_string();
            }
        }
    });
    assert!(error.contains("more messages than it has credits"), "{error}");
    victim.goes_on();
}

/// The engine's own way of writing keeps to all of this.
#[test]
fn an_honest_source_beside_an_attacker_goes_on() {
    let Some(victim) = Victim::new() else { return };
    let attacker = victim.attacker();
    let (acceptor, address) = (Arc::clone(&victim.acceptor), victim.acceptor.local_addr());
    let accepting = std::thread::spawn(move || acceptor.accept(PATIENCE).unwrap().unwrap());
    let dialer = RdmaDialer::new(address.to_string(), RdmaOptions::default());
    let own: Arc<dyn GuestMemory> = Arc::new(MappedMemory::new(layout(), Backing::Anonymous).unwrap());
    own.write(RegionId(0), 0, &vec![FILL; LEN as usize]).unwrap();
    pageferry::transport::Dialer::attach(&dialer, own).unwrap();
    let lane = Box::new(dialer.connect(address, LaneRole::Data(0), PATIENCE).unwrap());
    let mut near = pageferry::transport::Lane::split(lane).unwrap();
    send(&mut near.sender, 0, b"hello").unwrap();
    let mut far = accepting.join().unwrap().split().unwrap();
    receive(&mut far.receiver).unwrap();
    let receiving = std::thread::spawn(move || receive(&mut far.receiver).map(|(number, _)| (number, far)));
    near.sender.write_pages(&[DirectRun { region: RegionId(0), offset: 0, len: LEN / 2 }]).unwrap();
    let grant = attacker.grant(0);
    attacker.may_not_write(grant.address, grant.key ^ 0x100, 4096);
    near.sender.write_pages(&[DirectRun { region: RegionId(0), offset: LEN / 2, len: LEN / 2 }]).unwrap();
    send(&mut near.sender, 9, b"done").unwrap();
    assert_eq!(in_time(move || receiving.join().unwrap()).unwrap().0, 9);
    drop(near);
    victim.goes_on();
}
