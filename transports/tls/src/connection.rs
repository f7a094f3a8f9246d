//! One TLS connection without its socket: records in, plaintext out, and the other way.
//!
//! It is rustls' interface without buffers of its own, so that a frame is encrypted into one buffer that goes out with
//! one system call, and received records are decrypted where they lie.

use std::sync::Arc;

use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncryptError, InsufficientSizeError, UnbufferedStatus, WriteTraffic,
};
use rustls::{ClientConfig, CommonState, Error, ServerConfig};

/// Plaintext bytes of the longest record.
const RECORD: usize = 16 << 10;

/// More bytes than a record's header, content type and tag take.
const OVERHEAD: usize = 32;

/// More bytes than the records take that may come before data: a change of keys, an alert.
const EXTRA: usize = 512;

/// A buffer of bytes to send, kept for its memory.
#[derive(Default)]
pub(crate) struct Outgoing {
    bytes: Vec<u8>,
    end: usize,
}

impl Outgoing {
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.end]
    }

    pub(crate) fn clear(&mut self) {
        self.end = 0;
    }

    fn room(&mut self, len: usize) -> &mut [u8] {
        let end = self.end + len;
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        &mut self.bytes[self.end..end]
    }

    /// Takes over what `from` holds.
    fn take(&mut self, from: &mut Self) {
        let len = from.end;
        self.room(len).copy_from_slice(from.bytes());
        self.end += len;
        from.clear();
    }
}

/// What has to happen next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Next {
    /// Call again.
    Again,
    /// Bring more bytes.
    Starved,
    /// The peer has said that it will send no more.
    PeerClosed,
}

enum Side {
    Source(UnbufferedClientConnection),
    Destination(UnbufferedServerConnection),
}

/// A connection of either side.
pub(crate) struct Connection {
    side: Side,
    /// Records that the connection wants sent before anything else.
    pub(crate) replies: Outgoing,
    peer_closed: bool,
}

impl Connection {
    pub(crate) fn source(tls: Arc<ClientConfig>, name: ServerName<'static>) -> Result<Self, Error> {
        UnbufferedClientConnection::new(tls, name).map(|connection| Self::new(Side::Source(connection)))
    }

    pub(crate) fn destination(tls: Arc<ServerConfig>) -> Result<Self, Error> {
        UnbufferedServerConnection::new(tls).map(|connection| Self::new(Side::Destination(connection)))
    }

    fn new(side: Side) -> Self {
        Self { side, replies: Outgoing::default(), peer_closed: false }
    }

    fn state(&self) -> &CommonState {
        match &self.side {
            Side::Source(connection) => connection,
            Side::Destination(connection) => connection,
        }
    }

    /// Whether both ends have finished the handshake.
    pub(crate) fn is_open(&self) -> bool {
        !self.state().is_handshaking()
    }

    /// The peer's certificates, its own first.
    pub(crate) fn peer_chain(&self) -> Option<&[CertificateDer<'static>]> {
        self.state().peer_certificates()
    }

    /// Works on received bytes; gives out what was in them, and how many are used up.
    pub(crate) fn advance(
        &mut self,
        incoming: &mut [u8],
        plaintext: &mut impl FnMut(&[u8]),
    ) -> Result<(usize, Next), Error> {
        let replies = &mut self.replies;
        let (used, next) = match &mut self.side {
            Side::Source(connection) => read(connection.process_tls_records(incoming), plaintext, replies),
            Side::Destination(connection) => read(connection.process_tls_records(incoming), plaintext, replies),
        }?;
        self.peer_closed |= next == Next::PeerClosed;
        let ended = self.peer_closed && next == Next::Starved;
        Ok((used, if ended { Next::PeerClosed } else { next }))
    }

    /// Encrypts.
    pub(crate) fn seal(&mut self, plaintext: &[u8], outgoing: &mut Outgoing) -> Result<(), Error> {
        self.write(Job::Seal(plaintext), outgoing)
    }

    /// Says that no more will come.
    pub(crate) fn goodbye(&mut self, outgoing: &mut Outgoing) -> Result<(), Error> {
        self.write(Job::Goodbye, outgoing)
    }

    fn write(&mut self, job: Job<'_>, outgoing: &mut Outgoing) -> Result<(), Error> {
        loop {
            let replies = &mut self.replies;
            let written = match &mut self.side {
                Side::Source(connection) => write(connection.process_tls_records(&mut []), job, replies, outgoing),
                Side::Destination(connection) => write(connection.process_tls_records(&mut []), job, replies, outgoing),
            };
            match written? {
                Written::All => return Ok(()),
                Written::Nothing => {}
                Written::PeerClosed => self.peer_closed = true,
            }
        }
    }
}

/// What to write.
#[derive(Clone, Copy)]
enum Job<'a> {
    Seal(&'a [u8]),
    Goodbye,
}

/// What has been written.
enum Written {
    All,
    Nothing,
    PeerClosed,
}

fn unexpected(state: &str) -> Error {
    Error::General(format!("a connection {state}"))
}

fn read<D>(
    status: UnbufferedStatus<'_, '_, D>,
    plaintext: &mut impl FnMut(&[u8]),
    replies: &mut Outgoing,
) -> Result<(usize, Next), Error> {
    let mut used = status.discard;
    let next = match status.state? {
        ConnectionState::ReadTraffic(mut traffic) => {
            while let Some(record) = traffic.next_record() {
                let record = record?;
                plaintext(record.payload);
                used += record.discard;
            }
            Next::Again
        }
        ConnectionState::EncodeTlsData(mut data) => {
            encode(|room| data.encode(room), replies)?;
            Next::Again
        }
        ConnectionState::TransmitTlsData(data) => {
            data.done();
            Next::Again
        }
        ConnectionState::BlockedHandshake | ConnectionState::WriteTraffic(_) => Next::Starved,
        ConnectionState::PeerClosed | ConnectionState::Closed => Next::PeerClosed,
        _ => return Err(unexpected("with early data")),
    };
    Ok((used, next))
}

fn write<D>(
    status: UnbufferedStatus<'_, '_, D>,
    job: Job<'_>,
    replies: &mut Outgoing,
    outgoing: &mut Outgoing,
) -> Result<Written, Error> {
    match status.state? {
        ConnectionState::WriteTraffic(traffic) => {
            outgoing.take(replies);
            perform(traffic, job, outgoing)?;
            Ok(Written::All)
        }
        ConnectionState::EncodeTlsData(mut data) => {
            encode(|room| data.encode(room), replies)?;
            Ok(Written::Nothing)
        }
        ConnectionState::TransmitTlsData(data) => {
            data.done();
            Ok(Written::Nothing)
        }
        ConnectionState::PeerClosed => Ok(Written::PeerClosed),
        ConnectionState::Closed => Err(unexpected("that both ends have closed")),
        _ => Err(unexpected("that is not open")),
    }
}

fn perform<D>(mut traffic: WriteTraffic<'_, D>, job: Job<'_>, outgoing: &mut Outgoing) -> Result<(), Error> {
    let mut room = match job {
        Job::Seal(plaintext) => plaintext.len() + plaintext.len().div_ceil(RECORD) * OVERHEAD + EXTRA,
        Job::Goodbye => EXTRA,
    };
    loop {
        let space = outgoing.room(room);
        let written = match job {
            Job::Seal(plaintext) => traffic.encrypt(plaintext, space),
            Job::Goodbye => traffic.queue_close_notify(space),
        };
        match written {
            Ok(len) => {
                outgoing.end += len;
                return Ok(());
            }
            Err(EncryptError::InsufficientSize(InsufficientSizeError { required_size })) if required_size > room => {
                room = required_size;
            }
            Err(_) => return Err(Error::EncryptError),
        }
    }
}

/// Takes over a record that is ready, however long it is.
fn encode(
    mut encode: impl FnMut(&mut [u8]) -> Result<usize, EncodeError>,
    replies: &mut Outgoing,
) -> Result<(), Error> {
    let len = match encode(replies.room(0)) {
        Err(EncodeError::InsufficientSize(InsufficientSizeError { required_size })) => {
            encode(replies.room(required_size))
        }
        other => other,
    };
    replies.end += len.map_err(|_| Error::EncryptError)?;
    Ok(())
}
