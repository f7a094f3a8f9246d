//! The accepting end: lanes as they come on any path, and connections with which lanes go on.
//!
//! What a connection is for it says in its first frame. That is waited for where the engine waits for a lane's
//! greeting: there strangers are limited in number and time.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use pageferry::transport::{
    Acceptor, Capabilities, Lane, LaneCloser, LaneHalves, LaneReceiver, LaneSender, TransportError,
};
use pageferry::wire::{FrameBuffer, Message, Refusal};

use crate::attendant::Attendant;
use crate::connection::{Connection, MAX_MESSAGE};
use crate::dial::{LAST_WAIT, common};
use crate::lane::{Farewells, Shared, halves, lock};
use crate::message::{LaneId, PathMessage};
use crate::pump::{self, Reconnect};
use crate::{PathFailure, PathOptions};

/// How long each path is listened to before the next has its turn.
pub(crate) const TURN: Duration = Duration::from_millis(5);

/// How often a lane without a connection looks whether it has ended.
const LOOK: Duration = Duration::from_millis(50);

/// Lanes that may exist at once.
const MAX_KNOWN: usize = 1024;

/// Accepts lanes on all paths of a list.
pub struct PathsAcceptor {
    paths: Vec<Arc<dyn Acceptor>>,
    turn: AtomicUsize,
    known: Arc<Known>,
    attendant: Option<Attendant>,
}

impl std::fmt::Debug for PathsAcceptor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PathsAcceptor({} paths)", self.paths.len())
    }
}

impl PathsAcceptor {
    /// Listens on all of these, as long as the engine accepts lanes: at a destination.
    pub fn new(paths: impl IntoIterator<Item = Arc<dyn Acceptor>>, options: PathOptions) -> Self {
        let known = Known { lanes: Mutex::default(), options, farewells: Arc::default() };
        Self { paths: paths.into_iter().collect(), turn: AtomicUsize::new(0), known: Arc::new(known), attendant: None }
    }

    /// Listens on all of these by a thread of its own, whether anybody accepts or not: at a source to which the destination
    /// dials, and whose host accepts the lanes and hands them to the engine as
    /// [`ReadyLanes`](pageferry::transport::ReadyLanes). Such lanes can be sent on at once. Keep the acceptor as long as
    /// them: without it their connections cannot be replaced.
    ///
    /// # Errors
    ///
    /// No thread was to be had.
    pub fn attended(paths: impl IntoIterator<Item = Arc<dyn Acceptor>>, options: PathOptions) -> io::Result<Self> {
        let mut acceptor = Self::new(paths, options);
        acceptor.attendant = Some(Attendant::start(&acceptor.paths, &acceptor.known)?);
        Ok(acceptor)
    }
}

impl Drop for PathsAcceptor {
    fn drop(&mut self) {
        self.attendant = None;
        self.known.farewells.wait(LAST_WAIT);
    }
}

impl Acceptor for PathsAcceptor {
    fn accept(&self, timeout: Duration) -> Result<Option<Box<dyn Lane>>, TransportError> {
        if self.paths.is_empty() {
            let source = io::Error::new(io::ErrorKind::InvalidInput, "no path was given");
            return Err(TransportError::Accept { local: "nowhere".to_owned(), source });
        }
        if let Some(attendant) = &self.attendant {
            return attendant.accept(timeout);
        }
        let started = Instant::now();
        loop {
            let mut failures = Vec::new();
            for _ in &self.paths {
                let turn = self.turn.fetch_add(1, Ordering::Relaxed) % self.paths.len();
                let left = timeout.saturating_sub(started.elapsed());
                match self.paths[turn].accept(left.min(TURN)) {
                    Ok(Some(lane)) => {
                        return Ok(Some(Box::new(NewLane { lane, known: Arc::clone(&self.known) })));
                    }
                    Ok(None) => {}
                    Err(error) => failures.push(error),
                }
            }
            // One that listens is enough.
            if failures.len() == self.paths.len()
                && let Some(error) = failures.pop()
            {
                return Err(error);
            }
            if started.elapsed() >= timeout {
                return Ok(None);
            }
        }
    }

    fn capabilities(&self) -> Capabilities {
        common(self.paths.iter().map(|path| path.capabilities()), &self.known.options)
    }
}

/// The lanes of this acceptor.
pub(crate) struct Known {
    lanes: Mutex<HashMap<LaneId, KnownLane>>,
    pub(crate) options: PathOptions,
    farewells: Arc<Farewells>,
}

/// A lane, and where new connections wait for it.
type KnownLane = (Weak<Shared>, Arc<Doorstep>);

impl Known {
    fn find(&self, id: &LaneId) -> Option<(Arc<Shared>, Arc<Doorstep>)> {
        let lanes = lock(&self.lanes);
        let (shared, doorstep) = lanes.get(id)?;
        Some((shared.upgrade().filter(|shared| !shared.is_over())?, Arc::clone(doorstep)))
    }

    fn add(&self, shared: &Arc<Shared>, attempt: u32) -> Result<Arc<Doorstep>, PathFailure> {
        let mut lanes = lock(&self.lanes);
        lanes.retain(|_, (shared, _)| shared.upgrade().is_some_and(|shared| !shared.is_over()));
        if lanes.len() >= MAX_KNOWN || lanes.contains_key(&shared.id) {
            return Err(PathFailure::Misbehaved("it begins a lane again, or too many"));
        }
        let doorstep = Arc::new(Doorstep::new(attempt));
        lanes.insert(shared.id, (Arc::downgrade(shared), Arc::clone(&doorstep)));
        Ok(doorstep)
    }

    /// Whether a connection with this first word begins a lane, as far as can be told.
    fn begins(&self, message: PathMessage) -> bool {
        matches!(message, PathMessage::Begin { lane, .. } if self.find(&lane).is_none())
    }

    /// Gives a connection to the lane that it is for; the lane, if it begins one.
    pub(crate) fn sort(
        self: &Arc<Self>,
        mut connection: Connection,
        message: PathMessage,
        distrust: bool,
    ) -> io::Result<Option<LaneHalves>> {
        match message {
            PathMessage::Begin { lane, attempt } if self.find(&lane).is_none() => {
                self.begin(lane, attempt, connection, distrust).map(Some)
            }
            PathMessage::Begin { lane, attempt } | PathMessage::GoOn { lane, attempt, .. } => {
                let Some((shared, doorstep)) = self.find(&lane) else {
                    connection.tell(PathMessage::Gone)?;
                    return Ok(None);
                };
                let received = if let PathMessage::GoOn { received, .. } = message { received } else { 0 };
                doorstep.put(&shared, attempt, connection, received);
                Ok(None)
            }
            _ => Err(PathFailure::Misbehaved("it did not say which lane it means").into()),
        }
    }

    fn begin(
        self: &Arc<Self>,
        id: LaneId,
        attempt: u32,
        mut connection: Connection,
        distrust: bool,
    ) -> io::Result<LaneHalves> {
        let shared = Shared::new(id, self.options.clone(), Arc::clone(&self.farewells));
        let doorstep = self.add(&shared, attempt)?;
        connection.tell(PathMessage::GoesOn { received: 0 })?;
        shared.make_known();
        let receiver = shared.install(connection, 0)?;
        let (trust, trusted) = if distrust { Some(bounded(0)) } else { None }.unzip();
        let (halves, delivery) = halves(&shared, trust);
        pump::start(&shared, receiver, delivery, Box::new(doorstep), trusted)?;
        Ok(halves)
    }
}

/// Where a new connection waits for its lane: the latest only.
struct Doorstep {
    waiting: Mutex<Waiting>,
    /// One has come.
    knock: (Sender<()>, Receiver<()>),
}

struct Waiting {
    /// The highest number of a connection so far.
    latest: u32,
    connection: Option<(Connection, u64)>,
}

impl Doorstep {
    fn new(latest: u32) -> Self {
        Self { waiting: Mutex::new(Waiting { latest, connection: None }), knock: bounded(1) }
    }

    /// Puts a connection there, in place of all before; unless it is one of those before.
    fn put(&self, shared: &Shared, attempt: u32, connection: Connection, received: u64) {
        let mut waiting = lock(&self.waiting);
        if attempt > waiting.latest {
            // In case this side has not noticed yet. Before the new one can be the present one.
            shared.break_connection();
            *waiting = Waiting { latest: attempt, connection: Some((connection, received)) };
            // One knock is enough.
            let _ = self.knock.0.try_send(());
        }
    }
}

impl Reconnect for Arc<Doorstep> {
    fn reconnect(&mut self, shared: &Shared, received: u64) -> Result<(Connection, u64), PathFailure> {
        let until = Instant::now() + shared.options.give_up_after;
        while !shared.is_over() && Instant::now() < until {
            let waiting = lock(&self.waiting).connection.take();
            if let Some((mut connection, theirs)) = waiting {
                if connection.tell(PathMessage::GoesOn { received }).is_ok() {
                    return Ok((connection, theirs));
                }
                continue;
            }
            let _ = self.knock.1.recv_timeout(LOOK);
        }
        if shared.is_over() {
            return Err(PathFailure::ClosedHere);
        }
        Err(PathFailure::NoPath(format!("the peer did not come back within {:?}", shared.options.give_up_after)))
    }

    fn knock(&self) -> Receiver<()> {
        self.knock.1.clone()
    }

    fn is_waited_for(&self) -> bool {
        lock(&self.waiting).connection.is_some()
    }
}

/// A connection that has not said yet what it is for.
struct NewLane {
    lane: Box<dyn Lane>,
    known: Arc<Known>,
}

impl Lane for NewLane {
    fn peer(&self) -> String {
        self.lane.peer()
    }

    fn split(self: Box<Self>) -> io::Result<LaneHalves> {
        let connection = Connection::from(self.lane.split()?);
        let slot = Arc::new(Mutex::new(Slot::New(Arc::clone(&connection.closer))));
        let new = Some((connection, self.known));
        Ok(LaneHalves {
            sender: Box::new(NewSender(Arc::clone(&slot))),
            receiver: Box::new(NewReceiver { new, receiver: None, slot: Arc::clone(&slot) }),
            closer: Arc::new(NewCloser(slot)),
        })
    }
}

/// What has become of a connection.
enum Slot {
    /// It has not said anything yet.
    New(Arc<dyn LaneCloser>),
    /// A lane began.
    Lane(Option<Box<dyn LaneSender>>, Arc<dyn LaneCloser>),
    /// It belongs to another lane now, or to nobody.
    Gone,
}

struct NewReceiver {
    new: Option<(Connection, Arc<Known>)>,
    receiver: Option<Box<dyn LaneReceiver>>,
    slot: Arc<Mutex<Slot>>,
}

impl NewReceiver {
    /// Hears what the connection is for.
    fn hear(&mut self, mut connection: Connection, known: &Arc<Known>) -> io::Result<Box<dyn LaneReceiver>> {
        let mut frame = FrameBuffer::with_limit(MAX_MESSAGE);
        connection.receiver.receive(&mut frame)?;
        let Some(message) = PathMessage::decode(&frame)? else { return Err(refuse_single(connection, &mut frame)) };
        if !known.begins(message) {
            // The engine's door is to let it go without closing it.
            *lock(&self.slot) = Slot::Gone;
        }
        let Some(halves) = known.sort(connection, message, true)? else { return Err(PathFailure::Closed.into()) };
        let mut slot = lock(&self.slot);
        if matches!(*slot, Slot::Gone) {
            // Closed while it was introduced: dropping the halves ends it.
            return Err(PathFailure::ClosedHere.into());
        }
        *slot = Slot::Lane(Some(halves.sender), halves.closer);
        Ok(halves.receiver)
    }
}

/// The engine's own frame comes first: the source speaks over one path. It hears why it cannot be.
fn refuse_single(mut connection: Connection, frame: &mut FrameBuffer) -> io::Error {
    let refusal = Message::Refuse(Refusal::Guest(SINGLE_PATH.to_owned())).encode(0);
    if connection.sender.send(&mut [IoSlice::new(&refusal)]).is_ok() {
        // Closing at once could overtake it; the engine's door limits the caller's time.
        while connection.receiver.receive(frame).is_ok() {}
    }
    PathFailure::Misbehaved("it speaks over one path, not several").into()
}

const SINGLE_PATH: &str =
    "this destination takes lanes over several paths: name all the addresses that it has printed, with commas between";

impl LaneReceiver for NewReceiver {
    fn receive(&mut self, frame: &mut FrameBuffer) -> io::Result<()> {
        if let Some((connection, known)) = self.new.take() {
            self.receiver = Some(self.hear(connection, &known)?);
        }
        self.receiver.as_mut().ok_or(io::ErrorKind::UnexpectedEof)?.receive(frame)
    }
}

struct NewSender(Arc<Mutex<Slot>>);

impl LaneSender for NewSender {
    fn send(&mut self, frame: &mut [IoSlice<'_>]) -> io::Result<()> {
        let take = |slot: &mut Slot| match slot {
            Slot::Lane(sender, _) => sender.take(),
            _ => None,
        };
        // Not under the lock, which closing needs.
        let mut sender = take(&mut lock(&self.0)).ok_or(io::ErrorKind::NotConnected)?;
        let result = sender.send(frame);
        if let Slot::Lane(place, _) = &mut *lock(&self.0) {
            *place = Some(sender);
        }
        result
    }
}

struct NewCloser(Arc<Mutex<Slot>>);

impl LaneCloser for NewCloser {
    fn close(&self) {
        let slot = std::mem::replace(&mut *lock(&self.0), Slot::Gone);
        match &slot {
            Slot::New(closer) | Slot::Lane(_, closer) => closer.close(),
            Slot::Gone => {}
        }
    }
}
