//! Pageferry lanes over Unix sockets, between two processes of one host.
//!
//! The destination listens with a [`UnixAcceptor`] on a path, the source dials it with a [`UnixDialer`]. Only
//! processes of the same user, and root's, are let in: the kernel says whose a socket is, so nobody has to
//! prove anything, and nothing leaves the host.
//!
//! Beside frames a lane can carry descriptors, such as those of a guest's memory: a source that is replaced by another process of
//! its host ([`UnixDialer::with_descriptors`], [`UnixAcceptor::descriptors`]) then has nothing to copy.
#![deny(unsafe_code)]

mod accept;
mod descriptors;
mod dial;

pub use accept::UnixAcceptor;
pub use descriptors::{DescriptorFailure, DescriptorId, Descriptors, MAX_DESCRIPTORS};
pub use dial::UnixDialer;

use std::io;
use std::path::{Path, PathBuf};

use pageferry::transport::{Capabilities, Lane};
use pageferry_tcp::{TcpOptions, lane_over};
use socket2::Socket;

/// What goes wrong with a socket's path, or with who is at the other end of it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnixFailure {
    /// The path cannot be a socket's address.
    #[error("{}: {source}; a socket's path has at most 107 bytes", path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// Nobody made a socket there.
    #[error("there is no socket: is the receiver running, and is this its path?")]
    Missing,
    /// Whoever made it does not listen any more.
    #[error("nobody listens there any more: is the receiver running?")]
    Refused,
    /// The file's mode, or a folder's, does not let this user in.
    #[error("this user may not ({0}); both ends must belong to one user, or the source to root")]
    Forbidden(io::Error),
    /// The listener is busy.
    #[error("the receiver did not answer within {0:?}: it listens, but takes no more connections")]
    Busy(std::time::Duration),
    /// Something else has that name.
    #[error("it exists and is no socket; choose another path, or remove it")]
    NotASocket,
    /// A listener is there already.
    #[error("another program listens there; stop it or choose another path")]
    InUse,
    /// The other end belongs to somebody else.
    #[error("the process at the other end belongs to user {theirs}, this one to user {ours}")]
    Stranger {
        /// Their user id.
        theirs: u32,
        /// This process's.
        ours: u32,
    },
}

impl From<UnixFailure> for io::Error {
    fn from(failure: UnixFailure) -> Self {
        use io::ErrorKind;
        let kind = match &failure {
            UnixFailure::Path { .. } | UnixFailure::NotASocket => ErrorKind::InvalidInput,
            UnixFailure::Missing => ErrorKind::NotFound,
            UnixFailure::Refused => ErrorKind::ConnectionRefused,
            UnixFailure::Forbidden(_) | UnixFailure::Stranger { .. } => ErrorKind::PermissionDenied,
            UnixFailure::Busy(_) => ErrorKind::TimedOut,
            UnixFailure::InUse => ErrorKind::AddrInUse,
        };
        Self::new(kind, failure)
    }
}

/// Nothing leaves the host, and the kernel names the peer.
fn capabilities() -> Capabilities {
    let mut capabilities = Capabilities::default();
    capabilities.encrypted = true;
    capabilities
}

/// A lane, if the other end may have it: it belongs to this user, or either side is root's.
fn admit(socket: Socket, path: &Path) -> io::Result<Box<dyn Lane>> {
    let theirs = rustix::net::sockopt::socket_peercred(&socket)?.uid.as_raw();
    let ours = rustix::process::geteuid().as_raw();
    if theirs != ours && theirs != 0 && ours != 0 {
        return Err(UnixFailure::Stranger { theirs, ours }.into());
    }
    lane_over(socket, path.display().to_string(), &TcpOptions::default()).map_err(io::Error::other)
}
