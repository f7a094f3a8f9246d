//! Performs what the destination session asks for, and tells it what happened.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use crossbeam_channel::{Receiver, Select, Sender, bounded};

use super::super::door::{self, Guest};
use super::super::receive::{Gate, Room};
use super::super::{Counters, Lent, verify};
use super::{Destination, DestinationEvent, LaneEvent};
use crate::digest::{HashTable, PageHasher};
use crate::error::{Error, Failed, Unsettled};
use crate::host::{Control, Joiner, ThreadRole};
use crate::limits::{EVENT_QUEUE, FAREWELL, HEARTBEAT};
use crate::memory::GuestMemory;

use crate::memory::{Region, Transfer};
use crate::session::{DestinationAction, DestinationInput, DestinationSession, LaneKey, Outcome, Phase};
use crate::stats::Report;
use crate::transport::{Acceptor, LaneCloser, TransportError};
use crate::vm::DestinationVm;
use crate::wire::{Message, Offer};

pub(super) struct Driver<'a> {
    pub(super) vm: &'a mut dyn DestinationVm,
    pub(super) control: &'a Control,
    pub(super) lent: Lent,
    pub(super) session: DestinationSession,
    pub(super) counters: Arc<Counters>,
    pub(super) started: Instant,
    pub(super) events: (Sender<DestinationEvent>, Receiver<DestinationEvent>),
    pub(super) greeted: HashMap<LaneKey, Box<Guest>>,
    pub(super) messages: Option<Sender<Message>>,
    /// Counts control lanes, so that late words of an older one are not taken for the present one's.
    pub(super) generation: u64,
    pub(super) room: Arc<OnceLock<Room>>,
    pub(super) acceptor: Arc<dyn Acceptor>,
    pub(super) closers: Vec<Arc<dyn LaneCloser>>,
    pub(super) threads: Vec<Box<dyn Joiner>>,
    pub(super) frames_heard: u64,
    pub(super) progress_heard: u64,
    pub(super) cancel_told: bool,
    pub(super) run: bool,
    /// Callers that were answered, until they have had time to read it.
    pub(super) answered: VecDeque<(Instant, Box<Guest>)>,
    pub(super) over: Arc<AtomicBool>,
}

impl<'a> Driver<'a> {
    pub(super) fn new(
        destination: &Destination,
        vm: &'a mut dyn DestinationVm,
        control: &'a Control,
        acceptor: Arc<dyn Acceptor>,
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
            acceptor,
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

    /// A panic of the VMM goes on to whoever called, but leaves neither exposed memory nor threads.
    pub(super) fn drive(mut self) -> Result<Report, Failed> {
        match catch_unwind(AssertUnwindSafe(|| self.go_on())) {
            Ok(Ok(())) => self.finish(),
            Ok(Err(error)) => Err(self.fail_to_begin(error)),
            Err(panic) => {
                self.over.store(true, Ordering::Release);
                self.let_go();
                resume_unwind(panic)
            }
        }
    }

    /// Works until the session has ended.
    fn go_on(&mut self) -> Result<(), Error> {
        let (lent, events, closed) = (self.lent.clone(), self.events.0.clone(), Arc::clone(&self.over));
        let acceptor = Arc::clone(&self.acceptor);
        let door = move || door::keep(&*acceptor, &lent, &events, &closed);
        self.spawn(ThreadRole::Door, door)?;
        loop {
            while let Some(action) = self.session.poll_action() {
                self.perform(action);
            }
            if self.session.outcome().is_some() {
                return Ok(());
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
    pub(super) fn fail_to_begin(self, error: Error) -> Failed {
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

    pub(super) fn tell(&mut self, input: DestinationInput) {
        self.session.handle(self.started.elapsed(), input);
    }

    pub(super) fn tell_time(&mut self) {
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

    pub(super) fn wait(&mut self) {
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

    pub(super) fn on_event(&mut self, event: DestinationEvent) {
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
                LaneEvent::ControlSendFailed(error) => {
                    // Nobody is left to wait for.
                    self.messages = None;
                    DestinationInput::ControlSendFailed(error)
                }
                LaneEvent::ControlSent => return,
                LaneEvent::DataLaneBroken(error) => DestinationInput::DataLaneLost(error),
            },
            DestinationEvent::Hashed(Ok(digest), took) => DestinationInput::Verified { digest, took },
            DestinationEvent::Hashed(Err(error), _) => DestinationInput::Failed(error.into()),
        };
        self.tell(input);
    }

    pub(super) fn perform(&mut self, action: DestinationAction) {
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
            DestinationAction::StopPlacing => self.stop_placing(),
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

    pub(super) fn make_room(&mut self, offer: &Offer) {
        self.run = offer.run;
        let shared = |region: &Region| region.transfer == Transfer::Shared;
        if offer.layout.regions().iter().any(shared) && !self.vm.takes_shared_memory() {
            let reason = "the source hands its memory over instead of sending it, and this destination cannot take it";
            return self.tell(DestinationInput::RoomRefused(reason.to_owned()));
        }
        match self.vm.prepare(&offer.config, &offer.layout) {
            Ok(memory) if memory.layout().is_same_memory(&offer.layout) => {
                let exposed = match self.expose(&memory, offer) {
                    Ok(exposed) => exposed,
                    Err(error) => return self.tell(DestinationInput::RoomRefused(error.to_string())),
                };
                let _ = self.room.set(Room {
                    memory,
                    exposed,
                    hasher: PageHasher::new(&offer.digest_key),
                    table: Arc::new(HashTable::new(offer.layout.page_space())),
                    gate: Arc::new(Gate::new(offer.data_lanes.max(1))),
                    single_lane: offer.data_lanes == 0,
                });
                self.tell(DestinationInput::RoomMade { exposed });
            }
            Ok(_) => {
                let reason = "its VMM made memory of another layout than the guest's".to_owned();
                self.tell(DestinationInput::RoomRefused(reason));
            }
            Err(error) => self.tell(DestinationInput::RoomRefused(error.to_string())),
        }
    }

    /// For data lanes: the control lane was there before the memory was.
    fn expose(&self, memory: &Arc<dyn GuestMemory>, offer: &Offer) -> Result<bool, TransportError> {
        let possible = offer.data_lanes > 0 && self.acceptor.capabilities().one_sided;
        Ok(possible && self.acceptor.expose(Arc::clone(memory))?)
    }

    /// After this nothing that comes from the source changes the memory.
    fn stop_placing(&mut self) {
        if let Some(room) = self.room.get() {
            room.gate.close();
            if room.exposed {
                self.acceptor.conceal();
            }
        }
    }

    pub(super) fn verify(&mut self) {
        let Some(room) = self.room.get() else { return };
        let (events, begun) = (self.events.0.clone(), Instant::now());
        let done = move |result| drop(events.send(DestinationEvent::Hashed(result, begun.elapsed())));
        match verify::start(&self.lent, &room.memory, &room.hasher, &self.counters, &self.over, done) {
            Ok(threads) => self.threads.extend(threads),
            Err(error) => self.tell(DestinationInput::Failed(error)),
        }
    }

    pub(super) fn load(&mut self, state: &[u8]) {
        let begun = Instant::now();
        let result = self.vm.load(&mut &*state);
        self.tell(match result {
            Ok(()) => DestinationInput::Loaded { took: begun.elapsed() },
            Err(source) => DestinationInput::Failed(Error::Vm { what: "load the machine state", source }),
        });
    }

    // ---- the end ----

    pub(super) fn finish(mut self) -> Result<Report, Failed> {
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
    pub(super) fn say_farewell(&mut self) {
        self.over.store(true, Ordering::Release);
        if self.messages.take().is_some() {
            let deadline = Instant::now() + FAREWELL;
            while let Ok(event) = self.events.1.recv_deadline(deadline) {
                let DestinationEvent::Lane(generation, event) = event else { continue };
                let ended = matches!(
                    event,
                    LaneEvent::ControlSent | LaneEvent::ControlSendFailed(_) | LaneEvent::ControlBroken(_)
                );
                if ended && generation == self.generation {
                    break;
                }
            }
        }
        self.stop_placing();
        if let Some((due, _)) = self.answered.back() {
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
        }
        self.close_answered();
        self.let_go();
    }

    /// Ends placing, lanes and threads, whatever they are at.
    fn let_go(&mut self) {
        self.stop_placing();
        self.close_lanes();
        self.greeted.clear();
        // A thread that waits to be heard must not wait for ever.
        self.events = bounded(0);
        for thread in self.threads.drain(..) {
            thread.join();
        }
    }
}
