//! The destination's door, its lanes, and the threads at them.

use std::time::Duration;

use pageferry::limits::{FAREWELL, GREETING_TIMEOUT};
use pageferry::transport::LaneRole;
use pageferry::wire::{FrameBuffer, GreetingRole, Message};

use super::{DestinationHost, Heard, LaneHeard, Life, greeting_in};
use crate::clock::Event;
use crate::network::{End, LaneId};
use crate::receiver::Receiver;
use crate::sender::{Said, Sender};
use crate::world::Context;

impl DestinationHost {
    // ---- the door ----

    /// Somebody has connected.
    pub(crate) fn on_arrival(&mut self, ctx: &mut Context, lane: LaneId) {
        self.door.insert(lane, FrameBuffer::new());
        ctx.clock.after(GREETING_TIMEOUT, Event::DoorTimeout(lane));
        ctx.clock.after(Duration::ZERO, Event::Readable(lane, End::Destination));
    }

    pub(crate) fn on_door_timeout(&mut self, ctx: &mut Context, lane: LaneId) {
        if self.door.remove(&lane).is_some() {
            ctx.network.close(&mut ctx.clock, lane, End::Destination);
        }
    }

    pub(super) fn hear_greeting(&mut self, ctx: &mut Context, lane: LaneId) {
        let Some(frame) = self.door.get_mut(&lane) else { return };
        let greeting = match ctx.network.read(&mut ctx.clock, lane, End::Destination, frame) {
            Ok(false) => return,
            Ok(true) => greeting_in(frame),
            Err(_) => None,
        };
        self.door.remove(&lane);
        match greeting {
            Some(greeting) => {
                self.greeted.insert(lane);
                self.hear(ctx, Heard::Greeted(lane, greeting));
            }
            None => ctx.network.close(&mut ctx.clock, lane, End::Destination),
        }
    }

    // ---- lanes ----

    pub(super) fn adopt(&mut self, ctx: &mut Context, lane: LaneId, role: GreetingRole) {
        if !self.greeted.remove(&lane) {
            return;
        }
        self.opened.push(lane);
        let role = if let GreetingRole::Data(index) = role { LaneRole::Data(index) } else { LaneRole::Control };
        if role == LaneRole::Control {
            self.generation += 1;
            self.replace_control(ctx);
            let mut sender = Sender::new(self.id, self.senders.len(), End::Destination, lane, role);
            sender.wake(ctx);
            self.control = Some(self.senders.len());
            self.senders.push(sender);
            self.generations.push(self.generation);
        }
        self.receivers.push(Receiver::new(lane, role, self.generation));
        ctx.clock.after(Duration::ZERO, Event::Readable(lane, End::Destination));
    }

    pub(super) fn replace_control(&mut self, ctx: &mut Context) {
        if let Some(control) = self.control.take() {
            self.senders[control].close_messages(ctx);
        }
    }

    pub(super) fn answer(&mut self, ctx: &mut Context, lane: LaneId, message: &Message) {
        if !self.greeted.remove(&lane) {
            return;
        }
        let frame = message.encode(0);
        ctx.note_frame(lane, End::Destination, &frame);
        // A peer that has gone needs no answer.
        let _ = ctx.network.write(&mut ctx.clock, lane, End::Destination, frame);
        ctx.clock.after(FAREWELL, Event::CloseAnswered(lane));
    }

    pub(super) fn close_lanes(&mut self, ctx: &mut Context) {
        self.generation += 1;
        self.replace_control(ctx);
        for lane in self.opened.drain(..) {
            ctx.network.close(&mut ctx.clock, lane, End::Destination);
        }
    }

    // ---- threads ----

    pub(super) fn hear(&mut self, ctx: &mut Context, heard: Heard) {
        if self.life != Life::Over {
            self.inbox.push_back(heard);
            self.turn_soon(ctx);
        }
    }

    pub(crate) fn on_readable(&mut self, ctx: &mut Context, lane: LaneId) {
        if self.door.contains_key(&lane) {
            return self.hear_greeting(ctx, lane);
        }
        let reads = |receiver: &Receiver| receiver.lane == lane && !receiver.gone && !receiver.waits;
        if let Some(index) = self.receivers.iter().position(reads) {
            self.on_receiver(ctx, index);
        }
    }

    pub(crate) fn on_receiver(&mut self, ctx: &mut Context, index: usize) {
        while let Some(received) = self.receivers[index].run(ctx, &mut self.room) {
            let generation = self.receivers[index].generation;
            self.hear(ctx, Heard::Lane(generation, LaneHeard::Received(received)));
        }
        let Some(room) = &mut self.room else { return };
        self.shared.progress = room.progress;
        if std::mem::replace(&mut room.opened, false) {
            self.wake_receivers(ctx);
        }
    }

    /// The barrier has opened.
    pub(super) fn wake_receivers(&mut self, ctx: &mut Context) {
        for (index, _) in self.receivers.iter().enumerate().filter(|(_, receiver)| receiver.waits) {
            let delay = Duration::from_nanos(self.random.below(10_000));
            ctx.clock.after(delay, Event::Receiver(self.id, index));
        }
    }

    pub(crate) fn on_sender(&mut self, ctx: &mut Context, index: usize) {
        let said = self.senders[index].run(ctx, &mut self.shared);
        self.on_said(ctx, index, said);
    }

    pub(crate) fn on_heartbeat(&mut self, ctx: &mut Context, index: usize, since: u64) {
        let said = self.senders[index].beat(ctx, &mut self.shared, since);
        self.on_said(ctx, index, said);
    }

    pub(super) fn on_said(&mut self, ctx: &mut Context, index: usize, said: Option<Said>) {
        let heard = match said {
            Some(Said::AllSent) => LaneHeard::ControlSent,
            Some(Said::Broken(error)) => LaneHeard::ControlSendFailed(error),
            Some(Said::Flushed) | None => return,
        };
        self.hear(ctx, Heard::Lane(self.generations[index], heard));
    }

    pub(crate) fn on_writable(&mut self, ctx: &mut Context, lane: LaneId) {
        for sender in self.senders.iter_mut().filter(|sender| sender.lane == lane && sender.is_blocked()) {
            sender.wake(ctx);
        }
    }
}
