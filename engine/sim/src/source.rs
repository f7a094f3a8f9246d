//! The source's driver as one actor: it performs what the real session asks for in the order in which
//! the real driver does, takes one event per turn, and is deaf while a call into the VM lasts.

mod calls;
mod encoders;
mod lanes;
mod rounds;

pub(crate) use encoders::Encoders;

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use pageferry::Error;
use pageferry::batch::{Batch, Planner};
use pageferry::config::EncodeConfig;
use pageferry::digest::{Digest, DigestKey, HashTable, PageHasher};
use pageferry::dirty::Accumulator;
use pageferry::encode::{EncodedBatch, Tally};
use pageferry::limits::FAREWELL;
use pageferry::memory::GuestMemory;
use pageferry::session::{Outcome, SourceAction, SourceInput, SourceSession, SourceSetup};
use pageferry::transport::LaneRole;
use pageferry::units::PageRun;
use pageferry::vm::VmResult;
use pageferry::wire::{FrameBuffer, Message, SessionId, WireError};

use crate::campaign::Codings;
use crate::clock::{Event, HostId};
use crate::guest::{SharedGuest, lock};
use crate::network::LaneId;
use crate::random::Random;
use crate::scenario::{Canary, EncoderPlan};
use crate::sender::{Sender, Shared};
use crate::verify;
use crate::vm::{Interruption, Tracker};
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
    /// A lane has sent all it has of the open step.
    LaneFlushed,
    /// A batch was encoded, and has gone to the lanes unless nothing of it needs to be sent.
    Encoded(Tally, Vec<PageRun>),
    EncodingFailed(Error),
    Hashed(Digest),
}

/// What the threads of a control lane tell the driver.
#[derive(Debug)]
enum ControlHeard {
    Message(Message),
    /// The receiving half has ended; nothing follows.
    Broken(Error),
    SendFailed(Error),
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
#[allow(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
#[derive(Default)]
struct Wishes {
    cancel: bool,
    cancel_told: bool,
    switch_over: bool,
    switch_over_told: bool,
    downtime_limit: Option<Duration>,
}

/// How far the open step of a round is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// There may be more to plan.
    Planning,
    /// All is planned, not all encoded.
    Encoding,
    /// The lanes were told to end the step.
    Flushing,
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
    pub(crate) interruption: Option<Interruption>,
    pub(crate) session: SourceSession,
    pub(crate) session_id: SessionId,
    pub(crate) digest_key: DigestKey,
    pub(crate) lanes: u16,
    pub(crate) encode: EncodeConfig,
    pub(crate) encoding: EncoderPlan,
    pub(crate) bandwidth: Option<u64>,
    pub(crate) vm: crate::scenario::VmPlan,
    pub(crate) random: Random,
    pub(crate) canary: Option<Canary>,
    /// It can write pages into the destination's memory.
    pub(crate) one_sided: bool,
}

/// A source's process.
pub(crate) struct SourceHost {
    pub(crate) id: HostId,
    guest: SharedGuest,
    memory: Arc<dyn GuestMemory>,
    interruption: Option<Interruption>,
    session: SourceSession,
    session_id: SessionId,
    lanes: u16,
    encode: EncodeConfig,
    encoder_plan: EncoderPlan,
    vm: crate::scenario::VmPlan,
    random: Random,
    canary: Option<Canary>,
    one_sided: bool,
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
    encoders: Option<Encoders>,
    stage: Stage,
    /// Batches that encoders have.
    encoding: usize,
    /// Lanes that have not ended the open step.
    flushing: usize,
    round_tally: Tally,
    pub(crate) codings: Codings,
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
            canary: parts.canary,
            one_sided: parts.one_sided,
            started: Duration::ZERO,
            hasher: PageHasher::new(&parts.digest_key),
            table: Arc::new(HashTable::new(layout.page_space())),
            dirty: Accumulator::new(layout),
            tracker: Tracker(Arc::clone(&parts.guest)),
            shared: Shared {
                bandwidth: parts.bandwidth,
                free: (0..parts.encoding.buffers).map(|_| EncodedBatch::default()).collect(),
                ..Shared::default()
            },
            encode: parts.encode,
            encoder_plan: parts.encoding,
            guest: parts.guest,
            memory: parts.memory,
            interruption: parts.interruption,
            senders: Vec::new(),
            control: None,
            receivers: Vec::new(),
            dialling: None,
            inbox: VecDeque::new(),
            planner: None,
            planned: None,
            encoders: None,
            stage: Stage::Planning,
            encoding: 0,
            flushing: 0,
            round_tally: Tally::default(),
            codings: Codings::default(),
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
        let buffer_free = self.planned.is_some() && !self.shared.free.is_empty();
        if buffer_free && (self.inbox.is_empty() || self.random.chance(50)) {
            self.encode_planned(ctx);
        } else if let Some(heard) = self.inbox.pop_front() {
            self.on_event(ctx, heard);
        }
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
        if !self.inbox.is_empty() || (self.planned.is_some() && !self.shared.free.is_empty()) {
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
            Heard::LanesDialled(lanes) => self.open_lanes(ctx, lanes),
            Heard::Control(lane, _) if Some(lane) != self.control_lane() => {}
            Heard::Control(_, ControlHeard::Message(message)) => self.tell(ctx, SourceInput::Message(message)),
            Heard::DialFailed(error) | Heard::Control(_, ControlHeard::Broken(error)) => {
                self.tell(ctx, SourceInput::LinkLost(error));
            }
            Heard::Control(_, ControlHeard::SendFailed(error)) => {
                self.tell(ctx, SourceInput::ControlSendFailed(error));
            }
            Heard::Control(_, ControlHeard::Sent) => {}
            Heard::DataLaneBroken(error) => self.tell(ctx, SourceInput::DataLaneLost(error)),
            Heard::LaneFlushed => self.on_flushed(ctx),
            Heard::Encoded(tally, deferred) => self.on_encoded(ctx, &tally, &deferred),
            Heard::EncodingFailed(error) => self.tell(ctx, SourceInput::Failed(error)),
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
            SourceAction::OpenLanes { count, exposed } => {
                if exposed && count > 0 && self.one_sided {
                    self.shared.direct = Some(Arc::clone(&self.guest));
                }
                self.dialling = Some((count, Vec::new()));
                self.dial_next(ctx);
            }
            SourceAction::SendRound { round, hold } => {
                let planner = hold.map_or_else(|| Planner::new(round), |hold| Planner::patient(round, hold));
                self.planner = Some(planner);
                self.stage = Stage::Planning;
                self.round_tally = Tally::default();
                self.plan(ctx);
            }
            SourceAction::AbandonRound => self.abandon_round(),
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
        let Some(control) = self.control.filter(|control| !self.senders[*control].is_gone()) else {
            return self.close(ctx);
        };
        self.senders[control].close_messages(ctx);
        ctx.clock.after(FAREWELL, Event::Farewell(self.id));
        self.turn_soon(ctx);
    }

    fn hear_farewell(&mut self, ctx: &mut Context) {
        while let Some(heard) = self.inbox.pop_front() {
            let Heard::Control(lane, heard) = heard else { continue };
            let ended = matches!(heard, ControlHeard::Sent | ControlHeard::SendFailed(_) | ControlHeard::Broken(_));
            if ended && Some(lane) == self.control_lane() {
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

pub(crate) fn invalid(lane: LaneRole, source: WireError) -> Error {
    Error::InvalidMessage { lane, peer: "the peer".to_owned(), source }
}

pub(crate) fn broken(lane: LaneRole, source: io::Error) -> Error {
    Error::LaneBroken { lane, peer: "the peer".to_owned(), source }
}

/// The machine state: the guest's counter, and filling that depends on it.
pub(crate) fn state_of(counter: u64, len: usize) -> Vec<u8> {
    let mut state = counter.to_le_bytes().to_vec();
    let mut filling = vec![0; len];
    Random::new(counter).fill(&mut filling);
    state.extend_from_slice(&filling);
    state
}
