//! Performs what the source session asks for, and tells it what happened.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Select, Sender, bounded};

use super::super::pace::Pacer;
use super::super::send::EndRound;
use super::super::{Counters, Lent, verify};
use super::meter::{Meter, PROGRESS};
use super::state_writer::StateWriter;
use super::{ControlEvent, Source, SourceEvent};
use crate::batch::{Batch, Planner};
use crate::digest::{DigestKey, HashTable, PageHasher};
use crate::dirty::{Accumulator, DirtySink, Point};
use crate::encode::{Tally, populated_runs};
use crate::error::{Error, Failed, Unsettled};
use crate::host::{Control, Joiner};
use crate::limits::{EVENT_QUEUE, FAREWELL, PLANNED_BATCHES_PER_WORKER};
use crate::memory::GuestMemory;
use crate::session::{Outcome, SourceAction, SourceInput, SourceSession};
use crate::stats::{Event, Report};
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
    pub(super) events: (Sender<SourceEvent>, Receiver<SourceEvent>),
    pub(super) batches: (Sender<Batch>, Receiver<Batch>),
    pub(super) orders: Vec<Sender<EndRound>>,
    pub(super) messages: Option<Sender<Message>>,
    /// Counts control lanes, so that late words of an older one are not taken for the present one's.
    pub(super) generation: u64,
    pub(super) closers: Vec<Arc<dyn LaneCloser>>,
    pub(super) threads: Vec<Box<dyn Joiner>>,
    pub(super) over: Arc<AtomicBool>,
    pub(super) planner: Option<Planner>,
    pub(super) planned: Option<Batch>,
    pub(super) flushing: usize,
    pub(super) flushed: Tally,
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

    pub(super) fn drive(mut self) -> Result<Report, Failed> {
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

    pub(super) fn tell(&mut self, input: SourceInput) {
        self.session.handle(self.started.elapsed(), input);
    }

    pub(super) fn tell_result(&mut self, what: &'static str, result: crate::vm::VmResult<SourceInput>) {
        let input = result.unwrap_or_else(|source| SourceInput::Failed(Error::Vm { what, source }));
        self.tell(input);
    }

    // ---- waiting ----

    /// Waits until a thread, the user or the clock has something to say, or a lane takes the
    /// planned batch.
    pub(super) fn wait(&mut self) {
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

    pub(super) fn notify(&mut self, event: &Event) {
        if let Event::RoundFinished(round) = event {
            self.meter.dirty_rate = Some(round.dirty_rate);
        }
        self.lent.notify(event);
    }

    pub(super) fn start_tracking(&mut self) {
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

    pub(super) fn harvest(&mut self, point: Point) {
        let result = self.vm.dirty().harvest(point, &mut self.dirty);
        let dirty_pages = self.dirty.dirty_pages();
        self.tell_result("report dirty pages", result.map(|()| SourceInput::Harvested { dirty_pages }));
    }

    pub(super) fn save(&mut self) {
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
    pub(super) fn plan(&mut self) {
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

    pub(super) fn end_planning(&mut self) {
        self.planner = None;
        let round = self.session.round();
        self.flushing = self.orders.len();
        self.flushed = Tally::default();
        for lane in &self.orders {
            let _ = lane.send(EndRound(round));
        }
        self.tell(SourceInput::RoundQueued);
    }

    pub(super) fn abandon_round(&mut self) {
        if self.planner.is_none() {
            return;
        }
        let waiting: Vec<Batch> = self.planned.take().into_iter().chain(self.batches.1.try_iter()).collect();
        for run in waiting.into_iter().flat_map(|batch| batch.runs) {
            self.dirty.give_back(run);
        }
        self.end_planning();
    }

    pub(super) fn on_flushed(&mut self, tally: &Tally) {
        self.flushed.add(tally);
        self.flushing = self.flushing.saturating_sub(1);
        if self.flushing == 0 {
            self.tell(SourceInput::RoundFlushed(self.flushed));
        }
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
