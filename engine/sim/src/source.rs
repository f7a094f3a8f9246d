//! The source's driver as one actor: it performs what the real session asks for in the order in which
//! the real driver does, takes one event per turn, and is deaf while a call into the VM lasts.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use pageferry::Error;
use pageferry::batch::{Batch, Planner};
use pageferry::digest::{Digest, DigestKey, HashTable, PageHasher};
use pageferry::dirty::{Accumulator, DirtySink, DirtySource, Point};
use pageferry::encode::{Encoder, Tally, populated_runs};
use pageferry::limits::{FAREWELL, PLANNED_BATCHES_PER_WORKER, STATE_CHUNK};
use pageferry::memory::GuestMemory;
use pageferry::session::{Outcome, SourceAction, SourceInput, SourceSession, SourceSetup};
use pageferry::transport::{LaneRole, TransportError};
use pageferry::vm::{Step, VmResult};
use pageferry::wire::{FrameBuffer, Greeting, GreetingRole, Message, PROTOCOL_MAX, PROTOCOL_MIN, SessionId, WireError};

use crate::clock::{Event, HostId};
use crate::fault::Call;
use crate::guest::{SharedGuest, lock};
use crate::network::{End, LaneId};
use crate::random::Random;
use crate::sender::{Said, Sender, Shared};
use crate::verify;
use crate::vm::Tracker;
use crate::world::Context;

/// How often the driver looks at the clock at least.
const LOOK: Duration = Duration::from_millis(200);

/// What the threads tell the driver.
#[derive(Debug)]
enum Heard {
    Dialled(LaneId),
    DialFailed(Error),
    LanesDialled(Vec<LaneId>),
    /// From a control lane; of one that was replaced it means nothing any more.
    Control(LaneId, ControlHeard),
    DataLaneBroken(Error),
    LaneFlushed(Tally),
    Hashed(Digest),
}

/// What the threads of a control lane tell the driver.
#[derive(Debug)]
enum ControlHeard {
    Message(Message),
    Broken(Error),
    Sent,
}

/// A receiving thread of a control lane.
struct Receiver {
    lane: LaneId,
    next: u64,
    frame: FrameBuffer,
    gone: bool,
}

/// What the user wants, and what the session has heard of it.
#[derive(Default)]
struct Wishes {
    cancel: bool,
    cancel_told: bool,
    switch_over: bool,
    switch_over_told: bool,
    downtime_limit: Option<Duration>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Life {
    Driving,
    Farewell,
    Over,
}

/// What a source is made of.
pub(crate) struct SourceParts {
    pub(crate) id: HostId,
    pub(crate) guest: SharedGuest,
    pub(crate) memory: Arc<dyn GuestMemory>,
    pub(crate) session: SourceSession,
    pub(crate) session_id: SessionId,
    pub(crate) digest_key: DigestKey,
    pub(crate) lanes: u16,
    pub(crate) bandwidth: Option<u64>,
    pub(crate) vm: crate::scenario::VmPlan,
    pub(crate) random: Random,
}

/// A source's process.
pub(crate) struct SourceHost {
    pub(crate) id: HostId,
    guest: SharedGuest,
    memory: Arc<dyn GuestMemory>,
    session: SourceSession,
    session_id: SessionId,
    lanes: u16,
    vm: crate::scenario::VmPlan,
    random: Random,
    started: Duration,
    hasher: PageHasher,
    table: Arc<HashTable>,
    dirty: Accumulator,
    tracker: Tracker,
    shared: Shared,
    senders: Vec<Sender>,
    control: Option<usize>,
    receivers: Vec<Receiver>,
    dialling: Option<(u16, Vec<LaneId>)>,
    inbox: VecDeque<Heard>,
    planner: Option<Planner>,
    planned: Option<Batch>,
    flushing: usize,
    flushed: Tally,
    wishes: Wishes,
    work: Option<(SourceAction, Option<SourceInput>)>,
    life: Life,
    turn_due: bool,
    wait: u64,
    stuck: u32,
}

/// A session for a guest.
pub(crate) fn setup(
    config: &pageferry::SourceConfig,
    guest: &SharedGuest,
    random: &mut Random,
    state_len: usize,
    policy: Box<dyn pageferry::converge::Convergence>,
) -> SourceSetup {
    let (mut session, mut key) = ([0; 16], [0; 32]);
    random.fill(&mut session);
    random.fill(&mut key);
    let guest = lock(guest);
    SourceSetup {
        config: config.clone(),
        session: SessionId(session),
        digest_key: DigestKey(key),
        layout: guest.layout.clone(),
        vm_config: b"simulated guest".to_vec(),
        run: guest.ran,
        state_bytes_estimate: state_len as u64,
        policy,
    }
}

impl SourceHost {
    pub(crate) fn new(parts: SourceParts) -> Self {
        let layout = parts.memory.layout().clone();
        Self {
            id: parts.id,
            session: parts.session,
            session_id: parts.session_id,
            lanes: parts.lanes,
            vm: parts.vm,
            random: parts.random,
            started: Duration::ZERO,
            hasher: PageHasher::new(&parts.digest_key),
            table: Arc::new(HashTable::new(layout.page_space())),
            dirty: Accumulator::new(layout),
            tracker: Tracker(Arc::clone(&parts.guest)),
            shared: Shared { bandwidth: parts.bandwidth, ..Shared::default() },
            guest: parts.guest,
            memory: parts.memory,
            senders: Vec::new(),
            control: None,
            receivers: Vec::new(),
            dialling: None,
            inbox: VecDeque::new(),
            planner: None,
            planned: None,
            flushing: 0,
            flushed: Tally::default(),
            wishes: Wishes::default(),
            work: None,
            life: Life::Driving,
            turn_due: false,
            wait: 0,
            stuck: 0,
        }
    }

    pub(crate) fn start(&mut self, ctx: &mut Context) {
        self.started = ctx.clock.now;
        self.tell(ctx, SourceInput::Tick);
        self.go_on(ctx);
    }

    pub(crate) fn is_over(&self) -> bool {
        self.life == Life::Over
    }

    pub(crate) fn session_id(&self) -> SessionId {
        self.session_id
    }

    pub(crate) fn cancel(&mut self, ctx: &mut Context) {
        self.wishes.cancel = true;
        self.ring(ctx);
    }

    pub(crate) fn switch_over(&mut self, ctx: &mut Context) {
        self.wishes.switch_over = true;
        self.ring(ctx);
    }

    pub(crate) fn limit_downtime(&mut self, ctx: &mut Context, limit: Duration) {
        self.wishes.downtime_limit = Some(limit);
        self.ring(ctx);
    }

    fn ring(&mut self, ctx: &mut Context) {
        if self.life != Life::Over {
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
        self.take_one(ctx);
        self.tell(ctx, SourceInput::Tick);
        self.go_on(ctx);
    }

    /// One of the things that the driver waits for.
    fn take_one(&mut self, ctx: &mut Context) {
        let lane_ready = self.planned.is_some() && self.has_room();
        if lane_ready && (self.inbox.is_empty() || self.random.chance(50)) {
            if let Some(batch) = self.planned.take() {
                self.shared.batches.push_back(batch);
                self.wake_senders(ctx);
            }
        } else if let Some(heard) = self.inbox.pop_front() {
            self.on_event(ctx, heard);
        }
    }

    fn has_room(&self) -> bool {
        self.shared.batches.len() < usize::from(self.lanes.max(1)) * PLANNED_BATCHES_PER_WORKER
    }

    /// Performs actions until there are none, a call takes time, or the session has ended; then waits.
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
            self.hear_user(ctx);
            self.plan(ctx);
            if !self.session.has_actions() {
                return self.await_more(ctx);
            }
        }
    }

    fn await_more(&mut self, ctx: &mut Context) {
        self.wait += 1;
        if !self.inbox.is_empty() || (self.planned.is_some() && self.has_room()) {
            self.turn_soon(ctx);
        }
        let now = ctx.clock.now;
        let deadline = self.session.poll_timeout().map_or(Duration::MAX, |at| self.started.saturating_add(at));
        self.stuck = if deadline <= now { self.stuck + 1 } else { 0 };
        if self.stuck > 3 {
            lock(&self.guest)
                .violate(format!("the source's deadline {deadline:?} is past and a tick does not resolve it"));
        }
        ctx.clock.at(deadline.min(now + LOOK), Event::Timer(self.id, self.wait));
    }

    fn turn_soon(&mut self, ctx: &mut Context) {
        if !std::mem::replace(&mut self.turn_due, true) {
            let delay = Duration::from_nanos(self.random.below(30_000));
            ctx.clock.after(delay, Event::Turn(self.id));
        }
    }

    fn tell(&mut self, ctx: &mut Context, input: SourceInput) {
        if !matches!(input, SourceInput::Tick) {
            let what = std::mem::discriminant(&input);
            ctx.clock.note("source", ("input", what), || crate::trace::shorten(format!("<- {input:?}")));
        }
        self.session.handle(ctx.clock.now.saturating_sub(self.started), input);
    }

    fn tell_result(&mut self, ctx: &mut Context, what: &'static str, result: VmResult<SourceInput>) {
        let input = result.unwrap_or_else(|source| SourceInput::Failed(Error::Vm { what, source }));
        self.tell(ctx, input);
    }

    fn hear_user(&mut self, ctx: &mut Context) {
        if self.wishes.switch_over && !std::mem::replace(&mut self.wishes.switch_over_told, true) {
            self.tell(ctx, SourceInput::SwitchOverNow);
        }
        if let Some(limit) = self.wishes.downtime_limit.take() {
            self.tell(ctx, SourceInput::DowntimeLimit(limit));
        }
        if self.wishes.cancel && !std::mem::replace(&mut self.wishes.cancel_told, true) {
            self.tell(ctx, SourceInput::Cancel);
        }
    }

    fn on_event(&mut self, ctx: &mut Context, heard: Heard) {
        match heard {
            Heard::Dialled(lane) => self.open_control(ctx, lane),
            Heard::DialFailed(error) => self.tell(ctx, SourceInput::LinkLost(error)),
            Heard::LanesDialled(lanes) => self.open_lanes(ctx, lanes),
            Heard::Control(lane, _) if Some(lane) != self.control_lane() => {}
            Heard::Control(_, ControlHeard::Message(message)) => self.tell(ctx, SourceInput::Message(message)),
            Heard::Control(_, ControlHeard::Broken(error)) => self.tell(ctx, SourceInput::LinkLost(error)),
            Heard::Control(_, ControlHeard::Sent) => {}
            Heard::DataLaneBroken(error) => self.tell(ctx, SourceInput::DataLaneLost(error)),
            Heard::LaneFlushed(tally) => self.on_flushed(ctx, &tally),
            Heard::Hashed(digest) => self.tell(ctx, SourceInput::FullDigest(digest)),
        }
    }

    fn control_lane(&self) -> Option<LaneId> {
        self.control.map(|index| self.senders[index].lane)
    }

    // ---- performing ----

    /// Returns `false` when the action takes time.
    fn perform(&mut self, ctx: &mut Context, action: SourceAction) -> bool {
        let what = std::mem::discriminant(&action);
        ctx.clock.note("source", ("action", what), || crate::trace::shorten(format!("-> {action:?}")));
        match action {
            SourceAction::Dial | SourceAction::DialSettle => ctx.dial(self.id, LaneRole::Control),
            SourceAction::Send(message) => self.send(ctx, message),
            SourceAction::OpenLanes(count) => {
                self.dialling = Some((count, Vec::new()));
                self.dial_next(ctx);
            }
            SourceAction::SendRound(round) => {
                self.planner = Some(Planner::new(round));
                self.plan(ctx);
            }
            SourceAction::AbandonRound => self.abandon_round(ctx),
            SourceAction::Acknowledge => self.dirty.acknowledge(),
            SourceAction::FullDigest => ctx.clock.after(verify::time(&self.guest), Event::Verified(self.id)),
            SourceAction::Notify(_) => {}
            action => return self.begin_call(ctx, action),
        }
        true
    }

    fn send(&mut self, ctx: &mut Context, message: Message) {
        if matches!(message, Message::Commit) {
            let mut guest = lock(&self.guest);
            (guest.commit_sent, guest.source.owns) = (true, false);
        }
        if let Some(control) = self.control {
            self.senders[control].send(ctx, message);
        }
    }

    /// A call into the VM. What it does to the guest happens at its end, or at its beginning.
    fn begin_call(&mut self, ctx: &mut Context, action: SourceAction) -> bool {
        let lasts = Duration::from_nanos(self.random.below(self.vm.longest_call.as_nanos() as u64 + 1));
        let early = matches!(action, SourceAction::StartTracking)
            || (matches!(action, SourceAction::Harvest(_)) && self.random.chance(50));
        let result = if early { self.call(ctx, &action) } else { None };
        if early && result.is_none() {
            return true;
        }
        self.work = Some((action, result));
        ctx.clock.after(lasts, Event::Work(self.id));
        false
    }

    pub(crate) fn on_work_done(&mut self, ctx: &mut Context) {
        let Some((action, result)) = self.work.take() else { return };
        let input = match (result, &action) {
            (Some(SourceInput::Tracking { .. }), _) => Some(self.mark_populated()),
            (Some(input), _) => Some(input),
            (None, action) => self.call(ctx, action),
        };
        if let Some(input) = input {
            self.tell(ctx, input);
        }
        self.go_on(ctx);
    }

    fn call(&mut self, ctx: &mut Context, action: &SourceAction) -> Option<SourceInput> {
        match action {
            SourceAction::StartTracking => Some(or_failed("start dirty tracking", self.start_tracking())),
            SourceAction::Harvest(point) => Some(or_failed("report dirty pages", self.harvest(*point))),
            SourceAction::Throttle(percent) => {
                let mut guest = lock(&self.guest);
                if guest.attempt(Call::Throttle).is_ok() || *percent == 0 {
                    guest.source.throttle = *percent;
                }
                None
            }
            SourceAction::Pause => {
                ctx.network.guest_stands = true;
                Some(or_failed("pause the guest", self.pause()))
            }
            SourceAction::Save => Some(or_failed("save the machine state", self.save(ctx))),
            SourceAction::Step(step) => self.step(*step),
            SourceAction::Resume => {
                let result = self.resume(ctx);
                result.err().map(|source| SourceInput::Failed(Error::Vm { what: "resume the guest", source }))
            }
            SourceAction::StopTracking => {
                // The contract says that this may fail without consequences.
                let _ = self.tracker.stop();
                None
            }
            _ => None,
        }
    }

    fn start_tracking(&mut self) -> VmResult<SourceInput> {
        lock(&self.guest).attempt(Call::Begin)?;
        let layout = self.memory.layout().clone();
        self.tracker.start(&layout)?;
        Ok(SourceInput::Tracking { dirty_pages: 0 })
    }

    fn mark_populated(&mut self) -> SourceInput {
        let layout = self.memory.layout().clone();
        for run in populated_runs(&*self.memory, u64::MAX) {
            if let Some((region, first)) = layout.locate_run(run) {
                self.dirty.mark_range(region, first..first + run.count);
            }
        }
        SourceInput::Tracking { dirty_pages: self.dirty.dirty_pages() }
    }

    fn harvest(&mut self, point: Point) -> VmResult<SourceInput> {
        self.tracker.harvest(point, &mut self.dirty)?;
        Ok(SourceInput::Harvested { dirty_pages: self.dirty.dirty_pages() })
    }

    fn pause(&mut self) -> VmResult<SourceInput> {
        let mut guest = lock(&self.guest);
        guest.attempt(Call::Pause)?;
        guest.source.runs = false;
        Ok(SourceInput::Paused)
    }

    fn save(&mut self, ctx: &mut Context) -> VmResult<SourceInput> {
        let state = {
            let mut guest = lock(&self.guest);
            guest.attempt(Call::Save)?;
            guest.write_as_device(self.vm.save_writes);
            state_of(guest.counter, self.vm.state_len)
        };
        for piece in state.chunks(STATE_CHUNK) {
            self.send(ctx, Message::State(piece.to_vec()));
        }
        Ok(SourceInput::Saved { bytes: state.len() as u64 })
    }

    fn step(&mut self, step: Step) -> Option<SourceInput> {
        let mut guest = lock(&self.guest);
        match step {
            Step::BeforeHandover => {
                let result = guest.attempt(Call::BeforeHandover).map(|()| {
                    guest.source.locks = false;
                    SourceInput::StepDone
                });
                Some(or_failed("release the guest's resources", result))
            }
            Step::Aborted => {
                guest.source.locks = true;
                None
            }
            _ => None,
        }
    }

    fn resume(&mut self, ctx: &mut Context) -> VmResult<()> {
        let mut guest = lock(&self.guest);
        guest.attempt(Call::Resume)?;
        guest.resume_source();
        ctx.clock.after(Duration::ZERO, Event::Guest);
        Ok(())
    }

    pub(crate) fn on_verified(&mut self, ctx: &mut Context) {
        let digest = verify::digest(&*self.memory, &self.hasher);
        self.hear(ctx, Heard::Hashed(digest));
    }

    // ---- planning ----

    fn plan(&mut self, ctx: &mut Context) {
        let Some(planner) = &mut self.planner else { return };
        if self.planned.is_some() {
            return;
        }
        let tracker = &mut self.tracker;
        let mut rearm = |region, first, words: &[u64]| tracker.rearm(region, first, words);
        match planner.next_batch(&mut self.dirty, &mut rearm) {
            Ok(Some(batch)) => self.planned = Some(batch),
            Ok(None) => self.end_planning(ctx),
            Err(source) => {
                self.planner = None;
                self.tell_result(ctx, "re-arm dirty tracking", Err(source));
            }
        }
    }

    fn end_planning(&mut self, ctx: &mut Context) {
        self.planner = None;
        let round = self.session.round();
        self.flushed = Tally::default();
        self.flushing = 0;
        for sender in self.senders.iter_mut().filter(|sender| sender.carries_pages()) {
            self.flushing += 1;
            sender.order(ctx, round);
        }
        self.tell(ctx, SourceInput::RoundQueued);
    }

    fn abandon_round(&mut self, ctx: &mut Context) {
        if self.planner.is_none() {
            return;
        }
        let waiting: Vec<Batch> = self.planned.take().into_iter().chain(self.shared.batches.drain(..)).collect();
        for run in waiting.into_iter().flat_map(|batch| batch.runs) {
            self.dirty.give_back(run);
        }
        self.end_planning(ctx);
    }

    fn on_flushed(&mut self, ctx: &mut Context, tally: &Tally) {
        self.flushed.add(tally);
        self.flushing = self.flushing.saturating_sub(1);
        if self.flushing == 0 {
            self.tell(ctx, SourceInput::RoundFlushed(self.flushed));
        }
    }

    // ---- lanes ----

    fn dial_next(&mut self, ctx: &mut Context) {
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

    fn introduce(&mut self, ctx: &mut Context, index: u16, lane: LaneId) {
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

    fn open_control(&mut self, ctx: &mut Context, lane: LaneId) {
        if let Some(before) = self.control {
            self.senders[before].close_messages(ctx);
        }
        let mut sender = Sender::new(self.id, self.senders.len(), End::Source, lane, LaneRole::Control);
        if self.lanes == 0 {
            sender = sender.carrying_pages(self.encoder());
        }
        sender.wake(ctx);
        self.control = Some(self.senders.len());
        self.senders.push(sender);
        self.receivers.push(Receiver { lane, next: 0, frame: FrameBuffer::new(), gone: false });
        ctx.clock.after(Duration::ZERO, Event::Readable(lane, End::Source));
        self.tell(ctx, SourceInput::Dialled { peer: "the destination".to_owned() });
    }

    fn open_lanes(&mut self, ctx: &mut Context, lanes: Vec<LaneId>) {
        for (index, lane) in (0..).zip(lanes) {
            let sender = Sender::new(self.id, self.senders.len(), End::Source, lane, LaneRole::Data(index));
            self.senders.push(sender.carrying_pages(self.encoder()));
        }
        self.tell(ctx, SourceInput::LanesOpen);
    }

    fn encoder(&self) -> Encoder {
        Encoder::new(Arc::clone(&self.memory), self.hasher.clone(), Arc::clone(&self.table))
    }

    // ---- threads ----

    fn hear(&mut self, ctx: &mut Context, heard: Heard) {
        if self.life != Life::Over {
            self.inbox.push_back(heard);
            self.turn_soon(ctx);
        }
    }

    fn wake_senders(&mut self, ctx: &mut Context) {
        for sender in self.senders.iter_mut().filter(|sender| sender.carries_pages()) {
            sender.wake(ctx);
        }
    }

    pub(crate) fn on_sender(&mut self, ctx: &mut Context, index: usize) {
        let room_before = self.has_room();
        let sender = &mut self.senders[index];
        let control = sender.is_control().then_some(sender.lane);
        let said = sender.run(ctx, &mut self.shared);
        self.on_said(ctx, said, control);
        if !room_before && self.has_room() && self.planned.is_some() && self.life == Life::Driving {
            self.turn_soon(ctx);
        }
    }

    pub(crate) fn on_heartbeat(&mut self, ctx: &mut Context, index: usize, since: u64) {
        let sender = &mut self.senders[index];
        let lane = sender.lane;
        let said = sender.beat(ctx, &self.shared, since);
        self.on_said(ctx, said, Some(lane));
    }

    fn on_said(&mut self, ctx: &mut Context, said: Option<Said>, control: Option<LaneId>) {
        let heard = match (said, control) {
            (Some(Said::Flushed(tally)), _) => Heard::LaneFlushed(tally),
            (Some(Said::AllSent), Some(lane)) => Heard::Control(lane, ControlHeard::Sent),
            (Some(Said::Broken(error)), Some(lane)) => Heard::Control(lane, ControlHeard::Broken(error)),
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

    // ---- the end ----

    fn say_farewell(&mut self, ctx: &mut Context) {
        self.life = Life::Farewell;
        let outcome = format!("{:?}", self.session.outcome());
        ctx.clock.note("source", ("outcome", &outcome), || format!("== {outcome}"));
        if matches!(self.session.outcome(), Some(Outcome::SourceOwns(_))) {
            lock(&self.guest).source.owns = true;
        }
        self.shared.bandwidth = None;
        for sender in &mut self.senders {
            sender.close_orders(ctx);
        }
        let Some(control) = self.control else { return self.close(ctx) };
        self.senders[control].close_messages(ctx);
        ctx.clock.after(FAREWELL, Event::Farewell(self.id));
        self.turn_soon(ctx);
    }

    fn hear_farewell(&mut self, ctx: &mut Context) {
        while let Some(heard) = self.inbox.pop_front() {
            let Heard::Control(lane, ControlHeard::Sent | ControlHeard::Broken(_)) = heard else { continue };
            if Some(lane) == self.control_lane() {
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
        ctx.network.close_all_of(&mut ctx.clock, self.id);
    }

    /// How it ended.
    pub(crate) fn outcome(&self) -> Option<&Outcome> {
        self.session.outcome()
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

pub(crate) fn invalid(lane: LaneRole, source: WireError) -> Error {
    Error::InvalidMessage { lane, peer: "the peer".to_owned(), source }
}

pub(crate) fn broken(lane: LaneRole, source: io::Error) -> Error {
    Error::LaneBroken { lane, peer: "the peer".to_owned(), source }
}

fn or_failed(what: &'static str, result: VmResult<SourceInput>) -> SourceInput {
    result.unwrap_or_else(|source| SourceInput::Failed(Error::Vm { what, source }))
}

/// The machine state: the guest's counter, and filling that depends on it.
pub(crate) fn state_of(counter: u64, len: usize) -> Vec<u8> {
    let mut state = counter.to_le_bytes().to_vec();
    let mut filling = vec![0; len];
    Random::new(counter).fill(&mut filling);
    state.extend_from_slice(&filling);
    state
}
