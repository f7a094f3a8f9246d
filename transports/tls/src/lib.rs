//! Pageferry lanes over TLS 1.3, and the identities that encrypted transports share.
//!
//! The source dials with a [`TlsDialer`], the destination accepts with a [`TlsAcceptor`]; underneath are
//! `pageferry-tcp`'s connections with all of its options. Both ends always prove who they are, in one of two ways
//! ([`SourceIdentity`], [`DestinationIdentity`]): with certificates of a common CA from a folder of PEM files, or by
//! [`Pairing`], which takes nothing but a string that a person carries from the receiver to the sender.
//!
//! A lane begins with the handshake, then the source's proof of the token if they pair (32 bytes), then one byte in
//! which the destination says whether it lets the source in; frames follow. There is no resumption and no early
//! data, so nothing that was recorded can be played back.
#![deny(unsafe_code)]

mod accept;
mod attempts;
mod connection;
mod dial;
mod error;
mod identity;
mod lane;
mod opening;
mod record;
mod socket;

pub use accept::TlsAcceptor;
pub use dial::TlsDialer;
pub use error::{CertificateFlaw, IdentityFailure, TlsFailure};
pub use identity::{
    DestinationIdentity, FlawNote, Pairing, Refusal, SourceIdentity, Verdict, verdict_byte, verdict_of,
};

use pageferry::transport::Capabilities;

/// Frames are encrypted and the peer is known.
fn capabilities() -> Capabilities {
    let mut capabilities = Capabilities::default();
    capabilities.encrypted = true;
    capabilities
}
