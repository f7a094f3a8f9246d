//! The dialling end.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pageferry::transport::{Capabilities, Dialer, Lane, LaneRole, TransportError};
use pageferry_tcp::{DialFailure, resolve};
use pageferry_tls::{FlawNote, SourceIdentity, TlsFailure, verdict_of};
use quinn::{Connection, VarInt};

use crate::capabilities;
use crate::config;
use crate::error::QuicFailure;
use crate::host::{Host, IN_ORDER};
use crate::lane::QuicLane;
use crate::options::QuicOptions;

/// Opens lanes on one connection to one destination; on a new connection when the last one has died.
#[derive(Debug)]
pub struct QuicDialer {
    target: String,
    options: QuicOptions,
    identity: SourceIdentity,
    state: Mutex<State>,
}

#[derive(Default, Debug)]
struct State {
    /// Where to send from.
    source: Option<SocketAddr>,
    host: Option<Arc<Host>>,
    connection: Option<Connection>,
    /// The address that answered first serves for the life of the dialer, so that a later question who owns the guest
    /// reaches the same host.
    reached: Option<SocketAddr>,
}

impl QuicDialer {
    /// A dialer to `host:port`, `192.0.2.1:port` or `[2001:db8::1]:port`.
    pub fn new(target: impl Into<String>, options: QuicOptions, identity: SourceIdentity) -> Self {
        Self { target: target.into(), options, identity, state: Mutex::default() }
    }

    /// Connects from this address of the local host, and so over its network.
    #[must_use]
    pub fn with_source(self, address: IpAddr) -> Self {
        self.lock().source = Some(SocketAddr::new(address, 0));
        self
    }

    /// Sends from another address of this host from now on; port 0 lets the host choose one. The connection and all of its lanes
    /// go on.
    pub fn rebind(&self, address: SocketAddr) -> Result<(), TransportError> {
        let mut state = self.lock();
        if let Some(host) = &state.host {
            let socket = self.options.socket(address)?;
            let _entered = host.handle().map(tokio::runtime::Handle::enter);
            let rebound = host.endpoint().rebind(socket);
            rebound.map_err(|source| TransportError::Option { option: format!("sending from {address}"), source })?;
        }
        state.source = Some(address);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn addresses(&self, state: &State) -> Result<Vec<SocketAddr>, DialFailure> {
        if let Some(reached) = state.reached {
            return Ok(vec![reached]);
        }
        let found = resolve(&self.target)?;
        let Some(source) = state.source else { return Ok(found) };
        let fitting: Vec<_> = found.into_iter().filter(|address| address.is_ipv4() == source.is_ipv4()).collect();
        if fitting.is_empty() { Err(DialFailure::Family(source.ip())) } else { Ok(fitting) }
    }

    /// The connection that there is, or a new one.
    fn connection(&self, state: &mut State, timeout: Duration) -> Result<Connection, TransportError> {
        if let Some(connection) = state.connection.as_ref().filter(|connection| connection.close_reason().is_none()) {
            return Ok(connection.clone());
        }
        let started = Instant::now();
        let addresses = self.addresses(state).map_err(|failure| self.failed(failure.into()))?;
        let mut last = QuicFailure::Address(DialFailure::Form);
        for (index, &address) in addresses.iter().enumerate() {
            let share = timeout.saturating_sub(started.elapsed()) / (addresses.len() - index) as u32;
            let host = self.host(state, address)?;
            match self.connect(&host, address, share.max(Duration::from_millis(1))) {
                Ok(connection) => {
                    state.reached = Some(address);
                    return Ok(state.connection.insert(connection).clone());
                }
                Err(failure) => last = failure,
            }
        }
        Err(self.failed(last))
    }

    /// The endpoint, of the family of the address.
    fn host(&self, state: &mut State, address: SocketAddr) -> Result<Arc<Host>, TransportError> {
        let fits =
            |host: &&Arc<Host>| host.endpoint().local_addr().is_ok_and(|local| local.is_ipv4() == address.is_ipv4());
        if let Some(host) = state.host.as_ref().filter(fits) {
            return Ok(Arc::clone(host));
        }
        let any: IpAddr = if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = self.options.socket(state.source.unwrap_or(SocketAddr::new(any, 0)))?;
        Ok(Arc::clone(state.host.insert(Host::start(socket, None, self.options.spawner.as_deref())?)))
    }

    fn connect(&self, host: &Host, address: SocketAddr, timeout: Duration) -> Result<Connection, QuicFailure> {
        let name = self.identity.server_name(&self.target)?.to_str().into_owned();
        let mut transport = self.options.transport();
        transport.max_concurrent_bidi_streams(VarInt::from_u32(0));
        let (client, note) = config::client(&self.identity, transport)?;
        let begin = || host.endpoint().connect_with(client, address, &name);
        let work = async {
            let connection = begin()?.await.map_err(|error| handshake_failure(error, &note, address, timeout))?;
            match self.be_let_in(&connection).await {
                Ok(()) => Ok(connection),
                Err(failure) => {
                    connection.close(IN_ORDER, b"");
                    Err(failure)
                }
            }
        };
        host.wait_for(Some(timeout), work).unwrap_or(Err(QuicFailure::NoAnswer { address, timeout }))
    }

    /// Shows the proof and hears the verdict.
    async fn be_let_in(&self, connection: &Connection) -> Result<(), QuicFailure> {
        let (mut send, mut receive) = connection.open_bi().await?;
        send.write_all(self.identity.proof()).await?;
        // It may have been refused while it was under way.
        let _ = send.finish();
        let mut byte = [0];
        match receive.read(&mut byte).await? {
            Some(1) => Ok(verdict_of(byte[0]).map_err(TlsFailure::Refused)?),
            _ => Err(QuicFailure::Closed),
        }
    }

    fn failed(&self, failure: QuicFailure) -> TransportError {
        TransportError::Dial { peer: self.target.clone(), source: failure.into() }
    }
}

fn handshake_failure(
    error: quinn::ConnectionError,
    note: &FlawNote,
    address: SocketAddr,
    timeout: Duration,
) -> QuicFailure {
    QuicFailure::of_handshake(error, note.take(), address, timeout)
}

impl Dialer for QuicDialer {
    fn dial(&self, role: LaneRole, timeout: Duration) -> Result<Box<dyn Lane>, TransportError> {
        let started = Instant::now();
        let mut state = self.lock();
        let connection = self.connection(&mut state, timeout)?;
        let Some(host) = state.host.clone() else { return Err(self.failed(QuicFailure::ClosedHere)) };
        drop(state);
        let left = timeout.saturating_sub(started.elapsed());
        let opened =
            host.wait_for(Some(left), connection.open_bi()).unwrap_or_else(|| Err(quinn::ConnectionError::TimedOut));
        let streams = opened.map_err(|error| match error {
            quinn::ConnectionError::TimedOut => self.failed(QuicFailure::NoLane(timeout)),
            error => self.failed(error.into()),
        })?;
        // Messages of the session overtake pages.
        let _ = streams.0.set_priority(i32::from(role == LaneRole::Control));
        Ok(Box::new(QuicLane::new(host, connection, streams, self.options.unsent_limit)))
    }

    fn capabilities(&self) -> Capabilities {
        capabilities()
    }
}
