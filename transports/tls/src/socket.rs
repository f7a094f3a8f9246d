//! Moving bytes over the socket, and the received ones that wait to be worked on.

use std::io::{self, Read};
use std::time::{Duration, Instant};

use pageferry_tcp::explain;
use socket2::Socket;

use crate::error::TlsFailure;

/// Sends all bytes; blocks while the peer does not read.
pub(crate) fn send_all(socket: &Socket, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match socket.send_with_flags(bytes, libc::MSG_NOSIGNAL) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(sent) => bytes = &bytes[sent..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(explain(error)),
        }
    }
    Ok(())
}

/// Sends bytes if that is possible at once: what is said to a peer that may not listen any more.
pub(crate) fn send_if_possible(socket: &Socket, bytes: &[u8]) {
    if !bytes.is_empty() {
        let _ = socket.send_with_flags(bytes, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT);
    }
}

/// Received bytes: a buffer that is filled at its end and used up from its start.
pub(crate) struct Incoming {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Incoming {
    pub(crate) fn new(capacity: usize) -> Self {
        Self { bytes: vec![0; capacity], start: 0, end: 0 }
    }

    /// The same bytes in a buffer of another capacity, or a larger one if they need it.
    pub(crate) fn moved(&mut self, capacity: usize) -> Self {
        let unread = self.unread();
        let mut bytes = vec![0; capacity.max(unread.len())];
        bytes[..unread.len()].copy_from_slice(unread);
        let end = unread.len();
        Self { bytes, start: 0, end }
    }

    pub(crate) fn unread(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.end]
    }

    pub(crate) fn consume(&mut self, len: usize) {
        self.start += len;
    }

    pub(crate) fn capacity(&self) -> usize {
        self.bytes.len()
    }

    /// Whether not a byte more can be received before some are used up.
    pub(crate) fn is_full(&self) -> bool {
        self.end - self.start == self.bytes.len()
    }

    /// Waits for more bytes and returns how many have come; 0 at the end of the stream.
    pub(crate) fn receive(&mut self, socket: &Socket) -> io::Result<usize> {
        // What is left is less than a record.
        self.bytes.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        loop {
            match (&*socket).read(&mut self.bytes[self.end..]) {
                Ok(received) => {
                    self.end += received;
                    return Ok(received);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// When an exchange must be over.
#[derive(Clone, Copy)]
pub(crate) struct Deadline {
    started: Instant,
    limit: Duration,
}

impl Deadline {
    pub(crate) fn starting(started: Instant, limit: Duration) -> Self {
        Self { started, limit }
    }

    /// Lets the next calls on the socket take what is left of the time.
    pub(crate) fn enforce(self, socket: &Socket) -> Result<(), TlsFailure> {
        let left = self.limit.saturating_sub(self.started.elapsed());
        if left.is_zero() {
            return Err(self.missed());
        }
        // Zero would be no limit at all.
        let left = Some(left.max(Duration::from_millis(1)));
        let set = socket.set_read_timeout(left).and_then(|()| socket.set_write_timeout(left));
        set.map_err(|_| TlsFailure::Ended)
    }

    pub(crate) fn missed(self) -> TlsFailure {
        TlsFailure::Silent(self.limit)
    }
}

/// Takes the limits off again.
pub(crate) fn without_deadline(socket: &Socket) -> io::Result<()> {
    socket.set_read_timeout(None)?;
    socket.set_write_timeout(None)
}
