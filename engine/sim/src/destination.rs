//! The destination's driver as one actor, with its door, its receiving and its sending threads.

mod calls;
mod lanes;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use pageferry::Error;
use pageferry::digest::Digest;
use pageferry::limits::{FAREWELL, HEARTBEAT};
use pageferry::memory::{Backing, Layout, MappedMemory};
use pageferry::session::{DestinationAction, DestinationInput, DestinationSession, LaneKey, Outcome, Phase};
use pageferry::wire::{FrameBuffer, Greeting, Message, SessionId};

use crate::clock::{Event, HostId};
use crate::guest::{SharedGuest, lock};
use crate::network::{End, LaneId};
use crate::random::Random;
use crate::receiver::{Received, Receiver, Room};
use crate::scenario::{Canary, VmPlan};
use crate::sender::{Sender, Shared};
use crate::verify;
use crate::world::Context;

/// What the threads tell the driver.
#[derive(Debug)]
enum Heard {
    Greeted(LaneId, Greeting),
    /// From a lane of this generation; of an older one it means nothing any more.
    Lane(u64, LaneHeard),
    Hashed(Digest, Duration),
}

/// What the threads of a lane tell the driver.
#[derive(Debug)]
enum LaneHeard {
    Received(Received),
    ControlSendFailed(Error),
    ControlSent,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Life {
    Driving,
    Farewell,
    Over,
}

/// What a destination is made of.
pub(crate) struct DestinationParts {
    pub(crate) id: HostId,
    pub(crate) guest: SharedGuest,
    pub(crate) session: DestinationSession,
    pub(crate) vm: VmPlan,
    pub(crate) random: Random,
    pub(crate) canary: Option<Canary>,
    /// Stands for a process that was started after another died: its VM is no guest of ours.
    pub(crate) knows_nothing: bool,
    /// The source may write into its memory.
    pub(crate) one_sided: bool,
}

/// A destination's process.
#[allow(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub(crate) struct DestinationHost {
    pub(crate) id: HostId,
    guest: SharedGuest,
    session: DestinationSession,
    vm: VmPlan,
    random: Random,
    canary: Option<Canary>,
    knows_nothing: bool,
    one_sided: bool,
    started: Duration,
    inbox: VecDeque<Heard>,
    /// Lanes in the door, and lanes that have introduced themselves.
    door: BTreeMap<LaneId, FrameBuffer>,
    greeted: BTreeSet<LaneId>,
    room: Option<Room>,
    receivers: Vec<Receiver>,
    senders: Vec<Sender>,
    /// Of which generation each sending thread is.
    generations: Vec<u64>,
    shared: Shared,
    control: Option<usize>,
    /// Counts control lanes.
    generation: u64,
    opened: Vec<LaneId>,
    frames_heard: u64,
    progress_heard: u64,
    cancel: bool,
    cancel_told: bool,
    work: Option<DestinationAction>,
    work_began: Duration,
    verify_began: Duration,
    life: Life,
    turn_due: bool,
    wait: u64,
    stuck: u32,
}

impl DestinationHost {
    pub(crate) fn new(parts: DestinationParts) -> Self {
        Self {
            id: parts.id,
            guest: parts.guest,
            session: parts.session,
            vm: parts.vm,
            random: parts.random,
            canary: parts.canary,
            knows_nothing: parts.knows_nothing,
            one_sided: parts.one_sided,
            started: Duration::ZERO,
            inbox: VecDeque::new(),
            door: BTreeMap::new(),
            greeted: BTreeSet::new(),
            room: None,
            receivers: Vec::new(),
            senders: Vec::new(),
            generations: Vec::new(),
            shared: Shared::default(),
            control: None,
            generation: 0,
            opened: Vec::new(),
            frames_heard: 0,
            progress_heard: 0,
            cancel: false,
            cancel_told: false,
            work: None,
            work_began: Duration::ZERO,
            verify_began: Duration::ZERO,
            life: Life::Driving,
            turn_due: false,
            wait: 0,
            stuck: 0,
        }
    }

    pub(crate) fn start(&mut self, ctx: &mut Context) {
        self.started = ctx.clock.now;
        self.go_on(ctx);
    }

    pub(crate) fn is_over(&self) -> bool {
        self.life == Life::Over
    }

    /// Whether it waits for a source and may do so for ever.
    pub(crate) fn is_waiting(&self) -> bool {
        self.life == Life::Driving && self.session.phase() == Phase::Waiting
    }

    pub(crate) fn session_id(&self) -> Option<SessionId> {
        self.session.session()
    }

    pub(crate) fn outcome(&self) -> Option<&Outcome> {
        self.session.outcome()
    }

    /// The session, to be asked after its end.
    pub(crate) fn session_mut(&mut self) -> &mut DestinationSession {
        &mut self.session
    }

    pub(crate) fn cancel(&mut self, ctx: &mut Context) {
        self.cancel = true;
        if self.life == Life::Driving {
            self.turn_soon(ctx);
        }
    }

    // ---- the driver's loop ----

    pub(crate) fn on_turn(&mut self, ctx: &mut Context) {
        self.turn_due = false;
        match self.life {
            Life::Over => {}
            Life::Farewell => self.hear_farewell(ctx),
            Life::Driving if self.work.is_some() => {}
            Life::Driving => self.turn(ctx),
        }
    }

    pub(crate) fn on_timer(&mut self, ctx: &mut Context, wait: u64) {
        if wait == self.wait && self.life == Life::Driving && self.work.is_none() && !self.turn_due {
            self.turn(ctx);
        }
    }

    fn turn(&mut self, ctx: &mut Context) {
        if let Some(heard) = self.inbox.pop_front() {
            self.on_event(ctx, heard);
        }
        self.tell_time(ctx);
        self.go_on(ctx);
    }

    fn tell_time(&mut self, ctx: &mut Context) {
        let frames = self.receivers.iter().map(|receiver| receiver.frames).sum();
        let heard = std::mem::replace(&mut self.frames_heard, frames) != frames;
        let progress = self.shared.progress;
        let progressed = std::mem::replace(&mut self.progress_heard, progress) != progress;
        let input = match (progressed, heard) {
            (true, _) => DestinationInput::Progress,
            (_, true) => DestinationInput::Heard,
            _ => DestinationInput::Tick,
        };
        self.tell(ctx, input);
    }

    fn go_on(&mut self, ctx: &mut Context) {
        loop {
            while let Some(action) = self.session.poll_action() {
                if !self.perform(ctx, action) {
                    return;
                }
            }
            if self.session.outcome().is_some() {
                return self.say_farewell(ctx);
            }
            if !self.cancel || std::mem::replace(&mut self.cancel_told, true) {
                break;
            }
            self.tell(ctx, DestinationInput::Cancel);
        }
        self.await_more(ctx);
    }

    fn await_more(&mut self, ctx: &mut Context) {
        self.wait += 1;
        if !self.inbox.is_empty() {
            self.turn_soon(ctx);
        }
        let now = ctx.clock.now;
        let deadline = self.session.poll_timeout().map_or(Duration::MAX, |at| self.started.saturating_add(at));
        self.stuck = if deadline <= now { self.stuck + 1 } else { 0 };
        if self.stuck > 3 {
            let phase = self.session.phase();
            lock(&self.guest)
                .violate(format!("the destination's deadline in {phase:?} is past and a tick does not resolve it"));
        }
        ctx.clock.at(deadline.min(now + HEARTBEAT), Event::Timer(self.id, self.wait));
    }

    fn turn_soon(&mut self, ctx: &mut Context) {
        if !std::mem::replace(&mut self.turn_due, true) {
            let delay = Duration::from_nanos(self.random.below(30_000));
            ctx.clock.after(delay, Event::Turn(self.id));
        }
    }

    fn tell(&mut self, ctx: &mut Context, input: DestinationInput) {
        if !matches!(input, DestinationInput::Tick | DestinationInput::Heard | DestinationInput::Progress) {
            let what = std::mem::discriminant(&input);
            ctx.clock.note("destination", ("input", what), || crate::trace::shorten(format!("<- {input:?}")));
        }
        self.session.handle(ctx.clock.now.saturating_sub(self.started), input);
    }

    fn on_event(&mut self, ctx: &mut Context, heard: Heard) {
        let input = match heard {
            Heard::Greeted(lane, greeting) => {
                let peer = "the source".to_owned();
                DestinationInput::Greeted { lane: LaneKey(lane as u64), greeting, peer }
            }
            Heard::Lane(generation, _) if generation != self.generation => return,
            Heard::Lane(_, LaneHeard::Received(received)) => input_of(received),
            Heard::Lane(_, LaneHeard::ControlSendFailed(error)) => DestinationInput::ControlSendFailed(error),
            Heard::Lane(_, LaneHeard::ControlSent) => return,
            Heard::Hashed(digest, took) => DestinationInput::Verified { digest, took },
        };
        self.tell(ctx, input);
    }

    // ---- performing ----

    fn perform(&mut self, ctx: &mut Context, action: DestinationAction) -> bool {
        let what = std::mem::discriminant(&action);
        ctx.clock.note("destination", ("action", what), || crate::trace::shorten(format!("-> {action:?}")));
        match action {
            DestinationAction::Adopt(lane, role) => self.adopt(ctx, lane.0 as LaneId, role),
            DestinationAction::Answer(lane, message) => self.answer(ctx, lane.0 as LaneId, &message),
            DestinationAction::Drop(lane) => {
                if self.greeted.remove(&(lane.0 as LaneId)) {
                    ctx.network.close(&mut ctx.clock, lane.0 as LaneId, End::Destination);
                }
            }
            DestinationAction::CloseLanes => self.close_lanes(ctx),
            DestinationAction::Send(message) => self.send(ctx, message),
            DestinationAction::StopPlacing => {
                self.stop_placing();
                self.wake_receivers(ctx);
            }
            DestinationAction::Verify => {
                self.verify_began = ctx.clock.now;
                ctx.clock.after(verify::time(&self.guest), Event::Verified(self.id));
            }
            DestinationAction::AbortVm => self.abort(),
            DestinationAction::Notify(_) => {}
            action
            @ (DestinationAction::MakeRoom(_) | DestinationAction::Load(_) | DestinationAction::Start { .. }) => {
                self.begin_call(ctx, action);
                return false;
            }
        }
        true
    }

    fn stop_placing(&mut self) {
        if let Some(room) = &mut self.room {
            room.closed = true;
            if std::mem::replace(&mut room.exposed, false) {
                lock(&self.guest).exposed = None;
            }
        }
    }

    fn send(&mut self, ctx: &mut Context, message: Message) {
        let prepared = matches!(message, Message::Prepared(_));
        if let Some(control) = self.control {
            self.senders[control].send(ctx, message);
        }
        if prepared && self.canary == Some(Canary::StartsWithoutCommit) {
            // What a broken engine could do.
            let _ = self.commit(ctx, true);
        }
    }

    // ---- the end ----

    fn say_farewell(&mut self, ctx: &mut Context) {
        self.life = Life::Farewell;
        let outcome = format!("{:?}", self.session.outcome());
        ctx.clock.note("destination", ("outcome", &outcome), || format!("== {outcome}"));
        for (lane, _) in std::mem::take(&mut self.door) {
            ctx.network.close(&mut ctx.clock, lane, End::Destination);
        }
        let Some(control) = self.control.take().filter(|control| !self.senders[*control].is_gone()) else {
            return self.close(ctx);
        };
        self.senders[control].close_messages(ctx);
        ctx.clock.after(FAREWELL, Event::Farewell(self.id));
        self.turn_soon(ctx);
    }

    fn hear_farewell(&mut self, ctx: &mut Context) {
        while let Some(heard) = self.inbox.pop_front() {
            let Heard::Lane(generation, heard) = heard else { continue };
            let ended = matches!(
                heard,
                LaneHeard::ControlSent
                    | LaneHeard::ControlSendFailed(_)
                    | LaneHeard::Received(Received::ControlBroken(_))
            );
            if ended && generation == self.generation {
                return self.close(ctx);
            }
        }
    }

    pub(crate) fn on_farewell(&mut self, ctx: &mut Context) {
        if self.life == Life::Farewell {
            self.close(ctx);
        }
    }

    fn close(&mut self, ctx: &mut Context) {
        self.life = Life::Over;
        self.stop_placing();
        self.close_lanes(ctx);
        for lane in std::mem::take(&mut self.greeted) {
            ctx.network.close(&mut ctx.clock, lane, End::Destination);
        }
    }
}

fn input_of(received: Received) -> DestinationInput {
    match received {
        Received::Message(message) => DestinationInput::Message(message),
        Received::RoundComplete(round, digest) => DestinationInput::RoundComplete { round, digest },
        Received::PlacingFailed(error) => DestinationInput::Failed(error),
        Received::ControlBroken(error) => DestinationInput::LinkLost(error),
        Received::DataLaneBroken(error) => DestinationInput::DataLaneLost(error),
    }
}

fn greeting_in(frame: &FrameBuffer) -> Option<Greeting> {
    let first = frame.header().ok()?.sequence == 0;
    match Message::decode(frame) {
        Ok(Message::Greeting(greeting)) if first => Some(greeting),
        _ => None,
    }
}

/// Memory behind memfds: what is populated is exact there, and so the same in every run.
pub(crate) fn fresh_memory(layout: &Layout) -> std::io::Result<MappedMemory> {
    MappedMemory::new(layout.clone(), Backing::Memfd)
}
