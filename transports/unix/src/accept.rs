//! The accepting end.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pageferry::transport::{Acceptor, Capabilities, Lane, TransportError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::{UnixFailure, admit, capabilities};

/// Connections that may wait to be accepted: all lanes of the largest migration at once.
const BACKLOG: i32 = 256;

/// How long to leave the host alone when it is out of descriptors or memory.
const SHORTAGE_PAUSE: Duration = Duration::from_millis(100);

/// Listens at a path, and removes the socket when it is dropped.
#[derive(Debug)]
pub struct UnixAcceptor {
    listener: Socket,
    path: PathBuf,
    /// Device and inode of the socket: what is there at the end may be somebody else's.
    file: (u64, u64),
}

impl UnixAcceptor {
    /// Makes a socket at this path, for this user only, and listens. A socket that an earlier listener has left there is
    /// replaced; one that is listened on, or any other file, is an error.
    pub fn bind(path: impl Into<PathBuf>) -> Result<Self, TransportError> {
        let path = path.into();
        let refuse = |source| TransportError::Accept { local: path.display().to_string(), source };
        match listen(&path) {
            Ok((listener, file)) => Ok(Self { listener, path, file }),
            Err(source) => Err(refuse(source)),
        }
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// One attempt; `None` when there is nobody, or nobody who may come in.
    fn try_accept(&self, left: Duration) -> io::Result<Option<Box<dyn Lane>>> {
        let error = match self.listener.accept() {
            Ok((socket, _)) => return Ok(admit(socket, &self.path).ok()),
            Err(error) => error,
        };
        match error.kind() {
            io::ErrorKind::WouldBlock => self.wait(left)?,
            io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {}
            // Of descriptors or memory, which the host may have again later.
            _ if is_shortage(&error) => std::thread::sleep(left.min(SHORTAGE_PAUSE)),
            _ => return Err(error),
        }
        Ok(None)
    }

    fn wait(&self, left: Duration) -> io::Result<()> {
        let timeout = Timespec::try_from(left).ok();
        match poll(&mut [PollFd::new(&self.listener, PollFlags::IN)], timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
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
        let started = Instant::now();
        loop {
            let left = timeout.saturating_sub(started.elapsed());
            let broken = |source| TransportError::Accept { local: self.path.display().to_string(), source };
            let lane = self.try_accept(left).map_err(broken)?;
            if lane.is_some() || left.is_zero() {
                return Ok(lane);
            }
        }
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

fn is_shortage(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let code = error.raw_os_error().map(Errno::from_raw_os_error);
    matches!(code, Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM))
}
