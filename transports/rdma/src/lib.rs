//! Pageferry lanes over RDMA: InfiniBand, RoCE, and Soft-RoCE where there is no hardware.
//!
//! The source dials with an [`RdmaDialer`], the destination accepts with an [`RdmaAcceptor`], both by an address of the network
//! interface that belongs to the RDMA device. Frames travel through rings of registered memory; pages that
//! are sent as they are go straight from the source's guest memory into the destination's, by RDMA writes, which cost neither
//! side's processor a copy. What is registered, and so locked, is bounded by the host's limit: see [`RdmaOptions`].
//!
//! Nothing is encrypted here and nobody proves who they are: use a network that is trusted.

mod accept;
mod address;
#[cfg(test)]
mod attacks;
mod cm;
mod dial;
mod failure;
mod halves;
mod lane;
mod ledger;
mod message;
mod options;
mod plan;
mod registered;
mod sys;
mod verbs;
mod windows;

pub use accept::{RdmaAcceptor, first_address};
pub use dial::RdmaDialer;
pub use failure::{ConnectFailure, LaneFailure, WriteFailure};
pub use message::Refusal;
pub use options::RdmaOptions;
