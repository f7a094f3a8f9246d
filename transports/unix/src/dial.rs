//! The dialling end.

use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use pageferry::transport::{Capabilities, Dialer, Lane, LaneRole, TransportError};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::{UnixFailure, admit, capabilities};

/// How often a listener whose queue is full is asked again.
const RETRY: Duration = Duration::from_millis(5);

/// Dials the socket at a path.
#[derive(Clone, Debug)]
pub struct UnixDialer {
    path: PathBuf,
}

impl UnixDialer {
    /// Dials whoever listens at this path.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    fn connect(&self, timeout: Duration) -> io::Result<Box<dyn Lane>> {
        let address =
            SockAddr::unix(&self.path).map_err(|source| UnixFailure::Path { path: self.path.clone(), source })?;
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        // With a queue that is full, a socket that blocks would do so without an end.
        socket.set_nonblocking(true)?;
        let started = Instant::now();
        loop {
            let error = match socket.connect(&address) {
                Ok(()) => return admit(socket, &self.path),
                Err(error) => error,
            };
            match error.kind() {
                io::ErrorKind::WouldBlock if started.elapsed() < timeout => std::thread::sleep(RETRY.min(timeout)),
                io::ErrorKind::Interrupted => {}
                io::ErrorKind::WouldBlock => return Err(UnixFailure::Busy(timeout).into()),
                io::ErrorKind::NotFound => return Err(UnixFailure::Missing.into()),
                io::ErrorKind::ConnectionRefused => return Err(UnixFailure::Refused.into()),
                io::ErrorKind::PermissionDenied => return Err(UnixFailure::Forbidden(error).into()),
                _ => return Err(error),
            }
        }
    }
}

impl Dialer for UnixDialer {
    fn dial(&self, _role: LaneRole, timeout: Duration) -> Result<Box<dyn Lane>, TransportError> {
        self.connect(timeout).map_err(|source| TransportError::Dial { peer: self.path.display().to_string(), source })
    }

    fn capabilities(&self) -> Capabilities {
        capabilities()
    }
}
