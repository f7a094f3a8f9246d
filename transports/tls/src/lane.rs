//! A lane over one TLS connection.
//!
//! The connection's state is under a lock that is held while records are encrypted or decrypted and never while the
//! socket is waited for, so that the directions do not hold each other up. A destination's lane is opened by whoever
//! uses it first: the handshake with a stranger is nothing that `accept` could wait for.

use std::io::{self, IoSlice};
use std::net::{IpAddr, Shutdown, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pageferry::transport::{Lane, LaneCloser, LaneHalves, LaneReceiver, LaneSender};
use pageferry::wire::{FrameBuffer, HEADER_LEN};
use pageferry_tcp::{LaneFailure, explain};
use socket2::Socket;

use crate::connection::{Connection, Next, Outgoing};
use crate::error::TlsFailure;
use crate::identity::DestinationIdentity;
use crate::opening::{Remainder, answer};
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

/// A TLS connection that carries frames.
pub(crate) struct TlsLane {
    link: Arc<Link>,
    peer: SocketAddr,
}

impl TlsLane {
    /// A lane that is open.
    pub(crate) fn open(socket: Socket, peer: SocketAddr, connection: Connection, rest: Remainder) -> Self {
        Self { link: Arc::new(Link::new(socket, connection, Opening::Done(Some(rest)))), peer }
    }

    /// A lane whose caller is yet to be heard.
    pub(crate) fn waiting(
        socket: Socket,
        peer: SocketAddr,
        connection: Connection,
        identity: DestinationIdentity,
    ) -> Self {
        let opening = Opening::Waiting { identity, from: peer.ip() };
        Self { link: Arc::new(Link::new(socket, connection, opening)), peer }
    }
}

impl Lane for TlsLane {
    fn peer(&self) -> String {
        self.peer.to_string()
    }

    fn split(self: Box<Self>) -> io::Result<LaneHalves> {
        let link = self.link;
        Ok(LaneHalves {
            sender: Box::new(TlsSender { link: Arc::clone(&link), small: Vec::new() }),
            receiver: Box::new(TlsReceiver { link: Arc::clone(&link), received: None }),
            closer: Arc::new(TlsCloser(link)),
        })
    }
}

/// What the halves share.
struct Link {
    socket: Socket,
    /// Locked after `sending`, if both are.
    connection: Mutex<Connection>,
    /// Held while a frame is sent, so that records go out in the order of their numbers.
    sending: Mutex<Outgoing>,
    opening: Mutex<Opening>,
    open: AtomicBool,
    closed: AtomicBool,
}

enum Opening {
    Waiting { identity: DestinationIdentity, from: IpAddr },
    Done(Option<Remainder>),
    Failed(String),
}

impl Link {
    fn new(socket: Socket, connection: Connection, opening: Opening) -> Self {
        let open = matches!(opening, Opening::Done(_));
        Self {
            socket,
            connection: Mutex::new(connection),
            sending: Mutex::default(),
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
        let result = match &*opening {
            Opening::Done(_) => return Ok(()),
            Opening::Failed(why) => return Err(TlsFailure::NeverOpened(why.clone()).into()),
            Opening::Waiting { identity, from } => {
                let deadline = Deadline::starting(Instant::now(), OPENING_LIMIT);
                answer(&mut lock(&self.connection), &self.socket, identity, *from, deadline)
            }
        };
        let rest = match result {
            Ok(rest) => rest,
            Err(failure) => {
                *opening = Opening::Failed(failure.to_string());
                // Nobody has anything more to say; without this, the peer would wait until the lane is dropped.
                let _ = self.socket.shutdown(Shutdown::Write);
                return Err(failure.into());
            }
        };
        without_deadline(&self.socket)?;
        *opening = Opening::Done(Some(rest));
        self.open.store(true, Ordering::Release);
        Ok(())
    }

    /// What came with the opening.
    fn remainder(&self) -> Option<Remainder> {
        match &mut *lock(&self.opening) {
            Opening::Done(rest) => rest.take(),
            _ => None,
        }
    }

    /// Tells the peer that this is the end, if that is possible without waiting for anybody.
    fn say_goodbye(&self) {
        let Ok(mut sending) = self.sending.try_lock() else { return };
        if self.open.load(Ordering::Acquire) && lock(&self.connection).goodbye(&mut sending).is_ok() {
            send_if_possible(&self.socket, sending.bytes());
        }
        sending.clear();
    }

    /// Tells the peer why this side ends the connection, if that is possible without waiting for anybody.
    fn send_alert(&self) {
        let Ok(sending) = self.sending.try_lock() else { return };
        let mut connection = lock(&self.connection);
        while let Ok((_, Next::Again)) = connection.advance(&mut [], &mut |_| ()) {}
        send_if_possible(&self.socket, connection.replies.bytes());
        drop(sending);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if !self.closed.load(Ordering::Acquire) {
            self.say_goodbye();
        }
    }
}

struct TlsSender {
    link: Arc<Link>,
    small: Vec<u8>,
}

impl LaneSender for TlsSender {
    fn send(&mut self, frame: &mut [IoSlice<'_>]) -> io::Result<()> {
        self.link.ensure_open()?;
        let mut sending = lock(&self.link.sending);
        sending.clear();
        self.small.clear();
        let mut post = Post { link: &self.link, outgoing: &mut sending };
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
    outgoing: &'a mut Outgoing,
}

impl Post<'_> {
    fn seal(&mut self, plaintext: &[u8]) -> io::Result<()> {
        for piece in plaintext.chunks(SEND) {
            lock(&self.link.connection).seal(piece, self.outgoing).map_err(TlsFailure::from)?;
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
    link: Arc<Link>,
    received: Option<Received>,
}

impl LaneReceiver for TlsReceiver {
    fn receive(&mut self, frame: &mut FrameBuffer) -> io::Result<()> {
        self.link.ensure_open()?;
        let received = self.received.get_or_insert_with(|| Received::new(self.link.remainder()));
        received.fill(&self.link, frame.prepare(HEADER_LEN)?, true)?;
        let body = frame.announced_body()?;
        received.fill(&self.link, frame.extend(body)?, false)
    }
}

/// Bytes from the peer: records that wait to be decrypted, and what is left of the last one that was.
struct Received {
    incoming: Incoming,
    plaintext: Vec<u8>,
    start: usize,
}

impl Received {
    fn new(rest: Option<Remainder>) -> Self {
        match rest {
            Some(mut rest) => Self { incoming: rest.incoming.moved(RECEIVE), plaintext: rest.plaintext, start: 0 },
            None => Self { incoming: Incoming::new(RECEIVE), plaintext: Vec::new(), start: 0 },
        }
    }

    /// Fills the slice. If the lane ends before its first byte, that is the lane's end in order where a frame begins.
    fn fill(&mut self, link: &Link, into: &mut [u8], begins: bool) -> io::Result<()> {
        let mut filled = self.take(into);
        while filled < into.len() {
            let next = match self.decrypt(link, into, &mut filled) {
                Ok(next) => next,
                Err(error) => {
                    link.send_alert();
                    return Err(TlsFailure::from(error).into());
                }
            };
            let missing = into.len() - filled;
            match next {
                _ if missing == 0 => {}
                Next::Again => {}
                Next::PeerClosed if begins && filled == 0 => return Err(LaneFailure::Closed.into()),
                Next::PeerClosed => return Err(LaneFailure::Cut { missing }.into()),
                Next::Starved => self.receive(link)?,
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

    /// Decrypts what is there until the slice is full.
    fn decrypt(&mut self, link: &Link, into: &mut [u8], filled: &mut usize) -> Result<Next, rustls::Error> {
        let mut connection = lock(&link.connection);
        loop {
            let rest = &mut self.plaintext;
            let mut place = |plaintext: &[u8]| {
                let len = plaintext.len().min(into.len() - *filled);
                let (now, later) = plaintext.split_at(len);
                into[*filled..][..len].copy_from_slice(now);
                *filled += len;
                rest.extend_from_slice(later);
            };
            let (used, next) = connection.advance(self.incoming.unread(), &mut place)?;
            self.incoming.consume(used);
            if next != Next::Again || *filled == into.len() {
                return Ok(next);
            }
        }
    }

    fn receive(&mut self, link: &Link) -> io::Result<()> {
        match self.incoming.receive(&link.socket) {
            Ok(0) if link.closed.load(Ordering::Acquire) => Err(TlsFailure::ClosedHere.into()),
            Ok(0) => Err(TlsFailure::Cut.into()),
            Ok(_) => Ok(()),
            Err(error) => Err(explain(error)),
        }
    }
}

struct TlsCloser(Arc<Link>);

impl LaneCloser for TlsCloser {
    fn close(&self) {
        if !self.0.closed.swap(true, Ordering::AcqRel) {
            self.0.say_goodbye();
        }
        // Fails only where there is no connection left to end.
        let _ = self.0.socket.shutdown(Shutdown::Both);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
