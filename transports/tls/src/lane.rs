//! A lane over one TLS connection.
//!
//! Once the peer has been let in the directions have nothing in common but the socket and the next keys. A destination's lane is opened by a thread
//! of its own, or by whoever uses it first: the handshake with a stranger is nothing that `accept` could wait for.

use std::io::{self, IoSlice};
use std::net::{IpAddr, Shutdown, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pageferry::transport::{Lane, LaneCloser, LaneHalves, LaneReceiver, LaneSender};
use pageferry::wire::{FrameBuffer, HEADER_LEN};
use pageferry_tcp::{LaneFailure, explain};
use socket2::Socket;

use crate::connection::{Connection, Outgoing};
use crate::error::TlsFailure;
use crate::identity::DestinationIdentity;
use crate::opening::{Remainder, answer};
use crate::record::{Opened, Opener, Sealer};
use crate::socket::{Deadline, Incoming, send_all, send_if_possible, without_deadline};

/// Most time that a source may take to be let in, if the host does not end it before.
const OPENING_LIMIT: Duration = Duration::from_secs(10);

/// Bytes received at once: many records, and the rest of one that has not come whole.
const RECEIVE: usize = (256 << 10) + (17 << 10);

/// Bytes encrypted before they are sent: little enough to stay in a core's cache, and the peer begins to decrypt while
/// the rest is encrypted.
const SEND: usize = 128 << 10;

/// Parts of a frame that are shorter share a record.
const SMALL: usize = 4 << 10;

/// Bytes of parts that share a record.
const SHARED_RECORD: usize = 16 << 10;

/// A peer sends no more records without data one after the other: changes of keys are hundreds of gigabytes apart.
const MOST_EMPTY: u32 = 32;

/// A TLS connection that carries frames.
pub(crate) struct TlsLane {
    hold: Hold,
    peer: SocketAddr,
}

impl TlsLane {
    /// A lane that is open.
    pub(crate) fn open(
        socket: Socket,
        peer: SocketAddr,
        connection: Connection,
        rest: Remainder,
    ) -> Result<Self, rustls::Error> {
        let (sealer, opener) = connection.into_directions()?;
        let opening = Opening::Done(Some(Received::new(opener, rest)));
        Ok(Self { hold: Hold::new(Link::new(socket, Some(sealer), opening)), peer })
    }

    /// A lane whose caller is yet to be heard.
    pub(crate) fn waiting(
        socket: Socket,
        peer: SocketAddr,
        connection: Connection,
        identity: DestinationIdentity,
    ) -> Self {
        let opening = Opening::Waiting(Some(Box::new(Caller { connection, identity, from: peer.ip() })));
        Self { hold: Hold::new(Link::new(socket, None, opening)), peer }
    }

    /// Opens the lane, unless somebody does it already: to be called on a thread that has time. Ends when the lane is
    /// closed or dropped.
    pub(crate) fn opener(&self) -> impl FnOnce() + Send + 'static {
        let link = Arc::clone(self.hold.link());
        move || {
            // Whoever uses the lane hears of it.
            let _ = link.ensure_open();
        }
    }
}

impl Lane for TlsLane {
    fn peer(&self) -> String {
        self.peer.to_string()
    }

    fn split(self: Box<Self>) -> io::Result<LaneHalves> {
        let hold = self.hold;
        Ok(LaneHalves {
            sender: Box::new(TlsSender { hold: hold.clone(), small: Vec::new() }),
            receiver: Box::new(TlsReceiver { hold: hold.clone(), received: None }),
            closer: Arc::new(TlsCloser(hold)),
        })
    }
}

/// What the halves share.
struct Link {
    socket: Socket,
    /// Held while a frame is sent, so that records go out in the order of their numbers.
    sending: Mutex<Sending>,
    opening: Mutex<Opening>,
    open: AtomicBool,
    closed: AtomicBool,
}

/// The sending direction, once there is one.
struct Sending {
    sealer: Option<Sealer>,
    outgoing: Outgoing,
}

enum Opening {
    /// Nobody has listened to the caller yet, or somebody is about to.
    Waiting(Option<Box<Caller>>),
    /// The receiving direction, until the receiver has it.
    Done(Option<Received>),
    Failed(String),
}

/// Somebody who wants to be let in.
struct Caller {
    connection: Connection,
    identity: DestinationIdentity,
    from: IpAddr,
}

impl Link {
    fn new(socket: Socket, sealer: Option<Sealer>, opening: Opening) -> Self {
        let open = matches!(opening, Opening::Done(_));
        Self {
            socket,
            sending: Mutex::new(Sending { sealer, outgoing: Outgoing::default() }),
            opening: Mutex::new(opening),
            open: open.into(),
            closed: false.into(),
        }
    }

    /// Makes sure that the peer has been let in.
    fn ensure_open(&self) -> io::Result<()> {
        if self.closed.load(Ordering::Acquire) {
            return Err(TlsFailure::ClosedHere.into());
        }
        if self.open.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut opening = lock(&self.opening);
        let caller = match &mut *opening {
            Opening::Done(_) => return Ok(()),
            Opening::Failed(why) => return Err(TlsFailure::NeverOpened(why.clone()).into()),
            Opening::Waiting(caller) => caller.take(),
        };
        let received = match caller.ok_or(TlsFailure::Ended).and_then(|caller| self.listen_to(*caller)) {
            Ok(received) => received,
            Err(failure) => {
                *opening = Opening::Failed(failure.to_string());
                // Nobody has anything more to say; without this, the peer would wait until the lane is dropped.
                let _ = self.socket.shutdown(Shutdown::Write);
                return Err(failure.into());
            }
        };
        without_deadline(&self.socket)?;
        *opening = Opening::Done(Some(received));
        self.open.store(true, Ordering::Release);
        Ok(())
    }

    fn listen_to(&self, caller: Caller) -> Result<Received, TlsFailure> {
        let Caller { mut connection, identity, from } = caller;
        let deadline = Deadline::starting(Instant::now(), OPENING_LIMIT);
        let rest = answer(&mut connection, &self.socket, &identity, from, deadline)?;
        let (sealer, opener) = connection.into_directions()?;
        lock(&self.sending).sealer = Some(sealer);
        Ok(Received::new(opener, rest))
    }

    /// The receiving direction, for the one who asks first.
    fn received(&self) -> Option<Received> {
        match &mut *lock(&self.opening) {
            Opening::Done(received) => received.take(),
            _ => None,
        }
    }

    /// Ends both directions.
    fn close(&self) {
        if !self.closed.swap(true, Ordering::AcqRel) {
            self.say(Sealer::goodbye);
        }
        // Fails only where there is no connection left to end.
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// Tells the peer something that is the last, if that is possible without waiting for anybody.
    fn say(&self, what: impl FnOnce(&mut Sealer, &mut Outgoing) -> Result<(), rustls::Error>) {
        let Ok(mut sending) = self.sending.try_lock() else { return };
        let Sending { sealer: Some(sealer), outgoing } = &mut *sending else { return };
        outgoing.clear();
        if what(sealer, outgoing).is_ok() {
            send_if_possible(&self.socket, outgoing.bytes());
        }
        outgoing.clear();
    }
}

/// What the users of a lane have of it. With the last of them the connection ends, in order, whoever is opening it.
#[derive(Clone)]
struct Hold(Arc<HoldOf>);

struct HoldOf(Arc<Link>);

impl Hold {
    fn new(link: Link) -> Self {
        Self(Arc::new(HoldOf(Arc::new(link))))
    }

    fn link(&self) -> &Arc<Link> {
        &self.0.0
    }
}

impl Drop for HoldOf {
    fn drop(&mut self) {
        self.0.close();
    }
}

struct TlsSender {
    hold: Hold,
    small: Vec<u8>,
}

impl LaneSender for TlsSender {
    fn send(&mut self, frame: &mut [IoSlice<'_>]) -> io::Result<()> {
        let link = self.hold.link();
        link.ensure_open()?;
        let mut sending = lock(&link.sending);
        let Sending { sealer: Some(sealer), outgoing } = &mut *sending else {
            return Err(TlsFailure::Ended.into());
        };
        outgoing.clear();
        self.small.clear();
        let mut post = Post { link, sealer, outgoing };
        for part in frame.iter() {
            if part.len() < SMALL {
                self.small.extend_from_slice(part);
                if self.small.len() < SHARED_RECORD {
                    continue;
                }
            }
            post.seal(&self.small)?;
            self.small.clear();
            if part.len() >= SMALL {
                post.seal(part)?;
            }
        }
        post.seal(&self.small)?;
        post.flush()
    }
}

/// A frame on its way out.
struct Post<'a> {
    link: &'a Link,
    sealer: &'a mut Sealer,
    outgoing: &'a mut Outgoing,
}

impl Post<'_> {
    fn seal(&mut self, plaintext: &[u8]) -> io::Result<()> {
        for piece in plaintext.chunks(SEND) {
            self.sealer.seal(piece, self.outgoing).map_err(TlsFailure::from)?;
            if self.outgoing.bytes().len() >= SEND {
                self.flush()?;
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        send_all(&self.link.socket, self.outgoing.bytes())?;
        self.outgoing.clear();
        Ok(())
    }
}

struct TlsReceiver {
    hold: Hold,
    received: Option<Received>,
}

impl LaneReceiver for TlsReceiver {
    fn receive(&mut self, frame: &mut FrameBuffer) -> io::Result<()> {
        let link = self.hold.link();
        link.ensure_open()?;
        if self.received.is_none() {
            self.received = link.received();
        }
        let received = self.received.as_mut().ok_or(TlsFailure::ClosedHere)?;
        received.fill(link, frame.prepare(HEADER_LEN)?, true)?;
        let body = frame.announced_body()?;
        received.fill(link, frame.extend(body)?, false)
    }
}

/// The receiving direction: records that wait to be opened, and what is left of the last one that was.
struct Received {
    opener: Opener,
    incoming: Incoming,
    plaintext: Vec<u8>,
    start: usize,
    /// Records without data since the last with some.
    empty: u32,
    peer_closed: bool,
}

/// What has to happen before more can be opened.
enum Next {
    Nothing,
    Receive,
    PeerClosed,
}

impl Received {
    fn new(opener: Opener, rest: Remainder) -> Self {
        let Remainder { incoming, plaintext } = rest;
        Self { opener, incoming, plaintext, start: 0, empty: 0, peer_closed: false }
    }

    /// Fills the slice. If the lane ends before its first byte, that is the lane's end in order where a frame begins.
    fn fill(&mut self, link: &Link, into: &mut [u8], begins: bool) -> io::Result<()> {
        let mut filled = self.take(into);
        while filled < into.len() {
            let next = match self.open(into, &mut filled) {
                Ok(next) => next,
                Err(error) => {
                    link.say(|sealer, outgoing| sealer.alert(&error, outgoing));
                    return Err(TlsFailure::from(error).into());
                }
            };
            match next {
                Next::Nothing => {}
                Next::PeerClosed if begins && filled == 0 => return Err(LaneFailure::Closed.into()),
                Next::PeerClosed => return Err(LaneFailure::Cut { missing: into.len() - filled }.into()),
                Next::Receive => self.receive(link)?,
            }
        }
        Ok(())
    }

    /// Gives out what is left, as far as it goes.
    fn take(&mut self, into: &mut [u8]) -> usize {
        let len = into.len().min(self.plaintext.len() - self.start);
        into[..len].copy_from_slice(&self.plaintext[self.start..][..len]);
        self.start += len;
        if self.start == self.plaintext.len() {
            self.plaintext.clear();
            self.start = 0;
        }
        len
    }

    /// Opens what is there until the slice is full.
    fn open(&mut self, into: &mut [u8], filled: &mut usize) -> Result<Next, rustls::Error> {
        while *filled < into.len() && !self.peer_closed {
            let incoming = self.incoming.unread();
            let used = match self.opener.open(incoming, &mut into[*filled..])? {
                Opened::Starved => return Ok(Next::Receive),
                Opened::Placed { used, len } => {
                    *filled += len;
                    self.empty = if len > 0 { 0 } else { self.empty + 1 };
                    if self.empty > MOST_EMPTY {
                        return Err(rustls::Error::General("the peer sends records without data".to_owned()));
                    }
                    used
                }
                Opened::Held { used, data } => {
                    let data = &incoming[data];
                    self.empty = 0;
                    let (now, later) = data.split_at(data.len().min(into.len() - *filled));
                    into[*filled..][..now.len()].copy_from_slice(now);
                    *filled += now.len();
                    self.plaintext.extend_from_slice(later);
                    used
                }
                Opened::PeerClosed => {
                    self.peer_closed = true;
                    0
                }
            };
            self.incoming.consume(used);
        }
        Ok(if *filled == into.len() { Next::Nothing } else { Next::PeerClosed })
    }

    fn receive(&mut self, link: &Link) -> io::Result<()> {
        if self.incoming.capacity() < RECEIVE {
            self.incoming = self.incoming.moved(RECEIVE);
        }
        match self.incoming.receive(&link.socket) {
            Ok(0) if link.closed.load(Ordering::Acquire) => Err(TlsFailure::ClosedHere.into()),
            Ok(0) => Err(TlsFailure::Cut.into()),
            Ok(_) => Ok(()),
            Err(error) => Err(explain(error)),
        }
    }
}

struct TlsCloser(Hold);

impl LaneCloser for TlsCloser {
    fn close(&self) {
        self.0.link().close();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
