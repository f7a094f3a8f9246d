//! The source's half of the protocol.
//!
//! The guest is the source's until Commit has been handed to the control lane (R11); from that
//! moment on only an answer of the destination decides (R12). `fail` is the one place that tells
//! the two apart.

use std::collections::VecDeque;
use std::time::Duration;

use super::Outcome;
use super::measure::{Forecast, OpenRound, Standstill};
use crate::config::{OnTimeout, SourceConfig, Verify};
use crate::converge::{Convergence, Decision, Situation};
use crate::digest::{Digest, DigestKey};
use crate::dirty::Point;
use crate::encode::Tally;
use crate::error::Error;
use crate::limits::{MAX_ROUNDS, REASON_GRACE, SETTLE_RETRY, WORK_FACTOR};
use crate::memory::Layout;
use crate::stats::{Event, Report};
use crate::vm::Step;
use crate::wire::{
    Finish, Greeting, GreetingRole, Message, Offer, Owner, PROTOCOL_MAX, PROTOCOL_MIN, Prepared, Refusal, SessionId,
};

/// What a source session starts from.
pub struct SourceSetup {
    /// The user's choices.
    pub config: SourceConfig,
    /// Fresh random name of the migration.
    pub session: SessionId,
    /// Fresh random key of its page hashes.
    pub digest_key: DigestKey,
    /// The guest's memory.
    pub layout: Layout,
    /// The VMM's description of the guest.
    pub vm_config: Vec<u8>,
    /// Whether the guest runs.
    pub run: bool,
    /// Machine state expected, in bytes.
    pub state_bytes_estimate: u64,
    /// When to stop.
    pub policy: Box<dyn Convergence>,
}

impl std::fmt::Debug for SourceSetup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SourceSetup").field("config", &self.config).finish_non_exhaustive()
    }
}

/// What happened.
#[derive(Debug)]
pub enum SourceInput {
    /// Time has passed.
    Tick,
    /// A control lane stands, after `Dial` or `DialSettle`.
    Dialled {
        /// The other end.
        peer: String,
    },
    /// All data lanes stand.
    LanesOpen,
    /// A message came on the control lane.
    Message(Message),
    /// Tracking has started, and all pages that may hold content are dirty.
    Tracking {
        /// How many those are.
        dirty_pages: u64,
    },
    /// All batches of the round were handed to lanes (or given back, after `AbandonRound`).
    RoundQueued,
    /// Every lane has sent its end of the round.
    RoundFlushed(Tally),
    /// Dirty bits were taken.
    Harvested {
        /// Pages dirty now.
        dirty_pages: u64,
    },
    /// The guest stands still.
    Paused,
    /// The machine state was saved and its frames handed to the control lane.
    Saved {
        /// Its length.
        bytes: u64,
    },
    /// All memory was re-hashed.
    FullDigest(Digest),
    /// `Step(BeforeHandover)` was done.
    StepDone,
    /// The last action failed. The control lane may be sound.
    Failed(Error),
    /// The control lane broke.
    LinkLost(Error),
    /// A data lane broke.
    DataLaneLost(Error),
    /// The VMM cannot throttle.
    ThrottleRefused,
    /// The user wants the end.
    Cancel,
    /// The user wants the switch-over.
    SwitchOverNow,
    /// The user changed the downtime limit.
    DowntimeLimit(Duration),
}

/// What is to be done, in order.
#[derive(Debug)]
pub enum SourceAction {
    /// Open the control lane; answer `Dialled` or `LinkLost`.
    Dial,
    /// Open a fresh control lane to ask who owns the guest; answer `Dialled` or `LinkLost`.
    DialSettle,
    /// Send a message on the control lane. A failure comes as `LinkLost`.
    Send(Message),
    /// Open data lanes; answer `LanesOpen` or `LinkLost`.
    OpenLanes(u16),
    /// Start tracking and mark populated pages dirty; answer `Tracking` or `Failed`.
    StartTracking,
    /// Plan and send all dirty pages; answer `RoundQueued`, and `RoundFlushed` later.
    SendRound(u32),
    /// Stop planning; what was not handed to a lane is dirty again. `RoundQueued` and
    /// `RoundFlushed` come as usual.
    AbandonRound,
    /// The destination holds all that was in flight.
    Acknowledge,
    /// Take dirty bits; answer `Harvested` or `Failed`.
    Harvest(Point),
    /// Slow the vCPUs down by so many per cent; `ThrottleRefused` if the VMM cannot.
    Throttle(u8),
    /// Stop the guest; answer `Paused` or `Failed`.
    Pause,
    /// Save the machine state and send it in pieces; answer `Saved` or `Failed`.
    Save,
    /// Re-hash all memory; answer `FullDigest` or `Failed`.
    FullDigest,
    /// Tell the VMM; answer `StepDone` or `Failed` to `BeforeHandover`, nothing to the others.
    Step(Step),
    /// Run the guest again. A failure comes as `Failed`.
    Resume,
    /// Stop tracking.
    StopTracking,
    /// Tell the observer.
    Notify(Event),
}

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
    dirty_after_save: u64,
    forecast: Forecast,
    throttle: u8,
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
    /// A data lane's end, and until when the control lane may still tell the reason.
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
            dirty_after_save: 0,
            forecast: Forecast::default(),
            throttle: 0,
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
            _ => {
                let total = if self.guest_runs() { self.setup.config.timeout } else { Duration::MAX };
                let lane_loss = self.lane_loss.as_ref().map_or(Duration::MAX, |(_, deadline)| *deadline);
                Some(total.min(self.silence_deadline()).min(self.stall_deadline()).min(lane_loss))
            }
        }
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
            SourceInput::DataLaneLost(error) => self.lose_data_lane(now, error),
            SourceInput::Cancel => self.cancel(now),
            SourceInput::SwitchOverNow => self.force_switch(),
            SourceInput::ThrottleRefused => self.forget_throttle(),
            SourceInput::DowntimeLimit(limit) => self.setup.config.downtime_limit = limit,
            SourceInput::Message(message) => {
                self.last_heard = now;
                self.on_message(now, message);
            }
            other => self.on_done(now, other),
        }
        self.check_time(now);
    }

    // ---- what the driver has done ----

    fn on_done(&mut self, now: Duration, input: SourceInput) {
        if !matches!(input, SourceInput::RoundQueued | SourceInput::RoundFlushed(_)) {
            // While the VM was busy on this thread nobody could be heard.
            self.heard(now);
        }
        match (self.state, input) {
            (State::Dialling, SourceInput::Dialled { peer }) => {
                self.peer = peer;
                self.greet(GreetingRole::Control);
                self.state = State::AwaitWelcome;
            }
            (State::Settling, SourceInput::Dialled { .. }) => {
                self.greet(GreetingRole::Settle);
                self.settle_retry_at = now + SETTLE_RETRY * 4;
            }
            (State::OpeningLanes, SourceInput::LanesOpen) => {
                self.act(SourceAction::StartTracking);
                self.state = State::StartingTracking;
            }
            (State::StartingTracking, SourceInput::Tracking { .. }) => self.begin_first_round(now),
            (_, SourceInput::RoundQueued) => self.on_round_queued(now),
            (_, SourceInput::RoundFlushed(tally)) => self.on_round_flushed(now, &tally),
            (State::Harvesting, SourceInput::Harvested { dirty_pages }) => self.decide(now, dirty_pages),
            (State::Pausing, SourceInput::Paused) => {
                self.standstill.paused = now;
                self.act(SourceAction::Notify(Event::Paused));
                self.harvest(now, Point::Stopped, State::LastHarvest);
            }
            (State::LastHarvest, SourceInput::Harvested { dirty_pages }) => self.on_last_harvest(now, dirty_pages),
            (State::Saving, SourceInput::Saved { bytes }) => {
                self.standstill.save = now.saturating_sub(self.mark);
                self.report.state_bytes = bytes;
                self.harvest(now, Point::AfterSave, State::HarvestAfterSave);
            }
            (State::HarvestAfterSave, SourceInput::Harvested { dirty_pages }) => {
                self.standstill.harvest += now.saturating_sub(self.mark);
                self.dirty_after_save = dirty_pages;
                self.state = State::Draining;
                self.drain(now);
            }
            (State::AwaitPrepared, SourceInput::FullDigest(digest)) => {
                self.full_digest = Some(digest);
                self.compare(now);
            }
            (State::HandingOver, SourceInput::StepDone) => self.commit(now),
            // Late answers, of actions that a failure has overtaken.
            _ => {}
        }
    }

    fn begin_first_round(&mut self, now: Duration) {
        let (peer, pages_total) = (self.peer.clone(), self.report.pages_total);
        self.act(SourceAction::Notify(Event::Accepted { peer, pages_total }));
        self.begin_round(now, 0, false);
        self.state = State::Sending;
    }

    fn begin_round(&mut self, now: Duration, number: u32, stopped: bool) {
        self.round = open_round(number, now, stopped, self.throttle);
        (self.round_queued, self.round_flushed, self.round_acked) = (false, false, false);
        self.last_progress = now;
        self.act(SourceAction::SendRound(number));
    }

    fn on_round_queued(&mut self, now: Duration) {
        self.round_queued = true;
        if self.state == State::LastHarvest {
            self.save(now);
        }
    }

    fn on_round_flushed(&mut self, now: Duration, tally: &Tally) {
        self.round_flushed = true;
        self.round.tally = *tally;
        self.digest = self.digest.plus(tally.digest);
        match self.state {
            State::Sending => self.end_running_round(now),
            State::Draining => self.drain(now),
            _ => {}
        }
    }

    fn end_running_round(&mut self, now: Duration) {
        if self.round_flushed && self.round_acked {
            self.forecast.learn(&self.round.tally, now.saturating_sub(self.round.started));
            self.harvest(now, Point::Running, State::Harvesting);
        }
    }

    fn harvest(&mut self, now: Duration, point: Point, state: State) {
        self.mark = now;
        self.act(SourceAction::Harvest(point));
        self.state = state;
    }

    /// A running round is over and its successor's pages are known.
    fn decide(&mut self, now: Duration, dirty_pages: u64) {
        // The next harvest's interval began with the last one's end.
        let mut round = self.round.report(self.mark, dirty_pages);
        let predicted_downtime = self.forecast.downtime(dirty_pages, self.setup.state_bytes_estimate);
        round.predicted_downtime = Some(predicted_downtime);
        let situation = Situation {
            downtime_limit: self.setup.config.downtime_limit,
            predicted_downtime,
            throttle: self.throttle,
            max_throttle: self.setup.config.max_throttle.min(99),
        };
        self.record(round.clone());
        if self.round.number + 3 >= MAX_ROUNDS && !self.switch_forced {
            // As good as a timeout: the report of such a migration must not grow for ever.
            self.time_out(now);
            if self.state == State::Ended {
                return;
            }
        }
        let decision = if self.switch_forced || !self.setup.run {
            Decision::SwitchOver
        } else {
            self.setup.policy.decide(&round, &situation)
        };
        match decision {
            Decision::SwitchOver => self.order_pause(now),
            Decision::AnotherRound => self.begin_running_round(now),
            Decision::Throttle(percent) => {
                let percent = percent.min(situation.max_throttle);
                self.report.throttle_peak = self.report.throttle_peak.max(percent);
                self.act(SourceAction::Notify(Event::Throttled(percent)));
                self.act(SourceAction::Throttle(percent));
                self.throttle = percent;
                self.begin_running_round(now);
            }
        }
    }

    /// A VMM that cannot throttle is not asked again.
    fn forget_throttle(&mut self) {
        self.setup.config.max_throttle = 0;
        self.throttle = 0;
        self.report.throttle_peak = 0;
    }

    fn begin_running_round(&mut self, now: Duration) {
        self.begin_round(now, self.round.number + 1, false);
        self.state = State::Sending;
    }

    fn order_pause(&mut self, now: Duration) {
        self.standstill = Standstill { ordered: now, ..Standstill::default() };
        self.act(SourceAction::Pause);
        self.state = State::Pausing;
    }

    fn on_last_harvest(&mut self, now: Duration, dirty_pages: u64) {
        self.standstill.harvest = now.saturating_sub(self.mark);
        if dirty_pages == 0 {
            self.save(now);
        } else {
            // The state is saved as soon as the lanes have been given all pages.
            self.begin_round(now, self.round.number + 1, true);
        }
    }

    fn save(&mut self, now: Duration) {
        self.mark = now;
        self.act(SourceAction::Save);
        self.state = State::Saving;
    }

    /// Everything is on its way or sent: end the last round, send what saving has dirtied, finish.
    fn drain(&mut self, now: Duration) {
        if self.round.stopped && !self.round_flushed {
            return;
        }
        if self.round.stopped {
            let report = self.round.report(now, self.dirty_after_save);
            self.record(report);
        }
        if self.dirty_after_save > 0 {
            self.dirty_after_save = 0;
            return self.begin_round(now, self.round.number + 1, true);
        }
        if self.setup.config.verify == Verify::Full {
            self.act(SourceAction::FullDigest);
        }
        let finish = Finish { last_round: self.round.number, digest: self.digest, state_len: self.report.state_bytes };
        // Sent first, so that both sides hash at the same time.
        self.actions.push_front(SourceAction::Send(Message::Finish(finish)));
        self.last_progress = now;
        self.lane_loss = None;
        self.state = State::AwaitPrepared;
    }

    fn record(&mut self, round: crate::stats::RoundReport) {
        self.act(SourceAction::Notify(Event::RoundFinished(round.clone())));
        self.report.rounds.push(round);
    }

    fn compare(&mut self, now: Duration) {
        let Some(prepared) = self.prepared else { return };
        if let Err(error) = check_digest("digest of all pages sent", self.digest, prepared.digest) {
            self.report.digest_match = Some(false);
            return self.fail(now, error);
        }
        self.report.digest_match = Some(true);
        if self.setup.config.verify == Verify::Full {
            let Some(ours) = self.full_digest else { return };
            let theirs = prepared.full_digest.unwrap_or_default();
            let result = check_digest("full re-hash of all memory", ours, theirs);
            self.report.full_verify_match = Some(result.is_ok());
            if let Err(error) = result {
                return self.fail(now, error);
            }
        }
        self.act(SourceAction::Step(Step::BeforeHandover));
        self.state = State::HandingOver;
    }

    /// The point of no return: from here on only the destination's word counts.
    fn commit(&mut self, now: Duration) {
        self.standstill.committed = now;
        self.act(SourceAction::Send(Message::Commit));
        self.heard(now);
        self.state = State::AwaitRunning;
    }

    // ---- what the destination says ----

    fn on_message(&mut self, now: Duration, message: Message) {
        if !matches!(message, Message::Heartbeat { .. }) {
            self.last_progress = now;
        }
        match (self.state, message) {
            (_, Message::Heartbeat { received }) => {
                if received > self.progress_seen {
                    (self.progress_seen, self.last_progress) = (received, now);
                }
            }
            (State::AwaitWelcome, Message::Welcome { version }) => self.on_welcome(now, version),
            (State::AwaitWelcome | State::AwaitAccept, Message::Refuse(refusal)) => {
                let error = self.refused(refusal);
                self.fail(now, error);
            }
            (State::AwaitAccept, Message::Accept) => {
                self.act(SourceAction::OpenLanes(self.setup.config.lanes));
                self.state = State::OpeningLanes;
            }
            (_, Message::RoundAck { round }) if round <= self.round.number && self.guest_was_offered() => {
                self.on_round_ack(now, round);
            }
            (State::AwaitPrepared, Message::Prepared(prepared)) if self.prepared.is_none() => {
                self.standstill.prepared = now;
                self.prepared = Some(prepared);
                self.compare(now);
            }
            (State::AwaitRunning | State::Settling, Message::Running { resume_us }) => self.handed_over(now, resume_us),
            (State::AwaitRunning | State::Settling, Message::Settled(Owner::Destination)) => self.handed_over(now, 0),
            (State::AwaitRunning | State::Settling, Message::Settled(Owner::Source)) => self.given_back(),
            // Not before Commit: afterwards only Settled and Running decide.
            (State::AwaitRunning | State::Settling, _) => {}
            (_, Message::Settled(Owner::Source)) => {
                let (peer, reason) = (self.peer.clone(), "it gave the guest back".to_owned());
                self.fail(now, Error::PeerAborted { peer, reason });
            }
            (_, Message::Abort { reason }) => {
                let peer = self.peer.clone();
                self.fail(now, Error::PeerAborted { peer, reason });
            }
            (state, message) => {
                let what = format!("it sent {message:?} while this side was in state {state:?}");
                let peer = self.peer.clone();
                self.fail(now, Error::PeerMisbehaved { peer, what: shorten(what) });
            }
        }
    }

    fn on_welcome(&mut self, now: Duration, version: u16) {
        if !(PROTOCOL_MIN..=PROTOCOL_MAX).contains(&version) {
            let error = self.version_error(version, version);
            return self.fail(now, error);
        }
        let offer = Offer {
            digest_key: self.setup.digest_key,
            data_lanes: self.setup.config.lanes,
            verify: self.setup.config.verify,
            run: self.setup.run,
            layout: self.setup.layout.clone(),
            config: std::mem::take(&mut self.setup.vm_config),
        };
        self.act(SourceAction::Send(Message::Offer(Box::new(offer))));
        self.state = State::AwaitAccept;
    }

    fn refused(&self, refusal: Refusal) -> Error {
        let peer = self.peer.clone();
        match refusal {
            Refusal::Version { min, max } => self.version_error(min, max),
            Refusal::Busy => Error::Refused { peer, reason: "it is busy with another migration".to_owned() },
            Refusal::Guest(reason) => Error::Refused { peer, reason },
        }
    }

    fn version_error(&self, theirs_min: u16, theirs_max: u16) -> Error {
        let (ours_min, ours_max) = (PROTOCOL_MIN, PROTOCOL_MAX);
        Error::Version { peer: self.peer.clone(), theirs_min, theirs_max, ours_min, ours_max }
    }

    fn on_round_ack(&mut self, now: Duration, round: u32) {
        if round != self.round.number {
            return;
        }
        self.round_acked = true;
        self.act(SourceAction::Acknowledge);
        if self.state == State::Sending {
            self.end_running_round(now);
        }
    }

    /// The destination has let go of the guest for good.
    fn given_back(&mut self) {
        let (peer, reason) = (self.peer.clone(), "it gave the guest back".to_owned());
        let given_back = Error::PeerAborted { peer, reason };
        let error = if self.asking { given_back } else { self.settle_error.take().unwrap_or(given_back) };
        self.act(SourceAction::Send(Message::Done));
        self.keep_guest(error);
    }

    fn handed_over(&mut self, now: Duration, resume_us: u64) {
        if let Some(prepared) = self.prepared {
            self.report.downtime = self.standstill.parts(&prepared, now, resume_us);
        }
        self.act(SourceAction::Send(Message::Done));
        self.act(SourceAction::Step(Step::Committed));
        self.act(SourceAction::Notify(Event::HandedOver));
        self.stop_tracking();
        self.end(Outcome::HandedOver);
    }

    // ---- failures ----

    fn cancel(&mut self, now: Duration) {
        if self.asking {
            self.end(Outcome::Undecided(Error::Cancelled));
        } else if !self.committed() {
            self.fail(now, Error::Cancelled);
        }
    }

    fn force_switch(&mut self) {
        if self.switch_forced || !self.guest_runs() {
            return;
        }
        self.switch_forced = true;
        if self.state == State::Sending && !self.round_queued {
            self.act(SourceAction::AbandonRound);
        }
    }

    fn lose_link(&mut self, now: Duration, error: Error) {
        match self.state {
            State::Settling => {
                self.settle_retry_at = self.settle_retry_at.min(now + SETTLE_RETRY);
            }
            State::AwaitRunning => {
                self.settle_error = Some(error);
                self.settle_since = now;
                self.settle_retry_at = now;
                self.state = State::Settling;
            }
            _ => self.fail(now, error),
        }
    }

    /// A peer that gives up closes its lanes; why, stands on the control lane.
    fn lose_data_lane(&mut self, now: Duration, error: Error) {
        let needed = !self.committed() && self.state != State::AwaitPrepared && self.state != State::HandingOver;
        if needed && self.lane_loss.is_none() {
            self.lane_loss = Some((error, now + REASON_GRACE));
        }
    }

    /// Ends the migration with the guest here, unless Commit may have left.
    fn fail(&mut self, now: Duration, error: Error) {
        if self.committed() {
            return self.lose_link(now, error);
        }
        let reason = error.to_string();
        self.actions.clear();
        self.act(SourceAction::Send(Message::Abort { reason }));
        self.keep_guest(error);
    }

    /// The guest is this side's: everything goes back to how it was.
    fn keep_guest(&mut self, error: Error) {
        if self.tracking || self.pause_ordered {
            self.act(SourceAction::Step(Step::Aborted));
        }
        if self.pause_ordered && self.setup.run {
            self.act(SourceAction::Resume);
        }
        if self.throttle > 0 {
            self.act(SourceAction::Throttle(0));
        }
        self.stop_tracking();
        self.act(SourceAction::Notify(Event::Aborted));
        self.end(Outcome::SourceOwns(error));
    }

    fn stop_tracking(&mut self) {
        if self.tracking {
            self.act(SourceAction::StopTracking);
            self.tracking = false;
        }
    }

    fn end(&mut self, outcome: Outcome) {
        self.outcome = Some(outcome);
        self.state = State::Ended;
    }

    /// A guest that cannot be resumed matters more than why the migration failed.
    fn handle_after_end(&mut self, input: SourceInput) {
        if let (SourceInput::Failed(error), Some(Outcome::SourceOwns(outcome))) = (input, &mut self.outcome) {
            *outcome = error;
        }
    }

    // ---- time ----

    fn check_time(&mut self, now: Duration) {
        match self.state {
            State::Ended => {}
            State::Settling => self.check_settling(now),
            State::AwaitRunning if now >= self.silence_deadline().min(self.stall_deadline()) => {
                let error = self.silent("answered to Commit", now.saturating_sub(self.last_heard));
                self.lose_link(now, error);
                self.check_settling(now);
            }
            _ if self.lane_loss.as_ref().is_some_and(|(_, deadline)| now >= *deadline) => {
                if let Some((error, _)) = self.lane_loss.take() {
                    self.fail(now, error);
                }
            }
            _ if now >= self.silence_deadline() => {
                let error = self.silent("said anything", now.saturating_sub(self.last_heard));
                self.fail(now, error);
            }
            _ if now >= self.stall_deadline() => {
                let error = self.silent("made any progress", now.saturating_sub(self.last_progress));
                self.fail(now, error);
            }
            _ if self.guest_runs() && now >= self.setup.config.timeout => self.time_out(now),
            _ => {}
        }
    }

    fn time_out(&mut self, now: Duration) {
        match self.setup.config.on_timeout {
            OnTimeout::SwitchOver if self.guest_was_offered() => {
                self.setup.config.timeout = Duration::MAX;
                self.force_switch();
            }
            _ => self.fail(now, Error::TimedOut(self.setup.config.timeout)),
        }
    }

    fn check_settling(&mut self, now: Duration) {
        if now >= self.settle_since.saturating_add(self.setup.config.settle_window) {
            let error = self.settle_error.take().unwrap_or_else(|| self.silent("answered", Duration::ZERO));
            if self.throttle > 0 {
                self.act(SourceAction::Throttle(0));
            }
            self.stop_tracking();
            self.end(Outcome::Undecided(error));
        } else if now >= self.settle_retry_at {
            self.act(SourceAction::DialSettle);
            self.settle_retry_at = now + SETTLE_RETRY * 4;
        }
    }

    fn silent(&self, what: &'static str, silence: Duration) -> Error {
        Error::PeerSilent { peer: self.peer.clone(), what, silence }
    }

    fn silence_deadline(&self) -> Duration {
        self.last_heard.saturating_add(self.setup.config.peer_timeout)
    }

    /// Working for the VMM (making room, loading state) may take longer than a sign of life.
    fn stall_deadline(&self) -> Duration {
        self.last_progress.saturating_add(self.setup.config.peer_timeout.saturating_mul(WORK_FACTOR))
    }

    // ---- small things ----

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

    fn committed(&self) -> bool {
        matches!(self.state, State::AwaitRunning | State::Settling)
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
    OpenRound { number, started, stopped, throttle, tally: Tally::default() }
}

/// A peer's message can be long; an error is for reading.
fn shorten(mut text: String) -> String {
    if let Some((end, _)) = text.char_indices().nth(200) {
        text.truncate(end);
        text.push_str("...");
    }
    text
}
