//! The destination's half of the protocol.
//!
//! It runs the guest after Commit and at no other time (R10). Between saying Prepared and hearing
//! Commit it can decide nothing alone (R12): if the link breaks there, it stands ready to be asked,
//! and being asked without having heard Commit it gives the guest up for good.

use std::collections::VecDeque;
use std::time::Duration;

use super::Outcome;
use crate::config::{DestinationConfig, Verify};
use crate::digest::Digest;
use crate::error::Error;
use crate::limits::{GREETING_TIMEOUT, MAX_STATE, REASON_GRACE, WORK_FACTOR};
use crate::stats::{Event, Report};
use crate::wire::{
    Finish, Greeting, GreetingRole, Message, Offer, Owner, PROTOCOL_MAX, PROTOCOL_MIN, Prepared, Refusal, SessionId,
};

/// What a destination session starts from.
#[derive(Debug, Clone, Default)]
pub struct DestinationSetup {
    /// The user's choices.
    pub config: DestinationConfig,
}

/// The driver's name for a lane that has introduced itself.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct LaneKey(pub u64);

/// What happened.
#[derive(Debug)]
pub enum DestinationInput {
    /// Time has passed.
    Tick,
    /// A new lane introduced itself. Answered by `Adopt`, `Answer` or `Drop`.
    Greeted {
        /// The lane.
        lane: LaneKey,
        /// What it said.
        greeting: Greeting,
        /// The other end.
        peer: String,
    },
    /// A message came on the control lane.
    Message(Message),
    /// A frame came on some lane.
    Heard,
    /// Pages were placed, or memory verified.
    Progress,
    /// No lane can come in any more.
    DoorBroken(Error),
    /// The VMM has made room.
    RoomMade,
    /// The VMM refuses the guest.
    RoomRefused(String),
    /// All lanes have ended a round and all its pages were placed.
    RoundComplete {
        /// The round.
        round: u32,
        /// Digest of all memory as placed so far.
        digest: Digest,
    },
    /// All memory was re-hashed.
    Verified {
        /// The digest.
        digest: Digest,
        /// How long it took.
        took: Duration,
    },
    /// The machine state was loaded.
    Loaded {
        /// How long it took.
        took: Duration,
    },
    /// The VMM has taken over, and runs the guest if it is to run.
    Started {
        /// How long it took.
        took: Duration,
    },
    /// The last action failed.
    Failed(Error),
    /// The control lane broke.
    LinkLost(Error),
    /// A data lane broke.
    DataLaneLost(Error),
    /// The user wants the end.
    Cancel,
}

/// What is to be done, in order.
#[derive(Debug)]
pub enum DestinationAction {
    /// The lane belongs to the migration, as what its greeting said. A control lane replaces the one before.
    Adopt(LaneKey, GreetingRole),
    /// Send one message on the lane and close it.
    Answer(LaneKey, Message),
    /// Close the lane.
    Drop(LaneKey),
    /// Close all lanes of the migration; new ones may come.
    CloseLanes,
    /// Send a message on the control lane. A failure comes as `LinkLost`.
    Send(Message),
    /// Ask the VMM for room; answer `RoomMade` or `RoomRefused`.
    MakeRoom(Box<Offer>),
    /// Place no page any more; return when no lane does.
    StopPlacing,
    /// Re-hash all memory; answer `Verified` or `Failed`.
    Verify,
    /// Load the machine state; answer `Loaded` or `Failed`.
    Load(Vec<u8>),
    /// The guest is this side's: take over, and run it if `run`; answer `Started` or `Failed`.
    Start {
        /// Whether it ran at the source.
        run: bool,
    },
    /// The guest is the source's: let go of it.
    AbortVm,
    /// Tell the observer.
    Notify(Event),
}

/// Where a destination session stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Nobody has come yet.
    Waiting,
    /// A source has introduced itself.
    AwaitOffer,
    /// The VMM makes room.
    MakingRoom,
    /// Pages come in.
    Receiving,
    /// Everything is here; re-hashing.
    Verifying,
    /// Everything is here; loading the machine state.
    Loading,
    /// Prepared was said; Commit was not heard.
    Ready,
    /// Commit was heard; the VMM starts the guest.
    Starting,
    /// The guest runs; the source may not know yet.
    AwaitDone,
    /// The guest was given up around Commit; the source may not know yet.
    GivenBack,
    /// Over.
    Ended,
}

/// The destination's state machine.
#[derive(Debug)]
pub struct DestinationSession {
    setup: DestinationSetup,
    phase: Phase,
    actions: VecDeque<DestinationAction>,
    outcome: Option<Outcome>,
    report: Report,
    peer: String,
    session: Option<SessionId>,
    run: bool,
    verify: Verify,
    data_lanes: u16,
    lanes_seen: Vec<bool>,
    last_heard: Duration,
    link_up: bool,
    link_error: Option<Error>,
    /// A data lane's end, and until when the control lane may still tell the reason.
    lane_loss: Option<(Error, Duration)>,
    lost_at: Duration,
    /// When the source must have taken its next step in opening the migration.
    opening_deadline: Option<Duration>,
    digest: Digest,
    rounds_complete: u32,
    finish: Option<Finish>,
    state: Vec<u8>,
    prepared: Prepared,
    gave_up: bool,
    /// Only asked to tell a source what it does not know.
    confirming: bool,
    last_progress: Duration,
    progress_seen: u64,
}

impl DestinationSession {
    /// A session that waits for a source.
    pub fn new(setup: DestinationSetup) -> Self {
        Self {
            setup,
            phase: Phase::Waiting,
            actions: VecDeque::new(),
            outcome: None,
            report: Report::default(),
            peer: String::from("the source"),
            session: None,
            run: false,
            verify: Verify::Digest,
            data_lanes: 0,
            lanes_seen: Vec::new(),
            last_heard: Duration::ZERO,
            link_up: false,
            link_error: None,
            lane_loss: None,
            lost_at: Duration::ZERO,
            opening_deadline: None,
            digest: Digest::default(),
            rounds_complete: 0,
            finish: None,
            state: Vec::new(),
            prepared: Prepared::default(),
            gave_up: false,
            confirming: false,
            last_progress: Duration::ZERO,
            progress_seen: 0,
        }
    }

    /// A session that only tells a source that is still undecided that its guest runs here.
    pub fn confirm(setup: DestinationSetup, session: SessionId) -> Self {
        let mut destination = Self::new(setup);
        destination.session = Some(session);
        destination.phase = Phase::AwaitDone;
        destination.confirming = true;
        destination
    }

    /// A session that only stands ready to be asked about an earlier, undecided migration.
    pub fn settle(setup: DestinationSetup, session: SessionId, error: Error) -> Self {
        let mut destination = Self::new(setup);
        destination.session = Some(session);
        destination.phase = Phase::Ready;
        destination.link_error = Some(error);
        destination
    }

    /// Whether `poll_action` has something to return: do not wait then.
    pub fn has_actions(&self) -> bool {
        !self.actions.is_empty()
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<DestinationAction> {
        self.actions.pop_front()
    }

    /// When `handle(Tick)` is due at the latest, in time since the start.
    pub fn poll_timeout(&self) -> Option<Duration> {
        match self.phase {
            Phase::Ended => None,
            Phase::Waiting => self.setup.config.wait_for_source,
            _ if self.link_up => {
                let silence = self.last_heard.saturating_add(self.setup.config.peer_timeout);
                let lane_loss = self.lane_loss.as_ref().filter(|_| self.phase == Phase::Receiving);
                let lane_loss = lane_loss.map_or(silence, |(_, deadline)| silence.min(*deadline));
                let opening = self.opening_deadline.map_or(lane_loss, |deadline| lane_loss.min(deadline));
                Some(opening.min(self.stall_deadline()))
            }
            _ => Some(self.lost_at.saturating_add(self.setup.config.settle_window)),
        }
    }

    /// How it ended; `None` while it runs. Perform the remaining actions first.
    pub fn outcome(&self) -> Option<&Outcome> {
        if self.actions.is_empty() && self.phase == Phase::Ended { self.outcome.as_ref() } else { None }
    }

    /// The outcome and the report, once it has ended.
    pub fn into_parts(self) -> (Option<Outcome>, Report) {
        (self.outcome, self.report)
    }

    /// The report as it stands.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// Where it stands.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// The migration that is under way or was handled last.
    pub fn session(&self) -> Option<SessionId> {
        self.session
    }

    /// Takes an input. `now` is the time since the session began; it never goes back.
    pub fn handle(&mut self, now: Duration, input: DestinationInput) {
        match input {
            DestinationInput::Greeted { lane, greeting, peer } => self.on_greeting(now, lane, &greeting, peer),
            DestinationInput::Message(message) => {
                self.last_heard = now;
                self.on_message(now, message);
            }
            DestinationInput::Heard => self.last_heard = now,
            DestinationInput::Progress => self.heard(now),
            DestinationInput::DoorBroken(error) => self.on_door_broken(error),
            DestinationInput::LinkLost(error) => self.lose_link(now, error),
            DestinationInput::DataLaneLost(error) if self.phase == Phase::Receiving => {
                self.lane_loss.get_or_insert((error, now + REASON_GRACE));
            }
            // Once everything is here, nothing is expected on data lanes any more.
            DestinationInput::Tick | DestinationInput::DataLaneLost(_) => {}
            DestinationInput::Cancel => self.cancel(now),
            DestinationInput::Failed(error) => self.on_failure(now, error),
            other => self.on_done(now, other),
        }
        self.check_time(now);
    }

    // ---- lanes ----

    fn on_greeting(&mut self, now: Duration, lane: LaneKey, greeting: &Greeting, peer: String) {
        let Some(version) = common_version(greeting) else {
            let refusal = Refusal::Version { min: PROTOCOL_MIN, max: PROTOCOL_MAX };
            return self.act(DestinationAction::Answer(lane, Message::Refuse(refusal)));
        };
        let known = self.session == Some(greeting.session);
        match greeting.role {
            GreetingRole::Control if self.phase == Phase::Waiting => {
                self.session = Some(greeting.session);
                self.peer = peer;
                self.link_up = true;
                self.heard(now);
                self.phase = Phase::AwaitOffer;
                self.opening_deadline = Some(now + GREETING_TIMEOUT);
                self.act(DestinationAction::Adopt(lane, greeting.role));
                self.act(DestinationAction::Send(Message::Welcome { version }));
            }
            GreetingRole::Control => self.act(DestinationAction::Answer(lane, Message::Refuse(Refusal::Busy))),
            GreetingRole::Data(index) if known && self.takes_lane(index) => {
                self.heard(now);
                self.expect_lanes(now);
                self.act(DestinationAction::Adopt(lane, greeting.role));
            }
            GreetingRole::Settle if known => self.on_settle(now, lane),
            GreetingRole::Data(_) | GreetingRole::Settle => self.act(DestinationAction::Drop(lane)),
        }
    }

    fn takes_lane(&mut self, index: u16) -> bool {
        let free = self.phase == Phase::Receiving && self.link_up;
        match self.lanes_seen.get_mut(usize::from(index)) {
            Some(seen) if free && !*seen => {
                *seen = true;
                true
            }
            _ => false,
        }
    }

    /// Every lane must come soon after the one before.
    fn expect_lanes(&mut self, now: Duration) {
        let missing = self.lanes_seen.iter().any(|seen| !seen);
        self.opening_deadline = missing.then(|| now.saturating_add(self.setup.config.peer_timeout));
    }

    /// The source asks who owns the guest. Its answer must stay true for ever.
    fn on_settle(&mut self, now: Duration, lane: LaneKey) {
        match self.phase {
            Phase::AwaitDone => {
                self.link_up = true;
                self.heard(now);
                self.answer_settle(now, lane, Owner::Destination);
            }
            Phase::GivenBack => self.answer_settle(now, lane, Owner::Source),
            Phase::Ended if matches!(self.outcome, Some(Outcome::HandedOver | Outcome::DestinationOwns(_))) => {
                self.act(DestinationAction::Answer(lane, Message::Settled(Owner::Destination)));
            }
            _ => {
                let error = self.link_error.take().unwrap_or_else(|| Error::PeerAborted {
                    peer: self.peer.clone(),
                    reason: "it asked for the guest back before handing it over".to_owned(),
                });
                // Let go first, then promise.
                self.give_back(error);
                self.answer_settle(now, lane, Owner::Source);
            }
        }
    }

    /// Answers on a lane of its own, and listens there for the source's Done.
    fn answer_settle(&mut self, now: Duration, lane: LaneKey, owner: Owner) {
        self.link_up = true;
        self.heard(now);
        self.act(DestinationAction::Adopt(lane, GreetingRole::Settle));
        self.act(DestinationAction::Send(Message::Settled(owner)));
    }

    // ---- what the source says ----

    fn on_message(&mut self, now: Duration, message: Message) {
        match message {
            Message::Heartbeat { received } if received <= self.progress_seen => {}
            Message::Heartbeat { received } => {
                self.progress_seen = received;
                self.heard(now);
            }
            _ => self.heard(now),
        }
        match (self.phase, message) {
            (Phase::AwaitOffer, Message::Offer(offer)) => self.on_offer(offer),
            (Phase::Receiving, Message::State(piece)) => self.on_state(&piece),
            (Phase::Receiving, Message::Finish(finish)) if self.finish.is_none() => {
                self.finish = Some(finish);
                self.check_complete();
            }
            (Phase::Ready, Message::Commit) => {
                self.phase = Phase::Starting;
                self.act(DestinationAction::Start { run: self.run });
            }
            (Phase::AwaitDone, Message::Done) => self.end(Outcome::HandedOver),
            (Phase::GivenBack, Message::Done) => self.phase = Phase::Ended,
            (Phase::AwaitDone | Phase::GivenBack | Phase::Ended, _) | (_, Message::Heartbeat { .. }) => {}
            (Phase::AwaitOffer, _) => self.forget_source(),
            (_, Message::Abort { reason }) => {
                let peer = self.peer.clone();
                self.give_up(Error::PeerAborted { peer, reason });
            }
            (phase, message) => {
                let kind = format!("{message:?}");
                let name = kind.split(['(', ' ', '{']).next().unwrap_or("a message");
                let what = format!("it sent {name} while this side was in phase {phase:?}");
                let peer = self.peer.clone();
                if phase == Phase::Ready {
                    // It may have sent Commit as well: only being asked can settle it.
                    self.lose_link(now, Error::PeerMisbehaved { peer, what });
                } else {
                    self.refuse_on(Error::PeerMisbehaved { peer, what });
                }
            }
        }
    }

    fn on_offer(&mut self, offer: Box<Offer>) {
        self.run = offer.run;
        self.verify = offer.verify;
        self.data_lanes = offer.data_lanes;
        self.lanes_seen = vec![false; offer.data_lanes.into()];
        self.report.pages_total = offer.layout.page_count();
        self.phase = Phase::MakingRoom;
        self.opening_deadline = None;
        self.act(DestinationAction::MakeRoom(offer));
    }

    fn on_state(&mut self, piece: &[u8]) {
        if (self.state.len() + piece.len()) as u64 > MAX_STATE {
            let (peer, what) = (self.peer.clone(), format!("it sent more than {MAX_STATE} bytes of machine state"));
            return self.refuse_on(Error::PeerMisbehaved { peer, what });
        }
        self.state.extend_from_slice(piece);
        self.report.state_bytes = self.state.len() as u64;
    }

    /// Finish was heard and the last round is complete: is everything here and right?
    fn check_complete(&mut self) {
        let Some(finish) = self.finish else { return };
        if self.rounds_complete <= finish.last_round {
            return;
        }
        if finish.state_len != self.state.len() as u64 {
            let what = format!("it announced {} bytes of state and sent {}", finish.state_len, self.state.len());
            let peer = self.peer.clone();
            return self.refuse_on(Error::PeerMisbehaved { peer, what });
        }
        self.report.digest_match = Some(finish.digest == self.digest);
        if finish.digest != self.digest {
            let (ours, theirs) = (finish.digest, self.digest);
            return self.refuse_on(Error::DigestMismatch { check: "digest of all pages received", ours, theirs });
        }
        self.prepared.digest = self.digest;
        // What comes after Finish is no part of what was proved.
        self.act(DestinationAction::StopPlacing);
        if self.verify == Verify::Full {
            self.phase = Phase::Verifying;
            self.act(DestinationAction::Verify);
        } else {
            self.load();
        }
    }

    fn load(&mut self) {
        self.phase = Phase::Loading;
        let state = std::mem::take(&mut self.state);
        self.act(DestinationAction::Load(state));
    }

    // ---- what the driver has done ----

    fn on_done(&mut self, now: Duration, input: DestinationInput) {
        match (self.phase, input) {
            (Phase::MakingRoom, DestinationInput::RoomMade) => {
                self.heard(now);
                self.phase = Phase::Receiving;
                self.expect_lanes(now);
                self.act(DestinationAction::Send(Message::Accept));
                let (peer, pages_total) = (self.peer.clone(), self.report.pages_total);
                self.act(DestinationAction::Notify(Event::Accepted { peer, pages_total }));
            }
            (Phase::MakingRoom, DestinationInput::RoomRefused(reason)) => {
                let peer = "this destination".to_owned();
                self.act(DestinationAction::Send(Message::Refuse(Refusal::Guest(reason.clone()))));
                self.give_up(Error::Refused { peer, reason });
            }
            (Phase::Receiving, DestinationInput::RoundComplete { round, digest }) => {
                self.heard(now);
                self.rounds_complete = round.saturating_add(1);
                self.digest = digest;
                self.act(DestinationAction::Send(Message::RoundAck { round }));
                self.check_complete();
            }
            (Phase::Verifying, DestinationInput::Verified { digest, took }) => {
                self.heard(now);
                self.prepared.full_digest = Some(digest);
                self.prepared.verify_us = took.as_micros() as u64;
                self.load();
            }
            (Phase::Loading, DestinationInput::Loaded { took }) => {
                self.heard(now);
                self.prepared.load_us = took.as_micros() as u64;
                self.phase = Phase::Ready;
                self.act(DestinationAction::Send(Message::Prepared(self.prepared)));
            }
            (Phase::Starting, DestinationInput::Started { took }) => {
                self.heard(now);
                self.phase = Phase::AwaitDone;
                let resume_us = took.as_micros() as u64;
                self.act(DestinationAction::Send(Message::Running { resume_us }));
                self.act(DestinationAction::Notify(Event::HandedOver));
            }
            _ => {}
        }
    }

    fn on_failure(&mut self, now: Duration, error: Error) {
        match self.phase {
            Phase::Starting => {
                // No vCPU has run (the contract of `commit`), so the guest can go back for good.
                self.give_back(error);
                self.act(DestinationAction::Send(Message::Settled(Owner::Source)));
                if !self.link_up {
                    self.lost_at = now;
                }
            }
            // Nothing was promised that this could break; at worst nobody can ask any more.
            Phase::Ready => self.lose_link(now, error),
            Phase::Ended | Phase::AwaitDone | Phase::GivenBack => {}
            _ => self.refuse_on(error),
        }
    }

    /// Only before all lanes are in is the door needed.
    fn on_door_broken(&mut self, error: Error) {
        let lanes_missing = self.lanes_seen.iter().any(|seen| !seen);
        match self.phase {
            Phase::Waiting | Phase::AwaitOffer | Phase::MakingRoom => self.refuse_on(error),
            Phase::Receiving if lanes_missing => self.refuse_on(error),
            _ => {}
        }
    }

    // ---- failures ----

    fn cancel(&mut self, now: Duration) {
        match self.phase {
            // It may be too late for the source; being asked settles it.
            Phase::Ready if self.link_up => self.lose_link(now, Error::Cancelled),
            Phase::Ready => self.end(Outcome::Undecided(Error::Cancelled)),
            Phase::AwaitDone if self.confirming => self.end(Outcome::DestinationOwns(Error::Cancelled)),
            Phase::AwaitDone => self.end(Outcome::HandedOver),
            Phase::GivenBack => self.phase = Phase::Ended,
            Phase::Starting | Phase::Ended => {}
            _ => self.refuse_on(Error::Cancelled),
        }
    }

    /// Tells the source why, and gives up. Not after Prepared.
    fn refuse_on(&mut self, error: Error) {
        let reason = error.to_string();
        if self.link_up {
            self.act(DestinationAction::Send(Message::Abort { reason }));
        }
        self.give_up(error);
    }

    /// The guest is the source's, for good, and the source does not know it yet.
    fn give_back(&mut self, error: Error) {
        self.give_up(error);
        self.phase = Phase::GivenBack;
    }

    /// The guest is the source's, for good.
    fn give_up(&mut self, error: Error) {
        if !self.gave_up && self.phase != Phase::Waiting && self.phase != Phase::AwaitOffer {
            self.act(DestinationAction::StopPlacing);
            self.act(DestinationAction::AbortVm);
            self.act(DestinationAction::Notify(Event::Aborted));
        }
        self.gave_up = true;
        self.end(Outcome::SourceOwns(error));
    }

    /// A source that left before it offered anything: the next one is welcome.
    fn forget_source(&mut self) {
        self.opening_deadline = None;
        self.act(DestinationAction::CloseLanes);
        self.session = None;
        self.link_up = false;
        self.phase = Phase::Waiting;
    }

    fn lose_link(&mut self, now: Duration, error: Error) {
        match self.phase {
            Phase::Waiting | Phase::Ended => {}
            Phase::AwaitOffer => self.forget_source(),
            Phase::Ready | Phase::Starting | Phase::AwaitDone | Phase::GivenBack => {
                if self.link_up {
                    self.link_up = false;
                    self.lost_at = now;
                    self.link_error = Some(error);
                    self.act(DestinationAction::CloseLanes);
                }
            }
            _ => self.give_up(error),
        }
    }

    fn end(&mut self, outcome: Outcome) {
        self.outcome = Some(outcome);
        self.phase = Phase::Ended;
    }

    fn check_time(&mut self, now: Duration) {
        if self.poll_timeout().is_none_or(|deadline| now < deadline) {
            return;
        }
        let silence = now.saturating_sub(self.last_heard);
        match self.phase {
            Phase::Waiting => self.end(Outcome::SourceOwns(Error::NoSource(now))),
            Phase::AwaitOffer => self.forget_source(),
            Phase::Receiving if self.opening_deadline.is_some_and(|deadline| now >= deadline) => {
                self.opening_deadline = None;
                let peer = self.peer.clone();
                self.refuse_on(Error::PeerSilent { peer, what: "opened all its lanes", silence });
            }
            Phase::Receiving if self.lane_loss.as_ref().is_some_and(|(_, deadline)| now >= *deadline) => {
                if let Some((error, _)) = self.lane_loss.take() {
                    self.refuse_on(error);
                }
            }
            _ if self.link_up => {
                let peer = self.peer.clone();
                let (what, silence) = if now >= self.last_heard.saturating_add(self.setup.config.peer_timeout) {
                    ("said anything", silence)
                } else {
                    ("made any progress", now.saturating_sub(self.last_progress))
                };
                self.lose_link(now, Error::PeerSilent { peer, what, silence });
            }
            Phase::AwaitDone if self.confirming => self.end(Outcome::DestinationOwns(Error::NoSource(silence))),
            Phase::AwaitDone => self.end(Outcome::HandedOver),
            Phase::GivenBack => self.phase = Phase::Ended,
            _ => {
                let error = self.link_error.take().unwrap_or(Error::NoSource(silence));
                self.end(Outcome::Undecided(error));
            }
        }
    }

    fn heard(&mut self, now: Duration) {
        (self.last_heard, self.last_progress) = (now, now);
    }

    /// A source that is alive may still hang in its VMM.
    fn stall_deadline(&self) -> Duration {
        self.last_progress.saturating_add(self.setup.config.peer_timeout.saturating_mul(WORK_FACTOR))
    }

    fn act(&mut self, action: DestinationAction) {
        self.actions.push_back(action);
    }
}

/// The highest version that both sides speak.
fn common_version(greeting: &Greeting) -> Option<u16> {
    let version = greeting.version_max.min(PROTOCOL_MAX);
    (version >= greeting.version_min && version >= PROTOCOL_MIN).then_some(version)
}
