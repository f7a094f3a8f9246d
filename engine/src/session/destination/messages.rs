//! What the source says and what the driver has done, and what follows.

use std::time::Duration;

use super::super::Outcome;
use super::{DestinationAction, DestinationInput, DestinationSession, Phase};
use crate::config::Verify;
use crate::error::Error;
use crate::limits::MAX_STATE;
use crate::stats::Event;
use crate::wire::{Message, Offer, Refusal};

impl DestinationSession {
    pub(super) fn on_message(&mut self, now: Duration, message: Message) {
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
            // Said before the source knew that it is over.
            (Phase::AwaitReason, _) => {}
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

    pub(super) fn on_offer(&mut self, offer: Box<Offer>) {
        self.run = offer.run;
        self.verify = offer.verify;
        self.data_lanes = offer.data_lanes;
        self.lanes_seen = vec![false; offer.data_lanes.into()];
        self.report.pages_total = offer.layout.page_count();
        self.phase = Phase::MakingRoom;
        self.opening_deadline = None;
        self.act(DestinationAction::MakeRoom(offer));
    }

    pub(super) fn on_state(&mut self, piece: &[u8]) {
        if (self.state.len() + piece.len()) as u64 > MAX_STATE {
            let (peer, what) = (self.peer.clone(), format!("it sent more than {MAX_STATE} bytes of machine state"));
            return self.refuse_on(Error::PeerMisbehaved { peer, what });
        }
        self.state.extend_from_slice(piece);
        self.report.state_bytes = self.state.len() as u64;
    }

    /// Finish was heard and the last round is complete: is everything here and right?
    pub(super) fn check_complete(&mut self) {
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
        self.lane_loss = None;
        // What comes after Finish is no part of what was proved.
        self.act(DestinationAction::StopPlacing);
        if self.verify == Verify::Full {
            self.phase = Phase::Verifying;
            self.act(DestinationAction::Verify);
        } else {
            self.load();
        }
    }

    pub(super) fn load(&mut self) {
        self.phase = Phase::Loading;
        let state = std::mem::take(&mut self.state);
        self.act(DestinationAction::Load(state));
    }

    pub(super) fn on_done(&mut self, now: Duration, input: DestinationInput) {
        match (self.phase, input) {
            (Phase::MakingRoom, DestinationInput::RoomMade { exposed }) => {
                self.heard(now);
                self.phase = Phase::Receiving;
                self.expect_lanes(now);
                self.act(DestinationAction::Send(Message::Accept { exposed }));
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
}
