//! Failures and the clock: who keeps the guest when something breaks, and when waiting ends.

use std::time::Duration;

use super::super::Outcome;
use super::{SourceAction, SourceInput, SourceSession, State};
use crate::config::{OnTimeout, Verify};
use crate::dirty::Point;
use crate::error::Error;
use crate::limits::{REASON_GRACE, SETTLE_RETRY, SLOWEST_VERIFY_PAGES, STANDSTILL_FACTOR, WORK_FACTOR};
use crate::stats::Event;
use crate::vm::Step;
use crate::wire::Message;

impl SourceSession {
    pub(super) fn cancel(&mut self, now: Duration) {
        if self.asking {
            self.end(Outcome::Undecided(Error::Cancelled));
        } else if !self.committed() {
            self.fail(now, Error::Cancelled);
        }
    }

    pub(super) fn force_switch(&mut self) {
        if self.switch_forced || !self.guest_runs() {
            return;
        }
        self.switch_forced = true;
        if self.state == State::Sending && !self.round_queued {
            self.act(SourceAction::AbandonRound);
        }
    }

    pub(super) fn lose_link(&mut self, now: Duration, error: Error) {
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
            State::AwaitReason => {
                // An end that says nothing new: what broke first says more.
                let first = self.lane_loss.take().filter(|_| matches!(error, Error::LaneBroken { .. }));
                self.fail(now, first.map_or(error, |(first, _)| first));
            }
            _ => self.fail(now, error),
        }
    }

    /// The peer has closed the lane, or the link broke: what it said before that is still to be read.
    pub(super) fn lose_sending_half(&mut self, now: Duration, error: Error) {
        match self.state {
            State::Settling => self.lose_link(now, error),
            State::AwaitRunning => self.await_reason(now, error),
            _ => {
                self.await_reason(now, error);
                self.state = State::AwaitReason;
            }
        }
    }

    /// A peer that gives up closes its lanes; why, stands on the control lane.
    pub(super) fn lose_data_lane(&mut self, now: Duration, error: Error) {
        let needed = !self.committed() && self.state != State::AwaitPrepared && self.state != State::HandingOver;
        if needed {
            self.await_reason(now, error);
        }
    }

    fn await_reason(&mut self, now: Duration, error: Error) {
        self.lane_loss.get_or_insert((error, now.saturating_add(REASON_GRACE)));
    }

    /// Ends the migration with the guest here, unless Commit may have left.
    pub(super) fn fail(&mut self, now: Duration, error: Error) {
        if self.committed() {
            return self.lose_link(now, error);
        }
        let reason = error.to_string();
        self.actions.clear();
        self.act(SourceAction::Send(Message::Abort { reason }));
        self.keep_guest(error);
    }

    /// The guest is this side's: everything goes back to how it was.
    pub(super) fn keep_guest(&mut self, error: Error) {
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

    pub(super) fn stop_tracking(&mut self) {
        if self.tracking {
            self.act(SourceAction::StopTracking);
            self.tracking = false;
        }
    }

    pub(super) fn end(&mut self, outcome: Outcome) {
        self.outcome = Some(outcome);
        self.state = State::Ended;
    }

    /// A guest that cannot be resumed matters more than why the migration failed.
    pub(super) fn handle_after_end(&mut self, input: SourceInput) {
        if let (SourceInput::Failed(error), Some(Outcome::SourceOwns(outcome))) = (input, &mut self.outcome) {
            *outcome = error;
        }
    }

    pub(super) fn check_time(&mut self, now: Duration) {
        match self.state {
            State::Ended => {}
            State::Settling => self.check_settling(now),
            _ if self.lane_loss.as_ref().is_some_and(|(_, deadline)| now >= *deadline) => {
                if let Some((error, _)) = self.lane_loss.take() {
                    self.fail(now, error);
                }
            }
            State::AwaitRunning if now >= self.answer_deadline() => {
                let error = self.silent("answered to Commit", now.saturating_sub(self.last_heard));
                self.lose_link(now, error);
                self.check_settling(now);
            }
            // Before the others: nobody could be heard while the state was saved.
            _ if now >= self.standstill_deadline() => {
                let (stood, predicted) = (now.saturating_sub(self.standstill.paused), self.standstill.predicted);
                self.fail(now, Error::StoodTooLong { peer: self.peer.clone(), stood, predicted });
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
            _ if self.watches_round() && now >= self.harvest_due => {
                (self.harvest_began, self.harvest_due) = (now, Duration::MAX);
                self.act(SourceAction::Harvest(Point::Running));
            }
            _ => {}
        }
    }

    pub(super) fn time_out(&mut self, now: Duration) {
        match self.setup.config.on_timeout {
            OnTimeout::SwitchOver if self.guest_was_offered() => {
                self.setup.config.timeout = Duration::MAX;
                self.force_switch();
            }
            _ => self.fail(now, Error::TimedOut(self.setup.config.timeout)),
        }
    }

    pub(super) fn check_settling(&mut self, now: Duration) {
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

    pub(super) fn silent(&self, what: &'static str, silence: Duration) -> Error {
        Error::PeerSilent { peer: self.peer.clone(), what, silence }
    }

    pub(super) fn silence_deadline(&self) -> Duration {
        self.last_heard.saturating_add(self.setup.config.peer_timeout)
    }

    /// Working for the VMM (making room, loading state) may take longer than a sign of life.
    pub(super) fn stall_deadline(&self) -> Duration {
        self.last_progress.saturating_add(self.work_limit())
    }

    pub(super) fn work_limit(&self) -> Duration {
        self.setup.config.peer_timeout.saturating_mul(WORK_FACTOR)
    }

    /// Progress is the destination's own word for it. A guest that stands still does not wait for more of that than
    /// this.
    pub(super) fn standstill_limit(&self) -> Duration {
        let verify = match self.setup.config.verify {
            Verify::Full => self.report.pages_total / SLOWEST_VERIFY_PAGES,
            Verify::Digest => 0,
        };
        let expected = self.standstill.predicted.saturating_mul(STANDSTILL_FACTOR);
        self.work_limit().saturating_add(expected).saturating_add(Duration::from_secs(verify))
    }

    /// When the guest has stood still for too long, in states in which it waits for the destination.
    pub(super) fn standstill_deadline(&self) -> Duration {
        let waits = matches!(
            self.state,
            State::LastHarvest | State::Saving | State::HarvestAfterSave | State::Draining | State::AwaitPrepared
        );
        self.standstill.deadline.filter(|_| waits).unwrap_or(Duration::MAX)
    }

    /// Until when the destination has to answer to Commit.
    pub(super) fn answer_deadline(&self) -> Duration {
        let latest = self.standstill.deadline.unwrap_or(Duration::MAX);
        latest.min(self.silence_deadline()).min(self.stall_deadline())
    }
}
