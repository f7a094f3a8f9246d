//! What stands before the first frame: the handshake, the proof, the verdict.
//!
//! Until a peer has been let in it may have nothing but a deadline and a few KiB of buffer.

use std::io;
use std::net::IpAddr;
use std::time::Instant;

use socket2::Socket;

use crate::connection::{Connection, Next};
use crate::error::TlsFailure;
use crate::identity::{DestinationIdentity, verdict_byte, verdict_of};
use crate::socket::{Deadline, Incoming, send_all, send_if_possible};

/// Bytes of buffer at first: enough for one certificate of each side.
const FIRST_BUFFER: usize = 4 << 10;

/// Bytes of buffer at most. No handshake message of an honest peer is longer: this is a chain of ten large certificates.
const MAX_BUFFER: usize = 32 << 10;

/// What has been received beyond the opening.
pub(crate) struct Remainder {
    pub(crate) incoming: Incoming,
    pub(crate) plaintext: Vec<u8>,
}

/// The source's side. When it returns, the destination has let us in.
pub(crate) fn ask(
    connection: &mut Connection,
    socket: &Socket,
    proof: &[u8],
    deadline: Deadline,
) -> Result<Remainder, TlsFailure> {
    let mut opening = Opening::new(connection, socket, deadline);
    opening.pump(|connection, _| connection.is_open())?;
    opening.say(proof)?;
    opening.pump(|_, plaintext| !plaintext.is_empty())?;
    verdict_of(opening.plaintext.remove(0)).map_err(TlsFailure::Refused)?;
    Ok(opening.remainder())
}

/// The destination's side. When it returns, the source has been told that it is let in.
pub(crate) fn answer(
    connection: &mut Connection,
    socket: &Socket,
    identity: &DestinationIdentity,
    from: IpAddr,
    deadline: Deadline,
) -> Result<Remainder, TlsFailure> {
    let proof_len = identity.proof_len();
    let mut opening = Opening::new(connection, socket, deadline);
    opening.pump(|connection, plaintext| connection.is_open() && plaintext.len() >= proof_len)?;
    let proof: Vec<u8> = opening.plaintext.drain(..proof_len).collect();
    let verdict = identity.judge(&proof, opening.connection.peer_chain(), from, Instant::now());
    opening.say(&[verdict_byte(verdict)])?;
    verdict.map_err(TlsFailure::Refused)?;
    Ok(opening.remainder())
}

struct Opening<'a> {
    connection: &'a mut Connection,
    socket: &'a Socket,
    deadline: Deadline,
    incoming: Incoming,
    plaintext: Vec<u8>,
}

impl<'a> Opening<'a> {
    fn new(connection: &'a mut Connection, socket: &'a Socket, deadline: Deadline) -> Self {
        Self { connection, socket, deadline, incoming: Incoming::new(FIRST_BUFFER), plaintext: Vec::new() }
    }

    fn remainder(self) -> Remainder {
        Remainder { incoming: self.incoming, plaintext: self.plaintext }
    }

    /// Goes on until this much has happened.
    fn pump(&mut self, enough: impl Fn(&Connection, &[u8]) -> bool) -> Result<(), TlsFailure> {
        loop {
            let plaintext = &mut self.plaintext;
            let found = self.connection.advance(self.incoming.unread(), &mut |bytes| plaintext.extend(bytes));
            let (used, next) = match found {
                Ok(found) => found,
                Err(error) => {
                    self.tell_why();
                    return Err(error.into());
                }
            };
            self.incoming.consume(used);
            if next == Next::Again {
                continue;
            }
            self.flush()?;
            if enough(self.connection, &self.plaintext) {
                return Ok(());
            }
            if next == Next::PeerClosed {
                return Err(TlsFailure::Ended);
            }
            self.receive()?;
        }
    }

    fn say(&mut self, plaintext: &[u8]) -> Result<(), TlsFailure> {
        if plaintext.is_empty() {
            return Ok(());
        }
        // Into the replies, so that one place sends.
        let mut sealed = std::mem::take(&mut self.connection.replies);
        let result = self.connection.seal(plaintext, &mut sealed);
        self.connection.replies = sealed;
        result?;
        self.flush()
    }

    fn flush(&mut self) -> Result<(), TlsFailure> {
        if self.connection.replies.bytes().is_empty() {
            return Ok(());
        }
        self.deadline.enforce(self.socket)?;
        let sent = send_all(self.socket, self.connection.replies.bytes());
        self.connection.replies.clear();
        sent.map_err(|error| self.failed(&error))
    }

    fn receive(&mut self) -> Result<(), TlsFailure> {
        if self.incoming.is_full() {
            if self.incoming.capacity() >= MAX_BUFFER {
                return Err(TlsFailure::Oversized(MAX_BUFFER));
            }
            self.incoming = self.incoming.moved(self.incoming.capacity() * 2);
        }
        self.deadline.enforce(self.socket)?;
        match self.incoming.receive(self.socket) {
            Ok(0) => Err(TlsFailure::Ended),
            Ok(_) => Ok(()),
            Err(error) => Err(self.failed(&error)),
        }
    }

    fn failed(&self, error: &io::Error) -> TlsFailure {
        match error.kind() {
            io::ErrorKind::WouldBlock => self.deadline.missed(),
            _ => TlsFailure::Ended,
        }
    }

    /// Sends the alert that the connection has made of its error.
    fn tell_why(&mut self) {
        while let Ok((_, Next::Again)) = self.connection.advance(&mut [], &mut |_| ()) {}
        send_if_possible(self.socket, self.connection.replies.bytes());
    }
}
