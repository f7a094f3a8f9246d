//! One TLS connection without its socket, until the peer has been let in: records in, plaintext out, and the other way.

use std::sync::Arc;

use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncryptError, InsufficientSizeError, UnbufferedStatus, WriteTraffic,
};
use rustls::{ClientConfig, CommonState, Error, ServerConfig};

use crate::record::{Keys, Opener, Sealer, directions};

/// Plaintext bytes of the longest record.
pub(crate) const RECORD: usize = 16 << 10;

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

    /// Memory for so many bytes more, which are sent only if they are [kept](Self::keep).
    pub(crate) fn room(&mut self, len: usize) -> &mut [u8] {
        let end = self.end + len;
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        &mut self.bytes[self.end..end]
    }

    /// Adds the first bytes of the room.
    pub(crate) fn keep(&mut self, len: usize) {
        self.end += len;
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
    broken: bool,
}

impl Connection {
    pub(crate) fn source(tls: Arc<ClientConfig>, name: ServerName<'static>) -> Result<Self, Error> {
        UnbufferedClientConnection::new(tls, name).map(|connection| Self::new(Side::Source(connection)))
    }

    pub(crate) fn destination(tls: Arc<ServerConfig>) -> Result<Self, Error> {
        UnbufferedServerConnection::new(tls).map(|connection| Self::new(Side::Destination(connection)))
    }

    fn new(side: Side) -> Self {
        Self { side, replies: Outgoing::default(), peer_closed: false, broken: false }
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

    /// Whether the peer has said that it wants the same of this connection. TLS lets it say nothing.
    pub(crate) fn speaks(&self, protocol: &[u8]) -> bool {
        self.state().alpn_protocol() == Some(protocol)
    }

    /// The peer's certificates, its own first.
    pub(crate) fn peer_chain(&self) -> Option<&[CertificateDer<'static>]> {
        self.state().peer_certificates()
    }

    /// Both directions, each for itself. Everything received so far must have been worked on, and everything to send be sent.
    pub(crate) fn into_directions(self) -> Result<(Sealer, Opener), Error> {
        if self.broken || self.peer_closed {
            return Err(unexpected("that has ended"));
        }
        match self.side {
            Side::Source(connection) => {
                let (secrets, keys) = connection.dangerous_into_kernel_connection()?;
                directions(secrets, Keys::Source(keys))
            }
            Side::Destination(connection) => {
                let (secrets, keys) = connection.dangerous_into_kernel_connection()?;
                directions(secrets, Keys::Destination(keys))
            }
        }
    }

    /// Works on received bytes; gives out what was in them, and how many are used up. After an error, `replies` holds
    /// what is to be said to the peer, and the connection is good for nothing more.
    pub(crate) fn advance(
        &mut self,
        incoming: &mut [u8],
        plaintext: &mut impl FnMut(&[u8]),
    ) -> Result<(usize, Next), Error> {
        if self.broken {
            return Err(unexpected("that is broken"));
        }
        let mut used = 0;
        let found = self.step(incoming, &mut used, plaintext).and_then(|next| {
            let held_back = next == Next::Starved && self.is_open() && holds_record(&incoming[used..]);
            // rustls keeps the pieces of a message where they lie until it is whole, and must be shown them at every
            // call: the sending half could not. Nobody splits the few bytes that may come after the handshake.
            if held_back { Err(unexpected("whose peer sends messages in pieces")) } else { Ok(next) }
        });
        if found.is_err() {
            self.broken = true;
            while self.state().wants_write() {
                let mut more = 0;
                match self.step(&mut incoming[used..], &mut more, &mut |_| ()) {
                    Ok(Next::Again) if more == 0 => {}
                    _ => break,
                }
            }
        }
        let next = found?;
        self.peer_closed |= next == Next::PeerClosed;
        let ended = self.peer_closed && next == Next::Starved;
        Ok((used, if ended { Next::PeerClosed } else { next }))
    }

    fn step(
        &mut self,
        incoming: &mut [u8],
        used: &mut usize,
        plaintext: &mut impl FnMut(&[u8]),
    ) -> Result<Next, Error> {
        let replies = &mut self.replies;
        match &mut self.side {
            Side::Source(connection) => read(connection.process_tls_records(incoming), used, plaintext, replies),
            Side::Destination(connection) => read(connection.process_tls_records(incoming), used, plaintext, replies),
        }
    }

    /// Encrypts.
    pub(crate) fn seal(&mut self, plaintext: &[u8], outgoing: &mut Outgoing) -> Result<(), Error> {
        if self.broken {
            return Err(unexpected("that is broken"));
        }
        loop {
            let replies = &mut self.replies;
            let written = match &mut self.side {
                Side::Source(connection) => {
                    write(connection.process_tls_records(&mut []), plaintext, replies, outgoing)
                }
                Side::Destination(connection) => {
                    write(connection.process_tls_records(&mut []), plaintext, replies, outgoing)
                }
            };
            match written? {
                Written::All => return Ok(()),
                Written::Nothing => {}
                Written::PeerClosed => self.peer_closed = true,
            }
        }
    }
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

/// Whether there is a whole record, going by its header.
fn holds_record(bytes: &[u8]) -> bool {
    match bytes {
        [_, _, _, high, low, rest @ ..] => rest.len() >= usize::from(u16::from_be_bytes([*high, *low])),
        _ => false,
    }
}

fn read<D>(
    status: UnbufferedStatus<'_, '_, D>,
    used: &mut usize,
    plaintext: &mut impl FnMut(&[u8]),
    replies: &mut Outgoing,
) -> Result<Next, Error> {
    *used = status.discard;
    let next = match status.state? {
        ConnectionState::ReadTraffic(mut traffic) => {
            while let Some(record) = traffic.next_record() {
                let record = record?;
                plaintext(record.payload);
                *used += record.discard;
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
    Ok(next)
}

fn write<D>(
    status: UnbufferedStatus<'_, '_, D>,
    plaintext: &[u8],
    replies: &mut Outgoing,
    outgoing: &mut Outgoing,
) -> Result<Written, Error> {
    match status.state? {
        ConnectionState::WriteTraffic(traffic) => {
            outgoing.take(replies);
            encrypt(traffic, plaintext, outgoing)?;
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

fn encrypt<D>(mut traffic: WriteTraffic<'_, D>, plaintext: &[u8], outgoing: &mut Outgoing) -> Result<(), Error> {
    let mut room = plaintext.len() + plaintext.len().div_ceil(RECORD) * OVERHEAD + EXTRA;
    loop {
        match traffic.encrypt(plaintext, outgoing.room(room)) {
            Ok(len) => {
                outgoing.keep(len);
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
    replies.keep(len.map_err(|_| Error::EncryptError)?);
    Ok(())
}
