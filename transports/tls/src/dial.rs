//! The dialling end.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use pageferry::transport::{Capabilities, Dialer, Lane, LaneRole, TransportError};
use pageferry_tcp::{Connection as TcpConnection, TcpDialer, TcpOptions};

use crate::capabilities;
use crate::connection::Connection;
use crate::error::TlsFailure;
use crate::identity::SourceIdentity;
use crate::lane::TlsLane;
use crate::opening::ask;
use crate::socket::{Deadline, without_deadline};

/// Opens TLS connections to one destination. Each is its own handshake; when a lane is handed out, the destination has
/// let it in.
#[derive(Debug)]
pub struct TlsDialer {
    tcp: TcpDialer,
    identity: SourceIdentity,
}

impl TlsDialer {
    /// A dialer to `host:port`, `192.0.2.1:port` or `[2001:db8::1]:port`.
    pub fn new(target: impl Into<String>, options: TcpOptions, identity: SourceIdentity) -> Self {
        Self { tcp: TcpDialer::new(target, options), identity }
    }

    /// Connects from this address of the local host, and so over its network.
    #[must_use]
    pub fn with_source(mut self, address: IpAddr) -> Self {
        self.tcp = self.tcp.with_source(address);
        self
    }

    fn open(&self, connection: TcpConnection, deadline: Deadline) -> Result<TlsLane, TlsFailure> {
        let TcpConnection { socket, peer } = connection;
        let name = self.identity.server_name(self.tcp.target())?;
        let mut tls = Connection::source(self.identity.tls(), name)?;
        let rest = ask(&mut tls, &socket, self.identity.proof(), deadline)?;
        without_deadline(&socket).map_err(|_| TlsFailure::Ended)?;
        Ok(TlsLane::open(socket, peer, tls, rest)?)
    }
}

impl Dialer for TlsDialer {
    fn dial(&self, _role: LaneRole, timeout: Duration) -> Result<Box<dyn Lane>, TransportError> {
        let deadline = Deadline::starting(Instant::now(), timeout);
        let connection = self.tcp.connect(timeout)?;
        match self.open(connection, deadline) {
            Ok(lane) => Ok(Box::new(lane)),
            Err(failure) => Err(TransportError::Dial { peer: self.tcp.target().to_owned(), source: failure.into() }),
        }
    }

    fn capabilities(&self) -> Capabilities {
        capabilities()
    }
}
