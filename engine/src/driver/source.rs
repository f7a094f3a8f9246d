//! The source's driver.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Select, Sender, bounded, unbounded};

use super::lane::{LaneName, NumberedReceiver, NumberedSender};
use super::pace::Pacer;
use super::send::{EndRound, PageDuty, run_control_lane, run_data_lane};
use super::{Counters, Lent, verify};
use crate::batch::{Batch, Planner};
use crate::config::SourceConfig;
use crate::converge::{Adaptive, Convergence};
use crate::digest::{Digest, DigestKey, HashTable, PageHasher};
use crate::dirty::{Accumulator, DirtySink, Point};
use crate::encode::{Encoder, Tally, populated_runs};
use crate::error::{Error, Failed, Unsettled};
use crate::host::{Control, Joiner, Observer, Spawner, ThreadRole};
use crate::limits::{
    EVENT_QUEUE, FAREWELL, MAX_LANES, MAX_STATE, MAX_STATE_PIECES, MIN_BANDWIDTH, PLANNED_BATCHES_PER_WORKER,
    STATE_CHUNK,
};
use crate::memory::{GuestMemory, MemoryError};
use crate::session::{Outcome, SourceAction, SourceInput, SourceSession, SourceSetup};
use crate::stats::{Event, Progress, Report};
use crate::transport::{Dialer, LaneCloser, LaneHalves, LaneRole, TransportError};
use crate::units::PAGE_SIZE;
use crate::vm::{SourceVm, Step};
use crate::wire::{FrameBuffer, Greeting, GreetingRole, Message, PROTOCOL_MAX, PROTOCOL_MIN, SessionId};

/// How often the observer hears of progress.
const PROGRESS: Duration = Duration::from_millis(200);

/// Longest time to open one lane.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// Migrates a guest away.
///
/// ```no_run
/// # fn f(vm: &mut dyn pageferry::SourceVm, dialer: std::sync::Arc<dyn pageferry::transport::Dialer>) {
/// use pageferry::{Control, Source, SourceConfig};
/// match Source::new(SourceConfig::default()).run(vm, dialer, &Control::new()) {
///     Ok(report) => println!("downtime {:?}", report.downtime.total()),
///     Err(failed) => eprintln!("{failed}"),
/// }
/// # }
/// ```
pub struct Source {
    config: SourceConfig,
    policy: Arc<dyn Fn() -> Box<dyn Convergence> + Send + Sync>,
    lent: Lent,
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Source").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Source {
    /// A source with the given choices.
    pub fn new(config: SourceConfig) -> Self {
        Self { config, policy: Arc::new(|| Box::new(Adaptive::default())), lent: Lent::default() }
    }

    /// Tells an observer what happens.
    #[must_use]
    pub fn observer(mut self, observer: Arc<dyn Observer>) -> Self {
        self.lent.observer = Some(observer);
        self
    }

    /// Runs the engine's threads on the host's terms.
    #[must_use]
    pub fn spawner(mut self, spawner: Arc<dyn Spawner>) -> Self {
        self.lent.spawner = spawner;
        self
    }

    /// Decides by another policy when to stop.
    #[must_use]
    pub fn convergence(mut self, policy: impl Fn() -> Box<dyn Convergence> + Send + Sync + 'static) -> Self {
        self.policy = Arc::new(policy);
        self
    }

    /// Migrates the guest. Blocks until it runs at the destination, or until it is certain that it
    /// goes on here, or until [`SourceConfig::settle_window`] has passed without certainty.
    ///
    /// # Errors
    ///
    /// [`Failed`] says who owns the guest.
    pub fn run(&self, vm: &mut dyn SourceVm, dialer: Arc<dyn Dialer>, control: &Control) -> Result<Report, Failed> {
        let setup =
            self.setup(vm, &*dialer).map_err(|error| Failed::SourceStillOwns { error, report: Box::default() })?;
        let digest_key = setup.digest_key;
        let unsettled = Unsettled { session: setup.session, run: setup.run };
        Driver::new(self, vm, dialer, control, SourceSession::new(setup), unsettled, digest_key).drive()
    }

    /// Asks again about a migration that ended [`Failed::Undecided`], for another
    /// [`SourceConfig::settle_window`]. The guest is resumed here only if the destination has given
    /// it up for good.
    ///
    /// # Errors
    ///
    /// As for [`run`](Self::run).
    pub fn settle(
        &self,
        vm: &mut dyn SourceVm,
        dialer: Arc<dyn Dialer>,
        control: &Control,
        unsettled: Unsettled,
    ) -> Result<Report, Failed> {
        let Unsettled { session, run } = unsettled;
        let setup = self.setup_for(vm, session, DigestKey([0; 32]), Vec::new(), run);
        let error = Error::Misuse("the destination did not answer".to_owned());
        let state = SourceSession::settle(setup, error);
        Driver::new(self, vm, dialer, control, state, unsettled, DigestKey([0; 32])).drive()
    }

    fn setup(&self, vm: &mut dyn SourceVm, dialer: &dyn Dialer) -> Result<SourceSetup, Error> {
        self.check_config(dialer)?;
        let mut random = [0; 48];
        getrandom::fill(&mut random)
            .map_err(|error| Error::Host { what: "random numbers", source: io::Error::other(error.to_string()) })?;
        let mut vm_config = Vec::new();
        vm.describe(&mut vm_config).map_err(|source| Error::Vm { what: "describe the guest", source })?;
        if vm_config.len() > crate::limits::MAX_CONFIG {
            let text = format!("the VMM describes the guest in {} bytes; 512 KiB are possible", vm_config.len());
            return Err(Error::Misuse(text));
        }
        let (mut session, mut key) = ([0; 16], [0; 32]);
        session.copy_from_slice(&random[..16]);
        key.copy_from_slice(&random[16..]);
        let run = vm.is_running();
        Ok(self.setup_for(vm, SessionId(session), DigestKey(key), vm_config, run))
    }

    fn check_config(&self, dialer: &dyn Dialer) -> Result<(), Error> {
        // One of the transport's lanes is the control lane.
        let most = MAX_LANES.min(dialer.capabilities().max_lanes.saturating_sub(1));
        if self.config.lanes > most {
            let text = format!("{} lanes asked for; at most {most} are possible", self.config.lanes);
            return Err(Error::Misuse(text));
        }
        match self.config.bandwidth {
            Some(rate) if rate < MIN_BANDWIDTH => {
                let text = format!("a cap of {rate} bytes per second asked for; at least {MIN_BANDWIDTH} are needed");
                Err(Error::Misuse(text))
            }
            _ => Ok(()),
        }
    }

    fn setup_for(
        &self,
        vm: &mut dyn SourceVm,
        session: SessionId,
        digest_key: DigestKey,
        vm_config: Vec<u8>,
        run: bool,
    ) -> SourceSetup {
        SourceSetup {
            config: self.config.clone(),
            session,
            digest_key,
            layout: vm.memory().layout().clone(),
            vm_config,
            run,
            state_bytes_estimate: vm.state_bytes_estimate(),
            policy: (self.policy)(),
        }
    }
}

/// What the threads of a control lane tell the driver.
pub(super) enum ControlEvent {
    Message(Message),
    Broken(Error),
    Sent,
}

/// What the threads tell the driver.
pub(super) enum SourceEvent {
    Dialled(Result<LaneHalves, TransportError>, String),
    LanesDialled(Result<Vec<(LaneHalves, LaneName)>, TransportError>),
    /// From the control lane of this generation; of an older one it means nothing any more.
    Control(u64, ControlEvent),
    DataLaneBroken(Error),
    LaneFlushed(Tally),
    Hashed(Result<Digest, MemoryError>),
    Panicked(ThreadRole),
}

struct Driver<'a> {
    vm: &'a mut dyn SourceVm,
    dialer: Arc<dyn Dialer>,
    control: &'a Control,
    lent: Lent,
    lanes: u16,
    session: SourceSession,
    unsettled: Unsettled,
    memory: Arc<dyn GuestMemory>,
    hasher: PageHasher,
    table: Arc<HashTable>,
    dirty: Accumulator,
    pacer: Arc<Pacer>,
    counters: Arc<Counters>,
    started: Instant,
    events: (Sender<SourceEvent>, Receiver<SourceEvent>),
    batches: (Sender<Batch>, Receiver<Batch>),
    orders: Vec<Sender<EndRound>>,
    messages: Option<Sender<Message>>,
    /// Counts control lanes, so that late words of an older one are not taken for the present one's.
    generation: u64,
    closers: Vec<Arc<dyn LaneCloser>>,
    threads: Vec<Box<dyn Joiner>>,
    over: Arc<AtomicBool>,
    planner: Option<Planner>,
    planned: Option<Batch>,
    flushing: usize,
    flushed: Tally,
    meter: Meter,
    told: Told,
}

/// What the user's wishes were when the session last heard of them.
#[derive(Default)]
struct Told {
    cancel: bool,
    switch_over: bool,
    downtime_limit: Option<Duration>,
}

impl<'a> Driver<'a> {
    fn new(
        source: &Source,
        vm: &'a mut dyn SourceVm,
        dialer: Arc<dyn Dialer>,
        control: &'a Control,
        session: SourceSession,
        unsettled: Unsettled,
        digest_key: DigestKey,
    ) -> Self {
        let memory = vm.memory();
        let layout = memory.layout().clone();
        let workers = usize::from(source.config.lanes.max(1));
        Self {
            vm,
            dialer,
            control,
            lent: source.lent.clone(),
            lanes: source.config.lanes,
            session,
            unsettled,
            hasher: PageHasher::new(&digest_key),
            table: Arc::new(HashTable::new(layout.page_space())),
            dirty: Accumulator::new(layout),
            memory,
            pacer: Arc::new(Pacer::new(source.config.bandwidth)),
            counters: Arc::default(),
            started: Instant::now(),
            events: bounded(EVENT_QUEUE),
            batches: bounded(workers * PLANNED_BATCHES_PER_WORKER),
            orders: Vec::new(),
            messages: None,
            generation: 0,
            closers: Vec::new(),
            threads: Vec::new(),
            over: Arc::default(),
            planner: None,
            planned: None,
            flushing: 0,
            flushed: Tally::default(),
            meter: Meter::default(),
            told: Told::default(),
        }
    }

    fn drive(mut self) -> Result<Report, Failed> {
        self.tell(SourceInput::Tick);
        loop {
            while let Some(action) = self.session.poll_action() {
                self.perform(action);
            }
            if self.session.outcome().is_some() {
                return self.finish();
            }
            self.hear_control();
            self.plan();
            if !self.session.has_actions() {
                self.wait();
                self.tell(SourceInput::Tick);
            }
            self.report_progress();
        }
    }

    fn tell(&mut self, input: SourceInput) {
        self.session.handle(self.started.elapsed(), input);
    }

    fn tell_result(&mut self, what: &'static str, result: crate::vm::VmResult<SourceInput>) {
        let input = result.unwrap_or_else(|source| SourceInput::Failed(Error::Vm { what, source }));
        self.tell(input);
    }

    // ---- waiting ----

    /// Waits until a thread, the user or the clock has something to say, or a lane takes the
    /// planned batch.
    fn wait(&mut self) {
        let now = self.started.elapsed();
        let timeout = self.session.poll_timeout().map_or(PROGRESS, |at| at.saturating_sub(now).min(PROGRESS));
        let (batches, events) = (self.batches.0.clone(), self.events.1.clone());
        let mut select = Select::new();
        let event_ready = select.recv(&events);
        let doorbell = select.recv(self.control.doorbell());
        let lane_ready = self.planned.is_some().then(|| select.send(&batches));
        let Ok(ready) = select.select_timeout(timeout) else { return };
        match ready.index() {
            index if index == event_ready => {
                if let Ok(event) = ready.recv(&events) {
                    self.on_event(event);
                }
            }
            index if index == doorbell => drop(ready.recv(self.control.doorbell())),
            index if Some(index) == lane_ready => {
                if let Some(batch) = self.planned.take() {
                    // This side holds a receiver: the channel is never closed.
                    let _ = ready.send(&batches, batch);
                }
            }
            _ => {}
        }
    }

    fn on_event(&mut self, event: SourceEvent) {
        match event {
            SourceEvent::Dialled(Ok(halves), peer) => self.open_control(halves, peer),
            SourceEvent::Dialled(Err(error), _) | SourceEvent::LanesDialled(Err(error)) => {
                self.tell(SourceInput::LinkLost(error.into()));
            }
            SourceEvent::LanesDialled(Ok(lanes)) => self.open_lanes(lanes),
            SourceEvent::Control(generation, _) if generation != self.generation => {}
            SourceEvent::Control(_, ControlEvent::Message(message)) => self.tell(SourceInput::Message(message)),
            SourceEvent::Control(_, ControlEvent::Broken(error)) => self.tell(SourceInput::LinkLost(error)),
            SourceEvent::Control(_, ControlEvent::Sent) => {}
            // What is wrong with our own memory is no lane's fault.
            SourceEvent::DataLaneBroken(error @ Error::Memory(_)) => self.tell(SourceInput::Failed(error)),
            SourceEvent::DataLaneBroken(error) => self.tell(SourceInput::DataLaneLost(error)),
            SourceEvent::LaneFlushed(tally) => self.on_flushed(&tally),
            SourceEvent::Hashed(Ok(digest)) => self.tell(SourceInput::FullDigest(digest)),
            SourceEvent::Panicked(role) => {
                self.tell(SourceInput::Failed(Error::Bug(format!("the {role:?} thread panicked"))));
            }
            SourceEvent::Hashed(Err(error)) => self.tell(SourceInput::Failed(error.into())),
        }
    }

    fn hear_control(&mut self) {
        if let Some(rate) = self.control.bandwidth() {
            self.pacer.set_rate(rate);
        }
        if let Some(limit) = self.control.downtime_limit().filter(|limit| self.told.downtime_limit != Some(*limit)) {
            self.told.downtime_limit = Some(limit);
            self.tell(SourceInput::DowntimeLimit(limit));
        }
        if self.control.wants_switch_over() && !std::mem::replace(&mut self.told.switch_over, true) {
            self.tell(SourceInput::SwitchOverNow);
        }
        if self.control.is_cancelled() && !std::mem::replace(&mut self.told.cancel, true) {
            self.tell(SourceInput::Cancel);
        }
    }

    // ---- performing ----

    fn perform(&mut self, action: SourceAction) {
        match action {
            SourceAction::Dial | SourceAction::DialSettle => self.dial(),
            SourceAction::Send(message) => {
                if let Some(messages) = &self.messages {
                    // A lane that has ended has said so already.
                    let _ = messages.send(message);
                }
            }
            SourceAction::OpenLanes(count) => self.dial_lanes(count),
            SourceAction::StartTracking => self.start_tracking(),
            SourceAction::SendRound(round) => {
                self.planner = Some(Planner::new(round));
                self.meter.begin_round(round, self.dirty.dirty_pages(), &self.counters);
                self.plan();
            }
            SourceAction::AbandonRound => self.abandon_round(),
            SourceAction::Acknowledge => self.dirty.acknowledge(),
            SourceAction::Harvest(point) => self.harvest(point),
            SourceAction::Throttle(percent) => {
                if self.vm.throttle(percent).is_err() {
                    self.tell(SourceInput::ThrottleRefused);
                }
            }
            SourceAction::Pause => {
                let result = self.vm.pause().map(|()| SourceInput::Paused);
                self.tell_result("pause the guest", result);
            }
            SourceAction::Save => self.save(),
            SourceAction::FullDigest => {
                let events = self.events.0.clone();
                let done = move |result| drop(events.send(SourceEvent::Hashed(result)));
                match verify::start(&self.lent, &self.memory, &self.hasher, &self.counters, &self.over, done) {
                    Ok(threads) => self.threads.extend(threads),
                    Err(error) => self.tell(SourceInput::Failed(error)),
                }
            }
            SourceAction::Step(step) => {
                let result = self.vm.step(step);
                if step == Step::BeforeHandover {
                    self.tell_result("release the guest's resources", result.map(|()| SourceInput::StepDone));
                }
            }
            SourceAction::Resume => {
                if let Err(source) = self.vm.resume() {
                    let what = "resume the guest after the migration failed";
                    self.tell(SourceInput::Failed(Error::Vm { what, source }));
                }
            }
            SourceAction::StopTracking => {
                // The guest runs on, only slower; there is nobody to tell.
                let _ = self.vm.dirty().stop();
            }
            SourceAction::Notify(event) => self.notify(&event),
        }
    }

    fn notify(&mut self, event: &Event) {
        if let Event::RoundFinished(round) = event {
            self.meter.dirty_rate = Some(round.dirty_rate);
        }
        self.lent.notify(event);
    }

    fn start_tracking(&mut self) {
        let layout = self.memory.layout().clone();
        let begun = self.vm.step(Step::Begin).and_then(|()| self.vm.dirty().start(&layout));
        let result = begun.map(|()| {
            // After tracking has started: what is touched from now on is reported.
            for run in populated_runs(&*self.memory, u64::MAX) {
                if let Some((region, first)) = layout.locate_run(run) {
                    self.dirty.mark_range(region, first..first + run.count);
                }
            }
            SourceInput::Tracking { dirty_pages: self.dirty.dirty_pages() }
        });
        self.tell_result("start dirty tracking", result);
    }

    fn harvest(&mut self, point: Point) {
        let result = self.vm.dirty().harvest(point, &mut self.dirty);
        let dirty_pages = self.dirty.dirty_pages();
        self.tell_result("report dirty pages", result.map(|()| SourceInput::Harvested { dirty_pages }));
    }

    fn save(&mut self) {
        let Some(messages) = self.messages.clone() else { return };
        let mut writer = StateWriter { messages, buffer: Vec::new(), bytes: 0, lane_ended: false };
        let saved = self.vm.save(&mut writer).and_then(|()| Ok(writer.send()?));
        if writer.lane_ended {
            // The lane's own end, which is on its way, says why.
            return;
        }
        let bytes = writer.bytes;
        self.tell_result("save the machine state", saved.map(|()| SourceInput::Saved { bytes }));
    }

    // ---- planning ----

    /// Keeps one batch planned while a round is open.
    fn plan(&mut self) {
        let Some(planner) = &mut self.planner else { return };
        if self.planned.is_some() {
            return;
        }
        let tracker = self.vm.dirty();
        let mut rearm = |region, first, words: &[u64]| tracker.rearm(region, first, words);
        match planner.next_batch(&mut self.dirty, &mut rearm) {
            Ok(Some(batch)) => self.planned = Some(batch),
            Ok(None) => self.end_planning(),
            Err(source) => {
                self.planner = None;
                self.tell(SourceInput::Failed(Error::Vm { what: "re-arm dirty tracking", source }));
            }
        }
    }

    fn end_planning(&mut self) {
        self.planner = None;
        let round = self.session.round();
        self.flushing = self.orders.len();
        self.flushed = Tally::default();
        for lane in &self.orders {
            let _ = lane.send(EndRound(round));
        }
        self.tell(SourceInput::RoundQueued);
    }

    fn abandon_round(&mut self) {
        if self.planner.is_none() {
            return;
        }
        let waiting: Vec<Batch> = self.planned.take().into_iter().chain(self.batches.1.try_iter()).collect();
        for run in waiting.into_iter().flat_map(|batch| batch.runs) {
            self.dirty.give_back(run);
        }
        self.end_planning();
    }

    fn on_flushed(&mut self, tally: &Tally) {
        self.flushed.add(tally);
        self.flushing = self.flushing.saturating_sub(1);
        if self.flushing == 0 {
            self.tell(SourceInput::RoundFlushed(self.flushed));
        }
    }

    // ---- lanes ----

    /// Opens a control lane on a thread of its own, so that the user can cancel meanwhile.
    fn dial(&mut self) {
        let (dialer, events) = (Arc::clone(&self.dialer), self.events.0.clone());
        let work = move || {
            let lane = dialer.dial(LaneRole::Control, DIAL_TIMEOUT);
            let peer = lane.as_ref().map_or_else(|_| String::new(), |lane| lane.peer());
            let halves = lane.and_then(|lane| split(lane, &peer));
            let _ = events.send(SourceEvent::Dialled(halves, peer));
        };
        if let Err(error) = self.lent.spawn(ThreadRole::Control, work) {
            self.tell(SourceInput::LinkLost(error));
        }
    }

    fn open_control(&mut self, halves: LaneHalves, peer: String) {
        let name = LaneName { role: LaneRole::Control, peer: peer.clone() };
        let (messages, inbox) = unbounded();
        self.messages = Some(messages);
        self.generation += 1;
        let generation = self.generation;
        self.closers.push(halves.closer);
        let sender = self.numbered(halves.sender, &name, 0);
        let receiver =
            NumberedReceiver { name, receiver: halves.receiver, next: 0, counters: Arc::clone(&self.counters) };
        let duty = (self.lanes == 0).then(|| self.page_duty());
        let events = self.events.0.clone();
        let send = move || {
            let event = match run_control_lane(sender, &inbox, duty) {
                Ok(()) => ControlEvent::Sent,
                Err(error) => ControlEvent::Broken(error),
            };
            let _ = events.send(SourceEvent::Control(generation, event));
        };
        let events = self.events.0.clone();
        let receive = move || receive_messages(receiver, generation, &events);
        let spawned = self.spawn(ThreadRole::Control, send).and_then(|()| self.spawn(ThreadRole::Control, receive));
        self.tell(spawned.map_or_else(SourceInput::Failed, |()| SourceInput::Dialled { peer }));
    }

    fn dial_lanes(&mut self, count: u16) {
        let (dialer, events, session) = (Arc::clone(&self.dialer), self.events.0.clone(), self.unsettled.session);
        let work = move || {
            let lanes = (0..count).map(|index| dial_data_lane(&*dialer, index, session)).collect();
            let _ = events.send(SourceEvent::LanesDialled(lanes));
        };
        if let Err(error) = self.lent.spawn(ThreadRole::Control, work) {
            self.tell(SourceInput::LinkLost(error));
        }
    }

    fn open_lanes(&mut self, lanes: Vec<(LaneHalves, LaneName)>) {
        for (index, (halves, name)) in (0..).zip(lanes) {
            self.closers.push(halves.closer);
            let sender = self.numbered(halves.sender, &name, 1);
            let duty = self.page_duty();
            let receiver = halves.receiver;
            let work = move || {
                run_data_lane(sender, duty);
                // Nothing is received here, but dropping it earlier could close the lane.
                drop(receiver);
            };
            if let Err(error) = self.spawn(ThreadRole::Sender(index), work) {
                return self.tell(SourceInput::Failed(error));
            }
        }
        self.tell(SourceInput::LanesOpen);
    }

    fn page_duty(&mut self) -> PageDuty {
        let (orders, inbox) = unbounded();
        self.orders.push(orders);
        PageDuty {
            batches: self.batches.1.clone(),
            orders: inbox,
            encoder: Encoder::new(Arc::clone(&self.memory), self.hasher.clone(), Arc::clone(&self.table)),
            pacer: Arc::clone(&self.pacer),
            events: self.events.0.clone(),
        }
    }

    fn numbered(
        &self,
        sender: Box<dyn crate::transport::LaneSender>,
        name: &LaneName,
        sequence: u64,
    ) -> NumberedSender {
        NumberedSender { name: name.clone(), sender, sequence, counters: Arc::clone(&self.counters) }
    }

    fn spawn(&mut self, role: ThreadRole, work: impl FnOnce() + Send + 'static) -> Result<(), Error> {
        let events = self.events.0.clone();
        let work = move || {
            if catch_unwind(AssertUnwindSafe(work)).is_err() {
                let _ = events.send(SourceEvent::Panicked(role));
            }
        };
        self.threads.push(self.lent.spawn(role, work)?);
        Ok(())
    }

    // ---- the end ----

    fn report_progress(&mut self) {
        let now = self.started.elapsed();
        if let Some(mut progress) = self.meter.progress(now, &self.counters) {
            progress.round = self.session.round();
            self.lent.notify(&Event::Progress(progress));
        }
    }

    fn finish(mut self) -> Result<Report, Failed> {
        self.say_farewell();
        let total = self.started.elapsed();
        let (outcome, mut report) = self.session.into_parts();
        report.total = total;
        report.wire_bytes = Counters::read(&self.counters.wire_bytes);
        report.pages_zero = Counters::read(&self.counters.zero_pages);
        report.pages_sent = Counters::read(&self.counters.pages) - report.pages_zero;
        report.session = Some(self.unsettled.session);
        let unsettled = self.unsettled;
        let boxed = |report| Box::new(report);
        match outcome {
            Some(Outcome::HandedOver) => Ok(report),
            Some(Outcome::SourceOwns(error)) => Err(Failed::SourceStillOwns { error, report: boxed(report) }),
            Some(Outcome::DestinationOwns(error)) => Err(Failed::DestinationOwns { error, report: boxed(report) }),
            Some(Outcome::Undecided(error)) => Err(Failed::Undecided { unsettled, error, report: boxed(report) }),
            None => {
                let error = Error::Bug("the source session ended without an outcome".to_owned());
                Err(Failed::Undecided { unsettled, error, report: boxed(report) })
            }
        }
    }

    /// Lets the last message leave, then ends all lanes and threads.
    fn say_farewell(&mut self) {
        self.pacer.close();
        self.over.store(true, Ordering::Relaxed);
        self.orders.clear();
        if self.messages.take().is_some() {
            let deadline = Instant::now() + FAREWELL;
            while let Ok(event) = self.events.1.recv_deadline(deadline) {
                let ended = matches!(event, SourceEvent::Control(generation, ControlEvent::Sent | ControlEvent::Broken(_)) if generation == self.generation);
                if ended {
                    break;
                }
            }
        }
        for closer in &self.closers {
            closer.close();
        }
        // A thread that waits to be heard must not wait for ever.
        self.events = bounded(0);
        for thread in self.threads.drain(..) {
            thread.join();
        }
    }
}

fn split(lane: Box<dyn crate::transport::Lane>, peer: &str) -> Result<LaneHalves, TransportError> {
    lane.split().map_err(|source| TransportError::Dial { peer: peer.to_owned(), source })
}

/// Opens a data lane and introduces it.
fn dial_data_lane(
    dialer: &dyn Dialer,
    index: u16,
    session: SessionId,
) -> Result<(LaneHalves, LaneName), TransportError> {
    let role = LaneRole::Data(index);
    let lane = dialer.dial(role, DIAL_TIMEOUT)?;
    let peer = lane.peer();
    let mut halves = split(lane, &peer)?;
    let greeting =
        Greeting { version_min: PROTOCOL_MIN, version_max: PROTOCOL_MAX, session, role: GreetingRole::Data(index) };
    let frame = Message::Greeting(greeting).encode(0);
    halves
        .sender
        .send(&mut [io::IoSlice::new(&frame)])
        .map_err(|source| TransportError::Dial { peer: peer.clone(), source })?;
    Ok((halves, LaneName { role, peer }))
}

fn receive_messages(mut lane: NumberedReceiver, generation: u64, events: &Sender<SourceEvent>) {
    let mut frame = FrameBuffer::new();
    loop {
        let message =
            lane.receive(&mut frame).and_then(|()| Message::decode(&frame).map_err(|source| lane.name.invalid(source)));
        let event = match message {
            Ok(message) => ControlEvent::Message(message),
            Err(error) => ControlEvent::Broken(error),
        };
        let last = matches!(event, ControlEvent::Broken(_));
        if events.send(SourceEvent::Control(generation, event)).is_err() || last {
            return;
        }
    }
}

/// Cuts the machine state into frames as it is written.
struct StateWriter {
    messages: Sender<Message>,
    buffer: Vec<u8>,
    bytes: u64,
    lane_ended: bool,
}

impl StateWriter {
    fn send(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        // The lane's own end wakes nobody here: a lane that is stuck ends after the peer timeout.
        while self.messages.len() > MAX_STATE_PIECES {
            std::thread::sleep(Duration::from_millis(1));
        }
        let piece = std::mem::take(&mut self.buffer);
        self.messages.send(Message::State(piece)).map_err(|_| {
            self.lane_ended = true;
            io::ErrorKind::BrokenPipe.into()
        })
    }
}

impl io::Write for StateWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(STATE_CHUNK - self.buffer.len());
        if self.bytes + taken as u64 > MAX_STATE {
            return Err(io::Error::other(format!("the machine state is over the limit of {MAX_STATE} bytes")));
        }
        self.buffer.extend_from_slice(&bytes[..taken]);
        self.bytes += taken as u64;
        if self.buffer.len() == STATE_CHUNK {
            self.send()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Turns counters into rates for the observer.
#[derive(Default)]
struct Meter {
    round_pages: u64,
    round_base: u64,
    dirty_rate: Option<f64>,
    last: Option<(Duration, u64)>,
    wire_rate: f64,
    covered_rate: f64,
    last_covered: u64,
}

impl Meter {
    fn begin_round(&mut self, _round: u32, pages: u64, counters: &Counters) {
        self.round_pages = pages;
        self.round_base = Counters::read(&counters.pages);
    }

    /// A progress report, if one is due.
    fn progress(&mut self, now: Duration, counters: &Counters) -> Option<Progress> {
        let wire_bytes = Counters::read(&counters.wire_bytes);
        let pages = Counters::read(&counters.pages);
        let (last, last_bytes) = *self.last.get_or_insert((now, wire_bytes));
        let interval = now.saturating_sub(last);
        if interval < PROGRESS {
            return None;
        }
        let seconds = interval.as_secs_f64();
        let smooth = |old: f64, new: f64| if old == 0.0 { new } else { old * 0.7 + new * 0.3 };
        self.wire_rate = smooth(self.wire_rate, (wire_bytes - last_bytes) as f64 / seconds);
        self.covered_rate = smooth(self.covered_rate, (pages - self.last_covered) as f64 / seconds);
        self.last = Some((now, wire_bytes));
        self.last_covered = pages;
        let remaining_pages = self.round_pages.saturating_sub(pages - self.round_base);
        Some(Progress {
            round: 0,
            round_pages: self.round_pages,
            remaining_pages,
            wire_bytes,
            guest_bytes: pages * PAGE_SIZE as u64,
            wire_rate: self.wire_rate,
            dirty_rate: self.dirty_rate,
            elapsed: now,
            remaining: self.remaining(remaining_pages),
        })
    }

    /// The rounds still to come shrink geometrically by dirty rate over covered rate.
    fn remaining(&self, remaining_pages: u64) -> Option<Duration> {
        let dirtied = self.dirty_rate.unwrap_or(0.0) / PAGE_SIZE as f64;
        let net = self.covered_rate - dirtied;
        (net > 0.0).then(|| Duration::from_secs_f64((remaining_pages as f64 / net).min(1e7)))
    }
}
