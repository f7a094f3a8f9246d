//! What a user may choose, every bound of the transport with its reason, and how they become QUIC's parameters.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;
use std::{fmt, io};

use pageferry::host::Spawner;
use pageferry::transport::TransportError;
use quinn::congestion::CubicConfig;
use quinn::{EndpointConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};
use rustix::net::sockopt;
use socket2::{Domain, Protocol, Socket, Type};

/// Lanes of one connection: those of the largest migration, and some for questions afterwards.
pub(crate) const MAX_STREAMS: u32 = 192;

/// Bytes of a lane that the peer may send before they are read: eight lanes fill 10 Gbps over 100 ms. It is also the memory that
/// a lane can take at an end that does not read it. All lanes of a connection have theirs at once, because the engine
/// lets lanes wait for each other.
pub(crate) const LANE_WINDOW: u32 = 16 << 20;

/// Bytes that a peer may send before it is let in.
pub(crate) const GREETING_WINDOW: u32 = 4 << 10;

/// Bytes that a connection sends in its first round trip.
const INITIAL_WINDOW: u64 = 128 << 10;

/// Bytes that wait in a socket's buffers, as far as the host allows: bursts come faster than threads wake up.
const SOCKET_BUFFER: usize = 8 << 20;

/// Datagrams that quinn 0.11 hands to the kernel at once, to be cut apart there.
const BATCH: u16 = 10;

/// The longest datagram to try, where frames are that long. The kernel takes no more than 65,507 bytes at once, and quinn
/// does not notice when it refuses: of longer datagrams whole batches would be lost again and again, and with them the
/// belief that the path carries them.
const LONGEST: u16 = 65_507 / BATCH;

/// How long after losses that looked like a path of shorter datagrams longer ones are tried again. On a full queue losses
/// look like that every few seconds, and short datagrams cost several times the CPU time; where the path really has
/// changed, this costs a dozen probes each time.
const RETRY_LONGER: Duration = Duration::from_millis(500);

/// Choices for both ends. The defaults are meant to be right for a migration network.
#[derive(Clone)]
#[non_exhaustive]
pub struct QuicOptions {
    /// Send and receive through this network interface only (`eth1`); `None` (default) for whichever the routes name.
    pub interface: Option<String>,
    /// A peer that is silent for this long is dead: its lanes break. Default 10 s. The connection is kept alive with a
    /// packet every quarter of it.
    pub dead_peer_after: Duration,
    /// Most bytes, of all lanes together, that wait for the congestion window. Default 1 MiB.
    ///
    /// What waits there delays whatever is sent next, at the switch-over as downtime: 84 ms at 100 Mbps by default. The
    /// control lane's messages go before everything else. Less slows down fast links.
    pub unsent_limit: u32,
    /// Lends the thread on which all of an end happens. `None` (default) for two of the runtime's own, of which one can encrypt and
    /// send while the other receives.
    pub spawner: Option<Arc<dyn Spawner>>,
}

impl Default for QuicOptions {
    fn default() -> Self {
        Self { interface: None, dead_peer_after: Duration::from_secs(10), unsent_limit: 1 << 20, spawner: None }
    }
}

impl fmt::Debug for QuicOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { interface, dead_peer_after, unsent_limit, .. } = self;
        f.debug_struct("QuicOptions")
            .field("interface", interface)
            .field("dead_peer_after", dead_peer_after)
            .field("unsent_limit", unsent_limit)
            .finish_non_exhaustive()
    }
}

impl QuicOptions {
    /// The parameters of a connection.
    pub(crate) fn transport(&self) -> TransportConfig {
        let mut discovery = MtuDiscoveryConfig::default();
        discovery.upper_bound(LONGEST).black_hole_cooldown(RETRY_LONGER);
        let mut congestion = CubicConfig::default();
        congestion.initial_window(INITIAL_WINDOW);
        let silence = self.dead_peer_after.clamp(Duration::from_secs(1), Duration::from_secs(24 * 3600));
        let mut transport = TransportConfig::default();
        transport
            .max_idle_timeout(IdleTimeout::try_from(silence).ok())
            .keep_alive_interval(Some(silence / 4))
            .stream_receive_window(VarInt::from_u32(LANE_WINDOW))
            .send_window(u64::from(self.unsent_limit) + INITIAL_WINDOW)
            .max_concurrent_uni_streams(VarInt::from_u32(0))
            .datagram_receive_buffer_size(None)
            .mtu_discovery_config(Some(discovery))
            .congestion_controller_factory(Arc::new(congestion));
        transport
    }

    /// The parameters of an endpoint.
    pub(crate) fn endpoint() -> EndpointConfig {
        let mut endpoint = EndpointConfig::default();
        // Only ever refused for being too short.
        let _ = endpoint.max_udp_payload_size(LONGEST);
        endpoint
    }

    /// A socket at this address.
    pub(crate) fn socket(&self, address: SocketAddr) -> Result<UdpSocket, TransportError> {
        let refuse = |source| TransportError::Accept { local: address.to_string(), source };
        let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP)).map_err(refuse)?;
        if let Some(interface) = &self.interface {
            socket.bind_device(Some(interface.as_bytes())).map_err(|source| TransportError::Option {
                option: format!("binding to network interface {interface:?}"),
                source,
            })?;
        }
        prepare(&socket, address).map_err(refuse)?;
        Ok(socket.into())
    }
}

fn prepare(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    // Beyond the host's limit if this user may, otherwise up to it.
    if sockopt::set_socket_recv_buffer_size_force(socket, SOCKET_BUFFER).is_err() {
        socket.set_recv_buffer_size(SOCKET_BUFFER)?;
    }
    socket.set_send_buffer_size(SOCKET_BUFFER)?;
    socket.bind(&address.into())
}
