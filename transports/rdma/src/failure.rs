//! What goes wrong, in words that say what to do.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use crate::message::{Refusal, VERSION};

/// Why no lane could be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectFailure {
    /// The address has the wrong form.
    #[error("it is not of the form HOST:PORT or [IPV6]:PORT")]
    Form,
    /// The name means nothing.
    #[error("the name {host:?} cannot be resolved: {error}")]
    Name {
        /// The host part of the address.
        host: String,
        /// What the resolver said.
        error: io::Error,
    },
    /// The address to connect from and the one to connect to are of different families.
    #[error("it has no address of the same family as the source address {0}")]
    Family(IpAddr),
    /// The host has no RDMA device.
    #[error(
        "this host has no RDMA device that user programs can reach ({0}): see that one is there (`rdma link`) and that the \
         modules rdma_ucm and ib_uverbs are loaded; without RDMA hardware, `rdma link add NAME type rxe netdev INTERFACE` \
         makes a device of software"
    )]
    NoDevice(io::Error),
    /// The user may not open the device.
    #[error("this user may not use RDMA ({0}): /dev/infiniband/rdma_cm and uverbs* must be readable and writable")]
    NotPermitted(io::Error),
    /// The limit on locked memory.
    #[error(
        "the device cannot have {wanted} bytes of memory ({error}): {}; raise it (`ulimit -l`, LimitMEMLOCK= of systemd), give \
         the program CAP_IPC_LOCK, or use fewer lanes",
        .limit.map_or("the host has no memory to lock left".to_owned(), |limit| format!("this process may lock {limit} bytes"))
    )]
    LockedMemory {
        /// Bytes asked for last.
        wanted: u64,
        /// The limit, if there is one.
        limit: Option<u64>,
        /// What the host said.
        error: io::Error,
    },
    /// The address is no RDMA device's.
    #[error(
        "{address} is not an address of an RDMA device ({error}): use the address of the network interface that belongs to the \
         device (`rdma link` names it); the loopback interface has none"
    )]
    NotOnDevice {
        /// The address.
        address: SocketAddr,
        /// What the host said.
        error: io::Error,
    },
    /// Somebody else listens there.
    #[error("another program listens there already; stop it or choose another port ({0})")]
    InUse(io::Error),
    /// Nobody listens.
    #[error("{0} refused the connection: is the receiver running there, with RDMA, and is this its port?")]
    Refused(SocketAddr),
    /// A receiver of another version.
    #[error(
        "{address} speaks version {theirs} of lanes over RDMA, and this program version {VERSION}: update one of them"
    )]
    Version {
        /// The receiver.
        address: SocketAddr,
        /// Its version.
        theirs: u16,
    },
    /// The receiver has no room for the lane.
    #[error(
        "the receiver at {0} has no lockable memory left for this lane: raise its limit (ulimit -l) or use fewer lanes"
    )]
    ReceiverFull(SocketAddr),
    /// Nobody answers.
    #[error(
        "{address} did not answer within {timeout:?}: is the host up, and does the network let RDMA (UDP port 4791) through?"
    )]
    NoAnswer {
        /// The address that was tried.
        address: SocketAddr,
        /// For how long.
        timeout: Duration,
    },
    /// There is no way there.
    #[error("{address} cannot be reached by RDMA ({error}): check the route, and the source address if one was given")]
    Unreachable {
        /// The address that was tried.
        address: SocketAddr,
        /// What the host said.
        error: io::Error,
    },
    /// Whoever answered is no receiver of ours.
    #[error("{0} answers, but not as a receiver of lanes over RDMA")]
    Stranger(SocketAddr),
    /// Any other answer of this host.
    #[error("{what}: {error}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the host said.
        error: io::Error,
    },
    /// Every address failed in its own way.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    All(Vec<ConnectFailure>),
}

impl ConnectFailure {
    /// What opening the device told.
    pub(crate) fn of_device(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENODEV | libc::ENOSYS | libc::ENOENT | libc::ENXIO) => Self::NoDevice(error),
            Some(libc::EACCES | libc::EPERM) => Self::NotPermitted(error),
            _ => Self::Host { what: "opening the RDMA device", error },
        }
    }

    /// What asking the device for something told; `wanted` bytes of locked memory were needed for it.
    pub(crate) fn of_resources(what: &'static str, wanted: usize, error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENOMEM | libc::EAGAIN) => {
                Self::LockedMemory { wanted: wanted as u64, limit: crate::plan::locked_memory_limit(), error }
            }
            _ => Self::Host { what, error },
        }
    }

    pub(crate) fn one_of(mut failures: Vec<Self>) -> Self {
        if failures.len() == 1 { failures.remove(0) } else { Self::All(failures) }
    }

    fn kind(&self) -> io::ErrorKind {
        match self {
            Self::Form | Self::Family(_) => io::ErrorKind::InvalidInput,
            Self::NoDevice(_) | Self::NotOnDevice { .. } => io::ErrorKind::Unsupported,
            Self::NotPermitted(_) => io::ErrorKind::PermissionDenied,
            Self::LockedMemory { .. } | Self::ReceiverFull(_) => io::ErrorKind::OutOfMemory,
            Self::InUse(_) => io::ErrorKind::AddrInUse,
            Self::Refused(_) | Self::Version { .. } => io::ErrorKind::ConnectionRefused,
            Self::NoAnswer { .. } => io::ErrorKind::TimedOut,
            Self::Unreachable { .. } => io::ErrorKind::HostUnreachable,
            Self::Stranger(_) => io::ErrorKind::InvalidData,
            Self::Name { error, .. } | Self::Host { error, .. } => error.kind(),
            Self::All(failures) => failures.last().map_or(io::ErrorKind::NotFound, Self::kind),
        }
    }
}

impl From<ConnectFailure> for io::Error {
    fn from(failure: ConnectFailure) -> Self {
        Self::new(failure.kind(), failure)
    }
}

/// Why a lane ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LaneFailure {
    /// The peer ended it in order.
    #[error("the peer closed the lane")]
    Closed,
    /// This side ended it.
    #[error("the lane was closed here")]
    ClosedHere,
    /// The connection ended before the lane did.
    #[error("the peer's process has died or dropped the connection")]
    Dropped,
    /// The peer's device does not answer any more.
    #[error("the peer's device answers nothing any more: its host is down, hung or cut off")]
    Dead,
    /// The peer's device refused a write.
    #[error("the peer refused a write into its memory: it may have closed the window that was written to")]
    WriteRefused,
    /// The connection went into an error state, as it does when the peer writes where it may not.
    #[error(
        "the device broke the connection off, as it does when a peer writes outside of the windows that it was given"
    )]
    BrokenOff,
    /// The device reported something else.
    #[error("the device reports status {0} (see ibv_wc_status) for something that was sent")]
    Device(u32),
    /// The peer does not keep to the protocol.
    #[error("the peer sent {0}")]
    Protocol(&'static str),
}

impl From<LaneFailure> for io::Error {
    fn from(failure: LaneFailure) -> Self {
        let kind = match failure {
            LaneFailure::Closed => io::ErrorKind::UnexpectedEof,
            LaneFailure::ClosedHere => io::ErrorKind::NotConnected,
            LaneFailure::Dropped | LaneFailure::BrokenOff => io::ErrorKind::ConnectionReset,
            LaneFailure::Dead => io::ErrorKind::TimedOut,
            LaneFailure::WriteRefused => io::ErrorKind::PermissionDenied,
            LaneFailure::Device(_) => io::ErrorKind::Other,
            LaneFailure::Protocol(_) => io::ErrorKind::InvalidData,
        };
        Self::new(kind, failure)
    }
}

/// Why pages could not be written straight into the peer's memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteFailure {
    /// No memory was attached to the dialer.
    #[error("no guest memory was attached to this dialer")]
    NotAttached,
    /// The run lies outside of a region.
    #[error("{len} bytes at offset {offset:#x} lie outside region {region}, or in memory that is not mapped here")]
    OutOfBounds {
        /// The region's number.
        region: u32,
        /// Where the run begins.
        offset: u64,
        /// Its bytes.
        len: u64,
    },
    /// The peer opened no window.
    #[error("the peer opens no window at offset {offset:#x} of region {region}: {refusal}")]
    Refused {
        /// The region's number.
        region: u32,
        /// What was asked for.
        offset: u64,
        /// Why not.
        refusal: Refusal,
    },
    /// The device cannot have the source's pages.
    #[error("cannot give pages of the guest to the device: {0}")]
    Register(ConnectFailure),
}

impl From<WriteFailure> for io::Error {
    fn from(failure: WriteFailure) -> Self {
        let kind = match &failure {
            WriteFailure::NotAttached | WriteFailure::OutOfBounds { .. } => io::ErrorKind::InvalidInput,
            WriteFailure::Refused { .. } => io::ErrorKind::PermissionDenied,
            WriteFailure::Register(failure) => failure.kind(),
        };
        Self::new(kind, failure)
    }
}
