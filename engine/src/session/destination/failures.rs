//! Failures and the clock: who keeps the guest when something breaks, and when waiting ends.

use std::time::Duration;

use super::super::Outcome;
use super::{DestinationAction, DestinationSession, Phase};
use crate::error::Error;
use crate::limits::{REASON_GRACE, WORK_FACTOR};
use crate::stats::Event;
use crate::wire::{Message, Owner};

impl DestinationSession {
    pub(super) fn on_failure(&mut self, now: Duration, error: Error) {
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
    pub(super) fn on_door_broken(&mut self, error: Error) {
        let lanes_missing = self.lanes_seen.iter().any(|seen| !seen);
        match self.phase {
            Phase::Waiting | Phase::AwaitOffer | Phase::MakingRoom => self.refuse_on(error),
            Phase::Receiving if lanes_missing => self.refuse_on(error),
            _ => {}
        }
    }

    pub(super) fn cancel(&mut self, now: Duration) {
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
    pub(super) fn refuse_on(&mut self, error: Error) {
        let reason = error.to_string();
        if self.link_up {
            self.act(DestinationAction::Send(Message::Abort { reason }));
        }
        self.give_up(error);
    }

    /// The guest is the source's, for good, and the source does not know it yet.
    pub(super) fn give_back(&mut self, error: Error) {
        self.give_up(error);
        self.phase = Phase::GivenBack;
    }

    /// The guest is the source's, for good.
    pub(super) fn give_up(&mut self, error: Error) {
        if !self.gave_up && self.phase != Phase::Waiting && self.phase != Phase::AwaitOffer {
            self.act(DestinationAction::StopPlacing);
            self.act(DestinationAction::AbortVm);
            self.act(DestinationAction::Notify(Event::Aborted));
        }
        self.gave_up = true;
        self.end(Outcome::SourceOwns(error));
    }

    /// A source that left before it offered anything: the next one is welcome.
    pub(super) fn forget_source(&mut self) {
        self.opening_deadline = None;
        self.act(DestinationAction::CloseLanes);
        self.session = None;
        self.link_up = false;
        self.phase = Phase::Waiting;
    }

    pub(super) fn lose_link(&mut self, now: Duration, error: Error) {
        match self.phase {
            Phase::Waiting | Phase::Ended => {}
            Phase::AwaitOffer => self.forget_source(),
            Phase::Ready | Phase::Starting | Phase::AwaitDone | Phase::GivenBack => {
                if self.link_up {
                    self.link_up = false;
                    self.lane_loss = None;
                    self.lost_at = now;
                    self.link_error = Some(error);
                    self.act(DestinationAction::CloseLanes);
                }
            }
            Phase::AwaitReason => {
                // An end that says nothing new: what broke first says more.
                let first = self.lane_loss.take().filter(|_| matches!(error, Error::LaneBroken { .. }));
                self.give_up(first.map_or(error, |(first, _)| first));
            }
            _ => self.give_up(error),
        }
    }

    /// The source has closed the lane, or the link broke: what it said before that is still to be read.
    pub(super) fn lose_sending_half(&mut self, now: Duration, error: Error) {
        match self.phase {
            Phase::Waiting | Phase::AwaitOffer | Phase::Ended => self.lose_link(now, error),
            Phase::Ready | Phase::Starting | Phase::AwaitDone | Phase::GivenBack => self.await_reason(now, error),
            Phase::MakingRoom | Phase::Receiving | Phase::Verifying | Phase::Loading | Phase::AwaitReason => {
                self.await_reason(now, error);
                self.phase = Phase::AwaitReason;
            }
        }
    }

    fn hear_no_reason(&mut self, now: Duration, error: Error) {
        match self.phase {
            Phase::Receiving | Phase::AwaitReason => self.refuse_on(error),
            _ => self.lose_link(now, error),
        }
    }

    /// A source that gives up closes its lanes; why, stands on the control lane. It may itself have waited for a
    /// reason, and is to speak first: of what broke on its side, only a lane's end is seen here.
    pub(super) fn lose_data_lane(&mut self, now: Duration, error: Error) {
        self.lane_loss.get_or_insert((error, now.saturating_add(REASON_GRACE * 2)));
    }

    fn await_reason(&mut self, now: Duration, error: Error) {
        self.lane_loss.get_or_insert((error, now.saturating_add(REASON_GRACE)));
    }

    pub(super) fn end(&mut self, outcome: Outcome) {
        self.outcome = Some(outcome);
        self.phase = Phase::Ended;
    }

    pub(super) fn check_time(&mut self, now: Duration) {
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
            _ if self.link_up && self.lane_loss.as_ref().is_some_and(|(_, deadline)| now >= *deadline) => {
                if let Some((error, _)) = self.lane_loss.take() {
                    self.hear_no_reason(now, error);
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

    pub(super) fn heard(&mut self, now: Duration) {
        (self.last_heard, self.last_progress) = (now, now);
    }

    /// A source that is alive may still hang in its VMM.
    pub(super) fn stall_deadline(&self) -> Duration {
        self.last_progress.saturating_add(self.setup.config.peer_timeout.saturating_mul(WORK_FACTOR))
    }

    pub(super) fn act(&mut self, action: DestinationAction) {
        self.actions.push_back(action);
    }
}
