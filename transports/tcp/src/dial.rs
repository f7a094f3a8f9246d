//! The dialling end.

use std::io;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use pageferry::transport::{Dialer, Lane, LaneRole, TransportError};
use socket2::{Domain, Protocol, Socket, Type};

use crate::lane::{Connection, SocketLane};
use crate::options::TcpOptions;

/// Opens TCP connections to one destination.
///
/// A name may stand for several addresses: they are tried in turn, each with its share of the time.
/// The first that answers serves for the life of the dialer, so that all lanes of a migration, and a
/// later question who owns the guest, reach the same host. Resolving the name itself takes the time
/// that the host's resolver takes.
#[derive(Debug)]
pub struct TcpDialer {
    target: String,
    source: Option<IpAddr>,
    options: TcpOptions,
    reached: OnceLock<SocketAddr>,
}

impl TcpDialer {
    /// A dialer to `host:port`, `192.0.2.1:port` or `[2001:db8::1]:port`.
    pub fn new(target: impl Into<String>, options: TcpOptions) -> Self {
        Self { target: target.into(), source: None, options, reached: OnceLock::new() }
    }

    /// Connects from this address of the local host, and so over its network.
    #[must_use]
    pub fn with_source(mut self, address: IpAddr) -> Self {
        self.source = Some(address);
        self
    }

    fn addresses(&self) -> Result<Vec<SocketAddr>, DialFailure> {
        if let Some(&address) = self.reached.get() {
            return Ok(vec![address]);
        }
        let found = resolve(&self.target)?;
        let Some(source) = self.source else {
            return Ok(found);
        };
        let fitting: Vec<_> = found.into_iter().filter(|address| address.is_ipv4() == source.is_ipv4()).collect();
        if fitting.is_empty() { Err(DialFailure::Family(source)) } else { Ok(fitting) }
    }

    /// What was dialled, as it was given.
    pub fn target(&self) -> &str {
        &self.target
    }

    /// A connection with all options set and not yet a lane: for transports that put something between.
    pub fn connect(&self, timeout: Duration) -> Result<Connection, TransportError> {
        self.connect_any(timeout).map_err(|failure| match failure {
            DialFailure::Option(error) => *error,
            failure => TransportError::Dial { peer: self.target.clone(), source: failure.into() },
        })
    }

    fn connect_any(&self, timeout: Duration) -> Result<Connection, DialFailure> {
        let started = Instant::now();
        let addresses = self.addresses()?;
        let mut failures = Vec::new();
        for (index, address) in addresses.iter().enumerate() {
            let share = timeout.saturating_sub(started.elapsed()) / (addresses.len() - index) as u32;
            match self.connect_to(*address, share.max(Duration::from_millis(1))) {
                Ok(socket) => return Ok(Connection { socket, peer: *self.reached.get_or_init(|| *address) }),
                Err(failure) => failures.push(failure),
            }
        }
        Err(DialFailure::one_of(failures))
    }

    fn connect_to(&self, address: SocketAddr, timeout: Duration) -> Result<Socket, DialFailure> {
        let local = |source| DialFailure::Local { address, source };
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP)).map_err(local)?;
        self.options.bind_interface(&socket)?;
        if let Some(source) = self.source {
            let bound = socket.bind(&SocketAddr::new(source, 0).into());
            bound.map_err(|error| DialFailure::Source { address: source, error })?;
        }
        socket.connect_timeout(&address.into(), timeout).map_err(|error| DialFailure::of(address, timeout, error))?;
        // A connection to a free local port can meet itself.
        if socket.local_addr().ok().and_then(|own| own.as_socket()) == Some(address) {
            return Err(DialFailure::Refused(address));
        }
        self.options.apply(&socket).map_err(local)?;
        Ok(socket)
    }
}

impl Dialer for TcpDialer {
    fn dial(&self, _role: LaneRole, timeout: Duration) -> Result<Box<dyn Lane>, TransportError> {
        Ok(Box::new(SocketLane::from(self.connect(timeout)?)))
    }
}

/// Why a destination could not be reached, and what to look at.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DialFailure {
    /// The target is no `host:port`.
    #[error("it is not of the form HOST:PORT or [IPV6]:PORT")]
    Form,
    /// The name means nothing.
    #[error("the name {host:?} cannot be resolved: {error}")]
    Name {
        /// The host part of the target.
        host: String,
        /// What the resolver said.
        error: io::Error,
    },
    /// The target and the address to connect from speak different protocols.
    #[error("it has no address of the same family as the source address {0}")]
    Family(IpAddr),
    /// The address to connect from is not this host's.
    #[error("cannot connect from source address {address}: {error}; is it an address of this host?")]
    Source {
        /// The address to connect from.
        address: IpAddr,
        /// What the host said.
        error: io::Error,
    },
    /// An option that the host does not grant.
    #[error(transparent)]
    Option(#[from] Box<TransportError>),
    /// Nobody listens.
    #[error("{0} refused the connection: is the receiver running there, and is this its port?")]
    Refused(SocketAddr),
    /// Nobody answers.
    #[error(
        "{address} did not answer within {timeout:?}: is the host up, and does every firewall let the port through?"
    )]
    NoAnswer {
        /// The address that was tried.
        address: SocketAddr,
        /// For how long.
        timeout: Duration,
    },
    /// There is no way there.
    #[error(
        "{address} cannot be reached ({error}): check the route, and the source address or interface if one was given"
    )]
    Unreachable {
        /// The address that was tried.
        address: SocketAddr,
        /// What the host said.
        error: io::Error,
    },
    /// Any other answer of this host.
    #[error("{address}: {source}")]
    Local {
        /// The address that was tried.
        address: SocketAddr,
        /// What the host said.
        source: io::Error,
    },
    /// Every address failed in its own way.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    All(Vec<DialFailure>),
}

impl DialFailure {
    fn of(address: SocketAddr, timeout: Duration, error: io::Error) -> Self {
        use io::ErrorKind::{ConnectionRefused, HostUnreachable, NetworkUnreachable, TimedOut};
        match error.kind() {
            ConnectionRefused => Self::Refused(address),
            TimedOut => Self::NoAnswer { address, timeout },
            HostUnreachable | NetworkUnreachable => Self::Unreachable { address, error },
            _ => Self::Local { address, source: error },
        }
    }

    fn one_of(mut failures: Vec<Self>) -> Self {
        if failures.len() == 1 { failures.remove(0) } else { Self::All(failures) }
    }

    fn kind(&self) -> io::ErrorKind {
        match self {
            Self::Form | Self::Family(_) | Self::Option(_) => io::ErrorKind::InvalidInput,
            Self::Refused(_) => io::ErrorKind::ConnectionRefused,
            Self::NoAnswer { .. } => io::ErrorKind::TimedOut,
            Self::Name { error, .. }
            | Self::Source { error, .. }
            | Self::Unreachable { error, .. }
            | Self::Local { source: error, .. } => error.kind(),
            Self::All(failures) => failures.last().map_or(io::ErrorKind::NotFound, Self::kind),
        }
    }
}

impl From<TransportError> for DialFailure {
    fn from(error: TransportError) -> Self {
        Self::Option(Box::new(error))
    }
}

impl From<DialFailure> for io::Error {
    fn from(failure: DialFailure) -> Self {
        Self::new(failure.kind(), failure)
    }
}

/// The addresses of `host:port`, in the resolver's order.
pub(crate) fn resolve(target: &str) -> Result<Vec<SocketAddr>, DialFailure> {
    if let Ok(address) = target.parse() {
        return Ok(vec![address]);
    }
    let (host, port) = target.rsplit_once(':').ok_or(DialFailure::Form)?;
    let port: u16 = port.parse().map_err(|_| DialFailure::Form)?;
    // In brackets: an IPv6 address with the name of its zone, which only the resolver knows.
    let host = host.strip_prefix('[').and_then(|inner| inner.strip_suffix(']')).unwrap_or(host);
    let name_error = |error| DialFailure::Name { host: host.to_owned(), error };
    let found: Vec<_> = (host, port).to_socket_addrs().map_err(name_error)?.collect();
    if found.is_empty() { Err(name_error(io::ErrorKind::NotFound.into())) } else { Ok(found) }
}
