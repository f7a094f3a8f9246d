//! One lane over one stream socket.
//!
//! A frame is sent with one system call. Receiving takes two for a batch of pages and one for a
//! message: a small read fetches the header and whatever follows it at once, and what is missing of
//! a large body then goes straight to where it belongs. Sends never raise SIGPIPE, which would end a
//! VMM that left the signal at its default.

use std::io::{self, IoSlice};
use std::net::{Shutdown, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use pageferry::transport::{Lane, LaneCloser, LaneHalves, LaneReceiver, LaneSender, TransportError};
use pageferry::wire::{FrameBuffer, HEADER_LEN};
use socket2::{Domain, Socket, Type};

use crate::options::TcpOptions;
use crate::sys;

/// Bytes fetched along with a header: covers nearly every message, and is little to copy once more
/// when it turns out to be the beginning of a batch.
const AHEAD: usize = 512;

/// Parts that Linux takes in one call (`UIO_MAXIOV`).
const MAX_PARTS: usize = 1024;

/// Makes a lane of a connected stream socket that the host has opened: an `OwnedFd`, a `TcpStream`,
/// a `UnixStream`. It is made blocking; on TCP the options other than the interface are applied.
pub fn lane_from_fd(fd: impl Into<OwnedFd>, options: &TcpOptions) -> Result<Box<dyn Lane>, TransportError> {
    let fd = fd.into();
    let name = format!("file descriptor {}", fd.as_raw_fd());
    lane_over(fd, format!("the peer at {name}"), options)
}

/// The same, with a name for the peer where the socket's address is none.
pub fn lane_over(fd: impl Into<OwnedFd>, peer: String, options: &TcpOptions) -> Result<Box<dyn Lane>, TransportError> {
    let fd = fd.into();
    let name = format!("a lane over file descriptor {}", fd.as_raw_fd());
    match adopt(fd.into(), peer, options) {
        Ok(lane) => Ok(Box::new(lane)),
        Err(source) => Err(TransportError::Option { option: name, source }),
    }
}

fn adopt(socket: Socket, peer: String, options: &TcpOptions) -> io::Result<SocketLane> {
    if socket.r#type()? != Type::STREAM {
        return Err(LaneFailure::NotAStream.into());
    }
    let address = socket.peer_addr()?;
    socket.set_nonblocking(false)?;
    socket.set_read_timeout(None)?;
    socket.set_write_timeout(None)?;
    if matches!(socket.domain()?, Domain::IPV4 | Domain::IPV6) {
        options.apply(&socket)?;
    }
    let peer = address.as_socket().map_or(peer, |address| address.to_string());
    Ok(SocketLane::new(socket, peer))
}

/// What went wrong on a lane, where the host's own words do not say it to a user.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LaneFailure {
    /// The descriptor handed in cannot be a lane.
    #[error("not a stream socket; hand in a connected TCP or Unix stream socket")]
    NotAStream,
    /// The peer ended the lane in order.
    #[error("the peer closed the connection")]
    Closed,
    /// The peer ended the lane within a frame.
    #[error("the peer closed the connection within a frame, {missing} bytes before its end")]
    Cut {
        /// Bytes that never came.
        missing: usize,
    },
    /// The peer's kernel ended the lane.
    #[error("the peer's process has died or dropped the connection ({0})")]
    Reset(io::Error),
    /// The peer's host does not answer any more.
    #[error("the peer acknowledges nothing any more: its host is down, hung or cut off ({0})")]
    Dead(io::Error),
}

impl From<LaneFailure> for io::Error {
    fn from(failure: LaneFailure) -> Self {
        let kind = match &failure {
            LaneFailure::NotAStream => io::ErrorKind::InvalidInput,
            LaneFailure::Closed | LaneFailure::Cut { .. } => io::ErrorKind::UnexpectedEof,
            LaneFailure::Reset(cause) | LaneFailure::Dead(cause) => cause.kind(),
        };
        Self::new(kind, failure)
    }
}

/// Puts what the host said about a connected socket into words, where it has none that a user would understand.
pub fn explain(error: io::Error) -> io::Error {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, HostUnreachable, NetworkUnreachable, TimedOut};
    match error.kind() {
        BrokenPipe | ConnectionReset => LaneFailure::Reset(error).into(),
        HostUnreachable | NetworkUnreachable | TimedOut => LaneFailure::Dead(error).into(),
        _ => error,
    }
}

/// A connected TCP socket that blocks.
#[derive(Debug)]
pub struct Connection {
    /// The socket.
    pub socket: Socket,
    /// The other end.
    pub peer: SocketAddr,
}

impl From<Connection> for SocketLane {
    fn from(Connection { socket, peer }: Connection) -> Self {
        Self::new(socket, peer.to_string())
    }
}

/// A connected stream socket.
#[derive(Debug)]
pub(crate) struct SocketLane {
    socket: Socket,
    peer: String,
}

impl SocketLane {
    pub(crate) fn new(socket: Socket, peer: String) -> Self {
        Self { socket, peer }
    }
}

impl Lane for SocketLane {
    fn peer(&self) -> String {
        self.peer.clone()
    }

    fn split(self: Box<Self>) -> io::Result<LaneHalves> {
        let socket = Arc::new(self.socket);
        Ok(LaneHalves {
            sender: Box::new(SocketSender(Arc::clone(&socket))),
            receiver: Box::new(SocketReceiver::new(Arc::clone(&socket))),
            closer: Arc::new(SocketCloser(socket)),
        })
    }
}

struct SocketSender(Arc<Socket>);

impl LaneSender for SocketSender {
    fn send(&mut self, frame: &mut [IoSlice<'_>]) -> io::Result<()> {
        let mut left = frame;
        IoSlice::advance_slices(&mut left, 0);
        while !left.is_empty() {
            let parts = left.len().min(MAX_PARTS);
            match self.0.send_vectored_with_flags(&left[..parts], libc::MSG_NOSIGNAL) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(sent) => IoSlice::advance_slices(&mut left, sent),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(explain(error)),
            }
        }
        Ok(())
    }
}

struct SocketReceiver {
    socket: Arc<Socket>,
    /// Bytes received and not yet given out.
    ahead: [u8; AHEAD],
    start: usize,
    end: usize,
}

impl SocketReceiver {
    fn new(socket: Arc<Socket>) -> Self {
        Self { socket, ahead: [0; AHEAD], start: 0, end: 0 }
    }

    /// Fetches until a whole header is there; `Closed` if the stream ends before its first byte.
    fn fetch_header(&mut self) -> io::Result<()> {
        self.ahead.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        while self.end < HEADER_LEN {
            match receive(&self.socket, &mut self.ahead[self.end..], false)? {
                0 if self.end == 0 => return Err(LaneFailure::Closed.into()),
                0 => return Err(LaneFailure::Cut { missing: HEADER_LEN - self.end }.into()),
                received => self.end += received,
            }
        }
        Ok(())
    }

    /// Gives out what is there, as far as it goes.
    fn take(&mut self, into: &mut [u8]) -> usize {
        let len = into.len().min(self.end - self.start);
        into[..len].copy_from_slice(&self.ahead[self.start..][..len]);
        self.start += len;
        len
    }

    fn fill(&mut self, into: &mut [u8]) -> io::Result<()> {
        let mut filled = self.take(into);
        while filled < into.len() {
            match receive(&self.socket, &mut into[filled..], true)? {
                0 => return Err(LaneFailure::Cut { missing: into.len() - filled }.into()),
                received => filled += received,
            }
        }
        Ok(())
    }
}

impl LaneReceiver for SocketReceiver {
    fn receive(&mut self, frame: &mut FrameBuffer) -> io::Result<()> {
        self.fetch_header()?;
        self.fill(frame.prepare(HEADER_LEN)?)?;
        let body = frame.announced_body()?;
        self.fill(frame.extend(body)?)
    }
}

fn receive(socket: &Socket, into: &mut [u8], whole: bool) -> io::Result<usize> {
    loop {
        match sys::receive(socket.as_fd(), into, whole) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(explain(error)),
            Ok(received) => return Ok(received),
        }
    }
}

struct SocketCloser(Arc<Socket>);

impl LaneCloser for SocketCloser {
    fn close(&self) {
        // Fails only where there is no connection left to end.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}
