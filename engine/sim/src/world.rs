//! The world: two processes, a guest and a network under one clock, one event at a time.

use std::sync::Arc;
use std::time::Duration;

use pageferry::converge::{Adaptive, Convergence, Decision, Situation};
use pageferry::digest::DigestKey;
use pageferry::memory::GuestMemory;
use pageferry::session::{DestinationSession, DestinationSetup, SourceSession};
use pageferry::stats::RoundReport;
use pageferry::transport::LaneRole;
use pageferry::wire::{Greeting, GreetingRole, HEADER_LEN, Header, Message, PROTOCOL_MAX, SessionId};
use pageferry::{Error, SourceConfig};

use crate::audit::Audit;
use crate::clock::{Clock, Event, HostId};
use crate::destination::{DestinationHost, DestinationParts};
use crate::fault::Fault;
use crate::guest::{SharedGuest, lock};
use crate::network::{End, LaneId, Network, Way};
use crate::random::Random;
use crate::scenario::{Scenario, Visit, VmPlan};
use crate::source::{SourceHost, SourceParts, setup};
use crate::vm::TearingMemory;

/// Longest time of one attempt to connect.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// A process outside the migration.
const STRANGER: HostId = HostId(u32::MAX);

/// What every actor can reach.
pub(crate) struct Context {
    pub(crate) clock: Clock,
    pub(crate) network: Network,
    pub(crate) audit: Audit,
}

impl Context {
    /// Begins to connect.
    pub(crate) fn dial(&mut self, host: HostId, role: LaneRole) {
        let round_trip = self.network.round_trip(role);
        self.clock.after(round_trip, Event::Dial(host, role, self.clock.now));
    }

    pub(crate) fn note_frame(&mut self, lane: LaneId, end: End, frame: &[u8]) {
        if end == End::Source {
            self.audit.see(frame);
        }
        let who = if end == End::Source { "source" } else { "destination" };
        self.clock.note(who, (lane, &frame[4..HEADER_LEN]), || {
            let header = Header::decode(&frame[..HEADER_LEN]);
            let text = header.map(|h| format!("{:?} {} step {}, {} bytes", h.kind, h.sequence, h.step, frame.len()));
            format!("   lane {lane}: {}", text.unwrap_or_else(|error| error.to_string()))
        });
    }
}

/// One run under way.
pub(crate) struct World {
    pub(crate) ctx: Context,
    pub(crate) guest: SharedGuest,
    pub(crate) source: SourceHost,
    /// `None` when it was killed.
    pub(crate) destination: Option<DestinationHost>,
    scenario: Scenario,
    next_host: u32,
    guest_next: Duration,
    guest_steps: u32,
}

impl World {
    pub(crate) fn new(scenario: &Scenario, mut clock: Clock, guest: SharedGuest) -> Self {
        let network = Network::new(scenario.link.clone(), &scenario.faults);
        let random = clock.random.fork(10);
        let source = new_source(scenario, &guest, &scenario.config, HostId(0), random);
        let setup = DestinationSetup { config: scenario.destination_config.clone() };
        let destination = DestinationHost::new(DestinationParts {
            id: HostId(1),
            guest: Arc::clone(&guest),
            session: DestinationSession::new(setup),
            vm: scenario.vm.clone(),
            random: clock.random.fork(11),
            canary: scenario.canary,
            knows_nothing: false,
            one_sided: scenario.one_sided.1,
        });
        let audit = Audit::new(scenario.layout.clone());
        let ctx = Context { clock, network, audit };
        Self {
            ctx,
            guest,
            source,
            destination: Some(destination),
            scenario: scenario.clone(),
            next_host: 2,
            guest_next: Duration::ZERO,
            guest_steps: 0,
        }
    }

    pub(crate) fn start(&mut self) {
        let ctx = &mut self.ctx;
        ctx.network.arm(&mut ctx.clock);
        for (index, (at, _)) in self.scenario.visits.iter().enumerate() {
            ctx.clock.after(*at, Event::Stranger(index));
        }
        ctx.clock.after(Duration::ZERO, Event::Guest);
        if let Some(destination) = &mut self.destination {
            destination.start(ctx);
        }
        self.source.start(ctx);
    }

    /// The source asks again, over a network that works; the destination stands ready if it has to.
    pub(crate) fn settle(&mut self, ready: Option<SessionId>) {
        self.ctx.network.heal(&mut self.ctx.clock);
        let random = self.ctx.clock.random.fork(20);
        let mut setup = self.settle_setup();
        setup.session = self.source.session_id();
        let error = Error::Misuse("the destination did not answer".to_owned());
        let id = self.new_host();
        let parts = SourceParts {
            session_id: setup.session,
            session: SourceSession::settle(setup, error),
            ..source_parts(&self.scenario, &self.guest, id, random)
        };
        self.source = SourceHost::new(parts);
        if let Some(session) = ready {
            let error = Error::NoSource(Duration::ZERO);
            let setup = DestinationSetup { config: self.scenario.destination_config.clone() };
            let random = self.ctx.clock.random.fork(21);
            let mut destination = DestinationHost::new(DestinationParts {
                id: self.new_host(),
                guest: Arc::clone(&self.guest),
                session: DestinationSession::settle(setup, session, error),
                vm: self.scenario.vm.clone(),
                random,
                canary: None,
                knows_nothing: false,
                one_sided: self.scenario.one_sided.1,
            });
            destination.start(&mut self.ctx);
            self.destination = Some(destination);
        }
        self.source.start(&mut self.ctx);
    }

    fn settle_setup(&mut self) -> pageferry::session::SourceSetup {
        let mut random = self.ctx.clock.random.fork(22);
        let mut config = self.scenario.config.clone();
        config.settle_window = Duration::from_secs(30);
        self.scenario.destination_config.settle_window = Duration::from_secs(60);
        setup(&config, &self.guest, &mut random, 0, Box::new(Adaptive::default()))
    }

    fn new_host(&mut self) -> HostId {
        self.next_host += 1;
        HostId(self.next_host)
    }

    /// Handles one event. Returns the first broken rule, if there is one.
    pub(crate) fn step(&mut self) -> Option<String> {
        let event = self.ctx.clock.pop()?;
        self.dispatch(event);
        lock(&self.guest).violation.take().or_else(|| self.ctx.audit.violation.take())
    }

    fn dispatch(&mut self, event: Event) {
        let ctx = &mut self.ctx;
        match event {
            Event::Deliver(lane, way) => ctx.network.deliver(&mut ctx.clock, lane, way),
            Event::Unstall(lane, way) => ctx.network.unstall(&mut ctx.clock, lane, way),
            Event::Notice(lane, end) => ctx.network.notice(&mut ctx.clock, lane, end),
            Event::Readable(lane, end) => self.on_readable(lane, end),
            Event::Writable(lane, end) => self.on_writable(lane, end),
            Event::Dial(host, role, began) => self.on_dial(host, role, began),
            Event::DoorTimeout(lane) => {
                if let Some(destination) = self.destination.as_mut().filter(|host| !host.is_over()) {
                    destination.on_door_timeout(ctx, lane);
                }
            }
            Event::CloseAnswered(lane) => ctx.network.close(&mut ctx.clock, lane, End::Destination),
            Event::Guest => self.on_guest(),
            Event::Fault(index) => self.on_fault(index),
            Event::Stranger(index) => self.on_stranger(index),
            event => self.on_host_event(event),
        }
    }

    fn on_host_event(&mut self, event: Event) {
        let (Event::Turn(host)
        | Event::Timer(host, _)
        | Event::Work(host)
        | Event::Encoder(host, _)
        | Event::Sender(host, _)
        | Event::Heartbeat(host, ..)
        | Event::Receiver(host, _)
        | Event::Verified(host)
        | Event::Farewell(host)) = event
        else {
            return;
        };
        if host == self.source.id && !self.source.is_over() {
            self.on_source_event(event);
        } else if self.destination.as_ref().is_some_and(|destination| destination.id == host && !destination.is_over())
        {
            self.on_destination_event(event);
        }
    }

    fn on_source_event(&mut self, event: Event) {
        let (ctx, source) = (&mut self.ctx, &mut self.source);
        match event {
            Event::Turn(_) => source.on_turn(ctx),
            Event::Timer(_, wait) => source.on_timer(ctx, wait),
            Event::Work(_) => source.on_work_done(ctx),
            Event::Encoder(_, index) => source.on_encoder(ctx, index),
            Event::Sender(_, index) => source.on_sender(ctx, index),
            Event::Heartbeat(_, index, since) => source.on_heartbeat(ctx, index, since),
            Event::Verified(_) => source.on_verified(ctx),
            Event::Farewell(_) => source.on_farewell(ctx),
            _ => {}
        }
    }

    fn on_destination_event(&mut self, event: Event) {
        let Some(destination) = &mut self.destination else { return };
        let ctx = &mut self.ctx;
        match event {
            Event::Turn(_) => destination.on_turn(ctx),
            Event::Timer(_, wait) => destination.on_timer(ctx, wait),
            Event::Work(_) => destination.on_work_done(ctx),
            Event::Sender(_, index) => destination.on_sender(ctx, index),
            Event::Heartbeat(_, index, since) => destination.on_heartbeat(ctx, index, since),
            Event::Receiver(_, index) => destination.on_receiver(ctx, index),
            Event::Verified(_) => destination.on_verified(ctx),
            Event::Farewell(_) => destination.on_farewell(ctx),
            _ => {}
        }
    }

    fn on_readable(&mut self, lane: LaneId, end: End) {
        let host = self.ctx.network.lane(lane).host(end);
        if host == self.source.id {
            self.source.on_readable(&mut self.ctx, lane);
        } else if let Some(destination) = listening(&mut self.destination, host) {
            destination.on_readable(&mut self.ctx, lane);
        }
    }

    fn on_writable(&mut self, lane: LaneId, end: End) {
        let host = self.ctx.network.lane(lane).host(end);
        if host == self.source.id {
            self.source.on_writable(&mut self.ctx, lane);
        } else if let Some(destination) = listening(&mut self.destination, host) {
            destination.on_writable(&mut self.ctx, lane);
        }
    }
}

impl World {
    fn on_dial(&mut self, host: HostId, role: LaneRole, began: Duration) {
        let ctx = &mut self.ctx;
        if host != self.source.id || self.source.is_over() {
            return;
        }
        let now = ctx.clock.now;
        if ctx.network.is_down(now) && !ctx.network.refuses && now < began + DIAL_TIMEOUT {
            let again = ctx.network.down_until().min(began + DIAL_TIMEOUT);
            return ctx.clock.at(again, Event::Dial(host, role, began));
        }
        let listening = self.destination.as_mut().filter(|host| !host.is_over());
        let lane = match listening {
            Some(destination) if !ctx.network.is_down(now) => {
                let lane = ctx.network.open(role, host, destination.id);
                destination.on_arrival(ctx, lane);
                Some(lane)
            }
            _ => None,
        };
        self.source.on_dialled(ctx, role, lane);
    }

    fn on_guest(&mut self) {
        let clock = &mut self.ctx.clock;
        let mut guest = lock(&self.guest);
        if clock.now < self.guest_next || !guest.is_running() {
            return;
        }
        guest.step();
        // A run can last for hours of the guest's time: it tires.
        self.guest_steps += 1;
        let slower = (self.guest_steps / 200).saturating_pow(2).saturating_add(1);
        let interval = self.scenario.pattern.interval.saturating_mul(slower);
        self.guest_next = clock.now + interval;
        clock.at(self.guest_next, Event::Guest);
    }

    fn on_fault(&mut self, index: usize) {
        let Some((fault, lane)) = self.ctx.network.take_fault(index) else { return };
        let ctx = &mut self.ctx;
        ctx.clock.note("fault", index, || format!("{fault:?}"));
        match fault {
            Fault::Cut(cut) => ctx.network.cut(&mut ctx.clock, cut, lane),
            Fault::Stall { scope, out, back, lasts } => {
                let ways: Vec<Way> =
                    [(out, Way::Out), (back, Way::Back)].iter().filter(|way| way.0).map(|way| way.1).collect();
                ctx.network.stall(&mut ctx.clock, scope, &ways, lasts, lane);
            }
            Fault::Kill { restart } => self.kill(restart),
            Fault::CancelSource => self.source.cancel(ctx),
            Fault::SwitchOver => self.source.switch_over(ctx),
            Fault::DowntimeLimit(limit) => self.source.limit_downtime(ctx, limit),
            Fault::CancelDestination => {
                if let Some(destination) = &mut self.destination {
                    destination.cancel(ctx);
                }
            }
            Fault::Flip { .. } | Fault::Truncate { .. } => {}
        }
    }

    fn kill(&mut self, restart: bool) {
        let Some(killed) = self.destination.take() else { return };
        if killed.is_over() {
            // What was to be said has been said; the guest may run there.
            self.destination = Some(killed);
            return;
        }
        lock(&self.guest).destination.dead = true;
        self.ctx.network.close_all_of(&mut self.ctx.clock, killed.id);
        if restart {
            let random = self.ctx.clock.random.fork(30);
            let setup = DestinationSetup { config: self.scenario.destination_config.clone() };
            let mut destination = DestinationHost::new(DestinationParts {
                id: self.new_host(),
                guest: Arc::clone(&self.guest),
                session: DestinationSession::new(setup),
                vm: self.scenario.vm.clone(),
                random,
                canary: None,
                knows_nothing: true,
                one_sided: self.scenario.one_sided.1,
            });
            destination.start(&mut self.ctx);
            self.destination = Some(destination);
        }
    }

    fn on_stranger(&mut self, index: usize) {
        let visit = self.scenario.visits[index].1;
        let Some(destination) = self.destination.as_mut().filter(|host| !host.is_over()) else { return };
        let ctx = &mut self.ctx;
        let lane = ctx.network.open(LaneRole::Control, STRANGER, destination.id);
        destination.on_arrival(ctx, lane);
        let mut random = ctx.clock.random.fork(31);
        let bytes = greeting_of(visit, &mut random);
        ctx.clock.note("stranger", index, || format!("{visit:?}"));
        if !bytes.is_empty() {
            // A stranger does not care.
            let _ = ctx.network.write(&mut ctx.clock, lane, End::Source, bytes);
        }
        if visit == Visit::Leaves {
            ctx.network.close(&mut ctx.clock, lane, End::Source);
        }
    }
}

/// The destination, if it is this process and listens.
fn listening(destination: &mut Option<DestinationHost>, host: HostId) -> Option<&mut DestinationHost> {
    destination.as_mut().filter(|destination| destination.id == host && !destination.is_over())
}

fn greeting_of(visit: Visit, random: &mut Random) -> Vec<u8> {
    let mut session = [0; 16];
    random.fill(&mut session);
    let greeting = |version_max, role| {
        let greeting = Greeting { version_min: version_max, version_max, session: SessionId(session), role };
        Message::Greeting(greeting).encode(0)
    };
    match visit {
        Visit::Silent => Vec::new(),
        Visit::Garbage => {
            let mut bytes = vec![0; 100];
            random.fill(&mut bytes);
            bytes
        }
        Visit::Version => greeting(999, GreetingRole::Control),
        Visit::Leaves | Visit::Waits => greeting(PROTOCOL_MAX, GreetingRole::Control),
        Visit::Unknown(true) => greeting(PROTOCOL_MAX, GreetingRole::Settle),
        Visit::Unknown(false) => greeting(PROTOCOL_MAX, GreetingRole::Data(0)),
    }
}

fn new_source(
    scenario: &Scenario,
    guest: &SharedGuest,
    config: &SourceConfig,
    id: HostId,
    mut random: Random,
) -> SourceHost {
    let policy: Box<dyn Convergence> =
        if scenario.random_policy { Box::new(Whim(random.fork(1))) } else { Box::new(Adaptive::default()) };
    let policy = Box::new(Patience { policy, left: scenario.patience });
    let setup = setup(config, guest, &mut random, scenario.vm.state_len, policy);
    SourceHost::new(SourceParts {
        session_id: setup.session,
        digest_key: setup.digest_key,
        session: SourceSession::new(setup),
        ..source_parts(scenario, guest, id, random)
    })
}

fn source_parts(scenario: &Scenario, guest: &SharedGuest, id: HostId, random: Random) -> SourceParts {
    let mapped = Arc::clone(&lock(guest).source.memory);
    let (memory, interruption): (Arc<dyn GuestMemory>, _) = if scenario.tears {
        let tearing = TearingMemory::new(mapped, Arc::clone(guest), scenario.knows_populated);
        let interruption = tearing.interruption();
        (Arc::new(tearing), Some(interruption))
    } else {
        (mapped, None)
    };
    let setup = setup(&scenario.config, guest, &mut random.clone(), 0, Box::new(Adaptive::default()));
    SourceParts {
        id,
        guest: Arc::clone(guest),
        memory,
        interruption,
        session_id: setup.session,
        session: SourceSession::new(setup),
        digest_key: DigestKey([0; 32]),
        lanes: scenario.config.lanes,
        encode: scenario.config.encode.clone(),
        encoding: scenario.encoding,
        bandwidth: scenario.config.bandwidth,
        vm: VmPlan::clone(&scenario.vm),
        random,
        canary: scenario.canary,
        one_sided: scenario.one_sided.0,
    }
}

/// A policy that comes to an end.
struct Patience {
    policy: Box<dyn Convergence>,
    left: u64,
}

impl Convergence for Patience {
    fn decide(&mut self, round: &RoundReport, situation: &Situation) -> Decision {
        self.left = self.left.saturating_sub(1);
        if self.left == 0 { Decision::SwitchOver } else { self.policy.decide(round, situation) }
    }
}

/// A policy that decides by the toss of a coin: every order of rounds is legal.
struct Whim(Random);

impl Convergence for Whim {
    fn decide(&mut self, _round: &RoundReport, situation: &Situation) -> Decision {
        match self.0.below(10) {
            0..=4 => Decision::SwitchOver,
            5..=6 => Decision::Throttle(self.0.below(u64::from(situation.max_throttle) + 1) as u8),
            _ => Decision::AnotherRound,
        }
    }
}
