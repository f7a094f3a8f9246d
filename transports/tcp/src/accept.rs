//! The accepting end. It only hands connections out: who they are, how long they may take to say so
//! and how many may wait to be heard is decided by the engine.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use pageferry::transport::{Acceptor, Lane, TransportError};
use socket2::{Domain, Protocol, Socket, Type};

use crate::dial::{DialFailure, resolve};
use crate::lane::{Connection, SocketLane};
use crate::options::TcpOptions;
use crate::sys;

/// Connections that may wait to be accepted: all lanes of the largest migration at once.
const BACKLOG: i32 = 256;

/// How long to leave the host alone when it is out of descriptors or memory.
const SHORTAGE_PAUSE: Duration = Duration::from_millis(100);

/// Listens on one address.
#[derive(Debug)]
pub struct TcpAcceptor {
    listener: Socket,
    local: SocketAddr,
    options: TcpOptions,
}

impl TcpAcceptor {
    /// Listens on `host:port`, `192.0.2.1:port` or `[::]:port` (which takes IPv4 as well). Port 0
    /// lets the host choose one: see [`local_addr`](Self::local_addr). Of a name's addresses, the
    /// first that this host has.
    pub fn bind(address: &str, options: TcpOptions) -> Result<Self, TransportError> {
        let refuse =
            |failure: BindFailure| TransportError::Accept { local: address.to_owned(), source: failure.into() };
        let mut last = None;
        for candidate in resolve(address).map_err(|failure| refuse(BindFailure::Address(failure)))? {
            match listen(candidate, &options) {
                Ok((listener, local)) => return Ok(Self { listener, local, options }),
                Err(error @ TransportError::Option { .. }) => return Err(error),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| refuse(BindFailure::Address(DialFailure::Form))))
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// The next connection, with all options set and not yet a lane: for transports that put something between.
    pub fn accept_connection(&self, timeout: Duration) -> Result<Option<Connection>, TransportError> {
        let accept = || self.listener.accept().map(|(socket, address)| self.admit(socket, address.as_socket()));
        accept_within(timeout, self.listener.as_fd(), accept)
            .map_err(|source| TransportError::Accept { local: self.local.to_string(), source })
    }

    /// A connection that takes no options is broken already, and nobody's loss.
    fn admit(&self, socket: Socket, address: Option<SocketAddr>) -> Option<Connection> {
        socket.set_nonblocking(false).ok()?;
        self.options.apply(&socket).ok()?;
        Some(Connection { socket, peer: canonical(address?) })
    }
}

impl Acceptor for TcpAcceptor {
    fn accept(&self, timeout: Duration) -> Result<Option<Box<dyn Lane>>, TransportError> {
        Ok(self.accept_connection(timeout)?.map(|connection| Box::new(SocketLane::from(connection)) as Box<dyn Lane>))
    }
}

/// Waits for the next caller of a listening stream socket of any kind, which must not block. `accept` takes one, and
/// returns `None` for a caller that is not let in. What goes wrong with a caller, or because the host is short of something, is
/// waited out; an error is the listener's own.
pub fn accept_within<T>(
    timeout: Duration,
    listener: BorrowedFd<'_>,
    accept: impl Fn() -> io::Result<Option<T>>,
) -> io::Result<Option<T>> {
    let started = Instant::now();
    loop {
        let left = timeout.saturating_sub(started.elapsed());
        match accept() {
            Ok(Some(caller)) => return Ok(Some(caller)),
            Ok(None) => {}
            Err(error) => match Trouble::of(&error) {
                Trouble::Nobody => drop(sys::wait_readable(listener, left)?),
                Trouble::Caller => {}
                Trouble::Shortage => std::thread::sleep(left.min(SHORTAGE_PAUSE)),
                Trouble::Listener => return Err(error),
            },
        }
        if left.is_zero() {
            return Ok(None);
        }
    }
}

fn listen(address: SocketAddr, options: &TcpOptions) -> Result<(Socket, SocketAddr), TransportError> {
    let refuse = |error| TransportError::Accept { local: address.to_string(), source: BindFailure::of(error).into() };
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP)).map_err(refuse)?;
    options.bind_interface(&socket)?;
    prepare(&socket, address).map_err(refuse)?;
    let local = socket.local_addr().map_err(refuse)?;
    Ok((socket, local.as_socket().unwrap_or(address)))
}

fn prepare(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    // Connections of the migration before may still linger on the port.
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)
}

/// An IPv4 caller on an IPv6 socket, by its IPv4 address.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// What a failed `accept` is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Trouble {
    /// No connection waits.
    Nobody,
    /// The connection that would have been next; the one after may be well (see accept(2)).
    Caller,
    /// The host is short of something and may have it again later.
    Shortage,
    /// The listening socket itself.
    Listener,
}

impl Trouble {
    fn of(error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EAGAIN) => Self::Nobody,
            Some(
                libc::EINTR
                | libc::ECONNABORTED
                | libc::EPERM
                | libc::EPROTO
                | libc::ENETDOWN
                | libc::ENETUNREACH
                | libc::ENOPROTOOPT
                | libc::EHOSTDOWN
                | libc::EHOSTUNREACH
                | libc::ENONET
                | libc::ETIMEDOUT,
            ) => Self::Caller,
            Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => Self::Shortage,
            _ => Self::Listener,
        }
    }
}

/// Why an address cannot be listened on, and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BindFailure {
    /// It is no address.
    #[error(transparent)]
    Address(DialFailure),
    /// Somebody else has it.
    #[error("another program listens there already; stop it or choose another port ({0})")]
    InUse(io::Error),
    /// This host does not have it.
    #[error("no interface of this host has that address ({0})")]
    NotLocal(io::Error),
    /// It takes privileges.
    #[error("this user may not; choose a port from 1024 upwards ({0})")]
    Forbidden(io::Error),
    /// Any other answer of the host.
    #[error(transparent)]
    Host(io::Error),
}

impl BindFailure {
    fn of(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::AddrInUse => Self::InUse(error),
            io::ErrorKind::AddrNotAvailable => Self::NotLocal(error),
            io::ErrorKind::PermissionDenied => Self::Forbidden(error),
            _ => Self::Host(error),
        }
    }
}

impl From<BindFailure> for io::Error {
    fn from(failure: BindFailure) -> Self {
        let kind = match &failure {
            BindFailure::Address(_) => io::ErrorKind::InvalidInput,
            BindFailure::InUse(error)
            | BindFailure::NotLocal(error)
            | BindFailure::Forbidden(error)
            | BindFailure::Host(error) => error.kind(),
        };
        Self::new(kind, failure)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_trouble_with_the_listener_itself_ends_accepting() {
        let trouble = |code| Trouble::of(&io::Error::from_raw_os_error(code));
        assert_eq!(trouble(libc::EWOULDBLOCK), Trouble::Nobody);
        assert_eq!(trouble(libc::ECONNABORTED), Trouble::Caller);
        assert_eq!(trouble(libc::EMFILE), Trouble::Shortage);
        assert_eq!(trouble(libc::EBADF), Trouble::Listener);
        assert_eq!(trouble(libc::EINVAL), Trouble::Listener);
    }
}
