//! A destination that means harm can make a migration fail, and no more: the guest runs on at the source.
#![allow(missing_docs)]

mod common;

use std::io::{IoSlice, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use common::Guest;
use pageferry::converge::{Convergence, Decision, Situation};
use pageferry::dirty::{DirtySink, DirtySource, Point};
use pageferry::memory::{GuestMemory, Layout, RegionId};
use pageferry::stats::RoundReport;
use pageferry::transport::{Acceptor, InMemoryAcceptor, LaneReceiver, LaneSender, in_memory};
use pageferry::vm::VmResult;
use pageferry::wire::{FrameBuffer, Kind, Message, PROTOCOL_MAX};
use pageferry::{Control, Error, Failed, Source, SourceConfig, SourceVm};

/// Pages that are written while the guest is being paused: more frames than a lane and its buffers hold back.
const LAST_PAGES: u64 = 5 * 128;

/// Bytes of machine state: more than may wait for the control lane.
const STATE: usize = 8 << 20;

/// A guest with much machine state, and much to send in the last round.
struct Laden(Guest);

impl DirtySource for Laden {
    fn start(&mut self, layout: &Layout) -> VmResult<()> {
        self.0.dirty().start(layout)
    }

    fn harvest(&mut self, point: Point, sink: &mut dyn DirtySink) -> VmResult<()> {
        if point == Point::Stopped {
            sink.mark_range(RegionId(0), 0..LAST_PAGES);
        }
        self.0.dirty().harvest(point, sink)
    }

    fn stop(&mut self) -> VmResult<()> {
        self.0.dirty().stop()
    }
}

impl SourceVm for Laden {
    fn memory(&self) -> Arc<dyn GuestMemory> {
        self.0.memory()
    }

    fn dirty(&mut self) -> &mut dyn DirtySource {
        self
    }

    fn describe(&mut self, out: &mut dyn Write) -> VmResult<()> {
        self.0.describe(out)
    }

    fn is_running(&self) -> bool {
        true
    }

    fn pause(&mut self) -> VmResult<()> {
        self.0.pause()?;
        let mut state = 1u64;
        for page in 0..LAST_PAGES {
            let words = (0..512).flat_map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state ^ state >> 29).to_le_bytes()
            });
            self.0.shared.memory.write(RegionId(0), page * 4096, &words.collect::<Vec<u8>>())?;
        }
        Ok(())
    }

    fn resume(&mut self) -> VmResult<()> {
        self.0.resume()
    }

    fn save(&mut self, out: &mut dyn Write) -> VmResult<()> {
        Ok(out.write_all(&vec![5; STATE])?)
    }
}

/// Switches over after the first round.
struct AtOnce;

impl Convergence for AtOnce {
    fn decide(&mut self, _round: &RoundReport, _situation: &Situation) -> Decision {
        Decision::SwitchOver
    }
}

/// A destination's control lane, to say on it what one likes.
struct Villain {
    ear: Box<dyn LaneReceiver>,
    frame: FrameBuffer,
    mouth: Mouth,
}

struct Mouth(Box<dyn LaneSender>, u64);

impl Mouth {
    fn say(&mut self, message: &Message) -> bool {
        let frame = message.encode(self.1);
        self.1 += 1;
        self.0.send(&mut [IoSlice::new(&frame)]).is_ok()
    }
}

impl Villain {
    fn new(acceptor: &InMemoryAcceptor) -> Self {
        let lane = acceptor.accept(Duration::from_secs(10)).unwrap().expect("a source dials");
        let halves = lane.split().unwrap();
        Self { ear: halves.receiver, frame: FrameBuffer::new(), mouth: Mouth(halves.sender, 0) }
    }

    fn hear(&mut self) -> Option<Kind> {
        self.ear.receive(&mut self.frame).ok()?;
        Some(self.frame.header().unwrap().kind)
    }

    fn hear_until(&mut self, kind: Kind) {
        while self.hear().expect("the source goes on") != kind {}
    }

    /// Behaves well until the guest stands still.
    fn lull(&mut self) {
        self.hear_until(Kind::Greeting);
        self.mouth.say(&Message::Welcome { version: PROTOCOL_MAX });
        self.hear_until(Kind::Offer);
        self.mouth.say(&Message::Accept { exposed: false });
        self.hear_until(Kind::StepEnd);
        self.hear_until(Kind::StepEnd);
        self.mouth.say(&Message::RoundAck { round: 0 });
        self.hear_until(Kind::Pages);
    }
}

/// Runs a migration on a thread of its own, so that one that hangs fails the test.
fn migrate(villain: impl FnOnce(Villain, Control) + Send + 'static) -> (Failed, bool) {
    let (dialer, acceptor) = in_memory();
    let (ended, end) = mpsc::channel();
    let control = Control::new();
    let theirs = control.clone();
    std::thread::spawn(move || villain(Villain::new(&acceptor), theirs));
    std::thread::spawn(move || {
        let mut guest = Laden(Guest::new(2 * LAST_PAGES, None));
        let mut config = SourceConfig::default();
        config.lanes = 0;
        config.encode.threads = 1;
        let failed = Source::new(config)
            .convergence(|| Box::new(AtOnce))
            .run(&mut guest, Arc::new(dialer), &control)
            .unwrap_err();
        ended.send((failed, guest.0.is_running_now())).unwrap();
    });
    end.recv_timeout(Duration::from_secs(60)).expect("the migration ends")
}

#[test]
fn a_destination_that_floods_the_source_while_it_saves_does_not_hold_the_guest() {
    let (failed, runs) = migrate(|mut villain, _| {
        villain.lull();
        let (shouted, enough) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (is_shouted, is_enough) = (Arc::clone(&shouted), Arc::clone(&enough));
        let mut mouth = villain.mouth;
        std::thread::spawn(move || {
            for received in 0.. {
                if is_enough.load(Ordering::SeqCst) || !mouth.say(&Message::Heartbeat { received }) {
                    break;
                }
                is_shouted.store(received > 400, Ordering::SeqCst);
            }
            mouth.say(&Message::Abort { reason: "enough".to_owned() });
        });
        // Nothing is read until the source is full of what it was told, or hears no more of it.
        for _ in 0..500 {
            std::thread::sleep(Duration::from_millis(u64::from(!shouted.load(Ordering::SeqCst))));
        }
        let mut pieces = 0;
        while villain.ear.receive(&mut villain.frame).is_ok() {
            pieces += usize::from(villain.frame.header().unwrap().kind == Kind::State);
            enough.store(pieces >= 30, Ordering::SeqCst);
        }
    });
    assert!(matches!(failed, Failed::SourceStillOwns { error: Error::PeerAborted { .. }, .. }), "{failed:?}");
    assert!(runs);
}

#[test]
fn a_user_can_cancel_while_the_destination_takes_no_machine_state() {
    let (failed, runs) = migrate(|mut villain, control| {
        villain.lull();
        villain.hear_until(Kind::State);
        control.cancel();
        // The lane stays open, and nobody reads.
        std::thread::sleep(Duration::from_secs(120));
    });
    assert!(matches!(failed, Failed::SourceStillOwns { error: Error::Cancelled, .. }), "{failed:?}");
    assert!(runs);
}
