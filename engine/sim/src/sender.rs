//! The sending threads of both sides, as the drivers run them: one per lane, each doing one thing at
//! a time in the same order of preference, blocked while its lane is full.

use std::collections::VecDeque;
use std::io;
use std::time::Duration;

use pageferry::Error;
use pageferry::encode::EncodedBatch;
use pageferry::limits::HEARTBEAT;
use pageferry::memory::GuestMemory;
use pageferry::transport::{DirectRun, LaneRole};
use pageferry::wire::Message;

use crate::clock::{Event, HostId};
use crate::guest::{SharedGuest, lock};
use crate::network::{End, LaneId};
use crate::world::Context;

/// What a sending thread tells its driver.
pub(crate) enum Said {
    /// The lane has ended the open step.
    Flushed,
    /// The messages have ended and all have left.
    AllSent,
    /// The lane broke.
    Broken(Error),
}

/// What all sending threads of a side share.
#[derive(Default)]
pub(crate) struct Shared {
    /// Encoded batches that wait for a lane.
    pub(crate) ready: VecDeque<EncodedBatch>,
    /// Buffers that wait for a batch: there are only so many.
    pub(crate) free: Vec<EncodedBatch>,
    /// Bytes per second over all lanes.
    pub(crate) bandwidth: Option<u64>,
    pub(crate) paid_until: Duration,
    /// What signs of life tell.
    pub(crate) progress: u64,
    /// Where pages are written that do not travel in frames.
    pub(crate) direct: Option<SharedGuest>,
}

enum State {
    Idle,
    /// The batch is being paid for until the next event.
    Paying,
    /// The lane has taken the frame, but has no room for more.
    Blocked(Frame),
    Gone,
}

/// What was last handed to the lane.
#[derive(Clone, Copy)]
enum Frame {
    Message,
    Pages,
    StepEnd,
}

/// A sending thread.
#[allow(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub(crate) struct Sender {
    host: HostId,
    index: usize,
    end: End,
    pub(crate) lane: LaneId,
    role: LaneRole,
    sequence: u64,
    state: State,
    pub(crate) messages: VecDeque<Message>,
    messages_open: bool,
    orders: VecDeque<u32>,
    orders_open: bool,
    ending: Option<u32>,
    carries_pages: bool,
    /// The batch that it sends.
    batch: Option<EncodedBatch>,
    scheduled: bool,
    idle_since: u64,
}

impl Sender {
    pub(crate) fn new(host: HostId, index: usize, end: End, lane: LaneId, role: LaneRole) -> Self {
        Self {
            host,
            index,
            end,
            lane,
            role,
            sequence: u64::from(role != LaneRole::Control),
            state: State::Idle,
            messages: VecDeque::new(),
            messages_open: role == LaneRole::Control,
            orders: VecDeque::new(),
            orders_open: true,
            ending: None,
            carries_pages: false,
            batch: None,
            scheduled: false,
            idle_since: 0,
        }
    }

    pub(crate) fn carrying_pages(mut self) -> Self {
        self.carries_pages = true;
        self
    }

    pub(crate) fn is_control(&self) -> bool {
        self.role == LaneRole::Control
    }

    pub(crate) fn is_blocked(&self) -> bool {
        matches!(self.state, State::Blocked(_))
    }

    /// Its lane is broken, or all has been sent.
    pub(crate) fn is_gone(&self) -> bool {
        matches!(self.state, State::Gone)
    }

    pub(crate) fn carries_pages(&self) -> bool {
        self.carries_pages
    }

    /// The step's batches were all: send what is left, and say so.
    pub(crate) fn end_step(&mut self, ctx: &mut Context, step: u32) {
        self.orders.push_back(step);
        self.wake(ctx);
    }

    pub(crate) fn send(&mut self, ctx: &mut Context, message: Message) {
        self.messages.push_back(message);
        self.wake(ctx);
    }

    pub(crate) fn close_messages(&mut self, ctx: &mut Context) {
        self.messages_open = false;
        self.wake(ctx);
    }

    pub(crate) fn close_orders(&mut self, ctx: &mut Context) {
        self.orders_open = false;
        self.wake(ctx);
    }

    /// Something may be there to do.
    pub(crate) fn wake(&mut self, ctx: &mut Context) {
        if matches!(self.state, State::Idle | State::Blocked(_)) && !self.scheduled {
            self.scheduled = true;
            let delay = Duration::from_nanos(ctx.clock.random.below(20_000));
            ctx.clock.after(delay, Event::Sender(self.host, self.index));
        }
    }

    /// One step of the thread.
    pub(crate) fn run(&mut self, ctx: &mut Context, shared: &mut Shared) -> Option<Said> {
        self.scheduled = false;
        let result = match std::mem::replace(&mut self.state, State::Idle) {
            State::Gone => {
                self.state = State::Gone;
                return None;
            }
            State::Blocked(frame) => self.look(ctx, shared, frame),
            State::Paying => self.send_pages(ctx, shared),
            State::Idle => return self.begin(ctx, shared),
        };
        self.conclude(ctx, result)
    }

    /// Nothing was sent for long enough.
    pub(crate) fn beat(&mut self, ctx: &mut Context, shared: &mut Shared, since: u64) -> Option<Said> {
        let idle = matches!(self.state, State::Idle) && since == self.idle_since && !self.scheduled;
        if !idle || self.role != LaneRole::Control {
            return None;
        }
        let result = self.write_message(ctx, shared, &Message::Heartbeat { received: shared.progress });
        self.conclude(ctx, result)
    }

    /// Takes the next thing to do, in the order in which the threads prefer them.
    fn begin(&mut self, ctx: &mut Context, shared: &mut Shared) -> Option<Said> {
        self.idle_since += 1;
        if let Some(step) = self.ending {
            return self.go_on_ending(ctx, shared, step);
        }
        if let Some(message) = self.messages.pop_front() {
            let result = self.write_message(ctx, shared, &message);
            return self.conclude(ctx, result);
        }
        if self.role == LaneRole::Control && !self.messages_open {
            self.state = State::Gone;
            return Some(Said::AllSent);
        }
        if let Some(step) = self.orders.pop_front() {
            self.ending = Some(step);
            return self.go_on_ending(ctx, shared, step);
        }
        if !self.orders_open && self.role != LaneRole::Control {
            self.state = State::Gone;
            return None;
        }
        if self.orders_open && self.take_batch(ctx, shared) {
            return None;
        }
        if self.role == LaneRole::Control {
            ctx.clock.after(HEARTBEAT, Event::Heartbeat(self.host, self.index, self.idle_since));
        }
        None
    }

    fn go_on_ending(&mut self, ctx: &mut Context, shared: &mut Shared, step: u32) -> Option<Said> {
        if self.take_batch(ctx, shared) {
            return None;
        }
        let frame = Message::StepEnd { step }.encode(self.sequence);
        let result = self.write(ctx, shared, Frame::StepEnd, frame);
        self.conclude(ctx, result)
    }

    /// Begins with the next batch, if there is one: it leaves when it is paid for.
    fn take_batch(&mut self, ctx: &mut Context, shared: &mut Shared) -> bool {
        if !self.carries_pages {
            return false;
        }
        let Some(batch) = shared.ready.pop_front() else { return false };
        let paid = shared.pay(ctx.clock.now, batch.tally().wire_bytes);
        self.batch = Some(batch);
        self.state = State::Paying;
        self.scheduled = true;
        ctx.clock.at(paid, Event::Sender(self.host, self.index));
        true
    }

    fn send_pages(&mut self, ctx: &mut Context, shared: &mut Shared) -> std::io::Result<Option<Said>> {
        let Some(batch) = &mut self.batch else { return Ok(None) };
        shared.write_pages(batch.written())?;
        let mut frame = Vec::with_capacity(batch.tally().wire_bytes as usize);
        for part in batch.seal(self.sequence) {
            frame.extend_from_slice(&part);
        }
        self.write(ctx, shared, Frame::Pages, frame)
    }

    fn write_message(
        &mut self,
        ctx: &mut Context,
        shared: &mut Shared,
        message: &Message,
    ) -> std::io::Result<Option<Said>> {
        let frame = message.encode(self.sequence);
        self.write(ctx, shared, Frame::Message, frame)
    }

    fn write(
        &mut self,
        ctx: &mut Context,
        shared: &mut Shared,
        what: Frame,
        frame: Vec<u8>,
    ) -> std::io::Result<Option<Said>> {
        ctx.note_frame(self.lane, self.end, &frame);
        let taken = ctx.network.write(&mut ctx.clock, self.lane, self.end, frame)?;
        Ok(self.after_write(ctx, shared, what, taken))
    }

    fn look(&mut self, ctx: &mut Context, shared: &mut Shared, what: Frame) -> std::io::Result<Option<Said>> {
        let taken = ctx.network.is_written(self.lane, self.end)?;
        Ok(self.after_write(ctx, shared, what, taken))
    }

    fn after_write(&mut self, ctx: &mut Context, shared: &mut Shared, what: Frame, taken: bool) -> Option<Said> {
        if !taken {
            self.state = State::Blocked(what);
            return None;
        }
        self.state = State::Idle;
        self.sequence += 1;
        let said = match what {
            Frame::Message => None,
            Frame::Pages => {
                shared.free.extend(self.batch.take());
                None
            }
            Frame::StepEnd => {
                self.ending = None;
                Some(Said::Flushed)
            }
        };
        self.wake(ctx);
        said
    }

    fn conclude(&mut self, ctx: &mut Context, result: std::io::Result<Option<Said>>) -> Option<Said> {
        match result {
            Ok(said) => said,
            Err(source) => {
                self.state = State::Gone;
                let peer = "the peer".to_owned();
                ctx.clock.note("sender", (self.lane, "broken"), || format!("lane {}: {source}", self.lane));
                Some(Said::Broken(Error::LaneBroken { lane: self.role, peer, source }))
            }
        }
    }
}

impl Shared {
    /// What the pages hold now lands in the destination's memory, if that is still exposed.
    fn write_pages(&self, runs: &[DirectRun]) -> io::Result<()> {
        if runs.is_empty() {
            return Ok(());
        }
        let guest = lock(self.direct.as_ref().ok_or(io::ErrorKind::Unsupported)?);
        let to = guest.exposed.as_ref().ok_or(io::ErrorKind::PermissionDenied)?;
        for run in runs {
            let mut bytes = vec![0; run.len as usize];
            guest.source.memory.read(run.region, run.offset, &mut bytes).map_err(io::Error::other)?;
            to.write(run.region, run.offset, &bytes).map_err(io::Error::other)?;
        }
        Ok(())
    }

    /// Books bytes on the common budget; returns when they are paid for.
    fn pay(&mut self, now: Duration, bytes: u64) -> Duration {
        let Some(rate) = self.bandwidth else { return now };
        let span = Duration::from_secs_f64(bytes as f64 / rate as f64);
        self.paid_until = self.paid_until.max(now) + span;
        self.paid_until
    }
}
