//! The destination's driver.

use std::collections::{HashMap, VecDeque};
use std::io::IoSlice;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Select, Sender, bounded, unbounded};

use super::door::{self, Guest};
use super::lane::{LaneName, NumberedReceiver, NumberedSender};
use super::receive::{self, Gate, ReceiveDuty, Room};
use super::send::run_control_lane;
use super::{Counters, Lent, verify};
use crate::config::DestinationConfig;
use crate::digest::{Digest, HashTable, PageHasher};
use crate::error::{Error, Failed, Unsettled};
use crate::host::{Control, Joiner, Observer, Spawner, ThreadRole};
use crate::limits::{EVENT_QUEUE, FAREWELL, HEARTBEAT, MAX_PENDING_LANES};
use crate::memory::{GuestMemory, Layout, MemoryError};
use crate::session::{
    DestinationAction, DestinationInput, DestinationSession, DestinationSetup, LaneKey, Outcome, Phase,
};
use crate::stats::Report;
use crate::transport::{Acceptor, LaneCloser, LaneRole, TransportError};
use crate::vm::{DestinationVm, VmResult};
use crate::wire::{GreetingRole, Message, Offer, SessionId};

/// Receives a guest.
///
/// ```no_run
/// # fn f(vm: &mut dyn pageferry::DestinationVm, acceptor: std::sync::Arc<dyn pageferry::transport::Acceptor>) {
/// use pageferry::{Control, Destination, DestinationConfig};
/// match Destination::new(DestinationConfig::default()).run(vm, acceptor, &Control::new()) {
///     Ok(report) => println!("the guest runs here; {} pages came", report.pages_sent),
///     Err(failed) => eprintln!("{failed}"),
/// }
/// # }
/// ```
pub struct Destination {
    config: DestinationConfig,
    lent: Lent,
}

impl std::fmt::Debug for Destination {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Destination").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Destination {
    /// A destination with the given choices.
    pub fn new(config: DestinationConfig) -> Self {
        Self { config, lent: Lent::default() }
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

    /// Waits for a source, takes its guest, and runs it. Blocks until the guest runs here and the
    /// source knows it, or until it is certain that it does not, or until
    /// [`DestinationConfig::settle_window`] has passed without certainty.
    ///
    /// # Errors
    ///
    /// [`Failed`] says who owns the guest.
    pub fn run(
        &self,
        vm: &mut dyn DestinationVm,
        acceptor: Arc<dyn Acceptor>,
        control: &Control,
    ) -> Result<Report, Failed> {
        let setup = DestinationSetup { config: self.config.clone() };
        Driver::new(self, vm, control, DestinationSession::new(setup)).drive(acceptor)
    }

    /// Tells a source that is still undecided that its guest runs here: for a migration that ended
    /// well on this side ([`Report::session`]), when the source lost the link before it knew. Waits
    /// for the source for [`DestinationConfig::settle_window`] at most.
    ///
    /// # Errors
    ///
    /// The acceptor's, as [`Failed::DestinationOwns`].
    pub fn confirm(
        &self,
        acceptor: Arc<dyn Acceptor>,
        control: &Control,
        session: SessionId,
    ) -> Result<Report, Failed> {
        let setup = DestinationSetup { config: self.config.clone() };
        Driver::new(self, &mut NoVm, control, DestinationSession::confirm(setup, session)).drive(acceptor)
    }

    /// Stands ready once more to be asked about a migration that ended [`Failed::Undecided`]. Being
    /// asked means that Commit never came here: the guest is given up, and the source told so.
    ///
    /// # Errors
    ///
    /// Always: `SourceStillOwns` once settled, `Undecided` if nobody asked.
    pub fn settle(
        &self,
        vm: &mut dyn DestinationVm,
        acceptor: Arc<dyn Acceptor>,
        control: &Control,
        unsettled: Unsettled,
    ) -> Result<Report, Failed> {
        let setup = DestinationSetup { config: self.config.clone() };
        let error = Error::NoSource(self.config.settle_window);
        Driver::new(self, vm, control, DestinationSession::settle(setup, unsettled.session, error)).drive(acceptor)
    }
}

/// Stands in where no VM is asked for anything any more.
struct NoVm;

impl DestinationVm for NoVm {
    fn prepare(&mut self, _config: &[u8], _layout: &Layout) -> VmResult<Arc<dyn GuestMemory>> {
        Err("no guest is expected here".into())
    }

    fn load(&mut self, _state: &mut dyn std::io::Read) -> VmResult<()> {
        Err("no guest is expected here".into())
    }

    fn commit(&mut self, _run: bool) -> VmResult<()> {
        Err("no guest is expected here".into())
    }

    fn abort(&mut self) {}
}

/// What the threads of a lane tell the driver.
pub(super) enum LaneEvent {
    Message(Message),
    RoundComplete(u32, Digest),
    PlacingFailed(Error),
    ControlBroken(Error),
    ControlSent,
    DataLaneBroken(Error),
}

/// What the threads tell the driver.
pub(super) enum DestinationEvent {
    Greeted(LaneKey, Box<Guest>),
    DoorBroken(TransportError),
    /// From a lane of this generation; of an older one it means nothing any more.
    Lane(u64, LaneEvent),
    Hashed(Result<Digest, MemoryError>, Duration),
    Panicked(ThreadRole),
}

struct Driver<'a> {
    vm: &'a mut dyn DestinationVm,
    control: &'a Control,
    lent: Lent,
    session: DestinationSession,
    counters: Arc<Counters>,
    started: Instant,
    events: (Sender<DestinationEvent>, Receiver<DestinationEvent>),
    greeted: HashMap<LaneKey, Box<Guest>>,
    messages: Option<Sender<Message>>,
    /// Counts control lanes, so that late words of an older one are not taken for the present one's.
    generation: u64,
    room: Arc<OnceLock<Room>>,
    closers: Vec<Arc<dyn LaneCloser>>,
    threads: Vec<Box<dyn Joiner>>,
    frames_heard: u64,
    progress_heard: u64,
    cancel_told: bool,
    run: bool,
    /// Callers that were answered, until they have had time to read it.
    answered: VecDeque<(Instant, Box<Guest>)>,
    over: Arc<AtomicBool>,
}

impl<'a> Driver<'a> {
    fn new(
        destination: &Destination,
        vm: &'a mut dyn DestinationVm,
        control: &'a Control,
        session: DestinationSession,
    ) -> Self {
        Self {
            vm,
            control,
            lent: destination.lent.clone(),
            session,
            counters: Arc::default(),
            started: Instant::now(),
            events: bounded(EVENT_QUEUE),
            greeted: HashMap::new(),
            messages: None,
            generation: 0,
            room: Arc::default(),
            closers: Vec::new(),
            threads: Vec::new(),
            frames_heard: 0,
            progress_heard: 0,
            cancel_told: false,
            run: false,
            answered: VecDeque::new(),
            over: Arc::default(),
        }
    }

    fn drive(mut self, acceptor: Arc<dyn Acceptor>) -> Result<Report, Failed> {
        let (lent, events, closed) = (self.lent.clone(), self.events.0.clone(), Arc::clone(&self.over));
        let door = move || door::keep(&*acceptor, &lent, &events, &closed);
        if let Err(error) = self.spawn(ThreadRole::Door, door) {
            return Err(self.fail_to_begin(error));
        }
        loop {
            while let Some(action) = self.session.poll_action() {
                self.perform(action);
            }
            if self.session.outcome().is_some() {
                return self.finish();
            }
            if self.control.is_cancelled() && !std::mem::replace(&mut self.cancel_told, true) {
                self.tell(DestinationInput::Cancel);
                continue;
            }
            if !self.session.has_actions() {
                self.wait();
                self.tell_time();
            }
        }
    }

    /// Without its first thread: nothing has changed about who owns the guest.
    fn fail_to_begin(self, error: Error) -> Failed {
        let report = Box::default();
        match (self.session.phase(), self.session.session()) {
            (Phase::AwaitDone, _) => Failed::DestinationOwns { error, report },
            (Phase::Ready, Some(session)) => {
                let unsettled = Unsettled { session, run: self.run };
                Failed::Undecided { unsettled, error, report }
            }
            _ => Failed::SourceStillOwns { error, report },
        }
    }

    fn tell(&mut self, input: DestinationInput) {
        self.session.handle(self.started.elapsed(), input);
    }

    fn tell_time(&mut self) {
        self.close_answered();
        let frames = Counters::read(&self.counters.frames_received);
        let heard = std::mem::replace(&mut self.frames_heard, frames) != frames;
        let progress = Counters::read(&self.counters.progress);
        let progressed = std::mem::replace(&mut self.progress_heard, progress) != progress;
        self.tell(match (progressed, heard) {
            (true, _) => DestinationInput::Progress,
            (_, true) => DestinationInput::Heard,
            _ => DestinationInput::Tick,
        });
    }

    fn wait(&mut self) {
        let now = self.started.elapsed();
        let timeout = self.session.poll_timeout().map_or(HEARTBEAT, |at| at.saturating_sub(now).min(HEARTBEAT));
        let events = self.events.1.clone();
        let mut select = Select::new();
        let event_ready = select.recv(&events);
        select.recv(self.control.doorbell());
        let Ok(ready) = select.select_timeout(timeout) else { return };
        if ready.index() != event_ready {
            let _ = ready.recv(self.control.doorbell());
        } else if let Ok(event) = ready.recv(&events) {
            self.on_event(event);
        }
    }

    fn on_event(&mut self, event: DestinationEvent) {
        let input = match event {
            DestinationEvent::Greeted(lane, guest) => {
                let (greeting, peer) = (guest.greeting, guest.peer.clone());
                self.greeted.insert(lane, guest);
                DestinationInput::Greeted { lane, greeting, peer }
            }
            DestinationEvent::DoorBroken(error) => DestinationInput::DoorBroken(error.into()),
            DestinationEvent::Panicked(role) => {
                DestinationInput::Failed(Error::Bug(format!("the {role:?} thread panicked")))
            }
            DestinationEvent::Lane(generation, _) if generation != self.generation => return,
            DestinationEvent::Lane(_, event) => match event {
                LaneEvent::Message(message) => DestinationInput::Message(message),
                LaneEvent::RoundComplete(round, digest) => DestinationInput::RoundComplete { round, digest },
                LaneEvent::PlacingFailed(error) => DestinationInput::Failed(error),
                LaneEvent::ControlBroken(error) => DestinationInput::LinkLost(error),
                LaneEvent::ControlSent => return,
                LaneEvent::DataLaneBroken(error) => DestinationInput::DataLaneLost(error),
            },
            DestinationEvent::Hashed(Ok(digest), took) => DestinationInput::Verified { digest, took },
            DestinationEvent::Hashed(Err(error), _) => DestinationInput::Failed(error.into()),
        };
        self.tell(input);
    }

    fn perform(&mut self, action: DestinationAction) {
        match action {
            DestinationAction::Adopt(lane, role) => self.adopt(lane, role),
            DestinationAction::Answer(lane, message) => self.answer(lane, &message),
            DestinationAction::Drop(lane) => {
                if let Some(guest) = self.greeted.remove(&lane) {
                    guest.halves.closer.close();
                }
            }
            DestinationAction::CloseLanes => self.close_lanes(),
            DestinationAction::Send(message) => {
                if let Some(messages) = &self.messages {
                    // A lane that has ended has said so already.
                    let _ = messages.send(message);
                }
            }
            DestinationAction::MakeRoom(offer) => self.make_room(&offer),
            DestinationAction::StopPlacing => {
                if let Some(room) = self.room.get() {
                    room.gate.close();
                }
            }
            DestinationAction::Verify => self.verify(),
            DestinationAction::Load(state) => self.load(&state),
            DestinationAction::Start { run } => {
                let begun = Instant::now();
                let result = self.vm.commit(run);
                self.tell(match result {
                    Ok(()) => DestinationInput::Started { took: begun.elapsed() },
                    Err(source) => DestinationInput::Failed(Error::Vm { what: "start the guest", source }),
                });
            }
            DestinationAction::AbortVm => self.vm.abort(),
            DestinationAction::Notify(event) => self.lent.notify(&event),
        }
    }

    fn make_room(&mut self, offer: &Offer) {
        self.run = offer.run;
        match self.vm.prepare(&offer.config, &offer.layout) {
            Ok(memory) if memory.layout().is_same_memory(&offer.layout) => {
                let _ = self.room.set(Room {
                    memory,
                    hasher: PageHasher::new(&offer.digest_key),
                    table: Arc::new(HashTable::new(offer.layout.page_space())),
                    gate: Arc::new(Gate::new(offer.data_lanes.max(1))),
                    single_lane: offer.data_lanes == 0,
                });
                self.tell(DestinationInput::RoomMade);
            }
            Ok(_) => {
                let reason = "its VMM made memory of another layout than the guest's".to_owned();
                self.tell(DestinationInput::RoomRefused(reason));
            }
            Err(error) => self.tell(DestinationInput::RoomRefused(error.to_string())),
        }
    }

    fn verify(&mut self) {
        let Some(room) = self.room.get() else { return };
        let (events, begun) = (self.events.0.clone(), Instant::now());
        let done = move |result| drop(events.send(DestinationEvent::Hashed(result, begun.elapsed())));
        match verify::start(&self.lent, &room.memory, &room.hasher, &self.counters, &self.over, done) {
            Ok(threads) => self.threads.extend(threads),
            Err(error) => self.tell(DestinationInput::Failed(error)),
        }
    }

    fn load(&mut self, state: &[u8]) {
        let begun = Instant::now();
        let result = self.vm.load(&mut &*state);
        self.tell(match result {
            Ok(()) => DestinationInput::Loaded { took: begun.elapsed() },
            Err(source) => DestinationInput::Failed(Error::Vm { what: "load the machine state", source }),
        });
    }

    // ---- lanes ----

    fn adopt(&mut self, lane: LaneKey, role: GreetingRole) {
        let Some(guest) = self.greeted.remove(&lane) else { return };
        let (index, is_control) = match role {
            GreetingRole::Data(index) => (index, false),
            GreetingRole::Control | GreetingRole::Settle => (0, true),
        };
        if is_control {
            self.generation += 1;
        }
        let lane_role = if is_control { LaneRole::Control } else { LaneRole::Data(index) };
        let name = LaneName { role: lane_role, peer: guest.peer };
        let halves = guest.halves;
        self.closers.push(halves.closer);
        let counters = Arc::clone(&self.counters);
        let receiver = NumberedReceiver { name: name.clone(), receiver: halves.receiver, next: 1, counters };
        let duty = ReceiveDuty {
            lane: receiver,
            index,
            is_control,
            room: Arc::clone(&self.room),
            counters: Arc::clone(&self.counters),
            generation: self.generation,
            events: self.events.0.clone(),
        };
        let role = if is_control { ThreadRole::Control } else { ThreadRole::Receiver(index) };
        let mut spawned = self.spawn(role, move || receive::run(duty));
        if is_control {
            let counters = Arc::clone(&self.counters);
            let sender = NumberedSender { name, sender: halves.sender, sequence: 0, counters };
            spawned = spawned.and_then(|()| self.open_control(sender));
        }
        if let Err(error) = spawned {
            self.tell(DestinationInput::Failed(error));
        }
    }

    fn open_control(&mut self, sender: NumberedSender) -> Result<(), Error> {
        let (messages, inbox) = unbounded();
        self.messages = Some(messages);
        let (events, generation) = (self.events.0.clone(), self.generation);
        self.spawn(ThreadRole::Control, move || {
            let event = match run_control_lane(sender, &inbox, None) {
                Ok(()) => LaneEvent::ControlSent,
                Err(error) => LaneEvent::ControlBroken(error),
            };
            let _ = events.send(DestinationEvent::Lane(generation, event));
        })
    }

    fn answer(&mut self, lane: LaneKey, message: &Message) {
        let Some(mut guest) = self.greeted.remove(&lane) else { return };
        let frame = message.encode(0);
        // Small enough for any transport's buffer; a peer that has gone needs no answer.
        let _ = guest.halves.sender.send(&mut [IoSlice::new(&frame)]);
        // Closing at once could overtake the answer; the peer closes when it has read it.
        self.answered.push_back((Instant::now() + FAREWELL, guest));
        self.close_answered();
    }

    fn close_answered(&mut self) {
        let now = Instant::now();
        while self.answered.front().is_some_and(|(due, _)| now >= *due) || self.answered.len() > MAX_PENDING_LANES {
            if let Some((_, guest)) = self.answered.pop_front() {
                guest.halves.closer.close();
            }
        }
    }

    fn close_lanes(&mut self) {
        self.messages = None;
        self.generation += 1;
        for closer in self.closers.drain(..) {
            closer.close();
        }
    }

    fn spawn(&mut self, role: ThreadRole, work: impl FnOnce() + Send + 'static) -> Result<(), Error> {
        let events = self.events.0.clone();
        let work = move || {
            if catch_unwind(AssertUnwindSafe(work)).is_err() {
                let _ = events.send(DestinationEvent::Panicked(role));
            }
        };
        self.threads.push(self.lent.spawn(role, work)?);
        Ok(())
    }

    // ---- the end ----

    fn finish(mut self) -> Result<Report, Failed> {
        self.say_farewell();
        let total = self.started.elapsed();
        let session_id = self.session.session();
        let (outcome, mut report) = self.session.into_parts();
        report.total = total;
        report.session = session_id;
        report.wire_bytes = Counters::read(&self.counters.wire_bytes);
        report.pages_zero = Counters::read(&self.counters.zero_pages);
        report.pages_sent = Counters::read(&self.counters.pages) - report.pages_zero;
        let report = Box::new(report);
        match (outcome, session_id) {
            (Some(Outcome::HandedOver), _) => Ok(*report),
            (Some(Outcome::DestinationOwns(error)), _) => Err(Failed::DestinationOwns { error, report }),
            (Some(Outcome::Undecided(error)), Some(session)) => {
                Err(Failed::Undecided { unsettled: Unsettled { session, run: self.run }, error, report })
            }
            // Without a session nothing was ever promised.
            (Some(Outcome::SourceOwns(error)), _) | (Some(Outcome::Undecided(error)), None) => {
                Err(Failed::SourceStillOwns { error, report })
            }
            (None, _) => {
                let error = Error::Bug("the destination session ended without an outcome".to_owned());
                Err(Failed::SourceStillOwns { error, report })
            }
        }
    }

    /// Lets the last message leave, then ends all lanes and threads.
    fn say_farewell(&mut self) {
        self.over.store(true, Ordering::Release);
        if self.messages.take().is_some() {
            let deadline = Instant::now() + FAREWELL;
            while let Ok(event) = self.events.1.recv_deadline(deadline) {
                let ended = matches!(event, DestinationEvent::Lane(generation, LaneEvent::ControlSent | LaneEvent::ControlBroken(_)) if generation == self.generation);
                if ended {
                    break;
                }
            }
        }
        if let Some(room) = self.room.get() {
            room.gate.close();
        }
        if let Some((due, _)) = self.answered.back() {
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
        }
        self.close_answered();
        self.close_lanes();
        // A thread that waits to be heard must not wait for ever.
        self.events = bounded(0);
        for thread in self.threads.drain(..) {
            thread.join();
        }
    }
}
