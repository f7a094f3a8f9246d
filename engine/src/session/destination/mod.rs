//! The destination's half of the protocol.
//!
//! It runs the guest after Commit and at no other time (R10). Between saying Prepared and hearing
//! Commit it can decide nothing alone (R12): if the link breaks there, it stands ready to be asked,
//! and being asked without having heard Commit it gives the guest up for good.

mod failures;
mod interface;
mod messages;

pub use interface::{DestinationAction, DestinationInput, DestinationSetup, LaneKey, Phase};

use std::collections::VecDeque;
use std::time::Duration;

use super::Outcome;
use crate::config::Verify;
use crate::digest::Digest;
use crate::error::Error;
use crate::limits::GREETING_TIMEOUT;
use crate::stats::Report;
use crate::wire::{
    Finish, Greeting, GreetingRole, Message, Owner, PROTOCOL_MAX, PROTOCOL_MIN, Prepared, Refusal, SessionId,
};

/// The destination's state machine.
#[derive(Debug)]
#[allow(clippy::struct_excessive_bools)] // independent facts, not a state in disguise: the phase has its own type
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
    /// What broke first, and until when the control lane may still tell the reason.
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
                let lane_loss = self.lane_loss.as_ref().map_or(silence, |(_, deadline)| silence.min(*deadline));
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
            DestinationInput::ControlSendFailed(error) => self.lose_sending_half(now, error),
            DestinationInput::DataLaneLost(error) if self.phase == Phase::Receiving => self.lose_data_lane(now, error),
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
            // Who has offered nothing has nothing to settle.
            GreetingRole::Settle if known && self.phase != Phase::AwaitOffer => self.on_settle(now, lane),
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
        self.lane_loss = None;
        self.heard(now);
        self.act(DestinationAction::Adopt(lane, GreetingRole::Settle));
        self.act(DestinationAction::Send(Message::Settled(owner)));
    }
}

/// The highest version that both sides speak.
fn common_version(greeting: &Greeting) -> Option<u16> {
    let version = greeting.version_max.min(PROTOCOL_MAX);
    (version >= greeting.version_min && version >= PROTOCOL_MIN).then_some(version)
}
