//! The accepting end. It hands connections out before their callers have said a word: the handshake is done by whoever
//! uses the lane, under the bounds that the engine sets to callers that it does not know.

use std::net::SocketAddr;
use std::time::Duration;

use pageferry::transport::{Acceptor, Capabilities, Lane, TransportError};
use pageferry_tcp::{Connection as TcpConnection, TcpAcceptor, TcpOptions};

use crate::capabilities;
use crate::connection::Connection;
use crate::error::TlsFailure;
use crate::identity::DestinationIdentity;
use crate::lane::TlsLane;

/// Listens on one address.
#[derive(Debug)]
pub struct TlsAcceptor {
    tcp: TcpAcceptor,
    identity: DestinationIdentity,
}

impl TlsAcceptor {
    /// Listens on `host:port`, `192.0.2.1:port` or `[::]:port` (which takes IPv4 as well). Port 0 lets the host choose
    /// one: see [`local_addr`](Self::local_addr).
    pub fn bind(address: &str, options: TcpOptions, identity: DestinationIdentity) -> Result<Self, TransportError> {
        Ok(Self { tcp: TcpAcceptor::bind(address, options)?, identity })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.tcp.local_addr()
    }

    fn lane(&self, connection: TcpConnection) -> Result<TlsLane, TlsFailure> {
        let tls = Connection::destination(self.identity.tls())?;
        Ok(TlsLane::waiting(connection.socket, connection.peer, tls, self.identity.clone()))
    }
}

impl Acceptor for TlsAcceptor {
    fn accept(&self, timeout: Duration) -> Result<Option<Box<dyn Lane>>, TransportError> {
        let Some(connection) = self.tcp.accept_connection(timeout)? else { return Ok(None) };
        match self.lane(connection) {
            Ok(lane) => Ok(Some(Box::new(lane))),
            Err(failure) => {
                Err(TransportError::Accept { local: self.local_addr().to_string(), source: failure.into() })
            }
        }
    }

    fn capabilities(&self) -> Capabilities {
        capabilities()
    }
}
