//! The dialling end.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry::transport::{Capabilities, Dialer, Lane, LaneRole, TransportError};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::descriptors::GivingLane;
use crate::{UnixFailure, admit, capabilities};

/// How often a listener whose queue is full is asked again.
const RETRY: Duration = Duration::from_millis(5);

/// Dials the socket at a path.
#[derive(Clone, Debug)]
pub struct UnixDialer {
    path: PathBuf,
    descriptors: Arc<Vec<OwnedFd>>,
}

impl UnixDialer {
    /// Dials whoever listens at this path.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), descriptors: Arc::default() }
    }

    /// Hands these over with the first frame of the control lane, at most [`MAX_DESCRIPTORS`](crate::MAX_DESCRIPTORS). The
    /// listener gets descriptors of its own; these stay open as long as the dialer.
    #[must_use]
    pub fn with_descriptors(mut self, descriptors: Vec<OwnedFd>) -> Self {
        self.descriptors = Arc::new(descriptors);
        self
    }

    fn admit(&self, socket: Socket, role: LaneRole) -> io::Result<Box<dyn Lane>> {
        if role != LaneRole::Control || self.descriptors.is_empty() {
            return admit(socket, &self.path);
        }
        let own = socket.as_fd().try_clone_to_owned()?;
        let lane = admit(socket, &self.path)?;
        Ok(Box::new(GivingLane { lane, socket: own, descriptors: Arc::clone(&self.descriptors) }))
    }

    fn connect(&self, role: LaneRole, timeout: Duration) -> io::Result<Box<dyn Lane>> {
        let address =
            SockAddr::unix(&self.path).map_err(|source| UnixFailure::Path { path: self.path.clone(), source })?;
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        // With a queue that is full, a socket that blocks would do so without an end.
        socket.set_nonblocking(true)?;
        let started = Instant::now();
        loop {
            let error = match socket.connect(&address) {
                Ok(()) => return self.admit(socket, role),
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
    fn dial(&self, role: LaneRole, timeout: Duration) -> Result<Box<dyn Lane>, TransportError> {
        self.connect(role, timeout)
            .map_err(|source| TransportError::Dial { peer: self.path.display().to_string(), source })
    }

    fn capabilities(&self) -> Capabilities {
        capabilities()
    }
}
