//! Performs what the source session asks for, and tells it what happened.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Select, Sender, bounded, unbounded};

use super::super::pace::Pacer;
use super::super::send::EndStep;
use super::super::{Counters, Lent, verify};
use super::encoders::{EncoderParts, Encoders, Pipeline};
use super::meter::{Meter, PROGRESS};
use super::state_writer::StateWriter;
use super::steps::Stage;
use super::{ControlEvent, Source, SourceEvent};
use crate::batch::{Batch, Planner};
use crate::config::SourceConfig;
use crate::digest::{DigestKey, HashTable, PageHasher};
use crate::dirty::{Accumulator, DirtySink, Point};
use crate::encode::{Shared, Tally, populated_runs};
use crate::error::{Error, Failed, Unsettled};
use crate::host::{Control, Joiner};
use crate::limits::{FAREWELL, STATE_CHUNK};
use crate::memory::GuestMemory;
use crate::session::{Outcome, SourceAction, SourceInput, SourceSession};
use crate::stats::{Event, Report, Stages};
use crate::transport::{Dialer, LaneCloser};
use crate::vm::{SourceVm, Step};
use crate::wire::Message;

pub(super) struct Driver<'a> {
    pub(super) vm: &'a mut dyn SourceVm,
    pub(super) dialer: Arc<dyn Dialer>,
    pub(super) control: &'a Control,
    pub(super) lent: Lent,
    pub(super) lanes: u16,
    pub(super) session: SourceSession,
    pub(super) unsettled: Unsettled,
    pub(super) memory: Arc<dyn GuestMemory>,
    pub(super) hasher: PageHasher,
    pub(super) table: Arc<HashTable>,
    pub(super) dirty: Accumulator,
    pub(super) pacer: Arc<Pacer>,
    pub(super) counters: Arc<Counters>,
    pub(super) started: Instant,
    /// What threads have to say never waits, or a lane could wait for the driver while it waits for the
    /// lane. There is little of it; the peer's share is bounded where it is received.
    pub(super) events: (Sender<SourceEvent>, Receiver<SourceEvent>),
    pub(super) config: SourceConfig,
    pub(super) pipeline: Pipeline,
    pub(super) encoders: Option<Encoders>,
    pub(super) shared: Option<Arc<Shared>>,
    pub(super) orders: Vec<Sender<EndStep>>,
    pub(super) messages: Option<Sender<Message>>,
    /// Counts control lanes, so that late words of an older one are not taken for the present one's.
    pub(super) generation: u64,
    pub(super) closers: Vec<Arc<dyn LaneCloser>>,
    pub(super) threads: Vec<Box<dyn Joiner>>,
    pub(super) over: Arc<AtomicBool>,
    pub(super) planner: Option<Planner>,
    pub(super) planned: Option<Batch>,
    pub(super) stage: Stage,
    /// Batches that encoders have.
    pub(super) encoding: usize,
    /// Lanes that have not ended the open step.
    pub(super) flushing: usize,
    pub(super) round_tally: Tally,
    pub(super) stages: Stages,
    pub(super) meter: Meter,
    pub(super) told: Told,
}

/// What the user's wishes were when the session last heard of them.
#[derive(Default)]
pub(super) struct Told {
    pub(super) cancel: bool,
    pub(super) switch_over: bool,
    pub(super) downtime_limit: Option<Duration>,
}

impl<'a> Driver<'a> {
    pub(super) fn new(
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
            events: unbounded(),
            config: source.config.clone(),
            pipeline: Pipeline::new(&source.config),
            encoders: None,
            shared: None,
            orders: Vec::new(),
            messages: None,
            generation: 0,
            closers: Vec::new(),
            threads: Vec::new(),
            over: Arc::default(),
            planner: None,
            planned: None,
            stage: Stage::default(),
            encoding: 0,
            flushing: 0,
            round_tally: Tally::default(),
            stages: Stages::default(),
            meter: Meter::default(),
            told: Told::default(),
        }
    }

    /// A panic of the VMM goes on to whoever called, but leaves no threads.
    pub(super) fn drive(mut self) -> Result<Report, Failed> {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.go_on())) {
            self.let_go();
            resume_unwind(panic)
        }
        self.finish()
    }

    /// Works until the session has ended.
    fn go_on(&mut self) {
        self.tell(SourceInput::Tick);
        loop {
            while let Some(action) = self.session.poll_action() {
                self.perform(action);
            }
            if self.session.outcome().is_some() {
                return;
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

    pub(super) fn tell(&mut self, input: SourceInput) {
        self.session.handle(self.started.elapsed(), input);
    }

    pub(super) fn tell_result(&mut self, what: &'static str, result: crate::vm::VmResult<SourceInput>) {
        let input = result.unwrap_or_else(|source| SourceInput::Failed(Error::Vm { what, source }));
        self.tell(input);
    }

    // ---- waiting ----

    /// Waits until a thread, the user or the clock has something to say, or there is a buffer for the
    /// planned batch.
    pub(super) fn wait(&mut self) {
        let now = self.started.elapsed();
        let timeout = self.session.poll_timeout().map_or(PROGRESS, |at| at.saturating_sub(now).min(PROGRESS));
        let (free, events) = (self.pipeline.free.1.clone(), self.events.1.clone());
        let mut select = Select::new();
        let event_ready = select.recv(&events);
        let doorbell = select.recv(self.control.doorbell());
        let buffer_free = self.planned.is_some().then(|| select.recv(&free));
        let Ok(ready) = select.select_timeout(timeout) else { return };
        match ready.index() {
            index if index == event_ready => {
                if let Ok(event) = ready.recv(&events) {
                    self.on_event(event);
                }
            }
            index if index == doorbell => drop(ready.recv(self.control.doorbell())),
            index if Some(index) == buffer_free => {
                if let Ok(buffer) = ready.recv(&free) {
                    self.encode(buffer);
                }
            }
            _ => {}
        }
    }

    pub(super) fn on_event(&mut self, event: SourceEvent) {
        match event {
            SourceEvent::Dialled(Ok(halves), peer) => self.open_control(halves, peer),
            SourceEvent::Dialled(Err(error), _) | SourceEvent::LanesDialled(Err(error)) => {
                self.tell(SourceInput::LinkLost(error.into()));
            }
            SourceEvent::LanesDialled(Ok(lanes)) => self.open_lanes(lanes),
            SourceEvent::Control(generation, _) if generation != self.generation => {}
            SourceEvent::Control(_, ControlEvent::Message(message)) => self.tell(SourceInput::Message(message)),
            SourceEvent::Control(_, ControlEvent::Broken(error)) => self.tell(SourceInput::LinkLost(error)),
            SourceEvent::Control(_, ControlEvent::SendFailed(error)) => {
                // Nobody is left to wait for.
                self.messages = None;
                self.tell(match error {
                    Error::Memory(_) => SourceInput::Failed(error),
                    error => SourceInput::ControlSendFailed(error),
                });
            }
            SourceEvent::Control(_, ControlEvent::Sent) => {}
            SourceEvent::DataLaneBroken(error) => self.tell(SourceInput::DataLaneLost(error)),
            SourceEvent::LaneFlushed => self.on_flushed(),
            SourceEvent::Encoded(encoded) => self.on_encoded(&encoded),
            SourceEvent::EncodingFailed(error) => self.tell(SourceInput::Failed(error)),
            SourceEvent::Hashed(Ok(digest)) => self.tell(SourceInput::FullDigest(digest)),
            SourceEvent::Panicked(role) => {
                self.tell(SourceInput::Failed(Error::Bug(format!("the {role:?} thread panicked"))));
            }
            SourceEvent::Hashed(Err(error)) => self.tell(SourceInput::Failed(error.into())),
        }
    }

    pub(super) fn hear_control(&mut self) {
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

    pub(super) fn perform(&mut self, action: SourceAction) {
        match action {
            SourceAction::Dial | SourceAction::DialSettle => self.dial(),
            SourceAction::Send(message) => {
                if let Some(messages) = &self.messages {
                    // A lane that has ended has said so already.
                    let _ = messages.send(message);
                }
            }
            SourceAction::OpenLanes { count, exposed } => self.dial_lanes(count, exposed),
            SourceAction::StartTracking => self.start_tracking(),
            SourceAction::SendRound { round, hold } => {
                let planner = hold.map_or_else(|| Planner::new(round), |hold| Planner::patient(round, hold));
                self.planner = Some(planner);
                self.stage = Stage::Planning;
                self.round_tally = Tally::default();
                self.meter.begin_round(round, self.dirty.dirty_pages(), &self.counters);
                self.plan();
            }
            SourceAction::AbandonRound => self.abandon_round(),
            SourceAction::Acknowledge => self.dirty.acknowledge(),
            SourceAction::Harvest(point) => self.harvest(point),
            SourceAction::Throttle(percent) => {
                let throttled = self.vm.throttle(percent);
                self.tell(throttled.map_or(SourceInput::ThrottleRefused, |()| SourceInput::Throttled));
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

    pub(super) fn notify(&mut self, event: &Event) {
        if let Event::RoundFinished(round) = event {
            self.meter.dirty_rate = Some(round.dirty_rate);
        }
        self.lent.notify(event);
    }

    pub(super) fn start_tracking(&mut self) {
        let layout = self.memory.layout().clone();
        let begun = self.vm.step(Step::Begin).and_then(|()| self.vm.dirty().start(&layout));
        let marked = begun.map(|()| {
            // After tracking has started: what is touched from now on is reported.
            for run in populated_runs(&*self.memory, u64::MAX) {
                if let Some((region, first)) = layout.locate_run(run) {
                    self.dirty.mark_range(region, first..first + run.count);
                }
            }
        });
        // What may hold content was not written just now.
        self.dirty.take_writes();
        let dirty_pages = self.dirty.dirty_pages();
        let started = marked.is_err() || self.start_encoders(dirty_pages);
        if started {
            self.tell_result("start dirty tracking", marked.map(|()| SourceInput::Tracking { dirty_pages }));
        }
    }

    /// Starts the encoders of a guest with so many pages of content; `false` if that failed and was told.
    fn start_encoders(&mut self, pages: u64) -> bool {
        let shared = Shared::new(Arc::clone(&self.table), pages, &self.config.encode);
        let shared = Arc::new(shared.with_given_back(self.dirty.given_back()));
        let parts = EncoderParts {
            memory: Arc::clone(&self.memory),
            hasher: self.hasher.clone(),
            shared: Arc::clone(&shared),
            counters: Arc::clone(&self.counters),
            events: self.events.0.clone(),
            over: Arc::clone(&self.over),
        };
        match Encoders::start(&self.config, &self.lent, &self.pipeline, parts) {
            Ok((encoders, threads)) => {
                self.threads.extend(threads);
                (self.encoders, self.shared) = (Some(encoders), Some(shared));
                true
            }
            Err(error) => {
                self.tell(SourceInput::Failed(error));
                false
            }
        }
    }

    pub(super) fn harvest(&mut self, point: Point) {
        let mut result = self.vm.dirty().harvest(point, &mut self.dirty);
        if let (Ok(()), Some(planner)) = (&result, &mut self.planner) {
            let tracker = self.vm.dirty();
            let mut rearm = |region, first, words: &[u64]| tracker.rearm(region, first, words);
            result = planner.watch_ahead(&mut self.dirty, &mut rearm);
        }
        let (dirty_pages, writes) = (self.dirty.dirty_pages(), self.dirty.take_writes());
        if let Some(shared) = &self.shared {
            shared.bases.note_dirty(|page| self.dirty.dirty().contains(page));
        }
        self.tell_result("report dirty pages", result.map(|()| SourceInput::Harvested { dirty_pages, writes }));
    }

    pub(super) fn save(&mut self) {
        let Some(messages) = self.messages.clone() else { return };
        let patience = self.session.patience(self.started.elapsed());
        let per_piece = self.session.patience_for(STATE_CHUNK as u64);
        let mut writer = StateWriter::new(messages, self.control.clone(), patience, per_piece);
        let saved = self.vm.save(&mut writer).and_then(|()| Ok(writer.send()?));
        if writer.overtaken {
            return;
        }
        let (bytes, waited) = (writer.bytes, writer.waited);
        self.tell_result("save the machine state", saved.map(|()| SourceInput::Saved { bytes, waited }));
    }

    // ---- the end ----

    pub(super) fn report_progress(&mut self) {
        let now = self.started.elapsed();
        if let Some(mut progress) = self.meter.progress(now, &self.counters) {
            progress.round = self.session.round();
            self.lent.notify(&Event::Progress(progress));
        }
    }

    pub(super) fn finish(mut self) -> Result<Report, Failed> {
        self.say_farewell();
        let total = self.started.elapsed();
        let (outcome, mut report) = self.session.into_parts();
        report.total = total;
        report.wire_bytes = Counters::read(&self.counters.wire_bytes);
        report.stages = self.stages;
        report.pages_zero = self.stages.zero_pages;
        report.pages_sent = self.stages.pages() - self.stages.zero_pages - self.stages.unchanged_pages;
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
    pub(super) fn say_farewell(&mut self) {
        self.pacer.close();
        self.over.store(true, Ordering::Relaxed);
        self.orders.clear();
        if self.messages.take().is_some() {
            let deadline = Instant::now() + FAREWELL;
            while let Ok(event) = self.events.1.recv_deadline(deadline) {
                let SourceEvent::Control(generation, event) = event else { continue };
                let ended = matches!(event, ControlEvent::Sent | ControlEvent::SendFailed(_) | ControlEvent::Broken(_));
                if ended && generation == self.generation {
                    break;
                }
            }
        }
        self.let_go();
    }

    /// Ends lanes and threads, whatever they are at.
    fn let_go(&mut self) {
        self.pacer.close();
        self.over.store(true, Ordering::Relaxed);
        self.orders.clear();
        self.messages = None;
        for closer in &self.closers {
            closer.close();
        }
        // A thread that waits to be heard must not wait for ever.
        self.events = bounded(0);
        self.encoders = None;
        for thread in self.threads.drain(..) {
            thread.join();
        }
    }
}
