//! The source's lanes and the threads at them: dialling, sending, and hearing the control lane.

use std::io;
use std::time::Duration;

use pageferry::session::SourceInput;
use pageferry::transport::{LaneRole, TransportError};
use pageferry::wire::{FrameBuffer, Greeting, GreetingRole, Message, PROTOCOL_MAX, PROTOCOL_MIN, WireError};

use super::{ControlHeard, Heard, Life, Receiver, SourceHost, broken, invalid};
use crate::clock::Event;
use crate::network::{End, LaneId};
use crate::sender::{Said, Sender};
use crate::world::Context;

impl SourceHost {
    // ---- lanes ----

    pub(super) fn dial_next(&mut self, ctx: &mut Context) {
        let Some((count, lanes)) = &mut self.dialling else { return };
        if lanes.len() < usize::from(*count) {
            let role = LaneRole::Data(lanes.len() as u16);
            return ctx.dial(self.id, role);
        }
        let lanes = std::mem::take(lanes);
        self.dialling = None;
        self.hear(ctx, Heard::LanesDialled(lanes));
    }

    /// A connection attempt has ended.
    pub(crate) fn on_dialled(&mut self, ctx: &mut Context, role: LaneRole, lane: Option<LaneId>) {
        if self.life == Life::Over {
            return;
        }
        let refused = || TransportError::Dial {
            peer: "the destination".to_owned(),
            source: io::ErrorKind::ConnectionRefused.into(),
        };
        match (role, lane) {
            (LaneRole::Control, Some(lane)) => self.hear(ctx, Heard::Dialled(lane)),
            (LaneRole::Data(index), Some(lane)) => self.introduce(ctx, index, lane),
            (_, None) => {
                self.dialling = None;
                self.hear(ctx, Heard::DialFailed(refused().into()));
            }
            _ => {}
        }
    }

    pub(super) fn introduce(&mut self, ctx: &mut Context, index: u16, lane: LaneId) {
        let greeting = Greeting {
            version_min: PROTOCOL_MIN,
            version_max: PROTOCOL_MAX,
            session: self.session_id,
            role: GreetingRole::Data(index),
        };
        let frame = Message::Greeting(greeting).encode(0);
        ctx.note_frame(lane, End::Source, &frame);
        match ctx.network.write(&mut ctx.clock, lane, End::Source, frame) {
            Ok(_) => {
                if let Some((_, lanes)) = &mut self.dialling {
                    lanes.push(lane);
                }
                self.dial_next(ctx);
            }
            Err(source) => {
                self.dialling = None;
                let error = TransportError::Dial { peer: "the destination".to_owned(), source };
                self.hear(ctx, Heard::DialFailed(error.into()));
            }
        }
    }

    pub(super) fn open_control(&mut self, ctx: &mut Context, lane: LaneId) {
        if let Some(before) = self.control {
            self.senders[before].close_messages(ctx);
        }
        let mut sender = Sender::new(self.id, self.senders.len(), End::Source, lane, LaneRole::Control);
        if self.lanes == 0 {
            sender = sender.carrying_pages();
        }
        sender.wake(ctx);
        self.control = Some(self.senders.len());
        self.senders.push(sender);
        self.receivers.push(Receiver { lane, next: 0, frame: FrameBuffer::new(), gone: false });
        ctx.clock.after(Duration::ZERO, Event::Readable(lane, End::Source));
        self.tell(ctx, SourceInput::Dialled { peer: "the destination".to_owned() });
    }

    pub(super) fn open_lanes(&mut self, ctx: &mut Context, lanes: Vec<LaneId>) {
        for (index, lane) in (0..).zip(lanes) {
            let sender = Sender::new(self.id, self.senders.len(), End::Source, lane, LaneRole::Data(index));
            self.senders.push(sender.carrying_pages());
        }
        self.tell(ctx, SourceInput::LanesOpen);
    }

    // ---- threads ----

    pub(super) fn hear(&mut self, ctx: &mut Context, heard: Heard) {
        if self.life != Life::Over {
            self.inbox.push_back(heard);
            self.turn_soon(ctx);
        }
    }

    pub(super) fn wake_senders(&mut self, ctx: &mut Context) {
        for sender in self.senders.iter_mut().filter(|sender| sender.carries_pages()) {
            sender.wake(ctx);
        }
    }

    pub(crate) fn on_sender(&mut self, ctx: &mut Context, index: usize) {
        let sender = &mut self.senders[index];
        let control = sender.is_control().then_some(sender.lane);
        let said = sender.run(ctx, &mut self.shared);
        self.on_said(ctx, said, control);
        self.see_free_buffer(ctx);
    }

    pub(crate) fn on_heartbeat(&mut self, ctx: &mut Context, index: usize, since: u64) {
        let sender = &mut self.senders[index];
        let lane = sender.lane;
        let said = sender.beat(ctx, &mut self.shared, since);
        self.on_said(ctx, said, Some(lane));
    }

    pub(super) fn on_said(&mut self, ctx: &mut Context, said: Option<Said>, control: Option<LaneId>) {
        let heard = match (said, control) {
            (Some(Said::Flushed), _) => Heard::LaneFlushed,
            (Some(Said::AllSent), Some(lane)) => Heard::Control(lane, ControlHeard::Sent),
            (Some(Said::Broken(error)), Some(lane)) => Heard::Control(lane, ControlHeard::SendFailed(error)),
            (Some(Said::Broken(error)), None) => Heard::DataLaneBroken(error),
            _ => return,
        };
        self.hear(ctx, heard);
    }

    pub(crate) fn on_writable(&mut self, ctx: &mut Context, lane: LaneId) {
        for sender in self.senders.iter_mut().filter(|sender| sender.lane == lane && sender.is_blocked()) {
            sender.wake(ctx);
        }
    }

    pub(crate) fn on_readable(&mut self, ctx: &mut Context, lane: LaneId) {
        let Some(receiver) = self.receivers.iter_mut().find(|receiver| receiver.lane == lane && !receiver.gone) else {
            return;
        };
        let mut heard = Vec::new();
        while let Some(message) = receiver.receive(ctx) {
            heard.push(message);
        }
        for heard in heard {
            self.hear(ctx, Heard::Control(lane, heard));
        }
    }
}

impl Receiver {
    fn receive(&mut self, ctx: &mut Context) -> Option<ControlHeard> {
        if self.gone {
            return None;
        }
        let error = match ctx.network.read(&mut ctx.clock, self.lane, End::Source, &mut self.frame) {
            Ok(false) => return None,
            Ok(true) => match self.decode() {
                Ok(message) => return Some(ControlHeard::Message(message)),
                Err(source) => invalid(LaneRole::Control, source),
            },
            Err(source) => broken(LaneRole::Control, source),
        };
        self.gone = true;
        Some(ControlHeard::Broken(error))
    }

    fn decode(&mut self) -> Result<Message, WireError> {
        let found = self.frame.header()?.sequence;
        if found != self.next {
            return Err(WireError::Sequence { expected: self.next, found });
        }
        self.next += 1;
        Message::decode(&self.frame)
    }
}
