//! Opens the source's lanes, each dialled on a thread of its own, so that the user can cancel meanwhile.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Sender, unbounded};

use super::super::lane::{LaneName, NumberedReceiver, NumberedSender};
use super::super::send::{PageDuty, run_control_lane, run_data_lane};
use super::drive::Driver;
use super::{ControlEvent, SourceEvent};
use crate::encode::LevelChooser;
use crate::error::Error;
use crate::host::ThreadRole;
use crate::limits::EVENT_QUEUE;
use crate::memory::GuestMemory;
use crate::session::SourceInput;
use crate::transport::{Dialer, LaneHalves, LaneRole, TransportError};

use crate::wire::{FrameBuffer, Greeting, GreetingRole, Message, PROTOCOL_MAX, PROTOCOL_MIN, SessionId};

/// Longest time to open one lane.
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

impl Driver<'_> {
    /// Opens a control lane on a thread of its own, so that the user can cancel meanwhile.
    pub(super) fn dial(&mut self) {
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

    pub(super) fn open_control(&mut self, halves: LaneHalves, peer: String) {
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
                Err(error) => ControlEvent::SendFailed(error),
            };
            let _ = events.send(SourceEvent::Control(generation, event));
        };
        let events = self.events.0.clone();
        let receive = move || receive_messages(receiver, generation, &events);
        let spawned = self.spawn(ThreadRole::Control, send).and_then(|()| self.spawn(ThreadRole::Control, receive));
        self.tell(spawned.map_or_else(SourceInput::Failed, |()| SourceInput::Dialled { peer }));
    }

    pub(super) fn dial_lanes(&mut self, count: u16, exposed: bool) {
        let (dialer, events, session) = (Arc::clone(&self.dialer), self.events.0.clone(), self.unsettled.session);
        let (memory, chooser) = (Arc::clone(&self.memory), Arc::clone(&self.pipeline.chooser));
        let work = move || {
            let attached = if exposed && count > 0 { attach(&*dialer, memory, &chooser) } else { Ok(()) };
            let lanes =
                attached.and_then(|()| (0..count).map(|index| dial_data_lane(&*dialer, index, session)).collect());
            let _ = events.send(SourceEvent::LanesDialled(lanes));
        };
        if let Err(error) = self.lent.spawn(ThreadRole::Control, work) {
            self.tell(SourceInput::LinkLost(error));
        }
    }

    pub(super) fn open_lanes(&mut self, lanes: Vec<(LaneHalves, LaneName)>) {
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

    pub(super) fn page_duty(&mut self) -> PageDuty {
        let (orders, inbox) = unbounded();
        self.orders.push(orders);
        PageDuty {
            batches: self.pipeline.ready.1.clone(),
            free: self.pipeline.free.0.clone(),
            orders: inbox,
            pacer: Arc::clone(&self.pacer),
            chooser: Arc::clone(&self.pipeline.chooser),
            events: self.events.0.clone(),
        }
    }

    pub(super) fn numbered(
        &self,
        sender: Box<dyn crate::transport::LaneSender>,
        name: &LaneName,
        sequence: u64,
    ) -> NumberedSender {
        NumberedSender { name: name.clone(), sender, sequence, counters: Arc::clone(&self.counters) }
    }

    pub(super) fn spawn(&mut self, role: ThreadRole, work: impl FnOnce() + Send + 'static) -> Result<(), Error> {
        let events = self.events.0.clone();
        let work = move || {
            if catch_unwind(AssertUnwindSafe(work)).is_err() {
                let _ = events.send(SourceEvent::Panicked(role));
            }
        };
        self.threads.push(self.lent.spawn(role, work)?);
        Ok(())
    }
}

fn split(lane: Box<dyn crate::transport::Lane>, peer: &str) -> Result<LaneHalves, TransportError> {
    lane.split().map_err(|source| TransportError::Dial { peer: peer.to_owned(), source })
}

/// Has pages written straight from guest memory, where the transport can.
fn attach(dialer: &dyn Dialer, memory: Arc<dyn GuestMemory>, chooser: &LevelChooser) -> Result<(), TransportError> {
    if dialer.capabilities().one_sided && dialer.attach(memory)? {
        chooser.can_write_directly();
    }
    Ok(())
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
            // No destination says that. Its length is not to wait here until the session finds out.
            Ok(Message::State(_)) => ControlEvent::Message(Message::State(Vec::new())),
            Ok(message) => ControlEvent::Message(message),
            Err(error) => ControlEvent::Broken(error),
        };
        let last = matches!(event, ControlEvent::Broken(_));
        // The driver may be busy, and the peer may say more than it will ever hear.
        while events.len() >= EVENT_QUEUE {
            std::thread::sleep(Duration::from_millis(1));
        }
        if events.send(SourceEvent::Control(generation, event)).is_err() || last {
            return;
        }
    }
}
