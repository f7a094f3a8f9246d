//! The control lane may take nothing any more while what the peer said before it left is still to be
//! read: the reason that it gave counts, not the broken pipe.
#![allow(missing_docs)]

mod common;

use std::io::{self, IoSlice};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use common::source::{NOW, source_until};
use common::{Guest, Room, layout};
use pageferry::digest::{Digest, DigestKey};
use pageferry::encode::Tally;
use pageferry::limits::REASON_GRACE;
use pageferry::session::{
    DestinationAction, DestinationInput, DestinationSession, DestinationSetup, LaneKey, Outcome, Phase, SourceAction,
    SourceInput, SourceSession,
};
use pageferry::transport::{
    Acceptor, Dialer, Lane, LaneCloser, LaneHalves, LaneReceiver, LaneRole, LaneSender, ReadyLanes,
};
use pageferry::vm::Step;
use pageferry::wire::{
    Finish, FrameBuffer, Greeting, GreetingRole, Message, Offer, Owner, PROTOCOL_MAX, Refusal, SessionId,
};
use pageferry::{Control, Destination, DestinationConfig, Error, Failed, Source, SourceConfig, Verify};

fn broken_pipe() -> Error {
    Error::LaneBroken { lane: LaneRole::Control, peer: "the peer".to_owned(), source: io::ErrorKind::BrokenPipe.into() }
}

fn end_of_file() -> Error {
    let source = io::ErrorKind::UnexpectedEof.into();
    Error::LaneBroken { lane: LaneRole::Control, peer: "the peer".to_owned(), source }
}

// ---- the source's session ----

fn until_offer(action: &SourceAction) -> bool {
    matches!(action, SourceAction::Send(Message::Offer(_)))
}

fn until_commit(action: &SourceAction) -> bool {
    matches!(action, SourceAction::Send(Message::Commit))
}

fn remaining(session: &mut SourceSession) -> Vec<SourceAction> {
    std::iter::from_fn(|| session.poll_action()).collect()
}

#[track_caller]
fn kept(mut session: SourceSession) -> Error {
    remaining(&mut session);
    match session.into_parts().0 {
        Some(Outcome::SourceOwns(error)) => error,
        other => panic!("the guest is the source's: {other:?}"),
    }
}

#[test]
fn a_source_hears_a_refusal_that_came_before_its_lane_broke() {
    let refusals = [
        Message::Refuse(Refusal::Guest("8 GiB are needed".to_owned())),
        Message::Abort { reason: "8 GiB are needed".to_owned() },
    ];
    for refusal in refusals {
        let mut session = source_until(until_offer);
        session.handle(NOW, SourceInput::ControlSendFailed(broken_pipe()));
        assert!(session.outcome().is_none());
        session.handle(NOW, SourceInput::Message(refusal));
        assert!(kept(session).to_string().contains("8 GiB are needed"));
    }
}

#[test]
fn a_source_waits_no_longer_for_a_reason_than_it_can_come() {
    let mut session = source_until(until_offer);
    session.handle(NOW, SourceInput::ControlSendFailed(broken_pipe()));
    assert_eq!(session.poll_timeout(), Some(NOW + REASON_GRACE));
    session.handle(NOW + REASON_GRACE, SourceInput::Tick);
    assert!(kept(session).to_string().contains("broken pipe"));

    let mut session = source_until(until_offer);
    session.handle(NOW, SourceInput::ControlSendFailed(broken_pipe()));
    session.handle(NOW, SourceInput::LinkLost(end_of_file()));
    assert!(kept(session).to_string().contains("broken pipe"), "what broke first says more");
}

fn data_lane_lost(kind: io::ErrorKind) -> Error {
    Error::LaneBroken { lane: LaneRole::Data(1), peer: "the peer".to_owned(), source: kind.into() }
}

#[test]
fn what_broke_on_this_side_is_told_whichever_side_speaks_first() {
    // The peer sees no more of this side's failure than the end of a lane.
    let abort = || Message::Abort { reason: "its data lane ended".to_owned() };
    for abort_comes in [false, true] {
        let mut session = source_until(|action| matches!(action, SourceAction::SendRound { .. }));
        session.handle(NOW, SourceInput::DataLaneLost(data_lane_lost(io::ErrorKind::PermissionDenied)));
        if abort_comes {
            session.handle(NOW, SourceInput::Message(abort()));
        }
        session.handle(NOW + REASON_GRACE, SourceInput::Tick);
        let error = kept(session).to_string();
        assert!(error.contains("permission denied"), "{error}");
        assert_eq!(error.contains("its data lane ended"), abort_comes, "{error}");
    }
}

#[test]
fn a_lane_that_the_peer_closed_adds_nothing_to_its_reason() {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, UnexpectedEof};
    for kind in [BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, UnexpectedEof] {
        let mut session = source_until(|action| matches!(action, SourceAction::SendRound { .. }));
        session.handle(NOW, SourceInput::DataLaneLost(data_lane_lost(kind)));
        session.handle(NOW, SourceInput::Message(Message::Abort { reason: "the disk is full".to_owned() }));
        assert_eq!(kept(session).to_string(), "there gave up: the disk is full");
    }
}

#[test]
fn a_destination_that_saw_a_data_lane_end_lets_the_source_speak_first() {
    let mut session = destination_in(Phase::Receiving);
    session.handle(NOW, DestinationInput::DataLaneLost(data_lane_lost(io::ErrorKind::UnexpectedEof)));
    session.handle(NOW + REASON_GRACE, DestinationInput::Tick);
    assert!(orders(&mut session).is_empty(), "the source may itself have waited so long for a reason");
    session.handle(NOW + REASON_GRACE * 2, DestinationInput::Tick);
    assert!(given_up(session).to_string().contains("end of file"));
}

#[test]
fn a_source_whose_lane_takes_nothing_any_more_goes_no_further() {
    let mut session = source_until(|action| matches!(action, SourceAction::SendRound { .. }));
    session.handle(NOW, SourceInput::ControlSendFailed(broken_pipe()));
    for input in [
        SourceInput::RoundQueued,
        SourceInput::RoundFlushed(Tally::default()),
        SourceInput::Message(Message::RoundAck { round: 0 }),
        SourceInput::Harvested { dirty_pages: 0, writes: 0 },
    ] {
        session.handle(NOW, input);
    }
    let actions = remaining(&mut session);
    let stays = |action: &SourceAction| matches!(action, SourceAction::Acknowledge | SourceAction::Notify(_));
    assert!(actions.iter().all(stays), "{actions:?}");
}

#[test]
fn commit_is_never_given_to_a_lane_that_takes_nothing() {
    let mut session = source_until(|action| matches!(action, SourceAction::Step(Step::BeforeHandover)));
    session.handle(NOW, SourceInput::ControlSendFailed(broken_pipe()));
    session.handle(NOW, SourceInput::StepDone);
    session.handle(NOW + REASON_GRACE, SourceInput::Tick);
    let actions = remaining(&mut session);
    assert!(!actions.iter().any(until_commit), "{actions:?}");
    assert!(actions.iter().any(|action| matches!(action, SourceAction::Resume)), "{actions:?}");
    kept(session);
}

#[test]
fn a_committed_source_hears_an_answer_that_came_before_its_lane_broke() {
    let mut session = source_until(until_commit);
    session.handle(NOW, SourceInput::ControlSendFailed(broken_pipe()));
    session.handle(NOW, SourceInput::Message(Message::Running { resume_us: 1 }));
    remaining(&mut session);
    assert!(matches!(session.outcome(), Some(Outcome::HandedOver)));
}

#[test]
fn a_guest_that_comes_back_after_commit_brings_the_reason_along() {
    let mut session = source_until(until_commit);
    session.handle(NOW, SourceInput::Message(Message::Abort { reason: "no room for its name".to_owned() }));
    assert!(session.outcome().is_none(), "it decides nothing");
    session.handle(NOW, SourceInput::Message(Message::Settled(Owner::Source)));
    assert!(kept(session).to_string().contains("no room for its name"));
    let mut session = source_until(until_commit);
    session.handle(NOW, SourceInput::Message(Message::Abort { reason: "late".to_owned() }));
    session.handle(NOW, SourceInput::Message(Message::Running { resume_us: 1 }));
    remaining(&mut session);
    assert!(matches!(session.outcome(), Some(Outcome::HandedOver)));
}

#[test]
fn a_committed_source_that_hears_nothing_asks() {
    for late in [false, true] {
        let mut session = source_until(until_commit);
        session.handle(NOW, SourceInput::ControlSendFailed(broken_pipe()));
        assert!(remaining(&mut session).is_empty());
        if late {
            session.handle(NOW + REASON_GRACE, SourceInput::Tick);
            session.handle(NOW + REASON_GRACE, SourceInput::Tick);
        } else {
            session.handle(NOW, SourceInput::LinkLost(end_of_file()));
        }
        let actions = remaining(&mut session);
        assert!(matches!(actions[..], [SourceAction::DialSettle]), "{actions:?}");
        assert!(session.outcome().is_none());
    }
}

// ---- the destination's session ----

fn greeting(session: u8, role: GreetingRole) -> Greeting {
    Greeting { version_min: PROTOCOL_MAX, version_max: PROTOCOL_MAX, session: SessionId([session; 16]), role }
}

fn greeted(lane: u64, role: GreetingRole) -> DestinationInput {
    DestinationInput::Greeted { lane: LaneKey(lane), greeting: greeting(1, role), peer: "there".to_owned() }
}

fn offer() -> Message {
    Message::Offer(Box::new(Offer {
        digest_key: DigestKey([2; 32]),
        data_lanes: 0,
        verify: Verify::Digest,
        run: true,
        layout: layout(64),
        config: b"test guest".to_vec(),
    }))
}

/// A destination session that a source has brought to `phase`.
fn destination_in(phase: Phase) -> DestinationSession {
    let mut session = DestinationSession::new(DestinationSetup { config: DestinationConfig::default() });
    let finish = Finish { last_round: 0, digest: Digest::default(), state_len: 0 };
    let steps = [
        greeted(1, GreetingRole::Control),
        DestinationInput::Message(offer()),
        DestinationInput::RoomMade { exposed: false },
        DestinationInput::RoundComplete { round: 0, digest: Digest::default() },
        DestinationInput::Message(Message::Finish(finish)),
        DestinationInput::Loaded { took: Duration::ZERO },
        DestinationInput::Message(Message::Commit),
        DestinationInput::Started { took: Duration::ZERO },
    ];
    for step in steps {
        if session.phase() == phase {
            break;
        }
        session.handle(NOW, step);
        orders(&mut session);
    }
    assert_eq!(session.phase(), phase);
    session
}

fn orders(session: &mut DestinationSession) -> Vec<DestinationAction> {
    std::iter::from_fn(|| session.poll_action()).collect()
}

#[track_caller]
fn given_up(mut session: DestinationSession) -> Error {
    let actions = orders(&mut session);
    assert!(actions.iter().any(|action| matches!(action, DestinationAction::AbortVm)), "{actions:?}");
    match session.into_parts().0 {
        Some(Outcome::SourceOwns(error)) => error,
        other => panic!("the guest is the source's: {other:?}"),
    }
}

const BEFORE_PREPARED: [Phase; 3] = [Phase::MakingRoom, Phase::Receiving, Phase::Loading];

#[test]
fn a_destination_hears_a_reason_that_came_before_its_lane_broke() {
    for phase in BEFORE_PREPARED {
        let mut session = destination_in(phase);
        session.handle(NOW, DestinationInput::ControlSendFailed(broken_pipe()));
        assert!(orders(&mut session).is_empty());
        session.handle(NOW, DestinationInput::Message(Message::Abort { reason: "the user cancelled".to_owned() }));
        assert!(given_up(session).to_string().contains("the user cancelled"), "{phase:?}");
    }
}

#[test]
fn a_destination_waits_no_longer_for_a_reason_than_it_can_come() {
    for phase in BEFORE_PREPARED {
        let mut session = destination_in(phase);
        session.handle(NOW, DestinationInput::ControlSendFailed(broken_pipe()));
        assert_eq!(session.poll_timeout(), Some(NOW + REASON_GRACE));
        session.handle(NOW + REASON_GRACE, DestinationInput::Tick);
        assert!(given_up(session).to_string().contains("broken pipe"), "{phase:?}");

        let mut session = destination_in(phase);
        session.handle(NOW, DestinationInput::ControlSendFailed(broken_pipe()));
        session.handle(NOW, DestinationInput::LinkLost(end_of_file()));
        assert!(given_up(session).to_string().contains("broken pipe"), "what broke first says more");
    }
}

#[test]
fn a_destination_never_prepares_what_it_cannot_tell() {
    let mut session = destination_in(Phase::Loading);
    session.handle(NOW, DestinationInput::ControlSendFailed(broken_pipe()));
    session.handle(NOW, DestinationInput::Loaded { took: Duration::ZERO });
    assert_eq!(session.phase(), Phase::AwaitReason);
}

#[test]
fn commit_counts_if_it_came_before_the_lane_broke() {
    let mut session = destination_in(Phase::Ready);
    session.handle(NOW, DestinationInput::ControlSendFailed(broken_pipe()));
    session.handle(NOW, DestinationInput::Message(Message::Commit));
    let actions = orders(&mut session);
    assert!(matches!(actions[..], [DestinationAction::Start { run: true }]), "{actions:?}");
}

#[test]
fn done_counts_if_it_came_before_the_lane_broke() {
    let mut session = destination_in(Phase::AwaitDone);
    session.handle(NOW, DestinationInput::ControlSendFailed(broken_pipe()));
    session.handle(NOW, DestinationInput::Message(Message::Done));
    assert!(matches!(session.outcome(), Some(Outcome::HandedOver)));
}

#[test]
fn a_prepared_destination_that_hears_nothing_stands_ready_to_be_asked() {
    for phase in [Phase::Ready, Phase::AwaitDone] {
        let mut session = destination_in(phase);
        session.handle(NOW, DestinationInput::ControlSendFailed(broken_pipe()));
        session.handle(NOW + REASON_GRACE, DestinationInput::Tick);
        let actions = orders(&mut session);
        assert!(matches!(actions[..], [DestinationAction::CloseLanes]), "{phase:?}: {actions:?}");
        assert_eq!(session.phase(), phase);
    }
}

#[test]
fn the_end_of_an_old_control_lane_does_not_end_the_one_that_replaced_it() {
    for (phase, owner) in [(Phase::Ready, Owner::Source), (Phase::AwaitDone, Owner::Destination)] {
        let mut session = destination_in(phase);
        session.handle(NOW, DestinationInput::ControlSendFailed(broken_pipe()));
        session.handle(NOW, greeted(2, GreetingRole::Settle));
        let told = orders(&mut session);
        let settled = |action: &DestinationAction| matches!(action, DestinationAction::Send(Message::Settled(who)) if *who == owner);
        assert!(told.iter().any(settled), "{told:?}");
        session.handle(NOW + REASON_GRACE, DestinationInput::Tick);
        assert!(orders(&mut session).is_empty());
    }
}

// ---- the drivers ----

/// A control lane whose sending half takes `takes` frames and then breaks. The receiving half hands
/// out `before`, and `after` when the sending half has been broken for a while; then it ends.
struct HalfBroken {
    takes: usize,
    before: Vec<Message>,
    after: Vec<Message>,
}

#[derive(Default)]
struct Break {
    broken: Mutex<bool>,
    changed: Condvar,
}

impl Lane for HalfBroken {
    fn peer(&self) -> String {
        "the leaving peer".to_owned()
    }

    fn split(self: Box<Self>) -> io::Result<LaneHalves> {
        let end = Arc::new(Break::default());
        let frames = |messages: Vec<Message>, first: usize| -> Vec<Vec<u8>> {
            (first as u64..).zip(messages).map(|(sequence, message)| message.encode(sequence)).collect()
        };
        let after = frames(self.after, self.before.len());
        let mut unread = frames(self.before, 0);
        unread.reverse();
        Ok(LaneHalves {
            sender: Box::new(BreakingSender { left: self.takes, end: Arc::clone(&end) }),
            receiver: Box::new(LateReceiver { unread, after, end: Arc::clone(&end) }),
            closer: end,
        })
    }
}

impl Break {
    fn set(&self) {
        *self.broken.lock().unwrap() = true;
        self.changed.notify_all();
    }
}

impl LaneCloser for Break {
    fn close(&self) {
        self.set();
    }
}

struct BreakingSender {
    left: usize,
    end: Arc<Break>,
}

impl LaneSender for BreakingSender {
    fn send(&mut self, _frame: &mut [IoSlice<'_>]) -> io::Result<()> {
        if self.left == 0 {
            self.end.set();
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.left -= 1;
        Ok(())
    }
}

struct LateReceiver {
    /// Last first.
    unread: Vec<Vec<u8>>,
    after: Vec<Vec<u8>>,
    end: Arc<Break>,
}

impl LaneReceiver for LateReceiver {
    fn receive(&mut self, frame: &mut FrameBuffer) -> io::Result<()> {
        if self.unread.is_empty() && !self.after.is_empty() {
            let broken = self.end.broken.lock().unwrap();
            drop(self.end.changed.wait_while(broken, |broken| !*broken).unwrap());
            // Long enough for the news of the sending half to be there first.
            std::thread::sleep(Duration::from_millis(20));
            self.unread = std::mem::take(&mut self.after);
            self.unread.reverse();
        }
        match self.unread.pop() {
            Some(bytes) => frame.fill(&bytes),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

fn ready(lane: HalfBroken) -> Arc<ReadyLanes> {
    Arc::new(ReadyLanes::new([Box::new(lane) as Box<dyn Lane>]))
}

/// It ends as it should, unless it stood still for longer than anybody waits for a reason: that says nothing, and it is run
/// again.
fn ends<T: std::fmt::Debug>(run: impl Fn() -> T, as_it_should: impl Fn(&T) -> bool) -> T {
    for _ in 0..100 {
        let begun = Instant::now();
        let end = run();
        if as_it_should(&end) {
            return end;
        }
        assert!(begun.elapsed() >= REASON_GRACE, "{end:?}");
    }
    panic!("this machine stands still every time");
}

#[test]
fn a_migration_fails_for_the_reason_that_the_destination_gave() {
    let run = || {
        let after = vec![Message::Refuse(Refusal::Busy)];
        let dialer: Arc<dyn Dialer> = ready(HalfBroken { takes: 0, before: Vec::new(), after });
        let mut guest = Guest::new(64, None);
        let failed = Source::new(SourceConfig::default()).run(&mut guest, dialer, &Control::new()).unwrap_err();
        assert!(guest.is_running_now());
        failed
    };
    ends(run, |failed| matches!(failed, Failed::SourceStillOwns { error: Error::Refused { .. }, .. }));
}

#[test]
fn a_migration_fails_for_the_reason_that_the_source_gave() {
    let run = || {
        let before = vec![Message::Greeting(greeting(1, GreetingRole::Control)), offer()];
        let after = vec![Message::Abort { reason: "the user cancelled".to_owned() }];
        // Welcome leaves; Accept does not.
        let acceptor: Arc<dyn Acceptor> = ready(HalfBroken { takes: 1, before, after });
        let (mut room, destination) = (Room::default(), Destination::new(DestinationConfig::default()));
        let failed = destination.run(&mut room, acceptor, &Control::new()).unwrap_err();
        assert!(room.aborted);
        failed
    };
    let failed = ends(run, |failed| matches!(failed, Failed::SourceStillOwns { error: Error::PeerAborted { .. }, .. }));
    assert!(failed.to_string().contains("the user cancelled"), "{failed}");
}
