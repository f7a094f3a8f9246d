//! Who the two ends are, and how each makes sure of the other: what TLS and QUIC have in common.

mod crypto;
mod noting;
mod pairing;
mod pem;
mod pinned;
mod verdict;

pub use noting::FlawNote;
pub use pairing::Pairing;
pub use verdict::{Refusal, Verdict, verdict_byte, verdict_of};

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use rustls::client::Resumption;
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ServerConfig};

use crate::error::{IdentityFailure, TlsFailure};
use pairing::Receiver;

/// What this link is called in the handshake (ALPN). The number is that of what stands before the first frame; frames
/// agree on their version by themselves.
pub(crate) const PROTOCOL: &[u8] = b"pageferry-link/1";

/// Who the source is, and whom it takes for its destination.
#[derive(Clone, Debug)]
pub struct SourceIdentity {
    tls: Arc<ClientConfig>,
    verifier: Arc<dyn ServerCertVerifier>,
    name: Naming,
    proof: Option<[u8; pairing::PROOF_LEN]>,
}

/// Which name the destination's certificate must have.
#[derive(Clone, Debug)]
enum Naming {
    /// That of the host that is dialled.
    Dialled,
    /// This one.
    Fixed(ServerName<'static>),
}

impl SourceIdentity {
    /// The identity in a folder: `cert.pem` (with its intermediates), `key.pem`, and the CA that the destination's
    /// certificate must come from, `ca.pem`. The destination's certificate must be valid for the host that is dialled.
    pub fn from_pem_dir(folder: impl AsRef<Path>) -> Result<Self, IdentityFailure> {
        let (tls, verifier) = pem::Folder::read(folder.as_ref())?.source()?;
        Ok(Self { tls: shared(tls), verifier, name: Naming::Dialled, proof: None })
    }

    /// A fresh identity, for the one destination that has printed this string.
    pub fn from_pairing(pairing: &Pairing) -> Result<Self, IdentityFailure> {
        let (tls, verifier, proof) = pairing::source(pairing)?;
        Ok(Self { tls: shared(tls), verifier, name: Naming::Fixed(pairing::name()), proof: Some(proof) })
    }

    /// Expects this name in the destination's certificate, whatever host is dialled. Of no use with pairing.
    pub fn expecting(mut self, name: &str) -> Result<Self, IdentityFailure> {
        if self.proof.is_none() {
            self.name = Naming::Fixed(server_name(name)?);
        }
        Ok(self)
    }

    /// What to do the handshake with.
    pub fn tls(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.tls)
    }

    /// The same, for a library that reports errors as text: what is wrong with a peer's certificate can be read in the note.
    pub fn tls_with_note(&self) -> (ClientConfig, FlawNote) {
        let (mut tls, note) = (ClientConfig::clone(&self.tls), FlawNote::default());
        let verifier = noting::Noting::new(Arc::clone(&self.verifier), note.clone());
        tls.dangerous().set_certificate_verifier(Arc::new(verifier));
        (tls, note)
    }

    /// The name to expect at `HOST:PORT`.
    pub fn server_name(&self, target: &str) -> Result<ServerName<'static>, TlsFailure> {
        match &self.name {
            Naming::Fixed(name) => Ok(name.clone()),
            Naming::Dialled => {
                let host = target.rsplit_once(':').map_or(target, |(host, _)| host);
                let host = host.strip_prefix('[').and_then(|inner| inner.strip_suffix(']')).unwrap_or(host);
                Ok(server_name(host.split('%').next().unwrap_or(host))?)
            }
        }
    }

    /// What to send as soon as the connection is encrypted; empty if certificates say everything.
    pub fn proof(&self) -> &[u8] {
        self.proof.as_ref().map_or(&[], |proof| proof)
    }
}

/// Who the destination is, and whom it lets in. Clones share what they know of strangers.
#[derive(Clone, Debug)]
pub struct DestinationIdentity {
    tls: Arc<ServerConfig>,
    receiver: Option<Arc<Receiver>>,
}

impl DestinationIdentity {
    /// The identity in a folder: `cert.pem` (with its intermediates), `key.pem`, and the CA that the source's
    /// certificate must come from, `ca.pem`. Whoever has such a certificate is let in.
    pub fn from_pem_dir(folder: impl AsRef<Path>) -> Result<Self, IdentityFailure> {
        let tls = pem::Folder::read(folder.as_ref())?.destination()?;
        Ok(Self { tls: served(tls), receiver: None })
    }

    /// A fresh identity and a fresh token, for the first source that shows the token: see [`pairing`](Self::pairing).
    pub fn for_pairing() -> Result<Self, IdentityFailure> {
        let (tls, receiver) = pairing::destination()?;
        Ok(Self { tls: served(tls), receiver: Some(Arc::new(receiver)) })
    }

    /// What the source must be given, if this is a pairing.
    pub fn pairing(&self) -> Option<&Pairing> {
        self.receiver.as_deref().map(Receiver::pairing)
    }

    /// What to do the handshake with.
    pub fn tls(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.tls)
    }

    /// Bytes that a source has to send as its proof when the connection is encrypted.
    pub fn proof_len(&self) -> usize {
        self.receiver.as_ref().map_or(0, |_| pairing::PROOF_LEN)
    }

    /// Whether to let in a source that is at this address, has authenticated with this chain of certificates, and has
    /// sent this proof.
    pub fn judge(&self, proof: &[u8], chain: Option<&[CertificateDer<'_>]>, from: IpAddr, now: Instant) -> Verdict {
        match (&self.receiver, chain.and_then(<[_]>::first)) {
            (_, None) => Err(Refusal::WrongToken),
            (None, Some(_)) => Ok(()),
            (Some(receiver), Some(certificate)) => receiver.judge(proof, certificate, from, now),
        }
    }
}

fn server_name(name: &str) -> Result<ServerName<'static>, IdentityFailure> {
    ServerName::try_from(name.to_owned()).map_err(|_| IdentityFailure::Name(name.to_owned()))
}

/// What both ways have in common, at the source.
fn shared(mut tls: ClientConfig) -> Arc<ClientConfig> {
    tls.alpn_protocols = vec![PROTOCOL.to_vec()];
    tls.resumption = Resumption::disabled();
    // Records are this crate's: see `record.rs`.
    tls.enable_secret_extraction = true;
    Arc::new(tls)
}

/// What both ways have in common, at the destination.
fn served(mut tls: ServerConfig) -> Arc<ServerConfig> {
    tls.alpn_protocols = vec![PROTOCOL.to_vec()];
    tls.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    tls.send_tls13_tickets = 0;
    tls.enable_secret_extraction = true;
    Arc::new(tls)
}
