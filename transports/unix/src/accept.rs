//! The accepting end.

use std::fs::{self, Permissions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use pageferry::transport::{Acceptor, Capabilities, Lane, TransportError};
use pageferry_tcp::accept_within;
use socket2::{Domain, SockAddr, Socket, Type};

use crate::descriptors::{Descriptors, TakingLane};
use crate::{UnixFailure, admit, capabilities};

/// Connections that may wait to be accepted: all lanes of the largest migration at once.
const BACKLOG: i32 = 256;

/// Listens at a path, and removes the socket when it is dropped.
#[derive(Debug)]
pub struct UnixAcceptor {
    listener: Socket,
    path: PathBuf,
    /// Device and inode of the socket: what is there at the end may be somebody else's.
    file: (u64, u64),
    descriptors: Descriptors,
}

impl UnixAcceptor {
    /// Makes a socket at this path, for this user only, and listens. A socket that an earlier listener has left there is
    /// replaced; one that is listened on, or any other file, is an error.
    pub fn bind(path: impl Into<PathBuf>) -> Result<Self, TransportError> {
        let path = path.into();
        let refuse = |source| TransportError::Accept { local: path.display().to_string(), source };
        match listen(&path) {
            Ok((listener, file)) => Ok(Self { listener, path, file, descriptors: Descriptors::default() }),
            Err(source) => Err(refuse(source)),
        }
    }

    /// What callers bring beside their first frame.
    pub fn descriptors(&self) -> Descriptors {
        self.descriptors.clone()
    }

    /// A caller that is not let in is broken already, and nobody's loss.
    fn admit(&self, socket: Socket) -> Option<Box<dyn Lane>> {
        let own = socket.as_fd().try_clone_to_owned().ok()?;
        let lane = admit(socket, &self.path).ok()?;
        Some(Box::new(TakingLane { lane, socket: own, descriptors: self.descriptors() }))
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for UnixAcceptor {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|found| (found.dev(), found.ino()) == self.file) {
            // A socket that stays is replaced by the next listener.
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Acceptor for UnixAcceptor {
    fn accept(&self, timeout: Duration) -> Result<Option<Box<dyn Lane>>, TransportError> {
        let accept = || self.listener.accept().map(|(socket, _)| self.admit(socket));
        accept_within(timeout, self.listener.as_fd(), accept)
            .map_err(|source| TransportError::Accept { local: self.path.display().to_string(), source })
    }

    fn capabilities(&self) -> Capabilities {
        capabilities()
    }
}

fn listen(path: &Path) -> io::Result<(Socket, (u64, u64))> {
    let address = SockAddr::unix(path).map_err(|source| UnixFailure::Path { path: path.to_owned(), source })?;
    remove_stale(path, &address)?;
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.bind(&address).map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => UnixFailure::InUse.into(),
        io::ErrorKind::PermissionDenied => UnixFailure::Forbidden(error).into(),
        _ => error,
    })?;
    // Before anybody can connect.
    fs::set_permissions(path, Permissions::from_mode(0o600))?;
    let file = fs::symlink_metadata(path)?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok((socket, (file.dev(), file.ino())))
}

/// Removes a socket that nobody listens on.
fn remove_stale(path: &Path, address: &SockAddr) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
        Ok(found) if !found.file_type().is_socket() => return Err(UnixFailure::NotASocket.into()),
        Ok(_) => {}
    }
    let caller = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    caller.set_nonblocking(true)?;
    match caller.connect(address) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(UnixFailure::Forbidden(error).into()),
        // Also when its queue is full.
        _ => Err(UnixFailure::InUse.into()),
    }
}
