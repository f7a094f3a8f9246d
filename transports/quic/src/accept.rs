//! The accepting end. Strangers are dealt with inside: a lane is handed out when its source has been let in.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pageferry::transport::{Acceptor, Capabilities, Lane, TransportError};
use pageferry_tcp::resolve;
use pageferry_tls::{DestinationIdentity, Verdict, verdict_byte};
use quinn::{Connection, ConnectionError, Endpoint, Incoming, RecvStream, SendStream, VarInt};
use rustls::pki_types::CertificateDer;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::capabilities;
use crate::config;
use crate::error::{BUSY, QuicFailure};
use crate::host::{Host, IN_ORDER};
use crate::lane::QuicLane;
use crate::options::{GREETING_WINDOW, LANE_WINDOW, MAX_STREAMS, QuicOptions};

/// Connections that are not let in yet, at once. More are not answered.
const MAX_STRANGERS: usize = 256;

/// Strangers from which on a caller must first show that it receives what is sent to its address.
const SUSPICIOUS: usize = 16;

/// Connections that are let in: one migration has one, and the questions after it a few.
const MAX_CONNECTIONS: usize = 64;

/// Lanes that wait to be accepted.
const MAX_WAITING: usize = 256;

/// Time that a source has to be let in.
const GREETING: Duration = Duration::from_secs(5);

/// Time that a verdict has to arrive before the connection is closed.
const VERDICT: Duration = Duration::from_secs(1);

/// A lane that a source has opened.
type Opened = (Connection, (SendStream, RecvStream));

/// Listens on one address.
#[derive(Debug)]
pub struct QuicAcceptor {
    // Before the host, which waits for the connections.
    lanes: Mutex<mpsc::Receiver<Opened>>,
    local: SocketAddr,
    unsent_limit: u32,
    host: Arc<Host>,
}

impl QuicAcceptor {
    /// Listens on `host:port`, `192.0.2.1:port` or `[::]:port` (which takes IPv4 as well). Port 0 lets the host choose
    /// one: see [`local_addr`](Self::local_addr). Of a name's addresses, the first that this host has.
    pub fn bind(address: &str, options: &QuicOptions, identity: DestinationIdentity) -> Result<Self, TransportError> {
        let refuse = |source| TransportError::Accept { local: address.to_owned(), source };
        let mut socket = Err(refuse(std::io::ErrorKind::AddrNotAvailable.into()));
        for candidate in resolve(address).map_err(|failure| refuse(failure.into()))? {
            socket = options.socket(candidate);
            if socket.is_ok() {
                break;
            }
        }
        let socket = socket?;
        let local = socket.local_addr().map_err(refuse)?;
        let mut transport = options.transport();
        transport.max_concurrent_bidi_streams(VarInt::from_u32(1)).receive_window(VarInt::from_u32(GREETING_WINDOW));
        let mut server = config::server(&identity, transport).map_err(|failure| refuse(failure.into()))?;
        server.max_incoming(MAX_STRANGERS);
        let host = Host::start(socket, Some(server), options.spawner.as_deref())?;
        let (send, lanes) = mpsc::channel(MAX_WAITING);
        let reception = Reception {
            identity,
            lanes: send,
            strangers: Arc::new(Semaphore::new(MAX_STRANGERS)),
            connections: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
        };
        if let Some(handle) = host.handle() {
            handle.spawn(receive_callers(host.endpoint().clone(), Arc::new(reception)));
        }
        Ok(Self { lanes: Mutex::new(lanes), local, unsent_limit: options.unsent_limit, host })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }
}

impl Acceptor for QuicAcceptor {
    fn accept(&self, timeout: Duration) -> Result<Option<Box<dyn Lane>>, TransportError> {
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        match self.host.wait_for(Some(timeout), lanes.recv()) {
            None => Ok(None),
            Some(Some((connection, streams))) => {
                Ok(Some(Box::new(QuicLane::new(Arc::clone(&self.host), connection, streams, self.unsent_limit))))
            }
            Some(None) => Err(TransportError::Accept {
                local: self.local.to_string(),
                source: std::io::Error::from(std::io::ErrorKind::NotConnected),
            }),
        }
    }

    fn capabilities(&self) -> Capabilities {
        capabilities()
    }
}

/// What it takes to deal with a caller.
struct Reception {
    identity: DestinationIdentity,
    lanes: mpsc::Sender<Opened>,
    strangers: Arc<Semaphore>,
    connections: Arc<Semaphore>,
}

async fn receive_callers(endpoint: Endpoint, reception: Arc<Reception>) {
    while let Some(incoming) = endpoint.accept().await {
        let Ok(permit) = Arc::clone(&reception.strangers).try_acquire_owned() else {
            incoming.ignore();
            continue;
        };
        let crowded = MAX_STRANGERS - reception.strangers.available_permits() > SUSPICIOUS;
        if crowded && incoming.may_retry() {
            // Fails only for callers that have shown it.
            let _ = incoming.retry();
            continue;
        }
        tokio::spawn(serve(incoming, permit, Arc::clone(&reception)));
    }
}

/// Hears a caller, and takes its lanes if it is let in.
async fn serve(incoming: Incoming, stranger: OwnedSemaphorePermit, reception: Arc<Reception>) {
    let Ok(connecting) = incoming.accept() else { return };
    let greeting = async {
        let connection = connecting.await?;
        let verdict = reception.greet(&connection).await;
        Ok::<_, QuicFailure>((connection, verdict))
    };
    let Ok(Ok((connection, verdict))) = tokio::time::timeout(GREETING, greeting).await else { return };
    if verdict.is_err() {
        connection.close(IN_ORDER, b"");
        return;
    }
    drop(stranger);
    let Ok(_permit) = Arc::clone(&reception.connections).try_acquire_owned() else {
        connection.close(VarInt::from_u32(BUSY), b"");
        return;
    };
    let window = u64::from(MAX_STREAMS) * u64::from(LANE_WINDOW);
    connection.set_receive_window(VarInt::from_u64(window).unwrap_or(VarInt::MAX));
    connection.set_max_concurrent_bi_streams(VarInt::from_u32(MAX_STREAMS));
    while let Ok(streams) = connection.accept_bi().await {
        if reception.lanes.send((connection.clone(), streams)).await.is_err() {
            return;
        }
    }
}

impl Reception {
    /// Reads the proof and says the verdict.
    async fn greet(&self, connection: &Connection) -> Result<(), QuicFailure> {
        let (mut send, mut receive) = connection.accept_bi().await?;
        let mut proof = vec![0; self.identity.proof_len()];
        receive.read_exact(&mut proof).await.map_err(|_| ConnectionError::Reset)?;
        let verdict = self.judge(connection, &proof);
        send.write_all(&[verdict_byte(verdict)]).await?;
        let _ = send.finish();
        if verdict.is_err() {
            let _ = tokio::time::timeout(VERDICT, send.stopped()).await;
        }
        Ok(verdict.map_err(pageferry_tls::TlsFailure::Refused)?)
    }

    fn judge(&self, connection: &Connection, proof: &[u8]) -> Verdict {
        let chain = connection.peer_identity().and_then(|identity| identity.downcast::<Vec<CertificateDer<'_>>>().ok());
        let chain = chain.as_ref().map(|chain| chain.as_slice());
        self.identity.judge(proof, chain, connection.remote_address().ip(), Instant::now())
    }
}
