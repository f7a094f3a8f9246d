//! What goes wrong with connections and lanes, and what to do about it.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use pageferry_tcp::DialFailure;
use pageferry_tls::{CertificateFlaw, TlsFailure};
use quinn::{ConnectionError, ReadError, TransportErrorCode, WriteError};

/// Why a connection does not become one, or a lane ends.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QuicFailure {
    /// The target is no address.
    #[error(transparent)]
    Address(#[from] DialFailure),
    /// Who we are, or who the peer is.
    #[error(transparent)]
    Identity(#[from] TlsFailure),
    /// Nobody answers.
    #[error(
        "{address} did not answer within {timeout:?}: is the receiver running there with QUIC, and does every firewall let UDP through?"
    )]
    NoAnswer {
        /// The address that was tried.
        address: SocketAddr,
        /// For how long.
        timeout: Duration,
    },
    /// The peer has all the connections that it takes.
    #[error("the receiver takes no more connections")]
    Busy,
    /// The connection was let in and opens no lane.
    #[error("the receiver opened no lane within {0:?}")]
    NoLane(Duration),
    /// The connection cannot be begun.
    #[error("cannot begin a connection: {0}")]
    Begin(#[from] quinn::ConnectError),
    /// The peer does not answer any more.
    #[error("the peer is silent: its host is down, hung or cut off")]
    Dead,
    /// The peer ended the lane or the connection in order.
    #[error("the peer closed the lane")]
    Closed,
    /// The peer ended the lane within a frame.
    #[error("the peer closed the lane within a frame, {missing} bytes before its end")]
    Cut {
        /// Bytes that never came.
        missing: usize,
    },
    /// The peer does not read any more.
    #[error("the peer has closed the lane, or its process has died")]
    Stopped,
    /// The lane was closed on this side.
    #[error("the lane was closed")]
    ClosedHere,
    /// The peer's process has died and was started anew, or broke the rules.
    #[error("the connection was lost: {0}")]
    Lost(ConnectionError),
    /// This side's socket.
    #[error("the socket: {0}")]
    Socket(io::Error),
}

/// Code with which a destination ends connections beyond those it takes.
pub(crate) const BUSY: u32 = 1;

impl QuicFailure {
    /// A failed handshake, with what was found wrong with the peer's certificate.
    pub(crate) fn of_handshake(
        error: ConnectionError,
        flaw: Option<CertificateFlaw>,
        address: SocketAddr,
        timeout: Duration,
    ) -> Self {
        match (&error, flaw) {
            (_, Some(flaw)) => TlsFailure::PeerCertificate(flaw).into(),
            (ConnectionError::TimedOut, _) => Self::NoAnswer { address, timeout },
            (ConnectionError::ConnectionClosed(close), _)
                if close.error_code == TransportErrorCode::CONNECTION_REFUSED =>
            {
                Self::Busy
            }
            (ConnectionError::TransportError(_) | ConnectionError::ConnectionClosed(_), _) => {
                Self::of_alert(&error).unwrap_or(Self::Lost(error))
            }
            _ => error.into(),
        }
    }

    /// What the handshake's alert says, if that is what ended the connection.
    fn of_alert(error: &ConnectionError) -> Option<Self> {
        let code = match error {
            ConnectionError::ConnectionClosed(close) => close.error_code,
            ConnectionError::TransportError(error) => error.code,
            _ => return None,
        };
        let alert = u64::from(code).checked_sub(0x100).and_then(|alert| u8::try_from(alert).ok())?;
        TlsFailure::of_alert(alert.into()).map(Self::Identity)
    }

    fn kind(&self) -> io::ErrorKind {
        match self {
            Self::Address(_) | Self::Begin(_) => io::ErrorKind::InvalidInput,
            Self::Identity(_) => io::ErrorKind::PermissionDenied,
            Self::NoAnswer { .. } | Self::NoLane(_) | Self::Dead => io::ErrorKind::TimedOut,
            Self::Busy => io::ErrorKind::ConnectionRefused,
            Self::Closed | Self::Cut { .. } => io::ErrorKind::UnexpectedEof,
            Self::Stopped | Self::Lost(_) => io::ErrorKind::ConnectionReset,
            Self::ClosedHere => io::ErrorKind::NotConnected,
            Self::Socket(error) => error.kind(),
        }
    }
}

impl From<ConnectionError> for QuicFailure {
    fn from(error: ConnectionError) -> Self {
        match &error {
            ConnectionError::TimedOut => Self::Dead,
            ConnectionError::LocallyClosed => Self::ClosedHere,
            ConnectionError::ApplicationClosed(close) if close.error_code == BUSY.into() => Self::Busy,
            ConnectionError::ApplicationClosed(_) => Self::Closed,
            _ => Self::of_alert(&error).unwrap_or(Self::Lost(error)),
        }
    }
}

impl From<WriteError> for QuicFailure {
    fn from(error: WriteError) -> Self {
        match error {
            WriteError::ConnectionLost(error) => error.into(),
            WriteError::Stopped(_) => Self::Stopped,
            _ => Self::ClosedHere,
        }
    }
}

impl From<ReadError> for QuicFailure {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::ConnectionLost(error) => error.into(),
            ReadError::Reset(_) => Self::Closed,
            _ => Self::ClosedHere,
        }
    }
}

impl From<QuicFailure> for io::Error {
    fn from(failure: QuicFailure) -> Self {
        Self::new(failure.kind(), failure)
    }
}
