//! Pageferry lanes over TCP, and over any stream socket that the host has opened already.
//!
//! The source dials with a [`TcpDialer`], the destination accepts with a [`TcpAcceptor`]; both keep
//! to the dedicated migration network when they are told its address or interface ([`TcpOptions`]).
//! A host that connects by its own means hands its sockets over with [`lane_from_fd`] and lets
//! [`pageferry::transport::ReadyLanes`] give them out.
//!
//! Nothing is encrypted here and nobody proves who they are: use a network that is trusted.
#![deny(unsafe_code)]

mod accept;
mod dial;
mod lane;
mod options;
#[allow(unsafe_code)]
mod sys;

pub use accept::{BindFailure, TcpAcceptor, accept_within};
pub use dial::{DialFailure, TcpDialer};
pub use lane::{Connection, LaneFailure, explain, lane_from_fd, lane_over};
pub use options::TcpOptions;
