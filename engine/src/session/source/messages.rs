//! What the destination says, and what follows.

use std::time::Duration;

use super::super::Outcome;
use super::{SourceAction, SourceSession, State, shorten};
use crate::error::Error;
use crate::stats::Event;
use crate::vm::Step;
use crate::wire::{Message, Offer, Owner, PROTOCOL_MAX, PROTOCOL_MIN, Refusal};

impl SourceSession {
    pub(super) fn on_message(&mut self, now: Duration, message: Message) {
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
            (State::AwaitWelcome | State::AwaitAccept | State::AwaitReason, Message::Refuse(refusal)) => {
                let error = self.refused(refusal);
                self.fail(now, error);
            }
            (State::AwaitAccept, Message::Accept { exposed }) => {
                self.act(SourceAction::OpenLanes { count: self.setup.config.lanes, exposed });
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
            // It decides nothing any more, but says why, should the guest come back.
            (State::AwaitRunning | State::Settling, Message::Abort { reason }) => {
                self.settle_error = Some(Error::PeerAborted { peer: self.peer.clone(), reason });
            }
            // Not before Commit: afterwards only Settled and Running decide.
            (State::AwaitRunning | State::Settling, _) => {}
            (_, Message::Settled(Owner::Source)) => {
                let (peer, reason) = (self.peer.clone(), "it gave the guest back".to_owned());
                self.fail(now, Error::PeerAborted { peer, reason });
            }
            (_, Message::Abort { reason }) => {
                let error = self.peer_gave_up(reason);
                self.fail(now, error);
            }
            // Said before the peer knew that it is over.
            (State::AwaitReason, _) => {}
            (state, message) => {
                let what = format!("it sent {message:?} while this side was in state {state:?}");
                let peer = self.peer.clone();
                self.fail(now, Error::PeerMisbehaved { peer, what: shorten(what) });
            }
        }
    }

    pub(super) fn on_welcome(&mut self, now: Duration, version: u16) {
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

    pub(super) fn refused(&self, refusal: Refusal) -> Error {
        let peer = self.peer.clone();
        match refusal {
            Refusal::Version { min, max } => self.version_error(min, max),
            Refusal::Busy => Error::Refused { peer, reason: "it is busy with another migration".to_owned() },
            Refusal::Guest(reason) => Error::Refused { peer, reason },
        }
    }

    /// Of what broke on this side, the peer may have seen no more than that a lane ended.
    fn peer_gave_up(&mut self, mut reason: String) -> Error {
        if let Some((ours, _)) = self.lane_loss.take().filter(|(ours, _)| !ours.is_end_of_lane()) {
            reason = format!("{reason} (before that, on this side: {ours})");
        }
        Error::PeerAborted { peer: self.peer.clone(), reason }
    }

    pub(super) fn version_error(&self, theirs_min: u16, theirs_max: u16) -> Error {
        let (ours_min, ours_max) = (PROTOCOL_MIN, PROTOCOL_MAX);
        Error::Version { peer: self.peer.clone(), theirs_min, theirs_max, ours_min, ours_max }
    }

    pub(super) fn on_round_ack(&mut self, now: Duration, round: u32) {
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
    pub(super) fn given_back(&mut self) {
        let (peer, reason) = (self.peer.clone(), "it gave the guest back".to_owned());
        let given_back = Error::PeerAborted { peer, reason };
        let error = if self.asking { given_back } else { self.settle_error.take().unwrap_or(given_back) };
        self.act(SourceAction::Send(Message::Done));
        self.keep_guest(error);
    }

    pub(super) fn handed_over(&mut self, now: Duration, resume_us: u64) {
        if let Some(prepared) = self.prepared {
            self.report.downtime = self.standstill.parts(&prepared, now, resume_us);
        }
        self.act(SourceAction::Send(Message::Done));
        self.act(SourceAction::Step(Step::Committed));
        self.act(SourceAction::Notify(Event::HandedOver));
        self.stop_tracking();
        self.end(Outcome::HandedOver);
    }
}
