//! Pageferry lanes over QUIC: one connection, a stream for each lane.
//!
//! The source dials with a [`QuicDialer`], the destination accepts with a [`QuicAcceptor`]; who they are is said by
//! `pageferry-tls`'s identities, once for the connection. The source's address may change in the middle of a migration
//! ([`QuicDialer::rebind`]). Nothing outside needs to know of the asynchronous runtime inside: lanes block, each end has
//! threads of its own, and they go with its last lane.
//!
//! A connection begins with a stream on which the source sends its proof, if they pair, and the destination one byte: whether
//! it lets the source in. Before that the source may have no other stream, and next to no buffer.
#![deny(unsafe_code)]

mod accept;
#[doc(hidden)]
pub mod bare;
mod config;
mod dial;
mod error;
mod host;
mod lane;
mod options;
mod wait;

pub use accept::QuicAcceptor;
pub use dial::QuicDialer;
pub use error::QuicFailure;
pub use options::QuicOptions;

use pageferry::transport::Capabilities;

/// Frames are encrypted, the peer is known, and streams are bounded.
fn capabilities() -> Capabilities {
    let mut capabilities = Capabilities::default();
    (capabilities.encrypted, capabilities.max_lanes) = (true, options::MAX_STREAMS as u16);
    // The engine's lanes carry much in one direction only.
    capabilities.lane_memory = options::LANE_WINDOW.into();
    capabilities
}
