//! The thread of a lane that receives: it passes frames on, keeps account with the peer, and finds another connection when
//! one breaks.

use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, bounded, select};
use pageferry::limits::MAX_GREETING;
use pageferry::transport::LaneReceiver;
use pageferry::wire::FrameBuffer;

use crate::PathFailure;
use crate::connection::Connection;
use crate::lane::{Delivery, Shared, lock};
use crate::message::PathMessage;

/// The peer is told how much was received after so many bytes, or frames.
pub(crate) const TELL_EVERY: (usize, u64) = (1 << 20, 1024);

/// Finds another connection for a lane: with how many frames the peer has received, or why there is none.
pub(crate) trait Reconnect: Send {
    fn reconnect(&mut self, shared: &Shared, received: u64) -> Result<(Connection, u64), PathFailure>;

    /// Brings something when another connection may be waiting.
    fn knock(&self) -> Receiver<()> {
        crossbeam_channel::never()
    }

    /// Whether another connection is waiting for this lane.
    fn is_waited_for(&self) -> bool {
        false
    }
}

/// Starts a lane's pump. From a stranger it takes a greeting, and no more until `trusted` is disconnected.
pub(crate) fn start(
    shared: &Arc<Shared>,
    receiver: Box<dyn LaneReceiver>,
    delivery: Delivery,
    reconnect: Box<dyn Reconnect>,
    trusted: Option<Receiver<()>>,
) -> std::io::Result<()> {
    let knock = reconnect.knock();
    let pump = Pump {
        knock,
        in_hand: None,
        shared: Arc::clone(shared),
        delivery,
        reconnect,
        trusted,
        received: 0,
        told: (0, 0),
        teller: None,
        bytes: 0,
        hushed: false,
    };
    shared.options.spawn("path", move || pump.run(receiver)).map(drop)
}

struct Pump {
    shared: Arc<Shared>,
    delivery: Delivery,
    reconnect: Box<dyn Reconnect>,
    knock: Receiver<()>,
    trusted: Option<Receiver<()>>,
    /// Received, and not yet with the engine.
    in_hand: Option<FrameBuffer>,
    /// Frames received.
    received: u64,
    bytes: usize,
    /// Bytes and frames of which the peer was told.
    told: (usize, u64),
    /// Has a thread tell the peer.
    teller: Option<Sender<()>>,
    /// The engine wants no more frames.
    hushed: bool,
}

/// Why a connection is not read any more.
enum Stop {
    /// It broke.
    Broken,
    /// The lane is over.
    Over(PathFailure),
}

impl Pump {
    fn run(mut self, mut receiver: Box<dyn LaneReceiver>) {
        let failure = loop {
            match self.receive_all(&mut *receiver) {
                Stop::Over(failure) => break failure,
                Stop::Broken if self.shared.is_over() => break PathFailure::ClosedHere,
                Stop::Broken => {}
            }
            self.shared.drop_connection();
            let found = self.reconnect.reconnect(&self.shared, self.received);
            match found.and_then(|(connection, received)| self.shared.install(connection, received)) {
                Ok(next) => {
                    self.shared.make_known();
                    receiver = next;
                }
                Err(failure) => break failure,
            }
            self.told = (self.bytes, self.received);
        };
        self.shared.fail(failure);
        self.shared.drop_connection();
        lock(&self.shared.pumping).take();
    }

    fn receive_all(&mut self, receiver: &mut dyn LaneReceiver) -> Stop {
        loop {
            if !self.deliver() || !self.is_trusted() {
                return Stop::Broken;
            }
            let mut frame = self.buffer();
            match receiver.receive(&mut frame) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {
                    return Stop::Over(PathFailure::Misbehaved("it sent something that is no frame"));
                }
                Err(_) => return Stop::Broken,
            }
            match PathMessage::decode(&frame) {
                Err(failure) => return Stop::Over(failure),
                Ok(None) => self.take(frame),
                Ok(Some(PathMessage::Received(received))) => {
                    if let Err(failure) = self.shared.acknowledge(received) {
                        return Stop::Over(failure);
                    }
                }
                Ok(Some(PathMessage::End)) => {
                    // All that it sent is here: it may close.
                    lock(&self.shared.wire).tell(PathMessage::Received(self.received));
                    return Stop::Over(PathFailure::Closed);
                }
                Ok(Some(PathMessage::Gone)) => return Stop::Over(PathFailure::Closed),
                // The dialling side hears so once.
                Ok(Some(PathMessage::GoesOn { received: 0 })) if !self.shared.is_known() => self.shared.make_known(),
                Ok(Some(_)) => return Stop::Over(PathFailure::Misbehaved("it began the lane again")),
            }
        }
    }

    fn buffer(&mut self) -> FrameBuffer {
        match &self.trusted {
            Some(_) if self.received == 0 => FrameBuffer::with_limit(MAX_GREETING),
            Some(_) => {
                self.trusted = None;
                FrameBuffer::new()
            }
            None => self.delivery.reuse.try_recv().unwrap_or_default(),
        }
    }

    /// Waits until the engine wants a second frame. `false` if another connection came meanwhile.
    fn is_trusted(&self) -> bool {
        let Some(trusted) = self.trusted.as_ref().filter(|_| self.received > 0) else { return true };
        loop {
            select! {
                recv(trusted) -> _ => return true,
                recv(self.shared.ended_here) -> _ => return true,
                recv(self.knock) -> _ => if self.reconnect.is_waited_for() {
                    return false;
                },
            }
        }
    }

    fn take(&mut self, frame: FrameBuffer) {
        self.received += 1;
        self.shared.count(self.received);
        self.bytes += frame.bytes().len();
        self.in_hand = Some(frame);
        let (bytes, frames) = (self.bytes - self.told.0, self.received - self.told.1);
        if bytes >= TELL_EVERY.0 || frames >= TELL_EVERY.1 {
            self.told = (self.bytes, self.received);
            self.tell_received();
        }
    }

    /// Passes the frame in hand to the engine, which may take its time. `false` if another connection came meanwhile: then the
    /// peer waits for an answer, and the frame is passed on later.
    fn deliver(&mut self) -> bool {
        while let Some(frame) = self.in_hand.take() {
            if self.hushed {
                return true;
            }
            select! {
                send(self.delivery.frames, frame) -> sent => self.hushed = sent.is_err(),
                // Goes on to hear acknowledgements, and the peer's end.
                recv(self.shared.ended_here) -> _ => self.hushed = true,
                recv(self.knock) -> _ => {
                    self.in_hand = Some(frame);
                    if self.reconnect.is_waited_for() {
                        return false;
                    }
                }
            }
        }
        true
    }

    /// By another thread: whoever is sending, and the telling itself, may wait for the peer to receive, and the peer for this
    /// thread. Lanes that receive little need none.
    fn tell_received(&mut self) {
        self.shared.owe_answer();
        let teller = self.teller.take().or_else(|| start_teller(&self.shared));
        if let Some(teller) = teller {
            // One that was called already has yet to look.
            let _ = teller.try_send(());
            self.teller = Some(teller);
        }
    }
}

/// Starts a thread that tells the peer how much was received, whenever it is called. Without one whoever sends next does.
fn start_teller(shared: &Arc<Shared>) -> Option<Sender<()>> {
    let (shared, (caller, calls)) = (Arc::clone(shared), bounded::<()>(1));
    let teller = Arc::clone(&shared);
    let tell = move || {
        while calls.recv().is_ok() {
            teller.answer(&mut lock(&teller.wire));
        }
    };
    shared.options.spawn("teller", tell).ok().map(|_| caller)
}
