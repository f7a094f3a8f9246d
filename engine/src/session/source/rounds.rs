//! The road of a migration at the source: what follows when the driver has done what it was told.

use std::time::Duration;

use super::super::measure::Standstill;
use super::{SourceAction, SourceInput, SourceSession, State, check_digest, open_round};
use crate::config::{OnTimeout, Verify};
use crate::converge::{Decision, Situation};
use crate::dirty::Point;
use crate::encode::Tally;
use crate::error::Error;
use crate::limits::{HARVEST_EVERY, HARVEST_REST, HOLD_SHARE, MAX_ROUNDS, MIN_BANDWIDTH, SETTLE_RETRY};
use crate::stats::Event;
use crate::vm::Step;
use crate::wire::{Finish, GreetingRole, Message};

impl SourceSession {
    pub(super) fn on_done(&mut self, now: Duration, input: SourceInput) {
        if let SourceInput::Harvested { writes, .. } = input {
            // From one look at a page to the next: those of a large guest take their time.
            let before = std::mem::replace(&mut self.harvested, self.harvest_began);
            self.round.learn_writes(writes, self.harvest_began.saturating_sub(before));
        }
        let by_the_way = self.state == State::Sending && matches!(input, SourceInput::Harvested { .. });
        if !by_the_way && !matches!(input, SourceInput::RoundQueued | SourceInput::RoundFlushed(_)) {
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
            (_, SourceInput::Throttled) => self.hold_throttle(),
            (_, SourceInput::RoundQueued) => self.on_round_queued(now),
            (_, SourceInput::RoundFlushed(tally)) => self.on_round_flushed(now, &tally),
            (State::Sending, SourceInput::Harvested { .. }) => self.on_harvest_by_the_way(now),
            (State::Harvesting, SourceInput::Harvested { dirty_pages, .. }) => self.decide(now, dirty_pages),
            (State::Pausing, SourceInput::Paused) => {
                self.standstill.paused = now;
                self.standstill.deadline = self.setup.run.then(|| now.saturating_add(self.standstill_limit()));
                self.act(SourceAction::Notify(Event::Paused));
                self.harvest(now, Point::Stopped, State::LastHarvest);
            }
            (State::LastHarvest, SourceInput::Harvested { dirty_pages, .. }) => self.on_last_harvest(now, dirty_pages),
            (State::Saving, SourceInput::Saved { bytes, waited }) => {
                self.standstill.save = now.saturating_sub(self.mark);
                self.standstill.excuse(self.standstill.save.saturating_sub(waited));
                self.standstill.excuse(self.patience_for(bytes));
                self.report.state_bytes = bytes;
                self.harvest(now, Point::AfterSave, State::HarvestAfterSave);
            }
            (State::HarvestAfterSave, SourceInput::Harvested { dirty_pages, .. }) => {
                let took = now.saturating_sub(self.mark);
                self.standstill.harvest += took;
                self.standstill.excuse(took);
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

    pub(super) fn begin_first_round(&mut self, now: Duration) {
        let (peer, pages_total) = (self.peer.clone(), self.report.pages_total);
        self.act(SourceAction::Notify(Event::Accepted { peer, pages_total }));
        self.begin_round(now, 0, false);
        self.harvested = now;
        self.state = State::Sending;
    }

    pub(super) fn begin_round(&mut self, now: Duration, number: u32, stopped: bool) {
        self.round = open_round(number, now, stopped, self.throttle);
        (self.round_queued, self.round_flushed, self.round_acked) = (false, false, false);
        self.last_progress = now;
        self.harvest_due = now + HARVEST_EVERY;
        let hold = (!stopped).then(|| self.forecast.pages_within(self.setup.config.downtime_limit / HOLD_SHARE));
        self.act(SourceAction::SendRound { round: number, hold });
    }

    /// The bits of a large guest take their time, in which nothing is planned and nobody is heard.
    fn on_harvest_by_the_way(&mut self, now: Duration) {
        if self.harvest_due != Duration::MAX {
            // A late answer.
            return;
        }
        let took = now.saturating_sub(self.harvest_began);
        self.harvest_due = now + HARVEST_EVERY.max(took.saturating_mul(HARVEST_REST));
        self.last_heard = (self.last_heard + took).min(now);
        self.last_progress = (self.last_progress + took).min(now);
    }

    pub(super) fn on_round_queued(&mut self, now: Duration) {
        self.round_queued = true;
        if self.state == State::LastHarvest {
            self.save(now);
        }
    }

    pub(super) fn on_round_flushed(&mut self, now: Duration, tally: &Tally) {
        self.round_flushed = true;
        self.round.tally = *tally;
        self.digest = self.digest.plus(tally.digest);
        match self.state {
            State::Sending => self.end_running_round(now),
            State::Draining => self.drain(now),
            _ => {}
        }
    }

    pub(super) fn end_running_round(&mut self, now: Duration) {
        if self.round_flushed && self.round_acked {
            self.forecast.learn(&self.round.tally, now.saturating_sub(self.round.started));
            self.harvest(now, Point::Running, State::Harvesting);
        }
    }

    pub(super) fn harvest(&mut self, now: Duration, point: Point, state: State) {
        (self.mark, self.harvest_began) = (now, now);
        self.act(SourceAction::Harvest(point));
        self.state = state;
    }

    /// A running round is over and its successor's pages are known.
    pub(super) fn decide(&mut self, now: Duration, dirty_pages: u64) {
        // The next harvest's interval began with the last one's end.
        let mut round = self.round.report(self.mark, dirty_pages);
        let predicted_downtime = self.forecast.downtime(dirty_pages, self.setup.state_bytes_estimate);
        round.predicted_downtime = Some(predicted_downtime);
        let situation = Situation {
            downtime_limit: self.setup.config.downtime_limit,
            predicted_downtime,
            fixed_downtime: self.forecast.fixed_downtime(self.setup.state_bytes_estimate),
            pages_downtime: predicted_downtime
                .saturating_sub(self.forecast.downtime(0, self.setup.state_bytes_estimate)),
            throttle: self.throttle,
            max_throttle: self.setup.config.max_throttle.min(99),
        };
        self.record(round.clone());
        if self.round.number + 3 >= MAX_ROUNDS && !self.switch_forced {
            // As good as a timeout: the report of such a migration must not grow for ever.
            match self.setup.config.on_timeout {
                OnTimeout::SwitchOver => self.switch_forced = true,
                OnTimeout::Cancel => return self.fail(now, Error::TooManyRounds(self.round.number + 1)),
            }
        }
        let decision = if self.switch_forced || !self.setup.run {
            Decision::SwitchOver
        } else {
            self.setup.policy.decide(&round, &situation)
        };
        match decision {
            Decision::SwitchOver if self.switch_forced => {
                let state = self.setup.state_bytes_estimate;
                let longest = self.forecast.longest_downtime(dirty_pages, state, MIN_BANDWIDTH);
                self.order_pause(now, predicted_downtime.max(longest));
            }
            Decision::SwitchOver => self.order_pause(now, predicted_downtime),
            Decision::AnotherRound => self.begin_running_round(now),
            Decision::Throttle(percent) => {
                let percent = percent.min(situation.max_throttle);
                self.act(SourceAction::Notify(Event::Throttled(percent)));
                self.act(SourceAction::Throttle(percent));
                self.throttle = percent;
                self.begin_running_round(now);
            }
        }
    }

    pub(super) fn hold_throttle(&mut self) {
        self.throttle_held = self.throttle;
        self.report.throttle_peak = self.report.throttle_peak.max(self.throttle);
    }

    /// A VMM that cannot throttle is not asked again, except to end what it has done before.
    pub(super) fn forget_throttle(&mut self) {
        self.setup.config.max_throttle = 0;
        (self.throttle, self.round.throttle) = (self.throttle_held, self.throttle_held);
    }

    pub(super) fn begin_running_round(&mut self, now: Duration) {
        self.begin_round(now, self.round.number + 1, false);
        self.state = State::Sending;
    }

    pub(super) fn order_pause(&mut self, now: Duration, predicted: Duration) {
        self.standstill = Standstill { ordered: now, predicted, ..Standstill::default() };
        self.act(SourceAction::Pause);
        self.state = State::Pausing;
    }

    pub(super) fn on_last_harvest(&mut self, now: Duration, dirty_pages: u64) {
        self.standstill.harvest = now.saturating_sub(self.mark);
        self.standstill.excuse(self.standstill.harvest);
        if dirty_pages == 0 {
            self.save(now);
        } else {
            // The state is saved as soon as the lanes have been given all pages.
            self.begin_round(now, self.round.number + 1, true);
        }
    }

    pub(super) fn save(&mut self, now: Duration) {
        self.mark = now;
        self.act(SourceAction::Save);
        self.state = State::Saving;
    }

    /// Everything is on its way or sent: end the last round, send what saving has dirtied, finish.
    pub(super) fn drain(&mut self, now: Duration) {
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

    pub(super) fn record(&mut self, round: crate::stats::RoundReport) {
        self.act(SourceAction::Notify(Event::RoundFinished(round.clone())));
        self.report.rounds.push(round);
    }

    pub(super) fn compare(&mut self, now: Duration) {
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
    pub(super) fn commit(&mut self, now: Duration) {
        self.standstill.committed = now;
        self.standstill.deadline = Some(now.saturating_add(self.work_limit()));
        self.act(SourceAction::Send(Message::Commit));
        self.heard(now);
        self.state = State::AwaitRunning;
    }
}
