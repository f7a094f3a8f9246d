//! Takes lanes in, answers them, and lets them go.

use std::io::IoSlice;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::unbounded;

use super::super::lane::{LaneName, NumberedReceiver, NumberedSender};
use super::super::receive::{self, ReceiveDuty};
use super::super::send::run_control_lane;
use super::drive::Driver;
use super::{DestinationEvent, LaneEvent};
use crate::error::Error;
use crate::host::ThreadRole;
use crate::limits::{FAREWELL, MAX_PENDING_LANES};
use crate::session::{DestinationInput, LaneKey};
use crate::transport::LaneRole;
use crate::wire::{GreetingRole, Message};

impl Driver<'_> {
    pub(super) fn adopt(&mut self, lane: LaneKey, role: GreetingRole) {
        let Some(guest) = self.greeted.remove(&lane) else { return };
        let (index, is_control) = match role {
            GreetingRole::Data(index) => (index, false),
            GreetingRole::Control | GreetingRole::Settle => (0, true),
        };
        if is_control {
            self.generation += 1;
        }
        let lane_role = if is_control { LaneRole::Control } else { LaneRole::Data(index) };
        let name = LaneName { role: lane_role, peer: guest.peer };
        let halves = guest.halves;
        self.closers.push(halves.closer);
        let counters = Arc::clone(&self.counters);
        let receiver = NumberedReceiver { name: name.clone(), receiver: halves.receiver, next: 1, counters };
        let duty = ReceiveDuty {
            lane: receiver,
            index,
            is_control,
            room: Arc::clone(&self.room),
            counters: Arc::clone(&self.counters),
            generation: self.generation,
            events: self.events.0.clone(),
        };
        let role = if is_control { ThreadRole::Control } else { ThreadRole::Receiver(index) };
        let mut spawned = self.spawn(role, move || receive::run(duty));
        if is_control {
            let counters = Arc::clone(&self.counters);
            let sender = NumberedSender { name, sender: halves.sender, sequence: 0, counters };
            spawned = spawned.and_then(|()| self.open_control(sender));
        }
        if let Err(error) = spawned {
            self.tell(DestinationInput::Failed(error));
        }
    }

    pub(super) fn open_control(&mut self, sender: NumberedSender) -> Result<(), Error> {
        let (messages, inbox) = unbounded();
        self.messages = Some(messages);
        let (events, generation) = (self.events.0.clone(), self.generation);
        self.spawn(ThreadRole::Control, move || {
            let event = match run_control_lane(sender, &inbox, None) {
                Ok(()) => LaneEvent::ControlSent,
                Err(error) => LaneEvent::ControlSendFailed(error),
            };
            let _ = events.send(DestinationEvent::Lane(generation, event));
        })
    }

    pub(super) fn answer(&mut self, lane: LaneKey, message: &Message) {
        let Some(mut guest) = self.greeted.remove(&lane) else { return };
        let frame = message.encode(0);
        // Small enough for any transport's buffer; a peer that has gone needs no answer.
        let _ = guest.halves.sender.send(&mut [IoSlice::new(&frame)]);
        // Closing at once could overtake the answer; the peer closes when it has read it.
        self.answered.push_back((Instant::now() + FAREWELL, guest));
        self.close_answered();
    }

    pub(super) fn close_answered(&mut self) {
        let now = Instant::now();
        while self.answered.front().is_some_and(|(due, _)| now >= *due) || self.answered.len() > MAX_PENDING_LANES {
            if let Some((_, guest)) = self.answered.pop_front() {
                guest.halves.closer.close();
            }
        }
    }

    pub(super) fn close_lanes(&mut self) {
        self.messages = None;
        self.generation += 1;
        for closer in self.closers.drain(..) {
            closer.close();
        }
    }

    pub(super) fn spawn(&mut self, role: ThreadRole, work: impl FnOnce() + Send + 'static) -> Result<(), Error> {
        let events = self.events.0.clone();
        let work = move || {
            if catch_unwind(AssertUnwindSafe(work)).is_err() {
                let _ = events.send(DestinationEvent::Panicked(role));
            }
        };
        self.threads.push(self.lent.spawn(role, work)?);
        Ok(())
    }
}
