//! The accepting end. It hands connections out before their callers have said a word: each handshake has a thread of its
//! own, as far as their number is bounded, and otherwise that of whoever uses the lane. The engine ends callers that
//! take too long or are too many.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use pageferry::host::{Spawner, StdSpawner, ThreadRole};
use pageferry::transport::{Acceptor, Capabilities, Lane, TransportError};
use pageferry_tcp::{Connection as TcpConnection, TcpAcceptor, TcpOptions};

use crate::capabilities;
use crate::connection::Connection;
use crate::error::TlsFailure;
use crate::identity::DestinationIdentity;
use crate::lane::TlsLane;

/// Handshakes that have a thread of their own at once: all lanes of the largest migration.
const MAX_OPENINGS: usize = 256;

/// Listens on one address.
pub struct TlsAcceptor {
    tcp: TcpAcceptor,
    identity: DestinationIdentity,
    openings: Arc<AtomicUsize>,
    spawner: Arc<dyn Spawner>,
}

impl std::fmt::Debug for TlsAcceptor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsAcceptor").field("tcp", &self.tcp).finish_non_exhaustive()
    }
}

impl TlsAcceptor {
    /// Listens on `host:port`, `192.0.2.1:port` or `[::]:port` (which takes IPv4 as well). Port 0 lets the host choose
    /// one: see [`local_addr`](Self::local_addr).
    pub fn bind(address: &str, options: TcpOptions, identity: DestinationIdentity) -> Result<Self, TransportError> {
        let tcp = TcpAcceptor::bind(address, options)?;
        Ok(Self { tcp, identity, openings: Arc::default(), spawner: Arc::new(StdSpawner) })
    }

    /// Runs the threads of handshakes on the host's terms.
    #[must_use]
    pub fn with_spawner(mut self, spawner: Arc<dyn Spawner>) -> Self {
        self.spawner = spawner;
        self
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.tcp.local_addr()
    }

    fn lane(&self, connection: TcpConnection) -> Result<TlsLane, TlsFailure> {
        let tls = Connection::destination(self.identity.tls())?;
        Ok(TlsLane::waiting(connection.socket, connection.peer, tls, self.identity.clone()))
    }

    /// Lets a thread do the handshake, if there is one to spare: the source waits for it, and whoever has the lane here
    /// may wait for the source.
    fn begin_opening(&self, lane: &TlsLane) {
        let (open, openings) = (lane.opener(), Arc::clone(&self.openings));
        if openings.fetch_add(1, Ordering::AcqRel) >= MAX_OPENINGS {
            openings.fetch_sub(1, Ordering::AcqRel);
            return;
        }
        let under_way = Arc::clone(&openings);
        let shake_hands = move || {
            open();
            under_way.fetch_sub(1, Ordering::AcqRel);
        };
        if self.spawner.spawn(ThreadRole::Transport("tls"), Box::new(shake_hands)).is_err() {
            openings.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

impl Acceptor for TlsAcceptor {
    fn accept(&self, timeout: Duration) -> Result<Option<Box<dyn Lane>>, TransportError> {
        let Some(connection) = self.tcp.accept_connection(timeout)? else { return Ok(None) };
        match self.lane(connection) {
            Ok(lane) => {
                self.begin_opening(&lane);
                Ok(Some(Box::new(lane)))
            }
            Err(failure) => {
                Err(TransportError::Accept { local: self.local_addr().to_string(), source: failure.into() })
            }
        }
    }

    fn capabilities(&self) -> Capabilities {
        capabilities()
    }
}
