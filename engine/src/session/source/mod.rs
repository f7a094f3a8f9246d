//! The source's half of the protocol.
//!
//! The guest is the source's until Commit has been handed to the control lane (R11); from that
//! moment on only an answer of the destination decides (R12). `fail` is the one place that tells
//! the two apart.

mod failures;
mod interface;
mod messages;
mod rounds;

pub use interface::{SourceAction, SourceInput, SourceSetup};

use std::collections::VecDeque;
use std::time::Duration;

use super::Outcome;
use super::measure::{Forecast, OpenRound, Standstill};
use crate::digest::Digest;
use crate::encode::Tally;
use crate::error::Error;
use crate::limits::STANDSTILL_FACTOR;
use crate::stats::Report;
use crate::wire::{Greeting, GreetingRole, Message, PROTOCOL_MAX, PROTOCOL_MIN, Prepared};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Dialling,
    AwaitWelcome,
    AwaitAccept,
    OpeningLanes,
    StartingTracking,
    /// A round while the guest runs: ends when flushed and acknowledged.
    Sending,
    Harvesting,
    Pausing,
    LastHarvest,
    /// Last round queued, state being saved.
    Saving,
    HarvestAfterSave,
    /// Waiting for the lanes to finish the last rounds.
    Draining,
    AwaitPrepared,
    HandingOver,
    AwaitRunning,
    Settling,
    /// The migration has failed, and the peer may have said why.
    AwaitReason,
    Ended,
}

/// The source's state machine.
#[derive(Debug)]
#[allow(clippy::struct_excessive_bools)] // independent facts, not a state in disguise: the state has its own type
pub struct SourceSession {
    setup: SourceSetup,
    state: State,
    actions: VecDeque<SourceAction>,
    outcome: Option<Outcome>,
    report: Report,
    peer: String,
    started: bool,
    last_heard: Duration,
    last_progress: Duration,
    progress_seen: u64,
    switch_forced: bool,
    round: OpenRound,
    round_queued: bool,
    round_flushed: bool,
    round_acked: bool,
    /// When the dirty bits are to be looked at again while a round is under way.
    harvest_due: Duration,
    harvest_began: Duration,
    /// When the dirty bits were last begun to be taken.
    harvested: Duration,
    dirty_after_save: u64,
    forecast: Forecast,
    throttle: u8,
    /// The last that the VMM took.
    throttle_held: u8,
    digest: Digest,
    prepared: Option<Prepared>,
    full_digest: Option<Digest>,
    standstill: Standstill,
    mark: Duration,
    pause_ordered: bool,
    tracking: bool,
    settle_since: Duration,
    settle_retry_at: Duration,
    settle_error: Option<Error>,
    /// What broke first, and until when the control lane may still tell the reason.
    lane_loss: Option<(Error, Duration)>,
    /// Only here to ask about an earlier migration.
    asking: bool,
}

impl SourceSession {
    /// A session whose first action is to dial.
    pub fn new(setup: SourceSetup) -> Self {
        let report = Report { pages_total: setup.layout.page_count(), ..Report::default() };
        let mut session = Self {
            setup,
            state: State::Dialling,
            actions: VecDeque::new(),
            outcome: None,
            report,
            peer: String::from("the destination"),
            started: false,
            last_heard: Duration::ZERO,
            last_progress: Duration::ZERO,
            progress_seen: 0,
            switch_forced: false,
            round: open_round(0, Duration::ZERO, false, 0),
            round_queued: false,
            round_flushed: false,
            round_acked: false,
            harvest_due: Duration::ZERO,
            harvest_began: Duration::ZERO,
            harvested: Duration::ZERO,
            dirty_after_save: 0,
            forecast: Forecast::default(),
            throttle: 0,
            throttle_held: 0,
            digest: Digest::default(),
            prepared: None,
            full_digest: None,
            standstill: Standstill::default(),
            mark: Duration::ZERO,
            pause_ordered: false,
            tracking: false,
            settle_since: Duration::ZERO,
            settle_retry_at: Duration::ZERO,
            settle_error: None,
            lane_loss: None,
            asking: false,
        };
        session.act(SourceAction::Dial);
        session
    }

    /// A session that only asks who owns the guest of an earlier, undecided migration.
    pub fn settle(setup: SourceSetup, error: Error) -> Self {
        let mut session = Self::new(setup);
        session.actions.clear();
        session.pause_ordered = true;
        session.asking = true;
        session.state = State::AwaitRunning;
        session.lose_link(Duration::ZERO, error);
        session
    }

    /// Whether `poll_action` has something to return: do not wait then.
    pub fn has_actions(&self) -> bool {
        !self.actions.is_empty()
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<SourceAction> {
        let action = self.actions.pop_front()?;
        match &action {
            SourceAction::Pause => self.pause_ordered = true,
            SourceAction::StartTracking => self.tracking = true,
            SourceAction::Throttle(percent) => self.throttle = *percent,
            _ => {}
        }
        Some(action)
    }

    /// When `handle(Tick)` is due at the latest, in time since the start.
    pub fn poll_timeout(&self) -> Option<Duration> {
        match self.state {
            State::Ended => None,
            State::Settling => {
                Some(self.settle_retry_at.min(self.settle_since.saturating_add(self.setup.config.settle_window)))
            }
            State::AwaitRunning => Some(self.answer_deadline().min(self.lane_loss_deadline())),
            _ => {
                let total = if self.guest_runs() { self.setup.config.timeout } else { Duration::MAX };
                let harvest = if self.watches_round() { self.harvest_due } else { Duration::MAX };
                let silence = self.silence_deadline().min(self.stall_deadline()).min(self.standstill_deadline());
                Some(total.min(silence).min(self.lane_loss_deadline()).min(harvest))
            }
        }
    }

    /// How long whoever performs `Save` may wait for the control lane; then it gives up without an answer, and the next
    /// `handle` ends the migration.
    pub fn patience(&self, now: Duration) -> Duration {
        self.standstill_deadline().saturating_sub(now)
    }

    /// How much longer it may wait for every so many bytes of state: how long the state is, the VMM knows last.
    pub fn patience_for(&self, state_bytes: u64) -> Duration {
        self.forecast.time_for(state_bytes as f64).saturating_mul(STANDSTILL_FACTOR)
    }

    /// How it ended; `None` while it runs. Perform the remaining actions first.
    pub fn outcome(&self) -> Option<&Outcome> {
        if self.actions.is_empty() { self.outcome.as_ref() } else { None }
    }

    /// The outcome and the report, once it has ended.
    pub fn into_parts(self) -> (Option<Outcome>, Report) {
        (self.outcome, self.report)
    }

    /// The report as it stands.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// The open round's number.
    pub fn round(&self) -> u32 {
        self.round.number
    }

    /// Takes an input. `now` is the time since the session began; it never goes back.
    pub fn handle(&mut self, now: Duration, input: SourceInput) {
        if !self.started {
            self.started = true;
            (self.last_heard, self.last_progress) = (now, now);
        }
        if self.state == State::Ended {
            return self.handle_after_end(input);
        }
        match input {
            SourceInput::Tick => {}
            SourceInput::Failed(error) => self.fail(now, error),
            SourceInput::LinkLost(error) => self.lose_link(now, error),
            SourceInput::ControlSendFailed(error) => self.lose_sending_half(now, error),
            SourceInput::DataLaneLost(error) => self.lose_data_lane(now, error),
            SourceInput::Cancel => self.cancel(now),
            SourceInput::SwitchOverNow => self.force_switch(),
            SourceInput::ThrottleRefused => {
                self.heard(now);
                self.forget_throttle();
            }
            SourceInput::DowntimeLimit(limit) => self.setup.config.downtime_limit = limit,
            SourceInput::Message(message) => {
                self.last_heard = now;
                self.on_message(now, message);
            }
            other => self.on_done(now, other),
        }
        self.check_time(now);
    }

    fn greet(&mut self, role: GreetingRole) {
        let (version_min, version_max) = (PROTOCOL_MIN, PROTOCOL_MAX);
        let session = self.setup.session;
        self.act(SourceAction::Send(Message::Greeting(Greeting { version_min, version_max, session, role })));
    }

    fn heard(&mut self, now: Duration) {
        (self.last_heard, self.last_progress) = (now, now);
    }

    fn act(&mut self, action: SourceAction) {
        self.actions.push_back(action);
    }

    fn lane_loss_deadline(&self) -> Duration {
        self.lane_loss.as_ref().map_or(Duration::MAX, |(_, deadline)| *deadline)
    }

    fn committed(&self) -> bool {
        matches!(self.state, State::AwaitRunning | State::Settling)
    }

    /// Whether pages of the open round are still to be planned while the guest runs: which of them it
    /// writes meanwhile is worth knowing.
    fn watches_round(&self) -> bool {
        self.state == State::Sending && !self.round_queued
    }

    /// States before the pause was ordered.
    fn guest_runs(&self) -> bool {
        matches!(
            self.state,
            State::Dialling
                | State::AwaitWelcome
                | State::AwaitAccept
                | State::OpeningLanes
                | State::StartingTracking
                | State::Sending
                | State::Harvesting
        )
    }

    /// States after the destination made room.
    fn guest_was_offered(&self) -> bool {
        !matches!(
            self.state,
            State::Dialling | State::AwaitWelcome | State::AwaitAccept | State::OpeningLanes | State::StartingTracking
        )
    }
}

fn check_digest(check: &'static str, ours: Digest, theirs: Digest) -> Result<(), Error> {
    if ours == theirs { Ok(()) } else { Err(Error::DigestMismatch { check, ours, theirs }) }
}

fn open_round(number: u32, started: Duration, stopped: bool, throttle: u8) -> OpenRound {
    OpenRound { number, started, stopped, throttle, tally: Tally::default(), write_rates: [0.0; 2] }
}

/// A peer's message can be long; an error is for reading.
fn shorten(mut text: String) -> String {
    if let Some((end, _)) = text.char_indices().nth(200) {
        text.truncate(end);
        text.push_str("...");
    }
    text
}
