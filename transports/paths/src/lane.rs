//! A lane that outlives its connections: its two halves, and what they share with the pump.

use std::io::{self, IoSlice};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use pageferry::transport::{LaneCloser, LaneHalves, LaneReceiver, LaneSender};
use pageferry::wire::FrameBuffer;

use crate::connection::{Connection, Wire};
use crate::message::{LaneId, PathMessage};
use crate::pump::TELL_EVERY;
use crate::unacknowledged::Unacknowledged;
use crate::{PathFailure, PathOptions};

/// Fewest bytes that may be unacknowledged, whatever was configured: with less than what the peer acknowledges at once both sides
/// would wait for ever.
pub(crate) const LEAST_UNACKNOWLEDGED: usize = 4 * TELL_EVERY.0;

/// Frames that were received and wait for the engine, per lane.
pub(crate) const AHEAD: usize = 2;

/// How long a lane that has ended may take to tell the peer so, over a connection that takes nothing.
const LAST_WORD: Duration = Duration::from_millis(300);

/// How long it may take the peer to answer that, all that is under way received.
const FAREWELL: Duration = Duration::from_secs(5);

/// What a lane's halves, its pump and its farewell share.
pub(crate) struct Shared {
    pub(crate) id: LaneId,
    pub(crate) options: PathOptions,
    pub(crate) wire: Mutex<Wire>,
    queue: Mutex<Queue>,
    /// Something was acknowledged, or the lane has ended.
    space: Condvar,
    /// Ends the present connection.
    closer: Mutex<Option<Arc<dyn LaneCloser>>>,
    ended: AtomicBool,
    /// Nor is anything to be told to the peer any more.
    over: AtomicBool,
    /// The peer is certain to know the lane: it has said so.
    known: AtomicBool,
    /// Neither is the peer a stranger any more.
    trusted: AtomicBool,
    /// Frames received: what the peer is told. It only grows, and is read where it is told.
    received: AtomicU64,
    /// The peer is to be told, by whoever sends next.
    answer_due: AtomicBool,
    /// Disconnected when the lane has ended on this side.
    ending: Mutex<Option<Sender<()>>>,
    pub(crate) ended_here: Receiver<()>,
    /// Disconnected when the pump has ended.
    pub(crate) pump_over: Receiver<()>,
    pub(crate) pumping: Mutex<Option<Sender<()>>>,
    farewells: Arc<Farewells>,
}

struct Queue {
    sent: Unacknowledged,
    failure: Option<PathFailure>,
}

impl Shared {
    pub(crate) fn new(id: LaneId, mut options: PathOptions, farewells: Arc<Farewells>) -> Arc<Self> {
        options.unacknowledged = options.unacknowledged.max(LEAST_UNACKNOWLEDGED);
        let ((ending, ended_here), (pumping, pump_over)) = (bounded(0), bounded(0));
        Arc::new(Self {
            id,
            options,
            wire: Mutex::default(),
            queue: Mutex::new(Queue { sent: Unacknowledged::default(), failure: None }),
            space: Condvar::new(),
            closer: Mutex::default(),
            ended: AtomicBool::new(false),
            over: AtomicBool::new(false),
            known: AtomicBool::new(false),
            trusted: AtomicBool::new(false),
            received: AtomicU64::new(0),
            answer_due: AtomicBool::new(false),
            ending: Mutex::new(Some(ending)),
            ended_here,
            pump_over,
            pumping: Mutex::new(Some(pumping)),
            farewells,
        })
    }

    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    /// Whether no other connection is worth having: what was sent before the end is to arrive all the same.
    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst) || self.has_ended() && lock(&self.queue).sent.is_empty()
    }

    /// Nothing more is told to the peer.
    fn be_over(&self) {
        self.over.store(true, Ordering::SeqCst);
        self.drop_connection();
    }

    pub(crate) fn is_known(&self) -> bool {
        self.known.load(Ordering::SeqCst)
    }

    pub(crate) fn make_trusted(&self) {
        self.trusted.store(true, Ordering::SeqCst);
    }

    pub(crate) fn make_known(&self) {
        self.known.store(true, Ordering::SeqCst);
    }

    /// Uses a connection from here on, whose peer has received so many frames. Returns its receiving half.
    pub(crate) fn install(
        self: &Arc<Self>,
        connection: Connection,
        received: u64,
    ) -> Result<Box<dyn LaneReceiver>, PathFailure> {
        self.acknowledge(received)?;
        *lock(&self.closer) = Some(Arc::clone(&connection.closer));
        let mut wire = lock(&self.wire);
        wire.begin(connection.sender, Arc::clone(&connection.closer), received);
        if wire.is_behind(self.end_of_queue()) {
            // On a thread of its own: the pump has to receive meanwhile, or both sides might only send.
            let shared = Arc::clone(self);
            let resend = self.options.spawn("resend", move || shared.resend());
            if resend.is_err() {
                wire.fail();
            }
        } else {
            self.catch_up(&mut wire);
        }
        drop(wire);
        if self.is_over() {
            connection.closer.close();
        }
        Ok(connection.receiver)
    }

    /// The present connection is of no use any more.
    pub(crate) fn drop_connection(&self) {
        if let Some(closer) = lock(&self.closer).take() {
            closer.close();
        }
        lock(&self.wire).fail();
    }

    /// Sends what the peer has not received, until nothing is left.
    fn resend(&self) {
        let mut frame = Vec::new();
        loop {
            let mut wire = lock(&self.wire);
            let Some(number) = wire.next_to_resend() else { return };
            if !lock(&self.queue).sent.copy(number, &mut frame) {
                return self.catch_up(&mut wire);
            }
            if wire.send(&mut [IoSlice::new(&frame)]).is_err() {
                return wire.fail();
            }
            self.answer(&mut wire);
        }
    }

    /// The peer has had all that was sent, and hears of the lane's end if nothing more comes.
    fn catch_up(&self, wire: &mut Wire) {
        wire.caught_up();
        if self.has_ended() {
            wire.tell(PathMessage::End);
        }
    }

    fn end_of_queue(&self) -> u64 {
        lock(&self.queue).sent.end()
    }

    /// Has the pump look for another connection, if it does not already.
    pub(crate) fn break_connection(&self) {
        if let Some(closer) = &*lock(&self.closer) {
            closer.close();
        }
    }

    /// Frames of this side that the peer has received.
    pub(crate) fn acknowledged(&self) -> u64 {
        lock(&self.queue).sent.acknowledged()
    }

    pub(crate) fn acknowledge(&self, received: u64) -> Result<(), PathFailure> {
        let result = lock(&self.queue).sent.acknowledge(received);
        self.space.notify_all();
        result
    }

    /// Keeps a frame until it is acknowledged; waits for room.
    fn keep(&self, frame: &[IoSlice<'_>]) -> Result<u64, PathFailure> {
        let mut queue = lock(&self.queue);
        loop {
            if let Some(failure) = &queue.failure {
                return Err(failure.clone());
            }
            // One frame at least, however long.
            if queue.sent.bytes() == 0 || queue.sent.bytes() < self.options.unacknowledged {
                return Ok(queue.sent.push(frame));
            }
            queue = self.space.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn send(&self, frame: &mut [IoSlice<'_>]) -> Result<(), PathFailure> {
        let number = self.keep(frame)?;
        let mut wire = lock(&self.wire);
        // Without a connection, or while older frames are sent again, this one comes after them.
        if wire.is_next(number) && wire.send(frame).is_err() {
            wire.fail();
        } else {
            self.answer(&mut wire);
        }
        Ok(())
    }

    /// So many frames were received: before the peer is told in any way.
    pub(crate) fn count(&self, received: u64) {
        self.received.store(received, Ordering::SeqCst);
    }

    /// Has the peer told how much was received.
    pub(crate) fn owe_answer(&self) {
        self.answer_due.store(true, Ordering::SeqCst);
    }

    /// Tells how much was received, if that is due: never less than was told before, or the peer would end the lane.
    pub(crate) fn answer(&self, wire: &mut Wire) {
        if self.answer_due.swap(false, Ordering::SeqCst) {
            wire.tell(PathMessage::Received(self.received.load(Ordering::SeqCst)));
        }
    }

    /// Why the lane is over.
    pub(crate) fn failure(&self) -> PathFailure {
        lock(&self.queue).failure.clone().unwrap_or(PathFailure::Closed)
    }

    /// The lane is over; the first reason counts.
    pub(crate) fn fail(&self, failure: PathFailure) {
        lock(&self.queue).failure.get_or_insert(failure);
        self.space.notify_all();
    }

    /// Ends the lane on this side, and tells the peer if that can be.
    pub(crate) fn end(self: &Arc<Self>) {
        if self.ended.swap(true, Ordering::SeqCst) {
            return;
        }
        self.fail(PathFailure::ClosedHere);
        lock(&self.ending).take();
        if !self.trusted.load(Ordering::SeqCst) {
            // A stranger is owed no farewell, and there may be many: none keeps a thread or a socket by its silence.
            return self.be_over();
        }
        let shared = Arc::clone(self);
        let said = self.farewells.begin();
        let farewell = self.options.spawn("farewell", move || {
            shared.say_farewell();
            drop(said);
        });
        if farewell.is_err() {
            self.be_over();
        }
    }

    /// Closing at once could destroy what is still under way: the peer's acknowledgements would find nobody.
    fn say_farewell(self: &Arc<Self>) {
        let shared = Arc::clone(self);
        let (said, heard) = bounded::<()>(0);
        let saying = self.options.spawn("last-word", move || {
            let mut wire = lock(&shared.wire);
            // Whoever sends what came before says it then.
            if wire.next_to_resend().is_none() {
                wire.tell(PathMessage::End);
            }
            drop(said);
        });
        let told =
            saying.is_ok() && heard.recv_timeout(LAST_WORD) == Err(crossbeam_channel::RecvTimeoutError::Disconnected);
        if told {
            let _ = self.pump_over.recv_timeout(FAREWELL);
        }
        self.be_over();
    }
}

/// Farewells under way: a process that ends while one is may take from the peer what was sent last.
#[derive(Default)]
pub(crate) struct Farewells {
    count: Mutex<usize>,
    fewer: Condvar,
}

impl Farewells {
    fn begin(self: &Arc<Self>) -> Farewell {
        *lock(&self.count) += 1;
        Farewell(Arc::clone(self))
    }

    /// Waits until all were said.
    pub(crate) fn wait(&self, longest: Duration) {
        let until = Instant::now() + longest;
        let mut count = lock(&self.count);
        while *count > 0 {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            count = self.fewer.wait_timeout(count, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

struct Farewell(Arc<Farewells>);

impl Drop for Farewell {
    fn drop(&mut self) {
        *lock(&self.0.count) -= 1;
        self.0.fewer.notify_all();
    }
}

/// Ends the lane when nobody has a part of it any more.
struct Held(Arc<Shared>);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// The halves of a lane, and where its pump delivers frames.
///
/// `trust` is dropped when the engine wants a second frame, and so trusts the peer.
pub(crate) fn halves(shared: &Arc<Shared>, trust: Option<Sender<()>>) -> (LaneHalves, Delivery) {
    if trust.is_none() {
        shared.make_trusted();
    }
    let held = Arc::new(Held(Arc::clone(shared)));
    let (frames, arrived) = bounded(AHEAD);
    let (spare, reuse) = bounded(AHEAD + 2);
    let halves = LaneHalves {
        sender: Box::new(PathSender(Arc::clone(&held))),
        receiver: Box::new(PathReceiver { held: Arc::clone(&held), arrived, spare, trust, first: true }),
        closer: Arc::new(PathCloser(held)),
    };
    (halves, Delivery { frames, reuse })
}

/// The pump's end of a receiver.
pub(crate) struct Delivery {
    pub(crate) frames: Sender<FrameBuffer>,
    /// Buffers to use again.
    pub(crate) reuse: Receiver<FrameBuffer>,
}

struct PathSender(Arc<Held>);

impl LaneSender for PathSender {
    fn send(&mut self, frame: &mut [IoSlice<'_>]) -> io::Result<()> {
        Ok(self.0.0.send(frame)?)
    }
}

struct PathReceiver {
    held: Arc<Held>,
    arrived: Receiver<FrameBuffer>,
    spare: Sender<FrameBuffer>,
    trust: Option<Sender<()>>,
    first: bool,
}

impl LaneReceiver for PathReceiver {
    fn receive(&mut self, frame: &mut FrameBuffer) -> io::Result<()> {
        if !self.first && self.trust.take().is_some() {
            self.held.0.make_trusted();
        }
        let Ok(mut arrived) = self.arrived.recv() else { return Err(self.held.0.failure().into()) };
        if std::mem::take(&mut self.first) {
            // Either buffer may have a limit.
            return frame.fill(arrived.bytes());
        }
        std::mem::swap(frame, &mut arrived);
        // There is no need for more than a few.
        let _ = self.spare.try_send(arrived);
        Ok(())
    }
}

struct PathCloser(Arc<Held>);

impl LaneCloser for PathCloser {
    fn close(&self) {
        self.0.0.end();
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
